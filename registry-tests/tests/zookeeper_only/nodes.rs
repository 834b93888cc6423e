//! Nodes that come and go under us, that are many, that are large, or that are not ours.

use std::{error::Error as StdError, time::Duration};

use registry_core::{ErrorKind, Event, Instance, RegistrationState};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, RECONCILE, all_registered, eventually, ids, in_time, instance, instances, is_live,
        register_all, states, weighing,
    },
    harness::{Client, close_zookeeper_session},
    servers::ZooKeeper,
};
use tokio::time::Instant;
use zookeeper_client::{Client as Bare, CreateMode, Error};

use crate::{
    CONTAINER, ORDERS, PERSISTENT, SECOND, SLACK, Store, children, client, left, options, session_of, soon, unchecked,
};

/// A record of a process that is no more.
const FOREIGN: &[u8] = br#"{"v":1,"owner":"other","epoch":1,"endpoints":["http://10.0.0.5:8080"]}"#;

/// A ZooKeeper that takes empty containers away as soon as it sees one: it looks this often.
fn reaping(every: Duration) -> ZooKeeper {
    ZooKeeper::new().property("znode.container.checkIntervalMs", &every.as_millis().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_the_server_took_away_when_it_was_empty_comes_back() {
    let store = Store::start(reaping(Duration::from_millis(200))).await;
    let (provider, reader) = (client(store.config(unchecked())), client(store.config(unchecked())));
    let (observer, bare) = (Observer::of(&reader, "orders").await, store.bare().await);
    for _ in 0..3 {
        provider.registry.register(instance("orders", "1")).await.unwrap();
        observer.until_ids(soon(), &["1"]).await;
        assert!(provider.registry.unregister("orders", "1").await.unwrap());
        observer.until_ids(soon(), &[]).await;
        let service = async || bare.check_stat("/services/orders").await.unwrap().is_none();
        eventually("the service is taken away", PATIENCE, service, |gone| *gone).await;
    }
    provider.registry.register(instance("orders", "2")).await.unwrap();
    observer.until_ids(soon(), &["2"]).await;
    assert_eq!(observer.changes(), ["+1", "-1", "+1", "-1", "+1", "-1", "+2"]);
    observer.assert_always("live", is_live);
    assert_eq!(reader.registry.services().await.unwrap(), ["orders".parse().unwrap()]);
}

/// Whoever only reads leaves nothing: neither the service that it waits for, nor the root of them all.
#[tokio::test(flavor = "multi_thread")]
async fn following_what_does_not_exist_makes_nothing() {
    let store = Store::start(ZooKeeper::new()).await;
    let (reader, bare) = (client(store.config(unchecked())), store.bare().await);
    let observer = Observer::of(&reader, "orders").await;
    assert!(reader.registry.discover("payments").await.unwrap().is_empty());
    assert!(reader.registry.services().await.unwrap().is_empty());
    assert_eq!(children(&bare, "/").await, ["zookeeper"]);
    let provider = client(store.config(unchecked()));
    provider.registry.register(instance("orders", "1")).await.unwrap();
    observer.until_ids(soon(), &["1"]).await;
    assert_eq!(children(&bare, "/services").await, ["orders"]);
}

/// The server takes containers away between any two of our requests.
#[tokio::test(flavor = "multi_thread")]
async fn registering_while_the_server_takes_directories_away_always_succeeds() {
    let store = Store::start(reaping(Duration::from_millis(2))).await;
    let reader = client(store.config(unchecked()));
    let observer = Observer::of(&reader, "orders").await;
    let mut clients = Vec::new();
    for index in 0..2 {
        clients.push((client(store.config(unchecked())), format!("{index}")));
    }
    let bare = store.bare().await;
    let before = bare.check_stat("/services").await.unwrap().map_or(0, |stat| stat.cversion);
    let hammer = |(one, id): &(Client, String)| {
        let (registry, id) = (one.registry.clone(), id.clone());
        async move {
            for round in 0..100 {
                let registered = registry.register(instance("orders", &id)).await;
                assert!(registered.is_ok(), "round {round}: {registered:?}");
                let removed = registry.unregister("orders", &id).await;
                assert!(matches!(removed, Ok(true)), "round {round}: {removed:?}");
            }
            registry.register(instance("orders", &id)).await.unwrap();
        }
    };
    tokio::join!(hammer(&clients[0]), hammer(&clients[1]));
    let times = (bare.check_stat("/services").await.unwrap().unwrap().cversion - before) / 2;
    println!("the service was made and taken away about {times} times");
    assert!(times > 5, "the server was not fast enough to be in the way");
    observer.until("both", soon(), |seen| ids(seen) == ["0", "1"] && is_live(seen)).await;
    assert_eq!(children(&bare, ORDERS).await.len(), 2);
    for (one, _) in &clients {
        assert!(all_registered(&states(one)));
    }
}

/// Each owner makes the node anew. Nobody sees it go.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_take_overs_in_a_row_are_twenty_updates() {
    let store = Store::start(ZooKeeper::new()).await;
    let reader = client(store.config(unchecked()));
    let mut owners = vec![client(store.config(unchecked()))];
    owners[0].registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    for owner in 1..=20 {
        let next = client(store.config(unchecked()));
        next.registry.register(weighing(instance("orders", "1"), owner)).await.unwrap();
        observer.until("the new owner's", soon(), |seen| seen.get("1").is_some_and(|one| one.weight == owner)).await;
        owners.push(next);
    }
    // Without waiting for anyone.
    for owner in 21..=30 {
        let next = client(store.config(unchecked()));
        next.registry.register(weighing(instance("orders", "1"), owner)).await.unwrap();
        owners.push(next);
    }
    observer.until("the last one's", soon(), |seen| seen.get("1").is_some_and(|one| one.weight == 30)).await;
    let changes = observer.changes();
    assert!(changes.len() >= 20 && changes.iter().all(|change| change == "~1"), "{changes:?}");
    observer.assert_always("it is there", |seen| ids(seen) == ["1"] && is_live(seen));
    // Who lost it comes to know, and does not take it back.
    let lost = |states: &Vec<RegistrationState>| matches!(&states[..], [RegistrationState::Lost { .. }]);
    owners[29].registry.heartbeat().await.unwrap();
    let check = async || {
        // A later register of the same key restores, and is refused.
        let refused = owners[29].registry.register(instance("orders", "1")).await;
        (refused.map_err(|error| error.kind()), lost(&states(&owners[29])))
    };
    let conflict = |seen: &(Result<(), ErrorKind>, bool)| seen.0 == Err(ErrorKind::Conflict);
    let _ = eventually("the one before is told", PATIENCE, check, conflict).await;
    assert_eq!(observer.now().get("1").unwrap().weight, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_services_are_listed() {
    const MANY: usize = 5000;
    let store = Store::start(ZooKeeper::new()).await;
    let options = unchecked().ttl(30 * SECOND).request_timeout(20 * SECOND);
    let (provider, reader) = (client(store.config(options.clone())), client(store.config(options)));
    let start = Instant::now();
    register_all(&provider, (0..MANY).map(|index| instance(&format!("s-{index:04}"), "1")).collect()).await;
    println!("{MANY} services made in {:?}", start.elapsed());
    // Some are empty, and some are no services.
    for index in 0..10 {
        assert!(provider.registry.unregister(&format!("s-{index:04}"), "1").await.unwrap());
    }
    let bare = store.bare().await;
    bare.create("/services/~notes", b"", &PERSISTENT).await.unwrap();
    bare.create("/services/notes", b"", &PERSISTENT).await.unwrap();
    let start = Instant::now();
    let services = in_time("services", 10 * SECOND, reader.registry.services()).await.unwrap();
    println!("{} services listed in {:?}", services.len(), start.elapsed());
    let expected: Vec<_> = (10..MANY).map(|index| format!("s-{index:04}")).collect();
    assert!(services.iter().map(|service| service.as_str()).eq(expected.iter().map(String::as_str)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_five_thousand_instances_is_read_and_followed() {
    const MANY: usize = 5000;
    let store = Store::start(ZooKeeper::new()).await;
    let options = unchecked().ttl(30 * SECOND).request_timeout(20 * SECOND);
    let provider = client(store.config(options.clone()));
    let early = client(store.config(options.clone()));
    let from_the_start = Observer::of(&early, "orders").await;
    let start = Instant::now();
    register_all(&provider, instances("orders", "i", MANY)).await;
    println!("{MANY} registered in {:?}", start.elapsed());
    from_the_start.until("all of them", PATIENCE, |seen| seen.len() == MANY).await;
    println!("followed after {:?}", start.elapsed());

    let late = store.behind_a_proxy(options).await;
    let start = Instant::now();
    let listed = in_time("discover", 10 * SECOND, late.registry.discover("orders")).await.unwrap();
    println!("{MANY} listed in {:?}", start.elapsed());
    assert!(listed.len() == MANY && is_live(&listed));
    let observer = Observer::of(&late, "orders").await;
    late.link.cut();
    assert!(provider.registry.unregister("orders", "i-000").await.unwrap());
    provider.registry.register(weighing(instance("orders", "i-001"), 7)).await.unwrap();
    late.link.heal();
    let healed = Instant::now();
    let caught_up = |seen: &registry_core::Snapshot| {
        is_live(seen) && seen.len() == MANY - 1 && seen.get("i-001").is_some_and(|one| one.weight == 7)
    };
    observer.until("the changes", PATIENCE, caught_up).await;
    println!("caught up {:?} after a cut", healed.elapsed());
    let mut changes = observer.changes();
    changes.sort();
    assert_eq!(changes, ["-i-000", "~i-001"]);
    let heartbeat = provider.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.failed.len()), (MANY - 1, 0));
}

fn ballasted(mut instance: Instance, bytes: usize) -> Instance {
    instance.metadata.insert("ballast".to_owned(), "x".repeat(bytes));
    instance
}

/// The largest records that the library takes, so many that no request would hold them all.
#[tokio::test(flavor = "multi_thread")]
async fn large_records_never_make_a_request_that_the_server_refuses() {
    let store = Store::start(ZooKeeper::new().property("jute.maxbuffer", "600000")).await;
    let options = unchecked().ttl(30 * SECOND).request_timeout(20 * SECOND);
    let (provider, reader) = (client(store.config(options.clone())), client(store.config(options)));
    let events = Events::of(&provider);
    let large = instances("orders", "i", 100).into_iter().map(|one| ballasted(one, 60_000)).collect();
    register_all(&provider, large).await;
    register_all(&provider, instances("orders", "j", 1000)).await;
    let observer = Observer::of(&reader, "orders").await;
    observer.until("all of them", PATIENCE, |seen| seen.len() == 1100 && is_live(seen)).await;
    assert_eq!(reader.registry.services().await.unwrap().len(), 1);
    assert!(!format!("{events:?}").contains("Suspended"), "{events:?}");
}

/// A server may take even less than one record: it hangs up, whoever sends one. What is there stays, and what is smaller
/// is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_too_large_for_the_server_is_told_and_harms_no_other() {
    let store = Store::start(ZooKeeper::new().property("jute.maxbuffer", "20000")).await;
    let patient = unchecked().ttl(30 * SECOND);
    let (provider, reader) = (client(store.config(patient.clone())), client(store.config(patient)));
    register_all(&provider, instances("orders", "i", 20)).await;
    let observer = Observer::of(&reader, "orders").await;
    let bare = store.bare().await;
    let before = left(&bare, ORDERS).await;

    let large = ballasted(instance("orders", "large"), 30_000);
    let error = provider.registry.register(large).await.unwrap_err();
    let why = error.source().unwrap().to_string();
    println!("{error}: {why}");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(why.contains("jute.maxbuffer"), "{error}: {why}");
    // It is tried again now and then. The others get through.
    let register = async || provider.registry.register(instance("orders", "small")).await;
    eventually("the small one", PATIENCE, register, Result::is_ok).await.unwrap();
    observer.until("the small one", soon(), |seen| seen.get("small").is_some()).await;
    let withdraw = async || provider.registry.unregister("orders", "large").await;
    eventually("the large one is given up", PATIENCE, withdraw, Result::is_ok).await.unwrap();
    assert!(all_registered(&states(&provider)) && provider.registry.registrations().len() == 21);
    let mut after = left(&bare, ORDERS).await;
    after.remove("small");
    assert_eq!(after, before);
    assert_eq!(observer.changes(), ["+small"]);
    observer.assert_always("live", is_live);
}

/// One that the server hangs up on and many that it takes, in the same call; and then a session is lost, and all of them
/// have to be made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_too_large_for_the_server_keeps_no_other_of_its_batch() {
    const MANY: usize = 400;
    let store = Store::start(ZooKeeper::new().property("jute.maxbuffer", "50000")).await;
    let patient = unchecked().ttl(30 * SECOND);
    let provider = client(store.config(patient));
    let all = [ballasted(instance("orders", "large"), 55_000)].into_iter().chain(instances("orders", "i", MANY));
    let registering = tokio::spawn({
        let (registry, all) = (provider.registry.clone(), all.collect());
        async move { registry.register_all(all).await }
    });
    let bare = store.bare().await;
    eventually("the others", PATIENCE, || children(&bare, ORDERS), |names| names.len() == MANY).await;
    let errors: Vec<_> = registering.await.unwrap().into_iter().filter_map(Result::err).collect();
    assert!(errors.iter().all(registry_core::Error::is_retryable), "{errors:?}");
    let withdraw = async || provider.registry.unregister("orders", "large").await;
    eventually("the large one is given up", PATIENCE, withdraw, Result::is_ok).await.unwrap();

    let session = session_of(&bare, &format!("{ORDERS}/i-000")).await;
    let node = format!("{ORDERS}/i-000");
    // Its own client may have been quicker: then it is ended again.
    while bare.check_stat(&node).await.unwrap().is_some_and(|stat| stat.ephemeral_owner == session) {
        close_zookeeper_session(store.server.addr(), session).await.unwrap();
    }
    let back = async || left(&bare, ORDERS).await;
    let again = |left: &crate::Left| left.len() == MANY && left.values().all(|(owner, ..)| *owner != session);
    eventually("all are made again", PATIENCE, back, again).await;
}

/// Somebody writes something else into our nodes, which stay on our session: the next checks find it.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_written_to_by_hand_is_ours_and_put_again() {
    let store = Store::start(ZooKeeper::new()).await;
    let (provider, other) = (client(store.config(options())), client(store.config(unchecked())));
    register_all(&provider, instances("orders", "i", 3)).await;
    let (observer, bare) = (Observer::of(&other, "orders").await, store.bare().await);
    for bytes in [&b"garbage"[..], b"", br#"{"v":1}"#] {
        bare.set_data(&format!("{ORDERS}/i-001"), bytes, None).await.unwrap();
        observer.until_ids(soon(), &["i-000", "i-002"]).await;
        observer.until_ids(RECONCILE + soon(), &["i-000", "i-001", "i-002"]).await;
    }
    eventually("it knows", PATIENCE, async || states(&provider), all_registered).await;
    // Who does not check takes it out all the same.
    register_all(&other, instances("payments", "i", 2)).await;
    let payments = ORDERS.replace("orders", "payments");
    bare.set_data(&format!("{payments}/i-001"), b"garbage", None).await.unwrap();
    assert!(other.registry.unregister("payments", "i-001").await.unwrap());
    assert_eq!(children(&bare, &payments).await, ["i-000"]);
}

/// Another user took one of the nodes, and closed it: the others leave in good order.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_closed_to_us_keeps_no_other_from_leaving() {
    let store = Store::start(ZooKeeper::new()).await;
    let held = unchecked().protect_for(60 * SECOND);
    let (provider, reader) = (client(store.config(held.clone())), client(store.config(held)));
    register_all(&provider, instances("orders", "i", 20)).await;
    let observer = Observer::of(&reader, "orders").await;
    let stranger = zookeeper_client::Client::connector().with_auth("digest", b"stranger:pw");
    let stranger = crate::connect(store.server.addr(), stranger).await.unwrap();
    let taken = format!("{ORDERS}/i-007");
    stranger.delete(&taken, None).await.unwrap();
    let closed = CreateMode::Persistent.with_acls(zookeeper_client::Acls::creator_all());
    stranger.create(&taken, FOREIGN, &closed).await.unwrap();
    in_time("destroy", PATIENCE, provider.registry.destroy()).await.unwrap();
    observer.until("they left", soon(), |seen| seen.len() <= 1).await;
    assert_eq!(children(&store.bare().await, ORDERS).await, ["i-007"]);
}

async fn put(bare: &Bare, path: &str, bytes: &[u8]) {
    let (parent, _) = path.rsplit_once('/').unwrap();
    bare.mkdir(parent, &CONTAINER).await.unwrap();
    match bare.create(path, bytes, &PERSISTENT).await {
        Ok(_) => {}
        Err(Error::NodeExists) => drop(bare.set_data(path, bytes, None).await.unwrap()),
        Err(error) => panic!("{path}: {error}"),
    }
}

/// Nodes of other formats, with nodes below them, and nodes that nobody knows are none of ours, wherever they lie.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_are_not_ours_are_ignored_and_left_alone() {
    let store = Store::start(ZooKeeper::new()).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    let bare = store.bare().await;
    let strange: [(&str, &[u8]); 16] = [
        // Other formats.
        ("/services/orders/providers/url", b"http://10.0.0.5:8080"),
        ("/services/orders/providers/empty", b""),
        ("/services/orders/providers/ownerless", br#"{"v":1,"epoch":1}"#),
        ("/services/orders/providers/null", b"null"),
        ("/services/orders/providers/binary", b"\x08\x01\xff\xfe"),
        ("/services/orders/overrides/i-000", b"drain"),
        // Other places.
        ("/services/orders/providers/url/below", FOREIGN),
        ("/services/orders/providers/url/below/it", b""),
        ("/services/orders/providers/%zz", FOREIGN),
        ("/services/orders/providers/\u{e4}", FOREIGN),
        ("/services/orders/providers/~left~i-000", b""),
        ("/services/orders/providers/lock-0000000001", b""),
        ("/services/orders/notes/1", FOREIGN),
        ("/services/notes/other/1", FOREIGN),
        ("/services/%zz/providers/1", FOREIGN),
        ("/services-old/payments/providers/1", FOREIGN),
    ];
    for (path, bytes) in strange {
        put(&bare, path, bytes).await;
    }
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    assert_eq!(ids(&observer.now()), ["i-000", "i-001"]);
    // Again, under the eyes of the watch; and a sequence, as of a lock.
    for (path, bytes) in strange {
        put(&bare, path, bytes).await;
    }
    let sequence = CreateMode::PersistentSequential.with_acls(zookeeper_client::Acls::anyone_all());
    bare.create("/services/orders/providers/lock-", b"", &sequence).await.unwrap();
    provider.registry.register(instance("orders", "last")).await.unwrap();
    observer.until_ids(soon(), &["i-000", "i-001", "last"]).await;
    assert_eq!(observer.changes(), ["+last"]);
    observer.assert_always("live", is_live);
    assert_eq!(reader.registry.services().await.unwrap(), ["orders".parse().unwrap()]);
    let heartbeat = provider.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.failed.len()), (3, 0));

    // One of its marks has a name that is taken: it leaves all the same.
    assert!(provider.registry.unregister("orders", "i-000").await.unwrap());
    observer.until_ids(options().protection() + soon(), &["i-001", "last"]).await;
    // And they are nobody's to take out.
    in_time("destroy", options().request_timeout + SECOND + SLACK, provider.registry.destroy()).await.unwrap();
    observer.until_ids(options().protection() + soon(), &[]).await;
    for (path, bytes) in strange {
        assert_eq!(bare.get_data(path).await.unwrap().0, bytes, "{path}");
    }
}

/// Somebody made nodes below a record: its owner cannot take it out, says so, and goes on with the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_with_nodes_below_it_is_in_nobodys_way_but_its_own() {
    let store = Store::start(ZooKeeper::new()).await;
    let (provider, reader) = (client(store.config(options())), client(store.config(options())));
    let bare = store.bare().await;
    let taken = format!("{ORDERS}/taken");
    put(&bare, &taken, FOREIGN).await;
    put(&bare, &format!("{taken}/below"), b"").await;
    let observer = Observer::of(&reader, "orders").await;
    let events = Events::of(&provider);
    let outcomes = provider
        .registry
        .register_all(vec![instance("orders", "1"), instance("orders", "taken"), instance("orders", "2")])
        .await;
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
    let error = outcomes[1].as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
    observer.until_ids(soon(), &["1", "2", "taken"]).await;
    assert_eq!(provider.registry.registrations().len(), 2, "what is refused is withdrawn");
    assert!(!format!("{events:?}").contains("Suspended"), "{events:?}");
    bare.delete(&format!("{taken}/below"), None).await.unwrap();
    provider.registry.register(weighing(instance("orders", "taken"), 7)).await.unwrap();
    observer.until("it is taken over", soon(), |seen| seen.get("taken").is_some_and(|one| one.weight == 7)).await;
    events
        .until("it is told", soon(), |event| matches!(event, Event::Registration(one) if one.id().as_str() == "taken"))
        .await;
}
