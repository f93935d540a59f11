//! The connection stands and no good head comes (F05 to F12, F39).

use std::time::Duration;

use evergate::telemetry::metrics::AttemptOutcome;
use serde_json::json;
use toml::Value;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Request, chat_request};
use crate::support::either::{
    AT_ONCE, Http, assert_is_right, assert_is_the_stream, attempts, faults, in_order, state,
};
use crate::support::proxy::Proxy;
use crate::support::reply::{self, Step, Then as _};
use crate::support::{PATIENCE, eventually};

/// The first answer is good and keeps the connection; the next request on it meets `end`.
fn closes_on_reuse(end: Step) -> Script {
    Script::new().by_request(move |request| {
        if request.is_probe() || request.index == 0 {
            reply::healthy(request, &reply::Talk::default())
        } else {
            vec![end.clone()]
        }
    })
}

#[tokio::test]
async fn f05_a_stale_connection_is_replayed_once_on_a_fresh_one_and_is_nobodys_fault() {
    for http in Http::BOTH {
        for end in [Step::Fin, Step::Rst] {
            let only = Backend::start(closes_on_reuse(end)).await;
            let proxy = Proxy::start(&in_order(&[&only.url()]));
            for _ in 0..4 {
                assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
            }
            let seen = only.requests();
            // Every second one met a connection that was closing, and came again on a new one.
            assert!(seen.len() > 4, "no connection was kept");
            for pair in seen.windows(2).filter(|pair| pair[1].header("x-evergate-attempt").is_some()) {
                assert_eq!(pair[0].index, 1);
                assert_eq!(pair[1].index, 0, "replayed on a fresh connection");
                assert_eq!(pair[0].body, pair[1].body);
                let id = pair[0].header("x-request-id").unwrap();
                assert_eq!(pair[1].header("x-request-id"), Some(format!("{id}-2").as_str()));
            }
            assert_eq!(faults(&proxy, &only), 0);
            assert!(attempts(&proxy, only.addr(), AttemptOutcome::Neutral) > 0);
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f05_a_connection_that_closed_while_it_was_kept_costs_no_attempt() {
    for http in Http::BOTH {
        let closing = Backend::start(Script::new().by_request(|request| {
            let answer = reply::healthy(request, &reply::Talk::default());
            if request.is_probe() { answer } else { answer.then(Step::Fin) }
        }))
        .await;
        let proxy = Proxy::start(&in_order(&[&closing.url()]));
        for _ in 0..5 {
            assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
            eventually(PATIENCE, || closing.open_connections() == 0).await;
            // It is noticed when the worker's thread has looked; nothing outside shows when that was.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(closing.requests().len(), 5);
        assert!(closing.requests().iter().all(|seen| seen.header("x-evergate-attempt").is_none()));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f05_a_kept_connection_is_not_used_beyond_its_age() {
    for http in Http::BOTH {
        let engine = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&engine.url()]).set("pool.clocks.idle", "50ms"));
        for _ in 0..3 {
            assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
            tokio::time::sleep(Duration::from_millis(80)).await;
        }
        assert!(engine.requests().iter().all(|request| request.index == 0));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f05_what_must_not_be_sent_twice_goes_over_a_fresh_connection() {
    for http in Http::BOTH {
        let only = Backend::start(closes_on_reuse(Step::Rst)).await;
        let proxy = Proxy::start(&in_order(&[&only.url()]));
        assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
        for target in ["/v1/files", "/v1/responses"] {
            let body = json!({"model": "test-model", "input": "x", "store": true});
            let answer = http.send(proxy.addr, &Request::post_json(target, &body)).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let seen = only.requests().pop().unwrap();
            assert_eq!((seen.path(), seen.index), (target, 0));
        }
        assert_eq!(only.requests().len(), 3, "nothing was sent twice");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f06_a_close_on_a_fresh_connection_is_a_fault_and_a_peer_answers() {
    for http in Http::BOTH {
        for end in [Step::Fin, Step::Rst] {
            for stream in [true, false] {
                let sick = Backend::start(Script::new().answer(vec![end.clone()])).await;
                let alive = Backend::healthy().await;
                let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
                assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
                assert_eq!((sick.requests().len(), alive.requests().len()), (1, 1));
                assert_eq!(sick.requests()[0].body, alive.requests()[0].body);
                assert_eq!(faults(&proxy, &sick), 1);
                proxy.is_quiet().await;
            }
        }
    }
}

#[tokio::test]
async fn f06_a_request_that_may_have_been_executed_is_not_sent_again() {
    for http in Http::BOTH {
        let sick = Backend::start(Script::new().nameless().answer(vec![Step::Rst])).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
        let body = json!({"model": "test-model", "input": "x", "store": true});
        for request in [
            Request::post_json("/v1/responses", &body),
            Request::new("POST", "/v1/files").body("x"),
            Request::new("PATCH", "/v1/batches/1").body("x"),
        ] {
            let answer = http.send(proxy.addr, &request).await;
            assert_eq!(answer.status, 502, "{}", answer.text());
            assert!(answer.text().contains("not_replayable"), "{}", answer.text());
        }
        assert_eq!((sick.requests().len(), alive.requests().len()), (3, 0));
        // With a key the origin tells repetitions apart (draft-ietf-httpapi-idempotency-key-header).
        let keyed = Request::new("POST", "/v1/files").header("idempotency-key", "k").body("x");
        assert_eq!(http.send(proxy.addr, &keyed).await.status, 200);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f07_what_is_no_http_is_a_fault_and_a_peer_answers() {
    let oversized = format!("HTTP/1.1 200 OK\r\nx-padding: {}\r\n", "x".repeat(200_000));
    let many: String = (0..300).map(|n| format!("x-{n}: 1\r\n")).collect();
    let heads: [(&str, Vec<u8>); 7] = [
        ("half a status line", b"HTTP/1.1 20".to_vec()),
        ("half a head", b"HTTP/1.1 200 OK\r\ncontent-type: text/ev".to_vec()),
        ("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n".to_vec()),
        ("another protocol", b"220 mail.example ESMTP\r\n\r\n".to_vec()),
        ("a head too large", oversized.into_bytes()),
        ("too many fields", format!("HTTP/1.1 200 OK\r\n{many}\r\n").into_bytes()),
        ("a broken field", b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n".to_vec()),
    ];
    for http in Http::BOTH {
        for (name, head) in &heads {
            let answers = vec![Step::send(head.clone()), Step::Fin];
            let sick = Backend::start(Script::new().nameless().answer(answers)).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
            for stream in [true, false] {
                let answer = http.send(proxy.addr, &chat_request(stream)).await;
                eprintln!("{name}");
                assert_is_right(&answer, stream);
            }
            assert_eq!(faults(&proxy, &sick), 2, "{name}");
            assert_eq!((sick.requests().len(), alive.requests().len()), (2, 2), "{name}");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f09_a_server_error_is_a_fault_and_a_peer_answers() {
    for http in Http::BOTH {
        for status in [500, 502, 504, 520, 524, 527] {
            let sick = Backend::start(Script::new().answer(reply::error(status))).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
            for stream in [true, false] {
                assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
            }
            assert_eq!(faults(&proxy, &sick), 2, "{status}");
            assert_eq!((sick.requests().len(), alive.requests().len()), (2, 2), "{status}");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f09_not_implemented_is_an_answer() {
    for http in Http::BOTH {
        for status in [501, 505] {
            let odd = Backend::start(Script::new().answer(reply::error(status))).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&odd.url(), &alive.url()]));
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_eq!(
                (answer.status, answer.json()["error"]["code"].as_u64()),
                (status, Some(status.into()))
            );
            assert_eq!((faults(&proxy, &odd), alive.requests().len()), (0, 0));
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f10_a_busy_backend_is_left_alone_until_its_retry_after() {
    for http in Http::BOTH {
        for status in [503, 429, 529] {
            let said = r#"{"error":{"message":"Too many requests, try later","type":"overloaded"}}"#;
            let headers = [("retry-after", "1"), ("content-type", "application/json")];
            let busy = Backend::start(
                Script::new().answer(reply::with_headers(status, &headers, said)).then_healthy(),
            )
            .await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&busy.url(), &alive.url()]));
            for _ in 0..4 {
                assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
            }
            let first = busy.requests();
            assert_eq!((first.len(), alive.requests().len()), (1, 4), "{status}");
            // Then it is the first again.
            let mut tries = 0;
            while busy.requests().len() < 2 {
                assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
                tokio::time::sleep(Duration::from_millis(20)).await;
                tries += 1;
                assert!(tries < 400, "{status}: never asked again");
            }
            let left_alone = busy.requests()[1].at - first[0].at;
            assert!(left_alone >= Duration::from_millis(990), "{status}: after {left_alone:?}");
            assert_eq!((faults(&proxy, &busy), state(&proxy, busy.addr())), (0, "healthy"), "{status}");
            assert_eq!(attempts(&proxy, busy.addr(), AttemptOutcome::Busy), 1);
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f10_words_of_overload_count_whatever_the_status() {
    for http in Http::BOTH {
        let loading =
            json!({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}});
        for status in [500, 503] {
            let busy = Backend::start(Script::new().answer_json(status, &loading)).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&busy.url(), &alive.url()]));
            assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
            assert_eq!(faults(&proxy, &busy), 0, "{status}");
            assert_eq!(attempts(&proxy, busy.addr(), AttemptOutcome::Busy), 1, "{status}");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f10_all_busy_for_long_is_said_at_once_with_an_honest_retry_after() {
    for http in Http::BOTH {
        let (a, b) = (
            Backend::start(Script::new().answer(reply::busy(7))).await,
            Backend::start(Script::new().answer(reply::busy(30))).await,
        );
        let proxy = Proxy::start(&in_order(&[&a.url(), &b.url()]));
        for round in 0..2 {
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_eq!(answer.status, 503, "{}", answer.text());
            // The first of them is free in seven seconds.
            let after: u64 = answer.header("retry-after").unwrap().parse().unwrap();
            assert!((5..=7).contains(&after), "round {round}: {after}");
            assert!(answer.elapsed < Duration::from_secs(1), "{:?}", answer.elapsed);
            assert!(!answer.json()["error"]["message"].is_null());
        }
        assert_eq!((a.requests().len(), b.requests().len()), (1, 1));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f10_all_busy_for_a_moment_is_waited_out() {
    for http in Http::BOTH {
        let headers = [("retry-after-ms", "300"), ("content-type", "application/json")];
        let busy = || Script::new().answer(reply::with_headers(429, &headers, "{}")).then_healthy();
        let (a, b) = (Backend::start(busy()).await, Backend::start(busy()).await);
        let proxy = Proxy::start(&in_order(&[&a.url(), &b.url()]));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_is_right(&answer, true);
        assert!(answer.first_byte >= Duration::from_millis(290), "{:?}", answer.first_byte);
        assert_eq!(a.requests().len() + b.requests().len(), 3);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f11_the_clients_own_fault_is_relayed_unchanged_after_one_attempt() {
    for http in Http::BOTH {
        for status in [400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 451] {
            let said =
                format!(r#"{{ "error": {{"message":"max_tokens: no","type":"invalid", "n":{status}}} }}"#);
            let headers = [("content-type", "application/json"), ("x-engine", "1")];
            let strict =
                Backend::start(Script::new().answer(reply::with_headers(status, &headers, said.clone())))
                    .await;
            let peer = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&strict.url(), &peer.url()]));
            for stream in [true, false] {
                let answer = http.send(proxy.addr, &chat_request(stream)).await;
                assert_eq!((answer.status, answer.text()), (status, said.clone()));
                assert_eq!(answer.header("x-engine"), Some("1"));
                assert_eq!(answer.header("content-type"), Some("application/json"));
            }
            assert_eq!((strict.requests().len(), peer.requests().len()), (2, 0), "{status}");
            assert_eq!(faults(&proxy, &strict), 0, "{status}");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f11_a_context_length_error_is_the_clients_under_any_status() {
    for http in Http::BOTH {
        let said =
            json!({"error": {"message": "This model's maximum context length is 4096 tokens", "type": "x"}});
        for status in [400, 500] {
            let strict = Backend::start(Script::new().answer_json(status, &said)).await;
            let peer = Backend::healthy().await;
            let proxy = Proxy::start(&in_order(&[&strict.url(), &peer.url()]));
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_eq!((answer.status, answer.json()), (status, said.clone()));
            assert_eq!((faults(&proxy, &strict), peer.requests().len()), (0, 0));
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f12_a_refused_credential_of_our_own_is_a_misconfiguration() {
    for http in Http::BOTH {
        for status in [401, 403] {
            let locked = Backend::start(Script::new().answer(reply::error(status))).await;
            let alive = Backend::healthy().await;
            let headers = Value::Table(
                [("authorization".to_owned(), Value::from("Bearer wrong"))].into_iter().collect(),
            );
            let proxy = Proxy::start(
                &crate::support::proxy::ProxyBuilder::new()
                    .set("pool.probe.kind", "off")
                    .backend_with(&locked.url(), &[("headers", headers)])
                    .backend_with(&alive.url(), &[("tier", 1.into())]),
            );
            for _ in 0..3 {
                let request = chat_request(true).header("authorization", "Bearer of the client");
                assert_is_right(&http.send(proxy.addr, &request).await, true);
            }
            assert_eq!(locked.requests().len(), 1, "{status}: out after the first");
            assert_eq!(locked.requests()[0].header("authorization"), Some("Bearer wrong"));
            assert_eq!(alive.requests()[0].header("authorization"), Some("Bearer of the client"));
            assert_eq!(attempts(&proxy, locked.addr(), AttemptOutcome::Misconfigured), 1);
            assert_eq!(state(&proxy, locked.addr()), "ejected");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f12_a_missing_model_is_a_misconfiguration_only_where_a_peer_lists_it() {
    let missing = json!({"error": {"message": "The model `test-model` does not exist.", "type": "NotFoundError", "code": 404}});
    for http in Http::BOTH {
        // It gives no list; by one it would be known, and never asked.
        let lacking =
            Backend::start(Script::new().probes(reply::error(404)).answer_json(404, &missing)).await;
        let peer = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&lacking.url(), &peer.url()]));
        eventually(PATIENCE, || proxy.backend(peer.addr()).lists("test-model")).await;
        for _ in 0..3 {
            assert_is_right(&http.send(proxy.addr, &chat_request(true)).await, true);
        }
        assert_eq!((lacking.requests().len(), state(&proxy, lacking.addr())), (1, "ejected"));
        assert_eq!(attempts(&proxy, lacking.addr(), AttemptOutcome::Misconfigured), 1);
        proxy.is_quiet().await;

        let alone = Backend::start(Script::new().answer_json(404, &missing)).await;
        let empty = reply::json(200, &json!({"object": "list", "data": []}));
        let peer = Backend::start(Script::new().probes(empty)).await;
        let proxy = Proxy::start(&in_order(&[&alone.url(), &peer.url()]));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, answer.json()), (404, missing.clone()));
        assert_eq!(peer.requests().len(), 0);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f39_a_head_that_dribbles_is_a_fault_after_its_clock() {
    for http in Http::BOTH {
        let head = reply::head(200, &[("content-type", "text/event-stream"), ("x-a", &"a".repeat(1000))]);
        let dribble = Step::SendSlow { bytes: head, piece: 1, every: Duration::from_millis(20) };
        let sick = Backend::start(Script::new().answer(vec![dribble, Step::Stall])).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("pool.clocks.head", "200ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_is_the_stream(&answer);
        assert!(answer.first_byte >= Duration::from_millis(190), "{:?}", answer.first_byte);
        assert!(answer.first_byte < Duration::from_secs(3), "{:?}", answer.first_byte);
        assert_eq!(faults(&proxy, &sick), 1);
        let connection = sick.requests()[0].connection;
        let closed = sick.closed_by_peer(connection).await;
        assert!(closed - sick.requests()[0].at < Duration::from_millis(225) + AT_ONCE);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f39_a_backend_that_does_not_read_is_left_and_never_blamed_on_the_client() {
    for http in Http::BOTH {
        let deaf = Backend::start(Script::new().connection(vec![Step::Stall])).await;
        let alive = Backend::healthy().await;
        let proxy =
            Proxy::start(&in_order(&[&deaf.url(), &alive.url()]).set("pool.clocks.write_idle", "300ms"));
        // More than the socket buffers of both sides hold.
        let filler = "x".repeat(12 << 20);
        let body = json!({"model": "test-model", "messages": [{"role": "user", "content": filler}], "stream": true,
            "stream_options": {"include_usage": true}});
        let request = Request::post_json("/v1/chat/completions", &body);
        let answer = http.send(proxy.addr, &request).await;
        assert_is_the_stream(&answer);
        assert_eq!(alive.requests()[0].body, request.body);
        assert_eq!(faults(&proxy, &deaf), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f15_without_a_first_token_in_time_a_peer_is_asked_and_the_connection_closed() {
    for http in Http::BOTH {
        let silent: [Vec<Step>; 3] = [
            vec![Step::Stall],
            vec![reply::sse_head(), Step::Stall],
            // A role and comments are no tokens.
            reply::sse_open(&reply::Talk::default().chat_events_begun(0))
                .then(reply::chunk(": still here\n\n"))
                .then(Step::Stall),
        ];
        for steps in silent {
            let sick = Backend::start(Script::new().answer(steps)).await;
            let alive = Backend::healthy().await;
            let proxy =
                Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("pool.clocks.first_token", "250ms"));
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_is_the_stream(&answer);
            assert_eq!((faults(&proxy, &sick), sick.requests().len()), (1, 1));
            let seen = &sick.requests()[0];
            let closed = sick.closed_by_peer(seen.connection).await;
            assert!(closed - seen.at < Duration::from_millis(275) + AT_ONCE);
            proxy.is_quiet().await;
        }
    }
}
