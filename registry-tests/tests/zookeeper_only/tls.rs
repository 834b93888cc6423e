//! Certificates: what is right works, and what is wrong is said at once.

use std::{sync::Arc, time::Duration};

use registry_core::{Error, ErrorKind, Options};
use registry_tests::{
    conformance::support::{Observer, PATIENCE, answered, eventually, in_time, instance, is_live, is_stale},
    harness::ZooKeeperHarness,
    servers::{Certs, Identity, Server, ZooKeeper},
};
use registry_zk::{Tls, ZooKeeperAcl, ZooKeeperConfig};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::Instant};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::{SECOND, client, config, options, soon};

/// How a client is to talk TLS.
#[derive(Clone)]
struct Wanted<'a> {
    ca: &'a str,
    identity: Option<&'a Identity>,
}

impl Wanted<'_> {
    /// The same, in code by the address and as a connection string by the name.
    fn spelled(&self, server: &Server, options: Options) -> [ZooKeeperConfig; 2] {
        let mut tls = Tls::new().ca(self.ca);
        let mut url = format!("zks://localhost:{}/services?ca={}", server.addr().port(), self.ca);
        if let Some(identity) = self.identity {
            tls = tls.identity(&identity.cert_file, &identity.key_file);
            url = format!("{url}&cert={}&key={}", identity.cert_file, identity.key_file);
        }
        let parsed = ZooKeeperConfig::from_location(url.parse().unwrap()).unwrap();
        [config([server.addr()], options.clone()).tls(tls), parsed.options(options)]
    }
}

/// It works, and comes back by itself.
async fn assert_works(server: &Server, config: ZooKeeperConfig) {
    let one = client(config);
    let observer = Observer::of(&one, "orders").await;
    one.registry.register(instance("orders", "1")).await.unwrap();
    observer.until_ids(soon(), &["1"]).await;
    server.kill().await.unwrap();
    observer.until("the outage", PATIENCE, is_stale).await;
    server.restart().await.unwrap();
    observer.until("the end of the outage", PATIENCE, is_live).await;
    assert_eq!(observer.changes(), ["+1"]);
    one.registry.destroy().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_works_with_and_without_a_certificate_of_our_own() {
    let certs = Certs::generate().unwrap();
    let open = Server::start(ZooKeeper::new().tls(&certs.server));
    let mutual = Server::start(ZooKeeper::new().tls(&certs.server).client_ca(&certs.ca));
    let (open, mutual) = tokio::try_join!(open, mutual).unwrap();
    let anonymous = Wanted { ca: &certs.ca_file, identity: None };
    let known = Wanted { ca: &certs.ca_file, identity: Some(&certs.client) };
    for (server, wanted) in [(&open, &anonymous), (&mutual, &known)] {
        for config in wanted.spelled(server, options().ttl(15 * SECOND)) {
            assert_works(server, config).await;
        }
    }
}

/// A certificate is a name, too, by which nodes are closed to others.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_an_identity() {
    let certs = Certs::generate().unwrap();
    let zookeeper = ZooKeeper::new().tls(&certs.server).client_ca(&certs.ca);
    let provider = "authProvider.x509=org.apache.zookeeper.server.auth.X509AuthenticationProvider";
    let server = Server::start(zookeeper.config(provider)).await.unwrap();
    let other = certs.client_named("other").unwrap();
    let of = |identity| {
        // The first handshakes of a Java machine take it seconds.
        let patient = options().connect_timeout(5 * SECOND);
        let [_, config] = Wanted { ca: &certs.ca_file, identity: Some(identity) }.spelled(&server, patient);
        client(config.acl(ZooKeeperAcl::CreatorAll))
    };
    let (one, two, stranger) = (of(&certs.client), of(&certs.client), of(&other));
    let register = async || one.registry.register(instance("orders", "1")).await;
    eventually("a server that was just started takes it", PATIENCE, register, Result::is_ok).await.unwrap();
    assert_eq!(two.registry.discover("orders").await.unwrap().len(), 1);
    let error = stranger.registry.discover("orders").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_said_at_once() {
    let (certs, others) = (Certs::generate().unwrap(), Certs::generate().unwrap());
    let zookeeper = |identity| Server::start(ZooKeeper::new().tls(identity).client_ca(&certs.ca));
    let (server, misnamed) = tokio::try_join!(zookeeper(&certs.server), zookeeper(&certs.misnamed)).unwrap();
    let right = Wanted { ca: &certs.ca_file, identity: Some(&certs.client) };
    for (server, name) in [(&server, "localhost"), (&misnamed, "other.example")] {
        warm_up(server, &certs, name).await;
    }
    let cases = [
        ("the server's authority is another", &server, Wanted { ca: &others.ca_file, ..right.clone() }),
        ("the server has another name", &misnamed, right.clone()),
        ("we have no certificate", &server, Wanted { identity: None, ..right.clone() }),
        ("ours is of another authority", &server, Wanted { identity: Some(&certs.stranger), ..right }),
    ];
    for (what, server, wanted) in cases {
        for config in wanted.spelled(server, Options::default()) {
            let (errors, took) = refused(config).await;
            println!("{what}, after {took:?}: {:?}", errors[0]);
            for error in errors {
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error:?}");
            }
            assert!(took < 2 * SECOND, "{what}: {took:?}");
        }
    }
}

/// Where nobody can tell it from an outage it looks like one, and ends by its deadline.
#[tokio::test(flavor = "multi_thread")]
async fn plain_text_to_a_tls_port_and_tls_to_a_plain_one_are_an_outage() {
    let certs = Certs::generate().unwrap();
    let (secure, plain) =
        tokio::try_join!(Server::start(ZooKeeper::new().tls(&certs.server)), Server::start(ZooKeeper::new())).unwrap();
    let [secured, _] = Wanted { ca: &certs.ca_file, identity: None }.spelled(&plain, options());
    for (what, config) in [("plain text", config([secure.addr()], options())), ("tls", secured)] {
        let refused = in_time(what, answered::<ZooKeeperHarness>(), refused(config));
        let (errors, took) = refused.await;
        println!("{what}, after {took:?}: {:?}", errors[0]);
        for error in errors {
            assert!(error.is_retryable(), "{what}: {error:?}");
        }
    }
}

/// The first handshakes of a Java machine take it seconds: some, so that the next are quick.
async fn warm_up(server: &Server, certs: &Certs, name: &'static str) {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(pem(&certs.ca_file));
    let key = PrivateKeyDer::from_pem_file(&certs.client.key_file).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots);
    let connector = TlsConnector::from(Arc::new(
        config.with_client_auth_cert(pem(&certs.client.cert_file).collect(), key).unwrap(),
    ));
    let handshake = async || {
        let began = Instant::now();
        let tcp = TcpStream::connect(server.addr()).await?;
        let mut tls = connector.connect(name.try_into().unwrap(), tcp).await?;
        tls.shutdown().await.map(|()| began.elapsed())
    };
    let quick = |took: &std::io::Result<Duration>| took.as_ref().is_ok_and(|took| *took < SECOND / 5);
    eventually("the server is warm", PATIENCE, handshake, quick).await.unwrap();
}

fn pem(file: &str) -> impl Iterator<Item = CertificateDer<'static>> {
    CertificateDer::pem_file_iter(file).unwrap().map(Result::unwrap)
}

/// What register, discover and services answer, and after which time.
async fn refused(config: ZooKeeperConfig) -> ([Error; 3], Duration) {
    let one = client(config);
    let start = Instant::now();
    let (register, discover, services) = tokio::join!(
        one.registry.register(instance("orders", "1")),
        one.registry.discover("orders"),
        one.registry.services(),
    );
    ([register.unwrap_err(), discover.unwrap_err(), services.unwrap_err()], start.elapsed())
}
