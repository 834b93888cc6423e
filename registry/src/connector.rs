//! From a connection string to a registry.

use std::{collections::BTreeMap, fmt, future::Future, sync::Arc};

use futures::future::BoxFuture;
use registry_core::{
    Backend, Error, ErrorKind, Location, Managed, Options, Registry, Result,
    memory::{MemoryBackend, MemoryConfig},
};

/// The schemes that this library knows, and the feature that compiles each in; `None`: always there.
const KNOWN: &[(&str, Option<&str>)] = &[
    ("memory", None),
    ("etcd", Some("etcd")),
    ("etcds", Some("etcd")),
    ("zk", Some("zookeeper")),
    ("zks", Some("zookeeper")),
    ("redis", Some("redis")),
    ("rediss", Some("redis")),
    ("redis+sentinel", Some("redis")),
    ("rediss+sentinel", Some("redis")),
    ("redis+cluster", Some("redis")),
    ("rediss+cluster", Some("redis")),
];

/// Opens the registry that a connection string names:
/// `scheme://[user[:password]@]host[:port][,host[:port]…][/prefix][?option=value…]`.
///
/// Checks all that can be checked without the store and does not need the store to be up: services start while it is
/// down. Must be called inside a tokio runtime.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a malformed string, an unknown scheme, an unknown option or a bad value, saying what
/// is accepted; [`ErrorKind::Unsupported`] for a scheme that is not compiled in, naming the feature to enable.
///
/// # Examples
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> service_registry::Result<()> {
/// let registry = service_registry::connect("memory://shop?ttl=10s").await?;
/// assert!(registry.discover("orders").await?.is_empty());
///
/// let error = service_registry::connect("memory://shop?tll=10s").await.unwrap_err();
/// assert!(error.to_string().contains("unknown option \"tll\""));
/// # Ok(())
/// # }
/// ```
pub async fn connect(url: &str) -> Result<Arc<dyn Registry>> {
    Connector::new().connect(url).await
}

type Factory = Box<dyn Fn(Location) -> BoxFuture<'static, Result<Arc<dyn Registry>>> + Send + Sync>;

/// [`connect`] with schemes of your own.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use service_registry::{Connector, Managed, Options, Registry, memory::{MemoryBackend, MemoryStore}};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> service_registry::Result<()> {
/// let connector = Connector::new().with("consul", |mut location| async move {
///     let options = Options::take_from(&mut location)?;
///     location.finish(Options::NAMES)?;
///     let backend = MemoryBackend::new(MemoryStore::new(), options.ttl); // yours, here
///     Ok(Arc::new(Managed::new(backend, options)?) as Arc<dyn Registry>)
/// });
/// let registry = connector.connect("consul://127.0.0.1:8500").await?;
/// assert!(registry.registrations().is_empty());
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct Connector {
    factories: BTreeMap<String, Factory>,
}

impl Connector {
    /// Knows the schemes of this library that are compiled in.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a scheme, or replaces one. The factory makes the registry of a parsed connection string; it takes its
    /// options out of the location and calls [`Location::finish`] so that unknown ones are refused.
    #[must_use]
    pub fn with<F, R>(mut self, scheme: impl Into<String>, factory: F) -> Self
    where
        F: Fn(Location) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Arc<dyn Registry>>> + Send + 'static,
    {
        let factory: Factory = Box::new(move |location| Box::pin(factory(location)));
        self.factories.insert(scheme.into().to_ascii_lowercase(), factory);
        self
    }

    /// Opens the registry that a connection string names, as [`connect`] does.
    ///
    /// # Errors
    /// As for [`connect`], and whatever the factory of an added scheme returns.
    pub async fn connect(&self, url: &str) -> Result<Arc<dyn Registry>> {
        let location = Location::parse(url)?;
        if let Some(factory) = self.factories.get(location.scheme()) {
            return factory(location).await;
        }
        match location.scheme() {
            "memory" => {
                let config = MemoryConfig::from_location(location)?;
                managed(MemoryBackend::new(config.store(), config.options.ttl), config.options)
            }
            #[cfg(feature = "etcd")]
            "etcd" | "etcds" => {
                let config = registry_etcd::EtcdConfig::from_location(location)?;
                let options = config.options.clone();
                managed(registry_etcd::EtcdBackend::new(config)?, options)
            }
            #[cfg(feature = "zookeeper")]
            "zk" | "zks" => {
                let config = registry_zk::ZooKeeperConfig::from_location(location)?;
                let options = config.options.clone();
                managed(registry_zk::ZooKeeperBackend::new(config)?, options)
            }
            #[cfg(feature = "redis")]
            "redis" | "rediss" | "redis+sentinel" | "rediss+sentinel" | "redis+cluster" | "rediss+cluster" => {
                let config = registry_redis::RedisConfig::from_location(location)?;
                let options = config.options.clone();
                managed(registry_redis::RedisBackend::new(config)?, options)
            }
            scheme => Err(self.refuse(scheme)),
        }
    }

    fn refuse(&self, scheme: &str) -> Error {
        if let Some((_, Some(feature))) = KNOWN.iter().find(|(known, _)| *known == scheme) {
            let message = format!(
                "the scheme \"{scheme}\" is not compiled in: enable the feature \"{feature}\" of service-registry"
            );
            return Error::new(ErrorKind::Unsupported, message);
        }
        let mut known: Vec<&str> =
            KNOWN.iter().map(|(known, _)| *known).chain(self.factories.keys().map(String::as_str)).collect();
        known.sort_unstable();
        known.dedup();
        Error::invalid(format!("unknown scheme \"{scheme}\"; known schemes: {}", known.join(", ")))
    }
}

fn managed<B: Backend>(backend: B, options: Options) -> Result<Arc<dyn Registry>> {
    Ok(Arc::new(Managed::new(backend, options)?))
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("schemes", &self.factories.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(url: &str) -> (ErrorKind, String) {
        let error = connect(url).await.unwrap_err();
        (error.kind(), error.to_string())
    }

    #[tokio::test]
    async fn an_unknown_scheme_lists_the_known_ones() {
        let (kind, message) = refused("consul://h").await;
        assert_eq!(kind, ErrorKind::InvalidInput);
        let known = "etcd, etcds, memory, redis, redis+cluster, redis+sentinel, rediss, rediss+cluster, rediss+sentinel, \
                     zk, zks";
        assert_eq!(message, format!("unknown scheme \"consul\"; known schemes: {known}"));
    }

    #[tokio::test]
    async fn a_scheme_is_compiled_in_or_names_its_feature() {
        let compiled = [
            ("etcd", cfg!(feature = "etcd")),
            ("zookeeper", cfg!(feature = "zookeeper")),
            ("redis", cfg!(feature = "redis")),
        ];
        for (scheme, feature) in KNOWN {
            let Some(feature) = feature else { continue };
            // An unknown option is refused by whoever takes the scheme.
            let more = if scheme.ends_with("sentinel") { "&master=m" } else { "" };
            let (kind, message) = refused(&format!("{scheme}://h?colour=red{more}")).await;
            if compiled.contains(&(*feature, true)) {
                assert!(kind == ErrorKind::InvalidInput && message.contains("\"colour\""), "{scheme}: {message}");
            } else {
                assert_eq!(kind, ErrorKind::Unsupported);
                assert!(message.contains(&format!("enable the feature \"{feature}\"")), "{message}");
            }
        }
    }

    #[tokio::test]
    async fn an_unknown_option_lists_the_known_ones() {
        let (kind, message) = refused("memory://a?colour=red").await;
        assert_eq!(kind, ErrorKind::InvalidInput);
        assert!(message.contains("\"colour\"") && message.contains("request_timeout"), "{message}");
    }

    #[tokio::test]
    async fn a_bad_value_states_the_accepted_range() {
        let (kind, message) = refused("memory://a?ttl=1ms").await;
        assert_eq!(kind, ErrorKind::InvalidInput);
        assert!(message.contains("100ms to 1h"), "{message}");
    }

    #[tokio::test]
    async fn a_scheme_of_your_own_goes_first() {
        let connector = Connector::new().with("MEMORY", |_| async { Err(Error::invalid("mine")) });
        assert_eq!(connector.connect("memory://a").await.unwrap_err().to_string(), "mine");
    }
}
