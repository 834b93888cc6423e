//! What a server says when it refuses or cannot serve: sorted, said in words that help, and healed.

use std::{error::Error as StdError, fmt::Debug, net::SocketAddr};

use redis::RedisError;
use registry_core::{Error, ErrorKind, Options};
use registry_redis::{RedisConfig, RedisTopology};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, in_time, instance, instances, is_live, is_stale, key,
        register_all, states,
    },
    harness::Client,
    servers::{Cluster, Redis},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
    time::Instant,
};

use crate::{
    RECORDS, REFUSED, SECOND, SLACK, Store, client, command, config, log::heard, options, restored, soon, unchecked,
};

const ROOT: &str = "r00t-s3cret";
const PASSWORD: &str = "pl4nted-s3cret";
const WRONG: &str = "pl4nted-and-wr0ng";

/// What the documentation says of rights, in one line.
fn documented() -> String {
    let lines = include_str!("../../../registry-redis/src/lib.rs").lines();
    lines.filter_map(|line| line.strip_prefix("//!")).map(str::trim).collect::<Vec<_>>().join(" ")
}

/// What stands between two texts of it.
fn between(start: &str, end: &str) -> String {
    let said = documented();
    let (_, rest) = said.split_once(start).unwrap_or_else(|| panic!("the documentation says {start}"));
    rest.split(end).next().unwrap().trim().to_owned()
}

/// What a user must be granted for everything under the prefix `services`, as documented.
pub(crate) fn least() -> String {
    between("ACL SETUSER app on >secret ", "```")
}

/// The same for one that only reads.
pub(crate) fn least_to_read() -> String {
    let least = least();
    let (keys, _) = least.split_once('+').unwrap();
    format!("{keys} {}", between("to read only, `", "`"))
}

/// What is added to both on a Cluster.
pub(crate) fn least_on_a_cluster() -> String {
    format!("{} {}", least(), between("on a Cluster `", "`"))
}

/// What a user needs at Sentinels.
pub(crate) fn least_at_sentinels() -> String {
    format!("-@all {}", between("At sentinels: `", "`"))
}

/// A Redis on which `app` has the least rights, and `other` none.
async fn secured() -> Store {
    let users = ["user default off", &format!("user root on >{ROOT} ~* &* +@all")].map(str::to_owned);
    let redis = users.into_iter().fold(Redis::new(), Redis::user);
    let store = Store::start(redis).await.under("root", ROOT);
    store.grant("app", PASSWORD, &least()).await;
    store.grant("other", PASSWORD, "-@all").await;
    store
}

fn app(store: &Store, options: Options) -> RedisConfig {
    store.config(options).user("app", PASSWORD)
}

fn debug(value: &impl Debug) -> String {
    format!("{value:?} {value:#?}")
}

/// Everything that an error says.
pub(crate) fn chain(error: &Error) -> String {
    let mut said = format!("{error} {}", debug(error));
    let mut source = error.source();
    while let Some(error) = source {
        said.push_str(&format!(" {error} {error:?}"));
        source = error.source();
    }
    said
}

#[track_caller]
fn assert_kept(said: &str) {
    for secret in [PASSWORD, WRONG, ROOT] {
        assert!(!said.contains(secret), "{secret} in {said}");
    }
}

/// Register, discover and watch fail alike within a second or so, for good, and say this; nothing gives a password away.
async fn assert_refused(who: &str, config: RedisConfig, kind: ErrorKind, words: &[&str]) {
    let spelled = debug(&config);
    let one = client(config);
    let events = Events::of(&one);
    let start = Instant::now();
    let (register, discover, watch) = tokio::join!(
        one.registry.register(instance("orders", "2")),
        one.registry.discover("orders"),
        one.registry.watch("orders"),
    );
    let took = start.elapsed();
    let errors = [register.unwrap_err(), discover.unwrap_err(), watch.unwrap_err()];
    println!("{who}, after {took:?}: {:?}", errors[0]);
    for error in &errors {
        assert_eq!(error.kind(), kind, "{who}: {error:?}");
        assert!(!error.is_retryable(), "{who}: {error:?}");
        let said = chain(error);
        assert!(words.iter().all(|word| said.contains(word)), "{who}: {words:?} in {said}");
        assert_kept(&said);
    }
    assert!(took < SECOND + SLACK, "{who}: {took:?}");
    assert!(one.registry.registrations().is_empty(), "what is refused is withdrawn");
    assert_kept(&[spelled, debug(&one), debug(&events)].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_and_a_missing_right_are_refused_at_once() {
    let store = secured().await;
    let right = client(app(&store, options()));
    right.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&right, "orders").await;
    observer.until_ids(soon(), &["1"]).await;

    let here = store.config(options());
    let denied = ErrorKind::PermissionDenied;
    assert_refused("a wrong password", here.clone().user("app", WRONG), denied, &["WRONGPASS"]).await;
    assert_refused("an unknown user", here.clone().user("nobody", PASSWORD), denied, &["WRONGPASS"]).await;
    assert_refused("a user without rights", here.clone().user("other", PASSWORD), denied, &["NOPERM"]).await;
    assert_refused("another prefix", app(&store, options()).prefix("elsewhere"), denied, &["NOPERM"]).await;
    assert_refused("no user", here.clone(), denied, &["NOAUTH"]).await;
    // With an outage, other words are said.
    store.server.kill().await.unwrap();
    let late = client(app(&store, options()));
    let error = late.registry.register(instance("orders", "3")).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert_kept(&[chain(&error), debug(&late), debug(&right)].concat());
    let heard = heard();
    assert!(heard.contains("WRONGPASS"), "we do listen: {heard}");
    assert_kept(&heard);
}

/// The rights that the documentation asks for, word for word: enough for all that a registry does, and for no other.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_are_enough() {
    let store = secured().await;
    let ttl = 2 * SECOND;
    let patient = unchecked().ttl(ttl).announce("reader".parse::<registry_core::ServiceName>().unwrap());
    let (one, reader) = (client(app(&store, patient.clone())), client(app(&store, patient.clone())));
    let network = crate::proxy(store.server.addr()).await;
    let crashing = client(config([network.addr()], patient).user("app", PASSWORD));
    let observer = Observer::of(&reader, "orders").await;
    register_all(&one, instances("orders", "i", 3)).await;
    crashing.registry.register(instance("orders", "crashing")).await.unwrap();
    observer.until("all of them", soon(), |seen| seen.len() == 4).await;
    one.registry
        .register(registry_tests::conformance::support::weighing(instance("orders", "i-000"), 7))
        .await
        .unwrap();
    assert!(one.registry.unregister("orders", "i-002").await.unwrap());
    network.set_mode(registry_tests::proxy::Mode::Cut);
    observer.until_ids(crate::gone(ttl), &["i-000", "i-001"]).await;
    let heartbeat = one.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.failed.len()), (2, 0));
    assert_eq!(reader.registry.services().await.unwrap(), ["orders".parse().unwrap()]);
    assert_eq!(one.registry.subscribers("orders").await.unwrap().len(), 1);
    store.order::<()>("SCRIPT FLUSH").await;
    one.registry.destroy().await.unwrap();
    observer.until_ids(soon(), &[]).await;
    observer.assert_always("live", is_live);
    let other_keys = client(app(&store, options()).prefix("services-old"));
    assert_eq!(other_keys.registry.services().await.unwrap_err().kind(), ErrorKind::PermissionDenied);
}

/// An operator takes a right away and gives it back.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_revoked_and_granted_again_heals() {
    let store = secured().await;
    let (provider, reader) = (client(app(&store, options())), client(app(&store, options())));
    provider.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    store.order::<()>("ACL SETUSER app -hset -hmget").await;
    let denied = |error: Error| assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    denied(provider.registry.register(instance("orders", "2")).await.unwrap_err());
    denied(reader.registry.discover("payments").await.unwrap_err());

    store.order::<()>("ACL SETUSER app +hset +hmget").await;
    in_time("register", 2 * SECOND, provider.registry.register(instance("orders", "2"))).await.unwrap();
    observer.until("both", REFUSED, |seen| seen.len() == 2 && is_live(seen)).await;
    in_time("discover", PATIENCE, reader.registry.discover("payments")).await.unwrap();
    eventually("all are registered", REFUSED, async || states(&provider), all_registered).await;
    assert_kept(&heard());
}

/// What an operator does to a server, what it says then, and what undoes it.
struct Trouble {
    what: &'static str,
    breaks: &'static [&'static str],
    hint: &'static str,
    mends: &'static [&'static str],
}

const TROUBLES: &[Trouble] = &[
    Trouble {
        what: "NOREPLICAS",
        breaks: &["CONFIG SET min-replicas-to-write 1"],
        hint: "too few replicas",
        mends: &["CONFIG SET min-replicas-to-write 0"],
    },
    Trouble {
        what: "OOM",
        breaks: &["CONFIG SET maxmemory 1"],
        hint: "full (maxmemory)",
        mends: &["CONFIG SET maxmemory 0"],
    },
    Trouble {
        what: "MISCONF",
        breaks: &["CONFIG SET dir /proc save 3600", "BGSAVE"],
        hint: "cannot save",
        mends: &["CONFIG SET stop-writes-on-bgsave-error no"],
    },
    Trouble {
        what: "READONLY",
        breaks: &["REPLICAOF 127.0.0.1 1"],
        hint: "is a replica",
        mends: &["REPLICAOF NO ONE"],
    },
    Trouble {
        what: "MASTERDOWN",
        breaks: &["CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"],
        hint: "lost its primary",
        mends: &["REPLICAOF NO ONE"],
    },
];

/// Each is a retryable error that says what is wrong, nobody is taken out for it, and all is well after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_write_says_why_and_is_waited_for() {
    let store = Store::start(Redis::new().line("enable-protected-configs yes")).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    provider.registry.register(instance("orders", "first")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    for (round, trouble) in TROUBLES.iter().enumerate() {
        for order in trouble.breaks {
            let order = order.replace("save 3600", "save \"3600 1\"");
            if let Some(save) = order.strip_suffix(" save \"3600 1\"") {
                let mut set = command(save);
                set.arg("save").arg("3600 1");
                set.exec_async(&mut store.bare().await).await.unwrap();
            } else {
                store.order::<redis::Value>(&order).await;
            }
        }
        if trouble.what == "MISCONF" {
            let failed = |info: &String| info.contains("rdb_last_bgsave_status:err");
            eventually("it fails to save", PATIENCE, || store.order("INFO persistence"), failed).await;
        }
        let id = format!("i-{round}");
        let error = provider.registry.register(instance("orders", &id)).await.unwrap_err();
        println!("{}: {}", trouble.what, chain(&error));
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}: {error:?}", trouble.what);
        assert!(error.to_string().contains(trouble.hint), "{}: {error}", trouble.what);
        assert!(chain(&error).contains(trouble.what), "{}: {}", trouble.what, chain(&error));
        let pending: Vec<_> = states(&provider).iter().map(|state| state.as_str()).collect();
        assert!(pending.contains(&"pending"), "{pending:?}");

        for order in trouble.mends {
            store.order::<redis::Value>(order).await;
        }
        let within = restored(options().ttl) + SECOND;
        eventually(trouble.what, within, async || states(&provider), all_registered).await;
        let seen = |seen: &registry_core::Snapshot| seen.get(&id).is_some() && is_live(seen);
        observer.until(&id, PATIENCE, seen).await;
    }
    let changes = observer.changes();
    assert!(changes.iter().all(|change| change.starts_with('+')), "{changes:?}");
}

/// Somebody's script runs for ever, until an operator ends it: the server answers everybody else that it is busy.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_busy_with_a_script_says_so_and_is_waited_for() {
    let store = Store::start(Redis::new().line("lua-time-limit 100")).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    provider.registry.register(instance("orders", "first")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    // An operator has a connection already: to open one, too, needs an answer.
    let (mut operator, mut somebody) = (store.bare().await, store.bare().await);
    let busy = tokio::spawn(async move {
        let mut endless = redis::Cmd::new();
        endless.arg("EVAL").arg("while true do end").arg(0);
        endless.exec_async(&mut somebody).await
    });
    observer.until("nothing is known", PATIENCE, is_stale).await;
    let error = provider.registry.register(instance("orders", "late")).await.unwrap_err();
    println!("{}", chain(&error));
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("busy with somebody's script"), "{error}");

    command("SCRIPT KILL").exec_async(&mut operator).await.unwrap();
    drop(busy.await.unwrap());
    eventually("all are registered", restored(options().ttl) + SECOND, async || states(&provider), all_registered)
        .await;
    observer.until("both", PATIENCE, |seen| seen.len() == 2 && is_live(seen)).await;
    assert_eq!(observer.changes(), ["+late"]);
}

/// A server that loads its data for some seconds takes connections, and serves nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_loading_says_so_and_is_waited_for() {
    let redis = Redis::new().line("key-load-delay 10000").line("loading-process-events-interval-bytes 1024");
    let store = Store::start(redis).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    provider.registry.register(instance("orders", "first")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    let mut ballast = redis::Cmd::new();
    ballast.arg("EVAL").arg("for i = 1, 400 do redis.call('SET', 'ballast' .. i, string.rep(i, 500)) end").arg(0);
    ballast.exec_async(&mut store.bare().await).await.unwrap();
    store.order::<()>("SAVE").await;
    store.server.relaunch().await.unwrap();
    let loading = || store.attempt::<String>("PING");
    let said = |pong: &Result<String, RedisError>| pong.as_ref().is_err_and(|error| error.code() == Some("LOADING"));
    eventually("it is loading", PATIENCE, loading, said).await.unwrap_err();

    let fresh = client(store.config(options()));
    let error = fresh.registry.register(instance("orders", "fresh")).await.unwrap_err();
    println!("{}", chain(&error));
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("still loading"), "{error}");
    store.server.ready().await.unwrap();
    eventually("it is registered", restored(options().ttl), async || states(&fresh), all_registered).await;
    observer.until("both", PATIENCE, |seen| seen.len() == 2 && is_live(seen)).await;
    assert_eq!(observer.changes(), ["+fresh"]);
    assert!(all_registered(&states(&provider)));
}

/// A server of another version, in another mode: it answers `HELLO`, and refuses all else.
struct Fake {
    addr: SocketAddr,
    task: AbortHandle,
}

impl Fake {
    async fn start(hello: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let hello = hello.clone();
                tokio::spawn(async move { Self::serve(socket, &hello).await });
            }
        });
        Self { addr, task: task.abort_handle() }
    }

    /// Answers until the connection ends.
    async fn serve(socket: TcpStream, hello: &str) -> Option<()> {
        let mut socket = BufReader::new(socket);
        loop {
            let mut words = Vec::new();
            for _ in 0..number(&mut socket).await? {
                let mut word = vec![0; number(&mut socket).await? + 2];
                socket.read_exact(&mut word).await.ok()?;
                words.push(String::from_utf8(word).ok()?);
            }
            let answer = if words[0].trim_end() == "HELLO" { hello } else { "-ERR unknown command\r\n" };
            socket.write_all(answer.as_bytes()).await.ok()?;
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The number in a line such as `*3` or `$5`.
async fn number(socket: &mut BufReader<TcpStream>) -> Option<usize> {
    let mut line = String::new();
    socket.read_line(&mut line).await.ok()?;
    line.trim_end().get(1..)?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_too_old_is_named_with_its_version() {
    let fields = |version: &str| {
        let fields = [("server", "redis"), ("version", version), ("mode", "standalone"), ("role", "master")];
        let bulk = |text: &str| format!("${}\r\n{text}\r\n", text.len());
        let fields: Vec<_> = fields.iter().map(|(name, value)| bulk(name) + &bulk(value)).collect();
        format!("%{}\r\n{}", fields.len(), fields.concat())
    };
    // Before 6.0 nobody knew the word.
    let five = "-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n".to_owned();
    for (hello, words) in [(fields("6.0.16"), &["6.0.16", "6.2"][..]), (five, &[])] {
        let server = Fake::start(hello).await;
        assert_refused("too old", config([server.addr], options()), ErrorKind::Unsupported, words).await;
    }
    // One that is new enough is asked for more.
    let server = Fake::start(fields("6.2.0")).await;
    let one = client(config([server.addr], options()));
    let error = one.registry.register(instance("orders", "1")).await.unwrap_err();
    assert!(!chain(&error).contains("6.2 or later"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_arranged_otherwise_is_said_so() {
    let (alone, sentinel, nodes) = (Redis::new(), Redis::sentinel(), Redis::cluster());
    let (several, many) = (sentinel.size(), nodes.size());
    let (alone, sentinels, nodes) =
        tokio::try_join!(Cluster::start(alone, 1), Cluster::start(sentinel, several), Cluster::start(nodes, many))
            .unwrap();
    let at = |cluster: &Cluster, index: usize| config([cluster.members()[index].addr()], options());
    let (standalone, cluster) = (RedisTopology::Standalone, RedisTopology::Cluster);
    let unfit = ErrorKind::Unsupported;
    let cases = [
        ("a node of a Cluster", at(&nodes, 0).topology(standalone.clone()), "redis+cluster://"),
        ("a Sentinel", at(&sentinels, 2).topology(standalone), "redis+sentinel://"),
        ("a single server is no Cluster", at(&alone, 0).topology(cluster), "redis://"),
        (
            "a single server is no Sentinel",
            at(&alone, 0).topology(RedisTopology::Sentinel { master: "registry".to_owned() }),
            "redis://",
        ),
    ];
    for (who, config, scheme) in cases {
        assert_refused(who, config, unfit, &[scheme]).await;
    }
    let unknown = at(&sentinels, 2).topology(RedisTopology::Sentinel { master: "nobody".to_owned() });
    assert_refused("no such primary", unknown, ErrorKind::InvalidInput, &["\"nobody\""]).await;
    assert_refused("no such database", at(&alone, 0).database(99), ErrorKind::InvalidInput, &["DB index"]).await;
}

/// Somebody else uses the same key for something else.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_type_is_an_error_and_is_left_alone() {
    let store = Store::start(Redis::new()).await;
    store.order::<()>(&format!("SET {RECORDS} theirs")).await;
    let one: Client = client(store.config(options()));
    let error = one.registry.register(instance("orders", "1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
    assert!(error.to_string().contains(&key("orders", "1").to_string()), "{error}");
    assert_eq!(one.registry.discover("orders").await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(store.order::<String>(&format!("GET {RECORDS}")).await, "theirs");
    one.registry.register(instance("payments", "1")).await.unwrap();
}
