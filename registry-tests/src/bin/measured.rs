//! A process that does one thing, so that what it costs can be told from what everything else costs. The benchmark starts
//! it and reads what it prints, one JSON object a line:
//!
//! ```text
//! measured reads                        allocations of reading a view and of picking from it
//! measured keep URL COUNT SECONDS       processor time of keeping so many registrations alive for so long
//! measured follow URL SERVICES EACH     memory and time to follow so many services with so many instances each; for each
//!                                       line on its standard input, what it has used since the line before
//! ```

#![allow(missing_docs, reason = "a program")]

use std::{alloc::System, hint::black_box, time::Duration};

use service_registry::{
    Freshness, Instance,
    balance::{Balancer, Strategy},
    connect,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::time::Instant;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

/// Nothing that is measured takes longer.
const AT_MOST: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match *args.as_slice() {
        ["reads"] => reads().await,
        ["keep", url, count, seconds] => keep(url, count.parse()?, Duration::from_secs(seconds.parse()?)).await,
        ["follow", url, services, each] => follow(url, services.parse()?, each.parse()?).await,
        _ => Err("usage: measured reads | keep URL COUNT SECONDS | follow URL SERVICES EACH".into()),
    }
}

/// How many allocations a thousand reads by handle make, a thousand by name, and a thousand picks.
async fn reads() -> Result<()> {
    let registry = connect("memory://reads").await?;
    for id in 0..100 {
        registry.register(Instance::builder("orders", format!("{id}")).build()?).await?;
    }
    let watcher = registry.watch("orders").await?;
    let handle = watcher.handle();
    let balancer = Balancer::new(watcher, Strategy::RoundRobin)?;
    let by_handle = allocations(|| _ = black_box(handle.current().len()));
    let picks = allocations(|| drop(black_box(balancer.pick())));
    let region = Region::new(ALLOCATOR);
    for _ in 0..1000 {
        black_box(registry.discover(black_box("orders")).await?.len());
    }
    let by_name = region.change().allocations;
    print(&serde_json::json!({ "by_handle": by_handle, "picks": picks, "by_name": by_name }));
    Ok(())
}

/// The least of a few times: other threads allocate, too, now and then.
fn allocations(work: impl Fn()) -> usize {
    // What a thread needs once.
    work();
    let once = || {
        let region = Region::new(ALLOCATOR);
        (0..1000).for_each(|_| work());
        region.change().allocations
    };
    (0..5).map(|_| once()).min().unwrap_or_default()
}

async fn keep(url: &str, count: usize, long: Duration) -> Result<()> {
    let registry = connect(url).await?;
    let all = (0..count).map(|id| Instance::builder("kept", format!("{id:06}")).build()).collect::<Result<_, _>>()?;
    for outcome in registry.register_all(all).await {
        outcome?;
    }
    // Once by hand, which leaves nothing to be found at the first regular one.
    registry.heartbeat().await?;
    let before = Used::now();
    tokio::time::sleep(long).await;
    print(&before.until_now());
    registry.destroy().await?;
    Ok(())
}

async fn follow(url: &str, services: usize, each: usize) -> Result<()> {
    let registry = connect(url).await?;
    // Connected, and everything that is made once is there.
    drop(registry.watch("nobody").await?);
    let (region, resident, began) = (Region::new(ALLOCATOR), resident(), Instant::now());
    let mut watchers = Vec::with_capacity(services);
    // As a gateway does at its start: many at once, but not all.
    for chunk in (0..services).collect::<Vec<_>>().chunks(100) {
        let names = chunk.iter().map(|index| format!("service-{index:04}"));
        let watched = names.map(async |name| registry.watch(&name).await);
        watchers.extend(futures::future::try_join_all(watched).await?);
    }
    let loaded = async {
        for watcher in &mut watchers {
            while watcher.current().len() < each || watcher.current().freshness() == Freshness::Pending {
                watcher.next().await.ok_or("the registry is gone")?;
            }
        }
        Ok::<_, Error>(())
    };
    tokio::time::timeout(AT_MOST, loaded).await??;
    let took = began.elapsed().as_secs_f64();
    // What loading needed for a moment is given back meanwhile.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stats = region.change();
    print(&serde_json::json!({
        "seconds": took,
        "allocated": stats.bytes_allocated as f64 - stats.bytes_deallocated as f64,
        "resident": self::resident() - resident,
    }));
    let mut before = Used::now();
    while tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await?? > 0 {
        print(&before.until_now());
        before = Used::now();
    }
    Ok(registry.destroy().await?)
}

/// What the process has used so far.
struct Used {
    at: Instant,
    /// Of a processor, in seconds.
    processor: f64,
    /// How often a thread of it waited and was woken.
    wakes: f64,
}

impl Used {
    fn now() -> Self {
        let (mut nanos, mut wakes) = (0.0, 0.0);
        for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
            nanos +=
                read("schedstat").split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok()).unwrap_or_default();
            let status = read("status");
            let waited = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            wakes += waited.and_then(|count| count.trim().parse::<f64>().ok()).unwrap_or_default();
        }
        Self { at: Instant::now(), processor: nanos / 1e9, wakes }
    }

    fn until_now(&self) -> serde_json::Value {
        let now = Self::now();
        serde_json::json!({
            "seconds": (now.at - self.at).as_secs_f64(),
            "processor": now.processor - self.processor,
            "wakes": now.wakes - self.wakes,
        })
    }
}

/// The memory that the process has, in bytes.
fn resident() -> f64 {
    registry_tests::conformance::support::resident_mib() * 1024.0 * 1024.0
}

#[allow(clippy::print_stdout, reason = "what it is for")]
fn print(figures: &serde_json::Value) {
    println!("{figures}");
}
