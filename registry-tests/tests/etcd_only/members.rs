//! Three members, one of which fails: no call does.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::future::try_join_all;
use registry_core::{Event, Options, Snapshot};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, instance, instances, register_all, states,
    },
    harness::Client,
    proxy::{FaultProxy, Mode},
    servers::{Cluster, Etcd, Server},
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{SECOND, bare, client, config, soon};

/// A call or a view that is later than this while a member fails is too late: an attempt of 600 ms, a probe every 500,
/// and the race for another member.
const FAIL_OVER: Duration = Duration::from_secs(2);
/// What is added where the leader fails: its successor is elected within 250 to 500 ms, and a busy machine needs longer.
const ELECTION: Duration = Duration::from_secs(2);
/// How long a fault lasts.
const FAULT: Duration = Duration::from_secs(4);

fn options() -> Options {
    Options::default().ttl(15 * SECOND).reconcile(SECOND)
}

/// What happened to a registry so far.
#[derive(Clone, Debug, Default)]
struct Log {
    /// Instances that were registered, and seen by the reader.
    rounds: usize,
    slowest_register: Duration,
    slowest_heartbeat: Duration,
    /// From the answer of a register until the reader has seen it.
    slowest_view: Duration,
    failures: Vec<String>,
}

/// A provider that registers one instance after the other and beats all the time, and a reader that follows.
struct Ride {
    service: &'static str,
    provider: Arc<Client>,
    events: Events,
    observer: Arc<Observer>,
    /// Reads to the end: also what was registered and not yet seen when the tasks were ended.
    _reader: Client,
    log: watch::Sender<Log>,
    tasks: JoinSet<()>,
}

impl Ride {
    /// Begins with the first of the members as the current one.
    async fn start(service: &'static str, members: &[String]) -> Self {
        let provider = Arc::new(client(config(members, options())));
        let reader = client(config(members, options()));
        let events = Events::of(&provider);
        register_all(&provider, instances(service, "i", 20)).await;
        let observer = Arc::new(Observer::of(&reader, service).await);
        let log = watch::Sender::new(Log::default());
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let (provider, observer, log) = (provider.clone(), observer.clone(), log.clone());
            async move {
                loop {
                    let id = format!("w-{}", log.borrow().rounds);
                    let start = Instant::now();
                    let outcome = provider.registry.register(instance(service, &id)).await;
                    let registered = Instant::now();
                    log.send_modify(|log| {
                        log.slowest_register = log.slowest_register.max(registered - start);
                        log.failures.extend(outcome.err().map(|error| format!("register: {error:?}")));
                    });
                    observer.until(&id, PATIENCE, |seen| seen.get(&id).is_some()).await;
                    log.send_modify(|log| {
                        log.slowest_view = log.slowest_view.max(registered.elapsed());
                        log.rounds += 1;
                    });
                    sleep(Duration::from_millis(10)).await;
                }
            }
        });
        tasks.spawn({
            let (provider, log) = (provider.clone(), log.clone());
            async move {
                loop {
                    let start = Instant::now();
                    let failure = match provider.registry.heartbeat().await {
                        Ok(heartbeat) => heartbeat.failed.first().map(|failed| format!("heartbeat: {failed:?}")),
                        Err(error) => Some(format!("heartbeat: {error:?}")),
                    };
                    log.send_modify(|log| {
                        log.slowest_heartbeat = log.slowest_heartbeat.max(start.elapsed());
                        log.failures.extend(failure);
                    });
                    sleep(Duration::from_millis(100)).await;
                }
            }
        });
        let ride = Self { service, provider, events, observer, _reader: reader, log, tasks };
        ride.rounds(5).await;
        ride
    }

    /// Waits until so many more instances were registered and seen.
    async fn rounds(&self, more: usize) {
        let goal = self.log.borrow().rounds + more;
        let mut log = self.log.subscribe();
        let done = tokio::time::timeout(PATIENCE, log.wait_for(|log| log.rounds >= goal)).await;
        assert!(done.is_ok(), "{goal} rounds: {:?}; {:?}", self.log.borrow(), self.observer);
    }

    /// Goes on for the length of a fault, and until there is progress.
    async fn through_the_fault(&self) {
        sleep(FAULT).await;
        self.rounds(5).await;
    }

    /// Ends it. No call failed, nothing was late, and nothing was lost on the way.
    async fn end(mut self, alive: &Server, within: Duration) {
        self.rounds(5).await;
        let what = self.service;
        self.tasks.abort_all();
        while let Some(ended) = self.tasks.join_next().await {
            assert!(ended.is_err_and(|error| error.is_cancelled()), "a task panicked");
        }
        let log = self.log.borrow().clone();
        println!("{what}: {log:?}");
        assert!(log.failures.is_empty(), "{what}: {:?}", log.failures);
        let slowest = log.slowest_register.max(log.slowest_view).max(log.slowest_heartbeat);
        assert!(slowest < within, "{what}: {log:?}");

        eventually("all are registered", PATIENCE, async || states(&self.provider), all_registered).await;
        let registered: BTreeSet<_> =
            self.provider.registry.registrations().iter().map(|one| one.id().to_string()).collect();
        let all = |seen: &Snapshot| seen.instances().iter().map(|one| one.id.as_str()).eq(&registered);
        self.observer.until("all of them", PATIENCE, all).await;
        let changes = self.observer.changes();
        assert!(changes.iter().all(|change| change.starts_with('+')), "{what}: {changes:?}");
        let prefix = etcd_client::GetOptions::new().with_prefix().with_count_only();
        let all = format!("/services/{what}/providers/");
        let held = bare(alive.addr()).await.kv_client().get(all, Some(prefix)).await.unwrap();
        assert_eq!(held.count() as usize, registered.len());
        let events = format!("{:?}", self.events);
        assert!(!events.contains("SessionLost") && !events.contains("Lost {"), "{what}: {events}");
    }
}

fn addresses<'a>(members: impl IntoIterator<Item = &'a Server>) -> Vec<String> {
    members.into_iter().map(|member| member.addr().to_string()).collect()
}

/// A cluster, its leader, and its two followers.
async fn cluster() -> (Cluster, usize, [usize; 2]) {
    let cluster = Cluster::start(Etcd::new(), 3).await.unwrap();
    let leader = cluster.leader().await.unwrap();
    let followers = [(leader + 1) % 3, (leader + 2) % 3];
    (cluster, leader, followers)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_dead_from_the_start_fails_no_call() {
    let (cluster, leader, [one, other]) = cluster().await;
    let [leader, one, other] = [leader, one, other].map(|index| &cluster.members()[index]);
    one.kill().await.unwrap();
    let ride = Ride::start("dead-from-the-start", &addresses([one, other, leader])).await;
    ride.rounds(50).await;
    ride.end(leader, FAIL_OVER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_member_fails_no_call() {
    let (cluster, leader, [one, other]) = cluster().await;
    let [leader, one, other] = [leader, one, other].map(|index| &cluster.members()[index]);
    let ride = Ride::start("frozen-follower", &addresses([one, other, leader])).await;
    one.freeze().await.unwrap();
    ride.through_the_fault().await;
    one.thaw().await.unwrap();
    ride.end(leader, FAIL_OVER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_leader_fails_no_call() {
    let (cluster, leader, [one, other]) = cluster().await;
    let [leader, one, other] = [leader, one, other].map(|index| &cluster.members()[index]);
    let ride = Ride::start("frozen-leader", &addresses([leader, one, other])).await;
    leader.freeze().await.unwrap();
    ride.through_the_fault().await;
    leader.thaw().await.unwrap();
    ride.end(one, FAIL_OVER + ELECTION).await;
}

/// On it, and on another member.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_killed_fails_no_call() {
    let (cluster, leader, [one, other]) = cluster().await;
    let [leader, one, other] = [leader, one, other].map(|index| &cluster.members()[index]);
    let on_it = Ride::start("killed-leader", &addresses([leader, one, other])).await;
    let elsewhere = Ride::start("killed-leader-of-another", &addresses([one, leader, other])).await;
    leader.kill().await.unwrap();
    on_it.through_the_fault().await;
    elsewhere.rounds(5).await;
    leader.restart().await.unwrap();
    on_it.end(one, FAIL_OVER + ELECTION).await;
    elsewhere.end(one, FAIL_OVER + ELECTION).await;
}

/// Packets to one member vanish, as behind a firewall.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_in_a_black_hole_fails_no_call() {
    let (cluster, leader, [one, other]) = cluster().await;
    let [leader, one, other] = [leader, one, other].map(|index| &cluster.members()[index]);
    let proxies = try_join_all([one, other, leader].map(|member| FaultProxy::start(member.addr()))).await.unwrap();
    let through: Vec<_> = proxies.iter().map(|proxy| proxy.addr().to_string()).collect();
    let ride = Ride::start("black-hole", &through).await;
    proxies[0].set_mode(Mode::BlackHole);
    ride.through_the_fault().await;
    proxies[0].set_mode(Mode::Pass);
    ride.end(leader, FAIL_OVER).await;
}

/// A maintenance of a whole cluster is no news for anyone.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_restarted_member_by_member_removes_nothing() {
    let (cluster, ..) = cluster().await;
    let order = |first: usize| addresses((0..3).map(|index| &cluster.members()[(first + index) % 3]));
    let provider = client(config(order(0), options()));
    register_all(&provider, instances("orders", "i", 50)).await;
    let mut observers = Vec::new();
    let mut readers = Vec::new();
    for first in 0..3 {
        let reader = client(config(order(first), options()));
        observers.push(Observer::of(&reader, "orders").await);
        readers.push(reader);
    }
    let events = Events::of(&provider);
    for (index, member) in cluster.members().iter().enumerate() {
        let start = Instant::now();
        member.restart().await.unwrap();
        println!("member {index} restarted in {:?}", start.elapsed());
        let id = format!("new-{index}");
        provider.registry.register(instance("orders", &id)).await.unwrap();
        for observer in &observers {
            observer.until(&id, soon(), |seen| seen.get(&id).is_some()).await;
        }
    }
    for observer in &observers {
        observer.until("live", PATIENCE, |seen| seen.len() == 53 && seen.freshness().as_str() == "live").await;
        assert_eq!(observer.changes(), ["+new-0", "+new-1", "+new-2"]);
    }
    assert!(all_registered(&states(&provider)));
    provider.registry.register(instance("orders", "last")).await.unwrap();
    events
        .until(
            "the last one",
            PATIENCE,
            |event| matches!(event, Event::Registration(one) if one.id().as_str() == "last"),
        )
        .await;
    assert!(!format!("{events:?}").contains("SessionLost"), "{events:?}");
}
