use registry_tests::servers::{Etcd, shared_etcd};

use super::*;

in_both![
    Etcd;
    cluster_elects_and_outlives_its_leader, server_takes_extra_arguments;
    containers only: member_that_is_cut_off_loses_its_lead_and_finds_back
];

#[async_trait]
impl Kind for Etcd {
    const SCHEMES: [&'static str; 2] = ["etcd", "etcds"];
    const QUESTION: &'static str = "GET /version HTTP/1.0\r\n\r\n";
    const ANSWER: &'static str = "etcdserver";

    fn plain() -> Self {
        Self::new()
    }

    fn secure(server: &Identity) -> Self {
        Self::new().tls(server)
    }

    fn only_for_clients_of(self, ca: &str) -> Self {
        self.client_ca(ca)
    }

    fn broken() -> (Self, &'static str) {
        (Self::new().arg("--election-timeout=1"), "election-timeout")
    }

    async fn shared() -> servers::Result<Server> {
        shared_etcd().await
    }

    /// `b` under `a`, in the encoding of etcd's gateway.
    async fn put(addr: SocketAddr) -> io::Result<()> {
        let answer = http(addr, "/v3/kv/put", r#"{"key": "YQ==", "value": "Yg=="}"#).await?;
        if answer.contains("revision") { Ok(()) } else { Err(io::Error::other(answer)) }
    }

    async fn has_data(addr: SocketAddr) -> io::Result<bool> {
        let answer = http(addr, "/v3/kv/range", r#"{"key": "YQ=="}"#).await?;
        if answer.contains("revision") { Ok(answer.contains("Yg==")) } else { Err(io::Error::other(answer)) }
    }
}

async fn cluster_elects_and_outlives_its_leader(launcher: Launcher) {
    super::cluster_elects_and_outlives_its_leader::<Etcd>(launcher).await;
}

async fn member_that_is_cut_off_loses_its_lead_and_finds_back() {
    super::member_that_is_cut_off_loses_its_lead_and_finds_back::<Etcd>().await;
}

async fn server_takes_extra_arguments(launcher: Launcher) {
    let etcd = Etcd::new().arg("--auth-token=simple").arg("--auth-token-ttl=5").arg("--max-request-bytes=1000");
    let server = Server::start_in(launcher, etcd).await.unwrap();
    let big = format!(r#"{{"key": "YQ==", "value": "{}"}}"#, "AAAA".repeat(1000));
    assert!(http(server.addr(), "/v3/kv/put", &big).await.unwrap().contains("request is too large"));
}

async fn http(addr: SocketAddr, path: &str, body: &str) -> io::Result<String> {
    let request = format!("POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    timeout(Duration::from_secs(1), async { exchange(TcpStream::connect(addr).await?, &request).await }).await?
}
