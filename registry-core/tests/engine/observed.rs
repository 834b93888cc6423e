//! A backend that notes every call and passes it on.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::stream::BoxStream;
use registry_core::{
    Backend, Cursor, Directory, Epoch, Error, Intent, Key, Owner, Record, Renewal, Result, ServiceName, SessionEvent,
    Updates, async_trait,
};
use tokio::time::Instant;

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) at: Instant,
    pub(crate) verb: &'static str,
    pub(crate) keys: usize,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    calls: Arc<Mutex<Vec<Call>>>,
    refused: Arc<Mutex<Option<Error>>>,
}

impl Log {
    /// The calls of a verb; `put` means claims and restores.
    pub(crate) fn calls(&self, verb: &str) -> Vec<Call> {
        let is = |call: &&Call| call.verb == verb || verb == "put" && ["claim", "restore"].contains(&call.verb);
        self.calls.lock().unwrap().iter().filter(is).cloned().collect()
    }

    pub(crate) fn count(&self, verb: &str) -> usize {
        self.calls(verb).len()
    }

    pub(crate) fn all(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    pub(crate) fn clear(&self) {
        self.calls.lock().unwrap().clear();
    }

    /// Lets every removal be refused with the error; `None` ends that.
    pub(crate) fn refuse_removals(&self, error: Option<Error>) {
        *self.refused.lock().unwrap() = error;
    }

    /// The most keys that any window of this length saw written.
    pub(crate) fn most_keys_within(&self, verb: &str, window: Duration) -> usize {
        let calls = self.calls(verb);
        let within = |start: Instant| calls.iter().filter(move |c| c.at >= start && c.at < start + window);
        calls.iter().map(|call| within(call.at).map(|c| c.keys).sum()).max().unwrap_or(0)
    }
}

#[derive(Debug)]
pub(crate) struct Observed<B> {
    inner: B,
    log: Log,
}

impl<B> Observed<B> {
    pub(crate) fn new(inner: B) -> (Self, Log) {
        let log = Log::default();
        (Self { inner, log: log.clone() }, log)
    }

    fn note(&self, verb: &'static str, keys: usize) {
        self.log.calls.lock().unwrap().push(Call { at: Instant::now(), verb, keys });
    }
}

#[async_trait]
impl<B: Backend> Backend for Observed<B> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn owner(&self) -> &Owner {
        self.inner.owner()
    }

    fn namespace(&self) -> String {
        self.inner.namespace()
    }

    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        self.note(if why == Intent::Claim { "claim" } else { "restore" }, records.len());
        self.inner.put(records, why).await
    }

    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        self.note("remove", keys.len());
        let refused = self.log.refused.lock().unwrap().clone();
        if let Some(error) = refused {
            return vec![Err(error); keys.len()];
        }
        self.inner.remove(keys).await
    }

    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        self.note("renew", keys.len());
        self.inner.renew(keys).await
    }

    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        self.note("verify", keys.len());
        self.inner.verify(keys).await
    }

    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        self.note("list", 0);
        self.inner.list(service, directory).await
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        self.note("subscribe", usize::from(since.is_some()));
        self.inner.subscribe(service, since).await
    }

    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        self.note("probe", 0);
        self.inner.probe(service, at).await
    }

    async fn services(&self) -> Result<Vec<ServiceName>> {
        self.note("services", 0);
        self.inner.services().await
    }

    fn events(&self) -> BoxStream<'static, SessionEvent> {
        self.inner.events()
    }

    async fn close(&self, keys: &[Key]) -> Result<()> {
        self.note("close", keys.len());
        self.inner.close(keys).await
    }
}
