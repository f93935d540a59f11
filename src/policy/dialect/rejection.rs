//! Errors that evergate makes itself, in the words of the client's dialect.
//!
//! A client library must find what it looks for: the official ones map `error.type` and the status to
//! their exception classes. Beside that, `code` (or `error_type`) is stable for programs and the id of the
//! exchange leads to the logs. A terminal event is followed by the end of the body, with no finish reason
//! and no `[DONE]`: a client that overlooks the error must not take a cut answer for a whole one.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;

use super::{Dialect, Endpoint};
use crate::policy::json::write_string;
use crate::sse::write_event;

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

/// The body of an error answer, and its content type. Empty for gRPC, whose status travels in the
/// trailers (see [`grpc_status`](super::grpc_status)).
pub fn error_body(dialect: Dialect, rejection: &Rejection<'_>) -> (&'static str, Vec<u8>) {
    const JSON: &str = "application/json";
    match dialect {
        Dialect::Grpc => ("application/grpc", Vec::new()),
        Dialect::Plain => {
            ("text/plain; charset=utf-8", format!("{}: {}\n", rejection.code, rejection.message).into_bytes())
        }
        Dialect::OpenAi
        | Dialect::Anthropic
        | Dialect::Kserve
        | Dialect::Ollama
        | Dialect::LlamaCpp
        | Dialect::Tgi => (JSON, error_json(dialect, rejection)),
    }
}

/// The one terminal error event of a stream that cannot go on; empty where the dialect has none (gRPC:
/// trailers; plain: the connection is cut).
///
/// `sequence` is the next `sequence_number` of a Responses stream; others ignore it.
pub fn error_event(dialect: Dialect, endpoint: Endpoint, rejection: &Rejection<'_>, sequence: u64) -> Bytes {
    let mut event = Vec::with_capacity(256);
    match dialect {
        Dialect::Grpc | Dialect::Plain => {}
        Dialect::Ollama => {
            event = error_json(dialect, rejection);
            event.push(b'\n');
        }
        Dialect::OpenAi if endpoint == Endpoint::Responses => {
            let json = response_failed(rejection, sequence);
            write_event(&mut event, Some("response.failed"), &json);
        }
        Dialect::Anthropic => write_event(&mut event, Some("error"), &error_json(dialect, rejection)),
        Dialect::OpenAi | Dialect::Kserve | Dialect::LlamaCpp | Dialect::Tgi => {
            write_event(&mut event, None, &error_json(dialect, rejection));
        }
    }
    event.into()
}

fn error_json(dialect: Dialect, rejection: &Rejection<'_>) -> Vec<u8> {
    let mut json = Json::new();
    match dialect {
        Dialect::Anthropic => {
            json.open("{").string("type", "error");
            json.open(",\"error\":{").string("type", anthropic_type(rejection.status));
            json.string("message", &rejection.message).string("code", rejection.code);
            json.close().string("request_id", rejection.request_id);
        }
        Dialect::Kserve | Dialect::Ollama => {
            json.open("{").string("error", &rejection.message);
        }
        Dialect::Tgi => {
            json.open("{").string("error", &rejection.message);
            json.string("error_type", tgi_type(rejection.status)).string("code", rejection.code);
        }
        Dialect::LlamaCpp => {
            json.open("{").open("\"error\":{").number("code", rejection.status.as_u16().into());
            json.string("message", &rejection.message).string("type", openai_type(rejection.status));
            json.string("reason", rejection.code).string("request_id", rejection.request_id);
            json.close();
        }
        Dialect::OpenAi | Dialect::Grpc | Dialect::Plain => {
            json.open("{").open("\"error\":{").string("message", &rejection.message);
            json.string("type", openai_type(rejection.status));
            match rejection.param {
                Some(param) => json.string("param", param),
                None => json.null("param"),
            };
            json.string("code", rejection.code).string("request_id", rejection.request_id);
            json.number("attempts", rejection.attempts.into()).close();
        }
    }
    json.close();
    json.out
}

/// The id of the response is not known here, and the client needs none to see that it failed.
fn response_failed(rejection: &Rejection<'_>, sequence: u64) -> Vec<u8> {
    let mut json = Json::new();
    json.open("{").string("type", "response.failed").number("sequence_number", sequence);
    json.open(",\"response\":{").string("id", &format!("resp_{}", rejection.request_id));
    json.string("object", "response").string("status", "failed");
    json.open(",\"error\":{").string("code", rejection.code).string("message", &rejection.message).close();
    json.open(",\"output\":[").close_with(b']').null("incomplete_details");
    json.close().close();
    json.out
}

fn openai_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        _ => "api_error",
    }
}

fn tgi_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        429 | 503 => "overloaded",
        400..=499 => "validation",
        _ => "incomplete_generation",
    }
}

/// A JSON object being written; commas are put where they belong.
struct Json {
    out: Vec<u8>,
}

impl Json {
    fn new() -> Self {
        Self { out: Vec::with_capacity(192) }
    }

    fn open(&mut self, text: &str) -> &mut Self {
        self.out.extend_from_slice(text.as_bytes());
        self
    }

    fn close(&mut self) -> &mut Self {
        self.close_with(b'}')
    }

    fn close_with(&mut self, bracket: u8) -> &mut Self {
        self.out.push(bracket);
        self
    }

    fn name(&mut self, name: &str) {
        if !matches!(self.out.last(), Some(b'{')) {
            self.out.push(b',');
        }
        write_string(&mut self.out, name);
        self.out.push(b':');
    }

    fn string(&mut self, name: &str, value: &str) -> &mut Self {
        self.name(name);
        write_string(&mut self.out, value);
        self
    }

    fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.name(name);
        self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
        self
    }

    fn null(&mut self, name: &str) -> &mut Self {
        self.name(name);
        self.out.extend_from_slice(b"null");
        self
    }
}
