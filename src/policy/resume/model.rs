//! A deterministic model behind four engines, for tests: what it says next depends on all text before and
//! on nothing else, so that an answer that was continued from its true beginning equals the uncut one, and one
//! that was continued from anything else does not.
//!
//! The skins differ as the engines do: where role, finish and usage stand, which members are constant, how
//! lines end. Characters beyond ASCII are made of byte tokens, which give events without text.

use serde_json::{Value, json};

use crate::policy::dialect::Engine;

/// Whose framing is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skin {
    /// Role event first; finish with the last text; `created` constant.
    Vllm,
    /// Role event first; finish in an event of its own; `created` per event.
    Sglang,
    /// Role with the first text; finish alone; fingerprint in each event; comments.
    LlamaCpp,
    /// Role in every event; `id` empty; usage with the finish; CRLF and trailing spaces.
    Generic,
}

impl Skin {
    pub(super) const ALL: [Self; 4] = [Self::Vllm, Self::Sglang, Self::LlamaCpp, Self::Generic];

    pub(super) fn engine(self) -> Option<Engine> {
        match self {
            Self::Vllm => Some(Engine::Vllm),
            Self::Sglang => Some(Engine::Sglang),
            Self::LlamaCpp => Some(Engine::LlamaCpp),
            Self::Generic => None,
        }
    }
}

/// One replica's way of answering once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Voice {
    pub(super) skin: Skin,
    /// Goes into ids, times and fingerprints.
    pub(super) leg: u64,
    /// Tokens in an event: this many, or, when 0, one to five in turn.
    pub(super) tokens: usize,
    pub(super) chat: bool,
    /// Usage in every event.
    pub(super) continuous: bool,
    pub(super) details: bool,
}

impl Voice {
    pub(super) fn new(skin: Skin, leg: u64, tokens: usize) -> Self {
        Self { skin, leg, tokens, chat: true, continuous: false, details: false }
    }
}

/// A part of an answer.
#[derive(Clone, Debug)]
pub(super) enum Part {
    Text(&'static str, String),
    Tool(u32, &'static str, String),
}

/// An answer, and why it ends.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) parts: Vec<Part>,
    pub(super) finish: &'static str,
}

impl Answer {
    pub(super) fn text(text: &str) -> Self {
        Self { parts: vec![Part::Text("content", text.to_owned())], finish: "stop" }
    }
}

/// ASCII is a token a character; everything else is a token a byte.
fn tokens(text: &str) -> Vec<Vec<u8>> {
    text.bytes().map(|byte| vec![byte]).collect()
}

/// Texts of the events that say `text`, with how many tokens each was made of.
pub(super) fn pieces(text: &str, voice: Voice) -> Vec<(String, usize)> {
    let all = tokens(text);
    let mut out = Vec::new();
    let mut pending: Vec<u8> = Vec::new();
    let mut at = 0;
    while at < all.len() {
        let len = if voice.tokens > 0 { voice.tokens } else { (out.len() + voice.leg as usize) * 7 % 5 + 1 };
        let group = &all[at..all.len().min(at + len)];
        at += group.len();
        pending.extend(group.concat());
        let whole = match std::str::from_utf8(&pending) {
            Ok(text) => text.len(),
            Err(fault) => fault.valid_up_to(),
        };
        let rest = pending.split_off(whole);
        out.push((String::from_utf8(std::mem::replace(&mut pending, rest)).unwrap(), group.len()));
    }
    out
}

/// The bytes of a whole answer.
pub(super) fn wire(answer: &Answer, voice: Voice) -> Vec<u8> {
    let mut deltas: Vec<(Value, usize)> = Vec::new();
    for part in &answer.parts {
        match part {
            Part::Text(name, text) => {
                deltas.extend(pieces(text, voice).into_iter().map(|(text, n)| (json!({ *name: text }), n)));
            }
            Part::Tool(index, name, arguments) => {
                let id = format!("call-{}-{index}", voice.leg);
                let mut pieces = pieces(arguments, voice);
                // Some say the name alone, some with the first arguments.
                let first = if voice.leg.is_multiple_of(2) { pieces.remove(0) } else { (String::new(), 1) };
                deltas.push((
                    json!({"tool_calls": [{"index": index, "id": id, "type": "function",
                        "function": {"arguments": first.0, "name": name}}]}),
                    first.1,
                ));
                deltas.extend(pieces.into_iter().map(|(text, n)| {
                    (json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]}), n)
                }));
            }
        }
    }
    let total: usize = deltas.iter().map(|(_, n)| n).sum();
    let mut out = Vec::new();
    let mut events = 0;
    let mut said = 0;
    let mut write = |delta: Option<Value>, finish: Option<&str>, usage: Option<usize>, details: usize| {
        let created = match voice.skin {
            Skin::Sglang | Skin::LlamaCpp => voice.leg * 1000 + events,
            Skin::Vllm | Skin::Generic => voice.leg * 1000,
        };
        let id = if voice.skin == Skin::Generic { String::new() } else { format!("cmpl-{}", voice.leg) };
        let choices: Vec<Value> = delta
            .into_iter()
            .map(|delta| {
                let mut choice = json!({"index": 0, "finish_reason": finish});
                match voice.chat {
                    true => choice["delta"] = delta,
                    false => choice["text"] = delta["content"].as_str().unwrap_or("").into(),
                }
                if details > 0 {
                    let list: Vec<Value> = (0..details).map(|_| json!({"token": "?"})).collect();
                    choice["logprobs"] = json!({"content": list});
                }
                choice
            })
            .collect();
        let mut event = json!({"id": id, "object": "chat.completion.chunk", "created": created,
            "model": "m", "choices": choices});
        if voice.skin == Skin::LlamaCpp {
            event["system_fingerprint"] = format!("b{}", voice.leg).into();
        }
        if let Some(completion) = usage {
            event["usage"] = json!({"prompt_tokens": 7, "total_tokens": 7 + completion,
                "completion_tokens": completion});
        }
        events += 1;
        match voice.skin {
            Skin::Generic => out.extend_from_slice(format!("data:{event} \r\n\r\n").as_bytes()),
            Skin::LlamaCpp => out.extend_from_slice(format!(": beat\n\ndata: {event}\n\n").as_bytes()),
            Skin::Vllm | Skin::Sglang => out.extend_from_slice(format!("data: {event}\n\n").as_bytes()),
        }
    };
    if voice.chat && matches!(voice.skin, Skin::Vllm | Skin::Sglang) {
        write(Some(json!({"role": "assistant", "content": ""})), None, None, 0);
    }
    let count = deltas.len();
    let finish_apart = matches!(voice.skin, Skin::Sglang | Skin::LlamaCpp) || count == 0;
    for (place, (mut delta, n)) in deltas.into_iter().enumerate() {
        said += n;
        if voice.skin == Skin::Generic || (voice.skin == Skin::LlamaCpp && place == 0) {
            delta["role"] = "assistant".into();
        }
        let last = place + 1 == count && !finish_apart;
        let usage = voice.continuous || (last && voice.skin == Skin::Generic);
        let details = if voice.details { n } else { 0 };
        write(Some(delta), last.then_some(answer.finish), usage.then_some(said), details);
    }
    if finish_apart {
        write(Some(json!({})), Some(answer.finish), None, 0);
    }
    if voice.skin != Skin::Generic {
        write(None, None, Some(total), 0);
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
    out
}

const LETTERS: [&str; 24] = [
    "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", " ", " ", "\n", "\t", "\"", "\\", "é", "漢", "字",
    "🦀", "0", "1", ",", "k",
];

/// The next letter after `text`; `None`: the end.
fn next(text: &str) -> Option<&'static str> {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    let hash = text.bytes().fold(0xCBF2_9CE4_8422_2325, mix);
    let hash = (hash ^ (hash >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    if (hash >> 40).is_multiple_of(45) { None } else { Some(LETTERS[((hash >> 20) % 24) as usize]) }
}

/// What a replica of this skin does with a request, as far as the tests go.
pub(super) fn generate(skin: Skin, body: &[u8]) -> Result<Answer, &'static str> {
    let body: Value = serde_json::from_slice(body).map_err(|_| "not JSON")?;
    let prompt = match body["prompt"].as_str() {
        Some(prompt) => prompt.to_owned(),
        None => render(skin, &body)?,
    };
    let limit = ["max_tokens", "max_completion_tokens"].iter().find_map(|name| body[*name].as_u64());
    let limit = match (limit, body["prompt"].is_string() && skin != Skin::LlamaCpp) {
        (Some(limit), _) => limit as usize,
        (None, true) => 16,
        (None, false) => 200,
    };
    let stops: Vec<&str> = body["stop"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut text = prompt.clone();
    let mut finish = "stop";
    while let Some(letter) = next(&text) {
        // A letter of several bytes that does not fit is never told.
        if text.len() + letter.len() - prompt.len() > limit {
            finish = "length";
            break;
        }
        text.push_str(letter);
        let new = &text[prompt.len()..];
        if let Some(at) = stops.iter().filter_map(|stop| new.find(stop)).min() {
            text.truncate(prompt.len() + at);
            break;
        }
        if text.len() - prompt.len() == limit {
            finish = "length";
            break;
        }
    }
    Ok(Answer { parts: vec![Part::Text("content", text[prompt.len()..].to_owned())], finish })
}

fn render(skin: Skin, body: &Value) -> Result<String, &'static str> {
    let messages = body["messages"].as_array().ok_or("no messages")?;
    let flagged = body["continue_final_message"] == true;
    if flagged && body["add_generation_prompt"] != false {
        return Err("both flags");
    }
    let mut prompt = String::new();
    for (place, message) in messages.iter().enumerate() {
        let (role, content) = (message["role"].as_str().unwrap(), message["content"].as_str().unwrap());
        // As many templates of vLLM's models do.
        let content = if skin == Skin::Vllm { content.trim_end() } else { content };
        let last = place + 1 == messages.len() && role == "assistant";
        if last && (flagged || skin == Skin::LlamaCpp) {
            return Ok(format!("{prompt}assistant:{content}"));
        }
        prompt.push_str(&format!("{role}:{content}\n"));
    }
    Ok(prompt + "assistant:")
}
