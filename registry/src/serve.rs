//! A server that is registered as long as it serves, and leaves without dropping a request.

use std::{error::Error as StdError, fmt, future::Future, pin::pin, sync::Arc, time::Duration};

use futures::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use registry_core::{Error, ErrorKind, Instance, Registry, Result, Status, shutdown};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tracing::{info, warn};

/// Registers instances while a server runs. When it is told to stop, it goes in the order that costs no request: mark them
/// [`Draining`](Status::Draining), wait until readers have seen it, deregister them, stop accepting, and finish what is
/// under way.
///
/// The features `axum` and `tonic` add a method that serves with each; [`run`](Self::run) takes any other server.
///
/// # Examples
/// ```
/// use std::{sync::Arc, time::Duration};
/// use service_registry::{Instance, Registry, Server, connect};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> service_registry::Result<()> {
/// let registry = connect("memory://doc-server").await?;
/// let instance = Instance::builder("orders", "1").endpoint("http://10.0.0.5:8080").build()?;
/// let (stop, stopped) = tokio::sync::oneshot::channel();
///
/// let server = Server::new(registry.clone(), instance)
///     .grace(Duration::from_millis(10))
///     .until(async { _ = stopped.await });
/// let running = tokio::spawn(server.run(|stop| async {
///     stop.await; // a real one serves until then
///     Ok::<_, std::io::Error>(())
/// }));
/// # while registry.discover("orders").await?.is_empty() { tokio::task::yield_now().await; }
/// stop.send(()).ok();
/// running.await.expect("it did not panic")?;
/// assert!(registry.registrations().is_empty());
/// # Ok(())
/// # }
/// ```
#[must_use = "it serves nothing until it is run"]
pub struct Server {
    registry: Arc<dyn Registry>,
    instances: Vec<Instance>,
    grace: Duration,
    finish: Duration,
    until: Option<BoxFuture<'static, ()>>,
    #[cfg(feature = "tower")]
    admission: Option<crate::tower::Admission>,
}

impl Server {
    /// A server that is this instance.
    pub fn new(registry: Arc<dyn Registry>, instance: Instance) -> Self {
        let (grace, finish) = (Duration::from_secs(5), Duration::from_secs(30));
        Self {
            registry,
            instances: vec![instance],
            grace,
            finish,
            until: None,
            #[cfg(feature = "tower")]
            admission: None,
        }
    }

    /// Adds an instance of another service that it offers.
    pub fn and(mut self, instance: Instance) -> Self {
        self.instances.push(instance);
        self
    }

    /// How long it goes on serving as usual while it is drained, so that readers stop sending. Must be longer than a
    /// change takes to reach them. Defaults to 5 s.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// How long what is under way may take after that. Defaults to 30 s.
    pub fn finish(mut self, finish: Duration) -> Self {
        self.finish = finish;
        self
    }

    /// Sets what tells it to stop. Defaults to SIGTERM or SIGINT (Ctrl-C on Windows).
    pub fn until(mut self, stop: impl Future<Output = ()> + Send + 'static) -> Self {
        self.until = Some(stop.boxed());
        self
    }

    /// Has what comes after the grace refused, for all services that it offers, by a
    /// [`RefuseLayer`](crate::tower::RefuseLayer) with the same admission: clients that have not noticed make it
    /// elsewhere.
    #[cfg(feature = "tower")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tower")))]
    pub fn admission(mut self, admission: crate::tower::Admission) -> Self {
        self.admission = Some(admission);
        self
    }

    /// Runs a server, which must be bound already: it is given a future that says when to stop accepting, and ends when
    /// all that was under way is done.
    ///
    /// # Errors
    /// Why the instances cannot be registered, if that is final, and why the server failed. They are deregistered in
    /// both cases. A store that is down is neither: registering goes on beside the server.
    ///
    /// # Cancel safety
    /// Dropped, the server ends at once, and the instances stay registered.
    pub async fn run<S, E>(self, server: impl FnOnce(BoxFuture<'static, ()>) -> S) -> Result<()>
    where
        S: Future<Output = Result<(), E>>,
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let (stop, stopped) = oneshot::channel::<()>();
        let mut server = pin!(server(stopped.map(drop).boxed()));
        let (registry, instances) = (&*self.registry, &self.instances);
        let until = async {
            match self.until {
                Some(until) => until.await,
                None => shutdown::signal().await?,
            }
            Ok(())
        };
        let serving = async {
            let mut until = pin!(until);
            // Also while the store does not answer, it can be told to stop.
            tokio::select! {
                stop = &mut until => stop?,
                registered = register(registry, instances.clone()) => {
                    registered?;
                    until.await?;
                }
            }
            info!(grace = ?self.grace, "draining");
            drain(registry, instances, self.grace).await;
            Ok(())
        };
        let outcome = tokio::select! {
            ended = &mut server => {
                deregister(registry, instances).await;
                return ended.map_err(failed);
            }
            outcome = serving => outcome,
        };
        #[cfg(feature = "tower")]
        if let Some(admission) = &self.admission {
            instances.iter().for_each(|instance| admission.drain(instance.service.as_str()));
        }
        deregister(registry, instances).await;
        // It may have ended by itself meanwhile.
        let _ = stop.send(());
        match timeout(self.finish, server).await {
            Ok(ended) => outcome.and(ended.map_err(failed)),
            Err(_) => {
                warn!(finish = ?self.finish, "what was under way did not end in time");
                outcome
            }
        }
    }
}

async fn register(registry: &dyn Registry, instances: Vec<Instance>) -> Result<()> {
    for outcome in registry.register_all(instances).await {
        match outcome {
            Err(error) if error.is_retryable() => warn!(%error, "not registered yet"),
            outcome => outcome?,
        }
    }
    Ok(())
}

async fn drain(registry: &dyn Registry, instances: &[Instance], grace: Duration) {
    let draining =
        instances.iter().map(|instance| registry.set_status(&instance.service, &instance.id, Status::Draining));
    for error in join_all(draining).await.into_iter().filter_map(Result::err) {
        warn!(%error, "cannot mark a registration as draining");
    }
    sleep(grace).await;
}

async fn deregister(registry: &dyn Registry, instances: &[Instance]) {
    let leaving = instances.iter().map(|instance| registry.unregister(&instance.service, &instance.id));
    for error in join_all(leaving).await.into_iter().filter_map(Result::err) {
        // The removal goes on as long as the registry lives.
        warn!(%error, "not deregistered yet");
    }
}

fn failed(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Unavailable, "the server failed").with_source(error)
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("instances", &self.instances).field("grace", &self.grace).finish_non_exhaustive()
    }
}
