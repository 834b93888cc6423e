//! Full-jitter back-off: each delay is drawn from zero to a ceiling that doubles up to a cap, so that clients which
//! failed together do not come back together.

use std::time::Duration;

use rand::Rng;

/// A random part of `whole`, both ends included.
pub(crate) fn part_of(whole: Duration) -> Duration {
    Duration::from_nanos(rand::rng().random_range(0..=u64::try_from(whole.as_nanos()).unwrap_or(u64::MAX)))
}

#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(base: Duration, cap: Duration) -> Self {
        Self { base: base.min(cap), cap, failures: 0 }
    }

    /// The delay after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let ceiling = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        part_of(ceiling)
    }

    /// The longest delay that [`next`](Self::next) may draw now.
    pub(crate) fn ceiling(&self) -> Duration {
        self.base.saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(self.cap)
    }

    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_doubles_from_the_base_to_the_cap_and_no_delay_is_above_it() {
        let (base, cap) = (Duration::from_millis(100), Duration::from_secs(5));
        let mut backoff = Backoff::new(base, cap);
        for expected in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let ceiling = backoff.ceiling();
            assert_eq!(ceiling, Duration::from_millis(expected));
            assert!(backoff.next() <= ceiling);
        }
        for _ in 0..100 {
            assert!(backoff.next() <= cap);
        }
        backoff.reset();
        assert_eq!(backoff.ceiling(), base);
    }

    #[test]
    fn delays_spread_over_the_whole_range() {
        let whole = Duration::from_secs(1);
        let drawn: Vec<_> = (0..1000).map(|_| part_of(whole)).collect();
        assert!(drawn.iter().any(|delay| *delay < whole / 10) && drawn.iter().any(|delay| *delay > whole * 9 / 10));
        assert_eq!(part_of(Duration::ZERO), Duration::ZERO);
    }
}
