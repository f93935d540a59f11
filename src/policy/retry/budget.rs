//! How many retries a pool can afford.
//!
//! `Budget` is a share of recent requests plus a floor, counted exactly in one-second slots over ten
//! seconds (the numbers of GEP-3388): in a storm the first failure becomes the answer and attempts stay
//! below 1.2 × requests. `Burst` is the exception a lost replica needs: it breaks 1/N of all work at
//! once, so the first rescue of each of its exchanges draws here instead.

use std::time::Duration;

use crate::policy::Moment;
use crate::policy::retry::RetryPolicy;

/// Seconds the budget looks back over.
const WINDOW_SECONDS: u64 = 10;
/// Time in which a burst allowance comes back.
const BURST_REFILL: Duration = Duration::from_secs(30);
/// Smallest burst allowance, for pools that have hardly been used.
const BURST_MIN: f64 = 8.0;

/// Requests and retries of the last ten seconds.
#[derive(Clone, Debug, Default)]
pub struct Budget {
    slots: [Slot; WINDOW_SECONDS as usize],
    requests: u64,
    retries: u64,
    /// The second of the latest slot.
    second: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    requests: u32,
    retries: u32,
}

impl Budget {
    /// A request has arrived.
    pub fn deposit(&mut self, now: Moment) {
        let slot = self.roll(now);
        self.slots[slot].requests += 1;
        self.requests += 1;
    }

    /// Takes one retry if there is one.
    pub fn withdraw(&mut self, now: Moment, policy: &RetryPolicy) -> bool {
        let slot = self.roll(now);
        if self.left_by(policy) < 1.0 {
            return false;
        }
        self.slots[slot].retries += 1;
        self.retries += 1;
        true
    }

    /// Requests of the last ten seconds.
    pub fn requests(&mut self, now: Moment) -> u64 {
        self.roll(now);
        self.requests
    }

    /// Retries that could be made now.
    pub fn left(&mut self, now: Moment, policy: &RetryPolicy) -> f64 {
        self.roll(now);
        self.left_by(policy).max(0.0)
    }

    fn left_by(&self, policy: &RetryPolicy) -> f64 {
        let earned = policy.budget_ratio * self.requests as f64;
        earned + policy.budget_floor * WINDOW_SECONDS as f64 - self.retries as f64
    }

    /// Forgets the slots that have left the window; returns the slot of `now`.
    fn roll(&mut self, now: Moment) -> usize {
        let second = now.as_micros() / 1_000_000;
        let steps = second.saturating_sub(self.second).min(WINDOW_SECONDS);
        for step in 1..=steps {
            let old = &mut self.slots[((self.second + step) % WINDOW_SECONDS) as usize];
            self.requests -= u64::from(old.requests);
            self.retries -= u64::from(old.retries);
            *old = Slot::default();
        }
        self.second = self.second.max(second);
        (self.second % WINDOW_SECONDS) as usize
    }
}

/// The allowance for the work of a lost replica.
#[derive(Clone, Debug, Default)]
pub struct Burst {
    spent: f64,
    since: Moment,
}

impl Burst {
    /// Takes one from an allowance of `highest` (the highest in-flight of one backend) if there is one.
    pub fn withdraw(&mut self, now: Moment, highest: u32) -> bool {
        let allowance = f64::from(highest).max(BURST_MIN);
        let back = allowance * now.since(self.since).as_secs_f64() / BURST_REFILL.as_secs_f64();
        self.spent = (self.spent - back).max(0.0);
        self.since = now;
        if self.spent + 1.0 > allowance {
            return false;
        }
        self.spent += 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_micros((seconds * 1e6) as u64)
    }

    #[test]
    fn the_floor_is_there_without_any_request() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        let granted = (0..1000).filter(|_| budget.withdraw(at(1.0), &policy)).count();
        assert_eq!(granted, 100);
    }

    #[test]
    fn a_burst_covers_the_work_of_one_backend_and_comes_back() {
        let mut burst = Burst::default();
        assert_eq!((0..500).filter(|_| burst.withdraw(at(1.0), 256)).count(), 256);
        assert!(!burst.withdraw(at(1.0), 256));
        assert_eq!((0..500).filter(|_| burst.withdraw(at(16.0), 256)).count(), 128);
    }

    proptest! {
        #[test]
        fn retries_never_exceed_share_and_floor_in_any_window(
            ops in proptest::collection::vec((0u32..400, any::<bool>()), 1..2000)
        ) {
            let policy = RetryPolicy { budget_floor: 1.0, ..RetryPolicy::default() };
            let mut budget = Budget::default();
            let mut now = 0u64;
            let mut log: Vec<(u64, bool)> = Vec::new();
            for (ms, retry) in ops {
                now += u64::from(ms) * 1000;
                if retry {
                    if budget.withdraw(Moment::from_micros(now), &policy) {
                        log.push((now, true));
                        let from = (now / 1_000_000).saturating_sub(WINDOW_SECONDS - 1) * 1_000_000;
                        let recent = log.iter().filter(|(t, _)| *t >= from);
                        let (retries, requests) = recent.fold((0.0, 0.0), |(r, q), (_, is_retry)| {
                            if *is_retry { (r + 1.0, q) } else { (r, q + 1.0) }
                        });
                        prop_assert!(retries <= 0.2 * requests + 10.0);
                    }
                } else {
                    budget.deposit(Moment::from_micros(now));
                    log.push((now, false));
                }
            }
        }
    }
}
