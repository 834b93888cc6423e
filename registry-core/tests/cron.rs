//! The slow check by a cron expression, on the wall clock.
#![cfg(feature = "cron")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use registry_core::{
    ErrorKind, Instance, Key, Managed, Options, Reconcile, Registry,
    memory::{MemoryBackend, MemoryStore},
};
use tokio::time::{Instant, sleep};

fn registry(store: &MemoryStore, reconcile: &str) -> Managed<MemoryBackend> {
    let reconcile: Reconcile = reconcile.parse().unwrap();
    let options = Options::default().ttl(Duration::from_secs(600)).reconcile(reconcile);
    Managed::new(MemoryBackend::new(store.clone(), options.ttl), options).unwrap()
}

/// The ttl is ten minutes: only the check can find out in time.
#[tokio::test]
async fn a_deleted_key_is_restored_at_the_next_tick_of_the_schedule() {
    let store = MemoryStore::new();
    let registry = registry(&store, "* * * * * *");
    registry.register(Instance::builder("orders", "1").build().unwrap()).await.unwrap();
    let key = Key::provider("orders".parse().unwrap(), "1".parse().unwrap());
    for _ in 0..2 {
        assert!(store.delete(&key));
        let deadline = Instant::now() + Duration::from_secs(20);
        while store.paths().is_empty() {
            assert!(Instant::now() < deadline, "not restored in time");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// One scheduler serves the process, so it must outlive the runtime that used it first.
#[test]
fn the_schedule_works_on_a_second_runtime_when_the_first_is_gone() {
    for _ in 0..2 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = MemoryStore::new();
            let registry = registry(&store, "* * * * * *");
            registry.register(Instance::builder("orders", "1").build().unwrap()).await.unwrap();
            store.delete(&Key::provider("orders".parse().unwrap(), "1".parse().unwrap()));
            let restored = async {
                while store.paths().is_empty() {
                    sleep(Duration::from_millis(50)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), restored).await.unwrap();
        });
    }
}

#[tokio::test]
async fn a_bad_expression_is_an_error_that_shows_it() {
    let error = "every now and then".parse::<Reconcile>().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("every now and then"), "{error}");
}
