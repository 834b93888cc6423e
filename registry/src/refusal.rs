//! Refusing what this process does not take, in a form that callers know as safe to make elsewhere.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use arc_swap::ArcSwap;
use futures::future::{Either, Ready, ready};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use tower::{Layer, Service};

use crate::refused::REFUSED_HEADER;

/// The header, and the gRPC metadata, of an answer that says that the request was not taken: `draining` or `not-here`.
pub const REFUSED: HeaderName = HeaderName::from_static(REFUSED_HEADER);

/// Which services this process takes requests for. Cheap to clone; clones share everything.
///
/// # Examples
/// ```
/// use service_registry::tower::Admission;
///
/// let admission = Admission::new(["orders"]);
/// assert!(admission.takes("orders") && !admission.takes("payments"));
/// admission.drain("orders");
/// assert!(!admission.takes("orders"));
/// ```
#[derive(Clone, Default)]
pub struct Admission(Arc<ArcSwap<BTreeMap<String, bool>>>);

impl Admission {
    /// Takes requests for these services.
    pub fn new<S: Into<String>>(services: impl IntoIterator<Item = S>) -> Self {
        let services = services.into_iter().map(|service| (service.into(), true)).collect();
        Self(Arc::new(ArcSwap::from_pointee(services)))
    }

    /// Takes requests for a service from now on.
    pub fn take(&self, service: impl Into<String>) {
        self.set(service.into(), true);
    }

    /// Refuses what comes for a service from now on: `draining`.
    pub fn drain(&self, service: impl Into<String>) {
        self.set(service.into(), false);
    }

    /// Whether requests for a service are taken.
    #[must_use]
    pub fn takes(&self, service: &str) -> bool {
        self.refusal(service).is_none()
    }

    fn set(&self, service: String, takes: bool) {
        self.0.rcu(|services| {
            let mut services = BTreeMap::clone(services);
            services.insert(service.clone(), takes);
            services
        });
    }

    fn refusal(&self, service: &str) -> Option<&'static str> {
        match self.0.load().get(service) {
            Some(true) => None,
            Some(false) => Some("draining"),
            None => Some("not-here"),
        }
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Admission").field(&self.0.load()).finish()
    }
}

type ServiceOf = dyn Fn(&Uri, &HeaderMap) -> Option<String> + Send + Sync;

/// Answers requests that an [`Admission`] does not take with [`REFUSED`]: to HTTP with the status 503, to gRPC with
/// `UNAVAILABLE`.
///
/// # Examples
/// ```
/// use service_registry::tower::{Admission, REFUSED, RefuseLayer};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let admission = Admission::new(["orders"]);
/// let app = service_fn(async |_: http::Request<String>| Ok::<_, std::convert::Infallible>(http::Response::new("yes".to_owned())));
/// let app = RefuseLayer::new(admission.clone(), "orders").layer(app); // with axum: Router::layer
///
/// admission.drain("orders");
/// let answer = app.oneshot(http::Request::new(String::new())).await?;
/// assert_eq!(answer.status(), 503);
/// assert_eq!(answer.headers()[REFUSED], "draining");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RefuseLayer {
    admission: Admission,
    service_of: Arc<ServiceOf>,
}

impl RefuseLayer {
    /// For a server all of whose requests are for one service.
    pub fn new(admission: Admission, service: impl Into<String>) -> Self {
        let service = service.into();
        Self::by(admission, move |_, _| Some(service.clone()))
    }

    /// For a server of gRPC, whose services are registered by the name that the path begins with: `shop.Orders` for
    /// `/shop.Orders/Get`.
    #[must_use]
    pub fn grpc(admission: Admission) -> Self {
        Self::by(admission, |uri, _| Some(uri.path().strip_prefix('/')?.split_once('/')?.0.to_owned()))
    }

    /// For any other server: says for which service a request is. `None` is taken in any case.
    pub fn by(
        admission: Admission,
        service_of: impl Fn(&Uri, &HeaderMap) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        Self { admission, service_of: Arc::new(service_of) }
    }
}

impl<S> Layer<S> for RefuseLayer {
    type Service = Refuse<S>;

    fn layer(&self, inner: S) -> Refuse<S> {
        Refuse { inner, layer: self.clone() }
    }
}

impl fmt::Debug for RefuseLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RefuseLayer").field("admission", &self.admission).finish_non_exhaustive()
    }
}

/// Made by [`RefuseLayer`].
#[derive(Clone, Debug)]
pub struct Refuse<S> {
    inner: S,
    layer: RefuseLayer,
}

impl<S, B, C> Service<Request<B>> for Refuse<S>
where
    S: Service<Request<B>, Response = Response<C>>,
    C: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let service = (self.layer.service_of)(request.uri(), request.headers());
        match service.and_then(|service| self.layer.admission.refusal(&service)) {
            Some(why) => Either::Right(ready(Ok(refusal(why, request.headers())))),
            None => Either::Left(self.inner.call(request)),
        }
    }
}

fn refusal<C: Default>(why: &'static str, request: &HeaderMap) -> Response<C> {
    const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
    const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");
    let mut answer = Response::new(C::default());
    let of_grpc = |kind: &HeaderValue| kind.as_bytes().starts_with(GRPC.as_bytes());
    if request.get(header::CONTENT_TYPE).is_some_and(of_grpc) {
        answer.headers_mut().insert(header::CONTENT_TYPE, GRPC);
        answer.headers_mut().insert("grpc-status", UNAVAILABLE);
        answer.headers_mut().insert("grpc-message", HeaderValue::from_static(why));
    } else {
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    answer.headers_mut().insert(REFUSED, HeaderValue::from_static(why));
    answer
}
