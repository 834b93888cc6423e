//! What a pick reads: who takes traffic, prepared for the strategy, once for each change.

use std::sync::{Arc, atomic::Ordering};

use registry_core::{DEFAULT_WEIGHT, InstanceId};

use crate::{
    balancer::Strategy,
    counter::Counter,
    draw::{Dice, Turns},
    member::{Entry, Slot, millis},
    ring::{self, Ring},
};

/// Weights are counted in these parts, so that a small one can warm up.
pub(crate) const PARTS: u64 = 1000;
/// A zone keeps its traffic as long as 1 / 1.4 of its weight takes it: what is left is thought to have that much room.
const ROOM: f64 = 1.4;

/// Who takes traffic.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// One's own zone first, if there is one; none of them is empty.
    pools: Vec<Pool>,
    /// The odds, of `u32::MAX`, that a pick is from the first of two pools.
    local: u32,
    pub(crate) census: Census,
}

/// Why there is nobody.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Census {
    pub(crate) registered: usize,
    pub(crate) filtered: usize,
    pub(crate) elsewhere: usize,
    pub(crate) off: usize,
    pub(crate) ejected: usize,
}

/// One who takes traffic, and its weight in `PARTS`.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) entry: Arc<Entry>,
    pub(crate) weight: u64,
}

/// Weight in one's own zone: all that is there, and what takes traffic.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Room {
    pub(crate) known: u64,
    pub(crate) open: u64,
}

#[derive(Debug)]
struct Pool {
    entries: Box<[Arc<Entry>]>,
    weights: Box<[u64]>,
    total: u64,
    chooser: Chooser,
}

#[derive(Debug)]
enum Chooser {
    Turns(Turns),
    Dice(Dice),
    Least(Turns),
    /// And what a call in flight at each counts, which is less for a larger weight.
    Two(Dice, Box<[f32]>),
    Ring(Ring),
}

impl Table {
    /// `zone` is one's own, with the weight that is in it.
    pub(crate) fn new(
        strategy: Strategy,
        candidates: Vec<Candidate>,
        zone: Option<(&str, Room)>,
        census: Census,
    ) -> Self {
        let Some((zone, room)) = zone else {
            return Self { pools: pools(strategy, [candidates]), local: u32::MAX, census };
        };
        let near = |candidate: &Candidate| candidate.entry.slot.instance.zone.as_deref() == Some(zone);
        let (near, far): (Vec<_>, Vec<_>) = candidates.into_iter().partition(near);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of u32::MAX")]
        let local = (f64::from(u32::MAX) * (ROOM * room.open as f64 / room.known.max(1) as f64).min(1.0)) as u32;
        Self { pools: pools(strategy, [near, far]), local, census }
    }

    pub(crate) fn len(&self) -> usize {
        self.pools.iter().map(|pool| pool.entries.len()).sum()
    }

    /// Somebody who is not among `tried`, and whether this is the one call at a time of who was ejected. `now` is in
    /// nanoseconds.
    pub(crate) fn pick<'a>(
        &'a self,
        counter: &Counter,
        key: Option<&[u8]>,
        tried: &[InstanceId],
        now: Option<u64>,
    ) -> Option<(&'a Arc<Slot>, bool)> {
        let pick = |pool: &'a Pool| pool.pick(counter, key, tried, now);
        match &*self.pools {
            [] => None,
            [only] => pick(only),
            [near, far, ..] if self.local < u32::MAX && fastrand::u32(..) > self.local => {
                pick(far).or_else(|| pick(near))
            }
            [near, far, ..] => pick(near).or_else(|| pick(far)),
        }
    }
}

fn pools<const N: usize>(strategy: Strategy, of: [Vec<Candidate>; N]) -> Vec<Pool> {
    of.into_iter().filter(|of| !of.is_empty()).map(|of| Pool::new(strategy, of)).collect()
}

/// The mean weight over each.
#[allow(clippy::cast_precision_loss, reason = "for a comparison of estimates")]
fn efforts(weights: &[u64]) -> Box<[f32]> {
    let mean = weights.iter().sum::<u64>() as f32 / weights.len() as f32;
    weights.iter().map(|weight| mean / (*weight).max(1) as f32).collect()
}

impl Pool {
    fn new(strategy: Strategy, candidates: Vec<Candidate>) -> Self {
        let (entries, weights): (Vec<_>, Vec<_>) = candidates.into_iter().map(|one| (one.entry, one.weight)).unzip();
        let chooser = match strategy {
            Strategy::RoundRobin => Chooser::Turns(Turns::even(entries.len())),
            Strategy::Weighted => Chooser::Turns(Turns::by(&weights)),
            Strategy::Random => Chooser::Dice(Dice::by(&weights)),
            Strategy::LeastLoaded => Chooser::Least(Turns::by(&weights)),
            Strategy::PowerOfTwo => Chooser::Two(Dice::by(&weights), efforts(&weights)),
            Strategy::ConsistentHash => {
                let members =
                    entries.iter().zip(&weights).map(|(entry, weight)| (entry.slot.instance.id.as_str(), *weight));
                Chooser::Ring(Ring::new(members, u64::from(DEFAULT_WEIGHT) * PARTS))
            }
        };
        Self { entries: entries.into(), total: weights.iter().sum(), weights: weights.into(), chooser }
    }

    fn pick(
        &self,
        counter: &Counter,
        key: Option<&[u8]>,
        tried: &[InstanceId],
        now: Option<u64>,
    ) -> Option<(&Arc<Slot>, bool)> {
        let at = self.choose(counter, key, now);
        let slot = &self.entries[at].slot;
        if !slot.tried && (tried.is_empty() || !tried.contains(&slot.instance.id)) {
            return Some((slot, false));
        }
        self.pick_near(at, tried)
    }

    /// The one at this place or the next one that is not out of the question.
    #[cold]
    fn pick_near(&self, at: usize, tried: &[InstanceId]) -> Option<(&Arc<Slot>, bool)> {
        let (before, after) = self.entries.split_at(at);
        let new =
            || after.iter().chain(before).map(|entry| &entry.slot).filter(|slot| !tried.contains(&slot.instance.id));
        let admitted = new().find(|slot| !slot.tried || !slot.load.trying.swap(true, Ordering::Relaxed));
        // Better one who has its call under way than nobody.
        let slot = admitted.or_else(|| new().next())?;
        Some((slot, admitted.is_some() && slot.tried))
    }

    fn choose(&self, counter: &Counter, key: Option<&[u8]>, now: Option<u64>) -> usize {
        match &self.chooser {
            Chooser::Turns(turns) => turns.next(counter),
            Chooser::Dice(dice) => dice.throw(fastrand::u32(..)),
            Chooser::Least(turns) => self.least_loaded(turns.next(counter)),
            Chooser::Two(dice, efforts) => {
                let random = fastrand::u64(..);
                #[allow(clippy::cast_possible_truncation, reason = "the lower half")]
                self.better(dice.throw((random >> 32) as u32), dice.throw(random as u32), efforts, now)
            }
            Chooser::Ring(ring) => self.on_ring(ring, key.map_or_else(|| fastrand::u64(..), ring::position)),
        }
    }

    fn in_flight(&self, at: usize) -> u64 {
        self.entries[at].in_flight() as u64
    }

    /// The first that has nothing to do, from this one on, or whoever has the least for its weight.
    fn least_loaded(&self, first: usize) -> usize {
        let (mut best, mut least) = (first, self.in_flight(first));
        for at in (first + 1..self.entries.len()).chain(0..first) {
            if least == 0 {
                break;
            }
            let in_flight = self.in_flight(at);
            if in_flight.saturating_mul(self.weights[best]) < least.saturating_mul(self.weights[at]) {
                (best, least) = (at, in_flight);
            }
        }
        best
    }

    /// Whichever would answer sooner; the first if that cannot be told.
    fn better(&self, a: usize, b: usize, efforts: &[f32], now: Option<u64>) -> usize {
        if a == b {
            return a;
        }
        let now = now.map_or(u32::MAX, millis);
        #[allow(clippy::cast_precision_loss, reason = "a comparison of estimates")]
        let queue = |at: usize| 1.0 + self.in_flight(at) as f32 * efforts[at];
        let (queue_a, queue_b) = (queue(a), queue(b));
        let latency = |at: usize| self.entries[at].load.latency.get(now);
        // One that was not measured is taken to be as fast as the other.
        let (a_takes, b_takes) = latency(a).zip(latency(b)).unwrap_or((1.0, 1.0));
        if b_takes * queue_b < a_takes * queue_a { b } else { a }
    }

    /// The owner of the key, or whoever comes next and has no more than 1.25 times its share in flight.
    fn on_ring(&self, ring: &Ring, key: u64) -> usize {
        let mut owners = ring.from(key);
        let first = owners.next().unwrap_or_default();
        // Who is idle has room, whatever all have in flight.
        if self.in_flight(first) == 0 {
            return first;
        }
        let all = self.entries[first].slot.signals.in_flight.load(Ordering::Relaxed) as u64 + 1;
        let has_room = |at: &usize| {
            // in_flight < ceil(1.25 × all × weight / total)
            let share = u128::from(all) * u128::from(self.weights[*at]) * 5;
            u128::from(self.in_flight(*at)) < share.div_ceil(u128::from(self.total.max(1)) * 4)
        };
        if has_room(&first) { first } else { owners.find(has_room).unwrap_or(first) }
    }
}
