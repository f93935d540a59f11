//! What is usual in a pool, shared by all who wait there: soft clocks to read, measurements to learn from.
//!
//! Reading a clock is one atomic load; measurements go behind a short lock once an attempt, and once for so
//! many tokens. The clocks are made of them by the pool's tick. The rules are `policy::progress` and
//! `policy::hedge`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::policy::Moment;
use crate::policy::hedge::Hedges;
use crate::policy::progress::{Kind, ProgressPolicy, SoftClocks, Speeds};

/// The measurements and clocks of one pool.
pub(super) struct Tempo {
    /// With the policy the clocks were last made by.
    speeds: Mutex<(Speeds, ProgressPolicy)>,
    /// By kind.
    first_token: Box<[Clock]>,
    token_gap: Clock,
    hedges: Arc<Mutex<Hedges>>,
    /// When a backend was last ejected for what its peers did; microseconds.
    stuck_at: AtomicU64,
}

/// Microseconds, both.
struct Clock {
    late: AtomicU64,
    /// 0 while unknown.
    usual: AtomicU64,
}

impl Clock {
    fn new(late: Duration) -> Self {
        Self { late: AtomicU64::new(micros(late)), usual: AtomicU64::new(0) }
    }

    fn set(&self, usual: Option<Duration>, late: Duration) {
        self.late.store(micros(late), Ordering::Relaxed);
        // What is usual at all takes longer than nothing.
        self.usual.store(usual.map_or(0, |usual| micros(usual).max(1)), Ordering::Relaxed);
    }

    fn late(&self) -> Duration {
        Duration::from_micros(self.late.load(Ordering::Relaxed))
    }

    fn usual(&self) -> Option<Duration> {
        let usual = self.usual.load(Ordering::Relaxed);
        (usual > 0).then(|| Duration::from_micros(usual))
    }
}

impl Tempo {
    pub(super) fn new(policy: &ProgressPolicy) -> Self {
        Self {
            speeds: Mutex::new((Speeds::default(), policy.clone())),
            first_token: (0..Kind::COUNT).map(|_| Clock::new(policy.first_token_unknown)).collect(),
            token_gap: Clock::new(policy.token_gap_unknown),
            hedges: Arc::default(),
            stuck_at: AtomicU64::new(0),
        }
    }

    /// A first token came after `took`, or work was cut off after so long for no fault of its backend.
    pub(super) fn learn_first_token(&self, now: Moment, kind: Kind, took: Duration) {
        self.speeds.lock().0.first_token(now, kind, took);
    }

    /// The longest gap in a stretch of a stream.
    pub(super) fn learn_token_gap(&self, now: Moment, longest: Duration) {
        self.speeds.lock().0.token_gap(now, longest);
    }

    /// How long a first token of this kind usually takes; none while unknown.
    pub(super) fn usual_first_token(&self, kind: Kind) -> Option<Duration> {
        self.first_token[kind.index()].usual()
    }

    /// The longest gap there usually is in a stretch of a stream; none while unknown.
    pub(super) fn usual_token_gap(&self) -> Option<Duration> {
        self.token_gap.usual()
    }

    /// Makes the clocks anew where something was learned, and all of them for another policy.
    pub(super) fn review(&self, policy: &ProgressPolicy, now: Moment) {
        let mut guard = self.speeds.lock();
        let (speeds, latest) = &mut *guard;
        if latest != policy {
            latest.clone_from(policy);
            self.first_token.iter().for_each(|clock| {
                clock.set(clock.usual(), policy.late_first_token(clock.usual()));
            });
            self.token_gap.set(self.token_gap.usual(), policy.late_token(self.token_gap.usual()));
        }
        let publish = |kind: Kind, usual| {
            self.first_token[kind.index()].set(usual, policy.late_first_token(usual));
        };
        if let Some(usual) = speeds.review(now, publish) {
            self.token_gap.set(usual, policy.late_token(usual));
        }
    }

    /// Begins a hedge if one may be made, given the `requests` of ten seconds.
    pub(super) fn begin_hedge(&self, now: Moment, policy: &ProgressPolicy, requests: u64) -> Option<Hedge> {
        let begun = self.hedges.lock().begin(now, policy.hedge_ratio, requests);
        begun.then(|| Hedge(self.hedges.clone()))
    }

    pub(super) fn stuck_at(&self) -> Moment {
        Moment::from_micros(self.stuck_at.load(Ordering::Relaxed))
    }

    pub(super) fn set_stuck_at(&self, now: Moment) {
        self.stuck_at.store(now.as_micros(), Ordering::Relaxed);
    }
}

impl SoftClocks for Tempo {
    fn first_token(&self, kind: Kind) -> Duration {
        self.first_token[kind.index()].late()
    }

    fn token_gap(&self) -> Duration {
        self.token_gap.late()
    }
}

/// A hedge under way. Dropping it is its end.
pub struct Hedge(Arc<Mutex<Hedges>>);

impl Drop for Hedge {
    fn drop(&mut self) {
        self.0.lock().ended();
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
