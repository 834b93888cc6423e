//! What the library costs, each figure beside its floor in the same run: the least work that does the same straight on
//! the store's client. Rounds of both are interleaved; the medians and the spread are printed.
//!
//! ```text
//! scripts/bench                                # every store, all works
//! scripts/bench --quick                        # fewer rounds
//! scripts/bench [etcd|zookeeper|redis]… [read|pick|register|propagate|converge|change|keep|wipe|volume]…
//! ```

#![allow(missing_docs, reason = "a program")]

mod bare;
#[cfg(feature = "etcd")]
mod etcd;
mod picks;
#[cfg(feature = "redis")]
mod redis;
mod samples;
mod works;
#[cfg(feature = "zookeeper")]
mod zookeeper;

use self::{bare::Bare, samples::Report};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

const STORES: &[&str] = &["etcd", "zookeeper", "redis"];
const WORKS: &[&str] = &["read", "pick", "register", "propagate", "converge", "change", "keep", "wipe", "volume"];

/// What the command line asks for.
struct Wanted {
    quick: bool,
    named: Vec<String>,
}

impl Wanted {
    fn parse() -> Result<Self> {
        // Cargo adds `--bench`.
        let (flags, named): (Vec<_>, Vec<_>) =
            std::env::args().skip(1).filter(|arg| arg != "--bench").partition(|arg| arg.starts_with("--"));
        if let Some(flag) = flags.iter().find(|flag| *flag != "--quick") {
            return Err(format!("unknown option {flag}: expected --quick").into());
        }
        if let Some(name) =
            named.iter().find(|name| !STORES.contains(&name.as_str()) && !WORKS.contains(&name.as_str()))
        {
            return Err(format!("unknown: {name}; stores: {}; works: {}", STORES.join(", "), WORKS.join(", ")).into());
        }
        Ok(Self { quick: !flags.is_empty(), named })
    }

    /// Whether this one of `all` is asked for, which it is when none of them is named.
    fn has(&self, name: &str, all: &[&str]) -> bool {
        let mut named = self.named.iter().filter(|named| all.contains(&named.as_str())).peekable();
        named.peek().is_none() || named.any(|named| named == name)
    }

    fn rounds(&self) -> usize {
        if self.quick { 3 } else { 9 }
    }
}

fn main() -> Result<()> {
    let wanted = Wanted::parse()?;
    let rounds = wanted.rounds();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // In a task, as a service's own work is: the thread of `block_on` is another one, and slow to wake.
    let missed = runtime.block_on(async { tokio::spawn(run(wanted)).await? })?;
    println!("\nmedians of {rounds} interleaved rounds (least to most in brackets); {missed} targets missed");
    if missed > 0 { Err("a target was missed".into()) } else { Ok(()) }
}

async fn run(wanted: Wanted) -> Result<usize> {
    let wanted = &wanted;
    let mut report = Report::default();
    if wanted.has("read", WORKS) {
        report.title("In the process");
        works::reads(&mut report, wanted.rounds()).await?;
    }
    if wanted.has("pick", WORKS) {
        report.title("Picks");
        picks::picks(&mut report, wanted.rounds()).await?;
    }
    #[cfg(feature = "etcd")]
    measure::<etcd::Etcd>(&mut report, wanted).await?;
    #[cfg(feature = "zookeeper")]
    measure::<zookeeper::ZooKeeper>(&mut report, wanted).await?;
    #[cfg(feature = "redis")]
    measure::<redis::Redis>(&mut report, wanted).await?;
    Ok(report.missed)
}

async fn measure<B: Bare>(report: &mut Report, wanted: &Wanted) -> Result<()> {
    let works = WORKS.iter().filter(|work| **work != "read" && wanted.has(work, WORKS)).count();
    if works == 0 || !wanted.has(B::NAME, STORES) {
        return Ok(());
    }
    report.title(B::NAME);
    let rounds = wanted.rounds();
    let store = B::start().await?;
    if wanted.has("register", WORKS) {
        works::register(&store, report, rounds).await?;
        works::one_by_one(&store, report, rounds).await?;
    }
    if wanted.has("propagate", WORKS) {
        works::propagate(&store, report, rounds).await?;
    }
    if wanted.has("converge", WORKS) {
        works::converge(&store, report, 1_000, rounds).await?;
        works::converge(&store, report, 10_000, rounds.min(5)).await?;
    }
    if wanted.has("change", WORKS) {
        works::change(&store, report, rounds).await?;
    }
    if wanted.has("keep", WORKS) {
        works::keep(&store, report).await?;
    }
    if wanted.has("wipe", WORKS) {
        works::wipe(&store, report, rounds.min(3)).await?;
    }
    if wanted.has("volume", WORKS) {
        store.volume(report).await?;
    }
    Ok(())
}
