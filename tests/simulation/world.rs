//! One history: a plan, a gateway, and a clock that jumps from event to event.
//!
//! The exchange is that of `src/proxy/exchange.rs`, step by step: choose, attempt, judge, decide, learn, and then relay,
//! move on or give up. What takes time there is an event here. Every step is put before the [`Rules`], and told to the
//! trace when one is wanted.

use crate::gateway::{Change, Choice, Gateway, Nobody, Told};
use crate::plan::{PROBE_EVERY, PROBE_JITTER, Plan};
use crate::replica::{Ailment, Fate, GAP, Replica, Request};
use crate::rules::Rules;
use evergate::policy::Moment;
use evergate::policy::admission::{Full, Priority};
use evergate::policy::health::{Observation, ProbeVerdict, Transition};
use evergate::policy::outlier::Measure;
use evergate::policy::progress::{Kind, SoftClocks, Verified, Work};
use evergate::policy::retry::{
    Cause, Facts, History, Nature, Next, Phase, Reason, Verdict, backoff, decide, verdict,
};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::fmt::Write as _;
use std::time::Duration;

/// Between two looks of the judges' clock.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two looks for backends that stand still.
const WATCH_EVERY: Duration = Duration::from_millis(250);
/// A probe on demand is answered at once, or not at all; the next begins no sooner than this.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(1);
/// A long stream tells its speed so often.
const STRETCH: Duration = Duration::from_secs(2);
/// More events than this are a loop.
const EVENTS_MAX: usize = 200_000;

/// What the world comes to.
pub(crate) struct Outcome {
    pub(crate) rules: Rules,
    pub(crate) trace: String,
}

/// Lives through the history of a seed.
pub(crate) fn live(seed: u64, traced: bool) -> Outcome {
    World::new(Plan::of(seed), seed, traced).live()
}

/// Lives through a plan made by hand.
pub(crate) fn live_plan(plan: Plan, seed: u64) -> Outcome {
    World::new(plan, seed, false).live()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives(usize),
    /// An exchange's time has come, if it is still where it was (`epoch`).
    Due {
        exchange: usize,
        epoch: u32,
    },
    Stretch {
        exchange: usize,
        epoch: u32,
    },
    ClientLeaves(usize),
    Probe {
        backend: usize,
        epoch: u32,
    },
    Falls {
        backend: usize,
        ailment: Option<usize>,
    },
    Lies {
        backend: usize,
        lie: Option<usize>,
    },
    Operator {
        backend: usize,
        order: usize,
    },
    Joins(usize),
    Look,
    Watch,
    /// A first token is late, if that attempt still waits for it.
    Late {
        exchange: usize,
        attempt: u64,
    },
    /// The time of the attempt beside the first has come.
    Beside {
        exchange: usize,
        attempt: u64,
    },
    /// Whose turn it is: a slot was freed, or somebody may find a backend now.
    Call {
        look: bool,
    },
    Verified {
        backend: usize,
        asked: Moment,
    },
    ShouldBeWell,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// For a backend, until then at the longest.
    Waiting {
        until: Moment,
    },
    /// Everybody was tried: a pause before the next round.
    BackingOff,
    /// Up to the first token.
    Attempting(Attempt),
    /// It has failed, so; the one beside it goes on.
    Overlooked(Attempt, Facts),
    /// Past the commit point.
    Relaying(Attempt),
    Ended,
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    /// Never used twice.
    id: u64,
    choice: Choice,
    began: Moment,
    fate: Fate,
    /// When the part of the stream began whose speed is measured next.
    stretch: Moment,
    /// The budget paid for it because its backend is a suspect.
    owed: bool,
    /// Its backend fell silent then.
    stalled: Option<Moment>,
    /// As a trial it has shown what it will.
    shown: bool,
}

struct Exchange {
    request: Request,
    key: u64,
    began: Moment,
    state: State,
    epoch: u32,
    history: History,
    stale: u32,
    tried: Vec<usize>,
    rounds: u32,
    fresh: bool,
    blamed: Option<usize>,
    /// The latest failure was of a request that had been sent: the budget has paid for the next.
    paid: bool,
    /// End of all waiting for a slot, and for a backend that is down or asked for a pause.
    slot_until: Option<Moment>,
    backend_until: Option<Moment>,
    /// Attempts there had been when it began to wait for a pause to end.
    pause_after: Option<u32>,
    /// It was let in from a crowd, which hears of its first token.
    paced: bool,
    kind: Kind,
    /// How the latest attempt failed.
    failed: Option<Cause>,
    /// A second attempt, while the first is late.
    beside: Option<Attempt>,
    hedges: u32,
}

struct World {
    plan: Plan,
    gateway: Gateway,
    replicas: Vec<Replica>,
    exchanges: Vec<Exchange>,
    queue: BinaryHeap<Reverse<(Moment, u64, Event)>>,
    sequence: u64,
    probe_epochs: Vec<u32>,
    next_probe: Vec<Moment>,
    now: Moment,
    ended: usize,
    /// Exchanges that have not ended.
    live: BTreeSet<usize>,
    attempts: u64,
    /// When each backend was last asked on demand.
    verified: Vec<Option<Moment>>,
    /// Of the model; the policies have their own.
    rng: fastrand::Rng,
    rules: Rules,
    trace: Option<String>,
}

impl World {
    fn new(plan: Plan, seed: u64, traced: bool) -> Self {
        let members = plan.members.len();
        Self {
            gateway: Gateway::new(&plan, seed ^ 0x5eed),
            replicas: vec![Replica::default(); members],
            exchanges: Vec::new(),
            queue: BinaryHeap::new(),
            sequence: 0,
            probe_epochs: vec![0; members],
            next_probe: vec![Moment::NEVER; members],
            now: Moment::ZERO,
            ended: 0,
            live: BTreeSet::new(),
            attempts: 0,
            verified: vec![None; members],
            rng: fastrand::Rng::with_seed(!seed),
            rules: Rules::new(members),
            trace: traced.then(String::new),
            plan,
        }
    }

    fn live(mut self) -> Outcome {
        self.foresee();
        let mut events = 0;
        while let Some(Reverse((at, _, event))) = self.queue.pop() {
            self.now = at;
            self.happens(event);
            self.rules.at_rest(&self.gateway, at, at < self.plan.end);
            events += 1;
            self.rules.require(events < EVENTS_MAX, "a history ends", || format!("{event:?} at {at:?}"));
            if self.rules.broken.is_some() {
                break;
            }
        }
        self.rules.over(&self.gateway, self.exchanges.len(), self.ended);
        if let Some(broken) = self.rules.broken.clone() {
            self.note(|| format!("BROKEN {broken}"));
        }
        Outcome { rules: self.rules, trace: self.trace.unwrap_or_default() }
    }

    /// Puts all that is known beforehand into the queue.
    fn foresee(&mut self) {
        for n in 0..self.plan.arrivals.len() {
            self.at(self.plan.arrivals[n].0, Event::Arrives(n));
        }
        for backend in 0..self.plan.members.len() {
            let member = self.plan.members[backend].clone();
            for (n, (span, _)) in member.ailments.iter().enumerate() {
                self.at(span.from, Event::Falls { backend, ailment: Some(n) });
                self.at(span.until, Event::Falls { backend, ailment: None });
            }
            for (n, (span, _)) in member.lies.iter().enumerate() {
                self.at(span.from, Event::Lies { backend, lie: Some(n) });
                self.at(span.until, Event::Lies { backend, lie: None });
            }
            for (order, (at, _)) in member.operator.iter().enumerate() {
                self.at(*at, Event::Operator { backend, order });
            }
            // Whatever overlapped, from then on all is well.
            self.at(self.plan.well_from, Event::Falls { backend, ailment: None });
            self.at(self.plan.well_from, Event::Lies { backend, lie: None });
            if member.joins > Moment::ZERO {
                self.at(member.joins, Event::Joins(backend));
            } else {
                self.probe_at(backend, self.now);
            }
        }
        self.at(Moment::ZERO, Event::Look);
        self.at(Moment::ZERO, Event::Watch);
        if let Some(by) = self.plan.eligible_by {
            self.at(by, Event::ShouldBeWell);
        }
    }

    fn at(&mut self, at: Moment, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((at, self.sequence, event)));
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let _ = writeln!(trace, "{:>9.3}s  {}", self.now.as_micros() as f64 / 1e6, what());
        }
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Arrives(n) => self.arrives(n),
            Event::Due { exchange, epoch } if self.exchanges[exchange].epoch == epoch => self.due(exchange),
            Event::Stretch { exchange, epoch } if self.exchanges[exchange].epoch == epoch => {
                self.stretch_over(exchange);
            }
            Event::Due { .. } | Event::Stretch { .. } => {}
            Event::ClientLeaves(x) => self.client_leaves(x),
            Event::Probe { backend, epoch } if self.probe_epochs[backend] == epoch => self.probe(backend),
            Event::Probe { .. } => {}
            Event::Falls { backend, ailment } => self.falls(backend, ailment),
            Event::Lies { backend, lie } => {
                self.replicas[backend].lie = lie.map(|n| self.plan.members[backend].lies[n].1);
            }
            Event::Operator { backend, order } => {
                let state = self.plan.members[backend].operator[order].1;
                self.note(|| format!("b{backend}: operator says {}", state.name()));
                self.rules.count(state.name());
                self.gateway.backends[backend].admin = state;
                self.settle();
                self.look_again();
            }
            Event::Joins(backend) => {
                self.note(|| format!("b{backend}: joins"));
                self.gateway.join(backend, self.now);
                self.settle();
                self.probe_at(backend, self.now);
            }
            Event::Look => {
                let mut changes = Vec::new();
                self.gateway.look(self.now, &mut changes);
                self.gateway.crowd.forget_caps(self.now);
                self.take(&changes);
                if self.now < self.plan.end {
                    self.at(self.now + LOOK_EVERY, Event::Look);
                }
            }
            Event::Watch => self.watch(),
            Event::Call { look } => self.call(look),
            Event::Late { exchange, attempt } => self.late(exchange, attempt),
            Event::Beside { exchange, attempt } => {
                if let Some(beside) = self.exchanges[exchange].beside.filter(|beside| beside.id == attempt) {
                    let facts = self.facts_of(exchange, &beside);
                    self.beside_ends(exchange, facts);
                }
            }
            Event::Verified { backend, asked } => {
                let verdict = self.replicas[backend].probe(&mut self.rng);
                let answered = verdict != ProbeVerdict::Fail;
                self.rules.count(if answered { "verify answered" } else { "verify unanswered" });
                self.gateway.silence.verified(backend, Verified { asked, ended: self.now, answered });
            }
            Event::ShouldBeWell => self.rules.recovered(&self.gateway, &self.plan, self.now),
        }
    }

    // The world outside

    fn falls(&mut self, i: usize, ailment: Option<usize>) {
        let ailment = ailment.map(|n| self.plan.members[i].ailments[n].1);
        self.replicas[i].ailment = ailment;
        match ailment {
            Some(ailment) => {
                self.rules.count(ailment.name());
                self.note(|| format!("b{i}: {ailment:?}"));
            }
            None => self.note(|| format!("b{i}: well")),
        }
        if matches!(ailment, Some(Ailment::Frozen | Ailment::Hollow)) {
            self.stall(i);
        }
        if ailment != Some(Ailment::Crashed) {
            return;
        }
        for x in self.live.clone() {
            if self.exchanges[x].beside.is_some_and(|beside| beside.choice.backend() == i) {
                let facts = Facts { sent: true, ..Facts::new(Phase::Head, Cause::Closed) };
                self.beside_ends(x, facts);
            }
            match self.exchanges[x].state {
                State::Attempting(attempt) if attempt.choice.backend() == i => {
                    let facts = Facts { sent: true, ..Facts::new(Phase::Head, Cause::Closed) };
                    self.attempt_ends(x, attempt, facts);
                }
                State::Relaying(attempt) if attempt.choice.backend() == i => {
                    self.stream_ends(x, attempt, Some(Cause::Truncated));
                }
                _ => {}
            }
        }
    }

    /// What runs there comes to a stop, and only its clocks will end it.
    fn stall(&mut self, i: usize) {
        let (now, clocks) = (self.now, self.plan.policies.clocks);
        let silent = |attempt: Attempt, after: Duration, phase, cause| {
            let facts = Facts { sent: true, answered: phase != Phase::Head, ..Facts::new(phase, cause) };
            let fate = Fate::Ends { after, facts: Facts { took: after, ..facts } };
            Attempt { fate, stalled: Some(now), ..attempt }
        };
        for x in self.live.clone() {
            if let Some(beside) = self.exchanges[x].beside.filter(|beside| beside.choice.backend() == i) {
                let stalled = silent(beside, clocks.first_token, Phase::Head, Cause::FirstTokenTimeout);
                // The end it was to come to is none of the new one.
                self.attempts += 1;
                let id = self.attempts;
                self.exchanges[x].beside = Some(Attempt { id, ..stalled });
                let due = (stalled.began + clocks.first_token).max(now + clocks.connect);
                self.at(due, Event::Beside { exchange: x, attempt: id });
            }
            match self.exchanges[x].state {
                State::Attempting(attempt) if attempt.choice.backend() == i => {
                    let stalled = silent(attempt, clocks.first_token, Phase::Head, Cause::FirstTokenTimeout);
                    self.exchanges[x].state = State::Attempting(stalled);
                    // An answer in one piece may have taken longer already.
                    self.due_at(x, (attempt.began + clocks.first_token).max(now + clocks.connect));
                }
                State::Relaying(attempt) if attempt.choice.backend() == i => {
                    let stalled = silent(attempt, clocks.stream, Phase::Stream, Cause::Silence);
                    self.exchanges[x].state = State::Relaying(stalled);
                    self.due_at(x, now + clocks.stream);
                }
                _ => {}
            }
        }
    }

    fn probe_at(&mut self, i: usize, at: Moment) {
        if self.plan.policies.health.probes {
            self.probe_epochs[i] += 1;
            self.next_probe[i] = at;
            let epoch = self.probe_epochs[i];
            self.at(at, Event::Probe { backend: i, epoch });
        }
    }

    fn probe(&mut self, i: usize) {
        let verdict = self.replicas[i].probe(&mut self.rng);
        self.rules.count(match verdict {
            ProbeVerdict::Pass => "probe passes",
            ProbeVerdict::WeakPass => "probe passes weakly",
            ProbeVerdict::Fail => "probe fails",
            ProbeVerdict::Refusing => "probe refused",
        });
        self.tell(i, Told::Probe(verdict));
        if self.now < self.plan.end {
            let pause = self.probe_pause(i);
            self.probe_at(i, self.now + pause);
        }
    }

    fn probe_pause(&mut self, i: usize) -> Duration {
        let steady = self.gateway.backends[i].health.steady(self.now);
        let pause = if steady { PROBE_EVERY.0 } else { PROBE_EVERY.1 };
        pause.mul_f64(1.0 + PROBE_JITTER * (2.0 * self.rng.f64() - 1.0))
    }

    // The judges

    fn tell(&mut self, i: usize, told: Told) {
        self.rules.told(&self.gateway, i, told, self.now);
        let mut changes = Vec::new();
        self.gateway.tell(i, told, self.now, &mut changes);
        self.take(&changes);
    }

    fn observe(&mut self, i: usize, observation: Observation) {
        self.tell(i, Told::Observation(observation));
    }

    fn settle(&mut self) {
        let mut changes = Vec::new();
        self.gateway.settle(self.now, &mut changes);
        self.take(&changes);
    }

    /// What follows from transitions: rescue, waking, sooner probes.
    fn take(&mut self, changes: &[Change]) {
        for change in changes {
            self.note(|| format!("b{}: {} [{:?}]", change.backend, change.transition, change.told));
            self.rules.changed(&self.plan.policies, change, self.now);
        }
        for change in changes {
            let i = change.backend;
            match change.transition {
                Transition::Ejected { .. }
                | Transition::TrialFailed { .. }
                | Transition::ProbesFailed { .. } => {
                    self.rescue(i);
                }
                Transition::Probation => self.look_again(),
                Transition::ProbesPassed { .. }
                | Transition::ProvenByTraffic
                | Transition::RefusalOver
                | Transition::Readmitted { .. } => self.backend_returned(),
                _ => {}
            }
            let soon = self.now + PROBE_EVERY.1;
            if self.next_probe[i] > soon
                && !self.gateway.backends[i].health.steady(self.now)
                && self.now < self.plan.end
            {
                self.probe_at(i, soon);
            }
        }
    }

    // Silence

    /// Looks for backends that stand still: asks the suspect, ejects the proven.
    fn watch(&mut self) {
        if self.now < self.plan.end || !self.live.is_empty() {
            self.at(self.now + WATCH_EVERY, Event::Watch);
        }
        self.look_again();
        let work = self.unfinished();
        let usable: Vec<bool> = (0..work.len()).map(|i| self.gateway.is_eligible(i, self.now)).collect();
        for found in self.gateway.silence.look(&work, &usable, self.now) {
            let i = found.backend;
            self.rules.count("suspected");
            self.note(|| format!("b{i}: {:?}, {:?}", found.standstill, found.proof));
            let Some(proof) = found.proof else {
                self.verify(i);
                continue;
            };
            self.rules.stuck(&self.plan.policies, (i, proof), found.standstill.late, &work[i], self.now);
            let mut changes = Vec::new();
            let eligible = self.gateway.eligible(self.now);
            self.gateway.tell(i, Told::Stuck(proof), self.now, &mut changes);
            let ejected = |change: &Change| {
                change.backend == i && matches!(change.transition, Transition::Ejected { .. })
            };
            if changes.iter().any(ejected) {
                self.gateway.silence.ejected(self.now);
                self.rules.ejected_stuck(i, proof, eligible, self.now);
            }
            self.take(&changes);
        }
    }

    /// What is unfinished at each backend, as far as it waits for its backend.
    fn unfinished(&mut self) -> Vec<Vec<Work>> {
        let mut work = vec![Vec::new(); self.replicas.len()];
        for &x in &self.live {
            let exchange = &self.exchanges[x];
            let mut add = |attempt: &Attempt, heard: Moment, streaming: bool| {
                let (kind, started) = (exchange.kind, attempt.began);
                work[attempt.choice.backend()].push(Work { kind, started, heard, streaming });
            };
            match &exchange.state {
                State::Attempting(attempt) => add(attempt, attempt.began, false),
                State::Relaying(attempt) => {
                    let heard = match (attempt.stalled, attempt.fate) {
                        (Some(at), _) => at,
                        (None, Fate::Answers { gap, .. }) => latest_token(attempt.stretch, gap, self.now),
                        (None, Fate::Ends { .. }) => attempt.stretch,
                    };
                    if attempt.stalled.is_none() {
                        self.gateway.silence.moved(attempt.choice.backend(), heard);
                        self.rules.gave_token(attempt.choice.backend(), heard);
                    }
                    add(attempt, heard, true);
                }
                State::Overlooked(..) | State::Waiting { .. } | State::BackingOff | State::Ended => {}
            }
            if let Some(beside) = &exchange.beside {
                add(beside, beside.began, false);
            }
        }
        work
    }

    fn verify(&mut self, i: usize) {
        let latest = self.verified[i];
        if !self.plan.policies.health.probes || latest.is_some_and(|at| self.now.since(at) < VERIFY_TIMEOUT) {
            return;
        }
        self.verified[i] = Some(self.now);
        let silent = self.replicas[i].is_silent();
        let after = if silent { VERIFY_TIMEOUT } else { Duration::from_millis(5) };
        self.at(self.now + after, Event::Verified { backend: i, asked: self.now });
    }

    /// A first token is late: somebody else is asked as well, where that may be.
    fn late(&mut self, x: usize, id: u64) {
        let State::Attempting(first) = self.exchanges[x].state else { return };
        if first.id != id {
            return;
        }
        let due = first.began + self.gateway.silence.clocks().first_token(self.exchanges[x].kind);
        if due > self.now {
            return self.at(due, Event::Late { exchange: x, attempt: id });
        }
        self.rules.count("late");
        if !self.replayable(x) || self.gateway.crowd.len() > 0 {
            return;
        }
        let mut tried = self.exchanges[x].tried.clone();
        tried.push(first.choice.backend());
        let (paid, key) = (self.exchanges[x].paid, self.exchanges[x].key);
        // Never somebody's trial: what is late already must not wait for a convalescent.
        let Ok(choice) = self.gateway.pick(&tried, false, paid, key, Some(first.began), self.now) else {
            return;
        };
        let owed = matches!(choice, Choice::Suspect(_)) && !paid;
        let ratio = self.plan.policies.progress.hedge_ratio;
        let requests = self.gateway.budget.requests(self.now);
        let began = self.gateway.silence.hedges.begin(self.now, ratio, requests);
        if !began || !self.gateway.budget.withdraw(self.now, &self.plan.policies.retry) {
            if began {
                self.gateway.silence.hedges.ended();
            }
            if owed {
                self.gateway.budget.refund_suspect(self.now);
            }
            return self.rules.count("hedge refused");
        }
        let replayable = self.replayable(x);
        self.rules.hedged(&self.plan.policies, replayable, self.now);
        self.exchanges[x].hedges += 1;
        let beside = self.send(x, choice, &tried, owed);
        self.exchanges[x].beside = Some(beside);
        let due = self.now + self.waits(x, &beside);
        self.at(due, Event::Beside { exchange: x, attempt: beside.id });
    }

    /// The one beside has come to its end so: it is believed if it spoke, or if the first has failed.
    fn beside_ends(&mut self, x: usize, facts: Facts) {
        let Some(second) = self.exchanges[x].beside.take() else { return };
        self.gateway.silence.hedges.ended();
        self.rules.hedge_over();
        match self.exchanges[x].state {
            State::Attempting(first) if spoke(&facts) => {
                self.rules.count("hedge won");
                self.exchanges[x].epoch += 1;
                self.exchanges[x].state = State::Attempting(second);
                self.trial_shown(&first);
                self.observe(first.choice.backend(), Observation::Silent);
                let (kind, waited) = (self.exchanges[x].kind, self.now.since(first.began));
                if facts.took >= self.gateway.silence.clocks().first_token(kind) {
                    self.gateway.silence.cut_off(first.choice.backend(), kind, waited, self.now);
                }
                self.exchanges[x].history.sent += 1;
                self.let_go(first);
            }
            State::Attempting(_) => {
                self.rules.count("hedge lost");
                return self.learn_aside(x, second, &facts);
            }
            State::Overlooked(first, failed) if spoke(&facts) => {
                self.rules.count("hedge won");
                self.exchanges[x].state = State::Attempting(second);
                self.learn_aside(x, first, &failed);
            }
            State::Overlooked(first, failed) => {
                self.rules.count("hedge lost");
                self.exchanges[x].state = State::Attempting(first);
                self.learn_aside(x, second, &facts);
                return self.attempt_ends(x, first, failed);
            }
            State::Relaying(_) | State::Waiting { .. } | State::BackingOff | State::Ended => return,
        }
        match second.fate {
            Fate::Answers { .. } if facts.answered => self.first_token(x, second),
            _ => self.attempt_ends(x, second, facts),
        }
    }

    /// An attempt that failed beside another.
    fn learn_aside(&mut self, x: usize, failed: Attempt, facts: &Facts) {
        self.book(x, facts);
        self.trial_shown(&failed);
        let verdict = verdict(facts);
        self.learn(x, failed.choice.backend(), facts, verdict, Next::Failover, false);
        self.exchanges[x].tried.push(failed.choice.backend());
        self.let_go(failed);
    }

    /// A trial has shown what it will, or is lost.
    fn trial_shown(&mut self, attempt: &Attempt) {
        if let Choice::Trial(i) = attempt.choice
            && !attempt.shown
        {
            self.rules.trial_over(i);
        }
    }

    fn rescue(&mut self, i: usize) {
        for x in self.live.clone() {
            let here = |attempt: &Attempt| attempt.choice.backend() == i && attempt.began < self.now;
            let beside = self.exchanges[x].beside.is_some_and(|beside| here(&beside));
            if beside {
                let facts = Facts { sent: true, ..Facts::new(Phase::Head, Cause::Rescued) };
                self.beside_ends(x, facts);
            }
            if let State::Attempting(attempt) = self.exchanges[x].state
                && attempt.choice.backend() == i
                && attempt.began < self.now
                && self.replayable(x)
            {
                let facts = Facts { sent: true, ..Facts::new(Phase::Head, Cause::Rescued) };
                self.attempt_ends(x, attempt, facts);
            }
        }
    }

    // An exchange, in the order of its life

    fn arrives(&mut self, n: usize) {
        let request = self.plan.arrivals[n].1;
        let x = self.exchanges.len();
        let members = self.gateway.backends.iter().filter(|backend| backend.present).count();
        self.exchanges.push(Exchange {
            request,
            key: self.rng.u64(..8),
            began: self.now,
            state: State::BackingOff,
            epoch: 0,
            history: History::new(members),
            stale: 0,
            tried: Vec::new(),
            rounds: 0,
            fresh: false,
            blamed: None,
            paid: false,
            slot_until: None,
            backend_until: None,
            pause_after: None,
            paced: false,
            kind: kind_of(&request),
            failed: None,
            beside: None,
            hedges: 0,
        });
        self.live.insert(x);
        self.rules.count("exchange");
        self.rules.arrived(self.now);
        self.gateway.budget.deposit(self.now);
        if let Some(patience) = request.patience {
            self.at(self.now + patience, Event::ClientLeaves(x));
        }
        self.choose(x);
    }

    fn replayable(&self, x: usize) -> bool {
        let inference = self.exchanges[x].request.replayable;
        let nature = Nature { inference, stateful: !inference, ..Nature::default() };
        self.plan.policies.retry.replay.allows(&nature)
    }

    fn choose(&mut self, x: usize) {
        // Whoever arrives while others wait joins behind them.
        let arrives = self.exchanges[x].history.attempts() == 0 && self.gateway.crowd.len() > 0;
        let picked =
            if arrives { Err(self.gateway.nobody(&self.exchanges[x].tried, self.now)) } else { self.pick(x) };
        match picked {
            Ok(choice) => self.attempt(x, choice),
            Err(nobody) => self.found_nobody(x, nobody),
        }
    }

    fn pick(&mut self, x: usize) -> Result<Choice, Nobody> {
        let replayable = self.replayable(x);
        let exchange = &self.exchanges[x];
        let proven_since = exchange.failed.map(|_| exchange.began);
        let (key, paid) = (exchange.key, exchange.paid);
        let picked = self.gateway.pick(&exchange.tried, replayable, paid, key, proven_since, self.now);
        if picked.is_err() {
            self.rules.nobody(&self.gateway, &self.exchanges[x].tried, self.now);
        }
        picked
    }

    /// It waits, if that may be for something.
    fn found_nobody(&mut self, x: usize, nobody: Nobody) {
        let Some(until) = self.may_wait(x, nobody) else { return self.end(x, end_of(nobody)) };
        self.rules.count("waits");
        self.note(|| format!("x{x}: waits, {nobody:?}"));
        if nobody == Nobody::AllTried {
            return self.back_off(x, until);
        }
        let exchange = &self.exchanges[x];
        let again = exchange.history.attempts() > 0;
        let (priority, began) = (exchange.request.priority, again.then_some(exchange.began));
        let length_max = self.gateway.queue_length_max(self.now);
        match self.gateway.crowd.join(x, priority, began, (until, length_max), self.now) {
            Ok(()) => {
                self.rules.joined(x, priority, length_max);
                self.exchanges[x].state = State::Waiting { until };
                self.due_at(x, until);
            }
            Err(Full) => self.end(x, if again { end_of(nobody) } else { "nobody: queue full" }),
        }
    }

    /// Everybody was tried: a pause before the next round.
    fn back_off(&mut self, x: usize, until: Moment) {
        let tried = self.exchanges[x].tried.clone();
        self.rules.another_round(&self.gateway, &tried, self.now);
        self.exchanges[x].rounds += 1;
        let rounds = self.exchanges[x].rounds;
        let pause = backoff(&self.plan.policies.retry, rounds, &mut self.gateway.rng);
        let bound = self.plan.policies.retry.backoff_max;
        self.rules.require(pause <= bound, "a pause is bounded", || format!("{pause:?}"));
        self.exchanges[x].state = State::BackingOff;
        self.due_at(x, self.now + pause.min(until.since(self.now)));
    }

    fn may_wait(&mut self, x: usize, nobody: Nobody) -> Option<Moment> {
        let (now, policies) = (self.now, &self.plan.policies);
        let exchange = &mut self.exchanges[x];
        let (end, most) = match nobody {
            Nobody::Full => (&mut exchange.slot_until, policies.queue.wait_max),
            Nobody::Busy(_) | Nobody::Down | Nobody::AllTried => {
                (&mut exchange.backend_until, policies.retry.wait_max)
            }
        };
        let end = *end.get_or_insert(now + most);
        if end <= now {
            return None;
        }
        if let Nobody::Busy(until) = nobody {
            let attempts = exchange.history.attempts();
            let pauses_over = *exchange.pause_after.get_or_insert(attempts) < attempts;
            if until > end || pauses_over {
                return None;
            }
        }
        Some(end)
    }

    // The line

    /// Calls one after another, by `src/pool/line.rs`.
    fn call(&mut self, look: bool) {
        let mut in_vain = 0;
        while let Some(called) = self.gateway.crowd.next(in_vain, self.now) {
            let x = called.exchange;
            match self.pick(x) {
                Ok(choice) => {
                    let paced = self.gateway.crowd.let_in(self.now);
                    self.exchanges[x].paced = paced;
                    self.rules.let_in(x, paced, self.now);
                    self.attempt(x, choice);
                    in_vain = 0;
                }
                Err(nobody) => {
                    let full = nobody == Nobody::Full;
                    match self.may_wait(x, nobody) {
                        Some(until) if nobody == Nobody::AllTried => {
                            self.rules.left(x);
                            self.back_off(x, until);
                        }
                        Some(until) => {
                            self.gateway.crowd.in_vain(called, until, look);
                            if look {
                                self.rules.pace_over();
                            }
                            self.exchanges[x].state = State::Waiting { until };
                            self.due_at(x, until);
                            in_vain += 1;
                            if full {
                                return;
                            }
                        }
                        None => {
                            self.rules.left(x);
                            self.end(x, end_of(nobody));
                        }
                    }
                }
            }
            if !look {
                return;
            }
        }
    }

    /// Somebody who waits may find a backend now.
    fn look_again(&mut self) {
        if self.gateway.crowd.len() > 0 {
            self.at(self.now, Event::Call { look: true });
        }
    }

    fn backend_returned(&mut self) {
        if self.gateway.crowd.len() > 0 {
            self.gateway.crowd.backend_returned(self.now);
            self.rules.backend_returned(self.now);
            self.look_again();
        }
    }

    fn due_at(&mut self, x: usize, at: Moment) {
        self.exchanges[x].epoch += 1;
        let epoch = self.exchanges[x].epoch;
        self.at(at, Event::Due { exchange: x, epoch });
    }

    fn due(&mut self, x: usize) {
        match self.exchanges[x].state {
            State::Overlooked(..) => {}
            State::Waiting { until } => {
                let now = self.now;
                self.rules.require(now <= until, "no exchange waits beyond its clocks", || {
                    format!("x{x} at {now:?}")
                });
                let nobody = self.gateway.nobody(&self.exchanges[x].tried, now);
                match self.may_wait(x, nobody) {
                    // For something else by now.
                    Some(until) if nobody != Nobody::AllTried => {
                        self.gateway.crowd.stay(x, until);
                        self.exchanges[x].state = State::Waiting { until };
                        self.due_at(x, until);
                    }
                    _ => {
                        self.leave_line(x);
                        self.end(x, end_of(nobody));
                    }
                }
            }
            State::BackingOff => {
                self.exchanges[x].tried.clear();
                self.choose(x);
            }
            State::Attempting(attempt) => match attempt.fate {
                Fate::Ends { facts, .. } => self.attempt_ends(x, attempt, facts),
                Fate::Answers { .. } => self.first_token(x, attempt),
            },
            State::Relaying(attempt) => {
                let broken = match attempt.fate {
                    Fate::Answers { breaks, .. } => breaks.map(|(cause, _)| cause),
                    Fate::Ends { facts, .. } => Some(facts.cause),
                };
                self.stream_ends(x, attempt, broken);
            }
            State::Ended => self.rules.require(false, "every exchange ends exactly once", || format!("x{x}")),
        }
    }

    fn attempt(&mut self, x: usize, choice: Choice) {
        let owed = matches!(choice, Choice::Suspect(_)) && !self.exchanges[x].paid;
        let tried = self.exchanges[x].tried.clone();
        let attempt = self.send(x, choice, &tried, owed);
        if self.exchanges[x].failed == Some(Cause::Rescued) {
            self.rules.rescued_to(choice.backend(), self.now);
            self.gateway.silence.spare(choice.backend(), self.exchanges[x].kind, self.now);
        }
        self.exchanges[x].state = State::Attempting(attempt);
        let late = self.now + self.gateway.silence.clocks().first_token(self.exchanges[x].kind);
        self.at(late, Event::Late { exchange: x, attempt: attempt.id });
        let after = self.waits(x, &attempt);
        self.due_at(x, self.now + after);
    }

    /// Sends the request to that backend.
    fn send(&mut self, x: usize, choice: Choice, tried: &[usize], owed: bool) -> Attempt {
        let i = choice.backend();
        let exchange = &self.exchanges[x];
        self.rules.begins(&self.gateway, choice, tried, self.now);
        // Kept connections are there when the pool is in use, and not for what must not run twice.
        let reused = !exchange.fresh && self.replayable(x) && self.rng.bool();
        let in_flight = self.gateway.backends[i].in_flight;
        let clocks = &self.plan.policies.clocks;
        let fate =
            self.replicas[i].serve(&self.exchanges[x].request, in_flight, clocks, reused, &mut self.rng);
        let ailment = self.replicas[i].ailment;
        self.note(|| format!("x{x}: attempt at {choice:?}, which is {ailment:?}"));
        self.gateway.begin(i);
        if matches!(choice, Choice::Suspect(_)) {
            self.rules.asked_suspect(&self.plan.policies, owed, self.now);
        }
        self.attempts += 1;
        Attempt {
            id: self.attempts,
            choice,
            began: self.now,
            fate,
            stretch: self.now,
            owed,
            stalled: None,
            shown: false,
        }
    }

    /// How long it takes until something can be shown of it, or it has failed.
    fn waits(&self, x: usize, attempt: &Attempt) -> Duration {
        match attempt.fate {
            Fate::Ends { after, .. } => after,
            Fate::Answers { first, .. } if self.exchanges[x].request.streams => first,
            // Held until whole.
            Fate::Answers { first, gap, .. } => first + self.length(x, gap),
        }
    }

    /// What is known of it then.
    fn facts_of(&self, x: usize, attempt: &Attempt) -> Facts {
        let took = self.now.since(attempt.began);
        let whole = !self.exchanges[x].request.streams;
        match attempt.fate {
            Fate::Ends { facts, .. } => facts,
            Fate::Answers { breaks, .. } => {
                let cause = breaks.filter(|_| whole).map_or(Cause::Answered, |(cause, _)| cause);
                let phase = if whole { Phase::Body } else { Phase::Gate };
                Facts { sent: true, answered: true, took, ..Facts::new(phase, cause) }
            }
        }
    }

    fn length(&self, x: usize, gap: Duration) -> Duration {
        (gap * self.exchanges[x].request.tokens).min(self.plan.policies.clocks.stream)
    }

    fn first_token(&mut self, x: usize, attempt: Attempt) {
        let Fate::Answers { first, gap, breaks } = attempt.fate else { return };
        let whole = !self.exchanges[x].request.streams;
        let facts = self.facts_of(x, &attempt);
        let i = attempt.choice.backend();
        if facts.cause == Cause::Answered {
            self.gateway.saw_speed(i, Measure::FirstToken, attempt.began, first, self.now);
            let kind = self.exchanges[x].kind;
            self.gateway.silence.served(i, kind, attempt.began, facts.took);
            self.rules.gave_token(i, self.now);
        }
        self.attempt_ends(x, attempt, facts);
        if whole {
            return;
        }
        let State::Relaying(attempt) = self.exchanges[x].state else { return };
        let length = self.length(x, gap);
        let lasts = breaks.map_or(length, |(_, share)| length.mul_f64(share));
        self.exchanges[x].state = State::Relaying(Attempt { stretch: self.now, ..attempt });
        self.due_at(x, self.now + lasts);
        if lasts > STRETCH {
            let epoch = self.exchanges[x].epoch;
            self.at(self.now + STRETCH, Event::Stretch { exchange: x, epoch });
        }
    }

    /// Facts are known: judge, decide, learn, act.
    fn attempt_ends(&mut self, x: usize, attempt: Attempt, facts: Facts) {
        if let Some(beside) = self.exchanges[x].beside {
            if !spoke(&facts) {
                self.trial_shown(&attempt);
                let attempt = Attempt { shown: true, ..attempt };
                self.exchanges[x].state = State::Overlooked(attempt, facts);
                self.exchanges[x].epoch += 1;
                return;
            }
            self.rules.count("hedge lost");
            self.drop_beside(x, beside);
            self.exchanges[x].history.sent += 1;
        }
        let i = attempt.choice.backend();
        let facts =
            Facts { serves_others: self.gateway.backends[i].health.serves(self.now, attempt.began), ..facts };
        let verdict = verdict(&facts);
        let next = self.decide(x, &facts, verdict);
        self.note(|| format!("x{x}: {} at b{i}: {}, so {next:?}", facts.cause.name(), verdict.name()));
        self.rules.count(verdict.name());
        self.rules.count(match next {
            Next::Relay => "relay",
            Next::RelayAsRequestFault => "request fault",
            Next::Failover => "failover",
            Next::Again => "again",
            Next::GiveUp(reason) => reason.name(),
        });
        let relays = next == Next::Relay && verdict == Verdict::Success;
        let whole = !self.exchanges[x].request.streams;
        // No longer waiting for a first token: what follows from its lesson must not move it.
        self.exchanges[x].state = if relays { State::Relaying(attempt) } else { State::BackingOff };
        self.exchanges[x].epoch += 1;
        self.book(x, &facts);
        if attempt.owed && !facts.sent {
            self.gateway.budget.refund_suspect(self.now);
            self.rules.refunded();
        }
        self.trial_shown(&attempt);
        self.learn(x, i, &facts, verdict, next, relays && whole);
        match next {
            Next::Relay if relays && !whole => {}
            Next::Relay | Next::RelayAsRequestFault | Next::GiveUp(_) => {
                self.let_go(attempt);
                self.end(x, if relays { "answered" } else { next_name(next) });
            }
            Next::Failover | Next::Again => {
                self.exchanges[x].fresh = next == Next::Again;
                if next == Next::Failover {
                    self.exchanges[x].tried.push(i);
                }
                self.let_go(attempt);
                self.choose(x);
            }
        }
    }

    fn drop_beside(&mut self, x: usize, beside: Attempt) {
        self.exchanges[x].beside = None;
        self.gateway.silence.hedges.ended();
        self.rules.hedge_over();
        self.let_go(beside);
    }

    fn book(&mut self, x: usize, facts: &Facts) {
        let exchange = &mut self.exchanges[x];
        exchange.stale += u32::from(facts.is_stale_connection());
        exchange.history.add(facts);
        exchange.paid = facts.sent && !facts.is_stale_connection();
        exchange.failed = Some(facts.cause);
        let hedged = exchange.hedges > 0;
        let (sent, unsent, stale) =
            (u32::from(exchange.history.sent), u32::from(exchange.history.unsent), exchange.stale);
        let members = exchange.history.members;
        self.rules.attempts(&self.plan.policies, members, (sent, stale, unsent), hedged);
    }

    fn decide(&mut self, x: usize, facts: &Facts, verdict: Verdict) -> Next {
        let replayable = self.replayable(x);
        let exchange = &self.exchanges[x];
        let first = exchange.history.attempts() == 0;
        let (gateway, now) = (&mut self.gateway, self.now);
        let policy = gateway.policies.retry.clone();
        let mut grant = None;
        let next = decide(&policy, &exchange.history, facts, verdict, replayable, || {
            grant = gateway.may_retry(first, now);
            grant.is_some()
        });
        let peak = gateway.peak;
        if next == Next::Failover && facts.sent {
            self.rules.retried(&self.plan.policies, grant, peak, now);
        }
        if facts.sent && matches!(next, Next::Failover | Next::Again) {
            let refused = matches!(verdict, Verdict::Busy | Verdict::Misconfigured);
            self.rules.require(replayable || refused, "what must not run twice is not sent twice", || {
                format!("x{x}: {facts:?}")
            });
        }
        next
    }

    fn learn(&mut self, x: usize, i: usize, facts: &Facts, verdict: Verdict, next: Next, whole: bool) {
        let own_fault = next == Next::RelayAsRequestFault;
        if own_fault && let Some(blamed) = self.exchanges[x].blamed.take() {
            self.gateway.forgive(blamed, self.now);
        }
        let observation = match verdict {
            Verdict::Success => Observation::FirstToken,
            Verdict::Fault if own_fault => Observation::Neutral,
            Verdict::Fault => Observation::Fault,
            Verdict::Busy => Observation::Busy { until: facts.retry_after.map(|after| self.now + after) },
            Verdict::Misconfigured => Observation::Misconfigured,
            Verdict::Neutral | Verdict::Cancelled => Observation::Neutral,
        };
        if observation == Observation::Fault {
            self.exchanges[x].blamed = Some(i);
        }
        let in_flight = self.gateway.backends[i].in_flight;
        match observation {
            Observation::FirstToken => {
                self.gateway.crowd.took_one(i, in_flight, self.now);
                if std::mem::take(&mut self.exchanges[x].paced) {
                    if let Some(pace) = &mut self.gateway.crowd.pace {
                        pace.proven();
                    }
                    self.rules.paced_one_spoke();
                    self.look_again();
                }
            }
            Observation::Busy { .. } => {
                self.gateway.crowd.refused_one(i, in_flight, self.now);
                self.rules.refused(&self.gateway, i);
            }
            _ => {}
        }
        self.observe(i, observation);
        if whole {
            self.observe(i, Observation::Success);
        }
    }

    fn stretch_over(&mut self, x: usize) {
        let State::Relaying(attempt) = self.exchanges[x].state else { return };
        let Fate::Answers { gap, .. } = attempt.fate else { return };
        let i = attempt.choice.backend();
        self.gateway.saw_speed(i, Measure::TokenGap, attempt.stretch, gap, self.now);
        self.gateway.silence.token_gap(gap, self.now);
        let latest = latest_token(attempt.stretch, gap, self.now);
        self.gateway.silence.moved(i, latest);
        self.rules.gave_token(i, latest);
        self.exchanges[x].state = State::Relaying(Attempt { stretch: self.now, ..attempt });
        let epoch = self.exchanges[x].epoch;
        self.at(self.now + STRETCH, Event::Stretch { exchange: x, epoch });
    }

    fn stream_ends(&mut self, x: usize, attempt: Attempt, broken: Option<Cause>) {
        let i = attempt.choice.backend();
        let gap = match attempt.fate {
            Fate::Answers { gap, .. } => gap,
            Fate::Ends { .. } => GAP,
        };
        let (observation, how) = match broken {
            Some(cause) => {
                let facts = Facts { sent: true, answered: true, ..Facts::new(Phase::Stream, cause) };
                let fault = verdict(&facts) == Verdict::Fault;
                self.rules.require(fault, "a stream that breaks is a fault", || format!("{facts:?}"));
                (Observation::Fault, "broken off")
            }
            None => {
                self.gateway.saw_speed(i, Measure::TokenGap, attempt.stretch, gap, self.now);
                self.gateway.silence.token_gap(gap, self.now);
                self.gateway.silence.moved(i, self.now);
                self.rules.gave_token(i, self.now);
                (Observation::Success, "answered")
            }
        };
        // As the relay does: the judge hears of it while the attempt still counts.
        self.exchanges[x].state = State::BackingOff;
        self.observe(i, observation);
        self.let_go(attempt);
        self.end(x, how);
    }

    fn client_leaves(&mut self, x: usize) {
        if let Some(beside) = self.exchanges[x].beside {
            self.drop_beside(x, beside);
        }
        match self.exchanges[x].state {
            State::Ended => return,
            State::Attempting(attempt) | State::Overlooked(attempt, _) => {
                self.trial_shown(&attempt);
                self.let_go(attempt);
            }
            State::Relaying(attempt) => self.let_go(attempt),
            State::Waiting { .. } => self.leave_line(x),
            State::BackingOff => {}
        }
        self.end(x, "client left");
    }

    /// The attempt counts no more, and if it was a trial without an outcome, another may be.
    fn let_go(&mut self, attempt: Attempt) {
        let i = attempt.choice.backend();
        if matches!(attempt.choice, Choice::Trial(_)) {
            self.gateway.backends[i].health.abandon_trial(attempt.began);
        }
        self.gateway.release(i);
        self.rules.ends();
        if self.gateway.crowd.len() > 0 {
            self.at(self.now, Event::Call { look: false });
        }
    }

    fn leave_line(&mut self, x: usize) {
        let waited = self.gateway.crowd.leave(x);
        self.rules.require(waited, "whoever waits has a place", || format!("x{x}"));
        self.rules.left(x);
    }

    fn end(&mut self, x: usize, how: &'static str) {
        self.note(|| format!("x{x}: {how}"));
        self.rules.count(how);
        if how == "answered" {
            self.rules.count(match self.exchanges[x].request.priority {
                Priority::High => "answered, high",
                Priority::Normal => "answered, normal",
                Priority::Low => "answered, low",
            });
        }
        let twice = matches!(self.exchanges[x].state, State::Ended);
        self.rules.require(!twice, "every exchange ends exactly once", || format!("x{x}: {how}"));
        let exchange = &mut self.exchanges[x];
        exchange.state = State::Ended;
        exchange.epoch += 1;
        self.ended += 1;
        self.live.remove(&x);
        // Attempts up to the first token, connections and the waiting for backends all have clocks.
        let clocks = &self.plan.policies.clocks;
        let attempts = exchange.history.attempts() + 1;
        let most = (clocks.first_token + clocks.connect + clocks.stream) * attempts
            + self.plan.policies.retry.wait_max
            + self.plan.policies.queue.wait_max;
        let took = self.now.since(exchange.began);
        self.rules
            .require(took <= most, "no exchange waits beyond its clocks", || format!("x{x} took {took:?}"));
    }
}

/// Whether an answer came that may be shown (`src/proxy/hedge.rs`).
fn spoke(facts: &Facts) -> bool {
    match verdict(facts) {
        Verdict::Success => true,
        Verdict::Neutral => facts.cause.is_answer(),
        Verdict::Fault | Verdict::Busy | Verdict::Misconfigured | Verdict::Cancelled => false,
    }
}

/// Streams and answers in one piece are told apart, and prompts by their length, which first tokens follow.
fn kind_of(request: &Request) -> Kind {
    Kind::of(usize::from(request.streams), (request.first_token.as_secs_f64() * 131_072.0) as u64)
}

fn latest_token(first: Moment, gap: Duration, now: Moment) -> Moment {
    let tokens = now.since(first).as_nanos() / gap.as_nanos().max(1);
    first + gap * u32::try_from(tokens).unwrap_or(u32::MAX)
}

fn end_of(nobody: Nobody) -> &'static str {
    match nobody {
        Nobody::Full => "nobody: full",
        Nobody::Busy(_) => "nobody: busy",
        Nobody::Down => "nobody: down",
        Nobody::AllTried => "nobody: all tried",
    }
}

fn next_name(next: Next) -> &'static str {
    match next {
        Next::GiveUp(
            Reason::Attempts | Reason::Budget | Reason::NotReplayable | Reason::Client | Reason::Time,
        ) => "gave up",
        Next::Relay | Next::RelayAsRequestFault => "relayed as it is",
        Next::Failover | Next::Again => "went on",
    }
}
