//! What one event of a stream says, as far as a splice must understand it: spans, and no copies. Here too the reader of
//! OpenAI's chunks; those of other APIs are beside it (`wire.rs`).
//!
//! The whole text is validated. What a delta says is put into the order in which it is meant (thinking,
//! answer, refusal, tool calls; the name of a tool before its arguments), because the members of an object
//! have none, and two engines that say the same in other chunks must be seen to say the same.
//!
//! A member of a delta that is not known here and says something is not guessed at: see [`Chunk::unknown`].

use smallvec::SmallVec;

use crate::policy::dialect::Finish;
use crate::policy::json::{JsonError, JsonErrorKind, Kind, Reader, Value};

/// Which of its ears the client hears a text with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    /// Under one or both of the names in use; see [`REASONING`].
    Reasoning(u8),
    /// `content`, or the `text` of a completion.
    Content,
    /// `refusal`.
    Refusal,
    /// The function's name in the tool call of this index.
    ToolName(u32),
    /// The arguments of the tool call of this index.
    ToolArguments(u32),
    /// Text of the block of this index, where answers are told in blocks.
    Block(u32),
    /// Thinking of the block of this index.
    Thought(u32),
    /// No text: what opens and closes something; see [`Chunk::mark`].
    Mark,
}

/// Names of the thinking, each a bit of [`Channel::Reasoning`]. vLLM has sent the same text under both.
const REASONING: [&[u8]; 2] = [b"reasoning_content", b"reasoning"];

/// A text that is not blank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said<'a> {
    pub(super) channel: Channel,
    pub(super) value: Value<'a>,
    /// The same text once more, under the other name.
    pub(super) mirror: Option<Value<'a>>,
    /// For the two channels of tools: which of [`Chunk::calls`] it belongs to.
    pub(super) call: usize,
}

/// One element of `tool_calls`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    pub(super) index: u32,
    /// A string that is not empty.
    pub(super) id: Option<Value<'a>>,
}

/// What a chunk says.
#[derive(Debug, Default)]
pub(super) struct Chunk<'a> {
    pub(super) id: Option<Value<'a>>,
    pub(super) created: Option<Value<'a>>,
    pub(super) model: Option<Value<'a>>,
    pub(super) fingerprint: Option<Value<'a>>,
    pub(super) usage: Option<Value<'a>>,
    /// It is an error and no chunk.
    pub(super) error: bool,
    /// Whether there is a list of choices at all, and how many are in it.
    pub(super) choices: Option<u32>,
    /// Highest index of a choice.
    pub(super) index: u64,
    pub(super) role: Option<Value<'a>>,
    pub(super) said: SmallVec<[Said<'a>; 2]>,
    pub(super) calls: SmallVec<[Call<'a>; 1]>,
    pub(super) finish: Option<Finish>,
    /// Tokens whose log probabilities it tells: what cannot be cut where the text is.
    pub(super) details: u64,
    /// The list of its tokens' ids; `null` is none.
    pub(super) ids: Option<Value<'a>>,
    /// Ids of the prompt, as one or two engines write them into a stream's first chunk.
    pub(super) prompt_ids: Option<Value<'a>>,
    /// It says something that is not understood here.
    pub(super) unknown: bool,
    /// It opens or closes something, before its texts: told once and whole, and the same of every leg if these words
    /// are. Each ends in a NUL.
    pub(super) mark: Option<String>,
    /// The mark may not be said twice in a row: what it marks is random, and cannot be put together from two legs.
    pub(super) once: bool,
    /// It is the end of the stream, behind or with its finish.
    pub(super) done: bool,
    /// The type of the event, where that is told.
    pub(super) kind: Option<&'a [u8]>,
}

impl<'a> Chunk<'a> {
    /// Reads and validates one event's data.
    pub(super) fn read(data: &'a [u8]) -> Result<Self, JsonError> {
        let mut chunk = Self::default();
        let mut reader = Reader::new(data);
        let other = reader.object(|reader, name| {
            match name {
                b"id" => chunk.id = Some(reader.value()?),
                b"created" => chunk.created = Some(reader.value()?),
                b"model" => chunk.model = Some(reader.value()?),
                b"system_fingerprint" => chunk.fingerprint = present(reader.value()?),
                b"usage" => chunk.usage = present(reader.value()?),
                b"prompt_token_ids" => chunk.prompt_ids = list(reader.value()?).or(chunk.prompt_ids),
                b"error" => chunk.error |= !reader.value()?.is_blank(),
                // vLLM before 2025.
                b"object" => chunk.error |= reader.value()?.raw() == b"\"error\"",
                b"choices" => {
                    chunk.choices = Some(0);
                    reader.array(|reader| chunk.read_choice(reader))?;
                }
                _ => reader.pass()?,
            }
            Ok(())
        })?;
        if let Some(other) = other {
            return Err(JsonError { offset: other.span().start, kind: JsonErrorKind::NotAnObject });
        }
        reader.finish()?;
        // Some leave the empty list out of the event with the usage.
        chunk.choices = chunk.choices.or(chunk.usage.map(|_| 0));
        chunk.said.sort_by_key(order);
        Ok(chunk)
    }

    fn read_choice(&mut self, reader: &mut Reader<'a>) -> Result<(), JsonError> {
        let other = reader.object(|reader, name| {
            match name {
                b"index" => self.index = self.index.max(reader.value()?.as_u64().unwrap_or(0)),
                b"delta" => self.read_delta(reader)?,
                b"text" => self.say(Channel::Content, reader.value()?, 0),
                b"finish_reason" => self.finish = Finish::of_value(reader.value()?),
                b"token_ids" => self.ids = list(reader.value()?).or(self.ids),
                b"prompt_token_ids" => self.prompt_ids = list(reader.value()?).or(self.prompt_ids),
                b"logprobs" => {
                    let value = reader.value()?;
                    let list = |name| value.get(name).map_or(0, len);
                    // Of chat; of completions.
                    self.details += list("content").max(list("tokens"));
                }
                _ => reader.pass()?,
            }
            Ok(())
        })?;
        self.unknown |= other.is_some();
        self.choices = self.choices.map(|count| count.saturating_add(1));
        Ok(())
    }

    fn read_delta(&mut self, reader: &mut Reader<'a>) -> Result<(), JsonError> {
        let mut reasoning = [None; REASONING.len()];
        reader.object(|reader, name| {
            if name == b"tool_calls" {
                reader.array(|reader| self.read_call(reader))?;
                return Ok(());
            }
            let value = reader.value()?;
            match name {
                b"role" => self.role = present(value),
                b"content" => self.say(Channel::Content, value, 0),
                b"refusal" => self.say(Channel::Refusal, value, 0),
                _ => match REASONING.iter().position(|known| *known == name) {
                    Some(which) => reasoning[which] = Some(value).filter(|value| !value.is_blank()),
                    None => self.unknown |= !value.is_blank(),
                },
            }
            Ok(())
        })?;
        match reasoning {
            [None, None] => {}
            [Some(value), None] => self.say(Channel::Reasoning(1), value, 0),
            [None, Some(value)] => self.say(Channel::Reasoning(2), value, 0),
            [Some(value), Some(mirror)] => {
                self.say(Channel::Reasoning(3), value, 0);
                self.unknown |= value.raw() != mirror.raw();
                if let Some(said) = self.said.last_mut() {
                    said.mirror = Some(mirror);
                }
            }
        }
        Ok(())
    }

    fn read_call(&mut self, reader: &mut Reader<'a>) -> Result<(), JsonError> {
        let mut call = Call { index: 0, id: None };
        let mut function: Option<Value<'a>> = None;
        let other = reader.object(|reader, name| {
            let value = reader.value()?;
            match name {
                b"index" => {
                    let index = value.as_u64().and_then(|index| u32::try_from(index).ok());
                    self.unknown |= index.is_none() && !value.is_null();
                    call.index = index.unwrap_or(0);
                }
                b"id" => call.id = Some(value).filter(|id| id.kind() == Kind::String && !id.is_blank()),
                b"function" => function = Some(value),
                b"type" => {}
                _ => self.unknown |= !value.is_blank(),
            }
            Ok(())
        })?;
        self.unknown |= other.is_some();
        let place = self.calls.len();
        self.calls.push(call);
        for (name, value) in function.iter().flat_map(|function| function.members()) {
            match &*name {
                b"name" => self.say(Channel::ToolName(call.index), value, place),
                b"arguments" => self.say(Channel::ToolArguments(call.index), value, place),
                _ => self.unknown |= !value.is_blank(),
            }
        }
        Ok(())
    }

    /// How many ids it has.
    pub(super) fn id_count(&self) -> u64 {
        self.ids.map_or(0, len)
    }

    pub(super) fn say(&mut self, channel: Channel, value: Value<'a>, call: usize) {
        if value.is_blank() {
            return;
        }
        self.unknown |= value.kind() != Kind::String;
        self.said.push(Said { channel, value, mirror: None, call });
    }
}

/// In which order the texts of one chunk are meant.
fn order(said: &Said<'_>) -> (usize, u8) {
    match said.channel {
        Channel::Reasoning(_) => (0, 0),
        Channel::Content | Channel::Block(_) | Channel::Thought(_) | Channel::Mark => (0, 1),
        Channel::Refusal => (0, 2),
        Channel::ToolName(_) => (said.call, 3),
        Channel::ToolArguments(_) => (said.call, 4),
    }
}

fn present(value: Value<'_>) -> Option<Value<'_>> {
    (!value.is_null()).then_some(value)
}

fn list(value: Value<'_>) -> Option<Value<'_>> {
    (value.kind() == Kind::Array).then_some(value)
}

fn len(value: Value<'_>) -> u64 {
    value.elements().count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(data: &str) -> Vec<(Channel, String)> {
        let chunk = Chunk::read(data.as_bytes()).unwrap();
        assert!(!chunk.unknown, "{data}");
        chunk.said.iter().map(|said| (said.channel, said.value.as_str().unwrap().into_owned())).collect()
    }

    #[test]
    fn texts_come_in_the_order_in_which_they_are_meant() {
        let data = r#"{"choices":[{"delta":{"tool_calls":[
            {"index":1,"function":{"arguments":"{","name":"f"}},{"index":2,"function":{"name":"g"}}],
            "content":"b","reasoning_content":"a"}}]}"#;
        let texts = [
            (Channel::Reasoning(1), "a"),
            (Channel::Content, "b"),
            (Channel::ToolName(1), "f"),
            (Channel::ToolArguments(1), "{"),
            (Channel::ToolName(2), "g"),
        ];
        assert_eq!(said(data), texts.map(|(channel, text)| (channel, text.to_owned())));
    }

    #[test]
    fn the_same_thinking_under_two_names_is_one_text() {
        let both = r#"{"choices":[{"delta":{"reasoning":"a","reasoning_content":"a"}}]}"#;
        assert_eq!(said(both), [(Channel::Reasoning(3), "a".to_owned())]);
        let differ = br#"{"choices":[{"delta":{"reasoning":"a","reasoning_content":"b"}}]}"#;
        assert!(Chunk::read(differ).unwrap().unknown);
    }

    #[test]
    fn what_is_not_understood_is_said_to_be() {
        for delta in [
            r#"{"audio":{"data":"x"}}"#,
            r#"{"content":[{"type":"text","text":"x"}]}"#,
            r#"{"function_call":{"name":"f"}}"#,
            r#"{"tool_calls":[{"index":0,"custom":{"input":"x"}}]}"#,
            r#"{"tool_calls":[{"index":"x","function":{"name":"f"}}]}"#,
            r#"{"tool_calls":[{"index":0,"function":{"name":"f","strict":true}}]}"#,
        ] {
            let data = format!(r#"{{"choices":[{{"delta":{delta}}}]}}"#);
            assert!(Chunk::read(data.as_bytes()).unwrap().unknown, "{delta}");
        }
        for delta in [
            r#"{"audio":null,"annotations":[]}"#,
            r#"{"tool_calls":[{"index":null,"function":{"name":"f","strict":null},"custom":null}]}"#,
        ] {
            let data = format!(r#"{{"choices":[{{"delta":{delta},"matched_stop":"x"}}]}}"#);
            assert!(!Chunk::read(data.as_bytes()).unwrap().unknown, "{delta}");
        }
    }

    #[test]
    fn the_id_of_a_call_is_a_word() {
        for (id, has) in [(r#""x""#, true), (r#""""#, false), ("null", false), ("5", false)] {
            let data = format!(r#"{{"choices":[{{"delta":{{"tool_calls":[{{"index":0,"id":{id}}}]}}}}]}}"#);
            assert_eq!(Chunk::read(data.as_bytes()).unwrap().calls[0].id.is_some(), has, "{id}");
        }
    }

    #[test]
    fn tokens_told_in_detail_are_counted() {
        for (choice, details, ids) in [
            (r#"{"text":"ab","logprobs":{"tokens":["a","b"]},"token_ids":[1,2]}"#, 2, 2),
            (r#"{"delta":{"content":"a"},"logprobs":{"content":[{"token":"a"}]},"token_ids":null}"#, 1, 0),
            (r#"{"delta":{"content":"a"},"logprobs":null}"#, 0, 0),
        ] {
            let data = format!(r#"{{"choices":[{choice}]}}"#);
            let chunk = Chunk::read(data.as_bytes()).unwrap();
            assert_eq!((chunk.details, chunk.id_count()), (details, ids), "{choice}");
        }
        for data in [
            r#"{"prompt_token_ids":[7],"choices":[]}"#,
            r#"{"choices":[{"text":"","prompt_token_ids":[7]}],"prompt_token_ids":null}"#,
        ] {
            let chunk = Chunk::read(data.as_bytes()).unwrap();
            assert_eq!(chunk.prompt_ids.unwrap().raw(), b"[7]");
        }
    }
}
