//! More than fits into one message.

use registry_core::{Instance, Snapshot};
use registry_tests::{
    conformance::support::{Observer, PATIENCE, in_time, instance, instances, is_live, register_all, weighing},
    servers::Etcd,
};
use tokio::time::Instant;

use crate::{SECOND, Store, client, soon, unchecked};

fn ballasted(mut instance: Instance, bytes: usize) -> Instance {
    instance.metadata.insert("ballast".to_owned(), "x".repeat(bytes));
    instance
}

/// Messages to a client of etcd have 4 MiB at most, unless it says otherwise, and pages of a list end.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_instances_and_more_than_four_mebibytes_are_listed_and_followed() {
    let store = Store::start(Etcd::new()).await;
    let options = unchecked().ttl(30 * SECOND).request_timeout(15 * SECOND);
    let reader = store.behind_a_proxy(options.clone()).await;
    let empty = Observer::of(&reader, "orders").await;
    let providers = [client(store.config(options.clone())), client(store.config(options.clone()))];
    let of = |prefix: &str| -> Vec<_> {
        instances("orders", prefix, 5000).into_iter().map(|one| ballasted(one, 600)).collect()
    };
    let start = Instant::now();
    tokio::join!(register_all(&providers[0], of("a")), register_all(&providers[1], of("b")));
    println!("10 000 registered in {:?}", start.elapsed());
    empty.until("all of them, one by one", PATIENCE, |seen| seen.len() == 10_000).await;
    println!("followed after {:?}", start.elapsed());

    let late = client(store.config(options));
    let start = Instant::now();
    let listed = in_time("discover", 5 * SECOND, late.registry.discover("orders")).await.unwrap();
    println!("10 000 listed in {:?}", start.elapsed());
    assert!(listed.len() == 10_000 && is_live(&listed));
    let bytes: usize = listed.instances().iter().map(|one| one.metadata["ballast"].len()).sum();
    assert!(bytes > 4 << 20);
    let observer = Observer::of(&late, "orders").await;
    providers[0].registry.register(instance("orders", "c")).await.unwrap();
    assert!(providers[1].registry.unregister("orders", "b-000").await.unwrap());
    let changed = |seen: &Snapshot| seen.get("c").is_some() && seen.get("b-000").is_none();
    observer.until("the changes", soon(), changed).await;
    assert_eq!(observer.changes().len(), 2, "{:?}", observer.changes());

    // All of them change while the reader is away: it is told in one piece, and takes it.
    empty.until("the changes", soon(), changed).await;
    reader.link.cut();
    let heavier = of("a").into_iter().map(|one| weighing(one, 7)).collect();
    register_all(&providers[0], heavier).await;
    let heavier = of("b").into_iter().skip(1).map(|one| weighing(one, 7)).collect();
    register_all(&providers[1], heavier).await;
    reader.link.heal();
    let start = Instant::now();
    let all = |seen: &Snapshot| {
        let heavier = seen.instances().iter().filter(|one| one.weight == 7).count();
        (heavier, seen.len()) == (9_999, 10_000) && is_live(seen)
    };
    empty.until("all the changes", PATIENCE, all).await;
    println!("10 000 changes caught up in {:?}", start.elapsed());
}

/// What was missed comes in one message, which may be larger than any that we take: then the set is read anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_missed_more_than_fits_any_message_reads_anew() {
    let store = Store::start(Etcd::new()).await;
    let options = unchecked().ttl(30 * SECOND).request_timeout(15 * SECOND);
    let reader = store.behind_a_proxy(options.clone()).await;
    let provider = client(store.config(options));
    provider.registry.register(instance("orders", "first")).await.unwrap();
    let (observer, payments) = (Observer::of(&reader, "orders").await, Observer::of(&reader, "payments").await);
    observer.until_ids(soon(), &["first"]).await;
    reader.link.cut();
    provider.registry.register(instance("payments", "second")).await.unwrap();
    let large = instances("orders", "i", 1100).into_iter().map(|one| ballasted(one, 65_000));
    let start = Instant::now();
    register_all(&provider, large.collect()).await;
    println!("70 MB registered in {:?}", start.elapsed());
    reader.link.heal();
    let start = Instant::now();
    observer.until("all of them", PATIENCE, |seen| seen.len() == 1101 && is_live(seen)).await;
    println!("70 MB caught up in {:?}", start.elapsed());
    assert!(provider.registry.unregister("orders", "i-000").await.unwrap());
    observer.until("it follows", soon(), |seen| seen.get("i-000").is_none()).await;
    payments.until_ids(PATIENCE, &["second"]).await;
    observer.assert_always("the first", |seen| seen.get("first").is_some());
}
