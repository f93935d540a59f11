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
    let mut reader = Reader::new(bytes)?;
    reader.skip()?;
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

/// A validating walk over one JSON text: the caller descends where it is interested and skips the rest,
/// and every byte is checked once either way.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: u32,
}

impl<'a> Reader<'a> {
    /// Starts in front of the value. An error when `bytes` are not UTF-8.
    pub fn new(bytes: &'a [u8]) -> Result<Self, JsonError> {
        match std::str::from_utf8(bytes) {
            Ok(_) => Ok(Self { bytes, at: 0, depth: 0 }),
            Err(fault) => Err(error(fault.valid_up_to(), JsonErrorKind::BadUtf8)),
        }
    }

    /// The kind of the value ahead, by its first byte.
    pub fn peek(&mut self) -> Result<Kind, JsonError> {
        self.at = next_visible(self.bytes, self.at);
        match self.bytes.get(self.at) {
            None => Err(self.fault(JsonErrorKind::UnexpectedEnd)),
            Some(b'{') => Ok(Kind::Object),
            Some(b'[') => Ok(Kind::Array),
            Some(b'"') => Ok(Kind::String),
            Some(b'-' | b'0'..=b'9') => Ok(Kind::Number),
            Some(b't' | b'f') => Ok(Kind::Bool),
            Some(b'n') => Ok(Kind::Null),
            Some(_) => Err(self.fault(JsonErrorKind::UnexpectedByte)),
        }
    }

    /// Reads the whole value ahead.
    pub fn skip(&mut self) -> Result<Value<'a>, JsonError> {
        let kind = self.peek()?;
        let start = self.at;
        match kind {
            Kind::String => self.string()?,
            Kind::Number => self.number()?,
            Kind::Bool | Kind::Null => self.literal()?,
            Kind::Array | Kind::Object => self.nested()?,
        }
        Ok(Value { raw: &self.bytes[start..self.at], start, kind })
    }

    /// Reads the object ahead. For each member `on_member` gets its unescaped name and must read exactly
    /// one value. A value that is no object is skipped, and returned.
    pub fn object<F>(&mut self, mut on_member: F) -> Result<Option<Value<'a>>, JsonError>
    where
        F: FnMut(&mut Self, &[u8]) -> Result<(), JsonError>,
    {
        if self.peek()? != Kind::Object {
            return self.skip().map(Some);
        }
        self.descend()?;
        if !self.closes(b'}') {
            loop {
                let name = self.name()?;
                on_member(self, &name)?;
                if self.separator(b'}')? {
                    break;
                }
            }
        }
        self.depth -= 1;
        Ok(None)
    }

    /// Reads the array ahead; for each element `on_element` must read exactly one value. A value that is
    /// no array is skipped, and returned.
    pub fn array<F>(&mut self, mut on_element: F) -> Result<Option<Value<'a>>, JsonError>
    where
        F: FnMut(&mut Self) -> Result<(), JsonError>,
    {
        if self.peek()? != Kind::Array {
            return self.skip().map(Some);
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
        if self.at == self.bytes.len() { Ok(()) } else { Err(self.fault(JsonErrorKind::TrailingBytes)) }
    }

    /// Where the walk stands.
    pub fn offset(&self) -> usize {
        self.at
    }

    fn fault(&self, kind: JsonErrorKind) -> JsonError {
        error(self.at, kind)
    }

    /// The byte here is wrong, or missing.
    fn unexpected(&self) -> JsonError {
        let end = self.at >= self.bytes.len();
        self.fault(if end { JsonErrorKind::UnexpectedEnd } else { JsonErrorKind::UnexpectedByte })
    }

    fn descend(&mut self) -> Result<(), JsonError> {
        if self.depth == DEPTH_MAX {
            return Err(self.fault(JsonErrorKind::TooDeep));
        }
        self.depth += 1;
        self.at += 1;
        Ok(())
    }

    /// Passes `close` if it is next.
    fn closes(&mut self, close: u8) -> bool {
        self.at = next_visible(self.bytes, self.at);
        let closes = self.bytes.get(self.at) == Some(&close);
        self.at += usize::from(closes);
        closes
    }

    /// Passes a comma (`false`) or `close` (`true`).
    fn separator(&mut self, close: u8) -> Result<bool, JsonError> {
        self.at = next_visible(self.bytes, self.at);
        match self.bytes.get(self.at) {
            Some(b',') => {
                self.at += 1;
                Ok(false)
            }
            Some(&byte) if byte == close => {
                self.at += 1;
                Ok(true)
            }
            _ => Err(self.unexpected()),
        }
    }

    /// Reads a member's name and the colon.
    fn name(&mut self) -> Result<Cow<'a, [u8]>, JsonError> {
        let (start, end) = self.name_span()?;
        // A lone surrogate has no bytes; such a name then simply matches nothing.
        Ok(unescape(&self.bytes[start..end]).unwrap_or(Cow::Borrowed(&self.bytes[start..end])))
    }

    fn name_span(&mut self) -> Result<(usize, usize), JsonError> {
        self.at = next_visible(self.bytes, self.at);
        if self.bytes.get(self.at) != Some(&b'"') {
            return Err(self.unexpected());
        }
        let start = self.at + 1;
        self.string()?;
        let end = self.at - 1;
        self.at = next_visible(self.bytes, self.at);
        if self.bytes.get(self.at) != Some(&b':') {
            return Err(self.unexpected());
        }
        self.at += 1;
        Ok((start, end))
    }

    /// Reads an array or object, without recursion: one bit a level says which of the two it is.
    fn nested(&mut self) -> Result<(), JsonError> {
        const { assert!(DEPTH_MAX <= u128::BITS) };
        let outside = self.depth;
        let mut objects = 0_u128;
        loop {
            // In front of a value.
            match self.peek()? {
                Kind::String => self.string()?,
                Kind::Number => self.number()?,
                Kind::Bool | Kind::Null => self.literal()?,
                Kind::Object => {
                    self.descend()?;
                    if self.closes(b'}') {
                        self.depth -= 1;
                    } else {
                        objects = objects << 1 | 1;
                        self.name_span()?;
                        continue;
                    }
                }
                Kind::Array => {
                    self.descend()?;
                    if self.closes(b']') {
                        self.depth -= 1;
                    } else {
                        objects <<= 1;
                        continue;
                    }
                }
            }
            // Behind a value.
            loop {
                if self.depth == outside {
                    return Ok(());
                }
                let in_object = objects & 1 == 1;
                if !self.separator(if in_object { b'}' } else { b']' })? {
                    if in_object {
                        self.name_span()?;
                    }
                    break;
                }
                objects >>= 1;
                self.depth -= 1;
            }
        }
    }

    /// Reads the string whose opening quote is here.
    fn string(&mut self) -> Result<(), JsonError> {
        self.at += 1;
        loop {
            self.at += plain_len(&self.bytes[self.at..]);
            match self.bytes.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.escape()?,
                Some(_) => return Err(self.fault(JsonErrorKind::ControlCharacter)),
                None => return Err(self.fault(JsonErrorKind::UnexpectedEnd)),
            }
        }
    }

    /// Reads the escape whose backslash is here.
    fn escape(&mut self) -> Result<(), JsonError> {
        match self.bytes.get(self.at + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 2;
                Ok(())
            }
            Some(b'u') => {
                let digits = self.bytes[self.at + 2..].iter().take(4).take_while(|b| b.is_ascii_hexdigit());
                let count = digits.count();
                if count < 4 {
                    self.at += 2 + count;
                    let end = self.at == self.bytes.len();
                    return Err(self.fault(if end {
                        JsonErrorKind::UnexpectedEnd
                    } else {
                        JsonErrorKind::BadEscape
                    }));
                }
                self.at += 6;
                Ok(())
            }
            Some(_) => Err(self.fault(JsonErrorKind::BadEscape)),
            None => Err(error(self.bytes.len(), JsonErrorKind::UnexpectedEnd)),
        }
    }

    /// Reads the number that begins here (RFC 8259 §6).
    fn number(&mut self) -> Result<(), JsonError> {
        if self.bytes[self.at] == b'-' {
            self.at += 1;
        }
        match self.bytes.get(self.at) {
            Some(b'0') => self.at += 1,
            Some(b'1'..=b'9') => self.digits()?,
            _ => return Err(self.bad_number()),
        }
        if self.bytes.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.bytes.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.bytes.get(self.at) {
                self.at += 1;
            }
            self.digits()?;
        }
        // `01`: a digit behind a whole number is the number's fault, not the next byte's.
        if self.bytes.get(self.at).is_some_and(u8::is_ascii_digit) {
            return Err(self.fault(JsonErrorKind::BadNumber));
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let count = self.bytes[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        if count == 0 {
            return Err(self.bad_number());
        }
        self.at += count;
        Ok(())
    }

    fn bad_number(&self) -> JsonError {
        let end = self.at >= self.bytes.len();
        self.fault(if end { JsonErrorKind::UnexpectedEnd } else { JsonErrorKind::BadNumber })
    }

    /// Reads `true`, `false` or `null`.
    fn literal(&mut self) -> Result<(), JsonError> {
        let word: &[u8] = match self.bytes[self.at] {
            b't' => b"true",
            b'f' => b"false",
            _ => b"null",
        };
        let rest = &self.bytes[self.at..];
        let same = word.iter().zip(rest).take_while(|(a, b)| a == b).count();
        self.at += same;
        if same == word.len() { Ok(()) } else { Err(self.unexpected()) }
    }
}

fn error(offset: usize, kind: JsonErrorKind) -> JsonError {
    JsonError { offset, kind }
}

/// The first byte from `at` on that is not white space (RFC 8259 §2), or the length.
fn next_visible(bytes: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\n' | b'\r' | b'\t') = bytes.get(at) {
        at += 1;
    }
    at
}

/// How many bytes at the beginning of `bytes` may stand in a string as they are: up to a quote, a
/// backslash, a control character or the end.
fn plain_len(bytes: &[u8]) -> usize {
    // Most strings of an event are short: eight bytes at a time beats calling a vector search.
    let mut at = 0;
    while let Some(eight) = bytes[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*eight);
        // The classic zero-byte test, exact for the lowest hit, which is the one asked for: bytes from
        // 0x80 on never hit, because `!word` clears their high bit.
        let quote = (word ^ (ONES * b'"' as u64)).wrapping_sub(ONES);
        let backslash = (word ^ (ONES * b'\\' as u64)).wrapping_sub(ONES);
        let control = word.wrapping_sub(ONES * 0x20);
        let hits = (quote | backslash | control) & !word & HIGH;
        if hits != 0 {
            return at + (hits.trailing_zeros() / 8) as usize;
        }
        at += 8;
        if at == LONG_STRING {
            at += plain_len_long(&bytes[at..]);
        }
    }
    at + bytes[at..].iter().take_while(|&&byte| byte >= 0x20 && byte != b'"' && byte != b'\\').count()
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

/// From here on a string is searched by vector instructions.
const LONG_STRING: usize = 32;

fn plain_len_long(bytes: &[u8]) -> usize {
    let upto = memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len());
    let plain = &bytes[..upto];
    // Written without a branch so that it is compiled to vector instructions; hits are faults.
    if plain.iter().fold(false, |hit, &byte| hit | (byte < 0x20)) {
        return plain.iter().take_while(|&&byte| byte >= 0x20).count();
    }
    upto
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
    let end = skim_string(bytes, at)?;
    let inside = &bytes[at + 1..end - 1];
    let colon = next_visible(bytes, end);
    expect(bytes, colon, b':')?;
    Ok((unescape(inside).unwrap_or(Cow::Borrowed(inside)), colon + 1))
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
fn skim_string(bytes: &[u8], at: usize) -> Result<usize, JsonError> {
    let mut at = at + 1;
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
        let open = (folded ^ (ONES * b'{' as u64)).wrapping_sub(ONES);
        let close = (folded ^ (ONES * b'}' as u64)).wrapping_sub(ONES);
        let quote = (word ^ (ONES * b'"' as u64)).wrapping_sub(ONES);
        let hits = (open | close | quote) & !word & HIGH;
        if hits != 0 {
            return at + (hits.trailing_zeros() / 8) as usize;
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
fn unescape(inside: &[u8]) -> Option<Cow<'_, [u8]>> {
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
