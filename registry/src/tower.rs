//! Services and layers for [tower](https://docs.rs/tower): discovery for its own balancer, a balancer of ours that retries
//! elsewhere and ejects, and the refusal that makes leaving cost no request.
//!
//! ```
//! use service_registry::{Registry, balance::{Balancer, Retry, Strategy}, connect, tower::{Balance, judge, to_instance}};
//! use tower::{Service, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! # let registry = connect("memory://doc-tower").await?;
//! # registry.register(service_registry::Instance::builder("orders", "1").endpoint("http://10.0.0.5:8080").build()?).await?;
//! let orders = Balancer::new(registry.watch("orders").await?, Strategy::PowerOfTwo)?;
//! // Or a hyper client: anything that takes requests with absolute URIs.
//! let client = service_fn(async |request: http::Request<String>| {
//!     assert_eq!(request.uri(), "http://10.0.0.5:8080/orders/7");
//!     Ok::<_, std::convert::Infallible>(http::Response::new("shipped"))
//! });
//! let client = client.map_request(to_instance);
//! let mut orders = Balance::new(client, orders, Retry::default(), judge);
//! let answer = orders.ready().await?.call(http::Request::get("/orders/7").body(String::new())?).await?;
//! assert_eq!(*answer.body(), "shipped");
//! # Ok(())
//! # }
//! ```

use std::{
    convert::Infallible,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use ::tower::{BoxError, Layer, Service, ServiceExt, discover::Change};
use futures::{Stream, StreamExt, future::BoxFuture};
use http::{Request, Response, Uri, uri::PathAndQuery};
use registry_balance::{Balancer, Retry, Verdict};
use registry_core::{Instance, InstanceId, Watcher};

pub use crate::refusal::{Admission, REFUSED, Refuse, RefuseLayer};
use crate::{
    refused,
    targets::{changes, target, uri},
};

/// The instances that take traffic, as the balancers of tower discover them: each with the service that
/// `make` gives for it. An instance is made again when its endpoints change, and by no other change of its record.
pub fn discover<S>(
    watcher: Watcher,
    mut make: impl FnMut(&Instance) -> S + Send + Unpin,
) -> impl Stream<Item = Result<Change<InstanceId, S>, Infallible>> + Send + Unpin
where
    S: Send,
{
    changes(watcher, |before, now| before.endpoints == now.endpoints).map(move |change| {
        Ok(match change {
            Change::Insert(id, instance) => Change::Insert(id, make(&instance)),
            Change::Remove(id) => Change::Remove(id),
        })
    })
}

/// A request, and the instance to make it at.
#[derive(Clone, Debug)]
pub struct Routed<R> {
    /// The instance.
    pub instance: Arc<Instance>,
    /// The request.
    pub request: R,
}

/// The request with the scheme and the authority of the instance's first HTTP endpoint, or of its first one if it has none
/// of HTTP; what has no endpoint is left as it is. `grpc` is taken for HTTP and `grpcs` for HTTPS.
pub fn to_instance<B>(routed: Routed<Request<B>>) -> Request<B> {
    let Routed { instance, mut request } = routed;
    let target = target(&instance).or_else(|| uri("http", instance.endpoints.first()?));
    if let Some(target) = target.map(Uri::into_parts) {
        let mut parts = request.uri().clone().into_parts();
        (parts.scheme, parts.authority) = (target.scheme, target.authority);
        parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// How an HTTP call went, for calls that must not be made twice: what was [refused](REFUSED) is safe to make elsewhere;
/// errors and the statuses 502, 503 and 504 are failures of the instance.
pub fn judge<B, E>(answer: &Result<Response<B>, E>) -> Verdict {
    match answer {
        Ok(answer) => refused::judge(answer.status(), answer.headers()),
        Err(_) => Verdict::Failure,
    }
}

/// As [`judge`], for calls that do no harm twice: failures are made up for elsewhere.
pub fn judge_idempotent<B, E>(answer: &Result<Response<B>, E>) -> Verdict {
    match judge(answer) {
        Verdict::Failure => Verdict::Retry,
        verdict => verdict,
    }
}

/// A service that makes each request at an instance that a [`Balancer`] picks, reports how it went, and makes it again
/// elsewhere as a [`Retry`] allows.
///
/// The inner service takes [`Routed`] requests; [`to_instance`] turns those of HTTP into ones with absolute URIs.
#[derive(Clone)]
pub struct Balance<S, J> {
    inner: S,
    layer: BalanceLayer<J>,
}

impl<S, J> Balance<S, J> {
    /// Wraps a client. `judge` says how a call went: [`judge()`], [`judge_idempotent`] or one of your own.
    pub fn new(inner: S, balancer: Balancer, retry: Retry, judge: J) -> Self {
        Self { inner, layer: BalanceLayer::new(balancer, retry, judge) }
    }
}

impl<S, J, R> Service<R> for Balance<S, J>
where
    S: Service<Routed<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Response: Send,
    S::Error: Into<BoxError> + Send,
    J: Fn(&Result<S::Response, S::Error>) -> Verdict + Clone + Send + Sync + 'static,
    R: Clone + Send + Sync + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<S::Response, BoxError>>;

    /// Always: which instance is to be ready is not known yet.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> Self::Future {
        let Self { inner, layer: BalanceLayer { balancer, retry, judge } } = self.clone();
        Box::pin(async move {
            let attempt = move |instance| inner.clone().oneshot(Routed { instance, request: request.clone() });
            retry.call(&balancer, judge, attempt).await?.map_err(Into::into)
        })
    }
}

impl<S: fmt::Debug, J> fmt::Debug for Balance<S, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balance").field("inner", &self.inner).field("layer", &self.layer).finish()
    }
}

/// Makes a [`Balance`] of a client.
#[derive(Clone)]
pub struct BalanceLayer<J> {
    balancer: Balancer,
    retry: Retry,
    judge: J,
}

impl<J> BalanceLayer<J> {
    /// As [`Balance::new`].
    pub fn new(balancer: Balancer, retry: Retry, judge: J) -> Self {
        Self { balancer, retry, judge }
    }
}

impl<S, J: Clone> Layer<S> for BalanceLayer<J> {
    type Service = Balance<S, J>;

    fn layer(&self, inner: S) -> Self::Service {
        Balance { inner, layer: self.clone() }
    }
}

impl<J> fmt::Debug for BalanceLayer<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalanceLayer")
            .field("balancer", &self.balancer)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}
