//! A storm: five hundred clients that all start at the same moment, lose their server at the same moment, and find it again
//! at the same moment.
//!
//! It counts what goes to the server and prints it as a histogram, with what the server's processor was needed for.
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
/// How often it is counted what goes to the server.
const SAMPLE: Duration = Duration::from_millis(100);
/// How long the server is down.
const DOWN: Duration = Duration::from_secs(3);
/// Within this after its return, everybody is registered and sees everybody. Most of it is what two cores need that also
/// run the server and five hundred proxies.
const BACK: Duration = Duration::from_secs(30);
/// What goes to the server in the busiest second: connecting, renewing, putting ten at once, and following two services
/// are about ten requests for each.
const REQUESTS: u64 = 10 * CLIENTS as u64;
/// How often it is tried to connect in the busiest second while nobody answers.
const TRIES: u64 = 8 * CLIENTS as u64;
/// The greatest share of all connections that may come within a tenth of a second.
const CROWD: f64 = 0.5;
/// How much more memory there may be after a storm: what an allocator keeps.
const SPARE_MIB: f64 = 96.0;
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
                is_live(&seen) && seen.len() == EACH
            })
    }

    /// What it sees, for messages.
    fn describe(&self) -> Vec<String> {
        let seen = self.watchers.iter().map(|watcher| {
            let seen = watcher.current();
            format!("{} {}: {}", seen.service(), seen.freshness(), seen.len())
        });
        seen.collect()
    }
}

fn service(index: usize) -> String {
    format!("service-{}", index % CLIENTS)
}

/// What goes to the server, and what readers see, over time.
struct Meter {
    samples: Arc<Mutex<Vec<Sample>>>,
    task: AbortHandle,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    connections: u64,
    requests: u64,
    /// How many instances the reader sees that sees fewest.
    fewest: usize,
}

impl Sample {
    fn take(members: &[Member], at: Instant) -> Self {
        let mut sample = Self { at, connections: 0, requests: 0, fewest: usize::MAX };
        for member in members {
            for (_, stats) in member.client.link.traffic() {
                sample.connections += stats.accepted;
                sample.requests += stats.requests;
            }
            for watcher in &member.watchers {
                sample.fewest = sample.fewest.min(watcher.current().len());
            }
        }
        sample
    }
}

/// What a while was like.
#[derive(Debug)]
struct Weather {
    /// In the busiest second.
    requests: u64,
    connections: u64,
    /// The share of all connections that came within one sample.
    crowd: f64,
    fewest: usize,
}

impl Meter {
    fn start(members: &Arc<Vec<Member>>) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (members, sampled) = (members.clone(), samples.clone());
        let task = tokio::spawn(async move {
            let mut ticks = interval(SAMPLE);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                ticks.tick().await;
                let sample = Sample::take(&members, Instant::now());
                sampled.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
            }
        });
        Self { samples, task: task.abort_handle() }
    }

    /// Prints what has come since, and sums it up.
    fn report(&self, since: Instant) -> Weather {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let samples: Vec<_> = samples.into_iter().filter(|sample| sample.at >= since).collect();
        let mut histogram = String::new();
        let (mut crowd, mut all) = (0, 0);
        for (from, to) in samples.iter().zip(samples.iter().skip(1)) {
            let (connections, requests) = (to.connections - from.connections, to.requests - from.requests);
            (crowd, all) = (connections.max(crowd), all + connections);
            if connections + requests > 0 {
                let bar = "#".repeat(usize::try_from(connections / 5).unwrap_or(0));
                let at = (from.at - since).as_secs_f64();
                let _ = writeln!(histogram, "{at:7.1} s {requests:6} requests {connections:6} connections {bar}");
            }
        }
        print!("{histogram}");
        let busiest = |count: fn(&Sample) -> u64| {
            let second = |from: &Sample| {
                let end = samples.iter().take_while(|to| to.at <= from.at + Duration::from_secs(1)).last();
                end.map_or(0, |end| count(end).saturating_sub(count(from)))
            };
            samples.iter().map(second).max().unwrap_or(0)
        };
        Weather {
            requests: busiest(|sample| sample.requests),
            connections: busiest(|sample| sample.connections),
            crowd: crowd as f64 / all.max(1) as f64,
            fewest: samples.iter().map(|sample| sample.fewest).min().unwrap_or(0),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until everybody is registered and sees everybody.
async fn settled(what: &str, members: &[Member]) {
    let missing = async || {
        let unregistered = members.iter().filter(|member| !all_registered(&states(&member.client))).count();
        let blind: Vec<_> = members.iter().filter(|member| !member.sees_all()).collect();
        (unregistered, blind.len(), blind.first().map(|member| member.describe()))
    };
    eventually(what, BACK, missing, |(unregistered, blind, _)| (*unregistered, *blind) == (0, 0)).await;
}

/// Five hundred clients with ten instances each start at once, and outlive that their server is started again and that
/// it loses its data.
pub async fn five_hundred_clients_start_at_once_and_outlive_a_restart_and_a_wipe<H: ServerHarness>() {
    let store = H::with_own_server().await;
    let server = &store.cluster().members()[0];
    let mut members = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        members.push(Member { client: store.connect(Options::default()).await, watchers: Vec::new() });
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
    settled("all have started", &members).await;
    let (took, cpu, memory) = (start.elapsed(), server.cpu_time().await, resident_mib());
    println!("{CLIENTS} started at once: {took:?}, {failed} calls failed, server CPU {cpu:?}, {memory:.0} MiB");

    let meter = Meter::start(&members);
    for wiped in [false, true] {
        store.kill().await;
        let killed = Instant::now();
        sleep(DOWN).await;
        let down = meter.report(killed);
        println!("down: {down:?}");
        assert!(down.connections <= TRIES, "{down:?}");

        let returning = Instant::now();
        if wiped {
            store.wipe().await
        } else {
            store.restart().await
        }
        let returned = Instant::now();
        settled("all are back", &members).await;
        let (took, back, now) = (returned.elapsed(), meter.report(returning), resident_mib());
        println!("back, wiped: {wiped}, after {took:?}: {back:?}, {now:.0} MiB");
        assert!(back.requests <= REQUESTS && back.crowd <= CROWD, "{back:?}");
        assert_eq!(down.fewest.min(back.fewest), EACH, "no reader saw less");
        assert!(now <= memory + SPARE_MIB, "{memory:.0} MiB, then {now:.0}");
    }
    drop(meter);
    for gone in join_all(members.iter().map(|member| member.client.registry.destroy())).await {
        gone.expect("it leaves in good order");
    }
    let left = async || store.keys().await.into_iter().filter(|key| key.contains("/providers/")).count();
    eventually("nothing is left", BACK, left, |left| *left == 0).await;
}
