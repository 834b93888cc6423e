//! Leaving on a signal. A process of its own: a signal reaches everybody in it.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{future::Future, process::Command, sync::Arc, time::Duration};

use futures::{FutureExt, poll};
use registry_core::{
    ErrorKind, Instance, Managed, Options, Registry,
    memory::{MemoryBackend, MemoryStore},
    shutdown,
};
use tokio::time::{Instant, timeout};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// Is told to stop, and stops by its deadline, whether the store answers or not.
async fn stops(silent: bool) {
    let options = Options::default().request_timeout(REQUEST_TIMEOUT);
    let store = MemoryStore::new();
    let backend = MemoryBackend::new(store.clone(), options.ttl);
    let link = backend.link();
    let registry: Arc<dyn Registry> = Arc::new(Managed::new(backend, options).unwrap());
    registry.register(Instance::builder("orders", "1").build().unwrap()).await.unwrap();
    let mut leaving = shutdown::on_signal(registry.clone(), Duration::ZERO).boxed();
    assert!(poll!(&mut leaving).is_pending(), "it waits for a signal");
    if silent {
        link.hang();
    }
    let told = Instant::now();
    let status = Command::new("sh").args(["-c", &format!("kill -TERM {}", std::process::id())]).status().unwrap();
    assert!(status.success());
    let outcome = in_time(leaving).await;
    println!("silent: {silent}, ended after {:?}: {outcome:?}", told.elapsed());
    assert!(registry.registrations().is_empty());
    if silent {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout);
        assert_eq!(store.paths().iter().filter(|path| path.contains("/providers/")).count(), 1, "left to expire");
    } else {
        outcome.unwrap();
        assert_eq!(store.paths().iter().filter(|path| path.contains("/providers/")).count(), 0);
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(2 * REQUEST_TIMEOUT + Duration::from_secs(2), work).await.expect("it ends by its deadline")
}

#[tokio::test]
async fn a_process_that_is_told_to_stop_ends_by_its_deadline_with_a_silent_store_too() {
    stops(false).await;
    stops(true).await;
}
