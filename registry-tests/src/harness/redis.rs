//! Redis: alone, under Sentinels and as a Cluster, each client behind a network of its own, and commands for what
//! happens past the library.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    io::{self, ErrorKind},
    marker::PhantomData,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use registry_core::{
    Directory, Key, Layout, Managed, NativeLayout, Options, Registry, ServiceName, async_trait, encode_segment,
};
use registry_redis::{RedisBackend, RedisConfig, RedisTopology};
use tokio::time::{Instant, sleep, timeout};

use super::{Client, ClusterHarness, Harness, Link, Routed, ServerHarness, Wire, Wired};
use crate::{
    proxy::{FaultProxy, Stats},
    servers::{
        Cluster, Redis, Result, Server,
        resp::{self, Answer},
        shared_redis, shared_redis_cluster, shared_redis_sentinel,
    },
};

/// The Redis backend on a single server. Each case has a prefix of its own, on servers that all cases share or on its
/// own.
pub type RedisHarness = Deployed<Standalone>;
/// The Redis backend on a primary and a replica under Sentinels.
pub type RedisSentinelHarness = Deployed<Sentinel>;
/// The Redis backend on a Cluster.
pub type RedisClusterHarness = Deployed<Nodes>;

/// What the three ways to run Redis do not have in common.
#[async_trait]
pub trait Deployment: Debug + Send + Sync + 'static {
    /// See [`Harness::slack`].
    const SLACK: Duration;

    /// Servers of this kind.
    fn servers() -> Redis;

    /// Those that all cases share.
    async fn shared() -> Result<Server>;
}

/// A single server.
#[derive(Debug)]
pub struct Standalone;

/// A primary and a replica under three Sentinels.
#[derive(Debug)]
pub struct Sentinel;

/// A Cluster of three primaries and three replicas.
#[derive(Debug)]
pub struct Nodes;

/// How often the clients look whether a message was lost.
const POLL: Duration = Duration::from_millis(500);
/// For servers that are to answer, a new primary included.
const PATIENCE: Duration = Duration::from_secs(20);

#[async_trait]
impl Deployment for Standalone {
    const SLACK: Duration = Duration::from_secs(1);

    fn servers() -> Redis {
        Redis::new()
    }

    async fn shared() -> Result<Server> {
        shared_redis().await
    }
}

#[async_trait]
impl Deployment for Sentinel {
    const SLACK: Duration = Duration::from_secs(1);

    fn servers() -> Redis {
        Redis::sentinel()
    }

    async fn shared() -> Result<Server> {
        shared_redis_sentinel().await
    }
}

#[async_trait]
impl Deployment for Nodes {
    const SLACK: Duration = Duration::from_secs(1);

    fn servers() -> Redis {
        Redis::cluster()
    }

    async fn shared() -> Result<Server> {
        shared_redis_cluster().await
    }
}

/// Redis servers of one kind, and a prefix in them.
#[derive(Debug)]
pub struct Deployed<D> {
    config: RedisConfig,
    /// Whom clients are told to ask.
    seeds: Vec<SocketAddr>,
    /// All servers that clients may talk to.
    nodes: Vec<SocketAddr>,
    own: Option<Cluster>,
    prefix: String,
    kind: PhantomData<D>,
}

/// What a record is worth: a value, or nothing if it is over and not taken out yet. Nobody is judged before `~safe`.
const IS_ALIVE: &str = "
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local safe = tonumber(redis.call('HGET', KEYS[1], '~safe') or '') or 0
local function alive(id)
  local over = tonumber(redis.call('ZSCORE', KEYS[2], id) or '')
  return string.sub(id, 1, 1) ~= '~' and not (over and over <= now and now >= safe)
end
";
const GET: &str = "return alive(ARGV[1]) and redis.call('HGET', KEYS[1], ARGV[1])";
const LIST: &str = "
local all, living = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  if alive(all[i]) then living[#living + 1] = all[i] living[#living + 1] = string.sub(all[i + 1], 1, 600) end
end
return living
";

/// Changes by hand: the head is set to something new, which tells readers to read everything.
const PUT: &str = "
redis.call('ZREM', KEYS[2], ARGV[2])
return redis.call('HSET', KEYS[1], ARGV[2], ARGV[3], '~head', ARGV[1])
";
const DELETE: &str = "
redis.call('ZREM', KEYS[2], ARGV[2])
if redis.call('HDEL', KEYS[1], ARGV[2]) == 1 then redis.call('HSET', KEYS[1], '~head', ARGV[1]) end
";
const DELETE_ALL_OF_AN_OWNER: &str = "
local all, owner = redis.call('HGETALL', KEYS[1]), ARGV[2] .. ' '
for i = 1, #all, 2 do
  if string.sub(all[i + 1], 1, #owner) == owner then
    redis.call('HDEL', KEYS[1], all[i])
    redis.call('ZREM', KEYS[2], all[i])
    redis.call('HSET', KEYS[1], '~head', ARGV[1])
  end
end
";

impl<D: Deployment> Deployed<D> {
    async fn on(url: &str, own: Option<Cluster>) -> Self {
        let location = url.parse().expect("the URL of the servers is one");
        let config = RedisConfig::from_location(location).expect("the URL of the servers is one of Redis");
        let seeds = config.endpoints.iter().map(|seed| seed.parse().expect("servers are named by IP addresses"));
        let seeds: Vec<_> = seeds.collect();
        let prefix = format!("case-{:016x}", rand::random::<u64>());
        let mut deployed = Self { config, nodes: seeds.clone(), seeds, own, prefix, kind: PhantomData };
        deployed.nodes = deployed.until("the servers name each other", || deployed.all_nodes()).await;
        deployed
    }

    fn own(&self) -> &Cluster {
        self.own.as_ref().expect("this case needs servers of its own")
    }

    /// The member of a case's own servers that is the primary for a service now.
    pub async fn primary(&self, service: &str) -> &Server {
        let service = ServiceName::parse(service).expect("a service name");
        let key = self.keys_of(&service, Directory::Providers).records;
        let addr = self.until("there is a primary", || self.primary_of(&key)).await;
        let found = self.own().members().iter().find(|member| member.addr() == addr);
        found.expect("the primary is one of our own servers")
    }

    fn position(&self, server: &Server) -> usize {
        let found = self.members().iter().position(|member| member.addr() == server.addr());
        found.expect("it is one of our own servers")
    }

    /// All members of a case's own servers: the data of a single server; primary, replica and Sentinels; or the
    /// primaries and then the replicas of a Cluster.
    pub fn members(&self) -> &[Server] {
        self.own().members()
    }

    /// Makes a replica the primary for a service, in good order, and waits until it is.
    pub async fn fail_over(&self, service: &str) {
        let before = self.primary(service).await.addr();
        match &self.config.topology {
            RedisTopology::Sentinel { master } => {
                let order = format!("SENTINEL FAILOVER {master}");
                self.until("a Sentinel fails over", || resp::ask_text(self.seeds[0], &order)).await;
            }
            _ => {
                let replica = || async {
                    let nodes = self.cluster_nodes().await?;
                    let id = nodes.iter().find(|node| node.addr == before).map(|node| node.id.clone());
                    let replica = nodes.iter().find(|node| Some(&node.primary) == id.as_ref());
                    replica.map(|node| node.addr).ok_or_else(|| io::Error::other("it has no replica"))
                };
                let replica = self.until("there is a replica", replica).await;
                self.until("it takes over", || resp::ask_text(replica, "CLUSTER FAILOVER")).await;
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while self.primary(service).await.addr() == before {
            assert!(Instant::now() < deadline, "{before} stays the primary");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The servers that hold data and take writes.
    async fn primaries(&self) -> io::Result<Vec<SocketAddr>> {
        match &self.config.topology {
            RedisTopology::Sentinel { master } => {
                let question = format!("SENTINEL GET-MASTER-ADDR-BY-NAME {master}");
                let answer = self.first_seed(&question).await?;
                addresses(answer.lines()).map(|addr| vec![addr])
            }
            RedisTopology::Cluster => {
                let nodes = self.cluster_nodes().await?;
                Ok(nodes.into_iter().filter(|node| node.serves).map(|node| node.addr).collect())
            }
            _ => Ok(self.seeds.clone()),
        }
    }

    async fn all_nodes(&self) -> io::Result<Vec<SocketAddr>> {
        match &self.config.topology {
            RedisTopology::Sentinel { master } => {
                let mut nodes = [self.seeds.clone(), self.primaries().await?].concat();
                let replicas = self.first_seed(&format!("SENTINEL REPLICAS {master}")).await?;
                let words: Vec<_> = replicas.lines().collect();
                let named = |name| words.chunks_exact(2).filter(move |pair| pair[0] == name).map(|pair| pair[1]);
                for (ip, port) in named("ip").zip(named("port")) {
                    nodes.push(addresses([ip, port].into_iter())?);
                }
                Ok(nodes)
            }
            RedisTopology::Cluster => Ok(self.cluster_nodes().await?.into_iter().map(|node| node.addr).collect()),
            _ => Ok(self.seeds.clone()),
        }
    }

    /// What a node says that is in touch with the others.
    async fn cluster_nodes(&self) -> io::Result<Vec<ClusterNode>> {
        let mut last = ErrorKind::NotFound.into();
        for seed in &self.seeds {
            let ask = async || {
                let info = resp::ask_text(*seed, "CLUSTER INFO").await?;
                let in_touch = info.contains("cluster_state:ok").then_some(());
                in_touch.ok_or_else(|| io::Error::other("the cluster is down"))?;
                resp::ask_text(*seed, "CLUSTER NODES").await
            };
            match ask().await {
                Ok(nodes) => return Ok(nodes.lines().filter_map(ClusterNode::parse).collect()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// What the first says that says something: others may be down.
    async fn first_seed(&self, question: &str) -> io::Result<String> {
        let mut last = ErrorKind::NotFound.into();
        for seed in &self.seeds {
            match resp::ask_text(*seed, question).await {
                Ok(answer) => return Ok(answer),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn primary_of(&self, key: &str) -> io::Result<SocketAddr> {
        let mut last = ErrorKind::NotFound.into();
        for primary in self.primaries().await? {
            match resp::ask(primary, &["EXISTS", key]).await {
                Ok(_) => return Ok(primary),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// What comes of it, which may fail for a while.
    async fn until<T, F>(&self, what: &str, mut attempt: impl FnMut() -> F) -> T
    where
        F: Future<Output = io::Result<T>>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match timeout(PATIENCE, attempt()).await.map_err(io::Error::from).flatten() {
                Ok(done) => return done,
                Err(error) if Instant::now() > deadline => panic!("not within {PATIENCE:?}: {what}; {error}"),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Runs a script where the keys of a service lie.
    async fn eval(&self, script: &str, keys: &Keys, args: &[&[u8]]) -> Answer {
        let mut command: Vec<&[u8]> =
            vec![b"EVAL", script.as_bytes(), b"2", keys.records.as_bytes(), keys.expiry.as_bytes()];
        command.extend_from_slice(args);
        let run = || async { resp::ask_patiently(self.primary_of(&keys.records).await?, &command).await };
        self.until("a script runs", run).await
    }

    /// A command where a key lies.
    async fn order(&self, key: &str, command: &[&str]) -> Answer {
        let give = || async { resp::ask(self.primary_of(key).await?, command).await };
        self.until("an order is taken", give).await
    }

    /// The keys that match, wherever they lie.
    async fn matching(&self, pattern: &str) -> Vec<String> {
        let look = || async {
            let mut found = Vec::new();
            for primary in self.primaries().await? {
                found.extend(resp::ask(primary, &["KEYS", pattern]).await?.into_iter().flatten().map(text));
            }
            Ok(found)
        };
        self.until("the keys are listed", look).await
    }

    fn keys_of(&self, service: &ServiceName, directory: Directory) -> Keys {
        let half = if directory == Directory::Consumers { "consumers:" } else { "" };
        let tag = format!("{}/{}", self.prefix, encode_segment(service));
        Keys { records: format!("{{{tag}}}:{half}records"), expiry: format!("{{{tag}}}:{half}expiry") }
    }

    fn keys_of_key(&self, key: &Key) -> Keys {
        self.keys_of(&key.service, key.directory)
    }

    /// All hashes of records in the namespace.
    async fn all_keys(&self) -> Vec<Keys> {
        let records = self.matching(&format!("{{{}/*}}:*records", self.prefix)).await;
        let expiry = |records: &str| records.strip_suffix("records").map(|start| format!("{start}expiry"));
        records.into_iter().filter_map(|records| Some(Keys { expiry: expiry(&records)?, records })).collect()
    }

    /// Fields and the beginnings of values of all that is alive.
    async fn living(&self) -> Vec<(String, String)> {
        let mut living = Vec::new();
        for keys in self.all_keys().await {
            let listed = self.eval(&format!("{IS_ALIVE}{LIST}"), &keys, &[]).await;
            let words: Vec<_> = listed.into_iter().flatten().map(text).collect();
            living.extend(words.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())));
        }
        living
    }

    /// A client's network, and the addresses by which it knows the servers.
    async fn network(&self) -> (Network, Vec<String>) {
        if let [only] = self.nodes[..] {
            // One that tells of no other, wherever it is.
            let proxy = FaultProxy::start(only).await.expect("there is a free port");
            let addr = proxy.addr().to_string();
            return (Network(vec![proxy]), vec![addr]);
        }
        let (network, host) = loop {
            // Spelled with as many characters as 127.0.0.1.
            let [a, b] = [rand::random_range(1..10), rand::random_range(0..10)];
            let host = Ipv4Addr::new(127, a, b, rand::random_range(1..10));
            match Network::at(host, &self.nodes).await {
                Ok(network) => break (network, host),
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => panic!("a client cannot be given a network of its own at {host}: {error}"),
            }
        };
        let seeds = self.seeds.iter().map(|seed| format!("{host}:{}", seed.port()));
        (network, seeds.collect())
    }

    async fn of_owner(&self, key: &Key) -> String {
        let keys = self.keys_of_key(key);
        let found = self.eval(&format!("{IS_ALIVE}{GET}"), &keys, &[NativeLayout.path(key).as_bytes()]).await;
        let value = found.into_iter().flatten().next().expect("there is a record");
        envelope(&value).expect("it is under a session").0.to_owned()
    }
}

#[async_trait]
impl<D: Deployment> Harness for Deployed<D> {
    /// Redis grants any. A busy machine keeps this one.
    fn ttl() -> Duration {
        Duration::from_secs(2)
    }

    fn slack() -> Duration {
        D::SLACK
    }

    async fn start() -> Self {
        let shared = D::shared().await.expect("the shared Redis starts");
        Self::on(shared.url(), None).await
    }

    async fn with_own_server() -> Self {
        let servers = D::servers().durable();
        let size = servers.size();
        let own = Cluster::start(servers, size).await.expect("Redis starts");
        let url = own.url().to_owned();
        Self::on(&url, Some(own)).await
    }

    async fn connect(&self, options: Options) -> Client {
        let (network, seeds) = self.network().await;
        let mut config = self.config.clone().prefix(&self.prefix).poll(POLL).options(options.clone());
        config.endpoints = seeds;
        let backend = RedisBackend::new(config).expect("the configuration is valid");
        let wire = Wire::default();
        let calls = wire.calls();
        let registry = Managed::new(Wired::new(backend, wire), options).expect("the options are valid");
        let registry: Arc<dyn Registry> = Arc::new(registry);
        Client::new(registry, network, calls)
    }

    /// A session is an owner: what carries its name goes.
    async fn end_session(&self, key: &Key) {
        let owner = self.of_owner(key).await;
        for keys in self.all_keys().await {
            self.eval(DELETE_ALL_OF_AN_OWNER, &keys, &[nonce().as_bytes(), owner.as_bytes()]).await;
        }
    }

    async fn delete(&self, key: &Key) {
        let args = [nonce(), NativeLayout.path(key)];
        self.eval(DELETE, &self.keys_of_key(key), &[args[0].as_bytes(), args[1].as_bytes()]).await;
    }

    async fn delete_service(&self, service: &str) {
        let pattern = format!("{{{}/{}}}:*", self.prefix, encode_segment(service));
        for key in self.matching(&pattern).await {
            self.order(&key, &["DEL", &key]).await;
        }
    }

    async fn put_raw(&self, key: &Key, bytes: &[u8]) {
        let path = NativeLayout.path(key);
        self.eval(PUT, &self.keys_of_key(key), &[nonce().as_bytes(), path.as_bytes(), bytes]).await;
    }

    async fn raw(&self, key: &Key) -> Option<Vec<u8>> {
        let path = NativeLayout.path(key);
        let found = self.eval(&format!("{IS_ALIVE}{GET}"), &self.keys_of_key(key), &[path.as_bytes()]).await;
        let value = found.into_iter().next().flatten()?;
        let bytes = envelope(&value).map(|(_, bytes)| bytes.to_vec());
        Some(bytes.unwrap_or(value))
    }

    async fn keys(&self) -> Vec<String> {
        self.living().await.into_iter().map(|(path, _)| path).collect()
    }

    async fn compact(&self) {
        for log in self.matching(&format!("{{{}/*}}:log", self.prefix)).await {
            self.order(&log, &["XTRIM", &log, "MAXLEN", "0"]).await;
        }
    }

    async fn sessions(&self) -> usize {
        let living = self.living().await;
        let owners = living.iter().filter_map(|(_, value)| Some(envelope(value.as_bytes())?.0.to_owned()));
        owners.collect::<BTreeSet<_>>().len()
    }

    /// Subscriptions to channels of services: Sentinels have others.
    async fn watchers(&self) -> usize {
        let mut watchers = 0;
        for node in &self.nodes {
            for (channels, count) in [("CHANNELS", "NUMSUB"), ("SHARDCHANNELS", "SHARDNUMSUB")] {
                let question = ["PUBSUB", channels, "{*"];
                let asked = async || match resp::ask(*node, &question).await {
                    // Sentinels have none of it, and before Redis 7 nobody has shards.
                    Err(error) if error.kind() == ErrorKind::Other => Ok(Vec::new()),
                    other => other,
                };
                let channels = self.until("a server names its channels", asked).await;
                if channels.is_empty() {
                    continue;
                }
                let names = channels.into_iter().flatten().map(text);
                let command: Vec<_> = ["PUBSUB".to_owned(), count.to_owned()].into_iter().chain(names).collect();
                let counts = resp::ask(*node, &command).await.expect("Redis counts its subscribers");
                watchers += counts.iter().skip(1).step_by(2).map(|count| number(count.as_deref())).sum::<usize>();
            }
        }
        watchers
    }

    async fn kill(&self) {
        self.own().kill().await.expect("Redis is killed");
    }

    async fn restart(&self) {
        self.own().restart().await.expect("Redis comes back");
    }

    async fn wipe(&self) {
        self.own().wipe().await.expect("Redis comes back");
    }

    async fn freeze(&self) {
        self.own().freeze().await.expect("Redis is frozen");
    }

    async fn thaw(&self) {
        self.own().thaw().await.expect("Redis is thawed");
    }
}

impl<D: Deployment> ServerHarness for Deployed<D> {
    fn cluster(&self) -> &Cluster {
        self.own()
    }
}

#[async_trait]
impl ClusterHarness for RedisSentinelHarness {
    async fn leader(&self, service: &str) -> usize {
        self.position(self.primary(service).await)
    }

    /// The primary, and the Sentinels that would have to agree on another.
    async fn quorum(&self, service: &str) -> Vec<usize> {
        vec![self.leader(service).await, 2, 3]
    }
}

#[async_trait]
impl ClusterHarness for RedisClusterHarness {
    async fn leader(&self, service: &str) -> usize {
        self.position(self.primary(service).await)
    }

    /// The primary, and another: one alone cannot agree to anything.
    async fn quorum(&self, service: &str) -> Vec<usize> {
        let leader = self.primary(service).await.addr();
        let primaries = self.until("the primaries are known", || self.primaries()).await;
        let other = primaries.into_iter().find(|primary| *primary != leader).expect("there are three");
        let position = |addr| self.members().iter().position(|member| member.addr() == addr);
        [leader, other].into_iter().filter_map(position).collect()
    }
}

/// The others have more to say in a connection string.
#[async_trait]
impl Routed for Deployed<Standalone> {
    async fn route(&self, options: &str) -> (String, Box<dyn Link>) {
        let (network, seeds) = self.network().await;
        let poll = POLL.as_millis();
        (format!("redis://{}/{}?{options}&poll={poll}ms", seeds.join(","), self.prefix), Box::new(network))
    }
}

/// Where the records of a service lie, and when they are over.
struct Keys {
    records: String,
    expiry: String,
}

/// One line of what a node of a Cluster says of all of them.
struct ClusterNode {
    id: String,
    addr: SocketAddr,
    /// The id of its primary; `-` if it is one.
    primary: String,
    /// Whether it is a primary with slots, and not known to be dead.
    serves: bool,
}

impl ClusterNode {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let [id, addr, flags, primary, ..] = words[..] else { return None };
        let flags: Vec<_> = flags.split(',').collect();
        let serves = flags.contains(&"master") && !flags.contains(&"fail") && words.len() > 8;
        let addr = addr.split('@').next()?.parse().ok()?;
        Some(Self { id: id.to_owned(), addr, primary: primary.to_owned(), serves })
    }
}

/// Proxies in place of all servers: to its client, they are other servers than those of other clients.
#[derive(Debug)]
struct Network(Vec<FaultProxy>);

impl Network {
    async fn at(host: Ipv4Addr, nodes: &[SocketAddr]) -> io::Result<Self> {
        let mut proxies = Vec::new();
        for node in nodes {
            proxies.push(FaultProxy::in_place_of(*node, host).await?);
        }
        Ok(Self(proxies))
    }
}

impl Link for Network {
    fn cut(&self) {
        self.0.iter().for_each(Link::cut);
    }

    fn hang(&self) {
        self.0.iter().for_each(Link::hang);
    }

    fn delay(&self, by: Duration) {
        self.0.iter().for_each(|proxy| Link::delay(proxy, by));
    }

    fn heal(&self) {
        self.0.iter().for_each(Link::heal);
    }

    fn traffic(&self) -> Vec<(SocketAddr, Stats)> {
        self.0.iter().flat_map(Link::traffic).collect()
    }
}

/// An address that is answered in two parts.
fn addresses<'a>(mut parts: impl Iterator<Item = &'a str>) -> io::Result<SocketAddr> {
    let [ip, port] = [parts.next(), parts.next()].map(Option::unwrap_or_default);
    format!("{ip}:{port}").parse().map_err(io::Error::other)
}

/// The owner of a value that was put under a session, and the bytes of the record: `OWNER EPOCH TTL BYTES`.
fn envelope(value: &[u8]) -> Option<(&str, &[u8])> {
    let mut parts = value.splitn(4, |byte| *byte == b' ');
    let owner = std::str::from_utf8(parts.next()?).ok()?;
    let number = |part: &[u8]| std::str::from_utf8(part).ok()?.parse::<u64>().ok();
    let (_epoch, _ttl) = (number(parts.next()?)?, number(parts.next()?)?);
    Some((owner, parts.next()?))
}

/// Something that was never a head.
fn nonce() -> String {
    format!("by-hand-{:016x}", rand::random::<u64>())
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

fn number(bytes: Option<&[u8]>) -> usize {
    String::from_utf8_lossy(bytes.unwrap_or_default()).parse().unwrap_or(0)
}
