//! etcd 3.4 and later as a store for `service-registry`.
//!
//! Applications say `service_registry::connect("etcd://h1:2379,h2:2379/services?ttl=15s")`. This crate is what that
//! makes: an [`EtcdBackend`] from an [`EtcdConfig`], which [`Managed`](registry_core::Managed) turns into a
//! [`Registry`](registry_core::Registry).
//!
//! ```
//! use registry_core::Managed;
//! use registry_etcd::{EtcdBackend, EtcdConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> registry_core::Result<()> {
//! let config = EtcdConfig::new(["127.0.0.1:2379"]).prefix("services");
//! let backend = EtcdBackend::new(config)?; // the store need not be up yet
//! # drop(backend);
//! # Ok(())
//! # }
//! ```
//!
//! # How the registry maps to etcd
//!
//! | registry | etcd |
//! | --- | --- |
//! | instance | key `/{prefix}/{service}/providers/{id}`, JSON, on a lease; without a prefix `/{service}/…` |
//! | announced reader | key `/{prefix}/{service}/consumers/{id}`, on a lease |
//! | override | key `/{prefix}/{service}/overrides/{id}`, without a lease |
//! | departure mark | key `/{prefix}/{service}/left/{owner}` with the ids, put where they are deleted, on a lease |
//! | session | a lease for up to 1000 keys; more leases beyond that, each lost and renewed by itself |
//! | ttl | the lease's, in whole seconds, rounded up, at least 2; the server may grant more |
//! | register | a transaction of up to 100 puts, each guarded by the `mod_revision` that was seen |
//! | unregister | a transaction of marks and deletions, guarded alike, for what carries our owner token |
//! | heartbeat | one keep-alive for each lease |
//! | reconcile | one `LeaseTimeToLive` with keys for each lease; the newest key and the count of each followed range |
//! | list | a range read in pages of 1000 at one revision |
//! | watch | one range watch from the next revision on, over marks, overrides and providers; all of them on one stream |
//! | cursor | revision, cluster id, number of keys, and the record last written, as a witness |
//! | services | a range read of names only |
//!
//! # What it promises beyond the engine's promises
//!
//! * **A dead, frozen or silent member fails no call** as long as another one serves. Each endpoint has a client of its
//!   own; an attempt has 600 ms before the next member is asked, and a probe every half second moves watches, too (with
//!   a single endpoint, when it was not heard of for 6 s).
//! * **No write is applied late over a newer one.** Every put and deletion is conditional on what was seen before.
//! * **A store that was wiped or restored is recognised**, although it has the same cluster and member ids and its
//!   revision may have grown past ours: a subscription resumes only if the witness and the number of keys at the
//!   cursor's revision are what they were. Else it starts with a rewound reset. If that revision has been compacted
//!   there is nothing to compare: it resumes if nothing has changed, and else starts with a reset that is rewound only
//!   if the store's revision is lower than ours or its cluster is another.
//! * **An operation that etcd answers with "no space" is retryable**: it heals when an operator frees space.
//! * **Errors of certificates and permissions are final**, as far as they can be told from an outage: plain text to a
//!   TLS port, and TLS to a plain one, look like one.
//!
//! # Limits
//!
//! * After a change of leader the server extends all leases by up to a ttl: a crashed owner is gone that much later.
//! * Servers before 3.4.31 and 3.5.13 may revoke living leases when a leader that was frozen for a ttl wakes up
//!   ([etcd#15247](https://github.com/etcd-io/etcd/issues/15247)). The engine puts the records back.
//! * A reset tells only the departures of which the marks are still there: the last ones of each owner, while its
//!   session lives.
//! * While the store is full, instances are removed without marks, as those need room: readers take it for a crash and
//!   may keep the instances for a while. Servers before 3.4.20 and 3.5.7 refuse even that
//!   ([etcd#13429](https://github.com/etcd-io/etcd/issues/13429)): then removals wait for room, too.
//! * What a reader missed may come in one message. If that has more than 64 MiB it ends the stream, and all services that are
//!   followed are read anew.
//! * With authentication on, a registry needs read and write permission for the whole prefix. A running watch goes on
//!   when its permission is revoked, as etcd does.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod config;
mod endpoints;
mod error;
#[cfg(test)]
mod fuzz;
mod session;
mod space;
mod store;
mod streams;
mod watch;
mod writes;

pub use registry_tls::Tls;

pub use self::{backend::EtcdBackend, config::EtcdConfig};
