//! One client per endpoint, one of them current.
//!
//! The client crate can balance over several endpoints itself, but it keeps going back to those that are dead or accept
//! connections and never answer. So each endpoint has a client of its own, and every call goes to the current one:
//!
//! ```text
//! current ──a call or the probe fails──▶ race: ask all for their status ──first with a leader──▶ current
//! ```
//!
//! An attempt that failed may have been applied, so everything that goes through [`Pool::call`] must bear repetition.

use std::{
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};

use etcd_client::{Client, ConnectOptions, Error as ClientError, WatchResponse};
use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use registry_core::{Error, ErrorKind, Result, SessionEvent};
use registry_tls::{Handshake, Tls};
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::{Mutex, broadcast, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};

use crate::{
    config::EtcdConfig,
    error::{Class, Failure, NAME, classify, render},
    space::Range,
    streams::{Streams, Watch},
};

/// How long one endpoint may take to answer before another one is asked, while there is another one.
const ATTEMPT: Duration = Duration::from_millis(600);
/// The time between two probes of the current endpoint, on average.
const PROBE: Duration = Duration::from_millis(500);
/// The same while a single endpoint serves, since it last answered anything: there is nowhere to go. A little more than
/// the time between two renewals by default, so that whoever keeps a lease need not ask for anything else.
const PROBE_ONLY: Duration = Duration::from_secs(6);
/// The current endpoint's handicap in a race: it has just failed.
const HANDICAP: Duration = Duration::from_millis(30);
/// The first and the longest pause between two attempts of one call.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(320);
/// How often one call signs in again.
const SIGN_INS: u32 = 2;
/// Events that are kept until somebody listens.
const EVENTS: usize = 64;

/// The endpoints, and which of them is current.
pub(crate) struct Pool {
    members: Vec<Arc<Member>>,
    user: Option<(String, SecretString)>,
    limit: Duration,
    attempt: Duration,
    current: watch::Sender<Current>,
    /// When the current endpoint answered last.
    answered: watch::Sender<Instant>,
    /// Single flight: one race serves all calls that failed meanwhile.
    racing: Mutex<()>,
    events: broadcast::Sender<SessionEvent>,
    ttl: watch::Sender<Duration>,
    /// Ends the probe with the pool.
    _probe: DropGuard,
}

struct Member {
    address: String,
    client: Client,
    streams: Streams,
    /// Finds out why TLS does not come about, where it is talked, under this name.
    handshake: Option<(Handshake, ServerName<'static>)>,
    /// How often we signed in here.
    signed_in: Mutex<u64>,
}

#[derive(Clone, Debug)]
struct Current {
    index: usize,
    /// Raised by every move to another endpoint.
    generation: u64,
    verdict: Verdict,
    /// How often somebody came to a verdict.
    verdicts: u64,
}

/// What an endpoint, or the best of them all, turned out to be.
#[derive(Clone, Debug)]
enum Verdict {
    Serving,
    /// It answers, but there is no leader.
    Electing,
    Silent,
    /// TLS does not come about, for this reason.
    Refused(Arc<str>),
}

/// Follows which endpoint is current.
pub(crate) struct Moves {
    generation: u64,
    current: watch::Receiver<Current>,
}

impl Pool {
    /// Checks the configuration and starts looking for a server. Also gives the events from the first one on.
    pub(crate) fn new(config: &EtcdConfig, ttl: Duration) -> Result<(Arc<Self>, broadcast::Receiver<SessionEvent>)> {
        config.validate()?;
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| Error::invalid("the etcd backend must be made within a tokio runtime").with_backend(NAME))?;
        let options = config.connect_options()?;
        let tls = match &config.tls {
            None => None,
            Some(tls) => {
                let mut config = tls.client_config().map_err(|error| error.with_backend(NAME))?;
                config.alpn_protocols.push(b"h2".to_vec());
                Some((tls, Handshake::new(Arc::new(config))))
            }
        };
        let limit = config.options.request_timeout;
        let connect = |address| {
            let streams = Streams::new(limit, runtime.clone());
            Member::new(address, &options, tls.as_ref(), streams).map(Arc::new)
        };
        let members = config.addresses()?.into_iter().map(connect).collect::<Result<_>>()?;
        let (events, first_events) = broadcast::channel(EVENTS);
        let stop = CancellationToken::new();
        let pool = Arc::new(Self {
            members,
            user: config.user.clone().zip(config.password.clone()),
            limit,
            attempt: ATTEMPT.min(limit / 3),
            current: watch::Sender::new(Current { index: 0, generation: 0, verdict: Verdict::Silent, verdicts: 0 }),
            answered: watch::Sender::new(Instant::now()),
            racing: Mutex::default(),
            events,
            ttl: watch::Sender::new(ttl),
            _probe: stop.clone().drop_guard(),
        });
        pool.emit(SessionEvent::Connecting);
        runtime.spawn(probe(Arc::downgrade(&pool), stop));
        Ok((pool, first_events))
    }

    pub(crate) fn events(&self) -> broadcast::Receiver<SessionEvent> {
        self.events.subscribe()
    }

    pub(crate) fn emit(&self, event: SessionEvent) {
        // Nobody listens: then nobody is told.
        let _ = self.events.send(event);
    }

    /// The store granted this ttl. Tells it if it is news.
    pub(crate) fn granted(&self, ttl: Duration) {
        if self.ttl.send_if_modified(|now| std::mem::replace(now, ttl) != ttl) {
            self.emit(SessionEvent::Connected { ttl });
        }
    }

    /// Asks the current endpoint, and another one as long as it does not answer; `request` must bear repetition.
    pub(crate) async fn call<T, F>(&self, request: impl Fn(&Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        self.call_member(|member| request(&member.client)).await.map(|(answer, _)| answer)
    }

    /// Watches a range from the revision `start` on. Also gives the server's answer, and the news that its endpoint is
    /// left.
    pub(crate) async fn watch(&self, range: &Range, start: i64) -> Result<((Watch, WatchResponse), Moves), Failure> {
        self.call_member(|member| {
            let (member, range) = (member.clone(), range.clone());
            async move { member.streams.watch(&member.client, &range, start).await }
        })
        .await
    }

    /// Like [`call`](Self::call), and tells when the endpoint that answered is left.
    async fn call_member<T, F>(&self, request: impl Fn(&Arc<Member>) -> F) -> Result<(T, Moves), Failure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let deadline = Instant::now() + self.limit;
        let (mut attempts, mut sign_ins) = (0, 0);
        loop {
            let seen = self.current.borrow().clone();
            let member = &self.members[seen.index];
            let (signed_in, outcome) = self.attempt(member, &request, attempts, deadline).await;
            let failure = match outcome {
                Ok(answer) => {
                    self.served(&seen);
                    return Ok((answer, Moves { generation: seen.generation, current: self.current.subscribe() }));
                }
                Err(failure) => failure,
            };
            debug!(backend = NAME, endpoint = member.address, error = %failure, "a request failed");
            match failure.class() {
                Class::Token | Class::NoUsers if self.user.is_some() && sign_ins < SIGN_INS => {
                    sign_ins += 1;
                    // If this fails, the next attempt tells.
                    let _ = timeout(self.limit, Box::pin(self.sign_in(member, signed_in))).await;
                    continue;
                }
                Class::Elsewhere | Class::Certificate if Instant::now() < deadline => {}
                _ => return Err(failure),
            }
            let leave = self.leave(&seen, matches!(failure, Failure::Late(_)));
            match timeout_at(deadline, Box::pin(leave)).await.unwrap_or(Verdict::Silent) {
                Verdict::Serving | Verdict::Electing => {}
                // A certificate that one member refuses is final only if they all do.
                Verdict::Silent if failure.class() == Class::Certificate && self.members.len() > 1 => {
                    return Err(Failure::Nobody(failure.to_string()));
                }
                Verdict::Silent => return Err(failure),
                Verdict::Refused(why) => return Err(Failure::Refused(why)),
            }
            attempts += 1;
            sleep((PAUSE * 2u32.pow(attempts.min(5) - 1)).min(LONGEST_PAUSE)).await;
        }
    }

    /// One attempt, signing in first where that is due; also tells how often we had signed in before.
    async fn attempt<T, F>(
        &self,
        member: &Arc<Member>,
        request: &impl Fn(&Arc<Member>) -> F,
        attempts: u32,
        deadline: Instant,
    ) -> (u64, Result<T, Failure>)
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let left = deadline.saturating_duration_since(Instant::now());
        // With nowhere else to go a slow answer is better than none; and when all were slow, be more patient.
        let rounds = attempts / self.members.len() as u32;
        let patience = if self.members.len() == 1 { left } else { left.min(self.attempt * 2u32.pow(rounds.min(10))) };
        let answer = async {
            let mut signed_in = 0;
            if self.user.is_some() {
                signed_in = *member.signed_in.lock().await;
                // Boxed, as all that is rare and large: else every request would have room for it.
                if signed_in == 0
                    && let Err(error) = Box::pin(self.sign_in(member, 0)).await
                {
                    return (0, Err(Failure::Client(error)));
                }
            }
            (signed_in, request(member).await.map_err(Failure::Client))
        };
        timeout(patience, answer).await.unwrap_or((0, Err(Failure::Late(patience))))
    }

    /// Signs in, unless somebody did since it was done `seen` times.
    async fn sign_in(&self, member: &Member, seen: u64) -> Result<(), ClientError> {
        let Some((name, password)) = &self.user else { return Ok(()) };
        let mut signed_in = member.signed_in.lock().await;
        if *signed_in == seen {
            let user = Some((name.clone(), password.expose_secret().to_owned()));
            let mut client = member.client.clone();
            match client.update_user(user).await {
                // Then a token would be refused, too.
                Err(error) if classify(&error) == Class::NoUsers => client.update_user(None).await?,
                other => other?,
            }
            *signed_in += 1;
        }
        Ok(())
    }

    /// The current endpoint answered.
    fn served(&self, seen: &Current) {
        self.answered.send_replace(Instant::now());
        if !matches!(self.current.borrow().verdict, Verdict::Serving) {
            self.judge(seen.index, Verdict::Serving);
        }
    }

    /// Looks for an endpoint that serves, unless somebody came to a verdict since `seen`. One that was `late` would
    /// be late again.
    async fn leave(&self, seen: &Current, late: bool) -> Verdict {
        let _single_flight = self.racing.lock().await;
        let now = self.current.borrow().clone();
        if now.verdicts != seen.verdicts {
            return now.verdict;
        }
        let (index, verdict) = self.race(now.index, late && self.members.len() > 1).await;
        self.judge(index, verdict.clone());
        verdict
    }

    /// The first endpoint with a leader, or else the best of the others.
    async fn race(&self, current: usize, without_it: bool) -> (usize, Verdict) {
        let runners = (0..self.members.len()).filter(|&index| !(without_it && index == current));
        let mut race: FuturesUnordered<_> = runners
            .map(|index| async move {
                if index == current && self.members.len() > 1 {
                    sleep(HANDICAP).await;
                }
                (index, self.status(&self.members[index]).await)
            })
            .collect();
        let mut best = None;
        while let Some((index, verdict)) = race.next().await {
            best = Some(match (verdict, best) {
                (Verdict::Serving, _) => return (index, Verdict::Serving),
                (Verdict::Electing, _) => (index, Verdict::Electing),
                (_, Some((other, Verdict::Electing))) => (other, Verdict::Electing),
                (Verdict::Refused(why), None | Some((_, Verdict::Refused(_)))) => (current, Verdict::Refused(why)),
                _ => (current, Verdict::Silent),
            });
        }
        best.unwrap_or((current, Verdict::Silent))
    }

    async fn status(&self, member: &Member) -> Verdict {
        // The only one is not left for being slow: to connect and to read anew would make it slower.
        let patient = self.limit.min((*self.ttl.borrow() / 3).max(self.attempt));
        let patience = if self.members.len() == 1 { patient } else { self.attempt };
        let error = match timeout(patience, member.client.maintenance_client().status()).await {
            Ok(Ok(status)) if status.leader() != 0 => return Verdict::Serving,
            Ok(Ok(_)) => return Verdict::Electing,
            Ok(Err(error)) => error,
            Err(_) => return Verdict::Silent,
        };
        let text = render(&error);
        match classify(&error) {
            Class::Certificate => Verdict::Refused(text.into()),
            // As we require a leader, its absence comes as an error.
            Class::Elsewhere if text.contains("no leader") => Verdict::Electing,
            Class::Elsewhere if text.contains("tcp connect error") => Verdict::Silent,
            Class::Elsewhere => self.silence(member).await,
            // It answers, even if not that.
            _ => Verdict::Serving,
        }
    }

    /// Whether a member that broke off does not like our certificate: the client often fails to read so.
    async fn silence(&self, member: &Member) -> Verdict {
        let Some((handshake, name)) = &member.handshake else { return Verdict::Silent };
        handshake.refusal(&member.address, name, self.attempt).await.map_or(Verdict::Silent, Verdict::Refused)
    }

    fn judge(&self, index: usize, verdict: Verdict) {
        let serves = matches!(verdict, Verdict::Serving);
        let (mut served, mut moved) = (false, false);
        self.current.send_modify(|current| {
            served = matches!(current.verdict, Verdict::Serving);
            moved = current.index != index;
            current.generation += u64::from(moved);
            current.verdicts += 1;
            (current.index, current.verdict) = (index, verdict);
        });
        let endpoint = &self.members[index].address;
        match (served, serves) {
            (true, true) if moved => info!(backend = NAME, endpoint, "moved to another endpoint"),
            (false, true) => {
                info!(backend = NAME, endpoint, "connected");
                self.emit(SessionEvent::Connected { ttl: *self.ttl.borrow() });
            }
            (true, false) => {
                warn!(backend = NAME, "no endpoint serves");
                self.emit(SessionEvent::Suspended);
            }
            _ => {}
        }
    }

    /// Finds out whether the current endpoint still serves, unless it is alone and has just shown that: a stream on a
    /// frozen one cannot tell by itself. Tells when to look again.
    async fn check(&self) -> Duration {
        let pause = |pause: Duration| pause.mul_f64(rand::random_range(0.9..1.1));
        let seen = self.current.borrow().clone();
        let alone = self.members.len() == 1;
        let rarely = pause(PROBE_ONLY);
        let quiet = || self.answered.borrow().elapsed();
        if !(alone && matches!(seen.verdict, Verdict::Serving) && quiet() < rarely) {
            match self.status(&self.members[seen.index]).await {
                Verdict::Serving => self.served(&seen),
                verdict if alone => self.judge(0, verdict),
                verdict => drop(self.leave(&seen, !matches!(verdict, Verdict::Electing)).await),
            }
        }
        let serves = matches!(self.current.borrow().verdict, Verdict::Serving);
        if serves && alone { rarely.saturating_sub(quiet()) } else { pause(PROBE) }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoints: Vec<_> = self.members.iter().map(|member| &member.address).collect();
        f.debug_struct("Pool").field("endpoints", &endpoints).field("current", &*self.current.borrow()).finish()
    }
}

impl Member {
    fn new(
        address: String,
        options: &ConnectOptions,
        tls: Option<&(&Tls, Handshake)>,
        streams: Streams,
    ) -> Result<Self> {
        let url = format!("{}://{address}", if tls.is_some() { "https" } else { "http" });
        // Without a user, connecting waits for nothing: it only checks what it is given.
        let connected = tokio::task::unconstrained(Client::connect([url], Some(options.clone()))).now_or_never();
        match connected {
            Some(Ok(client)) => {
                let host = address.rsplit_once(':').map_or(&*address, |(host, _)| host);
                let handshake = tls.map(|(tls, handshake)| Ok((handshake.clone(), tls.expected_name(host)?)));
                Ok(Self {
                    handshake: handshake.transpose().map_err(|error: Error| error.with_backend(NAME))?,
                    address: address.clone(),
                    client,
                    streams,
                    signed_in: Mutex::default(),
                })
            }
            Some(Err(error)) => {
                Err(Error::invalid(format!("cannot use {address}")).with_backend(NAME).with_source(render(&error)))
            }
            None => {
                let message = format!("cannot use {address}: the client does not get ready");
                Err(Error::new(ErrorKind::Unavailable, message).with_backend(NAME))
            }
        }
    }
}

impl Moves {
    /// Returns once another endpoint is current, or this one does not serve: a stream on a frozen server cannot tell.
    pub(crate) async fn moved(&mut self) {
        let generation = self.generation;
        let left = |current: &Current| current.generation != generation || !matches!(current.verdict, Verdict::Serving);
        if self.current.wait_for(left).await.is_err() {
            // The pool is gone, and with it whoever could move.
            std::future::pending().await
        }
    }
}

async fn probe(pool: Weak<Pool>, stop: CancellationToken) {
    let probes = async {
        while let Some(pool) = pool.upgrade() {
            let pause = pool.check().await;
            drop(pool);
            sleep(pause).await;
        }
    };
    stop.run_until_cancelled(probes).await;
}
