//! One classification of everything that can go wrong on the way to ZooKeeper.

use std::{fmt, sync::Arc, time::Duration};

use registry_core::{Error, ErrorKind};
use zookeeper_client::{Error as ClientError, MultiWriteError};

/// How this backend calls itself.
pub(crate) const NAME: &str = "zookeeper";

/// Where the connection is lost under a request of more bytes, it may be for them.
pub(crate) const SUSPECT: usize = 10_000;

/// Why a request has no answer that we can use.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// What the client says.
    Client(ClientError),
    /// No answer within this time. It may have been applied.
    Late(Duration),
    /// There is no connection, for this reason.
    Disconnected(Arc<str>),
    /// The connection was lost under the request. It may have been applied.
    Interrupted,
    /// The same, and the request has so many bytes that a server may have hung up for that.
    HungUp(usize),
    /// The server refuses us, or we it, for this reason.
    Refused(Arc<str>),
    /// The root of the registry cannot be made.
    NoRoot(String, ClientError),
    /// The server cannot do what we need, as far as it tells its version.
    TooOld(Option<String>),
    /// Others changed the same keys, every time.
    Contended,
    /// The registry has given up its session.
    Closed,
}

/// What to do about an error of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Nobody knows whether it was applied.
    Lost,
    /// The identity, or the lack of one, is refused.
    Denied,
    /// A node that must exist does not.
    Absent,
    /// Somebody else was faster: look and try again.
    Overtaken,
    /// The request itself is wrong.
    Invalid,
    /// The server does not know the operation.
    Unknown,
    /// The server answered, and the answer is no, for now.
    Other,
}

/// What to do about an error of the client.
pub(crate) fn classify(error: &ClientError) -> Class {
    match error {
        ClientError::NoAuth | ClientError::AuthFailed => Class::Denied,
        ClientError::NoNode => Class::Absent,
        ClientError::NodeExists | ClientError::BadVersion | ClientError::RuntimeInconsistent => Class::Overtaken,
        ClientError::InvalidAcl
        | ClientError::BadArguments(_)
        | ClientError::NoChildrenForEphemerals
        | ClientError::MarshallingError
        // Somebody made nodes below a record: that record alone is in the way.
        | ClientError::NotEmpty => Class::Invalid,
        ClientError::Unimplemented => Class::Unknown,
        // Custom is an error of the socket, or "no response from connection in …".
        ClientError::ConnectionLoss
        | ClientError::Custom(_)
        | ClientError::SessionMoved
        | ClientError::SessionExpired
        | ClientError::ClientClosed
        | ClientError::NoHosts
        | ClientError::Timeout => Class::Lost,
        // The client says UnexpectedError when its runtime is gone, too.
        _ => Class::Other,
    }
}

impl Failure {
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Client(error) | Self::NoRoot(_, error) => classify(error),
            Self::Refused(_) => Class::Denied,
            Self::TooOld(_) => Class::Unknown,
            Self::Late(_) | Self::Disconnected(_) | Self::Interrupted | Self::HungUp(_) => Class::Lost,
            Self::Contended | Self::Closed => Class::Other,
        }
    }

    /// The same of a request of so many bytes: a server does not say that it finds them too many, it hangs up.
    pub(crate) fn under(self, bytes: usize) -> Self {
        match self {
            Self::Interrupted | Self::Client(ClientError::ConnectionLoss | ClientError::Custom(_))
                if bytes > SUSPECT =>
            {
                Self::HungUp(bytes)
            }
            other => other,
        }
    }

    /// The error that a caller sees: what we were `doing`, and the client's own words as its source.
    pub(crate) fn during(&self, doing: impl Into<String>) -> Error {
        Error::new(self.kind(), doing).with_backend(NAME).with_source(self.to_string())
    }

    fn kind(&self) -> ErrorKind {
        match (self, self.class()) {
            (Self::Late(_) | Self::Client(ClientError::Timeout), _) => ErrorKind::Timeout,
            (_, Class::Denied) => ErrorKind::PermissionDenied,
            (_, Class::Invalid) => ErrorKind::InvalidInput,
            (_, Class::Unknown) => ErrorKind::Unsupported,
            _ => ErrorKind::Unavailable,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => error.fmt(f),
            Self::Late(after) => write!(f, "no answer within {after:?}"),
            Self::Disconnected(why) => write!(f, "no server serves: {why}"),
            Self::Refused(why) => f.write_str(why),
            Self::Interrupted => f.write_str("the connection was lost"),
            Self::HungUp(bytes) => {
                write!(f, "the connection was lost under {bytes} bytes; is the server's jute.maxbuffer smaller?")
            }
            Self::NoRoot(path, error) => write!(f, "cannot make the root {path}: {error}"),
            Self::TooOld(Some(version)) => write!(f, "ZooKeeper 3.6 or later is needed, this is {version}"),
            Self::TooOld(None) => f.write_str("ZooKeeper 3.6 or later is needed, this is an older one"),
            Self::Contended => f.write_str("others changed the same keys, every time"),
            Self::Closed => f.write_str("the session was given up"),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<MultiWriteError> for Failure {
    fn from(error: MultiWriteError) -> Self {
        Self::Client(error.into())
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn every_error_of_the_client_has_its_class_and_kind() {
        use ClientError as E;
        let table = [
            (E::NoAuth, Class::Denied, ErrorKind::PermissionDenied),
            (E::AuthFailed, Class::Denied, ErrorKind::PermissionDenied),
            (E::NoNode, Class::Absent, ErrorKind::Unavailable),
            (E::NodeExists, Class::Overtaken, ErrorKind::Unavailable),
            (E::BadVersion, Class::Overtaken, ErrorKind::Unavailable),
            (E::RuntimeInconsistent, Class::Overtaken, ErrorKind::Unavailable),
            (E::InvalidAcl, Class::Invalid, ErrorKind::InvalidInput),
            (E::BadArguments(&"path"), Class::Invalid, ErrorKind::InvalidInput),
            (E::NotEmpty, Class::Invalid, ErrorKind::InvalidInput),
            (E::Unimplemented, Class::Unknown, ErrorKind::Unsupported),
            (E::ConnectionLoss, Class::Lost, ErrorKind::Unavailable),
            (E::SessionExpired, Class::Lost, ErrorKind::Unavailable),
            (E::SessionMoved, Class::Lost, ErrorKind::Unavailable),
            (E::NoHosts, Class::Lost, ErrorKind::Unavailable),
            (E::Timeout, Class::Lost, ErrorKind::Timeout),
            (E::Throttled, Class::Other, ErrorKind::Unavailable),
            (E::NotReadOnly, Class::Other, ErrorKind::Unavailable),
            (E::QuotaExceeded, Class::Other, ErrorKind::Unavailable),
            (E::UnexpectedError("the runtime is gone".into()), Class::Other, ErrorKind::Unavailable),
        ];
        for (error, class, kind) in table {
            let failure = Failure::Client(error);
            assert_eq!((failure.class(), failure.during("").kind()), (class, kind), "{failure}");
        }
    }

    #[test]
    fn a_caller_sees_what_was_done_and_the_source_says_why() {
        let error = Failure::NoRoot("/a/b".into(), ClientError::NoAuth).during("cannot put orders/1");
        assert_eq!((error.kind(), error.backend()), (ErrorKind::PermissionDenied, Some(NAME)));
        assert_eq!(error.to_string(), "zookeeper: cannot put orders/1");
        assert_eq!(error.source().unwrap().to_string(), "cannot make the root /a/b: not authorized");
        let old = Failure::TooOld(Some("3.5.9".into())).during("cannot follow orders");
        assert_eq!(old.kind(), ErrorKind::Unsupported);
        assert!(old.source().unwrap().to_string().contains("3.6 or later is needed, this is 3.5.9"));
        assert_eq!(Failure::Late(Duration::from_secs(2)).during("cannot list orders").kind(), ErrorKind::Timeout);
        let large = |bytes| Failure::Interrupted.under(bytes).during("cannot put orders/1");
        assert_eq!(large(30_000).kind(), ErrorKind::Unavailable);
        assert!(large(30_000).source().unwrap().to_string().contains("30000 bytes; is the server's jute.maxbuffer"));
        assert_eq!(large(300).source().unwrap().to_string(), "the connection was lost");
    }
}
