//! Registers instances, stays, and deregisters on SIGTERM or Ctrl-C with exit code 0. A tool for scripts and drills.
//!
//! ```text
//! provider URL --service NAME --id ID --endpoint URI
//!          [--count N] [--weight W] [--metadata K=V]… [--json]
//! ```
//!
//! With `--count N` the ids are `ID-0` to `ID-(N-1)` and the ports count up. With `--json` each line is one object:
//!
//! ```text
//! {"event":"registered","service":…,"id":…}
//! {"event":"lost","id":…,"cause":…}
//! {"event":"destroyed"}
//! ```
//!
//! What is wrong at the start is one line on standard error, exit code 2. A store that is down is not wrong.

mod common;

use std::{process::ExitCode, time::Duration};

use common::{Line, chain, refuse, say};
use futures::StreamExt;
use service_registry::{Endpoint, ErrorKind, Event, Instance, RegistrationState, connect, shutdown};

const USAGE: &str =
    "usage: provider URL --service NAME --id ID --endpoint URI [--count N] [--weight W] [--metadata K=V]… [--json]";

struct Args {
    url: String,
    instances: Vec<Instance>,
    json: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Args { url, instances, json } = parse().unwrap_or_else(|error| refuse(error));
    let registry = connect(&url).await.unwrap_or_else(|error| refuse(chain(&error)));

    let mut events = registry.events();
    let printer = tokio::spawn(async move {
        while let Some(event) = events.next().await {
            if let Event::Registration(registration) = event {
                print(&registration, json);
            }
        }
    });
    // Signals count from here on, also while the store does not answer.
    let leaving = tokio::spawn(shutdown::on_signal(registry.clone(), Duration::ZERO));
    for error in registry.register_all(instances).await.into_iter().filter_map(Result::err) {
        if error.kind() == ErrorKind::Closed {
            break;
        }
        if !error.is_retryable() {
            refuse(chain(&error));
        }
        eprintln!("not registered yet: {}", chain(&error));
    }

    if let Ok(Err(error)) = leaving.await {
        eprintln!("not deregistered; the records expire by themselves: {}", chain(&error));
    }
    let _ = printer.await;
    if json {
        Line::Destroyed.say()
    } else {
        say("destroyed")
    }
    ExitCode::SUCCESS
}

fn print(registration: &service_registry::Registration, json: bool) {
    let (service, id) = (registration.service(), registration.id());
    match &registration.state {
        RegistrationState::Registered if json => Line::Registered { service, id }.say(),
        RegistrationState::Registered => say(format_args!("registered {service}/{id}")),
        RegistrationState::Lost { cause, .. } if json => Line::Lost { id, cause: chain(cause) }.say(),
        RegistrationState::Lost { cause, .. } => say(format_args!("lost {service}/{id}: {}", chain(cause))),
        _ => {}
    }
}

fn parse() -> Result<Args, Box<dyn std::error::Error>> {
    use lexopt::prelude::*;

    let (mut url, mut service, mut id, mut endpoint, mut count) = (None, None, None, None, None::<u16>);
    let (mut weight, mut metadata, mut json) = (None::<u32>, Vec::new(), false);
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Value(value) if url.is_none() => url = Some(value.string()?),
            Long("service") => service = Some(args.value()?.string()?),
            Long("id") => id = Some(args.value()?.string()?),
            Long("endpoint") => endpoint = Some(args.value()?.parse::<Endpoint>()?),
            Long("count") => count = Some(args.value()?.parse()?),
            Long("weight") => weight = Some(args.value()?.parse()?),
            Long("metadata") => {
                let pair = args.value()?.string()?;
                let (key, value) = pair.split_once('=').ok_or_else(|| format!("--metadata {pair:?} is not K=V"))?;
                metadata.push((key.to_owned(), value.to_owned()));
            }
            Long("json") => json = true,
            other => return Err(format!("{}; {USAGE}", other.unexpected()).into()),
        }
    }
    let (Some(url), Some(service), Some(id), Some(endpoint)) = (url, service, id, endpoint) else {
        return Err(USAGE.into());
    };
    let instances = (0..count.unwrap_or(1)).map(|index| {
        let id = if count.is_some() { format!("{id}-{index}") } else { id.clone() };
        let port = endpoint.port().checked_add(index).ok_or("--count runs past port 65535")?;
        let endpoint = Endpoint::new(endpoint.scheme(), endpoint.host(), port)?;
        let mut instance = Instance::builder(&service, id).endpoint(endpoint.as_str());
        if let Some(weight) = weight {
            instance = instance.weight(weight);
        }
        for (key, value) in &metadata {
            instance = instance.metadata(key, value);
        }
        Ok::<_, Box<dyn std::error::Error>>(instance.build()?)
    });
    Ok(Args { url, instances: instances.collect::<Result<_, _>>()?, json })
}
