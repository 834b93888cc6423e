//! *Follow*, one task per service in use, shared by all its readers.
//!
//! ```text
//! subscribe ──first item──▶ live ──error──▶ stale ──back-off──▶ subscribe from the cursor
//!                            │ ▲
//!                            └─┘ apply all updates that are ready, publish one snapshot
//! ```
//!
//! A `Reset` is diffed against what readers have, so an outage that changed nothing shows nothing. If the first attempt
//! fails, or is silent for too long, readers get what was kept on disk, stale, until there is a `Reset`.

use std::{
    collections::HashMap,
    future::Future,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use futures::{FutureExt, StreamExt, stream::BoxStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, debug_span, info, warn};

use super::{
    Shared,
    backoff::{Backoff, part_of},
    cache::{Cache, Protection},
    closed,
    disk::{Disk, Remembered},
    metrics::{self, Arrival, Followed},
    overrides,
};
use crate::{
    Backend, Cursor, Error, ErrorKind, Event, Freshness, Key, Result, ServiceName, Snapshot, Update, Updates,
    error::Chain, watcher::View,
};

/// The delays between attempts to subscribe.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How often the time for an attempt is doubled: what is given up is asked for again from the start, and a store that is
/// only slow, as when all come back to it at once, would never get to the end of it.
const DOUBLINGS: u32 = 3;
/// What is fatal, such as a missing permission, is tried again this rarely.
const FATAL_RETRY: Duration = Duration::from_secs(30);
/// But not before this, if somebody asks anew.
const ASKED_RETRY: Duration = Duration::from_secs(1);
/// A subscription that lived this long was a good one: the next failure starts the back-off anew.
const GOOD_AFTER: Duration = Duration::from_secs(5);
/// How many items are applied before readers get to see them.
const MOST_AT_ONCE: usize = 1024;
/// Each followed service is read anew this often, whatever its stream says.
const REREAD: Duration = Duration::from_secs(600);
/// What is doubted is compared with the store within this time, so that not all who doubt it at once ask at once.
const DOUBT_SPREAD: Duration = Duration::from_millis(500);
/// But not more often than this.
const DOUBT_PACE: Duration = Duration::from_secs(5);
/// After the store comes back, waiting readers ask within this time instead of all at once.
const WAKE_SPREAD: Duration = Duration::from_millis(500);
/// An override is removed once its instance has been gone for this long, all of it seen live.
const VACANT: Duration = Duration::from_secs(24 * 60 * 60);
/// Its readers do so within this time, so that the first of them spares the others the work; and whoever could not, not
/// before this is over again.
const SWEEP_SPREAD: Duration = Duration::from_secs(60 * 60);

/// The services in use. Reading is wait-free; the lock guards who is added and dropped.
#[derive(Default)]
pub(super) struct Follows {
    views: ArcSwap<Views>,
    /// What was followed at the end.
    last: OnceLock<Arc<Views>>,
    changing: Mutex<()>,
}

pub(super) type Views = HashMap<ServiceName, Arc<Follow>, RandomState>;

/// One followed service.
pub(super) struct Follow {
    pub(super) view: Arc<View>,
    /// Set by readers of the cache, cleared by the task: no clock is read on the hot path.
    used: AtomicBool,
    pub(super) metrics: Followed,
}

impl Follow {
    pub(super) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }
}

impl Follows {
    /// The current snapshot of a service that is followed and complete.
    pub(super) fn current(&self, service: &str) -> Option<Snapshot> {
        let views = self.views.load();
        let follow = views.get(service)?;
        let snapshot = follow.view.load();
        (snapshot.freshness() != Freshness::Pending).then(|| {
            follow.touch();
            Snapshot::clone(&snapshot)
        })
    }

    /// All that is followed, or was at the end.
    pub(super) fn all(&self) -> Arc<Views> {
        self.last.get().cloned().unwrap_or_else(|| self.views.load_full())
    }

    /// Ends every watcher; nothing is followed from now on.
    pub(super) fn end(&self) {
        let _guard = self.lock();
        let last = self.last.get_or_init(|| self.views.load_full());
        self.views.store(Arc::default());
        last.values().for_each(|follow| follow.view.end());
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edit(&self, change: impl FnOnce(&mut Views)) {
        let mut views = HashMap::clone(&self.views.load());
        change(&mut views);
        self.views.store(Arc::new(views));
    }
}

/// The view of a service, followed from now on if it was not. The caller's `Arc` keeps it followed.
pub(super) fn follow<B: Backend>(shared: &Arc<Shared<B>>, service: &ServiceName) -> Result<Arc<View>> {
    let _guard = shared.follows.lock();
    if shared.stop.is_cancelled() || shared.is_closing() {
        return Err(closed());
    }
    if let Some(follow) = shared.follows.views.load().get(service) {
        follow.touch();
        return Ok(follow.view.clone());
    }
    let follow = Arc::new(Follow {
        view: Arc::new(View::new(service.clone())),
        used: AtomicBool::new(true),
        metrics: Followed::new(),
    });
    shared.follows.edit(|views| drop(views.insert(service.clone(), follow.clone())));
    let view = follow.view.clone();
    shared.announce(service, true);
    let task = Task {
        shared: shared.clone(),
        service: service.clone(),
        cache: Cache::new(Protection {
            bound: shared.options.protection(),
            threshold: shared.options.protect_threshold,
            window: shared.options.ttl / 3,
        }),
        follow,
        disk: shared.disk.clone(),
        cursor: None,
        failing: false,
        stale: None,
        protected: None,
        backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
        late: 0,
        idle_check: Instant::now() + shared.options.idle_timeout,
        swept: None,
        sweep_delay: part_of(SWEEP_SPREAD),
    };
    let span = debug_span!(parent: None, "follow", backend = shared.backend.name(), service = service.as_str());
    shared.runtime.spawn(task.run(shared.stop.clone()).instrument(span));
    Ok(view)
}

struct Task<B: Backend> {
    shared: Arc<Shared<B>>,
    service: ServiceName,
    follow: Arc<Follow>,
    cache: Cache,
    /// Until what is kept there was asked for, or the store answered.
    disk: Option<Arc<Disk>>,
    cursor: Option<Cursor>,
    /// The last attempt failed, and readers were told.
    failing: bool,
    stale: Option<SystemTime>,
    protected: Option<SystemTime>,
    backoff: Backoff,
    /// How many attempts in a row ended for want of time.
    late: u32,
    idle_check: Instant,
    /// When overrides without an instance were last removed.
    swept: Option<Instant>,
    /// How much later than it could this task does that.
    sweep_delay: Duration,
}

/// Also when the runtime goes down under it: a watcher must not wait for ever.
impl<B: Backend> Drop for Task<B> {
    fn drop(&mut self) {
        self.follow.view.end();
    }
}

type Subscription = BoxStream<'static, Result<Updates>>;

/// Why a live subscription is left.
enum Left {
    Failed(Error),
    /// Read everything anew; readers need not know.
    Reread,
    Unused,
}

impl<B: Backend> Task<B> {
    async fn run(mut self, stop: CancellationToken) {
        // Pinned here: who is given a future by value has room for it more than once.
        let follow = pin!(async {
            // A panic in a backend must not leave readers with a view that never moves again.
            while AssertUnwindSafe(self.follow()).catch_unwind().await.is_err() {
                self.cursor = None;
                let panicked = format!("the subscription of {} panicked", self.service);
                self.fail(Error::new(ErrorKind::Unavailable, panicked)).await;
                if !self.pause().await {
                    return;
                }
            }
        });
        stop.run_until_cancelled(follow).await;
    }

    async fn follow(&mut self) {
        let mut resume = true;
        loop {
            let since = self.cursor.clone().filter(|_| resume);
            resume = true;
            match self.reach(since).await {
                Ok((stream, first)) => {
                    self.late = 0;
                    let began = Instant::now();
                    match self.live(stream, first).await {
                        Left::Unused => return,
                        Left::Reread => {
                            resume = false;
                            continue;
                        }
                        Left::Failed(error) => {
                            if began.elapsed() >= GOOD_AFTER {
                                self.backoff.reset();
                            }
                            self.fail(error).await;
                        }
                    }
                }
                Err(error) => {
                    self.late += u32::from(error.kind() == ErrorKind::Timeout);
                    self.fail(error).await;
                }
            }
            if !self.pause().await {
                return;
            }
        }
    }

    /// Subscribes; if the store is silent for half of what a call may take, gives readers meanwhile what is on disk.
    async fn reach(&mut self, since: Option<Cursor>) -> Result<(Subscription, Updates)> {
        let mut subscribing = pin!(self.subscribe(since));
        if self.disk.is_some() {
            if let Ok(outcome) = timeout(self.shared.options.request_timeout / 2, &mut subscribing).await {
                return outcome;
            }
            tokio::select! {
                outcome = &mut subscribing => return outcome,
                remembered = self.recall() => self.show(remembered),
            }
        }
        subscribing.await
    }

    /// Subscribes and waits for the first item, which tells the complete set or that the cursor is still good.
    fn subscribe(
        &self,
        since: Option<Cursor>,
    ) -> impl Future<Output = Result<(Subscription, Updates)>> + Send + use<B> {
        let (shared, service) = (self.shared.clone(), self.service.clone());
        let patience = shared.options.request_timeout * 2u32.pow(self.late.min(DOUBLINGS));
        async move {
            let known = since.is_some();
            let open = async {
                let mut stream = shared.backend.subscribe(&service, since).await?;
                let first = stream.next().await.unwrap_or_else(|| Err(shared.ended(&service)))?;
                let complete = matches!(first.updates.first(), Some(Update::Reset { .. }));
                if !known && !complete {
                    let message = format!("the first item of {service} is not complete");
                    return Err(Error::new(ErrorKind::Malformed, message));
                }
                Ok((stream, first))
            };
            timeout(patience, open).await.unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Timeout, format!("cannot follow {service}: no answer in time")))
            })
        }
    }

    /// What is kept on disk. A disk that is as silent as the store is not waited for.
    async fn recall(&self) -> Option<Remembered> {
        let recall = self.disk.clone()?.recall(&self.service);
        timeout(self.shared.options.request_timeout / 4, recall).await.unwrap_or_else(|_| {
            warn!(service = %self.service, "the disk does not answer");
            None
        })
    }

    /// Gives readers what was kept on disk. That is not asked for again.
    fn show(&mut self, remembered: Option<Remembered>) {
        self.disk = None;
        let Some(Remembered { instances, live_at }) = remembered else { return };
        let (service, since) = (&self.service, humantime::format_rfc3339_seconds(live_at));
        warn!(%service, instances = instances.len(), %since, "the store cannot be reached; using what is kept on disk");
        self.cache.remember(instances);
        self.stale = Some(live_at);
        self.publish();
    }

    async fn live(&mut self, mut stream: Subscription, first: Updates) -> Left {
        let arrival = Arrival::now(&self.follow.view);
        self.disk = None;
        self.take(first);
        self.published_live();
        arrival.published(self.shared.backend.name(), &self.follow.view);
        let reread = sleep(REREAD + part_of(REREAD / 4));
        tokio::pin!(reread);
        let mut reconcile = self.shared.reconcile.subscribe();
        let mut probe = Aside::Idle;
        let mut next_doubt = Instant::now();
        let mut sweep = Aside::Idle;
        loop {
            let release = self.cache.next_release();
            let next_sweep = self.next_sweep();
            tokio::select! {
                item = stream.next() => match item {
                    Some(Ok(updates)) => {
                        if let Err(error) = self.take_ready(updates, &mut stream) {
                            return Left::Failed(error);
                        }
                    }
                    Some(Err(error)) => return Left::Failed(error),
                    None => return Left::Failed(self.shared.ended(&self.service)),
                },
                () = maybe(release) => {
                    self.cache.release(Instant::now());
                    self.publish();
                }
                () = &mut reread => return Left::Reread,
                Ok(()) = reconcile.changed() => if let (Aside::Idle, Some(at)) = (&probe, &self.cursor) {
                    probe = self.probe(at.clone(), part_of(self.shared.options.request_timeout));
                },
                () = self.follow.view.doubted() => if let (Aside::Idle, Some(at)) = (&probe, &self.cursor) {
                    let ask = next_doubt.max(Instant::now()) + part_of(DOUBT_SPREAD);
                    next_doubt = ask + DOUBT_PACE;
                    probe = self.probe(at.clone(), ask - Instant::now());
                },
                () = maybe(next_sweep) => sweep = self.sweep(),
                () = sweep.wait() => sweep = Aside::Idle,
                at = probe.wait() => {
                    // What the store has and we have not is on its way to us, or is lost.
                    if at.is_some() && at == self.cursor {
                        warn!(service = %self.service, "the subscription missed a change; reading everything anew");
                        return Left::Reread;
                    }
                    probe = Aside::Idle;
                }
                () = sleep_until(self.idle_check) => if self.unused() {
                    return Left::Unused;
                }
            }
        }
    }

    /// Asks, after `delay`, whether the store has moved past `at`; if so, waits a while and gives `at` back.
    fn probe(&self, at: Cursor, delay: Duration) -> Aside<Option<Cursor>> {
        let (shared, service) = (self.shared.clone(), self.service.clone());
        let patience = self.shared.options.request_timeout;
        Aside::Running(Box::pin(async move {
            sleep(delay).await;
            let moved = shared.in_time("probe", "probe", patience, shared.backend.probe(&service, &at)).await;
            if !matches!(moved, Ok(true)) {
                return None;
            }
            sleep(patience).await;
            Some(at)
        }))
    }

    /// When to look for overrides that have been without an instance for too long.
    fn next_sweep(&self) -> Option<Instant> {
        let due = self.cache.vacant_since()? + VACANT + self.sweep_delay;
        Some(self.swept.map_or(due, |swept| due.max(swept + SWEEP_SPREAD)))
    }

    /// Removes the overrides that have been without an instance for too long. They go from here when the store says so.
    fn sweep(&mut self) -> Aside<()> {
        let now = Instant::now();
        self.swept = Some(now);
        let vacant = self.cache.vacant_for(VACANT, now);
        let keys: Vec<Key> = vacant.into_iter().map(|id| overrides::of(&self.service, id)).collect();
        let shared = self.shared.clone();
        Aside::Running(Box::pin(async move {
            let cleared = shared.clear_overrides(&keys).await;
            for (key, cleared) in keys.iter().zip(cleared) {
                match cleared {
                    Ok(true) => info!(%key, "removed: its instance has been gone for a day"),
                    Ok(false) => {}
                    // Not everyone who reads may write.
                    Err(error) => debug!(%key, error = %Chain(&error), "not removed"),
                }
            }
        }))
    }

    fn take(&mut self, item: Updates) {
        if item.cursor.is_some() {
            self.cursor = item.cursor;
        }
        if item.updates.iter().any(|update| matches!(update, Update::Reset { .. })) {
            metrics::read_in_full(self.shared.backend.name(), &self.service);
        }
        self.cache.apply(item.updates, Instant::now());
    }

    /// Applies `first` and whatever else is ready, then publishes once.
    fn take_ready(&mut self, first: Updates, stream: &mut Subscription) -> Result<()> {
        let arrival = Arrival::now(&self.follow.view);
        self.take(first);
        let mut outcome = Ok(());
        for _ in 1..MOST_AT_ONCE {
            // Unconstrained: the runtime's budget would cut what is ready into pieces of 128.
            match tokio::task::unconstrained(stream.next()).now_or_never() {
                Some(Some(Ok(item))) => self.take(item),
                Some(Some(Err(error))) => outcome = Err(error),
                Some(None) => outcome = Err(self.shared.ended(&self.service)),
                None => break,
            }
            if outcome.is_err() {
                break;
            }
        }
        self.publish();
        arrival.published(self.shared.backend.name(), &self.follow.view);
        outcome
    }

    fn published_live(&mut self) {
        let was = self.follow.view.load().freshness();
        self.cache.release(Instant::now());
        self.stale = None;
        self.failing = false;
        self.publish();
        if matches!(was, Freshness::Pending | Freshness::Stale { .. }) {
            info!(service = %self.service, instances = self.follow.view.load().len(), "live");
            self.shared.emit(Event::Live { service: self.service.clone() });
        }
    }

    /// Publishes if readers would see a difference.
    fn publish(&mut self) {
        match self.stale {
            None => self.cache.note_vacant(Instant::now()),
            Some(_) => self.cache.forget_vacant(),
        }
        let held = self.cache.held();
        self.follow.metrics.held(held);
        if held == 0 {
            self.protected = None;
        } else if self.protected.is_none() {
            self.protected = Some(SystemTime::now());
            warn!(service = %self.service, held, "many instances vanished without a word; holding them for a while");
            self.shared.emit(Event::Protected { service: self.service.clone(), held });
        }
        let freshness = match (self.stale, self.protected) {
            (Some(since), _) => Freshness::Stale { since },
            (None, Some(since)) => Freshness::Protected { since },
            (None, None) => Freshness::Live,
        };
        let current = Snapshot::clone(&self.follow.view.load());
        if self.cache.take_changed() {
            self.follow.view.publish(current.with_instances(self.cache.instances(), freshness));
        } else if current.freshness() != freshness {
            self.follow.view.publish(current.with_freshness(freshness));
        }
        self.shared.metrics.changed();
    }

    async fn fail(&mut self, error: Error) {
        if self.shared.is_closing() {
            // The session ends before this task does: that is no outage.
            return std::future::pending().await;
        }
        metrics::failed(self.shared.backend.name(), "subscribe", &error);
        if !error.is_retryable() {
            // What is on disk would hide that the store refuses us.
            self.disk = None;
        } else if self.disk.is_some() {
            let remembered = self.recall().await;
            self.show(remembered);
        }
        if self.follow.view.load().freshness() != Freshness::Pending {
            self.stale.get_or_insert_with(SystemTime::now);
            self.publish();
        }
        self.follow.view.fail(error.clone());
        if !std::mem::replace(&mut self.failing, true) {
            warn!(service = %self.service, backend = self.shared.backend.name(), error = %Chain(&error), "stale");
            self.shared.emit(Event::Stale { service: self.service.clone(), cause: error.clone() });
        } else {
            debug!(service = %self.service, error = %Chain(&error), "still stale");
        }
        if !error.is_retryable() {
            self.backoff = Backoff::new(FATAL_RETRY, FATAL_RETRY);
        } else if self.backoff.ceiling() > LONGEST_RETRY {
            self.backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        }
    }

    /// Waits before the next attempt, less if the store is heard of. `false`: nobody uses the service any more.
    async fn pause(&mut self) -> bool {
        let (now, until) = (Instant::now(), Instant::now() + self.backoff.next());
        let mut connected = self.shared.connected.subscribe();
        tokio::select! {
            () = sleep_until(until) => {}
            () = self.follow.view.asked() => sleep_until(until.min(now + ASKED_RETRY)).await,
            Ok(()) = connected.changed() => sleep_until(until.min(Instant::now() + part_of(WAKE_SPREAD))).await,
        }
        Instant::now() < self.idle_check || !self.unused()
    }

    /// Whether nobody reads the service and nobody has for `idle_timeout`; it is not followed from then on.
    fn unused(&mut self) -> bool {
        self.idle_check = Instant::now() + self.shared.options.idle_timeout;
        let _guard = self.shared.follows.lock();
        // The map and this task hold the view through one `Arc<Follow>`: any further count is a reader.
        if self.follow.used.swap(false, Ordering::Relaxed) || self.follow.view.readers() > 1 {
            return false;
        }
        debug!(service = %self.service, "nobody reads it; no longer followed");
        self.shared.follows.edit(|views| drop(views.remove(&self.service)));
        self.shared.announce(&self.service, false);
        true
    }
}

impl<B: Backend> Shared<B> {
    fn ended(&self, service: &ServiceName) -> Error {
        Error::new(ErrorKind::Unavailable, format!("the subscription of {service} ended"))
            .with_backend(self.backend.name())
    }
}

/// A request to the store that runs beside the subscription.
enum Aside<T> {
    Idle,
    Running(Pin<Box<dyn Future<Output = T> + Send>>),
}

impl<T> Aside<T> {
    async fn wait(&mut self) -> T {
        match self {
            Self::Idle => std::future::pending().await,
            Self::Running(answer) => answer.await,
        }
    }
}

async fn maybe(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
