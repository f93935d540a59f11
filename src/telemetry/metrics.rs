//! Counters, gauges and histograms, in the Prometheus text format.
//!
//! Handles are resolved once, when a backend, pool or listener is made, and kept there: the hot path
//! only adds to atomics. Labels are bounded: pools, backends and listeners by the configuration,
//! outcomes and reasons by the code (`&'static str`), models by [`MODELS_MAX`]. A removed backend's
//! series go with it ([`Metrics::retire_backend`]); counts that trickle in afterwards are lost.
//! Nothing here decides or logs.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::StatusCode;
use parking_lot::{Mutex, RwLock};
use prometheus::core::{Collector, Desc, Metric};
use prometheus::proto::{MetricFamily, MetricType};
use prometheus::{Gauge, Histogram, HistogramOpts, IntCounter, IntGauge, Opts, Registry, TextEncoder};

use super::events::Quiet;
use crate::policy::admission::Priority;
use crate::policy::health::ProbeVerdict;
use crate::policy::load::Reported;

/// Most models with a label of their own, per backend; the rest share `other`. Model names come from
/// clients and backends, and each is a series.
pub const MODELS_MAX: usize = 256;

/// The label of models beyond [`MODELS_MAX`].
pub const MODEL_OTHER: &str = "other";

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Upper bounds in seconds of first byte, first token and duration: from a cached health answer to a
/// long generation, about two per octave where first tokens usually lie.
const SECONDS_BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0,
    600.0,
];

/// How an attempt ended, as counted and as written in access records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum AttemptOutcome {
    /// A complete answer.
    Success,
    /// It failed, and the backend is to blame.
    Fault,
    /// The backend asked to be left alone for a while.
    Busy,
    /// Nothing to learn: a client fault relayed, a stale connection.
    Neutral,
    /// The request failed alike on two backends that serve others: its own fault.
    RequestFault,
    /// The backend refuses our credentials or lacks the model its peers serve.
    Misconfigured,
    /// Given up by us: the client left, or another attempt of the exchange was faster.
    Cancelled,
    /// Moved away, unfinished, from a backend that was ejected or is on its way out.
    Rescued,
    /// It was late, and the one begun beside it spoke first.
    Overtaken,
}

impl AttemptOutcome {
    /// All, in the order of their discriminants.
    pub const ALL: [Self; 9] = [
        Self::Success,
        Self::Fault,
        Self::Busy,
        Self::Neutral,
        Self::RequestFault,
        Self::Misconfigured,
        Self::Cancelled,
        Self::Rescued,
        Self::Overtaken,
    ];

    /// For labels and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Fault => "fault",
            Self::Busy => "busy",
            Self::Neutral => "neutral",
            Self::RequestFault => "request_fault",
            Self::Misconfigured => "misconfigured",
            Self::Cancelled => "cancelled",
            Self::Rescued => "rescued",
            Self::Overtaken => "overtaken",
        }
    }
}

/// How an exchange ended for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum End {
    /// The whole answer of a backend was delivered, whatever its status.
    Complete,
    /// A visible error of evergate's own: a rejection, or an error event in a stream.
    Error,
    /// The client left before its answer was whole.
    ClientGone,
    /// The connection was closed in mid-answer, no visible error being possible.
    Cut,
}

impl End {
    /// All, in the order of their discriminants.
    pub const ALL: [Self; 4] = [Self::Complete, Self::Error, Self::ClientGone, Self::Cut];

    /// For labels and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Error => "error",
            Self::ClientGone => "client_gone",
            Self::Cut => "cut",
        }
    }
}

/// What kind of API a request used: a label of few values, not a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum EndpointClass {
    /// Chat completions.
    Chat,
    /// Text completions.
    Completions,
    /// Anthropic messages.
    Messages,
    /// Responses API.
    Responses,
    /// Embeddings.
    Embeddings,
    /// Rerank, score, classify, tokenize.
    Scoring,
    /// An engine's own generation API: `/generate`, `/infer`, gRPC.
    Native,
    /// Model lists.
    Models,
    /// Everything else.
    Other,
}

impl EndpointClass {
    /// All, in the order of their discriminants.
    pub const ALL: [Self; 9] = [
        Self::Chat,
        Self::Completions,
        Self::Messages,
        Self::Responses,
        Self::Embeddings,
        Self::Scoring,
        Self::Native,
        Self::Models,
        Self::Other,
    ];

    /// For labels and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Messages => "messages",
            Self::Responses => "responses",
            Self::Embeddings => "embeddings",
            Self::Scoring => "scoring",
            Self::Native => "native",
            Self::Models => "models",
            Self::Other => "other",
        }
    }
}

/// Label of a status class; the last is for exchanges that ended before a head was sent.
const STATUS_CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];

/// Result of one probe, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ProbeResult {
    /// It passed.
    Pass,
    /// It answered, but not to this question.
    WeakPass,
    /// Timeout, reset, or an answer that does not pass.
    Fail,
    /// It answered 503.
    Refusing,
}

impl From<ProbeVerdict> for ProbeResult {
    fn from(verdict: ProbeVerdict) -> Self {
        match verdict {
            ProbeVerdict::Pass => Self::Pass,
            ProbeVerdict::WeakPass => Self::WeakPass,
            ProbeVerdict::Fail => Self::Fail,
            ProbeVerdict::Refusing => Self::Refusing,
        }
    }
}

impl ProbeResult {
    /// All, in the order of their discriminants.
    pub const ALL: [Self; 4] = [Self::Pass, Self::WeakPass, Self::Fail, Self::Refusing];

    /// For labels and events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::WeakPass => "weak_pass",
            Self::Fail => "fail",
            Self::Refusing => "refusing",
        }
    }
}

/// All series of one running evergate.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    families: Arc<Families>,
    /// Requests and responses, shared by all listeners.
    pub exchanges: Arc<ExchangeMetrics>,
    /// Number of the configuration in force.
    pub config_generation: IntGauge,
    /// Configurations put into force, the first not counted.
    pub config_reloads: IntCounter,
    /// Configurations refused; the last good one stayed in force.
    pub config_reload_failures: IntCounter,
    /// Errors of the latest configuration read; 0 when it is the one in force. Alert on this.
    pub config_errors: IntGauge,
    /// Replay bodies, held answers and journals, together.
    pub memory_held_bytes: IntGauge,
    /// Their bound.
    pub memory_max_bytes: IntGauge,
    /// Access records lost because their writer could not keep up.
    pub access_records_dropped: IntCounter,
    /// Panics contained in their exchange or task.
    pub panics: IntCounter,
    /// 1 from the start of a drain.
    pub draining: IntGauge,
    process: ProcessMetrics,
}

/// Per-label families; cold lookups go through them.
#[derive(Debug)]
struct Families {
    requests: Family<IntCounter>,
    responses_finished: Family<IntCounter>,
    rejected: Family<IntCounter>,
    smuggling: Family<IntCounter>,
    limits: Family<IntCounter>,
    events: Family<IntCounter>,
    backend_tasks: Family<IntGauge>,
    listener: ListenerFamilies,
    pool: PoolFamilies,
    backend: BackendFamilies,
}

#[derive(Debug)]
struct ListenerFamilies {
    connections: Family<IntCounter>,
    connections_open: Family<IntGauge>,
    tls_failures: Family<IntCounter>,
}

#[derive(Debug)]
struct PoolFamilies {
    backends: Family<IntGauge>,
    eligible: Family<IntGauge>,
    panic_mode: Family<IntGauge>,
    waiting: Family<IntGauge>,
    queue: Family<IntGauge>,
    queue_wait: Family<Histogram>,
    queue_refused: Family<IntCounter>,
    retries: Family<IntCounter>,
    budget_left: Family<Gauge>,
    budget_empty: Family<IntCounter>,
    hedges: Family<IntCounter>,
    resumes: Family<IntCounter>,
    opinions: Family<IntCounter>,
    not_armed: Family<IntCounter>,
    moves: Family<IntCounter>,
    fallbacks: Family<IntCounter>,
}

#[derive(Debug)]
struct BackendFamilies {
    attempts: Family<IntCounter>,
    reasons: Family<IntCounter>,
    in_flight: Family<IntGauge>,
    cap: Family<IntGauge>,
    first_byte: Family<Histogram>,
    first_token: Family<Histogram>,
    duration: Family<Histogram>,
    ejections: Family<IntCounter>,
    transitions: Family<IntCounter>,
    probes: Family<IntCounter>,
    connections_opened: Family<IntCounter>,
    connections_reused: Family<IntCounter>,
    connections_open: Family<IntGauge>,
    healthy: Family<IntGauge>,
    eligible: Family<IntGauge>,
    quarantined: Family<IntGauge>,
    offences: Family<IntCounter>,
    compressed: Family<IntCounter>,
    model_attempts: Family<IntCounter>,
    model_faults: Family<IntCounter>,
    model_eligible: Family<IntGauge>,
    reported_running: Family<IntGauge>,
    reported_waiting: Family<IntGauge>,
    reported_cache_used: Family<Gauge>,
    foreign_requests: Family<IntGauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry of its own with all process-wide series at zero.
    pub fn new() -> Self {
        let r = Registry::new();
        let pool_backend = &["pool", "backend"];
        let families = Arc::new(Families {
            requests: counters(
                &r,
                "requests_total",
                "Requests answered or given up, by status class.",
                &["endpoint", "status"],
            ),
            responses_finished: counters(
                &r,
                "responses_finished_total",
                "Exchanges ended, by how they ended for the client.",
                &["end"],
            ),
            rejected: counters(
                &r,
                "rejected_total",
                "Requests evergate answered with an error of its own.",
                &["code"],
            ),
            smuggling: counters(
                &r,
                "smuggling_rejections_total",
                "Requests refused because peers could disagree on their framing.",
                &["kind"],
            ),
            limits: counters(
                &r,
                "limits_bitten_total",
                "Times a configured limit refused or cut something.",
                &["limit"],
            ),
            events: counters(&r, "events_total", "Notable transitions, as in the event log.", &["event"]),
            backend_tasks: gauges(
                &r,
                "backend_tasks",
                "Tasks that run once per backend; more than backends means a leak.",
                &["task"],
            ),
            listener: ListenerFamilies {
                connections: counters(
                    &r,
                    "downstream_connections_total",
                    "Client connections accepted.",
                    &["listener"],
                ),
                connections_open: gauges(
                    &r,
                    "downstream_connections_open",
                    "Client connections open now.",
                    &["listener"],
                ),
                tls_failures: counters(
                    &r,
                    "downstream_tls_failures_total",
                    "TLS handshakes with clients that failed.",
                    &["listener"],
                ),
            },
            pool: PoolFamilies {
                backends: gauges(&r, "pool_backends", "Members of the pool.", &["pool"]),
                eligible: gauges(
                    &r,
                    "pool_backends_eligible",
                    "Members that may receive a new attempt now.",
                    &["pool"],
                ),
                panic_mode: gauges(
                    &r,
                    "pool_panic_mode",
                    "1 while too few are eligible and health is ignored.",
                    &["pool"],
                ),
                waiting: gauges(
                    &r,
                    "pool_waiting",
                    "Exchanges waiting for a backend to become available.",
                    &["pool"],
                ),
                queue: gauges(
                    &r,
                    "queue_length",
                    "Exchanges waiting for a backend, by priority.",
                    &["pool", "priority"],
                ),
                queue_wait: histograms(
                    &r,
                    "queue_wait_seconds",
                    "Time waited for a backend, by those who had to wait.",
                    &["pool"],
                ),
                queue_refused: counters(
                    &r,
                    "queue_refused_total",
                    "Exchanges that got no backend, by why not.",
                    &["pool", "reason"],
                ),
                retries: counters(
                    &r,
                    "retries_total",
                    "Attempts after the first, by what made them necessary.",
                    &["pool", "reason"],
                ),
                budget_left: float_gauges(
                    &r,
                    "retry_budget_left",
                    "Retries the budget would grant now.",
                    &["pool"],
                ),
                budget_empty: counters(
                    &r,
                    "retry_budget_empty_total",
                    "Retries not made because the budget was empty.",
                    &["pool"],
                ),
                hedges: counters(
                    &r,
                    "hedges_total",
                    "Second attempts made on suspicion, by result.",
                    &["pool", "result"],
                ),
                resumes: counters(
                    &r,
                    "resumes_total",
                    "Broken streams, by whether they were continued.",
                    &["pool", "result"],
                ),
                opinions: counters(
                    &r,
                    "second_opinions_total",
                    "Peers asked because a backend repeated one token, by what came of it.",
                    &["pool", "result"],
                ),
                not_armed: counters(
                    &r,
                    "streams_not_armed_total",
                    "Token streams that would not be continued if they broke, by why.",
                    &["pool", "reason"],
                ),
                moves: counters(
                    &r,
                    "stream_moves_total",
                    "Streams for which another backend was asked beside one that still served them, by why and what came of it.",
                    &["pool", "cause", "result"],
                ),
                fallbacks: counters(
                    &r,
                    "fallbacks_total",
                    "Requests of this pool that were sent to another one, by why.",
                    &["pool", "cause"],
                ),
            },
            backend: BackendFamilies {
                attempts: counters(
                    &r,
                    "attempts_total",
                    "Attempts ended, by outcome.",
                    &["pool", "backend", "outcome"],
                ),
                reasons: counters(
                    &r,
                    "attempt_failures_total",
                    "Attempts that did not succeed, by cause.",
                    &["pool", "backend", "reason"],
                ),
                in_flight: gauges(&r, "attempts_in_flight", "Unfinished attempts.", pool_backend),
                cap: gauges(
                    &r,
                    "attempts_in_flight_learned_max",
                    "Most unfinished attempts the backend was seen to take; 0 while nothing is known.",
                    pool_backend,
                ),
                first_byte: histograms(
                    &r,
                    "first_byte_seconds",
                    "From the start of an attempt to its response head.",
                    pool_backend,
                ),
                first_token: histograms(
                    &r,
                    "first_token_seconds",
                    "From the start of an attempt to its first token.",
                    pool_backend,
                ),
                duration: histograms(
                    &r,
                    "attempt_duration_seconds",
                    "From the start of an attempt to its end.",
                    pool_backend,
                ),
                ejections: counters(
                    &r,
                    "ejections_total",
                    "Passive removals for a time.",
                    &["pool", "backend", "reason"],
                ),
                transitions: counters(
                    &r,
                    "backend_transitions_total",
                    "Changes of a backend's state.",
                    &["pool", "backend", "transition"],
                ),
                probes: counters(
                    &r,
                    "probes_total",
                    "Probes ended, by result.",
                    &["pool", "backend", "result"],
                ),
                connections_opened: counters(
                    &r,
                    "upstream_connections_opened_total",
                    "Connections made to a backend.",
                    pool_backend,
                ),
                connections_reused: counters(
                    &r,
                    "upstream_connections_reused_total",
                    "Attempts sent on a kept connection.",
                    pool_backend,
                ),
                connections_open: gauges(
                    &r,
                    "upstream_connections_open",
                    "Connections to a backend open now, kept ones included.",
                    pool_backend,
                ),
                healthy: gauges(
                    &r,
                    "backend_healthy",
                    "1 while probes and traffic say it works.",
                    pool_backend,
                ),
                eligible: gauges(
                    &r,
                    "backend_eligible",
                    "1 while it may receive a new attempt.",
                    pool_backend,
                ),
                quarantined: gauges(
                    &r,
                    "backend_quarantined",
                    "1 while it is kept from work because its peers overruled its output.",
                    pool_backend,
                ),
                offences: counters(
                    &r,
                    "offences_total",
                    "Runs of one token that a peer did not repeat.",
                    pool_backend,
                ),
                compressed: counters(
                    &r,
                    "compressed_answers_total",
                    "Answers that came compressed unasked, and cannot be watched or resumed.",
                    pool_backend,
                ),
                model_attempts: counters(
                    &r,
                    "model_attempts_total",
                    "Attempts ended, by model.",
                    &["pool", "backend", "model"],
                ),
                model_faults: counters(
                    &r,
                    "model_faults_total",
                    "Attempts that were the backend's fault, by model.",
                    &["pool", "backend", "model"],
                ),
                model_eligible: gauges(
                    &r,
                    "model_eligible",
                    "1 while the backend may receive attempts for this model.",
                    &["pool", "backend", "model"],
                ),
                reported_running: gauges(
                    &r,
                    "backend_reported_running",
                    "Requests the engine says it works on.",
                    pool_backend,
                ),
                reported_waiting: gauges(
                    &r,
                    "backend_reported_waiting",
                    "Requests the engine says wait in it.",
                    pool_backend,
                ),
                reported_cache_used: float_gauges(
                    &r,
                    "backend_reported_cache_used_ratio",
                    "Share of its KV cache the engine says is in use.",
                    pool_backend,
                ),
                foreign_requests: gauges(
                    &r,
                    "backend_foreign_requests",
                    "Requests in the engine beyond those sent from here.",
                    pool_backend,
                ),
            },
        });
        gauges(&r, "build_info", "Always 1; the label says which version runs.", &["version"])
            .get(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        Self {
            exchanges: Arc::new(ExchangeMetrics {
                started: counter(&r, "requests_started_total", "Requests whose head was read."),
                in_flight: gauges(&r, "requests_in_flight", "Exchanges begun and not ended.", &[]).get(&[]),
                finished: End::ALL.map(|end| families.responses_finished.get(&[end.name()])),
                requests: std::array::from_fn(|_| OnceLock::new()),
                families: Arc::clone(&families),
            }),
            config_generation: gauge(&r, "config_generation", "Number of the configuration in force."),
            config_reloads: counter(&r, "config_reloads_total", "Configurations put into force by a reload."),
            config_reload_failures: counter(
                &r,
                "config_reload_failures_total",
                "Configurations refused; the last good one stayed.",
            ),
            config_errors: gauge(
                &r,
                "config_errors",
                "Errors of the latest configuration read; 0 when it is in force.",
            ),
            memory_held_bytes: gauge(&r, "memory_held_bytes", "Replay bodies, held answers and journals."),
            memory_max_bytes: gauge(&r, "memory_max_bytes", "Bound of memory_held_bytes."),
            access_records_dropped: counter(
                &r,
                "access_records_dropped_total",
                "Access records lost because the log's reader was too slow.",
            ),
            panics: counter(&r, "panics_total", "Panics contained in their exchange or task."),
            draining: gauge(&r, "draining", "1 from the start of a drain."),
            process: ProcessMetrics::new(&r),
            families,
            registry: r,
        }
    }

    /// Handles of a listener, named by its address.
    pub fn listener(&self, listener: &str) -> ListenerMetrics {
        let families = &self.families.listener;
        ListenerMetrics {
            connections: families.connections.get(&[listener]),
            connections_open: families.connections_open.get(&[listener]),
            tls_failures: families.tls_failures.get(&[listener]),
        }
    }

    /// Handles of a pool. The same name gives the same series.
    pub fn pool(&self, pool: &str) -> PoolMetrics {
        let families = &self.families.pool;
        PoolMetrics {
            backends: families.backends.get(&[pool]),
            eligible: families.eligible.get(&[pool]),
            panic_mode: families.panic_mode.get(&[pool]),
            waiting: families.waiting.get(&[pool]),
            queue: Priority::ALL.map(|priority| families.queue.get(&[pool, priority.name()])),
            queue_wait: families.queue_wait.get(&[pool]),
            budget_left: families.budget_left.get(&[pool]),
            budget_empty: families.budget_empty.get(&[pool]),
            pool: pool.to_owned(),
            families: Arc::clone(&self.families),
            budget_said: Quiet::default(),
        }
    }

    /// Handles of a backend. The same names give the same series, those of a retired one new series.
    pub fn backend(&self, pool: &str, backend: &str) -> BackendMetrics {
        let families = &self.families.backend;
        let labels = &[pool, backend];
        BackendMetrics {
            attempts: AttemptOutcome::ALL
                .map(|outcome| families.attempts.get(&[pool, backend, outcome.name()])),
            in_flight: families.in_flight.get(labels),
            cap: families.cap.get(labels),
            first_byte: families.first_byte.get(labels),
            first_token: families.first_token.get(labels),
            duration: families.duration.get(labels),
            probes: ProbeResult::ALL.map(|result| families.probes.get(&[pool, backend, result.name()])),
            connections_opened: families.connections_opened.get(labels),
            connections_reused: families.connections_reused.get(labels),
            connections_open: families.connections_open.get(labels),
            healthy: families.healthy.get(labels),
            eligible: families.eligible.get(labels),
            quarantined: families.quarantined.get(labels),
            offences: families.offences.get(labels),
            compressed: families.compressed.get(labels),
            models: Mutex::default(),
            pool: pool.to_owned(),
            backend: backend.to_owned(),
            retired: AtomicBool::new(false),
            families: Arc::clone(&self.families),
            weak_probe_said: Quiet::default(),
            compressed_said: Quiet::default(),
            misconfigured_said: Quiet::default(),
            probe_not_made_said: Quiet::default(),
            suspected_said: Quiet::default(),
            addresses_said: Quiet::default(),
        }
    }

    /// Removes all series of a backend that a reload took away. Attempts still running there count
    /// into handles nobody reads.
    pub fn retire_backend(&self, gone: &BackendMetrics) {
        let mut models = gone.models.lock();
        gone.retired.store(true, Ordering::Release);
        models.clear();
        self.families.backend.retain(&|labels| !(labels[0] == gone.pool && labels[1] == gone.backend));
    }

    /// Removes all series of a pool and of its backends.
    pub fn retire_pool(&self, pool: &str) {
        self.families.pool.retain(&|labels| labels[0] != pool);
        self.families.backend.retain(&|labels| labels[0] != pool);
    }

    /// Removes the series of a listener.
    pub fn retire_listener(&self, listener: &str) {
        self.families.listener.retain(&|labels| labels[0] != listener);
    }

    /// Tasks of this name that run once per backend.
    pub fn backend_tasks(&self, task: &'static str) -> IntGauge {
        self.families.backend_tasks.get(&[task])
    }

    /// Counts a rejection by its code, the `error.code` the client sees.
    pub fn count_rejection(&self, code: &'static str) {
        self.families.rejected.get(&[code]).inc();
    }

    /// Counts a request refused for ambiguous framing.
    pub fn count_smuggling(&self, kind: &'static str) {
        self.families.smuggling.get(&[kind]).inc();
    }

    /// Counts a configured limit that refused or cut something, by its key (`head_bytes_max`).
    pub fn count_limit(&self, limit: &'static str) {
        self.families.limits.get(&[limit]).inc();
    }

    /// Counts an event; its own `emit` does.
    pub(super) fn count_event(&self, event: &'static str) {
        self.families.events.get(&[event]).inc();
    }

    /// All series in the Prometheus text format. Reads a few files of /proc; not for the hot path.
    pub fn render(&self) -> String {
        self.process.refresh();
        let mut text = String::new();
        // Fails only on an inconsistent family, and then the families before it are still right.
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be rendered whole");
        }
        text
    }
}

/// Requests in, responses out. At rest: started = finished of all ends, and none in flight.
#[derive(Debug)]
pub struct ExchangeMetrics {
    started: IntCounter,
    in_flight: IntGauge,
    finished: [IntCounter; End::ALL.len()],
    /// By endpoint class and status class; made on first use, most never are.
    requests: [OnceLock<IntCounter>; EndpointClass::ALL.len() * STATUS_CLASSES.len()],
    families: Arc<Families>,
}

impl ExchangeMetrics {
    /// Counts a request in, as soon as its head was read. The count goes out with the returned value.
    pub fn start(self: &Arc<Self>) -> ExchangeCount {
        self.started.inc();
        self.in_flight.inc();
        ExchangeCount {
            metrics: Arc::clone(self),
            endpoint: EndpointClass::Other,
            status: STATUS_CLASSES.len() - 1,
            end: None,
        }
    }

    /// Requests counted in.
    pub fn started(&self) -> u64 {
        self.started.get()
    }

    /// Exchanges that ended so.
    pub fn finished(&self, end: End) -> u64 {
        self.finished[end as usize].get()
    }

    /// Exchanges begun and not ended.
    pub fn in_flight(&self) -> i64 {
        self.in_flight.get()
    }

    fn requests(&self, endpoint: EndpointClass, status: usize) -> &IntCounter {
        self.requests[endpoint as usize * STATUS_CLASSES.len() + status]
            .get_or_init(|| self.families.requests.get(&[endpoint.name(), STATUS_CLASSES[status]]))
    }
}

/// One exchange being counted. Dropping it counts the exchange out, once, so that requests in are
/// always responses out plus those in flight: as [`ended`](Self::ended) said where it was called, as cut
/// in a panic, else as left by its client, since hyper drops an exchange's future only then.
#[derive(Debug)]
pub struct ExchangeCount {
    metrics: Arc<ExchangeMetrics>,
    endpoint: EndpointClass,
    status: usize,
    end: Option<End>,
}

impl ExchangeCount {
    /// The kind of API, once known.
    pub fn endpoint(&mut self, endpoint: EndpointClass) {
        self.endpoint = endpoint;
    }

    /// The status sent to the client.
    pub fn status(&mut self, status: StatusCode) {
        self.status = usize::from(status.as_u16() / 100 - 1).min(STATUS_CLASSES.len() - 1);
    }

    /// How it ended; the first word counts.
    pub fn ended(&mut self, end: End) {
        self.end.get_or_insert(end);
    }

    /// How it will be counted if dropped now.
    pub fn end(&self) -> End {
        self.end.unwrap_or(if std::thread::panicking() { End::Cut } else { End::ClientGone })
    }
}

impl Drop for ExchangeCount {
    fn drop(&mut self) {
        self.metrics.requests(self.endpoint, self.status).inc();
        self.metrics.finished[self.end() as usize].inc();
        self.metrics.in_flight.dec();
    }
}

/// Handles of one listener.
#[derive(Clone, Debug)]
pub struct ListenerMetrics {
    /// Connections accepted.
    pub connections: IntCounter,
    /// Open now.
    pub connections_open: IntGauge,
    /// Handshakes that failed.
    pub tls_failures: IntCounter,
}

/// Handles of one pool.
#[derive(Debug)]
pub struct PoolMetrics {
    /// Members.
    pub backends: IntGauge,
    /// Members that may receive a new attempt.
    pub eligible: IntGauge,
    /// 1 while health is ignored.
    pub panic_mode: IntGauge,
    /// Exchanges waiting for a backend.
    pub waiting: IntGauge,
    /// The same by priority, in the order of `Priority::ALL`.
    pub queue: [IntGauge; Priority::ALL.len()],
    /// How long they waited, in seconds.
    pub queue_wait: Histogram,
    /// Retries the budget would grant now.
    pub budget_left: Gauge,
    /// Retries it did not grant.
    pub(super) budget_empty: IntCounter,
    pool: String,
    families: Arc<Families>,
    pub(super) budget_said: Quiet,
}

impl PoolMetrics {
    /// The pool's name.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// Counts an exchange that got no backend: `full`, `timeout`, `busy`, `down`.
    pub fn count_queue_refusal(&self, reason: &'static str) {
        self.families.pool.queue_refused.get(&[&self.pool, reason]).inc();
    }

    /// Counts an attempt after the first by the cause of the one before it.
    pub fn count_retry(&self, reason: &'static str) {
        self.families.pool.retries.get(&[&self.pool, reason]).inc();
    }

    /// Counts a hedge by its result: `won`, `lost`, `refused`.
    pub fn count_hedge(&self, result: &'static str) {
        self.families.pool.hedges.get(&[&self.pool, result]).inc();
    }

    /// Counts a request of this pool that goes to another one, by why.
    pub fn count_fallback(&self, cause: &'static str) {
        self.families.pool.fallbacks.get(&[&self.pool, cause]).inc();
    }

    /// Counts a stream that could not be resumed if it broke, by the reason.
    pub fn count_not_armed(&self, reason: &'static str) {
        self.families.pool.not_armed.get(&[&self.pool, reason]).inc();
    }

    /// Counts a peer that was asked about a run of one token: `repeated`, `replaced`, `disputed`, `none`.
    pub fn count_opinion(&self, result: &'static str) {
        self.families.pool.opinions.get(&[&self.pool, result]).inc();
    }

    /// Counts a stream that was to move, make before break: `moved`, `kept` where the old leg spoke or ended first, or
    /// why it could not.
    pub fn count_move(&self, cause: &'static str, result: &'static str) {
        self.families.pool.moves.get(&[&self.pool, cause, result]).inc();
    }

    /// Counts a broken stream: `resumed`, or why not.
    pub fn count_resume(&self, result: &'static str) {
        self.families.pool.resumes.get(&[&self.pool, result]).inc();
    }
}

/// Handles of one backend. Keep it with the backend, in an `Arc` or by reference.
#[derive(Debug)]
pub struct BackendMetrics {
    attempts: [IntCounter; AttemptOutcome::ALL.len()],
    /// Unfinished attempts.
    pub in_flight: IntGauge,
    /// Most of them, as its refusals have taught; 0 for nothing.
    pub cap: IntGauge,
    first_byte: Histogram,
    first_token: Histogram,
    duration: Histogram,
    probes: [IntCounter; ProbeResult::ALL.len()],
    /// Connections made.
    pub connections_opened: IntCounter,
    /// Attempts sent on a kept connection.
    pub connections_reused: IntCounter,
    /// Connections open now.
    pub connections_open: IntGauge,
    /// 1 while probes and traffic say it works.
    pub healthy: IntGauge,
    /// 1 while it may receive a new attempt.
    pub eligible: IntGauge,
    /// 1 while it is in quarantine.
    pub quarantined: IntGauge,
    /// Runs of one token that a peer did not repeat.
    pub offences: IntCounter,
    pub(super) compressed: IntCounter,
    /// Models with a label, at most [`MODELS_MAX`] and `other`.
    models: Mutex<HashMap<String, Arc<ModelMetrics>>>,
    pool: String,
    backend: String,
    retired: AtomicBool,
    families: Arc<Families>,
    pub(super) weak_probe_said: Quiet,
    pub(super) compressed_said: Quiet,
    pub(super) misconfigured_said: Quiet,
    pub(super) probe_not_made_said: Quiet,
    pub(super) suspected_said: Quiet,
    pub(super) addresses_said: Quiet,
}

impl BackendMetrics {
    /// Name of its pool.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// Its name in the pool.
    pub fn backend(&self) -> &str {
        &self.backend
    }

    /// Counts an attempt that ended, and how long it took. Atomics only.
    pub fn attempt_ended(&self, outcome: AttemptOutcome, lasted: Duration) {
        self.attempts[outcome as usize].inc();
        self.duration.observe(lasted.as_secs_f64());
    }

    /// Attempts that ended so.
    pub fn attempts(&self, outcome: AttemptOutcome) -> u64 {
        self.attempts[outcome as usize].get()
    }

    /// The response head came so long after the attempt's start.
    pub fn first_byte(&self, after: Duration) {
        self.first_byte.observe(after.as_secs_f64());
    }

    /// The first token came so long after the attempt's start.
    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    /// Counts why an attempt did not succeed. Looked up by name: not for the happy path.
    pub fn count_failure(&self, reason: &'static str) {
        self.count(|families| &families.reasons, reason);
    }

    /// Counts one probe.
    pub fn count_probe(&self, result: ProbeResult) {
        self.probes[result as usize].inc();
    }

    /// What the engine said of its load, and how many requests in it are not ours. None when nothing is known (any
    /// more): no series is better than an old number. Looked up by name: not for the hot path.
    pub fn set_reported(&self, reported: Option<(Reported, u32)>) {
        // As in `count`: a late word must not bring the series of a removed backend back.
        let _ordered = self.models.lock();
        let BackendFamilies {
            reported_running, reported_waiting, reported_cache_used, foreign_requests, ..
        } = &self.families.backend;
        let labels = &[self.pool.as_str(), self.backend.as_str()];
        let is_other = |of: &[String]| of != labels;
        let known = reported.filter(|_| !self.retired.load(Ordering::Acquire));
        match known {
            Some((Reported { running, waiting, .. }, foreign)) => {
                reported_running.get(labels).set(i64::from(running));
                reported_waiting.get(labels).set(i64::from(waiting));
                foreign_requests.get(labels).set(i64::from(foreign));
            }
            None => {
                for family in [reported_running, reported_waiting, foreign_requests] {
                    family.retain(&is_other);
                }
            }
        }
        match known.and_then(|(reported, _)| reported.cache_used) {
            Some(used) => reported_cache_used.get(labels).set(used),
            None => reported_cache_used.retain(&is_other),
        }
    }

    pub(super) fn count_ejection(&self, reason: &'static str) {
        self.count(|families| &families.ejections, reason);
    }

    pub(super) fn count_transition(&self, transition: &'static str) {
        self.count(|families| &families.transitions, transition);
    }

    /// Handles of one model here; beyond [`MODELS_MAX`] those of `other`. Resolve once and keep.
    /// Only for models that are configured, listed by the backend, or were once served: the bound
    /// protects memory, not the meaning of the labels.
    pub fn model(&self, model: &str) -> Arc<ModelMetrics> {
        let mut models = self.models.lock();
        if let Some(known) = models.get(model) {
            return Arc::clone(known);
        }
        let label = if models.len() < MODELS_MAX { model } else { MODEL_OTHER };
        if let Some(shared) = models.get(label) {
            return Arc::clone(shared);
        }
        let families = &self.families.backend;
        let labels = &[self.pool.as_str(), self.backend.as_str(), label];
        let made = Arc::new(if self.retired.load(Ordering::Acquire) {
            ModelMetrics::unread()
        } else {
            ModelMetrics {
                attempts: families.model_attempts.get(labels),
                faults: families.model_faults.get(labels),
                eligible: families.model_eligible.get(labels),
            }
        });
        models.insert(label.to_owned(), Arc::clone(&made));
        made
    }

    fn count(&self, family: impl FnOnce(&BackendFamilies) -> &Family<IntCounter>, label: &'static str) {
        // A late word about a removed backend must not bring its series back. The lock orders this
        // against retirement.
        let _ordered = self.models.lock();
        if !self.retired.load(Ordering::Acquire) {
            family(&self.families.backend).get(&[&self.pool, &self.backend, label]).inc();
        }
    }
}

/// Handles of one model at one backend.
#[derive(Debug)]
pub struct ModelMetrics {
    /// Attempts ended.
    pub attempts: IntCounter,
    /// Of these, the backend's fault.
    pub faults: IntCounter,
    /// 1 while the backend may receive attempts for it.
    pub eligible: IntGauge,
}

impl ModelMetrics {
    /// Handles without a series, for a backend that is gone.
    fn unread() -> Self {
        const VALID: &str = "a constant name is valid";
        Self {
            attempts: IntCounter::new("unread", "unread").expect(VALID),
            faults: IntCounter::new("unread", "unread").expect(VALID),
            eligible: IntGauge::new("unread", "unread").expect(VALID),
        }
    }
}

impl BackendFamilies {
    fn retain(&self, keep: &dyn Fn(&[String]) -> bool) {
        let Self {
            attempts,
            reasons,
            in_flight,
            cap,
            first_byte,
            first_token,
            duration,
            ejections,
            transitions,
            probes,
            connections_opened,
            connections_reused,
            connections_open,
            healthy,
            eligible,
            quarantined,
            offences,
            compressed,
            model_attempts,
            model_faults,
            model_eligible,
            reported_running,
            reported_waiting,
            reported_cache_used,
            foreign_requests,
        } = self;
        for family in [
            attempts,
            reasons,
            ejections,
            transitions,
            probes,
            connections_opened,
            connections_reused,
            offences,
            compressed,
            model_attempts,
            model_faults,
        ] {
            family.retain(keep);
        }
        for family in [in_flight, cap, connections_open, healthy, eligible, quarantined, model_eligible] {
            family.retain(keep);
        }
        for family in [reported_running, reported_waiting, foreign_requests] {
            family.retain(keep);
        }
        reported_cache_used.retain(keep);
        for family in [first_byte, first_token, duration] {
            family.retain(keep);
        }
    }
}

impl PoolFamilies {
    fn retain(&self, keep: &dyn Fn(&[String]) -> bool) {
        let Self {
            backends,
            eligible,
            panic_mode,
            waiting,
            queue,
            queue_wait,
            queue_refused,
            retries,
            budget_left,
            budget_empty,
            hedges,
            resumes,
            opinions,
            not_armed,
            moves,
            fallbacks,
        } = self;
        for family in
            [queue_refused, retries, budget_empty, hedges, resumes, opinions, not_armed, moves, fallbacks]
        {
            family.retain(keep);
        }
        for family in [backends, eligible, panic_mode, waiting, queue] {
            family.retain(keep);
        }
        queue_wait.retain(keep);
        budget_left.retain(keep);
    }
}

impl ListenerFamilies {
    fn retain(&self, keep: &dyn Fn(&[String]) -> bool) {
        let Self { connections, connections_open, tls_failures } = self;
        connections.retain(keep);
        connections_open.retain(keep);
        tls_failures.retain(keep);
    }
}

/// What the system says about this process, under the names every dashboard knows.
#[derive(Debug)]
struct ProcessMetrics {
    resident: IntGauge,
    open_files: IntGauge,
    cpu: Gauge,
}

impl ProcessMetrics {
    fn new(registry: &Registry) -> Self {
        let started = IntGauge::new("process_start_time_seconds", "Start, in Unix time.").expect(CONSTANT);
        let since_epoch = crate::clock::wall().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        started.set(i64::try_from(since_epoch.as_secs()).unwrap_or(0));
        let this = Self {
            resident: IntGauge::new("process_resident_memory_bytes", "Resident memory.").expect(CONSTANT),
            open_files: IntGauge::new("process_open_fds", "Open file descriptors.").expect(CONSTANT),
            cpu: Gauge::new("process_cpu_seconds_total", "User and system CPU time.").expect(CONSTANT),
        };
        register(registry, started);
        register(registry, this.resident.clone());
        register(registry, this.open_files.clone());
        register(registry, this.cpu.clone());
        this
    }

    /// What cannot be read (another system, a hidden /proc) stays at its last value.
    fn refresh(&self) {
        /// Clock ticks a second in /proc: fixed by Linux's user ABI.
        const TICKS: f64 = 100.0;
        if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
            let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let kib = kib.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<i64>().ok());
            if let Some(kib) = kib {
                self.resident.set(kib * 1024);
            }
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            self.open_files.set(i64::try_from(files.count()).unwrap_or(i64::MAX));
        }
        if let Ok(stat) = std::fs::read_to_string("/proc/self/stat") {
            // The name in parentheses may hold anything; utime and stime are 12th and 13th after it.
            let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let ticks: f64 =
                after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum();
            self.cpu.set(ticks / TICKS);
        }
    }
}

/// All series of one name. In place of prometheus' own `MetricVec`, which tells label values apart
/// by a hash of their concatenation, so that pool `a` with backend `bc` and pool `ab` with backend
/// `c` would count as one.
#[derive(Clone, Debug)]
struct Family<M>(Arc<FamilyShared<M>>);

#[derive(Debug)]
struct FamilyShared<M> {
    desc: Desc,
    kind: MetricType,
    labels: &'static [&'static str],
    make: fn(Opts) -> prometheus::Result<M>,
    series: RwLock<BTreeMap<Vec<String>, M>>,
}

impl<M: Metric> Family<M> {
    /// The series of these label values, made when missing. Costs a lock and a lookup.
    fn get(&self, values: &[&str]) -> M {
        debug_assert_eq!(values.len(), self.0.labels.len(), "{}", self.0.desc.fq_name);
        let key: Vec<String> = values.iter().map(|&value| value.to_owned()).collect();
        if let Some(found) = self.0.series.read().get(&key) {
            return found.clone();
        }
        let labels = self.0.labels.iter().map(|&name| name.to_owned()).zip(key.iter().cloned()).collect();
        let opts = Opts::new(&self.0.desc.fq_name, &self.0.desc.help).const_labels(labels);
        let made = (self.0.make)(opts).expect(CONSTANT);
        self.0.series.write().entry(key).or_insert(made).clone()
    }

    fn retain(&self, keep: &dyn Fn(&[String]) -> bool) {
        self.0.series.write().retain(|labels, _| keep(labels));
    }
}

impl<M: Metric> Collector for Family<M> {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let series: Vec<_> = self.0.series.read().values().map(Metric::metric).collect();
        if series.is_empty() {
            return Vec::new();
        }
        let mut family = MetricFamily::default();
        family.set_name(self.0.desc.fq_name.clone());
        family.set_help(self.0.desc.help.clone());
        family.set_field_type(self.0.kind);
        family.set_metric(series);
        vec![family]
    }
}

/// What makes `expect` right below: names and label names are constants of this file, each used
/// once, and every test makes them all.
const CONSTANT: &str = "metric names are constant, valid and distinct";

fn family<M: Metric + 'static>(
    registry: &Registry,
    (name, help, labels): (&str, &str, &'static [&'static str]),
    kind: MetricType,
    make: fn(Opts) -> prometheus::Result<M>,
) -> Family<M> {
    let label_names = labels.iter().map(|&label| label.to_owned()).collect();
    let desc = Desc::new(format!("evergate_{name}"), help.to_owned(), label_names, HashMap::new());
    let desc = desc.expect(CONSTANT);
    let family = Family(Arc::new(FamilyShared { desc, kind, labels, make, series: RwLock::default() }));
    register(registry, family.clone());
    family
}

fn register(registry: &Registry, collector: impl Collector + 'static) {
    registry.register(Box::new(collector)).expect(CONSTANT);
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &'static [&'static str],
) -> Family<IntCounter> {
    family(registry, (name, help, labels), MetricType::COUNTER, IntCounter::with_opts)
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &'static [&'static str]) -> Family<IntGauge> {
    family(registry, (name, help, labels), MetricType::GAUGE, IntGauge::with_opts)
}

fn float_gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &'static [&'static str],
) -> Family<Gauge> {
    family(registry, (name, help, labels), MetricType::GAUGE, Gauge::with_opts)
}

fn histograms(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &'static [&'static str],
) -> Family<Histogram> {
    family(registry, (name, help, labels), MetricType::HISTOGRAM, |opts| {
        Histogram::with_opts(HistogramOpts::from(opts).buckets(SECONDS_BUCKETS.to_vec()))
    })
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    counters(registry, name, help, &[]).get(&[])
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    gauges(registry, name, help, &[]).get(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_in_are_responses_out_plus_in_flight() {
        let metrics = Metrics::new();
        let exchanges = &metrics.exchanges;
        let out = || End::ALL.iter().map(|&end| exchanges.finished(end)).sum::<u64>();
        let mut live: Vec<_> = (0..5).map(|_| exchanges.start()).collect();
        assert_eq!((exchanges.started(), out(), exchanges.in_flight()), (5, 0, 5));

        let mut complete = live.remove(0);
        complete.endpoint(EndpointClass::Chat);
        complete.status(StatusCode::OK);
        complete.ended(End::Complete);
        complete.ended(End::Cut);
        drop(complete);
        drop(live.remove(0));
        let panicking = live.remove(0);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _counted = panicking;
            std::panic::resume_unwind(Box::new("contained"));
        }));
        assert!(caught.is_err());

        assert_eq!((exchanges.started(), out(), exchanges.in_flight()), (5, 3, 2));
        assert_eq!(exchanges.finished(End::Complete), 1);
        assert_eq!(exchanges.finished(End::ClientGone), 1);
        assert_eq!(exchanges.finished(End::Cut), 1);
        let text = metrics.render();
        assert!(text.contains(r#"evergate_requests_total{endpoint="chat",status="2xx"} 1"#), "{text}");
        assert!(text.contains(r#"evergate_requests_total{endpoint="other",status="none"} 2"#), "{text}");
        assert!(text.contains("evergate_requests_in_flight 2"), "{text}");
    }

    #[test]
    fn outcomes_are_counted_under_their_own_names() {
        let metrics = Metrics::new();
        let backend = metrics.backend("llama", "gpu-1");
        for (nth, outcome) in AttemptOutcome::ALL.into_iter().enumerate() {
            for _ in 0..=nth {
                backend.attempt_ended(outcome, Duration::from_millis(3));
            }
        }
        backend.count_failure("connect_refused");
        for result in ProbeResult::ALL {
            backend.count_probe(result);
        }
        let text = metrics.render();
        for (nth, outcome) in AttemptOutcome::ALL.into_iter().enumerate() {
            let name = outcome.name();
            let line = format!(
                r#"evergate_attempts_total{{backend="gpu-1",outcome="{name}",pool="llama"}} {}"#,
                nth + 1
            );
            assert!(text.contains(&line), "{line} in {text}");
        }
        assert!(text.contains(
            r#"evergate_attempt_failures_total{backend="gpu-1",pool="llama",reason="connect_refused"} 1"#
        ));
        assert!(text.contains(r#"evergate_probes_total{backend="gpu-1",pool="llama",result="weak_pass"} 1"#));
        assert!(text.contains(r#"evergate_attempt_duration_seconds_count{backend="gpu-1",pool="llama"} 45"#));
    }

    #[test]
    fn names_that_concatenate_alike_are_told_apart() {
        let metrics = Metrics::new();
        metrics.backend("a", "bc").in_flight.set(1);
        metrics.backend("ab", "c").in_flight.set(2);
        let text = metrics.render();
        assert!(text.contains(r#"evergate_attempts_in_flight{backend="bc",pool="a"} 1"#), "{text}");
        assert!(text.contains(r#"evergate_attempts_in_flight{backend="c",pool="ab"} 2"#), "{text}");
    }

    #[test]
    fn series_of_a_removed_backend_go_and_do_not_come_back() {
        let metrics = Metrics::new();
        let gone = metrics.backend("llama", "gpu-1");
        let stays = metrics.backend("llama", "gpu-2");
        for backend in [&gone, &stays] {
            backend.count_failure("reset");
            backend.count_transition("ejected");
            backend.model("m").attempts.inc();
        }
        metrics.retire_backend(&gone);
        gone.attempt_ended(AttemptOutcome::Fault, Duration::ZERO);
        gone.count_failure("reset");
        gone.count_ejection("stuck");
        gone.model("m").attempts.inc();
        gone.model("another").attempts.inc();
        let text = metrics.render();
        assert!(!text.contains("gpu-1"), "{text}");
        assert!(text.contains("gpu-2"));

        metrics.pool("llama").count_retry("reset");
        metrics.retire_pool("llama");
        assert!(!metrics.render().contains("llama"));
    }

    #[test]
    fn a_backend_that_returns_starts_new_series() {
        let metrics = Metrics::new();
        let first = metrics.backend("p", "b");
        first.attempt_ended(AttemptOutcome::Success, Duration::ZERO);
        assert_eq!(metrics.backend("p", "b").attempts(AttemptOutcome::Success), 1, "same names, same series");
        metrics.retire_backend(&first);
        assert_eq!(metrics.backend("p", "b").attempts(AttemptOutcome::Success), 0);
    }

    #[test]
    fn models_beyond_the_bound_share_one_label() {
        let metrics = Metrics::new();
        let backend = metrics.backend("p", "b");
        for nth in 0..MODELS_MAX + 500 {
            backend.model(&format!("model-{nth}")).attempts.inc();
        }
        backend.model("model-0").attempts.inc();
        let text = metrics.render();
        let series = text.lines().filter(|line| line.starts_with("evergate_model_attempts_total{")).count();
        assert_eq!(series, MODELS_MAX + 1);
        assert!(text.contains(r#"model="other",pool="p"} 500"#), "{text}");
        assert!(text.contains(r#"model="model-0",pool="p"} 2"#));
    }

    #[test]
    fn every_series_is_named_by_the_house_rule() {
        let metrics = Metrics::new();
        metrics.listener("127.0.0.1:8080").connections.inc();
        let pool = metrics.pool("p");
        pool.count_retry("busy");
        pool.count_hedge("won");
        pool.count_resume("resumed");
        pool.count_opinion("repeated");
        pool.count_move("drain", "moved");
        let backend = metrics.backend("p", "b");
        backend.count_failure("reset");
        backend.count_ejection("stuck");
        backend.count_transition("ejected");
        backend.model("m");
        metrics.count_rejection("no_backend");
        metrics.count_smuggling("cl_te");
        metrics.count_limit("head_bytes_max");
        metrics.count_event("drain_started");
        let text = metrics.render();
        for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
            let mut words = line.split(' ').skip(2);
            let (name, kind) = (words.next().unwrap(), words.next().unwrap());
            assert!(name.starts_with("evergate_") || name.starts_with("process_"), "{name}");
            if name.starts_with("evergate_") {
                assert_eq!(name.ends_with("_total"), kind == "counter", "{name} {kind}");
            }
            assert_eq!(
                name.ends_with("_seconds") && name.starts_with("evergate_"),
                kind == "histogram",
                "{name}"
            );
        }
        assert!(text.contains("process_resident_memory_bytes "));
        assert!(text.contains(r#"evergate_limits_bitten_total{limit="head_bytes_max"} 1"#));
    }

    #[test]
    fn two_registries_do_not_share_counts() {
        let (one, other) = (Metrics::new(), Metrics::new());
        one.panics.inc();
        assert_eq!(other.panics.get(), 0);
    }
}
