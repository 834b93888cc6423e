//! What registering, updating and unregistering do, and that nobody's word is lost.

use futures::future::join_all;
use registry_core::{Content, ErrorKind, Instance, RegistrationState, Snapshot, Status};
use tokio::net::{TcpListener, TcpStream};

use super::support::*;
use crate::harness::Harness;

/// What is registered is what others discover.
pub async fn a_registered_instance_is_discovered_elsewhere<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let mut registered = Instance::builder("orders", "7f3a")
        .endpoint("http://10.0.0.5:8080")
        .endpoint("grpc://[2001:db8::1]:50051")
        .version("1.2.3")
        .zone("eu-1a")
        .weight(7)
        .metadata("commit", "d34db33f")
        .build()
        .expect("the instance is valid");
    provider.registry.register(registered.clone()).await.expect("register");

    let seen = eventually(
        "the instance",
        soon::<H>(),
        || async { reader.registry.discover("orders").await.expect("discover") },
        |seen| ids(seen) == ["7f3a"],
    )
    .await;
    let found = &seen.instances()[0];
    assert!(found.registered_at.is_some());
    registered.registered_at = found.registered_at;
    assert_eq!(**found, registered);
}

/// Registering the same again changes nothing for anyone.
pub async fn registering_again_changes_nothing<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    for _ in 0..3 {
        provider.registry.register(instance("orders", "1")).await.expect("register again");
    }
    // A change that comes after whatever came before.
    provider.registry.register(instance("orders", "2")).await.expect("register");
    observer.until_ids(soon::<H>(), &["1", "2"]).await;
    assert_eq!(observer.changes(), ["+2"]);
    assert_eq!(provider.registry.registrations().len(), 2);
}

/// An update is one change, and the instance keeps the time of its first registration.
pub async fn an_update_is_one_change_and_keeps_registered_at<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    let before = observer.now().get("1").cloned().expect("it is registered");

    provider.registry.register(weighing(instance("orders", "1"), 7)).await.expect("update");
    provider.registry.register(instance("orders", "2")).await.expect("register");
    let seen = observer.until_ids(soon::<H>(), &["1", "2"]).await;
    let after = seen.get("1").expect("it is registered");
    assert_eq!((after.weight, after.registered_at), (7, before.registered_at));
    assert_eq!(observer.changes(), ["~1", "+2"]);
}

/// Each instance of a batch has its own outcome, in order; a bad one stops no other.
pub async fn one_bad_record_in_a_batch_stops_no_other<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let mut batch = instances("orders", "good", 20);
    batch[7] = oversize("orders", "bad");
    let outcomes = provider.registry.register_all(batch).await;
    assert_eq!(outcomes.len(), 20);
    for (index, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(error) if index == 7 => assert_eq!(error.kind(), ErrorKind::InvalidInput),
            outcome => assert!(outcome.is_ok() && index != 7, "#{index}: {outcome:?}"),
        }
    }
    // Withdrawn: it is not tried again for ever.
    assert_eq!(provider.registry.registrations().len(), 19);
    Observer::of(&reader, "orders").await.until("the 19 good ones", soon::<H>(), |seen| seen.len() == 19).await;
}

/// An update that the store can never take leaves in force what was there before.
pub async fn a_refused_update_leaves_the_previous_content_in_force<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    provider.registry.register(weighing(instance("orders", "1"), 7)).await.expect("register");
    let error = provider.registry.register(oversize("orders", "1")).await.expect_err("it is too large");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let registrations = provider.registry.registrations();
    assert_eq!(registrations[0].instance.weight, 7);
    assert!(registrations[0].state.is_registered(), "{registrations:?}");
    assert_eq!(record(&store, &key("orders", "1")).await.map(|record| weight(&record.content)), Some(7));
}

/// Unregistering takes out what is ours and says so; the second time there is nothing to take out.
pub async fn unregister_says_whether_it_was_ours<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "orders").await;
    register_all(&provider, instances("orders", "i", 2)).await;
    observer.until_ids(soon::<H>(), &["i-000", "i-001"]).await;

    assert!(provider.registry.unregister("orders", "i-000").await.expect("unregister"));
    observer.until_ids(soon::<H>(), &["i-001"]).await;
    assert!(!provider.registry.unregister("orders", "i-000").await.expect("unregister again"));
    assert_eq!(provider.registry.registrations().len(), 1);
    assert_eq!(store.raw(&key("orders", "i-000")).await, None);
}

/// What another process registered is not ours to take out.
pub async fn unregister_never_touches_what_others_registered<H: Harness>() {
    let store = H::start().await;
    let (provider, other) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    assert!(!other.registry.unregister("orders", "1").await.expect("unregister"));
    assert!(!other.registry.unregister("payments", "1").await.expect("unregister"));
    assert!(record(&store, &key("orders", "1")).await.is_some());
}

/// An instance that was unregistered can be registered again at once.
pub async fn what_left_can_come_back<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "orders").await;
    for round in 1..=5 {
        provider.registry.register(weighing(instance("orders", "1"), round)).await.expect("register");
        observer.until("it came", soon::<H>(), |seen| seen.get("1").is_some_and(|one| one.weight == round)).await;
        assert!(provider.registry.unregister("orders", "1").await.expect("unregister"));
        observer.until_ids(soon::<H>(), &[]).await;
    }
}

/// The local registered-key set shows each key, sorted, with its state.
pub async fn registrations_show_each_key_and_its_state<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    assert!(provider.registry.registrations().is_empty());
    register_all(&provider, vec![instance("b", "1"), instance("a", "2"), instance("a", "1")]).await;
    let shown: Vec<_> = provider
        .registry
        .registrations()
        .iter()
        .map(|one| format!("{}/{} {}", one.service(), one.id(), one.state))
        .collect();
    assert_eq!(shown, ["a/1 registered", "a/2 registered", "b/1 registered"]);
    let one = provider.registry.registration("a", "2").expect("it is registered here");
    assert_eq!((one.service().as_str(), one.id().as_str(), one.state.is_registered()), ("a", "2", true));
    for (service, id) in [("b", "2"), ("c", "1"), ("", "1")] {
        assert!(provider.registry.registration(service, id).is_none(), "{service:?}/{id:?}");
    }
}

/// Services may be named by method: one process registers and updates the methods of several services in batches, they are
/// listed by the service before the `/`, and each is unregistered and followed by itself.
pub async fn methods_of_services_come_in_batches_and_are_followed_one_by_one<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let methods = ["OrderService/Get", "OrderService/List", "UserService/Login", "UserService/Logout"];
    let batch = |version: &str| methods.map(|method| versioned(instance(method, "1"), version)).to_vec();
    register_all(&provider, batch("1")).await;
    let observers = methods.map(|method| Observer::of(&reader, method));
    let [get, list, login, logout] = join_all(observers).await.try_into().expect("as many as methods");
    for observer in [&get, &list, &login, &logout] {
        observer.until("version 1", soon::<H>(), |seen| is_version(seen, "1")).await;
    }

    register_all(&provider, batch("2")).await;
    for observer in [&get, &list, &login, &logout] {
        observer.until("version 2", soon::<H>(), |seen| is_version(seen, "2")).await;
    }
    let of_users = || async {
        let services = reader.registry.services().await.expect("services");
        let of_users = services.into_iter().filter(|name| name.starts_with("UserService/"));
        of_users.map(|name| name.as_str().to_owned()).collect::<Vec<_>>()
    };
    eventually("both methods", soon::<H>(), of_users, |listed| *listed == methods[2..]).await;

    let woken = [&get, &list, &login].map(|observer| observer.history().len());
    assert!(provider.registry.unregister("UserService/Logout", "1").await.expect("unregister"));
    logout.until_ids(soon::<H>(), &[]).await;
    eventually("the other method", soon::<H>(), of_users, |listed| *listed == methods[2..3]).await;
    // A change that comes after whatever came before.
    provider.registry.register(instance("UserService/Login", "2")).await.expect("register");
    login.until_ids(soon::<H>(), &["1", "2"]).await;
    assert_eq!(login.changes().last().map(String::as_str), Some("+2"));
    assert_eq!(logout.changes().last().map(String::as_str), Some("-1"));
    let woken_since = [&get, &list, &login].map(|observer| observer.history().len());
    assert_eq!(woken_since, [woken[0], woken[1], woken[2] + 1], "nobody is woken by another method");
    assert_eq!(provider.registry.registrations().len(), 4);
}

fn versioned(mut instance: Instance, version: &str) -> Instance {
    instance.version = Some(version.to_owned());
    instance
}

fn is_version(seen: &Snapshot, version: &str) -> bool {
    seen.len() == 1 && seen.instances()[0].version.as_deref() == Some(version)
}

/// A heartbeat tells what it renewed and what it had to register again.
pub async fn a_heartbeat_reports_what_it_renewed_and_what_it_restored<H: Harness>() {
    let store = H::start().await;
    // Nothing but the heartbeat shall find out.
    let provider = store.connect(options::<H>().ttl(H::ttl() * 10).reconcile(PATIENCE * 2)).await;
    register_all(&provider, instances("orders", "i", 3)).await;
    let heartbeat = provider.registry.heartbeat().await.expect("heartbeat");
    assert_eq!(heartbeat.renewed.len(), 3);
    assert!(heartbeat.reregistered.is_empty() && heartbeat.failed.is_empty(), "{heartbeat:?}");

    let lost = key("orders", "i-001");
    store.delete(&lost).await;
    let heartbeat = provider.registry.heartbeat().await.expect("heartbeat");
    assert_eq!(heartbeat.renewed, [key("orders", "i-000"), key("orders", "i-002")]);
    assert_eq!(heartbeat.reregistered, std::slice::from_ref(&lost));
    assert!(heartbeat.failed.is_empty(), "{heartbeat:?}");
    assert!(record(&store, &lost).await.is_some());
    assert!(all_registered(&states(&provider)));
}

/// Fields that this version does not know survive a read, a change and a register.
pub async fn unknown_fields_survive_a_read_modify_write<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    let one = key("orders", "1");
    let foreign = br#"{"v":1,"owner":"other","epoch":4,"weight":5,"shard":{"range":[0,7]},"x-team":"blue"}"#;
    store.put_raw(&one, foreign).await;

    let seen = eventually(
        "the foreign record",
        soon::<H>(),
        || async { provider.registry.discover("orders").await.expect("discover") },
        |seen| !seen.is_empty(),
    )
    .await;
    let mut changed = Instance::clone(&seen.instances()[0]);
    changed.metadata.insert("reviewed".to_owned(), "yes".to_owned());
    provider.registry.register(changed).await.expect("register");

    let written = String::from_utf8(store.raw(&one).await.expect("there is a record")).expect("it is text");
    for kept in [r#""shard":{"range":[0,7]}"#, r#""x-team":"blue""#, r#""reviewed":"yes""#, r#""weight":5"#] {
        assert!(written.contains(kept), "{kept} is not in {written}");
    }
    assert_eq!(record(&store, &one).await.map(|record| record.epoch), Some(5), "a claim raises the epoch");
}

/// A thousand instances at once are registered, seen, and gone with one call.
pub async fn a_thousand_instances_come_and_go<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "orders").await;
    in_time("register_all", PATIENCE, register_all(&provider, instances("orders", "i", 1000))).await;
    observer.until("all of them", PATIENCE, |seen| seen.len() == 1000).await;
    let heartbeat = provider.registry.heartbeat().await.expect("heartbeat");
    assert_eq!((heartbeat.renewed.len(), heartbeat.failed.len()), (1000, 0));
    assert!(all_registered(&states(&provider)));

    provider.registry.destroy().await.expect("destroy");
    observer.until_ids(soon::<H>(), &[]).await;
}

/// Names of any kind come back as they were, in ids and in services, and none is taken for another.
pub async fn hostile_names_come_back_as_they_were<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let names = hostile_names();
    let each = names.iter().map(|name| {
        let mut one = instance(name, name);
        one.metadata.insert("name".to_owned(), name.clone());
        one
    });
    register_all(&provider, each.collect()).await;
    for name in &names {
        let seen = reader.registry.discover(name).await.expect("discover");
        assert_eq!(ids(&seen), [name]);
        assert_eq!(&seen.instances()[0].metadata["name"], name);
    }
    for name in &names {
        assert!(provider.registry.unregister(name, name).await.expect("unregister"), "{name:?}");
    }
    assert!(provider.registry.registrations().is_empty());
}

/// What is wrong with a name is said at once, and not tried for ever.
pub async fn bad_names_are_refused_at_once<H: Harness>() {
    let store = H::start().await;
    let only = client(&store).await;
    let long = "x".repeat(256);
    for bad in ["", "a\nb", "\0", &long] {
        let refused = [
            ("unregister service", only.registry.unregister(bad, "1").await.err()),
            ("unregister id", only.registry.unregister("orders", bad).await.err()),
            ("discover", only.registry.discover(bad).await.err()),
            ("watch", only.registry.watch(bad).await.err()),
            ("subscribers", only.registry.subscribers(bad).await.err()),
        ];
        for (verb, error) in refused {
            assert_eq!(error.map(|error| error.kind()), Some(ErrorKind::InvalidInput), "{verb} {bad:?}");
        }
    }
}

/// An endpoint that nobody can call is refused at once, new or as an update. What others wrote of the kind is read all
/// the same.
pub async fn an_address_that_nobody_can_call_is_refused_and_can_be_read<H: Harness>() {
    let store = H::start().await;
    let only = client(&store).await;
    for bad in ["http://0.0.0.0:80", "http://[::]:80", "http://[::ffff:0.0.0.0]:80", "http://224.0.0.1:80"] {
        let bad = Instance::builder("orders", "1").endpoint("http://10.0.0.5:8080").endpoint(bad).build();
        let refused = only.registry.register(bad.expect("it can be spelled")).await.expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
    }
    assert!(only.registry.registrations().is_empty());

    let mut one = instance("orders", "1");
    only.registry.register(one.clone()).await.expect("register");
    one.endpoints = vec!["http://0.0.0.0:80".parse().expect("it can be spelled")];
    let outcomes = only.registry.register_all(vec![one, instance("orders", "2")]).await;
    assert!(matches!(&outcomes[..], [Err(error), Ok(())] if error.kind() == ErrorKind::InvalidInput), "{outcomes:?}");
    let kept = record(&store, &key("orders", "1")).await.expect("the first content is in force");
    assert!(matches!(&kept.content, Content::Instance(kept) if kept.endpoints[0].host() == "10.0.0.5"), "{kept:?}");

    let foreign = br#"{"v":1,"owner":"other","epoch":4,"endpoints":["http://0.0.0.0:80"]}"#;
    store.put_raw(&key("orders", "foreign"), foreign).await;
    let look = || async { only.registry.discover("orders").await.expect("discover") };
    eventually("the foreign record", soon::<H>(), look, |seen| ids(seen) == ["1", "2", "foreign"]).await;
}

/// Who listens on every address registers one that others can call.
pub async fn a_listener_on_every_address_is_called_at_the_one_that_is_registered<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a listener");
    let bound = listener.local_addr().expect("it is bound");
    let one = Instance::builder("orders", "1").listening("http", bound).build().expect("there is an address");
    provider.registry.register(one).await.expect("register");

    let look = || async { reader.registry.discover("orders").await.expect("discover") };
    let seen = eventually("the instance", soon::<H>(), look, |seen| ids(seen) == ["1"]).await;
    let endpoint = &seen.instances()[0].endpoints[0];
    assert_eq!(endpoint.port(), bound.port());
    let call = async { tokio::try_join!(TcpStream::connect(endpoint.authority()), listener.accept()) };
    let (caller, (_, from)) = in_time("the call", PATIENCE, call).await.expect("it is called");
    assert_eq!(from, caller.local_addr().expect("it is connected"));
}

/// A registration can be marked as draining, and as up again.
pub async fn draining_is_an_update_that_readers_see<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    for (status, available) in [(Status::Draining, 0), (Status::Up, 1)] {
        let mut changed = instance("orders", "1");
        changed.status = status;
        provider.registry.register(changed).await.expect("update");
        let seen = observer.until(status.as_str(), soon::<H>(), |seen| seen.instances()[0].status == status).await;
        assert_eq!(seen.available().count(), available);
    }
    assert!(matches!(states(&provider)[..], [RegistrationState::Registered]));
}

fn weight(content: &Content) -> u32 {
    match content {
        Content::Instance(instance) => instance.weight,
        other => panic!("not an instance: {other:?}"),
    }
}

pub(super) fn hostile_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "UserServiceRpc/Login",
        "/",
        "//",
        "a b",
        "ä/ö",
        "日本語",
        "😀",
        "%2F",
        "%",
        "%25",
        ".",
        "..",
        "...",
        "~",
        "a~b",
        "*",
        "{tag}",
        "#",
        "?x=y&z",
        "\"quoted\"",
        "back\\slash",
        "left",
        "providers",
        "overrides",
        "consumers",
        "User",
        "user",
        "-",
        "_",
        "a:b",
        "a,b",
        "[x]",
        "0",
    ]
    .map(str::to_owned)
    .into();
    names.push("x".repeat(255));
    names.push("ä".repeat(127));
    names
}
