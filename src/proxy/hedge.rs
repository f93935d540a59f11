//! One attempt, and when its first token is late another beside it: whichever speaks first is believed, the other
//! is cancelled. Only for requests that may run twice, and within the bounds of `policy::hedge`.
//!
//! A late backend that was overtaken is told to its judge; what was cancelled only because the late one spoke
//! after all teaches nothing.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use parking_lot::Mutex;

use crate::clock;
use crate::policy::Moment;
use crate::policy::health::Observation;
use crate::policy::retry::{Next, Verdict, verdict};
use crate::pool::{About, Backend, Choice, Hedge, Wanted};
use crate::proxy::attempt::{Attempt, Outcome};
use crate::proxy::exchange::Exchange;
use crate::proxy::ledger::Entry;
use crate::proxy::replay_body::ReplayBody;
use crate::proxy::watch::Watch;
use crate::telemetry::metrics::AttemptOutcome;
use crate::upstream::{OutBody, Want};

/// An attempt that has ended.
pub(super) struct Tried {
    /// Whom it asked.
    pub(super) choice: Choice,
    /// What came of it.
    pub(super) outcome: Box<Outcome>,
    /// Its clocks.
    pub(super) watch: Watch,
}

/// A second attempt, beside one that is late.
struct Beside<'a> {
    running: Pin<Box<dyn Future<Output = Box<Tried>> + Send + 'a>>,
    backend: Arc<Backend>,
    started: Moment,
    /// Counts it until it has ended.
    _hedge: Hedge,
}

/// How a race ended.
struct Raced {
    /// What came of the first attempt, if it ended.
    first: Option<Box<Outcome>>,
    /// The second, if it ended.
    second: Option<Box<Tried>>,
    /// Where and since when the second ran, if it was cancelled.
    cancelled: Option<(Arc<Backend>, Moment)>,
}

impl Exchange {
    /// Tries `choice`, and a peer of it when it is late.
    pub(super) async fn attempt(&mut self, choice: Choice) -> Tried {
        let movable = self.is_replayable();
        let want = match () {
            () if self.asked.upgrade.is_some() => Want::Upgradable,
            () if self.fresh => Want::Fresh,
            // A kept connection may be closing: what was sent on it may or may not have been executed.
            () if !movable => Want::Sure,
            () => Want::Any,
        };
        let alarm = self.alarm.take().unwrap_or_else(|| self.worker.alarms.alarm());
        let mut watch = Watch::new(alarm, self.leg.total);
        // Shared by the two, of which only one is ever polled at a time.
        let body = Mutex::new(std::mem::take(&mut self.body));
        let raced = {
            let attempt = Attempt {
                worker: &self.worker,
                asked: &self.asked,
                leg: &self.leg,
                choice: &choice,
                number: u32::from(self.ledger.attempts()) + 1,
                want,
                movable,
                watch: &mut watch,
            };
            // Boxed: it is the largest part of all futures around it, and they are moved more often than it is made.
            let mut first = Box::pin(attempt.run(|| body.lock().out(self.leg.body.as_ref())));
            self.race(first.as_mut(), &choice, movable.then_some(&body)).await
        };
        watch.keep();
        self.body = body.into_inner();
        let tried = self.settle_race(choice, raced, watch);
        match self.doubtful(&tried.outcome) {
            None => tried,
            Some(unit) => Box::pin(self.ask_about(tried, unit)).await,
        }
    }

    /// Runs `first` to its end; beside it, once it is late, a second attempt with the same `body`.
    async fn race<F>(
        &self,
        mut first: Pin<&mut F>,
        choice: &Choice,
        mut body: Option<&Mutex<ReplayBody>>,
    ) -> Raced
    where
        F: Future<Output = Box<Outcome>>,
    {
        let mut beside: Option<Beside<'_>> = None;
        // Whichever of the two failed while the other went on; boxed, for it is rare and the future is moved often.
        let (mut failed_first, mut failed_second): (Option<Box<Outcome>>, Option<Box<Tried>>) = (None, None);
        poll_fn(|cx| {
            if failed_first.is_none()
                && let Poll::Ready(outcome) = first.as_mut().poll(cx)
            {
                if spoke(&outcome) || beside.is_none() {
                    let cancelled = beside.take().map(|second| (second.backend, second.started));
                    return Poll::Ready(Raced {
                        first: Some(outcome),
                        second: failed_second.take(),
                        cancelled,
                    });
                }
                failed_first = Some(outcome);
            }
            if body.is_some() && failed_first.is_none() && choice.in_flight.is_late() {
                beside = body
                    .take()
                    .and_then(|body| self.begin_beside(choice, body.lock().out(self.leg.body.as_ref())));
            }
            if let Some(second) = &mut beside
                && let Poll::Ready(tried) = second.running.as_mut().poll(cx)
            {
                beside = None;
                if spoke(&tried.outcome) || failed_first.is_some() {
                    let first = failed_first.take();
                    return Poll::Ready(Raced { first, second: Some(tried), cancelled: None });
                }
                failed_second = Some(tried);
            }
            Poll::Pending
        })
        .await
    }

    /// A second attempt, if somebody can take it and the pool can afford it.
    fn begin_beside(&self, late: &Choice, body: OutBody) -> Option<Beside<'_>> {
        // Slots are short: those who wait need them more.
        if self.leg.pool.state.waiters() > 0 {
            return None;
        }
        let tried: smallvec::SmallVec<[_; 4]> =
            self.tried.iter().copied().chain([late.backend().id]).collect();
        // Never somebody's trial: what is late already must not wait for a convalescent.
        let since = Some(late.in_flight.started());
        let wanted = Wanted { tried: &tried, proven_since: since, replayable: false, ..self.wanted() };
        let choice = self.worker.with_rng(|rng| self.leg.pool.pick(&wanted, rng)).ok()?;
        let Some(hedge) = self.leg.pool.state.may_hedge(&self.leg.policy, &self.leg.pool.config.progress)
        else {
            self.leg.pool.state.metrics.count_hedge("refused");
            choice.nothing_sent();
            return None;
        };
        let backend = choice.backend().clone();
        let (worker, asked, leg) = (&self.worker, &self.asked, &self.leg);
        let number = u32::from(self.ledger.attempts()) + 2;
        let running = Box::pin(async move {
            let mut watch = Watch::new(worker.alarms.alarm(), leg.total);
            let attempt = Attempt {
                worker,
                asked,
                leg,
                choice: &choice,
                number,
                want: Want::Any,
                movable: true,
                watch: &mut watch,
            };
            let outcome = attempt.run(|| body).await;
            watch.keep();
            Box::new(Tried { choice, outcome, watch })
        });
        Some(Beside { running, backend, started: clock::now(), _hedge: hedge })
    }

    /// Writes down what is not gone on with, and returns what is.
    fn settle_race(&mut self, choice: Choice, raced: Raced, watch: Watch) -> Tried {
        let metrics = &self.leg.pool.state.metrics;
        if let Some((backend, started)) = raced.cancelled {
            metrics.count_hedge("lost");
            // What is gone on with is written down after it.
            self.ledger.attempt(beside_entry(
                backend,
                "hedge",
                AttemptOutcome::Cancelled,
                "hedge_lost",
                started,
            ));
            self.history.sent = self.history.sent.saturating_add(1);
        }
        let first = raced.first.map(|mut outcome| {
            // A body that was given away cannot be sent again, whatever became of it.
            outcome.facts.sent |= !self.body.is_here();
            outcome
        });
        match (first, raced.second) {
            (Some(outcome), None) => Tried { choice, outcome, watch },
            (None, Some(second)) => {
                metrics.count_hedge("won");
                self.overtaken(&choice, &second.outcome);
                self.hedged = Some(second.choice.backend().id);
                self.alarm = Some(watch.into_alarm());
                *second
            }
            (Some(outcome), Some(second)) if spoke(&outcome) || !spoke(&second.outcome) => {
                metrics.count_hedge("lost");
                self.hedged = Some(second.choice.backend().id);
                self.learn_aside(&second);
                Tried { choice, outcome, watch }
            }
            (Some(outcome), Some(second)) => {
                metrics.count_hedge("won");
                let first = Tried { choice, outcome, watch };
                self.learn_aside(&first);
                self.hedged = Some(second.choice.backend().id);
                *second
            }
            (None, None) => unreachable!("a race ends with one of the two"),
        }
    }

    /// The late one of two was cancelled because the other spoke first.
    fn overtaken(&mut self, late: &Choice, by: &Outcome) {
        if by.facts.took < self.leg.pool.soft_first_token(late.in_flight.kind()) {
            // Its class is as fast as ever: that it was cut off says nothing about the class.
            late.in_flight.rests();
        }
        self.worker.with_rng(|rng| late.observe(About::Model, Observation::Silent, rng));
        let started = late.in_flight.started();
        let role = self.role(late);
        let entry =
            beside_entry(late.backend().clone(), role, AttemptOutcome::Overtaken, "overtaken", started);
        self.ledger.attempt(entry);
        self.history.sent = self.history.sent.saturating_add(1);
    }

    /// An attempt that failed beside another: its judge learns of it, and it is not tried again.
    pub(super) fn learn_aside(&mut self, failed: &Tried) {
        let verdict = verdict(&failed.outcome.facts);
        self.learn(&failed.choice, &failed.outcome, verdict, Next::Failover);
        self.history.add(&failed.outcome.facts);
        // The one it ran beside is about to be looked into; it remembers this one then.
        self.inquest.opens(&failed.choice, &failed.outcome.facts);
        self.tried.push(failed.choice.backend().id);
    }
}

/// Whether the backend gave an answer that may be shown, even if it is the client's fault.
fn spoke(outcome: &Outcome) -> bool {
    match verdict(&outcome.facts) {
        Verdict::Success => true,
        Verdict::Neutral => outcome.facts.cause.is_answer(),
        Verdict::Fault | Verdict::Busy | Verdict::Misconfigured | Verdict::Cancelled => false,
    }
}

fn beside_entry(
    backend: Arc<Backend>,
    role: &'static str,
    outcome: AttemptOutcome,
    cause: &'static str,
    started: Moment,
) -> Entry {
    Entry {
        backend,
        role,
        outcome,
        cause,
        phase: "gate",
        reused: false,
        started,
        first_byte: None,
        lasted: Some(clock::now().since(started)),
    }
}
