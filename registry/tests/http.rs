//! Real HTTP servers and clients: discovery for tower, balancing with retries, refusal, and leaving in good order.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "adapters/tls.rs"]
mod tls;

use std::{
    collections::BTreeMap,
    future::ready,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, routing::get};
use futures::{FutureExt, StreamExt};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use service_registry::{
    Instance, Registry, Result, Server, Status,
    balance::{Balancer, Outlier, Retry, Strategy, Verdict},
    connect,
    tower::{Admission, Balance, REFUSED, RefuseLayer, Routed, discover, judge, judge_idempotent, to_instance},
};
use tls::{Certs, chain, listener::Encrypted};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tower::{Layer, Service, ServiceExt, discover::Change, service_fn, util::MapRequest};

const PATIENCE: Duration = Duration::from_secs(30);
/// Within this, readers of a memory store know.
const GRACE: Duration = Duration::from_millis(200);

type Body = Empty<Bytes>;
type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    timeout(PATIENCE, async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// A server that answers with its name, after a while.
struct Shop {
    name: String,
    admission: Admission,
    requests: Arc<AtomicUsize>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<()>>,
}

impl Shop {
    async fn start(registry: &Arc<dyn Registry>, id: &str, name: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let instance = Instance::builder("orders", id).endpoint(endpoint).build().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let admission = Admission::new(["orders"]);
        let (answer, counter) = (name.to_owned(), requests.clone());
        let handler = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(20)).map(move |()| answer)
        };
        let app = Router::new().route("/name", get(handler)).layer(RefuseLayer::new(admission.clone(), "orders"));
        let (stop, stopped) = oneshot::channel();
        let server = Server::new(registry.clone(), instance)
            .admission(admission.clone())
            .grace(GRACE)
            .until(stopped.map(drop))
            .axum(listener, app);
        let shop = Self { name: name.to_owned(), admission, requests, stop, server: tokio::spawn(server) };
        until("it is registered", || registered(registry, id)).await;
        shop
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        timeout(PATIENCE, self.server).await.unwrap().unwrap().unwrap();
    }
}

fn registered(registry: &Arc<dyn Registry>, id: &str) -> bool {
    registry.registrations().iter().any(|one| one.id().as_str() == id && one.state.is_registered())
}

async fn balancer(registry: &Arc<dyn Registry>, instances: usize) -> Balancer {
    let watcher = registry.watch("orders").await.unwrap();
    let rules = Outlier::default().consecutive(2).base_ejection(PATIENCE);
    let balancer = Balancer::builder(watcher).strategy(Strategy::RoundRobin).outlier(rules).build().unwrap();
    timeout(PATIENCE, balancer.ready(instances)).await.unwrap();
    balancer
}

type Plain = Client<HttpConnector, Body>;
type Answer = std::result::Result<Response<Incoming>, hyper_util::client::legacy::Error>;
type Caller = Balance<MapRequest<Plain, fn(Routed<Request<Body>>) -> Request<Body>>, fn(&Answer) -> Verdict>;

fn caller(balancer: &Balancer, retry: Retry, judge: fn(&Answer) -> Verdict) -> Caller {
    let client: Plain = Client::builder(TokioExecutor::new()).build_http();
    let client = client.map_request(to_instance as fn(Routed<Request<Body>>) -> Request<Body>);
    Balance::new(client, balancer.clone(), retry, judge)
}

/// The name of whoever answers.
async fn name(caller: &Caller) -> std::result::Result<String, Failure> {
    let answer = caller.clone().oneshot(Request::get("/name").body(Body::new())?).await?;
    let (parts, body) = answer.into_parts();
    let body = String::from_utf8(body.collect().await?.to_bytes().into())?;
    if parts.status == StatusCode::OK { Ok(body) } else { Err(format!("{parts:?}: {body}").into()) }
}

/// Without a single retry: what it costs is nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_fails_no_request() {
    let registry = connect("memory://").await.unwrap();
    let mut shops = Vec::new();
    for id in ["1", "2", "3"] {
        shops.push(Shop::start(&registry, id, &format!("old-{id}")).await);
    }
    let balancer = balancer(&registry, 3).await;
    let caller = caller(&balancer, Retry::default().attempts(1), judge);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let load: Vec<_> = (0..8)
        .map(|_| {
            let (caller, stopped) = (caller.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut answers = BTreeMap::new();
                while !*stopped.borrow() {
                    *answers.entry(name(&caller).await.unwrap()).or_insert(0) += 1;
                }
                answers
            })
        })
        .collect();
    for id in ["1", "2", "3"] {
        let old = shops.remove(0);
        until("the old one is called", || old.requests() > 20).await;
        old.stop().await;
        let new = Shop::start(&registry, id, &format!("new-{id}")).await;
        until("the new one is called", || new.requests() > 20).await;
        shops.push(new);
    }
    stop.send_replace(true);
    let mut answers = BTreeMap::new();
    for caller in load {
        for (name, count) in caller.await.unwrap() {
            *answers.entry(name).or_insert(0) += count;
        }
    }
    println!("{answers:?}");
    assert_eq!(answers.len(), 6, "{answers:?}");
    for shop in shops {
        shop.stop().await;
    }
}

#[tokio::test]
async fn what_is_refused_is_made_elsewhere_and_is_no_failure() {
    let registry = connect("memory://").await.unwrap();
    let refusing = Shop::start(&registry, "1", "refusing").await;
    let taking = Shop::start(&registry, "2", "taking").await;
    let balancer = balancer(&registry, 2).await;
    refusing.admission.drain("orders");
    let twice = caller(&balancer, Retry::default(), judge);
    for _ in 0..20 {
        assert_eq!(name(&twice).await.unwrap(), "taking");
    }
    assert_eq!((refusing.requests(), balancer.len()), (0, 2));
    let once = caller(&balancer, Retry::default().attempts(1), judge);
    let outcomes = [name(&once).await, name(&once).await];
    let refused = outcomes.iter().find_map(|outcome| outcome.as_ref().err()).unwrap().to_string();
    assert!(refused.contains("503") && refused.contains("draining"), "{refused}");
    refusing.admission.take("orders");
    assert_eq!(name(&once).await.unwrap().len() + name(&once).await.unwrap().len(), "refusing".len() + "taking".len());
    assert_eq!(refusing.name, "refusing");
    refusing.stop().await;
    taking.stop().await;
}

#[tokio::test]
async fn a_dead_server_is_made_up_for_elsewhere_and_ejected() {
    let registry = connect("memory://").await.unwrap();
    let alive = Shop::start(&registry, "1", "alive").await;
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let dead = Instance::builder("orders", "2").endpoint(format!("http://{free}")).build().unwrap();
    registry.register(dead).await.unwrap();
    let balancer = balancer(&registry, 2).await;
    let idempotent = caller(&balancer, Retry::default(), judge_idempotent);
    timeout(PATIENCE, async {
        while balancer.len() == 2 {
            assert_eq!(name(&idempotent).await.unwrap(), "alive");
        }
    })
    .await
    .unwrap();
    let once = caller(&balancer, Retry::default(), judge);
    assert_eq!(name(&once).await.unwrap(), "alive");
    alive.stop().await;
}

#[tokio::test]
async fn what_is_under_way_is_finished() {
    let registry = connect("memory://").await.unwrap();
    let shop = Shop::start(&registry, "1", "slow").await;
    let watcher = registry.watch("orders").await.unwrap();
    let addr = watcher.current().instances()[0].endpoints[0].authority().to_owned();
    let client: Plain = Client::builder(TokioExecutor::new()).build_http();
    let server = tokio::spawn(async move {
        let requests = shop.requests.clone();
        until("a request is under way", || requests.load(Ordering::Relaxed) > 0).await;
        shop.stop().await;
    });
    // Nobody told this one that it is leaving: it calls until it cannot.
    let mut answered = 0;
    loop {
        let answer = client.get(format!("http://{addr}/name").parse().unwrap()).await;
        match answer {
            Ok(answer) if answer.status() == StatusCode::OK => {
                assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "slow");
                answered += 1;
            }
            Ok(answer) => {
                assert_eq!(answer.headers()[REFUSED], "draining");
                break;
            }
            Err(error) => {
                assert!(error.is_connect(), "not in the middle of a request: {error:?}");
                break;
            }
        }
    }
    assert!(answered > 3, "it served during its grace");
    server.await.unwrap();
    assert!(registry.discover("orders").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_server_that_fails_is_deregistered_and_a_bad_instance_ends_it() {
    let registry = connect("memory://").await.unwrap();
    let instance = |id: &str| Instance::builder("orders", id).build().unwrap();
    let (fail, failure) = oneshot::channel::<()>();
    let server = Server::new(registry.clone(), instance("1")).and(instance("2"));
    let running = tokio::spawn(server.run(|_| failure.map(|_| Err(std::io::Error::other("no more sockets")))));
    until("both are registered", || registered(&registry, "1") && registered(&registry, "2")).await;
    fail.send(()).unwrap();
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the server failed");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "no more sockets");
    assert!(registry.registrations().is_empty());

    let mut oversize = instance("3");
    oversize.metadata.insert("ballast".to_owned(), "x".repeat(100_000));
    let server = Server::new(registry.clone(), oversize).until(std::future::pending());
    let ended = timeout(PATIENCE, server.run(|stop| stop.map(Ok::<_, std::io::Error>))).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), service_registry::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn grpc_is_refused_in_its_own_words() {
    let app = service_fn(|_: Request<String>| ready(Ok::<_, Failure>(Response::new("taken".to_owned()))));
    let app = RefuseLayer::grpc(Admission::new(["shop.Orders"])).layer(app);
    let call = async |path: &str| {
        let request = Request::post(path).header("content-type", "application/grpc+proto").body(String::new()).unwrap();
        app.clone().oneshot(request).await.unwrap()
    };
    assert_eq!(call("/shop.Orders/Get").await.body(), "taken");
    let refused = call("/shop.Payments/Get").await;
    assert_eq!(refused.status(), StatusCode::OK);
    let headers =
        ["content-type", "grpc-status", "grpc-message", "x-registry-refused"].map(|name| &refused.headers()[name]);
    assert_eq!(headers, ["application/grpc", "14", "not-here", "not-here"]);
    assert_eq!(call("nonsense").await.body(), "taken", "what names no service is not refused");
}

#[tokio::test]
async fn tower_discovers_what_takes_traffic_and_makes_nothing_twice() {
    let registry = connect("memory://").await.unwrap();
    let instance = |id: &str| Instance::builder("orders", id).endpoint("http://10.0.0.5:80");
    registry.register(instance("1").build().unwrap()).await.unwrap();
    let watcher = registry.watch("orders").await.unwrap();
    let mut changes = discover(watcher, |instance| instance.endpoints[0].to_string());
    let mut next = async || match timeout(PATIENCE, changes.next()).await.unwrap().unwrap() {
        Ok(Change::Insert(id, made)) => format!("+{id} {made}"),
        Ok(Change::Remove(id)) => format!("-{id}"),
        Err(never) => match never {},
    };
    assert_eq!(next().await, "+1 http://10.0.0.5:80");
    for weight in 1..20 {
        registry
            .register(instance("1").weight(weight).metadata("round", weight.to_string()).build().unwrap())
            .await
            .unwrap();
    }
    registry.register(instance("2").build().unwrap()).await.unwrap();
    assert_eq!(next().await, "+2 http://10.0.0.5:80", "nineteen changes of the other one made nothing");
    registry.register(instance("1").status(Status::Draining).build().unwrap()).await.unwrap();
    assert_eq!(next().await, "-1");
    let moved = Instance::builder("orders", "2").endpoint("http://10.0.0.6:80").build().unwrap();
    registry.register(moved).await.unwrap();
    assert_eq!(next().await, "+2 http://10.0.0.6:80");
    registry.unregister("orders", "2").await.unwrap();
    assert_eq!(next().await, "-2");
}

#[tokio::test]
async fn the_balancer_of_tower_takes_what_is_discovered() {
    let registry = connect("memory://").await.unwrap();
    for id in ["1", "2"] {
        registry.register(Instance::builder("orders", id).build().unwrap()).await.unwrap();
    }
    let made = discover(registry.watch("orders").await.unwrap(), |instance| {
        let id = instance.id.to_string();
        let service = service_fn(move |(): ()| ready(Ok::<_, Failure>(id.clone())));
        tower::load::Constant::new(service, 1)
    });
    let mut balance = tower::balance::p2c::Balance::new(made);
    let mut answers = std::collections::BTreeSet::new();
    timeout(PATIENCE, async {
        while answers.len() < 2 {
            answers.insert(balance.ready().await.unwrap().call(()).await.unwrap());
        }
    })
    .await
    .unwrap();
}

#[test]
fn a_request_goes_to_the_endpoint_of_http() {
    let routed = |endpoints: &[&str], uri: &str| {
        let instance = endpoints.iter().fold(Instance::builder("orders", "1"), |built, one| built.endpoint(one));
        let instance = Arc::new(instance.build().unwrap());
        to_instance(Routed { instance, request: Request::get(uri).body(()).unwrap() }).uri().to_string()
    };
    assert_eq!(routed(&["tcp://a:1", "http://b:2"], "/orders?x=1"), "http://b:2/orders?x=1");
    assert_eq!(routed(&["https://[::1]:2"], "http://orders/a"), "https://[::1]:2/a");
    assert_eq!(routed(&["grpc://b:2"], "/"), "http://b:2/");
    assert_eq!(routed(&["tcp://b:2"], "/"), "http://b:2/");
    assert_eq!(routed(&[], "/orders"), "/orders");
}

#[tokio::test]
async fn a_server_of_tls_is_registered_and_called_by_the_host_of_its_endpoint() {
    let (registry, certs) = (connect("memory://").await.unwrap(), Certs::of("localhost"));
    let listener = Encrypted::bind(&certs).await;
    let endpoint = format!("https://localhost:{}", listener.port());
    let instance = Instance::builder("orders", "1").endpoint(endpoint).build().unwrap();
    let (stop, stopped) = oneshot::channel();
    let server = Server::new(registry.clone(), instance).grace(GRACE).until(stopped.map(drop));
    let server = tokio::spawn(server.axum(listener, Router::new().route("/name", get(async || "encrypted"))));
    until("it is registered", || registered(&registry, "1")).await;
    let balancer = balancer(&registry, 1).await;
    let name = async |client: reqwest::ClientBuilder| {
        let client = client.build().unwrap();
        let client = service_fn(move |request: Request<String>| client.execute(request.try_into().unwrap()));
        let verdict = |answer: &reqwest::Result<_>| if answer.is_ok() { Verdict::Success } else { Verdict::Failure };
        let caller = Balance::new(client.map_request(to_instance), balancer.clone(), Retry::default(), verdict);
        Ok::<_, Failure>(caller.oneshot(Request::get("/name").body(String::new()).unwrap()).await?.text().await?)
    };
    assert_eq!(name(certs.client()).await.unwrap(), "encrypted");
    let said = chain(&*name(Certs::of("localhost").client()).await.unwrap_err());
    assert!(said.contains("invalid peer certificate: UnknownIssuer"), "{said}");
    stop.send(()).unwrap();
    timeout(PATIENCE, server).await.unwrap().unwrap().unwrap();
}
