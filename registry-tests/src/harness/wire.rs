//! A wire between the engine and any backend, which counts what goes through it and breaks on demand.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream, stream::BoxStream};
use registry_core::{
    Backend, Cursor, Directory, Epoch, Error, ErrorKind, Intent, Key, Owner, Record, Renewal, Result, ServiceName,
    SessionEvent, Updates, async_trait,
};
use tokio::{sync::watch, time::sleep};

use super::Link;

/// What an engine has asked of its backend.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    made: AtomicU64,
    following: AtomicUsize,
}

impl Calls {
    /// How many verbs were called so far.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.0.made.load(Ordering::Relaxed)
    }

    /// How many subscriptions are open.
    #[must_use]
    pub fn following(&self) -> usize {
        self.0.following.load(Ordering::Relaxed)
    }
}

/// Counts a subscription for as long as it exists.
struct Following(Calls);

impl Following {
    fn new(calls: &Calls) -> Self {
        calls.0.following.fetch_add(1, Ordering::Relaxed);
        Self(calls.clone())
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.0.following.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The network of one client, for stores that are reached by calls instead of bytes; a cheap handle.
///
/// It is put between engine and backend by [`Wired`]. Where there are bytes, a
/// [`FaultProxy`](crate::proxy::FaultProxy) is closer to the truth, and the wire only counts.
#[derive(Clone, Debug, Default)]
pub struct Wire {
    line: watch::Sender<Line>,
    calls: Calls,
}

#[derive(Clone, Copy, Debug, Default)]
struct Line {
    state: State,
    delay: Duration,
    cuts: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Up,
    Cut,
    Hanging,
}

impl Wire {
    /// What went through the wire.
    #[must_use]
    pub fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// Carries one call there and its answer back. A cut ends it, however short.
    async fn carry<T>(&self, call: impl Future<Output = T>) -> Result<T> {
        self.calls.0.made.fetch_add(1, Ordering::Relaxed);
        let exchange = async {
            self.pass().await;
            let answer = call.await;
            self.pass().await;
            answer
        };
        unless(&mut self.cut_from_now_on(), exchange).await
    }

    /// Like [`carry`](Self::carry), but what was sent arrives, however late, though nobody waits for the answer any
    /// more. So it is with bytes that are under way.
    async fn send<T: Send + 'static>(&self, call: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let wire = self.clone();
        let sent = tokio::spawn(async move { wire.carry(call).await });
        sent.await.unwrap_or_else(|_| Err(down()))
    }

    async fn pass(&self) {
        let mut line = self.line.subscribe();
        let delay = line.borrow().delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        // `self` holds the sender.
        let _ = line.wait_for(|line| line.state != State::Hanging).await;
    }

    /// Ends at the next cut, or at once while there is one.
    fn cut_from_now_on(&self) -> Cut {
        let mut line = self.line.subscribe();
        let cuts = line.borrow().cuts;
        Box::pin(async move {
            if line.wait_for(|line| line.state == State::Cut || line.cuts != cuts).await.is_err() {
                // Nobody is left who could cut it.
                std::future::pending::<()>().await;
            }
        })
    }
}

type Cut = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What `work` gives, unless the cut comes first: looked at last, so that nothing from after it is given.
async fn unless<T>(cut: &mut Cut, work: impl Future<Output = T>) -> Result<T> {
    let done = tokio::select! {
        biased;
        () = &mut *cut => return Err(down()),
        done = work => done,
    };
    if cut.now_or_never().is_some() { Err(down()) } else { Ok(done) }
}

impl Link for Wire {
    fn cut(&self) {
        self.line.send_modify(|line| (line.state, line.cuts) = (State::Cut, line.cuts + 1));
    }

    fn hang(&self) {
        self.line.send_modify(|line| line.state = State::Hanging);
    }

    fn delay(&self, by: Duration) {
        self.line.send_modify(|line| line.delay = by);
    }

    fn heal(&self) {
        self.line.send_modify(|line| (line.state, line.delay) = (State::Up, Duration::ZERO));
    }
}

/// A backend at the end of a [`Wire`].
#[derive(Debug)]
pub struct Wired<B> {
    backend: Arc<B>,
    wire: Wire,
}

impl<B> Wired<B> {
    /// Puts the wire before the backend.
    pub fn new(backend: B, wire: Wire) -> Self {
        Self { backend: Arc::new(backend), wire }
    }
}

#[async_trait]
impl<B: Backend> Backend for Wired<B> {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn owner(&self) -> &Owner {
        self.backend.owner()
    }

    // Its namespace is nothing: the clients of a case come to their store by proxies of their own, each at an address of
    // its own.

    async fn put(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        let (backend, sent) = (self.backend.clone(), records.to_vec());
        let put = self.wire.send(async move { backend.put(&sent, why).await }).await;
        put.unwrap_or_else(|error| vec![Err(error); records.len()])
    }

    async fn remove(&self, keys: &[Key]) -> Vec<Result<bool>> {
        let (backend, sent) = (self.backend.clone(), keys.to_vec());
        let removed = self.wire.send(async move { backend.remove(&sent).await }).await;
        removed.unwrap_or_else(|error| vec![Err(error); keys.len()])
    }

    async fn renew(&self, keys: &[Key]) -> Result<Renewal> {
        self.wire.carry(self.backend.renew(keys)).await?
    }

    async fn verify(&self, keys: &[Key]) -> Result<Vec<Key>> {
        self.wire.carry(self.backend.verify(keys)).await?
    }

    async fn list(&self, service: &ServiceName, directory: Directory) -> Result<Vec<Record>> {
        self.wire.carry(self.backend.list(service, directory)).await?
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        since: Option<Cursor>,
    ) -> Result<BoxStream<'static, Result<Updates>>> {
        // Before the call: a cut that comes before the first item ends the subscription too.
        let cut = self.wire.cut_from_now_on();
        let items = self.wire.carry(self.backend.subscribe(service, since)).await??;
        let parts = (items, cut, self.wire.clone(), Following::new(&self.wire.calls));
        let items = stream::unfold(Some(parts), |parts| async {
            let (mut items, mut cut, wire, following) = parts?;
            let item = async {
                let item = items.next().await;
                wire.pass().await;
                item
            };
            match unless(&mut cut, item).await {
                Ok(item) => Some((item?, Some((items, cut, wire, following)))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(items.boxed())
    }

    async fn probe(&self, service: &ServiceName, at: &Cursor) -> Result<bool> {
        self.wire.carry(self.backend.probe(service, at)).await?
    }

    async fn services(&self) -> Result<Vec<ServiceName>> {
        self.wire.carry(self.backend.services()).await?
    }

    /// Those of the backend, and what a client would notice of the wire.
    fn events(&self) -> BoxStream<'static, SessionEvent> {
        let parts = (self.backend.events().fuse(), self.wire.line.subscribe(), false, None);
        let events = stream::unfold(parts, |(mut events, mut line, mut was_cut, mut connected)| async move {
            let event = loop {
                tokio::select! {
                    Some(event) = events.next() => break event,
                    Ok(()) = line.changed() => {
                        let is_cut = line.borrow_and_update().state == State::Cut;
                        match (std::mem::replace(&mut was_cut, is_cut), is_cut, &connected) {
                            (false, true, _) => break SessionEvent::Suspended,
                            (true, false, Some(event)) => break SessionEvent::clone(event),
                            _ => {}
                        }
                    }
                    else => return None,
                }
            };
            if matches!(event, SessionEvent::Connected { .. }) {
                connected = Some(event.clone());
            }
            Some((event, (events, line, was_cut, connected)))
        });
        events.boxed()
    }

    async fn close(&self, keys: &[Key]) -> Result<()> {
        self.wire.carry(self.backend.close(keys)).await?
    }
}

fn down() -> Error {
    Error::new(ErrorKind::Unavailable, "the wire is cut").with_backend("wire")
}
