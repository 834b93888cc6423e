//! Within which time what must hold, in milliseconds: the suite's own bounds, for the options in use, and what a machine
//! adds that is busy with a dozen processes.

use std::time::Duration;

use registry_core::{Options, Reconcile};
use registry_tests::{conformance::support, harness::Harness};

use crate::protocol::Millis;

const SECOND: Duration = Duration::from_secs(1);
/// What a busy machine adds to each.
const BUSY: Duration = SECOND;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// What the store confirmed is shown by its readers.
    pub(crate) shown: Millis,
    /// A provider whose way to the store is free again, or who lost its session, has everything registered.
    pub(crate) restored: Millis,
    /// What somebody deleted past the library is found missing and is registered again.
    pub(crate) repaired: Millis,
    /// A reader whose way to the store is free again shows what is true.
    pub(crate) resumed: Millis,
    /// What nobody keeps alive is gone.
    pub(crate) gone: Millis,
    /// The same after the store was away, or nobody was there to look: owners get their time to come back first.
    pub(crate) gone_after_outage: Millis,
    /// For so long a reader may hold what is gone.
    pub(crate) protection: Millis,
    /// A call has its answer, whatever happens.
    pub(crate) answered: Millis,
    /// Everything is as it should be once all faults are over.
    pub(crate) calm: Millis,
}

impl Bounds {
    pub(crate) fn of<H: Harness>() -> Self {
        let options = support::options::<H>();
        let request = options.request_timeout;
        let gone = support::gone::<H>() + BUSY;
        let gone_after_outage = options.ttl + gone;
        // An attempt from before may have to time out first.
        let restored = request + support::restored::<H>() + BUSY;
        let resumed = request + SECOND + support::soon::<H>() + BUSY;
        Self {
            shown: millis(support::soon::<H>() + BUSY),
            restored: millis(restored),
            repaired: millis(support::RECONCILE + restored),
            resumed: millis(resumed),
            gone: millis(gone),
            gone_after_outage: millis(gone_after_outage),
            protection: millis(options.protection() + support::soon::<H>()),
            answered: millis(2 * request + H::slack() + BUSY),
            calm: millis(gone_after_outage + options.protection() + resumed),
        }
    }
}

/// The options of the children, as a connection string spells them.
pub(crate) fn query(options: &Options) -> String {
    let reconcile = match &options.reconcile {
        Reconcile::Every(period) => format!("&reconcile={}ms", period.as_millis()),
        _ => String::new(),
    };
    format!(
        "ttl={}ms&request_timeout={}ms&connect_timeout={}ms{reconcile}",
        options.ttl.as_millis(),
        options.request_timeout.as_millis(),
        options.connect_timeout.as_millis(),
    )
}

pub(crate) fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}
