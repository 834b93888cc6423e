//! What is the same for every store: the policy of one registry, from a connection string, from code or from `serde`.

use std::{fmt, ops::RangeInclusive, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Location, MAX_NAME_BYTES, Result, ServiceName};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The longest [`Options::announce`]: an announced reader's id is this name, a `~` and the owner's 32 digits.
const MAX_ANNOUNCE_BYTES: usize = MAX_NAME_BYTES - 33;

/// The policy of one registry, the same for every store.
///
/// Every field is also an option of the connection string, by the same name. Durations are written like `15s`, `500ms`
/// or `1h 30m`, in the connection string as in `serde` formats. Fields are checked by [`validate`](Self::validate),
/// which [`take_from`](Self::take_from) and every store's constructor call.
///
/// # Examples
/// ```
/// use std::time::Duration;
///
/// use registry_core::{Location, Options, Reconcile};
///
/// let options = Options::default().ttl(Duration::from_secs(10)).reconcile(Duration::from_secs(60));
/// options.validate()?;
/// assert_eq!(options.protection(), Duration::from_secs(20));
///
/// let mut location = Location::parse("memory://test?ttl=10s&reconcile=1min")?;
/// assert_eq!(Options::take_from(&mut location)?, options);
///
/// let error = Options::default().ttl(Duration::from_millis(50)).validate().unwrap_err();
/// assert_eq!(error.to_string(), "invalid ttl 50ms: expected 100ms to 1h");
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Options {
    /// How long a registration outlives its owner. It is renewed every third of this.
    ///
    /// Defaults to 15 s; 100 ms to 1 h. It counts in milliseconds here; a store that counts in coarser steps rounds up,
    /// and one that needs longer raises it to its own minimum (etcd: whole seconds, at least 2 s).
    #[serde(with = "human")]
    pub ttl: Duration,

    /// When what is registered and what is followed is compared with the store, beyond heartbeats and watches.
    ///
    /// Defaults to every 30 s; every 1 s to 24 h, or a cron expression.
    pub reconcile: Reconcile,

    /// How long one attempt to connect to one server may take.
    ///
    /// Defaults to 2 s; 50 ms to 1 min.
    #[serde(with = "human")]
    pub connect_timeout: Duration,

    /// How long one call may take, retries within the call included.
    ///
    /// Defaults to 5 s; 100 ms to 5 min.
    #[serde(with = "human")]
    pub request_timeout: Duration,

    /// How long instances that vanished together, without a word of leaving, are held in the snapshot.
    ///
    /// Defaults to twice the [`ttl`](Self::ttl), see [`protection`](Self::protection); 0 s to 24 h, and 0 s switches
    /// protection off.
    #[serde(with = "human_option", skip_serializing_if = "Option::is_none")]
    pub protect_for: Option<Duration>,

    /// The share of a service's instances that must vanish together for [`protect_for`](Self::protect_for) to apply;
    /// at least two of them in any case.
    ///
    /// Defaults to 0.5; above 0 and at most 1.
    pub protect_threshold: f64,

    /// How long a service that nobody reads stays followed.
    ///
    /// Defaults to 5 min; 1 s to 24 h.
    #[serde(with = "human")]
    pub idle_timeout: Duration,

    /// How many registrations per second are restored after an outage, so that a store that returns is not flooded.
    ///
    /// Defaults to 1000 per second; 1 to 1 000 000.
    pub register_rate: u32,

    /// The name under which this reader announces itself to the services that it follows: it is then listed among
    /// their subscribers.
    ///
    /// Defaults to none, which announces nothing; at most 222 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce: Option<ServiceName>,

    /// The directory in which the sets of followed services are kept, so that a process starts and serves while the
    /// store is down.
    ///
    /// Each service has one file there, which is replaced as a whole about a second after a change, and now and then
    /// without one, for as long as the set is live and not empty. A file is read only if the store cannot be reached
    /// before anything was read from it: its set is then [stale](crate::Freshness::Stale) since it was last known to be
    /// live, until the store answers. What the store refuses, such as a wrong password, is an error as ever.
    ///
    /// Registries may share a directory, also in several processes: what they keep is told apart by the store's servers
    /// and the prefix (see [`Backend::namespace`](crate::Backend::namespace)). Only the user that the process runs as
    /// can read the files. Whatever is wrong with one is logged and it is passed over; a directory that is not there
    /// and cannot be made is an error of the constructor.
    ///
    /// Defaults to none, which keeps nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_dir: Option<PathBuf>,

    /// How long after it was last known to be live a set in [`snapshot_dir`](Self::snapshot_dir) may still be used, by
    /// the clock of this machine. Files are written anew every quarter of this, and at the end.
    ///
    /// Defaults to 1 day; 1 min to 30 days.
    #[serde(with = "human")]
    pub snapshot_max_age: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ttl: 15 * SECOND,
            reconcile: Reconcile::default(),
            connect_timeout: 2 * SECOND,
            request_timeout: 5 * SECOND,
            protect_for: None,
            protect_threshold: 0.5,
            idle_timeout: 5 * MINUTE,
            register_rate: 1000,
            announce: None,
            snapshot_dir: None,
            snapshot_max_age: DAY,
        }
    }
}

impl Options {
    /// The names of all options, as a connection string spells them.
    pub const NAMES: &'static [&'static str] = &[
        "announce",
        "connect_timeout",
        "idle_timeout",
        "protect_for",
        "protect_threshold",
        "reconcile",
        "register_rate",
        "request_timeout",
        "snapshot_dir",
        "snapshot_max_age",
        "ttl",
    ];

    /// Takes these options out of a connection string, checked; those that it does not name have their defaults.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for a value that cannot be read or is out of range,
    /// and [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as for [`Reconcile`].
    pub fn take_from(location: &mut Location) -> Result<Self> {
        let defaults = Self::default();
        let name_of = |text: &str| ServiceName::parse(text).ok();
        let options = Self {
            ttl: location.take_duration("ttl")?.unwrap_or(defaults.ttl),
            reconcile: location.take("reconcile").map_or(Ok(defaults.reconcile), |text| text.parse())?,
            connect_timeout: location.take_duration("connect_timeout")?.unwrap_or(defaults.connect_timeout),
            request_timeout: location.take_duration("request_timeout")?.unwrap_or(defaults.request_timeout),
            protect_for: location.take_duration("protect_for")?,
            protect_threshold: location
                .take_parsed("protect_threshold", "a number above 0 and at most 1", |text| text.parse().ok())?
                .unwrap_or(defaults.protect_threshold),
            idle_timeout: location.take_duration("idle_timeout")?.unwrap_or(defaults.idle_timeout),
            register_rate: location
                .take_parsed("register_rate", "a whole number from 1 to 1000000", |text| text.parse().ok())?
                .unwrap_or(defaults.register_rate),
            announce: location.take_parsed("announce", "a name without control characters", name_of)?,
            snapshot_dir: location.take("snapshot_dir").map(PathBuf::from),
            snapshot_max_age: location.take_duration("snapshot_max_age")?.unwrap_or(defaults.snapshot_max_age),
        };
        options.validate()?;
        Ok(options)
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput), stating the value and the accepted range, and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a cron expression without the feature `cron`.
    pub fn validate(&self) -> Result<()> {
        check_duration("ttl", self.ttl, Duration::from_millis(100)..=HOUR)?;
        self.reconcile.validate()?;
        check_duration("connect_timeout", self.connect_timeout, Duration::from_millis(50)..=MINUTE)?;
        check_duration("request_timeout", self.request_timeout, Duration::from_millis(100)..=5 * MINUTE)?;
        check_duration("protect_for", self.protection(), Duration::ZERO..=DAY)?;
        // Not the other way round: NaN is outside every range.
        check("protect_threshold", self.protect_threshold, "above 0 and at most 1", |share| {
            share > 0.0 && share <= 1.0
        })?;
        check_duration("idle_timeout", self.idle_timeout, SECOND..=DAY)?;
        check("register_rate", self.register_rate, "1 to 1000000", |rate| (1..=1_000_000).contains(&rate))?;
        let bytes = self.announce.as_ref().map_or(0, |name| name.len());
        check("length of announce", bytes, "at most 222 bytes", |bytes| bytes <= MAX_ANNOUNCE_BYTES)?;
        if self.snapshot_dir.as_ref().is_some_and(|dir| dir.as_os_str().is_empty()) {
            return Err(Error::invalid("invalid snapshot_dir \"\": expected the path of a directory"));
        }
        check_duration("snapshot_max_age", self.snapshot_max_age, MINUTE..=30 * DAY)
    }

    /// How long protection holds: [`protect_for`](Self::protect_for) or else twice the [`ttl`](Self::ttl).
    #[must_use]
    pub fn protection(&self) -> Duration {
        self.protect_for.unwrap_or_else(|| self.ttl.saturating_mul(2))
    }

    /// Sets [`ttl`](Self::ttl).
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// Sets [`reconcile`](Self::reconcile): a duration or a [`Reconcile`].
    #[must_use]
    pub fn reconcile(self, reconcile: impl Into<Reconcile>) -> Self {
        Self { reconcile: reconcile.into(), ..self }
    }

    /// Sets [`connect_timeout`](Self::connect_timeout).
    #[must_use]
    pub fn connect_timeout(self, connect_timeout: Duration) -> Self {
        Self { connect_timeout, ..self }
    }

    /// Sets [`request_timeout`](Self::request_timeout).
    #[must_use]
    pub fn request_timeout(self, request_timeout: Duration) -> Self {
        Self { request_timeout, ..self }
    }

    /// Sets [`protect_for`](Self::protect_for): a duration, or `None` for twice the ttl.
    #[must_use]
    pub fn protect_for(self, protect_for: impl Into<Option<Duration>>) -> Self {
        Self { protect_for: protect_for.into(), ..self }
    }

    /// Sets [`protect_threshold`](Self::protect_threshold).
    #[must_use]
    pub fn protect_threshold(self, protect_threshold: f64) -> Self {
        Self { protect_threshold, ..self }
    }

    /// Sets [`idle_timeout`](Self::idle_timeout).
    #[must_use]
    pub fn idle_timeout(self, idle_timeout: Duration) -> Self {
        Self { idle_timeout, ..self }
    }

    /// Sets [`register_rate`](Self::register_rate).
    #[must_use]
    pub fn register_rate(self, register_rate: u32) -> Self {
        Self { register_rate, ..self }
    }

    /// Sets [`announce`](Self::announce): a name, or `None` to announce nothing.
    #[must_use]
    pub fn announce(self, announce: impl Into<Option<ServiceName>>) -> Self {
        Self { announce: announce.into(), ..self }
    }

    /// Sets [`snapshot_dir`](Self::snapshot_dir).
    #[must_use]
    pub fn snapshot_dir(self, snapshot_dir: impl Into<PathBuf>) -> Self {
        Self { snapshot_dir: Some(snapshot_dir.into()), ..self }
    }

    /// Sets [`snapshot_max_age`](Self::snapshot_max_age).
    #[must_use]
    pub fn snapshot_max_age(self, snapshot_max_age: Duration) -> Self {
        Self { snapshot_max_age, ..self }
    }
}

/// When [`Options::reconcile`] comes due: a duration like `30s`, or a cron expression.
///
/// A cron expression has six fields, `sec min hour day month weekday`, in UTC; day and weekday must both match. It
/// needs the feature `cron`. In a connection string its spaces are written `%20`.
///
/// # Errors
/// Parsing gives [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for what is neither, and for a schedule
/// that never comes due; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a cron expression without the
/// feature `cron`.
///
/// # Examples
/// ```
/// use std::time::Duration;
///
/// use registry_core::Reconcile;
///
/// assert_eq!("90s".parse::<Reconcile>()?, Reconcile::Every(Duration::from_secs(90)));
/// assert_eq!(Reconcile::default().to_string(), "30s");
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reconcile {
    /// With this much time between two rounds: 1 s to 24 h.
    Every(Duration),
    /// At the times of this cron expression.
    Cron(String),
}

impl Reconcile {
    fn validate(&self) -> Result<()> {
        match self {
            Self::Every(period) => check_duration("reconcile", *period, SECOND..=DAY),
            Self::Cron(expression) => check_cron(expression),
        }
    }
}

impl Default for Reconcile {
    fn default() -> Self {
        Self::Every(30 * SECOND)
    }
}

impl From<Duration> for Reconcile {
    fn from(period: Duration) -> Self {
        Self::Every(period)
    }
}

impl FromStr for Reconcile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = parse_duration(text).map_or_else(|| Self::Cron(text.to_owned()), Self::Every);
        parsed.validate()?;
        Ok(parsed)
    }
}

impl fmt::Display for Reconcile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Every(period) => fmt::Display::fmt(&humantime::format_duration(*period), f),
            Self::Cron(expression) => f.write_str(expression),
        }
    }
}

impl Serialize for Reconcile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reconcile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

fn check_cron(expression: &str) -> Result<()> {
    if expression.split_whitespace().count() != 6 {
        return Err(Error::invalid(format!(
            "invalid reconcile {expression:?}: expected a duration such as 30s, or a cron expression of 6 fields: \
             sec min hour day month weekday"
        )));
    }
    schedule(expression)
}

#[cfg(feature = "cron")]
fn schedule(expression: &str) -> Result<()> {
    let bad = |why| Error::invalid(format!("invalid reconcile {expression:?}: {why}"));
    let job = tokio_cron_scheduler::Job::new_async(expression, |_, _| Box::pin(async {}));
    let next = job.and_then(|mut job| job.job_data()).map_err(|_| {
        bad("expected a cron expression of 6 fields: sec min hour day month weekday, such as 0 */5 * * * *")
    })?;
    if next.next_tick == 0 { Err(bad("this cron expression never comes due")) } else { Ok(()) }
}

#[cfg(not(feature = "cron"))]
fn schedule(expression: &str) -> Result<()> {
    let message =
        format!("reconcile {expression:?} is a cron expression: enable the feature \"cron\" or give a duration");
    Err(Error::new(crate::ErrorKind::Unsupported, message))
}

pub(crate) fn check_duration(name: &str, value: Duration, range: RangeInclusive<Duration>) -> Result<()> {
    let human = humantime::format_duration;
    let accepted = format!("{} to {}", human(*range.start()), human(*range.end()));
    check(name, human(value), &accepted, |_| range.contains(&value))
}

pub(crate) fn check<T: fmt::Display + Clone>(
    name: &str,
    value: T,
    accepted: &str,
    holds: impl FnOnce(T) -> bool,
) -> Result<()> {
    if holds(value.clone()) {
        Ok(())
    } else {
        Err(Error::invalid(format!("invalid {name} {value}: expected {accepted}")))
    }
}

/// A duration as people write it: `15s`, `500ms`, `1h 30m`.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    // humantime 2.4 panics where numbers, each in range, add up to a second more than a `Duration` holds. It also
    // skips spaces within a number.
    let compact: String = text.split_whitespace().collect();
    if text.len() > 64 || compact.split(|c: char| !c.is_ascii_digit()).any(|number| number.len() > 10) {
        return None;
    }
    humantime::parse_duration(text).ok()
}

/// A duration in a `serde` format.
pub(crate) mod human {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).ok_or_else(|| {
            serde::de::Error::custom(format!("invalid duration {text:?}: expected one such as 15s, 500ms or 5min"))
        })
    }
}

/// A duration that may be absent in a `serde` format.
pub(crate) mod human_option {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        duration.map(|duration| humantime::format_duration(duration).to_string()).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        #[derive(Deserialize)]
        struct Human(#[serde(with = "human")] Duration);

        Ok(Option::<Human>::deserialize(deserializer)?.map(|Human(duration)| duration))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ErrorKind;

    const NANOSECOND: Duration = Duration::from_nanos(1);

    fn from_url(query: &str) -> Result<Options> {
        let mut location = Location::parse(&format!("memory://?{query}")).unwrap();
        let options = Options::take_from(&mut location)?;
        location.finish(Options::NAMES)?;
        Ok(options)
    }

    fn from_json(json: &str) -> Result<Options, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn refusal(options: Options) -> String {
        let error = options.validate().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.to_string()
    }

    #[test]
    fn the_defaults_are_valid_and_what_nothing_gives() {
        Options::default().validate().unwrap();
        assert_eq!(from_url("").unwrap(), Options::default());
        assert_eq!(from_json("{}").unwrap(), Options::default());
        assert_eq!(Options::default().protection(), 30 * SECOND);
    }

    #[test]
    fn durations_are_accepted_up_to_both_edges_and_refused_beyond() {
        type Set = fn(Options, Duration) -> Options;
        let cases: [(&str, Set, Duration, Duration, &str); 7] = [
            ("ttl", Options::ttl, Duration::from_millis(100), HOUR, "100ms to 1h"),
            ("reconcile", Options::reconcile, SECOND, DAY, "1s to 1day"),
            ("connect_timeout", Options::connect_timeout, Duration::from_millis(50), MINUTE, "50ms to 1m"),
            ("request_timeout", Options::request_timeout, Duration::from_millis(100), 5 * MINUTE, "100ms to 5m"),
            ("protect_for", Options::protect_for, Duration::ZERO, DAY, "0s to 1day"),
            ("idle_timeout", Options::idle_timeout, SECOND, DAY, "1s to 1day"),
            ("snapshot_max_age", Options::snapshot_max_age, MINUTE, 30 * DAY, "1m to 30days"),
        ];
        for (name, set, low, high, accepted) in cases {
            for edge in [low, high] {
                let options = set(Options::default(), edge);
                options.validate().unwrap();
                assert_eq!(from_url(&format!("{name}={}", humantime::format_duration(edge))).unwrap(), options);
            }
            for beyond in
                [low.checked_sub(NANOSECOND), Some(high + NANOSECOND), Some(Duration::MAX)].into_iter().flatten()
            {
                let error = refusal(set(Options::default(), beyond));
                assert_eq!(
                    error,
                    format!("invalid {name} {}: expected {accepted}", humantime::format_duration(beyond))
                );
            }
            let error = from_url(&format!("{name}=3months")).unwrap_err().to_string();
            assert_eq!(error, format!("invalid {name} 3months: expected {accepted}"));
        }
    }

    #[test]
    fn numbers_are_accepted_up_to_both_edges_and_refused_beyond() {
        for share in [f64::MIN_POSITIVE, 1.0] {
            Options::default().protect_threshold(share).validate().unwrap();
        }
        for share in [0.0, -0.5, 1.0 + f64::EPSILON, f64::NAN, f64::INFINITY] {
            let error = refusal(Options::default().protect_threshold(share));
            assert_eq!(error, format!("invalid protect_threshold {share}: expected above 0 and at most 1"));
        }
        for rate in [1, 1_000_000] {
            Options::default().register_rate(rate).validate().unwrap();
        }
        for rate in [0, 1_000_001] {
            let error = refusal(Options::default().register_rate(rate));
            assert_eq!(error, format!("invalid register_rate {rate}: expected 1 to 1000000"));
        }
    }

    #[test]
    fn an_announced_id_fits_into_a_name() {
        let name = |bytes| ServiceName::parse("x".repeat(bytes)).unwrap();
        let longest = name(222);
        Options::default().announce(longest.clone()).validate().unwrap();
        crate::InstanceId::parse(format!("{longest}~{}", crate::Owner::random())).unwrap();
        let error = refusal(Options::default().announce(name(223)));
        assert_eq!(error, "invalid length of announce 223: expected at most 222 bytes");
        assert_eq!(Options::default().announce(longest).announce(None), Options::default());
    }

    #[test]
    fn a_connection_string_sets_every_option() {
        let query = "ttl=2s&reconcile=1m&connect_timeout=1s&request_timeout=3s&protect_for=0s&protect_threshold=0.25\
                     &idle_timeout=1h30m&register_rate=7&announce=web%2Fshop\
                     &snapshot_dir=/var/lib/a%20shop&snapshot_max_age=1h";
        let expected = Options::default()
            .ttl(2 * SECOND)
            .reconcile(MINUTE)
            .connect_timeout(SECOND)
            .request_timeout(3 * SECOND)
            .protect_for(Duration::ZERO)
            .protect_threshold(0.25)
            .idle_timeout(90 * MINUTE)
            .register_rate(7)
            .announce(ServiceName::parse("web/shop").unwrap())
            .snapshot_dir("/var/lib/a shop")
            .snapshot_max_age(HOUR);
        assert_eq!(from_url(query).unwrap(), expected);
        assert_eq!(expected.protection(), Duration::ZERO);
        let json = serde_json::to_value(&expected).unwrap();
        assert_eq!((&json["ttl"], &json["idle_timeout"]), (&"2s".into(), &"1h 30m".into()));
        assert_eq!((&json["reconcile"], &json["protect_for"]), (&"1m".into(), &"0s".into()));
        let names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, Options::NAMES);
    }

    #[test]
    fn values_that_cannot_be_read_say_what_is_accepted() {
        for (query, message) in [
            ("ttl=15", "invalid option ttl=\"15\": expected a duration such as 15s, 500ms or 5min"),
            (
                "protect_threshold=half",
                "invalid option protect_threshold=\"half\": expected a number above 0 and at most 1",
            ),
            ("register_rate=1.5", "invalid option register_rate=\"1.5\": expected a whole number from 1 to 1000000"),
            ("announce=", "invalid option announce=\"\": expected a name without control characters"),
            ("snapshot_dir=", "invalid snapshot_dir \"\": expected the path of a directory"),
            ("tttl=1s", "unknown option \"tttl\" (did you mean \"ttl\"?); known options: announce, "),
        ] {
            let error = from_url(query).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().starts_with(message), "{error}");
        }
    }

    #[test]
    fn serde_refuses_what_it_does_not_know() {
        assert!(from_json(r#"{"tll": "15s"}"#).unwrap_err().contains("unknown field `tll`"));
        let error = from_json(r#"{"ttl": "15"}"#).unwrap_err();
        assert!(error.contains("invalid duration \"15\": expected one such as 15s"), "{error}");
        assert!(from_json(r#"{"ttl": 15}"#).is_err());
        assert_eq!(
            from_json(r#"{"protect_for": null, "announce": null, "snapshot_dir": null}"#).unwrap(),
            Options::default()
        );
    }

    #[test]
    fn what_is_neither_duration_nor_cron_is_invalid() {
        for text in ["", "soon", "30", "* * * * *", "* * * * * * *", "@daily"] {
            let error = text.parse::<Reconcile>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains("a cron expression of 6 fields"), "{error}");
        }
        let error = from_json(r#"{"reconcile": "soon"}"#).unwrap_err();
        assert!(error.contains("invalid reconcile \"soon\""), "{error}");
    }

    #[cfg(feature = "cron")]
    #[test]
    fn cron_expressions_are_checked() {
        for text in ["0 */5 * * * *", "* * * * * *", "30 0 12 * JAN-MAR MON"] {
            let cron = text.parse::<Reconcile>().unwrap();
            assert_eq!(cron, Reconcile::Cron(text.to_owned()));
            assert_eq!(cron.to_string(), text);
            assert_eq!(from_url(&format!("reconcile={}", text.replace(' ', "%20"))).unwrap().reconcile, cron);
        }
        for text in ["60 * * * * *", "a b c d e f", "0 0 0 30 2 *", "*/0 * * * * *"] {
            let error = refusal(Options::default().reconcile(Reconcile::Cron(text.to_owned())));
            assert!(error.starts_with(&format!("invalid reconcile {text:?}: ")), "{error}");
        }
    }

    #[cfg(not(feature = "cron"))]
    #[test]
    fn cron_expressions_need_the_feature() {
        let error = from_url("reconcile=0%20*/5%20*%20*%20*%20*").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("enable the feature \"cron\""), "{error}");
        let cron = Options::default().reconcile(Reconcile::Cron("0 */5 * * * *".to_owned()));
        assert_eq!(cron.validate().unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn no_duration_makes_humantime_panic() {
        for text in [
            "18446744073709551615s 1000ms",
            "5 8 4 5 4 2 0 4 6 0 9 0y 12345678s 1000ms",
            "9999999999y9999999999y1000ms",
        ] {
            let _ = parse_duration(text);
        }
        assert_eq!(parse_duration("18446744073709551615s 1000ms"), None);
    }

    fn duration(low: Duration, high: Duration) -> impl Strategy<Value = Duration> {
        (low.as_nanos() as u64..=high.as_nanos() as u64).prop_map(Duration::from_nanos)
    }

    proptest! {
        #[test]
        fn any_valid_options_come_back_from_serde_and_from_a_connection_string(
            (ttl, reconcile) in (duration(Duration::from_millis(100), HOUR), duration(SECOND, DAY)),
            (connect, request) in (duration(SECOND, MINUTE), duration(SECOND, MINUTE)),
            (protect, idle) in (proptest::option::of(duration(Duration::ZERO, DAY)), duration(SECOND, DAY)),
            (share, rate) in (f64::MIN_POSITIVE..=1.0, 1..=1_000_000u32),
            name in proptest::option::of("\\PC{1,50}"),
            (dir, age) in (proptest::option::of("\\PC{1,50}"), duration(MINUTE, 30 * DAY)),
        ) {
            let options = Options {
                ttl,
                reconcile: reconcile.into(),
                connect_timeout: connect,
                request_timeout: request,
                protect_for: protect,
                protect_threshold: share,
                idle_timeout: idle,
                register_rate: rate,
                announce: name.map(|name| ServiceName::parse(name).unwrap()),
                snapshot_dir: dir.map(PathBuf::from),
                snapshot_max_age: age,
            };
            let json = serde_json::to_value(&options).unwrap();
            let encoded = |value: &serde_json::Value| {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                text.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>()
            };
            let fields = json.as_object().unwrap().iter();
            let query: Vec<_> = fields.map(|(name, value)| format!("{name}={}", encoded(value))).collect();
            prop_assert_eq!(&from_url(&query.join("&")).unwrap(), &options);
            prop_assert_eq!(serde_json::from_value::<Options>(json).unwrap(), options);
        }

        #[test]
        fn durations_and_schedules_take_any_text(
            any in any::<String>(),
            near in "[0-9a-zµ. ]{0,70}",
            cron in "([*0-9LW#/?,+-]{1,4} ){5}[*0-9LW#/?,+-]{1,4}",
        ) {
            for text in [any, near, cron] {
                let _ = parse_duration(&text);
                let _ = text.parse::<Reconcile>();
            }
        }
    }
}
