//! Registering many at once, and one after the other.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    Result,
    bare::{Bare, Writer, entries},
    report::{Report, Target},
    samples::{Samples, Unit},
    works::{Effort, SPARE, in_turn, instances, register_all, warm_up},
};

/// Registering 1000 at once.
pub(crate) async fn register<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=effort.often() {
        let (mine, least) = at_once(store, round, 1000).await?;
        // The first round warms the server up.
        if round > 0 {
            ours.time(mine);
            floor.time(least);
        }
    }
    report.ratio("W2", &format!("register 1000 (floor: {})", B::BATCHES), Unit::Seconds, &ours, &floor, 1.25);
    Ok(())
}

/// How long it takes to register so many at once, and the floor.
pub(crate) async fn at_once<B: Bare>(store: &B, round: usize, count: usize) -> Result<(Duration, Duration)> {
    let floor = async {
        let prefix = format!("floor-{count}-{round}");
        let writer = store.writer(store.server().addr(), &prefix, count).await?;
        let began = Instant::now();
        writer.write_all(entries(&prefix, count)).await?;
        let took = began.elapsed();
        writer.end().await?;
        Ok(took)
    };
    let ours = async {
        let registry = store.connect(&format!("ours-{count}-{round}"))?;
        warm_up(&*registry).await?;
        let all = instances(count);
        let began = Instant::now();
        register_all(&*registry, all).await?;
        let took = began.elapsed();
        registry.destroy().await?;
        Ok(took)
    };
    in_turn(round, ours, floor).await
}

/// Registering 300, each after the other.
pub(crate) async fn one_by_one<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    const COUNT: usize = 300;
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=effort.often() {
        let one_floor = async {
            let prefix = format!("single-{round}");
            let writer = store.writer(store.server().addr(), &prefix, COUNT).await?;
            let began = Instant::now();
            for entry in entries(&prefix, COUNT) {
                writer.write(&entry).await?;
            }
            let took = began.elapsed();
            writer.end().await?;
            Ok(took / COUNT as u32)
        };
        let one_ours = async {
            let registry = store.connect(&format!("singly-{round}"))?;
            warm_up(&*registry).await?;
            let all = instances(COUNT);
            let began = Instant::now();
            for instance in all {
                registry.register(instance).await?;
            }
            let took = began.elapsed();
            registry.destroy().await?;
            Ok(took / COUNT as u32)
        };
        let (mine, least) = in_turn(round, one_ours, one_floor).await?;
        // The first round warms the server up.
        if round > 0 {
            ours.time(mine);
            floor.time(least);
        }
    }
    let work = format!("register one (floor: {})", B::SINGLE);
    report.row("W2", &work, Unit::Seconds, &ours, Some(&floor), Target::RatioOr(1.15, SPARE));
    Ok(())
}
