//! A pool that is down, one that returns, and one that loses half of itself under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::{after, arrivals, retry_after, waiters};
use crate::support::backend::{Backend, Script};
use crate::support::client::{chat_request, send};
use crate::support::either::{assert_is_the_chat, state};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually, within};

/// Slack for a machine that does other things besides.
const SLACK: Duration = Duration::from_millis(if cfg!(debug_assertions) { 2000 } else { 500 });

fn probing() -> ProxyBuilder {
    ProxyBuilder::new()
        .set("pool.probe.interval", "200ms")
        .set("pool.probe.interval_unsteady", "50ms")
        .set("pool.probe.timeout", "100ms")
}

/// A replica that is down in one of three ways.
struct Down {
    backend: Backend,
    sound: Arc<AtomicBool>,
}

impl Down {
    async fn new(how: &'static str) -> Self {
        let sound = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&sound);
        let script = Script::new().by_request(move |request| {
            if asked.load(SeqCst) || how == "refuses" {
                return reply::healthy(request, &Talk::default());
            }
            if how == "resets" { vec![Step::Rst] } else { reply::error(500) }
        });
        let backend = Backend::start(script).await;
        if how == "refuses" {
            backend.stop().await;
        }
        Self { backend, sound }
    }

    async fn returns(&self) {
        self.sound.store(true, SeqCst);
        self.backend.restart().await;
    }
}

#[tokio::test]
async fn f31_a_pool_that_is_down_is_asked_within_the_budget_and_found_when_it_returns() {
    for how in ["refuses", "resets", "500"] {
        let backends = [Down::new(how).await, Down::new(how).await];
        let builder =
            backends.iter().fold(probing().set("pool.probe.statuses", vec![200]), |builder, down| {
                builder.backend(&down.backend.url())
            });
        let proxy = Proxy::start(&builder);
        let unhealthy = || backends.iter().all(|down| state(&proxy, down.backend.addr()) == "unhealthy");
        eventually(PATIENCE, unhealthy).await;
        let address = proxy.addr;
        let begin = Instant::now();
        let mut asking = JoinSet::new();
        for _ in 0..10 {
            for _ in 0..100 {
                asking.spawn(async move { send(address, &chat_request(false)).await });
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let answers = asking.join_all().await;
        let seconds = begin.elapsed().as_secs_f64().ceil();
        let sent: usize = backends.iter().map(|down| down.backend.requests().len()).sum();
        assert!(sent as f64 <= 0.2 * 1000.0 + 10.0 * seconds, "{how}: {sent} attempts in {seconds} s");
        assert!(how == "refuses" || sent > 0, "{how}: nobody looked");
        let mut passed_on = 0;
        for answer in &answers {
            assert!(answer.elapsed < Duration::from_secs(2) + SLACK, "{how}: {:?}", answer.elapsed);
            match answer.status {
                503 => assert!(retry_after(answer).is_some_and(|s| s >= 1), "{how}: {:?}", answer.headers),
                // Those a replica was asked for hear what became of it.
                500 | 502 => passed_on += 1,
                other => panic!("{how}: {other}"),
            }
        }
        assert!(passed_on <= sent, "{how}: {passed_on} errors of {sent} attempts");
        assert!(how != "refuses" || sent == 0);

        backends[0].returns().await;
        let begin = Instant::now();
        while send(proxy.addr, &chat_request(false)).await.status != 200 {
            assert!(begin.elapsed() < PATIENCE, "{how}: never again");
        }
        assert!(begin.elapsed() < Duration::from_secs(2) + SLACK, "{how}: {:?}", begin.elapsed());
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn those_who_waited_are_let_in_by_and_by_when_a_backend_returns() {
    let only = Down::new("refuses").await;
    let slow = Script::new().by_request(|request| after(Duration::from_millis(800), request));
    only.backend.set_script(slow);
    let proxy = Proxy::start(&probing().set("pool.retry.wait_max", "20s").backend(&only.backend.url()));
    eventually(PATIENCE, || state(&proxy, only.backend.addr()) == "unhealthy").await;
    let address = proxy.addr;
    let mut asking = JoinSet::new();
    for _ in 0..100 {
        asking.spawn(async move { send(address, &chat_request(false)).await });
    }
    // Some are between two attempts to connect.
    eventually(PATIENCE, || waiters(&proxy) >= 60).await;
    let begin = Instant::now();
    only.returns().await;
    while let Some(answer) = within(PATIENCE, asking.join_next()).await {
        assert_is_the_chat(&answer.unwrap());
    }
    let came = arrivals(&only.backend, begin);
    assert_eq!(came.len(), 100);
    let at_once = came.iter().filter(|after| **after < Duration::from_millis(100)).count();
    assert!(at_once <= 50, "{at_once} of 100 in the first tenth of a second");
    assert!(came[99] < Duration::from_secs(2) + SLACK, "the last came after {:?}", came[99]);
    proxy.is_quiet().await;
}

/// Two replicas with 256 unfinished requests each, and one dies.
#[tokio::test]
async fn the_work_of_a_dead_replica_is_taken_over_by_and_by_and_whole() {
    const EACH: usize = 256;
    let dead = Arc::new(AtomicBool::new(false));
    let script = || {
        let dead = Arc::clone(&dead);
        Script::new().by_request(move |request| {
            let takes = if dead.load(SeqCst) { 300 } else { 8000 };
            after(Duration::from_millis(takes), request)
        })
    };
    let backends = [Backend::start(script()).await, Backend::start(script()).await];
    let proxy = Proxy::start(
        &ProxyBuilder::new()
            .set("pool.probe.kind", "off")
            .set("pool.balance.strategy", "round_robin")
            .backend(&backends[0].url())
            .backend(&backends[1].url()),
    );
    let address = proxy.addr;
    let mut asking = JoinSet::new();
    for _ in 0..2 * EACH {
        asking.spawn(async move { send(address, &chat_request(false)).await });
    }
    for backend in &backends {
        eventually(PATIENCE, || backend.requests().len() == EACH).await;
    }
    let death = Instant::now();
    dead.store(true, SeqCst);
    backends[0].stop().await;
    while let Some(answer) = within(2 * PATIENCE, asking.join_next()).await {
        assert_is_the_chat(&answer.unwrap());
    }
    let came = arrivals(&backends[1], death);
    assert_eq!(came.len(), EACH, "each once");
    let at_once = came.iter().filter(|after| **after < Duration::from_millis(100)).count();
    assert!(at_once <= EACH / 2, "{at_once} of {EACH} in the first tenth of a second");
    let last = came[EACH - 1];
    assert!(last < Duration::from_secs(2) + SLACK, "the last came after {last:?}");
    assert_ne!(state(&proxy, backends[0].addr()), "healthy");
    assert_eq!(state(&proxy, backends[1].addr()), "healthy");
    proxy.is_quiet().await;
}
