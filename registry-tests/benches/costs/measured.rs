//! Work in a process of its own, for its memory and its processor time. See `src/bin/measured.rs`.

use std::{process::Stdio, time::Duration};

use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::Result;

const AT_MOST: Duration = Duration::from_secs(300);

/// A process that prints what it measures; killed when this is dropped.
pub(crate) struct Measured {
    child: Child,
    ask: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
}

/// Allocations of a thousand of each.
#[derive(Deserialize)]
pub(crate) struct Allocations {
    pub(crate) by_handle: f64,
    pub(crate) by_name: f64,
    pub(crate) picks: f64,
}

/// Until everything that is followed was complete.
#[derive(Deserialize)]
pub(crate) struct Loaded {
    pub(crate) seconds: f64,
    /// Bytes.
    pub(crate) allocated: f64,
    pub(crate) resident: f64,
}

/// What the process has used for a while.
#[derive(Deserialize)]
pub(crate) struct Used {
    pub(crate) seconds: f64,
    /// Seconds of a processor.
    pub(crate) processor: f64,
    /// How often a thread was woken.
    pub(crate) wakes: f64,
}

impl Measured {
    pub(crate) fn start(args: &[&str]) -> Result<Self> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_measured"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let ask = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        Ok(Self { child, ask, answers })
    }

    /// The next line that it prints.
    pub(crate) async fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = timeout(AT_MOST, self.answers.next_line()).await??.ok_or("it ended without an answer")?;
        Ok(serde_json::from_str(&line)?)
    }

    /// What it has used since it was asked last.
    pub(crate) async fn used(&mut self) -> Result<Used> {
        self.ask.as_mut().ok_or("it was ended")?.write_all(b"\n").await?;
        self.answer().await
    }

    /// Ends its input, and waits until it has ended itself.
    pub(crate) async fn end(mut self) -> Result<()> {
        drop(self.ask.take());
        let status = timeout(AT_MOST, self.child.wait()).await??;
        if status.success() { Ok(()) } else { Err(format!("a measured process failed: {status}").into()) }
    }
}
