//! What the library says while the cases run: shown where one fails, and searched for what must not be said.

use std::{
    io,
    sync::{Mutex, Once, PoisonError},
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// What the library and its client logged so far.
static HEARD: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Shows it, and keeps it.
struct Ear;

impl io::Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        print!("{}", String::from_utf8_lossy(bytes));
        HEARD.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Ear {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

/// Writes down what is logged from now on.
pub(crate) fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = ["registry_etcd", "etcd_client", "registry_redis", "redis", "registry_zk", "zookeeper_client"];
        let filter = EnvFilter::new(format!("info,registry_core=debug,{}=trace", loud.join("=trace,")));
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(Ear).init();
    });
}

pub(crate) fn heard() -> String {
    String::from_utf8_lossy(&HEARD.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}
