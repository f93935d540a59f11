//! OpenAI's chat completions, completions and responses, as spoken by vLLM, SGLang, llama.cpp, TGI,
//! TRT-LLM, LMDeploy and Ollama's compatible API.
//!
//! Deviations that are read here: a first chunk with only a role (vLLM) or with `content: null`
//! (llama.cpp); the finish in the last delta (vLLM) or in a chunk of its own (SGLang); errors as
//! `{"error":{…}}`, as `{"error":"…","error_type":"…"}` (TGI) or flat with `"object":"error"` (vLLM before
//! 2025); llama.cpp's own shape under `/completions`, which it serves there without `/v1`.

use super::error::classify_error_body;
use super::event::{EventFacts, Finish, inside, read_members};
use super::native::NativeEnd;
use crate::policy::json::{JsonError, Kind, Reader, Value};

/// A chunk of a stream; also a whole `chat.completion` or `text_completion`, whose `message` is read like
/// a delta.
pub(super) fn read_chunk(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut is_error = false;
    let mut usage = false;
    let mut native = NativeEnd::default();
    read_members(json, |reader, name| {
        match name {
            b"choices" => {
                reader.array(|reader| read_choice(reader, &mut facts))?;
            }
            b"usage" => usage = !reader.value()?.is_blank(),
            b"error" => is_error |= !reader.value()?.is_blank(),
            b"object" => is_error |= inside(reader.value()?) == b"error",
            b"content" | b"stop" | b"stop_type" | b"index" => {
                let value = reader.value()?;
                native.member(name, value, &mut facts);
            }
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    native.apply(&mut facts);
    facts.usage_only = usage && facts.choices.is_empty();
    if is_error {
        facts.error = Some(classify_error_body(json));
    }
    Ok(facts)
}

fn read_choice(reader: &mut Reader<'_>, facts: &mut EventFacts) -> Result<(), JsonError> {
    let mut index = 0;
    let mut finish = None;
    let mut meaningful = false;
    reader.object(|reader, name| {
        match name {
            b"index" => index = reader.value()?.as_u64().unwrap_or(0),
            b"delta" | b"message" => meaningful |= read_delta(reader)?,
            b"text" => meaningful |= !reader.value()?.is_blank(),
            b"finish_reason" => finish = Finish::of_value(reader.value()?),
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    facts.choices.insert(index);
    facts.meaningful |= meaningful;
    if let Some(finish) = finish {
        facts.finish_choice(index, finish);
    }
    Ok(())
}

/// Whether a delta carries anything. Every member but the role counts, known or not: engines keep adding
/// some (`reasoning`, `reasoning_content`, `audio`), and a token that goes unnoticed looks like a stall.
fn read_delta(reader: &mut Reader<'_>) -> Result<bool, JsonError> {
    let mut meaningful = false;
    reader.object(|reader, name| {
        let value = reader.value()?;
        meaningful |= name != b"role" && !value.is_blank();
        Ok(())
    })?;
    Ok(meaningful)
}

/// An event of the Responses API; also a whole `response`.
pub(super) fn read_response_event(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut kind: &[u8] = b"";
    let mut object: &[u8] = b"";
    let mut delta = false;
    let mut response: Option<Value<'_>> = None;
    let mut status = None;
    let mut details = None;
    let mut is_error = false;
    read_members(json, |reader, name| {
        let value = reader.value()?;
        match name {
            b"type" => kind = inside(value),
            b"object" => object = inside(value),
            b"delta" | b"text" => delta |= !value.is_blank(),
            b"sequence_number" => facts.sequence = value.as_u64(),
            b"response" => response = Some(value),
            b"error" => is_error |= !value.is_blank(),
            b"status" => status = Some(value),
            b"incomplete_details" => details = Some(value),
            _ => {}
        }
        Ok(())
    })?;
    facts.choices.insert(0);
    let ended = match kind {
        b"response.completed" => Some(Finish::Stop),
        b"response.incomplete" => {
            Some(incomplete(response.and_then(|response| response.get("incomplete_details"))))
        }
        b"response.cancelled" => Some(Finish::Abort),
        b"response.failed" => {
            is_error = true;
            None
        }
        b"error" => {
            is_error = true;
            None
        }
        // A whole response.
        _ if object == b"response" => match status.map(inside) {
            Some(b"incomplete") => Some(incomplete(details)),
            Some(b"cancelled") => Some(Finish::Abort),
            Some(b"failed") => {
                is_error = true;
                None
            }
            _ => Some(Finish::Stop),
        },
        _ => None,
    };
    facts.meaningful = delta && !is_error;
    if let Some(finish) = ended {
        facts.finish_choice(0, finish);
        facts.done = true;
    }
    if is_error {
        let at_fault = response.filter(|response| response.kind() == Kind::Object);
        facts.error = Some(classify_error_body(at_fault.map_or(json, |response| response.raw())));
    }
    Ok(facts)
}

/// The end of an incomplete response: a limit or a filter, which are ends like others.
fn incomplete(details: Option<Value<'_>>) -> Finish {
    let reason = details.and_then(|details| details.get("reason"));
    reason.and_then(Finish::of_value).unwrap_or(Finish::Length)
}
