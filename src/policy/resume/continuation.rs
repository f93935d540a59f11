//! Asking an engine to go on from a text: which requests and engines allow it, the edited body, and the
//! guard at the seam.
//!
//! vLLM and SGLang continue a trailing assistant message with `continue_final_message`; llama.cpp does so
//! unasked. A completion continues when its prompt is prolonged. The engine restarts everything else at its
//! first new token, so whatever depends on tokens before it (grammars, half a tool call, an open thought,
//! log probabilities) refuses the strategy here, and the limits are reduced.
//!
//! Not here: token ids; engines that answer an assistant message instead of continuing it.

use std::ops::ControlFlow;

use super::Refused;
use super::chunk::Channel;
use super::edit::Edits;
use super::journal::Journal;
use crate::policy::dialect::{Endpoint, Engine};
use crate::policy::json::{Kind, Value, scan_top_level, write_string};

/// An engine that says again what it was given to continue is known by this many bytes. Shorter answers
/// repeat themselves by chance.
const ECHO_BYTES_MIN: usize = 16;
/// More need not be compared, and is not held back.
const ECHO_BYTES_MAX: usize = 64;
/// vLLM and SGLang stop a completion here when `max_tokens` is not given.
const COMPLETION_TOKENS_DEFAULT: u64 = 16;
/// Seeds stay within what every engine takes.
const SEED_MAX: u64 = 0x7FFF_FFFF;

/// The edited body, and what must be watched for at the seam.
pub(super) fn continuation(
    endpoint: Endpoint,
    engine: Engine,
    body: &[u8],
    journal: &Journal,
) -> Result<(Vec<u8>, Seam), Refused> {
    let delivered = delivered(journal)?;
    let asked = Asked::read(endpoint, body)?;
    if asked.wants_ids() {
        return Err(Refused::Details);
    }
    let mut edits = Edits::default();
    let mut echoes = vec![delivered.as_bytes()];
    let prompt;
    match (endpoint, engine) {
        (Endpoint::ChatCompletions, Engine::Vllm | Engine::Sglang | Engine::LlamaCpp) => {
            // Templates of vLLM may trim what they are given, and the rest would not fit (vllm#9547). The
            // other two append it as it is.
            if engine == Engine::Vllm && delivered.ends_with(char::is_whitespace) {
                return Err(Refused::TrailingSpace);
            }
            let messages = asked.messages.filter(|list| !list.is_blank()).ok_or(Refused::Body)?;
            let last = messages.elements().last().and_then(|last| last.get("role")).ok_or(Refused::Body)?;
            if last.as_str().as_deref() == Some("assistant") {
                return Err(Refused::Prefilled);
            }
            let mut message = br#",{"role":"assistant","content":"#.to_vec();
            write_string(&mut message, delivered);
            message.push(b'}');
            let end = messages.span().end - 1;
            edits.replace(end..end, message);
            if engine != Engine::LlamaCpp {
                let flags = *br#""continue_final_message":true,"add_generation_prompt":false,"#;
                edits.replace(asked.inside..asked.inside, flags);
            }
        }
        (Endpoint::Completions, Engine::Vllm | Engine::Sglang | Engine::LlamaCpp) => {
            let value = asked.prompt.filter(|prompt| prompt.kind() == Kind::String).ok_or(Refused::Prompt)?;
            prompt = value.as_str().ok_or(Refused::Prompt)?;
            echoes.push(prompt.as_bytes());
            let mut more = Vec::new();
            write_string(&mut more, delivered);
            let end = value.span().end - 1;
            edits.replace(end..end, &more[1..more.len() - 1]);
        }
        _ => return Err(Refused::Engine),
    }
    // With stop strings text is held back, and the engine's count runs ahead of it.
    let spent = journal.text_tokens.or_else(|| told_by_ids(journal)).filter(|_| asked.stops.is_empty());
    asked.reduce_limits(endpoint, engine, spent, &mut edits)?;
    asked.change_seed(delivered, &mut edits);
    let seam = Seam::new(&echoes, asked.stops, delivered.as_bytes());
    Ok((edits.apply(body), seam))
}

/// The text to be continued: there must be some, and nothing but it.
fn delivered(journal: &Journal) -> Result<&str, Refused> {
    for channel in journal.channels() {
        match channel {
            Channel::Content => {}
            // Templates drop it, and a parser at the other end may take the answer for more of it.
            Channel::Reasoning(_) => return Err(Refused::Reasoning),
            Channel::ToolName(_) | Channel::ToolArguments(_) => return Err(Refused::ToolsBegun),
            Channel::Refusal => return Err(Refused::Refusal),
            // Only replayed.
            Channel::Block(_) | Channel::Thought(_) | Channel::Mark => return Err(Refused::Engine),
        }
    }
    let text = std::str::from_utf8(journal.text()).map_err(|_| Refused::Unreadable)?;
    if text.is_empty() { Err(Refused::NothingDelivered) } else { Ok(text) }
}

/// Tokens of the text, where ids tell.
pub(super) fn told_by_ids(journal: &Journal) -> Option<u64> {
    journal.ids.seam().filter(|seam| seam.text == journal.text().len()).map(|seam| seam.ids as u64)
}

/// The same seed would repeat the draws of the first tokens.
pub(super) fn next_seed(seed: u64, delivered: &str) -> u64 {
    // FNV-1a over what makes this leg differ from the one before.
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    let start = seed.to_le_bytes().into_iter().fold(0xCBF2_9CE4_8422_2325, mix);
    delivered.bytes().fold(start, mix) & SEED_MAX
}

/// What the request says that a continuation must know.
#[derive(Default)]
pub(super) struct Asked<'a> {
    /// Behind the opening brace.
    pub(super) inside: usize,
    pub(super) messages: Option<Value<'a>>,
    pub(super) prompt: Option<Value<'a>>,
    pub(super) max_tokens: Option<Value<'a>>,
    pub(super) max_completion_tokens: Option<Value<'a>>,
    n_predict: Option<Value<'a>>,
    pub(super) min_tokens: Option<Value<'a>>,
    pub(super) seed: Option<Value<'a>>,
    pub(super) model: Option<Value<'a>>,
    pub(super) return_token_ids: Option<Value<'a>>,
    pub(super) stops: Vec<Vec<u8>>,
    stop_is_written: bool,
    refused: Option<Refused>,
}

impl<'a> Asked<'a> {
    pub(super) fn read(endpoint: Endpoint, body: &'a [u8]) -> Result<Self, Refused> {
        let open = memchr::memchr(b'{', body).ok_or(Refused::Body)?;
        let mut asked = Self { inside: open + 1, ..Self::default() };
        let mut twice = false;
        scan_top_level(body, |name, value| {
            twice |= asked.member(endpoint, name, value);
            ControlFlow::Continue(())
        })
        .map_err(|_| Refused::Body)?;
        // Which of them counts is the engine's choice.
        if twice {
            return Err(Refused::Body);
        }
        if asked.stop_is_written && !asked.stops.is_empty() {
            return Err(Refused::Stop);
        }
        asked.refused.map_or(Ok(asked), Err)
    }

    /// Returns whether it was there before.
    fn member(&mut self, endpoint: Endpoint, name: &[u8], value: Value<'a>) -> bool {
        let is_true = value.as_bool() == Some(true);
        let set = !value.is_blank() && value.as_bool() != Some(false);
        let refused = match name {
            b"messages" => return self.messages.replace(value).is_some(),
            b"prompt" => return self.prompt.replace(value).is_some(),
            b"max_tokens" => return self.max_tokens.replace(value).is_some(),
            b"max_completion_tokens" => return self.max_completion_tokens.replace(value).is_some(),
            b"n_predict" => return self.n_predict.replace(value).is_some(),
            b"min_tokens" => return self.min_tokens.replace(value).is_some(),
            b"seed" => return self.seed.replace(value).is_some(),
            b"model" => return self.model.replace(value).is_some(),
            b"return_token_ids" => return self.return_token_ids.replace(value).is_some(),
            b"stop" => {
                let again = !self.stops.is_empty();
                let one = Some(value).filter(|value| value.kind() == Kind::String);
                for stop in value.elements().chain(one).filter_map(|stop| stop.as_str()) {
                    if !stop.is_empty() {
                        self.stops.push(stop.as_bytes().to_vec());
                    }
                }
                return again;
            }
            b"include_stop_str_in_output" => {
                self.stop_is_written = is_true;
                return false;
            }
            b"response_format" => {
                let kind = value.get("type").and_then(|kind| kind.as_str());
                (set && kind.as_deref() != Some("text")).then_some(Refused::Grammar)
            }
            b"structured_outputs"
            | b"guided_json"
            | b"guided_regex"
            | b"guided_choice"
            | b"guided_grammar"
            | b"grammar"
            | b"json_schema"
            | b"regex"
            | b"ebnf"
            | b"structural_tag" => set.then_some(Refused::Grammar),
            b"tool_choice" => {
                let word = value.as_str();
                let free = matches!(word.as_deref(), Some("auto" | "none"));
                (set && !free).then_some(Refused::Grammar)
            }
            b"logprobs" | b"top_logprobs" | b"prompt_logprobs" | b"n_probs" => {
                // 0 is "that of the token itself" in completions and "none" in chat.
                let none = endpoint == Endpoint::ChatCompletions && value.as_u64() == Some(0);
                (set && !none).then_some(Refused::Details)
            }
            // Thoughts that the client is not shown are lost as well.
            b"include_reasoning" => (value.as_bool() == Some(false)).then_some(Refused::Reasoning),
            b"echo" => is_true.then_some(Refused::Details),
            b"continue_final_message" | b"add_generation_prompt" => set.then_some(Refused::Prefilled),
            b"suffix" | b"prompt_embeds" | b"truncate_prompt_tokens" => set.then_some(Refused::Prompt),
            b"mirostat" => (set && value.as_u64() != Some(0)).then_some(Refused::Sampler),
            b"use_beam_search" => is_true.then_some(Refused::Sampler),
            _ => None,
        };
        self.refused = self.refused.or(refused);
        false
    }

    /// Whether the client is to see ids.
    pub(super) fn wants_ids(&self) -> bool {
        self.return_token_ids.and_then(|wanted| wanted.as_bool()) == Some(true)
    }

    /// Another leg draws other numbers.
    pub(super) fn change_seed(&self, delivered: &str, edits: &mut Edits) {
        if let Some((seed, number)) = self.seed.and_then(|seed| Some((seed, seed.as_u64()?))) {
            edits.replace(seed.span(), next_seed(number, delivered).to_string());
        }
    }

    /// The most tokens that may be generated, where it is known; `Ok(None)`: as many as fit.
    pub(super) fn tokens_max(&self, endpoint: Endpoint, engine: Engine) -> Result<Option<u64>, Refused> {
        let set = |limit: Option<Value<'a>>| limit.filter(|limit| !limit.is_null());
        match set(self.max_completion_tokens).or(set(self.max_tokens)) {
            Some(limit) => limit.as_u64().map(Some).ok_or(Refused::Body),
            None if endpoint == Endpoint::Completions && engine != Engine::LlamaCpp => {
                Ok(Some(COMPLETION_TOKENS_DEFAULT))
            }
            None => Ok(None),
        }
    }

    /// What was generated counts towards the limits, and must be known where there are any.
    pub(super) fn reduce_limits(
        &self,
        endpoint: Endpoint,
        engine: Engine,
        spent: Option<u64>,
        edits: &mut Edits,
    ) -> Result<(), Refused> {
        for limit in [self.max_tokens, self.max_completion_tokens, self.n_predict].into_iter().flatten() {
            // llama.cpp's -1.
            if limit.is_null() || limit.raw().starts_with(b"-") {
                continue;
            }
            let limit_tokens = limit.as_u64().ok_or(Refused::Body)?;
            let left = limit_tokens.saturating_sub(spent.ok_or(Refused::TokensUnknown)?);
            if left == 0 {
                return Err(Refused::LimitReached);
            }
            edits.replace(limit.span(), left.to_string());
        }
        let unlimited = self.max_tokens.is_none_or(|limit| limit.is_null());
        if endpoint == Endpoint::Completions && engine != Engine::LlamaCpp && unlimited {
            let left = COMPLETION_TOKENS_DEFAULT.saturating_sub(spent.ok_or(Refused::TokensUnknown)?);
            if left == 0 {
                return Err(Refused::LimitReached);
            }
            match self.max_tokens {
                Some(null) => edits.replace(null.span(), left.to_string()),
                None => edits.replace(self.inside..self.inside, format!("\"max_tokens\":{left},")),
            }
        }
        if let Some(least) = self.min_tokens.filter(|least| !least.is_null()) {
            let tokens = least.as_u64().ok_or(Refused::Body)?;
            if tokens > 0 {
                let left = tokens.saturating_sub(spent.ok_or(Refused::TokensUnknown)?);
                edits.replace(least.span(), left.to_string());
            }
        }
        Ok(())
    }
}

/// What the first new text of a continuation is judged by.
#[derive(Clone, Debug)]
pub(super) struct Seam {
    /// Beginnings of what the engine was given; new text that begins so is no new text.
    echoes: Vec<Vec<u8>>,
    stops: Vec<Vec<u8>>,
    /// The end of what the client holds, as long as a stop string may reach back.
    tail: Vec<u8>,
    text: Vec<u8>,
}

/// What is to be done with the new text so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may still turn out to be an echo or a stop string: hold it.
    Wait,
    /// It is new.
    Clear,
    /// It completes a stop string that began in what the client holds: the answer has ended.
    Stopped,
    /// It is what the engine was given.
    Echo,
}

impl Seam {
    fn new(echoes: &[&[u8]], stops: Vec<Vec<u8>>, delivered: &[u8]) -> Self {
        let reach = stops.iter().map(Vec::len).max().unwrap_or(0);
        Self {
            echoes: echoes
                .iter()
                .filter(|given| given.len() >= ECHO_BYTES_MIN)
                .map(|given| given[..given.len().min(ECHO_BYTES_MAX)].to_vec())
                .collect(),
            stops,
            tail: delivered[delivered.len().saturating_sub(reach)..].to_vec(),
            text: Vec::new(),
        }
    }

    /// Judges all new text so far, of which `text` is the latest; `last`: no more will come.
    pub(super) fn judge(&mut self, text: &[u8], last: bool) -> Verdict {
        self.text.extend_from_slice(text);
        let new = &self.text[..];
        let mut wait = false;
        for stop in &self.stops {
            for cut in 1..stop.len() {
                if self.tail.ends_with(&stop[..cut]) {
                    if new.starts_with(&stop[cut..]) {
                        return Verdict::Stopped;
                    }
                    wait |= stop[cut..].starts_with(new);
                }
            }
        }
        for given in &self.echoes {
            if new.starts_with(given) {
                return Verdict::Echo;
            }
            wait |= given.starts_with(new);
        }
        if wait && !last { Verdict::Wait } else { Verdict::Clear }
    }

    /// Bytes on the heap.
    pub(super) fn held(&self) -> usize {
        let lists: usize = self.echoes.iter().chain(&self.stops).map(Vec::len).sum();
        lists + self.tail.len() + self.text.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seam_counts_all_that_it_holds() {
        let mut seam = Seam::new(&[&[b'e'; 40]], vec![vec![b's'; 30]], &[b'd'; 90]);
        assert_eq!(seam.held(), 40 + 30 + 30);
        assert_eq!(seam.judge(&[b'e'; 20], false), Verdict::Wait);
        assert!((120..200).contains(&seam.held()), "{}", seam.held());
    }

    #[test]
    fn another_leg_draws_other_numbers_that_every_engine_takes() {
        for seed in [0, 1, 42, u64::MAX] {
            assert!(next_seed(seed, "said") <= SEED_MAX && next_seed(seed, "more") <= SEED_MAX);
            assert_ne!(next_seed(seed, "said"), next_seed(seed, "more"));
        }
    }

    #[test]
    fn what_a_continuation_would_lose_refuses_it() {
        for (member, refused) in [
            (r#""echo":true"#, Some(Refused::Details)),
            (r#""echo":false"#, None),
            (r#""use_beam_search":true"#, Some(Refused::Sampler)),
            (r#""use_beam_search":false"#, None),
            (r#""mirostat":2"#, Some(Refused::Sampler)),
            (r#""mirostat":0"#, None),
        ] {
            let body = format!(r#"{{"prompt":"p",{member}}}"#);
            assert_eq!(Asked::read(Endpoint::Completions, body.as_bytes()).err(), refused, "{member}");
        }
    }

    #[test]
    fn a_limit_that_an_engine_would_assume_is_told_to_it() {
        for (endpoint, engine, limit, expected) in [
            (Endpoint::Completions, Engine::Vllm, "", r#"{"max_tokens":13,"prompt":"p"}"#),
            (
                Endpoint::Completions,
                Engine::Sglang,
                r#","max_tokens":null"#,
                r#"{"prompt":"p","max_tokens":13}"#,
            ),
            (Endpoint::Completions, Engine::LlamaCpp, "", r#"{"prompt":"p"}"#),
            (Endpoint::ChatCompletions, Engine::Vllm, "", r#"{"prompt":"p"}"#),
        ] {
            let body = format!(r#"{{"prompt":"p"{limit}}}"#);
            let asked = Asked::read(endpoint, body.as_bytes()).unwrap();
            let mut edits = Edits::default();
            asked.reduce_limits(endpoint, engine, Some(3), &mut edits).unwrap();
            assert_eq!(String::from_utf8(edits.apply(body.as_bytes())).unwrap(), expected, "{engine:?}");
        }
    }

    #[test]
    fn every_limit_loses_what_was_spent() {
        for (limits, expected) in [
            (r#""max_tokens":10"#, r#""max_tokens":7"#),
            (r#""max_completion_tokens":10,"max_tokens":9"#, r#""max_completion_tokens":7,"max_tokens":6"#),
            (r#""n_predict":10,"max_tokens":-1"#, r#""n_predict":7,"max_tokens":-1"#),
            (r#""max_tokens":10,"min_tokens":5"#, r#""max_tokens":7,"min_tokens":2"#),
            (r#""max_tokens":10,"min_tokens":2"#, r#""max_tokens":7,"min_tokens":0"#),
            (r#""max_tokens":10,"min_tokens":0"#, r#""max_tokens":7,"min_tokens":0"#),
        ] {
            let body = format!(r#"{{"prompt":"p",{limits}}}"#);
            let asked = Asked::read(Endpoint::Completions, body.as_bytes()).unwrap();
            let mut edits = Edits::default();
            asked.reduce_limits(Endpoint::Completions, Engine::LlamaCpp, Some(3), &mut edits).unwrap();
            let reduced = String::from_utf8(edits.apply(body.as_bytes())).unwrap();
            assert_eq!(reduced, format!(r#"{{"prompt":"p",{expected}}}"#));
        }
    }
}
