//! Whether a late attempt may be doubled at another backend: before its first token, on suspicion only.
//!
//! The first of the two that speaks is believed, the other is cancelled. Hedges are work done twice, and
//! suspicion is cheapest to come by when everybody is overloaded; so they are bounded by a share of the requests
//! of ten seconds. One at a time is always allowed: in a quiet pool a share of the requests is less than one.
//! (J. Dean, L. A. Barroso, "The Tail at Scale", CACM 2013: a few percent of requests buy most of the gain.)

use std::collections::VecDeque;
use std::time::Duration;

use crate::policy::Moment;

/// How far back hedges are counted; as the retry budget.
const WINDOW: Duration = Duration::from_secs(10);

/// The hedges of a pool.
#[derive(Clone, Debug, Default)]
pub struct Hedges {
    /// When those of the window began.
    begun: VecDeque<Moment>,
    under_way: u32,
}

impl Hedges {
    /// Begins one if it may, given the `requests` of the last ten seconds and the `ratio` of them that may be hedged.
    pub fn begin(&mut self, now: Moment, ratio: f64, requests: u64) -> bool {
        while self.begun.front().is_some_and(|at| now.since(*at) >= WINDOW) {
            self.begun.pop_front();
        }
        let within = self.begun.len() as f64 + 1.0 <= ratio * requests as f64;
        if ratio <= 0.0 || !(within || self.under_way == 0) {
            return false;
        }
        self.begun.push_back(now);
        self.under_way += 1;
        true
    }

    /// One has ended, however.
    pub fn ended(&mut self) {
        debug_assert!(self.under_way > 0, "a hedge ends once");
        self.under_way = self.under_way.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ms: u64) -> Moment {
        Moment::from_micros(ms * 1000)
    }

    #[test]
    fn one_at_a_time_is_always_allowed() {
        let mut hedges = Hedges::default();
        assert!(hedges.begin(at(0), 0.05, 1));
        assert!(!hedges.begin(at(1), 0.05, 1));
        hedges.ended();
        assert!(hedges.begin(at(2), 0.05, 1));
    }

    #[test]
    fn a_ratio_of_zero_means_never() {
        assert!(!Hedges::default().begin(at(0), 0.0, 1_000_000));
    }

    #[test]
    fn a_share_of_the_requests_may_run_side_by_side_and_comes_back_with_time() {
        let mut hedges = Hedges::default();
        let granted = (0..100).filter(|_| hedges.begin(at(5), 0.05, 400)).count();
        assert_eq!(granted, 20);
        assert!(!hedges.begin(at(10_004), 0.05, 400));
        assert!(hedges.begin(at(10_005), 0.05, 400));
    }

    proptest! {
        #[test]
        fn never_more_than_the_share_or_one_side_by_side(
            steps in prop::collection::vec((0u64..3_000, any::<bool>(), 0u64..500), 1..300),
        ) {
            let (mut hedges, mut now, mut under_way) = (Hedges::default(), 0, 0u32);
            let mut begun: Vec<u64> = Vec::new();
            for (pass, ends, requests) in steps {
                now += pass;
                if ends && under_way > 0 {
                    hedges.ended();
                    under_way -= 1;
                } else if hedges.begin(at(now), 0.05, requests) {
                    begun.push(now);
                    let recent = begun.iter().filter(|at| now - **at < 10_000).count();
                    prop_assert!(under_way == 0 || recent as f64 <= 0.05 * requests as f64);
                    under_way += 1;
                }
            }
        }
    }
}
