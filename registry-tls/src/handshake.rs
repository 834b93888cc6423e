//! Why TLS does not come about.

use std::{sync::Arc, time::Duration};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

/// A handshake apart from the client, to be told what the client does not tell.
///
/// In TLS 1.3 our handshake is over before the server judges our certificate. The client has by then written the
/// beginning of its own protocol; a server that closes with that unread resets the connection, and the reset discards the
/// alert that says why. So this one writes nothing and waits to be told.
#[derive(Clone, Debug)]
pub struct Handshake(Arc<ClientConfig>);

impl Handshake {
    /// As the client's, if that has the same configuration.
    #[must_use]
    pub fn new(config: Arc<ClientConfig>) -> Self {
        Self(config)
    }

    /// Why one of the two ends refuses the other's certificate; `None` if that is not what is wrong. Connecting to the
    /// `address`, which is `host:port`, and the rest may take `limit` each.
    pub async fn refusal(&self, address: &str, name: &ServerName<'static>, limit: Duration) -> Option<Arc<str>> {
        let tcp = timeout(limit, TcpStream::connect(address)).await.ok()?.ok()?;
        let told = async { TlsConnector::from(self.0.clone()).connect(name.clone(), tcp).await?.read_u8().await };
        let text = timeout(limit, told).await.ok()?.err()?.to_string();
        is_refusal(&text).then(|| text.into())
    }
}

/// Whether this is what the TLS library says when one end refuses what the other one shows.
#[must_use]
pub fn is_refusal(text: &str) -> bool {
    text.contains("invalid peer certificate") || text.contains("fatal alert")
}
