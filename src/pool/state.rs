//! What a pool keeps over reloads, and what its exchanges share: budget, rotation, who waits, what speed is usual.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock;
use crate::policy::Moment;
use crate::policy::progress::ProgressPolicy;
use crate::policy::retry::{Budget, Burst, RetryPolicy};
use crate::pool::pick::Class;
use crate::pool::tempo::{Hedge, Tempo};
use crate::telemetry::Telemetry;
use crate::telemetry::events::BudgetEmpty;
use crate::telemetry::metrics::PoolMetrics;

/// How far back the highest in-flight count reaches that the burst allowance is measured by.
const PEAK_PERIOD: Duration = Duration::from_secs(30);

/// The part of a pool that outlives its configuration.
pub struct PoolState {
    /// Its metric handles.
    pub metrics: PoolMetrics,
    pub(super) telemetry: Arc<Telemetry>,
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
    waiters: AtomicUsize,
    freed: Notify,
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
            cursor: AtomicUsize::new(0),
            budget: Mutex::default(),
            burst: Mutex::default(),
            peak: AtomicU32::new(0),
            peak_before: Mutex::new((0, clock::now())),
            trials: AtomicBool::new(true),
            several_models: AtomicBool::new(false),
            waiters: AtomicUsize::new(0),
            freed: Notify::new(),
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

    pub(super) fn trials_open(&self) -> bool {
        self.trials.load(Ordering::Acquire)
    }

    pub(super) fn open_trials(&self) {
        self.trials.store(true, Ordering::Release);
    }

    pub(super) fn close_trials(&self) {
        self.trials.store(false, Ordering::Release);
    }

    /// A place in the waiting room. Take it before choosing, so that no change between is missed.
    pub fn waiting(&self) -> Waiting<'_> {
        self.waiters.fetch_add(1, Ordering::AcqRel);
        self.metrics.waiting.inc();
        Waiting { state: self }
    }

    /// A slot was freed: one of those who wait may try.
    pub(super) fn wake_one(&self) {
        if self.waiters.load(Ordering::Acquire) > 0 {
            self.freed.notify_one();
        }
    }

    /// A backend came back: all who wait may try.
    pub(super) fn wake_all(&self) {
        if self.waiters.load(Ordering::Acquire) > 0 {
            self.freed.notify_waiters();
            // One who is just about to wait finds this permit.
            self.freed.notify_one();
        }
    }

    pub(super) fn median_first_token(&self, class: Class) -> Option<f64> {
        let median = f64::from_bits(self.medians[class.index()].load(Ordering::Relaxed));
        (!median.is_nan()).then_some(median)
    }

    pub(super) fn set_median_first_token(&self, class: Class, median: Option<f64>) {
        self.medians[class.index()].store(median.map_or(NO_MEDIAN, f64::to_bits), Ordering::Relaxed);
    }
}

/// One who waits for a backend; dropping it leaves the room.
pub struct Waiting<'a> {
    state: &'a PoolState,
}

impl Waiting<'_> {
    /// Something changed since the last call; try again.
    pub async fn changed(&self) {
        self.state.freed.notified().await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.state.waiters.fetch_sub(1, Ordering::AcqRel);
        self.state.metrics.waiting.dec();
    }
}
