//! Requests that two readers could take for different ones: refused with 400, the connection closed, and no byte
//! of them at a backend.

use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, End, H2Client, Request};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::Step;
use crate::support::{PATIENCE, within};

const CHAT: &str = "POST /v1/chat/completions HTTP/1.1\r\n";

async fn refused(proxy: &Proxy, bytes: &[u8]) -> crate::support::client::Answer {
    let mut client = Client::connect(proxy.addr).await;
    client.write(bytes).await.unwrap();
    let told = String::from_utf8_lossy(bytes);
    let answer = within(PATIENCE, client.try_read_answer("POST")).await;
    let answer = answer.unwrap_or_else(|error| panic!("{error} for {told:?}"));
    assert_eq!(answer.status, 400, "{told:?}: {}", answer.text());
    assert!(client.is_closed_within(PATIENCE).await, "open after {told:?}");
    answer
}

#[tokio::test]
async fn ambiguous_framing_is_refused_in_the_words_of_the_api() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for fields in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 0\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity, chunked\r\n",
    ] {
        let bytes =
            format!("{CHAT}Host: a\r\n{fields}\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n");
        let answer = refused(&proxy, bytes.as_bytes()).await;
        assert_eq!(answer.json()["error"]["code"], "invalid_request", "{fields:?}");
        assert_eq!(answer.header("connection"), Some("close"), "{fields:?}");
        assert!(answer.header("x-request-id").is_some());
    }
    assert!(backend.requests().is_empty(), "{:?}", backend.requests());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_host_that_is_missing_or_repeated_is_refused_in_the_words_of_the_api() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for (path, hosts) in [
        ("/v1/chat/completions", ""),
        ("/v1/chat/completions", "Host: a\r\nHost: a\r\n"),
        ("/v1/messages", "Host: a\r\nHost: b\r\n"),
    ] {
        let bytes = format!("POST {path} HTTP/1.1\r\n{hosts}Content-Length: 2\r\n\r\n{{}}");
        let answer = refused(&proxy, bytes.as_bytes()).await;
        assert_eq!(answer.header("connection"), Some("close"));
        let error = &answer.json()["error"];
        assert!(error["message"].as_str().is_some_and(|message| message.contains("Host")), "{error}");
        assert_eq!(answer.json()["type"] == "error", path == "/v1/messages");
    }
    assert!(backend.requests().is_empty());
    proxy.is_quiet().await;
}

/// The HTTP library refuses these before anybody can tell the API.
#[tokio::test]
async fn what_is_no_http_is_refused() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for head in [
        "Content-Length: 4\r\nContent-Length: 5\r\n",
        "Content-Length: 4, 5\r\n",
        "Content-Length: +4\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x4\r\n",
        "Content-Length: 4 4\r\n",
        "Content-Length:\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: \x0bchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Content-Length : 4\r\n",
        "X-Folded: a\r\n b\r\n",
        "X-Folded: a\r\n\tTransfer-Encoding: chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X-Zero: a\0b\r\n",
        "X-Bare: a\rTransfer-Encoding: chunked\r\n",
        "No colon\r\n",
        "X Space: a\r\n",
        ": nameless\r\n",
    ] {
        let bytes = format!("{CHAT}Host: a\r\n{head}\r\nabcdGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n");
        refused(&proxy, bytes.as_bytes()).await;
    }
    for line in [
        "GET  /double HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /\x01 HTTP/1.1",
        "GET / HTTP/1.7",
        "get\t/ HTTP/1.1",
    ] {
        refused(&proxy, format!("{line}\r\nHost: a\r\n\r\n").as_bytes()).await;
    }
    assert!(backend.requests().is_empty(), "{:?}", backend.requests());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_body_whose_chunks_are_broken_reaches_nobody() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for body in [
        "2\r\n{}X\r\n0\r\n\r\n",
        "2\r\n{}\n0\r\n\r\n",
        "0x2\r\n{}\r\n0\r\n\r\n",
        "-2\r\n{}\r\n0\r\n\r\n",
        "2 2\r\n{}\r\n0\r\n\r\n",
        "\r\n2\r\n{}\r\n0\r\n\r\n",
        "2\n{}\r\n0\r\n\r\n",
        "fffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        "zz\r\n{}\r\n0\r\n\r\n",
        "2;a=\"\n\"\r\n{}\r\n0\r\n\r\n",
    ] {
        let bytes = format!(
            "{CHAT}Host: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
        );
        refused(&proxy, bytes.as_bytes()).await;
    }
    assert!(backend.requests().is_empty(), "{:?}", backend.requests());
    proxy.is_quiet().await;
}

/// The first of two is right, and is answered; what is wrong with the second ends the connection.
#[tokio::test]
async fn a_good_request_before_a_bad_one_is_answered() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let good = "GET /good HTTP/1.1\r\nHost: a\r\n\r\n";
    let bad =
        format!("{CHAT}Host: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{good}");
    let mut client = Client::connect(proxy.addr).await;
    client.write(format!("{good}{bad}").as_bytes()).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("GET")).await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(client.is_closed_within(PATIENCE).await);
    assert_eq!(backend.requests().len(), 1);
    proxy.is_quiet().await;
}

/// A value that HTTP/2 carries without complaint must not become a line of its own in HTTP/1.1.
#[tokio::test]
async fn http2_cannot_smuggle_framing_fields_to_an_http1_backend() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for (name, value) in [("transfer-encoding", "chunked"), ("connection", "keep-alive"), ("upgrade", "h2c")]
    {
        let client = H2Client::connect(proxy.addr).await;
        // The client's own library may refuse or repair it: either is fine as long as nothing reaches the wire.
        let _ = client.try_send(&Request::new("POST", "/v1/files").header(name, value).body("body")).await;
    }
    for seen in backend.requests() {
        assert_eq!((seen.header("transfer-encoding"), seen.header("upgrade")), (None, None));
        assert_eq!(&seen.body[..], b"body");
    }
}

/// RFC 9112 §6.3: the encoding wins, and the length must not reach the client.
#[tokio::test]
async fn an_answer_with_a_length_and_an_encoding_is_framed_anew() {
    for fields in [
        "transfer-encoding: chunked\r\ncontent-length: 3\r\n",
        "content-length: 300\r\ntransfer-encoding: chunked\r\n",
    ] {
        for (path, content) in [("/v1/files", "text/plain"), ("/tokenize", "application/json")] {
            let body = "{\"count\":1,\"tokens\":[1]}";
            let text = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: {content}\r\n{fields}\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
                body.len()
            );
            let backend = Backend::start(Script::new().answer(vec![Step::send(text)])).await;
            let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
            let mut client = Client::connect(proxy.addr).await;
            for _ in 0..2 {
                let answer = client.send(&Request::new("POST", path).body("{}")).await;
                assert_eq!(
                    (answer.status, answer.text().as_str(), answer.end),
                    (200, body, End::Clean),
                    "{path} {fields:?}"
                );
            }
            let answer =
                H2Client::connect(proxy.addr).await.send(&Request::new("POST", path).body("{}")).await;
            assert_eq!(
                (answer.status, answer.text().as_str(), answer.end),
                (200, body, End::Clean),
                "{path} {fields:?}"
            );
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn an_answer_whose_lengths_differ_is_none() {
    let text = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd";
    let backend = Backend::start(Script::new().answer(vec![Step::send(text)])).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.retry.wait_max", "0s"));
    let answer = crate::support::client::send(proxy.addr, &Request::get("/v1/files")).await;
    assert!(matches!(answer.status, 502 | 503), "{}", answer.text());
    proxy.is_quiet().await;
}
