//! Part of the stream is at the client when its backend fails (F16 to F18, F21, F23).
//!
//! The client sees whole events, then one error event of its dialect, then the clean end of the body, and
//! nothing that could be taken for success. Behind a good finish the answer is completed here instead.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::backend::{Backend, Script};
use crate::support::client::{Answer, End, Request, chat_request, stream_seen};
use crate::support::either::{AT_ONCE, Http, assert_is_the_stream, faults, in_order};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Step};
use crate::support::proxy::Proxy;
use crate::support::reply::{self, Step, Talk, Then as _};

/// An API's stream: the request, and its events as an engine sends them.
struct Api {
    name: &'static str,
    request: Request,
    content_type: &'static str,
    /// Some tokens, nothing of an end.
    begun: Vec<String>,
    /// The finish, the engine's and the protocol's.
    rest: Vec<String>,
    /// What is wrong with a last event that is no such error; empty when nothing.
    error: fn(&str) -> String,
}

fn sse(name: Option<&str>, data: &Value) -> String {
    let name = name.map(|name| format!("event: {name}\n")).unwrap_or_default();
    format!("{name}data: {data}\n\n")
}

fn apis() -> Vec<Api> {
    let talk = Talk::default();
    let completion = |text: &str, finish: Value| {
        sse(
            None,
            &json!({"id": "cmpl-1", "object": "text_completion", "model": "test-model",
            "choices": [{"index": 0, "text": text, "finish_reason": finish}]}),
        )
    };
    let response = |sequence: u64, kind: &str, extra: Value| {
        let mut data = json!({"type": kind, "sequence_number": sequence});
        data.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        sse(Some(kind), &data)
    };
    let message = |kind: &str, extra: Value| {
        let mut data = json!({"type": kind});
        data.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        sse(Some(kind), &data)
    };
    let delta = |text: &str| {
        message("content_block_delta", json!({"index": 0, "delta": {"type": "text_delta", "text": text}}))
    };
    let line = |text: &str, done: bool| {
        let mut line =
            json!({"model": "test-model", "message": {"role": "assistant", "content": text}, "done": done});
        if done {
            line["done_reason"] = json!("stop");
        }
        format!("{line}\n")
    };
    let asked = json!({"model": "test-model", "stream": true});
    let chat_events = talk.chat_events(true);
    vec![
        Api {
            name: "chat",
            request: chat_request(true),
            content_type: "text/event-stream",
            begun: chat_events[..4].to_vec(),
            rest: chat_events[4..].to_vec(),
            error: openai_error,
        },
        Api {
            name: "completions",
            request: Request::post_json("/v1/completions", &asked),
            content_type: "text/event-stream",
            begun: vec![completion("a", Value::Null), completion(" b", Value::Null)],
            rest: vec![completion("", json!("stop")), "data: [DONE]\n\n".to_owned()],
            error: openai_error,
        },
        Api {
            name: "responses",
            request: Request::post_json("/v1/responses", &asked),
            content_type: "text/event-stream",
            begun: vec![
                response(
                    0,
                    "response.created",
                    json!({"response": {"id": "resp_1", "status": "in_progress"}}),
                ),
                response(1, "response.output_text.delta", json!({"item_id": "m", "delta": "a"})),
                response(2, "response.output_text.delta", json!({"item_id": "m", "delta": "b"})),
            ],
            rest: vec![response(
                3,
                "response.completed",
                json!({"response": {"id": "resp_1", "status": "completed"}}),
            )],
            error: |event| {
                let Some(data) = event.strip_prefix("event: response.failed\ndata: ") else {
                    return "no response.failed".to_owned();
                };
                let data: Value = serde_json::from_str(data.trim_end()).unwrap();
                match (data["sequence_number"].as_u64(), data["response"]["error"]["code"].as_str()) {
                    (Some(3), Some("replica_lost" | "backend_timeout")) => String::new(),
                    _ => data.to_string(),
                }
            },
        },
        Api {
            name: "messages",
            request: Request::post_json("/v1/messages", &asked),
            content_type: "text/event-stream",
            begun: vec![
                message(
                    "message_start",
                    json!({"message": {"id": "msg_1", "content": [], "stop_reason": null}}),
                ),
                message(
                    "content_block_start",
                    json!({"index": 0, "content_block": {"type": "text", "text": ""}}),
                ),
                message("ping", json!({})),
                delta("a"),
                delta(" b"),
            ],
            rest: vec![
                message("content_block_stop", json!({"index": 0})),
                message(
                    "message_delta",
                    json!({"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}),
                ),
                message("message_stop", json!({})),
            ],
            error: |event| {
                let Some(data) = event.strip_prefix("event: error\ndata: ") else {
                    return "no error event".to_owned();
                };
                let data: Value = serde_json::from_str(data.trim_end()).unwrap();
                let is_error = data["type"] == "error" && data["error"]["type"].is_string();
                if is_error { String::new() } else { data.to_string() }
            },
        },
        Api {
            name: "ollama",
            request: Request::post_json("/api/chat", &json!({"model": "test-model"})),
            content_type: "application/x-ndjson",
            begun: vec![line("a", false), line(" b", false)],
            rest: vec![line("", true)],
            error: line_error,
        },
        Api {
            name: "ollama generate",
            request: Request::post_json("/api/generate", &json!({"model": "test-model", "prompt": "x"})),
            content_type: "application/x-ndjson",
            begun: vec![response_line("a", false), response_line(" b", false)],
            rest: vec![response_line("", true)],
            error: line_error,
        },
        Api {
            name: "llama.cpp",
            request: Request::post_json("/completion", &json!({"prompt": "x", "stream": true})),
            content_type: "text/event-stream",
            begun: vec![
                sse(None, &json!({"index": 0, "content": "a", "tokens": [1], "stop": false})),
                sse(None, &json!({"index": 0, "content": " b", "tokens": [2], "stop": false})),
            ],
            rest: vec![sse(
                None,
                &json!({"index": 0, "content": "", "stop": true, "stop_type": "eos", "tokens_predicted": 2}),
            )],
            error: |event| {
                let data = data_of(event);
                let (code, said) = (data["error"]["code"].as_u64(), &data["error"]["message"]);
                let is_error = matches!(code, Some(502 | 504)) && said.is_string();
                if is_error { String::new() } else { data.to_string() }
            },
        },
        Api {
            name: "tgi",
            request: Request::post_json("/generate_stream", &json!({"inputs": "x"})),
            content_type: "text/event-stream",
            begun: vec![tgi_token("a", Value::Null), tgi_token(" b", Value::Null)],
            rest: vec![tgi_token("</s>", json!("eos_token"))],
            error: |event| {
                let data = data_of(event);
                let is_error = data["error"].is_string() && data["error_type"].is_string();
                if is_error { String::new() } else { data.to_string() }
            },
        },
        Api {
            name: "sglang",
            request: Request::post_json("/generate", &json!({"text": "x", "stream": true})),
            content_type: "text/event-stream",
            begun: vec![
                sse(None, &json!({"text": "a", "meta_info": {"id": "1", "finish_reason": null}})),
                sse(None, &json!({"text": "a b", "meta_info": {"id": "1", "finish_reason": null}})),
            ],
            rest: vec![
                sse(
                    None,
                    &json!({"text": "a b", "meta_info": {"id": "1", "finish_reason": {"type": "stop"}}}),
                ),
                "data: [DONE]\n\n".to_owned(),
            ],
            error: |event| {
                let data = data_of(event);
                let is_error = data["error"].is_string() && data["error_type"].is_string();
                if is_error { String::new() } else { data.to_string() }
            },
        },
        Api {
            name: "kserve",
            request: Request::post_json(
                "/v2/models/test-model/generate_stream",
                &json!({"text_input": "x", "parameters": {"stream": true}}),
            ),
            content_type: "text/event-stream",
            begun: vec![
                sse(None, &json!({"model_name": "test-model", "text_output": "a"})),
                sse(None, &json!({"model_name": "test-model", "text_output": " b"})),
            ],
            rest: vec![sse(None, &json!({"model_name": "test-model", "text_output": "."}))],
            error: |event| {
                let data = data_of(event);
                let is_error = data["error"].is_string() && data["text_output"].is_null();
                if is_error { String::new() } else { data.to_string() }
            },
        },
    ]
}

fn response_line(text: &str, done: bool) -> String {
    let mut line = json!({"model": "test-model", "response": text, "done": done});
    if done {
        line["done_reason"] = json!("stop");
    }
    format!("{line}\n")
}

fn tgi_token(text: &str, finish: Value) -> String {
    let mut data =
        json!({"index": 1, "token": {"id": 1, "text": text, "special": !finish.is_null()}, "details": null});
    if !finish.is_null() {
        data["generated_text"] = json!("a b");
        data["details"] = json!({"finish_reason": finish, "generated_tokens": 3});
    }
    sse(None, &data)
}

fn line_error(line: &str) -> String {
    let data: Value = serde_json::from_str(line.trim_end()).unwrap();
    let is_error = data["error"].is_string() && data["done"].is_null();
    if is_error { String::new() } else { data.to_string() }
}

/// The JSON of a plain event; null when it is none.
fn data_of(event: &str) -> Value {
    event
        .strip_prefix("data: ")
        .and_then(|data| serde_json::from_str(data.trim_end()).ok())
        .unwrap_or_default()
}

fn openai_error(event: &str) -> String {
    let Some(data) = event.strip_prefix("data: ") else { return "no data".to_owned() };
    let data: Value = serde_json::from_str(data.trim_end()).unwrap();
    match data["error"]["code"].as_str() {
        Some("replica_lost" | "backend_timeout") if data["error"]["type"] == "server_error" => String::new(),
        _ => data.to_string(),
    }
}

impl Api {
    fn head(&self) -> Step {
        Step::Send(reply::head(200, &[("content-type", self.content_type), ("transfer-encoding", "chunked")]))
    }

    fn is_lines(&self) -> bool {
        self.content_type != "text/event-stream"
    }

    /// The stream so far as it has begun, each event by itself.
    fn opened(&self) -> Vec<Step> {
        let begun = self.begun.iter().map(reply::chunk);
        // The client has read them before anything else happens.
        std::iter::once(self.head()).chain(begun).chain([Step::Delay(Duration::from_millis(20))]).collect()
    }

    /// Panics unless the answer is what had begun, one error, and a clean end.
    fn assert_ended_visibly(&self, answer: &Answer, why: &str) {
        let begun = self.begun.concat();
        let text = answer.text();
        let context = format!("{} {why}: {text:?}", self.name);
        assert_eq!((answer.status, answer.end), (200, End::Clean), "{context}");
        assert_eq!(answer.header("content-type"), Some(self.content_type), "{context}");
        let last = text.strip_prefix(&begun).unwrap_or_else(|| panic!("not what had begun: {context}"));
        assert_eq!((self.error)(last), "", "{context}");
        let end = if self.is_lines() { "\n" } else { "\n\n" };
        assert_eq!(last.trim_end().matches(end).count(), 0, "one event: {context}");
        assert!(last.ends_with(end) && !text.contains("[DONE]"), "{context}");
    }
}

/// Ways of failing behind the begun stream.
fn failures(api: &Api) -> Vec<(&'static str, Vec<Step>)> {
    let half = &api.rest[0][..api.rest[0].len() / 2];
    let mut failures = vec![
        ("F16 FIN", vec![Step::Fin]),
        ("F16 RST", vec![Step::Rst]),
        ("F16 FIN inside an event", vec![reply::chunk(half), Step::Fin]),
        ("F21 a broken chunk size", vec![Step::send("zz\r\n"), Step::Stall]),
        ("F19 silence", vec![Step::Stall]),
    ];
    // A clean end is all the end that KServe has.
    if api.name != "kserve" {
        failures.push(("F17 a clean end", vec![reply::last_chunk()]));
    }
    if api.is_lines() {
        let error = "{\"error\":\"llama runner process no longer running\"}\n";
        failures.push(("F18 an error line", vec![reply::chunk(error), reply::last_chunk()]));
        failures.push(("F21 garbage", vec![reply::chunk("\u{0}\u{1}nonsense\n"), Step::Stall]));
    } else {
        failures.push(("F21 no JSON", vec![reply::chunk("data: {\"choices\":[{]\n\n"), Step::Stall]));
        failures.push(("F21 garbage", vec![reply::chunk("data: \u{1}\u{2}\u{fffd}\n\n"), Step::Stall]));
    }
    match api.name {
        "chat" | "completions" => {
            let error = "data: {\"error\":{\"message\":\"boom\",\"type\":\"server_error\",\"code\":500}}\n\n";
            let done = "data: [DONE]\n\n";
            let abort = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"text\":\"\",\"finish_reason\":\"abort\"}]}\n\n";
            failures.extend([
                ("F17 DONE without a finish", vec![reply::chunk(done), reply::last_chunk()]),
                ("F18 an error event", vec![reply::chunk(error), reply::last_chunk()]),
                (
                    "F18 an error event and DONE",
                    vec![reply::chunk(error), reply::chunk(done), reply::last_chunk()],
                ),
                ("F18 abort and DONE", vec![reply::chunk(abort), reply::chunk(done), reply::last_chunk()]),
            ]);
        }
        "messages" => {
            let error = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"boom\"}}\n\n";
            failures.push(("F18 an error event", vec![reply::chunk(error), reply::last_chunk()]));
        }
        "responses" => {
            let error = "event: error\ndata: {\"type\":\"error\",\"code\":\"server_error\",\"message\":\"boom\",\"sequence_number\":3}\n\n";
            failures.push(("F18 an error event", vec![reply::chunk(error), reply::last_chunk()]));
            let failed = "event: response.failed\ndata: {\"type\":\"response.failed\",\"sequence_number\":3,\"response\":{\"id\":\"resp_1\",\"status\":\"failed\",\"error\":{\"code\":\"server_error\",\"message\":\"boom\"}}}\n\n";
            failures.push(("F18 a failed response", vec![reply::chunk(failed), reply::last_chunk()]));
        }
        "llama.cpp" => {
            let error = "{\"error\":{\"code\":500,\"message\":\"boom\",\"type\":\"server_error\"}}\n\n";
            let (event, field) = (format!("data: {error}"), format!("error: {error}"));
            failures.push(("F18 an error event", vec![reply::chunk(event), reply::last_chunk()]));
            failures.push(("F18 an error field", vec![reply::chunk(field), reply::last_chunk()]));
        }
        "tgi" => {
            let error =
                "data:{\"error\":\"Request failed during generation\",\"error_type\":\"generation\"}\n\n";
            failures.push(("F18 an error event", vec![reply::chunk(error), reply::last_chunk()]));
        }
        "sglang" => {
            let abort = "data: {\"text\":\"a b\",\"meta_info\":{\"finish_reason\":{\"type\":\"abort\",\"message\":\"x\"}}}\n\n";
            let done = "data: [DONE]\n\n";
            failures.push((
                "F18 abort and DONE",
                vec![reply::chunk(abort), reply::chunk(done), reply::last_chunk()],
            ));
            failures.push(("F17 DONE without a finish", vec![reply::chunk(done), reply::last_chunk()]));
        }
        "kserve" => {
            let error = "data: {\"error\":\"in ensemble, boom\"}\n\n";
            failures.push(("F18 an error event", vec![reply::chunk(error), reply::last_chunk()]));
        }
        _ => {}
    }
    failures
}

async fn breaks_visibly(http: Http) {
    for api in apis() {
        for (why, end) in failures(&api) {
            let mut steps = api.opened();
            steps.extend(end);
            let sick = Backend::start(Script::new().answer(steps)).await;
            let peer = Backend::healthy().await;
            let proxy = Proxy::start(
                &in_order(&[&sick.url(), &peer.url()])
                    // Where it goes on elsewhere nothing is seen of the break: `tests/resume`.
                    .set("pool.resume.mode", "off")
                    .set("pool.clocks.inter_token", "100ms")
                    .set("pool.clocks.silence_max", "200ms"),
            );
            let answer = http.send(proxy.addr, &api.request).await;
            api.assert_ended_visibly(&answer, why);
            proxy.is_quiet().await;
            assert_eq!(faults(&proxy, &sick), 1, "{} {why}", api.name);
            assert_eq!((sick.requests().len(), peer.requests().len()), (1, 0), "{} {why}", api.name);
            let seen = &sick.requests()[0];
            if end_is_ours(why) {
                let closed = sick.closed_by_peer(seen.connection).await;
                assert!(closed - seen.at < Duration::from_millis(350) + AT_ONCE, "{} {why}", api.name);
            }
        }
    }
}

/// The backend keeps its connection: it is for evergate to close it.
fn end_is_ours(why: &str) -> bool {
    matches!(why, "F19 silence" | "F21 garbage" | "F21 no JSON" | "F21 a broken chunk size")
}

#[tokio::test]
async fn a_broken_stream_ends_with_one_error_event_of_its_dialect_over_http_1() {
    breaks_visibly(Http::One).await;
}

#[tokio::test]
async fn a_broken_stream_ends_with_one_error_event_of_its_dialect_over_http_2() {
    breaks_visibly(Http::Two).await;
}

#[tokio::test]
async fn f16_a_process_that_dies_takes_no_whole_event_with_it() {
    for http in Http::BOTH {
        let dying = Backend::start(
            Script::new().answer(reply::sse_open(&Talk::default().chat_events_begun(5)).then(Step::Stall)),
        )
        .await;
        let proxy = Proxy::start(&in_order(&[&dying.url()]));
        let address = proxy.addr;
        let streaming = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        dying.has_seen(1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        dying.stop().await;
        let answer = streaming.await.unwrap();
        let seen = stream_seen(&answer);
        assert_eq!((seen.text.as_str(), seen.errors.len(), seen.done), ("t0 t1 t2 t3 t4", 1, 0));
        assert_eq!(answer.end, End::Clean);
        proxy.is_quiet().await;
        assert_eq!(faults(&proxy, &dying), 1);
    }
}

#[tokio::test]
async fn f16_a_reset_stream_of_an_http_2_backend_is_a_fault_and_said_so() {
    for http in Http::BOTH {
        let begun = Talk::default().chat_events_begun(3);
        let sick = H2Backend::start(move |_| {
            H2Answer::sse(&begun).step(H2Step::Delay(Duration::from_millis(20))).step(H2Step::Reset)
        })
        .await;
        let proxy = Proxy::start(&in_order(&[&sick.url()]).set("pool.http", "2"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        let seen = stream_seen(&answer);
        assert_eq!((seen.text.as_str(), seen.errors.len(), seen.done), ("t0 t1 t2", 1, 0));
        assert_eq!(answer.end, End::Clean);
        proxy.is_quiet().await;
        use evergate::telemetry::metrics::AttemptOutcome;
        assert_eq!(proxy.backend(sick.addr()).metrics.attempts(AttemptOutcome::Fault), 1);
    }
}

/// What is cut off behind the finish, and how the backend ends.
#[tokio::test]
async fn f23_what_breaks_behind_the_finish_is_completed_here() {
    for http in Http::BOTH {
        for api in apis() {
            // The last event with a finish: all but the terminator, and for chats all but the usage too.
            let kept = match api.name {
                "chat" => api.rest.len() - 2,
                "completions" => 1,
                "messages" => 2,
                _ => continue,
            };
            let whole: String = api.begun.iter().chain(&api.rest[..kept]).map(String::as_str).collect();
            let terminator = api.rest.last().unwrap();
            for (why, end) in [
                ("FIN", vec![Step::Fin]),
                ("RST", vec![Step::Rst]),
                ("half an event", vec![reply::chunk(&terminator[..9]), Step::Fin]),
                ("garbage", vec![reply::chunk("data: {nonsense\n\n"), Step::Stall]),
                ("silence", vec![Step::Stall]),
            ] {
                let mut steps = api.opened();
                steps.extend(api.rest[..kept].iter().map(reply::chunk));
                steps.push(Step::Delay(Duration::from_millis(20)));
                steps.extend(end);
                let sick = Backend::start(Script::new().answer(steps)).await;
                let proxy = Proxy::start(&in_order(&[&sick.url()]).set("pool.clocks.inter_token", "150ms"));
                let answer = http.send(proxy.addr, &api.request).await;
                assert_eq!(answer.text(), format!("{whole}{terminator}"), "{} {why}", api.name);
                assert_eq!((answer.status, answer.end), (200, End::Clean), "{} {why}", api.name);
                assert!(answer.elapsed < Duration::from_secs(3), "{} {why}: {:?}", api.name, answer.elapsed);
                proxy.is_quiet().await;
                assert_eq!(faults(&proxy, &sick), 1, "{} {why}", api.name);
            }
        }
    }
}

#[tokio::test]
async fn f23_what_breaks_behind_the_terminator_is_nobodys_loss() {
    for http in Http::BOTH {
        // KServe has no terminator but the end itself.
        for api in apis().into_iter().filter(|api| api.name != "kserve") {
            let whole: String = api.begun.iter().chain(&api.rest).map(String::as_str).collect();
            for (why, end) in [("FIN", Step::Fin), ("RST", Step::Rst), ("silence", Step::Stall)] {
                let mut steps = api.opened();
                steps.extend(api.rest.iter().map(reply::chunk));
                steps.extend([Step::Delay(Duration::from_millis(20)), end]);
                let sick = Backend::start(Script::new().answer(steps)).await;
                let proxy = Proxy::start(&in_order(&[&sick.url()]).set("pool.clocks.inter_token", "150ms"));
                let answer = http.send(proxy.addr, &api.request).await;
                assert_eq!((answer.text(), answer.end), (whole.clone(), End::Clean), "{} {why}", api.name);
                assert!(answer.elapsed < Duration::from_secs(3), "{} {why}: {:?}", api.name, answer.elapsed);
                proxy.is_quiet().await;
            }
        }
    }
}

#[tokio::test]
async fn events_arrive_whole_and_unchanged_however_the_backend_cuts_them_up() {
    for http in Http::BOTH {
        let bytes = Talk::default().chat_events(true).concat();
        for piece in [1, 7, 64, 1000] {
            let pieces = bytes.as_bytes().chunks(piece).map(reply::chunk);
            let steps: Vec<Step> =
                std::iter::once(reply::sse_head()).chain(pieces).chain([reply::last_chunk()]).collect();
            let odd = Backend::start(Script::new().answer(steps)).await;
            let proxy = Proxy::start(&in_order(&[&odd.url()]));
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
            proxy.is_quiet().await;
            assert_eq!(faults(&proxy, &odd), 0);
        }
    }
}

#[tokio::test]
async fn tokens_are_passed_on_as_they_come() {
    for http in Http::BOTH {
        let slow = Backend::start(Script::new().talk(Talk::default().gap(Duration::from_millis(60)))).await;
        let proxy = Proxy::start(&in_order(&[&slow.url()]));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_is_the_stream(&answer);
        // Eleven gaps behind the first token; a buffer would bring them in one.
        assert!(answer.arrivals.len() >= 6, "{:?}", answer.arrivals);
        let (first, last) = (answer.arrivals[0].0, answer.arrivals[answer.arrivals.len() - 1].0);
        assert!(last - first >= Duration::from_millis(400), "{:?}", answer.arrivals);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn silence_is_borne_while_nothing_is_known_against_the_backend() {
    for http in Http::BOTH {
        let events = Talk::default().chat_events(true);
        let mut steps = reply::sse_open(&events[..4]);
        for event in &events[4..6] {
            steps.extend([Step::Delay(Duration::from_millis(400)), reply::chunk(event)]);
        }
        steps.extend(events[6..].iter().map(reply::chunk));
        let thinking = Backend::start(Script::new().answer(steps.then(reply::last_chunk()))).await;
        let proxy = Proxy::start(&in_order(&[&thinking.url()]).set("pool.clocks.inter_token", "100ms"));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        proxy.is_quiet().await;
        assert_eq!(faults(&proxy, &thinking), 0);
    }
}
