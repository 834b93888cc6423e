//! Histories that end, turn back or are cut short.

use std::time::Duration;

use registry_core::{Event, Snapshot};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, instance, instances, is_live, is_stale, never_within,
        register_all, states, weighing,
    },
    harness::Client,
    servers::Redis,
};
use tokio::time::Instant;

use crate::{EXPIRY, LOG, RECORDS, SECOND, Store, client, gone, options, restored, soon, unchecked};

/// Two providers with three instances each, and a reader of all six.
async fn six(store: &Store, ttl: Duration) -> (Client, Client, Observer, Client) {
    let patient = unchecked().ttl(ttl);
    let [one, other, reader] = [(); 3].map(|()| client(store.config(patient.clone())));
    register_all(&one, instances("orders", "a", 3)).await;
    register_all(&other, instances("orders", "b", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    observer.until("all of them", soon(), |seen| seen.len() == 6).await;
    (one, other, observer, reader)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_store_is_filled_by_the_next_heartbeat_and_no_reader_sees_a_change() {
    let store = Store::start(Redis::new()).await;
    let ttl = 3 * SECOND;
    let (one, other, observer, _reader) = six(&store, ttl).await;
    for order in ["FLUSHALL", "FLUSHDB ASYNC", "FLUSHALL SYNC"] {
        store.order::<()>(order).await;
        let flushed = Instant::now();
        eventually("all are back", restored(ttl), || store.records(), |count| *count == 6).await;
        println!("{order}: all are back after {:?}", flushed.elapsed());
        observer.until("the end of the hold", PATIENCE, is_live).await;
    }
    assert!(observer.changes().is_empty(), "{observer:?}");
    observer.assert_always("all of them", |seen| seen.len() == 6);
    for provider in [&one, &other] {
        eventually("they know", PATIENCE, async || states(provider), all_registered).await;
    }
}

/// Its first script puts three and is told of the others; its second takes those over.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_finds_some_of_its_keys_taken_is_seen_as_a_whole_without_a_poll() {
    let store = Store::start(Redis::new()).await;
    let [one, other, reader] = [(); 3].map(|()| client(store.config(unchecked().ttl(30 * SECOND)).poll(60 * SECOND)));
    let taken = instances("orders", "i", 6).into_iter().step_by(2);
    register_all(&one, taken.collect()).await;
    let observer = Observer::of(&reader, "orders").await;
    let all = instances("orders", "i", 6).into_iter().map(|instance| weighing(instance, 7));
    register_all(&other, all.collect()).await;
    let seen = observer
        .until("all of them", soon(), |seen| seen.len() == 6 && seen.instances().iter().all(|one| one.weight == 7))
        .await;
    assert!(is_live(&seen), "{observer:?}");
    observer.assert_always("those of before", |seen| seen.len() >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_that_are_flushed_under_way_are_sent_again() {
    let store = Store::start(Redis::new()).await;
    let (one, other, observer, _reader) = six(&store, 3 * SECOND).await;
    let mut bare = store.bare().await;
    let flushing = tokio::spawn(async move {
        loop {
            crate::command("SCRIPT FLUSH").exec_async(&mut bare).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    for weight in 0..50 {
        one.registry.register(weighing(instance("orders", "a-000"), weight)).await.unwrap();
        register_all(&other, instances("orders", "c", 3)).await;
        let heartbeat = other.registry.heartbeat().await.unwrap();
        assert_eq!((heartbeat.failed.len(), heartbeat.reregistered.len()), (0, 0));
        assert!(other.registry.unregister("orders", "c-001").await.unwrap());
    }
    let last = |seen: &Snapshot| seen.get("a-000").is_some_and(|one| one.weight == 49) && seen.len() == 8;
    observer.until("the last changes", soon(), last).await;
    assert!(!flushing.is_finished());
    flushing.abort();
    observer.assert_always("live", is_live);
    observer.assert_always("the others", |seen| seen.get("a-001").is_some() && seen.get("b-002").is_some());
    assert!(store.statistics("evalsha").await["failed_calls"] > 0.0, "scripts were missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_keeps_its_data_is_restarted_and_nothing_changes() {
    let store = Store::start(Redis::new().durable()).await;
    let (one, _other, observer, _reader) = six(&store, 3 * SECOND).await;
    let events = Events::of(&one);
    for round in 0..2 {
        store.server.kill().await.unwrap();
        observer.until("the outage", PATIENCE, is_stale).await;
        store.server.restart().await.unwrap();
        observer.until("the end of the outage", PATIENCE, is_live).await;
        assert_eq!(store.records().await, 6, "round {round}");
    }
    assert!(observer.changes().is_empty(), "{:?}", observer.changes());
    events.until("it is back", PATIENCE, |event| matches!(event, Event::Connected { .. })).await;
    // The event may have been the first return's, and a connection that was begun before the second one hang for a second.
    let beat = async || one.registry.heartbeat().await;
    let heartbeat = eventually("it is heard of again", PATIENCE, beat, Result::is_ok).await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.reregistered.len()), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loses_its_data_is_filled_again_and_readers_keep_their_list() {
    let store = Store::start(Redis::new()).await;
    let ttl = 3 * SECOND;
    let (_one, _other, observer, _reader) = six(&store, ttl).await;
    for _ in 0..2 {
        store.server.kill().await.unwrap();
        store.server.restart().await.unwrap();
        let back = Instant::now();
        eventually("all are back", restored(ttl), || store.records(), |count| *count == 6).await;
        println!("all are back {:?} after the server", back.elapsed());
        observer.until("the end of the hold", PATIENCE, is_live).await;
    }
    assert!(observer.changes().is_empty(), "{:?}", observer.changes());
    observer.assert_always("all of them", |seen| seen.len() == 6);
}

/// The server saved once, went on, and comes back as it was then: what lives stays, and is as its owners say, and what
/// has gone since does not stay.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_dump_is_a_history_that_turned_back() {
    let store = Store::start(Redis::new()).await;
    let ttl = 2 * SECOND;
    let (one, other, observer, reader) = six(&store, ttl).await;
    let crashing = store.behind_a_proxy(unchecked().ttl(ttl)).await;
    register_all(&crashing, instances("orders", "crashing", 2)).await;
    observer.until("the others", soon(), |seen| seen.len() == 8).await;
    store.order::<()>("SAVE").await;

    one.registry.register(weighing(instance("orders", "a-000"), 7)).await.unwrap();
    assert!(one.registry.unregister("orders", "a-001").await.unwrap());
    register_all(&other, instances("orders", "new", 2)).await;
    crashing.crash();
    let expected = ["a-000", "a-002", "b-000", "b-001", "b-002", "new-000", "new-001"];
    observer.until_ids(gone(ttl), &expected).await;
    // It does not save when it is killed.
    store.server.kill().await.unwrap();
    let from = observer.history().len();
    store.server.restart().await.unwrap();
    let late = client(store.config(options()));
    let late = (Observer::of(&late, "orders").await, late);

    let weighs = |weight: u32| move |seen: &Snapshot| seen.get("a-000").is_some_and(|one| one.weight == weight);
    let right = |seen: &Snapshot| {
        let ids: Vec<_> = seen.instances().iter().map(|one| one.id.as_str()).collect();
        ids == expected && is_live(seen) && weighs(7)(seen)
    };
    // Who died may have a ttl more, as nobody looked while the server was away.
    for observer in [&observer, &late.0] {
        observer.until("what is true", 3 * ttl + soon(), right).await;
    }
    let lives = |seen: &Snapshot| expected.iter().all(|id| seen.get(id).is_some());
    assert!(observer.history()[from..].iter().all(lives), "nothing that lives is removed: {observer:?}");
    let now = async || observer.now();
    never_within("something else", ttl, now, |seen| !right(seen)).await;
    one.registry.register(instance("orders", "last")).await.unwrap();
    observer.until("it is followed", soon(), |seen| seen.get("last").is_some()).await;
    drop(reader);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_was_away_while_the_log_was_trimmed_reads_anew() {
    let store = Store::start(Redis::new()).await;
    let (provider, reader) = (client(store.config(options())), store.behind_a_proxy(unchecked()).await);
    register_all(&provider, instances("orders", "i", 10)).await;
    let observer = Observer::of(&reader, "orders").await;
    for round in 0..3 {
        reader.link.cut();
        observer.until("the cut", soon(), is_stale).await;
        if round == 0 {
            assert!(provider.registry.unregister("orders", "i-003").await.unwrap());
        }
        if round == 1 {
            provider.registry.register(weighing(instance("orders", "i-004"), 7)).await.unwrap();
            provider.registry.register(instance("orders", "new")).await.unwrap();
        }
        store.order::<()>(&format!("XTRIM {LOG} MAXLEN 0")).await;
        reader.link.heal();
        observer.until("the end of the cut", PATIENCE, is_live).await;
    }
    let expected = ["i-000", "i-001", "i-002", "i-004", "i-005", "i-006", "i-007", "i-008", "i-009", "new"];
    // Who left was in what was trimmed: it is held for as long as one that vanished.
    let seen = observer.until_ids(options().protection() + soon(), &expected).await;
    assert_eq!(seen.get("i-004").unwrap().weight, 7);
    let mut changes = observer.changes();
    changes.sort();
    assert_eq!(changes, ["+new", "-i-003", "~i-004"]);
    provider.registry.register(instance("orders", "newer")).await.unwrap();
    observer.until("the newer one", soon(), |seen| seen.get("newer").is_some()).await;
}

/// However many changes there are: the log keeps the latest, and those who follow it see all.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_service_does_not_grow_for_ever() {
    const CHANGES: u32 = 3000;
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(60 * SECOND);
    let (provider, reader) = (client(store.config(patient.clone())), client(store.config(patient)));
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    for weight in 0..CHANGES {
        provider.registry.register(weighing(instance("orders", "i-000"), 1000 + weight)).await.unwrap();
    }
    let last = |seen: &Snapshot| seen.get("i-000").is_some_and(|one| one.weight == 999 + CHANGES);
    observer.until("the last change", soon(), last).await;
    observer.assert_always("live", is_live);
    // It is trimmed a node of a hundred at a time.
    let length: u64 = store.order(&format!("XLEN {LOG}")).await;
    assert!((1000..=1100).contains(&length), "{length}");
}

/// In another database, keys and messages are other ones, and nothing of them is in the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_a_namespace_of_its_own() {
    let store = Store::start(Redis::new()).await;
    let grant = format!("{} +select", crate::errors::least());
    store.grant("app", "pw", &grant).await;
    let of = |database| client(store.config(unchecked()).database(database).user("app", "pw"));
    let (provider, reader, first) = (of(5), of(5), of(0));
    let (observer, other) = (Observer::of(&reader, "orders").await, Observer::of(&first, "orders").await);
    provider.registry.register(instance("orders", "1")).await.unwrap();
    observer.until_ids(soon(), &["1"]).await;
    assert_eq!(reader.registry.services().await.unwrap().len(), 1);
    assert!(first.registry.discover("orders").await.unwrap().is_empty());
    provider.registry.destroy().await.unwrap();
    observer.until_ids(soon(), &[]).await;
    assert!(other.changes().is_empty(), "{:?}", other.changes());
}

/// As another policy than `noeviction` would do it, or an operator.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_vanish_one_by_one_come_back_and_no_living_instance_is_removed() {
    let store = Store::start(Redis::new()).await;
    let ttl = 2 * SECOND;
    let (one, _other, observer, _reader) = six(&store, ttl).await;
    let crashing = store.behind_a_proxy(unchecked().ttl(ttl)).await;
    crashing.registry.register(instance("orders", "crashing")).await.unwrap();
    observer.until("all of them", soon(), |seen| seen.len() == 7).await;
    let expiring = || store.order::<Vec<String>>("ZRANGE {services/orders}:expiry 0 -1");

    for key in [RECORDS, EXPIRY, LOG, EXPIRY, RECORDS] {
        assert_eq!(store.order::<u64>(&format!("DEL {key}")).await, 1, "{key}");
        eventually("all records are back", restored(ttl), || store.records(), |count| *count == 7).await;
        let all = |members: &Vec<String>| members.len() == 8;
        eventually("all will expire", restored(ttl), expiring, all).await;
        observer.until("the end of the hold", PATIENCE, is_live).await;
        // It is followed on.
        let weight = rand::random();
        one.registry.register(weighing(instance("orders", "a-000"), weight)).await.unwrap();
        let changed = |seen: &Snapshot| seen.get("a-000").is_some_and(|one| one.weight == weight);
        observer.until("a change", soon(), changed).await;
    }
    let removed =
        |changes: Vec<String>| changes.into_iter().filter(|change| change.starts_with('-')).collect::<Vec<_>>();
    assert!(removed(observer.changes()).is_empty(), "{:?}", observer.changes());
    store.order::<()>(&format!("DEL {EXPIRY}")).await;
    crashing.crash();
    // It had its ttl anew.
    observer.until("the crashed one is gone", 2 * ttl + gone(ttl), |seen| seen.get("crashing").is_none()).await;
    assert_eq!(removed(observer.changes()), ["-crashing"]);
}
