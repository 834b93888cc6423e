//! The store's manual, verb by verb.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use foldhash::fast::RandomState;
use futures::{StreamExt, future::join_all, stream::BoxStream};
use registry_core::{
    Backend, Cursor, Directory, Epoch, Intent, Key, Layout, NativeLayout, Owner, Record, Renewal, Result, ServiceName,
    SessionEvent, Updates, decode_segment,
};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::Instant,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config::RedisConfig,
    error::{Failure, NAME},
    read::{Look, Reader},
    space::{Half, Keys, Position, Space},
    store::{Store, command},
    watch::{Followed, Hub, cannot_follow, has_news},
};

/// The epochs and values that we put last.
pub(crate) type Held = HashMap<Key, (Epoch, Vec<u8>), RandomState>;
/// Where we put anything.
pub(crate) type Used = BTreeMap<(ServiceName, Half), Place>;

/// One half of a service that we put something into.
pub(crate) struct Place {
    pub(crate) keys: Arc<Keys>,
    /// The head after the last time.
    pub(crate) head: String,
}

/// A registry on Redis. Make a [`Registry`](registry_core::Registry) of it with
/// [`Managed`](registry_core::Managed).
pub struct RedisBackend {
    pub(crate) owner: Owner,
    namespace: String,
    pub(crate) ttl: Duration,
    pub(crate) reader: Reader,
    hub: Arc<Hub>,
    /// Where something of ours was ever put: there we are marked as gone in the end. Locked briefly, never across an
    /// `.await`.
    pub(crate) used: Mutex<Used>,
    /// What we put, as far as that was acknowledged: what is put on top of it expects it. Locked briefly, never across an
    /// `.await`.
    pub(crate) held: Mutex<Held>,
    /// When which service was put into the index last. Locked briefly, never across an `.await`.
    pub(crate) indexed: Mutex<HashMap<ServiceName, Instant>>,
    /// From the start, so that whoever listens first hears all of it.
    events: Mutex<Option<Receiver<SessionEvent>>>,
    /// End the background tasks with the backend.
    _pilot: DropGuard,
    _poll: DropGuard,
}

impl RedisBackend {
    /// Checks the configuration and starts looking for a server; there need not be one yet.
    ///
    /// Two background tasks, which end when the backend is dropped, see to the connections and compare what is followed
    /// with the store.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if the configuration is wrong, a
    /// certificate or key cannot be read, or this is not called within a tokio runtime.
    pub fn new(config: RedisConfig) -> Result<Self> {
        let hub = Arc::new(Hub::default());
        let (store, events, pilot) = Store::new(&config, hub.push())?;
        let space = Space::new(&config.prefix, config.database, Arc::new(NativeLayout));
        let reader = Reader { store, space };
        let stop = CancellationToken::new();
        let polling = hub.clone().poll(reader.clone(), config.poll);
        tokio::spawn(stop.clone().run_until_cancelled_owned(polling));
        Ok(Self {
            owner: Owner::random(),
            namespace: config.namespace()?,
            ttl: config.options.ttl,
            reader,
            hub,
            used: Mutex::default(),
            held: Mutex::default(),
            indexed: Mutex::default(),
            events: Mutex::new(Some(events)),
            _pilot: pilot,
            _poll: stop.drop_guard(),
        })
    }

    /// Spells keys and records like this instead of like [`NativeLayout`]. A record is its first entry, whose path is the
    /// field that it lies at; the others are not written.
    #[must_use]
    pub fn with_layout(mut self, layout: Arc<dyn Layout>) -> Self {
        self.reader.space = self.reader.space.with_layout(layout);
        self
    }

    pub(crate) fn space(&self) -> &Space {
        &self.reader.space
    }

    pub(crate) fn store(&self) -> &Store {
        &self.reader.store
    }

    /// Those of the services that have a provider whose ttl is not over for longer than a ttl; where nobody is judged, any.
    async fn with_providers(&self, services: Vec<ServiceName>, now: u64) -> Result<Vec<ServiceName>, Failure> {
        let ttl = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let since = &now.saturating_sub(ttl).to_string();
        let counted = services.into_iter().map(|service| {
            let space = self.space();
            async move {
                let keys = space.keys(&service, Half::Followed);
                let mut since = since.as_str();
                if !self.reader.is_judged(&keys, now).await? {
                    // From now on, somebody looks.
                    self.reader.look(&keys, Half::Followed, &Look::default()).await?;
                    since = "-inf";
                }
                let count = command(&["ZCOUNT", &keys.expiry, since, "(+inf"], []);
                let count: u64 = redis::from_redis_value(self.store().ask(keys.slot, &count).await?)
                    .map_err(|_| Failure::odd("a count"))?;
                Ok((count > 0).then_some(service))
            }
        });
        let counted = join_all(counted).await.into_iter().collect::<Result<Vec<_>, Failure>>()?;
        Ok(counted.into_iter().flatten().collect())
    }

    async fn all_services(&self) -> Result<Vec<ServiceName>, Failure> {
        let (slot, index) = self.space().index();
        let (time, range) = (command(&["TIME"], []), command(&["ZRANGE", &index, "0", "-1"], []));
        let (time, names) = tokio::join!(self.store().ask(slot, &time), self.store().ask(slot, &range));
        let odd = |_| Failure::odd("the index of services");
        let (seconds, micros): (u64, u64) = redis::from_redis_value(time?).map_err(odd)?;
        let names: Vec<Vec<u8>> = redis::from_redis_value(names?).map_err(odd)?;
        let parse = |name: Vec<u8>| ServiceName::parse(decode_segment(std::str::from_utf8(&name).ok()?)?).ok();
        let mut services: Vec<_> = names.into_iter().filter_map(parse).collect();
        services.sort();
        self.with_providers(services, in_ms(seconds, micros)).await
    }
}

/// What `TIME` answers. A server may answer anything.
fn in_ms(seconds: u64, micros: u64) -> u64 {
    seconds.saturating_mul(1000).saturating_add(micros / 1000)
}

#[async_trait]
impl Backend for RedisBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }

    fn namespace(&self) -> String {
        self.namespace.clone()
    }

    /// One script for up to two hundred records of a service, and a second one where a record is taken over.
    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        self.write_all(records, why).await
    }

    /// One script for up to two hundred records of a service, which says in the log that they left.
    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        self.remove_all(keys).await
    }

    /// One script for each service, all in the same round trip.
    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        let cannot = |failure: Failure| failure.during("cannot renew the session");
        if keys.is_empty() {
            // Every user may ask for this.
            self.store().ask(self.space().index().0, &command(&["HELLO"], [])).await.map_err(cannot)?;
        }
        Ok(Renewal::missing(self.renew_all(keys, false).await.map_err(cannot)?))
    }

    /// As `renew`, but looks only. What is not asked for is not renewed either, and goes by itself.
    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        let missing = self.renew_all(keys, true).await;
        let missing = missing.map_err(|failure| failure.during("cannot verify what is registered"))?;
        let missing: HashSet<_> = missing.into_iter().collect();
        Ok(keys.iter().filter(|key| !missing.contains(key)).cloned().collect())
    }

    /// Looks who is alive, and reads all records, page by page.
    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        let half = Half::of(directory);
        let keys = self.space().keys(service, half);
        let listed = async {
            let look = self.reader.look(&keys, half, &Look::default()).await?;
            Ok((look, self.reader.everything(service, &keys).await?))
        };
        let (look, everything) = listed
            .await
            .map_err(|failure: Failure| failure.during(format!("cannot list {service}/{}", directory.as_str())))?;
        let alive = everything.records.into_iter().filter(|(field, _)| !look.dead.contains(field));
        let records = alive.filter_map(|(_, record)| record);
        Ok(records.filter(|record| record.key.directory == directory).collect())
    }

    /// Subscribes to the service's channel, then reads what is new since the cursor, or everything.
    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        let since = since.map(|cursor| Position::parse(cursor.as_str()).unwrap_or_else(Position::elsewhere));
        let started = Followed::start(&self.hub, &self.reader, service, since).await;
        let (followed, first) = started.map_err(|failure| cannot_follow(service, &failure))?;
        Ok(followed.follow(first).boxed())
    }

    /// Gets the head of the log.
    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        let Some(at) = Position::parse(at.as_str()) else { return Ok(true) };
        has_news(&self.reader, service, &at).await.map_err(|failure| failure.during(format!("cannot probe {service}")))
    }

    /// Reads the index, and counts the providers of each service in it.
    async fn services(&self) -> Result<Vec<ServiceName>> {
        self.all_services().await.map_err(|failure| failure.during("cannot list the services"))
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        let first = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut events = first.unwrap_or_else(|| self.store().events());
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

    /// Removes the keys, and marks us as gone wherever we put something: what arrives late changes nothing.
    async fn close(&self, keys: &[Key]) -> Result<()> {
        self.leave(keys).await
    }
}

impl Drop for RedisBackend {
    fn drop(&mut self) {
        self.store().end();
    }
}

impl fmt::Debug for RedisBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBackend").field("owner", &self.owner).field("store", self.store()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_a_server_made_up_is_far_away() {
        assert_eq!(in_ms(1_700_000_000, 123_456), 1_700_000_000_123);
        assert_eq!(in_ms(u64::MAX, u64::MAX), u64::MAX);
    }
}
