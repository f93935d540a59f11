//! The clocks of an attempt (failures.md §4), all on one coarse alarm.
//!
//! A stage says what is being waited for; when the alarm rings, the facts say whether that is too long or
//! the alarm is set anew. In ordinary traffic it is set once an attempt and never rings.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::clock::{self, Alarm};
use crate::policy::Moment;
use crate::policy::retry::Cause;
use crate::pool::Unfinished;
use crate::upstream::Traffic;

/// The clocks of one attempt.
pub(super) struct Watch {
    alarm: Alarm,
    /// End of the whole exchange.
    total: Option<Moment>,
    /// Who is told when the attempt is late, by its clock of that time.
    late: Option<Arc<Unfinished>>,
    /// When it is to be looked at because its backend is on its way out.
    leave: Option<Moment>,
    stage: Stage,
}

/// What is being waited for.
pub(super) enum Stage {
    /// The response head.
    Head(HeadStage),
    /// The first token of a stream: due then, whatever comes before it.
    Gate {
        /// When.
        due: Moment,
    },
    /// The next bytes of a body.
    Body {
        /// Longest silence.
        idle: Duration,
        /// The latest sign of life.
        since: Moment,
    },
    /// Nothing: the total clock alone.
    Open,
}

/// The response head of a request that is being sent.
pub(super) struct HeadStage {
    /// The head is due then; what the expiry is called is the same for streams and answers.
    pub due: Moment,
    /// From the first byte of the head to its end.
    pub head: Duration,
    /// A backend that takes nothing of the request.
    pub write_idle: Duration,
    /// What passes over the connection; none where it is shared (HTTP/2).
    pub traffic: Option<Arc<Traffic>>,
    /// Bytes that had been written before this request, and how many it has at least.
    pub request: (u64, u64),
    /// Bytes written at the latest look, and when they last grew.
    pub progress: (u64, Moment),
}

impl Watch {
    /// No clock but the total one.
    pub(super) fn new(alarm: Alarm, total: Option<Moment>) -> Self {
        Self { alarm, total, late: None, leave: None, stage: Stage::Open }
    }

    /// From now on this is waited for.
    pub(super) fn enter(&mut self, stage: Stage) {
        // Only a head is measured from when it is entered, and it says when that was.
        let now = if let Stage::Head(head) = &stage { head.progress.1 } else { Moment::ZERO };
        self.stage = stage;
        self.arm(now);
    }

    /// The body showed a sign of life. Costs one atomic store.
    pub(super) fn moved(&mut self, now: Moment) {
        if let Stage::Body { since, .. } = &mut self.stage {
            *since = now;
        }
    }

    /// The attempt is to be given up as soon as `epoch` moves: its backend was ejected.
    pub(super) fn rescue_on(&self, (epoch, seen): (Arc<AtomicU64>, u64)) {
        self.alarm.watch(Some(epoch), seen);
    }

    /// The stream is to be looked at then: its backend is on its way out. Expires as [`Cause::Drain`].
    pub(super) fn leave_at(&mut self, at: Option<Moment>) {
        self.leave = at;
        self.arm(Moment::ZERO);
    }

    /// `attempt` is told when its first token is late by its own clock, which may change while it waits.
    pub(super) fn tell_late(&mut self, attempt: Arc<Unfinished>) {
        self.late = Some(attempt);
    }

    /// It is to be kept from now on, whatever happens to its backend.
    pub(super) fn keep(&mut self) {
        self.late = None;
        self.alarm.watch(None, 0);
    }

    /// The alarm itself, for the next attempt.
    pub(super) fn into_alarm(mut self) -> Alarm {
        self.keep();
        self.alarm.clear();
        self.alarm
    }

    /// Waits for `future` as long as the clocks allow.
    pub(super) async fn over<F: Future>(&mut self, future: F) -> Result<F::Output, Cause> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            self.poll_expired(cx).map(Err)
        })
        .await
    }

    /// Ready with the reason once something has taken too long.
    pub(super) fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        while self.alarm.poll_expired(cx).is_ready() {
            if self.alarm.rang_for_epoch() {
                return Poll::Ready(Cause::Rescued);
            }
            let now = clock::now();
            if let Some(cause) = self.expired(now) {
                return Poll::Ready(cause);
            }
            self.look_whether_late(now);
            self.arm(now);
        }
        Poll::Pending
    }

    fn look_whether_late(&mut self, now: Moment) {
        if let Some(attempt) = self.late.take_if(|attempt| attempt.late_at() <= now) {
            attempt.set_late();
        }
    }

    fn expired(&mut self, now: Moment) -> Option<Cause> {
        if self.total.is_some_and(|total| total <= now) {
            return Some(Cause::TotalTimeout);
        }
        if self.leave.is_some_and(|leave| leave <= now) {
            return Some(Cause::Drain);
        }
        match &mut self.stage {
            Stage::Head(stage) => stage.expired(now),
            Stage::Gate { due } => (*due <= now).then_some(Cause::FirstTokenTimeout),
            Stage::Body { idle, since } => (*since + *idle <= now).then_some(Cause::Silence),
            Stage::Open => None,
        }
    }

    /// Sets the alarm to the earliest moment at which anything can have expired.
    fn arm(&self, now: Moment) {
        let due = match &self.stage {
            Stage::Head(stage) => Some(stage.next(now)),
            Stage::Gate { due } => Some(*due),
            Stage::Body { idle, since } => Some(*since + *idle),
            Stage::Open => None,
        };
        let late = self.late.as_ref().map(|attempt| attempt.late_at());
        match [due, self.total, late, self.leave].into_iter().flatten().min() {
            Some(at) => self.alarm.set(at),
            None => self.alarm.clear(),
        }
    }
}

impl HeadStage {
    fn expired(&mut self, now: Moment) -> Option<Cause> {
        if self.due <= now {
            return Some(Cause::FirstTokenTimeout);
        }
        let traffic = self.traffic.as_ref()?;
        // Dribbled bytes are no progress: only the first one counts.
        if traffic.first_read().is_some_and(|first| first + self.head <= now) {
            return Some(Cause::HeadTimeout);
        }
        let written = traffic.written();
        if written > self.progress.0 {
            self.progress = (written, now);
        }
        (self.is_writing() && self.progress.1 + self.write_idle <= now).then_some(Cause::WriteTimeout)
    }

    fn is_writing(&self) -> bool {
        self.progress.0 - self.request.0 < self.request.1
    }

    fn next(&self, now: Moment) -> Moment {
        let Some(traffic) = &self.traffic else { return self.due };
        let head = traffic.first_read().unwrap_or(now) + self.head;
        let write = if self.is_writing() { self.progress.1 + self.write_idle } else { Moment::NEVER };
        // `progress` is as old as the latest look: never ask for a moment that has passed.
        self.due.min(head).min(write.max(now + clock::ALARM_TICK))
    }
}
