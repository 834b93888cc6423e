//! A wall clock that is wrong, for other processes: a program is told another time than this machine's.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
};

use tempfile::TempDir;
use tokio::process::Command;

/// What stands in front of the system's own `clock_gettime`. Time that passes, passes as ever.
///
/// The shift is in a file that is mapped: it may change while the process runs.
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static const volatile int64_t none;
static const volatile int64_t *map_shift(void) {
    const char *path = getenv("CLOCK_SHIFT");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return &none;
    void *mapped = mmap(0, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    return mapped == MAP_FAILED ? &none : mapped;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    static const volatile int64_t *shift;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, now);
    if (result == 0 && id == CLOCK_REALTIME) {
        if (!shift) shift = map_shift();
        now->tv_sec += *shift;
    }
    return result;
}
"#;

/// Makes clocks for other processes. Linux only, and needs a C compiler.
#[derive(Clone, Debug)]
pub struct ClockMaker {
    folder: Arc<TempDir>,
    library: PathBuf,
}

/// The wall clock of one process, or of several.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    shift: PathBuf,
    /// Holds both files.
    _folder: Arc<TempDir>,
}

impl ClockMaker {
    /// Compiles what stands in front of the system's clock.
    ///
    /// # Errors
    /// There is no C compiler, or it refuses.
    pub async fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("registry-tests-").tempdir()?;
        let (source, library) = (folder.path().join("clock.c"), folder.path().join("clock.so"));
        fs::write(&source, SOURCE)?;
        let mut compile = Command::new("cc");
        let built = compile.args(["-shared", "-fPIC", "-o"]).args([&library, &source]).arg("-ldl").status().await?;
        if !built.success() {
            return Err(io::Error::other(format!("the C compiler: {built}")));
        }
        Ok(Self { folder: Arc::new(folder), library })
    }

    /// A clock that is so many seconds off.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn clock(&self, seconds: i64) -> io::Result<Clock> {
        let shift = self.folder.path().join(format!("shift-{:016x}", rand::random::<u64>()));
        fs::write(&shift, seconds.to_ne_bytes())?;
        Ok(Clock { library: self.library.clone(), shift, _folder: self.folder.clone() })
    }
}

impl Clock {
    /// The process that this command starts will have this clock.
    pub fn give_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("CLOCK_SHIFT", &self.shift);
    }

    /// The clock is so many seconds off from now on, also for those who have it.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn set(&self, seconds: i64) -> io::Result<()> {
        // In place: who has it mapped must never find it empty.
        File::options().write(true).open(&self.shift)?.write_all(&seconds.to_ne_bytes())
    }
}
