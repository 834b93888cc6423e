//! From the instances of a service to the one to call: balancing, routing, ejection and retries.
//!
//! Applications depend on the facade, `service-registry`, whose feature `balance` is this crate.
//!
//! ```
//! use registry_balance::{Balancer, Strategy};
//! use registry_core::{Instance, Managed, Registry};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> registry_core::Result<()> {
//! let registry = Managed::memory("memory://doc-balance")?;
//! registry.register(Instance::builder("orders", "1").endpoint("http://10.0.0.5:8080").build()?).await?;
//!
//! let orders = Balancer::new(registry.watch("orders").await?, Strategy::RoundRobin)?;
//! let pick = orders.pick()?;
//! assert_eq!(pick.endpoints()[0].authority(), "10.0.0.5:8080");
//! pick.success(); // or failure(), or refused(); dropped, the call was cancelled
//! # Ok(())
//! # }
//! ```
//!
//! A task of the balancer prepares a table at each change of the service; [`Balancer::pick`] reads it without a lock or
//! an allocation, and counts what is in flight. With the feature `metrics`, picks and ejections are counted for the
//! recorder of the `metrics` crate; the facade's README lists them.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod balancer;
mod counter;
mod draw;
mod filter;
mod member;
mod metrics;
mod outlier;
mod pick;
mod retry;
mod ring;
mod table;

pub use self::{
    balancer::{Balancer, BalancerBuilder, Strategy},
    filter::{Fallback, Filter, Route},
    outlier::Outlier,
    pick::Pick,
    retry::{Retry, Verdict},
};
