//! One connection to one server: opened when somebody needs it, replaced when it is dead or silent.
//!
//! The client's own reconnecting connection is not used: a refusal while it reconnects stops it for good
//! (<https://github.com/redis-rs/redis-rs/issues/1556>), and it takes a silent socket for a living one. Here an attempt is
//! one attempt, everybody who needs the connection waits for the same one, and whoever finds it silent closes it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Cmd, Pipeline, ProtocolVersion, PushInfo, RedisConnectionInfo, Value,
    aio::MultiplexedConnection,
};
use registry_tls::Tls;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config::RedisConfig,
    error::{Class, Failure, NAME},
};

/// After a failed attempt, everybody gets its outcome for so long.
const PAUSE: Duration = Duration::from_millis(100);
/// The oldest server that has all that is needed: `ZMSCORE`, exclusive ranges of streams.
const OLDEST: (u32, u32) = (6, 2);

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Address {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
}

impl Address {
    /// What a server says of another one; one that does not know the host means its own.
    pub(crate) fn said_by(&self, text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Some(Self { host: self.or_same(host), port: port.parse().ok()? })
    }

    pub(crate) fn or_same(&self, host: &str) -> Arc<str> {
        if host.is_empty() || host == "?" { self.host.clone() } else { host.into() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// How a connection is made, to whatever server.
pub(crate) struct Wires {
    info: RedisConnectionInfo,
    tls: Option<(TlsConnector, Tls)>,
    patience: Duration,
    /// What a server must say that it is: `standalone`, `cluster` or `sentinel`.
    mode: &'static str,
}

impl Wires {
    pub(crate) fn to_servers(config: &RedisConfig, mode: &'static str) -> registry_core::Result<Self> {
        let wires = Self::new(config, mode, config.user.as_deref(), config.password.as_ref())?;
        Ok(Self { info: wires.info.set_db(config.database.into()), ..wires })
    }

    pub(crate) fn to_sentinels(config: &RedisConfig) -> registry_core::Result<Self> {
        Self::new(config, "sentinel", config.sentinel_user.as_deref(), config.sentinel_password.as_ref())
    }

    fn new(
        config: &RedisConfig,
        mode: &'static str,
        user: Option<&str>,
        password: Option<&SecretString>,
    ) -> registry_core::Result<Self> {
        let mut info = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3).set_skip_set_lib_name();
        if let Some(user) = user {
            info = info.set_username(user);
        }
        if let Some(password) = password {
            info = info.set_password(password.expose_secret());
        }
        let connector = |tls: &Tls| Ok((TlsConnector::from(Arc::new(tls.client_config()?)), tls.clone()));
        let tls = config.tls.as_ref().map(connector).transpose();
        let tls = tls.map_err(|error: registry_core::Error| error.with_backend(NAME))?;
        Ok(Self { info, tls, patience: config.options.connect_timeout, mode })
    }

    async fn connect(&self, address: &Address, push: Option<Push>, trouble: &Arc<Notify>) -> Result<Line, Failure> {
        let socket = TcpStream::connect((&*address.host, address.port)).await.map_err(io)?;
        socket.set_nodelay(true).map_err(io)?;
        let line = match &self.tls {
            None => self.open(socket, push, trouble).await?,
            Some((connector, tls)) => {
                let name = tls.expected_name(&address.host);
                let name = name.map_err(|error| Failure::new(Class::Certificate, error.to_string()))?;
                let socket = connector.connect(name, socket).await.map_err(io)?;
                self.open(socket, push, trouble).await?
            }
        };
        self.check(address, &line.server)?;
        Ok(line)
    }

    async fn open<S>(&self, socket: S, push: Option<Push>, trouble: &Arc<Notify>) -> Result<Line, Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let closed = CancellationToken::new();
        // Deadlines are ours: the client's would leave the connection as it is.
        let mut config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        if let Some(push) = push {
            let closing = closed.clone();
            config = config.set_push_sender(move |message| {
                if !push(message) {
                    closing.cancel();
                }
                Ok::<_, std::convert::Infallible>(())
            });
        }
        let (connection, driver) = MultiplexedConnection::new_with_config(&self.info, socket, config).await?;
        let guard = Arc::new(closed.clone().drop_guard());
        let (ended, trouble) = (closed.clone(), trouble.clone());
        tokio::spawn(async move {
            ended.run_until_cancelled(driver).await;
            ended.cancel();
            trouble.notify_one();
        });
        let mut line = Line {
            connection,
            id: rand::random(),
            server: Arc::default(),
            heard: Arc::new(Mutex::new(Instant::now())),
            closed,
            _guard: guard,
        };
        line.server = Arc::new(line.hello().await?);
        Ok(line)
    }

    /// Whether this is a server that we can work with.
    pub(crate) fn check(&self, address: &Address, server: &Server) -> Result<(), Failure> {
        let mut numbers = server.version.split('.').map(|part| part.parse().unwrap_or(0));
        let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if found < OLDEST {
            let text = format!("{address} is Redis {}: 6.2 or later is needed", server.version);
            return Err(Failure::new(Class::Unfit, text));
        }
        if server.mode == self.mode {
            return Ok(());
        }
        let scheme = match server.mode.as_str() {
            "cluster" => "redis+cluster",
            "sentinel" => "redis+sentinel",
            _ => "redis",
        };
        let text = format!("{address} says that it is {}, not {}: {scheme}:// is for that", server.mode, self.mode);
        Err(Failure::new(Class::Unfit, text))
    }
}

fn io(error: std::io::Error) -> Failure {
    redis::RedisError::from(error).into()
}

/// What happens with messages; `false` closes the connection.
pub(crate) type Push = Arc<dyn Fn(PushInfo) -> bool + Send + Sync>;

/// What a server says of itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Server {
    version: String,
    mode: String,
    pub(crate) is_primary: bool,
}

impl Server {
    /// What it answers to `HELLO`.
    pub(crate) fn parse(answer: Value) -> Option<Self> {
        let fields: std::collections::HashMap<String, Value> = redis::from_redis_value(answer).ok()?;
        let text = |name: &str| match fields.get(name) {
            Some(Value::BulkString(text)) => String::from_utf8_lossy(text).into_owned(),
            Some(Value::SimpleString(text)) => text.clone(),
            _ => String::new(),
        };
        Some(Self { version: text("version"), mode: text("mode"), is_primary: text("role") == "master" })
    }

    /// Whether it has channels that stay on the node of their slot.
    pub(crate) fn has_sharded_channels(&self) -> bool {
        self.mode == "cluster"
            && self.version.split('.').next().and_then(|n| n.parse().ok()).is_some_and(|n: u32| n >= 7)
    }
}

/// The way to one server.
pub(crate) struct Link {
    pub(crate) address: Address,
    wires: Arc<Wires>,
    push: Option<Push>,
    trouble: Arc<Notify>,
    /// Short, never held across an `.await`.
    current: Mutex<Option<Line>>,
    /// One attempt at a time, and how the last one failed.
    opening: tokio::sync::Mutex<Option<(Instant, Failure)>>,
    /// The link is given up: nothing is opened any more.
    over: AtomicBool,
}

/// A connection that was open when it was given out.
#[derive(Clone)]
pub(crate) struct Line {
    connection: MultiplexedConnection,
    /// Tells it from others.
    pub(crate) id: u64,
    pub(crate) server: Arc<Server>,
    heard: Arc<Mutex<Instant>>,
    pub(crate) closed: CancellationToken,
    /// Closes it with its last user.
    _guard: Arc<DropGuard>,
}

impl Link {
    pub(crate) fn new(address: Address, wires: Arc<Wires>, push: Option<Push>, trouble: Arc<Notify>) -> Self {
        Self {
            address,
            wires,
            push,
            trouble,
            current: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// The connection, if it is open.
    pub(crate) fn current(&self) -> Option<Line> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone().filter(|line| !line.closed.is_cancelled())
    }

    /// The connection, opened if it is not.
    pub(crate) async fn line(&self) -> Result<Line, Failure> {
        if let Some(line) = self.current() {
            return Ok(line);
        }
        let mut failed = self.opening.lock().await;
        if let Some(line) = self.current() {
            return Ok(line);
        }
        if self.over.load(Ordering::Relaxed) {
            return Err(Failure::new(Class::Dropped, format!("{} serves no more", self.address)));
        }
        match &*failed {
            Some((at, failure)) if at.elapsed() < PAUSE => return Err(failure.clone()),
            _ => {}
        }
        let patience = self.wires.patience;
        // Boxed, for it is large and rare, and else every request would have room for it.
        let connecting = Box::pin(self.wires.connect(&self.address, self.push.clone(), &self.trouble));
        let attempt = timeout(patience, connecting).await;
        let late = || Failure::new(Class::Dropped, format!("{} did not answer within {patience:?}", self.address));
        match attempt.unwrap_or_else(|_| Err(late())) {
            Ok(line) => {
                *failed = None;
                *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.clone());
                Ok(line)
            }
            Err(failure) => {
                *failed = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }

    /// Gives the connection up, and opens none any more.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(line) = self.current.lock().unwrap_or_else(PoisonError::into_inner).take() {
            line.closed.cancel();
        }
    }

    /// Gives the connection up; whoever needs one next opens another.
    pub(crate) fn hang_up(&self) {
        if let Some(line) = self.current() {
            line.closed.cancel();
        }
    }

    /// Finds out whether the other end still answers, unless it has lately; a silent connection is closed.
    pub(crate) async fn probe(&self, lately: Duration, patience: Duration) -> Result<Line, Failure> {
        let line = self.line().await?;
        if line.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < lately {
            return Ok(line);
        }
        match timeout(patience, line.hello()).await {
            Ok(Ok(server)) => {
                let line = Line { server: Arc::new(server), ..line };
                // It may have become a replica, or a primary.
                let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(current) = current.as_mut().filter(|current| current.id == line.id) {
                    current.server = line.server.clone();
                }
                drop(current);
                Ok(line)
            }
            Ok(Err(failure)) if failure.class == Class::NotNow => Err(failure),
            Ok(Err(failure)) => {
                line.closed.cancel();
                Err(failure)
            }
            Err(_) => {
                line.closed.cancel();
                Err(Failure::late(patience))
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end();
    }
}

impl Line {
    /// Sends a command and waits for its answer, for as long as the caller does.
    pub(crate) async fn send(&self, cmd: &Cmd, asking: bool) -> Result<Value, Failure> {
        let mut connection = self.connection.clone();
        let value = if asking {
            let mut pipeline = Pipeline::new();
            pipeline.cmd("ASKING").add_command(cmd.clone());
            let mut values = connection.send_packed_commands(&pipeline, 1, 1).await?;
            values.pop().unwrap_or(Value::Nil)
        } else {
            connection.send_packed_command(cmd).await?
        };
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(value.extract_error()?)
    }

    /// Asks the server what it is. Every user may.
    async fn hello(&self) -> Result<Server, Failure> {
        let mut cmd = Cmd::new();
        cmd.arg("HELLO").arg(3);
        Server::parse(self.send(&cmd, false).await?).ok_or_else(|| Failure::odd("what the server says of itself"))
    }
}
