//! The helpers hold what they promise, or no test that uses them means anything.

use std::time::Duration;

use serde_json::json;
use tokio::net::TcpStream;

use crate::support::backend::{Backend, NeverAccepting, Script};
use crate::support::client::{
    Client, End, H2Client, Request, assert_is_healthy_stream, chat_request, events, send, stream_seen,
};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Raw, H2Step, RawFrame};
use crate::support::proxy::ProxyBuilder;
use crate::support::reply::{self, Step, Talk, Then as _};
use crate::support::tls::{Authority, Certificate};
use crate::support::{PATIENCE, eventually, hash, within};

#[tokio::test]
async fn a_healthy_backend_answers_and_remembers() {
    let backend = Backend::healthy().await;
    let mut client = Client::connect(backend.addr()).await;
    assert_eq!(client.send(&Request::get("/health")).await.status, 200);
    let seen = assert_is_healthy_stream(&client.send(&chat_request(true)).await);
    assert_eq!(seen.text, Talk::default().text());
    assert_eq!(seen.usage.unwrap()["completion_tokens"], 8);
    let whole = client.send(&chat_request(false)).await;
    assert_eq!(whole.json()["choices"][0]["message"]["content"], Talk::default().text());
    let echo = Request::new("PUT", "/a/b?c=d").header("X-Odd", "1").body("payload");
    let answer = client.send(&echo).await;
    assert_eq!(answer.json()["target"], "/a/b?c=d");
    assert_eq!(answer.json()["body_hash"], hash(b"payload"));

    let requests = backend.requests();
    assert_eq!(requests.len(), 3);
    assert_eq!(backend.all_requests().len(), 4);
    assert_eq!(requests[2].headers[1], ("X-Odd".to_owned(), "1".to_owned()));
    assert_eq!((requests[2].connection, requests[2].index, requests[2].nth), (0, 3, Some(2)));
    assert!(requests.iter().all(|request| request.complete));
    assert_eq!(backend.connections().len(), 1);
    drop(client);
    backend.closed_by_peer(0).await;
    eventually(PATIENCE, || backend.open_connections() == 0).await;
}

#[tokio::test]
async fn answers_follow_the_script_and_probes_do_not_use_it_up() {
    let script = Script::new().answer(reply::error(500)).answer_json(200, &json!({"nth": 2}));
    let backend = Backend::start(script.clone()).await;
    let ask = async |target: &str| send(backend.addr(), &Request::get(target)).await.status;
    assert_eq!(ask("/health").await, 200);
    assert_eq!(ask("/x").await, 500);
    assert_eq!(ask("/x").await, 200);
    assert_eq!(send(backend.addr(), &Request::get("/x")).await.json()["nth"], 2);
    backend.set_script(script.then_healthy().probes(reply::busy(3)));
    assert_eq!(ask("/health").await, 503);
    assert_eq!([ask("/x").await, ask("/x").await], [500, 200]);
    assert_eq!(send(backend.addr(), &chat_request(false)).await.json()["model"], "test-model");
    backend.set_script(Script::new().by_request(|seen| match seen.header("x-fail") {
        Some(_) => reply::error(502),
        None => reply::echo(seen),
    }));
    assert_eq!(send(backend.addr(), &Request::get("/x").header("X-Fail", "1")).await.status, 502);
    assert_eq!(ask("/x").await, 200);
}

#[tokio::test]
async fn a_client_tells_a_whole_answer_from_a_cut_one() {
    let begun = reply::sse_open(&Talk::default().chat_events_begun(3));
    for ending in [Step::Fin, Step::Rst, Step::HalfClose] {
        let script =
            Script::new().answer(begun.clone().then(Step::Delay(Duration::from_millis(5))).then(ending));
        let backend = Backend::start(script).await;
        let answer = send(backend.addr(), &chat_request(true)).await;
        assert_eq!(answer.end, End::Cut);
        assert_eq!(stream_seen(&answer).text, "t0 t1 t2");
    }
    let whole = Backend::start(Script::new().answer(begun.then(reply::last_chunk()))).await;
    assert_eq!(send(whole.addr(), &chat_request(true)).await.end, End::Clean);
    let short =
        vec![Step::send(reply::head(200, &[("content-length", "10")])), Step::send("12345"), Step::Fin];
    let short = Backend::start(Script::new().answer(short)).await;
    let answer = send(short.addr(), &Request::get("/x")).await;
    assert_eq!((answer.end, answer.text().as_str()), (End::Cut, "12345"));
    assert!(answer.raw.starts_with(b"HTTP/1.1 200 OK\r\n") && answer.raw.ends_with(b"\r\n\r\n12345"));
}

#[tokio::test]
async fn raw_connections_do_nothing_but_their_steps() {
    let script = Script::new()
        .connection(vec![Step::Rst])
        .connection(vec![Step::send("HTTP/1.1 2")])
        .connection(vec![
            Step::ReadHead,
            Step::SendSlow { bytes: reply::head(204, &[]), piece: 1, every: Duration::from_millis(1) },
        ])
        .connection(vec![Step::Stall]);
    let backend = Backend::start(script).await;
    let mut reset = Client::connect(backend.addr()).await;
    assert!(reset.is_closed_within(PATIENCE).await);
    let mut half = Client::connect(backend.addr()).await;
    assert!(half.try_read_answer("GET").await.is_err());
    let slow = send(backend.addr(), &Request::get("/slow")).await;
    assert_eq!(slow.status, 204);
    assert_eq!(backend.requests().len(), 1);
    let mut stalled = Client::connect(backend.addr()).await;
    stalled.write(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(!stalled.is_closed_within(Duration::from_millis(30)).await);
    drop(stalled);
    backend.closed_by_peer(3).await;
}

#[tokio::test]
async fn a_backend_dies_refuses_returns_and_pauses_at_one_address() {
    let backend = Backend::start(Script::new().talk(Talk::of(50).gap(Duration::from_millis(5)))).await;
    let mut streaming = Client::connect(backend.addr()).await;
    streaming.write(&chat_request(true).to_bytes()).await.unwrap();
    backend.has_seen(1).await;
    let mut idle = Client::connect(backend.addr()).await;
    backend.close_listener().await;
    assert!(TcpStream::connect(backend.addr()).await.is_err());
    backend.stop().await;
    let cut = streaming.try_read_answer("POST").await;
    assert!(cut.is_err() || cut.is_ok_and(|answer| answer.end == End::Cut));
    assert!(idle.is_closed_within(PATIENCE).await);
    assert!(TcpStream::connect(backend.addr()).await.is_err());
    backend.restart().await;
    assert_eq!(send(backend.addr(), &Request::get("/health")).await.status, 200);
    backend.pause();
    let mut paused = Client::connect(backend.addr()).await;
    paused.write(&Request::get("/health").to_bytes()).await.unwrap();
    assert!(!paused.is_closed_within(Duration::from_millis(30)).await);
    backend.resume();
    assert_eq!(within(PATIENCE, paused.try_read_answer("GET")).await.unwrap().status, 200);
    let refusing = Backend::refusing().await;
    assert!(TcpStream::connect(refusing.addr()).await.is_err());
    refusing.restart().await;
    assert_eq!(send(refusing.addr(), &Request::get("/health")).await.status, 200);
}

#[tokio::test]
async fn a_full_accept_queue_lets_connections_hang() {
    let full = NeverAccepting::start().await;
    let connect = tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(full.addr()));
    assert!(connect.await.is_err());
}

#[tokio::test]
async fn chunked_and_expectant_uploads_arrive_whole() {
    let backend = Backend::healthy().await;
    let mut client = Client::connect(backend.addr()).await;
    let head = "POST /up HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n";
    client.write(head.as_bytes()).await.unwrap();
    client.write(b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n").await.unwrap();
    let answer = client.try_read_answer("POST").await.unwrap();
    assert_eq!(answer.informational, [100]);
    assert_eq!(answer.json()["body_hash"], hash(b"abcdefg"));
    client.write(b"POST /up HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf").await.unwrap();
    client.finish_sending().await;
    eventually(PATIENCE, || backend.requests().len() == 2 && !backend.requests()[1].body.is_empty()).await;
    assert!(!backend.requests()[1].complete);
}

#[tokio::test]
async fn tls_backends_show_the_certificate_asked_for() {
    let authority = Authority::new();
    for certificate in [
        Certificate::Good,
        Certificate::Expired,
        Certificate::NotYetValid,
        Certificate::WrongName,
        Certificate::UnknownIssuer,
    ] {
        let tls = authority.server(certificate, &["http/1.1"]);
        let backend = Backend::start_tls(Script::new(), &tls).await;
        let client = Client::connect_tls(backend.addr(), authority.client(&["http/1.1"])).await;
        assert_eq!(client.is_ok(), certificate == Certificate::Good, "{certificate:?}");
        if let Ok(mut client) = client {
            assert_is_healthy_stream(&client.send(&chat_request(true)).await);
        }
    }
}

#[tokio::test]
async fn an_h2_backend_answers_resets_and_sends_trailers() {
    let backend = H2Backend::start(|seen| match seen.path() {
        "/reset" => H2Answer::new(200).data("begun").step(H2Step::Reset),
        "/grpc" => H2Answer::new(200).step(H2Step::Trailers(vec![("grpc-status".into(), "14".into())])),
        "/v1/chat/completions" => H2Answer::chat(&Talk::of(3)),
        _ => H2Answer::new(404),
    })
    .await;
    let client = H2Client::connect(backend.addr()).await;
    assert_eq!(assert_is_healthy_stream(&client.send(&chat_request(true)).await).text, "t0 t1 t2");
    assert_eq!(client.send(&Request::get("/reset")).await.end, End::Reset(2));
    assert_eq!(client.send(&Request::get("/grpc")).await.trailers, [("grpc-status".into(), "14".into())]);
    assert_eq!(backend.requests()[0].json()["model"], "test-model");
    assert_eq!((backend.requests().len(), backend.connections()), (3, 1));
}

#[tokio::test]
async fn raw_h2_frames_reach_the_client() {
    let backend = H2Raw::start(|nth, _| match nth {
        0 => vec![RawFrame::Reset(7)],
        1 => vec![
            RawFrame::Head { end_stream: false },
            RawFrame::Data { bytes: "hello".into(), end_stream: true },
        ],
        _ => vec![RawFrame::GoAway { last_stream: 0, code: 0 }, RawFrame::Close],
    })
    .await;
    let client = H2Client::connect(backend.addr()).await;
    assert_eq!(client.try_send(&Request::get("/")).await.unwrap_err(), End::Reset(7));
    assert_eq!(client.send(&Request::get("/")).await.text(), "hello");
    assert!(client.try_send(&Request::get("/")).await.is_err());
    assert_eq!(backend.streams(), [(0, 1), (0, 3), (0, 5)]);
}

#[tokio::test]
#[should_panic(expected = "not within")]
async fn eventually_gives_up() {
    eventually(Duration::from_millis(10), || false).await;
}

#[test]
fn events_are_split_at_blank_lines_of_any_kind() {
    let seen = events(b": ping\n\nevent: a\r\ndata: 1\r\ndata:2\r\n\r\ndata: [DONE]\n\ndata: unfinished");
    let seen: Vec<_> = seen.iter().map(|event| (event.name.as_deref(), event.data.as_str())).collect();
    assert_eq!(seen, [(Some("a"), "1\n2"), (None, "[DONE]")]);
}

#[test]
fn built_toml_has_its_keys_where_they_belong() {
    let toml = ProxyBuilder::new()
        .backend("http://127.0.0.1:1")
        .backend_with("http://127.0.0.1:2", &[("tier", 1.into())])
        .set("pool.clocks.connect", "200ms")
        .set("limits.headers_max", 50)
        .set("listener.tls.key", "k.pem")
        .named_pool("other")
        .backend("http://127.0.0.1:3")
        .route("other", &[("path_prefix", "/o".into())])
        .build_toml();
    let read: toml::Table = toml.parse().unwrap();
    assert_eq!(read["pool"][0]["backends"][1]["tier"].as_integer(), Some(1));
    assert_eq!(read["pool"][0]["clocks"]["connect"].as_str(), Some("200ms"));
    assert_eq!(read["pool"][1]["name"].as_str(), Some("other"));
    assert_eq!(read["limits"]["headers_max"].as_integer(), Some(50));
    assert_eq!(read["listener"][0]["tls"]["key"].as_str(), Some("k.pem"));
    assert_eq!(read["route"][0]["pool"].as_str(), Some("other"));
}
