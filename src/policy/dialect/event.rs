//! One event of an answer stream, and what a stream of them amounts to.
//!
//! Each event gets one validating pass without allocation, whatever its dialect; the readers of the
//! dialects only differ in which members they stop at.

use std::fmt;

use super::error::classify_error_body;
use super::frame::Frame;
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
    pub(in crate::policy) fn of_value(value: Value<'_>) -> Option<Self> {
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
        self.known == 0 && self.beyond == 0
    }

    fn union(self, other: Self) -> Self {
        Self { known: self.known | other.known, beyond: self.beyond.saturating_add(other.beyond) }
    }

    /// Whether `other` has every choice told apart in this set.
    fn is_within(self, other: Self) -> bool {
        self.known & !other.known == 0
    }
}

/// Whose words a piece of text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextKind {
    /// The answer itself.
    Content,
    /// The thinking before it.
    Reasoning,
    /// Something else that the client is told: a refusal, the arguments of a tool call, an output under
    /// a name of its own.
    Other,
}

/// A piece of text as it stands in the data of an event: between its quotes, escapes and all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Offset of its first byte.
    pub start: usize,
    /// Offset behind its last byte.
    pub end: usize,
    /// Whose words it is.
    pub kind: TextKind,
}

/// What one event says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventFacts {
    /// It carries a token: text, reasoning, refusal or a part of a tool call. Roles, empty chunks,
    /// pings, comments and usage do not.
    pub meaningful: bool,
    /// Where its token stands, when it carries one piece of text and nothing else.
    pub text: Option<Text>,
    /// Between the quotes of the last piece of the answer itself, whatever else it carries.
    pub content: Option<(usize, usize)>,
    /// Between the brackets of the list of token ids, where it has one.
    pub ids: Option<(usize, usize)>,
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
    /// Events of one [`EventReader`] with the same number, if that is not 0, are equal but for what stands at `text`
    /// and between the brackets of `ids`.
    pub mould: u32,
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
    /// Notes something that the client is told, unless it is blank.
    pub(super) fn say(&mut self, value: Value<'_>, kind: TextKind) {
        if value.is_blank() {
            return;
        }
        let alone = !self.meaningful && value.kind() == Kind::String;
        let (start, end) = (value.span().start + 1, value.span().end - 1);
        self.text = alone.then_some(Text { start, end, kind });
        if kind == TextKind::Content && value.kind() == Kind::String {
            self.content = Some((start, end));
        }
        self.meaningful = true;
    }

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

/// Reads the events of one stream, and knows the last one.
///
/// The chunks of a stream differ in their token and in little else. An event that equals the last one
/// but for what stands between the quotes of its text, and has a valid string there, is valid and says the
/// same: that is seen at a tenth of the cost of reading it. Everything else goes through [`read_event`],
/// and the two agree on every input.
#[derive(Clone, Debug)]
pub struct EventReader {
    endpoint: Endpoint,
    frame: Frame,
    /// Of the event in `frame`; its `text` is `Some` unless that is empty. Its `mould` counts the frames.
    facts: EventFacts,
}

/// Larger events are not remembered: with logprobs no two are alike.
const REMEMBERED_BYTES_MAX: usize = 2048;

impl EventReader {
    /// For a stream that answers a request to `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, frame: Frame::default(), facts: EventFacts::default() }
    }

    /// What [`read_event`] says, and its mould.
    pub fn read(&mut self, event: &Event<'_>) -> Result<EventFacts, InvalidEvent> {
        if let Some(facts) = self.recognise(event) {
            return Ok(facts);
        }
        let mut facts = read_event(self.endpoint, event)?;
        // The class of an error may depend on its words; nothing else does on the text or the ids.
        if let Some(text) = facts.text.filter(|_| facts.error.is_none())
            && event.data.len() <= REMEMBERED_BYTES_MAX
        {
            self.frame.set(event.data, text.start..text.end, facts.ids.map(|(start, end)| start..end));
            facts.mould = self.facts.mould.wrapping_add(1).max(1);
            self.facts = facts;
        }
        Ok(facts)
    }

    fn recognise(&self, event: &Event<'_>) -> Option<EventFacts> {
        if event.error_field.is_some() || event.name == Some(b"error") {
            return None;
        }
        let filled = self.frame.fit(event.data)?;
        let (start, end) = (filled.text.start, filled.text.end);
        let text = self.facts.text.map(|text| Text { start, end, ..text });
        let content = self.facts.content.map(|_| (start, end));
        let ids = filled.ids.map(|ids| (ids.start, ids.end));
        Some(EventFacts { text, content, ids, ..self.facts })
    }
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
    let mut reader = Reader::new(json);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sse::{Decoder, Lines};
    use proptest::prelude::*;
    use std::ops::ControlFlow;

    struct Read {
        /// Per event: `t` token, `f` good finish, `x` bad finish, `e` error, `d` terminator, `u` usage,
        /// `.` nothing, `!` invalid. Several letters for several facts; events parted by spaces.
        letters: String,
        progress: StreamProgress,
        errors: Vec<ErrorClass>,
    }

    fn unnumbered(facts: EventFacts) -> EventFacts {
        EventFacts { mould: 0, ..facts }
    }

    fn read(endpoint: Endpoint, choices: u32, wire: &str) -> Read {
        let mut progress = StreamProgress::new(choices);
        let mut errors = Vec::new();
        let mut events: Vec<String> = Vec::new();
        let mut reader = EventReader::new(endpoint);
        let on_event = |event: Event<'_>| {
            let mut letters = String::new();
            let result = read_event(endpoint, &event);
            assert_eq!(reader.read(&event).map(unnumbered), result);
            match result {
                Err(InvalidEvent::Json(_)) => letters.push('!'),
                Ok(facts) => {
                    let mut note = |is: bool, letter: char| letters.extend(is.then_some(letter));
                    note(facts.meaningful, 't');
                    note(facts.finish.is_some_and(Finish::is_good), 'f');
                    note(facts.finish.is_some_and(|finish| !finish.is_good()), 'x');
                    note(facts.error.is_some(), 'e');
                    note(facts.done, 'd');
                    note(facts.usage_only, 'u');
                    errors.extend(facts.error);
                    progress.observe(&facts);
                }
            }
            events.push(if letters.is_empty() { ".".to_owned() } else { letters });
            ControlFlow::Continue(())
        };
        let whole = if wire.starts_with('{') {
            Lines::new(1 << 20).feed(wire.as_bytes(), on_event)
        } else {
            Decoder::new(1 << 20).feed(wire.as_bytes(), on_event)
        };
        assert_eq!(whole, Ok(wire.len()));
        Read { letters: events.join(" "), progress, errors }
    }

    fn chat(deltas: &[&str]) -> String {
        let chunk = |choices: &&str| {
            format!(
                "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\
                 \"model\":\"m\",\"choices\":[{choices}]}}\n\n"
            )
        };
        deltas.iter().map(chunk).collect()
    }

    #[test]
    fn vllm_chat() {
        let wire = chat(&[
            r#"{"index":0,"delta":{"role":"assistant","content":"","reasoning_content":null},"logprobs":null,"finish_reason":null}"#,
            r#"{"index":0,"delta":{"content":"Hel"},"logprobs":null,"finish_reason":null,"token_ids":null}"#,
            r#"{"index":0,"delta":{"content":"","tool_calls":[]},"finish_reason":null}"#,
            r#"{"index":0,"delta":{"content":"lo"},"logprobs":null,"finish_reason":"stop","stop_reason":null}"#,
        ]) + "data: {\"id\":\"chatcmpl-1\",\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"total_tokens\":5}}\n\n\
              data: [DONE]\n\n";
        let read = read(Endpoint::ChatCompletions, 1, &wire);
        assert_eq!(read.letters, ". t . tf u d");
        assert!(read.progress.complete() && read.progress.done());
    }

    #[test]
    fn vllm_reports_a_dead_engine_as_a_bad_request_and_then_done() {
        let wire = chat(&[r#"{"index":0,"delta":{"content":"Hel"},"finish_reason":null}"#])
            + "data: {\"error\":{\"message\":\"EngineCore encountered an issue. See stack trace (above) for the \
               root cause.\",\"type\":\"BadRequestError\",\"param\":null,\"code\":400}}\n\ndata: [DONE]\n\n";
        let read = read(Endpoint::ChatCompletions, 1, &wire);
        assert_eq!(read.letters, "t e d");
        assert_eq!(read.progress.failure(), Some(ErrorClass::ServerFault));
        assert!(!read.progress.complete());
        assert!(!read.progress.whole_at_end(Endpoint::ChatCompletions, true));
    }

    #[test]
    fn vllm_of_2024_sends_flat_errors() {
        let wire = "data: {\"object\":\"error\",\"message\":\"boom\",\"type\":\"InternalServerError\",\"param\":null,\
                    \"code\":500}\n\n";
        assert_eq!(read(Endpoint::ChatCompletions, 1, wire).errors, [ErrorClass::ServerFault]);
    }

    #[test]
    fn a_client_fault_in_a_200_keeps_its_status() {
        let wire = "data: {\"error\":{\"message\":\"This model's maximum context length is 8 tokens.\",\"type\":\
                    \"BadRequestError\",\"param\":\"input_tokens\",\"code\":400}}\n\ndata: [DONE]\n\n";
        assert_eq!(read(Endpoint::ChatCompletions, 1, wire).errors, [ErrorClass::ClientFault(400)]);
    }

    #[test]
    fn abort_looks_like_an_end_and_is_none() {
        let wire = chat(&[
            r#"{"index":0,"delta":{"content":"Hel"},"finish_reason":null}"#,
            r#"{"index":0,"delta":{},"finish_reason":"abort"}"#,
        ]) + "data: [DONE]\n\n";
        let read = read(Endpoint::ChatCompletions, 1, &wire);
        assert_eq!(read.letters, "t x d");
        assert_eq!(read.progress.failure(), Some(ErrorClass::ServerFault));
        assert!(!read.progress.complete());
    }

    #[test]
    fn sglang_finishes_in_a_chunk_of_its_own() {
        let wire = chat(&[
            r#"{"index":0,"delta":{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":null,"matched_stop":null}"#,
            r#"{"index":0,"delta":{"role":null,"content":"Hi","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":null}"#,
            r#"{"index":0,"delta":{"role":null,"content":null,"reasoning_content":null,"tool_calls":null},"finish_reason":"stop","matched_stop":128009}"#,
        ]) + "data: [DONE]\n\n";
        assert_eq!(read(Endpoint::ChatCompletions, 1, &wire).letters, ". t f d");
    }

    #[test]
    fn sglang_generate() {
        let wire = "data: {\"text\":\"\",\"output_ids\":[],\"meta_info\":{\"id\":\"1\",\"finish_reason\":null}}\n\n\
                    data: {\"text\":\"Hi\",\"output_ids\":[1],\"meta_info\":{\"id\":\"1\",\"finish_reason\":null}}\n\n\
                    data: {\"text\":\"Hi you\",\"output_ids\":[1,2],\"meta_info\":{\"id\":\"1\",\"finish_reason\":\
                    {\"type\":\"length\",\"length\":2}}}\n\ndata: [DONE]\n\n";
        let whole = read(Endpoint::Generate, 1, wire);
        assert_eq!(whole.letters, ". t tf d");
        assert!(whole.progress.complete());
        let aborted = wire
            .replace("{\"type\":\"length\",\"length\":2}", "{\"type\":\"abort\",\"message\":\"Aborted\"}");
        assert!(!read(Endpoint::Generate, 1, &aborted).progress.complete());
    }

    #[test]
    fn llamacpp_chat_starts_with_null_content_and_comments() {
        let wire = ":\n\n".to_owned()
            + &chat(&[
                r#"{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}"#,
                r#"{"finish_reason":null,"index":0,"delta":{"content":"Hi"}}"#,
                r#"{"finish_reason":"length","index":0,"delta":{}}"#,
            ])
            + "data: {\"choices\":[],\"created\":1,\"usage\":{\"completion_tokens\":1},\"timings\":{\"n\":1}}\n\n\
               data: [DONE]\n\n";
        assert_eq!(read(Endpoint::ChatCompletions, 1, &wire).letters, ". . t f u d");
    }

    #[test]
    fn llamacpp_of_2025_sends_errors_as_a_field() {
        let wire = "error: {\"code\":500,\"message\":\"context shift\",\"type\":\"server_error\"}\n\ndata: [DONE]\n\n";
        let read = read(Endpoint::ChatCompletions, 1, wire);
        assert_eq!(read.letters, "e d");
        assert_eq!(read.errors, [ErrorClass::ServerFault]);
    }

    #[test]
    fn llamacpp_completion_ends_with_stop() {
        let wire = "data: {\"index\":0,\"content\":\"\",\"tokens\":[],\"stop\":false,\"prompt_progress\":{\"total\":9}}\n\n\
                    data: {\"index\":0,\"content\":\"Hi\",\"tokens\":[1],\"stop\":false,\"id_slot\":-1}\n\n\
                    data: {\"index\":0,\"content\":\"\",\"tokens\":[],\"stop\":true,\"stop_type\":\"limit\"}\n\n";
        for endpoint in [Endpoint::LlamaCompletion, Endpoint::Infill, Endpoint::Completions] {
            let read = read(endpoint, 1, wire);
            assert_eq!(read.letters, ". t fd");
            assert!(read.progress.complete());
        }
        let wire = "data: {\"error\":{\"code\":503,\"message\":\"Loading model\",\"type\":\"unavailable_error\"}}\n\n";
        assert_eq!(read(Endpoint::LlamaCompletion, 1, wire).errors, [ErrorClass::Overloaded]);
    }

    #[test]
    fn tgi_native_and_chat() {
        let wire = "data:{\"index\":1,\"token\":{\"id\":1,\"text\":\" Hi\",\"logprob\":-0.1,\"special\":false},\
                    \"generated_text\":null,\"details\":null}\n\n\
                    data:{\"index\":2,\"token\":{\"id\":2,\"text\":\"</s>\",\"special\":true},\"generated_text\":\" Hi\",\
                    \"details\":{\"finish_reason\":\"eos_token\",\"generated_tokens\":2,\"seed\":null}}\n\n";
        let whole = read(Endpoint::GenerateStream, 1, wire);
        assert_eq!(whole.letters, "t tf");
        let special = r#"{"token":{"id":2,"text":"</s>","special":true},"generated_text":null}"#;
        assert!(!read_object(Endpoint::GenerateStream, special.as_bytes()).unwrap().meaningful);
        assert!(whole.progress.complete() && !whole.progress.done());

        let busy = "data:{\"error\":\"Model is overloaded\",\"error_type\":\"overloaded\"}\n\n";
        let invalid = "data:{\"error\":\"Input validation error: `inputs` must have less than 8 tokens\",\
                       \"error_type\":\"validation\"}\n\n";
        let broken = "data:{\"error\":\"Request failed during generation: Server error: CANCELLED\",\"error_type\":\
                      \"generation\"}\n\n";
        for endpoint in [Endpoint::GenerateStream, Endpoint::ChatCompletions] {
            assert_eq!(read(endpoint, 1, busy).errors, [ErrorClass::Overloaded]);
            assert_eq!(read(endpoint, 1, invalid).errors, [ErrorClass::ClientFault(422)]);
            assert_eq!(read(endpoint, 1, broken).errors, [ErrorClass::ServerFault]);
        }
    }

    #[test]
    fn trtllm_ends_lines_with_a_space() {
        let wire = "data: {\"choices\":[{\"index\":0,\"text\":\"Hi\",\"finish_reason\":null}]} \n\ndata: [DONE] \n\n";
        assert_eq!(read(Endpoint::Completions, 1, wire).letters, "t d");
    }

    #[test]
    fn ollama_lines() {
        let wire = "{\"model\":\"m\",\"created_at\":\"t\",\"message\":{\"role\":\"assistant\",\"content\":\"\",\"thinking\":\"Hm\"},\"done\":false}\n\
                    {\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"Hi\"},\"done\":false}\n\
                    {\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"\"},\"done_reason\":\"stop\",\"done\":true,\"eval_count\":2}\n";
        let whole = read(Endpoint::OllamaChat, 1, wire);
        assert_eq!(whole.letters, "t t fd");
        assert!(whole.progress.complete());

        let wire = "{\"model\":\"m\",\"response\":\"Hi\",\"done\":false}\n{\"error\":\"llama runner process no longer running\"}\n";
        let cut = read(Endpoint::OllamaGenerate, 1, wire);
        assert_eq!(cut.letters, "t e");
        assert_eq!(cut.progress.failure(), Some(ErrorClass::ServerFault));

        let wire = "{\"error\":\"server busy, please try again.  maximum pending requests exceeded\"}\n";
        assert_eq!(read(Endpoint::OllamaChat, 1, wire).errors, [ErrorClass::Overloaded]);
    }

    #[test]
    fn llamacpp_serves_the_ollama_path_in_openai_shape() {
        let wire = chat(&[
            r#"{"index":0,"delta":{"content":"Hi"},"finish_reason":null}"#,
            r#"{"index":0,"delta":{},"finish_reason":"stop"}"#,
        ]);
        assert_eq!(read(Endpoint::OllamaChat, 1, &wire).letters, "t f");
    }

    #[test]
    fn anthropic_messages() {
        let wire = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[],\"stop_reason\":null,\"usage\":{\"input_tokens\":9}}}\n\n\
                    event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n\
                    event: ping\ndata: {\"type\":\"ping\"}\n\n\
                    event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hi\"}}\n\n\
                    event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n\
                    event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":1,\"content_block\":{\"type\":\"tool_use\",\"id\":\"t\",\"name\":\"get\",\"input\":{}}}\n\n\
                    event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"tool_use\",\"stop_sequence\":null},\"usage\":{\"output_tokens\":5}}\n\n\
                    event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
        let whole = read(Endpoint::AnthropicMessages, 1, wire);
        assert_eq!(whole.letters, ". . . t . t f d");
        assert!(whole.progress.complete() && whole.progress.done());

        let wire = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n";
        assert_eq!(read(Endpoint::AnthropicMessages, 1, wire).errors, [ErrorClass::Overloaded]);
        let wire = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"x\"}}\n\n";
        assert_eq!(read(Endpoint::AnthropicMessages, 1, wire).errors, [ErrorClass::ServerFault]);
    }

    #[test]
    fn responses() {
        let wire = "event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":0,\"response\":{\"id\":\"r\",\"object\":\"response\",\"status\":\"in_progress\",\"error\":null}}\n\n\
                    event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"sequence_number\":1,\"delta\":\"Hi\"}\n\n\
                    event: response.completed\ndata: {\"type\":\"response.completed\",\"sequence_number\":2,\"response\":{\"id\":\"r\",\"status\":\"completed\",\"error\":null}}\n\n";
        let whole = read(Endpoint::Responses, 1, wire);
        assert_eq!(whole.letters, ". t fd");
        assert!(whole.progress.complete());

        let wire = "data: {\"type\":\"response.incomplete\",\"response\":{\"incomplete_details\":{\"reason\":\"max_output_tokens\"}}}\n\n";
        assert!(read(Endpoint::Responses, 1, wire).progress.complete());
        let wire = "data: {\"type\":\"response.failed\",\"response\":{\"status\":\"failed\",\"error\":{\"code\":\"rate_limit_exceeded\",\"message\":\"x\"}}}\n\n";
        assert_eq!(read(Endpoint::Responses, 1, wire).errors, [ErrorClass::Overloaded]);
        let wire = "data: {\"type\":\"error\",\"code\":\"server_error\",\"message\":\"x\",\"param\":null,\"sequence_number\":3}\n\n";
        assert_eq!(read(Endpoint::Responses, 1, wire).errors, [ErrorClass::ServerFault]);
    }

    #[test]
    fn triton_has_no_end_but_that_of_its_body() {
        let wire = "data: {\"model_name\":\"m\",\"model_version\":\"1\",\"text_output\":\"Hi\"}\n\n\
                    data: {\"model_name\":\"m\",\"model_version\":\"1\",\"text_output\":\"\"}\n\n";
        let whole = read(Endpoint::KserveGenerateStream, 1, wire);
        assert_eq!(whole.letters, "t .");
        assert!(!whole.progress.complete());
        assert!(whole.progress.whole_at_end(Endpoint::KserveGenerateStream, true));
        assert!(!whole.progress.whole_at_end(Endpoint::KserveGenerateStream, false));
        let cut = read(Endpoint::KserveGenerateStream, 1, "data: {\"error\":\"in ensemble 'm', died\"}\n\n");
        assert!(!cut.progress.whole_at_end(Endpoint::KserveGenerateStream, true));
    }

    #[test]
    fn several_choices_must_all_finish() {
        let finish = |index: u32, reason: &str| {
            chat(&[&format!(r#"{{"index":{index},"delta":{{"content":"x"}},"finish_reason":"{reason}"}}"#)])
        };
        let two = finish(0, "stop") + &finish(1, "length");
        assert!(read(Endpoint::ChatCompletions, 2, &two).progress.complete());
        // Asked for three, or seen three.
        assert!(!read(Endpoint::ChatCompletions, 3, &two).progress.complete());
        let began = chat(&[r#"{"index":2,"delta":{"content":"x"},"finish_reason":null}"#]);
        assert!(!read(Endpoint::ChatCompletions, 2, &(began + &two)).progress.complete());
        // One of two aborted.
        let mixed = finish(0, "stop") + &finish(1, "abort");
        assert_eq!(
            read(Endpoint::ChatCompletions, 2, &mixed).progress.failure(),
            Some(ErrorClass::ServerFault)
        );
        // Twice the same is one.
        let same = finish(0, "stop") + &finish(0, "stop");
        assert!(!read(Endpoint::ChatCompletions, 2, &same).progress.complete());
        // Said twice, in between.
        assert!(read(Endpoint::ChatCompletions, 2, &(same + &finish(1, "stop"))).progress.complete());
        let began = chat(&[r#"{"index":1,"delta":{"content":"x"},"finish_reason":null}"#; 2]);
        assert!(!read(Endpoint::ChatCompletions, 1, &(began + &finish(0, "stop"))).progress.complete());
        // Both in one chunk.
        let both = chat(&[
            r#"{"index":0,"delta":{},"finish_reason":"stop"},{"index":1,"delta":{},"finish_reason":"stop"}"#,
        ]);
        assert!(read(Endpoint::ChatCompletions, 2, &both).progress.complete());
        // Beyond what is told apart: a batch of 200 prompts.
        let many: String = (0..200).map(|index| finish(index, "stop")).collect();
        assert!(read(Endpoint::Completions, 200, &many).progress.complete());
        let most: String = (0..199).map(|index| finish(index, "stop")).collect();
        assert!(!read(Endpoint::Completions, 200, &most).progress.complete());
    }

    #[test]
    fn an_error_behind_a_complete_answer_is_no_failure() {
        let wire = chat(&[r#"{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}"#])
            + "data: {\"error\":{\"message\":\"late\",\"code\":500}}\n\n";
        let read = read(Endpoint::ChatCompletions, 1, &wire);
        assert!(read.progress.complete());
        assert_eq!(read.progress.failure(), None);
    }

    #[test]
    fn garbage_is_invalid_in_every_dialect() {
        for endpoint in [
            Endpoint::ChatCompletions,
            Endpoint::Responses,
            Endpoint::AnthropicMessages,
            Endpoint::OllamaChat,
            Endpoint::LlamaCompletion,
            Endpoint::GenerateStream,
            Endpoint::KserveGenerateStream,
        ] {
            for data in
                ["{\"choices\":[", "{\"a\":NaN}", "[1]", "7", "", "\u{1}", "{} {}", "{\"choices\":[}]}"]
            {
                let wire = format!("data: {data}\n\n");
                assert_eq!(read(endpoint, 1, &wire).letters, "!", "{endpoint:?} {data:?}");
            }
        }
        // Not evergate's to judge.
        assert_eq!(read(Endpoint::Other, 1, "data: anything\n\n").letters, ".");
    }

    #[test]
    fn tool_calls_and_reasoning_are_tokens_and_unknown_reasons_are_ends() {
        for (delta, letters) in [
            (r#"{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}"#, "t"),
            (r#"{"reasoning":"Hm"}"#, "t"),
            (r#"{"refusal":"No"}"#, "t"),
            (r#"{"role":"assistant"}"#, "."),
            ("{}", "."),
            ("null", "."),
        ] {
            let wire = chat(&[&format!(r#"{{"index":0,"delta":{delta},"finish_reason":null}}"#)]);
            assert_eq!(read(Endpoint::ChatCompletions, 1, &wire).letters, letters, "{delta}");
        }
        for (reason, letters) in [("repetition", "f"), ("error", "x"), ("", "."), ("content_filter", "f")] {
            let wire = chat(&[&format!(r#"{{"index":0,"delta":{{}},"finish_reason":"{reason}"}}"#)]);
            assert_eq!(read(Endpoint::ChatCompletions, 1, &wire).letters, letters, "{reason}");
        }
    }

    #[test]
    fn the_text_of_a_token_is_found() {
        for (endpoint, data, text, kind) in [
            (
                Endpoint::ChatCompletions,
                r#"{"choices":[{"delta":{"content":"a\"b"}}]}"#,
                r#"a\"b"#,
                TextKind::Content,
            ),
            (
                Endpoint::ChatCompletions,
                r#"{"choices":[{"delta":{"reasoning":"h"}}]}"#,
                "h",
                TextKind::Reasoning,
            ),
            (Endpoint::Completions, r#"{"choices":[{"text":" x"}]}"#, " x", TextKind::Content),
            (Endpoint::LlamaCompletion, r#"{"content":"x","stop":false}"#, "x", TextKind::Content),
            (Endpoint::GenerateStream, r#"{"token":{"id":1,"text":"x"}}"#, "x", TextKind::Content),
            (Endpoint::OllamaChat, r#"{"message":{"thinking":"x","content":""}}"#, "x", TextKind::Reasoning),
            (Endpoint::OllamaGenerate, r#"{"response":"x","done":false}"#, "x", TextKind::Content),
            (Endpoint::KserveGenerateStream, r#"{"text_output":"x"}"#, "x", TextKind::Content),
            (
                Endpoint::AnthropicMessages,
                r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"x"}}"#,
                "x",
                TextKind::Content,
            ),
            (
                Endpoint::Responses,
                r#"{"type":"response.output_text.delta","delta":"x"}"#,
                "x",
                TextKind::Content,
            ),
        ] {
            let facts = read_object(endpoint, data.as_bytes()).unwrap();
            let found = facts.text.unwrap();
            assert_eq!((&data[found.start..found.end], found.kind), (text, kind), "{data}");
        }
        for data in [
            r#"{"choices":[{"delta":{"content":"a","reasoning":"b"}}]}"#,
            r#"{"choices":[{"delta":{"content":"a","tool_calls":[{}]}}]}"#,
            r#"{"choices":[{"text":"a"},{"text":"b","index":1}]}"#,
            r#"{"choices":[{"delta":{"content":""}}]}"#,
        ] {
            assert_eq!(read_object(Endpoint::ChatCompletions, data.as_bytes()).unwrap().text, None, "{data}");
        }
    }

    fn event(data: &[u8]) -> Event<'_> {
        Event { name: None, data, has_data: true, error_field: None, raw: data, start: 0, end: data.len() }
    }

    #[test]
    fn an_event_is_recognised_only_when_its_text_alone_differs() {
        let wrap = |text: &str, end: &str| {
            format!(
                r#"{{"id":"1","choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":{end}}}]}}"#
            )
        };
        let mut reader = EventReader::new(Endpoint::ChatCompletions);
        let first = reader.read(&event(wrap("Hi", "null").as_bytes())).unwrap();
        assert_ne!(first.mould, 0);
        for text in ["x", "a longer one", "\\n", "\\\"", "\u{e9}", "\\u00e9"] {
            let data = wrap(text, "null");
            let facts = reader.recognise(&event(data.as_bytes())).unwrap();
            assert_eq!(
                Ok(unnumbered(facts)),
                read_event(Endpoint::ChatCompletions, &event(data.as_bytes())),
                "{text}"
            );
            assert_eq!(facts.mould, first.mould);
        }
        // Not a token; not a string; two strings; another end.
        for text in [
            "",
            "\u{1}",
            "\\x",
            "\\",
            "a\"",
            "a\",\"role\":\"b",
            "a\"},\"finish_reason\":\"stop\",\"x\":{\"y\":\"",
        ] {
            assert_eq!(reader.recognise(&event(wrap(text, "null").as_bytes())), None, "{text}");
        }
        assert_eq!(reader.recognise(&event(wrap("x", "\"stop\"").as_bytes())), None);
        let bad =
            [&wrap("x", "null").as_bytes()[..40], b"\xFF", &wrap("x", "null").as_bytes()[40..]].concat();
        assert_eq!(reader.recognise(&event(&bad)), None);
    }

    proptest! {
        /// Streams of events that are nearly alike, some of them damaged.
        #[test]
        fn knowing_the_last_event_changes_nothing(
            events in prop::collection::vec(
                (
                    prop::sample::select(vec!["content", "reasoning", "role"]),
                    prop::sample::select(vec!["", "x", "Hi", "\\n", "\\", "\"", "\u{e9}", "\",\"content\":\"y", "\u{1}"]),
                    prop::sample::select(vec!["null", "\"stop\"", "\"abort\""]),
                    prop::option::weighted(0.2, any::<(prop::sample::Index, u8)>()),
                ),
                0..20,
            ),
        ) {
            let mut reader = EventReader::new(Endpoint::ChatCompletions);
            for (name, text, end, damage) in events {
                let mut data = format!(
                    r#"{{"choices":[{{"index":0,"delta":{{"{name}":"{text}"}},"finish_reason":{end}}}]}}"#
                ).into_bytes();
                if let Some((place, byte)) = damage {
                    let place = place.index(data.len());
                    data[place] = byte;
                }
                let event = event(&data);
                prop_assert_eq!(reader.read(&event).map(unnumbered), read_event(Endpoint::ChatCompletions, &event));
            }
        }
    }

    #[test]
    fn every_engine_has_its_words_for_an_end() {
        for (words, finish) in [
            (&["stop", "end_turn", "eos", "eos_token", "stop_sequence", "word"][..], Finish::Stop),
            (
                &["length", "max_tokens", "max_output_tokens", "limit", "model_context_window_exceeded"],
                Finish::Length,
            ),
            (&["tool_calls", "function_call", "tool_use"], Finish::ToolCalls),
            (&["content_filter", "refusal", "safety"], Finish::ContentFilter),
            (&["abort", "aborted", "cancelled", "canceled"], Finish::Abort),
            (&["error", "server_error", "internal_error", "insufficient_system_resource"], Finish::Error),
            (&["a word from the future"], Finish::OtherGood),
        ] {
            for word in words {
                assert_eq!(Finish::of_reason(word.as_bytes()), finish, "{word}");
            }
        }
    }

    #[test]
    fn ids_are_found_before_and_behind_their_text_in_the_first_event_and_in_those_like_it() {
        let behind =
            |text: &str, ids: &str| format!(r#"{{"choices":[{{"text":"{text}","token_ids":{ids}}}]}}"#);
        let ahead =
            |text: &str, ids: &str| format!(r#"{{"choices":[{{"token_ids":{ids},"text":"{text}"}}]}}"#);
        for shape in [&behind as &dyn Fn(&str, &str) -> String, &ahead] {
            let mut reader = EventReader::new(Endpoint::Completions);
            for (text, ids, inside) in [
                ("Hi", "[7]", Some("7")),
                ("a", "[20,3]", Some("20,3")),
                ("b", "null", None),
                ("c", "[]", Some("")),
            ] {
                let data = shape(text, ids);
                let facts = reader.read(&event(data.as_bytes())).unwrap();
                assert_eq!(facts.ids.map(|(start, end)| &data[start..end]), inside, "{data}");
                let place = facts.text.unwrap();
                assert_eq!(&data[place.start..place.end], text, "{data}");
            }
        }
    }

    #[test]
    fn an_event_called_error_is_one_though_it_looks_like_the_last() {
        let data = |text: &str| format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}"#);
        let (first, second) = (data("Hi"), data("x"));
        let mut reader = EventReader::new(Endpoint::ChatCompletions);
        reader.read(&event(first.as_bytes())).unwrap();
        let named = Event { name: Some(b"error"), ..event(second.as_bytes()) };
        let field = Event { error_field: Some(b"boom"), ..event(second.as_bytes()) };
        for broken in [named, field] {
            assert_eq!(reader.read(&broken).unwrap().error, Some(ErrorClass::ServerFault));
        }
        assert_eq!(reader.read(&event(second.as_bytes())).unwrap().error, None);
    }

    #[test]
    fn an_end_says_why_and_of_which_choice() {
        let facts = |endpoint, json: &str| {
            let facts = read_object(endpoint, json.as_bytes()).unwrap();
            (facts.finish, facts.choices.count(), facts.meaningful)
        };
        for (endpoint, json, expected) in [
            (
                Endpoint::LlamaCompletion,
                r#"{"content":"","stop":true,"stop_type":"limit","index":2}"#,
                (Some(Finish::Length), 1, false),
            ),
            (
                Endpoint::LlamaCompletion,
                r#"{"content":"","stop":true,"stop_type":"none"}"#,
                (Some(Finish::Stop), 1, false),
            ),
            (Endpoint::LlamaCompletion, r#"{"content":"x","stop":false}"#, (None, 1, true)),
            (Endpoint::LlamaCompletion, r#"{"content":null,"stop":false}"#, (None, 0, false)),
            (
                Endpoint::OllamaGenerate,
                r#"{"response":"","done":true,"done_reason":"length"}"#,
                (Some(Finish::Length), 1, false),
            ),
            (Endpoint::OllamaGenerate, r#"{"response":"","thinking":"Hm","done":false}"#, (None, 1, true)),
            (
                Endpoint::KserveGenerateStream,
                r#"{"model_name":"m","sequence_id":7,"sequence_start":true,"sequence_end":true,"text_output":""}"#,
                (None, 0, false),
            ),
        ] {
            assert_eq!(facts(endpoint, json), expected, "{json}");
        }
    }

    #[test]
    fn an_invalid_event_says_so() {
        let fault = read_event(Endpoint::ChatCompletions, &event(b"{")).unwrap_err();
        assert!(fault.to_string().starts_with("event of the stream: "), "{fault}");
    }
}
