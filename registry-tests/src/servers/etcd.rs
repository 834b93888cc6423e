//! How an etcd is started and asked.

use std::net::{Ipv4Addr, SocketAddr};

use async_trait::async_trait;
use serde_json::Value;
use tokio::{
    net::TcpStream,
    time::{Duration, Instant, sleep},
};

use super::{Error, Identity, READY_WITHIN, Result, Site, Store, http};

/// Positions of a server's ports.
const CLIENTS: usize = 0;
const PEERS: usize = 1;
/// Health over plain HTTP, where clients need a certificate.
const HEALTH: usize = 2;

/// An etcd of version 3.4 or later, with the options a test needs.
#[derive(Clone, Debug, Default)]
pub struct Etcd {
    args: Vec<String>,
    identity: Option<Identity>,
    client_ca: Option<String>,
}

impl Etcd {
    /// An etcd without TLS or authentication.
    ///
    /// It does not wait for its disk, and elects within 250 ms instead of 1 s, so that it starts fast. Its least lease
    /// TTL is therefore 1 s instead of 2 s; the arguments `--heartbeat-interval=100` and `--election-timeout=1000` give
    /// it etcd's own times.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an argument, such as `--quota-backend-bytes=16777216` or `--auth-token-ttl=5`.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Serves clients over TLS, as this server. The peers of a cluster speak in the clear.
    #[must_use]
    pub fn tls(mut self, server: &Identity) -> Self {
        self.identity = Some(server.clone());
        self
    }

    /// Takes only clients with a certificate of this authority, given in PEM. Needs [`tls`](Self::tls).
    #[must_use]
    pub fn client_ca(mut self, ca: &str) -> Self {
        self.client_ca = Some(ca.to_owned());
        self
    }

    fn scheme(&self) -> &'static str {
        if self.identity.is_some() { "https" } else { "http" }
    }

    fn tls_args(&self, site: &Site) -> Vec<String> {
        let mut args = Vec::new();
        if self.identity.is_some() {
            args.push(format!("--cert-file={}/server.pem", site.files));
            args.push(format!("--key-file={}/server.key", site.files));
            args.push(format!("--listen-metrics-urls=http://{}:{}", site.listen, site.ports()[HEALTH]));
        }
        if self.client_ca.is_some() {
            args.push("--client-cert-auth".to_owned());
            args.push(format!("--trusted-ca-file={}/ca.pem", site.files));
        }
        args
    }
}

fn peer(site: &Site, index: usize) -> String {
    format!("http://127.0.0.1:{}", site.members[index][PEERS])
}

/// What etcd answers to a request, which it may refuse for a while: its members have just lost sight of one.
async fn json(server: SocketAddr, path: &str, request: &str, taken: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let answer = http::post(server, path, request).await;
        match answer.map(|body| serde_json::from_str(&body).unwrap_or(Value::Null)) {
            Ok(answer) if taken(&answer) => return Ok(answer),
            refused if Instant::now() > deadline => {
                return Err(Error::new(format!("etcd at {server} does not take {path} {request}: {refused:?}")));
            }
            _ => sleep(Duration::from_millis(50)).await,
        }
    }
}

#[async_trait]
impl Store for Etcd {
    fn name(&self) -> &'static str {
        "etcd"
    }

    fn package(&self) -> &'static str {
        "etcd-server"
    }

    fn ports(&self) -> usize {
        3
    }

    fn command(&self, site: &Site) -> Vec<String> {
        let peer = |index| peer(site, index);
        let cluster: Vec<_> = (0..site.members.len()).map(|index| format!("m{index}={}", peer(index))).collect();
        let (scheme, clients) = (self.scheme(), site.ports()[CLIENTS]);
        let mut command = vec![
            "etcd".to_owned(),
            format!("--name=m{}", site.index),
            format!("--data-dir={}", site.data),
            format!("--listen-client-urls={scheme}://{}:{clients}", site.listen),
            format!("--advertise-client-urls={scheme}://127.0.0.1:{clients}"),
            format!("--listen-peer-urls={}", peer(site.index)),
            format!("--initial-advertise-peer-urls={}", peer(site.index)),
            format!("--initial-cluster={}", cluster.join(",")),
            "--unsafe-no-fsync".to_owned(),
            "--heartbeat-interval=50".to_owned(),
            "--election-timeout=250".to_owned(),
        ];
        command.extend(self.tls_args(site));
        command.extend_from_slice(&self.args);
        command
    }

    fn files(&self, _site: &Site) -> Vec<(String, String)> {
        let mut files = Vec::new();
        if let Some(identity) = &self.identity {
            files.push(("server.pem".to_owned(), identity.cert.clone()));
            files.push(("server.key".to_owned(), identity.key.clone()));
        }
        if let Some(ca) = &self.client_ca {
            files.push(("ca.pem".to_owned(), ca.clone()));
        }
        files
    }

    fn url(&self, ports: &[u16]) -> String {
        let (scheme, host) = if self.identity.is_some() { ("etcds", "localhost") } else { ("etcd", "127.0.0.1") };
        let hosts: Vec<_> = ports.iter().map(|port| format!("{host}:{port}")).collect();
        format!("{scheme}://{}", hosts.join(","))
    }

    /// Another member takes the old one's place: who has lost the data must not come back under its old id.
    async fn before_return(&self, site: &Site) -> Result<Vec<String>> {
        let other = (site.index + 1) % site.members.len();
        let other = (Ipv4Addr::LOCALHOST, site.members[other][CLIENTS]).into();
        let members = json(other, "/v3/cluster/member/list", "{}", |answer| answer["members"].is_array()).await?;
        let name = format!("m{}", site.index);
        let old = members["members"].as_array().into_iter().flatten().find(|member| member["name"] == name.as_str());
        if let Some(id) = old.and_then(|old| old["ID"].as_str()) {
            let id = format!("{{\"ID\":\"{id}\"}}");
            json(other, "/v3/cluster/member/remove", &id, |answer| answer["members"].is_array()).await?;
        }
        let peer = format!("{{\"peerURLs\":[\"{}\"]}}", peer(site, site.index));
        json(other, "/v3/cluster/member/add", &peer, |answer| answer["member"].is_object()).await?;
        Ok(vec!["--initial-cluster-state=existing".to_owned()])
    }

    /// Healthy means that there is a leader.
    async fn ready(&self, site: &Site) -> bool {
        let port = if self.identity.is_some() { HEALTH } else { CLIENTS };
        let health: SocketAddr = (Ipv4Addr::LOCALHOST, site.ports()[port]).into();
        http::get(health, "/health").await.is_ok_and(|body| body.contains("true"))
            && TcpStream::connect(site.addr()).await.is_ok()
    }

    /// Asks the gateway, which is for plain HTTP only: behind TLS nobody is seen to lead.
    async fn leads(&self, site: &Site) -> bool {
        let Ok(body) = http::post(site.addr(), "/v3/maintenance/status", "{}").await else { return false };
        let Ok(status) = serde_json::from_str::<Value>(&body) else { return false };
        status["leader"].is_string() && status["leader"] == status["header"]["member_id"]
    }
}
