//! The engine: everything that is the same for all stores, once.
//!
//! [`Managed`] makes a [`Registry`] of a [`Backend`] with two loops. [`keep`] makes what is registered true in the
//! store; [`follow`] makes what readers see true to the store. All recovery lives here. On request, [`disk`] keeps what
//! readers see for the next start.

mod backoff;
mod cache;
mod disk;
mod drain;
mod follow;
mod keep;
mod metrics;
mod overrides;
mod schedule;
mod slots;

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::Duration,
    vec,
};

use async_trait::async_trait;
use futures::{StreamExt, future::join_all, stream::BoxStream};
use tokio::{
    runtime::Handle,
    sync::{Notify, broadcast, oneshot, watch},
    task::yield_now,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{Instrument, debug_span, instrument};

use self::{
    disk::{Disk, keep_on_disk},
    follow::{Follows, follow},
    keep::{Beaten, Keep, Putting},
    metrics::Gauges,
    schedule::Schedule,
    slots::Slots,
};
use crate::{
    Backend, Content, Directory, Error, ErrorKind, Event, Freshness, Health, Heartbeat, Instance, InstanceId, Key,
    Options, Override, Registration, RegistrationState, Registry, Result, ServiceHealth, ServiceName, Snapshot, Status,
    Watcher, advertise, memory, watcher::View,
};

/// How many of those that are registered together are handed on before the next are looked at.
const AT_ONCE: usize = 200;
/// How many events a reader may be behind before it misses the oldest.
const EVENTS: usize = 1024;

/// A [`Registry`] over any [`Backend`]: keeps registrations alive, follows services, and recovers from whatever
/// happens to the store.
///
/// Must be made inside a tokio runtime, on which its tasks live. Dropping it ends them.
///
/// # Examples
/// ```
/// use registry_core::{Managed, Options, Registry, memory::{MemoryBackend, MemoryStore}};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let options = Options::default();
/// let backend = MemoryBackend::new(MemoryStore::new(), options.ttl);
/// let registry = Managed::new(backend, options)?;
/// assert!(registry.discover("orders").await?.is_empty());
/// # Ok(())
/// # }
/// ```
pub struct Managed<B: Backend> {
    shared: Arc<Shared<B>>,
    _stop: DropGuard,
}

/// What the handle and the tasks share. The tasks hold no handle, so the last handle's drop ends them.
pub(crate) struct Shared<B> {
    backend: B,
    options: Options,
    follows: Follows,
    disk: Option<Arc<Disk>>,
    /// Held for bookkeeping only, never across an await.
    slots: Mutex<Slots>,
    /// Heartbeats that users asked for.
    beats: Mutex<Vec<oneshot::Sender<Result<Beaten>>>>,
    /// Held while an override is written, one at a time. Fair, and waited for by the deadline of each.
    overriding: tokio::sync::Mutex<()>,
    /// New work for the keep loop.
    wake: Notify,
    /// Puts that callers began, and when: for the loop to go on with. `None`: there is no loop any more.
    begun: Mutex<Option<Vec<(Instant, Putting)>>>,
    /// Something was put once: there is a session to keep.
    in_session: AtomicBool,
    /// Cancelled once everything is to be taken out: what is claimed and not answered soon is left.
    leaving: CancellationToken,
    /// Cancelled once nothing that is in flight is waited for any more.
    left: CancellationToken,
    events: broadcast::Sender<Event>,
    /// Counts the times that the store was heard of again.
    connected: watch::Sender<u64>,
    /// Counts the ticks of the slow check.
    reconcile: watch::Sender<u64>,
    closing: Mutex<Option<Instant>>,
    destroyed: watch::Sender<Option<Result<()>>>,
    metrics: Gauges,
    stop: CancellationToken,
    /// Where the tasks live, whichever runtime a caller comes from.
    runtime: Handle,
}

impl<B: Backend> Managed<B> {
    /// Starts the engine over a backend. Does not need the store to be up.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if an option is out of range, the [`Options::snapshot_dir`] is not there and cannot be
    /// made, or there is no tokio runtime; [`ErrorKind::Unsupported`] for a cron expression without the feature `cron`.
    pub fn new(backend: B, options: Options) -> Result<Self> {
        options.validate()?;
        let runtime = Handle::try_current()
            .map_err(|error| Error::invalid("a registry must be made inside a tokio runtime").with_source(error))?;
        let schedule = Schedule::new(&options.reconcile)?;
        let disk = Disk::open(&options, &backend)?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            backend,
            options,
            follows: Follows::default(),
            disk,
            slots: Mutex::default(),
            beats: Mutex::default(),
            overriding: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            begun: Mutex::new(Some(Vec::new())),
            in_session: AtomicBool::default(),
            leaving: CancellationToken::new(),
            left: CancellationToken::new(),
            events: broadcast::Sender::new(EVENTS),
            connected: watch::Sender::default(),
            reconcile: watch::Sender::default(),
            closing: Mutex::default(),
            destroyed: watch::Sender::default(),
            metrics: Gauges::new(),
            stop: stop.clone(),
            runtime,
        });
        // What happens in the background belongs to no caller's span.
        let keep = debug_span!(parent: None, "keep", backend = shared.backend.name());
        shared.runtime.spawn(Keep::new(shared.clone(), schedule).run().instrument(keep));
        metrics::start(&shared);
        if let Some(disk) = &shared.disk {
            shared.runtime.spawn(keep_on_disk(shared.clone(), disk.clone()));
        }
        Ok(Self { shared, _stop: stop.drop_guard() })
    }

    /// The backend, for what only it can do.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.shared.backend
    }

    /// What the store is called in spans.
    fn name(&self) -> &'static str {
        self.shared.backend.name()
    }

    /// The view of a service, followed from now on, as soon as it is complete or `request_timeout` is over.
    async fn ready(&self, service: &str) -> Result<(Arc<View>, Result<()>)> {
        let view = follow(&self.shared, &ServiceName::parse(service)?)?;
        let ready = timeout(self.shared.options.request_timeout, view.ready()).await.unwrap_or_else(|_| {
            let error =
                Error::new(ErrorKind::Unavailable, format!("cannot list {service}: the store did not answer in time"))
                    .with_backend(self.shared.backend.name());
            Err(match view.failure() {
                Some(cause) if !cause.is_retryable() => cause,
                Some(cause) => error.with_source(cause),
                None => error,
            })
        });
        Ok((view, ready))
    }
}

/// Many that are to be registered: the first are on their way while the next are looked at. All of them are, also if nobody
/// waits for it any more.
struct Wanting<'a, B: Backend> {
    shared: &'a Shared<B>,
    rest: vec::IntoIter<Instance>,
    answers: Vec<Result<oneshot::Receiver<Result<()>>>>,
}

impl<B: Backend> Wanting<'_, B> {
    /// Wants the next of them, up to so many. `true`: there are more.
    fn go_on(&mut self, most: usize) -> bool {
        let wanted = self.rest.by_ref().take(most).map(|instance| self.shared.want(Directory::Providers, instance));
        self.answers.extend(wanted.map(|wanted| wanted.map(|(_, answer)| answer)));
        self.shared.wake.notify_one();
        self.rest.len() > 0
    }
}

impl<B: Backend> Drop for Wanting<'_, B> {
    fn drop(&mut self) {
        if self.rest.len() > 0 {
            self.go_on(usize::MAX);
        }
    }
}

#[async_trait]
impl<B: Backend> Registry for Managed<B> {
    #[instrument(
        level = "debug", skip_all,
        fields(backend = self.name(), service = &*instance.service, instance = &*instance.id),
    )]
    async fn register(&self, instance: Instance) -> Result<()> {
        let (key, answer) = self.shared.want(Directory::Providers, instance)?;
        self.shared.put_now("register", &key, answer).await
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), instances = instances.len()))]
    async fn register_all(&self, instances: Vec<Instance>) -> Vec<Result<()>> {
        let mut wanting = Wanting { shared: &self.shared, rest: instances.into_iter(), answers: Vec::new() };
        while wanting.go_on(AT_ONCE) {
            // The loop runs on this thread, and not before this task gives way.
            yield_now().await;
        }
        let answers = std::mem::take(&mut wanting.answers);
        // One after the other: they come together, and those that are there are not waited for.
        let deadline = self.shared.answer_by();
        let mut outcomes = Vec::with_capacity(answers.len());
        for answer in answers {
            outcomes.push(match answer {
                Ok(answer) => self.shared.answered_by(deadline, "register", answer).await,
                Err(error) => Err(error),
            });
        }
        outcomes
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service, instance = id))]
    async fn unregister(&self, service: &str, id: &str) -> Result<bool> {
        self.shared.withdraw(&provider(service, id)?, |_| true).await
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service, instance = id))]
    async fn set_status(&self, service: &str, id: &str, status: Status) -> Result<()> {
        self.shared.update("set the status", &provider(service, id)?, |instance| instance.status = status).await
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service, instance = id))]
    async fn set_weight(&self, service: &str, id: &str, weight: u32) -> Result<()> {
        self.shared.update("set the weight", &provider(service, id)?, |instance| instance.weight = weight).await
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service, instance = id))]
    async fn drain(&self, service: &str, id: &str, grace: Duration) -> Result<bool> {
        self.shared.drain(&provider(service, id)?, grace).await
    }

    async fn discover(&self, service: &str) -> Result<Snapshot> {
        if let Some(snapshot) = self.shared.follows.current(service) {
            return Ok(snapshot);
        }
        // Not before: what is followed is read without a span.
        let span = debug_span!("discover", backend = self.name(), service = service);
        let (view, ready) = self.ready(service).instrument(span).await?;
        ready.map(|()| Snapshot::clone(&view.load()))
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service))]
    async fn watch(&self, service: &str) -> Result<Watcher> {
        let (view, ready) = self.ready(service).await?;
        match ready {
            Err(error) if !error.is_retryable() => Err(error),
            _ => Ok(Watcher::new(view)),
        }
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service))]
    async fn wait_for(&self, service: &str, count: usize, within: Duration) -> Result<Snapshot> {
        let view = follow(&self.shared, &ServiceName::parse(service)?)?;
        let enough =
            |seen: &Snapshot| seen.freshness() != Freshness::Pending && seen.available().take(count).count() == count;
        timeout(within, view.until(enough)).await.unwrap_or_else(|_| Err(too_few(&view, count, within)))
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name()))]
    async fn heartbeat(&self) -> Result<Heartbeat> {
        let (beat, beaten) = oneshot::channel();
        {
            // Under this lock, so that nothing comes in behind the end.
            let slots = self.shared.slots();
            if slots.closing {
                return Err(closed());
            }
            lock(&self.shared.beats).push(beat);
        }
        self.shared.wake.notify_one();
        let (renewed, waiting) = self.shared.answered("renew", beaten).await?;
        self.shared.wake.notify_one();
        let mut heartbeat = Heartbeat { renewed, ..Heartbeat::default() };
        let waiting =
            waiting.into_iter().map(async |(key, answer)| (key, self.shared.answered("register", answer).await));
        for (key, outcome) in join_all(waiting).await {
            match outcome {
                Ok(()) => heartbeat.reregistered.push(key),
                Err(error) => heartbeat.failed.push((key, error)),
            }
        }
        Ok(heartbeat)
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name()))]
    async fn destroy(&self) -> Result<()> {
        let mut destroyed = self.shared.destroyed.subscribe();
        if destroyed.borrow().is_some() {
            return Ok(());
        }
        self.shared.begin_closing();
        self.shared.wake.notify_one();
        // The keep loop, if it lives, answers within `request_timeout`; if its runtime is gone, nothing does.
        let by = Instant::now() + self.shared.options.request_timeout + Duration::from_secs(1);
        let outcome =
            timeout_at(by, destroyed.wait_for(Option::is_some)).await.map(|done| done.map(|done| done.clone()));
        let Ok(Ok(Some(outcome))) = outcome else { return Err(self.shared.late("deregister")) };
        if let Some(disk) = &self.shared.disk {
            // A disk that hangs is no failure of the registry.
            let _ = timeout_at(by, disk.done.cancelled()).await;
        }
        outcome
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name()))]
    async fn services(&self) -> Result<Vec<ServiceName>> {
        let shared = &self.shared;
        shared.check_open()?;
        let list = shared.backend.services();
        let mut services =
            shared.in_time("services", "list the services", shared.options.request_timeout, list).await?;
        services.sort();
        Ok(services)
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service))]
    async fn subscribers(&self, service: &str) -> Result<Vec<Instance>> {
        let shared = &self.shared;
        shared.check_open()?;
        let service = ServiceName::parse(service)?;
        let list = shared.backend.list(&service, Directory::Consumers);
        let records = shared.in_time("list", "list the subscribers", shared.options.request_timeout, list).await?;
        let mut subscribers: Vec<Instance> = records
            .into_iter()
            .filter_map(|record| match record.content {
                Content::Instance(instance) => Some(Arc::unwrap_or_clone(instance)),
                Content::Override(_) => None,
            })
            .collect();
        subscribers.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(subscribers)
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service, instance = id))]
    async fn set_override(&self, service: &str, id: &str, set: Override) -> Result<()> {
        self.shared.set_override(overrides::key(service, id)?, set).await
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service))]
    async fn overrides(&self, service: &str) -> Result<Vec<(InstanceId, Override)>> {
        self.shared.overrides(&ServiceName::parse(service)?).await
    }

    #[instrument(level = "debug", skip_all, fields(backend = self.name(), service = service, instance = id))]
    async fn clear_override(&self, service: &str, id: &str) -> Result<bool> {
        self.shared.clear_override(overrides::key(service, id)?).await
    }

    fn registrations(&self) -> Vec<Registration> {
        self.shared.slots().registrations()
    }

    fn registration(&self, service: &str, id: &str) -> Option<Registration> {
        self.shared.slots().registration(&provider(service, id).ok()?)
    }

    fn health(&self) -> Health {
        let mut health = Health { closed: self.shared.is_closing(), ..Health::default() };
        for state in self.shared.slots().states() {
            match state {
                RegistrationState::Registered => health.registered += 1,
                RegistrationState::Pending => health.pending += 1,
                RegistrationState::Lost { .. } => health.lost += 1,
            }
        }
        let views = self.shared.follows.all();
        health.services.extend(views.values().map(|follow| {
            let seen = follow.view.load();
            let (instances, available) = (seen.len(), seen.available().count());
            ServiceHealth { service: seen.service().clone(), freshness: seen.freshness(), instances, available }
        }));
        health.services.sort_by(|a, b| a.service.cmp(&b.service));
        health
    }

    fn events(&self) -> BoxStream<'static, Event> {
        let stop = self.shared.stop.clone();
        let events = self.shared.events.subscribe();
        futures::stream::unfold((events, stop), |(mut events, stop)| async move {
            let event = tokio::select! {
                // What was sent before the end is still delivered.
                biased;
                event = events.recv() => event,
                () = stop.cancelled() => return None,
            };
            match event {
                Ok(event) => Some((event, (events, stop))),
                Err(broadcast::error::RecvError::Lagged(missed)) => Some((Event::Missed(missed), (events, stop))),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        })
        .boxed()
    }
}

impl<B: Backend> Shared<B> {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }

    /// Records what is wanted. Nothing has touched the store yet.
    fn want(&self, directory: Directory, instance: Instance) -> Result<(Key, oneshot::Receiver<Result<()>>)> {
        advertise::check(&instance)?;
        let key = Key { service: instance.service.clone(), directory, id: instance.id.clone() };
        // Once for each registration. Who reads a store in this process calls from here.
        if self.backend.name() != memory::NAME {
            advertise::warn_of_loopback(&instance, || !self.slots().wants(&key));
        }
        let mut slots = self.slots();
        if slots.closing {
            return Err(closed());
        }
        let answer = slots.want(key.clone(), instance, Instant::now());
        Ok((key, answer))
    }

    /// Records a change of what is wanted. `None`: nothing is.
    fn change(&self, key: &Key, change: impl FnOnce(&mut Instance)) -> Result<Option<oneshot::Receiver<Result<()>>>> {
        let mut slots = self.slots();
        if slots.closing {
            return Err(closed());
        }
        Ok(slots.change(key, change, Instant::now()))
    }

    /// Changes what is registered, and fails if nothing is.
    async fn update(self: &Arc<Self>, doing: &str, key: &Key, change: impl FnOnce(&mut Instance)) -> Result<()> {
        let answer = self.change(key, change)?.ok_or_else(|| {
            Error::invalid(format!("cannot {doing} of {key}: it is not registered here; register it first"))
        })?;
        self.put_now(doing, key, answer).await
    }

    /// Takes a registration out, if it is there and as wanted.
    async fn withdraw(&self, key: &Key, wanted: impl FnOnce(&Registration) -> bool) -> Result<bool> {
        let answer = {
            let mut slots = self.slots();
            if slots.closing {
                return Err(closed());
            }
            match slots.registration(key) {
                Some(registration) if !wanted(&registration) => None,
                _ => slots.withdraw(key, Instant::now()),
            }
        };
        self.wake.notify_one();
        match answer {
            None => Ok(false),
            Some(answer) => self.answered("unregister", answer).await,
        }
    }

    /// Registers this reader as a consumer of `service`, or withdraws that, if it announces itself at all.
    fn announce(&self, service: &ServiceName, on: bool) {
        let Some(name) = &self.options.announce else { return };
        // Options bound the name so that both fit an id.
        let Ok(id) = InstanceId::parse(format!("{name}~{}", self.backend.owner())) else { return };
        if on {
            drop(self.want(Directory::Consumers, Instance::new(service.clone(), id)));
        } else {
            let key = Key { service: service.clone(), directory: Directory::Consumers, id };
            drop(self.slots().withdraw(&key, Instant::now()));
        }
        self.wake.notify_one();
    }

    fn take_beats(&self) -> Vec<oneshot::Sender<Result<Beaten>>> {
        std::mem::take(&mut lock(&self.beats))
    }

    fn emit(&self, event: Event) {
        self.metrics.happened(self.backend.name(), &event);
        // Nobody listening is fine.
        let _ = self.events.send(event);
    }

    fn begin_closing(&self) {
        // In this order: once the loop sees the end, no caller puts anything by itself any more.
        self.slots().closing = true;
        lock(&self.closing).get_or_insert(Instant::now() + self.options.request_timeout);
    }

    fn closing(&self) -> Option<Instant> {
        *lock(&self.closing)
    }

    fn is_closing(&self) -> bool {
        self.closing().is_some()
    }

    fn check_open(&self) -> Result<()> {
        if self.is_closing() { Err(closed()) } else { Ok(()) }
    }

    /// Nothing is kept any more: whoever waits is told, and nothing new is taken.
    fn abandon(&self) {
        let mut slots = self.slots();
        slots.closing = true;
        slots.clear();
        drop(slots);
        // Each holds all of this.
        let begun = lock(&self.begun).take();
        drop(begun);
        self.take_beats();
    }

    /// The end of `destroy`: everyone who waits is told, every task ends.
    fn finish(&self, outcome: Result<()>) {
        self.abandon();
        self.follows.end();
        self.destroyed.send_replace(Some(outcome));
        self.stop.cancel();
    }

    /// The engine's answer to a call: after its own attempt, which has a deadline, or what was in flight before.
    async fn answered<T>(&self, doing: &str, answer: oneshot::Receiver<Result<T>>) -> Result<T> {
        self.answered_by(self.answer_by(), doing, answer).await
    }

    async fn answered_by<T>(&self, by: Instant, doing: &str, answer: oneshot::Receiver<Result<T>>) -> Result<T> {
        let answer = timeout_at(by, answer).await;
        answer.map_or_else(|_| Err(self.late(doing)), |answer| answer.unwrap_or_else(|_| Err(closed())))
    }

    /// When a call that begins now has its answer.
    fn answer_by(&self) -> Instant {
        Instant::now() + 2 * self.options.request_timeout
    }

    /// `work`, a verb of the backend, or [`ErrorKind::Timeout`] after `patience`.
    async fn in_time<T>(
        &self,
        verb: &'static str,
        doing: &str,
        patience: Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let outcome = timeout(patience, work).await.unwrap_or_else(|_| Err(self.late(doing)));
        metrics::called(self.backend.name(), verb, &outcome);
        outcome
    }

    fn late(&self, doing: &str) -> Error {
        Error::new(ErrorKind::Timeout, format!("cannot {doing}: no answer in time")).with_backend(self.backend.name())
    }
}

impl<B: Backend> fmt::Debug for Managed<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Managed")
            .field("backend", &self.shared.backend)
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

/// Why a call waited in vain for instances: what there is, how far that can be trusted, and what failed last.
fn too_few(view: &View, count: usize, within: Duration) -> Error {
    let (seen, failure) = (view.load(), view.failure());
    if let Some(fatal) = failure.as_ref().filter(|error| !error.is_retryable()) {
        return fatal.clone();
    }
    let kind = match seen.freshness() {
        Freshness::Live | Freshness::Protected { .. } => ErrorKind::Timeout,
        Freshness::Pending | Freshness::Stale { .. } => ErrorKind::Unavailable,
    };
    let (service, have, all) = (seen.service(), seen.available().count(), seen.len());
    let freshness = seen.freshness();
    let message =
        format!("{service} has {have} of {count} available instances after {within:?} ({all} in all, {freshness})");
    let error = Error::new(kind, message);
    match failure {
        Some(cause) => error.with_source(cause),
        None => error,
    }
}

fn provider(service: &str, id: &str) -> Result<Key> {
    Ok(Key::provider(ServiceName::parse(service)?, InstanceId::parse(id)?))
}

pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the registry is closed")
}

/// Locks for a short critical section. What the lock guards is valid after every statement, so a panic elsewhere
/// does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Managed<memory::MemoryBackend> {
    /// The registry of a `memory://name` connection string: everything in this process that names it shares one store.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a malformed string or option, as [`Location::parse`](crate::Location::parse)
    /// and [`new`](Self::new).
    pub fn memory(url: &str) -> Result<Self> {
        let config = memory::MemoryConfig::from_location(crate::Location::parse(url)?)?;
        Self::new(memory::MemoryBackend::new(config.store(), config.options.ttl), config.options)
    }
}
