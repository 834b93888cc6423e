//! Neither a read of the view nor a pick allocates, whatever the strategy and however the pick ends.
//!
//! A binary of its own: what counts allocations replaces the global allocator.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{hint::black_box, time::Duration};

use registry_balance::{Balancer, BalancerBuilder, Filter, Outlier, Pick, Strategy};
use registry_core::{Instance, Managed, Registry, Status, Watcher, memory::MemoryBackend};

const TIMES: u64 = 1000;
const STRATEGIES: [Strategy; 6] = [
    Strategy::RoundRobin,
    Strategy::Weighted,
    Strategy::Random,
    Strategy::LeastLoaded,
    Strategy::PowerOfTwo,
    Strategy::ConsistentHash,
];

/// Ten instances of different weights take traffic, in two zones, of which the near one lacks room.
async fn registry(name: &str) -> Managed<MemoryBackend> {
    let registry = Managed::memory(&format!("memory://allocations-{name}?ttl=1h")).unwrap();
    for at in 0..10_u32 {
        let zone = if at % 2 == 0 { "near" } else { "far" };
        let instance = Instance::builder("orders", at.to_string()).weight(50 + 10 * at).zone(zone).build().unwrap();
        registry.register(instance).await.unwrap();
    }
    let down = Instance::builder("orders", "down").weight(1000).zone("near").status(Status::Down).build().unwrap();
    registry.register(down).await.unwrap();
    registry
}

async fn watch(registry: &Managed<MemoryBackend>) -> Watcher {
    let mut watcher = registry.watch("orders").await.unwrap();
    while watcher.current().len() < 11 {
        watcher.next().await.unwrap();
    }
    watcher
}

/// What this thread allocates in so many rounds, once all that is made for each thread is there.
fn allocated(mut work: impl FnMut(u64)) -> u64 {
    work(0);
    allocation_counter::measure(|| (1..=TIMES).for_each(work)).count_total
}

#[tokio::test]
async fn what_allocates_is_counted() {
    assert_eq!(allocated(|at| drop(black_box(Box::new(at)))), TIMES);
}

#[tokio::test]
async fn a_read_of_the_current_snapshot_allocates_nothing() {
    let registry = registry("reads").await;
    let watcher = watch(&registry).await;
    let handle = watcher.handle();
    let mut seen = 0;
    assert_eq!(allocated(|_| seen += handle.current().len()), 0);
    assert_eq!(allocated(|_| seen += watcher.current().instances().len()), 0);
    assert_eq!(seen, 2 * 11 * (TIMES as usize + 1));
}

#[tokio::test]
async fn a_pick_allocates_nothing_by_any_strategy_however_it_ends() {
    type Ended = fn(Pick);
    type Built = fn(BalancerBuilder) -> BalancerBuilder;
    let ends: [(&str, Ended); 4] =
        [("cancelled", drop), ("success", Pick::success), ("failure", Pick::failure), ("refused", Pick::refused)];
    let kinds: [(&str, Built); 2] = [
        ("plain", |builder| builder),
        ("with everything", |builder| {
            let mut rules = Outlier::default();
            // Failures are counted, and never eject.
            (rules.consecutive, rules.failure_rate) = (0, 2.0);
            builder.filter(Filter::zone("near").or(Filter::zone("far"))).zone("near").outlier(rules)
        }),
    ];
    let registry = registry("picks").await;
    for strategy in STRATEGIES {
        for (kind, built) in &kinds {
            let builder = Balancer::builder(watch(&registry).await).strategy(strategy).warm_up(Duration::from_secs(1));
            let balancer = built(builder).build().unwrap();
            balancer.ready(10).await;
            for (end, ended) in ends {
                let picks = allocated(|_| ended(balancer.pick().unwrap()));
                assert_eq!(picks, 0, "{strategy:?}, {kind}, {end}");
                let by_key = allocated(|at| ended(balancer.pick_for(at.to_le_bytes()).unwrap()));
                assert_eq!(by_key, 0, "{strategy:?} by key, {kind}, {end}");
            }
            let tried = [balancer.pick().unwrap().id().clone()];
            assert_eq!(allocated(|_| drop(balancer.pick_other(&tried).unwrap())), 0, "{strategy:?} elsewhere, {kind}");
            let mut held = Vec::with_capacity(TIMES as usize + 1);
            let many = allocated(|_| held.push(balancer.pick().unwrap()));
            assert_eq!(many, 0, "{strategy:?} with many in flight, {kind}");
        }
    }
}
