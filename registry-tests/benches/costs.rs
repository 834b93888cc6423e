//! What the library costs, each figure beside its floor in the same run: the least work that does the same straight on
//! the store's client. Rounds of both are interleaved; the medians and the spread are printed.
//!
//! ```text
//! scripts/bench                                            # all
//! scripts/bench --quick                                    # fewer rounds
//! scripts/bench [read] [register] [propagate] [converge]   # some
//! ```

#![allow(missing_docs, reason = "a program")]

use std::{hint::black_box, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use etcd_client::{Client, ConnectOptions, PutOptions, Txn, TxnOp, WatchOptions};
use registry_core::{Freshness, Instance, Managed, Options, Registry, memory::MemoryConfig};
use registry_etcd::{EtcdBackend, EtcdConfig};
use registry_tests::servers::{Etcd, Server};
use tokio::time::Instant;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let only: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| only == name);
    let rounds = if quick { 3 } else { 9 };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        println!("| work | ours | floor | ratio | target | |");
        println!("| --- | --- | --- | --- | --- | --- |");
        let mut missed = 0;
        if wanted("read") {
            missed += reads(rounds).await?;
        }
        let server = Server::start(Etcd::new()).await?;
        if wanted("register") {
            missed += register(&server, rounds).await?;
            missed += one_by_one(&server, rounds).await?;
        }
        if wanted("propagate") {
            missed += propagate(&server, rounds).await?;
        }
        if wanted("converge") {
            missed += converge(&server, 1_000, rounds).await?;
            missed += converge(&server, 10_000, rounds.min(5)).await?;
        }
        drop(server);
        println!();
        println!("medians of {rounds} interleaved rounds (least to most in brackets); {missed} targets missed");
        if missed > 0 { Err("a target was missed".into()) } else { Ok(()) }
    })
}

/// Figures of one kind, one a round.
#[derive(Default)]
struct Samples(Vec<Duration>);

impl Samples {
    fn add(&mut self, sample: Duration) {
        self.0.push(sample);
        self.0.sort_unstable();
    }

    fn median(&self) -> Duration {
        self.0[self.0.len() / 2]
    }
}

impl std::fmt::Display for Samples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |d: Duration| match d.as_nanos() {
            n if n < 10_000 => format!("{n} ns"),
            n if n < 10_000_000 => format!("{} µs", n / 1000),
            n => format!("{} ms", n / 1_000_000),
        };
        write!(f, "{} ({}–{})", show(self.median()), show(self.0[0]), show(self.0[self.0.len() - 1]))
    }
}

/// Prints a row whose target is a ratio to the floor; returns 1 if it is missed.
fn row(work: &str, ours: &Samples, floor: &Samples, most: f64) -> usize {
    let ratio = ours.median().as_secs_f64() / floor.median().as_secs_f64();
    let missed = ratio > most;
    println!("| {work} | {ours} | {floor} | {ratio:.2} | ≤ {most}× | {} |", if missed { "missed" } else { "ok" });
    missed.into()
}

/// Prints a row whose target is absolute.
fn bound(work: &str, ours: &Samples, floor: Option<&Samples>, most: Duration) -> usize {
    let missed = ours.median() > most;
    let (floor, ratio) = match floor {
        Some(floor) => {
            (floor.to_string(), format!("{:.2}", ours.median().as_secs_f64() / floor.median().as_secs_f64()))
        }
        None => ("–".into(), "–".into()),
    };
    println!("| {work} | {ours} | {floor} | {ratio} | ≤ {most:?} | {} |", if missed { "missed" } else { "ok" });
    missed.into()
}

/// The time of one call of `work`, from many.
fn each(work: impl Fn()) -> Duration {
    const CALLS: u32 = 200_000;
    let began = Instant::now();
    for _ in 0..CALLS {
        work();
    }
    began.elapsed() / CALLS
}

/// Reading the cached set of 100 instances.
async fn reads(rounds: usize) -> Result<usize, Error> {
    let config = MemoryConfig::from_location("memory://".parse()?)?;
    let backend = registry_core::memory::MemoryBackend::new(config.store(), config.options.ttl);
    let registry: Arc<dyn Registry> = Arc::new(Managed::new(backend, config.options)?);
    for outcome in registry.register_all(instances("orders", 100)).await {
        outcome?;
    }
    let mut watcher = registry.watch("orders").await?;
    while watcher.current().len() < 100 {
        watcher.next().await;
    }
    let handle = watcher.handle();
    let swap = ArcSwap::from_pointee(handle.current().clone());
    let (mut by_handle, mut by_name, mut load) = (Samples::default(), Samples::default(), Samples::default());
    for _ in 0..rounds {
        load.add(each(|| _ = black_box(swap.load().len())));
        by_handle.add(each(|| _ = black_box(handle.current().len())));
        let began = Instant::now();
        for _ in 0..200_000 {
            black_box(registry.discover(black_box("orders")).await?.len());
        }
        by_name.add(began.elapsed() / 200_000);
    }
    let missed = row("read the set of 100 by handle (floor: `ArcSwap::load`)", &by_handle, &load, 2.0);
    Ok(missed
        + bound("`discover` by name through `Arc<dyn Registry>`", &by_name, Some(&load), Duration::from_nanos(150)))
}

/// Registering 1000 at once.
async fn register(server: &Server, rounds: usize) -> Result<usize, Error> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        let prefix = format!("floor-{round}");
        let client = bare(server).await?;
        let lease = client.lease_client().grant(15, None).await?.id();
        let keys = keys(&prefix, 1000);
        let began = Instant::now();
        let batches = keys.chunks(100).map(|batch| {
            let client = client.clone();
            let ops: Vec<_> = batch.iter().map(|(key, value)| put(key, value, lease)).collect();
            async move { client.kv_client().txn(Txn::new().and_then(ops)).await }
        });
        // Four at a time: more gains nothing, one at a time costs a third more.
        let done: Vec<_> =
            futures::StreamExt::collect(futures::StreamExt::buffer_unordered(futures::stream::iter(batches), 4)).await;
        for outcome in done {
            outcome?;
        }
        let took = began.elapsed();
        client.lease_client().revoke(lease).await?;

        let registry = connect(server, &format!("ours-{round}"))?;
        warm_up(&*registry).await?;
        let all = instances("orders", 1000);
        let began = Instant::now();
        for outcome in registry.register_all(all).await {
            outcome?;
        }
        let mine = began.elapsed();
        registry.destroy().await?;
        // The first round warms the server up.
        if round > 0 {
            floor.add(took);
            ours.add(mine);
        }
    }
    Ok(row("register 1000 (floor: transactions of 100 puts, 4 in flight)", &ours, &floor, 1.25))
}

/// Registering 300, each after the other.
async fn one_by_one(server: &Server, rounds: usize) -> Result<usize, Error> {
    const COUNT: usize = 300;
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        let client = bare(server).await?;
        let lease = client.lease_client().grant(15, None).await?.id();
        let began = Instant::now();
        for (key, value) in keys(&format!("single-{round}"), COUNT) {
            let absent = etcd_client::Compare::mod_revision(key.as_str(), etcd_client::CompareOp::Equal, 0);
            let txn = Txn::new().when([absent]).and_then([put(&key, &value, lease)]);
            client.kv_client().txn(txn).await?;
        }
        let took = began.elapsed();
        client.lease_client().revoke(lease).await?;
        let registry = connect(server, &format!("singly-{round}"))?;
        warm_up(&*registry).await?;
        let all = instances("orders", COUNT);
        let began = Instant::now();
        for instance in all {
            registry.register(instance).await?;
        }
        let mine = began.elapsed();
        registry.destroy().await?;
        if round > 0 {
            floor.add(took / COUNT as u32);
            ours.add(mine / COUNT as u32);
        }
    }
    Ok(row("register one (floor: a put if absent)", &ours, &floor, 1.15))
}

/// From a change by one process to the cache of another, with 100 present.
async fn propagate(server: &Server, rounds: usize) -> Result<usize, Error> {
    let writer = connect(server, "propagate")?;
    let reader = connect(server, "propagate")?;
    let all = instances("orders", 100);
    for outcome in writer.register_all(all.clone()).await {
        outcome?;
    }
    let mut watcher = reader.watch("orders").await?;
    while watcher.current().len() < 100 {
        watcher.next().await;
    }
    let client = bare(server).await?;
    let lease = client.lease_client().grant(60, None).await?.id();
    let options = WatchOptions::new().with_prefix();
    let mut watch = bare(server).await?.watch_client().watch("/bare/", Some(options)).await?;
    watch.message().await?;

    let value = vec![b'x'; 256];
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for round in 0..rounds * 100 {
        let began = Instant::now();
        let write = client.kv_client();
        let put = tokio::spawn({
            let (mut write, value) = (write, value.clone());
            async move { write.put("/bare/key", value, Some(PutOptions::new().with_lease(lease))).await }
        });
        while watch.message().await?.is_some_and(|message| message.events().is_empty()) {}
        floor.push(began.elapsed());
        put.await??;

        let mut instance = all[round % 100].clone();
        instance.metadata.insert("round".into(), round.to_string());
        let id = instance.id.clone();
        let began = Instant::now();
        let registered = writer.register(instance);
        let seen = async {
            loop {
                let snapshot = watcher.next().await.expect("the registry lives");
                let found =
                    snapshot.get(&id).is_some_and(|i| i.metadata.get("round").is_some_and(|r| *r == round.to_string()));
                if found {
                    return began.elapsed();
                }
            }
        };
        let (outcome, took) = tokio::join!(registered, seen);
        outcome?;
        ours.push(took);
    }
    let (ours, floor) = (Samples(sorted(ours)), Samples(sorted(floor)));
    let mut missed = row("change → reader, p50 (floor: put → watch event)", &ours, &floor, 1.3);
    let p99 = |samples: &Samples| Samples(vec![samples.0[samples.0.len() * 99 / 100]]);
    missed += row("change → reader, p99", &p99(&ours), &p99(&floor), 1.5);
    writer.destroy().await?;
    reader.destroy().await?;
    Ok(missed)
}

/// A reader follows while another process registers many: until the reader has them all.
async fn converge(server: &Server, count: usize, rounds: usize) -> Result<usize, Error> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..=rounds {
        let prefix = format!("/many-{count}-{round}/");
        let client = bare(server).await?;
        let mut watch =
            bare(server).await?.watch_client().watch(prefix.as_str(), Some(WatchOptions::new().with_prefix())).await?;
        watch.message().await?;
        let keys = keys(prefix.trim_matches('/'), count);
        let mut leases = Vec::new();
        for _ in 0..count.div_ceil(1000) {
            leases.push(client.lease_client().grant(60, None).await?.id());
        }
        let began = Instant::now();
        let writing = tokio::spawn({
            let (client, leases) = (client.clone(), leases.clone());
            async move {
                let batches = keys.chunks(100).enumerate().map(|(index, batch)| {
                    let client = client.clone();
                    let ops: Vec<_> = batch.iter().map(|(key, value)| put(key, value, leases[index / 10])).collect();
                    async move { client.kv_client().txn(Txn::new().and_then(ops)).await }
                });
                let batches: Vec<_> = batches.collect();
                futures::StreamExt::collect::<Vec<_>>(futures::StreamExt::buffer_unordered(
                    futures::stream::iter(batches),
                    4,
                ))
                .await
            }
        });
        let mut seen = std::collections::BTreeMap::new();
        while seen.len() < count {
            let message = watch.message().await?.ok_or("the watch ended")?;
            for event in message.events() {
                if let Some(kv) = event.kv() {
                    let value: serde_json::Value = serde_json::from_slice(kv.value())?;
                    seen.insert(kv.key().to_vec(), value);
                }
            }
        }
        let took = began.elapsed();
        drop(writing.await?);
        for lease in leases {
            client.lease_client().revoke(lease).await?;
        }

        let namespace = format!("converge-{count}-{round}");
        let (writer, reader) = (connect(server, &namespace)?, connect(server, &namespace)?);
        let mut watcher = reader.watch("orders").await?;
        while watcher.current().freshness() == Freshness::Pending {
            watcher.next().await;
        }
        warm_up(&*writer).await?;
        let all = instances("orders", count);
        let began = Instant::now();
        let writing = tokio::spawn(async move {
            let outcomes = writer.register_all(all).await;
            (writer, outcomes)
        });
        while watcher.current().len() < count {
            watcher.next().await;
        }
        let mine = began.elapsed();
        let (writer, outcomes) = writing.await?;
        for outcome in outcomes {
            outcome?;
        }
        writer.destroy().await?;
        reader.destroy().await?;
        if round > 0 {
            floor.add(took);
            ours.add(mine);
        }
    }
    Ok(row(&format!("{count} registrations converge at a reader"), &ours, &floor, 1.3))
}

/// Connects and has a session granted, as the floor has before its clock starts.
async fn warm_up(registry: &dyn Registry) -> Result<(), Error> {
    registry.register(Instance::builder("warm", "up").build()?).await?;
    registry.unregister("warm", "up").await?;
    Ok(())
}

fn sorted(mut samples: Vec<Duration>) -> Vec<Duration> {
    samples.sort_unstable();
    samples
}

/// Records of about 256 bytes.
fn instances(service: &str, count: usize) -> Vec<Instance> {
    (0..count)
        .map(|id| {
            Instance::builder(service, format!("{id:06}"))
                .endpoint(format!("http://10.0.{}.{}:8080", id / 250, id % 250))
                .version("1.2.3")
                .zone("eu-1a")
                .metadata("commit", "d34db33fd34db33fd34db33f")
                .build()
                .expect("valid")
        })
        .collect()
}

/// Keys and values of the same size as ours.
fn keys(prefix: &str, count: usize) -> Vec<(String, Vec<u8>)> {
    let value = serde_json::json!({
        "v": 1, "owner": "0123456789abcdef0123456789abcdef", "epoch": 1, "endpoints": ["http://10.0.3.250:8080"],
        "version": "1.2.3", "zone": "eu-1a", "weight": 100, "status": "up",
        "metadata": {"commit": "d34db33fd34db33fd34db33f"}, "registered_at": 1_795_260_803_775_u64,
    });
    let value = value.to_string().into_bytes();
    (0..count).map(|id| (format!("/{prefix}/orders/providers/{id:06}"), value.clone())).collect()
}

fn put(key: &str, value: &[u8], lease: i64) -> TxnOp {
    TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)))
}

fn connect(server: &Server, prefix: &str) -> Result<Arc<dyn Registry>, Error> {
    let options = Options::default().request_timeout(Duration::from_secs(30));
    let config = EtcdConfig::new([server.addr().to_string()]).prefix(prefix).options(options.clone());
    Ok(Arc::new(Managed::new(EtcdBackend::new(config)?, options)?))
}

async fn bare(server: &Server) -> Result<Client, Error> {
    Ok(Client::connect([format!("http://{}", server.addr())], Some(ConnectOptions::new())).await?)
}
