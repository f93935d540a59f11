//! Leaving a leg that has not broken: its backend is on its way out, or it has been silent for too long.
//!
//! Make before break. Another leg is searched and begun while the old one is kept open, and the old one is closed
//! when the new one has something new to say. A replay runs after a client that still gets the old leg's tokens; a
//! continuation goes on from what was delivered when it was planned, so the old leg is not read until it speaks:
//! what comes meanwhile waits in the connection. Whatever fails on the way, the old leg goes on without loss. If the
//! old leg breaks first, the new one follows it like any other.
//!
//! Not here: when a stream should leave (`policy::moves`), what is new in a leg (`policy::resume`).

use std::collections::VecDeque;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::{Entry, EventRelay, NextLeg};
use crate::clock;
use crate::policy::Moment;
use crate::policy::health::Observation;
use crate::policy::moves::Step;
use crate::policy::retry::{Cause, Facts, Phase};
use crate::pool::About;
use crate::proxy::attempt::cut;
use crate::proxy::relay::lesson;
use crate::proxy::resume::{self, Next};
use crate::proxy::token_stream::Fault;
use crate::proxy::watch::Stage;
use crate::telemetry::metrics::AttemptOutcome;

/// A move that has begun.
pub(super) struct Move {
    why: Cause,
    /// The old leg must not be read.
    still: bool,
    /// None while it is searched.
    leg: Option<NextLeg>,
    /// The new leg owes an event since then.
    waits_since: Option<Moment>,
}

/// Whether this leg can stay where it is.
#[derive(Default)]
pub(super) struct Stay {
    /// Ejections of its backend when it was looked at.
    ejections: u64,
    /// Moves begun because the backend is on its way out.
    begun: u8,
}

impl EventRelay {
    /// Sets the clocks of a backend that is on its way out, and listens for what may happen to it.
    pub(super) fn look_whether_to_stay(&mut self) {
        let choice = &self.serving.choice;
        self.stay.ejections = choice.ejections().1;
        // First the counter: what happens behind this line rings.
        self.serving.watch.rescue_on(choice.calls());
        let due = match choice.backend().leaving_since() {
            None => None,
            Some(since) => match choice.pool.config.clocks.drain.step(since, self.stay.begun, clock::now()) {
                Step::Stay(until) => Some(until),
                Step::Move(_) | Step::End => Some(clock::now()),
            },
        };
        self.serving.watch.leave_at(due);
    }

    /// Something happened to the backend. False if this stream has to leave it at once: ejected, and silent.
    pub(super) fn may_stay(&mut self) -> bool {
        let ejected = self.serving.choice.ejections().1 != self.stay.ejections;
        if ejected && self.resume.is_some() && self.is_silent() {
            return false;
        }
        self.look_whether_to_stay();
        true
    }

    /// The backend is on its way out, and it is time to do something. False if it is time to break.
    pub(super) fn has_time(&mut self) -> bool {
        let choice = &self.serving.choice;
        let Some(since) = choice.backend().leaving_since() else {
            self.serving.watch.leave_at(None);
            return true;
        };
        let due = match choice.pool.config.clocks.drain.step(since, self.stay.begun, clock::now()) {
            Step::Stay(until) => until,
            Step::Move(again) => {
                self.stay.begun += 1;
                self.begin_move(Cause::Drain);
                again
            }
            Step::End => return false,
        };
        self.serving.watch.leave_at(Some(due));
        true
    }

    /// Begins to search for another leg beside this one, unless there is one, or nothing is left to be said.
    pub(super) fn begin_move(&mut self, why: Cause) {
        // A leg that has yet to prove itself is no place to move from.
        let unproven = self.spliced.as_ref().is_some_and(|spliced| !spliced.spoke);
        if self.moving.is_some() || unproven || self.has_all() {
            return;
        }
        let Some(resume) = &mut self.resume else { return };
        let choice = &self.serving.choice;
        // A drained backend's streams all leave at once, like those of a dead one.
        match resume.search_beside(choice, self.serving.ledger.attempts(), why == Cause::Drain) {
            Ok(still) => {
                // Silence is listened to: whichever speaks first is believed.
                let still = still && why != Cause::Silence;
                if still {
                    choice.in_flight.rests();
                    self.gaps.waits_since = None;
                }
                self.moving = Some(Box::new(Move { why, still, leg: None, waits_since: None }));
            }
            Err(refused) => choice.pool.state.metrics.count_move(why.name(), refused),
        }
    }

    /// The finish has been said.
    fn has_all(&self) -> bool {
        self.spliced.as_ref().map_or(self.stream.is_complete(), |spliced| spliced.finished)
    }

    /// Whether the old leg must not be read now.
    pub(super) fn is_still(&self) -> bool {
        self.moving.as_ref().is_some_and(|moving| moving.still)
    }

    /// The old leg said something: what was begun for its silence is not needed, nor anything behind its finish.
    pub(super) fn old_leg_spoke(&mut self, meaningful: bool) {
        let Some(moving) = &self.moving else { return };
        if (meaningful && moving.why == Cause::Silence) || self.resume.is_none() || self.has_all() {
            self.keep("kept");
        }
    }

    /// The old leg goes on, and the new one is given up, for this `reason`.
    pub(super) fn keep(&mut self, reason: &'static str) {
        let Some(moving) = self.moving.take() else { return };
        self.serving.choice.pool.state.metrics.count_move(moving.why.name(), reason);
        if let Some(resume) = &mut self.resume {
            resume.stop_search();
        }
        if let Some(leg) = moving.leg {
            self.give_up(leg, (AttemptOutcome::Cancelled, Observation::Neutral), reason);
        }
        // Time in which it was not read is not its silence.
        if moving.still && self.body.is_some() {
            let now = clock::now();
            self.clocks.since = now;
            self.serving.watch.enter(Stage::Body { idle: self.clocks.inter_token, since: now });
        }
    }

    /// Writes down a new leg that comes to nothing.
    fn give_up(&mut self, leg: NextLeg, lesson: (AttemptOutcome, Observation), cause: &'static str) {
        let NextLeg { choice, reused, first_byte, started, .. } = leg;
        let (outcome, observation) = lesson;
        choice.in_flight.rests();
        if observation == Observation::Fault {
            choice.count_fault();
        }
        self.serving.ledger.worker().with_rng(|rng| choice.observe(About::Model, observation, rng));
        self.serving.ledger.attempt(Entry {
            backend: choice.backend().clone(),
            role: resume::ROLE,
            outcome,
            cause,
            phase: Phase::Stream.name(),
            reused,
            started,
            first_byte,
            lasted: Some(clock::now().since(started)),
        });
    }

    /// Goes on with the move, if there is one. Ready when anything has changed.
    pub(super) fn poll_move(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(moving), Some(resume)) = (&mut self.moving, &mut self.resume) else { return Poll::Pending };
        let Some(leg) = &mut moving.leg else {
            let ledger = &mut self.serving.ledger;
            let Poll::Ready(next) = resume.poll_search(cx, |entry| ledger.attempt(entry)) else {
                return Poll::Pending;
            };
            self.found(next);
            return Poll::Ready(());
        };
        let polled = match &mut leg.body {
            Some(body) => body.poll_frame(cx),
            None => Poll::Ready(None),
        };
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                let now = clock::now();
                leg.watch.moved(now);
                leg.choice.in_flight.moved(now);
                moving.waits_since = None;
                if let Ok(chunk) = frame.into_data() {
                    let mut raw = VecDeque::new();
                    let fed = leg.stream.feed(chunk, &mut raw, |_, _| {});
                    self.feed_new_leg(raw, fed.broken);
                }
            }
            // It ended before it was ahead of the old leg.
            Poll::Ready(None) => self.new_leg_broke(Cause::EndedEarly),
            Poll::Ready(Some(Err(error))) => self.new_leg_broke(cut(&error)),
            Poll::Pending => match leg.watch.poll_expired(cx) {
                Poll::Ready(cause) => self.new_leg_broke(cause),
                Poll::Pending => {
                    if moving.waits_since.is_none() {
                        let now = clock::now();
                        moving.waits_since = Some(now);
                        leg.choice.in_flight.waits(now);
                    }
                    return Poll::Pending;
                }
            },
        }
        Poll::Ready(())
    }

    /// What the search came to.
    fn found(&mut self, next: Next) {
        let Some(moving) = &mut self.moving else { return };
        let why = moving.why;
        match next {
            Next::Leg(tried) => {
                let Some((mut leg, ahead)) = NextLeg::of(*tried) else { return self.keep("no_backend") };
                leg.choice.in_flight.streams();
                leg.watch.enter(Stage::Body { idle: self.clocks.inter_token, since: clock::now() });
                leg.watch.rescue_on(leg.choice.ejections());
                moving.leg = Some(leg);
                self.feed_new_leg(ahead, None);
            }
            Next::OtherWay => {
                self.keep("refused");
                self.begin_move(why);
            }
            Next::Kills => self.keep("request_kills_backends"),
            Next::End(reason) => self.keep(reason),
        }
    }

    /// Events of the new leg. The first that is new to the client ends the old one.
    fn feed_new_leg(&mut self, raw: VecDeque<Bytes>, broken: Option<Fault>) {
        let Some(resume) = &mut self.resume else { return };
        let (mut out, mut finished, mut abandoned) = (Vec::new(), false, None);
        for piece in raw {
            match resume.splice.feed_beside(&piece, &mut out) {
                Ok(fed) => finished = fed.finished,
                Err(why) => {
                    abandoned = Some(why);
                    break;
                }
            }
        }
        if out.is_empty() {
            if let Some(why) = abandoned {
                resume.abandon();
                let cause = self.moving.as_ref().map_or(Cause::Silence, |moving| moving.why);
                self.keep(why.name());
                // In another way, if there is one.
                return self.begin_move(cause);
            }
            return broken.map_or((), |fault| self.new_leg_broke(fault.cause));
        }
        self.change_legs(finished);
        self.ahead.push_back(out.into());
        match abandoned {
            Some(why) => self.abandon_leg(why),
            None => self.fed(broken),
        }
    }

    /// The new leg has spoken: the old one is left for it.
    fn change_legs(&mut self, finished: bool) {
        let (Some(moving), Some(resume)) = (self.moving.take(), &mut self.resume) else { return };
        let Some(leg) = moving.leg else { return };
        resume.left(&self.serving.choice);
        let strategy = resume.strategy();
        let old = self.serving.choice.backend().clone();
        self.serving.choice.pool.state.metrics.count_move(moving.why.name(), "moved");
        self.serving.choice.in_flight.rests();
        self.serving.left(moving.why);
        (self.gap_since, self.gap_cause) = (self.clocks.since, moving.why);
        self.follow(leg);
        if let Some(spliced) = &mut self.spliced {
            (spliced.spoke, spliced.finished, spliced.from) = (true, finished, None);
        }
        self.tell_goes_on(&old, strategy);
    }

    /// The new leg broke before it had anything new to say.
    fn new_leg_broke(&mut self, cause: Cause) {
        let Some(leg) = self.moving.as_mut().and_then(|moving| moving.leg.take()) else { return };
        if cause.lost_connection() {
            leg.choice.lost_connection();
        }
        let took = clock::now().since(leg.started);
        let facts = Facts { sent: true, answered: true, took, ..Facts::new(Phase::Stream, cause) };
        self.give_up(leg, lesson(&facts), cause.name());
        self.keep("broken");
    }

    /// The old leg has broken for `cause`: what was begun beside it follows.
    pub(super) fn break_in_move(&mut self, cause: Cause, facts: Option<&Facts>) {
        let (Some(moving), Some(resume)) = (self.moving.take(), &mut self.resume) else { return };
        self.serving.choice.pool.state.metrics.count_move(moving.why.name(), "broken_before");
        match moving.leg {
            // A search that may wait for room, and knows more of what happened.
            None => {
                resume.stop_search();
                self.go_on_or_end(cause, facts);
            }
            Some(leg) => {
                resume.follows(&self.serving.choice, facts);
                self.follow(leg);
            }
        }
    }
}
