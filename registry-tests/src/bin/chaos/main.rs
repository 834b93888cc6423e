//! Chaos: providers and readers in processes of their own, a store that is harmed, networks that fail, all at random; and
//! what the library promises, checked all the way.
//!
//! ```text
//! scripts/chaos [etcd|zookeeper|redis] [minutes] [seed]
//! ```
//!
//! * `schedule` draws from the seed what happens when; `run` plays it on the `stage`: the store, and the children
//!   (`process`, which run `child`) with their networks. `watch` is what goes on beside it.
//! * `ledger` knows what was wanted and what went wrong, and so what must be seen by when (`bounds`); `checker` compares
//!   it with what the readers and the store show.
//! * `timeline` is what people are shown of a run that went wrong.

#![allow(missing_docs, reason = "a program")]
#![cfg_attr(
    not(any(feature = "etcd", feature = "redis", feature = "zookeeper")),
    allow(unused, reason = "there is no store to harm")
)]

mod bounds;
mod checker;
mod child;
mod ledger;
mod names;
mod process;
mod protocol;
mod run;
mod schedule;
mod stage;
mod timeline;
mod watch;

use std::{process::ExitCode, time::Duration};

#[cfg(feature = "etcd")]
use registry_tests::harness::EtcdHarness;
#[cfg(feature = "redis")]
use registry_tests::harness::RedisHarness;
#[cfg(feature = "zookeeper")]
use registry_tests::harness::ZooKeeperHarness;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T = (), E = Error> = std::result::Result<T, E>;

const USAGE: &str = "usage: chaos [etcd|zookeeper|redis]… [minutes] [seed]";
const MINUTES: f64 = 2.0;
/// The stores that are compiled in.
const STORES: &[&str] = &[
    #[cfg(feature = "etcd")]
    "etcd",
    #[cfg(feature = "zookeeper")]
    "zookeeper",
    #[cfg(feature = "redis")]
    "redis",
];

/// What the command line asks for.
struct Wanted {
    stores: Vec<String>,
    length: Duration,
    seed: u64,
}

impl Wanted {
    fn parse(args: &[String]) -> Result<Self> {
        let is_number = |arg: &String| arg.parse::<f64>().is_ok();
        let (numbers, stores): (Vec<_>, Vec<_>) = args.iter().cloned().partition(is_number);
        if numbers.len() > 2 {
            return Err(USAGE.into());
        }
        if let Some(store) = stores.iter().find(|store| !STORES.contains(&store.as_str())) {
            return Err(
                format!("{store}: expected one of {}, which are compiled in; {USAGE}", STORES.join(", ")).into()
            );
        }
        let minutes = numbers.first().map_or(Ok(MINUTES), |minutes| minutes.parse())?;
        let seed = numbers.get(1).map_or_else(|| Ok(u64::from(rand::random::<u32>())), |seed| seed.parse())?;
        let length = Duration::try_from_secs_f64(60.0 * minutes)?;
        Ok(Self { stores, length, seed })
    }

    fn has(&self, store: &str) -> bool {
        self.stores.is_empty() || self.stores.iter().any(|wanted| wanted == store)
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // One thread: many of them run on a small machine, and calls begin in the order in which they are told.
        [child::PROVIDER, url] => runtime(true).and_then(|runtime| runtime.block_on(child::provide(url))),
        [child::READER, url] => runtime(true).and_then(|runtime| runtime.block_on(child::read(url))),
        _ => Wanted::parse(&args).and_then(|wanted| runtime(false)?.block_on(orchestrate(wanted))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chaos: {error}");
            ExitCode::FAILURE
        }
    }
}

fn runtime(one_thread: bool) -> Result<tokio::runtime::Runtime> {
    let mut builder = if one_thread {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    Ok(builder.enable_all().build()?)
}

async fn orchestrate(wanted: Wanted) -> Result {
    let mut failed: Vec<&str> = Vec::new();
    #[cfg(feature = "etcd")]
    if wanted.has("etcd") && !run::run::<EtcdHarness>("etcd", &wanted).await? {
        failed.push("etcd");
    }
    #[cfg(feature = "zookeeper")]
    if wanted.has("zookeeper") && !run::run::<ZooKeeperHarness>("zookeeper", &wanted).await? {
        failed.push("zookeeper");
    }
    #[cfg(feature = "redis")]
    if wanted.has("redis") && !run::run::<RedisHarness>("redis", &wanted).await? {
        failed.push("redis");
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("a promise was broken on {}", failed.join(", ")).into()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Wanted> {
        Wanted::parse(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn all_arguments_are_optional() {
        let wanted = parse("").unwrap();
        assert!(STORES.iter().all(|store| wanted.has(store)) && wanted.length == Duration::from_secs(120));
        for store in STORES {
            let wanted = parse(&format!("{store} 0.5 42")).unwrap();
            assert!(STORES.iter().all(|other| wanted.has(other) == (other == store)));
            assert_eq!((wanted.length, wanted.seed), (Duration::from_secs(30), 42));
        }
        assert!(parse("consul").is_err() && parse("1 2 3").is_err() && parse("-1").is_err());
    }
}
