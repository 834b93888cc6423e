//! The store's manual, verb by verb.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use etcd_client::{GetOptions, KeyValue};
use futures::{StreamExt, stream::BoxStream};
use registry_core::{
    Backend, Cursor, Directory, Epoch, Intent, Key, Layout, NativeLayout, Owner, Place, Record, Renewal, Result,
    ServiceName, SessionEvent, Updates,
};
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::{
    config::EtcdConfig,
    endpoints::Pool,
    error::{Failure, NAME},
    session::{Session, whole_seconds},
    space::Space,
    store::just_after,
    watch::{Followed, Position},
};

/// How many names are read at once.
const NAMES: i64 = 1000;

/// A registry on etcd. Make a [`Registry`](registry_core::Registry) of it with
/// [`Managed`](registry_core::Managed).
pub struct EtcdBackend {
    pub(crate) owner: Owner,
    namespace: String,
    pub(crate) pool: Arc<Pool>,
    pub(crate) session: Session,
    pub(crate) space: Space,
    /// From the start, so that whoever listens first hears all of it.
    events: Mutex<Option<Receiver<SessionEvent>>>,
}

impl EtcdBackend {
    /// Checks the configuration and starts looking for a server; there need not be one yet.
    ///
    /// One background task asks the current endpoint for its status; it ends when the backend is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if the configuration is wrong, a
    /// certificate or key cannot be read, or this is not called within a tokio runtime.
    pub fn new(config: EtcdConfig) -> Result<Self> {
        let ttl = whole_seconds(config.options.ttl);
        let (pool, events) = Pool::new(&config, ttl)?;
        Ok(Self {
            owner: Owner::random(),
            namespace: config.namespace()?,
            session: Session::new(pool.clone(), ttl),
            space: Space::new(&config.prefix, Arc::new(NativeLayout)),
            events: Mutex::new(Some(events)),
            pool,
        })
    }

    /// Spells keys and records like this instead of like [`NativeLayout`]. Readers see a record by its first entry.
    #[must_use]
    pub fn with_layout(self, layout: Arc<dyn Layout>) -> Self {
        Self { space: self.space.with_layout(layout), ..self }
    }

    fn followed(&self, service: &ServiceName) -> Followed {
        Followed::new(self.pool.clone(), self.space.clone(), service.clone())
    }
}

#[async_trait]
impl Backend for EtcdBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }

    fn namespace(&self) -> String {
        self.namespace.clone()
    }

    /// Puts the keys under a lease, up to a hundred in one transaction; grants a lease if there is none.
    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        self.write_all(records, why).await
    }

    /// Deletes what is ours, and puts `{service}/left/{owner}` with the ids in the same transaction.
    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        self.remove_all(keys).await
    }

    /// One keep-alive for each lease.
    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        let cannot = |failure: Failure| failure.during("cannot renew the session");
        let asked = self.session.renew().await.map_err(cannot)?;
        if !asked && keys.is_empty() {
            self.pool.ping().await.map_err(cannot)?;
        }
        Ok(Renewal::missing(self.session.missing(keys)))
    }

    /// Asks each lease for its keys.
    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        let cannot = |failure: Failure| failure.during("cannot verify what is registered");
        let attached = self.session.attached().await.map_err(cannot)?;
        let records = attached.iter().filter_map(|key| match self.space.place(key) {
            Some(Place::Record(key)) => Some(key),
            _ => None,
        });
        let mut held: BTreeSet<_> = records.collect();
        held.extend(self.present(&self.session.persistent(keys)).await.map_err(cannot)?);
        Ok(held.into_iter().collect())
    }

    /// Gets the directory, page by page at one revision.
    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        let range = self.space.directory(service, directory);
        let take = |records: &mut Vec<Record>, kv: KeyValue| {
            if let Some(Place::Record(key)) = self.space.place(kv.key()) {
                records.extend(self.space.read(&key, &kv));
            }
        };
        let cannot = |failure: Failure| failure.during(format!("cannot list {service}/{}", directory.as_str()));
        Ok(self.pool.list(&range, take).await.map_err(cannot)?.made)
    }

    /// Gets the range at one revision, or finds that nothing was missed, and watches from the next one on.
    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        let followed = self.followed(service);
        let since = since.and_then(|cursor| cursor.as_str().parse().ok());
        let following = followed.start(since).await.map_err(|failure| followed.cannot_follow(&failure))?;
        Ok(followed.follow(following).boxed())
    }

    /// Gets the newest key of the range and the number of its keys.
    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        let Ok(at) = at.as_str().parse::<Position>() else { return Ok(true) };
        let followed = self.followed(service);
        followed.changed(&at).await.map_err(|failure| failure.during(format!("cannot probe {service}")))
    }

    /// Gets the names of all keys, leaving out the rest of a service once one of its providers is seen.
    async fn services(&self) -> Result<Vec<ServiceName>> {
        let (mut from, to) = self.space.all();
        let mut services = BTreeSet::new();
        loop {
            let options = GetOptions::new().with_range(to.clone()).with_limit(NAMES).with_keys_only();
            let page = self.pool.get(&from, options).await;
            let (_, kvs, more) = page.map_err(|failure| failure.during("cannot list the services"))?;
            for kv in &kvs {
                from = just_after(kv.key());
                let Some(Place::Record(key)) = self.space.place(kv.key()) else { continue };
                let (providers, behind_them) = self.space.directory(&key.service, Directory::Providers);
                if key.directory == Directory::Providers {
                    from = from.max(behind_them);
                    services.insert(key.service);
                } else {
                    from = from.max(providers);
                }
            }
            if !more {
                return Ok(services.into_iter().collect());
            }
        }
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        let first = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut events = first.unwrap_or_else(|| self.pool.events());
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

    /// Removes the keys with their marks, then revokes every lease, even if not all could be removed.
    async fn close(&self, keys: &[Key]) -> Result<()> {
        let removed = self.remove_all(keys).await;
        let revoked = self.session.revoke().await;
        removed.into_iter().find_map(Result::err).map_or(Ok(()), Err)?;
        revoked.map_err(|failure| failure.during("cannot give up the session"))
    }
}

impl fmt::Debug for EtcdBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdBackend").field("owner", &self.owner).field("pool", &self.pool).finish_non_exhaustive()
    }
}
