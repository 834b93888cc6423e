//! What is special about etcd, on real servers: leases, users, certificates, members that fail, and histories that end.
//!
//! What any store must do is in the conformance suite, which `tests/etcd.rs` runs. Each case here has servers of its
//! own, and fails if it cannot have them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod auth;
mod history;
mod leases;
mod limits;
mod log;
mod members;
mod streams;
mod tls;
mod volume;

use std::{collections::BTreeMap, fmt::Display, net::SocketAddr, sync::Arc, time::Duration};

use etcd_client::{Client as Bare, GetOptions, GetResponse, KvClient};
use registry_core::{Managed, Options};
use registry_etcd::{EtcdBackend, EtcdConfig};
use registry_tests::{
    conformance::support,
    harness::{Calls, Client, EtcdHarness, Link},
    proxy::FaultProxy,
    servers::{self, Server},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const SECOND: Duration = Duration::from_secs(1);
/// What a busy machine adds to a bound.
const SLACK: Duration = SECOND;

/// An etcd of its own, and a client that knows nothing of the library.
struct Store {
    server: Server,
    bare: Bare,
}

impl Store {
    async fn start(etcd: impl servers::Store) -> Self {
        let server = Server::start(etcd).await.unwrap();
        let bare = bare(server.addr()).await;
        Self { server, bare }
    }

    /// How to reach it directly.
    fn config(&self, options: Options) -> EtcdConfig {
        config([self.server.addr()], options)
    }

    /// A client behind a network of its own.
    async fn behind_a_proxy(&self, options: Options) -> Client {
        let proxy = FaultProxy::start(self.server.addr()).await.unwrap();
        let registry = registry(config([proxy.addr()], options));
        Client::new(Arc::new(registry), proxy, Calls::default())
    }

    fn kv(&self) -> KvClient {
        self.bare.kv_client()
    }

    async fn put(&self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.kv().put(key, value, None).await.unwrap();
    }

    /// The names of everything that begins like this.
    async fn names(&self, prefix: &str) -> GetResponse {
        self.kv().get(prefix, Some(GetOptions::new().with_prefix().with_keys_only())).await.unwrap()
    }

    /// How many keys begin like this.
    async fn count(&self, prefix: &str) -> i64 {
        self.kv().get(prefix, Some(GetOptions::new().with_prefix().with_count_only())).await.unwrap().count()
    }

    async fn revision(&self) -> i64 {
        self.kv().get("/", None).await.unwrap().header().unwrap().revision()
    }

    async fn cluster(&self) -> u64 {
        self.kv().get("/", None).await.unwrap().header().unwrap().cluster_id()
    }

    /// Which of the leases that live has how many of the keys that begin like this.
    async fn leases(&self, prefix: &str) -> BTreeMap<i64, usize> {
        let living = self.bare.lease_client().leases().await.unwrap();
        let mut leases: BTreeMap<_, _> = living.leases().iter().map(|lease| (lease.id(), 0)).collect();
        for kv in self.names(prefix).await.kvs() {
            *leases.entry(kv.lease()).or_default() += 1;
        }
        leases
    }

    /// The sum of a counter over all that is labelled like this.
    async fn counted(&self, counter: &str, label: &str) -> u64 {
        let mut socket = TcpStream::connect(self.server.addr()).await.unwrap();
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        let lines = answer.lines().filter(|line| line.starts_with(counter) && line.contains(label));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap() as u64).sum()
    }
}

/// A way to the store that is not harmed: where a case harms the store itself.
#[derive(Debug)]
struct Direct;

impl Link for Direct {
    fn cut(&self) {}
    fn hang(&self) {}
    fn delay(&self, _by: Duration) {}
    fn heal(&self) {}
}

async fn bare(addr: SocketAddr) -> Bare {
    Bare::connect([addr.to_string()], None).await.unwrap()
}

fn config<A: Display>(members: impl IntoIterator<Item = A>, options: Options) -> EtcdConfig {
    EtcdConfig::new(members.into_iter().map(|member| member.to_string())).prefix("services").options(options)
}

fn registry(config: EtcdConfig) -> Managed<EtcdBackend> {
    log::listen();
    let options = config.options.clone();
    Managed::new(EtcdBackend::new(config).unwrap(), options).unwrap()
}

/// A client, like a process of its own.
fn client(config: EtcdConfig) -> Client {
    Client::new(Arc::new(registry(config)), Direct, Calls::default())
}

/// The conformance suite's options for etcd.
fn options() -> Options {
    support::options::<EtcdHarness>()
}

/// The same, but nothing is found out by the slow check.
fn unchecked() -> Options {
    support::unchecked::<EtcdHarness>()
}

/// Within this, readers know what happened at the store.
fn soon() -> Duration {
    support::soon::<EtcdHarness>()
}

/// Within this after the store or the way to it is back, what was lost is registered again.
fn restored(ttl: Duration) -> Duration {
    ttl / 3 + SECOND + SLACK
}
