//! How a backend is judged: probes and real traffic in, one standing out.
//!
//! ```text
//!   serving ──── faults, while another backend is eligible ────▶ ejected ◀──────┐
//!    ▲   │                                                          │           │
//!    │   │ probes fail                                     time is up           │
//!    │   ▼                                                          ▼           │
//!    │  out until they pass ─▶ probation ◀── a probe passes ── awaits probe     │
//!    │                          │     │                                         │
//!    └── first token of a trial ┘     └────────── the trial fails ──────────────┘
//! ```
//!
//! Faults are three in a row, a rate well below the peers', verified standstill, lasting slowness, or
//! misconfiguration. Three things lie across these states: the verdict of the probes, *busy* (a wish, never a fault) and *refusing*
//! (a probe answered 503). Back in service, the windows are empty and the share climbs for ten seconds.
//!
//! Invariants: an observation never removes the last eligible backend; one trial at a time; an ejection
//! never exceeds `ejection_max` (`misconfigured_ejection` for that reason); what succeeds from now on is
//! eligible again within that and one probe. With nobody eligible the caller sends suspects one attempt each ([`Panic`]), and such an attempt is as
//! good as a trial.
//!
//! Not here: what is a fault (`policy::retry`), who is slow (`policy::outlier`), doing anything about it.

mod admin;
mod ejection;
mod parameters;
mod probing;
mod quarantine;
mod transition;
mod window;

pub use admin::{Administrative, Panic, may_receive};
pub use parameters::HealthPolicy;
pub use quarantine::{Confinement, Quarantine};
pub use transition::{EjectReason, KeptBecause, Transition};

use super::Moment;
use super::progress::Proof;
use ejection::Doubling;
use probing::{Change, Probing, Verdict};
use std::time::Duration;
use window::Window;

/// After so long in one bad state nothing is expected to happen soon, and the ordinary probe interval will do.
const SETTLED: Duration = Duration::from_secs(60);

/// A trial whose outcome never came is forgotten after the longest first-token clock: the caller
/// lost it, and one lost trial must not keep a backend out for ever.
const TRIAL_LOST: Duration = Duration::from_secs(600);

/// So long after its ejection a backend takes any request for its trial. A minute: the longest ejection, by which a
/// pool with other traffic has long tried it.
const ANY_TRIAL_AFTER: Duration = Duration::from_secs(60);

/// Below this success rate a backend is no witness against a request: of two that fail a tenth each by chance,
/// one request in a hundred would be called at fault.
const WITNESS_SUCCESS_RATE: f64 = 0.9;

/// Late attempts in a row, each overtaken by a peer, of which the last is a fault.
const SILENT_MIN: u32 = 2;

/// A kept backend is reported again after so long.
const KEPT_AGAIN: Duration = Duration::from_secs(60);

/// A lesson from real traffic about one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// An attempt was completed.
    Success,
    /// An attempt's first token (or first body byte of an answer) came. Say it once an attempt, before
    /// its outcome.
    FirstToken,
    /// An attempt failed, and the backend is to blame.
    Fault,
    /// It asked to be left alone for a while: until then, or until it is tried again shortly.
    Busy {
        /// Its Retry-After, when it gave one.
        until: Option<Moment>,
    },
    /// It refuses our credentials, or does not know the model its peers serve.
    Misconfigured,
    /// An attempt was late, and one that was begun beside it at a peer spoke first.
    Silent,
    /// Nothing to learn.
    Neutral,
}

/// Result of one probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeVerdict {
    /// It passed.
    Pass,
    /// It answered, but not to this question: a 404 on a guessed path. Counts as a pass.
    WeakPass,
    /// Timeout, reset, or an answer that does not pass.
    Fail,
    /// It answered 503.
    Refusing,
}

/// What the record must know about the others of its pool at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Peers {
    /// Enabled members of the pool, this one included.
    pub members: usize,
    /// Others whose standing is eligible (and which the operator has enabled).
    pub others_eligible: usize,
    /// Others that are ejected, or on their way back from it ([`Health::is_ejected`]).
    pub others_ejected: usize,
    /// Median of the others' [`success_rate`](Health::success_rate), of those that have one.
    pub median_success: Option<f64>,
    /// Whether any member has [`ever_passed`](Health::ever_passed).
    pub anyone_ever_passed: bool,
    /// Whether every member that is not out for another reason refuses.
    pub everyone_refusing: bool,
}

/// What is judged, and how it came into its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// With the pool itself: while no backend of the pool has ever passed, unknown counts as eligible.
    Founder,
    /// Into a running pool: waits for its first pass, then starts slowly.
    Newcomer,
    /// One model of a backend, in the backend's shadow: probes ask the backend, so they have no say here.
    Model,
}

/// What may be sent to a backend now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    /// New attempts, at this share of its weight and of its cap.
    Eligible {
        /// Above 0, up to 1; below 1 in slow start.
        share: f32,
    },
    /// One attempt, for the caller that wins [`Health::begin_trial`].
    Probation,
    /// Nothing until then, by its own wish.
    Busy {
        /// When it may be tried again.
        until: Moment,
    },
    /// Nothing: it answers probes with 503, and another backend is eligible.
    Refusing,
    /// Nothing.
    Out {
        /// End of its ejection; none when it waits for probes.
        until: Option<Moment>,
    },
}

/// Operational state, for status pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operational {
    /// No probe has passed or failed for good.
    Unknown,
    /// Nothing against it.
    Healthy,
    /// Healthy, at a reduced share.
    SlowStart,
    /// Probes fail.
    Unhealthy,
    /// Probes are answered 503.
    Refusing,
    /// Removed for a time.
    Ejected {
        /// Its end.
        until: Moment,
    },
    /// The ejection is over, a passing probe is awaited.
    AwaitsProbe,
    /// One request tries it.
    Probation,
}

impl Operational {
    /// For status pages and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::SlowStart => "slow_start",
            Self::Unhealthy => "unhealthy",
            Self::Refusing => "refusing",
            Self::Ejected { .. } => "ejected",
            Self::AwaitsProbe => "awaits_probe",
            Self::Probation => "probation",
        }
    }
}

/// The operational state of one (backend, model). A plain value: the caller owns it and its lock, and reads
/// [`standing`](Self::standing) again after every call that takes `&mut self`.
#[derive(Clone, Debug)]
pub struct Health {
    arrival: Arrival,
    created: Moment,
    phase: Phase,
    /// Since when it has not been serving; meaningless while it is.
    out_since: Moment,
    probing: Probing,
    doubling: Doubling,
    healthy_since: Moment,
    ramp_from: Option<Moment>,
    window: Window,
    faults_in_a_row: u32,
    /// Last success or first token, if no fault came after it, and how many of them.
    served: Option<Moment>,
    served_in_a_row: u32,
    /// What `served` was before the latest fault, which may yet be forgiven.
    served_before: Option<Moment>,
    /// Late attempts that a peer overtook, since the last first token.
    silent_in_a_row: u32,
    busy: Busy,
    kept_at: Option<Moment>,
    /// Copied from the policy and the peers at each call that has them, for those that have not.
    known: Known,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Ejected { until: Moment },
    AwaitsProbe,
    Probation { trial: Option<Moment> },
}

/// Two pauses, for only the one we made up ourselves may end early.
#[derive(Clone, Copy, Debug, Default)]
struct Busy {
    stated: Moment,
    guessed: Moment,
    guesses: u32,
}

impl Busy {
    fn until(&self) -> Moment {
        self.stated.max(self.guessed)
    }

    fn forget_past(&mut self, now: Moment) {
        for pause in [&mut self.stated, &mut self.guessed] {
            if *pause <= now {
                *pause = Moment::ZERO;
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Known {
    probes: bool,
    fall: u32,
    window: Duration,
    outcomes_min: u32,
    /// Its refusal does not count: nobody else is there to take the work.
    refusal_yields: bool,
    /// Someone has passed: unknown is no longer good enough.
    someone_passed: bool,
}

impl Health {
    /// A record of a backend that has just arrived.
    pub fn new(arrival: Arrival, now: Moment) -> Self {
        let policy = HealthPolicy::default();
        Self {
            arrival,
            created: now,
            phase: Phase::Serving,
            out_since: now,
            probing: Probing::new(),
            doubling: Doubling::default(),
            healthy_since: now,
            ramp_from: match arrival {
                Arrival::Founder | Arrival::Model => None,
                Arrival::Newcomer => Some(now),
            },
            window: Window::new(),
            faults_in_a_row: 0,
            served: None,
            served_in_a_row: 0,
            served_before: None,
            silent_in_a_row: 0,
            busy: Busy::default(),
            kept_at: None,
            known: Known {
                probes: policy.probes && arrival != Arrival::Model,
                fall: policy.fall,
                window: policy.window,
                outcomes_min: policy.outcomes_min,
                refusal_yields: false,
                someone_passed: false,
            },
        }
    }

    /// Learns from one attempt.
    pub fn observe(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        observation: Observation,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        self.remember(policy, peers);
        match observation {
            Observation::Success => {
                self.window.record(now, true);
                self.faults_in_a_row = 0;
                // A completion frees a slot; a Retry-After still holds.
                (self.busy.guessed, self.busy.guesses) = (Moment::ZERO, 0);
                self.served(policy, now, peers, false)
            }
            // Not an outcome: an attempt that dies after its first token is one fault, not half of one.
            Observation::FirstToken => self.served(policy, now, peers, true),
            Observation::Fault => {
                self.window.record(now, false);
                self.faults_in_a_row = self.faults_in_a_row.saturating_add(1);
                self.served_before = self.served.take();
                self.served_in_a_row = 0;
                self.failed(policy, now, peers, rng)
            }
            // A trial that taught nothing is over when it is abandoned: this may be about earlier work.
            Observation::Busy { until } => self.is_busy(policy, now, until, rng),
            Observation::Misconfigured => self.remove(policy, now, EjectReason::Misconfigured, peers, rng),
            // One may be an accident of its own; a trial must do better.
            Observation::Silent => {
                self.silent_in_a_row = self.silent_in_a_row.saturating_add(1);
                if !self.on_trial() && self.silent_in_a_row < SILENT_MIN {
                    return None;
                }
                self.observe(policy, now, Observation::Fault, peers, rng)
            }
            Observation::Neutral => None,
        }
    }

    /// Takes back the latest fault: another backend failed the same request in the same way, so it was
    /// the request's own. An ejection that has begun stays.
    pub fn forgive(&mut self) {
        self.faults_in_a_row = self.faults_in_a_row.saturating_sub(1);
        self.served = self.served.or(self.served_before.take());
        self.window.forgive();
    }

    /// Learns from one probe.
    pub fn probe(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        verdict: ProbeVerdict,
        peers: &Peers,
        _rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        self.remember(policy, peers);
        if !self.known.probes {
            return None;
        }
        let weak = verdict == ProbeVerdict::WeakPass;
        match self.probing.probe(policy, now, verdict, self.served) {
            Some(Change::BecameHealthy { passes, first }) => {
                let probation = self.probes_let_in(now, first, peers);
                Some(Transition::ProbesPassed { passes, weak, probation })
            }
            Some(Change::BecameUnhealthy { fails }) => {
                self.end_of_health(policy, now);
                Some(Transition::ProbesFailed { fails })
            }
            Some(Change::Outvoted { fails }) => Some(Transition::ProbesOutvoted { fails }),
            Some(Change::BeganToRefuse) => Some(Transition::Refusing),
            Some(Change::AcceptsAgain) if self.phase == Phase::Serving => {
                self.ramp_from = Some(now);
                Some(Transition::RefusalOver)
            }
            Some(Change::AcceptsAgain) | None => self.await_probe(),
        }
    }

    /// Lets time pass, and facts about the peers. Call it at [`next_change`](Self::next_change), and whenever
    /// the standing of a peer changed; again at once if it returns something.
    pub fn tick(&mut self, policy: &HealthPolicy, now: Moment, peers: &Peers) -> Option<Transition> {
        self.remember(policy, peers);
        self.busy.forget_past(now);
        match self.phase {
            Phase::Ejected { until } if until <= now => {
                self.phase = Phase::AwaitsProbe;
                self.await_probe().or(Some(Transition::AwaitsProbe))
            }
            Phase::Ejected { .. } => None,
            Phase::AwaitsProbe => self.await_probe(),
            Phase::Probation { trial } => {
                if trial.is_some_and(|began| now.since(began) >= TRIAL_LOST) {
                    self.free_trial();
                }
                None
            }
            Phase::Serving => {
                let over = self.ramp_from.is_some_and(|from| now.since(from) >= policy.slow_start);
                if !over || self.barred() {
                    return None;
                }
                self.ramp_from = None;
                Some(Transition::SlowStartOver)
            }
        }
    }

    /// When time alone changes the standing, or gives `tick` something to do; none when only probes,
    /// traffic or peers can change anything. Later than the moment of the last `tick` that returned
    /// nothing.
    pub fn next_change(&self, policy: &HealthPolicy) -> Option<Moment> {
        let phase = match self.phase {
            Phase::Ejected { until } => Some(until),
            Phase::AwaitsProbe => None,
            Phase::Probation { trial } => trial.map(|began| began + TRIAL_LOST),
            Phase::Serving if self.barred() => None,
            Phase::Serving => self.ramp_from.map(|from| from + policy.slow_start),
        };
        let busy = (self.busy.until() > Moment::ZERO).then(|| self.busy.until());
        [phase, busy].into_iter().flatten().min()
    }

    /// Ejects at once a backend that is proven to be stuck, under the same rule about the last one.
    pub fn eject_stuck(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        proof: Proof,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        self.remember(policy, peers);
        self.remove(policy, now, EjectReason::Stuck(proof), peers, rng)
    }

    /// Ejects a backend that has been `ratio` times slower than its peers for long enough, under the rules of the
    /// success rate: not the last eligible, and not when half of the pool is ejected already. A trial is judged
    /// by its first token, not by this.
    pub fn eject_slow(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        ratio: f64,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        self.remember(policy, peers);
        if self.on_trial() {
            return None;
        }
        self.remove(policy, now, EjectReason::Slow { ratio }, peers, rng)
    }

    /// Whether it has been out for so long that its trial may be a request that must not be lost: where all requests
    /// are such, it would never return.
    pub fn takes_any_trial(&self, now: Moment) -> bool {
        self.is_ejected() && now.since(self.out_since) >= ANY_TRIAL_AFTER
    }

    /// True for exactly one caller in probation, until an outcome is observed or the trial is abandoned.
    pub fn begin_trial(&mut self, now: Moment) -> bool {
        let free = match self.phase {
            Phase::Probation { trial } => trial.is_none_or(|began| now.since(began) >= TRIAL_LOST),
            Phase::Serving | Phase::Ejected { .. } | Phase::AwaitsProbe => false,
        };
        let begins = free && !self.barred() && !self.refuses() && self.busy.until() <= now;
        if begins {
            self.phase = Phase::Probation { trial: Some(now) };
        }
        begins
    }

    /// The trial that was won at `began` is over, and if it taught nothing another may be. Harmless once its outcome was
    /// observed, also when another is under way by then: what was the trial may go on as a long stream.
    pub fn abandon_trial(&mut self, began: Moment) {
        if self.phase == (Phase::Probation { trial: Some(began) }) {
            self.free_trial();
        }
    }

    /// Whether a trial is under way, so that another caller need not ask.
    pub fn on_trial(&self) -> bool {
        matches!(self.phase, Phase::Probation { trial: Some(_) })
    }

    /// Whether it is ejected or on its way back; for [`Peers::others_ejected`].
    pub fn is_ejected(&self) -> bool {
        self.phase != Phase::Serving
    }

    /// What may be sent to it now.
    pub fn standing(&self, policy: &HealthPolicy, now: Moment) -> Standing {
        // First of all: a suspect may be asked in panic, who asked to be left alone may not.
        if self.busy.until() > now {
            return Standing::Busy { until: self.busy.until() };
        }
        if let Phase::Ejected { until } = self.phase {
            return Standing::Out { until: Some(until) };
        }
        if self.barred() || self.phase == Phase::AwaitsProbe {
            return if self.refuses() { Standing::Refusing } else { Standing::Out { until: None } };
        }
        if self.refuses() {
            return Standing::Refusing;
        }
        if matches!(self.phase, Phase::Probation { .. }) {
            return Standing::Probation;
        }
        Standing::Eligible { share: self.share(policy, now) }
    }

    /// Share of its recent outcomes that were successes; none while there are fewer than `outcomes_min`.
    pub fn success_rate(&self, now: Moment) -> Option<f64> {
        self.window.rate(now, self.known.window, self.known.outcomes_min)
    }

    /// The last success or first token, if no fault came after it.
    pub fn served_at(&self) -> Option<Moment> {
        self.served
    }

    /// Whether its probes fail and are not believed, because requests succeed.
    pub fn outvotes_probes(&self) -> bool {
        self.probing.outvoted
    }

    /// Whether it has served others `since` then: at most one fault, which may yet be forgiven, after the last success,
    /// and few before. Of a backend that fails others too, or has just begun to, a failure does not show that it was the
    /// request's own.
    pub fn serves(&self, now: Moment, since: Moment) -> bool {
        self.served.or(self.served_before).is_some_and(|served| served >= since)
            && self.success_rate(now).is_none_or(|rate| rate >= WITNESS_SUCCESS_RATE)
    }

    /// For status pages.
    pub fn operational(&self) -> Operational {
        match self.phase {
            Phase::Ejected { until } => return Operational::Ejected { until },
            Phase::Serving | Phase::AwaitsProbe | Phase::Probation { .. } => {}
        }
        if self.known.probes {
            if matches!(self.probing.verdict, Verdict::Unhealthy { .. }) {
                return Operational::Unhealthy;
            }
            if self.probing.refusing.is_some() {
                return Operational::Refusing;
            }
        }
        match self.phase {
            Phase::AwaitsProbe | Phase::Ejected { .. } => Operational::AwaitsProbe,
            Phase::Probation { .. } => Operational::Probation,
            Phase::Serving if self.known.probes && self.probing.verdict == Verdict::Unknown => {
                Operational::Unknown
            }
            Phase::Serving if self.ramp_from.is_some() => Operational::SlowStart,
            Phase::Serving => Operational::Healthy,
        }
    }

    /// Whether a probe of it has ever passed, or traffic has proven it.
    pub fn ever_passed(&self) -> bool {
        self.probing.ever_passed
    }

    /// False while in transition and for the first minute of being out: the prober then uses its short
    /// interval.
    pub fn steady(&self, now: Moment) -> bool {
        let settled = |since: Moment| now.since(since) >= SETTLED;
        if self.probing.wavers(self.known.fall) || self.probing.refusing.is_some_and(|since| !settled(since))
        {
            return false;
        }
        match (self.phase, self.probing.verdict) {
            (_, Verdict::Unhealthy { since }) => settled(since),
            (Phase::Serving, Verdict::Unknown) => settled(self.created),
            (Phase::Serving, Verdict::Healthy) => true,
            (Phase::Ejected { .. } | Phase::AwaitsProbe | Phase::Probation { .. }, _) => {
                settled(self.out_since)
            }
        }
    }

    fn free_trial(&mut self) {
        if let Phase::Probation { trial } = &mut self.phase {
            *trial = None;
        }
    }

    fn remember(&mut self, policy: &HealthPolicy, peers: &Peers) {
        self.known = Known {
            probes: policy.probes && self.arrival != Arrival::Model,
            fall: policy.fall,
            window: policy.window,
            outcomes_min: policy.outcomes_min,
            refusal_yields: peers.everyone_refusing || peers.others_eligible == 0,
            someone_passed: peers.anyone_ever_passed,
        };
    }

    /// Kept out by what the probes say, or have not said yet.
    fn barred(&self) -> bool {
        self.known.probes
            && match self.probing.verdict {
                Verdict::Healthy => false,
                Verdict::Unhealthy { .. } => true,
                Verdict::Unknown => match self.arrival {
                    Arrival::Founder => self.known.someone_passed,
                    Arrival::Newcomer => true,
                    Arrival::Model => false,
                },
            }
    }

    fn refuses(&self) -> bool {
        self.known.probes && self.probing.refusing.is_some() && !self.known.refusal_yields
    }

    fn share(&self, policy: &HealthPolicy, now: Moment) -> f32 {
        match self.ramp_from {
            Some(from) if now.since(from) < policy.slow_start => {
                let climbed = now.since(from).as_secs_f64() / policy.slow_start.as_secs_f64();
                climbed.max(policy.slow_start_share_min).min(1.0) as f32
            }
            Some(_) | None => 1.0,
        }
    }

    /// A request was served, or is being served. `fresh`: it began lately, as a first token proves. A
    /// completion may be of work begun long ago: a process that no longer accepts connections still
    /// finishes its streams.
    fn served(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        peers: &Peers,
        fresh: bool,
    ) -> Option<Transition> {
        self.served = Some(now);
        self.silent_in_a_row = 0;
        self.served_in_a_row = self.served_in_a_row.saturating_add(1);
        match (self.phase, self.probing.verdict) {
            (Phase::Serving, Verdict::Unknown) if self.known.probes => {
                self.probing.prove();
                if self.arrival == Arrival::Newcomer {
                    self.ramp_from = Some(now);
                }
                Some(Transition::ProvenByTraffic)
            }
            (Phase::Serving, Verdict::Unhealthy { .. }) if self.known.probes => {
                (fresh || self.served_in_a_row >= policy.rise).then(|| {
                    let fails = self.probing.outvote();
                    self.readmit(now);
                    Transition::ProbesOutvoted { fails }
                })
            }
            (Phase::Serving, _) => None,
            (Phase::Probation { .. } | Phase::Ejected { .. } | Phase::AwaitsProbe, verdict) => {
                // Stragglers from before the ejection prove nothing, unless nobody is left to compare with.
                (self.on_trial() || peers.others_eligible == 0).then(|| {
                    match verdict {
                        Verdict::Unhealthy { .. } => {
                            self.probing.outvote();
                        }
                        Verdict::Unknown => self.probing.prove(),
                        Verdict::Healthy => {}
                    }
                    let after = now.since(self.out_since);
                    self.readmit(now);
                    Transition::Readmitted { after }
                })
            }
        }
    }

    fn failed(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        if self.on_trial() {
            let (lasts, times) = self.doubling.next(policy, rng);
            let until = self.leave(now, lasts);
            return Some(Transition::TrialFailed { until, lasts, times });
        }
        let reason = if self.faults_in_a_row >= policy.eject_consecutive {
            EjectReason::ConsecutiveFaults(self.faults_in_a_row)
        } else {
            // Without peers to compare with, a low rate is as likely the requests' fault or a
            // shared dependency's. They will have outcomes soon, because each fault here is
            // retried there; and a dead backend makes three faults in a row.
            let rate = self.success_rate(now)?;
            let median = peers.median_success?;
            if rate >= policy.success_rate_min || rate + policy.peer_margin > median {
                return None;
            }
            EjectReason::SuccessRate { rate, peers: median }
        };
        self.remove(policy, now, reason, peers, rng)
    }

    /// Ejects, unless that would be unwise. Who is out already stays out for as long as was said: what
    /// was begun before the ejection and dies after it is the same failure, not a new one.
    fn remove(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        reason: EjectReason,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        match self.phase {
            Phase::Serving if self.barred() => return None,
            Phase::Serving => {
                let statistical =
                    matches!(reason, EjectReason::SuccessRate { .. } | EjectReason::Slow { .. });
                if peers.others_eligible == 0 {
                    return self.keep(now, reason, KeptBecause::LastEligible);
                }
                if statistical && peers.others_ejected + 1 > (peers.members / 2).max(1) {
                    return self.keep(now, reason, KeptBecause::HalfEjected);
                }
            }
            Phase::Probation { trial: Some(_) } => {}
            Phase::Probation { trial: None } | Phase::Ejected { .. } | Phase::AwaitsProbe => return None,
        }
        self.end_of_health(policy, now);
        let (lasts, times) = match reason {
            EjectReason::Misconfigured => {
                let lasts = ejection::shortened(policy.misconfigured_ejection, policy.ejection_jitter, rng);
                (lasts, self.doubling.times())
            }
            EjectReason::ConsecutiveFaults(_)
            | EjectReason::SuccessRate { .. }
            | EjectReason::Stuck(_)
            | EjectReason::Slow { .. } => self.doubling.next(policy, rng),
        };
        let until = self.leave(now, lasts);
        Some(Transition::Ejected { until, lasts, times, reason })
    }

    fn keep(&mut self, now: Moment, reason: EjectReason, because: KeptBecause) -> Option<Transition> {
        if self.kept_at.is_some_and(|told| now.since(told) < KEPT_AGAIN) {
            return None;
        }
        self.kept_at = Some(now);
        Some(Transition::Kept { reason, because })
    }

    fn is_busy(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        until: Option<Moment>,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        let was_busy = self.busy.until() > now;
        match until {
            Some(until) => self.busy.stated = self.busy.stated.max(ejection::believed(policy, now, until)),
            // The answers of one batch are one refusal: only after the pause does another double it.
            None if was_busy => {}
            None => {
                self.busy.guesses = self.busy.guesses.saturating_add(1);
                self.busy.guessed = now + ejection::busy_pause(policy, self.busy.guesses, rng);
            }
        }
        let becomes_busy = !was_busy && self.busy.until() > now;
        becomes_busy.then(|| Transition::Busy { until: self.busy.until(), stated: until.is_some() })
    }

    /// A verdict turned good. Returns whether a trial comes first. Without anyone else eligible it does
    /// not: capacity is worth more than caution then.
    fn probes_let_in(&mut self, now: Moment, first: bool, peers: &Peers) -> bool {
        match self.phase {
            Phase::Serving if first => {
                if self.arrival == Arrival::Newcomer {
                    self.ramp_from = Some(now);
                }
                false
            }
            Phase::Serving if peers.others_eligible == 0 => {
                self.readmit(now);
                false
            }
            Phase::Serving => {
                self.phase = Phase::Probation { trial: None };
                self.out_since = now;
                true
            }
            Phase::AwaitsProbe => {
                self.phase = Phase::Probation { trial: None };
                true
            }
            Phase::Ejected { .. } | Phase::Probation { .. } => true,
        }
    }

    /// On to probation, if it waits for a probe and none stands in the way.
    fn await_probe(&mut self) -> Option<Transition> {
        if self.phase != Phase::AwaitsProbe {
            return None;
        }
        let refusing = self.probing.refusing.is_some();
        let may = !self.known.probes
            || match self.probing.verdict {
                Verdict::Unhealthy { .. } => false,
                Verdict::Unknown | Verdict::Healthy if refusing => self.known.refusal_yields,
                Verdict::Unknown | Verdict::Healthy => self.probing.allows_return(),
            };
        may.then(|| {
            self.phase = Phase::Probation { trial: None };
            Transition::Probation
        })
    }

    fn leave(&mut self, now: Moment, lasts: Duration) -> Moment {
        let until = now + lasts;
        self.phase = Phase::Ejected { until };
        self.probing.ejected();
        self.out_since = now;
        self.ramp_from = None;
        until
    }

    fn end_of_health(&mut self, policy: &HealthPolicy, now: Moment) {
        if self.phase == Phase::Serving {
            self.doubling.forgive(policy, now.since(self.healthy_since));
            self.healthy_since = now;
        }
    }

    /// Back in service with an empty past: what it did before the repair is no evidence.
    fn readmit(&mut self, now: Moment) {
        self.phase = Phase::Serving;
        self.window.clear();
        self.faults_in_a_row = 0;
        self.silent_in_a_row = 0;
        self.kept_at = None;
        self.healthy_since = now;
        self.ramp_from = Some(now);
    }
}

#[cfg(test)]
mod tests;
