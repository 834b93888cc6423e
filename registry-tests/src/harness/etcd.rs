//! etcd: real servers, each client behind a proxy of its own, and a bare client for what happens past the library.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use etcd_client::{Client as Bare, DeleteOptions, GetOptions, KvClient};
use registry_core::{Key, Layout, Managed, NativeLayout, Options, ServiceName, async_trait, encode_segment};
use registry_etcd::{EtcdBackend, EtcdConfig};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Client, Harness, Link, Routed, Wire, Wired};
use crate::{
    proxy::FaultProxy,
    servers::{Etcd, Server, shared_etcd},
};

/// The etcd backend. Each case has a prefix of its own, on a server that all cases share or on its own.
#[derive(Debug)]
pub struct EtcdHarness {
    server: Server,
    prefix: String,
    bare: BareClient,
}

/// A client of the store that knows nothing of the library.
#[derive(Clone)]
struct BareClient(Bare);

impl std::fmt::Debug for BareClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BareClient")
    }
}

impl EtcdHarness {
    async fn on(server: Server) -> Self {
        let bare = Bare::connect([server.addr().to_string()], None).await.expect("the server answers");
        Self { server, prefix: format!("case-{:016x}", rand::random::<u64>()), bare: BareClient(bare) }
    }

    fn kv(&self) -> KvClient {
        self.bare.0.kv_client()
    }

    fn path(&self, path: &str) -> String {
        format!("/{}/{path}", self.prefix)
    }

    fn key(&self, key: &Key) -> String {
        self.path(&NativeLayout.path(key))
    }
}

#[async_trait]
impl Harness for EtcdHarness {
    /// etcd grants no less.
    fn ttl() -> Duration {
        Duration::from_secs(2)
    }

    /// etcd looks twice a second which leases are over.
    fn slack() -> Duration {
        Duration::from_secs(1)
    }

    async fn start() -> Self {
        Self::on(shared_etcd().await.expect("the shared etcd starts")).await
    }

    async fn with_own_server() -> Self {
        Self::on(Server::start(Etcd::new()).await.expect("an etcd starts")).await
    }

    async fn connect(&self, options: Options) -> Client {
        let proxy = FaultProxy::start(self.server.addr()).await.expect("there is a free port");
        let config = EtcdConfig::new([proxy.addr().to_string()]).prefix(&self.prefix).options(options.clone());
        let backend = EtcdBackend::new(config).expect("the configuration is valid");
        let wire = Wire::default();
        let calls = wire.calls();
        let registry = Managed::new(Wired::new(backend, wire), options).expect("the options are valid");
        Client::new(Arc::new(registry), proxy, calls)
    }

    async fn end_session(&self, key: &Key) {
        let found = self.kv().get(self.key(key), None).await.expect("etcd answers");
        let lease = found.kvs().first().expect("there is a record").lease();
        self.bare.0.lease_client().revoke(lease).await.expect("etcd revokes the lease");
    }

    async fn delete(&self, key: &Key) {
        self.kv().delete(self.key(key), None).await.expect("etcd deletes");
    }

    async fn delete_service(&self, service: &str) {
        let service = ServiceName::parse(service).expect("a service name");
        let all = self.path(&format!("{}/", encode_segment(&service)));
        self.kv().delete(all, Some(DeleteOptions::new().with_prefix())).await.expect("etcd deletes");
    }

    async fn put_raw(&self, key: &Key, bytes: &[u8]) {
        self.kv().put(self.key(key), bytes, None).await.expect("etcd takes it");
    }

    async fn raw(&self, key: &Key) -> Option<Vec<u8>> {
        let found = self.kv().get(self.key(key), None).await.expect("etcd answers");
        found.kvs().first().map(|kv| kv.value().to_vec())
    }

    async fn keys(&self) -> Vec<String> {
        let options = GetOptions::new().with_prefix().with_keys_only();
        let found = self.kv().get(self.path(""), Some(options)).await.expect("etcd answers");
        let keys = found.kvs().iter().map(|kv| String::from_utf8_lossy(kv.key()).into_owned());
        let root = self.path("");
        keys.map(|key| key.strip_prefix(&root).unwrap_or(&key).to_owned()).collect()
    }

    async fn compact(&self) {
        let now = self.kv().get(self.path(""), None).await.expect("etcd answers");
        let revision = now.header().expect("a header").revision();
        self.kv().compact(revision, None).await.expect("etcd compacts");
    }

    async fn sessions(&self) -> usize {
        self.bare.0.lease_client().leases().await.expect("etcd answers").leases().len()
    }

    async fn watchers(&self) -> usize {
        let metrics = metrics(self.server.addr()).await;
        let count = metrics.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "));
        count.and_then(|count| count.trim().parse().ok()).expect("etcd counts its watchers")
    }

    async fn kill(&self) {
        self.server.kill().await.expect("etcd is killed");
    }

    async fn restart(&self) {
        self.server.restart().await.expect("etcd comes back");
    }

    async fn wipe(&self) {
        self.server.wipe().await.expect("etcd comes back");
    }

    async fn freeze(&self) {
        self.server.freeze().await.expect("etcd is frozen");
    }

    async fn thaw(&self) {
        self.server.thaw().await.expect("etcd is thawed");
    }
}

#[async_trait]
impl Routed for EtcdHarness {
    async fn route(&self, options: &str) -> (String, Box<dyn Link>) {
        let proxy = FaultProxy::start(self.server.addr()).await.expect("there is a free port");
        (format!("etcd://{}/{}?{options}", proxy.addr(), self.prefix), Box::new(proxy))
    }
}

/// What etcd counts, as text.
async fn metrics(server: SocketAddr) -> String {
    let mut socket = TcpStream::connect(server).await.expect("etcd answers");
    socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.expect("etcd listens");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("etcd answers in text");
    answer
}
