//! How a backend is judged (signatures; the judgement follows).

mod admin;
mod parameters;
mod transition;

pub use admin::{Administrative, Panic, may_receive};
pub use parameters::HealthPolicy;
pub use transition::{EjectReason, KeptBecause, Transition};

use super::Moment;

/// A lesson from real traffic about one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// An attempt was completed.
    Success,
    /// An attempt's first token (or first body byte of an answer) came. Say it once an attempt, before its outcome.
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
    /// Others that are ejected, or on their way back from it.
    pub others_ejected: usize,
    /// Median of the others' [`success_rate`](Health::success_rate), of those that have one.
    pub median_success: Option<f64>,
    /// Whether any member has [`ever_passed`](Health::ever_passed).
    pub anyone_ever_passed: bool,
    /// Whether every member that is not out for another reason refuses.
    pub everyone_refusing: bool,
}

/// How a backend came into its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// With the pool itself: while no backend of the pool has ever passed, unknown counts as eligible.
    Founder,
    /// Into a running pool: waits for its first pass, then starts slowly.
    Newcomer,
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

/// The operational state of one (backend, model). A plain value: the caller owns it and its lock.
#[derive(Clone, Debug)]
pub struct Health {}

impl Health {
    /// A record of a backend that has just arrived.
    pub fn new(arrival: Arrival, now: Moment) -> Self {
        let _ = (arrival, now);
        Self {}
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
        let _ = (policy, now, observation, peers, rng);
        None
    }

    /// Learns from one probe.
    pub fn probe(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        verdict: ProbeVerdict,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        let _ = (policy, now, verdict, peers, rng);
        None
    }

    /// Lets time pass, and facts about the peers. Call it at [`next_change`](Self::next_change), and whenever
    /// a peer's standing changed.
    pub fn tick(&mut self, policy: &HealthPolicy, now: Moment, peers: &Peers) -> Option<Transition> {
        let _ = (policy, now, peers);
        None
    }

    /// When `tick` has something to do by time alone.
    pub fn next_change(&self, policy: &HealthPolicy) -> Option<Moment> {
        let _ = policy;
        None
    }

    /// Ejects at once a backend that the caller has verified to be stuck.
    pub fn eject_stuck(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        peers: &Peers,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        let _ = (policy, now, peers, rng);
        None
    }

    /// True for exactly one caller in probation, until an outcome is observed or the trial is abandoned.
    pub fn begin_trial(&mut self, now: Moment) -> bool {
        let _ = now;
        false
    }

    /// The trial taught nothing: its outcome was neutral, or it was cancelled.
    pub fn abandon_trial(&mut self) {}

    /// What may be sent to it now.
    pub fn standing(&self, policy: &HealthPolicy, now: Moment) -> Standing {
        let _ = (policy, now);
        Standing::Eligible { share: 1.0 }
    }

    /// Share of its recent outcomes that were successes; none while there are too few to say.
    pub fn success_rate(&self, now: Moment) -> Option<f64> {
        let _ = now;
        None
    }

    /// For status pages.
    pub fn operational(&self) -> Operational {
        Operational::Unknown
    }

    /// Whether a probe of it has ever passed, or traffic has proven it.
    pub fn ever_passed(&self) -> bool {
        false
    }

    /// False while in transition and for the first minute of being unhealthy: the prober then uses its short interval.
    pub fn steady(&self, now: Moment) -> bool {
        let _ = now;
        true
    }
}
