//! A small question that evergate asks by itself, to see whether a token comes, and whether the answer shows one.
//!
//! The answer is in one piece and judged as a client's would be ([`check_answer`]); besides it must show that
//! something was generated, and begin with a text where one is known. Greedy, so that the same weights say the
//! same. Not here: when to ask, and what follows.

use std::fmt;

use http::StatusCode;

use super::event::read_object;
use super::{BadAnswer, Endpoint, ErrorClass, check_answer, classify_error_answer};
use crate::policy::json;

/// Longest text of another answer that a complaint shows, in characters.
const SHOWN_CHARS_MAX: usize = 60;

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// In the words of which endpoint; see [`can_ask`](Self::can_ask).
    pub endpoint: Endpoint,
    /// The model; none leaves it to the engine.
    pub model: Option<&'a str>,
    /// The prompt.
    pub prompt: &'a str,
    /// Most tokens of the answer.
    pub tokens_max: u32,
}

impl Question<'_> {
    /// Whether a question can be put to this endpoint.
    pub fn can_ask(endpoint: Endpoint) -> bool {
        matches!(
            endpoint,
            Endpoint::ChatCompletions
                | Endpoint::Completions
                | Endpoint::AnthropicMessages
                | Endpoint::OllamaChat
                | Endpoint::OllamaGenerate
                | Endpoint::LlamaCompletion
                | Endpoint::Generate
                | Endpoint::KserveGenerate
        )
    }

    /// The body of the request, as JSON.
    pub fn body(&self) -> String {
        let prompt = quoted(self.prompt);
        let tokens = self.tokens_max;
        let model = self.model.map(|model| format!(r#""model":{},"#, quoted(model))).unwrap_or_default();
        let messages = format!(r#""messages":[{{"role":"user","content":{prompt}}}]"#);
        match self.endpoint {
            Endpoint::ChatCompletions => {
                format!(r#"{{{model}{messages},"max_tokens":{tokens},"temperature":0,"stream":false}}"#)
            }
            Endpoint::AnthropicMessages => {
                format!(r#"{{{model}{messages},"max_tokens":{tokens},"temperature":0}}"#)
            }
            Endpoint::OllamaChat => format!(
                r#"{{{model}{messages},"stream":false,"options":{{"num_predict":{tokens},"temperature":0}}}}"#
            ),
            Endpoint::OllamaGenerate => format!(
                r#"{{{model}"prompt":{prompt},"stream":false,"options":{{"num_predict":{tokens},"temperature":0}}}}"#
            ),
            Endpoint::LlamaCompletion => {
                format!(r#"{{"prompt":{prompt},"n_predict":{tokens},"temperature":0,"stream":false}}"#)
            }
            // TGI's words and SGLang's side by side: each ignores the other's. TGI refuses a temperature of 0 and is
            // greedy by default; SGLang is not.
            Endpoint::Generate => format!(
                r#"{{"inputs":{prompt},"parameters":{{"max_new_tokens":{tokens}}},"text":{prompt},"sampling_params":{{"max_new_tokens":{tokens},"temperature":0}}}}"#
            ),
            Endpoint::KserveGenerate => {
                format!(r#"{{"text_input":{prompt},"max_tokens":{tokens},"temperature":0.0}}"#)
            }
            _ => format!(
                r#"{{{model}"prompt":{prompt},"max_tokens":{tokens},"temperature":0,"stream":false}}"#
            ),
        }
    }
}

/// Why an answer does not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadReply {
    /// It asks to be left alone: overloaded, loading or draining.
    Busy(StatusCode),
    /// Another answer than one of success.
    Status(StatusCode),
    /// It would not have been shown to a client either.
    Answer(BadAnswer),
    /// Whole and valid, and nothing in it was generated.
    NoToken,
    /// Another text than the one expected; its beginning.
    Differs(String),
}

impl fmt::Display for BadReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(status) | Self::Status(status) => write!(f, "{}", status.as_u16()),
            Self::Answer(fault) => write!(f, "{fault}"),
            Self::NoToken => f.write_str("answer without a token"),
            Self::Differs(text) => write!(f, "another answer than expected: {text:?}"),
        }
    }
}

/// Judges the whole answer to a [`Question`]: valid, with a token, and beginning with `expect`, white space before
/// it aside.
///
/// # Errors
/// What is wrong with it.
pub fn check_reply(
    endpoint: Endpoint,
    status: StatusCode,
    body: &[u8],
    expect: Option<&str>,
) -> Result<(), BadReply> {
    if !status.is_success() {
        let busy = classify_error_answer(status, body) == ErrorClass::Overloaded;
        return Err(if busy { BadReply::Busy(status) } else { BadReply::Status(status) });
    }
    check_answer(endpoint, status, body).map_err(BadReply::Answer)?;
    let text = answer_text(endpoint, body).unwrap_or_default();
    if let Some(expect) = expect {
        let came = text.trim_start();
        return match came.starts_with(expect.trim_start()) {
            true => Ok(()),
            false => Err(BadReply::Differs(came.chars().take(SHOWN_CHARS_MAX).collect())),
        };
    }
    let said = read_object(endpoint, body).is_ok_and(|facts| facts.meaningful);
    if said || !text.is_empty() || tokens(body) > 0 { Ok(()) } else { Err(BadReply::NoToken) }
}

/// The text of the first choice of a whole answer.
pub fn answer_text(endpoint: Endpoint, body: &[u8]) -> Option<String> {
    let path: &[&[&str]] = match endpoint {
        Endpoint::ChatCompletions => &[&["choices", "0", "message", "content"]],
        Endpoint::Completions => &[&["choices", "0", "text"], &["content"]],
        Endpoint::AnthropicMessages => &[&["content", "0", "text"]],
        Endpoint::OllamaChat => &[&["message", "content"]],
        Endpoint::OllamaGenerate => &[&["response"]],
        Endpoint::LlamaCompletion => &[&["content"]],
        Endpoint::Generate => &[&["generated_text"], &["text"], &["0", "generated_text"], &["0", "text"]],
        Endpoint::KserveGenerate => &[&["text_output"]],
        _ => &[],
    };
    path.iter().find_map(|steps| string_at(body, steps))
}

/// Tokens the engine says it made: the first may be one that is not written, such as the end of the text.
fn tokens(body: &[u8]) -> u64 {
    let paths: &[&[&str]] = &[
        &["usage", "completion_tokens"],
        &["usage", "output_tokens"],
        &["meta_info", "completion_tokens"],
        &["details", "generated_tokens"],
        &["eval_count"],
        &["tokens_predicted"],
    ];
    paths.iter().find_map(|steps| at(body, steps, |value| value.as_u64())).unwrap_or(0)
}

fn string_at(body: &[u8], steps: &[&str]) -> Option<String> {
    at(body, steps, |value| value.as_str().map(|text| text.into_owned()))
}

/// Reads what stands at a path of member names and list positions.
fn at<T>(body: &[u8], steps: &[&str], read: impl FnOnce(json::Value<'_>) -> Option<T>) -> Option<T> {
    let mut value = json::Reader::new(body).value().ok()?;
    for step in steps {
        value = match step.parse::<usize>() {
            Ok(index) => value.elements().nth(index)?,
            Err(_) => value.get(step)?,
        };
    }
    read(value)
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len() + 2);
    json::write_string(&mut out, text);
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::dialect::{Engine, request_facts};
    use http::Method;

    const ASKED: [Endpoint; 8] = [
        Endpoint::ChatCompletions,
        Endpoint::Completions,
        Endpoint::AnthropicMessages,
        Endpoint::OllamaChat,
        Endpoint::OllamaGenerate,
        Endpoint::LlamaCompletion,
        Endpoint::Generate,
        Endpoint::KserveGenerate,
    ];

    #[test]
    fn a_question_is_one_valid_request_that_does_not_stream_and_keeps_nothing() {
        for endpoint in ASKED {
            assert!(Question::can_ask(endpoint));
            for model in [None, Some("org/a \"b\"\n")] {
                let question = Question { endpoint, model, prompt: "say \"1\"\\", tokens_max: 1 };
                let body = question.body();
                let tree: serde_json::Value = serde_json::from_str(&body).unwrap();
                assert!(body.contains(r#"say \"1\"\\"#), "{body}");
                let facts = request_facts(endpoint, body.as_bytes()).unwrap();
                assert_eq!((facts.stream, facts.stateful, facts.choices), (false, None, 1), "{endpoint:?}");
                if let Some(named) = tree.get("model") {
                    assert_eq!(named.as_str(), model, "{endpoint:?}");
                }
            }
        }
        assert!(!Question::can_ask(Endpoint::Embeddings));
    }

    #[test]
    fn every_engine_is_asked_where_a_question_can_be_put() {
        for engine in Engine::ALL {
            let endpoint = Endpoint::of(&Method::POST, engine.generate_path());
            assert!(Question::can_ask(endpoint), "{engine:?}");
            assert_eq!(Endpoint::of(&Method::GET, engine.health_path()), Endpoint::Other);
        }
    }

    fn check(endpoint: Endpoint, body: &str, expect: Option<&str>) -> Result<(), BadReply> {
        check_reply(endpoint, StatusCode::OK, body.as_bytes(), expect)
    }

    #[test]
    fn answers_with_a_token_pass_and_their_text_is_found() {
        for (endpoint, body) in [
            (
                Endpoint::ChatCompletions,
                r#"{"choices":[{"index":0,"message":{"role":"assistant","content":" 42.","tool_calls":[]},"finish_reason":"length"}]}"#,
            ),
            (Endpoint::Completions, r#"{"choices":[{"index":0,"text":"42.","finish_reason":"length"}]}"#),
            (Endpoint::Completions, r#"{"content":"42.","stop":true,"stop_type":"limit"}"#),
            (
                Endpoint::AnthropicMessages,
                r#"{"type":"message","content":[{"type":"text","text":"42."}],"stop_reason":"max_tokens"}"#,
            ),
            (Endpoint::OllamaChat, r#"{"message":{"role":"assistant","content":"42."},"done":true}"#),
            (Endpoint::OllamaGenerate, r#"{"response":"42.","done":true,"done_reason":"length"}"#),
            (Endpoint::LlamaCompletion, r#"{"content":"42.","stop":true,"stop_type":"limit"}"#),
            (Endpoint::Generate, r#"{"generated_text":"42."}"#),
            (Endpoint::Generate, r#"[{"generated_text":"42."}]"#),
            (Endpoint::Generate, r#"{"text":"42.","meta_info":{"finish_reason":{"type":"length"}}}"#),
            (Endpoint::KserveGenerate, r#"{"model_name":"m","text_output":"42."}"#),
        ] {
            assert_eq!(check(endpoint, body, None), Ok(()), "{endpoint:?} {body}");
            assert_eq!(check(endpoint, body, Some("42")), Ok(()), "{endpoint:?} {body}");
            let other = check(endpoint, body, Some("41"));
            assert_eq!(other, Err(BadReply::Differs("42.".to_owned())), "{endpoint:?} {body}");
        }
    }

    #[test]
    fn a_token_that_is_not_written_counts_and_none_does_not() {
        let chat = |content: &str, tokens: u32| {
            format!(
                r#"{{"choices":[{{"index":0,"message":{{"role":"assistant","content":{content}}},"finish_reason":"length"}}],"usage":{{"completion_tokens":{tokens}}}}}"#
            )
        };
        assert_eq!(check(Endpoint::ChatCompletions, &chat("\"\"", 1), None), Ok(()));
        assert_eq!(check(Endpoint::ChatCompletions, &chat("null", 0), None), Err(BadReply::NoToken));
        let thinking = r#"{"choices":[{"index":0,"message":{"content":null,"reasoning_content":"Hm"},"finish_reason":"length"}]}"#;
        assert_eq!(check(Endpoint::ChatCompletions, thinking, None), Ok(()));
    }

    #[test]
    fn what_is_no_answer_does_not_pass() {
        let aborted = r#"{"choices":[{"index":0,"message":{"content":"4"},"finish_reason":"abort"}]}"#;
        for body in ["", "{", "{}", aborted, r#"{"error":{"message":"CUDA error"}}"#] {
            let refused = check(Endpoint::ChatCompletions, body, None);
            assert!(matches!(refused, Err(BadReply::Answer(_))), "{body}: {refused:?}");
        }
        for (status, busy) in [(503, true), (429, true), (500, false), (404, false), (400, false)] {
            let status = StatusCode::from_u16(status).unwrap();
            let expected = if busy { BadReply::Busy(status) } else { BadReply::Status(status) };
            let refused = check_reply(Endpoint::ChatCompletions, status, b"{}", None);
            assert_eq!(refused, Err(expected), "{status}");
        }
    }

    #[test]
    fn every_api_is_asked_in_its_own_words() {
        for (endpoint, prompts, limits) in [
            (Endpoint::ChatCompletions, &["/messages/0/content"][..], &["/max_tokens"][..]),
            (Endpoint::Completions, &["/prompt"], &["/max_tokens"]),
            (Endpoint::AnthropicMessages, &["/messages/0/content"], &["/max_tokens"]),
            (Endpoint::OllamaChat, &["/messages/0/content"], &["/options/num_predict"]),
            (Endpoint::OllamaGenerate, &["/prompt"], &["/options/num_predict"]),
            (Endpoint::LlamaCompletion, &["/prompt"], &["/n_predict"]),
            (
                Endpoint::Generate,
                &["/inputs", "/text"],
                &["/parameters/max_new_tokens", "/sampling_params/max_new_tokens"],
            ),
            (Endpoint::KserveGenerate, &["/text_input"], &["/max_tokens"]),
        ] {
            let body = Question { endpoint, model: Some("m"), prompt: "6 x 7 =", tokens_max: 3 }.body();
            let tree: serde_json::Value = serde_json::from_str(&body).unwrap();
            for place in prompts {
                assert_eq!(
                    tree.pointer(place).and_then(|it| it.as_str()),
                    Some("6 x 7 ="),
                    "{endpoint:?} {body}"
                );
            }
            for place in limits {
                assert_eq!(tree.pointer(place).and_then(|it| it.as_u64()), Some(3), "{endpoint:?} {body}");
            }
        }
    }

    #[test]
    fn a_complaint_says_what_came() {
        for (fault, words) in [
            (BadReply::Busy(StatusCode::SERVICE_UNAVAILABLE), "503"),
            (BadReply::Status(StatusCode::NOT_FOUND), "404"),
            (BadReply::Answer(BadAnswer::Empty), "empty answer"),
            (BadReply::NoToken, "without a token"),
            (BadReply::Differs("41".to_owned()), "\"41\""),
        ] {
            assert!(fault.to_string().contains(words), "{fault}");
        }
    }
}
