//! What clients saw, counted, and the verdict that follows from it. Pure.
//!
//! Every question ends in exactly one way. Two of them must never happen: `Failed` (an error instead of
//! an answer, or an answer that ends without a word) and `Wrong` (an answer that differs from what the
//! model says). A stream cut in the middle with a visible error is told apart: its first words had
//! reached the client, so it could not be asked again unseen.

use std::time::Duration;

use crate::policy::Moment;

/// How many failures are told in full.
const TOLD_MAX: usize = 5;

/// How one question ended for the client who asked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Complete, and word for word what the model says.
    Answered,
    /// Words, then an error event: the client knows.
    Cut,
    /// No answer, or one that broke off silently.
    Failed(String),
    /// An answer that is not the model's.
    Wrong(String),
}

/// Questions and how they ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) asked: u64,
    pub(super) answered: u64,
    pub(super) cut: u64,
    pub(super) failed: u64,
    pub(super) wrong: u64,
    /// Until its end, of those answered in full.
    pub(super) slowest: Duration,
    /// The first failures and wrong answers, for people.
    pub(super) told: Vec<String>,
}

impl Tally {
    pub(super) fn add(&mut self, seen: &Seen, took: Duration) {
        self.asked += 1;
        match seen {
            Seen::Answered => {
                self.answered += 1;
                self.slowest = self.slowest.max(took);
            }
            Seen::Cut => self.cut += 1,
            Seen::Failed(why) => {
                self.failed += 1;
                self.tell(format!("failed: {why}"));
            }
            Seen::Wrong(why) => {
                self.wrong += 1;
                self.tell(format!("wrong: {why}"));
            }
        }
    }

    fn tell(&mut self, what: String) {
        if self.told.len() < TOLD_MAX {
            self.told.push(what);
        }
    }
}

/// What the demo itself has done to a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Condition {
    #[default]
    Runs,
    Dead,
    Frozen,
}

/// What the parts of the demo tell each other.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// Since the start.
    pub(super) total: Tally,
    /// Since the latest trouble began.
    pub(super) trouble: Tally,
    /// Of each replica.
    pub(super) conditions: [Condition; super::NAMES.len()],
    /// What the demo does next, and when.
    pub(super) next: Option<(String, Moment)>,
}

impl Books {
    pub(super) fn add(&mut self, seen: &Seen, took: Duration) {
        self.total.add(seen, took);
        self.trouble.add(seen, took);
    }
}

/// What the demo did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Troubles {
    pub(super) kills: u32,
    pub(super) freezes: u32,
}

/// What came of it all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) lasted: Duration,
    pub(super) tally: Tally,
    /// Further attempts: requests that went on elsewhere before their client saw anything.
    pub(super) moved: u64,
    pub(super) troubles: Troubles,
    pub(super) interrupted: bool,
}

impl Verdict {
    /// No request failed and no answer was wrong. A demo that ran to its end without one answer showed nothing.
    pub(super) fn holds(&self) -> bool {
        let tally = &self.tally;
        tally.failed == 0 && tally.wrong == 0 && (tally.answered > 0 || self.interrupted)
    }
}

/// Attempts after the first, as the metrics page of evergate counts them.
pub(super) fn moved(metrics: &str) -> u64 {
    metrics
        .lines()
        .filter(|line| line.starts_with("evergate_retries_total{"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(seen: &[Seen]) -> Verdict {
        let mut tally = Tally::default();
        for (seen, took) in seen.iter().zip(1..) {
            tally.add(seen, Duration::from_secs(took));
        }
        Verdict {
            lasted: Duration::from_secs(9),
            tally,
            moved: 0,
            troubles: Troubles::default(),
            interrupted: false,
        }
    }

    #[test]
    fn the_verdict_holds_only_when_nothing_failed_and_nothing_was_wrong() {
        let bad = || "no".to_owned();
        assert!(verdict(&[Seen::Answered]).holds());
        assert!(verdict(&[Seen::Answered, Seen::Cut]).holds(), "a visible cut is named, not a failure");
        assert!(!verdict(&[Seen::Answered, Seen::Failed(bad())]).holds());
        assert!(!verdict(&[Seen::Answered, Seen::Wrong(bad())]).holds());
        assert!(!verdict(&[]).holds(), "nothing answered proves nothing");
        assert!(Verdict { interrupted: true, ..verdict(&[]) }.holds());
    }

    #[test]
    fn every_question_is_counted_once_and_the_slowest_answer_is_kept() {
        let tally = verdict(&[Seen::Cut, Seen::Answered, Seen::Answered, Seen::Failed("x".to_owned())]).tally;
        assert_eq!(tally.asked, tally.answered + tally.cut + tally.failed + tally.wrong);
        assert_eq!(tally.slowest, Duration::from_secs(3));
        assert_eq!(tally.told, ["failed: x"]);
    }

    #[test]
    fn only_the_first_failures_are_told() {
        let tally = verdict(&vec![Seen::Failed("x".to_owned()); 100]).tally;
        assert_eq!((tally.failed, tally.told.len()), (100, TOLD_MAX));
    }

    #[test]
    fn further_attempts_are_read_from_the_metrics_page() {
        let telemetry = crate::telemetry::Telemetry::silent();
        let pool = telemetry.metrics.pool("demo");
        assert_eq!(moved(&telemetry.metrics.render()), 0);
        pool.count_retry("connection_refused");
        pool.count_retry("connection_refused");
        pool.count_retry("rescued");
        assert_eq!(moved(&telemetry.metrics.render()), 3);
    }
}
