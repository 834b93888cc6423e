//! Taking one registration out in good order.
//!
//! ```text
//! registered ──mark──▶ draining ──grace──▶ unregistered
//!      ▲                   │
//!      └───called off──────┘ register, set_status
//! ```

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;

use super::Shared;
use crate::{Backend, ErrorKind, Key, RegistrationState, Result, Status, error::Chain, shutdown::LONGEST_GRACE};

impl<B: Backend> Shared<B> {
    pub(super) async fn drain(&self, key: &Key, grace: Duration) -> Result<bool> {
        if grace.is_zero() {
            return self.withdraw(key, |_| true).await;
        }
        let end = Instant::now() + grace.min(LONGEST_GRACE);
        let Some(marked) = self.change(key, |instance| instance.status = Status::Draining)? else { return Ok(false) };
        self.wake.notify_one();
        match timeout_at(end, self.answered("drain", marked)).await {
            // Another owner has the key, and readers look at that one: there is nobody to wait for.
            Ok(Err(error)) if error.kind() == ErrorKind::Conflict => {
                let is_lost = |state: &RegistrationState| matches!(state, RegistrationState::Lost { .. });
                return self.withdraw(key, |registration| is_lost(&registration.state)).await;
            }
            Ok(Err(error)) if !error.is_retryable() => return Err(error),
            // The mark is on its way, and so is the end of the grace.
            Ok(Err(error)) => debug!(%key, error = %Chain(&error), "not marked as draining yet"),
            Ok(Ok(())) | Err(_) => {}
        }
        tokio::select! {
            () = sleep_until(end) => {}
            () = self.stop.cancelled() => {}
        }
        self.withdraw(key, |registration| registration.instance.status == Status::Draining).await
    }
}
