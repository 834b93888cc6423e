//! What a registry on etcd needs to know, from code, a connection string or `serde`.

use std::{
    error::Error as StdError,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use registry_core::{Error, Location, Options, Result};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
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
    pub tls: Option<EtcdTls>,

    /// What is the same for every store. Defaults to [`Options::default`].
    #[serde(default)]
    pub options: Options,
}

/// How TLS is talked.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EtcdTls {
    /// A PEM file with the authorities that may sign the servers' certificates.
    ///
    /// Defaults to none, which trusts those of the operating system.
    pub ca: Option<PathBuf>,

    /// A PEM file with our own certificate, for servers that ask for one; needs [`key`](Self::key). Defaults to none.
    pub cert: Option<PathBuf>,

    /// A PEM file with the private key of [`cert`](Self::cert). Defaults to none.
    pub key: Option<PathBuf>,

    /// The name that the servers' certificates must carry. Defaults to the host of each endpoint.
    pub server_name: Option<String>,
}

impl EtcdConfig {
    /// The names of the options that a connection string may carry beyond [`Options::NAMES`].
    pub const NAMES: &'static [&'static str] = &["ca", "cert", "key", "server_name"];

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
            "etcds" => Some(EtcdTls {
                ca: location.take("ca").map(Into::into),
                cert: location.take("cert").map(Into::into),
                key: location.take("key").map(Into::into),
                server_name: location.take("server_name"),
            }),
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
    pub fn tls(self, tls: EtcdTls) -> Self {
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
        let half = |tls: &EtcdTls| tls.cert.is_some() != tls.key.is_some();
        if self.tls.as_ref().is_some_and(half) {
            return Err(Error::invalid("a client certificate (cert) needs its key, and a key its certificate"));
        }
        Ok(())
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
            Some(tls) => options.with_tls(tls.client_options(self.options.connect_timeout)?),
        })
    }
}

impl EtcdTls {
    /// TLS that trusts the authorities of the operating system.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`ca`](Self::ca).
    #[must_use]
    pub fn ca(self, file: impl Into<PathBuf>) -> Self {
        Self { ca: Some(file.into()), ..self }
    }

    /// Sets [`cert`](Self::cert) and [`key`](Self::key).
    #[must_use]
    pub fn identity(self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { cert: Some(cert.into()), key: Some(key.into()), ..self }
    }

    /// Sets [`server_name`](Self::server_name).
    #[must_use]
    pub fn server_name(self, name: impl Into<String>) -> Self {
        Self { server_name: Some(name.into()), ..self }
    }

    fn client_options(&self, handshake: Duration) -> Result<TlsOptions> {
        // An application may have installed a provider of its own: then that one is used.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // The connect timeout ends before the handshake begins; this one bounds the handshake.
        let mut tls = TlsOptions::new().timeout(handshake);
        tls = match &self.ca {
            None => tls.with_enabled_roots(),
            Some(file) => tls.ca_certificate(Certificate::from_pem(read_certificates("ca", file)?)),
        };
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            tls = tls.identity(Identity::from_pem(read_certificates("cert", cert)?, read_key("key", key)?));
        }
        Ok(match &self.server_name {
            None => tls,
            Some(name) => tls.domain_name(name),
        })
    }

    /// The same for a handshake without the client; [`client_options`](Self::client_options) sees to the provider.
    pub(crate) fn handshake_config(&self) -> Result<ClientConfig> {
        let parse = |option, file| {
            let text = read_certificates(option, file)?;
            Ok(CertificateDer::pem_slice_iter(text.as_bytes()).flatten().collect::<Vec<_>>())
        };
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(match &self.ca {
            None => rustls_native_certs::load_native_certs().certs,
            Some(file) => parse("ca", file)?,
        });
        let builder = ClientConfig::builder().with_root_certificates(roots);
        let mut config = match (&self.cert, &self.key) {
            (Some(cert), Some(file)) => {
                let key = PrivateKeyDer::from_pem_slice(read_key("key", file)?.as_bytes());
                let key = key.map_err(|error| unusable("key", file, error))?;
                let chain = parse("cert", cert)?;
                builder.with_client_auth_cert(chain, key).map_err(|error| unusable("key", file, error))?
            }
            _ => builder.with_no_client_auth(),
        };
        config.alpn_protocols.push(b"h2".to_vec());
        Ok(config)
    }
}

fn unusable(option: &str, file: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::invalid(format!("invalid {option}: cannot use {}", file.display())).with_backend(NAME).with_source(source)
}

/// The text of a PEM file with at least one certificate. The client would pass over those that it cannot read.
fn read_certificates(option: &str, file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).map_err(|error| unusable(option, file, error))?;
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        let certificate = certificate.map_err(|error| unusable(option, file, error))?;
        store.add(certificate).map_err(|error| unusable(option, file, error))?;
    }
    if store.is_empty() {
        return Err(unusable(option, file, "there is no PEM certificate in it"));
    }
    Ok(text)
}

fn read_key(option: &str, file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).map_err(|error| unusable(option, file, error))?;
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| unusable(option, file, error))?;
    Ok(text)
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
        assert_eq!(tls.ca.as_deref(), Some(Path::new("/ca.pem")));
        assert_eq!(tls.server_name.as_deref(), Some("etcd"));
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
    fn serde_takes_what_is_named_and_defaults_the_rest() {
        let json = r#"{"endpoints":["h1:1"],"user":"app","password":"s3cret","tls":{},"options":{"ttl":"3s"}}"#;
        let config: EtcdConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.options.ttl, Duration::from_secs(3));
        assert!(config.tls.is_some() && !format!("{config:?}").contains("s3cret"));
        assert!(serde_json::from_str::<EtcdConfig>(r#"{"endpoints":["h1:1"],"prefx":"x"}"#).is_err());
    }

    #[test]
    fn a_missing_or_empty_pem_file_is_refused_by_name() {
        let tls = EtcdTls::new().ca("/nonexistent/ca.pem");
        let error = EtcdConfig::new(["h1"]).tls(tls).connect_options().map(drop).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
    }
}
