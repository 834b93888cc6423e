//! What a registry costs a server, and a change its readers.

use registry_tests::{
    conformance::support::{Observer, all_registered, instance, instances, is_live, register_all, states, weighing},
    harness::Client,
    proxy::{FaultProxy, Stats},
    servers::ZooKeeper,
};
use tokio::time::Instant;

use crate::{ORDERS, SECOND, Store, children, client, config, left, unchecked};

/// A ping is a request without a body, and so is its answer.
const PING: u64 = 12;
const PONG: u64 = 20;
/// The client pings at two fifths of the second after which it takes a server for dead.
const PINGS_A_SECOND: f64 = 2.5;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_instances_are_one_session_that_is_kept_by_pings_alone() {
    const HEARTBEATS: u32 = 3;
    let store = Store::start(ZooKeeper::new()).await;
    let (proxy, heartbeat) = (store.proxy().await, 2 * SECOND);
    let provider = client(config([proxy.addr()], unchecked().ttl(3 * heartbeat)));
    register_all(&provider, instances("orders", "i", 1000)).await;
    assert_eq!((store.sessions().await, store.connections().await), (1, 1));
    let bare = store.bare().await;
    let before = left(&bare, ORDERS).await;
    assert_eq!(before.len(), 1000);

    let idle = async || {
        let start = proxy.stats();
        proxy.until(|now| now.to_server > start.to_server).await
    };
    let (start, began) = (idle().await, Instant::now());
    let pings = (HEARTBEATS * heartbeat).as_secs_f64() * PINGS_A_SECOND;
    let enough = start.to_server + PING * pings as u64;
    let end = proxy.until(|now| now.to_server >= enough).await;
    let took = began.elapsed();
    let (up, down) = (end.to_server - start.to_server, end.to_client - start.to_client);
    println!("{up} bytes up, {down} down in {took:?}");
    assert!((up.is_multiple_of(PING), down.is_multiple_of(PONG)) == (true, true), "{up} {down}");
    assert!((up / PING).abs_diff(down / PONG) <= 1, "each ping has its answer: {up} {down}");
    assert!(up / PING <= (took.as_secs_f64() * PINGS_A_SECOND).ceil() as u64 + 1, "{up} bytes in {took:?}");
    assert_eq!((end.accepted, end.live), (1, 1));
    assert!(all_registered(&states(&provider)));
    assert_eq!(left(&bare, ORDERS).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_among_a_thousand_costs_a_reader_few_bytes() {
    const MOST: u64 = 600;
    let store = Store::start(ZooKeeper::new()).await;
    let options = unchecked().ttl(30 * SECOND);
    let provider = client(store.config(options.clone()));
    register_all(&provider, instances("orders", "i", 1000)).await;
    let mut readers: Vec<(FaultProxy, Client, Observer)> = Vec::new();
    for _ in 0..2 {
        let proxy = store.proxy().await;
        let reader = client(config([proxy.addr()], options.clone()));
        let observer = Observer::of(&reader, "orders").await;
        observer.until("all", SECOND, |seen| seen.len() == 1000 && is_live(seen)).await;
        readers.push((proxy, reader, observer));
    }
    assert_eq!(children(&store.bare().await, ORDERS).await.len(), 1000);
    for round in 1..=5 {
        let before: Vec<Stats> = readers.iter().map(|(proxy, ..)| proxy.stats()).collect();
        provider.registry.register(weighing(instance("orders", "i-500"), round)).await.unwrap();
        for ((proxy, _, observer), before) in readers.iter().zip(before) {
            let changed = observer.until("the change", 2 * SECOND, |seen| seen.get("i-500").unwrap().weight == round);
            assert_eq!(changed.await.len(), 1000);
            let now = proxy.stats();
            let (up, down) = (now.to_server - before.to_server, now.to_client - before.to_client);
            println!("round {round}: {up} bytes up, {down} down");
            assert!(up + down <= MOST, "{up} bytes up, {down} down");
        }
    }
    for (_, _, observer) in &readers {
        assert_eq!(observer.changes(), ["~i-500"; 5]);
        observer.assert_always("live", is_live);
    }
    assert!(all_registered(&states(&provider)));
}
