//! A replica dies in the middle of a token stream and its client does not notice (F16 to F19, F21).

mod dialects;
mod exact;
mod moves;

use std::time::Duration;

use evergate::telemetry::metrics::{AttemptOutcome, End};

use crate::support::PATIENCE;
use crate::support::backend::{Backend, Script};
use crate::support::client::{Answer, chat_request};
use crate::support::either::{Http, assert_is_the_stream, attempts, in_order, state};
use crate::support::eventually;
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};

/// The usual stream up to its `events`th event, and then this.
fn begun(events: usize, then: &[Step]) -> Script {
    let said = &Talk::default().chat_events(true)[..events];
    Script::new().answer([reply::sse_open(said), then.to_vec()].concat())
}

fn resumed(proxy: &Proxy, result: &str) -> u64 {
    let text = proxy.telemetry.metrics.render();
    let line = format!("evergate_resumes_total{{pool=\"default\",result=\"{result}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.trim().parse().unwrap())
}

/// What had come, then one error event, and nothing that looks like an end.
#[track_caller]
fn assert_ends_visibly(answer: &Answer) {
    let text = answer.text();
    assert_eq!(answer.status, 200);
    assert_eq!(text.matches("\"error\"").count(), 1, "{text}");
    assert!(!text.contains("[DONE]") && !text.contains("\"finish_reason\":\"stop\""), "{text}");
}

#[tokio::test]
async fn a_stream_cut_behind_any_event_is_one_whole_stream_for_the_client() {
    let events = Talk::default().chat_events(true).len();
    for http in Http::BOTH {
        // Behind the role alone nothing is shown yet; from the finish on it is completed without another replica.
        for cut in 2..events - 2 {
            let half_a_chunk = vec![Step::send("5\r\nxx"), Step::Fin];
            for end in [vec![Step::Rst], vec![Step::Fin], half_a_chunk, vec![reply::last_chunk()]] {
                let dying = Backend::start(begun(cut, &end)).await;
                let alive = Backend::healthy().await;
                let proxy = Proxy::start(&in_order(&[&dying.url(), &alive.url()]));
                let answer = http.send(proxy.addr, &chat_request(true)).await;
                assert_is_the_stream(&answer);
                assert_eq!(resumed(&proxy, "resumed"), 1, "cut behind {cut} by {end:?}");
                assert_eq!(attempts(&proxy, dying.addr(), AttemptOutcome::Fault), 1);
                assert_eq!(attempts(&proxy, alive.addr(), AttemptOutcome::Success), 1);
                assert_eq!(proxy.telemetry.metrics.exchanges.finished(End::Complete), 1);
                proxy.is_quiet().await;
            }
        }
    }
}

#[tokio::test]
async fn what_keeps_a_connection_alive_is_no_part_of_the_answer() {
    let beat = || reply::chunk(": beat\n\n");
    let said = Talk::default().chat_events(true);
    let mut steps = vec![reply::sse_head(), beat()];
    for event in &said[..5] {
        steps.extend([reply::chunk(event), beat()]);
    }
    let dying = Backend::start(Script::new().answer([steps, vec![Step::Rst]].concat())).await;
    let alive = Backend::healthy().await;
    let proxy = Proxy::start(&in_order(&[&dying.url(), &alive.url()]));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_eq!(answer.text().replace(": beat\n\n", ""), said.concat());
    assert_eq!(resumed(&proxy, "resumed"), 1);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_second_replica_may_die_too() {
    let first = Backend::start(begun(3, &[Step::Rst])).await;
    let second = Backend::start(begun(6, &[Step::Rst])).await;
    let third = Backend::healthy().await;
    let proxy = Proxy::start(&in_order(&[&first.url(), &second.url(), &third.url()]));
    assert_is_the_stream(&Http::One.send(proxy.addr, &chat_request(true)).await);
    assert_eq!(resumed(&proxy, "resumed"), 2);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_replica_that_has_spoken_since_is_asked_again_where_no_other_is_left() {
    let first = Backend::start(begun(3, &[Step::Rst]).then_healthy()).await;
    let second = Backend::start(begun(6, &[Step::Rst])).await;
    let proxy = Proxy::start(&in_order(&[&first.url(), &second.url()]));
    let broken = tokio::spawn({
        let address = proxy.addr;
        async move { Http::One.send(address, &chat_request(true)).await }
    });
    eventually(PATIENCE, || second.requests().len() == 1).await;
    // Both have broken it. Others find the first well again.
    while !broken.is_finished() {
        assert_is_the_stream(&Http::One.send(proxy.addr, &chat_request(true)).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_is_the_stream(&broken.await.unwrap());
    let breaks = 1 + second.requests().len() as u64;
    assert_eq!(
        resumed(&proxy, "resumed"),
        breaks,
        "each goes on, those of the others that met the second too"
    );
    proxy.is_quiet().await;
}

#[tokio::test]
async fn garbage_errors_and_aborts_are_breaks_like_any() {
    let error =
        "data: {\"error\":{\"message\":\"EngineDeadError\",\"type\":\"server_error\",\"code\":500}}\n\n";
    let abort = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"abort\"}]}\n\n";
    for bad in [error, abort, "data: {\"choices\": [garbage\n\n", "data: [DONE]\n\n"] {
        let sick = Backend::start(begun(4, &[reply::chunk(bad), reply::last_chunk()])).await;
        let alive = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]));
        assert_is_the_stream(&Http::One.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(resumed(&proxy, "resumed"), 1, "{bad}");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn another_answer_is_never_blended_in() {
    let mut other = Talk::default();
    other.tokens[2] = " something else".to_owned();
    let dying = Backend::start(begun(5, &[Step::Rst])).await;
    let differs = Backend::start(Script::new().talk(other)).await;
    let proxy = Proxy::start(&in_order(&[&dying.url(), &differs.url()]));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_ends_visibly(&answer);
    let had = Talk::default().chat_events(true)[..5].concat();
    assert!(
        answer.text().starts_with(&had) && !answer.text().contains("something else"),
        "{}",
        answer.text()
    );
    assert_eq!(proxy.telemetry.metrics.exchanges.finished(End::Error), 1);
    assert_eq!(
        attempts(&proxy, differs.addr(), AttemptOutcome::Fault),
        0,
        "an answer of its own is no fault"
    );
    proxy.is_quiet().await;
}

#[tokio::test]
async fn switched_off_or_alone_a_break_is_visible() {
    let alone = |builder: ProxyBuilder| async move {
        let dying = Backend::start(begun(5, &[Step::Rst])).await;
        let proxy = Proxy::start(&builder.backend(&dying.url()).set("pool.retry.wait_max", "100ms"));
        assert_ends_visibly(&Http::One.send(proxy.addr, &chat_request(true)).await);
        proxy.is_quiet().await;
    };
    alone(ProxyBuilder::new()).await;
    let dying = Backend::start(begun(5, &[Step::Rst])).await;
    let alive = Backend::healthy().await;
    let proxy = Proxy::start(&in_order(&[&dying.url(), &alive.url()]).set("pool.resume.mode", "off"));
    assert_ends_visibly(&Http::One.send(proxy.addr, &chat_request(true)).await);
    assert_eq!(alive.requests().len(), 0);
}

#[tokio::test]
async fn f19_a_stream_of_a_frozen_replica_goes_on_elsewhere() {
    let talk = || Talk::of(120).gap(Duration::from_millis(20));
    let frozen = Backend::start(Script::new().talk(talk())).await;
    let alive = Backend::start(Script::new().talk(talk())).await;
    let builder = ProxyBuilder::new()
        .backend(&frozen.url())
        .backend(&alive.url())
        .set("pool.balance.strategy", "round_robin")
        .set("pool.progress.token_gap_unknown", "1s");
    let proxy = Proxy::start(&builder);
    proxy.probed().await;
    let asked: Vec<_> = (0..2)
        .map(|_| {
            tokio::spawn({
                let address = proxy.addr;
                async move { Http::One.send(address, &chat_request(true)).await }
            })
        })
        .collect();
    // Both are past their commit point: their clients have tokens.
    let first_tokens = |backend: &Backend| {
        let text = proxy.telemetry.metrics.render();
        let of = format!("evergate_first_token_seconds_count{{backend=\"{}\"", backend.addr());
        text.lines().any(|line| line.starts_with(&of) && line.ends_with(" 1"))
    };
    eventually(PATIENCE, || first_tokens(&frozen) && first_tokens(&alive)).await;
    frozen.pause();
    for answer in asked {
        let answer = answer.await.unwrap();
        assert_eq!(answer.text(), talk().chat_events(true).concat());
    }
    assert_eq!(resumed(&proxy, "resumed"), 1);
    assert_ne!(state(&proxy, frozen.addr()), "healthy");
}
