//! What a reader knows of one service: the store's records, the operator's overrides merged in, and the instances
//! that protection holds back; before all that, what was on disk. Pure: no clock but the one that is passed in, no I/O.
//!
//! ```text
//!            Upsert                unmarked, few            marked
//! (absent) ──────────▶ present ──────────────────▶ gone ◀───────────┐
//!                        ▲  │   unmarked, many                      │
//!                        │  └──────────────────────▶ held ──────────┘
//!                        └───────── back ────────────┘     or the bound is over
//! ```

use std::{
    collections::{BTreeMap, HashSet, VecDeque, btree_map},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    Content, Departure, Directory, Epoch, Instance, InstanceId, Key, Metadata, Override, Owner, Record, Update,
};

/// Promise 8 as numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protection {
    /// How long an instance is held at most. Zero switches protection off.
    pub(crate) bound: Duration,
    /// The least share of a service that must vanish.
    pub(crate) threshold: f64,
    /// Within how long it must vanish.
    pub(crate) window: Duration,
}

/// The fewest instances that must vanish together before any is held.
const FEWEST: usize = 2;
/// How many different sets of labels are looked through for one that an instance can share: one for each version that is
/// deployed, and few enough to cost nothing where every instance has its own.
const LABELS: usize = 8;

#[derive(Debug)]
pub(crate) struct Cache {
    protection: Protection,
    present: BTreeMap<InstanceId, Arc<Instance>>,
    overrides: BTreeMap<InstanceId, Set>,
    /// The overrides whose instance is not there, and since when it has not been, without a break.
    vacant: BTreeMap<InstanceId, Instant>,
    held: BTreeMap<InstanceId, Held>,
    /// Unmarked losses within the window, oldest first.
    losses: VecDeque<Loss>,
    /// The labels that were seen lately, the latest first.
    labels: VecDeque<Metadata>,
    /// What was kept on disk: shown until the first `Reset`. Nobody saw it alive since, so none of it is a loss.
    remembered: Vec<Arc<Instance>>,
    changed: bool,
}

/// An override as it was last written.
#[derive(Debug, PartialEq)]
struct Set {
    to: Override,
    by: (Owner, Epoch),
}

#[derive(Debug)]
struct Held {
    instance: Arc<Instance>,
    until: Instant,
}

#[derive(Debug)]
struct Loss {
    at: Instant,
    instance: Arc<Instance>,
}

impl Cache {
    pub(crate) fn new(protection: Protection) -> Self {
        Self {
            protection,
            present: BTreeMap::new(),
            overrides: BTreeMap::new(),
            vacant: BTreeMap::new(),
            held: BTreeMap::new(),
            losses: VecDeque::new(),
            labels: VecDeque::new(),
            remembered: Vec::new(),
            changed: false,
        }
    }

    /// Shows these instances, sorted by id, until the store tells what there is.
    pub(crate) fn remember(&mut self, instances: Vec<Arc<Instance>>) {
        self.remembered = instances;
        self.changed = true;
    }

    /// Applies updates that belong together.
    pub(crate) fn apply(&mut self, updates: Vec<Update>, now: Instant) {
        for update in updates {
            match update {
                Update::Upsert(record) => self.upsert(record),
                Update::Remove { key, cause } => self.remove(&key, cause, now),
                Update::Reset { records, left, rewound } => self.reset(records, left, rewound, now),
            }
        }
        self.protect(now);
    }

    /// Lets go of what has been held for long enough.
    pub(crate) fn release(&mut self, now: Instant) {
        let before = self.held.len();
        self.held.retain(|_, held| held.until > now);
        self.changed |= self.held.len() != before;
    }

    /// When the next held instance is let go.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        self.held.values().map(|held| held.until).min()
    }

    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether what readers see has changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Takes note of which overrides have no instance now.
    pub(crate) fn note_vacant(&mut self, now: Instant) {
        let Self { overrides, vacant, present, held, .. } = self;
        let is_absent = |id: &InstanceId| !present.contains_key(id) && !held.contains_key(id);
        vacant.retain(|id, _| overrides.contains_key(id) && is_absent(id));
        for id in overrides.keys().filter(|id| is_absent(id)) {
            vacant.entry(id.clone()).or_insert(now);
        }
    }

    /// Nobody can tell any more who is there.
    pub(crate) fn forget_vacant(&mut self) {
        self.vacant.clear();
    }

    /// Since when the first of the vacant overrides has been so.
    pub(crate) fn vacant_since(&self) -> Option<Instant> {
        self.vacant.values().min().copied()
    }

    /// The overrides that have been vacant for so long.
    pub(crate) fn vacant_for(&self, long: Duration, now: Instant) -> Vec<InstanceId> {
        let vacant = self.vacant.iter().filter(|(_, since)| now.duration_since(**since) >= long);
        vacant.map(|(id, _)| id.clone()).collect()
    }

    /// What readers see, sorted by id.
    pub(crate) fn instances(&self) -> Vec<Arc<Instance>> {
        if !self.remembered.is_empty() {
            return self.remembered.clone();
        }
        if self.held.is_empty() && self.overrides.is_empty() {
            return self.present.values().cloned().collect();
        }
        let mut all: BTreeMap<&InstanceId, &Arc<Instance>> =
            self.held.iter().map(|(id, held)| (id, &held.instance)).collect();
        all.extend(&self.present);
        all.into_iter().map(|(id, instance)| self.overridden(id, instance)).collect()
    }

    fn overridden(&self, id: &InstanceId, instance: &Arc<Instance>) -> Arc<Instance> {
        let Some(set) = self.overrides.get(id) else { return instance.clone() };
        Arc::new(set.to.merged_into(instance))
    }

    /// Whether readers see an instance of this id.
    fn shows(&self, id: &InstanceId) -> bool {
        self.present.contains_key(id) || self.held.contains_key(id)
    }

    fn upsert(&mut self, record: Record) {
        let Record { key: Key { directory, id, .. }, owner, epoch, content, .. } = record;
        match (directory, content) {
            (Directory::Providers, Content::Instance(mut instance)) => {
                self.share(&mut instance);
                self.losses.retain(|loss| loss.instance.id != id);
                if let Some(held) = self.held.remove(&id) {
                    // Back: keep the copy that readers have if it says the same.
                    self.present.insert(id.clone(), held.instance);
                    self.changed = true;
                }
                match self.present.entry(id) {
                    btree_map::Entry::Vacant(place) => {
                        place.insert(instance);
                        self.changed = true;
                    }
                    btree_map::Entry::Occupied(mut known) => {
                        if *known.get() != instance {
                            known.insert(instance);
                            self.changed = true;
                        }
                    }
                }
            }
            (Directory::Overrides, Content::Override(to)) => self.set(id, Set { to, by: (owner, epoch) }),
            _ => {}
        }
    }

    /// Keeps once what the instances of a service have in common.
    fn share(&mut self, instance: &mut Arc<Instance>) {
        // A store in this process holds it, too, as it is.
        let Some(instance) = Arc::get_mut(instance) else { return };
        if let Some(known) = self.present.values().next().filter(|known| known.service == instance.service) {
            instance.service = known.service.clone();
        }
        let known = self.labels.iter().position(|known| *known == instance.metadata);
        match known.and_then(|at| self.labels.remove(at)) {
            Some(known) => instance.metadata = known,
            None => self.labels.truncate(LABELS - 1),
        }
        self.labels.push_front(instance.metadata.clone());
    }

    fn set(&mut self, id: InstanceId, set: Set) {
        let shown = self.shows(&id);
        let before = self.overrides.get(&id);
        self.changed |= shown && before.is_none_or(|before| before.to != set.to);
        if before != Some(&set) {
            // Whoever sets it anew, be it to the same, means it for an instance to come.
            self.vacant.remove(&id);
            self.overrides.insert(id, set);
        }
    }

    fn lift(&mut self, id: &InstanceId) {
        self.changed |= self.overrides.remove(id).is_some() && self.shows(id);
    }

    fn remove(&mut self, key: &Key, cause: Departure, now: Instant) {
        match key.directory {
            Directory::Providers => {
                let gone = self.present.remove(&key.id);
                self.changed |= gone.is_some();
                match (cause, gone) {
                    (Departure::Left, _) => {
                        self.changed |= self.held.remove(&key.id).is_some();
                        self.losses.retain(|loss| loss.instance.id != key.id);
                    }
                    (Departure::Unknown, Some(instance)) => self.losses.push_back(Loss { at: now, instance }),
                    (Departure::Unknown, None) => {}
                }
            }
            Directory::Overrides => self.lift(&key.id),
            Directory::Consumers => {}
        }
    }

    fn reset(&mut self, records: Vec<Record>, left: Vec<Key>, rewound: bool, now: Instant) {
        // Where nothing was known, nothing is missing.
        let known = !self.present.is_empty() || !self.overrides.is_empty();
        let listed: HashSet<(Directory, InstanceId)> =
            records.iter().filter(|_| known).map(|record| (record.key.directory, record.key.id.clone())).collect();
        let left: HashSet<InstanceId> = left.into_iter().map(|key| key.id).collect();
        self.changed |= !std::mem::take(&mut self.remembered).is_empty();

        let is_lifted = |id: &&InstanceId| !listed.contains(&(Directory::Overrides, (*id).clone()));
        let lifted: Vec<_> = self.overrides.keys().filter(is_lifted).cloned().collect();
        lifted.iter().for_each(|id| self.lift(id));

        let missing: Vec<_> = self
            .present
            .keys()
            .filter(|id| !listed.contains(&(Directory::Providers, (*id).clone())))
            .cloned()
            .collect();
        for id in missing {
            let Some(instance) = self.present.remove(&id) else { continue };
            self.changed = true;
            if left.contains(&id) {
                continue;
            }
            if rewound {
                self.hold(instance.clone(), now);
            }
            self.losses.push_back(Loss { at: now, instance });
        }
        let before = self.held.len();
        self.held.retain(|id, _| !left.contains(id));
        self.changed |= self.held.len() != before;
        self.losses.retain(|loss| !left.contains(&loss.instance.id));
        records.into_iter().for_each(|record| self.upsert(record));
    }

    /// Holds the losses of the window, those already published included, once they are enough.
    fn protect(&mut self, now: Instant) {
        let Protection { threshold, window, .. } = self.protection;
        while self.losses.front().is_some_and(|loss| now.duration_since(loss.at) > window) {
            self.losses.pop_front();
        }
        let lost = self.losses.len();
        let all = lost + self.present.len();
        if lost < FEWEST || (lost as f64) < threshold * all as f64 {
            return;
        }
        let bound = self.protection.bound;
        let held = self.losses.iter().filter(|loss| loss.at + bound > now);
        for (at, instance) in held.map(|loss| (loss.at, loss.instance.clone())).collect::<Vec<_>>() {
            self.hold(instance, at);
        }
    }

    fn hold(&mut self, instance: Arc<Instance>, since: Instant) {
        if self.protection.bound.is_zero() || self.held.contains_key(&instance.id) {
            return;
        }
        let until = since + self.protection.bound;
        self.changed = true;
        self.held.insert(instance.id.clone(), Held { instance, until });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Lifetime, ServiceName};

    fn record(id: &str, version: &str) -> Record {
        let instance = Instance::builder("orders", id).metadata("version", version).build().unwrap();
        let key = Key::provider(ServiceName::parse("orders").unwrap(), instance.id.clone());
        let content = Content::Instance(Arc::new(instance));
        Record { key, owner: Owner::random(), epoch: 1, lifetime: Lifetime::Session, content }
    }

    #[test]
    fn instances_with_the_same_labels_keep_them_once() {
        let protection = Protection { bound: Duration::ZERO, threshold: 1.0, window: Duration::ZERO };
        let mut cache = Cache::new(protection);
        let records = (0..100).map(|id| record(&id.to_string(), if id % 2 == 0 { "1" } else { "2" }));
        cache.apply(records.map(Update::Upsert).collect(), Instant::now());
        let instances = cache.instances();
        let kept = |instance: &Arc<Instance>| (instance.service.as_ptr(), instance.metadata["version"].as_ptr());
        let distinct: HashSet<_> = instances.iter().map(kept).collect();
        assert_eq!((instances.len(), distinct.len()), (100, 2));
        // One that changes takes nothing along.
        let mut changed = Instance::clone(&instances[0]);
        changed.metadata.insert("canary".to_owned(), "yes".to_owned());
        assert_eq!(instances.iter().filter(|one| one.metadata.contains_key("canary")).count(), 0);
    }
}
