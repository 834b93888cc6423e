//! The reader's side: a stream of snapshots, a stream of changes, and a wait-free handle to the current snapshot.

use std::{fmt, ops::Deref, sync::Arc};

use arc_swap::{ArcSwap, Guard};
use futures::{Stream, stream};
use tokio::sync::{Notify, watch};

use crate::{Change, Error, Freshness, Result, ServiceName, Snapshot};

/// What the follow loop and its readers share for one service.
pub(crate) struct View {
    pub(crate) service: ServiceName,
    current: ArcSwap<Snapshot>,
    progress: watch::Sender<Progress>,
    /// Somebody asks anew after what was fatal.
    asked: Notify,
    /// Somebody has a reason to think that the view is not what the store has.
    doubt: Notify,
}

/// What readers wait on. The snapshot itself is in the `ArcSwap`: waking costs no copy of it.
#[derive(Clone, Default)]
struct Progress {
    revision: u64,
    failure: Option<Error>,
    /// Counts the failures.
    failures: u64,
    ended: bool,
}

impl View {
    pub(crate) fn new(service: ServiceName) -> Self {
        let current = ArcSwap::from_pointee(Snapshot::pending(service.clone()));
        Self { service, current, progress: watch::Sender::default(), asked: Notify::new(), doubt: Notify::new() }
    }

    pub(crate) fn load(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    pub(crate) fn publish(&self, snapshot: Snapshot) {
        let revision = snapshot.revision();
        self.current.store(Arc::new(snapshot));
        self.progress.send_modify(|progress| {
            progress.revision = revision;
            progress.failure = None;
        });
    }

    /// Notes why there is no complete set yet; `None` before the first attempt and after a success.
    pub(crate) fn fail(&self, error: Error) {
        self.progress.send_modify(|progress| {
            progress.failure = Some(error);
            progress.failures += 1;
        });
    }

    /// Ends every watcher.
    pub(crate) fn end(&self) {
        self.progress.send_modify(|progress| progress.ended = true);
    }

    /// How many watchers, handles and calls look at this view.
    pub(crate) fn readers(self: &Arc<Self>) -> usize {
        Arc::strong_count(self)
    }

    /// Returns when somebody asks anew after what was fatal.
    pub(crate) async fn asked(&self) {
        self.asked.notified().await;
    }

    fn doubt(&self) {
        self.doubt.notify_one();
    }

    /// Returns when somebody doubts the view, or has since this returned last.
    pub(crate) async fn doubted(&self) {
        self.doubt.notified().await;
    }

    /// Waits for the first complete set, or for an error that waiting does not mend.
    pub(crate) async fn ready(&self) -> Result<()> {
        self.until(|snapshot| snapshot.freshness() != Freshness::Pending).await.map(drop)
    }

    /// Waits for a snapshot for which `holds`, or for an error that waiting does not mend. One that was there before is
    /// not believed: the cause may have been mended, so it is asked for anew.
    pub(crate) async fn until(&self, holds: impl Fn(&Snapshot) -> bool) -> Result<Snapshot> {
        let mut progress = self.progress.subscribe();
        let known = progress.borrow().failures;
        if progress.borrow().failure.as_ref().is_some_and(|error| !error.is_retryable()) {
            self.asked.notify_one();
        }
        loop {
            // Before the snapshot is looked at: one that is published in between is not missed.
            let seen = Progress::clone(&progress.borrow_and_update());
            let snapshot = Snapshot::clone(&self.load());
            if holds(&snapshot) {
                return Ok(snapshot);
            }
            if seen.ended {
                return Err(crate::managed::closed());
            }
            if let Some(error) = seen.failure.filter(|error| !error.is_retryable() && seen.failures != known) {
                return Err(error);
            }
            if progress.changed().await.is_err() {
                return Err(crate::managed::closed());
            }
        }
    }

    /// The last failure, for the message of a call that waited in vain.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.progress.borrow().failure.clone()
    }
}

/// Follows one service. Made by [`Registry::watch`](crate::Registry::watch).
///
/// A watcher that is not read costs nothing and delays nobody: [`next`](Self::next) gives the latest snapshot, not
/// each one. A clone is given what comes after that which this one was given last.
///
/// # Examples
/// ```
/// use registry_core::{Freshness, Instance, Managed, Registry};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-watcher")?;
/// let mut watcher = registry.watch("orders").await?;
///
/// // The first item is the complete set, even when it is empty.
/// let first = watcher.next().await.expect("the registry lives");
/// assert!(first.is_empty() && first.freshness() == Freshness::Live);
///
/// registry.register(Instance::builder("orders", "1").build()?).await?;
/// while watcher.current().is_empty() {
///     watcher.next().await;
/// }
/// assert_eq!(watcher.current().len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Watcher {
    view: Arc<View>,
    progress: watch::Receiver<Progress>,
    /// The revision given out last; `None` before the first item.
    given: Option<u64>,
}

impl Watcher {
    pub(crate) fn new(view: Arc<View>) -> Self {
        let progress = view.progress.subscribe();
        Self { view, progress, given: None }
    }

    /// The service that is followed.
    #[must_use]
    pub fn service(&self) -> &ServiceName {
        &self.view.service
    }

    /// The current snapshot: no `async`, no lock, no allocation, and no count shared with other threads.
    ///
    /// Hold the result briefly; clone the [`Snapshot`] to keep it.
    #[must_use]
    pub fn current(&self) -> SnapshotRef {
        SnapshotRef(self.view.load())
    }

    /// A handle that reads the current snapshot and can be cloned into request handlers.
    #[must_use]
    pub fn handle(&self) -> SnapshotHandle {
        SnapshotHandle(self.view.clone())
    }

    /// The next snapshot: at first the current one, as soon as it is complete, then the latest after each change.
    /// `None` once the registry is destroyed.
    ///
    /// # Cancel safety
    /// Safe in `select!`: no snapshot is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Snapshot> {
        loop {
            if self.progress.borrow_and_update().ended {
                return None;
            }
            let current = self.view.load();
            if current.freshness() != Freshness::Pending && self.given != Some(current.revision()) {
                self.given = Some(current.revision());
                return Some(Snapshot::clone(&current));
            }
            drop(current);
            self.progress.changed().await.ok()?;
        }
    }

    /// All further snapshots as a stream.
    pub fn snapshots(self) -> impl Stream<Item = Snapshot> + Send + Unpin + 'static {
        Box::pin(stream::unfold(self, |mut watcher| async move { Some((watcher.next().await?, watcher)) }))
    }

    /// The differences between the snapshots that [`next`](Self::next) gives, one by one, each with the instance
    /// before and after. Begins with an insert for each instance of the current complete set.
    pub fn changes(mut self) -> impl Stream<Item = Change> + Send + Unpin + 'static {
        self.given = None;
        let seen = Snapshot::pending(self.service().clone());
        let pending = Vec::new().into_iter();
        Box::pin(stream::unfold((self, seen, pending), |(mut watcher, mut seen, mut pending)| async move {
            loop {
                if let Some(change) = pending.next() {
                    return Some((change, (watcher, seen, pending)));
                }
                let next = watcher.next().await?;
                pending = next.changes_since(&seen).into_iter();
                seen = next;
            }
        }))
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").field("service", self.service()).finish_non_exhaustive()
    }
}

/// Reads the current snapshot of a service, wait-free. Cheap to clone.
#[derive(Clone)]
pub struct SnapshotHandle(Arc<View>);

impl SnapshotHandle {
    /// The current snapshot, as [`Watcher::current`] gives it.
    #[must_use]
    pub fn current(&self) -> SnapshotRef {
        SnapshotRef(self.0.load())
    }

    /// Says that there is a reason to doubt what is seen, such as an instance that does not answer. The view is soon
    /// compared with the store, for all that read it, and at most every five seconds: call this as often as you like.
    pub fn doubt(&self) {
        self.0.doubt();
    }
}

impl fmt::Debug for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SnapshotHandle").field(&self.0.service).finish()
    }
}

/// A borrowed view of the current snapshot.
pub struct SnapshotRef(Guard<Arc<Snapshot>>);

impl Deref for SnapshotRef {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.0
    }
}

impl fmt::Debug for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{task::yield_now, time::timeout};

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_waits_hears_of_what_is_published_at_that_moment() {
        for round in 0..20_000 {
            let view = Arc::new(View::new("orders".parse().unwrap()));
            let publishing = tokio::spawn({
                let view = view.clone();
                async move {
                    let live = Snapshot::clone(&view.load()).with_instances(Vec::new(), Freshness::Live);
                    view.publish(live);
                }
            });
            if round % 2 == 0 {
                yield_now().await;
            }
            timeout(Duration::from_secs(5), view.ready()).await.expect("it is published").unwrap();
            publishing.await.unwrap();
        }
    }
}
