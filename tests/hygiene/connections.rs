//! Connections to backends: how many, of which kind, verified by whom, used again when.

use std::collections::HashSet;
use std::time::Duration;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Client, H2Client, Request, chat_request, send};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Step};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::tls::{Authority, Certificate};
use crate::support::{PATIENCE, eventually};

fn connections(requests: &[RequestSeen]) -> usize {
    requests.iter().map(|request| request.connection).collect::<HashSet<_>>().len()
}

#[tokio::test]
async fn requests_in_a_row_share_one_connection() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    for stream in [true, false, true, false, true, false] {
        // Clients come and go; the backend does not notice.
        assert_eq!(send(proxy.addr, &chat_request(stream)).await.status, 200);
        proxy.is_quiet().await;
    }
    send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!(connections(&backend.requests()), 1);
    let metrics = proxy.telemetry.metrics.render();
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok())
    };
    assert_eq!(value("evergate_upstream_connections_reused_total"), Some(6), "{metrics}");
    assert_eq!(value("evergate_upstream_connections_opened_total"), Some(1));
}

#[tokio::test]
async fn requests_at_a_time_have_a_connection_each_and_leave_it_for_the_next() {
    let slow =
        |request: &RequestSeen| [vec![Step::Delay(Duration::from_millis(50))], reply::echo(request)].concat();
    let backend = Backend::start(Script::new().by_request(slow)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    for _ in 0..3 {
        let get = || send(proxy.addr, &REQUEST);
        tokio::join!(get(), get(), get(), get());
        proxy.is_quiet().await;
    }
    assert_eq!((backend.requests().len(), connections(&backend.requests())), (12, 4));
}

static REQUEST: std::sync::LazyLock<Request> = std::sync::LazyLock::new(|| Request::get("/v1/files"));

#[tokio::test]
async fn an_idle_connection_is_closed_before_the_backend_would() {
    let backend = Backend::healthy().await;
    let builder = ProxyBuilder::new().backend(&backend.url());
    let proxy = Proxy::start(&builder.set("pool.probe.kind", "off").set("pool.clocks.idle", "100ms"));
    send(proxy.addr, &REQUEST).await;
    backend.closed_by_peer(backend.requests()[0].connection).await;
    send(proxy.addr, &REQUEST).await;
    assert_eq!(connections(&backend.requests()), 2);
}

#[tokio::test]
async fn a_connection_the_backend_wants_closed_is_not_used_again() {
    let closing = Script::new().by_request(|request| match request.path() {
        "/health" => reply::json(200, &serde_json::Value::Null),
        _ => {
            vec![Step::send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"), Step::Fin]
        }
    });
    let backend = Backend::start(closing).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    for _ in 0..5 {
        let answer = client.send(&Request::new("POST", "/v1/files").body("x")).await;
        assert_eq!(
            (answer.status, answer.header("connection")),
            (200, None),
            "the client's connection stays"
        );
    }
    assert_eq!(connections(&backend.requests()), 5);
    proxy.is_quiet().await;
}

fn h2_answer(request: &RequestSeen) -> H2Answer {
    let answer = H2Answer::new(200).header("content-type", "application/json");
    let answer = answer.step(H2Step::Delay(Duration::from_millis(30)));
    answer.data(format!("{{\"length\":{}}}", request.body.len()))
}

#[tokio::test]
async fn an_http2_backend_has_all_streams_on_one_connection() {
    let backend = H2Backend::start(h2_answer).await;
    let proxy = Proxy::start(
        &ProxyBuilder::new().backend(&backend.url()).set("pool.http", "2").set("pool.probe.kind", "off"),
    );
    let client = H2Client::connect(proxy.addr).await;
    // Nothing here may be sent twice, which is no reason for a connection of its own.
    let request = Request::new("POST", "/v1/files").body(vec![b'x'; 100_000]);
    for _ in 0..3 {
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let (client, request) = (client.clone(), request.clone());
            running.spawn(async move { client.send(&request).await });
        }
        while let Some(answer) = running.join_next().await {
            let answer = answer.unwrap();
            assert_eq!((answer.status, answer.text().as_str()), (200, "{\"length\":100000}"));
        }
    }
    assert_eq!((backend.requests().len(), connections(&backend.requests())), (60, 1));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn http2_is_spoken_where_alpn_chooses_it_and_not_otherwise() {
    let authority = Authority::new();
    let talk = Talk::default();
    let both = authority.server(Certificate::Good, &["h2", "http/1.1"]);
    let old_only = authority.server(Certificate::Good, &["http/1.1"]);
    let h2 = H2Backend::start_tls(move |_| H2Answer::chat(&talk), &both).await;
    let h1 = Backend::start_tls(Script::new(), &old_only).await;
    for (url, http) in [(h2.url(), "auto"), (h1.url(), "auto"), (h2.url(), "2"), (h1.url(), "1")] {
        let builder = ProxyBuilder::new().backend(&url).set("pool.http", http).set("pool.probe.kind", "off");
        let proxy = Proxy::start(&builder.set("pool.tls.ca", authority.ca_path().to_str().unwrap()));
        for _ in 0..4 {
            let answer = send(proxy.addr, &chat_request(true)).await;
            crate::support::client::assert_is_healthy_stream(&answer);
        }
        proxy.is_quiet().await;
    }
    assert_eq!((h2.requests().len(), connections(&h2.requests())), (8, 2));
    assert_eq!((h1.requests().len(), connections(&h1.requests())), (8, 2));
}

#[tokio::test]
async fn a_backends_certificate_is_verified() {
    let authority = Authority::new();
    let ca = authority.ca_path();
    let ca = ca.to_str().unwrap();
    for (certificate, trusted) in [
        (Certificate::Good, true),
        (Certificate::Expired, false),
        (Certificate::WrongName, false),
        (Certificate::UnknownIssuer, false),
    ] {
        let backend = Backend::start_tls(Script::new(), &authority.server(certificate, &[])).await;
        let builder = ProxyBuilder::new().backend(&backend.url()).set("pool.retry.wait_max", "0s");
        let builder = builder.set("pool.probe.kind", "off");
        let proxy = Proxy::start(&builder.clone().set("pool.tls.ca", ca));
        let answer = send(proxy.addr, &chat_request(false)).await;
        assert_eq!(answer.status == 200, trusted, "{certificate:?}: {}", answer.text());
        assert_eq!(backend.requests().len(), usize::from(trusted));
        // Nobody told of the authority, nobody trusts it.
        let proxy = Proxy::start(&builder);
        assert_ne!(send(proxy.addr, &chat_request(false)).await.status, 200);
    }
    // The name that is asked for may be another than the address.
    let backend = Backend::start_tls(Script::new(), &authority.server(Certificate::WrongName, &[])).await;
    let builder = ProxyBuilder::new().backend(&backend.url()).set("pool.tls.ca", ca);
    let proxy = Proxy::start(&builder.set("pool.tls.server_name", "elsewhere.example"));
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
}

#[tokio::test]
async fn a_client_certificate_is_shown_where_one_is_configured() {
    let authority = Authority::new();
    let backend = Backend::start_tls(Script::new(), &authority.server_for_known_clients(&[])).await;
    let ours = authority.server(Certificate::Good, &[]);
    let builder = ProxyBuilder::new()
        .backend(&backend.url())
        .set("pool.tls.ca", authority.ca_path().to_str().unwrap())
        .set("pool.retry.wait_max", "0s")
        .set("pool.probe.kind", "off");
    let stranger = Proxy::start(&builder);
    assert_ne!(send(stranger.addr, &chat_request(false)).await.status, 200);
    let builder = builder
        .set("pool.tls.client_certificate", ours.certificate_path().to_str().unwrap())
        .set("pool.tls.client_key", ours.key_path().to_str().unwrap());
    let known = Proxy::start(&builder);
    assert_eq!(send(known.addr, &chat_request(false)).await.status, 200);
    assert_eq!(backend.requests().len(), 1);
}

#[tokio::test]
async fn a_backend_may_have_a_name() {
    let backend = Backend::healthy().await;
    let url = format!("http://localhost:{}", backend.addr().port());
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&url));
    let answer = send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let seen = &backend.requests()[0];
    assert_eq!(seen.header("host"), Some(&*format!("localhost:{}", backend.addr().port())));

    let authority = Authority::new();
    let backend = Backend::start_tls(Script::new(), &authority.server(Certificate::Good, &[])).await;
    let url = format!("https://localhost:{}", backend.addr().port());
    let builder = ProxyBuilder::new().backend(&url).set("pool.tls.ca", authority.ca_path().to_str().unwrap());
    let proxy = Proxy::start(&builder);
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
}

#[tokio::test]
async fn connections_of_a_departed_client_are_closed_within_a_moment() {
    let events = Talk::of(3).chat_events_begun(2);
    let backend = Backend::start(
        Script::new().answer(reply::sse_open(&events).into_iter().chain([Step::Stall]).collect()),
    )
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off"));
    let mut client = Client::connect(proxy.addr).await;
    client.write(&chat_request(true).to_bytes()).await.unwrap();
    client.read_some(10).await;
    drop(client);
    eventually(PATIENCE, || backend.open_connections() == 0).await;
    proxy.is_quiet().await;
}
