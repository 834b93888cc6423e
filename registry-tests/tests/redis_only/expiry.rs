//! Who is alive: judged by the server's clock, by whoever may look, however little is heard.

use std::process::Stdio;

use rand::{Rng, SeedableRng, rngs::StdRng};
use registry_core::{Backend, Content, ErrorKind, Instance, Intent, Key, Lifetime, Record, RegistrationState};
use registry_redis::RedisBackend;
#[cfg(target_os = "linux")]
use registry_tests::clock::ClockMaker;
use registry_tests::{
    conformance::support::{
        Observer, PATIENCE, all_registered, eventually, in_time, instance, instances, is_live, never_within,
        register_all, states, weighing,
    },
    proxy::Mode,
    servers::{Cluster, Redis},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{ChildStdout, Command},
    time::{Instant, sleep},
};

use crate::{
    EXPIRY, POLL, RECORDS, SECOND, SLACK, Store, client, client_at, config, gone, options, proxy, restored, soon,
    unchecked,
};

#[tokio::test(flavor = "multi_thread")]
async fn of_two_providers_exactly_the_one_that_crashed_goes_in_time() {
    let store = Store::start(Redis::new()).await;
    let ttl = 3 * SECOND;
    let patient = unchecked().ttl(ttl);
    let (living, crashing) = (client(store.config(patient.clone())), store.behind_a_proxy(patient.clone()).await);
    register_all(&living, instances("orders", "living", 3)).await;
    register_all(&crashing, vec![instance("orders", "crashing"), instance("payments", "crashing")]).await;
    // One that has a provider left that looks, and one that has none.
    let reader = client(store.config(patient));
    let (orders, payments) = (Observer::of(&reader, "orders").await, Observer::of(&reader, "payments").await);
    crashing.crash();
    let crashed = Instant::now();
    orders.until_ids(gone(ttl), &["living-000", "living-001", "living-002"]).await;
    payments.until_ids(gone(ttl), &[]).await;
    println!("gone {:?} after the crash", crashed.elapsed());
    assert!(crashed.elapsed() > ttl * 2 / 3 - SLACK / 2, "not before its ttl is over: {:?}", crashed.elapsed());
    never_within("another removal", ttl, async || orders.now().len(), |count| *count != 3).await;
    assert_eq!((orders.changes(), payments.changes()), (vec!["-crashing".to_owned()], vec!["-crashing".to_owned()]));
}

/// Nobody may publish, so that no message ever arrives: the poll tells everything.
#[tokio::test(flavor = "multi_thread")]
async fn with_every_message_lost_nothing_is_missed_and_a_crash_is_seen_in_time() {
    let store = Store::start(Redis::new().line("notify-keyspace-events \"\"")).await;
    store.grant("mute", "pw", "~* &* +@all -publish").await;
    let ttl = 3 * SECOND;
    let mute = |config: registry_redis::RedisConfig| config.user("mute", "pw");
    let reader = client(mute(store.config(unchecked().ttl(ttl))));
    let observer = Observer::of(&reader, "orders").await;
    let providers = [(); 3].map(|()| client(mute(store.config(unchecked().ttl(ttl)))));

    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut expected = [(); 3].map(|()| std::collections::BTreeMap::new());
    for weight in 0..200 {
        let which = rng.random_range(0..3);
        let id = format!("{which}-{}", rng.random_range(0..10));
        if rng.random_range(0..4) == 0 {
            let removed = providers[which].registry.unregister("orders", &id).await.unwrap();
            assert_eq!(removed, expected[which].remove(&id).is_some());
        } else {
            providers[which].registry.register(weighing(instance("orders", &id), weight)).await.unwrap();
            expected[which].insert(id, weight);
        }
    }
    let all: Vec<_> = expected.iter().flatten().map(|(id, weight)| (id.clone(), *weight)).collect();
    let said = |one: &std::sync::Arc<Instance>| (one.id.to_string(), one.weight);
    let right = |seen: &registry_core::Snapshot| seen.instances().iter().map(said).eq(all.iter().cloned());
    observer.until("all changes", POLL + SECOND + SLACK, right).await;

    let crashing = proxy(store.server.addr()).await;
    let crashed = client(mute(config([crashing.addr()], unchecked().ttl(ttl))));
    crashed.registry.register(instance("orders", "crashing")).await.unwrap();
    observer.until("it is there", POLL + SECOND + SLACK, |seen| seen.get("crashing").is_some()).await;
    crashing.set_mode(Mode::Cut);
    let start = Instant::now();
    observer.until("it is gone", gone(ttl) + POLL, |seen| seen.get("crashing").is_none()).await;
    println!("gone {:?} after the crash", start.elapsed());
    assert!(right(&observer.now()));
    observer.assert_always("live", is_live);
    assert_eq!(store.calls("publish").await, 0, "no message was sent");
    let refused = format!("{:?}", store.order::<redis::Value>("ACL LOG 1").await);
    assert!(refused.contains("publish"), "each was refused: {refused}");
}

/// Where the other process is to register, if this is it.
#[cfg(target_os = "linux")]
const OTHER_PROCESS: &str = "REGISTRY_TEST_SHIFTED_PROVIDER";

/// Processes whose clocks are ten minutes off, and then jump, do everything as if they were not: no client's clock counts.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_ten_minutes_off_or_jumps_has_no_effect() {
    if let Ok(server) = std::env::var(OTHER_PROCESS) {
        return serve_until_killed(&server).await;
    }
    let clocks = ClockMaker::new().await.expect("there is a C compiler");
    let store = Store::start(Redis::new()).await;
    let ttl = options().ttl;
    let reader = client(store.config(options()));
    let observer = Observer::of(&reader, "orders").await;
    let mut children = Vec::new();
    for shift in [-600, 600] {
        let shifted = clocks.clock(shift).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        shifted.give_to(&mut command);
        let mut child = command
            .args(["--exact", "expiry::a_clock_that_is_ten_minutes_off_or_jumps_has_no_effect", "--nocapture"])
            .env(OTHER_PROCESS, store.server.addr().to_string())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        until_off_by(&mut said, shift).await;
        children.push((child, said, shifted, shift));
    }
    observer.until("both", PATIENCE, |seen| seen.len() == 2).await;
    let both = async || observer.now().len();
    never_within("one of them is gone", 2 * ttl, both, |count| *count != 2).await;
    for (_, said, shifted, shift) in &mut children {
        shifted.set(-*shift).unwrap();
        until_off_by(said, -*shift).await;
    }
    never_within("one of them is gone", 2 * ttl, both, |count| *count != 2).await;
    for (child, ..) in &mut children {
        child.kill().await.unwrap();
    }
    observer.until("they are gone", gone(ttl) + options().protection(), |seen| seen.is_empty()).await;
}

/// Waits until the other process says that its clock is so many seconds off.
#[cfg(target_os = "linux")]
async fn until_off_by(said: &mut Lines<BufReader<ChildStdout>>, shift: i64) {
    let off = async {
        loop {
            let line = said.next_line().await.unwrap().expect("it says what its clock is");
            let clock = line.split_once("clock ").map(|(_, clock)| clock.parse::<i64>().unwrap());
            if clock.is_some_and(|clock| (clock - now() - shift).abs() < 60) {
                break;
            }
        }
    };
    in_time("its clock is off", PATIENCE, off).await;
}

#[cfg(target_os = "linux")]
fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// The other process: it provides, and reads, and sees itself all the time.
#[cfg(target_os = "linux")]
async fn serve_until_killed(server: &str) {
    let one = client(config([server], options()));
    one.registry.register(instance("orders", &std::process::id().to_string())).await.unwrap();
    let observer = Observer::of(&one, "orders").await;
    loop {
        println!("clock {}", now());
        sleep(POLL).await;
        observer.assert_always("it is there", |seen| seen.get(&std::process::id().to_string()).is_some());
    }
}

/// Nobody could renew while the server was away, and a reader finds it again first: owners get their time, and a crash
/// is noticed after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_away_for_longer_than_the_ttl_costs_no_living_instance() {
    let store = Store::start(Redis::new().durable()).await;
    let ttl = 3 * SECOND;
    let patient = unchecked().ttl(ttl);
    let networks = [proxy(store.server.addr()).await, proxy(store.server.addr()).await];
    let [one, crashing] = [&networks[0], &networks[1]].map(|network| client_at(network, patient.clone()));
    let reader = client(store.config(patient));
    register_all(&one, instances("orders", "i", 20)).await;
    crashing.registry.register(instance("orders", "crashing")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    for frozen in [true, false] {
        if frozen { store.server.freeze().await } else { store.server.kill().await }.unwrap();
        networks.iter().for_each(|network| network.set_mode(Mode::Cut));
        sleep(2 * ttl).await;
        if frozen { store.server.thaw().await } else { store.server.restart().await }.unwrap();
        observer.until("the end of the outage", PATIENCE, is_live).await;
        // At the server too: what a reader took out is only held for a while.
        never_within("one is taken out", ttl / 3, || store.records(), |count| *count != 21).await;
        networks.iter().for_each(|network| network.set_mode(Mode::Pass));
        never_within("one is taken out", 2 * ttl, || store.records(), |count| *count != 21).await;
    }
    assert!(observer.changes().is_empty(), "{:?}", observer.changes());
    networks[1].set_mode(Mode::Cut);
    drop(crashing);
    observer.until("the crashed one is gone", gone(ttl), |seen| seen.len() == 20).await;
}

/// A full server refuses renewals: what is there stays until there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_loses_nobody_and_is_waited_for() {
    let store = Store::start(Redis::new()).await;
    let ttl = 2 * SECOND;
    let patient = unchecked().ttl(ttl);
    let (provider, reader) = (client(store.config(patient.clone())), client(store.config(patient.clone())));
    let leaving = client(store.config(patient));
    register_all(&provider, instances("orders", "i", 3)).await;
    register_all(&leaving, vec![instance("orders", "leaving")]).await;
    let observer = Observer::of(&reader, "orders").await;
    store.set("maxmemory", "1").await;

    let asked = Instant::now();
    let error = provider.registry.register(instance("orders", "late")).await.unwrap_err();
    println!("after {:?}: {error:?}", asked.elapsed());
    assert!(error.kind() == ErrorKind::Unavailable && error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("full"), "{error}");
    // Who leaves needs no room.
    leaving.registry.destroy().await.unwrap();
    observer.until("it left", soon(), |seen| seen.get("leaving").is_none()).await;
    let here = async || observer.now().len();
    // Longer than protection would hold those that are taken for dead: nobody is.
    never_within("one is gone", 4 * ttl, here, |count| *count != 3).await;
    assert_eq!(store.records().await, 3);
    let late = client(store.config(options()));
    assert_eq!(in_time("discover", PATIENCE, late.registry.discover("orders")).await.unwrap().len(), 3);
    assert!(states(&provider).iter().any(|state| !matches!(state, RegistrationState::Registered)));

    store.set("maxmemory", "0").await;
    let room = Instant::now();
    eventually("all are registered", restored(ttl), async || states(&provider), all_registered).await;
    println!("registered {:?} after there was room", room.elapsed());
    observer.until_ids(soon(), &["i-000", "i-001", "i-002", "late"]).await;
    never_within("one is gone", 2 * ttl, async || observer.now().len(), |count| *count != 4).await;
}

/// A server that takes no writes for another reason refuses renewals, too, for longer than the ttl: nobody is taken for
/// dead, neither meanwhile nor by who looks first when it is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_no_writes_for_longer_than_the_ttl_loses_nobody() {
    let store = Store::start(Redis::new()).await;
    let ttl = 2 * SECOND;
    let patient = unchecked().ttl(ttl).protect_for(std::time::Duration::ZERO);
    let (provider, reader) = (store.behind_a_proxy(patient.clone()).await, client(store.config(patient)));
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    store.set("min-replicas-to-write", "1").await;
    let late = provider.registry.register(instance("orders", "late")).await.unwrap_err();
    assert!(late.to_string().contains("too few replicas"), "{late}");
    let here = async || observer.now().len();
    never_within("one is gone", 3 * ttl, here, |count| *count != 3).await;
    // Who may write again looks before the owners renew.
    provider.link.hang();
    store.set("min-replicas-to-write", "0").await;
    sleep(ttl / 2).await;
    provider.link.heal();
    observer.until("the late one", restored(ttl) + soon(), |seen| seen.get("late").is_some()).await;
    never_within("one is gone", 2 * ttl, here, |count| *count != 4).await;
    assert_eq!(observer.changes(), ["+late"]);
}

/// Whoever stalled for longer than its ttl and goes on before anybody took it out is back for those who left it out,
/// although nothing was written.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_stalled_and_was_not_taken_out_is_shown_again() {
    let store = Store::start(Redis::new()).await;
    store.grant("reader", "pw", &crate::errors::least_to_read()).await;
    let ttl = 2 * SECOND;
    let patient = unchecked().ttl(ttl).protect_for(std::time::Duration::ZERO);
    let reader = client(store.config(patient.clone()).user("reader", "pw"));
    let stalling = store.behind_a_proxy(patient).await;
    register_all(&stalling, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    assert_eq!(observer.now().len(), 2);
    stalling.link.hang();
    observer.until("they are left out", gone(ttl), |seen| seen.is_empty()).await;
    let head: String = store.order(&format!("HGET {RECORDS} ~head")).await;
    stalling.link.heal();
    observer.until("they are back", restored(ttl) + soon(), |seen| seen.len() == 2 && is_live(seen)).await;
    assert_eq!(store.order::<String>(&format!("HGET {RECORDS} ~head")).await, head, "nothing was written");
}

/// An override stays, and must not keep those alive who died while nobody looked.
#[tokio::test(flavor = "multi_thread")]
async fn the_dead_beside_an_override_are_taken_out_however_late_somebody_looks() {
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(SECOND).protect_for(std::time::Duration::ZERO);
    let crashing = store.behind_a_proxy(patient.clone()).await;
    register_all(&crashing, instances("orders", "crashing", 2)).await;
    let by_hand = r#"{"v":1,"owner":"me","epoch":1,"status":"down"}"#;
    let mut set = crate::command(&format!("HSET {RECORDS} orders/overrides/crashing-000"));
    set.arg(by_hand).arg("~head").arg("by-hand").exec_async(&mut store.bare().await).await.unwrap();
    // Whoever renews sees that there is something that stays.
    let lasting = async || store.order::<i64>(&format!("PTTL {RECORDS}")).await;
    eventually("it stays", PATIENCE, lasting, |left| *left == -1).await;
    crashing.crash();
    // As if it were long ago: what expires by itself has gone.
    let expiring: i64 = store.order(&format!("PTTL {EXPIRY}")).await;
    assert_eq!(expiring, -1, "it stays with the records");
    store.order::<u64>(&format!("DEL {EXPIRY}")).await;
    let reader = client(store.config(patient));
    let observer = Observer::of(&reader, "orders").await;
    observer.until("the dead are gone", 5 * SECOND + gone(SECOND), |seen| seen.is_empty()).await;
    assert_eq!(store.records().await, 1, "the override is left");
}

/// It may not take out who is dead, and no other reader does: it leaves them out of what it shows.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_may_not_write_sees_the_same() {
    let store = Store::start(Redis::new()).await;
    store.grant("reader", "pw", &crate::errors::least_to_read()).await;
    let ttl = 2 * SECOND;
    let patient = unchecked().ttl(ttl);
    let looking = client(store.config(patient.clone()).user("reader", "pw"));
    let (one, crashing) = (client(store.config(patient.clone())), store.behind_a_proxy(patient).await);
    one.registry.register(instance("orders", "living")).await.unwrap();
    register_all(&crashing, vec![instance("orders", "crashing"), instance("payments", "crashing")]).await;
    let (orders, payments) = (Observer::of(&looking, "orders").await, Observer::of(&looking, "payments").await);
    let refused = looking.registry.register(instance("orders", "refused")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused:?}");
    assert_eq!(orders.now().len(), 2);

    crashing.crash();
    let crashed = Instant::now();
    orders.until_ids(gone(ttl), &["living"]).await;
    payments.until_ids(gone(ttl), &[]).await;
    println!("gone {:?} after the crash", crashed.elapsed());
    // Nobody has taken it out there.
    let left: Vec<String> = store.order("HKEYS {services/payments}:records").await;
    assert!(left.iter().any(|field| field == "payments/providers/crashing"), "{left:?}");
    // To a new one nobody has said that somebody looked: whoever is there had no chance to renew, as far as it knows.
    let late = client(store.config(unchecked().ttl(ttl)).user("reader", "pw"));
    let late = (Observer::of(&late, "payments").await, late);
    late.0.until_ids(gone(ttl), &[]).await;
    one.registry.register(instance("payments", "new")).await.unwrap();
    payments.until_ids(soon(), &["new"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_on_a_replica_sees_the_same() {
    // The Sentinels have no part in it.
    let servers = Redis::sentinel();
    let size = servers.size();
    let pair = Cluster::start(servers, size).await.unwrap();
    let [primary, replica] = [0, 1].map(|index| pair.members()[index].addr());
    let ttl = 2 * SECOND;
    let patient = unchecked().ttl(ttl);
    let reader = client(config([replica], patient.clone()));
    let observer = Observer::of(&reader, "orders").await;
    let living = client(config([primary], patient.clone()));
    let network = proxy(primary).await;
    let crashing = client_at(&network, patient);
    register_all(&living, instances("orders", "i", 3)).await;
    crashing.registry.register(instance("orders", "crashing")).await.unwrap();
    observer.until("all of them", soon(), |seen| seen.len() == 4).await;
    living.registry.register(weighing(instance("orders", "i-000"), 7)).await.unwrap();
    let changed = |seen: &registry_core::Snapshot| seen.get("i-000").is_some_and(|one| one.weight == 7);
    observer.until("a change", soon(), changed).await;
    network.set_mode(Mode::Cut);
    drop(crashing);
    observer.until("the crashed one is gone", gone(ttl) + POLL, |seen| seen.len() == 3).await;
    never_within("another one is gone", 2 * ttl, async || observer.now().len(), |count| *count != 3).await;
    let error = reader.registry.register(instance("orders", "refused")).await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("replica"), "{error:?}");
}

/// However often: no entry in the log, no message, nothing that a reader would be told.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_without_a_change_writes_no_entry_and_wakes_no_reader() {
    const BEATS: usize = 30;
    let store = Store::start(Redis::new()).await;
    let patient = unchecked().ttl(60 * SECOND);
    let provider = client(store.config(patient.clone()));
    register_all(&provider, instances("orders", "i", 300)).await;
    let network = proxy(store.server.addr()).await;
    let reader = client(config([network.addr()], patient).poll(60 * SECOND));
    let observer = Observer::of(&reader, "orders").await;
    let (info, entries, messages) =
        (format!("XINFO STREAM {}", crate::LOG), store.calls("xadd").await, store.calls("publish").await);
    let log: Vec<redis::Value> = store.order(&info).await;
    let (bytes, seen) = (network.stats().to_client, observer.history().len());
    for _ in 0..BEATS {
        let heartbeat = provider.registry.heartbeat().await.unwrap();
        assert_eq!((heartbeat.renewed.len(), heartbeat.reregistered.len()), (300, 0));
    }
    assert_eq!(store.order::<Vec<redis::Value>>(&info).await, log);
    assert_eq!((store.calls("xadd").await, store.calls("publish").await), (entries, messages));
    let bytes = network.stats().to_client - bytes;
    println!("{bytes} bytes to the reader");
    // A message for each would be more than thousand; a look of its own is less.
    assert!(bytes < 1000, "{bytes}");
    assert_eq!(observer.history().len(), seen);
}

/// Keys that are about to go by themselves stay for those who look, and for who comes with a longer ttl than any before.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_about_to_go_by_itself_stays_for_whoever_comes() {
    let store = Store::start(Redis::new()).await;
    let left = async |key| store.order::<i64>(&format!("PTTL {key}")).await;
    let short = unchecked().ttl(SECOND);
    let (first, reader) = (client(store.config(short.clone())), client(store.config(short)));
    first.registry.register(instance("orders", "1")).await.unwrap();
    assert!(first.registry.unregister("orders", "1").await.unwrap());
    let observer = Observer::of(&reader, "orders").await;
    let last = async || {
        for key in [RECORDS, EXPIRY] {
            assert_eq!(store.order::<u64>(&format!("PEXPIRE {key} 2000")).await, 1);
        }
    };
    last().await;
    eventually("the reader sees to it", 2 * SECOND, async || left(RECORDS).await, |left| *left > 2000).await;
    last().await;
    let lasting = client(store.config(unchecked().ttl(60 * SECOND)));
    lasting.registry.register(instance("orders", "2")).await.unwrap();
    for key in [RECORDS, EXPIRY, crate::LOG] {
        assert!(left(key).await > 60_000, "{key}: {}", left(key).await);
    }
    observer.until_ids(soon(), &["2"]).await;
}

/// The expiry times are lost, and who registers then is not heard of again: what is left goes by itself, all of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_after_the_expiry_times_were_lost_does_not_stay_for_ever() {
    let store = Store::start(Redis::new()).await;
    // Without the engine, nobody renews.
    let backend = RedisBackend::new(store.config(unchecked().ttl(60 * SECOND))).unwrap();
    let put = async |id: &str| {
        let instance = instance("orders", id);
        let record = Record {
            key: Key::provider(instance.service.clone(), instance.id.clone()),
            owner: backend.owner().clone(),
            epoch: 0,
            lifetime: Lifetime::Session,
            content: Content::Instance(instance.into()),
        };
        assert_eq!(backend.put(&[record], Intent::Claim).await.remove(0).unwrap(), 1);
    };
    put("a").await;
    assert_eq!(store.order::<u64>(&format!("DEL {EXPIRY}")).await, 1);
    // For whoever comes next it is time to look.
    store.order::<()>(&format!("HSET {RECORDS} ~seen 1")).await;
    put("b").await;
    for key in [RECORDS, EXPIRY, crate::LOG] {
        let left: i64 = store.order(&format!("PTTL {key}")).await;
        assert!(left > 0, "{key}: {left}");
    }
    assert_eq!(store.order::<u64>(&format!("ZCOUNT {EXPIRY} -inf (+inf")).await, 2);
}

/// A service that nobody provides any more leaves nothing behind, and one that somebody does stays.
#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_a_service_that_nobody_renews_go_by_themselves() {
    let store = Store::start(Redis::new()).await;
    let ttl = SECOND;
    let patient = unchecked().ttl(ttl).announce("reader".parse::<registry_core::ServiceName>().unwrap());
    let (living, crashing) = (client(store.config(patient.clone())), store.behind_a_proxy(patient.clone()).await);
    living.registry.register(instance("orders", "living")).await.unwrap();
    register_all(&crashing, instances("payments", "crashing", 3)).await;
    let observer = Observer::of(&living, "orders").await;
    drop(Observer::of(&crashing, "payments").await);
    crashing.crash();
    let crashed = Instant::now();
    let long = 4 * ttl + 60 * SECOND;
    let keys = async || {
        let mut keys: Vec<String> = store.order("KEYS *").await;
        keys.sort();
        keys
    };
    let left = keys().await;
    assert!(left.iter().filter(|key| key.starts_with("{services/payments}")).count() >= 3, "{left:?}");
    for key in &left {
        let life: i64 = store.order(&format!("PTTL {key}")).await;
        assert!(life > 0 && life <= long.as_millis() as i64, "{key}: {life} ms");
    }
    let gone = |keys: &Vec<String>| !keys.iter().any(|key| key.starts_with("{services/payments}"));
    eventually("all of it is gone", long + SLACK, keys, gone).await;
    println!("gone {:?} after the crash", crashed.elapsed());
    let kept = keys().await;
    for key in [RECORDS, EXPIRY, "{services/}:services"] {
        assert!(kept.iter().any(|kept| kept == key), "{key} in {kept:?}");
    }
    assert!(observer.changes().is_empty() && observer.now().len() == 1, "{observer:?}");
    assert_eq!(living.registry.services().await.unwrap(), ["orders".parse().unwrap()]);
}
