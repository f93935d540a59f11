//! What cannot be resumed is seen to be broken: each feature that refuses, at each endpoint.
//!
//! Replay is off, refused, or finds another answer. The client then has a strict prefix of the uncut text, exactly
//! one well-formed error event, and nothing that looks like an end. The same cases in the hands of real SDKs are in
//! `tests/realworld/refusals.py`.

use std::time::Duration;

use serde_json::{Value, json};
use toml::Value as Toml;

use crate::every_byte::told;
use crate::support::backend::{Backend, Script};
use crate::support::client::{Answer, End, Request};
use crate::support::either::Http;
use crate::support::eventually;
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step};

/// Why a break is not mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// `mode = "off"`.
    Off,
    /// The peer gives another answer.
    Diverges,
    /// The peer does not serve the model, or not in this way.
    NoPeer,
    /// There is no peer at all.
    Alone,
    /// The answer outgrew `journal_bytes_max`.
    OverCap,
    /// The retry budget was spent.
    NoBudget,
}

const WHYS: [Why; 6] = [Why::Off, Why::Diverges, Why::NoPeer, Why::Alone, Why::OverCap, Why::NoBudget];

/// A request's feature: its members, and the events of the answer, with words that the test tells apart.
struct Feature {
    name: &'static str,
    path: &'static str,
    body: Value,
    /// Events, the last two of which never come.
    events: Vec<String>,
}

/// Of an answer long enough to outgrow a journal of 1 KiB.
const WORD: &str = "lighthouse-keepers-and-their-lamps ";
const WORDS: usize = 40;

fn events(path: &str, delta: impl Fn(String) -> Value) -> Vec<String> {
    let chat = path == "/v1/chat/completions";
    let chunk = |choices: Value| {
        format!("data: {}\n\n", json!({"id": "x", "created": 1, "model": "m", "choices": choices}))
    };
    let choice = |delta: Value, finish: Option<&str>| match (chat, finish) {
        (true, finish) => json!([{"index": 0, "delta": delta, "finish_reason": finish}]),
        (false, Some(finish)) => json!([{"index": 0, "text": "", "finish_reason": finish}]),
        (false, None) => delta,
    };
    let mut events: Vec<String> =
        (0..WORDS).map(|n| chunk(choice(delta(format!("{WORD}{n} ")), None))).collect();
    events.push(chunk(choice(json!({}), Some("stop"))));
    events.push("data: [DONE]\n\n".to_owned());
    events
}

fn features() -> Vec<Feature> {
    let chat = "/v1/chat/completions";
    let base = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let with = |more: Value| {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let content = |text: String| json!({"content": text});
    let of = |name, more: Value, delta: fn(String) -> Value| Feature {
        name,
        path: chat,
        body: with(more),
        events: events(chat, delta),
    };
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let completion = |text: String| json!([{"index": 0, "text": text, "finish_reason": null}]);
    let prompt = |more: Value| {
        let mut body = json!({"model": "m", "stream": true, "prompt": "Hi", "max_tokens": 200});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let completions = "/v1/completions";
    vec![
        of("plain", json!({}), content),
        of("two choices", json!({"n": 2}), content),
        of("JSON mode", json!({"response_format": {"type": "json_object"}}), content),
        of(
            "a tool begun",
            json!({"tools": [tool]}),
            |text| json!({"tool_calls": [{"index": 0, "function": {"arguments": text}}]}),
        ),
        of("thinking", json!({}), |text| json!({"reasoning_content": text})),
        of("log probabilities", json!({"logprobs": true}), content),
        of("a limit", json!({"max_tokens": 500}), content),
        Feature {
            name: "completion",
            path: completions,
            body: prompt(json!({})),
            events: events(completions, completion),
        },
        Feature {
            name: "completion with two choices",
            path: completions,
            body: prompt(json!({"n": 2})),
            events: events(completions, completion),
        },
        Feature {
            name: "completion with log probabilities",
            path: completions,
            body: prompt(json!({"logprobs": 1})),
            events: events(completions, completion),
        },
    ]
}

/// Events of which each has been told before the break.
const TOLD: usize = 32;

impl Feature {
    fn request(&self) -> Request {
        Request::post_json(self.path, &self.body)
    }

    fn dying(&self) -> Script {
        let begun = reply::sse_open(&self.events[..TOLD]);
        Script::new().nameless().answer([begun, vec![Step::Rst]].concat())
    }

    /// The peer, which could go on, but says something else in its eighth event.
    fn other(&self) -> Script {
        let mut events = self.events.clone();
        events[7] = events[7].replace(WORD, "a light goes out and nobody ");
        Script::new().nameless().sse(&events)
    }

    /// What the client has: the events that were told, or fewer of them, then one error, then the end.
    fn assert_is_refused(&self, why: Why, answer: &Answer) {
        let text = answer.text();
        let place = format!("{} {why:?}:\n{text}", self.name);
        assert_eq!((answer.status, answer.end), (200, End::Clean), "{place}");
        let events = answer.events();
        let (last, told) = events.split_last().unwrap();
        assert!(!told.is_empty() && told.len() <= TOLD, "{place}");
        for (event, sent) in told.iter().zip(&self.events) {
            assert_eq!(format!("data: {}\n\n", event.data), *sent, "{place}");
        }
        let error = &last.json()["error"];
        assert!(error["message"].as_str().is_some_and(|words| !words.is_empty()), "{place}");
        assert_eq!(error["code"], "replica_lost", "{place}");
        assert_eq!(error["type"], "server_error", "{place}");
        assert!(!text.contains("[DONE]") && !text.contains("\"stop\""), "{place}");
    }
}

async fn play(http: Http, feature: &Feature, why: Why) {
    let dying = Backend::start(feature.dying()).await;
    let peer = match why {
        Why::Alone => None,
        Why::NoPeer => Some(Backend::start(Script::new().nameless().answer(reply::error(404))).await),
        _ => Some(Backend::start(feature.other()).await),
    };
    let tier = |tier: i64| [("tier", Toml::from(tier))];
    let mut builder = ProxyBuilder::new()
        .set("pool.probe.kind", "off")
        .set("pool.retry.wait_max", "100ms")
        .backend_with(&dying.url(), &tier(0));
    if let Some(peer) = &peer {
        builder = builder.backend_with(&peer.url(), &tier(1));
    }
    builder = match why {
        Why::Off => builder.set("pool.resume.mode", "off"),
        Why::OverCap => builder.set("pool.resume.journal_bytes_max", "1KiB"),
        // The allowance for a lost replica remains, and is spent below.
        Why::NoBudget => builder
            .set("pool.retry.budget_ratio", 0.0)
            .set("pool.retry.budget_floor", 0.0)
            .set("pool.health.eject_consecutive", 1000)
            .set("pool.health.success_rate_min", 0.0),
        _ => builder,
    };
    let proxy = Proxy::start(&builder);
    let times = if why == Why::NoBudget { 10 } else { 1 };
    for _ in 0..times {
        feature.assert_is_refused(why, &http.send(proxy.addr, &feature.request()).await);
    }
    if why == Why::NoBudget && feature.body["n"].is_null() {
        assert!(told(&proxy).contains("result=\"budget\""), "{}", told(&proxy));
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn what_is_not_resumed_ends_in_one_error_behind_what_was_told() {
    for feature in features() {
        for why in WHYS {
            play(Http::One, &feature, why).await;
        }
        play(Http::Two, &feature, Why::Diverges).await;
    }
}

#[tokio::test]
async fn nobody_is_asked_for_a_client_that_has_gone() {
    let feature = &features()[0];
    let begun = reply::sse_open(&feature.events[..4]);
    let holding = Backend::start(Script::new().nameless().answer([begun, vec![Step::Stall]].concat())).await;
    let peer = Backend::start(feature.other()).await;
    let tier = |tier: i64| [("tier", Toml::from(tier))];
    let builder = ProxyBuilder::new()
        .set("pool.probe.kind", "off")
        .backend_with(&holding.url(), &tier(0))
        .backend_with(&peer.url(), &tier(1));
    let proxy = Proxy::start(&builder);
    for http in Http::BOTH {
        let asked = holding.requests().len();
        let leaving = http.send_and_leave(proxy.addr, &feature.request());
        holding.has_seen(asked + 1).await;
        let exchanges = &proxy.telemetry.metrics.exchanges;
        eventually(Duration::from_secs(10), || exchanges.in_flight() == 1).await;
        leaving.abort();
        proxy.is_quiet().await;
        assert_eq!((peer.requests().len(), holding.open_connections()), (0, 0));
    }
}
