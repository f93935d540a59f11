//! A whole answer that says one token over and over is asked again of a peer before it is shown (F22).
//!
//! It costs the client the time of a second answer, and never the first one: where no peer has a better answer in
//! time, the first is shown. What is a run, and who is to be believed, is `policy::degenerate`'s to say.

use std::time::Duration;

use tokio::time::timeout;

use crate::clock;
use crate::policy::degenerate::run_in_json;
use crate::policy::dialect::Endpoint;
use crate::policy::health::Observation;
use crate::policy::resume::ResumeMode;
use crate::policy::retry::{Phase, Verdict, verdict};
use crate::pool::{About, Canary};
use crate::proxy::attempt::{Answer, Attempt, Outcome};
use crate::proxy::exchange::Exchange;
use crate::proxy::hedge::Tried;
use crate::proxy::ledger::Entry;
use crate::proxy::opinion;
use crate::proxy::resume::choose_witness;
use crate::proxy::watch::Watch;
use crate::telemetry::events::OutputDisputed;
use crate::telemetry::metrics::AttemptOutcome;
use crate::upstream::Want;

/// A peer may take this much longer than twice as long as the first answer took.
const PATIENCE: Duration = Duration::from_secs(1);

impl Exchange {
    /// What a whole answer repeats, where a peer may be asked about it.
    pub(in crate::proxy) fn doubtful(&self, outcome: &Outcome) -> Option<Vec<u8>> {
        let resume = &self.leg.pool.config.resume;
        let may_ask = resume.second_opinion
            && resume.mode != ResumeMode::Off
            && matches!(self.asked.endpoint, Endpoint::ChatCompletions | Endpoint::Completions)
            && self.asked.choices == 1
            && self.leg.pool.members.len() > 1
            && self.turn.is_none()
            && self.is_replayable()
            && self.body.is_here();
        if !may_ask || verdict(&outcome.facts) != Verdict::Success {
            return None;
        }
        repeats(outcome)
    }

    /// The attempt itself, whose answer repeats `unit`, or that of a peer whose answer is to be believed instead.
    pub(in crate::proxy) async fn ask_about(&mut self, first: Tried, unit: Vec<u8>) -> Tried {
        let Some(second) = self.ask_witness(&first).await else {
            self.leg.pool.state.metrics.count_opinion("none");
            return first;
        };
        let judged = verdict(&second.outcome.facts);
        if judged != Verdict::Success || !matches!(second.outcome.answer, Some(Answer::Whole { .. })) {
            self.leg.pool.state.metrics.count_opinion("none");
            self.learn_aside(&second);
            return first;
        }
        match repeats(&second.outcome) {
            None => self.replaced(&first, &second),
            Some(other) => {
                // Another run is no better an answer.
                let result = if other == unit { "repeated" } else { "none" };
                self.leg.pool.state.metrics.count_opinion(result);
                self.worker.with_rng(|rng| {
                    second.choice.observe(About::Model, Observation::FirstToken, rng);
                    second.choice.observe(About::Model, Observation::Success, rng);
                });
                let entry = aside(&second, opinion::ROLE, AttemptOutcome::Cancelled, "opinion_given");
                self.ledger.attempt(entry);
                return first;
            }
        }
        second
    }

    /// The same request to a peer, if somebody can take it and the budget allows.
    async fn ask_witness(&mut self, first: &Tried) -> Option<Tried> {
        let mut tried = self.tried.clone();
        tried.push(first.choice.backend().id);
        let choice = choose_witness(&self.worker, &self.leg, &self.asked, tried)?;
        if !self.leg.pool.state.may_ask(&self.leg.policy, first.choice.record.is_wary()) {
            choice.nothing_sent();
            return None;
        }
        let mut watch = Watch::new(self.worker.alarms.alarm(), self.leg.total);
        let body = self.body.out(self.leg.body.as_ref());
        let attempt = Attempt {
            worker: &self.worker,
            asked: &self.asked,
            leg: &self.leg,
            choice: &choice,
            number: u32::from(self.ledger.attempts()) + 2,
            want: Want::Any,
            movable: true,
            may_ask: false,
            watch: &mut watch,
        };
        let within = first.outcome.facts.took * 2 + PATIENCE;
        let outcome = timeout(within, attempt.run(|| body)).await.ok()?;
        watch.keep();
        Some(Tried { choice, outcome, watch })
    }

    /// The first answer is set aside.
    fn replaced(&mut self, first: &Tried, second: &Tried) {
        let choice = &first.choice;
        self.leg.pool.state.metrics.count_opinion("replaced");
        OutputDisputed {
            at: &choice.backend().metrics,
            request_id: self.ledger.id.to_str().unwrap_or_default(),
            peer: &second.choice.backend().name,
            replaced: true,
        }
        .emit(self.worker.telemetry());
        choice.offended(Canary { path: self.leg.path.path().to_owned(), model: self.leg.model.clone() });
        let entry = aside(first, self.role(choice), AttemptOutcome::Neutral, "degenerate");
        self.ledger.attempt(entry);
        self.history.add(&first.outcome.facts);
        self.tried.push(choice.backend().id);
    }
}

/// What a whole answer says over and over.
fn repeats(outcome: &Outcome) -> Option<Vec<u8>> {
    let Some(Answer::Whole { body, text: Some(text), .. }) = &outcome.answer else { return None };
    run_in_json(&body[text.clone()])
}

/// An attempt whose answer is not shown.
fn aside(tried: &Tried, role: &'static str, outcome: AttemptOutcome, cause: &'static str) -> Entry {
    let Outcome { facts, first_byte, started, .. } = &*tried.outcome;
    Entry {
        backend: tried.choice.backend().clone(),
        role,
        outcome,
        cause,
        phase: Phase::Body.name(),
        reused: facts.reused,
        started: *started,
        first_byte: *first_byte,
        lasted: Some(clock::now().since(*started)),
    }
}
