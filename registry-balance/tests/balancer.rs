//! Balancing over the memory backend: shares, routes, zones, warm-up, ejection.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeMap, time::Duration};

use registry_balance::{Balancer, BalancerBuilder, Fallback, Filter, Outlier, Pick, Route, Strategy};
use registry_core::{
    ErrorKind, Instance, InstanceBuilder, InstanceId, Managed, Registry, Status, memory::MemoryBackend,
};
use tokio::time::{advance, timeout};

const PICKS: u32 = 100_000;
const SECOND: Duration = Duration::from_secs(1);
const STRATEGIES: [Strategy; 6] = [
    Strategy::RoundRobin,
    Strategy::Weighted,
    Strategy::Random,
    Strategy::LeastLoaded,
    Strategy::PowerOfTwo,
    Strategy::ConsistentHash,
];

type Memory = Managed<MemoryBackend>;

/// A store of its own for each test.
fn registry(name: &str) -> Memory {
    Managed::memory(&format!("memory://balance-{name}?ttl=1h")).unwrap()
}

fn orders(id: &str) -> InstanceBuilder {
    Instance::builder("orders", id)
}

async fn register(registry: &Memory, instances: impl IntoIterator<Item = InstanceBuilder>) {
    for instance in instances {
        registry.register(instance.build().unwrap()).await.unwrap();
    }
}

async fn builder(registry: &Memory) -> BalancerBuilder {
    Balancer::builder(registry.watch("orders").await.unwrap())
}

async fn with(registry: &Memory, strategy: Strategy) -> Balancer {
    builder(registry).await.strategy(strategy).build().unwrap()
}

/// Until the balancer has so many.
async fn until(balancer: &Balancer, len: usize) {
    timeout(60 * SECOND, async {
        while balancer.len() != len {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{} instead of {len}", balancer.len()));
}

fn shares(mut pick: impl FnMut() -> Pick) -> BTreeMap<String, f64> {
    let mut counts = BTreeMap::new();
    for _ in 0..PICKS {
        let pick = pick();
        *counts.entry(pick.id().to_string()).or_insert(0.0) += 1.0 / f64::from(PICKS);
        pick.success();
    }
    counts
}

fn shares_of(balancer: &Balancer) -> BTreeMap<String, f64> {
    shares(|| balancer.pick().unwrap())
}

/// Each key once.
fn shares_by_key(balancer: &Balancer) -> BTreeMap<String, f64> {
    let mut key = 0_u32;
    shares(|| {
        key += 1;
        balancer.pick_for(key.to_le_bytes()).unwrap()
    })
}

fn assert_share(shares: &BTreeMap<String, f64>, id: &str, due: f64, off: f64) {
    let share = shares.get(id).copied().unwrap_or_default();
    assert!((share - due).abs() <= off, "{id}: {share:.3}, not {due:.3}: {shares:?}");
}

/// With paused time, all calls take equally long.
#[tokio::test(start_paused = true)]
async fn weights_are_shares_within_two_percent() {
    let registry = registry("weights");
    let weights = [("a", 50), ("b", 100), ("c", 250)];
    register(&registry, weights.map(|(id, weight)| orders(id).weight(weight))).await;
    register(&registry, [orders("drained").weight(0), orders("starting").status(Status::Starting)]).await;
    register(&registry, [orders("draining").status(Status::Draining), orders("down").status(Status::Down)]).await;
    for strategy in STRATEGIES {
        let balancer = with(&registry, strategy).await;
        assert_eq!(balancer.len(), 3, "{strategy:?}");
        let shares = if strategy == Strategy::ConsistentHash { shares_by_key(&balancer) } else { shares_of(&balancer) };
        for (id, weight) in weights {
            match strategy {
                Strategy::RoundRobin => assert_share(&shares, id, 1.0 / 3.0, 0.001),
                // A ring is as even as its points are.
                Strategy::ConsistentHash => assert_share(&shares, id, f64::from(weight) / 400.0, 0.1),
                _ => assert_share(&shares, id, f64::from(weight) / 400.0, 0.02),
            }
        }
    }
}

#[tokio::test]
async fn a_change_of_weight_or_status_is_followed() {
    let registry = registry("changes");
    register(&registry, [orders("a"), orders("b")]).await;
    let balancer = with(&registry, Strategy::Weighted).await;
    assert_share(&shares_of(&balancer), "a", 0.5, 0.001);
    register(&registry, [orders("a").weight(300)]).await;
    timeout(60 * SECOND, async {
        while balancer.pick().unwrap().id().as_str() == balancer.pick().unwrap().id().as_str() {}
        while shares_of(&balancer)["a"] < 0.74 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    assert_share(&shares_of(&balancer), "a", 0.75, 0.001);
    register(&registry, [orders("a").status(Status::Draining)]).await;
    until(&balancer, 1).await;
    assert_share(&shares_of(&balancer), "b", 1.0, 1e-6);
}

#[tokio::test]
async fn who_has_the_least_in_flight_for_its_weight_is_next() {
    let registry = registry("least");
    register(&registry, [orders("a").weight(100), orders("b").weight(300)]).await;
    let balancer = with(&registry, Strategy::LeastLoaded).await;
    let held: Vec<_> = (0..40).map(|_| balancer.pick().unwrap()).collect();
    let on_a = held.iter().filter(|pick| pick.id().as_str() == "a").count();
    assert!((9..=11).contains(&on_a), "{on_a}");
    drop(held.into_iter().filter(|pick| pick.id().as_str() == "a").collect::<Vec<_>>());
    // Those of `b` were dropped as well: everybody is idle again, and weights decide.
    assert_share(&shares_of(&balancer), "b", 0.75, 0.001);
}

#[tokio::test]
async fn calls_in_flight_count_for_the_records_that_replace_the_one_they_were_made_by() {
    let registry = registry("records");
    register(&registry, ["a", "b"].map(orders)).await;
    let balancer = with(&registry, Strategy::LeastLoaded).await;
    let held: Vec<_> = (0..20).map(|_| balancer.pick().unwrap()).collect();
    let (mut on_a, on_b): (Vec<_>, Vec<_>) = held.into_iter().partition(|pick| pick.id().as_str() == "a");
    assert_eq!((on_a.len(), on_b.len()), (10, 10));
    drop(on_b);
    let not_b = [InstanceId::parse("b").unwrap()];
    for version in ["2", "3"] {
        register(&registry, [orders("a").version(version)]).await;
        timeout(60 * SECOND, async {
            while balancer.pick_other(&not_b).unwrap().instance().version.as_deref() != Some(version) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
        let next: Vec<_> = (0..on_a.len()).map(|_| balancer.pick().unwrap()).collect();
        assert!(next.iter().all(|pick| pick.id().as_str() == "b"), "{next:?}");
        on_a.push(balancer.pick_other(&not_b).unwrap());
    }
    let one_on_b = balancer.pick().unwrap();
    drop(on_a);
    assert_eq!(one_on_b.id().as_str(), "b");
    for _ in 0..10 {
        assert_eq!(balancer.pick().unwrap().id().as_str(), "a", "which is idle again");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_instance_gets_less_of_the_better_of_two() {
    let registry = registry("slow");
    register(&registry, ["a", "b", "c", "slow"].map(orders)).await;
    let balancer = with(&registry, Strategy::PowerOfTwo).await;
    let mut slow = 0;
    for _ in 0..400 {
        let pick = balancer.pick().unwrap();
        let is_slow = pick.id().as_str() == "slow";
        slow += u32::from(is_slow);
        advance(Duration::from_millis(if is_slow { 200 } else { 10 })).await;
        pick.success();
    }
    // It is drawn twice for one call in sixteen.
    assert!(slow < 60, "{slow} of 400");
}

#[tokio::test]
async fn a_key_stays_with_its_instance_unless_that_is_overloaded() {
    let registry = registry("sticky");
    register(&registry, (0..10).map(|id| orders(&id.to_string()))).await;
    let [here, there] =
        [with(&registry, Strategy::ConsistentHash).await, with(&registry, Strategy::ConsistentHash).await];
    let owner = |balancer: &Balancer, key: &str| balancer.pick_for(key).unwrap().id().to_string();
    for key in 0..1000 {
        let key = format!("customer-{key}");
        assert_eq!(owner(&here, &key), owner(&there, &key), "the same in every process");
    }
    // A hundred calls with one key: no instance has more than 1.25 times its share.
    let held: Vec<_> = (0..100).map(|_| here.pick_for("hot").unwrap()).collect();
    let mut counts = BTreeMap::new();
    held.iter().for_each(|pick| *counts.entry(pick.id().clone()).or_insert(0) += 1);
    assert!(counts.values().all(|count| *count <= 13), "{counts:?}");
    drop(held);
    assert_eq!(owner(&here, "hot"), owner(&there, "hot"));
}

#[tokio::test]
async fn a_zone_keeps_its_traffic_as_long_as_it_has_room() {
    let registry = registry("zone");
    let near = (0..4).map(|id| orders(&format!("near-{id}")).zone("eu-1a"));
    let far = (0..4).map(|id| orders(&format!("far-{id}")).zone("eu-1b"));
    register(&registry, near.chain(far)).await;
    let balancer = builder(&registry).await.strategy(Strategy::Weighted).zone("eu-1a").build().unwrap();
    let local = |balancer: &Balancer| {
        shares_of(balancer).iter().filter(|(id, _)| id.starts_with("near")).map(|(_, share)| share).sum::<f64>()
    };
    for (down, due) in [(0, 1.0), (1, 1.0), (2, 0.7), (3, 0.35), (4, 0.0)] {
        if down > 0 {
            let id = format!("near-{}", down - 1);
            register(&registry, [orders(&id).zone("eu-1a").status(Status::Down)]).await;
            until(&balancer, 8 - down).await;
        }
        let share = local(&balancer);
        assert!((share - due).abs() < 0.02, "{down} down: {share}, not {due}");
    }
    // Who is leaving leaves nothing to be missed.
    for id in 0..4 {
        register(&registry, [orders(&format!("near-{id}")).zone("eu-1a").status(Status::Draining)]).await;
    }
    register(&registry, [orders("near-9").zone("eu-1a")]).await;
    until(&balancer, 5).await;
    assert!((local(&balancer) - 1.0).abs() < 0.001);
    // A zone where nobody is left.
    registry.unregister("orders", "near-9").await.unwrap();
    until(&balancer, 4).await;
    assert!(local(&balancer) < 0.001);
}

#[tokio::test]
async fn routes_lead_to_a_label_and_past_it() {
    let registry = registry("routes");
    register(&registry, [orders("old"), orders("new").metadata("canary", "v2")]).await;
    let all = with(&registry, Strategy::RoundRobin).await;
    let [strict, prefer] = [Fallback::Strict, Fallback::Prefer]
        .map(|fallback| (all.routed(Route::to("canary", "v2", fallback)), all.routed(Route::past("canary", fallback))));
    for (canary, others) in [&strict, &prefer] {
        assert_share(&shares_of(canary), "new", 1.0, 1e-6);
        assert_share(&shares_of(others), "old", 1.0, 1e-6);
    }
    registry.unregister("orders", "new").await.unwrap();
    until(&all, 1).await;
    let error = strict.0.pick().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(
        error.to_string(),
        "no instance of orders takes traffic: 1 registered, 1 not on the route (live)",
        "{error}"
    );
    assert_eq!(prefer.0.pick().unwrap().id().as_str(), "old");
    let nowhere = all.routed(Route::to("canary", "v3", Fallback::Strict));
    assert!(nowhere.is_empty() && nowhere.pick().is_err());
}

#[tokio::test]
async fn filters_are_met_by_all_that_is_picked() {
    let registry = registry("filters");
    register(
        &registry,
        [orders("a").version("1").zone("x"), orders("b").version("2").zone("x"), orders("c").version("2")],
    )
    .await;
    let filter = |filter: Filter| async { builder(&registry).await.filter(filter).build().unwrap() };
    assert_eq!(filter(Filter::version("2")).await.len(), 2);
    assert_eq!(filter(Filter::version("1").or(Filter::zone("x"))).await.len(), 2);
    assert_eq!(filter(!Filter::zone("x")).await.pick().unwrap().id().as_str(), "c");
    assert_eq!(filter(Filter::status(Status::Down)).await.len(), 0);
    assert_eq!(filter(Filter::scheme("http")).await.len(), 0);
    let both = builder(&registry).await.filter(Filter::version("2")).filter(Filter::zone("x")).build().unwrap();
    assert_eq!(both.pick().unwrap().id().as_str(), "b");
    let none = filter(Filter::new(|_| false)).await;
    let error = none.pick().unwrap_err().to_string();
    assert!(error.contains("3 registered, 3 not wanted by the filter"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_new_instance_warms_up_from_when_it_was_first_seen() {
    let registry = registry("warm");
    register(&registry, [orders("old")]).await;
    let balancer = builder(&registry).await.strategy(Strategy::Weighted).warm_up(100 * SECOND).build().unwrap();
    register(&registry, [orders("new").status(Status::Starting)]).await;
    tokio::time::sleep(300 * SECOND).await;
    assert_eq!(balancer.len(), 1);
    register(&registry, [orders("new")]).await;
    until(&balancer, 2).await;
    // Its part of the weight p is p / (1 + p) of the traffic.
    assert_share(&shares_of(&balancer), "new", 0.05 / 1.05, 0.01);
    tokio::time::sleep(50 * SECOND).await;
    assert_share(&shares_of(&balancer), "new", 0.5 / 1.5, 0.03);
    tokio::time::sleep(51 * SECOND).await;
    assert_share(&shares_of(&balancer), "new", 0.5, 0.001);
}

/// Fails every pick of these until the table has `len` others.
async fn fail(balancer: &Balancer, ids: &[&str], len: usize) {
    timeout(60 * SECOND, async {
        while balancer.len() > len {
            for _ in 0..100 {
                let pick = balancer.pick().unwrap();
                if ids.contains(&pick.id().as_str()) { pick.failure() } else { pick.success() }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{} instead of {len}", balancer.len()));
}

async fn judging(registry: &Memory, rules: Outlier) -> Balancer {
    builder(registry).await.outlier(rules).build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn who_fails_in_a_row_is_ejected_and_comes_back_by_one_call_at_a_time() {
    let registry = registry("ejected");
    register(&registry, ["a", "b", "c"].map(orders)).await;
    let balancer = judging(&registry, Outlier::default()).await;
    fail(&balancer, &["a"], 2).await;
    assert_share(&shares_of(&balancer), "a", 0.0, 0.0);

    tokio::time::sleep(10 * SECOND).await;
    until(&balancer, 3).await;
    let held: Vec<_> = (0..30).map(|_| balancer.pick().unwrap()).collect();
    assert_eq!(held.iter().filter(|pick| pick.id().as_str() == "a").count(), 1, "one call at a time");
    for pick in held {
        if pick.id().as_str() == "a" { pick.failure() } else { pick.success() }
    }
    until(&balancer, 2).await;
    // Twice as long.
    tokio::time::sleep(19 * SECOND).await;
    assert_eq!(balancer.len(), 2);
    tokio::time::sleep(SECOND).await;
    until(&balancer, 3).await;
    // Cancelled, it says nothing, and another one may be tried.
    for _ in 0..2 {
        let tried = (0..3).map(|_| balancer.pick().unwrap()).find(|pick| pick.id().as_str() == "a");
        drop(tried.expect("one call"));
    }
    (0..3).for_each(|_| balancer.pick().unwrap().success());
    timeout(60 * SECOND, async {
        while (0..6)
            .map(|_| balancer.pick().unwrap())
            .collect::<Vec<_>>()
            .iter()
            .filter(|p| p.id().as_str() == "a")
            .count()
            < 2
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("it is trusted again");
}

#[tokio::test(start_paused = true)]
async fn a_failure_has_the_view_compared_with_the_store() {
    let store = registry_core::memory::MemoryStore::new();
    let options = registry_core::Options::default().reconcile(Duration::from_secs(3600)).ttl(Duration::from_secs(3600));
    let registry = Managed::new(MemoryBackend::new(store.clone(), options.ttl), options).unwrap();
    register(&registry, [orders("a")]).await;
    let balancer = with(&registry, Strategy::RoundRobin).await;
    // What goes with registering is over.
    tokio::time::sleep(60 * SECOND).await;
    let before = store.requests();
    balancer.pick().unwrap().success();
    drop(balancer.pick().unwrap());
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(store.requests(), before);
    for pick in [Pick::failure, Pick::refused] {
        let before = store.requests();
        pick(balancer.pick().unwrap());
        tokio::time::sleep(10 * SECOND).await;
        assert_eq!(store.requests(), before + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_share_of_failures_ejects_at_the_end_of_its_window() {
    let registry = registry("rate");
    register(&registry, ["a", "b", "c"].map(orders)).await;
    let balancer = judging(&registry, Outlier::default()).await;
    let mut turn = 0;
    // Two of three fail, never five in a row.
    let calls = |of: u32, turn: &mut u32| {
        for _ in 0..of {
            let pick = balancer.pick().unwrap();
            if pick.id().as_str() != "a" {
                pick.success();
            } else {
                *turn += 1;
                if turn.is_multiple_of(3) { pick.success() } else { pick.failure() }
            }
        }
    };
    calls(57, &mut turn);
    tokio::time::sleep(11 * SECOND).await;
    assert_eq!(balancer.len(), 3, "nineteen calls are too few");
    calls(60, &mut turn);
    assert_eq!(balancer.len(), 3);
    until(&balancer, 2).await;
}

#[tokio::test(start_paused = true)]
async fn no_more_than_the_bound_is_ejected_and_never_all() {
    let registry = registry("bound");
    register(&registry, (0..6).map(|id| orders(&id.to_string()))).await;
    let balancer = judging(&registry, Outlier::default()).await;
    fail(&balancer, &["0", "1", "2", "3", "4", "5"], 3).await;
    for _ in 0..100 {
        balancer.pick().unwrap().failure();
    }
    tokio::time::sleep(SECOND).await;
    assert_eq!(balancer.len(), 3, "half of them");
    // The others leave: those that are ejected are better than nobody.
    let left: std::collections::BTreeSet<_> = (0..9).map(|_| balancer.pick().unwrap().id().to_string()).collect();
    for id in left {
        registry.unregister("orders", &id).await.unwrap();
    }
    timeout(60 * SECOND, async {
        while registry.discover("orders").await.unwrap().len() > 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    until(&balancer, 3).await;
    balancer.pick().unwrap().success();

    let all = judging(&registry, Outlier::default().max_ejected(1.0)).await;
    fail(&all, &["0", "1", "2", "3", "4", "5"], 1).await;
    (0..20).for_each(|_| all.pick().unwrap().failure());
    tokio::time::sleep(SECOND).await;
    assert_eq!(all.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_changes_or_is_registered_again_is_forgiven() {
    let registry = registry("forgiven");
    register(&registry, ["a", "b", "c"].map(orders)).await;
    let balancer = judging(&registry, Outlier::default()).await;
    fail(&balancer, &["a"], 2).await;
    register(&registry, [orders("a").version("2")]).await;
    until(&balancer, 3).await;
    fail(&balancer, &["a"], 2).await;
    registry.unregister("orders", "a").await.unwrap();
    register(&registry, [orders("a").version("2")]).await;
    until(&balancer, 3).await;
    // The next ejection is a first one.
    fail(&balancer, &["a"], 2).await;
    tokio::time::sleep(10 * SECOND).await;
    until(&balancer, 3).await;
}

#[tokio::test]
async fn bad_rules_are_refused() {
    let registry = registry("rules");
    for (rules, named) in [
        (Outlier::default().failure_rate(f64::NAN), "failure_rate"),
        (Outlier::default().max_ejected(-0.1), "max_ejected"),
        (Outlier::default().window(Duration::ZERO), "window"),
        (Outlier::default().base_ejection(Duration::MAX), "base_ejection"),
    ] {
        let error = builder(&registry).await.outlier(rules).build().unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains(named), "{error}");
    }
}

#[tokio::test]
async fn before_the_first_answer_the_error_says_so() {
    let backend = MemoryBackend::new(registry_core::memory::MemoryStore::new(), SECOND);
    let link = backend.link();
    link.cut();
    let options = registry_core::Options::default().ttl(SECOND).request_timeout(Duration::from_millis(100));
    let registry = Managed::new(backend, options).unwrap();
    let balancer = builder(&registry).await.build().unwrap();
    let error = balancer.pick().unwrap_err();
    assert!(error.to_string().contains("the store has not answered"), "{error}");
    link.heal();
    registry.register(orders("a").build().unwrap()).await.unwrap();
    timeout(60 * SECOND, balancer.ready(1)).await.unwrap();
    balancer.pick().unwrap().success();
}

#[tokio::test]
async fn the_last_clone_ends_the_task_and_a_closed_registry_leaves_the_last_set() {
    let registry = registry("dropped");
    register(&registry, [orders("a")]).await;
    let balancer = with(&registry, Strategy::RoundRobin).await;
    registry.destroy().await.unwrap();
    assert_eq!(balancer.clone().pick().unwrap().id().as_str(), "a");
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    drop(balancer);
    timeout(60 * SECOND, async {
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() >= tasks {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn the_watcher_of_a_balancer_begins_with_the_current_set_and_follows() {
    let registry = registry("watcher");
    register(&registry, [orders("a")]).await;
    let balancer = with(&registry, Strategy::RoundRobin).await;
    for _ in 0..2 {
        let mut watcher = balancer.watcher();
        assert_eq!(watcher.next().await.unwrap().len(), 1, "whoever asked before");
        let mut other = watcher.clone();
        register(&registry, [orders("b")]).await;
        assert_eq!(watcher.next().await.unwrap().len(), 2);
        assert_eq!(other.next().await.unwrap().len(), 2, "a clone misses nothing");
        registry.unregister("orders", "b").await.unwrap();
        until(&balancer, 1).await;
    }
}
