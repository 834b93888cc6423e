//! What the orchestrator and its children say to each other: a line of JSON each, on their standard input and output.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::names::Generation;

/// A time, in milliseconds of the one clock of this machine.
pub(crate) type Millis = u64;

/// The time by the wall clock. Providers have other clocks, so what they say has no time.
pub(crate) fn now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(Millis::MAX)
}

/// What a provider is told to do. Orders are numbered, and each gets an answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    Register {
        order: u64,
        /// Service, id and generation of each.
        instances: Vec<(String, String, Generation)>,
    },
    Unregister {
        order: u64,
        service: String,
        id: String,
    },
    /// Takes out everything and ends.
    Leave {
        order: u64,
    },
}

/// What a child says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// It runs. Everything that it saw until then it has said.
    Tick {
        at: Millis,
        /// By how much this comes later than it should.
        late: Millis,
    },
    Answer {
        order: u64,
        outcomes: Vec<Outcome>,
    },
    /// A snapshot that a reader was given.
    Saw {
        at: Millis,
        service: String,
        revision: u64,
        freshness: String,
        /// Id and generation of each instance.
        instances: Vec<(String, Generation)>,
    },
    /// For people.
    Event(String),
}

/// What a call came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Done,
    /// Done, and there was nothing of the provider's own to be taken out.
    NotOurs,
    /// The store did not confirm in time: the library goes on with it.
    GoesOn(String),
    /// For good.
    Refused(String),
}

impl Outcome {
    pub(crate) fn of<T>(result: Result<T, registry_core::Error>) -> Self {
        match result {
            Ok(_) => Self::Done,
            Err(error) if error.is_retryable() => Self::GoesOn(error.to_string()),
            Err(error) => Self::Refused(error.to_string()),
        }
    }
}
