//! Ending without dropping work: who asks for it, who sees it, and what it waits for.
//!
//! Three phases, only forwards: accepting → draining → done. The owner of the process holds the
//! [`Drain`]; whoever should stop taking new work holds a [`Draining`]; everything that must be
//! waited for holds a [`Guard`], one per connection and one per exchange. In `Done` the work still
//! unfinished is to be cut, visibly. Nothing here closes anything itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Nothing was asked.
    Accepting = 0,
    /// No new connections; what runs may finish.
    Draining = 1,
    /// All finished, the deadline passed, or the end was asked for a second time: cut what is left.
    Done = 2,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every guard was released.
    Complete,
    /// The deadline passed with this many guards held.
    Deadline {
        /// Guards held at that time.
        left: usize,
    },
    /// A second trigger asked to end at once.
    AtOnce {
        /// Guards held at that time.
        left: usize,
    },
}

#[derive(Debug)]
struct Shared {
    phase: AtomicU8,
    guards: AtomicUsize,
    /// The phase advanced, or the last guard of a drain was released.
    changed: Notify,
}

/// The trigger. Cloning gives the same one; dropping all of them triggers nothing.
#[derive(Clone, Debug)]
pub struct Drain(Arc<Shared>);

/// The view of those who must notice. Cloning is one atomic increment; dropping means nothing.
#[derive(Clone, Debug)]
pub struct Draining(Arc<Shared>);

/// Work a drain waits for. Dropping it says the work has ended, however it ended: also by panic or
/// by a dropped future.
#[derive(Debug)]
#[must_use = "work is waited for only while its guard is held"]
pub struct Guard(Arc<Shared>);

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// A drain in phase accepting.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            phase: AtomicU8::new(Phase::Accepting as u8),
            guards: AtomicUsize::new(0),
            changed: Notify::new(),
        }))
    }

    /// A view for a listener, a connection, a background task.
    pub fn watch(&self) -> Draining {
        Draining(Arc::clone(&self.0))
    }

    /// Asks for the end: the first time to drain, the second time at once. Returns the new phase.
    pub fn trigger(&self) -> Phase {
        let next = if self.0.phase() == Phase::Accepting { Phase::Draining } else { Phase::Done };
        self.0.advance(next);
        self.0.phase()
    }

    /// Waits, after a trigger, until all guards are released, `deadline` has passed, or a second
    /// trigger came, then moves to [`Phase::Done`]. Without a trigger it waits for one first.
    /// Dropping the future leaves the phase as it is.
    pub async fn drained(&self, deadline: Duration) -> Drained {
        self.0.reached(Phase::Draining).await;
        let complete = tokio::time::timeout(
            deadline,
            self.0.wait(|shared| {
                let second_trigger = shared.phase() == Phase::Done;
                let empty = shared.guards.load(Ordering::SeqCst) == 0;
                (empty || second_trigger).then_some(empty)
            }),
        )
        .await;
        let left = self.0.guards.load(Ordering::SeqCst);
        self.0.advance(Phase::Done);
        match complete {
            Ok(true) => Drained::Complete,
            Ok(false) => Drained::AtOnce { left },
            Err(_elapsed) => Drained::Deadline { left },
        }
    }

    /// Guards held now.
    pub fn guards(&self) -> usize {
        self.0.guards.load(Ordering::Relaxed)
    }
}

impl Draining {
    /// Whether new work is to be refused or announced as the last (`Connection: close`). One atomic load.
    pub fn is_draining(&self) -> bool {
        self.0.phase.load(Ordering::Relaxed) != Phase::Accepting as u8
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        self.0.phase()
    }

    /// Waits until the drain has started. Dropping the future means nothing.
    pub async fn started(&self) {
        self.0.reached(Phase::Draining).await;
    }

    /// Waits until what is left is to be cut. Dropping the future means nothing.
    pub async fn done(&self) {
        self.0.reached(Phase::Done).await;
    }

    /// Counts one piece of work the drain shall wait for. Also possible while draining: an exchange
    /// begun on a connection that still counts is waited for too.
    pub fn guard(&self) -> Guard {
        self.0.guards.fetch_add(1, Ordering::SeqCst);
        Guard(Arc::clone(&self.0))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let last = self.0.guards.fetch_sub(1, Ordering::SeqCst) == 1;
        // While accepting nobody waits for zero. A drain that starts after this load finds the
        // count already lowered, both being sequentially consistent.
        if last && self.0.phase() != Phase::Accepting {
            self.0.changed.notify_waiters();
        }
    }
}

impl Shared {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Accepting,
            1 => Phase::Draining,
            _ => Phase::Done,
        }
    }

    fn advance(&self, to: Phase) {
        self.phase.fetch_max(to as u8, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    async fn reached(&self, phase: Phase) {
        self.wait(|shared| (shared.phase() >= phase).then_some(())).await;
    }

    /// Waits until `ready` gives a value, asking again at every change.
    async fn wait<T>(&self, ready: impl Fn(&Self) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Listening before asking: a change in between is not missed.
            changed.as_mut().enable();
            if let Some(value) = ready(self) {
                return value;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn drain_completes_when_the_last_guard_is_released() {
        let drain = Drain::new();
        let watch = drain.watch();
        let (connection, exchange) = (watch.guard(), watch.guard());
        assert!(!watch.is_draining());
        assert_eq!(drain.trigger(), Phase::Draining);
        assert!(watch.is_draining());

        let waiting = tokio::spawn({
            let drain = drain.clone();
            async move { drain.drained(LONG).await }
        });
        drop(connection);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(exchange);
        assert_eq!(waiting.await.unwrap(), Drained::Complete);
        assert_eq!(watch.phase(), Phase::Done);
    }

    #[tokio::test(start_paused = true)]
    async fn drain_gives_up_at_its_deadline_and_says_how_much_is_left() {
        let drain = Drain::new();
        let _held = drain.watch().guard();
        drain.trigger();
        assert_eq!(drain.drained(LONG).await, Drained::Deadline { left: 1 });
        assert_eq!(drain.watch().phase(), Phase::Done);
    }

    #[tokio::test(start_paused = true)]
    async fn second_trigger_ends_at_once() {
        let drain = Drain::new();
        let _held = drain.watch().guard();
        drain.trigger();
        let cut = tokio::spawn({
            let watch = drain.watch();
            async move { watch.done().await }
        });
        assert_eq!(drain.trigger(), Phase::Done);
        assert_eq!(drain.drained(LONG).await, Drained::AtOnce { left: 1 });
        cut.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_without_a_trigger_waits_for_one() {
        let drain = Drain::new();
        let waiting = tokio::spawn({
            let drain = drain.clone();
            async move { drain.drained(LONG).await }
        });
        let seen = tokio::spawn({
            let watch = drain.watch();
            async move { watch.started().await }
        });
        tokio::time::advance(LONG * 2).await;
        assert!(!waiting.is_finished());
        drain.trigger();
        assert_eq!(waiting.await.unwrap(), Drained::Complete);
        seen.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn work_of_a_dropped_future_is_not_waited_for() {
        let drain = Drain::new();
        let guard = drain.watch().guard();
        let work = tokio::spawn(async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        drain.trigger();
        work.abort();
        assert_eq!(drain.drained(LONG).await, Drained::Complete);
        assert_eq!(drain.guards(), 0);
    }
}
