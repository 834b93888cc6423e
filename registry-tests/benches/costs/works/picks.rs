//! Picking one of a hundred instances, by each strategy, on one core and on all.

use std::{hint::black_box, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use registry_core::{Instance, Managed, Registry, Snapshot};
use service_registry::balance::{Balancer, Outlier, Strategy};
use tokio::time::Instant;

use crate::{
    Result,
    report::{Report, Target},
    samples::{Samples, Unit},
    works::Effort,
};

const INSTANCES: usize = 100;
const PICKS: u32 = 200_000;
/// Each with the longest that a pick may take, in seconds, or, where locked instructions are slow, so many times its floor.
const STRATEGIES: [(Strategy, f64, f64); 6] = [
    (Strategy::RoundRobin, 60e-9, 3.0),
    (Strategy::Weighted, 60e-9, 3.0),
    (Strategy::Random, 60e-9, 3.0),
    (Strategy::LeastLoaded, 60e-9, 3.0),
    (Strategy::PowerOfTwo, 120e-9, 4.0),
    (Strategy::ConsistentHash, 120e-9, 4.0),
];

/// A pick and its end, by each strategy; the floor takes the next of the instances from an `ArcSwap`.
pub(crate) async fn picks(report: &mut Report, effort: Effort) -> Result<()> {
    let registry = Managed::memory("memory://")?;
    for weight in 0..INSTANCES {
        // Of many weights.
        let weight = 50 + u32::try_from(weight % 4)? * 50;
        let id = format!("{:04}", rand::random::<u16>());
        registry.register(Instance::builder("orders", format!("{id}-{weight}")).weight(weight).build()?).await?;
    }
    let watcher = registry.watch("orders").await?;
    let swap = Arc::new(ArcSwap::from_pointee(watcher.current().clone()));
    let cores = std::thread::available_parallelism()?.get();
    for (strategy, most, times) in STRATEGIES {
        let balancer = Balancer::new(registry.watch("orders").await?, strategy)?;
        let (mut ours, mut floor, mut all) = (Samples::default(), Samples::default(), Samples::default());
        for _ in 0..effort.rounds {
            floor.time(on(1, &swap, |swap, at| drop(black_box(next(swap, at)))));
            ours.time(on(1, &balancer, pick));
            all.time(on(cores, &balancer, pick));
        }
        let name = format!("{strategy:?}");
        let target = |most| Target::MostOr(most, times);
        report.row("W1", &format!("pick of {INSTANCES}: {name}"), Unit::Seconds, &ours, Some(&floor), target(most));
        let work = format!("the same on each of {cores} cores (floor: on one)");
        report.row("W1", &work, Unit::Seconds, &all, Some(&ours), target(2.0 * most));
    }
    let watcher = registry.watch("orders").await?;
    let judged = Balancer::builder(watcher).strategy(Strategy::PowerOfTwo).outlier(Outlier::default()).build()?;
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        floor.time(on(1, &swap, |swap, at| drop(black_box(next(swap, at)))));
        ours.time(on(1, &judged, |balancer, _| balancer.pick().expect("there are some").success()));
    }
    report.bound(
        "W1",
        "PowerOfTwo with latency and ejection, to its success",
        Unit::Seconds,
        &ours,
        Some(&floor),
        250e-9,
    );
    Ok(())
}

fn next(swap: &ArcSwap<Snapshot>, at: usize) -> Arc<Instance> {
    let snapshot = swap.load();
    snapshot.instances()[at % snapshot.len()].clone()
}

fn pick(balancer: &Balancer, at: usize) {
    drop(black_box(balancer.pick_for(at.to_le_bytes())));
}

/// The time of one call of `work` on each of so many threads at once.
fn on<T: Sync>(threads: usize, of: &T, work: impl Fn(&T, usize) + Sync) -> Duration {
    let work = &work;
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for at in 0..PICKS as usize {
                    work(of, at + thread * 31);
                }
            });
        }
    });
    began.elapsed() / PICKS
}
