//! What a store holds and nobody can read: skipped, counted, logged once; it never hides the rest.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Key, Layout, Record};

/// How many malformed records are remembered as logged: someone who writes ever more of them must not fill memory.
const REMEMBERED: usize = 1024;

/// Reads records for a backend; those that are malformed are skipped, counted, and logged once each.
///
/// # Examples
/// ```
/// use registry_core::{Key, Malformed, NativeLayout};
///
/// let malformed = Malformed::new("consul");
/// let key = Key::provider("orders".parse()?, "7f3a".parse()?);
/// assert!(malformed.read(&NativeLayout, &key, &[("orders/providers/7f3a", b"garbage")]).is_none());
/// assert_eq!(malformed.count(), 1);
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Malformed {
    backend: &'static str,
    count: AtomicU64,
    /// Hashes of path and bytes. Locked for one insertion, never across an `.await`.
    logged: Mutex<HashSet<u64>>,
    hasher: RandomState,
}

impl Malformed {
    /// Has met none yet. `backend` is the name for the log.
    #[must_use]
    pub fn new(backend: &'static str) -> Self {
        Self { backend, count: AtomicU64::new(0), logged: Mutex::default(), hasher: RandomState::new() }
    }

    /// The record of `key` from its [entries](Layout::decode), or `None` if it is malformed.
    pub fn read(&self, layout: &dyn Layout, key: &Key, entries: &[(&str, &[u8])]) -> Option<Record> {
        let error = match layout.decode(key, entries) {
            Ok(record) => return Some(record),
            Err(error) => error,
        };
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() >= REMEMBERED {
            logged.clear();
        }
        if logged.insert(self.hasher.hash_one((key, entries))) {
            let (service, id) = (&key.service, &key.id);
            tracing::warn!(backend = self.backend, %service, instance = %id, %error, count, "malformed record skipped");
        }
        None
    }

    /// How often a malformed record was met.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
