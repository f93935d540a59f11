//! Silence: a late first token is asked for elsewhere too, a backend that stands still is found and left, and
//! who is merely slow is left in peace (F08, F15, F19, F39).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use evergate::telemetry::metrics::{AttemptOutcome, End};
use serde_json::json;

use crate::support::backend::{Backend, Script};
use crate::support::client::{self, Answer, Request, chat_request, chat_request_for};
use crate::support::either::{Http, assert_is_right, assert_is_the_stream, attempts, in_order, state};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Clocks short enough for a test, in the proportions of the defaults.
fn quick(builder: ProxyBuilder) -> ProxyBuilder {
    builder
        .set("pool.progress.first_token_min", "300ms")
        .set("pool.progress.first_token_unknown", "600ms")
        .set("pool.progress.token_gap_min", "300ms")
        .set("pool.progress.token_gap_unknown", "600ms")
}

fn pool(urls: &[&str]) -> ProxyBuilder {
    urls.iter().fold(ProxyBuilder::new(), |builder, url| builder.backend(url))
}

/// Accepts, answers probes, and says nothing else.
fn silent() -> Script {
    Script::new().answer(vec![Step::Stall])
}

/// Sends a head at once, as ASGI servers do, and then nothing.
fn headed() -> Script {
    Script::new().answer(vec![reply::sse_head(), Step::Stall])
}

/// Sends them all at once.
async fn send_all(addr: SocketAddr, requests: Vec<Request>) -> Vec<Answer> {
    let sent: Vec<_> = requests
        .into_iter()
        .map(|request| tokio::spawn(async move { client::send(addr, &request).await }))
        .collect();
    let mut answers = Vec::with_capacity(sent.len());
    for answer in sent {
        answers.push(answer.await.unwrap());
    }
    answers
}

async fn chats(addr: SocketAddr, count: usize) -> Vec<Answer> {
    send_all(addr, vec![chat_request(true); count]).await
}

/// The usual stream, begun only after a while.
fn late(delay: Duration) -> Vec<Step> {
    [vec![Step::Delay(delay)], reply::sse(&Talk::default().chat_events(true))].concat()
}

fn hedges(proxy: &Proxy, result: &str) -> u64 {
    let text = proxy.telemetry.metrics.render();
    let line = format!("evergate_hedges_total{{pool=\"default\",result=\"{result}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.trim().parse().unwrap())
}

#[tokio::test]
async fn a_late_first_token_is_asked_for_elsewhere_and_the_loser_is_cancelled() {
    for http in Http::BOTH {
        for script in [silent(), headed()] {
            let sick = Backend::start(script).await;
            let alive = Backend::healthy().await;
            let proxy = Proxy::start(&quick(in_order(&[&sick.url(), &alive.url()])));
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_is_right(&answer, true);
            assert!(answer.elapsed >= MS(600) && answer.elapsed < MS(2_000), "{:?}", answer.elapsed);
            assert_eq!((sick.requests().len(), alive.requests().len()), (1, 1));
            assert_eq!(attempts(&proxy, sick.addr(), AttemptOutcome::Overtaken), 1);
            assert_eq!(hedges(&proxy, "won"), 1);
            // Nobody waits for it any more.
            let last = sick.connections().len() - 1;
            sick.closed_by_peer(last).await;
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn a_late_answer_in_one_piece_is_asked_for_elsewhere_too() {
    // The head and half of the body, then silence (F24 stalled).
    let stalled = reply::json(200, &json!({"object": "chat.completion", "choices": []}));
    let Step::Send(bytes) = &stalled[0] else { panic!("a JSON reply is one step") };
    let half = vec![Step::send(bytes.slice(..bytes.len() - 9)), Step::Stall];
    for script in [silent(), Script::new().answer(half)] {
        let sick = Backend::start(script).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&quick(in_order(&[&sick.url(), &alive.url()])));
        assert_is_right(&client::send(proxy.addr, &chat_request(false)).await, false);
        assert_eq!(hedges(&proxy, "won"), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn who_speaks_after_all_is_believed_and_the_hedge_is_cancelled() {
    let slow = Backend::start(Script::new().answer(late(MS(900)))).await;
    let slower = Backend::start(silent()).await;
    let proxy = Proxy::start(&quick(in_order(&[&slow.url(), &slower.url()])));
    assert_is_the_stream(&client::send(proxy.addr, &chat_request(true)).await);
    assert_eq!(hedges(&proxy, "lost"), 1);
    assert_eq!(attempts(&proxy, slow.addr(), AttemptOutcome::Success), 1);
    assert_eq!(attempts(&proxy, slower.addr(), AttemptOutcome::Cancelled), 1);
    slower.closed_by_peer(slower.connections().len() - 1).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn what_must_not_run_twice_is_not_hedged() {
    let slow_steps: Vec<Step> =
        [vec![Step::Delay(MS(1_200))], reply::json(200, &json!({"ok": true}))].concat();
    let slow = Backend::start(Script::new().answer(slow_steps)).await;
    let other = Backend::healthy().await;
    let proxy = Proxy::start(&quick(in_order(&[&slow.url(), &other.url()])));
    let answer = client::send(proxy.addr, &Request::post_json("/v1/files", &json!({"purpose": "x"}))).await;
    assert_eq!((answer.status, answer.json()), (200, json!({"ok": true})));
    assert_eq!(other.requests().len(), 0);
    let stored = json!({"model": "m", "input": "x", "store": true});
    client::send(proxy.addr, &Request::post_json("/v1/responses", &stored)).await;
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn a_ratio_of_zero_switches_hedging_off() {
    let slow = Backend::start(Script::new().answer(late(MS(1_200)))).await;
    let other = Backend::healthy().await;
    let proxy =
        Proxy::start(&quick(in_order(&[&slow.url(), &other.url()])).set("pool.progress.hedge_ratio", 0.0));
    assert_is_the_stream(&client::send(proxy.addr, &chat_request(true)).await);
    assert_eq!(other.requests().len(), 0);
    assert_eq!(hedges(&proxy, "refused"), 1);
}

#[tokio::test]
async fn a_backend_that_stands_still_while_its_peer_serves_is_ejected_and_its_work_moves() {
    let sick = Backend::healthy().await;
    let alive = Backend::healthy().await;
    // Hedging off: what moves, moves because of the ejection.
    let builder = quick(pool(&[&sick.url(), &alive.url()]))
        .set("pool.progress.hedge_ratio", 0.0)
        .set("pool.balance.strategy", "round_robin")
        .set("pool.health.ejection_min", "30s");
    let proxy = Proxy::start(&builder);
    proxy.probed().await;
    chats(proxy.addr, 12).await;
    // The engine dies behind its server: probes go on passing.
    sick.set_script(headed());
    let began = Instant::now();
    let answers = chats(proxy.addr, 12).await;
    answers.iter().for_each(assert_is_the_stream);
    assert!(began.elapsed() < MS(3_000), "{:?}", began.elapsed());
    assert_eq!(state(&proxy, sick.addr()), "ejected");
    assert_eq!(attempts(&proxy, sick.addr(), AttemptOutcome::Rescued), 6);
    assert_eq!(state(&proxy, alive.addr()), "healthy");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_frozen_backend_is_asked_and_ejected_before_any_first_token_is_late() {
    let frozen = Backend::start(Script::new().talk(Talk::of(400).gap(MS(20)))).await;
    let alive = Backend::healthy().await;
    let builder = pool(&[&frozen.url(), &alive.url()]).set("pool.balance.strategy", "round_robin");
    let proxy = Proxy::start(&builder);
    proxy.probed().await;
    let streams = tokio::spawn(chats(proxy.addr, 8));
    eventually(PATIENCE, || frozen.requests().len() == 4).await;
    // Long enough for what is usual to be known: five stretches of 32 tokens.
    tokio::time::sleep(MS(2_000)).await;
    frozen.pause();
    let at = Instant::now();
    eventually(PATIENCE, || state(&proxy, frozen.addr()) == "ejected").await;
    assert!(at.elapsed() < MS(3_000), "{:?}", at.elapsed());
    streams.abort();
}

#[tokio::test]
async fn a_pool_that_is_slow_as_a_whole_is_left_in_peace() {
    let slow = || Script::new().answer(late(MS(1_500)));
    let (a, b) = (Backend::healthy().await, Backend::healthy().await);
    let proxy = Proxy::start(&quick(pool(&[&a.url(), &b.url()])));
    proxy.probed().await;
    chats(proxy.addr, 12).await;
    a.set_script(slow());
    b.set_script(slow());
    let answers = chats(proxy.addr, 12).await;
    answers.iter().for_each(assert_is_the_stream);
    for backend in [&a, &b] {
        assert_eq!(state(&proxy, backend.addr()), "healthy");
        assert_eq!(attempts(&proxy, backend.addr(), AttemptOutcome::Fault), 0);
        assert_eq!(attempts(&proxy, backend.addr(), AttemptOutcome::Rescued), 0);
    }
    assert_eq!(proxy.telemetry.metrics.exchanges.finished(End::Complete), 24);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_long_prefill_that_stops_decoding_is_borne() {
    let proxy_for = |urls: &[&str]| {
        quick(pool(urls)).set("pool.balance.strategy", "round_robin").set("pool.clocks.inter_token", "5s")
    };
    let (a, b) =
        (Backend::start(Script::new().talk(Talk::of(60).gap(MS(20)))).await, Backend::healthy().await);
    let proxy =
        Proxy::start(&proxy_for(&[&a.url(), &b.url()]).set("pool.progress.first_token_unknown", "3s"));
    proxy.probed().await;
    chats(proxy.addr, 24).await;
    // Two streams are decoded at `a` when a long prompt comes and stops them for 1.5 s.
    let pausing = {
        let events = Talk::of(40).chat_events(false);
        let mut steps = reply::sse_open(&events[..5]);
        steps.push(Step::Delay(MS(1_500)));
        steps.extend(events[5..].iter().map(reply::chunk));
        steps.push(reply::chunk("data: [DONE]\n\n"));
        steps.push(reply::last_chunk());
        steps
    };
    let long_prompt = "x".repeat(100_000);
    let prefill = late(MS(1_500));
    a.set_script(Script::new().by_request(move |seen| match seen.body.len() {
        0 => reply::healthy(seen, &Talk::of(3)),
        1..50_000 => pausing.clone(),
        _ => prefill.clone(),
    }));
    b.set_script(Script::new().by_request({
        let prefill = late(MS(1_500));
        move |seen| match seen.body.len() {
            50_000.. => prefill.clone(),
            _ => reply::healthy(seen, &Talk::of(3)),
        }
    }));
    let long = chat_request_for("m", &long_prompt, true);
    let mut requests = vec![chat_request(true); 4];
    requests.extend([long.clone(), long]);
    let answers = send_all(proxy.addr, requests).await;
    for answer in &answers {
        assert!(answer.text().contains("[DONE]") && !answer.text().contains("error"), "{}", answer.text());
    }
    assert_eq!(state(&proxy, a.addr()), "healthy");
    assert_eq!(state(&proxy, b.addr()), "healthy");
}

/// Two backends at once, of which the first has `gap` between its tokens; the other 5 ms.
async fn dripping(gap: Duration) -> (Backend, Backend, Proxy) {
    let talk = |gap| Script::new().talk(Talk::of(12).gap(gap));
    let (slow, sound) = (Backend::start(talk(MS(5))).await, Backend::start(talk(MS(5))).await);
    let builder = quick(pool(&[&slow.url(), &sound.url()]))
        .set("pool.progress.token_gap_min", "2s")
        .set("pool.progress.token_gap_unknown", "2s")
        .set("pool.outlier.persistent", "1s")
        .set("pool.health.ejection_min", "30s");
    let proxy = Proxy::start(&builder);
    proxy.probed().await;
    for _ in 0..3 {
        chats(proxy.addr, 8).await;
    }
    slow.set_script(talk(gap));
    (slow, sound, proxy)
}

#[tokio::test]
async fn f20_a_slow_drip_loses_share_and_is_ejected_when_it_lasts() {
    let (slow, sound, proxy) = dripping(MS(100)).await;
    let began = Instant::now();
    let slow_enough = || proxy.backend(slow.addr()).slow_factor() > 3.0;
    while !slow_enough() && state(&proxy, slow.addr()) == "healthy" {
        assert!(began.elapsed() < PATIENCE, "never found slow");
        chats(proxy.addr, 4).await;
    }
    let before = (slow.requests().len(), sound.requests().len());
    while state(&proxy, slow.addr()) == "healthy" {
        assert!(began.elapsed() < PATIENCE, "never ejected");
        // So many that the slow one still gets some: it is ejected for what it does, not for what it did.
        for answer in chats(proxy.addr, 20).await {
            assert!(answer.text().ends_with("data: [DONE]\n\n") && !answer.text().contains("error"));
        }
    }
    let since = (slow.requests().len() - before.0, sound.requests().len() - before.1);
    assert!(since.0 * 3 < since.1, "{since:?} requests to the slow and to the sound one");
    assert_eq!(state(&proxy, slow.addr()), "ejected");
    assert_eq!(state(&proxy, sound.addr()), "healthy");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn when_all_drip_nobody_loses_share() {
    let (slow, sound, proxy) = dripping(MS(100)).await;
    sound.set_script(Script::new().talk(Talk::of(12).gap(MS(100))));
    let began = Instant::now();
    while began.elapsed() < MS(4_000) {
        chats(proxy.addr, 8).await;
    }
    for backend in [&slow, &sound] {
        assert_eq!(state(&proxy, backend.addr()), "healthy");
        assert!(proxy.backend(backend.addr()).slow_factor() < 1.5);
    }
}
