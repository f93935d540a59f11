//! Notable transitions: each is a type, and emitting it logs once, counts once and remembers it.
//!
//! The latest [`EVENTS_KEPT`] are kept for `/status` and the demo's live view, which may also
//! subscribe. Rare by design: what happens per request is a metric or an access record. Where a sick
//! backend could make an event per request, a `Quiet` lets it speak now and then and the count
//! goes on. Nothing here decides; the reasons come from the policies.

use std::collections::VecDeque;
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::{Serialize, Serializer};
use tokio::sync::broadcast;

use super::access_log::push_time;
use super::metrics::{BackendMetrics, PoolMetrics, ProbeResult};
use super::{Metrics, Telemetry};
use crate::clock;

/// Events remembered. An hour of a bad day, and a page of a status view.
pub const EVENTS_KEPT: usize = 256;

/// Events a subscriber may lag behind before it misses some.
pub const EVENTS_QUEUED_MAX: usize = 256;

/// Longest text of an event; the rest is cut. Names and reasons are short, error lists are not.
pub const EVENT_TEXT_MAX: usize = 4096;

/// Least time between two log lines of an event that a sick backend repeats per request.
pub const REPEAT_PAUSE: Duration = Duration::from_secs(10);

/// How much an event matters to whoever is on call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As intended.
    Info,
    /// evergate coped; somebody should look.
    Warn,
    /// Something was lost or refused.
    Error,
}

/// One event as remembered and sent to subscribers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EventRecord {
    /// Counts from 1 without gaps: a reader who misses numbers lagged.
    pub number: u64,
    /// When.
    #[serde(serialize_with = "as_rfc3339")]
    pub time: SystemTime,
    /// How bad.
    pub severity: Severity,
    /// Its type: `backend_transition`, `reload_applied`, …
    pub event: &'static str,
    /// Pool concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Backend concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Model concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Its name for machines: the transition's, the probe's result, the limit's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'static str>,
    /// One line for people.
    pub text: String,
}

fn as_rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&rfc3339(*time))
}

/// `2026-01-31T08:15:30.123Z`: how every time is written in what evergate tells.
pub fn rfc3339(time: SystemTime) -> String {
    let mut text = Vec::new();
    push_time(&mut text, time);
    String::from_utf8_lossy(&text).into_owned()
}

/// The latest events, and those who listen.
#[derive(Debug)]
pub struct EventLog {
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<EventRecord>>,
}

#[derive(Debug, Default)]
struct Kept {
    number: u64,
    latest: VecDeque<Arc<EventRecord>>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self::new()
    }
}

impl EventLog {
    /// Without events.
    pub fn new() -> Self {
        Self { kept: Mutex::default(), live: broadcast::Sender::new(EVENTS_QUEUED_MAX) }
    }

    /// The latest events, oldest first.
    pub fn latest(&self) -> Vec<Arc<EventRecord>> {
        self.kept.lock().latest.iter().cloned().collect()
    }

    /// Events from now on. A subscriber more than [`EVENTS_QUEUED_MAX`] behind is told how many it
    /// missed; it never holds up whoever emits.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<EventRecord>> {
        self.live.subscribe()
    }

    fn keep(&self, make: impl FnOnce(u64) -> EventRecord) {
        let mut kept = self.kept.lock();
        kept.number += 1;
        let record = Arc::new(make(kept.number));
        if kept.latest.len() == EVENTS_KEPT {
            kept.latest.pop_front();
        }
        kept.latest.push_back(Arc::clone(&record));
        // Sent under the lock so that subscribers see the numbers in order; no receiver is no error.
        let _no_receiver = self.live.send(record);
    }
}

/// Lets a repeated event speak at most once in a while.
#[derive(Debug)]
pub(super) struct Quiet(AtomicU64);

impl Default for Quiet {
    fn default() -> Self {
        Self(AtomicU64::new(u64::MAX))
    }
}

impl Quiet {
    /// True for one caller in every `pause`; the first one always.
    fn may_speak(&self, pause: Duration) -> bool {
        let now = clock::now().as_micros();
        let pause = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        let last = self.0.load(Ordering::Relaxed);
        let due = last == u64::MAX || now.saturating_sub(last) >= pause;
        due && self.0.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// What all events have in common on their way out.
struct Notice<'a> {
    severity: Severity,
    event: &'static str,
    pool: Option<&'a str>,
    backend: Option<&'a str>,
    model: Option<&'a str>,
    name: Option<&'static str>,
}

impl<'a> Notice<'a> {
    fn new(severity: Severity, event: &'static str) -> Self {
        Self { severity, event, pool: None, backend: None, model: None, name: None }
    }

    fn at(mut self, backend: &'a BackendMetrics) -> Self {
        self.pool = Some(backend.pool());
        self.backend = Some(backend.backend());
        self
    }

    fn named(mut self, name: &'static str) -> Self {
        self.name = Some(name);
        self
    }

    /// Counts, logs, remembers.
    fn tell(self, telemetry: &Telemetry, text: &dyn Display) {
        self.count(&telemetry.metrics);
        self.speak(&telemetry.events, text);
    }

    fn count(&self, metrics: &Metrics) {
        metrics.count_event(self.event);
    }

    fn speak(self, events: &EventLog, text: &dyn Display) {
        let Self { severity, event, pool, backend, model, name } = self;
        let mut text = text.to_string();
        text.truncate(text.floor_char_boundary(EVENT_TEXT_MAX));
        match severity {
            Severity::Info => tracing::info!(event, name, pool, backend, model, "{text}"),
            Severity::Warn => tracing::warn!(event, name, pool, backend, model, "{text}"),
            Severity::Error => tracing::error!(event, name, pool, backend, model, "{text}"),
        }
        events.keep(|number| EventRecord {
            number,
            time: clock::wall(),
            severity,
            event,
            pool: pool.map(str::to_owned),
            backend: backend.map(str::to_owned),
            model: model.map(str::to_owned),
            name,
            text,
        });
    }
}

/// The state of a backend, or of one model on it, changed.
#[derive(Clone, Copy)]
pub struct BackendTransition<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// The model it is about, where one address serves several.
    pub model: Option<&'a str>,
    /// The transition's name for labels: `ejected`, `readmitted`, …
    pub name: &'static str,
    /// The transition for people, its reason included.
    pub transition: &'a dyn Display,
    /// The reason's name, when this transition is an ejection: counted apart.
    pub ejected_for: Option<&'static str>,
    /// Whether it takes the backend out of use, or should worry for another reason.
    pub worse: bool,
}

impl BackendTransition<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        self.at.count_transition(self.name);
        if let Some(reason) = self.ejected_for {
            self.at.count_ejection(reason);
        }
        let severity = if self.worse { Severity::Warn } else { Severity::Info };
        let mut notice = Notice::new(severity, "backend_transition").at(self.at).named(self.name);
        notice.model = self.model;
        notice.tell(telemetry, self.transition);
    }
}

/// The result of a backend's probes changed. Each single probe is counted by
/// [`BackendMetrics::count_probe`].
#[derive(Clone, Copy)]
pub struct ProbeChanged<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// The new result.
    pub result: ProbeResult,
    /// What the probe saw: `503`, `connection refused`, `no answer in 1 s`.
    pub saw: &'a dyn Display,
}

impl ProbeChanged<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        let severity = match self.result {
            ProbeResult::Pass | ProbeResult::WeakPass => Severity::Info,
            ProbeResult::Fail | ProbeResult::Refusing => Severity::Warn,
        };
        let name = self.result.name();
        Notice::new(severity, "probe_changed")
            .at(self.at)
            .named(name)
            .tell(telemetry, &format_args!("probe now {name}: {}", self.saw));
    }
}

/// A probe passes by an answer that proves little (a 404 on the guessed path). Said once a backend.
#[derive(Clone, Copy)]
pub struct WeakProbe<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// What the probe saw.
    pub saw: &'a dyn Display,
}

impl WeakProbe<'_> {
    /// Logs, counts and remembers the first time only.
    pub fn emit(&self, telemetry: &Telemetry) {
        if self.at.weak_probe_said.may_speak(Duration::MAX) {
            Notice::new(Severity::Warn, "weak_probe").at(self.at).tell(
                telemetry,
                &format_args!("the probe passes weakly ({}): set probe.path to one the server has", self.saw),
            );
        }
    }
}

/// A probe could not be made for want of something on this machine (descriptors, ports, memory). It says
/// nothing about the backend. Logged at most every [`REPEAT_PAUSE`] a backend, counted always.
#[derive(Clone, Copy)]
pub struct ProbeNotMade<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// What was wanting.
    pub saw: &'a dyn Display,
}

impl ProbeNotMade<'_> {
    /// Counts; logs and remembers now and then.
    pub fn emit(&self, telemetry: &Telemetry) {
        let notice = Notice::new(Severity::Error, "probe_not_made").at(self.at);
        notice.count(&telemetry.metrics);
        if self.at.probe_not_made_said.may_speak(REPEAT_PAUSE) {
            notice.speak(&telemetry.events, &format_args!("no probe could be made: {}", self.saw));
        }
    }
}

/// Work of a backend is late, and it shows no sign of life. Logged at most every [`REPEAT_PAUSE`] a backend, counted
/// always: a stream may think for longer than is usual, time and again.
#[derive(Clone, Copy)]
pub struct BackendSuspected<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// Since its latest sign of life.
    pub silent: Duration,
    /// Attempts that are late.
    pub late: usize,
}

impl BackendSuspected<'_> {
    /// Counts; logs and remembers now and then.
    pub fn emit(&self, telemetry: &Telemetry) {
        let notice = Notice::new(Severity::Info, "backend_suspected").at(self.at);
        notice.count(&telemetry.metrics);
        if self.at.suspected_said.may_speak(REPEAT_PAUSE) {
            let (silent, late) = (self.silent, self.late);
            let text = format_args!("silent for {silent:.1?} while work of it is late ({late}): it is asked");
            notice.speak(&telemetry.events, &text);
        }
    }
}

/// A backend lists other models than before.
#[derive(Clone, Copy)]
pub struct ModelsChanged<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// Their ids; empty when it lists none any more.
    pub ids: &'a [String],
}

impl ModelsChanged<'_> {
    /// Ids told by name; the rest is a number.
    const TOLD_MAX: usize = 8;

    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        let told = self.ids.len().min(Self::TOLD_MAX);
        let mut text = match self.ids {
            [] => "lists no models".to_owned(),
            ids => format!("lists {}", ids[..told].join(", ")),
        };
        if self.ids.len() > told {
            text += &format!(" and {} more", self.ids.len() - told);
        }
        Notice::new(Severity::Info, "models_changed").at(self.at).tell(telemetry, &text);
    }
}

/// The name of a backend has other addresses than before. Logged at most every [`REPEAT_PAUSE`] a backend,
/// counted always: some names answer with another part of their addresses each time.
#[derive(Clone, Copy)]
pub struct AddressesChanged<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// All it has now.
    pub addresses: &'a [SocketAddr],
}

impl AddressesChanged<'_> {
    /// Counts; logs and remembers now and then.
    pub fn emit(&self, telemetry: &Telemetry) {
        let notice = Notice::new(Severity::Info, "addresses_changed").at(self.at);
        notice.count(&telemetry.metrics);
        if self.at.addresses_said.may_speak(REPEAT_PAUSE) {
            let addresses = self.addresses;
            notice.speak(&telemetry.events, &format_args!("its name now stands for {addresses:?}"));
        }
    }
}

/// The name of a backend can no longer be looked up. Emitted once, until it can be again.
#[derive(Clone, Copy)]
pub struct LookupFailed<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// What the name service said.
    pub saw: &'a dyn Display,
    /// Whether addresses of an earlier answer stay in use.
    pub kept: bool,
}

impl LookupFailed<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        let (severity, so) = match self.kept {
            true => (Severity::Warn, "the last known addresses stay in use"),
            false => (Severity::Error, "it has no address"),
        };
        Notice::new(severity, "lookup_failed")
            .at(self.at)
            .tell(telemetry, &format_args!("its name cannot be looked up, {so}: {}", self.saw));
    }
}

/// The name of a backend can be looked up again.
#[derive(Clone, Copy)]
pub struct LookupRecovered<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
}

impl LookupRecovered<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        Notice::new(Severity::Info, "lookup_recovered")
            .at(self.at)
            .tell(telemetry, &"its name can be looked up again");
    }
}

/// A backend refuses our credentials or does not know a model its peers serve. Logged at most every
/// [`REPEAT_PAUSE`] a backend, counted always.
#[derive(Clone, Copy)]
pub struct MisconfiguredBackend<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// The model asked for.
    pub model: Option<&'a str>,
    /// What it answered.
    pub saw: &'a dyn Display,
}

impl MisconfiguredBackend<'_> {
    /// Counts; logs and remembers now and then.
    pub fn emit(&self, telemetry: &Telemetry) {
        let mut notice = Notice::new(Severity::Error, "misconfigured_backend").at(self.at);
        notice.model = self.model;
        notice.count(&telemetry.metrics);
        if self.at.misconfigured_said.may_speak(REPEAT_PAUSE) {
            notice.speak(&telemetry.events, &format_args!("misconfigured: {}", self.saw));
        }
    }
}

/// A backend compressed an answer unasked: it is relayed, but cannot be watched or resumed. Logged
/// at most every [`REPEAT_PAUSE`] a backend, counted always.
#[derive(Clone, Copy)]
pub struct CompressedAnswer<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// Its `content-encoding`.
    pub encoding: &'a dyn Display,
}

impl CompressedAnswer<'_> {
    /// Counts; logs and remembers now and then.
    pub fn emit(&self, telemetry: &Telemetry) {
        self.at.compressed.inc();
        let notice = Notice::new(Severity::Warn, "compressed_answer").at(self.at);
        notice.count(&telemetry.metrics);
        if self.at.compressed_said.may_speak(REPEAT_PAUSE) {
            let encoding = self.encoding;
            notice.speak(
                &telemetry.events,
                &format_args!("answers come {encoding}-compressed unasked: relayed, but not protected"),
            );
        }
    }
}

/// The retry budget of a pool was empty: a first failure became the answer. Logged at most every
/// [`REPEAT_PAUSE`] a pool, counted always.
#[derive(Clone, Copy)]
pub struct BudgetEmpty<'a> {
    /// Where.
    pub at: &'a PoolMetrics,
}

impl BudgetEmpty<'_> {
    /// Counts; logs and remembers now and then.
    pub fn emit(&self, telemetry: &Telemetry) {
        self.at.budget_empty.inc();
        let mut notice = Notice::new(Severity::Warn, "budget_empty");
        notice.pool = Some(self.at.pool());
        notice.count(&telemetry.metrics);
        if self.at.budget_said.may_speak(REPEAT_PAUSE) {
            notice.speak(&telemetry.events, &"retry budget empty: failures are answered, not retried");
        }
    }
}

/// A request was blamed for the deaths of backends: it is answered with an error, and kept apart when it
/// comes again.
#[derive(Clone, Copy)]
pub struct RequestKills<'a> {
    /// Where.
    pub at: &'a PoolMetrics,
    /// Its `x-request-id`.
    pub request_id: &'a str,
    /// The backends.
    pub backends: &'a str,
}

impl RequestKills<'_> {
    /// Logs, counts, remembers. Each costs two replicas, so there are not many.
    pub fn emit(&self, telemetry: &Telemetry) {
        let mut notice = Notice::new(Severity::Error, "request_kills_backends");
        notice.pool = Some(self.at.pool());
        notice.count(&telemetry.metrics);
        let text = format_args!("request {} killed {}", self.request_id, self.backends);
        notice.speak(&telemetry.events, &text);
    }
}

/// A broken stream goes on at another backend: it has given the client something new.
#[derive(Clone, Copy)]
pub struct StreamResumed<'a> {
    /// Where it goes on.
    pub at: &'a BackendMetrics,
    /// Its `x-request-id`.
    pub request_id: &'a str,
    /// Where it broke.
    pub from: &'a str,
    /// How.
    pub cause: &'static str,
    /// `text`, `replay`, …
    pub strategy: &'static str,
    /// From the last event of the old leg to the first of the new one.
    pub gap: Duration,
}

impl StreamResumed<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        let Self { request_id, from, cause, strategy, gap, .. } = *self;
        Notice::new(Severity::Info, "stream_resumed").at(self.at).named(strategy).tell(
            telemetry,
            &format_args!("{request_id} goes on after {gap:.1?} by {strategy}: it left {from} ({cause})"),
        );
    }
}

/// A backend said one token over and over, and a peer said something else.
#[derive(Clone, Copy)]
pub struct OutputDisputed<'a> {
    /// The backend.
    pub at: &'a BackendMetrics,
    /// The request's `x-request-id`.
    pub request_id: &'a str,
    /// Who was asked.
    pub peer: &'a str,
    /// Whether the client got the peer's answer.
    pub replaced: bool,
}

impl OutputDisputed<'_> {
    /// Logs, counts, remembers. A few, then the backend is quarantined.
    pub fn emit(&self, telemetry: &Telemetry) {
        let Self { request_id, peer, replaced, .. } = *self;
        let name = if replaced { "replaced" } else { "disputed" };
        let whose = if replaced { "the client gets that" } else { "too late for the client" };
        Notice::new(Severity::Warn, "output_disputed").at(self.at).named(name).tell(
            telemetry,
            &format_args!("{request_id}: it repeats one token, {peer} says something else; {whose}"),
        );
    }
}

/// A new configuration is in force.
#[derive(Clone, Copy)]
pub struct ReloadApplied<'a> {
    /// Its number; 1 is the one evergate started with.
    pub generation: u64,
    /// What it changes, for people.
    pub changes: &'a dyn Display,
}

impl ReloadApplied<'_> {
    /// Logs, counts, remembers; sets the gauges.
    pub fn emit(&self, telemetry: &Telemetry) {
        let metrics = &telemetry.metrics;
        metrics.config_reloads.inc();
        metrics.config_errors.set(0);
        metrics.config_generation.set(i64::try_from(self.generation).unwrap_or(i64::MAX));
        let (generation, changes) = (self.generation, self.changes);
        Notice::new(Severity::Info, "reload_applied")
            .tell(telemetry, &format_args!("configuration {generation} in force: {changes}"));
    }
}

/// A configuration was refused; the last good one stays in force.
#[derive(Clone, Copy)]
pub struct ReloadRefused<'a> {
    /// How many errors.
    pub errors: usize,
    /// All of them, for people.
    pub report: &'a dyn Display,
}

impl ReloadRefused<'_> {
    /// Logs, counts, remembers; sets the gauge.
    pub fn emit(&self, telemetry: &Telemetry) {
        let metrics = &telemetry.metrics;
        metrics.config_reload_failures.inc();
        metrics.config_errors.set(i64::try_from(self.errors).unwrap_or(i64::MAX));
        let (errors, report) = (self.errors, self.report);
        let s = if errors == 1 { "" } else { "s" };
        Notice::new(Severity::Error, "reload_refused").tell(
            telemetry,
            &format_args!("configuration refused, the last good one stays ({errors} error{s}): {report}"),
        );
    }
}

/// A configuration was read that says what is in force already.
#[derive(Clone, Copy)]
pub struct ReloadUnchanged<'a> {
    /// The generation that stays.
    pub generation: u64,
    /// What would need a restart; may be empty.
    pub waiting: &'a dyn Display,
}

impl ReloadUnchanged<'_> {
    /// Logs, counts, remembers; sets the gauge: a refused file that was put right is no error any more.
    pub fn emit(&self, telemetry: &Telemetry) {
        telemetry.metrics.config_errors.set(0);
        let (generation, waiting) = (self.generation, self.waiting);
        Notice::new(Severity::Info, "reload_unchanged")
            .tell(telemetry, &format_args!("configuration {generation} stays: nothing to change{waiting}"));
    }
}

/// An operator changed the administrative state of a backend.
#[derive(Clone, Copy)]
pub struct AdminChange<'a> {
    /// Where.
    pub at: &'a BackendMetrics,
    /// The new state: `enabled`, `draining`, `disabled`.
    pub state: &'static str,
    /// Who or what asked: an address, `configuration`.
    pub by: &'a dyn Display,
}

impl AdminChange<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        Notice::new(Severity::Info, "admin_change")
            .at(self.at)
            .named(self.state)
            .tell(telemetry, &format_args!("{} by {}", self.state, self.by));
    }
}

/// A listener accepts connections.
#[derive(Clone, Copy)]
pub struct ListenerStarted {
    /// The address it really has.
    pub address: SocketAddr,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// What for: `clients`, `admin`.
    pub role: &'static str,
}

impl ListenerStarted {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        let Self { address, tls, role } = self;
        let tls = if *tls { " with TLS" } else { "" };
        Notice::new(Severity::Info, "listener_started")
            .named(role)
            .tell(telemetry, &format_args!("listening for {role} on {address}{tls}"));
    }
}

/// The process takes no new connections and finishes what runs.
#[derive(Clone, Copy)]
pub struct DrainStarted<'a> {
    /// What asked for it: a signal, the successor, the operator.
    pub by: &'a dyn Display,
    /// Connections and exchanges to wait for.
    pub running: usize,
    /// How long at most.
    pub deadline: Duration,
}

impl DrainStarted<'_> {
    /// Logs, counts, remembers; sets the gauge.
    pub fn emit(&self, telemetry: &Telemetry) {
        telemetry.metrics.draining.set(1);
        let Self { by, running, deadline } = self;
        Notice::new(Severity::Info, "drain_started")
            .tell(telemetry, &format_args!("draining by {by}: {running} to finish within {deadline:?}"));
    }
}

/// A drain came to its end.
#[derive(Clone, Copy)]
pub struct DrainFinished {
    /// Connections and exchanges that were cut.
    pub left: usize,
}

impl DrainFinished {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        match self.left {
            0 => Notice::new(Severity::Info, "drain_finished").tell(telemetry, &"drained: nothing was cut"),
            left => Notice::new(Severity::Warn, "drain_finished")
                .tell(telemetry, &format_args!("drained: {left} unfinished were cut")),
        }
    }
}

/// What a panic said, from what catching it gave.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// A panic was contained. A defect of evergate's: please report it.
#[derive(Clone, Copy)]
pub struct PanicCaught<'a> {
    /// In which task or exchange.
    pub task: &'a dyn Display,
    /// What it said.
    pub message: &'a dyn Display,
}

impl PanicCaught<'_> {
    /// Logs, counts, remembers.
    pub fn emit(&self, telemetry: &Telemetry) {
        telemetry.metrics.panics.inc();
        Notice::new(Severity::Error, "panic_caught")
            .tell(telemetry, &format_args!("panic contained in {}: {}", self.task, self.message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(by: &'static &'static str) -> DrainStarted<'static> {
        DrainStarted { by, running: 3, deadline: Duration::from_secs(30) }
    }

    #[test]
    fn an_event_is_counted_and_remembered_once() {
        let telemetry = Telemetry::silent();
        let backend = telemetry.metrics.backend("llama", "gpu-1");
        BackendTransition {
            at: &backend,
            model: Some("m"),
            name: "ejected",
            transition: &"ejected for 1s: 3 consecutive faults",
            ejected_for: Some("consecutive_faults"),
            worse: true,
        }
        .emit(&telemetry);
        let events = telemetry.events.latest();
        assert_eq!(events.len(), 1);
        let event = serde_json::to_value(&*events[0]).unwrap();
        assert_eq!(event["number"], 1);
        assert_eq!(event["severity"], "warn");
        assert_eq!(event["event"], "backend_transition");
        assert_eq!(
            (&event["pool"], &event["backend"], &event["model"]),
            (&"llama".into(), &"gpu-1".into(), &"m".into())
        );
        assert_eq!(event["name"], "ejected");
        assert!(event["time"].as_str().unwrap().ends_with('Z'));
        let text = telemetry.metrics.render();
        for line in [
            r#"evergate_events_total{event="backend_transition"} 1"#,
            r#"evergate_backend_transitions_total{backend="gpu-1",pool="llama",transition="ejected"} 1"#,
            r#"evergate_ejections_total{backend="gpu-1",pool="llama",reason="consecutive_faults"} 1"#,
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn only_the_latest_events_are_kept() {
        let telemetry = Telemetry::silent();
        for _ in 0..EVENTS_KEPT + 10 {
            drain(&"a test").emit(&telemetry);
        }
        let numbers: Vec<_> = telemetry.events.latest().iter().map(|event| event.number).collect();
        assert_eq!(numbers, (11..=EVENTS_KEPT as u64 + 10).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_subscriber_sees_events_in_order_and_is_told_when_it_lags() {
        let telemetry = Telemetry::silent();
        let mut live = telemetry.events.subscribe();
        drain(&"one").emit(&telemetry);
        DrainFinished { left: 0 }.emit(&telemetry);
        assert_eq!(live.recv().await.unwrap().event, "drain_started");
        assert_eq!(live.recv().await.unwrap().event, "drain_finished");
        for _ in 0..EVENTS_QUEUED_MAX * 2 {
            drain(&"many").emit(&telemetry);
        }
        assert!(matches!(live.recv().await, Err(broadcast::error::RecvError::Lagged(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_repeated_per_request_is_told_now_and_then_and_counted_always() {
        let telemetry = Telemetry::silent();
        let pool = telemetry.metrics.pool("llama");
        for _ in 0..100 {
            BudgetEmpty { at: &pool }.emit(&telemetry);
        }
        assert_eq!(telemetry.events.latest().len(), 1);
        tokio::time::advance(REPEAT_PAUSE).await;
        BudgetEmpty { at: &pool }.emit(&telemetry);
        assert_eq!(telemetry.events.latest().len(), 2);
        let text = telemetry.metrics.render();
        assert!(text.contains(r#"evergate_retry_budget_empty_total{pool="llama"} 101"#), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_weak_probe_is_warned_of_once_a_backend() {
        let telemetry = Telemetry::silent();
        let backends = [telemetry.metrics.backend("p", "a"), telemetry.metrics.backend("p", "b")];
        for _ in 0..3 {
            for at in &backends {
                WeakProbe { at, saw: &"404" }.emit(&telemetry);
            }
            tokio::time::advance(Duration::from_secs(3600)).await;
        }
        assert_eq!(telemetry.events.latest().len(), 2);
    }

    #[test]
    fn reloads_set_the_gauges_operators_alert_on() {
        let telemetry = Telemetry::silent();
        let errors = || telemetry.metrics.config_errors.get();
        ReloadRefused { errors: 2, report: &"line 3: …" }.emit(&telemetry);
        assert_eq!((errors(), telemetry.metrics.config_reload_failures.get()), (2, 1));
        ReloadApplied { generation: 2, changes: &"1 backend added" }.emit(&telemetry);
        assert_eq!((errors(), telemetry.metrics.config_generation.get()), (0, 2));
    }

    #[test]
    fn a_long_text_is_cut() {
        let telemetry = Telemetry::silent();
        ReloadRefused { errors: 1, report: &"é".repeat(EVENT_TEXT_MAX) }.emit(&telemetry);
        let length = telemetry.events.latest()[0].text.len();
        assert!(length <= EVENT_TEXT_MAX && length > EVENT_TEXT_MAX - 4, "{length}");
    }
}
