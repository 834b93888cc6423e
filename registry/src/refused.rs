//! What servers and callers agree on: a call that is not taken is made elsewhere.

#[cfg(any(feature = "reqwest", feature = "tower"))]
use http::{HeaderMap, StatusCode};
#[cfg(any(feature = "reqwest", feature = "tower"))]
use registry_balance::Verdict;

/// Comes with a refusal: with the status 503 over HTTP, with `UNAVAILABLE` as metadata over gRPC.
pub(crate) const REFUSED_HEADER: &str = "x-registry-refused";

/// What an answer of HTTP says of the instance that gave it.
#[cfg(any(feature = "reqwest", feature = "tower"))]
pub(crate) fn judge(status: StatusCode, headers: &HeaderMap) -> Verdict {
    match status.as_u16() {
        _ if headers.contains_key(REFUSED_HEADER) => Verdict::Refused,
        502..=504 => Verdict::Failure,
        _ => Verdict::Success,
    }
}
