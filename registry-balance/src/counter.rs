//! A counter that many cores advance without getting into each other's way.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
};

use crossbeam_utils::CachePadded;

pub(crate) const SHARDS: usize = 16;

/// Each thread goes on in its shard; each shard counts from a random number on.
#[derive(Debug)]
pub(crate) struct Counter(Box<[CachePadded<AtomicU32>]>);

impl Counter {
    pub(crate) fn new() -> Self {
        Self((0..SHARDS).map(|_| CachePadded::new(AtomicU32::new(fastrand::u32(..)))).collect())
    }

    pub(crate) fn next(&self) -> u32 {
        self.0[shard() % SHARDS].fetch_add(1, Ordering::Relaxed)
    }
}

/// Threads are numbered as they come.
pub(crate) fn shard() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static THREAD: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed)));
    THREAD.get()
}
