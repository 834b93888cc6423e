//! From changes by one process to the cache of another.

use std::{sync::Arc, time::Duration};

use registry_core::Options;
use registry_tests::proxy::FaultProxy;
use tokio::time::{Instant, timeout};

use crate::{
    Result,
    bare::{Bare, Reader, Writer, entries, path, record},
    report::{Report, Target},
    samples::{Samples, Unit},
    works::{AT_MOST, Effort, SPARE, elsewhere, follow, in_turn, instances, register_all, seen, until, warm_up},
};

/// A reader follows while another process registers a thousand, then ten thousand.
pub(crate) async fn converge<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    let mut medians = Vec::new();
    for (count, rounds) in [(1_000, effort.often()), (10_000, effort.rounds)] {
        let (mut ours, mut floor) = (Samples::default(), Samples::default());
        for round in 0..=rounds {
            let (mine, least) = converged(store, round, count).await?;
            // The first round warms the server up.
            if round > 0 {
                ours.time(mine);
                floor.time(least);
            }
        }
        let work = format!("{count} registrations converge at a reader");
        report.ratio("W3", &work, Unit::Seconds, &ours, &floor, 1.3);
        medians.push((Samples::of(ours.median()), floor.median()));
    }
    let [(few, few_floor), (many, many_floor)] = &medians[..] else { return Err("two sizes".into()) };
    // Linear, or as the store grows by itself.
    let most = f64::max(12.0, (1.3 * many_floor / few_floor * 10.0).round() / 10.0);
    report.ratio("W3", "10 000 of them (floor: our 1000)", Unit::Seconds, many, few, most);
    Ok(())
}

/// How long it takes from the first of so many registrations until a reader has all of them, and the floor.
pub(crate) async fn converged<B: Bare>(store: &B, round: usize, count: usize) -> Result<(Duration, Duration)> {
    let floor = async {
        let prefix = format!("many-{count}-{round}");
        let addr = store.server().addr();
        let writer = elsewhere().within(store.writer(addr, &prefix, count)).await?;
        let mut reader = store.reader(addr, &prefix).await?;
        let began = Instant::now();
        let writing =
            elsewhere().spawn(async move { writer.write_all(entries(&prefix, count)).await.map(|()| writer) });
        let mut seen = 0;
        while seen < count {
            seen += timeout(AT_MOST, reader.changes()).await??;
        }
        let took = began.elapsed();
        writing.await??.end().await?;
        Ok(took)
    };
    let ours = async {
        let prefix = format!("converge-{count}-{round}");
        let (writer, reader) = (elsewhere().connect(store, &prefix)?, store.connect(&prefix)?);
        let mut watcher = follow(&*reader, "orders").await?;
        warm_up(&*writer).await?;
        let all = instances(count);
        let began = Instant::now();
        let writing = elsewhere().spawn({
            let writer = writer.clone();
            async move { register_all(&*writer, all).await }
        });
        until(&mut watcher, count).await?;
        let took = began.elapsed();
        writing.await??;
        writer.destroy().await?;
        reader.destroy().await?;
        Ok(took)
    };
    in_turn(round, ours, floor).await
}

/// From a change by one process to the cache of another, with 100 present.
pub(crate) async fn propagate<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    let (writer, reader) = (elsewhere().connect(store, "propagate")?, store.connect("propagate")?);
    let all = instances(100);
    register_all(&*writer, all.clone()).await?;
    let mut watcher = follow(&*reader, "orders").await?;
    until(&mut watcher, 100).await?;
    let addr = store.server().addr();
    let bare = Arc::new(elsewhere().within(store.writer(addr, "bare", 100)).await?);
    bare.write_all(entries("bare", 100)).await?;
    let mut following = store.reader(addr, "bare").await?;

    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..effort.rounds * 300 {
        let version = format!("2.0.{round}");
        let one_floor = async {
            let (bare, change) = (bare.clone(), (path("bare", round % 100), record(&version)));
            let began = Instant::now();
            let writing = elsewhere().spawn(async move { bare.change(&change).await });
            timeout(AT_MOST, following.changes()).await??;
            let took = began.elapsed();
            writing.await??;
            Ok(took)
        };
        let one_ours = async {
            let mut instance = all[round % 100].clone();
            instance.version = Some(version.clone());
            let (writer, changed) = (writer.clone(), instance.clone());
            let began = Instant::now();
            let writing = elsewhere().spawn(async move { writer.register(changed).await });
            seen(&mut watcher, &instance).await?;
            let took = began.elapsed();
            writing.await??;
            Ok(took)
        };
        let (mine, least) = in_turn(round, one_ours, one_floor).await?;
        ours.time(mine);
        floor.time(least);
    }
    let work = "change → reader, p50 (floor: write → event, with its value)";
    // Two calls: one writes, and one reads.
    report.row("W4", work, Unit::Seconds, &ours, Some(&floor), Target::RatioOr(1.3, 2.0 * SPARE));
    let target = Target::RatioOr(1.5, 2.0 * SPARE);
    report.row("W4", "change → reader, p99", Unit::Seconds, &ours.p99(), Some(&floor.p99()), target);
    Arc::into_inner(bare).ok_or("a write is under way")?.end().await?;
    writer.destroy().await?;
    Ok(reader.destroy().await?)
}

/// What one change among a hundred and among a thousand costs a reader.
pub(crate) async fn change<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    let of_100 = one_change(store, effort, 100).await?;
    let of_1000 = one_change(store, effort, 1000).await?;
    let work = "one change among 1000, both ways, for each reader (floor: ours among 100)";
    report.bound("W6", work, Unit::Bytes, &of_1000.0, Some(&of_100.0), 600.0);
    // As many as among 100, and one now and then that has nothing to do with it.
    let most = of_100.1.median() + 0.1;
    report.bound("W6", "the same: requests", Unit::Count, &of_1000.1, Some(&of_100.1), most);
    Ok(())
}

/// Bytes and requests of a reader for each change.
async fn one_change<B: Bare>(store: &B, effort: Effort, count: usize) -> Result<(Samples, Samples)> {
    const CHANGES: usize = 20;
    let prefix = format!("change-{count}");
    let writer = store.connect(&prefix)?;
    let all = instances(count);
    register_all(&*writer, all.clone()).await?;
    let proxy = FaultProxy::start(store.server().addr()).await?;
    // No check of the set in between.
    let options = Options::default().reconcile(Duration::from_secs(3600)).ttl(Duration::from_secs(600));
    let reader = store.registry(proxy.addr(), &prefix, options)?;
    let mut watcher = follow(&*reader, "orders").await?;
    until(&mut watcher, count).await?;

    let (mut bytes, mut requests) = (Samples::default(), Samples::default());
    for round in 0..effort.rounds {
        let before = proxy.stats();
        for change in 0..CHANGES {
            let mut instance = all[change * 7 % count].clone();
            instance.version = Some(format!("2.0.{round}"));
            let (outcome, seen) = tokio::join!(writer.register(instance.clone()), seen(&mut watcher, &instance));
            outcome?;
            seen?;
        }
        let after = proxy.stats();
        let both = (after.to_client - before.to_client) + (after.to_server - before.to_server);
        bytes.add(both as f64 / CHANGES as f64);
        requests.add((after.requests - before.requests) as f64 / CHANGES as f64);
    }
    writer.destroy().await?;
    reader.destroy().await?;
    Ok((bytes, requests))
}
