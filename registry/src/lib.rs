// It shows code that needs these features, and all of it is compiled.
#![cfg_attr(
    all(feature = "axum", feature = "reqwest", feature = "tonic", feature = "tower"),
    doc = include_str!("../README.md")
)]
#![cfg_attr(
    not(all(feature = "axum", feature = "reqwest", feature = "tonic", feature = "tower")),
    doc = "Service registration and discovery over the store that you already run; its README is here if all features are on."
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "axum")]
#[cfg_attr(docsrs, doc(cfg(feature = "axum")))]
pub mod axum;
mod connector;
#[cfg(feature = "tower")]
mod refusal;
#[cfg(any(feature = "reqwest", feature = "tonic", feature = "tower"))]
mod refused;
#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub mod reqwest;
mod serve;
#[cfg(any(feature = "tonic", feature = "tower"))]
mod targets;
#[cfg(feature = "tonic")]
#[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
pub mod tonic;
#[cfg(feature = "tower")]
#[cfg_attr(docsrs, doc(cfg(feature = "tower")))]
pub mod tower;

pub use registry_core::{
    Change, DEFAULT_WEIGHT, Endpoint, Error, ErrorKind, Event, Freshness, Health, Heartbeat, Host, Instance,
    InstanceBuilder, InstanceId, Key, Location, Managed, Metadata, Options, Override, Reconcile, Registration,
    RegistrationState, Registry, Result, ServiceHealth, ServiceName, Snapshot, SnapshotHandle, SnapshotRef, Status,
    Watcher, advertise, health, memory, shutdown,
};

/// What a backend of your own is made of; see [`Backend`](backend::Backend).
pub mod backend {
    pub use registry_core::{
        Backend, Content, Cursor, Departure, Directory, Entry, Epoch, Intent, Layout, Lifetime, MAX_NAME_BYTES,
        MAX_RECORD_BYTES, NativeLayout, Owner, Place, Record, Renewal, SessionEvent, Update, Updates, async_trait,
        decode_segment, encode_segment,
    };
}

/// The etcd backend and its typed configuration.
#[cfg(feature = "etcd")]
#[cfg_attr(docsrs, doc(cfg(feature = "etcd")))]
pub use registry_etcd as etcd;

/// The Redis backend and its typed configuration.
#[cfg(feature = "redis")]
#[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
pub use registry_redis as redis;

/// The ZooKeeper backend and its typed configuration.
#[cfg(feature = "zookeeper")]
#[cfg_attr(docsrs, doc(cfg(feature = "zookeeper")))]
pub use registry_zk as zookeeper;

/// Balancing, routing, ejection and retries over a watched service.
#[cfg(feature = "balance")]
#[cfg_attr(docsrs, doc(cfg(feature = "balance")))]
pub use registry_balance as balance;

pub use self::{
    connector::{Connector, connect},
    serve::Server,
};
