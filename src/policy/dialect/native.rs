//! The engines' own generation APIs: llama.cpp `/completion` and `/infill`, TGI `/generate(_stream)`,
//! SGLang and LMDeploy `/generate`. Their members do not collide, so one reader serves all.
//!
//! - llama.cpp: `{"content":"…","stop":false}`, at last `"stop":true` with a `stop_type`; no `[DONE]`.
//! - TGI: `{"token":{"text":"…"},"generated_text":null}`, at last `generated_text` and `details`.
//! - SGLang, LMDeploy: `{"text":"…","meta_info":{"finish_reason":null}}`, at last an object
//!   `{"type":"stop"|"length"|"abort",…}`; then `[DONE]`. `text` is cumulative by default.

use super::error::classify_error_body;
use super::event::{EventFacts, Finish, TextKind, read_members};
use crate::policy::json::{JsonError, Kind, Reader, Value};

/// An event; also a whole answer that is an object.
pub(super) fn read(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut llama = NativeEnd::default();
    let mut is_error = false;
    let mut generated = false;
    let mut finish = None;
    read_members(json, |reader, name| {
        match name {
            b"token" => read_token(reader, &mut facts)?,
            b"text" => facts.say(reader.value()?, TextKind::Content),
            b"generated_text" => generated = !reader.value()?.is_null(),
            b"details" | b"meta_info" => finish = read_finish(reader)?.or(finish),
            b"error" => is_error |= !reader.value()?.is_blank(),
            b"content" | b"stop" | b"stop_type" | b"index" => {
                let value = reader.value()?;
                llama.member(name, value, &mut facts);
            }
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    llama.apply(&mut facts);
    if finish.is_none() && generated {
        finish = Some(Finish::Stop);
    }
    facts.meaningful |= generated;
    if let Some(finish) = finish {
        facts.choices.insert(llama.index);
        facts.finish_choice(llama.index, finish);
    }
    if is_error {
        facts.error = Some(classify_error_body(json));
    }
    Ok(facts)
}

/// Special tokens (`</s>`) are shown by their name and are no part of the answer.
fn read_token(reader: &mut Reader<'_>, facts: &mut EventFacts) -> Result<(), JsonError> {
    let mut text = None;
    let mut special = false;
    reader.object(|reader, name| {
        let value = reader.value()?;
        match name {
            b"text" => text = Some(value),
            b"special" => special = value.as_bool() == Some(true),
            _ => {}
        }
        Ok(())
    })?;
    if let Some(text) = text.filter(|_| !special) {
        facts.say(text, TextKind::Content);
    }
    Ok(())
}

fn read_finish(reader: &mut Reader<'_>) -> Result<Option<Finish>, JsonError> {
    let mut finish = None;
    reader.object(|reader, name| {
        let value = reader.value()?;
        if name == b"finish_reason" {
            finish = Finish::of_value(value);
        }
        Ok(())
    })?;
    Ok(finish)
}

/// What llama.cpp's own events say, member by member.
#[derive(Debug, Default)]
pub(super) struct NativeEnd {
    content: bool,
    stop: bool,
    reason: Option<Finish>,
    pub(super) index: u64,
}

impl NativeEnd {
    pub(super) fn member(&mut self, name: &[u8], value: Value<'_>, facts: &mut EventFacts) {
        match name {
            b"content" => {
                self.content = value.kind() == Kind::String;
                facts.say(value, TextKind::Content);
            }
            b"stop" => self.stop = value.as_bool() == Some(true),
            // "none" while it runs.
            b"stop_type" => {
                self.reason = Finish::of_value(value).filter(|&reason| reason != Finish::OtherGood);
            }
            _ => self.index = value.as_u64().unwrap_or(0),
        }
    }

    pub(super) fn apply(&self, facts: &mut EventFacts) {
        if self.content || self.stop {
            facts.choices.insert(self.index);
        }
        if self.stop {
            facts.finish_choice(self.index, self.reason.unwrap_or(Finish::Stop));
            facts.done = true;
        }
    }
}
