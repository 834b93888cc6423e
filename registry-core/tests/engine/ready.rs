//! Waiting until what a process needs is there.

use std::{error::Error as _, time::Duration};

use registry_core::{ErrorKind, Freshness, Options, Override, Registry, Status, memory::MemoryStore};
use tokio::time::{Instant, sleep};

use super::{script::Script, *};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn refused() -> Error {
    Error::new(ErrorKind::Unavailable, "connection refused")
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_served_when_enough_are_available() {
    let store = MemoryStore::new();
    let (provider, reader) = (Process::start(&store), Process::start(&store));
    let coming = async {
        provider.register("orders", "1").await;
        // Neither of these takes traffic yet.
        let mut starting = instance("orders", "2");
        starting.status = Status::Starting;
        provider.registry.register(starting).await.unwrap();
        provider.registry.set_override("orders", "3", Override::default().weight(0)).await.unwrap();
        provider.register("orders", "3").await;
        sleep(SECOND * 10).await;
        provider.registry.set_status("orders", "2", Status::Up).await.unwrap();
        Instant::now()
    };
    let waiting = async { (reader.registry.wait_for("orders", 2, MINUTE).await, Instant::now()) };
    let (came_at, (served, served_at)) = tokio::join!(coming, waiting);
    let served = served.unwrap();
    assert_eq!((served.len(), served.available().count(), served.freshness()), (3, 2, Freshness::Live));
    assert!(served_at.duration_since(came_at) < SECOND / 10);
}

#[tokio::test(start_paused = true)]
async fn too_few_are_an_error_that_says_how_many_there_were() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.register("orders", "2").await;
    process.registry.set_weight("orders", "2", 0).await.unwrap();
    let began = Instant::now();
    let error = process.registry.wait_for("orders", 2, SECOND * 30).await.unwrap_err();
    assert_eq!(began.elapsed().as_secs(), 30);
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(error.to_string(), "orders has 1 of 2 available instances after 30s (2 in all, live)");
    assert!(error.source().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_read_is_another_error_that_says_why() {
    let (registry, director) = Script::registry(Options::default());
    (0..100).for_each(|_| director.refuse(refused()));
    let error = registry.wait_for("orders", 1, MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(error.to_string(), "orders has 0 of 1 available instances after 60s (0 in all, pending)");
    assert_eq!(error.source().map(ToString::to_string), Some("connection refused".into()));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_stale_counts_as_it_was_last_seen() {
    let (registry, director) = Script::registry(Options::default());
    let feed = director.subscription();
    feed.reset(1, &["a", "b"]);
    let mut watcher = registry.watch("orders").await.unwrap();
    feed.fail();
    until(&mut watcher, SECOND, |seen| matches!(seen.freshness(), Freshness::Stale { .. })).await;
    let served = registry.wait_for("orders", 2, MINUTE).await.unwrap();
    assert!(matches!(served.freshness(), Freshness::Stale { .. }));
    (0..100).for_each(|_| director.refuse(refused()));
    let error = registry.wait_for("orders", 3, MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(error.to_string(), "orders has 2 of 3 available instances after 60s (2 in all, stale)");
    assert!(error.source().is_some());
}

#[tokio::test(start_paused = true)]
async fn who_waits_from_before_the_store_is_up_is_served_once_it_is() {
    let store = MemoryStore::new();
    let (provider, reader) = (Process::start(&store), Process::start(&store));
    provider.register("orders", "1").await;
    reader.link.cut();
    let (served, ()) = tokio::join!(reader.registry.wait_for("orders", 1, MINUTE), async {
        sleep(SECOND * 40).await;
        reader.link.heal();
    });
    assert_eq!(ids(&served.unwrap()), ["1"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_fatal_ends_the_wait_at_once_also_when_it_comes_late() {
    let (registry, director) = Script::registry(Options::default());
    director.refuse(refused());
    director.refuse(denied());
    let began = Instant::now();
    let error = registry.wait_for("orders", 1, MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    // It may have been mended: asked for anew, and then believed.
    director.refuse(denied());
    let error = registry.require(&[("orders", 1), ("payments", 1)], MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(began.elapsed() < SECOND * 3, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn waiting_for_none_waits_for_the_first_complete_set() {
    let (registry, director) = Script::registry(Options::default());
    let (served, _feed) = tokio::join!(registry.wait_for("orders", 0, MINUTE), async {
        sleep(SECOND * 3).await;
        let feed = director.subscription();
        feed.reset(1, &[]);
        feed
    });
    assert_eq!(served.unwrap().freshness(), Freshness::Live);
}

#[tokio::test(start_paused = true)]
async fn waiting_for_ever_ends_with_the_registry() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    let (waited, destroyed) = tokio::join!(process.registry.wait_for("orders", 1, Duration::MAX), async {
        sleep(SECOND).await;
        process.registry.destroy().await
    });
    destroyed.unwrap();
    assert_eq!(waited.unwrap_err().kind(), ErrorKind::Closed);
    let error = process.registry.require(&[("orders", 1)], MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn required_services_are_waited_for_together_and_given_in_order() {
    let store = MemoryStore::new();
    let (provider, (reader, _link)) = (Process::start(&store), dynamic(Process::start(&store)));
    let needed = [("payments", 2), ("orders", 1), ("stock", 0)];
    let began = Instant::now();
    let (ready, ()) = tokio::join!(reader.require(&needed, SECOND * 20), async {
        sleep(SECOND * 10).await;
        provider.register_many("payments", 0..2).await;
        sleep(SECOND * 5).await;
        provider.register("orders", "1").await;
    });
    let ready: Vec<_> = ready.unwrap().iter().map(|seen| (seen.service().to_string(), seen.len())).collect();
    assert_eq!(ready, [("payments".into(), 2), ("orders".into(), 1), ("stock".into(), 0)]);
    assert_eq!(began.elapsed().as_secs(), 15);
    assert!(reader.require(&[], SECOND).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn every_required_service_that_is_missing_is_named() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let needed = [("payments", 2), ("orders", 1), ("stock", 1)];
    let began = Instant::now();
    let error = process.registry.require(&needed, SECOND * 20).await.unwrap_err();
    assert_eq!(began.elapsed().as_secs(), 20);
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let expected = "2 of 3 required services are not ready: \
        payments has 0 of 2 available instances after 20s (0 in all, live); \
        stock has 0 of 1 available instances after 20s (0 in all, live)";
    assert_eq!(error.to_string(), expected);

    process.link.cut();
    let error = process.registry.require(&[("orders", 1), ("unread", 1)], SECOND * 20).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let said = error.to_string();
    let expected =
        "1 of 2 required services are not ready: unread has 0 of 1 available instances after 20s (0 in all, pending): ";
    assert!(said.starts_with(expected) && said.len() > expected.len(), "the cause is not said: {said}");
}

#[tokio::test(start_paused = true)]
async fn health_tells_registrations_by_state_and_every_view() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    assert!(process.registry.health().is_ok());
    for id in ["1", "2"] {
        process.register("orders", id).await;
    }
    process.registry.set_status("orders", "2", Status::Down).await.unwrap();
    process.registry.wait_for("orders", 1, MINUTE).await.unwrap();
    process.registry.discover("payments").await.unwrap();
    let health = process.registry.health();
    assert!(health.is_ok());
    let all = "2 registered, 0 pending, 0 lost; orders: 1 of 2 available (live); payments: 0 of 0 available (live)";
    assert_eq!(health.to_string(), all);

    process.link.cut();
    drop(process.registry.register(instance("orders", "3")).await.unwrap_err());
    sleep(TTL * 2).await;
    let health = process.registry.health();
    assert!(!health.is_ok());
    let cut = "0 registered, 1 pending, 2 lost; orders: 1 of 2 available (stale); payments: 0 of 0 available (stale)";
    assert_eq!(health.to_string(), cut);
    process.link.heal();
    sleep(TTL).await;
    assert!(process.registry.health().is_ok(), "{}", process.registry.health());
    process.registry.destroy().await.unwrap();
    assert!(process.registry.health().closed && !process.registry.health().is_ok());
}
