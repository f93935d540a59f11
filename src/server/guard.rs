//! The request-smuggling guard: follows HTTP/1.1 framing on the raw bytes, below hyper.
//!
//! hyper drops `Content-Length` without a word where `Transfer-Encoding` is present, and takes any list
//! that ends in `chunked`. Whoever stands before us may have read the same bytes otherwise, and what is
//! the next request to one is body to the other. So the bytes are read a second time here, in the way
//! of RFC 9112, only to count heads and to note what is wrong with one of them. Where this reading
//! cannot go on it goes blind and says from which head on nothing is certain any more: that head is to
//! be refused. Pure: bytes in, facts out; nothing is allocated and no byte is kept but the beginning of
//! a line cut by a read.

use memchr::{memchr, memchr2};

use crate::proxy::HeadDefect;

/// Kept of a line that a read cut: enough for `Transfer-Encoding: chunked` and a length of 20 digits with some
/// space around. A framing field longer than this *and* cut by a read is refused.
const LINE_KEPT: usize = 64;

/// The framing of one connection's requests.
#[derive(Debug, Default)]
pub(super) struct Framing {
    at: At,
    head: Head,
    cut_line: CutLine,
    heads: u64,
    defect: Option<Defect>,
}

/// A head that must be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Defect {
    /// Which head of the connection, from 1.
    pub(super) head: u64,
    /// What is wrong with it.
    pub(super) what: HeadDefect,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    RequestLine,
    Fields,
    /// A body of known length, this much of it to come.
    Body(u64),
    Chunked(Chunked),
    /// Not followed any more.
    Blind,
}

/// Places in a chunked body (RFC 9112 §7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunked {
    SizeFirstDigit,
    Size(u64),
    SizeSpace(u64),
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    TrailerLine,
    TrailerText,
    TrailerLf,
    EndLf,
}

/// What the fields of the head now being read said.
#[derive(Debug, Default)]
struct Head {
    length: Option<u64>,
    encoded: bool,
    defect: Option<HeadDefect>,
}

/// The beginning of a line whose end was not in the same read.
#[derive(Debug)]
struct CutLine {
    seen: usize,
    kept: [u8; LINE_KEPT],
}

impl Default for CutLine {
    fn default() -> Self {
        Self { seen: 0, kept: [0; LINE_KEPT] }
    }
}

impl CutLine {
    fn push(&mut self, bytes: &[u8]) {
        let from = self.seen.min(LINE_KEPT);
        let fits = bytes.len().min(LINE_KEPT - from);
        self.kept[from..from + fits].copy_from_slice(&bytes[..fits]);
        self.seen = self.seen.saturating_add(bytes.len());
    }

    fn kept(&self) -> &[u8] {
        &self.kept[..self.seen.min(LINE_KEPT)]
    }
}

impl Framing {
    /// Heads read to their end.
    pub(super) fn heads(&self) -> u64 {
        self.heads
    }

    /// The head from which on requests are to be refused. Set once.
    pub(super) fn defect(&self) -> Option<Defect> {
        self.defect
    }

    /// Whether a head has begun and not ended.
    pub(super) fn in_head(&self) -> bool {
        match self.at {
            At::Fields => true,
            // A lone CR may still be an empty line, which belongs to no head.
            At::RequestLine => self.cut_line.seen > 0 && self.cut_line.kept[0] != b'\r',
            At::Body(_) | At::Chunked(_) | At::Blind => false,
        }
    }

    /// Whether all that was read makes whole messages.
    pub(super) fn between_messages(&self) -> bool {
        self.at == At::RequestLine && self.cut_line.seen == 0
    }

    /// Reads on.
    pub(super) fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = match self.at {
                At::RequestLine | At::Fields => self.read_line(bytes),
                At::Body(left) => {
                    let (taken, rest) = take(bytes, left);
                    self.at = if taken == left { At::RequestLine } else { At::Body(left - taken) };
                    rest
                }
                At::Chunked(place) => self.read_chunked(place, bytes),
                At::Blind => return,
            };
        }
    }

    fn read_line<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let Some(end) = memchr(b'\n', bytes) else {
            self.cut_line.push(bytes);
            return &[];
        };
        if self.cut_line.seen == 0 {
            self.line(&bytes[..end], true);
        } else {
            let mut line = std::mem::take(&mut self.cut_line);
            line.push(&bytes[..end]);
            self.line(line.kept(), line.seen <= LINE_KEPT);
        }
        &bytes[end + 1..]
    }

    /// A line without its LF; `whole` unless its end is missing.
    fn line(&mut self, line: &[u8], whole: bool) {
        // A bare LF ends a line too (§2.2 allows it, hyper does it).
        let line = if whole { line.strip_suffix(b"\r").unwrap_or(line) } else { line };
        match (self.at, line.first()) {
            // Empty lines before a request are to be ignored (§2.2).
            (At::RequestLine, None) => {}
            (At::RequestLine, Some(_)) => self.at = At::Fields,
            (_, None) => self.head_ends(),
            (_, Some(b'C' | b'c')) => {
                if let Some(value) = value_of(line, b"content-length") {
                    self.head.content_length(value, whole);
                }
            }
            (_, Some(b'T' | b't')) => {
                if let Some(value) = value_of(line, b"transfer-encoding") {
                    self.head.transfer_encoding(value, whole);
                }
            }
            (_, Some(_)) => {}
        }
    }

    fn head_ends(&mut self) {
        self.heads += 1;
        let head = std::mem::take(&mut self.head);
        let both = (head.encoded && head.length.is_some()).then_some(HeadDefect::LengthAndEncoding);
        if let Some(what) = both.or(head.defect) {
            return self.go_blind(self.heads, what);
        }
        self.at = match head.length {
            _ if head.encoded => At::Chunked(Chunked::SizeFirstDigit),
            None | Some(0) => At::RequestLine,
            Some(length) => At::Body(length),
        };
    }

    fn go_blind(&mut self, head: u64, what: HeadDefect) {
        self.at = At::Blind;
        self.defect = Some(Defect { head, what });
    }

    fn read_chunked<'b>(&mut self, place: Chunked, bytes: &'b [u8]) -> &'b [u8] {
        let (first, rest) = (bytes[0], &bytes[1..]);
        let (next, rest) = match (place, first) {
            (Chunked::SizeFirstDigit, _) => (digit(0, first).map(Chunked::Size), rest),
            (Chunked::Size(size) | Chunked::SizeSpace(size), b' ' | b'\t') => {
                (Some(Chunked::SizeSpace(size)), rest)
            }
            (Chunked::Size(size) | Chunked::SizeSpace(size), b';') => (Some(Chunked::Extension(size)), rest),
            (Chunked::Size(size) | Chunked::SizeSpace(size), b'\r') => (Some(Chunked::SizeLf(size)), rest),
            (Chunked::Size(size), _) => (digit(size, first).map(Chunked::Size), rest),
            (Chunked::Extension(size), _) => match memchr2(b'\r', b'\n', bytes) {
                None => (Some(place), &bytes[bytes.len()..]),
                Some(end) => ((bytes[end] == b'\r').then_some(Chunked::SizeLf(size)), &bytes[end + 1..]),
            },
            (Chunked::SizeLf(0), b'\n') => (Some(Chunked::TrailerLine), rest),
            (Chunked::SizeLf(size), b'\n') => (Some(Chunked::Data(size)), rest),
            (Chunked::Data(left), _) => {
                let (taken, rest) = take(bytes, left);
                (Some(if taken == left { Chunked::DataCr } else { Chunked::Data(left - taken) }), rest)
            }
            (Chunked::DataCr, b'\r') => (Some(Chunked::DataLf), rest),
            (Chunked::DataLf, b'\n') => (Some(Chunked::SizeFirstDigit), rest),
            (Chunked::TrailerLine, b'\r') => (Some(Chunked::EndLf), rest),
            (Chunked::TrailerLine | Chunked::TrailerText, _) => match memchr2(b'\r', b'\n', bytes) {
                None => (Some(Chunked::TrailerText), &bytes[bytes.len()..]),
                // hyper takes a bare LF for text here, others for the end of a line.
                Some(end) => ((bytes[end] == b'\r').then_some(Chunked::TrailerLf), &bytes[end + 1..]),
            },
            (Chunked::TrailerLf, b'\n') => (Some(Chunked::TrailerLine), rest),
            (Chunked::EndLf, b'\n') => {
                self.at = At::RequestLine;
                return rest;
            }
            (
                Chunked::SizeSpace(_)
                | Chunked::SizeLf(_)
                | Chunked::DataCr
                | Chunked::DataLf
                | Chunked::TrailerLf
                | Chunked::EndLf,
                _,
            ) => (None, rest),
        };
        match next {
            Some(next) => self.at = At::Chunked(next),
            None => self.go_blind(self.heads + 1, HeadDefect::UnclearFraming),
        }
        rest
    }
}

impl Head {
    fn content_length(&mut self, value: &[u8], whole: bool) {
        let length = if whole { decimal(value) } else { None };
        match (length, self.length) {
            // The same length twice is one length (§6.3).
            (Some(length), None) => self.length = Some(length),
            (Some(length), Some(before)) if length == before => {}
            _ => {
                // Still a length, so that together with an encoding it is named as that.
                self.length = self.length.or(Some(0));
                self.defect = self.defect.or(Some(HeadDefect::UnclearFraming));
            }
        }
    }

    fn transfer_encoding(&mut self, value: &[u8], whole: bool) {
        if self.encoded || !whole || !value.eq_ignore_ascii_case(b"chunked") {
            self.defect = self.defect.or(Some(HeadDefect::TransferCoding));
        }
        self.encoded = true;
    }
}

/// The value of the field in `line` if it is called `name` (lower case), without the space around it.
fn value_of<'l>(line: &'l [u8], name: &[u8]) -> Option<&'l [u8]> {
    let (called, rest) = line.split_at_checked(name.len())?;
    let mut value = rest.strip_prefix(b":").filter(|_| called.eq_ignore_ascii_case(name))?;
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    Some(value)
}

/// `1*DIGIT` (§6.2): no sign, no list, no overflow.
fn decimal(digits: &[u8]) -> Option<u64> {
    let all = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    if !all {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| value.checked_mul(10)?.checked_add(u64::from(digit - b'0')))
}

/// `size` with one more hexadecimal digit.
fn digit(size: u64, digit: u8) -> Option<u64> {
    let value = char::from(digit).to_digit(16)?;
    size.checked_mul(16)?.checked_add(u64::from(value))
}

/// At most `left` bytes of the beginning: how many, and what comes behind.
fn take(bytes: &[u8], left: u64) -> (u64, &[u8]) {
    let taken = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
    (taken as u64, &bytes[taken..])
}
