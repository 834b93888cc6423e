//! Calls that are made again elsewhere: never twice at the same instance, and within a budget.

use std::{fmt, sync::Arc, time::Duration};

use registry_core::{Instance, InstanceId, Result};
use tower::retry::budget::{Budget, TpsBudget};

use crate::Balancer;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The instance did its part, whatever it answered.
    Success,
    /// The instance did not take the call. Safe to make elsewhere, and no failure of the instance.
    Refused,
    /// The instance failed, and the call is safe to make again, because it does no harm twice or never got there.
    Retry,
    /// The instance failed, and the call must not be made again.
    Failure,
}

/// How often calls are made again elsewhere. Cheap to clone; clones share the budget.
///
/// The budget is what keeps retries from making an outage worse: by default, calls may be repeated for a fifth of all
/// calls of the last ten seconds, and ten times a second besides.
///
/// # Examples
/// ```
/// use registry_balance::{Balancer, Retry, Strategy, Verdict};
/// use registry_core::{Instance, Managed, Registry};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry = Managed::memory("memory://doc-retry")?;
/// registry.register(Instance::builder("orders", "broken").build()?).await?;
/// registry.register(Instance::builder("orders", "well").build()?).await?;
/// let orders = Balancer::new(registry.watch("orders").await?, Strategy::RoundRobin)?;
/// # orders.ready(2).await;
///
/// let retry = Retry::default();
/// let judge = |answer: &Result<u32, &str>| if answer.is_ok() { Verdict::Success } else { Verdict::Retry };
/// for _ in 0..2 {
///     let answer = retry.call(&orders, judge, async |instance| {
///         if instance.id.as_str() == "well" { Ok(7) } else { Err("broken") }
///     });
///     assert_eq!(answer.await?, Ok(7));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Retry {
    attempts: usize,
    budget: Arc<TpsBudget>,
}

impl Retry {
    /// At most this many attempts in all for a call, the first one included; at least one is made.
    #[must_use]
    pub fn attempts(mut self, attempts: usize) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// Another budget: so many retries a second in any case, up to 1000, and this share of the calls besides, up to
    /// 1000 to one. Both are bounded to what can be counted.
    #[must_use]
    pub fn budget(mut self, per_second: u32, share: f32) -> Self {
        let share = if share.is_finite() { share.clamp(0.0, 1000.0) } else { 0.0 };
        self.budget = Arc::new(TpsBudget::new(WINDOW, per_second.min(1000), share));
        self
    }

    /// Makes a call at an instance that the balancer picks, and, as long as the verdict and the budget allow, at others.
    /// Answers what the last attempt did.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](registry_core::ErrorKind::Unavailable) if there was nobody to call in the first
    /// place.
    ///
    /// # Cancel safety
    /// Dropped, the attempt under way counts as cancelled.
    pub async fn call<T, F: Future<Output = T>>(
        &self,
        balancer: &Balancer,
        judge: impl Fn(&T) -> Verdict,
        mut attempt: impl FnMut(Arc<Instance>) -> F,
    ) -> Result<T> {
        let mut pick = balancer.pick()?;
        self.budget.deposit();
        let mut tried: Vec<InstanceId> = Vec::new();
        loop {
            let answer = attempt(pick.instance().clone()).await;
            let id = pick.id().clone();
            match judge(&answer) {
                Verdict::Success => {
                    pick.success();
                    return Ok(answer);
                }
                Verdict::Failure => {
                    pick.failure();
                    return Ok(answer);
                }
                Verdict::Refused => pick.refused(),
                Verdict::Retry => pick.failure(),
            }
            tried.push(id);
            if tried.len() >= self.attempts || !self.budget.withdraw() {
                return Ok(answer);
            }
            pick = match balancer.pick_other(&tried) {
                Ok(pick) => pick,
                Err(_) => return Ok(answer),
            };
        }
    }
}

const WINDOW: Duration = Duration::from_secs(10);

impl Default for Retry {
    /// Three attempts, and the budget above.
    fn default() -> Self {
        Self { attempts: 3, budget: Arc::new(TpsBudget::new(WINDOW, 10, 0.2)) }
    }
}

impl fmt::Debug for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry").field("attempts", &self.attempts).finish_non_exhaustive()
    }
}
