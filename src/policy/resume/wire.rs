//! In whose words a stream is told: the interface between the splice and the APIs it can splice.
//!
//! A splice knows texts on channels, marks, names and ends ([`Chunk`]). An API says how its events are told apart, what
//! each of them says in those terms, and how one is written. To add another: a reader like `anthropic.rs` or
//! `ollama.rs`, a variant here (the compiler asks for the rest), and tests like those of the other two.
//!
//! What a reader must see to: all of the JSON is validated; whatever it does not understand is `unknown` and makes the
//! stream one that is not resumed; what opens or closes something is a [`mark`](Chunk::mark), told once.

use std::ops::ControlFlow;

use super::chunk::Chunk;
use super::{anthropic, ollama};
use crate::policy::dialect::Endpoint;
use crate::policy::json::JsonError;
use crate::sse::{Decoder, Event, Lines, TooLarge, write_event};

/// An API whose streams can be spliced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// Chat completions and completions.
    OpenAi,
    /// Anthropic's messages.
    Anthropic,
    /// Ollama's own, a JSON object a line.
    Ollama,
}

impl Wire {
    /// Whose words are spoken at `endpoint`, if they are known.
    pub(super) fn of(endpoint: Endpoint) -> Option<Self> {
        match endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => Some(Self::OpenAi),
            Endpoint::AnthropicMessages => Some(Self::Anthropic),
            Endpoint::OllamaChat | Endpoint::OllamaGenerate => Some(Self::Ollama),
            _ => None,
        }
    }

    /// Events are lines, and not server-sent.
    pub(super) fn is_lines(self) -> bool {
        self == Self::Ollama
    }

    /// Reads and validates one event's data.
    pub(super) fn read(self, data: &[u8]) -> Result<Chunk<'_>, JsonError> {
        match self {
            Self::OpenAi => Chunk::read(data),
            Self::Anthropic => anthropic::read(data),
            Self::Ollama => ollama::read(data),
        }
    }

    /// Writes an event whose data was read as `chunk`.
    pub(super) fn write(self, out: &mut Vec<u8>, chunk: &Chunk<'_>, data: &[u8]) {
        match self {
            Self::OpenAi => write_event(out, None, data),
            Self::Anthropic => write_event(out, chunk.kind.and_then(|kind| str::from_utf8(kind).ok()), data),
            Self::Ollama => {
                out.extend_from_slice(data);
                out.push(b'\n');
            }
        }
    }

    /// Writes what ends a stream behind its finish.
    pub(super) fn write_end(self, out: &mut Vec<u8>) {
        match self {
            Self::OpenAi => write_event(out, None, b"[DONE]"),
            Self::Anthropic => write_event(out, Some("message_stop"), br#"{"type":"message_stop"}"#),
            // The finish is the end.
            Self::Ollama => {}
        }
    }
}

/// Tells the events of one leg apart.
#[derive(Clone, Debug)]
pub(super) enum Framing {
    Events(Decoder),
    Lines(Lines),
}

impl Framing {
    pub(super) fn new(wire: Wire, event_bytes_max: usize) -> Self {
        match wire.is_lines() {
            true => Self::Lines(Lines::new(event_bytes_max)),
            false => Self::Events(Decoder::new(event_bytes_max)),
        }
    }

    pub(super) fn feed<F>(&mut self, raw: &[u8], on_event: F) -> Result<usize, TooLarge>
    where
        F: FnMut(Event<'_>) -> ControlFlow<()>,
    {
        match self {
            Self::Events(decoder) => decoder.feed(raw, on_event),
            Self::Lines(lines) => lines.feed(raw, on_event),
        }
    }

    /// Bytes of an event that is not whole yet.
    pub(super) fn pending(&self) -> usize {
        match self {
            Self::Events(decoder) => decoder.pending().len(),
            Self::Lines(lines) => lines.pending().len(),
        }
    }
}
