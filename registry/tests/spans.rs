//! The spans of the verbs and of the background: what they say, and what they never do.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use service_registry::{
    Instance, Managed, Override, Registry, Status,
    memory::{MemoryBackend, MemoryLink},
};
use tracing::Level;
use tracing_subscriber::fmt::format::FmtSpan;

const PLANTED: &str = "hunter2";
const GRACE: Duration = Duration::from_millis(1);

/// What this thread logs, a line for each event and each new span.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn listen(&self, level: Level) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_max_level(level).with_span_events(FmtSpan::NEW);
        tracing::subscriber::set_default(subscriber.with_ansi(false).with_writer(move || log.clone()).finish())
    }

    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }

    /// The spans that were made, the innermost of each line.
    fn spans(&self) -> Vec<String> {
        let lines = self.lines();
        let new = lines.iter().filter_map(|line| line.strip_suffix(": new"));
        new.map(|line| line.rsplit_once(": ").map_or(line, |(spans, _)| spans).to_owned()).collect()
    }

    fn count(&self, span: &str) -> usize {
        self.spans().iter().filter(|spans| spans.ends_with(span)).count()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn registry() -> (Managed<MemoryBackend>, MemoryLink) {
    let registry = Managed::memory("memory://").unwrap();
    let link = registry.backend().link();
    (registry, link)
}

fn instance(id: &str) -> Instance {
    let instance = Instance::builder("orders", id).endpoint("http://10.0.0.5:8080");
    instance.metadata("password", PLANTED).build().unwrap()
}

#[tokio::test]
async fn every_verb_has_a_span_that_says_of_what() {
    let log = Log::default();
    let _listening = log.listen(Level::TRACE);
    let (registry, _) = registry();
    registry.discover("orders").await.unwrap();
    registry.register(instance("1")).await.unwrap();
    registry.register_all(vec![instance("2"), instance("3")]).await;
    registry.set_status("orders", "1", Status::Up).await.unwrap();
    registry.set_weight("orders", "1", 7).await.unwrap();
    registry.watch("orders").await.unwrap();
    registry.wait_for("orders", 3, Duration::from_secs(10)).await.unwrap();
    registry.heartbeat().await.unwrap();
    registry.services().await.unwrap();
    registry.subscribers("orders").await.unwrap();
    registry.set_override("orders", "1", Override::default().weight(1)).await.unwrap();
    registry.overrides("orders").await.unwrap();
    registry.clear_override("orders", "1").await.unwrap();
    registry.drain("orders", "1", GRACE).await.unwrap();
    registry.unregister("orders", "2").await.unwrap();
    registry.destroy().await.unwrap();

    let (of_all, of_service) = (r#"{backend="memory"}"#, r#"{backend="memory" service="orders"}"#);
    let of_one = r#"{backend="memory" service="orders" instance="1"}"#;
    for (verb, fields) in [
        ("discover", of_service),
        ("register", of_one),
        ("register_all", r#"{backend="memory" instances=2}"#),
        ("set_status", of_one),
        ("set_weight", of_one),
        ("watch", of_service),
        ("wait_for", of_service),
        ("heartbeat", of_all),
        ("services", of_all),
        ("subscribers", of_service),
        ("set_override", of_one),
        ("overrides", of_service),
        ("clear_override", of_one),
        ("drain", of_one),
        ("unregister", r#"{backend="memory" service="orders" instance="2"}"#),
        ("destroy", of_all),
        ("keep", of_all),
        ("follow", of_service),
    ] {
        assert_eq!(log.count(&format!(" {verb}{fields}")), 1, "{verb}: {:#?}", log.spans());
    }
    let lines = log.lines();
    assert!(!lines.iter().any(|line| line.contains(PLANTED)), "{lines:#?}");
}

#[tokio::test]
async fn discover_has_a_span_only_where_it_asks_the_store() {
    let log = Log::default();
    let (registry, _) = registry();
    registry.watch("orders").await.unwrap();
    let _listening = log.listen(Level::TRACE);
    for _ in 0..10 {
        registry.discover("orders").await.unwrap();
    }
    assert_eq!(log.spans(), [""; 0]);
    registry.discover("payments").await.unwrap();
    assert_eq!(log.count(r#" discover{backend="memory" service="payments"}"#), 1);
}

#[tokio::test]
async fn the_background_belongs_to_itself_and_not_to_who_called_first() {
    let log = Log::default();
    let _listening = log.listen(Level::DEBUG);
    let (registry, link) = registry();
    registry.register(instance("1")).await.unwrap();
    let mut watcher = registry.watch("orders").await.unwrap();
    link.cut();
    while watcher.current().freshness().as_str() != "stale" {
        watcher.next().await.unwrap();
    }
    let lines = log.lines();
    let said = |what: &str| lines.iter().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{lines:#?}"));
    let registered = said("keep: registration ");
    assert!(registered.contains(r#" keep{backend="memory"}: "#) && !registered.contains("register{"), "{registered}");
    let stale = said("follow: stale ");
    assert!(stale.contains(r#" follow{backend="memory" service="orders"}: "#), "{stale}");
    assert!(!stale.contains("watch{"), "{stale}");
}

#[tokio::test]
async fn nobody_who_asks_for_less_than_debug_gets_a_span() {
    let log = Log::default();
    let _listening = log.listen(Level::INFO);
    let (registry, _) = registry();
    registry.register(instance("1")).await.unwrap();
    registry.watch("orders").await.unwrap();
    assert!(log.spans().is_empty(), "{:?}", log.spans());
    assert!(!log.lines().is_empty());
}
