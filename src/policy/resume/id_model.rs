//! A deterministic model over token ids behind two engines, for tests: the next id depends on all ids before it and on
//! nothing else, so that an answer continued from other ids than its own is another answer.
//!
//! The vocabulary is as unkind as real ones: the same text by different tokens, characters in the bytes of several,
//! tokens that end within a character that they did not begin, special tokens without text. The two detokenizers hold
//! unfinished characters back as their engines do, and go wrong where those do when a prompt ends within one.

use serde_json::Value;

use crate::policy::dialect::Engine;

const EOS: u32 = 9000;
const SPECIAL: u32 = 9001;
const BOS: u32 = 9002;

/// Tokens of several bytes; single bytes are their own ids.
const MERGED: [&[u8]; 14] = [
    b"HAV",
    b"ING",
    b"H",
    b"AVING",
    b" the",
    b"\n\n",
    "漢".as_bytes(),
    "字".as_bytes(),
    b"a\xE6",
    b" \xE6",
    b"\xBC\xA2!",
    b"\"\\",
    b"  ",
    b"ab",
];
const MERGED_FROM: u32 = 300;
/// Characters that are told in bytes.
const BYTED: [&str; 4] = ["漢", "é", "🦀", "字"];

fn bytes_of(id: u32) -> Vec<u8> {
    match id {
        0..256 => vec![id as u8],
        _ => MERGED.get(id.wrapping_sub(MERGED_FROM) as usize).map_or(Vec::new(), |bytes| bytes.to_vec()),
    }
}

/// Bytes behind the last whole character.
fn tail(bytes: &[u8]) -> &[u8] {
    match std::str::from_utf8(bytes) {
        Ok(_) => b"",
        Err(fault) => &bytes[fault.valid_up_to()..],
    }
}

fn tokenize(text: &str) -> Vec<u32> {
    let mut rest = text.as_bytes();
    let mut ids = vec![BOS];
    while !rest.is_empty() {
        let longest =
            (0..MERGED.len()).filter(|&i| rest.starts_with(MERGED[i])).max_by_key(|&i| MERGED[i].len());
        let (id, len) =
            longest.map_or((u32::from(rest[0]), 1), |i| (MERGED_FROM + i as u32, MERGED[i].len()));
        ids.push(id);
        rest = &rest[len..];
    }
    ids
}

fn next(ids: &[u32]) -> u32 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    let hash = ids.iter().flat_map(|id| id.to_le_bytes()).fold(0xCBF2_9CE4_8422_2325, mix);
    let hash = (hash ^ (hash >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 20;
    let bytes: Vec<u8> = ids.iter().rev().take(8).rev().flat_map(|&id| bytes_of(id)).collect();
    // The beginning may lie within a character; the end is what counts.
    let begins = (0..bytes.len().min(4)).find(|&at| bytes[at] & 0xC0 != 0x80).unwrap_or(0);
    match tail(&bytes[begins..]) {
        [] if hash.is_multiple_of(61) => EOS,
        [] if hash.is_multiple_of(13) => SPECIAL,
        [] if hash.is_multiple_of(3) => u32::from(BYTED[(hash / 3 % 4) as usize].as_bytes()[0]),
        [] => {
            let whole = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13];
            MERGED_FROM + whole[(hash / 3 % 13) as usize]
        }
        [0xE6] if hash.is_multiple_of(2) => MERGED_FROM + 10,
        tail => {
            let known = BYTED.iter().find(|known| known.as_bytes().starts_with(tail)).unwrap();
            u32::from(known.as_bytes()[tail.len()])
        }
    }
}

/// What is wrong with an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quirk {
    None,
    /// Its first chunk has no ids of the prompt.
    NoPromptIds,
    /// It takes the ids for text of its own.
    OtherPrompt,
    /// It gives its prompt out (vllm#48853).
    Leak,
    /// A chunk's list lacks an id (vllm#27482), has one too many, or is missing.
    ShortIds,
    ExtraId,
    NoIds,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Server {
    pub(super) engine: Engine,
    pub(super) leg: u64,
    /// Tokens in an event: this many, or, when 0, one to five in turn.
    pub(super) tokens: usize,
    pub(super) quirk: Quirk,
}

impl Server {
    pub(super) fn new(engine: Engine, leg: u64, tokens: usize) -> Self {
        Self { engine, leg, tokens, quirk: Quirk::None }
    }

    /// The whole answer to a request at this path.
    pub(super) fn answer(self, path: &str, body: &[u8]) -> Vec<u8> {
        let body: Value = serde_json::from_slice(body).unwrap();
        let chat = path == "/v1/chat/completions";
        let prompt = match &body["prompt"] {
            Value::String(text) => tokenize(text),
            Value::Array(ids) => ids.iter().map(|id| id.as_u64().unwrap() as u32).collect(),
            _ => tokenize(&format!("user:{}\nassistant:", body["messages"][0]["content"])),
        };
        assert!(chat != body["prompt"].is_array() || !chat, "a chat takes no ids");
        let asked_limit = body["max_completion_tokens"].as_u64().or(body["max_tokens"].as_u64());
        let limit = asked_limit.unwrap_or(if chat { 120 } else { 16 }) as usize;
        let taken = if self.quirk == Quirk::OtherPrompt { tokenize("another") } else { prompt.clone() };
        let (ids, finish) = generate(&taken, limit);
        self.wire(chat, &body, &taken, &ids, finish)
    }

    fn wire(self, chat: bool, body: &Value, prompt: &[u32], ids: &[u32], finish: &str) -> Vec<u8> {
        let with_ids = body["return_token_ids"] == true;
        let usage = |said: usize| {
            format!(
                r#"{{"prompt_tokens":{},"total_tokens":{},"completion_tokens":{said}}}"#,
                prompt.len(),
                prompt.len() + said
            )
        };
        let continuous = body["stream_options"]["continuous_usage_stats"] == true;
        let list = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let prompt_list = format!("[{}]", list(prompt));
        let mut out = Vec::new();
        let mut write = |choices: &str, more: &str| {
            let (kind, object) =
                if chat { ("chatcmpl", "chat.completion.chunk") } else { ("cmpl", "text_completion") };
            let leg = self.leg;
            out.extend_from_slice(
                format!(
                    "data: {{\"id\":\"{kind}-{leg}\",\"object\":\"{object}\",\"created\":{leg}000,\"model\":\"m\",\"choices\":[{choices}]{more}}}\n\n"
                )
                .as_bytes(),
            );
        };
        let vllm = self.engine == Engine::Vllm;
        let shown = with_ids && self.quirk != Quirk::NoPromptIds;
        if chat {
            let more = format!(",\"prompt_token_ids\":{}", if shown { &prompt_list } else { "null" });
            write(
                r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#,
                &more,
            );
        }
        let mut detokenizer = Detokenizer::behind(self.engine, prompt, self.quirk == Quirk::Leak);
        let (mut at, mut events) = (0, 0);
        while at < ids.len() {
            let len = if self.tokens > 0 { self.tokens } else { (events + self.leg as usize) * 7 % 5 + 1 };
            let group = &ids[at..ids.len().min(at + len)];
            at += group.len();
            let text: String = group.iter().map(|&id| detokenizer.add(id)).collect();
            let last = at == ids.len();
            let finish = if last { format!("\"{finish}\"") } else { "null".to_owned() };
            let mut told = group.to_vec();
            match self.quirk {
                Quirk::ShortIds if events == 1 => drop(told.pop()),
                Quirk::ExtraId if events == 1 => told.push(1),
                Quirk::NoIds if events == 1 => told.clear(),
                _ => {}
            }
            let told = match (with_ids && !told.is_empty(), vllm) {
                (true, _) => format!(",\"token_ids\":[{}]", list(&told)),
                (false, true) => ",\"token_ids\":null".to_owned(),
                (false, false) => String::new(),
            };
            let first = shown && events == 0 && !chat;
            let of_prompt = match (first, vllm && !chat) {
                (true, _) => format!(",\"prompt_token_ids\":{prompt_list}"),
                (false, true) => ",\"prompt_token_ids\":null".to_owned(),
                (false, false) => String::new(),
            };
            let text = Value::from(text);
            let text =
                if chat { format!("\"delta\":{{\"content\":{text}}}") } else { format!("\"text\":{text}") };
            let stop = match (vllm, last) {
                (true, false) if chat => "",
                (true, _) => ",\"stop_reason\":null",
                (false, _) => ",\"matched_stop\":null",
            };
            let lists = if vllm { format!("{of_prompt}{told}") } else { format!("{told}{of_prompt}") };
            let choice =
                format!("{{\"index\":0,{text},\"logprobs\":null,\"finish_reason\":{finish}{stop}{lists}}}");
            let more = if continuous { format!(",\"usage\":{}", usage(at)) } else { String::new() };
            write(&choice, &more);
            events += 1;
        }
        if body["stream_options"]["include_usage"] == true {
            write("", &format!(",\"usage\":{}", usage(ids.len())));
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
        out
    }
}

fn generate(prompt: &[u32], limit: usize) -> (Vec<u32>, &'static str) {
    let mut all = prompt.to_vec();
    while all.len() < prompt.len() + limit {
        let id = next(&all);
        all.push(id);
        if id == EOS {
            return (all.split_off(prompt.len()), "stop");
        }
    }
    (all.split_off(prompt.len()), "length")
}

struct Detokenizer {
    engine: Engine,
    held: Vec<u8>,
    /// Comes with the next text.
    leak: String,
}

impl Detokenizer {
    fn behind(engine: Engine, prompt: &[u32], leaks: bool) -> Self {
        let bytes: Vec<u8> = prompt.iter().flat_map(|&id| bytes_of(id)).collect();
        let unfinished = !tail(&bytes).is_empty();
        let leak =
            if leaks || unfinished { String::from_utf8_lossy(&bytes).into_owned() } else { String::new() };
        Self { engine, held: Vec::new(), leak }
    }

    fn add(&mut self, id: u32) -> String {
        self.held.extend(bytes_of(id));
        let whole = self.held.len() - tail(&self.held).len();
        let given = match self.engine {
            _ if whole == self.held.len() => whole,
            // The printable part of an unfinished text.
            Engine::Sglang => {
                let text = std::str::from_utf8(&self.held[..whole]).unwrap();
                let ideograph = text.ends_with(['漢', '字']);
                if ideograph { whole } else { text.rfind(' ').map_or(0, |at| at + 1) }
            }
            _ => 0,
        };
        let rest = self.held.split_off(given);
        let text = String::from_utf8_lossy(&std::mem::replace(&mut self.held, rest)).into_owned();
        if text.is_empty() { text } else { std::mem::take(&mut self.leak) + &text }
    }
}
