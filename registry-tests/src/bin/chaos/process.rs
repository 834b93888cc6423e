//! A child: this program again, in another role.

use std::{
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use registry_tests::{clock::Clock, servers};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, Command},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    Result,
    checker::Checker,
    ledger::Process,
    protocol::{Order, Report, now},
};

/// So long a child may take to end once it is killed, and an order to be taken.
const PATIENCE: Duration = Duration::from_secs(10);

/// What everybody reports to. Held for the length of one report, never across an await.
#[derive(Clone, Debug)]
pub(crate) struct Desk(Arc<Mutex<Checker>>);

impl Desk {
    pub(crate) fn new(checker: Checker) -> Self {
        Self(Arc::new(Mutex::new(checker)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Checker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running child, which ends when this is dropped, and when this process ends.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Process,
    /// Its wall clock, if it is not ours.
    pub(crate) clock: Option<Clock>,
    child: Child,
    orders: ChildStdin,
    listener: JoinHandle<()>,
}

impl Running {
    /// Starts `role` at a store, which is known as `process` from now on.
    pub(crate) fn start(desk: &Desk, process: Process, role: &str, url: &str, clock: Option<Clock>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([role, url]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        if let Some(clock) = &clock {
            clock.give_to(&mut command);
        }
        let mut child = command.spawn()?;
        let (Some(orders), Some(said)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a child has no pipes".into());
        };
        let desk = desk.clone();
        let listener = tokio::spawn(async move {
            let mut lines = BufReader::new(said).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                match serde_json::from_str::<Report>(&line) {
                    Ok(report) => desk.lock().said(process, report, now()),
                    Err(error) => desk.lock().violate(now(), format!("not a report: {error}: {line}")),
                }
            }
            desk.lock().fell_silent(process, now());
        });
        Ok(Self { process, clock, child, orders, listener })
    }

    /// Its number, as long as it has not been waited for.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    pub(crate) async fn tell(&mut self, order: &Order) -> Result {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        timeout(PATIENCE, self.orders.write_all(&line)).await??;
        Ok(())
    }

    /// Sends a signal by its name.
    pub(crate) async fn signal(&self, name: &str) -> Result {
        let id = self.id().ok_or("it has ended")?;
        Ok(servers::signal(id, name).await?)
    }

    /// SIGKILL. What it has said until then is heard.
    pub(crate) async fn kill(mut self) -> Result {
        timeout(PATIENCE, self.child.kill()).await??;
        timeout(PATIENCE, &mut self.listener).await??;
        Ok(())
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn end(mut self) -> Result {
        timeout(PATIENCE, self.child.wait()).await??;
        timeout(PATIENCE, &mut self.listener).await??;
        Ok(())
    }
}
