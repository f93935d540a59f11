//! Bounds: each is refused in the client's own words, costs nothing beyond it, and is counted.

mod descriptors;

use std::time::Duration;

use bytes::Bytes;
use hyper::body::Frame;
use serde_json::json;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{
    Answer, Client, End, H2Client, Request, assert_is_healthy_stream, chat_request, send,
};
use crate::support::h2_backend::{H2Answer, H2Backend};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually, hash, within};

fn bitten(proxy: &Proxy, limit: &str) -> bool {
    let line = format!("evergate_limits_bitten_total{{limit=\"{limit}\"}}");
    proxy.telemetry.metrics.render().lines().any(|given| given.starts_with(&line))
}

/// A chat whose body is `length` bytes long.
fn chat_of(length: usize) -> Request {
    let (begin, end) = (r#"{"model":"m","messages":[{"role":"user","content":""#, r#""}]}"#);
    let body = format!("{begin}{}{end}", "x".repeat(length - begin.len() - end.len()));
    Request::new("POST", "/v1/chat/completions").header("content-type", "application/json").body(body)
}

fn in_chunks(request: &Request) -> Vec<u8> {
    let head = Request { body: Bytes::new(), ..request.clone() }.header("transfer-encoding", "chunked");
    let mut bytes = head.to_bytes();
    for piece in request.body.chunks(10_000) {
        bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// The answer to bytes of which not all may be read.
async fn answer_to(proxy: &Proxy, bytes: &[u8]) -> Answer {
    let mut client = Client::connect(proxy.addr).await;
    let _may_be_cut = client.write(bytes).await;
    within(PATIENCE, client.try_read_answer("POST")).await.unwrap()
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_before_or_while_it_comes() {
    let backend = Backend::healthy().await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("limits.body_bytes_max", "100KiB");
    let proxy = Proxy::start(&builder);
    assert_eq!(send(proxy.addr, &chat_of(100 << 10)).await.status, 200);
    let h2 = H2Client::connect(proxy.addr).await;
    let request = chat_of((100 << 10) + 1);
    let announced = answer_to(&proxy, &request.to_bytes()).await;
    let counted = answer_to(&proxy, &in_chunks(&request)).await;
    for answer in [announced, counted, h2.send(&request).await] {
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (413, Some("body_too_large")));
    }
    // The announcement is enough: nothing has to come.
    let head = Request::new("POST", "/v1/files").header("content-length", "102401");
    let mut client = Client::connect(proxy.addr).await;
    client.write(&head.to_bytes()).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (413, Some("close")));
    assert!(client.is_closed_within(PATIENCE).await);
    assert_eq!(backend.requests().len(), 1, "only the first");
    proxy.is_quiet().await;
}

/// Nothing says beforehand how long it will be, and the backend has got part of it already.
#[tokio::test]
async fn a_streamed_upload_that_grows_too_large_is_refused_and_the_backend_is_not_to_blame() {
    let old = Backend::healthy().await;
    let new = H2Backend::start(|_| H2Answer::new(200)).await;
    for (url, http) in [(old.url(), "1"), (new.url(), "2")] {
        let builder = ProxyBuilder::new().backend(&url).set("pool.http", http);
        let builder = builder.set("pool.probe.kind", "off").set("limits.body_bytes_max", "100KiB");
        let proxy = Proxy::start(&builder);
        let h2 = H2Client::connect(proxy.addr).await;
        for _ in 0..4 {
            let request = Request::new("POST", "/v1/files").body(vec![b'x'; 200_000]);
            let answer = answer_to(&proxy, &in_chunks(&request)).await;
            assert_eq!(
                (answer.status, answer.json()["error"]["code"].as_str()),
                (413, Some("body_too_large"))
            );
            let (frames, answer) = h2.open(&Request::new("POST", "/v1/files"));
            let uploading = tokio::spawn(async move {
                while frames.send(Frame::data(Bytes::from(vec![b'x'; 10_000]))).await.is_ok() {}
            });
            let answer = within(PATIENCE, answer).await.unwrap();
            assert_eq!(answer.status(), 413);
            drop(answer);
            within(PATIENCE, uploading).await.unwrap();
        }
        // Nor one that its client resets.
        let (frames, answer) = h2.open(&Request::new("POST", "/v1/files"));
        frames.send(Frame::data(Bytes::from(vec![b'x'; 10_000]))).await.unwrap();
        let gone = tokio::time::timeout(Duration::from_millis(50), answer).await;
        assert!(gone.is_err(), "an answer to half an upload");
        proxy.is_quiet().await;
        let metrics = proxy.telemetry.metrics.render();
        let blamed = metrics.lines().find(|line| {
            line.starts_with("evergate_attempts_total")
                && line.contains("outcome=\"fault\"")
                && !line.ends_with(" 0")
        });
        assert_eq!(blamed, None, "a client's fault is no lesson about a backend");
    }
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let backend = Backend::healthy().await;
    let builder = ProxyBuilder::new().backend(&backend.url());
    let proxy = Proxy::start(&builder.set("limits.head_bytes_max", "8KiB").set("limits.headers_max", 20));
    let fits = chat_request(false).header("x-long", &"x".repeat(7000));
    assert_eq!(send(proxy.addr, &fits).await.status, 200);
    let long = chat_request(false).header("x-long", &"x".repeat(9000));
    assert_eq!(answer_to(&proxy, &long.to_bytes()).await.status, 431);
    let many = (0..30).fold(chat_request(false), |request, nth| request.header(&format!("x-{nth}"), "1"));
    assert_eq!(answer_to(&proxy, &many.to_bytes()).await.status, 431);
    assert_eq!(H2Client::connect(proxy.addr).await.send(&many).await.status, 431);
    assert_eq!(backend.requests().len(), 1);
    assert!(bitten(&proxy, "head_bytes_max"));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_upload_that_falls_silent_is_given_up() {
    let backend = Backend::healthy().await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("client.upload_idle", "500ms");
    let proxy = Proxy::start(&builder);
    for path in ["/v1/chat/completions", "/v1/files"] {
        let head = Request::new("POST", path).header("content-length", "100000");
        let mut client = Client::connect(proxy.addr).await;
        client.write(&[&head.to_bytes()[..], b"{\"model\""].concat()).await.unwrap();
        let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (408, Some("upload_timeout")),
            "{path}"
        );
        assert!(answer.elapsed >= Duration::from_millis(500), "{:?}", answer.elapsed);
        assert!(client.is_closed_within(PATIENCE).await);
    }
    // Slow is not silent.
    let request = chat_request(false);
    let mut client = Client::connect(proxy.addr).await;
    let bytes = request.to_bytes();
    let (head, body) = bytes.split_at(bytes.len() - 5);
    client.write(head).await.unwrap();
    for byte in body.chunks(1) {
        tokio::time::sleep(Duration::from_millis(110)).await;
        client.write(byte).await.unwrap();
    }
    assert_eq!(within(PATIENCE, client.try_read_answer("POST")).await.unwrap().status, 200);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_upload_that_is_broken_off_reaches_nobody_or_nobody_whole() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    for path in ["/v1/chat/completions", "/v1/files"] {
        let head = Request::new("POST", path).header("content-length", "100000");
        let mut client = Client::connect(proxy.addr).await;
        client.write(&[&head.to_bytes()[..], b"{\"model\""].concat()).await.unwrap();
        drop(client);
    }
    let body_sized = |seen: &RequestSeen| seen.complete;
    proxy.is_quiet().await;
    assert!(!backend.requests().iter().any(body_sized), "{:?}", backend.requests());
    eventually(PATIENCE, || backend.open_connections() == 0).await;
}

#[tokio::test]
async fn what_is_too_large_to_be_kept_is_passed_on_all_the_same() {
    let backend = Backend::healthy().await;
    let refusing = Backend::refusing().await;
    let builder =
        ProxyBuilder::new().backend(&refusing.url()).backend_with(&backend.url(), &[("tier", 1.into())]);
    let proxy = Proxy::start(&builder.set("limits.replay_body_max", "10KiB"));
    for length in [10 << 10, (10 << 10) + 1, 500_000] {
        let request = chat_of(length);
        for bytes in [request.to_bytes(), in_chunks(&request)] {
            let answer = answer_to(&proxy, &bytes).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert!(backend.requests().pop().unwrap().body == request.body);
        }
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_answer_too_large_to_be_held_is_relayed_as_it_comes() {
    let embedding = vec![0.123_456; 20_000];
    let body = json!({"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": embedding}]});
    let text = body.to_string();
    let pieces: Vec<Step> = text.as_bytes().chunks(20_000).map(reply::chunk).collect();
    let head = [("content-type", "application/json"), ("transfer-encoding", "chunked")];
    let mut steps = vec![Step::Send(reply::head(200, &head))];
    for piece in pieces {
        steps.extend([piece, Step::Delay(Duration::from_millis(5))]);
    }
    let whole = [steps.clone(), vec![reply::last_chunk()]].concat();
    let cut = [steps, vec![Step::Rst]].concat();
    let backend = Backend::start(Script::new().answer(whole).answer(cut)).await;
    let proxy =
        Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("limits.held_body_max", "50KiB"));
    let request = Request::post_json("/v1/embeddings", &json!({"model": "m", "input": "x"}));
    let answer = send(proxy.addr, &request).await;
    assert_eq!((answer.status, answer.end, answer.text() == text), (200, End::Clean, true));
    assert!(bitten(&proxy, "held_body_max"));
    // It cannot be sent again once begun; that shows.
    assert_eq!(send(proxy.addr, &request).await.end, End::Cut);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_event_too_large_to_be_read_is_passed_on() {
    let talk = Talk::of(4);
    let events = talk.chat_events(true);
    let long = events[2].replace("\"t1\"", "\" t1\"").replace(" t1", &format!(" {}", "y".repeat(50_000)));
    let mut changed = events;
    changed[2] = long;
    let whole: String = changed.concat();
    let backend = Backend::start(Script::new().sse(&changed)).await;
    let proxy =
        Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("limits.event_bytes_max", "4KiB"));
    let answer = send(proxy.addr, &chat_request(true)).await;
    assert_eq!((answer.status, answer.end), (200, End::Clean));
    assert!(answer.text() == whole, "unchanged");
    assert!(assert_is_healthy_stream(&answer).text.len() > 50_000);
    assert!(bitten(&proxy, "event_bytes_max"));
    proxy.is_quiet().await;
}

/// Answers after a while, and so holds what it was sent.
fn slow(request: &RequestSeen) -> Vec<Step> {
    match request.path() {
        "/health" => reply::json(200, &json!({})),
        _ => [vec![Step::Delay(Duration::from_millis(400))], reply::healthy(request, &Talk::default())]
            .concat(),
    }
}

async fn memory_is_given_back(proxy: &Proxy) {
    let gauge =
        || proxy.telemetry.metrics.render().lines().any(|line| line == "evergate_memory_held_bytes 0");
    eventually(PATIENCE, gauge).await;
}

#[tokio::test]
async fn without_memory_large_bodies_stream_and_small_ones_are_kept() {
    let backend = Backend::start(Script::new().by_request(slow)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("limits.memory_max", "1MiB"));
    let large = chat_of(700_000);
    let mut first = Client::connect(proxy.addr).await;
    first.write(&large.to_bytes()).await.unwrap();
    backend.has_seen(1).await;
    assert!(!bitten(&proxy, "memory_max"));
    let answer = answer_to(&proxy, &large.to_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(hash(&backend.requests()[1].body), hash(&large.body), "streamed whole");
    assert!(bitten(&proxy, "memory_max"));
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
    assert_eq!(within(PATIENCE, first.try_read_answer("POST")).await.unwrap().status, 200);
    proxy.is_quiet().await;
    memory_is_given_back(&proxy).await;
}

#[tokio::test]
async fn without_memory_what_cannot_be_routed_unread_is_refused_and_small_requests_are_served() {
    let backend = Backend::start(Script::new().by_request(slow)).await;
    let other = Backend::healthy().await;
    let proxy = Proxy::start(
        &ProxyBuilder::new()
            .named_pool("a")
            .backend(&other.url())
            .named_pool("b")
            .backend(&backend.url())
            .set("pool.models", vec!["m", "test-model"])
            .set("limits.memory_max", "1MiB"),
    );
    let large = chat_of(700_000);
    let mut first = Client::connect(proxy.addr).await;
    first.write(&large.to_bytes()).await.unwrap();
    backend.has_seen(1).await;
    let answer = answer_to(&proxy, &large.to_bytes()).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("memory_exhausted")));
    assert!(answer.header("retry-after").is_some());
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200, "what is small is still kept");
    assert_eq!(within(PATIENCE, first.try_read_answer("POST")).await.unwrap().status, 200);
    proxy.is_quiet().await;
    assert_eq!(send(proxy.addr, &large).await.status, 200);
    assert_eq!(other.requests().len(), 0);
    proxy.is_quiet().await;
    memory_is_given_back(&proxy).await;
}

#[tokio::test]
async fn without_memory_a_large_answer_is_relayed_as_it_comes() {
    let held = Backend::start(Script::new().by_request(slow)).await;
    let long = json!({"object": "list", "data": [{"embedding": vec![0.5; 100_000]}]});
    let answering = Backend::start(Script::new().answer_json(200, &long)).await;
    let proxy = Proxy::start(
        &ProxyBuilder::new()
            .named_pool("a")
            .backend(&held.url())
            .set("pool.models", vec!["m"])
            .named_pool("b")
            .backend(&answering.url())
            .route("b", &[("path_prefix", "/v1/embeddings".into())])
            .set("limits.memory_max", "1MiB"),
    );
    let mut first = Client::connect(proxy.addr).await;
    let request = chat_of(700_000);
    first.write(&request.to_bytes()).await.unwrap();
    held.has_seen(1).await;
    let embed = Request::post_json("/v1/embeddings", &json!({"model": "m", "input": "x"}));
    let answer = send(proxy.addr, &embed).await;
    assert_eq!((answer.status, answer.json()), (200, long));
    assert!(bitten(&proxy, "memory_max"));
    assert_eq!(within(PATIENCE, first.try_read_answer("POST")).await.unwrap().status, 200);
    proxy.is_quiet().await;
    memory_is_given_back(&proxy).await;
}

#[tokio::test]
async fn what_is_only_announced_takes_no_memory() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("limits.memory_max", "1MiB"));
    let mut idle = Vec::new();
    for _ in 0..4 {
        let head = Request::new("POST", "/v1/chat/completions").header("content-length", "900000");
        let mut client = Client::connect(proxy.addr).await;
        client.write(&[&head.to_bytes()[..], b"{"].concat()).await.unwrap();
        idle.push(client);
    }
    let exchanges = &proxy.telemetry.metrics.exchanges;
    eventually(PATIENCE, || exchanges.in_flight() == 4).await;
    assert_eq!(send(proxy.addr, &chat_of(900_000)).await.status, 200);
    drop(idle);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_a_place() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("limits.connections_max", 2));
    let (mut one, mut two) = (Client::connect(proxy.addr).await, Client::connect(proxy.addr).await);
    assert_eq!(one.send(&chat_request(false)).await.status, 200);
    assert_eq!(two.send(&chat_request(false)).await.status, 200);
    // The kernel takes the third; evergate does not look at it yet.
    let mut third = Client::connect(proxy.addr).await;
    third.write(&chat_request(false).to_bytes()).await.unwrap();
    eventually(PATIENCE, || bitten(&proxy, "connections_max")).await;
    assert_eq!(backend.requests().len(), 2);
    drop(one);
    assert_eq!(within(PATIENCE, third.try_read_answer("POST")).await.unwrap().status, 200);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn streams_of_one_http2_connection_are_bounded() {
    let slow =
        |request: &RequestSeen| [vec![Step::Delay(Duration::from_millis(60))], reply::echo(request)].concat();
    let backend = Backend::start(Script::new().by_request(slow)).await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off");
    let proxy = Proxy::start(&builder.set("limits.h2_streams_max", 2));
    let client = H2Client::connect(proxy.addr).await;
    // The first request tells the client the bound.
    client.send(&Request::get("/v1/files")).await;
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let client = client.clone();
        running.spawn(async move { client.send(&Request::get("/v1/files")).await.status });
    }
    assert!(running.join_all().await.iter().all(|status| *status == 200));
    assert!(backend.connections().len() <= 4, "two at a time, and a question for models");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn every_dialect_hears_an_error_in_its_own_words() {
    let backend = Backend::refusing().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.retry.wait_max", "0s"));
    let ask = async |path: &str| {
        let answer = send(proxy.addr, &Request::post_json(path, &json!({"model": "m"}))).await;
        assert!(matches!(answer.status, 502 | 503), "{path} {}", answer.text());
        if answer.status == 503 {
            assert!(answer.header("retry-after").is_some(), "{path}");
        }
        answer
    };
    for path in ["/v1/chat/completions", "/v1/embeddings", "/v1/files", "/v1/anything"] {
        let error = &ask(path).await.json()["error"];
        assert!(error["message"].is_string() && error["code"].is_string(), "{path} {error}");
        assert_eq!(error["type"], "server_error");
    }
    let error = ask("/v1/messages").await.json();
    assert_eq!(
        (error["type"].as_str(), error["error"]["message"].is_string()),
        (Some("error"), true),
        "{error}"
    );
    for path in ["/v2/models/m/infer", "/api/chat", "/api/tags"] {
        let error = ask(path).await.json();
        assert!(error["error"].is_string(), "{path} {error}");
        assert_eq!(error["code"], "no_backend_available", "{path} {error}");
        assert!(error["request_id"].is_string() && error["attempts"].is_number(), "{path} {error}");
    }
    let error = ask("/generate").await.json();
    assert!(error["error"].is_string() && error["error_type"].is_string(), "{error}");
    let error = &ask("/completion").await.json()["error"];
    assert!(error["code"].is_number(), "{error}");
    let plain = ask("/metrics").await;
    assert_eq!(plain.header("content-type"), Some("text/plain; charset=utf-8"));
    assert!(plain.text().contains("backend"), "{}", plain.text());
    let grpc = Request::new("POST", "/inference.GRPCInferenceService/ModelInfer");
    let grpc = send(proxy.addr, &grpc.header("content-type", "application/grpc").body("m")).await;
    assert_eq!((grpc.status, grpc.header("grpc-status")), (200, Some("14")));
    proxy.is_quiet().await;
}
