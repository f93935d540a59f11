//! OpenAI's chat completions, completions and responses, as spoken by vLLM, SGLang, llama.cpp, TGI,
//! TRT-LLM, LMDeploy and Ollama's compatible API.
//!
//! Deviations that are read here: a first chunk with only a role (vLLM) or with `content: null`
//! (llama.cpp); the finish in the last delta (vLLM) or in a chunk of its own (SGLang); errors as
//! `{"error":{…}}`, as `{"error":"…","error_type":"…"}` (TGI) or flat with `"object":"error"` (vLLM before
//! 2025); llama.cpp's own shape under `/completions`, which it serves there without `/v1`.

use super::error::classify_error_body;
use super::event::{EventFacts, Finish, TextKind, inside, read_members};
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
    reader.object(|reader, name| {
        match name {
            b"index" => index = reader.value()?.as_u64().unwrap_or(0),
            b"delta" | b"message" => read_delta(reader, facts)?,
            b"text" => facts.say(reader.value()?, TextKind::Content),
            b"finish_reason" => finish = Finish::of_value(reader.value()?),
            b"token_ids" => facts.ids = list(reader.value()?),
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    facts.choices.insert(index);
    if let Some(finish) = finish {
        facts.finish_choice(index, finish);
    }
    Ok(())
}

/// Between the brackets of a list.
fn list(value: Value<'_>) -> Option<(usize, usize)> {
    let span = value.span();
    (value.kind() == Kind::Array).then_some((span.start + 1, span.end - 1))
}

/// Reads a delta. Every member but the role says something, known or not: engines keep adding some
/// (`reasoning_content`, `audio`), and a token that goes unnoticed looks like a stall.
pub(super) fn read_delta(reader: &mut Reader<'_>, facts: &mut EventFacts) -> Result<(), JsonError> {
    reader.object(|reader, name| {
        let value = reader.value()?;
        match name {
            b"role" => {}
            b"content" => facts.say(value, TextKind::Content),
            b"reasoning" | b"reasoning_content" | b"thinking" => facts.say(value, TextKind::Reasoning),
            _ => facts.say(value, TextKind::Other),
        }
        Ok(())
    })?;
    Ok(())
}

/// An event of the Responses API; also a whole `response`.
pub(super) fn read_response_event(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut kind: &[u8] = b"";
    let mut object: &[u8] = b"";
    let mut delta = None;
    let mut response: Option<Value<'_>> = None;
    let mut status = None;
    let mut details = None;
    let mut is_error = false;
    read_members(json, |reader, name| {
        let value = reader.value()?;
        match name {
            b"type" => kind = inside(value),
            b"object" => object = inside(value),
            b"delta" | b"text" => delta = Some(value),
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
    if let Some(value) = delta.filter(|_| !is_error) {
        facts.say(value, text_kind(kind));
    }
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

/// Whose words the delta of an event type is.
fn text_kind(event: &[u8]) -> TextKind {
    if event.starts_with(b"response.output_text") {
        TextKind::Content
    } else if event.starts_with(b"response.reasoning") {
        TextKind::Reasoning
    } else {
        TextKind::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::dialect::ErrorClass;

    #[test]
    fn a_whole_response_and_its_last_event_say_how_it_ended() {
        let incomplete = r#""incomplete_details":{"reason":"content_filter"}"#;
        let failed = r#""error":{"code":"rate_limit_exceeded","message":"x"}"#;
        for (members, finish, error) in [
            (r#""status":"completed","error":null"#.to_owned(), Some(Finish::Stop), None),
            (format!(r#""status":"incomplete",{incomplete}"#), Some(Finish::ContentFilter), None),
            (r#""status":"incomplete""#.to_owned(), Some(Finish::Length), None),
            (r#""status":"cancelled""#.to_owned(), Some(Finish::Abort), None),
            (format!(r#""status":"failed",{failed}"#), None, Some(ErrorClass::Overloaded)),
            (r#""status":"failed","error":null"#.to_owned(), None, Some(ErrorClass::ServerFault)),
        ] {
            let status = members[10..].split('"').next().unwrap();
            let whole = format!(r#"{{"object":"response",{members}}}"#);
            let last =
                format!(r#"{{"type":"response.{status}","sequence_number":9,"response":{{{members}}}}}"#);
            for json in [&whole, &last] {
                let facts = read_response_event(json.as_bytes()).unwrap();
                assert_eq!((facts.finish, facts.error), (finish, error), "{json}");
                assert_eq!(facts.done, finish.is_some(), "{json}");
            }
            assert_eq!(read_response_event(last.as_bytes()).unwrap().sequence, Some(9));
        }
        // An error beside what looks whole, and an object of another kind.
        let facts = read_response_event(
            format!(r#"{{"object":"response","status":"completed",{failed}}}"#).as_bytes(),
        );
        assert_eq!(facts.unwrap().error, Some(ErrorClass::Overloaded));
        let facts =
            read_response_event(br#"{"object":"response.input_tokens","status":"completed"}"#).unwrap();
        assert_eq!((facts.finish, facts.done), (None, false));
    }
}
