//! The launchers themselves: both really start, harm and end servers, and nothing is left of them afterwards.
//!
//! Both are asked by name, so what either needs must be there: a case that cannot run fails.

#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    future::Future,
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    os::unix::process::CommandExt,
    panic::AssertUnwindSafe,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use registry_tests::servers::{self, Certs, Cluster, Etcd, Identity, Launcher, Server};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

const TEST_SERVERS: &str = env!("CARGO_BIN_EXE_test-servers");

macro_rules! in_both {
    ($($case:ident),* $(,)?) => {
        mod containers {
            $(#[tokio::test]
            async fn $case() {
                super::$case(super::Launcher::Containers).await;
            })*
        }
        mod processes {
            $(#[tokio::test]
            async fn $case() {
                super::$case(super::Launcher::Processes).await;
            })*
        }
    };
}

in_both![
    server_survives_what_is_done_to_it,
    frozen_server_can_be_killed_stopped_and_dropped,
    server_takes_extra_arguments,
    server_that_cannot_start_says_why,
    cluster_elects_and_outlives_its_leader,
    tls_server_takes_only_its_own_clients,
    panic_ends_the_server,
    server_may_be_dropped_outside_a_runtime,
    command_finds_the_shared_server_and_its_status_comes_back,
    killed_test_process_takes_its_servers_along,
    missing_launcher_is_an_error_that_says_what_to_install,
];

async fn server_survives_what_is_done_to_it(launcher: Launcher) {
    let server = Server::start_in(launcher, Etcd::new()).await.unwrap();
    let addr = server.addr();
    assert_eq!(server.url(), format!("etcd://{addr}"));
    put(addr).await.unwrap();
    assert!(has_data(addr).await.unwrap());

    server.kill().await.unwrap();
    assert_silent(addr).await;
    server.restart().await.unwrap();
    assert!(has_data(addr).await.unwrap(), "data outlives a crash");

    server.stop().await.unwrap();
    assert_silent(addr).await;
    server.restart().await.unwrap();
    assert!(has_data(addr).await.unwrap(), "data outlives a stop");

    server.freeze().await.unwrap();
    let connected = timeout(Duration::from_secs(1), TcpStream::connect(addr)).await;
    connected.expect("a frozen server's system takes connections").unwrap();
    assert_eq!(has_data(addr).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    server.thaw().await.unwrap();
    assert!(has_data(addr).await.unwrap());

    server.wipe().await.unwrap();
    assert!(!has_data(addr).await.unwrap(), "a wiped server is empty");
    put(addr).await.unwrap();

    drop(server);
    assert_silent(addr).await;
}

async fn frozen_server_can_be_killed_stopped_and_dropped(launcher: Launcher) {
    let server = Server::start_in(launcher, Etcd::new()).await.unwrap();
    let addr = server.addr();
    server.freeze().await.unwrap();
    server.kill().await.unwrap();
    assert_silent(addr).await;
    server.freeze().await.unwrap_err();

    server.restart().await.unwrap();
    server.freeze().await.unwrap();
    server.stop().await.unwrap();
    assert_silent(addr).await;

    server.restart().await.unwrap();
    server.freeze().await.unwrap();
    drop(server);
    assert_silent(addr).await;
}

async fn server_takes_extra_arguments(launcher: Launcher) {
    let etcd = Etcd::new().arg("--auth-token=simple").arg("--auth-token-ttl=5").arg("--max-request-bytes=1000");
    let server = Server::start_in(launcher, etcd).await.unwrap();
    let big = format!(r#"{{"key": "YQ==", "value": "{}"}}"#, "AAAA".repeat(1000));
    assert!(http(server.addr(), "/v3/kv/put", &big).await.unwrap().contains("request is too large"));
}

async fn server_that_cannot_start_says_why(launcher: Launcher) {
    let error = Server::start_in(launcher, Etcd::new().arg("--election-timeout=1")).await.unwrap_err();
    assert!(error.to_string().contains("election-timeout"), "{error}");
}

async fn cluster_elects_and_outlives_its_leader(launcher: Launcher) {
    let cluster = Cluster::start_in(launcher, Etcd::new(), 3).await.unwrap();
    let [a, b, c] = cluster.members() else { panic!("three members") };
    assert_eq!(cluster.url(), format!("etcd://{},{},{}", a.addr(), b.addr(), c.addr()));
    put(a.addr()).await.unwrap();
    assert!(has_data(b.addr()).await.unwrap());
    assert!(has_data(c.addr()).await.unwrap());

    let leader = cluster.leader().await.unwrap();
    cluster.members()[leader].kill().await.unwrap();
    let successor = cluster.leader().await.unwrap();
    assert_ne!(successor, leader);
    assert_silent(cluster.members()[leader].addr()).await;
    cluster.members()[leader].restart().await.unwrap();

    cluster.members()[successor].freeze().await.unwrap();
    assert_ne!(cluster.leader().await.unwrap(), successor);
    cluster.members()[successor].thaw().await.unwrap();

    a.wipe().await.unwrap_err();
    cluster.restart().await.unwrap();
    assert!(has_data(a.addr()).await.unwrap());
    cluster.wipe().await.unwrap();
    assert!(!has_data(a.addr()).await.unwrap());

    let addrs: Vec<_> = cluster.members().iter().map(Server::addr).collect();
    drop(cluster);
    for addr in addrs {
        assert_silent(addr).await;
    }
}

async fn tls_server_takes_only_its_own_clients(launcher: Launcher) {
    let certs = Certs::generate().unwrap();
    let server = Server::start_in(launcher, Etcd::new().tls(&certs.server).client_ca(&certs.ca)).await.unwrap();
    assert_eq!(server.url(), format!("etcds://localhost:{}", server.addr().port()));
    for name in ["localhost", "127.0.0.1", "::1"] {
        assert!(version(&server, &certs, Some(&certs.client), name).await.unwrap().contains("etcdserver"));
    }
    let other = certs.client_named("another").unwrap();
    assert!(version(&server, &certs, Some(&other), "localhost").await.unwrap().contains("etcdserver"));
    version(&server, &certs, Some(&certs.stranger), "localhost").await.unwrap_err();
    version(&server, &certs, None, "localhost").await.unwrap_err();
    http(server.addr(), "/version", "").await.map(|answer| assert!(!answer.contains("etcdserver"))).ok();
    server.kill().await.unwrap();
    server.restart().await.unwrap();

    let server = Server::start_in(launcher, Etcd::new().tls(&certs.misnamed)).await.unwrap();
    let wrong_name = version(&server, &certs, None, "localhost").await.unwrap_err();
    assert!(wrong_name.to_string().contains("not valid for name"), "{wrong_name}");
    assert!(version(&server, &certs, None, "other.example").await.unwrap().contains("etcdserver"));
}

async fn panic_ends_the_server(launcher: Launcher) {
    let (tell, told) = tokio::sync::oneshot::channel();
    let test = async {
        let server = Server::start_in(launcher, Etcd::new()).await.unwrap();
        tell.send(server.addr()).unwrap();
        assert!(put(server.addr()).await.is_err(), "this panic is meant");
    };
    AssertUnwindSafe(test).catch_unwind().await.unwrap_err();
    assert_silent(told.await.unwrap()).await;
}

async fn server_may_be_dropped_outside_a_runtime(launcher: Launcher) {
    let outside = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = runtime.block_on(Server::start_in(launcher, Etcd::new())).unwrap();
        drop(runtime);
        server.addr()
    });
    let addr = tokio::task::spawn_blocking(|| outside.join().unwrap()).await.unwrap();
    assert_silent(addr).await;
}

async fn command_finds_the_shared_server_and_its_status_comes_back(launcher: Launcher) {
    let mut command = test_servers(launcher, r#"echo "$REGISTRY_TEST_ETCD_SHARED_URL"; exit 7"#);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_silent(addr_in(&String::from_utf8(output.stdout).unwrap())).await;
}

async fn killed_test_process_takes_its_servers_along(launcher: Launcher) {
    let mut command = test_servers(launcher, r#"echo "$REGISTRY_TEST_ETCD_SHARED_URL"; exec sleep 600"#);
    let mut child = command.stdout(Stdio::piped()).process_group(0).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let (mut output, line) = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        (output, line)
    })
    .await
    .unwrap();
    let addr = addr_in(&line);
    put(addr).await.unwrap();

    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the server is gone", async || TcpStream::connect(addr).await.is_err()).await;
    // The command holds the other end of this pipe.
    let ended = tokio::task::spawn_blocking(move || output.read_line(&mut String::new()));
    assert_eq!(timeout(Duration::from_secs(10), ended).await.expect("the command is gone").unwrap().unwrap(), 0);
}

async fn missing_launcher_is_an_error_that_says_what_to_install(launcher: Launcher) {
    let mut command = test_servers(launcher, "true");
    let output = command.env("PATH", "/nowhere").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let package = match launcher {
        Launcher::Containers => "docker.io",
        Launcher::Processes => "etcd-server",
    };
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&format!("apt-get install {package}")), "{said}");
}

mod containers_only {
    use super::*;

    #[tokio::test]
    async fn sweep_removes_what_dead_processes_left_and_nothing_else() {
        let server = Server::start_in(Launcher::Containers, Etcd::new()).await.unwrap();
        let owner = docker(&[
            "ps",
            "--filter",
            &format!("publish={}", server.addr().port()),
            "--format",
            r#"{{.Label "registry-tests.owner"}}"#,
        ]);
        // The same number, but another time of start: that process is gone.
        let dead = docker(&[
            "run",
            "--detach",
            "--label",
            &format!("registry-tests.owner={owner}0"),
            "registry-tests/etcd:debian",
            "sleep",
            "60",
        ]);
        servers::sweep().await.unwrap();
        assert_eq!(docker(&["ps", "--all", "--quiet", "--filter", &format!("id={dead}")]), "");
        put(server.addr()).await.unwrap();
    }

    fn docker(args: &[&str]) -> String {
        let output = Command::new("docker").args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

#[tokio::test]
async fn shared_server_is_one_and_refuses_faults() {
    let (one, two) = tokio::join!(servers::shared_etcd(), servers::shared_etcd());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.url(), two.url());
    let refused = one.kill().await.unwrap_err().to_string();
    assert!(refused.contains("needs a server of its own"), "{refused}");
    put(two.addr()).await.unwrap();
}

/// `test-servers etcd -- sh -c SCRIPT` in a launcher.
fn test_servers(launcher: Launcher, script: &str) -> Command {
    let mut command = Command::new(TEST_SERVERS);
    let name = match launcher {
        Launcher::Containers => "containers",
        Launcher::Processes => "processes",
    };
    command.args(["etcd", "--", "sh", "-c", script]);
    command.env("REGISTRY_TEST_SERVERS", name).env_remove("REGISTRY_TEST_ETCD_URL").stderr(Stdio::piped());
    command
}

fn addr_in(url: &str) -> SocketAddr {
    url.trim().strip_prefix("etcd://").unwrap_or_else(|| panic!("no URL: {url:?}")).parse().unwrap()
}

/// Puts `b` under `a`, in the encoding of etcd's gateway.
async fn put(addr: SocketAddr) -> io::Result<()> {
    let answer = http(addr, "/v3/kv/put", r#"{"key": "YQ==", "value": "Yg=="}"#).await?;
    if answer.contains("revision") { Ok(()) } else { Err(io::Error::other(answer)) }
}

async fn has_data(addr: SocketAddr) -> io::Result<bool> {
    let answer = http(addr, "/v3/kv/range", r#"{"key": "YQ=="}"#).await?;
    if answer.contains("revision") { Ok(answer.contains("Yg==")) } else { Err(io::Error::other(answer)) }
}

async fn http(addr: SocketAddr, path: &str, body: &str) -> io::Result<String> {
    timeout(Duration::from_secs(1), async { exchange(TcpStream::connect(addr).await?, path, body).await }).await?
}

async fn exchange(mut socket: impl AsyncRead + AsyncWrite + Unpin, path: &str, body: &str) -> io::Result<String> {
    let method = if body.is_empty() { "GET" } else { "POST" };
    let request = format!("{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// The server's version, asked over TLS under this name with this client certificate.
async fn version(server: &Server, certs: &Certs, client: Option<&Identity>, name: &'static str) -> io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(certs.ca.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots);
    let config = match client {
        Some(client) => {
            let cert = CertificateDer::from_pem_slice(client.cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(client.key.as_bytes()).unwrap();
            config.with_client_auth_cert(vec![cert], key).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    let socket = TcpStream::connect(server.addr()).await?;
    let socket = TlsConnector::from(Arc::new(config)).connect(name.try_into().unwrap(), socket).await?;
    timeout(Duration::from_secs(5), exchange(socket, "/version", "")).await?
}

/// No server answers there. In a pod, the engine goes on taking connections and drops them.
async fn assert_silent(addr: SocketAddr) {
    let error = has_data(addr).await.expect_err("the server must be down");
    assert_ne!(error.kind(), io::ErrorKind::TimedOut, "down, not frozen");
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let wait = async {
        while !condition().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), wait).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}
