//! gRPC over real connections: the service that is called is tonic's own health service.

#![allow(clippy::unwrap_used, reason = "tests")]

mod adapters;

use std::{
    future::{pending, ready},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use adapters::{
    Door, dead, eventually,
    tls::{Certs, chain},
};
use futures::future::join_all;
use service_registry::{
    ErrorKind, Instance, InstanceBuilder, Registry, Server,
    balance::{Balancer, Outlier, Retry, Strategy, Verdict},
    connect,
    tonic::{Channels, channel, channel_with, check, judge},
};
use tokio::{net::TcpListener, sync::oneshot, time::timeout};
use tonic::{
    Code, Request, Response, Status,
    service::interceptor::InterceptedService,
    transport::{
        Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server as Grpc, ServerTlsConfig, server::Router,
    },
};
use tonic_health::{
    pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient},
    server::health_reporter,
};

/// An instance: a real server that counts its calls, behind a door that counts its connections.
struct Orders {
    id: &'static str,
    calls: Arc<AtomicUsize>,
    refuses: Arc<AtomicBool>,
    door: Door,
}

impl Orders {
    async fn start(id: &'static str) -> Self {
        let (listener, address) = listener().await;
        let (calls, refuses) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        tokio::spawn(router(calls.clone(), refuses.clone()).serve_with_incoming(incoming));
        Self { id, calls, refuses, door: Door::to(address).await }
    }

    fn instance(&self) -> InstanceBuilder {
        instance(self.id, self.door.address)
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

fn router(calls: Arc<AtomicUsize>, refuses: Arc<AtomicBool>) -> Router {
    let health = health_reporter().1;
    let counted = InterceptedService::new(health, move |request: Request<()>| {
        calls.fetch_add(1, Ordering::Relaxed);
        if refuses.load(Ordering::Relaxed) { Err(refusal()) } else { Ok(request) }
    });
    Grpc::builder().add_service(counted)
}

fn refusal() -> Status {
    let mut refusal = Status::unavailable("draining");
    refusal.metadata_mut().insert("x-registry-refused", "1".parse().unwrap());
    refusal
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn instance(id: &str, address: SocketAddr) -> InstanceBuilder {
    Instance::builder("orders", id).endpoint(format!("grpc://{address}"))
}

/// A store of its own for each test.
async fn registry(name: &str) -> Arc<dyn Registry> {
    connect(&format!("memory://tonic-{name}?ttl=1h")).await.unwrap()
}

async fn register(registry: &Arc<dyn Registry>, instance: InstanceBuilder) {
    registry.register(instance.build().unwrap()).await.unwrap();
}

async fn followed(registry: &Arc<dyn Registry>) -> Channel {
    channel(registry.watch("orders").await.unwrap())
}

async fn channels(registry: &Arc<dyn Registry>) -> Channels {
    Channels::new(Balancer::new(registry.watch("orders").await.unwrap(), Strategy::RoundRobin).unwrap())
}

async fn call(channel: Channel) -> Result<Response<HealthCheckResponse>, Status> {
    let mut client = HealthClient::new(channel);
    timeout(Duration::from_secs(20), client.check(HealthCheckRequest::default())).await.unwrap()
}

/// Calls until a condition is met; each call must succeed.
async fn call_until(what: &str, channel: &Channel, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        call(channel.clone()).await.unwrap();
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_channel_follows_instances_that_come_and_go() {
    let registry = registry("follows").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    let channel = followed(&registry).await;

    let early = tokio::spawn(call(channel.clone()));
    register(&registry, a.instance()).await;
    early.await.unwrap().expect("it waited for the first instance");

    register(&registry, b.instance()).await;
    call_until("b is called", &channel, || b.calls() > 0).await;
    call_until("a is called, too", &channel, || a.calls() > 1).await;

    registry.unregister("orders", "a").await.unwrap();
    call_until("the connection to a is closed", &channel, || a.door.open() == 0).await;
    let before = a.calls();
    for _ in 0..50 {
        call(channel.clone()).await.unwrap();
    }
    assert_eq!((a.calls(), a.door.accepted(), b.door.accepted()), (before, 1, 1));

    register(&registry, b.instance().weight(0)).await;
    register(&registry, a.instance()).await;
    call_until("the connection to b, which is drained, is closed", &channel, || b.door.open() == 0).await;
}

#[tokio::test]
async fn a_channel_that_is_dropped_closes_its_connections_and_ends_its_task() {
    let registry = registry("dropped").await;
    let a = Orders::start("a").await;
    register(&registry, a.instance()).await;
    let watcher = registry.watch("orders").await.unwrap();
    let held = Arc::new(());
    let mark = held.clone();
    let channel = channel_with(watcher, move |endpoint| {
        let _ = &mark;
        Ok(endpoint)
    });
    call(channel.clone()).await.unwrap();
    assert_eq!((a.door.open(), Arc::strong_count(&held)), (1, 2));
    drop(channel);
    eventually("the connection is closed", || a.door.open() == 0).await;
    eventually("the task has ended", || Arc::strong_count(&held) == 1).await;
}

#[tokio::test]
async fn a_channel_keeps_the_last_set_of_a_registry_that_is_closed() {
    let (writer, reader) = (registry("closed").await, registry("closed").await);
    let a = Orders::start("a").await;
    register(&writer, a.instance()).await;
    let (channel, channels) = (followed(&reader).await, channels(&reader).await);
    call(channel.clone()).await.unwrap();
    reader.destroy().await.unwrap();
    call(channel).await.unwrap();
    channels.call(&Retry::default(), judge, call).await.unwrap();
}

#[tokio::test]
async fn an_instance_whose_record_changes_in_a_burst_stays_connected() {
    let registry = registry("burst").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
    }
    let (channel, channels, retry) = (followed(&registry).await, channels(&registry).await, Retry::default());
    channels.balancer().ready(2).await;
    for weight in 1..=200 {
        register(&registry, a.instance().weight(weight).metadata("load", weight.to_string())).await;
        call(channel.clone()).await.unwrap();
        channels.call(&retry, judge, call).await.unwrap();
    }
    call_until("both are called", &channel, || a.calls() > 100 && b.calls() > 100).await;
    assert_eq!((a.door.accepted(), b.door.accepted()), (2, 2), "one each for the channel and the channels");
}

#[tokio::test]
async fn channels_reuse_connections_and_close_those_to_instances_that_are_gone() {
    let registry = registry("reuse").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
    }
    let (channels, retry) = (channels(&registry).await, Retry::default());
    channels.balancer().ready(2).await;
    let calls = (0..100).map(|_| channels.call(&retry, judge, call));
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    assert_eq!((a.calls(), b.calls()), (50, 50));
    assert_eq!((a.door.accepted(), b.door.accepted()), (1, 1));

    registry.unregister("orders", "a").await.unwrap();
    eventually("the connection to a is closed, with no call", || a.door.open() == 0).await;
    register(&registry, b.instance().weight(0)).await;
    eventually("so is that to b, which takes no traffic", || b.door.open() == 0).await;
    let error = channels.pick().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);

    register(&registry, b.instance()).await;
    channels.balancer().ready(1).await;
    let (channel, pick) = channels.pick().unwrap();
    let answer = call(channel).await;
    assert_eq!(judge(&answer), Verdict::Success);
    pick.success();
    assert_eq!(b.door.accepted(), 2);
    drop(channels);
    eventually("all are closed with the channels", || b.door.open() == 0).await;
}

#[tokio::test]
async fn an_instance_that_moves_is_called_at_its_new_endpoint() {
    let registry = registry("moves").await;
    let (a, b) = (Orders::start("a").await, Orders::start("a").await);
    register(&registry, a.instance()).await;
    let (channel, channels, retry) = (followed(&registry).await, channels(&registry).await, Retry::default());
    channels.call(&retry, judge, call).await.unwrap();
    call(channel.clone()).await.unwrap();
    register(&registry, b.instance()).await;
    call_until("the connections to the old endpoint are closed", &channel, || a.door.open() == 0).await;
    channels.call(&retry, judge, call).await.unwrap();
    assert_eq!(b.door.open(), 2);
}

#[tokio::test]
async fn a_refused_call_is_made_elsewhere_and_is_no_failure() {
    let registry = registry("refused").await;
    let (a, b) = (Orders::start("a").await, Orders::start("b").await);
    for orders in [&a, &b] {
        register(&registry, orders.instance()).await;
    }
    a.refuses.store(true, Ordering::Relaxed);
    let watcher = registry.watch("orders").await.unwrap();
    let balancer = Balancer::builder(watcher).outlier(Outlier::default().consecutive(1)).build().unwrap();
    let (channels, retry) = (Channels::new(balancer), Retry::default().budget(1000, 1.0));
    channels.balancer().ready(2).await;
    for _ in 0..40 {
        channels.call(&retry, judge, call).await.unwrap();
    }
    assert!(a.calls() >= 20 && b.calls() == 40, "each was answered by b, and a was asked in its turn");
    assert_eq!(channels.balancer().len(), 2, "nobody is ejected");
    b.refuses.store(true, Ordering::Relaxed);
    let refused = channels.call(&retry, judge, call).await;
    assert_eq!(judge(&refused), Verdict::Refused, "if all refuse, that is the answer");
}

#[tokio::test]
async fn a_dead_instance_is_called_elsewhere_and_ejected() {
    let registry = registry("dead").await;
    let a = Orders::start("a").await;
    register(&registry, a.instance()).await;
    register(&registry, instance("dead", dead().await)).await;
    register(&registry, Instance::builder("orders", "silent").endpoint("http-admin://127.0.0.1:1")).await;
    let watcher = registry.watch("orders").await.unwrap();
    let rules = Outlier::default().consecutive(2).max_ejected(1.0);
    let balancer = Balancer::builder(watcher).outlier(rules).build().unwrap();
    let (channels, retry) = (Channels::new(balancer), Retry::default().budget(1000, 1.0));
    channels.balancer().ready(3).await;
    let calls = (0..30).map(|_| channels.call(&retry, judge, call));
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    eventually("those that cannot be called are ejected", || channels.balancer().len() == 1).await;
}

#[tokio::test]
async fn nobody_to_call_is_unavailable_at_once() {
    let registry = registry("nobody").await;
    let status = channels(&registry).await.call(&Retry::default(), judge, call).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().starts_with("no instance of orders"), "{status}");
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_configured_is_left_out() {
    let registry = registry("configure").await;
    let a = Orders::start("a").await;
    let port = a.door.address.port();
    register(&registry, a.instance()).await;
    register(&registry, instance("bad", dead().await)).await;
    let fails = move |endpoint: Endpoint| {
        if endpoint.uri().port_u16() == Some(port) { Ok(endpoint) } else { Endpoint::from_shared("") }
    };
    let channel = channel_with(registry.watch("orders").await.unwrap(), fails);
    for _ in 0..20 {
        call(channel.clone()).await.unwrap();
    }
    let balancer = Balancer::new(registry.watch("orders").await.unwrap(), Strategy::RoundRobin).unwrap();
    let channels = Channels::with(balancer, fails);
    channels.balancer().ready(2).await;
    let picks = [channels.pick(), channels.pick()];
    let errors: Vec<_> = picks.into_iter().filter_map(Result::err).map(|error| error.kind()).collect();
    assert_eq!(errors, [ErrorKind::InvalidInput]);
}

#[test]
fn statuses_are_judged_by_what_they_say_of_the_instance() {
    let verdict = |status: Status| judge(&Err::<(), _>(status));
    assert_eq!(judge(&Ok::<_, Status>(())), Verdict::Success);
    assert_eq!(verdict(refusal()), Verdict::Refused);
    assert_eq!(verdict(Status::unavailable("")), Verdict::Retry);
    for code in [
        Code::Cancelled,
        Code::DataLoss,
        Code::DeadlineExceeded,
        Code::Internal,
        Code::ResourceExhausted,
        Code::Unknown,
    ] {
        assert_eq!(verdict(Status::new(code, "")), Verdict::Failure, "{code:?}");
    }
    for code in [Code::NotFound, Code::InvalidArgument, Code::Unimplemented, Code::Unauthenticated, Code::Aborted] {
        assert_eq!(verdict(Status::new(code, "")), Verdict::Success, "{code:?}");
    }
}

#[tokio::test]
async fn a_call_that_must_not_be_repeated_is_made_once() {
    let registry = registry("once").await;
    for id in ["a", "b"] {
        register(&registry, instance(id, dead().await)).await;
    }
    let (channels, retry) = (channels(&registry).await, Retry::default());
    channels.balancer().ready(2).await;
    let attempts = AtomicUsize::new(0);
    let fail = |_| {
        attempts.fetch_add(1, Ordering::Relaxed);
        ready(Err::<(), _>(Status::internal("half done")))
    };
    channels.call(&retry, judge, fail).await.unwrap_err();
    assert_eq!(attempts.load(Ordering::Relaxed), 1);
    channels.call(&retry, |_| Verdict::Retry, fail).await.unwrap_err();
    assert_eq!(attempts.load(Ordering::Relaxed), 3, "unless the caller says so");
}

#[tokio::test]
async fn a_server_is_checked_by_the_health_protocol() {
    let (listener, address) = listener().await;
    let (reporter, health) = health_reporter();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(Grpc::builder().add_service(health).serve_with_incoming(incoming));
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    reporter.set_service_status("shop.Orders", tonic_health::ServingStatus::Serving).await;
    check(channel.clone(), "").await.unwrap();
    check(channel.clone(), "shop.Orders").await.unwrap();

    reporter.set_service_status("shop.Orders", tonic_health::ServingStatus::NotServing).await;
    let error = check(channel.clone(), "shop.Orders").await.unwrap_err();
    assert_eq!(error.to_string(), "\"shop.Orders\" is NOT_SERVING");
    let error = check(channel, "shop.Unknown").await.unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Unavailable, "cannot check \"shop.Unknown\""));
}

/// Starts a registered server; it ends after what is sent, when it has left.
async fn serve(registry: &Arc<dyn Registry>, id: String) -> (oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
    let (listener, address) = listener().await;
    let (stop, stopped) = oneshot::channel();
    let server = Server::new(registry.clone(), instance(&id, address).build().unwrap())
        .grace(Duration::from_millis(200))
        .until(async { _ = stopped.await });
    let router = router(Arc::default(), Arc::default());
    (stop, tokio::spawn(async { server.tonic(listener, router).await.unwrap() }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_all_instances_are_replaced_in_turn() {
    let registry = registry("rolling").await;
    let mut servers = Vec::new();
    for id in 0..3 {
        servers.push(serve(&registry, format!("old-{id}")).await);
    }
    let (channel, channels) = (followed(&registry).await, channels(&registry).await);
    channels.balancer().ready(3).await;
    let (done, calls) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let callers: Vec<_> = (0..8)
        .map(|caller| {
            let (channel, channels) = (channel.clone(), channels.clone());
            let (done, calls) = (done.clone(), calls.clone());
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    if caller % 2 == 0 {
                        call(channel.clone()).await.unwrap();
                    } else {
                        channels.call(&Retry::default().attempts(1), judge, call).await.unwrap();
                    }
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut replacements = Vec::new();
    for (id, (stop, left)) in servers.into_iter().enumerate() {
        replacements.push(serve(&registry, format!("new-{id}")).await);
        channels.balancer().ready(4).await;
        stop.send(()).unwrap();
        left.await.unwrap();
    }
    let ids: Vec<_> = registry.discover("orders").await.unwrap().available().map(|one| one.id.to_string()).collect();
    assert_eq!(ids, ["new-0", "new-1", "new-2"]);
    eventually("there were many calls", || calls.load(Ordering::Relaxed) > 100).await;
    done.store(true, Ordering::Relaxed);
    join_all(callers).await.into_iter().for_each(Result::unwrap);
}

/// Starts a registered server of TLS, at an address; its certificate says another name.
async fn serve_tls(registry: &Arc<dyn Registry>, id: &str, certs: &Certs) {
    let (listener, address) = listener().await;
    let instance = Instance::builder("orders", id).endpoint(format!("grpcs://{address}")).build().unwrap();
    let identity = Identity::from_pem(&certs.cert, &certs.key);
    let mut grpc = Grpc::builder().tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
    let server = Server::new(registry.clone(), instance).until(pending());
    tokio::spawn(server.tonic(listener, grpc.add_service(health_reporter().1)));
    registry.wait_for("orders", 1, Duration::from_secs(20)).await.unwrap();
}

fn trusting(certs: &Certs) -> ClientTlsConfig {
    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&certs.authority))
}

/// Both kinds of channels, with this configuration.
async fn tls(registry: &Arc<dyn Registry>, tls: Option<ClientTlsConfig>) -> (Channel, Channels) {
    let configure = move |endpoint: Endpoint| match tls.clone() {
        Some(tls) => endpoint.tls_config(tls),
        None => Ok(endpoint),
    };
    let balancer = Balancer::new(registry.watch("orders").await.unwrap(), Strategy::RoundRobin).unwrap();
    balancer.ready(1).await;
    (channel_with(registry.watch("orders").await.unwrap(), configure.clone()), Channels::with(balancer, configure))
}

#[tokio::test]
async fn calls_over_tls_verify_the_name_that_is_configured_beside_instances_without_tls() {
    let (registry, certs) = (registry("tls").await, Certs::of("orders.internal"));
    serve_tls(&registry, "encrypted", &certs).await;
    let config = trusting(&certs).domain_name("orders.internal");
    let (channel, channels) = tls(&registry, Some(config)).await;
    call(channel.clone()).await.unwrap();
    channels.call(&Retry::default(), judge, call).await.unwrap();

    let plain = Orders::start("plain").await;
    register(&registry, plain.instance()).await;
    call_until("the one without TLS is called", &channel, || plain.calls() > 0).await;
    channels.balancer().ready(2).await;
    for _ in 0..10 {
        channels.call(&Retry::default().attempts(1), judge, call).await.unwrap();
    }
    assert!(plain.calls() > 5);
}

#[tokio::test]
async fn what_is_wrong_with_tls_fails_the_call_and_is_said() {
    let (registry, certs) = (registry("untrusted").await, Certs::of("orders.internal"));
    serve_tls(&registry, "encrypted", &certs).await;
    let stranger = trusting(&Certs::of("orders.internal")).domain_name("orders.internal");
    for (config, why) in [
        (Some(stranger), "invalid peer certificate: UnknownIssuer"),
        (Some(trusting(&certs)), "certificate not valid for name \"127.0.0.1\""),
        (None, "HTTPS without TLS"),
    ] {
        let (channel, channels) = tls(&registry, config).await;
        let outcomes = [call(channel).await, channels.call(&Retry::default(), judge, call).await];
        for answer in outcomes {
            assert_eq!(judge(&answer), Verdict::Retry, "it was never made: {answer:?}");
            let said = chain(&answer.unwrap_err());
            assert!(said.contains(why), "{why:?} is not in {said:?}");
        }
    }
}
