//! One run against one store: starts it and the children, does what the schedule says, and asks the checker.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use registry_core::{Content, Directory, Layout, NativeLayout};
use registry_tests::{
    clock::ClockMaker,
    conformance::support,
    harness::{Harness, Link, Routed},
    servers::Watchdog,
};
use tokio::{
    sync::RwLock,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    Result, Wanted,
    bounds::{self, Bounds, millis},
    checker::Checker,
    child,
    ledger::{Process, Trouble},
    names::{self, Generation, Name, READERS},
    process::{Desk, Running},
    protocol::{Order, now},
    schedule::{Action, Schedule, Step, Who},
};

/// The schedule, in the timeline.
const PLAN: &str = "plan";
/// How often the store is read past the library.
const OBSERVE: Duration = Duration::from_millis(500);
/// How often it is seen to that nothing is held up, and suspicions are looked at again.
const REVIEW: Duration = Duration::from_millis(100);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// So long it must stay calm.
const QUIET: Duration = Duration::from_secs(2);
/// What a bare client does is done by then.
const OPERATION: Duration = Duration::from_secs(25);
/// What still happens after a violation may explain it.
const AFTERMATH: Duration = Duration::from_secs(1);

/// Runs, and prints what came of it. `false`: a promise was broken.
pub(crate) async fn run<H: Routed>(store: &'static str, wanted: &Wanted) -> Result<bool> {
    println!("{store}: {:.1} minutes, seed {}", wanted.length.as_secs_f64() / 60.0, wanted.seed);
    let mut run = Run::<H>::start().await?;
    let outcome = run.play(wanted).await;
    run.helpers.shutdown().await;
    let desk = run.desk.clone();
    let checker = desk.lock();
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
        run.worst.as_secs_f64(),
        wanted.seed,
    );
    Ok(true)
}

struct Run<H> {
    store: Arc<H>,
    desk: Desk,
    bounds: Bounds,
    /// Options of the children.
    options: String,
    /// Read by those who ask the store, written by those who harm it.
    store_gate: Arc<RwLock<()>>,
    helpers: JoinSet<()>,
    clocks: Option<ClockMaker>,
    /// Ends the children if this process is ended.
    watchdog: Watchdog,
    children: BTreeMap<Who, Running>,
    /// Those that were superseded.
    superseded: BTreeMap<usize, Running>,
    /// How many processes played the part of each so far.
    parts: BTreeMap<Who, usize>,
    /// The network of every process, also of those that have ended: what they sent may be in it.
    links: BTreeMap<Process, Box<dyn Link>>,
    /// Whose network is harmed, and how.
    harmed: BTreeMap<Who, (Process, Trouble)>,
    faults: BTreeMap<&'static str, usize>,
    changes: usize,
    calms: usize,
    /// The longest time from the end of all faults until everything was as it should be.
    worst: Duration,
}

impl<H: Routed> Run<H> {
    async fn start() -> Result<Self> {
        let bounds = Bounds::of::<H>();
        let run = Self {
            store: Arc::new(H::with_own_server().await),
            desk: Desk::new(Checker::new(bounds, now())),
            bounds,
            options: bounds::query(&support::options::<H>()),
            store_gate: Arc::default(),
            helpers: JoinSet::new(),
            clocks: if cfg!(target_os = "linux") { Some(ClockMaker::new().await?) } else { None },
            watchdog: Watchdog::new(":")?,
            children: BTreeMap::new(),
            superseded: BTreeMap::new(),
            parts: BTreeMap::new(),
            links: BTreeMap::new(),
            harmed: BTreeMap::new(),
            faults: BTreeMap::new(),
            changes: 0,
            calms: 0,
            worst: Duration::ZERO,
        };
        Ok(run)
    }

    async fn play(&mut self, wanted: &Wanted) -> Result {
        let deadline = Instant::now() + wanted.length;
        self.helpers.spawn(review(self.desk.clone()));
        self.helpers.spawn(observe(self.store.clone(), self.store_gate.clone(), self.desk.clone()));
        for reader in 0..READERS {
            self.start_child(Who::Reader(reader)).await?;
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
            self.note(PLAN, step.action.to_string());
            if let Some(kind) = step.action.fault() {
                *self.faults.entry(kind).or_default() += 1;
            }
            self.changes += usize::from(step.action.is_change());
            self.act(step.action).await?;
        }
        Ok(())
    }

    async fn act(&mut self, action: Action) -> Result {
        match action {
            Action::KillStore => {
                let _gate = self.store_gate.clone().write_owned().await;
                self.desk.lock().ledger.store_away();
                self.store.kill().await;
            }
            Action::RestartStore => {
                self.store.restart().await;
                self.store_is_back();
            }
            Action::WipeStore => {
                let _gate = self.store_gate.clone().write_owned().await;
                self.desk.lock().ledger.store_away();
                self.store.wipe().await;
                self.store_is_back();
            }
            Action::FreezeStore => {
                let _gate = self.store_gate.clone().write_owned().await;
                self.desk.lock().ledger.store_away();
                self.store.freeze().await;
            }
            Action::ThawStore => {
                self.store.thaw().await;
                self.store_is_back();
            }
            Action::Cut(who) => self.harm(who, Trouble::Cut, |link| link.cut())?,
            Action::Hang(who) => self.harm(who, Trouble::Cut, |link| link.hang())?,
            Action::Delay(who, by) => self.harm(who, Trouble::Slow, |link| link.delay(by))?,
            Action::Heal(who) => self.heal(who),
            Action::Stop(who) => {
                let child = self.child(who)?;
                self.desk.lock().ledger.harmed(child.process, Trouble::Stopped, now());
                child.signal("STOP").await?;
            }
            Action::Continue(who) => self.go_on(self.child(who)?).await?,
            Action::Kill(provider) => {
                let child = self.take(Who::Provider(provider))?;
                self.kill(child).await?;
            }
            Action::Start(provider, all) => {
                let who = Who::Provider(provider);
                self.start_child(who).await?;
                self.register(who, &all).await?;
            }
            Action::Supersede(provider, all) => {
                let who = Who::Provider(provider);
                let old = self.take(who)?;
                self.superseded.insert(provider, old);
                self.start_child(who).await?;
                self.register(who, &all).await?;
            }
            Action::ContinueSuperseded(provider) => {
                let old = self.superseded.get(&provider).ok_or("nobody was superseded")?;
                self.go_on(old).await?;
            }
            Action::EndSuperseded { provider, in_good_order } => {
                let old = self.superseded.remove(&provider).ok_or("nobody was superseded")?;
                if in_good_order { self.send_away(old).await? } else { self.kill(old).await? }
            }
            Action::Leave(provider) => {
                let child = self.take(Who::Provider(provider))?;
                self.send_away(child).await?;
            }
            Action::Jump(provider, seconds) => {
                if let Some(clock) = &self.child(Who::Provider(provider))?.clock {
                    clock.set(seconds)?;
                }
            }
            Action::Delete(name) => self.delete(name).await,
            Action::EndSession(name) => self.end_session(name).await?,
            Action::Register(name, generation) => {
                self.register(Who::Provider(name.provider), &[(name, generation)]).await?;
            }
            Action::Unregister(name) => {
                let who = Who::Provider(name.provider);
                let process = self.child(who)?.process;
                let order = self.desk.lock().ledger.ordered(process, &[(name, None)], now());
                self.note(self.name(process), format!("order {order}: unregister {name}"));
                let service = name.service().to_owned();
                self.child_mut(who)?.tell(&Order::Unregister { order, service, id: name.id() }).await?;
            }
        }
        Ok(())
    }

    fn store_is_back(&self) {
        self.note("store", "is back".to_owned());
        self.desk.lock().ledger.store_back(now());
    }

    // Children.

    async fn start_child(&mut self, who: Who) -> Result {
        let part = self.parts.entry(who).or_default();
        *part += 1;
        let (name, role) = match who {
            Who::Provider(provider) => (format!("p{provider}.{part}"), child::PROVIDER),
            Who::Reader(reader) => (format!("r{reader}"), child::READER),
        };
        let (url, link) = self.store.route(&self.options).await;
        let is_reader = matches!(who, Who::Reader(_));
        let clock = self.clocks.as_ref().filter(|_| !is_reader).map(|clocks| clocks.clock(0)).transpose()?;
        let process = self.desk.lock().started(name, is_reader, now());
        self.links.insert(process, link);
        let child = Running::start(&self.desk, process, role, &url, clock)?;
        if self.children.insert(who, child).is_some() {
            return Err(format!("{who:?} runs already").into());
        }
        self.watch_over();
        Ok(())
    }

    /// Tells the watchdog whom to end.
    fn watch_over(&self) {
        let children = self.children.values().chain(self.superseded.values()).filter_map(Running::id);
        let ids: Vec<_> = children.map(|id| id.to_string()).collect();
        self.watchdog.set(&if ids.is_empty() { ":".to_owned() } else { format!("kill -9 {}", ids.join(" ")) });
    }

    fn child(&self, who: Who) -> Result<&Running> {
        self.children.get(&who).ok_or_else(|| format!("there is no {who:?}").into())
    }

    fn child_mut(&mut self, who: Who) -> Result<&mut Running> {
        self.children.get_mut(&who).ok_or_else(|| format!("there is no {who:?}").into())
    }

    /// The caller ends it, or keeps it somewhere else.
    fn take(&mut self, who: Who) -> Result<Running> {
        self.children.remove(&who).ok_or_else(|| format!("there is no {who:?}").into())
    }

    async fn register(&mut self, who: Who, all: &[(Name, Generation)]) -> Result {
        if all.is_empty() {
            return Ok(());
        }
        let process = self.child(who)?.process;
        let wanted: Vec<_> = all.iter().map(|(name, generation)| (*name, Some(*generation))).collect();
        let order = self.desk.lock().ledger.ordered(process, &wanted, now());
        let spelled: String = all.iter().map(|(name, generation)| format!(" {name}@{generation}")).collect();
        self.note(self.name(process), format!("order {order}: register{spelled}"));
        let instances =
            all.iter().map(|(name, generation)| (name.service().to_owned(), name.id(), *generation)).collect();
        self.child_mut(who)?.tell(&Order::Register { order, instances }).await
    }

    async fn go_on(&self, child: &Running) -> Result {
        child.signal("CONT").await?;
        self.desk.lock().ledger.mended(child.process, Trouble::Stopped, now());
        Ok(())
    }

    async fn kill(&mut self, child: Running) -> Result {
        let process = child.process;
        {
            let mut desk = self.desk.lock();
            desk.ending(process);
            desk.ledger.harmed(process, Trouble::Stopped, now());
        }
        // Not before the watchdog forgets its number, which may be another's from then on.
        self.watch_over();
        child.kill().await?;
        self.desk.lock().killed(process, now());
        Ok(())
    }

    /// Tells a provider to leave, and waits for it beside everything else.
    async fn send_away(&mut self, mut child: Running) -> Result {
        let process = child.process;
        let order = {
            let mut desk = self.desk.lock();
            desk.ending(process);
            desk.ledger.leaving(process, now())
        };
        self.note(self.name(process), format!("order {order}: leave"));
        child.tell(&Order::Leave { order }).await?;
        self.watch_over();
        let desk = self.desk.clone();
        self.helpers.spawn(async move {
            if let Err(error) = child.end().await {
                desk.lock().violate(now(), format!("a provider that leaves does not end: {error}"));
            }
            desk.lock().left(process, now());
        });
        Ok(())
    }

    fn harm(&mut self, who: Who, trouble: Trouble, harm: impl FnOnce(&dyn Link)) -> Result {
        let process = self.child(who)?.process;
        let link = self.links.get(&process).ok_or("it has no network")?;
        self.desk.lock().ledger.harmed(process, trouble, now());
        harm(&**link);
        self.harmed.insert(who, (process, trouble));
        Ok(())
    }

    /// Its network may be that of a process that has ended.
    fn heal(&mut self, who: Who) {
        if let Some((process, trouble)) = self.harmed.remove(&who)
            && let Some(link) = self.links.get(&process)
        {
            link.heal();
            self.desk.lock().ledger.mended(process, trouble, now());
        }
    }

    // Operators.

    async fn delete(&self, name: Name) {
        let _gate = self.store_gate.read().await;
        self.desk.lock().ledger.deleting(name);
        let store = self.store.clone();
        self.operate(async move { store.delete(&name.key()).await }).await;
        self.desk.lock().ledger.deleted(name, now());
    }

    /// Everything of its provider goes.
    async fn end_session(&self, name: Name) -> Result {
        let process = self.child(Who::Provider(name.provider))?.process;
        let _gate = self.store_gate.read().await;
        let all = (0..names::INSTANCES).map(|number| Name { provider: name.provider, number });
        all.clone().for_each(|name| self.desk.lock().ledger.deleting(name));
        let store = self.store.clone();
        self.operate(async move {
            if store.raw(&name.key()).await.is_some() {
                store.end_session(&name.key()).await;
            }
        })
        .await;
        let mut desk = self.desk.lock();
        desk.ledger.stalled(process, now());
        all.for_each(|name| desk.ledger.deleted(name, now()));
        Ok(())
    }

    /// A task of its own: what goes while it is looked at makes the bare client panic.
    async fn operate(&self, operation: impl Future<Output = ()> + Send + 'static) {
        let done = timeout(OPERATION, tokio::spawn(operation)).await;
        if !matches!(done, Ok(Ok(()))) {
            self.note(PLAN, "the operator came too late".to_owned());
        }
    }

    // Calm.

    /// No fault is left: everything becomes as it should be, and stays so.
    async fn calm(&mut self) -> Result {
        let start = Instant::now();
        self.note(PLAN, "calm".to_owned());
        loop {
            self.check().await?;
            let unsettled = self.desk.lock().unsettled();
            if unsettled.is_empty() {
                break;
            }
            if millis(start.elapsed()) > self.bounds.calm {
                let what = format!("not within {} ms of calm: {}", self.bounds.calm, unsettled.join("; "));
                self.desk.lock().violate(now(), what);
            }
            sleep(LOOK).await;
        }
        self.worst = self.worst.max(start.elapsed());
        self.calms += 1;
        let quiet = Instant::now() + QUIET;
        while Instant::now() < quiet {
            self.check().await?;
            let unsettled = self.desk.lock().unsettled();
            if !unsettled.is_empty() {
                let what = format!("it did not stay calm: {}", unsettled.join("; "));
                self.desk.lock().violate(now(), what);
            }
            sleep(LOOK).await;
        }
        // What is sent by those that have ended has arrived.
        let desk = self.desk.clone();
        let checker = desk.lock();
        self.links.retain(|process, _| !checker.ledger.has_ended(*process));
        Ok(())
    }

    /// All providers leave, and leave nothing behind.
    async fn leave(&mut self) -> Result {
        self.note(PLAN, "all leave".to_owned());
        let providers: Vec<_> = self.children.keys().copied().filter(|who| matches!(who, Who::Provider(_))).collect();
        let mut left = Vec::new();
        for who in providers {
            let child = self.take(who)?;
            left.push(child.process);
            self.send_away(child).await?;
        }
        self.calm().await?;
        for process in left {
            let mut desk = self.desk.lock();
            if !desk.ledger.left_in_good_order(process) {
                let what = format!("{} did not leave in good order", desk.name(process));
                desk.violate(now(), what);
            }
        }
        let start = Instant::now();
        loop {
            self.check().await?;
            // Departure marks go with their sessions.
            let keys = timeout(OPERATION, self.store.keys()).await?;
            if keys.is_empty() {
                return Ok(());
            }
            if millis(start.elapsed()) > self.bounds.gone_after_outage {
                self.desk.lock().violate(now(), format!("left in the store: {keys:?}"));
            }
            sleep(LOOK).await;
        }
    }

    /// Ends the run once something is wrong, after a moment in which more may be heard.
    async fn check(&self) -> Result {
        if self.desk.lock().violation().is_some() {
            sleep(AFTERMATH).await;
            return Err("a promise was broken".into());
        }
        Ok(())
    }

    fn note(&self, who: impl AsRef<str>, what: String) {
        self.desk.lock().timeline.note(now(), who.as_ref(), what);
    }

    fn name(&self, process: Process) -> String {
        self.desk.lock().name(process).to_owned()
    }
}

/// Sees that nothing is held up, and looks at suspicions again.
async fn review(desk: Desk) {
    loop {
        let due = Instant::now() + REVIEW;
        sleep_until(due).await;
        let late = millis(due.elapsed());
        desk.lock().review(late, now());
    }
}

/// Reads the store past the library, all the time that it is there.
async fn observe<H: Routed>(store: Arc<H>, gate: Arc<RwLock<()>>, desk: Desk) {
    loop {
        sleep(OBSERVE).await;
        let _gate = gate.read().await;
        if !desk.lock().ledger.store_is_there() {
            continue;
        }
        let at = now();
        match timeout(OPERATION, tokio::spawn(held(store.clone()))).await {
            Ok(Ok(held)) => desk.lock().observed(at, held),
            Ok(Err(error)) => desk.lock().violate(now(), format!("the store cannot be read: {error}")),
            Err(_) => desk.lock().violate(now(), format!("the store was not read within {OPERATION:?}")),
        }
    }
}

/// All instances in the store: service, id and generation. What cannot be read was registered by nobody.
async fn held<H: Harness>(store: Arc<H>) -> Vec<(String, String, Generation)> {
    let paths = store.keys().await;
    let keys = paths.iter().filter_map(|path| match NativeLayout.place(path) {
        Some(registry_core::Place::Record(key)) if key.directory == Directory::Providers => Some(key),
        _ => None,
    });
    let keys: Vec<_> = keys.collect();
    let read = keys.iter().map(async |key| Some((key, support::record(&*store, key).await?)));
    let records = join_all(read).await.into_iter().flatten();
    let found = records.map(|(key, record)| {
        let generation = match &record.content {
            Content::Instance(instance) => names::generation(instance),
            _ => None,
        };
        (key.service.to_string(), key.id.to_string(), generation.unwrap_or(0))
    });
    found.collect()
}
