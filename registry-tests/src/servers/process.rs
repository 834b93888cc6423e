//! Servers as child processes.

use std::{
    fs::{self, File},
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{
    Error, Machine, Result, STOP_WITHIN, Site, Store, on_path,
    watchdog::{Watchdog, quoted},
};

/// The server's program.
pub(super) fn program(store: &dyn Store) -> Result<PathBuf> {
    let site = Site {
        listen: Ipv4Addr::LOCALHOST,
        data: String::new(),
        files: String::new(),
        members: Arc::new([vec![0; store.ports()]]),
        index: 0,
    };
    let missing = |what: &str| {
        let package = store.package();
        Error::new(format!("there is no {what}: for test servers as processes, apt-get install {package}"))
    };
    let name = store.command(&site).swap_remove(0);
    let program = on_path(&name).ok_or_else(|| missing(&format!("{name} in PATH")))?;
    match store.needs().iter().find(|file| !Path::new(file).is_file()) {
        Some(file) => Err(missing(file)),
        None => Ok(program),
    }
}

/// Sends a signal by its name, such as `STOP`, to a process of our own, by way of the shell: the language's own library
/// can only kill.
///
/// # Errors
/// There is no such process, or no such signal.
pub async fn signal(process: u32, name: &str) -> Result<()> {
    let command = format!("kill -{name} {process}");
    let status = tokio::process::Command::new("sh").args(["-c", &command]).status().await;
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(Error::new(format!("{command}: {other:?}"))),
    }
}

/// One server as a child process, with a folder of its own that holds `data/`, `files/` and `log`.
#[derive(Debug)]
pub(super) struct Process {
    program: PathBuf,
    args: Vec<String>,
    files: Vec<(String, String)>,
    /// More of them, since it has lost its data.
    more: Mutex<Vec<String>>,
    /// Locked for the length of a system call.
    child: Mutex<Option<Child>>,
    home: TempDir,
    watchdog: Watchdog,
}

impl Process {
    pub(super) fn new(store: &dyn Store, members: Arc<[Vec<u16>]>, index: usize) -> Result<(Self, Site)> {
        let home = tempfile::Builder::new().prefix("registry-tests-").tempdir();
        let home = home.map_err(Error::during("cannot make a folder for a server"))?;
        let inside = |name: &str| home.path().join(name).display().to_string();
        let site = Site { listen: Ipv4Addr::LOCALHOST, data: inside("data"), files: inside("files"), members, index };
        let process = Self {
            program: program(store)?,
            args: store.command(&site).split_off(1),
            files: store.files(&site),
            more: Mutex::default(),
            child: Mutex::new(None),
            watchdog: Watchdog::new(&removal(home.path()))?,
            home,
        };
        Ok((process, site))
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().expect("no panic under this lock")
    }

    fn spawn(&self) -> io::Result<Child> {
        let home = self.home.path();
        let has_data = home.join("data").exists();
        fs::create_dir_all(home.join("data"))?;
        fs::create_dir_all(home.join("files"))?;
        // With its data a server keeps what it has written into its files.
        for (name, text) in self.files.iter().filter(|_| !has_data) {
            // A path stays what it is.
            fs::write(home.join("files").join(name), text)?;
        }
        let log = File::options().create(true).append(true).open(home.join("log"))?;
        // Servers read options from the environment too: they are to see none.
        Command::new(&self.program)
            .args(&self.args)
            .args(&*self.more.lock().expect("no panic under this lock"))
            .current_dir(home)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
    }

    async fn signal(&self, name: &str) -> Result<()> {
        signal(self.pid().await?, name).await
    }

    fn end(&self) -> io::Result<()> {
        if let Some(mut child) = self.child().take() {
            child.kill()?;
            // Its number may be another process's from now on.
            self.watchdog.set(&removal(self.home.path()));
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(program = %self.program.display(), %error, "a test server could not be ended");
        }
    }
}

/// Whether a process is stopped, by what `proc(5)` says of it: its state follows its name.
fn is_stopped(stat: &str) -> bool {
    stat.rsplit(')').next().is_some_and(|after_name| after_name.trim_start().starts_with('T'))
}

/// The command that removes a server's folder.
fn removal(home: &Path) -> String {
    format!("rm -rf {}", quoted(&home.display().to_string()))
}

#[async_trait]
impl Machine for Process {
    async fn up(&self) -> Result<()> {
        let child = self.spawn().map_err(Error::during(self.program.display()))?;
        self.watchdog.set(&format!("kill -9 {}; sleep 1; {}", child.id(), removal(self.home.path())));
        *self.child() = Some(child);
        Ok(())
    }

    async fn stop(&self) -> Result<()> {
        self.signal("TERM").await?;
        let deadline = Instant::now() + STOP_WITHIN;
        while !self.ended().await {
            if Instant::now() > deadline {
                return Err(Error::new(format!("{} did not stop within {STOP_WITHIN:?}", self.program.display())));
            }
            sleep(Duration::from_millis(5)).await;
        }
        self.kill().await
    }

    async fn kill(&self) -> Result<()> {
        self.end().map_err(Error::during("cannot kill a server"))
    }

    /// One thread of the process is told, and tells the others once it runs: on a busy machine that takes a while.
    async fn freeze(&self) -> Result<()> {
        self.signal("STOP").await?;
        let stat = format!("/proc/{}/stat", self.pid().await?);
        let deadline = Instant::now() + STOP_WITHIN;
        // Where there is no such file it is taken for frozen.
        while fs::read_to_string(&stat).is_ok_and(|stat| !is_stopped(&stat)) {
            if Instant::now() > deadline {
                return Err(Error::new(format!("{} did not freeze within {STOP_WITHIN:?}", self.program.display())));
            }
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    async fn thaw(&self) -> Result<()> {
        self.signal("CONT").await
    }

    async fn erase(&self, more: Vec<String>) -> Result<()> {
        *self.more.lock().expect("no panic under this lock") = more;
        fs::remove_dir_all(self.home.path().join("data")).map_err(Error::during("cannot delete a server's data"))
    }

    async fn ended(&self) -> bool {
        match self.child().as_mut() {
            Some(child) => child.try_wait().is_ok_and(|status| status.is_some()),
            None => true,
        }
    }

    async fn pid(&self) -> Result<u32> {
        self.child().as_ref().map(Child::id).ok_or_else(|| Error::new("the server is down"))
    }

    async fn log(&self) -> String {
        let log = fs::read_to_string(self.home.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store that needs a file.
    #[derive(Debug)]
    struct Needy(&'static str);

    #[async_trait]
    impl Store for Needy {
        fn name(&self) -> &'static str {
            "needy"
        }

        fn package(&self) -> &'static str {
            "needy-server needy-files"
        }

        fn needs(&self) -> Vec<String> {
            vec!["/".to_owned() + self.0]
        }

        fn ports(&self) -> usize {
            1
        }

        fn command(&self, _site: &Site) -> Vec<String> {
            vec!["sh".to_owned()]
        }

        fn url(&self, _ports: &[u16]) -> String {
            String::new()
        }

        async fn ready(&self, _site: &Site) -> bool {
            true
        }

        async fn leads(&self, _site: &Site) -> bool {
            true
        }
    }

    #[test]
    fn a_stopped_process_is_known_by_its_state() {
        assert!(is_stopped("4711 (etcd (a) b) T 1 4711 4711 0 -1"));
        assert!(!is_stopped("4711 (T) S 1 4711 4711 0 -1"));
    }

    #[test]
    fn a_missing_file_is_named_and_so_are_the_packages() {
        assert!(program(&Needy("bin/sh")).is_ok());
        let missing = program(&Needy("nowhere/needed.jar")).unwrap_err().to_string();
        assert!(missing.starts_with("there is no /nowhere/needed.jar"), "{missing}");
        assert!(missing.ends_with("apt-get install needy-server needy-files"), "{missing}");
    }
}
