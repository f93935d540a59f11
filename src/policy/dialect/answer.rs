//! Answers in one piece: whole, sane, and really an answer? Held back until that is known.
//!
//! Lenient in everything that does not show a failure: a member more or less is the engine's business.

use std::fmt;
use std::ops::Range;

use http::StatusCode;

use super::error::classify_error_body;
use super::event::read_object;
use super::{Endpoint, ErrorClass, EventFacts, Finish};
use crate::policy::json::{self, JsonError, Kind, Reader, Value, scan_object_prefix};

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
/// they say. The body must be decoded (no content coding).
///
/// Costs one pass; what is no JSON by definition (gRPC, unknown endpoints) is not looked at.
///
/// Gives the place of a generated text: between the quotes of the last one, escapes and all.
pub fn check_answer(
    endpoint: Endpoint,
    status: StatusCode,
    body: &[u8],
) -> Result<Option<Range<usize>>, BadAnswer> {
    if !status.is_success() {
        return Ok(None);
    }
    let visible = body.trim_ascii_start();
    if visible.is_empty() {
        return if endpoint.must_have_body() { Err(BadAnswer::Empty) } else { Ok(None) };
    }
    if !endpoint.answers_json() {
        return Ok(None);
    }
    if endpoint.generates() {
        // A batch of prompts at a native endpoint is answered by a list, which has no error shape.
        if visible.first() == Some(&b'[') {
            return json::validate(body).map(|()| None).map_err(BadAnswer::Json);
        }
        let facts = read_object(endpoint, body).map_err(BadAnswer::Json)?;
        check_generation(endpoint, &facts)?;
        return Ok(facts.content.map(|(start, end)| start..end));
    }
    let body = if endpoint == Endpoint::KserveInfer { json_part(body)? } else { body };
    let numbers = matches!(
        endpoint,
        Endpoint::Embeddings
            | Endpoint::OllamaEmbed
            | Endpoint::Rerank
            | Endpoint::Score
            | Endpoint::Classify
            | Endpoint::KserveInfer
    );
    let mut check = Check { is_error: false, not_finite: false };
    check.read(body, numbers).map_err(|fault| not_json(body, fault))?;
    if check.is_error {
        return Err(BadAnswer::Error(classify_error_body(body)));
    }
    if check.not_finite {
        return Err(BadAnswer::NotFinite);
    }
    Ok(None)
}

fn check_generation(endpoint: Endpoint, facts: &EventFacts) -> Result<(), BadAnswer> {
    if let Some(error) = facts.error {
        return Err(BadAnswer::Error(error));
    }
    if let Some(cut) = facts.finish.filter(|finish| !finish.is_good()) {
        return Err(BadAnswer::Unfinished(cut));
    }
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions if facts.choices.is_empty() => {
            Err(BadAnswer::Missing("choices"))
        }
        // `done: false` is what Ollama's runner leaves behind when it dies.
        Endpoint::OllamaChat | Endpoint::OllamaGenerate if facts.finish.is_none() => {
            Err(BadAnswer::Missing("done"))
        }
        _ => Ok(()),
    }
}

/// The JSON in front of binary tensors (KServe's binary data extension).
fn json_part(body: &[u8]) -> Result<&[u8], BadAnswer> {
    let end = scan_object_prefix(body, |_, _| std::ops::ControlFlow::Continue(()));
    match end.map_err(|fault| not_json(body, fault))? {
        Some(end) => Ok(&body[..end]),
        None => Ok(body),
    }
}

/// Python writes NaN and the infinities as bare words, which is not JSON but says clearly what is wrong.
fn not_json(body: &[u8], fault: JsonError) -> BadAnswer {
    let here = body.get(fault.offset..).unwrap_or_default();
    let here = here.strip_prefix(b"-").unwrap_or(here);
    if here.starts_with(b"NaN") || here.starts_with(b"Infinity") {
        BadAnswer::NotFinite
    } else {
        BadAnswer::Json(fault)
    }
}

struct Check {
    is_error: bool,
    not_finite: bool,
}

impl Check {
    fn read(&mut self, body: &[u8], numbers: bool) -> Result<(), JsonError> {
        let mut reader = Reader::new(body);
        if reader.peek()? == Kind::Object {
            reader.object(|reader, name| match name {
                b"error" => {
                    self.is_error |= !reader.value()?.is_blank();
                    Ok(())
                }
                _ => self.member(reader, name, numbers),
            })?;
        } else {
            self.value(&mut reader, numbers)?;
        }
        reader.finish()
    }

    fn member(&mut self, reader: &mut Reader<'_>, name: &[u8], numbers: bool) -> Result<(), JsonError> {
        if !numbers {
            return reader.pass();
        }
        match (name, reader.peek()?) {
            (b"score" | b"relevance_score", Kind::Null) => self.not_finite = true,
            (b"embedding" | b"embeddings", Kind::String) => {
                let vector = reader.value()?;
                self.not_finite |= vector.as_str().is_some_and(|base64| mostly_not_finite(&base64));
                return Ok(());
            }
            _ => {}
        }
        self.value(reader, numbers)
    }

    /// Recursion ends at the reader's bound of depth.
    fn value(&mut self, reader: &mut Reader<'_>, numbers: bool) -> Result<(), JsonError> {
        if !numbers {
            return reader.pass();
        }
        match reader.peek()? {
            Kind::Object => reader.object(|reader, name| self.member(reader, name, numbers)).map(drop),
            Kind::Array => reader
                .array(|reader| match reader.peek()? {
                    Kind::Array | Kind::Object => self.value(reader, numbers),
                    _ => {
                        let element = reader.value()?;
                        self.not_finite |= element.is_null() || is_infinite(element);
                        Ok(())
                    }
                })
                .map(drop),
            _ => {
                let value = reader.value()?;
                self.not_finite |= is_infinite(value);
                Ok(())
            }
        }
    }
}

/// Whether a number is beyond a float. Only one with an exponent or with hundreds of digits can be.
fn is_infinite(number: Value<'_>) -> bool {
    const DIGITS_MAX: usize = 300;
    let raw = number.raw();
    number.kind() == Kind::Number
        && (raw.len() > DIGITS_MAX || raw.iter().any(|byte| matches!(byte, b'e' | b'E')))
        && number.as_f64().is_some_and(f64::is_infinite)
}

/// Whether more than half of the 32-bit floats in a base64 vector are NaN or infinite.
///
/// More than half, because other number types may be hidden there (vLLM's `embed_dtype`, `endianness`):
/// read as floats, finite float16, bfloat16 and float8 never look infinite, and byte-swapped floats do in
/// one of 250 cases. A replica that computes NaN, on the other hand, normalises the vector with it.
fn mostly_not_finite(base64: &str) -> bool {
    let mut bits = 0_u32;
    let mut bit_count = 0;
    let mut float = 0_u32;
    let mut byte_count = 0;
    let (mut floats, mut bad) = (0_u32, 0_u32);
    for &symbol in base64.as_bytes() {
        let six = match symbol {
            b'A'..=b'Z' => symbol - b'A',
            b'a'..=b'z' => symbol - b'a' + 26,
            b'0'..=b'9' => symbol - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            b'=' => break,
            _ => return false,
        };
        bits = bits << 6 | u32::from(six);
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            // Little-endian, as numpy and struct write it.
            float = float >> 8 | (bits >> bit_count & 0xFF) << 24;
            byte_count += 1;
            if byte_count % 4 == 0 {
                floats += 1;
                bad += u32::from(!f32::from_bits(float).is_finite());
            }
        }
    }
    bad > floats / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::json::JsonErrorKind;

    fn check(endpoint: Endpoint, body: &str) -> Result<(), BadAnswer> {
        check_answer(endpoint, StatusCode::OK, body.as_bytes()).map(|_| ())
    }

    #[test]
    fn the_place_of_a_generated_text_is_told() {
        let chat = |message: &str| {
            format!(r#"{{"choices":[{{"index":0,"message":{{{message}}},"finish_reason":"stop"}}]}}"#)
        };
        for (body, text) in [
            (chat(r#""role":"assistant","content":"a\n\"b\"""#), Some(r#"a\n\"b\""#)),
            (chat(r#""content":"so","reasoning_content":"hm""#), Some("so")),
            (chat(r#""reasoning_content":"hm","content":"so""#), Some("so")),
            (chat(r#""content":null,"tool_calls":[{"id":"x"}]"#), None),
        ] {
            let place = check_answer(Endpoint::ChatCompletions, StatusCode::OK, body.as_bytes()).unwrap();
            assert_eq!(place.map(|place| &body[place]), text, "{body}");
        }
        let numbers = check_answer(Endpoint::Embeddings, StatusCode::OK, br#"{"data":[{"embedding":[1]}]}"#);
        assert_eq!(numbers, Ok(None));
    }

    #[test]
    fn whole_answers_pass() {
        for (endpoint, body) in [
            (
                Endpoint::ChatCompletions,
                r#"{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],"usage":{},"error":null}"#,
            ),
            (Endpoint::Completions, r#"{"choices":[{"index":0,"text":"","finish_reason":"length"}]}"#),
            (Endpoint::Completions, r#"{"content":"Hi","stop":true,"stop_type":"eos"}"#),
            (Endpoint::Responses, r#"{"object":"response","status":"completed","error":null,"output":[]}"#),
            (
                Endpoint::Responses,
                r#"{"object":"response","status":"incomplete","incomplete_details":{"reason":"content_filter"}}"#,
            ),
            (Endpoint::AnthropicMessages, r#"{"type":"message","content":[],"stop_reason":"end_turn"}"#),
            (Endpoint::CountTokens, r#"{"input_tokens":7}"#),
            (Endpoint::OllamaChat, r#"{"message":{"content":"Hi"},"done":true,"done_reason":"stop"}"#),
            (Endpoint::LlamaCompletion, r#"[{"content":"a"},{"content":"b"}]"#),
            (Endpoint::Generate, r#"[{"generated_text":"Hi"}]"#),
            (
                Endpoint::Generate,
                r#"{"text":"Hi","meta_info":{"finish_reason":{"type":"stop","matched":2}}}"#,
            ),
            (Endpoint::Embeddings, r#"{"data":[{"embedding":[0.1,-2e-3,0],"index":0}],"usage":null}"#),
            (Endpoint::Embeddings, r#"[[0.1,0.2]]"#),
            // 1.0 and -1.0 in little-endian float32.
            (Endpoint::Embeddings, r#"{"data":[{"embedding":"AACAPwAAgL8="}]}"#),
            (Endpoint::OllamaEmbed, r#"{"embeddings":[[0.1,0.2]]}"#),
            (Endpoint::Rerank, r#"{"results":[{"index":0,"relevance_score":0.5,"document":null}]}"#),
            (Endpoint::Tokenize, r#"{"tokens":[1,2],"token_strs":null}"#),
            (
                Endpoint::KserveInfer,
                r#"{"outputs":[{"name":"o","datatype":"FP32","shape":[2],"data":[1,2]}]}"#,
            ),
            (Endpoint::KserveInfer, "{\"outputs\":[]}\u{0}\u{1}binary"),
            (Endpoint::Models, r#"{"data":[]}"#),
            (Endpoint::Other, "anything"),
            (Endpoint::Other, ""),
        ] {
            assert_eq!(check(endpoint, body), Ok(()), "{endpoint:?} {body}");
        }
    }

    #[test]
    fn what_only_looks_whole_does_not() {
        for (endpoint, body, fault) in [
            (Endpoint::ChatCompletions, "", BadAnswer::Empty),
            (Endpoint::Embeddings, " \n", BadAnswer::Empty),
            (Endpoint::ChatCompletions, r#"{"id":"c"}"#, BadAnswer::Missing("choices")),
            (Endpoint::ChatCompletions, r#"{"choices":[]}"#, BadAnswer::Missing("choices")),
            (
                Endpoint::ChatCompletions,
                r#"{"choices":[{"message":{"content":"Hal"},"finish_reason":"abort"}]}"#,
                BadAnswer::Unfinished(Finish::Abort),
            ),
            (
                Endpoint::ChatCompletions,
                r#"{"error":{"message":"x","type":"overloaded_error"}}"#,
                BadAnswer::Error(ErrorClass::Overloaded),
            ),
            (Endpoint::Tokenize, r#"{"error":"x"}"#, BadAnswer::Error(ErrorClass::ServerFault)),
            (
                Endpoint::Responses,
                r#"{"object":"response","status":"failed","error":{"code":"server_error","message":"x"}}"#,
                BadAnswer::Error(ErrorClass::ServerFault),
            ),
            (
                Endpoint::Generate,
                r#"{"text":"Ha","meta_info":{"finish_reason":{"type":"abort"}}}"#,
                BadAnswer::Unfinished(Finish::Abort),
            ),
            (Endpoint::OllamaGenerate, r#"{"response":"Ha","done":false}"#, BadAnswer::Missing("done")),
            (Endpoint::Embeddings, r#"{"data":[{"embedding":[0.1,null]}]}"#, BadAnswer::NotFinite),
            (Endpoint::Embeddings, r#"{"data":[{"embedding":[NaN,NaN]}]}"#, BadAnswer::NotFinite),
            (Endpoint::Embeddings, r#"{"data":[{"embedding":[1,-Infinity]}]}"#, BadAnswer::NotFinite),
            (Endpoint::Embeddings, r#"{"data":[{"embedding":[1e999]}]}"#, BadAnswer::NotFinite),
            // Two NaN in little-endian float32.
            (Endpoint::Embeddings, r#"{"data":[{"embedding":"AADAfwAAwH8="}]}"#, BadAnswer::NotFinite),
            (Endpoint::OllamaEmbed, r#"{"embeddings":[[null]]}"#, BadAnswer::NotFinite),
            (Endpoint::Rerank, r#"{"results":[{"relevance_score":null}]}"#, BadAnswer::NotFinite),
            (Endpoint::Score, r#"{"data":[{"score":null}]}"#, BadAnswer::NotFinite),
            (Endpoint::KserveInfer, r#"{"outputs":[{"data":[1,null]}]}"#, BadAnswer::NotFinite),
        ] {
            assert_eq!(check(endpoint, body), Err(fault), "{endpoint:?} {body}");
        }
        for endpoint in [Endpoint::ChatCompletions, Endpoint::Embeddings, Endpoint::Tokenize] {
            let Err(BadAnswer::Json(fault)) = check(endpoint, r#"{"data":[1,2"#) else {
                panic!("a cut body passed");
            };
            assert_eq!(fault.kind, JsonErrorKind::UnexpectedEnd);
        }
    }

    #[test]
    fn errors_say_for_themselves_what_they_are() {
        assert_eq!(check_answer(Endpoint::ChatCompletions, StatusCode::BAD_REQUEST, b""), Ok(None));
    }

    #[test]
    fn numbers_beyond_a_float_are_found_however_they_are_written() {
        let vector = |number: &str| format!(r#"{{"data":[{{"embedding":[0.5,{number}]}}]}}"#);
        let long = "9".repeat(400);
        for number in [long.as_str(), "-1e999", "1E+400"] {
            assert_eq!(check(Endpoint::Embeddings, &vector(number)), Err(BadAnswer::NotFinite), "{number}");
        }
        let most = format!("1{}", "0".repeat(307));
        for number in [most.as_str(), "1e308", "1e-999"] {
            assert_eq!(check(Endpoint::Embeddings, &vector(number)), Ok(()), "{number}");
        }
    }

    #[test]
    fn a_vector_in_base64_is_bad_when_more_than_half_of_it_is() {
        let vector = |base64: &str| format!(r#"{{"data":[{{"embedding":"{base64}"}}]}}"#);
        for (base64, fault) in [
            // One NaN, written with each of the four symbols that two alphabets disagree about.
            ("+ADAfw==", true),
            ("-ADAfw==", true),
            ("/ADAfw==", true),
            ("_ADAfw==", true),
            // 1.0 and NaN, NaN and 1.0 and NaN, 1.0 and 1.0 and NaN.
            ("AACAPwAAwH8=", false),
            ("AADAfwAAgD8AAMB/", true),
            ("AACAPwAAgD8AAMB/", false),
            ("", false),
            ("no vector", false),
        ] {
            let expected = if fault { Err(BadAnswer::NotFinite) } else { Ok(()) };
            assert_eq!(check(Endpoint::Embeddings, &vector(base64)), expected, "{base64}");
        }
    }

    #[test]
    fn a_complaint_says_what_is_wrong() {
        for (fault, words) in [
            (BadAnswer::Empty, "empty"),
            (BadAnswer::NotFinite, "not finite"),
            (BadAnswer::Missing("choices"), "`choices`"),
            (BadAnswer::Error(ErrorClass::ServerFault), "error"),
            (BadAnswer::Unfinished(Finish::Abort), "aborted"),
        ] {
            assert!(fault.to_string().contains(words), "{fault:?}: {fault}");
        }
        let Err(fault) = check(Endpoint::ChatCompletions, "[1,") else { panic!("a cut body passed") };
        assert!(fault.to_string().starts_with("answer: "), "{fault}");
    }
}
