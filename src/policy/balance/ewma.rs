//! What a backend's recent past is worth to the balancer: how soon its first tokens come, how often it failed.
//!
//! Both are two numbers and a moment, updated in a few nanoseconds; both forget by half-lives, so that a
//! backend avoided for its past is tried again. The mean weighs observations by age *and* number: with time
//! alone a burst of ten would count as one, with numbers alone a quiet backend would keep its last bad
//! minute for an hour. Not peak-sensitive (unlike Finagle's peak EWMA): prefill times differ hundredfold by
//! prompt, and one long prompt must not ban a backend.

use crate::policy::Moment;
use std::time::Duration;

/// First-token seconds are half forgotten after so long. 10 s: what was measured under load says little about
/// an idle pool, and one that was a second slower than its peers is looked at again within the minute.
const FIRST_TOKEN_HALF_LIFE: Duration = Duration::from_secs(10);

/// Observations the mean is worth at most: a new one counts for at least a seventeenth.
const WEIGHT_MAX: f64 = 16.0;

/// One observation counts as at most so many times the mean.
const SURPRISE_MAX: f64 = 4.0;

/// A mean below this is treated as this where surprises are bounded, or a mean of zero could never rise.
/// Seconds.
const MEAN_FLOOR: f64 = 0.001;

/// A failure is half forgotten after so long. 10 s, as long as a slow start: by then either more failures
/// have ejected the backend, or it was one unlucky moment.
const FAILURE_HALF_LIFE: Duration = Duration::from_secs(10);

/// Failures remembered at most: a factor of 64, which any in-flight count of its peers makes up for.
const FAILURES_MAX: f64 = 6.0;

/// Fewer failures than this, half-lives included, are none: 40 s after a single one.
const FAILURES_NEGLIGIBLE: f64 = 1.0 / 16.0;

/// Decayed mean of first-token seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ewma {
    mean: f64,
    weight: f64,
    at: Moment,
}

impl Ewma {
    /// Learns one first-token time. Values that are not finite or below zero are ignored.
    pub fn observe(&mut self, now: Moment, secs: f64) {
        if !secs.is_finite() || secs < 0.0 {
            return;
        }
        if self.weight == 0.0 {
            *self = Self { mean: secs, weight: 1.0, at: now };
            return;
        }
        let believed = secs.min(SURPRISE_MAX * self.mean.max(MEAN_FLOOR));
        let weight = self.weight * halvings(self.at, now, FIRST_TOKEN_HALF_LIFE);
        self.mean += (believed - self.mean) / (weight + 1.0);
        self.weight = (weight + 1.0).min(WEIGHT_MAX);
        self.at = self.at.max(now);
    }

    /// The mean, drawn towards `median` (the pool's) by half for each half-life without an observation;
    /// `median` itself before the first.
    pub fn value_towards(&self, now: Moment, median: f64) -> f64 {
        if self.weight == 0.0 {
            return median;
        }
        median + (self.mean - median) * halvings(self.at, now, FIRST_TOKEN_HALF_LIFE)
    }

    /// The mean as it was last observed, undecayed, for the median of the pool; none before the first
    /// observation.
    pub fn value(&self) -> Option<f64> {
        (self.weight > 0.0).then_some(self.mean)
    }
}

/// How much worse than its load a backend looks for having failed: without it, one that fails at once is
/// always the least loaded, and draws all traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RecentFailures {
    count: f64,
    at: Moment,
}

impl RecentFailures {
    /// One more failure.
    pub fn fail(&mut self, now: Moment) {
        let before = self.count * halvings(self.at, now, FAILURE_HALF_LIFE);
        self.count = (before + 1.0).min(FAILURES_MAX);
        self.at = self.at.max(now);
    }

    /// What to multiply the load by: 1 without failures, doubled by each, 64 at most. Multiply
    /// in-flight **plus one**: zero times anything is still the least loaded.
    pub fn factor(&self, now: Moment) -> f64 {
        if self.count == 0.0 {
            return 1.0;
        }
        let count = self.count * halvings(self.at, now, FAILURE_HALF_LIFE);
        if count < FAILURES_NEGLIGIBLE { 1.0 } else { count.exp2() }
    }
}

/// What is left of 1 between two moments.
fn halvings(from: Moment, to: Moment, half_life: Duration) -> f64 {
    let elapsed = to.since(from);
    if elapsed.is_zero() { 1.0 } else { (-elapsed.as_secs_f64() / half_life.as_secs_f64()).exp2() }
}

#[cfg(test)]
mod tests {
    use super::{Ewma, FAILURE_HALF_LIFE, FIRST_TOKEN_HALF_LIFE, Moment, RecentFailures};
    use proptest::prelude::{any, prop, prop_assert, proptest};
    use std::time::Duration;

    #[test]
    fn an_observation_counts_by_its_age_and_by_how_many_there_are() {
        let near = |ewma: &Ewma, expected: f64| (ewma.value().expect("observed") - expected).abs() < 1e-9;
        let mut ewma = Ewma::default();
        ewma.observe(Moment::ZERO, 1.0);
        let later = Moment::ZERO + FIRST_TOKEN_HALF_LIFE;
        ewma.observe(later, 4.0);
        assert!(near(&ewma, 3.0), "half a one against a whole one: {ewma:?}");
        ewma.observe(later, 8.0);
        assert!(near(&ewma, 5.0), "one and a half against one: {ewma:?}");
        let mut ewma = Ewma::default();
        ewma.observe(Moment::ZERO, 0.0);
        assert_eq!(ewma.value(), Some(0.0), "at once is a time too");
    }

    #[test]
    fn a_failure_is_half_forgotten_by_half_lives_and_wholly_after_forty_seconds() {
        let near = |failures: &RecentFailures, at: Moment, count: f64| {
            (failures.factor(at) - count.exp2()).abs() < 1e-9
        };
        let after = |half_lives: u32| Moment::ZERO + FAILURE_HALF_LIFE * half_lives;
        let mut failures = RecentFailures::default();
        failures.fail(Moment::ZERO);
        assert!(near(&failures, after(1), 0.5));
        assert!(near(&failures, after(4), 0.0625));
        assert!(near(&failures, after(4) + Duration::from_micros(1), 0.0));
        failures.fail(after(1));
        assert!(near(&failures, after(1), 1.5));
    }

    #[test]
    fn an_unobserved_backend_is_worth_the_median() {
        let ewma = Ewma::default();
        assert_eq!(ewma.value(), None);
        assert!((ewma.value_towards(Moment::ZERO, 0.7) - 0.7).abs() < 1e-9);
    }

    #[test]
    fn a_silent_backend_drifts_to_the_median_by_half_lives() {
        let mut ewma = Ewma::default();
        ewma.observe(Moment::ZERO, 3.0);
        let at = |half_lives: u32| ewma.value_towards(Moment::ZERO + FIRST_TOKEN_HALF_LIFE * half_lives, 1.0);
        assert!((at(0) - 3.0).abs() < 1e-9);
        assert!((at(1) - 2.0).abs() < 1e-9);
        assert!((at(2) - 1.5).abs() < 1e-9);
        assert!((at(30) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn one_long_prompt_does_not_ban_a_backend() {
        let mut ewma = Ewma::default();
        for second in 0..20 {
            ewma.observe(Moment::from_micros(second * 1_000_000), 0.5);
        }
        ewma.observe(Moment::from_micros(20_000_000), 60.0);
        let after = ewma.value().expect("observed");
        assert!(after < 0.65, "{after}");
    }

    #[test]
    fn a_lasting_change_is_learned_within_twenty_observations() {
        let mut ewma = Ewma::default();
        for n in 0..100 {
            ewma.observe(Moment::from_micros(n * 100_000), 0.2);
        }
        for n in 100..140 {
            ewma.observe(Moment::from_micros(n * 100_000), 2.0);
        }
        assert!(ewma.value().expect("observed") > 1.5, "{ewma:?}");
    }

    #[test]
    fn each_failure_doubles_and_time_forgives() {
        let mut failures = RecentFailures::default();
        assert!((failures.factor(Moment::ZERO) - 1.0).abs() < 1e-9);
        for expected in [2.0, 4.0, 8.0] {
            failures.fail(Moment::ZERO);
            assert!((failures.factor(Moment::ZERO) - expected).abs() < 1e-9);
        }
        let later = Moment::ZERO + FAILURE_HALF_LIFE;
        assert!((failures.factor(later) - 1.5f64.exp2()).abs() < 1e-9);
        assert!((failures.factor(later + Duration::from_secs(120)) - 1.0).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn values_stay_between_what_was_seen_whatever_the_clock_says(
            seen in prop::collection::vec((any::<u32>(), 0.0f64..600.0), 1..50),
            median in 0.0f64..600.0,
            now in any::<u64>(),
        ) {
            let mut ewma = Ewma::default();
            let mut failures = RecentFailures::default();
            for &(at, secs) in &seen {
                ewma.observe(Moment::from_micros(u64::from(at)), secs);
                failures.fail(Moment::from_micros(u64::from(at)));
            }
            ewma.observe(Moment::from_micros(now), f64::NAN);
            ewma.observe(Moment::from_micros(now), -1.0);
            let low = seen.iter().map(|s| s.1).fold(median, f64::min);
            let high = seen.iter().map(|s| s.1).fold(median, f64::max);
            let value = ewma.value_towards(Moment::from_micros(now), median);
            prop_assert!((low - 1e-6..=high + 1e-6).contains(&value), "{value} of {low}..={high}");
            prop_assert!((1.0..=64.0).contains(&failures.factor(Moment::from_micros(now))));
        }
    }
}
