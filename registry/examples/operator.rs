//! Overrides instances of others, for every reader: takes them out of traffic, and back in. A tool for scripts and drills.
//!
//! ```text
//! operator URL list  SERVICE [--json]
//! operator URL drain SERVICE ID [--json]
//! operator URL set   SERVICE ID [--status starting|up|draining|down] [--weight N] [--json]
//! operator URL clear SERVICE ID [--json]
//! ```
//!
//! `drain` is `set --status draining`; `set` replaces the whole override. What is set stays until it is cleared, or its
//! instance has been gone for a day. Prints what is in force then. With `--json` each line is one object:
//!
//! ```text
//! {"event":"override","service":…,"id":…,"status":"draining"|null,"weight":0|null}
//! {"event":"cleared","service":…,"id":…,"existed":true|false}
//! ```
//!
//! What is wrong, a store that is down included, is one line on standard error, exit code 2.

mod common;

use std::process::ExitCode;

use common::{Line, chain, refuse, say};
use service_registry::{Override, Registry, Result, Status, connect};

const USAGE: &str =
    "usage: operator URL list|drain|set|clear SERVICE [ID] [--status starting|up|draining|down] [--weight N] [--json]";

struct Args {
    url: String,
    service: String,
    order: Order,
    json: bool,
}

enum Order {
    List,
    Set(String, Override),
    Clear(String),
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = parse().unwrap_or_else(|error| refuse(error));
    let registry = connect(&args.url).await.unwrap_or_else(|error| refuse(chain(&error)));
    if let Err(error) = carry_out(&*registry, &args).await {
        refuse(chain(&error));
    }
    let _ = registry.destroy().await;
    ExitCode::SUCCESS
}

async fn carry_out(registry: &dyn Registry, Args { service, order, json, .. }: &Args) -> Result<()> {
    match order {
        Order::List => {
            for (id, set) in registry.overrides(service).await? {
                print(service, &id, set, *json);
            }
        }
        Order::Set(id, set) => {
            registry.set_override(service, id, *set).await?;
            print(service, id, *set, *json);
        }
        Order::Clear(id) => {
            let existed = registry.clear_override(service, id).await?;
            match (json, existed) {
                (true, _) => Line::Cleared { service, id, existed }.say(),
                (false, true) => say(format_args!("cleared {service}/{id}")),
                (false, false) => say(format_args!("{service}/{id} was not overridden")),
            }
        }
    }
    Ok(())
}

fn print(service: &str, id: &str, set: Override, json: bool) {
    let (status, weight) = (set.status.map(Status::as_str), set.weight);
    if json {
        return Line::Override { service, id, status, weight }.say();
    }
    let weight = weight.map(|weight| weight.to_string());
    let registered = "as registered";
    let (status, weight) = (status.unwrap_or(registered), weight.as_deref().unwrap_or(registered));
    say(format_args!("{service}/{id}: status {status}, weight {weight}"));
}

fn parse() -> Result<Args, Box<dyn std::error::Error>> {
    use lexopt::prelude::*;

    let (mut words, mut set, mut json) = (Vec::new(), Override::default(), false);
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Value(word) if words.len() < 4 => words.push(word.string()?),
            Long("status") => set = set.status(args.value()?.parse::<Status>()?),
            Long("weight") => set = set.weight(args.value()?.parse::<u32>()?),
            Long("json") => json = true,
            other => return Err(format!("{}; {USAGE}", other.unexpected()).into()),
        }
    }
    let mut words = words.into_iter();
    let (Some(url), Some(order), Some(service)) = (words.next(), words.next(), words.next()) else {
        return Err(USAGE.into());
    };
    let order = match (order.as_str(), words.next()) {
        ("list", None) if set.is_empty() => Order::List,
        ("drain", Some(id)) if set.is_empty() => Order::Set(id, set.status(Status::Draining)),
        ("set", Some(id)) => Order::Set(id, set),
        ("clear", Some(id)) if set.is_empty() => Order::Clear(id),
        _ => return Err(USAGE.into()),
    };
    Ok(Args { url, service, order, json })
}
