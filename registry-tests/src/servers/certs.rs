//! Certificates of a test authority, made anew for every test that wants them.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use tempfile::TempDir;

use super::{Error, Result};

/// A certificate and its private key, in PEM, and the files that hold them.
#[derive(Clone)]
#[non_exhaustive]
pub struct Identity {
    /// The certificate.
    pub cert: String,
    /// The private key.
    pub key: String,
    /// A file that holds the certificate for as long as its [`Certs`] lives.
    pub cert_file: String,
    /// A file that holds the key for as long as its [`Certs`] lives.
    pub key_file: String,
}

/// Without the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("cert_file", &self.cert_file).finish_non_exhaustive()
    }
}

/// A certificate authority and what a TLS test needs from it, and one stranger.
#[derive(Debug)]
#[non_exhaustive]
pub struct Certs {
    /// The authority's certificate, in PEM.
    pub ca: String,
    /// A file that holds the authority's certificate for as long as this lives.
    pub ca_file: String,
    /// A server at `localhost`, `127.0.0.1` and `::1`.
    pub server: Identity,
    /// A server at another name, `other.example`.
    pub misnamed: Identity,
    /// A client, `CN=client`. Note that etcd takes a common name for a user's.
    pub client: Identity,
    /// A client of another authority.
    pub stranger: Identity,
    issuer: Authority,
    folder: TempDir,
}

impl Certs {
    /// Makes all of them.
    ///
    /// # Errors
    /// The temporary folder for the files could not be written.
    pub fn generate() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("registry-tests-certs-").tempdir();
        let folder = folder.map_err(Error::during("cannot make a folder for certificates"))?;
        let (issuer, other) = (Authority::new("test authority")?, Authority::new("another authority")?);
        let here = [
            SanType::DnsName("localhost".try_into().map_err(failed)?),
            SanType::IpAddress(Ipv4Addr::LOCALHOST.into()),
            SanType::IpAddress(Ipv6Addr::LOCALHOST.into()),
        ];
        let elsewhere = [SanType::DnsName("other.example".try_into().map_err(failed)?)];
        let ca = issuer.cert.clone();
        Ok(Self {
            ca_file: write(&folder, "ca.pem", &ca)?,
            ca,
            server: issuer.issue(&folder, "server", "server", &here)?,
            misnamed: issuer.issue(&folder, "misnamed", "server", &elsewhere)?,
            client: issuer.issue(&folder, "client", "client", &[])?,
            stranger: other.issue(&folder, "stranger", "client", &[])?,
            issuer,
            folder,
        })
    }

    /// Another client of the same authority, by its common name.
    ///
    /// # Errors
    /// The files could not be written.
    pub fn client_named(&self, name: &str) -> Result<Identity> {
        self.issuer.issue(&self.folder, &format!("client-{name}"), name, &[])
    }
}

struct Authority {
    cert: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(failed)?;
        let cert = params.self_signed(&key).map_err(failed)?.pem();
        Ok(Self { cert, issuer: Issuer::new(params, key) })
    }

    /// For servers and clients alike: a server of a cluster, or with a gateway inside, is its own client.
    fn issue(&self, folder: &TempDir, file: &str, name: &str, at: &[SanType]) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = at.to_vec();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(failed)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(failed)?.pem();
        let key = key.serialize_pem();
        Ok(Identity {
            cert_file: write(folder, &format!("{file}.pem"), &cert)?,
            key_file: write(folder, &format!("{file}.key"), &key)?,
            cert,
            key,
        })
    }
}

fn write(folder: &TempDir, name: &str, text: &str) -> Result<String> {
    let file = folder.path().join(name);
    std::fs::write(&file, text).map_err(Error::during(file.display()))?;
    Ok(file.display().to_string())
}

fn failed(error: rcgen::Error) -> Error {
    Error::new(format!("cannot make a certificate: {error}"))
}
