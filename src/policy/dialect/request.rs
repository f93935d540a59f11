//! What a request body says that matters to routing, replay and relay; nothing else is looked at.

use std::borrow::Cow;
use std::ops::{ControlFlow, Range};

use super::Endpoint;
use crate::policy::json::{self, JsonError, Kind, Value};

/// Facts of one request body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestFacts<'a> {
    /// The model asked for. `None`: not named in the body (see [`Endpoint::model_in_path`]).
    pub model: Option<Cow<'a, str>>,
    /// Where the model's name stands, quotes included, for [`json::splice`].
    pub model_span: Option<Range<usize>>,
    /// Whether the answer is to come token by token.
    pub stream: bool,
    /// The member because of which sending the request twice might be noticed: it reads or changes state
    /// on the replica. `None`: a pure function of the body.
    pub stateful: Option<&'static str>,
    /// How many choices must finish before a stream is whole: `n` × the prompts of a batch.
    pub choices: u32,
    /// `user`, for affinity.
    pub user: Option<Cow<'a, str>>,
}

/// Reads `body` once. An error means no JSON object, as far as was looked; inference endpoints will
/// refuse it, which is theirs to say.
///
/// For [`Endpoint::KserveInfer`] binary tensors may follow the object (its binary data extension). For
/// gRPC and unknown endpoints the body is not looked at.
pub fn request_facts(endpoint: Endpoint, body: &[u8]) -> Result<RequestFacts<'_>, JsonError> {
    let mut facts =
        RequestFacts { stream: streams_by_default(endpoint), choices: 1, ..RequestFacts::default() };
    if !endpoint.is_inference() || endpoint == Endpoint::GrpcInfer {
        return Ok(facts);
    }
    let mut n = 1;
    let mut prompts = 1;
    let on_member = |name: &[u8], value| {
        read_member(endpoint, name, value, &mut facts, &mut n, &mut prompts);
        ControlFlow::Continue(())
    };
    if endpoint == Endpoint::KserveInfer {
        json::scan_object_prefix(body, on_member)?;
    } else {
        json::scan_top_level(body, on_member)?;
    }
    facts.choices = n.saturating_mul(prompts);
    Ok(facts)
}

fn read_member<'a>(
    endpoint: Endpoint,
    name: &[u8],
    value: Value<'a>,
    facts: &mut RequestFacts<'a>,
    n: &mut u32,
    prompts: &mut u32,
) {
    match name {
        b"model" => {
            facts.model = value.as_str();
            facts.model_span = facts.model.is_some().then(|| value.span());
        }
        // An answer of these paths is a stream whatever the body says.
        b"stream" if matches!(endpoint, Endpoint::GenerateStream | Endpoint::KserveGenerateStream) => {}
        b"stream" => facts.stream = value.as_bool().unwrap_or_else(|| streams_by_default(endpoint)),
        b"n" if matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions) => {
            *n = value.as_u64().map_or(1, |n| u32::try_from(n).unwrap_or(u32::MAX)).max(1);
        }
        b"prompt" if endpoint == Endpoint::Completions => *prompts = batch_size(value),
        b"user" => facts.user = value.as_str(),
        _ => {
            if let Some(member) = stateful_member(endpoint, name, value) {
                facts.stateful = Some(member);
            }
        }
    }
}

/// Prompts in a completions request: strings and lists of ids may be batched, a list of numbers is one
/// prompt.
fn batch_size(prompt: Value<'_>) -> u32 {
    match prompt.elements().next().map(|first| first.kind()) {
        Some(Kind::String | Kind::Array) => u32::try_from(prompt.elements().count()).unwrap_or(u32::MAX),
        _ => 1,
    }
}

/// Members that tie a request to what a replica remembers, or make it remember. OpenAI's hosted
/// Responses API stores by default; the engines behind evergate do not, so only an explicit wish counts.
fn stateful_member(endpoint: Endpoint, name: &[u8], value: Value<'_>) -> Option<&'static str> {
    let set = !value.is_null();
    match name {
        b"store" if value.as_bool() == Some(true) => Some("store"),
        b"background" if value.as_bool() == Some(true) => Some("background"),
        b"previous_response_id" if set => Some("previous_response_id"),
        b"conversation" if set => Some("conversation"),
        // Anthropic: a code execution container; servers that the replica itself calls.
        b"container" if set => Some("container"),
        b"mcp_servers" if !value.is_blank() => Some("mcp_servers"),
        // SGLang sessions.
        b"session_params" if !value.is_blank() => Some("session_params"),
        b"session_id" if set => Some("session_id"),
        // Prefill and decode apart: keys of a cache that is read once.
        b"kv_transfer_params" if !value.is_blank() => Some("kv_transfer_params"),
        b"bootstrap_room" if set => Some("bootstrap_room"),
        // Triton sequences; 0 and "" are "no sequence".
        b"sequence_id" if is_sequence(value) => Some("sequence_id"),
        b"parameters" if endpoint.dialect() == super::Dialect::Kserve => {
            value.get("sequence_id").filter(|&id| is_sequence(id)).map(|_| "sequence_id")
        }
        // Responses: tools other than the client's own are run by the replica, with effects.
        b"tools" if endpoint == Endpoint::Responses => {
            let is_own = |tool: Value<'_>| {
                let kind = tool.get("type").and_then(|kind| kind.as_str());
                matches!(kind.as_deref(), None | Some("function" | "custom"))
            };
            (!value.elements().all(is_own)).then_some("tools")
        }
        _ => None,
    }
}

fn is_sequence(id: Value<'_>) -> bool {
    !id.is_blank() && id.as_u64() != Some(0)
}

fn streams_by_default(endpoint: Endpoint) -> bool {
    matches!(
        endpoint,
        Endpoint::OllamaChat
            | Endpoint::OllamaGenerate
            | Endpoint::GenerateStream
            | Endpoint::KserveGenerateStream
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::json::JsonErrorKind;

    fn facts(endpoint: Endpoint, body: &str) -> RequestFacts<'_> {
        request_facts(endpoint, body.as_bytes()).unwrap()
    }

    #[test]
    fn model_stream_and_user_are_found_wherever_they_stand() {
        let body = r#"{"messages":[{"role":"user","content":"\"model\":\"no\" }]"}], "stream" : true,"user":"u\u0031","model":"a/b"}"#;
        let facts = facts(Endpoint::ChatCompletions, body);
        assert_eq!(facts.model.as_deref(), Some("a/b"));
        assert_eq!(&body[facts.model_span.unwrap()], r#""a/b""#);
        assert!(facts.stream);
        assert_eq!(facts.user.as_deref(), Some("u1"));
        assert_eq!(facts.stateful, None);
        assert_eq!(facts.choices, 1);
    }

    #[test]
    fn the_last_of_two_models_counts_and_escaped_names_are_seen() {
        let facts = facts(Endpoint::ChatCompletions, r#"{"model":"a","mod\u0065l":"b"}"#);
        assert_eq!(facts.model.as_deref(), Some("b"));
    }

    #[test]
    fn streaming_is_the_default_only_where_the_api_says_so() {
        assert!(!facts(Endpoint::ChatCompletions, "{}").stream);
        assert!(facts(Endpoint::OllamaChat, "{}").stream);
        assert!(!facts(Endpoint::OllamaChat, r#"{"stream":false}"#).stream);
        assert!(facts(Endpoint::GenerateStream, r#"{"stream":false}"#).stream);
        assert!(!facts(Endpoint::ChatCompletions, r#"{"stream":null}"#).stream);
    }

    #[test]
    fn choices_are_n_times_the_batch() {
        assert_eq!(facts(Endpoint::ChatCompletions, r#"{"n":3}"#).choices, 3);
        assert_eq!(facts(Endpoint::Completions, r#"{"prompt":["a","b"],"n":2}"#).choices, 4);
        assert_eq!(facts(Endpoint::Completions, r#"{"prompt":[[1,2],[3]]}"#).choices, 2);
        assert_eq!(facts(Endpoint::Completions, r#"{"prompt":[1,2,3]}"#).choices, 1);
        assert_eq!(facts(Endpoint::ChatCompletions, r#"{"n":null}"#).choices, 1);
        // Members of the same name elsewhere.
        assert_eq!(facts(Endpoint::OllamaChat, r#"{"n":3}"#).choices, 1);
        assert_eq!(facts(Endpoint::ChatCompletions, r#"{"prompt":["a","b"]}"#).choices, 1);
        // Bodies that are not looked at.
        assert_eq!(facts(Endpoint::Other, "").choices, 1);
    }

    #[test]
    fn state_on_the_replica_is_named() {
        for (endpoint, body, member) in [
            (Endpoint::Responses, r#"{"store":true}"#, Some("store")),
            (Endpoint::Responses, r#"{"store":false}"#, None),
            (Endpoint::Responses, r#"{"previous_response_id":"r"}"#, Some("previous_response_id")),
            (Endpoint::Responses, r#"{"previous_response_id":null}"#, None),
            (Endpoint::Responses, r#"{"background":true}"#, Some("background")),
            (Endpoint::Responses, r#"{"background":false}"#, None),
            (Endpoint::Responses, r#"{"conversation":{"id":"c"}}"#, Some("conversation")),
            (Endpoint::Responses, r#"{"conversation":null}"#, None),
            (Endpoint::AnthropicMessages, r#"{"container":"c"}"#, Some("container")),
            (Endpoint::AnthropicMessages, r#"{"container":null}"#, None),
            (Endpoint::Responses, r#"{"tools":[{"type":"function"}]}"#, None),
            (Endpoint::Responses, r#"{"tools":[{"type":"function"},{"type":"mcp"}]}"#, Some("tools")),
            (Endpoint::ChatCompletions, r#"{"tools":[{"type":"mcp"}]}"#, None),
            (Endpoint::AnthropicMessages, r#"{"mcp_servers":[ ]}"#, None),
            (Endpoint::AnthropicMessages, r#"{"mcp_servers":[{"url":"u"}]}"#, Some("mcp_servers")),
            (Endpoint::KserveInfer, r#"{"parameters":{"sequence_id":7}}"#, Some("sequence_id")),
            (Endpoint::KserveInfer, r#"{"parameters":{"sequence_id":0}}"#, None),
            (Endpoint::KserveInfer, r#"{"parameters":{"sequence_id":"s"}}"#, Some("sequence_id")),
            (Endpoint::Generate, r#"{"session_params":{"id":"s"}}"#, Some("session_params")),
            (Endpoint::Generate, r#"{"session_params":{}}"#, None),
            (Endpoint::Generate, r#"{"session_id":"s"}"#, Some("session_id")),
            (Endpoint::Generate, r#"{"session_id":null}"#, None),
            (Endpoint::Completions, r#"{"kv_transfer_params":{"a":1}}"#, Some("kv_transfer_params")),
            (Endpoint::Completions, r#"{"kv_transfer_params":{}}"#, None),
            (Endpoint::Generate, r#"{"bootstrap_room":5}"#, Some("bootstrap_room")),
            (Endpoint::Generate, r#"{"bootstrap_room":null}"#, None),
            (Endpoint::KserveGenerate, r#"{"sequence_id":7}"#, Some("sequence_id")),
            (Endpoint::KserveGenerate, r#"{"sequence_id":0}"#, None),
            (Endpoint::KserveGenerate, r#"{"sequence_id":""}"#, None),
            (Endpoint::Generate, r#"{"parameters":{"sequence_id":7}}"#, None),
        ] {
            assert_eq!(facts(endpoint, body).stateful, member, "{body}");
        }
    }

    #[test]
    fn tensors_may_follow_a_kserve_header() {
        let body = b"{\"inputs\":[]}\x00\x01\xFF";
        assert!(request_facts(Endpoint::KserveInfer, body).is_ok());
        assert!(request_facts(Endpoint::ChatCompletions, body).is_err());
    }

    #[test]
    fn a_body_that_is_no_object_is_an_error_and_uninteresting_ones_are_not_read() {
        let error = request_facts(Endpoint::ChatCompletions, b"[1]").unwrap_err();
        assert_eq!(error.kind, JsonErrorKind::NotAnObject);
        let error = request_facts(Endpoint::ChatCompletions, b"").unwrap_err();
        assert_eq!(error.kind, JsonErrorKind::UnexpectedEnd);
        assert!(request_facts(Endpoint::Other, b"\x00").is_ok());
        assert!(request_facts(Endpoint::GrpcInfer, b"\x00").is_ok());
    }
}
