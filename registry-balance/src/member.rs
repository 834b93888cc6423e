//! What is known of one instance: its record, what it has in flight, how fast it answers, and how it does.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};

use crossbeam_utils::CachePadded;
use registry_core::{Instance, SnapshotHandle};
use tokio::{sync::Notify, time::Instant};

use crate::metrics::Metrics;

/// After this many seconds, what was measured counts half, if nothing was since.
const HALF_LIFE: f32 = 10.0;
/// A call that was fast counts a hundredth at least, which is more than so many seconds since the one before give it.
const LEAST: f32 = 0.01;
const MOMENT: f32 = 0.145;

/// One instance in tables. Another one when its record changes; what is counted goes on.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Held by this entry and by each pick, and by nobody else: its holders are the calls in flight.
    pub(crate) slot: Arc<Slot>,
    /// The slot's, a step nearer.
    pub(crate) load: Arc<Load>,
    /// Of the entries that this one replaced, as far as calls were in flight.
    earlier: Box<[Weak<Slot>]>,
}

/// What a pick knows of an instance.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) instance: Arc<Instance>,
    pub(crate) load: Arc<Load>,
    /// It was ejected, and takes one call at a time until one says how it is.
    pub(crate) tried: bool,
    pub(crate) signals: Arc<Signals>,
}

/// What picks of one instance have in common, in all tables.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// A call is under way that tells how a `tried` one is.
    pub(crate) trying: AtomicBool,
    pub(crate) latency: Latency,
    pub(crate) record: Record,
}

/// What picks tell the balancer's task, and what they count together.
#[derive(Debug)]
pub(crate) struct Signals {
    /// Somebody is to be judged.
    pub(crate) wake: Notify,
    pub(crate) in_flight: CachePadded<AtomicUsize>,
    pub(crate) start: Instant,
    pub(crate) counts: Counts,
    /// Who has what does not answer compared with the store.
    pub(crate) view: SnapshotHandle,
    pub(crate) metrics: Metrics,
}

/// What is counted at a pick: what nobody asks for costs nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    /// How long calls take.
    pub(crate) time: bool,
    /// How many are in flight at all instances together.
    pub(crate) total: bool,
    /// How calls end; so many failures in a row are told at once.
    pub(crate) outcomes: Option<u32>,
}

impl Entry {
    pub(crate) fn new(instance: Arc<Instance>, signals: Arc<Signals>) -> Self {
        Self::of(Slot { instance, load: Arc::default(), tried: false, signals }, Box::default())
    }

    /// What replaces this one.
    pub(crate) fn next(&self, instance: Arc<Instance>, tried: bool) -> Self {
        let Slot { load, signals, .. } = &*self.slot;
        let slot = Slot { instance, load: load.clone(), tried, signals: signals.clone() };
        let all = self.earlier.iter().cloned().chain([Arc::downgrade(&self.slot)]);
        Self::of(slot, all.filter(|slot| slot.strong_count() > 0).collect())
    }

    fn of(slot: Slot, earlier: Box<[Weak<Slot>]>) -> Self {
        Self { load: slot.load.clone(), slot: Arc::new(slot), earlier }
    }

    /// How many calls are in flight.
    pub(crate) fn in_flight(&self) -> usize {
        let earlier: usize = self.earlier.iter().map(Weak::strong_count).sum();
        Arc::strong_count(&self.slot) - 1 + earlier
    }
}

/// Calls that ended since the last look.
#[derive(Debug, Default)]
pub(crate) struct Record {
    calls: AtomicU32,
    failures: AtomicU32,
    in_a_row: AtomicU32,
    /// Since it is `tried`: it went well.
    recovered: AtomicBool,
    /// It failed too often in a row, or while it was tried.
    failed: AtomicBool,
}

impl Record {
    pub(crate) fn success(&self, tried: bool, signals: &Signals) {
        if signals.counts.outcomes.is_none() {
            return;
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.in_a_row.load(Ordering::Relaxed) != 0 {
            self.in_a_row.store(0, Ordering::Relaxed);
        }
        if tried && !self.recovered.swap(true, Ordering::Relaxed) {
            signals.wake.notify_one();
        }
    }

    pub(crate) fn failure(&self, tried: bool, signals: &Signals) {
        let Some(most) = signals.counts.outcomes else { return };
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.failures.fetch_add(1, Ordering::Relaxed);
        let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if (tried || (most > 0 && in_a_row >= most)) && !self.failed.swap(true, Ordering::Relaxed) {
            signals.wake.notify_one();
        }
    }

    /// Whether it failed too often in a row, or while it was tried.
    pub(crate) fn take_failed(&self) -> bool {
        self.failed.swap(false, Ordering::Relaxed)
    }

    pub(crate) fn take_recovered(&self) -> bool {
        self.recovered.swap(false, Ordering::Relaxed)
    }

    /// Calls and failures since this was asked for the last time.
    pub(crate) fn take_window(&self) -> (u32, u32) {
        let failures = self.failures.swap(0, Ordering::Relaxed);
        (self.calls.swap(0, Ordering::Relaxed), failures)
    }

    pub(crate) fn forgive(&self) {
        self.take_window();
        self.in_a_row.store(0, Ordering::Relaxed);
        self.take_failed();
        self.take_recovered();
    }
}

/// How long calls take: a moving average that follows rises at once and falls slowly, as Finagle's peak EWMA does.
///
/// The average in seconds, as the bits of an `f32`, above the milliseconds since the start at which it was measured.
#[derive(Debug, Default)]
pub(crate) struct Latency(AtomicU64);

impl Latency {
    /// `None`: nothing was measured yet.
    pub(crate) fn get(&self, now: u32) -> Option<f32> {
        let (average, at) = unpack(self.0.load(Ordering::Relaxed))?;
        Some(average * HALF_LIFE / (HALF_LIFE + seconds(now.saturating_sub(at))))
    }

    /// Of calls that end at the same moment, one counts: there are many.
    pub(crate) fn add(&self, took: f32, now: u32) {
        let before = self.0.load(Ordering::Relaxed);
        let average = unpack(before).map_or(took, |(average, at)| {
            if took >= average {
                return took;
            }
            let passed = seconds(now.saturating_sub(at));
            let kept = if passed < MOMENT { 1.0 - LEAST } else { (-passed / HALF_LIFE).exp2() };
            average * kept + took * (1.0 - kept)
        });
        self.0.store(pack(average, now), Ordering::Relaxed);
    }
}

/// Never 0: that is nothing.
fn pack(average: f32, at: u32) -> u64 {
    u64::from(average.max(f32::MIN_POSITIVE).to_bits()) << 32 | u64::from(at)
}

fn unpack(packed: u64) -> Option<(f32, u32)> {
    let at = u32::try_from(packed & u64::from(u32::MAX)).unwrap_or_default();
    let bits = u32::try_from(packed >> 32).unwrap_or_default();
    (bits != 0).then(|| (f32::from_bits(bits), at))
}

#[allow(clippy::cast_precision_loss, reason = "hours ago is near enough")]
fn seconds(millis: u32) -> f32 {
    millis as f32 / 1000.0
}

impl Signals {
    /// Nanoseconds since the balancer was made, if calls are timed.
    pub(crate) fn now(&self) -> Option<u64> {
        self.counts.time.then(|| u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// Milliseconds, for seven weeks; the latest then.
pub(crate) fn millis(nanos: u64) -> u32 {
    u32::try_from(nanos / 1_000_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_is_followed_at_once_and_a_fall_over_time() {
        let latency = Latency::default();
        assert_eq!(latency.get(0), None);
        latency.add(0.010, 0);
        latency.add(0.500, 1);
        assert_eq!(latency.get(1), Some(0.5));
        latency.add(0.010, 2);
        assert!(latency.get(2).unwrap() > 0.49, "one good call is not enough");
        latency.add(0.010, 60_000);
        assert!(latency.get(60_000).unwrap() < 0.03, "{latency:?}");
    }

    #[test]
    fn who_is_not_called_is_forgotten_to_be_slow() {
        let latency = Latency::default();
        latency.add(1.0, 0);
        assert!((latency.get(10_000).unwrap() - 0.5).abs() < 0.001);
        latency.add(0.0, 20_000);
        assert!(latency.get(20_000).is_some(), "nothing is not the same as no time at all");
    }
}
