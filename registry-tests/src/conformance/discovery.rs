//! What readers see: the whole truth, in order, whatever else lies in the store.

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt, future::join_all};
use registry_core::{Change, Directory, ErrorKind, Key, Status};

use super::{registration::hostile_names, support::*};
use crate::harness::Harness;

/// A service that does not exist is an empty set, and a true one.
pub async fn an_unknown_service_is_empty_and_live<H: Harness>() {
    let store = H::start().await;
    let reader = client(&store).await;
    let seen = reader.registry.discover("nobody").await.expect("discover");
    assert!(seen.is_empty() && is_live(&seen), "{seen:?}");
    assert_eq!(seen.service().as_str(), "nobody");
}

/// The first item of a watcher is the complete set: of an empty service too, and of one with instances in one piece.
pub async fn the_first_item_of_a_watcher_is_the_complete_set<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 50)).await;
    for (service, expected) in [("nobody", 0), ("orders", 50)] {
        let mut watcher = reader.registry.watch(service).await.expect("watch");
        let first = in_time("the first item", soon::<H>(), watcher.next()).await.expect("the registry lives");
        assert_eq!(first.len(), expected);
        assert!(is_live(&first) && is_live(&watcher.current()));
    }
}

/// Who waits for instances gets them as soon as enough of them take traffic.
pub async fn who_waits_for_instances_gets_them_once_they_are_there<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let coming = async {
        let mut all = instances("orders", "i", 3);
        all[2].status = Status::Starting;
        register_all(&provider, all).await;
        provider.registry.set_status("orders", "i-002", Status::Up).await.expect("set the status");
    };
    let needed = [("orders", 3), ("nobody", 0)];
    let waiting = in_time("they are there", PATIENCE, reader.registry.require(&needed, PATIENCE * 2));
    let ((), ready) = tokio::join!(coming, waiting);
    let ready = ready.expect("all are ready");
    assert_eq!(ready.iter().map(|seen| seen.available().count()).collect::<Vec<_>>(), [3, 0]);
    let at_once = in_time("they are known", soon::<H>(), reader.registry.wait_for("orders", 2, PATIENCE)).await;
    assert_eq!(at_once.expect("there are three").len(), 3);
}

/// Who waits in vain is told what is missing, of how many, and how far the view can be trusted.
pub async fn who_waits_in_vain_is_told_what_is_missing<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 2)).await;
    // Followed already: how long a first list takes is not what this is about.
    let _followed = (Observer::of(&reader, "orders").await, Observer::of(&reader, "payments").await);
    let needed = [("orders", 2), ("payments", 1), ("orders", 4)];
    let error = reader.registry.require(&needed, soon::<H>()).await.expect_err("two are missing");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let said = error.to_string();
    for part in ["2 of 3 required", "payments has 0 of 1 available", "orders has 2 of 4 available", "(2 in all, live)"]
    {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    assert!(!said.contains("2 of 2"), "{said:?}");

    reader.link.cut();
    let error = reader.registry.wait_for("unread", 1, soon::<H>()).await.expect_err("it cannot be read");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("unread has 0 of 1 available"), "{error}");
    assert!(error.to_string().contains("pending"), "{error}");
    let (served, ()) = tokio::join!(reader.registry.wait_for("orders", 3, PATIENCE), async {
        register_all(&provider, instances("orders", "i", 3)).await;
        reader.link.heal();
    });
    assert_eq!(served.expect("the third one came").len(), 3);
}

/// A reader that comes first sees what comes later.
pub async fn a_reader_may_come_before_everyone_else<H: Harness>() {
    let store = H::start().await;
    let reader = client(&store).await;
    let observer = Observer::of(&reader, "orders").await;
    assert!(observer.now().is_empty());
    let provider = client(&store).await;
    provider.registry.register(instance("orders", "1")).await.expect("register");
    observer.until_ids(soon::<H>(), &["1"]).await;
}

/// Changes are inserts, updates and removals, each with the instance before and after.
pub async fn changes_come_with_before_and_after<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let mut changes = reader.registry.watch("orders").await.expect("watch").changes();
    let mut next = async || in_time("a change", soon::<H>(), changes.next()).await.expect("the registry lives");

    provider.registry.register(weighing(instance("orders", "1"), 1)).await.expect("register");
    let insert = next().await;
    assert!(matches!(&insert, Change::Insert { after } if after.weight == 1), "{insert:?}");
    provider.registry.register(weighing(instance("orders", "1"), 2)).await.expect("update");
    let update = next().await;
    assert!(
        matches!(&update, Change::Update { before, after } if before.weight == 1 && after.weight == 2),
        "{update:?}"
    );
    provider.registry.unregister("orders", "1").await.expect("unregister");
    let removal = next().await;
    assert!(matches!(&removal, Change::Remove { before } if before.weight == 2), "{removal:?}");
}

/// Drained and not-up instances are listed, and not available.
pub async fn available_leaves_out_the_drained_and_the_not_up<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let mut all = instances("orders", "i", 5);
    all[0].weight = 0;
    all[1].status = Status::Starting;
    all[2].status = Status::Draining;
    all[3].status = Status::Down;
    register_all(&provider, all).await;
    let seen = reader.registry.discover("orders").await.expect("discover");
    assert_eq!(seen.len(), 5);
    assert_eq!(seen.available().map(|one| one.id.as_str()).collect::<Vec<_>>(), ["i-004"]);
}

/// `services` lists the services that have an instance, whatever their names, and no others.
pub async fn services_lists_every_service_with_an_instance<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    let reader = store.connect(options::<H>().announce("reader".parse::<registry_core::ServiceName>().ok())).await;
    assert!(reader.registry.services().await.expect("services").is_empty());
    let mut names = hostile_names();
    register_all(&provider, names.iter().map(|name| instance(name, "1")).collect()).await;
    // Announced readers make no service of what they read.
    reader.registry.discover("nobody").await.expect("discover");
    eventually(
        "the reader is announced",
        PATIENCE,
        || async { reader.registry.subscribers("nobody").await.expect("subscribers") },
        |seen| !seen.is_empty(),
    )
    .await;

    names.sort();
    let listed = || async {
        let services = reader.registry.services().await.expect("services");
        services.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>()
    };
    eventually("all of them, sorted", soon::<H>(), listed, |listed| *listed == names).await;
    provider.registry.unregister("user", "1").await.expect("unregister");
    names.retain(|name| name != "user");
    eventually("without the one that is empty now", soon::<H>(), listed, |listed| *listed == names).await;
}

/// `user` is not `user-admin`, `user/admin` or `use`.
pub async fn a_service_never_sees_one_whose_name_begins_like_its_own<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "user").await;
    let names = ["use", "user-admin", "user/admin", "user0", "user.", "user%2F", "user"];
    for name in names {
        provider.registry.register(instance(name, &format!("of {name}"))).await.expect("register");
    }
    observer.until_ids(soon::<H>(), &["of user"]).await;
    assert_eq!(observer.changes(), ["+of user"]);
    for name in names {
        let seen = reader.registry.discover(name).await.expect("discover");
        assert_eq!(ids(&seen), [format!("of {name}")]);
    }
}

/// A record that a newer version wrote is read as far as it is understood, and takes no traffic by mistake.
pub async fn a_newer_record_is_read_as_far_as_it_is_understood<H: Harness>() {
    let store = H::start().await;
    let reader = client(&store).await;
    let newer = br#"{"v":2,"owner":"o","epoch":1,"endpoints":["http://10.0.0.1:80"],"status":"hibernating","shape":9}"#;
    store.put_raw(&key("orders", "1"), newer).await;
    let seen = Observer::of(&reader, "orders").await.until_ids(soon::<H>(), &["1"]).await;
    assert_eq!(seen.instances()[0].endpoints[0].as_str(), "http://10.0.0.1:80");
    assert_eq!(seen.available().count(), 0);
}

/// Bad records are skipped: for readers that come later and for those that follow already.
pub async fn bad_records_never_hide_the_good_ones<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let early = Observer::of(&reader, "orders").await;
    let large = vec![b'x'; H::largest_value()];
    let bad: [(&str, &[u8]); 7] = [
        ("not json", b"garbage"),
        ("empty", b""),
        ("not utf-8", b"{\"v\":1,\xff\xfe}"),
        ("large", &large),
        ("no version", b"{\"owner\":\"o\",\"epoch\":1}"),
        ("no owner", b"{\"v\":1,\"epoch\":1}"),
        ("wrong type", b"{\"v\":1,\"owner\":\"o\",\"epoch\":1,\"weight\":\"lots\"}"),
    ];
    for (index, (id, bytes)) in bad.into_iter().enumerate() {
        store.put_raw(&key("orders", id), bytes).await;
        provider.registry.register(instance("orders", &format!("good {index}"))).await.expect("register");
    }
    let good: Vec<_> = (0..bad.len()).map(|index| format!("good {index}")).collect();
    let good: Vec<_> = good.iter().map(String::as_str).collect();
    early.until_ids(soon::<H>(), &good).await;
    let late = client(&store).await;
    assert_eq!(ids(&late.registry.discover("orders").await.expect("discover")), good);
    assert_eq!(ids(&Observer::of(&late, "orders").await.now()), good);

    // One that is mended appears.
    store.put_raw(&key("orders", "empty"), b"{\"v\":1,\"owner\":\"o\",\"epoch\":1}").await;
    early.until("the mended one", soon::<H>(), |seen| seen.get("empty").is_some()).await;
}

/// What an operator sets is merged into the instance, for as long as it is set.
pub async fn an_operators_override_is_merged_and_lifted<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    let set = Key { directory: Directory::Overrides, ..key("orders", "i-001") };
    store.put_raw(&set, br#"{"v":1,"owner":"operator","epoch":1,"status":"down","weight":0}"#).await;
    let down = |one: &registry_core::Instance| one.status == Status::Down && one.weight == 0;
    observer.until("one is down", soon::<H>(), |seen| seen.get("i-001").is_some_and(|one| down(one))).await;
    let late = client(&store).await.registry.discover("orders").await.expect("discover");
    assert_eq!((late.len(), late.available().count()), (2, 1));
    store.delete(&set).await;
    observer.until("both are up", soon::<H>(), |seen| seen.available().count() == 2).await;
}

/// No change falls between a reader's list and its watch, whenever it comes.
pub async fn no_change_is_lost_between_the_list_and_the_watch<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    let mut readers = Vec::new();
    for _ in 0..10 {
        readers.push(client(&store).await);
    }
    let writing = async {
        for one in instances("orders", "i", 100) {
            let id = one.id.to_string();
            provider.registry.register(one).await.expect("register");
            if id.ends_with('5') {
                provider.registry.unregister("orders", &id).await.expect("unregister");
            }
        }
    };
    let reading = readers.iter().enumerate().map(|(index, reader)| async move {
        tokio::time::sleep(Duration::from_millis(10) * u32::try_from(index).expect("few readers")).await;
        Observer::of(reader, "orders").await
    });
    let ((), observers) = tokio::join!(writing, join_all(reading));
    for observer in observers {
        observer.until("the 90 that stayed", soon::<H>(), |seen| seen.len() == 90).await;
    }
}

/// A reader that does not read reaches the latest state, and delays nobody.
pub async fn a_slow_reader_reaches_the_latest_state<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let mut slow = reader.registry.watch("orders").await.expect("watch");
    let sibling = Observer::of(&reader, "orders").await;
    for round in 1..=50 {
        let updates = instances("orders", "i", 20).into_iter().map(|one| weighing(one, round));
        register_all(&provider, updates.collect()).await;
    }
    let latest =
        |seen: &registry_core::Snapshot| seen.len() == 20 && seen.instances().iter().all(|one| one.weight == 50);
    sibling.until("all 1000 changes", soon::<H>(), latest).await;
    let first = in_time("an item", soon::<H>(), slow.next()).await.expect("the registry lives");
    assert!(latest(&first), "{first:?}");
}

/// Many readers of a service cost one subscription; an idle service costs none, and can be followed again.
pub async fn an_idle_service_is_dropped_and_can_be_followed_again<H: Harness>() {
    let store = H::with_own_server().await;
    let provider = client(&store).await;
    let reader = store.connect(options::<H>().idle_timeout(Duration::from_secs(1))).await;
    let before = store.watchers().await;
    let mut watchers = Vec::new();
    for _ in 0..100 {
        watchers.push(reader.registry.watch("orders").await.expect("watch"));
        reader.registry.discover("orders").await.expect("discover");
    }
    assert_eq!(reader.calls.following(), 1);
    assert!(store.watchers().await > before);

    // As long as one is left, it is followed.
    watchers.truncate(1);
    let dropped = || async { reader.calls.following() };
    never_within("a service in use is dropped", Duration::from_secs(3), dropped, |following| *following == 0).await;
    watchers.clear();
    eventually("nothing is followed", PATIENCE, dropped, |following| *following == 0).await;
    eventually("nor at the server", PATIENCE, || store.watchers(), |watchers| *watchers == before).await;

    provider.registry.register(instance("orders", "1")).await.expect("register");
    Observer::of(&reader, "orders").await.until_ids(soon::<H>(), &["1"]).await;
}

/// Readers that announce themselves are listed as subscribers, not as instances, for as long as they follow.
pub async fn announced_readers_are_listed_as_subscribers<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let announced = |name: &str| {
        let name: registry_core::ServiceName = name.parse().expect("a name");
        store.connect(options::<H>().announce(name).idle_timeout(Duration::from_secs(2)))
    };
    let (web, mobile, silent) = (announced("web").await, announced("mobile").await, client(&store).await);
    for reader in [&mobile, &silent] {
        reader.registry.discover("orders").await.expect("discover");
    }
    let watcher = web.registry.watch("orders").await.expect("watch");
    let names = || async {
        let subscribers = provider.registry.subscribers("orders").await.expect("subscribers");
        let name = |id: &str| id.split_once('~').map_or_else(|| panic!("{id}"), |(name, _)| name.to_owned());
        subscribers.iter().map(|one| name(&one.id)).collect::<Vec<_>>()
    };
    let both = BTreeSet::from(["mobile".to_owned(), "web".to_owned()]);
    eventually("both that announced themselves", PATIENCE, names, |names| {
        names.iter().cloned().collect::<BTreeSet<_>>() == both && names.len() == 2
    })
    .await;
    assert_eq!(ids(&watcher.current()), ["1"]);
    assert!(web.registry.registrations().is_empty(), "announcing is not registering");

    // What was announced is kept like what was registered.
    let subscribers = provider.registry.subscribers("orders").await.expect("subscribers");
    let announcement = Key { directory: Directory::Consumers, ..key("orders", &subscribers[1].id) };
    store.delete(&announcement).await;
    eventually("it is restored", RECONCILE + restored::<H>(), || store.raw(&announcement), Option::is_some).await;

    // The one no longer reads, the other ends.
    eventually("the idle one is gone", PATIENCE, names, |names| *names == ["web"]).await;
    web.registry.destroy().await.expect("destroy");
    eventually("nobody is left", soon::<H>(), names, Vec::is_empty).await;
}
