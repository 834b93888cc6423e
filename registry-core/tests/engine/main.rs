//! The engine without servers: paused time, a store inside the process, and a backend that plays a script. Outages of
//! hours take milliseconds here.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod disk;
mod drain;
mod follow;
mod health;
mod keep;
mod model;
mod observed;
mod overrides;
mod ready;
mod script;

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use registry_core::{
    Error, ErrorKind, Instance, Managed, Options, Registry, Snapshot, Watcher,
    memory::{MemoryBackend, MemoryLink, MemoryStore},
};
use tokio::time::{Instant, timeout};

use self::observed::{Log, Observed};

const TTL: Duration = Duration::from_secs(15);

/// One process: a registry over a store in memory, its network link, and a log of what it asked the store.
struct Process {
    registry: Managed<Observed<MemoryBackend>>,
    link: MemoryLink,
    log: Log,
}

impl Process {
    fn start(store: &MemoryStore) -> Self {
        Self::with(store, Options::default())
    }

    fn with(store: &MemoryStore, options: Options) -> Self {
        let backend = MemoryBackend::new(store.clone(), options.ttl);
        let link = backend.link();
        let (backend, log) = Observed::new(backend);
        Self { registry: Managed::new(backend, options).unwrap(), link, log }
    }

    /// Ends without a word, as a killed process does.
    fn crash(self) {
        self.link.cut();
    }

    async fn register(&self, service: &str, id: &str) {
        self.registry.register(instance(service, id)).await.unwrap();
    }

    async fn register_many(&self, service: &str, ids: std::ops::Range<usize>) {
        let instances = ids.map(|id| instance(service, &format!("{id:05}"))).collect();
        for outcome in self.registry.register_all(instances).await {
            outcome.unwrap();
        }
    }

    async fn watch(&self, service: &str) -> Watcher {
        self.registry.watch(service).await.unwrap()
    }

    fn state(&self, id: &str) -> String {
        let registrations = self.registry.registrations();
        registrations.iter().find(|r| r.id().as_str() == id).map_or("none".into(), |r| r.state.to_string())
    }

    async fn until_state(&self, id: &str, state: &str, within: Duration) {
        eventually(within, || self.state(id) == state, || format!("{id} is {}, not {state}", self.state(id))).await;
    }
}

/// What this thread logs from the level WARN on.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<u8>>>);

impl Warnings {
    fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_ansi(false);
        tracing::subscriber::set_default(subscriber.with_writer(move || log.clone()).finish())
    }

    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl io::Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn instance(service: &str, id: &str) -> Instance {
    Instance::builder(service, id).endpoint("http://10.0.0.1:80").build().unwrap()
}

fn ids(snapshot: &Snapshot) -> Vec<String> {
    snapshot.instances().iter().map(|instance| instance.id.to_string()).collect()
}

fn denied() -> Error {
    Error::new(ErrorKind::PermissionDenied, "no")
}

/// The instances that the store holds, by path.
fn stored(store: &MemoryStore) -> Vec<String> {
    store.paths().into_iter().filter(|path| path.contains("/providers/")).collect()
}

/// Waits until `holds`, in steps of the paused clock. Fails with what `seen` says.
async fn eventually(within: Duration, mut holds: impl FnMut() -> bool, seen: impl Fn() -> String) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {within:?}: {}", seen());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The next snapshots until one is as wanted; returns all that were seen.
async fn until(watcher: &mut Watcher, within: Duration, wanted: impl Fn(&Snapshot) -> bool) -> Vec<Snapshot> {
    let mut seen: Vec<Snapshot> = Vec::new();
    let look = async {
        loop {
            let snapshot = watcher.next().await.expect("the registry lives");
            seen.push(snapshot);
            if seen.last().is_some_and(&wanted) {
                break;
            }
        }
    };
    let found = timeout(within, look).await;
    assert!(found.is_ok(), "not within {within:?}: saw {seen:#?}");
    seen
}

/// Asserts that nothing is published for a while.
async fn quiet(watcher: &mut Watcher, during: Duration) {
    if let Ok(snapshot) = timeout(during, watcher.next()).await {
        panic!("published although nothing changed: {snapshot:?}");
    }
}

fn dynamic(process: Process) -> (Arc<dyn Registry>, MemoryLink) {
    (Arc::new(process.registry), process.link)
}
