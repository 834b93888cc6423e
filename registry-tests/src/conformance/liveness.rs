//! An instance is in the list as long as its process lives and not a moment longer, and a key has one owner.

use std::time::Duration;

use futures::StreamExt;
use registry_core::{Error, ErrorKind, Override, RegistrationState, Result, Status};
use tokio::time::{Instant, sleep};

use super::support::*;
use crate::harness::Harness;

/// A session that is ended from outside is replaced, and everything under it comes back as it was.
pub async fn what_a_lost_session_held_is_restored<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (store.connect(unchecked::<H>()).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    let before = observer.now();
    store.end_session(&key("orders", "i-000")).await;
    for one in before.instances() {
        let one = key("orders", &one.id);
        eventually("it is restored", restored::<H>(), || store.raw(&one), Option::is_some).await;
    }
    observer.until("as before", restored::<H>(), |seen| seen.instances() == before.instances() && is_live(seen)).await;
    let states = eventually("all are registered", soon::<H>(), async || states(&provider), all_registered).await;
    assert_eq!(states.len(), 3);
}

/// What is restored comes back at the rate that is set, not all at once.
pub async fn a_mass_restore_is_spread_at_its_rate<H: Harness>() {
    let store = H::start().await;
    let provider = store.connect(unchecked::<H>().register_rate(100)).await;
    register_all(&provider, instances("orders", "i", 200)).await;
    let before = provider.calls.made();
    let start = Instant::now();
    store.end_session(&key("orders", "i-000")).await;
    let bound = Duration::from_secs(2) + restored::<H>();
    eventually(
        "all are back",
        bound,
        || store.keys(),
        |keys| keys.iter().filter(|path| is_record(path)).count() == 200,
    )
    .await;
    assert!(start.elapsed() >= Duration::from_millis(1500), "all of them within {:?}", start.elapsed());
    let calls = provider.calls.made() - before;
    assert!(calls < 100, "in batches, not one by one: {calls} calls");
}

/// What is restored is what was registered last, not what was registered first.
pub async fn what_is_restored_is_the_latest_content<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(weighing(instance("orders", "1"), 1)).await.expect("register");
    provider.registry.register(weighing(instance("orders", "1"), 2)).await.expect("update");
    store.end_session(&key("orders", "1")).await;
    let observer = Observer::of(&reader, "orders").await;
    let latest = |seen: &registry_core::Snapshot| seen.get("1").is_some_and(|one| one.weight == 2);
    observer.until("the update", restored::<H>(), latest).await;
    observer.assert_always("never what was before", |seen| seen.is_empty() || latest(seen));
}

/// A record that someone deletes is restored by the check, while the session lives on.
pub async fn a_deleted_record_is_restored<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 3)).await;
    let deleted = key("orders", "i-001");
    store.delete(&deleted).await;
    eventually("it is restored", RECONCILE + restored::<H>(), || store.raw(&deleted), Option::is_some).await;
    eventually("all are registered", soon::<H>(), async || states(&provider), all_registered).await;
}

/// So is everything, when someone deletes a whole service.
pub async fn a_deleted_service_is_restored<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 20)).await;
    let observer = Observer::of(&reader, "orders").await;
    store.delete_service("orders").await;
    for index in 0..20 {
        let deleted = key("orders", &format!("i-{index:03}"));
        eventually("it is restored", RECONCILE + restored::<H>(), || store.raw(&deleted), Option::is_some).await;
    }
    // All at once without a word: held until they are back.
    observer.until("all are there", soon::<H>(), |seen| seen.len() == 20 && is_live(seen)).await;
    observer.assert_always("never empty", |seen| !seen.is_empty());
}

/// One registration that the store refuses for good stops no other from coming back.
pub async fn one_bad_registration_stops_no_other_from_coming_back<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 10)).await;
    // Another process takes one of the keys; its record must not be overwritten, so the restore of it is refused.
    let other = client(&store).await;
    other.registry.register(instance("orders", "i-004")).await.expect("register");
    store.end_session(&key("orders", "i-000")).await;
    for index in (0..10).filter(|index| *index != 4) {
        let lost = key("orders", &format!("i-{index:03}"));
        eventually("it is restored", restored::<H>(), || store.raw(&lost), Option::is_some).await;
    }
    let registered = |states: &Vec<RegistrationState>| {
        states
            .iter()
            .enumerate()
            .all(|(index, state)| if index == 4 { lost_to_another(state) } else { state.is_registered() })
    };
    eventually("all but one are registered", RECONCILE + restored::<H>(), async || states(&provider), registered).await;
}

/// A process that crashes is gone for every reader within its bound.
pub async fn a_crashed_process_is_gone_within_its_bound<H: Harness>() {
    let store = H::start().await;
    let (provider, other, reader) = (client(&store).await, client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "crashes")).await.expect("register");
    register_all(&other, instances("orders", "lives", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    observer.until_ids(soon::<H>(), &["crashes", "lives-000", "lives-001"]).await;
    provider.crash();
    observer.until_ids(gone::<H>(), &["lives-000", "lives-001"]).await;
    assert_eq!(observer.changes(), ["-crashes"]);
}

/// A process that starts again takes its dead predecessor's key over at once, and keeps it when that one's session
/// ends.
pub async fn a_restarted_process_takes_its_key_over_at_once<H: Harness>() {
    let store = H::start().await;
    let (first, reader) = (client(&store).await, client(&store).await);
    first.registry.register(weighing(instance("orders", "1"), 1)).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    first.crash();

    let second = client(&store).await;
    second.registry.register(weighing(instance("orders", "1"), 2)).await.expect("register again");
    observer.until("the new process", soon::<H>(), |seen| seen.get("1").is_some_and(|one| one.weight == 2)).await;
    let absent = || async { observer.now().is_empty() };
    never_within("the key goes with the dead session", 2 * H::ttl() + H::slack(), absent, |absent| *absent).await;
    assert_eq!(observer.changes(), ["~1"]);
    assert!(all_registered(&states(&second)));
}

/// The late stop of an old process never takes out its successor's entry.
pub async fn a_late_stop_never_takes_out_the_successor<H: Harness>() {
    let store = H::start().await;
    let (unregisters, destroys) = (client(&store).await, client(&store).await);
    let (second, reader) = (client(&store).await, client(&store).await);
    unregisters.registry.register(instance("orders", "1")).await.expect("register");
    destroys.registry.register(instance("orders", "2")).await.expect("register");
    register_all(&second, vec![instance("orders", "1"), instance("orders", "2")]).await;
    let observer = Observer::of(&reader, "orders").await;

    assert!(!unregisters.registry.unregister("orders", "1").await.expect("unregister"));
    destroys.registry.destroy().await.expect("destroy");
    let absent = || async { observer.now().len() < 2 };
    never_within("the successor is taken out", 2 * H::ttl(), absent, |absent| *absent).await;
    assert!(observer.changes().is_empty(), "{observer:?}");
    assert!(all_registered(&states(&second)));
}

/// Two live owners of one key do not fight: the newer has it, the older says so and waits. When the newer has left,
/// the older comes back.
pub async fn two_live_owners_do_not_fight<H: Harness>() {
    let store = H::start().await;
    let (older, newer) = (client(&store).await, client(&store).await);
    let one = key("orders", "1");
    older.registry.register(weighing(instance("orders", "1"), 1)).await.expect("register");
    let first = record(&store, &one).await.expect("there is a record");
    newer.registry.register(weighing(instance("orders", "1"), 2)).await.expect("register the same");
    let second = record(&store, &one).await.expect("there is a record");
    assert!(second.owner != first.owner && second.epoch > first.epoch, "{first:?} {second:?}");

    let lost = |states: &Vec<RegistrationState>| states.iter().all(lost_to_another);
    eventually("the older lost it", RECONCILE + restored::<H>(), async || states(&older), lost).await;
    let changed = |held: &Option<_>| held.as_ref() != Some(&second);
    never_within("the record changes", 4 * H::ttl(), || record(&store, &one), changed).await;
    assert!(all_registered(&states(&newer)));

    let start = Instant::now();
    newer.registry.destroy().await.expect("destroy");
    let bound = H::ttl() + 2 * RECONCILE + restored::<H>();
    let back = eventually("the older is back", bound, || record(&store, &one), Option::is_some).await;
    assert!(
        start.elapsed() >= H::ttl(),
        "after {:?}: it does not wait until the key was free for a ttl",
        start.elapsed()
    );
    assert_eq!(back.map(|record| record.owner), Some(first.owner));
    eventually("it is registered", soon::<H>(), async || states(&older), all_registered).await;
}

/// A registration wins over the other owner by being made anew, not by waiting.
pub async fn whoever_registers_last_has_the_key<H: Harness>() {
    let store = H::start().await;
    let (first, second) = (client(&store).await, client(&store).await);
    let one = key("orders", "1");
    let mut owners = Vec::new();
    for round in 0..4 {
        let client = if round % 2 == 0 { &first } else { &second };
        client.registry.unregister("orders", "1").await.expect("unregister");
        client.registry.register(instance("orders", "1")).await.expect("register");
        owners.push(record(&store, &one).await.expect("there is a record").owner);
    }
    assert!(owners[0] == owners[2] && owners[1] == owners[3] && owners[0] != owners[1], "{owners:?}");
}

/// A process that goes without a word, its last handle dropped, ends its tasks, and its records expire.
pub async fn a_dropped_registry_ends_its_tasks_and_expires<H: Harness>() {
    let store = H::with_own_server().await;
    let reader = client(&store).await;
    let observer = Observer::of(&reader, "orders").await;
    let (watchers, tasks_before) = (store.watchers().await, tasks(&store).await);
    // That of the reader, where readers have one.
    let sessions_before = store.sessions().await;

    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 1)).await;
    for service in ["a", "b", "c"] {
        provider.registry.watch(service).await.expect("watch");
    }
    observer.until_ids(soon::<H>(), &["i-000"]).await;
    drop(provider);
    observer.until_ids(gone::<H>(), &[]).await;
    eventually("its tasks end", PATIENCE, || tasks(&store), |tasks| *tasks <= tasks_before).await;
    eventually("so do its watches", PATIENCE, || store.watchers(), |now| *now <= watchers).await;
    eventually("and its session", gone::<H>(), || store.sessions(), |sessions| *sessions <= sessions_before).await;
}

/// Destroying a registry leaves nothing at the store: no record, no mark, no session, no watch.
pub async fn destroy_leaves_nothing_behind<H: Harness>() {
    let store = H::with_own_server().await;
    let tasks_before = tasks(&store).await;
    // Long enough that nothing goes by itself.
    let patient = options::<H>().ttl(PATIENCE * 2).announce("web".parse::<registry_core::ServiceName>().ok());
    let only = store.connect(patient).await;
    register_all(&only, instances("orders", "i", 5)).await;
    register_all(&only, instances("payments", "i", 5)).await;
    let observer = Observer::of(&only, "orders").await;
    observer.until("its own instances", soon::<H>(), |seen| seen.len() == 5).await;
    only.registry.unregister("orders", "i-000").await.expect("unregister");

    only.registry.destroy().await.expect("destroy");
    assert!(only.registry.registrations().is_empty());
    drop((observer, only));
    eventually("the namespace is empty", soon::<H>(), || store.keys(), Vec::is_empty).await;
    eventually("no session lives", soon::<H>(), || store.sessions(), |sessions| *sessions == 0).await;
    eventually("nobody watches", PATIENCE, || store.watchers(), |watchers| *watchers == 0).await;
    eventually("no task lives", PATIENCE, || tasks(&store), |tasks| *tasks <= tasks_before).await;
    never_within("anything comes back", 2 * H::ttl(), || store.keys(), |keys| !keys.is_empty()).await;
}

/// After `destroy` every call says that the registry is closed, and watchers and events end. Destroying again is fine.
pub async fn a_destroyed_registry_is_closed<H: Harness>() {
    let store = H::start().await;
    let only = client(&store).await;
    only.registry.register(instance("orders", "1")).await.expect("register");
    let mut watcher = only.registry.watch("orders").await.expect("watch");
    in_time("the first item", soon::<H>(), watcher.next()).await.expect("the registry lives");
    let events = only.registry.events();

    only.registry.destroy().await.expect("destroy");
    only.registry.destroy().await.expect("destroy again");
    let calls = [
        ("register", error(only.registry.register(instance("orders", "2")).await)),
        ("register_all", error(only.registry.register_all(vec![instance("orders", "2")]).await.remove(0))),
        ("unregister", error(only.registry.unregister("orders", "1").await)),
        ("set_status", error(only.registry.set_status("orders", "1", Status::Down).await)),
        ("set_weight", error(only.registry.set_weight("orders", "1", 0).await)),
        ("drain", error(only.registry.drain("orders", "1", PATIENCE).await)),
        ("discover", error(only.registry.discover("orders").await)),
        ("watch", error(only.registry.watch("orders").await)),
        ("wait_for", error(only.registry.wait_for("orders", 1, PATIENCE).await)),
        ("require", error(only.registry.require(&[("orders", 1)], PATIENCE).await)),
        ("heartbeat", error(only.registry.heartbeat().await)),
        ("services", error(only.registry.services().await)),
        ("subscribers", error(only.registry.subscribers("orders").await)),
        ("set_override", error(only.registry.set_override("orders", "1", Override::default().weight(0)).await)),
        ("overrides", error(only.registry.overrides("orders").await)),
        ("clear_override", error(only.registry.clear_override("orders", "1").await)),
    ];
    for (verb, error) in calls {
        assert_eq!(error.map(|error| error.kind()), Some(ErrorKind::Closed), "{verb}");
    }
    let ended = async { while watcher.next().await.is_some() {} };
    in_time("the watcher ends", soon::<H>(), ended).await;
    in_time("the events end", soon::<H>(), events.count()).await;
}

/// Unregistering wins over heartbeats, those that run and those to come; nothing comes back.
pub async fn unregister_wins_over_heartbeats<H: Harness>() {
    const WAY: Duration = Duration::from_millis(80);
    let store = H::start().await;
    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 2)).await;
    let beating = async {
        loop {
            provider.registry.heartbeat().await.expect("heartbeat");
        }
    };
    let case = async {
        // Missing as well: a heartbeat is about to restore it, has begun to, or has just done so.
        let gone = key("orders", "i-000");
        for round in 0..8 {
            provider.registry.register(instance("orders", "i-000")).await.expect("register");
            provider.link.delay(WAY);
            store.delete(&gone).await;
            sleep(WAY * round / 2).await;
            provider.registry.unregister("orders", "i-000").await.expect("unregister");
            assert!(store.raw(&gone).await.is_none(), "it is there after it was taken out, in round {round}");
            provider.link.heal();
        }
        never_within("it comes back", 2 * H::ttl(), || store.raw(&gone), Option::is_some).await;
    };
    tokio::select! {
        never = beating => never,
        () = case => {}
    }
    assert_eq!(provider.registry.registrations().len(), 1);
}

/// Unregistering wins over a first put and over an update that are under way.
pub async fn unregister_wins_over_puts_in_flight<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    provider.registry.register(instance("orders", "updated")).await.expect("register");
    // A put may take several requests, and the removal waits for it.
    provider.link.delay(REQUEST_TIMEOUT / 20);
    for id in ["new", "updated"] {
        let put = provider.registry.register(weighing(instance("orders", id), 7));
        let withdrawn = async {
            // The put is on its way, and not yet answered.
            let calls = provider.calls.made();
            eventually("the put", soon::<H>(), async || provider.calls.made(), |made| *made > calls).await;
            provider.registry.unregister("orders", id).await
        };
        let (put, withdrawn) = tokio::join!(put, withdrawn);
        withdrawn.expect("unregister");
        assert!(put.is_ok() || put.is_err_and(|error| error.kind() == ErrorKind::Conflict));
    }
    provider.link.heal();
    for id in ["new", "updated"] {
        let gone = key("orders", id);
        eventually("it is gone", soon::<H>(), || store.raw(&gone), Option::is_none).await;
    }
    never_within("anything comes back", 2 * H::ttl(), || records(&store), |left| !left.is_empty()).await;
    assert!(provider.registry.registrations().is_empty());
}

/// The paths of instances in the service of these cases.
async fn records<H: Harness>(store: &H) -> Vec<String> {
    let keys = store.keys().await;
    keys.into_iter().filter(|path| is_record(path)).collect()
}

fn is_record(path: &str) -> bool {
    path.contains("orders/providers/")
}

fn lost_to_another(state: &RegistrationState) -> bool {
    matches!(state, RegistrationState::Lost { cause, .. } if cause.kind() == ErrorKind::Conflict)
}

fn error<T>(outcome: Result<T>) -> Option<Error> {
    outcome.err()
}
