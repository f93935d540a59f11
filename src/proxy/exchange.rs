//! One client request and its one response, over as many attempts as it takes.
//!
//! `run` is the loop: choose a backend, try it, judge the outcome, and relay, move on or give up. What to
//! do is decided by `policy::retry`; here it is done. Dropping an exchange (the client has left) drops the
//! attempt under way and closes its connection.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header, response};
use hyper::upgrade::OnUpgrade;
use smallvec::SmallVec;

use crate::clock::{self, Alarm};
use crate::policy::Moment;
use crate::policy::health::Observation;
use crate::policy::retry::{
    self, Cause, Facts, History, Next, Phase, Reason, RetryPolicy, Verdict, backoff, decide,
};
use crate::pool::{About, BackendId, Choice, Nobody, Pool, Receipt, Wanted};
use crate::proxy::admit::Asked;
use crate::proxy::attempt::{Answer, Outcome};
use crate::proxy::headers::X_REQUEST_ID;
use crate::proxy::hedge::Tried;
use crate::proxy::ledger::{Entry, Ledger};
use crate::proxy::relay::{AnswerBody, Serving};
use crate::proxy::replay_body::ReplayBody;
use crate::proxy::respond::{Refusal, refuse, whole_seconds};
use crate::proxy::sse_relay::{EventRelay, Silence};
use crate::proxy::tunnel;
use crate::proxy::watch::Watch;
use crate::proxy::worker::Worker;
use crate::telemetry::events::MisconfiguredBackend;
use crate::telemetry::metrics::{AttemptOutcome, End};
use crate::upstream::Want;

/// Between two looks for a backend that takes connections again, where nobody has noticed that it does.
const STAND_BY_LOOK: Duration = Duration::from_millis(250);

/// An exchange from its routing to its answer. Boxed from the start: it is moved often, and is large.
pub(super) struct Exchange {
    pub(super) worker: Arc<Worker>,
    pub(super) asked: Asked,
    pub(super) body: ReplayBody,
    pub(super) ledger: Ledger,
    pub(super) pool: Arc<Pool>,
    /// The pool's, with what the route overrides.
    pub(super) policy: RetryPolicy,
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
    /// The latest answer that was not good enough.
    last: Option<Answer>,
    /// A fault that may turn out to be the request's own.
    blamed: Option<Receipt>,
    /// Between attempts.
    pub(super) alarm: Option<Alarm>,
    /// End of all waiting for a backend.
    wait_until: Option<Moment>,
}

impl Exchange {
    /// An exchange that goes to `pool`.
    pub(super) fn new(
        asked: Asked,
        body: ReplayBody,
        ledger: Ledger,
        pool: Arc<Pool>,
        policy: RetryPolicy,
        switch: Option<OnUpgrade>,
    ) -> Box<Self> {
        pool.state.deposit();
        Box::new(Self {
            worker: ledger.worker().clone(),
            history: History::new(pool.members.len()),
            asked,
            body,
            ledger,
            pool,
            policy,
            switch,
            tried: SmallVec::new(),
            hedged: None,
            rounds: 0,
            fresh: false,
            failed: None,
            last: None,
            blamed: None,
            alarm: None,
            wait_until: None,
        })
    }

    /// Runs it to its answer.
    // the attempt loop
    pub(super) async fn run(mut self: Box<Self>) -> Response<AnswerBody> {
        loop {
            let choice = match self.choose().await {
                Ok(choice) => choice,
                Err(refusal) => return self.nobody(&refusal),
            };
            let Tried { choice, outcome, watch } = self.attempt(choice).await;
            let verdict = retry::verdict(&outcome.facts);
            let next = self.decide(&outcome.facts, verdict);
            self.learn(&choice, &outcome, verdict, next);
            match next {
                Next::Relay | Next::RelayAsRequestFault => return self.relay(choice, outcome, watch),
                Next::Failover | Next::Again => self.set_aside(&choice, outcome, watch, next),
                Next::GiveUp(reason) => return self.give_up(choice, outcome, watch, reason),
            }
        }
    }

    /// The backend of the next attempt: one not tried yet, else one tried before, else whoever comes in time.
    async fn choose(&mut self) -> Result<Choice, Refusal> {
        self.follow_reload();
        let state = self.pool.state.clone();
        let mut room = None;
        loop {
            let nobody = match self.pick() {
                Ok(choice) => return Ok(choice),
                Err(Nobody::AllTried) => {
                    let Some(until) = self.may_wait(Nobody::AllTried) else { return Err(self.all_failed()) };
                    self.back_off(until).await;
                    self.tried.clear();
                    continue;
                }
                Err(nobody) => nobody,
            };
            let Some(until) = self.may_wait(nobody) else { return Err(refusal(nobody)) };
            match &room {
                // One more look from inside the room: a change between look and entry would be missed.
                None => room = Some(state.waiting()),
                Some(room) => {
                    let pause = until.since(clock::now());
                    // Either way the next look tells.
                    let _ = tokio::time::timeout(pause, room.changed()).await;
                    self.follow_reload();
                }
            }
        }
    }

    /// Everybody was tried and there is no time for another round.
    fn all_failed(&self) -> Refusal {
        match self.failed {
            Some(Facts { sent: true, cause, .. }) => Refusal::Failed { cause, enough: "all_tried" },
            // Nobody has even seen the request.
            Some(_) | None => Refusal::Down,
        }
    }

    fn pick(&self) -> Result<Choice, Nobody> {
        self.worker.with_rng(|rng| self.pool.pick(&self.wanted(), rng))
    }

    pub(super) fn wanted(&self) -> Wanted<'_> {
        Wanted {
            tried: &self.tried,
            class: self.asked.class,
            model: self.pool.judged_model(self.asked.model.as_deref()),
            affinity: self.asked.affinity,
            prompt_bytes: self.asked.prompt_bytes,
            replayable: self.is_replayable(),
        }
    }

    /// Streams last for minutes: each attempt sees the pool as it is then.
    fn follow_reload(&mut self) {
        let snapshot = self.worker.directory.look();
        if let Some(pool) = snapshot.pools.iter().find(|pool| Arc::ptr_eq(&pool.state, &self.pool.state))
            && !Arc::ptr_eq(pool, &self.pool)
        {
            self.pool = pool.clone();
        }
    }

    /// Everybody was tried: a pause before the next round, within the time for waiting.
    async fn back_off(&mut self, until: Moment) {
        self.rounds += 1;
        let pause = self.worker.with_rng(|rng| backoff(&self.policy, self.rounds, rng));
        tokio::time::sleep(pause.min(until.since(clock::now()))).await;
    }

    /// How long a backend may be waited for; `None` when it is enough or would be for nothing.
    fn may_wait(&mut self, nobody: Nobody) -> Option<Moment> {
        let now = clock::now();
        let most = now + self.policy.wait_max;
        let end = *self.wait_until.get_or_insert(self.asked.total.map_or(most, |total| total.min(most)));
        match nobody {
            _ if end <= now => None,
            Nobody::Busy { until: Some(until) } if until > end => None,
            Nobody::Busy { until: Some(until) } => Some(until.max(now + clock::ALARM_TICK).min(end)),
            Nobody::Busy { until: None } | Nobody::Down | Nobody::AllTried => Some(end),
        }
    }

    pub(super) fn is_replayable(&self) -> bool {
        !self.body.is_streamed() && self.policy.replay.allows(&self.asked.nature)
    }

    fn decide(&self, facts: &Facts, verdict: Verdict) -> Next {
        let first = self.history.attempts() == 0;
        let state = &self.pool.state;
        let budget = || state.may_retry(&self.policy, first);
        match decide(&self.policy, &self.history, facts, verdict, self.is_replayable(), budget) {
            Next::Failover | Next::Again if !self.body.is_here() => Next::GiveUp(Reason::NotReplayable),
            next => next,
        }
    }

    /// Teaches the judge, and writes the attempt down.
    pub(super) fn learn(&mut self, choice: &Choice, outcome: &Outcome, verdict: Verdict, next: Next) {
        let facts = &outcome.facts;
        let own_fault = next == Next::RelayAsRequestFault;
        if own_fault && let Some(receipt) = self.blamed.take() {
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
        if observation == Observation::Fault {
            self.blamed = Some(choice.receipt());
        }
        self.note_speed(choice, outcome, verdict);
        if verdict == Verdict::Misconfigured {
            let at = &choice.backend().metrics;
            let model = self.asked.model.as_deref();
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
        match self.history.attempts() {
            _ if self.hedged == Some(choice.backend().id) => "hedge",
            0 => "first",
            _ if self.ledger.has_tried(choice.backend()) => "retry",
            _ => "failover",
        }
    }

    /// On to the next attempt.
    fn set_aside(&mut self, choice: &Choice, outcome: Outcome, watch: Watch, next: Next) {
        self.history.add(&outcome.facts);
        self.failed = Some(outcome.facts);
        self.pool.state.metrics.count_retry(outcome.facts.cause.name());
        self.fresh = next == Next::Again;
        if next == Next::Failover {
            self.tried.push(choice.backend().id);
        }
        // Only what is whole can be shown later; the connection of anything else closes here.
        if let Some(answer @ (Answer::Whole { .. } | Answer::Refused { .. })) = outcome.answer {
            self.last = Some(answer);
        }
        self.alarm = Some(watch.into_alarm());
    }

    fn give_up(
        self: Box<Self>,
        choice: Choice,
        outcome: Outcome,
        watch: Watch,
        reason: Reason,
    ) -> Response<AnswerBody> {
        if outcome.answer.is_some() {
            return self.relay(choice, outcome, watch);
        }
        let refusal = match reason {
            Reason::Client => self.body.fault(),
            _ if outcome.facts.phase == Phase::Connect => Refusal::Down,
            _ => Refusal::Failed { cause: outcome.facts.cause, enough: reason.name() },
        };
        self.nobody(&refusal)
    }

    /// No further attempt: the latest answer if there was one, else an error of our own.
    fn nobody(mut self: Box<Self>, refusal: &Refusal) -> Response<AnswerBody> {
        match self.last.take() {
            Some(Answer::Whole { head, body, trailers, held }) => {
                self.whole(head, |ledger| AnswerBody::held(body, trailers, ledger, held))
            }
            Some(Answer::Refused { status, body }) => self.refused(status, body),
            _ => refuse(self.ledger, self.asked.dialect, refusal),
        }
    }

    /// The commit point: from here on the client sees it.
    fn relay(mut self: Box<Self>, choice: Choice, outcome: Outcome, watch: Watch) -> Response<AnswerBody> {
        let taught = retry::verdict(&outcome.facts) != Verdict::Success;
        let cause = outcome.facts.cause;
        match outcome.answer {
            None => {
                let refusal = Refusal::Failed { cause, enough: "not_retried" };
                self.nobody(&refusal)
            }
            Some(Answer::Whole { head, body, trailers, held }) => {
                self.whole(head, |ledger| AnswerBody::held(body, trailers, ledger, held))
            }
            Some(Answer::Refused { status, body }) => self.refused(status, body),
            Some(Answer::Begun { head, ahead, body }) => {
                let idle = self.pool.config.clocks.body_idle;
                let (head, serving, _) = self.serve(head, choice, watch, outcome.started, taught);
                Response::from_parts(head, AnswerBody::plain(ahead, body, serving, idle))
            }
            Some(Answer::Tokens { head, ahead, stream, body }) => {
                self.ledger.first_token();
                let clocks = &self.pool.config.clocks;
                let silence =
                    Silence { inter_token: clocks.inter_token, max: clocks.silence_max, since: clock::now() };
                let words = (self.asked.endpoint, self.asked.dialect);
                let (head, serving, _) = self.serve(head, choice, watch, outcome.started, taught);
                let relay = EventRelay::new(ahead, body, stream, serving, words, silence);
                Response::from_parts(head, AnswerBody::events(relay))
            }
            Some(Answer::Switched { head, upgraded, body }) => {
                let (head, serving, switch) = self.serve(head, choice, watch, outcome.started, taught);
                tunnel::start(head, switch, upgraded, body, serving)
            }
        }
    }

    fn serve(
        mut self: Box<Self>,
        mut head: response::Parts,
        choice: Choice,
        watch: Watch,
        started: Moment,
        told: bool,
    ) -> (response::Parts, Serving, Option<OnUpgrade>) {
        self.ledger.answered(head.status);
        head.headers.insert(X_REQUEST_ID, self.ledger.id.clone());
        let own_credentials = choice.member().params.own_credentials;
        let serving = Serving { choice, ledger: self.ledger, watch, started, own_credentials, told };
        (head, serving, self.switch)
    }

    fn whole(
        mut self: Box<Self>,
        mut head: response::Parts,
        body: impl FnOnce(Ledger) -> AnswerBody,
    ) -> Response<AnswerBody> {
        self.ledger.answered(head.status);
        self.ledger.ended(End::Complete);
        self.say_when_to_return(&mut head);
        head.headers.insert(X_REQUEST_ID, self.ledger.id.clone());
        Response::from_parts(head, body(self.ledger))
    }

    /// A backend's `Retry-After` is about itself; the client may come back as soon as any of the pool takes it.
    fn say_when_to_return(&self, head: &mut response::Parts) {
        if !matches!(head.status.as_u16(), 429 | 503 | 529) {
            return;
        }
        let model = self.pool.judged_model(self.asked.model.as_deref());
        if let Some(until) = self.pool.busy_until(model) {
            head.headers.insert(header::RETRY_AFTER, whole_seconds(until.since(clock::now())));
            head.headers.remove("retry-after-ms");
        }
    }

    /// An error that stood where a stream should have begun becomes a real status.
    fn refused(mut self: Box<Self>, status: StatusCode, body: bytes::Bytes) -> Response<AnswerBody> {
        self.ledger.answered(status);
        self.ledger.ended(End::Complete);
        let mut response = Response::new(());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(X_REQUEST_ID, self.ledger.id.clone());
        response.map(|()| AnswerBody::whole(body, None, self.ledger))
    }
}

/// Makes sure that a connection to some backend of `pool` stands: `100 Continue` promises that the body
/// has somewhere to go. Waits `wait` for one, as an exchange would.
///
/// # Errors
/// When none can be made.
pub(super) async fn stand_by(
    worker: &Worker,
    pool: &Arc<Pool>,
    asked: &Wanted<'_>,
    wait: Duration,
) -> Result<(), Refusal> {
    let until = clock::now() + wait;
    let mut room = None;
    let mut tried: SmallVec<[BackendId; 4]> = SmallVec::new();
    loop {
        let wanted = Wanted { tried: &tried, ..*asked };
        let nobody = match worker.with_rng(|rng| pool.pick(&wanted, rng)) {
            Ok(choice) if connects(worker, &choice).await => return Ok(()),
            Ok(choice) => {
                tried.push(choice.backend().id);
                continue;
            }
            Err(nobody) => nobody,
        };
        let left = until.since(clock::now());
        if left.is_zero() {
            return Err(refusal(nobody));
        }
        match &room {
            // One more look from inside the room: a change between look and entry would be missed.
            None => room = Some(pool.state.waiting()),
            Some(room) => {
                // Either way the next look tells.
                let _ = tokio::time::timeout(left.min(STAND_BY_LOOK), room.changed()).await;
                tried.clear();
            }
        }
    }
}

/// Whether a connection stands, or can be made.
async fn connects(worker: &Worker, choice: &Choice) -> bool {
    let member = choice.member();
    match member.backend.lane(worker.index).lease(&member.target, Want::Any).await {
        Ok(lease) => {
            lease.give_back();
            true
        }
        Err(_refused) => {
            worker.with_rng(|rng| choice.observe(About::Backend, Observation::Fault, rng));
            false
        }
    }
}

fn refusal(nobody: Nobody) -> Refusal {
    match nobody {
        Nobody::Busy { until } => Refusal::Busy(until.map(|until| until.since(clock::now()))),
        Nobody::Down | Nobody::AllTried => Refusal::Down,
    }
}
