//! placeholder

pub mod conformance;
pub mod harness;
pub mod proxy;
#[cfg(feature = "servers")]
pub mod servers;
