//! An event of a stream as the mould of the next: equal to it but for one text and one list of token ids.
//!
//! The chunks of a stream differ in their token and in little else. One that fits the mould is valid JSON and says
//! the same with other words, which is seen at a tenth of the cost of reading it.
//!
//! Not here: what the text and the ids mean; chunks that differ in more.

use std::ops::Range;

use crate::policy::json::string_end;

/// An event with one or two holes. The first event remembered decides where they are.
#[derive(Clone, Debug, Default)]
pub(in crate::policy) struct Frame {
    data: Vec<u8>,
    /// Between the quotes.
    text: Range<usize>,
    /// Between the brackets; empty and at 0 where there is no list.
    ids: Range<usize>,
}

/// What fills the holes of an event that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::policy) struct Filled {
    /// Between the quotes: a valid string, not empty.
    pub(in crate::policy) text: Range<usize>,
    /// Between the brackets.
    pub(in crate::policy) ids: Option<Range<usize>>,
}

impl Frame {
    /// Takes `data` for the mould: `text` lies between the quotes of a string in it, `ids` between the brackets of
    /// a list elsewhere in it.
    pub(in crate::policy) fn set(&mut self, data: &[u8], text: Range<usize>, ids: Option<Range<usize>>) {
        self.data.clear();
        self.data.extend_from_slice(data);
        self.text = text;
        self.ids = ids.unwrap_or(0..0);
    }

    /// The holes of `data`, if it fits.
    #[inline]
    pub(in crate::policy) fn fit(&self, data: &[u8]) -> Option<Filled> {
        if self.data.is_empty() {
            return None;
        }
        let (text, ids) = (self.text.clone(), self.ids.clone());
        if ids.end == 0 {
            let (start, end) = self.text_at(data, 0, 0)?;
            return (data[end..] == self.data[text.end..]).then_some(Filled { text: start..end, ids: None });
        }
        if text.end <= ids.start {
            let (start, end) = self.text_at(data, 0, 0)?;
            let (ids_start, ids_end) = self.ids_at(data, text.end, end)?;
            return (data[ids_end..] == self.data[ids.end..])
                .then_some(Filled { text: start..end, ids: Some(ids_start..ids_end) });
        }
        let (ids_start, ids_end) = self.ids_at(data, 0, 0)?;
        let (start, end) = self.text_at(data, ids.end, ids_end)?;
        (data[end..] == self.data[text.end..])
            .then_some(Filled { text: start..end, ids: Some(ids_start..ids_end) })
    }

    /// Where the text of `data` begins and ends, whose bytes from `at` on are the mould's from `from` on.
    fn text_at(&self, data: &[u8], from: usize, at: usize) -> Option<(usize, usize)> {
        let before = &self.data[from..self.text.start];
        if !data.get(at..)?.starts_with(before) {
            return None;
        }
        let start = at + before.len();
        let end = string_end(data, start - 1).ok()? - 1;
        (end > start).then_some((start, end))
    }

    fn ids_at(&self, data: &[u8], from: usize, at: usize) -> Option<(usize, usize)> {
        let before = &self.data[from..self.ids.start];
        if !data.get(at..)?.starts_with(before) {
            return None;
        }
        let start = at + before.len();
        Some((start, start + ids_len(&data[start..])?))
    }
}

/// Length of the list of ids at the beginning of `bytes`, up to the bracket that closes it. `None`: not written
/// as engines write them, without white space.
fn ids_len(bytes: &[u8]) -> Option<usize> {
    if bytes.first() == Some(&b']') {
        return Some(0);
    }
    let mut digits = 0;
    let mut zero = false;
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            // JSON has no leading zeros.
            b'0'..=b'9' if !zero => {
                zero = digits == 0 && *byte == b'0';
                digits += 1;
            }
            b',' if digits > 0 => (digits, zero) = (0, false),
            b']' if digits > 0 => return Some(at),
            _ => return None,
        }
    }
    None
}

/// The ids of a list as [`ids_len`] takes it; `None` where one of them is none.
pub(in crate::policy) fn read_ids(inside: &[u8], out: &mut Vec<u32>) -> Option<usize> {
    let before = out.len();
    if inside.is_empty() {
        return Some(0);
    }
    for number in inside.split(|&byte| byte == b',') {
        let number = number.trim_ascii();
        let id = number.iter().try_fold(0_u32, |sum, &byte| {
            let digit = u32::from(byte.wrapping_sub(b'0'));
            if digit > 9 { None } else { sum.checked_mul(10)?.checked_add(digit) }
        });
        match id.filter(|_| !number.is_empty()) {
            Some(id) => out.push(id),
            None => {
                out.truncate(before);
                return None;
            }
        }
    }
    Some(out.len() - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(data: &str, text: &str, ids: Option<&str>) -> Frame {
        let place = |what: &str| {
            let at = data.find(what).unwrap();
            at + 1..at + what.len() - 1
        };
        let mut frame = Frame::default();
        frame.set(data.as_bytes(), place(text), ids.map(place));
        frame
    }

    fn filled<'d>(frame: &Frame, data: &'d str) -> Option<(&'d str, Option<&'d str>)> {
        let Filled { text, ids } = frame.fit(data.as_bytes())?;
        Some((&data[text], ids.map(|ids| &data[ids])))
    }

    #[test]
    fn an_event_that_differs_in_its_text_and_its_ids_fits() {
        let behind = frame(r#"{"text":"a","x":1,"ids":[1]}"#, "\"a\"", Some("[1]"));
        let ahead = frame(r#"{"ids":[1],"x":1,"text":"a"}"#, "\"a\"", Some("[1]"));
        let without = frame(r#"{"text":"a","x":1}"#, "\"a\"", None);
        for (frame, data, expected) in [
            (&behind, r#"{"text":"b\"c","x":1,"ids":[20,3]}"#, Some((r#"b\"c"#, Some("20,3")))),
            (&behind, r#"{"text":"b","x":1,"ids":[]}"#, Some(("b", Some("")))),
            (&behind, r#"{"text":"b","x":2,"ids":[2]}"#, None),
            (&behind, r#"{"text":"b","x":1,"ids":[02]}"#, None),
            (&behind, r#"{"text":"b","x":1,"ids":[2,]}"#, None),
            (&behind, r#"{"text":"b","x":1,"ids":[,2]}"#, None),
            (&behind, r#"{"text":"b","x":1,"ids":[1,,2]}"#, None),
            (&behind, r#"{"text":"b","x":1,"ids":[2] }"#, None),
            (&behind, r#"{"text":"b","x":1,"ids":[2"#, None),
            (&behind, r#"{"text":"","x":1,"ids":[2]}"#, None),
            (&ahead, r#"{"ids":[7,0],"x":1,"text":"é"}"#, Some(("é", Some("7,0")))),
            (&ahead, r#"{"ids":[-7],"x":1,"text":"b"}"#, None),
            (&without, r#"{"text":"b","x":1}"#, Some(("b", None))),
            (&without, r#"{"text":"b"#, None),
        ] {
            assert_eq!(filled(frame, data), expected, "{data}");
        }
        assert_eq!(Frame::default().fit(b""), None);
    }

    #[test]
    fn a_list_of_ids_is_read_or_it_is_not() {
        let mut ids = vec![9];
        assert_eq!(read_ids(b"1,20, 4294967295", &mut ids), Some(3));
        assert_eq!(ids, [9, 1, 20, u32::MAX]);
        for bad in ["4294967296", "1,,2", "-1", "1.5", "a", ","] {
            assert_eq!(read_ids(bad.as_bytes(), &mut ids), None, "{bad}");
            assert_eq!(ids.len(), 4);
        }
        assert_eq!(read_ids(b"", &mut ids), Some(0));
    }
}
