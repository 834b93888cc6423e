//! A password that is planted in a connection string shows up nowhere: not in an error, a `Debug`, a `Display` or a log.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fmt::Debug,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt;
use service_registry::{Error, Instance, Location, connect};
use tracing_subscriber::fmt::{MakeWriter, format::FmtSpan};

const PLANTED: &str = "hunter2";

#[derive(Clone, Default)]
struct Spoken(Arc<Mutex<Vec<u8>>>);

impl Spoken {
    fn hear(&self, said: impl Debug) {
        self.0.lock().unwrap().extend(format!("{said:?}\n{said:#?}\n").into_bytes());
    }

    fn hear_error(&self, error: &Error) {
        self.hear(error);
        let chain = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
        chain.for_each(|error| self.hear(error.to_string()));
    }

    fn must_not_hold_the_password(&self) {
        let said = String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned();
        let at = said.find(PLANTED).map(|at| said[at.saturating_sub(200)..].chars().take(400).collect::<String>());
        assert_eq!(at, None, "the password was said");
    }
}

impl io::Write for Spoken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Spoken {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Everything that is logged in this process from now on, at the finest level, spans included.
fn log() -> Spoken {
    let spoken = Spoken::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_span_events(FmtSpan::NEW);
    let subscriber = subscriber.with_ansi(false).with_writer(spoken.clone());
    tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
    spoken
}

#[tokio::test]
async fn a_planted_password_is_never_said() {
    let spoken = log();
    // Nobody listens on port 1: every call fails and says why.
    for url in [
        format!("etcd://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms"),
        format!("etcds://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms&server_name=h"),
        format!("etcds://app:{PLANTED}@127.0.0.1:1/shop?ca=/nowhere"),
        format!("etcd://app:{PLANTED}@127.0.0.1:1/shop?colour=red"),
        format!("etcd://app:{PLANTED}@127.0.0.1:1/shop?ttl=soon"),
        format!("etcd://:{PLANTED}@127.0.0.1:1"),
        format!("etcd://app:{PLANTED}@127.0.0.1:port"),
        format!("etcd://app:{PLANTED}/more@127.0.0.1:1"),
        format!("etcd://app:{PLANTED}@more@127.0.0.1:1"),
        format!("etcd//app:{PLANTED}@127.0.0.1:1"),
        format!("zk://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms"),
        format!("zk://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms&auth=sasl&acl=creator-all"),
        format!("zks://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms"),
        format!("zk://app:{PLANTED}@127.0.0.1:1/shop?auth=kerberos"),
        format!("redis://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms"),
        format!("redis://:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms&db=7"),
        format!("rediss://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms"),
        format!(
            "redis+sentinel://app:{PLANTED}@127.0.0.1:1?master=m&sentinel_password={PLANTED}&request_timeout=300ms"
        ),
        format!("redis+sentinel://app:x@127.0.0.1:1?master=m&sentinel_user=u&sentinel_password={PLANTED}&colour=red"),
        format!("redis+cluster://app:{PLANTED}@127.0.0.1:1/shop?request_timeout=300ms"),
        format!("redis+cluster://app:{PLANTED}@127.0.0.1:1/shop?db=1"),
        format!("consul://app:{PLANTED}@127.0.0.1:1"),
        format!("memory://app:{PLANTED}@name"),
    ] {
        match Location::parse(&url) {
            Ok(location) => {
                spoken.hear(location.to_string());
                spoken.hear(location);
            }
            Err(error) => spoken.hear_error(&error),
        }
        let registry = match connect(&url).await {
            Ok(registry) => registry,
            Err(error) => {
                spoken.hear_error(&error);
                continue;
            }
        };
        let mut events = registry.events();
        spoken.hear(&registry);
        let outcome = registry.register(Instance::builder("orders", "1").build().unwrap()).await;
        spoken.hear_error(&outcome.unwrap_err());
        spoken.hear_error(&registry.discover("orders").await.unwrap_err());
        spoken.hear_error(
            &registry.heartbeat().await.map(|heartbeat| spoken.hear(heartbeat)).err().unwrap_or_else(closed),
        );
        spoken.hear(registry.registrations());
        spoken.hear_error(&registry.destroy().await.err().unwrap_or_else(closed));
        while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(100), events.next()).await {
            spoken.hear(event);
        }
    }
    spoken.must_not_hold_the_password();
    let said = spoken.0.lock().unwrap().len();
    assert!(said > 1000, "something was listened to: {said} bytes");
}

fn closed() -> Error {
    Error::new(service_registry::ErrorKind::Closed, "none")
}
