//! Streams cut anywhere and spliced, against the same streams uncut.
//!
//! A cut at a byte is a cut behind the last whole event before it, because nothing else is forwarded; so the
//! tests cut behind every event and thereby at every byte.

mod beside;
mod bounds;
mod dialects;

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::model::{Answer, Part, Skin, Voice, generate, wire};
use super::{Abandon, BadResumePolicy, NotArmed, Plan, Refused, ResumeMode, ResumePolicy, Splice, Strategy};
use crate::policy::dialect::{Endpoint, Engine, EventFacts, EventReader};
use crate::sse::Decoder;

const BODY: &[u8] = br#"{"model":"m","stream":true,"messages":[{"role":"user","content":"Say it"}]}"#;

/// What a client makes of a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct View {
    pub(super) texts: Vec<(String, String)>,
    tools: Vec<(u64, String, String, String)>,
    pub(super) finishes: Vec<String>,
    pub(super) usage: Option<Value>,
    details: usize,
    pub(super) roles: usize,
    pub(super) done: usize,
    /// Ids, models, fingerprints and times.
    pub(super) names: BTreeSet<String>,
}

impl View {
    pub(super) fn of(wire: &[u8]) -> Self {
        let mut view = Self::default();
        for data in events(wire) {
            assert_eq!(view.done, 0, "nothing follows the terminator");
            if data.trim_ascii() == b"[DONE]" {
                view.done += 1;
                continue;
            }
            view.add(&serde_json::from_slice(&data).unwrap());
        }
        view
    }

    fn add(&mut self, event: &Value) {
        for name in ["id", "model", "system_fingerprint", "created"] {
            if !event[name].is_null() {
                self.names.insert(format!("{name} {}", event[name]));
            }
        }
        if event["usage"].is_object() {
            self.usage = Some(event["usage"].clone());
        }
        let Some(choice) = event["choices"].get(0) else { return };
        let delta = &choice["delta"];
        let mut spoke = false;
        for (name, text) in [
            ("reasoning_content", &delta["reasoning_content"]),
            ("reasoning", &delta["reasoning"]),
            ("content", &delta["content"]),
            ("content", &choice["text"]),
            ("refusal", &delta["refusal"]),
        ] {
            let Some(text) = text.as_str().filter(|text| !text.is_empty()) else { continue };
            spoke = true;
            match self.texts.iter_mut().find(|(known, _)| known == name) {
                Some((_, all)) => all.push_str(text),
                None => self.texts.push((name.to_owned(), text.to_owned())),
            }
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            spoke = true;
            let index = call["index"].as_u64().unwrap();
            if !self.tools.iter().any(|known| known.0 == index) {
                self.tools.push((index, String::new(), String::new(), String::new()));
            }
            let known = self.tools.iter_mut().find(|known| known.0 == index).unwrap();
            // Client libraries join all three.
            known.1.push_str(call["id"].as_str().unwrap_or(""));
            known.2.push_str(call["function"]["name"].as_str().unwrap_or(""));
            known.3.push_str(call["function"]["arguments"].as_str().unwrap_or(""));
        }
        assert!(!spoke || self.finishes.is_empty(), "text behind a finish");
        self.details += choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
        self.roles += usize::from(!delta["role"].is_null());
        self.finishes.extend(choice["finish_reason"].as_str().map(str::to_owned));
    }

    pub(super) fn text(&self) -> String {
        self.texts.iter().map(|(_, text)| text.as_str()).collect()
    }
}

pub(super) fn events(wire: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut decoder = Decoder::new(1 << 20);
    decoder
        .feed(wire, |event| {
            if event.has_data {
                all.push(event.data.to_vec());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(decoder.pending(), b"", "whole events only");
    all
}

/// Of an event that nobody has read.
pub(super) fn unread() -> EventFacts {
    EventFacts::default()
}

/// Leg 1 gives the client these whole events, as the relay tells its splice.
pub(super) fn tell(splice: &mut Splice, reader: &mut EventReader, wire: &[u8]) {
    let read = Decoder::new(1 << 20).feed(wire, |event| {
        if event.has_data {
            splice.observe(event.data, &reader.read(&event).unwrap_or_default());
        }
        ControlFlow::Continue(())
    });
    assert_eq!(read, Ok(wire.len()), "whole events only");
}

/// Ends of the blocks of a stream, its beginning first.
pub(super) fn cuts(wire: &[u8]) -> Vec<usize> {
    let mut cuts = vec![0];
    Decoder::new(1 << 20)
        .feed(wire, |event| {
            cuts.push(event.end);
            ControlFlow::Continue(())
        })
        .unwrap();
    cuts
}

/// A client, and the splice that serves it.
struct Stream {
    splice: Splice,
    got: Vec<u8>,
    body: Vec<u8>,
}

impl Stream {
    /// Leg 1 gave these bytes.
    fn begun(endpoint: Endpoint, body: &[u8], policy: &ResumePolicy, first: &[u8]) -> Self {
        let mut splice = Splice::arm(endpoint, body, policy).unwrap();
        tell(&mut splice, &mut EventReader::new(endpoint), first);
        Self { splice, got: first.to_vec(), body: body.to_vec() }
    }

    fn chat(first: &[u8]) -> Self {
        Self::begun(Endpoint::ChatCompletions, BODY, &ResumePolicy::default(), first)
    }

    fn replay(&mut self, wire: &[u8]) -> Result<(), Abandon> {
        let plan = self.splice.plan(None, &self.body).unwrap();
        assert_eq!(plan.strategy, Strategy::Replay);
        self.leg(&plan, wire)
    }

    /// In two halves, so that the seam may lie in either.
    fn leg(&mut self, plan: &Plan, wire: &[u8]) -> Result<(), Abandon> {
        self.splice.begin_leg(plan);
        let cuts = cuts(wire);
        let half = cuts[cuts.len() / 2];
        self.splice.feed(&wire[..half], &mut self.got)?;
        self.splice.feed(&wire[half..], &mut self.got)?;
        Ok(())
    }

    fn view(&self) -> View {
        View::of(&self.got)
    }

    /// The client has one whole answer, told by one voice: that of `first`, if it said anything.
    fn check(&self, uncut: &View, first: &[u8], note: &str) {
        let (view, first) = (self.view(), View::of(first));
        assert_eq!(view.texts, uncut.texts, "{note}");
        assert_eq!(view.finishes, uncut.finishes, "{note}");
        assert_eq!(view.done, 1, "{note}");
        assert_eq!(view.usage, uncut.usage, "{note}");
        assert_eq!(view.details, uncut.details, "{note}");
        // One that repeats the role does so no more.
        assert_eq!(view.roles, first.roles.max(uncut.roles.min(1)), "{note}");
        for (tool, known) in view.tools.iter().zip(&uncut.tools) {
            assert_eq!((tool.0, &tool.2, &tool.3), (known.0, &known.2, &known.3), "{note}");
            assert!(tool.1.starts_with("call-") && tool.1.len() == known.1.len(), "{note}: {}", tool.1);
        }
        assert_eq!(view.tools.len(), uncut.tools.len(), "{note}");
        for name in ["id", "model", "created", "system_fingerprint"] {
            let of = |view: &View| -> BTreeSet<String> {
                view.names.iter().filter(|one| one.starts_with(&format!("{name} "))).cloned().collect()
            };
            let known = of(&first);
            assert!(known.is_empty() || of(&view) == known, "{note}: {:?} {known:?}", of(&view));
        }
    }
}

const TEXT: &str = "It's \"quoted\" \\ back\n\n  spaces\t漢字 and 🦀🦀, é.  \n";

fn answers() -> Vec<Answer> {
    let text = |name, text: &str| Part::Text(name, text.to_owned());
    vec![
        Answer::text(TEXT),
        Answer {
            parts: vec![text("reasoning_content", "Hm, 字?\n"), text("content", TEXT)],
            finish: "length",
        },
        Answer {
            parts: vec![
                text("content", "I call:\n"),
                Part::Tool(0, "f", "{\"a\": \"x 🦀\"}".to_owned()),
                Part::Tool(1, "f", "{\"a\": \"x y\"}".to_owned()),
            ],
            finish: "tool_calls",
        },
        Answer { parts: vec![text("refusal", "No. いいえ")], finish: "stop" },
        Answer { parts: vec![], finish: "stop" },
    ]
}

/// Cuts before the finish: a stream that has finished is complete.
pub(super) fn open_cuts(wire: &[u8]) -> Vec<usize> {
    cuts(wire).into_iter().filter(|&cut| View::of(&wire[..cut]).finishes.is_empty()).collect()
}

#[test]
fn a_replayed_stream_equals_the_uncut_one_wherever_it_was_cut() {
    for answer in answers() {
        for skin in Skin::ALL {
            for (tokens, again) in [(1, 1), (1, 3), (2, 1), (3, 0), (0, 2)] {
                let first = wire(&answer, Voice::new(skin, 1, tokens));
                let second = wire(&answer, Voice::new(skin, 2, again));
                let mut uncut = View::of(&first);
                uncut.usage = View::of(&second).usage;
                for cut in open_cuts(&first) {
                    let mut stream = Stream::chat(&first[..cut]);
                    stream.replay(&second).unwrap();
                    stream.check(&uncut, &first[..cut], &format!("{skin:?} {tokens} {again} at {cut}"));
                }
            }
        }
    }
}

#[test]
fn another_framing_replays_as_well() {
    let answer = Answer::text(TEXT);
    for skin in Skin::ALL {
        for other in Skin::ALL {
            let first = wire(&answer, Voice::new(skin, 1, 2));
            let second = wire(&answer, Voice::new(other, 2, 0));
            for cut in open_cuts(&first) {
                let mut stream = Stream::chat(&first[..cut]);
                stream.replay(&second).unwrap();
                let view = stream.view();
                assert_eq!((view.text(), view.finishes.len(), view.done), (TEXT.to_owned(), 1, 1));
            }
        }
    }
}

#[test]
fn two_cuts_and_three_legs_make_one_stream() {
    for answer in answers() {
        for skin in [Skin::Vllm, Skin::LlamaCpp] {
            let legs =
                [(1, 1), (2, 3), (3, 0)].map(|(leg, tokens)| wire(&answer, Voice::new(skin, leg, tokens)));
            let uncut = View::of(&legs[2]);
            for first in open_cuts(&legs[0]).into_iter().step_by(3) {
                for second in open_cuts(&legs[1]).into_iter().step_by(2) {
                    let mut stream = Stream::chat(&legs[0][..first]);
                    stream.replay(&legs[1][..second]).unwrap();
                    stream.replay(&legs[2]).unwrap();
                    stream.check(&uncut, &legs[0][..first], &format!("{skin:?} {first} {second}"));
                }
            }
        }
    }
}

#[test]
fn log_probabilities_are_told_once_or_the_leg_is_abandoned() {
    let answer = Answer::text(TEXT);
    let voice = |leg, tokens| Voice { details: true, ..Voice::new(Skin::Vllm, leg, tokens) };
    let first = wire(&answer, voice(1, 1));
    let (same, other) = (wire(&answer, voice(2, 1)), wire(&answer, voice(2, 3)));
    let uncut = View::of(&first);
    let mut abandoned = 0;
    for cut in open_cuts(&first) {
        let mut stream = Stream::chat(&first[..cut]);
        stream.replay(&same).unwrap();
        stream.check(&uncut, &first[..cut], &format!("at {cut}"));
        let mut stream = Stream::chat(&first[..cut]);
        match stream.replay(&other) {
            Ok(()) => stream.check(&uncut, &first[..cut], &format!("other at {cut}")),
            Err(reason) => {
                assert_eq!((reason, &*stream.got), (Abandon::Unsplittable, &first[..cut]));
                abandoned += 1;
            }
        }
    }
    assert!(abandoned > 10);
}

#[test]
fn a_leg_that_differs_is_abandoned_before_anything_is_written() {
    for skin in Skin::ALL {
        let first = wire(&Answer::text(TEXT), Voice::new(skin, 1, 2));
        for cut in open_cuts(&first) {
            let held = View::of(&first[..cut]).text();
            for (at, letter) in TEXT.char_indices() {
                let mut other = TEXT.to_owned();
                other.replace_range(at..at + letter.len_utf8(), "#");
                let mut shorter = TEXT.to_owned();
                shorter.truncate(at);
                for other in [other, shorter] {
                    let mut stream = Stream::chat(&first[..cut]);
                    let result = stream.replay(&wire(&Answer::text(&other), Voice::new(skin, 2, 1)));
                    if other.starts_with(&held) {
                        assert_eq!((result, stream.view().text()), (Ok(()), other));
                    } else {
                        assert_eq!((result, &*stream.got), (Err(Abandon::Diverged), &first[..cut]));
                        // It may not be tried again, and there is nothing else.
                        stream.splice.withdraw(Strategy::Replay);
                        assert_eq!(stream.splice.plan(None, BODY), Err(Refused::Engine));
                    }
                }
            }
        }
    }
}

#[test]
fn the_answer_may_not_become_a_thought_or_a_tool() {
    let part = |name| vec![Part::Text(name, "abc".to_owned())];
    let first = wire(&Answer::text("abcdef"), Voice::new(Skin::Vllm, 1, 1));
    let cut = cuts(&first)[3];
    for parts in [part("reasoning_content"), part("refusal"), vec![Part::Tool(0, "ab", "cd".to_owned())]] {
        let mut stream = Stream::chat(&first[..cut]);
        let other = wire(&Answer { parts, finish: "stop" }, Voice::new(Skin::Vllm, 2, 1));
        assert_eq!(stream.replay(&other), Err(Abandon::Diverged));
        assert_eq!(stream.got, &first[..cut]);
    }
}

/// `{"choices":[{"index":0,"delta":<delta>}]}` as an event.
fn event(delta: &str) -> String {
    format!(
        "data: {{\"id\":\"1\",\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":null}}]}}\n\n"
    )
}

#[test]
fn what_an_engine_says_of_its_failure_abandons_a_leg() {
    for (wire, reason) in [
        ("data: {\"error\":{\"message\":\"boom\",\"code\":500}}\n\n", Abandon::Failed),
        ("data: {\"object\":\"error\",\"message\":\"boom\"}\n\n", Abandon::Failed),
        ("event: error\ndata: {\"choices\":[]}\n\n", Abandon::Failed),
        ("error: {\"code\":500}\n\n", Abandon::Failed),
        (
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"abc\"},\"finish_reason\":\"abort\"}]}\n\n",
            Abandon::Failed,
        ),
        ("data: [DONE]\n\n", Abandon::EndedEarly),
        ("data: {\"choices\":[\n\n", Abandon::Unreadable),
        ("data: {\"content\":\"abc\",\"stop\":false}\n\n", Abandon::Unreadable),
        ("data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"abc\"}}]}\n\n", Abandon::Choices),
        ("data: {\"choices\":[{\"index\":0,\"delta\":{\"audio\":\"x\"}}]}\n\n", Abandon::Unreadable),
        ("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\\ud83d\"}}]}\n\n", Abandon::Unreadable),
    ] {
        let first = event(r#"{"role":"assistant","content":"ab"}"#);
        let mut stream = Stream::chat(first.as_bytes());
        assert_eq!(stream.replay(wire.as_bytes()), Err(reason), "{wire}");
        assert_eq!(stream.got, first.as_bytes(), "{wire}");
        assert_eq!(stream.splice.feed(b"data: {}\n\n", &mut stream.got), Err(Abandon::NoLeg));
    }
}

#[test]
fn what_cannot_be_understood_is_not_resumed() {
    for event in [
        event(r#"{"audio":{"data":"x"}}"#),
        event(r#"{"content":"\ud83d"}"#),
        "data: {\"choices\":[{\"index\":0,\"delta\":{}},{\"index\":1,\"delta\":{}}]}\n\n".to_owned(),
        "data: {\"content\":\"native\",\"stop\":false}\n\n".to_owned(),
    ] {
        let mut stream = Stream::chat(event.as_bytes());
        assert_eq!(stream.splice.plan(None, BODY), Err(Refused::Unreadable), "{event}");
    }
}

#[test]
fn an_answer_beyond_the_journal_is_not_resumed() {
    let policy = ResumePolicy { journal_bytes_max: 1 << 10, ..ResumePolicy::default() };
    let long = Answer::text(&"x".repeat(2000));
    let first = wire(&long, Voice::new(Skin::Vllm, 1, 1));
    let cut = open_cuts(&first).pop().unwrap();
    let mut stream = Stream::begun(Endpoint::ChatCompletions, BODY, &policy, &first[..cut]);
    assert_eq!(stream.splice.plan(None, BODY), Err(Refused::Overflow));
    assert!(stream.splice.held() < 2048, "{}", stream.splice.held());
    // Within a later leg: the stream goes on under its name.
    let begun = cuts(&first)[100];
    let mut stream = Stream::begun(Endpoint::ChatCompletions, BODY, &policy, &first[..begun]);
    stream.replay(&wire(&long, Voice::new(Skin::Vllm, 2, 1))).unwrap();
    stream.check(&View::of(&first), &first[..begun], "overflow in leg 2");
}

#[test]
fn a_short_answer_is_held_in_little() {
    let first = wire(&Answer::text(&"word ".repeat(160)), Voice::new(Skin::Vllm, 1, 4));
    let stream = Stream::chat(&first[..open_cuts(&first).pop().unwrap()]);
    assert!(stream.splice.held() < 4 << 10, "{}", stream.splice.held());
}

#[test]
fn a_long_answer_is_not_generated_again() {
    let policy = ResumePolicy { replay_tokens_max: 10, ..ResumePolicy::default() };
    let first = wire(&Answer::text("0123456789ab"), Voice::new(Skin::Vllm, 1, 1));
    let cuts = cuts(&first);
    for (cut, plan) in [(cuts[11], Ok(Strategy::Replay)), (cuts[12], Err(Refused::ReplayTooLong))] {
        let mut stream = Stream::begun(Endpoint::ChatCompletions, BODY, &policy, &first[..cut]);
        assert_eq!(stream.splice.plan(None, BODY).map(|plan| plan.strategy), plan);
    }
}

#[test]
fn only_legs_that_spoke_count() {
    let first = wire(&Answer::text("abcdef"), Voice::new(Skin::Vllm, 1, 1));
    let cuts = cuts(&first);
    let mut stream = Stream::chat(&first[..cuts[2]]);
    for _ in 0..5 {
        stream.replay(&first[..cuts[2]]).unwrap();
    }
    stream.replay(&first[..cuts[3]]).unwrap();
    stream.replay(&first[..cuts[4]]).unwrap();
    assert_eq!(stream.splice.plan(None, BODY), Err(Refused::ResumesExhausted));
}

#[test]
fn a_finished_answer_lacks_its_terminator_only() {
    let first = wire(&Answer::text("abc"), Voice::new(Skin::Vllm, 1, 1));
    let finish = *cuts(&first).iter().find(|&&cut| !View::of(&first[..cut]).finishes.is_empty()).unwrap();
    let mut stream = Stream::chat(&first[..finish]);
    assert_eq!(stream.splice.plan(None, BODY), Err(Refused::Complete));
    assert!(!stream.splice.is_done());
    stream.splice.complete(&mut stream.got);
    stream.splice.complete(&mut stream.got);
    assert!(stream.splice.is_done());
    assert_eq!(stream.view().done, 1);
}

#[test]
fn nothing_but_usage_follows_a_finish() {
    let mut stream = Stream::chat(event(r#"{"role":"assistant","content":"a"}"#).as_bytes());
    let leg = event(r#"{"content":"ab"}"#)
        + "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
        + &event(r#"{"content":"c"}"#)
        + "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
        + "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n"
        + "data: [DONE]\n\ndata: [DONE]\n\n";
    stream.replay(leg.as_bytes()).unwrap();
    let view = stream.view();
    assert_eq!((view.text(), view.finishes.len(), view.done), ("ab".to_owned(), 1, 1));
    assert_eq!(view.usage, Some(json!({"completion_tokens": 2})));
}

#[test]
fn ids_of_tools_keep_their_first_value_and_are_not_doubled() {
    let call = |id: &str, text: &str| {
        event(&format!(r#"{{"tool_calls":[{{"index":0,"id":"{id}","function":{{"arguments":"{text}"}}}}]}}"#))
    };
    let begin = |id: &str| {
        event(&format!(r#"{{"tool_calls":[{{"index":0,"id":"{id}","function":{{"name":"f"}}}}]}}"#))
    };
    // An engine that says the id once: again would double it.
    let mut stream = Stream::chat(begin("A").as_bytes());
    stream.replay((begin("B") + &call("B", "{")).as_bytes()).unwrap();
    assert_eq!(stream.view().tools, [(0, "A".to_owned(), "f".to_owned(), "{".to_owned())]);
    // One that repeats it: its clients expect that.
    let mut stream = Stream::chat((begin("A") + &call("A", "{")).as_bytes());
    stream.replay((begin("B") + &call("B", "{") + &call("B", "}")).as_bytes()).unwrap();
    assert_eq!(stream.view().tools, [(0, "AAA".to_owned(), "f".to_owned(), "{}".to_owned())]);
}

#[test]
fn requests_that_cannot_be_spliced_are_not_armed() {
    let arm = |endpoint, body: &str| {
        Splice::arm(endpoint, body.as_bytes(), &ResumePolicy::default()).map(|_| ()).unwrap_err()
    };
    let chat = Endpoint::ChatCompletions;
    for (endpoint, body, reason) in [
        (Endpoint::Responses, r#"{"stream":true}"#, NotArmed::Endpoint),
        (chat, "[]", NotArmed::Body),
        (chat, r#"{"messages":[]}"#, NotArmed::NotAStream),
        (chat, r#"{"stream":true,"n":2}"#, NotArmed::Choices),
        (Endpoint::Completions, r#"{"stream":true,"prompt":["a","b"]}"#, NotArmed::Choices),
        (chat, r#"{"stream":true,"store":true}"#, NotArmed::Stateful),
    ] {
        assert_eq!(arm(endpoint, body), reason, "{body}");
    }
    let off = ResumePolicy { mode: ResumeMode::Off, ..ResumePolicy::default() };
    assert_eq!(Splice::arm(chat, BODY, &off).map(|_| ()).unwrap_err(), NotArmed::Off);
}

#[test]
fn a_policy_that_cannot_work_is_refused() {
    let policy = ResumePolicy::default();
    assert_eq!(policy.validate(), Ok(()));
    assert_eq!(ResumePolicy { resumes_max: 0, ..policy }.validate(), Err(BadResumePolicy::NoResumes));
    assert_eq!(ResumePolicy { journal_bytes_max: 9, ..policy }.validate(), Err(BadResumePolicy::TinyJournal));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever an engine sends, and however it arrives, the client gets whole, valid events.
    #[test]
    fn garbage_neither_panics_nor_reaches_the_client(
        cut in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        split in any::<prop::sample::Index>(),
        text in any::<bool>(),
        answer in 0usize..5,
    ) {
        let answer = &answers()[answer];
        let first = wire(answer, Voice::new(Skin::Vllm, 1, 1));
        let open = open_cuts(&first);
        let first = &first[..open[cut.index(open.len())]];
        let mut second = wire(answer, Voice::new(Skin::Sglang, 2, 2));
        for (place, byte) in damage {
            let place = place.index(second.len());
            second[place] = byte;
        }
        let mut stream = Stream::chat(first);
        let plan = stream.splice.plan(text.then_some(Engine::Sglang), BODY).unwrap();
        stream.splice.begin_leg(&plan);
        let split = split.index(second.len());
        for part in [&second[..split], &second[split..]] {
            let _ = stream.splice.feed(part, &mut stream.got);
        }
        for data in events(&stream.got) {
            prop_assert!(data.trim_ascii() == b"[DONE]" || serde_json::from_slice::<Value>(&data).is_ok());
        }
        // Observed garbage is no different.
        let mut splice = Splice::arm(Endpoint::ChatCompletions, BODY, &ResumePolicy::default()).unwrap();
        for data in second.split(|&byte| byte == b'\n') {
            splice.observe(data, &unread());
        }
        let _ = splice.plan(None, BODY);
    }
}

// --- continuation

fn chat_body(more: &str) -> Vec<u8> {
    format!(r#"{{"model":"m","stream":true,"messages":[{{"role":"user","content":"Say it"}}]{more}}}"#)
        .into_bytes()
}

const CONTINUING: [Skin; 3] = [Skin::Vllm, Skin::Sglang, Skin::LlamaCpp];

/// A prompt whose answer is long enough to be worth cutting.
fn prompts() -> Vec<String> {
    let long = |prompt: &String| {
        let body = json!({"messages": [{"role": "user", "content": prompt}]}).to_string();
        let Part::Text(_, text) = &generate(Skin::LlamaCpp, body.as_bytes()).unwrap().parts[0] else {
            return false;
        };
        (40..160).contains(&text.len())
    };
    let found: Vec<String> = (0..2000).map(|number| format!("Say {number}")).filter(long).take(4).collect();
    assert_eq!(found.len(), 4);
    found
}

/// Cuts everywhere and continues where that is allowed; returns how often it was, and was refused for what.
fn continue_everywhere(
    endpoint: Endpoint,
    skin: Skin,
    body: &[u8],
    voice: impl Fn(u64) -> Voice,
) -> (usize, Vec<Refused>) {
    let first = wire(&generate(skin, body).unwrap(), voice(1));
    let uncut = View::of(&first);
    let (mut continued, mut refused) = (0, Vec::new());
    for cut in open_cuts(&first) {
        let policy = ResumePolicy::default();
        let mut stream = Stream::begun(endpoint, body, &policy, &first[..cut]);
        stream.splice.withdraw(Strategy::Replay);
        let plan = match stream.splice.plan(skin.engine(), body) {
            Ok(plan) => plan,
            Err(reason) => {
                refused.push(reason);
                continue;
            }
        };
        assert_eq!((plan.strategy, plan.path), (Strategy::Text, None));
        let second = wire(&generate(skin, plan.body.as_ref().unwrap()).unwrap(), voice(2));
        stream.leg(&plan, &second).unwrap();
        let mut expected = uncut.clone();
        if !voice(1).continuous {
            expected.usage = None;
        }
        stream.check(&expected, &first[..cut], &format!("{skin:?} at {cut}"));
        continued += 1;
    }
    (continued, refused)
}

#[test]
fn a_continued_chat_equals_the_uncut_one_wherever_it_was_cut() {
    for skin in CONTINUING {
        for prompt in prompts() {
            let body = json!({"stream": true, "messages": [{"role": "user", "content": prompt}]}).to_string();
            for tokens in [1, 3, 0] {
                let voice = |leg| Voice::new(skin, leg, tokens);
                let (continued, refused) =
                    continue_everywhere(Endpoint::ChatCompletions, skin, body.as_bytes(), voice);
                assert!(continued > 8, "{skin:?} {continued}");
                // Only vLLM's templates trim.
                let spaces = refused.contains(&Refused::TrailingSpace);
                assert!(skin == Skin::Vllm || !spaces, "{skin:?}");
                let other = [Refused::NothingDelivered, Refused::TrailingSpace];
                assert!(refused.iter().all(|reason| other.contains(reason)), "{refused:?}");
            }
        }
    }
}

#[test]
fn limits_count_what_was_delivered() {
    for skin in CONTINUING {
        for limit in [5, 17, 30] {
            for member in ["max_tokens", "max_completion_tokens"] {
                let mut body = json!({"stream": true, "min_tokens": 9,
                    "messages": [{"role": "user", "content": prompts()[0]}]});
                body[member] = limit.into();
                let body = body.to_string().into_bytes();
                let voice = |leg| Voice { continuous: true, ..Voice::new(skin, leg, 1) };
                let (continued, _) = continue_everywhere(Endpoint::ChatCompletions, skin, &body, voice);
                assert!(continued > 0, "{skin:?} {limit}");
                // Not known, not continued.
                let voice = |leg| Voice::new(skin, leg, 1);
                let (continued, refused) = continue_everywhere(Endpoint::ChatCompletions, skin, &body, voice);
                assert_eq!(continued, 0);
                assert!(refused.contains(&Refused::TokensUnknown));
            }
        }
    }
}

#[test]
fn a_continued_completion_equals_the_uncut_one_wherever_it_was_cut() {
    for skin in CONTINUING {
        for prompt in ["Once \u{e9}\n \"upon", "a", "The quick brown fox jumps over it"] {
            for limit in [json!({}), json!({"max_tokens": null}), json!({"max_tokens": 40})] {
                let mut body = json!({"stream": true, "prompt": prompt});
                body.as_object_mut().unwrap().extend(limit.as_object().unwrap().clone());
                let body = body.to_string().into_bytes();
                let voice = |leg| Voice { continuous: true, chat: false, ..Voice::new(skin, leg, 1) };
                let (_, refused) = continue_everywhere(Endpoint::Completions, skin, &body, voice);
                let other = [Refused::NothingDelivered, Refused::LimitReached];
                assert!(refused.iter().all(|reason| other.contains(reason)), "{refused:?}");
            }
        }
    }
    let body = br#"{"stream":true,"prompt":"a"}"#;
    let voice = |leg| Voice { chat: false, ..Voice::new(Skin::Vllm, leg, 1) };
    let (continued, refused) = continue_everywhere(Endpoint::Completions, Skin::Vllm, body, voice);
    assert!(continued == 0 && refused.contains(&Refused::TokensUnknown), "the default limit is one too");
}

/// Plans a continuation of `text`, delivered with `more` members in the request.
fn plan_text(engine: Engine, text: &str, more: &str) -> Result<Plan, Refused> {
    let body = chat_body(more);
    let first = event(&json!({"role": "assistant", "content": text}).to_string());
    let mut stream =
        Stream::begun(Endpoint::ChatCompletions, &body, &ResumePolicy::default(), first.as_bytes());
    stream.splice.withdraw(Strategy::Replay);
    stream.splice.plan(Some(engine), &body)
}

#[test]
fn a_body_is_edited_where_it_must_be_and_nowhere_else() {
    let plan = plan_text(Engine::Vllm, "Say \"é\"\n.", r#", "x" : [1.50, "\u00e9"]"#).unwrap();
    let expected = concat!(
        r#"{"continue_final_message":true,"add_generation_prompt":false,"model":"m","stream":true,"#,
        r#""messages":[{"role":"user","content":"Say it"},{"role":"assistant","content":"Say \"é\"\n."}], "x" : [1.50, "\u00e9"]}"#,
    );
    assert_eq!(String::from_utf8(plan.body.unwrap()).unwrap(), expected);
    let plan = plan_text(Engine::LlamaCpp, "a ", "").unwrap();
    let body: Value = serde_json::from_slice(&plan.body.unwrap()).unwrap();
    assert_eq!(body["messages"][1], json!({"role": "assistant", "content": "a "}));
    assert_eq!(body.get("continue_final_message"), None, "old builds do so unasked");
    // Another leg draws other numbers, and the same ones each time.
    let seed = |text| {
        let plan = plan_text(Engine::Sglang, text, r#","seed":7"#).unwrap();
        serde_json::from_slice::<Value>(&plan.body.unwrap()).unwrap()["seed"].as_u64().unwrap()
    };
    assert!(seed("a") != 7 && seed("a") != seed("b") && seed("a") == seed("a"));
}

#[test]
fn requests_that_an_engine_would_not_continue_truly_are_refused() {
    for (more, reason) in [
        (r#","response_format":{"type":"json_object"}"#, Refused::Grammar),
        (r#","guided_regex":"a+""#, Refused::Grammar),
        (r#","structured_outputs":{"choice":["a"]}"#, Refused::Grammar),
        (r#","tool_choice":"required""#, Refused::Grammar),
        (r#","tool_choice":{"type":"function","function":{"name":"f"}}"#, Refused::Grammar),
        (r#","logprobs":true"#, Refused::Details),
        (r#","return_token_ids":true"#, Refused::Details),
        (r#","continue_final_message":true"#, Refused::Prefilled),
        (r#","include_reasoning":false"#, Refused::Reasoning),
        (r#","truncate_prompt_tokens":100"#, Refused::Prompt),
        (r#","mirostat":2"#, Refused::Sampler),
        (r#","stop":"x","include_stop_str_in_output":true"#, Refused::Stop),
        (r#","max_tokens":100"#, Refused::TokensUnknown),
        (r#","max_tokens":"many""#, Refused::Body),
        (r#","seed":1,"seed":2"#, Refused::Body),
        (r#","messages":[]"#, Refused::Body),
    ] {
        assert_eq!(plan_text(Engine::Sglang, "abc", more), Err(reason), "{more}");
    }
    for more in [
        "",
        r#","response_format":{"type":"text"},"tool_choice":"auto","logprobs":false,"top_logprobs":0"#,
        r#","max_tokens":null,"min_tokens":0,"stop":["x"],"mirostat":0,"tools":[{"type":"function"}]"#,
    ] {
        assert_eq!(
            plan_text(Engine::Sglang, "abc", more).map(|plan| plan.strategy),
            Ok(Strategy::Text),
            "{more}"
        );
    }
    assert_eq!(plan_text(Engine::Vllm, "abc \u{3000}", ""), Err(Refused::TrailingSpace));
    assert_eq!(plan_text(Engine::Tgi, "abc", ""), Err(Refused::Engine));
    let prefilled = br#"{"stream":true,"messages":[{"role":"assistant","content":"A"}]}"#;
    let mut stream = Stream::chat(event(r#"{"content":"b"}"#).as_bytes());
    stream.splice.withdraw(Strategy::Replay);
    assert_eq!(stream.splice.plan(Some(Engine::Vllm), prefilled), Err(Refused::Prefilled));
}

#[test]
fn answers_that_an_engine_would_not_continue_truly_are_replayed() {
    for (delta, reason) in [
        (r#"{"tool_calls":[{"index":0,"id":"A","function":{"name":"f"}}]}"#, Refused::ToolsBegun),
        (r#"{"reasoning_content":"Hm"}"#, Refused::Reasoning),
        (r#"{"refusal":"No"}"#, Refused::Refusal),
        (r#"{"role":"assistant","content":""}"#, Refused::NothingDelivered),
    ] {
        let first = event(delta);
        let mut stream = Stream::chat(first.as_bytes());
        let plan = stream.splice.plan(Some(Engine::Vllm), BODY).unwrap();
        assert_eq!(plan, Plan { strategy: Strategy::Replay, path: None, body: None });
        stream.splice.withdraw(Strategy::Replay);
        assert_eq!(stream.splice.plan(Some(Engine::Vllm), BODY), Err(reason));
    }
}

#[test]
fn a_strategy_that_was_withdrawn_is_not_planned_again() {
    let mut stream = Stream::chat(event(r#"{"content":"abc"}"#).as_bytes());
    assert_eq!(stream.splice.plan(Some(Engine::Vllm), BODY).unwrap().strategy, Strategy::Text);
    stream.splice.withdraw(Strategy::Text);
    assert_eq!(stream.splice.plan(Some(Engine::Vllm), BODY).unwrap().strategy, Strategy::Replay);
    stream.splice.withdraw(Strategy::Replay);
    assert_eq!(stream.splice.plan(Some(Engine::Vllm), BODY), Err(Refused::StrategiesExhausted));
    let policy = ResumePolicy { mode: ResumeMode::Replay, ..ResumePolicy::default() };
    let mut stream =
        Stream::begun(Endpoint::ChatCompletions, BODY, &policy, event(r#"{"content":"abc"}"#).as_bytes());
    assert_eq!(stream.splice.plan(Some(Engine::Vllm), BODY).unwrap().strategy, Strategy::Replay);
}

/// Continues `delivered` by a leg of these deltas.
fn continued(delivered: &str, more: &str, deltas: &[&str], finish: bool) -> (Result<(), Abandon>, View) {
    let body = chat_body(more);
    let first = event(&json!({"role": "assistant", "content": delivered}).to_string());
    let mut stream =
        Stream::begun(Endpoint::ChatCompletions, &body, &ResumePolicy::default(), first.as_bytes());
    let plan = stream.splice.plan(Some(Engine::Sglang), &body).unwrap();
    assert_eq!(plan.strategy, Strategy::Text);
    let mut leg: String = deltas.iter().map(|delta| event(delta)).collect();
    if finish {
        leg +=
            "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    }
    let result = stream.leg(&plan, leg.as_bytes());
    (result, stream.view())
}

#[test]
fn an_echo_of_what_was_delivered_is_not_told_twice() {
    let delivered = "The beginning of a long answer";
    let (result, view) = continued(
        delivered,
        "",
        &[
            r#"{"role":"assistant"}"#,
            r#"{"content":"The beginning of"}"#,
            r#"{"content":" a long answer and more"}"#,
        ],
        true,
    );
    assert_eq!((result, view.text()), (Err(Abandon::Echo), delivered.to_owned()));
    // It may begin alike; what was held comes out, also at the end.
    for (last, all) in [("!", "The beginning!"), ("", "The beginning")] {
        let last = format!(r#"{{"content":"{last}"}}"#);
        let (result, view) =
            continued(delivered, "", &[r#"{"content":"The begin"}"#, r#"{"content":"ning"}"#, &last], true);
        assert_eq!((result, view.text()), (Ok(()), format!("{delivered}{all}")));
        assert_eq!((view.roles, view.finishes.len(), view.done), (1, 1, 1));
    }
    // A short answer may repeat itself.
    let (result, view) = continued("ha", "", &[r#"{"content":"ha"}"#], true);
    assert_eq!((result, view.text()), (Ok(()), "haha".to_owned()));
}

#[test]
fn a_completion_that_repeats_its_prompt_is_abandoned() {
    let body = br#"{"stream":true,"max_tokens":null,"prompt":"Once upon a time there was"}"#;
    let event = |text: &str| format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"{text}\"}}]}}\n\n");
    let first = event(" a");
    let mut stream = Stream::begun(Endpoint::Completions, body, &ResumePolicy::default(), first.as_bytes());
    let plan = stream.splice.plan(Some(Engine::LlamaCpp), body).unwrap();
    let leg = event("Once upon a time there was a") + &event(" king");
    assert_eq!(stream.leg(&plan, leg.as_bytes()), Err(Abandon::Echo));
    assert_eq!(stream.got, first.as_bytes());
}

#[test]
fn a_stop_string_across_the_seam_ends_the_answer() {
    let stop = r#","stop":["\n\nEND","xyz"]"#;
    let (result, view) = continued(
        "abc\n\nE",
        stop,
        &[r#"{"content":"N"}"#, r#"{"content":"D!"}"#, r#"{"content":"more"}"#],
        true,
    );
    assert_eq!((result, view.text()), (Ok(()), "abc\n\nE".to_owned()));
    assert_eq!((view.finishes, view.done), (vec!["stop".to_owned()], 1));
    // It only looked like one.
    let (result, view) = continued("abc\n\nE", stop, &[r#"{"content":"N"}"#, r#"{"content":"d"}"#], true);
    assert_eq!((result, view.text(), view.done), (Ok(()), "abc\n\nENd".to_owned(), 1));
}

#[test]
fn stop_strings_end_a_continued_answer_where_they_end_the_uncut_one() {
    for skin in CONTINUING {
        let prompt = &prompts()[1];
        let plain = json!({"stream": true, "messages": [{"role": "user", "content": prompt}]});
        let Part::Text(_, whole) = &generate(skin, plain.to_string().as_bytes()).unwrap().parts[0].clone()
        else {
            unreachable!()
        };
        let letters: Vec<(usize, char)> = whole.char_indices().collect();
        for length in 1..=8 {
            for window in letters.windows(length).skip(8).step_by(5) {
                let stop: String = window.iter().map(|(_, letter)| letter).collect();
                let mut body = plain.clone();
                body["stop"] = json!([stop]);
                let voice = |leg| Voice::new(skin, leg, 1);
                continue_everywhere(Endpoint::ChatCompletions, skin, body.to_string().as_bytes(), voice);
            }
        }
    }
}

#[test]
fn the_continuation_of_an_answer_is_an_answer_of_the_same_model() {
    let (result, view) = continued("abc", "", &[r#"{"reasoning_content":"Hm"}"#], true);
    assert_eq!((result, view.text()), (Err(Abandon::Misfiled), "abc".to_owned()));
    let mut stream = Stream::chat(event(r#"{"content":"abc"}"#).as_bytes());
    let plan = stream.splice.plan(Some(Engine::Sglang), BODY).unwrap();
    let other = event(r#"{"content":"d"}"#).replace("\"m\"", "\"n\"");
    assert_eq!(stream.leg(&plan, other.as_bytes()), Err(Abandon::WrongModel));
    assert_eq!(stream.view().text(), "abc");
    // A tool may follow the text.
    let call = r#"{"tool_calls":[{"index":0,"id":"A","function":{"name":"f","arguments":"{}"}}]}"#;
    let (result, view) = continued("abc", "", &[r#"{"content":"d"}"#, call], true);
    assert_eq!((result, view.tools.len(), view.text()), (Ok(()), 1, "abcd".to_owned()));
}

#[test]
fn a_stream_may_be_continued_and_then_replayed() {
    let body = json!({"stream": true, "messages": [{"role": "user", "content": prompts()[2]}]}).to_string();
    let answer = generate(Skin::Sglang, body.as_bytes()).unwrap();
    let first = wire(&answer, Voice::new(Skin::Sglang, 1, 1));
    let uncut = View::of(&first);
    for first_cut in open_cuts(&first).into_iter().skip(3).step_by(7) {
        let policy = ResumePolicy::default();
        let begun = |first_cut| {
            let mut stream =
                Stream::begun(Endpoint::ChatCompletions, body.as_bytes(), &policy, &first[..first_cut]);
            let plan = stream.splice.plan(Some(Engine::Sglang), body.as_bytes()).unwrap();
            let leg = generate(Skin::Sglang, plan.body.as_ref().unwrap()).unwrap();
            (stream, plan, wire(&leg, Voice::new(Skin::Sglang, 2, 3)))
        };
        let (_, _, second) = begun(first_cut);
        for second_cut in open_cuts(&second) {
            let (mut stream, plan, second) = begun(first_cut);
            stream.leg(&plan, &second[..second_cut]).unwrap();
            stream.replay(&wire(&answer, Voice::new(Skin::Sglang, 3, 2))).unwrap();
            stream.check(&uncut, &first[..first_cut], &format!("{first_cut} {second_cut}"));
        }
    }
}

#[test]
fn thinking_under_two_names_is_cut_under_both() {
    let both = |text: &str| event(&format!(r#"{{"reasoning":"{text}","reasoning_content":"{text}"}}"#));
    let mut stream = Stream::chat(both("ab").as_bytes());
    stream.replay((both("a") + &both("bc")).as_bytes()).unwrap();
    let told = |name: &str| (name.to_owned(), "abc".to_owned());
    assert_eq!(stream.view().texts, [told("reasoning_content"), told("reasoning")]);
    // A client that reads one name would miss what comes under the other.
    let mut stream = Stream::chat(both("ab").as_bytes());
    assert_eq!(stream.replay(event(r#"{"reasoning":"abc"}"#).as_bytes()), Err(Abandon::Diverged));
}

/// A splice that was given these events holds this answer: one that says it is swallowed, any other is not.
fn holds(given: &[String], text: &str) {
    let mut stream = Stream::chat(given.concat().as_bytes());
    stream.replay(event(&json!({"content": format!("{text}!")}).to_string()).as_bytes()).unwrap();
    assert_eq!(stream.view().text(), format!("{text}!"));
}

#[test]
fn an_event_read_quickly_says_what_it_says_read_slowly() {
    let say = |text: &str| event(&json!({"content": text}).to_string());
    for text in ["b", "a longer one", "é", "漢字", "\n", "\"", "\\", "a\u{1}b"] {
        holds(&[say("a"), say(text), say("c")], &format!("a{text}c"));
    }
    // Two strings where one was.
    holds(&[say("a"), event(r#"{"content":"b","refusal":null,"x":""}"#)], "ab");
    let two = event(r#"{"content":"b","reasoning":"c"}"#);
    let mut stream = Stream::chat((say("a") + &two).as_bytes());
    stream.replay((say("a") + &two + &say("d")).as_bytes()).unwrap();
    assert_eq!(stream.view().text(), "abdc");
    // What is no string is not taken for one: the caller has it broken, and so is this.
    let mut splice = Splice::arm(Endpoint::ChatCompletions, BODY, &ResumePolicy::default()).unwrap();
    for data in [
        br#"{"choices":[{"index":0,"delta":{"content":"a"}}]}"#.as_slice(),
        br#"{"choices":[{"index":0,"delta":{"content":"a","b"}}]}"#,
    ] {
        splice.observe(data, &unread());
    }
    assert_eq!(splice.plan(None, BODY), Err(Refused::Unreadable));
}

#[test]
fn a_count_that_is_out_of_date_is_not_used() {
    let counted = |text: &str, count: u64| {
        json!({"model": "m", "choices": [{"index": 0, "delta": {"content": text}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": count}})
    };
    let body = chat_body(r#","max_tokens":9"#);
    let mut splice = Splice::arm(Endpoint::ChatCompletions, &body, &ResumePolicy::default()).unwrap();
    splice.withdraw(Strategy::Replay);
    let plain = br#"{"choices":[{"index":0,"delta":{"content":"a"}}]}"#;
    splice.observe(plain, &unread());
    splice.observe(counted("b", 2).to_string().as_bytes(), &unread());
    // Of a token without text: it will be generated again.
    splice.observe(counted("", 3).to_string().as_bytes(), &unread());
    let plan = splice.plan(Some(Engine::Sglang), &body).unwrap();
    let asked: Value = serde_json::from_slice(&plan.body.unwrap()).unwrap();
    assert_eq!(asked["max_tokens"], 7);
    splice.observe(plain, &unread());
    assert_eq!(splice.plan(Some(Engine::Sglang), &body), Err(Refused::TokensUnknown));
}
