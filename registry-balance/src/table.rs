//! What a pick reads: who takes traffic, prepared for the strategy, once for each change.

use std::sync::{Arc, atomic::Ordering};

use rand::Rng;
use registry_core::{DEFAULT_WEIGHT, InstanceId};
use tokio::time::Instant;

use crate::{
    balancer::Strategy,
    counter::Counter,
    draw::{Dice, Turns},
    member::Slot,
    pick::Pick,
    ring::Ring,
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
    pub(crate) slot: Arc<Slot>,
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
    slots: Box<[Arc<Slot>]>,
    weights: Box<[u64]>,
    total: u64,
    chooser: Chooser,
}

#[derive(Debug)]
enum Chooser {
    Turns(Turns),
    Dice(Dice),
    Least(Turns),
    Two(Dice),
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
        let near = |candidate: &Candidate| candidate.slot.instance.zone.as_deref() == Some(zone);
        let (near, far): (Vec<_>, Vec<_>) = candidates.into_iter().partition(near);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of u32::MAX")]
        let local = (f64::from(u32::MAX) * (ROOM * room.open as f64 / room.known.max(1) as f64).min(1.0)) as u32;
        Self { pools: pools(strategy, [near, far]), local, census }
    }

    pub(crate) fn len(&self) -> usize {
        self.pools.iter().map(|pool| pool.slots.len()).sum()
    }

    /// Somebody who is not among `tried`.
    pub(crate) fn pick(&self, counter: &Counter, key: Option<u64>, tried: &[InstanceId]) -> Option<Pick> {
        let mut order = self.pools.iter();
        if self.pools.len() > 1 && self.local < u32::MAX && rand::rng().random::<u32>() > self.local {
            let far = order.next_back();
            return far.into_iter().chain(order).find_map(|pool| pool.pick(counter, key, tried));
        }
        order.find_map(|pool| pool.pick(counter, key, tried))
    }
}

fn pools<const N: usize>(strategy: Strategy, of: [Vec<Candidate>; N]) -> Vec<Pool> {
    of.into_iter().filter(|of| !of.is_empty()).map(|of| Pool::new(strategy, of)).collect()
}

impl Pool {
    fn new(strategy: Strategy, candidates: Vec<Candidate>) -> Self {
        let (slots, weights): (Vec<_>, Vec<_>) = candidates.into_iter().map(|one| (one.slot, one.weight)).unzip();
        let chooser = match strategy {
            Strategy::RoundRobin => Chooser::Turns(Turns::even(slots.len())),
            Strategy::Weighted => Chooser::Turns(Turns::by(&weights)),
            Strategy::Random => Chooser::Dice(Dice::by(&weights)),
            Strategy::LeastLoaded => Chooser::Least(Turns::by(&weights)),
            Strategy::PowerOfTwo => Chooser::Two(Dice::by(&weights)),
            Strategy::ConsistentHash => {
                let members = slots.iter().zip(&weights).map(|(slot, weight)| (slot.instance.id.as_str(), *weight));
                Chooser::Ring(Ring::new(members, u64::from(DEFAULT_WEIGHT) * PARTS))
            }
        };
        Self { slots: slots.into(), total: weights.iter().sum(), weights: weights.into(), chooser }
    }

    fn pick(&self, counter: &Counter, key: Option<u64>, tried: &[InstanceId]) -> Option<Pick> {
        let started = self.slots[0].signals.counts.time.then(Instant::now);
        let at = self.choose(counter, key, started);
        let slot = &self.slots[at];
        if !slot.tried && (tried.is_empty() || !tried.contains(&slot.instance.id)) {
            return Some(Pick::new(slot.clone(), started, false));
        }
        self.pick_near(at, started, tried)
    }

    /// The one at this place or the next one that is not out of the question.
    #[cold]
    fn pick_near(&self, at: usize, started: Option<Instant>, tried: &[InstanceId]) -> Option<Pick> {
        let (before, after) = self.slots.split_at(at);
        let new = || after.iter().chain(before).filter(|slot| !tried.contains(&slot.instance.id));
        let admitted = new().find(|slot| !slot.tried || !slot.load.trying.swap(true, Ordering::Relaxed));
        // Better one who has its call under way than nobody.
        let slot = admitted.or_else(|| new().next())?;
        Some(Pick::new(slot.clone(), started, admitted.is_some() && slot.tried))
    }

    fn choose(&self, counter: &Counter, key: Option<u64>, now: Option<Instant>) -> usize {
        match &self.chooser {
            Chooser::Turns(turns) => turns.next(counter),
            Chooser::Dice(dice) => dice.throw(rand::random()),
            Chooser::Least(turns) => self.least_loaded(turns.next(counter)),
            Chooser::Two(dice) => {
                let (one, other) = rand::random();
                self.better(dice.throw(one), dice.throw(other), now)
            }
            Chooser::Ring(ring) => self.on_ring(ring, key.unwrap_or_else(|| rand::rng().random())),
        }
    }

    fn in_flight(&self, at: usize) -> u64 {
        u64::from(self.slots[at].load.in_flight.load(Ordering::Relaxed))
    }

    /// The first that has nothing to do, from this one on, or whoever has the least for its weight.
    fn least_loaded(&self, first: usize) -> usize {
        let (mut best, mut least) = (first, self.in_flight(first));
        for at in (first + 1..self.slots.len()).chain(0..first) {
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
    fn better(&self, a: usize, b: usize, now: Option<Instant>) -> usize {
        if a == b {
            return a;
        }
        let now = now.map_or(u32::MAX, |now| self.slots[a].signals.millis(now));
        #[allow(clippy::cast_precision_loss, reason = "a comparison of estimates")]
        let queue = |at: usize| {
            let usual = self.total as f32 / self.slots.len() as f32;
            1.0 + self.in_flight(at) as f32 * usual / self.weights[at].max(1) as f32
        };
        let (queue_a, queue_b) = (queue(a), queue(b));
        let latency = |at: usize| self.slots[at].load.latency.get(now);
        // One that was not measured is taken to be as fast as the other.
        let (a_takes, b_takes) = latency(a).zip(latency(b)).unwrap_or((1.0, 1.0));
        if b_takes * queue_b < a_takes * queue_a { b } else { a }
    }

    /// The owner of the key, or whoever comes next and has no more than 1.25 times its share in flight.
    fn on_ring(&self, ring: &Ring, key: u64) -> usize {
        let all = self.slots[0].signals.in_flight.load(Ordering::Relaxed) as u64 + 1;
        let has_room = |at: &usize| {
            // in_flight < ceil(1.25 × all × weight / total)
            let share = u128::from(all) * u128::from(self.weights[*at]) * 5;
            u128::from(self.in_flight(*at)) < share.div_ceil(u128::from(self.total.max(1)) * 4)
        };
        let mut owners = ring.from(key);
        let first = owners.next().unwrap_or_default();
        if has_room(&first) { first } else { owners.find(has_room).unwrap_or(first) }
    }
}
