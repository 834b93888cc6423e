//! What happens when: drawn from a seed, and from nothing else, so that the same seed gives the same decisions.
//!
//! Phases of faults and changes follow one another. Every phase has ended all its faults at its end, so that the system
//! can become calm before the next. Processes that died or left in it may stay away until a later one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::names::{Generation, INSTANCES, Name, PROVIDERS, READERS};

/// A child, whichever process plays its part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Who {
    Provider(usize),
    Reader(usize),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    KillStore,
    /// With its data.
    RestartStore,
    WipeStore,
    FreezeStore,
    ThawStore,
    /// Breaks the network of a child.
    Cut(Who),
    /// Makes it a black hole.
    Hang(Who),
    Delay(Who, Duration),
    Heal(Who),
    /// SIGSTOP.
    Stop(Who),
    /// SIGCONT.
    Continue(Who),
    /// SIGKILL.
    Kill(usize),
    /// SIGKILL of a reader, and a new one.
    RestartReader(usize),
    /// A new process that registers this.
    Start(usize, Vec<(Name, Generation)>),
    /// The same, beside the one that is stopped.
    Supersede(usize, Vec<(Name, Generation)>),
    /// The one that was superseded goes on.
    ContinueSuperseded(usize),
    /// It ends, in good order or not.
    EndSuperseded {
        provider: usize,
        in_good_order: bool,
    },
    /// A graceful end.
    Leave(usize),
    /// Sets the wall clock of a provider wrong by so many seconds.
    Jump(usize, i64),
    /// A record is deleted past the library.
    Delete(Name),
    /// The session of a record is ended past the library.
    EndSession(Name),
    Register(Name, Generation),
    Unregister(Name),
}

impl Action {
    /// What a fault is called in the summary. None for what ends a fault, and for changes.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        Some(match self {
            Self::KillStore => "store killed",
            Self::WipeStore => "store wiped",
            Self::FreezeStore => "store frozen",
            Self::Cut(_) => "network cut",
            Self::Hang(_) => "network hung",
            Self::Delay(..) => "network delayed",
            Self::Stop(_) => "process stopped",
            Self::Kill(_) => "process killed",
            Self::RestartReader(_) => "reader restarted",
            Self::Supersede(..) => "process superseded",
            Self::Leave(_) => "process left",
            Self::Jump(..) => "clock jumped",
            Self::Delete(_) => "record deleted",
            Self::EndSession(_) => "session ended",
            _ => return None,
        })
    }

    /// Whether it is an ordinary change.
    pub(crate) fn is_change(&self) -> bool {
        matches!(self, Self::Register(..) | Self::Unregister(_))
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Provider(provider) => write!(f, "p{provider}"),
            Self::Reader(reader) => write!(f, "r{reader}"),
        }
    }
}

/// As the timeline tells it.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KillStore => f.write_str("kill the store"),
            Self::RestartStore => f.write_str("start the store again"),
            Self::WipeStore => f.write_str("wipe the store"),
            Self::FreezeStore => f.write_str("freeze the store"),
            Self::ThawStore => f.write_str("thaw the store"),
            Self::Cut(who) => write!(f, "cut the network of {who}"),
            Self::Hang(who) => write!(f, "hang the network of {who}"),
            Self::Delay(who, by) => write!(f, "delay the network of {who} by {by:?}"),
            Self::Heal(who) => write!(f, "heal the network of {who}"),
            Self::Stop(who) => write!(f, "stop {who}"),
            Self::Continue(who) => write!(f, "let {who} go on"),
            Self::Kill(provider) => write!(f, "kill p{provider}"),
            Self::RestartReader(reader) => write!(f, "kill r{reader} and start another one"),
            Self::Start(provider, _) => write!(f, "start p{provider}"),
            Self::Supersede(provider, _) => write!(f, "supersede p{provider}, which is stopped"),
            Self::ContinueSuperseded(provider) => write!(f, "let the superseded p{provider} go on"),
            Self::EndSuperseded { provider, in_good_order: true } => write!(f, "let the superseded p{provider} leave"),
            Self::EndSuperseded { provider, .. } => write!(f, "kill the superseded p{provider}"),
            Self::Leave(provider) => write!(f, "let p{provider} leave"),
            Self::Jump(provider, seconds) => write!(f, "set the clock of p{provider} wrong by {seconds} s"),
            Self::Delete(name) => write!(f, "delete the record of {name}"),
            Self::EndSession(name) => write!(f, "end the session of {name}"),
            Self::Register(name, generation) => write!(f, "register {name}@{generation}"),
            Self::Unregister(name) => write!(f, "unregister {name}"),
        }
    }
}

/// Something to do, so long after the beginning of its phase.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) at: Duration,
    pub(crate) action: Action,
}

/// What ends something that has begun.
#[derive(Clone, Copy, Debug)]
enum End {
    RestartStore,
    ThawStore,
    Heal(Who),
    Continue(Who),
    Start(usize),
    Supersede(usize),
    ContinueSuperseded(usize),
    Superseded(usize, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Stopped,
    /// Dead, or it has left. A new process is on its way, or not.
    Away {
        returns: bool,
    },
    /// Stopped, to be superseded; then two processes.
    Superseded {
        successor: bool,
    },
}

#[derive(Clone, Debug)]
struct Provider {
    state: State,
    /// Which of its instances are wanted.
    wanted: BTreeSet<usize>,
    /// It has begun to take keys in this phase: it started, or registered what it had taken out.
    claims: bool,
}

/// Things to begin, and how often each is tried.
const KINDS: &[(Kind, u32)] = &[
    (Kind::Change, 40),
    (Kind::KillStore, 3),
    (Kind::WipeStore, 3),
    (Kind::FreezeStore, 3),
    (Kind::Cut, 6),
    (Kind::Hang, 4),
    (Kind::Delay, 3),
    (Kind::Kill, 5),
    (Kind::RestartReader, 2),
    (Kind::Stop, 6),
    (Kind::Supersede, 4),
    (Kind::Leave, 3),
    (Kind::Start, 6),
    (Kind::Jump, 4),
    (Kind::Delete, 4),
    (Kind::EndSession, 3),
];

#[derive(Clone, Copy, Debug)]
enum Kind {
    Change,
    KillStore,
    WipeStore,
    FreezeStore,
    Cut,
    Hang,
    Delay,
    Kill,
    RestartReader,
    Stop,
    Supersede,
    Leave,
    Start,
    Jump,
    Delete,
    EndSession,
}

/// An endless sequence of phases.
#[derive(Debug)]
pub(crate) struct Schedule {
    rng: StdRng,
    ttl: Duration,
    /// The last one that was given out.
    generation: Generation,
    providers: Vec<Provider>,
    stopped_readers: BTreeSet<usize>,
    /// Whose network is harmed.
    harmed: BTreeSet<Who>,
    store_is_up: bool,
    /// Ends to come, by time and then in the order in which they were decided.
    ends: BTreeMap<(Duration, usize), End>,
    decided: usize,
}

impl Schedule {
    pub(crate) fn new(seed: u64, ttl: Duration) -> Self {
        let provider =
            Provider { state: State::Away { returns: true }, wanted: (0..INSTANCES).collect(), claims: false };
        Self {
            rng: StdRng::seed_from_u64(seed),
            ttl,
            generation: 0,
            providers: vec![provider; PROVIDERS],
            stopped_readers: BTreeSet::new(),
            harmed: BTreeSet::new(),
            store_is_up: true,
            ends: BTreeMap::new(),
            decided: 0,
        }
    }

    /// All providers start.
    pub(crate) fn first(&mut self) -> Vec<Step> {
        (0..PROVIDERS).map(|provider| Step { at: Duration::ZERO, action: self.end(End::Start(provider)) }).collect()
    }

    /// The next phase, in order.
    pub(crate) fn phase(&mut self) -> Vec<Step> {
        self.providers.iter_mut().for_each(|provider| provider.claims = false);
        let length = self.ttls(2.0, 6.0);
        let (mut steps, mut now) = (Vec::new(), Duration::ZERO);
        loop {
            now += Duration::from_millis(self.rng.random_range(50..850));
            self.end_until(now.min(length), &mut steps);
            if now >= length {
                break;
            }
            if let Some(action) = self.begin(now) {
                steps.push(Step { at: now, action });
            }
        }
        self.end_until(Duration::MAX, &mut steps);
        steps
    }

    fn end_until(&mut self, until: Duration, steps: &mut Vec<Step>) {
        while let Some(next) = self.ends.first_entry().filter(|next| next.key().0 <= until) {
            let ((at, _), end) = next.remove_entry();
            let action = self.end(end);
            steps.push(Step { at, action });
        }
    }

    fn end(&mut self, end: End) -> Action {
        match end {
            End::RestartStore => {
                self.store_is_up = true;
                Action::RestartStore
            }
            End::ThawStore => {
                self.store_is_up = true;
                Action::ThawStore
            }
            End::Heal(who) => {
                self.harmed.remove(&who);
                Action::Heal(who)
            }
            End::Continue(who) => {
                match who {
                    Who::Provider(provider) => self.providers[provider].state = State::Running,
                    Who::Reader(reader) => drop(self.stopped_readers.remove(&reader)),
                }
                Action::Continue(who)
            }
            End::Start(provider) => {
                self.providers[provider].state = State::Running;
                Action::Start(provider, self.all_of(provider))
            }
            End::Supersede(provider) => {
                self.providers[provider].state = State::Superseded { successor: true };
                Action::Supersede(provider, self.all_of(provider))
            }
            End::ContinueSuperseded(provider) => Action::ContinueSuperseded(provider),
            End::Superseded(provider, in_good_order) => {
                self.providers[provider].state = State::Running;
                Action::EndSuperseded { provider, in_good_order }
            }
        }
    }

    /// What a new process registers.
    fn all_of(&mut self, provider: usize) -> Vec<(Name, Generation)> {
        self.providers[provider].claims = true;
        let wanted = self.providers[provider].wanted.clone();
        wanted.into_iter().map(|number| (Name { provider, number }, self.next_generation())).collect()
    }

    fn next_generation(&mut self) -> Generation {
        self.generation += 1;
        self.generation
    }

    /// Something that can begin now; what was drawn and cannot is left out.
    fn begin(&mut self, now: Duration) -> Option<Action> {
        let total: u32 = KINDS.iter().map(|(_, weight)| weight).sum();
        let mut drawn = self.rng.random_range(0..total);
        let (kind, _) = KINDS.iter().find(|(_, weight)| {
            let found = drawn < *weight;
            drawn = drawn.saturating_sub(*weight);
            found
        })?;
        match kind {
            Kind::Change => self.change(),
            Kind::KillStore | Kind::WipeStore | Kind::FreezeStore => self.harm_store(*kind, now),
            Kind::Cut | Kind::Hang | Kind::Delay => self.harm_network(*kind, now),
            Kind::Stop => self.stop(now),
            Kind::Supersede => self.supersede(now),
            Kind::Kill | Kind::Leave => self.take_away(*kind, now),
            Kind::RestartReader => {
                let reader = self.rng.random_range(0..READERS);
                (!self.stopped_readers.contains(&reader)).then_some(Action::RestartReader(reader))
            }
            Kind::Start => {
                let provider = self.pick(|provider| provider.state == State::Away { returns: false })?;
                Some(self.end(End::Start(provider)))
            }
            Kind::Jump => {
                let provider = self.pick(|provider| provider.state == State::Running)?;
                Some(Action::Jump(provider, self.rng.random_range(-600..=600)))
            }
            Kind::Delete => self.wanted().map(Action::Delete),
            Kind::EndSession => self.wanted().map(Action::EndSession),
        }
    }

    fn change(&mut self) -> Option<Action> {
        let settled = |provider: &Provider| provider.state == State::Superseded { successor: true };
        let provider = self.pick(|provider| provider.state == State::Running || settled(provider))?;
        let name = Name { provider, number: self.rng.random_range(0..INSTANCES) };
        let rather_leave = self.rng.random_range(0..10) < 3;
        // What was superseded may register again what nobody has registered for a while: that is no fault.
        let superseded = settled(&self.providers[provider]);
        let Provider { wanted, claims, .. } = &mut self.providers[provider];
        if rather_leave && wanted.contains(&name.number) && !superseded {
            wanted.remove(&name.number);
            return Some(Action::Unregister(name));
        }
        *claims |= wanted.insert(name.number);
        Some(Action::Register(name, self.next_generation()))
    }

    fn harm_store(&mut self, kind: Kind, now: Duration) -> Option<Action> {
        // A store that has lost what it held no longer knows who superseded whom, and it cannot be asked: who comes
        // first has the key. The library promises nothing then.
        let superseding = self.providers.iter().any(|provider| matches!(provider.state, State::Superseded { .. }));
        if !self.store_is_up || superseding {
            return None;
        }
        match kind {
            Kind::KillStore => {
                self.store_is_up = false;
                let back = now + self.ttls(0.1, 2.0);
                self.at(back, End::RestartStore);
                Some(Action::KillStore)
            }
            Kind::FreezeStore => {
                self.store_is_up = false;
                let back = now + self.ttls(0.1, 3.0);
                self.at(back, End::ThawStore);
                Some(Action::FreezeStore)
            }
            _ => Some(Action::WipeStore),
        }
    }

    fn harm_network(&mut self, kind: Kind, now: Duration) -> Option<Action> {
        let who = match self.rng.random_range(0..PROVIDERS + READERS) {
            provider @ 0..PROVIDERS => Who::Provider(provider),
            reader => Who::Reader(reader - PROVIDERS),
        };
        let there = match who {
            Who::Provider(provider) => self.providers[provider].state == State::Running,
            Who::Reader(_) => true,
        };
        if !there || !self.harmed.insert(who) {
            return None;
        }
        let back = now + self.ttls(0.1, 3.0);
        self.at(back, End::Heal(who));
        Some(match kind {
            Kind::Cut => Action::Cut(who),
            Kind::Hang => Action::Hang(who),
            _ => Action::Delay(who, Duration::from_millis(self.rng.random_range(10..300))),
        })
    }

    fn stop(&mut self, now: Duration) -> Option<Action> {
        let who = match self.rng.random_range(0..3) {
            0 => Who::Reader(self.rng.random_range(0..READERS)),
            _ => Who::Provider(self.pick(|provider| provider.state == State::Running)?),
        };
        match who {
            Who::Provider(provider) => self.providers[provider].state = State::Stopped,
            Who::Reader(reader) if !self.stopped_readers.insert(reader) => return None,
            Who::Reader(_) => {}
        }
        let back = now + self.ttls(0.1, 3.0);
        self.at(back, End::Continue(who));
        Some(Action::Stop(who))
    }

    fn supersede(&mut self, now: Duration) -> Option<Action> {
        if !self.store_is_up {
            return None;
        }
        // A key is taken when the store is told so. Who stalls before that, and goes on after its successor has taken the
        // key, takes it from the successor: nobody could know which of them is the newer. So only those are superseded
        // who have what they want since the last calm.
        let provider = self.pick_number(|this, number| {
            let provider = &this.providers[number];
            provider.state == State::Running && !provider.claims && !this.harmed.contains(&Who::Provider(number))
        })?;
        self.providers[provider].state = State::Superseded { successor: false };
        let superseded = now + self.ttls(0.1, 2.0);
        // The successor has its keys before the other one looks.
        let continued = superseded + self.ttls(0.5, 1.0);
        let ended = continued + self.ttls(0.5, 2.0);
        let in_good_order = self.rng.random();
        self.at(superseded, End::Supersede(provider));
        self.at(continued, End::ContinueSuperseded(provider));
        self.at(ended, End::Superseded(provider, in_good_order));
        Some(Action::Stop(Who::Provider(provider)))
    }

    fn take_away(&mut self, kind: Kind, now: Duration) -> Option<Action> {
        let provider = self.pick(|provider| provider.state == State::Running)?;
        let returns = self.rng.random_range(0..4) > 0;
        self.providers[provider].state = State::Away { returns };
        if returns {
            // Mostly at once, as a supervisor does it.
            let most = if self.rng.random() { 0.2 } else { 2.0 };
            let back = now + self.ttls(0.02, most);
            self.at(back, End::Start(provider));
        }
        Some(if matches!(kind, Kind::Kill) { Action::Kill(provider) } else { Action::Leave(provider) })
    }

    /// An instance that an operator can harm: its provider runs, and the store answers.
    fn wanted(&mut self) -> Option<Name> {
        let provider = self.pick(|provider| provider.state == State::Running && !provider.wanted.is_empty())?;
        let wanted = &self.providers[provider].wanted;
        let number = *wanted.iter().nth(self.rng.random_range(0..wanted.len()))?;
        self.store_is_up.then_some(Name { provider, number })
    }

    fn pick(&mut self, holds: impl Fn(&Provider) -> bool) -> Option<usize> {
        self.pick_number(|this, number| holds(&this.providers[number]))
    }

    fn pick_number(&mut self, holds: impl Fn(&Self, usize) -> bool) -> Option<usize> {
        let fit: Vec<_> = (0..PROVIDERS).filter(|number| holds(self, *number)).collect();
        if fit.is_empty() { None } else { Some(fit[self.rng.random_range(0..fit.len())]) }
    }

    fn at(&mut self, at: Duration, end: End) {
        self.decided += 1;
        self.ends.insert((at, self.decided), end);
    }

    /// Some time between so many ttls.
    fn ttls(&mut self, least: f64, most: f64) -> Duration {
        self.ttl.mul_f64(self.rng.random_range(least..most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(2);

    fn phases(seed: u64, count: usize) -> Vec<Vec<Step>> {
        let mut schedule = Schedule::new(seed, TTL);
        let first = schedule.first();
        std::iter::once(first).chain((0..count).map(|_| schedule.phase())).collect()
    }

    #[test]
    fn a_seed_gives_the_same_schedule_again_and_another_one_another() {
        assert_eq!(phases(7, 20), phases(7, 20));
        assert_ne!(phases(7, 20), phases(8, 20));
    }

    #[test]
    fn everything_happens_in_time_and_ends_with_its_phase() {
        let mut kinds = BTreeMap::new();
        for phase in phases(1, 300) {
            assert!(phase.is_sorted_by_key(|step| step.at));
            assert!(phase.last().is_none_or(|last| last.at < 12 * TTL), "{:?}", phase.last());
            let (mut down, mut harmed, mut stopped) = (0, BTreeSet::new(), BTreeSet::new());
            for Step { action, .. } in &phase {
                kinds.entry(action.fault()).and_modify(|count| *count += 1).or_insert(1);
                match action {
                    Action::KillStore | Action::FreezeStore => down += 1,
                    Action::RestartStore | Action::ThawStore => down -= 1,
                    Action::Cut(who) | Action::Hang(who) | Action::Delay(who, _) => assert!(harmed.insert(*who)),
                    Action::Heal(who) => assert!(harmed.remove(who)),
                    Action::Stop(who) => assert!(stopped.insert(*who)),
                    Action::Continue(who) => assert!(stopped.remove(who)),
                    Action::EndSuperseded { provider, .. } => assert!(stopped.remove(&Who::Provider(*provider))),
                    Action::Delete(_) | Action::EndSession(_) => assert_eq!(down, 0),
                    _ => {}
                }
                assert!((0..=1).contains(&down));
            }
            assert!(down == 0 && harmed.is_empty() && stopped.is_empty());
        }
        assert_eq!(kinds.len(), 15, "every kind of fault, and what is none: {kinds:?}");
    }

    #[test]
    fn generations_only_grow() {
        let mut last = 0;
        for step in phases(3, 100).into_iter().flatten() {
            let given = match step.action {
                Action::Start(_, all) | Action::Supersede(_, all) => all,
                Action::Register(name, generation) => vec![(name, generation)],
                _ => Vec::new(),
            };
            for (_, generation) in given {
                assert!(generation > last);
                last = generation;
            }
        }
    }
}
