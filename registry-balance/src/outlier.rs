//! Ejection: an instance that fails its callers gets no traffic for a while.

use std::time::Duration;

use registry_core::{Error, Result};
use tokio::time::Instant;

/// When an instance is ejected, and for how long. Turned on by [`BalancerBuilder::outlier`](crate::BalancerBuilder::outlier).
///
/// Judged by this process alone, from what its picks report. After its time, an ejected instance gets one call at a time;
/// the first success brings it back, a failure ejects it again, for longer. A record that changes, or is registered
/// again, is forgiven everything.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outlier {
    /// This many failures in a row eject. Defaults to 5; 0 turns the rule off.
    pub consecutive: u32,
    /// This share of failures within [`window`](Self::window) ejects. Defaults to 0.5; above 1 the rule is off.
    pub failure_rate: f64,
    /// But not of fewer calls than this. Defaults to 20.
    pub min_calls: u32,
    /// Defaults to 10 s.
    pub window: Duration,
    /// How long the first ejection lasts; each further one twice as long. Defaults to 10 s.
    pub base_ejection: Duration,
    /// The longest ejection. Defaults to 5 min.
    pub max_ejection: Duration,
    /// The largest share of the service's instances that is ejected at once. Defaults to 0.5; all are never ejected.
    pub max_ejected: f64,
}

impl Default for Outlier {
    fn default() -> Self {
        Self {
            consecutive: 5,
            failure_rate: 0.5,
            min_calls: 20,
            window: Duration::from_secs(10),
            base_ejection: Duration::from_secs(10),
            max_ejection: Duration::from_secs(300),
            max_ejected: 0.5,
        }
    }
}

impl Outlier {
    /// Sets [`consecutive`](Self::consecutive).
    #[must_use]
    pub fn consecutive(self, consecutive: u32) -> Self {
        Self { consecutive, ..self }
    }

    /// Sets [`failure_rate`](Self::failure_rate).
    #[must_use]
    pub fn failure_rate(self, failure_rate: f64) -> Self {
        Self { failure_rate, ..self }
    }

    /// Sets [`min_calls`](Self::min_calls).
    #[must_use]
    pub fn min_calls(self, min_calls: u32) -> Self {
        Self { min_calls, ..self }
    }

    /// Sets [`window`](Self::window).
    #[must_use]
    pub fn window(self, window: Duration) -> Self {
        Self { window, ..self }
    }

    /// Sets [`base_ejection`](Self::base_ejection).
    #[must_use]
    pub fn base_ejection(self, base_ejection: Duration) -> Self {
        Self { base_ejection, ..self }
    }

    /// Sets [`max_ejection`](Self::max_ejection).
    #[must_use]
    pub fn max_ejection(self, max_ejection: Duration) -> Self {
        Self { max_ejection, ..self }
    }

    /// Sets [`max_ejected`](Self::max_ejected).
    #[must_use]
    pub fn max_ejected(self, max_ejected: f64) -> Self {
        Self { max_ejected, ..self }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let share = |name: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                return Ok(());
            }
            Err(Error::invalid(format!("invalid {name} {value}: expected a number from 0 on")))
        };
        share("failure_rate", self.failure_rate)?;
        share("max_ejected", self.max_ejected)?;
        for (name, value) in
            [("window", self.window), ("base_ejection", self.base_ejection), ("max_ejection", self.max_ejection)]
        {
            if value.is_zero() || value > MOST {
                return Err(Error::invalid(format!(
                    "invalid {name} {value:?}: expected more than 0 s and at most 1 d"
                )));
            }
        }
        Ok(())
    }

    /// How many of `of` instances may be ejected at once.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a small number")]
    pub(crate) fn most(&self, of: usize) -> usize {
        let share = (of as f64 * self.max_ejected.min(1.0)).floor() as usize;
        share.min(of.saturating_sub(1))
    }

    fn lasting(&self, strikes: u32) -> Duration {
        let factor = 2_u32.saturating_pow(strikes.saturating_sub(1));
        self.base_ejection.saturating_mul(factor).min(self.max_ejection)
    }
}

const MOST: Duration = Duration::from_secs(24 * 60 * 60);

/// Where an instance stands with its callers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Standing {
    phase: Phase,
    /// How often it was ejected, forgotten once it has been well for as long as the last time lasted.
    strikes: u32,
    well_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Trusted,
    Ejected {
        until: Instant,
    },
    /// One call at a time, until one says how it is.
    Tried,
}

impl Standing {
    pub(crate) fn is_ejected(&self) -> bool {
        matches!(self.phase, Phase::Ejected { .. })
    }

    pub(crate) fn is_tried(&self) -> bool {
        self.phase == Phase::Tried
    }

    pub(crate) fn is_trusted(&self) -> bool {
        self.phase == Phase::Trusted
    }

    /// Ejects it; the time is told back.
    pub(crate) fn eject(&mut self, rules: &Outlier, now: Instant) -> Duration {
        if self.well_since.is_some_and(|since| now.duration_since(since) >= rules.lasting(self.strikes)) {
            self.strikes = 0;
        }
        self.strikes = self.strikes.saturating_add(1);
        let lasting = rules.lasting(self.strikes);
        self.phase = Phase::Ejected { until: now + lasting };
        self.well_since = None;
        lasting
    }

    /// A call that was tried went well.
    pub(crate) fn trust(&mut self, now: Instant) {
        self.phase = Phase::Trusted;
        self.well_since = Some(now);
    }

    /// Tries it if its time is over; says when it will be, if it is not.
    pub(crate) fn release(&mut self, now: Instant) -> Option<Instant> {
        match self.phase {
            Phase::Ejected { until } if until <= now => {
                self.phase = Phase::Tried;
                None
            }
            Phase::Ejected { until } => Some(until),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ejections_grow_to_the_bound_and_are_forgotten() {
        let rules = Outlier { max_ejection: Duration::from_secs(35), ..Outlier::default() };
        let mut standing = Standing::default();
        let mut now = Instant::now();
        for seconds in [10, 20, 35, 35] {
            assert_eq!(standing.eject(&rules, now), Duration::from_secs(seconds));
            assert!(standing.is_ejected() && standing.release(now).is_some());
            now += Duration::from_secs(seconds);
            assert_eq!(standing.release(now), None);
            assert!(standing.is_tried());
        }
        standing.trust(now);
        now += Duration::from_secs(34);
        assert_eq!(standing.eject(&rules, now), Duration::from_secs(35), "well for less than it was ejected for");
        now += Duration::from_secs(35);
        standing.release(now);
        standing.trust(now);
        now += Duration::from_secs(35);
        assert_eq!(standing.eject(&rules, now), Duration::from_secs(10));
    }

    #[test]
    fn all_are_never_ejected() {
        let all = Outlier { max_ejected: 7.0, ..Outlier::default() };
        assert_eq!([0, 1, 2, 10].map(|of| all.most(of)), [0, 0, 1, 9]);
        assert_eq!([1, 2, 3, 10].map(|of| Outlier::default().most(of)), [0, 1, 1, 5]);
        let error = Outlier { max_ejected: f64::NAN, ..all }.validate().unwrap_err();
        assert!(error.to_string().contains("max_ejected"), "{error}");
    }
}
