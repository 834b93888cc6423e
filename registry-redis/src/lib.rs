//! Redis 6.2 and later, or Valkey, as a store for `service-registry`: one server, Sentinel, or a Cluster.
//!
//! Applications say `service_registry::connect("redis://h1:6379/services?ttl=15s")`. This crate is what that makes: a
//! [`RedisBackend`] from a [`RedisConfig`], which [`Managed`](registry_core::Managed) turns into a
//! [`Registry`](registry_core::Registry).
//!
//! ```
//! use registry_core::Managed;
//! use registry_redis::{RedisBackend, RedisConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> registry_core::Result<()> {
//! let config = RedisConfig::new(["127.0.0.1:6379"]).prefix("services");
//! let backend = RedisBackend::new(config)?; // the store need not be up yet
//! # drop(backend);
//! # Ok(())
//! # }
//! ```
//!
//! # How the registry maps to Redis
//!
//! All keys of a service share the hash tag `{prefix/service}`; without a prefix it is `{service}`. Names are
//! percent-encoded. *Path* is the record's path in the layout, `{service}/providers/{id}`.
//!
//! | key | type | what it holds |
//! | --- | --- | --- |
//! | `{prefix/service}:records` | hash | path → value, for providers and overrides; and what the store says of itself |
//! | `{prefix/service}:expiry` | sorted set | path → when its ttl ends, in ms by the server's clock; and the member `~` |
//! | `{prefix/service}:log` | stream | what the last 1000 scripts changed, or a few more |
//! | `{prefix/service}:consumers:records` | hash | path → value, for announced readers |
//! | `{prefix/service}:consumers:expiry` | sorted set | as `expiry` |
//! | `{prefix/service}:gone:{owner}` | string | this registry has left; what it sent before is too late |
//! | `{prefix/}:services` | sorted set | the index: service → until when it is listed |
//! | channel `{prefix/service}:log:{db}` | | what is new in the log |
//!
//! * **Value**: `owner epoch ttl record`: the owner token, the epoch, the ttl in ms (0 for ever), and after the third space
//!   the bytes of the layout, which are JSON. A value that does not begin so is all record, for ever.
//! * **What the store says of itself**, in the fields `~epoch` (a random word, new in every history), `~head` (the last
//!   entry of the log), `~seen` (when somebody looked last), `~safe` (before then nobody is taken for dead), `~ttl` (the
//!   longest ttl so far).
//! * **Entry of the log**: `p` the head before it, `n` a random word, then for each record that one script changed a field
//!   `put`, `left`, `gone` (expired) or `dropped` (an override) with its path; and `v` the value, if one record was put. The
//!   head with it is `{id of the entry}/{n}`: entries form a chain, and a reader that meets an entry whose `p` is not its own
//!   head reads everything anew. The values of several that were put together are not repeated there: readers ask for them.
//! * **Message**: `{head before} {head after}`, and then for each change ` {what} {length of the path} {length of the
//!   value} {path}{value}` (the space once). It leaves the changes out where they are long, more than 128 kB of what was put
//!   or 8 kB of what was taken out, and where a script put only some of what it was given: readers ask for them.
//! * **By hand**, in one command: `HSET {…}:records orders/overrides/7f3a '{"v":1,"owner":"me","epoch":1,"status":"down"}'
//!   ~head ANY-NEW-WORD`. A new head that no entry leads to makes every reader read anew, at the next poll, or at once
//!   after `PUBLISH {…}:log:0 look`. Deleting: `HDEL` of the path, `ZREM` of it from `expiry`, then a new head.
//!
//! | registry | Redis |
//! | --- | --- |
//! | register, unregister | one script for up to 200 records of a service: records, expiry, log and message move together |
//! | heartbeat | one script for up to 500 records of a service, all in one round trip; no entry, no message |
//! | session | our owner token; records live for a ttl after each heartbeat |
//! | departure mark | the entry `left` of the log |
//! | watch | the channel, the log behind it, and a poll of all followed services in one round trip |
//! | cursor | `~epoch` and `~head` |
//! | expiry | whoever looks after the end of a ttl takes the record out, with an entry; up to 200 a script |
//! | list | `HSCAN` in pages of about 1000, and the log for what changed meanwhile |
//! | services | the index, and a count of the providers of each |
//!
//! # What it promises beyond the engine's promises
//!
//! * **A lost message costs a poll, not a change.** Messages are hints and short cuts; every followed service is compared
//!   with the store every [`poll`](RedisConfig::poll), and the nearest end of a ttl is looked at when it comes, whether or
//!   not anything was heard. Keyspace notifications are not used.
//! * **A wiped, restored or failed-over store is noticed** at the next entry or poll, by its epoch or where the chain
//!   breaks, and answered by reading everything. Another epoch, or a log as old as ours that has not our last entry, is
//!   another history: what is missing then is held for a while.
//! * **No clock but the server's counts**, and nobody who may be alive is taken out: where nobody looked for two thirds of
//!   the longest ttl, half a second at least, as the server was down, frozen, or took no writes, owners have that ttl to
//!   renew first. Readers that may not write judge by the same rule and take nothing out.
//! * **No script takes longer than a few milliseconds**, with 10 000 instances in one service too: writes are cut at 200
//!   records, renewals at 500, and nothing lists a service in a script.
//! * **What arrives after we left changes nothing**: where we registered anything, our owner token is marked as gone.
//! * **Dead and silent connections are replaced.** A server that does not answer within a third of the ttl (500 ms at
//!   least) loses its connection, and calls fail at once while there is none.
//!
//! # Sentinel and Cluster
//!
//! Replication is asynchronous: **a failover loses writes that were acknowledged.** The next heartbeat finds what is missing
//! and puts it again; if the log lacks what its owner put last, everything of that owner, so that no older record stays.
//!
//! * Under Sentinel all sentinels are asked who the primary is: when there is trouble, and every poll, or quarter of the ttl
//!   if that is shorter. The one that knows of the latest failover is believed. So whoever still writes to a primary that
//!   was replaced, or reads it, moves within that time, and registers there what only the old one had.
//! * On a Cluster requests go to the node of their slot, along `MOVED` and `ASK`; slots may be moved meanwhile. From 7.0 on
//!   channels are sharded: a message stays on the node of its slot. A subscription whose slot moves ends, and goes on at the
//!   other node from where it was. Only primaries are asked.
//! * A single server may be a replica: it can be read, and judges nobody that no one at its primary has looked at lately.
//!
//! # Rights
//!
//! With the prefix `services` a user needs no more than this (`HELLO` and `AUTH` are everybody's):
//!
//! ```text
//! ACL SETUSER app on >secret ~{services/* resetchannels &{services/* -@all +eval +evalsha +time +hget +hmget +hset +hdel
//!   +hlen +hscan +zadd +zrem +zcard +zcount +zscore +zmscore +zrange +zrangebyscore +zremrangebyscore +xadd +xrange
//!   +xrevrange +del +exists +set +pexpire +persist +publish +subscribe +unsubscribe
//! ```
//!
//! and, to read only, `+eval +evalsha +time +hmget +hscan +zcount +zrange +zrangebyscore +xrange +xrevrange +subscribe
//! +unsubscribe` with the same keys and channels. Add `+select` for another database than 0; on a Cluster `+cluster|slots
//! +asking +spublish +ssubscribe +sunsubscribe`. At sentinels: `+sentinel|master`.
//!
//! # Limits
//!
//! * A service lies on one slot, so on one node. Up to some 10 000 instances are fine.
//! * Ask for `maxmemory-policy noeviction`: other policies evict these keys like any. The registry mends that, but until
//!   then instances are missing.
//! * A reader that may not write cannot tell a full server, where nobody can renew, from owners that died. Protection holds
//!   them for it, for its time.
//! * If the server's clock is set back, those who die before it has caught up stay until it has, and a ttl.
//! * While a slot is moved, registrations into it wait; renewals go on, but for the moment in which the keys themselves move.
//! * A service that nobody renews goes by itself, a minute and four ttls later; its overrides stay. Who asks for it before,
//!   after nobody looked for long, may see who died meanwhile for one more ttl.
//! * The room that owners get after an outage follows the longest ttl in the service: one with a much shorter ttl than its
//!   neighbours may be taken out and come back at its next heartbeat.
//! * Servers of version 6.2 with `lua-replicate-commands no` are not supported.
//! * The store does not grant or end sessions: that one is lost is told by our own clock, by the engine.
//! * An owner that is cut off from one node of a Cluster is `Suspended`, though it goes on at the others.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod config;
mod error;
#[cfg(test)]
mod fuzz;
mod link;
mod read;
mod scripts;
mod space;
mod store;
mod watch;
mod writes;

pub use registry_tls::Tls;

pub use self::{
    backend::RedisBackend,
    config::{RedisConfig, RedisTopology},
};
