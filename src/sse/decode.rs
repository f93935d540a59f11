//! Server-sent events, decoded from any split of the bytes.
//!
//! The grammar is WHATWG HTML §9.2.5 "Parsing an event stream" and §9.2.6 "Interpreting an event
//! stream": lines end in CR, LF or CRLF; one leading BOM is dropped; `name: value` with at most one
//! space after the colon removed; a line beginning with a colon is a comment; an empty line ends a
//! *block*. Engines use most of that freedom (TRT-LLM ends lines with a stray space, llama.cpp sends
//! comments and a non-standard `error:` field), so none of it may be assumed away.
//!
//! Invariant: the events, their order and their raw bytes do not depend on how the input was split.
//! Cost: one pass; a chunk of whole events is neither copied nor kept.

use std::fmt;
use std::mem;
use std::ops::{ControlFlow, Range};

use memchr::memchr2;

/// Kept buffers larger than this are given back after use: one giant event must not pin its size
/// for the hours its stream may last.
const KEPT_CAPACITY_MAX: usize = 16 * 1024;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// One block of the stream: an event, or only comments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The `event:` field; `None` when absent or empty (the type is then "message").
    pub name: Option<&'a [u8]>,
    /// The `data:` lines, joined with LF. Borrowed from the input when there is only one.
    pub data: &'a [u8],
    /// Whether there was any `data:` line. `false`: comments or other fields only, and a client would
    /// not be told of this block.
    pub has_data: bool,
    /// The field `error:`, which the standard ignores and llama.cpp builds through 2025 send instead of
    /// data (`error: {"code":500,…}`).
    pub error_field: Option<&'a [u8]>,
    /// The bytes of the whole block, its empty line included; contiguous even when they came in
    /// several chunks. The LF of a final CRLF is missing when it had not arrived yet.
    pub raw: &'a [u8],
    /// Where the block begins in the chunk being fed; 0 when it began in an earlier one.
    pub start: usize,
    /// Just past the block in the chunk being fed. `chunk[start..end]` is all of `raw` unless the block
    /// began in an earlier chunk.
    pub end: usize,
}

impl Event<'_> {
    /// Whether the block began in an earlier chunk, so that `chunk[start..end]` is only its end.
    pub fn is_carried(&self) -> bool {
        self.raw.len() != self.end - self.start
    }
}

/// A block grew beyond the bound. The fault is the backend's.
///
/// Nothing of the chunk past `completed` was kept. All bytes not yet forwarded are, in this order,
/// [`Decoder::carried`], [`Decoder::pending`] and the whole chunk: a caller that falls back to passing
/// the stream through loses none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// How many bytes of the chunk belong to blocks completed before.
    pub completed: usize,
    /// The bound that was exceeded.
    pub bytes_max: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an event of the stream is larger than {} bytes", self.bytes_max)
    }
}

impl std::error::Error for TooLarge {}

/// The decoder of one stream.
///
/// ```
/// # use evergate::sse::Decoder;
/// # use std::ops::ControlFlow;
/// let mut decoder = Decoder::new(1 << 20);
/// let chunk = b"data: one\n\ndata: tw";
/// let mut seen = Vec::new();
/// let whole = decoder.feed(chunk, |event| {
///     seen.push(event.data.to_vec());
///     ControlFlow::Continue(())
/// });
/// assert_eq!(whole, Ok(11));
/// assert_eq!(seen, [b"one".to_vec()]);
/// assert_eq!(decoder.pending(), b"data: tw");
/// ```
#[derive(Clone, Debug)]
pub struct Decoder {
    bytes_max: usize,
    /// Bytes of the incomplete block, from its first byte.
    pending: Vec<u8>,
    /// Beginning of the block that the last `feed` completed, as far as it came in earlier chunks.
    carried: Vec<u8>,
    /// Joined `data:` lines of the event being reported.
    joined: Vec<u8>,
    block: Block,
    /// The last byte was a CR that ended a line: an LF now belongs to it.
    after_cr: bool,
    /// No line was seen yet: a BOM may stand here.
    at_start: bool,
}

/// What is known of the block being read; offsets count from its first byte, so that they stay valid
/// wherever its bytes are moved.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Where the line being read begins.
    line_start: usize,
    name: Option<Span>,
    /// The first data line.
    data: Option<Span>,
    more_data: bool,
    error: Option<Span>,
}

/// A `Copy` range.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.start..self.end]
    }
}

impl Decoder {
    /// A decoder that refuses blocks larger than `event_bytes_max` bytes (their last LF not counted).
    pub fn new(event_bytes_max: usize) -> Self {
        Self {
            bytes_max: event_bytes_max,
            pending: Vec::new(),
            carried: Vec::new(),
            joined: Vec::new(),
            block: Block::default(),
            after_cr: false,
            at_start: true,
        }
    }

    /// Reads one chunk and calls `on_event` for every block it completes. Returns how many bytes of the
    /// chunk belong to completed blocks; the rest is kept as the beginning of the next.
    ///
    /// Forwarding [`carried`](Self::carried) followed by `chunk[..returned]` after each call passes on
    /// every byte exactly once and never half an event. Empty lines between blocks are counted as
    /// completed and not reported.
    ///
    /// A block is complete at the *first* byte of its empty line: when that is a CR, the event is not
    /// delayed for an LF that may or may not follow. The LF, when it comes, belongs to the block it
    /// ends: it is counted as completed, and is neither an empty line of its own nor part of the next
    /// block.
    ///
    /// When `on_event` breaks, reading stops behind that event: its end is returned, the rest of the
    /// chunk is *not* kept, and may be fed again to go on.
    pub fn feed<F>(&mut self, chunk: &[u8], mut on_event: F) -> Result<usize, TooLarge>
    where
        F: FnMut(Event<'_>) -> ControlFlow<()>,
    {
        clear(&mut self.carried);
        let mut at = 0;
        if !self.pending.is_empty() {
            let begun = self.pending.len();
            let Some(end) = self.complete_pending(chunk)? else { return Ok(0) };
            at = end;
            mem::swap(&mut self.pending, &mut self.carried);
            let block = mem::take(&mut self.block);
            let flow = if block.is_empty() {
                ControlFlow::Continue(())
            } else {
                report(block, &self.carried, 0..at, &mut self.joined, &mut on_event)
            };
            self.carried.truncate(begun);
            if flow.is_break() {
                return Ok(at);
            }
        }
        loop {
            let rest = &chunk[at..];
            // Of a block that is complete: its LF, if it comes, reads as an empty line, which says nothing.
            self.after_cr &= rest.is_empty();
            let Some(len) = self.scan(rest) else {
                if rest.len() > self.bytes_max {
                    return Err(self.too_large(at));
                }
                self.pending.extend_from_slice(rest);
                return Ok(at);
            };
            if len.to_first_byte_of_empty_line > self.bytes_max {
                return Err(self.too_large(at));
            }
            let (start, end) = (at, at + len.whole);
            at = end;
            let block = mem::take(&mut self.block);
            if block.is_empty() {
                continue;
            }
            if report(block, &chunk[start..end], start..end, &mut self.joined, &mut on_event).is_break() {
                return Ok(at);
            }
        }
    }

    /// The earlier bytes of the first block that the last [`feed`](Self::feed) completed, to be
    /// forwarded in front of its chunk. Empty unless that block came in more than one chunk.
    pub fn carried(&self) -> &[u8] {
        &self.carried
    }

    /// Moves [`carried`](Self::carried) out.
    pub fn take_carried(&mut self) -> Vec<u8> {
        mem::take(&mut self.carried)
    }

    /// The bytes of the incomplete block, which must not reach the client unless it is completed.
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Moves [`pending`](Self::pending) out and forgets it: for a caller that gives up on events and
    /// passes the rest of the stream through.
    pub fn take_pending(&mut self) -> Vec<u8> {
        self.block = Block::default();
        mem::take(&mut self.pending)
    }

    /// What the incomplete block says if the stream ends here, its last line taken as whole.
    ///
    /// The standard discards such a block; servers that end with `data: [DONE]` and a single LF exist.
    /// `None` when nothing is pending.
    pub fn finish(&mut self) -> Option<Event<'_>> {
        if self.pending.is_empty() {
            return None;
        }
        let mut block = mem::take(&mut self.block);
        block.take_line(&self.pending, self.pending.len(), &mut self.at_start);
        clear(&mut self.carried);
        mem::swap(&mut self.pending, &mut self.carried);
        Some(event_of(block, &self.carried, 0..0, &mut self.joined))
    }

    /// Continues the pending block with `chunk`; returns where it ends there, or `None` when it does not.
    /// Only new bytes are searched, so that a stream of one-byte chunks costs no more than its size.
    fn complete_pending(&mut self, chunk: &[u8]) -> Result<Option<usize>, TooLarge> {
        let begun = self.pending.len();
        let mut at = 0;
        if self.after_cr && !chunk.is_empty() {
            self.after_cr = false;
            if chunk[0] == b'\n' {
                self.pending.push(b'\n');
                self.block.line_start += 1;
                at = 1;
            }
        }
        loop {
            let found = memchr2(b'\n', b'\r', &chunk[at..]);
            let upto = found.map_or(chunk.len(), |i| at + i + 1);
            if self.pending.len() + (upto - at) > self.bytes_max {
                self.pending.truncate(begun);
                return Err(self.too_large(0));
            }
            self.pending.extend_from_slice(&chunk[at..upto]);
            at = upto;
            if found.is_none() {
                return Ok(None);
            }
            let line_end = self.pending.len() - 1;
            let blank = self.block.take_line(&self.pending, line_end, &mut self.at_start);
            if self.pending[line_end] == b'\r' {
                match chunk.get(at) {
                    Some(b'\n') => {
                        self.pending.push(b'\n');
                        at += 1;
                    }
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
            if blank {
                return Ok(Some(at));
            }
            self.block.line_start = self.pending.len();
        }
    }

    /// Reads the lines of a block that begins at the first byte of `rest`. `None`: it does not end there.
    fn scan(&mut self, rest: &[u8]) -> Option<BlockLen> {
        let mut from = 0;
        loop {
            let line_end = match rest.get(from)? {
                b'\n' | b'\r' => from,
                _ => from + memchr2(b'\n', b'\r', &rest[from..])?,
            };
            let blank = self.block.take_line(rest, line_end, &mut self.at_start);
            let mut next = line_end + 1;
            if rest[line_end] == b'\r' {
                match rest.get(next) {
                    Some(b'\n') => next += 1,
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
            if blank {
                return Some(BlockLen { to_first_byte_of_empty_line: line_end + 1, whole: next });
            }
            self.block.line_start = next;
            from = next;
        }
    }

    fn too_large(&self, completed: usize) -> TooLarge {
        TooLarge { completed, bytes_max: self.bytes_max }
    }
}

/// Length of a block, with and without an LF that follows the CR of its empty line. The bound looks at
/// the former, or it would depend on the split.
struct BlockLen {
    to_first_byte_of_empty_line: usize,
    whole: usize,
}

impl Block {
    /// An empty line with nothing before it.
    fn is_empty(&self) -> bool {
        self.line_start == 0
    }

    /// Reads the line `bytes[self.line_start..end]`; `true` when it is empty.
    fn take_line(&mut self, bytes: &[u8], end: usize, at_start: &mut bool) -> bool {
        let mut start = self.line_start;
        if mem::take(at_start) && bytes[start..end].starts_with(BOM) {
            start += BOM.len();
        }
        let line = &bytes[start..end];
        // Nearly every line of a token stream is a data line.
        if let Some(value) = line.strip_prefix(b"data:") {
            self.take_data(value_span(value, end));
            return false;
        }
        let Some(&first) = line.first() else { return true };
        if first == b':' {
            return false;
        }
        let (name, value) = match memchr::memchr(b':', line) {
            Some(colon) => (&line[..colon], value_span(&line[colon + 1..], end)),
            None => (line, Span { start: end, end }),
        };
        match name {
            b"data" => self.take_data(value),
            b"event" => self.name = Some(value),
            b"error" => self.error = Some(value),
            // `id` and `retry` travel in the raw bytes; unknown fields are ignored (§9.2.6).
            _ => {}
        }
        false
    }

    fn take_data(&mut self, value: Span) {
        if self.data.is_none() {
            self.data = Some(value);
        } else {
            self.more_data = true;
        }
    }
}

/// The span of a field's value, which ends at `end`, without one leading space.
fn value_span(value: &[u8], end: usize) -> Span {
    let len = value.strip_prefix(b" ").map_or(value.len(), <[u8]>::len);
    Span { start: end - len, end }
}

fn report<F>(
    block: Block,
    raw: &[u8],
    in_chunk: Range<usize>,
    joined: &mut Vec<u8>,
    on_event: &mut F,
) -> ControlFlow<()>
where
    F: FnMut(Event<'_>) -> ControlFlow<()>,
{
    on_event(event_of(block, raw, in_chunk, joined))
}

fn event_of<'a>(block: Block, raw: &'a [u8], in_chunk: Range<usize>, joined: &'a mut Vec<u8>) -> Event<'a> {
    let data = match block.data {
        None => &[],
        Some(first) if !block.more_data => first.of(raw),
        Some(first) => {
            join_data(first, raw, joined);
            joined.as_slice()
        }
    };
    Event {
        name: block.name.map(|span| span.of(raw)).filter(|name| !name.is_empty()),
        data,
        has_data: block.data.is_some(),
        error_field: block.error.map(|span| span.of(raw)),
        raw,
        start: in_chunk.start,
        end: in_chunk.end,
    }
}

/// Joins all data lines of a block with LF. Rare, so the lines are simply read once more.
#[cold]
fn join_data(first: Span, raw: &[u8], joined: &mut Vec<u8>) {
    clear(joined);
    joined.extend_from_slice(first.of(raw));
    let mut block = Block { line_start: first.end, ..Block::default() };
    while let Some(i) = raw.get(block.line_start..).and_then(|rest| memchr2(b'\n', b'\r', rest)) {
        let line_end = block.line_start + i;
        block.data = None;
        block.take_line(raw, line_end, &mut false);
        if let Some(span) = block.data {
            joined.push(b'\n');
            joined.extend_from_slice(span.of(raw));
        }
        // The LF of a CRLF reads as one more empty line here, which says nothing.
        block.line_start = line_end + 1;
    }
    // `finish` may meet a last line without an end.
    block.data = None;
    block.take_line(raw, raw.len(), &mut false);
    if let Some(span) = block.data {
        joined.push(b'\n');
        joined.extend_from_slice(span.of(raw));
    }
}

pub(super) fn clear(bytes: &mut Vec<u8>) {
    if bytes.capacity() > KEPT_CAPACITY_MAX {
        *bytes = Vec::new();
    } else {
        bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sse::{write_comment, write_event};
    use proptest::prelude::*;

    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Seen {
        name: Option<Vec<u8>>,
        data: Vec<u8>,
        has_data: bool,
        error: Option<Vec<u8>>,
        /// Without an LF that follows a final CR: whether it is at hand depends on the split.
        raw: Vec<u8>,
    }

    impl Seen {
        fn of(event: Event<'_>) -> Self {
            let raw = match event.raw {
                [most @ .., b'\r', b'\n'] => [most, b"\r"].concat(),
                raw => raw.to_vec(),
            };
            Self {
                name: event.name.map(<[u8]>::to_vec),
                data: event.data.to_vec(),
                has_data: event.has_data,
                error: event.error_field.map(<[u8]>::to_vec),
                raw,
            }
        }
    }

    /// The standard, read aloud, over the whole input at once.
    fn reference(input: &[u8]) -> Vec<Seen> {
        let mut lines: Vec<(&[u8], usize)> = Vec::new();
        let (mut start, mut at) = (0, 0);
        while at < input.len() {
            let len = match &input[at..] {
                [b'\r', b'\n', ..] => 2,
                [b'\r' | b'\n', ..] => 1,
                _ => {
                    at += 1;
                    continue;
                }
            };
            lines.push((&input[start..at], at + 1));
            at += len;
            start = at;
        }
        if let Some(first) = lines.first_mut() {
            first.0 = first.0.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(first.0);
        }
        let mut events = Vec::new();
        let mut event = Seen::default();
        let (mut in_block, mut block_start) = (false, 0);
        for (line, end) in lines {
            if line.is_empty() {
                event.raw = input[block_start..end].to_vec();
                let event = mem::take(&mut event);
                if mem::take(&mut in_block) {
                    events.push(event);
                }
                block_start = end + usize::from(input[end - 1] == b'\r' && input.get(end) == Some(&b'\n'));
                continue;
            }
            in_block = true;
            let colon = line.iter().position(|&byte| byte == b':');
            let (name, value) = match colon {
                Some(colon) => (&line[..colon], &line[colon + 1..]),
                None => (line, &line[line.len()..]),
            };
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match name {
                b"data" => {
                    if mem::replace(&mut event.has_data, true) {
                        event.data.push(b'\n');
                    }
                    event.data.extend_from_slice(value);
                }
                b"event" => event.name = Some(value.to_vec()).filter(|name| !name.is_empty()),
                b"error" => event.error = Some(value.to_vec()),
                _ => {}
            }
        }
        events
    }

    /// What came of feeding `input` in chunks that end at `cuts`.
    struct Fed {
        events: Vec<Seen>,
        forwarded: Vec<u8>,
        too_large: bool,
    }

    fn feed(input: &[u8], cuts: &[usize], bytes_max: usize) -> Fed {
        let mut decoder = Decoder::new(bytes_max);
        let mut fed = Fed { events: Vec::new(), forwarded: Vec::new(), too_large: false };
        let mut at = 0;
        for cut in cuts.iter().copied().chain([input.len()]) {
            let chunk = &input[at..cut.clamp(at, input.len())];
            at += chunk.len();
            let mut last_end = 0;
            let result = decoder.feed(chunk, |event| {
                assert!(last_end <= event.start && event.start <= event.end && event.end <= chunk.len());
                last_end = event.end;
                if event.is_carried() {
                    assert!(event.raw.ends_with(&chunk[event.start..event.end]));
                } else {
                    assert_eq!(event.raw, &chunk[event.start..event.end]);
                }
                fed.events.push(Seen::of(event));
                ControlFlow::Continue(())
            });
            fed.forwarded.extend_from_slice(decoder.carried());
            match result {
                Ok(whole) => fed.forwarded.extend_from_slice(&chunk[..whole]),
                Err(fault) => {
                    assert!(fault.completed <= chunk.len());
                    // Falling back to passing through loses nothing.
                    fed.forwarded.extend_from_slice(decoder.pending());
                    fed.forwarded.extend_from_slice(chunk);
                    assert_eq!(fed.forwarded, &input[..at]);
                    fed.too_large = true;
                    return fed;
                }
            }
            assert_eq!([&fed.forwarded[..], decoder.pending()].concat(), &input[..at]);
        }
        fed
    }

    fn assert_like_reference(input: &[u8], cuts: &[usize]) {
        let fed = feed(input, cuts, usize::MAX);
        assert_eq!(fed.events, reference(input), "{:?} cut at {cuts:?}", String::from_utf8_lossy(input));
    }

    const SHAPES: &[&str] = &[
        "data: {\"a\":1}\n\ndata: [DONE]\n\n",
        "data: x\r\n\r\ndata: y\r\n\r\n",
        "data: x\r\rdata: y\r\r",
        "data:x\n\n",
        "data:  two spaces\n\n",
        "data\n\n",
        "data:\n\n",
        "data: {\"trt\":1} \n\n",
        ": ping\n\ndata: x\n\n",
        ":\n\n",
        "event: a\ndata: 1\ndata: 2\r\ndata:3\rdata\n\n",
        "event:\nid: 7\nretry: 9\ndata: x\n\n\n\n\n",
        "error: {\"code\":500}\n\ndata: [DONE]\n\n",
        "\u{feff}data: bom\n\n\u{feff}data: not a field\n\n",
        "\u{feff}\n\ndata: x\n\n",
        "\n\r\n\rdata: x\n\r\ndata: y\r\n\r",
        "data: x\n\r\n",
        "datax: no\ndata : no\n data: no\n\n",
        "data: cut",
        "data: cut\r",
        "data: \u{1f600}\n\n",
    ];

    #[test]
    fn what_is_kept_can_be_moved_out_once() {
        let mut decoder = Decoder::new(100);
        let go_on = |_: Event<'_>| ControlFlow::Continue(());
        assert_eq!(decoder.feed(b"data: o", go_on), Ok(0));
        assert_eq!(decoder.feed(b"ne\n\ndata: tw", go_on), Ok(4));
        assert_eq!(decoder.take_carried(), b"data: o");
        assert_eq!(decoder.take_carried(), b"");
        assert_eq!(decoder.take_pending(), b"data: tw");
        assert_eq!(decoder.take_pending(), b"");
        // What was taken is forgotten: here a new block begins.
        let mut seen = Vec::new();
        let whole = decoder.feed(b"data: x\n\n", |event| {
            seen.push(event.data.to_vec());
            ControlFlow::Continue(())
        });
        assert_eq!((whole, seen), (Ok(9), vec![b"x".to_vec()]));
        let too_large = decoder.feed(&[b'a'; 101], go_on).unwrap_err();
        assert_eq!(too_large.to_string(), "an event of the stream is larger than 100 bytes");
    }

    #[test]
    fn shapes_on_the_wire_read_like_the_standard_says_at_every_cut() {
        for shape in SHAPES {
            let input = shape.as_bytes();
            assert_like_reference(input, &[]);
            assert_like_reference(input, &(1..input.len()).collect::<Vec<_>>());
            for first in 0..=input.len() {
                for second in first..=input.len() {
                    assert_like_reference(input, &[first, second]);
                }
            }
        }
    }

    #[test]
    fn fields_mean_what_the_standard_says() {
        let fed = feed(SHAPES[10].as_bytes(), &[], usize::MAX);
        assert_eq!(fed.events.len(), 1);
        assert_eq!(fed.events[0].name.as_deref(), Some(&b"a"[..]));
        assert_eq!(fed.events[0].data, b"1\n2\n3\n");
        let fed = feed(SHAPES[12].as_bytes(), &[], usize::MAX);
        assert_eq!(fed.events[0].error.as_deref(), Some(&b"{\"code\":500}"[..]));
        assert!(!fed.events[0].has_data);
        assert_eq!(fed.events[1].data, b"[DONE]");
    }

    #[test]
    fn the_lf_of_a_cut_crlf_belongs_to_the_event_it_ends() {
        let mut decoder = Decoder::new(100);
        let mut count = 0;
        let mut on_event = |event: Event<'_>| {
            count += 1;
            assert_eq!(event.data, b"x");
            ControlFlow::Continue(())
        };
        // Not delayed for the LF.
        assert_eq!(decoder.feed(b"data: x\r\n\r", &mut on_event), Ok(10));
        assert_eq!(decoder.feed(b"\n", &mut on_event), Ok(1));
        assert_eq!(decoder.pending(), b"");
        assert_eq!(decoder.feed(b"data: x\r\n\r", &mut on_event), Ok(10));
        let chunk = b"\ndata: x\n\n";
        let start = decoder.feed(chunk, |event| {
            assert_eq!((event.start, event.end), (1, chunk.len()));
            on_event(event)
        });
        assert_eq!(start, Ok(chunk.len()));
        assert_eq!(count, 3);
    }

    #[test]
    fn breaking_stops_behind_the_event_and_the_rest_can_be_fed_again() {
        let mut decoder = Decoder::new(100);
        assert_eq!(decoder.feed(b"data: 1", |_| ControlFlow::Break(())), Ok(0));
        let chunk = b"\n\ndata: 2\n\ndata: 3\n\nda";
        let mut rest = &chunk[..];
        let mut data = Vec::new();
        for _ in 0..4 {
            let whole = decoder.feed(rest, |event| {
                data.push(event.data.to_vec());
                ControlFlow::Break(())
            });
            rest = &rest[whole.unwrap()..];
        }
        assert_eq!(data, [b"1", b"2", b"3"]);
        assert_eq!((rest, decoder.pending()), (&b"da"[..], &b"da"[..]));
    }

    #[test]
    fn the_end_of_a_stream_may_complete_its_last_block() {
        let mut decoder = Decoder::new(100);
        assert!(decoder.finish().is_none());
        for tail in [&b"data: a\ndata: [DONE]"[..], b"data: a\ndata: [DONE]\n", b"data: a\rdata: [DONE]\r"] {
            assert_eq!(decoder.feed(tail, |_| ControlFlow::Continue(())), Ok(0));
            assert_eq!(decoder.finish().unwrap().data, b"a\n[DONE]");
            assert!(decoder.finish().is_none());
        }
    }

    #[test]
    fn a_giant_event_does_not_pin_its_memory() {
        let mut decoder = Decoder::new(1 << 20);
        let giant = vec![b'x'; 1 << 19];
        let mut ignore = |_: Event<'_>| ControlFlow::Continue(());
        for _ in 0..2 {
            assert_eq!(decoder.feed(b"data: ", &mut ignore), Ok(0));
            assert_eq!(decoder.feed(&giant, &mut ignore), Ok(0));
            assert_eq!(decoder.feed(b"\n\n", &mut ignore), Ok(2));
            assert_eq!(decoder.feed(b"data: y\n\nd", &mut ignore), Ok(9));
            assert_eq!(decoder.feed(b"ata: y\n\n", &mut ignore), Ok(8));
        }
        let kept = decoder.pending.capacity() + decoder.carried.capacity() + decoder.joined.capacity();
        assert!(kept <= 3 * KEPT_CAPACITY_MAX, "{kept}");
    }

    fn pieces() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            3 => prop::sample::select(vec![
                "data:", "data: ", "data", "event: ", "event:", "error: ", "id: 1", ":", ": c", " ", "x",
                "{\"a\":1}", "\u{feff}", "\u{e9}",
            ]).prop_map(|text| text.as_bytes().to_vec()),
            3 => prop::sample::select(vec!["\n", "\r", "\r\n", "\n\n", "\r\n\r\n"])
                .prop_map(|text| text.as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..4),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn any_split_reads_like_the_standard(
            input in pieces(), mut cuts in prop::collection::vec(0..160_usize, 0..12),
        ) {
            cuts.sort_unstable();
            assert_like_reference(&input, &cuts);
            assert_like_reference(&input, &[]);
        }

        #[test]
        fn the_bound_does_not_depend_on_the_split(
            input in pieces(), mut cuts in prop::collection::vec(0..160_usize, 0..12), bytes_max in 0..40_usize,
        ) {
            cuts.sort_unstable();
            let whole = feed(&input, &[], bytes_max);
            let split = feed(&input, &cuts, bytes_max);
            let single = feed(&input, &(1..input.len()).collect::<Vec<_>>(), bytes_max);
            for other in [split, single] {
                prop_assert_eq!(&whole.events, &other.events);
                prop_assert_eq!(whole.too_large, other.too_large);
            }
            prop_assert!(whole.events.iter().all(|event| event.raw.len() <= bytes_max));
        }

        #[test]
        fn what_is_written_is_read(
            name in prop::option::of("[a-z_.]{1,12}"), data in "[ -~\n\r\u{e9}]{0,60}", comment in ".{0,20}",
        ) {
            let mut wire = Vec::new();
            write_comment(&mut wire, &comment);
            write_event(&mut wire, name.as_deref(), data.as_bytes());
            let fed = feed(&wire, &[], usize::MAX);
            prop_assert_eq!(fed.events.len(), 2);
            prop_assert!(!fed.events[0].has_data);
            let lines = data.replace("\r\n", "\n").replace('\r', "\n");
            prop_assert_eq!(&fed.events[1].data, lines.as_bytes());
            prop_assert_eq!(fed.events[1].name.as_deref(), name.as_deref().map(str::as_bytes));
        }
    }
}
