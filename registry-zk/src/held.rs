//! What we wrote, and under which session: what a renewal can tell without asking anyone.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use registry_core::{Key, Lifetime};

/// The keys that we put and have not removed since.
#[derive(Debug, Default)]
pub(crate) struct Held {
    map: Mutex<HashMap<Key, Hold>>,
    /// How many were looked at, over all checks.
    looked_at: AtomicUsize,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    /// `None` for what hangs on no session.
    session: Option<i64>,
    /// The version that our last write gave to the node; `None` if something may have happened to it since.
    version: Option<i32>,
}

/// What a write can expect to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// Nothing, as far as we know.
    Absent,
    /// What we wrote last, with this version.
    Ours(i32),
    /// Something: look first.
    Unknown,
}

impl Held {
    pub(crate) fn wrote(&self, key: &Key, lifetime: Lifetime, session: i64, version: i32) {
        let session = (lifetime == Lifetime::Session).then_some(session);
        self.map().insert(key.clone(), Hold { session, version: Some(version) });
    }

    /// A write of the key has no known outcome, or it is not there any more.
    pub(crate) fn doubt(&self, key: &Key) {
        if let Some(hold) = self.map().get_mut(key) {
            hold.version = None;
        }
    }

    /// The key is no longer ours.
    pub(crate) fn release(&self, key: &Key) {
        self.map().remove(key);
    }

    pub(crate) fn expect(&self, key: &Key, session: i64) -> Expect {
        match self.map().get(key) {
            Some(Hold { session: Some(other), .. }) if *other != session => Expect::Absent,
            Some(Hold { version: Some(version), .. }) => Expect::Ours(*version),
            Some(_) => Expect::Unknown,
            None => Expect::Absent,
        }
    }

    /// Those of the keys that we did not put under this session and would have to.
    pub(crate) fn missing(&self, keys: &[Key], session: i64) -> Vec<Key> {
        let map = self.map();
        let here = |key: &Key| map.get(key).is_some_and(|hold| hold.session.is_none_or(|other| other == session));
        keys.iter().filter(|key| !here(key)).cloned().collect()
    }

    /// Those of the keys that we put under no session.
    pub(crate) fn persistent<'a>(&self, keys: &'a [Key]) -> Vec<&'a Key> {
        let map = self.map();
        keys.iter().filter(|key| map.get(*key).is_some_and(|hold| hold.session.is_none())).collect()
    }

    /// Those of the keys whose turn it is to be looked at: so many, the next ones at the next call.
    pub(crate) fn in_turn<'a>(&self, keys: &'a [Key], count: usize) -> impl Iterator<Item = &'a Key> {
        let count = count.min(keys.len());
        let from = self.looked_at.fetch_add(count, Ordering::Relaxed) % keys.len().max(1);
        keys.iter().cycle().skip(from).take(count)
    }

    /// Whether the node of a key that has this version may be as we left it.
    pub(crate) fn may_be(&self, key: &Key, version: i32) -> bool {
        match self.map().get(key) {
            Some(Hold { version: Some(ours), .. }) => *ours == version,
            _ => true,
        }
    }

    /// The store has these of ours, and no others.
    pub(crate) fn verified(&self, keys: &[Key], held: &HashSet<Key>) {
        keys.iter().filter(|key| !held.contains(*key)).for_each(|key| self.doubt(key));
    }

    /// Locked for a look or an edit, never across an `.await`.
    fn map(&self) -> MutexGuard<'_, HashMap<Key, Hold>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_on_another_session_is_missing_and_not_expected() {
        let keys: Vec<_> =
            ["a", "b", "c"].map(|id| Key::provider("orders".parse().unwrap(), id.parse().unwrap())).into();
        let held = Held::default();
        held.wrote(&keys[0], Lifetime::Session, 1, 4);
        held.wrote(&keys[1], Lifetime::Persistent, 1, 5);
        assert_eq!((held.expect(&keys[0], 1), held.expect(&keys[0], 2)), (Expect::Ours(4), Expect::Absent));
        assert_eq!((held.expect(&keys[1], 2), held.expect(&keys[2], 1)), (Expect::Ours(5), Expect::Absent));
        assert_eq!(held.missing(&keys, 1), keys[2..]);
        assert_eq!(held.missing(&keys, 2), [keys[0].clone(), keys[2].clone()]);
        assert_eq!(held.persistent(&keys), [&keys[1]]);
        held.verified(&keys, &HashSet::from([keys[1].clone()]));
        assert_eq!((held.expect(&keys[0], 1), held.expect(&keys[1], 1)), (Expect::Unknown, Expect::Ours(5)));
        assert!(held.may_be(&keys[1], 5) && !held.may_be(&keys[1], 6) && held.may_be(&keys[0], 9));
        held.release(&keys[1]);
        assert_eq!(held.missing(&keys, 1), keys[1..]);
    }

    #[test]
    fn everything_has_its_turn() {
        let keys: Vec<_> =
            (0..5).map(|id| Key::provider("orders".parse().unwrap(), id.to_string().parse().unwrap())).collect();
        let held = Held::default();
        let turn = |count| held.in_turn(&keys, count).map(|key| key.id.to_string()).collect::<Vec<_>>().concat();
        assert_eq!([turn(2), turn(2), turn(2), turn(9)], ["01", "23", "40", "12340"]);
        assert_eq!(held.in_turn(&[], 2).count(), 0);
    }
}
