//! Operators' overrides: set by anyone, kept by nobody, and cleaned up by readers.

use std::time::Duration;

use futures::future::join_all;
use registry_core::{ErrorKind, Freshness, Options, Override, Registry, Status, memory::MemoryStore};
use tokio::time::{Instant, sleep};

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// A day, and what readers add to it so that they do not all remove the same.
const DAY_AT_LEAST: Duration = Duration::from_secs(24 * 3600);
const DAY_AT_MOST: Duration = Duration::from_secs(25 * 3600 + 1);

/// A process that beats as rarely as it may: these tests last for days.
fn calm(store: &MemoryStore) -> Process {
    Process::with(store, Options::default().ttl(HOUR).reconcile(HOUR))
}

async fn set(process: &Process, id: &str) {
    process.registry.set_override("orders", id, Override::default().weight(0)).await.unwrap();
}

/// The ids that are overridden, as the store has them.
fn overridden(store: &MemoryStore) -> Vec<String> {
    let paths = store.paths().into_iter();
    paths.filter_map(|path| path.strip_prefix("orders/overrides/").map(ToOwned::to_owned)).collect()
}

#[tokio::test(start_paused = true)]
async fn an_override_needs_no_ownership_and_outlives_its_operator() {
    let store = MemoryStore::new();
    let (provider, operator, reader) = (Process::start(&store), Process::start(&store), Process::start(&store));
    provider.register("orders", "1").await;
    let mut watcher = reader.watch("orders").await;
    set(&operator, "1").await;
    until(&mut watcher, SECOND, |seen| seen.available().count() == 0).await;
    operator.registry.destroy().await.unwrap();
    quiet(&mut watcher, TTL * 10).await;
    assert_eq!(overridden(&store), ["1"]);
    assert!(reader.registry.clear_override("orders", "1").await.unwrap(), "anyone may clear it");
    until(&mut watcher, SECOND, |seen| seen.available().count() == 1).await;
    assert!(!reader.registry.clear_override("orders", "1").await.unwrap(), "there is none");
}

#[tokio::test(start_paused = true)]
async fn overrides_are_listed_by_id_and_the_last_one_counts() {
    let store = MemoryStore::new();
    let (one, other) = (Process::start(&store), Process::start(&store));
    set(&one, "b").await;
    set(&one, "a").await;
    let down = Override::default().status(Status::Down);
    other.registry.set_override("orders", "b", down).await.unwrap();
    let listed = one.registry.overrides("orders").await.unwrap();
    let listed: Vec<_> = listed.iter().map(|(id, set)| (id.as_str(), *set)).collect();
    assert_eq!(listed, [("a", Override::default().weight(0)), ("b", down)]);
}

#[tokio::test(start_paused = true)]
async fn an_override_that_sets_nothing_is_refused_before_it_is_sent() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    let refused = [
        process.registry.set_override("orders", "1", Override::default()).await.unwrap_err(),
        process.registry.set_override("", "1", Override::default().weight(0)).await.unwrap_err(),
        process.registry.clear_override("orders", "").await.unwrap_err(),
        process.registry.overrides("").await.unwrap_err(),
    ];
    assert!(refused.iter().all(|error| error.kind() == ErrorKind::InvalidInput), "{refused:?}");
    assert!(refused[0].to_string().contains("expected a status, a weight or both"), "{}", refused[0]);
    assert_eq!(process.log.all(), 0, "the store was not asked");
}

#[tokio::test(start_paused = true)]
async fn what_the_store_refuses_is_told_and_not_tried_again() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.deny(Some(denied()));
    let error = process.registry.set_override("orders", "1", Override::default().weight(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert_eq!(process.registry.clear_override("orders", "1").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    process.link.deny(None);
    process.link.cut();
    let error = process.registry.set_override("orders", "1", Override::default().weight(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    process.link.heal();
    sleep(TTL * 10).await;
    assert!(overridden(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn overrides_are_written_one_after_the_other() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.delay(SECOND);
    let began = Instant::now();
    let sets = (1..=3).map(|weight| Override::default().weight(weight));
    let written = join_all(sets.map(|set| process.registry.set_override("orders", "1", set))).await;
    assert!(written.iter().all(Result::is_ok), "{written:?}");
    assert!(began.elapsed() >= SECOND * 3, "two writes of one key were under way: {:?}", began.elapsed());
    let last = process.registry.overrides("orders").await.unwrap()[0].1;
    assert_eq!(last.weight, Some(3));
}

#[tokio::test(start_paused = true)]
async fn an_override_of_an_absent_instance_publishes_nothing() {
    let store = MemoryStore::new();
    let (operator, reader) = (Process::start(&store), Process::start(&store));
    let mut watcher = reader.watch("orders").await;
    watcher.next().await.unwrap();
    set(&operator, "1").await;
    quiet(&mut watcher, SECOND).await;
    operator.register("orders", "1").await;
    let seen = until(&mut watcher, SECOND, |seen| seen.len() == 1).await;
    assert_eq!(seen.last().unwrap().get("1").unwrap().weight, 0);
}

#[tokio::test(start_paused = true)]
async fn an_override_whose_instance_has_been_gone_for_a_day_is_removed() {
    let store = MemoryStore::new();
    let (provider, operator, reader) = (calm(&store), calm(&store), calm(&store));
    provider.register("orders", "here").await;
    let _watcher = reader.watch("orders").await;
    set(&operator, "here").await;
    set(&operator, "gone").await;
    sleep(DAY_AT_LEAST - SECOND).await;
    assert_eq!(overridden(&store), ["gone", "here"]);
    sleep(DAY_AT_MOST - DAY_AT_LEAST + SECOND).await;
    assert_eq!(overridden(&store), ["here"]);
    assert_eq!(reader.log.count("remove"), 1);
    // From now on it is that one's turn.
    provider.registry.unregister("orders", "here").await.unwrap();
    sleep(DAY_AT_MOST).await;
    assert!(overridden(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_day_begins_anew_when_the_view_was_stale() {
    let store = MemoryStore::new();
    let (operator, reader) = (calm(&store), calm(&store));
    let mut watcher = reader.watch("orders").await;
    set(&operator, "1").await;
    sleep(HOUR * 20).await;
    reader.link.cut();
    until(&mut watcher, SECOND, |seen| matches!(seen.freshness(), Freshness::Stale { .. })).await;
    reader.link.heal();
    until(&mut watcher, TTL, |seen| seen.freshness() == Freshness::Live).await;
    sleep(DAY_AT_LEAST - SECOND).await;
    assert_eq!(overridden(&store), ["1"]);
    sleep(DAY_AT_MOST - DAY_AT_LEAST + SECOND).await;
    assert!(overridden(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_day_begins_anew_when_the_instance_was_there_or_the_override_is_set_again() {
    let store = MemoryStore::new();
    let (provider, operator, reader) = (calm(&store), calm(&store), calm(&store));
    let _watcher = reader.watch("orders").await;
    set(&operator, "came").await;
    set(&operator, "meant").await;
    sleep(HOUR * 20).await;
    provider.register("orders", "came").await;
    provider.registry.unregister("orders", "came").await.unwrap();
    set(&operator, "meant").await;
    sleep(DAY_AT_LEAST - SECOND).await;
    assert_eq!(overridden(&store), ["came", "meant"]);
    sleep(DAY_AT_MOST - DAY_AT_LEAST + SECOND).await;
    assert!(overridden(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_may_not_remove_an_override_tries_rarely() {
    let store = MemoryStore::new();
    let (operator, reader) = (calm(&store), calm(&store));
    let watcher = reader.watch("orders").await;
    set(&operator, "1").await;
    reader.log.refuse_removals(Some(denied()));
    sleep(DAY_AT_MOST + HOUR * 9).await;
    let tried = reader.log.count("remove");
    assert!((9..=11).contains(&tried), "{tried} times in ten hours");
    assert_eq!(watcher.current().freshness(), Freshness::Live, "its view is none the worse");
    reader.log.refuse_removals(None);
    sleep(HOUR + SECOND).await;
    assert!(overridden(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn of_many_readers_the_first_removes_an_override() {
    let store = MemoryStore::new();
    let operator = calm(&store);
    let readers: Vec<_> = (0..20).map(|_| calm(&store)).collect();
    let _watchers = join_all(readers.iter().map(|reader| reader.watch("orders"))).await;
    set(&operator, "1").await;
    sleep(DAY_AT_MOST).await;
    assert!(overridden(&store).is_empty());
    let asked: usize = readers.iter().map(|reader| reader.log.count("remove")).sum();
    assert_eq!(asked, 1);
}
