//! How a ZooKeeper is started and asked.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{Identity, Site, Store};

/// Positions of a server's ports.
const CLIENTS: usize = 0;
const PEERS: usize = 1;
const ELECTION: usize = 2;
/// The plain port, for [`ask`] alone, where clients come by TLS.
const PLAIN: usize = 3;

/// Where Debian has the jars, and those of them that make a server. The last names most of the others in its manifest,
/// but not the ones before it: without the netty ones it starts, and then drops everyone who comes by TLS.
const JARS: &str = "/usr/share/java";
const CLASS_PATH: [&str; 5] =
    ["slf4j-simple.jar", "netty-codec.jar", "netty-resolver.jar", "netty-transport-native-unix-common.jar", JAR];
const JAR: &str = "zookeeper.jar";
const MAIN: &str = "org.apache.zookeeper.server.quorum.QuorumPeerMain";

/// A small machine that starts fast, and that writes to its disk without waiting for it.
const JVM: [&str; 6] = [
    "-Xmx128m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xshare:auto",
    "-Dzookeeper.forceSync=no",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
];

/// A tick is half a second, and the limits are in ticks; a session lasts two of them or more. The timeouts are in
/// milliseconds.
const CONFIG: &str = "\
tickTime=500
initLimit=20
syncLimit=6
cnxTimeout=1000
maxSessionTimeout=60000
maxClientCnxns=0
admin.enableServer=false
4lw.commands.whitelist=*
";

/// A busy or frozen server does not answer, and is asked again.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
const AT_ONCE: Duration = Duration::from_millis(100);

/// A ZooKeeper of version 3.8 or later, with the options a test needs.
#[derive(Clone, Debug, Default)]
pub struct ZooKeeper {
    config: Vec<String>,
    properties: Vec<String>,
    users: Vec<(String, String)>,
    identity: Option<Identity>,
    client_ca: Option<String>,
}

impl ZooKeeper {
    /// A ZooKeeper without TLS or users.
    ///
    /// Its `tickTime` is 500 ms, so that a session may be as short as 1 s, and it does not wait for its disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a line to its configuration, such as `maxSessionTimeout=4000`. The last line of a name is in force.
    #[must_use]
    pub fn config(mut self, line: impl Into<String>) -> Self {
        self.config.push(line.into());
        self
    }

    /// Sets a property of its Java machine, such as `jute.maxbuffer` or `znode.container.checkIntervalMs`.
    #[must_use]
    pub fn property(mut self, name: &str, value: &str) -> Self {
        self.properties.push(format!("-D{name}={value}"));
        self
    }

    /// Lets whoever adds the `digest` identity `super:super` do everything, whatever the ACLs say.
    #[must_use]
    pub fn superuser(self) -> Self {
        // The SHA-1 of "super:super", in base64.
        self.property("zookeeper.DigestAuthenticationProvider.superDigest", "super:gG7s8t3oDEtIqF6DM9LlI/R+9Ss=")
    }

    /// Takes SASL clients (DIGEST-MD5) with this name and password. May be called again for another. Clients without
    /// SASL are still taken, unless the line `sessionRequireClientSASLAuth=true` is [added](Self::config).
    #[must_use]
    pub fn sasl_user(mut self, name: &str, password: &str) -> Self {
        self.users.push((name.to_owned(), password.to_owned()));
        self
    }

    /// Serves clients over TLS, as this server. The members of an ensemble speak in the clear.
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

    fn zoo_cfg(&self, site: &Site) -> String {
        let mut lines = vec![format!("dataDir={}", site.data), format!("clientPortAddress={}", site.listen)];
        lines.push(format!("clientPort={}", self.plain(site).port()));
        lines.extend(self.tls_lines(site));
        if !self.users.is_empty() {
            lines.push("authProvider.sasl=org.apache.zookeeper.server.auth.SASLAuthenticationProvider".to_owned());
        }
        if site.members.len() > 1 {
            lines.extend(
                site.members.iter().enumerate().map(|(index, ports)| {
                    format!("server.{}=127.0.0.1:{}:{}", id(index), ports[PEERS], ports[ELECTION])
                }),
            );
        }
        lines.extend_from_slice(&self.config);
        format!("{CONFIG}{}\n", lines.join("\n"))
    }

    fn tls_lines(&self, site: &Site) -> Vec<String> {
        let mut lines = Vec::new();
        if self.identity.is_some() {
            lines.push(format!("secureClientPortAddress={}", site.listen));
            lines.push(format!("secureClientPort={}", site.ports()[CLIENTS]));
            lines.push("serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory".to_owned());
            lines.push(format!("ssl.keyStore.location={}/server.pem", site.files));
            lines.push(format!("ssl.clientAuth={}", if self.client_ca.is_some() { "need" } else { "none" }));
            // It would look for a client's address in the client's certificate.
            lines.push("ssl.hostnameVerification=false".to_owned());
        }
        if self.client_ca.is_some() {
            lines.push(format!("ssl.trustStore.location={}/ca.pem", site.files));
        }
        lines
    }

    /// What the Java machine is told of the users. Neither name nor password may need quoting.
    fn jaas(&self) -> String {
        let users: Vec<_> = self.users.iter().map(|(name, password)| format!("user_{name}=\"{password}\"")).collect();
        let module = "org.apache.zookeeper.server.auth.DigestLoginModule required";
        format!("Server {{\n{module}\n{};\n}};\n", users.join("\n"))
    }

    fn plain(&self, site: &Site) -> SocketAddr {
        let port = if self.identity.is_some() { PLAIN } else { CLIENTS };
        (Ipv4Addr::LOCALHOST, site.ports()[port]).into()
    }

    async fn mode(&self, site: &Site) -> Option<String> {
        let answer = ask(self.plain(site), "srvr").await.ok()?;
        answer.lines().find_map(|line| line.strip_prefix("Mode: ")).map(str::to_owned)
    }
}

#[async_trait]
impl Store for ZooKeeper {
    fn name(&self) -> &'static str {
        "zookeeper"
    }

    fn package(&self) -> &'static str {
        "libzookeeper-java default-jre-headless"
    }

    fn needs(&self) -> Vec<String> {
        CLASS_PATH.map(|jar| format!("{JARS}/{jar}")).to_vec()
    }

    fn ports(&self) -> usize {
        4
    }

    fn command(&self, site: &Site) -> Vec<String> {
        let mut command = vec!["java".to_owned()];
        command.extend(JVM.map(str::to_owned));
        if !self.users.is_empty() {
            command.push(format!("-Djava.security.auth.login.config={}/jaas.conf", site.files));
        }
        command.extend_from_slice(&self.properties);
        command.extend(["-cp".to_owned(), self.needs().join(":"), MAIN.to_owned(), format!("{}/zoo.cfg", site.files)]);
        command
    }

    fn files(&self, site: &Site) -> Vec<(String, String)> {
        let mut files = vec![("zoo.cfg".to_owned(), self.zoo_cfg(site))];
        if site.members.len() > 1 {
            files.push((format!("{}/myid", site.data), id(site.index).to_string()));
        }
        if !self.users.is_empty() {
            files.push(("jaas.conf".to_owned(), self.jaas()));
        }
        if let Some(identity) = &self.identity {
            files.push(("server.pem".to_owned(), format!("{}{}", identity.cert, identity.key)));
        }
        if let Some(ca) = &self.client_ca {
            files.push(("ca.pem".to_owned(), ca.clone()));
        }
        files
    }

    fn url(&self, ports: &[u16]) -> String {
        let (scheme, host) = if self.identity.is_some() { ("zks", "localhost") } else { ("zk", "127.0.0.1") };
        let hosts: Vec<_> = ports.iter().map(|port| format!("{host}:{port}")).collect();
        format!("{scheme}://{}", hosts.join(","))
    }

    /// A server has a mode once it serves: its port is open before that. The one for TLS is opened last.
    async fn ready(&self, site: &Site) -> bool {
        self.mode(site).await.is_some() && (self.identity.is_none() || listens(site.addr()).await)
    }

    async fn leads(&self, site: &Site) -> bool {
        matches!(self.mode(site).await.as_deref(), Some("leader" | "standalone"))
    }
}

/// A member's number, from 1.
fn id(index: usize) -> usize {
    index + 1
}

/// Whether somebody listens there, and waits for us to begin. Where nobody does, a container's engine takes connections
/// all the same, and ends them at once.
async fn listens(addr: SocketAddr) -> bool {
    let Ok(mut socket) = TcpStream::connect(addr).await else { return false };
    timeout(AT_ONCE, socket.read_u8()).await.is_err()
}

/// What a ZooKeeper says to one of its four-letter commands, such as `srvr` or `mntr`. Answers within a second.
///
/// # Errors
/// It does not answer.
pub async fn ask(addr: SocketAddr, command: &str) -> io::Result<String> {
    let exchange = async {
        let mut socket = TcpStream::connect(addr).await?;
        socket.write_all(command.as_bytes()).await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    timeout(ANSWER_WITHIN, exchange).await?
}
