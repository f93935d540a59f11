//! How often, where and what is sent again (failures.md §2 and §3).

use std::time::{Duration, Instant};

use evergate::telemetry::metrics::AttemptOutcome;
use serde_json::json;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{self, Answer, Client, End, Request, chat_request, stream_seen};
use crate::support::either::{
    Http, assert_is_right, assert_is_the_chat, assert_is_the_stream, attempts, faults, in_order, state,
};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk, Then as _};
use crate::support::{PATIENCE, eventually, hash, within};

/// Several backends that all do this.
async fn all(count: usize, steps: &[Step]) -> Vec<Backend> {
    let mut backends = Vec::new();
    for _ in 0..count {
        backends.push(Backend::start(Script::new().answer(steps.to_vec())).await);
    }
    backends
}

fn pool_of(backends: &[Backend]) -> ProxyBuilder {
    let urls: Vec<String> = backends.iter().map(Backend::url).collect();
    in_order(&urls.iter().map(String::as_str).collect::<Vec<_>>())
}

fn counts(backends: &[Backend]) -> Vec<usize> {
    backends.iter().map(|backend| backend.requests().len()).collect()
}

#[tokio::test]
async fn three_attempts_are_enough_and_each_goes_to_another_backend() {
    for http in Http::BOTH {
        let backends = all(5, &[Step::Rst]).await;
        let proxy = Proxy::start(&pool_of(&backends));
        let request = chat_request(true).header("x-request-id", "abc");
        let answer = http.send(proxy.addr, &request).await;
        assert_eq!(answer.status, 502, "{}", answer.text());
        let error = &answer.json()["error"];
        assert_eq!((error["code"].as_str(), error["attempts"].as_u64()), (Some("backend_failed"), Some(3)));
        assert_eq!(error["request_id"], "abc");
        assert_eq!(answer.header("x-request-id"), Some("abc"));
        assert_eq!(counts(&backends), [1, 1, 1, 0, 0]);
        for (n, backend) in backends[..3].iter().enumerate() {
            let seen = &backend.requests()[0];
            assert_eq!(seen.body, request.body);
            let (id, number) = match n {
                0 => ("abc".to_owned(), None),
                _ => (format!("abc-{}", n + 1), Some((n + 1).to_string())),
            };
            assert_eq!(seen.header("x-request-id"), Some(id.as_str()));
            assert_eq!(seen.header("x-evergate-attempt"), number.as_deref());
        }
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn an_empty_budget_makes_the_first_failure_the_answer() {
    for http in Http::BOTH {
        let sick = Backend::start(Script::new().answer(reply::error(500))).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &in_order(&[&sick.url(), &alive.url()])
                .set("pool.retry.budget_ratio", 0.0)
                .set("pool.retry.budget_floor", 0.1)
                .set("pool.health.eject_consecutive", 1000)
                .set("pool.health.success_rate_min", 0.0),
        );
        // One by the floor and eight by the burst allowance of a lost replica; then no more.
        let mut statuses = Vec::new();
        for _ in 0..14 {
            let answer = http.send(proxy.addr, &chat_request(false)).await;
            if answer.status == 500 {
                assert_eq!(answer.json()["error"]["message"], "scripted", "the backend's own words");
            }
            statuses.push(answer.status);
        }
        let served = statuses.iter().take_while(|status| **status == 200).count();
        assert!((8..=10).contains(&served), "{statuses:?}");
        assert!(statuses[served..].iter().filter(|status| **status == 200).count() <= 1, "{statuses:?}");
        assert_eq!(sick.requests().len(), 14, "a retry is not a request: it earns no retries");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn the_same_backend_is_asked_again_only_when_it_is_alone_and_after_a_pause() {
    for http in Http::BOTH {
        let only =
            Backend::start(Script::new().answer(vec![Step::Rst]).answer(vec![Step::Rst]).then_healthy())
                .await;
        let proxy = Proxy::start(&in_order(&[&only.url()]).set("pool.retry.backoff_min", "200ms"));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        let seen = only.requests();
        assert_eq!(seen.len(), 3);
        assert!(seen.iter().all(|request| request.body == chat_request(true).body));
        assert!(seen.iter().all(|request| request.index == 0), "each on a connection of its own");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn what_two_serving_backends_fail_alike_is_the_requests_own_fault() {
    for http in Http::BOTH {
        let poisoned = |request: &RequestSeen| {
            if request.body.windows(6).any(|word| word == b"poison") {
                let failed = json!({"error": {"message": "index out of range", "code": 500}});
                [vec![Step::Delay(Duration::from_millis(150))], reply::json(500, &failed)].concat()
            } else {
                reply::healthy(request, &Talk::default())
            }
        };
        let mut backends = Vec::new();
        for _ in 0..3 {
            backends.push(Backend::start(Script::new().by_request(poisoned)).await);
        }
        let proxy = Proxy::start(&backends.iter().fold(
            ProxyBuilder::new().set("pool.probe.kind", "off").set("pool.balance.strategy", "round_robin"),
            |b, backend| b.backend(&backend.url()),
        ));
        for _ in 0..3 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        let poison = client::chat_request_for("test-model", "poison", true);
        let poisoned_at = |backends: &[Backend]| -> usize {
            let is_it = |request: &&RequestSeen| request.body.windows(6).any(|word| word == b"poison");
            backends.iter().map(|backend| backend.requests().iter().filter(is_it).count()).sum()
        };
        // Others are served all the while: that is what makes two failures alike the request's own.
        let others = tokio::spawn({
            let address = proxy.addr;
            async move {
                loop {
                    assert_is_the_stream(&client::send(address, &chat_request(true)).await);
                }
            }
        });
        for round in 0..6 {
            let before = poisoned_at(&backends);
            let answer = http.send(proxy.addr, &poison).await;
            assert_eq!(
                (answer.status, answer.json()["error"]["message"].as_str()),
                (500, Some("index out of range"))
            );
            assert_eq!(poisoned_at(&backends) - before, 2, "round {round}: no third attempt");
        }
        others.abort();
        for backend in &backends {
            assert_eq!(state(&proxy, backend.addr()), "healthy", "one client must not eject the fleet");
        }
        let own: u64 =
            backends.iter().map(|b| attempts(&proxy, b.addr(), AttemptOutcome::RequestFault)).sum();
        assert_eq!(own, 6);
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn one_request_that_all_fail_ejects_nobody_from_a_fleet_without_other_traffic() {
    for http in Http::BOTH {
        let poisoned = |request: &RequestSeen| {
            if request.body.windows(6).any(|word| word == b"poison") {
                reply::error(500)
            } else {
                reply::healthy(request, &Talk::default())
            }
        };
        let mut backends = Vec::new();
        for _ in 0..4 {
            backends.push(Backend::start(Script::new().by_request(poisoned)).await);
        }
        let proxy = Proxy::start(&backends.iter().fold(
            ProxyBuilder::new().set("pool.probe.kind", "off").set("pool.balance.strategy", "round_robin"),
            |b, backend| b.backend(&backend.url()),
        ));
        let poison = client::chat_request_for("test-model", "poison", true);
        for _ in 0..10 {
            assert_eq!(http.send(proxy.addr, &poison).await.status, 500);
        }
        for backend in &backends {
            assert_ne!(state(&proxy, backend.addr()), "ejected");
        }
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn two_backends_that_fail_everybody_are_no_reason_not_to_ask_the_third() {
    for http in Http::BOTH {
        let mut backends = all(2, &reply::error(500)).await;
        backends.push(Backend::healthy().await);
        let proxy = Proxy::start(&pool_of(&backends).set("pool.health.ejection_min", "30s"));
        for stream in [true, false, true, false] {
            assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
        }
        assert_eq!(counts(&backends), [3, 3, 4], "found out and left alone");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_long_body_streams_and_moves_only_if_nothing_was_sent() {
    let body = json!({"model": "test-model", "messages": [{"role": "user", "content": "x".repeat(400_000)}]});
    let request = Request::post_json("/v1/chat/completions", &body);
    for http in Http::BOTH {
        let (dead, alive) = (Backend::refusing().await, Backend::healthy().await);
        let proxy =
            Proxy::start(&in_order(&[&dead.url(), &alive.url()]).set("limits.replay_body_max", "64KiB"));
        assert_is_the_chat(&http.send(proxy.addr, &request).await);
        assert_eq!(hash(&alive.requests()[0].body), hash(&request.body));
        proxy.is_quiet().await;

        let sick = Backend::start(Script::new().answer(vec![Step::Rst])).await;
        let proxy =
            Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("limits.replay_body_max", "64KiB"));
        let answer = http.send(proxy.addr, &request).await;
        assert_eq!(answer.status, 502, "{}", answer.text());
        assert!(answer.text().contains("not_replayable"), "{}", answer.text());
        assert_eq!((sick.requests().len(), alive.requests().len()), (1, 1));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_body_of_unknown_length_is_kept_and_replayed_byte_for_byte() {
    let (sick, alive) =
        (Backend::start(Script::new().answer(vec![Step::Rst])).await, Backend::healthy().await);
    let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
    let body = chat_request(true).body;
    let mut client = Client::connect(proxy.addr).await;
    client
        .write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    for piece in body.chunks(11) {
        client
            .write(format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)).as_bytes())
            .await
            .unwrap();
    }
    client.write(b"0\r\n\r\n").await.unwrap();
    let answer = client.try_read_answer("POST").await.unwrap();
    assert_is_the_stream(&answer);
    assert_eq!((&sick.requests()[0].body, &alive.requests()[0].body), (&body, &body));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn replay_follows_the_route_where_one_says_so() {
    for http in Http::BOTH {
        for (replay, answered) in
            [("always", [true, true]), ("safe", [false, false]), ("never", [false, false])]
        {
            let sick = Backend::start(Script::new().nameless().answer(vec![Step::Rst])).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(
                &in_order(&[&sick.url(), &alive.url()])
                    .named_pool_kept("p")
                    .route("p", &[("path_prefix", "/".into()), ("replay", replay.into())]),
            );
            let requests = [chat_request(true), Request::new("POST", "/v1/files").body("x")];
            for (request, answered) in requests.iter().zip(answered) {
                let answer = http.send(proxy.addr, request).await;
                assert_eq!(answer.status == 200, answered, "{replay}: {}", answer.text());
            }
            let get = http.send(proxy.addr, &Request::get("/v1/files/1")).await;
            assert_eq!(get.status == 200, replay != "never", "{replay}: {}", get.text());
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn the_total_clock_is_a_504_before_the_first_token_and_an_error_event_behind_it() {
    for http in Http::BOTH {
        let silent = Backend::start(Script::new().answer(vec![Step::Stall])).await;
        let peer = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&silent.url(), &peer.url()]).set("pool.clocks.total", "300ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (504, Some("backend_timeout")));
        assert!(answer.elapsed < Duration::from_secs(2), "{:?}", answer.elapsed);
        assert_eq!((faults(&proxy, &silent), peer.requests().len()), (0, 0), "nobody's fault");
        proxy.is_quiet().await;

        let begun = reply::sse_open(&Talk::default().chat_events_begun(2)).then(Step::Stall);
        let slow = Backend::start(Script::new().answer(begun)).await;
        let proxy = Proxy::start(&in_order(&[&slow.url()]).set("pool.clocks.total", "300ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        let seen = stream_seen(&answer);
        assert_eq!((seen.text.as_str(), seen.errors.len(), seen.done), ("t0 t1", 1, 0));
        assert_eq!((answer.end, seen.errors[0]["code"].as_str()), (End::Clean, Some("backend_timeout")));
        proxy.is_quiet().await;
        assert_eq!(faults(&proxy, &slow), 0);
    }
}

/// Requests that all get their answer, until three of them have met the backend that resets them. Between two it says
/// who it is, and its peer works alone.
async fn fail_until_ejected(proxy: &Proxy, sick: &Backend, http: Http) {
    let begin = Instant::now();
    while state(proxy, sick.addr()) != "ejected" {
        assert!(begin.elapsed() < PATIENCE, "{}", state(proxy, sick.addr()));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
    }
}

#[tokio::test]
async fn what_waits_at_a_backend_is_rescued_when_it_is_ejected() {
    for http in Http::BOTH {
        // The first request waits; the three after it fail, and with them the backend.
        let sick = Backend::start(Script::new().by_request(|request| match request.nth {
            None => reply::healthy(request, &Talk::default()),
            Some(0) => vec![reply::sse_head(), Step::Stall],
            Some(_) => vec![Step::Rst],
        }))
        .await;
        let alive = Backend::healthy().await;
        let proxy =
            Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("pool.health.ejection_min", "30s"));
        let address = proxy.addr;
        let waiting = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        sick.has_seen(1).await;
        fail_until_ejected(&proxy, &sick, http).await;
        let answer: Answer = within(PATIENCE, waiting).await.unwrap();
        assert_is_the_stream(&answer);
        assert_eq!(attempts(&proxy, sick.addr(), AttemptOutcome::Rescued), 1);
        assert_eq!(faults(&proxy, &sick), 3);
        eventually(PATIENCE, || sick.open_connections() == 0).await;
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_stream_behind_its_first_token_is_not_rescued_but_left_to_finish() {
    for http in Http::BOTH {
        let sick = Backend::start(Script::new().by_request(|request| match request.nth {
            Some(0) => reply::sse_paced(&Talk::default().chat_events(true), Duration::from_millis(60)),
            Some(_) => vec![Step::Rst],
            None => reply::healthy(request, &Talk::default()),
        }))
        .await;
        let alive = Backend::healthy().await;
        let proxy =
            Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("pool.health.ejection_min", "30s"));
        let address = proxy.addr;
        let streaming = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        sick.has_seen(1).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
        fail_until_ejected(&proxy, &sick, http).await;
        assert_is_the_stream(&streaming.await.unwrap());
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f31_a_pool_that_is_down_is_waited_for_and_then_said_to_be_down() {
    for http in Http::BOTH {
        let (a, b) = (Backend::refusing().await, Backend::refusing().await);
        let proxy = Proxy::start(&in_order(&[&a.url(), &b.url()]).set("pool.retry.wait_max", "600ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (503, Some("no_backend_available"))
        );
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert!(answer.elapsed >= Duration::from_millis(590), "{:?}", answer.elapsed);
        assert!(answer.elapsed < Duration::from_secs(4), "{:?}", answer.elapsed);
        proxy.is_quiet().await;

        let proxy = Proxy::start(&in_order(&[&a.url(), &b.url()]).set("pool.retry.wait_max", "5s"));
        let address = proxy.addr;
        let asking = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        eventually(PATIENCE, || faults(&proxy, &b) > 0).await;
        b.restart().await;
        assert_is_the_stream(&asking.await.unwrap());
        b.close_listener().await;
        b.stop().await;
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn after_a_storm_of_everything_at_once_nothing_is_left_behind() {
    let talk = Talk::default();
    let faults: Vec<Vec<Step>> = vec![
        vec![Step::Rst],
        vec![Step::Fin],
        reply::error(500),
        reply::busy(1),
        reply::body(200, "text/html", "<html>"),
        vec![Step::send("garbage\r\n\r\n")],
        reply::sse_open(&talk.chat_events_begun(3)).then(Step::Rst),
        reply::sse_open(&talk.chat_events_begun(3)).then(reply::last_chunk()),
        vec![reply::sse_head(), Step::Stall],
        reply::error(404),
    ];
    let mut backends = Vec::new();
    for offset in 0..4 {
        let faults = faults.clone();
        let script = Script::new().by_request(move |request| {
            // Two thirds are well.
            let nth = request.nth.unwrap_or(1) + offset;
            let fault = &faults[(nth / 3) % faults.len()];
            let fits = request.json()["stream"] == true || !fault.contains(&reply::sse_head());
            if nth % 3 > 0 || !fits { reply::healthy(request, &Talk::default()) } else { fault.clone() }
        });
        backends.push(Backend::start(script).await);
    }
    let builder =
        backends.iter().fold(ProxyBuilder::new(), |builder, backend| builder.backend(&backend.url()));
    let proxy = Proxy::start(
        &builder
            .set("workers", 2)
            .set("pool.clocks.first_token", "300ms")
            .set("pool.clocks.body_idle", "300ms")
            .set("pool.health.ejection_min", "50ms"),
    );
    let address = proxy.addr;
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..24 {
        clients.spawn(async move {
            let http = Http::BOTH[client % 2];
            for nth in 0..8 {
                let request = chat_request(nth % 2 == 0);
                if (client + nth) % 7 == 0 {
                    // Leaves in the middle of it.
                    let leaving = http.send_and_leave(address, &request);
                    tokio::time::sleep(Duration::from_millis(3)).await;
                    leaving.abort();
                    continue;
                }
                let answer = http.send(address, &request).await;
                match answer.status {
                    200 if nth % 2 == 0 => {
                        let seen = stream_seen(&answer);
                        let whole = Talk::default().chat_events(true).concat();
                        let is_whole = answer.text() == whole && seen.errors.is_empty();
                        let said_so = seen.errors.len() == 1 && seen.done == 0;
                        assert!(is_whole || said_so, "neither whole nor an error: {}", answer.text());
                    }
                    200 => assert_is_the_chat(&answer),
                    404 | 429 | 500 | 502 | 503 | 504 => {}
                    other => panic!("status {other}"),
                }
                assert_eq!(answer.end, End::Clean);
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    proxy.is_quiet().await;
    eventually(PATIENCE, || proxy.telemetry.metrics.memory_held_bytes.get() == 0).await;
}
