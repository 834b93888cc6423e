//! A store as the benchmark sees it: a server of its own, registries on it, and the bare client for the floor.

use std::{collections::BTreeMap, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use registry_core::{Options, Registry};
use registry_tests::servers::Server;
use serde::Serialize;

use crate::{Result, report::Report};

/// The path of a record under the prefix of a round, as a layout spells it, and its bytes.
pub(crate) type Entry = (String, Vec<u8>);

pub(crate) trait Bare: Sized + Send + Sync {
    const NAME: &'static str;
    /// What [`Writer::write_all`] does, for the table.
    const BATCHES: &'static str;
    /// What [`Writer::write`] does for a new record, for the table.
    const SINGLE: &'static str;

    /// How many watches the server has for each service that a reader follows.
    const WATCHES: usize = 1;

    type Writer: Writer;
    type Reader: Reader;

    /// Starts the server.
    fn start() -> impl Future<Output = Result<Self>> + Send;

    fn server(&self) -> &Server;

    /// A registry whose server, or the proxy before it, is at this address.
    fn registry(&self, at: SocketAddr, prefix: &str, options: Options) -> Result<Arc<dyn Registry>>;

    /// A client with a session that holds `count` records under the prefix.
    fn writer(&self, at: SocketAddr, prefix: &str, count: usize) -> impl Future<Output = Result<Self::Writer>> + Send;

    /// A client that follows the service `orders` under the prefix, complete and waiting for changes.
    fn reader(&self, at: SocketAddr, prefix: &str) -> impl Future<Output = Result<Self::Reader>> + Send;

    /// How many watches the server has.
    fn watches(&self) -> impl Future<Output = Result<usize>> + Send;

    /// Many instances of one service, where the store has something to show there.
    fn volume(&self, _report: &mut Report) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }

    /// A registry straight on the server.
    fn connect(&self, prefix: &str) -> Result<Arc<dyn Registry>> {
        self.registry(self.server().addr(), prefix, Options::default().request_timeout(Duration::from_secs(30)))
    }
}

/// The least work that registers.
pub(crate) trait Writer: Send + Sync + 'static {
    /// Writes new records, in the client's best mode.
    fn write_all(&self, entries: Vec<Entry>) -> impl Future<Output = Result<()>> + Send;

    /// Writes one new record.
    fn write(&self, entry: &Entry) -> impl Future<Output = Result<()>> + Send;

    /// Changes a record.
    fn change(&self, entry: &Entry) -> impl Future<Output = Result<()>> + Send;

    /// Keeps the session alive, once, if that is not the client's own business.
    fn keep_alive(&self) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }

    /// Ends the session and everything under it.
    fn end(self) -> impl Future<Output = Result<()>> + Send;
}

/// The least work that follows a service.
pub(crate) trait Reader: Send {
    /// Waits until something has changed, and decodes all of it that is there. How many records that were.
    fn changes(&mut self) -> impl Future<Output = Result<usize>> + Send;
}

/// The path of a record of the service `orders` under a prefix.
pub(crate) fn path(prefix: &str, id: usize) -> String {
    format!("/{prefix}/orders/providers/{id:06}")
}

/// Records of the same size as [`instances`](crate::works::instances) make, encoded as those are, each by itself.
pub(crate) fn entries(prefix: &str, count: usize) -> Vec<Entry> {
    (0..count).map(|id| (path(prefix, id), record("1.2.3"))).collect()
}

/// Who writes records.
pub(crate) const OWNER: &str = "0123456789abcdef0123456789abcdef";

/// A record of this version.
pub(crate) fn record(version: &str) -> Vec<u8> {
    #[derive(Serialize)]
    struct Record<'a> {
        v: u8,
        owner: &'a str,
        epoch: u64,
        endpoints: [&'a str; 1],
        version: &'a str,
        zone: &'a str,
        weight: u32,
        status: &'a str,
        metadata: BTreeMap<&'a str, &'a str>,
        registered_at: u64,
    }
    let record = Record {
        v: 1,
        owner: OWNER,
        epoch: 1,
        endpoints: ["http://10.0.3.250:8080"],
        version,
        zone: "eu-1a",
        weight: 100,
        status: "up",
        metadata: BTreeMap::from([("commit", "d34db33fd34db33fd34db33f")]),
        registered_at: 1_795_260_803_775,
    };
    serde_json::to_vec(&record).expect("a record is JSON")
}
