//! How a registry is, at one moment.

use std::fmt;

use crate::{Freshness, ServiceName};

/// How a registry is: what a service puts behind its own `/health`. Given by [`Registry::health`](crate::Registry::health).
///
/// It says how far the store was followed and obeyed, for dashboards and people. A store that is down is no reason to restart
/// a service: it goes on with what it has.
///
/// # Examples
/// ```
/// use registry_core::{Instance, Managed, Registry};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-condition")?;
/// registry.register(Instance::builder("orders", "1").build()?).await?;
/// registry.discover("orders").await?;
///
/// let health = registry.health();
/// assert!(health.is_ok());
/// assert_eq!(health.to_string(), "1 registered, 0 pending, 0 lost; orders: 1 of 1 available (live)");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Health {
    /// The registry was destroyed, or is being so.
    pub closed: bool,
    /// How many registrations the store confirmed.
    pub registered: usize,
    /// How many it has not confirmed yet.
    pub pending: usize,
    /// How many were lost, and are being restored.
    pub lost: usize,
    /// The services that are followed, sorted by name.
    pub services: Vec<ServiceHealth>,
}

/// How the view of one service is.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ServiceHealth {
    /// The service.
    pub service: ServiceName,
    /// How far the view can be trusted.
    pub freshness: Freshness,
    /// How many instances it has.
    pub instances: usize,
    /// How many of them take traffic.
    pub available: usize,
}

impl Health {
    /// Whether all that is wanted is registered and every view follows the store.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        let follows = |one: &ServiceHealth| matches!(one.freshness, Freshness::Live | Freshness::Protected { .. });
        !self.closed && self.pending + self.lost == 0 && self.services.iter().all(follows)
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { closed, registered, pending, lost, services } = self;
        write!(f, "{registered} registered, {pending} pending, {lost} lost")?;
        for ServiceHealth { service, freshness, instances, available } in services {
            write!(f, "; {service}: {available} of {instances} available ({freshness})")?;
        }
        if *closed { f.write_str("; closed") } else { Ok(()) }
    }
}
