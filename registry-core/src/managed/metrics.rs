//! What a registry tells the recorder of the `metrics` crate. Without the feature `metrics`: nothing, at no cost.

#[cfg(not(feature = "metrics"))]
pub(super) use self::off::*;
#[cfg(feature = "metrics")]
pub(super) use self::on::*;

#[cfg(feature = "metrics")]
mod on {
    use std::{
        collections::{BTreeSet, HashMap},
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        time::{Duration, SystemTime},
    };

    use metrics::{Unit, counter, describe_counter as describe_count, describe_gauge, describe_histogram, histogram};
    use tokio::{
        sync::Notify,
        time::{Instant, sleep_until},
    };

    use crate::{
        Backend, Error, Event, Freshness, RegistrationState, Renewal, Result, ServiceName,
        level::Level,
        managed::{Shared, follow::Follow},
        watcher::View,
    };

    const REGISTRATIONS: &str = "service_registry_registrations";
    const HEARTBEATS: &str = "service_registry_heartbeats_total";
    const SESSION_LOSSES: &str = "service_registry_session_losses_total";
    const FAILURES: &str = "service_registry_failures_total";
    const FULL_READS: &str = "service_registry_full_reads_total";
    const WATCH_LAG: &str = "service_registry_watch_lag_seconds";
    const INSTANCES: &str = "service_registry_instances";
    const STALENESS: &str = "service_registry_staleness_seconds";
    const PROTECTIONS: &str = "service_registry_protections_total";
    const HELD: &str = "service_registry_held_instances";

    /// Gauges are told at most this often, and so often while a view ages.
    const PERIOD: Duration = Duration::from_secs(1);
    /// They are told at least this often, for recorders that come late or forget.
    const LONGEST: Duration = Duration::from_secs(60);

    /// A call to the store ended.
    pub(in crate::managed) fn called<T>(backend: &'static str, verb: &'static str, outcome: &Result<T>) {
        if let Err(error) = outcome {
            failed(backend, verb, error);
        }
    }

    /// A batch ended: each kind of error counts once.
    pub(in crate::managed) fn called_with_batch<T>(backend: &'static str, verb: &'static str, outcomes: &[Result<T>]) {
        let kinds: BTreeSet<_> =
            outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).map(|error| error.kind().as_str()).collect();
        for kind in kinds {
            counter!(FAILURES, "backend" => backend, "verb" => verb, "kind" => kind).increment(1);
        }
    }

    /// A call to the store or a subscription failed.
    pub(in crate::managed) fn failed(backend: &'static str, verb: &'static str, error: &Error) {
        counter!(FAILURES, "backend" => backend, "verb" => verb, "kind" => error.kind().as_str()).increment(1);
    }

    /// The store was asked to renew.
    pub(in crate::managed) fn beaten(backend: &'static str, outcome: &Result<Renewal>) {
        let outcome = match outcome {
            Ok(renewal) if renewal.missing.is_empty() => "renewed",
            Ok(_) => "missing",
            Err(_) => "failed",
        };
        counter!(HEARTBEATS, "backend" => backend, "outcome" => outcome).increment(1);
    }

    /// Wakes the task that tells the gauges.
    pub(in crate::managed) struct Gauges {
        changed: Notify,
    }

    impl Gauges {
        pub(in crate::managed) fn new() -> Self {
            Self { changed: Notify::new() }
        }

        /// They may be others now. Called with each beat, too, so that they are told again when nothing changes.
        pub(in crate::managed) fn changed(&self) {
            self.changed.notify_one();
        }

        pub(in crate::managed) fn happened(&self, backend: &'static str, event: &Event) {
            self.changed();
            match event {
                Event::SessionLost { .. } => counter!(SESSION_LOSSES, "backend" => backend).increment(1),
                Event::Protected { service, .. } => {
                    counter!(PROTECTIONS, "backend" => backend, "service" => service.to_string()).increment(1);
                }
                _ => {}
            }
        }
    }

    /// The store told the complete set.
    pub(in crate::managed) fn read_in_full(backend: &'static str, service: &ServiceName) {
        counter!(FULL_READS, "backend" => backend, "service" => service.to_string()).increment(1);
    }

    /// When the first of the changes came that readers will see together.
    pub(in crate::managed) struct Arrival {
        at: Instant,
        revision: u64,
    }

    impl Arrival {
        pub(in crate::managed) fn now(view: &View) -> Self {
            Self { at: Instant::now(), revision: view.load().revision() }
        }

        /// Readers see what there is to see of them.
        pub(in crate::managed) fn published(self, backend: &'static str, view: &View) {
            if view.load().revision() != self.revision {
                let service = view.service.to_string();
                histogram!(WATCH_LAG, "backend" => backend, "service" => service).record(self.at.elapsed());
            }
        }
    }

    /// What the follow task tells of a service for the gauges.
    pub(in crate::managed) struct Followed {
        held: AtomicU32,
    }

    impl Followed {
        pub(in crate::managed) fn new() -> Self {
            Self { held: AtomicU32::new(0) }
        }

        pub(in crate::managed) fn held(&self, held: usize) {
            self.held.store(count(held), Ordering::Relaxed);
        }
    }

    /// Tells the gauges until the registry ends, when they go to 0.
    pub(in crate::managed) fn start<B: Backend>(shared: &Arc<Shared<B>>) {
        describe();
        let stop = shared.stop.clone();
        shared.runtime.spawn(stop.run_until_cancelled_owned(report(shared.clone())));
    }

    async fn report<B: Backend>(shared: Arc<Shared<B>>) {
        let backend = shared.backend.name();
        let state = |state| Level::new(REGISTRATIONS, [("backend", backend), ("state", state)]);
        let mut states = ["registered", "pending", "lost"].map(state);
        let mut services: HashMap<ServiceName, Service> = HashMap::new();
        loop {
            let mut counts = [0; 3];
            for state in shared.slots().states() {
                counts[match state {
                    RegistrationState::Registered => 0,
                    RegistrationState::Pending => 1,
                    RegistrationState::Lost { .. } => 2,
                }] += 1;
            }
            states.iter_mut().zip(counts).for_each(|(level, count)| level.set(count));
            let views = shared.follows.all();
            services.retain(|service, _| views.contains_key(service));
            let mut ageing = false;
            for (service, follow) in &*views {
                let levels = services.entry(service.clone()).or_insert_with(|| Service::new(backend, service));
                ageing |= levels.tell(follow);
            }
            drop(views);
            let soonest = Instant::now() + PERIOD;
            let latest = if ageing { soonest } else { Instant::now() + LONGEST };
            tokio::select! {
                () = shared.metrics.changed.notified() => sleep_until(soonest).await,
                () = sleep_until(latest) => {}
            }
        }
    }

    struct Service {
        instances: Level,
        held: Level,
        staleness: Level,
        /// How the view was when that was first seen, how long it had been so, and when.
        since: (Freshness, Duration, Instant),
    }

    impl Service {
        fn new(backend: &str, service: &ServiceName) -> Self {
            let level = |name| Level::new(name, [("backend", backend), ("service", service.as_str())]);
            Self {
                instances: level(INSTANCES),
                held: level(HELD),
                staleness: level(STALENESS),
                since: (Freshness::Pending, Duration::ZERO, Instant::now()),
            }
        }

        /// `true`: it is not live, and older soon.
        fn tell(&mut self, follow: &Follow) -> bool {
            let seen = follow.view.load();
            self.instances.set(count(seen.len()));
            self.held.set(follow.metrics.held.load(Ordering::Relaxed));
            if self.since.0 != seen.freshness() {
                // The wall clock is asked once, so that one that jumps makes no view older.
                let before = match seen.freshness() {
                    Freshness::Stale { since } => SystemTime::now().duration_since(since).unwrap_or_default(),
                    _ => Duration::ZERO,
                };
                self.since = (seen.freshness(), before, Instant::now());
            }
            let (freshness, before, at) = self.since;
            let stale = matches!(freshness, Freshness::Pending | Freshness::Stale { .. });
            let seconds = if stale { (before + at.elapsed()).as_secs() } else { 0 };
            self.staleness.set(u32::try_from(seconds).unwrap_or(u32::MAX));
            stale
        }
    }

    fn count(of: usize) -> u32 {
        u32::try_from(of).unwrap_or(u32::MAX)
    }

    fn describe() {
        describe_gauge!(REGISTRATIONS, Unit::Count, "Registrations of this process by state.");
        describe_count!(HEARTBEATS, Unit::Count, "Renewals that the store was asked for, by outcome.");
        describe_count!(SESSION_LOSSES, Unit::Count, "Sessions that were lost, or had to be presumed so.");
        describe_count!(FAILURES, Unit::Count, "Calls to the store that failed, by verb and kind of error.");
        describe_count!(FULL_READS, Unit::Count, "Complete sets that were read from the store.");
        let lag = "From the arrival of the first of the changes that are published together until readers see them.";
        describe_histogram!(WATCH_LAG, Unit::Seconds, lag);
        describe_gauge!(INSTANCES, Unit::Count, "Instances in the current snapshot, those that are held included.");
        describe_gauge!(STALENESS, Unit::Seconds, "How long ago the view was last live; 0 while it is.");
        describe_count!(PROTECTIONS, Unit::Count, "Times that vanished instances began to be held.");
        describe_gauge!(HELD, Unit::Count, "Vanished instances that are held.");
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use std::sync::Arc;

    use crate::{Backend, Error, Event, Renewal, Result, ServiceName, managed::Shared, watcher::View};

    #[inline(always)]
    pub(in crate::managed) fn called<T>(_: &'static str, _: &'static str, _: &Result<T>) {}

    #[inline(always)]
    pub(in crate::managed) fn called_with_batch<T>(_: &'static str, _: &'static str, _: &[Result<T>]) {}

    #[inline(always)]
    pub(in crate::managed) fn failed(_: &'static str, _: &'static str, _: &Error) {}

    #[inline(always)]
    pub(in crate::managed) fn beaten(_: &'static str, _: &Result<Renewal>) {}

    pub(in crate::managed) struct Gauges;

    impl Gauges {
        #[inline(always)]
        pub(in crate::managed) fn new() -> Self {
            Self
        }

        #[inline(always)]
        pub(in crate::managed) fn changed(&self) {}

        #[inline(always)]
        pub(in crate::managed) fn happened(&self, _: &'static str, _: &Event) {}
    }

    #[inline(always)]
    pub(in crate::managed) fn read_in_full(_: &'static str, _: &ServiceName) {}

    pub(in crate::managed) struct Arrival;

    impl Arrival {
        #[inline(always)]
        pub(in crate::managed) fn now(_: &View) -> Self {
            Self
        }

        #[inline(always)]
        pub(in crate::managed) fn published(self, _: &'static str, _: &View) {}
    }

    pub(in crate::managed) struct Followed;

    impl Followed {
        #[inline(always)]
        pub(in crate::managed) fn new() -> Self {
            Self
        }

        #[inline(always)]
        pub(in crate::managed) fn held(&self, _: usize) {}
    }

    #[inline(always)]
    pub(in crate::managed) fn start<B: Backend>(_: &Arc<Shared<B>>) {}
}
