//! What others have running and waiting at a backend, as far as its engine told it lately.
//!
//! A correction to our own in-flight count and nothing more: it makes a backend look busier to the balancer, never
//! inadmissible, and it is forgotten by itself. A number that outlived its truth has made healthy replicas unusable
//! elsewhere.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock;
use crate::policy::Moment;
use crate::policy::load::Reported;
use crate::pool::backend::Backend;

/// Older than this a reading says nothing: requests of a second or two have come and gone.
const STALE_AFTER: Duration = Duration::from_secs(2);

/// The latest reading. Two atomics, read one after the other: a reader between two writes takes an old count for
/// fresh, or a fresh one for old, once.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    requests: AtomicU32,
    /// In microseconds of the clock.
    read_at: AtomicU64,
}

impl Foreign {
    /// Requests of others; 0 when nothing is known.
    pub(super) fn requests(&self, now: Moment) -> u32 {
        let requests = self.requests.load(Ordering::Relaxed);
        if requests == 0 {
            return 0;
        }
        let read_at = Moment::from_micros(self.read_at.load(Ordering::Relaxed));
        if now.since(read_at) < STALE_AFTER { requests } else { 0 }
    }
}

impl Backend {
    /// Its engine said this just now, while so many of its requests were ours: the most during the question, for
    /// it does not say at which moment it counted.
    pub fn set_reported(&self, reported: Reported, in_flight: u32) {
        let foreign = reported.foreign(in_flight);
        self.foreign.read_at.store(clock::now().as_micros(), Ordering::Relaxed);
        self.foreign.requests.store(foreign, Ordering::Relaxed);
        self.metrics.set_reported(Some((reported, foreign)));
    }

    /// Its engine does not say, or is not asked.
    pub fn forget_reported(&self) {
        self.foreign.requests.store(0, Ordering::Relaxed);
        self.metrics.set_reported(None);
    }

    /// Requests of others there, by its engine's word of the last two seconds.
    pub fn foreign_requests(&self) -> u32 {
        self.foreign.requests(clock::now())
    }
}
