//! Stores that are full, and stores that are slow.

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, CompactionOptions, DeleteOptions};
use registry_core::ErrorKind;
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, instance, instances, is_live, never_within,
        register_all, states,
    },
    servers::Etcd,
};
use tokio::time::{Instant, sleep};

use crate::{SECOND, SLACK, Store, client, options, soon};

/// A full store refuses what is new, keeps what is there, and takes the rest once an operator has made room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_waited_for() {
    let store = Store::start(Etcd::new().arg("--quota-backend-bytes=16777216")).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    let leaving = client(store.config(options()));
    register_all(&provider, vec![instance("orders", "1"), instance("orders", "2")]).await;
    register_all(&leaving, instances("orders", "leaving", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    let full = loop {
        let key = format!("/ballast/{}", rand::random::<u64>());
        if let Err(full) = store.kv().put(key, vec![0; 1 << 20], None).await {
            break full.to_string();
        }
    };
    assert!(full.contains("space exceeded"), "{full}");

    let asked = Instant::now();
    let error = provider.registry.register(instance("orders", "3")).await.unwrap_err();
    println!("full, after {:?}: {error:?}", asked.elapsed());
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("full"), "{error}");
    let pending: Vec<_> = states(&provider).iter().map(|state| state.as_str()).collect();
    assert_eq!(pending, ["registered", "registered", "pending"]);
    // Who leaves for good takes the session along, which needs no room; that they left by will cannot be written down.
    leaving.registry.destroy().await.unwrap();
    assert_eq!(store.count("/services/orders/providers/leaving").await, 0);
    observer.until("they left", options().protection() + soon(), |seen| seen.get("leaving-000").is_none()).await;
    // So does the removal of one instance, once it does without that.
    provider.registry.unregister("orders", "2").await.unwrap();
    assert_eq!(store.count("/services/orders/providers/2").await, 0);
    observer.until("it left", options().protection() + soon(), |seen| seen.get("2").is_none()).await;
    // What is there stays, for longer than its ttl.
    sleep(options().ttl * 2).await;
    assert!(observer.now().get("1").is_some() && reader.registry.discover("orders").await.unwrap().get("1").is_some());

    store.kv().delete("/ballast/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    let now = store.revision().await;
    store.kv().compact(now, Some(CompactionOptions::new().with_physical())).await.unwrap();
    let mut maintenance = store.bare.maintenance_client();
    maintenance.defragment().await.unwrap();
    let alarms = maintenance.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap();
    for alarm in alarms.alarms() {
        let mut options = AlarmOptions::new();
        options.with_member(alarm.member_id());
        maintenance.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options)).await.unwrap();
    }
    let room = Instant::now();
    // Attempts are at most a third of the ttl apart.
    let within = options().ttl / 3 + SECOND + SLACK;
    eventually("it is registered", within, async || states(&provider), all_registered).await;
    println!("registered {:?} after there was room", room.elapsed());
    observer.until_ids(PATIENCE, &["1", "3"]).await;
    provider.registry.register(instance("orders", "4")).await.unwrap();
    observer.until_ids(soon(), &["1", "3", "4"]).await;
    observer.assert_always("1 is there", |seen| seen.get("1").is_some());
}

/// A server that is slow, and the only one, is better than none: to leave it would be more work for it.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_server_is_not_left_for_being_slow() {
    let store = Store::start(Etcd::new()).await;
    let slow = store.behind_a_proxy(options().ttl(15 * SECOND).request_timeout(5 * SECOND)).await;
    slow.registry.register(instance("orders", "1")).await.unwrap();
    let (observer, events) = (Observer::of(&slow, "orders").await, Events::of(&slow));
    slow.link.delay(SECOND / 2);
    // It is looked at every five seconds.
    never_within("it is left", 13 * SECOND, async || observer.now(), |seen| !is_live(seen)).await;
    slow.registry.register(instance("orders", "2")).await.unwrap();
    observer.until_ids(PATIENCE, &["1", "2"]).await;
    assert!(!format!("{events:?}").contains("Suspended"), "{events:?}");
}
