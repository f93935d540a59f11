//! The last thing that happens to the bytes of a token stream: ids that evergate asked for without its client's
//! knowledge are taken out (`policy::resume::Unseen`).
//!
//! Everything before works with what the engine wrote: what is noted, held back, or compared. Whole events go in, in any
//! pieces, and go out without delay; the beginning of one waits for its rest.

use std::ops::ControlFlow;

use bytes::Bytes;

use crate::policy::dialect::Engine;
use crate::policy::resume::{ASKED_EVENT_BYTES_MAX, Unseen};
use crate::sse::{Decoder, TooLarge};

/// Hides the ids in one stream.
pub(super) struct Outlet {
    decoder: Decoder,
    unseen: Unseen,
    /// An event was too large to be read: from there on bytes are passed on as they come.
    opaque: bool,
}

impl Outlet {
    /// For a stream of which the first leg, of this engine, was asked for ids; `event_bytes_max`: as it was read.
    pub(super) fn of(engine: Engine, event_bytes_max: usize) -> Self {
        let limit = event_bytes_max.max(ASKED_EVENT_BYTES_MAX);
        Self { decoder: Decoder::new(limit), unseen: Unseen::of(engine), opaque: false }
    }

    /// What the client is to see of the next bytes; empty while an event is not whole.
    pub(super) fn pass(&mut self, mut chunk: Bytes) -> Bytes {
        if self.opaque {
            return chunk;
        }
        let Self { decoder, unseen, .. } = self;
        let (mut edited, mut at, mut any) = (Vec::new(), 0, false);
        let read = decoder.feed(&chunk, |event| {
            let before = edited.len();
            if !event.is_carried() {
                if before == 0 {
                    edited.reserve(chunk.len());
                }
                edited.extend_from_slice(&chunk[at..event.start]);
            }
            match unseen.hide(&event, &mut edited) {
                true => (at, any) = (event.end, true),
                false if event.is_carried() => {
                    edited.extend_from_slice(event.raw);
                    (at, any) = (event.end, true);
                }
                false => edited.truncate(before),
            }
            ControlFlow::Continue(())
        });
        match read {
            Ok(whole) if any => {
                edited.extend_from_slice(&chunk[at..whole]);
                edited.into()
            }
            Ok(whole) => {
                chunk.truncate(whole);
                match decoder.take_carried() {
                    carried if carried.is_empty() => chunk,
                    carried => [carried.as_slice(), &chunk].concat().into(),
                }
            }
            Err(TooLarge { .. }) => {
                self.opaque = true;
                [decoder.take_carried(), decoder.take_pending(), chunk.to_vec()].concat().into()
            }
        }
    }

    /// What is left at the end.
    pub(super) fn rest(&mut self) -> Bytes {
        self.decoder.take_pending().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_hidden_however_the_bytes_are_split() {
        let event = |text: &str, ids: &str| {
            format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"{text}\",\"token_ids\":{ids}}}]}}\r\n\r\n")
        };
        let with = format!(
            ": beat\n\n{}\n{}{}data: [DONE]\n\n",
            event("a", "[1]"),
            event("b", "[2,3]"),
            event("", "[4]")
        );
        let without = format!(
            ": beat\n\n{}\n{}{}data: [DONE]\n\n",
            event("a", "null"),
            event("b", "null"),
            event("", "null")
        );
        for first in 0..with.len() {
            for second in [first, first + 1, first + 40] {
                let second = second.min(with.len());
                let mut outlet = Outlet::of(Engine::Vllm, 1 << 20);
                let mut out = Vec::new();
                for part in [&with[..first], &with[first..second], &with[second..]] {
                    out.extend_from_slice(&outlet.pass(Bytes::copy_from_slice(part.as_bytes())));
                }
                out.extend_from_slice(&outlet.rest());
                assert_eq!(String::from_utf8(out).unwrap(), without, "{first} {second}");
            }
        }
    }

    #[test]
    fn an_event_too_large_to_read_is_passed_on_whole() {
        let mut outlet = Outlet::of(Engine::Vllm, 0);
        let wire = format!("data: {}\n\ndata: x\n\n", "x".repeat(ASKED_EVENT_BYTES_MAX + 1));
        let mut out = Vec::new();
        for part in wire.as_bytes().chunks(1 << 20) {
            out.extend_from_slice(&outlet.pass(Bytes::copy_from_slice(part)));
        }
        out.extend_from_slice(&outlet.rest());
        assert!(out == wire.as_bytes());
    }
}
