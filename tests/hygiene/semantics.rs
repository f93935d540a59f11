//! Methods, statuses, targets and the order of things (RFC 9110, RFC 9112), through the whole proxy.

use std::time::Duration;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, End, H2Client, Request, chat_request, send};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step};
use crate::support::{PATIENCE, eventually, within};

/// Answers every request but probes with these bytes.
async fn says(bytes: &'static str) -> (Backend, Proxy) {
    let backend = Backend::start(Script::new().answer(vec![Step::send(bytes)])).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    (backend, proxy)
}

#[tokio::test]
async fn an_answer_to_head_keeps_its_length_and_has_no_body() {
    let (_backend, proxy) = says(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\netag: \"e\"\r\ncontent-length: 1234\r\n\r\n",
    )
    .await;
    let mut client = Client::connect(proxy.addr).await;
    for path in ["/v1/files", "/v1/models"] {
        let answer = client.send(&Request::new("HEAD", path)).await;
        assert_eq!((answer.status, answer.header("content-length")), (200, Some("1234")));
        assert_eq!(answer.header("etag"), Some("\"e\""));
    }
    let answer = H2Client::connect(proxy.addr).await.send(&Request::new("HEAD", "/v1/files")).await;
    assert_eq!((answer.header("content-length"), answer.body.len()), (Some("1234"), 0));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_error_answer_to_head_is_relayed() {
    let (_backend, proxy) = says("HTTP/1.1 404 Not Found\r\ncontent-length: 77\r\n\r\n").await;
    let mut client = Client::connect(proxy.addr).await;
    for _ in 0..2 {
        let answer = client.send(&Request::new("HEAD", "/v1/files/7")).await;
        assert_eq!((answer.status, answer.header("content-length")), (404, Some("77")));
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn answers_without_a_body_stay_so() {
    let (_backend, proxy) = says("HTTP/1.1 204 No Content\r\nx-a: b\r\n\r\n").await;
    let mut client = Client::connect(proxy.addr).await;
    for method in ["DELETE", "GET"] {
        let answer = client.send(&Request::new(method, "/v1/files/7")).await;
        assert_eq!((answer.status, answer.header("x-a")), (204, Some("b")));
        assert_eq!((answer.header("content-length"), answer.header("transfer-encoding")), (None, None));
    }
    let (_backend, proxy) =
        says("HTTP/1.1 304 Not Modified\r\netag: \"e\"\r\ncontent-length: 99\r\n\r\n").await;
    let mut client = Client::connect(proxy.addr).await;
    for _ in 0..2 {
        let answer = client.send(&Request::get("/v1/files/7").header("if-none-match", "\"e\"")).await;
        assert_eq!((answer.status, answer.header("etag")), (304, Some("\"e\"")));
        assert_eq!(answer.header("transfer-encoding"), None);
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn redirects_and_unknown_statuses_are_the_clients_business() {
    let (_backend, proxy) =
        says("HTTP/1.1 307 Away\r\nlocation: http://else.where/x\r\ncontent-length: 0\r\n\r\n").await;
    let answer = send(proxy.addr, &Request::get("/docs")).await;
    assert_eq!((answer.status, answer.header("location")), (307, Some("http://else.where/x")));
    let (_backend, proxy) = says("HTTP/1.1 299 Odd\r\ncontent-length: 2\r\n\r\nok").await;
    let answer = send(proxy.addr, &Request::get("/docs")).await;
    assert_eq!((answer.status, answer.text().as_str()), (299, "ok"));
}

#[tokio::test]
async fn targets_are_passed_on_as_they_were_written() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    for target in [
        "/v1/files?a=1&b=%20%2F&c",
        "/v1/files?",
        "/v1/%66iles/%2e%2e/x;y=z",
        "//double//slash",
        "/v1/./files/../x",
        "/search?q=a+b&url=http://x/?y=z",
        "/sub:scribe/@me!$&'()*+,;=~",
    ] {
        let answer = client.send(&Request::get(target)).await;
        assert_eq!(answer.json()["target"], target);
        let answer = H2Client::connect(proxy.addr).await.send(&Request::get(target)).await;
        assert_eq!(answer.json()["target"], target);
    }
    // RFC 9112 §3.2.2: absolute form is for proxies, and a host in it wins over the field.
    let request = Request::get("http://api.example/v1/files?x=1").header("host", "api.example");
    let answer = client.send(&request).await;
    assert_eq!(answer.json()["target"], "/v1/files?x=1");
    let answer = client.send(&Request::new("OPTIONS", "*")).await;
    assert_eq!(
        (answer.json()["method"].as_str(), answer.json()["target"].as_str()),
        (Some("OPTIONS"), Some("*"))
    );
    for method in ["OPTIONS", "PUT", "PATCH", "DELETE", "PURGE", "M-SEARCH"] {
        assert_eq!(client.send(&Request::new(method, "/v1/files/7")).await.json()["method"], method);
    }
    let answer = client.send(&Request::new("CONNECT", "api.example:443")).await;
    assert_eq!(answer.status, 405);
}

#[tokio::test]
async fn a_body_is_announced_to_the_backend_when_and_only_when_there_is_one() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    client.send(&Request::get("/v1/files")).await;
    client.send(&Request::new("POST", "/v1/files")).await;
    client.send(&Request::new("DELETE", "/v1/files").body("why")).await;
    client.send(&Request::get("/v1/files").body("odd")).await;
    let seen = backend.requests();
    let framing = |i: usize| (seen[i].header("content-length"), seen[i].header("transfer-encoding"));
    assert_eq!(framing(0), (None, None));
    assert_eq!(framing(1), (Some("0"), None), "RFC 9110 §8.6");
    assert_eq!(framing(2), (Some("3"), None));
    assert_eq!((framing(3), &seen[3].body[..]), ((Some("3"), None), &b"odd"[..]));
}

#[tokio::test]
async fn interim_answers_of_a_backend_do_not_disturb_the_final_one() {
    let (_backend, proxy) = says(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n\
        HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    )
    .await;
    let mut client = Client::connect(proxy.addr).await;
    for _ in 0..2 {
        let answer = client.send(&Request::get("/v1/files")).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn expect_is_answered_with_continue_when_a_backend_connection_stands() {
    for path in ["/v1/chat/completions", "/v1/files"] {
        let backend = Backend::healthy().await;
        let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
        let mut client = Client::connect(proxy.addr).await;
        let request = Request { target: path.to_owned(), ..chat_request(false) };
        let body = request.body.clone();
        let length = body.len().to_string();
        let head = Request { body: "".into(), ..request }
            .header("content-length", &length)
            .header("expect", "100-continue");
        client.write(&head.to_bytes()).await.unwrap();
        let interim = client.read_bytes(b"HTTP/1.1 100 Continue\r\n\r\n".len()).await;
        assert_eq!(interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        eventually(PATIENCE, || backend.open_connections() > 0).await;
        assert!(backend.requests().is_empty(), "{path}");
        client.write(&body).await.unwrap();
        let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
        assert_eq!((answer.status, answer.informational.len()), (200, 0));
        let seen = &backend.requests()[0];
        assert_eq!((seen.header("expect"), &seen.body), (None, &body));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn expect_is_refused_with_a_final_status_when_no_backend_can_be_reached() {
    let backend = Backend::refusing().await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("pool.retry.wait_max", "0s");
    let proxy = Proxy::start(&builder);
    let mut client = Client::connect(proxy.addr).await;
    let head = Request::new("POST", "/v1/chat/completions").header("content-length", "10");
    client.write(&head.header("expect", "100-continue").to_bytes()).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!((answer.status, answer.informational.as_slice()), (503, &[][..]));
    assert_eq!(answer.json()["error"]["code"], "no_backend_available");
    // What the client might send now nobody could tell from a next request.
    assert!(client.is_closed_within(PATIENCE).await);

    let mut client = Client::connect(proxy.addr).await;
    let head = Request::new("POST", "/v1/chat/completions").header("content-length", "10");
    client.write(&head.header("expect", "200-maybe").to_bytes()).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!((answer.status, answer.informational.as_slice()), (417, &[][..]));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    let backend = Backend::start(Script::new().by_request(|request| {
        let pause = if request.target.ends_with("slow") { 60 } else { 0 };
        let mut steps = vec![Step::Delay(Duration::from_millis(pause))];
        steps.extend(reply::echo(request));
        steps
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    let targets = ["/1-slow", "/2", "/3-slow", "/4", "/5"];
    let requests = targets.map(|target| Request::new("POST", target).body(format!("body of {target}")));
    let bytes: Vec<u8> = requests.iter().flat_map(Request::to_bytes).collect();
    client.write(&bytes).await.unwrap();
    for target in targets {
        let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
        assert_eq!(answer.json()["target"], target);
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn trailers_of_an_answer_reach_a_client_that_takes_them() {
    let (_backend, proxy) = says(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
        2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n",
    )
    .await;
    let answer =
        send(proxy.addr, &Request::get("/v1/files").header("te", "trailers").header("connection", "te"))
            .await;
    assert_eq!((answer.text().as_str(), answer.end), ("ok", End::Clean));
    assert_eq!(answer.trailers, [("x-sum".to_owned(), "7".to_owned())]);
    let answer = H2Client::connect(proxy.addr).await.send(&Request::get("/v1/files")).await;
    assert_eq!(answer.trailers, [("x-sum".to_owned(), "7".to_owned())]);
    // Whoever did not ask gets the body alone.
    let answer = send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!((answer.text().as_str(), answer.end), ("ok", End::Clean));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_http10_client_gets_its_answer_and_the_end_of_the_connection() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    client.write(b"GET /v1/files HTTP/1.0\r\n\r\n").await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("GET")).await.unwrap();
    assert_eq!(answer.json()["target"], "/v1/files");
    assert!(client.is_closed_within(PATIENCE).await);
    let chat = String::from_utf8(chat_request(true).to_bytes()).unwrap().replace("HTTP/1.1", "HTTP/1.0");
    let mut client = Client::connect(proxy.addr).await;
    client.write(chat.as_bytes()).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!(answer.header("transfer-encoding"), None, "HTTP/1.0 knows no chunks");
    crate::support::client::assert_is_healthy_stream(&answer);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_early_answer_to_an_upload_is_relayed_while_the_upload_goes_on() {
    // The engine refuses after the head; its connection is not used again.
    let head = "HTTP/1.1 415 Unsupported Media Type\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno";
    let steps = vec![Step::ReadHead, Step::send(head), Step::HalfClose];
    let backend = Backend::start(Script::new().connection(steps)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    let mut client = Client::connect(proxy.addr).await;
    let head = Request::new("POST", "/v1/files").header("content-length", "1000000");
    client.write(&[head.to_bytes(), vec![b'x'; 1000]].concat()).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (415, "no"));
    drop(client);
    eventually(PATIENCE, || backend.open_connections() == 0).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_stream_over_http2_ends_cleanly_and_a_cut_one_is_reset() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let client = H2Client::connect(proxy.addr).await;
    let answer = client.send(&chat_request(true)).await;
    crate::support::client::assert_is_healthy_stream(&answer);
    let text = [("content-type", "text/plain"), ("transfer-encoding", "chunked")];
    let cut = vec![
        Step::Send(reply::head(200, &text)),
        reply::chunk("half"),
        Step::Delay(Duration::from_millis(20)),
        Step::Rst,
    ];
    backend.set_script(Script::new().answer(cut));
    let answer = client.send(&Request::get("/v1/files")).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "half"));
    assert!(matches!(answer.end, End::Reset(_)), "{:?}", answer.end);
    let answer = send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!((answer.text().as_str(), answer.end), ("half", End::Cut));
    proxy.is_quiet().await;
}

/// The host in the target wins over the field (RFC 9112 §3.2.2), or a route by host could be had by either.
#[tokio::test]
async fn the_host_of_an_absolute_target_counts() {
    let (open, closed) = (Backend::healthy().await, Backend::healthy().await);
    let builder = ProxyBuilder::new()
        .named_pool("open")
        .backend(&open.url())
        .named_pool("closed")
        .backend(&closed.url())
        .route("closed", &[("host", "closed.example".into())]);
    let proxy = Proxy::start(&builder);
    let request = Request::get("http://closed.example/v1/files").header("host", "open.example");
    assert_eq!(send(proxy.addr, &request).await.status, 200);
    assert_eq!((open.requests().len(), closed.requests().len()), (0, 1));
    assert_eq!(closed.requests()[0].header("x-forwarded-host"), Some("closed.example"));
    let request = Request::get("/v1/files").header("host", "closed.example");
    let answer = H2Client::connect(proxy.addr).await.try_send(&request).await;
    // The HTTP/2 library may refuse two hosts; where it does not, the target counts.
    let refused = answer.is_err_and(|_| true);
    assert!(refused || open.requests().len() == 1, "{:?}", closed.requests());
}

#[tokio::test]
async fn expect_waits_for_a_backend_as_long_as_any_request() {
    let backend = Backend::refusing().await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("pool.probe.interval_unsteady", "50ms");
    let proxy = Proxy::start(&builder.set("pool.probe.interval", "50ms").set("pool.retry.wait_max", "8s"));
    let mut client = Client::connect(proxy.addr).await;
    let body = chat_request(false).body;
    let head = Request::new("POST", "/v1/chat/completions").header("content-length", &body.len().to_string());
    client.write(&head.header("expect", "100-continue").to_bytes()).await.unwrap();
    let exchanges = &proxy.telemetry.metrics.exchanges;
    eventually(PATIENCE, || exchanges.in_flight() == 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    backend.restart().await;
    assert_eq!(client.read_bytes(25).await, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write(&body).await.unwrap();
    assert_eq!(within(PATIENCE, client.try_read_answer("POST")).await.unwrap().status, 200);
}

/// Which pool it will be only the body says.
#[tokio::test]
async fn expect_is_content_with_any_pool_the_model_may_name() {
    let (dead, alive) = (Backend::refusing().await, Backend::healthy().await);
    let names = |name: &str| toml::Value::Array(vec![name.into()]);
    let builder = ProxyBuilder::new()
        .named_pool("dead")
        .backend(&dead.url())
        .set("pool.models", names("other"))
        .named_pool("alive")
        .backend(&alive.url())
        .set("pool.models", names("test-model"));
    let proxy = Proxy::start(&builder);
    let mut client = Client::connect(proxy.addr).await;
    let body = chat_request(false).body;
    let head = Request::new("POST", "/v1/chat/completions").header("content-length", &body.len().to_string());
    client.write(&head.header("expect", "100-continue").to_bytes()).await.unwrap();
    assert_eq!(client.read_bytes(25).await, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write(&body).await.unwrap();
    assert_eq!(within(PATIENCE, client.try_read_answer("POST")).await.unwrap().status, 200);
    proxy.is_quiet().await;
}

/// The classic of proxies: the backend answers, closes, and the upload that still comes makes it a reset.
#[tokio::test]
async fn an_early_answer_survives_the_reset_behind_it() {
    let head = "HTTP/1.1 413 Payload Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno";
    let backend =
        Backend::start(Script::new().connection(vec![Step::ReadHead, Step::send(head), Step::Fin])).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    for _ in 0..5 {
        let mut client = Client::connect(proxy.addr).await;
        let head = Request::new("POST", "/v1/files").header("content-length", "4000000");
        client.write(&head.to_bytes()).await.unwrap();
        let _may_be_cut = client.write(&vec![b'x'; 2_000_000]).await;
        let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (413, "no"));
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_body_that_ends_with_its_connection_is_whole_when_it_ended_well() {
    let text = "HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nuntil the end";
    let backend = Backend::start(Script::new().answer(vec![Step::send(text), Step::Fin]).answer(vec![
        Step::send(text),
        Step::Delay(Duration::from_millis(30)),
        Step::Rst,
    ]))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let answer = send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!((answer.text().as_str(), answer.end), ("until the end", End::Clean));
    let answer = send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!((answer.text().as_str(), answer.end), ("until the end", End::Cut));
    proxy.is_quiet().await;
}
