//! Primaries that die, hang or hand over, under Sentinels and on a Cluster: nobody is missing for a moment.

use registry_tests::{
    conformance::support::{
        Observer, PATIENCE, all_registered, client, eventually, in_time, instance, instances, is_live, register_all,
        states,
    },
    harness::{Client, Harness, RedisDeployed as Deployed, RedisDeployment as Deployment, RedisNodes, RedisSentinel},
};
use tokio::time::sleep;

use crate::{ELECTED, SECOND};

/// Twenty instances, and a reader of them.
struct Ride {
    provider: Client,
    observer: Observer,
    _reader: Client,
}

impl Ride {
    async fn start<D: Deployment>(store: &Deployed<D>) -> Self {
        let (provider, reader) = (client(store).await, client(store).await);
        register_all(&provider, instances("orders", "i", 20)).await;
        let observer = Observer::of(&reader, "orders").await;
        Self { provider, observer, _reader: reader }
    }

    /// Registers one more; where that fails, the engine makes it good.
    async fn register(&self, id: &str) {
        let _ = self.provider.registry.register(instance("orders", id)).await;
        eventually("all are registered", ELECTED, async || states(&self.provider), all_registered).await;
    }

    /// Registers one more, which the reader sees.
    async fn goes_on(&self, id: &str) {
        in_time("register", ELECTED, self.register(id)).await;
        self.observer.until(id, ELECTED, |seen| seen.get(id).is_some() && is_live(seen)).await;
    }

    fn assert_nobody_was_missing(&self) {
        self.observer.assert_always("all of them", |seen| seen.len() >= 20);
        let changes = self.observer.changes();
        assert!(changes.iter().all(|change| change.starts_with('+')), "{changes:?}");
    }
}

async fn a_failover_in_good_order_removes_nobody<D: Deployment>() {
    let store = Deployed::<D>::with_own_server().await;
    let ride = Ride::start(&store).await;
    store.fail_over("orders").await;
    ride.goes_on("new").await;
    ride.assert_nobody_was_missing();
}

/// The old one, when it comes back, takes itself for the primary for a while.
async fn a_primary_that_dies_and_comes_back_costs_nobody<D: Deployment>() {
    let store = Deployed::<D>::with_own_server().await;
    let ride = Ride::start(&store).await;
    let dead = store.primary("orders").await;
    dead.kill().await.unwrap();
    ride.observer.until("the outage", PATIENCE, |seen| !is_live(seen)).await;
    ride.goes_on("elected").await;
    dead.restart().await.unwrap();
    // Sentinels demote it after some ten seconds.
    for round in 0..12 {
        in_time("register", ELECTED, ride.register(&format!("new-{round}"))).await;
        sleep(SECOND).await;
    }
    ride.observer.until("all that came since", ELECTED, |seen| seen.len() == 33 && is_live(seen)).await;
    ride.assert_nobody_was_missing();
}

/// It hangs for so long that its replica takes over, and then goes on.
async fn a_primary_that_hangs_is_left<D: Deployment>() {
    let store = Deployed::<D>::with_own_server().await;
    let ride = Ride::start(&store).await;
    let frozen = store.primary("orders").await;
    frozen.freeze().await.unwrap();
    ride.goes_on("elected").await;
    frozen.thaw().await.unwrap();
    ride.goes_on("after").await;
    ride.assert_nobody_was_missing();
}

macro_rules! on_each {
    ($($case:ident),*) => {
        on_each!(@of under_sentinels, super::RedisSentinel; $($case)*);
        on_each!(@of on_a_cluster, super::RedisNodes; $($case)*);
    };
    (@of $deployment:ident, $kind:ty; $($case:ident)*) => {
        mod $deployment {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case::<$kind>().await;
            })*
        }
    };
}

on_each!(
    a_failover_in_good_order_removes_nobody,
    a_primary_that_dies_and_comes_back_costs_nobody,
    a_primary_that_hangs_is_left
);
