//! What goes on beside the schedule: reading the store past the library, and looking again at what seemed wrong.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use registry_core::{Content, Directory, Layout, NativeLayout, Place};
use registry_tests::{
    conformance::support,
    harness::{Harness, Routed},
};
use tokio::{
    sync::RwLock,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    bounds::millis,
    names::{self, Generation},
    process::Desk,
    protocol::now,
    stage::OPERATION,
};

/// How often the store is read past the library.
const OBSERVE: Duration = Duration::from_millis(500);
/// How often it is seen to that nothing is held up, and suspicions are looked at again.
const REVIEW: Duration = Duration::from_millis(100);

/// Sees that nothing is held up, and looks at suspicions again.
pub(crate) async fn review(desk: Desk) {
    loop {
        let due = Instant::now() + REVIEW;
        sleep_until(due).await;
        let late = millis(due.elapsed());
        desk.lock().review(late, now());
    }
}

/// Reads the store past the library, all the time that it is there.
pub(crate) async fn observe<H: Routed>(store: Arc<H>, gate: Arc<RwLock<()>>, desk: Desk) {
    loop {
        sleep(OBSERVE).await;
        let _gate = gate.read().await;
        if !desk.lock().ledger.store_is_there() {
            continue;
        }
        let at = now();
        match timeout(OPERATION, tokio::spawn(held(store.clone()))).await {
            Ok(Ok(held)) => desk.lock().observed(at, held),
            Ok(Err(error)) => desk.lock().violate(now(), format!("the store cannot be read: {error}")),
            Err(_) => desk.lock().violate(now(), format!("the store was not read within {OPERATION:?}")),
        }
    }
}

/// All instances in the store: service, id and generation. What cannot be read was registered by nobody.
async fn held<H: Harness>(store: Arc<H>) -> Vec<(String, String, Generation)> {
    let paths = store.keys().await;
    let keys = paths.iter().filter_map(|path| match NativeLayout.place(path) {
        Some(Place::Record(key)) if key.directory == Directory::Providers => Some(key),
        _ => None,
    });
    let keys: Vec<_> = keys.collect();
    let read = keys.iter().map(async |key| Some((key, support::record(&*store, key).await?)));
    let records = join_all(read).await.into_iter().flatten();
    let found = records.map(|(key, record)| {
        let generation = match &record.content {
            Content::Instance(instance) => names::generation(instance),
            _ => None,
        };
        (key.service.to_string(), key.id.to_string(), generation.unwrap_or(0))
    });
    found.collect()
}
