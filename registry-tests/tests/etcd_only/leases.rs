//! How many leases there are, what they cost, and what goes with one.

use std::{collections::HashMap, time::Duration};

use registry_core::Event;
use registry_tests::{
    conformance::support::{Events, PATIENCE, all_registered, eventually, instance, instances, register_all, states},
    servers::Etcd,
};
use tokio::time::Instant;

use crate::{SECOND, Store, client, options, restored, unchecked};

const ORDERS: &str = "/services/orders/providers/";

/// A heartbeat costs one request, however many keys there are, and writes nothing; and nothing else is asked meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_keys_share_one_lease_and_one_request_a_beat() {
    const BEATS: u64 = 8;
    let store = Store::start(Etcd::new()).await;
    let beat = SECOND;
    let provider = client(store.config(unchecked().ttl(3 * beat)));
    register_all(&provider, instances("orders", "i", 1000)).await;
    assert_eq!(store.leases(ORDERS).await.into_values().collect::<Vec<_>>(), [1000]);

    let keep_alives = || store.counted("grpc_server_msg_received_total", r#"grpc_method="LeaseKeepAlive""#);
    let writes = || store.counted("grpc_server_started_total", r#"grpc_service="etcdserverpb.KV""#);
    let probes = || store.counted("grpc_server_started_total", r#"grpc_method="Status""#);
    // The first beats: one is out of turn, when the lease is new.
    let begun = keep_alives().await;
    let from = eventually("the first beats", PATIENCE, keep_alives, |count| *count >= begun + 2).await;
    let (began, written, probed) = (Instant::now(), writes().await, probes().await);
    let to = eventually("more beats", PATIENCE, keep_alives, |count| *count >= from + BEATS).await;
    let took = began.elapsed();
    println!("{} keep-alives in {took:?}", to - from);
    let expected = took.as_secs_f64() / beat.as_secs_f64();
    assert!(((to - from) as f64) < expected + 0.5, "{} keep-alives in {took:?}", to - from);
    assert_eq!((writes().await, probes().await), (written, probed));
    assert!(all_registered(&states(&provider)));
}

/// Beyond a thousand keys there are more leases, and one that is lost takes only its own keys with it.
#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_keys_use_a_pool_and_a_revoked_lease_touches_only_its_own() {
    let store = Store::start(Etcd::new()).await;
    let ttl = 6 * SECOND;
    let provider = client(store.config(unchecked().ttl(ttl).request_timeout(10 * SECOND)));
    register_all(&provider, instances("orders", "i", 5000)).await;
    let before = store.leases(ORDERS).await;
    assert_eq!(before.values().copied().collect::<Vec<_>>(), [1000; 5]);
    let places = async || {
        let names = store.names(ORDERS).await;
        names.kvs().iter().map(|kv| (kv.key().to_vec(), (kv.lease(), kv.mod_revision()))).collect::<HashMap<_, _>>()
    };
    let old = places().await;

    let victim = *before.keys().nth(2).unwrap();
    store.bare.lease_client().revoke(victim).await.unwrap();
    let revoked = Instant::now();
    assert_eq!(store.count(ORDERS).await, 4000);
    eventually("all are back", restored(ttl), || store.count(ORDERS), |count| *count == 5000).await;
    println!("1000 of 5000 back after {:?}", revoked.elapsed());
    for (key, (lease, revision)) in places().await {
        let (old_lease, old_revision) = old[&key];
        if old_lease == victim {
            assert!(lease != victim && revision > old_revision);
        } else {
            assert_eq!((lease, revision), (old_lease, old_revision));
        }
    }
    let after = store.leases(ORDERS).await;
    assert_eq!(after.values().sum::<usize>(), 5000);
    assert!(after.len() == 5 && before.keys().filter(|lease| after.contains_key(lease)).count() == 4, "{after:?}");
    eventually("it knows", PATIENCE, async || states(&provider), all_registered).await;
    let heartbeat = provider.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.reregistered.len(), heartbeat.failed.len()), (5000, 0, 0));

    provider.registry.destroy().await.unwrap();
    assert!(store.leases("/").await.is_empty());
}

/// A ttl below what the server grants is raised, the user is told, and nothing is lost over it.
#[tokio::test(flavor = "multi_thread")]
async fn a_ttl_below_the_least_is_raised_and_told() {
    let usual = Etcd::new();
    // The least is three halves of the election timeout, in whole seconds.
    let slow = Etcd::new().arg("--heartbeat-interval=200").arg("--election-timeout=2000");
    for (etcd, asked, granted) in [(usual, Duration::from_millis(100), 2), (slow, 2 * SECOND, 3)] {
        let store = Store::start(etcd).await;
        let provider = client(store.config(options().ttl(asked)));
        let events = Events::of(&provider);
        provider.registry.register(instance("orders", "1")).await.unwrap();
        let told = |event: &Event| matches!(event, Event::Connected { ttl } if ttl.as_secs() == granted);
        events.until("the granted ttl", PATIENCE, told).await;
        let (lease, _) = store.leases(ORDERS).await.pop_first().unwrap();
        let life = store.bare.lease_client().time_to_live(lease, None).await.unwrap();
        assert_eq!(life.granted_ttl().unsigned_abs(), granted);
        // It lives on the same lease for longer than that.
        let revision = store.names(ORDERS).await.kvs()[0].mod_revision();
        tokio::time::sleep(Duration::from_secs(granted) * 2).await;
        assert_eq!(store.leases(ORDERS).await.into_iter().collect::<Vec<_>>(), [(lease, 1)]);
        assert_eq!(store.names(ORDERS).await.kvs()[0].mod_revision(), revision);
        assert!(all_registered(&states(&provider)));
    }
}
