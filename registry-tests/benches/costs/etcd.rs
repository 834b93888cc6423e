//! The floor on etcd: puts under a lease, of what is absent or ours, and a watch.

use std::{net::SocketAddr, sync::Arc};

use etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp, WatchOptions, WatchStream};
use futures::{StreamExt, stream};
use registry_core::{Managed, Options, Registry};
use registry_etcd::{EtcdBackend, EtcdConfig};
use registry_tests::servers::{self, Server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    Result,
    bare::{Bare, Entry, Reader, Writer},
};

/// How many keys hang on one lease.
const LEASE_KEYS: usize = 1000;

pub(crate) struct Etcd {
    server: Server,
}

pub(crate) struct Leased {
    client: Client,
    leases: Vec<i64>,
}

pub(crate) struct Watching(WatchStream);

impl Bare for Etcd {
    const NAME: &'static str = "etcd";
    const BATCHES: &'static str = "transactions of 100 puts if absent, 4 in flight";
    const SINGLE: &'static str = "a put if absent";

    type Writer = Leased;
    type Reader = Watching;

    async fn start() -> Result<Self> {
        Ok(Self { server: Server::start(servers::Etcd::new()).await? })
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn registry(&self, at: SocketAddr, prefix: &str, options: Options) -> Result<Arc<dyn Registry>> {
        let config = EtcdConfig::new([at.to_string()]).prefix(prefix).options(options.clone());
        Ok(Arc::new(Managed::new(EtcdBackend::new(config)?, options)?))
    }

    async fn watches(&self) -> Result<usize> {
        let mut socket = TcpStream::connect(self.server.addr()).await?;
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
        let mut metrics = String::new();
        socket.read_to_string(&mut metrics).await?;
        let count = metrics.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "));
        Ok(count.ok_or("etcd does not count its watchers")?.trim().parse()?)
    }

    async fn writer(&self, at: SocketAddr, _prefix: &str, count: usize) -> Result<Leased> {
        let client = client(at).await?;
        let mut leases = Vec::new();
        for _ in 0..count.div_ceil(LEASE_KEYS) {
            leases.push(client.lease_client().grant(60, None).await?.id());
        }
        Ok(Leased { client, leases })
    }

    async fn reader(&self, at: SocketAddr, prefix: &str) -> Result<Watching> {
        let key = format!("/{prefix}/orders/");
        let mut watch = client(at).await?.watch_client().watch(key, Some(WatchOptions::new().with_prefix())).await?;
        watch.message().await?;
        Ok(Watching(watch))
    }
}

impl Writer for Leased {
    async fn write_all(&self, entries: Vec<Entry>) -> Result<()> {
        let batches = entries.chunks(100).enumerate().map(|(index, batch)| {
            let lease = self.leases[index * 100 / LEASE_KEYS];
            let ops: Vec<_> = batch.iter().map(|entry| put(entry, lease)).collect();
            let mut kv = self.client.kv_client();
            let absent: Vec<_> = batch.iter().map(absent).collect();
            async move { kv.txn(Txn::new().when(absent).and_then(ops)).await }
        });
        let batches: Vec<_> = batches.collect();
        // Four at a time: more gains nothing, one at a time costs a third more.
        let mut done = stream::iter(batches).buffer_unordered(4);
        while let Some(outcome) = done.next().await {
            outcome?;
        }
        Ok(())
    }

    async fn write(&self, entry: &Entry) -> Result<()> {
        self.client.kv_client().txn(Txn::new().when([absent(entry)]).and_then([put(entry, self.leases[0])])).await?;
        Ok(())
    }

    async fn change(&self, entry: &Entry) -> Result<()> {
        let ours = Compare::lease(entry.0.as_str(), CompareOp::Equal, self.leases[0]);
        self.client.kv_client().txn(Txn::new().when([ours]).and_then([put(entry, self.leases[0])])).await?;
        Ok(())
    }

    async fn keep_alive(&self) -> Result<()> {
        for lease in &self.leases {
            let (_keeper, _answers) = self.client.lease_client().keep_alive(*lease).await?;
        }
        Ok(())
    }

    async fn end(self) -> Result<()> {
        for lease in self.leases {
            self.client.lease_client().revoke(lease).await?;
        }
        Ok(())
    }
}

impl Reader for Watching {
    async fn changes(&mut self) -> Result<usize> {
        loop {
            let message = self.0.message().await?.ok_or("the watch ended")?;
            for kv in message.events().iter().filter_map(|event| event.kv()) {
                std::hint::black_box(serde_json::from_slice::<serde_json::Value>(kv.value())?);
            }
            if !message.events().is_empty() {
                return Ok(message.events().len());
            }
        }
    }
}

async fn client(at: SocketAddr) -> Result<Client> {
    Ok(Client::connect([format!("http://{at}")], None).await?)
}

fn absent((key, _): &Entry) -> Compare {
    Compare::mod_revision(key.as_str(), CompareOp::Equal, 0)
}

fn put((key, value): &Entry, lease: i64) -> TxnOp {
    TxnOp::put(key.as_str(), value.as_slice(), Some(PutOptions::new().with_lease(lease)))
}
