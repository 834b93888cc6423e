//! Connecting to ZooKeeper, for a new session or one that we know.
//!
//! A client of the crate cannot be told to stop: it goes on to reconnect, and to take the session away from whoever
//! else has it, as long as the task lives that it spawns. So that task is spawned for it, and ended with it.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use registry_core::{Result, SessionEvent};
use registry_tls::{Handshake, Tls};
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret, SecretString};
use spawns_core::{Spawn, Task, enter};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Handle,
    task::JoinSet,
    time::{Instant, timeout},
};
use zookeeper_client::{Client, Connector, Error as ClientError, SaslOptions, SessionInfo, SessionState, TlsOptions};

use crate::{
    config::{ZooKeeperAuth, ZooKeeperConfig, tls_options},
    error::{Failure, NAME},
};

/// A server is taken for dead that is silent for so long, by the client, which asks more often, or by us. Its sessions
/// outlive that. Servers that are slower, such as one that has just been started and talks TLS, get more, up to the
/// configured time for a connection, or a third of the ttl.
const SILENCE: Duration = Duration::from_secs(1);
/// What an attempt may take beyond its servers' time.
const SPARE: Duration = Duration::from_millis(200);
/// How long a server may take to say its version.
const VERSION: Duration = Duration::from_secs(1);

/// How to reach the servers.
pub(crate) struct Dialer {
    addresses: Vec<String>,
    tls: Option<TlsOptions>,
    /// Finds out why TLS does not come about, where it is talked.
    handshakes: Option<Handshakes>,
    auth: ZooKeeperAuth,
    user: Option<(String, SecretString)>,
    ttl: Duration,
    /// Where clients live.
    runtime: Handle,
    /// How long a server may be silent now, and at most. Locked for a look or an edit, never across an `.await`.
    silence: Mutex<Duration>,
    longest_silence: Duration,
}

/// A connected client, and what it does of itself.
pub(crate) struct Line {
    pub(crate) client: Client,
    tasks: Tasks,
}

/// A handshake as the client's, and the servers to try it with: each with the name that it must have.
type Handshakes = (Handshake, Vec<(String, ServerName<'static>)>);

/// What became of a session.
pub(crate) enum Verdict {
    /// It lives, and this is a client for it.
    Kept(Line),
    /// The server says so.
    Gone,
    /// Nobody could tell, for this reason.
    Unknown(Failure),
}

/// What a client spawns. Ends when it is told to or dropped, without waiting.
struct Tasks {
    runtime: Handle,
    /// Locked for a call, never across an `.await`.
    running: Mutex<JoinSet<()>>,
}

impl Dialer {
    /// Clients live on `runtime`.
    pub(crate) fn new(config: &ZooKeeperConfig, runtime: &Handle) -> Result<Self> {
        let addresses = config.addresses()?;
        let tls = config.tls.as_ref();
        Ok(Self {
            tls: tls.map(tls_options).transpose().map_err(|error| error.with_backend(NAME))?,
            handshakes: tls.map(|tls| handshakes(tls, &addresses)).transpose()?,
            addresses,
            auth: config.auth,
            user: config.user.clone().zip(config.password.clone()),
            ttl: config.options.ttl,
            runtime: runtime.clone(),
            silence: Mutex::new(config.options.connect_timeout.min(SILENCE)),
            longest_silence: config.options.connect_timeout.min((config.options.ttl / 3).max(SILENCE)),
        })
    }

    /// A client for this session, or a new one. Dropped, a detached one leaves its session to live on.
    pub(crate) async fn open(&self, resume: Option<SessionInfo>, detached: bool) -> Result<Line, ClientError> {
        let (silence, began) = (*self.silence(), Instant::now());
        // The most that the crate takes. It pings after three eighths of that, if nothing else was asked.
        let client_patience = if self.is_alone() { self.ttl * 3 / 5 } else { silence };
        let mut connector = self.connector().with_connection_timeout(client_patience);
        if detached {
            connector = connector.with_detached();
        }
        if let Some(session) = resume {
            connector = connector.with_session(session);
        }
        let (servers, secure) = (self.addresses.join(","), self.tls.is_some());
        let patience = silence * u32::try_from(self.addresses.len()).unwrap_or(u32::MAX) + SPARE;
        let connect =
            async { if secure { connector.secure_connect(&servers).await } else { connector.connect(&servers).await } };
        let tasks = Tasks { runtime: self.runtime.clone(), running: Mutex::default() };
        let connected = timeout(patience, tasks.spawning(connect)).await.unwrap_or(Err(ClientError::Timeout));
        self.learn(silence, connected.is_ok(), began.elapsed());
        Ok(Line { client: connected?, tasks })
    }

    /// Whether there is no other server to go to. Such a one is not pinged by the client but asked by us, as seldom as its
    /// sessions allow.
    pub(crate) fn is_alone(&self) -> bool {
        self.addresses.len() == 1
    }

    /// Is more patient after a server was silent for as long as it might, and as before once one is quick.
    fn learn(&self, silence: Duration, connected: bool, took: Duration) {
        let shortest = self.longest_silence.min(SILENCE);
        if !connected && took >= silence {
            *self.silence() = (2 * silence).min(self.longest_silence);
        } else if connected && took < shortest / 2 {
            *self.silence() = shortest;
        }
    }

    fn silence(&self) -> MutexGuard<'_, Duration> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the servers whether a session lives.
    ///
    /// The question costs no transaction, and a server that has not caught up yet takes it, too: it does not say what
    /// was seen last. On a session with a live connection it would break that one.
    pub(crate) async fn ask(&self, session: SessionInfo) -> Verdict {
        let began = Instant::now();
        match self.open(Some(session), true).await {
            Ok(line) => Verdict::Kept(line),
            Err(ClientError::SessionExpired) => Verdict::Gone,
            Err(other) => Verdict::Unknown(self.reason(other, began.elapsed()).await),
        }
    }

    /// Whether a server still answers on a line. One that a client made again can be silent from the start: where the session
    /// ends at that moment, requests are dropped (3.8.0, `ZooKeeperServer.submitRequestNow`: `MissingSessionException`).
    pub(crate) async fn is_answered(&self, line: &Line) -> bool {
        let silence = *self.silence();
        let answer = timeout(silence, line.client.check_stat("/")).await;
        if answer.is_err() {
            self.learn(silence, false, silence);
        }
        answer.is_ok() && line.is_connected()
    }

    /// Why there is no connection, when an attempt that `took` so long ended like this.
    pub(crate) async fn reason(&self, error: ClientError, took: Duration) -> Failure {
        let silence = self.longest_silence.min(SILENCE);
        if error == ClientError::AuthFailed {
            return Failure::Refused("the server refuses the user or the password".into());
        }
        // Where servers are silent, there is nothing to be told.
        let answered = self.handshakes.as_ref().filter(|_| took < silence);
        let refusal = match answered {
            Some(handshakes) => refusal(handshakes, silence).await,
            None => None,
        };
        refusal.map_or_else(|| Failure::Disconnected(error.to_string().into()), Failure::Refused)
    }

    /// What the first server that answers says of its version.
    pub(crate) async fn server_version(&self) -> Option<String> {
        if self.tls.is_some() {
            return None;
        }
        for address in &self.addresses {
            let answer = async {
                let mut socket = TcpStream::connect(address).await?;
                socket.write_all(b"srvr").await?;
                let mut answer = Vec::new();
                socket.take(4096).read_to_end(&mut answer).await?;
                std::io::Result::Ok(answer)
            };
            if let Ok(Ok(answer)) = timeout(VERSION, answer).await
                && let Some(version) = version(&String::from_utf8_lossy(&answer))
            {
                return Some(version);
            }
        }
        None
    }

    fn connector(&self) -> Connector {
        let mut connector = Client::connector().with_fail_eagerly().with_session_timeout(self.ttl);
        if let Some(tls) = &self.tls {
            connector = connector.with_tls(tls.clone());
        }
        let Some((user, password)) = &self.user else { return connector };
        let password = password.expose_secret();
        match self.auth {
            ZooKeeperAuth::Digest => connector.with_auth("digest", format!("{user}:{password}").as_bytes()),
            ZooKeeperAuth::Sasl => connector.with_sasl(SaslOptions::digest_md5(user.clone(), password.to_owned())),
        }
    }
}

impl Line {
    /// Ends the session, and waits until the server has done so. For a line that is not detached.
    pub(crate) async fn hang_up(self) {
        let Self { client, tasks } = self;
        let mut states = client.state_watcher();
        drop(client);
        while !states.changed().await.is_terminated() {}
        drop(tasks);
    }

    /// Ends the client, whoever holds it still, without ending the session.
    pub(crate) fn end(&self) {
        self.tasks.end();
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.client.state() == SessionState::SyncConnected
    }

    pub(crate) fn connected(&self) -> SessionEvent {
        SessionEvent::Connected { ttl: self.client.session_timeout() }
    }
}

impl Tasks {
    /// The outcome of `work`, whose spawned tasks are these.
    async fn spawning<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let polled = poll_fn(|context| {
            let _scope = enter(self);
            work.as_mut().poll(context)
        });
        polled.await
    }

    fn end(&self) {
        self.running().abort_all();
    }

    fn running(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spawn for Tasks {
    fn spawn(&self, task: Task) {
        self.running().spawn_on(Box::into_pin(task.future), &self.runtime);
    }
}

/// With servers at `addresses`, which are `host:port`.
fn handshakes(tls: &Tls, addresses: &[String]) -> Result<Handshakes> {
    let server = |address: &String| {
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
        Ok((address.clone(), tls.expected_name(host)?))
    };
    let servers: Result<_> = addresses.iter().map(server).collect();
    let config = tls.client_config().map_err(|error| error.with_backend(NAME))?;
    Ok((Handshake::new(Arc::new(config)), servers.map_err(|error| error.with_backend(NAME))?))
}

/// Why one of the two ends refuses the other's certificate, with every server; `None` if that is not what is wrong.
async fn refusal((handshake, servers): &Handshakes, limit: Duration) -> Option<Arc<str>> {
    let refusals = servers.iter().map(|(address, name)| handshake.refusal(address, name, limit));
    join_all(refusals).await.into_iter().collect::<Option<Vec<_>>>()?.pop()
}

/// The version in what a server answers to `srvr`.
pub(crate) fn version(answer: &str) -> Option<String> {
    let version = answer.lines().find_map(|line| line.strip_prefix("Zookeeper version: "))?;
    version.split(['-', ',']).next().filter(|version| !version.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_its_version() {
        let answer = "Zookeeper version: 3.4.13-2d71af4dbe22557fda74f9a9b4309b15a7487f03, built on 06/29/2018\nMode: x";
        assert_eq!(version(answer).as_deref(), Some("3.4.13"));
        assert_eq!(version("This ZooKeeper instance is not currently serving requests\n"), None);
    }
}
