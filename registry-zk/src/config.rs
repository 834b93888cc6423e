//! What a registry on ZooKeeper needs to know, from code, a connection string or `serde`.

use pem::Pem;
use registry_core::{Error, Location, Options, Result};
use registry_tls::{Tls, install_provider};
use rustls::{RootCertStore, pki_types::ServerName};
use secrecy::SecretString;
use serde::Deserialize;
use zookeeper_client::TlsOptions;

use crate::{acl::ZooKeeperAcl, error::NAME};

/// The port of an endpoint that names none: ZooKeeper's own.
const PORT: u16 = 2181;
/// The same with TLS. ZooKeeper has no port of its own for it; this is the one that its documentation uses.
const TLS_PORT: u16 = 2281;

/// Where ZooKeeper is and how to talk to it.
///
/// # Examples
/// ```
/// use registry_zk::ZooKeeperConfig;
///
/// let config = ZooKeeperConfig::new(["zk-0:2181", "zk-1:2181"]).prefix("services").user("app", "s3cret");
/// assert_eq!(config.endpoints, ["zk-0:2181", "zk-1:2181"]);
/// assert!(!format!("{config:?}").contains("s3cret"));
///
/// let location = "zks://app:s3cret@zk-0,zk-1/services?ca=/etc/ssl/zk.pem&acl=creator-all&ttl=10s".parse()?;
/// let config = ZooKeeperConfig::from_location(location)?;
/// assert_eq!(config.endpoints, ["zk-0:2281", "zk-1:2281"]);
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ZooKeeperConfig {
    /// The servers as `host:port`, or `host` for port 2181, with TLS 2281; IPv6 addresses in brackets. At least one.
    pub endpoints: Vec<String>,

    /// The node that all others lie under: `services` gives paths like `/services/orders/providers/7f3a`. It may have
    /// several segments, and is made if it does not exist.
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

    /// How the user signs in. Defaults to [`ZooKeeperAuth::Digest`].
    #[serde(default)]
    pub auth: ZooKeeperAuth,

    /// Who may do what with the nodes that we make. Defaults to [`ZooKeeperAcl::Open`].
    #[serde(default)]
    pub acl: ZooKeeperAcl,

    /// Talk TLS, like this; without a [`server_name`](Tls::server_name), for the client expects the endpoint's host. Defaults
    /// to none, which is plain text.
    #[serde(default)]
    pub tls: Option<Tls>,

    /// What is the same for every store. Defaults to [`Options::default`].
    #[serde(default)]
    pub options: Options,
}

/// How a user signs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ZooKeeperAuth {
    /// The scheme `digest`: an identity is its user and password. A server takes any, so a wrong password shows only
    /// where a node's access control list asks for another.
    #[default]
    Digest,
    /// SASL with DIGEST-MD5: the server knows the user, and refuses a wrong password.
    ///
    /// ZooKeeper 3.8 itself lets a name that it does not know in with the password of the user before, under that
    /// unknown name: grant rights to names, never to whoever has signed in.
    Sasl,
}

impl ZooKeeperConfig {
    /// The names of the options that a connection string may carry beyond [`Options::NAMES`]: `ca`, `cert` and `key`
    /// as in [`Tls`], for `zks://` only, `auth` (`digest` or `sasl`) and `acl` (as [`ZooKeeperAcl`] parses it).
    pub const NAMES: &'static [&'static str] = &["acl", "auth", "ca", "cert", "key"];

    const TLS_NAMES: &'static [&'static str] = &["ca", "cert", "key"];
    const PLAIN_NAMES: &'static [&'static str] = &["acl", "auth"];

    /// A configuration for these endpoints, with defaults for all else.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            prefix: String::new(),
            user: None,
            password: None,
            auth: ZooKeeperAuth::default(),
            acl: ZooKeeperAcl::default(),
            tls: None,
            options: Options::default(),
        }
    }

    /// The configuration that a `zk://` or, for TLS, `zks://` connection string spells.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if there is no host, if an option is
    /// unknown, wrong or only for TLS, or if a user, password, certificate or key stands alone.
    pub fn from_location(mut location: Location) -> Result<Self> {
        let tls = match location.scheme() {
            "zk" => None,
            "zks" => Some(Tls::take_from(&mut location)),
            other => return Err(Error::invalid(format!("the scheme is {other}: expected zk or zks"))),
        };
        if tls.is_none() && Self::TLS_NAMES.iter().any(|name| location.take(name).is_some()) {
            return Err(Error::invalid(format!("the options {} need zks://", Self::TLS_NAMES.join(", "))));
        }
        let auth = location.take_parsed("auth", "digest or sasl", |text| match text {
            "digest" => Some(ZooKeeperAuth::Digest),
            "sasl" => Some(ZooKeeperAuth::Sasl),
            _ => None,
        })?;
        let port = default_port(tls.is_some());
        let config = Self {
            endpoints: location.hosts().iter().map(|host| host.with_default_port(port)).collect(),
            prefix: location.prefix().to_owned(),
            user: location.user().map(str::to_owned),
            password: location.password().cloned(),
            auth: auth.unwrap_or_default(),
            acl: location.take("acl").map_or(Ok(ZooKeeperAcl::default()), |text| text.parse())?,
            options: Options::take_from(&mut location)?,
            tls,
        };
        let names = if config.tls.is_some() { Self::NAMES } else { Self::PLAIN_NAMES };
        location.finish(&[Options::NAMES, names].concat())?;
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

    /// Sets [`auth`](Self::auth).
    #[must_use]
    pub fn auth(self, auth: ZooKeeperAuth) -> Self {
        Self { auth, ..self }
    }

    /// Sets [`acl`](Self::acl).
    #[must_use]
    pub fn acl(self, acl: ZooKeeperAcl) -> Self {
        Self { acl, ..self }
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
        self.acl.to_list()?;
        self.check_prefix()?;
        if self.user.is_some() != self.password.is_some() {
            return Err(Error::invalid("a user needs a password, and a password a user"));
        }
        let certified = self.tls.as_ref().is_some_and(|tls| tls.cert.is_some());
        self.tls.as_ref().map_or(Ok(()), Tls::validate)?;
        if self.tls.as_ref().is_some_and(|tls| tls.server_name.is_some()) {
            return Err(Error::invalid("server_name is not for ZooKeeper: its client expects the endpoint's host"));
        }
        if self.auth == ZooKeeperAuth::Sasl && self.user.is_none() {
            return Err(Error::invalid("auth=sasl needs a user and a password"));
        }
        if self.acl == ZooKeeperAcl::CreatorAll && self.user.is_none() && !certified {
            return Err(Error::invalid("acl=creator-all needs a user or a client certificate: a creator with a name"));
        }
        Ok(())
    }

    /// The endpoints as `host:port`.
    pub(crate) fn addresses(&self) -> Result<Vec<String>> {
        if self.endpoints.is_empty() {
            return Err(Error::invalid("there is no ZooKeeper endpoint: expected at least one host[:port]"));
        }
        let bad = |endpoint: &String| {
            Error::invalid(format!("invalid ZooKeeper endpoint {endpoint:?}: expected host[:port]"))
        };
        let parse = |endpoint: &String| match Location::parse(&format!("zk://{endpoint}")) {
            Ok(location) if location.hosts().len() == 1 && !endpoint.contains(['@', '/', '?']) => {
                let host = &location.hosts()[0];
                // The client panics on a name that no certificate can carry.
                if self.tls.is_some() && ServerName::try_from(host.name.as_str()).is_err() {
                    return Err(bad(endpoint));
                }
                Ok(host.with_default_port(default_port(self.tls.is_some())))
            }
            _ => Err(bad(endpoint)),
        };
        self.endpoints.iter().map(parse).collect()
    }

    /// The servers in the order of their names, and the prefix.
    pub(crate) fn namespace(&self) -> Result<String> {
        let mut addresses = self.addresses()?;
        addresses.sort_unstable();
        Ok(format!("{}/{}", addresses.join(","), self.prefix.trim_matches('/')))
    }

    /// The prefix is spelled by its user, and ZooKeeper does not take everything.
    fn check_prefix(&self) -> Result<()> {
        let refused = |c: char| {
            matches!(u32::from(c), 0..=0x1f | 0x7f..=0x9f | 0xd800..=0xf8ff | 0xfff0..=0xffff) || u32::from(c) > 0xffff
        };
        let prefix = self.prefix.trim_matches('/');
        let bad = |why: String| Err(Error::invalid(format!("invalid prefix {prefix:?}: {why}")));
        if let Some(c) = prefix.chars().find(|c| refused(*c)) {
            return bad(format!("ZooKeeper does not take the character {c:?}"));
        }
        if prefix.is_empty() {
            return Ok(());
        }
        match prefix.split('/').find(|segment| matches!(*segment, "" | "." | "..")) {
            Some(segment) => bad(format!("ZooKeeper does not take the segment {segment:?}")),
            None => Ok(()),
        }
    }
}

fn default_port(tls: bool) -> u16 {
    if tls { TLS_PORT } else { PORT }
}

/// The same as the client takes it.
pub(crate) fn tls_options(tls: &Tls) -> Result<TlsOptions> {
    install_provider();
    let authorities = tls.authorities_pem()?.map_or_else(native_authorities, Ok)?;
    let refused = |error| Error::invalid("invalid tls").with_backend(NAME).with_source(error);
    let options = TlsOptions::new().with_pem_ca(&authorities).map_err(refused)?;
    match tls.identity_pem()? {
        Some((cert, key)) => options.with_pem_identity(&cert, &key).map_err(refused),
        None => Ok(options),
    }
}

/// The authorities of the operating system, in the only form that the client takes.
fn native_authorities() -> Result<String> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    let usable = found.certs.into_iter().filter(|certificate| store.add(certificate.clone()).is_ok());
    let usable: Vec<_> = usable.map(|certificate| Pem::new("CERTIFICATE", &*certificate)).collect();
    if usable.is_empty() {
        let why = "the operating system has no certificate authorities: name a file with the option ca";
        return Err(Error::invalid(why).with_backend(NAME));
    }
    Ok(pem::encode_many(&usable))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use registry_core::ErrorKind;
    use secrecy::ExposeSecret;

    use super::*;

    fn parse(url: &str) -> Result<ZooKeeperConfig> {
        ZooKeeperConfig::from_location(url.parse()?)
    }

    fn refused(url: &str) -> String {
        let error = parse(url).expect_err(url);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
        error.to_string()
    }

    #[test]
    fn a_connection_string_spells_the_whole_configuration() {
        let config = parse(
            "zks://app:p%40ss@h1:1234,[2001:db8::1]/a/b?ca=/ca.pem&cert=/c.pem&key=/k.pem&auth=sasl&acl=creator-all&ttl=7s",
        )
        .unwrap();
        assert_eq!(config.endpoints, ["h1:1234", "[2001:db8::1]:2281"]);
        assert_eq!((config.prefix.as_str(), config.user.as_deref()), ("a/b", Some("app")));
        assert_eq!(config.password.as_ref().map(|p| p.expose_secret()), Some("p@ss"));
        assert_eq!((config.auth, &config.acl), (ZooKeeperAuth::Sasl, &ZooKeeperAcl::CreatorAll));
        assert_eq!(config.options.ttl, Duration::from_secs(7));
        let tls = config.tls.as_ref().unwrap();
        assert_eq!(*tls, Tls::new().ca("/ca.pem").identity("/c.pem", "/k.pem"));
        assert!(!format!("{config:?}").contains("p@ss"));
        assert!(parse("zk://h1").unwrap().tls.is_none() && parse("zks://h1").unwrap().tls.is_some());
        assert_eq!(parse("zk://h1").unwrap().endpoints, ["h1:2181"]);
        let acl = parse("zk://h1?acl=sasl:app:cdrwa,world:anyone:r").unwrap().acl;
        assert_eq!(acl, ZooKeeperAcl::Explicit(vec!["sasl:app:cdrwa".into(), "world:anyone:r".into()]));
    }

    #[test]
    fn what_is_half_set_or_out_of_place_is_refused() {
        assert!(refused("zk:///p").contains("no ZooKeeper endpoint"));
        assert!(refused("zk://app@h1").contains("needs a password"));
        assert!(refused("zks://h1?cert=/c.pem").contains("needs its key"));
        assert!(refused("zk://h1?ca=/ca.pem").contains("zks://"));
        assert!(refused("zks://h1?server_name=h2").contains("server_name"));
        assert!(refused("zk://h1?tt=3s").contains("ttl"));
        assert!(refused("zk://h1?auth=kerberos").contains("digest or sasl"));
        assert!(refused("zk://h1?auth=sasl").contains("needs a user"));
        assert!(refused("zk://h1?acl=creator-all").contains("needs a user"));
        assert!(refused("zk://h1?acl=nobody").contains("creator-all"));
        assert!(refused("etcd://h1").contains("zk"));
    }

    #[test]
    fn a_prefix_that_zookeeper_does_not_take_is_refused() {
        for prefix in ["a/../b", "./a", "a//b", "a\u{80}", "\u{e000}", "\u{fffd}", "\u{1f600}"] {
            let error = ZooKeeperConfig::new(["h1"]).prefix(prefix).validate().expect_err(prefix);
            assert!(error.to_string().contains("ZooKeeper does not take"), "{error}");
        }
        for prefix in ["", "/", "/a/b/", "a.b/…", "ä"] {
            ZooKeeperConfig::new(["h1"]).prefix(prefix).validate().unwrap();
        }
    }

    #[test]
    fn the_namespace_is_the_servers_in_any_order_and_the_prefix() {
        let namespace = |url: &str| parse(url).unwrap().namespace().unwrap();
        assert_eq!(namespace("zk://app:s3cret@h2,h1:1/shop?ttl=4s"), "h1:1,h2:2181/shop");
        assert_eq!(namespace("zk://h1:1,h2/shop"), namespace("zk://h2,h1:1/shop/"));
        assert_ne!(namespace("zk://h1/shop"), namespace("zk://h1/shop2"));
    }

    #[test]
    fn endpoints_of_a_typed_configuration_are_checked_too() {
        assert_eq!(ZooKeeperConfig::new(["h1", "[::1]:7"]).addresses().unwrap(), ["h1:2181", "[::1]:7"]);
        for bad in ["", "http://h1:2181", "h1:0", "a,b", "u@h", "h/p", "h?x=y", "h?", "h/"] {
            assert!(ZooKeeperConfig::new([bad]).addresses().is_err(), "{bad:?}");
        }
        let tls = |endpoint: &str| ZooKeeperConfig::new([endpoint]).tls(Tls::new()).addresses();
        assert_eq!(tls("[::1]").unwrap(), ["[::1]:2281"]);
        assert!(tls(&"x".repeat(64)).is_err());
    }

    #[test]
    fn serde_takes_what_is_named_and_defaults_the_rest() {
        let json = r#"{"endpoints":["h1:1"],"user":"app","password":"s3cret","tls":{},"options":{"ttl":"3s"},
            "auth":"sasl","acl":{"explicit":["world:anyone:r"]}}"#;
        let config: ZooKeeperConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.options.ttl, Duration::from_secs(3));
        assert_eq!((config.auth, config.acl.to_list().is_ok()), (ZooKeeperAuth::Sasl, true));
        assert!(config.tls.is_some() && !format!("{config:?}").contains("s3cret"));
        let config: ZooKeeperConfig = serde_json::from_str(r#"{"endpoints":["h1"],"acl":"creator-all"}"#).unwrap();
        assert_eq!(config.acl, ZooKeeperAcl::CreatorAll);
        assert!(serde_json::from_str::<ZooKeeperConfig>(r#"{"endpoints":["h1:1"],"prefx":"x"}"#).is_err());
    }

    #[test]
    fn a_missing_or_empty_pem_file_is_refused_by_name() {
        let error = tls_options(&Tls::new().ca("/nonexistent/ca.pem")).map(drop).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
    }
}
