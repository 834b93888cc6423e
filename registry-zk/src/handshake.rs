//! Why TLS does not come about.
//!
//! The client tells of a server whose certificate it refuses, or that refuses ours, as of one that is not there. So a
//! handshake of its own. In TLS 1.3 ours is over before the server judges our certificate: it waits to be told.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use registry_core::{Error, Result};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{config::ZooKeeperTls, error::NAME};

/// Handshakes as the client's, with every server.
pub(crate) struct Handshake {
    config: Arc<ClientConfig>,
    servers: Vec<(String, ServerName<'static>)>,
}

impl Handshake {
    /// With servers at `addresses`, which are `host:port`.
    pub(crate) fn new(tls: &ZooKeeperTls, addresses: &[String]) -> Result<Self> {
        let server = |address: &String| {
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host).trim_matches(['[', ']']);
            let name = ServerName::try_from(host.to_owned()).map_err(|error| {
                Error::invalid(format!("invalid server name {host:?}")).with_backend(NAME).with_source(error)
            })?;
            Ok((address.clone(), name))
        };
        let servers = addresses.iter().map(server).collect::<Result<_>>()?;
        Ok(Self { config: Arc::new(tls.handshake_config()?), servers })
    }

    /// Why one of the two ends refuses the other's certificate, with every server; `None` if that is not what is
    /// wrong. Connecting and the rest may take `limit` each.
    pub(crate) async fn refusal(&self, limit: Duration) -> Option<Arc<str>> {
        let refusals = self.servers.iter().map(|(address, name)| self.refusal_of(address, name, limit));
        join_all(refusals).await.into_iter().collect::<Option<Vec<_>>>()?.pop()
    }

    async fn refusal_of(&self, address: &str, name: &ServerName<'static>, limit: Duration) -> Option<Arc<str>> {
        let tcp = timeout(limit, TcpStream::connect(address)).await.ok()?.ok()?;
        let told = async {
            let connector = TlsConnector::from(Arc::clone(&self.config));
            connector.connect(name.clone(), tcp).await?.read_u8().await
        };
        let text = timeout(limit, told).await.ok()?.err()?.to_string();
        // This is what the TLS library says when one end refuses what the other one shows.
        let refused = text.contains("invalid peer certificate") || text.contains("fatal alert");
        refused.then(|| text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_name_is_the_host() {
        let addresses = ["h1.example:2281", "10.0.0.1:1", "[2001:db8::1]:1"].map(str::to_owned);
        // For its side effect, which is to see to the provider.
        let _ = ZooKeeperTls::new().client_options();
        let handshake = Handshake::new(&ZooKeeperTls::new(), &addresses).unwrap();
        let names: Vec<_> = handshake.servers.iter().map(|(_, name)| name.to_str().into_owned()).collect();
        assert_eq!(names, ["h1.example", "10.0.0.1", "2001:db8::1"]);
        assert!(Handshake::new(&ZooKeeperTls::new(), &["a b:1".to_owned()]).is_err());
    }
}
