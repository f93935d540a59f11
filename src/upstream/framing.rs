//! Where the body of an HTTP/1.1 answer ends, and what of the bytes that were read belongs to it (RFC 9112 §6, §7).
//!
//! Pure: bytes in, pieces of the same memory out, over any split. A chunk's size line must be what the grammar
//! says, with CRLF; extensions are passed over. Nothing is kept but the trailers, which are bounded.

use bytes::{Buf, Bytes};
use http::HeaderMap;

use crate::upstream::head;

/// Longest trailer section, and most bytes of chunk extensions in one answer: as hyper has it.
const TRAILER_BYTES_MAX: usize = 16 * 1024;
const EXTENSION_BYTES_MAX: usize = 16 * 1024;
/// Longest size that is read at once, and the byte behind it.
const SIZE_DIGITS_PLAIN: usize = 8;
/// Most trailer fields.
const TRAILERS_MAX: usize = 100;

/// How the body of one answer ends.
#[derive(Debug)]
pub(super) enum Framing {
    /// It has ended, or there is none.
    Ended,
    /// After this many bytes.
    Length(u64),
    /// With the chunk of size 0.
    Chunked(Chunked),
    /// When the connection is closed.
    ToClose,
}

/// What comes next.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// Bytes of the body.
    Data(Bytes),
    /// Fields behind the body; its end.
    Trailers(HeaderMap),
    /// Its end.
    End,
    /// More must be read.
    Need,
    /// No chunk looks like this.
    Broken,
}

impl Framing {
    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunked { at: At::Size { digits: 0, size: 0 }, extensions: 0 })
    }

    /// Takes the next piece of the body off `unread`. What can be known of the end by then is.
    pub(super) fn next(&mut self, unread: &mut Bytes) -> Step {
        let step = match self {
            Self::Ended => return Step::End,
            _ if unread.is_empty() && !self.is_settled() => return Step::Need,
            Self::ToClose => return Step::Data(std::mem::take(unread)),
            Self::Length(left) => {
                let piece = take(unread, *left);
                *left -= piece.len() as u64;
                if *left == 0 {
                    *self = Self::Ended;
                }
                return Step::Data(piece);
            }
            Self::Chunked(chunked) => chunked.next(unread),
        };
        if matches!(step, Step::End | Step::Trailers(_))
            || matches!(&self, Self::Chunked(c) if matches!(c.at, At::End))
        {
            *self = Self::Ended;
        }
        step
    }

    /// Nothing more is to come.
    pub(super) fn is_ended(&self) -> bool {
        matches!(self, Self::Ended)
    }

    /// Bytes still to come, where that is known.
    pub(super) fn announced(&self) -> Option<u64> {
        match self {
            Self::Ended => Some(0),
            Self::Length(left) => Some(*left),
            Self::Chunked(_) | Self::ToClose => None,
        }
    }

    /// What comes next is known without another byte.
    fn is_settled(&self) -> bool {
        matches!(self, Self::Chunked(Chunked { at: At::Trailers(_) | At::Broken, .. }))
    }
}

/// A place in a chunked body.
#[derive(Debug)]
pub(super) struct Chunked {
    at: At,
    extensions: usize,
}

#[derive(Debug)]
enum At {
    Size {
        digits: u8,
        size: u64,
    },
    SizeSpace(u64),
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// Behind the last chunk, at the beginning of a line.
    LastCr,
    LastLf,
    /// Fields, as far as they came.
    Fields(Vec<u8>),
    Trailers(HeaderMap),
    End,
    Broken,
}

impl Chunked {
    fn next(&mut self, unread: &mut Bytes) -> Step {
        if !matches!(self.at, At::Data(_)) {
            self.pass(unread);
        }
        let At::Data(left) = &mut self.at else {
            return match std::mem::replace(&mut self.at, At::Broken) {
                At::Trailers(trailers) => Step::Trailers(trailers),
                At::End => Step::End,
                At::Broken => Step::Broken,
                other => {
                    self.at = other;
                    Step::Need
                }
            };
        };
        if unread.is_empty() {
            return Step::Need;
        }
        let piece = take(unread, *left);
        *left -= piece.len() as u64;
        if *left == 0 {
            self.at = At::DataCr;
            // The end may be here already: whoever knows gives the connection back at once.
            self.pass(unread);
        }
        Step::Data(piece)
    }

    /// Passes over what is no data, as far as the bytes go.
    fn pass(&mut self, unread: &mut Bytes) {
        self.pass_plain(unread);
        while let (Some(&byte), false) = (unread.first(), matches!(self.at, At::Data(_))) {
            if let At::Fields(fields) = &mut self.at {
                if !take_fields(fields, unread) {
                    continue;
                }
                self.at = head::trailers(fields, TRAILERS_MAX).map_or(At::Broken, At::Trailers);
                return;
            }
            self.at = self.after(byte);
            if matches!(self.at, At::Broken) {
                return;
            }
            unread.advance(1);
            if matches!(self.at, At::End) {
                return;
            }
        }
    }

    /// The same for what lies between two chunks mostly: two line ends and a number, all of them here.
    fn pass_plain(&mut self, unread: &mut Bytes) {
        if matches!(self.at, At::DataCr) && unread.starts_with(b"\r\n") {
            unread.advance(2);
            self.at = At::Size { digits: 0, size: 0 };
        }
        if !matches!(self.at, At::Size { digits: 0, .. }) {
            return;
        }
        let mut size = 0;
        for (i, &byte) in unread.iter().take(SIZE_DIGITS_PLAIN).enumerate() {
            match char::from(byte).to_digit(16) {
                Some(digit) => size = size << 4 | u64::from(digit),
                // A last chunk is another matter.
                None if size > 0 && unread[i..].starts_with(b"\r\n") => {
                    unread.advance(i + 2);
                    self.at = At::Data(size);
                    return;
                }
                None => return,
            }
        }
    }

    fn after(&mut self, byte: u8) -> At {
        match (&self.at, byte) {
            (At::Size { digits, size }, _) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).map_or(0, u64::from);
                // 15 digits are an exabyte: no overflow, and no line of zeros without an end.
                if *digits == 15 {
                    At::Broken
                } else {
                    At::Size { digits: digits + 1, size: size << 4 | digit }
                }
            }
            (At::Size { digits: 0, .. }, _) => At::Broken,
            (At::Size { size, .. } | At::SizeSpace(size), b' ' | b'\t') => self.passes(At::SizeSpace(*size)),
            (At::Size { size, .. } | At::SizeSpace(size), b';') => At::Extension(*size),
            (At::Size { size, .. } | At::SizeSpace(size) | At::Extension(size), b'\r') => At::SizeLf(*size),
            (At::Extension(size), byte) if byte != b'\n' => self.passes(At::Extension(*size)),
            (At::SizeLf(0), b'\n') => At::LastCr,
            (At::SizeLf(size), b'\n') => At::Data(*size),
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size { digits: 0, size: 0 },
            (At::LastCr, b'\r') => At::LastLf,
            (At::LastCr, byte) => At::Fields(vec![byte]),
            (At::LastLf, b'\n') => At::End,
            _ => At::Broken,
        }
    }

    /// One more byte that means nothing to us.
    fn passes(&mut self, at: At) -> At {
        self.extensions += 1;
        if self.extensions > EXTENSION_BYTES_MAX { At::Broken } else { at }
    }
}

/// Adds to `fields` what is in `unread`, up to the empty line; whether that is here, or will never be taken.
fn take_fields(fields: &mut Vec<u8>, unread: &mut Bytes) -> bool {
    for (i, &byte) in unread.iter().enumerate() {
        fields.push(byte);
        if fields.ends_with(b"\r\n\r\n") || fields.len() > TRAILER_BYTES_MAX {
            unread.advance(i + 1);
            return true;
        }
    }
    unread.clear();
    false
}

/// The first `most` bytes, or as many as there are.
fn take(unread: &mut Bytes, most: u64) -> Bytes {
    if unread.len() as u64 <= most {
        return std::mem::take(unread);
    }
    unread.split_to(usize::try_from(most).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All of a body cut into `cuts`: its data, its trailers, how it ends, and what is left behind it.
    fn read(
        mut framing: Framing,
        wire: &[u8],
        cuts: &[usize],
    ) -> (Vec<u8>, Option<HeaderMap>, &'static str, usize) {
        let (mut data, mut trailers) = (Vec::new(), None);
        let mut rest = Bytes::copy_from_slice(wire);
        let mut unread = Bytes::new();
        let mut cuts = cuts.iter().cycle();
        loop {
            match framing.next(&mut unread) {
                Step::Data(piece) => data.extend_from_slice(&piece),
                Step::Trailers(fields) => trailers = Some(fields),
                Step::End => return (data, trailers, "end", unread.len() + rest.len()),
                Step::Broken => return (data, trailers, "broken", 0),
                Step::Need if rest.is_empty() => return (data, trailers, "cut", 0),
                Step::Need => {
                    assert!(unread.is_empty());
                    unread = rest.split_to((*cuts.next().unwrap()).min(rest.len()));
                }
            }
        }
    }

    #[test]
    fn chunks_are_what_the_grammar_says() {
        for (wire, data, end) in [
            ("5\r\nhello\r\n0\r\n\r\n", "hello", "end"),
            ("5;a=b\r\nhello\r\n00 ;c\r\n\r\n", "hello", "end"),
            ("A\r\n0123456789\r\n1\t\r\nx\r\n0\r\n\r\n", "0123456789x", "end"),
            ("5\r\nhello\r\n0\r\n\r", "hello", "cut"),
            ("5\r\nhello\r\n", "hello", "cut"),
            ("5\r\nhel", "hel", "cut"),
            ("5\nhello\r\n0\r\n\r\n", "", "broken"),
            ("5\r\nhelloo\r\n0\r\n\r\n", "hello", "broken"),
            ("\r\n", "", "broken"),
            ("-5\r\nhello", "", "broken"),
            ("0x5\r\nhello", "", "broken"),
            ("5 5\r\nhello", "", "broken"),
            ("5;a\nhello", "", "broken"),
            ("ffffffffffffffff1\r\nhello", "", "broken"),
            ("0\r\nbad trailer\r\n\r\n", "", "broken"),
        ] {
            for cut in 1..=wire.len() {
                let (seen, _, how, _) = read(Framing::chunked(), wire.as_bytes(), &[cut]);
                assert_eq!((seen.as_slice(), how), (data.as_bytes(), end), "{wire:?} in pieces of {cut}");
            }
        }
        let long = format!("5;{}\r\nhello", "x".repeat(EXTENSION_BYTES_MAX + 1));
        assert_eq!(read(Framing::chunked(), long.as_bytes(), &[1000]).2, "broken");
        let long = format!("0\r\na: {}\r\n\r\n", "x".repeat(TRAILER_BYTES_MAX));
        assert_eq!(read(Framing::chunked(), long.as_bytes(), &[1000]).2, "broken");
    }

    #[test]
    fn the_end_is_known_with_the_last_piece() {
        let mut framing = Framing::chunked();
        let mut unread = Bytes::from_static(b"2\r\nhi\r\n0\r\n\r\n");
        assert_eq!(framing.next(&mut unread), Step::Data("hi".into()));
        assert!(framing.is_ended() && unread.is_empty());
        let mut framing = Framing::Length(2);
        let mut unread = Bytes::from_static(b"hiHTTP");
        assert_eq!(framing.next(&mut unread), Step::Data("hi".into()));
        assert!(framing.is_ended() && unread == "HTTP");
    }

    #[test]
    fn a_body_without_a_length_is_whatever_comes() {
        assert_eq!(read(Framing::ToClose, b"0\r\n\r\n", &[2]), (b"0\r\n\r\n".to_vec(), None, "cut", 0));
        assert_eq!(read(Framing::Length(3), b"ab", &[1]), (b"ab".to_vec(), None, "cut", 0));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same(
            chunks in prop::collection::vec(prop::collection::vec(prop::sample::select(b"\r\n0a;: ".to_vec()), 1..30), 0..6),
            trailer in any::<bool>(),
            cuts in prop::collection::vec(1_usize..20, 1..20),
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend(format!("{:X}\r\n", chunk.len()).into_bytes());
                wire.extend(chunk);
                wire.extend(b"\r\n");
            }
            wire.extend(b"0\r\n");
            if trailer {
                wire.extend(b"X-A: 1\r\nx-b:2\r\n");
            }
            wire.extend(b"\r\n");
            wire.extend(b"next");
            let (data, trailers, end, left) = read(Framing::chunked(), &wire, &cuts);
            prop_assert_eq!(data, chunks.concat());
            prop_assert_eq!(trailers.map(|fields| fields.len()), trailer.then_some(2));
            prop_assert_eq!((end, left), ("end", 4));
        }

        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(prop::sample::select(b"\r\n019aF;: x".to_vec()), 0..60),
            cuts in prop::collection::vec(1_usize..9, 1..9),
        ) {
            read(Framing::chunked(), &bytes, &cuts);
        }
    }
}
