//! What the library costs, each figure beside its floor in the same run: the least work that does the same straight on
//! the store's client. Rounds of both are interleaved; the medians and the spread are printed, and written as JSON.
//!
//! ```text
//! scripts/bench                                # every store, all works
//! scripts/bench --quick                        # fewer rounds, shorter and smaller works
//! scripts/bench [etcd|zookeeper|redis]… [W1…W10|growth]…
//! ```

#![allow(missing_docs, reason = "a program")]

mod bare;
#[cfg(feature = "etcd")]
mod etcd;
mod measured;
#[cfg(feature = "redis")]
mod redis;
mod report;
mod samples;
mod works;
#[cfg(feature = "zookeeper")]
mod zookeeper;

use std::path::Path;

use self::{
    bare::Bare,
    report::Report,
    works::{Effort, follow, growth::Growth, large, outlive, picks, read, register},
};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

const STORES: &[&str] = &["etcd", "zookeeper", "redis"];
const WORKS: &[&str] = &["W1", "W2", "W3", "W4", "W5", "W6", "W7", "W8", "W9", "W10", "growth"];

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

    fn names(&self, name: &str) -> bool {
        self.named.iter().any(|named| named == name)
    }

    /// Whether nothing of `all` is named, which means all of it.
    fn names_none_of(&self, all: &[&str]) -> bool {
        !all.iter().any(|name| self.names(name))
    }

    fn store(&self, name: &str) -> bool {
        self.names(name) || self.names_none_of(STORES)
    }

    fn work(&self, name: &str) -> bool {
        self.names(name) || self.names_none_of(WORKS)
    }

    /// Takes minutes, and has no target.
    fn growth(&self) -> bool {
        self.names("growth") || (self.names_none_of(WORKS) && !self.quick)
    }

    fn effort(&self) -> Effort {
        Effort { rounds: if self.quick { 3 } else { 9 }, quick: self.quick }
    }
}

fn main() -> Result<()> {
    let wanted = Wanted::parse()?;
    let rounds = wanted.effort().rounds;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // In a task, as a service's own work is: the thread of `block_on` is another one, and slow to wake.
    let report = runtime.block_on(async { tokio::spawn(run(wanted)).await? })?;
    let missed = report.missed();
    println!(
        "\nmedians of {rounds} interleaved rounds, three times as many of short works (least to most in brackets); {missed} targets missed"
    );
    if missed > 0 { Err("a target was missed".into()) } else { Ok(()) }
}

async fn run(wanted: Wanted) -> Result<Report> {
    let wanted = &wanted;
    let mut report = Report::default();
    let mut growth = Growth::default();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
    std::fs::create_dir_all(&folder)?;
    if wanted.work("W1") {
        report.part("in the process");
        read::reads(&mut report, wanted.effort()).await?;
        picks::picks(&mut report, wanted.effort()).await?;
    }
    if wanted.work("W9") {
        report.part("watchers in the process");
        large::watchers(&mut report, wanted.effort()).await?;
    }
    #[cfg(feature = "etcd")]
    measure::<etcd::Etcd>(&mut report, &mut growth, wanted).await?;
    #[cfg(feature = "zookeeper")]
    measure::<zookeeper::ZooKeeper>(&mut report, &mut growth, wanted).await?;
    #[cfg(feature = "redis")]
    measure::<redis::Redis>(&mut report, &mut growth, wanted).await?;
    report.write(&folder.join("costs.json"), wanted.effort().rounds)?;
    growth.draw(&folder)?;
    println!("\nwritten to {}", folder.display());
    Ok(report)
}

async fn measure<B: Bare>(report: &mut Report, growth: &mut Growth, wanted: &Wanted) -> Result<()> {
    let works = WORKS.iter().filter(|work| **work != "W1" && wanted.work(work)).count();
    if works == 0 || !wanted.store(B::NAME) {
        return Ok(());
    }
    report.part(B::NAME);
    let effort = wanted.effort();
    let store = B::start().await?;
    if wanted.work("W2") {
        register::register(&store, report, effort).await?;
        register::one_by_one(&store, report, effort).await?;
    }
    if wanted.work("W3") {
        follow::converge(&store, report, effort).await?;
    }
    if wanted.work("W4") {
        follow::propagate(&store, report, effort).await?;
    }
    if wanted.work("W5") {
        outlive::keep(&store, report, effort).await?;
    }
    if wanted.work("W6") {
        follow::change(&store, report, effort).await?;
    }
    if wanted.work("W7") {
        large::memory(&store, report).await?;
    }
    if wanted.work("W8") {
        outlive::wipe(&store, report, effort).await?;
    }
    if wanted.work("W9") {
        large::services(&store, report, effort).await?;
    }
    if wanted.work("W10") {
        large::estate(&store, report, effort).await?;
        store.volume(report).await?;
    }
    if wanted.growth() {
        growth.measure(&store, effort).await?;
    }
    Ok(())
}
