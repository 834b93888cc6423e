//! All watches of a client share one stream.

use futures::{FutureExt, StreamExt, future::join_all, stream::BoxStream};
use registry_core::{Backend, Result, ServiceName, Update, Updates};
use registry_etcd::EtcdBackend;
use registry_tests::{
    conformance::support::{PATIENCE, eventually, in_time},
    servers::Etcd,
};

use crate::{SECOND, Store, log, options};

/// How many streams of watches the server has, and how many watches.
async fn held(store: &Store) -> (u64, u64) {
    let streams = store.counted("etcd_debugging_mvcc_watch_stream_total", "").await;
    (streams, store.counted("etcd_debugging_mvcc_watcher_total", "").await)
}

async fn put(store: &Store, service: &str, id: usize) {
    let record = r#"{"v":1,"owner":"other","epoch":1,"endpoints":["http://10.0.0.5:8080"]}"#;
    store.put(format!("/services/{service}/providers/{id}"), record).await;
}

type Following = BoxStream<'static, Result<Updates>>;

async fn follow(backend: &EtcdBackend, service: &str) -> Following {
    let mut following = backend.subscribe(&ServiceName::parse(service).unwrap(), None).await.unwrap();
    let first = following.next().await.unwrap().unwrap();
    assert!(matches!(first.updates[..], [Update::Reset { .. }]), "{first:?}");
    following
}

/// The ids that are told next.
async fn told(following: &mut Following) -> Vec<String> {
    let updates = in_time("a change", PATIENCE, following.next()).await.unwrap().unwrap().updates;
    let id = |update: Update| match update {
        Update::Upsert(record) => record.key.id.to_string(),
        other => panic!("{other:?}"),
    };
    updates.into_iter().map(id).collect()
}

/// Services by the dozen are one stream at the server, and what is no longer followed is no longer watched.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_one_stream_however_many_services_it_follows() {
    log::listen();
    let store = Store::start(Etcd::new()).await;
    let backend = EtcdBackend::new(store.config(options())).unwrap();
    let names: Vec<_> = (0..60).map(|number| format!("service-{number}")).collect();
    let mut following = join_all(names.iter().map(|name| follow(&backend, name))).await;
    assert_eq!(held(&store).await, (1, 60));
    for (name, following) in names.iter().zip(&mut following) {
        put(&store, name, 7).await;
        assert_eq!(told(following).await, ["7"]);
    }

    following.truncate(20);
    eventually("forty are dropped", PATIENCE, async || held(&store).await, |held| *held == (1, 20)).await;
    put(&store, "service-59", 8).await;
    put(&store, "service-19", 8).await;
    assert_eq!(told(&mut following[19]).await, ["8"]);
    assert!(following[0].next().now_or_never().is_none());
    following.clear();
    eventually("all are dropped", PATIENCE, async || held(&store).await, |held| *held == (0, 0)).await;
    let mut again = follow(&backend, "service-3").await;
    put(&store, "service-3", 9).await;
    assert_eq!(told(&mut again).await, ["9"]);
    assert_eq!(held(&store).await, (1, 1));
}

/// Thousands of changes for one that takes none of them: the others hear theirs, and in the end it has them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_holds_up_nobody_and_misses_nothing() {
    const CHANGES: usize = 3000;
    let store = Store::start(Etcd::new()).await;
    log::listen();
    let backend = EtcdBackend::new(store.config(options())).unwrap();
    let (mut idle, mut busy) = (follow(&backend, "orders").await, follow(&backend, "payments").await);
    for hundred in 0..CHANGES / 100 {
        join_all((0..100).map(|at| put(&store, "orders", hundred * 100 + at))).await;
        put(&store, "payments", hundred).await;
        let heard = in_time("its own", SECOND, told(&mut busy)).await;
        assert_eq!(heard, [hundred.to_string()]);
    }
    eventually("it fell behind", PATIENCE, async || held(&store).await, |held| *held == (1, 1)).await;
    let mut taken = Vec::new();
    while taken.len() < CHANGES {
        taken.extend(told(&mut idle).await);
    }
    taken.sort_by_key(|id| id.parse::<usize>().unwrap());
    assert_eq!(taken, (0..CHANGES).map(|id| id.to_string()).collect::<Vec<_>>());
    assert_eq!(held(&store).await, (1, 2));
}

/// A stream on which nothing happens is asked whether it lives, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_is_asked_and_goes_on() {
    log::listen();
    let store = Store::start(Etcd::new()).await;
    let backend = EtcdBackend::new(store.config(options())).unwrap();
    let mut following = follow(&backend, "orders").await;
    let watch = r#"grpc_method="Watch""#;
    let asked = async || store.counted("grpc_server_msg_received_total", watch).await;
    assert_eq!(asked().await, 1);
    // One more watch, and its end.
    eventually("it is asked", PATIENCE, asked, |messages| *messages == 3).await;
    eventually("that is over", PATIENCE, async || held(&store).await, |held| *held == (1, 1)).await;
    put(&store, "orders", 1).await;
    assert_eq!(told(&mut following).await, ["1"]);
    assert_eq!(store.counted("grpc_server_started_total", watch).await, 1);
}
