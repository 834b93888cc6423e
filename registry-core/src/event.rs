//! The registry's own health, as a stream of events.

use std::time::Duration;

use crate::{Error, Registration, ServiceName};

/// What happens to a registry. Read from [`Registry::events`](crate::Registry::events).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// Looking for a server.
    Connecting,
    /// A server answers.
    Connected {
        /// How long records outlive their owner, as the store granted it.
        ttl: Duration,
    },
    /// The connection is gone; the session may still live.
    Suspended,
    /// The session is over, or must be presumed to be: what was registered under it is being restored.
    SessionLost {
        /// Why.
        cause: Error,
    },
    /// The session is alive again, or a new one took its place.
    SessionRenewed,
    /// A registration came into a new state.
    Registration(Registration),
    /// The view of a service is complete and follows the store.
    Live {
        /// The service.
        service: ServiceName,
    },
    /// The view of a service no longer follows the store; readers keep the last set.
    Stale {
        /// The service.
        service: ServiceName,
        /// Why.
        cause: Error,
    },
    /// Instances that vanished without a word are held back for a while.
    Protected {
        /// The service.
        service: ServiceName,
        /// How many are held.
        held: usize,
    },
    /// The reader of this stream was too slow and missed this many events.
    Missed(u64),
}
