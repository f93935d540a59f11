//! TLS towards clients: certificate and key from files, ALPN h2 and http/1.1.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem};

use crate::config::ListenerTls;

/// Protocols offered, the preferred first. HTTP/2 first, as every client that offers it prefers it.
const ALPN: [&[u8]; 2] = [H2, b"http/1.1"];
pub(super) const H2: &[u8] = b"h2";

/// Reads certificate and key and sees whether they belong together, without using them: for `evergate check`
/// and before a reload is applied. The error names the file at fault. Blocking.
pub fn check(tls: &ListenerTls) -> io::Result<()> {
    load(tls).map(drop)
}

/// Certificate and key as rustls wants them. Blocking.
pub(super) fn load(tls: &ListenerTls) -> io::Result<Arc<ServerConfig>> {
    let certificate = tls.certificate.as_path();
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unreadable("certificate", certificate, error))?;
    if chain.is_empty() {
        return Err(unreadable("certificate", certificate, pem::Error::NoItemsFound));
    }
    let key =
        PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| unreadable("private key", &tls.key, error))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| mismatch(tls, &error))?;
    config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
    // Tickets instead of a cache behind a lock that all workers would share.
    config.ticketer = ring::Ticketer::new().map_err(|error| mismatch(tls, &error))?;
    Ok(Arc::new(config))
}

fn unreadable(what: &str, file: &Path, error: pem::Error) -> io::Error {
    let kind = match &error {
        pem::Error::Io(error) => error.kind(),
        _ => io::ErrorKind::InvalidData,
    };
    let reason = match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => format!("no {what} in it"),
        other => other.to_string(),
    };
    io::Error::new(kind, format!("{what} {}: {reason}", file.display()))
}

fn mismatch(tls: &ListenerTls, error: &rustls::Error) -> io::Error {
    let (certificate, key) = (tls.certificate.display(), tls.key.display());
    io::Error::new(io::ErrorKind::InvalidData, format!("certificate {certificate} with key {key}: {error}"))
}
