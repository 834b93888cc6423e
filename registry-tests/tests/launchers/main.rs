//! The launchers themselves: both really start, harm and end servers of every store, and nothing is left of them
//! afterwards.
//!
//! Both are asked by name, so what either needs must be there: a case that cannot run fails.

#![cfg(all(unix, any(feature = "etcd", feature = "redis", feature = "zookeeper")))]
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
use registry_core::async_trait;
use registry_tests::servers::{self, Certs, Cluster, Identity, Launcher, Server};
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

/// Makes tests of all cases, and of some that only this store has, in either launcher.
macro_rules! in_both {
    ($store:ident; $($own:ident),* $(,)?; containers only: $($container:ident),* $(,)?) => {
        mod containers {
            in_both!(@all crate::Launcher::Containers, $store; $($own)*);
        }
        mod processes {
            in_both!(@all crate::Launcher::Processes, $store; $($own)*);
        }

        #[tokio::test]
        async fn shared_server_is_one_and_refuses_faults() {
            crate::shared_server_is_one_and_refuses_faults::<$store>().await;
        }

        mod containers_only {
            #[tokio::test]
            async fn sweep_removes_what_dead_processes_left_and_nothing_else() {
                crate::sweep_removes_what_dead_processes_left_and_nothing_else::<super::$store>().await;
            }

            $(#[tokio::test]
            async fn $container() {
                super::$container().await;
            })*
        }
    };
    (@all $launcher:expr, $store:ident; $($own:ident)*) => {
        in_both! { @each $launcher, $store;
            server_survives_what_is_done_to_it
            frozen_server_can_be_killed_stopped_and_dropped
            server_that_cannot_start_says_why
            tls_server_takes_only_its_own_clients
            panic_ends_the_server
            server_may_be_dropped_outside_a_runtime
            command_finds_the_shared_server_and_its_status_comes_back
            killed_test_process_takes_its_servers_along
            missing_launcher_is_an_error_that_says_what_to_install
        }
        $(#[tokio::test]
        async fn $own() {
            super::$own($launcher).await;
        })*
    };
    (@each $launcher:expr, $store:ident; $($case:ident)*) => {
        $(#[tokio::test]
        async fn $case() {
            crate::$case::<super::$store>($launcher).await;
        })*
    };
}

#[cfg(feature = "etcd")]
mod etcd;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "zookeeper")]
mod zookeeper;

/// A store as the cases know it.
#[async_trait]
trait Kind: servers::Store + Sized {
    /// The schemes of its connection strings, in the clear and over TLS.
    const SCHEMES: [&'static str; 2];
    /// What is said to a server, and what is in its answer and in nobody else's.
    const QUESTION: &'static str;
    const ANSWER: &'static str;

    fn plain() -> Self;

    fn secure(server: &Identity) -> Self;

    fn only_for_clients_of(self, ca: &str) -> Self;

    /// One that does not start, and what it says about it.
    fn broken() -> (Self, &'static str);

    /// The server that cases share.
    async fn shared() -> servers::Result<Server>;

    /// Writes the one value that [`has_data`](Self::has_data) looks for. Answers in time.
    async fn put(addr: SocketAddr) -> io::Result<()>;

    /// Whether the value is there. A server that does not answer is [`io::ErrorKind::TimedOut`], and one that is
    /// down is not.
    async fn has_data(addr: SocketAddr) -> io::Result<bool>;
}

async fn server_survives_what_is_done_to_it<K: Kind>(launcher: Launcher) {
    let server = Server::start_in(launcher, K::plain()).await.unwrap();
    let addr = server.addr();
    assert_eq!(server.url(), format!("{}://{addr}", K::SCHEMES[0]));
    K::put(addr).await.unwrap();
    assert!(K::has_data(addr).await.unwrap());

    server.kill().await.unwrap();
    assert_silent::<K>(addr).await;
    server.restart().await.unwrap();
    assert!(K::has_data(addr).await.unwrap(), "data outlives a crash");

    server.stop().await.unwrap();
    assert_silent::<K>(addr).await;
    server.restart().await.unwrap();
    assert!(K::has_data(addr).await.unwrap(), "data outlives a stop");

    server.freeze().await.unwrap();
    let connected = timeout(Duration::from_secs(1), TcpStream::connect(addr)).await;
    connected.expect("a frozen server's system takes connections").unwrap();
    assert_eq!(K::has_data(addr).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    server.thaw().await.unwrap();
    assert!(K::has_data(addr).await.unwrap());

    server.wipe().await.unwrap();
    assert!(!K::has_data(addr).await.unwrap(), "a wiped server is empty");
    K::put(addr).await.unwrap();

    drop(server);
    assert_silent::<K>(addr).await;
}

async fn frozen_server_can_be_killed_stopped_and_dropped<K: Kind>(launcher: Launcher) {
    let server = Server::start_in(launcher, K::plain()).await.unwrap();
    let addr = server.addr();
    server.freeze().await.unwrap();
    server.kill().await.unwrap();
    assert_silent::<K>(addr).await;
    server.freeze().await.unwrap_err();

    server.restart().await.unwrap();
    server.freeze().await.unwrap();
    server.stop().await.unwrap();
    assert_silent::<K>(addr).await;

    server.restart().await.unwrap();
    server.freeze().await.unwrap();
    drop(server);
    assert_silent::<K>(addr).await;
}

async fn server_that_cannot_start_says_why<K: Kind>(launcher: Launcher) {
    let (broken, why) = K::broken();
    let error = Server::start_in(launcher, broken).await.unwrap_err();
    assert!(error.to_string().contains(why), "{error}");
}

/// For stores whose clusters are of equals.
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
async fn cluster_elects_and_outlives_its_leader<K: Kind>(launcher: Launcher) {
    let cluster = Cluster::start_in(launcher, K::plain(), 3).await.unwrap();
    let [a, b, c] = cluster.members() else { panic!("three members") };
    assert_eq!(cluster.url(), format!("{}://{},{},{}", K::SCHEMES[0], a.addr(), b.addr(), c.addr()));
    K::put(a.addr()).await.unwrap();
    assert!(K::has_data(b.addr()).await.unwrap());
    assert!(K::has_data(c.addr()).await.unwrap());

    let leader = cluster.leader().await.unwrap();
    cluster.members()[leader].kill().await.unwrap();
    let successor = cluster.leader().await.unwrap();
    assert_ne!(successor, leader);
    assert_silent::<K>(cluster.members()[leader].addr()).await;
    cluster.members()[leader].restart().await.unwrap();

    cluster.members()[successor].freeze().await.unwrap();
    assert_ne!(cluster.leader().await.unwrap(), successor);
    cluster.members()[successor].thaw().await.unwrap();

    cluster.wipe_member(successor).await.unwrap();
    let returned = cluster.members()[successor].addr();
    eventually("it has fetched what it had lost", async || K::has_data(returned).await.unwrap_or(false)).await;

    a.wipe().await.unwrap_err();
    cluster.restart().await.unwrap();
    assert!(K::has_data(a.addr()).await.unwrap());
    cluster.wipe().await.unwrap();
    assert!(!K::has_data(a.addr()).await.unwrap());

    let addrs: Vec<_> = cluster.members().iter().map(Server::addr).collect();
    drop(cluster);
    for addr in addrs {
        assert_silent::<K>(addr).await;
    }
}

/// For stores whose clusters are of equals.
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
async fn member_that_is_cut_off_loses_its_lead_and_finds_back<K: Kind>() {
    let cluster = Cluster::start_in(Launcher::Containers, K::plain(), 3).await.unwrap();
    let leader = cluster.leader().await.unwrap();
    let addrs: Vec<_> = cluster.members().iter().map(Server::addr).collect();
    let others: Vec<_> = addrs.iter().filter(|addr| **addr != addrs[leader]).collect();
    cluster.isolate(leader).await.unwrap();
    eventually("the others go on without it", async || K::put(*others[0]).await.is_ok()).await;
    assert!(K::has_data(*others[1]).await.unwrap());
    TcpStream::connect(addrs[leader]).await.unwrap();
    K::put(addrs[leader]).await.unwrap_err();
    assert_ne!(cluster.leader().await.unwrap(), leader);
    cluster.rejoin().await.unwrap();
    eventually("it takes what it is given", async || K::put(addrs[leader]).await.is_ok()).await;
    // Its return may cost the others another election, and until that is over nobody can say.
    eventually("it has it", async || matches!(K::has_data(addrs[leader]).await, Ok(true))).await;
}

async fn tls_server_takes_only_its_own_clients<K: Kind>(launcher: Launcher) {
    let certs = Certs::generate().unwrap();
    let secure = K::secure(&certs.server).only_for_clients_of(&certs.ca);
    let server = Server::start_in(launcher, secure).await.unwrap();
    assert_eq!(server.url(), format!("{}://localhost:{}", K::SCHEMES[1], server.addr().port()));
    for name in ["localhost", "127.0.0.1", "::1"] {
        say_over_tls::<K>(&server, &certs, Some(&certs.client), name).await.unwrap();
    }
    let other = certs.client_named("another").unwrap();
    say_over_tls::<K>(&server, &certs, Some(&other), "localhost").await.unwrap();
    say_over_tls::<K>(&server, &certs, Some(&certs.stranger), "localhost").await.unwrap_err();
    say_over_tls::<K>(&server, &certs, None, "localhost").await.unwrap_err();
    say::<K>(TcpStream::connect(server.addr()).await.unwrap()).await.unwrap_err();
    server.kill().await.unwrap();
    server.restart().await.unwrap();

    let server = Server::start_in(launcher, K::secure(&certs.misnamed)).await.unwrap();
    let wrong_name = say_over_tls::<K>(&server, &certs, None, "localhost").await.unwrap_err();
    assert!(wrong_name.to_string().contains("not valid for name"), "{wrong_name}");
    say_over_tls::<K>(&server, &certs, None, "other.example").await.unwrap();
}

async fn panic_ends_the_server<K: Kind>(launcher: Launcher) {
    let (tell, told) = tokio::sync::oneshot::channel();
    let test = async {
        let server = Server::start_in(launcher, K::plain()).await.unwrap();
        tell.send(server.addr()).unwrap();
        assert!(K::put(server.addr()).await.is_err(), "this panic is meant");
    };
    AssertUnwindSafe(test).catch_unwind().await.unwrap_err();
    assert_silent::<K>(told.await.unwrap()).await;
}

async fn server_may_be_dropped_outside_a_runtime<K: Kind>(launcher: Launcher) {
    let outside = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = runtime.block_on(Server::start_in(launcher, K::plain())).unwrap();
        drop(runtime);
        server.addr()
    });
    let addr = tokio::task::spawn_blocking(|| outside.join().unwrap()).await.unwrap();
    assert_silent::<K>(addr).await;
}

async fn command_finds_the_shared_server_and_its_status_comes_back<K: Kind>(launcher: Launcher) {
    let mut command = test_servers::<K>(launcher, "exit 7");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_silent::<K>(addr_in::<K>(&String::from_utf8(output.stdout).unwrap())).await;
}

async fn killed_test_process_takes_its_servers_along<K: Kind>(launcher: Launcher) {
    let mut command = test_servers::<K>(launcher, "exec sleep 600");
    let mut child = command.stdout(Stdio::piped()).process_group(0).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let (mut output, line) = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        (output, line)
    })
    .await
    .unwrap();
    let addr = addr_in::<K>(&line);
    K::put(addr).await.unwrap();

    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the server is gone", async || TcpStream::connect(addr).await.is_err()).await;
    // The command holds the other end of this pipe.
    let ended = tokio::task::spawn_blocking(move || output.read_line(&mut String::new()));
    assert_eq!(timeout(Duration::from_secs(10), ended).await.expect("the command is gone").unwrap().unwrap(), 0);
}

async fn missing_launcher_is_an_error_that_says_what_to_install<K: Kind>(launcher: Launcher) {
    let mut command = test_servers::<K>(launcher, "true");
    let output = command.env("PATH", "/nowhere").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let package = match launcher {
        Launcher::Containers => "docker.io",
        Launcher::Processes => K::plain().package(),
    };
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&format!("apt-get install {package}")), "{said}");
}

async fn sweep_removes_what_dead_processes_left_and_nothing_else<K: Kind>() {
    let store = K::plain();
    let image = format!("registry-tests/{}:bookworm", store.name());
    let server = Server::start_in(Launcher::Containers, store).await.unwrap();
    let publishing = format!("publish={}", server.addr().port());
    let owner = docker(&["ps", "--filter", &publishing, "--format", r#"{{.Label "registry-tests.owner"}}"#]);
    // The same number, but another time of start: that process is gone.
    let label = format!("registry-tests.owner={owner}0");
    let dead = docker(&["run", "--detach", "--label", &label, &image, "sleep", "60"]);
    servers::sweep().await.unwrap();
    assert_eq!(docker(&["ps", "--all", "--quiet", "--filter", &format!("id={dead}")]), "");
    K::put(server.addr()).await.unwrap();
}

fn docker(args: &[&str]) -> String {
    let output = Command::new("docker").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

async fn shared_server_is_one_and_refuses_faults<K: Kind>() {
    let (one, two) = tokio::join!(K::shared(), K::shared());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.url(), two.url());
    let refused = one.kill().await.unwrap_err().to_string();
    assert!(refused.contains("needs a server of its own"), "{refused}");
    K::put(two.addr()).await.unwrap();
}

/// `test-servers STORE -- sh -c SCRIPT` in a launcher, the script being told the server's URL first.
fn test_servers<K: Kind>(launcher: Launcher, script: &str) -> Command {
    let mut command = Command::new(TEST_SERVERS);
    let launcher = match launcher {
        Launcher::Containers => "containers",
        Launcher::Processes => "processes",
    };
    let store = K::plain().name();
    let variable = format!("REGISTRY_TEST_{}", store.to_uppercase());
    command.args([store, "--", "sh", "-c", &format!("echo \"${variable}_SHARED_URL\"; {script}")]);
    command.env("REGISTRY_TEST_SERVERS", launcher).env_remove(format!("{variable}_URL")).stderr(Stdio::piped());
    command
}

fn addr_in<K: Kind>(url: &str) -> SocketAddr {
    let addr = url.trim().strip_prefix(K::SCHEMES[0]).and_then(|rest| rest.strip_prefix("://"));
    addr.unwrap_or_else(|| panic!("no URL: {url:?}")).parse().unwrap()
}

/// Says something to the server, over TLS under this name with this client certificate.
async fn say_over_tls<K: Kind>(
    server: &Server,
    certs: &Certs,
    client: Option<&Identity>,
    name: &'static str,
) -> io::Result<()> {
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
    say::<K>(TlsConnector::from(Arc::new(config)).connect(name.try_into().unwrap(), socket).await?).await
}

/// Fails unless the server answers.
async fn say<K: Kind>(socket: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let answer = timeout(Duration::from_secs(5), exchange(socket, K::QUESTION)).await??;
    if answer.contains(K::ANSWER) { Ok(()) } else { Err(io::Error::other(answer)) }
}

async fn exchange(mut socket: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> io::Result<String> {
    socket.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer).await;
    // Not every server ends TLS before it ends the connection.
    match read {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof || answer.is_empty() => Err(error),
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}

/// No server answers there. In a pod, the engine goes on taking connections and drops them.
async fn assert_silent<K: Kind>(addr: SocketAddr) {
    let error = K::has_data(addr).await.expect_err("the server must be down");
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
