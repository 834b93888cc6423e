//! How a Redis is started and asked: alone, under Sentinels, and as a Cluster.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use async_trait::async_trait;
use futures::future::try_join_all;
use tokio::time::{Duration, Instant, sleep};

use super::{Error, Identity, READY_WITHIN, Result, Site, Store, resp};

/// Positions of a server's ports.
const CLIENTS: usize = 0;
/// What the nodes of a Cluster say to each other.
const BUS: usize = 1;
/// Beside TLS: clients in the clear, which the suite itself is.
const CLEAR: usize = 2;

/// What the Sentinels call their primary.
const PRIMARY: &str = "registry";
/// How many of the members hold data under Sentinels: the others are those.
const UNDER_SENTINELS: usize = 2;
const SENTINELS: usize = 3;
/// A Cluster has a replica for each of them.
const PRIMARIES: usize = 3;
const SLOTS: usize = 16384;

/// A Redis of version 6.2 or later (a Cluster: 7.0), or a Valkey, with the configuration a test needs.
#[derive(Clone, Debug)]
pub struct Redis {
    kind: Kind,
    lines: Vec<String>,
    users: Vec<String>,
    identity: Option<Identity>,
    client_ca: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Standalone,
    Sentinel,
    Cluster,
}

/// What one server of a deployment does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Data,
    Sentinel,
}

impl Redis {
    /// A single server without TLS or passwords, which loses its data when it ends.
    pub fn new() -> Self {
        Self::of(Kind::Standalone)
    }

    /// A primary and its replica, members 0 and 1, under three Sentinels, members 2 to 4. They call a server dead that
    /// has not answered for two seconds.
    pub fn sentinel() -> Self {
        Self::of(Kind::Sentinel)
    }

    /// A Cluster of three primaries, members 0 to 2, and their replicas, members 3 to 5, which call a node dead that
    /// has not answered for two seconds. Needs Redis 7.0.
    pub fn cluster() -> Self {
        Self::of(Kind::Cluster)
    }

    fn of(kind: Kind) -> Self {
        Self { kind, lines: Vec::new(), users: Vec::new(), identity: None, client_ca: None }
    }

    /// Adds a line to the configuration of the servers that hold data, such as `maxmemory 3mb` or
    /// `enable-debug-command yes`.
    #[must_use]
    pub fn line(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }

    /// Keeps data when the server ends, also when it is killed: whatever it had answered is there again.
    ///
    /// The system has the data then, not the disk, which nobody waits for.
    #[must_use]
    pub fn durable(self) -> Self {
        self.line("appendonly yes").line("appendfsync no").line("auto-aof-rewrite-percentage 0")
    }

    /// Adds a user, in the words of an ACL file: `user app on >secret ~* &* +@all`, `user default off`.
    ///
    /// Where the default user may not ask, a server is taken to be ready once it refuses to answer.
    #[must_use]
    pub fn user(mut self, line: impl Into<String>) -> Self {
        self.users.push(line.into());
        self
    }

    /// Serves clients over TLS, as this server; several servers talk TLS to each other, too, and need
    /// [`client_ca`](Self::client_ca) for that.
    #[must_use]
    pub fn tls(mut self, server: &Identity) -> Self {
        self.identity = Some(server.clone());
        self
    }

    /// Takes only clients with a certificate of this authority, given in PEM, which also must have made the servers'.
    /// Needs [`tls`](Self::tls).
    #[must_use]
    pub fn client_ca(mut self, ca: &str) -> Self {
        self.client_ca = Some(ca.to_owned());
        self
    }

    /// Into how many servers this makes a [`Cluster`](super::Cluster).
    pub fn size(&self) -> usize {
        match self.kind {
            Kind::Standalone => 1,
            Kind::Sentinel => UNDER_SENTINELS + SENTINELS,
            Kind::Cluster => 2 * PRIMARIES,
        }
    }

    fn role(&self, index: usize) -> Role {
        if self.kind == Kind::Sentinel && index >= UNDER_SENTINELS { Role::Sentinel } else { Role::Data }
    }

    fn configuration(&self, site: &Site) -> Vec<String> {
        let mut lines =
            vec![format!("bind {}", site.listen), "protected-mode no".to_owned(), format!("dir {}", site.data)];
        if self.identity.is_none() {
            lines.push(format!("port {}", site.ports()[CLIENTS]));
        }
        match self.role(site.index) {
            Role::Sentinel => {
                lines.extend(self.tls_lines(site));
                lines.extend(watch(site));
            }
            Role::Data => {
                lines.push("save \"\"".to_owned());
                lines.push("repl-diskless-sync-delay 0".to_owned());
                lines.extend(self.membership(site));
                lines.extend(self.tls_lines(site));
                lines.extend_from_slice(&self.lines);
                if !self.users.is_empty() {
                    lines.push(format!("aclfile {}/users.acl", site.files));
                }
            }
        }
        lines
    }

    fn membership(&self, site: &Site) -> Vec<String> {
        match self.kind {
            Kind::Sentinel if site.index > 0 => vec![format!("replicaof 127.0.0.1 {}", site.members[0][CLIENTS])],
            Kind::Cluster => vec![
                "cluster-enabled yes".to_owned(),
                "cluster-node-timeout 2000".to_owned(),
                // A replica takes over however old its data is: that is the harder case.
                "cluster-replica-validity-factor 0".to_owned(),
                "cluster-announce-ip 127.0.0.1".to_owned(),
                format!("cluster-port {}", site.ports()[BUS]),
            ],
            _ => Vec::new(),
        }
    }

    fn tls_lines(&self, site: &Site) -> Vec<String> {
        if self.identity.is_none() {
            return Vec::new();
        }
        let mut lines = vec![
            format!("tls-port {}", site.ports()[CLIENTS]),
            format!("port {}", site.ports()[CLEAR]),
            format!("tls-cert-file {}/server.pem", site.files),
            format!("tls-key-file {}/server.key", site.files),
            format!("tls-auth-clients {}", if self.client_ca.is_some() { "yes" } else { "no" }),
        ];
        // Without any authority a server with TLS does not start.
        let ca = if self.client_ca.is_some() { "ca.pem" } else { "server.pem" };
        lines.push(format!("tls-ca-cert-file {}/{ca}", site.files));
        match self.kind {
            Kind::Standalone => {}
            Kind::Sentinel => lines.push("tls-replication yes".to_owned()),
            Kind::Cluster => lines.extend(["tls-replication yes".to_owned(), "tls-cluster yes".to_owned()]),
        }
        lines
    }

    /// Where the server with these ports is asked.
    fn addr(&self, ports: &[u16]) -> SocketAddr {
        address(ports[if self.identity.is_some() { CLEAR } else { CLIENTS }])
    }

    /// Where the other members are asked.
    fn others(&self, site: &Site) -> Vec<SocketAddr> {
        let others = site.members.iter().enumerate().filter(|(index, _)| *index != site.index);
        others.map(|(_, ports)| self.addr(ports)).collect()
    }

    /// The first Sentinel that answers says who is the primary.
    async fn elected(&self, site: &Site) -> Option<u16> {
        let question = format!("SENTINEL GET-MASTER-ADDR-BY-NAME {PRIMARY}");
        for sentinel in &site.members[UNDER_SENTINELS..] {
            if let Ok(answer) = resp::ask_text(self.addr(sentinel), &question).await {
                return answer.lines().nth(1)?.parse().ok();
            }
        }
        None
    }
}

impl Default for Redis {
    fn default() -> Self {
        Self::new()
    }
}

/// The configuration of a Sentinel. It knows the others and the replica from the start: left to itself it would look for
/// them every ten seconds, and not fail over until it has found them. Two of three must agree that the primary is dead.
/// They try a lost connection again after a second, and a primary that is made closes all of them: it would be taken for
/// dead if no more than a second were allowed.
fn watch(site: &Site) -> Vec<String> {
    let id = |sentinel: &[u16]| format!("{:040x}", sentinel[CLIENTS]);
    let data = |index: usize| format!("{PRIMARY} 127.0.0.1 {}", site.members[index][CLIENTS]);
    let mut lines = vec![
        format!("sentinel myid {}", id(site.ports())),
        format!("sentinel monitor {} 2", data(0)),
        format!("sentinel down-after-milliseconds {PRIMARY} 2000"),
        format!("sentinel failover-timeout {PRIMARY} 3000"),
    ];
    lines.extend((1..UNDER_SENTINELS).map(|replica| format!("sentinel known-replica {}", data(replica))));
    let others = (UNDER_SENTINELS..site.members.len()).filter(|other| *other != site.index);
    lines.extend(others.map(|other| format!("sentinel known-sentinel {} {}", data(other), id(&site.members[other]))));
    lines
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

#[async_trait]
impl Store for Redis {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn package(&self) -> &'static str {
        "redis-server"
    }

    fn ports(&self) -> usize {
        3
    }

    fn command(&self, site: &Site) -> Vec<String> {
        let mut command = vec!["redis-server".to_owned(), format!("{}/redis.conf", site.files)];
        if self.role(site.index) == Role::Sentinel {
            command.push("--sentinel".to_owned());
        }
        command
    }

    /// The servers write into their configuration who is whose replica.
    fn files(&self, site: &Site) -> Vec<(String, String)> {
        let mut files = vec![("redis.conf".to_owned(), self.configuration(site).join("\n") + "\n")];
        if let Some(identity) = &self.identity {
            files.push(("server.pem".to_owned(), identity.cert.clone()));
            files.push(("server.key".to_owned(), identity.key.clone()));
        }
        if let Some(ca) = &self.client_ca {
            files.push(("ca.pem".to_owned(), ca.clone()));
        }
        if !self.users.is_empty() {
            files.push(("users.acl".to_owned(), self.users.join("\n") + "\n"));
        }
        files
    }

    fn url(&self, ports: &[u16]) -> String {
        let tls = if self.identity.is_some() { "s" } else { "" };
        let host = if self.identity.is_some() { "localhost" } else { "127.0.0.1" };
        let hosts = |ports: &[u16]| ports.iter().map(|port| format!("{host}:{port}")).collect::<Vec<_>>().join(",");
        match self.kind {
            Kind::Cluster => format!("redis{tls}+cluster://{}", hosts(ports)),
            Kind::Sentinel if ports.len() > UNDER_SENTINELS => {
                format!("redis{tls}+sentinel://{}?master={PRIMARY}", hosts(&ports[UNDER_SENTINELS..]))
            }
            Kind::Sentinel | Kind::Standalone => format!("redis{tls}://{}", hosts(ports)),
        }
    }

    async fn ready(&self, site: &Site) -> bool {
        let addr = self.addr(site.ports());
        match resp::ask_text(addr, "PING").await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Other => return error.to_string().starts_with("NOAUTH"),
            Err(_) => return false,
        }
        match (self.kind, self.role(site.index)) {
            (_, Role::Sentinel) => sees_all(addr).await,
            (Kind::Standalone, Role::Data) => true,
            (Kind::Sentinel, Role::Data) => is_linked(addr).await,
            (Kind::Cluster, Role::Data) => is_linked(addr).await && covers_all(addr, site.members.len()).await,
        }
    }

    /// Under Sentinels, whom they name and who agrees; in a Cluster, any primary.
    async fn leads(&self, site: &Site) -> bool {
        if self.role(site.index) == Role::Sentinel {
            return false;
        }
        if self.kind == Kind::Sentinel && self.elected(site).await != Some(site.ports()[CLIENTS]) {
            return false;
        }
        resp::ask_text(self.addr(site.ports()), "INFO replication").await.is_ok_and(|info| info.contains("role:master"))
    }

    /// A Sentinel that comes first would find the primary dead.
    fn before_others(&self) -> usize {
        if self.kind == Kind::Sentinel { UNDER_SENTINELS } else { 0 }
    }

    /// Nobody takes over from a node of which another one says at once that it is at its address.
    async fn before_return(&self, site: &Site) -> Result<Vec<String>> {
        if self.kind == Kind::Cluster {
            let others = self.others(site);
            let (_, dead) = bereft(others[0], Some(site.ports()[CLIENTS])).await?;
            for other in others {
                told(other, format!("CLUSTER FORGET {dead}")).await?;
            }
        }
        Ok(Vec::new())
    }

    /// A node that has lost its data is another one. It becomes a replica of whoever has none.
    async fn after_return(&self, site: &Site) -> Result<()> {
        if self.kind != Kind::Cluster {
            return Ok(());
        }
        let (node, others) = (self.addr(site.ports()), self.others(site));
        let [port, bus] = [site.ports()[CLIENTS], site.ports()[BUS]];
        let id = told(node, "CLUSTER MYID".to_owned()).await?;
        let (primary, _) = bereft(others[0], None).await?;
        told(others[0], format!("CLUSTER MEET 127.0.0.1 {port} {bus}")).await?;
        told(node, format!("CLUSTER REPLICATE {primary}")).await?;
        let deadline = Instant::now() + READY_WITHIN;
        for other in others {
            while !told(other, "CLUSTER NODES".to_owned()).await?.contains(&id) {
                if Instant::now() > deadline {
                    return Err(Error::new(format!("redis at {other} does not hear of {node}")));
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    async fn form(&self, site: &Site) -> Result<()> {
        if self.kind != Kind::Cluster {
            return Ok(());
        }
        let nodes: Vec<_> = site.members.iter().map(|ports| self.addr(ports)).collect();
        try_join_all(nodes.iter().map(|node| told(*node, "PING".to_owned()))).await?;
        let info = told(nodes[0], "CLUSTER INFO".to_owned()).await?;
        if !info.contains("cluster_known_nodes:1\r") {
            // With its data, it remembers.
            return Ok(());
        }
        for (index, node) in nodes[..PRIMARIES].iter().enumerate() {
            let (from, to) = (index * SLOTS / PRIMARIES, (index + 1) * SLOTS / PRIMARIES);
            let slots: Vec<_> = (from..to).map(|slot| slot.to_string()).collect();
            told(*node, format!("CLUSTER ADDSLOTS {}", slots.join(" "))).await?;
            // Two primaries of one epoch would have to settle that first.
            told(*node, format!("CLUSTER SET-CONFIG-EPOCH {}", index + 1)).await?;
        }
        for ports in &site.members[1..] {
            let [port, bus] = [ports[CLIENTS], ports[BUS]];
            told(nodes[0], format!("CLUSTER MEET 127.0.0.1 {port} {bus}")).await?;
        }
        for (primary, replica) in nodes.iter().zip(&nodes[PRIMARIES..]) {
            let id = told(*primary, "CLUSTER MYID".to_owned()).await?;
            told(*replica, format!("CLUSTER REPLICATE {id}")).await?;
        }
        Ok(())
    }
}

/// The primary that serves slots and has no replica that lives, and the dead node at this port, by their ids, once there
/// are both.
async fn bereft(node: SocketAddr, dead_at: Option<u16>) -> Result<(String, String)> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let said = told(node, "CLUSTER NODES".to_owned()).await?;
        let nodes: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        let lives = |node: &[&str]| !node[2].contains("fail");
        let has_replica = |id: &str| nodes.iter().any(|node| node[3] == id && lives(node));
        let serves = |node: &[&str]| node[2].contains("master") && lives(node) && node.len() > 8;
        let primary = nodes.iter().find(|node| serves(node) && !has_replica(node[0]));
        let at = |node: &[&str], port: u16| node[1].contains(&format!(":{port}@"));
        let dead = dead_at.map(|port| nodes.iter().find(|node| !lives(node) && at(node, port)).map(|node| node[0]));
        match (primary, dead) {
            (Some(primary), None) => return Ok((primary[0].to_owned(), String::new())),
            (Some(primary), Some(Some(dead))) => return Ok((primary[0].to_owned(), dead.to_owned())),
            _ if Instant::now() > deadline => {
                return Err(Error::new(format!("redis at {node} has nobody to be replaced:\n{said}")));
            }
            _ => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// What a server says, which may refuse for a while: it is only starting, or does not know yet whom it is told about.
async fn told(server: SocketAddr, command: String) -> Result<String> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        match resp::ask_text(server, &command).await {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => {
                let command: String = command.chars().take(60).collect();
                return Err(Error::new(format!("redis at {server} does not take {command}: {error}")));
            }
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Whether a Sentinel knows the others and the replica: until then it does not fail over.
async fn sees_all(sentinel: SocketAddr) -> bool {
    let Ok(seen) = resp::ask_text(sentinel, &format!("SENTINEL MASTER {PRIMARY}")).await else { return false };
    let lines: Vec<_> = seen.lines().collect();
    let field = |name| lines.chunks_exact(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
    let others = (SENTINELS - 1).to_string();
    field("num-other-sentinels") == Some(&others)
        && field("num-slaves") == Some("1")
        && field("flags") == Some("master")
}

/// Whether a server is a primary, or a replica that has its primary's data.
async fn is_linked(server: SocketAddr) -> bool {
    let info = resp::ask_text(server, "INFO replication").await;
    info.is_ok_and(|info| info.contains("role:master") || info.contains("master_link_status:up"))
}

/// Whether a node knows so many, itself included, and all slots are served.
async fn covers_all(node: SocketAddr, nodes: usize) -> bool {
    let info = resp::ask_text(node, "CLUSTER INFO").await;
    info.is_ok_and(|info| info.contains("cluster_state:ok") && info.contains(&format!("cluster_known_nodes:{nodes}\r")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_strings_name_whom_clients_ask() {
        assert_eq!(Redis::new().url(&[1]), "redis://127.0.0.1:1");
        assert_eq!(
            Redis::sentinel().url(&[1, 2, 3, 4, 5]),
            "redis+sentinel://127.0.0.1:3,127.0.0.1:4,127.0.0.1:5?master=registry"
        );
        assert_eq!(Redis::sentinel().url(&[1]), "redis://127.0.0.1:1");
        assert_eq!(Redis::cluster().url(&[1, 2]), "redis+cluster://127.0.0.1:1,127.0.0.1:2");
    }
}
