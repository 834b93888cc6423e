//! The instance to call, and how the call ended.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use registry_core::{Endpoint, Instance, InstanceId};

use crate::{
    member::{Slot, millis},
    metrics::Outcome,
};

/// The instance to call, counted as in flight until the pick ends.
///
/// Say how the call went with [`success`](Self::success), [`failure`](Self::failure) or [`refused`](Self::refused).
/// Dropped, it was cancelled, which says nothing of the instance. A failure and a refusal have the view compared with the
/// store soon, at most every five seconds.
#[must_use = "a pick that is dropped is a call that was cancelled"]
pub struct Pick {
    slot: Arc<Slot>,
    /// By the clock of `Signals`.
    started: Option<u64>,
    /// It holds the one call at a time of an instance that was ejected.
    trying: bool,
    outcome: Outcome,
}

impl Pick {
    pub(crate) fn new(slot: Arc<Slot>, started: Option<u64>, trying: bool) -> Self {
        if slot.signals.counts.total {
            slot.signals.in_flight.fetch_add(1, Ordering::Relaxed);
        }
        Self { slot, started, trying, outcome: Outcome::CANCELLED }
    }

    /// The instance.
    #[must_use]
    pub fn instance(&self) -> &Arc<Instance> {
        &self.slot.instance
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &InstanceId {
        &self.slot.instance.id
    }

    /// Where it can be called, in the order of preference.
    #[must_use]
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.slot.instance.endpoints
    }

    /// Where it can be called by this protocol.
    #[must_use]
    pub fn endpoint(&self, scheme: &str) -> Option<&Endpoint> {
        self.endpoints().iter().find(|endpoint| endpoint.scheme() == scheme)
    }

    /// The instance did its part, whatever it answered: a "not found" is one, too.
    pub fn success(mut self) {
        self.outcome = Outcome::SUCCESS;
        let (load, signals) = (&self.slot.load, &self.slot.signals);
        if let Some((started, now)) = self.started.zip(signals.now()) {
            load.latency.add(Duration::from_nanos(now.saturating_sub(started)).as_secs_f32(), millis(now));
        }
        load.record.success(self.slot.tried, signals);
    }

    /// The instance failed: no connection, no answer in time, or one that says that it is broken.
    pub fn failure(mut self) {
        self.outcome = Outcome::FAILURE;
        self.slot.load.record.failure(self.slot.tried, &self.slot.signals);
        self.slot.signals.view.doubt();
    }

    /// The instance did not take the call: it is draining, or does not offer the service any more. That is no failure,
    /// and the call is safe to make elsewhere.
    pub fn refused(mut self) {
        self.outcome = Outcome::REFUSED;
        self.slot.signals.view.doubt();
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        let (load, signals) = (&self.slot.load, &self.slot.signals);
        if signals.counts.total {
            signals.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
        signals.metrics.picked(self.outcome);
        if self.trying {
            load.trying.store(false, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Pick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pick").field("instance", self.instance()).finish_non_exhaustive()
    }
}
