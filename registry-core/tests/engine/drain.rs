//! Changing and draining what is registered, one key at a time.

use std::time::Duration;

use futures::{FutureExt, future::join_all};
use registry_core::{ErrorKind, Key, Registry, Status, memory::MemoryStore, shutdown};
use tokio::time::{Instant, sleep};

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_secs(20);

fn key(id: &str) -> Key {
    Key::provider("orders".parse().unwrap(), id.parse().unwrap())
}

impl Process {
    async fn drain(&self, grace: Duration) -> registry_core::Result<bool> {
        self.registry.drain("orders", "1", grace).await
    }

    async fn set_status(&self, status: Status) {
        self.registry.set_status("orders", "1", status).await.unwrap();
    }

    /// What is wanted of the only registration.
    fn wanted(&self) -> (Status, u32) {
        let registrations = self.registry.registrations();
        let [only] = &registrations[..] else { panic!("{registrations:?}") };
        (only.instance.status, only.instance.weight)
    }
}

#[tokio::test(start_paused = true)]
async fn status_and_weight_that_are_set_at_once_lose_neither() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let registry = &process.registry;
    let statuses = join_all((0..100).map(|round| {
        let status = if round % 2 == 0 { Status::Down } else { Status::Starting };
        registry.set_status("orders", "1", status)
    }));
    let weights = join_all((1..=100).map(|weight| registry.set_weight("orders", "1", weight)));
    let (statuses, weights) = tokio::join!(statuses, weights);
    assert!(statuses.iter().chain(&weights).all(Result::is_ok));
    assert_eq!(process.wanted(), (Status::Starting, 100));
    let found = registry.discover("orders").await.unwrap();
    assert_eq!((found.instances()[0].status, found.instances()[0].weight), (Status::Starting, 100));
}

#[tokio::test(start_paused = true)]
async fn what_is_set_in_an_outage_is_in_force_after_it() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let registered_at = process.registry.registrations()[0].instance.registered_at;
    process.link.cut();
    let (status, weight) = tokio::join!(
        process.registry.set_status("orders", "1", Status::Down),
        process.registry.set_weight("orders", "1", 7),
    );
    assert!(status.unwrap_err().is_retryable() && weight.unwrap_err().is_retryable());
    sleep(TTL * 10).await;
    process.link.heal();
    process.until_state("1", "registered", TTL).await;
    let found = Process::start(&store).registry.discover("orders").await.unwrap();
    let one = found.get("1").unwrap();
    assert_eq!((one.status, one.weight, one.registered_at), (Status::Down, 7, registered_at));
}

#[tokio::test(start_paused = true)]
async fn a_status_that_is_refused_leaves_the_previous_one_in_force() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.fail(&key("1"), Some(denied()));
    let error = process.registry.set_status("orders", "1", Status::Down).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert_eq!((process.wanted(), process.state("1")), ((Status::Up, 100), "registered".into()));
}

#[tokio::test(start_paused = true)]
async fn what_is_withdrawn_cannot_be_changed() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.hang();
    assert!(process.registry.unregister("orders", "1").now_or_never().is_none());
    let error = process.registry.set_weight("orders", "1", 7).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(error.to_string(), "cannot set the weight of orders/1: it is not registered here; register it first");
    process.link.heal();
    eventually(TTL, || store.paths().iter().all(|path| !path.contains("/providers/")), || "it is back".into()).await;
}

#[tokio::test(start_paused = true)]
async fn a_drained_instance_is_unregistered_when_the_grace_is_over() {
    let store = MemoryStore::new();
    let (process, reader) = (Process::start(&store), Process::start(&store));
    process.register("orders", "1").await;
    process.register("orders", "2").await;
    let mut watcher = reader.watch("orders").await;
    let began = Instant::now();
    let reading = async {
        until(&mut watcher, SECOND, |seen| seen.available().count() == 1).await;
        assert_eq!(watcher.current().get("1").unwrap().status, Status::Draining);
        until(&mut watcher, GRACE + SECOND, |seen| seen.len() == 1).await;
        began.elapsed()
    };
    let (drained, gone_after) = tokio::join!(process.drain(GRACE), reading);
    assert!(drained.unwrap());
    assert!(gone_after >= GRACE && gone_after < GRACE + SECOND, "{gone_after:?}");
    assert!(!process.drain(GRACE).await.unwrap(), "there is nothing any more");
    assert!(process.registry.drain("orders", "2", Duration::ZERO).await.unwrap());
    assert!(stored(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn draining_is_called_off_by_whoever_brings_the_instance_back() {
    for again in [true, false] {
        let store = MemoryStore::new();
        let process = Process::start(&store);
        process.register("orders", "1").await;
        let coming_back = async {
            sleep(GRACE / 2).await;
            // A weight says nothing of whether it goes.
            process.registry.set_weight("orders", "1", 7).await.unwrap();
            if again {
                process.register("orders", "1").await;
            } else {
                process.set_status(Status::Up).await;
            }
        };
        let (drained, ()) = tokio::join!(process.drain(GRACE), coming_back);
        assert!(!drained.unwrap());
        assert_eq!((process.wanted().0, stored(&store).len()), (Status::Up, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_weight_that_is_set_meanwhile_does_not_call_draining_off() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let weighing = async {
        sleep(SECOND).await;
        process.registry.set_weight("orders", "1", 7).await.unwrap();
    };
    let (drained, ()) = tokio::join!(process.drain(GRACE), weighing);
    assert!(drained.unwrap() && stored(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn draining_that_is_dropped_leaves_the_instance_draining() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    assert!(timeout(SECOND, process.drain(GRACE)).await.is_err());
    sleep(GRACE * 2).await;
    assert_eq!((process.wanted().0, stored(&store).len()), (Status::Draining, 1));
    assert!(process.drain(GRACE).await.unwrap(), "and can be gone on with");
}

#[tokio::test(start_paused = true)]
async fn draining_in_an_outage_ends_when_the_grace_is_over_and_wins_after_it() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.cut();
    let began = Instant::now();
    assert!(process.drain(GRACE).await.unwrap_err().is_retryable());
    assert!(began.elapsed() >= GRACE && began.elapsed() <= GRACE + TTL, "{:?}", began.elapsed());
    assert!(process.registry.registrations().is_empty());
    process.link.heal();
    sleep(TTL * 3).await;
    assert!(stored(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn draining_that_is_refused_leaves_the_instance_in_traffic() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.fail(&key("1"), Some(denied()));
    assert_eq!(process.drain(GRACE).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!((process.wanted().0, stored(&store).len()), (Status::Up, 1));
}

#[tokio::test(start_paused = true)]
async fn draining_what_another_owner_has_taken_waits_for_nobody() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    older.register("orders", "1").await;
    newer.register("orders", "1").await;
    let began = Instant::now();
    assert!(!older.drain(GRACE).await.unwrap());
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    assert!(older.registry.registrations().is_empty());
    assert_eq!((newer.wanted().0, stored(&store).len()), (Status::Up, 1));
}

#[tokio::test(start_paused = true)]
async fn draining_ends_with_the_registry() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let destroying = async {
        sleep(SECOND).await;
        process.registry.destroy().await.unwrap();
    };
    let began = Instant::now();
    let (drained, ()) = tokio::join!(process.drain(Duration::MAX), destroying);
    assert_eq!(drained.unwrap_err().kind(), ErrorKind::Closed);
    assert!(began.elapsed() < SECOND * 2 && store.paths().is_empty(), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn shutting_down_brings_nothing_back_that_is_withdrawn_meanwhile() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..100).await;
    let began = Instant::now();
    let leaving = shutdown::drain(&process.registry, GRACE, std::future::pending());
    let (left, withdrawn, ()) = tokio::join!(leaving, process.registry.unregister("orders", "00007"), async {
        sleep(GRACE / 2).await;
        let found = process.registry.discover("orders").await.unwrap();
        assert_eq!((found.len(), found.available().count()), (99, 0));
    });
    left.unwrap();
    assert!(withdrawn.unwrap());
    assert!(began.elapsed() >= GRACE && store.paths().is_empty(), "{:?}", began.elapsed());
}
