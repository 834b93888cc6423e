//! Three members, some of which fail.

use std::{net::SocketAddr, time::Duration};

use futures::future::{join_all, try_join_all};
use registry_core::{Options, Snapshot};
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, answered, eventually, in_time, instance, instances, is_live,
        is_stale, never_within, register_all, states,
    },
    harness::{Client, ZooKeeperEnsembleHarness},
    servers::{Cluster, Server, ZooKeeper, ask_zookeeper},
};
use tokio::time::Instant;

use crate::{
    Left, ORDERS, SECOND, TICK, Witness, asked, bare, client, config, left, options, patient, session_of, soon, warm_up,
};

/// Three members, the leader, and the others.
struct Ensemble {
    cluster: Cluster,
    leader: usize,
}

/// A provider and a reader, and what was there at the beginning.
struct Ride {
    provider: Client,
    observer: Observer,
    events: Events,
    before: Left,
    _reader: Client,
}

/// How long an election may take on a busy machine.
const ELECTED: Duration = Duration::from_secs(10);

impl Ensemble {
    async fn start(zookeeper: ZooKeeper) -> Self {
        let cluster = Cluster::start(zookeeper, 3).await.unwrap();
        let leader = cluster.leader().await.unwrap();
        join_all(cluster.members().iter().map(|member| warm_up(member.addr()))).await;
        Self { cluster, leader }
    }

    fn leader(&self) -> &Server {
        &self.cluster.members()[self.leader]
    }

    fn followers(&self) -> [&Server; 2] {
        [1, 2].map(|after| &self.cluster.members()[(self.leader + after) % 3])
    }

    fn client(&self, options: Options) -> Client {
        client_of(self.cluster.members().iter().map(Server::addr), options)
    }

    /// The member that has the connection of this session.
    async fn home_of(&self, session: i64) -> SocketAddr {
        let id = format!("sid=0x{session:x},");
        let home = async || {
            let asked =
                self.cluster.members().iter().map(async |member| (member, ask_zookeeper(member.addr(), "cons").await));
            let answers = join_all(asked).await;
            let home = answers.iter().find(|(_, answer)| answer.as_ref().is_ok_and(|answer| answer.contains(&id)));
            home.map(|(member, _)| member.addr())
        };
        eventually("the session has a connection", PATIENCE, home, Option::is_some).await.unwrap()
    }
}

fn client_of(members: impl IntoIterator<Item = SocketAddr>, options: Options) -> Client {
    client(config(members, options))
}

impl Ride {
    async fn start(provider: Client, reader: Client) -> Self {
        let events = Events::of(&provider);
        register_all(&provider, instances("orders", "i", 20)).await;
        let observer = Observer::of(&reader, "orders").await;
        observer.until("all", soon(), |seen| seen.len() == 20).await;
        Self { provider, observer, events, before: Left::new(), _reader: reader }
    }

    async fn session(&self, member: &Server) -> i64 {
        session_of(&bare(member.addr()).await, &format!("{ORDERS}/i-000")).await
    }

    /// Takes note of what is there.
    async fn note(&mut self, member: &Server) {
        self.before = left(&bare(member.addr()).await, ORDERS).await;
        assert_eq!(self.before.len(), 20);
    }

    /// Registers one more, which the reader sees.
    async fn goes_on(&self, id: &str, within: Duration) {
        let start = Instant::now();
        let register = async || self.provider.registry.register(instance("orders", id)).await;
        eventually(id, within, register, Result::is_ok).await.unwrap();
        self.observer.until(id, within, |seen| seen.get(id).is_some() && is_live(seen)).await;
        println!("{id}: registered and seen after {:?}", start.elapsed());
    }

    /// Nobody noticed: neither a reader, nor the provider, nor the store.
    async fn nothing_happened(&self, member: &Server, new: &[&str]) {
        eventually("it knows", PATIENCE, async || states(&self.provider), all_registered).await;
        let changes: Vec<_> = new.iter().map(|id| format!("+{id}")).collect();
        assert_eq!(self.observer.changes(), changes);
        self.observer.assert_always("all of them", |seen| seen.len() >= 20);
        assert!(!format!("{:?}", self.events).contains("Session"), "{:?}", self.events);
        let mut after = left(&bare(member.addr()).await, ORDERS).await;
        after.retain(|name, _| !new.contains(&name.as_str()));
        assert_eq!(after, self.before, "the same session, the same nodes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_member_that_we_are_connected_to_dies_and_nobody_notices() {
    let ensemble = Ensemble::start(ZooKeeper::new()).await;
    let followers = ensemble.followers().map(Server::addr);
    let mut ride = Ride::start(client_of(followers, patient()), ensemble.client(patient())).await;
    let mut witness = Witness::of(ensemble.leader().addr()).await;
    ride.note(ensemble.leader()).await;
    let session = ride.session(ensemble.leader()).await;
    let home = ensemble.home_of(session).await;
    let dead = ensemble.followers().into_iter().find(|follower| follower.addr() == home).unwrap();
    dead.kill().await.unwrap();
    ride.goes_on("new", ELECTED).await;
    assert_ne!(ensemble.home_of(session).await, home);
    ride.nothing_happened(ensemble.leader(), &["new"]).await;
    assert_eq!(witness.events().await, [format!("NodeCreated {ORDERS}/new")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_dies_and_nobody_notices() {
    let ensemble = Ensemble::start(ZooKeeper::new()).await;
    let [one, _] = ensemble.followers();
    let mut ride = Ride::start(ensemble.client(patient()), ensemble.client(patient())).await;
    ride.note(ensemble.leader()).await;
    ensemble.leader().kill().await.unwrap();
    ride.goes_on("meanwhile", ELECTED).await;
    ensemble.leader().restart().await.unwrap();
    ride.goes_on("after", ELECTED).await;
    ride.nothing_happened(one, &["meanwhile", "after"]).await;
}

/// The others wait for it for a while, and it comes back as one that is not up to date.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_frozen_and_nobody_notices() {
    let ensemble = Ensemble::start(ZooKeeper::new()).await;
    let [one, _] = ensemble.followers();
    let mut ride = Ride::start(ensemble.client(patient()), ensemble.client(patient())).await;
    ride.note(ensemble.leader()).await;
    ensemble.leader().freeze().await.unwrap();
    // Its followers take it for dead after six ticks.
    ride.goes_on("meanwhile", 6 * TICK + ELECTED).await;
    ensemble.leader().thaw().await.unwrap();
    ride.goes_on("after", ELECTED).await;
    ride.nothing_happened(one, &["meanwhile", "after"]).await;
}

/// Kills the followers, which is to lose the quorum: nothing can be registered, and readers keep what they have.
async fn lose_quorum(ensemble: &Ensemble, ride: &Ride) {
    try_join_all(ensemble.followers().map(Server::kill)).await.unwrap();
    ride.observer.until("the loss of the quorum", PATIENCE, is_stale).await;
    // It goes on for a moment, until it misses the others.
    let mode = async || asked(ensemble.leader().addr(), "srvr").await;
    eventually("the leader gives up", ELECTED, mode, |answer| !answer.contains("Mode: leader")).await;
    let within = answered::<ZooKeeperEnsembleHarness>();
    let refused = in_time("register", within, ride.provider.registry.register(instance("orders", "new"))).await;
    assert!(refused.as_ref().is_err_and(registry_core::Error::is_retryable), "{refused:?}");
    let unknown = in_time("discover", within, ride._reader.registry.discover("payments")).await;
    assert!(unknown.as_ref().is_err_and(registry_core::Error::is_retryable), "{unknown:?}");
}

async fn regain_quorum(ensemble: &Ensemble) {
    try_join_all(ensemble.followers().map(Server::restart)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quorum_that_is_lost_and_comes_back_changes_nothing() {
    let ensemble = Ensemble::start(ZooKeeper::new()).await;
    let mut ride = Ride::start(ensemble.client(patient()), ensemble.client(patient())).await;
    ride.note(ensemble.leader()).await;
    lose_quorum(&ensemble, &ride).await;
    regain_quorum(&ensemble).await;
    // It was never given up.
    ride.observer.until("the new one", ELECTED, |seen| seen.get("new").is_some() && is_live(seen)).await;
    ride.nothing_happened(ensemble.leader(), &["new"]).await;
}

/// Nobody could say that the sessions are over, and who comes back in time keeps his.
#[tokio::test(flavor = "multi_thread")]
async fn a_quorum_that_is_lost_for_longer_than_the_ttl_removes_nobody() {
    let ensemble = Ensemble::start(ZooKeeper::new()).await;
    let short = options().ttl(3 * SECOND).protect_for(120 * SECOND);
    let ride = Ride::start(ensemble.client(short.clone()), ensemble.client(short.clone())).await;
    lose_quorum(&ensemble, &ride).await;
    let lost = |event: &registry_core::Event| matches!(event, registry_core::Event::SessionLost { .. });
    ride.events.until("the session is presumed lost", short.ttl + PATIENCE, lost).await;
    regain_quorum(&ensemble).await;
    let all = |seen: &Snapshot| seen.len() == 21 && is_live(seen);
    ride.observer.until("all of them, and the new one", ELECTED + PATIENCE, all).await;
    eventually("it knows", PATIENCE, async || states(&ride.provider), all_registered).await;
    assert_eq!(left(&bare(ensemble.leader().addr()).await, ORDERS).await.len(), 21);
    ride.observer.assert_always("all of them", |seen| seen.len() >= 20);
    assert_eq!(ride.observer.changes(), ["+new"]);
}

/// A maintenance of a whole ensemble is no news for anyone.
#[tokio::test(flavor = "multi_thread")]
async fn an_ensemble_that_is_restarted_member_by_member_removes_nothing() {
    let ensemble = Ensemble::start(ZooKeeper::new()).await;
    let mut ride = Ride::start(ensemble.client(patient()), ensemble.client(patient())).await;
    ride.note(ensemble.leader()).await;
    let ids = ["new-0", "new-1", "new-2"];
    for (member, id) in ensemble.cluster.members().iter().zip(ids) {
        member.restart().await.unwrap();
        ride.goes_on(id, ELECTED).await;
    }
    let leader = ensemble.cluster.leader().await.unwrap();
    ride.nothing_happened(&ensemble.cluster.members()[leader], &ids).await;
}

/// A member without a quorum may serve reads, from what it has: nobody here believes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_serves_only_reads_is_not_believed() {
    let ensemble = Ensemble::start(ZooKeeper::new().property("readonlymode.enabled", "true")).await;
    let mut ride = Ride::start(ensemble.client(patient()), ensemble.client(patient())).await;
    ride.note(ensemble.leader()).await;
    lose_quorum(&ensemble, &ride).await;
    let mode = async || asked(ensemble.leader().addr(), "srvr").await;
    eventually("it serves reads", ELECTED, mode, |answer| answer.contains("Mode: read-only")).await;
    let seen = async || (ride.observer.now(), ride._reader.registry.discover("payments").await.is_ok());
    never_within("that it is believed", 4 * SECOND, seen, |(seen, discovered)| is_live(seen) || *discovered).await;
    regain_quorum(&ensemble).await;
    ride.observer.until("the new one", ELECTED, |seen| seen.get("new").is_some() && is_live(seen)).await;
    ride.nothing_happened(ensemble.leader(), &["new"]).await;
}
