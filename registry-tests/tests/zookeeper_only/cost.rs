//! What a registry costs a server, and a change its readers.

use std::time::Duration;

use registry_tests::{
    conformance::support::{
        Observer, all_registered, eventually, instance, instances, is_live, register_all, states, weighing,
    },
    harness::Client,
    proxy::{FaultProxy, Stats},
    servers::ZooKeeper,
};
use tokio::time::Instant;

use crate::{ORDERS, SECOND, Store, children, client, config, left, unchecked};

/// The bytes of a request, and of its answer.
type Exchange = (u64, u64);
/// Without a body on either side.
const PING: Exchange = (12, 20);
/// Whether there is a root.
const QUESTION: Exchange = (18, 88);

/// One that is alone is asked a fifth of the ttl after it last answered something; where there are several, the client pings
/// at two fifths of the second after which it takes one for dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_instances_are_one_session_that_costs_a_question_now_and_then() {
    const TTL: Duration = Duration::from_secs(6);
    let store = Store::start(ZooKeeper::new()).await;
    let proxies = [store.proxy().await, store.proxy().await];
    for (servers, exchange, a_ttl) in [(1, QUESTION, 5.0), (2, PING, 2.5 * TTL.as_secs_f64())] {
        let addresses: Vec<_> = proxies[..servers].iter().map(FaultProxy::addr).collect();
        let provider = client(config(addresses, unchecked().ttl(TTL)));
        register_all(&provider, instances("orders", "i", 1000)).await;
        // That of the one before ends when it likes.
        let count = async || (store.sessions().await, store.connections().await);
        eventually("one session", SECOND, count, |count| *count == (1, 1)).await;
        let bare = store.bare().await;
        let before = left(&bare, ORDERS).await;
        assert_eq!(before.len(), 1000);

        let proxy = proxies.iter().find(|proxy| proxy.stats().live == 1).expect("one of them leads to the server");
        let (start, began) = (idle(proxy).await, Instant::now());
        let enough = start.to_server + exchange.0 * a_ttl as u64;
        let end = proxy.until(|now| now.to_server >= enough).await;
        let took = began.elapsed();
        let (up, down) = (end.to_server - start.to_server, end.to_client - start.to_client);
        println!("{up} bytes up, {down} down in {took:?}, {servers} servers");
        assert!(up.is_multiple_of(exchange.0) && down.is_multiple_of(exchange.1), "{up} {down}");
        assert!((up / exchange.0).abs_diff(down / exchange.1) <= 1, "each has its answer: {up} {down}");
        let most = took.as_secs_f64() / TTL.as_secs_f64() * a_ttl;
        assert!(up / exchange.0 <= most.ceil() as u64 + 1, "{up} bytes in {took:?}");
        assert_eq!((end.accepted, end.live), (start.accepted, 1));
        assert!(all_registered(&states(&provider)));
        assert_eq!(left(&bare, ORDERS).await, before);
        provider.registry.destroy().await.unwrap();
        drop(bare);
    }
}

/// The counters right after something was sent.
async fn idle(proxy: &FaultProxy) -> Stats {
    let start = proxy.stats();
    proxy.until(|now| now.to_server > start.to_server).await
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
