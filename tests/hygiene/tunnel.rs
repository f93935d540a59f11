//! Connections that are switched to another protocol: after the 101 evergate passes bytes and understands none.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::support::PATIENCE;
use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, Request};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::tls::{Authority, Certificate};
use crate::support::within;

/// A backend that switches one connection and hands it to the test, with the head it was asked with.
async fn switching() -> (SocketAddr, JoinHandle<(TcpStream, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let switched = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let head = head(&mut stream).await;
            // Who asks for models is not who asks for a switch.
            if head.starts_with("GET /v1/realtime") {
                // The first bytes of the other protocol come in the same segment.
                stream.write_all(SWITCHED.as_bytes()).await.unwrap();
                return (stream, head);
            }
        }
    });
    (addr, switched)
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nhello";

/// A request's head, to its end or the connection's.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

fn ask() -> Request {
    Request::get("/v1/realtime?model=m")
        .header("connection", "keep-alive, Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("sec-websocket-version", "13")
}

async fn switched() -> (Proxy, Client, TcpStream, String) {
    let (addr, backend) = switching().await;
    let proxy =
        Proxy::start(&ProxyBuilder::new().backend(&format!("http://{addr}")).set("pool.probe.kind", "off"));
    let mut client = Client::connect(proxy.addr).await;
    let answer = client.send(&ask()).await;
    assert_eq!(answer.status, 101);
    assert_eq!(answer.header("upgrade"), Some("websocket"));
    assert_eq!(answer.header("connection").map(str::to_ascii_lowercase).as_deref(), Some("upgrade"));
    assert_eq!(answer.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    let (stream, head) = within(PATIENCE, backend).await.unwrap();
    (proxy, client, stream, head)
}

#[tokio::test]
async fn bytes_pass_both_ways_until_the_client_ends_it() {
    let (proxy, mut client, mut backend, head) = switched().await;
    let head = head.to_ascii_lowercase();
    for field in [
        "upgrade: websocket",
        "connection: upgrade",
        "sec-websocket-key: dghlihnhbxbszsbub25jzq==",
        "sec-websocket-version: 13",
    ] {
        assert!(head.contains(field), "{head}");
    }
    assert_eq!(client.read_bytes(5).await, b"hello");
    let up: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
    let mut got = vec![0; up.len()];
    let (written, read) = tokio::join!(client.write(&up), within(PATIENCE, backend.read_exact(&mut got)));
    written.unwrap();
    read.unwrap();
    assert!(got == up);
    let (written, got) = tokio::join!(backend.write_all(&up), client.read_bytes(up.len()));
    written.unwrap();
    assert!(got == up);
    drop(client);
    assert_eq!(within(PATIENCE, backend.read(&mut [0; 8])).await.unwrap_or(0), 0);
    drop(backend);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_backend_that_ends_it_ends_it_for_the_client() {
    let (proxy, mut client, mut backend, _) = switched().await;
    backend.write_all(b"bye").await.unwrap();
    drop(backend);
    assert_eq!(client.read_bytes(8).await, b"hellobye");
    assert!(client.is_closed_within(PATIENCE).await);
    drop(client);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn half_a_tunnel_may_be_closed() {
    let (proxy, mut client, mut backend, _) = switched().await;
    client.write(b"last words").await.unwrap();
    client.finish_sending().await;
    let mut said = Vec::new();
    within(PATIENCE, backend.read_to_end(&mut said)).await.unwrap();
    assert_eq!(said, b"last words");
    backend.write_all(b" heard").await.unwrap();
    assert_eq!(client.read_bytes(11).await, b"hello heard");
    drop(backend);
    assert!(client.is_closed_within(PATIENCE).await);
    proxy.is_quiet().await;
}

/// Two small writes and an answer: with Nagle on either side the second would wait for a delayed
/// acknowledgement of the first (failures.md: 40 ms).
#[tokio::test]
async fn small_writes_leave_at_once() {
    let (_proxy, mut client, mut backend, _) = switched().await;
    client.read_bytes(5).await;
    let mut rounds = Vec::new();
    for _ in 0..25 {
        let begin = Instant::now();
        for byte in [b"a", b"b"] {
            client.write(byte).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        within(PATIENCE, backend.read_exact(&mut [0; 2])).await.unwrap();
        for byte in [b"c", b"d"] {
            backend.write_all(byte).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(client.read_bytes(2).await, b"cd");
        rounds.push(begin.elapsed());
    }
    rounds.sort_unstable();
    // The third of the quickest: a busy machine delays some, Nagle all.
    assert!(rounds[rounds.len() / 3] < Duration::from_millis(35), "{rounds:?}");
}

#[tokio::test]
async fn a_backend_that_does_not_switch_answers_as_usual() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    for _ in 0..2 {
        let answer = client.send(&ask()).await;
        assert_eq!((answer.status, answer.json()["target"].as_str()), (200, Some("/v1/realtime?model=m")));
    }
    // One that switches without being asked speaks no HTTP.
    let uninvited = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
    backend.set_script(Script::new().answer(vec![crate::support::reply::Step::send(uninvited)]));
    let answer = client.send(&Request::get("/v1/files")).await;
    assert!(matches!(answer.status, 502 | 503), "{}", answer.text());
    proxy.is_quiet().await;
}

/// HTTP/2 has no such switch: where a backend speaks both, ALPN must not choose it for this connection.
#[tokio::test]
async fn a_tunnel_over_tls_is_asked_for_in_http1() {
    let authority = Authority::new();
    let server = authority.server(Certificate::Good, &["h2", "http/1.1"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let backend = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = server.acceptor().accept(stream).await else { continue };
            let chosen = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
            if chosen.as_deref() == Some(b"h2") || !head(&mut stream).await.starts_with("GET /v1/realtime") {
                continue;
            }
            stream.write_all(SWITCHED.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            let mut said = [0; 3];
            stream.read_exact(&mut said).await.unwrap();
            return said;
        }
    });
    let builder = ProxyBuilder::new().backend(&url).set("pool.probe.kind", "off");
    let proxy = Proxy::start(&builder.set("pool.tls.ca", authority.ca_path().to_str().unwrap()));
    let mut client = Client::connect(proxy.addr).await;
    assert_eq!(client.send(&ask()).await.status, 101);
    assert_eq!(client.read_bytes(5).await, b"hello");
    client.write(b"bye").await.unwrap();
    assert_eq!(&within(PATIENCE, backend).await.unwrap(), b"bye");
}
