//! One reading of the file: what it means, and a fingerprint to tell it from the one before.
//!
//! The fingerprint covers the text, the secrets it refers to and the content of the certificates and keys
//! it names, so a renewed certificate is a change although the file is the same. Fingerprints are only
//! compared within one process.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::config::{self, Change, Config, ConfigError, Source};

/// Content of named files, as hashes; none where one cannot be read.
pub(super) type FileHashes = BTreeMap<PathBuf, Option<u64>>;

/// What was read.
pub(super) struct Reading {
    /// Equal for equal content.
    pub(super) fingerprint: u64,
    /// What the file means, or all that is wrong with it and the files it names.
    pub(super) outcome: Result<Config, Vec<ConfigError>>,
    /// Content of the files it names.
    pub(super) files: FileHashes,
    missing: bool,
}

impl Reading {
    /// Reads on a thread that may block.
    pub(super) async fn of(source: &Source) -> Self {
        let source = source.clone();
        let path = source.path.display().to_string();
        tokio::task::spawn_blocking(move || Self::now(&source)).await.unwrap_or_else(|defect| {
            // A panic of ours is told as an error of the file rather than ending whoever looks at files.
            let problem = format!("cannot be read, by a defect of evergate: {defect}");
            let (value, right) = (None, String::new());
            let error = ConfigError { origin: path, line: None, key: String::new(), problem, value, right };
            Self { fingerprint: 0, outcome: Err(vec![error]), files: FileHashes::new(), missing: false }
        })
    }

    fn now(source: &Source) -> Self {
        let mut hasher = DefaultHasher::new();
        let (outcome, missing) = match std::fs::read_to_string(&source.path) {
            Ok(text) => {
                text.hash(&mut hasher);
                (source.parse(&text), false)
            }
            // Says why in the words of any other start.
            Err(error) => (source.load(), error.kind() == std::io::ErrorKind::NotFound),
        };
        let outcome = outcome.map_err(|errors| errors.iter().cloned().collect::<Vec<_>>());
        let files = outcome.as_ref().map(hash_files).unwrap_or_default();
        files.hash(&mut hasher);
        let outcome = outcome.and_then(|config| match config.check_files() {
            wrong if wrong.is_empty() => Ok(config),
            wrong => Err(wrong),
        });
        match &outcome {
            Ok(config) => hash_secrets(config, &mut hasher),
            Err(errors) => errors.iter().for_each(|error| error.to_string().hash(&mut hasher)),
        }
        Self { fingerprint: hasher.finish(), outcome, files, missing }
    }

    /// The file is not there.
    pub(super) fn is_missing(&self) -> bool {
        self.missing
    }

    /// Files whose content is another than `before`. A file that is newly named is no such change: the key
    /// that names it is.
    pub(super) fn changed_files(&self, before: &FileHashes) -> Vec<Change> {
        let Ok(config) = &self.outcome else { return Vec::new() };
        let differs = |path: &Path| before.get(path).is_some_and(|old| Some(old) != self.files.get(path));
        config
            .named_files()
            .into_iter()
            .filter(|(_, path)| differs(path))
            .map(|(key, path)| Change::FileContent { key, path })
            .collect()
    }
}

/// Content of the files `config` names.
pub(super) fn hash_files(config: &Config) -> FileHashes {
    let hash = |path: &Path| {
        let bytes = std::fs::read(path).ok()?;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        Some(hasher.finish())
    };
    config.named_files().into_iter().map(|(_, path)| (path.clone(), hash(&path))).collect()
}

/// Secrets may stand in files of their own, which the text only points to.
fn hash_secrets(config: &Config, hasher: &mut DefaultHasher) {
    config.admin.token.as_ref().map(config::Secret::expose).hash(hasher);
    for backend in config.pools.iter().flat_map(|pool| &pool.backends) {
        backend.headers.iter().for_each(|(_, value)| value.as_bytes().hash(hasher));
    }
}
