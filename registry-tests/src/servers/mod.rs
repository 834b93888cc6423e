//! Real servers, started by the suite itself and gone with it.
//!
//! A [`Server`] is one server of a [`Store`] that can be stopped, killed, frozen, wiped and started again, at an address
//! that stays the same; a [`Cluster`] is several that know each other. A [`Launcher`] decides what they run in:
//!
//! - **containers**, where a Docker engine answers, from an image that is built on first use (`images/build.sh`);
//! - **processes** of this machine, the programs being found in `PATH`.
//!
//! | environment variable | meaning |
//! | --- | --- |
//! | `REGISTRY_TEST_SERVERS` | `containers` or `processes`: forces the launcher; what is missing then is an error |
//! | `REGISTRY_TEST_<STORE>_IMAGE` | image to use in place of the one built here |
//! | `REGISTRY_TEST_<STORE>_URL` | a server of your own, for the cases that need no fault |
//! | `REGISTRY_TEST_<STORE>_SHARED_URL` | set by the `test-servers` program for the tests it runs |
//!
//! **Nothing outlives its test.** A server ends when its [`Server`] is dropped, also by a panic. If the whole test
//! process is killed, or ends without running destructors, a watchdog ends its servers; and should that be killed too,
//! the next test process that starts a container first removes those whose process is gone.

mod certs;
mod cluster;
mod container;
mod etcd;
mod http;
mod image;
mod owner;
mod ports;
mod process;
mod redis;
pub(crate) mod resp;
mod server;
mod shared;
mod watchdog;
pub(crate) mod zookeeper;

use std::{
    env,
    fmt::{self, Debug, Display},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;

pub use self::{
    certs::{Certs, Identity},
    cluster::Cluster,
    container::sweep,
    etcd::Etcd,
    process::signal,
    redis::Redis,
    server::Server,
    shared::{
        own_url, run_with_shared, shared_etcd, shared_etcd_cluster, shared_redis, shared_redis_cluster,
        shared_redis_sentinel, shared_zookeeper, shared_zookeeper_ensemble,
    },
    watchdog::Watchdog,
    zookeeper::{ZooKeeper, ask as ask_zookeeper},
};

/// How long a server may take until it answers. They take a second; a machine under load gets more.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long a server may take to end when it is asked to.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// Why a server could not be started or made to fail, in words for whoever runs the tests.
#[derive(Clone, Debug)]
pub struct Error(String);

/// What the functions of this module return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// What was being done, and what came of it.
    fn during<E: Display>(doing: impl Display) -> impl FnOnce(E) -> Self {
        move |error| Self(format!("{doing}: {error}"))
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// What a launcher has to know about a store: its command line, its files, and how to tell that it is ready.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// The name in `images/NAME`, `REGISTRY_TEST_NAME_URL` and messages.
    fn name(&self) -> &'static str;

    /// The Debian package to install when the program is missing; several with spaces between.
    fn package(&self) -> &'static str;

    /// Files that the program needs of its packages, by their absolute paths. None by default.
    fn needs(&self) -> Vec<String> {
        Vec::new()
    }

    /// How many ports one server listens on. The first is the clients'.
    fn ports(&self) -> usize;

    /// The program and its arguments. Data goes to `site.data`, and clients are listened to on `site.listen`.
    fn command(&self, site: &Site) -> Vec<String>;

    /// Files that are there before the server starts, which may change them: name in `site.files`, or path in
    /// `site.data`, and content. None by default.
    fn files(&self, _site: &Site) -> Vec<(String, String)> {
        Vec::new()
    }

    /// The connection string for servers whose clients' ports are these.
    fn url(&self, ports: &[u16]) -> String;

    /// Whether the server serves clients now. Answers within a second, also when the server does not.
    async fn ready(&self, site: &Site) -> bool;

    /// Whether the server leads its cluster. Answers within a second, also when the server does not.
    async fn leads(&self, site: &Site) -> bool;

    /// How many of the members of a cluster, from the first one, serve before the others are started. None by default.
    fn before_others(&self) -> usize {
        0
    }

    /// What has to be arranged with the others for a member that has lost its data and is down; gives arguments to add to
    /// its command. Nothing by default, for servers that fetch what they miss.
    ///
    /// # Errors
    /// The others refuse for a minute.
    async fn before_return(&self, _site: &Site) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// What has to be arranged once such a member is up. Nothing by default.
    ///
    /// # Errors
    /// The others refuse for a minute.
    async fn after_return(&self, _site: &Site) -> Result<()> {
        Ok(())
    }

    /// Makes a cluster of the members, which have been started, if they are none yet; asked for the first of them.
    /// Nothing by default, for servers that are told of each other by what they are started with.
    ///
    /// # Errors
    /// They refuse for a minute.
    async fn form(&self, _site: &Site) -> Result<()> {
        Ok(())
    }
}

/// Where one server lives: decided by its launcher, read by its [`Store`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Site {
    /// The address on which to listen for clients.
    pub listen: Ipv4Addr,
    /// The folder for data. It exists and is empty at the first start.
    pub data: String,
    /// The folder of [`Store::files`].
    pub files: String,
    /// The ports of every server of the cluster; of one if there is no cluster. All are reached on `127.0.0.1`.
    pub members: Arc<[Vec<u16>]>,
    /// Which of the members this server is.
    pub index: usize,
}

impl Site {
    /// This server's ports.
    pub fn ports(&self) -> &[u16] {
        &self.members[self.index]
    }

    /// Where clients reach this server.
    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports()[0]).into()
    }
}

/// What servers run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Containers of a Docker engine.
    Containers,
    /// Child processes.
    Processes,
}

impl Launcher {
    /// The launcher for this store's servers: what `REGISTRY_TEST_SERVERS` says, else containers if an engine answers,
    /// else processes.
    ///
    /// # Errors
    /// What is needed is missing, or the variable says something else. The error names what to install.
    pub async fn choose(store: &dyn Store) -> Result<Self> {
        match env::var("REGISTRY_TEST_SERVERS").as_deref() {
            Ok("containers") => Self::Containers.available(store).await,
            Ok("processes") => Self::Processes.available(store).await,
            Ok(other) if !other.is_empty() => {
                Err(Error::new(format!("REGISTRY_TEST_SERVERS is \"{other}\": it must be containers or processes")))
            }
            _ => match Self::Containers.available(store).await {
                Ok(containers) => Ok(containers),
                Err(engine) => {
                    let processes = Self::Processes.available(store).await;
                    processes.map_err(|process| Error::new(format!("{engine}; and {process}")))
                }
            },
        }
    }

    async fn available(self, store: &dyn Store) -> Result<Self> {
        match self {
            Self::Containers => container::engine_answers().await?,
            Self::Processes => drop(process::program(store)?),
        }
        Ok(self)
    }
}

/// One server as its launcher handles it. The caller knows whether it is up, frozen or down.
#[async_trait]
trait Machine: Debug + Send + Sync {
    /// Starts the server, for the first time or again with its data. It is down.
    async fn up(&self) -> Result<()>;
    /// Asks the server to end, and waits for it.
    async fn stop(&self) -> Result<()>;
    /// Ends the server without asking. It may be frozen.
    async fn kill(&self) -> Result<()>;
    async fn freeze(&self) -> Result<()>;
    async fn thaw(&self) -> Result<()>;
    /// Deletes the data of the server, which is down. From now on it is started with these arguments more.
    async fn erase(&self, more: Vec<String>) -> Result<()>;
    /// Whether the server has ended by itself.
    async fn ended(&self) -> bool;
    /// The number of the server's process on this machine.
    async fn pid(&self) -> Result<u32>;
    /// The last lines that the server has written.
    async fn log(&self) -> String;
}

/// The value of an environment variable that is set and not empty.
fn variable(store: &str, suffix: &str) -> Option<String> {
    env::var(format!("REGISTRY_TEST_{}_{suffix}", store.to_uppercase())).ok().filter(|value| !value.is_empty())
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}
