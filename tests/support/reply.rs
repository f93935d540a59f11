//! What a scripted backend does, step by step, and the usual replies put together from such steps.
//!
//! A reply is a `Vec<Step>`, so that a test can take a healthy one and spoil it: cut it after some
//! events, stall inside it, send the head a byte at a time.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::backend::RequestSeen;
use super::hash;

/// One thing a backend does on a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Reads one request head and records it. Scripts by request have this done for them.
    ReadHead,
    /// Reads the body of the head read last. Scripts by request have this done for them.
    ReadBody,
    /// Writes these bytes, in one write where the socket takes them.
    Send(Bytes),
    /// Writes `piece` bytes at a time, `every` so often.
    SendSlow { bytes: Bytes, piece: usize, every: Duration },
    /// Waits, reading nothing.
    Delay(Duration),
    /// Does nothing and reads nothing until the peer closes; then the connection is over.
    Stall,
    /// Closes the connection with FIN. What the peer sends afterwards is answered with RST.
    Fin,
    /// Ends the sending side only (FIN) and reads on until the peer closes.
    HalfClose,
    /// Resets the connection.
    Rst,
    /// Closes the listener: further connections are refused, this one lives on.
    CloseListener,
    /// Death of the process: see [`Backend::stop`](super::backend::Backend::stop).
    Die,
}

impl Step {
    pub fn send(bytes: impl Into<Bytes>) -> Self {
        Self::Send(bytes.into())
    }
}

/// Puts further steps behind a reply.
pub trait Then {
    fn then(self, step: Step) -> Self;
}

impl Then for Vec<Step> {
    fn then(mut self, step: Step) -> Self {
        self.push(step);
        self
    }
}

/// A whole reply with a `Content-Length`.
pub fn body(status: u16, content_type: &str, body: impl Into<Bytes>) -> Vec<Step> {
    with_headers(status, &[("content-type", content_type)], body)
}

/// A whole reply with these headers and a `Content-Length`.
pub fn with_headers(status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Vec<Step> {
    let body = body.into();
    let length = body.len().to_string();
    let mut headers = headers.to_vec();
    headers.push(("content-length", &length));
    let mut bytes = head(status, &headers).to_vec();
    bytes.extend_from_slice(&body);
    vec![Step::send(bytes)]
}

/// A JSON reply.
pub fn json(status: u16, value: &Value) -> Vec<Step> {
    body(status, "application/json", value.to_string())
}

/// A status with an OpenAI-style error body.
pub fn error(status: u16) -> Vec<Step> {
    json(
        status,
        &json!({"error": {"message": "scripted", "type": "server_error", "param": null, "code": status}}),
    )
}

/// 503 with `Retry-After`.
pub fn busy(retry_after_seconds: u32) -> Vec<Step> {
    let after = retry_after_seconds.to_string();
    with_headers(503, &[("retry-after", &after)], r#"{"error":{"message":"busy","code":503}}"#)
}

/// A response head on the wire.
pub fn head(status: u16, headers: &[(&str, &str)]) -> Bytes {
    let reason = http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    let mut head = format!("HTTP/1.1 {status} {}\r\n", reason.unwrap_or("Unknown"));
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    (head + "\r\n").into()
}

/// One chunk of a chunked body.
pub fn chunk(bytes: impl AsRef<[u8]>) -> Step {
    let bytes = bytes.as_ref();
    let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
    chunk.extend_from_slice(bytes);
    chunk.extend_from_slice(b"\r\n");
    Step::send(chunk)
}

/// The end of a chunked body.
pub fn last_chunk() -> Step {
    Step::Send(Bytes::from_static(b"0\r\n\r\n"))
}

/// Head of an event stream, chunked.
pub fn sse_head() -> Step {
    Step::Send(head(200, &[("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]))
}

/// An event stream that is begun and neither ended nor closed: what comes next says how it goes on.
pub fn sse_open<E: AsRef<[u8]>>(events: &[E]) -> Vec<Step> {
    std::iter::once(sse_head()).chain(events.iter().map(chunk)).collect()
}

/// A whole event stream, one chunk an event.
pub fn sse<E: AsRef<[u8]>>(events: &[E]) -> Vec<Step> {
    sse_open(events).then(last_chunk())
}

/// A whole event stream with a pause before each event.
pub fn sse_paced<E: AsRef<[u8]>>(events: &[E], gap: Duration) -> Vec<Step> {
    let mut steps = vec![sse_head()];
    for event in events {
        steps.extend([Step::Delay(gap), chunk(event)]);
    }
    steps.then(last_chunk())
}

/// An answer in tokens, the same from every scripted backend.
#[derive(Clone, Debug)]
pub struct Talk {
    pub model: String,
    pub tokens: Vec<String>,
    /// Before each event after the head.
    pub gap: Duration,
}

impl Default for Talk {
    fn default() -> Self {
        Self::of(8)
    }
}

impl Talk {
    /// `count` tokens: "one two three …" by number, all different.
    pub fn of(count: usize) -> Self {
        let tokens = (0..count).map(|nth| if nth == 0 { "t0".to_owned() } else { format!(" t{nth}") });
        Self { model: "test-model".to_owned(), tokens: tokens.collect(), gap: Duration::ZERO }
    }

    pub fn gap(mut self, gap: Duration) -> Self {
        self.gap = gap;
        self
    }

    pub fn text(&self) -> String {
        self.tokens.concat()
    }

    /// The whole chat as events: role, a chunk a token, finish, usage if asked, `[DONE]`.
    pub fn chat_events(&self, usage: bool) -> Vec<String> {
        let event = |choices: Value, usage: Value| {
            let mut chunk = json!({
                "id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 1_780_000_000,
                "model": self.model, "choices": choices,
            });
            if !usage.is_null() {
                chunk["usage"] = usage;
            }
            format!("data: {chunk}\n\n")
        };
        let choice =
            |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "finish_reason": finish}]);
        let mut events =
            vec![event(choice(json!({"role": "assistant", "content": ""}), Value::Null), Value::Null)];
        events.extend(
            self.tokens
                .iter()
                .map(|token| event(choice(json!({"content": token}), Value::Null), Value::Null)),
        );
        events.push(event(choice(json!({}), json!("stop")), Value::Null));
        if usage {
            events.push(event(json!([]), self.usage()));
        }
        events.push("data: [DONE]\n\n".to_owned());
        events
    }

    /// Role and the first `tokens` tokens of the chat: what a backend sent before something happened.
    pub fn chat_events_begun(&self, tokens: usize) -> Vec<String> {
        self.chat_events(false).into_iter().take(tokens + 1).collect()
    }

    /// The chat, as `request` asked for it.
    pub fn chat(&self, request: &RequestSeen) -> Vec<Step> {
        let asked = request.json();
        if asked["stream"] == true {
            let events = self.chat_events(asked["stream_options"]["include_usage"] == true);
            return if self.gap.is_zero() { sse(&events) } else { sse_paced(&events, self.gap) };
        }
        json(
            200,
            &json!({
                "id": "chatcmpl-scripted", "object": "chat.completion", "created": 1_780_000_000,
                "model": self.model,
                "choices": [{
                    "index": 0, "message": {"role": "assistant", "content": self.text()}, "finish_reason": "stop",
                }],
                "usage": self.usage(),
            }),
        )
    }

    fn usage(&self) -> Value {
        let said = self.tokens.len();
        json!({"prompt_tokens": 4, "completion_tokens": said, "total_tokens": said + 4})
    }
}

/// What a healthy replica answers: health, models, chat, embeddings; anything else is [`echo`]ed.
pub fn healthy(request: &RequestSeen, talk: &Talk) -> Vec<Step> {
    match request.path() {
        "/health" => json(200, &json!({"status": "ok"})),
        "/v1/models" => json(
            200,
            &json!({"object": "list", "data": [{"id": talk.model, "object": "model", "owned_by": "test"}]}),
        ),
        "/v1/chat/completions" => talk.chat(request),
        "/v1/embeddings" => json(
            200,
            &json!({
                "object": "list", "model": talk.model,
                "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}],
                "usage": {"prompt_tokens": 4, "total_tokens": 4},
            }),
        ),
        _ => echo(request),
    }
}

/// The request as the backend saw it: method, target, headers in order, length and [`hash`] of the body.
pub fn echo(request: &RequestSeen) -> Vec<Step> {
    json(
        200,
        &json!({
            "method": request.method,
            "target": request.target,
            "headers": request.headers,
            "body_length": request.body.len(),
            "body_hash": hash(&request.body),
        }),
    )
}
