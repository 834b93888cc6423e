//! Sessions: what ends them, what does not, and what is told of it.

use std::{env, fs, net::SocketAddr, process::Command, sync::Arc, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use registry_core::{Event, Snapshot};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, in_time, instance, instances, is_live, is_stale,
        register_all, states, weighing,
    },
    harness::{Client, close_zookeeper_session},
    servers::ZooKeeper,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy, sink},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use zookeeper_client::Client as Bare;

use crate::{
    ORDERS, RESTORED, SECOND, SLACK, Store, Witness, children, client, config, gone, left, options, patient,
    session_of, soon, unchecked,
};

/// How long a cut lasts that a session of three times that survives.
const SHORT: Duration = Duration::from_secs(2);

/// Waits until all nodes of `orders` are there, so many, and none of them hangs on that session.
async fn until_put_again(bare: &Bare, count: usize, old: i64, start: Instant) -> Duration {
    let again = |left: &crate::Left| left.len() == count && left.values().all(|(owner, ..)| *owner != old);
    eventually("all are put again", PATIENCE, || left(bare, ORDERS), again).await;
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_ended_from_outside_is_replaced_and_readers_see_no_gap() {
    // The server hangs up on whoever ended it. If its own client was back just before, that one is left with a connection
    // on which nothing is said any more, and finds it out when it asks next.
    let found_out = patient().ttl / 5 + SECOND;
    let store = Store::start(ZooKeeper::new()).await;
    let (provider, readers) = (client(store.config(patient())), [(); 2].map(|()| client(store.config(patient()))));
    register_all(&provider, instances("orders", "i", 10)).await;
    let observers = [Observer::of(&readers[0], "orders").await, Observer::of(&readers[1], "orders").await];
    let (bare, events) = (store.bare().await, Events::of(&provider));
    for round in 0..3 {
        let session = session_of(&bare, &format!("{ORDERS}/i-000")).await;
        let ended = Instant::now();
        // Its own client may have been quicker: then it is ended again.
        while session_of(&bare, &format!("{ORDERS}/i-000")).await == session {
            close_zookeeper_session(store.server.addr(), session).await.unwrap();
        }
        let took = until_put_again(&bare, 10, session, ended).await;
        println!("round {round}: 10 instances are back {took:?} after their session was ended");
        assert!(took < found_out + RESTORED, "{took:?}");
        events.until("it is told", soon(), |event| matches!(event, Event::SessionRenewed)).await;
        events.forget();
    }
    eventually("it knows", PATIENCE, async || states(&provider), all_registered).await;
    for observer in &observers {
        observer.until("live", PATIENCE, is_live).await;
        observer.assert_always("all of them", |seen| seen.len() == 10);
        assert!(observer.changes().is_empty(), "{:?}", observer.changes());
    }
}

/// A leader that hung and was replaced says for a moment that sessions are over which the others keep. Who leaves then
/// leaves nothing behind all the same.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_told_wrongly_that_the_session_is_over_leaves_nothing_behind() {
    let store = Store::start(ZooKeeper::new()).await;
    let proxy = Arc::new(store.proxy().await);
    let provider = client(config([proxy.addr()], patient()));
    register_all(&provider, instances("orders", "i", 10)).await;
    let bare = store.bare().await;

    let stub = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.set_upstream(stub.local_addr().unwrap());
    let (asked, server) = (proxy.clone(), store.server.addr());
    let lie = tokio::spawn(async move {
        let (mut socket, _) = stub.accept().await.unwrap();
        asked.set_upstream(server);
        let mut request = vec![0; socket.read_u32().await.unwrap() as usize];
        socket.read_exact(&mut request).await.unwrap();
        // Version, granted timeout, session and a password of 16 bytes: all zero says that the session is over.
        socket.write_u32(36).await.unwrap();
        socket.write_all(&[&[0; 16][..], &16_u32.to_be_bytes(), &[0; 16]].concat()).await.unwrap();
        // Until the client hangs up.
        let _ = socket.read(&mut [0]).await;
    });
    provider.registry.destroy().await.unwrap();
    in_time("the lie was told", SECOND, lie).await.unwrap();
    assert_eq!(children(&bare, ORDERS).await, [""; 0]);
}

/// Where a session ends while its client reconnects, a server can let it in, answer its first ping, and drop whatever it
/// sends from then on. Nothing but a missing answer tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_silent_from_the_start_is_given_up_at_once() {
    // One that the client makes by itself, and one that asks whether the session lives.
    const SILENT: u64 = 2;
    // A second for the first and two for the other, and what lies between; a ping would tell after twelve.
    const GIVEN_UP: Duration = Duration::from_secs(6);
    let store = Store::start(ZooKeeper::new()).await;
    let proxy = Arc::new(store.proxy().await);
    let provider = client(config([proxy.addr()], patient()));
    register_all(&provider, instances("orders", "i", 10)).await;
    let before = left(&store.bare().await, ORDERS).await;

    let stub = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.set_upstream(stub.local_addr().unwrap());
    let (asked, server) = (proxy.clone(), store.server.addr());
    let silent = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        for _ in 0..SILENT {
            connections.spawn(say_nothing_but_welcome(stub.accept().await.unwrap().0, server));
        }
        asked.set_upstream(server);
        connections.join_all().await;
    });
    let cut = Instant::now();
    proxy.kill_connections();
    in_time("the silent connections are given up", GIVEN_UP, silent).await.unwrap();
    let put = async || provider.registry.register(instance("orders", "new")).await;
    eventually("it goes on", GIVEN_UP, put, Result::is_ok).await.unwrap();
    println!("{SILENT} silent connections were given up in {:?}", cut.elapsed());
    let mut after = left(&store.bare().await, ORDERS).await;
    assert!(after.remove("new").is_some(), "{after:?}");
    assert_eq!(after, before);
}

/// Is the server for one client until its session is resumed and a ping is answered, and takes what it sends from then on
/// without a word.
async fn say_nothing_but_welcome(mut client: TcpStream, server: SocketAddr) {
    let mut upstream = TcpStream::connect(server).await.unwrap();
    for _ in ["connect", "ping"] {
        pass_message(&mut client, &mut upstream).await;
        pass_message(&mut upstream, &mut client).await;
    }
    // Until the client hangs up, in whatever way.
    let _ = copy(&mut client, &mut sink()).await;
}

async fn pass_message(from: &mut TcpStream, to: &mut TcpStream) {
    let length = from.read_u32().await.unwrap();
    let mut message = length.to_be_bytes().to_vec();
    from.take(length.into()).read_to_end(&mut message).await.unwrap();
    to.write_all(&message).await.unwrap();
}

/// Others change what they like meanwhile: the reader has it after the cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_that_the_session_survives_is_no_event_and_changes_of_others_are_seen_after_it() {
    let store = Store::start(ZooKeeper::new()).await;
    let options = unchecked().ttl(3 * SHORT);
    let cut = store.behind_a_proxy(options.clone()).await;
    let other = client(store.config(options));
    register_all(&cut, instances("orders", "i", 10)).await;
    register_all(&other, instances("orders", "j", 3)).await;
    let (observer, events) = (Observer::of(&cut, "orders").await, Events::of(&cut));
    observer.until("all", soon(), |seen| seen.len() == 13).await;
    let mut witness = Witness::of(store.server.addr()).await;
    let before = left(&witness.bare, ORDERS).await;

    cut.link.cut();
    observer.until("the cut", soon(), is_stale).await;
    other.registry.register(instance("orders", "new")).await.unwrap();
    other.registry.register(weighing(instance("orders", "j-001"), 7)).await.unwrap();
    assert!(other.registry.unregister("orders", "j-000").await.unwrap());
    sleep(SHORT).await;
    cut.link.heal();
    let caught_up = |seen: &Snapshot| {
        let weight = seen.get("j-001").map(|one| one.weight);
        is_live(seen) && seen.get("new").is_some() && seen.get("j-000").is_none() && weight == Some(7)
    };
    let healed = Instant::now();
    observer.until("what others did", soon(), caught_up).await;
    println!("caught up {:?} after the cut", healed.elapsed());
    assert_eq!(observer.changes().len(), 3, "{:?}", observer.changes());

    let (after, happened) = (left(&witness.bare, ORDERS).await, witness.events().await);
    let ours = |name: &str| name.starts_with("i-");
    assert!(happened.iter().all(|event| !event.contains("/i-")), "{happened:?}");
    assert_eq!(happened.len(), 5, "what others did, and a mark that came and went: {happened:?}");
    assert!(before.iter().filter(|(name, _)| ours(name)).all(|(name, node)| after.get(name) == Some(node)));
    eventually("it knows", PATIENCE, async || states(&cut), all_registered).await;
    assert!(!format!("{events:?}").contains("Session"), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_that_outlasts_the_session_ends_in_a_new_one_and_readers_hold_what_was_lost() {
    let store = Store::start(ZooKeeper::new()).await;
    let (held, bare) = (options().protect_for(60 * SECOND), store.bare().await);
    let cut = store.behind_a_proxy(held.clone()).await;
    let (other, reader) = (client(store.config(held.clone())), client(store.config(held)));
    register_all(&cut, instances("orders", "i", 10)).await;
    let observers = [Observer::of(&cut, "orders").await, Observer::of(&reader, "orders").await];
    let (session, events) = (session_of(&bare, &format!("{ORDERS}/i-000")).await, Events::of(&cut));

    cut.link.cut();
    let began = Instant::now();
    eventually("they expire", gone(options().ttl), || children(&bare, ORDERS), Vec::is_empty).await;
    println!("gone {:?} after the cut", began.elapsed());
    events.until("it is told", PATIENCE, |event| matches!(event, Event::SessionLost { .. })).await;
    other.registry.register(instance("orders", "new")).await.unwrap();
    let healed = Instant::now();
    cut.link.heal();
    let took = until_put_again(&bare, 11, session, healed).await;
    println!("10 instances are back {took:?} after the cut");
    assert!(took < RESTORED, "{took:?}");
    for observer in &observers {
        observer.until("all, and the new one", soon(), |seen| is_live(seen) && seen.len() == 11).await;
        observer.assert_always("all of them", |seen| seen.len() >= 10);
        assert_eq!(observer.changes(), ["+new"]);
    }
    events.until("it is told", soon(), |event| matches!(event, Event::SessionRenewed)).await;
    eventually("it knows", PATIENCE, async || states(&cut), all_registered).await;
}

/// A server has its own idea of how long a session may be idle. It is told, and it is what holds.
#[tokio::test(flavor = "multi_thread")]
async fn the_ttl_that_the_server_grants_is_told_and_expiry_follows_it() {
    let shorter = ZooKeeper::new().config("maxSessionTimeout=3000");
    let longer = ZooKeeper::new().config("minSessionTimeout=5000");
    for (zookeeper, asked, granted) in [(shorter, 60 * SECOND, 3 * SECOND), (longer, SECOND, 5 * SECOND)] {
        let store = Store::start(zookeeper).await;
        let provider = store.behind_a_proxy(unchecked().ttl(asked)).await;
        let (events, bare) = (Events::of(&provider), store.bare().await);
        provider.registry.register(instance("orders", "1")).await.unwrap();
        let told = |event: &Event| matches!(event, Event::Connected { ttl } if *ttl == granted);
        events.until("the granted ttl", PATIENCE, told).await;
        let session = session_of(&bare, &format!("{ORDERS}/1")).await;
        // It keeps the shorter one, too.
        sleep(granted * 2).await;
        assert_eq!(session_of(&bare, &format!("{ORDERS}/1")).await, session);

        let crashed = Instant::now();
        provider.crash();
        eventually("it expires", gone(granted), || children(&bare, ORDERS), Vec::is_empty).await;
        let took = crashed.elapsed();
        println!("asked for {asked:?}, granted {granted:?}: gone after {took:?}");
        // It was last heard of at its last ping.
        assert!(took > granted - SECOND, "{took:?}");
    }
}

/// The client itself would presume it 1.4 times as late.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_presumed_lost_after_its_timeout_and_no_later() {
    let store = Store::start(ZooKeeper::new()).await;
    let ttl = 8 * SECOND;
    let provider = store.behind_a_proxy(unchecked().ttl(ttl)).await;
    register_all(&provider, instances("orders", "i", 3)).await;
    let events = Events::of(&provider);
    provider.link.hang();
    let hung = Instant::now();
    events.until("it is told", ttl + PATIENCE, |event| matches!(event, Event::SessionLost { .. })).await;
    let took = hung.elapsed();
    println!("told {took:?} after the server was last heard, of {ttl:?}");
    assert!(took > ttl / 2 && took < ttl + ttl / 4, "{took:?}");
    let lost = |states: &Vec<registry_core::RegistrationState>| {
        states.iter().all(|state| matches!(state, registry_core::RegistrationState::Lost { .. }))
    };
    eventually("all are lost", SECOND, async || states(&provider), lost).await;
}

/// The next news of the session, in one word.
async fn next(events: &mut BoxStream<'static, Event>) -> &'static str {
    let next = async {
        loop {
            match events.next().await.expect("events go on") {
                Event::Connecting => return "connecting",
                Event::Connected { .. } => return "connected",
                Event::Suspended => return "suspended",
                Event::SessionLost { .. } => return "lost",
                Event::SessionRenewed => return "renewed",
                _ => {}
            }
        }
    };
    timeout(PATIENCE, next).await.expect("there is news of the session")
}

/// One thread, so that nothing happens before somebody listens.
#[tokio::test]
async fn users_are_told_what_happens_to_the_session_in_order() {
    let store = Store::start(ZooKeeper::new()).await;
    let only = store.behind_a_proxy(patient()).await;
    let mut events = only.registry.events();
    assert_eq!([next(&mut events).await, next(&mut events).await], ["connecting", "connected"]);
    only.registry.register(instance("orders", "1")).await.unwrap();

    only.link.cut();
    assert_eq!(next(&mut events).await, "suspended");
    only.link.heal();
    assert_eq!(next(&mut events).await, "connected");

    let bare = store.bare().await;
    let session = session_of(&bare, &format!("{ORDERS}/1")).await;
    only.link.cut();
    assert_eq!(next(&mut events).await, "suspended");
    close_zookeeper_session(store.server.addr(), session).await.unwrap();
    only.link.heal();
    assert_eq!([next(&mut events).await, next(&mut events).await], ["lost", "connected"]);
    assert_eq!(next(&mut events).await, "renewed");
    assert_ne!(session_of(&bare, &format!("{ORDERS}/1")).await, session);
}

/// A server keeps sessions with its data, and gives each its whole time again.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_restarted_with_its_data_is_no_event() {
    let store = Store::start(ZooKeeper::new()).await;
    let (provider, reader) = (client(store.config(patient())), client(store.config(patient())));
    register_all(&provider, instances("orders", "i", 50)).await;
    let (observer, events) = (Observer::of(&reader, "orders").await, Events::of(&provider));
    let before = left(&store.bare().await, ORDERS).await;
    for _ in 0..3 {
        store.server.kill().await.unwrap();
        observer.until("the outage", soon(), is_stale).await;
        store.server.restart().await.unwrap();
        let back = Instant::now();
        observer.until("the end of the restart", PATIENCE, is_live).await;
        println!("live {:?} after the server was back", back.elapsed());
    }
    let heartbeat = async || provider.registry.heartbeat().await.is_ok_and(|beat| beat.renewed.len() == 50);
    eventually("all are renewed", PATIENCE, heartbeat, |renewed| *renewed).await;
    assert_eq!(left(&store.bare().await, ORDERS).await, before, "nobody made or changed any of them again");
    observer.assert_always("all of them", |seen| seen.len() == 50);
    assert!(observer.changes().is_empty(), "{:?}", observer.changes());
    assert!(!format!("{events:?}").contains("Session"), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_server_is_filled_again_within_two_seconds_of_its_return() {
    let store = Store::start(ZooKeeper::new()).await;
    let providers: Vec<_> = (0..5).map(|_| client(store.config(patient()))).collect();
    for (index, provider) in providers.iter().enumerate() {
        register_all(provider, instances("orders", &format!("i-{index}"), 4)).await;
    }
    let readers: Vec<_> = (0..3).map(|_| client(store.config(patient()))).collect();
    let mut observers = Vec::new();
    for reader in &readers {
        observers.push(Observer::of(reader, "orders").await);
    }
    store.server.kill().await.unwrap();
    for observer in &observers {
        observer.until("the outage", soon(), is_stale).await;
    }
    store.server.wipe().await.unwrap();
    let back = Instant::now();
    let bare = store.bare().await;
    eventually("all are back", PATIENCE, || children(&bare, ORDERS), |names| names.len() == 20).await;
    let took = back.elapsed();
    println!("20 instances of 5 providers are back {took:?} after the wiped server was");
    assert!(took < RESTORED, "{took:?}");
    for observer in &observers {
        observer.until("live", PATIENCE, is_live).await;
        observer.assert_always("all of them", |seen| seen.len() == 20);
        assert!(observer.changes().is_empty(), "{:?}", observer.changes());
    }
    for provider in &providers {
        eventually("it knows", PATIENCE, async || states(provider), all_registered).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn destroying_ends_the_session_and_ends_by_its_deadline_where_the_server_is_dead() {
    let store = Store::start(ZooKeeper::new()).await;
    let deadline = options().request_timeout + SECOND + SLACK;
    let one = client(store.config(patient()));
    register_all(&one, instances("orders", "i", 3)).await;
    assert_eq!((store.sessions().await, store.connections().await), (1, 1));
    in_time("destroy", deadline, one.registry.destroy()).await.unwrap();
    assert_eq!(store.sessions().await, 0);
    eventually("the connection ends", PATIENCE, || store.connections(), |connections| *connections == 0).await;

    let doomed: Vec<_> = (0..2).map(|_| client(store.config(patient()))).collect();
    for (index, one) in doomed.iter().enumerate() {
        register_all(one, instances("orders", &format!("{index}"), 3)).await;
    }
    let late = async |one: &Client| {
        let outcome = in_time("destroy", deadline, one.registry.destroy()).await;
        assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    };
    store.server.freeze().await.unwrap();
    late(&doomed[0]).await;
    store.server.thaw().await.unwrap();
    store.server.kill().await.unwrap();
    late(&doomed[1]).await;
}

/// The way to the server is lost while a registry leaves, and comes back while its session lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_could_not_leave_does_not_live_on() {
    let store = Store::start(ZooKeeper::new()).await;
    let ttl = 6 * SECOND;
    let doomed = store.behind_a_proxy(unchecked().ttl(ttl)).await;
    register_all(&doomed, instances("orders", "i", 3)).await;
    let bare = store.bare().await;
    let deadline = options().request_timeout + SECOND + SLACK;
    doomed.link.hang();
    let left = in_time("destroy", deadline, doomed.registry.destroy()).await;
    assert!(left.as_ref().is_err_and(registry_core::Error::is_retryable), "{left:?}");
    doomed.link.heal();
    eventually("nobody keeps them", gone(ttl), || children(&bare, ORDERS), Vec::is_empty).await;
    // Its handle is there still.
    assert!(doomed.registry.registrations().is_empty());
}

/// Set for the process in which a case is alone.
const ALONE: &str = "REGISTRY_TEST_ALONE";

/// Runs a case in a process of its own, if this is not it.
fn is_alone(case: &str) -> bool {
    if env::var_os(ALONE).is_some() {
        return true;
    }
    let mut alone = Command::new(env::current_exe().unwrap());
    let alone = alone.args(["--exact", case, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&alone.stdout);
    println!("{said}{}", String::from_utf8_lossy(&alone.stderr));
    assert!(alone.status.success(), "{case} fails in a process of its own");
    assert!(said.contains("1 passed"), "{case} is not the name of a case");
    false
}

/// The threads and the open files of this process.
fn resources() -> [usize; 2] {
    ["/proc/self/task", "/proc/self/fd"].map(|folder| fs::read_dir(folder).unwrap().count())
}

#[test]
fn dropped_registries_leave_their_instances_to_expire_and_nothing_else() {
    if is_alone("sessions::dropped_registries_leave_their_instances_to_expire_and_nothing_else") {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(fifty_come_and_are_dropped());
    }
}

async fn fifty_come_and_are_dropped() {
    let store = Store::start(ZooKeeper::new()).await;
    let bare = store.bare().await;
    let ttl = 5 * SECOND;
    let come_and_go = async |id: String| {
        let one = client(store.config(unchecked().ttl(ttl)));
        one.registry.register(instance("orders", &id)).await.unwrap();
        one.registry.discover("orders").await.unwrap();
        (one.registry.watch("orders").await.unwrap(), Instant::now())
    };
    // The first one takes what every process has once.
    come_and_go("first".to_owned()).await;
    eventually("one is left", PATIENCE, || store.connections(), |connections| *connections == 1).await;
    let before = resources();
    let mut last = Instant::now();
    for index in 0..50 {
        (_, last) = come_and_go(format!("i-{index:03}")).await;
    }
    eventually("their connections end", PATIENCE, || store.connections(), |connections| *connections == 1).await;
    let within = |now: &[usize; 2]| now[0] <= before[0] && now[1] <= before[1];
    eventually(&format!("threads and files: {before:?}"), PATIENCE, async || resources(), within).await;
    println!("threads and files before and after: {before:?}, {:?}", resources());

    assert!(last.elapsed() > ttl || children(&bare, ORDERS).await.contains(&"i-049".to_owned()));
    eventually("they expire", gone(ttl), || children(&bare, ORDERS), Vec::is_empty).await;
    println!("the last one expired {:?} after it was dropped", last.elapsed());
    assert!(last.elapsed() > ttl - SECOND);
    eventually("so do their sessions", PATIENCE, || store.sessions(), |sessions| *sessions == 1).await;
}
