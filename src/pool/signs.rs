//! Signs of life of one backend: when it last moved, what it served last, whether it is suspected.
//!
//! Written by every attempt, read by the pool's tick and by whoever chooses a backend; so all but the list of
//! what it served are atomics.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::policy::Moment;
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
    served: Mutex<Vec<Served>>,
    suspicion: AtomicU8,
    shunned: AtomicBool,
    /// Microseconds.
    spared_until: AtomicU64,
}

/// The latest work of a kind whose first token came.
#[derive(Clone, Copy)]
struct Served {
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

    pub(super) fn served(&self, kind: Kind, started: Moment, took: Duration) {
        let mut served = self.served.lock();
        match served.iter_mut().find(|latest| latest.kind == kind) {
            Some(latest) if latest.started >= started => {}
            Some(latest) => (latest.started, latest.took) = (started, took),
            None => served.push(Served { kind, started, took }),
        }
    }

    /// How long work of `kind` took that began after `started`, if there was any.
    pub(super) fn served_later(&self, kind: Kind, started: Moment) -> Option<Duration> {
        let served = self.served.lock();
        served.iter().find(|latest| latest.kind == kind && latest.started > started).map(|latest| latest.took)
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
