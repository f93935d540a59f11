//! Newline-delimited JSON (Ollama's native streams): a line is an event.
//!
//! The same contract as [`Decoder`](super::Decoder), so that one relay serves both framings.

use std::mem;
use std::ops::ControlFlow;

use memchr::memchr;

use super::decode::clear;
use super::{Event, TooLarge};

/// The decoder of one stream of lines. Each non-empty line is an [`Event`] whose `data` is the line
/// without its LF or CRLF. A CR alone does not end a line: it is white space in JSON.
#[derive(Clone, Debug)]
pub struct Lines {
    bytes_max: usize,
    pending: Vec<u8>,
    carried: Vec<u8>,
}

impl Lines {
    /// A decoder that refuses lines larger than `line_bytes_max` bytes, LF included.
    pub fn new(line_bytes_max: usize) -> Self {
        Self { bytes_max: line_bytes_max, pending: Vec::new(), carried: Vec::new() }
    }

    /// See [`Decoder::feed`](super::Decoder::feed).
    pub fn feed<F>(&mut self, chunk: &[u8], mut on_line: F) -> Result<usize, TooLarge>
    where
        F: FnMut(Event<'_>) -> ControlFlow<()>,
    {
        clear(&mut self.carried);
        let mut at = 0;
        while let Some(i) = memchr(b'\n', &chunk[at..]) {
            let (start, end) = (at, at + i + 1);
            let begun = self.pending.len();
            if begun + (end - start) > self.bytes_max {
                return Err(self.too_large(at));
            }
            at = end;
            let flow = if begun == 0 {
                report(&chunk[start..end], start, end, &mut on_line)
            } else {
                self.pending.extend_from_slice(&chunk[start..end]);
                mem::swap(&mut self.pending, &mut self.carried);
                let flow = report(&self.carried, start, end, &mut on_line);
                self.carried.truncate(begun);
                flow
            };
            if flow.is_break() {
                return Ok(at);
            }
        }
        if self.pending.len() + (chunk.len() - at) > self.bytes_max {
            return Err(self.too_large(at));
        }
        self.pending.extend_from_slice(&chunk[at..]);
        Ok(at)
    }

    /// See [`Decoder::carried`](super::Decoder::carried).
    pub fn carried(&self) -> &[u8] {
        &self.carried
    }

    /// See [`Decoder::take_carried`](super::Decoder::take_carried).
    pub fn take_carried(&mut self) -> Vec<u8> {
        mem::take(&mut self.carried)
    }

    /// See [`Decoder::pending`](super::Decoder::pending).
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// See [`Decoder::take_pending`](super::Decoder::take_pending).
    pub fn take_pending(&mut self) -> Vec<u8> {
        mem::take(&mut self.pending)
    }

    /// The incomplete line, taken as whole: a last line needs no LF. `None` when nothing is pending.
    pub fn finish(&mut self) -> Option<Event<'_>> {
        if self.pending.is_empty() {
            return None;
        }
        clear(&mut self.carried);
        mem::swap(&mut self.pending, &mut self.carried);
        Some(line_of(&self.carried, 0, 0))
    }

    fn too_large(&self, completed: usize) -> TooLarge {
        TooLarge { completed, bytes_max: self.bytes_max }
    }
}

fn report<F>(raw: &[u8], start: usize, end: usize, on_line: &mut F) -> ControlFlow<()>
where
    F: FnMut(Event<'_>) -> ControlFlow<()>,
{
    let line = line_of(raw, start, end);
    if line.data.is_empty() { ControlFlow::Continue(()) } else { on_line(line) }
}

fn line_of(raw: &[u8], start: usize, end: usize) -> Event<'_> {
    let data = raw.strip_suffix(b"\n").unwrap_or(raw);
    let data = data.strip_suffix(b"\r").unwrap_or(data);
    Event { name: None, data, has_data: true, error_field: None, raw, start, end }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn feed(input: &[u8], cuts: &[usize], bytes_max: usize) -> (Vec<Vec<u8>>, bool) {
        let mut lines = Lines::new(bytes_max);
        let mut seen = Vec::new();
        let mut forwarded = Vec::new();
        let mut at = 0;
        for cut in cuts.iter().copied().chain([input.len()]) {
            let chunk = &input[at..cut.clamp(at, input.len())];
            at += chunk.len();
            let result = lines.feed(chunk, |line| {
                assert!(line.raw.ends_with(&chunk[line.start..line.end]));
                assert_eq!(line.is_carried(), line.raw.len() > line.end - line.start);
                seen.push(line.data.to_vec());
                ControlFlow::Continue(())
            });
            forwarded.extend_from_slice(lines.carried());
            match result {
                Ok(whole) => forwarded.extend_from_slice(&chunk[..whole]),
                Err(_) => {
                    forwarded.extend_from_slice(lines.pending());
                    forwarded.extend_from_slice(chunk);
                    assert_eq!(forwarded, &input[..at]);
                    return (seen, true);
                }
            }
            assert_eq!([&forwarded[..], lines.pending()].concat(), &input[..at]);
        }
        (seen, false)
    }

    #[test]
    fn what_is_kept_can_be_moved_out_once() {
        let mut lines = Lines::new(100);
        let go_on = |_: Event<'_>| ControlFlow::Continue(());
        assert_eq!(lines.feed(b"{\"a\"", go_on), Ok(0));
        assert_eq!(lines.feed(b":1}\n{\"b", go_on), Ok(4));
        assert_eq!((lines.take_carried(), lines.take_carried()), (b"{\"a\"".to_vec(), vec![]));
        assert_eq!((lines.take_pending(), lines.take_pending()), (b"{\"b".to_vec(), vec![]));
    }

    #[test]
    fn a_line_may_be_as_long_as_the_bound_and_no_longer() {
        let go_on = |_: Event<'_>| ControlFlow::Continue(());
        for (before, chunk, fits) in [
            (&b""[..], &b"1234\n"[..], true),
            (b"", b"12345\n", false),
            (b"12", b"34\n", true),
            (b"12", b"345\n", false),
            (b"", b"12345", true),
            (b"", b"123456", false),
            (b"12", b"345", true),
            (b"12", b"3456", false),
        ] {
            let mut lines = Lines::new(5);
            assert_eq!(lines.feed(before, go_on), Ok(0));
            assert_eq!(lines.feed(chunk, go_on).is_ok(), fits, "{before:?} {chunk:?}");
        }
    }

    #[test]
    fn lines_end_in_lf_or_crlf_and_the_last_needs_none() {
        let (seen, _) = feed(b"{\"a\":1}\n\r\n{\"b\":\r2}\r\n\n{\"c\"", &[], 100);
        assert_eq!(seen, [&b"{\"a\":1}"[..], b"{\"b\":\r2}"]);
        let mut lines = Lines::new(100);
        assert_eq!(lines.feed(b"{}\n{\"done\":true}", |_| ControlFlow::Continue(())), Ok(3));
        assert_eq!(lines.finish().unwrap().data, b"{\"done\":true}");
        assert!(lines.finish().is_none());
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_lines(
            input in "[a\n\r]{0,60}", mut cuts in prop::collection::vec(0..60_usize, 0..8), bytes_max in 0..30_usize,
        ) {
            cuts.sort_unstable();
            let input = input.as_bytes();
            for bytes_max in [bytes_max, usize::MAX] {
                prop_assert_eq!(feed(input, &cuts, bytes_max), feed(input, &[], bytes_max));
            }
            let whole = &input[..input.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1)];
            let expected: Vec<Vec<u8>> = whole
                .split(|&byte| byte == b'\n')
                .map(|line| line.strip_suffix(b"\r").unwrap_or(line).to_vec())
                .filter(|line| !line.is_empty())
                .collect();
            prop_assert_eq!(feed(input, &cuts, usize::MAX).0, expected);
        }
    }
}
