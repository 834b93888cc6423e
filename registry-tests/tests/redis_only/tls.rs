//! Certificates: what is right works, and what is wrong is said at once.

use registry_core::{ErrorKind, Options};
use registry_redis::{RedisConfig, Tls};
use registry_tests::{
    conformance::support::{Observer, PATIENCE, instance, is_live, is_stale},
    servers::{Certs, Cluster, Identity, Redis, Server},
};
use tokio::time::Instant;

use crate::{ELECTED, SECOND, client, config, errors::chain, options, register_within, soon};

/// How a client is to talk TLS.
#[derive(Clone)]
struct Wanted<'a> {
    ca: &'a str,
    identity: Option<&'a Identity>,
    server_name: Option<&'a str>,
}

impl Wanted<'_> {
    /// The same, in code and as a connection string.
    fn spelled(&self, server: &Server, options: Options) -> [RedisConfig; 2] {
        let mut tls = Tls::new().ca(self.ca);
        let mut url = format!("rediss://{}/services?ca={}", server.addr(), self.ca);
        if let Some(identity) = self.identity {
            tls = tls.identity(&identity.cert_file, &identity.key_file);
            url = format!("{url}&cert={}&key={}", identity.cert_file, identity.key_file);
        }
        if let Some(name) = self.server_name {
            tls = tls.server_name(name);
            url = format!("{url}&server_name={name}");
        }
        let parsed = RedisConfig::from_location(url.parse().unwrap()).unwrap();
        [config([server.addr()], options.clone()).tls(tls), parsed.options(options)]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_works_with_and_without_a_certificate_of_ours() {
    let certs = Certs::generate().unwrap();
    let mutual = |identity| Server::start(Redis::new().tls(identity).client_ca(&certs.ca));
    let (open, server, misnamed) = tokio::try_join!(
        Server::start(Redis::new().tls(&certs.server)),
        mutual(&certs.server),
        mutual(&certs.misnamed)
    )
    .unwrap();
    let ours = Wanted { ca: &certs.ca_file, identity: Some(&certs.client), server_name: None };
    let anonymous = Wanted { identity: None, ..ours.clone() };
    let renamed = Wanted { server_name: Some("other.example"), ..ours.clone() };
    let localhost = Wanted { server_name: Some("localhost"), ..ours.clone() };
    for (server, wanted) in [(&open, &anonymous), (&server, &ours), (&server, &localhost), (&misnamed, &renamed)] {
        for config in wanted.spelled(server, options()) {
            let one = client(config);
            let observer = Observer::of(&one, "orders").await;
            one.registry.register(instance("orders", "1")).await.unwrap();
            observer.until_ids(soon(), &["1"]).await;
            one.registry.destroy().await.unwrap();
        }
    }
    // It comes back by itself, over TLS too.
    let [config, _] = ours.spelled(&server, options());
    let one = client(config);
    one.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&one, "orders").await;
    server.kill().await.unwrap();
    observer.until("the outage", PATIENCE, is_stale).await;
    server.restart().await.unwrap();
    observer.until("the end of the outage", PATIENCE, |seen| is_live(seen) && seen.len() == 1).await;
    assert!(observer.changes().is_empty(), "{observer:?}");
}

const SERVICES: [&str; 4] = ["orders", "users", "carts", "bills"];

/// Everyone is asked over TLS, whoever is told of by a Sentinel or by a node included, and after a primary has died.
async fn tls_works_with_several(servers: Redis) {
    let certs = Certs::generate().unwrap();
    let size = servers.size();
    let servers = Cluster::start(servers.tls(&certs.server).client_ca(&certs.ca), size).await.unwrap();
    let query = if servers.url().contains('?') { '&' } else { '?' };
    let url = format!(
        "{}{query}ca={}&cert={}&key={}",
        servers.url(),
        certs.ca_file,
        certs.client.cert_file,
        certs.client.key_file
    );
    println!("{url}");
    let config = || RedisConfig::from_location(url.parse().unwrap()).unwrap().options(options());
    let (provider, reader) = (client(config()), client(config()));
    provider.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    observer.until_ids(soon(), &["1"]).await;
    // On several nodes of a Cluster.
    for service in SERVICES {
        provider.registry.register(instance(service, "one")).await.unwrap();
        assert!(reader.registry.discover(service).await.unwrap().get("one").is_some() || service == "orders");
    }
    observer.until_ids(soon(), &["1", "one"]).await;

    servers.members()[servers.leader().await.unwrap()].kill().await.unwrap();
    for service in SERVICES {
        register_within(ELECTED, &provider, instance(service, "two")).await;
    }
    observer.until("the new primary", ELECTED, |seen| is_live(seen) && seen.len() == 3).await;
    assert_eq!(observer.changes(), ["+one", "+two"]);

    let clear = RedisConfig::from_location(servers.url().replace("rediss", "redis").parse().unwrap()).unwrap();
    let error = client(clear.options(options())).registry.register(instance("orders", "3")).await.unwrap_err();
    assert!(error.is_retryable(), "it may be an outage: {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_works_under_sentinels() {
    tls_works_with_several(Redis::sentinel()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_works_on_a_cluster() {
    tls_works_with_several(Redis::cluster()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_said_at_once() {
    let (certs, others) = (Certs::generate().unwrap(), Certs::generate().unwrap());
    let redis = |identity| Server::start(Redis::new().tls(identity).client_ca(&certs.ca));
    let (server, misnamed) = tokio::try_join!(redis(&certs.server), redis(&certs.misnamed)).unwrap();
    let right = Wanted { ca: &certs.ca_file, identity: Some(&certs.client), server_name: None };
    let cases = [
        ("the server's authority is another", &server, Wanted { ca: &others.ca_file, ..right.clone() }),
        ("the server has another name", &misnamed, right.clone()),
        ("the server has not this name", &server, Wanted { server_name: Some("else.example"), ..right.clone() }),
        ("we have no certificate", &server, Wanted { identity: None, ..right.clone() }),
        ("ours is of another authority", &server, Wanted { identity: Some(&certs.stranger), ..right }),
    ];
    for (what, server, wanted) in cases {
        // Whether the client reads the refusal of our certificate before the connection ends is a matter of luck.
        for round in 0..4 {
            for config in wanted.spelled(server, Options::default()) {
                let one = client(config);
                let start = Instant::now();
                let (register, discover) =
                    tokio::join!(one.registry.register(instance("orders", "1")), one.registry.discover("orders"));
                let took = start.elapsed();
                for error in [register.unwrap_err(), discover.unwrap_err()] {
                    println!("{what}, round {round}, after {took:?}: {}", chain(&error));
                    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error:?}");
                    let said = chain(&error).to_lowercase();
                    assert!(said.contains("certificate") || said.contains("alert"), "{what}: {said}");
                }
                assert!(took < 3 * SECOND, "{what}: {took:?}");
                assert!(one.registry.registrations().is_empty(), "what is refused is withdrawn");
            }
        }
    }
}

/// In the clear where TLS is spoken, and the other way round: an error in time.
#[tokio::test(flavor = "multi_thread")]
async fn tls_on_one_side_only_is_an_error_in_time() {
    let certs = Certs::generate().unwrap();
    let (tls, clear) =
        tokio::try_join!(Server::start(Redis::new().tls(&certs.server)), Server::start(Redis::new())).unwrap();
    let ours = Tls::new().ca(&certs.ca_file);
    for config in [config([tls.addr()], options()), config([clear.addr()], options()).tls(ours)] {
        let one = client(config);
        let start = Instant::now();
        let error = one.registry.register(instance("orders", "1")).await.unwrap_err();
        println!("after {:?}: {}", start.elapsed(), chain(&error));
        assert!(error.is_retryable(), "it may be an outage: {error:?}");
        assert!(start.elapsed() < options().request_timeout + 2 * SECOND, "{:?}", start.elapsed());
    }
}
