//! The works that are measured, the same for every store.

use std::{hint::black_box, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use registry_core::{Freshness, Instance, Managed, Options, Registry, Watcher, memory::MemoryConfig};
use registry_tests::proxy::FaultProxy;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    Result,
    bare::{Bare, Reader, Writer, entries},
    samples::{Report, Samples, Unit},
};

/// Nothing that is measured takes longer.
const AT_MOST: Duration = Duration::from_secs(60);

/// Reading the cached set of 100 instances.
pub(crate) async fn reads(report: &mut Report, rounds: usize) -> Result<()> {
    let config = MemoryConfig::from_location("memory://".parse()?)?;
    let backend = registry_core::memory::MemoryBackend::new(config.store(), config.options.ttl);
    let registry: Arc<dyn Registry> = Arc::new(Managed::new(backend, config.options)?);
    register_all(&*registry, instances(100)).await?;
    let mut watcher = follow(&*registry).await?;
    until(&mut watcher, 100).await?;
    let handle = watcher.handle();
    let swap = ArcSwap::from_pointee(handle.current().clone());
    let (mut by_handle, mut by_name, mut load) = (Samples::default(), Samples::default(), Samples::default());
    for _ in 0..rounds {
        load.time(each(|| _ = black_box(swap.load().len())));
        by_handle.time(each(|| _ = black_box(handle.current().len())));
        let began = Instant::now();
        for _ in 0..200_000 {
            black_box(registry.discover(black_box("orders")).await?.len());
        }
        by_name.time(began.elapsed() / 200_000);
    }
    report.ratio("read the set of 100 by handle (floor: `ArcSwap::load`)", Unit::Seconds, &by_handle, &load, 2.0);
    report.bound("`discover` by name through `Arc<dyn Registry>`", Unit::Seconds, &by_name, Some(&load), 150e-9);
    Ok(())
}

/// The time of one call of `work`, from many.
fn each(work: impl Fn()) -> Duration {
    const CALLS: u32 = 200_000;
    let began = Instant::now();
    for _ in 0..CALLS {
        work();
    }
    began.elapsed() / CALLS
}

/// Registering 1000 at once.
pub(crate) async fn register<B: Bare>(store: &B, report: &mut Report, rounds: usize) -> Result<()> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        let prefix = format!("floor-{round}");
        let writer = store.writer(store.server().addr(), &prefix, 1000).await?;
        let entries = entries(&prefix, 1000);
        let began = Instant::now();
        writer.write_all(entries).await?;
        let took = began.elapsed();
        writer.end().await?;

        let registry = store.connect(&format!("ours-{round}"))?;
        warm_up(&*registry).await?;
        let all = instances(1000);
        let began = Instant::now();
        register_all(&*registry, all).await?;
        let mine = began.elapsed();
        registry.destroy().await?;
        // The first round warms the server up.
        if round > 0 {
            floor.time(took);
            ours.time(mine);
        }
    }
    report.ratio(&format!("register 1000 (floor: {})", B::BATCHES), Unit::Seconds, &ours, &floor, 1.25);
    Ok(())
}

/// Registering 300, each after the other.
pub(crate) async fn one_by_one<B: Bare>(store: &B, report: &mut Report, rounds: usize) -> Result<()> {
    const COUNT: usize = 300;
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        let prefix = format!("single-{round}");
        let writer = store.writer(store.server().addr(), &prefix, COUNT).await?;
        let began = Instant::now();
        for entry in entries(&prefix, COUNT) {
            writer.write(&entry).await?;
        }
        let took = began.elapsed();
        writer.end().await?;

        let registry = store.connect(&format!("singly-{round}"))?;
        warm_up(&*registry).await?;
        let all = instances(COUNT);
        let began = Instant::now();
        for instance in all {
            registry.register(instance).await?;
        }
        let mine = began.elapsed();
        registry.destroy().await?;
        if round > 0 {
            floor.time(took / COUNT as u32);
            ours.time(mine / COUNT as u32);
        }
    }
    report.ratio(&format!("register one (floor: {})", B::SINGLE), Unit::Seconds, &ours, &floor, 1.15);
    Ok(())
}

/// From a change by one process to the cache of another, with 100 present.
pub(crate) async fn propagate<B: Bare>(store: &B, report: &mut Report, rounds: usize) -> Result<()> {
    let (writer, reader) = (store.connect("propagate")?, store.connect("propagate")?);
    let all = instances(100);
    register_all(&*writer, all.clone()).await?;
    let mut watcher = follow(&*reader).await?;
    until(&mut watcher, 100).await?;
    let addr = store.server().addr();
    let bare = Arc::new(store.writer(addr, "bare", 100).await?);
    bare.write_all(entries("bare", 100)).await?;
    let mut following = store.reader(addr, "bare").await?;

    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..rounds * 100 {
        let mut entry = entries("bare", 100).swap_remove(round % 100);
        entry.1 = String::from_utf8(entry.1)?.replace("1.2.3", &format!("2.0.{round}")).into_bytes();
        let began = Instant::now();
        // In a task of its own, as a process of its own would.
        let writing = tokio::spawn({
            let bare = bare.clone();
            async move { bare.change(&entry).await }
        });
        timeout(AT_MOST, following.changes()).await??;
        floor.time(began.elapsed());
        writing.await??;

        let mut instance = all[round % 100].clone();
        instance.version = Some(format!("2.0.{round}"));
        let began = Instant::now();
        let (outcome, took) = tokio::join!(writer.register(instance.clone()), async {
            seen(&mut watcher, &instance).await.map(|()| began.elapsed())
        });
        outcome?;
        ours.time(took?);
    }
    report.ratio("change → reader, p50 (floor: write → event, with its value)", Unit::Seconds, &ours, &floor, 1.3);
    report.ratio("change → reader, p99", Unit::Seconds, &ours.p99(), &floor.p99(), 1.5);
    Arc::into_inner(bare).ok_or("a write is under way")?.end().await?;
    writer.destroy().await?;
    Ok(reader.destroy().await?)
}

/// A reader follows while another process registers many: until the reader has them all.
pub(crate) async fn converge<B: Bare>(store: &B, report: &mut Report, count: usize, rounds: usize) -> Result<()> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        let prefix = format!("many-{count}-{round}");
        let addr = store.server().addr();
        let writer = store.writer(addr, &prefix, count).await?;
        let mut reader = store.reader(addr, &prefix).await?;
        let entries = entries(&prefix, count);
        let began = Instant::now();
        let writing = tokio::spawn(async move { writer.write_all(entries).await.map(|()| writer) });
        let mut seen = 0;
        while seen < count {
            seen += timeout(AT_MOST, reader.changes()).await??;
        }
        let took = began.elapsed();
        writing.await??.end().await?;

        let prefix = format!("converge-{count}-{round}");
        let (writer, reader) = (store.connect(&prefix)?, store.connect(&prefix)?);
        let mut watcher = follow(&*reader).await?;
        warm_up(&*writer).await?;
        let all = instances(count);
        let began = Instant::now();
        let writing = tokio::spawn({
            let writer = writer.clone();
            async move { register_all(&*writer, all).await }
        });
        until(&mut watcher, count).await?;
        let mine = began.elapsed();
        writing.await??;
        writer.destroy().await?;
        reader.destroy().await?;
        if round > 0 {
            floor.time(took);
            ours.time(mine);
        }
    }
    report.ratio(&format!("{count} registrations converge at a reader"), Unit::Seconds, &ours, &floor, 1.3);
    Ok(())
}

/// The bytes that one change among a thousand costs a reader.
pub(crate) async fn change<B: Bare>(store: &B, report: &mut Report, rounds: usize) -> Result<()> {
    const CHANGES: usize = 20;
    let writer = store.connect("change")?;
    let all = instances(1000);
    register_all(&*writer, all.clone()).await?;
    let proxy = FaultProxy::start(store.server().addr()).await?;
    // No check of the set in between.
    let options = Options::default().reconcile(Duration::from_secs(3600)).ttl(Duration::from_secs(600));
    let reader = store.registry(proxy.addr(), "change", options)?;
    let mut watcher = follow(&*reader).await?;
    until(&mut watcher, 1000).await?;

    let mut ours = Samples::default();
    for round in 0..rounds {
        let before = proxy.stats();
        for change in 0..CHANGES {
            let mut instance = all[change * 7].clone();
            instance.version = Some(format!("2.0.{round}"));
            let (outcome, seen) = tokio::join!(writer.register(instance.clone()), seen(&mut watcher, &instance));
            outcome?;
            seen?;
        }
        let after = proxy.stats();
        let bytes = (after.to_client - before.to_client) + (after.to_server - before.to_server);
        ours.add(bytes as f64 / CHANGES as f64);
    }
    report.bound("one change among 1000, both ways, for each reader", Unit::Bytes, &ours, None, 600.0);
    writer.destroy().await?;
    Ok(reader.destroy().await?)
}

/// A thousand instances kept alive over ten heartbeats: what goes to the server.
pub(crate) async fn keep<B: Bare>(store: &B, report: &mut Report) -> Result<()> {
    const TTL: Duration = Duration::from_secs(6);
    const BEATS: u32 = 10;
    let (ours, floor) =
        (FaultProxy::start(store.server().addr()).await?, FaultProxy::start(store.server().addr()).await?);
    let options = Options::default().ttl(TTL).reconcile(Duration::from_secs(3600));
    let registry = store.registry(ours.addr(), "kept", options)?;
    register_all(&*registry, instances(1000)).await?;
    let bare = store.writer(floor.addr(), "kept-floor", 1000).await?;
    bare.write_all(entries("kept-floor", 1000)).await?;

    let before = (ours.stats().to_server, floor.stats().to_server);
    for _ in 0..BEATS {
        bare.keep_alive().await?;
        sleep(TTL / 3).await;
    }
    let (mut mine, mut least) = (Samples::default(), Samples::default());
    mine.add((ours.stats().to_server - before.0) as f64 / f64::from(BEATS));
    least.add((floor.stats().to_server - before.1) as f64 / f64::from(BEATS));
    let work = "1000 kept alive, to the server, each heartbeat (floor: the client's own)";
    // Next to nothing, whatever their number, or about what the store itself needs to be told.
    report.bound(work, Unit::Bytes, &mine, Some(&least), f64::max(1000.0, 1.2 * least.median()));
    bare.end().await?;
    Ok(registry.destroy().await?)
}

/// The server is killed, wiped and started again: how long until it has everybody back, with nobody missing at a
/// reader meanwhile.
pub(crate) async fn wipe<B: Bare>(store: &B, report: &mut Report, rounds: usize) -> Result<()> {
    const COUNT: usize = 100;
    let mut back = Samples::default();
    for round in 0..rounds {
        let prefix = format!("wiped-{round}");
        let (writer, reader) = (store.connect(&prefix)?, store.connect(&prefix)?);
        register_all(&*writer, instances(COUNT)).await?;
        let mut watcher = follow(&*reader).await?;
        until(&mut watcher, COUNT).await?;
        let least = tokio::spawn(async move {
            let mut least = COUNT;
            while let Some(snapshot) = watcher.next().await {
                least = least.min(snapshot.len());
            }
            least
        });
        store.server().wipe().await?;
        let returned = Instant::now();
        let judge = store.connect(&prefix)?;
        let mut judging = follow(&*judge).await?;
        until(&mut judging, COUNT).await?;
        back.time(returned.elapsed());
        // The reader first: it would see the others leave.
        reader.destroy().await?;
        let least = least.await?;
        judge.destroy().await?;
        writer.destroy().await?;
        if least < COUNT {
            return Err(format!("a reader saw only {least} of {COUNT} while the server was away").into());
        }
    }
    report.bound("100 back in a wiped server, after it serves again", Unit::Seconds, &back, None, 2.0);
    Ok(())
}

/// Connects and has a session and a place for the service, as the floor has before its clock starts.
async fn warm_up(registry: &dyn Registry) -> Result<()> {
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

pub(crate) async fn follow(registry: &dyn Registry) -> Result<Watcher> {
    let mut watcher = registry.watch("orders").await?;
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
async fn seen(watcher: &mut Watcher, instance: &Instance) -> Result<()> {
    loop {
        let snapshot = timeout(AT_MOST, watcher.next()).await?.ok_or("the registry is gone")?;
        if snapshot.get(&instance.id).is_some_and(|seen| seen.version == instance.version) {
            return Ok(());
        }
    }
}

/// Records of about 256 bytes.
pub(crate) fn instances(count: usize) -> Vec<Instance> {
    (0..count)
        .map(|id| {
            Instance::builder("orders", format!("{id:06}"))
                .endpoint(format!("http://10.0.{}.{}:8080", id / 250, id % 250))
                .version("1.2.3")
                .zone("eu-1a")
                .metadata("commit", "d34db33fd34db33fd34db33f")
                .build()
                .expect("valid")
        })
        .collect()
}
