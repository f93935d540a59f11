//! One event of Anthropic's messages, as far as a splice must understand it.
//!
//! ```text
//! message_start, { content_block_start, content_block_delta…, content_block_stop }…, message_delta, message_stop
//! ```
//!
//! What opens and closes a block is a mark, with all that must be the same of it: place, type, the name of a tool. Its
//! id, like that of the message, is random: the client keeps the first. So is the signature of a thought, which engines
//! make up; it may come in one piece only, because the halves of two make none.
//!
//! Not understood, and so not resumed: blocks that the service fills itself (searches, redacted thoughts), citations.

use super::chunk::{Channel, Chunk};
use crate::policy::dialect::Finish;
use crate::policy::json::{JsonError, JsonErrorKind, Kind, Reader, Value};

/// Reads and validates one event's data.
pub(super) fn read(data: &[u8]) -> Result<Chunk<'_>, JsonError> {
    let mut chunk = Chunk { choices: Some(1), ..Chunk::default() };
    let [mut index, mut delta, mut block, mut message] = [None; 4];
    let mut reader = Reader::new(data);
    let other = reader.object(|reader, name| {
        let value = reader.value()?;
        match name {
            b"type" => chunk.kind = inside(value),
            b"index" => index = Some(value),
            b"delta" => delta = Some(value),
            b"content_block" => block = Some(value),
            b"message" => message = Some(value),
            b"error" => chunk.error |= !value.is_blank(),
            _ => {}
        }
        Ok(())
    })?;
    if let Some(other) = other {
        return Err(JsonError { offset: other.span().start, kind: JsonErrorKind::NotAnObject });
    }
    reader.finish()?;
    let place =
        || index.and_then(|index: Value<'_>| index.as_u64()).and_then(|index| u32::try_from(index).ok());
    let understood = match chunk.kind {
        Some(b"message_start") => {
            chunk.mark = Some("\0message\0".to_owned());
            message.is_some_and(|message| message.get("content").is_none_or(|content| content.is_blank()))
        }
        Some(b"content_block_start") => {
            place().zip(block).and_then(|(place, block)| open(&mut chunk, place, block)).is_some()
        }
        Some(b"content_block_delta") => {
            place().zip(delta).and_then(|(place, delta)| more(&mut chunk, place, delta)).is_some()
        }
        Some(b"content_block_stop") => {
            chunk.mark = place().map(|place| format!("\0stop {place}\0"));
            chunk.mark.is_some()
        }
        Some(b"message_delta") => {
            chunk.finish = delta.and_then(|delta| delta.get("stop_reason")).and_then(Finish::of_value);
            true
        }
        Some(b"message_stop") => {
            chunk.done = true;
            true
        }
        Some(b"ping") => true,
        Some(b"error") => {
            chunk.error = true;
            true
        }
        _ => false,
    };
    chunk.unknown |= !understood;
    Ok(chunk)
}

/// The beginning of a block. `None`: it is not understood.
fn open<'a>(chunk: &mut Chunk<'a>, place: u32, block: Value<'a>) -> Option<()> {
    let kind = inside(block.get("type")?)?;
    let mut mark = format!("\0start {place} {}", str::from_utf8(kind).ok()?);
    for (name, value) in block.members() {
        match (kind, &*name) {
            (_, b"type") | (b"thinking", b"signature") if value.kind() == Kind::String => {}
            (b"text", b"text") => chunk.say(Channel::Block(place), value, 0),
            (b"thinking", b"thinking") => chunk.say(Channel::Thought(place), value, 0),
            (b"tool_use", b"id") => {}
            (b"tool_use", b"name") => {
                mark.push(' ');
                mark.push_str(&value.as_str()?);
            }
            // Whole here, where the engine does not stream it.
            (b"tool_use", b"input") if !value.is_blank() => {
                mark.push(' ');
                mark.push_str(str::from_utf8(value.raw()).ok()?);
            }
            _ if value.is_blank() => {}
            _ => return None,
        }
    }
    mark.push('\0');
    chunk.mark = Some(mark);
    matches!(kind, b"text" | b"thinking" | b"tool_use").then_some(())
}

/// More of a block. `None`: it is not understood.
fn more<'a>(chunk: &mut Chunk<'a>, place: u32, delta: Value<'a>) -> Option<()> {
    let (name, channel) = match inside(delta.get("type")?)? {
        b"text_delta" => ("text", Channel::Block(place)),
        b"thinking_delta" => ("thinking", Channel::Thought(place)),
        b"input_json_delta" => ("partial_json", Channel::ToolArguments(place)),
        b"signature_delta" => {
            chunk.mark = Some(format!("\0signature {place}\0"));
            chunk.once = true;
            return Some(());
        }
        _ => return None,
    };
    let value = delta.get(name)?;
    chunk.say(channel, value, 0);
    let others = delta.members().filter(|(other, _)| **other != *b"type" && **other != *name.as_bytes());
    others.into_iter().all(|(_, value)| value.is_blank()).then_some(())
}

/// The bytes between the quotes of a word.
fn inside(value: Value<'_>) -> Option<&[u8]> {
    let word = value.raw().strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    (!word.contains(&b'\\')).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(data: &str) -> Chunk<'_> {
        read(data.as_bytes()).unwrap()
    }

    fn block(block: &str) -> Option<String> {
        let data = format!(r#"{{"type":"content_block_start","index":2,"content_block":{block}}}"#);
        let chunk = chunk(&data);
        chunk.mark.filter(|_| !chunk.unknown)
    }

    #[test]
    fn what_must_be_the_same_of_a_block_is_in_its_mark() {
        let tool = |more: &str| block(&format!(r#"{{"type":"tool_use","id":"x","name":"get"{more}}}"#));
        let mark = tool("").unwrap();
        assert_eq!(mark, "\0start 2 tool_use get\0");
        // What says nothing, and an id, which is random.
        for same in [r#","input":{}"#, r#","input":null"#, r#","id":"y""#, r#","cache_control":null"#] {
            assert_eq!(tool(same).as_ref(), Some(&mark), "{same}");
        }
        assert_eq!(tool(r#","input":{"a":1}"#).unwrap(), "\0start 2 tool_use get {\"a\":1}\0");
        assert_eq!(tool(r#","from_the_future":1"#), None);
        assert_eq!(
            block(r#"{"type":"thinking","thinking":"","signature":""}"#).unwrap(),
            "\0start 2 thinking\0"
        );
        assert_eq!(block(r#"{"type":"thinking","thinking":"","signature":7}"#), None);
        let stop = chunk(r#"{"type":"content_block_stop","index":2}"#);
        assert_eq!((stop.mark.as_deref(), stop.unknown), (Some("\0stop 2\0"), false));
        assert!(chunk(r#"{"type":"content_block_stop"}"#).unknown);
    }

    #[test]
    fn an_error_is_one_by_its_type_or_by_its_member() {
        for (data, error) in [
            (r#"{"type":"error"}"#, true),
            (r#"{"type":"ping","error":{"type":"overloaded_error"}}"#, true),
            (r#"{"type":"ping","error":null}"#, false),
            (r#"{"error":{"type":"x"},"type":"error","error":null}"#, true),
        ] {
            assert_eq!(chunk(data).error, error, "{data}");
        }
    }

    #[test]
    fn a_block_may_begin_with_its_text() {
        for (kind, channel) in [("text", Channel::Block(2)), ("thinking", Channel::Thought(2))] {
            let data = format!(
                r#"{{"type":"content_block_start","index":2,"content_block":{{"type":"{kind}","{kind}":"hm"}}}}"#
            );
            let chunk = chunk(&data);
            assert_eq!((chunk.said[0].channel, chunk.unknown), (channel, false), "{kind}");
        }
    }

    #[test]
    fn arguments_are_texts_of_their_block() {
        let data = r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{"}}"#;
        let chunk = chunk(data);
        assert_eq!((chunk.said[0].channel, chunk.unknown), (Channel::ToolArguments(1), false));
    }
}
