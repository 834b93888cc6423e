//! The keep loop: what is registered stays registered, and what was withdrawn stays away.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::join_all};
use registry_core::{
    ErrorKind, Event, Instance, Key, Options, Override, RegistrationState, Registry, memory::MemoryStore,
};
use tokio::time::{Instant, sleep, timeout};

use super::{script::Script, *};

const SECOND: Duration = Duration::from_secs(1);

fn key(service: &str, id: &str) -> Key {
    Key::provider(service.parse().unwrap(), id.parse().unwrap())
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_thirty_ttls_is_healed_within_a_beat_and_a_second() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..50).await;
    let registered_at = process.registry.registrations()[0].instance.registered_at;
    process.link.cut();
    sleep(TTL * 30).await;
    assert!(stored(&store).is_empty(), "the session expired");
    process.link.heal();
    eventually(TTL / 3 + SECOND, || stored(&store).len() == 50, || format!("{} stored", stored(&store).len())).await;
    process.until_state("00000", "registered", SECOND).await;
    assert_eq!(process.registry.registrations()[0].instance.registered_at, registered_at);
}

#[tokio::test(start_paused = true)]
async fn a_wiped_store_is_filled_again_within_a_beat_and_a_second() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..20).await;
    for _ in 0..5 {
        store.wipe();
        eventually(TTL / 3 + SECOND, || stored(&store).len() == 20, || format!("{} stored", stored(&store).len()))
            .await;
        sleep(part(TTL)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_was_ended_comes_back_within_a_beat_and_a_second() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    store.expire_all();
    eventually(TTL / 3 + SECOND, || stored(&store).len() == 1, || "not restored".into()).await;
}

#[tokio::test(start_paused = true)]
async fn a_process_frozen_for_two_ttls_registers_again_unless_it_was_replaced() {
    let store = MemoryStore::new();
    let (old, replaced) = (Process::start(&store), Process::start(&store));
    old.register("orders", "old").await;
    replaced.register("orders", "same").await;
    old.link.hang();
    replaced.link.hang();
    sleep(TTL * 2).await;
    let successor = Process::start(&store);
    successor.register("orders", "same").await;
    old.link.heal();
    replaced.link.heal();
    old.until_state("old", "registered", TTL / 3 + SECOND).await;
    replaced.until_state("same", "lost", Duration::from_secs(61)).await;
    assert_eq!(successor.state("same"), "registered");
    assert_eq!(stored(&store).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn one_failing_key_among_fifty_does_not_stop_the_others_and_recovers_by_itself() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..50).await;
    process.link.fail(&key("orders", "00007"), Some(denied()));
    store.expire_all();
    eventually(TTL / 3 + SECOND, || stored(&store).len() == 49, || format!("{} stored", stored(&store).len())).await;
    process.until_state("00007", "lost", SECOND).await;
    let lost = process.registry.registrations().remove(7);
    assert!(
        matches!(&lost.state, RegistrationState::Lost { cause, .. } if cause.kind() == ErrorKind::PermissionDenied)
    );
    process.link.fail(&key("orders", "00007"), None);
    eventually(Duration::from_secs(31), || stored(&store).len() == 50, || "00007 is still missing".into()).await;
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_refused_as_a_whole_is_split_until_the_bad_record_stands_alone() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.fail(&key("orders", "00042"), Some(denied()));
    let instances = (0..100).map(|id| instance("orders", &format!("{id:05}"))).collect();
    let outcomes = process.registry.register_all(instances).await;
    for (id, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.is_ok(), id != 42, "{id}: {outcome:?}");
    }
    assert_eq!(stored(&store).len(), 99);
    assert_eq!(process.registry.registrations().len(), 99, "what was refused is withdrawn");
    assert!(process.log.count("put") <= 2 * 7 + 1, "halved, not tried one by one: {}", process.log.count("put"));
}

#[tokio::test(start_paused = true)]
async fn a_loopback_address_is_warned_of_once_for_each_registration_unless_the_store_is_in_the_process() {
    let log = Warnings::default();
    let _guard = log.listen();
    let (registry, _director) = Script::registry(Options::default());
    let process = Process::start(&MemoryStore::new());
    for weight in [1, 2, 3] {
        let here = Instance::builder("orders", "1").endpoint("http://127.0.0.1:80").weight(weight).build().unwrap();
        registry.register(here.clone()).await.unwrap();
        process.registry.register(here).await.unwrap();
        registry.register(instance("orders", "2")).await.unwrap();
    }
    let said = log.lines();
    assert_eq!(said.len(), 1, "{said:#?}");
    for word in ["instance=1", "endpoint=http://127.0.0.1:80", "set REGISTRY_ADVERTISE_ADDR"] {
        assert!(said[0].contains(word), "{word} is not in {said:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn unregister_wins_over_a_put_in_flight() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.delay(SECOND);
    let register = process.registry.register(instance("orders", "1"));
    let unregister = async {
        sleep(SECOND / 2).await;
        process.registry.unregister("orders", "1").await
    };
    let (registered, unregistered) = tokio::join!(register, unregister);
    assert_eq!(registered.unwrap_err().kind(), ErrorKind::Conflict);
    assert!(unregistered.unwrap());
    sleep(TTL * 3).await;
    assert!(stored(&store).is_empty());
    assert!(process.registry.registrations().is_empty());
}

#[tokio::test(start_paused = true)]
async fn unregister_during_an_outage_holds_after_it() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.cut();
    let error = process.registry.unregister("orders", "1").await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert!(process.registry.registrations().is_empty(), "the intent is withdrawn at once");
    sleep(SECOND).await;
    process.link.heal();
    eventually(Duration::from_secs(6), || stored(&store).is_empty(), || "still there".into()).await;
    sleep(TTL * 3).await;
    assert!(stored(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_put_that_timed_out_and_was_applied_does_not_outlive_its_withdrawal() {
    let store = MemoryStore::new();
    let process = Process::with(&store, Options::default().reconcile(Duration::from_secs(30)));
    process.register("orders", "keeps the session").await;
    process.link.hang_after_apply();
    let error = process.registry.register(instance("orders", "orphan")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(stored(&store).len(), 2, "it was applied");
    let _ = process.registry.unregister("orders", "orphan").await;
    process.link.heal();
    eventually(Duration::from_secs(35), || stored(&store).len() == 1, || format!("{:?}", stored(&store))).await;
}

#[tokio::test(start_paused = true)]
async fn an_orphan_that_nobody_remembers_is_gone_after_the_next_check() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "mine").await;
    // A late put of ours, as the store may apply it after we gave up on it: same owner, same session.
    let late = {
        use registry_core::{Backend, Content, Intent, Lifetime, Record};
        let backend = process.registry.backend();
        let instance = instance("orders", "late");
        let record = Record {
            key: key("orders", "late"),
            owner: backend.owner().clone(),
            epoch: 0,
            lifetime: Lifetime::Session,
            content: Content::Instance(instance.into()),
        };
        backend.put(&[record], Intent::Claim).await.remove(0)
    };
    assert!(late.is_ok());
    assert_eq!(stored(&store).len(), 2);
    eventually(Duration::from_secs(31), || stored(&store).len() == 1, || format!("{:?}", stored(&store))).await;
}

#[tokio::test(start_paused = true)]
async fn register_after_unregister_ends_registered_whatever_is_in_flight() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.delay(Duration::from_millis(300));
    for wait in [0, 100, 299, 300, 301, 450, 700] {
        process.register("orders", "1").await;
        let unregister = process.registry.unregister("orders", "1");
        let again = async {
            sleep(Duration::from_millis(wait)).await;
            process.registry.register(instance("orders", "1")).await
        };
        let (_, again) = tokio::join!(unregister, again);
        again.unwrap();
        sleep(SECOND).await;
        assert_eq!(stored(&store).len(), 1, "after {wait} ms");
        assert_eq!(process.state("1"), "registered", "after {wait} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn a_register_whose_future_is_dropped_goes_on() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.cut();
    assert!(process.registry.register(instance("orders", "1")).now_or_never().is_none());
    assert_eq!(process.state("1"), "pending");
    process.link.heal();
    process.until_state("1", "registered", Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn of_many_all_are_registered_whenever_the_future_is_dropped() {
    for polls in 1..8 {
        let store = MemoryStore::new();
        let process = Process::start(&store);
        let instances = (0..1000).map(|id| instance("orders", &format!("{id:05}"))).collect();
        let mut registering = process.registry.register_all(instances);
        for _ in 0..polls {
            if futures::poll!(&mut registering).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(registering);
        let all = || stored(&store).len() == 1000 && process.registry.registrations().len() == 1000;
        eventually(SECOND, all, || format!("{} after {polls} polls", stored(&store).len())).await;
    }
}

#[tokio::test(start_paused = true)]
async fn of_many_the_first_are_on_their_way_while_the_next_are_looked_at() {
    let (registry, director) = Script::registry(Options::default());
    let instances = (0..1000).map(|id| instance("orders", &id.to_string())).collect();
    for outcome in registry.register_all(instances).await {
        outcome.unwrap();
    }
    let batches: Vec<_> = director.puts.lock().unwrap().iter().map(|(records, _)| *records).collect();
    assert_eq!(batches.iter().sum::<usize>(), 1000);
    assert!(batches[0] < 500 && batches.len() <= 5, "{batches:?}");
}

#[test]
fn a_register_that_meets_the_end_leaves_nothing_behind() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        for round in 0..1000_u64 {
            let store = MemoryStore::new();
            let registry = Arc::new(Process::start(&store).registry);
            registry.register(instance("orders", "0")).await.unwrap();
            let registering = tokio::spawn({
                let registry = registry.clone();
                async move { registry.register(instance("orders", "1")).await }
            });
            // Somewhere in the middle of it.
            (0..round % 100).for_each(|_| std::hint::spin_loop());
            registry.destroy().await.unwrap();
            drop(registering.await.unwrap());
            assert!(stored(&store).is_empty(), "in round {round}");
        }
    });
}

#[tokio::test(start_paused = true)]
async fn many_callers_at_once_are_served_in_batches() {
    let (registry, director) = Script::registry(Options::default());
    let registry = &registry;
    let calls = (0..1000).map(async |id| registry.register(instance("orders", &id.to_string())).await.unwrap());
    join_all(calls).await;
    let batches: Vec<_> = director.puts.lock().unwrap().iter().map(|(records, _)| *records).collect();
    assert_eq!(batches.iter().sum::<usize>(), 1000);
    assert!(batches.len() <= 3, "{batches:?}");
}

#[test]
fn what_a_caller_on_another_runtime_registers_is_put_on_the_own() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (home, abroad) = (runtime(), runtime());
    let (registry, director) = home.block_on(async { Script::registry(Options::default()) });
    home.block_on(registry.register(instance("orders", "1"))).unwrap();
    abroad.block_on(registry.register(instance("orders", "2"))).unwrap();
    abroad.block_on(registry.set_weight("orders", "1", 7)).unwrap();
    let puts = director.puts.lock().unwrap().clone();
    assert_eq!(puts, [(1, home.handle().id()); 3]);
    drop(abroad);
    home.block_on(registry.destroy()).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_register_that_fails_for_now_stays_pending_until_it_succeeds() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.link.cut();
    let error = process.registry.register(instance("orders", "1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(process.state("1"), "pending");
    sleep(TTL * 10).await;
    process.link.heal();
    process.until_state("1", "registered", Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_update_leaves_the_previous_content_in_force() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.fail(&key("orders", "1"), Some(denied()));
    let mut update = instance("orders", "1");
    update.weight = 7;
    assert_eq!(process.registry.register(update).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(process.registry.registrations()[0].instance.weight, 100);
    assert_eq!(process.state("1"), "registered");
    process.link.fail(&key("orders", "1"), None);
    store.expire_all();
    sleep(TTL).await;
    let found = process.registry.discover("orders").await.unwrap();
    assert_eq!(found.instances()[0].weight, 100);
}

#[tokio::test(start_paused = true)]
async fn two_living_owners_of_one_id_do_not_fight_for_ten_minutes() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    older.register("orders", "1").await;
    newer.register("orders", "1").await;
    until_conflict(&older.registry).await;
    let mut watcher = newer.watch("orders").await;
    watcher.next().await.unwrap();
    older.log.clear();
    newer.log.clear();
    quiet(&mut watcher, Duration::from_secs(600)).await;
    assert_eq!(older.log.count("put") + newer.log.count("put"), 0, "nobody writes");
    assert_eq!((older.state("1"), newer.state("1")), ("lost".into(), "registered".into()));
}

#[tokio::test(start_paused = true)]
async fn the_older_owner_is_restored_once_the_key_has_been_absent_for_a_ttl() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    older.register("orders", "1").await;
    newer.register("orders", "1").await;
    until_conflict(&older.registry).await;
    newer.registry.destroy().await.unwrap();
    let gone = Instant::now();
    older.until_state("1", "registered", Duration::from_secs(60) + TTL).await;
    assert!(gone.elapsed() >= TTL, "after {:?}", gone.elapsed());
    assert_eq!(older.log.count("claim"), 1, "restored, never claimed again");
}

#[tokio::test(start_paused = true)]
async fn a_newer_owner_that_only_lost_its_session_gets_its_key_back_before_the_older() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    older.register("orders", "1").await;
    newer.register("orders", "1").await;
    until_conflict(&older.registry).await;
    for _ in 0..5 {
        store.expire_all();
        sleep(TTL * 3).await;
        assert_eq!((older.state("1"), newer.state("1")), ("lost".into(), "registered".into()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_graceful_stop_leaves_the_successors_record() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    older.register("orders", "1").await;
    newer.register("orders", "1").await;
    assert!(!older.registry.unregister("orders", "1").await.unwrap(), "it is not ours any more");
    older.registry.destroy().await.unwrap();
    assert_eq!(stored(&store).len(), 1);
    assert_eq!(newer.state("1"), "registered");
}

/// Nor does what it claims, which was still under way when it was told to stop.
#[tokio::test(start_paused = true)]
async fn a_late_claim_of_who_was_told_to_stop_leaves_the_successors_record() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    let mut watcher = newer.watch("orders").await;
    older.link.hang();
    let hangs = older.registry.register(instance("orders", "1"));
    let stop = async {
        sleep(SECOND / 10).await;
        let succeed = async {
            sleep(SECOND / 2).await;
            newer.register("orders", "1").await;
            until(&mut watcher, SECOND, |seen| seen.len() == 1).await;
            older.link.heal();
        };
        tokio::join!(older.registry.destroy(), succeed).0
    };
    let (_, stopped) = tokio::join!(hangs, stop);
    stopped.unwrap();
    quiet(&mut watcher, TTL * 3).await;
    assert_eq!((stored(&store).len(), newer.state("1")), (1, "registered".into()));
}

#[tokio::test(start_paused = true)]
async fn a_thousand_keys_cost_one_renewal_a_beat() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..1000).await;
    sleep(TTL).await;
    process.log.clear();
    sleep(TTL * 20).await;
    let renewals = process.log.count("renew");
    assert!((59..=61).contains(&renewals), "{renewals} renewals in 60 beats");
    let checks = process.log.count("verify");
    assert!((9..=11).contains(&checks), "{checks} checks in 10 periods");
    assert_eq!(process.log.all(), renewals + checks, "and nothing else");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_never_waits_behind_puts() {
    let store = MemoryStore::new();
    let process = Process::with(&store, Options::default().request_timeout(Duration::from_secs(60)));
    process.register("orders", "1").await;
    process.link.delay(Duration::from_secs(4));
    // Every slot for writes is taken for the whole test.
    for id in 0..40 {
        let _ = process.registry.register(instance("orders", &format!("slow-{id}"))).now_or_never();
        sleep(SECOND).await;
    }
    assert_eq!(process.state("1"), "registered");
    assert!(process.log.count("renew") >= 6, "{}", process.log.count("renew"));
}

#[tokio::test(start_paused = true)]
async fn the_session_is_presumed_lost_by_our_own_clock_and_believed_again() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    let mut events = process.registry.events();
    process.register("orders", "1").await;
    process.link.hang();
    let hung = Instant::now();
    process.until_state("1", "lost", TTL + SECOND).await;
    assert!(hung.elapsed() >= TTL * 2 / 3, "{:?}", hung.elapsed());
    process.link.heal();
    process.until_state("1", "registered", TTL / 3 + SECOND).await;
    let mut seen = Vec::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        seen.push(event);
    }
    assert!(seen.iter().any(|event| matches!(event, Event::SessionLost { .. })), "{seen:?}");
    assert!(seen.iter().any(|event| matches!(event, Event::SessionRenewed)), "{seen:?}");
}

/// A renewal need not ask the store. The session lives a ttl from when that was heard all the same.
#[tokio::test(start_paused = true)]
async fn a_renewal_that_asked_nobody_lengthens_nothing() {
    let (registry, director) = Script::registry(Options::default().ttl(TTL));
    registry.register(instance("orders", "1")).await.unwrap();
    let is_lost = || matches!(registry.registrations()[0].state, RegistrationState::Lost { .. });
    sleep(3 * TTL).await;
    assert!(!is_lost());

    let heard = Instant::now();
    *director.silent_since.lock().unwrap() = Some(heard);
    while !is_lost() {
        assert!(heard.elapsed() < 2 * TTL);
        sleep(TTL / 100).await;
    }
    assert!((TTL..=TTL * 11 / 10).contains(&heard.elapsed()), "{:?}", heard.elapsed());
}

/// Our own clock presumes the loss, and then the store tells of it, too.
#[tokio::test(start_paused = true)]
async fn a_loss_is_told_once_whoever_finds_it() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    let mut events = process.registry.events();
    process.register("orders", "1").await;
    for _ in 0..3 {
        process.link.hang();
        process.until_state("1", "lost", TTL + SECOND).await;
        // The store has ended the session meanwhile.
        sleep(TTL).await;
        process.link.heal();
        process.until_state("1", "registered", TTL / 3 + SECOND).await;
    }
    let mut told = Vec::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        match event {
            Event::SessionLost { .. } => told.push("lost"),
            Event::SessionRenewed => told.push("renewed"),
            _ => {}
        }
    }
    assert_eq!(told, ["lost", "renewed"].repeat(3));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_is_asked_rarely() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..50).await;
    let mut watcher = process.watch("orders").await;
    watcher.next().await.unwrap();
    process.link.cut();
    let _ = process.registry.register(instance("orders", "pending")).await;
    process.log.clear();
    sleep(Duration::from_secs(600)).await;
    // Full jitter up to 5 s: an attempt every 2.5 s on average, for each of renewal, writes, one service and checks.
    assert!(process.log.all() < 4 * 600 / 2, "{} attempts in ten minutes", process.log.all());
    assert!(process.log.count("put") > 60, "and it never gives up: {}", process.log.count("put"));
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_is_asked_for_at_the_longest_delay() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.fail(&key("orders", "1"), Some(denied()));
    store.expire_all();
    process.until_state("1", "lost", TTL).await;
    process.log.clear();
    sleep(Duration::from_secs(600)).await;
    let puts = process.log.count("put");
    assert!((20..=41).contains(&puts), "{puts} in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn five_thousand_keys_come_back_spread_at_the_register_rate() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..5000).await;
    process.log.clear();
    store.wipe();
    eventually(TTL / 3 + Duration::from_secs(6), || stored(&store).len() == 5000, || stored(&store).len().to_string())
        .await;
    let most = process.log.most_keys_within("put", SECOND);
    assert!(most <= 1200, "{most} keys within a second at a rate of 1000");
}

#[tokio::test(start_paused = true)]
async fn two_hundred_processes_come_back_spread_over_a_second() {
    let store = MemoryStore::new();
    let processes: Vec<_> = (0..200).map(|_| Process::start(&store)).collect();
    for (id, process) in processes.iter().enumerate() {
        process.register("orders", &id.to_string()).await;
    }
    processes.iter().for_each(|process| process.link.cut());
    sleep(TTL * 2).await;
    processes.iter().for_each(|process| process.log.clear());
    let back = Instant::now();
    processes.iter().for_each(|process| process.link.heal());
    eventually(TTL / 3 + SECOND, || stored(&store).len() == 200, || stored(&store).len().to_string()).await;
    let mut tenths = [0; 10];
    for put in processes.iter().filter_map(|process| process.log.calls("put").first().cloned()) {
        tenths[((put.at - back).as_millis() as usize / 100).min(9)] += 1;
    }
    assert!(tenths.iter().all(|count| *count < 60), "a spike: {tenths:?}");
}

#[tokio::test(start_paused = true)]
async fn beats_of_many_processes_fall_all_over_the_period() {
    let store = MemoryStore::new();
    let processes: Vec<_> = (0..100).map(|_| Process::start(&store)).collect();
    let start = Instant::now();
    for (id, process) in processes.iter().enumerate() {
        process.register("orders", &id.to_string()).await;
    }
    sleep(TTL).await;
    let first =
        |process: &Process| process.log.calls("renew").iter().map(|call| call.at - start).find(|at| *at > SECOND / 5);
    let mut fifths = [0; 5];
    for at in processes.iter().filter_map(first) {
        fifths[(at.as_secs() as usize).min(4)] += 1;
    }
    assert!(fifths.iter().all(|count| *count < 50), "not spread: {fifths:?}");
}

#[tokio::test(start_paused = true)]
async fn a_link_that_flaps_for_ten_minutes_is_not_hammered_and_ends_registered() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..10).await;
    let mut watcher = process.watch("orders").await;
    watcher.next().await.unwrap();
    process.log.clear();
    for _ in 0..300 {
        process.link.cut();
        sleep(SECOND).await;
        process.link.heal();
        sleep(SECOND).await;
    }
    let calls = process.log.all();
    assert!(calls < 300 * 10, "{calls} calls in 300 flaps");
    process.until_state("00000", "registered", TTL).await;
    eventually(TTL, || stored(&store).len() == 10, || stored(&store).len().to_string()).await;
    eventually(TTL, || watcher.current().len() == 10, || format!("{:?}", watcher.current())).await;
}

#[tokio::test(start_paused = true)]
async fn heartbeat_says_what_it_renewed_and_what_it_registered_again() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "kept").await;
    process.register("orders", "deleted").await;
    store.delete(&key("orders", "deleted"));
    let heartbeat = process.registry.heartbeat().await.unwrap();
    assert_eq!(heartbeat.renewed, [key("orders", "kept")]);
    assert_eq!(heartbeat.reregistered, [key("orders", "deleted")]);
    assert_eq!(stored(&store).len(), 2);

    process.link.fail(&key("orders", "deleted"), Some(denied()));
    store.delete(&key("orders", "deleted"));
    let heartbeat = process.registry.heartbeat().await.unwrap();
    assert_eq!(heartbeat.failed.len(), 1);
    assert_eq!(heartbeat.failed[0].1.kind(), ErrorKind::PermissionDenied);

    process.link.cut();
    assert!(process.registry.heartbeat().await.unwrap_err().is_retryable());
}

#[tokio::test(start_paused = true)]
async fn a_deleted_key_is_restored_by_the_next_check() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    store.delete(&key("orders", "1"));
    eventually(Duration::from_secs(32), || stored(&store).len() == 1, || "not restored".into()).await;
}

#[tokio::test(start_paused = true)]
async fn destroy_joins_what_is_in_flight_and_leaves_nothing() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register_many("orders", 0..10).await;
    process.link.delay(SECOND);
    let late = process.registry.register(instance("orders", "late"));
    let destroy = async {
        sleep(SECOND / 2).await;
        process.registry.destroy().await
    };
    let (_, destroyed) = tokio::join!(late, destroy);
    destroyed.unwrap();
    assert_eq!((store.paths(), store.sessions()), (Vec::new(), 0));
    assert_eq!(process.registry.register(instance("orders", "1")).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(process.registry.discover("orders").await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(process.registry.heartbeat().await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(process.registry.services().await.unwrap_err().kind(), ErrorKind::Closed);
    process.registry.destroy().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn destroy_with_a_dead_store_ends_by_its_deadline() {
    for hang in [true, false] {
        let store = MemoryStore::new();
        let process = Process::start(&store);
        process.register("orders", "1").await;
        if hang {
            process.link.hang()
        } else {
            process.link.cut()
        }
        let began = Instant::now();
        assert!(process.registry.destroy().await.unwrap_err().is_retryable());
        assert!(began.elapsed() <= Duration::from_secs(6), "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn every_call_has_a_deadline_when_the_store_is_silent() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.hang();
    let (registry, _link) = dynamic(process);
    let bound = Duration::from_secs(12);
    timeout(bound, registry.register(instance("orders", "2"))).await.expect("register has a deadline").unwrap_err();
    timeout(bound, registry.set_weight("orders", "1", 1)).await.expect("set_weight has a deadline").unwrap_err();
    timeout(bound, registry.unregister("orders", "1")).await.expect("unregister has a deadline").unwrap_err();
    timeout(bound, registry.discover("orders")).await.expect("discover has a deadline").unwrap_err();
    timeout(bound, registry.watch("orders")).await.expect("watch has a deadline").unwrap();
    timeout(bound, registry.require(&[("orders", 2)], TTL / 3)).await.expect("require has a deadline").unwrap_err();
    timeout(bound, registry.heartbeat()).await.expect("heartbeat has a deadline").unwrap_err();
    timeout(bound, registry.services()).await.expect("services has a deadline").unwrap_err();
    timeout(bound, registry.subscribers("orders")).await.expect("subscribers has a deadline").unwrap_err();
    let set = Override::default().weight(0);
    timeout(bound, registry.set_override("orders", "1", set)).await.expect("set_override has a deadline").unwrap_err();
    timeout(bound, registry.overrides("orders")).await.expect("overrides has a deadline").unwrap_err();
    timeout(bound, registry.clear_override("orders", "1")).await.expect("clear_override has a deadline").unwrap_err();
    timeout(bound, registry.destroy()).await.expect("destroy has a deadline").unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_handle_ends_every_task_and_the_records_expire() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let mut watcher = process.watch("orders").await;
    watcher.next().await.unwrap();
    let log = process.log.clone();
    drop(process);
    eventually(SECOND, || store.watchers() == 0, || format!("{} watchers", store.watchers())).await;
    assert!(watcher.next().await.is_none(), "the watcher ended");
    log.clear();
    sleep(TTL + SECOND).await;
    assert_eq!((stored(&store).len(), log.all()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn updates_are_restored_and_not_what_was_before() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    let mut update = instance("orders", "1");
    update.metadata.insert("commit".into(), "2".into());
    process.registry.register(update).await.unwrap();
    store.wipe();
    sleep(TTL).await;
    let found = process.registry.discover("orders").await.unwrap();
    assert_eq!(found.instances()[0].metadata["commit"], "2");
}

#[tokio::test(start_paused = true)]
async fn an_announced_reader_is_listed_while_it_follows() {
    let store = MemoryStore::new();
    let options = Options::default().announce(Some("checkout".parse().unwrap())).idle_timeout(Duration::from_secs(10));
    let reader = Process::with(&store, options);
    let other = Process::start(&store);
    let watcher = reader.watch("orders").await;
    sleep(SECOND).await;
    let subscribers = other.registry.subscribers("orders").await.unwrap();
    assert_eq!(subscribers.len(), 1);
    assert!(subscribers[0].id.starts_with("checkout~"), "{:?}", subscribers[0].id);
    assert!(other.registry.discover("orders").await.unwrap().is_empty(), "a reader is no instance");
    assert!(reader.registry.registrations().is_empty());
    drop(watcher);
    sleep(Duration::from_secs(25)).await;
    assert!(other.registry.subscribers("orders").await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_update_that_is_refused_later_leaves_the_old_record_alive() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    sleep(SECOND).await;
    process.link.cut();
    let mut update = instance("orders", "1");
    update.weight = 7;
    assert!(process.registry.register(update).await.unwrap_err().is_retryable());
    process.link.fail(&key("orders", "1"), Some(denied()));
    process.link.heal();
    for _ in 0..60 {
        sleep(SECOND).await;
        assert_eq!(stored(&store).len(), 1, "the old record is kept alive");
    }
    process.link.fail(&key("orders", "1"), None);
    sleep(Duration::from_secs(31)).await;
    let found = process.registry.discover("orders").await.unwrap();
    assert_eq!(found.instances()[0].weight, 7, "and the update comes in the end");
}

#[tokio::test(start_paused = true)]
async fn a_session_without_keys_does_not_die_under_the_next_registration() {
    for offset in 0..20 {
        let store = MemoryStore::new();
        let process = Process::start(&store);
        process.register("orders", "a").await;
        process.registry.unregister("orders", "a").await.unwrap();
        sleep(Duration::from_millis(13_000 + offset * 99)).await;
        process.register("orders", "b").await;
        for _ in 0..100 {
            sleep(SECOND / 10).await;
            assert_eq!(stored(&store).len(), 1, "registered {offset} and gone again");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_removal_is_not_forgotten_when_the_key_is_registered_and_withdrawn_again() {
    for too_large in [false, true] {
        let store = MemoryStore::new();
        let process = Process::start(&store);
        process.register_many("orders", 0..2).await;
        process.link.cut();
        process.registry.unregister("orders", "00001").await.unwrap_err();
        if too_large {
            process.link.heal();
            let mut large = instance("orders", "00001");
            large.metadata.insert("x".into(), "y".repeat(70_000));
            let refused = process.registry.register(large).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        } else {
            assert!(process.registry.register(instance("orders", "00001")).now_or_never().is_none());
            assert!(process.registry.unregister("orders", "00001").await.unwrap_err().is_retryable());
            process.link.heal();
        }
        eventually(Duration::from_secs(6), || stored(&store).len() == 1, || format!("{:?}", stored(&store))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_heartbeat_of_the_older_owner_takes_nothing_from_the_newer() {
    let store = MemoryStore::new();
    let (older, newer) = (Process::start(&store), Process::start(&store));
    older.register("orders", "1").await;
    newer.register("orders", "1").await;
    until_conflict(&older.registry).await;
    store.expire_all();
    let heartbeat = older.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.reregistered.len(), heartbeat.failed.len()), (0, 1));
    assert_eq!(heartbeat.failed[0].1.kind(), ErrorKind::Conflict);
    sleep(TTL * 3).await;
    assert_eq!((older.state("1"), newer.state("1")), ("lost".into(), "registered".into()));
}

#[tokio::test(start_paused = true)]
async fn a_grace_for_ever_ends_with_the_second_signal() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    registry_core::shutdown::drain(&process.registry, Duration::MAX, sleep(SECOND)).await.unwrap();
    assert!(store.paths().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_renewed_session_is_told_only_when_the_store_answered() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.cut();
    sleep(TTL * 2).await;
    let mut events = process.registry.events();
    let _ = process.registry.unregister("orders", "1").await;
    sleep(TTL).await;
    while let Some(Some(event)) = events.next().now_or_never() {
        assert!(!matches!(event, Event::SessionRenewed), "the store is down");
    }
}

#[tokio::test(start_paused = true)]
async fn a_register_during_a_removal_that_is_refused_goes_out_at_once() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.delay(SECOND);
    process.link.deny(Some(denied()));
    let unregister = process.registry.unregister("orders", "1");
    let register = async {
        sleep(SECOND / 2).await;
        let register = process.registry.register(instance("orders", "1"));
        let allow = async {
            sleep(SECOND).await;
            process.link.deny(None);
        };
        tokio::join!(register, allow).0
    };
    let (unregistered, registered) = tokio::join!(unregister, register);
    assert_eq!(unregistered.unwrap_err().kind(), ErrorKind::PermissionDenied);
    registered.unwrap();
    assert_eq!(stored(&store).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn destroy_leaves_time_to_say_goodbye_when_a_write_hangs() {
    let store = MemoryStore::new();
    let process = Process::start(&store);
    process.register("orders", "1").await;
    process.link.hang();
    let hangs = process.registry.register(instance("orders", "2"));
    let destroy = async {
        sleep(SECOND / 10).await;
        let heal = async {
            sleep(SECOND * 2).await;
            process.link.heal();
        };
        tokio::join!(process.registry.destroy(), heal).0
    };
    let (_, destroyed) = tokio::join!(hangs, destroy);
    destroyed.unwrap();
    assert!(store.paths().is_empty(), "{:?}", store.paths());
}

pub(crate) async fn until_conflict(registry: &dyn Registry) {
    let conflict = || match &registry.registrations()[0].state {
        RegistrationState::Lost { cause, .. } => cause.kind() == ErrorKind::Conflict,
        _ => false,
    };
    let seen = || format!("{:?}", registry.registrations()[0].state);
    eventually(Duration::from_secs(61), conflict, seen).await;
}

fn part(whole: Duration) -> Duration {
    whole.mul_f64(rand::random())
}
