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
            write_event(&mut event, Some("response.failed"), &response_failed(rejection, sequence));
        }
        Dialect::Anthropic => write_event(&mut event, Some("error"), &error_json(dialect, rejection)),
        Dialect::OpenAi | Dialect::Kserve | Dialect::LlamaCpp | Dialect::Tgi => {
            write_event(&mut event, None, &error_json(dialect, rejection));
        }
    }
    event.into()
}

fn error_json(dialect: Dialect, rejection: &Rejection<'_>) -> Vec<u8> {
    let mut json = Object::new();
    match dialect {
        Dialect::Anthropic => {
            json.string("type", "error").begin("error");
            json.string("type", anthropic_type(rejection.status));
            json.string("message", &rejection.message).string("code", rejection.code);
            json.number("attempts", rejection.attempts.into()).end();
            json.string("request_id", rejection.request_id);
        }
        Dialect::Kserve | Dialect::Ollama => {
            json.string("error", &rejection.message).string("code", rejection.code);
            json.string("request_id", rejection.request_id).number("attempts", rejection.attempts.into());
        }
        Dialect::Tgi => {
            json.string("error", &rejection.message).string("error_type", tgi_type(rejection.status));
            json.string("code", rejection.code).string("request_id", rejection.request_id);
            json.number("attempts", rejection.attempts.into());
        }
        Dialect::LlamaCpp => {
            json.begin("error").number("code", rejection.status.as_u16().into());
            json.string("message", &rejection.message).string("type", openai_type(rejection.status));
            json.string("reason", rejection.code).string("request_id", rejection.request_id);
            json.number("attempts", rejection.attempts.into()).end();
        }
        Dialect::OpenAi | Dialect::Grpc | Dialect::Plain => {
            json.begin("error").string("message", &rejection.message);
            json.string("type", openai_type(rejection.status));
            match rejection.param {
                Some(param) => json.string("param", param),
                None => json.null("param"),
            };
            json.string("code", rejection.code).string("request_id", rejection.request_id);
            json.number("attempts", rejection.attempts.into()).end();
        }
    }
    json.finish()
}

/// The id of the response is not known here, and the client needs none to see that it failed.
fn response_failed(rejection: &Rejection<'_>, sequence: u64) -> Vec<u8> {
    let mut json = Object::new();
    json.string("type", "response.failed").number("sequence_number", sequence);
    json.begin("response").string("id", &format!("resp_{}", rejection.request_id));
    json.string("object", "response").string("status", "failed");
    json.begin("error").string("code", rejection.code).string("message", &rejection.message).end();
    json.null("incomplete_details").end();
    json.finish()
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

/// A JSON object being written, with others inside it; commas are put where they belong.
struct Object {
    out: Vec<u8>,
}

impl Object {
    fn new() -> Self {
        let mut out = Vec::with_capacity(192);
        out.push(b'{');
        Self { out }
    }

    fn finish(mut self) -> Vec<u8> {
        self.end();
        self.out
    }

    fn begin(&mut self, name: &str) -> &mut Self {
        self.name(name);
        self.out.push(b'{');
        self
    }

    fn end(&mut self) -> &mut Self {
        self.out.push(b'}');
        self
    }

    fn name(&mut self, name: &str) {
        if !self.out.ends_with(b"{") {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::dialect::{ErrorClass, classify_error_body, read_event};
    use crate::sse::{Decoder, Lines};
    use serde_json::{Value, json};
    use std::ops::ControlFlow;

    const DIALECTS: [(Dialect, Endpoint); 7] = [
        (Dialect::OpenAi, Endpoint::ChatCompletions),
        (Dialect::OpenAi, Endpoint::Responses),
        (Dialect::Anthropic, Endpoint::AnthropicMessages),
        (Dialect::Kserve, Endpoint::KserveGenerateStream),
        (Dialect::Ollama, Endpoint::OllamaChat),
        (Dialect::LlamaCpp, Endpoint::LlamaCompletion),
        (Dialect::Tgi, Endpoint::GenerateStream),
    ];

    fn lost(message: &str) -> Rejection<'_> {
        Rejection {
            status: StatusCode::BAD_GATEWAY,
            code: "replica_lost",
            message: message.into(),
            request_id: "req-1",
            attempts: 2,
            param: None,
            retry_after: None,
        }
    }

    #[test]
    fn every_dialect_has_its_own_shape() {
        let body = |dialect| {
            let (kind, body) = error_body(dialect, &lost("gone"));
            assert_eq!(kind, "application/json");
            serde_json::from_slice::<Value>(&body).unwrap()
        };
        assert_eq!(
            body(Dialect::OpenAi),
            json!({"error": {"message": "gone", "type": "server_error", "param": null,
                "code": "replica_lost", "request_id": "req-1", "attempts": 2}})
        );
        assert_eq!(
            body(Dialect::Anthropic),
            json!({"type": "error", "error": {"type": "api_error", "message": "gone",
                "code": "replica_lost", "attempts": 2}, "request_id": "req-1"})
        );
        for dialect in [Dialect::Kserve, Dialect::Ollama] {
            assert_eq!(
                body(dialect),
                json!({"error": "gone", "code": "replica_lost", "request_id": "req-1", "attempts": 2})
            );
        }
        for dialect in [Dialect::LlamaCpp, Dialect::Tgi] {
            let text = body(dialect).to_string();
            assert!(text.contains("replica_lost") && text.contains("req-1"), "{text}");
        }
        assert_eq!(body(Dialect::LlamaCpp)["error"]["code"], json!(502));
        assert_eq!(body(Dialect::Tgi)["error_type"], json!("incomplete_generation"));
        assert_eq!(error_body(Dialect::Plain, &lost("gone")).1, b"replica_lost: gone\n");
        assert!(error_body(Dialect::Grpc, &lost("gone")).1.is_empty());
    }

    #[test]
    fn messages_cannot_break_out_of_their_dialect() {
        let message = "a \"quote\"\\, a\r\nline, a \u{1}, an \u{e9} and data: [DONE]\n\n";
        for (dialect, endpoint) in DIALECTS {
            let (_, body) = error_body(dialect, &lost(message));
            let text = serde_json::from_slice::<Value>(&body).unwrap();
            let error = &text["error"];
            assert_eq!(error.get("message").unwrap_or(error), message, "{dialect:?}");

            let event = error_event(dialect, endpoint, &lost(message), 7);
            let mut events = 0;
            let check = |read: crate::sse::Event<'_>| {
                events += 1;
                let facts = read_event(endpoint, &read).unwrap();
                assert_eq!(facts.error, Some(ErrorClass::ServerFault), "{dialect:?}");
                assert!(!facts.done && facts.finish.is_none(), "{dialect:?}");
                ControlFlow::Continue(())
            };
            let whole = if dialect == Dialect::Ollama {
                Lines::new(4096).feed(&event, check)
            } else {
                Decoder::new(4096).feed(&event, check)
            };
            assert_eq!(whole, Ok(event.len()), "{dialect:?}");
            assert_eq!(events, 1, "{dialect:?}");
        }
    }

    #[test]
    fn the_openai_event_is_as_documented() {
        let event = error_event(Dialect::OpenAi, Endpoint::ChatCompletions, &lost("gone"), 0);
        let text = std::str::from_utf8(&event).unwrap();
        assert!(text.starts_with(
            r#"data: {"error":{"message":"gone","type":"server_error","param":null,"code":"replica_lost""#
        ));
        assert!(text.ends_with("}}\n\n"));
    }

    #[test]
    fn a_failed_response_keeps_the_sequence() {
        let event = error_event(Dialect::OpenAi, Endpoint::Responses, &lost("gone"), 41);
        let text = std::str::from_utf8(&event).unwrap();
        let json = text.strip_prefix("event: response.failed\ndata: ").unwrap();
        let json: Value = serde_json::from_str(json).unwrap();
        assert_eq!(json["sequence_number"], 41);
        assert_eq!(json["response"]["status"], "failed");
        assert_eq!(json["response"]["error"]["code"], "replica_lost");
    }

    #[test]
    fn what_we_reject_for_overload_reads_as_overload() {
        for dialect in [Dialect::OpenAi, Dialect::Anthropic, Dialect::Tgi, Dialect::LlamaCpp] {
            let mut busy = lost("busy");
            busy.status = if dialect == Dialect::Anthropic {
                StatusCode::SERVICE_UNAVAILABLE
            } else {
                StatusCode::TOO_MANY_REQUESTS
            };
            let (_, body) = error_body(dialect, &busy);
            assert_eq!(classify_error_body(&body), ErrorClass::Overloaded, "{dialect:?}");
        }
    }

    #[test]
    fn the_type_of_an_error_is_the_one_its_client_library_looks_for() {
        let invalid = "invalid_request_error";
        for (status, openai, anthropic, tgi) in [
            (400, invalid, invalid, "validation"),
            (401, "authentication_error", "authentication_error", "validation"),
            (403, "permission_error", "permission_error", "validation"),
            (404, invalid, "not_found_error", "validation"),
            (413, invalid, "request_too_large", "validation"),
            (429, "rate_limit_error", "rate_limit_error", "overloaded"),
            (500, "server_error", "api_error", "incomplete_generation"),
            (503, "server_error", "overloaded_error", "overloaded"),
            (504, "server_error", "timeout_error", "incomplete_generation"),
        ] {
            let mut rejection = lost("x");
            rejection.status = StatusCode::from_u16(status).unwrap();
            let body = |dialect| serde_json::from_slice::<Value>(&error_body(dialect, &rejection).1).unwrap();
            assert_eq!(body(Dialect::OpenAi)["error"]["type"], openai, "{status}");
            assert_eq!(body(Dialect::LlamaCpp)["error"]["type"], openai, "{status}");
            assert_eq!(body(Dialect::Anthropic)["error"]["type"], anthropic, "{status}");
            assert_eq!(body(Dialect::Tgi)["error_type"], tgi, "{status}");
        }
    }
}
