//! Simulated replicas behave like the engines they stand for, in health and in every fault.

use std::time::{Duration, Instant};

use evergate::sim::{Fault, Replica, ReplicaConfig, Skin};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::support::client::{
    Answer, Client, End, H2Client, Request, assert_is_healthy_stream, chat_request_for, send, stream_seen,
};
use crate::support::{PATIENCE, eventually, within};

const SKINS: [Skin; 4] = [Skin::Vllm, Skin::Sglang, Skin::LlamaCpp, Skin::Generic];

fn quick(skin: Skin) -> ReplicaConfig {
    ReplicaConfig {
        model: "m".to_owned(),
        skin,
        tokens_per_second: 0.0,
        first_token: Duration::ZERO,
        tokens: 30,
        ..ReplicaConfig::default()
    }
}

fn chat(stream: bool) -> Request {
    chat_request_for("m", "Why do two lights matter?", stream)
}

async fn faulty(skin: Skin, fault: Fault) -> Replica {
    let replica = Replica::start(quick(skin)).await.unwrap();
    replica.set_fault(fault);
    replica
}

/// Text, whole or streamed, of an answer that is well.
fn text_of(answer: &Answer) -> String {
    match answer.header("content-type") {
        Some(kind) if kind.starts_with("text/event-stream") => assert_is_healthy_stream(answer).text,
        _ => answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
    }
}

#[tokio::test]
async fn one_request_has_one_answer_on_every_replica_skin_and_protocol() {
    let mut texts = Vec::new();
    for skin in SKINS {
        let replica = Replica::start(quick(skin)).await.unwrap();
        let h2 = H2Client::connect(replica.addr()).await;
        for stream in [true, false] {
            texts.push(text_of(&send(replica.addr(), &chat(stream)).await));
            texts.push(text_of(&h2.send(&chat(stream)).await));
        }
        let stats = replica.stats();
        assert_eq!((stats.requests, stats.completed, stats.in_flight, stats.streams_cut), (4, 4, 0, 0));
    }
    assert!(texts[0].len() > 100 && texts[0].ends_with('.'), "{}", texts[0]);
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:#?}");
}

#[tokio::test]
async fn each_skin_frames_its_stream_like_its_engine() {
    for skin in SKINS {
        let replica = Replica::start(quick(skin)).await.unwrap();
        let answer = send(replica.addr(), &chat(true)).await;
        let events = answer.events();
        let at = |from_end: usize| events[events.len() - 1 - from_end].json();
        assert_eq!(events[0].json()["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(at(1)["choices"], json!([]), "usage has a chunk of its own");
        assert!(at(1)["usage"]["completion_tokens"].as_u64().unwrap() >= 30);
        let finish = &at(2)["choices"][0];
        assert_eq!(finish["finish_reason"], "stop");
        assert_eq!(finish["delta"]["content"].is_string(), skin == Skin::Vllm, "{finish}");
        assert_eq!(events[0].json()["choices"][0]["delta"]["content"].is_null(), skin == Skin::LlamaCpp);
        assert_eq!(
            events[1].json()["system_fingerprint"].is_string(),
            matches!(skin, Skin::LlamaCpp | Skin::Generic)
        );
        assert_eq!(finish.get("matched_stop").is_some(), skin == Skin::Sglang);
        assert_eq!(at(1)["timings"].is_object(), skin == Skin::LlamaCpp);
        let models = send(replica.addr(), &Request::get("/v1/models")).await.json();
        assert_eq!(models["data"][0]["id"], "m");
        assert_eq!(send(replica.addr(), &Request::get("/health")).await.status, 200);
    }
}

#[tokio::test]
async fn messages_completions_and_embeddings_are_served() {
    let replica = Replica::start(quick(Skin::Vllm)).await.unwrap();
    let body = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]});
    let whole = send(replica.addr(), &Request::post_json("/v1/messages", &body)).await.json();
    assert_eq!(
        (whole["stop_reason"].as_str(), whole["usage"]["output_tokens"].as_u64()),
        (Some("max_tokens"), Some(9))
    );
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let events = send(replica.addr(), &Request::post_json("/v1/messages", &streamed)).await.events();
    let names: Vec<&str> = events.iter().filter_map(|event| event.name.as_deref()).collect();
    assert_eq!(names[..3], ["message_start", "content_block_start", "ping"]);
    assert_eq!(names[12..], ["content_block_stop", "message_delta", "message_stop"]);
    let text: String =
        events.iter().filter_map(|event| event.json()["delta"]["text"].as_str().map(str::to_owned)).collect();
    assert_eq!(whole["content"][0]["text"], text);

    let body = json!({"model": "m", "prompt": "Once upon a time", "stream": true, "return_token_ids": true});
    let answer = send(replica.addr(), &Request::post_json("/v1/completions", &body)).await;
    let seen = assert_is_healthy_stream(&answer);
    assert_eq!(seen.finish, ["length"]);
    let first = answer.events()[0].json();
    assert!(
        first["choices"][0]["prompt_token_ids"].is_array() && first["choices"][0]["token_ids"].is_array()
    );

    let embed = |format: &str| json!({"model": "m", "input": ["one", "two"], "encoding_format": format});
    let floats = send(replica.addr(), &Request::post_json("/v1/embeddings", &embed("float"))).await.json();
    assert_eq!(floats["data"][1]["embedding"].as_array().map(Vec::len), Some(64));
    let base64 = send(replica.addr(), &Request::post_json("/v1/embeddings", &embed("base64"))).await.json();
    // 64 floats of 4 bytes: 256 bytes are 85 groups of three and one byte.
    let text = base64["data"][0]["embedding"].as_str().unwrap();
    assert!(text.len() == 344 && text.ends_with("==") && !text[..342].contains('='));
    assert_eq!(send(replica.addr(), &chat_request_for("other", "Hi", false)).await.status, 404);
}

#[tokio::test]
async fn a_stream_cut_after_any_token_continues_exactly_on_another_replica() {
    let whole = {
        let replica = Replica::start(quick(Skin::LlamaCpp)).await.unwrap();
        text_of(&send(replica.addr(), &chat(true)).await)
    };
    let second = Replica::start(quick(Skin::LlamaCpp)).await.unwrap();
    for cut in [0, 1, 7, 29] {
        let first = faulty(Skin::LlamaCpp, Fault::CutAfterTokens(cut)).await;
        let answer = send(first.addr(), &chat(true)).await;
        assert_eq!(answer.end, End::Cut);
        let begun = stream_seen(&answer).text;
        assert_eq!(begun.split(' ').filter(|word| !word.is_empty()).count() >= 1, cut > 0);
        assert!(whole.starts_with(&begun) && begun.len() < whole.len());
        let mut body: Value = serde_json::from_slice(&chat(true).body).unwrap();
        body["messages"].as_array_mut().unwrap().push(json!({"role": "assistant", "content": begun}));
        let rest = send(second.addr(), &Request::post_json("/v1/chat/completions", &body)).await;
        assert_eq!(begun + &assert_is_healthy_stream(&rest).text, whole, "cut after {cut}");
        assert_eq!(first.stats().streams_cut, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_shows_on_the_wire_as_the_catalogue_says() {
    for skin in SKINS {
        let whole = text_of(&send(faulty(skin, Fault::None).await.addr(), &chat(true)).await);
        let begun = |answer: &Answer| {
            let seen = stream_seen(answer);
            assert!(whole.starts_with(&seen.text) && seen.text.len() < whole.len());
            seen
        };
        let ask = async |fault| send(faulty(skin, fault).await.addr(), &chat(true)).await;

        for fault in [Fault::CutAfterTokens(5), Fault::ResetAfterTokens(5)] {
            let answer = ask(fault).await;
            assert_eq!(answer.end, End::Cut, "{skin:?} {fault:?}");
            assert!(!begun(&answer).text.is_empty(), "{skin:?} {fault:?}");
        }
        let answer = ask(Fault::CleanEndWithoutFinish(5)).await;
        let seen = begun(&answer);
        assert_eq!((answer.end, seen.finish.len(), seen.done), (End::Clean, 0, 0));
        let seen = begun(&ask(Fault::ErrorEventAfterTokens(5)).await);
        assert_eq!((seen.errors.len(), seen.done), (1, usize::from(skin != Skin::Generic)));
        let answer = ask(Fault::ErrorEventFirst).await;
        assert!(answer.status == 200 && answer.events()[0].json()["error"].is_object());
        let seen = begun(&ask(Fault::AbortFinishAfterTokens(5)).await);
        assert_eq!((seen.finish, seen.done), (vec!["abort".to_owned()], 1));
        let answer = ask(Fault::GarbageAfterTokens(5)).await;
        assert!(answer.end == End::Clean && answer.text().contains("garbage"));
        let seen = stream_seen(&ask(Fault::RepeatAfterTokens(5)).await);
        assert!(seen.text.ends_with("!!!!!!!!") && seen.done == 1);
        let answer = ask(Fault::CutAfterFinish).await;
        let seen = stream_seen(&answer);
        assert_eq!((answer.end, seen.text, seen.finish.len(), seen.done), (End::Cut, whole.clone(), 1, 0));
        assert_eq!(ask(Fault::Status(502)).await.status, 502);
        let answer = ask(Fault::Busy { retry_after: Some(Duration::from_millis(1500)) }).await;
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("2")));
        let answer = ask(Fault::EmptyBody).await;
        assert_eq!((answer.status, answer.body.len()), (200, 0));
        assert_eq!(
            ask(Fault::WrongContentType).await.header("content-type"),
            Some("text/html; charset=utf-8")
        );

        let replica = faulty(skin, Fault::CloseBeforeHead).await;
        let mut client = Client::connect(replica.addr()).await;
        client.write(&chat(true).to_bytes()).await.unwrap();
        assert!(client.is_closed_within(PATIENCE).await);
        for fault in [Fault::NoAnswer, Fault::NoFirstToken, Fault::StallAfterTokens(3)] {
            let replica = faulty(skin, fault).await;
            let mut client = Client::connect(replica.addr()).await;
            client.write(&chat(true).to_bytes()).await.unwrap();
            let answer = tokio::time::timeout(Duration::from_millis(50), client.try_read_answer("POST"));
            assert!(answer.await.is_err(), "{skin:?} {fault:?}");
            assert_eq!(send(replica.addr(), &Request::get("/health")).await.status, 200);
            drop(client);
            eventually(PATIENCE, || replica.stats().cancelled == 1 && replica.stats().in_flight == 0).await;
        }
        let replica = faulty(skin, Fault::Loading).await;
        assert_eq!(send(replica.addr(), &Request::get("/health")).await.status, 503);
        replica.set_fault(Fault::Unhealthy);
        assert_eq!(send(replica.addr(), &Request::get("/health")).await.status, 503);
        assert_eq!(text_of(&send(replica.addr(), &chat(true)).await), whole);
        replica.set_fault(Fault::ErrorRate(0.5));
        let mut statuses = Vec::new();
        for _ in 0..4 {
            statuses.push(send(replica.addr(), &chat(false)).await.status);
        }
        assert_eq!(statuses.iter().filter(|status| **status == 500).count(), 2);
    }
}

#[tokio::test]
async fn answers_that_are_not_streamed_fail_in_their_own_ways() {
    let ask = async |fault| send(faulty(Skin::Vllm, fault).await.addr(), &chat(false)).await;
    for fault in [Fault::CutAfterTokens(5), Fault::ResetAfterTokens(5), Fault::CutAfterFinish] {
        let answer = ask(fault).await;
        assert_eq!((answer.status, answer.end), (200, End::Cut), "{fault:?}");
        assert!(!answer.body.is_empty());
    }
    for fault in [Fault::CleanEndWithoutFinish(5), Fault::TruncatedJson, Fault::GarbageAfterTokens(5)] {
        let answer = ask(fault).await;
        assert_eq!((answer.status, answer.end), (200, End::Clean), "{fault:?}");
        assert!(serde_json::from_slice::<Value>(&answer.body).is_err(), "{fault:?}");
    }
    assert_eq!(ask(Fault::ErrorEventAfterTokens(5)).await.status, 500);
    assert_eq!(ask(Fault::AbortFinishAfterTokens(5)).await.json()["choices"][0]["finish_reason"], "abort");
    let whole = text_of(&ask(Fault::None).await);
    assert_eq!(text_of(&ask(Fault::CutAfterTokens(1_000)).await), whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_resets_refuses_and_comes_back_at_its_address() {
    let mut config = quick(Skin::Vllm);
    config.tokens_per_second = 20.0;
    let replica = Replica::start(config).await.unwrap();
    let mut streaming = Client::connect(replica.addr()).await;
    streaming.write(&chat(true).to_bytes()).await.unwrap();
    let h2 = H2Client::connect(replica.addr()).await;
    let multiplexed = tokio::spawn(async move { h2.try_send(&chat(true)).await });
    eventually(PATIENCE, || replica.stats().in_flight == 2 && replica.stats().tokens > 4).await;
    replica.kill().await;
    replica.kill().await;
    assert!(!replica.is_alive().await);
    assert_eq!(within(PATIENCE, streaming.try_read_answer("POST")).await.unwrap().end, End::Cut);
    assert_ne!(within(PATIENCE, multiplexed).await.unwrap().unwrap().end, End::Clean);
    assert!(TcpStream::connect(replica.addr()).await.is_err());
    // Of HTTP/2 the answers are tasks of their own, and notice a moment later.
    eventually(PATIENCE, || (replica.stats().streams_cut, replica.stats().in_flight) == (2, 0)).await;
    replica.revive().await.unwrap();
    assert!(replica.is_alive().await);
    assert_is_healthy_stream(&send(replica.addr(), &chat(true)).await);
    let address = replica.addr();
    drop(replica);
    let mut closed = false;
    for _ in 0..200 {
        closed |= TcpStream::connect(address).await.is_err();
        if closed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(closed, "a dropped replica still listens");
}

#[tokio::test]
async fn a_frozen_replica_moves_no_byte_and_goes_on_where_it_stood() {
    let mut config = quick(Skin::Sglang);
    config.tokens_per_second = 200.0;
    let replica = Replica::start(config).await.unwrap();
    let mut client = Client::connect(replica.addr()).await;
    let streaming = tokio::spawn(async move { client.send(&chat(true)).await });
    eventually(PATIENCE, || replica.stats().tokens > 4).await;
    replica.freeze();
    let frozen_at = Instant::now();
    // In the kernel's queue a connection stands, as under SIGSTOP.
    let mut waiting = Client::connect(replica.addr()).await;
    waiting.write(&Request::get("/health").to_bytes()).await.unwrap();
    assert!(!waiting.is_closed_within(Duration::from_millis(100)).await);
    let tokens = replica.stats().tokens;
    assert!(frozen_at.elapsed() >= Duration::from_millis(100) && replica.stats().in_flight == 1);
    replica.thaw();
    let answer = streaming.await.unwrap();
    assert_is_healthy_stream(&answer);
    assert!(answer.longest_gap() >= Duration::from_millis(80), "{:?}", answer.longest_gap());
    assert!(replica.stats().tokens > tokens);
    assert_eq!(within(PATIENCE, waiting.try_read_answer("GET")).await.unwrap().status, 200);
}

#[tokio::test]
async fn pace_slots_and_loading_take_their_time() {
    let mut config = quick(Skin::Generic);
    config.tokens_per_second = 500.0;
    config.first_token = Duration::from_millis(30);
    config.slots = Some(1);
    config.loading = Duration::from_millis(60);
    config.api_key = Some("secret".to_owned());
    let replica = Replica::start(config).await.unwrap();
    let ask = chat(true).header("authorization", "Bearer secret");
    assert_eq!(send(replica.addr(), &chat(true)).await.status, 401);
    assert_eq!(send(replica.addr(), &ask).await.status, 503);
    let mut health = 503;
    let begin = Instant::now();
    while health == 503 && begin.elapsed() < PATIENCE {
        health = send(replica.addr(), &Request::get("/health")).await.status;
    }
    assert_eq!(health, 200);
    let (one, other) = tokio::join!(send(replica.addr(), &ask), send(replica.addr(), &ask));
    for answer in [&one, &other] {
        // 30 ms and at least 29 gaps of 2 ms.
        assert_is_healthy_stream(answer);
        assert!(answer.elapsed >= Duration::from_millis(85), "{:?}", answer.elapsed);
    }
    let slower = one.elapsed.max(other.elapsed);
    assert!(slower >= Duration::from_millis(170), "one slot, two requests: {slower:?}");
}
