//! The local registered-key set: for each key what is wanted, what the store confirmed, and who waits to hear.
//!
//! ```text
//! register ─▶ wanted ──put──▶ confirmed ──lost──▶ wanted, due for a restore
//!               ▲  │                                  │
//!               │  └─unregister─▶ must go ──removed──▶ (no slot)
//!               └───────────────────┘ register
//! ```
//!
//! Pure bookkeeping behind one lock that is never held across an await; [`keep`](super::keep) does the work.

use std::{
    collections::{BTreeSet, HashMap, hash_map},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use foldhash::fast::RandomState;
use tokio::{sync::oneshot, time::Instant};

use crate::{
    Content, Directory, Epoch, Error, Instance, Intent, Key, Lifetime, Owner, Record, Registration, RegistrationState,
    Result,
};

#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Boxed, so that a map that grows moves little.
    map: HashMap<Key, Box<Slot>, RandomState>,
    /// The keys with work to do and when: the index of every slot's `due`.
    agenda: Agenda,
    generation: u64,
    /// How many keys have a put or a removal in flight.
    busy: usize,
    /// No new work: `destroy` was called.
    pub(super) closing: bool,
}

type Agenda = BTreeSet<(Instant, Key)>;

/// One key.
#[derive(Debug)]
pub(super) struct Slot {
    /// What the store shall hold; `None`: nothing of ours.
    want: Option<Want>,
    /// The generation of `want` that the store confirmed and is not known to have lost.
    confirmed: Option<u64>,
    /// What the store confirmed last, to fall back to when an update is refused.
    in_force: Option<Want>,
    /// The epoch of our last confirmed put. `None`: the key is still to be claimed.
    epoch: Option<Epoch>,
    /// An attempt to put ended without an answer: the store may hold something of ours.
    maybe: bool,
    /// The store refused the last attempt for good.
    refused: bool,
    /// A put or a removal is in flight.
    busy: bool,
    due: Option<Instant>,
    state: RegistrationState,
    /// Another owner has the key; since when it was seen absent.
    conflict: Option<Option<Instant>>,
    /// When anything changed last; what was asked before that says nothing about this slot.
    touched: Instant,
    waiters: Vec<Waiter>,
    removers: Vec<oneshot::Sender<Result<bool>>>,
}

#[derive(Clone, Debug)]
struct Want {
    instance: Arc<Instance>,
    generation: u64,
}

#[derive(Debug)]
struct Waiter {
    generation: u64,
    /// Whether a refusal withdraws what was asked for: true for `register`, false for `heartbeat`.
    withdraws: bool,
    answer: oneshot::Sender<Result<()>>,
}

/// One put, taken from the agenda.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub(super) record: Record,
    generation: u64,
}

/// What is due: claims, restores and removals.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) claims: Vec<Put>,
    pub(super) restores: Vec<Put>,
    pub(super) removals: Vec<Key>,
}

/// What follows from the outcome of a put for the engine.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Done,
    /// The store did not answer or serve: try all such keys again together.
    Retry,
    /// Refused for good: try again rarely.
    RetryRarely,
}

/// A state that changed, for the event stream.
pub(super) type Changed = Option<Registration>;

impl Slots {
    /// Wants `instance` under `key`. The answer comes when the store confirmed or the first attempt failed.
    pub(super) fn want(&mut self, key: Key, mut instance: Instance, now: Instant) -> oneshot::Receiver<Result<()>> {
        self.generation += 1;
        let generation = self.generation;
        let slot = self.map.entry(key.clone()).or_insert_with(|| Slot::new(now).into());
        instance.registered_at = instance.registered_at.or_else(|| slot.registered_at()).or_else(|| Some(now_in_ms()));
        if slot.want.is_none() {
            // It was on its way out: what comes now is a new registration, which claims. The old one may be there yet.
            slot.maybe |= slot.epoch.is_some();
            (slot.confirmed, slot.in_force, slot.epoch, slot.conflict) = (None, None, None, None);
            slot.state = RegistrationState::Pending;
        }
        slot.want = Some(Want { instance: Arc::new(instance), generation });
        slot.touched = now;
        slot.schedule(&mut self.agenda, &key, Some(now));
        slot.wait(generation, true)
    }

    /// Wants what is wanted under a key with a change. `None`: nothing is.
    pub(super) fn change(
        &mut self,
        key: &Key,
        change: impl FnOnce(&mut Instance),
        now: Instant,
    ) -> Option<oneshot::Receiver<Result<()>>> {
        let mut instance = Instance::clone(&self.map.get(key)?.want.as_ref()?.instance);
        change(&mut instance);
        Some(self.want(key.clone(), instance, now))
    }

    /// What users see of a key.
    pub(super) fn registration(&self, key: &Key) -> Option<Registration> {
        self.map.get(key)?.registration()
    }

    /// Whether `key` is in the set.
    pub(super) fn wants(&self, key: &Key) -> bool {
        self.map.get(key).is_some_and(|slot| slot.want.is_some())
    }

    /// Withdraws a key. `None`: it was not in the set.
    pub(super) fn withdraw(&mut self, key: &Key, now: Instant) -> Option<oneshot::Receiver<Result<bool>>> {
        let slot = self.map.get_mut(key)?;
        slot.want = None;
        slot.in_force = None;
        for waiter in slot.waiters.drain(..) {
            let _ = waiter
                .answer
                .send(Err(Error::new(crate::ErrorKind::Conflict, format!("{key} was unregistered meanwhile"))));
        }
        let (sender, answer) = oneshot::channel();
        if slot.is_unknown_to_the_store() {
            let _ = sender.send(Ok(false));
            self.forget(key);
            return Some(answer);
        }
        slot.removers.push(sender);
        slot.touched = now;
        slot.schedule(&mut self.agenda, key, Some(now));
        Some(answer)
    }

    /// Notes that the store holds a record of ours, which nobody wants unless it is in the set.
    pub(super) fn orphan(&mut self, key: &Key, now: Instant) {
        if let hash_map::Entry::Vacant(entry) = self.map.entry(key.clone()) {
            entry.insert(Slot { maybe: true, ..Slot::new(now) }.into());
            self.schedule(key, Some(now));
        }
    }

    /// Takes up to `most` keys that are due and marks them busy.
    pub(super) fn take_due(&mut self, owner: &Owner, now: Instant, most: usize) -> Due {
        let mut due = Due::default();
        while due.len() < most && self.next_due().is_some_and(|at| at <= now) {
            let Some((_, key)) = self.agenda.pop_first() else { break };
            let Some(slot) = self.map.get_mut(&key) else { continue };
            (slot.due, slot.refused) = (None, false);
            if slot.want.is_none() || !slot.removers.is_empty() {
                slot.busy = true;
                self.busy += 1;
                due.removals.push(key);
            } else if let Some(want) = slot.want.as_ref().filter(|want| slot.confirmed != Some(want.generation)) {
                slot.busy = true;
                self.busy += 1;
                let record = Record {
                    owner: owner.clone(),
                    epoch: slot.epoch.unwrap_or_default(),
                    lifetime: Lifetime::Session,
                    content: Content::Instance(want.instance.clone()),
                    key,
                };
                let put = Put { record, generation: want.generation };
                if slot.epoch.is_some() { due.restores.push(put) } else { due.claims.push(put) }
            }
        }
        due
    }

    /// Takes the put of `key` if it is due, and nothing else is or is in flight; nothing once the end has begun.
    pub(super) fn take_alone(&mut self, owner: &Owner, key: &Key, now: Instant) -> Option<(Intent, Put)> {
        let due = self.agenda.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| key);
        let is_put = |slot: &Slot| slot.want.is_some() && slot.removers.is_empty();
        if self.closing || self.busy > 0 || !due.eq([key]) || !self.map.get(key).is_some_and(|slot| is_put(slot)) {
            return None;
        }
        let due = self.take_due(owner, now, 1);
        due.puts().into_iter().find_map(|(intent, puts)| Some((intent, puts.into_iter().next()?)))
    }

    /// When the next key is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.agenda.first().map(|(at, _)| *at)
    }

    /// Takes in the outcome of a put.
    pub(super) fn put_done(&mut self, put: &Put, outcome: Result<Epoch>, now: Instant) -> (Next, Changed) {
        let key = &put.record.key;
        let Some(slot) = self.map.get_mut(key) else { return (Next::Done, None) };
        slot.busy = false;
        self.busy -= 1;
        slot.touched = now;
        let current = slot.want.as_ref().is_some_and(|want| want.generation == put.generation);
        let (next, changed) = match outcome {
            Ok(epoch) => {
                slot.epoch = Some(epoch);
                slot.conflict = None;
                slot.answer(put.generation, &Ok(()));
                let state = if slot.want.is_some() && slot.removers.is_empty() {
                    slot.confirmed = Some(put.generation);
                    if let Content::Instance(instance) = &put.record.content {
                        slot.in_force = Some(Want { instance: instance.clone(), generation: put.generation });
                    }
                    RegistrationState::Registered
                } else {
                    RegistrationState::Pending
                };
                (Next::Done, slot.enter(key, state))
            }
            Err(error) if error.is_retryable() => {
                slot.maybe = true;
                slot.answer(put.generation, &Err(error));
                (Next::Retry, None)
            }
            Err(error) => slot.refused(key, put.generation, current, error),
        };
        if slot.want.is_none() && slot.removers.is_empty() && slot.is_unknown_to_the_store() {
            self.forget(key);
            return (Next::Done, changed);
        }
        // More to do: a newer want, or a withdrawal that came meanwhile.
        let more = slot.want.as_ref().map_or(Some(now), |want| (want.generation != put.generation).then_some(now));
        if let Some(at) = more {
            self.schedule(key, Some(at));
        }
        (next, changed)
    }

    /// Takes in the outcome of a removal.
    pub(super) fn remove_done(&mut self, key: &Key, outcome: Result<bool>, now: Instant) -> Next {
        let Some(slot) = self.map.get_mut(key) else { return Next::Done };
        slot.busy = false;
        self.busy -= 1;
        slot.touched = now;
        for remover in slot.removers.drain(..) {
            let _ = remover.send(outcome.clone());
        }
        if slot.want.is_some() {
            // Registered again meanwhile: nothing of before counts, and a claim needs no removal first.
            (slot.confirmed, slot.in_force, slot.epoch, slot.maybe) = (None, None, None, outcome.is_err());
            self.schedule(key, Some(now));
            return Next::Done;
        }
        match outcome {
            Ok(_) => {
                self.forget(key);
                Next::Done
            }
            Err(error) if error.is_retryable() => Next::Retry,
            Err(_) => Next::RetryRarely,
        }
    }

    /// Schedules keys for another attempt, spread from `start` at `rate` a second.
    pub(super) fn retry(&mut self, keys: &[Key], start: Instant, rate: u32) {
        for (index, key) in keys.iter().enumerate() {
            if self.map.get(key).is_some_and(|slot| slot.due.is_none()) {
                self.schedule(key, Some(start + spread(index, rate)));
            }
        }
    }

    /// Schedules a key that the store refused.
    pub(super) fn retry_rarely(&mut self, key: &Key, at: Instant) {
        if let Some(slot) = self.map.get_mut(key).filter(|slot| slot.due.is_none()) {
            slot.refused = true;
            self.schedule(key, Some(at));
        }
    }

    /// Brings forward what waits for another attempt, spread from `start`; what was refused keeps its time.
    pub(super) fn hasten(&mut self, start: Instant, rate: u32) {
        let late = self.agenda.iter().filter(|(at, _)| *at > start).map(|(_, key)| key);
        let waiting: Vec<Key> =
            late.filter(|key| self.map.get(*key).is_some_and(|slot| !slot.refused)).cloned().collect();
        for (index, key) in waiting.iter().enumerate() {
            self.schedule(key, Some(start + spread(index, rate)));
        }
    }

    /// The keys that the store shall hold now, for a renewal or a check.
    pub(super) fn held(&self) -> Vec<Key> {
        self.map
            .iter()
            .filter(|(_, slot)| slot.want.is_some() && slot.confirmed.is_some())
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// Every key that the store may hold something of ours under.
    pub(super) fn to_close(&self) -> Vec<Key> {
        self.map.iter().filter(|(_, slot)| !slot.is_unknown_to_the_store()).map(|(key, _)| key.clone()).collect()
    }

    /// Whether a put or a removal is in flight.
    pub(super) fn any_busy(&self) -> bool {
        self.busy > 0
    }

    /// Marks a key as lost if what the store said was asked after its last change. The caller schedules the restore.
    pub(super) fn lose(&mut self, key: &Key, asked: Instant, cause: &Error) -> (bool, Changed) {
        let Some(slot) = self.map.get_mut(key) else { return (false, None) };
        if slot.busy || slot.touched > asked || slot.want.is_none() || slot.confirmed.is_none() {
            return (false, None);
        }
        slot.confirmed = None;
        (true, slot.enter(key, lost(cause)))
    }

    /// The session may be gone and nobody can tell: every registration is presumed lost.
    pub(super) fn presume_lost(&mut self, cause: &Error) -> Vec<Registration> {
        let registered = self.map.iter_mut().filter(|(_, slot)| slot.state.is_registered());
        registered.filter_map(|(key, slot)| slot.enter(key, lost(cause))).collect()
    }

    /// The session lives after all: what was presumed lost and is not missing is registered.
    pub(super) fn presume_kept(&mut self) -> Vec<Registration> {
        let kept = self.map.iter_mut().filter(|(_, slot)| slot.confirmed.is_some() && slot.conflict.is_none());
        kept.filter_map(|(key, slot)| slot.enter(key, RegistrationState::Registered)).collect()
    }

    /// The keys that another owner has.
    pub(super) fn conflicts(&self) -> Vec<Key> {
        self.map.iter().filter(|(_, slot)| slot.conflict.is_some() && !slot.busy).map(|(key, _)| key.clone()).collect()
    }

    /// Notes whether a key that another owner took is absent now. Once it has been for `patience` it is due for a
    /// restore. Returns when to look again.
    pub(super) fn saw_conflict(
        &mut self,
        key: &Key,
        absent: bool,
        patience: Duration,
        now: Instant,
    ) -> Option<Instant> {
        let conflict = self.map.get_mut(key)?.conflict.as_mut()?;
        if !absent {
            *conflict = None;
            return None;
        }
        let free_at = *conflict.get_or_insert(now) + patience;
        if free_at > now {
            return Some(free_at);
        }
        *conflict = None;
        self.schedule(key, Some(now));
        None
    }

    /// What a heartbeat reports, sorted: the keys that are there, and answers to come for those that are not.
    #[allow(clippy::type_complexity, reason = "two plain lists")]
    pub(super) fn beat(&mut self, now: Instant) -> (Vec<Key>, Vec<(Key, oneshot::Receiver<Result<()>>)>) {
        let mut report = (Vec::new(), Vec::new());
        for (key, slot) in self.map.iter_mut().filter(|(key, _)| key.directory == Directory::Providers) {
            let Some(want) = slot.want.as_ref() else { continue };
            if let (Some(_), RegistrationState::Lost { cause, .. }) = (slot.conflict, &slot.state) {
                // Not ours to take before it has been absent for a ttl, whoever asks.
                let (answer, answered) = oneshot::channel();
                let _ = answer.send(Err(cause.clone()));
                report.1.push((key.clone(), answered));
            } else if slot.confirmed == Some(want.generation) {
                report.0.push(key.clone());
            } else {
                let generation = want.generation;
                report.1.push((key.clone(), slot.wait(generation, false)));
            }
        }
        report.0.sort_unstable();
        report.1.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        for (key, _) in &report.1 {
            if self.map.get(key).is_some_and(|slot| !slot.busy && slot.conflict.is_none()) {
                self.schedule(key, Some(now));
            }
        }
        report
    }

    /// What users see, sorted by service and id.
    pub(super) fn registrations(&self) -> Vec<Registration> {
        let providers = self.map.iter().filter(|(key, _)| key.directory == Directory::Providers);
        let mut registrations: Vec<_> = providers.filter_map(|(_, slot)| slot.registration()).collect();
        registrations.sort_unstable_by(|a, b| (a.service(), a.id()).cmp(&(b.service(), b.id())));
        registrations
    }

    /// The states of what users see.
    pub(super) fn states(&self) -> impl Iterator<Item = &RegistrationState> {
        let providers = self.map.iter().filter(|(key, _)| key.directory == Directory::Providers);
        providers.filter(|(_, slot)| slot.want.is_some()).map(|(_, slot)| &slot.state)
    }

    /// Empties the set; whoever waits is told that the registry is closed.
    pub(super) fn clear(&mut self) {
        self.map.clear();
        self.agenda.clear();
        self.busy = 0;
    }

    fn schedule(&mut self, key: &Key, at: Option<Instant>) {
        if let Some(slot) = self.map.get_mut(key) {
            slot.schedule(&mut self.agenda, key, at);
        }
    }

    fn forget(&mut self, key: &Key) {
        self.schedule(key, None);
        self.map.remove(key);
    }
}

impl Due {
    pub(super) fn len(&self) -> usize {
        self.claims.len() + self.restores.len() + self.removals.len()
    }

    pub(super) fn puts(self) -> [(Intent, Vec<Put>); 2] {
        [(Intent::Claim, self.claims), (Intent::Restore, self.restores)]
    }
}

impl Slot {
    fn new(now: Instant) -> Self {
        Self {
            want: None,
            confirmed: None,
            in_force: None,
            epoch: None,
            maybe: false,
            refused: false,
            busy: false,
            due: None,
            state: RegistrationState::Pending,
            conflict: None,
            touched: now,
            waiters: Vec::new(),
            removers: Vec::new(),
        }
    }

    /// Sets when its key is due. A busy one is not: the end of what is in flight sees to it.
    fn schedule(&mut self, agenda: &mut Agenda, key: &Key, at: Option<Instant>) {
        let at = at.filter(|_| !self.busy);
        if let Some(before) = std::mem::replace(&mut self.due, at) {
            agenda.remove(&(before, key.clone()));
        }
        if let Some(at) = at {
            agenda.insert((at, key.clone()));
        }
    }

    fn registration(&self) -> Option<Registration> {
        Some(Registration::new(self.want.as_ref()?.instance.clone(), self.state.clone()))
    }

    fn registered_at(&self) -> Option<SystemTime> {
        self.want.as_ref().and_then(|want| want.instance.registered_at)
    }

    fn is_unknown_to_the_store(&self) -> bool {
        self.epoch.is_none() && !self.maybe && !self.busy
    }

    fn wait(&mut self, generation: u64, withdraws: bool) -> oneshot::Receiver<Result<()>> {
        let (answer, receiver) = oneshot::channel();
        self.waiters.push(Waiter { generation, withdraws, answer });
        receiver
    }

    /// Answers everyone who waits for `generation` or an older one. Returns whether anyone listened whose refusal
    /// withdraws.
    fn answer(&mut self, generation: u64, outcome: &Result<()>) -> bool {
        let mut withdraws = false;
        for waiter in std::mem::take(&mut self.waiters) {
            if waiter.generation > generation {
                self.waiters.push(waiter);
            } else {
                let heard = waiter.answer.send(outcome.clone()).is_ok();
                withdraws |= heard && waiter.withdraws;
            }
        }
        withdraws
    }

    /// A put was refused for good: withdraw what a caller has just been told about, keep what was in force, and go on
    /// with what was registered before.
    fn refused(&mut self, key: &Key, generation: u64, current: bool, error: Error) -> (Next, Changed) {
        let told = self.answer(generation, &Err(error.clone()));
        let conflict = error.kind() == crate::ErrorKind::Conflict;
        if told && current {
            let Some(in_force) = self.in_force.clone() else {
                // Never confirmed: out with it, and with whatever an earlier attempt may have left.
                self.want = None;
                return (Next::Done, None);
            };
            self.want = Some(in_force);
            if !conflict && self.confirmed.is_some() {
                return (Next::Done, None);
            }
        }
        if self.want.is_none() || (!current && !conflict) {
            return (Next::Done, None);
        }
        if !conflict && self.confirmed.is_some() {
            // An update that nobody waits for any more: what the store has is in force, and is kept alive.
            return (Next::RetryRarely, None);
        }
        self.confirmed = None;
        self.conflict = conflict.then_some(None);
        (if conflict { Next::Done } else { Next::RetryRarely }, self.enter(key, lost(&error)))
    }

    /// Enters a state; gives the registration if users should hear of it.
    fn enter(&mut self, key: &Key, state: RegistrationState) -> Changed {
        let same = match (&self.state, &state) {
            (RegistrationState::Lost { cause: before, .. }, RegistrationState::Lost { cause: after, .. }) => {
                // Lost is lost: users hear again only of what waiting does not mend.
                before.kind() == after.kind() || (before.is_retryable() && after.is_retryable())
            }
            (before, after) => std::mem::discriminant(before) == std::mem::discriminant(after),
        };
        if same {
            return None;
        }
        self.state = state;
        let instance = self.want.as_ref()?.instance.clone();
        (key.directory == Directory::Providers).then(|| Registration::new(instance, self.state.clone()))
    }
}

fn lost(cause: &Error) -> RegistrationState {
    RegistrationState::Lost { since: SystemTime::now(), cause: cause.clone() }
}

/// How long after the start the key at `index` goes when `rate` keys may go a second, in steps that keep batches.
fn spread(index: usize, rate: u32) -> Duration {
    const STEP_MS: u64 = 100;
    let ms = index as u64 * 1000 / u64::from(rate.max(1));
    Duration::from_millis(ms / STEP_MS * STEP_MS)
}

/// Now, in the precision that records keep.
fn now_in_ms() -> SystemTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_millis(u64::try_from(since.as_millis()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_puts_alone_only_if_there_is_nothing_else_and_no_end() {
        let (mut slots, owner, now) = (Slots::default(), Owner::random(), Instant::now());
        let key = |id: &str| Key::provider("orders".parse().unwrap(), id.parse().unwrap());
        let want = |slots: &mut Slots, id: &str| {
            drop(slots.want(key(id), Instance::builder("orders", id).build().unwrap(), now));
        };
        want(&mut slots, "1");
        slots.closing = true;
        assert!(slots.take_alone(&owner, &key("1"), now).is_none(), "the end has begun");
        slots.closing = false;
        want(&mut slots, "2");
        assert!(slots.take_alone(&owner, &key("1"), now).is_none(), "another is due");
        drop(slots.withdraw(&key("2"), now));
        let (_, put) = slots.take_alone(&owner, &key("1"), now).expect("it is the only one");
        want(&mut slots, "3");
        assert!(slots.take_alone(&owner, &key("3"), now).is_none(), "another is in flight");
        slots.put_done(&put, Ok(1), now);
        assert!(!slots.any_busy());
        assert!(slots.take_alone(&owner, &key("3"), now).is_some());
    }
}
