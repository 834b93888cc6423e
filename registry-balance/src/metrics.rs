//! What a balancer tells the recorder of the `metrics` crate. Without the feature `metrics`: nothing, at no cost.
//!
//! A pick counts in its thread's shard; the balancer's task tells the recorder once a second.

#[cfg(not(feature = "metrics"))]
pub(crate) use self::off::*;
#[cfg(feature = "metrics")]
pub(crate) use self::on::*;

#[cfg(feature = "metrics")]
mod on {
    use std::{
        sync::{
            Mutex, PoisonError,
            atomic::{AtomicU32, Ordering},
        },
        time::Duration,
    };

    use crossbeam_utils::CachePadded;
    use metrics::{Unit, counter, describe_counter as describe_count, describe_gauge};
    use registry_core::{Level, ServiceName};
    use tokio::time::{Interval, MissedTickBehavior, interval};

    use crate::counter::{SHARDS, shard};

    const PICKS: &str = "service_registry_picks_total";
    const EJECTIONS: &str = "service_registry_ejections_total";
    const EJECTED: &str = "service_registry_ejected_instances";

    /// How often the recorder is told.
    const PERIOD: Duration = Duration::from_secs(1);
    const OUTCOMES: [&str; 5] = ["success", "failure", "refused", "cancelled", "nobody"];

    /// How a pick ended: a place in `OUTCOMES`.
    #[derive(Clone, Copy)]
    pub(crate) struct Outcome(usize);

    impl Outcome {
        pub(crate) const SUCCESS: Self = Self(0);
        pub(crate) const FAILURE: Self = Self(1);
        pub(crate) const REFUSED: Self = Self(2);
        pub(crate) const CANCELLED: Self = Self(3);
        /// It did not come about: nobody takes traffic.
        pub(crate) const NOBODY: Self = Self(4);
    }

    /// Lives as long as the last pick, so that none is left out.
    #[derive(Debug)]
    pub(crate) struct Metrics {
        service: ServiceName,
        /// By outcome, since they were told last.
        picks: Box<[CachePadded<[AtomicU32; OUTCOMES.len()]>]>,
        ejected: AtomicU32,
        told: Mutex<Level>,
    }

    impl Metrics {
        pub(crate) fn new(service: &ServiceName) -> Self {
            describe_count!(PICKS, Unit::Count, "Picks by how the call ended, and those that found nobody.");
            describe_count!(EJECTIONS, Unit::Count, "Times that an instance was ejected.");
            describe_gauge!(EJECTED, Unit::Count, "Instances that are ejected.");
            Self {
                service: service.clone(),
                picks: (0..SHARDS).map(|_| CachePadded::default()).collect(),
                ejected: AtomicU32::new(0),
                told: Mutex::new(Level::new(EJECTED, [("service", service.as_str())])),
            }
        }

        pub(crate) fn picked(&self, outcome: Outcome) {
            self.picks[shard() % SHARDS][outcome.0].fetch_add(1, Ordering::Relaxed);
        }

        pub(crate) fn eject(&self) {
            counter!(EJECTIONS, "service" => self.service.to_string()).increment(1);
        }

        pub(crate) fn ejected(&self, count: usize) {
            self.ejected.store(u32::try_from(count).unwrap_or(u32::MAX), Ordering::Relaxed);
        }

        pub(crate) fn tell(&self) {
            for (at, outcome) in OUTCOMES.into_iter().enumerate() {
                let picks = self.picks.iter().map(|counts| u64::from(counts[at].swap(0, Ordering::Relaxed)));
                let service = self.service.to_string();
                counter!(PICKS, "service" => service, "outcome" => outcome).increment(picks.sum());
            }
            self.told.lock().unwrap_or_else(PoisonError::into_inner).set(self.ejected.load(Ordering::Relaxed));
        }
    }

    impl Drop for Metrics {
        fn drop(&mut self) {
            self.ejected(0);
            self.tell();
        }
    }

    /// When to tell.
    pub(crate) struct Ticks(Interval);

    impl Ticks {
        pub(crate) fn new() -> Self {
            let mut ticks = interval(PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Self(ticks)
        }

        pub(crate) async fn next(&mut self) {
            self.0.tick().await;
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use registry_core::ServiceName;

    #[derive(Clone, Copy)]
    pub(crate) struct Outcome;

    impl Outcome {
        pub(crate) const SUCCESS: Self = Self;
        pub(crate) const FAILURE: Self = Self;
        pub(crate) const REFUSED: Self = Self;
        pub(crate) const CANCELLED: Self = Self;
        pub(crate) const NOBODY: Self = Self;
    }

    #[derive(Debug)]
    pub(crate) struct Metrics;

    impl Metrics {
        #[inline(always)]
        pub(crate) fn new(_: &ServiceName) -> Self {
            Self
        }

        #[inline(always)]
        pub(crate) fn picked(&self, _: Outcome) {}

        #[inline(always)]
        pub(crate) fn eject(&self) {}

        #[inline(always)]
        pub(crate) fn ejected(&self, _: usize) {}

        #[inline(always)]
        pub(crate) fn tell(&self) {}
    }

    pub(crate) struct Ticks;

    impl Ticks {
        #[inline(always)]
        pub(crate) fn new() -> Self {
            Self
        }

        pub(crate) async fn next(&mut self) {
            std::future::pending().await
        }
    }
}
