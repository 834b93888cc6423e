//! A backend whose subscriptions play what a test feeds them.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream, stream::BoxStream};
use registry_core::{
    Backend, Content, Cursor, Departure, Directory, Epoch, Error, ErrorKind, Instance, Intent, Key, Lifetime, Managed,
    Options, Override, Owner, Record, Renewal, Result, ServiceName, SessionEvent, Update, Updates, async_trait,
};
use tokio::{runtime, sync::mpsc, time::Instant};

const PANIC: &str = "panic";

type Item = Result<Updates>;
type Feeds = mpsc::UnboundedReceiver<Result<mpsc::UnboundedReceiver<Item>>>;

/// What a test holds to direct a [`Script`].
#[derive(Clone)]
pub(crate) struct Director {
    feeds: mpsc::UnboundedSender<Result<mpsc::UnboundedReceiver<Item>>>,
    pub(crate) asked: Arc<Mutex<Vec<Option<Cursor>>>>,
    pub(crate) changed: Arc<Mutex<bool>>,
    /// How often that was asked.
    pub(crate) probes: Arc<AtomicUsize>,
    /// How many records each put had, and on which runtime it ran.
    pub(crate) puts: Arc<Mutex<Vec<(usize, runtime::Id)>>>,
    /// Renewals succeed, and say that the store has not answered since.
    pub(crate) silent_since: Arc<Mutex<Option<Instant>>>,
    /// How long a subscription takes before it begins.
    pub(crate) slow: Arc<Mutex<Duration>>,
}

impl Director {
    /// The next subscription succeeds and plays what is sent here.
    pub(crate) fn subscription(&self) -> Feed {
        let (feed, items) = mpsc::unbounded_channel();
        self.feeds.send(Ok(items)).unwrap();
        Feed(feed)
    }

    /// The next subscription fails.
    pub(crate) fn refuse(&self, error: Error) {
        self.feeds.send(Err(error)).unwrap();
    }

    /// The cursors that subscriptions were asked to resume from.
    pub(crate) fn resumed_from(&self) -> Vec<Option<String>> {
        self.asked.lock().unwrap().iter().map(|cursor| cursor.as_ref().map(|c| c.as_str().to_owned())).collect()
    }
}

/// One subscription. Dropping it ends the stream.
pub(crate) struct Feed(mpsc::UnboundedSender<Item>);

impl Feed {
    pub(crate) fn send(&self, at: u64, updates: Vec<Update>) {
        self.0.send(Ok(Updates { cursor: Some(Cursor::new(at.to_string())), updates })).unwrap();
    }

    pub(crate) fn reset(&self, at: u64, ids: &[&str]) {
        self.send(at, vec![reset(ids, &[], false)]);
    }

    /// The stream panics when it is read next.
    pub(crate) fn panic(self) {
        self.0.send(Err(Error::new(ErrorKind::Malformed, PANIC))).unwrap();
    }

    pub(crate) fn fail(self) {
        self.refuse(Error::new(ErrorKind::Unavailable, "cut"));
    }

    pub(crate) fn refuse(self, error: Error) {
        self.0.send(Err(error)).unwrap();
    }
}

pub(crate) fn record(id: &str) -> Record {
    let instance = Instance::builder("orders", id).build().unwrap();
    of(instance)
}

pub(crate) fn of(instance: Instance) -> Record {
    Record {
        key: Key::provider(instance.service.clone(), instance.id.clone()),
        owner: Owner::parse("somebody").unwrap(),
        epoch: 1,
        lifetime: Lifetime::Session,
        content: Content::Instance(instance.into()),
    }
}

pub(crate) fn overridden(id: &str, set: Override) -> Record {
    let key = Key { directory: Directory::Overrides, ..record(id).key };
    Record { key, lifetime: Lifetime::Persistent, content: Content::Override(set), ..record(id) }
}

pub(crate) fn reset(ids: &[&str], left: &[&str], rewound: bool) -> Update {
    Update::Reset {
        records: ids.iter().map(|id| record(id)).collect(),
        left: left.iter().map(|id| record(id).key).collect(),
        rewound,
    }
}

pub(crate) fn upsert(id: &str) -> Update {
    Update::Upsert(record(id))
}

pub(crate) fn gone(id: &str, cause: Departure) -> Update {
    Update::Remove { key: record(id).key, cause }
}

pub(crate) struct Script {
    owner: Owner,
    namespace: &'static str,
    feeds: tokio::sync::Mutex<Feeds>,
    asked: Arc<Mutex<Vec<Option<Cursor>>>>,
    changed: Arc<Mutex<bool>>,
    probes: Arc<AtomicUsize>,
    puts: Arc<Mutex<Vec<(usize, runtime::Id)>>>,
    silent_since: Arc<Mutex<Option<Instant>>>,
    slow: Arc<Mutex<Duration>>,
}

impl Script {
    pub(crate) fn registry(options: Options) -> (Managed<Self>, Director) {
        Self::registry_at("here", options)
    }

    /// A registry of the store and prefix that go by this name.
    pub(crate) fn registry_at(namespace: &'static str, options: Options) -> (Managed<Self>, Director) {
        let (feeds, receiver) = mpsc::unbounded_channel();
        let director = Director {
            feeds,
            asked: Arc::default(),
            changed: Arc::default(),
            probes: Arc::default(),
            puts: Arc::default(),
            silent_since: Arc::default(),
            slow: Arc::default(),
        };
        let script = Self {
            owner: Owner::random(),
            namespace,
            feeds: receiver.into(),
            asked: director.asked.clone(),
            changed: director.changed.clone(),
            probes: director.probes.clone(),
            puts: director.puts.clone(),
            silent_since: director.silent_since.clone(),
            slow: director.slow.clone(),
        };
        (Managed::new(script, options).unwrap(), director)
    }
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Script")
    }
}

#[async_trait]
impl Backend for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }

    fn namespace(&self) -> String {
        self.namespace.to_owned()
    }

    async fn put(&self, records: &[Record], _: Intent) -> Vec<Result<Epoch>> {
        self.puts.lock().unwrap().push((records.len(), runtime::Handle::current().id()));
        // As from a server: not at once.
        tokio::task::yield_now().await;
        records.iter().map(|_| Ok(1)).collect()
    }

    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        keys.iter().map(|_| Ok(true)).collect()
    }

    async fn renew(&self, _: &[Key]) -> Result<Renewal> {
        Ok(Renewal::default().aged(self.silent_since.lock().unwrap().map_or(Duration::ZERO, |since| since.elapsed())))
    }

    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        Ok(keys.to_vec())
    }

    async fn list(&self, _: &ServiceName, _: Directory) -> Result<Vec<Record>> {
        Ok(Vec::new())
    }

    async fn subscribe(&self, _: &ServiceName, since: Option<Cursor>) -> Result<BoxStream<'static, Item>> {
        self.asked.lock().unwrap().push(since);
        let slow = *self.slow.lock().unwrap();
        tokio::time::sleep(slow).await;
        let Some(feed) = self.feeds.lock().await.recv().await else { return std::future::pending().await };
        let items = stream::unfold(feed?, |mut items| async { Some((items.recv().await?, items)) });
        let panics = |item: &Item| assert!(!item.as_ref().is_err_and(|error| error.to_string() == PANIC), "as told");
        Ok(items.inspect(panics).boxed())
    }

    async fn probe(&self, _: &ServiceName, _: &Cursor) -> Result<bool> {
        self.probes.fetch_add(1, Ordering::Relaxed);
        Ok(*self.changed.lock().unwrap())
    }

    async fn services(&self) -> Result<Vec<ServiceName>> {
        Ok(Vec::new())
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        stream::pending().boxed()
    }

    async fn close(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }
}
