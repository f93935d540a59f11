//! A stream leaves a backend that still serves it: drained, removed, or silent for too long (F35, failures.md §4).
//!
//! Make before break: the client gets every byte of the uncut stream, and the old leg is closed only when the new one
//! had something new to say.

use std::time::{Duration, Instant};

use evergate::policy::health::Administrative;
use evergate::telemetry::metrics::{AttemptOutcome, End};
use tokio::task::JoinHandle;

use super::{assert_ends_visibly, resumed};
use crate::support::PATIENCE;
use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Answer, chat_request, stream_seen};
use crate::support::either::{Http, attempts, faults, in_order};
use crate::support::eventually;
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk, Then as _};

/// Tokens of a long answer, and the time between two of them.
const TOKENS: usize = 60;
const GAP: Duration = Duration::from_millis(40);

fn slow() -> Talk {
    Talk::of(TOKENS).gap(GAP)
}

fn uncut() -> String {
    Talk::of(TOKENS).chat_events(true).concat()
}

fn drain_after(builder: ProxyBuilder, after: &str) -> ProxyBuilder {
    builder.set("pool.clocks.drain_move", after).set("pool.retry.wait_max", "100ms")
}

/// Whose backends are known to be of this engine: llama.cpp is asked to continue, others are not.
fn of_engine(builder: ProxyBuilder, preset: &str) -> ProxyBuilder {
    builder.set("pool.probe.kind", "http").set("pool.probe.preset", preset)
}

fn moves(proxy: &Proxy, cause: &str, result: &str) -> u64 {
    let text = proxy.telemetry.metrics.render();
    let line =
        format!("evergate_stream_moves_total{{cause=\"{cause}\",pool=\"default\",result=\"{result}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.trim().parse().unwrap())
}

fn asked(proxy: &Proxy, http: Http) -> JoinHandle<Answer> {
    let address = proxy.addr;
    tokio::spawn(async move { http.send(address, &chat_request(true)).await })
}

fn drain(proxy: &Proxy) {
    set(proxy, Administrative::Draining);
}

fn set(proxy: &Proxy, state: Administrative) {
    proxy.running.directory().snapshot().pools[0].set_admin(0, state);
}

/// Waits until clients of so many streams of this backend have their first token.
async fn speaks(proxy: &Proxy, backend: &Backend, streams: usize) {
    let of = format!("evergate_first_token_seconds_count{{backend=\"{}\"", backend.addr());
    let count = format!(" {streams}");
    let told = || {
        let text = proxy.telemetry.metrics.render();
        text.lines().any(|line| line.starts_with(&of) && line.ends_with(&count))
    };
    eventually(PATIENCE, told).await;
}

#[tokio::test]
async fn f35_the_streams_of_a_drained_backend_move_at_its_deadline() {
    for http in Http::BOTH {
        let leaving = Backend::start(Script::new().talk(slow())).await;
        let staying = Backend::start(Script::new().talk(Talk::of(TOKENS))).await;
        let proxy = Proxy::start(&drain_after(in_order(&[&leaving.url(), &staying.url()]), "300ms"));
        let answers: Vec<_> = (0..3).map(|_| asked(&proxy, http)).collect();
        speaks(&proxy, &leaving, 3).await;
        let drained = Instant::now();
        drain(&proxy);
        for answer in answers {
            assert_eq!(answer.await.unwrap().text(), uncut());
        }
        assert!(drained.elapsed() < GAP * TOKENS as u32, "moved before they would have ended");
        assert_eq!(moves(&proxy, "drain", "moved"), 3);
        assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Rescued), 3);
        assert_eq!(faults(&proxy, &leaving), 0, "nothing is held against it");
        assert_eq!(attempts(&proxy, staying.addr(), AttemptOutcome::Success), 3);
        assert_eq!(resumed(&proxy, "resumed"), 0, "nothing broke");
        for (old, new) in leaving.requests().iter().zip(staying.requests()) {
            assert!(new.at - drained >= Duration::from_millis(300), "asked before the deadline");
            assert_eq!(new.body, old.body, "a replay is the request itself");
            assert!(leaving.closed_by_peer(old.connection).await > new.at, "broken before it was made");
        }
        assert_eq!(proxy.telemetry.metrics.exchanges.finished(End::Complete), 3);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f35_the_streams_of_a_removed_backend_move_to_those_that_came_with_the_reload() {
    let leaving = Backend::start(Script::new().talk(slow())).await;
    let newcomer = Backend::start(Script::new().talk(Talk::of(TOKENS))).await;
    let before = drain_after(ProxyBuilder::new().backend(&leaving.url()), "200ms");
    let after = drain_after(ProxyBuilder::new().backend(&newcomer.url()), "200ms");
    let off = |builder: ProxyBuilder| builder.set("pool.probe.kind", "off").set("pool.name", "default");
    let proxy = Proxy::start(&off(before));
    let answer = asked(&proxy, Http::One);
    speaks(&proxy, &leaving, 1).await;
    proxy.running.directory().apply(off(after).build_config()).unwrap();
    assert_eq!(answer.await.unwrap().text(), uncut());
    assert_eq!(moves(&proxy, "drain", "moved"), 1);
    assert_eq!(newcomer.requests().len(), 1);
    leaving.closed_by_peer(leaving.requests()[0].connection).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_backend_that_is_back_in_service_keeps_its_streams() {
    let leaving = Backend::start(Script::new().talk(slow())).await;
    let staying = Backend::healthy().await;
    let proxy = Proxy::start(&drain_after(in_order(&[&leaving.url(), &staying.url()]), "600ms"));
    let answer = asked(&proxy, Http::One);
    speaks(&proxy, &leaving, 1).await;
    drain(&proxy);
    tokio::time::sleep(Duration::from_millis(100)).await;
    set(&proxy, Administrative::Enabled);
    assert_eq!(answer.await.unwrap().text(), uncut());
    assert_eq!(staying.requests().len(), 0);
    proxy.is_quiet().await;
}

/// Continues what the last message says, as llama.cpp does; `gap` is before each event.
fn continues(gap: Duration) -> impl Fn(&RequestSeen) -> Vec<Step> {
    move |request| {
        if request.is_probe() {
            return reply::healthy(request, &Talk::default());
        }
        let body = request.json();
        let messages = body["messages"].as_array().cloned().unwrap_or_default();
        let Some(last) = messages.last().filter(|last| last["role"] == "assistant") else {
            return reply::error(500);
        };
        let had = last["content"].as_str().unwrap();
        let talk = Talk::of(TOKENS);
        let mut said = String::new();
        let begun = talk.tokens.iter().take_while(|token| {
            said.push_str(token);
            said.len() <= had.len()
        });
        let begun = begun.count();
        assert_eq!(talk.tokens[..begun].concat(), had, "given whole tokens of this very answer");
        reply::sse_paced(&talk.chat_events(true)[begun + 1..], gap)
    }
}

#[tokio::test]
async fn a_continuation_begins_where_the_old_leg_was_held() {
    let leaving = Backend::start(Script::new().talk(slow())).await;
    // Its first token takes a while: what the old leg says meanwhile must be told by one of them, and once.
    let staying = Backend::start(Script::new().by_request(continues(Duration::from_millis(60)))).await;
    let builder = drain_after(in_order(&[&leaving.url(), &staying.url()]), "300ms");
    let proxy = Proxy::start(&of_engine(builder, "llamacpp"));
    proxy.probed().await;
    let answers: Vec<_> = (0..3).map(|_| asked(&proxy, Http::One)).collect();
    speaks(&proxy, &leaving, 3).await;
    drain(&proxy);
    for answer in answers {
        let seen = stream_seen(&answer.await.unwrap());
        assert_eq!((seen.text, seen.done, seen.errors.len()), (Talk::of(TOKENS).text(), 1, 0));
    }
    assert_eq!(moves(&proxy, "drain", "moved"), 3);
    for (old, new) in leaving.requests().iter().zip(staying.requests()) {
        assert!(leaving.closed_by_peer(old.connection).await > new.at);
        let given = new.json()["messages"][1]["content"].as_str().unwrap().len();
        assert!(given > 0 && given < Talk::of(TOKENS).text().len());
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn where_no_new_leg_is_of_use_the_old_one_finishes_without_loss() {
    let mut other = Talk::of(TOKENS);
    other.tokens[1] = " something else".to_owned();
    // The engine refuses to continue, and given the whole request it answers otherwise.
    let differs = move |request: &RequestSeen| match request.json()["messages"][1].is_null() {
        true => reply::healthy(request, &other),
        false => vec![Step::Delay(Duration::from_millis(200))].into_iter().chain(reply::error(400)).collect(),
    };
    for preset in ["llamacpp", "tgi"] {
        let leaving = Backend::start(Script::new().talk(slow())).await;
        let staying = Backend::start(Script::new().by_request(differs.clone())).await;
        let builder = drain_after(in_order(&[&leaving.url(), &staying.url()]), "200ms");
        let proxy = Proxy::start(&of_engine(builder, preset));
        proxy.probed().await;
        let answer = asked(&proxy, Http::One);
        speaks(&proxy, &leaving, 1).await;
        drain(&proxy);
        assert_eq!(answer.await.unwrap().text(), uncut(), "{preset}");
        let refused = u64::from(preset == "llamacpp");
        assert_eq!(moves(&proxy, "drain", "refused"), refused, "the old leg was held, and let go again");
        assert_eq!((moves(&proxy, "drain", "diverged"), moves(&proxy, "drain", "moved")), (1, 0));
        assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Success), 1);
        assert_eq!((faults(&proxy, &leaving), faults(&proxy, &staying)), (0, 0));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn what_cannot_be_moved_ends_visibly_at_the_second_deadline() {
    for (mode, spare) in [("off", true), ("best", false)] {
        let leaving = Backend::start(Script::new().talk(slow())).await;
        let staying = Backend::healthy().await;
        let urls = [leaving.url(), staying.url()];
        let urls: Vec<&str> = urls.iter().take(if spare { 2 } else { 1 }).map(String::as_str).collect();
        let builder = drain_after(in_order(&urls), "100ms").set("pool.clocks.drain_end", "500ms");
        let proxy = Proxy::start(&builder.set("pool.resume.mode", mode));
        let answer = asked(&proxy, Http::One);
        speaks(&proxy, &leaving, 1).await;
        let drained = Instant::now();
        drain(&proxy);
        let answer = answer.await.unwrap();
        assert!(drained.elapsed() >= Duration::from_millis(500), "{mode}");
        assert_ends_visibly(&answer);
        assert!(uncut().starts_with(&answer.text()[..answer.text().find("data: {\"error\"").unwrap()]));
        assert!(answer.text().contains("(drain)"), "{mode}: {}", answer.text());
        assert_eq!(faults(&proxy, &leaving), 0, "{mode}");
        leaving.closed_by_peer(leaving.requests()[0].connection).await;
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_replay_that_has_not_caught_up_at_the_second_deadline_goes_on_alone() {
    let leaving = Backend::start(Script::new().talk(slow())).await;
    let staying = Backend::start(Script::new().talk(slow())).await;
    let builder = drain_after(in_order(&[&leaving.url(), &staying.url()]), "200ms");
    let proxy = Proxy::start(&builder.set("pool.clocks.drain_end", "900ms"));
    let answer = asked(&proxy, Http::One);
    speaks(&proxy, &leaving, 1).await;
    drain(&proxy);
    assert_eq!(answer.await.unwrap().text(), uncut());
    assert_eq!(moves(&proxy, "drain", "broken_before"), 1);
    assert_eq!(resumed(&proxy, "resumed"), 1);
    assert_eq!((faults(&proxy, &leaving), staying.requests().len()), (0, 1));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_old_leg_that_ends_first_is_the_whole_answer() {
    let leaving = Backend::start(Script::new().talk(slow())).await;
    let staying = Backend::start(Script::new().talk(slow())).await;
    let proxy = Proxy::start(&drain_after(in_order(&[&leaving.url(), &staying.url()]), "200ms"));
    let answer = asked(&proxy, Http::One);
    speaks(&proxy, &leaving, 1).await;
    drain(&proxy);
    assert_eq!(answer.await.unwrap().text(), uncut());
    assert_eq!((moves(&proxy, "drain", "kept"), moves(&proxy, "drain", "moved")), (1, 0));
    assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Success), 1);
    assert_eq!(attempts(&proxy, staying.addr(), AttemptOutcome::Cancelled), 1);
    staying.closed_by_peer(staying.requests()[0].connection).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_old_leg_that_breaks_in_a_move_is_followed_by_what_was_begun_beside_it() {
    for preset in ["tgi", "llamacpp"] {
        let events = Talk::of(TOKENS).chat_events(true);
        let begun = reply::sse_paced(&events[..20], GAP);
        let begun = begun[..begun.len() - 1].to_vec().then(Step::Rst);
        let leaving = Backend::start(Script::new().answer(begun)).await;
        let staying = match preset {
            // Far behind when the old leg breaks.
            "tgi" => Script::new().talk(slow()),
            // The break waits unread behind the tokens it comes after.
            _ => Script::new().by_request(continues(Duration::from_millis(20))),
        };
        let staying = Backend::start(staying).await;
        let builder = drain_after(in_order(&[&leaving.url(), &staying.url()]), "200ms");
        let proxy = Proxy::start(&of_engine(builder, preset));
        proxy.probed().await;
        let answer = asked(&proxy, Http::One);
        speaks(&proxy, &leaving, 1).await;
        drain(&proxy);
        let answer = answer.await.unwrap();
        assert_eq!(stream_seen(&answer).text, Talk::of(TOKENS).text(), "{preset}");
        assert_eq!(stream_seen(&answer).done, 1, "{preset}");
        assert_eq!(staying.requests().len(), 1, "{preset}");
        proxy.is_quiet().await;
    }
}

/// Silent for `pause` behind its first tokens.
fn pauses(pause: Duration) -> Script {
    let events = Talk::of(TOKENS).chat_events(true);
    let mut steps = reply::sse_open(&events[..5]);
    steps.push(Step::Delay(pause));
    steps.extend(events[5..].iter().map(reply::chunk));
    Script::new().answer(steps.then(reply::last_chunk()))
}

#[tokio::test]
async fn f19_a_silent_stream_goes_on_at_whichever_leg_speaks_first() {
    let silent = |urls: &[&str]| in_order(urls).set("pool.clocks.inter_token", "200ms");
    // The new one.
    let quiet = Backend::start(pauses(Duration::from_secs(20))).await;
    let peer = Backend::start(Script::new().talk(Talk::of(TOKENS))).await;
    let proxy = Proxy::start(&silent(&[&quiet.url(), &peer.url()]));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_eq!(answer.text(), uncut());
    assert!(answer.elapsed < Duration::from_secs(10), "{:?}", answer.elapsed);
    assert_eq!(moves(&proxy, "silence", "moved"), 1);
    assert_eq!(attempts(&proxy, quiet.addr(), AttemptOutcome::Overtaken), 1);
    assert_eq!(faults(&proxy, &quiet), 0, "silent once, and overtaken: a suspicion");
    quiet.closed_by_peer(quiet.requests()[0].connection).await;
    proxy.is_quiet().await;

    // The old one, after all: what was begun beside it is cancelled.
    let quiet = Backend::start(pauses(Duration::from_millis(700))).await;
    let waits = vec![reply::sse_head(), Step::Stall];
    let peer = Backend::start(Script::new().answer(waits)).await;
    let proxy = Proxy::start(&silent(&[&quiet.url(), &peer.url()]));
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_eq!(answer.text(), uncut());
    assert_eq!((moves(&proxy, "silence", "kept"), moves(&proxy, "silence", "moved")), (1, 0));
    assert_eq!(attempts(&proxy, quiet.addr(), AttemptOutcome::Success), 1);
    peer.closed_by_peer(peer.requests()[0].connection).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn f19_a_silent_stream_that_cannot_move_is_waited_for() {
    let mut other = Talk::of(TOKENS);
    other.tokens[2] = " something else".to_owned();
    let quiet = Backend::start(pauses(Duration::from_millis(900))).await;
    let differs = Backend::start(Script::new().talk(other)).await;
    let builder = in_order(&[&quiet.url(), &differs.url()]).set("pool.clocks.inter_token", "200ms");
    let proxy = Proxy::start(&builder);
    assert_eq!(Http::One.send(proxy.addr, &chat_request(true)).await.text(), uncut());
    assert_eq!(moves(&proxy, "silence", "diverged"), 1);
    assert_eq!(attempts(&proxy, quiet.addr(), AttemptOutcome::Success), 1);
    proxy.is_quiet().await;
}
