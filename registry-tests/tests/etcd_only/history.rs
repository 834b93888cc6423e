//! Histories that end, turn back or are not ours.

use std::time::Duration;

use registry_core::{Event, Snapshot};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, ids, instance, instances, is_live, is_protected,
        register_all, states, weighing,
    },
    proxy::FaultProxy,
    servers::Etcd,
};
use tokio::time::Instant;

use crate::{SECOND, Store, client, config, options, restored, soon, unchecked};

/// A record of a process that is no more.
const FOREIGN: &str = r#"{"v":1,"owner":"other","epoch":1,"endpoints":["http://10.0.0.5:8080"]}"#;

fn path(id: &str) -> String {
    format!("/services/orders/providers/{id}")
}

/// A reader that is away while the history it would need is compacted sees what is there, and not what has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_was_away_while_history_was_compacted_sees_the_store_as_it_is() {
    let store = Store::start(Etcd::new()).await;
    let (provider, reader) = (client(store.config(options())), store.behind_a_proxy(unchecked()).await);
    register_all(&provider, instances("orders", "i", 10)).await;
    store.put(path("vanishing"), FOREIGN).await;
    let observer = Observer::of(&reader, "orders").await;
    observer.until("all", soon(), |seen| seen.len() == 11).await;

    for round in 0..3 {
        reader.link.cut();
        observer.until("the cut", soon(), |seen| seen.freshness().as_str() == "stale").await;
        if round == 0 {
            assert!(provider.registry.unregister("orders", "i-003").await.unwrap());
            store.kv().delete(path("vanishing"), None).await.unwrap();
        }
        if round == 1 {
            provider.registry.register(weighing(instance("orders", "i-004"), 7)).await.unwrap();
            provider.registry.register(instance("orders", "new")).await.unwrap();
        }
        for _ in 0..20 {
            store.put("/elsewhere", "x").await;
        }
        store.kv().compact(store.revision().await, None).await.unwrap();
        reader.link.heal();
        observer.until("the end of the cut", PATIENCE, is_live).await;
    }
    let expected = ["i-000", "i-001", "i-002", "i-004", "i-005", "i-006", "i-007", "i-008", "i-009", "new"];
    let seen = observer.until_ids(soon(), &expected).await;
    assert_eq!(seen.get("i-004").unwrap().weight, 7);
    assert_eq!(observer.changes(), ["-i-003", "-vanishing", "~i-004", "+new"]);
    // It follows, and does not only reread.
    provider.registry.register(instance("orders", "newer")).await.unwrap();
    observer.until("the newer one", soon(), |seen| seen.get("newer").is_some()).await;
}

/// A server that lost its data has the same ids as before, and soon a revision beyond what readers have seen: a watch
/// would simply go on. Readers notice, and are never without; providers fill it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_store_whose_revision_has_grown_past_ours_is_recognised() {
    let store = Store::start(Etcd::new()).await;
    let ttl = 6 * SECOND;
    let patient = unchecked().ttl(ttl);
    let here = client(store.config(patient.clone()));
    let (there, reader) = (store.behind_a_proxy(patient.clone()).await, store.behind_a_proxy(patient).await);
    register_all(&here, instances("orders", "i", 3)).await;
    register_all(&there, instances("payments", "i", 3)).await;
    let (orders, payments) = (Observer::of(&reader, "orders").await, Observer::of(&reader, "payments").await);
    let seen = store.revision().await;

    reader.link.cut();
    there.link.cut();
    store.server.wipe().await.unwrap();
    let back = Instant::now();
    let registered = |service: &'static str| {
        let store = &store;
        move || store.count(service)
    };
    let all = |count: &i64| *count == 3;
    eventually("it is filled again", restored(ttl), registered("/services/orders/providers/"), all).await;
    println!("registered again {:?} after the store was back", back.elapsed());
    while store.revision().await <= seen + 50 {
        store.put("/elsewhere", "x").await;
    }

    reader.link.heal();
    payments.until("they are held", PATIENCE, is_protected).await;
    orders.until("the end of the outage", PATIENCE, is_live).await;
    there.link.heal();
    let back = Instant::now();
    eventually("it is filled again", restored(ttl), registered("/services/payments/providers/"), all).await;
    println!("registered again {:?} after the way to the store was back", back.elapsed());
    payments.until("the end of the hold", soon(), is_live).await;
    for observer in [&orders, &payments] {
        observer.assert_always("all of them", |seen| seen.len() == 3);
        assert!(observer.changes().is_empty(), "{observer:?}");
    }
    for one in [&here, &there] {
        eventually("they know", PATIENCE, async || states(one), all_registered).await;
        one.registry.register(instance("orders", "j")).await.unwrap();
    }
    orders.until_ids(soon(), &["i-000", "i-001", "i-002", "j"]).await;
}

/// Behind the same address there is another store, as after a restored backup: what it has is the truth, and what it
/// lacks is held for a while, whether its revision is lower than ours or higher.
async fn a_backup_is_restored(grown: bool) {
    let (store, backup) = tokio::join!(Store::start(Etcd::new()), Store::start(Etcd::new()));
    for _ in 0..30 {
        store.put("/elsewhere", "x").await;
    }
    for id in ["a", "b", "c", "d"] {
        store.put(path(id), FOREIGN).await;
    }
    for id in ["a", "b", "gone-since"] {
        backup.put(path(id), FOREIGN).await;
    }
    for _ in 0..if grown { 100 } else { 0 } {
        backup.put("/elsewhere", "x").await;
    }
    assert_eq!(backup.revision().await > store.revision().await, grown);
    assert_ne!(backup.cluster().await, store.cluster().await);

    let proxy = FaultProxy::start(store.server.addr()).await.unwrap();
    let hold = Duration::from_secs(3);
    let reader = client(config([proxy.addr()], unchecked().protect_for(hold)));
    let (observer, events) = (Observer::of(&reader, "orders").await, Events::of(&reader));
    assert_eq!(ids(&observer.now()), ["a", "b", "c", "d"]);
    proxy.set_upstream(backup.server.addr());
    proxy.kill_connections();
    let held = |seen: &Snapshot| is_protected(seen) && ids(seen) == ["a", "b", "c", "d", "gone-since"];
    observer.until("what is missing is held", PATIENCE, held).await;
    let told = |event: &Event| matches!(event, Event::Protected { held: 2, .. });
    events.until("that is told", soon(), told).await;
    let truth = |seen: &Snapshot| is_live(seen) && ids(seen) == ["a", "b", "gone-since"];
    observer.until("the truth of the new store", hold + soon(), truth).await;
    backup.put(path("e"), FOREIGN).await;
    observer.until_ids(soon(), &["a", "b", "e", "gone-since"]).await;
    observer.assert_always("a and b", |seen| seen.get("a").is_some() && seen.get("b").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_is_the_truth_and_what_it_lacks_is_held_for_a_while() {
    a_backup_is_restored(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_that_has_grown_past_ours_is_recognised() {
    a_backup_is_restored(true).await;
}

/// Records of other formats and keys that nobody knows are none of ours, wherever they lie.
#[tokio::test(flavor = "multi_thread")]
async fn unknown_keys_and_formats_under_the_prefix_are_ignored() {
    let store = Store::start(Etcd::new()).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    let strange: [(&[u8], &[u8]); 18] = [
        // Other formats, older ones among them.
        (b"/services/orders/providers/url", b"http://10.0.0.5:8080"),
        (b"/services/orders/providers/empty", b""),
        (b"/services/orders/providers/unversioned", br#"{"owner":"o","epoch":1,"endpoints":["http://10.0.0.5:80"]}"#),
        (b"/services/orders/providers/ownerless", br#"{"v":1,"epoch":1}"#),
        (b"/services/orders/providers/null", b"null"),
        (b"/services/orders/providers/binary", b"\x08\x01\xff\xfe"),
        (b"/services/orders/overrides/i-000", b"drain"),
        (b"/services/orders/left/other", b"i-000"),
        // Other places.
        (b"/services/orders", b"x"),
        (b"/services/orders/", b"x"),
        (b"/services/orders/providers", b"x"),
        (b"/services/orders/providers/", FOREIGN.as_bytes()),
        (b"/services/orders/providers/a/b", FOREIGN.as_bytes()),
        (b"/services/orders/notes/1", FOREIGN.as_bytes()),
        (b"/services/orders/providers/%zz", FOREIGN.as_bytes()),
        (b"/services/orders/providers/\xff\xfe", FOREIGN.as_bytes()),
        (b"/services/notes/other/1", FOREIGN.as_bytes()),
        (b"/services-old/payments/providers/1", FOREIGN.as_bytes()),
    ];
    let put = async || {
        for (key, value) in strange {
            store.put(key, value).await;
        }
    };
    put().await;
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    assert_eq!(ids(&observer.now()), ["i-000", "i-001"]);
    // Again, under the eyes of the watch; and away with some of them.
    put().await;
    for (key, _) in strange.iter().step_by(2) {
        store.kv().delete(*key, None).await.unwrap();
    }
    provider.registry.register(instance("orders", "last")).await.unwrap();
    observer.until_ids(soon(), &["i-000", "i-001", "last"]).await;
    assert_eq!(observer.changes(), ["+last"]);
    observer.assert_always("live", is_live);
    assert_eq!(reader.registry.services().await.unwrap(), ["orders".parse().unwrap()]);
    assert_eq!(reader.registry.discover("orders").await.unwrap().available().count(), 3);
    let heartbeat = provider.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.failed.len()), (3, 0));

    // And they are nobody's to take out.
    provider.registry.destroy().await.unwrap();
    let left = strange.len() - strange.len().div_ceil(2);
    assert_eq!(store.count("/services").await as usize, left);
}
