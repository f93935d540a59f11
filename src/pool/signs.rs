//! Signs of life of one backend: when it last moved, what it served last and how fast, whether it is suspected.
//!
//! Written by every attempt, read by the pool's tick and by whoever chooses a backend; so all but the list of
//! what it served are atomics.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::policy::Moment;
use crate::policy::outlier::{Measure, OutlierPolicy, Reading, Sample, Slowness, Speed};
use crate::policy::progress::Kind;

/// A sign of life is written down again only after so long: tokens of many streams share the memory.
const GRAIN: Duration = Duration::from_millis(20);

const CLEAR: u8 = 0;
const SUSPECT: u8 = 1;
const SUSPECT_SHUN: u8 = 2;

/// What one backend showed of itself.
#[derive(Default)]
pub(super) struct Signs {
    /// Microseconds.
    moved_at: AtomicU64,
    served: Mutex<Served>,
    /// Bits of what slowness multiplies its load by; 0 for one.
    slow_factor: AtomicU64,
    suspicion: AtomicU8,
    shunned: AtomicBool,
    /// Microseconds.
    spared_until: AtomicU64,
}

#[derive(Default)]
struct Served {
    latest: Vec<Latest>,
    speed: Speed,
}

/// The latest work of a kind whose first token came.
#[derive(Clone, Copy)]
struct Latest {
    kind: Kind,
    started: Moment,
    took: Duration,
}

impl Signs {
    pub(super) fn moved(&self, now: Moment) {
        let before = Moment::from_micros(self.moved_at.load(Ordering::Relaxed));
        if now.since(before) >= GRAIN {
            self.moved_at.store(now.as_micros(), Ordering::Relaxed);
        }
    }

    pub(super) fn moved_at(&self) -> Moment {
        Moment::from_micros(self.moved_at.load(Ordering::Relaxed))
    }

    /// A first token came; `usual` is how long that usually takes, where that is known.
    pub(super) fn served(&self, kind: Kind, started: Moment, took: Duration, usual: Option<Duration>) {
        let mut served = self.served.lock();
        let Served { latest, speed } = &mut *served;
        match latest.iter_mut().find(|latest| latest.kind == kind) {
            Some(latest) if latest.started >= started => {}
            Some(latest) => (latest.started, latest.took) = (started, took),
            None => latest.push(Latest { kind, started, took }),
        }
        if let Some(usual) = usual {
            let sample = Sample { measure: Measure::FirstToken, began: started, measured: took, usual };
            speed.record(started + took, &sample);
        }
    }

    /// The mean gap of a stretch of a stream.
    pub(super) fn streamed(&self, now: Moment, began: Moment, mean: Duration, usual: Duration) {
        let sample = Sample { measure: Measure::TokenGap, began, measured: mean, usual };
        self.served.lock().speed.record(now, &sample);
    }

    /// What its samples say of its speed.
    pub(super) fn reading(&self, policy: &OutlierPolicy, now: Moment) -> Reading {
        self.served.lock().speed.reading(policy, now)
    }

    /// Takes in how slow it is beside its peers; the ratio when it is to be ejected for it.
    pub(super) fn judge_speed(&self, policy: &OutlierPolicy, now: Moment, slowness: Slowness) -> Option<f64> {
        let mut served = self.served.lock();
        let eject = served.speed.judge(policy, now, slowness);
        let factor = served.speed.load_factor(policy, now);
        self.slow_factor.store(if factor > 1.0 { factor.to_bits() } else { 0 }, Ordering::Relaxed);
        eject
    }

    /// What it did before is no evidence any more.
    pub(super) fn forget_speed(&self, now: Moment) {
        self.served.lock().speed.forget(now);
    }

    /// What its slowness multiplies its load by, at least 1.
    pub(super) fn slow_factor(&self) -> f64 {
        match self.slow_factor.load(Ordering::Relaxed) {
            0 => 1.0,
            bits => f64::from_bits(bits),
        }
    }

    /// How long work of `kind` took that began after `started`, if there was any.
    pub(super) fn served_later(&self, kind: Kind, started: Moment) -> Option<Duration> {
        let served = self.served.lock();
        served
            .latest
            .iter()
            .find(|latest| latest.kind == kind && latest.started > started)
            .map(|latest| latest.took)
    }

    /// It stands still; `shun`: new work would, too.
    pub(super) fn suspect(&self, shun: bool) {
        self.suspicion.store(if shun { SUSPECT_SHUN } else { SUSPECT }, Ordering::Relaxed);
    }

    pub(super) fn clear(&self) {
        self.suspicion.store(CLEAR, Ordering::Relaxed);
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.suspicion.load(Ordering::Relaxed) != CLEAR
    }

    /// Whether new work is to avoid it, given that `others` can take it.
    pub(super) fn shun(&self, others: bool) {
        let suspect = self.suspicion.load(Ordering::Relaxed) == SUSPECT_SHUN;
        self.shunned.store(suspect && others, Ordering::Relaxed);
    }

    pub(super) fn is_shunned(&self) -> bool {
        self.shunned.load(Ordering::Relaxed)
    }

    pub(super) fn spare_until(&self, until: Moment) {
        self.spared_until.fetch_max(until.as_micros(), Ordering::Relaxed);
    }

    pub(super) fn is_spared(&self, now: Moment) -> bool {
        Moment::from_micros(self.spared_until.load(Ordering::Relaxed)) > now
    }
}
