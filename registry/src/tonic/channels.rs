//! A channel for each instance that is picked.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ::tonic::{
    Status,
    transport::{self, Channel, Endpoint},
};
use http::Uri;
use registry_balance::{Balancer, Pick, Retry, Verdict};
use registry_core::{Error, ErrorKind, Instance, InstanceId, Result, Snapshot, Watcher};
use tokio::task::JoinSet;

use super::{endpoint, target};

/// A channel for each instance that a [`Balancer`] picks, made when it is first picked, and dropped when the instance is
/// gone, takes no traffic or has another endpoint. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Channels(Arc<Shared>);

struct Shared {
    balancer: Balancer,
    configure: Box<dyn Fn(Endpoint) -> Result<Endpoint, transport::Error> + Send + Sync>,
    open: Arc<Open>,
    /// Closes channels, until it is dropped.
    _closing: JoinSet<()>,
}

/// The channels, each with where it leads. Never held across an await.
type Open = Mutex<HashMap<InstanceId, (Uri, Channel)>>;

impl Channels {
    /// Channels to the instances that a balancer picks.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(balancer: Balancer) -> Self {
        Self::with(balancer, Ok)
    }

    /// The same with endpoints that are configured, as for [`channel_with`](super::channel_with).
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn with(
        balancer: Balancer,
        configure: impl Fn(Endpoint) -> Result<Endpoint, transport::Error> + Send + Sync + 'static,
    ) -> Self {
        let (open, mut closing) = (Arc::<Open>::default(), JoinSet::new());
        closing.spawn(close(open.clone(), balancer.watcher()));
        Self(Arc::new(Shared { balancer, configure: Box::new(configure), open, _closing: closing }))
    }

    /// The balancer.
    #[must_use]
    pub fn balancer(&self) -> &Balancer {
        &self.0.balancer
    }

    /// The channel for the next call. Say how it went with the [`Pick`]; [`judge`](super::judge) knows what to say.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if nobody takes traffic, or whoever was picked offers no gRPC;
    /// [`ErrorKind::InvalidInput`] if its endpoint cannot be configured.
    pub fn pick(&self) -> Result<(Channel, Pick)> {
        let pick = self.0.balancer.pick()?;
        Ok((self.0.channel(pick.instance())?, pick))
    }

    /// Makes a call, and, as long as the verdict and the budget allow, again at other instances. Answers what the last
    /// attempt did. [`judge`](super::judge) is the judge for any service.
    ///
    /// # Errors
    /// The status of the last attempt; `Unavailable` if there was nobody to call.
    ///
    /// # Cancel safety
    /// Dropped, the attempt under way is cancelled.
    pub async fn call<T, F: Future<Output = Result<T, Status>>>(
        &self,
        retry: &Retry,
        judge: impl Fn(&Result<T, Status>) -> Verdict,
        mut attempt: impl FnMut(Channel) -> F,
    ) -> Result<T, Status> {
        let at = |instance: Arc<Instance>| {
            let called = self.0.channel(&instance).map(&mut attempt);
            async { called.map_err(unavailable)?.await }
        };
        retry.call(&self.0.balancer, judge, at).await.map_err(unavailable)?
    }
}

impl fmt::Debug for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channels").field("balancer", self.balancer()).finish_non_exhaustive()
    }
}

impl Shared {
    fn channel(&self, instance: &Instance) -> Result<Channel> {
        let Instance { service, id, .. } = instance;
        let none = || Error::new(ErrorKind::Unavailable, format!("{service}/{id} has no endpoint for gRPC"));
        let uri = target(instance).ok_or_else(none)?;
        let mut open = lock(&self.open);
        if let Some((_, channel)) = open.get(id).filter(|(at, _)| *at == uri) {
            return Ok(channel.clone());
        }
        let channel = endpoint(uri.clone(), &self.configure)?.connect_lazy();
        // Whoever went after the pick would be kept for long.
        if leads_to(&self.balancer.watcher().current(), id, &uri) {
            open.insert(id.clone(), (uri, channel.clone()));
        }
        Ok(channel)
    }
}

fn lock(open: &Open) -> MutexGuard<'_, HashMap<InstanceId, (Uri, Channel)>> {
    // Every statement leaves it valid.
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

fn leads_to(snapshot: &Snapshot, id: &InstanceId, uri: &Uri) -> bool {
    let instance = snapshot.get(id).filter(|instance| instance.is_available());
    instance.and_then(|instance| target(instance)).as_ref() == Some(uri)
}

/// Closes the channels that nobody is to be called by any more.
async fn close(open: Arc<Open>, mut watcher: Watcher) {
    while let Some(snapshot) = watcher.next().await {
        lock(&open).retain(|id, (uri, _)| leads_to(&snapshot, id, uri));
    }
}

fn unavailable(error: Error) -> Status {
    let mut status = Status::unavailable(error.to_string());
    status.set_source(Arc::new(error));
    status
}
