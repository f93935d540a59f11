//! A token stream as it comes from a backend: whole events in, whole events out, and what they prove.
//!
//! Bytes that end in the middle of an event are kept back until the event is whole, so that a replica which
//! dies there leaves nothing half-said at the client; an event that says failure is kept back altogether.
//! What is forwarded is forwarded unchanged. No I/O here.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use bytes::Bytes;

use crate::policy::dialect::{Endpoint, EventFacts, EventReader, Finish, StreamProgress};
use crate::policy::retry::Cause;
use crate::sse::{Decoder, Event, Lines, TooLarge, write_event};

/// An event with nothing but data has no more bytes around it: `data: `, two CRLF, and a space before one of them.
const FRAME_BYTES: usize = 11;

/// The reader of one answer.
pub(super) struct TokenStream {
    framing: Framing,
    reader: EventReader,
    progress: StreamProgress,
    endpoint: Endpoint,
    sequence: u64,
    /// An event was too large to be read: from there on the bytes are passed on as they come.
    opaque: bool,
}

/// How events are told apart.
enum Framing {
    Events(Decoder),
    Lines(Lines),
}

/// What a chunk held.
#[derive(Default)]
pub(super) struct Fed {
    /// A token, or the end of a choice.
    pub(super) meaningful: bool,
    /// Some event, of whatever kind.
    pub(super) any: bool,
    /// An event was larger than the bound; said once.
    pub(super) too_large: bool,
    /// The stream is broken here, for this reason; nothing of the event that says so is forwarded.
    pub(super) broken: Option<Fault>,
}

/// What broke a stream.
pub(super) struct Fault {
    /// Why.
    pub(super) cause: Cause,
    /// Data of the event that said so; empty when none did.
    pub(super) said: Bytes,
}

/// What the end of the body means.
pub(super) enum Ending {
    /// The answer is whole; these bytes complete it.
    Whole(Bytes),
    /// It is not.
    Broken(Cause),
}

impl TokenStream {
    /// For the answer to a request for `choices` choices; `lines` for newline-delimited JSON.
    pub(super) fn new(endpoint: Endpoint, choices: u32, lines: bool, event_bytes_max: usize) -> Self {
        let framing = match lines {
            true => Framing::Lines(Lines::new(event_bytes_max)),
            false => Framing::Events(Decoder::new(event_bytes_max)),
        };
        Self {
            framing,
            reader: EventReader::new(endpoint),
            progress: StreamProgress::new(choices),
            endpoint,
            sequence: 0,
            opaque: false,
        }
    }

    /// Events are told by lines.
    pub(super) fn is_lines(&self) -> bool {
        matches!(self.framing, Framing::Lines(_))
    }

    /// Every choice has ended well: what may still come is usage and the terminator.
    pub(super) fn is_complete(&self) -> bool {
        self.progress.complete()
    }

    /// The next `sequence_number` of a Responses stream.
    pub(super) fn next_sequence(&self) -> u64 {
        self.sequence
    }

    /// Reads a chunk; what may be forwarded is appended to `out`, and each such event given to `note`, comments too.
    pub(super) fn feed(
        &mut self,
        chunk: Bytes,
        out: &mut VecDeque<Bytes>,
        mut note: impl FnMut(&Event<'_>, &EventFacts),
    ) -> Fed {
        let mut fed = Fed::default();
        if self.opaque {
            fed.any = true;
            out.push_back(chunk);
            return fed;
        }
        // Where the broken event begins in the chunk, and whether its beginning is in an earlier one.
        let mut cut = None;
        let Self { framing, reader, progress, sequence, endpoint, .. } = self;
        let on_event = |event: Event<'_>| {
            fed.any = true;
            match judge(&event, reader, progress, sequence, *endpoint, &mut fed.meaningful) {
                Ok(facts) => {
                    note(&event, &facts);
                    ControlFlow::Continue(())
                }
                Err(cause) => {
                    let said = event.error_field.unwrap_or(event.data);
                    fed.broken = Some(Fault { cause, said: Bytes::copy_from_slice(said) });
                    cut = Some((event.start, event.is_carried()));
                    ControlFlow::Break(())
                }
            }
        };
        let read = match framing {
            Framing::Events(decoder) => decoder.feed(&chunk, on_event),
            Framing::Lines(lines) => lines.feed(&chunk, on_event),
        };
        match (read, cut) {
            // The event that was begun in an earlier chunk is the broken one.
            (Ok(_), Some((_, true))) => {}
            (Ok(_), Some((start, false))) => self.forward(chunk, start, out),
            (Ok(whole), None) => self.forward(chunk, whole, out),
            (Err(TooLarge { .. }), _) => {
                fed.too_large = true;
                fed.meaningful = true;
                self.opaque = true;
                for kept in [self.framing.take_carried(), self.framing.take_pending()] {
                    push(out, kept.into());
                }
                push(out, chunk);
            }
        }
        fed
    }

    fn forward(&mut self, mut chunk: Bytes, whole: usize, out: &mut VecDeque<Bytes>) {
        push(out, self.framing.take_carried().into());
        chunk.truncate(whole);
        push(out, chunk);
    }

    /// The body has ended, `clean`ly or for the reason given.
    pub(super) fn end(&mut self, clean: Result<(), Cause>) -> Ending {
        if self.opaque {
            return match clean {
                Ok(()) => Ending::Whole(Bytes::new()),
                Err(cause) => Ending::Broken(cause),
            };
        }
        let mut rest = Vec::new();
        if clean.is_ok()
            && let Some(cause) = self.read_rest(&mut rest)
        {
            return Ending::Broken(cause);
        }
        if !self.progress.whole_at_end(self.endpoint, clean.is_ok()) {
            return Ending::Broken(clean.err().unwrap_or(Cause::EndedEarly));
        }
        self.write_terminator(&mut rest);
        Ending::Whole(rest.into())
    }

    /// The stream was broken after it was complete: what its client waits for is written here (F23).
    pub(super) fn complete_locally(&self) -> Bytes {
        let mut out = Vec::new();
        self.write_terminator(&mut out);
        out.into()
    }

    /// Servers that end with `data: [DONE]` and a single line end exist: a last block counts as whole.
    fn read_rest(&mut self, rest: &mut Vec<u8>) -> Option<Cause> {
        let Self { framing, reader, progress, sequence, endpoint, .. } = self;
        let (event, end): (_, &[u8]) = match framing {
            Framing::Events(decoder) => (decoder.finish(), b"\n\n"),
            Framing::Lines(lines) => (lines.finish(), b"\n"),
        };
        let event = event?;
        let complete = progress.complete();
        match judge(&event, reader, progress, sequence, *endpoint, &mut false) {
            Ok(_) => {
                rest.extend_from_slice(event.raw);
                rest.extend_from_slice(end);
                None
            }
            // Half an event behind the finish is nothing the client misses.
            Err(_) if complete => None,
            Err(cause) => Some(cause),
        }
    }

    fn write_terminator(&self, out: &mut Vec<u8>) {
        if self.progress.done() {
            return;
        }
        match self.endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => write_event(out, None, b"[DONE]"),
            Endpoint::AnthropicMessages => {
                write_event(out, Some("message_stop"), br#"{"type":"message_stop"}"#);
            }
            // The finish is the terminator there.
            _ => {}
        }
    }
}

impl Framing {
    fn take_carried(&mut self) -> Vec<u8> {
        match self {
            Self::Events(decoder) => decoder.take_carried(),
            Self::Lines(lines) => lines.take_carried(),
        }
    }

    fn take_pending(&mut self) -> Vec<u8> {
        match self {
            Self::Events(decoder) => decoder.take_pending(),
            Self::Lines(lines) => lines.take_pending(),
        }
    }
}

/// Takes note of one event and says what it holds; the reason if it must not be forwarded.
fn judge(
    event: &Event<'_>,
    reader: &mut EventReader,
    progress: &mut StreamProgress,
    sequence: &mut u64,
    endpoint: Endpoint,
    meaningful: &mut bool,
) -> Result<EventFacts, Cause> {
    // What stands around the data is passed on unread, and client libraries decode all of it.
    let around = event.raw.len() - event.data.len();
    if around > FRAME_BYTES && std::str::from_utf8(event.raw).is_err() {
        return Err(Cause::InvalidEvent);
    }
    let facts = reader.read(event).map_err(|_| Cause::InvalidEvent)?;
    progress.observe(&facts);
    if let Some(class) = facts.error {
        return Err(Cause::ErrorInside(class));
    }
    if progress.failure().is_some() && facts.finish.is_some_and(|finish| !Finish::is_good(finish)) {
        return Err(Cause::AbortFinish);
    }
    if facts.done && !progress.whole_at_end(endpoint, true) {
        return Err(Cause::EndedEarly);
    }
    // Only what the client sees is counted: the error that may follow continues there.
    if let Some(seen) = facts.sequence {
        *sequence = seen + 1;
    }
    *meaningful |= facts.meaningful || facts.finish.is_some();
    Ok(facts)
}

fn push(out: &mut VecDeque<Bytes>, bytes: Bytes) {
    if !bytes.is_empty() {
        out.push_back(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n";
    const FINISH: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    const ERROR: &str = "data: {\"error\":{\"message\":\"boom\",\"type\":\"server_error\",\"code\":500}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    /// What the client gets, and how it ends: ` ok`, or the cause.
    fn relay(wire: &str, split: usize, clean: bool) -> (String, &'static str) {
        let mut stream = TokenStream::new(Endpoint::ChatCompletions, 1, false, 1 << 20);
        let mut out = VecDeque::new();
        let split = split.min(wire.len());
        let mut broken = None;
        for part in [&wire[..split], &wire[split..]] {
            let fed = stream.feed(Bytes::copy_from_slice(part.as_bytes()), &mut out, |_, _| {});
            if let Some(fault) = fed.broken {
                broken = Some(fault.cause.name());
                break;
            }
        }
        let end = match broken {
            Some(_) if stream.is_complete() => {
                out.push_back(stream.complete_locally());
                "ok"
            }
            Some(cause) => cause,
            None => match stream.end(if clean { Ok(()) } else { Err(Cause::Truncated) }) {
                Ending::Whole(rest) => {
                    out.push_back(rest);
                    "ok"
                }
                Ending::Broken(cause) => cause.name(),
            },
        };
        let bytes: Vec<u8> = out.into_iter().flatten().collect();
        (String::from_utf8(bytes).unwrap(), end)
    }

    #[test]
    fn only_whole_events_that_say_no_failure_reach_the_client() {
        let half = &TOKEN[..20];
        let whole = format!("{TOKEN}{FINISH}{DONE}");
        for (wire, clean, sees, end) in [
            (whole.clone(), true, whole.clone(), "ok"),
            (format!("{TOKEN}{half}"), false, TOKEN.to_owned(), "truncated"),
            (format!("{TOKEN}{half}"), true, TOKEN.to_owned(), "invalid_event"),
            (format!("{TOKEN}{DONE}"), true, TOKEN.to_owned(), "ended_early"),
            (TOKEN.to_owned(), true, TOKEN.to_owned(), "ended_early"),
            (format!("{TOKEN}{ERROR}{DONE}"), true, TOKEN.to_owned(), "error_event"),
            (format!("{TOKEN}data: {{nonsense\n\n"), true, TOKEN.to_owned(), "invalid_event"),
            (
                format!("{TOKEN}: a comment\n\n{TOKEN}"),
                false,
                format!("{TOKEN}: a comment\n\n{TOKEN}"),
                "truncated",
            ),
            // The tail is completed locally.
            (format!("{TOKEN}{FINISH}"), false, whole.clone(), "ok"),
            (format!("{TOKEN}{FINISH}"), true, whole.clone(), "ok"),
            (format!("{TOKEN}{FINISH}data: [DO"), false, whole.clone(), "ok"),
            (format!("{TOKEN}{FINISH}{ERROR}"), true, whole.clone(), "ok"),
            (
                format!("{TOKEN}{FINISH}data: [DONE]\n"),
                true,
                format!("{TOKEN}{FINISH}data: [DONE]\n\n\n"),
                "ok",
            ),
        ] {
            for split in 0..=wire.len() {
                assert_eq!(relay(&wire, split, clean), (sees.clone(), end), "{wire:?} split at {split}");
            }
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_not_passed_on_wherever_they_stand() {
        for bad in [
            &b"\xff\xfe garbage\n\n"[..],
            b": \xff comment \xff\n\n",
            b"event: \xff\xff\xffname\ndata: {}\n\n",
        ] {
            let mut stream = TokenStream::new(Endpoint::ChatCompletions, 1, false, 1 << 20);
            let mut out = VecDeque::new();
            let mut notes = 0;
            let wire = [TOKEN.as_bytes(), b": beat\n\n", bad].concat();
            let fed = stream.feed(wire.into(), &mut out, |event, _| notes += usize::from(event.has_data));
            assert_eq!(fed.broken.map(|fault| fault.cause), Some(Cause::InvalidEvent), "{bad:?}");
            assert_eq!(out.iter().map(Bytes::len).sum::<usize>(), TOKEN.len() + 8);
            assert_eq!(notes, 1, "a comment has nothing to note");
        }
    }

    proptest! {
        #[test]
        fn an_event_too_large_to_read_is_passed_on_whole(split in 0usize..400, size in 100usize..300) {
            let wire = format!("{TOKEN}data: {}\n\n{DONE}", "x".repeat(size));
            let mut stream = TokenStream::new(Endpoint::ChatCompletions, 1, false, 90);
            let mut out = VecDeque::new();
            let split = split.min(wire.len());
            for part in [&wire[..split], &wire[split..]] {
                let fed = stream.feed(Bytes::copy_from_slice(part.as_bytes()), &mut out, |_, _| {});
                prop_assert!(fed.broken.is_none());
            }
            let sent: Vec<u8> = out.into_iter().flatten().collect();
            prop_assert_eq!(String::from_utf8(sent).unwrap(), wire);
        }
    }
}
