//! Compares what readers and the store show with what the ledger says, all the way.
//!
//! * What must hold by a time: a living instance is shown, one that is gone is not. Found wrong, it is judged once more a
//!   moment later, when everybody has said what delayed them: what was known then only makes the verdict milder.
//! * What must hold always: nothing is shown that nobody registered, no content is followed by an older one, no instance
//!   is there twice, and a reader's revisions grow. No fault excuses these. A store that is killed keeps what it has
//!   confirmed: the servers write before they answer, and the machine under them goes on. One that is wiped loses it,
//!   and then holds what providers put again: their latest content. So it cannot bring back an older one either. Late
//!   requests of dead processes cannot, for what they replace is no longer there.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    bounds::Bounds,
    ledger::{Due, Ledger, Process, Trouble},
    names::{Generation, Name, SERVICES},
    protocol::{Millis, Outcome, Report},
    timeline::{PLAN, Timeline},
};

/// After so long a verdict is final.
const SECOND_LOOK: Millis = 1500;
/// A process that is late by this was held up, and its sessions with it.
const STALL: Millis = 400;
/// So many changes of a snapshot are named.
const NAMED: usize = 8;

/// Who shows instances: the process of a reader, or the store itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Viewer {
    Reader(Process),
    Store,
}

/// What a reader shows of a service, or the store of all.
#[derive(Debug, Default)]
struct View {
    shown: BTreeMap<Name, Generation>,
    freshness: String,
    revision: u64,
}

/// Something that is wrong if nothing excuses it.
#[derive(Debug)]
struct Suspicion {
    at: Millis,
    shown: Option<Generation>,
    is_protected: bool,
}

#[derive(Debug)]
struct Label {
    name: String,
    is_reader: bool,
    /// It may end.
    ending: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) snapshots: u64,
    pub(crate) observations: u64,
    /// How often an instance was found as it must be by a time that was over.
    pub(crate) held: u64,
}

#[derive(Debug)]
pub(crate) struct Checker {
    pub(crate) ledger: Ledger,
    pub(crate) timeline: Timeline,
    pub(crate) counts: Counts,
    bounds: Bounds,
    labels: Vec<Label>,
    /// By the reader's process and the service.
    views: BTreeMap<(Process, String), View>,
    store: View,
    /// The newest content that each has shown.
    newest: BTreeMap<(Viewer, Name), Generation>,
    suspicions: BTreeMap<(Viewer, Name), Suspicion>,
    violation: Option<String>,
}

impl Checker {
    pub(crate) fn new(bounds: Bounds, at: Millis) -> Self {
        Self {
            ledger: Ledger::new(bounds, at),
            timeline: Timeline::new(at),
            counts: Counts::default(),
            bounds,
            labels: Vec::new(),
            views: BTreeMap::new(),
            store: View::default(),
            newest: BTreeMap::new(),
            suspicions: BTreeMap::new(),
            violation: None,
        }
    }

    /// A new process. Its name is for people.
    pub(crate) fn started(&mut self, name: String, is_reader: bool, at: Millis) -> Process {
        self.timeline.note(at, &name, "starts");
        self.labels.push(Label { name, is_reader, ending: false });
        self.ledger.started(at)
    }

    /// It is about to end: killed, or because it was told to.
    pub(crate) fn ending(&mut self, process: Process) {
        self.labels[process].ending = true;
    }

    /// A killed process is out of reach from before to after. What a reader has shown does not bind another one.
    pub(crate) fn killed(&mut self, process: Process, at: Millis) {
        self.views.retain(|(reader, _), _| *reader != process);
        self.newest.retain(|(viewer, _), _| *viewer != Viewer::Reader(process));
        self.ledger.ended(process, at);
        self.ledger.mended(process, Trouble::Stopped, at);
        self.timeline.note(at, &self.labels[process].name, "is dead");
    }

    /// Its output ended.
    pub(crate) fn fell_silent(&mut self, process: Process, at: Millis) {
        if !self.labels[process].ending {
            self.violate(at, format!("{} ended by itself", self.labels[process].name));
        }
    }

    /// Takes in what a process said, heard at `heard`.
    pub(crate) fn said(&mut self, process: Process, report: Report, heard: Millis) {
        match report {
            Report::Tick { at, late } => {
                let is_reader = self.labels[process].is_reader;
                if late > STALL {
                    self.timeline.note(heard, &self.labels[process].name, format!("was held up for {late} ms"));
                    self.ledger.stalled(process, if is_reader { at } else { heard });
                }
                if is_reader {
                    self.look(Viewer::Reader(process), at);
                }
            }
            Report::Answer { order, outcomes } => self.answered(process, order, &outcomes, heard),
            Report::Saw { at, service, revision, freshness, instances } => {
                self.saw(process, at, service, revision, freshness, instances);
            }
            Report::Event(text) => self.timeline.note(heard, &self.labels[process].name, text),
        }
    }

    fn answered(&mut self, process: Process, order: u64, outcomes: &[Outcome], at: Millis) {
        let spelled =
            outcomes.iter().filter(|outcome| **outcome != Outcome::Done).map(|outcome| format!("{outcome:?}"));
        let spelled = spelled.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ");
        let what = if spelled.is_empty() { "done".to_owned() } else { spelled };
        self.timeline.note(at, &self.labels[process].name, format!("order {order}: {what}"));
        self.ledger.answered(process, order, outcomes, at);
        // What a later order is about, too, may be refused, and all that comes to one that leaves.
        if let (false, Some(why)) = (self.ledger.is_leaving(process), self.ledger.refused(order)) {
            self.violate(at, format!("{} was refused order {order}: {why}", self.labels[process].name));
        }
    }

    /// A provider that was told to leave has.
    pub(crate) fn left(&mut self, process: Process, at: Millis) {
        self.ledger.ended(process, at);
        self.timeline.note(at, &self.labels[process].name, "has left");
    }

    fn saw(
        &mut self,
        process: Process,
        at: Millis,
        service: String,
        revision: u64,
        freshness: String,
        instances: Vec<(String, Generation)>,
    ) {
        self.counts.snapshots += 1;
        let viewer = Viewer::Reader(process);
        let shown = self.known(viewer, &service, instances, at);
        let view = self.views.entry((process, service.clone())).or_default();
        let before = std::mem::replace(view, View { shown, freshness, revision });
        let what = format!("{service} #{revision} {}{}", view.freshness, difference(&before.shown, &view.shown));
        let who = &self.labels[process].name;
        self.timeline.note(at, who, what);
        if revision <= before.revision {
            let broken = format!("{who} gave revision {revision} of {service} after {}", before.revision);
            self.violate(at, broken);
        }
        self.look(viewer, at);
    }

    /// What the store held, read by a bare client that began at `at`.
    pub(crate) fn observed(&mut self, at: Millis, instances: Vec<(String, String, Generation)>) {
        self.counts.observations += 1;
        let mut shown = BTreeMap::new();
        let mut by_service: BTreeMap<String, Vec<(String, Generation)>> = BTreeMap::new();
        for (service, id, generation) in instances {
            by_service.entry(service).or_default().push((id, generation));
        }
        for (service, instances) in by_service {
            shown.extend(self.known(Viewer::Store, &service, instances, at));
        }
        let changes = difference(&self.store.shown, &shown);
        if !changes.is_empty() {
            self.timeline.note(at, "store", format!("holds{changes}"));
        }
        self.store = View { shown, freshness: "live".to_owned(), revision: 0 };
        self.look(Viewer::Store, at);
    }

    /// The instances by name, after what must hold always.
    fn known(
        &mut self,
        viewer: Viewer,
        service: &str,
        instances: Vec<(String, Generation)>,
        at: Millis,
    ) -> BTreeMap<Name, Generation> {
        let mut shown = BTreeMap::new();
        for (id, generation) in instances {
            let who = self.who(viewer);
            let Some(name) = Name::find(service, &id).filter(|name| self.ledger.is_known(*name, generation)) else {
                self.violate(at, format!("{who} shows {service}/{id}@{generation}, which nobody registered"));
                continue;
            };
            if shown.insert(name, generation).is_some() {
                self.violate(at, format!("{who} shows {name} twice"));
            }
            let newest = self.newest.entry((viewer, name)).or_default();
            let before = *newest;
            *newest = before.max(generation);
            if generation < before {
                self.violate(at, format!("{who} shows {name}@{generation} after {name}@{before}"));
            }
        }
        shown
    }

    /// Looks at everything that somebody shows at a time.
    fn look(&mut self, viewer: Viewer, at: Millis) {
        for name in Name::all() {
            let (shown, is_protected) = match viewer {
                Viewer::Store => (self.store.shown.get(&name).copied(), false),
                Viewer::Reader(process) => {
                    let view = self.views.get(&(process, name.service().to_owned()));
                    let shown = view.and_then(|view| view.shown.get(&name)).copied();
                    (shown, view.is_some_and(|view| view.freshness == "protected"))
                }
            };
            let suspicion = Suspicion { at, shown, is_protected };
            match self.judge(viewer, name, &suspicion) {
                Verdict::Wrong(_) => drop(self.suspicions.entry((viewer, name)).or_insert(suspicion)),
                Verdict::Right => self.counts.held += 1,
                Verdict::Open => {}
            }
        }
    }

    fn judge(&self, viewer: Viewer, name: Name, seen: &Suspicion) -> Verdict {
        let (reads, looks, confirmed) = match viewer {
            // At once: it is what confirmed.
            Viewer::Store => (self.ledger.store_reads(), self.ledger.store_reads(), 0),
            Viewer::Reader(process) => (self.ledger.reads(process), self.ledger.looks(process), self.bounds.shown),
        };
        let (Some(reads), Some(looks)) = (reads, looks) else { return Verdict::Open };
        let wrong = |what: String, due: Due| {
            let since = (self.timeline.time(due.at), due.since);
            Verdict::Wrong(format!("{} {what}; due at {} since {}", self.who(viewer), since.0, since.1))
        };
        if let Some((due, generation)) = self.ledger.present(name, confirmed) {
            let due = due.and(reads);
            return match seen.shown {
                _ if seen.at < due.at => Verdict::Open,
                Some(shown) if shown == generation => Verdict::Right,
                Some(shown) => wrong(format!("shows {name}@{shown}, and not @{generation}"), due),
                None => wrong(format!("does not show {name}@{generation}"), due),
            };
        }
        if let Some(due) = self.ledger.absent(name, confirmed) {
            let due = due.and(reads).and(looks);
            let held = if seen.is_protected { self.bounds.protection } else { 0 };
            return match seen.shown {
                _ if seen.at < due.at + held => Verdict::Open,
                None => Verdict::Right,
                Some(shown) if seen.is_protected => wrong(format!("still protects {name}@{shown}"), due),
                Some(shown) => wrong(format!("still shows {name}@{shown}"), due),
            };
        }
        Verdict::Open
    }

    /// Judges again what seemed wrong, and whether calls are answered. Called every now and then, so much later than it
    /// should be.
    pub(crate) fn review(&mut self, late: Millis, now: Millis) {
        if late > STALL {
            self.timeline.note(now, PLAN, format!("everything was held up for {late} ms"));
            self.ledger.all_stalled(now);
        }
        if let Some((order, process)) = self.ledger.overdue(now) {
            self.violate(now, format!("{} has not answered order {order} in time", self.labels[process].name));
        }
        let ripe = |seen: &Suspicion| seen.at + SECOND_LOOK <= now;
        let ripe: Vec<_> = self.suspicions.iter().filter(|(_, seen)| ripe(seen)).map(|(key, _)| *key).collect();
        for key in ripe {
            let Some(seen) = self.suspicions.remove(&key) else { continue };
            if let Verdict::Wrong(what) = self.judge(key.0, key.1, &seen) {
                self.violate(seen.at, what);
            }
        }
    }

    /// What is not yet as it should be when nothing is wrong any more: reader == store == desired.
    pub(crate) fn unsettled(&self) -> Vec<String> {
        let mut open = Vec::new();
        if !self.ledger.all_answered() {
            open.push("an order is not answered".to_owned());
        }
        let desired = self.ledger.desired();
        let differs = |who: &str, shown: &BTreeMap<Name, Generation>, desired: &BTreeMap<Name, Generation>| {
            let difference = difference(desired, shown);
            (!difference.is_empty()).then(|| format!("{who} differs from what is desired:{difference}"))
        };
        open.extend(differs("the store", &self.store.shown, &desired));
        let readers = (0..self.labels.len()).filter(|process| {
            let is_reader = self.labels[*process].is_reader;
            is_reader && !self.ledger.has_ended(*process)
        });
        for (process, service) in readers.flat_map(|process| SERVICES.map(|service| (process, service.to_owned()))) {
            let who = format!("{} {service}", self.labels[process].name);
            let desired = desired.iter().filter(|(name, _)| name.service() == service);
            let desired = desired.map(|(name, generation)| (*name, *generation)).collect();
            match self.views.get(&(process, service)) {
                None => open.push(format!("{who} has not been read")),
                Some(view) => {
                    open.extend(differs(&who, &view.shown, &desired));
                    if view.freshness != "live" {
                        open.push(format!("{who} is {}", view.freshness));
                    }
                }
            }
        }
        open
    }

    /// The first thing that was wrong.
    pub(crate) fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    /// The first one counts: others follow from it.
    pub(crate) fn violate(&mut self, at: Millis, what: String) {
        self.timeline.note(at, "!!!", &what);
        if self.violation.is_none() {
            self.violation = Some(format!("at {} {what}", self.timeline.time(at)));
        }
    }

    pub(crate) fn name(&self, process: Process) -> &str {
        &self.labels[process].name
    }

    fn who(&self, viewer: Viewer) -> String {
        match viewer {
            Viewer::Store => "the store".to_owned(),
            Viewer::Reader(process) => self.labels[process].name.clone(),
        }
    }
}

enum Verdict {
    Right,
    /// Either would do.
    Open,
    Wrong(String),
}

/// What is new, other or gone: ` +p0-1@7 p0-2@3→9 -p1-0`.
fn difference(before: &BTreeMap<Name, Generation>, after: &BTreeMap<Name, Generation>) -> String {
    let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let changes = names.into_iter().filter_map(|name| match (before.get(name), after.get(name)) {
        (None, Some(new)) => Some(format!(" +{name}@{new}")),
        (Some(_), None) => Some(format!(" -{name}")),
        (Some(old), Some(new)) if old != new => Some(format!(" {name}@{old}→{new}")),
        _ => None,
    });
    let changes: Vec<_> = changes.collect();
    let more = changes.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    changes.into_iter().take(NAMED).collect::<String>() + &more
}

#[cfg(test)]
mod tests;
