//! Connections that end, fall silent or are refused, and what they cost.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use redis::aio::MultiplexedConnection;
use registry_core::{ErrorKind, Snapshot};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, instance, instances, is_live, is_stale, never_within,
        register_all, states, weighing,
    },
    harness::Client,
    proxy::Mode,
    servers::Redis,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::AbortHandle,
    time::{Instant, sleep},
};

use crate::{
    LOG, POLL, RECORDS, REFUSED, SECOND, SLACK, Store, client, client_at, command, config, options, proxy,
    register_within, restored, soon, unchecked,
};

/// The ids of all connections of others: those that ask, or those that listen.
async fn connections(bare: &mut MultiplexedConnection, kind: &str) -> Vec<u64> {
    let own: u64 = command("CLIENT ID").query_async(bare).await.unwrap();
    let list: String = command(&format!("CLIENT LIST TYPE {kind}")).query_async(bare).await.unwrap();
    let ids = list.lines().filter_map(|line| line.strip_prefix("id=")?.split(' ').next()?.parse().ok());
    ids.filter(|id| *id != own).collect()
}

async fn kill(bare: &mut MultiplexedConnection, id: u64) {
    // It may have ended before.
    let _: u64 = command(&format!("CLIENT KILL ID {id}")).query_async(bare).await.unwrap();
}

fn weighs(weight: u32) -> impl Fn(&Snapshot) -> bool {
    move |seen| seen.get("i-000").is_some_and(|one| one.weight == weight)
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_connection_is_killed_no_change_and_no_registration_is_lost() {
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(3 * SECOND);
    let (provider, reader) = (client(store.config(patient.clone())), client(store.config(patient)));
    register_all(&provider, instances("orders", "i", 5)).await;
    let observer = Observer::of(&reader, "orders").await;
    let events = Events::of(&provider);
    let mut bare = store.bare().await;
    let (mut weight, mut killed) = (1, 0);
    for round in 0..8 {
        for kind in ["normal", "pubsub"] {
            for id in connections(&mut bare, kind).await {
                kill(&mut bare, id).await;
                (weight, killed) = (weight + 1, killed + 1);
                // Whether it is the provider's own: then it says so, and goes on trying.
                let changed = weighing(instance("orders", "i-000"), weight);
                if let Err(error) = provider.registry.register(changed).await {
                    assert!(error.is_retryable(), "{error:?}");
                }
                observer.until(&format!("change {weight} in round {round}"), PATIENCE, weighs(weight)).await;
            }
        }
    }
    assert!(killed >= 20, "{killed} connections were killed");
    observer.until("the last cut is over", PATIENCE, is_live).await;
    observer.assert_always("all of them", |seen| seen.len() == 5);
    assert!(!format!("{events:?}").contains("SessionLost"), "{events:?}");
    eventually("they are registered", PATIENCE, async || states(&provider), all_registered).await;
}

/// A server throws out whoever does not read what it is told; nothing that was said meanwhile is missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_the_server_throws_out_misses_nothing() {
    const CHANGES: u32 = 3000;
    let store = Store::start(Redis::new()).await;
    store.set("client-output-buffer-limit", "pubsub 65536 65536 1").await;
    let network = proxy(store.server.addr()).await;
    let (provider, reader) = (client(store.config(unchecked())), client_at(&network, unchecked()));
    let mut large = instance("orders", "i-000");
    large.metadata.insert("ballast".to_owned(), "x".repeat(4000));
    provider.registry.register(large.clone()).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    let mut bare = store.bare().await;
    let listeners = connections(&mut bare, "pubsub").await;
    network.set_mode(Mode::BlackHole);
    for weight in 0..CHANGES {
        provider.registry.register(weighing(large.clone(), weight)).await.unwrap();
    }
    let left = async || {
        let now = connections(&mut store.bare().await, "pubsub").await;
        now.into_iter().filter(|id| listeners.contains(id)).count()
    };
    eventually("it is thrown out", PATIENCE, left, |left| *left == 0).await;
    network.set_mode(Mode::Pass);
    observer.until("the last change", PATIENCE, |seen| weighs(CHANGES - 1)(seen) && is_live(seen)).await;
    observer.assert_always("it is there", |seen| seen.len() == 1);
}

/// One end forgets a connection, and the other is not told: the one that asks, or the one that listens.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_found_out_and_replaced() {
    let store = Store::start(Redis::new()).await;
    let ttl = 3 * SECOND;
    let patient = unchecked().ttl(ttl);
    let provider = client(store.config(patient.clone()));
    register_all(&provider, instances("orders", "i", 2)).await;
    // A probe every poll, and an answer within a third of the ttl.
    let found = POLL + ttl / 3 + SECOND + SLACK;
    for stranded in 0..2 {
        let network = proxy(store.server.addr()).await;
        let reader = client_at(&network, patient.clone());
        reader.registry.register(instance("orders", "reader")).await.unwrap();
        let observer = Observer::of(&reader, "orders").await;
        assert_eq!(network.stats().accepted, 2, "one that asks and one that listens");
        network.strand(stranded);
        let start = Instant::now();
        let weight = 100 + u32::try_from(stranded).unwrap();
        provider.registry.register(weighing(instance("orders", "i-000"), weight)).await.unwrap();
        observer.until("the change", found + soon(), weighs(weight)).await;
        println!("connection {stranded}: the change is seen after {:?}", start.elapsed());
        let replaced = async || network.stats().accepted;
        eventually("it is replaced", found, replaced, |accepted| *accepted > 2).await;
        println!("connection {stranded}: replaced after {:?}", start.elapsed());
        observer.until("live", PATIENCE, is_live).await;
        eventually(
            "it goes on",
            PATIENCE,
            async || reader.registry.heartbeat().await,
            |beat| beat.as_ref().is_ok_and(|beat| beat.renewed.len() == 1),
        )
        .await
        .unwrap();
        observer.assert_always("all of them", |seen| seen.len() == 3);
        assert!(reader.registry.unregister("orders", "reader").await.unwrap());
    }
}

/// The network holds a request that was given up, and delivers it when a newer one has gone another way.
#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_late_does_not_replace_what_is_newer() {
    let store = Store::start(Redis::new()).await;
    let (slow, other) = (proxy(store.server.addr()).await, proxy(store.server.addr()).await);
    let patient = unchecked().ttl(6 * SECOND).request_timeout(SECOND);
    let one = client(config([slow.addr(), other.addr()], patient));
    let weighs = |weight| weighing(instance("orders", "1"), weight);
    let there = async || {
        let record: String = store.order(&format!("HGET {RECORDS} orders/providers/1")).await;
        let (_, rest) = record.split_once("\"weight\":").unwrap();
        rest.chars().take_while(char::is_ascii_digit).collect::<String>()
    };
    one.registry.register(weighs(1)).await.unwrap();
    slow.set_mode(Mode::BlackHole);
    let error = one.registry.register(weighs(2)).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    register_within(PATIENCE, &one, weighs(3)).await;
    assert_eq!(there().await, "3");
    let (calls, before) = (store.calls("evalsha").await, slow.stats().to_server);
    slow.set_mode(Mode::Pass);
    slow.until(|stats| stats.to_server > before).await;
    eventually("it has arrived", PATIENCE, || store.calls("evalsha"), |now| *now > calls).await;
    never_within("it is replaced", SECOND, there, |weight| weight != "3").await;
    // Not for a moment either.
    let log: Vec<(String, HashMap<String, String>)> = store.order(&format!("XRANGE {LOG} - +")).await;
    let put: Vec<_> = log.iter().filter_map(|(_, entry)| entry.get("v")).collect();
    assert!(put.len() >= 2 && !put.iter().any(|value| value.contains(r#""weight":2"#)), "{put:#?}");
}

/// The server does not answer for longer than a call waits, and then goes on.
async fn it_does_not_answer(what: &str, stop: &'static str) {
    let store = Store::start(Redis::new().line("enable-debug-command yes")).await;
    let patient = unchecked().ttl(3 * SECOND).request_timeout(SECOND);
    let (provider, reader) = (client(store.config(patient.clone())), client(store.config(patient.clone())));
    register_all(&provider, instances("orders", "i", 5)).await;
    let observer = Observer::of(&reader, "orders").await;
    let mut bare = store.bare().await;
    // Who stops it may be answered only at the end.
    let stopping = tokio::spawn(async move {
        let _: Result<(), _> = command(stop).exec_async(&mut bare).await;
    });
    sleep(SECOND / 10).await;
    let start = Instant::now();
    let error = provider.registry.register(instance("orders", "late")).await.unwrap_err();
    println!("{what}: after {:?}: {error:?}", start.elapsed());
    assert!(error.is_retryable(), "{error:?}");
    assert!(start.elapsed() < patient.request_timeout + SLACK, "{:?}", start.elapsed());
    observer.until("the outage", PATIENCE, is_stale).await;
    observer.until("the end of it", PATIENCE, |seen| seen.len() == 6 && is_live(seen)).await;
    eventually("they are registered", PATIENCE, async || states(&provider), all_registered).await;
    assert_eq!(observer.changes(), ["+late"]);
    stopping.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_sleeps_is_waited_for() {
    it_does_not_answer("asleep", "DEBUG SLEEP 4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_pauses_its_clients_is_waited_for() {
    it_does_not_answer("paused", "CLIENT PAUSE 4000 ALL").await;
}

/// The password is another for a while, and connections end meanwhile: the refusal is not the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_while_connecting_again_is_not_for_ever() {
    let store = Store::start(Redis::new()).await;
    let rights = "~* &* +@all";
    store.grant("app", "right", rights).await;
    let app = || client(store.config(unchecked().ttl(3 * SECOND)).user("app", "right"));
    let (provider, reader) = (app(), app());
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    store.grant("app", "another", rights).await;
    store.order::<u64>("CLIENT KILL USER app").await;
    observer.until("the outage", PATIENCE, is_stale).await;
    let refused = async || provider.registry.services().await.err().map(|error| error.kind());
    let denied = |kind: &Option<ErrorKind>| *kind == Some(ErrorKind::PermissionDenied);
    eventually("it is refused", PATIENCE, refused, denied).await;
    store.grant("app", "right", rights).await;
    let right = Instant::now();
    observer.until("the end of the outage", REFUSED, is_live).await;
    println!("live {:?} after the password is right again", right.elapsed());
    eventually("all are back", REFUSED, async || states(&provider), all_registered).await;
    // It goes on by messages, not only by a reading.
    register_within(PATIENCE, &provider, weighing(instance("orders", "i-000"), 50)).await;
    observer.until("a change", soon(), weighs(50)).await;
}

/// What reaches the server from its clients, command by command; scripts' own commands are left out.
struct Monitor {
    seen: Arc<Mutex<Vec<String>>>,
    task: AbortHandle,
}

impl Monitor {
    async fn start(store: &Store) -> Self {
        let mut socket = BufReader::new(TcpStream::connect(store.server.addr()).await.unwrap());
        socket.write_all(b"MONITOR\r\n").await.unwrap();
        let mut lines = socket.lines();
        assert_eq!(lines.next_line().await.unwrap().unwrap(), "+OK");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if !line.contains(" lua]") {
                    told.lock().unwrap().push(line.chars().take(160).collect());
                }
            }
        });
        Self { seen, task: task.abort_handle() }
    }

    /// Those so far that are not of an operator.
    fn requests(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|line| !line.contains("\"CLIENT\"") && !line.contains("\"PING\"")).cloned().collect()
    }

    fn forget(&self) {
        self.seen.lock().unwrap().clear();
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Twenty services are compared in one request, and each connection is asked now and then whether it lives.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_reader_costs_a_request_per_poll_and_connection() {
    const WINDOW: Duration = Duration::from_secs(8);
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(60 * SECOND);
    let (provider, reader) = (client(store.config(patient.clone().ttl(60 * SECOND))), client(store.config(patient)));
    let mut observers = Vec::new();
    for service in 0..20 {
        let service = format!("service-{service}");
        provider.registry.register(instance(&service, "1")).await.unwrap();
        observers.push(Observer::of(&reader, &service).await);
    }
    drop(provider);
    let monitor = Monitor::start(&store).await;
    sleep(POLL).await;
    monitor.forget();
    let start = Instant::now();
    sleep(WINDOW).await;
    let requests = monitor.requests();
    let polls = start.elapsed().as_millis().div_ceil(POLL.as_millis()) as usize;
    println!("{} requests in {polls} polls", requests.len());
    assert!(requests.len() > polls / 2, "it polls: {requests:?}");
    // There are two connections.
    assert!(requests.len() <= 2 * (polls + 1), "{requests:#?}");
    for observer in &observers {
        assert!(observer.changes().is_empty());
    }
}

/// Records of one service are renewed 500 at a time, all in the same round trip. Who asks for a heartbeat has them checked
/// too, in another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_of_a_thousand_is_one_round_trip() {
    const WAY: Duration = Duration::from_millis(300);
    let store = Store::start(Redis::new()).await;
    let network = proxy(store.server.addr()).await;
    let patient = unchecked().ttl(9 * SECOND).request_timeout(5 * SECOND);
    let provider = client(config([network.addr()], patient).poll(60 * SECOND));
    register_all(&provider, instances("orders", "i", 1000)).await;
    assert_eq!(provider.registry.heartbeat().await.unwrap().renewed.len(), 1000);

    let monitor = Monitor::start(&store).await;
    let scripts = async || {
        let requests = monitor.requests();
        requests.into_iter().filter(|request| request.contains(RECORDS)).collect::<Vec<_>>()
    };
    let beat = eventually("its own heartbeat", PATIENCE, scripts, |seen| seen.len() >= 2).await;
    assert_eq!(beat.len(), 2, "two halves of a thousand: {beat:#?}");
    network.set_mode(Mode::Delay(WAY));
    let start = Instant::now();
    assert_eq!(provider.registry.heartbeat().await.unwrap().renewed.len(), 1000);
    println!("renewed and checked in {:?}, of which {:?} are the way", start.elapsed(), WAY * 4);
    assert!(start.elapsed() < WAY * 6, "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_change_among_a_thousand_is_a_few_hundred_bytes_to_a_reader() {
    const CHANGES: u32 = 50;
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(60 * SECOND);
    let provider = client(store.config(patient.clone()));
    register_all(&provider, instances("orders", "i", 1000)).await;
    let network = proxy(store.server.addr()).await;
    let reader = client(config([network.addr()], patient).poll(60 * SECOND));
    let observer = Observer::of(&reader, "orders").await;
    assert_eq!(observer.now().len(), 1000);
    let before = network.stats();
    for weight in 0..CHANGES {
        provider.registry.register(weighing(instance("orders", "i-000"), 1000 + weight)).await.unwrap();
        observer.until("it", soon(), weighs(1000 + weight)).await;
    }
    let after = network.stats();
    let (down, up) = (after.to_client - before.to_client, after.to_server - before.to_server);
    println!("{} bytes to the reader for a change, {} from it", down / u64::from(CHANGES), up / u64::from(CHANGES));
    assert!(down / u64::from(CHANGES) <= 600, "{down} bytes");
    assert!(up / u64::from(CHANGES) <= 60, "it asks for nothing: {up} bytes");
}

/// What is put by one script is told by one message, so that a start of many is one way to each reader, and no question.
#[tokio::test(flavor = "multi_thread")]
async fn many_that_are_registered_together_are_told_and_not_asked_for() {
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(60 * SECOND);
    let provider = client(store.config(patient.clone()));
    register_all(&provider, instances("orders", "first", 1)).await;
    let network = proxy(store.server.addr()).await;
    let reader = client(config([network.addr()], patient).poll(60 * SECOND));
    let observer = Observer::of(&reader, "orders").await;
    observer.until("the first", soon(), |seen| seen.len() == 1).await;
    let before = network.stats();
    register_all(&provider, instances("orders", "i", 1000)).await;
    observer.until("all", soon(), |seen| seen.len() == 1001).await;
    let after = network.stats();
    assert_eq!(after.requests - before.requests, 0, "it asks for nothing");
    let bytes = (after.to_client - before.to_client) / 1000;
    println!("{bytes} bytes to the reader for each");
    assert!(bytes <= 600, "{bytes} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_dropped_ends_its_connections() {
    let store = Store::start(Redis::new()).await;
    let mut bare = store.bare().await;
    for destroyed in [false, true] {
        let one: Client = client(store.config(options()));
        one.registry.register(instance("orders", "1")).await.unwrap();
        let observer = Observer::of(&one, "orders").await;
        assert!(
            !connections(&mut bare, "normal").await.is_empty() && !connections(&mut bare, "pubsub").await.is_empty()
        );
        if destroyed {
            one.registry.destroy().await.unwrap();
        }
        drop((one, observer));
        for kind in ["normal", "pubsub"] {
            let mut bare = bare.clone();
            let left = async || connections(&mut bare.clone(), kind).await;
            eventually("they end", restored(options().ttl), left, Vec::is_empty).await;
            drop(connections(&mut bare, kind).await);
        }
    }
}
