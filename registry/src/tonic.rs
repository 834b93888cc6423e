//! gRPC with tonic: clients that follow a service, and servers that are registered while they serve.
//!
//! | | a call goes to | nobody takes traffic | an instance fails |
//! | --- | --- | --- | --- |
//! | [`channel`] | any instance, evenly | it waits | the call fails |
//! | [`Channels`] | whom a [`Balancer`](crate::balance::Balancer) picks: weights, zones, routes, ejection | it fails at once | it is made elsewhere, where that is safe |
//!
//! The first is one line in a program that has a channel already; the second is for what must not fail.
//!
//! ```
//! use service_registry::{Instance, Server, balance::{Balancer, Outlier, Retry}, connect, tonic::{Channels, channel, judge}};
//! use tokio::net::TcpListener;
//! use tonic::transport::Server as Grpc;
//! use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let registry = connect("memory://doc-tonic").await?;
//! let listener = TcpListener::bind("127.0.0.1:0").await?;
//! let endpoint = format!("grpc://{}", listener.local_addr()?);
//! let server = Server::new(registry.clone(), Instance::builder("orders", "1").endpoint(endpoint).build()?);
//! let (_reporter, health) = tonic_health::server::health_reporter(); // or any other service
//! tokio::spawn(server.tonic(listener, Grpc::builder().add_service(health)));
//!
//! let mut client = HealthClient::new(channel(registry.watch("orders").await?));
//! client.check(HealthCheckRequest::default()).await?;
//!
//! let orders = Balancer::builder(registry.watch("orders").await?).outlier(Outlier::default()).build()?;
//! let (orders, retry) = (Channels::new(orders), Retry::default());
//! let check = async |channel| HealthClient::new(channel).check(HealthCheckRequest::default()).await;
//! orders.call(&retry, judge, check).await?;
//! # Ok(())
//! # }
//! ```
//!
//! An instance is called at its first endpoint with the scheme `grpc` or `http`, or `grpcs` or `https` for TLS. Connections
//! are made with the first call, and at most for 2 s.
//!
//! # TLS
//! Turn on tonic's feature `tls-aws-lc` or `tls-ring`, and one for the authorities unless yours is private, such as
//! `tls-native-roots`; configure the endpoints. Without these features, tonic makes calls to `grpcs` and `https` in the clear.
//!
//! ```
//! # async fn example(registry: &dyn service_registry::Registry, pem: &str) -> service_registry::Result<()> {
//! use service_registry::{balance::{Balancer, Strategy}, tonic::{Channels, channel_with}};
//! use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
//!
//! let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name("orders.internal");
//! let configure = move |endpoint: Endpoint| endpoint.tls_config(tls.clone());
//! let channel = channel_with(registry.watch("orders").await?, configure.clone());
//! let orders = Balancer::new(registry.watch("orders").await?, Strategy::PowerOfTwo)?;
//! let channels = Channels::with(orders, configure);
//! # Ok(())
//! # }
//! ```
//!
//! The certificate of each instance must be for the `domain_name`, or, without one, for the host of its endpoint. Instances
//! without TLS are called without it all the same. Where a handshake fails, or nothing was configured, the call was not made:
//! it fails as `Unavailable`, whose sources say why, or is made elsewhere. A server takes its own certificate from
//! `tonic::transport::Server::tls_config`.

mod channels;

use std::{pin::pin, time::Duration};

use ::tonic::{
    Code, Status,
    body::Body,
    codegen::{Body as HttpBody, Bytes, StdError},
    service::Routes,
    transport::{
        self, Channel, Endpoint,
        channel::Change,
        server::{Router, TcpIncoming},
    },
};
use futures::StreamExt;
use http::Uri;
use registry_balance::Verdict;
use registry_core::{Error, ErrorKind, Instance, InstanceId, Result, Watcher};
use tokio::{net::TcpListener, sync::mpsc};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tower::{Layer, Service, discover};
use tracing::warn;

pub use self::channels::Channels;
use crate::{
    Server,
    refused::REFUSED_HEADER,
    targets::{changes, target},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How many changes a channel takes in with its next call; more wait, and only the latest state counts.
const CHANGES: usize = 1024;

/// A channel to all instances of a service that take traffic.
///
/// Each call goes to one of them at random, with even odds. A call waits while there is nobody: give it a timeout. One at an
/// instance that is dead fails; [`Channels`] make it elsewhere. An instance stays connected as long as it keeps its
/// endpoint, whatever else changes in its record. Connections to those that went are closed with the next call, as soon as
/// what is under way there has ended. Once the registry is closed, the last set stays.
///
/// # Panics
/// Outside of a tokio runtime, as tonic's own channels do.
#[must_use]
pub fn channel(watcher: Watcher) -> Channel {
    channel_with(watcher, Ok)
}

/// A [`channel`] whose endpoints are configured: timeouts, keepalive, TLS.
///
/// An instance whose endpoint cannot be configured is left out, with a warning in the log.
///
/// # Panics
/// As [`channel`] does.
///
/// # Examples
/// ```
/// # async fn example(watcher: service_registry::Watcher) {
/// use std::time::Duration;
/// use service_registry::tonic::channel_with;
///
/// let channel = channel_with(watcher, |endpoint| Ok(endpoint.timeout(Duration::from_secs(3))));
/// # }
/// ```
#[must_use]
pub fn channel_with(
    watcher: Watcher,
    configure: impl Fn(Endpoint) -> Result<Endpoint, transport::Error> + Send + Sync + 'static,
) -> Channel {
    let (channel, changes) = Channel::balance_channel(CHANGES);
    tokio::spawn(follow(watcher, changes, configure));
    channel
}

/// Tells a channel what changes, until it or the registry is gone.
async fn follow(
    watcher: Watcher,
    channel: mpsc::Sender<Change<InstanceId, Endpoint>>,
    configure: impl Fn(Endpoint) -> Result<Endpoint, transport::Error>,
) {
    let same = |before: &Instance, now: &Instance| before.endpoints == now.endpoints || target(before) == target(now);
    let mut changes = pin!(changes(watcher, same).take_until(channel.closed()));
    while let Some(change) = changes.next().await {
        let change = match change {
            discover::Change::Insert(id, instance) => match target(&instance).map(|uri| endpoint(uri, &configure)) {
                Some(Ok(endpoint)) => Change::Insert(id, endpoint),
                Some(Err(error)) => {
                    warn!(service = %instance.service, %id, error = ?error, "left out");
                    Change::Remove(id)
                }
                None => Change::Remove(id),
            },
            discover::Change::Remove(id) => Change::Remove(id),
        };
        if channel.send(change).await.is_err() {
            return;
        }
    }
}

fn endpoint(uri: Uri, configure: impl Fn(Endpoint) -> Result<Endpoint, transport::Error>) -> Result<Endpoint> {
    let cannot = format!("cannot connect to {uri}");
    configure(Endpoint::from(uri).connect_timeout(CONNECT_TIMEOUT))
        .map_err(|error| Error::invalid(cannot).with_source(error))
}

/// What a call's outcome says of the instance, and whether the call is safe to make again:
///
/// * `Unavailable` with the metadata `x-registry-refused`: [`Refused`](Verdict::Refused).
/// * Any other `Unavailable`: [`Retry`](Verdict::Retry). No connection could be made, or the server says that it cannot
///   serve now and that the caller should try again, which is what this status means to every gRPC client.
/// * `Cancelled`, which is also what tonic makes of a timeout, `DataLoss`, `DeadlineExceeded`, `Internal`,
///   `ResourceExhausted` and `Unknown`: [`Failure`](Verdict::Failure).
/// * Everything else, such as `NotFound`: [`Success`](Verdict::Success). The instance did its part.
pub fn judge<T>(answer: &Result<T, Status>) -> Verdict {
    use Code::{Cancelled, DataLoss, DeadlineExceeded, Internal, ResourceExhausted, Unavailable, Unknown};
    let Err(status) = answer else { return Verdict::Success };
    match status.code() {
        Unavailable if status.metadata().contains_key(REFUSED_HEADER) => Verdict::Refused,
        Unavailable => Verdict::Retry,
        Cancelled | DataLoss | DeadlineExceeded | Internal | ResourceExhausted | Unknown => Verdict::Failure,
        _ => Verdict::Success,
    }
}

/// Asks a server by `grpc.health.v1` whether it serves: a service by its full name, or everything for an empty one.
///
/// It waits as long as the channel does: configure a timeout there.
///
/// # Errors
/// [`ErrorKind::Unavailable`] if it does not answer, does not know the service, or says anything but `SERVING`.
pub async fn check(channel: Channel, service: &str) -> Result<()> {
    let error = |why: String| Error::new(ErrorKind::Unavailable, why);
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(channel).check(request).await;
    let answer = answer.map_err(|status| error(format!("cannot check {service:?}")).with_source(status))?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        status => Err(error(format!("{service:?} is {}", status.as_str_name()))),
    }
}

impl Server {
    /// Serves gRPC, as [`run`](Self::run) does. Sets `TCP_NODELAY`; what the router's builder says of TCP has no effect.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub async fn tonic<L, B>(self, listener: TcpListener, router: Router<L>) -> Result<()>
    where
        L: Layer<Routes>,
        L::Service: Service<http::Request<Body>, Response = http::Response<B>, Error: Into<StdError> + Send, Future: Send>
            + Clone
            + Send
            + 'static,
        B: HttpBody<Data = Bytes, Error: Into<StdError>> + Send + 'static,
    {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        self.run(|stop| router.serve_with_incoming_shutdown(incoming, stop)).await
    }
}
