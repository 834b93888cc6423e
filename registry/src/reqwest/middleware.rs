//! Each request at an instance that is picked for it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use ::reqwest::{Request, Response, Url};
use http::Extensions;
use registry_balance::{Balancer, Outlier, Retry, Strategy, Verdict};
use registry_core::{Error, ErrorKind, Instance, Registry, Result, ServiceName, Watcher, decode_segment};
use reqwest_middleware::{Error as SendError, Next, Result as SendResult};
use tokio::sync::OnceCell;

use super::offered;
use crate::refused;

type Build = dyn Fn(Watcher) -> Result<Balancer> + Send + Sync;

/// Makes requests to `registry://SERVICE/…` at an instance of the service, and, where that is safe, again at others.
///
/// A name that is not made of letters, digits, `-`, `_` and `.` is percent-encoded in the URL. All other URLs are left
/// alone.
///
/// * The request goes to the instance's first endpoint with the scheme `http` or `https`. The `Host` header names that
///   endpoint, as it does in any request to it, unless the request has a `Host` of its own, which stays.
/// * An answer with the header `x-registry-refused`: the instance did not take the request, which is made elsewhere.
/// * No connection: an instance that failed; the request is made elsewhere.
/// * No answer, or 502, 503 or 504: an instance that failed; what can be repeated without harm (GET, HEAD, OPTIONS, PUT,
///   DELETE, TRACE) is made elsewhere.
/// * Any other answer: the instance did its part. What becomes of the body after that is not looked at.
///
/// A request whose body is a stream is made once. Middleware that comes after this one sees each attempt. If nobody can be
/// called, the error is a `reqwest_middleware::Error::Middleware` that holds this library's [`Error`].
pub struct Middleware {
    registry: Arc<dyn Registry>,
    build: Box<Build>,
    retry: Retry,
    /// One for each service that was called. Never held across an await.
    balancers: Mutex<HashMap<ServiceName, Arc<OnceCell<Balancer>>>>,
}

impl Middleware {
    /// A middleware with [`Strategy::PowerOfTwo`] and the default rules of [`Outlier`] and [`Retry`].
    #[must_use]
    pub fn new(registry: Arc<dyn Registry>) -> Self {
        let build =
            |watcher| Balancer::builder(watcher).strategy(Strategy::PowerOfTwo).outlier(Outlier::default()).build();
        Self { registry, build: Box::new(build), retry: Retry::default(), balancers: Mutex::default() }
    }

    /// Sets how a service's balancer is made, at the first request to it.
    #[must_use]
    pub fn balancer(self, build: impl Fn(Watcher) -> Result<Balancer> + Send + Sync + 'static) -> Self {
        Self { build: Box::new(build), ..self }
    }

    /// Sets how often requests are made again.
    #[must_use]
    pub fn retry(self, retry: Retry) -> Self {
        Self { retry, ..self }
    }

    /// The balancer of the service that a URL names.
    async fn balancer_of(&self, url: &Url) -> Result<Balancer> {
        let name = url.host_str().filter(|_| url.port().is_none()).and_then(decode_segment);
        let name = name.ok_or_else(|| Error::invalid(format!("invalid URL {url}: expected registry://SERVICE/…")))?;
        let service = ServiceName::parse(name)?;
        let cell = {
            // Every statement leaves it valid.
            let mut balancers = self.balancers.lock().unwrap_or_else(PoisonError::into_inner);
            balancers.entry(service.clone()).or_default().clone()
        };
        let balancer = cell.get_or_try_init(async || (self.build)(self.registry.watch(&service).await?)).await?;
        Ok(balancer.clone())
    }
}

#[async_trait::async_trait]
impl reqwest_middleware::Middleware for Middleware {
    async fn handle(&self, request: Request, extensions: &mut Extensions, next: Next<'_>) -> SendResult<Response> {
        if request.url().scheme() != "registry" {
            return next.run(request, extensions).await;
        }
        let balancer = self.balancer_of(request.url()).await.map_err(SendError::middleware)?;
        let is_stream = request.body().is_some_and(|body| body.as_bytes().is_none());
        let retry = if is_stream { self.retry.clone().attempts(1) } else { self.retry.clone() };
        let repeatable = request.method().is_idempotent();
        // Attempts come one after the other, which the compiler cannot know.
        let extensions = tokio::sync::Mutex::new(extensions);
        let mut request = Some(request);
        let attempt = |instance: Arc<Instance>| {
            let again = request.as_ref().and_then(Request::try_clone).or_else(|| request.take());
            let (next, extensions) = (next.clone(), &extensions);
            async move {
                let request = addressed(again, &instance).map_err(SendError::middleware)?;
                next.run(request, &mut **extensions.lock().await).await
            }
        };
        let judge = |answer: &SendResult<Response>| judge(answer, repeatable);
        retry.call(&balancer, judge, attempt).await.map_err(SendError::middleware)?
    }
}

/// The request as it is made at an instance.
fn addressed(request: Option<Request>, instance: &Instance) -> Result<Request> {
    let mut request = request.ok_or_else(|| Error::invalid("a body that is a stream cannot be sent again"))?;
    let Instance { service, id, .. } = instance;
    let cannot = |why: &str| Error::new(ErrorKind::Unavailable, format!("{service}/{id} {why}"));
    let endpoint = offered(instance, &["http", "https"]).ok_or_else(|| cannot("has no endpoint for HTTP"))?;
    let url = Url::parse(endpoint.as_str());
    let mut url = url.map_err(|error| cannot("has an endpoint that is no URL").with_source(error))?;
    url.set_path(request.url().path());
    url.set_query(request.url().query());
    url.set_fragment(request.url().fragment());
    *request.url_mut() = url;
    Ok(request)
}

fn judge(answer: &SendResult<Response>, repeatable: bool) -> Verdict {
    let verdict = match answer {
        Ok(answer) => refused::judge(answer.status(), answer.headers()),
        // It was never sent.
        Err(SendError::Middleware(error)) if error.is::<Error>() => Verdict::Retry,
        Err(error) if error.is_connect() => Verdict::Retry,
        // The caller's own doing, or an answer that leads nowhere.
        Err(error) if error.is_builder() || error.is_redirect() => Verdict::Success,
        Err(_) => Verdict::Failure,
    };
    if repeatable && verdict == Verdict::Failure { Verdict::Retry } else { verdict }
}

impl fmt::Debug for Middleware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Middleware").field("retry", &self.retry).finish_non_exhaustive()
    }
}
