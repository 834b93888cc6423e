//! What is registered: one running copy of a service and where it can be called.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    ops::{Deref, DerefMut},
    str::FromStr,
    sync::Arc,
    time::SystemTime,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, InstanceId, Result, ServiceName, advertise};

/// The weight of an instance that does not say otherwise.
pub const DEFAULT_WEIGHT: u32 = 100;

/// Whether an instance takes traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Status {
    /// Registered, but not ready for traffic yet.
    Starting,
    /// Takes traffic.
    #[default]
    Up,
    /// Finishes what it has and takes nothing new: it is about to leave.
    Draining,
    /// Takes no traffic.
    Down,
}

impl Status {
    /// The status as the lower-case word that records spell.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Up => "up",
            Self::Draining => "draining",
            Self::Down => "down",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Status {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Starting, Self::Up, Self::Draining, Self::Down]
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| Error::invalid(format!("invalid status {text:?}: expected starting, up, draining or down")))
    }
}

/// Where an instance can be called: `scheme://host:port`, IPv6 in brackets.
///
/// # Examples
/// ```
/// use registry_core::Endpoint;
///
/// let endpoint: Endpoint = "grpc://[2001:db8::1]:50051".parse()?;
/// assert_eq!((endpoint.scheme(), endpoint.host(), endpoint.port()), ("grpc", "2001:db8::1", 50051));
/// assert_eq!(endpoint.to_string(), "grpc://[2001:db8::1]:50051");
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// The text form; the parts are ranges of it.
    text: Box<str>,
    scheme_end: u8,
    port: u16,
}

impl Endpoint {
    /// Puts an endpoint together from its parts.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) as for parsing.
    pub fn new(scheme: &str, host: &str, port: u16) -> Result<Self> {
        if host.contains(':') && !host.starts_with('[') {
            format!("{scheme}://[{host}]:{port}").parse()
        } else {
            format!("{scheme}://{host}:{port}").parse()
        }
    }

    /// The protocol, such as `http` or `grpc`.
    #[must_use]
    pub fn scheme(&self) -> &str {
        &self.text[..usize::from(self.scheme_end)]
    }

    /// The host name or address, without the brackets of an IPv6 address.
    #[must_use]
    pub fn host(&self) -> &str {
        self.authority().rsplit_once(':').map_or("", |(host, _)| host).trim_start_matches('[').trim_end_matches(']')
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port`, with the brackets of an IPv6 address: what a connect call takes.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.text[usize::from(self.scheme_end) + 3..]
    }

    /// The whole endpoint as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::invalid(format!("invalid endpoint {text:?}: {why}; expected scheme://host:port"));
        let (scheme, authority) = text.split_once("://").ok_or_else(|| bad("there is no scheme"))?;
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        if scheme.is_empty()
            || scheme.len() > 32
            || !scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            || !scheme.chars().all(named)
        {
            return Err(bad("the scheme is not letters, digits, '+', '-' or '.'"));
        }
        let (host, port) = authority.rsplit_once(':').ok_or_else(|| bad("there is no port"))?;
        check_host(host).map_err(|why| bad(&why))?;
        let port: u16 = port
            .parse()
            .ok()
            .filter(|&port| port != 0)
            .ok_or_else(|| bad("the port is not a number from 1 to 65535"))?;
        // The port may have been spelled with leading zeros.
        let text = if authority.ends_with(&format!(":{port}")) {
            text.into()
        } else {
            format!("{scheme}://{host}:{port}").into()
        };
        Ok(Self { scheme_end: scheme.len() as u8, port, text })
    }
}

/// Whether `host` is a name, an IPv4 address or an IPv6 address in brackets.
pub(crate) fn check_host(host: &str) -> Result<(), String> {
    if let Some(inner) = host.strip_prefix('[') {
        let address = inner.strip_suffix(']').ok_or("the bracket of the IPv6 address is not closed")?;
        let (address, zone) = address.split_once('%').unwrap_or((address, "0"));
        if zone.is_empty() || !zone.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')) {
            return Err(format!("{zone:?} is not a zone of an IPv6 address"));
        }
        return address
            .parse::<std::net::Ipv6Addr>()
            .map(drop)
            .map_err(|_| format!("{inner:?} is not an IPv6 address"));
    }
    if host.is_empty() {
        return Err("the host is empty".to_owned());
    }
    if host.contains(':') {
        return Err("an IPv6 address needs brackets".to_owned());
    }
    if host.len() > 253 || !host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')) {
        return Err(format!("{host:?} is not a host name"));
    }
    Ok(())
}

impl AsRef<str> for Endpoint {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Borrowed where the format can: a list of ten thousand has as many.
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The free labels of an instance: a map, sorted by key. A clone shares them until one of the two is changed, and so do
/// the instances of a reader's view that have the same.
///
/// # Examples
/// ```
/// use registry_core::Instance;
///
/// let mut instance = Instance::builder("orders", "7f3a").metadata("commit", "d34db33f").build()?;
/// let before = instance.clone();
/// instance.metadata.insert("canary".to_owned(), "v2".to_owned());
/// assert_eq!(instance.metadata["commit"], before.metadata["commit"]);
/// assert_eq!((instance.metadata.len(), before.metadata.len()), (2, 1));
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Metadata(Arc<BTreeMap<String, String>>);

impl Deref for Metadata {
    type Target = BTreeMap<String, String>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Metadata {
    fn deref_mut(&mut self) -> &mut Self::Target {
        Arc::make_mut(&mut self.0)
    }
}

impl From<BTreeMap<String, String>> for Metadata {
    fn from(labels: BTreeMap<String, String>) -> Self {
        Self(Arc::new(labels))
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// One running copy of a service.
///
/// Fields of a stored record that this version does not know survive a read, a change and a register.
///
/// # Examples
/// ```
/// use registry_core::{Instance, Status};
///
/// let instance = Instance::builder("orders", "7f3a")
///     .endpoint("http://10.0.0.5:8080")
///     .zone("eu-1a")
///     .metadata("commit", "d34db33f")
///     .build()?;
/// assert_eq!(instance.weight, 100);
/// assert_eq!(instance.status, Status::Up);
/// assert!(instance.is_available());
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Instance {
    /// Unique within the service.
    pub id: InstanceId,
    /// The group that this instance belongs to.
    pub service: ServiceName,
    /// Where it can be called, in the order of preference. May be empty.
    pub endpoints: Vec<Endpoint>,
    /// The version of the software, free text.
    pub version: Option<String>,
    /// Where it runs, for readers that prefer what is near.
    pub zone: Option<String>,
    /// Its share of the traffic, relative to the others. Defaults to 100; 0 means drained.
    pub weight: u32,
    /// Whether it takes traffic. Defaults to [`Status::Up`].
    pub status: Status,
    /// Free labels.
    pub metadata: Metadata,
    /// When it was first registered, by the clock of its own machine, in whole milliseconds. The registry sets it at
    /// the first `register`; a registration that comes back after an outage keeps it.
    pub registered_at: Option<SystemTime>,
    /// Fields of the stored record that this version does not know.
    pub(crate) unknown: Option<Arc<serde_json::Map<String, serde_json::Value>>>,
}

impl Instance {
    /// Starts an instance of `service` with the given id; [`InstanceBuilder::build`] checks everything.
    pub fn builder(service: impl AsRef<str>, id: impl AsRef<str>) -> InstanceBuilder {
        let parsed = ServiceName::parse(service).and_then(|service| Ok((service, InstanceId::parse(id)?)));
        InstanceBuilder(parsed.map(|(service, id)| Self::new(service, id)))
    }

    /// An instance with defaults for all but its name.
    #[must_use]
    pub fn new(service: ServiceName, id: InstanceId) -> Self {
        Self {
            id,
            service,
            endpoints: Vec::new(),
            version: None,
            zone: None,
            weight: DEFAULT_WEIGHT,
            status: Status::Up,
            metadata: Metadata::default(),
            registered_at: None,
            unknown: None,
        }
    }

    /// Whether it takes traffic: [`Status::Up`] with a weight above 0.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.status == Status::Up && self.weight > 0
    }
}

/// Builds an [`Instance`]; the first thing that is wrong is reported by [`build`](Self::build).
#[derive(Clone, Debug)]
#[must_use]
pub struct InstanceBuilder(Result<Instance>);

impl InstanceBuilder {
    /// Adds `scheme://host:port`.
    pub fn endpoint(self, endpoint: impl AsRef<str>) -> Self {
        self.edit(|instance| {
            instance.endpoints.push(endpoint.as_ref().parse()?);
            Ok(())
        })
    }

    /// Adds the endpoint at which others can call a listener that is bound to `bound`, also where that is `0.0.0.0` or
    /// `[::]`: see [`advertise`](crate::advertise) for how the address is chosen, and what to set if it is the wrong one.
    ///
    /// # Examples
    /// ```
    /// use registry_core::Instance;
    ///
    /// let listener = std::net::TcpListener::bind("0.0.0.0:0")?;
    /// let instance = Instance::builder("orders", "7f3a").listening("http", listener.local_addr()?).build()?;
    /// assert_eq!(instance.endpoints[0].port(), listener.local_addr()?.port());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn listening(self, scheme: impl AsRef<str>, bound: SocketAddr) -> Self {
        self.edit(|instance| {
            instance.endpoints.push(advertise::endpoint(scheme.as_ref(), bound)?);
            Ok(())
        })
    }

    /// Sets the version of the software.
    pub fn version(self, version: impl Into<String>) -> Self {
        self.edit(|instance| {
            instance.version = Some(version.into());
            Ok(())
        })
    }

    /// Sets the zone.
    pub fn zone(self, zone: impl Into<String>) -> Self {
        self.edit(|instance| {
            instance.zone = Some(zone.into());
            Ok(())
        })
    }

    /// Sets the weight. Defaults to 100; 0 means drained.
    pub fn weight(self, weight: u32) -> Self {
        self.edit(|instance| {
            instance.weight = weight;
            Ok(())
        })
    }

    /// Sets the status. Defaults to [`Status::Up`].
    pub fn status(self, status: Status) -> Self {
        self.edit(|instance| {
            instance.status = status;
            Ok(())
        })
    }

    /// Sets one label; the key must not be empty.
    pub fn metadata(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        let key = key.into();
        self.edit(|instance| {
            if key.is_empty() {
                return Err(Error::invalid("invalid metadata: a key is empty"));
            }
            instance.metadata.insert(key, value.into());
            Ok(())
        })
    }

    /// The finished instance.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for a bad name, id, endpoint or metadata key, and what
    /// [`listening`](Self::listening) met.
    pub fn build(self) -> Result<Instance> {
        self.0
    }

    fn edit(mut self, change: impl FnOnce(&mut Instance) -> Result<()>) -> Self {
        if let Ok(instance) = &mut self.0
            && let Err(error) = change(instance)
        {
            self.0 = Err(error);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_say_what_is_wrong() {
        for (text, why) in [
            ("10.0.0.1:80", "no scheme"),
            ("http://10.0.0.1", "no port"),
            ("http://10.0.0.1:0", "1 to 65535"),
            ("http://10.0.0.1:99999", "1 to 65535"),
            ("http://::1:80", "needs brackets"),
            ("http://[::1:80", "not closed"),
            ("http://[fe80::1%]:80", "not a zone"),
            ("http://[fe80::1%a b]:80", "not a zone"),
            ("http://a b:80", "not a host name"),
            ("http://:80", "host is empty"),
            ("1ttp://a:80", "scheme is not"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert_eq!(Endpoint::new("http", "::1", 80).unwrap().authority(), "[::1]:80");
    }

    #[test]
    fn the_builder_reports_the_first_fault() {
        let error = Instance::builder("orders", "1").endpoint("nope").metadata("", "x").build().unwrap_err();
        assert!(error.to_string().starts_with("invalid endpoint \"nope\""), "{error}");
        assert!(Instance::builder("", "1").build().is_err());
    }
}
