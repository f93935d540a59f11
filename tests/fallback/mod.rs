//! A request that its own pool cannot serve, and another pool that may: by configuration and by cause only.

mod slow;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use toml::Value as Toml;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Answer, Client, Request, chat_request, chat_request_for, stream_seen};
use crate::support::either::{
    Http, assert_is_right, assert_is_the_chat, assert_is_the_stream, in_order, state,
};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually, hash};

const POOL: &str = "x-evergate-pool";

fn entry(pool: &str, on: &[&str], model: Option<&str>) -> Toml {
    let mut entry = toml::Table::from_iter([
        ("pool".to_owned(), pool.into()),
        ("on".to_owned(), on.iter().map(|cause| Toml::from(*cause)).collect::<Vec<_>>().into()),
    ]);
    entry.extend(model.map(|model| ("model".to_owned(), model.into())));
    entry.into()
}

/// Everything is routed to the pool `main` of these backends, which falls back so.
fn main_pool(urls: &[&str], fallbacks: Vec<Toml>) -> ProxyBuilder {
    in_order(urls).named_pool_kept("main").set("pool.fallback", fallbacks).route("main", &[])
}

/// Another pool, of one backend.
fn another(builder: ProxyBuilder, name: &str, url: &str) -> ProxyBuilder {
    builder.named_pool(name).backend(url).set("pool.probe.kind", "off")
}

fn from_pool(answer: &Answer) -> Option<&str> {
    answer.header(POOL)
}

fn fallbacks(proxy: &Proxy, cause: &str) -> bool {
    let series = format!("evergate_fallbacks_total{{cause=\"{cause}\",pool=\"main\"}} 1");
    proxy.telemetry.metrics.render().contains(&series)
}

fn too_long() -> Vec<Step> {
    let message = "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens";
    reply::json(400, &json!({"error": {"message": message, "type": "BadRequestError", "code": 400}}))
}

#[tokio::test]
async fn a_pool_that_is_down_is_left_at_once() {
    for http in Http::BOTH {
        for stream in [true, false] {
            let (dead, spare) = (Backend::refusing().await, Backend::healthy().await);
            let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], None)])
                .set("pool.retry.wait_max", "5s");
            let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
            let answer = http.send(proxy.addr, &chat_request(stream)).await;
            assert_is_right(&answer, stream);
            assert_eq!(from_pool(&answer), Some("spare"));
            assert!(answer.elapsed < Duration::from_secs(2), "nobody to wait for: {:?}", answer.elapsed);
            assert!(fallbacks(&proxy, "unavailable"));
            assert_eq!(spare.requests()[0].body, chat_request(stream).body, "byte for byte");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn failed_attempts_are_followed_by_another_pool_with_attempts_of_its_own() {
    for http in Http::BOTH {
        for steps in [vec![Step::Rst], reply::error(500)] {
            let sick = Backend::start(Script::new().answer(steps.clone())).await;
            let twice = Script::new().answer(vec![Step::Rst]).answer(vec![Step::Rst]).then_healthy();
            let spare = Backend::start(twice).await;
            let log = tempfile::NamedTempFile::new().unwrap();
            let builder = main_pool(&[&sick.url()], vec![entry("spare", &["unavailable"], None)])
                .set("pool.retry.attempts_max", 2)
                .set("telemetry.access_log", log.path().to_str().unwrap());
            let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_is_the_stream(&answer);
            assert_eq!(from_pool(&answer), Some("spare"));
            assert_eq!((sick.requests().len(), spare.requests().len()), (2, 3));
            let numbers: Vec<_> = spare
                .requests()
                .iter()
                .map(|seen| seen.header("x-evergate-attempt").map(str::to_owned))
                .collect();
            assert_eq!(numbers, ["3", "4", "5"].map(|n| Some(n.to_owned())), "numbered through");
            proxy.is_quiet().await;
            drop(proxy);
            let record = || std::fs::read_to_string(log.path()).unwrap();
            eventually(PATIENCE, || record().ends_with('\n')).await;
            let record: Value = serde_json::from_str(record().lines().next().unwrap()).unwrap();
            assert_eq!(record["pool"], "main");
            let seen: Vec<_> =
                record["attempts"].as_array().unwrap().iter().map(|a| (&a["pool"], &a["role"])).collect();
            let (none, spare) = (&Value::Null, &json!("spare"));
            let (first, retry, fallback) = (&json!("first"), &json!("retry"), &json!("fallback"));
            assert_eq!(
                seen,
                [(none, first), (none, retry), (spare, fallback), (spare, retry), (spare, retry)],
                "{record}"
            );
        }
    }
}

#[tokio::test]
async fn a_busy_pool_is_waited_for_and_then_left() {
    for http in Http::BOTH {
        // One says so, the other is at its cap.
        let busy = Backend::start(Script::new().answer(reply::busy(30))).await;
        let spare = Backend::healthy().await;
        let builder = main_pool(&[&busy.url()], vec![entry("spare", &["busy"], None)])
            .set("pool.retry.wait_max", "300ms");
        let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
        for _ in 0..3 {
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_is_the_stream(&answer);
            assert_eq!(from_pool(&answer), Some("spare"));
        }
        assert_eq!((busy.requests().len(), spare.requests().len()), (1, 3), "left alone as it asked");
        proxy.is_quiet().await;

        let stalled = Backend::start(Script::new().answer(vec![reply::sse_head(), Step::Stall])).await;
        let builder = ProxyBuilder::new()
            .named_pool("main")
            .backend_with(&stalled.url(), &[("in_flight_max", 1.into())])
            .set("pool.probe.kind", "off")
            .set("pool.retry.wait_max", "300ms")
            .set("pool.fallback", vec![entry("spare", &["busy"], None)])
            .route("main", &[]);
        let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
        let holding = http.send_and_leave(proxy.addr, &chat_request(true));
        stalled.has_seen(1).await;
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_is_the_stream(&answer);
        assert!(answer.elapsed >= Duration::from_millis(290), "its own short wait: {:?}", answer.elapsed);
        assert!(fallbacks(&proxy, "busy"));
        holding.abort();
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_prompt_too_long_goes_to_the_larger_model_under_its_name() {
    for http in Http::BOTH {
        for stream in [true, false] {
            let small = Backend::start(Script::new().answer(too_long())).await;
            let big =
                Backend::start(Script::new().talk(Talk { model: "big-model".to_owned(), ..Talk::default() }))
                    .await;
            let builder =
                main_pool(&[&small.url()], vec![entry("big", &["context_length"], Some("big \"model\""))])
                    .set("pool.aliases.mine", "a-much-longer-name-than-the-clients");
            let proxy = Proxy::start(&another(builder, "big", &big.url()));
            let request = chat_request_for("mine", "What is a load balancer?", stream);
            let answer = http.send(proxy.addr, &request).await;
            assert_eq!((answer.status, from_pool(&answer)), (200, Some("big")), "{}", answer.text());
            let served = if stream {
                stream_seen(&answer).model
            } else {
                answer.json()["model"].as_str().unwrap().to_owned()
            };
            assert_eq!(served, "big-model", "the answer names who served it");
            let text = |request: &RequestSeen| String::from_utf8(request.body.to_vec()).unwrap();
            let original = String::from_utf8(request.body.to_vec()).unwrap();
            assert_eq!(
                text(&small.requests()[0]),
                original.replace("\"mine\"", "\"a-much-longer-name-than-the-clients\"")
            );
            assert_eq!(text(&big.requests()[0]), original.replace("\"mine\"", r#""big \"model\"""#));
            assert!(fallbacks(&proxy, "context_length"));
            assert_eq!(state(&proxy, small.addr()), "healthy");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn an_error_in_the_stream_that_says_too_long_counts_as_well() {
    let event =
        r#"data: {"error":{"message":"x","code":"context_length_exceeded","type":"invalid_request_error"}}"#;
    let small = Backend::start(Script::new().sse(&[format!("{event}\n\n")])).await;
    let big = Backend::healthy().await;
    let builder = main_pool(&[&small.url()], vec![entry("big", &["context_length"], None)]);
    let proxy = Proxy::start(&another(builder, "big", &big.url()));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_is_the_stream(&answer);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn the_alias_of_the_other_pool_counts_where_the_entry_names_no_model() {
    let (dead, spare) = (Backend::refusing().await, Backend::healthy().await);
    let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], None)])
        .set("pool.aliases.mine", "as-main-knows-it");
    let proxy =
        Proxy::start(&another(builder, "spare", &spare.url()).set("pool.aliases.mine", "as-spare-knows-it"));
    for (asked, sent) in [("mine", "as-spare-knows-it"), ("other", "other")] {
        let answer = Http::One.send(proxy.addr, &chat_request_for(asked, "hi", false)).await;
        assert_is_the_chat(&answer);
        assert_eq!(spare.requests().last().unwrap().json()["model"], sent);
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_model_in_the_path_is_renamed_there() {
    let (dead, spare) = (Backend::refusing().await, Backend::healthy().await);
    let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], Some("org/b"))]);
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    let request = Request::post_json("/v2/models/a/infer?x=a", &json!({"inputs": []}));
    Http::One.send(proxy.addr, &request).await;
    assert_eq!(spare.requests()[0].target, "/v2/models/org%2Fb/infer?x=a");
    assert_eq!(spare.requests()[0].body, request.body);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn each_pool_gets_its_own_credentials_and_none_of_the_others() {
    let sick = Backend::start(Script::new().answer(reply::error(500))).await;
    let spare = Backend::healthy().await;
    let headers = |value: &str| {
        toml::Table::from_iter([("authorization".to_owned(), format!("Bearer {value}").into())]).into()
    };
    let builder = ProxyBuilder::new()
        .named_pool("main")
        .backend_with(
            &sick.url(),
            &[(
                "headers",
                toml::toml! { authorization = "Bearer main"
                x-tenant = "main" }
                .into(),
            )],
        )
        .set("pool.probe.kind", "off")
        .set("pool.retry.attempts_max", 1)
        .set("pool.fallback", vec![entry("spare", &["unavailable"], None)])
        .route("main", &[])
        .named_pool("spare")
        .backend_with(&spare.url(), &[("headers", headers("spare"))])
        .set("pool.probe.kind", "off");
    let proxy = Proxy::start(&builder);
    let request = chat_request(true).header("authorization", "Bearer client");
    assert_is_the_stream(&Http::One.send(proxy.addr, &request).await);
    let (there, here) = (&sick.requests()[0], &spare.requests()[0]);
    assert_eq!(
        (there.header("authorization"), there.header("x-tenant")),
        (Some("Bearer main"), Some("main"))
    );
    assert_eq!((here.header("authorization"), here.header("x-tenant")), (Some("Bearer spare"), None));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn the_other_pool_has_clocks_of_its_own() {
    for http in Http::BOTH {
        let silent = || Script::new().answer(vec![reply::sse_head(), Step::Stall]);
        let (first, second) = (Backend::start(silent()).await, Backend::start(silent()).await);
        let builder = main_pool(&[&first.url()], vec![entry("spare", &["unavailable"], None)])
            .set("pool.retry.attempts_max", 1)
            .set("pool.clocks.first_token", "300ms");
        let proxy = Proxy::start(
            &another(builder, "spare", &second.url())
                .set("pool.retry.attempts_max", 1)
                .set("pool.clocks.first_token", "900ms"),
        );
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (504, Some("backend_timeout")));
        assert_eq!(answer.json()["error"]["attempts"], 2);
        assert!(answer.elapsed >= Duration::from_millis(1190), "{:?}", answer.elapsed);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn what_is_the_clients_own_fault_is_relayed_and_asked_nowhere_else() {
    let all = ["unavailable", "busy", "slow", "context_length"];
    let filter = json!({"error": {"message": "The response was filtered due to our content management policy; \
        its maximum context length is no excuse", "code": "content_filter", "type": "invalid_request_error"}});
    for (status, body) in [
        (400, filter),
        (400, json!({"error": {"message": "messages: field required", "type": "BadRequestError"}})),
        (404, json!({"error": {"message": "no such thing"}})),
        (422, json!({"detail": [{"msg": "Field required"}]})),
    ] {
        for http in Http::BOTH {
            let own = Backend::start(Script::new().answer_json(status, &body)).await;
            let spare = Backend::healthy().await;
            let proxy = Proxy::start(&another(
                main_pool(&[&own.url()], vec![entry("spare", &all, None)]),
                "spare",
                &spare.url(),
            ));
            let answer = http.send(proxy.addr, &chat_request(false)).await;
            assert_eq!((answer.status, answer.json()), (status, body.clone()));
            assert_eq!((from_pool(&answer), spare.requests().len()), (None, 0));
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn only_the_causes_of_an_entry_lead_there_and_its_own_fallbacks_are_not_followed() {
    let (dead, spare, third) =
        (Backend::refusing().await, Backend::refusing().await, Backend::healthy().await);
    let builder = main_pool(
        &[&dead.url()],
        vec![entry("third", &["busy", "context_length"], None), entry("spare", &["unavailable"], None)],
    )
    .set("pool.retry.wait_max", "100ms");
    let builder = another(builder, "spare", &spare.url())
        .set("pool.retry.wait_max", "100ms")
        .set("pool.fallback", vec![entry("third", &["unavailable", "busy"], None)]);
    let proxy = Proxy::start(&another(builder, "third", &third.url()));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("no_backend_available")));
    assert_eq!(third.requests().len(), 0);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn where_all_pools_fail_there_is_one_honest_error() {
    for http in Http::BOTH {
        // Nobody anywhere.
        let (dead, spare) = (Backend::refusing().await, Backend::refusing().await);
        let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], None)]);
        let proxy =
            Proxy::start(&another(builder, "spare", &spare.url()).set("pool.retry.wait_max", "200ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (503, Some("no_backend_available"))
        );
        assert_eq!((answer.header("retry-after"), from_pool(&answer)), (Some("1"), None));
        proxy.is_quiet().await;

        // The own pool broke off, the other is down: what the own pool did is told.
        let sick = Backend::start(Script::new().answer(vec![Step::Rst])).await;
        let builder = main_pool(&[&sick.url()], vec![entry("spare", &["unavailable"], None)])
            .set("pool.retry.attempts_max", 1);
        let proxy =
            Proxy::start(&another(builder, "spare", &spare.url()).set("pool.retry.wait_max", "200ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (502, Some("backend_failed")));
        assert!(answer.text().contains("closed"), "{}", answer.text());
        proxy.is_quiet().await;

        // A backend has spoken: its words, and not the other pool's name on them.
        let small = Backend::start(Script::new().answer(too_long())).await;
        let builder = main_pool(&[&small.url()], vec![entry("spare", &["context_length"], None)]);
        let proxy =
            Proxy::start(&another(builder, "spare", &spare.url()).set("pool.retry.wait_max", "200ms"));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, from_pool(&answer)), (400, None));
        assert!(answer.text().contains("maximum context length"), "{}", answer.text());
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn several_pools_are_asked_in_their_order() {
    let (dead, busy, third) = (
        Backend::refusing().await,
        Backend::start(Script::new().answer(reply::busy(30))).await,
        Backend::healthy().await,
    );
    let entries = vec![entry("busy", &["unavailable"], None), entry("third", &["unavailable", "busy"], None)];
    let builder =
        another(main_pool(&[&dead.url()], entries), "busy", &busy.url()).set("pool.retry.wait_max", "100ms");
    let proxy = Proxy::start(&another(builder, "third", &third.url()));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_is_the_stream(&answer);
    assert_eq!((from_pool(&answer), busy.requests().len()), (Some("third"), 1));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn what_keeps_state_or_computes_nothing_stays_in_its_pool() {
    let (dead, spare) = (Backend::refusing().await, Backend::healthy().await);
    let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], None)])
        .set("pool.retry.wait_max", "100ms");
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    let stateful = json!({"model": "test-model", "input": "x", "previous_response_id": "r"});
    for request in [Request::post_json("/v1/responses", &stateful), Request::get("/v1/files")] {
        assert_eq!(Http::One.send(proxy.addr, &request).await.status, 503);
    }
    assert_eq!(spare.requests().len(), 0);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_name_that_cannot_be_changed_is_no_reason_to_send_a_wrong_one() {
    let (dead, spare) = (Backend::refusing().await, Backend::healthy().await);
    let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], Some("renamed"))])
        .set("limits.replay_body_max", "1KiB")
        .set("pool.retry.wait_max", "300ms");
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    let long = chat_request_for("test-model", &"x".repeat(100_000), false);
    let nameless = Request::post_json("/v1/chat/completions", &json!({"messages": []}));
    for request in [long, nameless] {
        let answer = Http::One.send(proxy.addr, &request).await;
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert!(answer.elapsed >= Duration::from_millis(290), "the pool is waited for after all");
    }
    assert_eq!(spare.requests().len(), 0);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_long_body_that_nobody_took_yet_still_goes_to_the_other_pool() {
    let (dead, spare) = (Backend::refusing().await, Backend::healthy().await);
    let builder = main_pool(&[&dead.url()], vec![entry("spare", &["unavailable"], None)])
        .set("limits.replay_body_max", "1KiB");
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    let request = chat_request_for("test-model", &"x".repeat(100_000), false);
    assert_is_the_chat(&Http::One.send(proxy.addr, &request).await);
    assert_eq!(hash(&spare.requests()[0].body), hash(&request.body));

    // The same behind `Expect: 100-continue`: somebody will take it.
    let mut client = Client::connect(proxy.addr).await;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        request.body.len()
    );
    client.write(head.as_bytes()).await.unwrap();
    assert_eq!(client.read_bytes(25).await, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write(&request.body).await.unwrap();
    assert_is_the_chat(&client.try_read_answer("POST").await.unwrap());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_pool_that_returns_is_used_again_within_seconds() {
    let (own, spare) = (Backend::healthy().await, Backend::healthy().await);
    let builder = ProxyBuilder::new()
        .named_pool("main")
        .backend(&own.url())
        .set("pool.probe.interval", "200ms")
        .set("pool.probe.interval_unsteady", "100ms")
        .set("pool.health.ejection_min", "200ms")
        .set("pool.fallback", vec![entry("spare", &["unavailable"], None)])
        .route("main", &[]);
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    proxy.probed().await;
    let ask = async || {
        let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
        assert_is_the_stream(&answer);
        from_pool(&answer).map(str::to_owned)
    };
    assert_eq!(ask().await, None);
    own.stop().await;
    for _ in 0..10 {
        assert_eq!(ask().await.as_deref(), Some("spare"));
    }
    let asked_while_down = own.requests().len();
    assert_eq!(asked_while_down, 1, "nothing but probes and connects");
    own.restart().await;
    let back = Instant::now();
    while ask().await.is_some() {
        assert!(back.elapsed() < Duration::from_secs(5), "not back yet");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    proxy.is_quiet().await;
}
