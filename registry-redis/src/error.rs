//! One classification of everything that can go wrong on the way to Redis.

use std::{fmt, sync::Arc, time::Duration};

use redis::{ErrorKind as ClientKind, RedisError};
use registry_core::{Error, ErrorKind};
use registry_tls::is_refusal;

/// How this backend calls itself.
pub(crate) const NAME: &str = "redis";

/// Why a request has no answer that we can use. Cheap to clone: everybody who waited hears of it.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) class: Class,
    text: Arc<str>,
}

/// What to do about a [`Failure`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A certificate or name is wrong here or there.
    Certificate,
    /// Name and password, or what the user may do, are refused.
    Denied,
    /// The server is too old, or arranged otherwise than was said.
    Unfit,
    /// Something in the configuration does not fit the server.
    Misconfigured,
    /// The script is unknown there: send it whole.
    NoScript,
    /// The slot is served elsewhere.
    Moved(String),
    /// The slot is on its way elsewhere: this request goes there.
    Ask(String),
    /// It is a replica now: the primary is elsewhere.
    ReadOnly,
    /// The server cannot serve now, and says why.
    NotNow,
    /// No answer in time. It may have been applied.
    Late,
    /// The connection is gone, or there was none.
    Dropped,
    /// We have left, and nothing is written after that.
    Gone,
    /// The answer is not what was asked for.
    Odd,
}

impl Failure {
    pub(crate) fn new(class: Class, text: impl Into<Arc<str>>) -> Self {
        Self { class, text: text.into() }
    }

    pub(crate) fn late(after: Duration) -> Self {
        Self::new(Class::Late, format!("no answer within {after:?}"))
    }

    pub(crate) fn odd(what: &str) -> Self {
        Self::new(Class::Odd, format!("{what} is not what was asked for"))
    }

    /// The error that a caller sees: what we were `doing`, and the server's own words as its source.
    pub(crate) fn during(&self, doing: impl Into<String>) -> Error {
        let mut message = doing.into();
        if let Some(hint) = self.hint() {
            message.push_str(": ");
            message.push_str(hint);
        }
        Error::new(self.kind(), message).with_backend(NAME).with_source(self.to_string())
    }

    /// Whether asking elsewhere, or for the way there, may help.
    pub(crate) fn is_trouble(&self) -> bool {
        matches!(
            self.class,
            Class::Moved(_) | Class::Ask(_) | Class::ReadOnly | Class::Late | Class::Dropped | Class::NotNow
        )
    }

    fn kind(&self) -> ErrorKind {
        match self.class {
            Class::Certificate | Class::Denied => ErrorKind::PermissionDenied,
            Class::Unfit => ErrorKind::Unsupported,
            Class::Misconfigured => ErrorKind::InvalidInput,
            Class::Late => ErrorKind::Timeout,
            Class::Gone => ErrorKind::Closed,
            Class::NoScript | Class::Moved(_) | Class::Ask(_) | Class::ReadOnly | Class::NotNow => {
                ErrorKind::Unavailable
            }
            Class::Dropped | Class::Odd => ErrorKind::Unavailable,
        }
    }

    /// What the server's word means for whoever runs it.
    fn hint(&self) -> Option<&'static str> {
        let first = self.text.split([' ', ':']).next().unwrap_or_default();
        // A script that fails midway repeats the word of the command that failed.
        let word = if first == "ERR" { known_word(&self.text).unwrap_or(first) } else { first };
        Some(match (word, &self.class) {
            ("LOADING", _) => "the server is still loading its data",
            ("CLUSTERDOWN", _) => "the cluster does not serve this slot",
            ("NOREPLICAS", _) => "the server has too few replicas to take writes (min-replicas-to-write)",
            ("OOM", _) => "the server is full (maxmemory)",
            ("MISCONF", _) => "the server cannot save to disk and takes no writes",
            ("BUSY", _) => "the server is busy with somebody's script",
            ("MASTERDOWN", _) => "the replica has lost its primary",
            ("READONLY", _) => "the server is a replica",
            ("TRYAGAIN", _) => "the slot is being moved",
            (_, Class::Gone) => "this registry has left",
            _ => return None,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<RedisError> for Failure {
    fn from(error: RedisError) -> Self {
        let code = error.code().unwrap_or_default();
        let detail = error.detail().unwrap_or_default();
        let text = if code.is_empty() { error.to_string() } else { format!("{code} {detail}") };
        // A server that does not know a command repeats its arguments, and a password may be one.
        let text = text.split(", with args beginning with").next().unwrap_or_default().to_owned();
        Self::new(classify(&error, code, detail), text)
    }
}

fn classify(error: &RedisError, code: &str, detail: &str) -> Class {
    let said = error.to_string();
    if code.is_empty() && is_refusal(&said) {
        return Class::Certificate;
    }
    let target = || detail.split_whitespace().nth(1).unwrap_or_default().to_owned();
    match code {
        "NOAUTH" | "WRONGPASS" | "NOPERM" => Class::Denied,
        "NOSCRIPT" => Class::NoScript,
        "MOVED" => Class::Moved(target()),
        "ASK" => Class::Ask(target()),
        "READONLY" => Class::ReadOnly,
        "LOADING" | "CLUSTERDOWN" | "NOREPLICAS" | "OOM" | "MISCONF" | "BUSY" | "MASTERDOWN" | "TRYAGAIN" => {
            Class::NotNow
        }
        "NOPROTO" => Class::Unfit,
        "WRONGTYPE" => Class::Misconfigured,
        // A script that fails midway repeats the word of the command that failed, in 6.2 after its own words.
        "ERR" if let Some(word) = known_word(detail) => classify(error, word, detail),
        // Before there were users, a wrong password was said so; since then, that there is none to give.
        "ERR" if detail.contains("unknown command") => Class::Unfit,
        "ERR" if detail.contains("AUTH") || detail.contains("invalid password") => Class::Denied,
        "ERR" if detail.contains("DB index") || detail.contains("SELECT is not allowed") => Class::Misconfigured,
        "" => match error.kind() {
            ClientKind::AuthenticationFailed => Class::Denied,
            ClientKind::RESP3NotSupported => Class::Unfit,
            ClientKind::InvalidClientConfig => Class::Misconfigured,
            ClientKind::Parse | ClientKind::UnexpectedReturnType => Class::Odd,
            _ => Class::Dropped,
        },
        _ => Class::NotNow,
    }
}

/// `Error running script (call to f_…): @user_script: 12: -OOM command not allowed …`
fn known_word(detail: &str) -> Option<&str> {
    let words = ["OOM", "READONLY", "NOREPLICAS", "MISCONF", "MASTERDOWN", "NOPERM", "WRONGTYPE"];
    let spoken = |word: &&str| detail.split(['-', ' ', ':', '\'', '"']).any(|part| part == *word);
    words.into_iter().find(spoken).or_else(|| {
        // So it is said within a script, by 7.0 and by 6.2.
        let refused =
            detail.contains("ACL failure in script") || detail.contains("The user executing the script can't");
        refused.then_some("NOPERM")
    })
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use redis::{ErrorKind as Kind, Value, parse_redis_value};

    use super::*;

    /// A server's word, through the client's own parser.
    fn said(line: &str) -> Failure {
        let value = parse_redis_value(format!("-{line}\r\n").as_bytes());
        value.and_then(Value::extract_error).expect_err("it is an error").into()
    }

    /// As 6.2 says it.
    #[test]
    fn what_stops_a_script_midway_is_explained_too() {
        let script = "ERR Error running script (call to f_1): @user_script:1: @user_script: 1: -";
        for (said_there, class, hint) in [
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                Class::NotNow,
                "the server is full (maxmemory)",
            ),
            ("READONLY You can't write against a read only replica.", Class::ReadOnly, "the server is a replica"),
        ] {
            let failure = said(&format!("{script}{said_there}"));
            assert_eq!((&failure.class, failure.hint()), (&class, Some(hint)), "{failure}");
        }
    }

    #[test]
    fn an_unknown_command_is_not_repeated_with_its_arguments() {
        let failure = said("ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'app' 's3cret'");
        assert!(failure.to_string().ends_with("unknown command 'HELLO'"), "{failure}");
        assert!(!format!("{failure:?}").contains("s3cret"));
        assert_eq!(failure.class, Class::Unfit);
    }

    #[test]
    fn every_word_of_a_server_has_its_class_and_kind() {
        let (denied, unavailable) = (ErrorKind::PermissionDenied, ErrorKind::Unavailable);
        let table = [
            ("NOAUTH Authentication required.", Class::Denied, denied),
            ("WRONGPASS invalid username-password pair or user is disabled.", Class::Denied, denied),
            ("NOPERM this user has no permissions to run the 'evalsha' command", Class::Denied, denied),
            ("NOPERM No permissions to access a channel", Class::Denied, denied),
            ("ERR AUTH <password> called without any password configured", Class::Denied, denied),
            ("ERR ACL failure in script: User a has no permissions to run the 'hset' command", Class::Denied, denied),
            (
                "ERR Error running script (call to f_1): @user_script:1: The user executing the script can't run this \
                 command or subcommand",
                Class::Denied,
                denied,
            ),
            ("LOADING Redis is loading the dataset in memory", Class::NotNow, unavailable),
            ("CLUSTERDOWN Hash slot not served", Class::NotNow, unavailable),
            ("NOREPLICAS Not enough good replicas to write.", Class::NotNow, unavailable),
            ("OOM command not allowed when used memory > 'maxmemory'.", Class::NotNow, unavailable),
            (
                "ERR Error running script (call to f_1): @user_script:31: @user_script: 31: -OOM command not allowed \
                 when used memory > 'maxmemory'.",
                Class::NotNow,
                unavailable,
            ),
            ("MISCONF Redis is configured to save RDB snapshots", Class::NotNow, unavailable),
            ("BUSY Redis is busy running a script.", Class::NotNow, unavailable),
            ("MASTERDOWN Link with MASTER is down", Class::NotNow, unavailable),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Class::NotNow, unavailable),
            ("READONLY You can't write against a read only replica.", Class::ReadOnly, unavailable),
            ("NOSCRIPT No matching script.", Class::NoScript, unavailable),
            ("MOVED 3999 127.0.0.1:6381", Class::Moved("127.0.0.1:6381".to_owned()), unavailable),
            ("ASK 3999 127.0.0.1:6381", Class::Ask("127.0.0.1:6381".to_owned()), unavailable),
            ("ERR max number of clients reached", Class::NotNow, unavailable),
            ("ERR DB index is out of range", Class::Misconfigured, ErrorKind::InvalidInput),
            ("WRONGTYPE Operation against a key holding the wrong kind", Class::Misconfigured, ErrorKind::InvalidInput),
            ("ERR unknown command 'ZMSCORE'", Class::Unfit, ErrorKind::Unsupported),
        ];
        for (line, class, kind) in table {
            let failure = said(line);
            assert_eq!((&failure.class, failure.during("").kind()), (&class, kind), "{line}");
        }
    }

    #[test]
    fn what_the_client_says_is_sorted_too() {
        let of = |error: RedisError| Failure::from(error).class;
        assert_eq!(of(RedisError::from((Kind::AuthenticationFailed, "no"))), Class::Denied);
        assert_eq!(of(RedisError::from((Kind::RESP3NotSupported, "no"))), Class::Unfit);
        assert_eq!(of(std::io::Error::other("invalid peer certificate: UnknownIssuer").into()), Class::Certificate);
        assert_eq!(of(std::io::Error::other("received fatal alert: CertificateRequired").into()), Class::Certificate);
        assert_eq!(of(std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()), Class::Dropped);
    }

    #[test]
    fn a_caller_sees_what_was_done_and_the_source_says_why() {
        let error = said("OOM command not allowed").during("cannot register a/1");
        assert_eq!(error.to_string(), "redis: cannot register a/1: the server is full (maxmemory)");
        assert!(error.source().is_some_and(|source| source.to_string() == "OOM command not allowed"));
        let late = Failure::late(Duration::from_millis(600)).during("cannot list a");
        assert_eq!((late.kind(), late.backend()), (ErrorKind::Timeout, Some(NAME)));
    }
}
