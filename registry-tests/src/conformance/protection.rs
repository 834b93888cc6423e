//! Who leaves is believed at once; who vanishes in numbers is held for a bounded time.

use std::time::Duration;

use registry_core::Event;
use tokio::time::Instant;

use super::support::*;
use crate::harness::{Client, Harness};

/// How many of 25 instances go in these cases.
const GO: usize = 20;
const STAY: usize = 5;

/// A process with many instances and one with few, and a reader of both.
async fn many_and_few<H: Harness>(store: &H) -> (Client, Client, Client) {
    let (many, few) = (client(store).await, client(store).await);
    register_all(&many, instances("orders", "go", GO)).await;
    register_all(&few, instances("orders", "stay", STAY)).await;
    (many, few, client(store).await)
}

/// A process that leaves in good order is believed at once, however much it takes with it.
pub async fn many_that_leave_are_believed_at_once<H: Harness>() {
    let store = H::start().await;
    let (many, _few, reader) = many_and_few(&store).await;
    let observer = Observer::of(&reader, "orders").await;
    assert_eq!(observer.now().len(), GO + STAY);
    many.registry.destroy().await.expect("destroy");
    observer.until("the others", soon::<H>(), |seen| seen.len() == STAY).await;
    observer.assert_always("nobody is held", |seen| !is_protected(seen));
}

/// The last instance, too, is believed when it leaves.
pub async fn the_last_instance_that_leaves_is_believed_at_once<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 3)).await;
    let observer = Observer::of(&reader, "orders").await;
    for index in 0..3 {
        provider.registry.unregister("orders", &format!("i-{index:03}")).await.expect("unregister");
    }
    observer.until_ids(soon::<H>(), &[]).await;
    observer.assert_always("nobody is held", |seen| !is_protected(seen));
    assert!(is_live(&observer.now()));
}

/// Those who left while a reader was cut off are believed once it is back, where the store remembers them; elsewhere
/// they are held for a bounded time.
pub async fn many_that_leave_during_a_cut_are_believed_after_it<H: Harness>() {
    let store = H::start().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    register_all(&provider, instances("orders", "i", 4)).await;
    let observer = Observer::of(&reader, "orders").await;
    reader.link.cut();
    observer.until("the outage", PATIENCE, is_stale).await;
    for index in 0..4 {
        provider.registry.unregister("orders", &format!("i-{index:03}")).await.expect("unregister");
    }
    reader.link.heal();
    let protection = options::<H>().protection();
    let held = if H::remembers_departures() { Duration::ZERO } else { protection };
    observer.until("the end of the outage", PATIENCE, |seen| !is_stale(seen)).await;
    observer.until("nobody is left", held + soon::<H>(), |seen| seen.is_empty() && is_live(seen)).await;
    observer.assert_always("nobody is held", |seen| !is_protected(seen) || !H::remembers_departures());
}

/// Many that vanish at once without a word are held, all of them, until the bound is over, and then believed.
pub async fn many_that_vanish_are_held_until_the_bound_is_over<H: Harness>() {
    let store = H::start().await;
    let (many, _few, reader) = many_and_few(&store).await;
    let observer = Observer::of(&reader, "orders").await;
    let events = Events::of(&reader);
    many.crash();
    observer.until("they are held", gone::<H>(), is_protected).await;
    let since = Instant::now();
    let bound = options::<H>().protection();
    observer.until("they are believed", bound + soon::<H>(), |seen| seen.len() == STAY).await;
    assert!(since.elapsed() + H::slack() >= bound, "held for {:?} only", since.elapsed());
    observer.until("nobody is held", soon::<H>(), is_live).await;
    observer.assert_always("all or those who stay", |seen| seen.len() == GO + STAY || seen.len() == STAY);
    events.until("protected", soon::<H>(), |event| matches!(event, Event::Protected { held, .. } if *held == GO)).await;
}

/// Many that vanish and come back in time were never away.
pub async fn many_that_come_back_in_time_were_never_away<H: Harness>() {
    let store = H::start().await;
    let (many, _few, reader) = many_and_few(&store).await;
    let observer = Observer::of(&reader, "orders").await;
    many.crash();
    observer.until("they are held", gone::<H>(), is_protected).await;
    let again = client(&store).await;
    register_all(&again, instances("orders", "go", GO)).await;
    observer.until("nobody is held", soon::<H>(), is_live).await;
    let short = |_: &()| observer.now().len() < GO + STAY;
    never_within("one is missing", options::<H>().protection(), async || (), short).await;
    observer.assert_always("all of them", |seen| seen.len() == GO + STAY);
}

/// What a wiped store has lost is held, a single instance too, also for a reader that was away; then it is believed.
pub async fn what_a_wiped_store_lost_is_held_and_then_believed<H: Harness>() {
    let store = H::with_own_server().await;
    let (provider, present, away) = (client(&store).await, client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "1")).await.expect("register");
    let observers = [Observer::of(&present, "orders").await, Observer::of(&away, "orders").await];
    away.link.cut();
    observers[1].until("the outage", PATIENCE, is_stale).await;
    provider.crash();
    store.wipe().await;
    away.link.heal();
    let bound = options::<H>().protection();
    for observer in &observers {
        observer.until("it is held", PATIENCE, |seen| is_protected(seen) || seen.is_empty()).await;
        assert_eq!(ids(&observer.now()), ["1"]);
    }
    for observer in &observers {
        observer.until("it is believed", bound + soon::<H>(), |seen| seen.is_empty() && is_live(seen)).await;
    }
}

/// Few that vanish are believed at once: protection is against mass losses only.
pub async fn few_that_vanish_are_believed<H: Harness>() {
    let store = H::start().await;
    let (_many, few, reader) = many_and_few(&store).await;
    let observer = Observer::of(&reader, "orders").await;
    few.crash();
    observer.until("the others", gone::<H>(), |seen| seen.len() == GO).await;
    observer.assert_always("nobody is held", |seen| !is_protected(seen));
}

/// A session that ends with hundreds of instances is one change for readers, not hundreds.
pub async fn a_session_that_ends_is_one_change<H: Harness>() {
    let store = H::start().await;
    let (many, one) = (client(&store).await, client(&store).await);
    let reader = store.connect(options::<H>().protect_for(Duration::ZERO)).await;
    register_all(&many, instances("orders", "go", 300)).await;
    one.registry.register(instance("orders", "stays")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    let before = observer.until("all of them", soon::<H>(), |seen| seen.len() == 301).await;
    // So that it does not come back at once.
    many.link.cut();
    store.end_session(&key("orders", "go-000")).await;
    let after = observer.until("the one that stays", soon::<H>(), |seen| seen.len() == 1).await;
    assert_eq!(after.revision(), before.revision() + 1, "{observer:?}");
    assert_eq!(after.changes_since(&before).len(), 300);
}
