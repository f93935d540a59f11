//! Requests that are fine, and those a limit refuses.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http_body_util::BodyExt;
use rustls_pki_types::ServerName;
use tokio::io::AsyncWriteExt;

use super::toy::{bounds, get, h2, h2_get, start, start_with};
use crate::config::{Limits, ListenerTls};
use crate::server::{Bounds, check_tls};

fn limited(change: impl FnOnce(&mut Limits)) -> Bounds {
    let mut bounds = bounds();
    change(&mut bounds.limits);
    bounds
}

#[tokio::test]
async fn a_connection_is_kept_for_further_requests() {
    let server = start(bounds());
    let mut peer = server.connect().await;
    for _ in 0..3 {
        let answer = peer.ask("/say", "hello").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(!answer.contains("close"), "{answer}");
    }
    peer.send("POST /echo HTTP/1.1\r\nHost: toy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        .await;
    peer.until("abc").await;
    peer.ask("/client", &format!("false {}", server.address)).await;
    assert!(server.metrics().contains("evergate_downstream_connections_total"));
    assert_eq!(server.context.clients.open(), 1);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    let server = start(bounds());
    let mut peer = server.connect().await;
    let body = "POST /echo HTTP/1.1\r\nHost: toy\r\nContent-Length: 3\r\n\r\nabc";
    let [first, second, third] = ["/first", "/second", "/third"].map(get);
    peer.send(format!("{first}{body}{second}{third}")).await;
    for end in ["/first", "abc", "/second", "/third"] {
        let answer = peer.until(end).await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 1, "{answer}");
    }
}

/// hyper's `pipeline_flush` would hold the stream back until it ends.
#[tokio::test]
async fn a_stream_flows_while_another_request_waits_behind_it() {
    let server = start(bounds());
    let mut peer = server.connect().await;
    peer.send(format!("{}{}", get("/gated"), get("/say"))).await;
    peer.until("begun \r\n").await;
    server.toy.0.gate.notify_one();
    peer.until("ended\r\n0\r\n\r\n").await;
    peer.until("hello").await;
}

#[tokio::test]
async fn http2_is_known_by_its_preface_in_whatever_pieces_it_comes() {
    let server = start(bounds());
    let (mut sender, _connection) = h2(server.connect().await.0).await;
    let answer = sender.send_request(h2_get("/say")).await.unwrap();
    assert_eq!(answer.version(), http::Version::HTTP_2);
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "hello");

    // Byte by byte: preface, then an empty SETTINGS frame, answered by one of the server's.
    let mut peer = server.connect().await;
    peer.0.set_nodelay(true).unwrap();
    for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0" {
        peer.send([*byte]).await;
        tokio::task::yield_now().await;
    }
    peer.until("\0\x04\x01\0\0\0\0").await;
}

#[tokio::test]
async fn a_request_that_only_begins_like_http2_is_http1() {
    let server = start(bounds());
    let mut peer = server.connect().await;
    peer.0.set_nodelay(true).unwrap();
    for byte in b"PRIVATE /say HTTP/1.1\r\nHost: toy\r\n\r\n" {
        peer.send([*byte]).await;
        tokio::task::yield_now().await;
    }
    peer.until("hello").await;
}

#[tokio::test]
async fn tls_clients_choose_their_version_by_alpn() {
    let directory = tempfile::tempdir().unwrap();
    let (tls, root) = certificate(directory.path(), "one");
    let server = start_with(bounds(), Some(tls.clone()));
    let connect = async |alpn: &[&[u8]]| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let name = ServerName::try_from("localhost").unwrap();
        let tcp = server.connect().await.0;
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    };
    for alpn in [&[b"h2".as_slice(), b"http/1.1"][..], &[b"h2"]] {
        let stream = connect(alpn).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (mut sender, _connection) = h2(stream).await;
        let answer = sender.send_request(h2_get("/client")).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, format!("true {}", server.address));
    }
    for alpn in [&[b"http/1.1".as_slice()][..], &[]] {
        let mut stream = connect(alpn).await.unwrap();
        stream.write_all(get("/say").as_bytes()).await.unwrap();
        let mut got = Vec::new();
        while !got.ends_with(b"hello") {
            got.push(tokio::io::AsyncReadExt::read_u8(&mut stream).await.unwrap());
        }
    }

    // Another certificate under open sockets; the client knows only the first.
    let (other, _) = certificate(directory.path(), "two");
    check_tls(&other).unwrap();
    let listener = |tls| crate::config::Listener { address: server.address, tls, trusted_proxies: vec![] };
    server.listening.apply(&listener(Some(other.clone()))).unwrap();
    connect(&[]).await.unwrap_err();
    let mixed = ListenerTls { certificate: tls.certificate.clone(), key: other.key };
    let error = server.listening.apply(&listener(Some(mixed))).unwrap_err().to_string();
    assert!(error.contains("one.pem") && error.contains("two.key"), "{error}");
    server.listening.apply(&listener(Some(tls))).unwrap();
    connect(&[]).await.unwrap();
    let failures = server.listening.metrics.tls_failures.get();
    assert_eq!(failures, 1);

    let mut plain = server.connect().await;
    plain.send(get("/say")).await;
    let (got, _) = plain.rest().await;
    assert!(!got.contains("hello"), "{got}");
    super::toy::eventually("the failure is counted", || server.listening.metrics.tls_failures.get() == 2)
        .await;
}

#[test]
fn unusable_certificate_files_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let (good, _) = certificate(directory.path(), "good");
    let empty = directory.path().join("empty.pem");
    std::fs::write(&empty, "no PEM at all").unwrap();
    let absent = directory.path().join("absent.pem");
    for (certificate, key, named) in [
        (&absent, &good.key, "absent.pem"),
        (&empty, &good.key, "empty.pem"),
        (&good.certificate, &absent, "absent.pem"),
        (&good.certificate, &empty, "empty.pem"),
    ] {
        let tls = ListenerTls { certificate: certificate.clone(), key: key.clone() };
        let error = check_tls(&tls).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

fn certificate(
    directory: &std::path::Path,
    stem: &str,
) -> (ListenerTls, rustls_pki_types::CertificateDer<'static>) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let write = |name: String, text: String| {
        let path = directory.join(name);
        std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        path
    };
    let certificate = write(format!("{stem}.pem"), made.cert.pem());
    let key = write(format!("{stem}.key"), made.signing_key.serialize_pem());
    (ListenerTls { certificate, key }, made.cert.der().clone())
}

#[tokio::test]
async fn heads_over_a_limit_get_431_and_are_counted() {
    let server = start(limited(|limits| {
        limits.head_bytes_max = 1024;
        limits.headers_max = 10;
    }));
    let many: String = (0..11).map(|nth| format!("X-{nth}: y\r\n")).collect();
    let big = format!("X: {}\r\n", "y".repeat(1024));
    for fields in [many.clone(), big.clone()] {
        let mut peer = server.connect().await;
        peer.ask("/say", "hello").await;
        peer.send(format!("GET /say HTTP/1.1\r\nHost: toy\r\n{fields}\r\n{}", get("/say"))).await;
        let (got, end) = peer.rest().await;
        assert!(got.starts_with("HTTP/1.1 431 "), "{got}");
        assert!(!got.contains("hello") && end.is_ok(), "{got} {end:?}");
    }
    assert!(server.metrics().contains("head_bytes_max"), "{}", server.metrics());

    let (mut sender, _connection) = h2(server.connect().await.0).await;
    let mut request = h2_get("/say");
    for nth in 0..11 {
        let name = http::HeaderName::try_from(format!("x-{nth}")).unwrap();
        request.headers_mut().insert(name, "y".parse().unwrap());
    }
    assert_eq!(sender.send_request(request).await.unwrap().status(), 431);
    assert_eq!(sender.send_request(h2_get("/say")).await.unwrap().status(), 200);
    assert_eq!(server.toy.0.requests.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_panic_stays_in_its_exchange() {
    let server = start(bounds());
    let (mut one, mut other) = (server.connect().await, server.connect().await);
    other.send(get("/gated")).await;
    other.until("begun \r\n").await;
    for path in ["/panics", "/panics-at-once"] {
        let answer = one.ask(path, "\n").await;
        assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
        one.until("internal_error: evergate itself failed on this request\n").await;
    }
    one.send(get("/panics-later")).await;
    let (got, _) = one.rest().await;
    assert!(got.contains("one ") && !got.contains("0\r\n\r\n"), "{got}");
    server.toy.0.gate.notify_one();
    other.until("ended\r\n0\r\n\r\n").await;
    other.ask("/say", "hello").await;

    let (mut sender, _connection) = h2(server.connect().await.0).await;
    assert_eq!(sender.send_request(h2_get("/panics")).await.unwrap().status(), 500);
    let mut broken = sender.send_request(h2_get("/panics-later")).await.unwrap().into_body();
    assert_eq!(broken.frame().await.unwrap().unwrap().into_data().unwrap(), "one ");
    broken.frame().await.unwrap().unwrap_err();
    assert_eq!(sender.send_request(h2_get("/say")).await.unwrap().status(), 200);
    assert_eq!(server.context.telemetry.metrics.panics.get(), 5);
}
