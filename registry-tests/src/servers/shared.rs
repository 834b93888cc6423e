//! One server for all the cases that do not harm it.

use std::{
    ffi::OsString,
    process::{Command, ExitStatus},
};

use tokio::sync::OnceCell;

use super::{
    Cluster, Error, Etcd, Redis, Result, Server, ZooKeeper, variable,
    watchdog::{Watchdog, quoted},
};

/// The end of the variable by which `test-servers` tells the tests it runs about its servers: see [`shared_etcd`].
const SHARED: &str = "SHARED_URL";
/// How many servers an etcd cluster or an ensemble has.
const MEMBERS: usize = 3;

/// The connection string of the user's own server of this store, if `REGISTRY_TEST_<STORE>_URL` names one.
///
/// Cases that need no fault run against it; one that does needs a server of its own, and gets an error from this one.
pub fn own_url(store: &str) -> Option<String> {
    variable(store, "URL")
}

/// The etcd for cases that share one: each takes a prefix of its own, and none may harm it.
///
/// It is the user's own ([`own_url`]), or the one that `test-servers` has started for the whole test run, or else one
/// for this process.
///
/// # Errors
/// It cannot be started.
pub async fn shared_etcd() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("etcd", &STARTED).await
}

/// The etcd cluster for cases that share one, as [`shared_etcd`] is the etcd; for `test-servers` and in variables it is a
/// store of its own, `etcd_cluster`. Its members are in the [URL](Server::url).
///
/// # Errors
/// It cannot be started.
pub async fn shared_etcd_cluster() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("etcd_cluster", &STARTED).await
}

/// The Redis for cases that share one, as [`shared_etcd`] is the etcd.
///
/// # Errors
/// It cannot be started.
pub async fn shared_redis() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("redis", &STARTED).await
}

/// The Redis under Sentinels for cases that share one, as [`shared_etcd`] is the etcd; for `test-servers` and in
/// variables it is a store of its own, `redis_sentinel`. The Sentinels are in the [URL](Server::url).
///
/// # Errors
/// It cannot be started.
pub async fn shared_redis_sentinel() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("redis_sentinel", &STARTED).await
}

/// The Redis Cluster for cases that share one, as [`shared_etcd`] is the etcd; for `test-servers` and in variables it
/// is a store of its own, `redis_cluster`. Its nodes are in the [URL](Server::url).
///
/// # Errors
/// It cannot be started.
pub async fn shared_redis_cluster() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("redis_cluster", &STARTED).await
}

/// The ZooKeeper for cases that share one, as [`shared_etcd`] is the etcd.
///
/// # Errors
/// It cannot be started.
pub async fn shared_zookeeper() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("zookeeper", &STARTED).await
}

/// The ZooKeeper ensemble for cases that share one, as [`shared_etcd`] is the etcd; for `test-servers` and in variables
/// it is a store of its own, `zookeeper_ensemble`. Its members are in the [URL](Server::url).
///
/// # Errors
/// It cannot be started.
pub async fn shared_zookeeper_ensemble() -> Result<Server> {
    static STARTED: OnceCell<Cluster> = OnceCell::const_new();
    shared("zookeeper_ensemble", &STARTED).await
}

/// `started` is never dropped. Its watchdog ends it when the process ends.
async fn shared(store: &str, started: &OnceCell<Cluster>) -> Result<Server> {
    if let Some(url) = own_url(store) {
        return Server::borrowed(&url, "is the user's, not the suite's");
    }
    let url = match variable(store, SHARED) {
        Some(url) => url,
        None => started.get_or_try_init(|| start(store)).await?.url().to_owned(),
    };
    Server::borrowed(&url, "is shared by all cases")
}

/// What many cases share.
async fn start(store: &str) -> Result<Cluster> {
    match store {
        "etcd" => Cluster::start(Etcd::new(), 1).await,
        "etcd_cluster" => Cluster::start(Etcd::new(), MEMBERS).await,
        "redis" => redis(Redis::new()).await,
        "redis_sentinel" => redis(Redis::sentinel()).await,
        "redis_cluster" => redis(Redis::cluster()).await,
        "zookeeper" => Cluster::start(ZooKeeper::new(), 1).await,
        "zookeeper_ensemble" => Cluster::start(ZooKeeper::new(), MEMBERS).await,
        other => Err(Error::new(format!(
            "\"{other}\" cannot be started; known: etcd, etcd_cluster, redis, redis_sentinel, redis_cluster, \
             zookeeper, zookeeper_ensemble"
        ))),
    }
}

async fn redis(redis: Redis) -> Result<Cluster> {
    let size = redis.size();
    Cluster::start(redis, size).await
}

/// Says who it is before it becomes the command: that may say something, and this process be killed for it, in no time.
const WATCHED: &str = r#"echo $$ > "$0" && exec "$@""#;

/// Starts a server of each of these stores, runs a command that finds them by the `shared_…` functions, and stops them.
///
/// # Errors
/// A store is unknown, a server does not start, or there is no shell. What the command makes of itself is in its status,
/// which is 127 if there is no such command.
pub async fn run_with_shared(stores: &[String], command: &[OsString]) -> Result<ExitStatus> {
    if command.is_empty() {
        return Err(Error::new("no command to run"));
    }
    let folder = tempfile::tempdir().map_err(Error::during("cannot create a folder"))?;
    let known = folder.path().join("pid");
    let mut watched = Command::new("sh");
    watched.args(["-c", WATCHED]).arg(&known).args(command);
    let mut servers = Vec::new();
    for store in stores {
        if own_url(store).is_some() {
            continue;
        }
        let server = start(store).await?;
        watched.env(format!("REGISTRY_TEST_{}_{SHARED}", store.to_uppercase()), server.url());
        servers.push(server);
    }
    // If this process is killed the servers go, and the command must not run on without them.
    let known = quoted(&known.display().to_string());
    let watchdog = Watchdog::new(&format!("kill $(cat {known}); rm -r $(dirname {known})"))?;
    let mut child = watched.spawn().map_err(Error::during("cannot start sh"))?;
    let status = tokio::task::spawn_blocking(move || child.wait()).await;
    drop((servers, watchdog, folder));
    status.map_err(Error::during("cannot wait"))?.map_err(Error::during("cannot wait"))
}
