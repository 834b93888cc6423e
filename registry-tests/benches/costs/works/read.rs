//! Reading what is cached.

use std::{hint::black_box, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use registry_core::{Managed, Registry};
use tokio::time::Instant;

use crate::{
    Result,
    measured::{Allocations, Measured},
    report::Report,
    samples::{Samples, Unit},
    works::{Effort, follow, instances, register_all, until},
};

const READS: u32 = 200_000;

/// Reading the cached set of 100 instances.
pub(crate) async fn reads(report: &mut Report, effort: Effort) -> Result<()> {
    let registry: Arc<dyn Registry> = Arc::new(Managed::memory("memory://reads")?);
    register_all(&*registry, instances(100)).await?;
    let mut watcher = follow(&*registry, "orders").await?;
    until(&mut watcher, 100).await?;
    let handle = watcher.handle();
    let swap = ArcSwap::from_pointee(handle.current().clone());
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    let (mut ours_of_four, mut floor_of_four) = (Samples::default(), Samples::default());
    let mut by_name = Samples::default();
    for _ in 0..effort.rounds {
        let load = || _ = black_box(swap.load().len());
        let read = || _ = black_box(handle.current().len());
        floor.time(each(1, load));
        ours.time(each(1, read));
        floor_of_four.time(each(4, load));
        ours_of_four.time(each(4, read));
        let began = Instant::now();
        for _ in 0..READS {
            black_box(registry.discover(black_box("orders")).await?.len());
        }
        by_name.time(began.elapsed() / READS);
    }
    let work = "read the set of 100 by handle (floor: `ArcSwap::load`)";
    report.ratio("W1", work, Unit::Seconds, &ours, &floor, 2.0);
    report.ratio("W1", "the same by four threads, each", Unit::Seconds, &ours_of_four, &floor_of_four, 2.0);
    let work = "`discover` by name through `Arc<dyn Registry>`";
    report.bound("W1", work, Unit::Seconds, &by_name, Some(&floor), 150e-9);

    let mut measured = Measured::start(&["reads"])?;
    let Allocations { by_handle, by_name, picks } = measured.answer().await?;
    measured.end().await?;
    report.bound("W1", "allocations of 1000 reads by handle", Unit::Count, &Samples::of(by_handle), None, 0.0);
    report.bound("W1", "allocations of 1000 picks", Unit::Count, &Samples::of(picks), None, 0.0);
    // The future of an async method of a trait object is one.
    report.bound("W1", "allocations of 1000 `discover` by name", Unit::Count, &Samples::of(by_name), None, 1000.0);
    Ok(())
}

/// The time of one call of `work` on each of so many threads at once, from many.
fn each(threads: usize, work: impl Fn() + Sync) -> Duration {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| (0..READS).for_each(|_| work()));
        }
    });
    began.elapsed() / READS
}
