//! What a recorder is told: each metric with its value, over the store in memory, in paused time.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key as Name, KeyName, Metadata, Recorder, SharedString, Unit};
use service_registry::{
    Error, ErrorKind, Instance, Key, Managed, Options, Registry, Watcher,
    balance::{Balancer, Outlier, Strategy},
    memory::{MemoryBackend, MemoryLink, MemoryStore},
};
use tokio::{
    runtime::{Builder, Runtime},
    time::sleep,
};

const SECOND: Duration = Duration::from_secs(1);

/// Gauges are sums over the process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs on one thread, whose recorder hears it.
fn heard<F: Future<Output = ()>>(test: impl FnOnce(Told) -> F) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let told = Told::default();
    metrics::with_local_recorder(&told, || runtime().block_on(test(told.clone())));
    let described = told.0.described.lock().unwrap();
    assert!(told.names().is_subset(&described), "{:?} of {described:?}", told.names());
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

/// What was told, by `name{label=value,…}` without what all names begin with.
#[derive(Clone, Default)]
struct Told(Arc<Inner>);

#[derive(Default)]
struct Inner {
    counters: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
    gauges: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
    samples: Mutex<BTreeMap<String, Arc<Samples>>>,
    described: Mutex<BTreeSet<String>>,
}

#[derive(Default)]
struct Samples(Mutex<Vec<f64>>);

impl HistogramFn for Samples {
    fn record(&self, value: f64) {
        self.0.lock().unwrap().push(value);
    }
}

impl Recorder for Told {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.describe(&name, unit, &description);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.describe(&name, unit, &description);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.describe(&name, unit, &description);
    }

    fn register_counter(&self, name: &Name, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.0.counters.lock().unwrap().entry(spell(name)).or_default().clone())
    }

    fn register_gauge(&self, name: &Name, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.0.gauges.lock().unwrap().entry(spell(name)).or_default().clone())
    }

    fn register_histogram(&self, name: &Name, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.0.samples.lock().unwrap().entry(spell(name)).or_default().clone())
    }
}

fn spell(name: &Name) -> String {
    let labels: Vec<_> = name.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
    format!("{}{{{}}}", name.name().strip_prefix("service_registry_").unwrap(), labels.join(","))
}

impl Told {
    fn describe(&self, name: &KeyName, unit: Option<Unit>, description: &str) {
        assert!(unit.is_some() && description.ends_with('.'), "{name:?}: {description}");
        self.0.described.lock().unwrap().insert(name.as_str().to_owned());
    }

    /// The names of all that was told.
    fn names(&self) -> BTreeSet<String> {
        let Inner { counters, gauges, samples, .. } = &*self.0;
        let mut all: Vec<String> = counters.lock().unwrap().keys().cloned().collect();
        all.extend(gauges.lock().unwrap().keys().cloned());
        all.extend(samples.lock().unwrap().keys().cloned());
        all.iter().map(|name| format!("service_registry_{}", name.split('{').next().unwrap())).collect()
    }

    /// Waits until what has changed was told.
    async fn next(&self) {
        sleep(SECOND + SECOND / 10).await;
    }

    fn counter(&self, name: &str) -> u64 {
        self.0.counters.lock().unwrap().get(name).map_or(0, |value| value.load(Ordering::Relaxed))
    }

    fn gauge(&self, name: &str) -> f64 {
        let gauges = self.0.gauges.lock().unwrap();
        let value = gauges.get(name).unwrap_or_else(|| panic!("{name} is not among {:?}", gauges.keys()));
        f64::from_bits(value.load(Ordering::Relaxed))
    }

    fn samples(&self, name: &str) -> Vec<f64> {
        self.0.samples.lock().unwrap()[name].0.lock().unwrap().clone()
    }

    fn registrations(&self) -> [f64; 3] {
        ["registered", "pending", "lost"]
            .map(|state| self.gauge(&format!("registrations{{backend=memory,state={state}}}")))
    }

    /// Instances, held instances and staleness.
    fn view(&self, service: &str) -> [f64; 3] {
        ["instances", "held_instances", "staleness_seconds"]
            .map(|name| self.gauge(&format!("{name}{{backend=memory,service={service}}}")))
    }

    fn picks(&self, service: &str) -> [u64; 5] {
        ["success", "failure", "refused", "cancelled", "nobody"]
            .map(|outcome| self.counter(&format!("picks_total{{service={service},outcome={outcome}}}")))
    }
}

struct Process {
    registry: Managed<MemoryBackend>,
    link: MemoryLink,
}

impl Process {
    fn start(store: &MemoryStore) -> Self {
        Self::with(store, Options::default())
    }

    fn with(store: &MemoryStore, options: Options) -> Self {
        let backend = MemoryBackend::new(store.clone(), options.ttl);
        let link = backend.link();
        Self { registry: Managed::new(backend, options).unwrap(), link }
    }

    async fn register(&self, service: &str, ids: &[&str]) {
        for id in ids {
            self.registry.register(instance(service, id)).await.unwrap();
        }
    }
}

fn instance(service: &str, id: &str) -> Instance {
    Instance::builder(service, id).build().unwrap()
}

fn key(service: &str, id: &str) -> Key {
    Key::provider(service.parse().unwrap(), id.parse().unwrap())
}

async fn until(watcher: &mut Watcher, instances: usize) {
    while watcher.current().len() != instances {
        watcher.next().await.unwrap();
    }
}

#[test]
fn an_outage_shows_in_registrations_heartbeats_failures_and_staleness() {
    heard(async |told| {
        let store = MemoryStore::new();
        let (provider, reader) = (Process::start(&store), Process::start(&store));
        provider.register("orders", &["1", "2", "3"]).await;
        let mut watcher = reader.registry.watch("orders").await.unwrap();
        provider.registry.heartbeat().await.unwrap();

        told.next().await;
        assert_eq!(told.registrations(), [3.0, 0.0, 0.0]);
        assert_eq!(told.view("orders"), [3.0, 0.0, 0.0]);
        assert_eq!(told.counter("full_reads_total{backend=memory,service=orders}"), 1);
        assert_eq!(told.samples("watch_lag_seconds{backend=memory,service=orders}"), [0.0], "of the first set");
        assert!(told.counter("heartbeats_total{backend=memory,outcome=renewed}") >= 1);
        assert!(!told.names().contains("service_registry_failures_total"), "{:?}", told.names());

        provider.register("orders", &["4"]).await;
        until(&mut watcher, 4).await;
        told.next().await;
        assert_eq!(told.samples("watch_lag_seconds{backend=memory,service=orders}"), [0.0; 2], "of the fourth");
        assert_eq!(told.view("orders"), [4.0, 0.0, 0.0]);

        provider.link.cut();
        reader.link.cut();
        sleep(29 * SECOND).await;
        told.next().await;
        assert_eq!(told.registrations(), [0.0, 0.0, 4.0], "presumed lost after a ttl");
        assert_eq!(told.counter("session_losses_total{backend=memory}"), 1);
        let [instances, held, stale] = told.view("orders");
        assert_eq!((instances, held), (4.0, 0.0));
        assert!((28.0..=30.0).contains(&stale), "{stale}");
        assert!(told.counter("heartbeats_total{backend=memory,outcome=failed}") >= 1);
        for verb in ["renew", "subscribe"] {
            assert!(told.counter(&format!("failures_total{{backend=memory,verb={verb},kind=unavailable}}")) >= 1);
        }

        provider.link.heal();
        reader.link.heal();
        sleep(20 * SECOND).await;
        told.next().await;
        assert_eq!(told.registrations(), [4.0, 0.0, 0.0]);
        assert_eq!(told.view("orders"), [4.0, 0.0, 0.0]);

        assert!(store.delete(&key("orders", "1")));
        provider.registry.heartbeat().await.unwrap();
        let refused = Error::new(ErrorKind::PermissionDenied, "no");
        provider.link.fail(&key("orders", "5"), Some(refused));
        provider.registry.register(instance("orders", "5")).await.unwrap_err();
        told.next().await;
        assert!(told.counter("heartbeats_total{backend=memory,outcome=missing}") >= 1);
        assert_eq!(told.counter("failures_total{backend=memory,verb=put,kind=permission_denied}"), 1);

        assert_eq!(told.view("orders"), [4.0, 0.0, 0.0]);
        provider.registry.destroy().await.unwrap();
        drop(reader);
        told.next().await;
        assert_eq!((told.registrations(), told.view("orders")), ([0.0; 3], [0.0; 3]));
    });
}

#[test]
fn protection_counts_and_tells_how_many_are_held() {
    heard(async |told| {
        let store = MemoryStore::new();
        let (provider, reader) = (Process::start(&store), Process::start(&store));
        provider.register("payments", &["1", "2", "3", "4"]).await;
        let _watcher = reader.registry.watch("payments").await.unwrap();
        told.next().await;
        assert_eq!(told.counter("protections_total{backend=memory,service=payments}"), 0);

        provider.link.cut();
        drop(provider);
        sleep(17 * SECOND).await;
        told.next().await;
        assert_eq!(told.counter("protections_total{backend=memory,service=payments}"), 1);
        assert_eq!(told.view("payments"), [4.0, 4.0, 0.0]);
        assert_eq!(told.registrations(), [0.0; 3]);

        sleep(30 * SECOND).await;
        told.next().await;
        assert_eq!(told.counter("protections_total{backend=memory,service=payments}"), 1);
        assert_eq!(told.view("payments"), [0.0; 3]);
    });
}

#[test]
fn the_gauges_of_a_service_that_nobody_reads_any_more_are_0() {
    heard(async |told| {
        let process = Process::with(&MemoryStore::new(), Options::default().idle_timeout(10 * SECOND));
        process.register("orders", &["1", "2"]).await;
        process.registry.discover("orders").await.unwrap();
        told.next().await;
        assert_eq!(told.view("orders"), [2.0, 0.0, 0.0]);
        sleep(30 * SECOND).await;
        assert!(process.registry.health().services.is_empty());
        assert_eq!(told.view("orders"), [0.0; 3]);
        assert_eq!(told.registrations(), [2.0, 0.0, 0.0], "it is registered all the same");
    });
}

#[test]
fn a_view_that_was_never_live_is_stale_since_it_was_asked_for() {
    heard(async |told| {
        let process = Process::start(&MemoryStore::new());
        process.link.cut();
        let _watcher = process.registry.watch("orders").await.unwrap();
        sleep(10 * SECOND).await;
        told.next().await;
        let [.., stale] = told.view("orders");
        assert!((10.0..=17.0).contains(&stale), "{stale}");
    });
}

#[test]
fn picks_and_ejections_are_counted_for_each_service() {
    heard(async |told| {
        let store = MemoryStore::new();
        let process = Process::start(&store);
        process.register("orders", &["a", "b"]).await;
        let watcher = process.registry.watch("orders").await.unwrap();
        let balancer = || {
            let rules = Outlier::default().consecutive(3);
            Balancer::builder(watcher.clone()).strategy(Strategy::RoundRobin).outlier(rules).build().unwrap()
        };
        let (one, other) = (balancer(), balancer());
        one.pick().unwrap().success();
        one.pick().unwrap().success();
        one.pick().unwrap().refused();
        drop(one.pick().unwrap());
        told.next().await;
        assert_eq!(told.picks("orders"), [2, 0, 1, 1, 0]);
        assert_eq!(told.counter("ejections_total{service=orders}"), 0);
        assert_eq!(told.gauge("ejected_instances{service=orders}"), 0.0);

        for balancer in [&one, &other] {
            for _ in 0..3 {
                balancer.pick_other(&["b".parse().unwrap()]).unwrap().failure();
            }
        }
        told.next().await;
        assert_eq!(told.picks("orders"), [2, 6, 1, 1, 0]);
        assert_eq!(told.counter("ejections_total{service=orders}"), 2);
        assert_eq!(told.gauge("ejected_instances{service=orders}"), 2.0, "by each of the balancers");

        sleep(2 * SECOND).await;
        let late = other.pick().unwrap();
        drop(other);
        late.success();
        told.next().await;
        assert_eq!(told.picks("orders"), [3, 6, 1, 1, 0], "one that ends after its balancer counts");
        assert_eq!(told.gauge("ejected_instances{service=orders}"), 1.0);
        sleep(10 * SECOND).await;
        told.next().await;
        assert_eq!(told.gauge("ejected_instances{service=orders}"), 0.0, "tried");

        for id in ["a", "b"] {
            process.registry.unregister("orders", id).await.unwrap();
        }
        while !one.is_empty() {
            sleep(SECOND / 100).await;
        }
        one.pick().unwrap_err();
        told.next().await;
        assert_eq!(told.picks("orders"), [3, 6, 1, 1, 1]);
    });
}

#[test]
fn a_recorder_that_comes_late_is_told_what_is() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = runtime();
    let process = runtime.block_on(async {
        let process = Process::start(&MemoryStore::new());
        process.register("orders", &["1", "2"]).await;
        process.registry.discover("orders").await.unwrap();
        sleep(5 * SECOND).await;
        process
    });
    let told = Told::default();
    metrics::with_local_recorder(&told, || {
        runtime.block_on(async { sleep(6 * SECOND).await }); // a beat
        assert_eq!(told.registrations(), [2.0, 0.0, 0.0]);
        assert_eq!(told.view("orders"), [2.0, 0.0, 0.0]);
        drop(process);
    });
}

#[test]
fn all_that_is_told_is_in_the_readme() {
    let readme = include_str!("../../README.md");
    let rows = readme.lines().filter(|line| line.starts_with("| `service_registry_"));
    let named: BTreeSet<String> = rows.map(|row| row.split('`').nth(1).unwrap().to_owned()).collect();
    heard(async |told| {
        let process = Process::start(&MemoryStore::new());
        let watcher = process.registry.watch("orders").await.unwrap();
        let _balancer = Balancer::new(watcher, Strategy::Random).unwrap();
        told.next().await;
        assert_eq!(*told.0.described.lock().unwrap(), named);
    });
}
