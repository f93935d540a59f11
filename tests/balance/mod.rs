//! Who gets a request when all are well: strategies, tiers, weights, caps and the waiting room.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use toml::Value;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Request, chat_request, chat_request_for};
use crate::support::either::{Http, assert_is_the_chat, assert_is_the_stream};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually};

async fn replicas(count: usize, talk: &Talk) -> Vec<Backend> {
    let mut backends = Vec::new();
    for _ in 0..count {
        backends.push(Backend::start(Script::new().talk(talk.clone())).await);
    }
    backends
}

fn pool_of(backends: &[Backend]) -> ProxyBuilder {
    let builder = ProxyBuilder::new().set("pool.probe.kind", "off");
    backends.iter().fold(builder, |builder, backend| builder.backend(&backend.url()))
}

fn counts(backends: &[Backend]) -> Vec<usize> {
    backends.iter().map(|backend| backend.requests().len()).collect()
}

#[tokio::test]
async fn the_default_spreads_requests_over_all() {
    for http in Http::BOTH {
        let backends = replicas(4, &Talk::default().gap(Duration::from_millis(4))).await;
        let proxy = Proxy::start(&pool_of(&backends));
        let address = proxy.addr;
        let mut asking = JoinSet::new();
        for _ in 0..12 {
            asking.spawn(async move {
                let mut client = http.connect(address).await;
                for _ in 0..10 {
                    assert_is_the_stream(&client.send(&chat_request(true)).await);
                }
            });
        }
        while let Some(done) = asking.join_next().await {
            done.unwrap();
        }
        let counts = counts(&backends);
        // Three each at any time, and thirty in all.
        assert!(counts.iter().all(|&count| (15..=45).contains(&count)), "{counts:?}");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn running_work_counts_as_load() {
    for http in Http::BOTH {
        let slow = Backend::start(Script::new().answer(vec![reply::sse_head(), Step::Stall])).await;
        let quick = Backend::healthy().await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .backend(&slow.url())
                .backend_with(&quick.url(), &[]),
        );
        // Keeps the slow one busy with a request that never ends.
        let mut held = Vec::new();
        while slow.requests().is_empty() {
            let before = slow.requests().len() + quick.requests().len();
            held.push(http.send_and_leave(proxy.addr, &chat_request(true)));
            eventually(PATIENCE, || slow.requests().len() + quick.requests().len() > before).await;
        }
        let seen = slow.requests().len();
        for _ in 0..20 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!(slow.requests().len(), seen, "the idle one is the better choice each time");
        held.iter().for_each(tokio::task::JoinHandle::abort);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_higher_tier_is_used_only_when_no_lower_one_can() {
    for http in Http::BOTH {
        let backends = replicas(3, &Talk::default()).await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .set("pool.health.ejection_min", "30s")
                .backend(&backends[0].url())
                .backend(&backends[1].url())
                .backend_with(&backends[2].url(), &[("tier", 1.into())]),
        );
        for _ in 0..20 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!(backends[2].requests().len(), 0);
        backends[0].stop().await;
        for _ in 0..20 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!(backends[2].requests().len(), 0, "one of the lower tier is left");
        backends[1].stop().await;
        for _ in 0..5 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!(backends[2].requests().len(), 5);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_cap_is_kept_and_the_rest_waits_its_turn() {
    for http in Http::BOTH {
        let paced = Talk::default().gap(Duration::from_millis(5));
        let only = Backend::start(Script::new().talk(paced)).await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .set("pool.queue.wait_max", "20s")
                .backend_with(&only.url(), &[("in_flight_max", 2.into())]),
        );
        let address = proxy.addr;
        let mut asking = JoinSet::new();
        for _ in 0..12 {
            asking.spawn(async move { http.send(address, &chat_request(true)).await });
        }
        let backend = proxy.backend(only.addr());
        let mut most = 0;
        while !asking.is_empty() {
            most = most.max(backend.in_flight());
            if let Ok(Some(answer)) = tokio::time::timeout(Duration::from_millis(1), asking.join_next()).await
            {
                assert_is_the_stream(&answer.unwrap());
            }
        }
        assert_eq!((most, only.requests().len()), (2, 12));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn who_waits_too_long_for_a_slot_is_told_so() {
    for http in Http::BOTH {
        let only = Backend::start(Script::new().answer(vec![Step::Stall])).await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .set("pool.queue.wait_max", "200ms")
                .backend_with(&only.url(), &[("in_flight_max", 1.into())]),
        );
        let first = http.send_and_leave(proxy.addr, &chat_request(true));
        only.has_seen(1).await;
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("queue_timeout")));
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert!(answer.elapsed >= Duration::from_millis(190), "{:?}", answer.elapsed);
        assert_eq!(only.requests().len(), 1);
        first.abort();
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_the_waiting_room_takes_no_slot() {
    for http in Http::BOTH {
        let only = Backend::start(Script::new().answer(vec![Step::Stall]).then_healthy()).await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .set("pool.queue.wait_max", "20s")
                .backend_with(&only.url(), &[("in_flight_max", 1.into())]),
        );
        let first = http.send_and_leave(proxy.addr, &chat_request(true));
        only.has_seen(1).await;
        let waiting = &proxy.running.directory().snapshot().pools[0].state.metrics.waiting;
        let leaving = http.send_and_leave(proxy.addr, &chat_request(true));
        eventually(PATIENCE, || waiting.get() == 1).await;
        leaving.abort();
        eventually(PATIENCE, || waiting.get() == 0).await;
        let address = proxy.addr;
        let third = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        eventually(PATIENCE, || waiting.get() == 1).await;
        first.abort();
        assert_is_the_stream(&third.await.unwrap());
        assert_eq!(only.requests().len(), 2);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn weights_are_kept() {
    let backends = replicas(2, &Talk::default()).await;
    for (strategy, least, most) in [("round_robin", 88, 92), ("weighted", 70, 110)] {
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .set("pool.balance.strategy", strategy)
                .backend_with(&backends[0].url(), &[("weight", 3.into())])
                .backend_with(&backends[1].url(), &[("weight", 1.into())]),
        );
        let before = counts(&backends);
        let mut client = Http::One.connect(proxy.addr).await;
        for _ in 0..120 {
            assert_is_the_chat(&client.send(&chat_request(false)).await);
        }
        let first = counts(&backends)[0] - before[0];
        assert!((least..=most).contains(&first), "{strategy}: {first} of 120");
        proxy.is_quiet().await;
    }
}

/// Which backend answered which key.
async fn places(http: Http, proxy: &Proxy, backends: &[Backend], requests: &[Request]) -> Vec<usize> {
    let mut places = Vec::new();
    for request in requests {
        let before = counts(backends);
        assert_is_the_chat(&http.send(proxy.addr, request).await);
        let after = counts(backends);
        places.push((0..backends.len()).find(|&i| after[i] > before[i]).unwrap());
    }
    places
}

#[tokio::test]
async fn one_session_stays_at_one_backend_and_moves_only_when_that_is_gone() {
    for http in Http::BOTH {
        let backends = replicas(4, &Talk::default()).await;
        let hashed = |builder: ProxyBuilder| {
            builder.set("pool.balance.strategy", "consistent_hash").set("pool.balance.header", "x-session-id")
        };
        let proxy = Proxy::start(&hashed(pool_of(&backends)).set("pool.health.ejection_min", "30s"));
        let sessions: Vec<Request> =
            (0..24).map(|n| chat_request(false).header("x-session-id", &format!("session-{n}"))).collect();
        let first = places(http, &proxy, &backends, &sessions).await;
        assert_eq!(places(http, &proxy, &backends, &sessions).await, first);
        let mut shares = HashMap::new();
        first.iter().for_each(|place| *shares.entry(*place).or_insert(0) += 1);
        assert!(shares.len() >= 3, "{first:?}");
        // One dies: its sessions move, the others stay.
        let gone = first[0];
        backends[gone].stop().await;
        let after = places(http, &proxy, &backends, &sessions).await;
        for (before, after) in first.iter().zip(&after) {
            assert!(if *before == gone { *after != gone } else { before == after }, "{first:?} {after:?}");
        }
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn prompts_with_one_beginning_stay_together() {
    for http in Http::BOTH {
        let backends = replicas(4, &Talk::default()).await;
        let proxy = Proxy::start(
            &pool_of(&backends)
                .set("pool.balance.strategy", "consistent_hash")
                .set("pool.balance.prompt_bytes", "256B"),
        );
        let about = |system: &str, question: &str| {
            let messages = json!([{"role": "system", "content": system.repeat(100)}, {"role": "user", "content": question}]);
            Request::post_json("/v1/chat/completions", &json!({"model": "test-model", "messages": messages}))
        };
        let mut systems = std::collections::HashSet::new();
        for system in ["law ", "code ", "poem ", "cook ", "maps ", "tax "] {
            let requests: Vec<Request> =
                ["a?", "b?", "c?"].iter().map(|question| about(system, question)).collect();
            let places = places(http, &proxy, &backends, &requests).await;
            assert!(places.iter().all(|place| *place == places[0]), "{system}: {places:?}");
            systems.insert(places[0]);
        }
        assert!(systems.len() > 1, "all systems at one backend");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_hot_session_spills_over_instead_of_queueing() {
    let backends = replicas(3, &Talk::default().gap(Duration::from_millis(20))).await;
    let proxy = Proxy::start(
        &pool_of(&backends)
            .set("pool.balance.strategy", "consistent_hash")
            .set("pool.balance.header", "x-session-id"),
    );
    let address = proxy.addr;
    let mut asking = JoinSet::new();
    for _ in 0..12 {
        let request = chat_request_for("test-model", "hot", true).header("x-session-id", "hot");
        asking.spawn(async move { Http::One.send(address, &request).await });
    }
    while let Some(answer) = asking.join_next().await {
        assert_is_the_stream(&answer.unwrap());
    }
    let counts = counts(&backends);
    // A quarter above the mean of four, the new one counted in.
    assert!(counts.iter().all(|count| *count <= 7), "{counts:?}");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_disabled_backend_gets_nothing() {
    for http in Http::BOTH {
        let backends = replicas(2, &Talk::default()).await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .backend_with(&backends[0].url(), &[("disabled", Value::from(true))])
                .backend(&backends[1].url()),
        );
        for _ in 0..6 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!(counts(&backends), [0, 6]);
        proxy.is_quiet().await;
    }
}
