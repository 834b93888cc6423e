//! What happens to clusters, as cases that any store of several servers can run: members die, hang, are cut off from the
//! others and lose their data, while 50 registrations and 5 readers are under way.
//!
//! Each case ends with the same three questions: do all readers have what the store has, and is that what was
//! registered, each once? Did no reader ever see less? Is nothing left when everybody has gone?
//!
//! # Examples
//! ```ignore
//! registry_tests::clusters!(registry_tests::harness::EtcdClusterHarness);
//! ```

use std::time::Duration;

use futures::future::{join_all, try_join_all};
use registry_core::Result;
use tokio::time::{Instant, sleep};

use crate::{
    conformance::support::{
        Observer, PATIENCE, all_registered, eventually, ids, instance, instances, is_live, is_stale, options,
        register_all, states,
    },
    harness::{Client, ClusterHarness},
};

const SERVICE: &str = "orders";
const CLIENTS: usize = 5;
const EACH: usize = 10;
/// A machine that starts three servers at once keeps it.
const TTL: Duration = Duration::from_secs(4);
/// Within this, another member leads, clients have found it, and what was under way is done: a few seconds, and what a
/// busy machine adds.
const BACK: Duration = Duration::from_secs(30);

/// Makes a test of every case, for the store that a [`ClusterHarness`] stands for.
///
/// See the [module](mod@crate::clusters). Those in `containers_only` need servers in containers.
#[macro_export]
macro_rules! clusters {
    ($harness:ty) => {
        mod cluster {
            $crate::__each_of_a_cluster! { $harness;
                a_leader_that_dies_costs_nobody
                a_leader_that_hangs_costs_nobody
                a_majority_that_is_lost_for_three_ttls_costs_nobody
                a_member_that_is_wiped_costs_nobody
                a_store_that_is_wiped_is_filled_again
                members_that_are_restarted_in_turn_are_no_news
                our_member_dies_and_costs_nobody
                our_member_hangs_and_costs_nobody
            }
        }
        mod containers_only {
            $crate::__each_of_a_cluster! { $harness;
                a_leader_that_is_cut_off_from_its_peers_costs_nobody
                our_member_is_cut_off_from_its_peers_and_costs_nobody
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __each_of_a_cluster {
    ($harness:ty; $($case:ident)*) => {
        #[allow(unused_imports, reason = "the harness may be named from here or from the root")]
        use super::*;

        $(#[test]
        fn $case() {
            $crate::conformance::run($crate::clusters::$case::<$harness>());
        })*
    };
}

/// Clients that register and read, and what they are to see.
struct Ride<H> {
    store: H,
    clients: Vec<Client>,
    observers: Vec<Observer>,
    /// The ids of what came during the ride.
    new: Vec<String>,
}

impl<H: ClusterHarness> Ride<H> {
    async fn start() -> Self {
        let store = H::with_own_server().await;
        let mut ride = Self { store, clients: Vec::new(), observers: Vec::new(), new: Vec::new() };
        for index in 0..CLIENTS {
            let client = ride.store.connect(options::<H>().ttl(TTL)).await;
            register_all(&client, instances(SERVICE, &format!("p{index}"), EACH)).await;
            ride.clients.push(client);
        }
        for client in &ride.clients {
            let observer = Observer::of(client, SERVICE).await;
            observer.until("all", PATIENCE, |seen| seen.len() == CLIENTS * EACH && is_live(seen)).await;
            ride.observers.push(observer);
        }
        ride
    }

    /// One more is registered, by each client in turn, and all readers see it.
    async fn goes_on(&mut self, when: &str) {
        let start = Instant::now();
        let id = format!("new-{}", self.new.len());
        let client = &self.clients[self.new.len() % CLIENTS];
        let register = || client.registry.register(instance(SERVICE, &id));
        eventually(when, BACK, register, Result::is_ok).await.expect("it has been");
        let registered = start.elapsed();
        let what = format!("{id} {when}");
        let seen = self.observers.iter().map(|observer| {
            let id = &id;
            observer.until(&what, BACK, move |seen| seen.get(id).is_some() && is_live(seen))
        });
        join_all(seen).await;
        println!("{when}: registered after {registered:?}, seen by all after {:?}", start.elapsed());
        self.new.push(id);
    }

    async fn ends_well(self) {
        for client in &self.clients {
            eventually("everybody knows", BACK, async || states(client), all_registered).await;
        }
        let registered = self.clients.iter().flat_map(|client| client.registry.registrations());
        let mut wanted: Vec<String> = registered.map(|registration| registration.id().to_string()).collect();
        wanted.sort();
        assert_eq!(wanted.len(), CLIENTS * EACH + self.new.len());
        for observer in &self.observers {
            observer.until("all that is wanted", BACK, |seen| is_live(seen) && ids(seen) == wanted).await;
            observer.assert_always("nobody is missing", |seen| seen.len() >= CLIENTS * EACH);
            let news: Vec<_> = self.new.iter().map(|id| format!("+{id}")).collect();
            assert_eq!(observer.changes(), news, "nobody was away, and nobody came twice");
        }
        let path = |id: &String| format!("{SERVICE}/providers/{id}");
        let wanted: Vec<_> = wanted.iter().map(path).collect();
        let stored = async || {
            let mut keys = self.store.keys().await;
            keys.sort();
            keys
        };
        eventually("the store has what is wanted", BACK, stored, |stored| *stored == wanted).await;
        for gone in join_all(self.clients.iter().map(|client| client.registry.destroy())).await {
            gone.expect("it leaves in good order");
        }
        // Marks of who has left stay for a ttl.
        let left = async || {
            let keys = self.store.keys().await;
            keys.into_iter().filter(|key| key.contains("/providers/")).collect::<Vec<_>>()
        };
        eventually("nothing is left", TTL, left, Vec::is_empty).await;
    }
}

/// The leader dies, another goes on, and the dead one comes back.
pub async fn a_leader_that_dies_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let leader = ride.store.leader(SERVICE).await;
    dies(&mut ride, leader).await;
    ride.ends_well().await;
}

/// So does the member that a client is connected to.
pub async fn our_member_dies_and_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let home = ride.store.home(&ride.clients[0]).await;
    dies(&mut ride, home).await;
    ride.ends_well().await;
}

async fn dies<H: ClusterHarness>(ride: &mut Ride<H>, member: usize) {
    ride.store.cluster().members()[member].kill().await.expect("it is killed");
    ride.goes_on("while a member is dead").await;
    ride.store.cluster().members()[member].restart().await.expect("it comes back");
    ride.goes_on("when it is back").await;
}

/// The leader hangs, another goes on, and the old one comes back as if nothing had happened.
pub async fn a_leader_that_hangs_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let leader = ride.store.leader(SERVICE).await;
    hangs(&mut ride, leader).await;
    ride.ends_well().await;
}

/// So does the member that a client is connected to.
pub async fn our_member_hangs_and_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let home = ride.store.home(&ride.clients[0]).await;
    hangs(&mut ride, home).await;
    ride.ends_well().await;
}

async fn hangs<H: ClusterHarness>(ride: &mut Ride<H>, member: usize) {
    ride.store.cluster().members()[member].freeze().await.expect("it is frozen");
    ride.goes_on("while a member hangs").await;
    ride.store.cluster().members()[member].thaw().await.expect("it goes on");
    ride.goes_on("when it goes on").await;
}

/// The leader is cut off from the others, and answers its clients as before: they leave it for the one that was elected.
pub async fn a_leader_that_is_cut_off_from_its_peers_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let leader = ride.store.leader(SERVICE).await;
    is_cut_off(&mut ride, leader).await;
    ride.ends_well().await;
}

/// The member that a client is connected to is cut off from the others, and answers its clients as before.
pub async fn our_member_is_cut_off_from_its_peers_and_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let home = ride.store.home(&ride.clients[0]).await;
    is_cut_off(&mut ride, home).await;
    ride.ends_well().await;
}

async fn is_cut_off<H: ClusterHarness>(ride: &mut Ride<H>, member: usize) {
    let led = ride.store.leader(SERVICE).await == member;
    ride.store.cluster().isolate(member).await.expect("it is cut off");
    if led {
        // Until then, a Redis that is cut off is as good as any.
        let leader = || ride.store.leader(SERVICE);
        let elected = eventually("the others elect another", BACK, leader, |leader| *leader != member).await;
        println!("member {elected} leads instead of {member}");
    }
    ride.goes_on("while a member is cut off").await;
    ride.store.cluster().rejoin().await.expect("it is connected again");
    ride.goes_on("when it is not any more").await;
}

/// Without a majority nothing can be written, and nobody can say that anybody is gone.
pub async fn a_majority_that_is_lost_for_three_ttls_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let quorum = ride.store.quorum(SERVICE).await;
    let members = ride.store.cluster().members();
    try_join_all(quorum.iter().map(|member| members[*member].kill())).await.expect("they are killed");
    let lost = Instant::now();
    for observer in &ride.observers {
        observer.until("nothing is known any more", PATIENCE, is_stale).await;
    }
    let refused = ride.clients[0].registry.register(instance(SERVICE, "p0-000")).await;
    assert!(refused.as_ref().is_err_and(registry_core::Error::is_retryable), "{refused:?}");
    sleep((3 * TTL).saturating_sub(lost.elapsed())).await;
    try_join_all(quorum.iter().map(|member| members[*member].restart())).await.expect("they come back");
    ride.goes_on("when the majority is back").await;
    ride.ends_well().await;
}

/// A maintenance of all members, one after the other, is no news for anyone.
pub async fn members_that_are_restarted_in_turn_are_no_news<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    for member in 0..ride.store.cluster().members().len() {
        ride.store.cluster().members()[member].restart().await.expect("it comes back");
        ride.goes_on(&format!("after member {member} was restarted")).await;
    }
    ride.ends_well().await;
}

/// The leader loses its data, and is let in again.
pub async fn a_member_that_is_wiped_costs_nobody<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    let leader = ride.store.leader(SERVICE).await;
    ride.store.cluster().wipe_member(leader).await.expect("it comes back");
    ride.goes_on("when a member has lost its data").await;
    ride.ends_well().await;
}

/// All members lose their data at once. Their clients give it back, and readers see nothing of it.
pub async fn a_store_that_is_wiped_is_filled_again<H: ClusterHarness>() {
    let mut ride = Ride::<H>::start().await;
    ride.store.wipe().await;
    ride.goes_on("when all data is lost").await;
    ride.ends_well().await;
}
