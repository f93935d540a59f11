//! Load that engines report: whom it sends requests to, and that it does nothing else.

use std::time::Duration;

use crate::support::backend::{Backend, Script};
use crate::support::client::{chat_request, send};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually};

/// Readings come so often that one is always fresh.
const OFTEN: &str = "100ms";

fn page(text: &str) -> Vec<Step> {
    reply::body(200, "text/plain; version=0.0.4", text.to_owned())
}

fn busy(requests: u32) -> Vec<Step> {
    page(&format!(
        "# TYPE vllm:num_requests_running gauge\n\
         vllm:num_requests_running{{engine=\"0\"}} {requests}\n\
         vllm:num_requests_waiting{{engine=\"0\"}} 2\nvllm:kv_cache_usage_perc{{engine=\"0\"}} 0.5\n"
    ))
}

/// A healthy replica with this metrics page.
fn reporting(metrics: Vec<Step>) -> Script {
    Script::new().by_request(move |request| match request.path() {
        "/metrics" => metrics.clone(),
        _ => reply::healthy(request, &Talk::default()),
    })
}

fn scraping(scrape: &str) -> ProxyBuilder {
    ProxyBuilder::new().set("pool.load.scrape", scrape).set("pool.load.interval", OFTEN)
}

/// Requests of clients.
fn served(backend: &Backend) -> usize {
    backend.all_requests().iter().filter(|request| request.method == "POST").count()
}

fn pages_read(backend: &Backend, path: &str) -> usize {
    backend.all_requests().iter().filter(|request| request.path() == path).count()
}

async fn ask(proxy: &Proxy, times: usize) {
    for _ in 0..times {
        assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
    }
}

fn has_series(proxy: &Proxy, backend: &Backend, series: &str) -> bool {
    let text = proxy.telemetry.metrics.render();
    let start = format!("{series}{{backend=\"{}\"", backend.addr());
    text.lines().any(|line| line.starts_with(&start))
}

#[tokio::test]
async fn the_work_of_others_counts_and_is_forgotten_when_it_is_not_heard_of() {
    let (used, idle) = (Backend::start(reporting(busy(20))).await, Backend::start(reporting(busy(0))).await);
    let proxy = Proxy::start(&scraping("auto").backend(&used.url()).backend(&idle.url()));
    proxy.probed().await;
    eventually(PATIENCE, || proxy.backend(used.addr()).foreign_requests() == 22).await;
    eventually(PATIENCE, || proxy.backend(idle.addr()).foreign_requests() == 2).await;
    ask(&proxy, 20).await;
    assert_eq!((served(&used), served(&idle)), (0, 20));
    let rendered = proxy.telemetry.metrics.render();
    let label = format!("{{backend=\"{}\",pool=\"default\"}}", used.addr());
    for (series, value) in [
        ("evergate_backend_reported_running", "20"),
        ("evergate_backend_reported_waiting", "2"),
        ("evergate_backend_reported_cache_used_ratio", "0.5"),
        ("evergate_backend_foreign_requests", "22"),
    ] {
        let line = format!("{series}{label} {value}");
        assert!(rendered.lines().any(|found| found == line), "{line}");
    }

    // What is not heard of any more is not believed any more, and nobody is worse off for it.
    used.set_script(reporting(vec![Step::Stall]));
    eventually(PATIENCE, || proxy.backend(used.addr()).foreign_requests() == 0).await;
    let before = served(&used);
    eventually(PATIENCE, || !has_series(&proxy, &used, "evergate_backend_foreign_requests")).await;
    assert_eq!(proxy.running.directory().snapshot().pools[0].eligible(), 2);
    ask(&proxy, 20).await;
    assert!(served(&used) > before, "it is as good as the other");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn whatever_is_read_a_healthy_replica_stays_usable() {
    let pages =
        ["vllm:num_requests_running 999999\n", "vllm:num_requests_waiting 1e6\n", "tgi_queue_size NaN"];
    for text in pages {
        let only = Backend::start(reporting(page(text))).await;
        let proxy = Proxy::start(&scraping("auto").backend_with(&only.url(), &[("in_flight_max", 1.into())]));
        eventually(PATIENCE, || pages_read(&only, "/metrics") >= 1).await;
        ask(&proxy, 5).await;
        assert_eq!(proxy.running.directory().snapshot().pools[0].eligible(), 1, "{text}");
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn nobody_is_asked_unless_it_is_wanted_and_who_says_nothing_is_asked_seldom() {
    let off = Backend::start(reporting(busy(20))).await;
    let absent = Backend::start(reporting(reply::error(404))).await;
    let other = Backend::start(reporting(page("process_cpu_seconds_total 1\n"))).await;
    let builder = ProxyBuilder::new().named_pool("off").backend(&off.url()).named_pool("auto");
    let builder = builder.backend(&absent.url()).backend(&other.url());
    let proxy = Proxy::start(&builder.set("pool.load.scrape", "auto").set("pool.load.interval", OFTEN));
    eventually(PATIENCE, || pages_read(&absent, "/metrics") == 1 && pages_read(&other, "/metrics") == 1)
        .await;
    let begin = std::time::Instant::now();
    eventually(PATIENCE, || begin.elapsed() > Duration::from_millis(500)).await;
    let read = |backend: &Backend| pages_read(backend, "/metrics");
    assert_eq!((read(&off), read(&absent), read(&other)), (0, 1, 1));
    assert!(!has_series(&proxy, &off, "evergate_backend_reported_running"));
    assert!(!has_series(&proxy, &other, "evergate_backend_reported_running"));
}

#[tokio::test]
async fn a_reload_begins_and_ends_it_and_may_name_the_page() {
    let backend = Backend::start(Script::new().by_request(|request| match request.path() {
        "/stats/prometheus" => busy(3),
        _ => reply::healthy(request, &Talk::default()),
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let directory = proxy.running.directory();
    let apply =
        |builder: ProxyBuilder| directory.apply(builder.backend(&backend.url()).build_config()).unwrap();
    apply(scraping("/stats/prometheus"));
    eventually(PATIENCE, || proxy.backend(backend.addr()).foreign_requests() == 5).await;
    assert_eq!(pages_read(&backend, "/metrics"), 0);
    apply(ProxyBuilder::new());
    eventually(PATIENCE, || proxy.backend(backend.addr()).foreign_requests() == 0).await;
    eventually(PATIENCE, || !has_series(&proxy, &backend, "evergate_backend_reported_running")).await;
}
