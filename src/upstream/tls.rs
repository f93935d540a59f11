//! TLS towards backends: which authorities are believed, which certificate is shown, what ALPN offers.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::TlsConnector;

use crate::config::{UpstreamHttp, UpstreamTls};

/// How TLS is spoken to the backends of a pool.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    /// Offers HTTP/1.1 alone.
    http1: TlsConnector,
    server_name: Option<String>,
}

impl Tls {
    /// Reads the files named and builds the client configuration.
    ///
    /// # Errors
    /// The operator's: a file that cannot be read, holds no certificate, or a key that does not fit.
    pub fn new(tls: &UpstreamTls, http: UpstreamHttp) -> io::Result<Self> {
        let roots = match &tls.ca {
            Some(path) => private_roots(path)?,
            None => public_roots(),
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots);
        let mut config = match &tls.client {
            Some((certificate, key)) => builder
                .with_client_auth_cert(read_certificates(certificate)?, read_key(key)?)
                .map_err(|e| io::Error::other(format!("{}: {e}", certificate.display())))?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let http1 = TlsConnector::from(Arc::new(config.clone()));
        config.alpn_protocols = match http {
            UpstreamHttp::Auto => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            UpstreamHttp::Http1 => vec![b"http/1.1".to_vec()],
            UpstreamHttp::Http2 => vec![b"h2".to_vec()],
        };
        let connector = TlsConnector::from(Arc::new(config));
        Ok(Self { connector, http1, server_name: tls.server_name.clone() })
    }

    /// The connector and the name to ask `host` for. An `upgradable` connection is never HTTP/2, which has
    /// no such switch.
    ///
    /// # Errors
    /// When the name is no valid server name.
    pub(super) fn for_host(
        &self,
        host: &str,
        upgradable: bool,
    ) -> io::Result<(&TlsConnector, ServerName<'static>)> {
        let name = self.server_name.as_deref().unwrap_or(host);
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let server = ServerName::try_from(name.to_owned())
            .map_err(|_| io::Error::other(format!("{name} is not a valid server name")))?;
        Ok((if upgradable { &self.http1 } else { &self.connector }, server))
    }
}

/// Certificates of a PEM file, leaf first.
///
/// # Errors
/// When the file cannot be read or holds none.
pub fn read_certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let pem = fs::read(path).map_err(|e| named(path, &e))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(io::Error::other(format!("{}: no certificate in this PEM file", path.display()))),
        Err(e) => Err(named(path, &e)),
    }
}

/// The private key of a PEM file.
///
/// # Errors
/// When the file cannot be read or holds none.
pub fn read_key(path: &Path) -> io::Result<PrivateKeyDer<'static>> {
    let pem = fs::read(path).map_err(|e| named(path, &e))?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|e| named(path, &e))
}

fn private_roots(path: &Path) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|e| named(path, &e))?;
    }
    Ok(roots)
}

/// The machine's own authorities and, where it has none (a scratch container), Mozilla's.
fn public_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(native.certs);
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}

fn named(path: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}
