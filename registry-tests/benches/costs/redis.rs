//! The floor on Redis: one script that writes records which are absent or ours, their expiry, one entry of a log and one
//! message, and one subscription.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, FromRedisValue, PushInfo, PushKind, RedisError, RedisResult, Script,
    Value, aio::MultiplexedConnection,
};
use registry_core::{Managed, Options, Registry};
use registry_redis::{RedisBackend, RedisConfig};
use registry_tests::servers::{self, Server};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    Result,
    bare::{Bare, Entry, OWNER, Reader, Writer},
    report::Report,
    samples::{Samples, Unit},
    works,
};

/// KEYS: records, expiry, log. ARGV: channel, ttl in ms, owner, then paths and values.
const WRITE: &str = "
    local t = redis.call('TIME')
    local ends = string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[2])
    local values = {}
    for i = 4, #ARGV, 2 do
        local old = redis.call('HGET', KEYS[1], ARGV[i])
        if old and not string.find(old, ARGV[3], 1, true) then return 0 end
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
        redis.call('ZADD', KEYS[2], ends, ARGV[i])
        values[#values + 1] = ARGV[i + 1]
    end
    local said = table.concat(values, '\\n')
    redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'v', said)
    redis.call('PUBLISH', ARGV[1], said)
    return #values";
/// KEYS: records, expiry. ARGV: ttl in ms. What a heartbeat must do at least for each record.
const RENEW: &str = "
    local t = redis.call('TIME')
    local ends = string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[1])
    for i = 2, #ARGV do redis.call('ZADD', KEYS[2], 'XX', ends, ARGV[i]) end
    return 1";
const BATCH: usize = 200;
const TTL: &str = "60000";
/// No script and no command may block the server for longer, in seconds.
const LONGEST: f64 = 0.005;

pub(crate) struct Redis {
    server: Server,
}

pub(crate) struct Scripted {
    connection: MultiplexedConnection,
    tag: String,
    paths: Vec<String>,
    write: Arc<Script>,
    renew: Script,
}

pub(crate) struct Subscribed {
    messages: UnboundedReceiver<PushInfo>,
    _connection: MultiplexedConnection,
}

impl Bare for Redis {
    const NAME: &'static str = "redis";
    const BATCHES: &'static str = "one script for 200 records, 4 in flight";
    const SINGLE: &'static str = "the same script for one record";

    type Writer = Scripted;
    type Reader = Subscribed;

    async fn start() -> Result<Self> {
        Ok(Self { server: Server::start(servers::Redis::new()).await? })
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn registry(&self, at: SocketAddr, prefix: &str, options: Options) -> Result<Arc<dyn Registry>> {
        let config = RedisConfig::new([at.to_string()]).prefix(prefix).options(options.clone());
        Ok(Arc::new(Managed::new(RedisBackend::new(config)?, options)?))
    }

    async fn writer(&self, at: SocketAddr, prefix: &str, count: usize) -> Result<Scripted> {
        let paths = (0..count).map(|id| crate::bare::path(prefix, id)).collect();
        let connection = connect(at, AsyncConnectionConfig::new()).await?;
        let (write, renew) = (Arc::new(Script::new(WRITE)), Script::new(RENEW));
        // As the library's: known to the server before the clock starts.
        write.load_async(&mut connection.clone()).await?;
        renew.load_async(&mut connection.clone()).await?;
        Ok(Scripted { connection, tag: tag(prefix), paths, write, renew })
    }

    async fn reader(&self, at: SocketAddr, prefix: &str) -> Result<Subscribed> {
        let (sender, mut messages) = unbounded_channel();
        let mut connection = connect(at, AsyncConnectionConfig::new().set_push_sender(sender)).await?;
        connection.subscribe(format!("{}:log", tag(prefix))).await?;
        while messages.recv().await.ok_or("the connection ended")?.kind != PushKind::Subscribe {}
        Ok(Subscribed { messages, _connection: connection })
    }

    async fn watches(&self) -> Result<usize> {
        let mut bare = connect(self.server.addr(), AsyncConnectionConfig::new()).await?;
        let named: Vec<String> = redis::cmd("PUBSUB").arg(&["CHANNELS", "{*"]).query_async(&mut bare).await?;
        let counts: Vec<Value> = redis::cmd("PUBSUB").arg("NUMSUB").arg(named).query_async(&mut bare).await?;
        let counts = counts.into_iter().skip(1).step_by(2).map(usize::from_redis_value);
        Ok(counts.sum::<Result<usize, _>>()?)
    }

    /// Ten thousand instances of one service: how long the longest command or script blocks the server.
    async fn volume(&self, report: &mut Report) -> Result<()> {
        const COUNT: usize = 10_000;
        let addr = self.server.addr();
        let mut bare = connect(addr, AsyncConnectionConfig::new()).await?;
        let ask = async |words: &[&str], bare: &mut MultiplexedConnection| {
            redis::cmd(words[0]).arg(&words[1..]).query_async::<Value>(bare).await
        };
        ask(&["CONFIG", "SET", "slowlog-log-slower-than", "0"], &mut bare).await?;
        ask(&["CONFIG", "SET", "slowlog-max-len", "100000"], &mut bare).await?;
        ask(&["SLOWLOG", "RESET"], &mut bare).await?;
        let options = Options::default().ttl(Duration::from_secs(3)).reconcile(Duration::from_secs(2));
        let writer = self.registry(addr, "large", options.clone().register_rate(1_000_000))?;
        let reader = self.registry(addr, "large", options)?;
        works::register_all(&*writer, works::instances(COUNT)).await?;
        let mut watcher = works::follow(&*reader, "orders").await?;
        works::until(&mut watcher, COUNT).await?;
        // Several heartbeats, checks and polls.
        tokio::time::sleep(Duration::from_secs(6)).await;
        let mut kinds: BTreeMap<String, Samples> = BTreeMap::new();
        for entry in Vec::<Vec<Value>>::from_redis_value(ask(&["SLOWLOG", "GET", "100000"], &mut bare).await?)? {
            let (Some(took), Some(words)) = (entry.get(2), entry.get(3)) else { continue };
            let words = Vec::<String>::from_redis_value(words.clone())?;
            // A command, or a script by its digest.
            let kind = words.iter().take(if words[0].starts_with("EVAL") { 2 } else { 1 }).cloned().collect();
            kinds.entry(kind).or_default().add(f64::from_redis_value(took.clone())? / 1e6);
        }
        let slowest = kinds.values().max_by(|a, b| a.median().total_cmp(&b.median())).ok_or("nothing was logged")?;
        // The median: a machine that the client shares stops the server in the middle of some.
        let work = format!("{COUNT} of one service: how long the slowest kind of script or command blocks the server");
        report.bound("W10", &work, Unit::Seconds, slowest, None, LONGEST);
        reader.destroy().await?;
        writer.destroy().await?;
        Ok(())
    }
}

impl Scripted {
    fn keys(&self) -> [String; 3] {
        ["records", "expiry", "log"].map(|part| format!("{}:{part}", self.tag))
    }

    async fn send(&self, entries: &[Entry]) -> Result<()> {
        let mut call = self.write.prepare_invoke();
        let [records, expiry, log] = self.keys();
        call.key(records).key(expiry).key(&log).arg(&log).arg(TTL).arg(OWNER);
        for (path, value) in entries {
            call.arg(path).arg(value);
        }
        let written: usize = call.invoke_async(&mut self.connection.clone()).await?;
        if written == entries.len() { Ok(()) } else { Err("not all were written".into()) }
    }
}

impl Writer for Scripted {
    async fn write_all(&self, entries: Vec<Entry>) -> Result<()> {
        let batches: Vec<_> = entries.chunks(BATCH).map(|batch| self.send(batch)).collect();
        let mut done = stream::iter(batches).buffer_unordered(4);
        while let Some(outcome) = done.next().await {
            outcome?;
        }
        Ok(())
    }

    async fn write(&self, entry: &Entry) -> Result<()> {
        self.send(std::slice::from_ref(entry)).await
    }

    async fn change(&self, entry: &Entry) -> Result<()> {
        self.send(std::slice::from_ref(entry)).await
    }

    async fn keep_alive(&self) -> Result<()> {
        let mut call = self.renew.prepare_invoke();
        let [records, expiry, _] = self.keys();
        call.key(records).key(expiry).arg(TTL);
        for path in &self.paths {
            call.arg(path);
        }
        Ok(call.invoke_async::<()>(&mut self.connection.clone()).await?)
    }

    async fn end(self) -> Result<()> {
        Ok(redis::cmd("UNLINK").arg(&self.keys()).query_async(&mut self.connection.clone()).await?)
    }
}

impl Reader for Subscribed {
    async fn changes(&mut self) -> Result<usize> {
        loop {
            let push = self.messages.recv().await.ok_or("the connection ended")?;
            let (PushKind::Message, Some(Value::BulkString(payload))) = (push.kind, push.data.get(1)) else { continue };
            let mut count = 0;
            for value in payload.split(|byte| *byte == b'\n') {
                std::hint::black_box(serde_json::from_slice::<serde_json::Value>(value)?);
                count += 1;
            }
            return Ok(count);
        }
    }
}

fn tag(prefix: &str) -> String {
    format!("{{{prefix}/orders}}")
}

async fn connect(at: SocketAddr, config: AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
    let client = Client::open(format!("redis://{at}/?protocol=resp3"))?;
    let config = config.set_response_timeout(Some(Duration::from_secs(30)));
    let connecting = client.get_multiplexed_async_connection_with_config(&config);
    let late = |_| RedisError::from((ErrorKind::Io, "the server does not answer"));
    tokio::time::timeout(Duration::from_secs(5), connecting).await.map_err(late)?
}
