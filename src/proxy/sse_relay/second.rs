//! What the relay does with a second opinion: hold back, let go, or go on with the peer's leg.
//!
//! What is held, and what the peer is asked and heard, is `proxy::opinion`. A leg that is taken over had its first
//! words verified before the old one is closed, as in a move (`moves`); a move under way is given up for it. Whatever
//! else becomes of the leg (it ends, breaks, is left), what is held is let go before, or waits with it for the peer.

use std::task::{Context, Poll};

use bytes::Bytes;

use super::EventRelay;
use crate::proxy::opinion::{Over, Settled, Taken};
use crate::proxy::relay::Serving;
use crate::telemetry::events::OutputDisputed;

impl EventRelay {
    /// A chunk of the first leg was read: is there still `room` for what the client has, and is a peer to be asked?
    pub(super) fn keep_watching(&mut self, room: bool, ask: bool) {
        if !room {
            self.stop_watching();
            self.resume = None;
        } else if ask
            && let (Some(opinions), Some(resume)) = (&mut self.opinions, &mut self.resume)
            && !opinions.ask(resume, &self.serving.choice, self.serving.ledger.attempts())
        {
            self.serving.choice.pool.state.metrics.count_opinion("none");
            self.release_held();
        }
    }

    /// What is held goes to the client, and nothing more is.
    pub(super) fn stop_watching(&mut self) {
        self.release_held();
        self.opinions = None;
    }

    fn release_held(&mut self) {
        let (Some(opinions), Some(resume)) = (&mut self.opinions, &mut self.resume) else { return };
        let room = opinions.release(&mut self.ahead, resume);
        let over = opinions.take_over();
        if !room {
            (self.opinions, self.resume) = (None, None);
        }
        self.go_over(over);
    }

    /// A peer has spoken for what is held.
    fn resume_watching(&mut self, wary: bool) {
        let (Some(opinions), Some(resume)) = (&mut self.opinions, &mut self.resume) else { return };
        let over = opinions.take_over();
        let (room, ask) = opinions.resume_watching(self.endpoint, &mut self.ahead, resume, wary);
        self.keep_watching(room, ask);
        self.go_over(over);
    }

    /// The leg has ended so, before.
    fn go_over(&mut self, over: Option<Over>) {
        match over {
            None => {}
            Some(Over::Ended(clean)) => self.end(clean),
            Some(Over::Broke(cause)) => self.broke(cause),
        }
    }

    /// Whether the end of the leg has to wait for a second opinion. If not, nothing is held any more.
    pub(super) fn defers(&mut self, over: Over) -> bool {
        let defers = self.opinions.as_mut().is_some_and(|opinions| opinions.defers(over));
        if !defers {
            self.release_held();
        }
        defers
    }

    /// What became of what is held.
    pub(super) fn poll_opinion(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(opinions) = self.opinions.as_mut().filter(|opinions| !opinions.is_idle()) else {
            return Poll::Pending;
        };
        let wary = self.serving.choice.record.is_wary();
        let worker = self.serving.ledger.worker().clone();
        let Serving { ledger, choice, .. } = &mut self.serving;
        let Poll::Ready(settled) = opinions.poll(cx, &worker, wary, |entry| ledger.attempt(entry)) else {
            return Poll::Pending;
        };
        match settled {
            Settled::Release(result) => {
                let Some(result) = result else {
                    self.release_held();
                    return Poll::Ready(());
                };
                choice.pool.state.metrics.count_opinion(result);
                self.resume_watching(wary);
            }
            Settled::Replace(taken) => self.take_opinion(*taken),
            Settled::Disputed { peer, offence } => {
                self.tell_disputed(&peer, false, offence);
                self.release_held();
            }
            Settled::GoOn(result) => {
                result.into_iter().for_each(|result| choice.pool.state.metrics.count_opinion(result));
            }
        }
        Poll::Ready(())
    }

    fn tell_disputed(&self, peer: &str, replaced: bool, offence: bool) {
        let Serving { choice, ledger, .. } = &self.serving;
        choice.pool.state.metrics.count_opinion(if replaced { "replaced" } else { "disputed" });
        let request_id = ledger.id.to_str().unwrap_or_default();
        OutputDisputed { at: &choice.backend().metrics, request_id, peer, replaced }
            .emit(ledger.worker().telemetry());
        if let Some(resume) = self.resume.as_ref().filter(|_| offence) {
            choice.offended(resume.canary());
        }
    }

    /// A peer said something else than what is held: the client gets that instead.
    fn take_opinion(&mut self, taken: Taken) {
        let Taken { splice, plan, out, leg, offence } = taken;
        self.tell_disputed(&leg.choice.backend().name, true, offence);
        // What was begun beside this leg goes on from what it said.
        self.keep("overruled");
        let Some(resume) = &mut self.resume else { return };
        resume.adopt(splice, plan, self.serving.choice.backend().id);
        let (finished, done) = (resume.splice.is_finished(), resume.splice.is_done());
        self.serving.choice.in_flight.rests();
        self.serving.abandon("degenerate");
        self.serving.ledger.resumed();
        self.follow(leg);
        if let Some(spliced) = &mut self.spliced {
            (spliced.spoke, spliced.finished, spliced.from) = (true, finished, None);
        }
        self.ahead.extend((!out.is_empty()).then(|| Bytes::from(out)));
        self.fed(None);
        if self.body.is_none() && !done {
            self.end(Ok(()));
        }
    }
}
