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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_whole(bytes: &[u8]) -> Framing {
        let mut framing = Framing::default();
        framing.read(bytes);
        framing
    }

    fn defect(bytes: &[u8]) -> Option<(u64, HeadDefect)> {
        read_whole(bytes).defect().map(|defect| (defect.head, defect.what))
    }

    #[test]
    fn length_with_encoding_is_seen_in_either_order_and_any_case() {
        let both = Some((2, HeadDefect::LengthAndEncoding));
        for fields in [
            "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
            "transfer-encoding:chunked\r\ncontent-length:3\r\n",
            "TRANSFER-ENCODING: chunked\nX: y\nCONTENT-LENGTH:\t3\n",
            "Content-Length: 3, 4\r\nTransfer-Encoding: chunked\r\n",
        ] {
            let request = format!("GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\n{fields}\r\n");
            assert_eq!(defect(request.as_bytes()), both, "{fields:?}");
            // Also with every byte in a read of its own.
            let mut framing = Framing::default();
            request.as_bytes().iter().for_each(|byte| framing.read(std::slice::from_ref(byte)));
            assert_eq!(framing.defect().map(|defect| (defect.head, defect.what)), both, "{fields:?}");
        }
    }

    #[test]
    fn only_one_plain_chunked_is_an_encoding() {
        for value in ["gzip, chunked", "chunked, chunked", "xchunked", "identity", "chunked;q=1", ""] {
            let request = format!("POST / HTTP/1.1\r\nTransfer-Encoding: {value}\r\n\r\n");
            assert_eq!(defect(request.as_bytes()), Some((1, HeadDefect::TransferCoding)), "{value:?}");
        }
        let twice = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(defect(twice), Some((1, HeadDefect::TransferCoding)));
        assert_eq!(defect(b"POST / HTTP/1.1\r\nTransfer-Encoding:  Chunked \r\n\r\n0\r\n\r\n"), None);
    }

    #[test]
    fn lengths_are_digits_and_agree() {
        for fields in ["+5", "-1", "5 5", "5, 5", "0x5", "", "18446744073709551616", "5\r\nContent-Length: 6"]
        {
            let request = format!("POST / HTTP/1.1\r\nContent-Length: {fields}\r\n\r\n");
            assert_eq!(defect(request.as_bytes()), Some((1, HeadDefect::UnclearFraming)), "{fields:?}");
        }
        let twice = read_whole(b"POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nxxGET");
        assert!(twice.defect().is_none() && twice.in_head());
    }

    #[test]
    fn broken_chunks_make_the_next_head_suspect() {
        for body in [
            "0x5\r\n",
            "+5\r\n",
            "\r\n",
            "5",
            "5\n",
            "5 5\r\n",
            "5;a\nb\r\n",
            "FFFFFFFFFFFFFFFFF\r\n",
            "1\r\nab\r\n",
            "1\r\na\n",
            "0\r\nA: b\n\r\n",
            "0\r\n\r\r",
        ] {
            let request = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}xyz");
            assert_eq!(defect(request.as_bytes()), Some((2, HeadDefect::UnclearFraming)), "{body:?}");
        }
    }

    #[test]
    fn a_head_is_open_from_its_first_byte_to_its_empty_line() {
        let mut framing = Framing::default();
        framing.read(b"\r\n\r");
        assert!(!framing.in_head());
        framing.read(b"\nG");
        assert!(framing.in_head());
        framing.read(b"ET / HTTP/1.1\r\nHost: a\r\n\r");
        assert!(framing.in_head() && framing.heads() == 0);
        framing.read(b"\n");
        assert!(!framing.in_head() && framing.heads() == 1 && framing.between_messages());
    }

    #[derive(Clone, Debug)]
    struct Sent {
        fields: Vec<String>,
        body: Body,
    }

    #[derive(Clone, Debug)]
    enum Body {
        None,
        Length(Vec<u8>),
        Chunked { chunks: Vec<(Vec<u8>, String)>, trailers: Vec<String> },
        Both,
    }

    impl Sent {
        fn write(&self, bytes: &mut Vec<u8>) {
            bytes.extend(b"POST /v1/completions HTTP/1.1\r\n");
            for field in &self.fields {
                bytes.extend(format!("{field}\r\n").as_bytes());
            }
            match &self.body {
                Body::None => bytes.extend(b"\r\n"),
                Body::Length(body) => {
                    bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
                    bytes.extend(body);
                }
                Body::Chunked { chunks, trailers } => {
                    bytes.extend(b"Transfer-Encoding: chunked\r\n\r\n");
                    for (chunk, extension) in chunks {
                        bytes.extend(format!("{:x}{extension}\r\n", chunk.len()).as_bytes());
                        bytes.extend(chunk);
                        bytes.extend(b"\r\n");
                    }
                    bytes.extend(b"0\r\n");
                    trailers.iter().for_each(|field| bytes.extend(format!("{field}\r\n").as_bytes()));
                    bytes.extend(b"\r\n");
                }
                Body::Both => bytes.extend(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
            }
        }
    }

    fn fields() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("(Host|Accept|Content-Type|TE|Cookie|X-A): [a-z0-9 ,;=/]{0,90}", 0..6)
    }

    fn requests() -> impl Strategy<Value = Vec<Sent>> {
        // Bodies of line ends and hex digits: what looks most like framing.
        let bytes = || prop::collection::vec(prop::sample::select(b"\r\n0aG: ".to_vec()), 1..40);
        let chunks = prop::collection::vec((bytes(), "( ?;[a-z]{1,4}(=[a-z]{0,80})?)?"), 0..4);
        let body = prop_oneof![
            4 => Just(Body::None),
            4 => bytes().prop_map(Body::Length),
            4 => (chunks, fields()).prop_map(|(chunks, trailers)| Body::Chunked { chunks, trailers }),
            1 => Just(Body::Both),
        ];
        prop::collection::vec((fields(), body).prop_map(|(fields, body)| Sent { fields, body }), 1..8)
    }

    proptest! {
        #[test]
        fn any_split_of_pipelined_requests_is_followed(sent in requests(), cuts in prop::collection::vec(1_usize..60, 1..40)) {
            let mut bytes = Vec::new();
            let (mut heads, mut flagged) = (0, None);
            for request in &sent {
                request.write(&mut bytes);
                if flagged.is_none() {
                    heads += 1;
                    if matches!(request.body, Body::Both) {
                        flagged = Some(Defect { head: heads, what: HeadDefect::LengthAndEncoding });
                    }
                }
            }
            let mut framing = Framing::default();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                framing.read(now);
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(framing.heads(), heads);
            prop_assert_eq!(framing.defect(), flagged);
            prop_assert_eq!(framing.between_messages(), flagged.is_none());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(prop::sample::select(b"GETHO /:1.\r\n0a;cC".to_vec()), 0..300)) {
            read_whole(&bytes);
        }
    }

    /// `cargo test --release guard_cost -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    #[allow(clippy::disallowed_methods, clippy::print_stdout)]
    fn guard_cost_of_a_small_request() {
        const REQUEST: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: OpenAI/Python 1.99.1\r\n\
            Accept: application/json\r\nAccept-Encoding: gzip, deflate\r\nContent-Type: application/json\r\n\
            Authorization: Bearer sk-0123456789abcdef0123456789abcdef\r\nX-Stainless-Lang: python\r\n\
            Connection: keep-alive\r\nContent-Length: 40\r\n\r\n0123456789012345678901234567890123456789";
        let mut framing = Framing::default();
        let rounds = 1_000_000;
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            framing.read(std::hint::black_box(REQUEST));
        }
        println!("{} ns per request of {} bytes", start.elapsed().as_nanos() / rounds, REQUEST.len());
        assert_eq!(u128::from(framing.heads()), rounds);
    }
}
