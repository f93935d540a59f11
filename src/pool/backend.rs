//! What is known about one replica for as long as it is configured, whatever else is reloaded.
//!
//! Written from everywhere, so: counters are atomics, a judge is behind its own short lock, and
//! the judge's ordinary answer ("fully eligible") is published as one flag, so that choosing a
//! backend takes no lock while nothing is wrong.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use crate::clock;
use crate::policy::Moment;
use crate::policy::admission::Cap;
use crate::policy::balance::{Ewma, RecentFailures, stable_hash};
use crate::policy::health::{
    Administrative, Arrival, Health, HealthPolicy, Observation, Peers, ProbeVerdict, Standing, Transition,
};
use crate::policy::poison::{self, Breaks};
use crate::policy::progress::Verified;
use crate::pool::identity::Trust;
use crate::pool::in_flight::List;
use crate::pool::load::Foreign;
use crate::pool::pick::Class;
use crate::pool::quarantine::Belief;
use crate::pool::signs::Signs;
use crate::telemetry::metrics::{BackendMetrics, MODEL_OTHER, MODELS_MAX, ModelMetrics};
use crate::upstream::{Addresses, Lane};

/// Identity of a backend within the process; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendId(u64);

impl BackendId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A number for an exchange that broke off: never used twice in the process.
pub fn exchange_number() -> poison::Exchange {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One replica.
pub struct Backend {
    /// Never used twice.
    pub id: BackendId,
    /// Name of its pool.
    pub pool: String,
    /// Its name in the pool.
    pub name: String,
    /// Hash of pool and address: the same over reloads and restarts.
    pub identity: u64,
    /// Where it is.
    pub addresses: Arc<Addresses>,
    /// Its metric handles.
    pub metrics: BackendMetrics,
    /// Connections, one lane a worker.
    lanes: Box<[Arc<Lane>]>,
    /// Connect-class faults and probes; in a pool of one model, everything.
    whole: Arc<Record>,
    /// By model, where one address serves several.
    by_model: RwLock<Vec<(String, Arc<Record>)>>,
    pub(super) in_flight: AtomicU32,
    pub(super) work: AtomicU64,
    /// Unfinished attempts when it last began to answer one.
    proven: AtomicU32,
    cap: Mutex<Cap>,
    /// What `cap` says, 0 for nothing: spares the lock.
    cap_now: AtomicU32,
    pub(super) unfinished: List,
    pub(super) signs: Signs,
    admin: AtomicU8,
    /// Microseconds: since when it is on its way out; 0 while it is not.
    leaving_since: AtomicU64,
    /// What it last said at `/v1/models`.
    listed: ArcSwapOption<Listed>,
    last_probe: ArcSwapOption<LastProbe>,
    last_verify: Mutex<Option<Verified>>,
    pub(super) trust: Trust,
    pub(super) foreign: Foreign,
    /// Somebody suspects it and wants it asked at once.
    verify_wanted: Notify,
    /// It was quarantined: a canary may be due.
    canary_wanted: Notify,
    /// Its state has changed: a probe may be due sooner than its prober thought.
    nudged: Notify,
    arrival: Arrival,
    /// Who broke off here lately.
    breaks: Mutex<Breaks>,
    other_models: OnceLock<Arc<ModelMetrics>>,
}

/// The models a backend lists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listed {
    /// Their ids, in its order.
    pub ids: Vec<String>,
    /// The whole entries, as JSON.
    pub entries: Vec<serde_json::Value>,
}

/// The latest probe of a backend, for status pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastProbe {
    /// Its result.
    pub verdict: ProbeVerdict,
    /// What it saw, for people: `200`, `connection_refused: …`, `no answer within 1s`.
    pub saw: String,
    /// When it ended.
    pub at: Moment,
    /// How long it took, the connection included.
    pub took: Duration,
}

/// The judge of one (backend, model), and what speed and failures it showed.
pub struct Record {
    /// Counts of the model; none for the judge of the whole backend.
    pub(super) metrics: Option<Arc<ModelMetrics>>,
    health: Mutex<Health>,
    pub(super) belief: Belief,
    /// The judge's answer is "eligible, full share".
    plain: AtomicBool,
    failures: Mutex<RecentFailures>,
    /// Whether `failures` may be above its resting value: spares the lock.
    failed_lately: AtomicBool,
    first_token: Mutex<[Ewma; Class::COUNT]>,
    /// Grows with each ejection: attempts that waited here when it did are rescued.
    ejections: Arc<AtomicU64>,
    /// Grows with those, and when the backend begins or ceases to be on its way out: its streams look why.
    calls: Arc<AtomicU64>,
}

impl Record {
    fn new(arrival: Arrival, policy: &HealthPolicy, metrics: Option<Arc<ModelMetrics>>) -> Self {
        let now = clock::now();
        let health = Health::new(arrival, now);
        let plain = is_plain(health.standing(policy, now));
        Self {
            metrics,
            health: Mutex::new(health),
            belief: Belief::default(),
            plain: AtomicBool::new(plain),
            failures: Mutex::new(RecentFailures::default()),
            failed_lately: AtomicBool::new(false),
            first_token: Mutex::new([Ewma::default(); Class::COUNT]),
            ejections: Arc::new(AtomicU64::new(0)),
            calls: Arc::new(AtomicU64::new(0)),
        }
    }

    /// What may be sent there now.
    pub fn standing(&self, policy: &HealthPolicy, now: Moment) -> Standing {
        if self.plain.load(Ordering::Acquire) {
            return Standing::Eligible { share: 1.0 };
        }
        if self.belief.is_out() {
            return Standing::Out { until: None };
        }
        self.health.lock().standing(policy, now)
    }

    /// Reads the judge, for status pages and peers.
    pub fn read<T>(&self, read: impl FnOnce(&Health) -> T) -> T {
        read(&self.health.lock())
    }

    /// Tells the judge something and publishes its new answer.
    pub(super) fn judge(
        &self,
        policy: &HealthPolicy,
        now: Moment,
        tell: impl FnOnce(&mut Health) -> Option<Transition>,
    ) -> Option<Transition> {
        let mut health = self.health.lock();
        let transition = tell(&mut health);
        let plain = is_plain(health.standing(policy, now)) && !self.belief.is_out();
        self.plain.store(plain, Ordering::Release);
        transition
    }

    /// Learns from one attempt. `peers` is asked only where it can matter.
    pub(super) fn observe(
        &self,
        policy: &HealthPolicy,
        now: Moment,
        observation: Observation,
        peers: impl FnOnce() -> Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        if observation == Observation::Fault {
            self.failures.lock().fail(now);
            self.failed_lately.store(true, Ordering::Release);
        }
        let good = matches!(observation, Observation::Success | Observation::FirstToken);
        let peers = if good && self.plain.load(Ordering::Acquire) { Peers::default() } else { peers() };
        self.judge(policy, now, |health| health.observe(policy, now, observation, &peers, rng))
    }

    pub(super) fn probe(
        &self,
        policy: &HealthPolicy,
        now: Moment,
        verdict: ProbeVerdict,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        self.judge(policy, now, |health| health.probe(policy, now, verdict, peers, rng))
    }

    /// Wins the single trial of probation, or not.
    pub(super) fn begin_trial(&self, now: Moment) -> bool {
        self.health.lock().begin_trial(now)
    }

    /// The trial that was won at `began` is over.
    pub fn abandon_trial(&self, began: Moment) {
        self.health.lock().abandon_trial(began);
    }

    /// At least 1; grows with recent failures, so that failing fast is not mistaken for being idle.
    pub(super) fn failure_factor(&self, now: Moment) -> f64 {
        if !self.failed_lately.load(Ordering::Acquire) {
            return 1.0;
        }
        let factor = self.failures.lock().factor(now);
        if factor <= 1.0 {
            self.failed_lately.store(false, Ordering::Release);
        }
        factor
    }

    /// What it did before its return is held against it no more.
    pub(super) fn forget_failures(&self) {
        *self.failures.lock() = RecentFailures::default();
        self.failed_lately.store(false, Ordering::Release);
    }

    /// A first token came after `seconds`.
    pub fn first_token(&self, class: Class, now: Moment, seconds: f64) {
        self.first_token.lock()[class.index()].observe(now, seconds);
    }

    pub(super) fn expected_first_token(&self, class: Class, now: Moment, median: Option<f64>) -> Option<f64> {
        let ewma = self.first_token.lock()[class.index()];
        match median {
            Some(median) => Some(ewma.value_towards(now, median)),
            None => ewma.value(),
        }
    }

    pub(super) fn latest_first_token(&self, class: Class) -> Option<f64> {
        self.first_token.lock()[class.index()].value()
    }

    /// The counter that grows with each ejection, and its value now.
    pub fn ejections(&self) -> (Arc<AtomicU64>, u64) {
        (self.ejections.clone(), self.ejections.load(Ordering::Acquire))
    }

    /// The counter that grows when streams should look whether they can stay, and its value now.
    pub fn calls(&self) -> (Arc<AtomicU64>, u64) {
        (self.calls.clone(), self.calls.load(Ordering::Acquire))
    }

    pub(super) fn ejected(&self) {
        self.ejections.fetch_add(1, Ordering::AcqRel);
        self.call();
    }

    fn call(&self) {
        self.calls.fetch_add(1, Ordering::AcqRel);
    }
}

fn is_plain(standing: Standing) -> bool {
    matches!(standing, Standing::Eligible { share } if share >= 1.0)
}

impl Backend {
    /// A replica that has just been configured, for `workers` worker threads.
    pub(super) fn new(
        pool: &str,
        params: &crate::config::Backend,
        arrival: Arrival,
        policy: &HealthPolicy,
        workers: usize,
        metrics: BackendMetrics,
    ) -> Self {
        let host = params.authority.host();
        let port = params.authority.port_u16().unwrap_or(if params.secure { 443 } else { 80 });
        Self {
            id: BackendId::next(),
            pool: pool.to_owned(),
            name: params.name.clone(),
            identity: stable_hash(format!("{pool}\n{}{}", params.authority, params.path_prefix).as_bytes()),
            addresses: Arc::new(Addresses::new(host, port)),
            metrics,
            lanes: (0..workers).map(|_| Arc::new(Lane::default())).collect(),
            whole: Arc::new(Record::new(arrival, policy, None)),
            by_model: RwLock::new(Vec::new()),
            in_flight: AtomicU32::new(0),
            work: AtomicU64::new(0),
            proven: AtomicU32::new(0),
            cap: Mutex::default(),
            cap_now: AtomicU32::new(0),
            unfinished: List::default(),
            signs: Signs::default(),
            admin: AtomicU8::new(Administrative::Enabled as u8),
            leaving_since: AtomicU64::new(0),
            listed: ArcSwapOption::empty(),
            last_probe: ArcSwapOption::empty(),
            last_verify: Mutex::new(None),
            trust: Trust::new(),
            foreign: Foreign::default(),
            verify_wanted: Notify::new(),
            canary_wanted: Notify::new(),
            nudged: Notify::new(),
            arrival,
            breaks: Mutex::default(),
            other_models: OnceLock::new(),
        }
    }

    /// What being slower than its peers multiplies its load by, at least 1.
    pub fn slow_factor(&self) -> f64 {
        self.signs.slow_factor()
    }

    /// Connections of one worker.
    pub fn lane(&self, worker: usize) -> &Arc<Lane> {
        &self.lanes[worker]
    }

    /// When work of any kind moved here last.
    pub fn moved_at(&self) -> Moment {
        self.signs.moved_at()
    }

    /// Unfinished attempts.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Most unfinished attempts it takes, as its refusals have taught; none while nothing is known.
    pub fn learned_cap(&self) -> Option<u32> {
        Some(self.cap_now.load(Ordering::Relaxed)).filter(|&cap| cap > 0)
    }

    /// It began to answer one.
    pub(super) fn took_one(&self) {
        let in_flight = self.in_flight();
        self.proven.store(in_flight, Ordering::Relaxed);
        if self.learned_cap().is_some() {
            self.learn(|cap| cap.served(clock::now(), in_flight));
        }
    }

    /// It refused one: too many, or not now.
    pub(super) fn refused_one(&self, now: Moment) {
        let proven = self.proven.load(Ordering::Relaxed);
        self.learn(|cap| cap.refused(now, self.in_flight(), proven));
    }

    pub(super) fn forget_cap(&self, now: Moment) {
        if self.learned_cap().is_some() {
            self.learn(|cap| cap.forget(now));
        }
    }

    fn learn(&self, teach: impl FnOnce(&mut Cap)) {
        let mut cap = self.cap.lock();
        teach(&mut cap);
        let now = cap.most().unwrap_or(0);
        self.cap_now.store(now, Ordering::Relaxed);
        self.metrics.cap.set(i64::from(now));
    }

    /// The judge of connect-class faults and probes; of everything where one model is served.
    pub fn whole(&self) -> &Arc<Record> {
        &self.whole
    }

    /// The judge of `model` here. Records are made for models that are configured, listed or were once
    /// served, up to a bound; the rest share the backend's own.
    pub(super) fn record(&self, model: Option<&str>, policy: &HealthPolicy) -> Arc<Record> {
        let Some(model) = model else { return self.whole.clone() };
        if let Some((_, record)) = self.by_model.read().iter().find(|(name, _)| name == model) {
            return record.clone();
        }
        let mut records = self.by_model.write();
        if let Some((_, record)) = records.iter().find(|(name, _)| name == model) {
            return record.clone();
        }
        if records.len() >= MODELS_MAX {
            return self.whole.clone();
        }
        // Whether the address answers at all is judged by `whole`; a model starts without a record against it.
        let record = Arc::new(Record::new(Arrival::Model, policy, Some(self.metrics.model(model))));
        records.push((model.to_owned(), record.clone()));
        record
    }

    /// Counts of the models that have no record.
    pub(super) fn other_models(&self) -> &Arc<ModelMetrics> {
        self.other_models.get_or_init(|| self.metrics.model(MODEL_OTHER))
    }

    /// Brings the gauges of its models up to date; `up` says whether the backend as a whole takes work.
    pub(super) fn publish_models(&self, policy: &HealthPolicy, now: Moment, up: bool) {
        for (_, record) in self.by_model.read().iter() {
            let open = up && matches!(record.standing(policy, now), Standing::Eligible { .. });
            record.metrics.iter().for_each(|metrics| metrics.eligible.set(i64::from(open)));
        }
    }

    pub(super) fn model_names(&self) -> Vec<String> {
        self.by_model.read().iter().map(|(name, _)| name.clone()).collect()
    }

    /// Judges by model, for status pages.
    pub fn models(&self) -> Vec<(String, Arc<Record>)> {
        self.by_model.read().clone()
    }

    /// What the operator wants of it.
    pub fn admin(&self) -> Administrative {
        match self.admin.load(Ordering::Relaxed) {
            0 => Administrative::Enabled,
            1 => Administrative::Draining,
            _ => Administrative::Disabled,
        }
    }

    /// Sets what the operator wants of it. Running attempts go on.
    pub fn set_admin(&self, state: Administrative) {
        let code = match state {
            Administrative::Enabled => 0,
            Administrative::Draining => 1,
            Administrative::Disabled => 2,
        };
        self.admin.store(code, Ordering::Relaxed);
        self.set_leaving(state != Administrative::Enabled);
    }

    /// It is on its way out, or not any more; its streams are told.
    pub(super) fn set_leaving(&self, leaving: bool) {
        let now = if leaving { clock::now().as_micros().max(1) } else { 0 };
        let set = |since: u64| ((since > 0) != leaving).then_some(now);
        if self.leaving_since.fetch_update(Ordering::AcqRel, Ordering::Acquire, set).is_ok() {
            self.whole.call();
            for (_, record) in self.by_model.read().iter() {
                record.call();
            }
        }
    }

    /// Since when it is on its way out: drained, disabled, or gone from the configuration.
    pub fn leaving_since(&self) -> Option<Moment> {
        Some(self.leaving_since.load(Ordering::Acquire)).filter(|&at| at > 0).map(Moment::from_micros)
    }

    /// What it last listed at `/v1/models`.
    pub fn listed(&self) -> Option<Arc<Listed>> {
        self.listed.load_full()
    }

    pub(super) fn has_list(&self) -> bool {
        self.listed.load().is_some()
    }

    /// Whether it lists `model`.
    pub fn lists(&self, model: &str) -> bool {
        self.listed.load().as_ref().is_some_and(|listed| listed.ids.iter().any(|id| id == model))
    }

    /// It listed these models.
    pub(super) fn set_listed(&self, listed: Listed) {
        self.listed.store(Some(Arc::new(listed)));
    }

    /// It was asked and lists nothing that is a list of models.
    pub(super) fn forget_listed(&self) {
        self.listed.store(None);
    }

    /// Its latest probe.
    pub fn last_probe(&self) -> Option<Arc<LastProbe>> {
        self.last_probe.load_full()
    }

    /// This was its latest probe; returns the one before.
    pub fn set_last_probe(&self, probe: LastProbe) -> Option<Arc<LastProbe>> {
        self.last_probe.swap(Some(Arc::new(probe)))
    }

    /// Asks its prober for one probe at once: whether it still answers. Cheap, and never wrong to call again: wishes
    /// that come together are one, and there is at most one such probe a second. Nothing comes of it where
    /// [`Pool::can_verify`](crate::pool::Pool::can_verify) says no.
    pub fn want_verify(&self) {
        self.verify_wanted.notify_one();
    }

    /// What the latest probe on demand showed; none before the first.
    pub fn last_verify(&self) -> Option<Verified> {
        *self.last_verify.lock()
    }

    /// This was its latest probe on demand.
    pub fn set_last_verify(&self, verified: Verified) {
        *self.last_verify.lock() = Some(verified);
    }

    /// Resolves when a probe on demand was wanted since the last call resolved. For its prober alone.
    pub async fn verify_wanted(&self) {
        self.verify_wanted.notified().await;
    }

    pub(super) fn want_canary(&self) {
        self.canary_wanted.notify_one();
    }

    /// Resolves when it was quarantined since the last call resolved. For its prober alone.
    pub async fn canary_wanted(&self) {
        self.canary_wanted.notified().await;
    }

    /// Its records, the whole one last.
    pub(super) fn records(&self) -> impl Iterator<Item = Arc<Record>> {
        self.models().into_iter().map(|(_, record)| record).chain([self.whole.clone()])
    }

    /// Resolves when its state has changed since the last call resolved. For its prober alone.
    pub async fn nudged(&self) {
        self.nudged.notified().await;
    }

    pub(super) fn nudge_prober(&self) {
        self.nudged.notify_one();
    }

    /// Closes its kept connections on all workers. Running attempts go on.
    pub fn close_kept(&self) {
        for lane in &self.lanes {
            lane.close_kept();
        }
    }

    /// An attempt of `exchange` broke off here.
    pub fn broke_off(&self, exchange: poison::Exchange) {
        self.breaks.lock().note(exchange, clock::now());
    }

    /// Who broke off here lately.
    pub fn breaks(&self) -> Breaks {
        self.breaks.lock().clone()
    }

    /// How it came into its pool.
    pub fn arrival(&self) -> Arrival {
        self.arrival
    }

    /// Attempts that wait here are to be moved.
    pub(super) fn rescue_waiting(&self) {
        self.whole.ejected();
        for (_, record) in self.by_model.read().iter() {
            record.ejected();
        }
    }
}
