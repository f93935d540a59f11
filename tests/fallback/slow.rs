//! The cause `slow`: a late first token is asked for at another pool, where none of its own is likely to be faster.

use std::time::Duration;

use evergate::telemetry::metrics::AttemptOutcome;
use serde_json::json;

use super::{another, entry, fallbacks, from_pool, main_pool};
use crate::support::backend::{Backend, Script};
use crate::support::client::{Request, chat_request, chat_request_for, send};
use crate::support::either::{
    Http, assert_is_right, assert_is_the_chat, assert_is_the_stream, attempts, state,
};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A pool whose first tokens are late after 600 ms.
fn quick(pool: ProxyBuilder) -> ProxyBuilder {
    pool.set("pool.progress.first_token_min", "300ms").set("pool.progress.first_token_unknown", "600ms")
}

/// Such a pool `main` of these backends, in their order.
fn slow_main(urls: &[&str], model: Option<&str>) -> ProxyBuilder {
    quick(main_pool(urls, vec![entry("spare", &["slow"], model)]))
}

/// Sends a head at once, as ASGI servers do, and then nothing.
fn headed() -> Script {
    Script::new().answer(vec![reply::sse_head(), Step::Stall])
}

/// The usual answer, begun only after a while.
fn late(delay: Duration) -> Script {
    Script::new()
        .by_request(move |request| [vec![Step::Delay(delay)], Talk::default().chat(request)].concat())
}

/// Hedges of `main` that ended so.
fn hedges(proxy: &Proxy, result: &str) -> u64 {
    let text = proxy.telemetry.metrics.render();
    let line = format!("evergate_hedges_total{{pool=\"main\",result=\"{result}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.trim().parse().unwrap())
}

#[tokio::test]
async fn a_lone_backend_that_is_late_is_overtaken_by_another_pool_under_its_own_name_and_key() {
    for http in Http::BOTH {
        for stream in [true, false] {
            let own = Backend::start(headed()).await;
            let talk = Talk { model: "big-model".to_owned(), ..Talk::default() };
            let spare = Backend::start(Script::new().talk(talk)).await;
            let key = toml::toml! { authorization = "Bearer spare" };
            let builder = slow_main(&[&own.url()], Some("big-model"))
                .named_pool("spare")
                .backend_with(&spare.url(), &[("headers", key.into())])
                .set("pool.probe.kind", "off");
            let log = tempfile::NamedTempFile::new().unwrap();
            let proxy = Proxy::start(&builder.set("telemetry.access_log", log.path().to_str().unwrap()));
            let request = chat_request(stream).header("authorization", "Bearer client");
            let answer = http.send(proxy.addr, &request).await;
            assert_eq!((answer.status, from_pool(&answer)), (200, Some("spare")), "{}", answer.text());
            assert!(answer.text().contains(r#""model":"big-model""#), "the answer names who served it");
            assert!(!answer.text().contains(r#""model":"test-model""#));
            assert!(answer.elapsed >= MS(600) && answer.elapsed < MS(5_000), "{:?}", answer.elapsed);
            let (there, here) = (&own.requests()[0], &spare.requests()[0]);
            assert_eq!(there.body, request.body, "byte for byte");
            let original = String::from_utf8(request.body.to_vec()).unwrap();
            assert_eq!(here.body, original.replace("\"test-model\"", "\"big-model\""));
            assert_eq!(
                (there.header("authorization"), here.header("authorization")),
                (Some("Bearer client"), Some("Bearer spare"))
            );
            assert_eq!(here.header("x-evergate-attempt"), Some("2"));
            assert_eq!((own.requests().len(), spare.requests().len()), (1, 1));
            // Nobody waits for it any more, and what another model can do is no verdict on it.
            own.closed_by_peer(own.connections().len() - 1).await;
            assert_eq!(attempts(&proxy, own.addr(), AttemptOutcome::Overtaken), 1);
            assert!(["healthy", "unknown"].contains(&state(&proxy, own.addr())));
            assert_eq!((hedges(&proxy, "won"), fallbacks(&proxy, "slow")), (1, true));
            proxy.is_quiet().await;
            drop(proxy);
            let record = || std::fs::read_to_string(log.path()).unwrap();
            eventually(PATIENCE, || record().ends_with('\n')).await;
            let record: serde_json::Value = serde_json::from_str(record().lines().next().unwrap()).unwrap();
            let seen: Vec<_> = record["attempts"].as_array().unwrap().iter().collect();
            assert_eq!(seen.len(), 2, "{record}");
            assert_eq!((&seen[0]["role"], &seen[0]["outcome"]), (&json!("first"), &json!("overtaken")));
            assert_eq!(
                (&seen[1]["role"], &seen[1]["pool"], &seen[1]["outcome"]),
                (&json!("hedge"), &json!("spare"), &json!("success"))
            );
        }
    }
}

#[tokio::test]
async fn who_speaks_after_all_is_believed_and_the_other_pool_is_let_go() {
    for stream in [true, false] {
        let own = Backend::start(late(MS(1_200))).await;
        let spare = Backend::start(headed()).await;
        let proxy = Proxy::start(&another(slow_main(&[&own.url()], None), "spare", &spare.url()));
        let answer = send(proxy.addr, &chat_request(stream)).await;
        assert_is_right(&answer, stream);
        assert_eq!(from_pool(&answer), None);
        assert_eq!((own.requests().len(), spare.requests().len()), (1, 1));
        spare.closed_by_peer(spare.connections().len() - 1).await;
        assert_eq!(hedges(&proxy, "lost"), 1);
        assert_eq!(attempts(&proxy, spare.addr(), AttemptOutcome::Cancelled), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_peer_that_is_free_comes_before_another_pool() {
    let (own, peer, spare) =
        (Backend::start(headed()).await, Backend::healthy().await, Backend::healthy().await);
    let proxy = Proxy::start(&another(slow_main(&[&own.url(), &peer.url()], None), "spare", &spare.url()));
    let answer = send(proxy.addr, &chat_request(true)).await;
    assert_is_the_stream(&answer);
    assert_eq!((peer.requests().len(), spare.requests().len(), from_pool(&answer)), (1, 0, None));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_peer_that_is_late_itself_is_passed_over_for_another_pool() {
    let (own, peer, spare) =
        (Backend::start(headed()).await, Backend::start(headed()).await, Backend::healthy().await);
    // Each may be hedged; none is ejected, for nobody is asked and no peer speaks.
    let builder = slow_main(&[&own.url(), &peer.url()], None).set("pool.progress.hedge_ratio", 1.0);
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    // The first waits at both of them, for the peer was free.
    let holding = Http::One.send_and_leave(proxy.addr, &chat_request(true));
    peer.has_seen(1).await;
    let answer = send(proxy.addr, &chat_request(true)).await;
    assert_is_the_stream(&answer);
    assert_eq!(from_pool(&answer), Some("spare"));
    assert_eq!((own.requests().len() + peer.requests().len(), spare.requests().len()), (3, 1));
    holding.abort();
    proxy.is_quiet().await;
}

#[tokio::test]
async fn what_the_other_pool_finds_wrong_is_not_the_last_word() {
    let wrong = json!({"error": {"message": "This model's maximum context length is 8", "code": 400}});
    for steps in [reply::json(400, &wrong), reply::error(500), reply::busy(30), vec![Step::Rst]] {
        let own = Backend::start(late(MS(1_500))).await;
        let spare = Backend::start(Script::new().answer(steps)).await;
        let proxy = Proxy::start(&another(slow_main(&[&own.url()], None), "spare", &spare.url()));
        let answer = send(proxy.addr, &chat_request(true)).await;
        assert_is_the_stream(&answer);
        assert_eq!((spare.requests().len(), from_pool(&answer)), (1, None));
        assert_eq!(hedges(&proxy, "lost"), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_late_one_that_fails_leaves_the_answer_to_the_other_pool() {
    let own = Backend::start(Script::new().answer(vec![Step::Delay(MS(1_000)), Step::Rst])).await;
    let spare = Backend::start(late(MS(1_500))).await;
    let builder = slow_main(&[&own.url()], None).set("pool.retry.attempts_max", 1);
    let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
    let answer = send(proxy.addr, &chat_request(true)).await;
    assert_is_the_stream(&answer);
    assert_eq!((own.requests().len(), spare.requests().len()), (1, 1));
    assert_eq!(from_pool(&answer), Some("spare"));
    assert_eq!(attempts(&proxy, own.addr(), AttemptOutcome::Fault), 1);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_other_pool_that_is_down_costs_nothing_and_serves_another_cause_still() {
    let own = Backend::start(late(MS(1_200))).await;
    let (dead, third) = (Backend::refusing().await, Backend::healthy().await);
    let proxy = Proxy::start(&another(slow_main(&[&own.url()], None), "spare", &dead.url()));
    assert_is_the_stream(&send(proxy.addr, &chat_request(true)).await);
    proxy.is_quiet().await;

    // The first entry cannot be given the name it needs; the second is asked.
    let nameless = Request::post_json("/v1/chat/completions", &json!({"messages": [], "stream": true}));
    let own = Backend::start(headed()).await;
    let entries = vec![entry("spare", &["slow"], Some("renamed")), entry("third", &["slow"], None)];
    let builder = quick(main_pool(&[&own.url()], entries));
    let builder = another(another(builder, "spare", &dead.url()), "third", &third.url());
    let proxy = Proxy::start(&builder);
    let answer = send(proxy.addr, &nameless).await;
    assert_eq!((answer.status, from_pool(&answer)), (200, Some("third")), "{}", answer.text());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn only_what_may_run_twice_within_the_share_and_by_that_cause_goes_there() {
    let own = Backend::start(late(MS(1_200))).await;
    let spare = Backend::healthy().await;
    let stored = json!({"model": "m", "input": "x", "store": true});
    let never = slow_main(&[&own.url()], None).set("pool.progress.hedge_ratio", 0.0);
    let other_causes = quick(main_pool(&[&own.url()], vec![entry("spare", &["unavailable", "busy"], None)]));
    for (builder, request, refused) in [
        (slow_main(&[&own.url()], None), Request::post_json("/v1/responses", &stored), 0),
        (slow_main(&[&own.url()], None).set("pool.retry.replay", "never"), chat_request(false), 0),
        (never, chat_request(false), 1),
        (other_causes, chat_request(false), 0),
    ] {
        let proxy = Proxy::start(&another(builder, "spare", &spare.url()));
        let answer = send(proxy.addr, &request).await;
        assert_eq!((answer.status, from_pool(&answer)), (200, None), "{}", answer.text());
        assert_eq!((spare.requests().len(), hedges(&proxy, "refused")), (0, refused));
        assert!(!fallbacks(&proxy, "slow"));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn few_requests_of_a_slow_pool_go_elsewhere_at_a_time() {
    let own = Backend::start(late(MS(2_000))).await;
    let spare = Backend::start(headed()).await;
    let proxy = Proxy::start(&another(slow_main(&[&own.url()], None), "spare", &spare.url()));
    let sent: Vec<_> = (0..20)
        .map(|n| {
            let request = chat_request_for("test-model", &format!("question {n}"), false);
            tokio::spawn(async move { send(proxy.addr, &request).await })
        })
        .collect();
    for answer in sent {
        assert_is_the_chat(&answer.await.unwrap());
    }
    // A twentieth of twenty.
    assert_eq!((own.requests().len(), spare.requests().len()), (20, 1));
    assert_eq!((hedges(&proxy, "lost"), hedges(&proxy, "refused")), (1, 19));
    proxy.is_quiet().await;
}
