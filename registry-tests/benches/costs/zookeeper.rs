//! The floor on ZooKeeper: ephemerals made in batches, and one recursive watch whose events are read in batches.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::{StreamExt, future::join_all, stream};
use registry_core::{Managed, Options, Registry};
use registry_tests::servers::{self, Server};
use registry_zk::{ZooKeeperBackend, ZooKeeperConfig};
use zookeeper_client::{
    Acls, AddWatchMode, Client, CreateMode, CreateOptions, EventType, MultiReadResult, PersistentWatcher,
};

use crate::{
    Result,
    bare::{Bare, Entry, Reader, Writer},
};

const EPHEMERAL: CreateOptions<'static> = CreateMode::Ephemeral.with_acls(Acls::anyone_all());
const CONTAINER: CreateOptions<'static> = CreateMode::Container.with_acls(Acls::anyone_all());

pub(crate) struct ZooKeeper {
    server: Server,
}

pub(crate) struct Session {
    client: Client,
}

pub(crate) struct Watching {
    client: Client,
    watcher: PersistentWatcher,
}

impl Bare for ZooKeeper {
    const NAME: &'static str = "zookeeper";
    const BATCHES: &'static str = "multis of 100 creates, 4 in flight";
    const SINGLE: &'static str = "a create";

    // Two, each of which the server counts as one for data and one for children.
    const WATCHES: usize = 4;

    type Writer = Session;
    type Reader = Watching;

    async fn start() -> Result<Self> {
        Ok(Self { server: Server::start(servers::ZooKeeper::new()).await? })
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn registry(&self, at: SocketAddr, prefix: &str, options: Options) -> Result<Arc<dyn Registry>> {
        let config = ZooKeeperConfig::new([at.to_string()]).prefix(prefix).options(options.clone());
        Ok(Arc::new(Managed::new(ZooKeeperBackend::new(config)?, options)?))
    }

    async fn watches(&self) -> Result<usize> {
        let metrics = servers::ask_zookeeper(self.server.addr(), "mntr").await?;
        let count = metrics.lines().find_map(|line| line.strip_prefix("zk_watch_count\t"));
        Ok(count.ok_or("ZooKeeper does not count its watches")?.trim().parse()?)
    }

    async fn writer(&self, at: SocketAddr, prefix: &str, _count: usize) -> Result<Session> {
        let client = client(at).await?;
        client.mkdir(&format!("/{prefix}/orders/providers"), &CONTAINER).await?;
        Ok(Session { client })
    }

    async fn reader(&self, at: SocketAddr, prefix: &str) -> Result<Watching> {
        let client = client(at).await?;
        let path = format!("/{prefix}/orders/providers");
        let watcher = client.watch(&path, AddWatchMode::PersistentRecursive).await?;
        Ok(Watching { client, watcher })
    }
}

impl Writer for Session {
    async fn write_all(&self, entries: Vec<Entry>) -> Result<()> {
        let batches: Vec<_> = entries.chunks(100).map(<[Entry]>::to_vec).collect();
        let mut done =
            stream::iter(batches.into_iter().map(|batch| create_all(&self.client, batch))).buffer_unordered(4);
        while let Some(outcome) = done.next().await {
            outcome?;
        }
        Ok(())
    }

    async fn write(&self, (path, value): &Entry) -> Result<()> {
        self.client.create(path, value, &EPHEMERAL).await?;
        Ok(())
    }

    async fn change(&self, (path, value): &Entry) -> Result<()> {
        self.client.set_data(path, value, None).await?;
        Ok(())
    }

    /// The session ends in the background when the client is dropped.
    async fn end(self) -> Result<()> {
        let mut states = self.client.state_watcher();
        drop(self.client);
        let ended = async { while !states.changed().await.is_terminated() {} };
        Ok(tokio::time::timeout(Duration::from_secs(30), ended).await?)
    }
}

impl Reader for Watching {
    async fn changes(&mut self) -> Result<usize> {
        let mut paths = Vec::new();
        let mut event = self.watcher.changed().await;
        loop {
            if matches!(event.event_type, EventType::NodeCreated | EventType::NodeDataChanged) {
                paths.push(event.path);
            }
            // Whatever is there already is read with it.
            match futures::FutureExt::now_or_never(self.watcher.changed()) {
                Some(next) => event = next,
                None => break,
            }
        }
        for read in join_all(paths.chunks(500).map(|paths| read_all(&self.client, paths))).await {
            read?;
        }
        Ok(paths.len())
    }
}

async fn create_all(client: &Client, batch: Vec<Entry>) -> Result<()> {
    let mut multi = client.new_multi_writer();
    for (path, value) in &batch {
        multi.add_create(path, value, &EPHEMERAL)?;
    }
    multi.commit().await?;
    Ok(())
}

async fn read_all(client: &Client, paths: &[String]) -> Result<()> {
    let mut multi = client.new_multi_reader();
    for path in paths {
        multi.add_get_data(path)?;
    }
    for read in multi.commit().await? {
        if let MultiReadResult::Data { data, .. } = read {
            std::hint::black_box(serde_json::from_slice::<serde_json::Value>(&data)?);
        }
    }
    Ok(())
}

async fn client(at: SocketAddr) -> Result<Client> {
    Ok(Client::connector().with_session_timeout(Duration::from_secs(15)).connect(&at.to_string()).await?)
}
