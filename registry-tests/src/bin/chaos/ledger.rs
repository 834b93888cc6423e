//! What was wanted and what happened: from this follows what readers must show, and what they must not.
//!
//! Every fault is noted before it begins and after it is over, and every answer when it was heard. So what is derived
//! here is never stricter than what the children have lived through.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    bounds::Bounds,
    names::{Generation, Name},
    protocol::{Millis, Outcome},
};

/// A process that was started.
pub(crate) type Process = usize;

/// Why a process cannot do what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    Stopped,
    /// Nothing goes through its network.
    Cut,
    /// What it says goes through, late: it may be there or not.
    Slow,
}

#[derive(Debug)]
struct Life {
    started: Millis,
    /// What is wrong now, and since when.
    troubles: BTreeMap<Trouble, Millis>,
    /// When the last trouble was over.
    fit_since: Millis,
    /// The order to leave.
    leaving: Option<u64>,
    /// The store confirmed that everything was taken out.
    in_good_order: bool,
    ended: Option<Millis>,
}

impl Life {
    fn stays(&self) -> bool {
        self.leaving.is_none() && self.ended.is_none()
    }
}

/// The last order about an instance.
#[derive(Debug)]
struct Wish {
    process: Process,
    /// The content; none if it is to be taken out.
    generation: Option<Generation>,
    order: u64,
    /// Which of the instances that the order is about.
    index: usize,
    answer: Option<(Millis, Outcome)>,
}

#[derive(Debug, Default)]
struct Entry {
    wish: Option<Wish>,
    /// Everything that anybody was ever told to register.
    known: BTreeSet<Generation>,
    /// When it was deleted past the library. `Millis::MAX`: this is going on.
    deleted: Millis,
}

/// From when on something must hold, and what it is counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) at: Millis,
    pub(crate) since: &'static str,
}

impl Due {
    fn latest<const N: usize>(causes: [(&'static str, Millis, Millis); N]) -> Self {
        let dues = causes.map(|(since, at, bound)| Self { at: at.saturating_add(bound), since });
        dues.into_iter().max_by_key(|due| due.at).expect("there is a cause")
    }

    /// Whichever comes later.
    pub(crate) fn and(self, other: Self) -> Self {
        if other.at > self.at { other } else { self }
    }
}

#[derive(Debug)]
pub(crate) struct Ledger {
    bounds: Bounds,
    lives: Vec<Life>,
    entries: BTreeMap<Name, Entry>,
    /// None while it is away.
    store_fit_since: Option<Millis>,
    last_stall: Millis,
    orders: u64,
    /// Orders that wait for an answer, and since when.
    open: BTreeMap<u64, (Process, Millis)>,
}

impl Ledger {
    pub(crate) fn new(bounds: Bounds, at: Millis) -> Self {
        let entries = Name::all().map(|name| (name, Entry::default())).collect();
        Self {
            bounds,
            lives: Vec::new(),
            entries,
            store_fit_since: Some(at),
            last_stall: at,
            orders: 0,
            open: BTreeMap::new(),
        }
    }

    // What happens to processes and to the store.

    pub(crate) fn started(&mut self, at: Millis) -> Process {
        self.lives.push(Life {
            started: at,
            troubles: BTreeMap::new(),
            fit_since: at,
            leaving: None,
            in_good_order: false,
            ended: None,
        });
        self.lives.len() - 1
    }

    pub(crate) fn harmed(&mut self, process: Process, trouble: Trouble, at: Millis) {
        self.lives[process].troubles.entry(trouble).or_insert(at);
    }

    pub(crate) fn mended(&mut self, process: Process, trouble: Trouble, at: Millis) {
        let life = &mut self.lives[process];
        if life.troubles.remove(&trouble).is_some() {
            life.fit_since = at;
        }
    }

    /// It did not run for a while, or lost its session, for whatever reason.
    pub(crate) fn stalled(&mut self, process: Process, at: Millis) {
        self.last_stall = self.last_stall.max(at);
        let life = &mut self.lives[process];
        life.fit_since = life.fit_since.max(at);
    }

    /// When something was last held up.
    pub(crate) fn last_stall(&self) -> Millis {
        self.last_stall
    }

    /// Nothing ran for a while, all networks included.
    pub(crate) fn all_stalled(&mut self, at: Millis) {
        (0..self.lives.len()).for_each(|process| self.stalled(process, at));
        self.store_fit_since = self.store_fit_since.map(|since| since.max(at));
    }

    /// It does not run any more: it was killed, or has left.
    pub(crate) fn ended(&mut self, process: Process, at: Millis) {
        self.lives[process].ended.get_or_insert(at);
        self.open.retain(|_, (ordered, _)| *ordered != process);
    }

    pub(crate) fn has_ended(&self, process: Process) -> bool {
        self.lives[process].ended.is_some()
    }

    pub(crate) fn left_in_good_order(&self, process: Process) -> bool {
        self.lives[process].in_good_order
    }

    pub(crate) fn is_leaving(&self, process: Process) -> bool {
        self.lives[process].leaving.is_some()
    }

    pub(crate) fn store_is_there(&self) -> bool {
        self.store_fit_since.is_some()
    }

    pub(crate) fn store_away(&mut self) {
        self.store_fit_since = None;
    }

    pub(crate) fn store_back(&mut self, at: Millis) {
        self.store_fit_since = Some(at);
    }

    /// An operator deletes a record: from before until after it.
    pub(crate) fn deleting(&mut self, name: Name) {
        self.entry(name).deleted = Millis::MAX;
    }

    pub(crate) fn deleted(&mut self, name: Name, at: Millis) {
        self.entry(name).deleted = at;
    }

    // What is wanted.

    /// Numbers an order about these instances.
    pub(crate) fn ordered(&mut self, process: Process, all: &[(Name, Option<Generation>)], at: Millis) -> u64 {
        let order = self.number(process, at);
        for (index, (name, generation)) in all.iter().enumerate() {
            let entry = self.entry(*name);
            entry.known.extend(generation);
            entry.wish = Some(Wish { process, generation: *generation, order, index, answer: None });
        }
        order
    }

    /// Numbers the order to take out everything and to end.
    pub(crate) fn leaving(&mut self, process: Process, at: Millis) -> u64 {
        let order = self.number(process, at);
        self.lives[process].leaving = Some(order);
        order
    }

    fn number(&mut self, process: Process, at: Millis) -> u64 {
        self.orders += 1;
        self.open.insert(self.orders, (process, at));
        self.orders
    }

    /// Takes in the answer, which has an outcome for each instance in order.
    pub(crate) fn answered(&mut self, process: Process, order: u64, outcomes: &[Outcome], at: Millis) {
        self.open.remove(&order);
        let life = &mut self.lives[process];
        if life.leaving == Some(order) {
            life.in_good_order = outcomes.iter().all(|outcome| *outcome == Outcome::Done);
        }
        let wishes = self.entries.values_mut().filter_map(|entry| entry.wish.as_mut());
        for wish in wishes.filter(|wish| wish.order == order) {
            wish.answer = outcomes.get(wish.index).map(|outcome| (at, outcome.clone()));
        }
    }

    /// Why this order was refused for an instance of which it is the last.
    pub(crate) fn refused(&self, order: u64) -> Option<String> {
        let wishes = self.entries.values().filter_map(|entry| entry.wish.as_ref()).filter(|wish| wish.order == order);
        wishes.filter_map(|wish| wish.answer.as_ref()).find_map(|(_, outcome)| match outcome {
            Outcome::Refused(why) => Some(why.clone()),
            _ => None,
        })
    }

    /// An order that should have been answered by `at`.
    pub(crate) fn overdue(&self, at: Millis) -> Option<(u64, Process)> {
        let late = |(order, (process, sent)): (&u64, &(Process, Millis))| {
            let life = &self.lives[*process];
            let since = life.fit_since.max(*sent);
            let runs = !life.troubles.contains_key(&Trouble::Stopped);
            (runs && since + self.bounds.answered < at).then_some((*order, *process))
        };
        self.open.iter().find_map(late)
    }

    pub(crate) fn all_answered(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn is_known(&self, name: Name, generation: Generation) -> bool {
        self.entries[&name].known.contains(&generation)
    }

    /// What there is when nothing is wrong.
    pub(crate) fn desired(&self) -> BTreeMap<Name, Generation> {
        let wanted = |(name, entry): (&Name, &Entry)| {
            let wish = entry.wish.as_ref().filter(|wish| self.lives[wish.process].stays())?;
            Some((*name, wish.generation?))
        };
        self.entries.iter().filter_map(wanted).collect()
    }

    // What follows.

    /// When this process can be judged by what it shows.
    pub(crate) fn reads(&self, process: Process) -> Option<Due> {
        let since = self.fit_since(process)?;
        let store = self.store_fit_since?;
        let resumed = self.bounds.resumed;
        Some(Due::latest([("its network is free", since, resumed), ("the store is back", store, resumed)]))
    }

    /// When a bare client can be.
    pub(crate) fn store_reads(&self) -> Option<Due> {
        Some(Due { at: self.store_fit_since?, since: "the store is back" })
    }

    /// From when on somebody must show an instance, and with which content, who shows what the store confirmed after so
    /// long. None: nobody needs to.
    pub(crate) fn present(&self, name: Name, shown: Millis) -> Option<(Due, Generation)> {
        let (bounds, entry) = (&self.bounds, &self.entries[&name]);
        let wish = entry.wish.as_ref()?;
        let (generation, (answered, outcome)) = (wish.generation?, wish.answer.as_ref()?);
        let fit = self.fit_since(wish.process)?;
        let confirmed = if *outcome == Outcome::Done { shown } else { bounds.restored };
        let due = Due::latest([
            ("its provider was answered", *answered, confirmed),
            // A process that was never in trouble has nothing to restore.
            ("its provider is free", fit, if self.is_new(wish.process) { 0 } else { bounds.restored }),
            ("the store is back", self.store_fit_since?, bounds.restored),
            ("it was deleted", entry.deleted, bounds.repaired),
        ]);
        Some((due, generation))
    }

    /// From when on somebody may not show an instance, who shows what the store confirmed after so long. None: it may be
    /// there.
    pub(crate) fn absent(&self, name: Name, shown: Millis) -> Option<Due> {
        let (bounds, entry) = (&self.bounds, &self.entries[&name]);
        let store = Due::latest([("the store is back", self.store_fit_since?, bounds.gone_after_outage)]);
        let Some(wish) = entry.wish.as_ref() else { return Some(Due { at: 0, since: "nobody ever wanted it" }) };
        let life = &self.lives[wish.process];
        let slow = life.troubles.contains_key(&Trouble::Slow);
        let taken_out = match (wish.generation, &wish.answer) {
            (None, Some((at, Outcome::Done))) => Some(Due::latest([("it was taken out", *at, shown)])),
            // What a dead predecessor has left is its own, until it expires.
            (None, Some((at, Outcome::NotOurs))) => {
                Some(Due::latest([("it was found not to be ours", *at, bounds.gone)]))
            }
            _ => None,
        };
        let due = if let Some(due) = taken_out {
            due
        } else if let Some(ended) = life.ended {
            // What it has sent may arrive as long as its network holds it back, and then lives as long as any.
            if life.troubles.contains_key(&Trouble::Cut) || slow {
                return None;
            }
            let bound = if life.in_good_order { shown } else { bounds.gone };
            let let_go = if life.fit_since > ended { life.fit_since } else { 0 };
            Due::latest([
                ("its provider ended", ended, bound),
                ("what its provider sent was let go", let_go, bounds.gone),
            ])
        } else if slow || life.leaving.is_some() {
            return None;
        } else if let Some(since) = life.troubles.values().min() {
            Due::latest([("its provider is out of reach", *since, bounds.gone)])
        } else if wish.generation.is_none() {
            let (answered, _) = wish.answer.as_ref()?;
            Due::latest([
                ("its removal was begun", *answered, bounds.restored),
                ("its provider is free", life.fit_since, bounds.restored),
            ])
        } else {
            return None;
        };
        // Somebody else who has it out of their sight gets the time that owners get after an outage.
        Some(due.and(store))
    }

    /// A reader that was away finds those out who died meanwhile.
    pub(crate) fn looks(&self, process: Process) -> Option<Due> {
        let since = self.fit_since(process)?;
        Some(Due { at: since + self.bounds.gone_after_outage, since: "its network is free" })
    }

    /// Since when nothing has been wrong with a process that runs.
    fn fit_since(&self, process: Process) -> Option<Millis> {
        let life = &self.lives[process];
        (life.stays() && life.troubles.is_empty()).then_some(life.fit_since)
    }

    fn is_new(&self, process: Process) -> bool {
        self.lives[process].fit_since == self.lives[process].started
    }

    fn entry(&mut self, name: Name) -> &mut Entry {
        self.entries.entry(name).or_default()
    }
}
