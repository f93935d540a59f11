//! What the client of one stream holds: every text it was given, in order, and who it was told is speaking.
//!
//! Texts are one string, cut into runs by channel: thinking, then answer, then the arguments of a tool.
//! How they were cut into events is forgotten, because another replica cuts them elsewhere. Frames are
//! never kept: a slice would pin the buffer it was read from.
//!
//! Invariant: text is only ever added, and only what was or is about to be given to the client.

use super::chunk::{Channel, Chunk};
use super::ids::Ids;
use super::wire::Wire;
use crate::policy::dialect::EventFacts;
use crate::policy::json::Value;

/// The members that must stay what they were, as written in the first event that had them.
#[derive(Clone, Debug, Default)]
pub(super) struct Identity {
    pub(super) id: Option<Box<[u8]>>,
    pub(super) created: Option<Box<[u8]>>,
    pub(super) model: Option<Box<[u8]>>,
    pub(super) fingerprint: Option<Box<[u8]>>,
}

/// A tool call that the client knows.
#[derive(Clone, Debug)]
struct Call {
    index: u32,
    id: Box<[u8]>,
    /// Its engine says the id in more than one event.
    repeated: bool,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    channel: Channel,
    /// Behind its last byte in the text of the journal.
    end: usize,
}

/// See the head of this file.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal {
    text: Vec<u8>,
    runs: Vec<Run>,
    calls: Vec<Call>,
    pub(super) identity: Identity,
    /// Events with text.
    pub(super) text_events: u32,
    /// Tokens told in detail; see [`Journal::details_of`].
    pub(super) details: u64,
    /// Ids of its tokens, where they are told.
    pub(super) ids: Ids,
    /// The client did not ask for ids, and does not see them.
    pub(super) ids_are_ours: bool,
    pub(super) role: bool,
    /// The choice has ended well.
    pub(super) finished: bool,
    /// `[DONE]` was said.
    pub(super) done: bool,
    /// Something was said that is not understood, and so cannot be compared or continued.
    pub(super) unreadable: bool,
    /// It grew beyond its bound and was given up.
    pub(super) overflow: bool,
    /// Of the prompt, as the first leg counted them.
    pub(super) prompt_tokens: Option<u64>,
    /// Of the text, where the last event with text said so.
    pub(super) text_tokens: Option<u64>,
    last: Last,
}

/// The last event with one text and nothing else of interest: the next is likely to differ only in that, and whoever
/// read it for the relay has seen so (`EventFacts::mould`).
#[derive(Clone, Copy, Debug, Default)]
struct Last {
    mould: u32,
    channel: Option<Channel>,
    details: u64,
}

impl Journal {
    /// Takes note of an event that the client was given as it is.
    pub(super) fn observe(&mut self, wire: Wire, data: &[u8], facts: &EventFacts, bytes_max: usize) {
        if self.overflow || self.unreadable || self.observe_like_last(data, facts, bytes_max) {
            return;
        }
        // TRT-LLM writes a space before the line end.
        if data.trim_ascii() == b"[DONE]" {
            self.done = true;
            return;
        }
        let Ok(chunk) = wire.read(data) else {
            self.unreadable = true;
            return;
        };
        if chunk.unknown || chunk.error || chunk.index != 0 || chunk.choices.is_none_or(|count| count > 1) {
            self.unreadable = true;
            return;
        }
        self.introduce(&chunk);
        let before = self.text.len();
        if let Some(mark) = &chunk.mark {
            self.unreadable |= self.repeats(&chunk);
            self.append(Channel::Mark, mark.as_bytes(), bytes_max);
        }
        for said in &chunk.said {
            match said.value.as_str() {
                Some(text) => self.append(said.channel, text.as_bytes(), bytes_max),
                None => self.unreadable = true,
            }
        }
        for call in &chunk.calls {
            if let Some(id) = call.id {
                let begun = chunk.said.iter().any(|said| said.channel == Channel::ToolName(call.index));
                self.meet_call(call.index, id.raw(), begun);
            }
        }
        self.count(&chunk, Some(0));
        let Self { ids, text, .. } = self;
        ids.add(&chunk, text.get(before..).unwrap_or_default(), text.len(), completion_tokens(&chunk));
        self.remember(facts, &chunk);
    }

    fn observe_like_last(&mut self, data: &[u8], facts: &EventFacts, bytes_max: usize) -> bool {
        let Some(channel) = self.last.channel.filter(|_| facts.mould == self.last.mould) else {
            return false;
        };
        let Some(inside) = facts.text.and_then(|text| data.get(text.start..text.end)) else { return false };
        if memchr::memchr(b'\\', inside).is_some() {
            return false;
        }
        let ids = facts.ids.and_then(|(start, end)| data.get(start..end)).unwrap_or_default();
        if !self.ids_are_ours && !ids.is_empty() {
            // Told in detail, to be counted.
            return false;
        }
        self.details += self.last.details;
        self.text_events = self.text_events.saturating_add(1);
        // Events with usage are not remembered.
        self.text_tokens = None;
        self.append(channel, inside, bytes_max);
        self.ids.add_list(ids, inside, self.text.len());
        true
    }

    fn remember(&mut self, facts: &EventFacts, chunk: &Chunk<'_>) {
        let [said] = &chunk.said[..] else { return };
        let plain = said.mirror.is_none()
            && chunk.mark.is_none()
            && chunk.finish.is_none()
            && chunk.usage.is_none()
            && chunk.prompt_ids.is_none()
            && chunk.calls.iter().all(|call| call.id.is_none());
        let inside = |value: Value<'_>| (value.span().start + 1, value.span().end - 1);
        let alike = facts.text.map(|text| (text.start, text.end)) == Some(inside(said.value))
            && facts.ids == chunk.ids.map(inside);
        if plain && alike && facts.mould != 0 && !self.overflow {
            self.last = Last { mould: facts.mould, channel: Some(said.channel), details: chunk.details };
        }
    }

    /// Tokens that a chunk tells the client in detail, by log probabilities or ids.
    pub(super) fn details_of(&self, chunk: &Chunk<'_>) -> u64 {
        if self.ids_are_ours { chunk.details } else { chunk.details.max(chunk.id_count()) }
    }

    /// Notes who speaks, once, and the role.
    pub(super) fn introduce(&mut self, chunk: &Chunk<'_>) {
        fn keep(kept: &mut Option<Box<[u8]>>, value: Option<Value<'_>>) {
            if kept.is_none() {
                *kept = value.map(|value| value.raw().into());
            }
        }
        keep(&mut self.identity.id, chunk.id);
        keep(&mut self.identity.created, chunk.created);
        keep(&mut self.identity.model, chunk.model);
        keep(&mut self.identity.fingerprint, chunk.fingerprint);
        self.role |= chunk.role.is_some();
    }

    /// Notes what an event counts and ends. `base`: tokens of the text that its usage does not count, if
    /// that is known.
    pub(super) fn count(&mut self, chunk: &Chunk<'_>, base: Option<u64>) {
        self.details += self.details_of(chunk);
        self.finished |= chunk.finish.is_some_and(|finish| finish.is_good());
        self.done |= chunk.done && self.finished;
        let number = |name| chunk.usage.and_then(|usage| usage.get(name)).and_then(|count| count.as_u64());
        if base == Some(0) && self.prompt_tokens.is_none() {
            self.prompt_tokens = number("prompt_tokens");
        }
        // Not of events without text: tokens whose text is held back will be generated again.
        if !chunk.said.is_empty() {
            self.text_events = self.text_events.saturating_add(1);
            self.text_tokens =
                number("completion_tokens").zip(base).map(|(new, base)| new.saturating_add(base));
        }
    }

    /// Whether a chunk says again, and behind itself, what may be said once only.
    pub(super) fn repeats(&self, chunk: &Chunk<'_>) -> bool {
        chunk.once && chunk.mark.as_ref().is_some_and(|mark| self.text.ends_with(mark.as_bytes()))
    }

    /// Adds a text.
    pub(super) fn append(&mut self, channel: Channel, text: &[u8], bytes_max: usize) {
        if self.overflow || text.is_empty() {
            return;
        }
        let runs = (self.runs.len() + 1) * size_of::<Run>();
        if self.text.len() + text.len() + runs > bytes_max {
            // Who speaks is still needed, should a leg be speaking.
            self.overflow = true;
            self.text = Vec::new();
            self.runs = Vec::new();
            self.last = Last::default();
            self.ids.lose();
            return;
        }
        self.text.extend_from_slice(text);
        let end = self.text.len();
        match self.runs.last_mut() {
            Some(run) if run.channel == channel => run.end = end,
            _ => self.runs.push(Run { channel, end }),
        }
    }

    /// Notes the id of a tool call; `begun`: its name is said here, so that it is a new one.
    pub(super) fn meet_call(&mut self, index: u32, id: &[u8], begun: bool) {
        let known = self.calls.iter_mut().rev().find(|call| call.index == index);
        match known {
            Some(call) if !begun => call.repeated = true,
            _ => self.calls.push(Call { index, id: id.into(), repeated: false }),
        }
    }

    /// What to write for the id of a call that the client knows: the id it was given, or nothing if its
    /// first leg did not repeat ids (client libraries join the pieces of an id). `None`: it has none yet.
    pub(super) fn id_again(&self, index: u32) -> Option<&[u8]> {
        let call = self.calls.iter().rev().find(|call| call.index == index)?;
        Some(if call.repeated { &call.id } else { b"null" })
    }

    /// Whether a tool call of this index has an id.
    pub(super) fn knows(&self, index: u32) -> bool {
        self.calls.iter().any(|call| call.index == index)
    }

    /// All texts, one behind the other.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Where the last run of text begins.
    pub(super) fn last_run_start(&self) -> usize {
        self.runs.len().checked_sub(2).and_then(|last| self.runs.get(last)).map_or(0, |run| run.end)
    }

    /// The channels with text, in order, equal neighbours joined.
    pub(super) fn channels(&self) -> impl DoubleEndedIterator<Item = Channel> {
        self.runs.iter().map(|run| run.channel)
    }

    /// Bytes on the heap.
    pub(super) fn held(&self) -> usize {
        let Identity { id, created, model, fingerprint } = &self.identity;
        let calls: usize = self.calls.iter().map(|call| size_of::<Call>() + call.id.len()).sum();
        self.text.capacity()
            + self.runs.capacity() * size_of::<Run>()
            + self.ids.held()
            + [id, created, model, fingerprint].into_iter().flatten().map(|raw| raw.len()).sum::<usize>()
            + calls
    }
}

/// Tokens generated so far, as the engine counts them.
pub(super) fn completion_tokens(chunk: &Chunk<'_>) -> Option<u64> {
    chunk.usage.and_then(|usage| usage.get("completion_tokens")).and_then(|count| count.as_u64())
}

/// How far a leg has said again what a journal holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor {
    run: usize,
    at: usize,
    /// Tokens told in detail so far.
    pub(super) details: u64,
}

/// The leg says something else than the client was told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Differs;

impl Cursor {
    /// For a leg that begins behind so many bytes of the text.
    pub(super) fn behind(journal: &Journal, at: usize) -> Self {
        let run = journal.runs.iter().take_while(|run| run.end <= at).count();
        Self { run, at, details: 0 }
    }

    /// Bytes that were said again, or lie before what is.
    pub(super) fn passed(&self) -> usize {
        self.at
    }

    /// Whether all was said again.
    pub(super) fn is_through(&self, journal: &Journal) -> bool {
        self.at == journal.text.len()
    }

    /// Passes what `text` repeats; returns how many of its bytes those are. The rest is new.
    pub(super) fn pass(
        &mut self,
        journal: &Journal,
        channel: Channel,
        text: &[u8],
    ) -> Result<usize, Differs> {
        let mut passed = 0;
        while passed < text.len() {
            // Looked at when there is something to compare and not before: the last run may have grown meanwhile,
            // where another leg still speaks.
            while journal.runs.get(self.run).is_some_and(|run| run.end == self.at) {
                self.run += 1;
            }
            let Some(run) = journal.runs.get(self.run) else { break };
            let len = (run.end - self.at).min(text.len() - passed);
            let again = &text[passed..passed + len];
            if run.channel != channel || journal.text[self.at..self.at + len] != *again {
                return Err(Differs);
            }
            passed += len;
            self.at += len;
        }
        Ok(passed)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::policy::dialect::{Endpoint, EventReader, Text, TextKind};
    use crate::sse::Decoder;
    use proptest::prelude::*;

    const MAX: usize = 1 << 16;

    #[test]
    fn the_bound_counts_texts_and_their_runs() {
        let run = size_of::<Run>();
        for (bytes_max, fits) in [(100 + 2 * run, true), (99 + 2 * run, false)] {
            let mut journal = Journal::default();
            journal.append(Channel::Content, &[b'a'; 60], bytes_max);
            journal.append(Channel::Refusal, &[b'b'; 40], bytes_max);
            assert_eq!((!journal.overflow, journal.text().len()), (fits, if fits { 100 } else { 0 }));
            // For good.
            journal.append(Channel::Content, b"", bytes_max);
            journal.append(Channel::Content, b"c", 10 * bytes_max);
            assert_eq!(journal.text().len(), if fits { 101 } else { 0 });
        }
        let mut journal = Journal::default();
        journal.append(Channel::Content, b"", MAX);
        assert_eq!(journal.channels().count(), 0, "nothing was said");
        for place in 0..100 {
            journal.append(if place % 2 == 0 { Channel::Content } else { Channel::Refusal }, b"x", MAX);
        }
        assert!((100 * run..300 * run).contains(&journal.held()), "{}", journal.held());
    }

    #[test]
    fn a_text_that_goes_on_where_the_client_heard_something_else_differs() {
        let mut journal = Journal::default();
        journal.append(Channel::Reasoning(1), b"ab", MAX);
        journal.append(Channel::Content, b"cdefgh", MAX);
        let pass = |text: &[u8]| Cursor::default().pass(&journal, Channel::Reasoning(1), text).ok();
        assert_eq!(
            (pass(b"a"), pass(b"ab"), pass(b"abX"), pass(b"abcdefghi")),
            (Some(1), Some(2), None, None)
        );
    }

    #[test]
    fn the_prompt_is_counted_once_and_by_who_was_given_it() {
        let usage = |prompt: u64| format!(r#"{{"choices":[],"usage":{{"prompt_tokens":{prompt}}}}}"#);
        let (first, second) = (usage(5), usage(9));
        let [first, second] = [&first, &second].map(|data| Chunk::read(data.as_bytes()).unwrap());
        let mut journal = Journal::default();
        // A leg that continues counts the answer among its prompt.
        journal.count(&second, Some(4));
        journal.count(&second, None);
        assert_eq!(journal.prompt_tokens, None);
        journal.count(&first, Some(0));
        journal.count(&second, Some(0));
        assert_eq!(journal.prompt_tokens, Some(5));
    }

    #[test]
    fn ids_are_held_as_well() {
        let mut journal =
            Journal { ids: Ids::of(crate::policy::dialect::Engine::Vllm), ..Journal::default() };
        let before = journal.held();
        let list = vec!["1"; 1000].join(",");
        journal.ids.add_list(list.as_bytes(), b"x", 1);
        assert!(journal.held() >= before + 4000);
    }

    #[test]
    fn the_id_of_a_call_is_said_again_only_where_its_engine_says_it_again() {
        let mut journal = Journal::default();
        assert!(!journal.knows(0) && journal.id_again(0).is_none());
        journal.meet_call(0, b"\"A\"", true);
        assert!(journal.knows(0) && !journal.knows(1));
        // Another call of the same index is another call.
        journal.meet_call(0, b"\"B\"", true);
        assert_eq!(journal.id_again(0), Some(&b"null"[..]));
        journal.meet_call(0, b"\"B\"", false);
        assert_eq!(journal.id_again(0), Some(&b"\"B\""[..]));
    }

    #[test]
    fn what_was_given_up_is_not_taken_up_again() {
        let end = br#"{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}"#;
        let mut overflown = Journal::default();
        overflown.observe(
            Wire::OpenAi,
            br#"{"choices":[{"index":0,"delta":{"content":"xyz"}}]}"#,
            &EventFacts::default(),
            2,
        );
        for unread in [
            &br#"{"choices":["#[..],
            br#"{"choices":[{"index":0,"delta":{"audio":"x"}}]}"#,
            br#"{"choices":[],"error":{"message":"x"}}"#,
            br#"{"choices":[{"index":1,"delta":{"content":"x"}}]}"#,
            br#"{"choices":[{"index":0,"delta":{}},{"index":0,"delta":{}}]}"#,
        ] {
            let mut journal = Journal::default();
            journal.observe(Wire::OpenAi, unread, &EventFacts::default(), MAX);
            assert!(journal.unreadable, "{}", String::from_utf8_lossy(unread));
            journal.observe(Wire::OpenAi, end, &EventFacts::default(), MAX);
            assert!(!journal.finished && journal.text().is_empty());
        }
        overflown.observe(Wire::OpenAi, end, &EventFacts::default(), MAX);
        assert!(overflown.overflow && !overflown.finished && overflown.text().is_empty());
    }

    #[test]
    fn ollamas_finish_is_its_end() {
        let mut journal = Journal::default();
        journal.observe(Wire::Ollama, br#"{"response":"x","done":false}"#, &EventFacts::default(), MAX);
        assert!(!journal.finished && !journal.done);
        journal.observe(Wire::Ollama, br#"{"response":"","done":true}"#, &EventFacts::default(), MAX);
        assert!(journal.finished && journal.done);
    }

    #[test]
    fn an_event_that_is_known_to_say_the_same_in_other_words_is_not_read() {
        let said = |mould, data: &str| {
            let at = data.find("said").map(|start| Text { start, end: start + 4, kind: TextKind::Content });
            EventFacts { mould, text: at, ..EventFacts::default() }
        };
        let read = r#"{"choices":[{"index":0,"delta":{"content":"said"}}]}"#;
        for (mould, text, unreadable) in [(7, "saidsaid", false), (8, "said", true), (0, "said", true)] {
            let mut journal = Journal::default();
            journal.observe(Wire::OpenAi, read.as_bytes(), &said(7, read), MAX);
            let unread = "no JSON: said";
            journal.observe(Wire::OpenAi, unread.as_bytes(), &said(mould, unread), MAX);
            assert_eq!((journal.text(), journal.unreadable), (text.as_bytes(), unreadable), "{mould}");
        }
        // Who saw another text than is read here did not see what is new in it.
        let mut journal = Journal::default();
        let elsewhere =
            EventFacts { text: Some(Text { start: 2, end: 9, kind: TextKind::Content }), ..said(7, read) };
        journal.observe(Wire::OpenAi, read.as_bytes(), &elsewhere, MAX);
        assert_eq!((journal.last.channel, journal.text()), (None, &b"said"[..]));
        // What nobody knows is never like what nobody knew before.
        let mut journal = Journal::default();
        for _ in 0..2 {
            journal.observe(Wire::OpenAi, read.as_bytes(), &said(0, read), MAX);
        }
        assert_eq!((journal.last.channel, journal.text()), (None, &b"saidsaid"[..]));
    }

    /// Chunks that resemble each other, in the words of one API.
    fn events() -> impl Strategy<Value = (Wire, bool, Vec<String>)> {
        let chat = |text: &str| {
            let delta = |more: &str| {
                format!(
                    r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"{more}}},"finish_reason":null}}]}}"#
                )
            };
            let beside =
                |more: &str| format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}{more}}}]}}"#);
            vec![
                delta(""),
                delta(r#","role":"assistant""#),
                format!(
                    r#"{{"choices":[{{"index":0,"delta":{{"reasoning":"{text}","reasoning_content":"{text}"}}}}]}}"#
                ),
                format!(
                    r#"{{"choices":[{{"index":0,"delta":{{"tool_calls":[{{"index":0,"id":"A","function":{{"arguments":"{text}"}}}}]}}}}]}}"#
                ),
                beside(r#","token_ids":[1]"#),
                beside(r#","token_ids":[2,3]"#),
                beside(r#","logprobs":{"content":[{"token":"x"}]}"#),
                beside(r#","token_ids":[1],"prompt_token_ids":[7]"#),
                format!(
                    r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}],"usage":{{"prompt_tokens":1,"completion_tokens":2}}}}"#
                ),
            ]
        };
        let message = |text: &str| {
            vec![
                format!(
                    r#"{{"type":"content_block_start","index":0,"content_block":{{"type":"text","text":"{text}"}}}}"#
                ),
                format!(
                    r#"{{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"{text}"}}}}"#
                ),
            ]
        };
        let text = || prop::sample::select(vec!["a", "bc", "\\n", "é"]);
        let chats = prop::collection::vec((0usize..9, text()), 0..12)
            .prop_map(move |all| all.into_iter().map(|(kind, text)| chat(text).swap_remove(kind)).collect());
        let messages = prop::collection::vec((0usize..2, text()), 0..8).prop_map(move |all| {
            all.into_iter().map(|(kind, text)| message(text).swap_remove(kind)).collect()
        });
        prop_oneof![
            3 => (Just(Wire::OpenAi), any::<bool>(), chats),
            1 => (Just(Wire::Anthropic), any::<bool>(), messages),
        ]
    }

    proptest! {
        #[test]
        fn knowing_the_last_event_changes_nothing((wire, ours, events) in events()) {
            let journal = || Journal {
                ids: Ids::of(crate::policy::dialect::Engine::Vllm),
                ids_are_ours: ours,
                ..Journal::default()
            };
            let (mut knows, mut reads) = (journal(), journal());
            let mut reader = EventReader::new(match wire {
                Wire::Anthropic => Endpoint::AnthropicMessages,
                _ => Endpoint::ChatCompletions,
            });
            for event in &events {
                let told = format!("data: {event}\n\n");
                let read = Decoder::new(MAX).feed(told.as_bytes(), |event| {
                    let facts = reader.read(&event).unwrap();
                    knows.observe(wire, event.data, &facts, MAX);
                    reads.observe(wire, event.data, &EventFacts::default(), MAX);
                    ControlFlow::Continue(())
                });
                prop_assert_eq!(read, Ok(told.len()));
            }
            (knows.last, reads.last) = (Last::default(), Last::default());
            prop_assert_eq!(format!("{knows:?}"), format!("{reads:?}"));
        }
    }
}
