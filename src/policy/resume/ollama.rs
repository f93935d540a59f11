//! One line of Ollama's `/api/chat` and `/api/generate`, as far as a splice must understand it.
//!
//! Every line repeats model, time and role, and the last one says `done`: it is finish and end in one. A tool call is
//! whole in its line; its name and arguments must be the same, and its id, where there is one, is the first's. Times,
//! counts and the `context` of the last line are that leg's own, which said the whole answer.

use super::chunk::{Channel, Chunk};
use crate::policy::dialect::Finish;
use crate::policy::json::{JsonError, JsonErrorKind, Kind, Reader, Value};

/// Reads and validates one line.
pub(super) fn read(data: &[u8]) -> Result<Chunk<'_>, JsonError> {
    let mut chunk = Chunk { choices: Some(1), ..Chunk::default() };
    let [mut message, mut response, mut thinking, mut reason] = [None; 4];
    let mut reader = Reader::new(data);
    let other = reader.object(|reader, name| {
        let value = reader.value()?;
        match name {
            b"model" => chunk.model = Some(value),
            b"message" => message = Some(value),
            b"response" => response = Some(value),
            b"thinking" => thinking = Some(value),
            b"done" => chunk.done = value.as_bool() == Some(true),
            b"done_reason" => reason = Some(value),
            b"error" => chunk.error |= !value.is_blank(),
            b"logprobs" => chunk.details = value.elements().count() as u64,
            // llama.cpp serves OpenAI's shape under this path.
            b"choices" => chunk.unknown = true,
            _ => {}
        }
        Ok(())
    })?;
    if let Some(other) = other {
        return Err(JsonError { offset: other.span().start, kind: JsonErrorKind::NotAnObject });
    }
    reader.finish()?;
    let Some(message) = message else {
        // The order in which they are meant.
        thinking.into_iter().for_each(|value| chunk.say(Channel::Reasoning(1), value, 0));
        response.into_iter().for_each(|value| chunk.say(Channel::Content, value, 0));
        return Ok(end(chunk, reason));
    };
    let mut content = None;
    chunk.unknown |= message.kind() != Kind::Object;
    for (name, value) in message.members() {
        match &*name {
            b"role" => {}
            b"thinking" => chunk.say(Channel::Reasoning(1), value, 0),
            b"content" => content = Some(value),
            b"tool_calls" if !value.is_blank() => {
                let calls: Option<String> = value.elements().map(call).collect();
                chunk.unknown |= calls.is_none();
                chunk.mark = calls;
            }
            _ => chunk.unknown |= !value.is_blank(),
        }
    }
    content.into_iter().for_each(|value| chunk.say(Channel::Content, value, 0));
    Ok(end(chunk, reason))
}

fn end<'a>(mut chunk: Chunk<'a>, reason: Option<Value<'a>>) -> Chunk<'a> {
    if chunk.done {
        chunk.finish = Some(reason.and_then(Finish::of_value).unwrap_or(Finish::Stop));
    }
    chunk
}

/// What must be the same of a tool call. `None`: it is not understood.
fn call(call: Value<'_>) -> Option<String> {
    let mut mark = String::from("\0call");
    for (name, value) in call.members() {
        match &*name {
            b"id" | b"type" => {}
            b"function" => {
                for (name, value) in value.members() {
                    match &*name {
                        b"index" | b"name" | b"arguments" | b"description" => {
                            mark.push(' ');
                            mark.push_str(str::from_utf8(value.raw()).ok()?);
                        }
                        _ if value.is_blank() => {}
                        _ => return None,
                    }
                }
            }
            _ if value.is_blank() => {}
            _ => return None,
        }
    }
    mark.push('\0');
    Some(mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(data: &str) -> Chunk<'_> {
        read(data.as_bytes()).unwrap()
    }

    #[test]
    fn thinking_comes_before_the_answer_on_both_paths() {
        for data in [
            r#"{"model":"m","response":"so","thinking":"hm","done":false}"#,
            r#"{"model":"m","message":{"role":"assistant","content":"so","thinking":"hm"},"done":false}"#,
        ] {
            let chunk = chunk(data);
            let said: Vec<_> = chunk.said.iter().map(|said| (said.channel, said.value.raw())).collect();
            assert_eq!(
                said,
                [(Channel::Reasoning(1), &b"\"hm\""[..]), (Channel::Content, b"\"so\"")],
                "{data}"
            );
            assert!(!chunk.unknown && !chunk.done && chunk.finish.is_none());
            assert_eq!(chunk.model.map(|model| model.raw()), Some(&b"\"m\""[..]));
        }
    }

    #[test]
    fn the_last_line_says_why_it_is_the_last() {
        for (data, finish) in [
            (r#"{"response":"","done":true,"done_reason":"length"}"#, Some(Finish::Length)),
            (r#"{"response":"","done":true}"#, Some(Finish::Stop)),
            (r#"{"response":"","done":false,"done_reason":"length"}"#, None),
        ] {
            assert_eq!((chunk(data).finish, chunk(data).done), (finish, finish.is_some()), "{data}");
        }
    }

    #[test]
    fn what_is_not_understood_is_said_to_be() {
        for (data, unknown) in [
            (r#"{"message":"text"}"#, true),
            (r#"{"message":{"images":["x"]}}"#, true),
            (r#"{"message":{"images":[]}}"#, false),
            (r#"{"choices":[]}"#, true),
        ] {
            assert_eq!(chunk(data).unknown, unknown, "{data}");
        }
        let details = chunk(r#"{"response":"ab","logprobs":[{"token":"a"},{"token":"b"}]}"#).details;
        assert_eq!(details, 2);
    }

    #[test]
    fn a_tool_call_is_known_by_its_name_and_its_arguments() {
        let mark = |calls: &str| {
            let data = format!(r#"{{"message":{{"role":"assistant","content":"","tool_calls":[{calls}]}}}}"#);
            let chunk = chunk(&data);
            chunk.mark.filter(|_| !chunk.unknown)
        };
        let call = mark(r#"{"function":{"name":"f","arguments":{"a":1}}}"#);
        assert!(call.as_ref().is_some_and(|mark| mark.contains("\"f\"") && mark.contains("{\"a\":1}")));
        // An id is that of its leg.
        for same in [
            r#"{"id":"x","type":"function","function":{"name":"f","arguments":{"a":1}}}"#,
            r#"{"function":{"name":"f","arguments":{"a":1},"strict":null},"extra":null}"#,
        ] {
            assert_eq!(mark(same), call, "{same}");
        }
        assert_ne!(mark(r#"{"function":{"name":"g","arguments":{"a":1}}}"#), call);
        for unknown in
            [r#"{"function":{"name":"f","strict":true}}"#, r#"{"function":{"name":"f"},"extra":1}"#]
        {
            assert_eq!(mark(unknown), None, "{unknown}");
        }
        assert_eq!(mark(""), None, "none was called");
    }
}
