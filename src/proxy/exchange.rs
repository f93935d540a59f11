//! One client request and its one response, over as many attempts as it takes.
//!
//! `run` is the loop: choose a backend (`turn`, which may have to wait for one), try it, judge the outcome, and
//! relay, move on or give up. What to do is decided by `policy::retry`; here it is done. Dropping an exchange (the client has left) drops the
//! attempt under way and closes its connection.

mod doubt;
mod turn;

pub(super) use turn::stand_by;

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header, response};
use hyper::upgrade::OnUpgrade;
use smallvec::SmallVec;

use crate::clock::{self, Alarm};
use crate::policy::Moment;
use crate::policy::dialect::{ErrorClass, is_content_filter, is_context_length};
use crate::policy::fallback::{FallbackCause, Used};
use crate::policy::health::Observation;
use crate::policy::poison::{fingerprint, may_be_a_death};
use crate::policy::retry::{
    self, Cause, Facts, History, Next, Phase, Reason, Verdict, all_failed_alike, decide,
};
use crate::pool::{About, BackendId, Choice, Receipt, Turn};
use crate::proxy::admit::Asked;
use crate::proxy::attempt::{Answer, Outcome};
use crate::proxy::headers::{X_EVERGATE_POOL, X_REQUEST_ID};
use crate::proxy::hedge::Tried;
use crate::proxy::inquest::Inquest;
use crate::proxy::ledger::{Entry, Ledger};
use crate::proxy::leg::Leg;
use crate::proxy::relay::{AnswerBody, Serving};
use crate::proxy::replay_body::ReplayBody;
use crate::proxy::respond::{Refusal, refuse, whole_seconds};
use crate::proxy::resume::Resumer;
use crate::proxy::sse_relay::{EventRelay, Silence};
use crate::proxy::tunnel;
use crate::proxy::watch::Watch;
use crate::proxy::worker::Worker;
use crate::telemetry::events::{MisconfiguredBackend, RequestKills};
use crate::telemetry::metrics::{AttemptOutcome, End};
use turn::Waits;

/// What an exchange was before it fell back to another pool.
struct Routed {
    leg: Leg,
    /// What the client would have been told.
    refusal: Option<Refusal>,
}

/// What is left of an exchange whose answer has begun.
struct Rest {
    worker: Arc<Worker>,
    asked: Asked,
    body: ReplayBody,
    leg: Leg,
    inquest: Inquest,
    switch: Option<OnUpgrade>,
    may_run_twice: bool,
}

impl Rest {
    /// What going on with a broken stream takes; none where it cannot be.
    fn resumer(self) -> Option<Box<Resumer>> {
        let Self { worker, asked, body, leg, inquest, .. } = self;
        let sent = leg.body.clone().or_else(|| body.bytes().cloned()).filter(|_| self.may_run_twice)?;
        Resumer::arm(&worker, asked, leg, sent, body, inquest)
    }
}

/// An exchange from its routing to its answer. Boxed from the start: it is moved often, and is large.
pub(super) struct Exchange {
    pub(super) worker: Arc<Worker>,
    pub(super) asked: Asked,
    pub(super) body: ReplayBody,
    pub(super) ledger: Ledger,
    /// The pool that is being asked, and how.
    pub(super) leg: Leg,
    /// How the routed pool was asked, once another one is.
    routed: Option<Routed>,
    /// Of the routed pool's fallbacks.
    pub(super) fallbacks_used: Used,
    /// The client's connection, where it is to be switched to another protocol.
    switch: Option<OnUpgrade>,
    pub(super) history: History,
    pub(super) tried: SmallVec<[BackendId; 4]>,
    /// Asked beside one that was late.
    pub(super) hedged: Option<BackendId>,
    /// Times that all backends had been tried.
    rounds: u32,
    /// The next attempt needs a new connection.
    pub(super) fresh: bool,
    /// How the latest attempt failed.
    failed: Option<Facts>,
    /// The latest answer that was not good enough, and the pool it came from where that is a fallback.
    last: Option<(Answer, Option<HeaderValue>)>,
    /// Where it broke off.
    pub(super) inquest: Inquest,
    /// It is kept apart: its like has killed replicas.
    turn: Option<Turn>,
    /// Faults that may turn out to be the request's own, one for each backend that was at fault.
    faults: SmallVec<[(Cause, Receipt); 2]>,
    /// Between attempts.
    pub(super) alarm: Option<Alarm>,
    waits: Waits,
}

impl Exchange {
    /// An exchange that goes to the pool of `leg`.
    pub(super) fn new(
        asked: Asked,
        body: ReplayBody,
        ledger: Ledger,
        leg: Leg,
        switch: Option<OnUpgrade>,
    ) -> Box<Self> {
        leg.pool.state.deposit();
        Box::new(Self {
            worker: ledger.worker().clone(),
            history: History::new(leg.pool.members.len()),
            asked,
            body,
            ledger,
            leg,
            routed: None,
            fallbacks_used: Used::default(),
            switch,
            tried: SmallVec::new(),
            hedged: None,
            rounds: 0,
            fresh: false,
            failed: None,
            last: None,
            inquest: Inquest::default(),
            turn: None,
            faults: SmallVec::new(),
            alarm: None,
            waits: Waits::default(),
        })
    }

    /// Runs it to its answer.
    // the attempt loop
    pub(super) async fn run(mut self: Box<Self>) -> Response<AnswerBody> {
        loop {
            let choice = match self.seek().await {
                Ok(choice) => choice,
                Err(refusal) => return self.nobody(refusal),
            };
            let Tried { choice, outcome, watch } = self.attempt(choice).await;
            let verdict = retry::verdict(&outcome.facts);
            let next = self.decide(&outcome.facts, verdict);
            self.learn(&choice, &outcome, verdict, next);
            if self.kills(&choice, &outcome).await {
                return self.nobody(Refusal::Kills);
            }
            if let Some(leg) = self.leg_after(&outcome, verdict, next) {
                self.leave_pool(leg, &choice, outcome, watch, next);
                continue;
            }
            match next {
                Next::Failover | Next::Again => self.set_aside(&choice, outcome, watch, next),
                Next::Relay | Next::RelayAsRequestFault => return self.relay(choice, outcome, watch),
                Next::GiveUp(reason) => return self.give_up(choice, outcome, watch, reason),
            }
        }
    }

    /// The backend of the next attempt, here or at a pool that this one falls back to.
    async fn seek(&mut self) -> Result<Choice, Refusal> {
        if self.leg.pool.state.ward.is_armed() && self.ledger.attempts() == 0 {
            self.keep_apart().await?;
        }
        loop {
            match self.choose().await {
                Ok(choice) => {
                    if self.failed.is_some_and(|failed| failed.cause == Cause::Rescued) {
                        choice.pool.spare(choice.index, choice.in_flight.kind());
                    }
                    if let Some(turn) = &self.turn {
                        turn.runs_at(choice.backend().id);
                    }
                    return Ok(choice);
                }
                Err(refusal) if self.fall_back_from(&refusal) => {}
                Err(refusal) => return Err(refusal),
            }
        }
    }

    pub(super) fn is_replayable(&self) -> bool {
        !self.body.is_streamed() && self.leg.policy.replay.allows(&self.asked.nature)
    }

    fn decide(&mut self, facts: &Facts, verdict: Verdict) -> Next {
        if self.faults.last().is_some_and(|(_, receipt)| receipt.serves()) {
            self.history.last_serves_others();
        }
        let first = self.history.attempts() == 0;
        let state = &self.leg.pool.state;
        let budget = || state.may_retry(&self.leg.policy, first);
        match decide(&self.leg.policy, &self.history, facts, verdict, self.is_replayable(), budget) {
            Next::Failover | Next::Again if !self.body.is_here() => Next::GiveUp(Reason::NotReplayable),
            next => next,
        }
    }

    /// Teaches the judge, and writes the attempt down.
    pub(super) fn learn(&mut self, choice: &Choice, outcome: &Outcome, verdict: Verdict, next: Next) {
        let facts = &outcome.facts;
        let own_fault = next == Next::RelayAsRequestFault;
        if own_fault && let Some((_, receipt)) = self.faults.pop() {
            receipt.forgive();
        }
        let (observation, counted) = match verdict {
            Verdict::Success => (Observation::FirstToken, AttemptOutcome::Success),
            Verdict::Fault if own_fault => (Observation::Neutral, AttemptOutcome::RequestFault),
            Verdict::Fault => (Observation::Fault, AttemptOutcome::Fault),
            Verdict::Busy => {
                let until = facts.retry_after.map(|after| clock::now() + after);
                (Observation::Busy { until }, AttemptOutcome::Busy)
            }
            Verdict::Misconfigured => (Observation::Misconfigured, AttemptOutcome::Misconfigured),
            Verdict::Neutral if facts.cause == Cause::Rescued => {
                (Observation::Neutral, AttemptOutcome::Rescued)
            }
            Verdict::Neutral => (Observation::Neutral, AttemptOutcome::Neutral),
            Verdict::Cancelled => (Observation::Neutral, AttemptOutcome::Cancelled),
        };
        let about = if facts.phase == Phase::Connect { About::Backend } else { About::Model };
        let whole = matches!(outcome.answer, Some(Answer::Whole { .. }));
        self.worker.with_rng(|rng| {
            choice.observe(about, observation, rng);
            if verdict == Verdict::Success && whole {
                choice.observe(about, Observation::Success, rng);
            }
        });
        choice.count_attempt();
        if observation == Observation::Fault {
            choice.count_fault();
            self.faults.push((facts.cause, choice.receipt()));
        }
        if verdict == Verdict::Success
            && let Some(model) = &self.leg.model
        {
            choice.pool.state.serves(model);
        }
        self.note_speed(choice, outcome, verdict);
        if verdict == Verdict::Misconfigured {
            let at = &choice.backend().metrics;
            let model = self.leg.model.as_deref();
            MisconfiguredBackend { at, model, saw: &facts.cause.name() }.emit(self.worker.telemetry());
        }
        let relayed = verdict == Verdict::Success && !whole;
        self.ledger.attempt(Entry {
            backend: choice.backend().clone(),
            role: self.role(choice),
            outcome: counted,
            cause: if verdict == Verdict::Success { "" } else { facts.cause.name() },
            phase: facts.phase.name(),
            reused: facts.reused,
            started: outcome.started,
            first_byte: outcome.first_byte,
            lasted: (!relayed).then_some(facts.took),
        });
    }

    fn note_speed(&self, choice: &Choice, outcome: &Outcome, verdict: Verdict) {
        let metrics = &choice.backend().metrics;
        if let Some(after) = outcome.first_byte {
            metrics.first_byte(after);
        }
        if verdict == Verdict::Success {
            let took = outcome.facts.took;
            choice.backend().whole().first_token(self.asked.class, clock::now(), took.as_secs_f64());
            let kind = choice.in_flight.kind();
            choice.pool.learn_first_token(choice.index, kind, outcome.started, took);
            if matches!(outcome.answer, Some(Answer::Tokens { .. })) {
                metrics.first_token(took);
            }
        }
    }

    pub(super) fn role(&self, choice: &Choice) -> &'static str {
        match () {
            () if self.hedged == Some(choice.backend().id) => "hedge",
            () if self.ledger.has_only_hedges() => "first",
            () if self.leg.is_fallback && self.history.attempts() == 0 => "fallback",
            () if self.ledger.has_tried(choice.backend()) => "retry",
            () => "failover",
        }
    }

    /// A request that killed replicas runs alone: one attempt, on a connection of its own.
    async fn keep_apart(&mut self) -> Result<(), Refusal> {
        let ward = &self.leg.pool.state.ward;
        let Some(fingerprint) = self.fingerprint().filter(|fingerprint| ward.holds(*fingerprint)) else {
            return Ok(());
        };
        let most = self.leg.policy.wait_max;
        let turn = tokio::time::timeout(most, ward.turn(fingerprint));
        self.turn = Box::pin(turn).await.map_err(|_elapsed| Refusal::Busy(most))?;
        if self.turn.is_some() {
            self.leg.policy.attempts_max = 1;
            self.fresh = true;
        }
        Ok(())
    }

    fn fingerprint(&self) -> Option<u64> {
        self.body.bytes().map(|bytes| fingerprint(self.routed_leg().path.as_str(), bytes))
    }

    /// Whether this request has killed the backends it was sent to, so that no other is to have it.
    async fn kills(&mut self, choice: &Choice, outcome: &Outcome) -> bool {
        if !self.inquest.opens(choice, &outcome.facts) {
            return false;
        }
        if !Box::pin(self.inquest.blames(&self.worker)).await {
            return false;
        }
        if let Some(fingerprint) = self.fingerprint() {
            for pool in self.inquest.pools().chain([&self.routed_leg().pool]) {
                pool.state.ward.remember(fingerprint);
            }
        }
        RequestKills {
            at: &self.leg.pool.state.metrics,
            request_id: self.ledger.id.to_str().unwrap_or_default(),
            backends: &self.inquest.backends(),
        }
        .emit(self.worker.telemetry());
        self.last = None;
        self.routed = None;
        true
    }

    /// On to the next attempt.
    fn set_aside(&mut self, choice: &Choice, outcome: Box<Outcome>, watch: Watch, next: Next) {
        self.history.add(&outcome.facts);
        self.failed = Some(outcome.facts);
        if matches!(next, Next::Failover | Next::Again) {
            self.leg.pool.state.metrics.count_retry(outcome.facts.cause.name());
        }
        self.fresh = next == Next::Again;
        if next == Next::Failover {
            self.tried.push(choice.backend().id);
        }
        // Only what is whole can be shown later; the connection of anything else closes here.
        if let Some(answer @ (Answer::Whole { .. } | Answer::Refused { .. })) = outcome.answer {
            self.last = Some((answer, self.leg.named()));
        }
        self.alarm = Some(watch.into_alarm());
    }

    /// The next pool that may take the request for `cause`, where there is one. Its entry is used up by this,
    /// whatever becomes of the leg.
    fn next_leg(&mut self, cause: FallbackCause) -> Option<Leg> {
        while let Some(i) = self.fallback_for(cause) {
            self.fallbacks_used.add(i);
            if let Some(leg) = self.leg_of(i, &self.body) {
                self.routed_leg().pool.state.metrics.count_fallback(cause.name());
                return Some(leg);
            }
        }
        None
    }

    /// The leg that entry `i` of the routed pool leads to, with this `body`.
    pub(super) fn leg_of(&self, i: usize, body: &ReplayBody) -> Option<Leg> {
        let routed = self.routed_leg();
        let entry = &routed.pool.config.fallbacks[i];
        let snapshot = self.worker.directory.look();
        let pool = snapshot.pool(&entry.pool)?;
        Leg::fallback(entry, pool, routed, &self.asked, body, self.ledger.model())
    }

    /// How the routed pool is asked, also once another one is.
    pub(super) fn routed_leg(&self) -> &Leg {
        self.routed.as_ref().map_or(&self.leg, |routed| &routed.leg)
    }

    /// The entry that serves `cause`.
    fn fallback_for(&self, cause: FallbackCause) -> Option<usize> {
        self.fallback_after(self.fallbacks_used, cause)
    }

    /// The entry that serves `cause` once those of `used` are. Only work that any replica of any pool may do goes
    /// elsewhere.
    pub(super) fn fallback_after(&self, used: Used, cause: FallbackCause) -> Option<usize> {
        let list = &self.routed_leg().pool.config.fallbacks;
        let nature = &self.asked.nature;
        let movable = !list.is_empty()
            && self.turn.is_none()
            && nature.inference
            && !nature.stateful
            && self.body.is_here();
        if movable { used.next(list, cause) } else { None }
    }

    /// Where the request goes after an attempt that its own pool has no further answer to.
    fn leg_after(&mut self, outcome: &Outcome, verdict: Verdict, next: Next) -> Option<Leg> {
        let cause = match next {
            Next::Relay
                if self.fallback_for(FallbackCause::ContextLength).is_some() && is_too_long(outcome) =>
            {
                FallbackCause::ContextLength
            }
            Next::GiveUp(Reason::Attempts | Reason::Budget) if verdict == Verdict::Busy => {
                FallbackCause::Busy
            }
            Next::GiveUp(Reason::Attempts | Reason::Budget) => FallbackCause::Unavailable,
            Next::GiveUp(Reason::NotReplayable | Reason::Client | Reason::Time) => return None,
            Next::Relay | Next::RelayAsRequestFault | Next::Failover | Next::Again => return None,
        };
        self.next_leg(cause)
    }

    /// Goes on at another pool, with all that is its own; `refusal` is what the client would have been told.
    pub(super) fn fall_back(&mut self, leg: Leg, refusal: Option<Refusal>) {
        leg.pool.state.deposit();
        self.history = History::new(leg.pool.members.len());
        let before = std::mem::replace(&mut self.leg, leg);
        self.routed.get_or_insert(Routed { leg: before, refusal });
        self.tried.clear();
        (self.rounds, self.fresh, self.failed, self.waits) = (0, false, None, Waits::default());
    }

    /// As [`Self::fall_back`], after an attempt.
    fn leave_pool(&mut self, leg: Leg, choice: &Choice, outcome: Box<Outcome>, watch: Watch, next: Next) {
        let refusal = match next {
            Next::GiveUp(reason) => Some(self.failure(&outcome.facts, reason)),
            _ => None,
        };
        self.set_aside(choice, outcome, watch, next);
        self.fall_back(leg, refusal);
    }

    /// As [`Self::fall_back`], where no backend took an attempt. False when there is nothing left to do.
    fn fall_back_from(&mut self, refusal: &Refusal) -> bool {
        let cause = match refusal {
            Refusal::Busy(_) | Refusal::QueueFull(_) | Refusal::QueueTimeout(_) => FallbackCause::Busy,
            Refusal::Down | Refusal::Failed { .. } => FallbackCause::Unavailable,
            _ => return false,
        };
        let used = self.fallbacks_used;
        match self.next_leg(cause) {
            Some(leg) => self.fall_back(leg, Some(refusal.clone())),
            // None of the entries could take this request: now the pool is waited for like any other.
            None if self.fallbacks_used != used => {}
            None => return false,
        }
        true
    }

    fn give_up(
        mut self: Box<Self>,
        choice: Choice,
        outcome: Box<Outcome>,
        watch: Watch,
        reason: Reason,
    ) -> Response<AnswerBody> {
        self.acquit();
        if outcome.answer.is_some() {
            return self.relay(choice, outcome, watch);
        }
        if let Some(turn) = self.turn.take_if(|_| may_be_a_death(&outcome.facts)) {
            turn.broke();
            return self.nobody(Refusal::Kills);
        }
        let refusal = self.failure(&outcome.facts, reason);
        self.nobody(refusal)
    }

    /// Takes the faults back where every backend that was asked failed alike.
    fn acquit(&mut self) {
        let all = self.faults.len() == usize::from(self.ledger.attempts()) && self.ledger.asked_each_once();
        if all && all_failed_alike(self.faults.iter().map(|(cause, _)| *cause)) {
            self.faults.drain(..).for_each(|(_, receipt)| receipt.forgive());
        }
    }

    fn failure(&self, facts: &Facts, reason: Reason) -> Refusal {
        match reason {
            Reason::Client => self.body.fault(),
            _ if facts.phase == Phase::Connect => Refusal::Down,
            _ => Refusal::Failed { cause: facts.cause, enough: reason.name() },
        }
    }

    /// No further attempt: the latest answer if there was one, else an error of our own. What the routed pool
    /// had to say comes before what another one says.
    fn nobody(mut self: Box<Self>, refusal: Refusal) -> Response<AnswerBody> {
        match self.last.take() {
            Some((Answer::Whole { head, body, trailers, held, .. }, pool)) => {
                self.whole(head, pool, |ledger| AnswerBody::held(body, trailers, ledger, held))
            }
            Some((Answer::Refused { status, body }, pool)) => self.refused(status, pool, body),
            _ => {
                let routed = self.routed.and_then(|routed| routed.refusal);
                refuse(self.ledger, self.asked.dialect, &routed.unwrap_or(refusal))
            }
        }
    }

    /// The commit point: from here on the client sees it.
    fn relay(
        mut self: Box<Self>,
        choice: Choice,
        outcome: Box<Outcome>,
        watch: Watch,
    ) -> Response<AnswerBody> {
        let taught = retry::verdict(&outcome.facts) != Verdict::Success;
        let cause = outcome.facts.cause;
        // Who answers is alive, whatever the answer says; a stream has yet to come to its end.
        let whole = matches!(outcome.answer, Some(Answer::Whole { .. } | Answer::Refused { .. }));
        if let Some(turn) = self.turn.take_if(|_| whole) {
            turn.served();
        }
        match outcome.answer {
            None => {
                let refusal = Refusal::Failed { cause, enough: "not_retried" };
                self.nobody(refusal)
            }
            Some(Answer::Whole { head, body, trailers, held, .. }) => {
                let pool = self.leg.named();
                self.whole(head, pool, |ledger| AnswerBody::held(body, trailers, ledger, held))
            }
            Some(Answer::Refused { status, body }) => {
                let pool = self.leg.named();
                self.refused(status, pool, body)
            }
            Some(Answer::Begun { head, ahead, body }) => {
                let idle = self.leg.pool.config.clocks.body_idle;
                let (head, serving, _) = self.serve(head, choice, watch, outcome.started, taught);
                Response::from_parts(*head, AnswerBody::plain(ahead, body, serving, idle))
            }
            Some(Answer::Tokens { head, ahead, stream, body }) => {
                self.ledger.first_token();
                let clocks = &self.leg.pool.config.clocks;
                let silence =
                    Silence { inter_token: clocks.inter_token, max: clocks.silence_max, since: clock::now() };
                let words = (self.asked.endpoint, self.asked.dialect);
                let (head, serving, rest) = self.serve(head, choice, watch, outcome.started, taught);
                let resume = rest.resumer();
                let relay = EventRelay::new(ahead, body, stream, serving, words, silence, resume);
                Response::from_parts(*head, AnswerBody::events(relay))
            }
            Some(Answer::Switched { head, upgraded, body }) => {
                let (head, serving, rest) = self.serve(head, choice, watch, outcome.started, taught);
                tunnel::start(*head, rest.switch, upgraded, body, serving)
            }
        }
    }

    /// The answer begins: what accompanies it to its end, and what is left of the exchange.
    fn serve(
        mut self: Box<Self>,
        mut head: Box<response::Parts>,
        choice: Choice,
        watch: Watch,
        started: Moment,
        told: bool,
    ) -> (Box<response::Parts>, Serving, Rest) {
        self.ledger.answered(head.status);
        head.headers.insert(X_REQUEST_ID, self.ledger.id.clone());
        served_by(&mut head.headers, self.leg.named());
        let may_run_twice = self.is_replayable();
        let own_credentials = choice.member().params.own_credentials;
        let Self { worker, asked, body, leg, ledger, turn, inquest, switch, .. } = *self;
        let serving = Serving { choice, ledger, watch, started, own_credentials, told, turn };
        (head, serving, Rest { worker, asked, body, leg, inquest, switch, may_run_twice })
    }

    fn whole(
        mut self: Box<Self>,
        mut head: Box<response::Parts>,
        pool: Option<HeaderValue>,
        body: impl FnOnce(Ledger) -> AnswerBody,
    ) -> Response<AnswerBody> {
        self.ledger.answered(head.status);
        self.ledger.ended(End::Complete);
        self.say_when_to_return(&mut head);
        head.headers.insert(X_REQUEST_ID, self.ledger.id.clone());
        served_by(&mut head.headers, pool);
        Response::from_parts(*head, body(self.ledger))
    }

    /// A backend's `Retry-After` is about itself; the client may come back as soon as any of the pool takes it.
    fn say_when_to_return(&self, head: &mut response::Parts) {
        if !matches!(head.status.as_u16(), 429 | 503 | 529) {
            return;
        }
        let model = self.leg.pool.judged_model(self.leg.model.as_deref());
        if let Some(until) = self.leg.pool.busy_until(model) {
            head.headers.insert(header::RETRY_AFTER, whole_seconds(until.since(clock::now())));
            head.headers.remove("retry-after-ms");
        }
    }

    /// An error that stood where a stream should have begun becomes a real status.
    fn refused(
        mut self: Box<Self>,
        status: StatusCode,
        pool: Option<HeaderValue>,
        body: bytes::Bytes,
    ) -> Response<AnswerBody> {
        self.ledger.answered(status);
        self.ledger.ended(End::Complete);
        let mut response = Response::new(());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(X_REQUEST_ID, self.ledger.id.clone());
        served_by(headers, pool);
        response.map(|()| AnswerBody::whole(body, None, self.ledger))
    }
}

/// A prompt that is longer than the model's context, and nothing else: a filter's word is final.
fn is_too_long(outcome: &Outcome) -> bool {
    let status = match outcome.facts.cause {
        Cause::Status(status) | Cause::ErrorInside(ErrorClass::ClientFault(status)) => status,
        _ => return false,
    };
    let Ok(status) = StatusCode::from_u16(status) else { return false };
    match &outcome.answer {
        Some(Answer::Whole { body, .. } | Answer::Refused { body, .. }) => {
            is_context_length(status, body) && !is_content_filter(status, body)
        }
        _ => false,
    }
}

/// Says which pool served, where that is not the routed one.
fn served_by(headers: &mut HeaderMap, pool: Option<HeaderValue>) {
    if let Some(pool) = pool {
        headers.insert(X_EVERGATE_POOL, pool);
    }
}
