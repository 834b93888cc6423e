//! The implementors' contract: a liveness session, its connection, and a few verbs.
//!
//! A [`Backend`] never decides what to register again or when, never caches records and never backs off:
//! [`Managed`](crate::Managed) does, once, for all of them. A backend may fail at any time with an `Err`.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::{Instance, InstanceId, Override, Result, ServiceName};

/// Where in a service a record lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Directory {
    /// The instances of the service.
    Providers,
    /// Readers of the service that announce themselves.
    Consumers,
    /// What an operator sets from outside for an instance.
    Overrides,
}

impl Directory {
    /// The directory as the word that paths spell.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Providers => "providers",
            Self::Consumers => "consumers",
            Self::Overrides => "overrides",
        }
    }
}

/// The name of a record: directory, service and id.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The service.
    pub service: ServiceName,
    /// The directory within the service.
    pub directory: Directory,
    /// The id within the directory.
    pub id: InstanceId,
}

impl Key {
    /// The key of an instance.
    #[must_use]
    pub fn provider(service: ServiceName, id: InstanceId) -> Self {
        Self { service, directory: Directory::Providers, id }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.directory {
            Directory::Providers => write!(f, "{}/{}", self.service, self.id),
            other => write!(f, "{}/{}/{}", self.service, other.as_str(), self.id),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Who wrote a record: a random token, one per registry, new in every process.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(Arc<str>);

impl Owner {
    /// A new token of 128 random bits.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()).into())
    }

    /// The token of a stored record; any text that is a valid name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if it is not.
    pub fn parse(token: &str) -> Result<Self> {
        crate::name::check("owner token", token)?;
        Ok(Self(token.into()))
    }

    /// The token as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How often a key has been taken over: a claim raises it by one, a restore keeps it.
pub type Epoch = u64;

/// How long a record lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifetime {
    /// As long as its owner's session.
    Session,
    /// Until it is removed.
    Persistent,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Content {
    /// An instance, in [`Directory::Providers`] or [`Directory::Consumers`].
    Instance(Arc<Instance>),
    /// An operator's override, in [`Directory::Overrides`].
    Override(Override),
}

/// One record as the store holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its name.
    pub key: Key,
    /// Who wrote it.
    pub owner: Owner,
    /// How often the key has been taken over. In a [`Backend::put`] with [`Intent::Claim`] it is ignored.
    pub epoch: Epoch,
    /// How long it lives.
    pub lifetime: Lifetime,
    /// What it says.
    pub content: Content,
}

/// Why a record is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Intent {
    /// Take the key over from whoever holds it and raise its epoch, by compare-and-set. Repeated, it raises it again.
    Claim,
    /// Write only where the key is absent, or ours with an epoch not above the record's; otherwise
    /// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict). What cannot be decoded has no owner and counts as absent.
    Restore,
}

/// What [`Backend::renew`] learned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Renewal {
    /// Those of the keys that are known to be missing under our session.
    pub missing: Vec<Key>,
    /// How long ago the store last answered, where it was not asked now. The session is taken to live a ttl from then.
    pub age: Duration,
}

impl Renewal {
    /// A renewal that found these keys missing.
    #[must_use]
    pub fn missing(missing: Vec<Key>) -> Self {
        Self { missing, age: Duration::ZERO }
    }

    /// The same, of a store that answered so long ago and was not asked now.
    #[must_use]
    pub fn aged(self, age: Duration) -> Self {
        Self { age, ..self }
    }
}

/// A position in the store's history. Opaque to the engine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cursor(Arc<str>);

impl Cursor {
    /// A position spelled by the backend.
    pub fn new(position: impl Into<Arc<str>>) -> Self {
        Self(position.into())
    }

    /// The position as the backend spelled it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a record went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Departure {
    /// Its owner said so, in the same atomic step.
    Left,
    /// Nobody said: it expired, was deleted from outside, or the word was missed.
    Unknown,
}

/// One change in what is followed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Update {
    /// The complete set. What is not in it is gone.
    Reset {
        /// Every record of the service's providers and overrides.
        records: Vec<Record>,
        /// Keys whose owner said that they leave, as far as the store still tells.
        left: Vec<Key>,
        /// The store has another history than the one the cursor was from: it was wiped or restored.
        rewound: bool,
    },
    /// A record is new or changed.
    Upsert(Record),
    /// A record is gone.
    Remove {
        /// Its name.
        key: Key,
        /// Why it went.
        cause: Departure,
    },
}

/// Changes that belong together: readers see all of them or none.
#[derive(Clone, Debug, PartialEq)]
pub struct Updates {
    /// The position after these changes; `None` keeps the one before.
    pub cursor: Option<Cursor>,
    /// The changes in order. Empty in a first item that resumes, and in one that only moves the cursor.
    pub updates: Vec<Update>,
}

/// What happens to a backend's session and connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionEvent {
    /// Looking for a server.
    Connecting,
    /// A server answers. `ttl` is what the store granted, which may be more than was asked for.
    Connected {
        /// How long records outlive their owner.
        ttl: Duration,
    },
    /// The connection is gone; the session may still live.
    Suspended,
    /// The session is over and everything under it is gone.
    Lost,
    /// A new session took the place of a lost one.
    Renewed,
}

/// A store, reduced to what differs between stores.
///
/// Every verb may be repeated at any time, also after its future was dropped or ran into a deadline: what it started
/// may have been applied. The engine puts a deadline on every call and calls verbs concurrently, but never two
/// writes of the same key at once.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// The store's name, such as `etcd`, for errors and logs.
    fn name(&self) -> &'static str;

    /// The token that this backend writes into its records.
    fn owner(&self) -> &Owner;

    /// Whose records these are, such as `h1:2379,h2:2379/shop`: the servers and the prefix, the same in every process
    /// and after every start, and without secrets.
    ///
    /// By this, registries that share an [`Options::snapshot_dir`](crate::Options::snapshot_dir) tell apart what they
    /// keep. Defaults to nothing: then each store and prefix needs a directory of its own.
    fn namespace(&self) -> String {
        String::new()
    }

    /// Writes records under our session, batched where the store can, and answers one outcome for each, in order.
    ///
    /// The store decides the epoch. A batch that fails as a whole gives each of its records that error: the engine
    /// puts the halves again until the bad record stands alone.
    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>>;

    /// Removes those of the records whose owner token is ours, whatever session they hang on, and leaves a departure
    /// mark in the same atomic step; `Ok(false)` if there is none of ours. Overrides are removed whoever wrote them,
    /// without a mark. May open a session to hang the mark on.
    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>>;

    /// Keeps the session alive, one request where the store can, and reports what it learns is missing. Never
    /// creates a record. `keys` is the whole registered set.
    async fn renew(&self, keys: &[Key]) -> Result<Renewal>;

    /// The slow check: which keys the store really holds for us, alive: those of `keys`, and whatever else our
    /// session keeps alive.
    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>>;

    /// All records of one directory. Malformed ones are skipped, counted and logged once.
    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>>;

    /// Follows a service's providers and overrides.
    ///
    /// The first item comes as soon as the store answered, even when it is empty: a [`Update::Reset`], or a
    /// resumption from `since` without one. A record that becomes malformed is a [`Update::Remove`] with
    /// [`Departure::Unknown`], as it is for a reader that lists. The stream ends with an `Err` on any failure; the
    /// engine subscribes again from the last cursor.
    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>>;

    /// Whether anything in what [`subscribe`](Self::subscribe) follows has changed after `at`, as far as that can be
    /// told cheaply. `true` for a position that the store does not know any more.
    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool>;

    /// The names of all services that have a provider.
    async fn services(&self) -> Result<Vec<ServiceName>>;

    /// What happens to the session from now on. Called once, by the engine; a second call may give an empty stream.
    fn events(&self) -> BoxStream<'static, SessionEvent>;

    /// Removes `keys` with departure marks, then gives up the session and everything under it.
    async fn close(&self, keys: &[Key]) -> Result<()>;
}
