//! The store: an ordered map with revisions, a log of what changed, and sessions that expire.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt, mem,
    ops::Bound,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{Cursor, Key, Layout, NativeLayout, Owner};

/// How many events the log keeps for readers that resume or are slow.
const LOG_EVENTS: usize = 10_000;

/// The named stores that somebody holds. Locked for one look-up, never across an `.await`.
static NAMED: LazyLock<Mutex<HashMap<String, Weak<Shared>>>> = LazyLock::new(Mutex::default);

/// A store inside the process: a cheap handle, whose clones share what it holds.
///
/// Everything is gone when the last handle, [`MemoryBackend`](super::MemoryBackend) and subscription is dropped. The
/// methods are hooks for tests: they do to the store what a server's operator, or an accident, would do.
///
/// A session's time is [tokio's](tokio::time), so paused and advanced time applies.
#[derive(Clone)]
pub struct MemoryStore(Arc<Shared>);

struct Shared {
    /// Held for short critical sections without any input or output, never across an `.await`.
    state: Mutex<State>,
    /// Wakes the subscriptions; nobody else holds a receiver, so that their number is the number of subscriptions.
    news: watch::Sender<()>,
    requests: AtomicU64,
}

impl MemoryStore {
    /// A new, empty store that only its clones share.
    #[must_use]
    pub fn new() -> Self {
        let (news, _) = watch::channel(());
        Self(Arc::new(Shared { state: Mutex::new(State::new()), news, requests: AtomicU64::new(0) }))
    }

    /// The store that is shared inside the process under this name, as long as anyone holds it.
    ///
    /// # Examples
    /// ```
    /// use registry_core::{Instance, Managed, Registry, memory::MemoryStore};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let store = MemoryStore::named("shop");
    /// let registry = Managed::memory("memory://shop")?;
    /// registry.register(Instance::builder("orders", "1").build()?).await?;
    /// assert_eq!(store.paths(), ["orders/providers/1"]);
    /// # registry.destroy().await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn named(name: &str) -> Self {
        let mut named = lock(&NAMED);
        if let Some(shared) = named.get(name).and_then(Weak::upgrade) {
            return Self(shared);
        }
        named.retain(|_, shared| shared.strong_count() > 0);
        let store = Self::new();
        named.insert(name.to_owned(), Arc::downgrade(&store.0));
        store
    }

    /// Ends this owner's session at once: all its records go in one revision, unmarked. Whether there was one.
    pub fn expire(&self, owner: &Owner) -> bool {
        self.with(|state| state.end_sessions(|session| session.owner == *owner))
    }

    /// Ends every session, each in a revision of its own.
    pub fn expire_all(&self) {
        self.with(|state| state.end_sessions(|_| true));
    }

    /// Loses a record, unmarked. Whether it was there.
    pub fn delete(&self, key: &Key) -> bool {
        self.with(|state| state.unset(&NativeLayout.path(key)))
    }

    /// Writes any bytes at a path such as `orders/providers/1`, under no session: a foreign or malformed record.
    pub fn put_raw(&self, path: &str, bytes: &[u8]) {
        self.with(|state| state.set(path.to_owned(), bytes, None));
    }

    /// The bytes at a path.
    #[must_use]
    pub fn get_raw(&self, path: &str) -> Option<Vec<u8>> {
        self.with(|state| state.get(path).map(|item| item.bytes.to_vec()))
    }

    /// Every path that is stored, departure marks included, in order.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        self.with(|state| state.items.keys().cloned().collect())
    }

    /// How many sessions live.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.with(|state| state.sessions.len())
    }

    /// How many subscriptions are open.
    #[must_use]
    pub fn watchers(&self) -> usize {
        self.0.news.receiver_count()
    }

    /// How many requests reached the store. The items of a subscription are none.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.0.requests.load(Ordering::Relaxed)
    }

    /// Starts another history, like a server that was killed and came back without its disk: every record and every
    /// session is gone, revisions start again, and open subscriptions end with
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable).
    pub fn wipe(&self) {
        self.with(State::wipe);
    }

    /// Forgets the event log: who was not up to date by now cannot resume and gets the complete set.
    pub fn compact(&self) {
        self.with(State::compact);
    }

    /// Like [`with`](Self::with), for a request that arrived over the network.
    pub(super) fn serve<T>(&self, transaction: impl FnOnce(&mut State) -> T) -> T {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
        self.with(transaction)
    }

    /// Runs a transaction: what it changes is one revision.
    ///
    /// Whoever looks first ends the sessions whose time is up, and a waiting subscription looks at the next deadline.
    /// So nobody sees an expired record, and there is no task that could die with somebody's runtime.
    pub(super) fn with<T>(&self, transaction: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.0.state);
        let before = state.at;
        let now = Instant::now();
        state.end_sessions(|session| session.deadline <= now);
        let result = transaction(&mut state);
        state.commit();
        let moved = state.at != before;
        drop(state);
        if moved {
            self.0.news.send_replace(());
        }
        result
    }

    /// Wakes its holder at every commit from now on. Counts as a subscription.
    pub(super) fn news(&self) -> watch::Receiver<()> {
        self.0.news.subscribe()
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.0.state);
        f.debug_struct("MemoryStore")
            .field("at", &state.at)
            .field("entries", &state.items.len())
            .field("sessions", &state.sessions.len())
            .field("watchers", &self.watchers())
            .finish_non_exhaustive()
    }
}

/// Locks in spite of a panic elsewhere: one failing test must not take the store from the others.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) type Bytes = Arc<[u8]>;

/// Never used twice in a store, whatever its history.
pub(super) type SessionId = u64;

/// A point in one history of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) history: u64,
    pub(super) revision: u64,
}

impl Position {
    pub(super) fn cursor(self) -> Cursor {
        Cursor::new(format!("{:016x}-{}", self.history, self.revision))
    }

    /// The point that a cursor spells; one in no history at all if it is not ours.
    pub(super) fn parse(cursor: &Cursor) -> Self {
        let parts = cursor.as_str().split_once('-');
        let parse = |(history, revision): (&str, &str)| {
            Some(Self { history: u64::from_str_radix(history, 16).ok()?, revision: revision.parse().ok()? })
        };
        parts.and_then(parse).unwrap_or(Self { history: 0, revision: 0 })
    }
}

pub(super) struct Item {
    pub(super) bytes: Bytes,
    pub(super) session: Option<SessionId>,
}

/// What is at a path now; no bytes: nothing any more.
pub(super) struct Event {
    pub(super) path: String,
    pub(super) bytes: Option<Bytes>,
}

/// The events of one revision.
pub(super) struct Commit {
    pub(super) at: Position,
    pub(super) events: Vec<Event>,
}

struct Session {
    owner: Owner,
    deadline: Instant,
}

pub(super) struct State {
    pub(super) at: Position,
    items: BTreeMap<String, Item>,
    /// What the running transaction has changed so far.
    changes: Vec<Event>,
    /// The commits up to the present one without a gap, the oldest first.
    log: VecDeque<Arc<Commit>>,
    /// How many events the log has.
    logged: usize,
    sessions: BTreeMap<SessionId, Session>,
    last_session: SessionId,
}

impl State {
    fn new() -> Self {
        Self {
            // Never 0: that is no history.
            at: Position { history: rand::random::<u64>() | 1, revision: 0 },
            items: BTreeMap::new(),
            changes: Vec::new(),
            log: VecDeque::new(),
            logged: 0,
            sessions: BTreeMap::new(),
            last_session: 0,
        }
    }

    pub(super) fn get(&self, path: &str) -> Option<&Item> {
        self.items.get(path)
    }

    /// What lies from `from` on, as long as the paths are within.
    pub(super) fn scan(&self, from: &str, within: impl Fn(&str) -> bool) -> impl Iterator<Item = (&str, &Item)> {
        let from = self.items.range::<str, _>((Bound::Included(from), Bound::Unbounded));
        from.map(|(path, item)| (path.as_str(), item)).take_while(move |(path, _)| within(path))
    }

    /// The paths that a session keeps alive.
    pub(super) fn paths_of(&self, session: SessionId) -> impl Iterator<Item = &str> {
        self.items.iter().filter(move |(_, item)| item.session == Some(session)).map(|(path, _)| path.as_str())
    }

    /// Writes. The same bytes under the same session are no change.
    pub(super) fn set(&mut self, path: String, bytes: &[u8], session: Option<SessionId>) {
        if self.get(&path).is_some_and(|item| *item.bytes == *bytes && item.session == session) {
            return;
        }
        let bytes = Bytes::from(bytes);
        self.changes.push(Event { path: path.clone(), bytes: Some(Arc::clone(&bytes)) });
        self.items.insert(path, Item { bytes, session });
    }

    pub(super) fn unset(&mut self, path: &str) -> bool {
        let Some((path, _)) = self.items.remove_entry(path) else { return false };
        self.changes.push(Event { path, bytes: None });
        true
    }

    /// Makes one revision of the changes so far, if there are any.
    pub(super) fn commit(&mut self) {
        if self.changes.is_empty() {
            return;
        }
        self.at.revision += 1;
        self.logged += self.changes.len();
        self.log.push_back(Arc::new(Commit { at: self.at, events: mem::take(&mut self.changes) }));
        // The newest commit stays, however large: those who are up to date need no more than that.
        while self.logged > LOG_EVENTS && self.log.len() > 1 {
            self.logged -= self.log.pop_front().map_or(0, |commit| commit.events.len());
        }
    }

    /// The commits after a revision of this history, or `None` if the log does not have them all.
    pub(super) fn after(&self, revision: u64) -> Option<impl Iterator<Item = &Arc<Commit>>> {
        let behind = usize::try_from(self.at.revision.checked_sub(revision)?).ok()?;
        Some(self.log.range(self.log.len().checked_sub(behind)?..))
    }

    pub(super) fn open_session(&mut self, owner: &Owner, ttl: Duration) -> SessionId {
        self.last_session += 1;
        self.sessions.insert(self.last_session, Session { owner: owner.clone(), deadline: deadline(ttl) });
        self.last_session
    }

    pub(super) fn is_alive(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    pub(super) fn extend(&mut self, session: SessionId, ttl: Duration) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.deadline = deadline(ttl);
        }
    }

    /// Ends a session; everything under it goes in one revision.
    pub(super) fn end_session(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        let paths: Vec<String> = self.paths_of(session).map(ToOwned::to_owned).collect();
        for path in paths {
            self.unset(&path);
        }
        self.commit();
    }

    fn end_sessions(&mut self, which: impl Fn(&Session) -> bool) -> bool {
        let ended: Vec<SessionId> =
            self.sessions.iter().filter(|(_, session)| which(session)).map(|(&id, _)| id).collect();
        for &session in &ended {
            self.end_session(session);
        }
        !ended.is_empty()
    }

    /// When the next session ends unless it is renewed.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.sessions.values().map(|session| session.deadline).min()
    }

    fn compact(&mut self) {
        self.log.clear();
        self.logged = 0;
    }

    fn wipe(&mut self) {
        *self = Self { last_session: self.last_session, ..Self::new() };
    }
}

fn deadline(ttl: Duration) -> Instant {
    // A ttl that means "for ever" must not overflow.
    Instant::now() + ttl.min(Duration::from_secs(365 * 24 * 60 * 60))
}
