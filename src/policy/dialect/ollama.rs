//! Ollama's own API: one JSON object a line, `done: true` in the last. llama.cpp serves `/api/chat` in
//! OpenAI's shape, which is recognised by its `choices`.

use super::error::classify_error_body;
use super::event::{EventFacts, Finish, TextKind, read_members};
use super::openai;
use crate::policy::json::JsonError;

/// A line; also a whole answer.
pub(super) fn read(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut is_error = false;
    let mut is_openai = false;
    let mut ended = false;
    let mut reason = None;
    read_members(json, |reader, name| {
        match name {
            b"message" => openai::read_delta(reader, &mut facts)?,
            b"response" => facts.say(reader.value()?, TextKind::Content),
            b"thinking" => facts.say(reader.value()?, TextKind::Reasoning),
            b"done" => ended = reader.value()?.as_bool() == Some(true),
            b"done_reason" => reason = Finish::of_value(reader.value()?),
            b"error" => is_error |= !reader.value()?.is_blank(),
            b"choices" => {
                reader.value()?;
                is_openai = true;
            }
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    if is_openai {
        return openai::read_chunk(json);
    }
    if is_error {
        facts.error = Some(classify_error_body(json));
        return Ok(facts);
    }
    facts.choices.insert(0);
    if ended {
        facts.finish_choice(0, reason.unwrap_or(Finish::Stop));
        facts.done = true;
    }
    Ok(facts)
}
