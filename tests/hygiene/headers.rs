//! Header fields: what stays on its connection, what is added, what must arrive as it was sent.

use serde_json::Value;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Client, H2Client, Request, chat_request, send};
use crate::support::h2_backend::{H2Answer, H2Backend};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step};

fn values<'a>(seen: &'a RequestSeen, name: &str) -> Vec<&'a str> {
    let fields = seen.headers.iter().filter(|(given, _)| given.eq_ignore_ascii_case(name));
    fields.map(|(_, value)| value.as_str()).collect()
}

#[tokio::test]
async fn what_belongs_to_one_connection_stays_on_it_in_both_directions() {
    let head = b"HTTP/1.1 200 OK\r\nconnection: keep-alive, X-Inner\r\nkeep-alive: timeout=5\r\n\
        proxy-connection: keep-alive\r\nx-inner: 1\r\nx-outer: 2\r\nupgrade: h2c\r\n\
        content-type: text/plain\r\ncontent-length: 2\r\n\r\nok";
    let backend = Backend::start(Script::new().answer(vec![Step::send(&head[..])])).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let request = Request::get("/v1/files")
        .header("connection", "keep-alive, X-Private, te")
        .header(
            "Connection",
            "authorization, host, x-request-id, cookie, content-type, Upgrade, HTTP2-Settings",
        )
        .header("keep-alive", "timeout=5")
        .header("proxy-connection", "keep-alive")
        .header("te", "deflate, Trailers;q=0.5, trailers")
        .header("upgrade", "h2c")
        .header("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA")
        .header("x-private", "1")
        .header("x-public", "2")
        .header("authorization", "Bearer a")
        .header("cookie", "c=1")
        .header("content-type", "text/plain")
        .header("x-request-id", "id-1");
    let answer = send(proxy.addr, &request).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    for gone in ["keep-alive", "proxy-connection", "x-inner", "upgrade"] {
        assert_eq!(answer.header(gone), None, "{gone}");
    }
    assert_eq!(answer.header("x-outer"), Some("2"));

    let seen = &backend.requests()[0];
    for gone in ["connection", "keep-alive", "proxy-connection", "upgrade", "http2-settings", "x-private"] {
        assert_eq!(values(seen, gone), Vec::<&str>::new(), "{gone}");
    }
    assert_eq!(values(seen, "te"), ["trailers"]);
    assert_eq!(values(seen, "x-public"), ["2"]);
    // Nominating what the message means takes nothing away.
    assert_eq!(values(seen, "authorization"), ["Bearer a"]);
    assert_eq!(values(seen, "cookie"), ["c=1"]);
    assert_eq!(values(seen, "content-type"), ["text/plain"]);
    assert_eq!(values(seen, "x-request-id"), ["id-1"]);
    assert_eq!(values(seen, "host"), [backend.addr().to_string()]);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn claims_of_strangers_about_the_client_are_replaced() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let request = Request::get("/echo")
        .header("host", "api.example:8080")
        .header("x-forwarded-for", "198.51.100.1")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-host", "evil.example")
        .header("forwarded", "for=198.51.100.1");
    send(proxy.addr, &request).await;
    H2Client::connect(proxy.addr).await.send(&Request::get("/echo")).await;
    let seen = backend.requests();
    assert_eq!(values(&seen[0], "host"), [backend.addr().to_string()]);
    assert_eq!(values(&seen[0], "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(values(&seen[0], "x-forwarded-proto"), ["http"]);
    assert_eq!(values(&seen[0], "x-forwarded-host"), ["api.example:8080"]);
    assert_eq!(values(&seen[0], "forwarded"), ["for=127.0.0.1;proto=http;host=\"api.example:8080\""]);
    // HTTP/2 says its host in the request target.
    assert_eq!(values(&seen[1], "host"), [backend.addr().to_string()]);
    assert_eq!(values(&seen[1], "x-forwarded-host"), ["evergate.test"]);
    assert_eq!(values(&seen[1], "forwarded"), Vec::<&str>::new());
}

#[tokio::test]
async fn what_a_trusted_proxy_says_is_extended() {
    let backend = Backend::healthy().await;
    let trusted = Value::from(vec!["127.0.0.0/8"]);
    let trusted: toml::Value = serde_json::from_value(trusted).unwrap();
    let proxy =
        Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("listener.trusted_proxies", trusted));
    let request = Request::get("/echo")
        .header("host", "inner.example")
        .header("x-forwarded-for", "198.51.100.1")
        .header("x-forwarded-for", "198.51.100.2")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-host", "api.example")
        .header("forwarded", "for=198.51.100.1;proto=https");
    send(proxy.addr, &request).await;
    let seen = &backend.requests()[0];
    assert_eq!(values(seen, "x-forwarded-for"), ["198.51.100.1, 198.51.100.2, 127.0.0.1"]);
    assert_eq!(values(seen, "x-forwarded-proto"), ["https"]);
    assert_eq!(values(seen, "x-forwarded-host"), ["api.example"]);
    let forwarded = "for=198.51.100.1;proto=https, for=127.0.0.1;proto=http;host=\"inner.example\"";
    assert_eq!(values(seen, "forwarded"), [forwarded]);
}

#[tokio::test]
async fn every_request_has_an_id_towards_both_sides() {
    let backend = Backend::start(Script::new().by_request(|request| match request.path() {
        "/health" => reply::json(200, &Value::Null),
        _ => reply::with_headers(200, &[("x-request-id", "the-engines-own")], "ok"),
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for (theirs, kept) in [(Some("abc-1"), true), (Some("not fit"), false), (None, false)] {
        let request = Request::get("/v1/files");
        let request = theirs.into_iter().fold(request, |request, id| request.header("x-request-id", id));
        let answer = send(proxy.addr, &request).await;
        let given: Vec<_> = answer.headers.iter().filter(|(name, _)| name == "x-request-id").collect();
        assert_eq!(given.len(), 1, "{given:?}");
        let id = &given[0].1;
        assert_eq!(Some(id.as_str()) == theirs, kept);
        assert_eq!(values(backend.requests().last().unwrap(), "x-request-id"), [id]);
        assert!(kept || id.len() == 32, "{id}");
    }
    // evergate's own errors have one too.
    let answer = send(proxy.addr, &Request::new("TRACE", "/").header("x-request-id", "abc-2")).await;
    assert_eq!((answer.status, answer.header("x-request-id")), (405, Some("abc-2")));
}

#[tokio::test]
async fn field_values_arrive_as_they_were_sent() {
    let backend = Backend::start(Script::new().answer(vec![Step::send(
        &b"HTTP/1.1 200 OK\r\nx-weird: a,\tb  ;c=\"d\\\"e\"\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n\
            x-bytes: \xe9\xff\r\nx-empty:\r\ncontent-length: 0\r\n\r\n"[..],
    )]))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut client = Client::connect(proxy.addr).await;
    let request = format!(
        "GET /v1/files HTTP/1.1\r\nhost: a\r\ntraceparent: {trace}\r\ntracestate: a=1,b=2\r\nbaggage: k=v;p\r\n\
        x-weird: a,\tb  ;c=\"d\\\"e\"\r\nx-twice: 1\r\nx-twice: 2\r\nx-empty:\r\ncookie: a=1; b=2\r\nx-bytes: "
    );
    client.write(&[request.as_bytes(), b"\xe9\xff\r\n\r\n"].concat()).await.unwrap();
    let answer = client.try_read_answer("GET").await.unwrap();
    assert_eq!(answer.header("x-weird"), Some("a,\tb  ;c=\"d\\\"e\""));
    let cookies: Vec<_> = answer.headers.iter().filter(|(name, _)| name == "set-cookie").collect();
    assert_eq!(cookies.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["a=1", "b=2"]);
    assert!(answer.raw.windows(4).any(|bytes| bytes == b" \xe9\xff\r"), "{:?}", answer.raw);
    assert_eq!(answer.header("x-empty"), Some(""));

    let seen = &backend.requests()[0];
    assert_eq!(values(seen, "traceparent"), [trace]);
    assert_eq!(values(seen, "tracestate"), ["a=1,b=2"]);
    assert_eq!(values(seen, "baggage"), ["k=v;p"]);
    assert_eq!(values(seen, "x-weird"), ["a,\tb  ;c=\"d\\\"e\""]);
    assert_eq!(values(seen, "x-twice"), ["1", "2"]);
    assert_eq!(values(seen, "x-empty"), [""]);
    assert_eq!(values(seen, "cookie"), ["a=1; b=2"]);
    assert_eq!(values(seen, "x-bytes"), ["\u{fffd}\u{fffd}"]);
}

#[tokio::test]
async fn compression_is_not_asked_for_where_tokens_are_watched() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let answer = send(proxy.addr, &chat_request(false).header("accept-encoding", "gzip, br")).await;
    assert_eq!(answer.status, 200);
    send(proxy.addr, &Request::get("/v1/files").header("accept-encoding", "gzip, br")).await;
    let seen = backend.requests();
    assert_eq!(values(&seen[0], "accept-encoding"), Vec::<&str>::new());
    assert_eq!(values(&seen[1], "accept-encoding"), ["gzip, br"]);
}

#[tokio::test]
async fn a_compressed_answer_is_relayed_as_it_is_and_counted() {
    let packed = b"\x1f\x8b\x08\x00not really gzip\xff".to_vec();
    let answered = packed.clone();
    let backend = Backend::start(Script::new().by_request(move |request| match request.path() {
        "/health" => reply::json(200, &Value::Null),
        _ => reply::with_headers(
            200,
            &[("content-type", "application/json"), ("content-encoding", "gzip")],
            answered.clone(),
        ),
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for stream in [true, false] {
        let answer = send(proxy.addr, &chat_request(stream)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("content-encoding"), Some("gzip"));
        assert_eq!(answer.body, packed);
    }
    let metrics = proxy.telemetry.metrics.render();
    let counted = metrics.lines().any(|line| line.contains("compressed") && line.ends_with(" 2"));
    assert!(counted, "{metrics}");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_compressed_request_is_passed_on_as_it_is() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let packed = b"\x1f\x8b\x08\x00also not really gzip\xff".to_vec();
    let request = Request::new("POST", "/v1/chat/completions")
        .header("content-type", "application/json")
        .header("content-encoding", "gzip")
        .body(packed.clone());
    let answer = send(proxy.addr, &request).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let seen = &backend.requests()[0];
    assert_eq!(values(seen, "content-encoding"), ["gzip"]);
    assert_eq!(seen.body, packed);
}

#[tokio::test]
async fn a_backend_may_have_a_path_and_fields_of_its_own() {
    let backend = Backend::healthy().await;
    let mut own = toml::Table::new();
    own.insert("authorization".to_owned(), "Bearer own".into());
    own.insert("x-api-key".to_owned(), "key".into());
    let url = format!("{}/base/of", backend.url());
    let proxy = Proxy::start(
        &ProxyBuilder::new().backend_with(&url, &[("headers", own.into())]).set("pool.probe.kind", "off"),
    );
    let request = Request::get("/v1/files?a=b%20c")
        .header("authorization", "Bearer client")
        .header("x-api-key", "one")
        .header("x-api-key", "two");
    let answer = send(proxy.addr, &request).await;
    assert_eq!(answer.json()["target"], "/base/of/v1/files?a=b%20c");
    let seen = backend.requests();
    let seen = seen.iter().find(|seen| seen.target.ends_with("/v1/files?a=b%20c")).unwrap();
    assert_eq!(values(seen, "authorization"), ["Bearer own"]);
    assert_eq!(values(seen, "x-api-key"), ["key"]);
}

#[tokio::test]
async fn an_http2_backend_sees_its_own_authority_and_nothing_of_the_connection() {
    let backend = H2Backend::start(|request| {
        let names: Vec<&str> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
        H2Answer::new(200).header("content-type", "text/plain").data(names.join(" "))
    })
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.http", "2"));
    let request = Request::get("/v1/files").header("connection", "x-private").header("x-private", "1");
    let answer = send(proxy.addr, &request.header("te", "trailers").header("x-public", "1")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let names = answer.text();
    let names: Vec<&str> = names.split(' ').collect();
    for gone in ["host", "connection", "x-private", "transfer-encoding", "keep-alive"] {
        assert!(!names.contains(&gone), "{names:?}");
    }
    for there in ["te", "x-public", "x-forwarded-for", "x-request-id"] {
        assert!(names.contains(&there), "{names:?}");
    }
}

/// RFC 9113 §8.2.3: HTTP/2 may send a cookie in crumbs, HTTP/1.1 knows one field.
#[tokio::test]
async fn crumbs_of_a_cookie_are_put_together() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let request = Request::get("/v1/files").header("cookie", "a=1").header("cookie", "b=2; c=3");
    H2Client::connect(proxy.addr).await.send(&request).await;
    assert_eq!(values(&backend.requests()[0], "cookie"), ["a=1; b=2; c=3"]);
}
