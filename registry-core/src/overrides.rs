//! What an operator sets from outside for an instance.

use crate::{Instance, Status};

/// What an operator sets for an instance without owning it: every reader sees it instead of what is registered.
///
/// It is [set](crate::Registry::set_override) for a service and an id, whether or not there is such an instance now, and
/// stays in force until it is [cleared](crate::Registry::clear_override) or its instance has been gone for a day.
///
/// # Examples
/// ```
/// use registry_core::{Override, Status};
///
/// let drained = Override::default().status(Status::Draining);
/// assert_eq!((drained.status, drained.weight), (Some(Status::Draining), None));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Override {
    /// Replaces the instance's status. Defaults to `None`: as registered.
    pub status: Option<Status>,
    /// Replaces the instance's weight. Defaults to `None`: as registered.
    pub weight: Option<u32>,
}

impl Override {
    /// Sets [`status`](Self::status).
    #[must_use]
    pub fn status(self, status: impl Into<Option<Status>>) -> Self {
        Self { status: status.into(), ..self }
    }

    /// Sets [`weight`](Self::weight).
    #[must_use]
    pub fn weight(self, weight: impl Into<Option<u32>>) -> Self {
        Self { weight: weight.into(), ..self }
    }

    /// Whether it sets nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The instance as readers see it.
    pub(crate) fn merged_into(self, instance: &Instance) -> Instance {
        let mut merged = instance.clone();
        merged.status = self.status.unwrap_or(merged.status);
        merged.weight = self.weight.unwrap_or(merged.weight);
        merged
    }
}
