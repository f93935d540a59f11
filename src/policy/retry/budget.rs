//! How many retries a pool can afford.
//!
//! `Budget` is a share of recent requests plus a floor, counted exactly in one-second slots over ten
//! seconds (the numbers of GEP-3388): in a storm the first failure becomes the answer and attempts stay
//! below 1.2 × requests. `Burst` is the exception a lost replica needs: it breaks 1/N of all work at
//! once, so the first rescue of each of its exchanges draws here instead. Where nobody is eligible, attempts at
//! suspects draw on the budget too, the first of an exchange included, spread over the seconds: a pool that
//! is down is asked again and again, and never stormed.

use std::time::Duration;

use crate::policy::Moment;
use crate::policy::retry::RetryPolicy;

/// Seconds the budget looks back over.
const WINDOW_SECONDS: u64 = 10;
/// Second's worths of the floor that retries leave to the attempts at suspects: enough for one a second over the
/// whole window, so that a pool which spent everything on its way down still notices that a replica is back.
const RESERVED_SECONDS: f64 = 1.0;
/// Attempts at suspects that may come at once. Two: what the first shows the second need not find out again.
const SUSPECTS_AT_ONCE: f64 = 2.0;
/// Between two attempts at suspects of a pool that has spent everything else.
const SUSPECTS_APART: Duration = Duration::from_secs(1);
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
    suspects: Suspects,
}

/// Spreads the attempts at suspects over time: a bucket that a share of the requests and the floor flow into.
#[derive(Clone, Debug, Default)]
struct Suspects {
    tokens: f64,
    filled: Moment,
    /// Requests since then.
    requests: u64,
    /// The last attempt.
    asked: Option<Moment>,
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
        self.suspects.requests += 1;
    }

    /// Takes one retry if there is one.
    pub fn withdraw(&mut self, now: Moment, policy: &RetryPolicy) -> bool {
        let slot = self.roll(now);
        if self.left_by(policy) - reserve(policy) < 1.0 {
            return false;
        }
        self.slots[slot].retries += 1;
        self.retries += 1;
        true
    }

    /// Takes one for what may as well be left undone: only while half of the budget is left, so that it never costs a
    /// failure its retry.
    pub fn withdraw_spare(&mut self, now: Moment, policy: &RetryPolicy) -> bool {
        self.roll(now);
        self.left_by(policy) - reserve(policy) > self.whole(policy) / 2.0 && self.withdraw(now, policy)
    }

    /// Takes an attempt at a suspect: never more, in any time, than that time's share and floor, and two. A retry
    /// has drawn on the budget already (`paid`), and is spread like the others.
    pub fn withdraw_for_suspect(&mut self, now: Moment, policy: &RetryPolicy, paid: bool) -> bool {
        let slot = self.roll(now);
        if !self.suspects.fill(now, policy) {
            return false;
        }
        if !paid {
            let left = self.left_by(policy);
            let just_asked = self.suspects.asked.is_some_and(|asked| now.since(asked) < SUSPECTS_APART);
            if left < 1.0 || (left - reserve(policy) < 1.0 && just_asked) {
                return false;
            }
            self.slots[slot].retries += 1;
            self.retries += 1;
        }
        self.suspects.tokens -= 1.0;
        self.suspects.asked = Some(now);
        true
    }

    /// Nothing was sent to the suspect, so nothing is owed. It stays spread: what cannot be connected to need not be
    /// asked more often either.
    pub fn refund_suspect(&mut self, now: Moment) {
        let slot = self.roll(now);
        let slot = &mut self.slots[slot];
        if slot.retries > 0 {
            slot.retries -= 1;
            self.retries -= 1;
        }
    }

    /// Requests of the last ten seconds.
    pub fn requests(&mut self, now: Moment) -> u64 {
        self.roll(now);
        self.requests
    }

    /// Retries that could be made now.
    pub fn left(&mut self, now: Moment, policy: &RetryPolicy) -> f64 {
        self.roll(now);
        (self.left_by(policy) - reserve(policy)).max(0.0)
    }

    fn left_by(&self, policy: &RetryPolicy) -> f64 {
        self.whole(policy) - self.retries as f64
    }

    /// What the window allows in all.
    fn whole(&self, policy: &RetryPolicy) -> f64 {
        policy.budget_ratio * self.requests as f64 + policy.budget_floor * WINDOW_SECONDS as f64
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

impl Suspects {
    /// Lets flow in what is due; whether that is enough for one attempt.
    fn fill(&mut self, now: Moment, policy: &RetryPolicy) -> bool {
        let due = policy.budget_floor * now.since(self.filled).as_secs_f64()
            + policy.budget_ratio * self.requests as f64;
        self.tokens = (self.tokens + due).min(SUSPECTS_AT_ONCE);
        (self.filled, self.requests) = (self.filled.max(now), 0);
        self.tokens >= 1.0
    }
}

fn reserve(policy: &RetryPolicy) -> f64 {
    policy.budget_floor * RESERVED_SECONDS
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
        assert_eq!(granted, 90, "and the rest is for suspects");
    }

    #[test]
    fn what_may_be_left_undone_leaves_half_to_retries() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        (0..500).for_each(|_| budget.deposit(at(1.0)));
        // 200 in all, of which 10 are kept for suspects.
        let spare = (0..1000).filter(|_| budget.withdraw_spare(at(1.0), &policy)).count();
        assert_eq!(spare, 90);
        let retries = (0..1000).filter(|_| budget.withdraw(at(1.0), &policy)).count();
        assert_eq!(retries, 100);
        assert!(!budget.withdraw_spare(at(1.0), &policy));
    }

    #[test]
    fn suspects_are_asked_every_second_even_by_a_pool_that_spent_all() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        while budget.withdraw(at(1.0), &policy) {}
        let asked =
            (100..1100).filter(|n| budget.withdraw_for_suspect(at(f64::from(*n) / 100.0), &policy, false));
        let asked: Vec<i32> = asked.collect();
        assert_eq!(asked, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]);
    }

    #[test]
    fn while_more_than_the_reserve_is_left_nobody_waits_a_second() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        assert_eq!((0..88).filter(|_| budget.withdraw(at(1.0), &policy)).count(), 88);
        assert!(budget.withdraw_for_suspect(at(1.0), &policy, false));
        assert!(budget.withdraw_for_suspect(at(1.0), &policy, false), "the last before the reserve");
        assert!(!budget.withdraw_for_suspect(at(1.5), &policy, false));
    }

    #[test]
    fn attempts_at_suspects_are_spread_over_time() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        let mut asked = vec![100];
        for n in 100..3100 {
            let now = at(f64::from(n) / 100.0);
            if n % 2 == 0 {
                budget.deposit(now);
            }
            asked.extend((0..5).filter(|_| budget.withdraw_for_suspect(now, &policy, false)).map(|_| n));
        }
        // Thirty seconds and 1,500 requests; the reserve is not touched while something else is left.
        assert!((500..=602).contains(&asked.len()), "{}", asked.len());
        assert!(asked.windows(2).all(|pair| pair[1] - pair[0] <= 100), "never longer than a second");
    }

    #[test]
    fn a_suspect_that_could_not_be_reached_costs_nothing() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        let asked = (0..1000).filter(|_| {
            let may = budget.withdraw_for_suspect(at(1.0), &policy, false);
            if may {
                budget.refund_suspect(at(1.0));
            }
            may
        });
        assert_eq!(asked.count(), 2, "at once");
        assert!((budget.left(at(1.0), &policy) - 90.0).abs() < f64::EPSILON);
        // Of what has left the window nothing is given back.
        assert!(budget.withdraw_for_suspect(at(2.0), &policy, false));
        budget.refund_suspect(at(20.0));
        assert!((budget.left(at(20.0), &policy) - 90.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_retry_at_a_suspect_is_paid_once_and_spread_like_the_others() {
        let (mut budget, policy) = (Budget::default(), RetryPolicy::default());
        let retried = (0..50).filter(|_| budget.withdraw(at(1.0), &policy));
        assert_eq!(retried.count(), 50);
        let granted = (0..50).filter(|_| budget.withdraw_for_suspect(at(1.0), &policy, true)).count();
        assert_eq!(granted, 2);
        assert!((budget.left(at(1.0), &policy) - 40.0).abs() < f64::EPSILON);
    }

    #[test]
    fn what_is_left_is_a_share_of_the_requests_of_ten_seconds_and_the_floor_but_a_reserve() {
        let (mut budget, policy) =
            (Budget::default(), RetryPolicy { budget_floor: 1.0, ..RetryPolicy::default() });
        // A tenth of the floor is kept for suspects.
        let left = |budget: &mut Budget, secs: f64| (budget.left(at(secs), &policy) * 10.0).round() / 10.0;
        assert_eq!((budget.requests(at(0.0)), left(&mut budget, 0.0)), (0, 9.0));
        (0..50).for_each(|_| budget.deposit(at(0.5)));
        (0..25).for_each(|_| budget.deposit(at(3.0)));
        assert_eq!((budget.requests(at(3.0)), left(&mut budget, 3.0)), (75, 24.0));
        assert_eq!((0..100).filter(|_| budget.withdraw(at(4.0), &policy)).count(), 24);
        assert_eq!(left(&mut budget, 4.0), 0.0);
        assert_eq!((budget.requests(at(9.99)), left(&mut budget, 9.99)), (75, 0.0));
        assert_eq!(budget.requests(at(10.0)), 25, "the first second has left the window");
        assert_eq!(left(&mut budget, 10.0), 0.0, "and the retries it paid for are still there");
        assert_eq!((budget.requests(at(13.0)), left(&mut budget, 14.0)), (0, 9.0));
        budget.deposit(at(2.0));
        assert_eq!(budget.requests(at(14.0)), 1, "a clock that is late counts as now");
        assert_eq!(budget.requests(at(1000.0)), 0);
    }

    #[test]
    fn a_small_pool_has_a_burst_of_eight() {
        let mut burst = Burst::default();
        assert_eq!((0..50).filter(|_| burst.withdraw(at(1.0), 1)).count(), 8);
        assert_eq!(
            (0..50).filter(|_| burst.withdraw(at(16.0), 1)).count(),
            4,
            "half of it after half the time"
        );
        assert_eq!((0..50).filter(|_| burst.withdraw(at(46.0), 1)).count(), 8);
        assert_eq!((0..50).filter(|_| burst.withdraw(at(1000.0), 1)).count(), 8, "it never grows beyond");
    }

    proptest! {
        #[test]
        fn retries_never_exceed_share_and_floor_in_any_window(
            ops in proptest::collection::vec((0u32..400, 0u8..3), 1..2000)
        ) {
            let policy = RetryPolicy { budget_floor: 1.0, ..RetryPolicy::default() };
            let mut budget = Budget::default();
            let mut now = 0u64;
            let mut log: Vec<(u64, bool)> = Vec::new();
            for (ms, op) in ops {
                now += u64::from(ms) * 1000;
                if op > 0 {
                    let at = Moment::from_micros(now);
                    let granted = if op == 1 {
                        budget.withdraw(at, &policy)
                    } else {
                        budget.withdraw_for_suspect(at, &policy, false)
                    };
                    if granted {
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
