//! What every exchange of one worker thread shares: the directory, the clock, the log, the memory bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::clock::{self, Alarms};
use crate::pool::Directory;
use crate::telemetry::Telemetry;
use crate::telemetry::access_log::AccessWriter;

/// One data-plane thread, as its exchanges see it.
pub struct Worker {
    /// Which one; selects the lanes of the backends.
    pub index: usize,
    /// Configuration and backends.
    pub directory: Arc<Directory>,
    /// The thread's coarse clock.
    pub alarms: Alarms,
    /// Where access records go.
    pub access: AccessWriter,
    /// Shared by all workers.
    pub memory: Memory,
    /// Of this thread, so never waited for.
    rng: Mutex<fastrand::Rng>,
}

impl Worker {
    /// The context of worker `index`.
    pub fn new(
        index: usize,
        directory: Arc<Directory>,
        alarms: Alarms,
        access: AccessWriter,
        memory: Memory,
    ) -> Self {
        Self { index, directory, alarms, access, memory, rng: Mutex::new(clock::rng()) }
    }

    /// Where what happens is told.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        self.directory.telemetry()
    }

    /// Uses the thread's generator. Do not call it again inside.
    pub(super) fn with_rng<T>(&self, f: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        f(&mut self.rng.lock())
    }
}

/// Bytes kept for replay and held back, over all exchanges of the process. Cloning gives the same account.
#[derive(Clone, Default)]
pub struct Memory(Arc<Account>);

#[derive(Default)]
struct Account {
    held: AtomicU64,
}

/// From this share of the bound on it counts how large an item is, in tenths.
const SCARCE_TENTHS: u64 = 8;
/// Then an item may be at most this part of what is left free: large ones are let go while small ones still
/// find room, and the less is left the smaller they must be. The rule by which switches share their buffers
/// (Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998).
const SCARCE_PART: u64 = 8;

impl Memory {
    /// Bytes held now.
    pub fn held(&self) -> u64 {
        self.0.held.load(Ordering::Relaxed)
    }
}

/// A share of the memory bound; dropping it gives the share back.
#[derive(Default)]
pub(super) struct Held {
    account: Option<Arc<Account>>,
    bytes: u64,
}

impl Held {
    /// Sets `more` bytes aside as well; false when that would exceed `max`, or when this item has become too
    /// large for what is left of it. Then nothing more is set aside.
    pub(super) fn grow(&mut self, memory: &Memory, more: u64, max: u64) -> bool {
        if more == 0 {
            return true;
        }
        let all = memory.0.held.fetch_add(more, Ordering::Relaxed) + more;
        let free = max.saturating_sub(all);
        let scarce = all > max / 10 * SCARCE_TENTHS;
        let fits = all <= max && (!scarce || self.bytes + more <= free / SCARCE_PART);
        if fits {
            self.bytes += more;
            self.account.get_or_insert_with(|| memory.0.clone());
        } else {
            memory.0.held.fetch_sub(more, Ordering::Relaxed);
        }
        fits
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.held.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_and_never_exceeded() {
        let memory = Memory::default();
        let mut first = Held::default();
        assert!(first.grow(&memory, 60, 100) && first.grow(&memory, 0, 100));
        let mut second = Held::default();
        assert!(!second.grow(&memory, 50, 100));
        assert_eq!(memory.held(), 60);
        assert!(first.grow(&memory, 20, 100));
        drop(first);
        assert_eq!(memory.held(), 0);
        assert!(second.grow(&memory, 7, 100));
        drop(second);
        assert_eq!(memory.held(), 0);
    }

    #[test]
    fn what_is_large_is_let_go_before_what_is_small_suffers() {
        const MAX: u64 = 1_000_000;
        let memory = Memory::default();
        let mut crowd = Held::default();
        assert!(crowd.grow(&memory, 790_000, MAX));
        let (mut large, mut small) = (Held::default(), Held::default());
        assert!(!large.grow(&memory, 100_000, MAX), "half of what is left");
        assert!(small.grow(&memory, 20_000, MAX));
        let mut kept = Vec::new();
        for _ in 0..10_000 {
            let mut tiny = Held::default();
            if !tiny.grow(&memory, 1_000, MAX) {
                break;
            }
            kept.push(tiny);
        }
        assert!(kept.len() > 150, "{}", kept.len());
        assert!(!large.grow(&memory, 2_000, MAX) && memory.held() <= MAX);
        // An item that grows is measured whole.
        drop(kept);
        while large.grow(&memory, 1_000, MAX) {}
        assert!((15_000..30_000).contains(&large.bytes), "{}", large.bytes);
    }
}
