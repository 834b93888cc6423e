//! What is special about ZooKeeper, on real servers: sessions, members that fail, containers, users, certificates, and
//! what a registry costs.
//!
//! What any store must do is in the conformance suite, which `tests/zookeeper.rs` runs. Each case here has servers of
//! its own, and fails if it cannot have them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod auth;
mod cost;
mod ensemble;
#[path = "../etcd_only/log.rs"]
mod log;
mod nodes;
mod old;
mod sessions;
mod tls;

use std::{collections::BTreeMap, fmt::Display, net::SocketAddr, sync::Arc, time::Duration};

use registry_core::{Managed, Options};
use registry_tests::{
    conformance::support::{self, PATIENCE, eventually},
    harness::{Calls, Client, ZooKeeperHarness},
    proxy::FaultProxy,
    servers::{Server, ZooKeeper, ask_zookeeper},
};
use registry_zk::{ZooKeeperBackend, ZooKeeperConfig};
use tokio::time::timeout;
use zookeeper_client::{
    Acls, AddWatchMode, Client as Bare, Connector, CreateMode, CreateOptions, Error, PersistentWatcher, Stat,
};

const SECOND: Duration = Duration::from_secs(1);
/// What a busy machine adds to a bound.
const SLACK: Duration = SECOND;
/// How often a server looks which sessions are over.
const TICK: Duration = Duration::from_millis(500);

/// Where the instances of the service `orders` are.
const ORDERS: &str = "/services/orders/providers";

const CONTAINER: CreateOptions<'static> = CreateMode::Container.with_acls(Acls::anyone_all());
const PERSISTENT: CreateOptions<'static> = CreateMode::Persistent.with_acls(Acls::anyone_all());

/// A ZooKeeper of its own, and questions to it past the library.
struct Store {
    server: Server,
}

impl Store {
    async fn start(zookeeper: ZooKeeper) -> Self {
        let store = Self { server: Server::start(zookeeper).await.unwrap() };
        warm_up(store.server.addr()).await;
        eventually("nobody is left", PATIENCE, || store.sessions(), |sessions| *sessions == 0).await;
        store
    }

    /// How to reach it directly.
    fn config(&self, options: Options) -> ZooKeeperConfig {
        config([self.server.addr()], options)
    }

    /// A client behind a network of its own.
    async fn behind_a_proxy(&self, options: Options) -> Client {
        let proxy = self.proxy().await;
        let registry = registry(config([proxy.addr()], options));
        Client::new(Arc::new(registry), proxy, Calls::default())
    }

    async fn proxy(&self) -> FaultProxy {
        FaultProxy::start(self.server.addr()).await.unwrap()
    }

    /// A client that knows nothing of the library.
    async fn bare(&self) -> Bare {
        bare(self.server.addr()).await
    }

    /// The answer to a four-letter command.
    async fn ask(&self, command: &str) -> String {
        asked(self.server.addr(), command).await
    }

    /// What the server counts under a name.
    async fn counted(&self, name: &str) -> u64 {
        let metrics = self.ask("mntr").await;
        let count = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('\t'));
        count.unwrap_or_else(|| panic!("{name} in {metrics}")).parse().unwrap()
    }

    /// How many connections there are, without the one that asks.
    async fn connections(&self) -> u64 {
        self.counted("zk_num_alive_connections").await - 1
    }

    /// How many sessions live.
    async fn sessions(&self) -> u64 {
        self.counted("zk_global_sessions").await
    }
}

/// A node as its maker and its changers left it.
type Left = BTreeMap<String, (i64, i64, i64)>;

/// The nodes in a directory: who made each, by which transaction, and which changed it last.
async fn left(bare: &Bare, directory: &str) -> Left {
    let mut left = Left::new();
    for name in children(bare, directory).await {
        let path = format!("{directory}/{name}");
        if let Some(Stat { ephemeral_owner, czxid, mzxid, .. }) = bare.check_stat(&path).await.unwrap() {
            left.insert(name, (ephemeral_owner, czxid, mzxid));
        }
    }
    left
}

/// The names of the nodes in a directory, which need not be there.
async fn children(bare: &Bare, directory: &str) -> Vec<String> {
    match bare.list_children(directory).await {
        Err(Error::NoNode) => Vec::new(),
        names => names.unwrap(),
    }
}

/// The session that a node hangs on, once it is there.
async fn session_of(bare: &Bare, path: &str) -> i64 {
    let stat = eventually(path, PATIENCE, async || bare.check_stat(path).await.unwrap(), Option::is_some).await;
    stat.unwrap().ephemeral_owner
}

/// Everything that happens at a server below the prefix, as a client sees it whom nothing befalls.
struct Witness {
    bare: Bare,
    watcher: PersistentWatcher,
}

impl Witness {
    async fn of(server: SocketAddr) -> Self {
        let bare = bare(server).await;
        let watcher = bare.watch("/", AddWatchMode::PersistentRecursive).await.unwrap();
        Self { bare, watcher }
    }

    /// What happened since the last look, such as `NodeCreated /services/orders/providers/1`.
    async fn events(&mut self) -> Vec<String> {
        let end = format!("/end-{:016x}", rand::random::<u64>());
        self.bare.create(&end, b"", &PERSISTENT).await.unwrap();
        let mut events = Vec::new();
        loop {
            let event = timeout(PATIENCE, self.watcher.changed()).await.expect("the end is seen");
            if event.path == end {
                return events;
            }
            if event.path.starts_with("/services") {
                events.push(format!("{} {}", event.event_type, event.path));
            }
        }
    }
}

/// A client that knows nothing of the library, and outlives what happens to the server for a while.
async fn bare(server: SocketAddr) -> Bare {
    eventually("a session", PATIENCE, || connect(server, Bare::connector()), Result::is_ok).await.unwrap()
}

/// A Java machine that has just started is slow: the first session may take it longer than the library waits for one.
async fn warm_up(server: SocketAddr) {
    bare(server).await.sync("/").await.unwrap();
}

async fn connect(server: SocketAddr, connector: Connector) -> Result<Bare, Error> {
    let connector = connector.with_session_timeout(30 * SECOND).with_fail_eagerly();
    connector.with_connection_timeout(10 * SECOND).connect(&server.to_string()).await
}

/// What a server says to a four-letter command. A busy one is asked again.
async fn asked(server: SocketAddr, command: &str) -> String {
    let ask = async || ask_zookeeper(server, command).await.map_err(|error| error.kind());
    eventually(command, PATIENCE, ask, Result::is_ok).await.unwrap()
}

fn config<A: Display>(servers: impl IntoIterator<Item = A>, options: Options) -> ZooKeeperConfig {
    let servers = servers.into_iter().map(|server| server.to_string());
    ZooKeeperConfig::new(servers).prefix("services").options(options)
}

fn registry(config: ZooKeeperConfig) -> Managed<ZooKeeperBackend> {
    log::listen();
    let options = config.options.clone();
    Managed::new(ZooKeeperBackend::new(config).unwrap(), options).unwrap()
}

/// A client, like a process of its own, whose way to the store is not harmed.
fn client(config: ZooKeeperConfig) -> Client {
    Client::new(Arc::new(registry(config)), Vec::<FaultProxy>::new(), Calls::default())
}

/// The conformance suite's options for ZooKeeper.
fn options() -> Options {
    support::options::<ZooKeeperHarness>()
}

/// The same, but nothing is found out by the slow check.
fn unchecked() -> Options {
    support::unchecked::<ZooKeeperHarness>()
}

/// Options under which a session outlives what happens, and what vanishes is held for longer than any case lasts.
fn patient() -> Options {
    unchecked().ttl(30 * SECOND).protect_for(120 * SECOND)
}

/// Within this, readers know what happened at the store.
fn soon() -> Duration {
    support::soon::<ZooKeeperHarness>()
}

/// Within this after the store or the way to it is back, or the session is gone, what was lost is registered again.
const RESTORED: Duration = Duration::from_secs(2).saturating_add(SLACK);

/// Within this, a process that crashed is gone.
fn gone(ttl: Duration) -> Duration {
    ttl + TICK + SECOND + SLACK
}
