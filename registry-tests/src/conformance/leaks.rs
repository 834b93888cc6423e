//! Long lives: what comes and goes leaves nothing behind, neither here nor at the server.

use std::time::Duration;

use futures::future::join_all;
use tokio::{runtime::Builder, task::spawn_blocking};

use super::support::*;
use crate::harness::{Client, Harness};

/// How often things come and go.
const TIMES: usize = 1000;
/// How many of them at once, where they need not follow each other.
const TOGETHER: usize = 20;
/// How much more memory there may be afterwards: what an allocator keeps, and far less than what came and went.
const SPARE_MIB: f64 = 24.0;

/// What there is before anything comes and goes.
#[derive(Debug)]
struct Base {
    tasks: usize,
    files: usize,
    watchers: usize,
    sessions: usize,
    memory: f64,
}

impl Base {
    /// While so many clients live, each with a session or without.
    async fn of<H: Harness>(store: &H, clients: usize) -> Self {
        // A client crate may panic where its session ends, which is caught, and told with a backtrace if the environment asks
        // for that: the symbols that are loaded then stay, and are no leak.
        drop(std::backtrace::Backtrace::force_capture().to_string());
        Self {
            tasks: tasks(store).await,
            files: open_files(),
            watchers: store.watchers().await,
            sessions: clients,
            memory: resident_mib(),
        }
    }

    /// Waits until no more is left than there was.
    async fn is_back<H: Harness>(&self, store: &H) {
        eventually("the tasks end", PATIENCE, || tasks(store), |now| *now <= self.tasks).await;
        eventually("the server watches nothing more", PATIENCE, || store.watchers(), |now| *now <= self.watchers).await;
        eventually("no more sessions live", PATIENCE, || store.sessions(), |now| *now <= self.sessions).await;
        eventually("the sockets are closed", PATIENCE, async || open_files(), |now| *now <= self.files).await;
        let memory = resident_mib();
        println!("{self:?}, then {memory:.0} MiB");
        assert!(memory <= self.memory + SPARE_MIB, "{:.0} MiB, then {memory:.0}", self.memory);
    }
}

/// Watchers come and go, of one service and of a thousand that do not exist.
pub async fn watchers_that_come_and_go_leave_nothing_behind<H: Harness>() {
    let store = H::with_own_server().await;
    let reader = store.connect(options::<H>().idle_timeout(Duration::from_secs(1))).await;
    let following = async || reader.calls.following();
    let come_and_go = async |round: usize| {
        for start in (0..TIMES).step_by(TOGETHER) {
            let services = (start..start + TOGETHER).map(|index| format!("service {round} {index}"));
            let watched = services.map(async |service| {
                drop(reader.registry.watch(&service).await.expect("watch"));
                drop(reader.registry.watch("orders").await.expect("watch"));
            });
            join_all(watched).await;
        }
        eventually("nothing is followed", PATIENCE, following, |following| *following == 0).await;
    };
    // Then there is a connection to wherever services lie, and the allocator has what a thousand at once need.
    come_and_go(0).await;
    let base = Base::of(&store, 1).await;
    come_and_go(1).await;
    base.is_back(&store).await;
}

/// An instance comes and goes.
pub async fn instances_that_come_and_go_leave_nothing_behind<H: Harness>() {
    let store = H::with_own_server().await;
    let (provider, reader) = (client(&store).await, client(&store).await);
    provider.registry.register(instance("orders", "stays")).await.expect("register");
    let observer = Observer::of(&reader, "orders").await;
    for id in ["first", "second"] {
        provider.registry.register(instance("orders", id)).await.expect("register");
        assert!(provider.registry.unregister("orders", id).await.expect("unregister"));
    }
    let base = Base::of(&store, 2).await;
    for index in 0..TIMES {
        // One of a few that are there before, or one that never was.
        let id = format!("i-{}", if index % 2 == 0 { index % 10 } else { index });
        provider.registry.register(instance("orders", &id)).await.expect("register");
        assert!(provider.registry.unregister("orders", &id).await.expect("unregister"), "{id}");
    }
    observer.until_ids(PATIENCE, &["stays"]).await;
    assert_eq!(provider.registry.registrations().len(), 1);
    let instances = async || {
        let keys = store.keys().await;
        keys.into_iter().filter(|key| key.contains("/providers/")).collect::<Vec<_>>()
    };
    eventually("only that is left", soon::<H>(), instances, |keys| *keys == ["orders/providers/stays"]).await;
    base.is_back(&store).await;
    provider.registry.destroy().await.expect("destroy");
    eventually("nothing is left", soon::<H>(), || store.keys(), Vec::is_empty).await;
}

/// Registries come, register and read, and go.
pub async fn registries_that_come_and_go_leave_nothing_behind<H: Harness>() {
    let store = H::with_own_server().await;
    let once = async || {
        let client = client(&store).await;
        client.registry.register(instance("orders", "1")).await.expect("register");
        assert_eq!(client.registry.discover("orders").await.expect("discover").len(), 1);
        client.registry.destroy().await.expect("destroy");
    };
    for _ in 0..5 {
        once().await;
    }
    eventually("no session lives", PATIENCE, || store.sessions(), |sessions| *sessions == 0).await;
    eventually("nobody watches", PATIENCE, || store.watchers(), |watchers| *watchers == 0).await;
    let base = Base::of(&store, 0).await;
    for _ in 0..TIMES / 10 {
        once().await;
    }
    base.is_back(&store).await;
    assert_eq!(store.keys().await, [""; 0]);
}

/// A registry whose runtime ends under it says so to whoever calls, ends its watchers, and panics nowhere.
pub async fn a_registry_outlives_its_runtime<H: Harness>() {
    let store = std::sync::Arc::new(H::start().await);
    let theirs = store.clone();
    let (only, mut watcher) = spawn_blocking(move || {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let made = runtime.block_on(async {
            let only: Client = client(&*theirs).await;
            only.registry.register(instance("orders", "1")).await.expect("register");
            let watcher = only.registry.watch("orders").await.expect("watch");
            (only, watcher)
        });
        drop(runtime);
        made
    })
    .await
    .expect("nothing panics when it ends");
    in_time("the watcher ends", soon::<H>(), async { while watcher.next().await.is_some() {} }).await;
    let registered = in_time("register", answered::<H>(), only.registry.register(instance("orders", "2"))).await;
    registered.expect_err("nobody is there to register");
    let destroyed = in_time("destroy", REQUEST_TIMEOUT + soon::<H>(), only.registry.destroy()).await;
    println!("destroyed: {destroyed:?}");
    drop((only, watcher));
    eventually("what it registered expires", gone::<H>(), || store.keys(), Vec::is_empty).await;
}
