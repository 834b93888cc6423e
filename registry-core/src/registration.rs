//! The provider's side of what users see: the local registered-key set with each key's state.

use std::{fmt, sync::Arc, time::SystemTime};

use crate::{Error, Instance, InstanceId, Key, ServiceName};

/// Where a registration stands.
///
/// ```text
/// Pending ─put─▶ Registered ─lost─▶ Lost ─put─▶ Registered
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RegistrationState {
    /// Wanted, and not yet confirmed by the store.
    Pending,
    /// The store confirmed it.
    Registered,
    /// It is not registered now, as far as this process knows, although it was or the store was reached. The registry
    /// is at work on it.
    Lost {
        /// Since when, by the clock of this machine.
        since: SystemTime,
        /// Why. [`ErrorKind::Conflict`](crate::ErrorKind::Conflict): another owner has taken the key.
        cause: Error,
    },
}

impl RegistrationState {
    /// Whether the store confirmed it and nothing is known against it.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        matches!(self, Self::Registered)
    }

    /// The state as one lower-case word.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Registered => "registered",
            Self::Lost { .. } => "lost",
        }
    }
}

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One key of the local registered-key set.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Registration {
    /// What is wanted, or, after an update whose caller was told that it failed for good, what is in force.
    pub instance: Arc<Instance>,
    /// Where it stands.
    pub state: RegistrationState,
}

impl Registration {
    pub(crate) fn new(instance: Arc<Instance>, state: RegistrationState) -> Self {
        Self { instance, state }
    }

    /// The service of the instance.
    #[must_use]
    pub fn service(&self) -> &ServiceName {
        &self.instance.service
    }

    /// The id of the instance.
    #[must_use]
    pub fn id(&self) -> &InstanceId {
        &self.instance.id
    }
}

/// What one [`Registry::heartbeat`](crate::Registry::heartbeat) did, key by key.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Heartbeat {
    /// Still there, and renewed.
    pub renewed: Vec<Key>,
    /// Was missing, or not confirmed yet, and is registered now.
    pub reregistered: Vec<Key>,
    /// Could not be renewed or registered again now. The registry goes on trying.
    pub failed: Vec<(Key, Error)>,
}
