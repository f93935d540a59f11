//! What open streams may hold: journals have bounds, and where there is no memory a stream goes on unarmed.

use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Answer, Client, End, Request};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step};
use crate::support::{PATIENCE, eventually};

const STREAMS: usize = 100;

/// Text of one answer, so that all of them together are beyond the 1 MiB that is allowed here.
const EVENTS: usize = 24;
const EVENT_TEXT: usize = 1024;

fn said(n: usize) -> String {
    let text = format!("{n:04} ").repeat(EVENT_TEXT / 5);
    let chunk =
        json!({"id": "x", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": text}}]});
    format!("data: {chunk}\n\n")
}

/// What the answer begins with, and how it ends.
fn begun() -> Vec<String> {
    (0..EVENTS).map(said).collect()
}

fn ended() -> [&'static str; 2] {
    [
        "data: {\"id\":\"x\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: [DONE]\n\n",
    ]
}

fn counted(proxy: &Proxy, start: &str) -> u64 {
    let text = proxy.telemetry.metrics.render();
    let of = |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok()).unwrap_or(0.0);
    text.lines().filter(|line| line.starts_with(start)).map(|line| of(line) as u64).sum()
}

fn unarmed(proxy: &Proxy) -> u64 {
    counted(proxy, "evergate_limits_bitten_total{limit=\"memory_max\"}")
}

/// Plays [`STREAMS`] streams at once; each stands for a while after its text, and then does `last`.
async fn play(memory: &str, last: Vec<Step>) -> (Proxy, Vec<Answer>) {
    let standing = [reply::sse_open(&begun()), vec![Step::Delay(Duration::from_millis(1500))]].concat();
    let dying = Backend::start(Script::new().nameless().answer([standing, last].concat())).await;
    let whole = [begun(), ended().map(str::to_owned).to_vec()].concat();
    let alive = Backend::start(Script::new().nameless().sse(&whole)).await;
    let builder = ProxyBuilder::new()
        .set("pool.probe.kind", "off")
        .set("limits.memory_max", memory)
        .set("pool.health.eject_consecutive", 1000)
        .set("pool.health.success_rate_min", 0.0)
        .set("pool.retry.budget_floor", 10_000.0)
        .backend_with(&dying.url(), &[("tier", 0.into())])
        .backend_with(&alive.url(), &[("tier", 1.into())]);
    let proxy = Proxy::start(&builder);
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let address = proxy.addr;
        streams.spawn(async move {
            let body =
                json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "Say much"}]});
            Client::connect(address).await.send(&Request::post_json("/v1/chat/completions", &body)).await
        });
    }
    let answers = streams.join_all().await;
    eventually(PATIENCE, || proxy.telemetry.metrics.exchanges.in_flight() == 0).await;
    (proxy, answers)
}

fn is_whole(answer: &Answer) -> bool {
    answer.end == End::Clean && answer.text() == begun().concat() + &ended().concat()
}

#[tokio::test]
async fn streams_that_find_no_memory_go_on_unarmed_and_are_counted() {
    // Unbroken, all of them are whole whether they are armed or not.
    let end: Vec<Step> = ended().iter().map(reply::chunk).chain([reply::last_chunk()]).collect();
    let (proxy, answers) = play("1MiB", end).await;
    assert_eq!(answers.iter().filter(|answer| is_whole(answer)).count(), STREAMS);
    let many = unarmed(&proxy);
    assert!(many > 0 && many < STREAMS as u64, "{many} of {STREAMS} found no memory");

    // Broken, those that were armed go on elsewhere, and the others say that they cannot.
    let (proxy, answers) = play("1MiB", vec![Step::Rst]).await;
    let whole = answers.iter().filter(|answer| is_whole(answer)).count();
    let visible = answers.iter().filter(|answer| answer.text().contains("replica_lost")).count();
    assert_eq!((whole + visible, visible as u64), (STREAMS, unarmed(&proxy)));
    assert!(whole > 0 && visible > 0, "{whole} whole, {visible} not");

    // With room for all of them all are armed.
    let (proxy, answers) = play("64MiB", vec![Step::Rst]).await;
    assert_eq!(answers.iter().filter(|answer| is_whole(answer)).count(), STREAMS);
    assert_eq!(unarmed(&proxy), 0);
}
