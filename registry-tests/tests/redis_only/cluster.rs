//! Slots: who serves them, who does next, and who does not.

use std::sync::atomic::{AtomicU32, Ordering};

use redis::aio::MultiplexedConnection;
use registry_core::{ErrorKind, Snapshot};
use registry_redis::{RedisConfig, RedisTopology};
use registry_tests::{
    conformance::support::{
        Observer, PATIENCE, all_registered, client as client_of, eventually, instance, instances, is_live, is_stale,
        register_all, states, weighing,
    },
    harness::{Harness, RedisClusterHarness as Nodes},
    servers::{Cluster, Redis, Server},
};
use tokio::time::{Instant, sleep};

use crate::{
    ELECTED, RECORDS, SECOND, bare, client, command, config, errors::chain, options, register_within, soon, unchecked,
};

async fn nodes() -> Cluster {
    let servers = Redis::cluster();
    let size = servers.size();
    Cluster::start(servers, size).await.unwrap()
}

fn config_of(nodes: &Cluster, options: registry_core::Options) -> RedisConfig {
    config(nodes.members().iter().map(Server::addr), options).topology(RedisTopology::Cluster)
}

async fn connections(nodes: &Cluster) -> Vec<MultiplexedConnection> {
    let mut bares = Vec::new();
    for node in nodes.members() {
        bares.push(bare(&format!("redis://{}", node.addr())).await);
    }
    bares
}

/// Which of the primaries serves `orders`, which is the next, and the slot.
async fn places(bares: &mut [MultiplexedConnection]) -> (usize, usize, u16) {
    for (index, bare) in bares[..3].iter_mut().enumerate() {
        if command(&format!("EXISTS {RECORDS}")).query_async::<u64>(bare).await.is_ok() {
            let slot = order(bare, &format!("CLUSTER KEYSLOT {RECORDS}")).await;
            return (index, (index + 1) % 3, slot);
        }
    }
    panic!("nobody serves {RECORDS}");
}

async fn order<T: redis::FromRedisValue>(bare: &mut MultiplexedConnection, words: &str) -> T {
    command(words).query_async(bare).await.unwrap_or_else(|error| panic!("{words}: {error}"))
}

/// Moves a slot as operators do: key by key, while it is in use.
async fn migrate(nodes: &Cluster, bares: &mut [MultiplexedConnection], from: usize, to: usize, slot: u16) {
    let source: String = order(&mut bares[from], "CLUSTER MYID").await;
    let target: String = order(&mut bares[to], "CLUSTER MYID").await;
    order::<()>(&mut bares[to], &format!("CLUSTER SETSLOT {slot} IMPORTING {source}")).await;
    order::<()>(&mut bares[from], &format!("CLUSTER SETSLOT {slot} MIGRATING {target}")).await;
    let port = nodes.members()[to].addr().port();
    loop {
        let keys: Vec<String> = order(&mut bares[from], &format!("CLUSTER GETKEYSINSLOT {slot} 1")).await;
        let [key] = &keys[..] else { break };
        order::<String>(&mut bares[from], &format!("MIGRATE 127.0.0.1 {port} {key} 0 5000")).await;
        // Long enough that requests meet a slot of which some keys are here and some are there.
        sleep(SECOND / 10).await;
    }
    for index in [to, from, 3 - to - from] {
        order::<()>(&mut bares[index], &format!("CLUSTER SETSLOT {slot} NODE {target}")).await;
    }
}

fn weighs(weight: u32) -> impl Fn(&Snapshot) -> bool {
    move |seen| seen.get("i-000").is_some_and(|one| one.weight == weight)
}

/// There and back, under a writer that never rests. Nobody polls: messages come from where the slot is now.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_moves_under_its_writer_loses_nothing_and_messages_follow_it() {
    let nodes = nodes().await;
    let mut bares = connections(&nodes).await;
    let patient = unchecked().ttl(30 * SECOND);
    let provider = client(config_of(&nodes, patient.clone()));
    let reader = client(config_of(&nodes, patient).poll(60 * SECOND));
    register_all(&provider, instances("orders", "i", 50)).await;
    let observer = Observer::of(&reader, "orders").await;
    let (here, there, slot) = places(&mut bares).await;
    let weight = AtomicU32::new(1000);
    for (from, to) in [(here, there), (there, here)] {
        let write = async {
            loop {
                let next = weight.fetch_add(1, Ordering::Relaxed) + 1;
                let changed = weighing(instance("orders", "i-000"), next);
                if let Err(error) = provider.registry.register(changed).await {
                    assert!(error.is_retryable(), "{error:?}");
                }
                sleep(SECOND / 50).await;
            }
        };
        let before = weight.load(Ordering::Relaxed);
        tokio::select! {
            () = write => {}
            () = migrate(&nodes, &mut bares, from, to, slot) => {}
        }
        println!("{} writes while the slot moved", weight.load(Ordering::Relaxed) - before);
        assert_eq!(order::<u64>(&mut bares[to], &format!("EXISTS {RECORDS}")).await, 1);
        let next = weight.fetch_add(1, Ordering::Relaxed) + 1;
        let start = Instant::now();
        register_within(PATIENCE, &provider, weighing(instance("orders", "i-000"), next)).await;
        observer.until("the change", PATIENCE, |seen| weighs(next)(seen) && is_live(seen)).await;
        println!("seen after {:?}", start.elapsed());
        // And from now on at once.
        let next = weight.fetch_add(1, Ordering::Relaxed) + 1;
        provider.registry.register(weighing(instance("orders", "i-000"), next)).await.unwrap();
        observer.until("the next change, by a message", 2 * SECOND, weighs(next)).await;
    }
    let changes = observer.changes();
    assert!(changes.iter().all(|change| change == "~i-000"), "{changes:?}");
    eventually("all are registered", PATIENCE, async || states(&provider), all_registered).await;
    let heartbeat = provider.registry.heartbeat().await.unwrap();
    assert_eq!((heartbeat.renewed.len(), heartbeat.failed.len()), (50, 0));
}

/// A slot that is moved between two requests: the old node says where it is, and is not asked for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_has_moved_is_found_by_the_next_request() {
    let nodes = nodes().await;
    let mut bares = connections(&nodes).await;
    let one = client(config_of(&nodes, unchecked().ttl(30 * SECOND)).poll(60 * SECOND));
    register_all(&one, instances("orders", "i", 5)).await;
    let (from, to, slot) = places(&mut bares).await;
    migrate(&nodes, &mut bares, from, to, slot).await;
    let start = Instant::now();
    one.registry.register(instance("orders", "next")).await.unwrap();
    println!("written after {:?}", start.elapsed());
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    assert_eq!(one.registry.discover("orders").await.unwrap().len(), 6);
}

/// The primary of a slot dies, and its replica takes over: nothing is lost that was registered, or it is put again.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_dies_is_replaced_and_other_slots_go_on() {
    let store = Nodes::with_own_server().await;
    let (provider, reader) = (client_of(&store).await, client_of(&store).await);
    let services: Vec<_> = (0..8).map(|index| format!("service-{index}")).collect();
    let mut observers = Vec::new();
    for service in &services {
        register_all(&provider, instances(service, "i", 20)).await;
        observers.push(Observer::of(&reader, service).await);
    }
    let dead = store.primary(&services[0]).await;
    dead.kill().await.unwrap();
    for (service, observer) in services.iter().zip(&observers) {
        register_within(ELECTED, &provider, instance(service, "new")).await;
        observer.until("all", ELECTED, |seen| seen.len() == 21 && is_live(seen)).await;
    }
    dead.restart().await.unwrap();
    eventually("all are registered", ELECTED, async || states(&provider), all_registered).await;
    for observer in &observers {
        observer.until("all", ELECTED, |seen| seen.len() == 21 && is_live(seen)).await;
        assert_eq!(observer.changes(), ["+new"]);
    }
}

/// A slot without any node: the cluster says that it is down, and nobody is taken out for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_nobody_serves_is_said_so_and_waited_for() {
    let store = Nodes::with_own_server().await;
    let (provider, reader) = (client_of(&store).await, client_of(&store).await);
    register_all(&provider, instances("orders", "i", 5)).await;
    let observer = Observer::of(&reader, "orders").await;
    let primary = store.primary("orders").await.addr();
    let index = store.members().iter().position(|member| member.addr() == primary).unwrap();
    let pair = [&store.members()[index], &store.members()[(index + 3) % 6]];
    for member in pair {
        member.kill().await.unwrap();
    }
    observer.until("the outage", PATIENCE, is_stale).await;
    let fresh = client_of(&store).await;
    let down = async || {
        let error = fresh.registry.register(instance("orders", "late")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        chain(&error)
    };
    println!("{}", down().await);
    // Those that are left need a moment to agree; then all of them refuse, for any service.
    let elsewhere = async || {
        let errors = (0..8).map(|index| {
            let registry = &fresh.registry;
            async move { registry.register(instance(&format!("other-{index}"), "1")).await.err() }
        });
        let errors = futures::future::join_all(errors).await;
        errors.into_iter().flatten().map(|error| chain(&error)).collect::<Vec<_>>().join("\n")
    };
    let said = |errors: &String| errors.contains("CLUSTERDOWN") && errors.contains("does not serve");
    eventually("the cluster is down", ELECTED, elsewhere, said).await;
    for member in pair {
        member.relaunch().await.unwrap();
    }
    eventually("all are registered", ELECTED, async || states(&fresh), all_registered).await;
    eventually("all are registered", ELECTED, async || states(&provider), all_registered).await;
    observer.until("the end of the outage", ELECTED, |seen| seen.len() == 6 && is_live(seen)).await;
    assert_eq!(observer.changes(), ["+late"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_are_enough_on_a_cluster() {
    let nodes = nodes().await;
    let mut bares = connections(&nodes).await;
    let grant = format!("ACL SETUSER app reset on >pw {}", crate::errors::least_on_a_cluster());
    for bare in &mut bares {
        order::<()>(bare, &grant).await;
    }
    let app = || client(config_of(&nodes, options()).user("app", "pw"));
    let (provider, reader) = (app(), app());
    let observer = Observer::of(&reader, "orders").await;
    register_all(&provider, vec![instance("orders", "1"), instance("payments", "1")]).await;
    observer.until_ids(soon(), &["1"]).await;
    let (from, to, slot) = places(&mut bares).await;
    migrate(&nodes, &mut bares, from, to, slot).await;
    register_within(PATIENCE, &provider, instance("orders", "2")).await;
    observer.until("both", PATIENCE, |seen| seen.len() == 2 && is_live(seen)).await;
    assert_eq!(reader.registry.services().await.unwrap().len(), 2);
    provider.registry.destroy().await.unwrap();
    observer.until_ids(soon(), &[]).await;
}
