//! The balancer: a watcher, the task that keeps its tables true, and the picks that read them.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use arc_swap::ArcSwap;
use crossbeam_utils::CachePadded;
use registry_core::{
    Change, Error, ErrorKind, Freshness, Instance, InstanceId, Result, ServiceName, Snapshot, Status, Watcher,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::{
    Fallback, Filter, Outlier, Pick, Route,
    counter::Counter,
    member::{Counts, Entry, Signals},
    metrics::{Metrics, Outcome, Ticks},
    outlier::Standing,
    table::{Candidate, Census, PARTS, Room, Table},
};

/// A new instance gets its weight in so many steps while it warms up.
const WARM_STEPS: u32 = 20;

/// How an instance is chosen among those that take traffic.
///
/// All but [`RoundRobin`](Self::RoundRobin) give an instance the share of its weight as long as nothing else speaks
/// against it. Those that are not up, or whose weight is 0, get nothing with any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Strategy {
    /// One after the other, whatever their weights.
    #[default]
    RoundRobin,
    /// One after the other, each as often as its weight says, evenly spread: smooth weighted round robin.
    Weighted,
    /// At random by weight.
    Random,
    /// The one with the fewest calls of this process in flight for its weight. Looks at all of them when none is idle.
    LeastLoaded,
    /// The better of two that are drawn by weight: by calls in flight and by how long calls took lately. The right one
    /// for most calls over a network; the only one that notices a slow instance.
    PowerOfTwo,
    /// By a key: the same key goes to the same instance, in every process, as long as it takes traffic and has no more
    /// than 1.25 times its share in flight. One instance more or less of n moves about 1/n of the keys.
    ///
    /// Give the key to [`pick_for`](Balancer::pick_for); the caller's name as the key makes its calls stick to one
    /// instance. Without a key, at random.
    ConsistentHash,
}

/// Picks one of a service's instances for each call. Cheap to clone; clones share everything.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use registry_balance::{Balancer, Filter, Outlier, Strategy};
/// use registry_core::{Instance, Managed, Registry};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-balancer")?;
/// registry.register(Instance::builder("orders", "1").zone("eu-1a").version("2").build()?).await?;
///
/// let orders = Balancer::builder(registry.watch("orders").await?)
///     .strategy(Strategy::PowerOfTwo)
///     .filter(Filter::version("2"))
///     .zone("eu-1a")
///     .warm_up(Duration::from_secs(30))
///     .outlier(Outlier::default())
///     .build()?;
/// assert_eq!(orders.pick()?.id().as_str(), "1");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Balancer {
    facet: Arc<Facet>,
    shared: Arc<Shared>,
}

/// What callers of one route see.
struct Facet {
    route: Option<Route>,
    counter: Counter,
    table: ArcSwap<Table>,
    len: watch::Sender<usize>,
}

/// What all of them have in common.
struct Shared {
    /// Never read from, only cloned.
    watcher: Watcher,
    config: Config,
    signals: Arc<Signals>,
    /// Held for bookkeeping only, never across an await, and never by a pick.
    state: Mutex<State>,
    _stop: DropGuard,
}

struct Config {
    strategy: Strategy,
    filter: Option<Filter>,
    zone: Option<String>,
    warm_up: Duration,
    outlier: Option<Outlier>,
}

struct State {
    /// What the members are made from.
    snapshot: Option<Snapshot>,
    members: BTreeMap<InstanceId, Member>,
    facets: Vec<Weak<Facet>>,
    /// When failures are counted again.
    window_ends: Instant,
}

struct Member {
    entry: Arc<Entry>,
    standing: Standing,
    /// When it was first seen to take traffic; `None`: before we looked, or not yet.
    warm_since: Option<Instant>,
}

impl Balancer {
    /// A balancer with this strategy and defaults for all else.
    ///
    /// # Errors
    /// As for [`BalancerBuilder::build`].
    pub fn new(watcher: Watcher, strategy: Strategy) -> Result<Self> {
        Self::builder(watcher).strategy(strategy).build()
    }

    /// Starts a balancer over what a watcher follows.
    pub fn builder(watcher: Watcher) -> BalancerBuilder {
        let config =
            Config { strategy: Strategy::default(), filter: None, zone: None, warm_up: Duration::ZERO, outlier: None };
        BalancerBuilder { watcher, config }
    }

    /// The service.
    #[must_use]
    pub fn service(&self) -> &ServiceName {
        self.shared.watcher.service()
    }

    /// A watcher of the service, for what must follow it beside the balancer: all instances, whoever takes traffic.
    #[must_use]
    pub fn watcher(&self) -> Watcher {
        self.shared.watcher.clone()
    }

    /// The instance for the next call: no `async`, no lock, no allocation.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if nobody takes traffic, saying why.
    pub fn pick(&self) -> Result<Pick> {
        self.pick_other(&[])
    }

    /// The instance for a call with this key, which matters to [`Strategy::ConsistentHash`] alone.
    ///
    /// # Errors
    /// As for [`pick`](Self::pick).
    pub fn pick_for(&self, key: impl AsRef<[u8]>) -> Result<Pick> {
        self.choose(Some(key.as_ref()), &[])
    }

    /// The instance for a call that was made at `tried` already: none of those.
    ///
    /// # Errors
    /// As for [`pick`](Self::pick); also if all were tried.
    pub fn pick_other(&self, tried: &[InstanceId]) -> Result<Pick> {
        self.choose(None, tried)
    }

    fn choose(&self, key: Option<&[u8]>, tried: &[InstanceId]) -> Result<Pick> {
        let table = self.facet.table.load();
        let started = self.shared.signals.now();
        match table.pick(&self.facet.counter, key, tried, started) {
            Some((slot, trying)) => Ok(Pick::new(slot.clone(), started, trying)),
            None => Err(self.nobody(&table, tried.len())),
        }
    }

    /// How many instances take traffic from this balancer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.facet.table.load().len()
    }

    /// Whether none does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until at least `n` instances take traffic from this balancer.
    ///
    /// # Cancel safety
    /// Safe in `select!`: it only waits.
    pub async fn ready(&self, n: usize) {
        // The sender is in the facet, which is held.
        let _ = self.facet.len.subscribe().wait_for(|len| *len >= n).await;
    }

    /// A balancer for callers of a route. It shares what is in flight and who is ejected with this one.
    #[must_use]
    pub fn routed(&self, route: Route) -> Self {
        let facet = Arc::new(Facet::new(Some(route)));
        let mut state = self.shared.state();
        state.facets.retain(|facet| facet.strong_count() > 0);
        state.facets.push(Arc::downgrade(&facet));
        state.build(&facet, &self.shared.config, Instant::now());
        drop(state);
        Self { facet, shared: self.shared.clone() }
    }

    #[cold]
    fn nobody(&self, table: &Table, tried: usize) -> Error {
        self.shared.signals.metrics.picked(Outcome::NOBODY);
        let service = self.service();
        let freshness = self.shared.state().freshness();
        if freshness == Freshness::Pending {
            return unavailable(format!("no instance of {service} is known yet: the store has not answered"));
        }
        let Census { registered, filtered, elsewhere, off, ejected } = table.census;
        let reasons = [
            (off, "not up, or with weight 0"),
            (filtered, "not wanted by the filter"),
            (elsewhere, "not on the route"),
            (ejected, "ejected"),
            (tried, "tried already"),
        ];
        let reasons: Vec<_> =
            reasons.iter().filter(|(count, _)| *count > 0).map(|(count, why)| format!("{count} {why}")).collect();
        let reasons = if reasons.is_empty() { String::new() } else { format!(", {}", reasons.join(", ")) };
        unavailable(format!("no instance of {service} takes traffic: {registered} registered{reasons} ({freshness})"))
    }
}

fn unavailable(message: String) -> Error {
    Error::new(ErrorKind::Unavailable, message)
}

impl fmt::Debug for Balancer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balancer")
            .field("service", self.service())
            .field("strategy", &self.shared.config.strategy)
            .field("route", &self.facet.route)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// Builds a [`Balancer`].
#[must_use]
pub struct BalancerBuilder {
    watcher: Watcher,
    config: Config,
}

impl BalancerBuilder {
    /// Sets how an instance is chosen. Defaults to [`Strategy::RoundRobin`].
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.config.strategy = strategy;
        self
    }

    /// Leaves out what a filter does not match. Several filters must all match.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.config.filter = Some(match self.config.filter.take() {
            Some(other) => other.and(filter),
            None => filter,
        });
        self
    }

    /// Prefers the instances of a zone, this process's own.
    ///
    /// As much goes to other zones as the own one lacks: nothing as long as 1 / 1.4 of its weight takes traffic, 30 %
    /// when half of it does, everything when none does. Instances that are draining do not count.
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.config.zone = Some(zone.into());
        self
    }

    /// Lets the weight of an instance grow to its own over this time, from when this balancer first saw it take traffic.
    /// Those that took traffic before the balancer was made are warm. Defaults to 0 s: at once.
    ///
    /// Has no effect with [`Strategy::RoundRobin`], which knows no weights.
    pub fn warm_up(mut self, warm_up: Duration) -> Self {
        self.config.warm_up = warm_up;
        self
    }

    /// Ejects instances that fail, by these rules. Off unless this is called.
    pub fn outlier(mut self, rules: Outlier) -> Self {
        self.config.outlier = Some(rules);
        self
    }

    /// The finished balancer, with a task that follows the service until the last clone is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if a rule is out of range or there is no tokio runtime.
    pub fn build(self) -> Result<Balancer> {
        let Self { watcher, config } = self;
        config.outlier.as_ref().map_or(Ok(()), Outlier::validate)?;
        let runtime = Handle::try_current()
            .map_err(|error| Error::invalid("a balancer must be made inside a tokio runtime").with_source(error))?;
        let stop = CancellationToken::new();
        let facet = Arc::new(Facet::new(None));
        let now = Instant::now();
        let shared = Arc::new(Shared {
            watcher: watcher.clone(),
            signals: Arc::new(Signals {
                wake: Notify::new(),
                in_flight: CachePadded::default(),
                start: now,
                counts: config.counts(),
                view: watcher.handle(),
                metrics: Metrics::new(watcher.service()),
            }),
            state: Mutex::new(State {
                snapshot: None,
                members: BTreeMap::new(),
                facets: vec![Arc::downgrade(&facet)],
                window_ends: now + config.outlier.as_ref().map_or(Duration::ZERO, |rules| rules.window),
            }),
            config,
            _stop: stop.clone().drop_guard(),
        });
        shared.turn(Some(Snapshot::clone(&watcher.current())));
        let task = run(Arc::downgrade(&shared), watcher, shared.signals.clone());
        runtime.spawn(async move { stop.run_until_cancelled(task).await });
        Ok(Balancer { facet, shared })
    }
}

impl fmt::Debug for BalancerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalancerBuilder").field("service", self.watcher.service()).finish_non_exhaustive()
    }
}

/// Keeps the tables true until the last balancer is gone.
async fn run(shared: Weak<Shared>, mut watcher: Watcher, signals: Arc<Signals>) {
    let mut next = Some(Instant::now());
    let mut ended = false;
    let mut ticks = Ticks::new();
    loop {
        let snapshot = tokio::select! {
            snapshot = watcher.next(), if !ended => {
                // The registry is closed: the last set is as good as it gets.
                ended = snapshot.is_none();
                snapshot
            }
            () = signals.wake.notified() => None,
            () = ticks.next() => {
                signals.metrics.tell();
                continue;
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => None,
        };
        let Some(shared) = shared.upgrade() else { return };
        next = shared.turn(snapshot);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every statement leaves it valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what is new, and says when to look again.
    fn turn(&self, snapshot: Option<Snapshot>) -> Option<Instant> {
        let now = Instant::now();
        let mut state = self.state();
        let mut changed = false;
        if let Some(snapshot) = snapshot {
            changed |= state.follow(snapshot, &self.signals, now);
        }
        let mut next = None;
        if let Some(rules) = &self.config.outlier {
            changed |= state.judge(rules, self.watcher.service(), &self.signals.metrics, now);
            next = state.release(now, &mut changed);
            self.signals.metrics.ejected(state.ejected());
            next = earliest(next, (rules.failure_rate <= 1.0).then_some(state.window_ends));
        }
        let warmer = state.warm(self.config.warm_up, now, &mut changed);
        if changed {
            state.facets.retain(|facet| facet.strong_count() > 0);
            for facet in state.facets.iter().filter_map(Weak::upgrade) {
                state.build(&facet, &self.config, now);
            }
        }
        earliest(next, warmer)
    }
}

fn earliest(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

impl State {
    fn freshness(&self) -> Freshness {
        self.snapshot.as_ref().map_or(Freshness::Pending, Snapshot::freshness)
    }

    /// Makes the members those of the snapshot. `true`: something changed.
    fn follow(&mut self, snapshot: Snapshot, signals: &Arc<Signals>, now: Instant) -> bool {
        let first = self.freshness() == Freshness::Pending;
        let changes = match &self.snapshot {
            Some(before) => snapshot.changes_since(before),
            None => snapshot.instances().iter().map(|after| Change::Insert { after: after.clone() }).collect(),
        };
        let changed = !changes.is_empty() || self.snapshot.is_none();
        self.snapshot = Some(snapshot);
        for change in changes {
            match change {
                Change::Remove { before } => drop(self.members.remove(&before.id)),
                Change::Insert { after } => {
                    let warm_since = (!first && after.is_available()).then_some(now);
                    let id = after.id.clone();
                    let entry = Arc::new(Entry::new(after, signals.clone()));
                    self.members.insert(id, Member { entry, standing: Standing::default(), warm_since });
                }
                Change::Update { before, after } => {
                    let Some(member) = self.members.get_mut(&after.id) else { continue };
                    if is_new(&before, &after) {
                        member.warm_since = Some(now);
                    }
                    // Another record is another chance.
                    member.standing = Standing::default();
                    member.entry.load.record.forgive();
                    member.replace(after, false);
                }
            }
        }
        changed
    }

    /// Ejects those that failed, and trusts those that are well again. `true`: something changed.
    fn judge(&mut self, rules: &Outlier, service: &ServiceName, metrics: &Metrics, now: Instant) -> bool {
        let window_is_over = now >= self.window_ends;
        if window_is_over {
            self.window_ends = now + rules.window;
        }
        let most = rules.most(self.members.values().filter(|member| member.entry.slot.instance.is_available()).count());
        let mut ejected = self.members.values().filter(|member| !member.standing.is_trusted()).count();
        let mut changed = false;
        for member in self.members.values_mut() {
            let record = &member.entry.load.record;
            let mut failed = record.take_failed();
            let recovered = record.take_recovered();
            if window_is_over {
                let (calls, failures) = record.take_window();
                let rate = f64::from(failures) / f64::from(calls.max(1));
                failed |= calls >= rules.min_calls && failures > 0 && rate >= rules.failure_rate;
            }
            let id = &member.entry.slot.instance.id;
            if failed && !member.standing.is_ejected() && (member.standing.is_tried() || ejected < most) {
                ejected += usize::from(member.standing.is_trusted());
                let lasting = member.standing.eject(rules, now);
                warn!(%service, %id, ?lasting, "ejected: it fails its callers");
                metrics.eject();
                record.forgive();
                changed = true;
            } else if recovered && member.standing.is_tried() {
                member.standing.trust(now);
                ejected -= 1;
                info!(%service, %id, "no longer ejected");
                member.replace(member.entry.slot.instance.clone(), false);
                changed = true;
            }
        }
        changed
    }

    /// Tries those whose time is over, and says when the next one's is.
    fn release(&mut self, now: Instant, changed: &mut bool) -> Option<Instant> {
        let mut next = None;
        for member in self.members.values_mut().filter(|member| member.standing.is_ejected()) {
            next = earliest(next, member.standing.release(now));
            if member.standing.is_tried() {
                member.entry.load.record.forgive();
                member.replace(member.entry.slot.instance.clone(), true);
                *changed = true;
            }
        }
        next
    }

    fn ejected(&self) -> usize {
        self.members.values().filter(|member| member.standing.is_ejected()).count()
    }

    /// Gives those that warm up another step, and says when the next one is due.
    fn warm(&mut self, warm_up: Duration, now: Instant, changed: &mut bool) -> Option<Instant> {
        let mut warming = false;
        for member in self.members.values_mut().filter(|member| member.warm_since.is_some()) {
            *changed = true;
            member.warm_since = member.warm_since.filter(|since| now.duration_since(*since) < warm_up);
            warming |= member.warm_since.is_some();
        }
        warming.then(|| now + warm_up / WARM_STEPS)
    }

    /// Makes the table of a facet.
    fn build(&self, facet: &Facet, config: &Config, now: Instant) {
        let mut census = Census { registered: self.members.len(), ..Census::default() };
        let wanted = |member: &&Member| config.filter.as_ref().is_none_or(|filter| filter.matches(member.instance()));
        let (all, filtered): (Vec<_>, Vec<_>) = self.members.values().partition(wanted);
        census.filtered = filtered.len();
        let (mut on_route, elsewhere): (Vec<_>, Vec<_>) = match &facet.route {
            Some(route) => all.iter().copied().partition(|member| route.leads_to(member.instance())),
            None => (all.clone(), Vec::new()),
        };
        let prefers = facet.route.as_ref().is_some_and(|route| route.fallback == Fallback::Prefer);
        if prefers && !on_route.iter().any(|member| member.is_open()) {
            on_route = all;
        } else {
            census.elsewhere = elsewhere.len();
        }
        let up: Vec<_> = on_route.iter().copied().filter(|member| member.instance().is_available()).collect();
        census.off = on_route.len() - up.len();
        census.ejected = up.iter().filter(|member| member.standing.is_ejected()).count();
        // Whatever brought it about: those that are ejected are better than nobody.
        let spared = census.ejected < up.len();
        let takers = up.into_iter().filter(|member| !spared || !member.standing.is_ejected());
        let candidates: Vec<_> = takers
            .map(|member| Candidate { entry: member.entry.clone(), weight: member.weight(config.warm_up, now) })
            .collect();
        let zone = config.zone.as_deref().map(|zone| (zone, room(zone, &on_route)));
        let table = Table::new(config.strategy, candidates, zone, census);
        let len = table.len();
        facet.table.store(Arc::new(table));
        facet.len.send_if_modified(|before| std::mem::replace(before, len) != len);
    }
}

/// Whether it takes traffic now and did not before, or is another process.
fn is_new(before: &Instance, after: &Instance) -> bool {
    after.is_available() && (!before.is_available() || before.registered_at != after.registered_at)
}

/// The weight of a zone.
fn room(zone: &str, members: &[&Member]) -> Room {
    let mut room = Room::default();
    for member in members {
        let instance = member.instance();
        if instance.zone.as_deref() == Some(zone) && instance.status != Status::Draining {
            room.known += u64::from(instance.weight);
            room.open += if member.is_open() { u64::from(instance.weight) } else { 0 };
        }
    }
    room
}

impl Member {
    fn instance(&self) -> &Instance {
        &self.entry.slot.instance
    }

    fn is_open(&self) -> bool {
        self.instance().is_available() && !self.standing.is_ejected()
    }

    fn replace(&mut self, instance: Arc<Instance>, tried: bool) {
        self.entry = Arc::new(self.entry.next(instance, tried));
    }

    /// In parts; a twentieth at least while it warms up.
    fn weight(&self, warm_up: Duration, now: Instant) -> u64 {
        let whole = u64::from(self.instance().weight) * PARTS;
        let Some(since) = self.warm_since else { return whole };
        let warm = now.duration_since(since).as_secs_f64() / warm_up.as_secs_f64().max(f64::MIN_POSITIVE);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a positive number")]
        let part = (whole as f64 * warm.clamp(1.0 / f64::from(WARM_STEPS), 1.0)) as u64;
        part.max(1)
    }
}

impl Facet {
    fn new(route: Option<Route>) -> Self {
        Self { route, counter: Counter::new(), table: ArcSwap::default(), len: watch::Sender::new(0) }
    }
}

impl Config {
    fn counts(&self) -> Counts {
        Counts {
            time: self.strategy == Strategy::PowerOfTwo,
            total: self.strategy == Strategy::ConsistentHash,
            outcomes: self.outlier.as_ref().map(|rules| rules.consecutive),
        }
    }
}
