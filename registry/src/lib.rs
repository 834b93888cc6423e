#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod connector;

pub use registry_core::{
    Change, DEFAULT_WEIGHT, Endpoint, Error, ErrorKind, Event, Freshness, Heartbeat, Host, Instance, InstanceBuilder,
    InstanceId, Key, Location, Managed, Options, Reconcile, Registration, RegistrationState, Registry, Result,
    ServiceName, Snapshot, SnapshotHandle, SnapshotRef, Status, Watcher, advertise, health, memory, shutdown,
};

/// What a backend of your own is made of; see [`Backend`](backend::Backend).
pub mod backend {
    pub use registry_core::{
        Backend, Content, Cursor, Departure, Directory, Entry, Epoch, Intent, Layout, Lifetime, MAX_NAME_BYTES,
        MAX_RECORD_BYTES, NativeLayout, Override, Owner, Place, Record, Renewal, SessionEvent, Update, Updates,
        async_trait, decode_segment, encode_segment,
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

pub use self::connector::{Connector, connect};
