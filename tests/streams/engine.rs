//! A scripted engine: what it says is a function of all text before, how it says it is an engine's own way.
//!
//! The skins have the quirks that a splice must bear: where role, finish and usage stand, which members are new in
//! each event, comments, line ends, tokens that are no whole characters. A request says in `x-cut` where its stream
//! breaks; only engines that are told to break do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::{Value, json};

use crate::support::backend::{RequestSeen, Script};
use crate::support::reply::{self, Step};
use crate::view::Voice;

/// Whose framing is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skin {
    /// Role first; finish with the last text; `created` constant.
    Vllm,
    /// Role first; finish in an event of its own; `created` in each event another.
    Sglang,
    /// Role and null first; finish alone; `created` and fingerprint in each event; comments; timings.
    LlamaCpp,
    /// `id` empty; role in each event; usage with the finish; CRLF and a space before it.
    Generic,
}

impl Skin {
    pub const ALL: [Self; 4] = [Self::Vllm, Self::Sglang, Self::LlamaCpp, Self::Generic];

    /// `probe.preset`, by which evergate knows it.
    pub fn preset(self) -> Option<&'static str> {
        match self {
            Self::Vllm => Some("vllm"),
            Self::Sglang => Some("sglang"),
            Self::LlamaCpp => Some("llamacpp"),
            Self::Generic => None,
        }
    }

    pub fn voice(self) -> Voice {
        Voice {
            created_is_constant: matches!(self, Self::Vllm | Self::Generic),
            role_in_each: self == Self::Generic,
        }
    }

    /// An event is whole so many bytes before its last one: a client reads on at the first byte of an empty line.
    fn spare(self) -> usize {
        usize::from(self == Self::Generic)
    }
}

/// How bytes are put into chunks of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// An event a write.
    Event,
    /// All that there is in one.
    AtOnce,
    /// A byte a write.
    Byte,
}

/// One replica.
#[derive(Clone, Debug)]
pub struct Engine {
    pub skin: Skin,
    /// Tokens in an event: this many, or, when 0, one to four in turn.
    pub tokens: usize,
    /// Goes into ids, times and fingerprints.
    pub number: u64,
    /// Whether it minds `x-cut`.
    pub breaks: bool,
}

/// An answer in events.
#[derive(Clone, Debug)]
pub struct Wire {
    pub events: Vec<Vec<u8>>,
    /// Which of them has the first text, and which the finish.
    pub first: usize,
    pub finish: usize,
    spare: usize,
}

impl Wire {
    pub fn bytes(&self) -> Vec<u8> {
        self.events.concat()
    }

    /// Whole events in the first `bytes`.
    pub fn whole(&self, bytes: usize) -> usize {
        let mut end = 0;
        let whole = |event: &&Vec<u8>| {
            end += event.len();
            end - self.spare <= bytes
        };
        self.events.iter().take_while(whole).count()
    }
}

impl Engine {
    /// A backend's script. Each request gets an id of its own.
    pub fn script(self) -> Script {
        let asked = Arc::new(AtomicU64::new(0));
        Script::new().by_request(move |request| match request.path() {
            "/health" => reply::json(200, &json!({"status": "ok"})),
            "/v1/chat/completions" | "/v1/completions" => {
                self.answer(request, asked.fetch_add(1, Relaxed) * 1000)
            }
            // Nothing that a broken connection could bring into doubt.
            _ => reply::error(404),
        })
    }

    fn answer(&self, request: &RequestSeen, asked: u64) -> Vec<Step> {
        let body = request.json();
        let Ok(wire) = self.wire(&body, asked) else { return reply::error(400) };
        let cut = request.header("x-cut").filter(|_| self.breaks).and_then(Cut::parse);
        let writes = cut.as_ref().map_or(Writes::Event, |cut| cut.writes);
        let whole = wire.bytes();
        let at = cut.as_ref().map_or(whole.len(), |cut| cut.at.min(whole.len()));
        let mut pieces: Vec<&[u8]> = Vec::new();
        match writes {
            Writes::AtOnce => pieces.push(&whole[..at]),
            Writes::Byte => pieces.extend(whole[..at].chunks(1)),
            Writes::Event => {
                let mut from = 0;
                for event in &wire.events {
                    let end = (from + event.len()).min(at);
                    pieces.push(&whole[from.min(at)..end]);
                    from += event.len();
                }
            }
        }
        let mut steps = vec![reply::sse_head()];
        steps.extend(pieces.into_iter().filter(|piece| !piece.is_empty()).map(reply::chunk));
        match cut.map(|cut| cut.end) {
            None | Some(Break::Clean) => steps.push(reply::last_chunk()),
            Some(Break::Fin) => steps.push(Step::Fin),
            Some(Break::Reset) => steps.push(Step::Rst),
            Some(Break::HalfChunk) => steps.extend([Step::send("7d\r\ndata"), Step::Fin]),
        }
        steps
    }

    /// What it says to a request; `asked` goes into its id.
    pub fn wire(&self, body: &Value, asked: u64) -> Result<Wire, &'static str> {
        let (prompt, chat) = match body["prompt"].as_str() {
            Some(prompt) => (prompt.to_owned(), false),
            None => (self.rendered(body)?, true),
        };
        let (text, finish) = said(&prompt, body, chat || self.skin == Skin::LlamaCpp);
        Ok(self.framed(&text, finish, prompt.len(), body, chat, self.number + asked))
    }

    fn framed(
        &self,
        text: &str,
        finish: &str,
        prompt_tokens: usize,
        body: &Value,
        chat: bool,
        name: u64,
    ) -> Wire {
        let skin = self.skin;
        let asked = &body["stream_options"];
        let usage = |tokens: usize| {
            json!({"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens,
                "completion_tokens": tokens})
        };
        let continuous = asked["continuous_usage_stats"] == true && matches!(skin, Skin::Vllm | Skin::Sglang);
        let mut events = Vec::new();
        let mut event = |choices: Value, usage: Option<Value>| {
            let created = match skin {
                Skin::Sglang | Skin::LlamaCpp => name + events.len() as u64,
                Skin::Vllm | Skin::Generic => name,
            };
            let id = if skin == Skin::Generic { String::new() } else { format!("c-{name}") };
            let mut chunk = json!({"id": id, "created": created, "model": "m", "choices": choices});
            if skin == Skin::LlamaCpp {
                chunk["system_fingerprint"] = format!("b{}", self.number).into();
            }
            if let Some(usage) = usage {
                chunk["usage"] = usage;
                if skin == Skin::LlamaCpp {
                    chunk["timings"] = json!({"predicted_n": 1});
                }
            }
            events.push(match skin {
                Skin::Generic => format!("data:{chunk} \r\n\r\n").into_bytes(),
                Skin::LlamaCpp if events.len() % 3 == 1 => format!(": \n\ndata: {chunk}\n\n").into_bytes(),
                _ => format!("data: {chunk}\n\n").into_bytes(),
            });
        };
        let choice = |mut delta: Value, finish: Option<&str>| {
            let mut choice = json!({"index": 0, "finish_reason": finish});
            if !chat {
                choice["text"] = delta["content"].as_str().unwrap_or_default().into();
            } else {
                if skin == Skin::Generic {
                    delta["role"] = "assistant".into();
                }
                choice["delta"] = delta;
            }
            match (skin, finish) {
                (Skin::Vllm, Some(_)) => choice["stop_reason"] = Value::Null,
                (Skin::Sglang, Some(_)) => choice["matched_stop"] = 2.into(),
                _ => {}
            }
            json!([choice])
        };
        let mut opening = 0;
        if chat && skin != Skin::Generic {
            let content = if skin == Skin::LlamaCpp { Value::Null } else { "".into() };
            let start = continuous.then(|| usage(0));
            event(choice(json!({"role": "assistant", "content": content}), None), start);
            opening = 1;
        }
        let pieces = self.pieces(text);
        let (mut told, mut first) = (0, None);
        let together = matches!(skin, Skin::Vllm | Skin::Generic) && !pieces.is_empty();
        let with_finish = asked["include_usage"] == true && skin == Skin::Generic;
        for (place, (piece, tokens)) in pieces.iter().enumerate() {
            told += tokens;
            if !piece.is_empty() {
                first.get_or_insert(opening + place);
            }
            let finish = (together && place + 1 == pieces.len()).then_some(finish);
            let counted = continuous || (with_finish && finish.is_some());
            event(choice(json!({"content": piece}), finish), counted.then(|| usage(told)));
        }
        if !together {
            event(choice(json!({}), Some(finish)), (continuous || with_finish).then(|| usage(told)));
        }
        let last = opening + pieces.len() + usize::from(!together) - 1;
        if asked["include_usage"] == true && skin != Skin::Generic {
            event(json!([]), Some(usage(told)));
        }
        events.push(if skin == Skin::Generic { "data: [DONE]\r\n\r\n" } else { "data: [DONE]\n\n" }.into());
        Wire { events, first: first.unwrap_or(last), finish: last, spare: skin.spare() }
    }

    /// The text in pieces of whole tokens and whole characters; a token that completes none has an empty one.
    fn pieces(&self, text: &str) -> Vec<(String, usize)> {
        let (mut pieces, mut bytes, mut from, mut turn) = (Vec::new(), text.as_bytes(), 0, 0);
        while !bytes.is_empty() {
            turn += 1;
            let take = if self.tokens == 0 { turn % 4 + 1 } else { self.tokens };
            let take = take.min(bytes.len());
            bytes = &bytes[take..];
            let mut end = text.len() - bytes.len();
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            pieces.push((text[from..end].to_owned(), take));
            from = end;
        }
        pieces
    }

    /// The chat as text, with what the assistant has already said where this engine goes on with it.
    fn rendered(&self, body: &Value) -> Result<String, &'static str> {
        let messages = body["messages"].as_array().ok_or("no messages")?;
        let flagged = body["continue_final_message"] == true;
        if flagged && body["add_generation_prompt"] != false {
            return Err("both flags");
        }
        let mut prompt = String::new();
        for (place, message) in messages.iter().enumerate() {
            let role = message["role"].as_str().ok_or("no role")?;
            let content = message["content"].as_str().ok_or("no content")?;
            // As many templates of vLLM's models do.
            let content = if self.skin == Skin::Vllm { content.trim_end() } else { content };
            let last = place + 1 == messages.len() && role == "assistant";
            if last && (flagged || self.skin == Skin::LlamaCpp) {
                return Ok(format!("{prompt}assistant:{content}"));
            }
            prompt += &format!("{role}:{content}\n");
        }
        Ok(prompt + "assistant:")
    }
}

/// Where and how a stream breaks: `AT END WRITES`.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Bytes of the events that are sent.
    pub at: usize,
    pub end: Break,
    pub writes: Writes,
}

/// The end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// FIN without the end of the body.
    Fin,
    /// The body ends well.
    Clean,
    Reset,
    /// FIN inside a chunk.
    HalfChunk,
}

impl Break {
    pub const ALL: [Self; 4] = [Self::Fin, Self::Clean, Self::Reset, Self::HalfChunk];
}

impl Writes {
    pub const ALL: [Self; 3] = [Self::Event, Self::AtOnce, Self::Byte];
}

impl Cut {
    pub fn header(self) -> String {
        let place = |all: usize| all.to_string();
        let end = Break::ALL.iter().position(|end| *end == self.end).unwrap();
        let writes = Writes::ALL.iter().position(|writes| *writes == self.writes).unwrap();
        [place(self.at), place(end), place(writes)].join(" ")
    }

    fn parse(header: &str) -> Option<Self> {
        let mut numbers = header.split(' ').map(|number| number.parse::<usize>());
        let mut next = || numbers.next()?.ok();
        Some(Self { at: next()?, end: Break::ALL[next()?], writes: Writes::ALL[next()?] })
    }
}

const LETTERS: [&str; 20] = [
    "a", "b", "c", "d", "e", "f", "g", "h", " ", " ", "\n", "\t", "\"", "\\", "é", "漢", "🦀", "0", ",", "k",
];

/// The next letter after `text`; `None`: the end.
fn next(text: &str) -> Option<&'static str> {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    let hash = text.bytes().fold(0xCBF2_9CE4_8422_2325, mix);
    let hash = (hash ^ (hash >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    if (hash >> 40).is_multiple_of(24) { None } else { Some(LETTERS[((hash >> 20) % 20) as usize]) }
}

/// What follows a prompt, within the request's limits, and why it ends.
fn said(prompt: &str, body: &Value, unlimited: bool) -> (String, &'static str) {
    let asked = ["max_tokens", "max_completion_tokens"].iter().find_map(|name| body[*name].as_u64());
    let limit = asked.map_or(if unlimited { 1000 } else { 16 }, |limit| limit as usize);
    let stops: Vec<&str> = body["stop"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut text = prompt.to_owned();
    let mut finish = "stop";
    while let Some(letter) = next(&text) {
        // A letter of several bytes that does not fit is never told.
        if text.len() + letter.len() - prompt.len() > limit {
            finish = "length";
            break;
        }
        text.push_str(letter);
        if let Some(at) = stops.iter().filter_map(|stop| text[prompt.len()..].find(stop)).min() {
            text.truncate(prompt.len() + at);
            break;
        }
        if text.len() - prompt.len() == limit {
            finish = "length";
            break;
        }
    }
    (text.split_off(prompt.len()), finish)
}

/// A question whose answer has `letters` letters, among them what is hard to carry.
pub fn question(letters: std::ops::Range<usize>, hard: &[&str]) -> String {
    let fits = |question: &String| {
        let prompt = format!("user:{question}\nassistant:");
        let (text, _) = said(&prompt, &Value::Null, true);
        letters.contains(&text.chars().count()) && hard.iter().all(|hard| text.contains(hard))
    };
    (0..).map(|number| format!("q{number}")).find(fits).unwrap()
}
