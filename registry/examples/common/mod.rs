//! What the tools `provider`, `consumer` and `operator` share.

use std::{
    fmt::Display,
    io::{Write, stdout},
};

use serde::Serialize;

/// One line of `--json`.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
#[allow(dead_code, reason = "each tool says some of them")]
pub(crate) enum Line<'a> {
    Registered { service: &'a str, id: &'a str },
    Lost { id: &'a str, cause: String },
    Destroyed,
    Override { service: &'a str, id: &'a str, status: Option<&'a str>, weight: Option<u32> },
    Cleared { service: &'a str, id: &'a str, existed: bool },
    Snapshot { service: &'a str, freshness: &'a str, revision: u64, ids: Vec<&'a str> },
}

impl Line<'_> {
    pub(crate) fn say(&self) {
        match serde_json::to_string(self) {
            Ok(line) => say(line),
            Err(error) => eprintln!("{error}"),
        }
    }
}

/// Ends the process as a tool does that cannot start: one line on standard error, exit code 2.
pub(crate) fn refuse(error: impl Display) -> ! {
    eprintln!("{}", error.to_string().replace('\n', " "));
    std::process::exit(2)
}

/// An error with its sources, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Prints one line and flushes, so that a script that reads sees it at once. A closed pipe ends the process.
pub(crate) fn say(line: impl Display) {
    let mut out = stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}
