//! Which process a container belongs to, written on its label, and whether that process is still there.

use std::{fs, process::Command, sync::LazyLock};

/// The label that every container of the suite carries.
pub(super) const LABEL: &str = "registry-tests.owner";

/// This process, as it is written on labels.
static SELF: LazyLock<Owner> = LazyLock::new(|| {
    let pid = std::process::id().to_string();
    let started = started(&pid).unwrap_or_default();
    Owner { boot: boot(), namespace: namespace(), pid, started }
});

/// The value of [`LABEL`] for the containers of this process.
pub(super) fn label() -> String {
    SELF.to_string()
}

/// Whether a container is left over from a process that is gone.
pub(super) fn is_gone(label: &str, container_runs: bool) -> bool {
    match Owner::parse(label) {
        // Another boot of the machine: no process of it is there. A container that runs is somebody else's after all.
        Some(owner) if owner.boot != SELF.boot => !container_runs,
        // The same engine used from within a container: its processes cannot be seen from here.
        Some(owner) if owner.namespace != SELF.namespace => false,
        // A number is used again, but not with the same time of start.
        Some(owner) => started(&owner.pid).is_none_or(|started| started != owner.started),
        None => false,
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Owner {
    boot: String,
    namespace: String,
    pid: String,
    started: String,
}

impl Owner {
    fn parse(label: &str) -> Option<Self> {
        let mut parts = label.split('/').map(str::to_owned);
        let owner = Self { boot: parts.next()?, namespace: parts.next()?, pid: parts.next()?, started: parts.next()? };
        parts.next().is_none().then_some(owner)
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}/{}", self.boot, self.namespace, self.pid, self.started)
    }
}

/// Different for each start of the machine. Empty where the system does not tell; the times of start must do there.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn namespace() -> String {
    fs::read_link("/proc/self/ns/pid").map(|link| link.display().to_string()).unwrap_or_default()
}

/// When a process started, in whatever form the system says it; `None` if there is none.
fn started(pid: &str) -> Option<String> {
    if fs::exists("/proc/self/stat").is_ok_and(|linux| linux) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The 22nd field. The second is the program's name, in parentheses, and may hold anything.
        let (_, fields) = stat.rsplit_once(')')?;
        return fields.split_whitespace().nth(19).map(str::to_owned);
    }
    let ps = Command::new("ps").args(["-o", "lstart=", "-p", pid]).output().ok()?;
    let started = String::from_utf8_lossy(&ps.stdout).trim().replace('/', "-");
    (!started.is_empty()).then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut Owner)) -> String {
        let mut owner = Owner::parse(&label()).unwrap();
        change(&mut owner);
        owner.to_string()
    }

    #[test]
    fn this_process_is_there() {
        assert!(!is_gone(&label(), true));
        assert!(!is_gone(&label(), false));
    }

    #[test]
    fn an_ended_process_is_gone_and_so_is_one_whose_number_is_used_again() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id().to_string();
        child.wait().unwrap();
        assert!(is_gone(&with(|owner| owner.pid = pid), true));
        assert!(is_gone(&with(|owner| owner.started.push('0')), true));
    }

    #[test]
    fn what_cannot_be_judged_is_left_alone() {
        assert!(!is_gone(&with(|owner| owner.namespace.push('0')), false));
        assert!(!is_gone(&with(|owner| owner.boot.push('0')), true));
        assert!(is_gone(&with(|owner| owner.boot.push('0')), false));
        assert!(!is_gone("something else", false));
    }
}
