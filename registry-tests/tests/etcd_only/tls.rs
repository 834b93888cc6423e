//! Certificates: what is right works, and what is wrong is said at once.

use registry_core::{Error, ErrorKind, Options};
use registry_etcd::{EtcdConfig, Tls};
use registry_tests::{
    conformance::support::{Observer, PATIENCE, instance},
    servers::{Certs, Etcd, Identity, Server},
};
use tokio::time::Instant;

use crate::{SECOND, client, config, options, soon};

/// How a client is to talk TLS.
#[derive(Clone)]
struct Wanted<'a> {
    ca: &'a str,
    identity: Option<&'a Identity>,
    server_name: Option<&'a str>,
}

impl Wanted<'_> {
    /// The same, in code and as a connection string.
    fn spelled(&self, server: &Server, options: Options) -> [EtcdConfig; 2] {
        let mut tls = Tls::new().ca(self.ca);
        let mut url = format!("etcds://{}/services?ca={}", server.addr(), self.ca);
        if let Some(identity) = self.identity {
            tls = tls.identity(&identity.cert_file, &identity.key_file);
            url = format!("{url}&cert={}&key={}", identity.cert_file, identity.key_file);
        }
        if let Some(name) = self.server_name {
            tls = tls.server_name(name);
            url = format!("{url}&server_name={name}");
        }
        let parsed = EtcdConfig::from_location(url.parse().unwrap()).unwrap();
        [config([server.addr()], options.clone()).tls(tls), parsed.options(options)]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mutual_tls_works_and_the_name_may_be_another() {
    let certs = Certs::generate().unwrap();
    let etcd = |identity| Server::start(Etcd::new().tls(identity).client_ca(&certs.ca));
    let (server, misnamed) = tokio::try_join!(etcd(&certs.server), etcd(&certs.misnamed)).unwrap();
    let right = Wanted { ca: &certs.ca_file, identity: Some(&certs.client), server_name: None };
    let renamed = Wanted { server_name: Some("other.example"), ..right.clone() };
    let localhost = Wanted { server_name: Some("localhost"), ..right.clone() };
    for (server, wanted) in [(&server, &right), (&server, &localhost), (&misnamed, &renamed)] {
        for config in wanted.spelled(server, options()) {
            let one = client(config);
            let observer = Observer::of(&one, "orders").await;
            one.registry.register(instance("orders", "1")).await.unwrap();
            observer.until_ids(soon(), &["1"]).await;
            one.registry.destroy().await.unwrap();
        }
    }
    // It comes back by itself, over TLS too.
    let [config, _] = right.spelled(&server, options());
    let one = client(config);
    one.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&one, "orders").await;
    server.kill().await.unwrap();
    observer.until("the outage", PATIENCE, |seen| seen.freshness().as_str() == "stale").await;
    server.restart().await.unwrap();
    observer.until("the end of the outage", PATIENCE, |seen| seen.freshness().as_str() == "live").await;
    assert!(observer.changes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_said_at_once() {
    let (certs, others) = (Certs::generate().unwrap(), Certs::generate().unwrap());
    let etcd = |identity| Server::start(Etcd::new().tls(identity).client_ca(&certs.ca));
    let (server, misnamed) = tokio::try_join!(etcd(&certs.server), etcd(&certs.misnamed)).unwrap();
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
                let (register, discover, watch) = tokio::join!(
                    one.registry.register(instance("orders", "1")),
                    one.registry.discover("orders"),
                    one.registry.watch("orders"),
                );
                let took = start.elapsed();
                let errors: [Error; 3] = [register.unwrap_err(), discover.unwrap_err(), watch.unwrap_err()];
                if round == 0 {
                    println!("{what}, after {took:?}: {:?}", errors[0]);
                }
                for error in errors {
                    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error:?}");
                }
                assert!(took < 2 * SECOND, "{what}: {took:?}");
            }
        }
    }
}
