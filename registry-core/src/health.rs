//! Registration by health: an instance takes traffic only while its checks say that it can.
//!
//! [`gate`] registers an instance as [`Starting`](Status::Starting), which readers see and do not call, and then sets its
//! status by a [`Check`] that it makes again and again:
//!
//! ```text
//! Starting           ──rise──▶ Up
//! Starting, Up       ──fall──▶ Down ──unregister_after──▶ Unregistered
//! Down, Unregistered ──rise──▶ Up
//! ```
//!
//! * **Checks** begin at once, whether the store answers or not, and never overlap. From the beginning of one to that of
//!   the next passes an [`interval`](Config::interval), give or take the [`jitter`](Config::jitter), or the time that the
//!   first one takes, if that is longer. One that returns an error, panics, or takes longer than its [`timeout`](Config::timeout) has
//!   failed. One that is cut is dropped; one that blocks its thread cannot be cut.
//! * **Thresholds** count in a row: [`rise`](Config::rise) successes make an instance `Up`, [`fall`](Config::fall)
//!   failures make it `Down`, and one outcome of the other kind starts the count anew. Nothing else changes anything.
//! * **Out wins.** What somebody else took out of traffic stays out: a registration that is `Draining`, or that another
//!   hand than the gate's has set `Down`, is left as it is, and not unregistered either. Register it as `Starting` to
//!   hand it back to the gate. And what has not passed its checks is out, even if somebody registered it as `Up`.
//! * **Everything but the status** is whatever was registered last: weight, metadata and endpoints may change meanwhile.
//! * **The end.** A gate ends with its registration: when somebody unregisters it, or destroys the registry. While the
//!   gate itself has unregistered it, `unregister` finds nothing to do: stop the gate instead.
//!
//! A key that another owner took is not fought for: while a registration is lost for this reason, the gate leaves it
//! alone.
//!
//! There is [`TcpCheck`], and every closure that returns a future is a check. HTTP and gRPC need clients that this crate
//! does not have: a closure over yours is a check, too.

use std::{error::Error as StdError, future::ready, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, stream, stream::BoxStream};
use rand::Rng;
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::{oneshot, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};

use crate::{
    Error, ErrorKind, Instance, Key, RegistrationState, Registry, Result, Status, async_trait,
    options::{self, human, human_option},
};

/// Why a check failed.
pub type Failure = Box<dyn StdError + Send + Sync>;

/// Tells whether an instance can take traffic.
///
/// Every closure that returns a future of `Result<(), Failure>` is one.
///
/// # Examples
/// ```
/// use registry_core::{async_trait, health::{Check, Failure}};
///
/// struct Disk;
///
/// #[async_trait]
/// impl Check for Disk {
///     async fn check(&self) -> Result<(), Failure> {
///         std::fs::metadata("/").map(drop).map_err(Into::into)
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let queue = || async { Err("the queue is full".into()) };
/// assert!(Disk.check().await.is_ok());
/// assert_eq!(queue.check().await.unwrap_err().to_string(), "the queue is full");
/// # }
/// ```
#[async_trait]
pub trait Check: Send + Sync + 'static {
    /// Looks once.
    ///
    /// # Errors
    /// Why the instance cannot take traffic, for the log and for [`GateState`].
    ///
    /// # Cancel safety
    /// It is dropped when its time is over, at any await.
    async fn check(&self) -> Result<(), Failure>;
}

#[async_trait]
impl<F, R> Check for F
where
    F: Fn() -> R + Send + Sync + 'static,
    R: Future<Output = Result<(), Failure>> + Send + 'static,
{
    async fn check(&self) -> Result<(), Failure> {
        self().await
    }
}

/// Whether somebody takes TCP connections at an address. The connection is closed at once.
///
/// # Examples
/// ```
/// use registry_core::health::{Check, TcpCheck};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let check = TcpCheck::new(listener.local_addr()?.to_string());
/// assert!(check.check().await.is_ok());
/// drop(listener);
/// assert!(check.check().await.is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TcpCheck(String);

impl TcpCheck {
    /// Checks `host:port`; a name is resolved at each check.
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self(address.into())
    }
}

#[async_trait]
impl Check for TcpCheck {
    async fn check(&self) -> Result<(), Failure> {
        match TcpStream::connect(&self.0).await {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("cannot connect to {}: {error}", self.0).into()),
        }
    }
}

/// How often to check, and what follows from it.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use registry_core::health::Config;
///
/// let config = Config::default().interval(Duration::from_secs(1)).unregister_after(Duration::from_secs(60));
/// config.validate()?;
///
/// let error = Config::default().rise(0).validate().unwrap_err();
/// assert_eq!(error.to_string(), "invalid rise 0: expected 1 to 1000");
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Config {
    /// From the beginning of one check to the beginning of the next.
    ///
    /// Defaults to 5 s; 10 ms to 1 h.
    #[serde(with = "human")]
    pub interval: Duration,

    /// How long one check may take.
    ///
    /// Defaults to 1 s; 1 ms to 5 min.
    #[serde(with = "human")]
    pub timeout: Duration,

    /// How many successes in a row make an instance `Up`.
    ///
    /// Defaults to 2; 1 to 1000.
    pub rise: u32,

    /// How many failures in a row make an instance `Down`.
    ///
    /// Defaults to 3; 1 to 1000.
    pub fall: u32,

    /// The share of the interval by which each is longer or shorter, at random, so that many checks do not stay in step.
    ///
    /// Defaults to 0.1; 0 to 0.5.
    pub jitter: f64,

    /// How long an instance stays registered that the gate has set `Down`.
    ///
    /// Defaults to none: for ever; 1 s to 24 h.
    #[serde(with = "human_option", skip_serializing_if = "Option::is_none")]
    pub unregister_after: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
            jitter: 0.1,
            unregister_after: None,
        }
    }
}

impl Config {
    /// Sets [`interval`](Self::interval).
    #[must_use]
    pub fn interval(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    /// Sets [`timeout`](Self::timeout).
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Sets [`rise`](Self::rise).
    #[must_use]
    pub fn rise(self, rise: u32) -> Self {
        Self { rise, ..self }
    }

    /// Sets [`fall`](Self::fall).
    #[must_use]
    pub fn fall(self, fall: u32) -> Self {
        Self { fall, ..self }
    }

    /// Sets [`jitter`](Self::jitter).
    #[must_use]
    pub fn jitter(self, jitter: f64) -> Self {
        Self { jitter, ..self }
    }

    /// Sets [`unregister_after`](Self::unregister_after); `None`: never.
    #[must_use]
    pub fn unregister_after(self, unregister_after: impl Into<Option<Duration>>) -> Self {
        Self { unregister_after: unregister_after.into(), ..self }
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`], naming the field and what it accepts.
    pub fn validate(&self) -> Result<()> {
        let second = Duration::from_secs(1);
        options::check_duration("interval", self.interval, Duration::from_millis(10)..=3600 * second)?;
        options::check_duration("timeout", self.timeout, Duration::from_millis(1)..=300 * second)?;
        options::check("rise", self.rise, "1 to 1000", |rise| (1..=1000).contains(&rise))?;
        options::check("fall", self.fall, "1 to 1000", |fall| (1..=1000).contains(&fall))?;
        options::check("jitter", self.jitter, "0 to 0.5", |jitter| (0.0..=0.5).contains(&jitter))?;
        self.unregister_after
            .map_or(Ok(()), |after| options::check_duration("unregister_after", after, second..=24 * 3600 * second))
    }

    /// From the beginning of one check to the beginning of the next, this time.
    fn pause(&self) -> Duration {
        self.interval.mul_f64(1.0 + rand::rng().random_range(-self.jitter..=self.jitter))
    }
}

/// What the checks of a [`Gate`] have come to. It is said before the store has heard of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateState {
    /// No threshold was reached yet.
    Starting,
    /// The instance is well.
    Up,
    /// The instance is not well.
    Down {
        /// Why the check failed that made it so.
        cause: String,
    },
    /// The instance was not well for so long that it was unregistered. It comes back when it is well.
    Unregistered {
        /// Why the check failed that had made it `Down`.
        cause: String,
    },
    /// There are no more checks: the gate was stopped, the registration is gone, or the registry was destroyed.
    Ended,
}

/// A gate that is at work. Dropping it ends its checks; the registration then stays as it is.
///
/// It holds a handle of the registry.
#[derive(Debug)]
#[must_use = "a gate that is dropped makes no more checks"]
pub struct Gate {
    states: watch::Receiver<GateState>,
    stop: DropGuard,
}

impl Gate {
    /// What the checks have come to.
    #[must_use]
    pub fn state(&self) -> GateState {
        self.states.borrow().clone()
    }

    /// The state now, and every one that comes after it. A slow reader gets the latest. The last is
    /// [`GateState::Ended`].
    pub fn states(&self) -> BoxStream<'static, GateState> {
        let mut states = self.states.clone();
        states.mark_changed();
        let next = |states: Option<watch::Receiver<GateState>>| async {
            let mut states = states?;
            states.changed().await.ok()?;
            let state = states.borrow_and_update().clone();
            let more = (state != GateState::Ended).then_some(states);
            Some((state, more))
        };
        stream::unfold(Some(states), next).boxed()
    }

    /// Ends the checks, and returns when none runs any more. The registration stays as it is.
    ///
    /// # Cancel safety
    /// Dropping it ends the checks all the same.
    pub async fn stop(self) {
        let Self { mut states, stop } = self;
        drop(stop);
        // An error means that the task is gone, too.
        let _ = states.wait_for(|state| *state == GateState::Ended).await;
    }
}

/// Registers an instance as [`Starting`](Status::Starting), and from then on keeps its status what its checks say. See
/// the [module](self) for what that means.
///
/// It waits for the registration as [`Registry::register`] does; checks begin meanwhile.
///
/// # Errors
/// As for [`Registry::register`] where it is final, and then there is no gate. A store that cannot be reached is not an
/// error. [`ErrorKind::InvalidInput`] for a bad [`Config`] or where there is no tokio runtime.
///
/// # Cancel safety
/// Dropping it ends the checks; the registration may remain, as `Starting`.
///
/// # Examples
/// ```
/// use std::{sync::Arc, time::Duration};
/// use futures::StreamExt;
/// use registry_core::{Instance, Managed, Registry, health::{self, GateState}};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> registry_core::Result<()> {
/// let registry: Arc<dyn Registry> = Arc::new(Managed::memory("memory://doc-health")?);
/// let instance = Instance::builder("orders", "7f3a").endpoint("http://10.0.0.5:8080").build()?;
/// let config = health::Config::default().interval(Duration::from_millis(10));
/// let gate = health::gate(registry.clone(), instance, || async { Ok(()) }, config).await?;
///
/// let mut states = gate.states();
/// while states.next().await != Some(GateState::Up) {}
/// # while registry.registrations()[0].instance.status != registry_core::Status::Up { tokio::task::yield_now().await }
/// assert_eq!(registry.discover("orders").await?.available().count(), 1);
/// gate.stop().await;
/// # Ok(())
/// # }
/// ```
pub async fn gate(registry: Arc<dyn Registry>, instance: Instance, check: impl Check, config: Config) -> Result<Gate> {
    config.validate()?;
    let runtime = Handle::try_current()
        .map_err(|error| Error::invalid("a gate must be made inside a tokio runtime").with_source(error))?;
    let (state, states) = watch::channel(GateState::Starting);
    let (registered, answer) = oneshot::channel();
    let cancelled = CancellationToken::new();
    let stop = cancelled.clone().drop_guard();
    runtime.spawn(async move {
        // Told last, when everything else is dropped.
        let _ended = Ended(state.clone());
        tokio::select! {
            biased;
            () = cancelled.cancelled() => {}
            () = keep_gate(registry, instance, check, config, state, registered) => {}
        }
    });
    match answer.await {
        Ok(Err(error)) if !error.is_retryable() => Err(error),
        Ok(_) => Ok(Gate { states, stop }),
        Err(_) => Err(Error::new(ErrorKind::Closed, "the registry was destroyed")),
    }
}

/// Says at the end of a gate, however it comes, that it has come.
struct Ended(watch::Sender<GateState>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.send_replace(GateState::Ended);
    }
}

/// The whole work of a gate: one loop checks, another one keeps the registration to what the first one found. The store
/// may make the second wait, and does not delay the first.
async fn keep_gate(
    registry: Arc<dyn Registry>,
    instance: Instance,
    check: impl Check,
    config: Config,
    state: watch::Sender<GateState>,
    registered: oneshot::Sender<Result<()>>,
) {
    let until_destroyed = registry.events().for_each(|_| ready(()));
    let (health, seen) = watch::channel(Health::Starting);
    let key = Key::provider(instance.service.clone(), instance.id.clone());
    let keeper = Keeper {
        registry,
        key: key.clone(),
        content: instance,
        unregister_after: config.unregister_after,
        state: state.clone(),
        set_down: false,
        is_out: false,
        is_refused: false,
    };
    tokio::select! {
        () = until_destroyed => {}
        () = keep_checking(&key, check, &config, &state, &health) => {}
        () = keeper.keep(seen, registered) => {}
    }
}

/// What the checks have come to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Health {
    Starting,
    Up,
    Down { since: Instant, cause: String },
}

/// Checks again and again, and says after each check what all of them have come to.
async fn keep_checking(
    key: &Key,
    check: impl Check,
    config: &Config,
    state: &watch::Sender<GateState>,
    health: &watch::Sender<Health>,
) {
    let mut tally = Tally::default();
    loop {
        let begun = Instant::now();
        let outcome = attempt(&check, config.timeout).await;
        if let Err(cause) = &outcome {
            debug!(service = %key.service, instance = %key.id, cause, "a health check failed");
        }
        match (tally.note(outcome.is_ok(), config), outcome) {
            (None, _) => health.send_modify(|_| ()),
            (Some(_), Ok(())) => {
                info!(service = %key.service, instance = %key.id, "the instance is up");
                state.send_replace(GateState::Up);
                health.send_replace(Health::Up);
            }
            (Some(_), Err(cause)) => {
                warn!(service = %key.service, instance = %key.id, cause, "the instance is down");
                state.send_replace(GateState::Down { cause: cause.clone() });
                health.send_replace(Health::Down { since: Instant::now(), cause });
            }
        }
        sleep_until(begun + config.pause()).await;
    }
}

/// Makes one check.
async fn attempt(check: &impl Check, patience: Duration) -> Result<(), String> {
    let checked = AssertUnwindSafe(async { check.check().await }).catch_unwind();
    match timeout(patience, checked).await {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(failure))) => Err(failure.to_string()),
        Ok(Err(_)) => Err("the check panicked".to_owned()),
        Err(_) => Err(format!("the check took longer than {}", humantime::format_duration(patience))),
    }
}

/// Counts outcomes in a row.
#[derive(Debug, Default)]
struct Tally {
    /// Whether the instance is well, once that is known.
    well: Option<bool>,
    /// The last outcome, and how many times it came in a row.
    run: (bool, u32),
}

impl Tally {
    /// Takes in an outcome. Gives whether the instance is well, if that changes.
    fn note(&mut self, succeeded: bool, config: &Config) -> Option<bool> {
        let (last, count) = self.run;
        self.run = (succeeded, if last == succeeded { count.saturating_add(1) } else { 1 });
        let threshold = if succeeded { config.rise } else { config.fall };
        if self.well == Some(succeeded) || self.run.1 < threshold {
            return None;
        }
        self.well = Some(succeeded);
        self.well
    }
}

/// Keeps one registration to what the checks have come to.
struct Keeper {
    registry: Arc<dyn Registry>,
    key: Key,
    /// What is registered at the beginning, and again after the gate has unregistered it.
    content: Instance,
    unregister_after: Option<Duration>,
    state: watch::Sender<GateState>,
    /// The registration is `Down` by the gate's own hand.
    set_down: bool,
    /// The gate has unregistered it.
    is_out: bool,
    /// The last change was refused for good: a warning was given.
    is_refused: bool,
}

impl Keeper {
    async fn keep(mut self, mut health: watch::Receiver<Health>, registered: oneshot::Sender<Result<()>>) {
        self.content.status = Status::Starting;
        let outcome = self.registry.register(self.content.clone()).await;
        let is_final = is_final(&outcome);
        let _ = registered.send(outcome);
        if is_final {
            return;
        }
        loop {
            let now = health.borrow_and_update().clone();
            if !self.follow(&now).await {
                return;
            }
            tokio::select! {
                // After every check, whatever came of it: somebody else may have changed the registration.
                checked = health.changed() => if checked.is_err() { return },
                () = self.until_unregistering(&now) => {}
            }
        }
    }

    /// Brings the registration in line. Returns whether there is one to keep.
    async fn follow(&mut self, health: &Health) -> bool {
        let Some(registration) = self.registry.registration(&self.key.service, &self.key.id) else {
            if self.is_out && *health == Health::Up {
                self.come_back().await;
            } else if !self.is_out {
                debug!(service = %self.key.service, instance = %self.key.id, "unregistered: the gate ends");
                return false;
            }
            return true;
        };
        let current = registration.instance;
        self.is_out = false;
        self.set_down &= current.status == Status::Down;
        if is_taken(&registration.state) {
            return true;
        }
        match (health, current.status) {
            (Health::Starting, Status::Up) => self.set(Status::Starting).await,
            (Health::Up, Status::Starting) => self.set(Status::Up).await,
            (Health::Up, Status::Down) if self.set_down => self.set(Status::Up).await,
            (Health::Down { .. }, Status::Starting | Status::Up) => self.set(Status::Down).await,
            (Health::Down { cause, .. }, Status::Down) if self.is_overdue(health) => {
                self.leave(&current, cause.clone()).await;
            }
            _ => {}
        }
        true
    }

    async fn set(&mut self, status: Status) {
        let set_down_before = std::mem::replace(&mut self.set_down, status == Status::Down);
        let outcome = self.registry.set_status(&self.key.service, &self.key.id, status).await;
        if is_final(&outcome) {
            // The previous content stays in force.
            self.set_down = set_down_before;
        }
        self.report("set the status", &outcome);
    }

    async fn leave(&mut self, current: &Instance, cause: String) {
        warn!(service = %self.key.service, instance = %self.key.id, cause, "down for too long: unregistering");
        self.content = current.clone();
        (self.is_out, self.set_down) = (true, false);
        self.state.send_replace(GateState::Unregistered { cause });
        let outcome = self.registry.unregister(&self.key.service, &self.key.id).await;
        self.report("unregister", &outcome.map(drop));
    }

    async fn come_back(&mut self) {
        let mut wanted = self.content.clone();
        wanted.status = Status::Up;
        let outcome = self.registry.register(wanted).await;
        self.report("register again", &outcome);
        // A conflict: somebody unregistered it meanwhile, or another owner was faster. Then it is not ours to bring back.
        self.is_out = is_final(&outcome) && outcome.is_err_and(|error| error.kind() != ErrorKind::Conflict);
    }

    /// Says once that something was refused. What is not final needs no word: the registry goes on with it.
    fn report(&mut self, doing: &str, outcome: &Result<()>) {
        let Err(error) = outcome else {
            self.is_refused = false;
            return;
        };
        let is_final = is_final(outcome);
        if is_final && !self.is_refused && error.kind() != ErrorKind::Closed {
            warn!(service = %self.key.service, instance = %self.key.id, %error, "cannot {doing}: trying again");
        } else {
            debug!(service = %self.key.service, instance = %self.key.id, %error, "cannot {doing} now");
        }
        self.is_refused = is_final;
    }

    fn is_overdue(&self, health: &Health) -> bool {
        self.unregister_at(health).is_some_and(|at| at <= Instant::now())
    }

    /// When the registration is to go. `None`: it is not.
    fn unregister_at(&self, health: &Health) -> Option<Instant> {
        let Health::Down { since, .. } = health else { return None };
        let after = self.unregister_after.filter(|_| self.set_down)?;
        Some(*since + after)
    }

    /// What is overdue waits for the next check: if it is not gone now, there is a reason.
    async fn until_unregistering(&self, health: &Health) {
        match self.unregister_at(health).filter(|at| *at > Instant::now()) {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

/// Whether the registry does not go on trying.
fn is_final(outcome: &Result<()>) -> bool {
    outcome.as_ref().is_err_and(|error| !error.is_retryable())
}

/// Whether another owner has the key.
fn is_taken(state: &RegistrationState) -> bool {
    matches!(state, RegistrationState::Lost { cause, .. } if cause.kind() == ErrorKind::Conflict)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of these outcomes changes: `u` up, `d` down, `.` nothing.
    fn told(outcomes: &str, config: &Config) -> String {
        let mut tally = Tally::default();
        let told = outcomes.chars().map(|outcome| match tally.note(outcome == '+', config) {
            Some(true) => 'u',
            Some(false) => 'd',
            None => '.',
        });
        told.collect()
    }

    #[test]
    fn outcomes_count_in_a_row_and_each_threshold_is_told_once() {
        let config = Config::default();
        for (outcomes, changes) in [
            ("+++++", ".u..."),
            ("-----", "..d.."),
            ("+-+-+-+-", "........"),
            ("--+--+--+", "........."),
            ("++--+--+--+", ".u........."),
            ("---+-+-+--", "..d......."),
            ("++---++---", ".u..d.u..d"),
            ("-+-+-++", "......u"),
        ] {
            assert_eq!(told(outcomes, &config), changes, "{outcomes}");
        }
        assert_eq!(told("+-+-", &config.rise(1).fall(1)), "udud");
    }

    #[test]
    fn values_out_of_range_say_what_is_accepted() {
        let (default, ms) = (Config::default, Duration::from_millis);
        default().validate().unwrap();
        for (config, why) in [
            (default().interval(ms(9)), "invalid interval 9ms: expected 10ms to 1h"),
            (default().timeout(Duration::ZERO), "invalid timeout 0s: expected 1ms to 5m"),
            (default().rise(0), "invalid rise 0: expected 1 to 1000"),
            (default().fall(1001), "invalid fall 1001: expected 1 to 1000"),
            (default().jitter(0.6), "invalid jitter 0.6: expected 0 to 0.5"),
            (default().jitter(f64::NAN), "invalid jitter NaN: expected 0 to 0.5"),
            (default().unregister_after(ms(999)), "invalid unregister_after 999ms: expected 1s to 1day"),
        ] {
            let error = config.validate().unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::InvalidInput, why));
        }
    }

    #[test]
    fn a_config_comes_back_from_serde_and_unknown_fields_are_refused() {
        let config = Config::default().interval(Duration::from_millis(1500)).unregister_after(Duration::from_secs(60));
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!((&json["interval"], &json["unregister_after"]), (&"1s 500ms".into(), &"1m".into()));
        assert_eq!(serde_json::from_value::<Config>(json).unwrap(), config);
        assert_eq!(serde_json::from_str::<Config>("{}").unwrap(), Config::default());
        assert!(serde_json::from_str::<Config>(r#"{"raise": 1}"#).is_err());
    }

    #[test]
    fn pauses_are_an_interval_give_or_take_the_jitter() {
        let config = Config::default().interval(Duration::from_secs(10)).jitter(0.2);
        let pauses: Vec<_> = (0..1000).map(|_| config.pause().as_secs_f64()).collect();
        assert!(pauses.iter().all(|pause| (8.0..=12.0).contains(pause)), "{pauses:?}");
        assert!(pauses.iter().any(|pause| *pause < 8.5) && pauses.iter().any(|pause| *pause > 11.5));
        assert_eq!(config.jitter(0.0).pause(), Duration::from_secs(10));
    }
}
