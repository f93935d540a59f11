//! How long a backend is removed: 1 s, doubling to 60 s, less up to a fifth by chance.
//!
//! The doubling is a level: one up for each ejection, one down for each `ejection_decay` of health before
//! it. So a backend that fails every trial is tried about once a minute, and one that failed in a bad
//! minute an hour ago starts again at a second. (Envoy's outlier detection grows linearly and never forgets
//! within a run; here the first ejections must be short because pools are small.)

use super::HealthPolicy;
use crate::policy::Moment;
use std::time::Duration;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Doubling {
    level: u32,
}

impl Doubling {
    /// Health takes doublings back. To be called when it ends.
    pub(super) fn forgive(&mut self, policy: &HealthPolicy, healthy: Duration) {
        let forgiven = healthy.as_micros() / policy.ejection_decay.as_micros().max(1);
        self.level = self.level.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX));
    }

    /// Length of the next ejection, and its number in a row (which stops counting at the longest:
    /// higher levels would only take longer to forgive).
    pub(super) fn next(&mut self, policy: &HealthPolicy, rng: &mut fastrand::Rng) -> (Duration, u32) {
        let times = self.level.saturating_add(1);
        let factor = 1u32.checked_shl(self.level).unwrap_or(u32::MAX);
        let whole = policy.ejection_min.saturating_mul(factor).min(policy.ejection_max);
        if whole < policy.ejection_max {
            self.level = times;
        }
        (shortened(whole, policy.ejection_jitter, rng), times)
    }

    /// Ejections in a row so far, at least 1.
    pub(super) fn times(self) -> u32 {
        self.level.max(1)
    }
}

/// `base`, doubled so many `times`, at most `max`.
pub(super) fn doubled(base: Duration, times: u32, max: Duration) -> Duration {
    base.saturating_mul(1u32.checked_shl(times).unwrap_or(u32::MAX)).min(max)
}

/// A duration less a random part of at most `share`.
pub(super) fn shortened(whole: Duration, share: f64, rng: &mut fastrand::Rng) -> Duration {
    whole.mul_f64((1.0 - share * rng.f64()).clamp(0.0, 1.0)).min(whole)
}

/// The pause of a backend that said it is busy and not for how long: doubles from `busy_min` to `busy_max`,
/// halved by chance so that the waiting do not return together.
pub(super) fn busy_pause(policy: &HealthPolicy, times: u32, rng: &mut fastrand::Rng) -> Duration {
    let factor = 1u32.checked_shl(times.saturating_sub(1)).unwrap_or(u32::MAX);
    shortened(policy.busy_min.saturating_mul(factor).min(policy.busy_max), 0.5, rng)
}

/// A Retry-After within reason.
pub(super) fn believed(policy: &HealthPolicy, now: Moment, until: Moment) -> Moment {
    until.min(now + policy.retry_after_max)
}

#[cfg(test)]
mod tests {
    use super::{Doubling, HealthPolicy, busy_pause, shortened};
    use proptest::prelude::{any, prop, prop_assert, proptest};
    use std::time::Duration;

    #[test]
    fn ejections_double_to_the_longest_and_health_takes_doublings_back() {
        let policy = HealthPolicy { ejection_jitter: 0.0, ..HealthPolicy::default() };
        let mut rng = fastrand::Rng::with_seed(0);
        let mut doubling = Doubling::default();
        let mut next = |healthy: u64| {
            doubling.forgive(&policy, Duration::from_secs(healthy));
            doubling.next(&policy, &mut rng).0.as_secs()
        };
        assert_eq!([0; 8].map(&mut next), [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(next(59), 60);
        assert_eq!(next(60), 32);
        assert_eq!(next(180), 8);
        assert_eq!(next(100_000), 1);
    }

    #[test]
    fn chance_takes_off_up_to_its_share_evenly() {
        let whole = Duration::from_secs(1);
        let mut rng = fastrand::Rng::with_seed(4);
        let parts: Vec<f64> = (0..2000).map(|_| shortened(whole, 0.4, &mut rng).as_secs_f64()).collect();
        assert!(parts.iter().all(|part| (0.6..=1.0).contains(part)));
        let mean = parts.iter().sum::<f64>() / 2000.0;
        assert!((mean - 0.8).abs() < 0.01, "{mean}");
    }

    proptest! {
        #[test]
        fn an_ejection_is_never_out_of_bounds(
            healthy in prop::collection::vec(0u64..300, 1..60),
            jitter in 0.0f64..1.0,
            seed in any::<u64>(),
        ) {
            let policy = HealthPolicy { ejection_jitter: jitter, ..HealthPolicy::default() };
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut doubling = Doubling::default();
            for healthy in healthy {
                doubling.forgive(&policy, Duration::from_secs(healthy));
                let (lasts, times) = doubling.next(&policy, &mut rng);
                prop_assert!(lasts <= policy.ejection_max && times >= 1);
                prop_assert!(lasts >= policy.ejection_min.mul_f64(1.0 - jitter) - Duration::from_micros(1));
            }
        }

        #[test]
        fn a_busy_pause_stays_within_its_bounds(times in any::<u32>(), seed in any::<u64>()) {
            let policy = HealthPolicy::default();
            let pause = busy_pause(&policy, times, &mut fastrand::Rng::with_seed(seed));
            prop_assert!(pause >= policy.busy_min / 2 - Duration::from_micros(1) && pause <= policy.busy_max);
        }
    }
}
