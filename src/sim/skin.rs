//! How each engine words its answers: framing, field order and quirks, and nothing about what is said.
//!
//! A [`Framer`] turns the tokens of one answer into the events or the body that engine would send.
//! The quirks are those a proxy has to live with: where the role stands, whether the finish reason
//! shares the last text chunk, which of id, `created` and fingerprint stay constant, what an error
//! inside a 200 stream looks like.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::Value;

/// The engine a replica looks like on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Skin {
    /// The finish reason in the last text chunk; fingerprint there only; token ids on request; head before the prefill.
    Vllm,
    /// The finish reason in a chunk of its own; `created` anew in each chunk; head before the prefill.
    Sglang,
    /// Role with null content; the finish reason in a chunk of its own; `created` anew and a fingerprint in each; timings.
    LlamaCpp,
    /// A plain OpenAI-compatible server that continues no prefill. The default.
    #[default]
    Generic,
}

impl Skin {
    /// ASGI servers send the response head of a stream before the first token is known.
    pub(super) fn head_before_first_token(self) -> bool {
        matches!(self, Self::Vllm | Self::Sglang)
    }

    /// The `server` header.
    pub(super) fn server(self) -> Option<&'static str> {
        match self {
            Self::Vllm | Self::Sglang => Some("uvicorn"),
            Self::LlamaCpp => Some("llama.cpp"),
            Self::Generic => None,
        }
    }

    /// `owned_by` in the model list.
    pub(super) fn owner(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::LlamaCpp => "llamacpp",
            Self::Generic => "evergate",
        }
    }

    /// An error object in the engine's shape.
    pub(super) fn error(self, api: Api, status: u16, kind: &str, message: &str) -> String {
        let message = quoted(message);
        if api == Api::Messages {
            let kind = match status {
                400 | 413 | 422 => "invalid_request_error",
                401 => "authentication_error",
                403 => "permission_error",
                404 => "not_found_error",
                429 => "rate_limit_error",
                503 | 529 => "overloaded_error",
                _ => "api_error",
            };
            return format!(r#"{{"type":"error","error":{{"type":"{kind}","message":{message}}}}}"#);
        }
        match self {
            Self::Vllm | Self::Generic => {
                format!(r#"{{"error":{{"message":{message},"type":"{kind}","param":null,"code":{status}}}}}"#)
            }
            Self::Sglang => format!(
                r#"{{"object":"error","message":{message},"type":"{kind}","param":null,"code":{status}}}"#
            ),
            Self::LlamaCpp => {
                format!(r#"{{"error":{{"code":{status},"message":{message},"type":"{kind}"}}}}"#)
            }
        }
    }

    /// The error as an event inside a stream: SGLang nests it there, unlike in its error bodies.
    fn error_in_stream(self, api: Api, message: &str) -> String {
        let shape = if self == Self::Sglang { Self::Vllm } else { self };
        shape.error(api, 500, "InternalServerError", message)
    }
}

/// The endpoint family an answer is worded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completions,
    Messages,
    /// Everything that generates no text.
    Other,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    StopString(String),
    Length,
    Abort,
}

impl Finish {
    fn openai(&self) -> &'static str {
        match self {
            Self::Stop | Self::StopString(_) => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }

    fn anthropic(&self) -> &'static str {
        match self {
            Self::Stop => "end_turn",
            Self::StopString(_) => "stop_sequence",
            Self::Length => "max_tokens",
            Self::Abort => "abort",
        }
    }

    /// The stop string that ended the answer, as JSON.
    fn matched(&self) -> String {
        match self {
            Self::StopString(stop) => quoted(stop),
            Self::Stop | Self::Length | Self::Abort => "null".to_owned(),
        }
    }
}

/// Words one answer.
#[derive(Clone, Debug)]
pub(super) struct Framer {
    pub(super) skin: Skin,
    pub(super) api: Api,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) prompt_tokens: usize,
    /// Given when the client asked for token ids and the engine has them.
    pub(super) prompt_ids: Option<Vec<u32>>,
    /// `stream_options.include_usage`.
    pub(super) usage: bool,
    /// `stream_options.continuous_usage_stats`.
    pub(super) usage_in_each: bool,
}

impl Framer {
    /// What precedes the first token; `elapsed` since the request came.
    pub(super) fn opening(&self, elapsed: Duration) -> String {
        match self.api {
            Api::Chat => {
                let content = if self.skin == Skin::LlamaCpp { "null" } else { r#""""# };
                let delta = format!(r#"{{"role":"assistant","content":{content}}}"#);
                let ids = self.prompt_ids.as_ref().map(|ids| format!(r#","prompt_token_ids":{ids:?}"#));
                self.event(elapsed, &self.chat_choice(&delta, "null", ""), 0, false, &ids.unwrap_or_default())
            }
            Api::Messages => {
                let start = format!(
                    r#"{{"type":"message_start","message":{{"id":"{}","type":"message","role":"assistant","model":{},"content":[],"stop_reason":null,"stop_sequence":null,"usage":{{"input_tokens":{},"output_tokens":0}}}}}}"#,
                    self.id,
                    quoted(&self.model),
                    self.prompt_tokens
                );
                named("message_start", &start)
                    + &named(
                        "content_block_start",
                        r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
                    )
                    + &named("ping", r#"{"type":"ping"}"#)
            }
            Api::Completions | Api::Other => String::new(),
        }
    }

    /// The `nth` token, from 1. `finish` when it is the last one.
    pub(super) fn token(
        &self,
        elapsed: Duration,
        nth: usize,
        text: &str,
        id: Option<u32>,
        finish: Option<&Finish>,
    ) -> String {
        let together = finish.filter(|_| self.finish_with_last_token());
        let ids = match (&self.prompt_ids, id) {
            (None, _) => String::new(),
            (Some(_), None) => r#","token_ids":[]"#.to_owned(),
            (Some(_), Some(id)) => format!(r#","token_ids":[{id}]"#),
        };
        let text = quoted(text);
        match self.api {
            Api::Chat => {
                let choice = self.chat_choice(&format!(r#"{{"content":{text}}}"#), &reason(together), &ids);
                self.event(elapsed, &self.with_match(choice, together), nth, together.is_some(), "")
            }
            Api::Completions | Api::Other => {
                let prompt = match &self.prompt_ids {
                    Some(prompt) if nth == 1 => format!(r#","prompt_token_ids":{prompt:?}"#),
                    _ => String::new(),
                };
                let choice = text_choice(&text, &reason(together), &(ids + &prompt));
                self.event(elapsed, &self.with_match(choice, together), nth, together.is_some(), "")
            }
            Api::Messages => named(
                "content_block_delta",
                &format!(
                    r#"{{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":{text}}}}}"#
                ),
            ),
        }
    }

    /// The finish reason where no token carried it; `tokens` were said.
    pub(super) fn finish(&self, elapsed: Duration, tokens: usize, finish: &Finish) -> String {
        match self.api {
            Api::Messages => {
                named("content_block_stop", r#"{"type":"content_block_stop","index":0}"#)
                    + &named(
                        "message_delta",
                        &format!(
                            r#"{{"type":"message_delta","delta":{{"stop_reason":"{}","stop_sequence":{}}},"usage":{{"output_tokens":{tokens}}}}}"#,
                            finish.anthropic(),
                            finish.matched()
                        ),
                    )
            }
            Api::Chat => {
                let choice = self.chat_choice("{}", &reason(Some(finish)), "");
                self.event(elapsed, &self.with_match(choice, Some(finish)), tokens, true, "")
            }
            Api::Completions | Api::Other => {
                let choice = text_choice(r#""""#, &reason(Some(finish)), "");
                self.event(elapsed, &self.with_match(choice, Some(finish)), tokens, true, "")
            }
        }
    }

    /// Usage when it was asked for, and the end of the stream.
    pub(super) fn tail(&self, elapsed: Duration, tokens: usize) -> String {
        if self.api == Api::Messages {
            return named("message_stop", r#"{"type":"message_stop"}"#);
        }
        let mut tail = String::new();
        if self.usage {
            let mut usage = format!(r#","usage":{}"#, self.usage_of(tokens));
            if self.skin == Skin::LlamaCpp {
                usage += &timings(tokens, self.prompt_tokens);
            }
            tail += &self.chunk(elapsed, "", false, &usage);
        }
        tail + "data: [DONE]\n\n"
    }

    /// The engine's error event, with what it sends after it.
    pub(super) fn error(&self, message: &str) -> String {
        let error = self.skin.error_in_stream(self.api, message);
        if self.api == Api::Messages {
            return named("error", &error);
        }
        let done = match self.skin {
            Skin::Vllm | Skin::Sglang | Skin::LlamaCpp => "data: [DONE]\n\n",
            Skin::Generic => "",
        };
        format!("data: {error}\n\n{done}")
    }

    /// The answer as one body.
    pub(super) fn whole(&self, text: &str, tokens: usize, ids: &[u32], finish: &Finish) -> String {
        let text = quoted(text);
        let head = format!(r#""created":{},"model":{}"#, self.created, quoted(&self.model));
        let ids = match &self.prompt_ids {
            Some(_) => format!(r#","token_ids":{ids:?}"#),
            None => String::new(),
        };
        let prompt_ids = match &self.prompt_ids {
            Some(prompt) => format!(r#","prompt_token_ids":{prompt:?}"#),
            None => String::new(),
        };
        match self.api {
            Api::Messages => format!(
                r#"{{"id":"{}","type":"message","role":"assistant","model":{},"content":[{{"type":"text","text":{text}}}],"stop_reason":"{}","stop_sequence":{},"usage":{{"input_tokens":{},"output_tokens":{tokens}}}}}"#,
                self.id,
                quoted(&self.model),
                finish.anthropic(),
                finish.matched(),
                self.prompt_tokens
            ),
            Api::Chat => {
                let choice = format!(
                    r#"{{"index":0,"message":{{"role":"assistant","content":{text}}},"logprobs":null,"finish_reason":"{}"{ids}}}"#,
                    finish.openai()
                );
                format!(
                    r#"{{"id":"{}","object":"chat.completion",{head},"choices":[{}]{},"usage":{}{prompt_ids}}}"#,
                    self.id,
                    self.with_match(choice, Some(finish)),
                    self.fingerprint(true),
                    self.usage_of(tokens)
                )
            }
            Api::Completions | Api::Other => {
                let choice = text_choice(&text, &reason(Some(finish)), &(ids + &prompt_ids));
                format!(
                    r#"{{"id":"{}","object":"text_completion",{head},"choices":[{}]{},"usage":{}}}"#,
                    self.id,
                    self.with_match(choice, Some(finish)),
                    self.fingerprint(true),
                    self.usage_of(tokens)
                )
            }
        }
    }

    /// Whether the last token carries the finish reason.
    pub(super) fn finish_with_last_token(&self) -> bool {
        self.skin == Skin::Vllm && self.api != Api::Messages
    }

    fn event(&self, elapsed: Duration, choice: &str, tokens: usize, last: bool, extra: &str) -> String {
        let mut extra = extra.to_owned();
        if self.usage_in_each && matches!(self.skin, Skin::Vllm | Skin::Sglang) {
            let _ = write!(extra, r#","usage":{}"#, self.usage_of(tokens));
        } else if self.skin == Skin::LlamaCpp && last && !self.usage {
            extra += &timings(tokens, self.prompt_tokens);
        }
        self.chunk(elapsed, choice, last, &extra)
    }

    fn chunk(&self, elapsed: Duration, choices: &str, last: bool, extra: &str) -> String {
        let created = match self.skin {
            Skin::Sglang | Skin::LlamaCpp => self.created + elapsed.as_secs(),
            Skin::Vllm | Skin::Generic => self.created,
        };
        let object = if self.api == Api::Chat { "chat.completion.chunk" } else { "text_completion" };
        let (id, model, fingerprint) = (&self.id, quoted(&self.model), self.fingerprint(last));
        if self.skin == Skin::LlamaCpp {
            return format!(
                "data: {{\"choices\":[{choices}],\"created\":{created},\"id\":\"{id}\",\"model\":{model}{fingerprint},\"object\":\"{object}\"{extra}}}\n\n"
            );
        }
        format!(
            "data: {{\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{created},\"model\":{model},\"choices\":[{choices}]{fingerprint}{extra}}}\n\n"
        )
    }

    fn fingerprint(&self, last: bool) -> &'static str {
        match self.skin {
            Skin::Vllm if last => r#","system_fingerprint":"vllm-0.11.2-sim""#,
            Skin::Vllm | Skin::Sglang => "",
            Skin::LlamaCpp => r#","system_fingerprint":"b7000-sim""#,
            Skin::Generic => r#","system_fingerprint":"fp_evergate""#,
        }
    }

    fn chat_choice(&self, delta: &str, reason: &str, ids: &str) -> String {
        match self.skin {
            Skin::LlamaCpp => format!(r#"{{"finish_reason":{reason},"index":0,"delta":{delta}}}"#),
            Skin::Vllm | Skin::Sglang | Skin::Generic => {
                format!(r#"{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}{ids}}}"#)
            }
        }
    }

    /// Adds what matched, in the engine's word for it, to a choice that has its finish reason.
    fn with_match(&self, mut choice: String, finish: Option<&Finish>) -> String {
        let name = match self.skin {
            Skin::Vllm => "stop_reason",
            Skin::Sglang => "matched_stop",
            Skin::LlamaCpp | Skin::Generic => return choice,
        };
        if let Some(finish) = finish {
            choice.pop();
            let _ = write!(choice, r#","{name}":{}}}"#, finish.matched());
        }
        choice
    }

    fn usage_of(&self, tokens: usize) -> String {
        format!(
            r#"{{"prompt_tokens":{},"total_tokens":{},"completion_tokens":{tokens}}}"#,
            self.prompt_tokens,
            self.prompt_tokens + tokens
        )
    }
}

fn text_choice(text: &str, reason: &str, ids: &str) -> String {
    format!(r#"{{"index":0,"text":{text},"logprobs":null,"finish_reason":{reason}{ids}}}"#)
}

fn reason(finish: Option<&Finish>) -> String {
    finish.map_or_else(|| "null".to_owned(), |finish| format!(r#""{}""#, finish.openai()))
}

fn named(event: &str, data: &str) -> String {
    format!("event: {event}\ndata: {data}\n\n")
}

fn timings(tokens: usize, prompt_tokens: usize) -> String {
    format!(r#","timings":{{"prompt_n":{prompt_tokens},"predicted_n":{tokens}}}"#)
}

/// A JSON string.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
