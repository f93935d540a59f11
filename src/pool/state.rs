//! What a pool keeps over reloads, and what its exchanges share: budget, rotation, who waits, what speed is usual.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, RwLock};

use crate::clock;
use crate::policy::Moment;
use crate::policy::admission::{Completions, Full, Priority};
use crate::policy::identity::Roster;
use crate::policy::progress::ProgressPolicy;
use crate::policy::retry::{Budget, Burst, RetryPolicy};
use crate::pool::backend::BackendId;
use crate::pool::line::{Joining, Line, Reason, Waiting};
use crate::pool::pick::Class;
use crate::pool::tempo::{Hedge, Tempo};
use crate::pool::ward::Ward;
use crate::telemetry::Telemetry;
use crate::telemetry::events::BudgetEmpty;
use crate::telemetry::metrics::{MODELS_MAX, PoolMetrics};

/// How far back the highest in-flight count reaches that the burst allowance is measured by.
const PEAK_PERIOD: Duration = Duration::from_secs(30);

/// Models with a line of their own; those beyond wait in the pool's.
const LINES_MAX: usize = 256;
/// After an ejection, what it throws off is let in elsewhere by and by for so long: the time a `Pace` needs.
const RESCUE_LASTS: Duration = Duration::from_secs(2);
/// Fewer than so many thrown off at once are no crowd: they are as many as a `Pace` begins with.
const CROWD: u32 = 8;

/// The part of a pool that outlives its configuration.
pub struct PoolState {
    /// Its metric handles.
    pub metrics: PoolMetrics,
    pub(super) telemetry: Arc<Telemetry>,
    /// Requests that killed replicas.
    pub ward: Arc<Ward>,
    /// Rotation of round robin.
    pub(super) cursor: AtomicUsize,
    budget: Mutex<Budget>,
    burst: Mutex<Burst>,
    peak: AtomicU32,
    /// The peak of the period before, and when this one began.
    peak_before: Mutex<(u32, Moment)>,
    /// Some backend may be in probation: spares looking.
    trials: AtomicBool,
    /// Its backends list several models between them, so that each model is judged by itself.
    pub(super) several_models: AtomicBool,
    /// The model that was served first: in most pools the only one.
    first_served: OnceLock<Box<str>>,
    /// The others, at most [`MODELS_MAX`].
    served: RwLock<HashSet<Box<str>>>,
    /// Who lacks a model that others list; none while all lists are equal.
    pub(super) roster: ArcSwapOption<Roster<BackendId>>,
    /// Hash of the configured names of which a backend has listed one; 0 for none.
    pub(super) names_seen: AtomicU64,
    /// Who waits, in all lines: spares looking at them.
    waiters: AtomicUsize,
    line: Arc<Line>,
    /// By model, where each is judged by itself.
    lines: RwLock<Vec<(String, Arc<Line>)>>,
    /// Until then, what an ejection threw off is let in by and by. In microseconds.
    rescuing: AtomicU64,
    /// Answers finished, and how many of them `completions` has counted.
    finished: AtomicU64,
    completions: Mutex<(Completions, u64)>,
    /// What is usual here.
    pub(super) tempo: Tempo,
    /// Bits of the median first-token time, in seconds, by class; `NO_MEDIAN` while none is known.
    medians: Box<[AtomicU64]>,
}

const NO_MEDIAN: u64 = f64::NAN.to_bits();

impl PoolState {
    pub(super) fn new(name: &str, progress: &ProgressPolicy, telemetry: Arc<Telemetry>) -> Self {
        Self {
            metrics: telemetry.metrics.pool(name),
            telemetry,
            ward: Arc::default(),
            cursor: AtomicUsize::new(0),
            budget: Mutex::default(),
            burst: Mutex::default(),
            peak: AtomicU32::new(0),
            peak_before: Mutex::new((0, clock::now())),
            trials: AtomicBool::new(true),
            several_models: AtomicBool::new(false),
            first_served: OnceLock::new(),
            served: RwLock::default(),
            roster: ArcSwapOption::empty(),
            names_seen: AtomicU64::new(0),
            waiters: AtomicUsize::new(0),
            line: Arc::default(),
            lines: RwLock::default(),
            rescuing: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            completions: Mutex::new((Completions::new(clock::now()), 0)),
            tempo: Tempo::new(progress),
            medians: Class::all().map(|_| AtomicU64::new(NO_MEDIAN)).collect(),
        }
    }

    /// An exchange has come: what retries are measured by.
    pub fn deposit(&self) {
        self.budget.lock().deposit(clock::now());
    }

    /// Takes one retry from the budget, or, for the first of an exchange, from the burst allowance of a lost replica.
    pub fn may_retry(&self, policy: &RetryPolicy, first: bool) -> bool {
        let now = clock::now();
        if self.budget.lock().withdraw(now, policy) {
            return true;
        }
        if first && self.burst.lock().withdraw(now, self.highest_in_flight()) {
            return true;
        }
        BudgetEmpty { at: &self.metrics }.emit(&self.telemetry);
        false
    }

    /// Takes what a second opinion costs: from the half of the budget that retries can spare, or, about a backend that
    /// was overruled lately (`wary`), from all that a first retry may draw on.
    pub fn may_ask(&self, policy: &RetryPolicy, wary: bool) -> bool {
        match wary {
            true => self.may_retry(policy, true),
            false => self.budget.lock().withdraw_spare(clock::now(), policy),
        }
    }

    /// Takes one attempt at a suspect from the budget; `paid` when it is a retry that drew on it already.
    pub(super) fn may_try_suspect(&self, policy: &RetryPolicy, paid: bool, now: Moment) -> bool {
        self.budget.lock().withdraw_for_suspect(now, policy, paid)
    }

    /// Nothing was sent to the suspect.
    pub(super) fn refund_suspect(&self) {
        self.budget.lock().refund_suspect(clock::now());
    }

    /// Takes a hedge from its own allowance and from the retry budget.
    pub fn may_hedge(&self, policy: &RetryPolicy, progress: &ProgressPolicy) -> Option<Hedge> {
        let now = clock::now();
        let mut budget = self.budget.lock();
        let hedge = self.tempo.begin_hedge(now, progress, budget.requests(now))?;
        budget.withdraw(now, policy).then_some(hedge)
    }

    pub(super) fn publish_budget(&self, policy: &RetryPolicy, now: Moment) {
        self.metrics.budget_left.set(self.budget.lock().left(now, policy));
    }

    pub(super) fn saw_in_flight(&self, n: u32) {
        if n > self.peak.load(Ordering::Relaxed) {
            self.peak.fetch_max(n, Ordering::Relaxed);
        }
    }

    fn highest_in_flight(&self) -> u32 {
        let before = self.peak_before.lock().0;
        before.max(self.peak.load(Ordering::Relaxed))
    }

    pub(super) fn turn_peak(&self, now: Moment) {
        let mut before = self.peak_before.lock();
        if now.since(before.1) >= PEAK_PERIOD {
            *before = (self.peak.swap(0, Ordering::Relaxed), now);
        }
    }

    /// A backend served this model: it exists, whoever lists it.
    pub fn serves(&self, model: &str) {
        if **self.first_served.get_or_init(|| model.into()) == *model || self.has_served(model) {
            return;
        }
        let mut served = self.served.write();
        if served.len() < MODELS_MAX {
            served.insert(model.into());
        }
        self.several_models.store(true, Ordering::Relaxed);
    }

    /// Whether a backend has served this model.
    pub(super) fn has_served(&self, model: &str) -> bool {
        self.first_served.get().is_some_and(|first| **first == *model) || self.served.read().contains(model)
    }

    pub(super) fn trials_open(&self) -> bool {
        self.trials.load(Ordering::Acquire)
    }

    pub(super) fn open_trials(&self) {
        self.trials.store(true, Ordering::Release);
    }

    pub(super) fn close_trials(&self) {
        self.trials.store(false, Ordering::Release);
    }

    /// Whether somebody who wants the same arrived earlier and still waits: then it is not yet the turn of one
    /// who arrives. Where there are no `waiters` it need not be asked.
    pub fn someone_waits(&self, model: Option<&str>) -> bool {
        self.line(model).has_arrivals()
    }

    /// How many wait, in all lines: one load.
    pub fn waiters(&self) -> usize {
        self.waiters.load(Ordering::SeqCst)
    }

    /// Takes a place in the line of `model`.
    ///
    /// # Errors
    /// As many wait as may.
    pub fn join(self: &Arc<Self>, model: Option<&str>, joining: Joining) -> Result<Waiting, Full> {
        self.own_line(model).join(self, joining)
    }

    /// When one may come back before whom `ahead` others wait.
    pub fn retry_after(&self, ahead: usize) -> Duration {
        self.completions.lock().0.retry_after(clock::now(), ahead)
    }

    /// Counts one who waits; false when there are `length_max` already.
    pub(super) fn one_more_waits(&self, priority: Priority, length_max: usize) -> bool {
        let more = |n: usize| (n < length_max).then_some(n + 1);
        if self.waiters.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_err() {
            return false;
        }
        self.metrics.waiting.inc();
        self.metrics.queue[priority as usize].inc();
        true
    }

    pub(super) fn one_less_waits(&self, priority: Priority) {
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        self.metrics.waiting.dec();
        self.metrics.queue[priority as usize].dec();
    }

    /// A slot was freed: it is the next one's turn.
    pub(super) fn slot_freed(&self) {
        if self.waiters() > 0 {
            let now = clock::now();
            self.each_line(|line| line.call(Reason::Slot, now));
        }
    }

    /// A backend returned, or joined: those who wait are let in, by and by.
    pub(super) fn backend_returned(&self) {
        if self.waiters() > 0 {
            let now = clock::now();
            self.each_line(|line| line.backend_returned(now));
        }
    }

    /// Time has passed: a pause may be over, a slow start have let a slot in, a budget have filled.
    pub(super) fn tick_lines(&self, now: Moment) {
        if self.waiters() > 0 {
            self.each_line(|line| line.tick(now));
        }
    }

    /// One of those who wait may find somebody now: a backend wants a trial.
    pub(super) fn look(&self) {
        if self.waiters() > 0 {
            let now = clock::now();
            self.each_line(|line| line.call(Reason::Look, now));
        }
    }

    /// A backend was ejected with so many unfinished attempts.
    pub(super) fn backend_lost(&self, in_flight: u32) {
        if in_flight > CROWD {
            let until = clock::now() + RESCUE_LASTS;
            self.rescuing.fetch_max(until.as_micros(), Ordering::Relaxed);
        }
    }

    /// Whether a crowd is being moved, so that an attempt that failed is let in elsewhere in its turn.
    pub fn is_rescuing(&self) -> bool {
        clock::now().as_micros() < self.rescuing.load(Ordering::Relaxed)
    }

    /// An answer was finished.
    pub(super) fn finished(&self) {
        self.finished.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_finished(&self, now: Moment) {
        let finished = self.finished.load(Ordering::Relaxed);
        let (completions, counted) = &mut *self.completions.lock();
        completions.add(now, finished.wrapping_sub(std::mem::replace(counted, finished)));
    }

    fn line(&self, model: Option<&str>) -> Arc<Line> {
        let own = model.and_then(|model| {
            self.lines.read().iter().find(|(name, _)| name == model).map(|(_, line)| line.clone())
        });
        own.unwrap_or_else(|| self.line.clone())
    }

    /// The line of `model`, made when missing. Names are bounded by who vouches for them (`judged_model`).
    fn own_line(&self, model: Option<&str>) -> Arc<Line> {
        let Some(model) = model else { return self.line.clone() };
        let mut lines = self.lines.write();
        if let Some((_, line)) = lines.iter().find(|(name, _)| name == model) {
            return line.clone();
        }
        if lines.len() >= LINES_MAX {
            return self.line.clone();
        }
        let line = Arc::<Line>::default();
        lines.push((model.to_owned(), line.clone()));
        line
    }

    fn each_line(&self, call: impl Fn(&Line)) {
        call(&self.line);
        self.lines.read().iter().for_each(|(_, line)| call(line));
    }

    pub(super) fn median_first_token(&self, class: Class) -> Option<f64> {
        let median = f64::from_bits(self.medians[class.index()].load(Ordering::Relaxed));
        (!median.is_nan()).then_some(median)
    }

    pub(super) fn set_median_first_token(&self, class: Class, median: Option<f64>) {
        self.medians[class.index()].store(median.map_or(NO_MEDIAN, f64::to_bits), Ordering::Relaxed);
    }
}
