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
    /// Microseconds, by kind.
    first_token: Box<[AtomicU64]>,
    /// Microseconds.
    token_gap: AtomicU64,
    hedges: Arc<Mutex<Hedges>>,
    /// When a backend was last ejected for what its peers did; microseconds.
    stuck_at: AtomicU64,
}

impl Tempo {
    pub(super) fn new(policy: &ProgressPolicy) -> Self {
        let unknown = || AtomicU64::new(micros(policy.first_token_unknown));
        Self {
            speeds: Mutex::new((Speeds::default(), policy.clone())),
            first_token: (0..Kind::COUNT).map(|_| unknown()).collect(),
            token_gap: AtomicU64::new(micros(policy.token_gap_unknown)),
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

    /// Makes the clocks anew where something was learned.
    pub(super) fn review(&self, policy: &ProgressPolicy, now: Moment) {
        let mut guard = self.speeds.lock();
        let (speeds, latest) = &mut *guard;
        if latest != policy {
            latest.clone_from(policy);
            self.first_token
                .iter()
                .for_each(|c| c.store(micros(policy.first_token_unknown), Ordering::Relaxed));
            self.token_gap.store(micros(policy.token_gap_unknown), Ordering::Relaxed);
            speeds.review_all();
        }
        let publish =
            |kind: Kind, soft| self.first_token[kind.index()].store(micros(soft), Ordering::Relaxed);
        if let Some(gap) = speeds.review(policy, now, publish) {
            self.token_gap.store(micros(gap), Ordering::Relaxed);
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
        Duration::from_micros(self.first_token[kind.index()].load(Ordering::Relaxed))
    }

    fn token_gap(&self) -> Duration {
        Duration::from_micros(self.token_gap.load(Ordering::Relaxed))
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
