//! Clients that leave, or take their time (F34): never the backend's fault, and nothing runs for nobody.

use std::time::{Duration, Instant};

use evergate::telemetry::metrics::AttemptOutcome;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, End, Request, chat_request};
use crate::support::either::{AT_ONCE, Http, attempts, faults, in_order};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Step};
use crate::support::proxy::Proxy;
use crate::support::reply::{self, Step, Talk, Then as _};
use crate::support::{PATIENCE, eventually};

#[tokio::test]
async fn f34_a_client_that_leaves_ends_the_work_at_once_wherever_it_was() {
    for http in Http::BOTH {
        for (phase, steps) in [
            ("head", vec![Step::Stall]),
            ("gate", vec![reply::sse_head(), Step::Stall]),
            ("stream", reply::sse_open(&Talk::default().chat_events_begun(3)).then(Step::Stall)),
        ] {
            let engine = Backend::start(Script::new().answer(steps)).await;
            let peer = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&engine.url(), &peer.url()]));
            let client = http.send_and_leave(proxy.addr, &chat_request(true));
            engine.has_seen(1).await;
            // Let what was sent be relayed.
            tokio::time::sleep(Duration::from_millis(30)).await;
            let left = Instant::now();
            client.abort();
            let closed = engine.closed_by_peer(engine.requests()[0].connection).await;
            assert!(closed - left < AT_ONCE, "{phase} over {http:?}: {:?}", closed - left);
            proxy.is_quiet().await;
            assert_eq!((faults(&proxy, &engine), peer.requests().len()), (0, 0), "{phase}");
            if phase == "stream" {
                assert_eq!(attempts(&proxy, engine.addr(), AttemptOutcome::Cancelled), 1);
            }
        }
    }
}

#[tokio::test]
async fn f34_a_client_that_leaves_an_answer_in_one_piece_ends_the_work_too() {
    for http in Http::BOTH {
        let head = reply::head(200, &[("content-type", "application/json"), ("content-length", "100")]);
        let engine =
            Backend::start(Script::new().answer(vec![Step::Send(head), Step::send("{"), Step::Stall])).await;
        let proxy = Proxy::start(&in_order(&[&engine.url()]));
        let client = http.send_and_leave(proxy.addr, &chat_request(false));
        engine.has_seen(1).await;
        let left = Instant::now();
        client.abort();
        let closed = engine.closed_by_peer(engine.requests()[0].connection).await;
        assert!(closed - left < AT_ONCE, "{http:?}: {:?}", closed - left);
        proxy.is_quiet().await;
        assert_eq!(faults(&proxy, &engine), 0);
    }
}

#[tokio::test]
async fn f34_a_client_that_leaves_resets_its_stream_and_no_other_at_an_http_2_backend() {
    for http in Http::BOTH {
        let begun = Talk::default().chat_events_begun(3);
        let engine = H2Backend::start(move |request| {
            if request.nth == Some(0) {
                H2Answer::sse(&begun).step(H2Step::Stall)
            } else {
                H2Answer::chat(&Talk::default())
            }
        })
        .await;
        let proxy = Proxy::start(&in_order(&[&engine.url()]).set("pool.http", "2"));
        let client = http.send_and_leave(proxy.addr, &chat_request(true));
        eventually(PATIENCE, || engine.requests().len() == 1).await;
        client.abort();
        eventually(PATIENCE, || proxy.backend(engine.addr()).in_flight() == 0).await;
        crate::support::either::assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        let connections: Vec<usize> = engine.requests().iter().map(|request| request.connection).collect();
        assert_eq!(connections[0], connections[1], "the connection lives on");
        proxy.is_quiet().await;
        assert_eq!(attempts(&proxy, engine.addr(), AttemptOutcome::Fault), 0);
    }
}

#[tokio::test]
async fn f34_a_slow_reader_holds_back_its_backend_and_not_memory() {
    const SIZE: usize = 64 << 20;
    let chunk = vec![b'x'; 1 << 20];
    let mut steps = vec![Step::Send(reply::head(200, &[("content-length", &SIZE.to_string())]))];
    steps.extend((0..SIZE / chunk.len()).map(|_| Step::send(chunk.clone())));
    let engine = Backend::start(Script::new().answer(steps)).await;
    let proxy = Proxy::start(&in_order(&[&engine.url()]).set("pool.clocks.body_idle", "300ms"));
    let mut client = Client::connect(proxy.addr).await;
    client.write(&Request::get("/v1/files/1/content").to_bytes()).await.unwrap();
    client.read_some(1).await;
    // The client dawdles for longer than a backend may: that is not the backend's silence.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let sent = proxy.telemetry.metrics.render();
    let in_memory = proxy.telemetry.metrics.memory_held_bytes.get();
    assert_eq!(in_memory, 0, "{sent}");
    assert_eq!(proxy.backend(engine.addr()).in_flight(), 1);
    // And reads on.
    let mut total = 0;
    let begin = Instant::now();
    while total < SIZE {
        let read = client.read_more().await.unwrap();
        assert!(read > 0, "cut after {total} bytes");
        total += read;
        assert!(begin.elapsed() < PATIENCE);
    }
    proxy.is_quiet().await;
    assert_eq!(faults(&proxy, &engine), 0);
}

#[tokio::test]
async fn f34_a_reader_that_stops_for_good_is_closed_and_its_work_cancelled() {
    for http in Http::BOTH {
        let event = format!(
            "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n",
            "x".repeat(60_000)
        );
        let events: Vec<&String> = std::iter::repeat_n(&event, 2000).collect();
        let engine = Backend::start(Script::new().sse(&events)).await;
        let proxy = Proxy::start(&in_order(&[&engine.url()]).set("client.slow_reader", "500ms"));
        let request = chat_request(true);
        // Neither of them reads its body.
        let (mut one, mut two) = (None, None);
        match http {
            Http::One => {
                let mut client = Client::connect(proxy.addr).await;
                client.write(&request.to_bytes()).await.unwrap();
                one = Some(client);
            }
            Http::Two => {
                two = Some(crate::support::client::H2Client::connect(proxy.addr).await.begin(&request).await)
            }
        }
        engine.has_seen(1).await;
        eventually(PATIENCE, || engine.open_connections() == 0).await;
        proxy.is_quiet().await;
        assert_eq!(faults(&proxy, &engine), 0);
        drop((one, two));
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_is_the_clients_and_not_the_backends() {
    let engine = Backend::healthy().await;
    let proxy = Proxy::start(&in_order(&[&engine.url()]));
    let mut client = Client::connect(proxy.addr).await;
    client.write(b"POST /v1/files HTTP/1.1\r\nhost: a\r\ncontent-length: 500000\r\n\r\nhalf").await.unwrap();
    engine.has_seen(1).await;
    drop(client);
    eventually(PATIENCE, || engine.open_connections() == 0).await;
    proxy.is_quiet().await;
    assert_eq!(faults(&proxy, &engine), 0);
    assert!(!engine.requests()[0].complete, "half a body must not look whole");
}

#[tokio::test]
async fn an_upload_that_stalls_is_a_408_and_not_the_backends_fault() {
    let engine = Backend::healthy().await;
    let proxy = Proxy::start(&in_order(&[&engine.url()]).set("client.upload_idle", "200ms"));
    for target in ["/v1/files", "/v1/chat/completions"] {
        let mut client = Client::connect(proxy.addr).await;
        let head = format!("POST {target} HTTP/1.1\r\nhost: a\r\ncontent-length: 500000\r\n\r\nhalf");
        client.write(head.as_bytes()).await.unwrap();
        let answer = client.try_read_answer("POST").await.unwrap();
        assert_eq!((answer.status, answer.end), (408, End::Clean), "{}", answer.text());
    }
    proxy.is_quiet().await;
    assert_eq!(faults(&proxy, &engine), 0);
}
