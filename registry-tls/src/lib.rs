//! How backends of `service-registry` talk TLS: what a user configures, the same for every store, and why a handshake
//! does not come about.
//!
//! A client of a store takes either what rustls needs ([`Tls::client_config`]) or the text of PEM files
//! ([`Tls::authorities_pem`], [`Tls::identity_pem`]). Either way the files are read strictly: what is wrong with one is
//! said with its option and name before anything is connected to.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod handshake;

use std::{
    error::Error as StdError,
    fs,
    path::{Path, PathBuf},
};

use registry_core::{Error, Location, Result};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use serde::Deserialize;

pub use self::handshake::{Handshake, is_refusal};

/// How TLS is talked.
///
/// # Examples
/// ```
/// use registry_tls::Tls;
///
/// let tls = Tls::new().ca("/etc/ssl/store.pem").identity("/etc/ssl/app.pem", "/etc/ssl/app.key");
/// assert!(tls.validate().is_ok());
/// let error = tls.client_config().unwrap_err();
/// assert_eq!(error.to_string(), "invalid ca: cannot use /etc/ssl/store.pem");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Tls {
    /// A PEM file with the authorities that may sign the servers' certificates.
    ///
    /// Defaults to none, which trusts those of the operating system.
    pub ca: Option<PathBuf>,

    /// A PEM file with our own certificate, for servers that ask for one; needs [`key`](Self::key). Defaults to none.
    pub cert: Option<PathBuf>,

    /// A PEM file with the private key of [`cert`](Self::cert). Defaults to none.
    pub key: Option<PathBuf>,

    /// The name that the servers' certificates carry. Defaults to the host of the endpoint.
    pub server_name: Option<String>,
}

impl Tls {
    /// The names of the options of a connection string.
    pub const NAMES: &'static [&'static str] = &["ca", "cert", "key", "server_name"];

    /// TLS that trusts the authorities of the operating system.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What a connection string says of TLS; the options are taken from it.
    pub fn take_from(location: &mut Location) -> Self {
        let mut file = |name| location.take(name).map(PathBuf::from);
        let (ca, cert, key) = (file("ca"), file("cert"), file("key"));
        Self { ca, cert, key, server_name: location.take("server_name") }
    }

    /// Sets [`ca`](Self::ca).
    #[must_use]
    pub fn ca(self, file: impl Into<PathBuf>) -> Self {
        Self { ca: Some(file.into()), ..self }
    }

    /// Sets [`cert`](Self::cert) and [`key`](Self::key).
    #[must_use]
    pub fn identity(self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { cert: Some(cert.into()), key: Some(key.into()), ..self }
    }

    /// Sets [`server_name`](Self::server_name).
    #[must_use]
    pub fn server_name(self, name: impl Into<String>) -> Self {
        Self { server_name: Some(name.into()), ..self }
    }

    /// Whether it is complete, without reading a file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if a certificate or a key stands alone.
    pub fn validate(&self) -> Result<()> {
        if self.cert.is_some() != self.key.is_some() {
            return Err(Error::invalid("a client certificate (cert) needs its key, and a key its certificate"));
        }
        Ok(())
    }

    /// What a handshake needs, read from the files. Sees to a [provider](install_provider), too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if a file cannot be read or used, by its
    /// name.
    pub fn client_config(&self) -> Result<ClientConfig> {
        install_provider();
        let mut roots = RootCertStore::empty();
        match &self.ca {
            None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
            Some(file) => {
                for certificate in certificates(&read_certificates("ca", file)?).flatten() {
                    roots.add(certificate).map_err(|error| unusable("ca", file, error))?;
                }
            }
        }
        let builder = ClientConfig::builder().with_root_certificates(roots);
        let (Some((chain, key)), Some(file)) = (self.identity_pem()?, &self.key) else {
            return Ok(builder.with_no_client_auth());
        };
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| unusable("key", file, error))?;
        let chain = certificates(&chain).flatten().collect();
        builder.with_client_auth_cert(chain, key).map_err(|error| unusable("key", file, error))
    }

    /// The text of the file [`ca`](Self::ca), which holds at least one certificate and none that cannot be used; `None`
    /// for those of the operating system.
    ///
    /// # Errors
    /// As for [`client_config`](Self::client_config).
    pub fn authorities_pem(&self) -> Result<Option<String>> {
        self.ca.as_deref().map(|file| read_certificates("ca", file)).transpose()
    }

    /// The texts of the files [`cert`](Self::cert) and [`key`](Self::key), as far as they can be judged apart.
    ///
    /// # Errors
    /// As for [`client_config`](Self::client_config).
    pub fn identity_pem(&self) -> Result<Option<(String, String)>> {
        let (Some(cert), Some(key)) = (&self.cert, &self.key) else { return Ok(None) };
        Ok(Some((read_certificates("cert", cert)?, read_key("key", key)?)))
    }

    /// The name that the certificate of a server at `host` has to carry.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](registry_core::ErrorKind::InvalidInput) if no certificate can carry it.
    pub fn expected_name(&self, host: &str) -> Result<ServerName<'static>> {
        let name = self.server_name.as_deref().unwrap_or(host.trim_matches(['[', ']']));
        ServerName::try_from(name.to_owned())
            .map_err(|error| Error::invalid(format!("invalid server name {name:?}")).with_source(error))
    }
}

/// Installs the provider of cryptography that all our clients share, unless the application has installed one: then that
/// one is used. Without one, rustls panics where several are compiled in.
pub fn install_provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn unusable(option: &str, file: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::invalid(format!("invalid {option}: cannot use {}", file.display())).with_source(source)
}

fn certificates(text: &str) -> impl Iterator<Item = Result<CertificateDer<'static>, rustls::pki_types::pem::Error>> {
    CertificateDer::pem_slice_iter(text.as_bytes())
}

/// The text of a PEM file with at least one certificate. Clients would pass over those that they cannot read.
fn read_certificates(option: &str, file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).map_err(|error| unusable(option, file, error))?;
    let mut store = RootCertStore::empty();
    for certificate in certificates(&text) {
        let certificate = certificate.map_err(|error| unusable(option, file, error))?;
        store.add(certificate).map_err(|error| unusable(option, file, error))?;
    }
    if store.is_empty() {
        return Err(unusable(option, file, "there is no PEM certificate in it"));
    }
    Ok(text)
}

fn read_key(option: &str, file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).map_err(|error| unusable(option, file, error))?;
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| unusable(option, file, error))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    /// A file with this in it; it goes with the folder.
    fn file(folder: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_option_and_name() {
        let folder = tempfile::tempdir().unwrap();
        let pair = rcgen::generate_simple_self_signed(["app".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["other".to_owned()]).unwrap();
        let cert = file(&folder, "cert.pem", &pair.cert.pem());
        let key = file(&folder, "key.pem", &pair.signing_key.serialize_pem());
        let others = file(&folder, "others.pem", &other.signing_key.serialize_pem());
        let empty = file(&folder, "empty.pem", "");
        let broken = pair.cert.pem().replace("-----BEGIN CERTIFICATE-----\n", "-----BEGIN CERTIFICATE-----\nAAAA");
        let broken = file(&folder, "broken.pem", &broken);
        let missing = folder.path().join("missing.pem");

        Tls::new().ca(&cert).identity(&cert, &key).client_config().unwrap();
        let cases = [
            (Tls::new().ca(&missing), "ca", &missing),
            (Tls::new().ca(&empty), "ca", &empty),
            (Tls::new().ca(&broken), "ca", &broken),
            (Tls::new().ca(&cert).identity(&empty, &key), "cert", &empty),
            (Tls::new().ca(&cert).identity(&cert, &cert), "key", &cert),
            (Tls::new().ca(&cert).identity(&cert, &missing), "key", &missing),
            (Tls::new().ca(&cert).identity(&cert, &others), "key", &others),
        ];
        for (tls, option, file) in cases {
            let error = tls.client_config().unwrap_err();
            assert_eq!(error.to_string(), format!("invalid {option}: cannot use {}", file.display()));
            assert!(error.source().is_some(), "{error}");
        }
    }

    #[test]
    fn the_expected_name_is_the_configured_one_or_the_host() {
        let of = |tls: Tls, host| tls.expected_name(host).map(|name| name.to_str().into_owned());
        for (host, name) in [("h1.example", "h1.example"), ("10.0.0.1", "10.0.0.1"), ("[2001:db8::1]", "2001:db8::1")] {
            assert_eq!(of(Tls::new(), host).unwrap(), name);
        }
        assert_eq!(of(Tls::new().server_name("store"), "h1").unwrap(), "store");
        assert!(of(Tls::new(), "a b").is_err() && of(Tls::new().server_name("a b"), "h1").is_err());
    }

    #[test]
    fn a_connection_string_says_all_of_it() {
        let mut location = "x://h?ca=/a&cert=/c&key=/k&server_name=n".parse().unwrap();
        let expected = Tls::new().ca("/a").identity("/c", "/k").server_name("n");
        assert_eq!(Tls::take_from(&mut location), expected);
        location.finish(&[]).unwrap();
        assert!(Tls { key: None, ..expected }.validate().is_err());
    }
}
