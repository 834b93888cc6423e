//! The store inside the process. Its accidents are those of every client's link at once.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use registry_core::{
    Key, Layout, Managed, NativeLayout, Options, Owner, ServiceName, async_trait,
    memory::{MemoryBackend, MemoryLink, MemoryStore},
};

use super::{Client, Harness, Link, Wire, Wired};

/// The memory backend. Each case has a store of its own.
#[derive(Debug)]
pub struct MemoryHarness {
    store: MemoryStore,
    /// Held for bookkeeping only, never across an await.
    network: Mutex<Network>,
}

/// Every client's link, and what they all suffer.
#[derive(Debug, Default)]
struct Network {
    links: Vec<MemoryLink>,
    fault: Option<fn(&MemoryLink)>,
}

impl MemoryHarness {
    fn network(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self, change: fn(&MemoryLink), fault: Option<fn(&MemoryLink)>) {
        let mut network = self.network();
        network.links.iter().for_each(change);
        network.fault = fault;
    }
}

#[async_trait]
impl Harness for MemoryHarness {
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
        Self { store: MemoryStore::new(), network: Mutex::default() }
    }

    async fn with_own_server() -> Self {
        Self::start().await
    }

    async fn connect(&self, options: Options) -> Client {
        let backend = MemoryBackend::new(self.store.clone(), options.ttl);
        let link = backend.link();
        {
            let mut network = self.network();
            network.fault.iter().for_each(|fault| fault(&link));
            network.links.push(link.clone());
        }
        let wire = Wire::default();
        let calls = wire.calls();
        let registry = Managed::new(Wired::new(backend, wire), options).expect("the options are valid");
        Client::new(Arc::new(registry), link, calls)
    }

    async fn end_session(&self, key: &Key) {
        let owner = owner(&self.raw(key).await.expect("there is a record"), key);
        assert!(self.store.expire(&owner), "{owner} has no session");
    }

    async fn delete(&self, key: &Key) {
        self.store.delete(key);
    }

    async fn delete_service(&self, service: &str) {
        let service = ServiceName::parse(service).expect("a service name");
        for path in self.store.paths() {
            if let Some(registry_core::Place::Record(key)) = NativeLayout.place(&path)
                && key.service == service
            {
                self.store.delete(&key);
            }
        }
    }

    async fn put_raw(&self, key: &Key, bytes: &[u8]) {
        self.store.put_raw(&NativeLayout.path(key), bytes);
    }

    async fn raw(&self, key: &Key) -> Option<Vec<u8>> {
        self.store.get_raw(&NativeLayout.path(key))
    }

    async fn keys(&self) -> Vec<String> {
        self.store.paths()
    }

    async fn compact(&self) {
        self.store.compact();
    }

    async fn sessions(&self) -> usize {
        // A look at the records ends the sessions that are over.
        let _ = self.store.paths();
        self.store.sessions()
    }

    async fn watchers(&self) -> usize {
        self.store.watchers()
    }

    async fn kill(&self) {
        self.all(MemoryLink::cut, Some(MemoryLink::cut));
    }

    async fn restart(&self) {
        self.all(MemoryLink::heal, None);
    }

    async fn wipe(&self) {
        self.all(MemoryLink::cut, Some(MemoryLink::cut));
        self.store.wipe();
        self.all(MemoryLink::heal, None);
    }

    async fn freeze(&self) {
        self.all(MemoryLink::hang, Some(MemoryLink::hang));
    }

    async fn thaw(&self) {
        self.all(MemoryLink::heal, None);
    }
}

impl Link for MemoryLink {
    fn cut(&self) {
        self.cut();
    }

    fn hang(&self) {
        self.hang();
    }

    fn delay(&self, by: Duration) {
        self.delay(by);
    }

    fn heal(&self) {
        self.delay(Duration::ZERO);
        self.heal();
    }
}

fn owner(record: &[u8], key: &Key) -> Owner {
    NativeLayout.decode(key, &[("", record)]).expect("the record is well-formed").owner
}
