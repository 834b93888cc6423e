//! One server, and all that can happen to it.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};

use super::{
    Error, Launcher, Machine, READY_WITHIN, Result, Site, Store,
    container::{Container, Pod},
    ports::Ports,
    process::Process,
};

/// One running server of a store, which ends when this is dropped.
///
/// Its address stays the same whatever happens to it. A server that is not the suite's own, or that is shared by
/// several tests, answers every fault with an error.
#[derive(Debug)]
pub struct Server {
    url: String,
    addr: SocketAddr,
    own: std::result::Result<Own, &'static str>,
}

/// What we have of a server that we may harm.
#[derive(Debug)]
struct Own {
    store: Arc<dyn Store>,
    site: Site,
    machine: Box<dyn Machine>,
    /// Locked for the length of a change, so that changes follow one another.
    state: Mutex<State>,
    _ports: Ports,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Frozen,
    Down,
}

impl Server {
    /// Starts a server in what [`Launcher::choose`] says, and waits until it serves.
    ///
    /// # Errors
    /// What it needs is missing, or it did not come up: the error holds its last words.
    pub async fn start(store: impl Store) -> Result<Self> {
        let launcher = Launcher::choose(&store).await?;
        Self::start_in(launcher, store).await
    }

    /// Starts a server in what the caller says, and waits until it serves.
    ///
    /// # Errors
    /// What it needs is missing, or it did not come up: the error holds its last words.
    pub async fn start_in(launcher: Launcher, store: impl Store) -> Result<Self> {
        launcher.available(&store).await?;
        let ports = Ports::reserve(store.ports())?;
        let members = Arc::new([ports.numbers()]);
        let server = Self::member(launcher, Arc::new(store), members, 0, ports, None).await?;
        server.restart().await?;
        Ok(server)
    }

    /// A server that is down: the only one, or one of a cluster.
    pub(super) async fn member(
        launcher: Launcher,
        store: Arc<dyn Store>,
        members: Arc<[Vec<u16>]>,
        index: usize,
        ports: Ports,
        pod: Option<&Pod>,
    ) -> Result<Self> {
        let (machine, site): (Box<dyn Machine>, _) = match launcher {
            Launcher::Containers => {
                let (container, site) = Container::new(&*store, members, index, pod).await?;
                (Box::new(container), site)
            }
            Launcher::Processes => {
                let (process, site) = Process::new(&*store, members, index)?;
                (Box::new(process), site)
            }
        };
        let (url, addr) = (store.url(&site.ports()[..1]), site.addr());
        let own = Own { store, site, machine, state: Mutex::new(State::Down), _ports: ports };
        Ok(Self { url, addr, own: Ok(own) })
    }

    /// A server that somebody else has started; `why_not` says why faults are refused.
    pub(super) fn borrowed(url: &str, why_not: &'static str) -> Result<Self> {
        let authority = url.split_once("://").map(|(_, rest)| rest.split(['/', '?']).next().unwrap_or_default());
        let hosts = authority.map(|authority| authority.rsplit('@').next().unwrap_or_default());
        let first = hosts.and_then(|hosts| hosts.split(',').next()).unwrap_or_default();
        let addr = first.to_socket_addrs().ok().and_then(|mut addrs| addrs.next());
        let addr = addr.ok_or_else(|| Error::new(format!("no host:port that can be found: \"{first}\"")))?;
        Ok(Self { url: url.to_owned(), addr, own: Err(why_not) })
    }

    /// The connection string, such as `etcd://127.0.0.1:15207`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The address for clients. It never changes.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Asks the server to end, and waits until it has. Its data stays. Nothing happens to a server that is down.
    ///
    /// # Errors
    /// It is not the suite's own, or does not end.
    pub async fn stop(&self) -> Result<()> {
        let own = self.own()?;
        own.stop(&mut *own.state.lock().await).await
    }

    /// Ends the server without asking, also while it is frozen. Its data stays as it is at that moment.
    ///
    /// # Errors
    /// It is not the suite's own, or cannot be killed.
    pub async fn kill(&self) -> Result<()> {
        let own = self.own()?;
        own.kill(&mut *own.state.lock().await).await
    }

    /// Starts the server again, with its data, and waits until it serves. One that is up is stopped first.
    ///
    /// # Errors
    /// It is not the suite's own, or did not come up.
    pub async fn restart(&self) -> Result<()> {
        self.relaunch().await?;
        self.ready().await
    }

    /// [`restart`](Self::restart) that does not wait: for a member of a cluster that cannot serve without others.
    ///
    /// # Errors
    /// It is not the suite's own, or could not be started.
    pub async fn relaunch(&self) -> Result<()> {
        let own = self.own()?;
        let state = &mut *own.state.lock().await;
        own.stop(state).await?;
        own.up(state).await
    }

    /// Waits until the server serves.
    ///
    /// # Errors
    /// It is not the suite's own, it has ended, or a minute has passed.
    pub async fn ready(&self) -> Result<()> {
        let own = self.own()?;
        let deadline = Instant::now() + READY_WITHIN;
        while !own.store.ready(&own.site).await {
            let gone = own.machine.ended().await;
            if gone || Instant::now() > deadline {
                let happened =
                    if gone { "has ended".to_owned() } else { format!("is not ready after {READY_WITHIN:?}") };
                let (name, log) = (own.store.name(), own.machine.log().await);
                return Err(Error::new(format!("{name} at {} {happened}. Its last words:\n{log}", self.addr)));
            }
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Stops the server's clock, as it were: it takes connections and never answers.
    ///
    /// # Errors
    /// It is not the suite's own, or is down.
    pub async fn freeze(&self) -> Result<()> {
        let own = self.own()?;
        let state = &mut *own.state.lock().await;
        match state {
            State::Up => own.machine.freeze().await?,
            State::Frozen => return Ok(()),
            State::Down => return Err(Error::new(format!("{} is down: it cannot be frozen", self.url))),
        }
        *state = State::Frozen;
        Ok(())
    }

    /// Lets a frozen server go on. Nothing happens to one that is not frozen.
    ///
    /// # Errors
    /// It is not the suite's own, or cannot be thawed.
    pub async fn thaw(&self) -> Result<()> {
        let own = self.own()?;
        own.thaw(&mut *own.state.lock().await).await
    }

    /// Kills the server, deletes its data, starts it empty and waits until it serves.
    ///
    /// # Errors
    /// It is not the suite's own, or did not come up. A member is wiped by [`Cluster::wipe_member`] or, with all the
    /// others, by [`Cluster::wipe`].
    ///
    /// [`Cluster::wipe_member`]: super::Cluster::wipe_member
    /// [`Cluster::wipe`]: super::Cluster::wipe
    pub async fn wipe(&self) -> Result<()> {
        if self.own()?.site.members.len() > 1 {
            return Err(Error::new(
                "a member that has lost its data does not find back into its cluster by itself: wipe it there",
            ));
        }
        self.erase(Vec::new()).await?;
        self.restart().await
    }

    /// Kills the server and deletes its data. From now on it is started with these arguments more.
    pub(super) async fn erase(&self, more: Vec<String>) -> Result<()> {
        let own = self.own()?;
        let state = &mut *own.state.lock().await;
        own.kill(state).await?;
        own.machine.erase(more).await
    }

    /// Kills a member, deletes its data, and starts it again as a member of what the others are.
    pub(super) async fn wipe_member(&self) -> Result<()> {
        let own = self.own()?;
        self.kill().await?;
        let more = own.store.before_return(&own.site).await?;
        self.erase(more).await?;
        self.relaunch().await?;
        own.store.after_return(&own.site).await?;
        self.ready().await
    }

    /// Makes a cluster of all members, if they are none yet.
    pub(super) async fn form(&self) -> Result<()> {
        let own = self.own()?;
        own.store.form(&own.site).await
    }

    /// Whether the server leads its cluster now.
    pub(super) async fn leads(&self) -> bool {
        match &self.own {
            Ok(own) => own.store.leads(&own.site).await,
            Err(_) => false,
        }
    }

    /// The processor time that the server has used since it was started last.
    ///
    /// # Errors
    /// It is not the suite's own, or is down, or this machine has no `/proc` in which its process is found.
    pub async fn cpu_time(&self) -> Result<Duration> {
        // In user mode and in the kernel; `proc(5)` counts the state as the third field, and has hundredths of a second.
        const FIELDS: std::ops::Range<usize> = 11..13;
        let file = format!("/proc/{}/stat", self.own()?.machine.pid().await?);
        let stat = tokio::fs::read_to_string(&file).await.map_err(Error::during(&file))?;
        let after_name = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks = after_name.skip(FIELDS.start).take(FIELDS.len()).flat_map(str::parse::<u64>).sum::<u64>();
        Ok(Duration::from_millis(10 * ticks))
    }

    /// The last lines that the server has written, for messages. Empty if it is not the suite's own.
    pub async fn log(&self) -> String {
        match &self.own {
            Ok(own) => own.machine.log().await,
            Err(_) => String::new(),
        }
    }

    fn own(&self) -> Result<&Own> {
        self.own
            .as_ref()
            .map_err(|why_not| Error::new(format!("this case needs a server of its own: {} {why_not}", self.url)))
    }
}

impl Own {
    async fn up(&self, state: &mut State) -> Result<()> {
        self.machine.up().await?;
        *state = State::Up;
        Ok(())
    }

    async fn stop(&self, state: &mut State) -> Result<()> {
        if *state == State::Down {
            return Ok(());
        }
        self.thaw(state).await?;
        if self.machine.ended().await {
            return self.kill(state).await;
        }
        self.machine.stop().await?;
        *state = State::Down;
        Ok(())
    }

    async fn kill(&self, state: &mut State) -> Result<()> {
        if *state != State::Down {
            self.machine.kill().await?;
            *state = State::Down;
        }
        Ok(())
    }

    async fn thaw(&self, state: &mut State) -> Result<()> {
        if *state == State::Frozen {
            self.machine.thaw().await?;
            *state = State::Up;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_borrowed_server_is_never_harmed() {
        let server =
            Server::borrowed("etcd://user:p@127.0.0.1:2379,127.0.0.1:2380/prefix?ttl=5s", "is not ours").unwrap();
        assert_eq!(server.addr().to_string(), "127.0.0.1:2379");
        for refused in [server.kill().await, server.freeze().await, server.wipe().await, server.restart().await] {
            assert!(refused.unwrap_err().to_string().ends_with("is not ours"));
        }
        assert!(Server::borrowed("etcd://nowhere", "").is_err());
    }
}
