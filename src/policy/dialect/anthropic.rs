//! Anthropic's messages: `message_start`, `content_block_start|delta|stop`, `message_delta` with the
//! `stop_reason`, `message_stop`; `ping` anywhere; `error` within a 200. The type stands both in the SSE
//! event name and in the data; the data is believed.

use super::error::classify_error_body;
use super::event::{EventFacts, Finish, TextKind, inside, read_members};
use crate::policy::json::{JsonError, Reader};

/// An event; also a whole `message`.
pub(super) fn read(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut kind: &[u8] = b"";
    let mut is_error = false;
    let mut delta = Block::default();
    let mut block = Block::default();
    let mut stop_reason = None;
    let mut content = false;
    read_members(json, |reader, name| {
        match name {
            b"type" => kind = inside(reader.value()?),
            b"delta" => delta = read_block(reader)?,
            b"content_block" => block = read_block(reader)?,
            b"error" => is_error |= !reader.value()?.is_blank(),
            b"stop_reason" => stop_reason = Finish::of_value(reader.value()?),
            b"content" => content = !reader.value()?.is_blank(),
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    match kind {
        b"content_block_delta" => (facts.meaningful, facts.text) = (delta.said.meaningful, delta.said.text),
        b"content_block_start" => facts.meaningful = block.begins_with_something,
        b"message_delta" => stop_reason = delta.stop_reason,
        b"message_stop" => facts.done = true,
        b"message" => facts.meaningful = content,
        b"error" => is_error = true,
        _ => stop_reason = None,
    }
    if kind.starts_with(b"message") || kind.starts_with(b"content_block") {
        facts.choices.insert(0);
    }
    if let Some(finish) = stop_reason {
        facts.finish_choice(0, finish);
    }
    if is_error {
        facts.error = Some(classify_error_body(json));
    }
    Ok(facts)
}

#[derive(Default)]
struct Block {
    /// What the members beside the type say.
    said: EventFacts,
    /// The name of a tool, or text that came with the start of its block.
    begins_with_something: bool,
    stop_reason: Option<Finish>,
}

fn read_block(reader: &mut Reader<'_>) -> Result<Block, JsonError> {
    let mut block = Block::default();
    reader.object(|reader, name| {
        let value = reader.value()?;
        match name {
            b"type" => {}
            b"stop_reason" => block.stop_reason = Finish::of_value(value),
            b"text" | b"thinking" | b"name" => {
                block.begins_with_something |= !value.is_blank();
                let kind = if name == b"text" { TextKind::Content } else { TextKind::Reasoning };
                block.said.say(value, kind);
            }
            _ => block.said.say(value, TextKind::Other),
        }
        Ok(())
    })?;
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::dialect::ErrorClass;

    fn facts(json: &str) -> EventFacts {
        read(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_whole_message_says_how_it_ended_and_whether_it_says_something() {
        let said = facts(
            r#"{"type":"message","content":[{"type":"text","text":"Hi"}],"stop_reason":"max_tokens","error":null}"#,
        );
        assert_eq!((said.finish, said.meaningful, said.error), (Some(Finish::Length), true, None));
        let empty = facts(r#"{"type":"message","content":[],"stop_reason":"end_turn"}"#);
        assert_eq!((empty.finish, empty.meaningful), (Some(Finish::Stop), false));
        // The same member of what is no message is no end.
        assert_eq!(facts(r#"{"type":"ping","stop_reason":"end_turn"}"#).finish, None);
    }

    #[test]
    fn an_error_is_one_by_its_type_or_by_its_member() {
        for json in [
            r#"{"error":{"type":"overloaded_error","message":"x"}}"#,
            r#"{"type":"message","error":{"type":"overloaded_error","message":"x"}}"#,
            r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#,
        ] {
            assert_eq!(facts(json).error, Some(ErrorClass::Overloaded), "{json}");
        }
        assert_eq!(facts(r#"{"type":"error"}"#).error, Some(ErrorClass::ServerFault));
    }

    #[test]
    fn all_of_a_message_is_one_choice() {
        for (json, choices) in [
            (r#"{"type":"message_start","message":{}}"#, 1),
            (r#"{"type":"content_block_delta","index":3,"delta":{"type":"text_delta","text":"x"}}"#, 1),
            (r#"{"type":"message_stop"}"#, 1),
            (r#"{"type":"ping"}"#, 0),
        ] {
            assert_eq!(facts(json).choices.count(), choices, "{json}");
        }
    }
}
