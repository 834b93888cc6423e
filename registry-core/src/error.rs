//! One error for the whole library: what was being done, to what, where, and what a caller can do about it.

use std::{error::Error as StdError, fmt, sync::Arc};

/// The result of everything in this library that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed, as far as a caller would act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The registry was destroyed or its last handle was dropped.
    Closed,
    /// Another owner holds the key, or the registration was withdrawn while the call ran.
    Conflict,
    /// The caller's input is wrong; the message says what is accepted.
    InvalidInput,
    /// Something read from the store is not what this library writes.
    Malformed,
    /// The store knows who we are, or does not, and refuses.
    PermissionDenied,
    /// No answer in time. The operation may have been applied.
    Timeout,
    /// The store cannot be reached or cannot serve now.
    Unavailable,
    /// The store, or this build of the library, cannot do it.
    Unsupported,
}

impl ErrorKind {
    /// The kind as one lower-case word, for logs and machine-readable output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Conflict => "conflict",
            Self::InvalidInput => "invalid_input",
            Self::Malformed => "malformed",
            Self::PermissionDenied => "permission_denied",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Unsupported => "unsupported",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong. Cheap to clone: one failed batch is reported to each of its callers.
///
/// `Display` says what was being done, to what and where; it does not repeat the [source](StdError::source), which
/// is the store client's own error where there is one.
///
/// # Examples
/// ```
/// use registry_core::{ErrorKind, ServiceName};
///
/// let error = ServiceName::parse("").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::InvalidInput);
/// assert!(!error.is_retryable());
/// assert_eq!(error.to_string(), "invalid service name \"\": it is empty");
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    backend: Option<&'static str>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` with a message in lower case and without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), backend: None, source: None }))
    }

    /// Shorthand for [`ErrorKind::InvalidInput`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    /// Names the backend (`etcd`, `memory`, …) that the error comes from. Fluent; for implementors.
    #[must_use]
    pub fn with_backend(self, backend: &'static str) -> Self {
        self.edit(|inner| inner.backend = Some(backend))
    }

    /// Attaches the underlying error. Fluent; for implementors.
    #[must_use]
    pub fn with_source(self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        let source = source.into();
        self.edit(|inner| inner.source = Some(source))
    }

    /// Why it failed.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later without any change: true for [`ErrorKind::Unavailable`] and
    /// [`ErrorKind::Timeout`] only.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Unavailable | ErrorKind::Timeout)
    }

    /// The backend that the error comes from, if it comes from one.
    #[must_use]
    pub fn backend(&self) -> Option<&'static str> {
        self.0.backend
    }

    fn edit(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            change(inner);
            return self;
        }
        // Shared already: keep the whole original, source chain included, behind the edited one.
        let mut inner = Inner {
            kind: self.0.kind,
            message: self.0.message.clone(),
            backend: self.0.backend,
            source: Some(Box::new(SourceOf(self))),
        };
        change(&mut inner);
        Self(Arc::new(inner))
    }
}

/// Shows the source of a shared error as a source in its own right.
struct SourceOf(Error);

impl fmt::Debug for SourceOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for SourceOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.0.source {
            Some(source) => fmt::Display::fmt(source, f),
            None => fmt::Display::fmt(&self.0, f),
        }
    }
}

impl StdError for SourceOf {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.0.source.as_ref().and_then(|source| source.source())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(backend) = self.0.backend {
            write!(f, "{backend}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(backend) = self.0.backend {
            out.field("backend", &backend);
        }
        if let Some(source) = &self.0.source {
            out.field("source", &format_args!("{source}"));
        }
        out.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

/// An error with its sources, on one line: for the log, and for a message about several errors.
pub(crate) struct Chain<'a>(pub(crate) &'a Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_the_backend_and_leaves_the_source_to_the_chain() {
        let error = Error::new(ErrorKind::Unavailable, "cannot register orders/7f3a")
            .with_backend("etcd")
            .with_source("connection refused");
        assert_eq!(error.to_string(), "etcd: cannot register orders/7f3a");
        assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("connection refused"));
        assert!(error.is_retryable());
    }

    #[test]
    fn an_edited_clone_keeps_the_source() {
        let first = Error::new(ErrorKind::Timeout, "late").with_source("no answer");
        let second = first.clone().with_backend("zookeeper");
        assert_eq!(second.to_string(), "zookeeper: late");
        assert_eq!(second.source().map(ToString::to_string).as_deref(), Some("no answer"));
        assert_eq!(first.backend(), None);
    }
}
