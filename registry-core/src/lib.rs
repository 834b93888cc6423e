//! Contracts, recovery engine and in-process backend of `service-registry`.
//!
//! Applications depend on the facade, `service-registry`, which re-exports what they need from here. Depend on this
//! crate to write a backend of your own: implement [`Backend`], and [`Managed`] makes a [`Registry`] of it.

mod backend;
mod error;
mod event;
mod instance;
mod layout;
mod location;
mod managed;
pub mod memory;
mod name;
mod options;
mod registration;
mod registry;
pub mod shutdown;
mod snapshot;
mod watcher;

pub use async_trait::async_trait;

pub use self::{
    backend::{
        Backend, Content, Cursor, Departure, Directory, Epoch, Intent, Key, Lifetime, Override, Owner, Record, Renewal,
        SessionEvent, Update, Updates,
    },
    error::{Error, ErrorKind, Result},
    event::Event,
    instance::{DEFAULT_WEIGHT, Endpoint, Instance, InstanceBuilder, Status},
    layout::{Entry, Layout, MAX_RECORD_BYTES, NativeLayout, Place},
    location::{Host, Location},
    managed::Managed,
    name::{InstanceId, MAX_NAME_BYTES, ServiceName, decode_segment, encode_segment},
    options::{Options, Reconcile},
    registration::{Heartbeat, Registration, RegistrationState},
    registry::Registry,
    snapshot::{Change, Freshness, Snapshot},
    watcher::{SnapshotHandle, SnapshotRef, Watcher},
};
