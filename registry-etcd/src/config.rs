//! What a registry on etcd needs to know, from code, a connection string or `serde`.

use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use registry_core::{Error, Location, Options, Result};
use registry_tls::{Tls, install_provider};
use secrecy::SecretString;
use serde::Deserialize;

use crate::error::NAME;

/// The port of an endpoint that names none.
const PORT: u16 = 2379;

/// Where etcd is and how to talk to it.
///
/// # Examples
/// ```
/// use registry_etcd::EtcdConfig;
///
/// let config = EtcdConfig::new(["etcd-0:2379", "etcd-1:2379"]).prefix("services").user("app", "s3cret");
/// assert_eq!(config.endpoints, ["etcd-0:2379", "etcd-1:2379"]);
/// assert!(!format!("{config:?}").contains("s3cret"));
///
/// let location = "etcds://app:s3cret@etcd-0,etcd-1/services?ca=/etc/ssl/etcd.pem&ttl=10s".parse()?;
/// let config = EtcdConfig::from_location(location)?;
/// assert_eq!(config.endpoints, ["etcd-0:2379", "etcd-1:2379"]);
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct EtcdConfig {
    /// The members as `host:port`, or `host` for port 2379; IPv6 addresses in brackets. At least one.
    pub endpoints: Vec<String>,

    /// What every key starts with: `services` gives keys like `/services/orders/providers/7f3a`.
    ///
    /// Defaults to the empty prefix: `/orders/providers/7f3a`.
    #[serde(default)]
    pub prefix: String,

    /// The user to sign in as, which needs a [`password`](Self::password). Defaults to none.
    #[serde(default)]
    pub user: Option<String>,

    /// The user's password. Defaults to none.
    #[serde(default)]
    pub password: Option<SecretString>,

    /// Talk TLS, like this. Defaults to none, which is plain text.
    #[serde(default)]
    pub tls: Option<Tls>,

    /// What is the same for every store. Defaults to [`Options::default`].
    #[serde(default)]
    pub options: Options,
}

impl EtcdConfig {
    /// The names of the options that a connection string may carry beyond [`Options::NAMES`].
    pub const NAMES: &'static [&'static str] = Tls::NAMES;

    /// A configuration for these endpoints, with defaults for all else.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            prefix: String::new(),
            user: None,
            password: None,
            tls: None,
            options: Options::default(),
        }
    }

    /// The configuration that an `etcd://` or, for TLS, `etcds://` connection string spells.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if there is no host, if an option is
    /// unknown, wrong or only for TLS, or if a user, password, certificate or key stands alone.
    pub fn from_location(mut location: Location) -> Result<Self> {
        let tls = match location.scheme() {
            "etcd" => None,
            "etcds" => Some(Tls::take_from(&mut location)),
            other => return Err(Error::invalid(format!("the scheme is {other}: expected etcd or etcds"))),
        };
        if tls.is_none() && Self::NAMES.iter().any(|name| location.take(name).is_some()) {
            return Err(Error::invalid(format!("the options {} need etcds://", Self::NAMES.join(", "))));
        }
        let config = Self {
            endpoints: location.hosts().iter().map(|host| host.with_default_port(PORT)).collect(),
            prefix: location.prefix().to_owned(),
            user: location.user().map(str::to_owned),
            password: location.password().cloned(),
            options: Options::take_from(&mut location)?,
            tls,
        };
        location.finish(&[Options::NAMES, if config.tls.is_some() { Self::NAMES } else { &[] }].concat())?;
        config.validate()?;
        Ok(config)
    }

    /// Sets [`prefix`](Self::prefix).
    #[must_use]
    pub fn prefix(self, prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..self }
    }

    /// Sets [`user`](Self::user) and [`password`](Self::password).
    #[must_use]
    pub fn user(self, user: impl Into<String>, password: impl Into<SecretString>) -> Self {
        Self { user: Some(user.into()), password: Some(password.into()), ..self }
    }

    /// Sets [`tls`](Self::tls).
    #[must_use]
    pub fn tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// Sets [`options`](Self::options).
    #[must_use]
    pub fn options(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// Checks all that can be checked without reading a file or asking a server.
    pub(crate) fn validate(&self) -> Result<()> {
        self.options.validate()?;
        self.addresses()?;
        if self.user.is_some() != self.password.is_some() {
            return Err(Error::invalid("a user needs a password, and a password a user"));
        }
        self.tls.as_ref().map_or(Ok(()), Tls::validate)
    }

    /// The endpoints as `host:port`.
    pub(crate) fn addresses(&self) -> Result<Vec<String>> {
        if self.endpoints.is_empty() {
            return Err(Error::invalid("there is no etcd endpoint: expected at least one host[:port]"));
        }
        let parse = |endpoint: &String| match Location::parse(&format!("etcd://{endpoint}")) {
            Ok(location) if location.hosts().len() == 1 && !endpoint.contains(['@', '/', '?']) => {
                Ok(location.hosts()[0].with_default_port(PORT))
            }
            _ => Err(Error::invalid(format!("invalid etcd endpoint {endpoint:?}: expected host[:port]"))),
        };
        self.endpoints.iter().map(parse).collect()
    }

    /// The servers in the order of their names, and the prefix.
    pub(crate) fn namespace(&self) -> Result<String> {
        let mut addresses = self.addresses()?;
        addresses.sort_unstable();
        Ok(format!("{}/{}", addresses.join(","), self.prefix.trim_matches('/')))
    }

    /// How the client connects. The user is not in it: with one, connecting would fail where an endpoint is down.
    pub(crate) fn connect_options(&self) -> Result<ConnectOptions> {
        let options = ConnectOptions::new()
            .with_connect_timeout(self.options.connect_timeout)
            .with_timeout(self.options.request_timeout)
            // etcd takes pings more often than every 5 s, or on idle connections, for an attack.
            .with_keep_alive(Duration::from_secs(10), Duration::from_secs(3))
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(Duration::from_secs(30))
            // A stream on a member without a leader ends, instead of being silent.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        Ok(match &self.tls {
            None => options,
            Some(tls) => options
                .with_tls(tls_options(tls, self.options.connect_timeout).map_err(|error| error.with_backend(NAME))?),
        })
    }
}

/// The same as the client takes it. The connect timeout ends before the handshake begins: `handshake` bounds that.
fn tls_options(tls: &Tls, handshake: Duration) -> Result<TlsOptions> {
    install_provider();
    let mut options = TlsOptions::new().timeout(handshake);
    options = match tls.authorities_pem()? {
        None => options.with_enabled_roots(),
        Some(text) => options.ca_certificate(Certificate::from_pem(text)),
    };
    if let Some((cert, key)) = tls.identity_pem()? {
        options = options.identity(Identity::from_pem(cert, key));
    }
    Ok(match &tls.server_name {
        None => options,
        Some(name) => options.domain_name(name),
    })
}

#[cfg(test)]
mod tests {
    use registry_core::ErrorKind;
    use secrecy::ExposeSecret;

    use super::*;

    fn parse(url: &str) -> Result<EtcdConfig> {
        EtcdConfig::from_location(url.parse()?)
    }

    fn refused(url: &str) -> String {
        let error = parse(url).expect_err(url);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
        error.to_string()
    }

    #[test]
    fn a_connection_string_spells_the_whole_configuration() {
        let config = parse(
            "etcds://app:p%40ss@h1:1234,[2001:db8::1]/a/b?ca=/ca.pem&cert=/c.pem&key=/k.pem&server_name=etcd&ttl=7s",
        )
        .unwrap();
        assert_eq!(config.endpoints, ["h1:1234", "[2001:db8::1]:2379"]);
        assert_eq!((config.prefix.as_str(), config.user.as_deref()), ("a/b", Some("app")));
        assert_eq!(config.password.as_ref().map(|p| p.expose_secret()), Some("p@ss"));
        assert_eq!(config.options.ttl, Duration::from_secs(7));
        let tls = config.tls.as_ref().unwrap();
        assert_eq!(*tls, Tls::new().ca("/ca.pem").identity("/c.pem", "/k.pem").server_name("etcd"));
        assert!(!format!("{config:?}").contains("p@ss"));
        assert!(parse("etcd://h1").unwrap().tls.is_none() && parse("etcds://h1").unwrap().tls.is_some());
    }

    #[test]
    fn what_is_half_set_or_out_of_place_is_refused() {
        assert!(refused("etcd:///p").contains("no etcd endpoint"));
        assert!(refused("etcd://app@h1").contains("needs a password"));
        assert!(refused("etcds://h1?cert=/c.pem").contains("needs its key"));
        assert!(refused("etcd://h1?ca=/ca.pem").contains("etcds://"));
        assert!(refused("etcd://h1?tt=3s").contains("ttl"));
        assert!(refused("zk://h1").contains("etcd"));
    }

    #[test]
    fn endpoints_of_a_typed_configuration_are_checked_too() {
        assert_eq!(EtcdConfig::new(["h1", "[::1]:7"]).addresses().unwrap(), ["h1:2379", "[::1]:7"]);
        for bad in ["", "http://h1:2379", "h1:0", "a,b", "u@h", "h/p", "h?x=y", "h?", "h/"] {
            assert!(EtcdConfig::new([bad]).addresses().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_namespace_is_the_servers_in_any_order_and_the_prefix() {
        let namespace = |url: &str| parse(url).unwrap().namespace().unwrap();
        assert_eq!(namespace("etcd://app:s3cret@h2,h1:1/shop?ttl=3s"), "h1:1,h2:2379/shop");
        assert_eq!(namespace("etcd://h1:1,h2/shop"), namespace("etcd://h2,h1:1/shop/"));
        assert_ne!(namespace("etcd://h1/shop"), namespace("etcd://h1/shop2"));
    }

    #[test]
    fn serde_takes_what_is_named_and_defaults_the_rest() {
        let json = r#"{"endpoints":["h1:1"],"user":"app","password":"s3cret","tls":{},"options":{"ttl":"3s"}}"#;
        let config: EtcdConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.options.ttl, Duration::from_secs(3));
        assert!(config.tls.is_some() && !format!("{config:?}").contains("s3cret"));
        assert!(serde_json::from_str::<EtcdConfig>(r#"{"endpoints":["h1:1"],"prefx":"x"}"#).is_err());
    }

    #[test]
    fn a_missing_or_empty_pem_file_is_refused_by_name() {
        let tls = Tls::new().ca("/nonexistent/ca.pem");
        let error = EtcdConfig::new(["h1"]).tls(tls).connect_options().map(drop).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
    }
}
