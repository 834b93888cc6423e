//! Where a registry lives: the connection string, parsed once.
//!
//! A connection string may hold a password, and in a malformed one nobody can tell which part that is. So an error of
//! [`Location::parse`] repeats none of its text, but the name of an option that is given twice.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use secrecy::{ExposeSecret, SecretString};

use crate::{Error, Result, instance::check_host, options::parse_duration};

/// What an error about the shape of a connection string ends with.
const SHAPE: &str =
    "expected scheme://[user[:password]@]host[:port][,host[:port]…][/prefix][?option=value[&option=value…]]";

/// What stays as it is in a user, a path segment, an option's name and its value.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const PREFIX: &AsciiSet = &PLAIN.remove(b'/');
/// What a cron expression or a list of addresses needs to stay readable.
const VALUE: &AsciiSet = &PLAIN.remove(b'/').remove(b':').remove(b',').remove(b'*').remove(b'+');

/// A parsed connection string:
/// `scheme://[user[:password]@]host[:port][,host[:port]…][/prefix][?option=value[&option=value…]]`.
///
/// * IPv6 addresses stand in brackets. Hosts may be absent (`memory://`); a backend that needs one says so.
/// * User, password, prefix, option names and option values are percent-decoded; `+` stays `+`. In a user or password
///   `/ ? # @ %` must be encoded, and so must `@` everywhere else.
/// * Options belong to whoever [takes](Self::take) them; [`finish`](Self::finish) refuses what nobody took.
///
/// `Debug` and `Display` show `***` in place of the password, and of the value of every option whose name holds
/// `password`, `secret` or `token`.
///
/// # Examples
/// ```
/// use registry_core::Location;
///
/// let mut location = Location::parse("etcd://app:s3cret@h1:2379,[2001:db8::1]/services?ttl=15s")?;
/// assert_eq!((location.scheme(), location.user(), location.prefix()), ("etcd", Some("app"), "services"));
/// assert_eq!(location.hosts()[1].with_default_port(2379), "[2001:db8::1]:2379");
/// assert_eq!(location.to_string(), "etcd://app:***@h1:2379,[2001:db8::1]/services?ttl=15s");
/// assert_eq!(location.take("ttl").as_deref(), Some("15s"));
/// location.finish(&["ttl"])?;
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Location {
    scheme: String,
    user: Option<String>,
    password: Option<SecretString>,
    hosts: Vec<Host>,
    prefix: String,
    options: BTreeMap<String, String>,
}

impl Location {
    /// Parses a connection string.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput), saying what is wrong and what is expected. The
    /// message never holds the password, nor anything that could be a part of it.
    pub fn parse(url: &str) -> Result<Self> {
        if url.chars().any(char::is_control) {
            return Err(bad("it has a control character, such as a line break, that is not percent-encoded"));
        }
        let (scheme, rest) = url.split_once("://").ok_or_else(|| misshapen("there is no scheme"))?;
        if rest.contains('#') {
            return Err(bad("it has a fragment ('#'); write %23 if the '#' belongs to a user, password or option"));
        }
        let (authority, path, query) = split(rest);
        if path.contains('@') || query.contains('@') || authority.matches('@').count() > 1 {
            return Err(bad(
                "only one '@' may stand in it, between password and host, and no '/' or '?' before that; \
                            write %40, %2F and %3F elsewhere",
            ));
        }
        let (userinfo, hosts) =
            authority.rsplit_once('@').map_or((None, authority), |(info, hosts)| (Some(info), hosts));
        if userinfo.is_some() && hosts.is_empty() {
            return Err(misshapen("there is no host after the '@'"));
        }
        let (user, password) = parse_userinfo(userinfo)?;
        Ok(Self {
            scheme: parse_scheme(scheme)?,
            user,
            password,
            hosts: parse_hosts(hosts)?,
            prefix: parse_prefix(path)?,
            options: parse_options(query)?,
        })
    }

    /// The scheme in lower case: letters, digits, `+`, `-` and `.`.
    #[must_use]
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// The user, decoded. `None` if there is none or it is empty.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The password, decoded. `None` if there is none or it is empty.
    #[must_use]
    pub fn password(&self) -> Option<&SecretString> {
        self.password.as_ref()
    }

    /// The servers in the given order. Empty if the connection string names none.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The namespace within the store: the path, decoded, without `/` at either end. Empty if there is none.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Removes an option and gives its decoded value.
    pub fn take(&mut self, name: &str) -> Option<String> {
        self.options.remove(name)
    }

    /// Removes an option and parses its value; `Ok(None)` if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if `parse` gives `None`: the message names the
    /// option, its value (not that of a secret) and `accepted`.
    ///
    /// # Examples
    /// ```
    /// use registry_core::Location;
    ///
    /// let mut location = Location::parse("redis://h1?db=one")?;
    /// let error = location.take_parsed("db", "a number", |text| text.parse::<u8>().ok()).unwrap_err();
    /// assert_eq!(error.to_string(), "invalid option db=\"one\": expected a number");
    /// # Ok::<(), registry_core::Error>(())
    /// ```
    pub fn take_parsed<T>(
        &mut self,
        name: &str,
        accepted: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let parsed = parse(&value).ok_or_else(|| {
            let shown = if is_secret(name) { "***" } else { &value };
            Error::invalid(format!("invalid option {name}={shown:?}: expected {accepted}"))
        })?;
        Ok(Some(parsed))
    }

    /// Removes an option that is a duration, such as `15s`, `500ms` or `1h 30m`; `Ok(None)` if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if the value is no duration.
    pub fn take_duration(&mut self, name: &str) -> Result<Option<Duration>> {
        self.take_parsed(name, "a duration such as 15s, 500ms or 5min", parse_duration)
    }

    /// Ends the parsing: everyone has taken the options that are theirs. `known` is all that there are, for the error.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if an option is left over. It lists the known ones.
    pub fn finish(self, known: &[&str]) -> Result<()> {
        let Some(unknown) = self.options.keys().next() else { return Ok(()) };
        let mut known = known.to_vec();
        known.sort_unstable();
        known.dedup();
        let close = |name: &&&str| 2 * distance(name, unknown) <= unknown.len().min(4);
        let nearest = known.iter().min_by_key(|name| distance(name, unknown)).filter(close);
        let hint = nearest.map(|name| format!(" (did you mean {name:?}?)")).unwrap_or_default();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Err(Error::invalid(format!("unknown option {unknown:?}{hint}; known options: {known}")))
    }
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self> {
        Self::parse(url)
    }
}

impl TryFrom<&str> for Location {
    type Error = Error;

    fn try_from(url: &str) -> Result<Self> {
        Self::parse(url)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme)?;
        write!(f, "{}", utf8_percent_encode(self.user.as_deref().unwrap_or_default(), PLAIN))?;
        f.write_str(if self.password.is_some() { ":***" } else { "" })?;
        f.write_str(if self.user.is_some() || self.password.is_some() { "@" } else { "" })?;
        for (n, host) in self.hosts.iter().enumerate() {
            write!(f, "{}{host}", if n == 0 { "" } else { "," })?;
        }
        if !self.prefix.is_empty() {
            write!(f, "/{}", utf8_percent_encode(&self.prefix, PREFIX))?;
        }
        for (n, (name, value)) in self.options.iter().enumerate() {
            write!(f, "{}{}=", if n == 0 { '?' } else { '&' }, utf8_percent_encode(name, PLAIN))?;
            write!(
                f,
                "{}",
                if is_secret(name) { "***".into() } else { utf8_percent_encode(value, VALUE).to_string() }
            )?;
        }
        Ok(())
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Location(\"{self}\")")
    }
}

/// One server of a [`Location`].
///
/// # Examples
/// ```
/// use registry_core::Location;
///
/// let location = Location::parse("redis://[::1],cache:7000")?;
/// assert_eq!(location.hosts()[0].name, "::1");
/// assert_eq!(location.hosts()[0].to_string(), "[::1]");
/// assert_eq!(location.hosts()[1].with_default_port(6379), "cache:7000");
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub name: String,
    /// The port, 1 to 65535, if one is given.
    pub port: Option<u16>,
}

impl Host {
    /// `name:port` with its own port or else `default`: what a connect call takes. IPv6 in brackets.
    #[must_use]
    pub fn with_default_port(&self, default: u16) -> String {
        Self { port: self.port.or(Some(default)), name: self.name.clone() }.to_string()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') { write!(f, "[{}]", self.name) } else { f.write_str(&self.name) }?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

fn bad(why: impl fmt::Display) -> Error {
    Error::invalid(format!("invalid connection string: {why}"))
}

fn misshapen(why: impl fmt::Display) -> Error {
    bad(format_args!("{why}; {SHAPE}"))
}

/// What follows `://`, in its three parts: authority, path with its leading `/`, query without its `?`.
fn split(rest: &str) -> (&str, &str, &str) {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    (authority, path, query)
}

fn parse_scheme(scheme: &str) -> Result<String> {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    if scheme.len() > 32 || !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.chars().all(named) {
        return Err(misshapen("the scheme is not a letter followed by up to 31 letters, digits, '+', '-' or '.'"));
    }
    Ok(scheme.to_ascii_lowercase())
}

fn parse_userinfo(userinfo: Option<&str>) -> Result<(Option<String>, Option<SecretString>)> {
    let Some(userinfo) = userinfo else { return Ok((None, None)) };
    let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
    let user = Some(decode("the user", user)?).filter(|user| !user.is_empty());
    let password = Some(SecretString::from(decode("the password", password)?));
    let password = password.filter(|password| !password.expose_secret().is_empty());
    if user.is_none() && password.is_none() {
        return Err(misshapen("there is neither a user nor a password before the '@'"));
    }
    Ok((user, password))
}

/// Counts the hosts in its errors instead of showing them: where the `@host` is missing, a password looks like a port.
fn parse_hosts(hosts: &str) -> Result<Vec<Host>> {
    if hosts.is_empty() {
        return Ok(Vec::new());
    }
    let parse = |(n, host)| parse_host(host).map_err(|why| bad(format_args!("host {}: {why}", n + 1)));
    hosts.split(',').enumerate().map(parse).collect()
}

/// `host[:port]`, IPv6 in brackets.
pub(crate) fn parse_host(host: &str) -> Result<Host, &'static str> {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !host.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    };
    if name.is_empty() {
        return Err("there is no name; expected host[:port]");
    }
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    // An IPv6 address may name its zone after a '%'.
    if check_host(name).is_err() || !bare.split('%').all(|part| !part.is_empty() && part.chars().all(plain)) {
        return Err("expected a host name, an IPv4 address or an IPv6 address in brackets, each with or without :port");
    }
    let port = port.map(|port| parse_port(port).ok_or("the port is not a number from 1 to 65535")).transpose()?;
    Ok(Host { name: bare.to_owned(), port })
}

fn parse_port(port: &str) -> Option<u16> {
    port.parse().ok().filter(|&number| number != 0 && port.bytes().all(|c| c.is_ascii_digit()))
}

fn parse_prefix(path: &str) -> Result<String> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let prefix = decode("the prefix", path.strip_suffix('/').unwrap_or(path))?;
    if prefix.chars().any(char::is_control) {
        return Err(bad("the prefix has a control character"));
    }
    if !prefix.is_empty() && prefix.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err(bad("the prefix has an empty segment, '.' or '..'; expected names separated by single '/'"));
    }
    Ok(prefix)
}

fn parse_options(query: &str) -> Result<BTreeMap<String, String>> {
    let mut options = BTreeMap::new();
    if query.is_empty() {
        return Ok(options);
    }
    for (n, option) in query.split('&').enumerate() {
        let (name, value) = option.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
            bad(format_args!("option {} is not name=value; write %26 if a value holds an '&'", n + 1))
        })?;
        let name = decode(format_args!("the name of option {}", n + 1), name)?;
        let value = decode(format_args!("the value of option {}", n + 1), value)?;
        if options.contains_key(&name) {
            return Err(bad(format_args!("option {name:?} is given twice")));
        }
        options.insert(name, value);
    }
    Ok(options)
}

/// Percent-decodes, strictly: what is not an escape must have been meant to be one.
fn decode(what: impl fmt::Display, text: &str) -> Result<String> {
    let escaped = |rest: &str| rest.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2;
    if !text.split('%').skip(1).all(escaped) {
        return Err(bad(format_args!("{what} has a '%' without two hexadecimal digits after it; write %25 for '%'")));
    }
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| bad(format_args!("{what} is not UTF-8")))?;
    Ok(decoded.into_owned())
}

/// Whether the value of this option is not for logs.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["password", "secret", "token"].iter().any(|word| name.contains(word))
}

/// How many letters must be added, left out or replaced to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ErrorKind;

    fn parse(url: &str) -> Location {
        Location::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    fn password(location: &Location) -> Option<&str> {
        location.password().map(ExposeSecret::expose_secret)
    }

    fn hosts(location: &Location) -> Vec<String> {
        location.hosts().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_part_is_read_and_decoded() {
        let mut location =
            parse("REDIS+Sentinel://us%20er:p%40ss%2F%3a+@h1:1,[fe80::1%eth0]:65535,10.0.0.3/a%20b/c/?x+y=1%262=3&e=");
        assert_eq!(location.scheme(), "redis+sentinel");
        assert_eq!(location.user(), Some("us er"));
        assert_eq!(password(&location), Some("p@ss/:+"));
        assert_eq!(hosts(&location), ["h1:1", "[fe80::1%eth0]:65535", "10.0.0.3"]);
        assert_eq!(location.prefix(), "a b/c");
        assert_eq!(location.take("x+y").as_deref(), Some("1&2=3"));
        assert_eq!(location.take("e").as_deref(), Some(""));
        assert_eq!(location.take("e"), None);
        location.finish(&[]).unwrap();
    }

    #[test]
    fn parts_may_be_absent() {
        for url in ["memory://", "memory:///", "memory:////", "memory://?", "memory:///?"] {
            let location = parse(url);
            assert!(location.hosts().is_empty() && location.prefix().is_empty(), "{url}");
            assert_eq!((location.user(), password(&location)), (None, None));
            assert_eq!(location.to_string(), "memory://");
        }
        assert_eq!(hosts(&parse("memory://name")), ["name"]);
        assert_eq!(parse("memory:///deep/er").prefix(), "deep/er");
        assert_eq!(password(&parse("redis://:pw@h")), Some("pw"));
        assert_eq!(password(&parse("redis://user:@h")), None);
        assert_eq!("etcd://h".parse::<Location>().unwrap().scheme(), "etcd");
        assert_eq!(Location::try_from("etcd://h").unwrap().scheme(), "etcd");
    }

    #[test]
    fn errors_say_what_is_wrong() {
        for (url, why) in [
            ("", "no scheme"),
            ("h1:2379", "no scheme"),
            ("://h", "the scheme is not"),
            ("3tcd://h", "the scheme is not"),
            ("et cd://h", "the scheme is not"),
            ("etcd://h#x", "fragment"),
            ("etcd://h/a@b", "only one '@'"),
            ("etcd://h?a=b@c", "only one '@'"),
            ("etcd://u:a@b@h", "only one '@'"),
            ("etcd://@h", "neither a user nor a password"),
            ("etcd://:@h", "neither a user nor a password"),
            ("etcd://u@", "no host after"),
            ("etcd://u@/p", "no host after"),
            ("etcd://u:p%@h", "the password has a '%'"),
            ("etcd://u%f:p@h", "the user has a '%'"),
            ("etcd://u:%ff@h", "the password is not UTF-8"),
            ("etcd://:2379", "host 1: there is no name"),
            ("etcd://h1,,h3", "host 2: there is no name"),
            ("etcd://h1,", "host 2: there is no name"),
            ("etcd://h1,h 2", "host 2: expected a host name"),
            ("etcd://::1", "IPv6 address in brackets"),
            ("etcd://[::1", "IPv6 address in brackets"),
            ("etcd://[1.2.3.4]", "IPv6 address in brackets"),
            ("etcd://[::1%]", "IPv6 address in brackets"),
            ("etcd://[::1%a]]", "IPv6 address in brackets"),
            ("etcd://[::1%a b]", "IPv6 address in brackets"),
            ("etcd://[::1]x:1", "IPv6 address in brackets"),
            ("etcd://h:", "1 to 65535"),
            ("etcd://h:0", "1 to 65535"),
            ("etcd://h:65536", "1 to 65535"),
            ("etcd://h:+80", "1 to 65535"),
            ("etcd://h/a//b", "empty segment"),
            ("etcd://h/a//", "empty segment"),
            ("etcd://h//a", "empty segment"),
            ("etcd://h/a/%2E%2E/b", "'..'"),
            ("etcd://h/.", "'.'"),
            ("etcd://h/a%00b", "the prefix has a control character"),
            ("etcd://h/a%zz", "the prefix has a '%'"),
            ("etcd://h/services\n", "line break"),
            ("etcd://h?ttl", "option 1 is not name=value"),
            ("etcd://h?a=1&", "option 2 is not name=value"),
            ("etcd://h?=1", "option 1 is not name=value"),
            ("etcd://h?a=%", "the value of option 1 has a '%'"),
            ("etcd://h?%ff=1", "the name of option 1 is not UTF-8"),
            ("etcd://h?ttl=1s&%74tl=1s", "option \"ttl\" is given twice"),
        ] {
            let error = Location::parse(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(why), "{url}: {error}");
        }
    }

    #[test]
    fn options_left_over_are_errors_that_list_the_known_ones() {
        let error = parse("etcd://h?tl=1s").finish(&["ttl", "reconcile", "ttl"]).unwrap_err();
        assert_eq!(error.to_string(), "unknown option \"tl\" (did you mean \"ttl\"?); known options: reconcile, ttl");
        let error = parse("etcd://h?colour=red").finish(&["ttl"]).unwrap_err();
        assert_eq!(error.to_string(), "unknown option \"colour\"; known options: ttl");
        let error = parse("etcd://h?colour=red").finish(&[]).unwrap_err();
        assert_eq!(error.to_string(), "unknown option \"colour\"; known options: none");
    }

    #[test]
    fn a_bad_option_says_what_is_accepted() {
        let mut location = parse("etcd://h?ttl=soon&ok=7&auth_token=s3cret");
        let error = location.take_duration("ttl").unwrap_err().to_string();
        assert_eq!(error, "invalid option ttl=\"soon\": expected a duration such as 15s, 500ms or 5min");
        assert_eq!(location.take_parsed("ok", "a digit", |text| text.parse::<u8>().ok()).unwrap(), Some(7));
        assert_eq!(location.take_parsed("gone", "a digit", |text| text.parse::<u8>().ok()).unwrap(), None);
        assert_eq!(format!("{location:?}"), "Location(\"etcd://h?auth_token=***\")");
        let error = location.take_parsed("auth_token", "hex", |_| None::<()>).unwrap_err().to_string();
        assert_eq!(error, "invalid option auth_token=\"***\": expected hex");
    }

    /// Everything that this library might show of `url`.
    fn shown(url: &str) -> String {
        match Location::parse(url) {
            Ok(location) => {
                let finished = location.clone().finish(&["ttl"]).map_err(|error| format!("{error:?} {error}"));
                format!("{location} {location:?} {finished:?} {:?}", location.password())
            }
            Err(error) => format!("{error} {error:?} {:?}", std::error::Error::source(&error).map(ToString::to_string)),
        }
    }

    #[test]
    fn a_planted_password_never_shows() {
        const TEMPLATES: &[&str] = &[
            "etcd://user:PW@h1",
            "etcd://:PW@h1:2379/a?ttl=1s",
            "etcd://user:PW@h1:PORT",
            "etcd://user:PW@h 1",
            "etcd://user:PW@h1/a//b",
            "etcd://user:PW@h1?x",
            "etcd://user:PW@h1?ttl=1&ttl=1",
            "etcd://user:PW@h1#x",
            "etcd://user:PW@",
            "etcd://user:PW@h1,user:PW@h2",
            "etcd://us@er:PW@h1",
            "etcd://us/er:PW@h1",
            "etcd:/user:PW@h1",
            "etcd:user:PW@h1",
            "user:PW@h1",
            "user:PW://h1",
            "user:PW@h1://h2",
            "etcd://user:PW",
            "etcd://h1,user:PW",
            "etcd://user:PW/services?ttl=1s",
            " etcd://user:PW@h1",
            "etcd://user:PW@h1\n",
        ];
        for secret in [
            "hunter2",
            "12@hunter2",
            "12/hunter2",
            "12?hunter2",
            "12?hunter2=&hunter2=",
            "12#hunter2",
            "1%hunter2",
            "%ffhunter2",
            "a:hunter2",
            "1,hunter2:",
            "1,[hunter2",
            "[hunter2]",
            "[::hunter2]",
            "://hunter2",
            "1/a?hunter2=1",
            "hunter2%",
            "1/../hunter2",
        ] {
            for template in TEMPLATES.iter().filter(|template| template.contains('@') || secret == "hunter2") {
                let shown = shown(&template.replace("PW", secret));
                assert!(!shown.contains("hunter2"), "{template} with {secret}: {shown}");
            }
        }
    }

    fn encoded(text: &str) -> String {
        utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
    }

    fn joined(parts: impl IntoIterator<Item = String>, separator: &str) -> String {
        parts.into_iter().collect::<Vec<_>>().join(separator)
    }

    fn host() -> impl Strategy<Value = Host> {
        let name = prop_oneof![
            "[a-z0-9][a-z0-9._-]{0,20}",
            any::<std::net::Ipv4Addr>().prop_map(|address| address.to_string()),
            any::<std::net::Ipv6Addr>().prop_map(|address| address.to_string()),
        ];
        (name, proptest::option::of(1u16..)).prop_map(|(name, port)| Host { name, port })
    }

    fn segment() -> impl Strategy<Value = String> {
        "[^/\\p{Cc}]{1,8}".prop_filter("not a name", |text| text != "." && text != "..")
    }

    proptest! {
        #[test]
        fn any_valid_parts_come_back(
            scheme in "[a-z][a-z0-9+.-]{0,10}",
            user in "\\PC{0,10}",
            secret in any::<String>(),
            hosts in proptest::collection::vec(host(), 1..4),
            segments in proptest::collection::vec(segment(), 0..4),
            options in proptest::collection::btree_map("\\PC{1,8}", any::<String>(), 0..4),
        ) {
            let info = match (user.as_str(), secret.as_str()) {
                ("", "") => String::new(),
                (user, "") => format!("{}@", encoded(user)),
                (user, secret) => format!("{}:{}@", encoded(user), encoded(secret)),
            };
            let list = joined(hosts.iter().map(ToString::to_string), ",");
            let path = joined(segments.iter().map(|segment| encoded(segment)), "/");
            let pair = |(name, value): (&String, &String)| format!("{}={}", encoded(name), encoded(value));
            let query = joined(options.iter().map(pair), "&");
            let location = Location::parse(&format!("{scheme}://{info}{list}/{path}?{query}")).unwrap();

            prop_assert_eq!(location.scheme(), &scheme);
            prop_assert_eq!(location.user().unwrap_or_default(), user);
            prop_assert_eq!(password(&location).unwrap_or_default(), &secret);
            prop_assert_eq!(location.hosts(), &hosts[..]);
            prop_assert_eq!(location.prefix(), segments.join("/"));
            prop_assert_eq!(&location.options, &options);

            let again = Location::parse(&location.to_string()).unwrap();
            prop_assert_eq!(password(&again), location.password().map(|_| "***"));
            prop_assert_eq!((again.user(), again.prefix()), (location.user(), location.prefix()));
            prop_assert_eq!((again.hosts(), &again.options), (location.hosts(), &location.options));
        }

        #[test]
        fn parsing_takes_any_text(any in any::<String>(), text in "\\PC*", near in "[a1:/?#@%,&=\\[\\].]{0,30}") {
            let near = format!("etcd://{near}");
            for url in [&any, &near, &format!("etcd://{any}"), &format!("etcd://{text}@h{any}")] {
                if let Ok(location) = Location::parse(url) {
                    prop_assert_eq!(Location::parse(&location.to_string()).unwrap().to_string(), location.to_string());
                }
            }
        }

        #[test]
        fn no_malformed_url_shows_its_password(
            before in "[a:/?#%,&=]{0,4}",
            head in "[:/?#@%,&=\\[\\]\n ]{0,3}",
            tail in "[:/?#@%,&=\\[\\]\n ]{0,3}",
            after in "[a1:/?#@%,&=\\[\\].]{0,12}",
        ) {
            let shown = shown(&format!("etcd://user{before}:{head}hunter2{tail}@h1{after}"));
            prop_assert!(!shown.contains("hunter2"), "{}", shown);
        }
    }
}
