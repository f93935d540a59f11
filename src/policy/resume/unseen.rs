//! Ids that evergate asked for and the client did not: asking, and hiding them again.
//!
//! Invariant: what the client sees is, byte for byte, what the engine would have written unasked. vLLM writes its
//! members always, with `null` for no ids; SGLang leaves them out. Everything else of an event stays as it is.

use std::ops::Range;

use super::chunk::Chunk;
use super::continuation::Asked;
use super::edit::{Edits, member_behind_comma};
use super::{RequestIds, ResumeMode, ResumePolicy, Splice, exact};
use crate::policy::dialect::{Endpoint, Engine, Frame};
use crate::sse::{Event, write_event};

/// Bodies above this are not asked for ids: those of the prompt come back with the first event, at six times the
/// size of the text or so.
const ASKING_BODY_BYTES_MAX: usize = 128 << 10;
/// What the first event may measure with the ids of such a prompt.
pub const ASKED_EVENT_BYTES_MAX: usize = 4 << 20;
/// Larger events are read anew each time.
const FRAME_BYTES_MAX: usize = 2048;

/// How an engine writes that there are no ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    Null,
    LeftOut,
}

impl Absence {
    fn of(engine: Engine) -> Self {
        match engine {
            Engine::Sglang => Self::LeftOut,
            _ => Self::Null,
        }
    }

    /// What is replaced by nothing, or by `null`.
    fn edit(self, data: &[u8], name: &str, value: Range<usize>) -> (Range<usize>, &'static [u8]) {
        let member = match self {
            Self::Null => None,
            Self::LeftOut => member_behind_comma(data, name, value.clone()),
        };
        member.map_or((value, b"null"), |member| (member, b""))
    }
}

/// The body of a first leg that asks `engine` for ids. `None` where they are asked for already, where they could
/// not be used, or where the request is not to be touched.
pub fn ask_for_ids(
    endpoint: Endpoint,
    engine: Engine,
    body: &[u8],
    policy: &ResumePolicy,
) -> Option<Vec<u8>> {
    let wanted = policy.mode == ResumeMode::Best && policy.request_ids == RequestIds::Auto;
    if !wanted || body.len() > ASKING_BODY_BYTES_MAX || Splice::arm(endpoint, body, policy).is_err() {
        return None;
    }
    let asked = Asked::read(endpoint, body).ok()?;
    if asked.wants_ids() || exact::refuses(endpoint, engine, body, &asked).is_some() {
        return None;
    }
    let mut edits = Edits::default();
    asked.ask(&mut edits);
    Some(edits.apply(body))
}

impl Asked<'_> {
    /// Asks for ids.
    pub(super) fn ask(&self, edits: &mut Edits) {
        match self.return_token_ids {
            Some(wanted) => edits.replace(wanted.span(), *b"true"),
            None => edits.replace(self.inside..self.inside, *br#""return_token_ids":true,"#),
        }
    }
}

/// Hides the ids in the events of one engine.
#[derive(Debug)]
pub struct Unseen {
    absence: Absence,
    /// The last event with ids of tokens and no others.
    frame: Frame,
    /// From where its list is replaced, counted back from its first id; and with what.
    back: usize,
    with: &'static [u8],
}

impl Unseen {
    /// For the answers of this engine.
    pub fn of(engine: Engine) -> Self {
        Self { absence: Absence::of(engine), frame: Frame::default(), back: 0, with: b"" }
    }

    /// Appends `event` without its ids to `out`. False: it has none, and nothing was appended.
    pub fn hide(&mut self, event: &Event<'_>, out: &mut Vec<u8>) -> bool {
        let data = event.data;
        if let Some(ids) = self.frame.fit(data).and_then(|filled| filled.ids) {
            return self.write(event, &[(ids.start - self.back..ids.end + 1, self.with)], out);
        }
        if !event.has_data || data.trim_ascii() == b"[DONE]" {
            return false;
        }
        let Ok(chunk) = Chunk::read(data) else { return false };
        let lists = [("token_ids", chunk.ids), ("prompt_token_ids", chunk.prompt_ids)];
        let mut edits: smallvec::SmallVec<[_; 2]> = lists
            .into_iter()
            .filter_map(|(name, list)| Some(self.absence.edit(data, name, list?.span())))
            .collect();
        edits.sort_by_key(|(span, _)| span.start);
        if let ([said], [(span, with)], Some(ids)) = (&chunk.said[..], &edits[..], chunk.ids)
            && data.len() <= FRAME_BYTES_MAX
        {
            let (text, ids) = (said.value.span(), ids.span());
            (self.back, self.with) = (ids.start + 1 - span.start, with);
            self.frame.set(data, text.start + 1..text.end - 1, Some(ids.start + 1..ids.end - 1));
        }
        !edits.is_empty() && self.write(event, &edits, out)
    }

    fn write(&self, event: &Event<'_>, edits: &[(Range<usize>, &'static [u8])], out: &mut Vec<u8>) -> bool {
        let (data, raw) = (event.data, event.raw);
        let edited = |out: &mut Vec<u8>| {
            let mut at = 0;
            for (span, with) in edits {
                out.extend_from_slice(&data[at..span.start]);
                out.extend_from_slice(with);
                at = span.end;
            }
            out.extend_from_slice(&data[at..]);
        };
        // Where the data stands in the block; several lines of it were joined elsewhere.
        let start = (data.as_ptr() as usize).wrapping_sub(raw.as_ptr() as usize);
        match raw.get(start..start.saturating_add(data.len())).filter(|inside| *inside == data) {
            Some(_) => {
                out.extend_from_slice(&raw[..start]);
                edited(out);
                out.extend_from_slice(&raw[start + data.len()..]);
            }
            None => {
                let mut whole = Vec::with_capacity(data.len());
                edited(&mut whole);
                let name = event.name.and_then(|name| std::str::from_utf8(name).ok());
                write_event(out, name, &whole);
            }
        }
        true
    }
}

/// Hides a list in an event of a leg behind the first.
pub(super) fn hide(engine: Engine, data: &[u8], name: &str, list: Range<usize>, edits: &mut Edits) {
    let (span, with) = Absence::of(engine).edit(data, name, list);
    edits.replace(span, with);
}
