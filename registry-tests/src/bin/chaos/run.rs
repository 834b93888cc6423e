//! One run against one store: plays the schedule, phase by phase, and prints what came of it.

use std::{collections::BTreeMap, time::Duration};

use registry_tests::harness::Routed;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::{
    Result, Wanted,
    bounds::{Bounds, millis},
    names::READERS,
    protocol::now,
    schedule::{Schedule, Step, Who},
    stage::{OPERATION, Stage},
    timeline::PLAN,
    watch,
};

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// So long everything must be as it should be: what the ends of the faults still do shows by then.
const QUIET: Duration = Duration::from_secs(2);
/// A machine that holds up what runs on it for so long cannot tell anything.
const TOO_BUSY: Duration = Duration::from_secs(300);
/// What still happens after a violation may explain it.
const AFTERMATH: Duration = Duration::from_secs(1);

/// Runs, and prints what came of it. `false`: a promise was broken.
pub(crate) async fn run<H: Routed>(store: &'static str, wanted: &Wanted) -> Result<bool> {
    println!("{store}: {:.1} minutes, seed {}", wanted.length.as_secs_f64() / 60.0, wanted.seed);
    let bounds = Bounds::of::<H>();
    let stage = Stage::<H>::new(bounds).await?;
    let mut run = Run { stage, bounds, faults: BTreeMap::new(), changes: 0, calms: 0, longest_way: Duration::ZERO };
    let outcome = run.play(wanted).await;
    run.stage.helpers.shutdown().await;
    let checker = run.stage.desk.lock();
    if let Some(violation) = checker.violation() {
        checker.timeline.print();
        println!("{store}: BROKEN {violation}; seed {}", wanted.seed);
        return Ok(false);
    }
    outcome?;
    let faults = run.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ");
    println!(
        "{store}: {} faults ({faults}), {} changes, {} snapshots, {} looks at the store, {} times an instance was as it \
         must be, {} calm phases, the longest way there {:.1} s, seed {}",
        run.faults.values().sum::<usize>(),
        run.changes,
        checker.counts.snapshots,
        checker.counts.observations,
        checker.counts.held,
        run.calms,
        run.longest_way.as_secs_f64(),
        wanted.seed,
    );
    Ok(true)
}

struct Run<H> {
    stage: Stage<H>,
    bounds: Bounds,
    faults: BTreeMap<&'static str, usize>,
    changes: usize,
    calms: usize,
    /// The longest time from the end of all faults until everything was as it should be.
    longest_way: Duration,
}

impl<H: Routed> Run<H> {
    async fn play(&mut self, wanted: &Wanted) -> Result {
        let deadline = Instant::now() + wanted.length;
        let Stage { store, desk, gate, helpers, .. } = &mut self.stage;
        helpers.spawn(watch::review(desk.clone()));
        helpers.spawn(watch::observe(store.clone(), gate.clone(), desk.clone()));
        for reader in 0..READERS {
            self.stage.start_child(Who::Reader(reader)).await?;
        }
        let mut schedule = Schedule::new(wanted.seed, H::ttl());
        let mut steps = schedule.first();
        loop {
            self.phase(steps).await?;
            self.calm().await?;
            if Instant::now() > deadline {
                break;
            }
            steps = schedule.phase();
        }
        self.leave().await
    }

    async fn phase(&mut self, steps: Vec<Step>) -> Result {
        let start = Instant::now();
        for step in steps {
            sleep_until(start + step.at).await;
            self.check().await?;
            self.stage.note(PLAN, step.action.to_string());
            if let Some(kind) = step.action.fault() {
                *self.faults.entry(kind).or_default() += 1;
            }
            self.changes += usize::from(step.action.is_change());
            self.stage.act(step.action).await?;
        }
        Ok(())
    }

    /// No fault is left: everything becomes as it should be, for good.
    async fn calm(&mut self) -> Result {
        let (start, began) = (Instant::now(), now());
        self.stage.note(PLAN, "calm".to_owned());
        let mut since = None;
        loop {
            self.check().await?;
            let (unsettled, undisturbed) = {
                let desk = self.stage.desk.lock();
                (desk.unsettled(), now().saturating_sub(desk.ledger.last_stall().max(began)))
            };
            if unsettled.is_empty() {
                let since = *since.get_or_insert_with(Instant::now);
                if since.elapsed() >= QUIET {
                    self.longest_way = self.longest_way.max(since - start);
                    break;
                }
            } else {
                since = None;
                if start.elapsed() > TOO_BUSY {
                    return Err("this machine is too busy: what runs on it is held up all the time".into());
                }
                if undisturbed > self.bounds.calm {
                    let what = format!("not within {} ms of calm: {}", self.bounds.calm, unsettled.join("; "));
                    self.stage.desk.lock().violate(now(), what);
                }
            }
            sleep(LOOK).await;
        }
        self.calms += 1;
        self.stage.clear();
        Ok(())
    }

    /// All providers leave, and leave nothing behind.
    async fn leave(&mut self) -> Result {
        let stage = &mut self.stage;
        stage.note(PLAN, "all leave".to_owned());
        let providers: Vec<_> = stage.children.keys().copied().filter(|who| matches!(who, Who::Provider(_))).collect();
        let mut left = Vec::new();
        for who in providers {
            let child = stage.take(who)?;
            left.push(child.process);
            stage.send_away(child).await?;
        }
        self.calm().await?;
        for process in left {
            let mut desk = self.stage.desk.lock();
            if !desk.ledger.left_in_good_order(process) {
                let what = format!("{} did not leave in good order", desk.name(process));
                desk.violate(now(), what);
            }
        }
        let start = Instant::now();
        loop {
            self.check().await?;
            // Departure marks go with their sessions.
            let keys = timeout(OPERATION, self.stage.store.keys()).await?;
            if keys.is_empty() {
                return Ok(());
            }
            if millis(start.elapsed()) > self.bounds.gone_after_outage {
                self.stage.desk.lock().violate(now(), format!("left in the store: {keys:?}"));
            }
            sleep(LOOK).await;
        }
    }

    /// Ends the run once something is wrong, after a moment in which more may be heard.
    async fn check(&self) -> Result {
        if self.stage.desk.lock().violation().is_some() {
            sleep(AFTERMATH).await;
            return Err("a promise was broken".into());
        }
        Ok(())
    }
}
