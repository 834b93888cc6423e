//! *Keep*, one task per registry: what is registered and what the store holds are made the same, for ever.
//!
//! * a **beat** every third of the ttl renews the session and learns what is missing;
//! * the slower **check** compares what the store holds with what is wanted, both ways;
//! * what is missing is put again, in batches, spread and bounded; what nobody wants is removed until that is
//!   confirmed; failures are tried again for ever, with back-off.
//!
//! Writes of one key never overlap, and a renewal never waits behind them.

use std::{
    collections::{BTreeMap, HashSet},
    future::ready,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use tokio::{
    runtime::Handle,
    sync::oneshot,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{
    Shared,
    backoff::{Backoff, part_of},
    lock, metrics,
    schedule::Schedule,
    slots::{Due, Next, Put},
};
use crate::{
    Backend, Directory, Epoch, Error, ErrorKind, Event, Few, Intent, Key, Registration, Renewal, Result, ServiceName,
    SessionEvent, error::Chain,
};

/// A claim that is answered within this is waited for, also by who is to leave.
const CLAIM_GRACE: Duration = Duration::from_millis(300);
/// How many batches are in flight at most: enough to fill the line, few enough that batches form.
const MOST_WRITES: usize = 4;
/// How many keys a batch holds at most, so that one deadline fits it.
const MOST_KEYS: usize = 1000;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// What the store refuses, such as a missing permission, is tried again this rarely.
const REFUSED_RETRY: Duration = Duration::from_secs(30);
/// Restores start within this time after a loss, so that processes that lost theirs together do not put together.
const RESTORE_SPREAD: Duration = Duration::from_secs(1);
/// After the store comes back, the beats of its clients fall within this time.
const WAKE_SPREAD: Duration = Duration::from_millis(100);

/// What a heartbeat asked for by a user learned: the keys that are there, and answers to come for the others.
pub(super) type Beaten = (Vec<Key>, Vec<(Key, oneshot::Receiver<Result<()>>)>);

pub(super) struct Keep<B: Backend> {
    shared: Arc<Shared<B>>,
    session: BoxStream<'static, SessionEvent>,
    schedule: Schedule,
    running: Few<BoxFuture<'static, Done>>,
    writes: usize,
    /// Writes that found the store out of reach, together.
    backoff: Backoff,
    renewing: bool,
    /// The next regular beat. Its phase is random and stays, whatever is renewed out of turn.
    beat_at: Instant,
    /// A renewal out of turn: after a failure, or because the store is back.
    renew_at: Option<Instant>,
    renew_backoff: Backoff,
    checking: bool,
    check_at: Option<Instant>,
    /// When a write last ended without an answer: the store may come to hold what nobody wants, or lose what is.
    left_at: Option<Instant>,
    /// How long records outlive us, as far as the store told.
    ttl: Duration,
    /// Until when the last answered renewal keeps the session alive; `None` before the first put.
    alive_until: Option<Instant>,
    presumed_lost: bool,
    /// Users were told so.
    lost_told: bool,
    /// Heartbeats asked for, waiting for a renewal, then for a check.
    renew_for: Vec<oneshot::Sender<Result<Beaten>>>,
    check_for: Vec<oneshot::Sender<Result<Beaten>>>,
    checking_for: Vec<oneshot::Sender<Result<Beaten>>>,
}

/// What became of each record of a batch.
pub(super) type Written = Vec<(Put, Result<Epoch>)>;

/// The end of something that was in flight.
enum Done {
    Put(Instant, Written),
    Removed(Vec<(Key, Result<bool>)>),
    Renewed(Instant, Result<Renewal>),
    Checked(Instant, Result<Vec<Key>>, Vec<(Key, bool)>),
}

impl<B: Backend> Keep<B> {
    pub(super) fn new(shared: Arc<Shared<B>>, schedule: Schedule) -> Self {
        let ttl = shared.options.ttl;
        // Fused: a stream must not be asked again after its end.
        let session = shared.backend.events().fuse().boxed();
        Self {
            session,
            schedule,
            running: Few::default(),
            writes: 0,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY.min(ttl / 3)),
            renewing: false,
            beat_at: Instant::now() + part_of(ttl / 3),
            renew_at: None,
            renew_backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY.min(ttl / 3)),
            checking: false,
            check_at: None,
            left_at: None,
            ttl,
            alive_until: None,
            presumed_lost: false,
            lost_told: false,
            renew_for: Vec::new(),
            check_for: Vec::new(),
            checking_for: Vec::new(),
            shared,
        }
    }

    pub(super) async fn run(mut self) {
        let stop = self.shared.stop.clone();
        let outcome = stop.run_until_cancelled(self.keep()).await;
        if let Some(outcome) = outcome {
            self.shared.finish(outcome);
        }
    }

    /// Keeps until `destroy`, whose outcome it returns.
    async fn keep(&mut self) -> Result<()> {
        loop {
            if let Some(deadline) = self.shared.closing() {
                return self.close(deadline).await;
            }
            self.take_over();
            self.start_what_is_due();
            let next = self.next_wake();
            tokio::select! {
                // What an outcome means depends on what happened to the session before.
                biased;
                Some(event) = self.session.next() => self.session_event(event),
                Some(done) = self.running.next(), if !self.running.is_empty() => self.settle(done),
                () = self.shared.wake.notified() => {}
                () = sleep_until(next) => {}
                delay = self.schedule.tick() => {
                    let at = Instant::now() + delay;
                    self.check_at = Some(self.check_at.map_or(at, |before| before.min(at)));
                    self.shared.reconcile.send_modify(|ticks| *ticks += 1);
                }
            }
        }
    }

    fn next_wake(&self) -> Instant {
        let writable = if self.writes < MOST_WRITES { self.shared.slots().next_due() } else { None };
        let renew = (!self.renewing).then(|| self.next_renewal());
        let check = self.check_at.filter(|_| !self.checking);
        let expiry = self.alive_until.filter(|_| !self.presumed_lost);
        let far = Instant::now() + Duration::from_secs(3600);
        [writable, renew, check, expiry].into_iter().flatten().min().unwrap_or(far)
    }

    fn next_renewal(&self) -> Instant {
        self.renew_at.map_or(self.beat_at, |at| at.min(self.beat_at))
    }

    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        self.presume_lost(now);
        self.renew_for.append(&mut self.shared.take_beats());
        if !self.renewing && (now >= self.next_renewal() || !self.renew_for.is_empty()) {
            self.renew(now);
        }
        let asked = self.check_at.is_some_and(|at| now >= at) || !self.check_for.is_empty();
        if !self.checking && asked {
            self.check(now);
        }
        while self.writes < MOST_WRITES {
            let due = self.shared.slots().take_due(self.shared.backend.owner(), now, MOST_KEYS);
            if due.len() == 0 {
                break;
            }
            self.write(due, now);
        }
    }

    fn write(&mut self, mut due: Due, now: Instant) {
        let removals = std::mem::take(&mut due.removals);
        if !removals.is_empty() {
            self.writes += 1;
            self.running.push(remove(self.shared.clone(), removals).map(Done::Removed).boxed());
        }
        for (intent, puts) in due.puts() {
            if !puts.is_empty() {
                self.writes += 1;
                let put = put(self.shared.clone(), puts, intent);
                self.running.push(put.map(move |done| Done::Put(now, done)).boxed());
            }
        }
    }

    fn renew(&mut self, now: Instant) {
        let period = self.ttl.min(self.shared.options.ttl) / 3;
        self.renew_at = None;
        if self.beat_at <= now {
            self.beat_at = (self.beat_at + period).max(now + period / 2);
        }
        let keys = self.shared.slots().held();
        self.renewing = true;
        let shared = self.shared.clone();
        let patience = shared.options.request_timeout.min(period);
        // Also without keys: the next registration must not land on a session that is about to end.
        let session = self.alive_until.is_some();
        let renewal = async move {
            if keys.is_empty() && !session {
                return Ok(Renewal::default());
            }
            let renewal = shared.in_time("renew", "renew the session", patience, shared.backend.renew(&keys)).await;
            metrics::beaten(shared.backend.name(), &renewal);
            renewal
        };
        self.running.push(renewal.map(move |outcome| Done::Renewed(now, outcome)).boxed());
    }

    fn check(&mut self, now: Instant) {
        self.check_at = None;
        self.checking = true;
        self.checking_for = std::mem::take(&mut self.check_for);
        let (keys, conflicts) = {
            let slots = self.shared.slots();
            (slots.held(), slots.conflicts())
        };
        let shared = self.shared.clone();
        let left_something = self.left_at.is_some();
        let check = async move {
            let held = if keys.is_empty() && conflicts.is_empty() && !left_something {
                Ok(Vec::new())
            } else {
                let (patience, verify) = (shared.options.request_timeout, shared.backend.verify(&keys));
                shared.in_time("verify", "check the registrations", patience, verify).await
            };
            Done::Checked(now, held, look_at(&shared, conflicts).await)
        };
        self.running.push(check.boxed());
    }

    fn settle(&mut self, done: Done) {
        self.shared.metrics.changed();
        let now = Instant::now();
        match done {
            Done::Put(began, outcomes) => {
                self.writes -= 1;
                self.put_done(began, outcomes, now);
            }
            Done::Removed(outcomes) => {
                self.writes -= 1;
                let mut retry = Vec::new();
                for (key, outcome) in outcomes {
                    let failure = outcome.as_ref().err().cloned();
                    let next = self.shared.slots().remove_done(&key, outcome, now);
                    self.next(key, next, failure, &mut retry, now);
                }
                self.retry(retry, now);
            }
            Done::Renewed(asked, outcome) => {
                self.renewing = false;
                self.renewed(asked, outcome, now);
            }
            Done::Checked(asked, held, conflicts) => {
                self.checking = false;
                self.checked(asked, held, &conflicts, now);
            }
        }
    }

    /// Goes on with what callers began.
    fn take_over(&mut self) {
        let begun = lock(&self.shared.begun).as_mut().map(std::mem::take);
        for (began, putting) in begun.into_iter().flatten() {
            self.writes += 1;
            self.running.push(putting.map(move |done| Done::Put(began, done)).boxed());
        }
    }

    fn put_done(&mut self, began: Instant, outcomes: Written, now: Instant) {
        let mut retry = Vec::new();
        for (put, outcome) in outcomes {
            if outcome.is_ok() {
                // The first put grants a session; only renewals lengthen it.
                self.alive_until.get_or_insert(began + self.ttl);
                self.shared.in_session.store(true, Ordering::Relaxed);
                self.backoff.reset();
            }
            let failure = outcome.as_ref().err().cloned();
            let (next, changed) = self.shared.slots().put_done(&put, outcome, now);
            self.shared.tell(changed);
            self.next(put.record.key, next, failure, &mut retry, now);
        }
        self.retry(retry, now);
    }

    fn next(&mut self, key: Key, next: Next, failure: Option<Error>, retry: &mut Vec<Key>, now: Instant) {
        if let Some(error) = failure {
            debug!(%key, error = %Chain(&error), "not written");
            if error.is_retryable() {
                // It may have been applied, or be applied late: look once everything in flight has settled.
                let later = now + self.shared.options.request_timeout;
                self.left_at = Some(now);
                self.check_at = Some(self.check_at.map_or(later, |before| before.min(later)));
            }
        }
        match next {
            Next::Done => {}
            Next::Retry => retry.push(key),
            Next::RetryRarely => {
                let at = now + REFUSED_RETRY / 2 + part_of(REFUSED_RETRY / 2);
                self.shared.slots().retry_rarely(&key, at);
            }
        }
    }

    fn retry(&mut self, keys: Vec<Key>, now: Instant) {
        if !keys.is_empty() {
            let start = now + self.backoff.next();
            self.shared.slots().retry(&keys, start, self.shared.options.register_rate);
        }
    }

    fn renewed(&mut self, asked: Instant, outcome: Result<Renewal>, now: Instant) {
        let waiting = std::mem::take(&mut self.renew_for);
        let renewal = match outcome {
            Ok(renewal) => renewal,
            Err(error) => {
                debug!(error = %Chain(&error), "not renewed");
                self.renew_at = Some(now + self.renew_backoff.next());
                waiting.into_iter().for_each(|beat| drop(beat.send(Err(error.clone()))));
                return;
            }
        };
        self.renew_backoff.reset();
        if self.alive_until.is_some() {
            self.alive_until = Some(asked + self.ttl.saturating_sub(renewal.age));
        }
        let cause = self.error(ErrorKind::Unavailable, "the session that held it is gone");
        // An answer that misses something may come before the word that the session is over.
        if renewal.missing.is_empty() {
            self.tell_renewed();
        }
        self.lost(renewal.missing, asked, &cause, now);
        if std::mem::take(&mut self.presumed_lost) {
            let kept = self.shared.slots().presume_kept();
            kept.into_iter().for_each(|registration| self.shared.tell(Some(registration)));
        }
        self.check_for.extend(waiting);
    }

    fn checked(&mut self, asked: Instant, held: Result<Vec<Key>>, conflicts: &[(Key, bool)], now: Instant) {
        let waiting = std::mem::take(&mut self.checking_for);
        let held: HashSet<Key> = match held {
            Ok(held) => held.into_iter().collect(),
            Err(error) => {
                debug!(error = %Chain(&error), "not checked");
                waiting.into_iter().for_each(|beat| drop(beat.send(Err(error.clone()))));
                // What may have been left behind must still be found.
                if self.left_at.is_some() {
                    self.check_at.get_or_insert(now + self.shared.options.request_timeout);
                }
                return;
            }
        };
        let settled = self.shared.options.request_timeout;
        self.left_at = self.left_at.filter(|left| asked < *left + settled);
        let missing: Vec<Key> = {
            let mut slots = self.shared.slots();
            held.iter().for_each(|key| slots.orphan(key, now));
            slots.held().into_iter().filter(|key| !held.contains(key)).collect()
        };
        let cause = self.error(ErrorKind::Unavailable, "the store no longer holds it");
        self.lost(missing, asked, &cause, now);
        for (key, absent) in conflicts {
            let again = self.shared.slots().saw_conflict(key, *absent, self.ttl, now);
            if let Some(at) = again {
                self.check_at = Some(self.check_at.map_or(at, |before| before.min(at)));
            }
        }
        for beat in waiting {
            let _ = beat.send(Ok(self.shared.slots().beat(now)));
        }
    }

    /// Notes losses and schedules the restores: all of them within a second, or at `register_rate` if they are many.
    fn lost(&mut self, keys: Vec<Key>, asked: Instant, cause: &Error, now: Instant) {
        let mut restore = Vec::new();
        for key in keys {
            let (gone, changed) = self.shared.slots().lose(&key, asked, cause);
            self.shared.tell(changed);
            if gone {
                restore.push(key);
            }
        }
        if restore.is_empty() {
            return;
        }
        let rate = self.shared.options.register_rate;
        let needed = Duration::from_secs_f64(restore.len() as f64 / f64::from(rate));
        warn!(backend = self.shared.backend.name(), keys = restore.len(), cause = %cause, "registrations lost; restoring");
        let start = now + part_of(RESTORE_SPREAD.min(self.ttl / 3).saturating_sub(needed));
        self.shared.slots().retry(&restore, start, rate);
    }

    /// The session is over by our own clock if nothing renewed it for a ttl, whatever the client says.
    fn presume_lost(&mut self, now: Instant) {
        if self.presumed_lost || self.alive_until.is_none_or(|until| until > now) {
            return;
        }
        self.presumed_lost = true;
        let cause = self.error(ErrorKind::Timeout, &format!("no renewal was answered for {:?}", self.ttl));
        let lost = self.shared.slots().presume_lost(&cause);
        if lost.is_empty() {
            return;
        }
        warn!(backend = self.shared.backend.name(), keys = lost.len(), "the session is presumed lost");
        self.tell_lost(cause);
        lost.into_iter().for_each(|registration| self.shared.tell(Some(registration)));
    }

    /// Says that the session is lost, once: our own clock and the store may both find it.
    fn tell_lost(&mut self, cause: Error) {
        if !std::mem::replace(&mut self.lost_told, true) {
            self.shared.emit(Event::SessionLost { cause });
        }
    }

    fn tell_renewed(&mut self) {
        if std::mem::take(&mut self.lost_told) {
            self.shared.emit(Event::SessionRenewed);
        }
    }

    fn session_event(&mut self, event: SessionEvent) {
        let backend = self.shared.backend.name();
        let now = Instant::now();
        match event {
            SessionEvent::Connecting => self.shared.emit(Event::Connecting),
            SessionEvent::Suspended => {
                info!(backend, "connection lost");
                self.shared.emit(Event::Suspended);
            }
            SessionEvent::Lost => {
                let cause = self.error(ErrorKind::Unavailable, "the store ended the session");
                self.tell_lost(cause);
            }
            SessionEvent::Connected { ttl } => {
                if ttl != self.ttl {
                    info!(backend, asked = ?self.shared.options.ttl, granted = ?ttl, "the store grants another ttl");
                }
                self.ttl = ttl;
                self.shared.emit(Event::Connected { ttl });
                self.wake(now);
            }
            SessionEvent::Renewed => {
                self.tell_renewed();
                self.wake(now);
            }
        }
    }

    /// The store is back: beat at once, and bring forward what waits.
    fn wake(&mut self, now: Instant) {
        self.renew_at = Some(now + part_of(WAKE_SPREAD.min(self.ttl / 3)));
        self.renew_backoff.reset();
        self.backoff.reset();
        let start = now + part_of(RESTORE_SPREAD.min(self.ttl / 3));
        self.shared.slots().hasten(start, self.shared.options.register_rate);
        self.shared.connected.send_modify(|times| *times += 1);
    }

    fn error(&self, kind: ErrorKind, message: &str) -> Error {
        Error::new(kind, message).with_backend(self.shared.backend.name())
    }

    /// Joins what is in flight, then takes everything out and gives up the session.
    async fn close(&mut self, deadline: Instant) -> Result<()> {
        // A claim that hangs is not waited for: it would take the key from whoever has come meanwhile, only to take it out.
        self.shared.leaving.cancel();
        // What else is in flight gets half of the time at most: leaving in good order needs the rest.
        let joined = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        while self.shared.slots().any_busy() {
            tokio::select! {
                Some(done) = self.running.next() => self.settle(done),
                () = self.shared.wake.notified() => self.take_over(),
                () = sleep_until(joined) => break,
            }
        }
        // What nobody waits for any more must not hold what leaving needs.
        self.running.clear();
        self.shared.left.cancel();
        let keys = self.shared.slots().to_close();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match self.shared.in_time("close", "deregister", left, self.shared.backend.close(&keys)).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let again = Instant::now() + backoff.next();
            if again >= deadline || !error.is_retryable() {
                warn!(keys = keys.len(), error = %Chain(&error), "not deregistered; the records expire by themselves");
                return Err(error);
            }
            sleep_until(again).await;
        }
    }
}

/// However the task ends, also with its runtime: nobody waits for an answer that cannot come.
impl<B: Backend> Drop for Keep<B> {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}

/// A put that its caller makes. If the caller goes before it has ended, the loop goes on with it.
struct Direct<B: Backend> {
    shared: Arc<Shared<B>>,
    began: Instant,
    putting: Option<Putting>,
}

impl<B: Backend> Drop for Direct<B> {
    fn drop(&mut self) {
        if let Some(putting) = self.putting.take() {
            self.shared.hand_over(self.began, putting);
        }
    }
}

/// A put that is under way.
pub(super) type Putting = BoxFuture<'static, Written>;

impl<B: Backend> Shared<B> {
    /// Gives the loop what a caller began, as long as there is a loop.
    fn hand_over(&self, began: Instant, putting: Putting) {
        if let Some(begun) = lock(&self.begun).as_mut() {
            begun.push((began, putting));
        }
        self.wake.notify_one();
    }

    /// Takes in what a caller put.
    fn put_alone_done(&self, began: Instant, written: Written) {
        let now = Instant::now();
        match written.as_slice() {
            // The common case needs nothing of the loop.
            [(put, Ok(epoch))] if self.in_session.load(Ordering::Relaxed) => {
                let mut slots = self.slots();
                let (_, changed) = slots.put_done(put, Ok(*epoch), now);
                let more = slots.closing || slots.next_due().is_some_and(|at| at <= now);
                drop(slots);
                self.metrics.changed();
                self.tell(changed);
                if more {
                    self.wake.notify_one();
                }
            }
            _ => self.hand_over(began, ready(written).boxed()),
        }
    }

    /// Has what is due under `key` put, and gives its answer. If there is nothing else to do, the caller's own task puts it,
    /// which saves the way to the loop and back; else the loop does, with whatever else is due.
    pub(super) async fn put_now(
        self: &Arc<Self>,
        doing: &str,
        key: &Key,
        answer: oneshot::Receiver<Result<()>>,
    ) -> Result<()> {
        let by = self.answer_by();
        // What the backend makes on the way, such as a connection, must live as long as the registry.
        let at_home = Handle::try_current().is_ok_and(|handle| handle.id() == self.runtime.id());
        let now = Instant::now();
        let alone = at_home.then(|| self.slots().take_alone(self.backend.owner(), key, now)).flatten();
        match alone {
            Some((intent, put)) => self.put_alone(put, intent, now).await,
            None => self.wake.notify_one(),
        }
        self.answered_by(by, doing, answer).await
    }

    async fn put_alone(self: &Arc<Self>, put: Put, intent: Intent, began: Instant) {
        let putting = self::put(self.clone(), vec![put], intent);
        let mut direct = Direct { shared: self.clone(), began, putting: Some(putting) };
        let Some(putting) = &mut direct.putting else { return };
        tokio::select! {
            written = putting => {
                direct.putting = None;
                self.put_alone_done(began, written);
            }
            // Nobody waits for it any more.
            () = self.left.cancelled() => direct.putting = None,
        }
    }

    pub(super) fn tell(&self, changed: Option<Registration>) {
        let Some(registration) = changed else { return };
        let (service, instance) = (registration.service(), registration.id());
        match &registration.state {
            crate::RegistrationState::Lost { cause, .. } => warn!(%service, %instance, cause = %Chain(cause), "lost"),
            state => info!(%service, %instance, %state, "registration"),
        }
        self.emit(Event::Registration(registration));
    }
}

/// Puts a batch, and its halves again where it was refused as a whole, until the bad record stands alone.
fn put<B: Backend>(shared: Arc<Shared<B>>, puts: Vec<Put>, intent: Intent) -> Putting {
    Box::pin(async move {
        let records: Vec<_> = puts.iter().map(|put| put.record.clone()).collect();
        let attempt = timeout(shared.options.request_timeout, shared.backend.put(&records, intent));
        let patient_until = Instant::now() + CLAIM_GRACE;
        let given_up = async {
            shared.leaving.cancelled().await;
            sleep_until(patient_until).await;
        };
        let attempt = match intent {
            Intent::Claim => tokio::select! {
                attempt = attempt => Some(attempt),
                () = given_up => None,
            },
            Intent::Restore => Some(attempt.await),
        };
        let left = attempt.is_none();
        let outcomes = match attempt {
            Some(Ok(outcomes)) => outcomes,
            Some(Err(_)) => vec![Err(shared.late("register")); puts.len()],
            // It may have been applied all the same.
            None => vec![Err(Error::new(ErrorKind::Unavailable, "the registry is being destroyed")); puts.len()],
        };
        let outcomes = one_each(outcomes, puts.len());
        if !left {
            metrics::called_with_batch(shared.backend.name(), "put", &outcomes);
        }
        let alone = puts.len() == 1;
        let mut done = Vec::with_capacity(puts.len());
        let mut suspects = Vec::new();
        for (put, outcome) in puts.into_iter().zip(outcomes) {
            match outcome {
                Err(error) if !alone && !error.is_retryable() && error.kind() != ErrorKind::Conflict => {
                    suspects.push(put)
                }
                outcome => done.push((put, outcome)),
            }
        }
        if suspects.is_empty() {
            return done;
        }
        let second = suspects.split_off(suspects.len() / 2);
        for half in [suspects, second] {
            if !half.is_empty() {
                done.extend(self::put(shared.clone(), half, intent).await);
            }
        }
        done
    })
}

async fn remove<B: Backend>(shared: Arc<Shared<B>>, keys: Vec<Key>) -> Vec<(Key, Result<bool>)> {
    let patience = shared.options.request_timeout;
    let outcomes = match timeout(patience, shared.backend.remove(&keys)).await {
        Ok(outcomes) => outcomes,
        Err(_) => vec![Err(shared.late("unregister")); keys.len()],
    };
    let outcomes = one_each(outcomes, keys.len());
    metrics::called_with_batch(shared.backend.name(), "remove", &outcomes);
    keys.into_iter().zip(outcomes).collect()
}

/// A backend that answers too little must not leave a key in flight for ever.
pub(super) fn one_each<T: Clone>(mut outcomes: Vec<Result<T>>, count: usize) -> Vec<Result<T>> {
    outcomes.resize(count, Err(Error::new(ErrorKind::Unavailable, "the backend gave no outcome")));
    outcomes
}

/// Whether the keys that other owners took are absent now. Services that cannot be listed are left out.
async fn look_at<B: Backend>(shared: &Arc<Shared<B>>, conflicts: Vec<Key>) -> Vec<(Key, bool)> {
    let mut services: BTreeMap<(ServiceName, Directory), Vec<Key>> = BTreeMap::new();
    for key in conflicts {
        services.entry((key.service.clone(), key.directory)).or_default().push(key);
    }
    let mut seen = Vec::new();
    for ((service, directory), keys) in services {
        let list = shared.backend.list(&service, directory);
        let Ok(records) = shared.in_time("list", "list", shared.options.request_timeout, list).await else { continue };
        let present: HashSet<Key> = records.into_iter().map(|record| record.key).collect();
        seen.extend(keys.into_iter().map(|key| {
            let absent = !present.contains(&key);
            (key, absent)
        }));
    }
    seen
}
