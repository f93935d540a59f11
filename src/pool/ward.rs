//! Requests that killed replicas are kept apart here: they run one at a time, on one backend (F33).
//!
//! Costs an ordinary exchange one relaxed load. What is remembered, and for how long, is `policy::poison`;
//! who is to blame is found out by the exchange. Not done here: refusing anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock;
use crate::policy::poison::Memory;
use crate::pool::backend::BackendId;

/// The ward of one pool; outlives reloads.
pub struct Ward {
    /// Something may be remembered: spares the lock, and the fingerprint.
    armed: AtomicBool,
    memory: Mutex<Memory>,
    /// One at a time.
    bed: Arc<Semaphore>,
    /// Where they run: what one of them kills, the next one finds gone, and waits for.
    place: Mutex<Option<BackendId>>,
}

impl Default for Ward {
    fn default() -> Self {
        Self {
            armed: AtomicBool::new(false),
            memory: Mutex::default(),
            bed: Arc::new(Semaphore::new(1)),
            place: Mutex::new(None),
        }
    }
}

impl Ward {
    /// Whether anything may be remembered.
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed)
    }

    /// Whether the request of this fingerprint is to be kept apart.
    pub fn holds(&self, fingerprint: u64) -> bool {
        let mut memory = self.memory.lock();
        let holds = memory.holds(fingerprint, clock::now());
        self.rest(&memory);
        holds
    }

    /// The request of this fingerprint was blamed.
    pub fn remember(&self, fingerprint: u64) {
        let mut memory = self.memory.lock();
        memory.remember(fingerprint, clock::now());
        self.armed.store(true, Ordering::Relaxed);
    }

    /// Waits for the turn of a request that is kept apart; first come, first served. None when it is not
    /// kept apart any more by then.
    pub async fn turn(self: &Arc<Self>, fingerprint: u64) -> Option<Turn> {
        // Nobody closes it.
        let bed = self.bed.clone().acquire_owned().await.ok()?;
        self.holds(fingerprint).then(|| Turn { ward: self.clone(), fingerprint, _bed: bed })
    }

    fn forget(&self, fingerprint: u64) {
        let mut memory = self.memory.lock();
        memory.forget(fingerprint);
        self.rest(&memory);
    }

    fn rest(&self, memory: &Memory) {
        if memory.is_empty() {
            self.armed.store(false, Ordering::Relaxed);
            *self.place.lock() = None;
        }
    }
}

/// The turn of one request; dropping it lets the next one in.
pub struct Turn {
    ward: Arc<Ward>,
    fingerprint: u64,
    _bed: OwnedSemaphorePermit,
}

impl Turn {
    /// Where it must run; none before the first one has chosen.
    pub fn place(&self) -> Option<BackendId> {
        *self.ward.place.lock()
    }

    /// It runs there.
    pub fn runs_at(&self, backend: BackendId) {
        *self.ward.place.lock() = Some(backend);
    }

    /// It was served: whatever it was blamed for, it was not its doing.
    pub fn served(self) {
        self.ward.forget(self.fingerprint);
    }

    /// It broke off again.
    pub fn broke(self) {
        self.ward.remember(self.fingerprint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn turns_are_taken_one_at_a_time_until_one_is_served() {
        let ward = Arc::new(Ward::default());
        assert!(!ward.is_armed());
        ward.remember(7);
        assert!(ward.is_armed() && ward.holds(7) && !ward.holds(8));
        let first = ward.turn(7).await.unwrap();
        let waiting = tokio::spawn({
            let ward = ward.clone();
            async move { ward.turn(7).await.is_some() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        first.served();
        assert!(!waiting.await.unwrap(), "no reason to be kept apart any more");
        assert!(!ward.is_armed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_broke_off_is_followed_by_another() {
        let ward = Arc::new(Ward::default());
        ward.remember(7);
        ward.turn(7).await.unwrap().broke();
        assert!(ward.turn(7).await.is_some());
        drop(ward.turn(7).await);
        assert!(ward.holds(7), "one that was given up says nothing");
    }
}
