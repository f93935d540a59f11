//! Unfinished attempts: counted up when one begins, down when it ends, however it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::pool::backend::Backend;
use crate::pool::state::PoolState;

/// One unfinished attempt at a backend. Dropping it is its end.
pub struct InFlight {
    backend: Arc<Backend>,
    pool: Arc<PoolState>,
    work: u64,
}

impl InFlight {
    /// Counts an attempt of `work` units (see `pick::work_units`).
    pub(super) fn begin(backend: &Arc<Backend>, pool: &Arc<PoolState>, work: u64) -> Self {
        let now = backend.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        backend.work.fetch_add(work, Ordering::Relaxed);
        backend.metrics.in_flight.set(i64::from(now));
        pool.saw_in_flight(now);
        Self { backend: backend.clone(), pool: pool.clone(), work }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let now = self.backend.in_flight.fetch_sub(1, Ordering::Relaxed) - 1;
        self.backend.work.fetch_sub(self.work, Ordering::Relaxed);
        self.backend.metrics.in_flight.set(i64::from(now));
        self.pool.slot_freed();
    }
}
