//! What a request asks of a simulated replica: JSON in, a [`Job`] or a refusal out. Pure.
//!
//! The rendered prompt decides the answer (see `model`), so the engines' rules for a trailing
//! assistant message live here: who continues it, who answers it, who refuses it.

use serde_json::Value;

use super::model::{self, ASSISTANT_TURN, Model, TURN_END};
use super::skin::{Api, Finish, Skin};

/// What the model of every simulated replica can attend to.
pub(super) const CONTEXT_TOKENS: usize = 32_768;
/// Default length of a completion in vLLM and SGLang, as OpenAI set it once.
const COMPLETION_TOKENS: usize = 16;

/// A request for generated text.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) api: Api,
    pub(super) stream: bool,
    pub(super) usage: bool,
    pub(super) usage_in_each: bool,
    pub(super) model: String,
    pub(super) prompt_ids: Vec<u32>,
    pub(super) wants_ids: bool,
    text: String,
    seed: Option<i64>,
    tokens_max: Option<usize>,
    stops: Vec<String>,
    ignore_eos: bool,
}

/// An answer the client brought on itself: status, type, message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) u16, pub(super) &'static str, pub(super) String);

fn bad(message: impl Into<String>) -> Refusal {
    Refusal(400, "BadRequestError", message.into())
}

/// What is said, token by token, and why it ends.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) tokens: Vec<String>,
    pub(super) finish: Finish,
}

/// Understands the body of a text request. `served` is the model of this replica.
pub(super) fn job(api: Api, skin: Skin, served: &str, body: &Value) -> Result<Job, Refusal> {
    if !body.is_object() {
        return Err(bad("the body must be a JSON object"));
    }
    let model = model_asked(skin, served, body)?;
    if body["n"].as_u64().is_some_and(|n| n > 1) {
        return Err(bad("n > 1 is not simulated"));
    }
    let text = match api {
        Api::Chat | Api::Messages => rendered_chat(api, skin, body)?,
        Api::Completions | Api::Other => prompt(body)?,
    };
    let tokens_max = ["max_completion_tokens", "max_tokens"]
        .iter()
        .map(|key| &body[*key])
        .find(|value| !value.is_null())
        .map(|value| match value.as_u64() {
            Some(tokens @ 1..) => Ok(usize::try_from(tokens).unwrap_or(usize::MAX)),
            Some(0) | None => Err(bad(format!("max_tokens must be at least 1, got {value}"))),
        })
        .transpose()?;
    if api == Api::Messages && tokens_max.is_none() {
        return Err(bad("max_tokens: Field required"));
    }
    let tokens_max = match (api, skin) {
        (Api::Completions, Skin::Vllm | Skin::Sglang) => Some(tokens_max.unwrap_or(COMPLETION_TOKENS)),
        _ => tokens_max,
    };
    let prompt_ids = model::tokenize(&text);
    if prompt_ids.len() + tokens_max.unwrap_or(1) > CONTEXT_TOKENS {
        return Err(bad(format!(
            "This model's maximum context length is {CONTEXT_TOKENS} tokens. However, you requested {} tokens.",
            prompt_ids.len() + tokens_max.unwrap_or(1)
        )));
    }
    let stops = match (&body["stop"], &body["stop_sequences"]) {
        (Value::String(stop), _) => vec![stop.clone()],
        (Value::Array(stops), _) | (_, Value::Array(stops)) => {
            stops.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    };
    let options = &body["stream_options"];
    Ok(Job {
        api,
        stream: body["stream"].as_bool().unwrap_or(false),
        usage: options["include_usage"].as_bool().unwrap_or(false),
        usage_in_each: options["continuous_usage_stats"].as_bool().unwrap_or(false),
        model,
        prompt_ids,
        wants_ids: skin == Skin::Vllm && body["return_token_ids"].as_bool().unwrap_or(false),
        text,
        seed: body["seed"].as_i64(),
        tokens_max,
        stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
        ignore_eos: body["ignore_eos"].as_bool().unwrap_or(false),
    })
}

/// The model name a request may go by here: vLLM and the plain server know only their own.
pub(super) fn model_asked(skin: Skin, served: &str, body: &Value) -> Result<String, Refusal> {
    match (&body["model"], skin) {
        (Value::Null, _) => Ok(served.to_owned()),
        (Value::String(model), Skin::Vllm | Skin::Generic) if model != served => {
            Err(Refusal(404, "NotFoundError", format!("The model `{model}` does not exist.")))
        }
        (Value::String(model), _) => Ok(model.clone()),
        _ => Err(bad("model must be a string")),
    }
}

impl Job {
    /// The answer of `served` with these `weights`; `tokens` is its length where neither request nor chat end it.
    pub(super) fn answer(&self, served: &str, weights: u64, tokens: usize) -> Answer {
        let model = Model::new(served, weights, self.seed);
        let room = CONTEXT_TOKENS.saturating_sub(self.prompt_ids.len());
        let is_chat = self.text.contains(ASSISTANT_TURN);
        let tokens_max = match (self.tokens_max, is_chat && !self.ignore_eos) {
            (Some(asked), _) => asked.min(room),
            (None, true) => room,
            (None, false) => tokens.min(room),
        };
        let mut answer = if is_chat && !self.ignore_eos {
            model.answer(&self.text, tokens)
        } else {
            model.continuation(&self.text).take(tokens_max.saturating_add(1)).collect()
        };
        let finish = if answer.len() > tokens_max { Finish::Length } else { Finish::Stop };
        answer.truncate(tokens_max);
        self.stopped(Answer { tokens: answer, finish })
    }

    /// Cuts the answer before the first stop string in it.
    fn stopped(&self, mut answer: Answer) -> Answer {
        let text = answer.tokens.concat();
        let first = self.stops.iter().filter_map(|stop| text.find(stop).map(|at| (at, stop))).min();
        let Some((mut left, stop)) = first else { return answer };
        let mut kept = Vec::new();
        for token in answer.tokens {
            let take = token.len().min(left);
            left -= take;
            if take > 0 {
                kept.push(token[..take].to_owned());
            }
            if left == 0 {
                break;
            }
        }
        answer.tokens = kept;
        answer.finish = Finish::StopString(stop.clone());
        answer
    }
}

fn prompt(body: &Value) -> Result<String, Refusal> {
    match &body["prompt"] {
        Value::String(text) => Ok(text.clone()),
        Value::Array(items) => match items.as_slice() {
            [Value::String(text)] => Ok(text.clone()),
            [] | [Value::String(_), ..] => Err(bad("a batch of prompts is not simulated")),
            _ => token_ids(items).map(|ids| model::detokenize(&ids)),
        },
        _ => Err(bad("prompt: Field required")),
    }
}

/// A list of token ids.
pub(super) fn token_ids(items: &[Value]) -> Result<Vec<u32>, Refusal> {
    items
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect::<Option<Vec<u32>>>()
        .ok_or_else(|| bad("token ids must be whole numbers"))
}

/// The chat as text, up to and with what the assistant has already said of its answer.
pub(super) fn rendered_chat(api: Api, skin: Skin, body: &Value) -> Result<String, Refusal> {
    let Value::Array(messages) = &body["messages"] else { return Err(bad("messages: Field required")) };
    let Some(last) = messages.last() else { return Err(bad("messages must not be empty")) };
    let asks_to_continue = body["continue_final_message"].as_bool().unwrap_or(false);
    let trailing = last["role"] == "assistant";
    let continues = match (api, skin) {
        (Api::Messages, _) | (_, Skin::LlamaCpp) => trailing,
        (_, Skin::Vllm) if asks_to_continue && body["add_generation_prompt"].as_bool().unwrap_or(true) => {
            return Err(bad("Cannot set both `continue_final_message` and `add_generation_prompt` to True."));
        }
        (_, Skin::Vllm | Skin::Sglang) => trailing && asks_to_continue,
        (_, Skin::Generic) => false,
    };
    let mut text = String::new();
    if !body["system"].is_null() {
        text += &format!("<|system|>\n{}{TURN_END}", content(&body["system"]));
    }
    for (at, message) in messages.iter().enumerate() {
        let is_last = at + 1 == messages.len();
        let role = match message["role"].as_str() {
            Some("system" | "developer") => "system",
            // SGLang without the flag takes a trailing assistant message for the user's.
            Some("assistant") if is_last && skin == Skin::Sglang && !continues => "user",
            Some("assistant") => "assistant",
            Some("tool" | "function") => "tool",
            Some("user") => "user",
            _ => return Err(bad(format!("messages[{at}].role is not known"))),
        };
        text += &format!("<|{role}|>\n{}", content(&message["content"]));
        if !(is_last && continues) {
            text += TURN_END;
        }
    }
    if !continues {
        text += ASSISTANT_TURN;
    }
    Ok(text)
}

/// Text of a message: a string, or parts of which those that are no text count by their JSON.
fn content(content: &Value) -> String {
    match content {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .map(|part| part["text"].as_str().map_or_else(|| part.to_string(), str::to_owned))
            .collect(),
        other => other.to_string(),
    }
}

/// The texts of an embeddings request.
pub(super) fn inputs(body: &Value) -> Result<Vec<String>, Refusal> {
    match &body["input"] {
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(items) if items.is_empty() => Err(bad("input must not be empty")),
        Value::Array(items) if items.iter().all(Value::is_u64) => {
            Ok(vec![model::detokenize(&token_ids(items)?)])
        }
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(text.clone()),
                Value::Array(ids) => Ok(model::detokenize(&token_ids(ids)?)),
                _ => Err(bad("input must be text or token ids")),
            })
            .collect(),
        _ => Err(bad("input: Field required")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(skin: Skin, body: &Value) -> Answer {
        job(Api::Chat, skin, "m", body).unwrap().answer("m", 0, 40)
    }

    #[test]
    fn each_engine_has_its_own_rule_for_a_trailing_assistant_message() {
        let plain = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
        let whole = said(Skin::Vllm, &plain).tokens.concat();
        let (begun, rest) = whole.split_at(20);
        let mut cut = plain.clone();
        cut["messages"].as_array_mut().unwrap().push(json!({"role": "assistant", "content": begun}));
        let mut flagged = cut.clone();
        flagged["continue_final_message"] = json!(true);
        assert_eq!(job(Api::Chat, Skin::Vllm, "m", &flagged).unwrap_err().0, 400);
        flagged["add_generation_prompt"] = json!(false);

        assert_eq!(said(Skin::Vllm, &flagged).tokens.concat(), rest);
        assert_eq!(said(Skin::Sglang, &flagged).tokens.concat(), rest);
        assert_eq!(said(Skin::LlamaCpp, &cut).tokens.concat(), rest);
        for skin in [Skin::Vllm, Skin::Sglang, Skin::Generic] {
            assert_ne!(said(skin, &cut).tokens.concat(), rest, "{skin:?}");
        }
        assert_ne!(said(Skin::Generic, &flagged).tokens.concat(), rest);
    }

    #[test]
    fn a_chat_continues_through_completions_with_token_ids() {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "Größe?"}]});
        let chat = job(Api::Chat, Skin::Vllm, "m", &body).unwrap();
        let whole = chat.answer("m", 0, 40).tokens;
        let mut ids = chat.prompt_ids.clone();
        ids.extend(model::tokenize(&whole[..7].concat()));
        let body = json!({"model": "m", "prompt": ids, "max_tokens": 1000});
        let rest = job(Api::Completions, Skin::Vllm, "m", &body).unwrap().answer("m", 0, 40);
        assert_eq!(rest.tokens, whole[7..]);
        assert_eq!(rest.finish, Finish::Stop);
    }

    #[test]
    fn limits_and_stop_strings_end_an_answer() {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
        let whole = said(Skin::Generic, &body);
        assert_eq!(whole.finish, Finish::Stop);
        body["max_tokens"] = json!(5);
        let short = said(Skin::Generic, &body);
        assert_eq!((short.tokens.as_slice(), &short.finish), (&whole.tokens[..5], &Finish::Length));
        body["max_tokens"] = json!(whole.tokens.len());
        assert_eq!(said(Skin::Generic, &body).finish, Finish::Stop);
        let stop = &whole.tokens[6][1..];
        body["stop"] = json!([stop, "never said"]);
        let stopped = said(Skin::Generic, &body);
        let text = whole.tokens.concat();
        assert_eq!(stopped.tokens.concat(), text[..text.find(stop).unwrap()]);
        assert_eq!(stopped.finish, Finish::StopString(stop.to_owned()));
    }

    #[test]
    fn what_the_client_did_wrong_is_refused() {
        let refused = |body: Value| job(Api::Chat, Skin::Vllm, "m", &body).unwrap_err().0;
        assert_eq!(refused(json!({"model": "other", "messages": [{"role": "user", "content": "x"}]})), 404);
        assert_eq!(refused(json!({"model": "m"})), 400);
        assert_eq!(refused(json!({"model": "m", "messages": []})), 400);
        assert_eq!(refused(json!({"messages": [{"role": "user", "content": "word ".repeat(40_000)}]})), 400);
        assert_eq!(refused(json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0})), 400);
    }
}
