//! The works that are measured, the same for every store.

pub(crate) mod follow;
pub(crate) mod growth;
pub(crate) mod large;
pub(crate) mod outlive;
pub(crate) mod picks;
pub(crate) mod read;
pub(crate) mod register;

use std::{
    future::Future,
    sync::{Arc, LazyLock},
    time::Duration,
};

use registry_core::{Freshness, Instance, Registry, Watcher};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::context::TokioContext;

use crate::{Result, bare::Bare};

/// Nothing that is measured takes longer.
pub(crate) const AT_MOST: Duration = Duration::from_secs(60);

/// What one call may take above its floor whatever the ratio, in seconds: a fraction of what a network adds to both.
pub(crate) const SPARE: f64 = 75e-6;

/// How much is done for each figure.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// Shorter and smaller where that says nearly the same.
    pub(crate) quick: bool,
}

impl Effort {
    /// For what takes milliseconds, and varies: a server that writes to a disk is at times twice as slow.
    pub(crate) fn often(self) -> usize {
        3 * self.rounds
    }
}

/// Both, each the first in every other round: what one leaves behind at the server is cleared away beside the other.
pub(crate) async fn in_turn(
    round: usize,
    ours: impl Future<Output = Result<Duration>>,
    floor: impl Future<Output = Result<Duration>>,
) -> Result<(Duration, Duration)> {
    if round.is_multiple_of(2) {
        let floor = floor.await?;
        Ok((ours.await?, floor))
    } else {
        Ok((ours.await?, floor.await?))
    }
}

/// The runtime of another process: what it does shares no thread with what is measured here.
pub(crate) struct Elsewhere(Runtime);

pub(crate) fn elsewhere() -> &'static Elsewhere {
    static ELSEWHERE: LazyLock<Elsewhere> = LazyLock::new(|| {
        let runtime = Builder::new_multi_thread().enable_all().thread_name("elsewhere").build();
        Elsewhere(runtime.expect("threads"))
    });
    &ELSEWHERE
}

impl Elsewhere {
    pub(crate) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.0.spawn(work)
    }

    /// What `work` opens and starts, it does there.
    pub(crate) fn within<F: Future>(&self, work: F) -> TokioContext<F> {
        TokioContext::new(work, self.0.handle().clone())
    }

    /// A registry that lives there.
    pub(crate) fn connect<B: Bare>(&self, store: &B, prefix: &str) -> Result<Arc<dyn Registry>> {
        let _there = self.0.enter();
        store.connect(prefix)
    }
}

/// Connects and has a session and a place for the service, as the floor has before its clock starts.
pub(crate) async fn warm_up(registry: &dyn Registry) -> Result<()> {
    registry.register(Instance::builder("orders", "first").build()?).await?;
    registry.unregister("orders", "first").await?;
    Ok(())
}

pub(crate) async fn register_all(registry: &dyn Registry, instances: Vec<Instance>) -> Result<()> {
    for outcome in registry.register_all(instances).await {
        outcome?;
    }
    Ok(())
}

pub(crate) async fn follow(registry: &dyn Registry, service: &str) -> Result<Watcher> {
    let mut watcher = registry.watch(service).await?;
    while watcher.current().freshness() == Freshness::Pending {
        timeout(AT_MOST, watcher.next()).await?.ok_or("the registry is gone")?;
    }
    Ok(watcher)
}

/// Waits until the reader has so many.
pub(crate) async fn until(watcher: &mut Watcher, count: usize) -> Result<()> {
    while watcher.current().len() < count {
        timeout(AT_MOST, watcher.next()).await?.ok_or("the registry is gone")?;
    }
    Ok(())
}

/// Waits until the reader has this version of the instance.
pub(crate) async fn seen(watcher: &mut Watcher, instance: &Instance) -> Result<()> {
    loop {
        let snapshot = timeout(AT_MOST, watcher.next()).await?.ok_or("the registry is gone")?;
        if snapshot.get(&instance.id).is_some_and(|seen| seen.version == instance.version) {
            return Ok(());
        }
    }
}

/// Records of about 256 bytes.
pub(crate) fn instances(count: usize) -> Vec<Instance> {
    instances_of("orders", count)
}

pub(crate) fn instances_of(service: &str, count: usize) -> Vec<Instance> {
    (0..count)
        .map(|id| {
            Instance::builder(service, format!("{id:06}"))
                .endpoint(format!("http://10.0.{}.{}:8080", id / 250, id % 250))
                .version("1.2.3")
                .zone("eu-1a")
                .metadata("commit", "d34db33fd34db33fd34db33f")
                .build()
                .expect("valid")
        })
        .collect()
}

/// The connection string of a process of its own, with the server at this address.
pub(crate) fn url<B: Bare>(store: &B, at: std::net::SocketAddr, prefix: &str, options: &str) -> String {
    let scheme = store.server().url().split("://").next().unwrap_or_default();
    format!("{scheme}://{at}/{prefix}?{options}")
}

/// Registers `each` instances in each of so many services, by ten clients.
pub(crate) async fn fill<B: Bare>(
    store: &B,
    prefix: &str,
    services: usize,
    each: usize,
) -> Result<Vec<Arc<dyn Registry>>> {
    let names: Vec<String> = (0..services).map(|index| format!("service-{index:04}")).collect();
    let mut writers = Vec::new();
    for names in names.chunks(services.div_ceil(10)) {
        let writer = store.connect(prefix)?;
        let all = names.iter().flat_map(|name| instances_of(name, each)).collect();
        register_all(&*writer, all).await?;
        writers.push(writer);
    }
    Ok(writers)
}

pub(crate) async fn destroy_all(registries: Vec<Arc<dyn Registry>>) -> Result<()> {
    for registry in registries {
        registry.destroy().await?;
    }
    Ok(())
}
