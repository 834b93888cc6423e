//! The store, the children and their networks, and all that can be done to them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use registry_tests::{
    clock::ClockMaker,
    conformance::support,
    harness::{Link, Routed},
    servers::Watchdog,
};
use tokio::{sync::RwLock, task::JoinSet, time::timeout};

use crate::{
    Result,
    bounds::{self, Bounds},
    checker::Checker,
    child,
    ledger::{Process, Trouble},
    names::{Generation, INSTANCES, Name},
    process::{Desk, Running},
    protocol::{Order, now},
    schedule::{Action, Who},
    timeline::PLAN,
};

/// What a bare client does is done by then.
pub(crate) const OPERATION: Duration = Duration::from_secs(25);

pub(crate) struct Stage<H> {
    pub(crate) store: Arc<H>,
    pub(crate) desk: Desk,
    /// Read by those who ask the store, written by those who harm it.
    pub(crate) gate: Arc<RwLock<()>>,
    /// What goes on beside the schedule.
    pub(crate) helpers: JoinSet<()>,
    pub(crate) children: BTreeMap<Who, Running>,
    /// Those that were superseded.
    superseded: BTreeMap<usize, Running>,
    /// How many processes played the part of each so far.
    parts: BTreeMap<Who, usize>,
    /// The network of every process, also of those that have ended: what they sent may be in it.
    links: BTreeMap<Process, Box<dyn Link>>,
    /// Whose network is harmed, and how.
    harmed: BTreeMap<Who, (Process, Trouble)>,
    /// Options of the children.
    options: String,
    clocks: Option<ClockMaker>,
    /// Ends the children if this process is ended.
    watchdog: Watchdog,
}

impl<H: Routed> Stage<H> {
    /// A store, and nobody there.
    pub(crate) async fn new(bounds: Bounds) -> Result<Self> {
        Ok(Self {
            store: Arc::new(H::with_own_server().await),
            desk: Desk::new(Checker::new(bounds, now())),
            gate: Arc::default(),
            helpers: JoinSet::new(),
            children: BTreeMap::new(),
            superseded: BTreeMap::new(),
            parts: BTreeMap::new(),
            links: BTreeMap::new(),
            harmed: BTreeMap::new(),
            options: bounds::query(&support::options::<H>()),
            clocks: if cfg!(target_os = "linux") { Some(ClockMaker::new().await?) } else { None },
            watchdog: Watchdog::new(":")?,
        })
    }

    /// Does one thing of the schedule.
    pub(crate) async fn act(&mut self, action: Action) -> Result {
        match action {
            Action::KillStore => {
                let _gate = self.gate.clone().write_owned().await;
                self.desk.lock().ledger.store_away();
                self.store.kill().await;
            }
            Action::RestartStore => {
                self.store.restart().await;
                self.store_is_back();
            }
            Action::WipeStore => {
                let _gate = self.gate.clone().write_owned().await;
                self.desk.lock().ledger.store_away();
                self.store.wipe().await;
                self.store_is_back();
            }
            Action::FreezeStore => {
                let _gate = self.gate.clone().write_owned().await;
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
            Action::RestartReader(reader) => {
                let who = Who::Reader(reader);
                let child = self.take(who)?;
                self.kill(child).await?;
                self.start_child(who).await?;
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

    pub(crate) async fn start_child(&mut self, who: Who) -> Result {
        let part = self.parts.entry(who).or_default();
        *part += 1;
        let (name, role) = match who {
            Who::Provider(provider) => (format!("p{provider}.{part}"), child::PROVIDER),
            Who::Reader(reader) => (format!("r{reader}.{part}"), child::READER),
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
    pub(crate) fn take(&mut self, who: Who) -> Result<Running> {
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
    pub(crate) async fn send_away(&mut self, mut child: Running) -> Result {
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

    // What an operator does past the library.

    async fn delete(&self, name: Name) {
        let _gate = self.gate.read().await;
        self.desk.lock().ledger.deleting(name);
        let store = self.store.clone();
        self.operate(async move { store.delete(&name.key()).await }).await;
        self.desk.lock().ledger.deleted(name, now());
    }

    /// Everything of its provider goes.
    async fn end_session(&self, name: Name) -> Result {
        let process = self.child(Who::Provider(name.provider))?.process;
        let _gate = self.gate.read().await;
        let all = (0..INSTANCES).map(|number| Name { provider: name.provider, number });
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

    /// Drops the networks of those that have ended, once what they sent has arrived.
    pub(crate) fn clear(&mut self) {
        let desk = self.desk.clone();
        let checker = desk.lock();
        self.links.retain(|process, _| !checker.ledger.has_ended(*process));
    }

    pub(crate) fn note(&self, who: impl AsRef<str>, what: String) {
        self.desk.lock().timeline.note(now(), who.as_ref(), what);
    }

    fn name(&self, process: Process) -> String {
        self.desk.lock().name(process).to_owned()
    }
}
