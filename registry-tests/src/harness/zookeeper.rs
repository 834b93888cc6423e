//! ZooKeeper: real servers, each client behind proxies of its own, and a bare client for what happens past the library.

mod session;

use std::{
    collections::HashSet,
    future::Future,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::{join_all, try_join_all};
use registry_core::{Key, Layout, Managed, NativeLayout, Options, ServiceName, async_trait, encode_segment};
use registry_zk::{ZooKeeperBackend, ZooKeeperConfig};
use tokio::time::{Instant, sleep, timeout};
use zookeeper_client::{Acls, Client as Bare, CreateMode, CreateOptions, Error, MultiWriteError, Stat};

use super::{Client, ClusterHarness, Harness, Link, Routed, ServerHarness, Wire, Wired, hosts};
use crate::{
    proxy::FaultProxy,
    servers::{Cluster, ZooKeeper, shared_zookeeper, shared_zookeeper_ensemble, zookeeper::ask},
};

/// The bare client's way to a server that was just started or thawed may take a moment.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
const ATTEMPT: Duration = Duration::from_secs(3);
const ASK_AGAIN: Duration = Duration::from_millis(20);

const CONTAINER: CreateOptions<'static> = CreateMode::Container.with_acls(Acls::anyone_all());
const PERSISTENT: CreateOptions<'static> = CreateMode::Persistent.with_acls(Acls::anyone_all());

/// The ZooKeeper backend on one server. Each case has a prefix of its own, on a server that all cases share or on its
/// own.
pub type ZooKeeperHarness = ZooKeeperMembers<1>;

/// The ZooKeeper backend on an ensemble of three. What happens to the server happens to all members at once, and so
/// does what happens to a client's network.
pub type ZooKeeperEnsembleHarness = ZooKeeperMembers<3>;

/// The ZooKeeper backend on so many servers.
#[derive(Debug)]
pub struct ZooKeeperMembers<const MEMBERS: usize> {
    /// None if they are shared.
    own: Option<Cluster>,
    addrs: Vec<SocketAddr>,
    prefix: String,
    operator: Operator,
}

/// Ends a session at this server, whoever's it is: past the library, and without a word to its client. Nothing happens
/// if there is none of this number.
///
/// # Errors
/// The server does not answer within a second.
pub async fn close_zookeeper_session(server: SocketAddr, session: i64) -> io::Result<()> {
    session::close(server, session).await
}

impl<const MEMBERS: usize> ZooKeeperMembers<MEMBERS> {
    async fn on(url: &str, own: Option<Cluster>) -> Self {
        let (addrs, prefix) = (hosts(url), format!("case-{:016x}", rand::random::<u64>()));
        let operator = Operator::new(&addrs);
        operator.client().await.expect("the server answers");
        Self { own, addrs, prefix, operator }
    }

    /// The servers, to be harmed.
    fn own(&self) -> &Cluster {
        self.own.as_ref().expect("the case has started servers of its own")
    }

    fn path(&self, path: &str) -> String {
        format!("/{}/{path}", self.prefix)
    }

    fn key(&self, key: &Key) -> String {
        self.path(&NativeLayout.path(key))
    }

    /// The way of one client to all servers, and the addresses by which it knows them.
    async fn network(&self) -> (Vec<FaultProxy>, Vec<String>) {
        let network = try_join_all(self.addrs.iter().map(|addr| FaultProxy::start(*addr)));
        let network = network.await.expect("there are free ports");
        let endpoints = network.iter().map(|proxy| proxy.addr().to_string()).collect();
        (network, endpoints)
    }

    /// What all servers say to a four-letter command. Busy ones are asked again.
    async fn ask(&self, command: &str) -> Vec<String> {
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            match try_join_all(self.addrs.iter().map(|addr| ask(*addr, command))).await {
                Ok(answers) => return answers,
                Err(error) => assert!(Instant::now() < deadline, "not all servers answer: {error}"),
            }
        }
    }
}

#[async_trait]
impl<const MEMBERS: usize> Harness for ZooKeeperMembers<MEMBERS> {
    /// The test servers would grant 1 s, which a busy machine does not keep.
    fn ttl() -> Duration {
        Duration::from_secs(2)
    }

    /// ZooKeeper looks every half second which sessions are over, and an ensemble has to agree.
    fn slack() -> Duration {
        Duration::from_millis(1500)
    }

    /// A mark is the event of a node that comes and goes: nothing of it is left for those who were away.
    fn remembers_departures() -> bool {
        false
    }

    async fn start() -> Self {
        let shared = if MEMBERS == 1 { shared_zookeeper().await } else { shared_zookeeper_ensemble().await };
        Self::on(shared.expect("the shared ZooKeeper starts").url(), None).await
    }

    async fn with_own_server() -> Self {
        let own = Cluster::start(ZooKeeper::new(), MEMBERS).await.expect("a ZooKeeper starts");
        let url = own.url().to_owned();
        Self::on(&url, Some(own)).await
    }

    async fn connect(&self, options: Options) -> Client {
        let (network, endpoints) = self.network().await;
        let config = ZooKeeperConfig::new(endpoints).prefix(&self.prefix).options(options.clone());
        let backend = ZooKeeperBackend::new(config).expect("the configuration is valid");
        let wire = Wire::default();
        let calls = wire.calls();
        let registry = Managed::new(Wired::new(backend, wire), options).expect("the options are valid");
        Client::new(Arc::new(registry), network, calls)
    }

    async fn end_session(&self, key: &Key) {
        let path = self.key(key);
        let owner = async || self.operator.get(&path).await.map_or(0, |(_, stat)| stat.ephemeral_owner);
        let session = owner().await;
        if session == 0 {
            return self.delete(key).await;
        }
        let deadline = Instant::now() + ANSWER_WITHIN;
        // The session's own client may have been quicker: then it is closed again.
        while owner().await == session {
            assert!(Instant::now() < deadline, "session {session:#x} does not end");
            for addr in &self.addrs {
                let _ = session::close(*addr, session).await;
            }
        }
    }

    async fn delete(&self, key: &Key) {
        self.operator.delete(&self.key(key)).await;
    }

    async fn delete_service(&self, service: &str) {
        let service = ServiceName::parse(service).expect("a service name");
        let service = self.path(&encode_segment(&service));
        for directory in self.operator.children(&service).await {
            let directory = format!("{service}/{directory}");
            let records = self.operator.children(&directory).await;
            let records: Vec<_> = records.iter().map(|record| format!("{directory}/{record}")).collect();
            join_all(records.iter().map(|record| self.operator.delete(record))).await;
            self.operator.delete(&directory).await;
        }
        self.operator.delete(&service).await;
    }

    async fn put_raw(&self, key: &Key, bytes: &[u8]) {
        self.operator.put(&self.key(key), bytes).await;
    }

    async fn raw(&self, key: &Key) -> Option<Vec<u8>> {
        self.operator.get(&self.key(key)).await.map(|(bytes, _)| bytes)
    }

    async fn keys(&self) -> Vec<String> {
        let root = format!("/{}", self.prefix);
        let mut keys = Vec::new();
        for service in self.operator.children(&root).await {
            for directory in self.operator.children(&format!("{root}/{service}")).await {
                let records = self.operator.children(&format!("{root}/{service}/{directory}")).await;
                keys.extend(records.iter().map(|record| format!("{service}/{directory}/{record}")));
            }
        }
        keys.retain(|key| NativeLayout.place(key).is_some());
        keys
    }

    /// Nothing: ZooKeeper keeps no history.
    async fn compact(&self) {}

    async fn sessions(&self) -> usize {
        let answers = self.ask("dump").await;
        let sessions = answers.iter().flat_map(|dump| sessions(dump)).collect::<HashSet<_>>();
        sessions.difference(&self.operator.sessions()).count()
    }

    /// The bare client watches nothing.
    async fn watchers(&self) -> usize {
        let answers = self.ask("mntr").await;
        let watches = answers.iter().map(|metrics| {
            let count = metrics.lines().find_map(|line| line.strip_prefix("zk_watch_count\t"));
            count.and_then(|count| count.parse::<usize>().ok()).expect("ZooKeeper counts its watches")
        });
        watches.sum()
    }

    async fn kill(&self) {
        self.own().kill().await.expect("ZooKeeper is killed");
    }

    async fn restart(&self) {
        self.own().restart().await.expect("ZooKeeper comes back");
    }

    async fn wipe(&self) {
        self.own().wipe().await.expect("ZooKeeper comes back");
    }

    async fn freeze(&self) {
        self.own().freeze().await.expect("ZooKeeper is frozen");
    }

    async fn thaw(&self) {
        self.own().thaw().await.expect("ZooKeeper is thawed");
    }
}

impl<const MEMBERS: usize> ServerHarness for ZooKeeperMembers<MEMBERS> {
    fn cluster(&self) -> &Cluster {
        self.own()
    }
}

#[async_trait]
impl ClusterHarness for ZooKeeperEnsembleHarness {
    async fn leader(&self, _service: &str) -> usize {
        self.own().leader().await.expect("somebody leads")
    }

    async fn quorum(&self, service: &str) -> Vec<usize> {
        let leader = self.leader(service).await;
        vec![leader, (leader + 1) % 3]
    }
}

#[async_trait]
impl<const MEMBERS: usize> Routed for ZooKeeperMembers<MEMBERS> {
    async fn route(&self, options: &str) -> (String, Box<dyn Link>) {
        let (network, endpoints) = self.network().await;
        (format!("zk://{}/{}?{options}", endpoints.join(","), self.prefix), Box::new(network))
    }
}

/// The sessions in the answer to `dump`, which lists them at the server that keeps their time, then what hangs on them.
fn sessions(dump: &str) -> impl Iterator<Item = i64> {
    let tracked = dump.split("ephemeral nodes dump").next().unwrap_or_default();
    let numbers = tracked.split(|c: char| !c.is_ascii_alphanumeric()).filter_map(|word| word.strip_prefix("0x"));
    numbers.filter_map(|number| u64::from_str_radix(number, 16).ok()).map(u64::cast_signed)
}

/// A client of the store that knows nothing of the library, and takes a new session when the old one or its connection
/// is gone.
#[derive(Debug)]
struct Operator {
    servers: String,
    /// Held for bookkeeping only, never across an await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    client: Option<Bare>,
    /// Every session so far: those of dead clients live on for a while.
    sessions: HashSet<i64>,
}

impl Operator {
    fn new(servers: &[SocketAddr]) -> Self {
        let servers: Vec<_> = servers.iter().map(SocketAddr::to_string).collect();
        Self { servers: servers.join(","), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> HashSet<i64> {
        self.state().sessions.clone()
    }

    async fn client(&self) -> Result<Bare, Error> {
        let live = self.state().client.clone();
        if let Some(client) = live {
            return Ok(client);
        }
        let connector = Bare::connector().with_session_timeout(Duration::from_secs(10)).with_fail_eagerly();
        let client = connector.with_connection_timeout(Duration::from_secs(1)).connect(&self.servers).await?;
        let mut state = self.state();
        state.sessions.insert(client.session_id().0);
        state.client = Some(client.clone());
        Ok(client)
    }

    /// Does something that may be done twice, until ZooKeeper has answered.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(&self, request: impl Fn(Bare) -> F) -> Result<T, Error> {
        let attempt = async || request(self.client().await?).await;
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            // A request that its client's session did not outlive may stay without any answer.
            let lost = match timeout(ATTEMPT, attempt()).await.unwrap_or(Err(Error::Timeout)) {
                Err(lost) if is_lost(&lost) => lost,
                answer => return answer,
            };
            assert!(Instant::now() < deadline, "ZooKeeper does not answer within {ANSWER_WITHIN:?}: {lost}");
            self.state().client = None;
            sleep(ASK_AGAIN).await;
        }
    }

    /// The node's bytes, if there is one, also where the member that is asked lags behind.
    async fn get(&self, path: &str) -> Option<(Vec<u8>, Stat)> {
        let read = self.ask(|client| async move {
            client.sync(path).await?;
            client.get_data(path).await
        });
        found(read.await)
    }

    async fn children(&self, path: &str) -> Vec<String> {
        let read = self.ask(|client| async move {
            client.sync(path).await?;
            client.list_children(path).await
        });
        found(read.await).unwrap_or_default()
    }

    /// Leaves the node where it is if somebody has put something into it.
    async fn delete(&self, path: &str) {
        match self.ask(|client| async move { client.delete(path, None).await }).await {
            Ok(()) | Err(Error::NoNode | Error::NotEmpty) => {}
            Err(error) => panic!("cannot delete {path}: {error}"),
        }
    }

    /// In place of whatever is there, in one step.
    async fn put(&self, path: &str, bytes: &[u8]) {
        let (parent, _) = path.rsplit_once('/').expect("a path");
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            let put = self.ask(|client| async move {
                client.mkdir(parent, &CONTAINER).await?;
                let mut write = client.new_multi_writer();
                if client.check_stat(path).await?.is_some() {
                    write.add_delete(path, None)?;
                }
                write.add_create(path, bytes, &PERSISTENT)?;
                write.commit().await.map_err(|error| match error {
                    MultiWriteError::RequestFailed { source } | MultiWriteError::OperationFailed { source, .. } => {
                        source
                    }
                })
            });
            match put.await {
                Ok(_) => return,
                // It came or went in between.
                Err(Error::NoNode | Error::NodeExists) if Instant::now() < deadline => {}
                Err(error) => panic!("cannot put {path}: {error}"),
            }
        }
    }
}

/// Whether there was no answer. The client gives up then: its own way back is longer than a new one.
fn is_lost(error: &Error) -> bool {
    !matches!(error, Error::NoNode | Error::NodeExists | Error::NotEmpty | Error::NoAuth | Error::BadArguments(_))
}

fn found<T>(answer: Result<T, Error>) -> Option<T> {
    match answer {
        Ok(found) => Some(found),
        Err(Error::NoNode) => None,
        Err(error) => panic!("ZooKeeper refuses: {error}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::conformance::support::eventually;

    #[tokio::test]
    async fn an_operator_counts_and_ends_sessions() {
        sessions_of_others_are_counted_and_ended::<1>().await;
    }

    #[tokio::test]
    async fn an_operator_counts_and_ends_sessions_of_an_ensemble() {
        sessions_of_others_are_counted_and_ended::<3>().await;
    }

    async fn sessions_of_others_are_counted_and_ended<const MEMBERS: usize>() {
        let store = ZooKeeperMembers::<MEMBERS>::with_own_server().await;
        assert_eq!(store.sessions().await, 0, "its own does not count");
        let [one, two] = ["1", "2"].map(|id| Key::provider("orders".parse().unwrap(), id.parse().unwrap()));
        let path = store.key(&one);
        store.put_raw(&two, b"not the session's").await;
        let connector = Bare::connector().with_session_timeout(Duration::from_secs(6));
        let client = connector.connect(&store.operator.servers).await.unwrap();
        client.create(&path, b"", &CreateMode::Ephemeral.with_acls(Acls::anyone_all())).await.unwrap();
        assert_eq!((store.sessions().await, store.keys().await.len()), (1, 2));

        store.end_session(&one).await;
        assert_eq!(store.keys().await, ["orders/providers/2"]);
        let state = async || client.state();
        eventually("its client learns of it", ANSWER_WITHIN, state, |state| state.is_terminated()).await;
        eventually("no member knows it", ANSWER_WITHIN, || store.sessions(), |sessions| *sessions == 0).await;

        store.end_session(&two).await;
        assert_eq!(store.raw(&two).await, None, "what is under no session is deleted");
        store.wipe().await;
        store.put_raw(&one, b"the operator has a new session").await;
        assert_eq!(store.sessions().await, 0);
    }
}
