//! Whether the files a configuration names are there and hold what they should.
//!
//! Apart from validation, because it depends on the machine: a configuration checked in CI is right
//! even where its certificates are not.

use std::path::{Path, PathBuf};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::error::ConfigError;
use super::{AccessLogTarget, Config};

impl Config {
    /// Every certificate and key named here, with its key path: what a change of content must be noticed in.
    pub fn named_files(&self) -> Vec<(String, PathBuf)> {
        let mut files = Vec::new();
        for (index, listener) in self.listeners.iter().enumerate() {
            if let Some(tls) = &listener.tls {
                files.push((format!("listener[{index}].tls.certificate"), tls.certificate.clone()));
                files.push((format!("listener[{index}].tls.key"), tls.key.clone()));
            }
        }
        for (index, pool) in self.pools.iter().enumerate() {
            if let Some(ca) = &pool.tls.ca {
                files.push((format!("pool[{index}].tls.ca"), ca.clone()));
            }
            if let Some((certificate, key)) = &pool.tls.client {
                files.push((format!("pool[{index}].tls.client_certificate"), certificate.clone()));
                files.push((format!("pool[{index}].tls.client_key"), key.clone()));
            }
        }
        files
    }

    /// Reads every certificate and key named here, and looks for the directory of the access log.
    /// Empty when all is well. The text's lines are not known any more; key paths are.
    pub fn check_files(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        for (index, tls) in self
            .listeners
            .iter()
            .enumerate()
            .filter_map(|(index, listener)| Some((index, listener.tls.as_ref()?)))
        {
            certificates(&mut errors, format!("listener[{index}].tls.certificate"), &tls.certificate);
            private_key(&mut errors, format!("listener[{index}].tls.key"), &tls.key);
        }
        for (index, pool) in self.pools.iter().enumerate() {
            if let Some(ca) = &pool.tls.ca {
                certificates(&mut errors, format!("pool[{index}].tls.ca"), ca);
            }
            if let Some((certificate, key)) = &pool.tls.client {
                certificates(&mut errors, format!("pool[{index}].tls.client_certificate"), certificate);
                private_key(&mut errors, format!("pool[{index}].tls.client_key"), key);
            }
        }
        if let AccessLogTarget::File(path) = &self.telemetry.access_log {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            if directory.is_some_and(|directory| !directory.is_dir()) {
                let problem = "its directory is not there".to_owned();
                errors.push(error(
                    "telemetry.access_log".to_owned(),
                    problem,
                    path,
                    "create it, or write another path",
                ));
            }
        }
        errors
    }
}

fn certificates(errors: &mut Vec<ConfigError>, key: String, path: &Path) {
    const RIGHT: &str = "name a PEM file with certificates, leaf first";
    let Some(pem) = read(errors, &key, path, RIGHT) else { return };
    let mut found = 0_usize;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        if let Err(problem) = certificate {
            errors.push(error(key, format!("is not readable as PEM: {problem}"), path, RIGHT));
            return;
        }
        found += 1;
    }
    if found == 0 {
        errors.push(error(key, "holds no certificate".to_owned(), path, RIGHT));
    }
}

fn private_key(errors: &mut Vec<ConfigError>, key: String, path: &Path) {
    const RIGHT: &str = "name a PEM file with a PKCS#8, PKCS#1 or SEC1 key";
    let Some(pem) = read(errors, &key, path, RIGHT) else { return };
    if PrivateKeyDer::from_pem_slice(&pem).is_err() {
        errors.push(error(key, "holds no private key".to_owned(), path, RIGHT));
    }
}

fn read(errors: &mut Vec<ConfigError>, key: &str, path: &Path, right: &str) -> Option<Vec<u8>> {
    match std::fs::read(path) {
        Ok(bytes) => Some(bytes),
        Err(problem) => {
            errors.push(error(key.to_owned(), format!("cannot be read: {problem}"), path, right));
            None
        }
    }
}

fn error(key: String, problem: String, path: &Path, right: &str) -> ConfigError {
    ConfigError {
        origin: "configured files".to_owned(),
        line: None,
        key,
        problem,
        value: Some(format!("{:?}", path.display().to_string())),
        right: right.to_owned(),
    }
}
