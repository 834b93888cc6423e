//! The complete set of a service's instances at one moment, and the difference of two such sets.

use std::{cmp::Ordering, fmt, sync::Arc, time::SystemTime};

use crate::{Instance, InstanceId, ServiceName};

/// How far a snapshot can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// No complete set has been read yet: the snapshot is empty, and that says nothing.
    Pending,
    /// It follows the store.
    Live,
    /// The store cannot be reached: this is the last known set.
    Stale {
        /// Since when, by the clock of this machine. A set from disk is stale since it was last known to be live.
        since: SystemTime,
    },
    /// It follows the store, and holds back instances that vanished without a word.
    Protected {
        /// Since when, by the clock of this machine.
        since: SystemTime,
    },
}

impl Freshness {
    /// The freshness as one lower-case word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Live => "live",
            Self::Stale { .. } => "stale",
            Self::Protected { .. } => "protected",
        }
    }
}

impl fmt::Display for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The complete set of a service's instances, sorted by id. Cheap to clone.
#[derive(Clone)]
pub struct Snapshot {
    set: Arc<Set>,
    revision: u64,
    freshness: Freshness,
}

struct Set {
    service: ServiceName,
    instances: Vec<Arc<Instance>>,
}

impl Snapshot {
    /// The snapshot of a service before anything was read.
    pub(crate) fn pending(service: ServiceName) -> Self {
        Self { set: Arc::new(Set { service, instances: Vec::new() }), revision: 0, freshness: Freshness::Pending }
    }

    /// The next snapshot with other instances, which must be sorted by id.
    pub(crate) fn with_instances(&self, instances: Vec<Arc<Instance>>, freshness: Freshness) -> Self {
        debug_assert!(instances.is_sorted_by(|a, b| a.id < b.id));
        let set = Arc::new(Set { service: self.set.service.clone(), instances });
        Self { set, revision: self.revision + 1, freshness }
    }

    /// The next snapshot with the same instances.
    pub(crate) fn with_freshness(&self, freshness: Freshness) -> Self {
        Self { set: self.set.clone(), revision: self.revision + 1, freshness }
    }

    /// Whether both show one and the same set, whatever their freshness.
    pub(crate) fn shares_set(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.set, &other.set)
    }

    /// The service.
    #[must_use]
    pub fn service(&self) -> &ServiceName {
        &self.set.service
    }

    /// All instances, sorted by id, drained and not-up ones included.
    #[must_use]
    pub fn instances(&self) -> &[Arc<Instance>] {
        &self.set.instances
    }

    /// The instances that take traffic: up, with a weight above 0.
    pub fn available(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.instances().iter().filter(|instance| instance.is_available())
    }

    /// The instance with this id.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Arc<Instance>> {
        let at = self.instances().binary_search_by(|instance| instance.id.as_str().cmp(id)).ok()?;
        self.instances().get(at)
    }

    /// How many instances there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.instances().len()
    }

    /// Whether there are none. Look at [`freshness`](Self::freshness) before you conclude anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.instances().is_empty()
    }

    /// This reader's own count of what it published for the service; grows by one each time. Not comparable between
    /// processes.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// How far it can be trusted.
    #[must_use]
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }

    /// What changed from `older` to this snapshot, sorted by id. Takes one pass over both; instances that did not
    /// change are told by their address.
    ///
    /// # Examples
    /// ```
    /// # use registry_core::{Change, Instance, Managed, Registry};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-changes")?;
    /// let before = registry.discover("orders").await?;
    /// let mut watcher = registry.watch("orders").await?;
    /// registry.register(Instance::builder("orders", "1").build()?).await?;
    /// while watcher.current().is_empty() {
    ///     watcher.next().await;
    /// }
    /// let changes = watcher.current().changes_since(&before);
    /// assert!(matches!(&changes[..], [Change::Insert { after }] if after.id.as_str() == "1"));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn changes_since(&self, older: &Self) -> Vec<Change> {
        if self.shares_set(older) {
            return Vec::new();
        }
        let (mut old, mut new) = (older.instances().iter().peekable(), self.instances().iter().peekable());
        let mut changes = Vec::new();
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => return changes,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(before), Some(after)) => before.id.cmp(&after.id),
            };
            let before = if order.is_le() { old.next() } else { None };
            let after = if order.is_ge() { new.next() } else { None };
            match (before.cloned(), after.cloned()) {
                (Some(before), Some(after)) if Arc::ptr_eq(&before, &after) || before == after => {}
                (Some(before), Some(after)) => changes.push(Change::Update { before, after }),
                (Some(before), None) => changes.push(Change::Remove { before }),
                (None, Some(after)) => changes.push(Change::Insert { after }),
                (None, None) => {}
            }
        }
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("service", self.service())
            .field("revision", &self.revision)
            .field("freshness", &self.freshness)
            .field("instances", &self.instances())
            .finish()
    }
}

/// One difference between two snapshots.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// An instance is new.
    Insert {
        /// The instance.
        after: Arc<Instance>,
    },
    /// An instance changed.
    Update {
        /// As it was.
        before: Arc<Instance>,
        /// As it is.
        after: Arc<Instance>,
    },
    /// An instance is gone.
    Remove {
        /// As it was.
        before: Arc<Instance>,
    },
}

impl Change {
    /// The id of the instance.
    #[must_use]
    pub fn id(&self) -> &InstanceId {
        match self {
            Self::Insert { after } | Self::Update { after, .. } => &after.id,
            Self::Remove { before } => &before.id,
        }
    }

    /// The instance before the change.
    #[must_use]
    pub fn before(&self) -> Option<&Arc<Instance>> {
        match self {
            Self::Insert { .. } => None,
            Self::Update { before, .. } | Self::Remove { before } => Some(before),
        }
    }

    /// The instance after the change.
    #[must_use]
    pub fn after(&self) -> Option<&Arc<Instance>> {
        match self {
            Self::Insert { after } | Self::Update { after, .. } => Some(after),
            Self::Remove { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Model = BTreeMap<String, u32>;

    fn snapshot(model: &Model) -> Snapshot {
        let instances = model
            .iter()
            .map(|(id, weight)| Arc::new(Instance::builder("s", id).weight(*weight).build().unwrap()))
            .collect();
        Snapshot::pending("s".parse().unwrap()).with_instances(instances, Freshness::Live)
    }

    proptest! {
        #[test]
        fn applying_the_changes_to_the_older_gives_the_newer(
            old in proptest::collection::btree_map("[a-f]{1,2}", 0u32..3, 0..20),
            new in proptest::collection::btree_map("[a-f]{1,2}", 0u32..3, 0..20),
        ) {
            let changes = snapshot(&new).changes_since(&snapshot(&old));
            prop_assert!(changes.is_sorted_by(|a, b| a.id() < b.id()));
            let mut model = old;
            for change in changes {
                let before = change.before().map(|instance| instance.weight);
                prop_assert_eq!(model.remove(change.id().as_str()), before);
                if let Some(after) = change.after() {
                    prop_assert_ne!(before, Some(after.weight));
                    model.insert(after.id.to_string(), after.weight);
                }
            }
            prop_assert_eq!(model, new);
        }
    }

    #[test]
    fn available_leaves_out_the_drained_and_the_not_up() {
        let mut instances: Vec<Instance> =
            ["a", "b", "c"].iter().map(|id| Instance::builder("s", id).build().unwrap()).collect();
        instances[0].weight = 0;
        instances[1].status = crate::Status::Draining;
        let snapshot = Snapshot::pending("s".parse().unwrap())
            .with_instances(instances.into_iter().map(Arc::new).collect(), Freshness::Live);
        assert_eq!(snapshot.available().map(|instance| instance.id.as_str()).collect::<Vec<_>>(), ["c"]);
        assert!(snapshot.get("b").is_some() && snapshot.get("z").is_none());
    }
}
