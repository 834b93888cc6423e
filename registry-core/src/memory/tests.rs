use futures::FutureExt;
use tokio::time::{advance, sleep, timeout};

use super::*;
use crate::{Content, Departure, Instance, Override, Status, Update};

const SECOND: Duration = Duration::from_secs(1);
const TTL: Duration = Duration::from_secs(9);
const SOON: Duration = Duration::from_millis(10);

type Subscription = BoxStream<'static, Result<Updates>>;

fn orders() -> ServiceName {
    "orders".parse().unwrap()
}

fn key(id: &str) -> Key {
    Key::provider(orders(), id.parse().unwrap())
}

fn key_in(directory: Directory, id: &str) -> Key {
    Key { directory, ..key(id) }
}

fn record_at(key: Key, epoch: Epoch) -> Record {
    let content = Content::Instance(Instance::new(key.service.clone(), key.id.clone()).into());
    // The backend writes its own token, whatever this one is.
    Record { key, owner: Owner::random(), epoch, lifetime: Lifetime::Session, content }
}

fn record(id: &str) -> Record {
    record_at(key(id), 1)
}

fn weighing(id: &str, weight: u32) -> Record {
    let mut instance = Instance::new(orders(), id.parse().unwrap());
    instance.weight = weight;
    Record { content: Content::Instance(instance.into()), ..record(id) }
}

fn drained(id: &str) -> Record {
    let content = Content::Override(Override { status: Some(Status::Down), weight: None });
    Record { lifetime: Lifetime::Persistent, content, ..record_at(key_in(Directory::Overrides, id), 1) }
}

fn backend(store: &MemoryStore) -> MemoryBackend {
    MemoryBackend::new(store.clone(), TTL)
}

fn pair() -> (MemoryStore, MemoryBackend, MemoryBackend) {
    let store = MemoryStore::new();
    (store.clone(), backend(&store), backend(&store))
}

async fn claim(backend: &MemoryBackend, ids: &[&str]) {
    let records: Vec<Record> = ids.iter().map(|id| record(id)).collect();
    for outcome in backend.put(&records, Intent::Claim).await {
        outcome.unwrap();
    }
}

async fn put(backend: &MemoryBackend, record: Record, why: Intent) -> Result<Epoch> {
    backend.put(&[record], why).await.remove(0)
}

async fn remove(backend: &MemoryBackend, key: Key) -> bool {
    backend.remove(&[key]).await.remove(0).unwrap()
}

async fn listed(backend: &MemoryBackend) -> Vec<String> {
    let records = backend.list(&orders(), Directory::Providers).await.unwrap();
    records.iter().map(|record| record.key.id.to_string()).collect()
}

async fn follow(backend: &MemoryBackend, since: Option<Cursor>) -> (Subscription, Updates) {
    let mut subscription = backend.subscribe(&orders(), since).await.unwrap();
    let first = subscription.next().now_or_never().expect("the first item comes at once").unwrap().unwrap();
    (subscription, first)
}

async fn next(subscription: &mut Subscription) -> Vec<Update> {
    timeout(TTL * 2, subscription.next()).await.expect("an item").expect("no end").unwrap().updates
}

async fn assert_silent(subscription: &mut Subscription) {
    assert!(timeout(SOON, subscription.next()).await.is_err());
}

/// The updates as short text: `+a`, `-a left`, `-a`.
fn spell(updates: &[Update]) -> Vec<String> {
    let spell = |update: &Update| match update {
        Update::Upsert(record) => format!("+{}", record.key.id),
        Update::Remove { key, cause: Departure::Left } => format!("-{} left", key.id),
        Update::Remove { key, cause: Departure::Unknown } => format!("-{}", key.id),
        Update::Reset { records, left, rewound } => {
            let ids = |keys: Vec<&Key>| keys.iter().map(|key| key.id.to_string()).collect::<Vec<_>>().join(",");
            let (records, left) = (ids(records.iter().map(|record| &record.key).collect()), ids(left.iter().collect()));
            format!("={records} left:{left}{}", if *rewound { " rewound" } else { "" })
        }
    };
    updates.iter().map(spell).collect()
}

fn told(backend: &MemoryBackend) -> impl FnMut() -> Vec<SessionEvent> + use<> {
    let mut events = backend.events();
    move || std::iter::from_fn(|| events.next().now_or_never().flatten()).collect()
}

fn unavailable_from<T: fmt::Debug>(result: Result<T>) -> bool {
    result.unwrap_err().kind() == ErrorKind::Unavailable
}

#[tokio::test(start_paused = true)]
async fn a_named_store_is_shared_as_long_as_anyone_holds_it() {
    let first = MemoryStore::named("a_named_store");
    claim(&backend(&first), &["a"]).await;
    let second = MemoryStore::named("a_named_store");
    assert_eq!(second.paths(), ["orders/providers/a"]);
    assert!(MemoryStore::named("another_named_store").paths().is_empty());
    drop((first, second));
    assert!(MemoryStore::named("a_named_store").paths().is_empty());
}

#[test]
fn a_location_names_a_store_and_nothing_else() {
    let config = |url: &str| MemoryConfig::from_location(Location::parse(url).unwrap());
    assert_eq!(config("memory://").unwrap(), MemoryConfig::default());
    assert_eq!(config("memory://shop").unwrap().name.as_deref(), Some("shop"));
    assert_eq!(config("memory://shop/eu/1?ttl=3s").unwrap().name.as_deref(), Some("shop/eu/1"));
    for (url, why) in [
        ("memory://a,b", "more than one name"),
        ("memory://a:1", "no ports"),
        ("memory://u:secret@a", "no users"),
        ("memory:///eu", "a prefix but no name"),
        ("memory://a?tls=on", "unknown option"),
        ("memory://a?ttl=1ms", "invalid ttl"),
        ("etcd://a", "not memory"),
    ] {
        let error = config(url).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(why) && !error.to_string().contains("secret"), "{url}: {error}");
    }
    let read: MemoryConfig = serde_json::from_str(r#"{"name":"shop","options":{"ttl":"3s"}}"#).unwrap();
    assert_eq!(read, MemoryConfig::default().name("shop".to_owned()).options(Options::default().ttl(3 * SECOND)));
}

#[tokio::test(start_paused = true)]
async fn a_claim_takes_over_and_raises_the_epoch() {
    let (store, old, new) = pair();
    assert_eq!(put(&old, record("a"), Intent::Claim).await.unwrap(), 1);
    assert_eq!(put(&new, record("a"), Intent::Claim).await.unwrap(), 2);
    store.expire(old.owner());
    let held = new.list(&orders(), Directory::Providers).await.unwrap();
    assert_eq!((&held[0].owner, held[0].epoch), (new.owner(), 2));
}

#[tokio::test(start_paused = true)]
async fn a_restore_writes_only_what_is_absent_or_ours() {
    let (store, ours, other) = pair();
    assert_eq!(put(&ours, record_at(key("a"), 5), Intent::Restore).await.unwrap(), 5);
    assert_eq!(put(&ours, record_at(key("a"), 6), Intent::Restore).await.unwrap(), 6);
    let older = put(&ours, record_at(key("a"), 5), Intent::Restore).await.unwrap_err();
    assert_eq!(older.kind(), ErrorKind::Conflict);
    let foreign = put(&other, record_at(key("a"), 9), Intent::Restore).await.unwrap_err();
    assert_eq!(foreign.kind(), ErrorKind::Conflict);
    assert_eq!(foreign.to_string(), "memory: cannot restore orders/a: it is held by another owner");
    store.put_raw("orders/providers/b", b"nobody can read this");
    assert_eq!(put(&ours, record_at(key("b"), 3), Intent::Restore).await.unwrap(), 3);
    store.put_raw("orders/providers/b", b"nobody can read this");
    assert_eq!(put(&ours, record("b"), Intent::Claim).await.unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_one_revision_and_each_record_has_its_own_outcome() {
    let (_, ours, other) = pair();
    claim(&other, &["b"]).await;
    let (mut subscription, _) = follow(&other, None).await;
    let mut large = record("d");
    let instance = Instance::builder("orders", "d").metadata("x", "y".repeat(crate::MAX_RECORD_BYTES)).build().unwrap();
    large.content = Content::Instance(instance.into());
    let outcomes = ours.put(&[record("a"), record("b"), large, record("c")], Intent::Restore).await;
    let kinds: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().map_err(Error::kind)).collect();
    assert_eq!(kinds, [Ok(&1), Err(ErrorKind::Conflict), Err(ErrorKind::InvalidInput), Ok(&1)]);
    assert_eq!(spell(&next(&mut subscription).await), ["+a", "+c"]);
}

#[tokio::test(start_paused = true)]
async fn the_same_bytes_again_are_no_event() {
    let (_, ours, reader) = pair();
    claim(&ours, &["a"]).await;
    let (mut subscription, first) = follow(&reader, None).await;
    put(&ours, record("a"), Intent::Restore).await.unwrap();
    assert_silent(&mut subscription).await;
    assert!(!reader.probe(&orders(), &first.cursor.unwrap()).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_record_put_again_moves_to_the_present_session() {
    let (store, ours, _) = pair();
    claim(&ours, &["a"]).await;
    let bytes = store.get_raw("orders/providers/a").unwrap();
    // Our own record, but under no session.
    store.put_raw("orders/providers/a", &bytes);
    assert_eq!(ours.renew(&[key("a")]).await.unwrap().missing, [key("a")]);
    put(&ours, record("a"), Intent::Restore).await.unwrap();
    assert_eq!(ours.renew(&[key("a")]).await.unwrap().missing, []);
    assert_eq!(store.get_raw("orders/providers/a").unwrap(), bytes);
}

#[tokio::test(start_paused = true)]
async fn a_crashed_owner_is_gone_after_its_ttl_in_one_revision() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a", "b"]).await;
    advance(SECOND).await;
    ours.renew(&[]).await.unwrap();
    let (mut subscription, _) = follow(&reader, None).await;
    let crash = tokio::time::Instant::now();
    drop(ours);
    assert_eq!(spell(&next(&mut subscription).await), ["-a", "-b"]);
    assert!(crash.elapsed() >= TTL && crash.elapsed() < TTL + SOON, "{:?}", crash.elapsed());
    assert_eq!((store.sessions(), store.paths()), (0, vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_session_lives_as_long_as_it_is_renewed() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a"]).await;
    let (mut subscription, _) = follow(&reader, None).await;
    for _ in 0..10 {
        assert!(timeout(TTL / 3, subscription.next()).await.is_err());
        assert_eq!(ours.renew(&[key("a")]).await.unwrap(), Renewal::default());
    }
    sleep(TTL).await;
    assert_eq!(store.sessions(), 0);
}

#[test]
fn a_session_expires_also_when_the_runtime_that_opened_it_is_gone() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let store = MemoryStore::new();
    let brief = Duration::from_millis(50);
    let ours = MemoryBackend::new(store.clone(), brief);
    runtime().block_on(claim(&ours, &["a"]));
    let reader = backend(&store);
    runtime().block_on(async {
        let (mut subscription, first) = follow(&reader, None).await;
        assert_eq!(spell(&first.updates), ["=a left:"]);
        assert_eq!(spell(&next(&mut subscription).await), ["-a"]);
    });
}

#[tokio::test(start_paused = true)]
async fn a_renewal_reports_what_is_not_ours_any_more() {
    let (store, ours, other) = pair();
    claim(&ours, &["a", "b", "c", "d"]).await;
    store.delete(&key("a"));
    store.put_raw("orders/providers/b", b"{}");
    claim(&other, &["c"]).await;
    let keys = ["a", "b", "c", "d"].map(key);
    assert_eq!(ours.renew(&keys).await.unwrap().missing, keys[..3]);
}

#[tokio::test(start_paused = true)]
async fn an_override_is_not_missing_though_no_session_holds_it() {
    let (store, ours, _) = pair();
    put(&ours, drained("a"), Intent::Claim).await.unwrap();
    let keys = [key_in(Directory::Overrides, "a")];
    assert_eq!(ours.renew(&keys).await.unwrap().missing, []);
    assert_eq!(ours.verify(&keys).await.unwrap(), keys);
    assert_eq!(store.sessions(), 0);
    sleep(TTL * 2).await;
    assert_eq!(store.paths(), ["orders/overrides/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_lost_session_is_told_once_and_renewed_by_the_next_put() {
    let (store, ours, _) = pair();
    let mut told = told(&ours);
    assert_eq!(told(), [SessionEvent::Connecting, SessionEvent::Connected { ttl: TTL }]);
    claim(&ours, &["a"]).await;
    assert_eq!(told(), []);
    assert!(store.expire(ours.owner()) && !store.expire(ours.owner()));
    assert_eq!(ours.renew(&[key("a")]).await.unwrap().missing, [key("a")]);
    ours.renew(&[]).await.unwrap();
    assert_eq!(told(), [SessionEvent::Lost]);
    assert_eq!(store.sessions(), 0);
    put(&ours, record("a"), Intent::Restore).await.unwrap();
    assert_eq!(told(), [SessionEvent::Renewed]);
    store.expire_all();
    put(&ours, record("a"), Intent::Restore).await.unwrap();
    assert_eq!(told(), [SessionEvent::Lost, SessionEvent::Renewed]);
}

#[tokio::test(start_paused = true)]
async fn a_removal_takes_only_what_is_ours_and_is_marked_in_the_same_revision() {
    let (store, ours, other) = pair();
    claim(&ours, &["a", "b"]).await;
    claim(&other, &["b"]).await;
    store.put_raw("orders/providers/c", b"nobody's");
    let (mut subscription, _) = follow(&other, None).await;
    let removed = ours.remove(&["a", "b", "c", "absent"].map(key)).await;
    let removed: Vec<bool> = removed.into_iter().map(Result::unwrap).collect();
    assert_eq!(removed, [true, false, false, false]);
    assert_eq!(spell(&next(&mut subscription).await), ["-a left"]);
    store.delete(&key("b"));
    assert_eq!(spell(&next(&mut subscription).await), ["-b"]);
}

#[tokio::test(start_paused = true)]
async fn a_removal_needs_no_session_of_the_record() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a"]).await;
    let bytes = store.get_raw("orders/providers/a").unwrap();
    store.expire(ours.owner());
    store.put_raw("orders/providers/a", &bytes);
    let (mut subscription, _) = follow(&reader, None).await;
    assert!(remove(&ours, key("a")).await);
    assert_eq!(spell(&next(&mut subscription).await), ["-a left"]);
}

#[tokio::test(start_paused = true)]
async fn overrides_are_removed_by_anyone_and_consumers_without_a_mark() {
    let (store, ours, other) = pair();
    put(&other, drained("a"), Intent::Claim).await.unwrap();
    put(&ours, record_at(key_in(Directory::Consumers, "me"), 1), Intent::Claim).await.unwrap();
    let (mut subscription, first) = follow(&other, None).await;
    let Update::Reset { records, .. } = &first.updates[0] else { panic!("{first:?}") };
    assert_eq!(records[0].key, key_in(Directory::Overrides, "a"));
    assert!(remove(&ours, key_in(Directory::Overrides, "a")).await);
    assert_eq!(spell(&next(&mut subscription).await), ["-a"]);
    assert!(remove(&ours, key_in(Directory::Consumers, "me")).await);
    assert_silent(&mut subscription).await;
    assert_eq!(store.paths(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn verify_finds_what_our_session_alone_keeps_alive() {
    let (_, ours, other) = pair();
    claim(&ours, &["a", "orphan", "taken"]).await;
    claim(&other, &["taken"]).await;
    remove(&ours, key("a")).await;
    claim(&ours, &["b"]).await;
    assert_eq!(ours.verify(&["a", "b", "taken"].map(key)).await.unwrap(), ["b", "orphan"].map(key));
}

#[tokio::test(start_paused = true)]
async fn the_first_item_comes_at_once_also_when_there_is_nothing() {
    let (_, ours, reader) = pair();
    let (mut subscription, first) = follow(&reader, None).await;
    assert_eq!(spell(&first.updates), ["= left:"]);
    claim(&ours, &["a"]).await;
    assert_eq!(spell(&next(&mut subscription).await), ["+a"]);
}

#[tokio::test(start_paused = true)]
async fn a_reader_resumes_from_its_cursor_without_a_loss() {
    let (_, ours, reader) = pair();
    claim(&ours, &["a", "b"]).await;
    let (subscription, first) = follow(&reader, None).await;
    drop(subscription);
    remove(&ours, key("a")).await;
    claim(&ours, &["c"]).await;
    let (mut subscription, resumed) = follow(&reader, first.cursor).await;
    assert_eq!(resumed.updates, []);
    assert_eq!(spell(&next(&mut subscription).await), ["-a left"]);
    assert_eq!(spell(&next(&mut subscription).await), ["+c"]);
}

#[tokio::test(start_paused = true)]
async fn a_cursor_that_the_log_forgot_gives_everything_and_who_left() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a", "b", "c"]).await;
    let (_, first) = follow(&reader, None).await;
    remove(&ours, key("a")).await;
    remove(&ours, key("b")).await;
    claim(&ours, &["b"]).await;
    store.compact();
    assert!(reader.probe(&orders(), first.cursor.as_ref().unwrap()).await.unwrap());
    let (_, reset) = follow(&reader, first.cursor).await;
    // `b` is back: should it vanish again, then not because it said so.
    assert_eq!(spell(&reset.updates), ["=b,c left:a"]);
}

#[tokio::test(start_paused = true)]
async fn another_history_is_rewound() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a"]).await;
    let (mut subscription, first) = follow(&reader, None).await;
    store.wipe();
    assert!(unavailable_from(subscription.next().await.unwrap()));
    assert!(subscription.next().await.is_none());
    assert_eq!((store.sessions(), store.paths(), store.watchers()), (0, vec![], 0));
    assert!(reader.probe(&orders(), first.cursor.as_ref().unwrap()).await.unwrap());
    // As many revisions as before: the number alone would not tell.
    claim(&ours, &["b"]).await;
    let (_, reset) = follow(&reader, first.cursor).await;
    assert_eq!(spell(&reset.updates), ["=b left: rewound"]);
    let (_, reset) = follow(&reader, Some(Cursor::new("from elsewhere"))).await;
    assert_eq!(spell(&reset.updates), ["=b left: rewound"]);
}

#[tokio::test(start_paused = true)]
async fn a_position_ahead_of_ours_is_rewound() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a"]).await;
    let at = store.with(|state| Position { revision: state.at.revision + 1, ..state.at });
    let (_, reset) = follow(&reader, Some(at.cursor())).await;
    assert_eq!(spell(&reset.updates), ["=a left: rewound"]);
    assert!(reader.probe(&orders(), &at.cursor()).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_slow_subscription_that_the_log_outran_gets_everything() {
    let (store, ours, reader) = pair();
    let (mut subscription, _) = follow(&reader, None).await;
    claim(&ours, &["a"]).await;
    for n in 0..10_000_u32 {
        put(&ours, weighing("b", n), Intent::Restore).await.unwrap();
    }
    assert_eq!(spell(&next(&mut subscription).await), ["=a,b left:"]);
    store.with(|state| assert!(state.after(state.at.revision - 10_000).is_some()));
    store.with(|state| assert!(state.after(state.at.revision - 10_001).is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_service_keeps_a_cursor_that_can_be_resumed() {
    let (_, ours, reader) = pair();
    let (mut subscription, first) = follow(&reader, None).await;
    let other = Key { service: "other".parse().unwrap(), ..key("a") };
    for n in 0..1000 {
        put(&ours, record_at(other.clone(), n), Intent::Restore).await.unwrap();
    }
    let moved = subscription.next().await.unwrap().unwrap();
    assert_eq!(moved.updates, []);
    assert_ne!(moved.cursor, first.cursor);
    assert_silent(&mut subscription).await;
}

#[tokio::test(start_paused = true)]
async fn a_revision_with_500_removals_is_one_item() {
    let (_, ours, reader) = pair();
    let ids: Vec<String> = (0..500).map(|n| n.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    claim(&ours, &ids).await;
    let (mut subscription, _) = follow(&reader, None).await;
    ours.close(&ids.iter().map(|id| key(id)).collect::<Vec<_>>()).await.unwrap();
    let gone = next(&mut subscription).await;
    assert!(gone.len() == 500 && spell(&gone).iter().all(|gone| gone.ends_with("left")), "{}", gone.len());
}

#[tokio::test(start_paused = true)]
async fn consumers_and_other_services_are_not_followed() {
    let (_, ours, reader) = pair();
    let (mut subscription, first) = follow(&reader, None).await;
    put(&ours, record_at(key_in(Directory::Consumers, "me"), 1), Intent::Claim).await.unwrap();
    put(&ours, record_at(Key { service: "orders-admin".parse().unwrap(), ..key("a") }, 1), Intent::Claim)
        .await
        .unwrap();
    assert_silent(&mut subscription).await;
    assert!(!reader.probe(&orders(), &first.cursor.clone().unwrap()).await.unwrap());
    claim(&ours, &["a"]).await;
    assert!(reader.probe(&orders(), &first.cursor.unwrap()).await.unwrap());
    assert_eq!(spell(&next(&mut subscription).await), ["+a"]);
    assert_eq!(reader.services().await.unwrap(), [orders(), "orders-admin".parse().unwrap()]);
    assert_eq!(reader.list(&orders(), Directory::Consumers).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn malformed_records_are_skipped_and_counted_and_hide_nothing() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a"]).await;
    store.put_raw("orders/providers/bad", b"\xff");
    let (mut subscription, first) = follow(&reader, None).await;
    assert_eq!(spell(&first.updates), ["=a left:"]);
    assert_eq!(listed(&reader).await, ["a"]);
    assert_eq!(reader.malformed(), 2);
    store.put_raw("orders/providers/worse", br#"{"v":1}"#);
    store.put_raw("orders/providers/not/ours", b"{}");
    claim(&ours, &["z"]).await;
    let mut seen = Vec::new();
    while seen != ["+z"] {
        seen = spell(&next(&mut subscription).await);
        assert!(seen.is_empty() || seen.iter().all(|update| update.contains("worse")) || seen == ["+z"], "{seen:?}");
    }
    assert_eq!(reader.malformed(), 3);
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_malformed_record_is_logged_once() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer({
        let log = log.clone();
        move || log.clone()
    });
    let _guard = tracing::subscriber::set_default(subscriber.finish());
    let (store, reader, _) = pair();
    store.put_raw("orders/providers/bad", b"s3cret");
    for _ in 0..3 {
        assert!(listed(&reader).await.is_empty());
    }
    let log = String::from_utf8(lock(&log.0).clone()).unwrap();
    assert!(log.lines().count() == 1 && log.contains("service=orders instance=bad"), "{log}");
    assert!(!log.contains("s3cret"), "{log}");
}

#[tokio::test(start_paused = true)]
async fn a_ttl_for_ever_does_not_overflow() {
    let ours = MemoryBackend::new(MemoryStore::new(), Duration::MAX);
    claim(&ours, &["a"]).await;
    let mut subscription = follow(&ours, None).await.0;
    assert_silent(&mut subscription).await;
}

#[tokio::test(start_paused = true)]
async fn close_leaves_nothing_and_says_that_it_leaves() {
    let (store, ours, reader) = pair();
    claim(&ours, &["a", "b"]).await;
    let mut subscription = follow(&reader, None).await.0;
    ours.close(&[key("a")]).await.unwrap();
    assert_eq!(spell(&next(&mut subscription).await), ["-a left"]);
    assert_eq!(spell(&next(&mut subscription).await), ["-b"]);
    assert_eq!((store.sessions(), store.paths()), (0, vec![]));
    ours.close(&[]).await.unwrap();
    assert_eq!(store.sessions(), 0);
}

#[tokio::test(start_paused = true)]
async fn dropped_subscriptions_are_gone_and_requests_are_counted() {
    let (store, ours, reader) = pair();
    let before = store.requests();
    let (one, two) = (follow(&reader, None).await.0, follow(&ours, None).await.0);
    assert_eq!((store.watchers(), store.requests() - before), (2, 2));
    drop(one);
    assert_eq!(store.watchers(), 1);
    drop(two);
    assert_eq!(store.watchers(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_cut_fails_calls_and_subscriptions_and_a_short_one_changes_nothing() {
    let (_, ours, reader) = pair();
    let mut told = told(&ours);
    claim(&ours, &["a"]).await;
    let (mut mine, (mut other, _)) = (follow(&ours, None).await.0, follow(&reader, None).await);
    told();
    ours.link().cut();
    assert!(unavailable_from(mine.next().await.unwrap()));
    assert!(unavailable_from(ours.renew(&[]).await));
    assert!(unavailable_from(ours.subscribe(&orders(), None).await.map(drop)));
    assert!(unavailable_from(put(&ours, record("b"), Intent::Claim).await));
    ours.link().heal();
    assert_eq!(told(), [SessionEvent::Suspended, SessionEvent::Connected { ttl: TTL }]);
    assert_eq!(ours.renew(&[key("a")]).await.unwrap().missing, []);
    assert_silent(&mut other).await;
}

#[tokio::test(start_paused = true)]
async fn a_subscription_does_not_survive_a_cut_that_healed_at_once() {
    let (_, ours, _) = pair();
    let mut subscription = follow(&ours, None).await.0;
    ours.link().cut();
    ours.link().heal();
    assert!(unavailable_from(subscription.next().await.unwrap()));
}

#[tokio::test(start_paused = true)]
async fn a_long_cut_costs_the_session() {
    let (store, ours, _) = pair();
    claim(&ours, &["a"]).await;
    let mut told = told(&ours);
    ours.link().cut();
    for _ in 0..3 {
        sleep(TTL / 3).await;
        let _ = ours.renew(&[key("a")]).await;
    }
    assert_eq!(store.paths(), Vec::<String>::new());
    ours.link().heal();
    told();
    assert_eq!(ours.renew(&[key("a")]).await.unwrap().missing, [key("a")]);
    assert_eq!(told(), [SessionEvent::Lost]);
}

#[tokio::test(start_paused = true)]
async fn a_hung_call_is_carried_out_late_if_somebody_still_waits() {
    let (store, ours, _) = pair();
    let mut told = told(&ours);
    told();
    ours.link().hang();
    assert_eq!(told(), []);
    assert!(timeout(TTL, put(&ours, record("given-up"), Intent::Claim)).await.is_err());
    assert_eq!(told(), [SessionEvent::Suspended]);
    let a = record("a");
    let mut late = std::pin::pin!(put(&ours, a, Intent::Claim));
    assert!(timeout(TTL, &mut late).await.is_err());
    assert_eq!(store.paths(), Vec::<String>::new());
    ours.link().heal();
    assert_eq!(late.await.unwrap(), 1);
    assert_eq!(store.paths(), ["orders/providers/a"]);
    assert_eq!(told(), [SessionEvent::Connected { ttl: TTL }]);
}

#[tokio::test(start_paused = true)]
async fn a_hung_subscription_goes_on_after_the_hang_without_a_loss() {
    let (_, ours, reader) = pair();
    let mut subscription = follow(&reader, None).await.0;
    reader.link().hang();
    claim(&ours, &["a"]).await;
    claim(&ours, &["b"]).await;
    assert_silent(&mut subscription).await;
    reader.link().heal();
    assert_eq!(spell(&next(&mut subscription).await), ["+a"]);
    assert_eq!(spell(&next(&mut subscription).await), ["+b"]);
    reader.link().hang();
    assert_silent(&mut subscription).await;
    reader.link().cut();
    assert!(unavailable_from(subscription.next().await.unwrap()));
}

#[tokio::test(start_paused = true)]
async fn a_call_may_be_applied_without_an_answer() {
    let (store, ours, _) = pair();
    ours.link().hang_after_apply();
    assert!(timeout(SOON, put(&ours, record("a"), Intent::Claim)).await.is_err());
    assert_eq!(store.paths(), ["orders/providers/a"]);
    ours.link().heal();
    assert_eq!(ours.verify(&[]).await.unwrap(), [key("a")]);
}

#[tokio::test(start_paused = true)]
async fn a_delay_holds_up_calls_and_items() {
    let (_, ours, reader) = pair();
    let mut subscription = follow(&reader, None).await.0;
    let start = tokio::time::Instant::now();
    ours.link().delay(SECOND);
    reader.link().delay(3 * SECOND);
    claim(&ours, &["a"]).await;
    assert!(start.elapsed() >= SECOND && start.elapsed() < SECOND + SOON, "{:?}", start.elapsed());
    assert_eq!(spell(&next(&mut subscription).await), ["+a"]);
    assert!(start.elapsed() >= 3 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn one_refused_record_fails_its_whole_batch() {
    let (store, ours, _) = pair();
    ours.link().fail(&key("b"), Some(Error::new(ErrorKind::PermissionDenied, "not this one")));
    let outcomes = ours.put(&[record("a"), record("b")], Intent::Claim).await;
    assert!(outcomes.iter().all(|outcome| outcome.as_ref().unwrap_err().kind() == ErrorKind::PermissionDenied));
    assert_eq!(outcomes.len(), 2);
    assert_eq!((store.paths(), store.sessions()), (vec![], 0));
    claim(&ours, &["a"]).await;
    ours.link().fail(&key("b"), None);
    claim(&ours, &["b"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_denied_client_is_refused_everything() {
    let (_, ours, _) = pair();
    ours.link().deny(Some(Error::new(ErrorKind::PermissionDenied, "not you")));
    let error = ours.renew(&[]).await.unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::PermissionDenied, "memory: not you"));
    assert!(ours.services().await.is_err() && ours.close(&[]).await.is_err());
    ours.link().deny(None);
    assert!(ours.services().await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_missed_between_the_first_item_and_those_that_follow() {
    for _ in 0..50 {
        let (_, ours, reader) = pair();
        let writer = tokio::spawn(async move {
            for n in 0..20 {
                claim(&ours, &[&n.to_string()]).await;
                tokio::task::yield_now().await;
            }
            ours
        });
        tokio::task::yield_now().await;
        let mut subscription = reader.subscribe(&orders(), None).await.unwrap();
        let mut seen = BTreeSet::new();
        while seen.len() < 20 {
            for update in next(&mut subscription).await {
                match update {
                    Update::Reset { records, .. } => seen.extend(records.into_iter().map(|record| record.key)),
                    Update::Upsert(record) => assert!(seen.insert(record.key)),
                    Update::Remove { .. } => panic!("nobody left"),
                }
            }
        }
        drop(writer.await);
    }
}
