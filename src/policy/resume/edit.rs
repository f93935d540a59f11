//! Changing an event, or a request body, in a few places and nowhere else: every byte that is not meant
//! stays what its author wrote, unknown members included.

use std::ops::Range;

use smallvec::SmallVec;

/// Replacements in one JSON text, gathered in any order, none overlapping another.
#[derive(Debug, Default)]
pub(super) struct Edits {
    all: SmallVec<[(Range<usize>, Vec<u8>); 6]>,
}

impl Edits {
    /// Writes `with` in place of `span`; an empty span inserts.
    pub(super) fn replace(&mut self, span: Range<usize>, with: impl Into<Vec<u8>>) {
        self.all.push((span, with.into()));
    }

    /// Takes a member out of its object: the one called `name` (plainly written) whose value is at `value`.
    /// One that is not plainly written becomes `null`.
    pub(super) fn remove(&mut self, data: &[u8], name: &str, value: Range<usize>) {
        match member_span(data, name, value.clone()) {
            Some(span) => self.replace(span, []),
            None => self.replace(value, *b"null"),
        }
    }

    /// `data` with all replacements made.
    pub(super) fn apply(mut self, data: &[u8]) -> Vec<u8> {
        self.all.sort_by_key(|(span, _)| (span.start, span.end));
        let longer: usize = self.all.iter().map(|(_, with)| with.len()).sum();
        let mut out = Vec::with_capacity(data.len() + longer);
        let mut at = 0;
        for (span, with) in &self.all {
            debug_assert!(at <= span.start && span.end <= data.len(), "edits overlap");
            out.extend_from_slice(&data[at..span.start]);
            out.extend_from_slice(with);
            at = span.end;
        }
        out.extend_from_slice(&data[at..]);
        out
    }
}

/// Where a member stands with the comma before it, if there is one and it is plainly written.
pub(super) fn member_behind_comma(data: &[u8], name: &str, value: Range<usize>) -> Option<Range<usize>> {
    member_span(data, name, value).filter(|span| data[span.start] == b',')
}

/// The span of a member with one of its commas.
fn member_span(data: &[u8], name: &str, value: Range<usize>) -> Option<Range<usize>> {
    let before = data[..value.start].trim_ascii_end().strip_suffix(b":")?.trim_ascii_end();
    let before = before.strip_suffix(b"\"")?.strip_suffix(name.as_bytes())?.strip_suffix(b"\"")?;
    let front = before.trim_ascii_end();
    if let Some(rest) = front.strip_suffix(b",") {
        return Some(rest.len()..value.end);
    }
    let behind = data[value.end..].trim_ascii_start();
    let end = match behind.strip_prefix(b",") {
        Some(rest) => data.len() - rest.len(),
        None => value.end,
    };
    Some(front.len()..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::json::Reader;

    #[test]
    fn a_member_leaves_with_one_comma() {
        for (data, without) in [
            (r#"{"role":"a"}"#, "{}"),
            (r#"{"role":"a","x":1}"#, r#"{"x":1}"#),
            (r#"{"x":1 , "role" : "a" }"#, r#"{"x":1  }"#),
            (r#"{"x":1,"role":"a","y":2}"#, r#"{"x":1,"y":2}"#),
            (r#"{"r\u006fle":"a"}"#, r#"{"r\u006fle":null}"#),
        ] {
            let value = Reader::new(data.as_bytes()).value().unwrap().get("role").unwrap();
            let mut edits = Edits::default();
            edits.remove(data.as_bytes(), "role", value.span());
            assert_eq!(String::from_utf8(edits.apply(data.as_bytes())).unwrap(), without);
        }
    }
}
