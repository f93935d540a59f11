//! Writing server-sent events, for the few that evergate makes itself (terminal errors, translated
//! continuations). Whatever text goes in, one event comes out: line ends inside the data become
//! further `data:` lines (WHATWG HTML §9.2.5), and a name cannot smuggle in a field.

use bytes::BufMut;
use memchr::memchr2;

/// Appends one event. Line ends in `data` (LF, CR or CRLF) all arrive as LF at the client; anything
/// after a line end in `name` is dropped.
pub fn write_event(out: &mut impl BufMut, name: Option<&str>, data: &[u8]) {
    if let Some(name) = name {
        out.put_slice(b"event: ");
        out.put_slice(first_line(name.as_bytes()));
        out.put_u8(b'\n');
    }
    let mut rest = data;
    loop {
        let line = first_line(rest);
        out.put_slice(b"data: ");
        out.put_slice(line);
        out.put_u8(b'\n');
        rest = match &rest[line.len()..] {
            [] => break,
            [b'\r', b'\n', after @ ..] | [_, after @ ..] => after,
        };
    }
    out.put_u8(b'\n');
}

/// Appends a comment block (a keep-alive); anything after a line end in `text` is dropped.
pub fn write_comment(out: &mut impl BufMut, text: &str) {
    out.put_slice(b": ");
    out.put_slice(first_line(text.as_bytes()));
    out.put_slice(b"\n\n");
}

fn first_line(text: &[u8]) -> &[u8] {
    &text[..memchr2(b'\n', b'\r', text).unwrap_or(text.len())]
}
