//! Leaving in good order: drain, wait, deregister, within a deadline.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{info, warn};

use crate::{Error, ErrorKind, Registry, Result, Status};

/// How long deregistering may take after the grace.
const DESTROY: Duration = Duration::from_secs(10);

/// For ever is a grace that something else ends; it must not overflow.
pub(crate) const LONGEST_GRACE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Waits for SIGTERM or SIGINT (Ctrl-C on Windows), then takes the process out: marks every registration
/// [`Draining`](Status::Draining), waits `grace` so that readers stop sending, deregisters everything, and returns.
///
/// Nothing else in this library touches signals. A second signal skips what is left of the grace. With the store down
/// it returns all the same, at most 10 s after the grace; what could not be deregistered then expires by its ttl.
///
/// # Errors
/// Why the store did not confirm the deregistration, or [`ErrorKind::Unsupported`] if signals cannot be received.
///
/// # Cancel safety
/// Dropping it before the signal does nothing. Dropping it later leaves the registrations draining.
///
/// # Examples
/// ```no_run
/// # async fn example(registry: std::sync::Arc<dyn registry_core::Registry>) -> registry_core::Result<()> {
/// registry_core::shutdown::on_signal(registry, std::time::Duration::from_secs(5)).await
/// # }
/// ```
pub async fn on_signal(registry: Arc<dyn Registry>, grace: Duration) -> Result<()> {
    let mut signals = Signals::new()?;
    signals.next().await;
    info!(?grace, "shutting down; a second signal skips the grace");
    drain(&*registry, grace, signals.next()).await
}

/// Waits for SIGTERM or SIGINT (Ctrl-C on Windows). Only those that come while it is waited for count.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if signals cannot be received.
///
/// # Cancel safety
/// Safe in `select!`.
pub async fn signal() -> Result<()> {
    Signals::new()?.next().await;
    Ok(())
}

/// Takes the process out as [`on_signal`] does, now. `hurry` ends the grace early; a grace of zero skips the draining.
///
/// # Errors
/// Why the store did not confirm the deregistration.
///
/// # Examples
/// ```
/// use std::{future::pending, time::Duration};
/// use registry_core::{Instance, Managed, Registry, shutdown};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-drain")?;
/// registry.register(Instance::builder("orders", "1").build()?).await?;
/// shutdown::drain(&registry, Duration::from_millis(10), pending()).await?;
/// assert!(registry.registrations().is_empty());
/// # Ok(())
/// # }
/// ```
pub async fn drain(registry: &dyn Registry, grace: Duration, hurry: impl Future<Output = ()>) -> Result<()> {
    if grace.is_zero() {
        return destroy(registry).await;
    }
    let end_of_grace = Instant::now() + grace.min(LONGEST_GRACE);
    let registrations = registry.registrations();
    let drained = async {
        if registrations.is_empty() {
            return;
        }
        let marks = registrations.iter().map(|one| registry.set_status(one.service(), one.id(), Status::Draining));
        for error in join_all(marks).await.into_iter().filter_map(Result::err) {
            warn!(%error, "cannot mark a registration as draining");
        }
        sleep_until(end_of_grace).await;
    };
    tokio::select! {
        _ = timeout_at(end_of_grace, drained) => {}
        () = hurry => {}
    }
    destroy(registry).await
}

async fn destroy(registry: &dyn Registry) -> Result<()> {
    let deadline = Instant::now() + DESTROY;
    timeout_at(deadline, registry.destroy()).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Timeout, "cannot deregister: no answer in time; the records expire by themselves"))
    })
}

#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let signal = |kind| {
            signal(kind).map_err(|error| {
                Error::new(ErrorKind::Unsupported, "cannot receive the signals to shut down").with_source(error)
            })
        };
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
