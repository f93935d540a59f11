//! F33: a request that kills each replica that touches it costs two of them, not the fleet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Answer, Request, chat_request, chat_request_for};
use crate::support::either::{Http, assert_is_the_stream, in_order};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually};

fn is_poison(request: &RequestSeen) -> bool {
    request.body.windows(6).any(|word| word == b"poison")
}

/// Dies of a poisoned request; all others are served.
fn mortal(request: &RequestSeen) -> Vec<Step> {
    if is_poison(request) { vec![Step::Die] } else { reply::healthy(request, &Talk::default()) }
}

async fn mortals(count: usize) -> Vec<Backend> {
    let mut backends = Vec::new();
    for _ in 0..count {
        backends.push(Backend::start(Script::new().by_request(mortal)).await);
    }
    backends
}

fn poison() -> Request {
    chat_request_for("test-model", "poison", true)
}

fn pool_of(backends: &[Backend]) -> ProxyBuilder {
    let builder = ProxyBuilder::new()
        .set("pool.probe.interval", "200ms")
        .set("pool.probe.interval_unsteady", "100ms")
        .set("pool.health.ejection_min", "200ms")
        .set("pool.health.ejection_max", "400ms")
        .set("pool.retry.wait_max", "500ms");
    backends.iter().fold(builder, |builder, backend| builder.backend(&backend.url()))
}

/// How many replicas a poisoned request has touched.
fn touched(backends: &[Backend]) -> usize {
    backends.iter().map(|backend| backend.requests().iter().filter(|seen| is_poison(seen)).count()).sum()
}

fn code(answer: &Answer) -> Option<String> {
    answer.json()["error"]["code"].as_str().map(str::to_owned)
}

fn is_armed(proxy: &Proxy) -> bool {
    proxy.running.directory().snapshot().pools[0].state.ward.is_armed()
}

#[tokio::test]
async fn f33_a_request_that_kills_costs_two_replicas_and_then_at_most_one_at_a_time() {
    for http in Http::BOTH {
        let backends = mortals(6).await;
        let proxy = Proxy::start(&pool_of(&backends));
        proxy.probed().await;
        let address = proxy.addr;
        let over = Arc::new(AtomicBool::new(false));
        let others: Vec<_> = (0..4)
            .map(|_| {
                let over = over.clone();
                tokio::spawn(async move {
                    let (mut served, mut lost) = (0, Vec::new());
                    while !over.load(SeqCst) {
                        let answer = http.send(address, &chat_request(false)).await;
                        if answer.status == 200 {
                            served += 1
                        } else {
                            lost.push(answer.text())
                        }
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    (served, lost)
                })
            })
            .collect();

        let answer = http.send(address, &poison()).await;
        assert_eq!((answer.status, code(&answer).as_deref()), (502, Some("request_kills_backends")));
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        assert_eq!(answer.json()["error"]["attempts"], 2);
        assert_eq!(touched(&backends), 2, "two replicas, and no third");
        assert!(is_armed(&proxy));

        // Once more: not refused, but alone, and with one attempt.
        let answer = http.send(address, &poison()).await;
        assert_eq!(code(&answer).as_deref(), Some("request_kills_backends"));
        assert_eq!((answer.json()["error"]["attempts"].as_u64(), touched(&backends)), (Some(1), 3));
        // And again: its place is dead, and no other is tried.
        for _ in 0..2 {
            let answer = http.send(address, &poison()).await;
            assert_eq!((answer.status, touched(&backends)), (503, 3), "{}", answer.text());
        }

        over.store(true, SeqCst);
        for other in others {
            let (served, lost) = other.await.unwrap();
            assert!(served > 10, "{served}");
            // Who was at both deaths by chance cannot be told from the killer; nothing else is lost.
            let blamed = lost.iter().all(|text| text.contains("request_kills_backends"));
            assert!(blamed && lost.len() <= 1, "{lost:?}");
        }
        let told = proxy.telemetry.events.latest();
        assert!(told.iter().any(|event| event.text.contains("killed")), "{told:?}");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn one_success_clears_a_request_that_was_blamed() {
    let backends = mortals(4).await;
    let proxy = Proxy::start(&pool_of(&backends));
    proxy.probed().await;
    let answer = Http::One.send(proxy.addr, &poison()).await;
    assert_eq!(code(&answer).as_deref(), Some("request_kills_backends"));
    // Somebody has mended the engine.
    for backend in &backends {
        backend.set_script(Script::new());
        backend.restart().await;
    }
    assert_is_the_stream(&Http::One.send(proxy.addr, &poison()).await);
    eventually(PATIENCE, || !is_armed(&proxy)).await;
    for _ in 0..4 {
        assert_is_the_stream(&Http::One.send(proxy.addr, &poison()).await);
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_request_that_kills_is_sent_to_no_other_pool() {
    let (backends, spare) = (mortals(3).await, mortals(1).await);
    let entry = toml::toml! {
        pool = "spare"
        on = ["unavailable", "busy"]
    };
    let builder =
        pool_of(&backends).named_pool_kept("main").set("pool.fallback", vec![toml::Value::from(entry)]);
    let proxy = Proxy::start(&builder.route("main", &[]).named_pool("spare").backend(&spare[0].url()));
    proxy.probed().await;
    for _ in 0..3 {
        let answer = Http::One.send(proxy.addr, &poison()).await;
        assert!(answer.status >= 500, "{}", answer.text());
    }
    assert_eq!((touched(&backends), touched(&spare)), (3, 0));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_rack_that_loses_power_is_nobodys_fault() {
    for http in Http::BOTH {
        let holding = || Script::new().answer(vec![Step::Stall]);
        let rack = [Backend::start(holding()).await, Backend::start(holding()).await];
        let alive = Backend::healthy().await;
        let urls = [rack[0].url(), rack[1].url(), alive.url()];
        let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
        let proxy = Proxy::start(&in_order(&urls).set("pool.health.eject_consecutive", 1000));
        let address = proxy.addr;
        let clients: Vec<_> = (0..20)
            .map(|_| tokio::spawn(async move { http.send(address, &chat_request(true)).await }))
            .collect();
        rack[0].has_seen(20).await;
        rack[0].stop().await;
        rack[1].has_seen(20).await;
        rack[1].stop().await;
        for client in clients {
            assert_is_the_stream(&client.await.unwrap());
        }
        assert!(!is_armed(&proxy));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_reset_is_no_death() {
    let resetting = || Script::new().answer(vec![Step::Rst]);
    let (a, b) = (Backend::start(resetting()).await, Backend::start(resetting()).await);
    let c = Backend::healthy().await;
    let proxy = Proxy::start(&in_order(&[&a.url(), &b.url(), &c.url()]));
    assert_is_the_stream(&Http::One.send(proxy.addr, &chat_request(true)).await);
    assert!(!is_armed(&proxy));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_request_that_kills_behind_its_first_token_costs_two_replicas_too() {
    let mut backends = Vec::new();
    for _ in 0..5 {
        let dies = |request: &RequestSeen| {
            if !is_poison(request) {
                return reply::healthy(request, &Talk::default());
            }
            // What was said arrives before the death behind it.
            let said = reply::sse_open(&Talk::default().chat_events(false)[..4]);
            [said, vec![Step::Delay(Duration::from_millis(30)), Step::Die]].concat()
        };
        backends.push(Backend::start(Script::new().by_request(dies)).await);
    }
    let proxy = Proxy::start(&pool_of(&backends));
    proxy.probed().await;
    let answer = Http::One.send(proxy.addr, &poison()).await;
    assert_eq!(answer.text().matches("\"error\"").count(), 1, "{}", answer.text());
    assert!(answer.text().contains("\"code\":\"request_kills_backends\""), "{}", answer.text());
    assert!(!answer.text().contains("[DONE]"), "{}", answer.text());
    assert_eq!(touched(&backends), 2);
    assert!(is_armed(&proxy));
    assert_is_the_stream(&Http::One.send(proxy.addr, &chat_request(true)).await);
}
