//! Whether a backend may be believed (F22): its output was overruled by a peer, again and again.
//!
//! A question of its own, beside health and the operator's wish: such a replica answers its probes, is fast and
//! never fails. Offences fade; enough of them at a time put it into quarantine, out of which it comes by its own
//! output alone: two canaries in a row, further apart the more of them fail. Behind it, the next offence but one
//! counts like the third.
//!
//! Invariant: without another eligible backend nobody is quarantined. Not here: what is an offence
//! (`policy::degenerate`), asking the canary's question.

use super::ejection::doubled;
use crate::policy::Moment;
use std::fmt;
use std::time::Duration;

/// An offence counts half after so long: a bad replica offends within seconds, a sampled table once in a day.
const HALF_LIFE: Duration = Duration::from_secs(600);

/// Quarantine from this sum on: three offences within some minutes. One may be chance, and each costs a request a
/// moment's wait; the replica must be out before the fifth.
const OFFENCES_MAX: f64 = 2.5;

/// What is left of the sum after a quarantine.
const OFFENCES_AFTER: f64 = 1.0;

/// Below this sum nothing is held against it.
const WARY_MIN: f64 = 0.5;

/// Canaries that pass in a row before it is believed.
const PASSES: u32 = 2;

/// Longest pause between two canaries.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What happened to a backend, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// It gets no more work.
    Quarantined,
    /// It deserves it, and there is nobody else. Told at each offence beyond the measure.
    Kept,
    /// A canary says that nothing has changed.
    CanaryFailed,
    /// A canary passed; another one is to come.
    CanaryPassed,
    /// It is believed again.
    Released {
        /// Since it was not.
        after: Duration,
    },
}

impl Confinement {
    /// For events and metric labels.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Quarantined => "quarantined",
            Self::Kept => "quarantine_kept",
            Self::CanaryFailed => "canary_failed",
            Self::CanaryPassed => "canary_passed",
            Self::Released { .. } => "quarantine_over",
        }
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quarantined => f.write_str("quarantined: it repeats itself where its peers do not"),
            Self::Kept => f.write_str("kept though it deserves quarantine: no other backend is eligible"),
            Self::CanaryFailed => f.write_str("stays in quarantine: its canary failed"),
            Self::CanaryPassed => f.write_str("its canary passed; another one follows"),
            Self::Released { after } => write!(f, "out of quarantine after {after:.1?}"),
        }
    }
}

/// The record of one (backend, model).
#[derive(Clone, Copy, Debug, Default)]
pub struct Quarantine {
    /// The sum, as it was at `at`.
    sum: f64,
    at: Moment,
    held: Option<Held>,
    /// Quarantines before, while offences are remembered.
    times: u32,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    since: Moment,
    /// The latest canary, or the beginning.
    last: Moment,
    fails: u32,
    passes: u32,
}

impl Quarantine {
    /// A peer said something else, while `others` were eligible besides this backend.
    pub fn offend(&mut self, now: Moment, others: usize) -> Option<Confinement> {
        self.sum = self.sum(now) + 1.0;
        self.at = now;
        // Streams that began before it was quarantined offend still.
        if self.held.is_some() || self.sum < OFFENCES_MAX {
            return None;
        }
        if others == 0 {
            return Some(Confinement::Kept);
        }
        self.held = Some(Held { since: now, last: now, fails: self.times, passes: 0 });
        Some(Confinement::Quarantined)
    }

    /// Since when it has been quarantined.
    pub fn since(&self) -> Option<Moment> {
        self.held.map(|held| held.since)
    }

    /// Whether it was overruled lately: then its runs are more likely a fault than not.
    pub fn is_wary(&self, now: Moment) -> bool {
        self.sum(now) >= WARY_MIN
    }

    /// When the next canary is due, with at least `pause` between two of them.
    pub fn canary_due(&self, pause: Duration) -> Option<Moment> {
        let held = self.held?;
        let fails = if held.passes > 0 { 0 } else { held.fails };
        Some(held.last + doubled(pause, fails, PAUSE_MAX.max(pause)))
    }

    /// The canary showed this.
    pub fn canary(&mut self, now: Moment, passed: bool) -> Option<Confinement> {
        let held = self.held.as_mut()?;
        held.last = now;
        if !passed {
            held.fails = held.fails.saturating_add(1);
            held.passes = 0;
            return Some(Confinement::CanaryFailed);
        }
        held.passes += 1;
        if held.passes < PASSES {
            return Some(Confinement::CanaryPassed);
        }
        let after = now.since(held.since);
        *self = Self { sum: OFFENCES_AFTER, at: now, held: None, times: self.times.saturating_add(1) };
        Some(Confinement::Released { after })
    }

    /// Time has passed: what is so old that nothing is held against it is forgotten.
    pub fn forget(&mut self, now: Moment) {
        if self.held.is_none() && !self.is_wary(now) {
            *self = Self::default();
        }
    }

    fn sum(&self, now: Moment) -> f64 {
        self.sum * (-now.since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAUSE: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Moment {
        Moment::from_micros(seconds * 1_000_000)
    }

    fn offend(quarantine: &mut Quarantine, times: u32, now: Moment) -> Vec<Option<Confinement>> {
        (0..times).map(|_| quarantine.offend(now, 2)).collect()
    }

    #[test]
    fn three_offences_at_a_time_are_too_many_and_three_in_a_day_are_not() {
        let mut often = Quarantine::default();
        assert_eq!(offend(&mut often, 3, at(5)), [None, None, Some(Confinement::Quarantined)]);
        assert_eq!(often.since(), Some(at(5)));
        assert_eq!(often.offend(at(6), 2), None, "it is quarantined once");
        let mut rarely = Quarantine::default();
        assert!((0..20).all(|hour| rarely.offend(at(hour * 3600), 2).is_none()));
    }

    #[test]
    fn an_offence_counts_half_after_ten_minutes_and_is_remembered_until_then() {
        let mut fading = Quarantine::default();
        assert_eq!(fading.offend(at(0), 2), None);
        fading.forget(at(600));
        assert_eq!(offend(&mut fading, 2, at(600)), [None, Some(Confinement::Quarantined)]);
        fading.forget(at(36_000));
        assert!(fading.since().is_some(), "time alone does not end it");
        let mut faded = Quarantine::default();
        faded.offend(at(0), 2);
        assert_eq!(offend(&mut faded, 2, at(601)), [None, None]);
    }

    #[test]
    fn who_is_alone_is_kept() {
        let mut alone = Quarantine::default();
        let told: Vec<_> = (0..4).map(|_| alone.offend(at(1), 0)).collect();
        assert_eq!(told, [None, None, Some(Confinement::Kept), Some(Confinement::Kept)]);
        assert_eq!((alone.since(), alone.canary_due(PAUSE)), (None, None));
        assert_eq!(alone.offend(at(2), 1), Some(Confinement::Quarantined));
    }

    #[test]
    fn two_canaries_in_a_row_end_it_and_failures_make_it_longer() {
        let mut sick = Quarantine::default();
        offend(&mut sick, 3, at(0));
        let mut now = at(0);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let due = sick.canary_due(PAUSE).unwrap();
            pauses.push(due.since(now).as_secs());
            now = due;
            assert_eq!(sick.canary(now, false), Some(Confinement::CanaryFailed));
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(sick.canary(now, true), Some(Confinement::CanaryPassed));
        assert_eq!(sick.canary_due(PAUSE), Some(now + PAUSE));
        assert_eq!(sick.canary(now, false), Some(Confinement::CanaryFailed));
        assert_eq!(sick.canary(now, true), Some(Confinement::CanaryPassed));
        let after = now.since(at(0));
        assert_eq!(sick.canary(now, true), Some(Confinement::Released { after }));
        assert_eq!((sick.since(), sick.canary_due(PAUSE), sick.canary(now, true)), (None, None, None));
    }

    #[test]
    fn behind_it_less_is_enough_and_the_next_lasts_longer() {
        let mut back = Quarantine::default();
        offend(&mut back, 3, at(0));
        back.canary(at(1), true);
        back.canary(at(2), true);
        assert!(back.is_wary(at(3)));
        assert_eq!(offend(&mut back, 2, at(3)), [None, Some(Confinement::Quarantined)]);
        assert_eq!(back.canary_due(PAUSE), Some(at(5)));
        back.canary(at(5), true);
        back.canary(at(6), true);
        assert!(!back.is_wary(at(6 + 601)));
        back.forget(at(6 + 601));
        assert_eq!(offend(&mut back, 3, at(1000)), [None, None, Some(Confinement::Quarantined)]);
        assert_eq!(back.canary_due(PAUSE), Some(at(1001)), "old ones are forgotten");
    }

    #[test]
    fn each_has_a_label_and_a_sentence_of_its_own() {
        let all = [
            Confinement::Quarantined,
            Confinement::Kept,
            Confinement::CanaryFailed,
            Confinement::CanaryPassed,
            Confinement::Released { after: PAUSE },
        ];
        let mut names: Vec<String> =
            all.iter().flat_map(|told| [told.name().to_owned(), told.to_string()]).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 10);
    }

    proptest! {
        #[test]
        fn it_is_entered_within_five_offences_and_left_only_by_two_canaries(
            gaps in prop::collection::vec(0u64..60, 5),
            canaries in prop::collection::vec(any::<bool>(), 0..12),
        ) {
            let (mut quarantine, mut now) = (Quarantine::default(), at(0));
            for gap in gaps {
                now = now + Duration::from_secs(gap);
                quarantine.offend(now, 1);
            }
            prop_assert!(quarantine.since().is_some());
            let mut row = 0;
            for passed in canaries {
                row = if passed { row + 1 } else { 0 };
                now = quarantine.canary_due(PAUSE).unwrap();
                quarantine.canary(now, passed);
                prop_assert_eq!(quarantine.since().is_none(), row == 2);
                if row == 2 {
                    break;
                }
            }
        }
    }
}
