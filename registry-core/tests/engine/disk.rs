//! What is kept on disk: a process starts and serves with the store down, and never with what is not the last truth.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures::StreamExt;
use registry_core::{
    Departure, Error, ErrorKind, Event, Freshness, Instance, Options, Override, Registry, Status, Update,
    memory::MemoryStore,
};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{
    script::{Director, Feed, Script, gone, overridden, reset, upsert},
    *,
};

const SECOND: Duration = Duration::from_secs(1);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what is on disk may be used: short, so that a test has few seconds to go through.
const MAX_AGE: Duration = Duration::from_secs(200);

fn options(dir: impl AsRef<Path>) -> Options {
    Options::default().snapshot_dir(dir.as_ref()).snapshot_max_age(MAX_AGE)
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The files of a directory, those that are being written included.
fn files(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Those that are whole. To take away one that is being written is a failure of the disk.
fn finished(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    files(dir).into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "snapshot")).collect()
}

fn only_file(dir: impl AsRef<Path>) -> PathBuf {
    let files = finished(dir);
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

/// What the only file of a directory holds, once there is one.
async fn written(dir: &TempDir) -> String {
    eventually(4 * SECOND, || !finished(dir).is_empty(), || "nothing is written".to_owned()).await;
    fs::read_to_string(only_file(dir)).unwrap()
}

/// The ids in a file, without the time at which it was written.
fn kept_ids(file: &str) -> Vec<&str> {
    let records = file.lines().skip(2).map(|line| line.split_once(' ').unwrap().0);
    records.map(|path| path.strip_prefix("orders/providers/").unwrap()).collect()
}

/// A process that follows `orders`, which has these instances.
async fn follower(dir: &TempDir, ids: &[&str]) -> (Managed<Script>, Director, Feed, Watcher) {
    let (registry, director) = Script::registry(options(dir));
    let feed = director.subscription();
    feed.reset(1, ids);
    let mut watcher = registry.watch("orders").await.unwrap();
    assert_eq!(super::ids(&watcher.next().await.unwrap()), ids);
    (registry, director, feed, watcher)
}

/// Leaves on disk what a process leaves that saw these instances and has ended.
async fn leave_behind(dir: &TempDir, ids: &[&str]) {
    let (registry, _director, _feed, _watcher) = follower(dir, ids).await;
    registry.destroy().await.unwrap();
    assert_eq!(kept_ids(&written(dir).await), ids);
}

fn refused() -> Error {
    Error::new(ErrorKind::Unavailable, "connection refused")
}

fn since(snapshot: &Snapshot) -> SystemTime {
    match snapshot.freshness() {
        Freshness::Stale { since } => since,
        other => panic!("it is {other}"),
    }
}

/// What is logged from now on, by this thread.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl Logged {
    fn listen() -> (Self, tracing::subscriber::DefaultGuard) {
        let logged = Self::default();
        let writer = logged.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::INFO);
        let guard = tracing::subscriber::set_default(subscriber.with_writer(move || writer.clone()).finish());
        (logged, guard)
    }

    fn lines(&self, with: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains(with)).map(str::to_owned).collect()
    }
}

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_starts_at_once_with_what_is_on_disk_when_the_store_refuses_it() {
    let dir = folder();
    let before = SystemTime::now() - Duration::from_millis(1);
    leave_behind(&dir, &["a", "b"]).await;
    let after = SystemTime::now();

    let (registry, director) = Script::registry(options(&dir));
    let mut events = registry.events();
    director.refuse(refused());
    let began = Instant::now();
    let found = registry.discover("orders").await.unwrap();
    assert!(began.elapsed() < SECOND / 10, "{:?}", began.elapsed());
    assert_eq!(ids(&found), ["a", "b"]);
    assert!(before <= since(&found) && since(&found) <= after, "since it was last known to be live");
    let mut watcher = registry.watch("orders").await.unwrap();
    assert_eq!(ids(&watcher.next().await.unwrap()), ["a", "b"]);
    assert!(matches!(events.next().await, Some(Event::Stale { cause, .. }) if cause.kind() == ErrorKind::Unavailable));

    (0..5).for_each(|_| director.refuse(refused()));
    sleep(TTL).await;
    assert_eq!(since(&watcher.current()), since(&found), "for as long as it takes");
    let feed = director.subscription();
    feed.reset(1, &["a", "b"]);
    let seen = until(&mut watcher, TTL, |s| s.freshness() == Freshness::Live).await;
    assert!(seen.last().unwrap().changes_since(&found).is_empty(), "what is as before is no change");
}

#[tokio::test(start_paused = true)]
async fn a_process_starts_with_what_is_on_disk_before_a_call_to_a_silent_store_is_over() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let (registry, director) = Script::registry(options(&dir));
    let began = Instant::now();
    let found = registry.discover("orders").await.unwrap();
    assert!((REQUEST_TIMEOUT / 2..REQUEST_TIMEOUT).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(ids(&found), ["a", "b"]);
    let known = since(&found);
    sleep(3 * REQUEST_TIMEOUT).await;
    assert_eq!(since(&registry.discover("orders").await.unwrap()), known);
    let feed = director.subscription();
    feed.reset(1, &["c"]);
    let mut watcher = registry.watch("orders").await.unwrap();
    let seen = until(&mut watcher, TTL, |s| s.freshness() == Freshness::Live).await;
    assert_eq!(ids(seen.last().unwrap()), ["c"]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_answers_in_time_is_believed_and_the_disk_is_not_read() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let (registry, director) = Script::registry(options(&dir));
    let (found, ()) = tokio::join!(registry.discover("orders"), async {
        sleep(REQUEST_TIMEOUT / 2 - SECOND / 10).await;
        director.subscription().reset(1, &["c"]);
    });
    assert_eq!(ids(&found.unwrap()), ["c"]);
}

#[tokio::test(start_paused = true)]
async fn what_the_store_lacks_is_gone_at_once_and_never_protected() {
    for (rewound, left) in [(false, &["a"][..]), (true, &["a"]), (false, &[]), (true, &[])] {
        let dir = folder();
        leave_behind(&dir, &["a", "b", "c", "d"]).await;
        let (registry, director) = Script::registry(options(&dir));
        director.refuse(refused());
        let mut watcher = registry.watch("orders").await.unwrap();
        assert_eq!(watcher.next().await.unwrap().len(), 4);
        let feed = director.subscription();
        feed.send(1, vec![reset(left, &[], rewound)]);
        let next = watcher.next().await.unwrap();
        assert_eq!((ids(&next), next.freshness()), (left.iter().map(ToString::to_string).collect(), Freshness::Live));
        quiet(&mut watcher, TTL).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_on_disk_is_never_used_once_the_store_has_told_the_set() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let (registry, director) = Script::registry(options(&dir));
    let feed = director.subscription();
    feed.reset(1, &[]);
    let mut watcher = registry.watch("orders").await.unwrap();
    assert!(watcher.next().await.unwrap().is_empty());
    feed.fail();
    (0..5).for_each(|_| director.refuse(refused()));
    let seen = until(&mut watcher, TTL, |s| matches!(s.freshness(), Freshness::Stale { .. })).await;
    assert!(seen.iter().all(Snapshot::is_empty));
    sleep(TTL).await;
    assert!(watcher.current().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_on_disk_does_not_hide_that_the_store_refuses_us() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let (registry, director) = Script::registry(options(&dir));
    director.refuse(Error::new(ErrorKind::PermissionDenied, "wrong password"));
    assert_eq!(registry.discover("orders").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    (0..100).for_each(|_| director.refuse(refused()));
    assert_eq!(
        registry.discover("orders").await.unwrap_err().kind(),
        ErrorKind::Unavailable,
        "nor does an outage then"
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_store_refuses_late_is_told_by_an_event_and_takes_nothing_from_readers() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let (registry, director) = Script::registry(options(&dir));
    let mut events = registry.events();
    let feed = director.subscription();
    let mut watcher = registry.watch("orders").await.unwrap();
    assert_eq!(watcher.next().await.unwrap().len(), 2, "the store is silent");
    feed.refuse(Error::new(ErrorKind::PermissionDenied, "wrong password"));
    let told = events.next().await;
    assert!(matches!(told, Some(Event::Stale { cause, .. }) if cause.kind() == ErrorKind::PermissionDenied));
    sleep(TTL).await;
    assert_eq!(registry.discover("orders").await.unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_panics_at_the_start_is_a_store_that_is_down() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let (registry, director) = Script::registry(options(&dir));
    director.subscription().panic();
    assert_eq!(ids(&registry.discover("orders").await.unwrap()), ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn only_a_set_that_is_live_and_not_empty_is_written() {
    let dir = folder();
    let ten: Vec<String> = (0..10).map(|id| format!("i{id}")).collect();
    let ten: Vec<&str> = ten.iter().map(String::as_str).collect();
    let (_registry, director, feed, mut watcher) = follower(&dir, &ten).await;
    let first = written(&dir).await;
    assert_eq!(kept_ids(&first), ten);

    feed.send(2, ten[..5].iter().map(|id| gone(id, Departure::Unknown)).collect());
    until(&mut watcher, SECOND, |s| matches!(s.freshness(), Freshness::Protected { .. })).await;
    feed.send(3, vec![upsert("new")]);
    until(&mut watcher, SECOND, |s| s.len() == 11).await;
    sleep(10 * SECOND).await;
    assert_eq!(written(&dir).await, first, "not what is protected");

    feed.fail();
    (0..5).for_each(|_| director.refuse(refused()));
    until(&mut watcher, SECOND, |s| matches!(s.freshness(), Freshness::Stale { .. })).await;
    sleep(10 * SECOND).await;
    assert_eq!(written(&dir).await, first, "not what is stale");

    let feed = director.subscription();
    feed.reset(4, &ten[5..]);
    until(&mut watcher, 3 * TTL, |s| s.freshness() == Freshness::Live).await;
    sleep(2 * SECOND).await;
    let fewer = written(&dir).await;
    assert_eq!(kept_ids(&fewer), ten[5..]);

    feed.send(5, ten[5..].iter().map(|id| gone(id, Departure::Left)).collect());
    until(&mut watcher, SECOND, Snapshot::is_empty).await;
    sleep(2 * MAX_AGE).await;
    assert_eq!(written(&dir).await, fewer, "not what is empty");
}

#[tokio::test(start_paused = true)]
async fn a_quiet_service_is_written_anew_for_as_long_as_it_is_live() {
    let dir = folder();
    let store = MemoryStore::new();
    let (provider, reader) = (Process::start(&store), Process::with(&store, options(&dir)));
    provider.register("orders", "a").await;
    let mut watcher = reader.watch("orders").await;
    written(&dir).await;
    for _ in 0..3 {
        fs::remove_file(only_file(&dir)).unwrap();
        sleep(MAX_AGE / 4 - 3 * SECOND).await;
        assert!(files(&dir).is_empty(), "not before a quarter of the time is over");
        written(&dir).await;
    }
    reader.link.cut();
    until(&mut watcher, TTL, |s| matches!(s.freshness(), Freshness::Stale { .. })).await;
    fs::remove_file(only_file(&dir)).unwrap();
    sleep(MAX_AGE).await;
    assert!(files(&dir).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_service_that_changes_all_the_time_is_written_once_a_second() {
    let dir = folder();
    let (_registry, _director, feed, _watcher) = follower(&dir, &["a"]).await;
    written(&dir).await;
    let mut versions = std::collections::BTreeSet::new();
    for id in 0..400 {
        feed.send(id + 2, vec![upsert(&format!("{id}"))]);
        sleep(SECOND / 40).await;
        versions.insert(kept_ids(&written(&dir).await).len());
    }
    assert!((8..=12).contains(&versions.len()), "{versions:?} in ten seconds");
    sleep(2 * SECOND).await;
    assert_eq!(kept_ids(&written(&dir).await).len(), 401, "the last one is not missed");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_registry_leaves_its_last_set_on_disk() {
    for graceful in [true, false] {
        let dir = folder();
        let (registry, _director, feed, mut watcher) = follower(&dir, &["a"]).await;
        written(&dir).await;
        feed.send(2, vec![upsert("b")]);
        until(&mut watcher, SECOND, |s| s.len() == 2).await;
        if graceful {
            registry.destroy().await.unwrap();
            assert_eq!(kept_ids(&written(&dir).await), ["a", "b"], "when `destroy` answers it is there");
        } else {
            drop(registry);
            let file = || fs::read_to_string(only_file(&dir)).unwrap();
            eventually(SECOND, || kept_ids(&file()) == ["a", "b"], file).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_that_cannot_be_used_is_told_once_and_replaced_in_time() {
    type Harm = fn(&Path, String);
    let harms: [(&str, Harm); 9] = [
        ("its checksum is another", |path, file| {
            fs::write(path, file.replace("orders/providers/a ", "orders/providers/c ")).unwrap()
        }),
        ("its checksum is another", |path, file| fs::write(path, &file[..file.len() - 10]).unwrap()),
        ("its first line has no end", |path, file| fs::write(path, &file[..20]).unwrap()),
        ("its first line has no end", |path, _| fs::write(path, "").unwrap()),
        ("its first line is not one of ours", |path, _| fs::write(path, "[]\n[]\n").unwrap()),
        ("it is not UTF-8", |path, _| fs::write(path, [0xff; 100]).unwrap()),
        ("another format version", |path, file| fs::write(path, file.replace("registry 1 ", "registry 2 ")).unwrap()),
        ("bytes, at most 67108964 are read", |path, _| {
            fs::File::create(path).unwrap().set_len((64 << 20) + 101).unwrap()
        }),
        ("it is not a file", |path, _| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (why, harm) in harms {
        let dir = folder();
        leave_behind(&dir, &["a", "b"]).await;
        harm(&only_file(&dir), written(&dir).await);
        let (logged, _guard) = Logged::listen();
        let (registry, director) = Script::registry(options(&dir));
        (0..20).for_each(|_| director.refuse(refused()));
        assert_eq!(registry.discover("orders").await.unwrap_err().kind(), ErrorKind::Unavailable, "{why}");
        let lines = logged.lines("is not used");
        assert!(matches!(&lines[..], [line] if line.contains("WARN") && line.contains(why)), "{why}: {lines:?}");
        if only_file(&dir).is_dir() {
            fs::remove_dir(only_file(&dir)).unwrap();
        }
        let feed = director.subscription();
        feed.reset(1, &["c"]);
        let mut watcher = registry.watch("orders").await.unwrap();
        until(&mut watcher, 60 * SECOND, |s| s.len() == 1).await;
        let text = |path: &PathBuf| {
            fs::metadata(path).ok().filter(|about| about.len() < 1000).and_then(|_| fs::read_to_string(path).ok())
        };
        let replaced = || finished(&dir).first().and_then(text).is_some_and(|file| kept_ids(&file) == ["c"]);
        eventually(4 * SECOND, replaced, || why.to_owned()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_file_of_another_service_is_not_used() {
    let dir = folder();
    leave_behind(&dir, &["a", "b"]).await;
    let orders = only_file(&dir);
    let store = MemoryStore::new();
    let (process, other) = (Process::with(&store, options(&dir)), "payments");
    process.register(other, "1").await;
    let watcher = process.watch(other).await;
    eventually(4 * SECOND, || finished(&dir).len() == 2, String::new).await;
    let payments = finished(&dir).into_iter().find(|path| *path != orders).unwrap();
    drop(watcher);
    process.registry.destroy().await.unwrap();
    fs::copy(&orders, &payments).unwrap();

    let (logged, _guard) = Logged::listen();
    let process = Process::with(&store, options(&dir));
    process.link.cut();
    assert_eq!(process.registry.discover(other).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(logged.lines("it is of \\\"orders\\\" at script here").len(), 1, "{:?}", logged.lines(""));
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_fails_is_told_once_and_is_no_failure_of_the_registry() {
    let (logged, _guard) = Logged::listen();
    let dir = folder();
    let inner = dir.path().join("inner");
    let (registry, director) = Script::registry(options(&inner));
    fs::remove_dir(&inner).unwrap();
    fs::write(&inner, "in the way").unwrap();
    let feed = director.subscription();
    feed.reset(1, &["a"]);
    let mut watcher = registry.watch("orders").await.unwrap();
    for id in 0..100 {
        feed.send(id + 2, vec![upsert(&format!("{id}"))]);
        sleep(SECOND).await;
    }
    until(&mut watcher, SECOND, |s| s.len() == 101 && s.freshness() == Freshness::Live).await;
    let lines = logged.lines("kept on disk");
    assert!(matches!(&lines[..], [line] if line.contains("WARN") && line.contains("inner")), "{lines:?}");

    fs::remove_file(&inner).unwrap();
    eventually(40 * SECOND, || inner.is_dir() && !finished(&inner).is_empty(), || "it is not tried again".to_owned())
        .await;
    assert_eq!(kept_ids(&fs::read_to_string(only_file(&inner)).unwrap()).len(), 101);
    eventually(SECOND, || logged.lines("kept on disk again").len() == 1, || format!("{:?}", logged.lines(""))).await;

    fs::remove_dir_all(&inner).unwrap();
    fs::write(&inner, "in the way").unwrap();
    registry.destroy().await.unwrap();
    let (registry, director) = Script::registry(options(&dir).snapshot_dir(dir.path().join("other")));
    fs::remove_dir(dir.path().join("other")).unwrap();
    director.refuse(refused());
    assert_eq!(registry.discover("orders").await.unwrap_err().kind(), ErrorKind::Unavailable, "nothing is kept");
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_cannot_be_made_is_bad_input() {
    let dir = folder();
    fs::write(dir.path().join("file"), "").unwrap();
    let wrong = dir.path().join("file/below");
    let backend = registry_core::memory::MemoryBackend::new(MemoryStore::new(), TTL);
    let error = Managed::new(backend, options(&wrong)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().starts_with("cannot make snapshot_dir") && error.to_string().contains("file/below"));
    Process::with(&MemoryStore::new(), options(dir.path().join("made/below")));
    assert!(dir.path().join("made/below").is_dir(), "what can be made is made");
}

#[tokio::test(start_paused = true)]
async fn two_stores_that_share_a_directory_are_kept_apart() {
    let dir = folder();
    for (namespace, id) in [("here", "a"), ("there", "b")] {
        let (registry, director) = Script::registry_at(namespace, options(&dir));
        let feed = director.subscription();
        feed.reset(1, &[id]);
        registry.discover("orders").await.unwrap();
        registry.destroy().await.unwrap();
    }
    for (namespace, id) in [("here", Some("a")), ("there", Some("b")), ("elsewhere", None)] {
        let (registry, director) = Script::registry_at(namespace, options(&dir));
        (0..20).for_each(|_| director.refuse(refused()));
        let found = registry.discover("orders").await.ok();
        assert_eq!(found.as_ref().map(ids), id.map(|id| vec![id.to_owned()]), "{namespace}");
    }
}

#[tokio::test(start_paused = true)]
async fn any_service_name_has_a_file_of_its_own() {
    let dir = folder();
    let store = MemoryStore::new();
    let long = "ü".repeat(127);
    let names =
        ["a/b", "a%2Fb", "..", "Orders", "orders", &long, &format!("{}x", &long[..252]), &format!("{}y", &long[..252])];
    let process = Process::with(&store, options(&dir));
    for (number, name) in names.iter().enumerate() {
        let instance = Instance::builder(name, format!("of {number}")).metadata("ü", "\n\"").build().unwrap();
        process.registry.register(instance).await.unwrap();
        process.registry.discover(name).await.unwrap();
    }
    eventually(4 * SECOND, || finished(&dir).len() == names.len(), || format!("{:?}", files(&dir))).await;
    let seen = futures::future::join_all(names.iter().map(|name| process.registry.discover(name))).await;
    process.crash();

    let process = Process::with(&store, options(&dir));
    process.link.cut();
    for (name, seen) in names.iter().zip(seen) {
        let found = process.registry.discover(name).await.unwrap();
        assert!(matches!(found.freshness(), Freshness::Stale { .. }));
        assert_eq!(found.instances(), seen.unwrap().instances());
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_operator_set_is_kept_with_the_instance() {
    let dir = folder();
    let (registry, _director, feed, mut watcher) = follower(&dir, &["a", "b"]).await;
    let mut set = Override::default();
    (set.status, set.weight) = (Some(Status::Draining), Some(0));
    feed.send(2, vec![Update::Upsert(overridden("a", set))]);
    until(&mut watcher, SECOND, |s| s.available().count() == 1).await;
    registry.destroy().await.unwrap();

    let (registry, director) = Script::registry(options(&dir));
    director.refuse(refused());
    let found = registry.discover("orders").await.unwrap();
    let a = found.get("a").unwrap();
    assert_eq!((found.len(), found.available().count(), a.status, a.weight), (2, 1, Status::Draining, 0));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_no_longer_followed_is_no_longer_written() {
    let dir = folder();
    let store = MemoryStore::new();
    let process = Process::with(&store, options(&dir).idle_timeout(60 * SECOND));
    process.register("orders", "1").await;
    drop(process.watch("orders").await);
    written(&dir).await;
    eventually(200 * SECOND, || store.watchers() == 0, || "it is still followed".to_owned()).await;
    fs::remove_file(only_file(&dir)).unwrap();
    sleep(MAX_AGE).await;
    assert!(files(&dir).is_empty());
    process.registry.discover("orders").await.unwrap();
    written(&dir).await;
}
