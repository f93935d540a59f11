//! Unfinished attempts: counted up when one begins, down when it ends, however it ends; and what each of them
//! is waiting for, so that a backend where nothing moves any more can be told from one that is merely slow.
//!
//! An attempt *waits* while evergate wants bytes of its backend. One whose client does not read, or whose
//! upload is still coming, waits for somebody else and is no evidence.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::clock;
use crate::policy::Moment;
use crate::policy::progress::{Kind, SoftClocks, Work};
use crate::pool::backend::Backend;
use crate::pool::state::PoolState;

/// One unfinished attempt at a backend. Dropping it is its end.
pub struct InFlight(Arc<Unfinished>);

/// What the pool and the attempt's clock know of it.
pub struct Unfinished {
    backend: Arc<Backend>,
    pool: Arc<PoolState>,
    load: u64,
    kind: Kind,
    started: Moment,
    /// Its place in the list of its backend, written under the list's lock.
    place: AtomicUsize,
    /// Microseconds: since when it has waited in silence; 0 while it does not wait.
    waits_since: AtomicU64,
    streaming: AtomicBool,
    late: AtomicBool,
}

/// The unfinished attempts of a backend.
pub(super) type List = Mutex<Vec<Arc<Unfinished>>>;

impl InFlight {
    /// Counts an attempt of `load` units (see `pick::work_units`).
    pub(super) fn begin(
        backend: &Arc<Backend>,
        pool: &Arc<PoolState>,
        load: u64,
        kind: Kind,
        now: Moment,
    ) -> Self {
        let count = backend.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        backend.work.fetch_add(load, Ordering::Relaxed);
        backend.metrics.in_flight.set(i64::from(count));
        pool.saw_in_flight(count);
        let mut list = backend.unfinished.lock();
        let unfinished = Arc::new(Unfinished {
            backend: backend.clone(),
            pool: pool.clone(),
            load,
            kind,
            started: now,
            place: AtomicUsize::new(list.len()),
            waits_since: AtomicU64::new(0),
            streaming: AtomicBool::new(false),
            late: AtomicBool::new(false),
        });
        list.push(unfinished.clone());
        Self(unfinished)
    }

    /// From now on its backend owes it something, or something more.
    pub fn waits(&self, now: Moment) {
        self.0.waits_since.store(now.as_micros(), Ordering::Relaxed);
    }

    /// Its backend gave a sign of life: a token, a whole answer. It does not wait until it says so again.
    pub fn moved(&self, now: Moment) {
        self.0.waits_since.store(0, Ordering::Relaxed);
        self.0.backend.signs.moved(now);
    }

    /// It does not wait any more.
    pub fn rests(&self) {
        self.0.waits_since.store(0, Ordering::Relaxed);
    }

    /// Its first token has come; from now on it is the gaps between tokens that count.
    pub fn streams(&self) {
        self.0.streaming.store(true, Ordering::Relaxed);
    }

    /// When it began.
    pub fn started(&self) -> Moment {
        self.0.started
    }

    /// What it is like.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// It has waited for its first token for longer than is usual.
    pub fn is_late(&self) -> bool {
        self.0.late.load(Ordering::Relaxed)
    }

    /// For the clock that finds out whether it is late.
    pub fn clock(&self) -> Arc<Unfinished> {
        self.0.clone()
    }
}

impl Unfinished {
    /// When it is late, by the clocks as they are now.
    pub fn late_at(&self) -> Moment {
        self.started + self.pool.tempo.first_token(self.kind)
    }

    /// It is.
    pub fn set_late(&self) {
        self.late.store(true, Ordering::Relaxed);
    }

    /// Whether its first token is late at `now`, told so already or not.
    fn is_overdue(&self, now: Moment) -> bool {
        self.late_at() <= now && self.work().is_some_and(|work| !work.streaming)
    }

    /// What it waits for; none when it does not.
    pub(super) fn work(&self) -> Option<Work> {
        let since = self.waits_since.load(Ordering::Relaxed);
        (since > 0).then(|| Work {
            kind: self.kind,
            started: self.started,
            heard: Moment::from_micros(since),
            streaming: self.streaming.load(Ordering::Relaxed),
        })
    }
}

/// Whether `backend` keeps others waiting beyond their time, and nothing was heard of it since.
pub(super) fn is_behind(backend: &Backend, since: Moment, now: Moment) -> bool {
    backend.signs.moved_at() < since && backend.unfinished.lock().iter().any(|one| one.is_overdue(now))
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Unfinished { backend, pool, load, place, .. } = &*self.0;
        if self.is_late() && !backend.signs.is_suspect() && self.0.work().is_some_and(|work| !work.streaming)
        {
            // Cut off while it waited: had that no effect on the clocks, they would tighten themselves.
            let now = clock::now();
            pool.tempo.learn_first_token(now, self.0.kind, now.since(self.0.started));
        }
        {
            let mut list = backend.unfinished.lock();
            let place = place.load(Ordering::Relaxed);
            list.swap_remove(place);
            if let Some(moved) = list.get(place) {
                moved.place.store(place, Ordering::Relaxed);
            }
        }
        let now = backend.in_flight.fetch_sub(1, Ordering::Relaxed) - 1;
        backend.work.fetch_sub(*load, Ordering::Relaxed);
        backend.metrics.in_flight.set(i64::from(now));
        pool.slot_freed();
    }
}
