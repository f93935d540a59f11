//! Answers in one piece.

use std::fmt;

use http::StatusCode;

use super::{Endpoint, ErrorClass, Finish};
use crate::policy::json::JsonError;

/// Why an answer must not reach the client (F13, F24).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadAnswer {
    /// No body where there must be one.
    Empty,
    /// Not one JSON text.
    Json(JsonError),
    /// NaN, infinity or null among the numbers of a vector or a score.
    NotFinite,
    /// A member without which it is no answer.
    Missing(&'static str),
    /// An error under a status of success.
    Error(ErrorClass),
    /// A choice that was cut off (`abort`, `error`): looks whole and is not.
    Unfinished(Finish),
}

impl fmt::Display for BadAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("empty answer"),
            Self::Json(fault) => write!(f, "answer: {fault}"),
            Self::NotFinite => f.write_str("answer with numbers that are not finite"),
            Self::Missing(member) => write!(f, "answer without `{member}`"),
            Self::Error(_) => f.write_str("error under a status of success"),
            Self::Unfinished(_) => f.write_str("answer of an aborted generation"),
        }
    }
}

impl std::error::Error for BadAnswer {}

/// Judges a whole answer of `endpoint`. Only answers of success (2xx) are judged; others are what
/// they say.
pub fn check_answer(_endpoint: Endpoint, _status: StatusCode, _body: &[u8]) -> Result<(), BadAnswer> {
    Ok(())
}
