//! Why TLS does not come about.
//!
//! In TLS 1.3 our handshake is over before the server judges our certificate. The client has by then written the
//! beginning of HTTP/2; a server that closes with that unread resets the connection, and the reset discards the alert
//! that says why. So a handshake of its own, which writes nothing and waits to be told.

use std::{sync::Arc, time::Duration};

use registry_core::{Error, Result};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{
    config::EtcdTls,
    error::{NAME, is_refusal},
};

/// Handshakes as the client's, for one endpoint.
pub(crate) struct Handshake {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

impl Handshake {
    /// For an endpoint `address`, which is `host:port`.
    pub(crate) fn new(tls: &EtcdTls, config: Arc<ClientConfig>, address: &str) -> Result<Self> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let name = tls.server_name.as_deref().unwrap_or(host.trim_matches(['[', ']']));
        let server_name = ServerName::try_from(name.to_owned()).map_err(|error| {
            Error::invalid(format!("invalid server name {name:?}")).with_backend(NAME).with_source(error)
        })?;
        Ok(Self { config, server_name })
    }

    /// Why one of the two ends refuses the other's certificate; `None` if that is not what is wrong. Connecting and
    /// the rest may take `limit` each.
    pub(crate) async fn refusal(&self, address: &str, limit: Duration) -> Option<Arc<str>> {
        let tcp = timeout(limit, TcpStream::connect(address)).await.ok()?.ok()?;
        let told = async {
            let connector = TlsConnector::from(Arc::clone(&self.config));
            connector.connect(self.server_name.clone(), tcp).await?.read_u8().await
        };
        let text = timeout(limit, told).await.ok()?.err()?.to_string();
        is_refusal(&text).then(|| text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_expected_name_is_the_configured_one_or_the_host() {
        let expected = |tls: EtcdTls, address| {
            // For its side effect, which is to see to the provider.
            crate::EtcdConfig::new(["h1"]).tls(EtcdTls::new()).connect_options().unwrap();
            let config = Arc::new(tls.handshake_config().unwrap());
            Handshake::new(&tls, config, address).map(|handshake| handshake.server_name.to_str().into_owned())
        };
        for (address, host) in
            [("h1.example:2379", "h1.example"), ("10.0.0.1:1", "10.0.0.1"), ("[2001:db8::1]:1", "2001:db8::1")]
        {
            assert_eq!(expected(EtcdTls::new(), address).unwrap(), host);
        }
        assert_eq!(expected(EtcdTls::new().server_name("etcd"), "h1:1").unwrap(), "etcd");
        assert!(expected(EtcdTls::new().server_name("a b"), "h1:1").is_err());
    }
}
