//! The engine without servers: paused time, a store inside the process, and a backend that plays a script. Outages of
//! hours take milliseconds here.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod disk;
mod follow;
mod keep;
mod model;
mod observed;
mod script;

use std::{sync::Arc, time::Duration};

use registry_core::{
    Instance, Managed, Options, Registry, Snapshot, Watcher,
    memory::{MemoryBackend, MemoryLink, MemoryStore},
};
use tokio::time::{Instant, timeout};

use self::observed::{Log, Observed};

const TTL: Duration = Duration::from_secs(15);

/// One process: a registry over a store in memory, its network link, and a log of what it asked the store.
struct Process {
    registry: Managed<Observed<MemoryBackend>>,
    link: MemoryLink,
    log: Log,
}

impl Process {
    fn start(store: &MemoryStore) -> Self {
        Self::with(store, Options::default())
    }

    fn with(store: &MemoryStore, options: Options) -> Self {
        let backend = MemoryBackend::new(store.clone(), options.ttl);
        let link = backend.link();
        let (backend, log) = Observed::new(backend);
        Self { registry: Managed::new(backend, options).unwrap(), link, log }
    }

    /// Ends without a word, as a killed process does.
    fn crash(self) {
        self.link.cut();
    }

    async fn register(&self, service: &str, id: &str) {
        self.registry.register(instance(service, id)).await.unwrap();
    }

    async fn register_many(&self, service: &str, ids: std::ops::Range<usize>) {
        let instances = ids.map(|id| instance(service, &format!("{id:05}"))).collect();
        for outcome in self.registry.register_all(instances).await {
            outcome.unwrap();
        }
    }

    async fn watch(&self, service: &str) -> Watcher {
        self.registry.watch(service).await.unwrap()
    }

    fn state(&self, id: &str) -> String {
        let registrations = self.registry.registrations();
        registrations.iter().find(|r| r.id().as_str() == id).map_or("none".into(), |r| r.state.to_string())
    }

    async fn until_state(&self, id: &str, state: &str, within: Duration) {
        eventually(within, || self.state(id) == state, || format!("{id} is {}, not {state}", self.state(id))).await;
    }
}

fn instance(service: &str, id: &str) -> Instance {
    Instance::builder(service, id).endpoint("http://10.0.0.1:80").build().unwrap()
}

fn ids(snapshot: &Snapshot) -> Vec<String> {
    snapshot.instances().iter().map(|instance| instance.id.to_string()).collect()
}

/// The instances that the store holds, by path.
fn stored(store: &MemoryStore) -> Vec<String> {
    store.paths().into_iter().filter(|path| path.contains("/providers/")).collect()
}

/// Waits until `holds`, in steps of the paused clock. Fails with what `seen` says.
async fn eventually(within: Duration, mut holds: impl FnMut() -> bool, seen: impl Fn() -> String) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {within:?}: {}", seen());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The next snapshots until one is as wanted; returns all that were seen.
async fn until(watcher: &mut Watcher, within: Duration, wanted: impl Fn(&Snapshot) -> bool) -> Vec<Snapshot> {
    let mut seen: Vec<Snapshot> = Vec::new();
    let look = async {
        loop {
            let snapshot = watcher.next().await.expect("the registry lives");
            seen.push(snapshot);
            if seen.last().is_some_and(&wanted) {
                break;
            }
        }
    };
    let found = timeout(within, look).await;
    assert!(found.is_ok(), "not within {within:?}: saw {seen:#?}");
    seen
}

/// Asserts that nothing is published for a while.
async fn quiet(watcher: &mut Watcher, during: Duration) {
    if let Ok(snapshot) = timeout(during, watcher.next()).await {
        panic!("published although nothing changed: {snapshot:?}");
    }
}

fn dynamic(process: Process) -> (Arc<dyn Registry>, MemoryLink) {
    (Arc::new(process.registry), process.link)
}
