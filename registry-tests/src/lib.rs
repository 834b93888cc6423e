//! What proves that a backend of `service-registry` keeps its promises, for its own backends and for yours.
//!
//! * [`conformance`](mod@conformance): the promises as cases that run on any backend; each becomes a test of its own.
//! * `clusters`, feature `servers`: what happens to stores of several servers, in the same way.
//! * [`harness`]: what the suite needs to know of a store, and to do to it.
//! * [`proxy`]: a network that can be cut, delayed and silenced.
//! * `clock`, feature `servers`: wall clocks that are wrong, for other processes.
//! * `servers`, feature `servers`: real servers that can be killed, frozen and wiped, in containers or as processes.
//!
//! Everything here is for tests: it panics with a message for whoever runs them.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "servers")]
#[cfg_attr(docsrs, doc(cfg(feature = "servers")))]
pub mod clock;
#[cfg(feature = "servers")]
#[cfg_attr(docsrs, doc(cfg(feature = "servers")))]
pub mod clusters;
pub mod conformance;
pub mod harness;
pub mod proxy;
#[cfg(feature = "servers")]
#[cfg_attr(docsrs, doc(cfg(feature = "servers")))]
pub mod servers;
#[cfg(feature = "servers")]
#[cfg_attr(docsrs, doc(cfg(feature = "servers")))]
pub mod storm;
