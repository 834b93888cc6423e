//! One classification of everything that can go wrong on the way to etcd.
//!
//! gRPC codes alone do not tell: etcd says "wrong password", "stale token" and "lease gone" with codes that mean other
//! things elsewhere, and the client's TLS errors differ from a refused connection only in the text of their source. So
//! the texts count, and the order of the tests matters.

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use etcd_client::Error as ClientError;
use registry_core::{Error, ErrorKind};
use registry_tls::is_refusal;
use tonic::Code;

/// How this backend calls itself.
pub(crate) const NAME: &str = "etcd";

/// Why a request has no answer that we can use.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What the client says.
    Client(ClientError),
    /// No answer within this time. It may have been applied.
    Late(Duration),
    /// The two ends do not agree about certificates, in the words of the TLS library.
    Refused(Arc<str>),
    /// The endpoint under a stream is no longer the current one.
    Moved,
    /// The store is behind what we have seen of it: it was wiped or restored.
    Rewound,
    /// Others changed the same keys, every time.
    Contended,
    /// No endpoint serves; one of them said this.
    Nobody(String),
}

/// What to do about a [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A certificate or name is wrong here or there: another endpoint may be right, trying again is not.
    Certificate,
    /// Name and password, or the role, are refused.
    Denied,
    /// The token is stale or absent: sign in again.
    Token,
    /// The store has no users: go on without one.
    NoUsers,
    /// The lease is gone: grant another.
    LeaseGone,
    /// History before the wanted revision is gone: read anew.
    Compacted,
    /// The wanted revision is yet to come: this is another history.
    Future,
    /// The answer is larger than we take: ask for less.
    AnswerTooLarge,
    /// The request is larger than the store takes.
    RequestTooLarge,
    /// The store has no space left.
    Full,
    /// Try another endpoint; the request may have been applied.
    Elsewhere,
    /// The store answered, and the answer is no.
    Other,
}

/// What to do about an error of the client.
pub(crate) fn classify(error: &ClientError) -> Class {
    let text = render(error);
    let says = |part: &str| text.contains(part);
    match (error, code(error)) {
        _ if is_refusal(&text) => Class::Certificate,
        (ClientError::TransportError(_) | ClientError::InvalidArgs(_) | ClientError::InvalidUri(_), _) => {
            Class::Certificate
        }
        (_, Some(Code::PermissionDenied)) => Class::Denied,
        _ if says("permission denied") || says("authentication failed") => Class::Denied,
        (_, Some(Code::Unauthenticated)) => Class::Token,
        _ if says("invalid auth token") || says("auth store is old") || says("user name is empty") => Class::Token,
        _ if says("authentication is not enabled") => Class::NoUsers,
        _ if says("lease not found") => Class::LeaseGone,
        _ if says("has been compacted") => Class::Compacted,
        _ if says("future revision") => Class::Future,
        (_, Some(Code::OutOfRange)) if says("too large") => Class::AnswerTooLarge,
        _ if says("larger than max") || says("request is too large") => Class::RequestTooLarge,
        _ if says("space exceeded") => Class::Full,
        (_, Some(Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded)) => Class::Elsewhere,
        (_, Some(Code::Unknown | Code::Internal | Code::Aborted) | None) => Class::Elsewhere,
        _ => Class::Other,
    }
}

impl Failure {
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Client(error) => classify(error),
            Self::Refused(_) => Class::Certificate,
            Self::Rewound => Class::Future,
            Self::Late(_) | Self::Moved | Self::Contended | Self::Nobody(_) => Class::Elsewhere,
        }
    }

    /// The error that a caller sees: what we were `doing`, and the client's own words as its source.
    pub(crate) fn during(&self, doing: impl Into<String>) -> Error {
        let class = self.class();
        let mut message = doing.into();
        if class == Class::Full {
            message.push_str(": the store is full");
        }
        Error::new(self.kind(class), message).with_backend(NAME).with_source(self.to_string())
    }

    fn kind(&self, class: Class) -> ErrorKind {
        let Self::Client(error) = self else {
            return match self {
                Self::Late(_) => ErrorKind::Timeout,
                Self::Refused(_) => ErrorKind::PermissionDenied,
                _ => ErrorKind::Unavailable,
            };
        };
        match class {
            Class::Certificate | Class::Denied => ErrorKind::PermissionDenied,
            // We signed in and it is stale again already; or there is nobody to sign in as.
            Class::Token if render(error).contains("user name is empty") => ErrorKind::PermissionDenied,
            Class::RequestTooLarge => ErrorKind::InvalidInput,
            Class::Elsewhere | Class::Other => match code(error) {
                Some(Code::DeadlineExceeded) => ErrorKind::Timeout,
                // The client's own limit on a request comes as this code.
                Some(Code::Cancelled) if render(error).contains("Timeout expired") => ErrorKind::Timeout,
                Some(Code::InvalidArgument) => ErrorKind::InvalidInput,
                Some(Code::Unimplemented) => ErrorKind::Unsupported,
                _ => ErrorKind::Unavailable,
            },
            _ => ErrorKind::Unavailable,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => f.write_str(&render(error)),
            Self::Late(after) => write!(f, "no answer within {after:?}"),
            Self::Refused(why) => f.write_str(why),
            Self::Moved => f.write_str("moved to another endpoint"),
            Self::Rewound => f.write_str("the store is behind what was seen of it"),
            Self::Contended => f.write_str("others changed the same keys, every time"),
            Self::Nobody(said) => write!(f, "no endpoint serves: {said}"),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

fn code(error: &ClientError) -> Option<Code> {
    match error {
        ClientError::GRpcStatus(status) => Some(status.code()),
        _ => None,
    }
}

/// The client's error in one line, with the chain of its sources: only there does it say "connection refused".
pub(crate) fn render(error: &ClientError) -> String {
    let (mut text, mut source) = match error {
        ClientError::GRpcStatus(status) => (format!("{:?}: {}", status.code(), status.message()), status.source()),
        ClientError::TransportError(error) => (error.to_string(), error.source()),
        other => (other.to_string(), None),
    };
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use tonic::Status;

    use super::*;

    fn status(code: Code, message: &str) -> Failure {
        Failure::Client(ClientError::GRpcStatus(Status::new(code, message)))
    }

    #[test]
    fn every_answer_of_a_server_has_its_class_and_kind() {
        use Code::*;
        let denied = ErrorKind::PermissionDenied;
        let unavailable = ErrorKind::Unavailable;
        let table = [
            (Unavailable, "invalid peer certificate: UnknownIssuer", Class::Certificate, denied),
            (PermissionDenied, "etcdserver: permission denied", Class::Denied, denied),
            (InvalidArgument, "etcdserver: authentication failed, invalid user ID or password", Class::Denied, denied),
            (Unauthenticated, "etcdserver: invalid auth token", Class::Token, unavailable),
            (InvalidArgument, "etcdserver: revision of auth store is old", Class::Token, unavailable),
            (InvalidArgument, "etcdserver: user name is empty", Class::Token, denied),
            (FailedPrecondition, "etcdserver: authentication is not enabled", Class::NoUsers, unavailable),
            (NotFound, "etcdserver: requested lease not found", Class::LeaseGone, unavailable),
            (OutOfRange, "etcdserver: mvcc: required revision has been compacted", Class::Compacted, unavailable),
            (OutOfRange, "etcdserver: mvcc: required revision is a future revision", Class::Future, unavailable),
            (OutOfRange, "Error, decoded message length too large: found 9 bytes", Class::AnswerTooLarge, unavailable),
            (
                ResourceExhausted,
                "grpc: received message larger than max",
                Class::RequestTooLarge,
                ErrorKind::InvalidInput,
            ),
            (InvalidArgument, "etcdserver: request is too large", Class::RequestTooLarge, ErrorKind::InvalidInput),
            (ResourceExhausted, "etcdserver: mvcc: database space exceeded", Class::Full, unavailable),
            (ResourceExhausted, "etcdserver: too many requests", Class::Other, unavailable),
            (Unavailable, "etcdserver: leader changed", Class::Elsewhere, unavailable),
            (Cancelled, "Timeout expired", Class::Elsewhere, ErrorKind::Timeout),
            (Unknown, "transport error", Class::Elsewhere, unavailable),
            (InvalidArgument, "etcdserver: duplicate key given in txn request", Class::Other, ErrorKind::InvalidInput),
            (Unimplemented, "unknown service", Class::Other, ErrorKind::Unsupported),
        ];
        for (code, message, class, kind) in table {
            let failure = status(code, message);
            assert_eq!((failure.class(), failure.during("").kind()), (class, kind), "{message}");
        }
    }

    #[test]
    fn what_comes_in_a_stream_is_told_by_its_text() {
        let reason = |text: &str| Failure::Client(ClientError::WatchError(text.to_owned()));
        assert_eq!(
            reason("rpc error: code = Unauthenticated desc = etcdserver: invalid auth token").class(),
            Class::Token
        );
        assert_eq!(
            reason("rpc error: code = PermissionDenied desc = etcdserver: permission denied").class(),
            Class::Denied
        );
        assert_eq!(reason("the stream ended").class(), Class::Elsewhere);
        assert_eq!(
            Failure::Client(ClientError::LeaseKeepAliveError("lease not found".into())).class(),
            Class::LeaseGone
        );
    }

    #[test]
    fn a_caller_sees_what_was_done_and_the_source_says_why() {
        let error =
            status(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded").during("cannot put a/1");
        assert_eq!(error.to_string(), "etcd: cannot put a/1: the store is full");
        assert!(error.source().is_some_and(|source| source.to_string().contains("database space exceeded")));
        let late = Failure::Late(Duration::from_millis(600)).during("cannot list a");
        assert_eq!((late.kind(), late.backend()), (ErrorKind::Timeout, Some(NAME)));
    }
}
