//! The gate: an instance takes traffic only while its checks say that it can, and while nobody took it out.

use std::future::pending;

use futures::{StreamExt, future::join_all};
use registry_core::{
    Error, ErrorKind, Key, Status, async_trait,
    health::{self, Check, Config, Failure, Gate, GateState},
    shutdown,
};
use tokio::time::sleep;

use super::{keep::until_conflict, *};

const SECOND: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(1);

/// What is checked. A test sets what becomes of the next checks, and sees what was made of them.
#[derive(Clone)]
struct Patient(Arc<Mutex<Chart>>);

struct Chart {
    condition: Condition,
    begun: Vec<Instant>,
    running: usize,
    most_at_once: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Condition {
    Well,
    Ill,
    Hanging,
    Panicking,
}
use Condition::{Hanging, Ill, Panicking, Well};

impl Patient {
    fn new(condition: Condition) -> Self {
        Self(Arc::new(Mutex::new(Chart { condition, begun: Vec::new(), running: 0, most_at_once: 0 })))
    }

    fn is(&self, condition: Condition) {
        self.0.lock().unwrap().condition = condition;
    }

    fn begun(&self) -> Vec<Instant> {
        self.0.lock().unwrap().begun.clone()
    }

    /// Waits until so many more checks were made, and what follows from the last of them was done.
    async fn checked(&self, more: usize) {
        let wanted = self.begun().len() + more;
        let within = INTERVAL * 2 * (more as u32 + 1);
        eventually(within, || self.begun().len() >= wanted, || format!("{} checks", self.begun().len())).await;
        sleep(TIMEOUT + SECOND / 2).await;
    }
}

/// Counts a check as running, however it ends.
struct Running(Patient);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().running -= 1;
    }
}

#[async_trait]
impl Check for Patient {
    async fn check(&self) -> Result<(), Failure> {
        let (condition, _running) = {
            let mut chart = self.0.lock().unwrap();
            chart.begun.push(Instant::now());
            chart.running += 1;
            chart.most_at_once = chart.most_at_once.max(chart.running);
            (chart.condition, Running(self.clone()))
        };
        match condition {
            Well => Ok(()),
            Ill => Err("it is ill".into()),
            Hanging => pending().await,
            Panicking => panic!("it panics, as it shall"),
        }
    }
}

/// A process with one instance behind a gate, and a reader elsewhere.
struct Ward {
    registry: Arc<dyn Registry>,
    link: MemoryLink,
    log: Log,
    patient: Patient,
    gate: Gate,
    reader: Process,
    watcher: Watcher,
}

impl Ward {
    async fn with(condition: Condition, config: Config) -> Self {
        let store = MemoryStore::new();
        let Process { registry, link, log } = Process::start(&store);
        let registry: Arc<dyn Registry> = Arc::new(registry);
        let patient = Patient::new(condition);
        let gate = health::gate(registry.clone(), instance("orders", "1"), patient.clone(), config).await.unwrap();
        let reader = Process::start(&store);
        let watcher = reader.watch("orders").await;
        Self { registry, link, log, patient, gate, reader, watcher }
    }

    /// One that is `Up`.
    async fn up() -> Self {
        Self::up_with(config()).await
    }

    async fn up_with(config: Config) -> Self {
        let ward = Self::with(Well, config).await;
        ward.until("up", INTERVAL + SECOND).await;
        ward
    }

    /// What the reader sees.
    fn seen(&self) -> String {
        self.watcher.current().get("1").map_or("none".to_owned(), |instance| instance.status.to_string())
    }

    async fn until(&self, status: &str, within: Duration) {
        eventually(within, || self.seen() == status, || format!("{}, not {status}", self.seen())).await;
    }

    /// Registers what is registered with a change, by hand.
    async fn change(&self, change: impl FnOnce(&mut Instance)) {
        let mut instance = Instance::clone(&self.registry.registrations()[0].instance);
        change(&mut instance);
        self.registry.register(instance).await.unwrap();
    }

    async fn until_ended(&self) {
        let mut states = self.gate.states();
        let ended = async { while states.next().await.is_some_and(|state| state != GateState::Ended) {} };
        assert!(timeout(INTERVAL + SECOND, ended).await.is_ok(), "{:?}", self.gate.state());
        let checks = self.patient.begun().len();
        sleep(INTERVAL * 3).await;
        assert_eq!(self.patient.begun().len(), checks, "checked by a gate that has ended");
    }
}

fn key() -> Key {
    Key::provider("orders".parse().unwrap(), "1".parse().unwrap())
}

fn denied() -> Error {
    Error::new(ErrorKind::PermissionDenied, "no")
}

/// The defaults, without jitter: checks begin every five seconds.
fn config() -> Config {
    Config::default().jitter(0.0)
}

#[tokio::test(start_paused = true)]
async fn an_instance_is_visible_at_once_and_takes_traffic_after_enough_successes_in_a_row() {
    let begin = Instant::now();
    let ward = Ward::with(Well, config().rise(4)).await;
    assert_eq!((ward.seen().as_str(), ward.gate.state()), ("starting", GateState::Starting));
    ward.until("up", INTERVAL * 4).await;
    assert!((INTERVAL * 3..INTERVAL * 3 + SECOND).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    assert_eq!(ward.gate.state(), GateState::Up);
    assert_eq!(ward.log.count("put"), 2, "once as starting, once as up");
}

#[tokio::test(start_paused = true)]
async fn enough_failures_in_a_row_take_it_down_and_enough_successes_up_again() {
    let ward = Ward::up().await;
    ward.patient.is(Ill);
    ward.patient.checked(2).await;
    assert_eq!(ward.seen(), "up");
    ward.patient.checked(1).await;
    assert_eq!(ward.seen(), "down");
    assert_eq!(ward.gate.state(), GateState::Down { cause: "it is ill".to_owned() });
    ward.patient.is(Well);
    ward.patient.checked(1).await;
    assert_eq!(ward.seen(), "down");
    ward.patient.checked(1).await;
    assert_eq!((ward.seen().as_str(), ward.gate.state()), ("up", GateState::Up));
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_never_was_well_is_down_after_enough_failures() {
    let ward = Ward::with(Ill, config()).await;
    ward.until("down", INTERVAL * 2 + SECOND).await;
    ward.patient.is(Well);
    ward.until("up", INTERVAL * 2 + SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn what_flaps_below_the_thresholds_changes_nothing() {
    let mut ward = Ward::up().await;
    let mut states = ward.gate.states();
    assert_eq!(states.next().await, Some(GateState::Up));
    while timeout(SECOND, ward.watcher.next()).await.is_ok() {}
    ward.log.clear();
    for _ in 0..10 {
        ward.patient.is(Ill);
        ward.patient.checked(2).await;
        ward.patient.is(Well);
        ward.patient.checked(1).await;
    }
    assert_eq!(ward.log.count("put"), 0);
    quiet(&mut ward.watcher, SECOND).await;
    assert!(timeout(SECOND, states.next()).await.is_err(), "{:?}", ward.gate.state());
}

#[tokio::test(start_paused = true)]
async fn a_check_that_hangs_is_cut_by_its_timeout_and_none_overlaps_another() {
    for (patience, expected_pause) in [(TIMEOUT, INTERVAL), (INTERVAL * 2, INTERVAL * 2)] {
        let ward = Ward::up_with(config().timeout(patience)).await;
        ward.patient.is(Hanging);
        ward.until("down", (INTERVAL + patience) * 4).await;
        assert!(matches!(ward.gate.state(), GateState::Down { cause } if cause.contains("longer than")));
        let chart = ward.patient.0.lock().unwrap();
        assert_eq!(chart.most_at_once, 1);
        let pause = chart.begun[chart.begun.len() - 1] - chart.begun[chart.begun.len() - 2];
        assert!((expected_pause..expected_pause + SECOND / 10).contains(&pause), "{pause:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_check_that_panics_has_failed_and_is_made_again() {
    let ward = Ward::up().await;
    ward.patient.is(Panicking);
    ward.until("down", INTERVAL * 3 + SECOND).await;
    assert_eq!(ward.gate.state(), GateState::Down { cause: "the check panicked".to_owned() });
    ward.patient.is(Well);
    ward.until("up", INTERVAL * 2 + SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn checks_that_begin_together_spread_by_the_jitter() {
    let registry: Arc<dyn Registry> = Arc::new(Process::start(&MemoryStore::new()).registry);
    let patients: Vec<_> = (0..100).map(|_| Patient::new(Well)).collect();
    let begin = Instant::now();
    let gates = patients.iter().enumerate().map(|(id, patient)| {
        health::gate(
            registry.clone(),
            instance("orders", &id.to_string()),
            patient.clone(),
            Config::default().jitter(0.2),
        )
    });
    let _gates = join_all(gates).await;
    sleep(INTERVAL * 2).await;
    let mut second: Vec<_> = patients.iter().map(|patient| patient.begun()[1] - begin).collect();
    second.sort();
    let (first, last) = (second[0], second[99]);
    assert!(first >= INTERVAL * 4 / 5 && last <= INTERVAL * 6 / 5 + SECOND / 10, "{first:?} to {last:?}");
    assert!(last - first > SECOND && second.windows(2).all(|pair| pair[1] - pair[0] < SECOND / 2), "{second:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_down_for_too_long_is_unregistered_and_comes_back_when_it_is_well() {
    let ward = Ward::up_with(config().unregister_after(Duration::from_secs(62))).await;
    ward.change(|instance| instance.weight = 7).await;
    ward.patient.is(Ill);
    ward.until("down", INTERVAL * 3 + SECOND).await;
    let down = Instant::now();
    ward.until("none", Duration::from_secs(63)).await;
    assert!(down.elapsed() > Duration::from_secs(61), "{:?}", down.elapsed());
    assert!(ward.registry.registrations().is_empty());
    assert_eq!(ward.gate.state(), GateState::Unregistered { cause: "it is ill".to_owned() });
    ward.patient.checked(20).await;
    assert_eq!(ward.seen(), "none");
    ward.patient.is(Well);
    ward.until("up", INTERVAL * 2 + SECOND).await;
    assert_eq!(ward.watcher.current().get("1").unwrap().weight, 7, "what it was when it went");
    assert_eq!(ward.gate.state(), GateState::Up);
    // And all of it once more.
    ward.patient.is(Ill);
    ward.until("none", Duration::from_secs(90)).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_when_it_comes_back_is_tried_again() {
    let ward = Ward::up_with(config().unregister_after(SECOND)).await;
    ward.patient.is(Ill);
    ward.until("none", INTERVAL * 4).await;
    ward.link.fail(&key(), Some(denied()));
    ward.patient.is(Well);
    ward.patient.checked(4).await;
    assert_eq!(ward.gate.state(), GateState::Up);
    assert!(ward.registry.registrations().is_empty(), "refused");
    ward.link.fail(&key(), None);
    ward.until("up", INTERVAL + SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_unregistered_while_it_comes_back_stays_away() {
    let ward = Ward::up_with(config().unregister_after(SECOND)).await;
    ward.patient.is(Ill);
    ward.until("none", INTERVAL * 4).await;
    ward.link.delay(SECOND);
    ward.patient.is(Well);
    let is_coming = || !ward.registry.registrations().is_empty();
    eventually(INTERVAL * 2 + SECOND, is_coming, || "not registered again".into()).await;
    ward.registry.unregister("orders", "1").await.unwrap();
    ward.until_ended().await;
    assert_eq!(ward.seen(), "none");
}

#[tokio::test(start_paused = true)]
async fn what_recovers_before_its_time_is_over_is_not_unregistered() {
    let ward = Ward::up_with(config().unregister_after(Duration::from_secs(60))).await;
    for _ in 0..3 {
        ward.patient.is(Ill);
        ward.until("down", INTERVAL * 3 + SECOND).await;
        ward.patient.checked(9).await;
        ward.patient.is(Well);
        ward.until("up", INTERVAL * 2 + SECOND).await;
    }
    assert_eq!(ward.log.count("remove"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_was_changed_meanwhile_is_kept() {
    let ward = Ward::up().await;
    ward.change(|instance| instance.weight = 7).await;
    ward.patient.is(Ill);
    ward.until("down", INTERVAL * 3 + SECOND).await;
    ward.change(|instance| instance.version = Some("2".to_owned())).await;
    ward.patient.is(Well);
    ward.until("up", INTERVAL * 2 + SECOND).await;
    let seen = ward.watcher.current().get("1").cloned().unwrap();
    assert_eq!((seen.weight, seen.version.as_deref()), (7, Some("2")));
}

#[tokio::test(start_paused = true)]
async fn what_a_hand_takes_out_of_traffic_stays_out_until_it_is_handed_back() {
    for status in [Status::Draining, Status::Down] {
        let ward = Ward::up_with(config().unregister_after(Duration::from_secs(60))).await;
        // That the gate has taken it out before makes no difference.
        ward.patient.is(Ill);
        ward.until("down", INTERVAL * 3 + SECOND).await;
        ward.patient.is(Well);
        ward.until("up", INTERVAL * 2 + SECOND).await;
        ward.change(|instance| instance.status = status).await;
        for condition in [Well, Ill, Well] {
            ward.patient.is(condition);
            ward.patient.checked(20).await;
            assert_eq!(ward.seen(), status.as_str(), "{condition:?}");
        }
        assert_eq!(ward.gate.state(), GateState::Up, "what the checks say");
        ward.change(|instance| instance.status = Status::Starting).await;
        ward.until("up", INTERVAL + SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_down_by_the_gate_is_not_its_own_any_more_once_a_hand_has_changed_it() {
    let ward = Ward::up().await;
    ward.patient.is(Ill);
    ward.until("down", INTERVAL * 3 + SECOND).await;
    for status in [Status::Draining, Status::Down] {
        ward.change(|instance| instance.status = status).await;
        ward.patient.checked(1).await;
    }
    ward.patient.is(Well);
    ward.patient.checked(4).await;
    assert_eq!(ward.seen(), "down");
}

#[tokio::test(start_paused = true)]
async fn a_process_that_drains_is_not_brought_back_by_its_checks() {
    let mut ward = Ward::up().await;
    ward.patient.is(Ill);
    ward.until("down", INTERVAL * 3 + SECOND).await;
    let registry = ward.registry.clone();
    let draining = tokio::spawn(async move { shutdown::drain(&*registry, INTERVAL * 5, pending()).await });
    ward.patient.is(Well);
    let seen = until(&mut ward.watcher, INTERVAL * 6, |snapshot| snapshot.is_empty()).await;
    let statuses = seen.iter().flat_map(|snapshot| snapshot.instances().iter().map(|instance| instance.status));
    let statuses: Vec<_> = statuses.skip_while(|status| *status != Status::Draining).collect();
    assert!(!statuses.is_empty() && statuses.iter().all(|status| *status == Status::Draining), "{statuses:?}");
    draining.await.unwrap().unwrap();
    ward.until_ended().await;
}

#[tokio::test(start_paused = true)]
async fn what_has_not_passed_its_checks_is_out_of_traffic_whatever_is_registered() {
    let ward = Ward::with(Ill, config()).await;
    ward.registry.register(instance("orders", "1")).await.unwrap();
    ward.until("up", SECOND).await;
    ward.until("starting", INTERVAL + SECOND).await;
    ward.until("down", INTERVAL * 3 + SECOND).await;
    // As an instance is that is built anew, to change something else about it.
    ward.registry.register(instance("orders", "1")).await.unwrap();
    ward.until("up", SECOND).await;
    ward.until("down", INTERVAL + SECOND).await;
    ward.patient.is(Well);
    ward.until("up", INTERVAL * 2 + SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_gate_that_is_dropped_or_stopped_makes_no_more_checks_and_leaves_the_registration_as_it_is() {
    for stopped in [true, false] {
        let Ward { registry, patient, gate, reader: _reader, watcher, .. } = Ward::up().await;
        let mut states = gate.states();
        patient.is(Hanging);
        let checks = patient.begun().len();
        eventually(INTERVAL + SECOND, || patient.begun().len() > checks, || "no check".into()).await;
        if stopped {
            gate.stop().await;
            assert_eq!(patient.0.lock().unwrap().running, 0, "stopped and still checking");
        } else {
            drop(gate);
        }
        while states.next().await != Some(GateState::Ended) {}
        assert_eq!(states.next().await, None);
        assert_eq!(Arc::strong_count(&registry), 1, "its handle is gone, too");
        sleep(INTERVAL * 10).await;
        assert_eq!(patient.begun().len(), checks + 1);
        assert_eq!(watcher.current().get("1").unwrap().status, Status::Up);
        registry.unregister("orders", "1").await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_gate_ends_with_its_registration() {
    let ward = Ward::up().await;
    assert!(ward.registry.unregister("orders", "1").await.unwrap());
    ward.until_ended().await;
    assert_eq!(ward.seen(), "none");
    assert!(ward.registry.registrations().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_gate_ends_with_its_registry_also_while_nothing_is_registered() {
    for condition in [Well, Ill] {
        let ward = Ward::up_with(config().unregister_after(SECOND)).await;
        ward.patient.is(condition);
        ward.until(if condition == Ill { "none" } else { "up" }, INTERVAL * 5).await;
        ward.registry.destroy().await.unwrap();
        timeout(SECOND, ward.gate.states().filter(|state| std::future::ready(*state == GateState::Ended)).next())
            .await
            .unwrap();
        ward.until_ended().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_stops_no_check_and_hears_of_the_latest_when_it_returns() {
    let ward = Ward::up().await;
    for hanging in [true, false] {
        if hanging {
            ward.link.hang();
        } else {
            ward.link.cut();
        }
        ward.patient.is(Ill);
        for state in ["down", "up", "down"] {
            let before = (ward.patient.begun().len(), Instant::now());
            ward.patient.is(if state == "up" { Well } else { Ill });
            let is = || matches!((ward.gate.state(), state), (GateState::Up, "up") | (GateState::Down { .. }, "down"));
            eventually(INTERVAL * 3 + SECOND, is, || format!("{:?}", ward.gate.state())).await;
            let checks = ward.patient.begun().len() - before.0;
            assert!(checks as u32 >= before.1.elapsed().as_secs() as u32 / 5, "{checks} in {:?}", before.1.elapsed());
        }
        ward.link.heal();
        ward.until("down", TTL).await;
        ward.patient.is(Well);
        ward.until("up", INTERVAL * 2 + SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_gate_may_begin_while_the_store_is_down() {
    let store = MemoryStore::new();
    let Process { registry, link, .. } = Process::start(&store);
    let registry: Arc<dyn Registry> = Arc::new(registry);
    link.hang();
    let patient = Patient::new(Well);
    let begin = Instant::now();
    let gate = health::gate(registry.clone(), instance("orders", "1"), patient.clone(), config()).await.unwrap();
    assert_eq!(patient.begun()[0], begin, "checks wait for no store");
    eventually(INTERVAL * 2, || gate.state() == GateState::Up, || format!("{:?}", gate.state())).await;
    assert!(stored(&store).is_empty());
    link.heal();
    let reader = Process::start(&store);
    let watcher = reader.watch("orders").await;
    let is_up = || watcher.current().available().count() == 1;
    eventually(TTL, is_up, || format!("{:?}", watcher.current())).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_at_the_beginning_is_an_error_and_no_gate() {
    let process = Process::start(&MemoryStore::new());
    process.link.fail(&key(), Some(denied()));
    let (registry, link) = dynamic(process);
    let patient = Patient::new(Well);
    for (config, kind) in [(config(), ErrorKind::PermissionDenied), (config().rise(0), ErrorKind::InvalidInput)] {
        let error = health::gate(registry.clone(), instance("orders", "1"), patient.clone(), config).await.unwrap_err();
        assert_eq!(error.kind(), kind);
    }
    let checks = patient.begun().len();
    sleep(INTERVAL * 3).await;
    assert_eq!((patient.begun().len(), registry.registrations().len()), (checks, 0));
    link.fail(&key(), None);
    registry.destroy().await.unwrap();
    let error = health::gate(registry, instance("orders", "1"), patient, config()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_later_is_tried_again_and_warned_of_once() {
    let log = Warnings::default();
    let _guard = log.listen();
    let ward = Ward::up().await;
    ward.link.fail(&key(), Some(denied()));
    ward.patient.is(Ill);
    ward.patient.checked(10).await;
    assert_eq!(ward.seen(), "up");
    ward.link.fail(&key(), None);
    ward.until("down", INTERVAL + SECOND).await;
    ward.link.fail(&key(), Some(denied()));
    ward.patient.is(Well);
    ward.patient.checked(5).await;
    assert_eq!(ward.seen(), "down");
    ward.link.fail(&key(), None);
    ward.until("up", INTERVAL + SECOND).await;
    let said = log.lines().into_iter().filter(|line| line.contains("cannot set the status")).count();
    assert_eq!(said, 2, "once each time: {:#?}", log.lines());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_another_owner_took_is_not_fought_for() {
    let ward = Ward::up_with(config().unregister_after(SECOND)).await;
    ward.reader.register("orders", "1").await;
    until_conflict(&*ward.registry).await;
    ward.log.clear();
    for condition in [Ill, Well] {
        ward.patient.is(condition);
        ward.patient.checked(10).await;
        assert_eq!(ward.seen(), "up");
    }
    assert_eq!((ward.log.count("put"), ward.log.count("remove")), (0, 0));
    assert_eq!(ward.reader.state("1"), "registered");
}
