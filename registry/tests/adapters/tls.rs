//! Certificates of an authority of our own, and a listener for HTTP that uses them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::error::Error;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// What a server needs, and the authority that callers must trust; all in PEM.
pub(crate) struct Certs {
    pub(crate) authority: String,
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Certs {
    /// A new authority each time.
    pub(crate) fn of(host: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        // By its key: another one is unknown, and not one whose signature is bad.
        params.distinguished_name.push(DnType::CommonName, format!("{:x?}", key.public_key_raw()));
        let authority = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let (params, key) = (CertificateParams::new([host.to_owned()]).unwrap(), KeyPair::generate().unwrap());
        let cert = params.signed_by(&key, &issuer).unwrap().pem();
        Self { authority, cert, key: key.serialize_pem() }
    }

    /// A client that trusts this authority and no other.
    pub(crate) fn client(&self) -> reqwest::ClientBuilder {
        reqwest::Client::builder().tls_certs_only([reqwest::Certificate::from_pem(self.authority.as_bytes()).unwrap()])
    }
}

/// An error and all its sources.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |error| (**error).source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(feature = "axum")]
pub(crate) mod listener {
    use std::{io, net::SocketAddr, sync::Arc};

    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{
            ServerConfig,
            pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        },
        server::TlsStream,
    };

    use super::Certs;

    /// A listener of TLS.
    pub(crate) struct Encrypted {
        listener: TcpListener,
        acceptor: TlsAcceptor,
    }

    impl Encrypted {
        pub(crate) async fn bind(certs: &Certs) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let cert = CertificateDer::from_pem_slice(certs.cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(certs.key.as_bytes()).unwrap();
            let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![cert], key).unwrap();
            Self { listener, acceptor: TlsAcceptor::from(Arc::new(config)) }
        }

        pub(crate) fn port(&self) -> u16 {
            self.listener.local_addr().unwrap().port()
        }
    }

    impl axum::serve::Listener for Encrypted {
        type Io = TlsStream<TcpStream>;
        type Addr = SocketAddr;

        /// The next connection whose handshake succeeds.
        async fn accept(&mut self) -> (Self::Io, Self::Addr) {
            loop {
                let (stream, client) = self.listener.accept().await.unwrap();
                if let Ok(stream) = self.acceptor.accept(stream).await {
                    return (stream, client);
                }
            }
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            self.listener.local_addr()
        }
    }
}
