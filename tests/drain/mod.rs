//! The end: what runs finishes, what is new goes elsewhere, and nothing of evergate is left behind.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use evergate::drain::Drained;
use tokio::net::TcpStream;

use crate::support::backend::{Backend, Script};
use crate::support::client::{
    Client, End, H2Client, Request, assert_is_healthy_stream, chat_request, stream_seen,
};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually, within};

/// A replica whose streams take a while, and one token of which was read.
async fn streaming(proxy: &Proxy) -> Client {
    let mut client = Client::connect(proxy.addr).await;
    client.write(&chat_request(true).to_bytes()).await.unwrap();
    client
}

fn slow() -> Script {
    Script::new().talk(Talk::of(10).gap(Duration::from_millis(40)))
}

async fn refused(address: SocketAddr) {
    let begin = Instant::now();
    while TcpStream::connect(address).await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "{address} still takes clients");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn running_work_finishes_and_new_clients_are_refused() {
    let backend = Backend::start(slow()).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let (mut h1, h2) = (streaming(&proxy).await, H2Client::connect(proxy.addr).await);
    let over_h2 = {
        let h2 = h2.clone();
        tokio::spawn(async move { h2.send(&chat_request(true)).await })
    };
    // Kept, and idle.
    let mut idle = Client::connect(proxy.addr).await;
    assert_eq!(idle.send(&Request::get("/v1/files")).await.status, 200);
    backend.has_seen(3).await;
    proxy.running.end("test");
    refused(proxy.addr).await;
    assert!(idle.is_closed_within(PATIENCE).await, "an idle connection has nothing to wait for");
    let answer = within(PATIENCE, h1.try_read_answer("POST")).await.unwrap();
    assert_is_healthy_stream(&answer);
    assert!(h1.is_closed_within(PATIENCE).await);
    assert_is_healthy_stream(&over_h2.await.unwrap());
    eventually(PATIENCE, || h2.is_closed()).await;
    assert_eq!(within(PATIENCE, proxy.running.drained()).await, Drained::Complete);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn kept_connections_are_told_with_their_next_answer() {
    let backend = Backend::start(Script::new().by_request(|request| {
        let pause = Step::Delay(Duration::from_millis(100));
        [vec![pause], reply::echo(request)].concat()
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    let h2 = H2Client::connect(proxy.addr).await;
    h2.send(&Request::get("/v1/files")).await;
    let mut h1 = Client::connect(proxy.addr).await;
    h1.write(&Request::get("/v1/files").to_bytes()).await.unwrap();
    let running = {
        let h2 = h2.clone();
        tokio::spawn(async move { h2.send(&Request::get("/v1/files")).await })
    };
    backend.has_seen(3).await;
    proxy.running.end("test");
    let answer = within(PATIENCE, h1.try_read_answer("GET")).await.unwrap();
    assert_eq!((answer.status, answer.header("connection"), answer.end), (200, Some("close"), End::Clean));
    assert!(h1.is_closed_within(PATIENCE).await);
    assert_eq!(running.await.unwrap().status, 200);
    // GOAWAY: what runs was finished, and nothing new begins.
    assert!(h2.try_send(&Request::get("/v1/files")).await.is_err());
    assert_eq!(backend.requests().len(), 3);
    assert_eq!(within(PATIENCE, proxy.running.drained()).await, Drained::Complete);
}

#[tokio::test]
async fn a_request_that_is_still_coming_is_answered() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let bytes = chat_request(false).to_bytes();
    let (begin, rest) = bytes.split_at(bytes.len() - 10);
    let mut client = Client::connect(proxy.addr).await;
    client.write(begin).await.unwrap();
    let exchanges = &proxy.telemetry.metrics.exchanges;
    eventually(PATIENCE, || exchanges.in_flight() == 1).await;
    proxy.running.end("test");
    refused(proxy.addr).await;
    client.write(rest).await.unwrap();
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert_eq!(within(PATIENCE, proxy.running.drained()).await, Drained::Complete);
}

/// What is cut must not look whole.
#[tokio::test]
async fn the_deadline_cuts_what_is_left_visibly() {
    let backend = Backend::start(Script::new().by_request(|request| match request.path() {
        "/v1/files" => {
            let head = [("content-type", "text/plain"), ("transfer-encoding", "chunked")];
            vec![Step::Send(reply::head(200, &head)), reply::chunk("begun"), Step::Stall]
        }
        "/v1/chat/completions" => {
            [reply::sse_open(&Talk::of(5).chat_events_begun(2)), vec![Step::Stall]].concat()
        }
        _ => reply::healthy(request, &Talk::default()),
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("drain_deadline", "300ms"));
    let mut stream = streaming(&proxy).await;
    let mut plain = Client::connect(proxy.addr).await;
    plain.write(&Request::get("/v1/files").to_bytes()).await.unwrap();
    let mut old = Client::connect(proxy.addr).await;
    old.write(b"GET /v1/files HTTP/1.0\r\nconnection: close\r\n\r\n").await.unwrap();
    let h2 = H2Client::connect(proxy.addr).await;
    let over_h2 = tokio::spawn(async move { h2.send(&chat_request(true)).await });
    backend.has_seen(4).await;
    // Each client has got the beginning of its answer.
    let begun =
        tokio::join!(async { stream.read_bytes(1).await }, async { plain.read_bytes(1).await }, async {
            old.read_bytes(1).await
        });
    assert_eq!(begun, (b"H".to_vec(), b"H".to_vec(), b"H".to_vec()));
    let begin = Instant::now();
    proxy.running.end("test");
    let drained = within(PATIENCE, proxy.running.drained()).await;
    assert!(matches!(drained, Drained::Deadline { left: 1.. }), "{drained:?}");
    assert!(begin.elapsed() >= Duration::from_millis(300));
    for client in [&mut stream, &mut plain] {
        let rest = rest_of(client).await;
        assert!(
            !rest.ends_with(b"\r\n0\r\n\r\n"),
            "a cut that looks whole: {:?}",
            String::from_utf8_lossy(&rest)
        );
    }
    assert_ne!(within(PATIENCE, over_h2).await.unwrap().end, End::Clean);
    // To HTTP/1.0 the end of the connection is the end of the body: only a reset is visible.
    let mut read = vec![0; 1024];
    let reset = async {
        loop {
            match old.read_raw(&mut read).await {
                Ok(0) => return false,
                Ok(_) => {}
                Err(_) => return true,
            }
        }
    };
    assert!(within(PATIENCE, reset).await, "the end of an HTTP/1.0 answer that was cut looks like an end");
    eventually(PATIENCE, || backend.open_connections() <= 1).await;
}

async fn rest_of(client: &mut Client) -> Vec<u8> {
    let mut rest = Vec::new();
    let mut some = vec![0; 4096];
    while let Ok(read @ 1..) = within(PATIENCE, client.read_raw(&mut some)).await {
        rest.extend_from_slice(&some[..read]);
    }
    rest
}

#[tokio::test]
async fn a_second_end_cuts_at_once() {
    let stalled = [reply::sse_open(&Talk::of(5).chat_events_begun(2)), vec![Step::Stall]].concat();
    let backend = Backend::start(Script::new().answer(stalled)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    let mut stream = streaming(&proxy).await;
    stream.read_bytes(1).await;
    proxy.running.end("test");
    refused(proxy.addr).await;
    proxy.running.end("test again");
    // Who waits finds the stream cut, or already gone; not the deadline of thirty seconds.
    let drained = within(Duration::from_secs(5), proxy.running.drained()).await;
    assert!(!matches!(drained, Drained::Deadline { .. }), "{drained:?}");
    let rest = rest_of(&mut stream).await;
    assert!(!rest.ends_with(b"0\r\n\r\n"));
    backend.closed_by_peer(0).await;
}

#[tokio::test]
async fn a_tunnel_is_waited_for_and_cut_at_the_deadline() {
    let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let backend = Backend::start(Script::new().answer(vec![Step::send(head), Step::Stall])).await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("drain_deadline", "300ms");
    let proxy = Proxy::start(&builder.set("pool.probe.kind", "off"));
    let ask = Request::get("/v1/realtime").header("connection", "upgrade").header("upgrade", "websocket");
    let mut client = Client::connect(proxy.addr).await;
    assert_eq!(client.send(&ask).await.status, 101);
    proxy.running.end("test");
    let drained = within(PATIENCE, proxy.running.drained()).await;
    assert!(matches!(drained, Drained::Deadline { left: 1.. }), "{drained:?}");
    assert!(client.is_closed_within(PATIENCE).await);
    drop(proxy);
    eventually(PATIENCE, || backend.open_connections() == 0).await;
}

/// Threads of this process with such a name. Other tests run beside this one with proxies of their own, so
/// the names cannot be counted; the ids of ours can be followed.
fn threads() -> Vec<(u32, String)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| {
            let task = task.ok()?;
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            Some((task.file_name().to_str()?.parse().ok()?, name.trim().to_owned()))
        })
        .collect()
}

#[tokio::test]
async fn nothing_is_left_of_a_dropped_proxy() {
    let stalled = [reply::sse_open(&Talk::of(5).chat_events_begun(2)), vec![Step::Stall]].concat();
    let backend = Backend::start(Script::new().answer(stalled)).await;
    // Enough workers to be told from those of other tests.
    let proxy = Proxy::start(&ProxyBuilder::new().set("workers", 41).backend(&backend.url()));
    let named = |name: &str| threads().into_iter().find(|(_, given)| given == name).map(|(id, _)| id);
    let worker = |nth: usize| named(&format!("worker-{nth}"));
    eventually(PATIENCE, || (8..41).all(|nth| worker(nth).is_some())).await;
    let ours: Vec<u32> = (8..41).filter_map(worker).collect();
    let mut stream = streaming(&proxy).await;
    stream.read_bytes(1).await;
    let (addr, weak) = (proxy.addr, std::sync::Arc::downgrade(proxy.running.directory()));
    let telemetry = std::sync::Arc::downgrade(&proxy.telemetry);
    let begin = Instant::now();
    drop(proxy);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    let alive = threads();
    let left: Vec<_> =
        alive.iter().filter(|(id, name)| ours.contains(id) && name.starts_with("worker-")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(TcpStream::connect(addr).await.is_err());
    assert!(!rest_of(&mut stream).await.ends_with(b"0\r\n\r\n"));
    eventually(PATIENCE, || backend.open_connections() == 0).await;
    // Tasks, threads and connections gone, nobody holds the state either.
    assert!(weak.upgrade().is_none(), "somebody still holds the directory");
    assert!(telemetry.upgrade().is_none(), "somebody still holds the telemetry");
}

#[tokio::test]
async fn stream_seen_of_a_drained_proxy_is_exact() {
    let backend = Backend::start(slow()).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(streaming(&proxy).await);
    }
    backend.has_seen(8).await;
    proxy.running.end("test");
    for mut client in clients {
        let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
        assert_eq!(assert_is_healthy_stream(&answer).text, Talk::of(10).text());
        assert_eq!(stream_seen(&answer).done, 1);
    }
    assert_eq!(within(PATIENCE, proxy.running.drained()).await, Drained::Complete);
}
