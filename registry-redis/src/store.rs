//! Which server serves what, and every request's way there.
//!
//! ```text
//!           ┌────────────── trouble: a request failed, a connection ended ─────────────┐
//!           ▼                                                                          │
//! survey: who is it? ──all answer──▶ connected ──────────────────────────────────────▶ wait
//!           └────────one does not──▶ suspended ──back-off──▶ survey
//! ```
//!
//! *Who is it* is the one thing in which standalone servers, Sentinel and Cluster differ.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use redis::{Cmd, Value};
use registry_core::{Error, Result, SessionEvent};
use tokio::{
    sync::{Notify, broadcast, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};

use crate::{
    config::{RedisConfig, RedisTopology},
    error::{Class, Failure, NAME},
    link::{Address, Line, Link, Push, Server, Wires},
    scripts::Script,
    space::SLOTS,
};

/// How often one request is sent on to another server.
const REDIRECTS: u32 = 5;
/// The first and the longest pause between two surveys while a server is missing; longer where we are refused.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(800);
const REFUSED_PAUSE: Duration = Duration::from_secs(5);
/// Events that are kept until somebody listens.
const EVENTS: usize = 64;

/// The servers, and which of them serves which slots.
pub(crate) struct Store {
    topology: RedisTopology,
    seeds: Vec<Address>,
    wires: Arc<Wires>,
    /// Where sentinels are asked.
    sentinels: Vec<Link>,
    /// Short, never held across an `.await`.
    nodes: Mutex<BTreeMap<Address, Arc<Node>>>,
    map: watch::Sender<Option<Result<Arc<Map>, Failure>>>,
    /// Rotates through those who can be asked for the map.
    turn: AtomicUsize,
    pub(crate) trouble: Arc<Notify>,
    events: broadcast::Sender<SessionEvent>,
    /// What happens with messages of channels.
    push: Push,
    pub(crate) limit: Duration,
    /// How often servers are asked whether they are there, and how long they may take to say so.
    probe: Duration,
    patience: Duration,
    ttl: Duration,
}

/// One server: a connection for requests, and one for messages once somebody follows a service there. A connection
/// with channels has a bounded buffer at the server, which a large answer would overflow.
pub(crate) struct Node {
    pub(crate) requests: Link,
    pub(crate) messages: Link,
}

/// Ranges of slots, in order, and who serves them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Map(Vec<(u16, u16, Address)>);

impl Map {
    fn one(address: Address) -> Self {
        Self(vec![(0, SLOTS - 1, address)])
    }

    pub(crate) fn server_of(&self, slot: u16) -> Option<&Address> {
        self.0.iter().find(|(from, to, _)| (*from..=*to).contains(&slot)).map(|(.., address)| address)
    }

    fn servers(&self) -> BTreeSet<&Address> {
        self.0.iter().map(|(.., address)| address).collect()
    }
}

/// What is asked of a server.
pub(crate) enum Request<'a> {
    Script { script: &'a Script, keys: Vec<Cow<'a, str>>, args: Vec<Cow<'a, [u8]>> },
    Command(Cmd),
}

impl Request<'_> {
    fn cmd(&self, whole: bool) -> Cmd {
        match self {
            Self::Script { script, keys, args } => script.call(whole, keys, args),
            Self::Command(cmd) => cmd.clone(),
        }
    }
}

/// A command with its arguments.
pub(crate) fn command<'a>(words: &[&'a str], rest: impl IntoIterator<Item = &'a [u8]>) -> Request<'static> {
    let mut cmd = Cmd::new();
    for word in words.iter().map(|word| word.as_bytes()).chain(rest) {
        cmd.arg(word);
    }
    Request::Command(cmd)
}

impl Store {
    /// Checks the configuration and starts looking for servers; ends with the guard.
    pub(crate) fn new(
        config: &RedisConfig,
        push: Push,
    ) -> Result<(Arc<Self>, broadcast::Receiver<SessionEvent>, DropGuard)> {
        config.validate()?;
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| Error::invalid("the Redis backend must be made within a tokio runtime").with_backend(NAME))?;
        let mode = if config.topology == RedisTopology::Cluster { "cluster" } else { "standalone" };
        let wires = Arc::new(Wires::to_servers(config, mode)?);
        let seeds: Vec<_> =
            config.addresses()?.into_iter().map(|(host, port)| Address { host: host.into(), port }).collect();
        let trouble = Arc::new(Notify::new());
        let mut sentinels = Vec::new();
        if matches!(config.topology, RedisTopology::Sentinel { .. }) {
            let wires = Arc::new(Wires::to_sentinels(config)?);
            let link = |address: &Address| Link::new(address.clone(), wires.clone(), None, trouble.clone());
            sentinels = seeds.iter().map(link).collect();
        }
        let (events, first_events) = broadcast::channel(EVENTS);
        let options = &config.options;
        let store = Arc::new(Self {
            topology: config.topology.clone(),
            seeds,
            wires,
            sentinels,
            nodes: Mutex::default(),
            map: watch::Sender::new(None),
            turn: AtomicUsize::new(0),
            trouble,
            events,
            push,
            limit: options.request_timeout,
            probe: config.poll.min(options.ttl / 4),
            patience: options.request_timeout.min((options.ttl / 3).max(Duration::from_millis(500))),
            ttl: options.ttl,
        });
        let stop = CancellationToken::new();
        let pilot = store.clone();
        runtime.spawn(stop.clone().run_until_cancelled_owned(async move { pilot.steer().await }));
        Ok((store, first_events, stop.drop_guard()))
    }

    pub(crate) fn events(&self) -> broadcast::Receiver<SessionEvent> {
        self.events.subscribe()
    }

    /// Ends every connection.
    pub(crate) fn end(&self) {
        std::mem::take(&mut *self.nodes()).values().for_each(|node| node.end());
        self.sentinels.iter().for_each(Link::end);
    }

    /// Has a request answered by whoever serves the slot, within the limit of one call.
    pub(crate) async fn ask(&self, slot: u16, request: &Request<'_>) -> Result<Value, Failure> {
        self.ask_on(slot, request).await.map(|(_, answer)| answer)
    }

    /// The same, with the [`Line::id`] that it was answered on.
    pub(crate) async fn ask_on(&self, slot: u16, request: &Request<'_>) -> Result<(u64, Value), Failure> {
        // Boxed, for the client's part of it is larger than all that callers add: they are moved about.
        let answer = timeout(self.limit, Box::pin(self.attempt(slot, request))).await;
        self.heed(answer.unwrap_or_else(|_| Err(Failure::late(self.limit))))
    }

    async fn attempt(&self, slot: u16, request: &Request<'_>) -> Result<(u64, Value), Failure> {
        let mut address = self.server_of(slot).await?;
        let (mut whole, mut asking) = (false, false);
        for _ in 0..REDIRECTS {
            let node = self.node(&address);
            let line = node.requests.line().await?;
            let failure = match line.send(&request.cmd(whole), asking).await {
                Ok(answer) => return Ok((line.id, answer)),
                Err(failure) => failure,
            };
            let (to, ask) = match &failure.class {
                Class::NoScript if !whole => {
                    whole = true;
                    continue;
                }
                Class::Moved(to) => (to, false),
                Class::Ask(to) => (to, true),
                _ => return Err(failure),
            };
            address = address.said_by(to).ok_or_else(|| failure.clone())?;
            asking = ask;
            if !ask {
                // Others need not go round by the old server.
                self.trouble.notify_one();
            }
        }
        Err(Failure::new(Class::NotNow, "CLUSTERDOWN the servers send the request in circles"))
    }

    /// The connection for messages of the channels of a slot.
    pub(crate) async fn messages(&self, slot: u16) -> Result<Line, Failure> {
        let open = async {
            let address = self.server_of(slot).await?;
            self.node(&address).messages.line().await
        };
        self.heed(timeout(self.limit, open).await.unwrap_or_else(|_| Err(Failure::late(self.limit))))
    }

    /// Has a channel begin or end, and waits until the server says so.
    pub(crate) async fn turn(&self, line: &Line, word: &str, channel: &str) -> Result<(), Failure> {
        let mut cmd = Cmd::new();
        cmd.arg(word).arg(channel);
        let turned = timeout(self.limit, line.send(&cmd, false)).await;
        self.heed(turned.unwrap_or_else(|_| Err(Failure::late(self.limit))).map(drop))
    }

    /// The server of a slot, connected.
    async fn server(&self, slot: u16) -> Result<Arc<Server>, Failure> {
        let open = async {
            let address = self.server_of(slot).await?;
            Ok(self.node(&address).requests.line().await?.server)
        };
        self.heed(timeout(self.limit, open).await.unwrap_or_else(|_| Err(Failure::late(self.limit))))
    }

    /// Whether the channels of a slot stay on its node, which newer clusters have: elsewhere a message goes to every node.
    pub(crate) async fn has_sharded_channels(&self, slot: u16) -> Result<bool, Failure> {
        Ok(self.is_cluster() && self.server(slot).await?.has_sharded_channels())
    }

    /// Whether the records here are those of a primary, or its copies, which may be late.
    pub(crate) async fn is_primary(&self, slot: u16) -> Result<bool, Failure> {
        Ok(self.server(slot).await?.is_primary)
    }

    /// Has somebody look who serves, if this may be why there is no answer.
    fn heed<T>(&self, answer: Result<T, Failure>) -> Result<T, Failure> {
        if answer.as_ref().is_err_and(Failure::is_trouble) {
            self.trouble.notify_one();
        }
        answer
    }

    /// Whether two slots can be asked for in one command.
    pub(crate) fn is_cluster(&self) -> bool {
        self.topology == RedisTopology::Cluster
    }

    /// Who serves a slot; waits for the first survey.
    pub(crate) async fn server_of(&self, slot: u16) -> Result<Address, Failure> {
        let mut maps = self.map.subscribe();
        let known = maps.wait_for(Option::is_some).await;
        let map = known.ok().and_then(|known| known.clone());
        let map = map.unwrap_or_else(|| Err(Failure::new(Class::Dropped, "nobody looks for a server any more")))?;
        let server = map.server_of(slot).cloned();
        server.ok_or_else(|| Failure::new(Class::NotNow, format!("CLUSTERDOWN nobody serves slot {slot}")))
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<Address, Arc<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, address: &Address) -> Arc<Node> {
        let link = |push| Link::new(address.clone(), self.wires.clone(), push, self.trouble.clone());
        let node = || Arc::new(Node { requests: link(None), messages: link(Some(self.push.clone())) });
        self.nodes().entry(address.clone()).or_insert_with(node).clone()
    }

    /// Looks who serves, for ever, and tells when all of them do and when not.
    async fn steer(&self) {
        let (mut up, mut pause, mut refusal) = (false, PAUSE, String::new());
        self.tell(SessionEvent::Connecting);
        let mut troubled = true;
        loop {
            let before = self.known();
            match self.survey(troubled).await {
                Ok(map) => {
                    // Slots that are moved in good order lose nothing; another server may lack what was written last.
                    let moved = before.as_ref().is_some_and(|before| before.servers() != map.servers());
                    if !up || moved {
                        info!(backend = NAME, "connected");
                        self.tell(SessionEvent::Connected { ttl: self.ttl });
                    }
                    (up, pause) = (true, PAUSE);
                }
                Err(failure) => {
                    if std::mem::take(&mut up) {
                        self.tell(SessionEvent::Suspended);
                    }
                    let refused = matches!(failure.class, Class::Denied | Class::Certificate | Class::Unfit);
                    // Once: it is the same at every attempt.
                    if refused && refusal != failure.to_string() {
                        refusal = failure.to_string();
                        warn!(backend = NAME, error = %failure, "refused");
                    }
                    debug!(backend = NAME, error = %failure, "not all servers answer");
                    // A map that is known stays: what is served is served.
                    if self.known().is_none() {
                        self.map.send_replace(Some(Err(failure)));
                    }
                    pause = if refused { REFUSED_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
                }
            }
            troubled = self.pause(up, pause).await;
        }
    }

    /// Waits for the next survey, and says whether there is trouble.
    async fn pause(&self, up: bool, pause: Duration) -> bool {
        if up {
            return tokio::select! {
                () = self.trouble.notified() => {
                    // Those that fail together are one trouble.
                    sleep(PAUSE.mul_f64(rand::random())).await;
                    true
                }
                () = sleep(self.probe) => self.is_watched(),
            };
        }
        sleep(pause / 2 + (pause / 2).mul_f64(rand::random())).await;
        true
    }

    /// Whether somebody else may move the primary without a word to us.
    fn is_watched(&self) -> bool {
        !self.sentinels.is_empty()
    }

    fn known(&self) -> Option<Arc<Map>> {
        self.map.borrow().clone().and_then(Result::ok)
    }

    /// Whoever serves no more is left. Who has served nothing yet may be about to.
    fn follow(&self, map: &Arc<Map>) {
        let (before, servers) = (self.known(), map.servers());
        let served = before.as_ref().map(|before| before.servers()).unwrap_or_default();
        let mut left = Vec::new();
        self.nodes().retain(|address, node| {
            let stays = servers.contains(address) || (self.is_cluster() && !served.contains(address));
            if !stays {
                left.push(node.clone());
            }
            stays
        });
        left.iter().for_each(|node| node.end());
        self.map.send_if_modified(|known| {
            let same = matches!(known, Some(Ok(known)) if known == map);
            *known = Some(Ok(map.clone()));
            !same
        });
    }

    /// Finds out who serves, if there is `trouble`, and whether they are there.
    async fn survey(&self, trouble: bool) -> Result<Arc<Map>, Failure> {
        let map = match self.known() {
            Some(map) if !trouble => map,
            known => match self.locate(known.clone()).await {
                Ok(map) => map,
                Err(failure) => {
                    // Whoever knows better is silent; who served until now may be, too.
                    if let Some(known) = known {
                        let _ = self.probe_all(&known, Duration::ZERO).await;
                    }
                    return Err(failure);
                }
            },
        };
        // Before it is known whether all of them answer: one that does not must not keep the others from being asked.
        self.follow(&map);
        // Where somebody asks about as often as we, that is enough.
        self.probe_all(&map, if trouble { Duration::ZERO } else { self.probe.mul_f64(1.5) }).await?;
        Ok(map)
    }

    /// Finds out whether those who serve answer, unless they have `lately`.
    async fn probe_all(&self, map: &Map, lately: Duration) -> Result<(), Failure> {
        let nodes: Vec<_> = {
            let nodes = self.nodes();
            map.servers().into_iter().filter_map(|address| nodes.get(address).cloned()).collect()
        };
        let probes = nodes.iter().map(|node| async {
            // Nobody follows anything there if there is no connection for messages.
            let (requests, _) = tokio::join!(node.requests.probe(lately, self.patience), async {
                if node.messages.current().is_some() {
                    let _ = node.messages.probe(Duration::ZERO, self.patience).await;
                }
            });
            requests.map(drop)
        });
        join_all(probes).await.into_iter().collect()
    }

    async fn locate(&self, known: Option<Arc<Map>>) -> Result<Arc<Map>, Failure> {
        match &self.topology {
            RedisTopology::Standalone => self.find_primary().await,
            RedisTopology::Sentinel { master } => self.ask_sentinels(master).await,
            RedisTopology::Cluster => self.ask_nodes(known).await,
        }
    }

    /// The first that is a primary, or else the first that answers.
    async fn find_primary(&self) -> Result<Arc<Map>, Failure> {
        let (mut replica, mut failure) = (None, None);
        for seed in &self.seeds {
            match self.node(seed).requests.probe(Duration::ZERO, self.patience).await {
                Ok(line) if line.server.is_primary => return Ok(Arc::new(Map::one(seed.clone()))),
                Ok(_) => drop(replica.get_or_insert(seed)),
                Err(error) => drop(failure.get_or_insert(error)),
            }
        }
        match replica {
            Some(replica) => Ok(Arc::new(Map::one(replica.clone()))),
            None => Err(failure.unwrap_or_else(|| Failure::new(Class::Dropped, "there is no server"))),
        }
    }

    /// Whom the sentinels name that has heard of the latest failover.
    async fn ask_sentinels(&self, master: &str) -> Result<Arc<Map>, Failure> {
        let asked = self.sentinels.iter().map(|sentinel| async {
            let answer = timeout(self.patience, ask_sentinel(sentinel, master)).await;
            answer.unwrap_or_else(|_| {
                sentinel.hang_up();
                Err(Failure::late(self.patience))
            })
        });
        let (mut named, mut failure, mut answers) = (None, None, 0);
        let mut asked: FuturesUnordered<_> = asked.collect();
        let mut patience = self.patience;
        while let Ok(Some(answer)) = timeout(patience, asked.next()).await {
            answers += usize::from(answer.is_ok());
            if answers > self.sentinels.len() / 2 {
                // Those who agreed on the last failover are among them. The others need not be waited for.
                patience = PAUSE;
            }
            match answer {
                Ok(answer) if named.as_ref().is_none_or(|(epoch, _)| answer.0 > *epoch) => named = Some(answer),
                Ok(_) => {}
                Err(error) => drop(failure.get_or_insert(error)),
            }
        }
        let Some((_, address)) = named else {
            return Err(failure.unwrap_or_else(|| Failure::new(Class::Dropped, "there is no sentinel")));
        };
        let line = self.node(&address).requests.probe(Duration::ZERO, self.patience).await?;
        if !line.server.is_primary {
            let text = format!("READONLY the sentinels name {address}, which is a replica still");
            return Err(Failure::new(Class::ReadOnly, text));
        }
        Ok(Arc::new(Map::one(address)))
    }

    /// The map of slots of the first node that has one.
    async fn ask_nodes(&self, known: Option<Arc<Map>>) -> Result<Arc<Map>, Failure> {
        let mut nodes: Vec<Address> = known.iter().flat_map(|map| map.servers()).cloned().collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let middle = turn % nodes.len().max(1);
        nodes.rotate_left(middle);
        nodes.extend(self.seeds.iter().cloned());
        let mut failure = None;
        for address in nodes {
            match timeout(self.patience, self.slots(&address)).await {
                Ok(Ok(map)) => return Ok(Arc::new(map)),
                Ok(Err(error)) => drop(failure.get_or_insert(error)),
                Err(_) => {
                    // Silent: whoever asks it next shall have a connection of its own.
                    self.node(&address).end();
                    self.nodes().remove(&address);
                    failure.get_or_insert(Failure::late(self.patience));
                }
            }
        }
        Err(failure.unwrap_or_else(|| Failure::new(Class::Dropped, "there is no node")))
    }

    async fn slots(&self, address: &Address) -> Result<Map, Failure> {
        let mut cmd = Cmd::new();
        cmd.arg("CLUSTER").arg("SLOTS");
        let answer = self.node(address).requests.line().await?.send(&cmd, false).await?;
        let map = parse_slots(address, answer).ok_or_else(|| Failure::odd("the map of slots"))?;
        if map.0.is_empty() {
            return Err(Failure::new(Class::NotNow, format!("CLUSTERDOWN {address} knows of no slots")));
        }
        Ok(map)
    }

    fn tell(&self, event: SessionEvent) {
        // Nobody listens before the engine does.
        let _ = self.events.send(event);
    }
}

impl Node {
    fn end(&self) {
        self.requests.end();
        self.messages.end();
    }
}

async fn ask_sentinel(sentinel: &Link, master: &str) -> Result<(u64, Address), Failure> {
    let mut cmd = Cmd::new();
    cmd.arg("SENTINEL").arg("MASTER").arg(master);
    let answer = sentinel.line().await?.send(&cmd, false).await.map_err(|failure| {
        let unknown = failure.to_string().contains("No such master");
        let text = format!("{} knows no master named {master:?}", sentinel.address);
        if unknown { Failure::new(Class::Misconfigured, text) } else { failure }
    })?;
    parse_master(&sentinel.address, answer).ok_or_else(|| Failure::odd("what a sentinel says"))
}

/// The epoch of the last failover, and the primary since; one without a host means the one that was asked.
pub(crate) fn parse_master(asked: &Address, answer: Value) -> Option<(u64, Address)> {
    let fields: BTreeMap<String, String> = redis::from_redis_value(answer).ok()?;
    let number = |name: &str| fields.get(name)?.parse::<u64>().ok();
    let address = Address { host: asked.or_same(fields.get("ip")?), port: u16::try_from(number("port")?).ok()? };
    Some((number("config-epoch").unwrap_or(0), address))
}

/// `[[from, to, [host, port, …], replica…]…]`; a node that does not know its host means the one that it was asked at.
pub(crate) fn parse_slots(asked: &Address, answer: Value) -> Option<Map> {
    let Value::Array(ranges) = answer else { return None };
    let mut map = Vec::with_capacity(ranges.len());
    for range in ranges {
        let Value::Array(parts) = range else { return None };
        let [Value::Int(from), Value::Int(to), Value::Array(primary), ..] = &parts[..] else { return None };
        let [host, Value::Int(port), ..] = &primary[..] else { return None };
        let host = match host {
            Value::BulkString(host) => String::from_utf8(host.clone()).ok()?,
            Value::SimpleString(host) => host.clone(),
            _ => String::new(),
        };
        let address = Address { host: asked.or_same(&host), port: u16::try_from(*port).ok()? };
        map.push((u16::try_from(*from).ok()?, u16::try_from(*to).ok()?, address));
    }
    map.sort();
    Some(Map(map))
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("topology", &self.topology).field("seeds", &self.seeds).finish_non_exhaustive()
    }
}

/// The time until then, of a clock that is not ours.
pub(crate) fn in_ms(due: u64, now: u64) -> Instant {
    Instant::now() + Duration::from_millis(due.saturating_sub(now))
}
