//! What the probes say, and when their word counts.
//!
//! ```text
//!             pass                       fall fails in a row, not outvoted
//!  Unknown ─────────▶ Healthy ─────────────────────────────────▶ Unhealthy
//!     │  or a request      ▲     rise passes in a row, or requests      │
//!     │      succeeds      └────────────────────────────────────────────┘
//!     └───────────────── fall fails in a row ───────────────────────────▲
//! ```
//!
//! Aside from the verdict: *refusing* (the last probe that was answered at all was answered 503) and
//! *outvoted* (the present run of failing probes was contradicted by succeeding requests; it has no vote
//! until a probe passes). Outvoted probes stay outvoted through later faults, which the ejection judges: a
//! backend whose probe path is wrong could otherwise never return once it is out.

use super::{HealthPolicy, ProbeVerdict};
use crate::policy::Moment;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Unknown,
    Healthy,
    Unhealthy { since: Moment },
}

/// What one probe changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// From unknown: the first pass of all. Otherwise from unhealthy.
    BecameHealthy {
        passes: u32,
        first: bool,
    },
    BecameUnhealthy {
        fails: u32,
    },
    Outvoted {
        fails: u32,
    },
    BeganToRefuse,
    AcceptsAgain,
}

#[derive(Clone, Debug)]
pub(super) struct Probing {
    pub(super) verdict: Verdict,
    pub(super) refusing: Option<Moment>,
    pub(super) ever_passed: bool,
    pub(super) outvoted: bool,
    passes: u32,
    fails: u32,
    failing_since: Moment,
    /// The last probe passed, and came after the last ejection.
    passed_since_ejection: bool,
}

impl Probing {
    pub(super) const fn new() -> Self {
        Self {
            verdict: Verdict::Unknown,
            refusing: None,
            ever_passed: false,
            outvoted: false,
            passes: 0,
            fails: 0,
            failing_since: Moment::ZERO,
            passed_since_ejection: false,
        }
    }

    /// `served_since_fault`: the last success or first token, if no fault came after it.
    pub(super) fn probe(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        verdict: ProbeVerdict,
        served_since_fault: Option<Moment>,
    ) -> Option<Change> {
        match verdict {
            ProbeVerdict::Pass | ProbeVerdict::WeakPass => self.pass(policy),
            ProbeVerdict::Fail => self.fail(policy, now, served_since_fault),
            ProbeVerdict::Refusing => {
                (self.passes, self.fails) = (0, 0);
                self.passed_since_ejection = false;
                let began = self.refusing.is_none();
                self.refusing.get_or_insert(now);
                began.then_some(Change::BeganToRefuse)
            }
        }
    }

    fn pass(&mut self, policy: &HealthPolicy) -> Option<Change> {
        self.passes = self.passes.saturating_add(1);
        self.fails = 0;
        self.passed_since_ejection = true;
        self.outvoted = false;
        self.ever_passed = true;
        let accepts_again = self.refusing.take().is_some();
        let passes = self.passes;
        match self.verdict {
            Verdict::Unknown => {
                self.verdict = Verdict::Healthy;
                Some(Change::BecameHealthy { passes, first: true })
            }
            Verdict::Unhealthy { .. } if passes >= policy.rise => {
                self.verdict = Verdict::Healthy;
                Some(Change::BecameHealthy { passes, first: false })
            }
            Verdict::Unhealthy { .. } => None,
            Verdict::Healthy => accepts_again.then_some(Change::AcceptsAgain),
        }
    }

    fn fail(
        &mut self,
        policy: &HealthPolicy,
        now: Moment,
        served_since_fault: Option<Moment>,
    ) -> Option<Change> {
        self.passes = 0;
        self.passed_since_ejection = false;
        if self.fails == 0 {
            self.failing_since = now;
        }
        self.fails = self.fails.saturating_add(1);
        let fails = self.fails;
        if fails < policy.fall || self.outvoted || matches!(self.verdict, Verdict::Unhealthy { .. }) {
            return None;
        }
        if served_since_fault.is_some_and(|at| at >= self.failing_since) {
            self.outvoted = true;
            self.prove();
            return Some(Change::Outvoted { fails });
        }
        self.verdict = Verdict::Unhealthy { since: now };
        Some(Change::BecameUnhealthy { fails })
    }

    /// Requests succeed: whatever the probes say, it is healthy.
    pub(super) fn prove(&mut self) {
        self.verdict = Verdict::Healthy;
        self.ever_passed = true;
    }

    /// Requests succeed while it is unhealthy. Returns the failures they outvote.
    pub(super) fn outvote(&mut self) -> u32 {
        self.outvoted = true;
        self.prove();
        self.fails
    }

    /// An ejection begins: what passed before it proves nothing.
    pub(super) const fn ejected(&mut self) {
        self.passed_since_ejection = false;
    }

    /// Whether the probes let a backend return from an ejection.
    pub(super) const fn allows_return(&self) -> bool {
        match self.verdict {
            Verdict::Unhealthy { .. } => false,
            Verdict::Unknown | Verdict::Healthy => self.passed_since_ejection || self.outvoted,
        }
    }

    /// In the middle of changing a verdict.
    pub(super) const fn wavers(&self, fall: u32) -> bool {
        match self.verdict {
            Verdict::Unknown => false,
            Verdict::Healthy => self.fails > 0 && self.fails < fall,
            Verdict::Unhealthy { .. } => self.passes > 0,
        }
    }
}
