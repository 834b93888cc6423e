//! When the slow check runs: every so often, or by the user's cron expression.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::backoff::part_of;
use crate::{Reconcile, Result};

#[derive(Debug)]
pub(super) enum Schedule {
    Every {
        period: Duration,
        next: Instant,
    },
    #[cfg(feature = "cron")]
    Cron(cron::Ticks),
}

impl Schedule {
    /// The schedule of `reconcile`. Its phase is random, so that the processes of an estate do not ask together.
    pub(super) fn new(reconcile: &Reconcile) -> Result<Self> {
        match reconcile {
            Reconcile::Every(period) => Ok(Self::Every { period: *period, next: Instant::now() + part_of(*period) }),
            #[cfg(feature = "cron")]
            Reconcile::Cron(expression) => cron::Ticks::start(expression).map(Self::Cron),
            #[cfg(not(feature = "cron"))]
            Reconcile::Cron(_) => Err(crate::Error::new(
                crate::ErrorKind::Unsupported,
                "a cron expression for reconcile needs the feature \"cron\"",
            )),
        }
    }

    /// Waits for the next tick; the check shall run after the returned delay, a random part of the period.
    ///
    /// # Cancel safety
    /// Safe: a tick that was not returned comes again.
    pub(super) async fn tick(&mut self) -> Duration {
        match self {
            Self::Every { period, next } => {
                sleep_until(*next).await;
                *next = Instant::now() + *period;
                Duration::ZERO
            }
            #[cfg(feature = "cron")]
            Self::Cron(ticks) => ticks.next().await,
        }
    }
}

/// tokio-cron-scheduler, for this and nothing else: it polls twice a second by the wall clock and stalls after a
/// pause when it repeats by interval (mvniekerk/tokio-cron-scheduler#113), so leases never depend on it, and only cron jobs are used.
#[cfg(feature = "cron")]
mod cron {
    use std::{
        sync::{LazyLock, mpsc as std_mpsc},
        thread,
        time::Duration,
    };

    use tokio::{
        sync::{mpsc, oneshot},
        time::Instant,
    };
    use tokio_cron_scheduler::{Job, JobScheduler};

    use super::part_of;
    use crate::{Error, ErrorKind, Result};

    /// The longest random delay after a tick while the period is not known yet.
    const FIRST_SPREAD: Duration = Duration::from_secs(10);

    #[derive(Debug)]
    pub(in super::super) struct Ticks {
        ticks: mpsc::Receiver<()>,
        /// Dropped with the schedule: the job is removed.
        _job: oneshot::Sender<()>,
        last: Option<Instant>,
    }

    struct Start {
        job: Job,
        ended: oneshot::Receiver<()>,
    }

    /// One scheduler for the process, on a thread of its own: shutting one down leaves most of its tasks behind, and
    /// it must outlive the runtime of whoever used it first.
    static SCHEDULER: LazyLock<Option<std_mpsc::Sender<Start>>> = LazyLock::new(|| {
        let (sender, jobs) = std_mpsc::channel();
        thread::Builder::new().name("registry-cron".to_owned()).spawn(move || run(&jobs)).ok().map(|_| sender)
    });

    impl Ticks {
        pub(in super::super) fn start(expression: &str) -> Result<Self> {
            let (tick, ticks) = mpsc::channel(1);
            let job = Job::new_async(expression, move |_, _| {
                // Only sends: a slow check never piles up, since the channel holds one tick.
                let _ = tick.try_send(());
                Box::pin(async {})
            })
            .map_err(|error| Error::invalid(format!("invalid cron expression {expression:?}")).with_source(error))?;
            let (alive, ended) = oneshot::channel();
            let unavailable = || Error::new(ErrorKind::Unsupported, "the cron scheduler's thread cannot be started");
            let scheduler = SCHEDULER.as_ref().ok_or_else(unavailable)?;
            scheduler.send(Start { job, ended }).map_err(|_| unavailable())?;
            Ok(Self { ticks, _job: alive, last: None })
        }

        pub(in super::super) async fn next(&mut self) -> Duration {
            if self.ticks.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
            let now = Instant::now();
            let period = self.last.replace(now).map_or(FIRST_SPREAD, |last| now.duration_since(last));
            part_of(period)
        }
    }

    fn run(jobs: &std_mpsc::Receiver<Start>) {
        let Ok(runtime) = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() else {
            return;
        };
        let Ok(scheduler) = runtime.block_on(async {
            let scheduler = JobScheduler::new().await?;
            scheduler.start().await?;
            Ok::<_, tokio_cron_scheduler::JobSchedulerError>(scheduler)
        }) else {
            return;
        };
        for Start { job, ended } in jobs {
            let scheduler = scheduler.clone();
            runtime.spawn(async move {
                match scheduler.add(job).await {
                    Ok(id) => {
                        let _ = ended.await;
                        let _ = scheduler.remove(&id).await;
                    }
                    Err(error) => tracing::warn!(%error, "the cron schedule did not start"),
                }
            });
        }
    }
}
