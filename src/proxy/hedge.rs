//! One attempt, and when its first token is late another beside it: whichever speaks first is believed, the other
//! is cancelled. Only for requests that may run twice, and within the bounds of `policy::hedge`. The second runs in
//! the same pool, or, where nobody there is likely to be faster, in one that it falls back to for `slow`.
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
use crate::policy::fallback::{FallbackCause, Used};
use crate::policy::health::Observation;
use crate::policy::retry::{Next, Verdict, verdict};
use crate::pool::{About, Backend, Choice, Hedge, Wanted};
use crate::proxy::attempt::{Attempt, Outcome};
use crate::proxy::exchange::Exchange;
use crate::proxy::ledger::Entry;
use crate::proxy::leg::Leg;
use crate::proxy::replay_body::ReplayBody;
use crate::proxy::watch::Watch;
use crate::telemetry::metrics::AttemptOutcome;
use crate::upstream::Want;

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
    running: Pin<Box<dyn Future<Output = Box<Second>> + Send + 'a>>,
    backend: Arc<Backend>,
    started: Moment,
    /// Counts it until it has ended.
    _hedge: Hedge,
}

/// A second attempt that has ended.
struct Second {
    tried: Tried,
    /// How its pool was asked, where that is another one.
    leg: Option<Leg>,
}

impl Second {
    /// Whether it gave an answer that may be shown. Another model's view of what is wrong with a request is none:
    /// the pool that was asked first may be content with it.
    fn spoke(&self) -> bool {
        match self.leg {
            None => spoke(&self.tried.outcome),
            Some(_) => verdict(&self.tried.outcome.facts) == Verdict::Success,
        }
    }
}

/// How a race ended.
struct Raced {
    /// What came of the first attempt, if it ended.
    first: Option<Box<Outcome>>,
    /// The second, if it ended.
    second: Option<Box<Second>>,
    /// Where and since when the second ran, if it was cancelled.
    cancelled: Option<(Arc<Backend>, Moment)>,
    /// The fallbacks that were used, the second attempt's included.
    fallbacks_used: Used,
}

impl Exchange {
    /// Tries `choice`, and a peer of it when it is late, or its whole answer doubtful.
    pub(super) async fn attempt(&mut self, choice: Choice) -> Tried {
        let movable = self.is_replayable();
        let want = match () {
            () if self.asked.upgrade.is_some() => Want::Upgradable,
            () if self.body.is_streamed() => Want::Streamed,
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
        let (mut failed_first, mut failed_second): (Option<Box<Outcome>>, Option<Box<Second>>) = (None, None);
        let mut fallbacks_used = self.fallbacks_used;
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
                        fallbacks_used,
                    });
                }
                failed_first = Some(outcome);
            }
            if body.is_some() && failed_first.is_none() && choice.in_flight.is_late() {
                beside = body.take().and_then(|body| self.begin_beside(choice, body, &mut fallbacks_used));
            }
            if let Some(running) = &mut beside
                && let Poll::Ready(second) = running.running.as_mut().poll(cx)
            {
                beside = None;
                if second.spoke() || failed_first.is_some() {
                    let first = failed_first.take();
                    return Poll::Ready(Raced {
                        first,
                        second: Some(second),
                        cancelled: None,
                        fallbacks_used,
                    });
                }
                failed_second = Some(second);
            }
            Poll::Pending
        })
        .await
    }

    /// A second attempt, if somebody can take it and the pool can afford it. Preferably at a peer, unless that is
    /// doubtful; else at a pool that serves for `slow`, whose entry is then `used`.
    fn begin_beside(&self, late: &Choice, body: &Mutex<ReplayBody>, used: &mut Used) -> Option<Beside<'_>> {
        let state = &self.leg.pool.state;
        let since = late.in_flight.started();
        let mut peer = self.pick_beside(since, late);
        let serves = peer.as_ref().is_some_and(|peer| !peer.is_doubtful(since));
        let elsewhere = !serves && self.fallback_after(*used, FallbackCause::Slow).is_some();
        if peer.is_none() && !elsewhere {
            return None;
        }
        let Some(hedge) = state.may_hedge(&self.leg.policy, &self.leg.pool.config.progress) else {
            state.metrics.count_hedge("refused");
            if let Some(peer) = &peer {
                peer.nothing_sent();
            }
            return None;
        };
        let mut body = body.lock();
        let (choice, leg) = match elsewhere.then(|| self.pick_elsewhere(since, &body, used)).flatten() {
            Some((choice, leg)) => {
                self.routed_leg().pool.state.metrics.count_fallback(FallbackCause::Slow.name());
                if let Some(peer) = peer.take() {
                    peer.nothing_sent();
                }
                (choice, Some(leg))
            }
            None => (peer?, None),
        };
        let body = body.out(leg.as_ref().unwrap_or(&self.leg).body.as_ref());
        let backend = choice.backend().clone();
        let (worker, asked, own) = (&self.worker, &self.asked, &self.leg);
        let number = u32::from(self.ledger.attempts()) + 2;
        let running = Box::pin(async move {
            let asked_so = leg.as_ref().unwrap_or(own);
            let mut watch = Watch::new(worker.alarms.alarm(), asked_so.total);
            let attempt = Attempt {
                worker,
                asked,
                leg: asked_so,
                choice: &choice,
                number,
                want: Want::Any,
                movable: true,
                watch: &mut watch,
            };
            let outcome = attempt.run(|| body).await;
            watch.keep();
            Box::new(Second { tried: Tried { choice, outcome, watch }, leg })
        });
        Some(Beside { running, backend, started: clock::now(), _hedge: hedge })
    }

    /// A peer of the `late` one, which has waited `since` then.
    fn pick_beside(&self, since: Moment, late: &Choice) -> Option<Choice> {
        // Slots are short: those who wait need them more.
        if self.leg.pool.state.waiters() > 0 {
            return None;
        }
        let tried: smallvec::SmallVec<[_; 4]> =
            self.tried.iter().copied().chain([late.backend().id]).collect();
        // Never somebody's trial: what is late already must not wait for a convalescent.
        let wanted = Wanted { tried: &tried, proven_since: Some(since), replayable: false, ..self.wanted() };
        self.worker.with_rng(|rng| self.leg.pool.pick(&wanted, rng)).ok()
    }

    /// A backend of the first pool for `slow` that has one to spare, and how it is asked.
    fn pick_elsewhere(&self, since: Moment, body: &ReplayBody, used: &mut Used) -> Option<(Choice, Leg)> {
        let mut seen = *used;
        while let Some(i) = self.fallback_after(seen, FallbackCause::Slow) {
            seen.add(i);
            let Some(leg) = self.leg_of(i, body).filter(|leg| leg.pool.state.waiters() == 0) else {
                continue;
            };
            let wanted = Wanted {
                tried: &[],
                model: leg.pool.judged_model(leg.model.as_deref()),
                affinity: leg.affinity,
                proven_since: Some(since),
                replayable: false,
                ..self.wanted()
            };
            if let Ok(choice) = self.worker.with_rng(|rng| leg.pool.pick(&wanted, rng)) {
                used.add(i);
                return Some((choice, leg));
            }
        }
        None
    }

    /// Writes down what is not gone on with, and returns what is; `self.leg` is then the pool that it asked.
    fn settle_race(&mut self, choice: Choice, raced: Raced, watch: Watch) -> Tried {
        self.fallbacks_used = raced.fallbacks_used;
        let pool = self.leg.pool.clone();
        let metrics = &pool.state.metrics;
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
                self.overtaken(&choice, &second);
                self.alarm = Some(watch.into_alarm());
                self.go_on_with(*second)
            }
            (Some(outcome), Some(second)) if spoke(&outcome) || !second.spoke() => {
                metrics.count_hedge("lost");
                self.hedged = Some(second.tried.choice.backend().id);
                self.learn_aside(&second.tried);
                Tried { choice, outcome, watch }
            }
            (Some(outcome), Some(second)) => {
                metrics.count_hedge("won");
                let first = Tried { choice, outcome, watch };
                self.learn_aside(&first);
                self.go_on_with(*second)
            }
            (None, None) => unreachable!("a race ends with one of the two"),
        }
    }

    /// The second has won; where it ran in another pool, the exchange is there from now on.
    fn go_on_with(&mut self, second: Second) -> Tried {
        let Second { tried, leg } = second;
        self.hedged = Some(tried.choice.backend().id);
        if let Some(leg) = leg {
            self.fall_back(leg, None);
        }
        tried
    }

    /// The late one of two was cancelled because the other spoke first.
    fn overtaken(&mut self, late: &Choice, by: &Second) {
        // Another pool is no peer: what it can do says nothing about this one, nor about its clocks.
        if by.leg.is_none() {
            if by.tried.outcome.facts.took < self.leg.pool.soft_first_token(late.in_flight.kind()) {
                // Its class is as fast as ever: that it was cut off says nothing about the class.
                late.in_flight.rests();
            }
            self.worker.with_rng(|rng| late.observe(About::Model, Observation::Silent, rng));
        }
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
