//! Asking an engine to go on from token ids: exact, for nothing is tokenized anew.
//!
//! A completion is continued at its own path, its prompt replaced by the ids of the prompt and of what was delivered.
//! A chat of vLLM takes no ids; it is continued as a completion, and the chunks of that are translated back. What a
//! chat's template and parsers did is in the ids; what they would yet do (tools) refuses it, and so does every member
//! of the request that is not known to mean the same in both.
//!
//! Not here: llama.cpp's own `/completion`, which leaves the ids of unfinished characters out of its events.

use std::ops::ControlFlow;

use super::Refused;
use super::chunk::{Channel, Chunk};
use super::continuation::{Asked, next_seed};
use super::edit::Edits;
use super::ids::SeamAt;
use super::journal::Journal;
use crate::policy::dialect::{Endpoint, Engine};
use crate::policy::json::{JsonError, Kind, Reader, Value, scan_top_level, write_string};

/// Text behind the last seam that may be said again and compared: a few chunks of several tokens.
const AGAIN_BYTES_MAX: usize = 512;
/// Where a chat is continued.
const COMPLETIONS: &str = "/v1/completions";
/// Harmony's `<|start|>`: its prompts begin so, and its chats stop at tokens that its completions do not stop at.
const HARMONY_START: u32 = 200_006;
/// A token is shorter than this; more text than that is the prompt, leaked (vllm#48853).
const TOKEN_BYTES_MAX: usize = 256;

/// A continuation by ids.
#[derive(Debug)]
pub(super) struct Exact {
    pub(super) path: Option<&'static str>,
    pub(super) body: Vec<u8>,
}

/// Whether an answer to this request can never be continued by ids.
pub(super) fn refuses(endpoint: Endpoint, engine: Engine, body: &[u8], asked: &Asked<'_>) -> Option<Refused> {
    if !asked.stops.is_empty() {
        return Some(Refused::Stop);
    }
    match (endpoint, engine) {
        (Endpoint::Completions, Engine::Vllm | Engine::Sglang) => {
            let prompt = asked.prompt.filter(|prompt| matches!(prompt.kind(), Kind::String | Kind::Array));
            prompt.is_none().then_some(Refused::Prompt)
        }
        (Endpoint::ChatCompletions, Engine::Vllm) => translated(body, asked).err(),
        _ => Some(Refused::Engine),
    }
}

/// The request that continues the answer. `context_max`: tokens that fit into the engine, prompt and answer.
pub(super) fn exact(
    endpoint: Endpoint,
    engine: Engine,
    body: &[u8],
    journal: &Journal,
    context_max: Option<u64>,
) -> Result<Exact, Refused> {
    let seam = journal.ids.seam().ok_or(Refused::Ids)?;
    let asked = Asked::read(endpoint, body)?;
    if let Some(refused) = refuses(endpoint, engine, body, &asked) {
        return Err(refused);
    }
    let text = may_go_on(journal, seam, asked.wants_ids())?;
    let (prompt, generated) = journal.ids.given();
    let (of_prompt, spent) = (prompt.len() as u64, generated.len() as u64);
    let left = asked.tokens_max(endpoint, engine)?.map(|limit| limit.saturating_sub(spent));
    if left == Some(0) {
        return Err(Refused::LimitReached);
    }
    let mut list = b"[".to_vec();
    for (place, id) in prompt.iter().chain(generated).enumerate() {
        if place > 0 {
            list.push(b',');
        }
        list.extend_from_slice(id.to_string().as_bytes());
    }
    list.push(b']');
    if endpoint == Endpoint::Completions {
        let mut edits = Edits::default();
        edits.replace(asked.prompt.ok_or(Refused::Prompt)?.span(), list);
        asked.reduce_limits(endpoint, engine, Some(spent), &mut edits)?;
        asked.change_seed(text, &mut edits);
        if !asked.wants_ids() {
            asked.ask(&mut edits);
        }
        return Ok(Exact { path: None, body: edits.apply(body) });
    }
    if prompt.first() == Some(&HARMONY_START) {
        return Err(Refused::Prompt);
    }
    let room = context_max.map(|max| max.saturating_sub(of_prompt + spent));
    // A completion that is given none stops after 16.
    let tokens_max = left.into_iter().chain(room).min().ok_or(Refused::TokensUnknown)?;
    let mut out = br#"{"return_token_ids":true,"add_special_tokens":false,"prompt":"#.to_vec();
    out.extend_from_slice(&list);
    let mut member = |name: &str, value: &[u8]| {
        out.push(b',');
        write_string(&mut out, name);
        out.push(b':');
        out.extend_from_slice(value);
    };
    member("max_tokens", tokens_max.to_string().as_bytes());
    if let Some(least) = asked.min_tokens.and_then(|least| least.as_u64()) {
        member("min_tokens", least.saturating_sub(spent).to_string().as_bytes());
    }
    if let Some(seed) = asked.seed.and_then(|seed| seed.as_u64()) {
        member("seed", next_seed(seed, text).to_string().as_bytes());
    }
    for (name, value) in translated(body, &asked)? {
        member(name, value.raw());
    }
    out.push(b'}');
    Ok(Exact { path: Some(COMPLETIONS), body: out })
}

/// Whether only the finish is missing: all tokens that the request allows were delivered.
pub(super) fn is_spent(endpoint: Endpoint, engine: Engine, body: &[u8], journal: &Journal) -> bool {
    let Some(seam) = journal.ids.seam() else { return false };
    let Ok(asked) = Asked::read(endpoint, body) else { return false };
    let limit = asked.tokens_max(endpoint, engine);
    asked.stops.is_empty()
        && journal.ids.all_told()
        && seam.text == journal.text().len()
        && may_go_on(journal, seam, false).is_ok()
        && limit.is_ok_and(|limit| limit == Some(seam.ids as u64))
}

/// The text that was delivered, if an answer that stands so can be continued from its seam.
fn may_go_on(journal: &Journal, seam: SeamAt, ids_are_seen: bool) -> Result<&str, Refused> {
    let mut last = None;
    for channel in journal.channels() {
        match channel {
            Channel::Content | Channel::Reasoning(_) => {}
            Channel::ToolName(_) | Channel::ToolArguments(_) => return Err(Refused::ToolsBegun),
            Channel::Refusal => return Err(Refused::Refusal),
            Channel::Block(_) | Channel::Thought(_) | Channel::Mark => return Err(Refused::Unreadable),
        }
        last = Some(channel);
    }
    match last {
        None => return Err(Refused::NothingDelivered),
        // Its end was delivered, and the parser at the other end is not needed any more.
        Some(Channel::Content) if seam.text > journal.last_run_start() => {}
        Some(_) => return Err(Refused::Reasoning),
    }
    let text = std::str::from_utf8(journal.text()).map_err(|_| Refused::Unreadable)?;
    let again = text.len() - seam.text;
    // Ids that the client has seen cannot be drawn again.
    if again > AGAIN_BYTES_MAX || (ids_are_seen && (again > 0 || !journal.ids.all_told())) {
        return Err(Refused::Ids);
    }
    Ok(text)
}

/// The members of a chat that mean the same in a completion; an error where one would be missed.
fn translated<'a>(body: &'a [u8], asked: &Asked<'a>) -> Result<Vec<(&'static str, Value<'a>)>, Refused> {
    let model = asked.model.and_then(|model| model.as_str()).unwrap_or_default();
    if model.contains("gpt-oss") || model.contains("gpt_oss") {
        return Err(Refused::Prompt);
    }
    let is_text =
        |part: Value<'_>| part.get("type").and_then(|kind| kind.as_str()).as_deref() == Some("text");
    let messages = asked.messages.ok_or(Refused::Body)?;
    if messages
        .elements()
        .any(|message| message.get("content").is_some_and(|parts| !parts.elements().all(is_text)))
    {
        return Err(Refused::Prompt);
    }
    let mut members: Vec<(&'static str, Value<'a>)> = Vec::new();
    let mut refused = None;
    scan_top_level(body, |name, value| {
        let copied = COPIED.iter().find(|copied| copied.as_bytes() == name);
        let left_out = LEFT_OUT.iter().any(|known| known.as_bytes() == name);
        // Of no effect where they say nothing.
        let says = !value.is_blank() && value.as_bool() != Some(false);
        match copied {
            Some(name) => members.push((name, value)),
            None if left_out || !says => {}
            None if name == b"tools" => refused = refused.or(Some(Refused::ToolsBegun)),
            None => refused = refused.or(Some(Refused::Member)),
        }
        ControlFlow::Continue(())
    })
    .map_err(|_| Refused::Body)?;
    refused.map_or(Ok(members), Err)
}

/// Members with one meaning (vLLM's protocol.py of both).
const COPIED: [&str; 25] = [
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "priority",
    "cache_salt",
    "user",
    "vllm_xargs",
    "repetition_detection",
    "stream_interval",
    "session_id",
];

/// Members whose work is done in the prompt's ids, or that are written anew, or checked before.
const LEFT_OUT: [&str; 25] = [
    "messages",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "seed",
    "return_token_ids",
    "request_id",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "include_reasoning",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "logprobs",
    "top_logprobs",
    "metadata",
    "service_tier",
    "include_stop_str_in_output",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "store",
];

/// A completion's chunk as vLLM would have written it in a chat.
pub(super) fn to_chat_chunk(data: &[u8]) -> Result<Vec<u8>, JsonError> {
    let mut head: Vec<(&'static str, Value<'_>)> = Vec::new();
    let mut tail: Vec<(&'static str, Value<'_>)> = Vec::new();
    let mut choices = Vec::new();
    let mut is_error = false;
    let mut reader = Reader::new(data);
    reader.object(|reader, name| {
        match name {
            b"choices" => {
                reader.array(|reader| {
                    let choice = reader.value()?;
                    choices.push(choice);
                    Ok(())
                })?;
            }
            b"id" => head.push(("id", reader.value()?)),
            b"created" => head.push(("created", reader.value()?)),
            b"model" => head.push(("model", reader.value()?)),
            b"usage" => tail.push(("usage", reader.value()?)),
            b"system_fingerprint" => tail.push(("system_fingerprint", reader.value()?)),
            b"object" => is_error |= reader.value()?.raw() == b"\"error\"",
            b"error" => is_error |= !reader.value()?.is_blank(),
            _ => reader.pass()?,
        }
        Ok(())
    })?;
    reader.finish()?;
    if is_error {
        return Ok(data.to_vec());
    }
    let mut out = b"{".to_vec();
    for (name, value) in &head {
        member(&mut out, name, value.raw());
        if *name == "id" {
            member(&mut out, "object", b"\"chat.completion.chunk\"");
        }
    }
    let mut list = b"[".to_vec();
    for choice in &choices {
        if list.len() > 1 {
            list.push(b',');
        }
        write_choice(&mut list, *choice);
    }
    list.push(b']');
    member(&mut out, "choices", &list);
    for (name, value) in &tail {
        member(&mut out, name, value.raw());
    }
    out.push(b'}');
    Ok(out)
}

fn write_choice(out: &mut Vec<u8>, choice: Value<'_>) {
    let raw = |name| choice.get(name).map_or(&b"null"[..], |value: Value<'_>| value.raw());
    let finish = raw("finish_reason");
    out.push(b'{');
    member(out, "index", choice.get("index").map_or(b"0", |index| index.raw()));
    let mut delta = b"{\"content\":".to_vec();
    delta.extend_from_slice(
        choice.get("text").filter(|text| !text.is_null()).map_or(b"\"\"", |text| text.raw()),
    );
    delta.push(b'}');
    member(out, "delta", &delta);
    member(out, "logprobs", b"null");
    member(out, "finish_reason", finish);
    if finish != b"null" {
        member(out, "stop_reason", raw("stop_reason"));
    }
    member(out, "token_ids", raw("token_ids"));
    // Of a leg behind the first: for the proof that it took the ids, and then taken out.
    if let Some(ids) = choice.get("prompt_token_ids").filter(|ids| !ids.is_null()) {
        member(out, "prompt_token_ids", ids.raw());
    }
    out.push(b'}');
}

fn member(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
    out.extend_from_slice(value);
}

/// Whether the first text of a leg holds what its engine was given: more than its tokens can, or all of the answer.
pub(super) fn leaks(chunk: &Chunk<'_>, text: &str, delivered: &[u8]) -> bool {
    let most = TOKEN_BYTES_MAX * usize::try_from(chunk.id_count().max(1)).unwrap_or(usize::MAX);
    let whole = delivered.len() >= 16 && memchr::memmem::find(text.as_bytes(), delivered).is_some();
    text.len() > most || whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completions_chunk_becomes_the_chats_with_nothing_lost() {
        for (chunk, chat) in [
            (
                r#"{"id":"c","object":"text_completion","created":7,"model":"m","choices":[{"index":0,"text":"Hi","logprobs":null,"finish_reason":null,"token_ids":[1]}]}"#,
                r#"{"id":"c","object":"chat.completion.chunk","created":7,"model":"m","choices":[{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null,"token_ids":[1]}]}"#,
            ),
            (
                r#"{"choices":[{"index":0,"text":null,"finish_reason":"stop","stop_reason":5,"prompt_token_ids":[7]},{"text":"b","prompt_token_ids":null}],"usage":{"a":1},"system_fingerprint":"f"}"#,
                r#"{"choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":5,"token_ids":null,"prompt_token_ids":[7]},{"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":null,"token_ids":null}],"usage":{"a":1},"system_fingerprint":"f"}"#,
            ),
        ] {
            assert_eq!(String::from_utf8(to_chat_chunk(chunk.as_bytes()).unwrap()).unwrap(), chat);
        }
        // Not a chunk: as it came.
        for error in [r#"{"object":"error","message":"x"}"#, r#"{"error":{"message":"x"},"choices":[]}"#] {
            assert_eq!(to_chat_chunk(error.as_bytes()).unwrap(), error.as_bytes());
        }
        assert_eq!(to_chat_chunk(br#"{"error":null,"choices":[]}"#).unwrap(), br#"{"choices":[]}"#);
        assert!(to_chat_chunk(br#"{"choices":[]} x"#).is_err());
    }

    #[test]
    fn text_that_no_token_can_be_is_the_prompt() {
        let leaks = |ids: &str, bytes: usize, delivered: &str| {
            let data = format!(r#"{{"choices":[{{"index":0,"text":"","token_ids":{ids}}}]}}"#);
            leaks(&Chunk::read(data.as_bytes()).unwrap(), &"x".repeat(bytes), delivered.as_bytes())
        };
        for (ids, most) in [("null", 256), ("[1]", 256), ("[1,2,3]", 768)] {
            assert!(!leaks(ids, most, "said"), "{ids}");
            assert!(leaks(ids, most + 1, "said"), "{ids}");
        }
        // All of the answer, where it is long enough not to be there by chance.
        assert!(leaks("[1]", 20, &"x".repeat(16)));
        assert!(!leaks("[1]", 20, &"x".repeat(15)));
    }

    #[test]
    fn why_a_chat_is_not_asked_for_ids_is_told() {
        let refused = |more: &str| {
            let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}]{more}}}"#);
            let asked = Asked::read(Endpoint::ChatCompletions, body.as_bytes()).unwrap();
            refuses(Endpoint::ChatCompletions, Engine::Vllm, body.as_bytes(), &asked)
        };
        assert_eq!(refused(""), None);
        assert_eq!(refused(r#","tools":[{"type":"function"}]"#), Some(Refused::ToolsBegun));
        assert_eq!(refused(r#","tools":[]"#), None);
        assert_eq!(refused(r#","from_the_future":1"#), Some(Refused::Member));
        assert_eq!(refused(r#","from_the_future":false"#), None);
    }
}
