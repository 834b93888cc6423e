//! Which instances a balancer may pick from: filters for all of its callers, routes for some of them.

use std::{fmt, ops::Not, sync::Arc};

use registry_core::{Instance, Status};

type Test = dyn Fn(&Instance) -> bool + Send + Sync;

/// Says of an instance whether it is wanted. Evaluated when the service changes, not at each pick.
///
/// # Examples
/// ```
/// use registry_balance::Filter;
/// use registry_core::Instance;
///
/// let filter = Filter::version("2").and(!Filter::metadata("canary", "true"));
/// assert!(filter.matches(&Instance::builder("orders", "1").version("2").build()?));
/// assert!(!filter.matches(&Instance::builder("orders", "2").version("2").metadata("canary", "true").build()?));
///
/// let near_the_top = Filter::new(|instance| instance.metadata.get("rack").is_some_and(|rack| rack.as_str() < "r10"));
/// assert!(near_the_top.matches(&Instance::builder("orders", "3").metadata("rack", "r07").build()?));
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Filter(Arc<Test>);

impl Filter {
    /// Any test of your own. It should be cheap and always say the same of the same instance.
    #[must_use]
    pub fn new(test: impl Fn(&Instance) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(test))
    }

    /// Instances of this version.
    #[must_use]
    pub fn version(version: impl Into<String>) -> Self {
        let version = version.into();
        Self::new(move |instance| instance.version.as_deref() == Some(&version))
    }

    /// Instances in this zone.
    #[must_use]
    pub fn zone(zone: impl Into<String>) -> Self {
        let zone = zone.into();
        Self::new(move |instance| instance.zone.as_deref() == Some(&zone))
    }

    /// Instances with this label.
    #[must_use]
    pub fn metadata(key: impl Into<String>, value: impl Into<String>) -> Self {
        let (key, value) = (key.into(), value.into());
        Self::new(move |instance| instance.metadata.get(&key) == Some(&value))
    }

    /// Instances with this status. A balancer picks among those that are [`Up`](Status::Up) in any case; this is for
    /// what else you do with a [`Snapshot`](registry_core::Snapshot).
    #[must_use]
    pub fn status(status: Status) -> Self {
        Self::new(move |instance| instance.status == status)
    }

    /// Instances with an endpoint of this scheme, such as `grpc`.
    #[must_use]
    pub fn scheme(scheme: impl Into<String>) -> Self {
        let scheme = scheme.into();
        Self::new(move |instance| instance.endpoints.iter().any(|endpoint| endpoint.scheme() == scheme))
    }

    /// What both match.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self::new(move |instance| self.matches(instance) && other.matches(instance))
    }

    /// What either matches.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self::new(move |instance| self.matches(instance) || other.matches(instance))
    }

    /// Whether an instance is wanted.
    #[must_use]
    pub fn matches(&self, instance: &Instance) -> bool {
        (self.0)(instance)
    }
}

impl Not for Filter {
    type Output = Self;

    fn not(self) -> Self {
        Self::new(move |instance| !self.matches(instance))
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter").finish_non_exhaustive()
    }
}

/// What to do when no instance takes traffic that a [`Route`] leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Fail: a caller of the route must not reach any other instance.
    #[default]
    Strict,
    /// Pick among all.
    Prefer,
}

/// Leads callers with a label to the instances that have the same one, and all others past them.
///
/// Given to [`Balancer::routed`](crate::Balancer::routed).
///
/// # Examples
/// ```
/// use registry_balance::{Balancer, Fallback, Route, Strategy};
/// use registry_core::{Instance, Managed, Registry};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-route")?;
/// registry.register(Instance::builder("orders", "old").build()?).await?;
/// registry.register(Instance::builder("orders", "new").metadata("canary", "v2").build()?).await?;
///
/// let orders = Balancer::new(registry.watch("orders").await?, Strategy::RoundRobin)?;
/// let canary = orders.routed(Route::to("canary", "v2", Fallback::Strict));
/// let everybody = orders.routed(Route::past("canary", Fallback::Prefer));
/// # while orders.len() < 2 { tokio::task::yield_now().await; }
/// assert_eq!(canary.pick()?.id().as_str(), "new");
/// assert_eq!(everybody.pick()?.id().as_str(), "old");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Route {
    key: String,
    value: Option<String>,
    pub(crate) fallback: Fallback,
}

impl Route {
    /// To the instances whose metadata has `key` with this value: for callers that carry the label.
    #[must_use]
    pub fn to(key: impl Into<String>, value: impl Into<String>, fallback: Fallback) -> Self {
        Self { key: key.into(), value: Some(value.into()), fallback }
    }

    /// Past the instances whose metadata has `key`, whatever its value: for callers that do not carry the label.
    #[must_use]
    pub fn past(key: impl Into<String>, fallback: Fallback) -> Self {
        Self { key: key.into(), value: None, fallback }
    }

    pub(crate) fn leads_to(&self, instance: &Instance) -> bool {
        instance.metadata.get(&self.key) == self.value.as_ref()
    }
}
