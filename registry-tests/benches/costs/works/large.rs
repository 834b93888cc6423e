//! Many: instances in a cache, services of a reader, watchers of a service, and a large estate.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use registry_core::{Managed, Registry};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};

use crate::{
    Result,
    bare::{Bare, entries},
    measured::{Loaded, Measured, Used},
    report::Report,
    samples::{Samples, Unit},
    works::{AT_MOST, Effort, destroy_all, fill, follow, instances, register_all, until, url},
};

/// The memory of each cached instance of ten thousand.
pub(crate) async fn memory<B: Bare>(store: &B, report: &mut Report) -> Result<()> {
    const COUNT: usize = 10_000;
    let writers = fill(store, "memory", 1, COUNT).await?;
    let (Loaded { allocated, resident, .. }, measured) = load(store, "memory", 1, COUNT).await?;
    measured.end().await?;
    let each = |bytes: f64| Samples::of(bytes / COUNT as f64);
    let record = Samples::of(entries("memory", 1)[0].1.len() as f64);
    let work = "memory of each of 10 000 cached instances, allocated (floor: its record)";
    report.ratio("W7", work, Unit::Bytes, &each(allocated), &record, 1.5);
    report.bound("W7", "the same, resident", Unit::Bytes, &each(resident), Some(&record), 1000.0);
    destroy_all(writers).await
}

/// One process that follows many services of ten instances each.
pub(crate) async fn services<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    const EACH: usize = 10;
    let idle = Duration::from_secs(if effort.quick { 10 } else { 30 });
    let (few, many) = (100, 1000);
    let writers = fill(store, "services", many, EACH).await?;
    let mut figures = Vec::new();
    for count in [few, many] {
        let before = store.watches().await?;
        let (loaded, mut measured) = load(store, "services", count, EACH).await?;
        let watches = store.watches().await?.saturating_sub(before);
        // What it does at its start is not what it does for ever.
        sleep(Duration::from_secs(2)).await;
        measured.used().await?;
        sleep(idle).await;
        figures.push((count as f64, loaded, watches as f64, measured.used().await?));
        measured.end().await?;
    }
    let each = |figure: &dyn Fn(&Loaded, &Used) -> f64| {
        let all: Vec<_> =
            figures.iter().map(|(count, loaded, _, used)| Samples::of(figure(loaded, used) / count)).collect();
        (all[1].clone(), all[0].clone())
    };
    let (count, _, watches, used) = &figures[1];
    // One of them is nobody's, which it follows from its start.
    let watches = watches - B::WATCHES as f64;
    let (most, told) = (B::WATCHES as f64, "1000 services of 10 in one process (floor: 100 of them)");
    let of_each = Samples::of(watches / count);
    report.bound("W9", "1000 services followed: watches of each at the server", Unit::Count, &of_each, None, most);
    let (ours, floor) = each(&|loaded, _| loaded.allocated);
    report.ratio("W9", &format!("{told}: memory of each, allocated"), Unit::Bytes, &ours, &floor, 1.3);
    let (ours, floor) = each(&|loaded, _| loaded.resident);
    report.figure("W9", "the same: resident", Unit::Bytes, &ours, Some(&floor));
    let (ours, floor) = each(&|loaded, _| loaded.seconds);
    report.figure("W9", "the same: first load of each", Unit::Seconds, &ours, Some(&floor));
    let wakes = |(_, _, _, used): &(f64, Loaded, f64, Used)| Samples::of(used.wakes / used.seconds);
    let (ours, floor) = (wakes(&figures[1]), wakes(&figures[0]));
    // As many for each; those of few services are few, and come together at times.
    let most = (many / few) as f64 * floor.median() * 2.0;
    report.bound("W9", "the same, idle: threads woken a second", Unit::Count, &ours, Some(&floor), most);
    let share = Samples::of(used.processor / used.seconds);
    report.figure("W9", "the same, idle: of one processor", Unit::Share, &share, None);
    destroy_all(writers).await
}

/// A change to the last of a thousand watchers of one service in one process.
pub(crate) async fn watchers(report: &mut Report, effort: Effort) -> Result<()> {
    const WATCHERS: usize = 1000;
    let registry = Managed::memory("memory://watchers")?;
    let all = instances(10);
    register_all(&registry, all.clone()).await?;
    let mut first = follow(&registry, "orders").await?;
    until(&mut first, 10).await?;

    let done = Arc::new(Count { reached: Notify::new(), count: AtomicUsize::new(0) });
    let (change, changed) = watch::channel(0_usize);
    let mut floors = Vec::new();
    for _ in 0..WATCHERS {
        let (mut watcher, done) = (changed.clone(), done.clone());
        floors.push(tokio::spawn(async move {
            while watcher.changed().await.is_ok() {
                watcher.borrow_and_update();
                done.one(WATCHERS);
            }
        }));
    }
    let (mut floor, mut floor_tells) = (Samples::default(), Samples::default());
    for round in 0..effort.rounds * 20 {
        tokio::task::yield_now().await;
        let began = Instant::now();
        change.send_replace(round);
        floor_tells.time(began.elapsed());
        timeout(AT_MOST, done.reached.notified()).await?;
        floor.time(began.elapsed());
    }
    drop(change);
    futures::future::join_all(floors).await;

    for _ in 0..WATCHERS {
        let (mut watcher, done) = (first.clone(), done.clone());
        tokio::spawn(async move {
            while watcher.next().await.is_some() {
                done.one(WATCHERS);
            }
        });
    }
    let mut ours = Samples::default();
    for round in 0..effort.rounds * 20 {
        let mut instance = all[0].clone();
        instance.version = Some(format!("2.0.{round}"));
        let began = Instant::now();
        registry.register(instance).await?;
        timeout(AT_MOST, done.reached.notified()).await?;
        ours.time(began.elapsed());
    }
    registry.destroy().await?;
    let work = "a change until the last of 1000 watchers in a process has it (floor: a `watch` channel)";
    report.figure("W9", work, Unit::Seconds, &ours, Some(&floor));
    Ok(())
}

/// Counts to a number, again and again.
struct Count {
    reached: Notify,
    count: AtomicUsize,
}

impl Count {
    fn one(&self, of: usize) {
        if (self.count.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(of) {
            self.reached.notify_one();
        }
    }
}

/// A store with a hundred thousand instances, and one reader of all of it.
pub(crate) async fn estate<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    let (services, each) = (if effort.quick { 100 } else { 1000 }, 100);
    let count = (services * each) as f64;
    let steady = Duration::from_secs(if effort.quick { 10 } else { 30 });
    let began = Instant::now();
    let writers = fill(store, "estate", services, each).await?;
    let of = format!("{count} instances of {services} services");
    report.figure(
        "W10",
        &format!("{of}: registered by ten clients"),
        Unit::Seconds,
        &Samples::of(began.elapsed().as_secs_f64()),
        None,
    );
    let (loaded, mut measured) = load(store, "estate", services, each).await?;
    report.figure(
        "W10",
        "the same: first load by one reader of all",
        Unit::Seconds,
        &Samples::of(loaded.seconds),
        None,
    );
    let resident = Samples::of(loaded.resident / count);
    report.figure("W10", "the same: memory of each, resident", Unit::Bytes, &resident, None);
    sleep(Duration::from_secs(2)).await;
    let before = (Instant::now(), store.server().cpu_time().await?);
    measured.used().await?;
    sleep(steady).await;
    let used = measured.used().await?;
    let server = (store.server().cpu_time().await? - before.1).as_secs_f64() / before.0.elapsed().as_secs_f64();
    let share = Samples::of(used.processor / used.seconds);
    report.figure("W10", "the same, steady: of one processor, by the reader", Unit::Share, &share, None);
    let work = "the same, steady: of one processor, by the server";
    report.figure("W10", work, Unit::Share, &Samples::of(server), None);
    measured.end().await?;
    destroy_all(writers).await
}

/// Starts a process that follows so many services, and waits until it has all of each.
pub(crate) async fn load<B: Bare>(store: &B, prefix: &str, services: usize, each: usize) -> Result<(Loaded, Measured)> {
    let url = url(store, store.server().addr(), prefix, "request_timeout=30s");
    let mut measured = Measured::start(&["follow", &url, &services.to_string(), &each.to_string()])?;
    Ok((measured.answer().await?, measured))
}
