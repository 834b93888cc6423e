//! What the cases share: options, bounds, instances, and ways to wait that say what they saw.

use std::{
    fmt::{self, Debug},
    future::Future,
    time::Duration,
};

use futures::{Stream, StreamExt};
use registry_core::{
    Change, Event, Freshness, Instance, Key, Layout, NativeLayout, Options, Record, RegistrationState, Snapshot,
    Watcher,
};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};

use crate::harness::{Client, Harness};

/// How long one call may take, in every case.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// How often what is registered is compared with the store, in every case.
pub const RECONCILE: Duration = Duration::from_secs(1);
/// For what has no stated bound.
pub const PATIENCE: Duration = Duration::from_secs(15);

const SECOND: Duration = Duration::from_secs(1);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The options of a case that needs no others.
#[must_use]
pub fn options<H: Harness>() -> Options {
    Options::default().ttl(H::ttl()).reconcile(RECONCILE).request_timeout(REQUEST_TIMEOUT).connect_timeout(SECOND)
}

/// [`options`] under which nothing is found out by the check.
#[must_use]
pub fn unchecked<H: Harness>() -> Options {
    options::<H>().reconcile(Duration::from_secs(3600))
}

/// A client with [`options`].
pub async fn client<H: Harness>(store: &H) -> Client {
    store.connect(options::<H>()).await
}

/// Within this, readers know what happened at the store.
#[must_use]
pub fn soon<H: Harness>() -> Duration {
    SECOND + H::slack()
}

/// Within this, a process that crashed is gone.
#[must_use]
pub fn gone<H: Harness>() -> Duration {
    H::ttl() + SECOND + H::slack()
}

/// Within this after the store or the way to it is back, what was lost is registered again.
#[must_use]
pub fn restored<H: Harness>() -> Duration {
    H::ttl() / 3 + SECOND + H::slack()
}

/// Within this, a call is answered, whatever the store does.
#[must_use]
pub fn answered<H: Harness>() -> Duration {
    REQUEST_TIMEOUT + H::slack()
}

/// An instance with one endpoint.
#[must_use]
pub fn instance(service: &str, id: &str) -> Instance {
    Instance::builder(service, id).endpoint("http://10.0.0.5:8080").build().expect("the instance is valid")
}

/// Many of them: `prefix-000`, `prefix-001` and so on.
#[must_use]
pub fn instances(service: &str, prefix: &str, count: usize) -> Vec<Instance> {
    (0..count).map(|index| instance(service, &format!("{prefix}-{index:03}"))).collect()
}

/// The same instance with another weight.
#[must_use]
pub fn weighing(mut instance: Instance, weight: u32) -> Instance {
    instance.weight = weight;
    instance
}

/// An instance whose record is larger than a record may be.
#[must_use]
pub fn oversize(service: &str, id: &str) -> Instance {
    let mut instance = instance(service, id);
    instance.metadata.insert("ballast".to_owned(), "x".repeat(registry_core::MAX_RECORD_BYTES));
    instance
}

/// The key of an instance.
#[must_use]
pub fn key(service: &str, id: &str) -> Key {
    Key::provider(service.parse().expect("a service name"), id.parse().expect("an id"))
}

/// The ids in a snapshot, in order.
#[must_use]
pub fn ids(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.instances().iter().map(|instance| instance.id.as_str()).collect()
}

/// What the store holds under a key.
pub async fn record<H: Harness>(store: &H, key: &Key) -> Option<Record> {
    let bytes = store.raw(key).await?;
    Some(NativeLayout.decode(key, &[("", &bytes)]).expect("the record is well-formed"))
}

/// Registers all of them, and fails if one fails.
pub async fn register_all(client: &Client, instances: Vec<Instance>) {
    for outcome in client.registry.register_all(instances).await {
        outcome.expect("register");
    }
}

/// The states of a client's registrations, in order.
#[must_use]
pub fn states(client: &Client) -> Vec<RegistrationState> {
    client.registry.registrations().into_iter().map(|registration| registration.state).collect()
}

/// Whether everything that a client registered is registered.
#[must_use]
#[allow(clippy::ptr_arg, reason = "as `eventually` passes it on")]
pub fn all_registered(states: &Vec<RegistrationState>) -> bool {
    !states.is_empty() && states.iter().all(RegistrationState::is_registered)
}

/// Waits until what `look` sees fulfils `holds`, and returns it.
///
/// # Panics
/// If it does not within the time; says what was expected and what was seen last.
pub async fn eventually<T: Debug, F: Future<Output = T>>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> F,
    mut holds: impl FnMut(&T) -> bool,
) -> T {
    let start = Instant::now();
    loop {
        let seen = look().await;
        if holds(&seen) {
            return seen;
        }
        assert!(start.elapsed() < within, "not within {within:?}: {what}; seen last: {seen:?}");
        sleep(LOOK).await;
    }
}

/// Waits for the whole time, in which nothing that `look` sees may fulfil `holds`.
///
/// # Panics
/// If it does; says what was not expected and what was seen.
pub async fn never_within<T: Debug, F: Future<Output = T>>(
    what: &str,
    during: Duration,
    mut look: impl FnMut() -> F,
    mut holds: impl FnMut(&T) -> bool,
) {
    let start = Instant::now();
    while start.elapsed() < during {
        let seen = look().await;
        assert!(!holds(&seen), "after {:?}, never expected: {what}; seen: {seen:?}", start.elapsed());
        sleep(LOOK).await;
    }
}

/// Waits until a condition has held for `quiet` without a break.
///
/// # Panics
/// If it never begins to within the time.
pub async fn eventually_for_good<T: Debug, F: Future<Output = T>>(
    what: &str,
    within: Duration,
    quiet: Duration,
    mut look: impl FnMut() -> F,
    mut holds: impl FnMut(&T) -> bool,
) {
    let start = Instant::now();
    let mut since = None;
    loop {
        let seen = look().await;
        if holds(&seen) {
            if since.get_or_insert_with(Instant::now).elapsed() >= quiet {
                return;
            }
        } else {
            assert!(start.elapsed() < within, "not for good within {within:?}: {what}; seen last: {seen:?}");
            since = None;
        }
        sleep(LOOK).await;
    }
}

/// What a call gives, which must come within the time.
///
/// # Panics
/// If it does not.
pub async fn in_time<T>(what: &str, within: Duration, call: impl Future<Output = T>) -> T {
    timeout(within, call).await.unwrap_or_else(|_| panic!("no answer within {within:?}: {what}"))
}

/// Everything that a stream gave, from the moment it was made.
struct Recorder<T> {
    items: watch::Sender<Vec<T>>,
    task: AbortHandle,
}

impl<T: Clone + Send + Sync + 'static> Recorder<T> {
    fn new(items: impl Stream<Item = T> + Send + 'static) -> Self {
        let sender = watch::Sender::new(Vec::new());
        let recorded = sender.clone();
        let task = tokio::spawn(async move {
            let mut items = std::pin::pin!(items);
            while let Some(item) = items.next().await {
                recorded.send_modify(|recorded| recorded.push(item));
            }
        });
        Self { items: sender, task: task.abort_handle() }
    }

    fn all(&self) -> Vec<T> {
        self.items.borrow().clone()
    }

    /// The first item from index `from` on, also one to come, for which `holds`.
    async fn find(&self, from: usize, within: Duration, mut holds: impl FnMut(&T) -> bool) -> Option<T> {
        let mut next = from;
        let mut items = self.items.subscribe();
        let search = items.wait_for(|items| {
            while let Some(item) = items.get(next) {
                if holds(item) {
                    return true;
                }
                next += 1;
            }
            false
        });
        match timeout(within, search).await {
            Ok(Ok(items)) => items.get(next).cloned(),
            _ => None,
        }
    }
}

impl<T> Drop for Recorder<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A reader of one service that remembers every snapshot it was given.
pub struct Observer(Recorder<Snapshot>);

impl Observer {
    /// Watches a service; returns with the first complete set.
    pub async fn of(client: &Client, service: &str) -> Self {
        let watcher = client.registry.watch(service).await.expect("watch");
        let observer = Self::over(watcher);
        observer.0.find(0, PATIENCE, |_| true).await.unwrap_or_else(|| panic!("no complete set of {service:?}"));
        observer
    }

    /// Reads a watcher.
    #[must_use]
    pub fn over(watcher: Watcher) -> Self {
        Self(Recorder::new(watcher.snapshots()))
    }

    /// Everything so far. Begins with the first complete set.
    #[must_use]
    pub fn history(&self) -> Vec<Snapshot> {
        self.0.all()
    }

    /// The latest snapshot.
    #[must_use]
    pub fn now(&self) -> Snapshot {
        self.history().pop().expect("there is a complete set")
    }

    /// The first snapshot from the present one on for which `holds`.
    ///
    /// # Panics
    /// If there is none within the time; says what was seen last.
    pub async fn until(&self, what: &str, within: Duration, holds: impl FnMut(&Snapshot) -> bool) -> Snapshot {
        let from = self.history().len().saturating_sub(1);
        let found = self.0.find(from, within, holds).await;
        found.unwrap_or_else(|| panic!("not seen within {within:?}: {what}; {self:?}"))
    }

    /// Waits until the service has exactly these instances.
    pub async fn until_ids(&self, within: Duration, expected: &[&str]) -> Snapshot {
        self.until(&format!("{expected:?}"), within, |seen| ids(seen) == expected).await
    }

    /// What changed between the snapshots since the first one, in order: `+id`, `~id`, `-id`.
    #[must_use]
    pub fn changes(&self) -> Vec<String> {
        let history = self.history();
        let pairs = history.iter().zip(history.iter().skip(1));
        let changes = pairs.flat_map(|(before, after)| after.changes_since(before));
        let spelled = changes.map(|change| match change {
            Change::Insert { after } => format!("+{}", after.id),
            Change::Update { after, .. } => format!("~{}", after.id),
            Change::Remove { before } => format!("-{}", before.id),
        });
        spelled.collect()
    }

    /// Fails if a snapshot so far was not as it should be.
    ///
    /// # Panics
    /// If there is one, naming it.
    pub fn assert_always(&self, what: &str, holds: impl Fn(&Snapshot) -> bool) {
        if let Some(bad) = self.history().iter().find(|seen| !holds(seen)) {
            panic!("not always: {what}; but once {}; {self:?}", Seen(bad));
        }
    }
}

impl Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let history = self.history();
        let last = history.iter().rev().take(8).rev().map(|seen| Seen(seen).to_string()).collect::<Vec<_>>();
        write!(f, "the last of {} snapshots: {}", history.len(), last.join(", then "))
    }
}

/// A snapshot in one line, however large.
struct Seen<'a>(&'a Snapshot);

impl fmt::Display for Seen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(seen) = self;
        write!(f, "#{} {} ", seen.revision(), seen.freshness())?;
        if seen.len() > 12 { write!(f, "{} instances", seen.len()) } else { write!(f, "{:?}", ids(seen)) }
    }
}

/// Whether a snapshot follows the store and holds nothing back.
#[must_use]
pub fn is_live(snapshot: &Snapshot) -> bool {
    snapshot.freshness() == Freshness::Live
}

/// Whether a snapshot is the last known set in an outage.
#[must_use]
pub fn is_stale(snapshot: &Snapshot) -> bool {
    matches!(snapshot.freshness(), Freshness::Stale { .. })
}

/// Whether a snapshot holds instances back.
#[must_use]
pub fn is_protected(snapshot: &Snapshot) -> bool {
    matches!(snapshot.freshness(), Freshness::Protected { .. })
}

/// What happens to a registry, remembered.
pub struct Events(Recorder<Event>);

impl Events {
    /// Listens from now on.
    #[must_use]
    pub fn of(client: &Client) -> Self {
        Self(Recorder::new(client.registry.events()))
    }

    /// The first event so far or to come for which `holds`.
    ///
    /// # Panics
    /// If there is none within the time; names all there were.
    pub async fn until(&self, what: &str, within: Duration, holds: impl FnMut(&Event) -> bool) -> Event {
        let found = self.0.find(0, within, holds).await;
        found.unwrap_or_else(|| panic!("no event within {within:?}: {what}; there were {:?}", self.0.all()))
    }

    /// Forgets all events so far.
    pub fn forget(&self) {
        self.0.items.send_modify(Vec::clear);
    }
}

impl Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&self.0.all(), f)
    }
}

/// How many tasks the runtime of this case has, those of the harness included, which asks the store first.
pub async fn tasks<H: Harness>(store: &H) -> usize {
    store.keys().await;
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// How many files and sockets this process has open; 0 where that cannot be told.
#[must_use]
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// How much memory this process has, in MiB; 0 where that cannot be told.
#[must_use]
pub fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.map_or(0.0, |kib| kib / 1024.0)
}
