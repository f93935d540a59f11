//! The answer on its way to the client, frame by frame as it comes, and what is learned from its end.
//!
//! Nothing is buffered: a frame is asked of the backend when the client takes one. A cut is passed on as
//! a cut: the body errors, and the client sees a reset or an incomplete body, never a clean end. When
//! the client leaves, hyper drops the body, and with it the connection to the backend.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use crate::clock;
use crate::policy::Moment;
use crate::policy::health::Observation;
use crate::policy::poison::may_be_a_death;
use crate::policy::retry::{Cause, Facts, Phase, Verdict, verdict};
use crate::pool::{About, Choice, Turn};
use crate::proxy::attempt::{cut, grpc_cause};
use crate::proxy::ledger::Ledger;
use crate::proxy::sse_relay::EventRelay;
use crate::proxy::watch::{Stage, Watch};
use crate::proxy::worker::Held;
use crate::telemetry::metrics::{AttemptOutcome, End};
use crate::upstream::InBody;

/// The backend's answer broke off after part of it had been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenAnswer(pub(super) Cause);

impl std::fmt::Display for BrokenAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the backend's answer broke off: {}", self.0.name())
    }
}

impl std::error::Error for BrokenAnswer {}

/// The body of an answer to a client.
pub struct AnswerBody(Kind);

enum Kind {
    Whole(Box<Whole>),
    Plain(Box<Plain>),
    Events(Box<EventRelay>),
}

impl AnswerBody {
    /// A body that is all here. The exchange is over for the client once it was taken.
    pub(super) fn whole(body: Bytes, trailers: Option<HeaderMap>, ledger: Ledger) -> Self {
        Self(Kind::Whole(Box::new(Whole {
            body: Some(body),
            trailers,
            ledger: Some(ledger),
            _held: Held::default(),
        })))
    }

    /// No body; the account is kept elsewhere.
    pub(super) fn nothing() -> Self {
        Self(Kind::Whole(Box::new(Whole {
            body: None,
            trailers: None,
            ledger: None,
            _held: Held::default(),
        })))
    }

    /// The same, and its share of the memory bound.
    pub(super) fn held(body: Bytes, trailers: Option<HeaderMap>, ledger: Ledger, held: Held) -> Self {
        Self(Kind::Whole(Box::new(Whole { body: Some(body), trailers, ledger: Some(ledger), _held: held })))
    }

    /// A body passed on as it comes.
    pub(super) fn plain(ahead: VecDeque<Bytes>, body: InBody, serving: Serving, idle: Duration) -> Self {
        let mut plain = Box::new(Plain { ahead, body: Some(body), serving });
        plain.serving.watch.enter(Stage::Body { idle, since: clock::now() });
        plain.end_if_over();
        Self(Kind::Plain(plain))
    }

    /// A token stream.
    pub(super) fn events(relay: EventRelay) -> Self {
        Self(Kind::Events(Box::new(relay)))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BrokenAnswer;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenAnswer>>> {
        match &mut self.get_mut().0 {
            Kind::Whole(whole) => Poll::Ready(whole.next().map(Ok)),
            Kind::Plain(plain) => plain.poll_frame(cx),
            Kind::Events(events) => events.poll_frame(cx).map(|bytes| bytes.map(|b| Ok(Frame::data(b)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(whole) => whole.body.as_ref().is_none_or(Bytes::is_empty) && whole.trailers.is_none(),
            Kind::Plain(plain) => plain.ahead.is_empty() && plain.body.is_none(),
            Kind::Events(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(whole) if whole.trailers.is_none() => {
                SizeHint::with_exact(whole.body.as_ref().map_or(0, |body| body.len() as u64))
            }
            Kind::Plain(plain) => plain.size_hint(),
            Kind::Whole(_) | Kind::Events(_) => SizeHint::default(),
        }
    }
}

/// All here.
struct Whole {
    body: Option<Bytes>,
    trailers: Option<HeaderMap>,
    /// Closed when the body was taken.
    ledger: Option<Ledger>,
    _held: Held,
}

impl Whole {
    fn next(&mut self) -> Option<Frame<Bytes>> {
        let body = self.body.take().filter(|body| !body.is_empty());
        if let (Some(body), Some(ledger)) = (&body, &mut self.ledger) {
            ledger.sent(body.len());
        }
        let frame = body.map(Frame::data).or_else(|| self.trailers.take().map(Frame::trailers));
        if self.body.is_none() && self.trailers.is_none() {
            self.ledger = None;
        }
        frame
    }
}

/// An attempt whose answer the client is reading.
pub(super) struct Serving {
    pub(super) choice: Choice,
    pub(super) ledger: Ledger,
    pub(super) watch: Watch,
    /// When the attempt began.
    pub(super) started: Moment,
    /// For the judge.
    pub(super) own_credentials: bool,
    /// The attempt's outcome has been told: by then it is only its bytes that matter.
    pub(super) told: bool,
    /// It is kept apart until it has ended.
    pub(super) turn: Option<Turn>,
}

impl Serving {
    /// The answer is complete.
    pub(super) fn complete(&mut self) {
        self.turn.take().into_iter().for_each(Turn::served);
        self.tell(AttemptOutcome::Success, Observation::Success, "", "");
        self.ledger.ended(End::Complete);
    }

    /// The backend broke its answer off, and so it ends for the client.
    pub(super) fn broke(&mut self, phase: Phase, cause: Cause, end: End) {
        self.leave(phase, cause);
        self.ledger.ended(end);
    }

    /// The backend broke its answer off: its judge and the ledger are told.
    pub(super) fn leave(&mut self, phase: Phase, cause: Cause) -> Facts {
        if cause.lost_connection() {
            self.choice.lost_connection();
        }
        let facts = Facts {
            sent: true,
            answered: true,
            took: clock::now().since(self.started),
            own_credentials: self.own_credentials,
            ..Facts::new(phase, cause)
        };
        if let Some(turn) = self.turn.take_if(|_| may_be_a_death(&facts)) {
            turn.broke();
        }
        let (outcome, observation) = lesson(&facts);
        self.tell(outcome, observation, cause.name(), phase.name());
        facts
    }

    /// This leg is given up, and nothing is to be learned from it.
    pub(super) fn abandon(&mut self, why: &'static str) {
        self.tell(AttemptOutcome::Neutral, Observation::Neutral, why, Phase::Stream.name());
    }

    /// Another attempt has something new to say, and this one is left although it had not broken.
    pub(super) fn left(&mut self, cause: Cause) {
        let (outcome, observation) = match cause {
            Cause::Drain => (AttemptOutcome::Rescued, Observation::Neutral),
            _ => (AttemptOutcome::Overtaken, Observation::Silent),
        };
        self.tell(outcome, observation, cause.name(), Phase::Stream.name());
    }

    /// Another attempt goes on with the answer.
    pub(super) fn take_over(&mut self, choice: Choice, watch: Watch, started: Moment) {
        self.own_credentials = choice.member().params.own_credentials;
        (self.choice, self.watch, self.started, self.told) = (choice, watch, started, false);
    }

    fn tell(
        &mut self,
        outcome: AttemptOutcome,
        observation: Observation,
        cause: &'static str,
        phase: &'static str,
    ) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        self.ledger.attempt_ended(outcome, cause, phase);
        if observation == Observation::Fault {
            self.choice.count_fault();
        }
        let worker = Arc::clone(self.ledger.worker());
        worker.with_rng(|rng| self.choice.observe(About::Model, observation, rng));
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Without a word the client has left: no lesson. The ledger says so by itself.
        self.tell(AttemptOutcome::Cancelled, Observation::Neutral, "client_gone", "");
    }
}

/// What an attempt that broke off within its answer is to its backend's judge, and in the books.
pub(super) fn lesson(facts: &Facts) -> (AttemptOutcome, Observation) {
    match verdict(facts) {
        Verdict::Fault | Verdict::Misconfigured => (AttemptOutcome::Fault, Observation::Fault),
        Verdict::Busy => (AttemptOutcome::Busy, Observation::Busy { until: None }),
        Verdict::Success | Verdict::Neutral => (AttemptOutcome::Neutral, Observation::Neutral),
        Verdict::Cancelled => (AttemptOutcome::Cancelled, Observation::Neutral),
    }
}

/// Anything that is no token stream.
struct Plain {
    ahead: VecDeque<Bytes>,
    /// Gone when it has ended.
    body: Option<InBody>,
    serving: Serving,
}

impl Plain {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenAnswer>>> {
        if let Some(chunk) = self.ahead.pop_front() {
            self.serving.ledger.sent(chunk.len());
            self.end_if_over();
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        match body.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.serving.watch.moved(clock::now());
                self.serving.ledger.sent(frame.data_ref().map_or(0, Bytes::len));
                if let Some(cause) = frame.trailers_ref().and_then(grpc_cause) {
                    // The client is told in the same words.
                    self.serving.broke(Phase::Tail, cause, End::Complete);
                }
                self.end_if_over();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(self.broke(cut(&error))))),
            Poll::Ready(None) => {
                self.body = None;
                self.serving.complete();
                Poll::Ready(None)
            }
            Poll::Pending => match self.serving.watch.poll_expired(cx) {
                Poll::Ready(cause) => Poll::Ready(Some(Err(self.broke(cause)))),
                Poll::Pending => Poll::Pending,
            },
        }
    }

    /// hyper does not ask for a frame behind the last one it knows of, so the end is noticed with it.
    fn end_if_over(&mut self) {
        if self.ahead.is_empty() && self.body.as_ref().is_some_and(InBody::is_end_stream) {
            self.body = None;
            self.serving.complete();
        }
    }

    fn broke(&mut self, cause: Cause) -> BrokenAnswer {
        self.body = None;
        self.serving.broke(Phase::Body, cause, End::Cut);
        BrokenAnswer(cause)
    }

    fn size_hint(&self) -> SizeHint {
        let ahead: u64 = self.ahead.iter().map(|chunk| chunk.len() as u64).sum();
        let rest = self.body.as_ref().map_or(Some(0), InBody::announced);
        rest.map_or_else(SizeHint::default, |rest| SizeHint::with_exact(ahead + rest))
    }
}
