//! The users' contract.

use std::fmt;

use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::{Event, Heartbeat, Instance, Registration, Result, ServiceName, Snapshot, Watcher};

/// Registers instances, keeps them registered, and follows the instances of other services.
///
/// All methods take `&self`; share a registry as `Arc<dyn Registry>`. Dropping the last handle ends its tasks, and
/// what it registered expires after the ttl; [`destroy`](Self::destroy) takes it out at once.
///
/// # Cancel safety
/// Every method may be dropped at any await. `register`, `unregister` and `destroy` record what is wanted before they
/// touch the store, and the registry goes on with it; reads have no effect.
///
/// # Examples
/// ```
/// use registry_core::{Instance, Managed, Registry};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-registry")?;
/// registry.register(Instance::builder("orders", "7f3a").endpoint("http://10.0.0.5:8080").build()?).await?;
///
/// let orders = registry.discover("orders").await?;
/// assert_eq!(orders.available().count(), 1);
/// registry.destroy().await?;
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait Registry: fmt::Debug + Send + Sync + 'static {
    /// Registers an instance, or updates it: an idempotent upsert by service and id.
    ///
    /// The first `register` of a key takes it over from whoever holds it, so a restarted process replaces its dead
    /// predecessor at once. Later ones update only what is still ours.
    ///
    /// # Errors
    /// [`PermissionDenied`], [`InvalidInput`], [`Conflict`] and [`Closed`] are final: the registration is withdrawn,
    /// or, when it was an update, the previous content stays in force. [`Unavailable`] and [`Timeout`] are not: the
    /// registration stays [`Pending`] and the registry goes on until it succeeds or `unregister` withdraws it.
    ///
    /// [`PermissionDenied`]: crate::ErrorKind::PermissionDenied
    /// [`InvalidInput`]: crate::ErrorKind::InvalidInput
    /// [`Conflict`]: crate::ErrorKind::Conflict
    /// [`Closed`]: crate::ErrorKind::Closed
    /// [`Unavailable`]: crate::ErrorKind::Unavailable
    /// [`Timeout`]: crate::ErrorKind::Timeout
    /// [`Pending`]: crate::RegistrationState::Pending
    async fn register(&self, instance: Instance) -> Result<()>;

    /// Registers many instances in as few requests as the store allows. Each has its own outcome, in order, as
    /// [`register`](Self::register) would give it; one bad instance does not stop the others.
    async fn register_all(&self, instances: Vec<Instance>) -> Vec<Result<()>>;

    /// Takes an instance out. `Ok(false)` means that there was nothing of ours to take out: it was never registered
    /// here, or another owner has taken the key since.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for a bad name. Any other error means that the
    /// store did not confirm in time; the registration is withdrawn all the same, and the removal goes on.
    async fn unregister(&self, service: &str, id: &str) -> Result<bool>;

    /// The instances of a service. The first call lists them and starts following; later ones read the cache.
    ///
    /// A service that does not exist is an empty live snapshot. During an outage the last set is returned, marked
    /// [`Stale`](crate::Freshness::Stale); so is, if the outage is older than the process, the set in
    /// [`Options::snapshot_dir`](crate::Options::snapshot_dir).
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) if no complete set could be had within
    /// `request_timeout`; following goes on. What is fatal, such as
    /// [`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied), at once.
    async fn discover(&self, service: &str) -> Result<Snapshot>;

    /// Follows a service. The watcher's first item is the complete set, even when it is empty.
    ///
    /// # Errors
    /// What is fatal, such as [`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied). A store that cannot
    /// be reached is not an error: the watcher's snapshot is empty and marked
    /// [`Pending`](crate::Freshness::Pending) until the first complete set.
    async fn watch(&self, service: &str) -> Result<Watcher>;

    /// Renews everything now, checks that the store holds it, and restores what is missing.
    ///
    /// The registry does this by itself, every third of the ttl; call it when you know of a reason. It joins a renewal
    /// that is already running.
    ///
    /// # Errors
    /// Why the store could not be asked. What failed for single keys is in the answer.
    async fn heartbeat(&self) -> Result<Heartbeat>;

    /// Takes out everything, gives up the session and stops every task and watcher. Idempotent.
    ///
    /// # Errors
    /// Why the store did not confirm within `request_timeout`. The registry is closed all the same, and what could not
    /// be taken out expires after the ttl.
    async fn destroy(&self) -> Result<()>;

    /// The names of all services that have an instance, sorted.
    ///
    /// # Errors
    /// Why the store could not be asked.
    async fn services(&self) -> Result<Vec<ServiceName>>;

    /// Who announced that it uses `service`, sorted by id. A reader announces itself with the option `announce`; its
    /// id is `NAME~` and a random token.
    ///
    /// # Errors
    /// Why the store could not be asked.
    async fn subscribers(&self, service: &str) -> Result<Vec<Instance>>;

    /// The local registered-key set with each key's state, sorted by service and id.
    fn registrations(&self) -> Vec<Registration>;

    /// What happens to this registry from now on. Ends with `destroy` or the last handle. A slow reader misses the
    /// oldest events and is told so by [`Event::Missed`]; it delays nobody.
    fn events(&self) -> BoxStream<'static, Event>;
}
