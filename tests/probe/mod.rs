//! Probers against scripted backends: what they ask, what they make of the answers, and that they come
//! and go with their backends.

use std::sync::Arc;
use std::time::Duration;

use evergate::drain::Drain;
use evergate::policy::dialect::Endpoint;
use evergate::policy::health::{Administrative, Observation, Operational, ProbeVerdict, Standing};
use evergate::pool::{About, Backend as Record, Class, Directory, LastProbe, Wanted};
use evergate::telemetry::Telemetry;
use evergate::{clock, probe};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::h2_backend::{H2Answer, H2Backend};
use crate::support::proxy::ProxyBuilder;
use crate::support::reply::{self, Step, Then as _};
use crate::support::tls::{Authority, Certificate};
use crate::support::{PATIENCE, eventually, within};

/// Longer than any test: a wait of this length ends only by being cut short.
const FOR_EVER: &str = "1h";

/// A pool that probes quickly.
fn quick() -> ProxyBuilder {
    ProxyBuilder::new().set("pool.probe.interval", "50ms").set("pool.probe.interval_unsteady", "50ms")
}

/// A pool that probes once, unless something happens.
fn once() -> ProxyBuilder {
    ProxyBuilder::new().set("pool.probe.interval", FOR_EVER).set("pool.probe.interval_unsteady", FOR_EVER)
}

/// Probers and the pools' clock at work.
struct Probing {
    directory: Arc<Directory>,
    drain: Drain,
    probers: JoinHandle<()>,
    clock: JoinHandle<()>,
}

impl Probing {
    fn start(builder: &ProxyBuilder) -> Self {
        let telemetry = Arc::new(Telemetry::silent());
        let directory = Arc::new(Directory::new(builder.build_config(), telemetry).unwrap());
        let drain = Drain::new();
        let probers = tokio::spawn(probe::run(directory.clone(), drain.watch()));
        let clock = tokio::spawn(probe::keep_time(directory.clone(), drain.watch()));
        Self { directory, drain, probers, clock }
    }

    fn apply(&self, builder: &ProxyBuilder) {
        self.directory.apply(builder.build_config()).unwrap();
    }

    fn probers(&self) -> i64 {
        self.directory.telemetry().metrics.backend_tasks(probe::TASK).get()
    }

    /// The record of the only pool's backend at this index.
    fn backend(&self, i: usize) -> Arc<Record> {
        self.directory.snapshot().pools[0].members[i].backend.clone()
    }

    async fn probed(&self, i: usize) -> Arc<LastProbe> {
        let backend = self.backend(i);
        eventually(PATIENCE, || backend.last_probe().is_some()).await;
        backend.last_probe().unwrap()
    }

    async fn probed_as(&self, i: usize, verdict: ProbeVerdict) {
        let backend = self.backend(i);
        eventually(PATIENCE, || backend.last_probe().is_some_and(|last| last.verdict == verdict)).await;
    }

    async fn lists(&self, i: usize, ids: Option<&[&str]>) {
        let backend = self.backend(i);
        let wanted = ids.map(|ids| ids.iter().map(|&id| id.to_owned()).collect::<Vec<_>>());
        eventually(PATIENCE, || backend.listed().map(|listed| listed.ids.clone()) == wanted).await;
    }

    fn events(&self, event: &str) -> Vec<String> {
        let events = self.directory.telemetry().events.latest();
        events.iter().filter(|e| e.event == event).map(|e| e.text.clone()).collect()
    }
}

impl Drop for Probing {
    fn drop(&mut self) {
        self.probers.abort();
        self.clock.abort();
    }
}

fn asked_for(backend: &Backend, path: &str) -> Vec<RequestSeen> {
    backend.all_requests().into_iter().filter(|request| request.target == path).collect()
}

/// Health as `health` answers, `/v1/models` as `models` does.
fn script(health: Vec<Step>, models: Vec<Step>) -> Script {
    Script::new().by_request(move |request| match request.path() {
        "/v1/models" => models.clone(),
        _ => health.clone(),
    })
}

fn models(ids: &[&str]) -> Vec<Step> {
    let data: Vec<_> = ids.iter().map(|id| json!({"id": id, "object": "model"})).collect();
    reply::json(200, &json!({"object": "list", "data": data}))
}

fn ok() -> Vec<Step> {
    reply::body(200, "text/plain", "ok")
}

#[tokio::test]
async fn a_probe_is_a_request_like_others_on_a_connection_of_its_own() {
    let backend = Backend::start(script(ok(), models(&["m"]))).await;
    let headers = toml::Table::from_iter([("x-tenant".to_owned(), "probes".into())]);
    let url = format!("{}/engine", backend.url());
    let _probing = Probing::start(&quick().backend_with(&url, &[("headers", headers.into())]));
    eventually(PATIENCE, || asked_for(&backend, "/engine/health").len() >= 3).await;
    let probes = asked_for(&backend, "/engine/health");
    for (nth, request) in probes.iter().enumerate() {
        assert_eq!(request.method, "GET");
        assert_eq!(request.header("host"), Some(backend.addr().to_string().as_str()));
        let agent = concat!("evergate-probe/", env!("CARGO_PKG_VERSION"));
        assert_eq!(request.header("user-agent"), Some(agent));
        assert_eq!(request.header("connection"), Some("close"));
        assert_eq!(request.header("x-tenant"), Some("probes"));
        assert_eq!(request.index, 0, "the first on its connection");
        assert!(probes[..nth].iter().all(|before| before.connection != request.connection));
    }
    eventually(PATIENCE, || asked_for(&backend, "/engine/v1/models").len() == 1).await;
    assert_eq!(asked_for(&backend, "/engine/v1/models")[0].header("x-tenant"), Some("probes"));
}

#[tokio::test]
async fn what_a_backend_does_with_a_probe_is_its_verdict() {
    use ProbeVerdict::{Fail, Pass, Refusing, WeakPass};
    let whole = reply::head(200, &[("content-length", "9")]);
    let cut = vec![Step::Send(whole.clone()), Step::send("half"), Step::Fin];
    let stalled = vec![Step::Send(whole), Step::send("half"), Step::Stall];
    let endless = vec![Step::Send(reply::head(200, &[])), Step::send(vec![b'x'; 128 << 10]), Step::Stall];
    for (steps, verdict, saw) in [
        (ok(), Pass, "200"),
        (reply::error(401), Pass, "401"),
        (reply::error(404), WeakPass, "404"),
        (reply::error(500), Fail, "500"),
        (reply::busy(1), Refusing, "503"),
        (vec![Step::Stall], Fail, "no answer within 300ms"),
        (vec![Step::Rst], Fail, "closed without an answer"),
        (vec![Step::Fin], Fail, "closed without an answer"),
        (vec![Step::send("HTTP/1.1 2"), Step::Fin], Fail, "without an answer|in the middle"),
        (vec![Step::send("\u{1}\u{2}\u{3}\r\n\r\n"), Step::Fin], Fail, "not HTTP"),
        (cut, Fail, "200, broke off"),
        (stalled, Fail, "200, no end of its answer within 300ms"),
        (endless, Pass, "200"),
    ] {
        let backend = Backend::start(Script::new().probes(steps.clone())).await;
        let probing = Probing::start(&once().backend(&backend.url()).set("pool.probe.timeout", "300ms"));
        let last = probing.probed(0).await;
        assert_eq!(last.verdict, verdict, "{}: {steps:?}", last.saw);
        assert!(saw.split('|').any(|part| last.saw.contains(part)), "{}: {steps:?}", last.saw);
        assert!(last.took < PATIENCE, "{:?}", last.took);
    }
}

#[tokio::test]
async fn a_probe_that_cannot_connect_fails_with_the_reason() {
    let backend = Backend::refusing().await;
    let probing = Probing::start(&quick().backend(&backend.url()));
    let last = probing.probed(0).await;
    assert_eq!(last.verdict, ProbeVerdict::Fail);
    assert!(last.saw.contains("connection_refused"), "{}", last.saw);
    backend.restart().await;
    probing.probed_as(0, ProbeVerdict::Pass).await;
}

#[tokio::test]
async fn configured_statuses_and_text_decide() {
    let backend = Backend::start(script(reply::body(201, "text/plain", "engine ready"), models(&[]))).await;
    let probe = |statuses: &[i64], body: &str| {
        let statuses: Vec<toml::Value> = statuses.iter().map(|&status| status.into()).collect();
        once()
            .backend(&backend.url())
            .set("pool.probe.path", "/ready?deep=1")
            .set("pool.probe.statuses", toml::Value::Array(statuses))
            .set("pool.probe.body", body)
    };
    for (statuses, body, verdict) in [
        (vec![201], "ready", ProbeVerdict::Pass),
        (vec![200], "ready", ProbeVerdict::Fail),
        (vec![], "loading", ProbeVerdict::Fail),
    ] {
        let probing = Probing::start(&probe(&statuses, body));
        let last = probing.probed(0).await;
        assert_eq!(last.verdict, verdict, "{statuses:?} {body}: {}", last.saw);
    }
    assert_eq!(asked_for(&backend, "/ready?deep=1").len(), 3);
}

#[tokio::test]
async fn a_backend_is_never_asked_twice_at_once() {
    let backend = Backend::start(Script::new().probes(vec![Step::Stall])).await;
    let begin = std::time::Instant::now();
    let _probing = Probing::start(&quick().backend(&backend.url()).set("pool.probe.timeout", "200ms"));
    eventually(PATIENCE, || backend.connections().len() >= 4).await;
    // Each but the last has used up its timeout. Probes that overlapped would come every 50 ms.
    assert!(begin.elapsed() >= Duration::from_millis(600), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_change_of_result_is_told_and_its_repetition_is_not() {
    let backend = Backend::start(script(ok(), models(&[]))).await;
    let probing = Probing::start(&quick().backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    assert_eq!(probing.events("probe_changed"), Vec::<String>::new(), "to begin well is no change");
    backend.set_script(script(reply::busy(1), models(&[])));
    probing.probed_as(0, ProbeVerdict::Refusing).await;
    let probes = backend.all_requests().len();
    eventually(PATIENCE, || backend.all_requests().len() > probes + 2).await;
    backend.set_script(script(reply::error(404), models(&[])));
    probing.probed_as(0, ProbeVerdict::WeakPass).await;
    assert_eq!(
        probing.events("probe_changed"),
        ["probe now refusing: 503", "probe now weak_pass: 404"],
        "once each"
    );
    assert_eq!(probing.events("weak_probe").len(), 1);
}

#[tokio::test]
async fn three_failures_make_a_backend_unhealthy_and_two_passes_bring_it_back() {
    let backends = [Backend::healthy().await, Backend::healthy().await];
    let probing = Probing::start(&quick().backend(&backends[0].url()).backend(&backends[1].url()));
    let operational = || probing.backend(0).whole().read(|health| health.operational());
    eventually(PATIENCE, || operational() == Operational::Healthy).await;
    backends[0].stop().await;
    eventually(PATIENCE, || operational() == Operational::Unhealthy).await;
    assert_eq!(probing.backend(1).whole().read(|health| health.operational()), Operational::Healthy);
    backends[0].restart().await;
    eventually(PATIENCE, || operational() != Operational::Unhealthy).await;
}

#[tokio::test]
async fn an_ejection_calls_for_a_probe_before_the_interval_is_over() {
    let backends = [Backend::healthy().await, Backend::healthy().await];
    let probing = Probing::start(
        &quick()
            .backend(&backends[0].url())
            .backend(&backends[1].url())
            .set("pool.probe.interval", FOR_EVER)
            .set("pool.health.ejection_min", "100ms"),
    );
    for i in 0..2 {
        probing.probed_as(i, ProbeVerdict::Pass).await;
    }
    // Both are steady now and not to be probed for an hour.
    let pool = probing.directory.snapshot().pools[0].clone();
    let mut rng = fastrand::Rng::with_seed(1);
    let tried = [pool.members[1].backend.id];
    for _ in 0..3 {
        let wanted = Wanted {
            tried: &tried,
            class: Class::of(Endpoint::ChatCompletions, true),
            model: None,
            affinity: None,
            prompt_bytes: 0,
            only: None,
            proven_since: None,
            paid: false,
            replayable: true,
        };
        let choice = pool.pick(&wanted, &mut rng).unwrap_or_else(|nobody| panic!("{nobody:?}"));
        assert_eq!(choice.index, 0);
        choice.observe(About::Backend, Observation::Fault, &mut rng);
    }
    let ejected = pool.members[0].backend.whole();
    assert!(ejected.read(|health| health.is_ejected()));
    let standing = || ejected.standing(&pool.config.health, clock::now());
    // The clock ends the ejection, the probe opens the trial.
    eventually(PATIENCE, || standing() == Standing::Probation).await;
    assert_eq!(asked_for(&backends[1], "/health").len(), 1, "the other one is left in peace");
}

#[tokio::test]
async fn probers_come_and_go_with_their_backends() {
    let stalling = || Backend::start(Script::new().probes(vec![Step::Stall]));
    let (kept, removed, added) = (stalling().await, stalling().await, stalling().await);
    let pool = || once().set("pool.probe.timeout", FOR_EVER);
    let probing = Probing::start(&pool().backend(&kept.url()).backend(&removed.url()));
    eventually(PATIENCE, || kept.open_connections() == 1 && removed.open_connections() == 1).await;
    assert_eq!(probing.probers(), 2);

    probing.apply(&pool().backend(&kept.url()).backend(&added.url()));
    // In the middle of its probe, which would have waited for an hour.
    removed.closed_by_peer(0).await;
    eventually(PATIENCE, || added.open_connections() == 1 && probing.probers() == 2).await;
    assert_eq!((kept.connections().len(), kept.open_connections()), (1, 1), "the kept one was not disturbed");

    probing.apply(&pool().backend(&added.url()));
    kept.closed_by_peer(0).await;
    eventually(PATIENCE, || probing.probers() == 1).await;
    assert_eq!(added.connections().len(), 1);
}

#[tokio::test]
async fn many_reloads_leave_one_prober_per_backend() {
    let backends = [Backend::healthy().await, Backend::healthy().await, Backend::healthy().await];
    let probing = Probing::start(&quick().backend(&backends[0].url()));
    for round in 0..50 {
        let pool = quick().backend(&backends[round % 3].url()).backend(&backends[(round + 1) % 3].url());
        probing.apply(&pool);
        if round % 7 == 0 {
            tokio::task::yield_now().await;
        }
    }
    eventually(PATIENCE, || probing.probers() == 2).await;
    for i in 0..2 {
        probing.probed_as(i, ProbeVerdict::Pass).await;
    }
    assert_eq!(probing.probers(), 2);
}

#[tokio::test]
async fn a_kept_prober_takes_new_parameters_at_its_next_turn() {
    let backend = Backend::start(script(ok(), models(&[]))).await;
    let probing = Probing::start(&quick().backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    let record = probing.backend(0);
    probing.apply(&quick().backend(&backend.url()).set("pool.probe.path", "/ready"));
    eventually(PATIENCE, || !asked_for(&backend, "/ready").is_empty()).await;
    assert!(Arc::ptr_eq(&record, &probing.backend(0)));
    assert_eq!(probing.probers(), 1);
}

#[tokio::test]
async fn all_tasks_end_with_the_drain_and_none_before() {
    let backend = Backend::healthy().await;
    let mut probing = Probing::start(&quick().backend(&backend.url()));
    probing.probed(0).await;
    let guard = probing.drain.watch().guard();
    probing.drain.trigger();
    let seen = asked_for(&backend, "/health").len();
    eventually(PATIENCE, || asked_for(&backend, "/health").len() > seen + 1).await;
    drop(guard);
    probing.drain.drained(PATIENCE).await;
    within(PATIENCE, &mut probing.probers).await.unwrap();
    within(PATIENCE, &mut probing.clock).await.unwrap();
    assert_eq!(probing.probers(), 0);
}

#[tokio::test]
async fn disabled_backends_are_probed_too() {
    let backend = Backend::healthy().await;
    let probing = Probing::start(&once().backend_with(&backend.url(), &[("disabled", true.into())]));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    assert_eq!(probing.backend(0).admin(), Administrative::Disabled);
}

#[tokio::test]
async fn models_are_listed_after_a_passed_probe_and_anew_when_the_backend_was_away() {
    let backend = Backend::start(script(reply::busy(1), models(&["early"]))).await;
    let probing = Probing::start(&quick().backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Refusing).await;
    assert!(asked_for(&backend, "/v1/models").is_empty(), "nobody asks a backend that is loading");

    backend.set_script(script(ok(), models(&["llama", "llama-lora"])));
    probing.lists(0, Some(&["llama", "llama-lora"])).await;
    assert_eq!(probing.backend(0).listed().unwrap().entries[0]["object"], "model");
    assert_eq!(probing.events("models_changed"), ["lists llama, llama-lora"]);

    // It returns as another one.
    backend.set_script(script(reply::error(500), models(&["qwen"])));
    probing.probed_as(0, ProbeVerdict::Fail).await;
    assert!(probing.backend(0).lists("llama"), "the list of a dead one is kept");
    backend.set_script(script(ok(), models(&["qwen"])));
    probing.lists(0, Some(&["qwen"])).await;
    let asked = asked_for(&backend, "/v1/models").len();
    let probes = asked_for(&backend, "/health").len();
    eventually(PATIENCE, || asked_for(&backend, "/health").len() > probes + 3).await;
    assert_eq!(asked_for(&backend, "/v1/models").len(), asked, "not at every probe");
}

#[tokio::test]
async fn a_list_that_fails_counts_against_nobody() {
    for (answer, kept) in [
        (vec![Step::Rst], true),
        (reply::error(500), true),
        (reply::error(404), false),
        (reply::body(200, "text/html", "<html>no list</html>"), false),
        (reply::body(200, "application/json", vec![b' '; 2 << 20]), false),
    ] {
        let backend = Backend::start(script(ok(), models(&["m"]))).await;
        let probing = Probing::start(&quick().backend(&backend.url()));
        probing.lists(0, Some(&["m"])).await;
        backend.set_script(script(reply::error(500), Vec::new()));
        probing.probed_as(0, ProbeVerdict::Fail).await;
        let asked = asked_for(&backend, "/v1/models").len();
        backend.set_script(script(ok(), answer.clone()));
        eventually(PATIENCE, || asked_for(&backend, "/v1/models").len() > asked).await;
        probing.lists(0, if kept { Some(&["m"]) } else { None }).await;
        let probes = asked_for(&backend, "/health").len();
        eventually(PATIENCE, || asked_for(&backend, "/health").len() > probes + 1).await;
        assert_eq!(probing.backend(0).listed().is_some(), kept, "{answer:?}");
        let last = probing.probed(0).await;
        assert_eq!(last.verdict, ProbeVerdict::Pass, "{answer:?}");
    }
}

#[tokio::test]
async fn without_probes_models_are_listed_all_the_same() {
    let backend = Backend::start(script(ok(), models(&["m"]))).await;
    let pool = ProxyBuilder::new().backend(&backend.url()).set("pool.probe.kind", "off");
    let probing = Probing::start(&pool);
    probing.lists(0, Some(&["m"])).await;
    assert!(asked_for(&backend, "/health").is_empty());
    assert!(probing.backend(0).last_probe().is_none());
}

#[tokio::test]
async fn a_tcp_probe_asks_nothing() {
    let backend = Backend::start(script(reply::error(500), models(&["m"]))).await;
    let probing = Probing::start(&quick().backend(&backend.url()).set("pool.probe.kind", "tcp"));
    let last = probing.probed(0).await;
    assert_eq!((last.verdict, last.saw.as_str()), (ProbeVerdict::Pass, "connected"));
    probing.lists(0, Some(&["m"])).await;
    assert!(asked_for(&backend, "/health").is_empty());
    backend.stop().await;
    probing.probed_as(0, ProbeVerdict::Fail).await;
}

#[tokio::test]
async fn tls_backends_are_probed_over_tls() {
    let authority = Authority::new();
    let ca = authority.ca_path().display().to_string();
    for (certificate, kind, verdict) in [
        (Certificate::Good, "http", ProbeVerdict::Pass),
        (Certificate::Good, "tcp", ProbeVerdict::Pass),
        (Certificate::WrongName, "http", ProbeVerdict::Fail),
        (Certificate::Expired, "tcp", ProbeVerdict::Fail),
    ] {
        let server = authority.server(certificate, &["http/1.1"]);
        let backend = Backend::start_tls(Script::new(), &server).await;
        let pool =
            once().backend(&backend.url()).set("pool.tls.ca", ca.as_str()).set("pool.probe.kind", kind);
        let probing = Probing::start(&pool);
        let last = probing.probed(0).await;
        assert_eq!(last.verdict, verdict, "{certificate:?}: {}", last.saw);
        assert_eq!(last.saw.contains("tls_failure"), verdict == ProbeVerdict::Fail, "{}", last.saw);
    }
}

#[tokio::test]
async fn http2_backends_are_probed_in_http2() {
    let backend = H2Backend::start(|request| {
        assert_eq!(request.header("connection"), None);
        match request.path() {
            "/v1/models" => H2Answer::new(200).data(r#"{"data":[{"id":"m"}]}"#),
            _ => H2Answer::new(200).data("ok"),
        }
    })
    .await;
    let probing = Probing::start(&quick().backend(&backend.url()).set("pool.http", "2"));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    probing.lists(0, Some(&["m"])).await;
    let connections = backend.connections();
    eventually(PATIENCE, || backend.connections() > connections + 1).await;
}

#[tokio::test]
async fn probes_leave_the_connections_of_the_workers_alone() {
    let backend = Backend::healthy().await;
    let probing = Probing::start(&quick().backend(&backend.url()));
    eventually(PATIENCE, || asked_for(&backend, "/health").len() >= 3).await;
    assert_eq!(probing.backend(0).lane(0).idle(), 0);
    let closed = |nth: usize| backend.connections().get(nth).is_some_and(|seen| seen.over.is_some());
    eventually(PATIENCE, || closed(0) && closed(1)).await;
}

#[tokio::test]
async fn a_dribbled_answer_is_bounded_by_the_timeout() {
    let slow = Step::SendSlow {
        bytes: reply::head(200, &[("content-length", "0")]),
        piece: 1,
        every: Duration::from_millis(50),
    };
    let backend = Backend::start(Script::new().probes(Vec::new().then(slow))).await;
    let probing = Probing::start(&once().backend(&backend.url()).set("pool.probe.timeout", "200ms"));
    let last = probing.probed(0).await;
    assert_eq!(last.verdict, ProbeVerdict::Fail, "{}", last.saw);
    assert!(last.took >= Duration::from_millis(200), "{:?}", last.took);
}

#[tokio::test]
async fn a_suspect_is_asked_at_once_and_not_more_than_once_a_second() {
    let backend = Backend::start(script(ok(), models(&[]))).await;
    let probing = Probing::start(&once().backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    let (record, pool) = (probing.backend(0), probing.directory.snapshot().pools[0].clone());
    assert!(pool.can_verify(0));
    assert_eq!(record.last_verify(), None, "ordinary probes are none");
    let wanted = clock::now();
    for _ in 0..50 {
        record.want_verify();
    }
    eventually(PATIENCE, || record.last_verify().is_some()).await;
    let first = record.last_verify().unwrap();
    assert!(first.answered && first.asked >= wanted && first.ended >= first.asked, "{first:?}");

    backend.set_script(Script::new().probes(vec![Step::Stall]));
    record.want_verify();
    eventually(PATIENCE, || record.last_verify() != Some(first)).await;
    let second = record.last_verify().unwrap();
    assert!(!second.answered, "{second:?}");
    assert!(second.asked.since(first.asked) >= Duration::from_secs(1), "{first:?} {second:?}");
    // The judge hears of it like of any probe.
    assert_eq!(record.last_probe().unwrap().verdict, ProbeVerdict::Fail);
    assert_eq!(asked_for(&backend, "/health").len(), 3, "the ordinary one, and two on demand");
}

#[tokio::test]
async fn a_probe_on_demand_waits_a_second_at_most_and_for_nobody() {
    let backend = Backend::start(Script::new().probes(vec![Step::Stall])).await;
    let probing = Probing::start(&once().backend(&backend.url()).set("pool.probe.timeout", FOR_EVER));
    eventually(PATIENCE, || backend.open_connections() == 1).await;
    let record = probing.backend(0);
    record.want_verify();
    eventually(PATIENCE, || record.last_verify().is_some()).await;
    let verified = record.last_verify().unwrap();
    let took = verified.ended.since(verified.asked);
    assert!(!verified.answered && took >= Duration::from_secs(1) && took < PATIENCE, "{verified:?}");
    // The ordinary probe goes on waiting.
    eventually(PATIENCE, || backend.connections().len() == 2 && backend.open_connections() == 1).await;
}

#[tokio::test]
async fn a_probe_on_demand_that_is_refused_or_answered_503_says_so() {
    let backend = Backend::start(script(reply::busy(1), models(&[]))).await;
    let probing = Probing::start(&once().backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Refusing).await;
    let record = probing.backend(0);
    let answered = || record.last_verify().map(|verified| verified.answered);
    record.want_verify();
    eventually(PATIENCE, || answered() == Some(true)).await;
    backend.stop().await;
    record.want_verify();
    eventually(PATIENCE, || answered() == Some(false)).await;
}

#[tokio::test]
async fn without_questions_nothing_can_be_verified() {
    for kind in ["tcp", "off"] {
        let backend = Backend::start(script(ok(), models(&[]))).await;
        let pool = quick().backend(&backend.url()).set("pool.probe.kind", kind);
        let probing = Probing::start(&pool);
        let record = probing.backend(0);
        assert!(!probing.directory.snapshot().pools[0].can_verify(0), "{kind}");
        record.want_verify();
        probing.lists(0, Some(&[])).await;
        assert_eq!(record.last_verify(), None, "{kind}");
        // A wish of the time before is not kept for the day when probes are switched on.
        probing.apply(&quick().backend(&backend.url()));
        probing.probed_as(0, ProbeVerdict::Pass).await;
        assert_eq!(record.last_verify(), None, "{kind}");
    }
}

#[tokio::test]
async fn a_preset_asks_its_engines_page_and_believes_200_alone() {
    for (preset, page) in [
        ("vllm", "/health"),
        ("sglang", "/health"),
        ("llamacpp", "/health"),
        ("tgi", "/health"),
        ("triton", "/v2/health/ready"),
        ("ollama", "/api/version"),
    ] {
        let backend = Backend::start(script(ok(), models(&[]))).await;
        let probing = Probing::start(&quick().backend(&backend.url()).set("pool.probe.preset", preset));
        probing.probed_as(0, ProbeVerdict::Pass).await;
        assert!(!asked_for(&backend, page).is_empty(), "{preset}");
        // Not this engine, then; without a preset it would pass weakly.
        backend.set_script(script(reply::error(404), models(&[])));
        probing.probed_as(0, ProbeVerdict::Fail).await;
        backend.set_script(script(reply::busy(1), models(&[])));
        probing.probed_as(0, ProbeVerdict::Refusing).await;
    }
}

/// A pool that asks for a token, quickly.
fn generating(kind: &str) -> ProxyBuilder {
    quick().set("pool.probe.kind", kind)
}

/// `/v1/chat/completions` as `chat` answers, `/v1/models` listing `m`, a health page that always says 200.
fn chatting(chat: impl Fn(&RequestSeen) -> Vec<Step> + Send + Sync + 'static) -> Script {
    Script::new().by_request(move |request| match request.path() {
        "/v1/models" => models(&["m"]),
        "/v1/chat/completions" => chat(request),
        _ => ok(),
    })
}

fn said(text: &str) -> Vec<Step> {
    let message = json!({"role": "assistant", "content": text});
    reply::json(200, &json!({"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}))
}

#[tokio::test]
async fn a_probe_may_want_a_token_and_a_page_that_says_200_will_not_do() {
    let backend = Backend::start(chatting(|_| said("Hello"))).await;
    let probing = Probing::start(&generating("generate").backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    assert_eq!(probing.probed(0).await.saw, "200 and a token");
    let asked = &asked_for(&backend, "/v1/chat/completions")[0];
    assert_eq!((asked.method.as_str(), asked.index), ("POST", 0), "on a connection of its own");
    let body = asked.json();
    assert_eq!((&body["model"], &body["max_tokens"]), (&json!("m"), &json!(1)));
    assert!(asked_for(&backend, "/health").is_empty());

    let nothing = json!({"choices": [], "usage": null});
    for (answer, verdict, saw) in [
        (reply::error(500), ProbeVerdict::Fail, "500"),
        (reply::busy(1), ProbeVerdict::Refusing, "503"),
        (reply::json(200, &nothing), ProbeVerdict::Fail, "answer without `choices`"),
        (said(""), ProbeVerdict::Fail, "answer without a token"),
        (vec![Step::Rst], ProbeVerdict::Fail, "closed without an answer"),
    ] {
        backend.set_script(chatting(move |_| answer.clone()));
        let record = probing.backend(0);
        let sees = |last: &LastProbe| last.verdict == verdict && last.saw.starts_with(saw);
        eventually(PATIENCE, || record.last_probe().is_some_and(|last| sees(&last))).await;
    }
}

#[tokio::test]
async fn an_answer_that_does_not_end_fails_at_its_deadline() {
    let begun = vec![Step::send(reply::head(200, &[("content-length", "100")])), Step::Stall];
    let backend = Backend::start(chatting(move |_| begun.clone())).await;
    let pool = generating("generate").backend(&backend.url()).set("pool.probe.deadline", "200ms");
    let probing = Probing::start(&pool);
    let last = probing.probed(0).await;
    assert_eq!(last.verdict, ProbeVerdict::Fail, "{}", last.saw);
    assert!(last.saw.contains("no end of its answer within 200ms"), "{}", last.saw);
    assert!(last.took >= Duration::from_millis(200));
}

#[tokio::test]
async fn a_canary_knows_the_answer() {
    let backend = Backend::start(chatting(|_| said(" 42."))).await;
    let pool = generating("canary")
        .backend(&backend.url())
        .set("pool.probe.prompt", "What is 6 times 7? Answer with the number.")
        .set("pool.probe.expect", "42");
    let probing = Probing::start(&pool);
    probing.probed_as(0, ProbeVerdict::Pass).await;
    backend.set_script(chatting(|_| said("!!!!!!!!")));
    probing.probed_as(0, ProbeVerdict::Fail).await;
    assert_eq!(probing.probed(0).await.saw, "another answer than expected: \"!!!!!!!!\"");
    let told = probing.events("probe_changed");
    assert_eq!(told, ["probe now fail: another answer than expected: \"!!!!!!!!\""]);
}

#[tokio::test]
async fn no_token_is_asked_for_while_real_requests_get_theirs() {
    let backend = Backend::start(chatting(|_| said("Hello"))).await;
    let probing = Probing::start(&generating("generate").backend(&backend.url()));
    probing.probed_as(0, ProbeVerdict::Pass).await;
    let pool = probing.directory.snapshot().pools[0].clone();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut serve = || {
        let wanted = Wanted {
            paid: false,
            tried: &[],
            only: None,
            proven_since: None,
            class: Class::of(Endpoint::ChatCompletions, true),
            model: None,
            affinity: None,
            prompt_bytes: 0,
            replayable: true,
        };
        let choice = pool.pick(&wanted, &mut rng).unwrap_or_else(|nobody| panic!("{nobody:?}"));
        choice.observe(About::Model, Observation::FirstToken, &mut rng);
    };
    // One may have been asked for before the first of these; ten intervals long there is no other.
    serve();
    let asked = || asked_for(&backend, "/v1/chat/completions").len();
    let (begin, before) = (clock::now(), asked());
    eventually(PATIENCE, || {
        serve();
        clock::now().since(begin) > Duration::from_millis(500)
    })
    .await;
    assert!(asked() <= before + 1, "{} more", asked() - before);
    let quiet = asked();
    eventually(PATIENCE, || asked() > quiet).await;
}

#[tokio::test]
async fn a_suspect_is_asked_for_its_page_where_probes_want_a_token() {
    let backend = Backend::start(chatting(|_| vec![Step::Stall])).await;
    let pool = once().set("pool.probe.kind", "generate").backend(&backend.url());
    let probing = Probing::start(&pool);
    let record = probing.backend(0);
    record.want_verify();
    eventually(PATIENCE, || record.last_verify().is_some_and(|verified| verified.answered)).await;
    assert_eq!(asked_for(&backend, "/health").len(), 1);
    assert!(record.last_probe().is_none(), "the page proves no token: the judge does not hear of it");
}

#[tokio::test]
async fn a_newcomer_says_who_it_is_before_it_gets_work() {
    let first = Backend::start(script(ok(), models(&["m"]))).await;
    let second = Backend::start(script(ok(), vec![Step::Stall])).await;
    let probing = Probing::start(&quick().backend(&first.url()));
    probing.lists(0, Some(&["m"])).await;
    probing.probed_as(0, ProbeVerdict::Pass).await;
    probing.apply(&quick().backend(&first.url()).backend(&second.url()));
    eventually(PATIENCE, || !asked_for(&second, "/v1/models").is_empty()).await;
    // Its probe has passed, and its list is waited for.
    assert!(probing.backend(1).last_probe().is_none());
    let standing = || {
        let pool = probing.directory.snapshot().pools[0].clone();
        pool.standing(1, None, clock::now())
    };
    assert_eq!(standing(), Standing::Out { until: None });
    // That it does not come is no evidence.
    eventually(PATIENCE, || matches!(standing(), Standing::Eligible { .. })).await;
    assert_eq!(probing.backend(1).listed(), None);
}

#[tokio::test]
async fn a_backend_that_lists_none_of_the_configured_models_is_misconfigured() {
    let right = Backend::start(script(ok(), models(&["llama", "llama-lora"]))).await;
    let wrong = Backend::start(script(ok(), models(&["llama"]))).await;
    let aliases = toml::Table::from_iter([("gpt".to_owned(), "llama".into())]);
    let pool = quick()
        .backend(&right.url())
        .backend(&wrong.url())
        .set("pool.models", toml::Value::Array(vec!["gpt".into()]))
        .set("pool.aliases", aliases)
        .set("pool.health.misconfigured_ejection", "100ms");
    let probing = Probing::start(&pool);
    for i in 0..2 {
        probing.probed_as(i, ProbeVerdict::Pass).await;
    }
    let standing = |i| {
        let pool = probing.directory.snapshot().pools[0].clone();
        pool.standing(i, None, clock::now())
    };
    assert!(matches!(standing(1), Standing::Eligible { .. }), "an alias stands for what it lists");

    wrong.set_script(script(reply::error(500), Vec::new()));
    probing.probed_as(1, ProbeVerdict::Fail).await;
    wrong.set_script(script(ok(), models(&["qwen"])));
    eventually(PATIENCE, || matches!(standing(1), Standing::Out { .. })).await;
    probing.lists(1, Some(&["qwen"])).await;
    let told = "misconfigured: lists qwen, expected gpt, llama";
    eventually(PATIENCE, || probing.events("misconfigured_backend") == [told]).await;
    let record = probing.backend(1);
    let saw = "200, but lists qwen, expected gpt, llama";
    eventually(PATIENCE, || record.last_probe().is_some_and(|last| last.saw == saw)).await;
    let transitions = probing.events("backend_transition");
    assert!(transitions.iter().any(|text| text.ends_with("misconfigured")), "{transitions:?}");
    // Longer than the ejection, and still nothing.
    let passed = asked_for(&wrong, "/health").len();
    eventually(PATIENCE, || asked_for(&wrong, "/health").len() > passed + 10).await;
    assert!(matches!(standing(1), Standing::Out { .. }));
    assert!(matches!(standing(0), Standing::Eligible { .. }));

    wrong.set_script(script(ok(), models(&["llama"])));
    eventually(PATIENCE, || matches!(standing(1), Standing::Eligible { .. } | Standing::Probation)).await;
}

#[tokio::test]
async fn names_that_nobody_lists_tell_nothing() {
    let backends = [
        Backend::start(script(ok(), models(&["/models/a.gguf"]))).await,
        Backend::start(script(ok(), models(&["/models/a.gguf"]))).await,
    ];
    let pool = quick().set("pool.models", toml::Value::Array(vec!["llama".into()]));
    let probing = Probing::start(&pool.backend(&backends[0].url()).backend(&backends[1].url()));
    for i in 0..2 {
        probing.probed_as(i, ProbeVerdict::Pass).await;
        probing.lists(i, Some(&["/models/a.gguf"])).await;
    }
    assert_eq!(probing.directory.snapshot().pools[0].eligible(), 2);
    assert_eq!(probing.events("misconfigured_backend"), Vec::<String>::new());
}

#[tokio::test]
async fn a_lost_connection_makes_a_backend_say_who_it_is_while_a_peer_works() {
    let lists = || script(ok(), models(&["m"]));
    let backends = [Backend::start(lists()).await, Backend::start(lists()).await];
    let probing = Probing::start(&once().backend(&backends[0].url()).backend(&backends[1].url()));
    for i in 0..2 {
        probing.lists(i, Some(&["m"])).await;
        probing.probed_as(i, ProbeVerdict::Pass).await;
    }
    let pool = probing.directory.snapshot().pools[0].clone();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut pick = |tried: &[evergate::pool::BackendId]| {
        let wanted = Wanted {
            paid: false,
            only: None,
            proven_since: None,
            tried,
            class: Class::of(Endpoint::ChatCompletions, true),
            model: None,
            affinity: None,
            prompt_bytes: 0,
            replayable: true,
        };
        pool.pick(&wanted, &mut rng).unwrap_or_else(|nobody| panic!("{nobody:?}"))
    };
    // Its next list does not come, so the doubt stands.
    backends[0].set_script(script(ok(), vec![Step::Stall]));
    pick(&[pool.members[1].backend.id]).lost_connection();
    assert!(pool.members[0].backend.is_doubted());
    for _ in 0..20 {
        assert_eq!(pick(&[]).index, 1);
    }
    eventually(PATIENCE, || asked_for(&backends[0], "/v1/models").len() == 2).await;
    // Once it said who it is, it works again: before its next probe, which is an hour away.
    backends[0].set_script(lists());
    eventually(PATIENCE, || !pool.members[0].backend.is_doubted()).await;
    eventually(PATIENCE, || pick(&[]).index == 0).await;
    assert_eq!(asked_for(&backends[0], "/health").len(), 1);
    // Where all are doubted, none is kept from work.
    for backend in &backends {
        backend.set_script(script(ok(), vec![Step::Stall]));
    }
    pick(&[pool.members[1].backend.id]).lost_connection();
    pick(&[pool.members[0].backend.id]).lost_connection();
    let mut seen: Vec<usize> = (0..50).map(|_| pick(&[]).index).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, [0, 1]);
}
