//! What is wrong with a configuration, for the person who wrote it.
//!
//! Every error stands alone on one line: where, which key, what is wrong, the value, what would be
//! right. Invariant: no secret is ever part of one (`file` masks values before they come here).

use std::fmt;

use serde::Serialize;

/// One mistake in a configuration. `Display` is one line, lowercase, without a full stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigError {
    /// The file, or `command line`.
    pub origin: String,
    /// Counted from 1; none where there is no text (flags, files named by a configuration).
    pub line: Option<usize>,
    /// Key path such as `pool[0].backends[1].weight`; empty for the whole file.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// The value as written, shortened; none where it is secret or there is none.
    pub value: Option<String>,
    /// What would be right; may be empty.
    pub right: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        f.write_str(": ")?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)?;
        if let Some(value) = &self.value {
            write!(f, " ({value})")?;
        }
        if !self.right.is_empty() {
            write!(f, "; {}", self.right)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Every mistake of a configuration, in the order of its lines; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    errors: Vec<ConfigError>,
}

impl ConfigErrors {
    /// Sorts by line, drops repetitions. None when there is nothing wrong.
    pub(super) fn new(mut errors: Vec<ConfigError>) -> Option<Self> {
        errors.sort_by_key(|error| error.line);
        errors.dedup();
        (!errors.is_empty()).then_some(Self { errors })
    }

    /// A single mistake.
    pub(super) fn one(error: ConfigError) -> Self {
        Self { errors: vec![error] }
    }

    /// The mistakes, in the order of their lines.
    pub fn iter(&self) -> std::slice::Iter<'_, ConfigError> {
        self.errors.iter()
    }
}

impl<'a> IntoIterator for &'a ConfigErrors {
    type Item = &'a ConfigError;
    type IntoIter = std::slice::Iter<'a, ConfigError>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// One line an error, then a line that counts them.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for error in &self.errors {
            writeln!(f, "{error}")?;
        }
        match self.errors.as_slice() {
            [only] => write!(f, "1 error in {}", only.origin),
            [first, ..] => write!(f, "{} errors in {}", self.errors.len(), first.origin),
            [] => Ok(()),
        }
    }
}

impl std::error::Error for ConfigErrors {}
