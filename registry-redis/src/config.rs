//! Where Redis is and how to talk to it: typed, or read from a connection string.

use std::{ops::RangeInclusive, time::Duration};

use registry_core::{Error, Location, Options, Result};
use registry_tls::Tls;
use secrecy::SecretString;
use serde::Deserialize;

/// The port of a server that names none, and that of a sentinel.
const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;
const DEFAULT_POLL: Duration = Duration::from_secs(2);
const POLL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60);

/// Where Redis is and how to talk to it.
///
/// # Examples
/// ```
/// use registry_redis::{RedisConfig, RedisTopology};
///
/// let config = RedisConfig::new(["redis-0:6379"]).prefix("services").user("app", "s3cret");
/// assert_eq!(config.endpoints, ["redis-0:6379"]);
/// assert!(!format!("{config:?}").contains("s3cret"));
///
/// let location = "rediss+sentinel://app:s3cret@s-0,s-1/services?master=main&ca=/etc/ssl/redis.pem".parse()?;
/// let config = RedisConfig::from_location(location)?;
/// assert_eq!(config.endpoints, ["s-0:26379", "s-1:26379"]);
/// assert_eq!(config.topology, RedisTopology::Sentinel { master: "main".to_owned() });
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RedisConfig {
    /// The servers as `host:port`, or `host` for port 6379; IPv6 addresses in brackets. At least one.
    ///
    /// Of several standalone servers the first that is a primary is used. With [`RedisTopology::Sentinel`] these are
    /// the sentinels, and the port is 26379 where none is given; with [`RedisTopology::Cluster`] they are the nodes
    /// that are asked first.
    pub endpoints: Vec<String>,

    /// How the servers are arranged. Defaults to [`RedisTopology::Standalone`].
    #[serde(default)]
    pub topology: RedisTopology,

    /// The number of the database, which must be 0 on a Cluster. Defaults to 0.
    #[serde(default)]
    pub database: u32,

    /// What every key starts with: `services` gives keys like `{services/orders}:records`.
    ///
    /// Defaults to the empty prefix: `{orders}:records`.
    #[serde(default)]
    pub prefix: String,

    /// The user to sign in as, which needs a [`password`](Self::password). Defaults to none: the user `default`.
    #[serde(default)]
    pub user: Option<String>,

    /// The password, with or without a [`user`](Self::user). Defaults to none.
    #[serde(default)]
    pub password: Option<SecretString>,

    /// The user to sign in at the sentinels as, which needs a [`sentinel_password`](Self::sentinel_password).
    /// Defaults to none.
    #[serde(default)]
    pub sentinel_user: Option<String>,

    /// The password for the sentinels. Defaults to none: sentinels have users and passwords of their own.
    #[serde(default)]
    pub sentinel_password: Option<SecretString>,

    /// Talk TLS, like this, to servers and sentinels. Defaults to none, which is plain text.
    #[serde(default)]
    pub tls: Option<Tls>,

    /// How often followed services are compared with the store, which bounds how late a change is seen that no message
    /// told of.
    ///
    /// Defaults to 2 s; 100 ms to 1 min. An instance that died is noticed at the end of its ttl, however long this is.
    #[serde(default = "default_poll", deserialize_with = "read_duration")]
    pub poll: Duration,

    /// What is the same for every store. Defaults to [`Options::default`].
    #[serde(default)]
    pub options: Options,
}

/// How the servers are arranged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RedisTopology {
    /// One server, with or without replicas that nobody promotes.
    #[default]
    Standalone,
    /// A primary that sentinels watch over and replace.
    Sentinel {
        /// The name that the sentinels know the primary by.
        master: String,
    },
    /// A Redis Cluster.
    Cluster,
}

const SENTINEL_NAMES: &[&str] = &["master", "sentinel_password", "sentinel_user"];

impl RedisConfig {
    /// The names of the options that a connection string may carry beyond [`Options::NAMES`].
    pub const NAMES: &'static [&'static str] =
        &["ca", "cert", "db", "key", "master", "poll", "sentinel_password", "sentinel_user", "server_name"];

    /// A configuration for these endpoints, with defaults for all else.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            topology: RedisTopology::Standalone,
            database: 0,
            prefix: String::new(),
            user: None,
            password: None,
            sentinel_user: None,
            sentinel_password: None,
            tls: None,
            poll: DEFAULT_POLL,
            options: Options::default(),
        }
    }

    /// The configuration that a connection string spells: `redis://`, `redis+sentinel://`, `redis+cluster://`, or one
    /// of these with `rediss` for TLS.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if there is no host, if an option is
    /// unknown, wrong, or not for this scheme, if the name of the primary is missing, or if a user, certificate or key
    /// stands alone.
    pub fn from_location(mut location: Location) -> Result<Self> {
        let (base, kind) = location.scheme().split_once('+').unwrap_or((location.scheme(), ""));
        let (tls, kind) = match (base, kind) {
            ("redis", kind @ ("" | "sentinel" | "cluster")) => (false, kind.to_owned()),
            ("rediss", kind @ ("" | "sentinel" | "cluster")) => (true, kind.to_owned()),
            _ => {
                return Err(Error::invalid(format!(
                    "the scheme is {}: expected redis, redis+sentinel or redis+cluster, or rediss for TLS",
                    location.scheme()
                )));
            }
        };
        let mut config = Self::new(Vec::<String>::new());
        let mut known = [Options::NAMES, &["db", "poll"]].concat();
        if tls {
            known.extend(Tls::NAMES);
            config.tls = Some(Tls::take_from(&mut location));
        } else {
            refuse(&mut location, Tls::NAMES, "rediss")?;
        }
        if kind == "sentinel" {
            known.extend(SENTINEL_NAMES);
            let master = location.take("master").unwrap_or_default();
            config.topology = RedisTopology::Sentinel { master };
            config.sentinel_user = location.take("sentinel_user");
            config.sentinel_password = location.take("sentinel_password").map(Into::into);
        } else {
            refuse(&mut location, SENTINEL_NAMES, "redis+sentinel")?;
        }
        if kind == "cluster" {
            config.topology = RedisTopology::Cluster;
        }
        config.endpoints = location.hosts().iter().map(|host| host.with_default_port(config.port())).collect();
        config.prefix = location.prefix().to_owned();
        config.user = location.user().map(str::to_owned);
        config.password = location.password().cloned();
        config.database =
            location.take_parsed("db", "a database number", |text| text.parse().ok())?.unwrap_or_default();
        config.poll = location.take_duration("poll")?.unwrap_or(DEFAULT_POLL);
        config.options = Options::take_from(&mut location)?;
        location.finish(&known)?;
        config.validate()?;
        Ok(config)
    }

    /// Sets [`topology`](Self::topology).
    #[must_use]
    pub fn topology(self, topology: RedisTopology) -> Self {
        Self { topology, ..self }
    }

    /// Sets [`database`](Self::database).
    #[must_use]
    pub fn database(self, database: u32) -> Self {
        Self { database, ..self }
    }

    /// Sets [`prefix`](Self::prefix).
    #[must_use]
    pub fn prefix(self, prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..self }
    }

    /// Sets [`user`](Self::user) and [`password`](Self::password).
    #[must_use]
    pub fn user(self, user: impl Into<String>, password: impl Into<SecretString>) -> Self {
        Self { user: Some(user.into()), ..self.password(password) }
    }

    /// Sets [`password`](Self::password).
    #[must_use]
    pub fn password(self, password: impl Into<SecretString>) -> Self {
        Self { password: Some(password.into()), ..self }
    }

    /// Sets [`sentinel_user`](Self::sentinel_user) and [`sentinel_password`](Self::sentinel_password).
    #[must_use]
    pub fn sentinel_user(self, user: impl Into<String>, password: impl Into<SecretString>) -> Self {
        Self { sentinel_user: Some(user.into()), ..self.sentinel_password(password) }
    }

    /// Sets [`sentinel_password`](Self::sentinel_password).
    #[must_use]
    pub fn sentinel_password(self, password: impl Into<SecretString>) -> Self {
        Self { sentinel_password: Some(password.into()), ..self }
    }

    /// Sets [`tls`](Self::tls).
    #[must_use]
    pub fn tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// Sets [`poll`](Self::poll).
    #[must_use]
    pub fn poll(self, poll: Duration) -> Self {
        Self { poll, ..self }
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
        if self.user.is_some() && self.password.is_none() {
            return Err(Error::invalid("a user needs a password"));
        }
        if self.sentinel_user.is_some() && self.sentinel_password.is_none() {
            return Err(Error::invalid("a sentinel_user needs a sentinel_password"));
        }
        if matches!(&self.topology, RedisTopology::Sentinel { master } if master.is_empty()) {
            return Err(Error::invalid("there is no master: expected the name that the sentinels know it by"));
        }
        if self.topology == RedisTopology::Cluster && self.database != 0 {
            return Err(Error::invalid(format!("invalid db {}: a Redis Cluster has database 0 only", self.database)));
        }
        if !POLL.contains(&self.poll) {
            return Err(Error::invalid(format!("invalid poll {:?}: expected 100ms to 1min", self.poll)));
        }
        self.tls.as_ref().map_or(Ok(()), Tls::validate)
    }

    /// The endpoints as host and port.
    pub(crate) fn addresses(&self) -> Result<Vec<(String, u16)>> {
        if self.endpoints.is_empty() {
            return Err(Error::invalid("there is no Redis endpoint: expected at least one host[:port]"));
        }
        let parse = |endpoint: &String| match Location::parse(&format!("redis://{endpoint}")) {
            Ok(location) if location.hosts().len() == 1 && !endpoint.contains(['@', '/', '?']) => {
                let host = &location.hosts()[0];
                Ok((host.name.clone(), host.port.unwrap_or(self.port())))
            }
            _ => Err(Error::invalid(format!("invalid Redis endpoint {endpoint:?}: expected host[:port]"))),
        };
        self.endpoints.iter().map(parse).collect()
    }

    /// The servers in the order of their names, the prefix, and which database of which primary it is.
    pub(crate) fn namespace(&self) -> Result<String> {
        let mut addresses = self.addresses()?;
        addresses.sort_unstable();
        let addresses: Vec<_> = addresses.into_iter().map(|(host, port)| format!("{host}:{port}")).collect();
        let master = match &self.topology {
            RedisTopology::Sentinel { master } => format!("&master={master}"),
            RedisTopology::Standalone | RedisTopology::Cluster => String::new(),
        };
        Ok(format!("{}/{}?db={}{master}", addresses.join(","), self.prefix.trim_matches('/'), self.database))
    }

    fn port(&self) -> u16 {
        if matches!(self.topology, RedisTopology::Sentinel { .. }) { SENTINEL_PORT } else { PORT }
    }
}

/// What a connection string of another scheme may not carry.
fn refuse(location: &mut Location, names: &[&str], scheme: &str) -> Result<()> {
    match names.iter().find(|name| location.take(name).is_some()) {
        Some(name) => Err(Error::invalid(format!("the option {name} needs {scheme}://"))),
        None => Ok(()),
    }
}

fn default_poll() -> Duration {
    DEFAULT_POLL
}

/// As in a connection string, `2s`.
fn read_duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let value: String = text.chars().filter(|c| *c != ' ').collect();
    let mut location = Location::parse(&format!("redis://h?poll={value}")).map_err(serde::de::Error::custom)?;
    location.take_duration("poll").map_err(serde::de::Error::custom).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use registry_core::ErrorKind;
    use secrecy::ExposeSecret;

    use super::*;

    fn parse(url: &str) -> Result<RedisConfig> {
        RedisConfig::from_location(url.parse()?)
    }

    fn refused(url: &str) -> String {
        let error = parse(url).expect_err(url);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
        error.to_string()
    }

    #[test]
    fn a_connection_string_spells_the_whole_configuration() {
        let config = parse(
            "rediss+sentinel://app:p%40ss@h1:1234,[2001:db8::1]/a/b?ca=/ca.pem&cert=/c.pem&key=/k.pem&server_name=r\
             &ttl=7s&db=3&poll=500ms&master=m&sentinel_user=s&sentinel_password=hush",
        )
        .unwrap();
        assert_eq!(config.endpoints, ["h1:1234", "[2001:db8::1]:26379"]);
        assert_eq!((config.prefix.as_str(), config.user.as_deref(), config.database), ("a/b", Some("app"), 3));
        assert_eq!(config.password.as_ref().map(|p| p.expose_secret()), Some("p@ss"));
        assert_eq!(config.sentinel_password.as_ref().map(|p| p.expose_secret()), Some("hush"));
        assert_eq!((config.options.ttl, config.poll), (Duration::from_secs(7), Duration::from_millis(500)));
        assert_eq!(config.topology, RedisTopology::Sentinel { master: "m".to_owned() });
        let tls = config.tls.as_ref().unwrap();
        assert_eq!((tls.ca.clone(), tls.server_name.as_deref()), (Some("/ca.pem".into()), Some("r")));
        let shown = format!("{config:?}");
        assert!(!shown.contains("p@ss") && !shown.contains("hush"), "{shown}");
    }

    #[test]
    fn the_namespace_is_the_servers_in_any_order_the_prefix_and_the_database() {
        let namespace = |url: &str| parse(url).unwrap().namespace().unwrap();
        assert_eq!(namespace("redis://app:s3cret@h2,h1:1/shop?ttl=4s"), "h1:1,h2:6379/shop?db=0");
        assert_eq!(namespace("redis://h1:1,h2/shop"), namespace("redis://h2,h1:1/shop/"));
        assert_eq!(namespace("redis+sentinel://h1/shop?master=m&db=3"), "h1:26379/shop?db=3&master=m");
        let one = namespace("redis+sentinel://h1/shop?master=m");
        for other in
            ["redis+sentinel://h1/shop?master=n", "redis+sentinel://h1/shop?master=m&db=1", "redis://h1:26379/shop"]
        {
            assert_ne!(one, namespace(other));
        }
    }

    #[test]
    fn each_scheme_has_its_topology() {
        for (scheme, topology, tls) in [
            ("redis", RedisTopology::Standalone, false),
            ("rediss", RedisTopology::Standalone, true),
            ("redis+cluster", RedisTopology::Cluster, false),
            ("rediss+cluster", RedisTopology::Cluster, true),
        ] {
            let config = parse(&format!("{scheme}://h1")).unwrap();
            assert_eq!(
                (config.topology, config.tls.is_some(), config.endpoints),
                (topology, tls, vec!["h1:6379".to_owned()])
            );
        }
        let config = parse("redis://:pw@h1").unwrap();
        assert!(config.user.is_none() && config.password.is_some(), "a password needs no user");
    }

    #[test]
    fn what_is_half_set_or_out_of_place_is_refused() {
        assert!(refused("redis:///p").contains("no Redis endpoint"));
        assert!(refused("redis://app@h1").contains("needs a password"));
        assert!(refused("rediss://h1?cert=/c.pem").contains("needs its key"));
        assert!(refused("redis://h1?ca=/ca.pem").contains("rediss://"));
        assert!(refused("redis://h1?master=m").contains("redis+sentinel://"));
        assert!(refused("redis+sentinel://h1").contains("no master"));
        assert!(refused("redis+cluster://h1?db=1").contains("database 0"));
        assert!(refused("redis://h1?db=one").contains("database number"));
        assert!(refused("redis://h1?poll=1ms").contains("100ms to 1min"));
        assert!(refused("redis://h1?tt=3s").contains("ttl"));
        assert!(refused("zk://h1").contains("redis"));
        assert!(refused("redis+ring://h1").contains("redis+cluster"));
    }

    #[test]
    fn endpoints_of_a_typed_configuration_are_checked_too() {
        let addresses = RedisConfig::new(["h1", "[::1]:7"]).addresses().unwrap();
        assert_eq!(addresses, [("h1".to_owned(), 6379), ("::1".to_owned(), 7)]);
        for bad in ["", "http://h1:2379", "h1:0", "a,b", "u@h", "h/p", "h?x=y", "h?", "h/"] {
            assert!(RedisConfig::new([bad]).addresses().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn serde_takes_what_is_named_and_defaults_the_rest() {
        let json = r#"{"endpoints":["h1:1"],"user":"app","password":"s3cret","tls":{},"options":{"ttl":"3s"},
            "topology":{"sentinel":{"master":"m"}},"poll":"1s 500ms"}"#;
        let config: RedisConfig = serde_json::from_str(json).unwrap();
        assert_eq!((config.options.ttl, config.poll), (Duration::from_secs(3), Duration::from_millis(1500)));
        assert!(config.tls.is_some() && !format!("{config:?}").contains("s3cret"));
        let config: RedisConfig = serde_json::from_str(r#"{"endpoints":["h1"],"topology":"cluster"}"#).unwrap();
        assert_eq!((config.topology, config.poll), (RedisTopology::Cluster, DEFAULT_POLL));
        assert!(serde_json::from_str::<RedisConfig>(r#"{"endpoints":["h1:1"],"prefx":"x"}"#).is_err());
    }

    #[test]
    fn a_missing_or_empty_pem_file_is_refused_by_name() {
        let error = Tls::new().ca("/nonexistent/ca.pem").client_config().map(drop).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
    }
}
