//! Those who wait for a backend, and how they are called.
//!
//! One line a pool, and one more for each model that is judged by itself: who waits for one model must not
//! stand in the way of those who want another. The order is `policy::admission::Queue`'s. A call is for one
//! of two reasons. *A slot was freed*: whose turn it is takes it. *A look*: a backend returned, or time has
//! passed; it goes from one to the next as long as each finds a backend and the pace allows it. Whoever finds
//! nobody goes back to the front, and whoever leaves with a call in hand passes it on. Not here: choosing, and
//! how long to wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock;
use crate::policy::Moment;
use crate::policy::admission::{Full, Pace, Place, Priority, Queue};
use crate::pool::state::PoolState;

/// A look that finds nobody for the one whose turn it is goes on to so many behind: they may want less (one
/// that may be sent twice is let into probation, one that may not is not).
const LOOKS_BEHIND: usize = 4;

/// Those who wait for one pool, or for one model of it.
#[derive(Default)]
pub struct Line {
    /// Arrivals that wait, from joining to leaving: while there are any, whoever arrives joins behind them.
    arrivals: AtomicUsize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    queue: Queue<Arc<Call>>,
    /// A crowd is being let in.
    pace: Option<Pace>,
    /// A look is under way, and another was asked for meanwhile.
    looking: bool,
    look_again: bool,
    /// How many this look has found nobody for.
    in_vain: usize,
}

/// How one who waits is called.
#[derive(Debug, Default)]
struct Call {
    reason: AtomicU8,
    notify: Notify,
}

/// Why somebody is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// A slot was freed.
    Slot,
    /// Something may have changed.
    Look,
}

/// How one joins a line.
#[derive(Clone, Copy, Debug)]
pub struct Joining {
    /// Who goes first.
    pub priority: Priority,
    /// When it was admitted, where that was before: work that is done again goes before later arrivals.
    pub admitted: Option<Moment>,
    /// It was thrown off a backend that was ejected: paced, and in nobody's way.
    pub rescued: bool,
    /// End of the wait.
    pub deadline: Moment,
    /// Most that may wait in the pool.
    pub length_max: usize,
}

/// One who waits. Dropping it leaves the line; a call in hand goes to the next.
pub struct Waiting {
    state: Arc<PoolState>,
    line: Arc<Line>,
    call: Arc<Call>,
    place: Place,
    since: Moment,
    rescued: bool,
    left: bool,
}

impl Line {
    /// Whether somebody arrived earlier and still waits.
    pub(super) fn has_arrivals(&self) -> bool {
        self.arrivals.load(Ordering::SeqCst) > 0
    }

    /// Takes a place.
    pub(super) fn join(self: &Arc<Self>, state: &Arc<PoolState>, joining: Joining) -> Result<Waiting, Full> {
        let now = clock::now();
        let call = Arc::new(Call::default());
        let place = {
            let mut inner = self.inner.lock();
            let order = (joining.priority, joining.admitted.unwrap_or(now));
            // All lines of the pool together; the queue's own bound is the same number.
            if !state.one_more_waits(joining.priority, joining.length_max) {
                return Err(Full);
            }
            let joined = inner.queue.join(now, joining.length_max, order, joining.deadline, call.clone());
            let place = joined.inspect_err(|Full| state.one_less_waits(joining.priority))?;
            if joining.rescued {
                if inner.pace.is_none_or(|pace| pace.is_over(now)) {
                    inner.pace = Some(Pace::new(now));
                }
            } else {
                self.arrivals.fetch_add(1, Ordering::SeqCst);
            }
            // A slot may have been freed since the look that found none. Behind others that is theirs to find.
            if joining.rescued || inner.queue.len() == 1 {
                inner.call(Reason::Look, now);
            }
            place
        };
        let (state, line) = (state.clone(), self.clone());
        Ok(Waiting { state, line, call, place, since: now, rescued: joining.rescued, left: false })
    }

    /// Calls whose turn it is.
    pub(super) fn call(&self, reason: Reason, now: Moment) {
        self.inner.lock().call(reason, now);
    }

    /// A backend returned: those who wait are let in by and by.
    pub(super) fn backend_returned(&self, now: Moment) {
        let mut inner = self.inner.lock();
        if inner.queue.is_empty() {
            return;
        }
        match &mut inner.pace {
            Some(pace) if !pace.is_over(now) => pace.widen(),
            pace => *pace = Some(Pace::new(now)),
        }
        inner.call(Reason::Look, now);
    }

    /// One that was let in by the pace got its first token.
    pub(super) fn first_token(&self, now: Moment) {
        let mut inner = self.inner.lock();
        if let Some(pace) = &mut inner.pace {
            pace.proven();
            inner.call(Reason::Look, now);
        }
    }
}

impl Inner {
    fn call(&mut self, reason: Reason, now: Moment) {
        if reason == Reason::Look && self.looking {
            self.look_again = true;
            return;
        }
        // What a dead backend lets go of are no slots, and a slot that is free stays so until the pace allows it.
        if self.pace.is_some_and(|pace| !pace.allows(now)) {
            return;
        }
        let passed_over = if reason == Reason::Look { self.in_vain } else { 0 };
        let Some((_, call)) = self.queue.next_behind(now, passed_over) else {
            self.in_vain = 0;
            return;
        };
        self.looking |= reason == Reason::Look;
        call.set(Some(reason));
        call.notify.notify_one();
    }

    /// A look is over.
    fn looked(&mut self, found: bool) {
        self.looking = false;
        if found {
            self.in_vain = 0;
        }
    }
}

impl Call {
    fn set(&self, reason: Option<Reason>) {
        let code = match reason {
            None => 0,
            Some(Reason::Slot) => 1,
            Some(Reason::Look) => 2,
        };
        self.reason.store(code, Ordering::Release);
    }

    fn reason(&self) -> Option<Reason> {
        match self.reason.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Reason::Slot),
            _ => Some(Reason::Look),
        }
    }
}

impl Waiting {
    /// Waits for its turn until then; whether it has come. Dropping the future changes nothing.
    pub async fn turn(&self, until: Moment) -> bool {
        // Either way the call tells.
        let _ = tokio::time::timeout(until.since(clock::now()), self.call.notify.notified()).await;
        self.call.reason().is_some()
    }

    /// It found nobody, or waits for something else by now: back to its place, until `deadline`. `full` when
    /// somebody is up and only slots are missing: then those behind would find none either.
    pub fn wait_on(&mut self, deadline: Moment, full: bool) {
        let now = clock::now();
        let mut inner = self.line.inner.lock();
        match self.call.reason() {
            None => inner.queue.stay(self.place, deadline, self.call.clone()),
            Some(reason) => {
                self.call.set(None);
                inner.queue.put_back(self.place, deadline, self.call.clone());
                if reason == Reason::Look {
                    inner.looked(false);
                    // Slots, or the state of the backends, are the limit now.
                    inner.pace = None;
                    inner.in_vain += 1;
                    let on = !full && inner.in_vain <= LOOKS_BEHIND;
                    if !on {
                        inner.in_vain = 0;
                    }
                    if std::mem::take(&mut inner.look_again) || on {
                        inner.call(Reason::Look, now);
                    }
                }
            }
        }
    }

    /// It found somebody. The line, if it is to hear of the first token.
    pub fn let_in(mut self) -> Option<Arc<Line>> {
        let now = clock::now();
        let mut inner = self.line.inner.lock();
        let reason = self.call.reason();
        let paced = match &mut inner.pace {
            Some(pace) if !pace.is_over(now) => {
                pace.let_in();
                true
            }
            _ => false,
        };
        if reason == Some(Reason::Look) {
            inner.looked(true);
            inner.look_again = false;
            inner.call(Reason::Look, now);
        }
        drop(inner);
        self.leave();
        paced.then(|| self.line.clone())
    }

    fn leave(&mut self) {
        self.left = true;
        if !self.rescued {
            self.line.arrivals.fetch_sub(1, Ordering::SeqCst);
        }
        self.state.one_less_waits(self.place.priority());
        self.state.metrics.queue_wait.observe(clock::now().since(self.since).as_secs_f64());
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let mut inner = self.line.inner.lock();
        match self.call.reason() {
            None => {
                inner.queue.cancel(self.place);
            }
            Some(reason) => {
                if reason == Reason::Look {
                    inner.looked(false);
                }
                inner.call(reason, clock::now());
            }
        }
        drop(inner);
        self.leave();
    }
}
