//! Heads of HTTP/1.1 towards a backend: writing a request's, reading an answer's (RFC 9112 §2–§6).
//!
//! Pure: text in, values out. Fields of an answer are slices of the bytes that were read. An interim answer (1xx)
//! is passed over; 101 is not one, and is handed on for others to refuse. What `httparse` refuses, is
//! refused; two lengths that differ are too.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode, Version, response};
use hyper::ext::ReasonPhrase;
use memchr::memmem;

use crate::upstream::framing::Framing;
use crate::upstream::{OutHead, lists_close};

/// Longest head of an answer; a longer one is a protocol fault (F07).
pub(super) const ANSWER_HEAD_BYTES_MAX: usize = 128 * 1024;
/// Most header fields of an answer.
pub(super) const ANSWER_HEADERS_MAX: usize = 200;
/// Room for a field, so that a request's head is written without growing: a name and a token or a URL.
const FIELD_BYTES: usize = 48;

/// The head of a request with a body of `length` bytes, and room for `more` behind it.
pub(super) fn write(head: &OutHead<'_>, host: &HeaderValue, length: Option<u64>, more: usize) -> Vec<u8> {
    let path = head.path.as_str();
    let fields = head.headers.len() + head.own.len() + head.also.len() + 2;
    let mut out = Vec::with_capacity(path.len() + fields * FIELD_BYTES + more);
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(path.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    field(&mut out, "host", host.as_bytes());
    let among = |list: &[(HeaderName, HeaderValue)], name: &HeaderName| list.iter().any(|(n, _)| n == name);
    for (name, value) in head.headers {
        let ours = matches!(*name, header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING);
        if !ours && !among(head.own, name) && !among(head.also, name) {
            field(&mut out, name.as_str(), value.as_bytes());
        }
    }
    for (name, value) in head.own.iter().filter(|(name, _)| !among(head.also, name)).chain(head.also) {
        field(&mut out, name.as_str(), value.as_bytes());
    }
    if let Some(length) = length {
        field(&mut out, "content-length", itoa::Buffer::new().format(length).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    out
}

fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Why what was read is no head of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHead {
    /// Not HTTP.
    Protocol(&'static str),
    /// Beyond the limits.
    TooLarge,
}

/// An answer's head.
#[derive(Debug)]
pub(super) struct AnswerHead {
    pub(super) parts: Box<response::Parts>,
    pub(super) framing: Framing,
    /// Its connection ends with it.
    pub(super) last: bool,
}

/// What was read of a head that is not whole yet, interim ones before it included.
#[derive(Debug, Default)]
pub(super) struct Begun {
    bytes: Vec<u8>,
    /// Of interim heads.
    passed: usize,
}

impl Begun {
    /// Reads on in `unread`; what stands behind the head stays there. None where that needs more bytes. `asked` is
    /// the method of the request.
    pub(super) fn read(&mut self, unread: &mut Bytes, asked: &Method) -> Result<Option<AnswerHead>, BadHead> {
        if !self.bytes.is_empty() {
            // Parsed again only when the end may be here: a head that comes byte by byte costs no square.
            let from = self.bytes.len().saturating_sub(3);
            self.bytes.extend_from_slice(unread);
            unread.clear();
            if !ends(&self.bytes[from..]) {
                return if self.is_too_large() { Err(BadHead::TooLarge) } else { Ok(None) };
            }
            *unread = std::mem::take(&mut self.bytes).into();
        }
        while !unread.is_empty() {
            let Some((length, head)) = parse(unread, asked)? else {
                self.bytes.extend_from_slice(unread);
                unread.clear();
                return if self.is_too_large() { Err(BadHead::TooLarge) } else { Ok(None) };
            };
            unread.advance(length);
            self.passed += length;
            if self.is_too_large() {
                return Err(BadHead::TooLarge);
            }
            if head.is_some() {
                self.passed = 0;
                return Ok(head);
            }
        }
        Ok(None)
    }

    fn is_too_large(&self) -> bool {
        self.passed + self.bytes.len() > ANSWER_HEAD_BYTES_MAX
    }
}

/// Whether a head may end in `bytes`; a line may end with LF alone.
fn ends(bytes: &[u8]) -> bool {
    memmem::find(bytes, b"\n\r\n").is_some() || memmem::find(bytes, b"\n\n").is_some()
}

/// A whole head and its length; the head is none where it is an interim one.
fn parse(bytes: &Bytes, asked: &Method) -> Result<Option<(usize, Option<AnswerHead>)>, BadHead> {
    let mut room = [const { MaybeUninit::uninit() }; ANSWER_HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let length = match httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut parsed,
        bytes,
        &mut room,
    ) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(BadHead::TooLarge),
        Err(httparse::Error::HeaderName | httparse::Error::HeaderValue) => {
            return Err(BadHead::Protocol("a header field is malformed"));
        }
        Err(_) => return Err(BadHead::Protocol("it does not begin with a status line")),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(BadHead::Protocol("no such status"))?;
    if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Some((length, None)));
    }
    let (mut head, ()) = Response::new(()).into_parts();
    head.status = status;
    head.version = Version::HTTP_11;
    head.headers.reserve(parsed.headers.len());
    let mut said = Said { asked, status, old: parsed.version != Some(1), coding: None, length: Ok(None) };
    let mut last = said.old;
    for read in parsed.headers.iter() {
        let name = HeaderName::from_bytes(read.name.as_bytes());
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(read.value));
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(BadHead::Protocol("a header field is malformed"));
        };
        match name {
            header::CONTENT_LENGTH => said.length = length_of(said.length, read.value),
            header::TRANSFER_ENCODING => said.coding = Some(read.value),
            header::CONNECTION => last |= lists_close(read.value),
            _ => {}
        }
        head.headers.append(name, value);
    }
    if let Some(reason) = parsed.reason.filter(|reason| Some(*reason) != status.canonical_reason())
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        head.extensions.insert(reason);
    }
    if said.coding.is_some() {
        // RFC 9112 §6.3: the encoding wins. A length beside it is left for nobody to believe.
        head.headers.remove(header::CONTENT_LENGTH);
    }
    let framing = said.framing()?;
    last |= matches!(framing, Framing::ToClose);
    Ok(Some((length, Some(AnswerHead { parts: Box::new(head), framing, last }))))
}

/// What decides where the body of an answer ends.
struct Said<'a> {
    asked: &'a Method,
    status: StatusCode,
    /// HTTP/1.0.
    old: bool,
    /// The last list of transfer codings.
    coding: Option<&'a [u8]>,
    length: Result<Option<u64>, BadHead>,
}

impl Said<'_> {
    /// RFC 9112 §6.3, for answers.
    fn framing(self) -> Result<Framing, BadHead> {
        if *self.asked == Method::HEAD || matches!(self.status.as_u16(), 101 | 204 | 304) {
            return Ok(Framing::Ended);
        }
        if let Some(coding) = self.coding {
            if self.old {
                return Err(BadHead::Protocol("HTTP/1.0 has no transfer encodings"));
            }
            let last = coding.rsplit(|&byte| byte == b',').next().unwrap_or_default();
            let chunked = last.trim_ascii().eq_ignore_ascii_case(b"chunked");
            return Ok(if chunked { Framing::chunked() } else { Framing::ToClose });
        }
        Ok(match self.length? {
            None => Framing::ToClose,
            Some(0) => Framing::Ended,
            Some(length) => Framing::Length(length),
        })
    }
}

/// One more field with a length, which may be a list: all must be the same.
fn length_of(before: Result<Option<u64>, BadHead>, value: &[u8]) -> Result<Option<u64>, BadHead> {
    let mut length = before?;
    for said in value.split(|&byte| byte == b',') {
        let said = decimal(said.trim_ascii()).ok_or(BadHead::Protocol("its length is no number"))?;
        if length.replace(said).is_some_and(|before| before != said) {
            return Err(BadHead::Protocol("it has two lengths"));
        }
    }
    Ok(length)
}

/// Digits and nothing else.
fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit <= 9)?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// The fields of a trailer section that ends with its empty line.
pub(super) fn trailers(section: &[u8], most: usize) -> Option<HeaderMap> {
    let mut room = vec![httparse::EMPTY_HEADER; most];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(section, &mut room) else {
        return None;
    };
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for read in fields {
        let name = HeaderName::from_bytes(read.name.as_bytes()).ok()?;
        trailers.append(name, HeaderValue::from_bytes(read.value).ok()?);
    }
    Some(trailers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::uri::PathAndQuery;

    fn read(wire: &str, cut: usize, asked: &Method) -> Result<Option<(AnswerHead, Bytes)>, BadHead> {
        let mut begun = Begun::default();
        let mut rest = Bytes::copy_from_slice(wire.as_bytes());
        while !rest.is_empty() {
            let mut unread = rest.split_to(cut.min(rest.len()));
            if let Some(head) = begun.read(&mut unread, asked)? {
                return Ok(Some((head, [unread, rest].concat().into())));
            }
            assert!(unread.is_empty());
        }
        Ok(None)
    }

    #[test]
    fn a_head_is_read_over_any_split() {
        let wire = "HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 Fine\r\nX-A: 1\r\nx-a:  2 \r\nContent-Length: 3\r\n\r\nabc";
        for cut in 1..=wire.len() {
            let (head, rest) = read(wire, cut, &Method::GET).unwrap().unwrap();
            assert_eq!(head.parts.status, StatusCode::OK);
            assert_eq!(head.parts.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
            assert_eq!(head.parts.extensions.get::<ReasonPhrase>().unwrap().as_bytes(), b"Fine");
            assert!(matches!(head.framing, Framing::Length(3)) && !head.last);
            assert_eq!(rest, "abc");
        }
    }

    #[test]
    fn the_end_of_a_body_is_as_the_standard_says() {
        let framed = |head: &str, asked: &Method| {
            let wire = format!("HTTP/1.1 {head}\r\n\r\n");
            read(&wire, wire.len(), asked).map(|head| {
                let (head, _) = head.unwrap();
                assert!(
                    !head.parts.headers.contains_key("content-length")
                        || !head.parts.headers.contains_key("transfer-encoding")
                );
                (format!("{:?}", head.framing).split(['(', ' ']).next().unwrap().to_owned(), head.last)
            })
        };
        for (head, framing, last) in [
            ("200 OK\r\ncontent-length: 5", "Length", false),
            ("200 OK\r\ncontent-length: 5\r\ncontent-length: 5", "Length", false),
            ("200 OK\r\ncontent-length: 5, 5", "Length", false),
            ("200 OK\r\ncontent-length: 0", "Ended", false),
            ("200 OK\r\ntransfer-encoding: chunked", "Chunked", false),
            ("200 OK\r\ntransfer-encoding: gzip, Chunked\r\ncontent-length: 5", "Chunked", false),
            ("200 OK\r\ntransfer-encoding: chunked, gzip", "ToClose", true),
            ("200 OK", "ToClose", true),
            ("200 OK\r\ncontent-length: 5\r\nconnection: x, Close", "Length", true),
            ("204 No Content\r\ncontent-length: 5", "Ended", false),
            ("304 Not Modified\r\ntransfer-encoding: chunked", "Ended", false),
            ("101 Switching Protocols", "Ended", false),
        ] {
            assert_eq!(framed(head, &Method::POST), Ok((framing.to_owned(), last)), "{head:?}");
        }
        assert_eq!(framed("200 OK\r\ncontent-length: 5", &Method::HEAD), Ok(("Ended".to_owned(), false)));
        for head in [
            "200 OK\r\ncontent-length: 5\r\ncontent-length: 6",
            "200 OK\r\ncontent-length: +5",
            "200 OK\r\ncontent-length: ",
            "200 OK\r\ncontent-length: 99999999999999999999",
            "200 OK\r\nno field",
            "99 Odd",
        ] {
            assert!(matches!(framed(head, &Method::POST), Err(BadHead::Protocol(_))), "{head:?}");
        }
        let old = "HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n";
        assert!(read(old, old.len(), &Method::GET).unwrap().unwrap().0.last);
    }

    #[test]
    fn a_head_without_an_end_is_too_large_at_last() {
        for wire in [
            format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(ANSWER_HEAD_BYTES_MAX)),
            format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(ANSWER_HEADERS_MAX + 1)),
            "HTTP/1.1 100 Continue\r\n\r\n".repeat(ANSWER_HEAD_BYTES_MAX / 25 + 1),
        ] {
            assert_eq!(read(&wire, 1000, &Method::GET).err(), Some(BadHead::TooLarge));
        }
        assert!(matches!(read("SSH-2.0-x\r\n", 4, &Method::GET), Err(BadHead::Protocol(_))));
    }

    #[test]
    fn a_request_says_its_own_length_and_host() {
        let own = |name, value| (HeaderName::from_static(name), HeaderValue::from_static(value));
        let mut headers = HeaderMap::new();
        for (name, value) in [("host", "client.example"), ("content-length", "9"), ("x-a", "1"), ("x-b", "2")]
        {
            headers.append(name, HeaderValue::from_static(value));
        }
        let head = OutHead {
            method: &Method::POST,
            path: PathAndQuery::from_static("/v1/x?y"),
            headers: &headers,
            own: &[own("x-b", "3"), own("x-c", "4")],
            also: &[own("x-c", "5")],
        };
        let written = write(&head, &HeaderValue::from_static("engine:80"), Some(4), 0);
        let text = String::from_utf8(written).unwrap();
        assert_eq!(
            text,
            "POST /v1/x?y HTTP/1.1\r\nhost: engine:80\r\nx-a: 1\r\nx-b: 3\r\nx-c: 5\r\ncontent-length: 4\r\n\r\n"
        );
    }
}
