//! What operators and providers do to running instances: override them, change them, take them out.

use std::time::Duration;

use futures::future::join_all;
use registry_core::{Content, ErrorKind, Instance, Override, Status, health};
use tokio::{sync::watch, time::Instant};

use super::support::*;
use crate::harness::{Client, Harness};

/// What an operator sets is seen by every reader, those that follow and those that come later, and is listed.
pub async fn an_override_is_seen_by_every_reader_and_listed<H: Harness>() {
    let store = H::start().await;
    let (provider, operator, reader) = (client(&store).await, client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let readers = [Observer::of(&reader, "orders").await, Observer::of(&provider, "orders").await];
    let drained = Override::default().status(Status::Draining).weight(0);
    set(&operator, "i-002", drained).await;
    set(&operator, "i-000", drained).await;

    for observer in &readers {
        let seen = observer.until("two are drained", soon::<H>(), |seen| seen.available().count() == 1).await;
        let one = seen.get("i-002").expect("it stays in the list");
        assert_eq!((one.status, one.weight), (Status::Draining, 0));
        assert_eq!(one.endpoints, instance("orders", "i-002").endpoints);
    }
    let late = client(&store).await.registry.discover("orders").await.expect("discover");
    assert_eq!((late.len(), late.available().count()), (3, 1));
    assert_eq!(overrides(&operator).await, [("i-000".to_owned(), drained), ("i-002".to_owned(), drained)]);
    assert!(operator.registry.overrides("payments").await.expect("overrides").is_empty());
    assert!(operator.registry.registrations().is_empty(), "overriding is not registering");
}

/// An override is nobody's: it outlives its operator, and whoever comes next may replace and clear it.
pub async fn an_override_outlives_its_operator_and_is_anybodys<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    let is = |status, weight| {
        move |seen: &registry_core::Snapshot| {
            seen.get("1").is_some_and(|one| (one.status, one.weight) == (status, weight))
        }
    };

    let (first, crashing) = (client(&store).await, client(&store).await);
    set(&first, "1", Override::default().status(Status::Down)).await;
    observer.until("it is down", soon::<H>(), is(Status::Down, 100)).await;
    first.registry.destroy().await.expect("destroy");
    set(&crashing, "1", Override::default().weight(7)).await;
    observer.until("it is replaced as a whole", soon::<H>(), is(Status::Up, 7)).await;
    crashing.crash();
    let seen = || async { observer.now() };
    never_within("it goes with its operator", gone::<H>(), seen, |seen| !is(Status::Up, 7)(seen)).await;

    let last = client(&store).await;
    assert_eq!(overrides(&last).await, [("1".to_owned(), Override::default().weight(7))]);
    assert!(last.registry.clear_override("orders", "1").await.expect("clear"));
    observer.until("it is as registered", soon::<H>(), is(Status::Up, 100)).await;
    assert!(!last.registry.clear_override("orders", "1").await.expect("clear again"));
    assert!(overrides(&last).await.is_empty());
}

/// An override of the weight leaves the status as it is registered, and the other way round.
pub async fn an_override_sets_only_what_it_names<H: Harness>() {
    let store = H::start().await;
    let (provider, operator, reader) = (client(&store).await, client(&store).await, client(&store).await);
    let mut all = instances("orders", "i", 2);
    all[0].status = Status::Starting;
    all[1].weight = 9;
    register_all(&provider, all).await;
    set(&operator, "i-000", Override::default().weight(3)).await;
    set(&operator, "i-001", Override::default().status(Status::Down)).await;
    let observer = Observer::of(&reader, "orders").await;
    let merged = |seen: &registry_core::Snapshot| {
        seen.instances().iter().map(|one| (one.status, one.weight)).collect::<Vec<_>>()
            == [(Status::Starting, 3), (Status::Down, 9)]
    };
    observer.until("both are merged", soon::<H>(), merged).await;
}

/// An override that comes before its instance shows nothing, and is in force from its first moment.
pub async fn an_override_may_come_before_its_instance<H: Harness>() {
    let store = H::start().await;
    let (provider, operator, reader) = (client(&store).await, client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "orders").await;
    set(&operator, "1", Override::default().status(Status::Down)).await;
    provider.registry.register(instance("orders", "2")).await.expect("register");
    observer.until_ids(soon::<H>(), &["2"]).await;
    assert_eq!(observer.changes(), ["+2"]);
    provider.registry.unregister("orders", "2").await.expect("unregister");
    observer.until_ids(soon::<H>(), &[]).await;
    let services = || async { reader.registry.services().await.expect("services") };
    eventually("an override makes no service", soon::<H>(), services, Vec::is_empty).await;

    provider.registry.register(instance("orders", "1")).await.expect("register");
    observer.until_ids(soon::<H>(), &["1"]).await;
    observer.assert_always("it takes no traffic", |seen| seen.available().all(|one| one.id.as_str() != "1"));
}

/// What an instance registers with later, be it in a new process, does not lift its override.
pub async fn an_override_stays_in_force_when_its_instance_registers_again<H: Harness>() {
    let store = H::start().await;
    let (old, operator, reader) = (client(&store).await, client(&store).await, client(&store).await);
    old.registry.register(weighing(instance("orders", "1"), 1)).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    set(&operator, "1", Override::default().status(Status::Down)).await;
    observer.until("it is down", soon::<H>(), |seen| seen.available().count() == 0).await;
    let down_since = observer.history().len();

    let new = client(&store).await;
    old.registry.register(weighing(instance("orders", "1"), 2)).await.expect("update");
    observer.until("the update", soon::<H>(), |seen| seen.get("1").is_some_and(|one| one.weight == 2)).await;
    new.registry.register(weighing(instance("orders", "1"), 3)).await.expect("take over");
    observer.until("the successor", soon::<H>(), |seen| seen.get("1").is_some_and(|one| one.weight == 3)).await;
    new.registry.unregister("orders", "1").await.expect("unregister");
    observer.until_ids(soon::<H>(), &[]).await;
    new.registry.register(weighing(instance("orders", "1"), 4)).await.expect("register");
    observer.until("it is back", soon::<H>(), |seen| seen.get("1").is_some_and(|one| one.weight == 4)).await;
    let after = observer.history().split_off(down_since);
    assert!(after.iter().all(|seen| seen.available().count() == 0), "{observer:?}");
}

/// An override that sets nothing, and bad names, are refused at once.
pub async fn a_bad_override_is_refused_at_once<H: Harness>() {
    let store = H::start().await;
    let operator = client(&store).await;
    let weight = Override::default().weight(0);
    for (service, id, set) in [("orders", "1", Override::default()), ("", "1", weight), ("orders", "a\nb", weight)] {
        let refused = operator.registry.set_override(service, id, set).await;
        assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::InvalidInput), "{service:?}/{id:?} {set:?}");
    }
    assert!(store.keys().await.is_empty());
}

/// An instance that registers as starting is in the list at once, and takes traffic once it says that it is up.
pub async fn a_starting_instance_takes_traffic_once_it_is_up<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "orders").await;
    let mut one = weighing(instance("orders", "1"), 7);
    one.status = Status::Starting;
    provider.registry.register(one).await.expect("register");
    let seen = observer.until_ids(soon::<H>(), &["1"]).await;
    assert_eq!(seen.available().count(), 0);
    provider.registry.set_status("orders", "1", Status::Up).await.expect("set the status");
    let seen = observer.until("it is up", soon::<H>(), |seen| seen.available().count() == 1).await;
    assert_eq!(seen.instances()[0].weight, 7, "nothing else has changed");
    assert_eq!(observer.changes(), ["+1", "~1"]);
}

/// An instance behind a gate is seen as starting until its checks succeed, is down while they fail, leaves after the bound,
/// and is back once they succeed again.
pub async fn a_gated_instance_takes_traffic_only_while_it_is_well<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let observer = Observer::of(&reader, "orders").await;
    let after = soon::<H>() * 2;
    let config = health::Config::default().interval(Duration::from_millis(50)).timeout(PATIENCE * 4);
    let config = config.rise(2).fall(2).unregister_after(after);
    // The first check waits until it is known what comes of it.
    let (condition, seen) = watch::channel(None);
    let check = move || {
        let mut seen = seen.clone();
        async move {
            let is_well = seen.wait_for(Option::is_some).await?.unwrap_or_default();
            if is_well { Ok(()) } else { Err("out of order".into()) }
        }
    };
    let one = weighing(instance("orders", "1"), 7);
    let gate = health::gate(provider.registry.clone(), one, check, config).await.expect("a gate");
    let seen = observer.until_ids(soon::<H>(), &["1"]).await;
    assert_eq!((seen.instances()[0].status, seen.available().count()), (Status::Starting, 0));
    condition.send_replace(Some(true));
    observer.until("it is up", soon::<H>(), |seen| seen.available().count() == 1).await;

    let ill_since = Instant::now();
    condition.send_replace(Some(false));
    let is_down = |seen: &registry_core::Snapshot| seen.get("1").is_some_and(|one| one.status == Status::Down);
    observer.until("it is down", soon::<H>(), is_down).await;
    observer.until_ids(after + soon::<H>(), &[]).await;
    assert!(ill_since.elapsed() >= after, "{:?} is before {after:?}", ill_since.elapsed());
    assert!(provider.registry.registration("orders", "1").is_none());

    condition.send_replace(Some(true));
    let back = observer.until("it is back", soon::<H>(), |seen| seen.available().count() == 1).await;
    assert_eq!(back.instances()[0].weight, 7, "with what was registered");
    assert_eq!(observer.changes(), ["+1", "~1", "~1", "-1", "+1"]);
    observer.assert_always("nothing is held", |seen| !is_protected(seen));
    gate.stop().await;
    // Its readers may know before the store has told its owner.
    eventually("the registration stays as it is", soon::<H>(), async || states(&provider), all_registered).await;
}

/// Status and weight that are set at the same time are both in force, here, at readers, and after a loss.
pub async fn status_and_weight_that_are_set_together_are_both_in_force<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 20)).await;
    let observer = Observer::of(&reader, "orders").await;
    let registry = &provider.registry;
    let updates = instances("orders", "i", 20).into_iter().map(|one| async move {
        let (status, weight) = tokio::join!(
            registry.set_status("orders", &one.id, Status::Draining),
            registry.set_weight("orders", &one.id, 3),
        );
        status.and(weight).expect("update");
    });
    join_all(updates).await;
    let both = |seen: &registry_core::Snapshot| {
        seen.len() == 20 && seen.instances().iter().all(|one| (one.status, one.weight) == (Status::Draining, 3))
    };
    observer.until("both, on all of them", soon::<H>(), both).await;

    let lost = key("orders", "i-007");
    store.delete(&lost).await;
    let restored = eventually("it is restored", RECONCILE + restored::<H>(), || record(&store, &lost), Option::is_some);
    let content = restored.await.map(|record| record.content);
    let is_latest = |one: &Instance| (one.status, one.weight) == (Status::Draining, 3);
    assert!(matches!(&content, Some(Content::Instance(one)) if is_latest(one)), "{content:?}");
}

/// Only what is registered here can be changed from here, and a key that is not makes an error that says so.
pub async fn only_what_is_registered_here_can_be_changed<H: Harness>() {
    let store = H::start().await;
    let (provider, other) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let refused = [
        other.registry.set_status("orders", "1", Status::Down).await.unwrap_err(),
        other.registry.set_weight("orders", "1", 0).await.unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("orders/1: it is not registered here"), "{error}");
    }
    assert!(!other.registry.drain("orders", "1", PATIENCE).await.expect("there is nothing to drain"));
    let seen = other.registry.discover("orders").await.expect("discover");
    assert_eq!(seen.available().count(), 1);
}

/// An instance that is drained stays in the list, without new traffic, until the grace is over; then it leaves in good
/// order, and the others of its process stay.
pub async fn a_drained_instance_stays_visible_and_takes_no_new_traffic<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    let grace = soon::<H>() * 2;
    let began = Instant::now();
    let draining = async {
        let drained = provider.registry.drain("orders", "i-000", grace).await;
        (drained.expect("drain"), began.elapsed())
    };
    let reading = observer.until("it drains", soon::<H>(), |seen| seen.available().count() == 1);
    let ((drained, took), seen) = tokio::join!(draining, reading);
    assert!(drained);
    assert!(took >= grace, "the grace is {grace:?}, it took {took:?}");
    assert_eq!(seen.get("i-000").map(|one| one.status), Some(Status::Draining));
    observer.until_ids(soon::<H>(), &["i-001"]).await;
    observer.assert_always("nothing is held", |seen| !is_protected(seen));
    assert_eq!(observer.changes(), ["~i-000", "-i-000"]);
    assert_eq!(states(&provider).len(), 1);
}

async fn set(operator: &Client, id: &str, set: Override) {
    operator.registry.set_override("orders", id, set).await.expect("set an override");
}

async fn overrides(operator: &Client) -> Vec<(String, Override)> {
    let listed = operator.registry.overrides("orders").await.expect("overrides");
    listed.into_iter().map(|(id, set)| (id.to_string(), set)).collect()
}
