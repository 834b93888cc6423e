//! One server for all the cases that do not harm it.

use std::{
    ffi::OsString,
    process::{Command, ExitStatus},
};

use tokio::sync::OnceCell;

use super::{Error, Etcd, Result, Server, variable, watchdog::Watchdog};

/// The end of the variable by which `test-servers` tells the tests it runs about its servers: see [`shared_etcd`].
const SHARED: &str = "SHARED_URL";

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
    // Never dropped. Its watchdog ends it when the process ends.
    static STARTED: OnceCell<Server> = OnceCell::const_new();
    if let Some(url) = own_url("etcd") {
        return Server::borrowed(&url, "is the user's, not the suite's");
    }
    let url = match variable("etcd", SHARED) {
        Some(url) => url,
        None => STARTED.get_or_try_init(|| Server::start(Etcd::new())).await?.url().to_owned(),
    };
    Server::borrowed(&url, "is shared by all cases")
}

/// Starts a server of each of these stores, runs a command that finds them by the `shared_…` functions, and stops them.
///
/// # Errors
/// A store is unknown, a server does not start, or the command cannot be run. What the command makes of itself is in
/// its status.
pub async fn run_with_shared(stores: &[String], command: &[OsString]) -> Result<ExitStatus> {
    let [program, args @ ..] = command else { return Err(Error::new("no command to run")) };
    let mut command = Command::new(program);
    command.args(args);
    let mut servers = Vec::new();
    for store in stores {
        if own_url(store).is_some() {
            continue;
        }
        let server = match store.as_str() {
            "etcd" => Server::start(Etcd::new()).await?,
            other => return Err(Error::new(format!("\"{other}\" cannot be started yet; known: etcd"))),
        };
        command.env(format!("REGISTRY_TEST_{}_{SHARED}", store.to_uppercase()), server.url());
        servers.push(server);
    }
    let mut child = command.spawn().map_err(Error::during(program.display()))?;
    // If this process is killed the servers go, and the command must not run on without them.
    let _watchdog = Watchdog::new(&format!("kill {}", child.id()))?;
    let status = tokio::task::spawn_blocking(move || child.wait()).await;
    drop(servers);
    status.map_err(Error::during("cannot wait"))?.map_err(Error::during("cannot wait"))
}
