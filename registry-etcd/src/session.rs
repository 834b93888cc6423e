//! The leases that our records hang on, and which record hangs on which.
//!
//! ```text
//! none ──first put──▶ granted ──renew──▶ granted ──gone──▶ lost ──next put──▶ granted, renewed
//! ```
//!
//! One lease would do for the store's own sake up to a thousand keys; beyond that, writing to it and revoking it get
//! slow. So there are as many as it takes, and one that is lost takes only its own keys with it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use foldhash::fast::RandomState;
use registry_core::{Few, Key, SessionEvent};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::{
    endpoints::Pool,
    error::{Class, Failure, NAME},
};

/// How many keys hang on one lease.
const KEYS_PER_LEASE: usize = 1000;
/// How many requests about different leases are in flight.
const AT_ONCE: usize = 16;
/// Stands in for the lease of a record that hangs on none.
pub(crate) const PERSISTENT: i64 = 0;

/// Our leases.
#[derive(Debug)]
pub(crate) struct Session {
    pool: Arc<Pool>,
    seconds: i64,
    /// Single flight: whoever needs a lease meanwhile waits for this one. Renewals do not.
    granting: tokio::sync::Mutex<()>,
    /// Held for look-ups and short edits, never across an `.await`.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The leases that live, as far as we know.
    leases: BTreeMap<i64, Lease>,
    held: HashMap<Key, Held, RandomState>,
    /// The last lease is gone and none was granted since.
    lost: bool,
}

#[derive(Debug)]
struct Lease {
    /// How many of our keys hang on it. With none it is not renewed.
    keys: usize,
    ttl: Duration,
    /// Until when it lives for certain.
    until: Instant,
}

/// A key of ours.
#[derive(Clone, Copy, Debug)]
struct Held {
    lease: i64,
    written: i64,
}

/// Where a key hangs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hold {
    pub(crate) lease: i64,
    /// The revision at which we wrote it last, 0 if we did not: what a further write can expect to find.
    pub(crate) written: i64,
    /// It was not there before this call.
    pub(crate) fresh: bool,
}

/// The ttl as etcd counts: whole seconds, and no less than it would grant anyway.
pub(crate) fn whole_seconds(ttl: Duration) -> Duration {
    Duration::from_secs(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).max(Duration::from_secs(2))
}

impl Session {
    pub(crate) fn new(pool: Arc<Pool>, ttl: Duration) -> Self {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        Self { pool, seconds, granting: tokio::sync::Mutex::default(), state: Mutex::default() }
    }

    /// A live lease for each key: the one it hangs on, or one with room, granted where there is none.
    pub(crate) async fn hold(&self, keys: &[&Key]) -> Result<Vec<Hold>, Failure> {
        let _single_flight = self.granting.lock().await;
        let mut holds: Vec<Hold> = Vec::with_capacity(keys.len());
        for key in keys {
            let known = self.state().hold(key);
            holds.push(match known {
                Some(hold) => hold,
                None => match self.grant().await {
                    Ok(lease) => self.state().hang(key, lease),
                    Err(failure) => {
                        let fresh = keys.iter().zip(&holds).filter(|(_, hold)| hold.fresh);
                        fresh.for_each(|(key, _)| self.release(key));
                        return Err(failure);
                    }
                },
            });
        }
        Ok(holds)
    }

    /// The key hangs on no lease and needs none.
    pub(crate) fn hold_persistent(&self, key: &Key) {
        self.state().hang(key, PERSISTENT);
    }

    /// We wrote the key at this revision.
    pub(crate) fn wrote(&self, key: &Key, revision: i64) {
        if let Some(held) = self.state().held.get_mut(key) {
            held.written = revision;
        }
    }

    /// Any live lease, for what is to go with our session.
    pub(crate) async fn any(&self) -> Result<i64, Failure> {
        let _single_flight = self.granting.lock().await;
        let lease = self.state().any(|_| true);
        match lease {
            Some(lease) => Ok(lease),
            None => self.grant().await,
        }
    }

    /// The key is no longer ours.
    pub(crate) fn release(&self, key: &Key) {
        self.state().release(key);
    }

    /// The lease is gone, and with it everything on it.
    fn forget(&self, lease: i64) {
        let mut state = self.state();
        let Some(Lease { keys, .. }) = state.drop_lease(lease) else { return };
        if keys == 0 {
            return;
        }
        warn!(backend = NAME, lease = format_args!("{lease:x}"), keys, "the lease is gone");
        if state.leases.values().all(|lease| lease.keys == 0) {
            state.lost = true;
            self.pool.emit(SessionEvent::Lost);
        }
    }

    /// Renews the leases that something hangs on, and lets the others expire. Tells whether the store was asked.
    pub(crate) async fn renew(&self) -> Result<bool, Failure> {
        let leases = self.state().leases.iter().filter(|(_, lease)| lease.keys > 0).map(|(id, _)| *id).collect();
        self.renew_these(leases).await
    }

    /// Finds out which leases live, after the store said that one of them does not.
    pub(crate) async fn sift(&self) -> Result<(), Failure> {
        self.renew_these(self.leases()).await.map(drop)
    }

    async fn renew_these(&self, leases: Vec<i64>) -> Result<bool, Failure> {
        let renewed = all(leases, |lease| async move {
            let asked = Instant::now();
            match self.pool.keep_alive(lease).await {
                Err(failure) if failure.class() == Class::LeaseGone => self.forget(lease),
                other => {
                    other?;
                    if let Some(lease) = self.state().leases.get_mut(&lease) {
                        lease.until = asked + lease.ttl;
                    }
                }
            }
            Ok(())
        });
        renewed.await.map(|asked| !asked.is_empty())
    }

    /// Those of the keys that hang on no live lease and would have to.
    pub(crate) fn missing(&self, keys: &[Key]) -> Vec<Key> {
        let state = self.state();
        keys.iter().filter(|key| !state.held.contains_key(*key)).cloned().collect()
    }

    /// Those of the keys that we put without a lease.
    pub(crate) fn persistent<'a>(&self, keys: &'a [Key]) -> Vec<&'a Key> {
        let state = self.state();
        keys.iter().filter(|key| state.held.get(*key).is_some_and(|held| held.lease == PERSISTENT)).collect()
    }

    /// What the store says hangs on our leases.
    pub(crate) async fn attached(&self) -> Result<Vec<Vec<u8>>, Failure> {
        let attached = all(self.leases(), |lease| async move {
            let keys = self.pool.attached(lease).await?;
            if keys.is_none() {
                self.forget(lease);
            }
            Ok(keys.unwrap_or_default())
        });
        Ok(attached.await?.concat())
    }

    /// Gives up every lease and everything on it.
    pub(crate) async fn revoke(&self) -> Result<(), Failure> {
        let revoked = all(self.leases(), |lease| async move {
            self.pool.revoke(lease).await?;
            self.state().drop_lease(lease);
            Ok(())
        });
        revoked.await.map(drop)
    }

    async fn grant(&self) -> Result<i64, Failure> {
        let asked = Instant::now();
        let (lease, ttl) = self.pool.grant(self.seconds).await?;
        self.pool.granted(ttl);
        let mut state = self.state();
        state.leases.insert(lease, Lease { keys: 0, ttl, until: asked + ttl });
        info!(backend = NAME, lease = format_args!("{lease:x}"), ?ttl, "granted a lease");
        if std::mem::take(&mut state.lost) {
            self.pool.emit(SessionEvent::Renewed);
        }
        Ok(lease)
    }

    fn leases(&self) -> Vec<i64> {
        self.state().leases.keys().copied().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks about several leases at once; about all of them, even if one request fails.
async fn all<T, F>(leases: Vec<i64>, request: impl Fn(i64) -> F) -> Result<Vec<T>, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    let requests: Vec<_> = leases.into_iter().map(request).collect();
    let outcomes = Few::at_most(AT_ONCE, requests).await;
    outcomes.into_iter().collect()
}

impl State {
    /// Hangs a key on the lease that it is on, or on one with room.
    fn hold(&mut self, key: &Key) -> Option<Hold> {
        if let Some(&Held { lease, written }) = self.held.get(key).filter(|held| held.lease != PERSISTENT) {
            return Some(Hold { lease, written, fresh: false });
        }
        let lease = self.any(|lease| lease.keys < KEYS_PER_LEASE)?;
        Some(self.hang(key, lease))
    }

    /// A lease that has what is asked for and does not expire under our hands.
    fn any(&mut self, fits: impl Fn(&Lease) -> bool) -> Option<i64> {
        let now = Instant::now();
        self.leases.retain(|_, lease| lease.keys > 0 || lease.until > now);
        let lives = |lease: &Lease| lease.keys > 0 || lease.until > now + lease.ttl / 3;
        self.leases.iter().find(|(_, lease)| lives(lease) && fits(lease)).map(|(id, _)| *id)
    }

    fn drop_lease(&mut self, lease: i64) -> Option<Lease> {
        let dropped = self.leases.remove(&lease)?;
        self.held.retain(|_, held| held.lease != lease);
        Some(dropped)
    }

    fn hang(&mut self, key: &Key, lease: i64) -> Hold {
        if let Some(before) = self.held.insert(key.clone(), Held { lease, written: 0 }) {
            self.hangs_no_more(before);
        }
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys += 1;
        }
        Hold { lease, written: 0, fresh: true }
    }

    fn release(&mut self, key: &Key) {
        if let Some(held) = self.held.remove(key) {
            self.hangs_no_more(held);
        }
    }

    fn hangs_no_more(&mut self, held: Held) {
        if let Some(lease) = self.leases.get_mut(&held.lease) {
            lease.keys -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: usize) -> Key {
        Key::provider("orders".parse().unwrap(), id.to_string().parse().unwrap())
    }

    #[test]
    fn a_ttl_is_rounded_up_to_what_the_store_counts_in() {
        let seconds = |millis| whole_seconds(Duration::from_millis(millis)).as_secs();
        assert_eq!([100, 2000, 2001, 15_000].map(seconds), [2, 2, 3, 15]);
    }

    fn state(ttl: Duration) -> State {
        let mut state = State::default();
        state.leases.insert(7, Lease { keys: 0, ttl, until: Instant::now() + ttl });
        state
    }

    #[tokio::test]
    async fn a_lease_takes_a_thousand_keys_and_a_key_stays_where_it_is() {
        assert!(State::default().hold(&key(0)).is_none());
        let mut state = state(Duration::from_secs(10));
        for id in 0..KEYS_PER_LEASE {
            assert!(state.hold(&key(id)).is_some_and(|hold| hold.lease == 7 && hold.fresh));
        }
        assert!(state.hold(&key(KEYS_PER_LEASE)).is_none());
        assert!(state.hold(&key(0)).is_some_and(|hold| hold.lease == 7 && !hold.fresh));
        state.release(&key(0));
        assert!(state.hold(&key(KEYS_PER_LEASE)).is_some());
        state.hang(&key(1), PERSISTENT);
        assert_eq!(state.leases[&7].keys, KEYS_PER_LEASE - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_nobody_renews_is_not_used_when_it_is_about_to_expire() {
        let mut state = state(Duration::from_secs(9));
        assert!(state.any(|_| true).is_some());
        tokio::time::advance(Duration::from_secs(7)).await;
        assert!(state.any(|_| true).is_none() && !state.leases.is_empty());
        tokio::time::advance(Duration::from_secs(3)).await;
        assert!(state.any(|_| true).is_none() && state.leases.is_empty());
    }
}
