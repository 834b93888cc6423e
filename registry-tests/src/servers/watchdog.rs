//! Cleans up after a process that can no longer do so itself.

use std::{
    io::Write,
    process::{Child, ChildStdin, Command, Stdio},
    sync::Mutex,
};

use super::{Error, Result};

/// Every line is the command that would clean up from then on. The input ends with the process that holds its other
/// end, however that ends.
const SCRIPT: &str = r#"while read -r line; do cleanup=$line; done; eval "$cleanup""#;

/// A shell that waits for this process to end, however it ends, and then runs a command. Dropped, it runs nothing.
#[derive(Debug)]
pub struct Watchdog {
    shell: Child,
    /// Locked for the writing of one line.
    orders: Mutex<Option<ChildStdin>>,
}

impl Watchdog {
    /// Runs `cleanup`, one line of the shell's language, when this process ends.
    ///
    /// # Errors
    /// There is no shell.
    pub fn new(cleanup: &str) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // In a group of its own: what kills the group of this process must spare it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut shell = command.spawn().map_err(Error::during("cannot start sh"))?;
        let orders = Mutex::new(shell.stdin.take());
        let watchdog = Self { shell, orders };
        watchdog.set(cleanup);
        Ok(watchdog)
    }

    /// Changes what is to be done.
    pub fn set(&self, cleanup: &str) {
        debug_assert!(!cleanup.contains('\n'), "one line");
        if let Some(orders) = self.orders.lock().expect("no panic under this lock").as_mut() {
            // A shell that somebody has killed takes no orders; there is nothing to be done about that.
            let _ = writeln!(orders, "{cleanup}");
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.set(":");
        self.orders.get_mut().expect("no panic under this lock").take();
        let _ = self.shell.wait();
    }
}

/// The text as one word of a shell command.
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
