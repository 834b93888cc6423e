//! What keeping alive costs, and coming back.

use std::time::Duration;

use registry_tests::proxy::FaultProxy;
use tokio::time::{Instant, sleep};

use crate::{
    Result,
    bare::{Bare, Writer, entries},
    measured::{Measured, Used},
    report::Report,
    samples::{Samples, Unit},
    works::{Effort, follow, instances, register_all, until, url},
};

/// The default.
const TTL: Duration = Duration::from_secs(15);
/// How long the server is away.
const DOWN: Duration = Duration::from_secs(10);

/// A thousand instances kept alive: what goes to the server, and what that takes of a processor.
pub(crate) async fn keep<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    let beats = if effort.quick { 3 } else { 12 };
    // It leaves in good order when that is over: not while it is looked at.
    let long = TTL / 3 * (beats + 1);
    let at = store.server().addr();
    let (ours, floor) = (FaultProxy::start(at).await?, FaultProxy::start(at).await?);
    let options = format!("ttl={}s&reconcile=1h", TTL.as_secs());
    let seconds = long.as_secs().to_string();
    let mut measured = Measured::start(&["keep", &url(store, ours.addr(), "kept", &options), "1000", &seconds])?;
    let bare = store.writer(floor.addr(), "kept-floor", 1000).await?;
    bare.write_all(entries("kept-floor", 1000)).await?;
    // Both have written and are quiet.
    sleep(TTL / 3).await;
    let before = (ours.stats(), floor.stats());
    for _ in 0..beats - 1 {
        bare.keep_alive().await?;
        sleep(TTL / 3).await;
    }
    let after = (ours.stats(), floor.stats());
    let used: Used = measured.answer().await?;
    measured.end().await?;
    bare.end().await?;

    let each = |count: u64| Samples::of(count as f64 / f64::from(beats - 1));
    let (mine, least) = (after.0.requests - before.0.requests, after.1.requests - before.1.requests);
    let work = "1000 kept alive: requests each heartbeat (floor: the client's own)";
    report.bound("W5", work, Unit::Count, &each(mine), Some(&each(least)), 1.2 * each(least).median());
    let (mine, least) = (after.0.to_server - before.0.to_server, after.1.to_server - before.1.to_server);
    report.figure("W5", "the same: bytes to the server each heartbeat", Unit::Bytes, &each(mine), Some(&each(least)));
    let share = Samples::of(used.processor / used.seconds);
    report.bound("W5", "the same: of one processor, by the client", Unit::Share, &share, None, 0.001);
    Ok(())
}

/// The server is killed and wiped, and comes back after a while: how long until it has everybody back, with nobody missing
/// at a reader meanwhile.
pub(crate) async fn wipe<B: Bare>(store: &B, report: &mut Report, effort: Effort) -> Result<()> {
    const COUNT: usize = 100;
    let mut back = Samples::default();
    for round in 0..if effort.quick { 1 } else { 3 } {
        let prefix = format!("wiped-{round}");
        let (writer, reader) = (store.connect(&prefix)?, store.connect(&prefix)?);
        register_all(&*writer, instances(COUNT)).await?;
        let mut watcher = follow(&*reader, "orders").await?;
        until(&mut watcher, COUNT).await?;
        let least = tokio::spawn(async move {
            let mut least = COUNT;
            while let Some(snapshot) = watcher.next().await {
                least = least.min(snapshot.len());
            }
            least
        });
        store.server().kill().await?;
        sleep(DOWN).await;
        store.server().wipe().await?;
        let returned = Instant::now();
        let judge = store.connect(&prefix)?;
        let mut judging = follow(&*judge, "orders").await?;
        until(&mut judging, COUNT).await?;
        back.time(returned.elapsed());
        // The reader first: it would see the others leave.
        reader.destroy().await?;
        let least = least.await?;
        judge.destroy().await?;
        writer.destroy().await?;
        if least < COUNT {
            return Err(format!("a reader saw only {least} of {COUNT} while the server was away").into());
        }
    }
    let most = (TTL / 3 + Duration::from_secs(1)).as_secs_f64();
    let work = "100 back in a server that was away for 10 s and is empty, after it serves again";
    report.bound("W8", work, Unit::Seconds, &back, None, most);
    Ok(())
}
