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

impl Memory {
    /// Sets `bytes` aside if that stays within `max`.
    pub(super) fn hold(&self, bytes: u64, max: u64) -> Option<Held> {
        if bytes == 0 {
            return Some(Held { account: None, bytes: 0 });
        }
        let before = self.0.held.fetch_add(bytes, Ordering::Relaxed);
        let held = Held { account: Some(self.0.clone()), bytes };
        (before + bytes <= max).then_some(held)
    }

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
    /// Sets `more` bytes aside as well; false when that would exceed `max`.
    pub(super) fn grow(&mut self, memory: &Memory, more: u64, max: u64) -> bool {
        match memory.hold(more, max) {
            Some(mut extra) => {
                self.bytes += std::mem::take(&mut extra.bytes);
                self.account = self.account.take().or(extra.account.take());
                true
            }
            None => false,
        }
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
        let mut first = memory.hold(60, 100).unwrap();
        assert!(memory.hold(50, 100).is_none());
        assert_eq!(memory.held(), 60);
        assert!(first.grow(&memory, 40, 100));
        assert!(!first.grow(&memory, 1, 100));
        assert_eq!(memory.held(), 100);
        drop(first);
        assert_eq!(memory.held(), 0);
        let mut empty = Held::default();
        assert!(empty.grow(&memory, 7, 100));
        drop(empty);
        assert_eq!(memory.held(), 0);
    }
}
