//! Cuts, black holes and dead servers: what is registered comes back, and readers keep what they know.

use std::{
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use registry_core::{ErrorKind, Event, Freshness, Options, Override, RegistrationState, Registry, Snapshot, Status};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::support::*;
use crate::harness::{Client, Harness};

/// After an outage that its session does not survive, an instance is back: the same one, once.
pub async fn a_long_outage_ends_in_restored_registrations<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (store.connect(unchecked::<H>()).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    let before = observer.now();
    provider.link.cut();
    observer.until_ids(gone::<H>(), &[]).await;
    let lost = |states: &Vec<RegistrationState>| states.iter().all(|state| state.as_str() == "lost");
    eventually("the provider knows", gone::<H>(), async || states(&provider), lost).await;

    provider.link.heal();
    let after = observer.until_ids(restored::<H>(), &["1"]).await;
    assert_eq!(after.instances(), before.instances(), "it keeps registered_at");
    eventually("the provider knows", restored::<H>(), async || states(&provider), all_registered).await;
    assert_eq!(observer.changes(), ["-1", "+1"]);
    assert_eq!(provider.registry.registrations().len(), 1);
}

/// A process that is frozen for twice the ttl comes back by itself.
pub async fn a_client_in_a_black_hole_comes_back<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    let before = observer.now();
    provider.link.hang();
    sleep(2 * H::ttl()).await;
    provider.link.heal();
    let one = key("orders", "i-000");
    eventually("it is restored", H::ttl() / 3 + restored::<H>(), || store.raw(&one), Option::is_some).await;
    let as_before = |seen: &registry_core::Snapshot| seen.instances() == before.instances() && is_live(seen);
    observer.until("all are there again", restored::<H>(), as_before).await;
    eventually("the provider knows", restored::<H>(), async || states(&provider), all_registered).await;
}

/// A connection on which nothing comes any more, not even its end, is found out: by who registers within a ttl, and by who
/// reads as soon as the connection is taken for dead.
pub async fn a_black_hole_is_found_out_within_a_ttl<H: Harness>() {
    let store = H::start().await;
    let only = client(&store).await;
    only.registry.register(instance("orders", "1")).await.expect("register");
    let (observer, events) = (Observer::of(&only, "orders").await, Events::of(&only));
    only.link.hang();
    let start = Instant::now();
    let lost = |event: &Event| registration(event, "lost");
    events.until("the provider knows", gone::<H>(), lost).await;
    println!("found out by the provider after {:?}", start.elapsed());
    if H::has_connections() {
        observer.until("the reader knows", PATIENCE, is_stale).await;
        println!("found out by the reader after {:?}", start.elapsed());
    }
    only.link.heal();
    observer.until("it is over", PATIENCE, |seen| is_live(seen) && ids(seen) == ["1"]).await;
    eventually("it is registered", PATIENCE, async || states(&only), all_registered).await;
}

/// Whoever follows a service in which nothing happens misses nothing when the history of everything else is forgotten, and
/// the server starts again.
pub async fn a_quiet_service_outlives_what_is_forgotten_beside_it<H: Harness>() {
    let store = H::with_own_server().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("quiet", "i", 2)).await;
    let observer = Observer::of(&reader, "quiet").await;
    for round in 0..20 {
        register_all(&provider, instances("busy", "i", 20).into_iter().map(|one| weighing(one, round)).collect()).await;
    }
    store.compact().await;
    store.kill().await;
    observer.until("the outage", PATIENCE, is_stale).await;
    store.restart().await;
    observer.until("its end", PATIENCE, is_live).await;
    is_back(&provider).await;
    assert!(provider.registry.unregister("quiet", "i-000").await.expect("unregister"));
    observer.until_ids(soon::<H>(), &["i-001"]).await;
    assert_eq!(observer.changes(), ["-i-000"]);
}

/// A server that is killed and started again with its data is no loss for anyone.
pub async fn a_restarted_server_is_no_loss<H: Harness>() {
    let store = H::with_own_server().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    store.kill().await;
    observer.until("the outage", PATIENCE, is_stale).await;
    store.restart().await;
    observer.until("the end of the outage", PATIENCE, is_live).await;
    eventually("all are registered", PATIENCE, async || states(&provider), all_registered).await;
    never_within("it shows", 2 * H::ttl(), async || observer.changes().len(), |changes| *changes > 0).await;
    provider.registry.register(instance("orders", "j")).await.expect("register");
    observer.until_ids(soon::<H>(), &["i-000", "i-001", "i-002", "j"]).await;
    assert_eq!(observer.changes(), ["+j"]);
}

/// A server that comes back without its data is filled again, and readers are never without.
pub async fn a_wiped_store_is_filled_again_and_readers_never_notice<H: Harness>() {
    let store = H::with_own_server().await;
    let (provider, reader) = (store.connect(unchecked::<H>()).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    provider.registry.register(instance("single", "1")).await.expect("register");
    let (many, single) = (Observer::of(&reader, "orders").await, Observer::of(&reader, "single").await);
    store.wipe().await;
    let back = Instant::now();
    let last = [key("orders", "i-000"), key("orders", "i-001"), key("orders", "i-002"), key("single", "1")];
    for key in &last {
        let left = restored::<H>().saturating_sub(back.elapsed());
        eventually("it is restored", left, || store.raw(key), Option::is_some).await;
    }
    for observer in [&many, &single] {
        observer.until("the end of the outage", PATIENCE, is_live).await;
        assert!(observer.changes().is_empty(), "{observer:?}");
    }
    // Readers follow the new history.
    provider.registry.register(instance("single", "2")).await.expect("register");
    single.until_ids(soon::<H>(), &["1", "2"]).await;
    assert!(all_registered(&states(&provider)));
}

/// A server that hangs until every session is over, and goes on as if nothing had happened, empties no reader.
pub async fn a_frozen_server_never_empties_a_reader<H: Harness>() {
    let store = H::with_own_server().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    store.freeze().await;
    sleep(2 * H::ttl()).await;
    store.thaw().await;
    for index in 0..3 {
        let lost = key("orders", &format!("i-{index:03}"));
        let back = || async { store.raw(&lost).await.is_some() && states(&provider)[index].is_registered() };
        eventually("it is registered", PATIENCE, back, |back| *back).await;
    }
    observer.until("all are there", PATIENCE, |seen| seen.len() == 3 && is_live(seen)).await;
    observer.assert_always("all of them", |seen| seen.len() == 3);
}

/// A cut that the session survives changes nothing for anyone.
pub async fn a_short_cut_changes_nothing<H: Harness>() {
    let store = H::start().await;
    let (provider, reader, other) = (client(&store).await, client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let bystander = Observer::of(&other, "orders").await;
    let observer = Observer::of(&reader, "orders").await;
    provider.link.cut();
    reader.link.cut();
    sleep(H::ttl() / 4).await;
    provider.link.heal();
    reader.link.heal();
    never_within("it shows", 2 * H::ttl(), async || observer.changes().len(), |changes| *changes > 0).await;
    observer.until("the end of the outage", PATIENCE, is_live).await;
    // A change that comes after whatever came before.
    in_time("register", PATIENCE, provider.registry.register(instance("orders", "j"))).await.expect("register");
    for observer in [observer, bystander] {
        observer.until("the new one", soon::<H>(), |seen| seen.get("j").is_some()).await;
        assert_eq!(observer.changes(), ["+j"]);
    }
}

/// What happened while a reader was cut off is seen once it is back: each kind of change, in one step.
pub async fn changes_during_a_cut_are_seen_after_it<H: Harness>() {
    changes_during_a_cut(&H::start().await, false).await;
}

/// So it is when the store has forgotten what happened.
pub async fn changes_during_a_cut_are_seen_after_a_compaction<H: Harness>() {
    changes_during_a_cut(&H::with_own_server().await, true).await;
}

async fn changes_during_a_cut<H: Harness>(store: &H, compacted: bool) {
    let (provider, reader) = (client(store).await, client(store).await);
    let change = |weight| weighing(instance("orders", "changes"), weight);
    register_all(&provider, vec![change(1), instance("orders", "goes"), instance("orders", "keeps")]).await;
    let observer = Observer::of(&reader, "orders").await;
    observer.until_ids(soon::<H>(), &["changes", "goes", "keeps"]).await;
    reader.link.cut();
    observer.until("the outage", PATIENCE, is_stale).await;
    provider.registry.register(change(2)).await.expect("update");
    provider.registry.unregister("orders", "goes").await.expect("unregister");
    provider.registry.register(instance("orders", "new")).await.expect("register");
    register_all(&provider, instances("others", "i", 50)).await;
    if compacted {
        store.compact().await;
    }
    reader.link.heal();
    let seen = observer.until_ids(PATIENCE, &["changes", "keeps", "new"]).await;
    assert_eq!(seen.get("changes").map(|one| one.weight), Some(2));
    assert_eq!(observer.changes(), ["~changes", "-goes", "+new"]);
    observer.until("the end of the outage", soon::<H>(), is_live).await;
}

/// In an outage readers keep the last set, and it says that it is stale; then it is live again.
pub async fn an_outage_keeps_the_last_set_marked_stale<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    for _ in 0..2 {
        reader.link.cut();
        observer.until("the outage", PATIENCE, is_stale).await;
        let last_known = reader.registry.discover("orders").await.expect("discover");
        assert!(is_stale(&last_known) && last_known.len() == 2, "{last_known:?}");
        never_within("it is forgotten", H::ttl(), async || observer.now().len(), |len| *len != 2).await;
        reader.link.heal();
        observer.until("the end of the outage", PATIENCE, is_live).await;
    }
    assert!(observer.changes().is_empty(), "{observer:?}");
}

/// What is unregistered in an outage is taken out after it, and stays out.
pub async fn unregister_in_an_outage_wins<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 2)).await;
    let observer = Observer::of(&reader, "orders").await;
    provider.link.cut();
    let outcome = in_time("unregister", answered::<H>(), provider.registry.unregister("orders", "i-000")).await;
    assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    assert_eq!(provider.registry.registrations().len(), 1);
    provider.link.heal();
    observer.until_ids(PATIENCE, &["i-001"]).await;
    let gone = key("orders", "i-000");
    never_within("it comes back", 2 * H::ttl(), || store.raw(&gone), Option::is_some).await;
    eventually("the other is registered", PATIENCE, async || states(&provider), all_registered).await;
}

/// What is registered or updated in an outage is what the store has after it.
pub async fn register_in_an_outage_is_made_good_after_it<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(weighing(instance("orders", "1"), 1)).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    provider.link.cut();
    for one in [weighing(instance("orders", "1"), 2), instance("orders", "2")] {
        let outcome = in_time("register", answered::<H>(), provider.registry.register(one)).await;
        assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    }
    assert_eq!(provider.registry.registrations().len(), 2);
    provider.link.heal();
    let both = |seen: &registry_core::Snapshot| ids(seen) == ["1", "2"] && seen.instances()[0].weight == 2;
    observer.until("both, as they are now", PATIENCE, both).await;
    eventually("both are registered", PATIENCE, async || states(&provider), all_registered).await;
}

/// A put that hung and is carried out late, when nobody wants it any more, leaves nothing behind.
pub async fn what_arrives_late_is_taken_out_again<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    // A session, so that something keeps the orphan alive.
    provider.registry.register(instance("orders", "keeps")).await.expect("register");
    provider.link.hang();
    let outcome = in_time("register", answered::<H>(), provider.registry.register(instance("orders", "late"))).await;
    assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    // It may be put again meanwhile: then that comes first.
    let within = REQUEST_TIMEOUT + answered::<H>();
    let outcome = in_time("unregister", within, provider.registry.unregister("orders", "late")).await;
    assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    provider.link.heal();
    let late = key("orders", "late");
    let quiet = 2 * H::ttl() + RECONCILE;
    eventually_for_good("it is gone", PATIENCE, quiet, || store.raw(&late), Option::is_none).await;
    eventually("the other is registered", PATIENCE, async || states(&provider), all_registered).await;
}

/// So does a put that is carried out after its own removal was confirmed.
pub async fn what_arrives_after_its_removal_is_taken_out_again<H: Harness>() {
    let store = H::start().await;
    let provider = client(&store).await;
    provider.registry.register(instance("orders", "keeps")).await.expect("register");
    provider.link.delay(REQUEST_TIMEOUT + RECONCILE);
    let calls = provider.calls.made();
    let registering = in_time("register", answered::<H>(), provider.registry.register(instance("orders", "late")));
    let healing = async {
        eventually("the put", soon::<H>(), async || provider.calls.made(), |made| *made > calls).await;
        // It is on its way now; what follows overtakes it.
        sleep(Duration::from_millis(100)).await;
        provider.link.heal();
    };
    // Whether it arrives with the others or late is the network's matter.
    let _ = tokio::join!(registering, healing);
    provider.registry.unregister("orders", "late").await.expect("unregister");
    let late = key("orders", "late");
    let quiet = 2 * H::ttl() + RECONCILE;
    eventually_for_good("it is gone", PATIENCE, quiet, || store.raw(&late), Option::is_none).await;
    eventually("the other is registered", PATIENCE, async || states(&provider), all_registered).await;
}

/// Every call has a deadline, whatever the store does; so has the end.
pub async fn every_call_has_a_deadline<H: Harness>() {
    let store = H::start().await;
    let only = client(&store).await;
    register_all(&only, instances("orders", "i", 3)).await;
    only.registry.discover("followed").await.expect("discover");
    only.link.hang();
    let registry = &only.registry;
    let unanswered = |verb: &str, error: Option<ErrorKind>| {
        assert!(matches!(error, Some(ErrorKind::Unavailable | ErrorKind::Timeout)), "{verb}: {error:?}");
    };
    let within = answered::<H>();
    tokio::join!(
        async {
            let outcome = in_time("register", within, registry.register(instance("orders", "new"))).await;
            unanswered("register", outcome.err().map(|error| error.kind()));
        },
        async {
            let batch = instances("payments", "i", 2);
            for outcome in in_time("register_all", within, registry.register_all(batch)).await {
                unanswered("register_all", outcome.err().map(|error| error.kind()));
            }
        },
        async {
            let outcome = in_time("set_status", within, registry.set_status("orders", "i-001", Status::Down)).await;
            unanswered("set_status", outcome.err().map(|error| error.kind()));
        },
        async {
            let outcome = in_time("unregister", within, registry.unregister("orders", "i-000")).await;
            unanswered("unregister", outcome.err().map(|error| error.kind()));
        },
        async {
            let outcome = in_time("discover", within, registry.discover("unknown")).await;
            unanswered("discover", outcome.err().map(|error| error.kind()));
        },
        async {
            let watcher = in_time("watch", within, registry.watch("unwatched")).await.expect("watch");
            assert_eq!(watcher.current().freshness(), Freshness::Pending);
        },
        async {
            let outcome = in_time("heartbeat", within, registry.heartbeat()).await;
            unanswered("heartbeat", outcome.err().map(|error| error.kind()));
        },
        async {
            let outcome = in_time("services", within, registry.services()).await;
            unanswered("services", outcome.err().map(|error| error.kind()));
        },
        async {
            let outcome = in_time("subscribers", within, registry.subscribers("orders")).await;
            unanswered("subscribers", outcome.err().map(|error| error.kind()));
        },
        async {
            let set = Override::default().weight(0);
            let outcome = in_time("set_override", within, registry.set_override("orders", "i-001", set)).await;
            unanswered("set_override", outcome.err().map(|error| error.kind()));
        },
        async {
            let outcome = in_time("overrides", within, registry.overrides("orders")).await;
            unanswered("overrides", outcome.err().map(|error| error.kind()));
        },
        async {
            let outcome = in_time("clear_override", within, registry.clear_override("orders", "i-001")).await;
            unanswered("clear_override", outcome.err().map(|error| error.kind()));
        },
        async {
            let seen = in_time("discover what is followed", within, registry.discover("followed")).await;
            assert!(seen.expect("discover").is_empty());
        },
    );
    let outcome = in_time("destroy", within, registry.destroy()).await;
    unanswered("destroy", outcome.err().map(|error| error.kind()));
    assert!(registry.registrations().is_empty());
}

/// With a dead server, the end comes by its deadline too, and what is left expires.
pub async fn destroy_with_a_dead_server_ends_by_its_deadline<H: Harness>() {
    let store = H::with_own_server().await;
    let tasks_before = tasks(&store).await;
    let only = client(&store).await;
    register_all(&only, instances("orders", "i", 3)).await;
    store.kill().await;
    let outcome = in_time("destroy", answered::<H>(), only.registry.destroy()).await;
    assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    drop(only);
    store.restart().await;
    eventually("no task lives", PATIENCE, || tasks(&store), |tasks| *tasks <= tasks_before).await;
    // A server that was down gives sessions their time again.
    eventually("what was left expires", H::ttl() + gone::<H>(), || store.keys(), Vec::is_empty).await;
}

/// So it does with a server that hangs.
pub async fn destroy_with_a_silent_server_ends_by_its_deadline<H: Harness>() {
    let store = H::with_own_server().await;
    let only = client(&store).await;
    register_all(&only, instances("orders", "i", 3)).await;
    store.freeze().await;
    let outcome = in_time("destroy", answered::<H>(), only.registry.destroy()).await;
    assert!(outcome.as_ref().is_err_and(registry_core::Error::is_retryable), "{outcome:?}");
    drop(only);
    store.thaw().await;
    eventually("what was left expires", H::ttl() + gone::<H>(), || store.keys(), Vec::is_empty).await;
}

/// A store that is down is asked now and then, not all the time.
pub async fn a_dead_server_is_not_hammered<H: Harness>() {
    const WATCHED: u64 = 5;
    let store = H::with_own_server().await;
    let only = client(&store).await;
    register_all(&only, instances("orders", "i", 20)).await;
    let mut watchers = Vec::new();
    for index in 0..WATCHED {
        watchers.push(only.registry.watch(&format!("service {index}")).await.expect("watch"));
    }
    store.kill().await;
    // Something to put as well.
    let late = only.registry.register(instance("orders", "late"));
    in_time("register", answered::<H>(), late).await.expect_err("nobody is there");
    let before = only.calls.made();
    let start = Instant::now();
    sleep(5 * RECONCILE).await;
    let made = only.calls.made() - before;
    // Each of the loops doubles a delay that begins at 100 ms, up to a third of the ttl or 5 s.
    let each = 20 + u64::try_from(6 * start.elapsed().as_millis() / (H::ttl() / 3).as_millis()).expect("a few seconds");
    assert!(made <= each * (WATCHED + 2), "{made} calls in {:?}", start.elapsed());
    store.restart().await;
    eventually("all are registered", PATIENCE, async || states(&only), all_registered).await;
}

/// A service may start before its store: what it registers is pending, and made good when the store is up.
pub async fn a_client_may_start_before_its_store<H: Harness>() {
    let store = H::with_own_server().await;
    store.kill().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    let registering = in_time("register", answered::<H>(), provider.registry.register(instance("orders", "1")));
    let watching = in_time("watch", answered::<H>(), reader.registry.watch("orders"));
    let discovering = in_time("discover", answered::<H>(), reader.registry.discover("orders"));
    let (registered, watcher, discovered) = tokio::join!(registering, watching, discovering);
    assert!(registered.as_ref().is_err_and(registry_core::Error::is_retryable), "{registered:?}");
    assert!(matches!(states(&provider)[..], [RegistrationState::Pending]), "{:?}", states(&provider));
    assert_eq!(discovered.map_err(|error| error.kind()).expect_err("nothing is known"), ErrorKind::Unavailable);
    let watcher = watcher.expect("watch");
    assert!(watcher.current().is_empty() && watcher.current().freshness() == Freshness::Pending);

    let observer = Observer::over(watcher);
    store.restart().await;
    observer.until_ids(PATIENCE, &["1"]).await;
    observer.until("it follows the store", soon::<H>(), is_live).await;
    eventually("it is registered", PATIENCE, async || states(&provider), all_registered).await;
    assert!(is_live(&reader.registry.discover("orders").await.expect("discover")));
}

/// The events of a registry tell of its connection, its session, its views and its registrations.
pub async fn events_tell_what_happens<H: Harness>() {
    let store = H::start().await;
    let only = client(&store).await;
    let events = Events::of(&only);
    only.registry.register(instance("orders", "1")).await.expect("register");
    only.registry.discover("orders").await.expect("discover");
    events.until("registered", soon::<H>(), |event| registration(event, "registered")).await;
    events
        .until("live", soon::<H>(), |event| matches!(event, Event::Live { service } if service.as_str() == "orders"))
        .await;

    events.forget();
    only.link.cut();
    events.until("suspended", PATIENCE, |event| matches!(event, Event::Suspended)).await;
    events.until("stale", PATIENCE, |event| matches!(event, Event::Stale { .. })).await;
    events.until("the session is lost", gone::<H>(), |event| matches!(event, Event::SessionLost { .. })).await;
    events.until("the registration is lost", soon::<H>(), |event| registration(event, "lost")).await;

    events.forget();
    only.link.heal();
    events.until("connected", PATIENCE, |event| matches!(event, Event::Connected { ttl } if *ttl >= H::ttl())).await;
    events.until("the session is renewed", PATIENCE, |event| matches!(event, Event::SessionRenewed)).await;
    events.until("live", PATIENCE, |event| matches!(event, Event::Live { .. })).await;
    events.until("registered", PATIENCE, |event| registration(event, "registered")).await;
}

/// A process that starts while the server is down has what its predecessor left on disk, marked stale since then, and follows
/// the server once it is back.
pub async fn a_process_starts_and_serves_with_the_store_down<H: Harness>() {
    let (store, dir) = (H::with_own_server().await, folder());
    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 3)).await;
    let (before, known) = leave_on_disk(&store, &dir).await;
    store.kill().await;
    let reader = store.connect(keeping::<H>(&dir)).await;
    let observer = serves_from_disk::<H>(&reader, &before, known).await;
    store.restart().await;
    observer.until("the server", PATIENCE, is_live).await;
    is_back(&provider).await;
    provider.registry.register(instance("orders", "j")).await.expect("register");
    observer.until_ids(PATIENCE, &["i-000", "i-001", "i-002", "j"]).await;
}

/// So does one that starts while the server is silent, before its first call is over.
pub async fn a_process_starts_and_serves_with_the_store_silent<H: Harness>() {
    let (store, dir) = (H::with_own_server().await, folder());
    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 3)).await;
    let (before, known) = leave_on_disk(&store, &dir).await;
    store.freeze().await;
    let reader = store.connect(keeping::<H>(&dir)).await;
    let observer = serves_from_disk::<H>(&reader, &before, known).await;
    store.thaw().await;
    observer.until("the server", PATIENCE, is_live).await;
    eventually("all are registered", PATIENCE, async || states(&provider), all_registered).await;
    observer.until_ids(PATIENCE, &["i-000", "i-001", "i-002"]).await;
}

/// Who left since the set was kept on disk is gone as soon as the server tells, and is not held for having been in it.
pub async fn what_is_on_disk_yields_at_once_to_what_the_store_has<H: Harness>() {
    let (store, dir) = (H::with_own_server().await, folder());
    let provider = client(&store).await;
    register_all(&provider, instances("orders", "i", 4)).await;
    let (before, known) = leave_on_disk(&store, &dir).await;
    for left in ["i-001", "i-002", "i-003"] {
        assert!(provider.registry.unregister("orders", left).await.expect("unregister"));
    }
    store.kill().await;
    let reader = store.connect(keeping::<H>(&dir)).await;
    let observer = serves_from_disk::<H>(&reader, &before, known).await;
    store.restart().await;
    let told = observer.until("the server", PATIENCE, |seen| !is_stale(seen)).await;
    assert!(is_live(&told) && ids(&told).iter().all(|id| *id == "i-000"), "{observer:?}");
}

/// Waits until a provider has a connection of its own again, of which its readers say nothing, and all are registered.
async fn is_back(provider: &Client) {
    eventually("a heartbeat", PATIENCE, async || provider.registry.heartbeat().await.is_ok(), |beats| *beats).await;
    eventually("all are registered", PATIENCE, async || states(provider), all_registered).await;
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

/// The options of a process that keeps on disk what it follows.
fn keeping<H: Harness>(dir: &TempDir) -> Options {
    options::<H>().snapshot_dir(dir.path())
}

/// Plays a process that follows `orders` and ends in good order. Returns what it saw, and when it was there.
async fn leave_on_disk<H: Harness>(store: &H, dir: &TempDir) -> (Snapshot, RangeInclusive<SystemTime>) {
    // Times are kept in whole milliseconds.
    let start = SystemTime::now() - Duration::from_millis(1);
    let process = store.connect(keeping::<H>(dir)).await;
    let seen = process.registry.discover("orders").await.expect("discover");
    assert!(is_live(&seen) && !seen.is_empty(), "{seen:?}");
    in_time("destroy", PATIENCE, process.registry.destroy()).await.expect("destroy");
    (seen, start..=SystemTime::now())
}

/// `discover` gives in time what was left on disk, stale since it was `known`; so does a watcher.
async fn serves_from_disk<H: Harness>(
    reader: &Client,
    before: &Snapshot,
    known: RangeInclusive<SystemTime>,
) -> Observer {
    let discover = reader.registry.discover("orders");
    let found = in_time("discover", answered::<H>(), discover).await.expect("there is a set on disk");
    assert_eq!(found.instances(), before.instances());
    assert!(
        matches!(found.freshness(), Freshness::Stale { since } if known.contains(&since)),
        "{:?} and {known:?}",
        found.freshness()
    );
    let observer = Observer::of(reader, "orders").await;
    assert_eq!(observer.now().instances(), before.instances());
    observer
}

/// One client's network is its own: what one suffers, the others do not.
pub async fn an_outage_of_one_is_no_outage_of_others<H: Harness>() {
    let store = H::start().await;
    let (cut, fine) = (client(&store).await, client(&store).await);
    register_all(&fine, instances("orders", "fine", 2)).await;
    let observer = Observer::of(&fine, "orders").await;
    cut.link.cut();
    fine.registry.register(instance("orders", "j")).await.expect("register");
    observer.until("the new one", soon::<H>(), |seen| seen.get("j").is_some()).await;
    observer.assert_always("live", is_live);
    assert!(fails(&cut).await);
    cut.link.heal();
    eventually("it is back", PATIENCE, || fails(&cut), |fails| !fails).await;
}

async fn fails(client: &Client) -> bool {
    let registry: &dyn Registry = &*client.registry;
    in_time("services", REQUEST_TIMEOUT + Duration::from_secs(2), registry.services()).await.is_err()
}

fn registration(event: &Event, state: &str) -> bool {
    matches!(event, Event::Registration(registration) if registration.state.as_str() == state)
}
