//! What servers and callers agree on: a call that is not taken is made elsewhere.

/// Comes with a refusal: with the status 503 over HTTP, with `UNAVAILABLE` as metadata over gRPC.
pub(crate) const REFUSED_HEADER: &str = "x-registry-refused";
