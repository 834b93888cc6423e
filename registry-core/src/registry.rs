//! The users' contract.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use futures::{future::try_join_all, stream::BoxStream};

use crate::{
    Error, ErrorKind, Event, Health, Heartbeat, Instance, InstanceId, Override, Registration, Result, ServiceName,
    Snapshot, Status, Watcher, error::Chain,
};

/// Registers instances, keeps them registered, and follows the instances of other services.
///
/// All methods take `&self`; share a registry as `Arc<dyn Registry>`. Dropping the last handle ends its tasks, and
/// what it registered expires after the ttl; [`destroy`](Self::destroy) takes it out at once.
///
/// # Cancel safety
/// Every method may be dropped at any await. `register`, `unregister`, `set_status`, `set_weight` and `destroy` record
/// what is wanted before they touch the store, and the registry goes on with it; reads have no effect. What a dropped
/// `drain`, `set_override` or `clear_override` leaves behind is said there.
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
    /// An endpoint that nobody can call (`0.0.0.0`, `[::]`, multicast, broadcast) is refused as [`InvalidInput`]; one
    /// that only this machine can call is warned of, unless the store is in this process. See
    /// [`advertise`](crate::advertise).
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

    /// Sets the status of what is registered here, and changes nothing else of it.
    ///
    /// Register an instance as [`Starting`](Status::Starting) and set it to [`Up`](Status::Up) once it is ready: readers
    /// have it in their list from the first moment, and in [`available`](Snapshot::available) only when it is up. Unlike
    /// a `register` of a changed copy, this loses nothing that is set at the same time elsewhere in the process. An
    /// operator's [override](Self::set_override) stays in force.
    ///
    /// # Errors
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a bad name, and for a key that is not in the local
    /// registered-key set. All others are those of an update by [`register`](Self::register): after a final one the
    /// previous content stays in force, and after `Unavailable` and `Timeout` the registry goes on.
    ///
    /// # Examples
    /// ```
    /// use registry_core::{Instance, Managed, Registry, Status};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-status")?;
    /// registry.register(Instance::builder("orders", "7f3a").status(Status::Starting).build()?).await?;
    /// // … the caches are warm …
    /// registry.set_status("orders", "7f3a", Status::Up).await?;
    /// assert_eq!(registry.discover("orders").await?.available().count(), 1);
    /// # Ok(())
    /// # }
    /// ```
    async fn set_status(&self, service: &str, id: &str, status: Status) -> Result<()>;

    /// Sets the weight of what is registered here, and changes nothing else of it: its share of the traffic, relative
    /// to the others; 0 takes it out of [`available`](Snapshot::available).
    ///
    /// # Errors
    /// As [`set_status`](Self::set_status).
    async fn set_weight(&self, service: &str, id: &str, weight: u32) -> Result<()>;

    /// Takes one instance out in good order: marks it [`Draining`](Status::Draining), waits until `grace` is over, counted
    /// from the call, so that readers stop sending and what they sent is answered, and unregisters it. A grace of zero
    /// unregisters at once. [`shutdown::drain`](crate::shutdown::drain) does this for all that is registered.
    ///
    /// `Ok(false)` means that nothing was taken out: there was nothing of ours, or it was called off, because the instance
    /// was registered again, or set to another status, before the grace was over.
    ///
    /// # Errors
    /// What is final, when the mark is refused: the instance stays as it was, and in traffic. If the store does not answer,
    /// the grace is waited for, and the errors are those of [`unregister`](Self::unregister).
    /// [`Closed`](crate::ErrorKind::Closed) if the registry is destroyed meanwhile.
    ///
    /// # Cancel safety
    /// Dropped before the grace is over, it leaves the instance draining and registered: call it again to go on, or
    /// [`set_status`](Self::set_status) to bring the instance back.
    ///
    /// # Examples
    /// ```
    /// use std::time::Duration;
    /// use registry_core::{Instance, Managed, Registry};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-drain-one")?;
    /// registry.register(Instance::builder("orders", "7f3a").build()?).await?;
    /// assert!(registry.drain("orders", "7f3a", Duration::from_millis(10)).await?);
    /// assert!(registry.registrations().is_empty());
    /// # Ok(())
    /// # }
    /// ```
    async fn drain(&self, service: &str, id: &str, grace: Duration) -> Result<bool>;

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

    /// Waits until a service has so many [`available`](Snapshot::available) instances, for `within` at most, and gives the
    /// snapshot that has them. A count of 0 waits for the first complete set.
    ///
    /// It looks at what readers see: during an outage that is the last known set, which counts, and is marked
    /// [`Stale`](crate::Freshness::Stale).
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout) if the store was read, and there are too few;
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if it cannot be read, or not any more. Both say how many there are
    /// and how far that can be trusted, and their source is what failed last. What is fatal, such as
    /// [`PermissionDenied`](crate::ErrorKind::PermissionDenied), and [`Closed`](crate::ErrorKind::Closed) come at once.
    ///
    /// # Examples
    /// ```
    /// use std::time::Duration;
    /// use registry_core::{ErrorKind, Instance, Managed, Registry};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-wait-for")?;
    /// registry.register(Instance::builder("orders", "7f3a").build()?).await?;
    /// let orders = registry.wait_for("orders", 1, Duration::from_secs(10)).await?;
    /// assert_eq!(orders.available().count(), 1);
    ///
    /// let error = registry.wait_for("orders", 2, Duration::from_millis(10)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// assert_eq!(error.to_string(), "orders has 1 of 2 available instances after 10ms (1 in all, live)");
    /// # Ok(())
    /// # }
    /// ```
    async fn wait_for(&self, service: &str, count: usize, within: Duration) -> Result<Snapshot>;

    /// Waits for all services that this process cannot work without, each with so many available instances, for `within`
    /// at most: a check for the start. Gives their snapshots in order.
    ///
    /// # Errors
    /// One error that names every service with too few: what [`wait_for`](Self::wait_for) says of it. It is
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if one of them could not be read, else
    /// [`Timeout`](crate::ErrorKind::Timeout). What is fatal for one comes at once.
    ///
    /// # Examples
    /// ```
    /// use std::time::Duration;
    /// use registry_core::{Instance, Managed, Registry};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-require")?;
    /// registry.register(Instance::builder("orders", "1").build()?).await?;
    /// registry.register(Instance::builder("payments", "1").build()?).await?;
    /// registry.require(&[("orders", 1), ("payments", 1)], Duration::from_secs(10)).await?;
    ///
    /// let error = registry.require(&[("orders", 1), ("stock", 2)], Duration::from_millis(10)).await.unwrap_err();
    /// assert!(error.to_string().starts_with("1 of 2 required services are not ready: stock has 0 of 2 available"));
    /// # Ok(())
    /// # }
    /// ```
    async fn require(&self, services: &[(&str, usize)], within: Duration) -> Result<Vec<Snapshot>> {
        let all = services.iter().map(async |&(service, count)| match self.wait_for(service, count, within).await {
            Err(fatal) if !fatal.is_retryable() => Err(fatal),
            ready_or_not => Ok(ready_or_not),
        });
        let (mut ready, mut missing) = (Vec::new(), Vec::new());
        for outcome in try_join_all(all).await? {
            match outcome {
                Ok(snapshot) => ready.push(snapshot),
                Err(error) => missing.push(error),
            }
        }
        if missing.is_empty() { Ok(ready) } else { Err(not_ready(&missing, services.len())) }
    }

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

    /// The names of all services that have an instance, sorted. Asks the store, and reads nothing but names.
    ///
    /// # Errors
    /// Why the store could not be asked.
    ///
    /// # Examples
    /// ```
    /// use registry_core::{Instance, Managed, Registry};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-services")?;
    /// for method in ["OrderService/Get", "UserService/Login", "UserService/Logout"] {
    ///     registry.register(Instance::builder(method, "7f3a").build()?).await?;
    /// }
    /// let services = registry.services().await?;
    /// let of_users: Vec<_> = services.into_iter().filter(|name| name.starts_with("UserService/")).collect();
    /// assert_eq!(of_users, ["UserService/Login".parse()?, "UserService/Logout".parse()?]);
    /// # Ok(())
    /// # }
    /// ```
    async fn services(&self) -> Result<Vec<ServiceName>>;

    /// Who announced that it uses `service`, sorted by id. A reader announces itself with the option `announce`; its
    /// id is `NAME~` and a random token.
    ///
    /// # Errors
    /// Why the store could not be asked.
    async fn subscribers(&self, service: &str) -> Result<Vec<Instance>>;

    /// Sets the status or the weight, or both, of somebody's instance for every reader, as an operator does: to take an
    /// instance out of traffic, say, that does not leave by itself.
    ///
    /// It is in force as soon as it is written, for the instance that is there, and for every one that comes under this
    /// id later, whatever it registers with. It replaces the override that was set before, by whomever. Nothing needs to
    /// be renewed: it outlives this process, until somebody [clears](Self::clear_override) it. A reader that has followed
    /// the service without a break for a day, in which there was no such instance, removes it.
    ///
    /// # Errors
    /// [`InvalidInput`] for a bad name and for an override that sets nothing, [`PermissionDenied`] if the store refuses,
    /// [`Closed`] after `destroy`. [`Unavailable`] and [`Timeout`] if the store did not confirm within `request_timeout`;
    /// nobody goes on with it, but it may have been applied, and setting it again does no harm.
    ///
    /// # Cancel safety
    /// Dropped, it may have been applied or not, and may still be.
    ///
    /// # Examples
    /// ```
    /// use registry_core::{Instance, Managed, Override, Registry, Status};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let provider = Managed::memory("memory://doc-overrides")?;
    /// provider.register(Instance::builder("orders", "7f3a").build()?).await?;
    ///
    /// let operator = Managed::memory("memory://doc-overrides")?;
    /// operator.set_override("orders", "7f3a", Override::default().status(Status::Draining)).await?;
    /// assert_eq!(operator.discover("orders").await?.available().count(), 0);
    ///
    /// let overrides = operator.overrides("orders").await?;
    /// assert!(overrides.iter().any(|(id, set)| id.as_str() == "7f3a" && set.status == Some(Status::Draining)));
    /// assert!(operator.clear_override("orders", "7f3a").await?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`PermissionDenied`]: crate::ErrorKind::PermissionDenied
    /// [`InvalidInput`]: crate::ErrorKind::InvalidInput
    /// [`Closed`]: crate::ErrorKind::Closed
    /// [`Unavailable`]: crate::ErrorKind::Unavailable
    /// [`Timeout`]: crate::ErrorKind::Timeout
    async fn set_override(&self, service: &str, id: &str, set: Override) -> Result<()>;

    /// Every override of a service, sorted by id, those included whose instance is not there.
    ///
    /// # Errors
    /// Why the store could not be asked.
    async fn overrides(&self, service: &str) -> Result<Vec<(InstanceId, Override)>>;

    /// Clears an override, whoever set it: readers see the instance as it is registered. `Ok(false)`: there was none.
    ///
    /// # Errors
    /// As [`set_override`](Self::set_override).
    ///
    /// # Cancel safety
    /// Dropped, it may have been applied or not, and may still be.
    async fn clear_override(&self, service: &str, id: &str) -> Result<bool>;

    /// The local registered-key set with each key's state, sorted by service and id.
    fn registrations(&self) -> Vec<Registration>;

    /// One key of the local registered-key set with its state; `None` if it is not registered here. Copies no other key.
    ///
    /// # Examples
    /// ```
    /// use registry_core::{Instance, Managed, Registry};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> registry_core::Result<()> {
    /// let registry = Managed::memory("memory://doc-registration")?;
    /// registry.register(Instance::builder("orders", "7f3a").build()?).await?;
    /// let orders = registry.registration("orders", "7f3a").expect("it is registered here");
    /// assert!(orders.state.is_registered());
    /// assert!(registry.registration("orders", "another").is_none());
    /// # Ok(())
    /// # }
    /// ```
    fn registration(&self, service: &str, id: &str) -> Option<Registration> {
        let is_it = |one: &Registration| one.service().as_str() == service && one.id().as_str() == id;
        self.registrations().into_iter().find(is_it)
    }

    /// How this registry is now: its registrations by state, and its views. Asks nobody.
    fn health(&self) -> Health;

    /// What happens to this registry from now on. Ends with `destroy` or the last handle. A slow reader misses the
    /// oldest events and is told so by [`Event::Missed`]; it delays nobody.
    fn events(&self) -> BoxStream<'static, Event>;
}

/// One error for all services that are not ready.
fn not_ready(missing: &[Error], of: usize) -> Error {
    let is_unreadable = missing.iter().any(|error| error.kind() == ErrorKind::Unavailable);
    let kind = if is_unreadable { ErrorKind::Unavailable } else { ErrorKind::Timeout };
    let each: Vec<_> = missing.iter().map(|error| Chain(error).to_string()).collect();
    Error::new(kind, format!("{} of {of} required services are not ready: {}", missing.len(), each.join("; ")))
}
