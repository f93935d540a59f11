//! Certificates for TLS tests, made anew each time: one authority, and servers with the good and the
//! bad ones it could have signed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;

/// What is wrong with a server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// Signed by the authority, for `localhost` and 127.0.0.1.
    Good,
    Expired,
    NotYetValid,
    /// For `elsewhere.example`.
    WrongName,
    /// Signed by an authority nobody was told of.
    UnknownIssuer,
}

/// A private authority, with its files in a directory that ends with it.
pub struct Authority {
    directory: TempDir,
    certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "evergate test authority");
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { directory, certificate, issuer: Issuer::new(params, key) }
    }

    /// PEM file of the authority, for `pool.tls.ca`.
    pub fn ca_path(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A server's certificate and key; ALPN offers `alpn` in that order.
    pub fn server(&self, certificate: Certificate, alpn: &[&str]) -> ServerTls {
        let names = match certificate {
            Certificate::WrongName => vec!["elsewhere.example".to_owned()],
            _ => vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
        };
        let mut params = CertificateParams::new(names).unwrap();
        (params.not_before, params.not_after) = match certificate {
            Certificate::Expired => (date_time_ymd(2000, 1, 1), date_time_ymd(2001, 1, 1)),
            Certificate::NotYetValid => (date_time_ymd(2999, 1, 1), date_time_ymd(3000, 1, 1)),
            _ => (date_time_ymd(2000, 1, 1), date_time_ymd(3000, 1, 1)),
        };
        let key = KeyPair::generate().unwrap();
        let stranger;
        let issuer = if certificate == Certificate::UnknownIssuer {
            stranger = Self::new();
            &stranger.issuer
        } else {
            &self.issuer
        };
        let leaf = params.signed_by(&key, issuer).unwrap();
        // Several servers of one authority keep their files apart by the key's digest.
        let stem = super::hash(key.public_key_raw());
        let path = |suffix: &str| self.directory.path().join(format!("{stem}.{suffix}"));
        std::fs::write(path("crt.pem"), leaf.pem()).unwrap();
        std::fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        ServerTls {
            certificate_path: path("crt.pem"),
            key_path: path("key.pem"),
            alpn: alpn.iter().map(|name| name.as_bytes().to_vec()).collect(),
            clients: None,
        }
    }

    /// As [`server`](Self::server) with the good certificate, and clients must show one of this authority.
    pub fn server_for_known_clients(&self, alpn: &[&str]) -> ServerTls {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        ServerTls { clients: Some(Arc::new(roots)), ..self.server(Certificate::Good, alpn) }
    }

    /// A client's configuration that trusts this authority alone.
    pub fn client(&self, alpn: &[&str]) -> Arc<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

/// A server's certificate and key, as files and as an acceptor.
pub struct ServerTls {
    certificate_path: PathBuf,
    key_path: PathBuf,
    alpn: Vec<Vec<u8>>,
    /// Who signs the certificates clients must show.
    clients: Option<Arc<rustls::RootCertStore>>,
}

impl ServerTls {
    pub fn certificate_path(&self) -> &Path {
        &self.certificate_path
    }

    pub fn key_path(&self) -> &Path {
        &self.key_path
    }

    pub fn acceptor(&self) -> TlsAcceptor {
        let chain = CertificateDer::pem_file_iter(&self.certificate_path).unwrap();
        let key = PrivateKeyDer::from_pem_file(&self.key_path).unwrap();
        let builder = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match &self.clients {
            None => builder.with_no_client_auth(),
            Some(roots) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(roots.clone(), provider()).build().unwrap(),
            ),
        };
        let mut config = builder.with_single_cert(chain.map(Result::unwrap).collect(), key).unwrap();
        config.alpn_protocols = self.alpn.clone();
        TlsAcceptor::from(Arc::new(config))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
