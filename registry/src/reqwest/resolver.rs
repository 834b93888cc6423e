//! The addresses of services for a plain client.

use std::{fmt, net::SocketAddr, sync::Arc};

use ::reqwest::dns::{Addrs, Name, Resolve, Resolving};
use registry_core::{Error, ErrorKind, Registry, Result};
use tokio::net::lookup_host;

use super::offered;

/// reqwest shares the time to connect among all addresses, so they must be few.
const INSTANCES: usize = 3;

/// Answers the names of services with the addresses of instances that take traffic, and asks the system for all others.
///
/// `orders.registry.internal` is the service `orders` if the suffix is `registry.internal`. Host names are in lower case,
/// and hold letters, digits, `-`, `_` and `.`: other services need the [`Middleware`](super::Middleware).
///
/// The port is the instance's, unless the URL has one: leave it out. Three instances are named, in an order that is drawn
/// anew each time by their weights, and the client connects to the first that it can. An instance whose host is a name is
/// looked up with the system.
///
/// A name that cannot be resolved is an error of the request, whose sources say why: nobody takes traffic, say, or the
/// registry has not been able to read the service.
pub struct Resolver {
    registry: Arc<dyn Registry>,
    suffix: String,
    scheme: &'static str,
}

impl Resolver {
    /// A resolver for the endpoints with the scheme `http`.
    #[must_use]
    pub fn new(registry: Arc<dyn Registry>, suffix: impl AsRef<str>) -> Self {
        let suffix = format!(".{}", suffix.as_ref().trim_matches('.').to_ascii_lowercase());
        Self { registry, suffix, scheme: "http" }
    }

    /// Makes it one for the endpoints with the scheme `https`, for a client that makes no other requests to services.
    #[must_use]
    pub fn https(self) -> Self {
        Self { scheme: "https", ..self }
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (registry, scheme) = (self.registry.clone(), self.scheme);
        let host = name.as_str().to_owned();
        let service = host.trim_end_matches('.').strip_suffix(&self.suffix).map(str::to_owned);
        Box::pin(async move {
            let addresses = match service {
                Some(service) => addresses(&*registry, &service, scheme).await?,
                None => lookup_host((host, 0)).await?.collect(),
            };
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("suffix", &self.suffix).field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

/// Where up to three instances of a service can be reached.
async fn addresses(registry: &dyn Registry, service: &str, scheme: &str) -> Result<Vec<SocketAddr>> {
    let snapshot = registry.discover(service).await?;
    let mut order: Vec<_> =
        snapshot.available().filter_map(|one| Some((turn(one.weight), offered(one, &[scheme])?))).collect();
    order.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let (all, freshness) = (snapshot.len(), snapshot.freshness());
    let why = format!("no instance of {service} can be called by {scheme}: {all} registered ({freshness})");
    let (mut addresses, mut nobody) = (Vec::new(), Error::new(ErrorKind::Unavailable, why));
    for (_, endpoint) in order.into_iter().take(INSTANCES) {
        match lookup_host((endpoint.host(), endpoint.port())).await {
            Ok(found) => addresses.extend(found),
            Err(error) => nobody = nobody.with_source(error),
        }
    }
    if addresses.is_empty() { Err(nobody) } else { Ok(addresses) }
}

/// When an instance's turn is: at random, and the sooner the more weight it has.
fn turn(weight: u32) -> f64 {
    -rand::random::<f64>().max(f64::MIN_POSITIVE).ln() / f64::from(weight)
}
