//! Servers that know each other.

use std::{sync::Arc, time::Duration};

use futures::future::try_join_all;
use tokio::time::{Instant, sleep};

use super::{Error, Launcher, READY_WITHIN, Result, Server, Store, container::Pod, ports::Ports};

/// A cluster of servers on one machine, which ends when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    url: String,
    members: Vec<Server>,
    /// So many of them are started before the others.
    first: usize,
    /// Dropped after the members, whose network it is.
    pod: Option<Pod>,
}

impl Cluster {
    /// Starts so many members in what [`Launcher::choose`] says, and waits until all of them serve.
    ///
    /// # Errors
    /// What they need is missing, or they did not come up.
    pub async fn start(store: impl Store, size: usize) -> Result<Self> {
        let launcher = Launcher::choose(&store).await?;
        Self::start_in(launcher, store, size).await
    }

    /// Starts so many members in what the caller says, and waits until all of them serve.
    ///
    /// # Errors
    /// What they need is missing, or they did not come up.
    pub async fn start_in(launcher: Launcher, store: impl Store, size: usize) -> Result<Self> {
        launcher.available(&store).await?;
        let store: Arc<dyn Store> = Arc::new(store);
        let reserved = (0..size).map(|_| Ports::reserve(store.ports())).collect::<Result<Vec<_>>>()?;
        let ports: Arc<[Vec<u16>]> = reserved.iter().map(Ports::numbers).collect();
        let pod = match launcher {
            Launcher::Containers if size > 1 => Some(Pod::start(&*store, ports.concat()).await?),
            _ => None,
        };
        let mut members = Vec::with_capacity(size);
        for (index, reserved) in reserved.into_iter().enumerate() {
            let member = Server::member(launcher, store.clone(), ports.clone(), index, reserved, pod.as_ref());
            members.push(member.await?);
        }
        let clients: Vec<_> = ports.iter().map(|ports| ports[0]).collect();
        let cluster = Self { url: store.url(&clients), members, first: store.before_others(), pod };
        cluster.restart().await?;
        Ok(cluster)
    }

    /// The connection string with all members in it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The members, to be harmed one by one.
    pub fn members(&self) -> &[Server] {
        &self.members
    }

    /// Waits until there is a leader, and says which member it is.
    ///
    /// # Errors
    /// There is none after a minute.
    pub async fn leader(&self) -> Result<usize> {
        let deadline = Instant::now() + READY_WITHIN;
        while Instant::now() < deadline {
            for (index, member) in self.members.iter().enumerate() {
                if member.leads().await {
                    return Ok(index);
                }
            }
            sleep(Duration::from_millis(10)).await;
        }
        Err(Error::new(format!("{} has no leader after {READY_WITHIN:?}", self.url)))
    }

    /// Starts all members again, with their data, and waits until they serve. Those that are up are killed first:
    /// asked to end all at once, they would look for a successor.
    ///
    /// # Errors
    /// They did not come up.
    pub async fn restart(&self) -> Result<()> {
        self.kill().await?;
        let (first, others) = self.members.split_at(self.first);
        try_join_all(first.iter().map(Server::relaunch)).await?;
        try_join_all(first.iter().map(Server::ready)).await?;
        try_join_all(others.iter().map(Server::relaunch)).await?;
        if let [first, ..] = self.members() {
            first.form().await?;
        }
        try_join_all(self.members.iter().map(Server::ready)).await.map(drop)
    }

    /// Kills all members.
    ///
    /// # Errors
    /// One cannot be killed.
    pub async fn kill(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Server::kill)).await.map(drop)
    }

    /// Freezes all members.
    ///
    /// # Errors
    /// One is down.
    pub async fn freeze(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Server::freeze)).await.map(drop)
    }

    /// Lets all members go on that are frozen.
    ///
    /// # Errors
    /// One cannot be thawed.
    pub async fn thaw(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Server::thaw)).await.map(drop)
    }

    /// Kills all members, deletes their data, starts them as a new cluster and waits until they serve.
    ///
    /// # Errors
    /// They did not come up.
    pub async fn wipe(&self) -> Result<()> {
        try_join_all(self.members.iter().map(|member| member.erase(Vec::new()))).await?;
        self.restart().await
    }

    /// Kills one member, deletes its data, starts it again as a member of what the others are, as an operator would, and
    /// waits until it serves. The others must be enough to go on.
    ///
    /// # Errors
    /// It did not come up, or the others do not take it.
    pub async fn wipe_member(&self, index: usize) -> Result<()> {
        self.members[index].wipe_member().await
    }

    /// Cuts a member off from the others. It goes on, and clients reach it as before.
    ///
    /// # Errors
    /// The members do not run in containers, of the image that is built here.
    pub async fn isolate(&self, index: usize) -> Result<()> {
        match &self.pod {
            Some(pod) => pod.isolate(index).await,
            None => Err(Error::new("members can be cut off from each other in containers only")),
        }
    }

    /// Ends every [`isolate`](Self::isolate).
    ///
    /// # Errors
    /// The engine does not do it.
    pub async fn rejoin(&self) -> Result<()> {
        match &self.pod {
            Some(pod) => pod.rejoin().await,
            None => Ok(()),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Each takes a moment to end: all at the same time.
        std::thread::scope(|scope| {
            for member in self.members.drain(..) {
                scope.spawn(move || drop(member));
            }
        });
    }
}
