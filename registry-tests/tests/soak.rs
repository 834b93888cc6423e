//! Instances of a service are killed, frozen and restarted while two hundred requests a second are made of it: after
//! retries, nobody who calls sees a failure. Ten seconds; `SOAK_SECONDS=60` makes it a minute.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, routing::get};
use futures::FutureExt;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use registry_tests::proxy::{FaultProxy, Mode};
use service_registry::{
    Instance, Managed, Options, Registry, Server,
    balance::{Balancer, Outlier, Retry, Strategy, Verdict},
    memory::{MemoryBackend, MemoryStore},
    tower::{Admission, Balance, RefuseLayer, Routed, judge_idempotent, to_instance},
};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::{Instant, interval, sleep, timeout},
};
use tower::{ServiceExt, service_fn};

const TTL: Duration = Duration::from_secs(1);
const INSTANCES: usize = 4;
const PER_SECOND: u32 = 200;
/// One attempt of a call.
const ATTEMPT: Duration = Duration::from_millis(250);
const FROZEN: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn nobody_who_calls_sees_instances_killed_frozen_and_restarted() {
    let seconds = std::env::var("SOAK_SECONDS").map_or(10, |seconds| seconds.parse().unwrap());
    let store = MemoryStore::new();
    let mut nodes = Vec::new();
    for id in 0..INSTANCES {
        nodes.push(Node::start(&store, id).await);
    }
    let reader = registry(&store).0;
    let watcher = reader.watch("orders").await.unwrap();
    let rules = Outlier::default().consecutive(3).base_ejection(TTL);
    let balancer = Balancer::builder(watcher).strategy(Strategy::PowerOfTwo).outlier(rules).build().unwrap();
    ready(&balancer).await;

    let calls = Calls::begin(&balancer);
    let start = Instant::now();
    let mut faults = [0; 3];
    while start.elapsed() < Duration::from_secs(seconds) {
        for (fault, count) in faults.iter_mut().enumerate() {
            let id = rand::random_range(0..INSTANCES);
            match fault {
                0 => {
                    nodes[id].kill();
                    gone(&balancer, &nodes[id]).await;
                    nodes[id] = Node::start(&store, id).await;
                }
                1 => nodes[id].freeze().await,
                _ => {
                    nodes[id].stop().await;
                    nodes[id] = Node::start(&store, id).await;
                }
            }
            *count += 1;
            ready(&balancer).await;
        }
    }
    let Outcome { made, attempts, mut took, failures } = calls.end().await;
    took.sort_unstable();
    let [killed, frozen, restarted] = faults;
    println!(
        "{made} calls in {:.0?}, {} attempts made elsewhere; {killed} killed, {frozen} frozen, {restarted} restarted; \
         p50 {:?}, p99 {:?}, at most {:?}; failures after retries: {}",
        start.elapsed(),
        attempts - made,
        took[took.len() / 2],
        took[took.len() * 99 / 100],
        took[took.len() - 1],
        failures.len(),
    );
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(attempts > made && made as u64 > seconds * u64::from(PER_SECOND) / 2, "{made} calls, {attempts} attempts");
}

async fn ready(balancer: &Balancer) {
    timeout(PATIENCE, balancer.ready(INSTANCES)).await.expect("all instances take traffic");
}

/// Until readers have seen that a process is gone.
async fn gone(balancer: &Balancer, node: &Node) {
    let mut watcher = balancer.watcher();
    let gone = async { while watcher.next().await.unwrap().get(&node.id).is_some() {} };
    timeout(PATIENCE, gone).await.expect("it is gone");
}

type Memory = Arc<Managed<MemoryBackend>>;

fn registry(store: &MemoryStore) -> (Memory, service_registry::memory::MemoryLink) {
    let options = Options::default().ttl(TTL).protect_for(Duration::ZERO);
    let backend = MemoryBackend::new(store.clone(), options.ttl);
    let link = backend.link();
    (Arc::new(Managed::new(backend, options).unwrap()), link)
}

/// A process with an HTTP server behind a network of its own.
struct Node {
    id: String,
    registry: Option<Memory>,
    link: service_registry::memory::MemoryLink,
    network: FaultProxy,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<service_registry::Result<()>>,
}

impl Node {
    async fn start(store: &MemoryStore, id: usize) -> Self {
        let (registry, link) = registry(store);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let network = FaultProxy::start(listener.local_addr().unwrap()).await.unwrap();
        let id = id.to_string();
        let instance = Instance::builder("orders", &id).endpoint(format!("http://{}", network.addr())).build().unwrap();
        let admission = Admission::new(["orders"]);
        let app = Router::new().route("/", get(async || sleep(Duration::from_millis(5)).await));
        let app = app.layer(RefuseLayer::new(admission.clone(), "orders"));
        let (stop, stopped) = oneshot::channel();
        let server = Server::new(registry.clone(), instance)
            .admission(admission)
            .grace(Duration::from_millis(200))
            .until(stopped.map(drop))
            .axum(listener, app);
        let (registry, stop) = (Some(registry), Some(stop));
        Self { id, registry, link, network, stop, server: tokio::spawn(server) }
    }

    /// As SIGKILL does it: no word to anybody.
    fn kill(&mut self) {
        self.link.cut();
        self.network.set_mode(Mode::Cut);
        self.server.abort();
        self.registry = None;
    }

    /// As SIGSTOP and SIGCONT do it: nothing is answered, and nothing is refused.
    async fn freeze(&self) {
        self.link.hang();
        self.network.set_mode(Mode::BlackHole);
        sleep(FROZEN).await;
        self.network.set_mode(Mode::Pass);
        self.link.heal();
    }

    async fn stop(&mut self) {
        drop(self.stop.take());
        timeout(PATIENCE, &mut self.server).await.expect("it leaves").unwrap().unwrap();
    }
}

/// So many calls a second, each on its own.
struct Calls {
    stop: oneshot::Sender<()>,
    attempts: Arc<AtomicUsize>,
    pacer: JoinHandle<JoinSet<Result<Duration, String>>>,
}

struct Outcome {
    made: usize,
    attempts: usize,
    took: Vec<Duration>,
    failures: Vec<String>,
}

impl Calls {
    fn begin(balancer: &Balancer) -> Self {
        let attempts = Arc::new(AtomicUsize::new(0));
        let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let counted = attempts.clone();
        let inner = service_fn(move |routed: Routed<Request<Empty<Bytes>>>| {
            counted.fetch_add(1, Ordering::Relaxed);
            let call = timeout(ATTEMPT, client.request(to_instance(routed)));
            async move { call.await.map_err(|_| "no answer in time".to_owned())?.map_err(|error| format!("{error:?}")) }
        });
        // A plain function: a closure would be of one lifetime only.
        let judge: fn(&Result<Response<Incoming>, String>) -> Verdict = judge_idempotent;
        let orders = Balance::new(inner, balancer.clone(), Retry::default(), judge);
        let (stop, mut stopped) = oneshot::channel();
        let pacer = tokio::spawn(async move {
            let mut calls = JoinSet::new();
            let mut pace = interval(Duration::from_secs(1) / PER_SECOND);
            loop {
                tokio::select! {
                    _ = pace.tick() => {
                        let orders = orders.clone();
                        calls.spawn(async move {
                            let start = Instant::now();
                            let answer = orders.oneshot(Request::get("/").body(Empty::new()).unwrap()).await;
                            let answer = answer.map_err(|error| format!("{error:?}"))?;
                            let took = start.elapsed();
                            if answer.status().is_success() { Ok(took) } else { Err(format!("{answer:?}")) }
                        });
                    }
                    _ = &mut stopped => return calls,
                }
            }
        });
        Self { stop, attempts, pacer }
    }

    async fn end(self) -> Outcome {
        self.stop.send(()).unwrap();
        let outcomes = self.pacer.await.unwrap().join_all().await;
        let made = outcomes.len();
        let (took, failures): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        Outcome {
            made,
            attempts: self.attempts.load(Ordering::Relaxed),
            took: took.into_iter().filter_map(Result::ok).collect(),
            failures: failures.into_iter().filter_map(Result::err).collect(),
        }
    }
}
