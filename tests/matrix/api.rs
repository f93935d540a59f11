//! The endpoints of the matrix: what is asked, and the one answer each replica may give to it.
//!
//! A request carries a number, and a replica's answer is a function of that number and of the replica's
//! own. So whoever reads an answer can tell, byte for byte, whether it is whole, whether it is the answer
//! to this question, and whether all of it came from one replica.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::replica::Act;
use crate::support::client::{Answer, End, Request};

pub const MODEL: &str = "test-model";

/// Carries the number of a request where a replica can read it before the body.
pub const NUMBER: &str = "x-matrix-request";

/// A column of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    ChatStream,
    Chat,
    /// Text completions, streamed.
    Completions,
    Embeddings,
    /// Anthropic's messages, streamed.
    Messages,
    /// A unary gRPC call; over HTTP/2 only.
    Infer,
}

impl Endpoint {
    /// The columns every row has, unless it says otherwise.
    pub const JSON: [Self; 5] =
        [Self::ChatStream, Self::Chat, Self::Completions, Self::Embeddings, Self::Messages];

    pub fn name(self) -> &'static str {
        match self {
            Self::ChatStream => "chat stream",
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
            Self::Messages => "messages",
            Self::Infer => "gRPC",
        }
    }

    pub fn is_stream(self) -> bool {
        matches!(self, Self::ChatStream | Self::Completions | Self::Messages)
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::ChatStream | Self::Completions | Self::Messages => "text/event-stream",
            Self::Chat | Self::Embeddings => "application/json",
            Self::Infer => "application/grpc",
        }
    }

    /// Request number `number`, with `padding` bytes of prompt beside the question.
    pub fn request(self, number: usize, padding: usize) -> Request {
        let question = format!("request-{number};{}", "x".repeat(padding));
        let messages = json!([{"role": "user", "content": question}]);
        let (path, body) = match self {
            Self::ChatStream => (
                "/v1/chat/completions",
                json!({"model": MODEL, "messages": messages, "stream": true,
                    "stream_options": {"include_usage": true}}),
            ),
            Self::Chat => ("/v1/chat/completions", json!({"model": MODEL, "messages": messages})),
            Self::Completions => {
                ("/v1/completions", json!({"model": MODEL, "prompt": question, "stream": true}))
            }
            Self::Embeddings => ("/v1/embeddings", json!({"model": MODEL, "input": question})),
            Self::Messages => (
                "/v1/messages",
                json!({"model": MODEL, "messages": messages, "max_tokens": 100, "stream": true}),
            ),
            Self::Infer => {
                let request = Request::new("POST", "/inference.GRPCInferenceService/ModelInfer")
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .header("content-length", &question.len().to_string());
                return request.header(NUMBER, &number.to_string()).body(question);
            }
        };
        Request::post_json(path, &body).header(NUMBER, &number.to_string())
    }

    /// Which endpoint a replica was asked for.
    pub fn of(path: &str, body: &[u8]) -> Option<Self> {
        let streamed = || body.windows(13).any(|window| window == b"\"stream\":true");
        match path {
            "/v1/chat/completions" if streamed() => Some(Self::ChatStream),
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completions),
            "/v1/embeddings" => Some(Self::Embeddings),
            "/v1/messages" => Some(Self::Messages),
            "/inference.GRPCInferenceService/ModelInfer" => Some(Self::Infer),
            _ => None,
        }
    }

    /// The body replica `replica` answers request `number` with: an event a piece, or all in one.
    pub fn pieces(self, number: usize, replica: usize) -> Vec<String> {
        let tokens = tokens(number);
        let usage =
            json!({"prompt_tokens": 4, "completion_tokens": tokens.len(), "total_tokens": tokens.len() + 4});
        match self {
            Self::ChatStream => {
                let event = |choices: Value, usage: Option<&Value>| {
                    let mut chunk = json!({"id": format!("chatcmpl-{number}-at-{replica}"), "created": 1_780_000_000,
                        "object": "chat.completion.chunk", "model": MODEL, "choices": choices});
                    if let Some(usage) = usage {
                        chunk["usage"] = usage.clone();
                    }
                    format!("data: {chunk}\n\n")
                };
                let choice = |delta: Value, finish: Value| {
                    event(json!([{"index": 0, "delta": delta, "finish_reason": finish}]), None)
                };
                let mut events = vec![choice(json!({"role": "assistant", "content": ""}), Value::Null)];
                events.extend(tokens.iter().map(|token| choice(json!({"content": token}), Value::Null)));
                events.push(choice(json!({}), json!("stop")));
                events.push(event(json!([]), Some(&usage)));
                events.push("data: [DONE]\n\n".to_owned());
                events
            }
            Self::Chat => vec![
                json!({"id": format!("chatcmpl-{number}-at-{replica}"), "object": "chat.completion",
                    "created": 1_780_000_000, "model": MODEL, "usage": usage,
                    "choices": [{"index": 0, "finish_reason": "stop",
                        "message": {"role": "assistant", "content": tokens.concat()}}]})
                .to_string(),
            ],
            Self::Completions => {
                let event = |text: &str, finish: Value| {
                    let chunk = json!({"id": format!("cmpl-{number}-at-{replica}"), "object": "text_completion",
                        "created": 1_780_000_000, "model": MODEL,
                        "choices": [{"index": 0, "text": text, "finish_reason": finish}]});
                    format!("data: {chunk}\n\n")
                };
                let mut events: Vec<String> = tokens.iter().map(|token| event(token, Value::Null)).collect();
                events.push(event("", json!("stop")));
                events.push("data: [DONE]\n\n".to_owned());
                events
            }
            Self::Embeddings => {
                let vector: Vec<f64> = (0..16_u32).map(|nth| f64::from(nth) / 16.0).collect();
                vec![
                    json!({"id": format!("embd-{number}-at-{replica}"), "object": "list", "model": MODEL,
                        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
                        "usage": {"prompt_tokens": 4, "total_tokens": 4}})
                    .to_string(),
                ]
            }
            Self::Messages => {
                let event = |kind: &str, mut data: Value| {
                    data["type"] = json!(kind);
                    format!("event: {kind}\ndata: {data}\n\n")
                };
                let mut events = vec![
                    event(
                        "message_start",
                        json!({"message": {"id": format!("msg-{number}-at-{replica}"), "type": "message",
                            "role": "assistant", "model": MODEL, "content": [], "stop_reason": null,
                            "usage": {"input_tokens": 4, "output_tokens": 0}}}),
                    ),
                    event(
                        "content_block_start",
                        json!({"index": 0, "content_block": {"type": "text", "text": ""}}),
                    ),
                ];
                events.extend(tokens.iter().map(|token| {
                    let delta = json!({"index": 0, "delta": {"type": "text_delta", "text": token}});
                    event("content_block_delta", delta)
                }));
                events.push(event("content_block_stop", json!({"index": 0})));
                let usage = json!({"output_tokens": tokens.len()});
                let delta =
                    json!({"delta": {"stop_reason": "end_turn", "stop_sequence": null}, "usage": usage});
                events.push(event("message_delta", delta));
                events.push(event("message_stop", json!({})));
                events
            }
            // A length-prefixed message, as gRPC has it, of arbitrary content.
            Self::Infer => {
                let said = format!("answer {number} at {replica}");
                vec![format!("\0\0\0\0{}{said}", char::from(u8::try_from(said.len()).unwrap()))]
            }
        }
    }

    /// How many pieces come before the first token: they show nothing to the client.
    pub fn ahead(self) -> usize {
        match self {
            Self::ChatStream => 1,
            Self::Messages => 2,
            Self::Chat | Self::Completions | Self::Embeddings | Self::Infer => 0,
        }
    }

    /// How many pieces go up to the finish, included: what is behind it can be written by anybody.
    pub fn up_to_finish(self, number: usize) -> usize {
        let tokens = tokens(number).len();
        match self {
            Self::ChatStream => tokens + 2,
            Self::Completions => tokens + 1,
            Self::Messages => tokens + 4,
            Self::Chat | Self::Embeddings | Self::Infer => 1,
        }
    }

    /// The stream completed by whoever knows its finish but not its usage.
    fn completed_locally(self, number: usize, replica: usize) -> String {
        let pieces = self.pieces(number, replica);
        let mut whole = pieces[..self.up_to_finish(number)].concat();
        whole += pieces.last().map(String::as_str).unwrap_or_default();
        whole
    }

    /// The acts of a healthy replica.
    pub fn healthy(self, number: usize, replica: usize, pace: Pace) -> Vec<Act> {
        let pieces = self.pieces(number, replica);
        if !self.is_stream() {
            let tokens = u32::try_from(tokens(number).len()).unwrap();
            let thinks = if self == Self::Chat { pace.first + pace.gap * tokens } else { pace.first };
            let mut acts = vec![Act::Wait(thinks)];
            acts.extend(self.whole(200, &pieces[0]));
            if self == Self::Infer {
                acts.pop();
                acts.push(Act::Trailers(vec![("grpc-status", "0".to_owned())]));
            }
            return acts;
        }
        // ASGI servers send the head before the prefill.
        let mut acts = vec![self.head(), Act::Wait(pace.first)];
        for (nth, piece) in pieces.into_iter().enumerate() {
            if nth > self.ahead() {
                acts.push(Act::Wait(pace.gap));
            }
            acts.push(Act::Data(piece.into()));
        }
        acts.push(Act::End);
        acts
    }

    /// Head of a good stream.
    pub fn head(self) -> Act {
        Act::Head { status: 200, headers: vec![("content-type", self.content_type().to_owned())] }
    }

    /// A stream that has begun with `pieces` of the right answer.
    pub fn begun(self, number: usize, replica: usize, pieces: usize) -> Vec<Act> {
        let begun = self.pieces(number, replica).into_iter().take(pieces);
        std::iter::once(self.head()).chain(begun.map(|piece| Act::Data(piece.into()))).collect()
    }

    /// An answer in one piece, with its length.
    pub fn whole(self, status: u16, body: &str) -> Vec<Act> {
        let kind = if self.is_stream() { "application/json" } else { self.content_type() };
        let headers = vec![("content-type", kind.to_owned())];
        sized(status, headers, body)
    }

    /// Whether `answer` is the one and whole answer of one of `replicas` replicas to request `number`;
    /// if not, what is wrong with it.
    pub fn check(
        self,
        number: usize,
        replicas: usize,
        may_lack_usage: bool,
        answer: &Answer,
    ) -> Result<(), String> {
        let told = || {
            format!("status {}, end {:?}, body {:?}", answer.status, answer.end, shortened(&answer.text()))
        };
        if answer.status != 200 || answer.end != End::Clean {
            return Err(told());
        }
        let kind = answer.header("content-type").unwrap_or_default();
        if !kind.starts_with(self.content_type()) {
            return Err(format!("content type {kind:?}, {}", told()));
        }
        if self == Self::Infer && !answer.trailers.contains(&("grpc-status".to_owned(), "0".to_owned())) {
            return Err(format!("trailers {:?}, {}", answer.trailers, told()));
        }
        let is_right = (0..replicas).any(|replica| {
            answer.body == self.pieces(number, replica).concat().as_bytes()
                || may_lack_usage && answer.body == self.completed_locally(number, replica).as_bytes()
        });
        if is_right { Ok(()) } else { Err(format!("not the answer to request {number}: {}", told())) }
    }
}

/// An answer in one piece with a `content-length`.
pub fn sized(status: u16, mut headers: Vec<(&'static str, String)>, body: &str) -> Vec<Act> {
    headers.push(("content-length", body.len().to_string()));
    vec![Act::Head { status, headers }, Act::Data(Bytes::from(body.to_owned())), Act::End]
}

/// How fast a replica is.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Before the first token.
    pub first: Duration,
    /// Between two tokens.
    pub gap: Duration,
}

impl Pace {
    /// A small model on an idle machine.
    pub const USUAL: Self = Self { first: Duration::from_millis(20), gap: Duration::from_millis(10) };

    pub fn times(self, factor: u32) -> Self {
        Self { first: self.first * factor, gap: self.gap * factor }
    }
}

/// What is said in answer to request `number`: 8 to 20 tokens.
fn tokens(number: usize) -> Vec<String> {
    (0..8 + number % 13).map(|nth| format!(" w{number}.{nth}")).collect()
}

/// The number of the request whose body this is.
pub fn number_in(body: &[u8]) -> Option<usize> {
    let at = body.windows(8).position(|window| window == b"request-")? + 8;
    let end = at + body[at..].iter().position(|byte| *byte == b';')?;
    std::str::from_utf8(&body[at..end]).ok()?.parse().ok()
}

/// The beginning and the end of what may be long.
pub fn shortened(text: &str) -> String {
    const SHOWN: usize = 160;
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= 2 * SHOWN {
        return text.to_owned();
    }
    let part = |range: &[char]| range.iter().collect::<String>();
    format!("{} … {}", part(&chars[..SHOWN]), part(&chars[chars.len() - SHOWN..]))
}
