//! A replica of vLLM dies in the middle of a stream, and the next is given the token ids to go on from.

use std::time::Duration;

use evergate::telemetry::metrics::End;
use serde_json::{Value, json};

use crate::resume::resumed;
use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Answer, Request};
use crate::support::either::{Http, in_order};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step};
use crate::support::{PATIENCE, eventually};

/// Tokens of the answer; the ids of the prompt are 1, 2, 3, those of the answer 100 and so on.
const WORDS: [&str; 9] = ["One", " two", " \u{6f22}", " \"three\"", "\n", "four", " five", " six", "."];
const PROMPT: [u64; 3] = [1, 2, 3];

/// A scripted vLLM.
#[derive(Clone)]
struct Vllm {
    version: &'static str,
    context: u64,
    /// Of its answers to requests of the client's making, so many events and then this.
    dies: Option<(usize, Vec<Step>)>,
    /// It writes so many bytes at a time.
    piece: Option<usize>,
    /// It refuses prompts of ids.
    refuses: bool,
    ids_of_text: Value,
}

impl Default for Vllm {
    fn default() -> Self {
        Self {
            version: "0.11.2",
            context: 1000,
            dies: None,
            piece: None,
            refuses: false,
            ids_of_text: json!([5, 6]),
        }
    }
}

impl Vllm {
    fn dies(events: usize) -> Self {
        Self { dies: Some((events, vec![Step::Rst])), ..Self::default() }
    }

    async fn start(self) -> Backend {
        Backend::start(Script::new().by_request(move |request| self.answer(request))).await
    }

    fn answer(&self, request: &RequestSeen) -> Vec<Step> {
        let asked = request.json();
        match request.path() {
            "/health" => reply::json(200, &json!({})),
            "/version" => reply::json(200, &json!({"version": self.version})),
            "/tokenize" => reply::json(200, &json!({"count": 2, "tokens": self.ids_of_text})),
            "/v1/models" => reply::json(
                200,
                &json!({"object": "list", "data": [{"id": "m", "owned_by": "vllm", "max_model_len": self.context}]}),
            ),
            _ if self.refuses && asked["prompt"].is_array() => reply::error(400),
            path => self.talk(path, &asked),
        }
    }

    fn talk(&self, path: &str, asked: &Value) -> Vec<Step> {
        let events = events(path == "/v1/chat/completions", asked);
        match &self.dies {
            Some((count, then)) if !asked["prompt"].is_array() => {
                let said = &events[..(*count).min(events.len())];
                [reply::sse_open(said), then.clone()].concat()
            }
            _ => reply::sse(&events)
                .into_iter()
                .map(|step| match (step, self.piece) {
                    (Step::Send(bytes), Some(piece)) => {
                        Step::SendSlow { bytes, piece, every: Duration::from_micros(100) }
                    }
                    (step, _) => step,
                })
                .collect(),
        }
    }
}

/// What vLLM writes.
fn events(chat: bool, asked: &Value) -> Vec<String> {
    let told = asked["return_token_ids"] == true;
    let given: Vec<u64> = match asked["prompt"].as_array() {
        Some(ids) => ids.iter().map(|id| id.as_u64().unwrap()).collect(),
        None => PROMPT.to_vec(),
    };
    let last = asked["messages"].as_array().and_then(|messages| messages.last());
    let begun =
        last.filter(|last| last["role"] == "assistant").map_or("", |last| last["content"].as_str().unwrap());
    let continued = (0..WORDS.len()).find(|&upto| WORDS[..upto].concat() == begun).unwrap();
    let from = given.len() - PROMPT.len() + continued;
    let limit = asked["max_tokens"].as_u64().unwrap_or(100) as usize;
    let upto = WORDS.len().min(from + limit);
    let (id, object) =
        if chat { ("chatcmpl-1", "chat.completion.chunk") } else { ("cmpl-1", "text_completion") };
    let event = |choices: &str, more: &str| {
        format!(
            "data: {{\"id\":\"{id}\",\"object\":\"{object}\",\"created\":17,\"model\":\"m\",\"choices\":[{choices}]{more}}}\n\n"
        )
    };
    let prompt = if told { json!(given) } else { Value::Null };
    let mut all = Vec::new();
    if chat {
        let role =
            r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#;
        all.push(event(role, &format!(",\"prompt_token_ids\":{prompt}")));
    }
    for (nth, word) in WORDS.iter().enumerate().take(upto).skip(from) {
        let ids = if told { json!([100 + nth]) } else { Value::Null };
        let text = Value::from(word.repeat(asked["repeat"].as_u64().unwrap_or(1) as usize));
        let text =
            if chat { format!("\"delta\":{{\"content\":{text}}}") } else { format!("\"text\":{text}") };
        let last = nth + 1 == upto;
        let finish = match (last, upto == WORDS.len()) {
            (false, _) => "null",
            (true, true) => "\"stop\"",
            (true, false) => "\"length\"",
        };
        let stop = if chat && !last { "" } else { ",\"stop_reason\":null" };
        let of_prompt = match (chat, nth == from) {
            (true, _) => String::new(),
            (false, true) => format!(",\"prompt_token_ids\":{prompt}"),
            (false, false) => ",\"prompt_token_ids\":null".to_owned(),
        };
        all.push(event(
            &format!("{{\"index\":0,{text},\"logprobs\":null,\"finish_reason\":{finish}{stop}{of_prompt},\"token_ids\":{ids}}}"),
            "",
        ));
    }
    if asked["stream_options"]["include_usage"] == true {
        let (prompt, said) = (given.len() + continued, upto - from);
        all.push(event(
            "",
            &format!(
                ",\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{},\"completion_tokens\":{said}}}",
                prompt + said
            ),
        ));
    }
    all.push("data: [DONE]\n\n".to_owned());
    all
}

fn request(chat: bool, more: Value) -> (Request, Value) {
    let mut body =
        json!({"model": "m", "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 50});
    let members = body.as_object_mut().unwrap();
    match chat {
        true => members.insert("messages".to_owned(), json!([{"role": "user", "content": "Count"}])),
        false => members.insert("prompt".to_owned(), json!("Count")),
    };
    members.extend(more.as_object().unwrap().clone());
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    (Request::post_json(path, &body), body)
}

/// A proxy that knows what its backends run.
async fn knowing(builder: &ProxyBuilder, backends: &[&Backend]) -> Proxy {
    let proxy = Proxy::start(builder);
    for backend in backends {
        let record = proxy.backend(backend.addr());
        eventually(PATIENCE, || record.build().is_some()).await;
    }
    proxy
}

async fn send(proxy: &Proxy, request: &Request) -> Answer {
    let answer = Http::One.send(proxy.addr, request).await;
    assert_eq!(answer.status, 200);
    answer
}

fn asked(backend: &Backend, path: &str) -> Vec<Value> {
    backend.all_requests().iter().filter(|request| request.path() == path).map(RequestSeen::json).collect()
}

#[tokio::test]
async fn a_stream_cut_behind_any_event_goes_on_from_its_ids_byte_for_byte() {
    for chat in [true, false] {
        let (request, body) = request(chat, json!({}));
        let uncut = events(chat, &body);
        // Behind the role alone nothing is shown yet; behind the finish nothing is missing.
        let first = if chat { 2 } else { 1 };
        for cut in first..uncut.len() - 2 {
            let (dying, alive) = (Vllm::dies(cut).start().await, Vllm::default().start().await);
            let builder = in_order(&[&dying.url(), &alive.url()]);
            let proxy = knowing(&builder, &[&dying, &alive]).await;
            let answer = send(&proxy, &request).await;
            assert_eq!(answer.text(), uncut.concat(), "cut behind {cut}");
            assert_eq!(resumed(&proxy, "resumed"), 1);
            // What the second was asked.
            let delivered = cut - usize::from(chat);
            let prompt: Vec<u64> =
                PROMPT.into_iter().chain((0..delivered as u64).map(|nth| 100 + nth)).collect();
            let continued = asked(&alive, "/v1/completions");
            assert_eq!(continued.len(), 1);
            assert_eq!(continued[0]["prompt"], json!(prompt));
            assert_eq!(continued[0]["max_tokens"], 50 - delivered);
            assert_eq!(asked(&alive, "/v1/chat/completions"), Vec::<Value>::new());
            assert_eq!(proxy.telemetry.metrics.exchanges.finished(End::Complete), 1);
            proxy.is_quiet().await;
        }
    }
}

/// Ids are not asked for where they could not be used: where stop strings hold text back.
#[track_caller]
fn check_asked(backend: &Backend, chat: bool, body: &Value) {
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    let expected = if body["stop"].is_null() { json!(true) } else { Value::Null };
    assert_eq!(asked(backend, path)[0]["return_token_ids"], expected);
}

#[tokio::test]
async fn who_did_not_ask_for_ids_sees_none_and_who_did_sees_all() {
    for chat in [true, false] {
        for more in [json!({}), json!({"return_token_ids": true}), json!({"stop": "never"})] {
            let (request, body) = request(chat, more);
            for piece in [None, Some(100)] {
                let alive = Vllm { piece, ..Vllm::default() }.start().await;
                let proxy = knowing(&in_order(&[&alive.url()]), &[&alive]).await;
                assert_eq!(send(&proxy, &request).await.text(), events(chat, &body).concat());
                check_asked(&alive, chat, &body);
            }
        }
    }
    let (request, body) = request(true, json!({}));
    let alive = Vllm::default().start().await;
    let never = in_order(&[&alive.url()]).set("pool.resume.request_ids", "never");
    let proxy = knowing(&never, &[&alive]).await;
    assert_eq!(send(&proxy, &request).await.text(), events(true, &body).concat());
    assert_eq!(asked(&alive, "/v1/chat/completions")[0], body);
}

#[tokio::test]
async fn a_stream_that_can_no_longer_be_resumed_hides_its_ids_to_the_end() {
    let (request, body) = request(false, json!({"repeat": 300}));
    let alive = Vllm::default().start().await;
    let builder = in_order(&[&alive.url()]).set("pool.resume.journal_bytes_max", "1KiB");
    let proxy = knowing(&builder, &[&alive]).await;
    assert_eq!(send(&proxy, &request).await.text(), events(false, &body).concat());
    assert_eq!(asked(&alive, "/v1/completions")[0]["return_token_ids"], true);
}

#[tokio::test]
async fn a_limit_that_was_reached_needs_no_other_replica() {
    let (request, body) = request(true, json!({"max_tokens": 4}));
    let uncut = events(true, &body);
    // It dies where the finish would have come with the last token: that event is made to say no finish.
    let last = uncut[4].clone();
    let alive = Vllm::default().start().await;
    let dying = Backend::start(Script::new().by_request({
        let vllm = Vllm::default();
        move |request| match request.path() {
            "/v1/chat/completions" => {
                let mut said = events(true, &request.json())[..5].to_vec();
                said[4] = said[4].replace("\"length\",\"stop_reason\":null", "null");
                [reply::sse_open(&said), vec![Step::Rst]].concat()
            }
            _ => vllm.answer(request),
        }
    }))
    .await;
    let proxy = knowing(&in_order(&[&dying.url(), &alive.url()]), &[&dying, &alive]).await;
    let text = send(&proxy, &request).await.text();
    let said = uncut[..4].concat() + &last.replace("\"length\",\"stop_reason\":null", "null");
    let end = text.strip_prefix(&said).unwrap_or_else(|| panic!("{text}"));
    assert!(end.contains("\"finish_reason\":\"length\"") && end.ends_with("data: [DONE]\n\n"), "{end}");
    assert!(end.contains(r#""usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4}"#), "{end}");
    assert_eq!(asked(&alive, "/v1/completions").len() + asked(&alive, "/v1/chat/completions").len(), 0);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn another_build_model_or_tokenizer_does_not_continue_ids() {
    for other in [
        Vllm { version: "0.99.0", ..Vllm::default() },
        Vllm { context: 999, ..Vllm::default() },
        Vllm { ids_of_text: json!([7]), ..Vllm::default() },
    ] {
        let (request, body) = request(true, json!({}));
        let (dying, alive) = (Vllm::dies(5).start().await, other.start().await);
        let proxy = knowing(&in_order(&[&dying.url(), &alive.url()]), &[&dying, &alive]).await;
        assert_eq!(send(&proxy, &request).await.text(), events(true, &body).concat());
        assert_eq!(asked(&alive, "/v1/completions"), Vec::<Value>::new());
        // By text where only the tokenizer differs, else by a replay.
        assert_eq!(asked(&alive, "/v1/chat/completions").len(), 1);
    }
}

#[tokio::test]
async fn a_refused_continuation_is_not_told_to_the_client_and_not_tried_again() {
    let (request, body) = request(true, json!({}));
    let dying = Vllm::dies(5).start().await;
    let alive = Vllm { refuses: true, ..Vllm::default() }.start().await;
    let proxy = knowing(&in_order(&[&dying.url(), &alive.url()]), &[&dying, &alive]).await;
    for attempts in [1, 1] {
        assert_eq!(send(&proxy, &request).await.text(), events(true, &body).concat());
        assert_eq!(asked(&alive, "/v1/completions").len(), attempts);
    }
    proxy.is_quiet().await;
}
