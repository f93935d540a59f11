//! The queue of a pool whose backends are up and have no slot free, and backends that say so themselves.

use std::time::{Duration, Instant};

use evergate::telemetry::metrics::End as ExchangeEnd;
use serde_json::json;
use tokio::task::JoinSet;

use super::{code, refusing_beyond, retry_after, slow, waiters};
use crate::support::backend::{Backend, Script};
use crate::support::client::{Request, chat_request, send};
use crate::support::either::{AT_ONCE, Http, assert_is_the_chat, assert_is_the_stream, in_order, state};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually, within};

fn quiet() -> ProxyBuilder {
    ProxyBuilder::new().set("pool.probe.kind", "off")
}

fn prioritised(priority: &str) -> Request {
    chat_request(false).header("x-priority", priority)
}

/// One replica with one slot, taken for ever by a client that has to be aborted.
async fn taken(
    builder: impl FnOnce(ProxyBuilder) -> ProxyBuilder,
) -> (Backend, Proxy, tokio::task::JoinHandle<()>) {
    let only = Backend::start(Script::new().answer(vec![Step::Stall]).then_healthy()).await;
    let proxy = Proxy::start(&builder(quiet()).backend_with(&only.url(), &[("in_flight_max", 1.into())]));
    let first = Http::One.send_and_leave(proxy.addr, &chat_request(true));
    only.has_seen(1).await;
    (only, proxy, first)
}

/// Ten times what two replicas with two slots each can take, in three priorities, for three seconds.
#[tokio::test]
async fn tenfold_overload_keeps_all_slots_busy_and_the_queue_short() {
    const TAKES: Duration = Duration::from_millis(200);
    const WAIT_MAX: Duration = Duration::from_millis(500);
    let backends = [Backend::start(slow(TAKES)).await, Backend::start(slow(TAKES)).await];
    let two = [("in_flight_max", 2.into())];
    let proxy = Proxy::start(
        &quiet()
            .set("pool.queue.wait_max", "500ms")
            .backend_with(&backends[0].url(), &two)
            .backend_with(&backends[1].url(), &two),
    );
    let address = proxy.addr;
    let mut asking = JoinSet::new();
    let (mut busy, mut looks, mut longest) = (0, 0, 0);
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < Duration::from_secs(3) {
        // Twenty a second can be served.
        while sent < 200 * begin.elapsed().as_millis() / 1000 {
            let priority = ["high", "normal", "low"][sent as usize % 3];
            asking.spawn(async move { (priority, send(address, &prioritised(priority)).await) });
            sent += 1;
        }
        longest = longest.max(waiters(&proxy));
        if begin.elapsed() > Duration::from_millis(500) {
            busy += backends.iter().map(|b| proxy.backend(b.addr()).in_flight()).sum::<u32>();
            looks += 4;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let answers = asking.join_all().await;
    assert!(f64::from(busy) >= 0.95 * f64::from(looks), "{busy} of {looks} slots were busy");
    assert!((1..=16).contains(&longest), "{longest} waited");
    let served: Vec<&str> = answers.iter().filter(|(_, a)| a.status == 200).map(|(p, _)| *p).collect();
    let low = served.iter().filter(|priority| **priority == "low").count();
    assert!(low * 10 >= served.len(), "{low} of {} were low", served.len());
    let mut late = 0;
    for (_, answer) in answers.iter().filter(|(_, answer)| answer.status != 200) {
        let code = code(answer);
        let until = match (answer.status, code.as_str()) {
            (503, "queue_full") => AT_ONCE,
            (503, "queue_timeout") => WAIT_MAX + AT_ONCE,
            other => panic!("{other:?}"),
        };
        late += usize::from(answer.elapsed >= until);
        assert!(
            retry_after(answer).is_some_and(|seconds| (1..=60).contains(&seconds)),
            "{:?}",
            answer.headers
        );
    }
    // A machine with other work gets some of them late to their clients.
    assert!(late * 20 <= answers.len(), "{late} of {} were refused late", answers.len());
    proxy.is_quiet().await;
    let metrics = proxy.telemetry.metrics.render();
    for line in ["queue_length{pool=\"default\",priority=\"low\"} 0", "pool_waiting{pool=\"default\"} 0"] {
        assert!(metrics.contains(&format!("evergate_{line}")), "{line}");
    }
    let refused = answers.iter().filter(|(_, answer)| answer.status == 503).count();
    let counted: usize = metrics
        .lines()
        .filter(|line| line.starts_with("evergate_queue_refused_total"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
        .sum();
    assert_eq!(counted, refused);
}

#[tokio::test]
async fn a_full_queue_is_said_at_once_and_a_client_that_leaves_frees_its_place() {
    for http in Http::BOTH {
        let (only, proxy, first) = taken(|b| b.set("pool.queue.length_max", 1)).await;
        let leaving = http.send_and_leave(proxy.addr, &chat_request(true));
        eventually(PATIENCE, || waiters(&proxy) == 1).await;
        let refused = http.send(proxy.addr, &chat_request(true)).await;
        assert_eq!((refused.status, code(&refused).as_str()), (503, "queue_full"));
        assert!(retry_after(&refused).is_some_and(|seconds| seconds >= 1));
        assert!(refused.elapsed < AT_ONCE, "{:?}", refused.elapsed);
        leaving.abort();
        eventually(PATIENCE, || waiters(&proxy) == 0).await;
        let address = proxy.addr;
        let third = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        eventually(PATIENCE, || waiters(&proxy) == 1).await;
        first.abort();
        assert_is_the_stream(&within(PATIENCE, third).await.unwrap());
        assert_eq!(only.requests().len(), 2);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn first_come_first_served_within_a_priority_and_the_higher_one_first() {
    let (only, proxy, first) = taken(|b| {
        b.named_pool_kept("p")
            .route("p", &[("path_prefix", "/v1/embeddings".into()), ("priority", "low".into())])
    })
    .await;
    only.set_script(Script::new());
    let embed = |n: &str| Request::post_json("/v1/embeddings", &json!({"model": "m", "input": n}));
    let named = |priority: &str, name: &str| prioritised(priority).header("x-name", name);
    let requests = [
        // The route wins over the header.
        embed("x").header("x-priority", "high").header("x-name", "low by route"),
        named("low", "low"),
        named("urgent", "normal 1"),
        named("Normal", "normal 2"),
        named("high", "high 1"),
        named("high", "high 2"),
    ];
    let mut asking = JoinSet::new();
    for (n, request) in requests.into_iter().enumerate() {
        let address = proxy.addr;
        asking.spawn(async move { send(address, &request).await.status });
        eventually(PATIENCE, || waiters(&proxy) == n + 1).await;
    }
    first.abort();
    assert_eq!(asking.join_all().await, [200; 6]);
    let order: Vec<String> =
        only.requests().iter().filter_map(|r| r.header("x-name").map(str::to_owned)).collect();
    // Six to three to one, and between equals the higher.
    assert_eq!(order, ["high 1", "normal 1", "low by route", "high 2", "normal 2", "low"]);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn whoever_arrives_does_not_pass_those_who_wait() {
    let only = Backend::start(slow(Duration::from_millis(20))).await;
    let proxy = Proxy::start(&quiet().backend_with(&only.url(), &[("in_flight_max", 1.into())]));
    let address = proxy.addr;
    let mut asking = JoinSet::new();
    // One after the other, into whatever the slot is doing at that moment. Read against the way of a request, so
    // that none counts twice.
    let backend = proxy.backend(only.addr());
    let exchanges = &proxy.telemetry.metrics.exchanges;
    let seen = || {
        let out: u64 = ExchangeEnd::ALL.iter().map(|end| exchanges.finished(*end)).sum();
        out as usize + backend.in_flight() as usize + waiters(&proxy)
    };
    for n in 0..40 {
        let request = chat_request(false).header("x-n", &n.to_string());
        asking.spawn(async move { send(address, &request).await.status });
        eventually(PATIENCE, || seen() > n).await;
    }
    // A queue of 16 and one that runs: the rest was refused, and nobody overtook.
    let served = asking.join_all().await.iter().filter(|status| **status == 200).count();
    let order: Vec<usize> =
        only.requests().iter().filter_map(|request| request.header("x-n")?.parse().ok()).collect();
    assert_eq!(order.len(), served);
    assert!(served >= 17, "{served}");
    assert!(order.is_sorted(), "{order:?}");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_reload_that_brings_a_backend_serves_those_who_wait() {
    let (_only, proxy, first) = taken(|b| b.set("pool.queue.wait_max", "20s")).await;
    let address = proxy.addr;
    let mut asking = JoinSet::new();
    for n in 0..3 {
        asking.spawn(async move { send(address, &chat_request(true)).await });
        eventually(PATIENCE, || waiters(&proxy) == n + 1).await;
    }
    let another = Backend::healthy().await;
    let old = proxy.running.directory().snapshot().config.pools[0].backends[0].authority.to_string();
    let both = quiet()
        .set("pool.queue.wait_max", "20s")
        .backend_with(&format!("http://{old}"), &[("in_flight_max", 1.into())])
        .backend(&another.url());
    proxy.running.directory().apply(both.build_config()).unwrap();
    while let Some(answer) = within(PATIENCE, asking.join_next()).await {
        assert_is_the_stream(&answer.unwrap());
    }
    assert_eq!(another.requests().len(), 3);
    first.abort();
    proxy.is_quiet().await;
}

#[tokio::test]
async fn f10_what_a_backend_refuses_to_take_waits_here_after_a_while() {
    let engine = Backend::start(refusing_beyond(2, Duration::from_millis(100))).await;
    let proxy = Proxy::start(&quiet().backend(&engine.url()));
    let address = proxy.addr;
    // Enough to find the limit; some of these may be refused.
    let burst = |count: usize| {
        let mut asking = JoinSet::new();
        (0..count).for_each(|_| {
            asking.spawn(async move { send(address, &chat_request(false)).await.status });
        });
        asking
    };
    burst(2).join_all().await;
    burst(8).join_all().await;
    let cap = proxy.backend(engine.addr()).learned_cap();
    assert!(cap.is_some_and(|cap| (1..=4).contains(&cap)), "{cap:?}");
    burst(8).join_all().await;
    assert_eq!(state(&proxy, engine.addr()), "healthy", "busy is not dead");
    proxy.is_quiet().await;
    // Whatever is there on top is refused rarely now: eight at once were two served and six refused.
    let before = engine.requests().len();
    let statuses = burst(8).join_all().await;
    let served = statuses.iter().filter(|status| **status == 200).count();
    assert!(served >= 6, "{statuses:?}");
    let refused = engine.requests().len() - before - served;
    assert!(refused <= 6, "{refused} of {} were refused", served + refused);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn f10_a_pause_is_waited_for_and_then_asked_once() {
    for http in Http::BOTH {
        let script = || Script::new().answer(reply::busy(1)).then_healthy();
        let (a, b) = (Backend::start(script()).await, Backend::start(script()).await);
        let proxy = Proxy::start(&in_order(&[&a.url(), &b.url()]));
        let answer = http.send(proxy.addr, &chat_request(false)).await;
        assert_is_the_chat(&answer);
        assert!(answer.elapsed >= Duration::from_millis(900), "{:?}", answer.elapsed);
        assert_eq!(a.requests().len() + b.requests().len(), 3);
        proxy.is_quiet().await;

        let always = Backend::start(Script::new().answer(reply::busy(1))).await;
        let proxy = Proxy::start(&quiet().backend(&always.url()));
        let answer = http.send(proxy.addr, &chat_request(false)).await;
        assert_eq!((answer.status, retry_after(&answer)), (503, Some(1)), "{}", answer.text());
        assert_eq!(always.requests().len(), 2, "once more, after its pause");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f10_refusals_eject_nobody() {
    for status in [429, 503, 529] {
        let busy = Backend::start(Script::new().answer(reply::error(status))).await;
        let alive = Backend::start(Script::new().talk(Talk::default())).await;
        let proxy = Proxy::start(
            &in_order(&[&busy.url(), &alive.url()])
                .set("pool.health.busy_min", "1ms")
                .set("pool.health.busy_max", "1ms"),
        );
        for _ in 0..20 {
            assert_is_the_chat(&send(proxy.addr, &chat_request(false)).await);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(busy.requests().len() >= 5, "{}", busy.requests().len());
        assert_eq!(state(&proxy, busy.addr()), "healthy");
        proxy.is_quiet().await;
    }
}
