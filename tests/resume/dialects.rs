//! The same for APIs other than OpenAI's: Anthropic's messages, Ollama's own.

use std::time::Duration;

use evergate::telemetry::metrics::AttemptOutcome;
use serde_json::{Value, json};

use super::resumed;
use crate::support::backend::{Backend, Script};
use crate::support::client::Request;
use crate::support::either::{Http, attempts, in_order};
use crate::support::proxy::Proxy;
use crate::support::reply::{self, Step, Then as _};

/// A request, and the events of its answer as a replica of this number says them.
struct Api {
    name: &'static str,
    request: Request,
    content_type: &'static str,
    says: fn(u64) -> Vec<String>,
}

const WORDS: [&str; 5] = ["It's", " \"so\"", "\n漢", "字 🦀", "."];

fn apis() -> [Api; 3] {
    let ask = |more: Value| {
        let mut body = json!({"model": "test-model", "stream": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let messages = json!([{"role": "user", "content": "x"}]);
    [
        Api {
            name: "messages",
            request: Request::post_json("/v1/messages", &ask(json!({"max_tokens": 9, "messages": messages}))),
            content_type: "text/event-stream",
            says: messages_events,
        },
        Api {
            name: "ollama chat",
            request: Request::post_json("/api/chat", &ask(json!({"messages": messages}))),
            content_type: "application/x-ndjson",
            says: |replica| lines(replica, |text| json!({"message": {"role": "assistant", "content": text}})),
        },
        Api {
            name: "ollama generate",
            request: Request::post_json("/api/generate", &ask(json!({"prompt": "x"}))),
            content_type: "application/x-ndjson",
            says: |replica| lines(replica, |text| json!({ "response": text })),
        },
    ]
}

fn messages_events(replica: u64) -> Vec<String> {
    let event = |kind: &str, more: Value| {
        let mut data = json!({"type": kind});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        format!("event: {kind}\ndata: {data}\n\n")
    };
    let delta =
        |index: u64, delta: Value| event("content_block_delta", json!({"index": index, "delta": delta}));
    let message = json!({"id": format!("msg_{replica}"), "role": "assistant", "content": []});
    let tool = json!({"type": "tool_use", "id": format!("toolu_{replica}"), "name": "f", "input": {}});
    let mut events = vec![
        event("message_start", json!({ "message": message })),
        event("content_block_start", json!({"index": 0, "content_block": {"type": "text", "text": ""}})),
        event("ping", json!({})),
    ];
    events.extend(WORDS.iter().map(|text| delta(0, json!({"type": "text_delta", "text": text}))));
    events.extend([
        event("content_block_stop", json!({"index": 0})),
        event("content_block_start", json!({"index": 1, "content_block": tool})),
        delta(1, json!({"type": "input_json_delta", "partial_json": "{\"a\":"})),
        delta(1, json!({"type": "input_json_delta", "partial_json": "1}"})),
        event("content_block_stop", json!({"index": 1})),
        event("message_delta", json!({"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}})),
        event("message_stop", json!({})),
    ]);
    events
}

/// Times differ by replica and line, as they do.
fn lines(replica: u64, said: impl Fn(&str) -> Value) -> Vec<String> {
    let line = |nth: usize, text: &str, done: bool| {
        let mut line = json!({"model": "test-model", "created_at": format!("{replica}:{nth}"), "done": done});
        line.as_object_mut().unwrap().extend(said(text).as_object().unwrap().clone());
        if done {
            line["done_reason"] = "stop".into();
        }
        format!("{line}\n")
    };
    let mut lines: Vec<String> = WORDS.iter().enumerate().map(|(nth, text)| line(nth, text, false)).collect();
    lines.push(line(WORDS.len(), "", true));
    lines
}

impl Api {
    fn open(&self, events: &[String]) -> Vec<Step> {
        let head = [("content-type", self.content_type), ("transfer-encoding", "chunked")];
        let head = Step::Send(reply::head(200, &head));
        std::iter::once(head).chain(events.iter().map(reply::chunk)).collect()
    }

    /// What the client must have: the first replica's events, and from the seam on the second's.
    fn spliced(&self, cut: usize) -> String {
        [&(self.says)(1)[..cut], &(self.says)(2)[cut..]].concat().concat()
    }

    /// Events from the first token to the last before the finish.
    fn cuts(&self) -> std::ops::Range<usize> {
        match self.name {
            "messages" => 4..(self.says)(1).len() - 2,
            _ => 1..(self.says)(1).len() - 1,
        }
    }
}

#[tokio::test]
async fn a_stream_of_another_api_cut_behind_any_event_is_one_whole_stream_for_the_client() {
    for http in Http::BOTH {
        for api in apis() {
            for cut in api.cuts() {
                let begun = (api.says)(1)[..cut].to_vec();
                let half = reply::chunk(&(api.says)(1)[cut][..9]);
                for end in [vec![Step::Rst], vec![half, Step::Fin], vec![reply::last_chunk()]] {
                    let pause = vec![Step::Delay(Duration::from_millis(10))];
                    let steps = [api.open(&begun), pause, end.clone()].concat();
                    let dying = Backend::start(Script::new().answer(steps)).await;
                    let whole = api.open(&(api.says)(2)).then(reply::last_chunk());
                    let alive = Backend::start(Script::new().answer(whole)).await;
                    let proxy = Proxy::start(&in_order(&[&dying.url(), &alive.url()]));
                    let answer = http.send(proxy.addr, &api.request).await;
                    let note = format!("{} behind {cut} by {end:?}", api.name);
                    assert_eq!(answer.text(), api.spliced(cut), "{note}");
                    assert_eq!(resumed(&proxy, "resumed"), 1, "{note}");
                    assert_eq!(attempts(&proxy, dying.addr(), AttemptOutcome::Fault), 1, "{note}");
                    assert_eq!(alive.requests()[0].body, dying.requests()[0].body, "{note}");
                    proxy.is_quiet().await;
                }
            }
        }
    }
}

#[tokio::test]
async fn another_answer_of_another_api_is_never_blended_in() {
    for api in apis() {
        let cut = api.cuts().end - 1;
        let steps = api.open(&(api.says)(1)[..cut]).then(Step::Rst);
        let dying = Backend::start(Script::new().answer(steps)).await;
        let differs: Vec<String> =
            (api.says)(2).into_iter().map(|event| event.replace("\\\"so\\\"", "other")).collect();
        let alive = Backend::start(Script::new().answer(api.open(&differs).then(reply::last_chunk()))).await;
        let proxy = Proxy::start(&in_order(&[&dying.url(), &alive.url()]));
        let answer = Http::One.send(proxy.addr, &api.request).await;
        let had = (api.says)(1)[..cut].concat();
        let last = answer.text().strip_prefix(&had).map(str::to_owned);
        let last = last.unwrap_or_else(|| panic!("{}: {}", api.name, answer.text()));
        assert!(last.contains("replica_lost") && !last.contains("other"), "{}: {last}", api.name);
        assert_eq!((alive.requests().len(), resumed(&proxy, "resumed")), (1, 0), "{}", api.name);
        proxy.is_quiet().await;
    }
}
