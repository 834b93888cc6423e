//! Ten thousand instances of one service.

use std::{collections::BTreeMap, time::Duration};

use registry_core::{Instance, Snapshot};
use registry_tests::{
    conformance::support::{Observer, PATIENCE, in_time, instance, instances, is_live, register_all, weighing},
    servers::Redis,
};
use tokio::time::Instant;

use crate::{SECOND, Store, client, soon, unchecked};

const HALF: usize = 5000;
/// No script and no command takes longer at the server, in µs.
const LONGEST: u64 = 5_000;
const ROUNDS: usize = 5;

/// Commands of one kind: name, script and about how many words. Each of them does the same work.
type Kind = (String, usize);

/// How long each command took, those of scripts too, in µs. Without the calls that bring a script's text: each is made
/// once, and so says nothing of what takes long every time.
async fn durations(store: &Store) -> BTreeMap<Kind, Vec<u64>> {
    let entries: Vec<(u64, u64, u64, Vec<String>, String, String)> = store.order("SLOWLOG GET 20000").await;
    let mut kinds: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (_, _, took, words, ..) in entries.into_iter().filter(|entry| entry.3[0] != "EVAL") {
        // `... (1234 more arguments)`
        let more = words.last().and_then(|word| word.strip_prefix("... (")?.split(' ').next()?.parse::<usize>().ok());
        let script = if words[0].starts_with("EVAL") { &words[1][..8] } else { "" };
        let kind = (format!("{} {script}", words[0]), (words.len() + more.unwrap_or(0)) / 100);
        kinds.entry(kind).or_default().push(took);
    }
    kinds
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_instances_are_registered_read_and_kept_and_no_command_is_slow() {
    let store = Store::start(Redis::new().line("slowlog-log-slower-than 0").line("slowlog-max-len 20000")).await;
    let ttl = 10 * SECOND;
    let patient = unchecked().ttl(ttl).request_timeout(10 * SECOND);
    let readers = [(); 2].map(|()| client(store.config(patient.clone())));
    let empty = Observer::of(&readers[0], "orders").await;
    let providers = [(); 2].map(|()| client(store.config(patient.clone())));
    let of = |prefix: &str| instances("orders", prefix, HALF);
    let start = Instant::now();
    tokio::join!(register_all(&providers[0], of("a")), register_all(&providers[1], of("b")));
    println!("10 000 registered in {:?}", start.elapsed());
    empty.until("all of them", PATIENCE, |seen| seen.len() == 2 * HALF).await;
    println!("followed after {:?}", start.elapsed());
    let start = Instant::now();
    let listed = in_time("discover", 5 * SECOND, readers[1].registry.discover("orders")).await.unwrap();
    println!("10 000 listed in {:?}", start.elapsed());
    assert!(listed.len() == 2 * HALF && is_live(&listed));
    let late = Observer::of(&readers[1], "orders").await;

    for round in 0..ROUNDS {
        everything(&store, &providers, &patient, &of, round).await;
    }
    for ((what, words), mut took) in durations(&store).await {
        took.sort_unstable();
        let (middle, longest) = (took[(took.len() - 1) / 2], took[took.len() - 1]);
        println!("{what} of {words}00 words, {} times: {middle} µs in the middle, {longest} µs at most", took.len());
        // A busy machine stops the server in the middle of some: what takes long by itself does so every time.
        assert!(middle < LONGEST, "{what}: {took:?}");
    }
    let changed = |seen: &Snapshot| seen.get("a-000").is_some_and(|one| one.weight as usize == ROUNDS);
    for observer in [&empty, &late] {
        observer.until("the last changes", soon(), changed).await;
        observer.until("all of them", PATIENCE, |seen| seen.len() == 2 * HALF && is_live(seen)).await;
    }
    // The late one saw nobody come or go.
    let changes = late.changes();
    assert!(changes.iter().all(|change| change.starts_with('~')), "{:?}", &changes[..changes.len().min(20)]);
}

/// Heartbeats, changes and removals in large and in small, and a reader that reads all.
async fn everything(
    store: &Store,
    providers: &[registry_tests::harness::Client; 2],
    options: &registry_core::Options,
    of: &impl Fn(&str) -> Vec<Instance>,
    round: usize,
) {
    for provider in providers {
        let heartbeat = in_time("heartbeat", 5 * SECOND, provider.registry.heartbeat()).await.unwrap();
        assert_eq!((heartbeat.renewed.len(), heartbeat.reregistered.len(), heartbeat.failed.len()), (HALF, 0, 0));
    }
    let weight = u32::try_from(round).unwrap() + 1;
    let changed = of("a").into_iter().take(600).map(|one| weighing(one, weight)).collect();
    register_all(&providers[0], changed).await;
    let start = Instant::now();
    let fresh = client(store.config(options.clone()));
    fresh.registry.register(instance("payments", "1")).await.unwrap();
    let listed = in_time("discover", Duration::from_secs(5), fresh.registry.discover("orders")).await.unwrap();
    println!("10 000 listed in {:?}", start.elapsed());
    assert_eq!(listed.len(), 2 * HALF);
}
