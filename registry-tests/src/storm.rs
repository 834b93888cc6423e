//! A storm: five hundred clients that all start at the same moment, lose their server at the same moment, and find it again
//! at the same moment.
//!
//! # Examples
//! ```ignore
//! registry_tests::storm!(registry_tests::harness::EtcdHarness);
//! ```

use std::{
    fmt::Write,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use registry_core::{Options, Watcher};
use tokio::{
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use crate::{
    conformance::support::{all_registered, eventually, instances, is_live, resident_mib, states},
    harness::{Client, ServerHarness},
};

const CLIENTS: usize = 500;
const EACH: usize = 10;
const SERVICES: usize = 500;
const IN_A_SERVICE: usize = CLIENTS * EACH / SERVICES;
/// How often it is counted what goes to the server.
const SAMPLE: Duration = Duration::from_millis(100);
/// For one case.
pub const LIMIT: Duration = Duration::from_secs(170);

/// Makes a test of the storm, for the store that a [`ServerHarness`] stands for.
///
/// See the [module](mod@crate::storm).
#[macro_export]
macro_rules! storm {
    ($harness:ty) => {
        mod storm {
            #[allow(unused_imports, reason = "the harness may be named from here or from the root")]
            use super::*;

            #[test]
            fn five_hundred_clients_start_at_once_and_outlive_a_restart_and_a_wipe() {
                $crate::conformance::run_within(
                    $crate::storm::LIMIT,
                    $crate::storm::five_hundred_clients_start_at_once_and_outlive_a_restart_and_a_wipe::<$harness>(),
                );
            }
        }
    };
}

/// A client that registers in one service, and follows that and another one.
struct Member {
    client: Client,
    watchers: Vec<Watcher>,
}

impl Member {
    fn sees_all(&self) -> bool {
        self.watchers.len() == 2
            && self.watchers.iter().all(|watcher| {
                let seen = watcher.current();
                is_live(&seen) && seen.len() == IN_A_SERVICE
            })
    }
}

fn service(index: usize) -> String {
    format!("service-{}", index % SERVICES)
}

/// What goes to the server, over time.
struct Meter {
    samples: Arc<Mutex<Vec<Sample>>>,
    task: AbortHandle,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    connections: u64,
    requests: u64,
}

impl Meter {
    fn start(members: &Arc<Vec<Member>>) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (members, sampled) = (members.clone(), samples.clone());
        let task = tokio::spawn(async move {
            let mut ticks = interval(SAMPLE);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                let mut sample = Sample { at: ticks.tick().await, connections: 0, requests: 0 };
                for (_, stats) in members.iter().flat_map(|member| member.client.link.traffic()) {
                    sample.connections += stats.accepted;
                    sample.requests += stats.requests;
                }
                sampled.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
            }
        });
        Self { samples, task: task.abort_handle() }
    }

    /// Prints what has come since, and gives the requests of the busiest second.
    fn report(&self, since: Instant) -> u64 {
        let samples: Vec<_> = self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let samples: Vec<_> = samples.into_iter().filter(|sample| sample.at >= since).collect();
        let pairs: Vec<_> = samples.iter().zip(samples.iter().skip(1)).collect();
        let most = pairs.iter().map(|(from, to)| to.requests - from.requests).max().unwrap_or(0).max(1);
        let mut drawn = String::new();
        for (from, to) in &pairs {
            let (connections, requests) = (to.connections - from.connections, to.requests - from.requests);
            if connections + requests > 0 {
                let bar = "#".repeat(usize::try_from(40 * requests / most).unwrap_or(0));
                let at = (from.at - since).as_secs_f64();
                let _ = writeln!(drawn, "{at:7.1} s {connections:6} connections {requests:6} requests {bar}");
            }
        }
        print!("{drawn}");
        let second = |from: &Sample| {
            let end = samples.iter().take_while(|to| to.at <= from.at + Duration::from_secs(1)).last();
            end.map_or(0, |end| end.requests.saturating_sub(from.requests))
        };
        samples.iter().map(second).max().unwrap_or(0)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Everybody is registered and sees everybody; gives how long that took.
async fn settled(what: &str, members: &[Member], within: Duration) -> Duration {
    let start = Instant::now();
    let missing = async || {
        let unregistered = members.iter().filter(|member| !all_registered(&states(&member.client))).count();
        (unregistered, members.iter().filter(|member| !member.sees_all()).count())
    };
    eventually(what, within, missing, |missing| *missing == (0, 0)).await;
    start.elapsed()
}

/// Five hundred clients with ten instances each start at once, and outlive that their server is started again and that
/// it loses its data.
pub async fn five_hundred_clients_start_at_once_and_outlive_a_restart_and_a_wipe<H: ServerHarness>() {
    let store = H::with_own_server().await;
    let server = &store.cluster().members()[0];
    let options = Options::default();
    let mut members = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        members.push(Member { client: store.connect(options.clone()).await, watchers: Vec::new() });
    }

    let start = Instant::now();
    let starting = members.iter_mut().enumerate().map(async |(index, member)| {
        let (home, next) = (service(index), service(index + 1));
        let mine = instances(&home, &format!("c{index}"), EACH);
        let (registered, one, other) = tokio::join!(
            member.client.registry.register_all(mine),
            member.client.registry.watch(&home),
            member.client.registry.watch(&next),
        );
        member.watchers.extend([one.expect("watch"), other.expect("watch")]);
        registered.iter().filter(|outcome| outcome.is_err()).count()
    });
    let failed: usize = join_all(starting).await.into_iter().sum();
    let members = Arc::new(members);
    settled("all have started", &members, Duration::from_secs(60)).await;
    println!(
        "cold start of {CLIENTS}: {:?}, {failed} first attempts failed, server CPU {:?}",
        start.elapsed(),
        server.cpu_time().await
    );
    let before = resident_mib();

    let meter = Meter::start(&members);
    for wiped in [false, true] {
        store.kill().await;
        let killed = Instant::now();
        sleep(Duration::from_secs(3)).await;
        let down = meter.report(killed);
        println!("down: {down} requests in the busiest second");
        if wiped {
            store.wipe().await
        } else {
            store.restart().await
        }
        let back = Instant::now();
        let took = settled("all are back", &members, Duration::from_secs(60)).await;
        let peak = meter.report(back);
        println!(
            "wiped: {wiped}; all back {took:?} after the server, {peak} requests in the busiest second, memory {before:.0} -> {:.0} MiB",
            resident_mib()
        );
    }
    for gone in join_all(members.iter().map(|member| member.client.registry.destroy())).await {
        gone.expect("it leaves in good order");
    }
}
