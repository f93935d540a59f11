//! Streams of other APIs, cut anywhere and replayed, against the same streams uncut.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::model::{Skin, Voice, pieces};
use super::super::{Abandon, NotArmed, Refused, ResumePolicy, Splice, Strategy};
use super::{TEXT, events, tell, unread};
use crate::policy::dialect::{Endpoint, EventReader};
use crate::sse::Lines;

/// An API, as a replica speaks it and a client hears it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Api {
    Anthropic,
    OllamaChat,
    OllamaGenerate,
}

const APIS: [Api; 3] = [Api::Anthropic, Api::OllamaChat, Api::OllamaGenerate];

/// A part of an answer.
#[derive(Clone, Debug)]
enum Part {
    Thinking(String),
    Text(String),
    Tool(&'static str, String),
}

/// What a client has heard. Panics while listening if what comes is no stream of its API.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    /// Kind, name, text.
    blocks: Vec<(String, String, String)>,
    /// Of tools and signatures; those of the leg that said them.
    ids: Vec<String>,
    name: Vec<String>,
    finish: Option<String>,
    count: Option<u64>,
    ended: bool,
}

fn texts(text: &str, leg: u64, tokens: usize) -> Vec<String> {
    let pieces = pieces(text, Voice::new(Skin::Vllm, leg, tokens));
    pieces.into_iter().map(|(text, _)| text).filter(|text| !text.is_empty()).collect()
}

impl Api {
    fn endpoint(self) -> Endpoint {
        match self {
            Self::Anthropic => Endpoint::AnthropicMessages,
            Self::OllamaChat => Endpoint::OllamaChat,
            Self::OllamaGenerate => Endpoint::OllamaGenerate,
        }
    }

    fn body(self) -> &'static [u8] {
        match self {
            Self::Anthropic => br#"{"model":"m","stream":true,"max_tokens":9,"messages":[]}"#,
            Self::OllamaChat => br#"{"model":"m","messages":[]}"#,
            Self::OllamaGenerate => br#"{"model":"m","prompt":"p"}"#,
        }
    }

    fn answers(self) -> Vec<Vec<Part>> {
        let text = || Part::Text(TEXT.to_owned());
        let thought = || Part::Thinking("Hm, 字?\n".to_owned());
        let tool = |name| Part::Tool(name, r#"{"a":"x 🦀"}"#.to_owned());
        let mut all = vec![vec![text()], vec![thought(), text()], vec![]];
        if self != Self::OllamaGenerate {
            all.push(vec![text(), tool("f"), tool("g")]);
            all.push(vec![thought(), tool("f")]);
        }
        all
    }

    /// The events of a whole answer, as the replica of this leg says it.
    fn says(self, parts: &[Part], leg: u64, tokens: usize) -> Vec<Vec<u8>> {
        match self {
            Self::Anthropic => anthropic(parts, leg, tokens),
            Self::OllamaChat | Self::OllamaGenerate => self.ollama(parts, leg, tokens),
        }
    }

    fn ollama(self, parts: &[Part], leg: u64, tokens: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        let mut line = |name: &str, said: Value, done: bool| {
            let mut line = json!({"model": format!("m{leg}"), "created_at": format!("{leg}:{}", out.len())});
            match self {
                Self::OllamaChat => {
                    line["message"] = json!({"role": "assistant", "content": ""});
                    line["message"][name] = said;
                }
                _ => line[name] = said,
            }
            line["done"] = done.into();
            if done {
                line["done_reason"] = "stop".into();
                line["eval_count"] = 7.into();
            }
            out.push(format!("{line}\n").into_bytes());
        };
        let answer = if self == Self::OllamaChat { "content" } else { "response" };
        for part in parts {
            match part {
                Part::Thinking(text) => {
                    texts(text, leg, tokens).into_iter().for_each(|t| line("thinking", t.into(), false));
                }
                Part::Text(text) => {
                    texts(text, leg, tokens).into_iter().for_each(|t| line(answer, t.into(), false));
                }
                Part::Tool(name, arguments) => {
                    let arguments: Value = serde_json::from_str(arguments).unwrap();
                    let call = json!([{"id": format!("call-{leg}"),
                        "function": {"name": name, "arguments": arguments}}]);
                    line("tool_calls", call, false);
                }
            }
        }
        line(answer, "".into(), true);
        out
    }

    fn hears(self, wire: &[u8]) -> Heard {
        let mut heard = Heard::default();
        match self {
            Self::Anthropic => {
                let mut open = None;
                for data in events(wire) {
                    heard.anthropic(&serde_json::from_slice(&data).unwrap(), &mut open);
                }
            }
            Self::OllamaChat | Self::OllamaGenerate => {
                let mut lines = Lines::new(1 << 20);
                let whole = lines.feed(wire, |line| {
                    heard.ollama(&serde_json::from_slice(line.data).unwrap());
                    std::ops::ControlFlow::Continue(())
                });
                assert_eq!(whole, Ok(wire.len()));
            }
        }
        heard
    }
}

fn anthropic(parts: &[Part], leg: u64, tokens: usize) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let mut event = |kind: &str, more: Value| {
        let mut data = json!({"type": kind});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        out.push(format!("event: {kind}\ndata: {data}\n\n").into_bytes());
    };
    let message = json!({"id": format!("msg_{leg}"), "type": "message", "role": "assistant", "content": [],
        "model": "m", "stop_reason": null, "usage": {"input_tokens": 3, "output_tokens": 1}});
    event("message_start", json!({ "message": message }));
    for (index, part) in parts.iter().enumerate() {
        let (block, name, kind, text) = match part {
            Part::Text(text) => (json!({"type": "text", "text": ""}), "text", "text_delta", text),
            Part::Thinking(text) => {
                (json!({"type": "thinking", "thinking": ""}), "thinking", "thinking_delta", text)
            }
            Part::Tool(tool, arguments) => (
                json!({"type": "tool_use", "id": format!("toolu_{leg}_{index}"), "name": tool, "input": {}}),
                "partial_json",
                "input_json_delta",
                arguments,
            ),
        };
        event("content_block_start", json!({"index": index, "content_block": block}));
        if index == 0 {
            event("ping", json!({}));
        }
        for text in texts(text, leg, tokens) {
            event("content_block_delta", json!({"index": index, "delta": {"type": kind, name: text}}));
        }
        if name == "thinking" {
            let delta = json!({"type": "signature_delta", "signature": format!("sig_{leg}")});
            event("content_block_delta", json!({"index": index, "delta": delta}));
        }
        event("content_block_stop", json!({ "index": index }));
    }
    let delta = json!({"stop_reason": "end_turn", "stop_sequence": null});
    event("message_delta", json!({"delta": delta, "usage": {"output_tokens": 7}}));
    event("message_stop", json!({}));
    out
}

impl Heard {
    fn anthropic(&mut self, event: &Value, open: &mut Option<u64>) {
        assert!(!self.ended, "nothing follows the end");
        let kind = event["type"].as_str().unwrap();
        assert!(kind == "message_start" || !self.name.is_empty(), "the message begins first");
        match kind {
            "message_start" => {
                assert!(self.name.is_empty(), "a message begins once");
                self.name.push(event["message"]["id"].as_str().unwrap().to_owned());
            }
            "content_block_start" => {
                assert_eq!((*open, &self.finish), (None, &None), "one block at a time");
                *open = event["index"].as_u64();
                assert_eq!(open.unwrap(), self.blocks.len() as u64, "in their order");
                let block = &event["content_block"];
                let word = |name: &str| block[name].as_str().unwrap_or("").to_owned();
                self.ids.extend(block["id"].as_str().map(str::to_owned));
                self.blocks.push((word("type"), word("name"), String::new()));
            }
            "content_block_delta" => {
                assert_eq!(*open, event["index"].as_u64(), "in the open block");
                let text = &mut self.blocks.last_mut().unwrap().2;
                let delta = &event["delta"];
                for name in ["text", "thinking", "partial_json"] {
                    text.push_str(delta[name].as_str().unwrap_or(""));
                }
                self.ids.extend(delta["signature"].as_str().map(str::to_owned));
            }
            "content_block_stop" => assert_eq!(open.take(), event["index"].as_u64()),
            "message_delta" => {
                assert_eq!((*open, &self.finish), (None, &None), "one finish, behind the blocks");
                self.finish = event["delta"]["stop_reason"].as_str().map(str::to_owned);
                self.count = event["usage"]["output_tokens"].as_u64();
            }
            "message_stop" => {
                assert!(self.finish.is_some());
                self.ended = true;
            }
            "ping" => {}
            other => panic!("{other}"),
        }
    }

    fn ollama(&mut self, line: &Value) {
        assert!(!self.ended, "nothing follows the end");
        let name = line["model"].as_str().unwrap().to_owned();
        if !self.name.contains(&name) {
            self.name.push(name);
        }
        let message = &line["message"];
        assert!(message.is_null() || message["role"] == "assistant");
        let mut say = |kind: &str, text: &Value| {
            let Some(text) = text.as_str().filter(|text| !text.is_empty()) else { return };
            match self.blocks.last_mut() {
                Some(block) if block.0 == kind => block.2.push_str(text),
                _ => self.blocks.push((kind.to_owned(), String::new(), text.to_owned())),
            }
        };
        say("thinking", &message["thinking"]);
        say("thinking", &line["thinking"]);
        say("text", &message["content"]);
        say("text", &line["response"]);
        for call in message["tool_calls"].as_array().into_iter().flatten() {
            let function = &call["function"];
            let name = function["name"].as_str().unwrap().to_owned();
            self.ids.extend(call["id"].as_str().map(str::to_owned));
            self.blocks.push(("tool_use".to_owned(), name, function["arguments"].to_string()));
        }
        if line["done"] == true {
            self.ended = true;
            self.finish = line["done_reason"].as_str().map(str::to_owned);
            self.count = line["eval_count"].as_u64();
        }
    }

    /// The same answer; ids may be those of another leg.
    fn is(&self, uncut: &Self, note: &str) {
        assert_eq!((&self.blocks, &self.finish), (&uncut.blocks, &uncut.finish), "{note}");
        assert_eq!((self.count, self.ended), (uncut.count, uncut.ended), "{note}");
        assert_eq!((self.name.len(), self.ids.len()), (uncut.name.len(), uncut.ids.len()), "{note}");
    }
}

/// A client whose first leg broke behind these events.
struct Stream {
    api: Api,
    splice: Splice,
    got: Vec<u8>,
}

impl Stream {
    fn begun(api: Api, first: &[Vec<u8>]) -> Self {
        let mut splice = Splice::arm(api.endpoint(), api.body(), &ResumePolicy::default()).unwrap();
        let mut reader = EventReader::new(api.endpoint());
        for event in first {
            match api {
                Api::Anthropic => tell(&mut splice, &mut reader, event),
                Api::OllamaChat | Api::OllamaGenerate => splice.observe(event.trim_ascii_end(), &unread()),
            }
        }
        Self { api, splice, got: first.concat() }
    }

    /// In pieces of so many bytes; 0: whole.
    fn replay(&mut self, wire: &[u8], piece: usize) -> Result<(), Abandon> {
        let plan = self.splice.plan(None, self.api.body()).unwrap();
        assert_eq!(plan.strategy, Strategy::Replay);
        self.splice.begin_leg(&plan);
        for piece in wire.chunks(if piece == 0 { wire.len().max(1) } else { piece }) {
            self.splice.feed(piece, &mut self.got)?;
        }
        Ok(())
    }

    fn heard(&self) -> Heard {
        self.api.hears(&self.got)
    }
}

/// How many events stand before the finish.
fn open(api: Api, events: &[Vec<u8>]) -> usize {
    (0..events.len()).filter(|&cut| api.hears(&events[..cut].concat()).finish.is_none()).max().unwrap()
}

#[test]
fn a_replayed_stream_of_any_api_equals_the_uncut_one_wherever_it_was_cut() {
    for api in APIS {
        for (nth, parts) in api.answers().into_iter().enumerate() {
            for (tokens, again) in [(1, 1), (1, 3), (3, 1), (0, 2)] {
                let (first, second) = (api.says(&parts, 1, tokens), api.says(&parts, 2, again).concat());
                let uncut = api.hears(&first.concat());
                for cut in 0..=open(api, &first) {
                    for piece in [0, 1, 7] {
                        let mut stream = Stream::begun(api, &first[..cut]);
                        stream.replay(&second, piece).unwrap();
                        let note = format!("{api:?} {nth} {tokens} {again} behind {cut} by {piece}");
                        let heard = stream.heard();
                        heard.is(&uncut, &note);
                        assert!(stream.splice.is_done(), "{note}");
                        // What the first leg named keeps its name.
                        let had = api.hears(&first[..cut].concat());
                        assert_eq!(heard.ids[..had.ids.len()], had.ids, "{note}");
                        assert!(had.name.is_empty() || heard.name == had.name, "{note}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_unbroken_event_stays_as_its_engine_wrote_it() {
    for api in APIS {
        let parts = &api.answers()[0];
        let (first, second) = (api.says(parts, 1, 1), api.says(parts, 1, 1));
        let mut stream = Stream::begun(api, &first[..4]);
        stream.replay(&second.concat(), 0).unwrap();
        assert_eq!(String::from_utf8(stream.got).unwrap(), String::from_utf8(first.concat()).unwrap());
    }
}

#[test]
fn two_cuts_and_three_legs_make_one_stream_of_any_api() {
    for api in APIS {
        for parts in api.answers() {
            let legs = [(1, 1), (2, 3), (3, 0)].map(|(leg, tokens)| api.says(&parts, leg, tokens));
            let uncut = api.hears(&legs[0].concat());
            for first in (0..=open(api, &legs[0])).step_by(2) {
                for second in 0..=open(api, &legs[1]) {
                    let mut stream = Stream::begun(api, &legs[0][..first]);
                    stream.replay(&legs[1][..second].concat(), 0).unwrap();
                    stream.replay(&legs[2].concat(), 0).unwrap();
                    stream.heard().is(&uncut, &format!("{api:?} {first} {second}"));
                }
            }
        }
    }
}

/// Answers that differ from `parts` in one place.
fn others(parts: &[Part]) -> Vec<Vec<Part>> {
    let mut all = Vec::new();
    for (place, part) in parts.iter().enumerate() {
        let mut put = |part: Option<Part>| {
            let mut other = parts.to_vec();
            other.splice(place..=place, part);
            all.push(other);
        };
        put(None);
        let (Part::Text(text) | Part::Thinking(text) | Part::Tool(_, text)) = part;
        for (at, letter) in text.char_indices().filter(|(_, letter)| letter.is_alphanumeric()) {
            let mut changed = text.clone();
            changed.replace_range(at..at + letter.len_utf8(), "q");
            put(Some(match part {
                Part::Text(_) => Part::Text(changed),
                Part::Thinking(_) => Part::Thinking(changed),
                Part::Tool(name, _) => Part::Tool(name, changed),
            }));
        }
        match part {
            Part::Text(text) => put(Some(Part::Thinking(text.clone()))),
            Part::Thinking(text) => put(Some(Part::Text(text.clone()))),
            Part::Tool(_, arguments) => put(Some(Part::Tool("other", arguments.clone()))),
        }
    }
    all
}

#[test]
fn a_leg_of_any_api_that_differs_is_abandoned_before_anything_is_written() {
    let mut differed = 0;
    for api in APIS {
        for parts in api.answers() {
            let first = api.says(&parts, 1, 1);
            for cut in (0..=open(api, &first)).step_by(3) {
                let held = api.hears(&first[..cut].concat());
                for other in others(&parts) {
                    let second = api.says(&other, 2, 2).concat();
                    let mut stream = Stream::begun(api, &first[..cut]);
                    let result = stream.replay(&second, 0);
                    let heard = stream.heard();
                    match result {
                        // It is the same as far as the client had come, and from there on its own.
                        Ok(()) => heard.is(&api.hears(&second), &format!("{api:?} behind {cut}: {other:?}")),
                        Err(why) => {
                            assert!(matches!(why, Abandon::Diverged | Abandon::Unsplittable), "{why:?}");
                            assert_eq!(heard, held);
                            assert_eq!(stream.got, first[..cut].concat());
                            stream.splice.withdraw(Strategy::Replay);
                            assert_eq!(stream.splice.plan(None, api.body()), Err(Refused::Engine));
                            differed += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(differed > 1000, "{differed}");
}

#[test]
fn what_is_not_understood_of_any_api_is_not_resumed() {
    let anthropic = |data: Value| (Api::Anthropic, format!("event: x\ndata: {data}\n\n"));
    let ollama = |data: Value| (Api::OllamaChat, format!("{data}\n"));
    let block =
        |block: Value| anthropic(json!({"type": "content_block_start", "index": 1, "content_block": block}));
    let delta = |delta: Value| anthropic(json!({"type": "content_block_delta", "index": 0, "delta": delta}));
    for (api, event) in [
        block(json!({"type": "redacted_thinking", "data": "x"})),
        block(json!({"type": "server_tool_use", "id": "a", "name": "web_search", "input": {}})),
        block(json!({"type": "text", "text": "", "citations": [{"a": 1}]})),
        delta(json!({"type": "citations_delta", "citation": {"a": 1}})),
        delta(json!({"type": "text_delta", "text": 7})),
        anthropic(json!({"type": "something_new"})),
        anthropic(json!({"type": "content_block_stop"})),
        ollama(json!({"message": {"role": "assistant", "audio": "x"}, "done": false})),
        ollama(json!({"message": {"tool_calls": [{"function": {"name": "f", "more": 1}}]}, "done": false})),
        ollama(json!({"choices": [{"index": 0, "delta": {"content": "x"}}]})),
    ] {
        let said = api.says(&api.answers()[0], 1, 1);
        let mut stream = Stream::begun(api, &said[..4]);
        let data = event.split_once("data: ").map_or(event.trim_end(), |(_, data)| data.trim_end());
        stream.splice.observe(data.as_bytes(), &unread());
        assert_eq!(stream.splice.plan(None, api.body()), Err(Refused::Unreadable), "{event}");
        // Of a later leg it abandons that.
        let mut stream = Stream::begun(api, &said[..4]);
        let result = stream.replay(&[said[..3].concat(), event.clone().into_bytes()].concat(), 0);
        assert_eq!(result, Err(Abandon::Unreadable), "{event}");
    }
}

#[test]
fn a_signature_is_told_by_one_leg_alone() {
    let thought = [Part::Thinking("ab".to_owned()), Part::Text("c".to_owned())];
    let api = Api::Anthropic;
    let signed = |leg: u64| {
        let mut said = api.says(&thought, leg, 1);
        let at = said.iter().position(|event| event.windows(4).any(|word| word == b"sig_")).unwrap();
        said.insert(at, said[at].clone());
        (said, at)
    };
    let (first, at) = signed(1);
    let (second, _) = signed(2);
    // Half of it is here, and half of another would follow.
    let mut stream = Stream::begun(api, &first[..=at]);
    assert_eq!(stream.replay(&second.concat(), 0), Err(Abandon::Unsplittable));
    // All of it is here, in two: that is not understood.
    let mut stream = Stream::begun(api, &first[..at + 2]);
    assert_eq!(stream.splice.plan(None, api.body()), Err(Refused::Unreadable));
}

#[test]
fn what_was_begun_is_not_begun_again() {
    let api = Api::Anthropic;
    let parts = [Part::Text("abcd".to_owned())];
    let first = api.says(&parts, 1, 1);
    let uncut = api.hears(&first.concat());
    // A replica that says its first text with the beginning of the block.
    for said in ["", "a", "ab", "abc"] {
        let rest = [Part::Text("abcd"[said.len()..].to_owned())];
        let mut second = api.says(&rest, 2, 1);
        let begin = String::from_utf8(second[1].clone()).unwrap();
        second[1] = begin.replace(r#""text":"""#, &format!(r#""text":"{said}""#)).into_bytes();
        for cut in 2..7 {
            let held = api.hears(&first[..cut].concat()).blocks;
            let held = held.first().map_or("", |block| block.2.as_str());
            let mut stream = Stream::begun(api, &first[..cut]);
            // The client has the block and not all of its first text: those are one event.
            if held.len() < said.len() {
                assert_eq!(stream.replay(&second.concat(), 0), Err(Abandon::Unsplittable), "{said} {cut}");
                assert_eq!(stream.got, first[..cut].concat());
            } else {
                stream.replay(&second.concat(), 0).unwrap();
                stream.heard().is(&uncut, &format!("{said} behind {cut}"));
            }
        }
    }
}

#[test]
fn errors_and_early_ends_of_any_api_abandon_a_leg() {
    for (api, event, why) in [
        (
            Api::Anthropic,
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\"}}\n\n",
            Abandon::Failed,
        ),
        (Api::Anthropic, "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n", Abandon::EndedEarly),
        (
            Api::Anthropic,
            "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"abort\"}}\n\n",
            Abandon::Failed,
        ),
        (
            Api::Anthropic,
            "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"}}\n\n",
            Abandon::Diverged,
        ),
        (Api::OllamaChat, "{\"error\":\"runner died\"}\n", Abandon::Failed),
        (Api::OllamaChat, "{\"message\":{\"content\":\"\"},\"done\":true}\n", Abandon::Diverged),
        (Api::OllamaGenerate, "nonsense\n", Abandon::Unreadable),
    ] {
        let said = api.says(&api.answers()[0], 1, 1);
        let mut stream = Stream::begun(api, &said[..6]);
        let leg = [said[..4].concat(), event.as_bytes().to_vec()].concat();
        assert_eq!(stream.replay(&leg, 0), Err(why), "{event}");
        assert_eq!(stream.got, said[..6].concat());
    }
}

#[test]
fn a_finished_answer_of_any_api_lacks_its_terminator_only() {
    for api in APIS {
        let said = api.says(&api.answers()[0], 1, 1);
        let mut stream = Stream::begun(api, &said[..4]);
        let all = said.concat();
        let end = said.last().unwrap().len();
        let cut = if api == Api::Anthropic { all.len() - end } else { all.len() };
        stream.replay(&all[..cut], 0).unwrap();
        assert_eq!(stream.splice.plan(None, api.body()), Err(Refused::Complete));
        stream.splice.complete(&mut stream.got);
        assert_eq!(String::from_utf8(stream.got).unwrap(), String::from_utf8(all).unwrap());
    }
}

#[test]
fn other_apis_are_not_armed() {
    for endpoint in [Endpoint::Responses, Endpoint::LlamaCompletion, Endpoint::KserveGenerateStream] {
        let armed = Splice::arm(endpoint, br#"{"stream":true}"#, &ResumePolicy::default());
        assert_eq!(armed.err(), Some(NotArmed::Endpoint), "{endpoint:?}");
    }
    let whole = Splice::arm(Endpoint::OllamaChat, br#"{"stream":false}"#, &ResumePolicy::default());
    assert_eq!(whole.err(), Some(NotArmed::NotAStream));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a leg says, the client hears a stream of its API, and nothing of what it had is changed.
    #[test]
    fn garbage_of_any_api_neither_panics_nor_reaches_the_client(
        which in 0usize..3, answer in 0usize..3, cut in 0usize..30, seed: u64, changes in 1usize..6,
    ) {
        let api = APIS[which];
        let parts = &api.answers()[answer];
        let first = api.says(parts, 1, 1);
        let cut = cut.min(open(api, &first));
        let mut leg = api.says(parts, 2, 0).concat();
        let mut dice = fastrand::Rng::with_seed(seed);
        for _ in 0..changes {
            let at = dice.usize(..leg.len());
            match dice.u8(..3) {
                0 => leg[at] = dice.u8(..),
                1 => drop(leg.drain(at..(at + dice.usize(1..40)).min(leg.len()))),
                _ => leg.insert(at, dice.u8(..)),
            }
        }
        let mut stream = Stream::begun(api, &first[..cut]);
        let result = stream.replay(&leg, dice.usize(0..9));
        let had = first[..cut].concat();
        prop_assert!(stream.got.starts_with(&had));
        if result.is_err() && stream.got.len() == had.len() {
            return Ok(());
        }
        // Its texts may have changed behind the seam; of its events each is whole.
        for event in events_of(api, &stream.got) {
            prop_assert!(serde_json::from_slice::<Value>(&event).is_ok());
        }
    }
}

fn events_of(api: Api, wire: &[u8]) -> Vec<Vec<u8>> {
    if api == Api::Anthropic {
        return events(wire);
    }
    wire.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
}
