//! The store's manual, verb by verb.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use registry_core::{
    Backend, Cursor, Directory, Epoch, Error, Intent, Key, Layout, NativeLayout, Owner, Record, Renewal, Result,
    ServiceName, SessionEvent, Updates,
};
use tokio::{
    runtime::Handle,
    sync::broadcast::{Receiver, error::RecvError},
};

use crate::{
    config::ZooKeeperConfig,
    cursor::Position,
    error::{Class, Failure, NAME},
    held::Held,
    session::Session,
    space::{Node, Space},
    store::{Budget, Found, Store},
    watch::Followed,
};

/// How many of our nodes are read at each check.
const LOOKED_AT: usize = 500;

/// A registry on ZooKeeper. Make a [`Registry`](registry_core::Registry) of it with
/// [`Managed`](registry_core::Managed).
pub struct ZooKeeperBackend {
    pub(crate) owner: Owner,
    namespace: String,
    pub(crate) store: Store,
    pub(crate) held: Held,
    /// From the start, so that whoever listens first hears all of it.
    events: Mutex<Option<Receiver<SessionEvent>>>,
}

impl ZooKeeperBackend {
    /// Checks the configuration and starts looking for a server; there need not be one yet.
    ///
    /// Background tasks keep the session; they end when the backend is dropped, which leaves the session to expire at the
    /// server.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if the configuration is wrong, a
    /// certificate or key cannot be read, or this is not called within a tokio runtime.
    pub fn new(config: ZooKeeperConfig) -> Result<Self> {
        config.validate()?;
        let runtime = Handle::try_current()
            .map_err(|error| Error::invalid("a tokio runtime is needed").with_backend(NAME).with_source(error))?;
        let (session, events) = Session::new(&config, &runtime)?;
        let space = Space::new(&config.prefix, Arc::new(NativeLayout));
        Ok(Self {
            owner: Owner::random(),
            namespace: config.namespace()?,
            store: Store { session, space, acl: config.acl.to_list()?, budget: Budget::default() },
            held: Held::default(),
            events: Mutex::new(Some(events)),
        })
    }

    /// Spells keys and records like this instead of like [`NativeLayout`].
    ///
    /// A record must be a single entry, or [`put`](Backend::put) answers
    /// [`ErrorKind::Unsupported`](registry_core::ErrorKind::Unsupported). A path must begin with the service as
    /// [`encode_segment`](registry_core::encode_segment) spells it, or [`services`](Backend::services) passes it over.
    #[must_use]
    pub fn with_layout(self, layout: Arc<dyn Layout>) -> Self {
        let store = Store { space: self.store.space.with_layout(layout), ..self.store };
        Self { store, ..self }
    }

    fn followed(&self, service: &ServiceName) -> Followed {
        Followed::new(self.store.clone(), service.clone())
    }

    async fn hold(&self, keys: &[Key]) -> Result<HashSet<Key>, Failure> {
        let Store { session, space, .. } = &self.store;
        let link = session.link().await?;
        // By the beginning of the path: `/reg` gives `/registry/…`, too.
        let ephemeral = session.call(&link, link.client().list_ephemerals(space.root())).await?;
        let records = ephemeral.iter().filter_map(|path| match space.node(path) {
            Node::Record(key) => Some(key),
            _ => None,
        });
        let mut held: HashSet<_> = records.collect();
        // A node stays on our session when somebody writes something else into it.
        let in_turn: HashSet<_> = self.held.in_turn(keys, LOOKED_AT).filter(|key| held.contains(*key)).collect();
        let looked_at: Vec<_> = in_turn.into_iter().chain(self.held.persistent(keys)).collect();
        let paths: Vec<_> = looked_at.iter().map(|key| space.key(key)).collect();
        let found = self.store.look(&link, &paths.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        for (key, found) in looked_at.into_iter().zip(found) {
            let is_as_we_left_it =
                |found: &Found| self.is_ours(key, &found.bytes) && self.held.may_be(key, found.stat.version);
            if found.is_ok_and(|found| found.as_ref().is_some_and(is_as_we_left_it)) {
                held.insert(key.clone());
            } else {
                held.remove(key);
            }
        }
        Ok(held)
    }

    async fn names(&self) -> Result<Vec<ServiceName>, Failure> {
        let Store { session, space, .. } = &self.store;
        let link = session.link().await?;
        let segments = match session.call(&link, link.client().list_children(space.root())).await {
            Err(failure) if failure.class() == Class::Absent => return Ok(Vec::new()),
            other => other?,
        };
        let mut services: Vec<_> = segments.iter().filter_map(|segment| space.service(segment)).collect();
        services.sort_unstable();
        let paths: Vec<_> = services.iter().map(|service| space.directory(service, Directory::Providers)).collect();
        let found = self.store.look(&link, &paths.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        let used = services.into_iter().zip(found).filter(|(_, found)| match found {
            Ok(Some(found)) => found.stat.num_children > 0,
            _ => false,
        });
        Ok(used.map(|(service, _)| service).collect())
    }
}

#[async_trait]
impl Backend for ZooKeeperBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }

    fn namespace(&self) -> String {
        self.namespace.clone()
    }

    /// Creates the nodes, up to five hundred by one request, and the containers that they lie in, where these are
    /// missing. A node that is there is changed, or replaced if it hangs on another session.
    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        self.write_all(records, why).await
    }

    /// Deletes what is ours, and makes and deletes `~left~{id}` beside it by the same request.
    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        self.remove_all(keys).await
    }

    /// Nothing but a look at the session, which the client keeps alive by itself; after an outage, as `verify`.
    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        let link = self.store.session.link().await;
        let link = link.map_err(|failure| failure.during("cannot renew the session"))?;
        if link.is_unchecked() {
            let held = self.verify(keys).await?;
            link.checked();
            let held: HashSet<_> = held.into_iter().collect();
            return Ok(Renewal::missing(keys.iter().filter(|key| !held.contains(key)).cloned().collect()));
        }
        let age = self.store.session.silent_for(&link);
        Ok(Renewal::missing(self.held.missing(keys, link.session())).aged(age))
    }

    /// Lists the ephemeral nodes of our session, and reads up to five hundred of them, in turn.
    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        let held = self.hold(keys).await;
        let held = held.map_err(|failure| failure.during("cannot verify what is registered"))?;
        self.held.verified(keys, &held);
        Ok(held.into_iter().collect())
    }

    /// Lists the children, then reads them, five hundred by one request.
    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        let list = async {
            let link = self.store.session.link().await?;
            self.store.list(&link, service, directory).await
        };
        match list.await {
            Ok(listed) => Ok(listed.records),
            Err(failure) => Err(failure.during(format!("cannot list {service}/{}", directory.as_str()))),
        }
    }

    /// Watches both directories, reads them, and then reads what the watches say.
    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        let followed = self.followed(service);
        let since = since.and_then(|cursor| cursor.as_str().parse().ok());
        let following = followed.clone().start(since.as_ref()).await;
        Ok(following.map_err(|failure| followed.cannot_follow(&failure))?.follow().boxed())
    }

    /// Gets the last change of who is in the directories, and what tells the history.
    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        let Ok(at) = at.as_str().parse::<Position>() else { return Ok(true) };
        let now = async {
            let link = self.store.session.link().await?;
            self.followed(service).position(&link).await
        };
        let now: Result<_, Failure> = now.await;
        Ok(at.is_changed(&now.map_err(|failure| failure.during(format!("cannot probe {service}")))?))
    }

    /// Lists the children of the root, and counts those of their providers.
    async fn services(&self) -> Result<Vec<ServiceName>> {
        self.names().await.map_err(|failure| failure.during("cannot list the services"))
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        let first = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut events = first.unwrap_or_else(|| self.store.session.events());
        let stream = async_stream::stream! {
            loop {
                match events.recv().await {
                    Ok(event) => yield event,
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return,
                }
            }
        };
        stream.boxed()
    }

    /// From now on nobody keeps the session alive. Removes the keys with their marks, then closes it, even if not all could
    /// be removed.
    async fn close(&self, keys: &[Key]) -> Result<()> {
        let cannot = |failure: Failure| failure.during("cannot give up the session");
        let Some(parting) = self.store.session.part(!keys.is_empty()).await.map_err(cannot)? else { return Ok(()) };
        let mut removed = Ok(());
        if let Some(link) = parting.link() {
            removed = self.remove_on(link, keys).await.into_iter().find_map(Result::err).map_or(Ok(()), Err);
            if removed.as_ref().is_err_and(Error::is_retryable) {
                return removed;
            }
        }
        parting.end().await.map_err(cannot)?;
        removed
    }
}

impl fmt::Debug for ZooKeeperBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Store { session, space, .. } = &self.store;
        f.debug_struct("ZooKeeperBackend")
            .field("owner", &self.owner)
            .field("root", &space.root())
            .field("session", session)
            .finish_non_exhaustive()
    }
}
