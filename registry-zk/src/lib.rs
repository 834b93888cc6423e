//! ZooKeeper 3.6 and later as a store for `service-registry`.
//!
//! Applications say `service_registry::connect("zk://h1:2181,h2:2181/services?ttl=15s")`. This crate is what that
//! makes: a [`ZooKeeperBackend`] from a [`ZooKeeperConfig`], which [`Managed`](registry_core::Managed) turns into a
//! [`Registry`](registry_core::Registry).
//!
//! ```
//! use registry_core::Managed;
//! use registry_zk::{ZooKeeperBackend, ZooKeeperConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> registry_core::Result<()> {
//! let config = ZooKeeperConfig::new(["127.0.0.1:2181"]).prefix("services");
//! let backend = ZooKeeperBackend::new(config)?; // the store need not be up yet
//! # drop(backend);
//! # Ok(())
//! # }
//! ```
//!
//! # How the registry maps to ZooKeeper
//!
//! | registry | ZooKeeper |
//! | --- | --- |
//! | instance | ephemeral node `/{prefix}/{service}/providers/{id}`, JSON; without a prefix `/{service}/…` |
//! | announced reader | ephemeral node `/{prefix}/{service}/consumers/{id}` |
//! | override | persistent node `/{prefix}/{service}/overrides/{id}` |
//! | prefix | persistent nodes, made where they are missing, with the configured access control list |
//! | service and its directories | containers, which the server takes away when they have been empty for a while |
//! | departure mark | node `~left~{id}` beside the instance, made and deleted by the request that deletes the instance |
//! | session | one ZooKeeper session for a registry, whatever it registers and follows |
//! | ttl | the session timeout, as the server grants it: 2 to 20 of its ticks, by default 4 to 40 s |
//! | register | a `multi` of up to 500 nodes, each made where there is none or changed at the version that was seen |
//! | take over | a `multi` that deletes the node, at the version that was seen, and makes it anew |
//! | unregister | a `multi` of marks and deletions, at the versions that were seen, for what carries our owner token |
//! | heartbeat | none of ours: the session is kept by the client's pings, or by what is asked anyway; it tells what was not put under the present session; after an outage, as reconcile |
//! | reconcile | one `getEphemerals` for all registrations, and one read of up to 500 of them, in turn; three `exists` for each followed service |
//! | list | `getChildren`, then reads of up to 500 nodes by one request |
//! | watch | two persistent recursive watches for each service, over providers and overrides; a change costs one read |
//! | cursor | what tells the store's history: the root and both directories, by transaction and time |
//! | services | the children of the root whose `providers` has any |
//!
//! # What it promises beyond the engine's promises
//!
//! * **A store that comes back is used at once.** While there is no connection, the server is asked every half second
//!   whether it knows the session. If it does, the session goes on, on the connection that asked; if it says that it is
//!   gone, a new one is opened. The client alone would wait for 1.4 of the ttl. Nothing is written on a guess.
//! * **No write is applied late over a newer one.** Every one is conditional on the version that was seen, and a node
//!   that replaces another one never has that one's version. (A node that somebody deletes by hand begins anew at 0.)
//! * **A registry that could not leave does not live on.** Once it is told to, nobody keeps its session alive.
//! * **A take-over is an update for readers**, not a removal: the node is read before anything is said about it.
//! * **A store that was wiped or restored is recognised**, although its transactions begin at 1 again: the root, or a
//!   directory of the service, is not the node that it was, or has gone back.
//! * **Errors of certificates and permissions, and a wrong password under SASL, are final**, as far as they can be told
//!   from an outage: calls are refused, and the server is asked again every few seconds, until somebody mends it. A
//!   certificate is to blame only if it is with every server; plain text to a TLS port, and TLS to a plain one, look
//!   like an outage.
//!
//! # Limits
//!
//! * Servers before 3.6 are refused, with their version where they tell it: they have no recursive watches.
//! * The server looks once in a tick which sessions are over: a crashed process is gone up to a tick later. After a
//!   restart or a change of leader, every session has its whole timeout again.
//! * Departures during a reader's own cut are unknown: ZooKeeper keeps no marks. Readers then hold many that left like
//!   those who vanished, for a bounded time.
//! * A store that was restored from a backup, and has since grown past what a reader saw, is not recognised if the
//!   service's directories are older than the backup.
//! * With [`ZooKeeperAuth::Digest`], servers take any password. A wrong one shows as a missing permission, where access
//!   control lists ask for the right one, and else not at all.
//! * The client logs the passwords of sessions, by the target `zookeeper_client` at debug: whoever has one can end that
//!   session. Keep such a log to yourself.
//! * A record must be smaller than the server's `jute.maxbuffer`. Requests are kept below its default, 1 MB; where a server
//!   ends the connection under smaller ones, they are made smaller, for ten minutes.
//! * A task on your runtime keeps the session. A process that is stopped for a second, or whose network is, is
//!   disconnected for a moment; it keeps its session, and readers read anew. Where servers take longer than that to
//!   connect, they get up to `connect_timeout`, a third of the ttl at most, then and once connected. One of several is
//!   found out a second after it fell silent; one that is alone is asked five times in a ttl, since there is nowhere to go.
//! * A node is removed if it has the version at which it was seen, which ZooKeeper counts anew when a node is made anew: one
//!   that expired and was made by a successor within that one round trip is removed, and put again by the successor's next
//!   check.
//! * Where one of several members refuses the user and the others do not, the refusal counts.
//! * Without a prefix, a service named `zookeeper` would lie among ZooKeeper's own nodes.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod acl;
mod backend;
mod config;
mod cursor;
mod dial;
mod error;
#[cfg(test)]
mod fuzz;
mod held;
mod session;
mod space;
mod store;
mod watch;
mod writes;

pub use registry_tls::Tls;

pub use self::{
    acl::ZooKeeperAcl,
    backend::ZooKeeperBackend,
    config::{ZooKeeperAuth, ZooKeeperConfig},
};
