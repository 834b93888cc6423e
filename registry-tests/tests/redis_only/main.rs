//! What is special about Redis, on real servers: scripts and their log, expiry by the server's clock, messages that are
//! lost, what a server says when it cannot serve, Sentinels, and slots that move.
//!
//! What any store must do is in the conformance suite, which `tests/redis.rs` runs. Each case here has servers of its
//! own, and fails if it cannot have them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod connections;
mod errors;
mod expiry;
mod failover;
mod history;
#[path = "../etcd_only/log.rs"]
mod log;
mod model;
mod sentinel;
mod tls;
mod volume;

use std::{collections::HashMap, fmt::Display, net::SocketAddr, sync::Arc, time::Duration};

use redis::{Cmd, FromRedisValue, RedisError, aio::MultiplexedConnection};
use registry_core::{Instance, Managed, Options};
use registry_redis::{RedisBackend, RedisConfig};
use registry_tests::{
    conformance::support,
    harness::{Calls, Client, RedisHarness},
    proxy::FaultProxy,
    servers::{Redis, Server},
};

const SECOND: Duration = Duration::from_secs(1);
/// What a busy machine adds to a bound.
const SLACK: Duration = SECOND;
/// How often clients look whether a message was lost.
const POLL: Duration = Duration::from_millis(500);

/// The keys of the service `orders`.
const RECORDS: &str = "{services/orders}:records";
const EXPIRY: &str = "{services/orders}:expiry";
const LOG: &str = "{services/orders}:log";

/// What is asked over and over is answered by then.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A Redis of its own, and commands to it past the library.
struct Store {
    server: Server,
    /// How an operator reaches it.
    url: String,
}

impl Store {
    async fn start(redis: Redis) -> Self {
        let server = Server::start(redis).await.unwrap();
        let url = format!("redis://{}", server.addr());
        Self { server, url }
    }

    /// The same server, which knows the operator by name.
    fn under(self, user: &str, password: &str) -> Self {
        Self { url: format!("redis://{user}:{password}@{}", self.server.addr()), ..self }
    }

    /// How to reach it directly.
    fn config(&self, options: Options) -> RedisConfig {
        config([self.server.addr()], options)
    }

    /// A client behind a network of its own.
    async fn behind_a_proxy(&self, options: Options) -> Client {
        let proxy = FaultProxy::start(self.server.addr()).await.unwrap();
        let registry = registry(config([proxy.addr()], options));
        Client::new(Arc::new(registry), proxy, Calls::default())
    }

    /// A connection that knows nothing of the library.
    async fn bare(&self) -> MultiplexedConnection {
        bare(&self.url).await
    }

    /// What the server answers to words that are separated by spaces.
    async fn order<T: FromRedisValue>(&self, words: &str) -> T {
        self.attempt(words).await.unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    async fn attempt<T: FromRedisValue>(&self, words: &str) -> Result<T, RedisError> {
        command(words).query_async(&mut connect(&self.url).await?).await
    }

    /// Sets what can be configured while it runs.
    async fn set(&self, name: &str, value: &str) {
        let mut set = command("CONFIG SET");
        set.arg(name).arg(value);
        set.exec_async(&mut self.bare().await).await.unwrap_or_else(|error| panic!("{name} {value}: {error}"));
    }

    /// Gives a user its rights, and no others.
    async fn grant(&self, user: &str, password: &str, rights: &str) {
        self.order::<()>(&format!("ACL SETUSER {user} reset on >{password} {rights}")).await;
    }

    /// How often a command was run, scripts' calls included.
    async fn calls(&self, command: &str) -> u64 {
        self.statistics(command).await.get("calls").map_or(0, |calls| *calls as u64)
    }

    /// What the server counts of a command.
    async fn statistics(&self, command: &str) -> HashMap<String, f64> {
        let info: String = self.order("INFO commandstats").await;
        let start = format!("cmdstat_{command}:");
        let counted = info.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default();
        let pairs = counted.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
    }

    /// How many records are in the hash of `orders`.
    async fn records(&self) -> usize {
        records(&mut self.bare().await).await
    }
}

/// How many records are in the hash of `orders`.
async fn records(bare: &mut MultiplexedConnection) -> usize {
    let fields: Vec<String> = command(&format!("HKEYS {RECORDS}")).query_async(bare).await.unwrap();
    fields.iter().filter(|field| !field.starts_with('~')).count()
}

async fn bare(url: &str) -> MultiplexedConnection {
    connect(url).await.unwrap()
}

async fn connect(url: &str) -> Result<MultiplexedConnection, RedisError> {
    let client = redis::Client::open(url)?;
    let config = redis::AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER_WITHIN))
        .set_response_timeout(Some(ANSWER_WITHIN));
    client.get_multiplexed_async_connection_with_config(&config).await
}

fn command(words: &str) -> Cmd {
    let mut command = Cmd::new();
    for word in words.split_whitespace() {
        command.arg(word);
    }
    command
}

fn config<A: Display>(servers: impl IntoIterator<Item = A>, options: Options) -> RedisConfig {
    let servers = servers.into_iter().map(|server| server.to_string());
    RedisConfig::new(servers).prefix("services").poll(POLL).options(options)
}

fn registry(config: RedisConfig) -> Managed<RedisBackend> {
    log::listen();
    let options = config.options.clone();
    Managed::new(RedisBackend::new(config).unwrap(), options).unwrap()
}

/// A client, like a process of its own, whose way to the store is not harmed.
fn client(config: RedisConfig) -> Client {
    Client::new(Arc::new(registry(config)), Vec::<FaultProxy>::new(), Calls::default())
}

/// A client behind this network.
fn client_at(proxy: &FaultProxy, options: Options) -> Client {
    client(config([proxy.addr()], options))
}

/// Registers; what fails is tried again for a while, by whoever calls.
async fn register_within(within: Duration, provider: &Client, one: Instance) {
    let register = || provider.registry.register(one.clone());
    support::eventually("it is registered", within, register, Result::is_ok).await.unwrap();
}

/// A network of one client.
async fn proxy(server: SocketAddr) -> FaultProxy {
    FaultProxy::start(server).await.unwrap()
}

/// The conformance suite's options for Redis.
fn options() -> Options {
    support::options::<RedisHarness>()
}

/// The same, but nothing is found out by the slow check.
fn unchecked() -> Options {
    support::unchecked::<RedisHarness>()
}

/// Within this, readers know what happened at the store, also where no message told them.
fn soon() -> Duration {
    support::soon::<RedisHarness>() + POLL
}

/// Within this after the store or the way to it is back, what was lost is registered again.
fn restored(ttl: Duration) -> Duration {
    ttl / 3 + SECOND + SLACK
}

/// Until a replica is elected, connected to and written to, on a busy machine.
const ELECTED: Duration = Duration::from_secs(30);

/// Within this after a refusal, it is tried again.
const REFUSED: Duration = Duration::from_secs(32);

/// Within this, a process that crashed is gone.
fn gone(ttl: Duration) -> Duration {
    ttl + SECOND + SLACK
}
