//! The network between one backend and the store, which tests can break.

use std::{collections::BTreeMap, fmt, mem, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};

use super::{NAME, unavailable};
use crate::{Error, Key, Record, Result, SessionEvent};

/// The network between one [`MemoryBackend`](super::MemoryBackend) and its store: a cheap handle, for tests that
/// break it.
///
/// ```text
/// up ─cut→ cut ─heal→ up      up ─hang, hang_after_apply→ hanging ─heal→ up, ─cut→ cut
/// ```
///
/// While nothing arrives, keep-alives do not either: the session expires by its ttl.
#[derive(Clone)]
pub struct MemoryLink(Arc<Link>);

struct Link {
    line: watch::Sender<Line>,
    ttl: Duration,
    events: mpsc::UnboundedSender<SessionEvent>,
}

#[derive(Debug, Default)]
struct Line {
    state: State,
    cuts: u64,
    /// Whether the backend knows, and has told, that the line is down.
    suspended: bool,
    delay: Duration,
    denied: Option<Error>,
    failing: BTreeMap<Key, Error>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Up,
    Cut,
    /// Nothing arrives in either direction.
    Hanging,
    /// Requests arrive, answers do not.
    Mute,
}

impl MemoryLink {
    pub(super) fn new(ttl: Duration) -> (Self, mpsc::UnboundedReceiver<SessionEvent>) {
        let (events, told) = mpsc::unbounded_channel();
        let link = Self(Arc::new(Link { line: watch::Sender::default(), ttl, events }));
        link.tell(SessionEvent::Connecting);
        link.tell(SessionEvent::Connected { ttl });
        (link, told)
    }

    /// Breaks the connection: calls and open subscriptions, hanging ones too, fail with
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) until [`heal`](Self::heal). The backend notices at
    /// once: [`SessionEvent::Suspended`].
    pub fn cut(&self) {
        self.0.line.send_modify(|line| (line.state, line.cuts) = (State::Cut, line.cuts + 1));
        self.suspend();
    }

    /// A black hole: calls never arrive and subscriptions are silent until [`heal`](Self::heal). Then calls whose
    /// future still lives are carried out late, and subscriptions go on without a loss.
    ///
    /// The backend notices at its next call: [`SessionEvent::Suspended`].
    pub fn hang(&self) {
        self.set(State::Hanging);
    }

    /// A black hole for answers: calls are carried out, so the session is renewed too, but not answered before
    /// [`heal`](Self::heal), and subscriptions are silent.
    pub fn hang_after_apply(&self) {
        self.set(State::Mute);
    }

    /// Ends [`cut`](Self::cut), [`hang`](Self::hang) and [`hang_after_apply`](Self::hang_after_apply).
    /// [`SessionEvent::Connected`] follows if the backend had noticed.
    pub fn heal(&self) {
        self.set(State::Up);
        if self.0.line.send_if_modified(|line| mem::take(&mut line.suspended)) {
            self.tell(SessionEvent::Connected { ttl: self.0.ttl });
        }
    }

    /// Lets each call, and each wake-up of a subscription, arrive this much later. Zero at first.
    pub fn delay(&self, delay: Duration) {
        self.0.line.send_modify(|line| line.delay = delay);
    }

    /// Lets the store refuse this record, and every batch that contains it as a whole, with the error; `None` ends
    /// that.
    pub fn fail(&self, key: &Key, error: Option<Error>) {
        self.0.line.send_modify(|line| {
            match error {
                Some(error) => line.failing.insert(key.clone(), error),
                None => line.failing.remove(key),
            };
        });
    }

    /// Lets the store refuse every call with the error, as with the rights of a user who lost them; `None` ends that.
    /// Open subscriptions stay.
    pub fn deny(&self, error: Option<Error>) {
        self.0.line.send_modify(|line| line.denied = error);
    }

    fn set(&self, state: State) {
        self.0.line.send_modify(|line| line.state = state);
    }

    fn suspend(&self) {
        if self.0.line.send_if_modified(|line| !mem::replace(&mut line.suspended, true)) {
            self.tell(SessionEvent::Suspended);
        }
    }

    /// Tells the engine, if it still listens.
    pub(super) fn tell(&self, event: SessionEvent) {
        let _ = self.0.events.send(event);
    }

    /// Why the store refuses the batch.
    pub(super) fn refusal(&self, records: &[Record]) -> Option<Error> {
        let line = self.0.line.borrow();
        records.iter().find_map(|record| line.failing.get(&record.key)).map(|error| error.clone().with_backend(NAME))
    }

    /// Begins a call or a subscription.
    pub(super) fn call(&self) -> Call {
        let line = self.0.line.subscribe();
        let cuts = line.borrow().cuts;
        Call { link: self.clone(), line, cuts }
    }
}

impl fmt::Debug for MemoryLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryLink").field(&*self.0.line.borrow()).finish()
    }
}

/// The way of one call or subscription through the network. It does not survive a cut, however short.
pub(super) struct Call {
    link: MemoryLink,
    line: watch::Receiver<Line>,
    cuts: u64,
}

impl Call {
    /// The request goes to the store, which may not let it in.
    pub(super) async fn request(&mut self) -> Result<()> {
        self.latency().await;
        if self.line.borrow().state != State::Up {
            self.link.suspend();
        }
        self.pass(|state| state != State::Hanging).await?;
        self.line.borrow().denied.clone().map_or(Ok(()), |error| Err(error.with_backend(NAME)))
    }

    /// The answer comes back.
    pub(super) async fn answer(&mut self) -> Result<()> {
        self.pass(|state| state == State::Up).await
    }

    /// An item of a subscription comes.
    pub(super) async fn item(&mut self) -> Result<()> {
        self.latency().await;
        self.answer().await
    }

    /// Returns once nothing can come any more.
    pub(super) async fn down(&mut self) {
        let _ = self.pass(|state| state != State::Up).await;
    }

    async fn latency(&self) {
        let delay = self.line.borrow().delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
    }

    async fn pass(&mut self, passable: impl Fn(State) -> bool) -> Result<()> {
        let cuts = self.cuts;
        let is_cut = |line: &Line| line.state == State::Cut || line.cuts != cuts;
        // `link` holds the sender, so the wait ends only with such a state.
        let line = self.line.wait_for(|line| is_cut(line) || passable(line.state)).await;
        if line.is_ok_and(|line| is_cut(&line)) { Err(unavailable("the link is cut")) } else { Ok(()) }
    }
}
