//! What must not be read in two ways: refused by hyper or by the guard, and the connection closed.

use super::toy::{bounds, get, start};

/// A request with these fields and this body, and behind it one that must never be seen.
fn with_stowaway(request: &str) -> String {
    format!("{request}{}", get("/stowaway"))
}

#[tokio::test]
async fn ambiguous_heads_are_refused_and_nothing_behind_them_is_read() {
    let server = start(bounds());
    let chunks = "3\r\nabc\r\n0\r\n\r\n";
    for (fields, body) in [
        // By the guard.
        ("Host: toy\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", "0\r\n\r\n"),
        ("Host: toy\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", "0\r\n\r\n"),
        ("Host: toy\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", chunks),
        ("Host: toy\r\nTransfer-Encoding: gzip, chunked", chunks),
        ("Host: toy\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked", chunks),
        ("X: y", ""),
        ("Host: toy\r\nHost: other", ""),
        // By hyper.
        ("Host: toy\r\nContent-Length: 5\r\nContent-Length: 6", "abcde"),
        ("Host: toy\r\nContent-Length: 5, 5", "abcde"),
        ("Host: toy\r\nContent-Length: +5", "abcde"),
        ("Host: toy\r\nContent-Length: 18446744073709551616", ""),
        ("Host: toy\r\nX: folded\r\n on two lines", ""),
        ("Host: toy\r\nContent-Length : 5", "abcde"),
        (" Host: toy", ""),
        ("Host: toy\r\nTransfer-Encoding: xchunked", chunks),
        ("Host: toy\r\nTransfer-Encoding: chunked, gzip", chunks),
        ("Host: toy\r\nTransfer-Encoding: \x0bchunked", chunks),
        ("Host: toy\r\nX: nul\0nul", ""),
        ("Host: toy\r\nX: bare\rreturn", ""),
        ("Host: toy\r\nX y", ""),
        ("Host: toy\r\n: y", ""),
    ] {
        let mut peer = server.connect().await;
        peer.ask("/say", "hello").await;
        peer.send(with_stowaway(&format!("POST /echo HTTP/1.1\r\n{fields}\r\n\r\n{body}"))).await;
        let (got, end) = peer.rest().await;
        assert!(got.starts_with("HTTP/1.1 400 "), "{fields:?}: {got}");
        assert!(got.contains("connection: close"), "{fields:?}: {got}");
        assert!(!got.contains("stowaway") && end.is_ok(), "{fields:?}: {got} {end:?}");
    }
    let metrics = server.metrics();
    for kind in ["length_and_encoding\"} 2", "transfer_coding\"} 3", "host\"} 2"] {
        assert!(metrics.contains(kind), "{kind} in {metrics}");
    }
}

#[tokio::test]
async fn http10_has_no_transfer_encoding_and_may_have_no_host() {
    let server = start(bounds());
    let mut peer = server.connect().await;
    peer.send("POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").await;
    let (got, _) = peer.rest().await;
    assert!(got.starts_with("HTTP/1.1 400 ") || got.starts_with("HTTP/1.0 400 "), "{got}");

    let mut peer = server.connect().await;
    peer.send("GET /say HTTP/1.0\r\n\r\n").await;
    let (got, _) = peer.rest().await;
    assert!(got.starts_with("HTTP/1.0 200 ") && got.ends_with("hello"), "{got}");
}

#[tokio::test]
async fn broken_chunks_end_the_connection() {
    let server = start(bounds());
    for body in [
        "0x5\r\nabcde\r\n0\r\n\r\n",
        "+5\r\nabcde\r\n0\r\n\r\n",
        "5 5\r\nabcde\r\n0\r\n\r\n",
        "5\nabcde\n0\n\n",
        "5;x\ny\r\nabcde\r\n0\r\n\r\n",
        "5\r\nabcdeX\r\n0\r\n\r\n",
        "FFFFFFFFFFFFFFFFF\r\nabcde\r\n0\r\n\r\n",
        "5\r\nabcde\r\n0\r\nA: b\n\r\n\r\n",
    ] {
        let mut peer = server.connect().await;
        let head = "POST /echo HTTP/1.1\r\nHost: toy\r\nTransfer-Encoding: chunked\r\n\r\n";
        peer.send(with_stowaway(&format!("{head}{body}"))).await;
        let (got, _) = peer.rest().await;
        assert!(!got.contains("stowaway"), "{body:?}: {got}");
    }
}

#[tokio::test]
async fn what_is_merely_unusual_is_served() {
    let server = start(bounds());
    let mut peer = server.connect().await;
    for request in [
        "\r\n\r\nPOST /echo HTTP/1.1\r\nHost: toy\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        "POST /echo HTTP/1.1\nHost: toy\nContent-Length: 3\n\nabc",
        "POST /echo HTTP/1.1\r\nHost: toy\r\ntransfer-encoding:  CHUNKED\t\r\n\r\n003;a=\"b\"\r\nabc\r\n0\r\nX: y\r\n\r\n",
        "POST /echo HTTP/1.1\r\nhost:toy\r\nCONTENT-LENGTH:\t3 \r\n\r\nabc",
    ] {
        peer.send(request).await;
        let answer = peer.until("abc").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{request:?}: {answer}");
    }
    peer.ask("/say", "hello").await;
}
