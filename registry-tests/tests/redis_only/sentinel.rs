//! Primaries that are replaced, by accident or in good order, and Sentinels that fail.

use std::time::Duration;

use futures::future::{join_all, try_join_all};
use registry_redis::RedisTopology;
use registry_tests::{
    conformance::support::{
        Observer, PATIENCE, all_registered, client as client_of, eventually, in_time, instance, instances, is_live,
        is_stale, never_within, register_all, states,
    },
    harness::{Harness, RedisSentinelHarness as Sentinels},
    proxy::FaultProxy,
    servers::{Cluster, Redis},
};
use tokio::time::{Instant, sleep};

use crate::{ELECTED, SECOND, bare, client, command, config, options, register_within, soon, unchecked};

const STORM: usize = 300;

/// What was acknowledged by a primary that dies may be lost with it: the heartbeat puts it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_dies_in_a_storm_of_registrations_costs_none() {
    let store = Sentinels::with_own_server().await;
    let (provider, reader) = (client_of(&store).await, client_of(&store).await);
    provider.registry.register(instance("orders", "first")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    let dead = store.primary("orders").await;
    let storm = join_all(instances("orders", "i", STORM).into_iter().enumerate().map(|(index, one)| {
        let provider = &provider;
        async move {
            sleep(Duration::from_millis(10) * index as u32).await;
            provider.registry.register(one).await
        }
    }));
    let accident = async {
        let third = |seen: &registry_core::Snapshot| seen.len() > STORM / 3;
        observer.until("a third of them", PATIENCE, third).await;
        dead.kill().await.unwrap();
    };
    let (outcomes, ()) = tokio::join!(storm, accident);
    let failed: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    println!("{} of {STORM} calls failed", failed.len());
    assert!(failed.iter().all(registry_core::Error::is_retryable), "{failed:?}");
    assert!(!failed.is_empty(), "the storm outlasts the primary");
    eventually(
        "all are registered",
        ELECTED,
        async || states(&provider),
        |states| states.len() == STORM + 1 && all_registered(states),
    )
    .await;
    let all = |seen: &registry_core::Snapshot| seen.len() == STORM + 1 && is_live(seen);
    observer.until("all of them", ELECTED, all).await;

    // For some seconds the old one takes itself for the primary, and then throws away what it has.
    dead.restart().await.unwrap();
    let late = client_of(&store).await;
    let late = (Observer::of(&late, "orders").await, late);
    for observer in [&observer, &late.0] {
        observer.until("all of them", ELECTED, all).await;
        let count = async || observer.now().len();
        never_within("one is gone", 5 * SECOND, count, |count| *count != STORM + 1).await;
    }
    provider.registry.register(instance("orders", "last")).await.unwrap();
    observer.until("the last", ELECTED, |seen| seen.get("last").is_some()).await;
    let changes = observer.changes();
    assert!(changes.iter().all(|change| change.starts_with('+')), "{changes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_in_good_order_removes_nobody_and_is_followed() {
    let store = Sentinels::with_own_server().await;
    let (provider, reader) = (client_of(&store).await, client_of(&store).await);
    register_all(&provider, instances("orders", "i", 50)).await;
    let observer = Observer::of(&reader, "orders").await;
    for round in 0..2 {
        // There and back: the one that was demoted has to have caught up.
        let start = Instant::now();
        store.fail_over("orders").await;
        println!("round {round}: another primary after {:?}", start.elapsed());
        let id = format!("new-{round}");
        register_within(ELECTED, &provider, instance("orders", &id)).await;
        observer.until(&id, ELECTED, |seen| seen.get(&id).is_some() && is_live(seen)).await;
    }
    assert_eq!(observer.changes(), ["+new-0", "+new-1"]);
    eventually("all are registered", ELECTED, async || states(&provider), all_registered).await;
}

/// Two of three are enough, also to find the next primary; the first that clients were told of is no more than another.
#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_that_dies_is_not_missed() {
    let store = Sentinels::with_own_server().await;
    let (provider, reader) = (client_of(&store).await, client_of(&store).await);
    register_all(&provider, instances("orders", "i", 5)).await;
    let observer = Observer::of(&reader, "orders").await;
    store.members()[2].kill().await.unwrap();
    let start = Instant::now();
    provider.registry.register(instance("orders", "after")).await.unwrap();
    assert!(start.elapsed() < SECOND * 2, "{:?}", start.elapsed());
    observer.until("it", soon(), |seen| seen.get("after").is_some()).await;
    observer.assert_always("live", is_live);
    let late = client_of(&store).await;
    let found = in_time("discover", 2 * SECOND, late.registry.discover("orders")).await.unwrap();
    assert_eq!(found.len(), 6);

    store.primary("orders").await.kill().await.unwrap();
    register_within(ELECTED, &provider, instance("orders", "elected")).await;
    observer.until("it", ELECTED, |seen| seen.get("elected").is_some() && is_live(seen)).await;
    assert_eq!(observer.changes(), ["+after", "+elected"]);
}

/// Every connection there is falls silent at once, as behind a firewall that forgets them: new ones are made, at the
/// Sentinels, too.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_all_fall_silent_are_replaced() {
    let servers = Redis::sentinel();
    let size = servers.size();
    let cluster = Cluster::start(servers, size).await.unwrap();
    let members = cluster.members().iter().map(registry_tests::servers::Server::addr);
    // Spelled with as many characters as 127.0.0.1, so that what the Sentinels say can be translated.
    let host = std::net::Ipv4Addr::new(127, 9, 9, 9);
    let network = try_join_all(members.map(|member| FaultProxy::in_place_of(member, host))).await.unwrap();
    let topology = RedisTopology::Sentinel { master: "registry".to_owned() };
    let ttl = 3 * SECOND;
    let sentinels = network[2..].iter().map(FaultProxy::addr);
    let one = client(config(sentinels, unchecked().ttl(ttl)).topology(topology));
    register_all(&one, instances("orders", "i", 3)).await;
    let observer = Observer::of(&one, "orders").await;
    network.iter().for_each(FaultProxy::strand_all);
    let silent = Instant::now();
    observer.until("nobody answers", PATIENCE, is_stale).await;
    observer.until("somebody does", PATIENCE, is_live).await;
    println!("live {:?} after all connections fell silent", silent.elapsed());
    register_within(PATIENCE, &one, instance("orders", "new")).await;
    observer.until("the new one", soon(), |seen| seen.len() == 4).await;
    assert_eq!(observer.changes(), ["+new"]);
}

/// The documented rights, at the Sentinels and at the servers.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_are_enough_under_sentinels() {
    let servers = Redis::sentinel();
    let size = servers.size();
    let cluster = Cluster::start(servers, size).await.unwrap();
    for (index, member) in cluster.members().iter().enumerate() {
        let rights = if index < 2 { crate::errors::least() } else { crate::errors::least_at_sentinels() };
        let grant = format!("ACL SETUSER app reset on >pw {rights}");
        command(&grant).exec_async(&mut bare(&format!("redis://{}", member.addr())).await).await.unwrap();
    }
    let sentinels = cluster.members()[2..].iter().map(registry_tests::servers::Server::addr);
    let topology = RedisTopology::Sentinel { master: "registry".to_owned() };
    let app = config(sentinels, options()).topology(topology).user("app", "pw");
    let right = client(app.clone().sentinel_user("app", "pw"));
    right.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&right, "orders").await;
    observer.until_ids(soon(), &["1"]).await;
    let wrong = client(app.sentinel_user("app", "wr0ng-s3cret"));
    let error = wrong.registry.register(instance("orders", "2")).await.unwrap_err();
    assert_eq!(error.kind(), registry_core::ErrorKind::PermissionDenied, "{error:?}");
    let said = [crate::errors::chain(&error), format!("{wrong:?}")].concat();
    assert!(!said.contains("wr0ng-s3cret"), "{said}");
}
