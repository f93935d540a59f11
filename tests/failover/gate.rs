//! A head came, but nothing worth showing behind it (F13, F14), or an answer in one piece that is none (F24).

use std::time::Duration;

use evergate::telemetry::metrics::AttemptOutcome;
use serde_json::{Value, json};

use crate::support::backend::{Backend, Script};
use crate::support::client::{Request, chat_request};
use crate::support::either::{
    Http, assert_is_right, assert_is_the_chat, assert_is_the_stream, attempts, faults, in_order,
};
use crate::support::proxy::Proxy;
use crate::support::reply::{self, Step, Talk, Then as _};

#[tokio::test]
async fn f13_an_empty_answer_is_a_fault() {
    for http in Http::BOTH {
        for stream in [true, false] {
            let kind = if stream { "text/event-stream" } else { "application/json" };
            for empty in [
                reply::body(200, kind, ""),
                reply::with_headers(200, &[], ""),
                vec![reply::sse_head(), reply::last_chunk()],
                // Nothing but a comment is nothing.
                reply::sse(&[": hello\n\n"]),
            ] {
                if !stream && empty.len() > 2 {
                    continue;
                }
                let sick = Backend::start(Script::new().answer(empty.clone())).await;
                let alive = Backend::healthy().await;
                let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
                assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
                assert_eq!(faults(&proxy, &sick), 1, "{empty:?}");
                proxy.is_quiet().await;
            }
        }
    }
}

#[tokio::test]
async fn f13_a_page_instead_of_a_stream_is_a_fault() {
    for http in Http::BOTH {
        for kind in ["text/html; charset=utf-8", "application/octet-stream"] {
            let page = reply::body(200, kind, "<html>It works!</html>");
            let sick = Backend::start(Script::new().answer(page)).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
            for stream in [true, false] {
                assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
            }
            assert_eq!(faults(&proxy, &sick), 2, "{kind}");
            proxy.is_quiet().await;
        }
    }
}

/// A stream whose first event is this error, and after which the engine goes on as if all were well.
fn opens_with(error: &Value) -> Script {
    Script::new().answer(reply::sse(&[format!("data: {error}\n\n"), "data: [DONE]\n\n".to_owned()]))
}

#[tokio::test]
async fn f14_a_stream_that_opens_with_a_server_error_is_a_fault() {
    for http in Http::BOTH {
        for error in [
            json!({"error": {"message": "CUDA error: device-side assert", "type": "server_error", "code": 500}}),
            json!({"error": {"message": "EngineCore encountered an issue.", "type": "BadRequestError", "code": 400}}),
            json!({"object": "error", "message": "boom", "type": "InternalServerError", "code": 500}),
        ] {
            let sick = Backend::start(opens_with(&error)).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
            assert_eq!(faults(&proxy, &sick), 1, "{error}");
            proxy.is_quiet().await;
        }
        // An error behind the role is still before the first token.
        let mut events = Talk::default().chat_events_begun(0);
        events.push("data: {\"error\":{\"message\":\"boom\",\"code\":500}}\n\n".to_owned());
        let sick = Backend::start(Script::new().sse(&events)).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(faults(&proxy, &sick), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f14_a_stream_that_opens_with_an_overload_is_busy() {
    for http in Http::BOTH {
        let error = json!({"error": {"message": "The request queue is full", "type": "overloaded_error"}});
        let busy = Backend::start(opens_with(&error)).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&busy.url(), &alive.url()]));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(faults(&proxy, &busy), 0);
        assert_eq!(attempts(&proxy, busy.addr(), AttemptOutcome::Busy), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f14_a_stream_that_opens_with_the_clients_fault_becomes_a_real_status() {
    for http in Http::BOTH {
        let error = json!({"error": {"message": "temperature must be non-negative", "type": "invalid_request_error", "code": 422}});
        let strict = Backend::start(opens_with(&error)).await;
        let peer = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&strict.url(), &peer.url()]));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, answer.json()), (422, error));
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert_eq!((faults(&proxy, &strict), peer.requests().len()), (0, 0));
        proxy.is_quiet().await;
    }
}

fn embeddings() -> Request {
    Request::post_json("/v1/embeddings", &json!({"model": "test-model", "input": "x"}))
}

#[tokio::test]
async fn f24_an_answer_that_is_not_whole_is_answered_by_a_peer() {
    let whole = br#"{"choices":[{"index":0,"message":{"role":"assistant","content":"t0 t1"},"finish_reason":"stop"}]}"#;
    let length = whole.len().to_string();
    let longer = (whole.len() + 20).to_string();
    let shorter = (whole.len() - 20).to_string();
    let json = ("content-type", "application/json");
    let sized = |length: &str| Step::Send(reply::head(200, &[json, ("content-length", length)]));
    let chunked = Step::Send(reply::head(200, &[json, ("transfer-encoding", "chunked")]));
    let cases: Vec<(&str, Vec<Step>)> = vec![
        ("content-length too long", vec![sized(&longer), Step::send(&whole[..]), Step::Fin]),
        ("content-length too short", vec![sized(&shorter), Step::send(&whole[..])]),
        ("truncated by FIN", vec![sized(&length), Step::send(&whole[..40]), Step::Fin]),
        (
            "truncated by RST",
            vec![sized(&length), Step::send(&whole[..40]), Step::Delay(Duration::from_millis(20)), Step::Rst],
        ),
        ("chunks without an end", vec![chunked.clone(), reply::chunk(whole), Step::Fin]),
        ("a broken chunk size", vec![chunked, reply::chunk(&whole[..9]), Step::send("zz\r\n"), Step::Fin]),
        ("stalled", vec![sized(&length), Step::send(&whole[..40]), Step::Stall]),
        ("invalid JSON", reply::body(200, "application/json", &whole[..40])),
        ("no choices", reply::body(200, "application/json", "{}")),
        (
            "an error inside",
            reply::body(200, "application/json", r#"{"error":{"message":"boom","code":500}}"#),
        ),
        (
            "an aborted generation",
            reply::body(
                200,
                "application/json",
                r#"{"choices":[{"index":0,"message":{"content":"t0"},"finish_reason":"abort"}]}"#,
            ),
        ),
    ];
    for http in Http::BOTH {
        for (name, steps) in &cases {
            let sick = Backend::start(Script::new().answer(steps.clone())).await;
            let alive = Backend::healthy().await;
            let proxy =
                Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("pool.clocks.body_idle", "200ms"));
            let answer = http.send(proxy.addr, &chat_request(false)).await;
            eprintln!("{name}");
            assert_is_the_chat(&answer);
            assert_eq!((faults(&proxy, &sick), alive.requests().len()), (1, 1), "{name}");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f24_an_answer_that_ends_with_its_connection_is_whole_or_not_by_its_json() {
    for http in Http::BOTH {
        let unframed =
            Step::Send(reply::head(200, &[("content-type", "application/json"), ("connection", "close")]));
        let whole = br#"{"choices":[{"index":0,"message":{"role":"assistant","content":"u"},"finish_reason":"stop"}]}"#;
        let good =
            Backend::start(Script::new().answer(vec![unframed.clone(), Step::send(&whole[..]), Step::Fin]))
                .await;
        let proxy = Proxy::start(&in_order(&[&good.url()]));
        let answer = http.send(proxy.addr, &chat_request(false)).await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, &whole[..]));
        assert_eq!(faults(&proxy, &good), 0);

        let sick =
            Backend::start(Script::new().answer(vec![unframed, Step::send(&whole[..50]), Step::Fin])).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
        assert_is_the_chat(&http.send(proxy.addr, &chat_request(false)).await);
        assert_eq!(faults(&proxy, &sick), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f24_an_embedding_with_a_number_that_is_none_is_answered_by_a_peer() {
    for http in Http::BOTH {
        for vector in ["[0.1, NaN]", "[0.1, Infinity]", "[0.1, null]", "[1e999]"] {
            let said = format!(r#"{{"object":"list","data":[{{"index":0,"embedding":{vector}}}]}}"#);
            let sick = Backend::start(Script::new().answer(reply::body(200, "application/json", said))).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
            let answer = http.send(proxy.addr, &embeddings()).await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.json()["data"][0]["embedding"], json!([0.6, 0.8]), "{vector}");
            assert_eq!(faults(&proxy, &sick), 1, "{vector}");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f24_a_plain_body_commits_at_its_first_byte_and_never_ends_well_when_it_broke() {
    use crate::support::client::End;
    for http in Http::BOTH {
        let head = |length: &str| {
            Step::Send(reply::head(200, &[("content-type", "audio/wav"), ("content-length", length)]))
        };
        let chunked =
            Step::Send(reply::head(200, &[("content-type", "audio/wav"), ("transfer-encoding", "chunked")]));
        for (name, steps) in [
            ("FIN", vec![head("100"), Step::send("half"), Step::Delay(Duration::from_millis(30)), Step::Fin]),
            ("RST", vec![head("100"), Step::send("half"), Step::Delay(Duration::from_millis(30)), Step::Rst]),
            ("stall", vec![head("100"), Step::send("half"), Step::Stall]),
            (
                "no last chunk",
                vec![
                    chunked.clone(),
                    reply::chunk("half"),
                    Step::Delay(Duration::from_millis(30)),
                    Step::Fin,
                ],
            ),
            (
                "broken chunk",
                vec![
                    chunked.clone(),
                    reply::chunk("half"),
                    Step::Delay(Duration::from_millis(30)),
                    Step::send("zz\r\n"),
                ],
            ),
        ] {
            let sick = Backend::start(Script::new().answer(steps)).await;
            let peer = Backend::healthy().await;
            let proxy =
                Proxy::start(&in_order(&[&sick.url(), &peer.url()]).set("pool.clocks.body_idle", "200ms"));
            let answer = http.send(proxy.addr, &Request::get("/v1/audio/1")).await;
            assert_eq!((answer.status, answer.text().as_str()), (200, "half"), "{name}");
            match http {
                Http::One => assert_eq!(answer.end, End::Cut, "{name}"),
                Http::Two => assert!(matches!(answer.end, End::Reset(_)), "{name}: {:?}", answer.end),
            }
            proxy.is_quiet().await;
            assert_eq!((faults(&proxy, &sick), peer.requests().len()), (1, 0), "{name}");
        }
        // Before the first byte a peer can still be asked.
        let steps = vec![chunked, Step::Fin];
        let sick = Backend::start(Script::new().answer(steps)).await;
        let peer = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &peer.url()]));
        let answer = http.send(proxy.addr, &Request::get("/v1/audio/1")).await;
        assert_eq!((answer.status, answer.json()["target"].as_str()), (200, Some("/v1/audio/1")));
        assert_eq!(faults(&proxy, &sick), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn answers_beyond_what_is_held_back_are_passed_on_as_they_come() {
    for http in Http::BOTH {
        let filler = "x".repeat(200_000);
        let whole =
            json!({"choices": [{"index": 0, "message": {"content": filler}, "finish_reason": "stop"}]});
        let big = Backend::start(Script::new().answer_json(200, &whole)).await;
        let proxy = Proxy::start(&in_order(&[&big.url()]).set("limits.held_body_max", "64KiB"));
        let answer = http.send(proxy.addr, &chat_request(false)).await;
        assert_eq!((answer.status, answer.json()), (200, whole));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f14_events_before_the_first_token_of_a_lost_backend_never_reach_the_client() {
    for http in Http::BOTH {
        // The role and half a token; the identity of the stream must be one.
        let mut steps = reply::sse_open(&[
            "data: {\"id\":\"lost\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        ]);
        steps.push(reply::chunk(
            "data: {\"id\":\"lost\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"t",
        ));
        let sick = Backend::start(Script::new().answer(steps.then(Step::Fin))).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(faults(&proxy, &sick), 1);
        proxy.is_quiet().await;
    }
}
