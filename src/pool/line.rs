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
    /// Called and not yet heard of.
    called: usize,
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

    /// Time has passed: a look, unless somebody is called just now and will tell.
    pub(super) fn tick(&self, now: Moment) {
        let mut inner = self.inner.lock();
        if inner.called == 0 {
            inner.call(Reason::Look, now);
        }
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
        // Whoever looks just now finds the slot, or looks again: another called beside might overtake.
        if self.looking {
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
        self.called += 1;
        self.looking |= reason == Reason::Look;
        call.set(Some(reason));
        call.notify.notify_one();
    }

    /// Somebody who was called has found a backend, or none, or left.
    fn heard(&mut self, reason: Reason) {
        self.called -= 1;
        if reason == Reason::Look {
            self.looking = false;
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
                inner.heard(reason);
                if reason == Reason::Look {
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

    /// It found somebody, called or not. The line, if it is to hear of the first token.
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
        match reason {
            None => drop(inner.queue.cancel(self.place)),
            Some(Reason::Slot) => inner.heard(Reason::Slot),
            Some(Reason::Look) => {
                inner.heard(Reason::Look);
                (inner.in_vain, inner.look_again) = (0, false);
                inner.call(Reason::Look, now);
            }
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
                inner.heard(reason);
                inner.call(reason, clock::now());
            }
        }
        drop(inner);
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::policy::progress::ProgressPolicy;
    use crate::telemetry::Telemetry;

    fn pool() -> Arc<PoolState> {
        Arc::new(PoolState::new("p", &ProgressPolicy::default(), Arc::new(Telemetry::silent())))
    }

    fn joining() -> Joining {
        Joining {
            priority: Priority::Normal,
            admitted: None,
            rescued: false,
            deadline: clock::now() + Duration::from_secs(60),
            length_max: 1024,
        }
    }

    /// Joins, and takes the look that the first of a line has at once.
    fn joined(pool: &Arc<PoolState>) -> Waiting {
        let mut waiting = pool.join(None, joining()).unwrap();
        if called(&waiting) {
            waiting.wait_on(joining().deadline, true);
        }
        waiting
    }

    fn called(waiting: &Waiting) -> bool {
        waiting.call.reason().is_some()
    }

    fn which(waiting: &[Waiting]) -> Vec<usize> {
        (0..waiting.len()).filter(|&n| called(&waiting[n])).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_of_a_line_looks_once_more_from_inside() {
        let pool = pool();
        let first = pool.join(None, joining()).unwrap();
        assert!(called(&first), "a slot freed between its look and its joining would be missed");
        assert!(!called(&pool.join(None, joining()).unwrap()));
    }

    #[tokio::test(start_paused = true)]
    async fn each_slot_calls_one_in_order_and_each_call_wakes_its_own() {
        let pool = pool();
        let waiting: Vec<Waiting> = (0..3).map(|_| joined(&pool)).collect();
        assert_eq!(which(&waiting), [0; 0]);
        pool.slot_freed();
        assert_eq!(which(&waiting), [0]);
        pool.slot_freed();
        assert_eq!(which(&waiting), [0, 1]);
        assert!(waiting[1].turn(joining().deadline).await);
        let begin = clock::now();
        assert!(!waiting[2].turn(begin + Duration::from_secs(3)).await);
        assert!(clock::now().since(begin) >= Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_nobody_is_called_first_again() {
        let pool = pool();
        let mut waiting: Vec<Waiting> = (0..3).map(|_| joined(&pool)).collect();
        pool.slot_freed();
        waiting[0].wait_on(joining().deadline, true);
        assert_eq!(which(&waiting), [0; 0]);
        pool.slot_freed();
        assert_eq!(which(&waiting), [0]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_with_a_call_in_hand_passes_it_on() {
        for look in [false, true] {
            let pool = pool();
            let mut waiting: Vec<Waiting> = (0..4).map(|_| joined(&pool)).collect();
            if look {
                pool.look()
            } else {
                pool.slot_freed()
            }
            assert_eq!(which(&waiting), [0]);
            drop(waiting.remove(0));
            assert_eq!(which(&waiting), [0], "the second");
            drop(waiting.pop());
            assert_eq!((which(&waiting), pool.waiters()), (vec![0], 2));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_goes_on_while_each_finds_somebody() {
        let pool = pool();
        let mut waiting: Vec<Waiting> = (0..5).map(|_| joined(&pool)).collect();
        pool.look();
        for left in (3..5).rev() {
            assert_eq!(which(&waiting), [0], "one at a time");
            assert!(waiting.remove(0).let_in().is_none(), "no crowd, no pace");
            assert_eq!(pool.waiters(), left);
        }
        waiting[0].wait_on(joining().deadline, true);
        assert_eq!(which(&waiting), [0; 0]);
        // A freed slot is for one only.
        pool.slot_freed();
        waiting.remove(0).let_in();
        assert_eq!(which(&waiting), [0; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_passes_those_by_for_whom_nobody_is_there() {
        let pool = pool();
        let mut waiting: Vec<Waiting> = (0..10).map(|_| joined(&pool)).collect();
        pool.look();
        for n in 0..=LOOKS_BEHIND {
            assert_eq!(which(&waiting), [n]);
            waiting[n].wait_on(joining().deadline, false);
        }
        assert_eq!(which(&waiting), [0; 0], "that was enough");
        pool.look();
        assert_eq!(which(&waiting), [0], "from the front again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_returning_backend_lets_in_a_few_and_more_with_time_and_first_tokens() {
        let pool = pool();
        let mut waiting: Vec<Waiting> = (0..100).map(|_| joined(&pool)).collect();
        let let_in = |waiting: &mut Vec<Waiting>| {
            let mut lines = Vec::new();
            while waiting.first().is_some_and(called) {
                lines.push(waiting.remove(0).let_in().expect("paced"));
            }
            lines
        };
        pool.backend_returned();
        let first = let_in(&mut waiting);
        assert_eq!(first.len(), 8);
        pool.slot_freed();
        assert_eq!(which(&waiting), [0; 0], "no way around the pace");
        for line in &first {
            line.first_token(clock::now());
        }
        assert_eq!(let_in(&mut waiting).len(), 16);
        tokio::time::advance(Duration::from_millis(250)).await;
        pool.look();
        assert_eq!(let_in(&mut waiting).len(), 8);
        tokio::time::advance(Duration::from_secs(2)).await;
        pool.look();
        while waiting.first().is_some_and(called) {
            waiting.remove(0).let_in();
        }
        assert_eq!(waiting.len(), 0);
        assert_eq!(pool.waiters(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_ejection_throws_off_is_paced_and_in_nobodys_way() {
        let pool = pool();
        let rescued = Joining { rescued: true, admitted: Some(Moment::ZERO), ..joining() };
        let mut crowd: Vec<Waiting> = (0..20).map(|_| pool.join(None, rescued).unwrap()).collect();
        assert!(!pool.someone_waits(None), "arrivals need not wait for them");
        let mut let_in = 0;
        while let Some(n) = which(&crowd).first() {
            crowd.remove(*n).let_in();
            let_in += 1;
        }
        assert_eq!(let_in, 8);
        (0..20).for_each(|_| pool.slot_freed());
        assert_eq!(which(&crowd), [0; 0], "what a dead backend lets go of are no slots");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_one_model_is_not_in_the_way_of_another_and_counts_all_the_same() {
        let pool = pool();
        let joining = Joining { length_max: 2, ..joining() };
        let one = pool.join(Some("one"), joining).unwrap();
        assert!(pool.someone_waits(Some("one")) && !pool.someone_waits(Some("other")));
        let other = pool.join(Some("other"), joining).unwrap();
        assert!(pool.join(None, joining).is_err(), "the bound is the pool's");
        drop(one);
        assert!(!pool.someone_waits(Some("one")) && pool.someone_waits(Some("other")));
        drop(other);
        assert_eq!((pool.waiters(), pool.metrics.waiting.get()), (0, 0));
    }
}
