//! A backend of a third party, from nothing to the whole conformance suite in one file.
//!
//! The store is a map in memory that everyone may look at, and the network is the suite's [`Wire`]. Following is
//! naive: whenever anything changes, read everything and compare it with what was told last. What a real store has to
//! offer stands out: sessions that expire, compare-and-set by owner and epoch, a word that tells leaving from
//! vanishing, and a cursor that can tell another history.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream, stream::BoxStream};
use registry_core::{
    Backend, Cursor, Departure, Directory, Epoch, Error, ErrorKind, Intent, Key, Layout, Lifetime, Managed,
    NativeLayout, Options, Owner, Record, Renewal, Result, ServiceName, SessionEvent, Update, Updates,
};
use registry_tests::harness::{Client, Harness, Link, Wire, Wired};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

registry_tests::conformance!(ToyHarness);

/// The store, as every client and the harness see it. Changing it wakes whoever follows.
type Toy = Arc<watch::Sender<Store>>;

#[derive(Clone, Debug, Default)]
struct Store {
    /// Another number after a wipe: the store has another past.
    history: u32,
    records: BTreeMap<Key, Stored>,
    /// When each owner's session ends unless it is renewed.
    sessions: BTreeMap<Owner, Instant>,
    /// The keys whose owners said that they leave.
    left: BTreeSet<Key>,
}

#[derive(Clone, Debug)]
struct Stored {
    bytes: Vec<u8>,
    /// Whose session it lives under, if it needs one.
    session: Option<Owner>,
}

impl Store {
    /// Ends what is over.
    fn reap(&mut self, now: Instant) -> bool {
        let sessions = self.sessions.len();
        self.sessions.retain(|_, deadline| *deadline > now);
        let is_over = sessions > self.sessions.len();
        if is_over {
            let alive = &self.sessions;
            self.records.retain(|_, stored| stored.session.as_ref().is_none_or(|owner| alive.contains_key(owner)));
        }
        is_over
    }

    /// What is stored under a key; what cannot be read counts as absent.
    fn record(&self, key: &Key) -> Option<Record> {
        NativeLayout.decode(key, &[("", &self.records.get(key)?.bytes)]).ok()
    }

    /// Every record of a service that can be read and that its readers follow.
    fn followed(&self, service: &ServiceName) -> HashMap<Key, Record> {
        let of_service = self.records.keys().filter(|key| key.service == *service);
        let followed = of_service.filter(|key| key.directory != Directory::Consumers);
        followed.filter_map(|key| Some((key.clone(), self.record(key)?))).collect()
    }

    /// A position that can be compared: the history, and a fingerprint of all that is followed.
    fn cursor(&self, service: &ServiceName) -> Cursor {
        let mut hasher = DefaultHasher::new();
        for (key, stored) in self.records.iter().filter(|(key, _)| key.service == *service) {
            if key.directory != Directory::Consumers {
                (key, &stored.bytes).hash(&mut hasher);
            }
        }
        Cursor::new(format!("{}/{:016x}", self.history, hasher.finish()))
    }
}

/// One client of the store.
#[derive(Debug)]
struct ToyBackend {
    toy: Toy,
    owner: Owner,
    ttl: Duration,
}

impl ToyBackend {
    /// One request: everything it does happens at once.
    fn ask<T>(&self, request: impl FnOnce(&mut Store) -> T) -> T {
        let mut answer = None;
        self.toy.send_modify(|store| {
            store.reap(Instant::now());
            answer = Some(request(store));
        });
        answer.expect("the request ran")
    }

    fn put_one(&self, store: &mut Store, record: &Record, why: Intent) -> Result<Epoch> {
        let held = store.record(&record.key);
        let epoch = match (why, held) {
            (Intent::Claim, held) => held.map_or(0, |held| held.epoch) + 1,
            (Intent::Restore, Some(held)) if held.owner != self.owner || held.epoch > record.epoch => {
                return Err(Error::new(ErrorKind::Conflict, format!("{} is another owner's", record.key)));
            }
            (Intent::Restore, _) => record.epoch,
        };
        // Encoded before anything is changed: what is too large leaves no trace.
        let entries = NativeLayout.encode(&Record { owner: self.owner.clone(), epoch, ..record.clone() })?;
        let session = (record.lifetime == Lifetime::Session).then(|| self.owner.clone());
        if let Some(owner) = &session {
            store.sessions.entry(owner.clone()).or_insert_with(|| Instant::now() + self.ttl);
        }
        store.left.remove(&record.key);
        for entry in entries {
            let stored = Stored { bytes: entry.bytes, session: session.clone() };
            store.records.insert(record.key.clone(), stored);
        }
        Ok(epoch)
    }

    fn remove_one(&self, store: &mut Store, key: &Key) -> bool {
        let ours = store.record(key).is_some_and(|held| held.owner == self.owner);
        let removed = (ours || key.directory == Directory::Overrides) && store.records.remove(key).is_some();
        if removed {
            store.left.insert(key.clone());
        }
        removed
    }

    /// Whether the store holds a key for us, alive.
    fn holds(&self, store: &Store, key: &Key) -> bool {
        store.records.get(key).is_some_and(|stored| stored.session.as_ref() == Some(&self.owner))
    }
}

#[async_trait]
impl Backend for ToyBackend {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }

    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        self.ask(|store| records.iter().map(|record| self.put_one(store, record, why)).collect())
    }

    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        self.ask(|store| keys.iter().map(|key| Ok(self.remove_one(store, key))).collect())
    }

    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        Ok(self.ask(|store| {
            if let Some(deadline) = store.sessions.get_mut(&self.owner) {
                *deadline = Instant::now() + self.ttl;
            }
            Renewal::missing(keys.iter().filter(|key| !self.holds(store, key)).cloned().collect())
        }))
    }

    async fn verify(&self, _keys: &[Key]) -> Result<Vec<Key>> {
        Ok(self.ask(|store| store.records.keys().filter(|key| self.holds(store, key)).cloned().collect()))
    }

    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        Ok(self.ask(|store| {
            let keys = store.records.keys().filter(|key| key.service == *service && key.directory == directory);
            keys.filter_map(|key| store.record(key)).collect()
        }))
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        let news = self.toy.subscribe();
        let following = Following { toy: self.toy.clone(), news, service: service.clone(), told: None, since };
        let items = stream::unfold(following, |mut following| async {
            let updates = following.next().await;
            Some((Ok(updates), following))
        });
        Ok(items.boxed())
    }

    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        Ok(self.ask(|store| store.cursor(service) != *at))
    }

    async fn services(&self) -> Result<Vec<ServiceName>> {
        Ok(self.ask(|store| {
            let providers = store.records.keys().filter(|key| key.directory == Directory::Providers);
            providers.map(|key| key.service.clone()).collect::<BTreeSet<_>>().into_iter().collect()
        }))
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        // All else that happens, the engine finds out by asking.
        stream::iter([SessionEvent::Connected { ttl: self.ttl }]).chain(stream::pending()).boxed()
    }

    async fn close(&self, keys: &[Key]) -> Result<()> {
        self.ask(|store| {
            for key in keys {
                self.remove_one(store, key);
            }
            store.sessions.remove(&self.owner);
            store.records.retain(|_, stored| stored.session.as_ref() != Some(&self.owner));
        });
        Ok(())
    }
}

/// A subscription: what its reader was told, and where it looks for more.
struct Following {
    toy: Toy,
    news: watch::Receiver<Store>,
    service: ServiceName,
    /// `None`: nothing yet.
    told: Option<HashMap<Key, Record>>,
    /// From where the reader would go on. It gets everything instead, and hears whether that is another history.
    since: Option<Cursor>,
}

impl Following {
    async fn next(&mut self) -> Updates {
        loop {
            let store = self.news.borrow_and_update().clone();
            let now = store.followed(&self.service);
            let updates = match self.told.replace(now.clone()) {
                None => vec![self.everything(&store, &now)],
                Some(before) => difference(&before, &now, &store.left),
            };
            if !updates.is_empty() {
                return Updates { cursor: Some(store.cursor(&self.service)), updates };
            }
            // Nobody else may look when a session is over.
            let next = store.sessions.values().min().map_or(Duration::MAX, |at| at.duration_since(Instant::now()));
            if timeout(next, self.news.changed()).await.is_err() {
                self.toy.send_if_modified(|store| store.reap(Instant::now()));
            }
        }
    }

    fn everything(&mut self, store: &Store, now: &HashMap<Key, Record>) -> Update {
        let history = format!("{}/", store.history);
        let rewound = self.since.take().is_some_and(|since| !since.as_str().starts_with(&history));
        let left = store.left.iter().filter(|key| key.service == self.service).cloned().collect();
        Update::Reset { records: now.values().cloned().collect(), left, rewound }
    }
}

fn difference(before: &HashMap<Key, Record>, now: &HashMap<Key, Record>, left: &BTreeSet<Key>) -> Vec<Update> {
    let gone = before.keys().filter(|key| !now.contains_key(key)).map(|key| {
        let cause = if left.contains(key) { Departure::Left } else { Departure::Unknown };
        Update::Remove { key: key.clone(), cause }
    });
    let new = now.iter().filter(|(key, record)| before.get(key) != Some(record));
    gone.chain(new.map(|(_, record)| Update::Upsert(record.clone()))).collect()
}

/// What the suite does to the store from outside, and to all of its wires at once.
#[derive(Debug)]
struct ToyHarness {
    toy: Toy,
    wires: watch::Sender<Wires>,
}

#[derive(Debug, Default)]
struct Wires {
    all: Vec<Wire>,
    /// What they all suffer, those to come included.
    fault: Option<fn(&Wire)>,
}

impl ToyHarness {
    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) {
        self.toy.send_modify(|store| drop(change(store)));
    }

    fn suffer(&self, fault: fn(&Wire), lasting: bool) {
        self.wires.send_modify(|wires| {
            wires.all.iter().for_each(fault);
            wires.fault = lasting.then_some(fault);
        });
    }
}

#[async_trait]
impl Harness for ToyHarness {
    fn ttl() -> Duration {
        Duration::from_secs(1)
    }

    fn slack() -> Duration {
        Duration::from_millis(500)
    }

    fn has_connections() -> bool {
        false
    }

    async fn start() -> Self {
        Self { toy: Toy::default(), wires: watch::Sender::default() }
    }

    async fn with_own_server() -> Self {
        Self::start().await
    }

    async fn connect(&self, options: Options) -> Client {
        let backend = ToyBackend { toy: self.toy.clone(), owner: Owner::random(), ttl: options.ttl };
        let wire = Wire::default();
        self.wires.send_modify(|wires| {
            wires.fault.iter().for_each(|fault| fault(&wire));
            wires.all.push(wire.clone());
        });
        let registry = Managed::new(Wired::new(backend, wire.clone()), options).expect("the options are valid");
        Client::new(Arc::new(registry), wire.clone(), wire.calls())
    }

    async fn end_session(&self, key: &Key) {
        self.change(|store| {
            let owner = store.records[key].session.clone().expect("it lives under a session");
            store.sessions.insert(owner, Instant::now());
            store.reap(Instant::now());
        });
    }

    async fn delete(&self, key: &Key) {
        self.change(|store| store.records.remove(key));
    }

    async fn delete_service(&self, service: &str) {
        self.change(|store| store.records.retain(|key, _| key.service.as_str() != service));
    }

    async fn put_raw(&self, key: &Key, bytes: &[u8]) {
        self.change(|store| store.records.insert(key.clone(), Stored { bytes: bytes.to_vec(), session: None }));
    }

    async fn raw(&self, key: &Key) -> Option<Vec<u8>> {
        self.toy.send_if_modified(|store| store.reap(Instant::now()));
        self.toy.borrow().records.get(key).map(|stored| stored.bytes.clone())
    }

    async fn keys(&self) -> Vec<String> {
        self.toy.send_if_modified(|store| store.reap(Instant::now()));
        self.toy.borrow().records.keys().map(|key| NativeLayout.path(key)).collect()
    }

    /// There is no history to forget: every reader gets everything at every start.
    async fn compact(&self) {}

    async fn sessions(&self) -> usize {
        self.toy.send_if_modified(|store| store.reap(Instant::now()));
        self.toy.borrow().sessions.len()
    }

    async fn watchers(&self) -> usize {
        self.toy.receiver_count()
    }

    async fn kill(&self) {
        self.suffer(Wire::cut, true);
    }

    async fn restart(&self) {
        self.suffer(Wire::heal, false);
    }

    async fn wipe(&self) {
        self.suffer(Wire::cut, true);
        self.change(|store| *store = Store { history: store.history + 1, ..Store::default() });
        self.suffer(Wire::heal, false);
    }

    async fn freeze(&self) {
        self.suffer(Wire::hang, true);
    }

    async fn thaw(&self) {
        self.suffer(Wire::heal, false);
    }
}
