//! What the [conformance suite](mod@crate::conformance) needs to know of a store and to do to it.
//!
//! A [`Harness`] is one store and one namespace in it. Through [`connect`](Harness::connect) it gives out clients, each
//! like a process of its own behind a network of its own; its other methods are the hands of an operator who works
//! past the library, and the accidents that befall a server. How stores differ is data of the harness, so that every
//! case runs on every store.

#[cfg(feature = "etcd")]
mod etcd;
mod memory;
#[cfg(feature = "redis")]
mod redis;
mod wire;
#[cfg(feature = "zookeeper")]
mod zookeeper;

#[cfg(any(feature = "etcd", feature = "zookeeper"))]
use std::net::ToSocketAddrs;
use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use registry_core::{Key, Options, Registry, async_trait};

use crate::proxy::{FaultProxy, Mode, Stats};
#[cfg(feature = "servers")]
use crate::servers::Cluster;

#[cfg(feature = "etcd")]
pub use self::etcd::{EtcdClusterHarness, EtcdHarness, EtcdMembers};
#[cfg(feature = "redis")]
pub use self::redis::{
    Deployed as RedisDeployed, Deployment as RedisDeployment, Nodes as RedisNodes, RedisClusterHarness, RedisHarness,
    RedisSentinelHarness, Sentinel as RedisSentinel,
};
#[cfg(feature = "zookeeper")]
pub use self::zookeeper::{ZooKeeperEnsembleHarness, ZooKeeperHarness, ZooKeeperMembers, close_zookeeper_session};
pub use self::{
    memory::MemoryHarness,
    wire::{Calls, Wire, Wired},
};

/// A store, and a namespace in it that belongs to one case.
///
/// A harness is made at the start of a case and dropped at its end, and takes with it what it started.
#[async_trait]
pub trait Harness: fmt::Debug + Send + Sync + 'static {
    /// The shortest ttl that the store takes and a busy machine can keep: cases last a few of it.
    fn ttl() -> Duration;

    /// What is added to every deadline: how late the store may notice that a ttl is over, how long it may need to say
    /// what happened, and what a busy machine adds.
    fn slack() -> Duration;

    /// The largest value that the store lets anyone write.
    fn largest_value() -> usize {
        1_000_000
    }

    /// Whether a reader learns after a cut who left in good order meanwhile. Where it does not, those who left are
    /// held like those who vanished.
    fn remembers_departures() -> bool {
        true
    }

    /// Whether clients have connections, which are found out when they fall silent, or only make calls.
    fn has_connections() -> bool {
        true
    }

    /// A fresh namespace. The server may be shared with other cases.
    async fn start() -> Self
    where
        Self: Sized;

    /// A fresh namespace on a server that no other case uses, to be counted on and done harm to.
    async fn with_own_server() -> Self
    where
        Self: Sized;

    /// A new client, like a process of its own. The server need not be up.
    async fn connect(&self, options: Options) -> Client;

    /// Ends the session that a record lives under, as an operator would. Everything under it goes.
    async fn end_session(&self, key: &Key);

    /// Deletes a record.
    async fn delete(&self, key: &Key);

    /// Deletes everything of a service.
    async fn delete_service(&self, service: &str);

    /// Writes any bytes as the value of a record, under no session.
    async fn put_raw(&self, key: &Key, bytes: &[u8]);

    /// The bytes of a record.
    async fn raw(&self, key: &Key) -> Option<Vec<u8>>;

    /// The paths of all records and departure marks in the namespace. Empty parents are left out.
    async fn keys(&self) -> Vec<String>;

    /// Forgets the store's history, as far as it has one: who is not up to date cannot resume.
    async fn compact(&self);

    /// How many sessions live at the server. Asked for on a server of its own.
    async fn sessions(&self) -> usize;

    /// How much the server keeps for readers that follow a service: none, once nobody follows any. Asked for on a
    /// server of its own.
    async fn watchers(&self) -> usize;

    /// Ends the server without warning. It keeps its data. Asked for on a server of its own, as is all below.
    async fn kill(&self);

    /// Starts the killed server again, and waits until it serves.
    async fn restart(&self);

    /// Ends the server, takes its data, starts it again, and waits until it serves.
    async fn wipe(&self);

    /// Stops the server without ending it: connections stay open and nothing is answered.
    async fn freeze(&self);

    /// Ends [`freeze`](Self::freeze).
    async fn thaw(&self);
}

/// A store that is made of servers.
#[cfg(feature = "servers")]
#[cfg_attr(docsrs, doc(cfg(feature = "servers")))]
pub trait ServerHarness: Harness {
    /// The servers of a harness that was made by [`with_own_server`](Harness::with_own_server). Who does not hold data,
    /// such as a Sentinel, is one of them.
    fn cluster(&self) -> &Cluster;
}

/// A store of several servers, of which some fail.
#[cfg(feature = "servers")]
#[cfg_attr(docsrs, doc(cfg(feature = "servers")))]
#[async_trait]
pub trait ClusterHarness: ServerHarness {
    /// The member that puts what is written of a service into force. Waits for an election.
    async fn leader(&self, service: &str) -> usize;

    /// The members without which nothing can be written for a service, its leader among them. One that holds data is
    /// not.
    async fn quorum(&self, service: &str) -> Vec<usize>;

    /// The member that this client's heartbeats go to.
    ///
    /// # Panics
    /// If there is none.
    async fn home(&self, client: &Client) -> usize {
        let before = client.link.traffic();
        client.registry.heartbeat().await.expect("the store answers");
        let after = client.link.traffic();
        let pairs = before.iter().zip(&after);
        let grown = pairs.map(|((server, before), (_, after))| (after.to_server - before.to_server, *server));
        let (_, home) = grown.max().expect("the client has a network");
        let found = self.cluster().members().iter().position(|member| member.addr() == home);
        found.expect("the client speaks to a member")
    }
}

/// The servers that a connection string names.
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
fn hosts(url: &str) -> Vec<SocketAddr> {
    let hosts = url.split_once("://").map_or(url, |(_, rest)| rest).split(['/', '?']).next().unwrap_or_default();
    let hosts = hosts.rsplit('@').next().unwrap_or_default().split(',');
    hosts.flat_map(|host| host.to_socket_addrs().unwrap_or_else(|error| panic!("{host}: {error}")).next()).collect()
}

/// A store that processes other than this one can use.
#[async_trait]
pub trait Routed: Harness {
    /// A connection string for one process, with these options (`ttl=2s&reconcile=1s`), and its network.
    async fn route(&self, options: &str) -> (String, Box<dyn Link>);
}

/// One client of the store, like a process of its own.
///
/// Dropped, it is a process that exits without saying so: nothing is deregistered.
#[derive(Debug)]
#[non_exhaustive]
pub struct Client {
    /// What its users hold.
    pub registry: Arc<dyn Registry>,
    /// Its network.
    pub link: Box<dyn Link>,
    /// What its engine asks of the backend.
    pub calls: Calls,
}

impl Client {
    /// Puts a client together.
    pub fn new(registry: Arc<dyn Registry>, link: impl Link, calls: Calls) -> Self {
        Self { registry, link: Box::new(link), calls }
    }

    /// Ends the process at once: the network goes first, so that nothing can say goodbye.
    pub fn crash(self) {
        self.link.cut();
    }
}

/// The network between one client and the store.
///
/// ```text
/// up ─cut→ cut ─heal→ up      up ─hang→ hanging ─heal→ up      up ─delay→ slow ─heal→ up
/// ```
pub trait Link: fmt::Debug + Send + Sync + 'static {
    /// Breaks every connection, and refuses new ones.
    fn cut(&self);

    /// A black hole: connections stay open and nothing arrives. What was under way may arrive after
    /// [`heal`](Self::heal).
    fn hang(&self);

    /// Everything arrives at least this much later.
    fn delay(&self, by: Duration);

    /// Ends all of it.
    fn heal(&self);

    /// What has gone to each server and back so far. Nothing by default, for stores that are reached by calls.
    fn traffic(&self) -> Vec<(SocketAddr, Stats)> {
        Vec::new()
    }
}

impl Link for FaultProxy {
    fn cut(&self) {
        self.set_mode(Mode::Cut);
    }

    fn hang(&self) {
        self.set_mode(Mode::BlackHole);
    }

    fn delay(&self, by: Duration) {
        self.set_mode(Mode::Delay(by));
    }

    fn heal(&self) {
        self.set_mode(Mode::Pass);
    }

    fn traffic(&self) -> Vec<(SocketAddr, Stats)> {
        vec![(self.upstream(), self.stats())]
    }
}

/// A client's ways to several servers, which suffer together.
impl<L: Link> Link for Vec<L> {
    fn cut(&self) {
        self.iter().for_each(L::cut);
    }

    fn hang(&self) {
        self.iter().for_each(L::hang);
    }

    fn delay(&self, by: Duration) {
        self.iter().for_each(|link| link.delay(by));
    }

    fn heal(&self) {
        self.iter().for_each(L::heal);
    }

    fn traffic(&self) -> Vec<(SocketAddr, Stats)> {
        self.iter().flat_map(L::traffic).collect()
    }
}

#[cfg(all(test, any(feature = "etcd", feature = "zookeeper")))]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_its_servers() {
        let all = hosts("zk://user:p%40ss@127.0.0.1:2181,127.0.0.1:2182/prefix?ttl=5s");
        assert_eq!(all.iter().map(SocketAddr::port).collect::<Vec<_>>(), [2181, 2182]);
    }
}
