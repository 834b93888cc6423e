//! Contracts, recovery engine and in-process backend of `service-registry`.
//!
//! Applications depend on the facade, `service-registry`, which re-exports what they need from here. Depend on this
//! crate to write a backend of your own: implement [`Backend`], and [`Managed`] makes a [`Registry`] of it.
//!
//! ```
//! use registry_core::{Instance, Managed, Registry};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> registry_core::Result<()> {
//! let registry = Managed::memory("memory://shop?ttl=10s")?;
//! registry.register(Instance::builder("orders", "7f3a").endpoint("http://10.0.0.5:8080").build()?).await?;
//! assert_eq!(registry.discover("orders").await?.available().count(), 1);
//! # Ok(())
//! # }
//! ```
//!
//! | who | contract | what it may assume |
//! | --- | --- | --- |
//! | users | [`Registry`], [`Watcher`], [`Snapshot`] | registrations come back by themselves; lists never lie by being empty |
//! | stores | [`Backend`] | it may fail at any time with an `Err`; what to do about it is not its business |
//! | formats | [`Layout`] | everything that spells a path or a byte of a record goes through it |
//!
//! Features: `cron` lets [`Options::reconcile`] be a cron expression; `metrics` tells the recorder of the `metrics` crate
//! what the facade's README lists. MSRV: 1.89.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod advertise;
mod backend;
mod condition;
mod error;
mod event;
mod few;
#[cfg(test)]
mod fuzz;
pub mod health;
mod instance;
mod layout;
#[cfg(feature = "metrics")]
mod level;
mod location;
mod malformed;
mod managed;
pub mod memory;
mod name;
mod options;
mod overrides;
mod registration;
mod registry;
pub mod shutdown;
mod snapshot;
mod watcher;

pub use async_trait::async_trait;

/// For `registry-balance`: no part of what is promised to stay.
#[cfg(feature = "metrics")]
#[doc(hidden)]
pub use self::level::Level;

pub use self::{
    backend::{
        Backend, Content, Cursor, Departure, Directory, Epoch, Intent, Key, Lifetime, Owner, Record, Renewal,
        SessionEvent, Update, Updates,
    },
    condition::{Health, ServiceHealth},
    error::{Error, ErrorKind, Result},
    event::Event,
    few::Few,
    instance::{DEFAULT_WEIGHT, Endpoint, Instance, InstanceBuilder, Metadata, Status},
    layout::{Entry, Layout, MAX_RECORD_BYTES, NativeLayout, Place},
    location::{Host, Location},
    malformed::Malformed,
    managed::Managed,
    name::{InstanceId, MAX_NAME_BYTES, ServiceName, decode_segment, encode_segment},
    options::{Options, Reconcile},
    overrides::Override,
    registration::{Heartbeat, Registration, RegistrationState},
    registry::Registry,
    snapshot::{Change, Freshness, Snapshot},
    watcher::{SnapshotHandle, SnapshotRef, Watcher},
};
