//! The follow loop: what readers see is true to the store, and never emptier than the truth.

use std::{sync::atomic::Ordering, time::Duration};

use futures::{FutureExt, StreamExt};
use registry_core::{
    Change, Content, Departure, Error, ErrorKind, Event, Freshness, Instance, Options, Override, Registry, Status,
    Update, memory::MemoryStore,
};
use tokio::time::{Instant, sleep};

use super::{
    script::{Director, Feed, Script, gone, of, overridden, reset, upsert},
    *,
};

const SECOND: Duration = Duration::from_secs(1);
const HELD: Duration = Duration::from_secs(30);

/// A reader that has seen `a`, `b`, … of the service `orders`.
async fn reader(ids: &[&str]) -> (Managed<Script>, Director, Feed, Watcher) {
    reader_with(ids, Options::default()).await
}

async fn reader_with(ids: &[&str], options: Options) -> (Managed<Script>, Director, Feed, Watcher) {
    let (registry, director) = Script::registry(options);
    let feed = director.subscription();
    feed.reset(1, ids);
    let mut watcher = registry.watch("orders").await.unwrap();
    assert_eq!(super::ids(&watcher.next().await.unwrap()), ids);
    (registry, director, feed, watcher)
}

fn ten() -> Vec<String> {
    (0..10).map(|id| format!("i{id}")).collect()
}

async fn reader_of_ten() -> (Managed<Script>, Director, Feed, Watcher) {
    let ten = ten();
    reader(&ten.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[tokio::test(start_paused = true)]
async fn an_outage_keeps_the_last_set_marked_stale_and_resumes_from_the_cursor() {
    let (registry, director, feed, mut watcher) = reader(&["a", "b"]).await;
    feed.send(7, vec![upsert("c")]);
    watcher.next().await.unwrap();
    feed.fail();
    let stale = watcher.next().await.unwrap();
    assert!(matches!(stale.freshness(), Freshness::Stale { .. }));
    assert_eq!(ids(&stale), ["a", "b", "c"]);
    assert_eq!(ids(&registry.discover("orders").await.unwrap()), ["a", "b", "c"]);
    sleep(TTL * 30).await;
    assert_eq!(watcher.current().len(), 3, "for as long as it takes");
    let feed = director.subscription();
    feed.send(7, vec![]);
    let live = watcher.next().await.unwrap();
    assert_eq!(live.freshness(), Freshness::Live);
    assert!(live.changes_since(&stale).is_empty());
    assert_eq!(director.resumed_from().last(), Some(&Some("7".into())));
}

#[tokio::test(start_paused = true)]
async fn a_reset_is_diffed_against_what_readers_have() {
    let (_registry, director, feed, mut watcher) = reader(&["a", "b", "c", "d"]).await;
    let before = watcher.current().clone();
    feed.fail();
    let feed = director.subscription();
    let mut changed = Instance::builder("orders", "b").build().unwrap();
    changed.weight = 9;
    let records = [of(changed), script::record("c"), script::record("d"), script::record("e")];
    feed.send(9, vec![Update::Reset { records: records.into(), left: vec![], rewound: false }]);
    let seen = until(&mut watcher, TTL, |s| s.freshness() == Freshness::Live).await;
    let changes = seen.last().unwrap().changes_since(&before);
    assert!(
        matches!(&changes[..], [Change::Remove { .. }, Change::Update { .. }, Change::Insert { .. }]),
        "{changes:?}"
    );
    assert_eq!(changes.iter().map(|change| change.id().as_str()).collect::<Vec<_>>(), ["a", "b", "e"]);
}

#[tokio::test(start_paused = true)]
async fn a_reset_that_changes_nothing_publishes_nothing_but_freshness() {
    let (_registry, director, feed, mut watcher) = reader(&["a", "b"]).await;
    let before = watcher.current().clone();
    feed.fail();
    let feed = director.subscription();
    feed.reset(5, &["a", "b"]);
    let seen = until(&mut watcher, TTL, |s| s.freshness() == Freshness::Live).await;
    assert!(seen.iter().all(|snapshot| snapshot.changes_since(&before).is_empty()));
    feed.send(6, vec![upsert("a"), upsert("b")]);
    quiet(&mut watcher, SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn one_unmarked_loss_is_believed_at_once() {
    let (_registry, _director, feed, mut watcher) = reader(&["a", "b", "c"]).await;
    feed.send(2, vec![gone("b", Departure::Unknown)]);
    let next = watcher.next().await.unwrap();
    assert_eq!((ids(&next), next.freshness()), (vec!["a".into(), "c".into()], Freshness::Live));
}

#[tokio::test(start_paused = true)]
async fn half_of_a_service_that_vanishes_unmarked_is_held_to_the_bound_and_then_believed() {
    let (registry, _director, feed, mut watcher) = reader_of_ten().await;
    let mut events = registry.events();
    feed.send(2, (0..5).map(|id| gone(&format!("i{id}"), Departure::Unknown)).collect());
    let held = watcher.next().await.unwrap();
    let since = Instant::now();
    assert!(matches!(held.freshness(), Freshness::Protected { .. }), "{held:?}");
    assert_eq!(held.len(), 10, "readers never saw them go");
    assert!(matches!(events.next().await, Some(Event::Protected { held: 5, .. })));
    let believed = watcher.next().await.unwrap();
    assert_eq!((believed.len(), believed.freshness()), (5, Freshness::Live));
    assert_eq!(since.elapsed().as_secs(), HELD.as_secs());
}

#[tokio::test(start_paused = true)]
async fn less_than_half_is_believed_at_once() {
    let (_registry, _director, feed, mut watcher) = reader_of_ten().await;
    feed.send(2, (0..4).map(|id| gone(&format!("i{id}"), Departure::Unknown)).collect());
    let next = watcher.next().await.unwrap();
    assert_eq!((next.len(), next.freshness()), (6, Freshness::Live));
}

#[tokio::test(start_paused = true)]
async fn losses_one_by_one_are_put_back_when_together_they_reach_the_threshold() {
    let (_registry, _director, feed, mut watcher) = reader_of_ten().await;
    for id in 0..4 {
        feed.send(2 + id, vec![gone(&format!("i{id}"), Departure::Unknown)]);
        sleep(SECOND).await;
    }
    assert_eq!(watcher.current().len(), 6, "believed one by one");
    feed.send(9, vec![gone("i4", Departure::Unknown)]);
    let seen = until(&mut watcher, SECOND, |s| matches!(s.freshness(), Freshness::Protected { .. })).await;
    assert_eq!(seen.last().unwrap().len(), 10, "put back");
    // Each is held from its own loss on.
    sleep(HELD - Duration::from_millis(4500)).await;
    assert_eq!(watcher.current().len(), 10);
    sleep(SECOND).await;
    assert_eq!(watcher.current().len(), 9);
    sleep(SECOND * 5).await;
    assert_eq!((watcher.current().len(), watcher.current().freshness()), (5, Freshness::Live));
}

#[tokio::test(start_paused = true)]
async fn losses_further_apart_than_the_window_are_believed_one_by_one() {
    let (_registry, _director, feed, mut watcher) = reader(&["a", "b", "c", "d"]).await;
    for (at, id) in ["a", "b", "c", "d"].iter().enumerate() {
        feed.send(2 + at as u64, vec![gone(id, Departure::Unknown)]);
        let next = watcher.next().await.unwrap();
        assert_eq!((next.len(), next.freshness()), (3 - at, Freshness::Live));
        sleep(TTL / 3 + SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn marked_departures_are_believed_at_once_however_many() {
    let (_registry, _director, feed, mut watcher) = reader_of_ten().await;
    feed.send(2, ten().iter().map(|id| gone(id, Departure::Left)).collect());
    let next = watcher.next().await.unwrap();
    assert_eq!((next.len(), next.freshness()), (0, Freshness::Live));
}

#[tokio::test(start_paused = true)]
async fn a_marked_departure_ends_the_hold() {
    let (_registry, _director, feed, mut watcher) = reader(&["a", "b"]).await;
    feed.send(2, vec![gone("a", Departure::Unknown), gone("b", Departure::Unknown)]);
    assert_eq!(watcher.next().await.unwrap().len(), 2);
    feed.send(3, vec![gone("a", Departure::Left)]);
    assert_eq!(ids(&watcher.next().await.unwrap()), ["b"]);
}

#[tokio::test(start_paused = true)]
async fn what_was_held_and_comes_back_never_went() {
    let (_registry, _director, feed, mut watcher) = reader(&["a", "b"]).await;
    let before = watcher.current().clone();
    feed.send(2, vec![gone("a", Departure::Unknown), gone("b", Departure::Unknown)]);
    sleep(SECOND).await;
    feed.send(3, vec![upsert("a"), upsert("b")]);
    let seen = until(&mut watcher, SECOND, |s| s.freshness() == Freshness::Live).await;
    assert!(seen.iter().all(|snapshot| snapshot.changes_since(&before).is_empty()), "{seen:?}");
    sleep(HELD * 2).await;
    assert_eq!(watcher.current().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_reset_without_half_of_the_service_holds_it_unless_it_left() {
    let (_registry, director, feed, mut watcher) = reader(&["a", "b", "c", "d"]).await;
    feed.fail();
    let feed = director.subscription();
    feed.send(9, vec![reset(&["a"], &["d"], false)]);
    let seen = until(&mut watcher, TTL, |s| matches!(s.freshness(), Freshness::Protected { .. })).await;
    assert_eq!(ids(seen.last().unwrap()), ["a", "b", "c"]);
}

#[tokio::test(start_paused = true)]
async fn another_history_holds_even_a_single_missing_instance() {
    let (_registry, director, feed, mut watcher) = reader_of_ten().await;
    feed.fail();
    let nine = ten();
    let nine: Vec<&str> = nine.iter().skip(1).map(String::as_str).collect();
    let feed = director.subscription();
    feed.send(1, vec![reset(&nine, &[], true)]);
    let seen = until(&mut watcher, TTL, |s| matches!(s.freshness(), Freshness::Protected { .. })).await;
    assert_eq!(seen.last().unwrap().len(), 10);
    let seen = until(&mut watcher, HELD + SECOND, |s| s.freshness() == Freshness::Live).await;
    assert_eq!(seen.last().unwrap().len(), 9);
}

#[tokio::test(start_paused = true)]
async fn protection_can_be_switched_off() {
    let (_registry, _director, feed, mut watcher) =
        reader_with(&["a", "b"], Options::default().protect_for(Duration::ZERO)).await;
    feed.send(2, vec![gone("a", Departure::Unknown), gone("b", Departure::Unknown)]);
    let next = watcher.next().await.unwrap();
    assert_eq!((next.len(), next.freshness()), (0, Freshness::Live));
}

#[tokio::test(start_paused = true)]
async fn five_hundred_removals_are_one_update() {
    let ids: Vec<String> = (0..500).map(|id| format!("{id:03}")).collect();
    let (_registry, _director, feed, mut watcher) = reader_with(
        &ids.iter().map(String::as_str).collect::<Vec<_>>(),
        Options::default().protect_for(Duration::ZERO),
    )
    .await;
    let before = watcher.current().revision();
    feed.send(2, ids.iter().map(|id| gone(id, Departure::Unknown)).collect());
    let next = watcher.next().await.unwrap();
    assert_eq!((next.len(), next.revision()), (0, before + 1));
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_ready_updates_are_few_snapshots() {
    let (_registry, _director, feed, mut watcher) = reader(&[]).await;
    let before = watcher.current().revision();
    (0..10_000).for_each(|id| feed.send(id + 2, vec![upsert(&format!("{id:05}"))]));
    until(&mut watcher, SECOND, |snapshot| snapshot.len() == 10_000).await;
    let published = watcher.current().revision() - before;
    assert!(published <= 20, "{published} snapshots");
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_the_latest_and_delays_nobody() {
    let (registry, _director, feed, mut slow) = reader(&[]).await;
    let mut quick = registry.watch("orders").await.unwrap();
    for id in 0..1000 {
        feed.send(id + 2, vec![upsert(&format!("{id:04}"))]);
        until(&mut quick, SECOND, |snapshot| snapshot.len() as u64 == id + 1).await;
    }
    assert_eq!(slow.next().await.unwrap().len(), 1000, "the latest, not the oldest");
    quiet(&mut slow, SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn overrides_are_merged_and_survive_the_instance() {
    let (_registry, _director, feed, mut watcher) = reader(&["a", "b"]).await;
    let mut set = Override::default();
    (set.status, set.weight) = (Some(Status::Down), Some(0));
    feed.send(2, vec![Update::Upsert(overridden("a", set))]);
    let next = watcher.next().await.unwrap();
    assert_eq!((next.get("a").unwrap().status, next.available().count()), (Status::Down, 1));
    feed.send(3, vec![gone("a", Departure::Left)]);
    watcher.next().await.unwrap();
    feed.send(4, vec![upsert("a")]);
    assert_eq!(watcher.next().await.unwrap().get("a").unwrap().weight, 0, "still overridden");
    let key = overridden("a", set).key;
    feed.send(5, vec![Update::Remove { key, cause: Departure::Unknown }]);
    assert_eq!(watcher.next().await.unwrap().available().count(), 2);
}

#[tokio::test(start_paused = true)]
async fn discover_without_a_complete_set_is_an_error_and_never_empty() {
    let (registry, director) = Script::registry(Options::default());
    let error = registry.discover("orders").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let mut watcher = registry.watch("orders").await.unwrap();
    assert_eq!(watcher.current().freshness(), Freshness::Pending);
    let feed = director.subscription();
    feed.reset(1, &["a"]);
    let first = tokio::time::timeout(TTL, watcher.next()).await.unwrap().unwrap();
    assert_eq!(ids(&first), ["a"], "following went on");
    assert_eq!(registry.discover("orders").await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_fatal_is_told_at_once_and_asked_again_rarely() {
    let (registry, director) = Script::registry(Options::default());
    (0..100).for_each(|_| director.refuse(Error::new(ErrorKind::PermissionDenied, "no")));
    let began = Instant::now();
    assert_eq!(registry.watch("orders").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert!(began.elapsed() < SECOND / 10, "{:?}", began.elapsed());
    assert_eq!(registry.discover("orders").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    sleep(Duration::from_secs(600)).await;
    let asked = director.resumed_from().len();
    assert!((20..=90).contains(&asked), "{asked} times in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn what_was_fatal_is_asked_again_when_somebody_asks() {
    let (registry, director) = Script::registry(Options::default());
    director.refuse(Error::new(ErrorKind::PermissionDenied, "no"));
    assert_eq!(registry.watch("orders").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    director.refuse(Error::new(ErrorKind::PermissionDenied, "still no"));
    let again = registry.discover("orders").await.unwrap_err();
    assert_eq!((again.kind(), again.to_string()), (ErrorKind::PermissionDenied, "still no".into()));
    let feed = director.subscription();
    feed.reset(1, &["a"]);
    let began = Instant::now();
    assert_eq!(registry.discover("orders").await.unwrap().len(), 1, "the permission was granted meanwhile");
    assert!(began.elapsed() <= SECOND, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_change_that_the_stream_missed_is_found_by_the_slow_check() {
    let (_registry, director, feed, mut watcher) = reader(&["a"]).await;
    *director.changed.lock().unwrap() = true;
    let again = director.subscription();
    again.reset(9, &["a", "b"]);
    let seen = until(&mut watcher, Duration::from_secs(30 + 12), |s| s.len() == 2).await;
    assert!(seen.iter().all(|snapshot| snapshot.freshness() == Freshness::Live), "readers need not know");
    assert_eq!(director.resumed_from().last(), Some(&None), "read anew");
    drop((feed, again));
}

#[tokio::test(start_paused = true)]
async fn a_doubt_is_cleared_up_at_once_and_no_more_often_than_at_its_pace() {
    let unchecked = Options::default().reconcile(Duration::from_secs(3600));
    let (_registry, director, feed, mut watcher) = reader_with(&["a"], unchecked).await;
    let doubting = watcher.handle();
    let probes = || director.probes.load(Ordering::Relaxed);
    let start = Instant::now();
    // Nothing is amiss: many doubts in a minute are a question every five seconds.
    while start.elapsed() < 20 * SECOND {
        doubting.doubt();
        sleep(Duration::from_millis(10)).await;
    }
    assert!((3..=5).contains(&probes()), "{} questions", probes());
    sleep(20 * SECOND).await;
    assert!((3..=6).contains(&probes()), "{} questions", probes());
    *director.changed.lock().unwrap() = true;
    let again = director.subscription();
    again.reset(9, &["a", "b"]);
    doubting.doubt();
    until(&mut watcher, SECOND + Options::default().request_timeout, |s| s.len() == 2).await;
    drop((feed, again));
}

#[tokio::test(start_paused = true)]
async fn a_check_that_finds_what_the_stream_then_brings_changes_nothing() {
    let (_registry, director, feed, mut watcher) = reader(&["a"]).await;
    *director.changed.lock().unwrap() = true;
    for at in 2..200 {
        sleep(SECOND).await;
        feed.send(at, vec![upsert(&format!("{at}"))]);
    }
    until(&mut watcher, SECOND, |s| s.len() == 199).await;
    assert_eq!(director.resumed_from().len(), 1, "one subscription all along");
}

#[tokio::test(start_paused = true)]
async fn everything_is_read_anew_every_ten_minutes() {
    let (_registry, director, _feed, mut watcher) = reader(&["a"]).await;
    let feed = director.subscription();
    feed.reset(2, &["a", "missed"]);
    let began = Instant::now();
    until(&mut watcher, Duration::from_secs(800), |s| s.len() == 2).await;
    assert!(began.elapsed() >= Duration::from_secs(600), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_takes_longer_than_a_call_may_is_given_more_time_at_each_attempt() {
    let options = Options::default().request_timeout(SECOND);
    let (_registry, director, feed, mut watcher) = reader_with(&["a"], options).await;
    *director.slow.lock().unwrap() = 5 * SECOND;
    let next = director.subscription();
    next.reset(2, &["a", "b"]);
    feed.fail();
    let back = |snapshot: &Snapshot| snapshot.freshness() == Freshness::Live && snapshot.len() == 2;
    until(&mut watcher, TTL * 2, back).await;

    // What is silent for ever is asked again all the same, and begins with little once more: it was good for long enough.
    sleep(5 * SECOND).await;
    *director.slow.lock().unwrap() = 24 * 60 * 60 * SECOND;
    let before = director.resumed_from().len();
    next.fail();
    sleep(4 * SECOND).await;
    assert!(director.resumed_from().len() >= before + 2, "{:?}", director.resumed_from());
    let before = director.resumed_from().len();
    sleep(60 * SECOND).await;
    assert!(director.resumed_from().len() >= before + 4, "{:?}", director.resumed_from());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_fails_again_and_again_is_not_hammered() {
    let (_registry, director, feed, watcher) = reader(&["a"]).await;
    feed.fail();
    for at in 0..1000 {
        let feed = director.subscription();
        feed.reset(at, &["a"]);
        feed.fail();
    }
    sleep(Duration::from_secs(600)).await;
    let asked = director.resumed_from().len();
    assert!((100..600).contains(&asked), "{asked} subscriptions in ten minutes");
    assert_eq!(watcher.current().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_first_item_that_is_not_complete_is_refused() {
    let (registry, director) = Script::registry(Options::default());
    let feed = director.subscription();
    feed.send(1, vec![upsert("a")]);
    assert_eq!(registry.watch("orders").await.unwrap_err().kind(), ErrorKind::Malformed);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_nobody_reads_is_dropped_and_can_be_followed_again() {
    let store = MemoryStore::new();
    let process = Process::with(&store, Options::default().idle_timeout(Duration::from_secs(60)));
    let watcher = process.watch("orders").await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(store.watchers(), 1, "a watcher keeps it");
    let handle = watcher.handle();
    drop(watcher);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(store.watchers(), 1, "a handle keeps it");
    drop(handle);
    for _ in 0..10 {
        sleep(Duration::from_secs(50)).await;
        process.registry.discover("orders").await.unwrap();
    }
    assert_eq!(store.watchers(), 1, "looking keeps it");
    sleep(Duration::from_secs(121)).await;
    assert_eq!(store.watchers(), 0);
    assert!(process.registry.discover("orders").await.unwrap().is_empty());
    assert_eq!(store.watchers(), 1);
}

#[tokio::test(start_paused = true)]
async fn all_readers_of_a_service_share_one_subscription() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    let watchers = futures::future::join_all((0..100).map(|_| process.watch("orders"))).await;
    assert_eq!((watchers.len(), store.watchers(), process.log.count("subscribe")), (100, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_crash_of_one_is_gone_within_the_ttl_and_a_second() {
    let store = MemoryStore::new();
    let (provider, reader) = (Process::start(&store), Process::start(&store));
    provider.register("orders", "1").await;
    let mut watcher = reader.watch("orders").await;
    watcher.next().await.unwrap();
    provider.crash();
    until(&mut watcher, TTL + SECOND, |snapshot| snapshot.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_wipe_never_shows_readers_less_than_there_is() {
    let store = MemoryStore::new();
    let (provider, reader) = (Process::start(&store), Process::start(&store));
    provider.register_many("orders", 0..10).await;
    let mut watcher = reader.watch("orders").await;
    watcher.next().await.unwrap();
    for _ in 0..5 {
        store.wipe();
        let seen = until(&mut watcher, TTL, |s| s.freshness() == Freshness::Live).await;
        assert!(seen.iter().all(|snapshot| snapshot.len() == 10), "{seen:?}");
        sleep(TTL).await;
        assert_eq!(watcher.current().len(), 10);
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_leaves_with_twenty_is_believed_and_one_that_crashes_with_twenty_is_held() {
    for graceful in [true, false] {
        let store = MemoryStore::new();
        let (big, small, reader) = (Process::start(&store), Process::start(&store), Process::start(&store));
        big.register_many("orders", 0..20).await;
        small.register_many("orders", 20..25).await;
        let mut watcher = reader.watch("orders").await;
        watcher.next().await.unwrap();
        if graceful {
            big.registry.destroy().await.unwrap();
            let next = watcher.next().await.unwrap();
            assert_eq!((next.len(), next.freshness()), (5, Freshness::Live));
        } else {
            big.crash();
            until(&mut watcher, TTL + SECOND, |s| matches!(s.freshness(), Freshness::Protected { .. })).await;
            let held = Instant::now();
            assert_eq!(watcher.current().len(), 25);
            let seen = until(&mut watcher, HELD + SECOND, |s| s.freshness() == Freshness::Live).await;
            assert_eq!((seen.last().unwrap().len(), held.elapsed().as_secs()), (5, HELD.as_secs()));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn changes_come_one_by_one_with_before_and_after() {
    let (_registry, _director, feed, watcher) = reader(&["a"]).await;
    let mut changes = watcher.changes();
    assert!(matches!(changes.next().await, Some(Change::Insert { after }) if after.id.as_str() == "a"));
    let mut heavier = Instance::builder("orders", "a").build().unwrap();
    heavier.weight = 200;
    feed.send(2, vec![upsert("b")]);
    assert!(matches!(changes.next().await, Some(Change::Insert { after }) if after.id.as_str() == "b"));
    feed.send(3, vec![Update::Upsert(of(heavier))]);
    let update = changes.next().await.unwrap();
    assert_eq!((update.before().unwrap().weight, update.after().unwrap().weight), (100, 200));
    feed.send(4, vec![gone("b", Departure::Left)]);
    assert!(matches!(changes.next().await, Some(Change::Remove { before }) if before.id.as_str() == "b"));
    assert!(changes.next().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_record_of_another_kind_is_ignored() {
    let (_registry, _director, feed, mut watcher) = reader(&["a"]).await;
    let mut odd = script::record("b");
    odd.content = Content::Override(Override::default());
    feed.send(2, vec![Update::Upsert(odd)]);
    quiet(&mut watcher, SECOND).await;
}

#[test]
fn a_registry_whose_runtime_is_gone_neither_panics_nor_hangs() {
    let store = MemoryStore::new();
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let options = Options::default().request_timeout(Duration::from_millis(200));
    let (process, mut watcher) = first.block_on(async {
        let process = Process::with(&store, options);
        process.register("orders", "1").await;
        let watcher = process.watch("orders").await;
        (process, watcher)
    });
    drop(first);
    let second = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    second.block_on(async {
        while let Some(snapshot) = watcher.next().await {
            assert_eq!(snapshot.len(), 1);
        }
        process.registry.register(instance("orders", "2")).await.unwrap_err();
        process.registry.heartbeat().await.unwrap_err();
        process.registry.destroy().await.unwrap_err();
    });
}

#[tokio::test(start_paused = true)]
async fn a_fatal_cause_is_told_also_when_asking_anew_takes_longer_than_a_call_may() {
    let (registry, director) = Script::registry(Options::default().request_timeout(Duration::from_millis(500)));
    (0..100).for_each(|_| director.refuse(Error::new(ErrorKind::PermissionDenied, "no")));
    for _ in 0..5 {
        assert_eq!(registry.discover("orders").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert_eq!(registry.watch("orders").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}

#[tokio::test(start_paused = true)]
async fn a_short_protection_publishes_nothing_when_nothing_changes() {
    let options = Options::default().protect_for(SECOND);
    let (_registry, _director, feed, mut watcher) = reader_with(&["a", "b", "c"], options).await;
    feed.send(2, vec![gone("a", Departure::Unknown), gone("b", Departure::Unknown)]);
    until(&mut watcher, SECOND * 2, |s| s.len() == 1).await;
    for at in 3..10 {
        feed.send(at, vec![]);
        quiet(&mut watcher, SECOND / 10).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_panics_once_does_not_freeze_the_view() {
    let (_registry, director, feed, mut watcher) = reader(&["a"]).await;
    feed.panic();
    let feed = director.subscription();
    feed.reset(2, &["a", "b"]);
    let seen = until(&mut watcher, TTL, |s| s.len() == 2).await;
    assert!(seen.iter().any(|s| matches!(s.freshness(), Freshness::Stale { .. })), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_ones_own_registry_is_no_outage() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "a").await;
    let watcher = process.registry.watch("orders").await.unwrap();
    let seen = tokio::spawn(watcher.snapshots().collect::<Vec<_>>());
    let mut events = process.registry.events();
    // The connection is closed while the registry still waits for the store.
    process.link.delay(SECOND);
    let destroy = process.registry.destroy();
    let cut = async {
        sleep(SECOND / 2).await;
        process.link.cut();
    };
    let (outcome, ()) = tokio::join!(destroy, cut);
    assert!(outcome.is_err(), "the store never answered");
    let seen = seen.await.unwrap();
    assert!(!seen.is_empty() && seen.iter().all(|one| one.freshness() == Freshness::Live), "{seen:?}");
    while let Some(event) = events.next().await {
        assert!(!matches!(event, Event::Stale { .. }), "{event:?}");
    }
}
