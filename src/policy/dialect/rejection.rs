//! Errors that evergate makes itself, in the words of the client's dialect.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;

use super::{Dialect, Endpoint};

/// What is to be told to the client.
#[derive(Clone, Debug)]
pub struct Rejection<'a> {
    /// Status of the answer; within a stream that has begun, the one it would have had.
    pub status: StatusCode,
    /// Stable, machine-readable cause: `replica_lost`, `no_backend_available`, `unknown_model`,
    /// `body_too_large`, `upload_timeout`, `invalid_request`, …
    pub code: &'static str,
    /// For people.
    pub message: Cow<'a, str>,
    /// The exchange's id, to find it in the logs.
    pub request_id: &'a str,
    /// Attempts made.
    pub attempts: u8,
    /// The request's member at fault.
    pub param: Option<&'a str>,
    /// When to try again; also a header (the caller's business).
    pub retry_after: Option<Duration>,
}

/// The body of an error answer, and its content type.
pub fn error_body(_dialect: Dialect, _rejection: &Rejection<'_>) -> (&'static str, Vec<u8>) {
    ("application/json", Vec::new())
}

/// The one terminal error event of a stream that cannot go on; empty where the dialect has none
/// (gRPC: trailers; plain: the connection is cut).
///
/// `sequence` is the next `sequence_number` of a Responses stream; others ignore it.
pub fn error_event(
    _dialect: Dialect,
    _endpoint: Endpoint,
    _rejection: &Rejection<'_>,
    _sequence: u64,
) -> Bytes {
    Bytes::new()
}
