//! How long to wait before the same backend is asked again: exponential with full jitter
//! (M. Brooker, "Exponential Backoff and Jitter", 2015).

use std::time::Duration;

use crate::policy::retry::RetryPolicy;

/// The wait before repetition `n` (1 = first).
pub fn backoff(policy: &RetryPolicy, n: u32, rng: &mut fastrand::Rng) -> Duration {
    let doubled = policy.backoff_min.saturating_mul(1 << n.saturating_sub(1).min(16));
    doubled.min(policy.backoff_max).mul_f64(rng.f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_below_their_doubling_bound_and_below_the_longest() {
        let policy = RetryPolicy::default();
        let mut rng = fastrand::Rng::with_seed(7);
        for n in 1..40 {
            let bound = Duration::from_millis(25 << (n - 1).min(16)).min(policy.backoff_max);
            assert!((0..100).all(|_| backoff(&policy, n, &mut rng) <= bound));
        }
    }

    #[test]
    fn a_wait_is_drawn_evenly_below_a_bound_that_doubles() {
        let policy = RetryPolicy::default();
        let mut rng = fastrand::Rng::with_seed(11);
        for (n, bound) in [(0, 0.025), (1, 0.025), (2, 0.05), (3, 0.1), (6, 0.8), (7, 1.0), (60, 1.0)] {
            let mean = (0..4000).map(|_| backoff(&policy, n, &mut rng).as_secs_f64()).sum::<f64>() / 4000.0;
            assert!((mean / bound - 0.5).abs() < 0.03, "{n}: {mean}");
        }
    }
}
