//! The roles of the other processes: a provider and a reader, each with a registry of its own, as a service has it.

use std::{
    io::{self, BufRead, Write},
    time::Duration,
};

use futures::StreamExt;
use registry_core::{Event, Instance, Registry, Snapshot};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use crate::{
    Result,
    names::{self, GENERATION, SERVICES},
    protocol::{Order, Outcome, Report, now},
};

/// The names of the roles, as arguments.
pub(crate) const PROVIDER: &str = "provider";
pub(crate) const READER: &str = "reader";

/// How often a child says that it runs.
const TICK: Duration = Duration::from_millis(200);

/// What the library logs goes where people look, if they ask for it by `RUST_LOG`.
fn log() {
    let asked = EnvFilter::builder().with_default_directive(LevelFilter::OFF.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(asked).with_writer(io::stderr).init();
}

/// Does what it is told until its input ends, with whoever told it.
pub(crate) async fn provide(url: &str) -> Result {
    log();
    let mut orders = orders();
    let registry = service_registry::connect(url).await?;
    accompany(&*registry);
    while let Some(order) = orders.recv().await {
        let registry = registry.clone();
        match order {
            // Tasks of one thread begin in the order in which they are made, and so do the calls.
            Order::Register { order, instances } => drop(tokio::spawn(async move {
                let instances = instances.iter().map(|(service, id, generation)| {
                    Instance::builder(service, id)
                        .endpoint("http://10.0.0.5:8080")
                        .metadata(GENERATION, generation.to_string())
                        .build()
                });
                let outcomes = match instances.collect::<Result<Vec<_>, _>>() {
                    Ok(instances) => {
                        let outcomes = registry.register_all(instances).await;
                        outcomes.into_iter().map(Outcome::of).collect()
                    }
                    Err(error) => vec![Outcome::Refused(error.to_string())],
                };
                say(&Report::Answer { order, outcomes });
            })),
            Order::Unregister { order, service, id } => drop(tokio::spawn(async move {
                let outcome = match registry.unregister(&service, &id).await {
                    Ok(false) => Outcome::NotOurs,
                    other => Outcome::of(other),
                };
                let outcomes = vec![outcome];
                say(&Report::Answer { order, outcomes });
            })),
            Order::Leave { order } => {
                let outcomes = vec![Outcome::of(registry.destroy().await)];
                say(&Report::Answer { order, outcomes });
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Follows all services, and says all that it is given, until its input ends.
pub(crate) async fn read(url: &str) -> Result {
    log();
    let mut orders = orders();
    let registry = service_registry::connect(url).await?;
    accompany(&*registry);
    for service in SERVICES {
        let mut snapshots = registry.watch(service).await?.snapshots();
        tokio::spawn(async move {
            while let Some(snapshot) = snapshots.next().await {
                say(&saw(&snapshot));
            }
        });
    }
    while orders.recv().await.is_some() {}
    Ok(())
}

fn saw(snapshot: &Snapshot) -> Report {
    let instances = snapshot.instances().iter();
    Report::Saw {
        at: now(),
        service: snapshot.service().to_string(),
        revision: snapshot.revision(),
        freshness: snapshot.freshness().to_string(),
        // What has none was registered by nobody.
        instances: instances.map(|one| (one.id.to_string(), names::generation(one).unwrap_or(0))).collect(),
    }
}

/// Says that the process runs, and what happens to its registry.
fn accompany(registry: &dyn Registry) {
    let mut events = registry.events();
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            if let Some(text) = told(&event) {
                say(&Report::Event(text));
            }
        }
    });
    tokio::spawn(async {
        loop {
            let due = Instant::now() + TICK;
            sleep_until(due).await;
            let late = u64::try_from(due.elapsed().as_millis()).unwrap_or(u64::MAX);
            say(&Report::Tick { at: now(), late });
        }
    });
}

fn told(event: &Event) -> Option<String> {
    Some(match event {
        // Each try is too much, and what else happens tells it.
        Event::Connecting => return None,
        Event::Registration(registration) => match &registration.state {
            registry_core::RegistrationState::Lost { cause, .. } => format!("{} lost: {cause}", registration.id()),
            state => format!("{} {state}", registration.id()),
        },
        Event::SessionLost { cause } => format!("session lost: {cause}"),
        Event::Stale { service, cause } => format!("{service} stale: {cause}"),
        Event::Live { service } => format!("{service} live"),
        Event::Protected { service, held } => format!("{service} protected: {held} held"),
        Event::SessionRenewed => "session renewed".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    })
}

/// The orders, as they come in. The process ends with its input.
fn orders() -> mpsc::UnboundedReceiver<Order> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(order) => drop(sender.send(order)),
                Err(error) => eprintln!("not an order: {error}: {line}"),
            }
        }
        std::process::exit(0);
    });
    receiver
}

/// A line that cannot be written has nobody to read it.
fn say(report: &Report) {
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let mut out = io::stdout().lock();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}
