//! etcd: real servers, each client behind proxies of its own, and bare clients for what happens past the library.

use std::{
    fmt,
    future::Future,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Client as Bare, DeleteOptions, Error, GetOptions};
use futures::future::try_join_all;
use registry_core::{Key, Layout, Managed, NativeLayout, Options, ServiceName, async_trait, encode_segment};
use registry_etcd::{EtcdBackend, EtcdConfig};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::{Client, ClusterHarness, Harness, Link, Routed, ServerHarness, Wire, Wired, hosts};
use crate::{
    proxy::FaultProxy,
    servers::{Cluster, Etcd, shared_etcd, shared_etcd_cluster},
};

/// A server that was just started or thawed, or a cluster that elects, may take a moment.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
const ATTEMPT: Duration = Duration::from_secs(2);
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// The etcd backend on one server. Each case has a prefix of its own, on a server that all cases share or on its own.
pub type EtcdHarness = EtcdMembers<1>;

/// The etcd backend on a cluster of three. What happens to the server happens to all members at once, and so does what
/// happens to a client's network.
pub type EtcdClusterHarness = EtcdMembers<3>;

/// The etcd backend on so many servers.
#[derive(Debug)]
pub struct EtcdMembers<const MEMBERS: usize> {
    /// None if they are shared.
    own: Option<Cluster>,
    prefix: String,
    members: Vec<Member>,
}

/// A server, and the bare client's way to it.
struct Member {
    addr: SocketAddr,
    client: Mutex<Option<Bare>>,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Member").field(&self.addr).finish()
    }
}

impl Member {
    async fn client(&self) -> Result<Bare, Error> {
        let known = self.client.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(client) = known {
            return Ok(client);
        }
        let client = Bare::connect([self.addr.to_string()], None).await?;
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(client.clone());
        Ok(client)
    }
}

impl<const MEMBERS: usize> EtcdMembers<MEMBERS> {
    async fn on(url: &str, own: Option<Cluster>) -> Self {
        let members = hosts(url).into_iter().map(|addr| Member { addr, client: Mutex::default() });
        let prefix = format!("case-{:016x}", rand::random::<u64>());
        let harness = Self { own, prefix, members: members.collect() };
        harness.keys().await;
        harness
    }

    fn own(&self) -> &Cluster {
        self.own.as_ref().expect("the case has started servers of its own")
    }

    fn path(&self, path: &str) -> String {
        format!("/{}/{path}", self.prefix)
    }

    fn key(&self, key: &Key) -> String {
        self.path(&NativeLayout.path(key))
    }

    /// Does something that may be done twice, at the first member that does it.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(&self, request: impl Fn(Bare) -> F) -> T {
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            let mut refusals = Vec::new();
            for member in &self.members {
                let attempt = async { request(member.client().await?).await };
                match timeout(ATTEMPT, attempt).await {
                    Ok(Ok(answer)) => return answer,
                    Ok(Err(error)) => refusals.push(error.to_string()),
                    Err(late) => refusals.push(late.to_string()),
                }
            }
            assert!(Instant::now() < deadline, "etcd does not answer within {ANSWER_WITHIN:?}: {refusals:?}");
            sleep(ASK_AGAIN).await;
        }
    }

    /// A client's network, and the addresses by which it knows the servers.
    async fn network(&self) -> (Vec<FaultProxy>, Vec<String>) {
        let network = try_join_all(self.members.iter().map(|member| FaultProxy::start(member.addr)));
        let network = network.await.expect("there are free ports");
        let endpoints = network.iter().map(|proxy| proxy.addr().to_string()).collect();
        (network, endpoints)
    }

    async fn value(&self, key: &str) -> Option<(Vec<u8>, i64)> {
        let found = self.ask(|client| async move { client.kv_client().get(key, None).await }).await;
        found.kvs().first().map(|kv| (kv.value().to_vec(), kv.lease()))
    }
}

#[async_trait]
impl<const MEMBERS: usize> Harness for EtcdMembers<MEMBERS> {
    /// etcd grants no less.
    fn ttl() -> Duration {
        Duration::from_secs(2)
    }

    /// etcd looks twice a second which leases are over.
    fn slack() -> Duration {
        Duration::from_secs(1)
    }

    async fn start() -> Self {
        let shared = if MEMBERS == 1 { shared_etcd().await } else { shared_etcd_cluster().await };
        Self::on(shared.expect("the shared etcd starts").url(), None).await
    }

    async fn with_own_server() -> Self {
        let own = Cluster::start(Etcd::new(), MEMBERS).await.expect("an etcd starts");
        let url = own.url().to_owned();
        Self::on(&url, Some(own)).await
    }

    async fn connect(&self, options: Options) -> Client {
        let (network, endpoints) = self.network().await;
        let config = EtcdConfig::new(endpoints).prefix(&self.prefix).options(options.clone());
        let backend = EtcdBackend::new(config).expect("the configuration is valid");
        let wire = Wire::default();
        let calls = wire.calls();
        let registry = Managed::new(Wired::new(backend, wire), options).expect("the options are valid");
        Client::new(Arc::new(registry), network, calls)
    }

    async fn end_session(&self, key: &Key) {
        let (_, lease) = self.value(&self.key(key)).await.expect("there is a record");
        self.ask(|client| async move { client.lease_client().revoke(lease).await }).await;
    }

    async fn delete(&self, key: &Key) {
        let path = &self.key(key);
        self.ask(|client| async move { client.kv_client().delete(path.as_str(), None).await }).await;
    }

    async fn delete_service(&self, service: &str) {
        let service = ServiceName::parse(service).expect("a service name");
        let all = &self.path(&format!("{}/", encode_segment(&service)));
        self.ask(|client| async move {
            client.kv_client().delete(all.as_str(), Some(DeleteOptions::new().with_prefix())).await
        })
        .await;
    }

    async fn put_raw(&self, key: &Key, bytes: &[u8]) {
        let path = &self.key(key);
        self.ask(|client| async move { client.kv_client().put(path.as_str(), bytes, None).await }).await;
    }

    async fn raw(&self, key: &Key) -> Option<Vec<u8>> {
        self.value(&self.key(key)).await.map(|(bytes, _)| bytes)
    }

    async fn keys(&self) -> Vec<String> {
        let root = &self.path("");
        let options = GetOptions::new().with_prefix().with_keys_only();
        let found = self
            .ask(|client| {
                let options = options.clone();
                async move { client.kv_client().get(root.as_str(), Some(options)).await }
            })
            .await;
        let keys = found.kvs().iter().map(|kv| String::from_utf8_lossy(kv.key()).into_owned());
        keys.map(|key| key.strip_prefix(root).unwrap_or(&key).to_owned()).collect()
    }

    async fn compact(&self) {
        self.ask(|client| async move {
            let now = client.kv_client().get("/", None).await?;
            let revision = now.header().map_or(0, etcd_client::ResponseHeader::revision);
            match client.kv_client().compact(revision, None).await {
                // Somebody has, up to there.
                Err(Error::GRpcStatus(status)) if status.message().contains("compacted") => Ok(()),
                done => done.map(drop),
            }
        })
        .await;
    }

    async fn sessions(&self) -> usize {
        self.ask(|client| async move { client.lease_client().leases().await }).await.leases().len()
    }

    async fn watchers(&self) -> usize {
        let mut watchers = 0;
        for member in &self.members {
            let metrics = metrics(member.addr).await;
            let count = metrics.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "));
            watchers += count.and_then(|count| count.trim().parse::<usize>().ok()).expect("etcd counts its watchers");
        }
        watchers
    }

    async fn kill(&self) {
        self.own().kill().await.expect("etcd is killed");
    }

    async fn restart(&self) {
        self.own().restart().await.expect("etcd comes back");
    }

    async fn wipe(&self) {
        self.own().wipe().await.expect("etcd comes back");
    }

    async fn freeze(&self) {
        self.own().freeze().await.expect("etcd is frozen");
    }

    async fn thaw(&self) {
        self.own().thaw().await.expect("etcd is thawed");
    }
}

impl<const MEMBERS: usize> ServerHarness for EtcdMembers<MEMBERS> {
    fn cluster(&self) -> &Cluster {
        self.own()
    }
}

#[async_trait]
impl ClusterHarness for EtcdClusterHarness {
    async fn leader(&self, _service: &str) -> usize {
        self.own().leader().await.expect("somebody leads")
    }

    async fn quorum(&self, service: &str) -> Vec<usize> {
        let leader = self.leader(service).await;
        vec![leader, (leader + 1) % 3]
    }
}

#[async_trait]
impl<const MEMBERS: usize> Routed for EtcdMembers<MEMBERS> {
    async fn route(&self, options: &str) -> (String, Box<dyn Link>) {
        let (network, endpoints) = self.network().await;
        (format!("etcd://{}/{}?{options}", endpoints.join(","), self.prefix), Box::new(network))
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
