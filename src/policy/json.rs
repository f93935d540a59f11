//! JSON (RFC 8259) read in place: no tree, no allocation, spans instead of values.
//!
//! A proxy asks little of the JSON that passes through it, but asks it of every request body and every
//! event of every stream: is it whole, and what do three or four members say. Two readers answer:
//!
//! - [`Reader`] walks and *validates* every byte in one pass. Answers go through it: an answer that is
//!   not JSON must be known before it is forwarded (catalogue F21, F24).
//! - [`scan_top_level`] finds the members of a request body and *skips* what they hold, as fast as its
//!   strings can be searched. It accepts more than JSON (engines take `NaN`; judging the request is
//!   theirs), never less, and what it yields for valid JSON is exact.
//!
//! Not here: numbers beyond what a limit or an index needs, and any writing but string literals and
//! splices, because what evergate forwards is the client's own bytes.

use std::borrow::Cow;
use std::fmt;
use std::ops::{ControlFlow, Range};

use bytes::Bytes;
use memchr::memchr2;

/// Deepest nesting of arrays and objects that [`Reader`] follows. Real requests and answers stay below
/// 20; `serde_json` stops at 127.
pub const DEPTH_MAX: u32 = 128;

/// What is wrong with a text, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// Bytes before the first wrong one.
    pub offset: usize,
    /// What is wrong there.
    pub kind: JsonErrorKind,
}

/// The ways in which a text is not the JSON that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonErrorKind {
    /// The text ends too early; also an empty text.
    UnexpectedEnd,
    /// A byte that may not stand here.
    UnexpectedByte,
    /// An unescaped control character in a string.
    ControlCharacter,
    /// A backslash with something other than an escape behind it.
    BadEscape,
    /// A number against the grammar (`01`, `1.`, `-`, `+1`).
    BadNumber,
    /// Not UTF-8.
    BadUtf8,
    /// More than [`DEPTH_MAX`] arrays and objects inside one another.
    TooDeep,
    /// Something behind the value.
    TrailingBytes,
    /// Valid so far, but not an object where one was expected.
    NotAnObject,
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            JsonErrorKind::UnexpectedEnd => "the JSON text ends too early",
            JsonErrorKind::UnexpectedByte => "unexpected character in the JSON text",
            JsonErrorKind::ControlCharacter => "unescaped control character in a JSON string",
            JsonErrorKind::BadEscape => "invalid escape in a JSON string",
            JsonErrorKind::BadNumber => "invalid JSON number",
            JsonErrorKind::BadUtf8 => "the JSON text is not UTF-8",
            JsonErrorKind::TooDeep => "the JSON text is nested too deeply",
            JsonErrorKind::TrailingBytes => "something follows the JSON text",
            JsonErrorKind::NotAnObject => "a JSON object is expected",
        };
        write!(f, "{what}, at byte {}", self.offset)
    }
}

impl std::error::Error for JsonError {}

/// Whether `bytes` are one JSON text.
///
/// Beside the grammar it demands UTF-8 and at most [`DEPTH_MAX`] levels. It takes what the grammar takes
/// even where other parsers do not: numbers beyond the range of a float, lone surrogates in `\u`.
pub fn validate(bytes: &[u8]) -> Result<(), JsonError> {
    let mut reader = Reader::new(bytes);
    reader.pass()?;
    reader.finish()
}

/// Calls `on_member` for each member of the object `bytes`, in their order, with its unescaped name.
/// Stops early, without looking at the rest, when told to.
///
/// A name may come twice: engines take the last (Python, JavaScript) or refuse, so a caller lets later
/// ones overwrite earlier ones.
pub fn scan_top_level<'a, F>(bytes: &'a [u8], on_member: F) -> Result<(), JsonError>
where
    F: FnMut(&[u8], Value<'a>) -> ControlFlow<()>,
{
    match skim_object(bytes, on_member)? {
        Some(end) => match next_visible(bytes, end) {
            at if at == bytes.len() => Ok(()),
            at => Err(error(at, JsonErrorKind::TrailingBytes)),
        },
        None => Ok(()),
    }
}

/// Like [`scan_top_level`] for an object that may be followed by other data (KServe's binary tensors);
/// returns where it ends, `None` when told to stop before.
pub fn scan_object_prefix<'a, F>(bytes: &'a [u8], on_member: F) -> Result<Option<usize>, JsonError>
where
    F: FnMut(&[u8], Value<'a>) -> ControlFlow<()>,
{
    skim_object(bytes, on_member)
}

/// `bytes` with `span` replaced, as three pieces that share its memory: what the rename of a model costs
/// on a body of megabytes.
///
/// # Panics
/// When the span does not lie in `bytes`.
pub fn splice(bytes: &Bytes, span: Range<usize>, replacement: Bytes) -> [Bytes; 3] {
    [bytes.slice(..span.start), replacement, bytes.slice(span.end..)]
}

/// Appends `text` as a JSON string literal, quotes included.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    for &byte in text.as_bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 | 0x7F => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
            _ => out.push(byte),
        }
    }
    out.push(b'"');
}

/// The six kinds of JSON value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `{…}`
    Object,
    /// `[…]`
    Array,
    /// `"…"`
    String,
    /// A number (and, from [`scan_top_level`] only, `NaN` and the infinities).
    Number,
    /// `true` or `false`
    Bool,
    /// `null`
    Null,
}

/// A value as the span it has in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value<'a> {
    raw: &'a [u8],
    start: usize,
    kind: Kind,
}

impl<'a> Value<'a> {
    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its bytes as written, quotes and brackets included.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// Where it stands in the text that was read.
    pub fn span(&self) -> Range<usize> {
        self.start..self.start + self.raw.len()
    }

    /// Whether it is `null`.
    pub fn is_null(&self) -> bool {
        self.kind == Kind::Null
    }

    /// Whether it says nothing: `null`, `""`, `[]` or `{}`. Costs no more than its white space.
    pub fn is_blank(&self) -> bool {
        match self.kind {
            Kind::Null => true,
            Kind::String => self.raw.len() == 2,
            Kind::Array | Kind::Object => next_visible(self.raw, 1) + 1 == self.raw.len(),
            Kind::Number | Kind::Bool => false,
        }
    }

    /// The text of a string. `None` for another kind, and for a string that is not Unicode text (a lone
    /// surrogate; invalid UTF-8 in a text that was only skimmed). Allocates only for escapes.
    pub fn as_str(&self) -> Option<Cow<'a, str>> {
        match self.unescaped()? {
            Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
            Cow::Owned(bytes) => String::from_utf8(bytes).ok().map(Cow::Owned),
        }
    }

    /// `true` or `false`.
    pub fn as_bool(&self) -> Option<bool> {
        (self.kind == Kind::Bool).then(|| self.raw == b"true")
    }

    /// A number written as a plain non-negative integer that fits.
    pub fn as_u64(&self) -> Option<u64> {
        if self.kind != Kind::Number || self.raw.is_empty() {
            return None;
        }
        self.raw.iter().try_fold(0_u64, |sum, &byte| {
            let digit = byte.wrapping_sub(b'0');
            if digit > 9 {
                return None;
            }
            sum.checked_mul(10)?.checked_add(u64::from(digit))
        })
    }

    /// A number, rounded to a float; infinite when it is beyond the range of one.
    pub fn as_f64(&self) -> Option<f64> {
        if self.kind != Kind::Number {
            return None;
        }
        std::str::from_utf8(self.raw).ok()?.parse().ok()
    }

    /// The members of an object; nothing for another kind. Exact for a value out of valid JSON; ends at
    /// the first fault otherwise.
    pub fn members(&self) -> Members<'a> {
        let at = if self.kind == Kind::Object { 1 } else { self.raw.len() };
        Members { bytes: self.raw, base: self.start, at }
    }

    /// The elements of an array; otherwise like [`members`](Self::members).
    pub fn elements(&self) -> Elements<'a> {
        let at = if self.kind == Kind::Array { 1 } else { self.raw.len() };
        Elements { bytes: self.raw, base: self.start, at }
    }

    /// The last member called `name`.
    pub fn get(&self, name: &str) -> Option<Value<'a>> {
        self.members().filter(|(key, _)| **key == *name.as_bytes()).map(|(_, value)| value).last()
    }

    fn unescaped(&self) -> Option<Cow<'a, [u8]>> {
        if self.kind != Kind::String || self.raw.len() < 2 {
            return None;
        }
        unescape(&self.raw[1..self.raw.len() - 1])
    }
}

/// Iterator of [`Value::members`]: unescaped names and values.
#[derive(Clone, Debug)]
pub struct Members<'a> {
    bytes: &'a [u8],
    base: usize,
    at: usize,
}

impl<'a> Iterator for Members<'a> {
    type Item = (Cow<'a, [u8]>, Value<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let key_start = next_item(self.bytes, self.at)?;
        let (name, at) = skim_name(self.bytes, key_start).ok()?;
        let value = skim_value(self.bytes, at).ok()?;
        self.at = value.span().end;
        Some((name, Value { start: self.base + value.start, ..value }))
    }
}

/// Iterator of [`Value::elements`].
#[derive(Clone, Debug)]
pub struct Elements<'a> {
    bytes: &'a [u8],
    base: usize,
    at: usize,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = next_item(self.bytes, self.at)?;
        let value = skim_value(self.bytes, start).ok()?;
        self.at = value.span().end;
        Some(Value { start: self.base + value.start, ..value })
    }
}

/// A validating walk over one JSON text: the caller descends where it is interested and passes the rest,
/// and every byte is checked once either way.
///
/// The inner functions answer with an offset or nothing, and a fault is worked out only when there is
/// one: an event of a stream is to cost a thousand instructions, not five thousand.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: u32,
}

impl<'a> Reader<'a> {
    /// Starts in front of the value.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, depth: 0 }
    }

    /// The kind of the value ahead, by its first byte.
    #[inline]
    pub fn peek(&mut self) -> Result<Kind, JsonError> {
        match self.visible() {
            b'"' => Ok(Kind::String),
            b'{' => Ok(Kind::Object),
            b'[' => Ok(Kind::Array),
            b'-' | b'0'..=b'9' => Ok(Kind::Number),
            b't' | b'f' => Ok(Kind::Bool),
            b'n' => Ok(Kind::Null),
            _ => Err(unexpected(self.bytes, self.at)),
        }
    }

    /// Reads the whole value ahead.
    #[inline]
    pub fn value(&mut self) -> Result<Value<'a>, JsonError> {
        let kind = self.peek()?;
        let start = self.at;
        self.pass_kind(kind)?;
        Ok(Value { raw: &self.bytes[start..self.at], start, kind })
    }

    /// Passes the whole value ahead.
    #[inline]
    pub fn pass(&mut self) -> Result<(), JsonError> {
        let kind = self.peek()?;
        self.pass_kind(kind)
    }

    /// Reads the object ahead. For each member `on_member` gets its unescaped name and must read exactly
    /// one value. A value that is no object is passed, and returned.
    #[inline]
    pub fn object<F>(&mut self, mut on_member: F) -> Result<Option<Value<'a>>, JsonError>
    where
        F: FnMut(&mut Self, &[u8]) -> Result<(), JsonError>,
    {
        if self.peek()? != Kind::Object {
            return self.value().map(Some);
        }
        self.descend()?;
        if !self.closes(b'}') {
            loop {
                let name = self.name()?;
                // A name with escapes is decoded; a lone surrogate has no bytes, and such a name then
                // simply matches nothing.
                let decoded = match name.escaped {
                    true => unescape(name.inside),
                    false => None,
                };
                on_member(self, decoded.as_deref().unwrap_or(name.inside))?;
                if self.separator(b'}')? {
                    break;
                }
            }
        }
        self.depth -= 1;
        Ok(None)
    }

    /// Reads the array ahead; for each element `on_element` must read exactly one value. A value that is
    /// no array is passed, and returned.
    #[inline]
    pub fn array<F>(&mut self, mut on_element: F) -> Result<Option<Value<'a>>, JsonError>
    where
        F: FnMut(&mut Self) -> Result<(), JsonError>,
    {
        if self.peek()? != Kind::Array {
            return self.value().map(Some);
        }
        self.descend()?;
        if !self.closes(b']') {
            loop {
                on_element(self)?;
                if self.separator(b']')? {
                    break;
                }
            }
        }
        self.depth -= 1;
        Ok(None)
    }

    /// Nothing but white space may be left.
    pub fn finish(&mut self) -> Result<(), JsonError> {
        self.at = next_visible(self.bytes, self.at);
        if self.at == self.bytes.len() { Ok(()) } else { Err(error(self.at, JsonErrorKind::TrailingBytes)) }
    }

    /// Passes the value of `kind` that begins here.
    #[inline]
    fn pass_kind(&mut self, kind: Kind) -> Result<(), JsonError> {
        self.at = match kind {
            Kind::String => string_end(self.bytes, self.at)?,
            Kind::Number => number_end(self.bytes, self.at)?,
            Kind::Bool | Kind::Null => literal_end(self.bytes, self.at)?,
            Kind::Array | Kind::Object => return self.nested(),
        };
        Ok(())
    }

    #[inline]
    fn descend(&mut self) -> Result<(), JsonError> {
        if self.depth == DEPTH_MAX {
            return Err(error(self.at, JsonErrorKind::TooDeep));
        }
        self.depth += 1;
        self.at += 1;
        Ok(())
    }

    #[inline]
    fn visible(&mut self) -> u8 {
        visible(self.bytes, &mut self.at)
    }

    /// Passes `close` if it is next.
    ///
    /// Not as `self.at += usize::from(closes)`: rustc 1.95.0 (LLVM 22.1.2) drops that sum from opt-level 2
    /// on, and then every `{}` and `[]` of an answer is a fault (`empty_containers_are_passed_whole` in release).
    #[inline]
    fn closes(&mut self, close: u8) -> bool {
        if self.visible() != close {
            return false;
        }
        self.at += 1;
        true
    }

    /// Passes a comma (`false`) or `close` (`true`).
    #[inline]
    fn separator(&mut self, close: u8) -> Result<bool, JsonError> {
        let byte = self.visible();
        if byte != b',' && byte != close {
            return Err(unexpected(self.bytes, self.at));
        }
        self.at += 1;
        Ok(byte == close)
    }

    /// Reads a member's name and the colon.
    #[inline]
    fn name(&mut self) -> Result<Name<'a>, JsonError> {
        if self.visible() != b'"' {
            return Err(unexpected(self.bytes, self.at));
        }
        let at = self.at;
        let (end, escaped) = match plain_string_end(self.bytes, at + 1) {
            Ok(end) => (end, false),
            Err(ascii) => {
                let end = any_string_end(self.bytes, ascii)?;
                (end, memchr::memchr(b'\\', &self.bytes[at..end]).is_some())
            }
        };
        self.at = end;
        if self.visible() != b':' {
            return Err(unexpected(self.bytes, self.at));
        }
        self.at += 1;
        Ok(Name { inside: &self.bytes[at + 1..end - 1], escaped })
    }

    /// Reads an array or object, without recursion: one bit a level says which of the two it is.
    fn nested(&mut self) -> Result<(), JsonError> {
        const { assert!(DEPTH_MAX <= u128::BITS) };
        let bytes = self.bytes;
        let mut at = self.at;
        let mut depth = self.depth;
        let mut objects = 0_u128;
        loop {
            // In front of a value.
            at = match visible(bytes, &mut at) {
                b'"' => string_end(bytes, at)?,
                b'-' | b'0'..=b'9' => number_end(bytes, at)?,
                b't' | b'f' | b'n' => literal_end(bytes, at)?,
                open @ (b'{' | b'[') => {
                    if depth == DEPTH_MAX {
                        return Err(error(at, JsonErrorKind::TooDeep));
                    }
                    at += 1;
                    // `{` and `}`, `[` and `]` are two apart.
                    if visible(bytes, &mut at) == open + 2 {
                        at + 1
                    } else {
                        depth += 1;
                        objects = objects << 1 | u128::from(open == b'{');
                        if open == b'{' {
                            at = name_end(bytes, at)?;
                        }
                        continue;
                    }
                }
                _ => return Err(unexpected(bytes, at)),
            };
            // Behind a value.
            loop {
                if depth == self.depth {
                    self.at = at;
                    return Ok(());
                }
                let in_object = objects & 1 == 1;
                let byte = visible(bytes, &mut at);
                if byte == b',' {
                    at += 1;
                    if in_object {
                        at = name_end(bytes, at)?;
                    }
                    break;
                }
                if byte != if in_object { b'}' } else { b']' } {
                    return Err(unexpected(bytes, at));
                }
                at += 1;
                objects >>= 1;
                depth -= 1;
            }
        }
    }
}

/// The offset behind a member's name and colon, white space before it allowed.
#[inline]
fn name_end(bytes: &[u8], mut at: usize) -> Result<usize, JsonError> {
    if visible(bytes, &mut at) != b'"' {
        return Err(unexpected(bytes, at));
    }
    at = string_end(bytes, at)?;
    if visible(bytes, &mut at) != b':' {
        return Err(unexpected(bytes, at));
    }
    Ok(at + 1)
}

/// A member's name as written.
struct Name<'a> {
    inside: &'a [u8],
    escaped: bool,
}

#[cold]
fn error(offset: usize, kind: JsonErrorKind) -> JsonError {
    JsonError { offset, kind }
}

/// The byte at `at` is wrong, or missing.
#[cold]
fn unexpected(bytes: &[u8], at: usize) -> JsonError {
    error(at, if at < bytes.len() { JsonErrorKind::UnexpectedByte } else { JsonErrorKind::UnexpectedEnd })
}

/// Passes white space; the byte that follows, 0 at the end (and 0 may stand nowhere).
#[inline]
fn visible(bytes: &[u8], at: &mut usize) -> u8 {
    let byte = byte_at(bytes, *at);
    if byte > b' ' {
        return byte;
    }
    *at = next_visible(bytes, *at);
    byte_at(bytes, *at)
}

#[inline]
fn byte_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

/// The first byte from `at` on that is not white space (RFC 8259 §2), or the length.
fn next_visible(bytes: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\n' | b'\r' | b'\t') = bytes.get(at) {
        at += 1;
    }
    at
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

/// The high bit of each byte of `word` that is `byte` (below 0x80), exact up to the lowest hit: the
/// classic zero-byte test, in which only a hit can disturb the bytes above it.
#[inline]
fn hits(word: u64, byte: u8) -> u64 {
    (word ^ (ONES * u64::from(byte))).wrapping_sub(ONES) & !word & HIGH
}

/// The same for control characters.
#[inline]
fn control_hits(word: u64) -> u64 {
    word.wrapping_sub(ONES * 0x20) & !word & HIGH
}

/// The same for bytes that are no digits: digits become 0 to 9, and whatever is more reaches the high bit.
#[inline]
fn non_digits(word: u64) -> u64 {
    let values = word ^ (ONES * u64::from(b'0'));
    (values.wrapping_add(ONES * 0x76) | values) & HIGH
}

#[inline]
fn index_of(hits: u64) -> usize {
    (hits.trailing_zeros() / 8) as usize
}

/// From here on a string is searched by vector instructions; eight bytes at a time beats calling those
/// for the short ones, which most strings of an event are.
const LONG_STRING: usize = 64;

/// The same for what is known not to be short.
const LONG_RUN: usize = 16;

/// The offset behind the string whose opening quote is at `at`, all of it checked.
#[inline]
pub(super) fn string_end(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    match plain_string_end(bytes, at + 1) {
        Ok(end) => Ok(end),
        Err(ascii) => any_string_end(bytes, ascii),
    }
}

/// The same for a string that begins at `at`, if it is short and nothing but ASCII without escapes. If not, as far as
/// it is that.
#[inline]
fn plain_string_end(bytes: &[u8], mut at: usize) -> Result<usize, usize> {
    let long = at + LONG_STRING;
    while at < long {
        let Some(eight) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) else { break };
        let word = u64::from_le_bytes(*eight);
        let quotes = hits(word, b'"');
        let stops = quotes | hits(word, b'\\') | control_hits(word) | (word & HIGH);
        if stops != 0 {
            let lowest = stops & stops.wrapping_neg();
            at += index_of(stops);
            return if quotes & lowest != 0 { Ok(at + 1) } else { Err(at) };
        }
        at += 8;
    }
    Err(at)
}

/// Any string, from where it is long, escaped, beyond ASCII, at the end of the text, or wrong.
fn any_string_end(bytes: &[u8], start: usize) -> Result<usize, JsonError> {
    let mut at = start;
    loop {
        at += plain_len(&bytes[at..]);
        match bytes.get(at) {
            Some(b'"') => break,
            Some(b'\\') => at = escape_end(bytes, at)?,
            Some(_) => return Err(error(at, JsonErrorKind::ControlCharacter)),
            None => return Err(error(at, JsonErrorKind::UnexpectedEnd)),
        }
    }
    let rest = &bytes[start..at];
    // Without a branch for each byte, and so by vector instructions.
    if rest.iter().fold(0, |all, &byte| all | byte).is_ascii() {
        return Ok(at + 1);
    }
    match std::str::from_utf8(rest) {
        Ok(_) => Ok(at + 1),
        Err(fault) => Err(error(start + fault.valid_up_to(), JsonErrorKind::BadUtf8)),
    }
}

/// How many bytes at the beginning of `bytes` may stand in a string as they are: up to a quote, a
/// backslash, a control character or the end.
fn plain_len(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(eight) = bytes[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*eight);
        let stops = hits(word, b'"') | hits(word, b'\\') | control_hits(word);
        if stops != 0 {
            return at + index_of(stops);
        }
        at += 8;
        if at == LONG_RUN {
            at += plain_len_long(&bytes[at..]);
        }
    }
    at + bytes[at..].iter().take_while(|&&byte| byte >= 0x20 && byte != b'"' && byte != b'\\').count()
}

fn plain_len_long(bytes: &[u8]) -> usize {
    let upto = memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len());
    let plain = &bytes[..upto];
    // Written without a branch so that it is compiled to vector instructions; hits are faults.
    if plain.iter().fold(false, |hit, &byte| hit | (byte < 0x20)) {
        return plain.iter().take_while(|&&byte| byte >= 0x20).count();
    }
    upto
}

/// The offset behind the escape whose backslash is at `at`.
fn escape_end(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    match bytes.get(at + 1) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(at + 2),
        Some(b'u') => {
            let digits = bytes[at + 2..].iter().take(4).take_while(|byte| byte.is_ascii_hexdigit()).count();
            let end = at + 2 + digits;
            match digits {
                4 => Ok(end),
                _ if end == bytes.len() => Err(error(end, JsonErrorKind::UnexpectedEnd)),
                _ => Err(error(end, JsonErrorKind::BadEscape)),
            }
        }
        Some(_) => Err(error(at, JsonErrorKind::BadEscape)),
        None => Err(error(bytes.len(), JsonErrorKind::UnexpectedEnd)),
    }
}

/// The offset behind the number that begins at `at`.
#[inline]
fn number_end(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    // Indexes and token ids: up to seven digits and nothing else.
    if let Some(eight) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let others = non_digits(u64::from_le_bytes(*eight));
        let end = at + index_of(others);
        if end > at && others != 0 && bytes[at] != b'0' && !matches!(bytes[end], b'.' | b'e' | b'E') {
            return Ok(end);
        }
    }
    any_number_end(bytes, at)
}

/// Any number (RFC 8259 §6).
fn any_number_end(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    let start = at + usize::from(bytes.get(at) == Some(&b'-'));
    let mut at = digits_end(bytes, start)?;
    if bytes[start] == b'0' && at - start > 1 {
        return Err(error(start + 1, JsonErrorKind::BadNumber));
    }
    if bytes.get(at) == Some(&b'.') {
        at = digits_end(bytes, at + 1)?;
    }
    if let Some(b'e' | b'E') = bytes.get(at) {
        let signed = matches!(bytes.get(at + 1), Some(b'+' | b'-'));
        at = digits_end(bytes, at + 1 + usize::from(signed))?;
    }
    Ok(at)
}

/// The offset behind one or more digits.
#[inline]
fn digits_end(bytes: &[u8], start: usize) -> Result<usize, JsonError> {
    let mut at = start;
    while let Some(eight) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let others = non_digits(u64::from_le_bytes(*eight));
        if others != 0 {
            at += index_of(others);
            break;
        }
        at += 8;
    }
    while let Some(b'0'..=b'9') = bytes.get(at) {
        at += 1;
    }
    if at > start {
        return Ok(at);
    }
    let kind = if at < bytes.len() { JsonErrorKind::BadNumber } else { JsonErrorKind::UnexpectedEnd };
    Err(error(at, kind))
}

/// The offset behind `true`, `false` or `null`, of which the first letter stands at `at`.
#[inline]
fn literal_end(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    let rest = &bytes[at..];
    if rest.starts_with(b"null") || rest.starts_with(b"true") {
        return Ok(at + 4);
    }
    if rest.starts_with(b"false") {
        return Ok(at + 5);
    }
    Err(literal_fault(bytes, at))
}

#[cold]
fn literal_fault(bytes: &[u8], at: usize) -> JsonError {
    let word: &[u8] = match bytes[at] {
        b't' => b"true",
        b'f' => b"false",
        _ => b"null",
    };
    let same = word.iter().zip(&bytes[at..]).take_while(|(a, b)| a == b).count();
    unexpected(bytes, at + same)
}

/// Walks the members of the object `bytes` begin with; returns the offset behind it.
fn skim_object<'a, F>(bytes: &'a [u8], mut on_member: F) -> Result<Option<usize>, JsonError>
where
    F: FnMut(&[u8], Value<'a>) -> ControlFlow<()>,
{
    let mut at = next_visible(bytes, 0);
    match bytes.get(at) {
        None => return Err(error(at, JsonErrorKind::UnexpectedEnd)),
        Some(b'{') => at = next_visible(bytes, at + 1),
        Some(_) => return Err(error(at, JsonErrorKind::NotAnObject)),
    }
    if bytes.get(at) == Some(&b'}') {
        return Ok(Some(at + 1));
    }
    loop {
        let (name, value_at) = skim_name(bytes, at)?;
        let value = skim_value(bytes, value_at)?;
        if on_member(&name, value).is_break() {
            return Ok(None);
        }
        at = next_visible(bytes, value.span().end);
        match bytes.get(at) {
            Some(b',') => at = next_visible(bytes, at + 1),
            Some(b'}') => return Ok(Some(at + 1)),
            Some(_) => return Err(error(at, JsonErrorKind::UnexpectedByte)),
            None => return Err(error(at, JsonErrorKind::UnexpectedEnd)),
        }
    }
}

/// Reads the name at `at` and its colon; returns the offset behind the colon.
fn skim_name(bytes: &[u8], at: usize) -> Result<(Cow<'_, [u8]>, usize), JsonError> {
    expect(bytes, at, b'"')?;
    let (name, end) = match plain_string_end(bytes, at + 1) {
        Ok(end) => (Cow::Borrowed(&bytes[at + 1..end - 1]), end),
        Err(ascii) => {
            let end = skim_long_string(bytes, ascii)?;
            let inside = &bytes[at + 1..end - 1];
            (unescape(inside).unwrap_or(Cow::Borrowed(inside)), end)
        }
    };
    let colon = next_visible(bytes, end);
    expect(bytes, colon, b':')?;
    Ok((name, colon + 1))
}

fn expect(bytes: &[u8], at: usize, wanted: u8) -> Result<(), JsonError> {
    match bytes.get(at) {
        Some(&byte) if byte == wanted => Ok(()),
        Some(_) => Err(error(at, JsonErrorKind::UnexpectedByte)),
        None => Err(error(at, JsonErrorKind::UnexpectedEnd)),
    }
}

/// Finds the end of the value that follows, white space allowed.
fn skim_value(bytes: &[u8], at: usize) -> Result<Value<'_>, JsonError> {
    let start = next_visible(bytes, at);
    let (end, kind) = match bytes.get(start) {
        None => return Err(error(start, JsonErrorKind::UnexpectedEnd)),
        Some(b'"') => (skim_string(bytes, start)?, Kind::String),
        Some(b'{') => (skim_nested(bytes, start)?, Kind::Object),
        Some(b'[') => (skim_nested(bytes, start)?, Kind::Array),
        Some(b't' | b'f') => (skim_word(bytes, start), Kind::Bool),
        Some(b'n') => (skim_word(bytes, start), Kind::Null),
        Some(b'-' | b'0'..=b'9' | b'N' | b'I') => (skim_word(bytes, start), Kind::Number),
        Some(_) => return Err(error(start, JsonErrorKind::UnexpectedByte)),
    };
    Ok(Value { raw: &bytes[start..end], start, kind })
}

/// The offset behind the string that begins at `at`.
#[inline]
fn skim_string(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    match plain_string_end(bytes, at + 1) {
        Ok(end) => Ok(end),
        Err(ascii) => skim_long_string(bytes, ascii),
    }
}

fn skim_long_string(bytes: &[u8], mut at: usize) -> Result<usize, JsonError> {
    while let Some(i) = bytes.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        if bytes[at + i] == b'"' {
            return Ok(at + i + 1);
        }
        at += i + 2;
    }
    Err(error(bytes.len(), JsonErrorKind::UnexpectedEnd))
}

fn skim_word(bytes: &[u8], at: usize) -> usize {
    let word = bytes[at..].iter().take_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte));
    at + word.count()
}

/// The offset behind the array or object that begins at `at`: brackets outside strings are counted.
fn skim_nested(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    let mut at = at;
    let mut depth = 0_usize;
    loop {
        at += dull_len(&bytes[at..]);
        match bytes.get(at) {
            Some(b'"') => at = skim_string(bytes, at)?,
            Some(b'{' | b'[') => {
                depth += 1;
                at += 1;
            }
            Some(_) => {
                depth -= 1;
                at += 1;
                if depth == 0 {
                    return Ok(at);
                }
            }
            None => return Err(error(at, JsonErrorKind::UnexpectedEnd)),
        }
    }
}

/// How many bytes pass before a quote or a bracket, outside strings: arrays of token ids are long.
fn dull_len(bytes: &[u8]) -> usize {
    let is_dull = |byte: &&u8| !matches!(**byte, b'"' | b'{' | b'[' | b'}' | b']');
    let mut at = 0;
    while let Some(eight) = bytes[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*eight);
        // `[`|0x20 is `{` and `]`|0x20 is `}`: two tests do for the four brackets.
        let folded = word | (ONES * 0x20);
        let stops = hits(folded, b'{') | hits(folded, b'}') | hits(word, b'"');
        if stops != 0 {
            return at + index_of(stops);
        }
        at += 8;
    }
    at + bytes[at..].iter().take_while(is_dull).count()
}

/// Where the next item of an array or object begins, `at` being behind its bracket or the last item.
fn next_item(bytes: &[u8], at: usize) -> Option<usize> {
    let mut at = next_visible(bytes, at);
    if bytes.get(at) == Some(&b',') {
        at = next_visible(bytes, at + 1);
    }
    match bytes.get(at) {
        None | Some(b']' | b'}') => None,
        Some(_) => Some(at),
    }
}

/// The bytes a string stands for; `None` for what has none (a lone surrogate) or is no escape.
pub(super) fn unescape(inside: &[u8]) -> Option<Cow<'_, [u8]>> {
    let Some(mut at) = memchr::memchr(b'\\', inside) else { return Some(Cow::Borrowed(inside)) };
    let mut text = Vec::with_capacity(inside.len());
    text.extend_from_slice(&inside[..at]);
    while at < inside.len() {
        // Here is a backslash.
        let plain = match inside.get(at + 1)? {
            b'n' => b'\n',
            b't' => b'\t',
            b'r' => b'\r',
            b'b' => 8,
            b'f' => 12,
            b'u' => {
                let (character, len) = unescape_unicode(&inside[at..])?;
                text.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                at += len;
                at += copy_plain(&inside[at..], &mut text);
                continue;
            }
            &same @ (b'"' | b'\\' | b'/') => same,
            _ => return None,
        };
        text.push(plain);
        at += 2;
        at += copy_plain(&inside[at..], &mut text);
    }
    Some(Cow::Owned(text))
}

fn copy_plain(rest: &[u8], text: &mut Vec<u8>) -> usize {
    let len = memchr::memchr(b'\\', rest).unwrap_or(rest.len());
    text.extend_from_slice(&rest[..len]);
    len
}

/// The character of `\uXXXX`, or of a pair of them (RFC 8259 §7), and the length of its escape.
fn unescape_unicode(escape: &[u8]) -> Option<(char, usize)> {
    let first = hex4(escape.get(2..6)?)?;
    if !(0xD800..0xE000).contains(&first) {
        return Some((char::from_u32(first)?, 6));
    }
    let low = escape.get(6..12).filter(|rest| rest.starts_with(b"\\u"))?;
    let second = hex4(&low[2..])?;
    if first >= 0xDC00 || !(0xDC00..0xE000).contains(&second) {
        return None;
    }
    Some((char::from_u32(0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00))?, 12))
}

fn hex4(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, &digit| Some(sum << 4 | char::from(digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value as Tree;

    /// In release above all: see `Reader::closes`.
    #[test]
    fn empty_containers_are_passed_whole() {
        let empty = std::hint::black_box(["{}", "[]", "{ }", "[ ]"]);
        for text in empty {
            let mut reader = Reader::new(text.as_bytes());
            let passed = match text.as_bytes()[0] {
                b'{' => reader.object(|reader, _| reader.pass()),
                _ => reader.array(Reader::pass),
            };
            assert_eq!(passed.map(|other| other.is_none()), Ok(true), "{text}");
            assert_eq!(reader.finish(), Ok(()), "{text}");
        }
    }

    fn kind_of(text: &[u8]) -> JsonErrorKind {
        validate(text).unwrap_err().kind
    }

    #[test]
    fn faults_are_named_and_placed() {
        use JsonErrorKind as K;
        for (text, offset, kind) in [
            (&b""[..], 0, K::UnexpectedEnd),
            (b"  ", 2, K::UnexpectedEnd),
            (b"{\"a\":", 5, K::UnexpectedEnd),
            (b"{\"a\"}", 4, K::UnexpectedByte),
            (b"{\"a\":1,}", 7, K::UnexpectedByte),
            (b"[1,]", 3, K::UnexpectedByte),
            (b"[1 2]", 3, K::UnexpectedByte),
            (b"[1}", 2, K::UnexpectedByte),
            (b"{a:1}", 1, K::UnexpectedByte),
            (b"NaN", 0, K::UnexpectedByte),
            (b"[1, Infinity]", 4, K::UnexpectedByte),
            (b"-Infinity", 1, K::BadNumber),
            (b"tru", 3, K::UnexpectedEnd),
            (b"trux", 3, K::UnexpectedByte),
            (b"falsx", 4, K::UnexpectedByte),
            (b"01", 1, K::BadNumber),
            (b"[01, 2345678]", 2, K::BadNumber),
            (b"[1.  , 2345678]", 3, K::BadNumber),
            (b"[1\xB5, 2345678]", 2, K::UnexpectedByte),
            (b"[12345678901e]", 13, K::BadNumber),
            (b"1.", 2, K::UnexpectedEnd),
            (b"1.x", 2, K::BadNumber),
            (b"1e+", 3, K::UnexpectedEnd),
            (b"+1", 0, K::UnexpectedByte),
            (b"\"a\nb\"", 2, K::ControlCharacter),
            (b"\"\\x\"", 1, K::BadEscape),
            (b"\"\\u12G4\"", 5, K::BadEscape),
            (b"\"\\u12", 5, K::UnexpectedEnd),
            (b"\"abc", 4, K::UnexpectedEnd),
            (b"\"\xFF\"", 1, K::BadUtf8),
            (b"{} {}", 3, K::TrailingBytes),
        ] {
            let name = String::from_utf8_lossy(text);
            assert_eq!(validate(text), Err(JsonError { offset, kind }), "{name}");
        }
    }

    #[test]
    fn depth_is_bounded_whichever_way_it_is_walked() {
        let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
        let depth_max = DEPTH_MAX as usize;
        assert_eq!(validate(&nested(depth_max)), Ok(()));
        assert_eq!(kind_of(&nested(depth_max + 1)), JsonErrorKind::TooDeep);
        assert_eq!(kind_of(&vec![b'['; 1 << 20]), JsonErrorKind::TooDeep);
        fn walk(reader: &mut Reader<'_>) -> Result<(), JsonError> {
            reader.array(walk).map(drop)
        }
        let text = nested(depth_max + 1);
        let mut reader = Reader::new(&text);
        assert_eq!(walk(&mut reader).unwrap_err().kind, JsonErrorKind::TooDeep);
        // What stands side by side is not nested.
        let many = |one: &str| format!("[[{}]]", vec![one; depth_max].join(","));
        fn each(reader: &mut Reader<'_>) -> Result<(), JsonError> {
            match reader.peek()? {
                Kind::Object => reader.object(|reader, _| each(reader)).map(drop),
                _ => reader.array(each).map(drop),
            }
        }
        for text in [many("[1]"), many(r#"{"a":1}"#)] {
            assert_eq!(each(&mut Reader::new(text.as_bytes())), Ok(()), "{text}");
        }
        // What is only skimmed has no depth.
        let body = [b"{\"a\":", &nested(1 << 20)[..], b"}"].concat();
        assert_eq!(scan_top_level(&body, |_, _| ControlFlow::Continue(())), Ok(()));
    }

    #[test]
    fn long_and_short_strings_are_searched_alike() {
        for len in 0..100 {
            for (stop, kind) in [("\"", None), ("\u{1}", Some(JsonErrorKind::ControlCharacter))] {
                for fill in ["x", "\u{e9}", "\u{7f}", "~"] {
                    let text = format!("\"{}{stop}", fill.repeat(len));
                    assert_eq!(validate(text.as_bytes()).err().map(|e| e.kind), kind, "{text:?}");
                }
                let text = format!("\"{}\\n{}{stop}", "x".repeat(len), "y".repeat(len));
                assert_eq!(validate(text.as_bytes()).err().map(|e| e.kind), kind, "{text:?}");
            }
        }
    }

    #[test]
    fn values_read_as_what_they_are() {
        let body = br#"{"s":"a\u00e9\ud83d\ude00\n\/","lone":"\ud800","half":"\ud83d\u0041","n":12,"nine":90,"neg":-1,"f":1.5e2,"b":true,"z":null,"o":{"k":[1, [2] ,{}]},"e":" ","w":[ ],"big":18446744073709551616}"#;
        let mut found = Vec::new();
        scan_top_level(body, |name, value| {
            assert_eq!(&body[value.span()], value.raw());
            found.push((String::from_utf8(name.to_vec()).unwrap(), value));
            ControlFlow::Continue(())
        })
        .unwrap();
        let get = |name: &str| found.iter().find(|(own, _)| own == name).unwrap().1;
        assert_eq!(get("s").as_str().unwrap(), "aé😀\n/");
        assert_eq!(get("lone").as_str(), None);
        assert_eq!((get("half").as_str(), get("n").as_str()), (None, None));
        assert_eq!((get("n").as_u64(), get("nine").as_u64()), (Some(12), Some(90)));
        assert_eq!(get("neg").as_u64(), None);
        assert_eq!(get("big").as_u64(), None);
        assert_eq!(get("f").as_f64(), Some(150.0));
        assert_eq!(get("b").as_bool(), Some(true));
        assert!(
            get("z").is_null()
                && !get("n").is_null()
                && get("z").is_blank()
                && get("w").is_blank()
                && !get("e").is_blank()
        );
        let list = get("o").get("k").unwrap();
        assert_eq!(&body[list.span()], list.raw());
        let kinds: Vec<_> = list.elements().map(|element| element.kind()).collect();
        assert_eq!(kinds, [Kind::Number, Kind::Array, Kind::Object]);
        assert_eq!(list.elements().nth(1).map(|element| &body[element.span()]), Some(&b"[2]"[..]));
        assert_eq!(get("n").members().count() + get("n").elements().count(), 0);
    }

    #[test]
    fn a_scan_that_is_not_stopped_looks_behind_the_object() {
        let go_on = |text: &[u8]| scan_top_level(text, |_, _| ControlFlow::Continue(()));
        assert_eq!(go_on(b"{\"a\":1} \n"), Ok(()));
        assert_eq!(go_on(b"{\"a\":1} x"), Err(JsonError { offset: 8, kind: JsonErrorKind::TrailingBytes }));
    }

    #[test]
    fn a_scan_stops_when_told_and_reports_names_twice() {
        let mut names = Vec::new();
        let result = scan_top_level(br#"{"a":1,"\u0061":2,"b":oops"#, |name, value| {
            names.push((name.to_vec(), value.as_u64()));
            if names.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(result, Ok(()));
        assert_eq!(names, [(b"a".to_vec(), Some(1)), (b"a".to_vec(), Some(2))]);
    }

    #[test]
    fn requests_may_hold_what_engines_take_beyond_json() {
        let mut kinds = Vec::new();
        let body = br#"{"temperature": NaN, "x":-Infinity ,"y":[NaN]}"#;
        scan_top_level(body, |_, value| {
            kinds.push(value.kind());
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(kinds, [Kind::Number, Kind::Number, Kind::Array]);
        assert!(validate(body).is_err());
    }

    #[test]
    fn an_object_ends_where_it_ends_whatever_follows() {
        let go_on = |_: &[u8], _: Value<'_>| ControlFlow::Continue(());
        assert_eq!(scan_object_prefix(b"{\"a\":[1]}\0\xff", go_on), Ok(Some(9)));
        assert_eq!(scan_object_prefix(b" {}", go_on), Ok(Some(3)));
        assert_eq!(scan_object_prefix(b"{\"a\":1}", |_, _| ControlFlow::Break(())), Ok(None));
    }

    #[test]
    fn arrays_side_by_side_are_no_deeper_than_one() {
        let many = format!("[{}[1]]", "[1],".repeat(1000));
        let mut reader = Reader::new(many.as_bytes());
        let mut inner = 0;
        let walked = reader.array(|reader| {
            inner += 1;
            reader.array(|reader| reader.value().map(drop)).map(drop)
        });
        assert_eq!((walked, inner, reader.finish()), (Ok(None), 1001, Ok(())));
    }

    #[test]
    fn faults_are_told_with_their_place() {
        assert_eq!(validate(b"[1,").unwrap_err().to_string(), "the JSON text ends too early, at byte 3");
        assert_eq!(validate(b"[01]").unwrap_err().to_string(), "invalid JSON number, at byte 2");
    }

    #[test]
    fn control_characters_are_written_as_escapes() {
        let mut out = Vec::new();
        write_string(&mut out, "\0\u{1f}\u{7f}\u{80}\"\\\n\r\t/");
        let written = "\"\\u0000\\u001f\\u007f\u{80}\\\"\\\\\\n\\r\\t/\"";
        assert_eq!(String::from_utf8(out).unwrap(), written);
    }

    #[test]
    fn every_escape_is_read_as_what_it_stands_for() {
        let text = br#""a\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00z""#;
        let value = Reader::new(text).value().unwrap();
        assert_eq!(value.as_str().unwrap(), "a\"\\/\u{8}\u{c}\n\r\t\u{e9}\u{1f600}z");
    }

    #[test]
    fn what_is_only_skimmed_has_names_and_colons_nevertheless() {
        for (text, kind) in [
            ("{\"a\" 1}", JsonErrorKind::UnexpectedByte),
            ("{\"a\";1}", JsonErrorKind::UnexpectedByte),
            ("{a:1}", JsonErrorKind::UnexpectedByte),
            ("{\"a\"", JsonErrorKind::UnexpectedEnd),
            ("{\"a\":1,", JsonErrorKind::UnexpectedEnd),
        ] {
            let scanned = scan_top_level(text.as_bytes(), |_, _| ControlFlow::Continue(()));
            assert_eq!(scanned.unwrap_err().kind, kind, "{text}");
        }
    }

    #[test]
    fn a_splice_touches_nothing_else() {
        let body = Bytes::from_static(br#"{ "model" : "old", "x":1}"#);
        let mut span = 0..0;
        scan_top_level(&body, |name, value| {
            if name == b"model" {
                span = value.span();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        let mut name = Vec::new();
        write_string(&mut name, "new \"one\"");
        let pieces = splice(&body, span, name.into());
        assert_eq!(pieces.concat(), br#"{ "model" : "new \"one\"", "x":1}"#);
        assert_eq!(pieces[0].as_ptr(), body.as_ptr());
    }

    /// Faults of `serde_json` that the grammar does not have.
    fn is_documented_difference(fault: &serde_json::Error) -> bool {
        let text = fault.to_string();
        ["number out of range", "lone leading surrogate", "unexpected end of hex escape", "recursion limit"]
            .iter()
            .any(|known| text.contains(known))
    }

    fn assert_like_serde(text: &[u8]) {
        let theirs = serde_json::from_slice::<Tree>(text);
        let name = String::from_utf8_lossy(text);
        match (validate(text), &theirs) {
            (Ok(()), Ok(tree)) => {
                assert_eq!(&tree_of(skim_value(text, 0).unwrap()), tree, "{name}");
                let mut walker = Reader::new(text);
                assert_eq!(&walk(&mut walker).unwrap(), tree, "{name}");
            }
            (Err(_), Err(_)) => {}
            (Ok(()), Err(fault)) => assert!(is_documented_difference(fault), "{name}: {fault}"),
            (Err(fault), Ok(_)) => panic!("{name}: {fault}"),
        }
    }

    /// By spans.
    fn tree_of(value: Value<'_>) -> Tree {
        match value.kind() {
            Kind::Object => {
                let member = |(name, value): (Cow<'_, [u8]>, _)| {
                    (String::from_utf8(name.to_vec()).unwrap(), tree_of(value))
                };
                Tree::Object(value.members().map(member).collect())
            }
            Kind::Array => Tree::Array(value.elements().map(tree_of).collect()),
            Kind::String => Tree::String(value.as_str().unwrap().into_owned()),
            Kind::Number => serde_json::from_slice(value.raw()).unwrap(),
            Kind::Bool => Tree::Bool(value.as_bool().unwrap()),
            Kind::Null => Tree::Null,
        }
    }

    /// By the validating walk.
    fn walk(reader: &mut Reader<'_>) -> Result<Tree, JsonError> {
        match reader.peek()? {
            Kind::Object => {
                let mut members = serde_json::Map::new();
                reader.object(|reader, name| {
                    members.insert(String::from_utf8(name.to_vec()).unwrap(), walk(reader)?);
                    Ok(())
                })?;
                Ok(Tree::Object(members))
            }
            Kind::Array => {
                let mut elements = Vec::new();
                reader.array(|reader| {
                    elements.push(walk(reader)?);
                    Ok(())
                })?;
                Ok(Tree::Array(elements))
            }
            _ => reader.value().map(tree_of),
        }
    }

    /// JSON with free white space and escapes, which `serde_json` would not write.
    fn json_text() -> impl Strategy<Value = String> {
        let space = || prop::sample::select(vec!["", "", "", " ", "\n", "\t \r"]);
        let string = || {
            let piece = prop_oneof![
                3 => "[a-z ]{0,12}",
                1 => "[^\"\\\\\\x00-\\x1F]{0,40}",
                1 => prop::sample::select(vec!["\\n", "\\\"", "\\\\", "\\/", "\\u0041", "\\ud83d\\ude00", "\\uD800"])
                    .prop_map(str::to_owned),
            ];
            prop::collection::vec(piece, 0..4).prop_map(|pieces| format!("\"{}\"", pieces.concat()))
        };
        let leaf = prop_oneof![
            string(),
            "-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,2})?",
            prop::sample::select(vec!["true", "false", "null"]).prop_map(str::to_owned),
        ];
        leaf.prop_recursive(5, 60, 6, move |inner| {
            let element = (space(), inner.clone(), space()).prop_map(|(a, b, c)| format!("{a}{b}{c}"));
            let member = (space(), string(), space(), element.clone())
                .prop_map(|(a, name, b, value)| format!("{a}{name}{b}:{value}"));
            prop_oneof![
                prop::collection::vec(element, 0..6).prop_map(|list| format!("[{}]", list.join(","))),
                prop::collection::vec(member, 0..6).prop_map(|list| format!("{{{}}}", list.join(","))),
                space().prop_map(|space| format!("[{space}]")),
                space().prop_map(|space| format!("{{{space}}}")),
            ]
        })
    }

    fn tokens() -> impl Strategy<Value = Vec<u8>> {
        let token = prop::sample::select(vec![
            "{", "}", "[", "]", ",", ":", "\"", "\"a\"", "\\", "\\u", "0", "1", "-", ".", "e", "+", "true",
            "null", "NaN", " ", "\n", "\u{e9}", "\u{1}",
        ]);
        let token = prop_oneof![
            8 => token.prop_map(|text| text.as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 1..3),
        ];
        prop::collection::vec(token, 0..14).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn valid_json_reads_like_serde(text in json_text()) {
            assert_like_serde(text.as_bytes());
        }

        #[test]
        fn arbitrary_tokens_are_judged_like_serde(text in tokens()) {
            assert_like_serde(&text);
        }

        #[test]
        fn damaged_json_is_judged_like_serde(
            text in json_text(),
            damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..4),
        ) {
            let mut text = text.into_bytes();
            for (place, byte, way) in damages {
                if text.is_empty() {
                    break;
                }
                let place = place.index(text.len());
                match way {
                    0 => text[place] = byte,
                    1 => text.truncate(place),
                    _ => text.insert(place, byte),
                }
            }
            assert_like_serde(&text);
        }

        #[test]
        fn a_scan_finds_what_a_walk_finds(text in json_text(), damage in any::<(prop::sample::Index, u8)>()) {
            let mut text = text.into_bytes();
            let mut scanned = Vec::new();
            let result = scan_top_level(&text, |name, value| {
                scanned.push((name.to_vec(), value.span(), value.kind()));
                ControlFlow::Continue(())
            });
            let mut walked = Vec::new();
            let mut reader = Reader::new(&text);
            let other = reader.object(|reader, name| {
                let value = reader.value()?;
                walked.push((name.to_vec(), value.span(), value.kind()));
                Ok(())
            });
            match other.unwrap() {
                Some(_) => prop_assert_eq!(result.unwrap_err().kind, JsonErrorKind::NotAnObject),
                None => prop_assert_eq!(result, Ok(())),
            }
            prop_assert_eq!(scanned, walked);
            // Damaged bodies: no panic, spans within the body.
            let place = damage.0.index(text.len());
            text[place] = damage.1;
            let len = text.len();
            let _ = scan_top_level(&text, |_, value| {
                assert!(value.span().end <= len);
                for (_, member) in value.members() {
                    assert!(member.span().end <= len);
                }
                let _ = (value.elements().count(), value.as_str(), value.as_u64(), value.as_f64());
                ControlFlow::Continue(())
            });
        }

        #[test]
        fn strings_are_written_as_serde_reads_them(text in any::<String>()) {
            let mut out = Vec::new();
            write_string(&mut out, &text);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }

    /// Prints what reading costs: `cargo test --release --lib cost_of -- --ignored --nocapture`.
    #[test]
    #[ignore = "prints timings, proves nothing"]
    #[allow(clippy::disallowed_methods, reason = "a stopwatch in a test")]
    fn cost_of_reading() {
        let chunk = br#"{"id":"chatcmpl-7c9f2c0e5c1f4d2fb0e5","object":"chat.completion.chunk","created":1763890000,"model":"meta-llama/Llama-3.1-8B-Instruct","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}"#.to_vec();
        let prompt = "The quick brown fox\\njumps over the lazy dog. ".repeat(25_000);
        let chat =
            format!(r#"{{"messages":[{{"role":"user","content":"{prompt}"}}],"model":"m"}}"#).into_bytes();
        let ids = format!(r#"{{"prompt":[{}],"model":"m"}}"#, vec!["128000"; 150_000].join(",")).into_bytes();
        for (name, text, rounds) in
            [("event", chunk, 200_000), ("chat 1 MB", chat, 50), ("ids 1 MB", ids, 50)]
        {
            for (how, validating) in [("validate", true), ("scan", false)] {
                let begin = std::time::Instant::now();
                for _ in 0..rounds {
                    let text = std::hint::black_box(&text[..]);
                    if validating {
                        validate(text).unwrap();
                    } else {
                        scan_top_level(text, |_, _| ControlFlow::Continue(())).unwrap();
                    }
                }
                let nanos = begin.elapsed().as_nanos() as f64 / f64::from(rounds);
                println!("{name:10} {how:9} {nanos:10.0} ns  {:6.3} ns/byte", nanos / text.len() as f64);
            }
        }
    }
}
