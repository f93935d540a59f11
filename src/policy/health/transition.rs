//! What happened to a backend, as values with their reasons: the caller logs, counts and publishes them.

use crate::policy::Moment;
use crate::policy::progress::Proof;
use std::fmt;
use std::time::Duration;

/// Why a backend was ejected, or would have been.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EjectReason {
    /// So many faults in a row.
    ConsecutiveFaults(u32),
    /// Too few of its recent outcomes were successes, and its peers do better.
    SuccessRate {
        /// Its own rate, 0..=1.
        rate: f64,
        /// The median of its peers, 0..=1.
        peers: f64,
    },
    /// It refuses our credentials or does not know the model its peers serve.
    Misconfigured,
    /// Unfinished work stands still there, for this proof.
    Stuck(Proof),
    /// It has been much slower than its peers for some time (`policy::outlier`).
    Slow {
        /// So many times.
        ratio: f64,
    },
}

impl EjectReason {
    /// For metric labels.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ConsecutiveFaults(_) => "consecutive_faults",
            Self::SuccessRate { .. } => "success_rate",
            Self::Misconfigured => "misconfigured",
            Self::Stuck(_) => "stuck",
            Self::Slow { .. } => "slow",
        }
    }
}

impl fmt::Display for EjectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConsecutiveFaults(count) => write!(f, "{count} consecutive faults"),
            Self::SuccessRate { rate, peers } => {
                write!(f, "success rate {rate:.2} while the median of its peers is {peers:.2}")
            }
            Self::Misconfigured => f.write_str("misconfigured"),
            Self::Stuck(Proof::Unanswered) => f.write_str("its work stands still and it does not answer"),
            Self::Stuck(Proof::Outrun) => {
                f.write_str("its work stands still while its peers serve what came later")
            }
            Self::Slow { ratio } => write!(f, "{ratio:.1} times slower than its peers"),
        }
    }
}

/// Why a backend that deserved ejection was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptBecause {
    /// No other backend of the pool is eligible.
    LastEligible,
    /// Half of the pool is ejected already, and a rate or a speed is no proof of death.
    HalfEjected,
}

impl KeptBecause {
    /// For metric labels.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::LastEligible => "last_eligible",
            Self::HalfEjected => "half_ejected",
        }
    }
}

/// One change of a backend's operational state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transition {
    /// A first pass, or `rise` passes after having been unhealthy.
    ProbesPassed {
        /// Passes in a row.
        passes: u32,
        /// The last was a weak pass (a 404 on the guessed path): warn, the probe proves little.
        weak: bool,
        /// It returns by a trial; otherwise it is eligible at once.
        probation: bool,
    },
    /// `fall` probes failed in a row: unhealthy.
    ProbesFailed {
        /// Failures in a row.
        fails: u32,
    },
    /// Probes fail, requests succeed: the probes have no vote until one passes. The probe is probably wrong.
    ProbesOutvoted {
        /// Failures in a row.
        fails: u32,
    },
    /// It served a request before any probe of it had passed.
    ProvenByTraffic,
    /// A probe was answered 503: no new work while another backend is eligible.
    Refusing,
    /// A probe passed again; slow start begins.
    RefusalOver,
    /// It asked for a pause.
    Busy {
        /// No new work before.
        until: Moment,
        /// It named the time itself (Retry-After).
        stated: bool,
    },
    /// Removed for a time.
    Ejected {
        /// Its end.
        until: Moment,
        /// Its length.
        lasts: Duration,
        /// Which in a row, by failures: 1 for the first; stops counting at the longest.
        times: u32,
        /// What for.
        reason: EjectReason,
    },
    /// It deserved ejection and stays. Told at most once a minute.
    Kept {
        /// What for it would have been ejected.
        reason: EjectReason,
        /// Why it was not.
        because: KeptBecause,
    },
    /// The ejection is over; a probe has to pass before the trial.
    AwaitsProbe,
    /// One real request may try it.
    Probation,
    /// The trial failed: ejected again, for longer.
    TrialFailed {
        /// Its end.
        until: Moment,
        /// Its length.
        lasts: Duration,
        /// Which in a row.
        times: u32,
    },
    /// The trial's first token came; slow start begins.
    Readmitted {
        /// Time since the last ejection, or since probes let it into probation.
        after: Duration,
    },
    /// It carries its full share again.
    SlowStartOver,
}

impl Transition {
    /// For events and metric labels.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ProbesPassed { .. } => "probes_passed",
            Self::ProbesFailed { .. } => "probes_failed",
            Self::ProbesOutvoted { .. } => "probes_outvoted",
            Self::ProvenByTraffic => "proven_by_traffic",
            Self::Refusing => "refusing",
            Self::RefusalOver => "refusal_over",
            Self::Busy { .. } => "busy",
            Self::Ejected { .. } => "ejected",
            Self::Kept { .. } => "kept",
            Self::AwaitsProbe => "awaits_probe",
            Self::Probation => "probation",
            Self::TrialFailed { .. } => "trial_failed",
            Self::Readmitted { .. } => "readmitted",
            Self::SlowStartOver => "slow_start_over",
        }
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ProbesPassed { passes, weak, probation } => {
                write!(f, "healthy: {passes} probes passed")?;
                if *weak {
                    f.write_str(", weakly: the path does not exist there")?;
                }
                f.write_str(if *probation { "; one request tries it first" } else { "" })
            }
            Self::ProbesFailed { fails } => write!(f, "unhealthy: {fails} probes failed in a row"),
            Self::ProbesOutvoted { fails } => {
                write!(f, "{fails} probes failed in a row, but requests succeed: the probe is not believed")
            }
            Self::ProvenByTraffic => f.write_str("healthy: served a request before any probe passed"),
            Self::Refusing => f.write_str("refuses new work: its probe was answered 503"),
            Self::RefusalOver => f.write_str("accepts work again, in slow start"),
            Self::Busy { stated: true, .. } => f.write_str("busy: pauses for its Retry-After"),
            Self::Busy { stated: false, .. } => f.write_str("busy: pauses briefly"),
            Self::Ejected { lasts, times, reason, .. } => {
                write!(f, "ejected for {lasts:.1?} (time {times} in a row): {reason}")
            }
            Self::Kept { reason, because: KeptBecause::LastEligible } => {
                write!(f, "kept though it deserves ejection ({reason}): no other backend is eligible")
            }
            Self::Kept { reason, because: KeptBecause::HalfEjected } => {
                write!(f, "kept though it deserves ejection ({reason}): half of the pool is ejected already")
            }
            Self::AwaitsProbe => f.write_str("ejection over: waits for a passing probe"),
            Self::Probation => f.write_str("probation: one request tries it"),
            Self::TrialFailed { lasts, times, .. } => {
                write!(f, "trial failed: ejected for {lasts:.1?} (time {times} in a row)")
            }
            Self::Readmitted { after } => write!(f, "readmitted after {after:.1?}, in slow start"),
            Self::SlowStartOver => f.write_str("slow start over: full share"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{EjectReason, KeptBecause, Transition};
    use crate::policy::Moment;
    use crate::policy::progress::Proof;
    use std::time::Duration;

    const REASONS: [EjectReason; 5] = [
        EjectReason::ConsecutiveFaults(3),
        EjectReason::SuccessRate { rate: 0.5, peers: 1.0 },
        EjectReason::Misconfigured,
        EjectReason::Stuck(Proof::Outrun),
        EjectReason::Slow { ratio: 7.25 },
    ];

    fn transitions() -> [Transition; 14] {
        let (until, lasts, times) = (Moment::from_micros(9), Duration::from_secs(2), 2);
        [
            Transition::ProbesPassed { passes: 2, weak: false, probation: false },
            Transition::ProbesFailed { fails: 3 },
            Transition::ProbesOutvoted { fails: 3 },
            Transition::ProvenByTraffic,
            Transition::Refusing,
            Transition::RefusalOver,
            Transition::Busy { until, stated: true },
            Transition::Ejected { until, lasts, times, reason: EjectReason::Misconfigured },
            Transition::Kept { reason: EjectReason::Misconfigured, because: KeptBecause::LastEligible },
            Transition::AwaitsProbe,
            Transition::Probation,
            Transition::TrialFailed { until, lasts, times },
            Transition::Readmitted { after: lasts },
            Transition::SlowStartOver,
        ]
    }

    fn differ(words: impl IntoIterator<Item = String>, count: usize) {
        let mut words: Vec<String> = words.into_iter().collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count, "{words:?}");
    }

    #[test]
    fn each_has_a_label_and_a_sentence_of_its_own() {
        let label = |name: &str| {
            assert!(name.len() > 3 && name.chars().all(|c| c == '_' || c.is_ascii_lowercase()), "{name}");
            name.to_owned()
        };
        differ(transitions().iter().map(|transition| label(transition.name())), 14);
        differ(transitions().iter().map(ToString::to_string), 14);
        differ(REASONS.iter().map(|reason| label(reason.name())), 5);
        differ(REASONS.iter().map(ToString::to_string), 5);
        differ([KeptBecause::LastEligible, KeptBecause::HalfEjected].map(|why| label(why.name())), 2);
    }

    #[test]
    fn sentences_say_what_matters() {
        let weak = Transition::ProbesPassed { passes: 2, weak: true, probation: true }.to_string();
        assert!(weak.contains("weakly") && weak.contains("one request tries it first"), "{weak}");
        let strong = Transition::ProbesPassed { passes: 2, weak: false, probation: false }.to_string();
        assert!(!strong.contains("weakly") && !strong.contains("one request"), "{strong}");
        let busy = |stated| Transition::Busy { until: Moment::ZERO, stated }.to_string();
        assert!(busy(true).contains("Retry-After") && !busy(false).contains("Retry-After"));
        for reason in REASONS {
            let kept = |because| Transition::Kept { reason, because }.to_string();
            assert!(kept(KeptBecause::LastEligible).contains(&reason.to_string()));
            assert!(kept(KeptBecause::HalfEjected).contains("half of the pool"));
        }
        assert!(REASONS[4].to_string().contains("7.2"), "{}", REASONS[4]);
    }
}
