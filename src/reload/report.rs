//! How a reload ended: what `/status` shows and `POST /reload` answers.

use std::time::SystemTime;

use serde::{Serialize, Serializer};

use crate::config::ConfigError;
use crate::telemetry::events::rfc3339;

/// What asked for a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// The file system told of a change.
    FileEvent,
    /// The regular look at the file found a change.
    FileCheck,
    /// SIGHUP.
    Signal,
    /// `POST /reload`.
    Request,
}

/// The end of one reload.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// In force afterwards.
    pub generation: u64,
    /// When it ended.
    #[serde(serialize_with = "as_rfc3339")]
    pub at: SystemTime,
    /// What asked for it.
    pub trigger: Trigger,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What the file says and only a restart will bring, one line each.
    pub needs_restart: Vec<String>,
}

/// What became of a reload.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// In force.
    Applied {
        /// One line each.
        changes: Vec<String>,
        /// Backends that are new.
        added: usize,
        /// Backends that are gone and finish what they have.
        removed: usize,
    },
    /// The file says what is in force already.
    Unchanged,
    /// Nothing was changed.
    Refused {
        /// All of them; at least one.
        errors: Vec<ConfigError>,
        /// The same for people, one line each.
        text: String,
    },
}

impl Report {
    /// Whether the file was refused.
    pub fn is_refused(&self) -> bool {
        matches!(self.outcome, Outcome::Refused { .. })
    }
}

fn as_rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&rfc3339(*time))
}
