//! How a backend is found out, left alone and tried again (failures.md §5), seen from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use evergate::telemetry::metrics::AttemptOutcome;
use tokio::task::JoinSet;

use crate::support::backend::{Backend, NeverAccepting, RequestSeen, Script};
use crate::support::client::{chat_request, chat_request_for};
use crate::support::either::{
    Http, assert_is_right, assert_is_the_stream, attempts, faults, in_order, state,
};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk, Then as _};
use crate::support::{PATIENCE, eventually, within};

/// A replica whose health a test turns on and off; its probes pass all the while.
fn switched(sound: &Arc<AtomicBool>) -> Script {
    let sound = Arc::clone(sound);
    Script::new().by_request(move |request| {
        if request.is_probe() || sound.load(SeqCst) {
            reply::healthy(request, &Talk::default())
        } else {
            reply::error(500)
        }
    })
}

/// Quick probes, so that nobody waits for them.
fn probing(builder: ProxyBuilder) -> ProxyBuilder {
    builder
        .set("pool.probe.kind", "http")
        .set("pool.probe.interval", "200ms")
        .set("pool.probe.interval_unsteady", "50ms")
        .set("pool.probe.timeout", "100ms")
}

#[tokio::test]
async fn f25_requests_outvote_probes_three_faults_eject() {
    for http in Http::BOTH {
        let sound = Arc::new(AtomicBool::new(false));
        let grey = Backend::start(switched(&sound)).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &probing(in_order(&[&grey.url(), &alive.url()])).set("pool.health.ejection_min", "30s"),
        );
        proxy.probed().await;
        for stream in [true, false, true, false, true] {
            assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
        }
        assert_eq!((grey.requests().len(), faults(&proxy, &grey)), (3, 3));
        // Probes go on passing, and change nothing.
        let probes = grey.all_requests().len();
        eventually(PATIENCE, || grey.all_requests().len() >= probes + 4).await;
        assert_eq!(state(&proxy, grey.addr()), "ejected");
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(grey.requests().len(), 3);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn one_request_tries_a_backend_that_was_out_and_its_first_token_readmits_it() {
    for http in Http::BOTH {
        let open = Arc::new(AtomicUsize::new(0));
        let returning = {
            let open = Arc::clone(&open);
            Backend::start(Script::new().by_request(move |request| match request.nth {
                None => reply::healthy(request, &Talk::default()),
                Some(0..3) => reply::error(500),
                Some(_) => {
                    open.fetch_add(1, SeqCst);
                    // The first token comes late, the end later still.
                    let events = Talk::default().chat_events(true);
                    let mut steps = vec![reply::sse_head(), Step::Delay(Duration::from_millis(400))];
                    steps.extend(events[..3].iter().map(reply::chunk));
                    steps.push(Step::Delay(Duration::from_millis(400)));
                    steps.extend(events[3..].iter().map(reply::chunk));
                    steps.then(reply::last_chunk())
                }
            }))
            .await
        };
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &probing(in_order(&[&returning.url(), &alive.url()]))
                .set("pool.health.ejection_min", "100ms")
                .set("pool.health.ejection_jitter", 0.0),
        );
        proxy.probed().await;
        for _ in 0..3 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        eventually(PATIENCE, || state(&proxy, returning.addr()) == "probation").await;
        // Ten at once: one of them is the trial.
        let address = proxy.addr;
        let mut asking = JoinSet::new();
        for _ in 0..10 {
            asking.spawn(async move { http.send(address, &chat_request(true)).await });
        }
        returning.has_seen(4).await;
        assert_eq!(state(&proxy, returning.addr()), "probation", "the head alone proves nothing");
        let mut finished_elsewhere = 0;
        while finished_elsewhere < 9 {
            assert_is_the_stream(&within(PATIENCE, asking.join_next()).await.unwrap().unwrap());
            finished_elsewhere += 1;
        }
        assert_eq!(open.load(SeqCst), 1, "a single trial");
        eventually(PATIENCE, || state(&proxy, returning.addr()) == "slow_start").await;
        assert_eq!(asking.len(), 1, "readmitted by the first token, not by the end");
        assert_is_the_stream(&asking.join_next().await.unwrap().unwrap());
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_failed_trial_costs_its_client_nothing_and_the_backend_twice_the_time() {
    for http in Http::BOTH {
        let sound = Arc::new(AtomicBool::new(false));
        let sick = Backend::start(switched(&sound)).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &probing(in_order(&[&sick.url(), &alive.url()]))
                .set("pool.health.ejection_min", "200ms")
                .set("pool.health.ejection_jitter", 0.0),
        );
        proxy.probed().await;
        for _ in 0..3 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        let mut out_since = Instant::now();
        for least in [200, 400] {
            eventually(PATIENCE, || state(&proxy, sick.addr()) == "probation").await;
            let out_for = out_since.elapsed();
            assert!(out_for >= Duration::from_millis(least - 20), "{out_for:?} instead of {least} ms");
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
            assert_eq!(state(&proxy, sick.addr()), "ejected");
            out_since = Instant::now();
        }
        assert_eq!(sick.requests().len(), 5);
        sound.store(true, SeqCst);
        eventually(PATIENCE, || state(&proxy, sick.addr()) == "probation").await;
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!((sick.requests().len(), state(&proxy, sick.addr())), (6, "slow_start"));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_backend_that_returns_carries_little_at_first() {
    let sound = Arc::new(AtomicBool::new(false));
    let returning = Backend::start(switched(&sound)).await;
    let alive = Backend::healthy().await;
    let proxy = Proxy::start(
        &ProxyBuilder::new()
            .set("pool.probe.kind", "off")
            .set("pool.balance.strategy", "weighted")
            .set("pool.health.ejection_min", "100ms")
            .set("pool.health.slow_start", "60s")
            .backend(&returning.url())
            .backend(&alive.url()),
    );
    let http = Http::One;
    while state(&proxy, returning.addr()) != "ejected" {
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
    }
    sound.store(true, SeqCst);
    eventually(PATIENCE, || state(&proxy, returning.addr()) == "probation").await;
    assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
    assert_eq!(state(&proxy, returning.addr()), "slow_start");
    let before = returning.requests().len();
    for _ in 0..110 {
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
    }
    // A tenth of its weight: 10 of 110, and 4 standard deviations.
    let got = returning.requests().len() - before;
    assert!((1..=23).contains(&got), "{got} of 110");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn f27_a_fifth_of_failures_and_more_is_found_by_the_rate() {
    for http in Http::BOTH {
        // Never three in a row.
        let flaky = Backend::start(Script::new().by_request(|request| match request.nth {
            Some(nth) if nth % 3 == 1 => reply::error(500),
            _ => reply::healthy(request, &Talk::default()),
        }))
        .await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                .set("pool.balance.strategy", "round_robin")
                .set("pool.health.ejection_min", "30s")
                .backend(&flaky.url())
                .backend(&alive.url()),
        );
        for nth in 0..40 {
            let stream = nth % 2 == 0;
            assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
        }
        assert_eq!(state(&proxy, flaky.addr()), "ejected");
        assert!(flaky.requests().len() <= 16, "{}", flaky.requests().len());
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f27_when_all_fail_now_and_then_nobody_is_shut_out() {
    for http in Http::BOTH {
        let flaky = |offset: usize| {
            Script::new().by_request(move |request| match request.nth {
                Some(nth) if (nth + offset).is_multiple_of(3) => reply::error(500),
                _ => reply::healthy(request, &Talk::default()),
            })
        };
        let backends =
            [Backend::start(flaky(0)).await, Backend::start(flaky(1)).await, Backend::start(flaky(2)).await];
        let builder = backends
            .iter()
            .fold(ProxyBuilder::new().set("pool.probe.kind", "off"), |b, backend| b.backend(&backend.url()));
        let proxy = Proxy::start(&builder);
        let mut served = 0;
        for _ in 0..120 {
            served += usize::from(http.send(proxy.addr, &chat_request(true)).await.status == 200);
        }
        // All three in a row fail one request in 27: 5 of 120, and 4 standard deviations.
        assert!(served >= 106, "{served} of 120");
        let eligible = proxy.running.directory().snapshot().pools[0].eligible();
        assert!(eligible >= 2, "{eligible} of 3 left");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f28_what_fails_fast_does_not_attract_the_load() {
    for http in Http::BOTH {
        let slow = Talk::default().gap(Duration::from_millis(3));
        let black_hole = Backend::start(Script::new().answer(vec![Step::Rst])).await;
        let workers = [
            Backend::start(Script::new().talk(slow.clone())).await,
            Backend::start(Script::new().talk(slow)).await,
        ];
        let proxy = Proxy::start(
            &ProxyBuilder::new()
                .set("pool.probe.kind", "off")
                // Only the load is to be seen here, not the ejection.
                .set("pool.health.eject_consecutive", 1000)
                .set("pool.health.success_rate_min", 0.0)
                .backend(&black_hole.url())
                .backend(&workers[0].url())
                .backend(&workers[1].url()),
        );
        let address = proxy.addr;
        let mut asking = JoinSet::new();
        for _ in 0..10 {
            asking.spawn(async move {
                for _ in 0..6 {
                    assert_is_the_stream(&http.send(address, &chat_request(true)).await);
                }
            });
        }
        while let Some(done) = asking.join_next().await {
            done.unwrap();
        }
        let hit = black_hole.requests().len();
        assert!(hit <= 24, "{hit} of 60 were sent to it first");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn the_last_one_is_never_ejected() {
    for http in Http::BOTH {
        let sound = Arc::new(AtomicBool::new(false));
        let (a, b) = (Backend::start(switched(&sound)).await, Backend::start(switched(&sound)).await);
        let proxy = Proxy::start(&in_order(&[&a.url(), &b.url()]).set("pool.health.ejection_min", "30s"));
        for _ in 0..8 {
            assert_eq!(http.send(proxy.addr, &chat_request(true)).await.status, 500);
        }
        let states = [state(&proxy, a.addr()), state(&proxy, b.addr())];
        assert_eq!(states.iter().filter(|state| **state == "ejected").count(), 1, "{states:?}");
        // The one that was kept serves as soon as it can.
        sound.store(true, SeqCst);
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn when_nobody_is_eligible_each_suspect_carries_one_request() {
    for http in Http::BOTH {
        // Probes fail and requests succeed, slowly: nothing but panic can find that out.
        let script = || {
            Script::new().by_request(|request| {
                if request.is_probe() {
                    return vec![Step::Rst];
                }
                let events = Talk::default().chat_events(true);
                vec![reply::sse_head(), Step::Delay(Duration::from_millis(300)), Step::Send(chunks(&events))]
                    .then(reply::last_chunk())
            })
        };
        let backends = [Backend::start(script()).await, Backend::start(script()).await];
        let proxy = Proxy::start(&probing(
            ProxyBuilder::new().backend(&backends[0].url()).backend(&backends[1].url()),
        ));
        eventually(PATIENCE, || backends.iter().all(|b| state(&proxy, b.addr()) == "unhealthy")).await;
        let address = proxy.addr;
        let mut asking = JoinSet::new();
        for _ in 0..6 {
            asking.spawn(async move { http.send(address, &chat_request(true)).await });
        }
        eventually(PATIENCE, || backends.iter().all(|backend| !backend.requests().is_empty())).await;
        // Nobody has a first token yet: one each.
        let sent: Vec<usize> = backends.iter().map(|backend| backend.requests().len()).collect();
        assert_eq!(sent, [1, 1]);
        // Their first tokens outvote the probes, and the rest is let in.
        while let Some(answer) = asking.join_next().await {
            assert_is_the_stream(&answer.unwrap());
        }
        proxy.is_quiet().await;
    }
}

fn chunks(events: &[String]) -> bytes::Bytes {
    let steps = events.iter().map(reply::chunk);
    let bytes = steps.flat_map(|step| match step {
        Step::Send(bytes) => bytes.to_vec(),
        other => panic!("{other:?}"),
    });
    bytes.collect::<Vec<u8>>().into()
}

#[tokio::test]
async fn f26_requests_that_succeed_outvote_probes_that_fail() {
    for http in Http::BOTH {
        for wrong in [vec![Step::Rst], vec![Step::Stall]] {
            let odd = Backend::start(Script::new().probes(wrong)).await;
            let peer = Backend::healthy().await;
            let proxy = Proxy::start(&probing(in_order(&[&odd.url(), &peer.url()])));
            let begin = Instant::now();
            // While it serves, failing probes have no say.
            let mut served = 0;
            while begin.elapsed() < Duration::from_millis(700) {
                assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
                served += 1;
            }
            assert_eq!(odd.requests().len() + peer.requests().len(), served);
            let probed = odd.all_requests().len() - odd.requests().len();
            assert!(probed >= 3, "{probed}");
            if !odd.requests().is_empty() {
                assert_eq!(state(&proxy, odd.addr()), "healthy");
            }
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn a_backend_whose_probes_fail_gets_nothing_while_another_is_there() {
    for http in Http::BOTH {
        let probes_pass = Arc::new(AtomicBool::new(true));
        let pass = Arc::clone(&probes_pass);
        let leaving = Backend::start(Script::new().by_request(move |request: &RequestSeen| {
            if request.is_probe() && !pass.load(SeqCst) {
                vec![Step::Rst]
            } else {
                reply::healthy(request, &Talk::default())
            }
        }))
        .await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&probing(in_order(&[&leaving.url(), &alive.url()])));
        proxy.probed().await;
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        probes_pass.store(false, SeqCst);
        eventually(PATIENCE, || state(&proxy, leaving.addr()) == "unhealthy").await;
        for _ in 0..5 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!((leaving.requests().len(), alive.requests().len()), (1, 5));
        // Two passes, one trial, and it is back.
        probes_pass.store(true, SeqCst);
        eventually(PATIENCE, || state(&proxy, leaving.addr()) == "probation").await;
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!((leaving.requests().len(), state(&proxy, leaving.addr())), (2, "slow_start"));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_probe_answered_503_stops_new_work_while_another_takes_it() {
    for http in Http::BOTH {
        let refuses = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&refuses);
        let script = move |request: &RequestSeen| {
            if request.is_probe() && asked.load(SeqCst) {
                reply::busy(1)
            } else {
                reply::healthy(request, &Talk::default())
            }
        };
        let draining = Backend::start(Script::new().by_request(script)).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&probing(in_order(&[&draining.url(), &alive.url()])));
        eventually(PATIENCE, || {
            state(&proxy, draining.addr()) == "refusing" && state(&proxy, alive.addr()) == "healthy"
        })
        .await;
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!((draining.requests().len(), alive.requests().len()), (0, 1));
        // Without the other, traffic decides.
        alive.stop().await;
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(draining.requests().len(), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f29_a_restart_costs_no_request() {
    for http in Http::BOTH {
        let restarting = Backend::healthy().await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &probing(in_order(&[&restarting.url(), &alive.url()])).set("pool.health.ejection_min", "100ms"),
        );
        proxy.probed().await;
        let send = || async { assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await) };
        send().await;
        // Dead, then loading, then back.
        restarting.stop().await;
        for _ in 0..5 {
            send().await;
        }
        restarting.set_script(Script::new().by_request(|_| reply::busy(1)));
        restarting.restart().await;
        for _ in 0..5 {
            send().await;
        }
        restarting.set_script(Script::new());
        let begin = Instant::now();
        let before = restarting.requests().len();
        while restarting.requests().len() == before {
            send().await;
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert!(begin.elapsed() < PATIENCE, "never back: {}", state(&proxy, restarting.addr()));
        }
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn kept_connections_to_an_ejected_backend_are_closed() {
    for http in Http::BOTH {
        let sick = Backend::start(Script::new().by_request(|request| match request.nth {
            Some(nth) if nth > 0 => reply::error(500),
            _ => reply::healthy(request, &Talk::default()),
        }))
        .await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(
            &in_order(&[&sick.url(), &alive.url()])
                .set("pool.health.ejection_min", "30s")
                .set("pool.clocks.idle", "60s"),
        );
        for _ in 0..4 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_eq!(state(&proxy, sick.addr()), "ejected");
        eventually(PATIENCE, || sick.open_connections() == 0).await;
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_dead_address_among_many_is_asked_three_times_and_no_more() {
    let dead = NeverAccepting::start().await;
    let backends = [Backend::healthy().await, Backend::healthy().await];
    let proxy = Proxy::start(
        &ProxyBuilder::new()
            .set("pool.probe.kind", "off")
            .set("pool.clocks.connect", "100ms")
            .set("pool.health.ejection_min", "30s")
            .backend(&dead.url())
            .backend(&backends[0].url())
            .backend(&backends[1].url()),
    );
    for _ in 0..60 {
        assert_is_the_stream(&Http::One.send(proxy.addr, &chat_request(true)).await);
    }
    assert!(attempts(&proxy, dead.addr(), AttemptOutcome::Fault) <= 3);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_model_that_fails_at_a_backend_takes_no_other_with_it_and_comes_back() {
    for http in Http::BOTH {
        let sound = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&sound);
        let listed = |request: &RequestSeen| {
            let models = serde_json::json!({"object": "list", "data": [{"id": "big"}, {"id": "small"}]});
            if request.path() == "/v1/models" {
                reply::json(200, &models)
            } else {
                reply::healthy(request, &Talk::default())
            }
        };
        let half = Backend::start(Script::new().by_request(move |request| {
            if request.json()["model"] == "big" && !asked.load(SeqCst) {
                reply::error(500)
            } else {
                listed(request)
            }
        }))
        .await;
        let peer = Backend::start(Script::new().by_request(listed)).await;
        let proxy = Proxy::start(
            &probing(in_order(&[&half.url(), &peer.url()]))
                .set("pool.models", vec!["big", "small"])
                .set("pool.health.ejection_min", "200ms"),
        );
        proxy.probed().await;
        let (big, small) = (chat_request_for("big", "x", true), chat_request_for("small", "x", true));
        for _ in 0..4 {
            assert_is_the_stream(&http.send(proxy.addr, &big).await);
            assert_is_the_stream(&http.send(proxy.addr, &small).await);
        }
        let of =
            |model: &str| half.requests().iter().filter(|request| request.json()["model"] == model).count();
        assert_eq!((of("big"), of("small")), (3, 4), "three faults, and none of them the other model's");
        sound.store(true, SeqCst);
        let begin = Instant::now();
        while of("big") < 4 {
            assert_is_the_stream(&http.send(proxy.addr, &big).await);
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert!(begin.elapsed() < PATIENCE, "the model never came back");
        }
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn an_overloaded_model_that_nobody_lists_does_not_take_its_neighbour_along() {
    for http in Http::BOTH {
        let overloaded = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&overloaded);
        let unlisted = |request: &RequestSeen| match request.path() {
            "/v1/models" => reply::error(404),
            _ => reply::healthy(request, &Talk::default()),
        };
        let half = Backend::start(Script::new().by_request(move |request| {
            if request.json()["model"] == "big" && asked.load(SeqCst) {
                reply::busy(30)
            } else {
                unlisted(request)
            }
        }))
        .await;
        let peer = Backend::start(Script::new().by_request(unlisted)).await;
        let proxy = Proxy::start(&in_order(&[&half.url(), &peer.url()]));
        let (big, small) = (chat_request_for("big", "x", true), chat_request_for("small", "x", true));
        // Both are served once, and so known.
        for request in [&big, &small] {
            assert_is_the_stream(&http.send(proxy.addr, request).await);
        }
        overloaded.store(true, SeqCst);
        for _ in 0..4 {
            assert_is_the_stream(&http.send(proxy.addr, &big).await);
            assert_is_the_stream(&http.send(proxy.addr, &small).await);
        }
        let of =
            |model: &str| half.requests().iter().filter(|request| request.json()["model"] == model).count();
        assert_eq!((of("big"), of("small")), (2, 5), "asked to leave the one alone, not the other");

        // Inventions that nobody serves get no record.
        half.set_script(Script::new().answer(reply::error(404)));
        peer.set_script(Script::new().answer(reply::error(404)));
        for n in 0..20 {
            let invented = chat_request_for(&format!("invented-{n}"), "x", false);
            assert_eq!(http.send(proxy.addr, &invented).await.status, 404);
        }
        assert!(proxy.backend(half.addr()).models().len() <= 2);
        let text = proxy.telemetry.metrics.render();
        let attempts = |model: &str, count: usize| {
            let labels = format!("backend=\"{}\",model=\"{model}\",pool=\"default\"", half.addr());
            assert!(text.contains(&format!("evergate_model_attempts_total{{{labels}}} {count}\n")), "{text}");
        };
        // But for the first, which was served before there were two.
        attempts("small", 4);
        attempts("other", 20);
        assert!(!text.contains("invented"), "a client must not make series");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_backend_of_several_models_comes_back_from_the_dead_by_any_of_them() {
    for http in Http::BOTH {
        let listed = |request: &RequestSeen| {
            let models = serde_json::json!({"object": "list", "data": [{"id": "big"}, {"id": "small"}]});
            if request.path() == "/v1/models" {
                reply::json(200, &models)
            } else {
                reply::healthy(request, &Talk::default())
            }
        };
        let dying = Backend::start(Script::new().by_request(listed)).await;
        let peer = Backend::start(Script::new().by_request(listed)).await;
        let proxy = Proxy::start(
            &probing(in_order(&[&dying.url(), &peer.url()]))
                .set("pool.models", vec!["big", "small"])
                .set("pool.probe.interval", "10s")
                .set("pool.health.ejection_min", "200ms"),
        );
        proxy.probed().await;
        let (big, small) = (chat_request_for("big", "x", true), chat_request_for("small", "x", true));
        dying.stop().await;
        for _ in 0..2 {
            assert_is_the_stream(&http.send(proxy.addr, &big).await);
            assert_is_the_stream(&http.send(proxy.addr, &small).await);
        }
        // Refused, and so is the question who it is.
        eventually(PATIENCE, || state(&proxy, dying.addr()) == "unhealthy").await;
        dying.restart().await;
        eventually(PATIENCE, || state(&proxy, dying.addr()) == "probation").await;
        assert_is_the_stream(&http.send(proxy.addr, &small).await);
        assert_eq!(state(&proxy, dying.addr()), "slow_start");
        assert_is_the_stream(&http.send(proxy.addr, &big).await);
        assert_eq!(dying.requests().len(), 2);
        proxy.is_quiet().await;
    }
}
