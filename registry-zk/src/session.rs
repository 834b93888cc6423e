//! Our session: the only place here with a timer.
//!
//! ```text
//!            ┌────── the client came back by itself, and is answered ───────┐
//!            ▼                                                               │
//! open ──▶ connected ──disconnected──▶ ask the server ──no answer──▶ wait, ask again
//!  ▲                                     │        │
//!  └───────────── it is gone ────────────┘        └── it lives ──▶ connected by the client that asked, if it is answered
//! ```
//!
//! Only the server's own word says that a session is gone. The crate's client guesses it after 1.4 of the ttl, does
//! not see a refusal that arrives before, and is of no use after; so whatever it says, the server is asked, and asked
//! soon: a store that comes back wiped is filled again at once.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use registry_core::{Result, SessionEvent};
use tokio::{
    runtime::Handle,
    sync::{broadcast, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};
use zookeeper_client::{Client, Error as ClientError, SessionInfo, SessionState, StateWatcher};

use crate::{
    config::ZooKeeperConfig,
    dial::{Dialer, Line, Verdict},
    error::{Class, Failure, NAME},
};

/// How long the client may try to come back by itself before the server is asked.
const GRACE: Duration = Duration::from_millis(400);
/// The time between two questions, on average.
const PROBE: Duration = Duration::from_millis(500);
/// The same while the server refuses the user: until somebody mends that.
const REFUSED: Duration = Duration::from_secs(6);
/// How often in a session's timeout a server that is alone must answer something.
const CHECKS: u32 = 5;
/// Events that are kept until somebody listens.
const EVENTS: usize = 64;

/// The session of a registry, kept alive or replaced by a task of its own.
#[derive(Clone)]
pub(crate) struct Session {
    shared: Arc<Shared>,
    /// Ends the task with the session's last handle.
    _task: Arc<DropGuard>,
}

struct Shared {
    dialer: Dialer,
    limit: Duration,
    state: watch::Sender<State>,
    events: broadcast::Sender<SessionEvent>,
    stop: CancellationToken,
    /// The session that the server keeps for us, as far as we know. Held for a look or an edit, never across an
    /// `.await`.
    open: Mutex<Option<SessionInfo>>,
}

#[derive(Clone)]
enum State {
    /// The first attempt is under way.
    Connecting,
    Connected(Arc<Link>),
    Disconnected(Arc<str>),
    /// For good, until somebody mends it.
    Refused(Failure),
    Closed,
}

/// A session that is being given up, on a connection of its own. Dropped, it is left to expire: nobody keeps it alive.
pub(crate) struct Parting {
    shared: Arc<Shared>,
    link: Option<Arc<Link>>,
}

/// A session and a connection that it had when it was handed out.
pub(crate) struct Link {
    line: Line,
    /// Tells one from another.
    id: u64,
    /// The server may have come back as it was at another time, and nobody has looked yet.
    is_unchecked: AtomicBool,
    /// When the server answered last, as far as we saw. Locked for a look or an edit, never across an `.await`.
    heard: Mutex<Instant>,
}

impl Session {
    /// Starts looking for a server.
    pub(crate) fn new(config: &ZooKeeperConfig, runtime: &Handle) -> Result<(Self, broadcast::Receiver<SessionEvent>)> {
        let (events, listener) = broadcast::channel(EVENTS);
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            dialer: Dialer::new(config, runtime)?,
            limit: config.options.request_timeout,
            state: watch::Sender::new(State::Connecting),
            events,
            stop: stop.clone(),
            open: Mutex::default(),
        });
        shared.emit(SessionEvent::Connecting);
        let supervisor = Supervisor { shared: shared.clone(), lost: false };
        let guard = stop.clone().drop_guard();
        runtime.spawn(async move {
            let shared = supervisor.shared.clone();
            stop.run_until_cancelled_owned(supervisor.run()).await;
            // Whoever holds the link still must find it at its end.
            if let State::Connected(link) = shared.state.send_replace(State::Closed) {
                link.line.end();
            }
        });
        Ok((Self { shared, _task: Arc::new(guard) }, listener))
    }

    /// The session as it is now. Waits for the first attempt to connect, and for nothing else.
    pub(crate) async fn link(&self) -> Result<Arc<Link>, Failure> {
        let mut states = self.shared.state.subscribe();
        let decided = states.wait_for(|state| !matches!(state, State::Connecting));
        match timeout(self.shared.limit, decided).await {
            Ok(Ok(state)) => match &*state {
                State::Connected(link) if link.line.is_connected() => Ok(link.clone()),
                State::Connected(_) => Err(Failure::Disconnected("the connection was just lost".into())),
                State::Disconnected(why) => Err(Failure::Disconnected(why.clone())),
                State::Refused(failure) => Err(failure.clone()),
                State::Connecting | State::Closed => Err(Failure::Closed),
            },
            Ok(Err(_)) => Err(Failure::Closed),
            Err(_) => Err(Failure::Late(self.shared.limit)),
        }
    }

    /// The outcome of a request, within the time that requests have, and while its connection lasts: the client itself
    /// would let it wait for the next one, however long that takes.
    pub(crate) async fn call<T, E: Into<Failure>>(
        &self,
        link: &Link,
        request: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        let lost = self.lost(link);
        tokio::select! {
            biased;
            outcome = timeout(self.shared.limit, request) => match outcome.map(|outcome| outcome.map_err(Into::into)) {
                Ok(Err(failure)) if failure.class() == Class::Unknown => {
                    Err(Failure::TooOld(self.shared.dialer.server_version().await))
                }
                Ok(outcome) => {
                    if outcome.is_ok() {
                        *link.heard() = Instant::now();
                    }
                    outcome
                }
                Err(_) => Err(Failure::Late(self.shared.limit)),
            },
            () = lost => Err(Failure::Interrupted),
        }
    }

    /// Waits until the connection of a link is lost, or taken over by another client.
    pub(crate) fn lost(&self, link: &Link) -> impl Future<Output = ()> + Send + use<> {
        let (mut states, id) = (self.shared.state.subscribe(), link.id);
        // The connection of one that is being given up is nobody's but ours.
        let parting = self.shared.stop.is_cancelled().then(|| link.client().state_watcher());
        async move {
            if let Some(mut states) = parting {
                while states.changed().await == SessionState::SyncConnected {}
                return;
            }
            let is_other = |state: &State| !matches!(state, State::Connected(link) if link.id == id);
            // An error means that there is nobody left to say so.
            let _ = states.wait_for(is_other).await;
        }
    }

    /// How long the server has not been heard on a link, for all we know: if it is one of several, the client finds out soon.
    pub(crate) fn silent_for(&self, link: &Link) -> Duration {
        if self.shared.dialer.is_alone() { link.heard().elapsed() } else { Duration::ZERO }
    }

    pub(crate) fn events(&self) -> broadcast::Receiver<SessionEvent> {
        self.shared.events.subscribe()
    }

    /// Takes the session from whoever keeps it alive, to give it up; `None` if there is none. Where something `remains` to
    /// be removed, another one is opened for that: what is persistent outlives a session, and a leader that hung and was
    /// replaced says for a moment that sessions are over which the others keep. May be repeated until it succeeds.
    pub(crate) async fn part(&self, remains: bool) -> Result<Option<Parting>, Failure> {
        // First of all, whatever becomes of the rest: a registry that could not leave must not live on.
        self.shared.stop.cancel();
        let mut states = self.shared.state.subscribe();
        // An error means that the task has ended, too.
        let _ = states.wait_for(|state| matches!(state, State::Closed)).await;
        let mut session = self.shared.open().clone();
        while session.is_some() || remains {
            // By a client that closes the session when it is dropped.
            match self.shared.dialer.open(session.take(), false).await {
                Ok(line) => {
                    // Where leaving fails, the next attempt takes the same.
                    self.shared.open().replace(line.client.session().clone());
                    return Ok(Some(Parting { shared: self.shared.clone(), link: Some(Link::new(line, false)) }));
                }
                Err(ClientError::SessionExpired) => drop(self.shared.open().take()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}

impl Parting {
    pub(crate) fn link(&self) -> Option<&Arc<Link>> {
        self.link.as_ref()
    }

    /// Ends the session at the server, and everything under it.
    pub(crate) async fn end(mut self) -> Result<(), Failure> {
        let limit = self.shared.limit;
        if let Some(Link { line, .. }) = self.link.take().and_then(Arc::into_inner) {
            timeout(limit, line.hang_up()).await.map_err(|_| Failure::Late(limit))?;
        }
        self.shared.open().take();
        Ok(())
    }
}

impl Drop for Parting {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            link.line.end();
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.shared.state.borrow() {
            State::Connecting => "connecting".to_owned(),
            State::Connected(link) => format!("connected as {:#x}", link.session()),
            State::Disconnected(_) => "disconnected".to_owned(),
            State::Refused(_) => "refused".to_owned(),
            State::Closed => "closed".to_owned(),
        };
        write!(f, "Session({state})")
    }
}

impl Shared {
    fn emit(&self, event: SessionEvent) {
        debug!(backend = NAME, ?event, "session");
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    /// Whether the server lacks what came with 3.6.
    async fn is_too_old(&self, line: &Line) -> bool {
        let asked = timeout(self.limit, line.client.list_ephemerals("/zookeeper")).await;
        matches!(asked, Ok(Err(ClientError::Unimplemented)))
    }

    fn open(&self) -> MutexGuard<'_, Option<SessionInfo>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn new(line: Line, is_unchecked: bool) -> Arc<Self> {
        let is_unchecked = AtomicBool::new(is_unchecked);
        Arc::new(Self { line, id: rand::random(), is_unchecked, heard: Mutex::new(Instant::now()) })
    }

    fn heard(&self) -> MutexGuard<'_, Instant> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody has to look what is there.
    pub(crate) fn is_unchecked(&self) -> bool {
        self.is_unchecked.load(Ordering::Relaxed)
    }

    pub(crate) fn checked(&self) {
        self.is_unchecked.store(false, Ordering::Relaxed);
    }

    pub(crate) fn client(&self) -> &Client {
        &self.line.client
    }

    pub(crate) fn session(&self) -> i64 {
        self.line.client.session_id().0
    }
}

/// What is heard of a session without a connection.
enum Heard {
    /// The client came back by itself.
    Back,
    /// The client will not come back.
    GaveUp,
    /// What the server says.
    Verdict(Verdict),
}

/// Keeps the session, or a session.
struct Supervisor {
    shared: Arc<Shared>,
    /// The session is over, or presumed to be, and that was told.
    lost: bool,
}

impl Supervisor {
    async fn run(mut self) {
        let mut link = self.open().await;
        loop {
            self.connected(&link);
            let heard = self.until_disconnected(&link).await;
            self.shared.state.send_replace(State::Disconnected("the connection was lost".into()));
            self.shared.emit(SessionEvent::Suspended);
            link = match self.recover(link, heard).await {
                Some(link) => link,
                None => self.open().await,
            };
        }
    }

    fn connected(&mut self, link: &Arc<Link>) {
        self.shared.open().replace(link.client().session().clone());
        self.shared.state.send_replace(State::Connected(link.clone()));
        self.shared.emit(link.line.connected());
        if std::mem::take(&mut self.lost) {
            self.shared.emit(SessionEvent::Renewed);
        }
    }

    fn lose(&mut self) {
        if !std::mem::replace(&mut self.lost, true) {
            self.shared.emit(SessionEvent::Lost);
        }
    }

    /// A new session, however long it takes.
    async fn open(&mut self) -> Arc<Link> {
        loop {
            let began = Instant::now();
            let error = match self.shared.dialer.open(None, true).await {
                Ok(line) if self.shared.is_too_old(&line).await => {
                    line.end();
                    Err(Failure::TooOld(self.shared.dialer.server_version().await))
                }
                Ok(line) => {
                    let (session, ttl) = (line.client.session_id(), line.client.session_timeout());
                    info!(backend = NAME, %session, ?ttl, "opened a session");
                    return Link::new(line, false);
                }
                Err(error) => Ok(error),
            };
            let failure = match error {
                Ok(error) => self.shared.dialer.reason(error, began.elapsed()).await,
                Err(failure) => failure,
            };
            sleep(self.not_connected(failure)).await;
        }
    }

    /// Waits until a link has lost its connection or its server is silent, and returns when that one was heard last.
    async fn until_disconnected(&self, link: &Link) -> Instant {
        let every = link.client().session_timeout() / CHECKS;
        let mut states = link.client().state_watcher();
        while link.line.is_connected() {
            let heard = *link.heard();
            tokio::select! {
                _ = states.changed() => {}
                () = sleep_until(heard + every), if self.shared.dialer.is_alone() => {
                    // Unless somebody else was answered meanwhile.
                    if *link.heard() == heard && !self.is_answered(link).await {
                        return heard;
                    }
                }
            }
        }
        Instant::now()
    }

    /// Asks the server something on its link.
    async fn is_answered(&self, link: &Link) -> bool {
        let is_answered = self.shared.dialer.is_answered(&link.line).await;
        if is_answered {
            *link.heard() = Instant::now();
        }
        is_answered
    }

    /// The session of a link that lost its connection, and was `heard` of then, on a connection again; `None` if the
    /// session is gone.
    async fn recover(&mut self, mut link: Arc<Link>, heard: Instant) -> Option<Arc<Link>> {
        let mut over = heard + link.client().session_timeout();
        let mut states = link.client().state_watcher();
        let mut wait = if link.client().state().is_terminated() { Duration::ZERO } else { GRACE };
        loop {
            // Also what happened before we began to listen.
            if link.line.is_connected() && self.is_answered(&link).await {
                return Some(link);
            }
            match self.hear(&link, &mut states, wait, over).await {
                Heard::Back => wait = GRACE,
                Heard::GaveUp => wait = Duration::ZERO,
                Heard::Verdict(Verdict::Kept(line)) => {
                    link.line.end();
                    // The server may be behind what we have seen. Whatever is asked next waits until it has caught up:
                    // requests are answered in order, and this one leaves at once.
                    drop(line.client.sync("/"));
                    link = Link::new(line, true);
                    over = Instant::now() + link.client().session_timeout();
                    (states, wait) = (link.client().state_watcher(), GRACE);
                }
                Heard::Verdict(Verdict::Gone) => {
                    warn!(backend = NAME, session = %link.client().session_id(), "the session is gone");
                    link.line.end();
                    self.shared.open().take();
                    self.lose();
                    return None;
                }
                Heard::Verdict(Verdict::Unknown(failure)) => wait = self.not_connected(failure),
            }
        }
    }

    /// Asks the server after a while, unless the client tells something before.
    async fn hear(&mut self, link: &Link, states: &mut StateWatcher, wait: Duration, over: Instant) -> Heard {
        let (shared, session) = (self.shared.clone(), link.client().session().clone());
        let asked = async {
            sleep(wait).await;
            shared.dialer.ask(session).await
        };
        tokio::pin!(asked);
        loop {
            tokio::select! {
                biased;
                state = states.changed() => match state {
                    SessionState::SyncConnected => return Heard::Back,
                    state if state.is_terminated() => return Heard::GaveUp,
                    _ => {}
                },
                () = sleep_until(over), if !self.lost => {
                    warn!(backend = NAME, "no server answered for a ttl: the session may be over");
                    self.lose();
                }
                verdict = &mut asked => return Heard::Verdict(verdict),
            }
        }
    }

    /// Says why there is no connection, and how long to wait before the next attempt.
    fn not_connected(&self, failure: Failure) -> Duration {
        debug!(backend = NAME, %failure, "not connected");
        let refused = matches!(failure, Failure::Refused(_) | Failure::TooOld(_));
        self.shared.state.send_replace(match failure {
            Failure::Refused(_) | Failure::TooOld(_) => State::Refused(failure),
            Failure::Disconnected(why) => State::Disconnected(why),
            other => State::Disconnected(other.to_string().into()),
        });
        // Half as long to one and a half times as long, so that those who lost it together do not ask together.
        (if refused { REFUSED } else { PROBE }).mul_f64(0.5 + rand::random::<f64>())
    }
}
