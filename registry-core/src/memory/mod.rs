//! The store inside the process: the reference for all other stores, the embedded default, and a double for tests.
//!
//! One [`MemoryStore`] behaves like a small server: records in the same [layout](NativeLayout) as everywhere, sessions
//! that expire, revisions, and a bounded log from which readers resume. One [`MemoryBackend`] is one client of it, and
//! its [`MemoryLink`] the network between the two, which tests can break.
//!
//! # Examples
//! Two clients of one store; the first one crashes.
//! ```
//! use std::time::Duration;
//!
//! use registry_core::{
//!     Backend, Content, Directory, Instance, Intent, Key, Lifetime, Record,
//!     memory::{MemoryBackend, MemoryStore},
//! };
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> registry_core::Result<()> {
//! let store = MemoryStore::new();
//! let writer = MemoryBackend::new(store.clone(), Duration::from_secs(15));
//! let reader = MemoryBackend::new(store.clone(), Duration::from_secs(15));
//!
//! let instance = Instance::builder("orders", "1").build()?;
//! let record = Record {
//!     key: Key::provider(instance.service.clone(), instance.id.clone()),
//!     owner: writer.owner().clone(),
//!     epoch: 0,
//!     lifetime: Lifetime::Session,
//!     content: Content::Instance(instance.into()),
//! };
//! assert_eq!(writer.put(&[record.clone()], Intent::Claim).await.remove(0)?, 1);
//! assert_eq!(reader.list(&record.key.service, Directory::Providers).await?.len(), 1);
//!
//! store.expire(writer.owner());
//! assert!(reader.list(&record.key.service, Directory::Providers).await?.is_empty());
//! # Ok(())
//! # }
//! ```

mod feed;
mod link;
mod store;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, mem,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt, stream, stream::BoxStream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::{
    feed::{Feed, Reader},
    store::{Bytes, Position, SessionId, State, lock},
};
use crate::{
    Backend, Cursor, Directory, Epoch, Error, ErrorKind, InstanceId, Intent, Key, Layout, Lifetime, Location,
    NativeLayout, Options, Owner, Place, Record, Renewal, Result, ServiceName, SessionEvent, Updates, async_trait,
};

pub use self::{link::MemoryLink, store::MemoryStore};

pub(crate) const NAME: &str = "memory";

/// How many departures a mark remembers beyond those of the last removal.
const MARK_IDS: usize = 256;

/// Which store, and the policy of the registry on it.
///
/// # Examples
/// ```
/// use std::time::Duration;
///
/// use registry_core::{Location, memory::MemoryConfig};
///
/// let config = MemoryConfig::from_location(Location::parse("memory://shop/eu?ttl=3s")?)?;
/// assert_eq!(config.name.as_deref(), Some("shop/eu"));
/// assert_eq!(config.options.ttl, Duration::from_secs(3));
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// The name under which the store is shared inside the process. Defaults to none: a private store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The policy of the registry.
    pub options: Options,
}

impl MemoryConfig {
    /// Reads `memory://name[/prefix][?option=value…]`, in which the prefix is a part of the name, or `memory://` for
    /// a private store.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for anything else, such as a user, a port, or an option that is not one of
    /// [`Options`].
    pub fn from_location(mut location: Location) -> Result<Self> {
        let bad = |why: &str| Err(Error::invalid(format!("invalid {location}: {why}; expected memory://[name]")));
        let name = match location.hosts() {
            _ if location.scheme() != NAME => return bad("the scheme is not memory"),
            _ if location.user().is_some() || location.password().is_some() => return bad("there are no users"),
            [] if location.prefix().is_empty() => None,
            [] => return bad("there is a prefix but no name"),
            [host] if host.port.is_some() => return bad("there are no ports"),
            [host] if location.prefix().is_empty() => Some(host.name.clone()),
            [host] => Some(format!("{}/{}", host.name, location.prefix())),
            _ => return bad("there is more than one name"),
        };
        let options = Options::take_from(&mut location)?;
        location.finish(Options::NAMES)?;
        Ok(Self { name, options })
    }

    /// The store that is meant: a new one each time if there is no name.
    #[must_use]
    pub fn store(&self) -> MemoryStore {
        self.name.as_deref().map_or_else(MemoryStore::new, MemoryStore::named)
    }

    /// Sets [`name`](Self::name): a name, or `None` for a private store.
    #[must_use]
    pub fn name(self, name: impl Into<Option<String>>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Sets [`options`](Self::options).
    #[must_use]
    pub fn options(self, options: Options) -> Self {
        Self { options, ..self }
    }
}

/// One client of a [`MemoryStore`].
///
/// Its session starts with the first record that needs one and lives as long as [`renew`](Backend::renew) arrives.
/// Dropped without [`close`](Backend::close) it is a process that crashed: its records go when the ttl is over.
pub struct MemoryBackend {
    store: MemoryStore,
    link: MemoryLink,
    owner: Owner,
    ttl: Duration,
    /// Only looked at inside of a transaction, so it is as true as the store.
    session: Mutex<Session>,
    /// Until the engine takes them.
    events: Mutex<Option<mpsc::UnboundedReceiver<SessionEvent>>>,
    reader: Arc<Reader>,
}

/// `Never ─put→ Live ─expired→ Lost ─put→ Live`
#[derive(Clone, Copy)]
enum Session {
    Never,
    Live(SessionId),
    Lost,
}

impl MemoryBackend {
    /// A client under a new owner token, whose session lives for `ttl` after each renewal.
    #[must_use]
    pub fn new(store: MemoryStore, ttl: Duration) -> Self {
        let (link, events) = MemoryLink::new(ttl);
        Self {
            store,
            link,
            owner: Owner::random(),
            ttl,
            session: Mutex::new(Session::Never),
            events: Mutex::new(Some(events)),
            reader: Arc::default(),
        }
    }

    /// The network between this client and the store, to break it.
    #[must_use]
    pub fn link(&self) -> MemoryLink {
        self.link.clone()
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// How often this client has skipped a malformed record.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.reader.malformed()
    }

    /// One request and its answer: what the transaction changes is one revision.
    async fn call<T>(&self, transaction: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut call = self.link.call();
        call.request().await?;
        let answer = self.store.serve(transaction);
        call.answer().await?;
        answer
    }

    /// Our session, if it lives. Tells once when it does not any more.
    fn session(&self, state: &State) -> Option<SessionId> {
        let mut session = lock(&self.session);
        match *session {
            Session::Live(id) if state.is_alive(id) => Some(id),
            Session::Live(_) => {
                *session = Session::Lost;
                self.link.tell(SessionEvent::Lost);
                None
            }
            Session::Never | Session::Lost => None,
        }
    }

    fn session_or_new(&self, state: &mut State) -> SessionId {
        if let Some(id) = self.session(state) {
            return id;
        }
        let id = state.open_session(&self.owner, self.ttl);
        if matches!(mem::replace(&mut *lock(&self.session), Session::Live(id)), Session::Lost) {
            self.link.tell(SessionEvent::Renewed);
        }
        id
    }

    fn write(&self, state: &mut State, record: &Record, why: Intent) -> Result<Epoch> {
        let key = &record.key;
        let held = decode(state, key);
        let epoch = match (why, &held) {
            (Intent::Claim, held) => held.as_ref().map_or(0, |held| held.epoch).saturating_add(1),
            (Intent::Restore, Some(held)) if held.owner != self.owner => {
                return Err(conflict(format!("cannot restore {key}: it is held by another owner")));
            }
            (Intent::Restore, Some(held)) if held.epoch > record.epoch => {
                let (held, ours) = (held.epoch, record.epoch);
                return Err(conflict(format!(
                    "cannot restore {key}: it is held at epoch {held}, which is above {ours}"
                )));
            }
            (Intent::Restore, _) => record.epoch,
        };
        // Encoded before anything is changed: a record that is too large leaves no trace.
        let entries = NativeLayout.encode(&Record { owner: self.owner.clone(), epoch, ..record.clone() })?;
        let session = match record.lifetime {
            Lifetime::Session => Some(self.session_or_new(state)),
            Lifetime::Persistent => None,
        };
        if held.is_none() && key.directory == Directory::Providers {
            unmark(state, key);
        }
        for entry in entries {
            state.set(entry.path, &entry.bytes, session);
        }
        Ok(epoch)
    }

    /// Removes what is ours, with marks; for each key whether it was.
    fn withdraw(&self, state: &mut State, keys: &[Key]) -> Vec<bool> {
        let mut left: BTreeMap<&ServiceName, Vec<InstanceId>> = BTreeMap::new();
        let mut withdraw = |key| {
            let ours = || decode(state, key).is_some_and(|held| held.owner == self.owner);
            let removed = (key.directory == Directory::Overrides || ours()) && state.unset(&NativeLayout.path(key));
            if removed && key.directory == Directory::Providers {
                left.entry(&key.service).or_default().push(key.id.clone());
            }
            removed
        };
        let removed = keys.iter().map(&mut withdraw).collect();
        for (service, ids) in left {
            self.mark(state, service, &ids);
        }
        removed
    }

    /// Adds to our departure mark, which lives as long as our session.
    fn mark(&self, state: &mut State, service: &ServiceName, ids: &[InstanceId]) {
        let session = self.session_or_new(state);
        let path = NativeLayout.mark(service, &self.owner);
        let mut left = state.get(&path).map(|mark| NativeLayout.decode_mark(&mark.bytes)).unwrap_or_default();
        left.drain(..left.len().saturating_sub(MARK_IDS));
        left.extend_from_slice(ids);
        state.set(path, &NativeLayout.encode_mark(&left), Some(session));
    }

    /// Whether the store holds the key for us and keeps it alive.
    fn holds(&self, state: &State, session: Option<SessionId>, key: &Key) -> bool {
        let Some(item) = state.get(&NativeLayout.path(key)) else { return false };
        let persistent = item.session.is_none() && key.directory == Directory::Overrides;
        (persistent || item.session.is_some() && item.session == session)
            && decode(state, key).is_some_and(|held| held.owner == self.owner)
    }
}

#[async_trait]
impl Backend for MemoryBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }

    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        let written = self.call(|state| match self.link.refusal(records) {
            Some(error) => Err(error),
            None => Ok(records.iter().map(|record| self.write(state, record, why)).collect()),
        });
        written.await.unwrap_or_else(|error| vec![Err(error); records.len()])
    }

    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        match self.call(|state| Ok(self.withdraw(state, keys))).await {
            Ok(removed) => removed.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error); keys.len()],
        }
    }

    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        let renewed = self.call(|state| {
            let session = self.session(state);
            if let Some(session) = session {
                state.extend(session, self.ttl);
            }
            Ok(Renewal::missing(keys.iter().filter(|key| !self.holds(state, session, key)).cloned().collect()))
        });
        renewed.await
    }

    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        let verified = self.call(|state| {
            let session = self.session(state);
            let mut held: BTreeSet<Key> = keys.iter().filter(|key| self.holds(state, session, key)).cloned().collect();
            let alive = session.into_iter().flat_map(|session| state.paths_of(session));
            held.extend(alive.filter_map(key_of));
            Ok(held.into_iter().collect())
        });
        verified.await
    }

    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        let directory = NativeLayout.directory(service, directory);
        let listed = self.call(|state| Ok(entries(state, &directory, |path| path.starts_with(&directory))));
        Ok(self.reader.records(&listed.await?))
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        let since = since.as_ref().map(Position::parse);
        let (feed, first) = self.call(|state| Ok(Feed::open(state, self, service, since))).await?;
        Ok(feed.stream(first).boxed())
    }

    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        let at = Position::parse(at);
        self.call(|state| Ok(feed::has_news(state, service, at))).await
    }

    async fn services(&self) -> Result<Vec<ServiceName>> {
        let named = self.call(|state| {
            let keys = state.scan("", |_| true).filter_map(|(path, _)| key_of(path));
            let names: BTreeSet<ServiceName> =
                keys.filter(|key| key.directory == Directory::Providers).map(|key| key.service).collect();
            Ok(names.into_iter().collect())
        });
        named.await
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        match lock(&self.events).take() {
            Some(mut events) => stream::poll_fn(move |context| events.poll_recv(context)).boxed(),
            None => stream::empty().boxed(),
        }
    }

    async fn close(&self, keys: &[Key]) -> Result<()> {
        let closed = self.call(|state| {
            self.withdraw(state, keys);
            // Its own revision, so that followers see the marks before they go with the session.
            state.commit();
            if let Some(session) = self.session(state) {
                state.end_session(session);
            }
            *lock(&self.session) = Session::Never;
            Ok(())
        });
        closed.await
    }
}

impl fmt::Debug for MemoryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBackend")
            .field("owner", &self.owner)
            .field("ttl", &self.ttl)
            .field("link", &self.link)
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

/// The record of a key; what cannot be decoded counts as absent.
fn decode(state: &State, key: &Key) -> Option<Record> {
    let path = NativeLayout.path(key);
    let item = state.get(&path)?;
    NativeLayout.decode(key, &[(&path, &item.bytes)]).ok()
}

fn key_of(path: &str) -> Option<Key> {
    match NativeLayout.place(path)? {
        Place::Record(key) => Some(key),
        Place::Mark(..) => None,
    }
}

fn is_mark(path: &str) -> bool {
    matches!(NativeLayout.place(path), Some(Place::Mark(..)))
}

fn entries(state: &State, from: &str, within: impl Fn(&str) -> bool) -> Vec<(String, Bytes)> {
    state.scan(from, within).map(|(path, item)| (path.to_owned(), Arc::clone(&item.bytes))).collect()
}

/// Takes a key that is registered again out of every mark: a reader that comes later must not take its next
/// disappearance for a departure.
fn unmark(state: &mut State, key: &Key) {
    let (from, _) = NativeLayout.followed(&key.service);
    let marks = state.scan(&from, is_mark).filter_map(|(path, mark)| {
        let mut left = NativeLayout.decode_mark(&mark.bytes);
        let all = left.len();
        left.retain(|id| *id != key.id);
        (left.len() < all).then(|| (path.to_owned(), left, mark.session))
    });
    let marks: Vec<_> = marks.collect();
    for (path, left, session) in marks {
        state.set(path, &NativeLayout.encode_mark(&left), session);
    }
}

fn conflict(message: String) -> Error {
    Error::new(ErrorKind::Conflict, message).with_backend(NAME)
}

fn unavailable(message: &str) -> Error {
    Error::new(ErrorKind::Unavailable, message).with_backend(NAME)
}
