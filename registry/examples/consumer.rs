//! Follows services and prints each snapshot. A tool for scripts and drills.
//!
//! ```text
//! consumer URL --service NAME… [--json]
//! ```
//!
//! With `--json` each line is one object:
//!
//! ```text
//! {"event":"snapshot","service":…,"freshness":"pending|live|stale|protected","revision":…,"ids":[…sorted…]}
//! ```
//!
//! What is wrong at the start is one line on standard error, exit code 2. A store that is down is not wrong. Ends on
//! SIGTERM or Ctrl-C with exit code 0.

mod common;

use std::{process::ExitCode, time::Duration};

use common::{Line, chain, refuse, say};
use futures::future::join_all;
use service_registry::{Freshness, Snapshot, Watcher, connect, shutdown};

const USAGE: &str = "usage: consumer URL --service NAME… [--json]";

#[tokio::main]
async fn main() -> ExitCode {
    let (url, services, json) = parse().unwrap_or_else(|error| refuse(error));
    let registry = connect(&url).await.unwrap_or_else(|error| refuse(chain(&error)));
    let watchers = join_all(services.iter().map(|service| registry.watch(service))).await;
    let watchers: Vec<Watcher> =
        watchers.into_iter().map(|watcher| watcher.unwrap_or_else(|error| refuse(chain(&error)))).collect();
    for watcher in watchers {
        tokio::spawn(follow(watcher, json));
    }
    if let Err(error) = shutdown::on_signal(registry, Duration::ZERO).await {
        eprintln!("{}", chain(&error));
    }
    ExitCode::SUCCESS
}

async fn follow(mut watcher: Watcher, json: bool) {
    if watcher.current().freshness() == Freshness::Pending {
        print(&watcher.current(), json);
    }
    while let Some(snapshot) = watcher.next().await {
        print(&snapshot, json);
    }
}

fn print(snapshot: &Snapshot, json: bool) {
    let (service, freshness, revision) = (snapshot.service(), snapshot.freshness().as_str(), snapshot.revision());
    let ids: Vec<&str> = snapshot.instances().iter().map(|instance| instance.id.as_str()).collect();
    if json {
        Line::Snapshot { service, freshness, revision, ids }.say();
    } else {
        say(format_args!("{service} {freshness} #{revision}: {} {ids:?}", ids.len()));
    }
}

/// `--service a b` and `--service a --service b` mean the same.
fn parse() -> Result<(String, Vec<String>, bool), Box<dyn std::error::Error>> {
    use lexopt::prelude::*;

    let (mut url, mut services, mut json) = (None, Vec::new(), false);
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Value(value) if url.is_none() => url = Some(value.string()?),
            Long("service") => {
                for name in args.values()? {
                    services.push(name.string()?);
                }
            }
            Long("json") => json = true,
            other => return Err(format!("{}; {USAGE}", other.unexpected()).into()),
        }
    }
    match url {
        Some(url) if !services.is_empty() => Ok((url, services, json)),
        _ => Err(USAGE.into()),
    }
}
