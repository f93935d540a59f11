//! One event of an answer stream, and what a stream of them amounts to.
//!
//! Each event gets one validating pass without allocation, whatever its dialect; the readers of the
//! dialects only differ in which members they stop at.

use std::fmt;

use super::error::classify_error_body;
use super::{Endpoint, ErrorClass, anthropic, kserve, native, ollama, openai};
use crate::policy::json::{JsonError, JsonErrorKind, Kind, Reader, Value};
use crate::sse::Event;

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its answer, or a stop string was met (`stop`, `end_turn`, `eos_token`, …).
    Stop,
    /// The token limit (`length`, `max_tokens`).
    Length,
    /// It wants tools called.
    ToolCalls,
    /// A filter cut it.
    ContentFilter,
    /// A reason not known here; the engine says it is an end, so it is one.
    OtherGood,
    /// The engine gave up (`abort`, `cancelled`): a failure, not an end (SIGTERM looks like this).
    Abort,
    /// The engine failed (`error`).
    Error,
}

impl Finish {
    /// Whether the answer is whole.
    pub fn is_good(self) -> bool {
        !matches!(self, Self::Abort | Self::Error)
    }

    /// The reason a dialect gives, without quotes. Failures must be known by name: an unknown reason is
    /// an end, because an answer its engine calls finished must not be generated twice.
    pub(super) fn of_reason(reason: &[u8]) -> Self {
        match reason {
            b"stop" | b"end_turn" | b"eos" | b"eos_token" | b"stop_sequence" | b"word" => Self::Stop,
            b"length" | b"max_tokens" | b"max_output_tokens" | b"limit" => Self::Length,
            b"model_context_window_exceeded" => Self::Length,
            b"tool_calls" | b"function_call" | b"tool_use" => Self::ToolCalls,
            b"content_filter" | b"refusal" | b"safety" => Self::ContentFilter,
            b"abort" | b"aborted" | b"cancelled" | b"canceled" => Self::Abort,
            // The last is DeepSeek's way to say that it was cut off for want of resources.
            b"error" | b"server_error" | b"internal_error" | b"insufficient_system_resource" => Self::Error,
            _ => Self::OtherGood,
        }
    }

    /// A `finish_reason` as written: a string, or SGLang's object with a `type`. `None`: not yet.
    pub(super) fn of_value(value: Value<'_>) -> Option<Self> {
        if value.is_blank() {
            return None;
        }
        match value.kind() {
            Kind::String => Some(Self::of_reason(inside(value))),
            Kind::Object => value.get("type").and_then(Self::of_value),
            Kind::Array | Kind::Number | Kind::Bool | Kind::Null => Some(Self::OtherGood),
        }
    }
}

/// The bytes between the quotes of a string. Words of a protocol need no unescaping.
pub(super) fn inside(value: Value<'_>) -> &[u8] {
    let raw = value.raw();
    raw.get(1..raw.len().saturating_sub(1)).unwrap_or_default()
}

/// A set of choices. Indexes up to 127 (OpenAI allows 128 choices) are told apart; those beyond, which
/// only batches of prompts reach, are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    known: u128,
    beyond: u32,
}

impl Choices {
    /// Adds a choice.
    pub fn insert(&mut self, index: u64) {
        match u32::try_from(index).ok().and_then(|index| 1_u128.checked_shl(index)) {
            Some(bit) => self.known |= bit,
            None => self.beyond = self.beyond.saturating_add(1),
        }
    }

    /// How many.
    pub fn count(self) -> u32 {
        self.known.count_ones().saturating_add(self.beyond)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.count() == 0
    }

    fn union(self, other: Self) -> Self {
        Self { known: self.known | other.known, beyond: self.beyond.saturating_add(other.beyond) }
    }

    /// Whether `other` has every choice told apart in this set.
    fn is_within(self, other: Self) -> bool {
        self.known & !other.known == 0
    }
}

/// What one event says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventFacts {
    /// It carries a token: text, reasoning, refusal or a part of a tool call. Roles, empty chunks,
    /// pings, comments and usage do not.
    pub meaningful: bool,
    /// The worst end of a choice in this event; see `finished` for which of them are good.
    pub finish: Option<Finish>,
    /// Choices it speaks of.
    pub choices: Choices,
    /// Choices that it ends well.
    pub finished: Choices,
    /// It is an error.
    pub error: Option<ErrorClass>,
    /// It is the dialect's terminator (`[DONE]`, `message_stop`, `done: true`, …). Proves nothing alone.
    pub done: bool,
    /// It carries usage and no choice.
    pub usage_only: bool,
    /// `sequence_number` of a Responses event.
    pub sequence: Option<u64>,
}

/// An event that must not reach the client (F21).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidEvent {
    /// Its data is not one JSON text, or no object.
    Json(JsonError),
}

impl fmt::Display for InvalidEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(fault) => write!(f, "event of the stream: {fault}"),
        }
    }
}

impl std::error::Error for InvalidEvent {}

impl EventFacts {
    /// Notes the end of a choice. The worst one of an event wins.
    pub(super) fn finish_choice(&mut self, index: u64, finish: Finish) {
        if finish.is_good() {
            self.finished.insert(index);
        }
        if self.finish.is_none_or(Finish::is_good) {
            self.finish = Some(finish);
        }
    }
}

/// Reads one event of the answer of `endpoint`, validating all of its JSON.
///
/// Comments and blocks without data say nothing and are valid; empty data is not (client libraries
/// parse it). Events of endpoints that do not generate are not looked at.
pub fn read_event(endpoint: Endpoint, event: &Event<'_>) -> Result<EventFacts, InvalidEvent> {
    if !endpoint.generates() {
        return Ok(EventFacts::default());
    }
    if let Some(error) = event.error_field {
        return Ok(EventFacts { error: Some(classify_error_body(error)), ..EventFacts::default() });
    }
    if !event.has_data {
        return Ok(EventFacts::default());
    }
    // TRT-LLM writes a space before the line end.
    if event.data.trim_ascii() == b"[DONE]" {
        return Ok(EventFacts { done: true, ..EventFacts::default() });
    }
    let mut facts = read_object(endpoint, event.data).map_err(InvalidEvent::Json)?;
    if event.name == Some(b"error") && facts.error.is_none() {
        facts.error = Some(classify_error_body(event.data));
    }
    Ok(facts)
}

/// Reads one object of an answer: an event's data, or a whole answer of the same dialect.
pub(super) fn read_object(endpoint: Endpoint, json: &[u8]) -> Result<EventFacts, JsonError> {
    match endpoint.stream_shape() {
        Shape::OpenAi => openai::read_chunk(json),
        Shape::Responses => openai::read_response_event(json),
        Shape::Anthropic => anthropic::read(json),
        Shape::Ollama => ollama::read(json),
        Shape::Native => native::read(json),
        Shape::Kserve => kserve::read(json),
    }
}

/// Which reader understands the objects of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    OpenAi,
    Responses,
    Anthropic,
    Ollama,
    Native,
    Kserve,
}

/// Walks the members of the one object that `json` must be.
pub(super) fn read_members<'a, F>(json: &'a [u8], on_member: F) -> Result<(), JsonError>
where
    F: FnMut(&mut Reader<'a>, &[u8]) -> Result<(), JsonError>,
{
    let mut reader = Reader::new(json)?;
    if let Some(other) = reader.object(on_member)? {
        return Err(JsonError { offset: other.span().start, kind: JsonErrorKind::NotAnObject });
    }
    reader.finish()
}

/// Follows one stream to its end: which choices began, which ended well, and whether anything broke.
///
/// Errors that come after a stream was complete are not failures: nothing is missing then (F23).
#[derive(Clone, Copy, Debug)]
pub struct StreamProgress {
    expected: u32,
    seen: Choices,
    finished: Choices,
    failure: Option<ErrorClass>,
    done: bool,
}

impl StreamProgress {
    /// For a stream of `expected` choices ([`RequestFacts::choices`](super::RequestFacts::choices)).
    pub fn new(expected: u32) -> Self {
        Self {
            expected: expected.max(1),
            seen: Choices::default(),
            finished: Choices::default(),
            failure: None,
            done: false,
        }
    }

    /// Takes note of an event, in the order of the stream.
    pub fn observe(&mut self, facts: &EventFacts) {
        self.done |= facts.done;
        if self.complete() || self.failure.is_some() {
            return;
        }
        self.seen = self.seen.union(facts.choices);
        self.finished = self.finished.union(facts.finished);
        let cut = facts.finish.is_some_and(|finish| !finish.is_good());
        self.failure = facts.error.or(cut.then_some(ErrorClass::ServerFault));
    }

    /// Whether the answer is whole: every choice that was asked for or seen has ended well, and no
    /// error came before.
    pub fn complete(&self) -> bool {
        self.failure.is_none() && self.finished.count() >= self.expected && self.seen.is_within(self.finished)
    }

    /// What broke the stream, if anything said so before it was complete. The first cause is kept.
    pub fn failure(&self) -> Option<ErrorClass> {
        self.failure
    }

    /// Whether the dialect's terminator came. No proof of success.
    pub fn done(&self) -> bool {
        self.done
    }

    /// Whether the answer is whole if its body ends here, `clean`ly (with its terminator) or not. For a
    /// dialect that does not mark the end of a generation (Triton) a clean end is all the proof there is.
    pub fn whole_at_end(&self, endpoint: Endpoint, clean: bool) -> bool {
        let unmarked = matches!(endpoint, Endpoint::KserveGenerate | Endpoint::KserveGenerateStream);
        self.complete() || (clean && unmarked && self.failure.is_none())
    }
}
