//! HTTP over real connections, to servers of axum.

#![allow(clippy::unwrap_used, reason = "tests")]

mod adapters;

use std::{
    error::Error as StdError,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use adapters::{
    Door, dead, eventually,
    tls::{Certs, chain, listener::Encrypted},
};
use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use reqwest::{Body, Client, Method};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error as SendError};
use service_registry::{
    Error, ErrorKind, Instance, InstanceBuilder, Registry, Server,
    balance::{Balancer, Outlier, Retry},
    connect,
    health::Check,
    reqwest::{HttpCheck, Middleware, Resolver},
};
use tokio::{net::TcpListener, sync::oneshot};

/// An instance: a real server that counts and remembers, behind a door that counts its connections.
struct Orders {
    id: &'static str,
    calls: Arc<AtomicUsize>,
    /// What it answers: a status, or 1 for a refusal, 2 for no answer at all.
    answers: Arc<AtomicU16>,
    asked: Arc<Mutex<Vec<String>>>,
    door: Door,
}

const REFUSAL: u16 = 1;
const SILENCE: u16 = 2;

impl Orders {
    async fn start(id: &'static str) -> Self {
        let (listener, address) = listener().await;
        let (calls, answers) = (Arc::<AtomicUsize>::default(), Arc::new(AtomicU16::new(200)));
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let (counter, status, heard) = (calls.clone(), answers.clone(), asked.clone());
        let app = Router::new().fallback(move |request: Request| {
            counter.fetch_add(1, Ordering::Relaxed);
            let host = request.headers()["host"].to_str().unwrap();
            heard.lock().unwrap().push(format!("{} {host} {}", request.method(), request.uri()));
            answer(status.load(Ordering::Relaxed))
        });
        tokio::spawn(async { axum::serve(listener, app).await });
        Self { id, calls, answers, asked, door: Door::to(address).await }
    }

    fn instance(&self) -> InstanceBuilder {
        instance(self.id, self.door.address)
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    fn answer(&self, status: u16) {
        self.answers.store(status, Ordering::Relaxed);
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(status: u16) -> Response {
    match status {
        REFUSAL => (StatusCode::SERVICE_UNAVAILABLE, [("x-registry-refused", "1")]).into_response(),
        SILENCE => std::future::pending().await,
        status => StatusCode::from_u16(status).unwrap().into_response(),
    }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn instance(id: &str, address: SocketAddr) -> InstanceBuilder {
    Instance::builder("orders", id).endpoint(format!("http://{address}"))
}

/// A store of its own for each test.
async fn registry(name: &str) -> Arc<dyn Registry> {
    connect(&format!("memory://reqwest-{name}?ttl=1h")).await.unwrap()
}

async fn register(registry: &Arc<dyn Registry>, instance: InstanceBuilder) {
    registry.register(instance.build().unwrap()).await.unwrap();
}

/// A client that asks one after the other, may ask again as often as it likes, and ejects nobody.
fn turns(registry: &Arc<dyn Registry>) -> ClientWithMiddleware {
    turns_by(registry, Outlier::default().consecutive(0).failure_rate(2.0)).0
}

/// The same with rules of ejection, and the balancer that it makes with its first request.
fn turns_by(registry: &Arc<dyn Registry>, rules: Outlier) -> (ClientWithMiddleware, Arc<OnceLock<Balancer>>) {
    let made = Arc::<OnceLock<Balancer>>::default();
    let keep = made.clone();
    let middleware =
        Middleware::new(registry.clone()).retry(Retry::default().budget(1000, 1.0)).balancer(move |watcher| {
            let balancer = Balancer::builder(watcher).outlier(rules.clone()).build()?;
            let _ = keep.set(balancer.clone());
            Ok(balancer)
        });
    (ClientBuilder::new(Client::new()).with(middleware).build(), made)
}

fn resolving(registry: &Arc<dyn Registry>) -> Client {
    Client::builder().dns_resolver(Resolver::new(registry.clone(), "registry.internal")).build().unwrap()
}

async fn get(client: &ClientWithMiddleware) -> u16 {
    client.get("registry://orders/").send().await.unwrap().status().as_u16()
}

/// The registry's own error among the sources of another.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> &'a Error {
    std::iter::successors(Some(error), |error| (**error).source()).find_map(|error| error.downcast_ref()).unwrap()
}

#[tokio::test]
async fn the_middleware_follows_instances_that_come_and_go_and_reuses_connections() {
    let registry = registry("follows").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
    }
    let (client, balancer) = turns_by(&registry, Outlier::default());
    for weight in 1..=50 {
        register(&registry, a.instance().weight(weight).metadata("load", weight.to_string())).await;
        assert_eq!(get(&client).await, 200);
    }
    assert!(a.calls() > 10 && b.calls() > 10);
    assert_eq!((a.door.accepted(), b.door.accepted()), (1, 1), "a burst of changes opens no connection");

    registry.unregister("orders", "a").await.unwrap();
    let balancer = balancer.get().unwrap();
    eventually("the balancer knows", || balancer.len() == 1).await;
    let before = a.calls();
    for _ in 0..20 {
        assert_eq!(get(&client).await, 200);
    }
    assert_eq!(a.calls(), before);
    drop(client);
    eventually("connections are closed with the client", || a.door.open() + b.door.open() == 0).await;
}

#[tokio::test]
async fn the_middleware_keeps_path_query_and_a_host_of_ones_own_and_leaves_other_urls_alone() {
    let registry = registry("urls").await;
    let a = Orders::start("a").await;
    let at = a.door.address;
    register(&registry, Instance::builder("Shop/Orders", "a").endpoint(format!("http://{at}"))).await;
    let client = turns(&registry);
    client.get("registry://Shop%2FOrders").send().await.unwrap();
    client.post("registry://Shop%2FOrders/a%20b/c?d=e%2Ff").body("x").send().await.unwrap();
    client.get("registry://Shop%2FOrders/").header("host", "orders.example").send().await.unwrap();
    client.get(format!("http://{at}/direct")).send().await.unwrap();
    let expected = [
        format!("GET {at} /"),
        format!("POST {at} /a%20b/c?d=e%2Ff"),
        "GET orders.example /".to_owned(),
        format!("GET {at} /direct"),
    ];
    assert_eq!(a.asked(), expected);
}

#[tokio::test]
async fn the_middleware_says_what_is_wrong() {
    let registry = registry("wrong").await;
    let client = turns(&registry);
    let failed = async |url: &str| {
        let SendError::Middleware(error) = client.get(url).send().await.unwrap_err() else { panic!("it was sent") };
        let error = error.downcast::<Error>().unwrap();
        (error.kind(), error.to_string())
    };
    let (kind, why) = failed("registry://orders:80/").await;
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert_eq!(why, "invalid URL registry://orders:80/: expected registry://SERVICE/…");
    let (kind, why) = failed("registry://orders/").await;
    assert_eq!(kind, ErrorKind::Unavailable);
    assert!(why.starts_with("no instance of orders takes traffic"), "{why}");
    register(&registry, Instance::builder("bills", "a").endpoint("grpc://127.0.0.1:1")).await;
    assert_eq!(failed("registry://bills/").await, (ErrorKind::Unavailable, "bills/a has no endpoint for HTTP".into()));
}

#[tokio::test]
async fn a_refused_request_is_made_elsewhere_whatever_its_method() {
    let registry = registry("refused").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
    }
    a.answer(REFUSAL);
    let client = turns(&registry);
    for _ in 0..10 {
        let answer = client.post("registry://orders/").body("order").send().await.unwrap();
        assert_eq!(answer.status(), 200);
    }
    assert!(a.calls() > 0 && b.calls() == 10);
    b.answer(REFUSAL);
    assert_eq!(get(&client).await, 503, "if all refuse, that is the answer");
}

#[tokio::test]
async fn a_dead_instance_is_called_elsewhere_whatever_the_method_and_ejected() {
    let registry = registry("dead").await;
    let a = Orders::start("a").await;
    register(&registry, a.instance()).await;
    register(&registry, instance("dead", dead().await)).await;
    let (client, balancer) = turns_by(&registry, Outlier::default().consecutive(2));
    for method in [Method::POST, Method::GET, Method::PATCH, Method::DELETE] {
        for _ in 0..3 {
            let answer = client.request(method.clone(), "registry://orders/").body("x").send().await.unwrap();
            assert_eq!(answer.status(), 200, "{method}");
        }
    }
    let balancer = balancer.get().unwrap();
    eventually("the dead one is ejected", || balancer.len() == 1).await;
}

#[tokio::test]
async fn what_may_have_been_done_is_repeated_only_where_that_does_no_harm() {
    let registry = registry("harm").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
        orders.answer(502);
    }
    let client = turns(&registry);
    let calls = || a.calls() + b.calls();
    let made = async |method: Method| {
        let before = calls();
        let answer = client.request(method, "registry://orders/").timeout(Duration::from_millis(300)).send().await;
        (answer.ok().map(|answer| answer.status().as_u16()), calls() - before)
    };
    for status in [502, 503, 504] {
        a.answer(status);
        b.answer(status);
        for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE, Method::TRACE] {
            assert_eq!(made(method.clone()).await, (Some(status), 2), "{method}");
        }
        for method in [Method::POST, Method::PATCH] {
            assert_eq!(made(method.clone()).await, (Some(status), 1), "{method}");
        }
    }
    for status in [400, 404, 429, 500, 501] {
        a.answer(status);
        b.answer(status);
        assert_eq!(made(Method::GET).await, (Some(status), 1), "its answer is the answer");
    }
    a.answer(SILENCE);
    b.answer(SILENCE);
    assert_eq!(made(Method::GET).await, (None, 2));
    assert_eq!(made(Method::POST).await, (None, 1));
}

#[tokio::test]
async fn a_body_that_is_a_stream_is_sent_once() {
    let registry = registry("stream").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
        orders.answer(REFUSAL);
    }
    let client = turns(&registry);
    let body = Body::wrap(String::from("order"));
    assert_eq!(client.put("registry://orders/").body(body).send().await.unwrap().status(), 503);
    assert_eq!(a.calls() + b.calls(), 1);
    assert_eq!(client.put("registry://orders/").body("order").send().await.unwrap().status(), 503);
    assert_eq!(a.calls() + b.calls(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_all_instances_are_replaced_in_turn() {
    let registry = registry("rolling").await;
    let start = async |id: String| {
        let (listener, address) = listener().await;
        let (stop, stopped) = oneshot::channel();
        let server = Server::new(registry.clone(), instance(&id, address).build().unwrap())
            .grace(Duration::from_millis(200))
            .until(async { _ = stopped.await });
        let app = Router::new().fallback(async |headers: HeaderMap| headers.len().to_string());
        let running = tokio::spawn(async { server.axum(listener, app).await.unwrap() });
        let mut watcher = registry.watch("orders").await.unwrap();
        while watcher.current().get(&id).is_none() {
            watcher.next().await;
        }
        (stop, running)
    };
    let mut servers = Vec::new();
    for id in 0..3 {
        servers.push(start(format!("old-{id}")).await);
    }
    let client = turns(&registry);
    let (done, told) = tokio::sync::watch::channel(false);
    let calls = Arc::<AtomicUsize>::default();
    let callers = (0..4).map(|_| {
        let (client, told, calls) = (client.clone(), told.clone(), calls.clone());
        tokio::spawn(async move {
            while !*told.borrow() {
                assert_eq!(client.post("registry://orders/").body("x").send().await.unwrap().status(), 200);
                calls.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    let callers: Vec<_> = callers.collect();
    let mut replacements = Vec::new();
    for (id, (stop, left)) in servers.into_iter().enumerate() {
        replacements.push(start(format!("new-{id}")).await);
        stop.send(()).unwrap();
        left.await.unwrap();
    }
    eventually("there were many calls", || calls.load(Ordering::Relaxed) > 100).await;
    done.send(true).unwrap();
    for caller in callers {
        caller.await.unwrap();
    }
}

#[tokio::test]
async fn the_resolver_names_instances_that_take_traffic_with_their_ports() {
    let registry = registry("resolver").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    register(&registry, a.instance()).await;
    register(&registry, b.instance().weight(0)).await;
    let client = resolving(&registry);
    for path in ["one", "two"] {
        let answer = client.get(format!("http://orders.registry.internal/{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 200);
    }
    assert_eq!(a.asked(), ["GET orders.registry.internal /one", "GET orders.registry.internal /two"]);
    assert_eq!((a.door.accepted(), b.door.accepted()), (1, 0), "the connection is used again");

    // A port in the URL is believed: nobody listens there.
    let url = format!("http://orders.registry.internal:{}/", dead().await.port());
    assert!(client.get(url).send().await.unwrap_err().is_connect());

    register(&registry, b.instance()).await;
    registry.unregister("orders", "a").await.unwrap();
    let mut watcher = registry.watch("orders").await.unwrap();
    while watcher.current().available().map(|one| one.id.as_str()).collect::<Vec<_>>() != ["b"] {
        watcher.next().await;
    }
    resolving(&registry).get("http://orders.registry.internal/").send().await.unwrap();
    assert_eq!(b.calls(), 1);
}

#[tokio::test]
async fn the_resolver_shares_connections_out_by_weight_and_passes_over_the_dead() {
    let registry = registry("shares").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    register(&registry, a.instance().weight(300)).await;
    register(&registry, b.instance().weight(100)).await;
    register(&registry, instance("dead", dead().await).weight(100)).await;
    let resolver = Resolver::new(registry.clone(), ".Registry.Internal.");
    let client = Client::builder().dns_resolver(resolver).pool_max_idle_per_host(0).build().unwrap();
    for _ in 0..200 {
        client.get("http://orders.registry.internal/").send().await.unwrap();
    }
    assert_eq!(a.calls() + b.calls(), 200);
    assert!((25..=85).contains(&b.calls()), "{} of 200 instead of a quarter", b.calls());
}

#[tokio::test]
async fn the_resolver_looks_up_hosts_that_are_names_and_names_that_are_not_its_own() {
    let registry = registry("names").await;
    let a = Orders::start("a").await;
    let port = a.door.address.port();
    register(&registry, Instance::builder("com.shop.orders", "a").endpoint(format!("http://localhost:{port}"))).await;
    let client = resolving(&registry);
    client.get("http://com.shop.orders.registry.internal/").send().await.unwrap();
    client.get(format!("http://localhost:{port}/")).send().await.unwrap();
    assert_eq!(a.calls(), 2);
}

#[tokio::test]
async fn the_resolver_says_what_is_wrong() {
    let registry = registry("unresolved").await;
    let client = resolving(&registry);
    let error = client.get("http://orders.registry.internal/").send().await.unwrap_err();
    assert!(error.is_connect());
    assert_eq!(cause(&error).to_string(), "no instance of orders can be called by http: 0 registered (live)");
    register(&registry, Instance::builder("orders", "a").endpoint("https://127.0.0.1:1")).await;
    let error = client.get("http://orders.registry.internal/").send().await.unwrap_err();
    assert_eq!(cause(&error).to_string(), "no instance of orders can be called by http: 1 registered (live)");

    let resolver = Resolver::new(registry, "registry.internal").https();
    let client = Client::builder().dns_resolver(resolver).build().unwrap();
    let error = client.get("http://orders.registry.internal/").send().await.unwrap_err();
    assert!(error.is_connect() && !error.is_dns(), "it has an address now: {error:?}");
}

#[tokio::test]
async fn a_check_is_a_request_that_must_succeed() {
    let orders = Orders::start("a").await;
    let check = HttpCheck::new(format!("http://{}/health", orders.door.address)).unwrap();
    check.check().await.unwrap();
    orders.answers.store(503, Ordering::Relaxed);
    let failure = check.check().await.unwrap_err().to_string();
    assert!(failure.contains("/health answered 503"), "{failure}");
    let dead = HttpCheck::new(format!("http://{}/", dead().await)).unwrap();
    assert!(dead.clone().client(Client::new()).check().await.is_err() && dead.check().await.is_err());
    assert_eq!(HttpCheck::new("no url").unwrap_err().kind(), ErrorKind::InvalidInput);
}

/// Starts a registered server of TLS, at this host.
async fn serve_tls(registry: &Arc<dyn Registry>, id: &str, host: &str, certs: &Certs) {
    let listener = Encrypted::bind(certs).await;
    let endpoint = format!("https://{host}:{}", listener.port());
    let instance = Instance::builder("orders", id).endpoint(endpoint).build().unwrap();
    let app = Router::new().fallback(async || "served");
    tokio::spawn(Server::new(registry.clone(), instance).until(std::future::pending()).axum(listener, app));
    let mut watcher = registry.watch("orders").await.unwrap();
    while watcher.current().get(id).is_none() {
        watcher.next().await;
    }
}

fn balancing(registry: &Arc<dyn Registry>, client: Client) -> ClientWithMiddleware {
    ClientBuilder::new(client).with(Middleware::new(registry.clone())).build()
}

#[tokio::test]
async fn the_middleware_verifies_the_host_of_the_endpoint_and_passes_over_whom_it_cannot_trust() {
    let (registry, certs) = (registry("tls").await, Certs::of("localhost"));
    serve_tls(&registry, "by-address", "127.0.0.1", &certs).await;
    let client = balancing(&registry, certs.client().build().unwrap());
    let post = async |client: &ClientWithMiddleware| client.post("registry://orders/").body("order").send().await;
    let said = chain(&post(&client).await.unwrap_err());
    assert!(said.contains("certificate not valid for name \"127.0.0.1\""), "{said}");

    serve_tls(&registry, "by-name", "localhost", &certs).await;
    let client = balancing(&registry, certs.client().build().unwrap());
    for _ in 0..10 {
        assert_eq!(post(&client).await.unwrap().status(), 200, "nothing was sent to the other one");
    }
    let stranger = balancing(&registry, Certs::of("localhost").client().build().unwrap());
    let said = chain(&post(&stranger).await.unwrap_err());
    assert!(said.contains("invalid peer certificate: UnknownIssuer"), "{said}");
}

#[tokio::test]
async fn the_resolver_lets_tls_verify_the_name_of_the_service() {
    let (registry, certs) = (registry("tls-names").await, Certs::of("orders.registry.internal"));
    serve_tls(&registry, "a", "127.0.0.1", &certs).await;
    let get = async |certs: &Certs| {
        let resolver = Resolver::new(registry.clone(), "registry.internal").https();
        let client = certs.client().dns_resolver(resolver).build().unwrap();
        client.get("https://orders.registry.internal/").send().await
    };
    assert_eq!(get(&certs).await.unwrap().status(), 200);
    let said = chain(&get(&Certs::of("orders.registry.internal")).await.unwrap_err());
    assert!(said.contains("invalid peer certificate: UnknownIssuer"), "{said}");
}

#[tokio::test]
async fn a_check_over_tls_trusts_whom_its_client_trusts() {
    let (registry, certs) = (registry("tls-check").await, Certs::of("localhost"));
    serve_tls(&registry, "a", "localhost", &certs).await;
    let url = registry.discover("orders").await.unwrap().instances()[0].endpoints[0].to_string();
    let check = HttpCheck::new(url).unwrap();
    check.clone().client(certs.client().build().unwrap()).check().await.unwrap();
    let stranger = check.client(Certs::of("localhost").client().build().unwrap());
    let said = chain(&*stranger.check().await.unwrap_err());
    assert!(said.contains("invalid peer certificate: UnknownIssuer"), "{said}");
}
