//! More than the pool can take: who waits, who is refused, and what a pool that is down or returns is spared
//! (failures.md F10, F31, F32).

mod crowd;
mod queue;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::Answer;
use crate::support::proxy::Proxy;
use crate::support::reply::{self, Step, Talk};

/// A healthy replica that takes so long for each request; its probes are quick.
fn slow(takes: Duration) -> Script {
    Script::new().by_request(move |request| after(takes, request))
}

fn after(pause: Duration, request: &RequestSeen) -> Vec<Step> {
    let whole = reply::healthy(request, &Talk::default());
    if request.is_probe() { whole } else { [vec![Step::Delay(pause)], whole].concat() }
}

/// An engine that runs `slots` requests of this length and answers 503 to what is beyond them.
fn refusing_beyond(slots: usize, takes: Duration) -> Script {
    let begun: Arc<Mutex<Vec<Instant>>> = Arc::default();
    Script::new().by_request(move |request| {
        if request.is_probe() {
            return reply::healthy(request, &Talk::default());
        }
        let mut begun = begun.lock();
        begun.retain(|at| at.elapsed() < takes);
        if begun.len() >= slots {
            return reply::error(503);
        }
        begun.push(Instant::now());
        after(takes, request)
    })
}

fn code(answer: &Answer) -> String {
    answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

/// `Retry-After` in seconds.
fn retry_after(answer: &Answer) -> Option<u64> {
    answer.header("retry-after")?.parse().ok()
}

fn waiters(proxy: &Proxy) -> usize {
    proxy.running.directory().snapshot().pools[0].state.waiters()
}

/// When requests came, beginning with the first of those later than `since`.
fn arrivals(backend: &Backend, since: Instant) -> Vec<Duration> {
    let mut at: Vec<Instant> =
        backend.requests().iter().map(|request| request.at).filter(|at| *at > since).collect();
    at.sort_unstable();
    let first = at.first().copied();
    first.map(|first| at.iter().map(|at| at.duration_since(first)).collect()).unwrap_or_default()
}
