//! Who wins among equals: the lower load; within a tenth of it the earlier first token; within a tenth of that,
//! or a moment, chance, by weight.
//!
//! Loads are estimates, and so are first-token times: without a margin their noise would decide, and every
//! gateway would send to the same backend. Chance goes by weight because load cannot speak for an idle
//! pool: there all loads are zero and a slow-starting backend looks as good as any.

use super::Candidates;

/// Two values that differ by less than this share of the larger are equal. A tenth: one request more on
/// ten is no difference, one more on five is.
const MARGIN: f64 = 0.1;

/// First tokens closer together than this come at the same time, in seconds. A handshake or a busy scheduler
/// makes so much of a difference, and whoever looks slow for it would not be asked again for half a minute
/// on an idle pool.
const FIRST_TOKEN_NOISE: f64 = 0.02;

/// Whether `a` is lower than `b` by more than the margin.
pub(super) fn clearly_lower(a: f64, b: f64) -> bool {
    a < b - MARGIN * b.abs()
}

/// The same for two first-token times.
pub(super) fn clearly_sooner(a: f64, b: f64) -> bool {
    clearly_lower(a + FIRST_TOKEN_NOISE, b)
}

/// The better of two, by the rules above.
pub(super) fn better(candidates: &impl Candidates, a: usize, b: usize, rng: &mut fastrand::Rng) -> usize {
    let (load_a, load_b) = (candidates.load(a), candidates.load(b));
    if clearly_lower(load_a, load_b) {
        return a;
    }
    if clearly_lower(load_b, load_a) {
        return b;
    }
    if let (Some(first_a), Some(first_b)) = (candidates.first_token(a), candidates.first_token(b)) {
        if clearly_sooner(first_a, first_b) {
            return a;
        }
        if clearly_sooner(first_b, first_a) {
            return b;
        }
    }
    let (weight_a, weight_b) = (candidates.weight(a), candidates.weight(b));
    if rng.f64() * (weight_a + weight_b) < weight_a { a } else { b }
}

/// Keeps one of a sequence with probability proportional to weight, in one pass and without memory
/// (weighted reservoir of one; Chao, "A general purpose unequal probability sampling plan", 1982).
#[derive(Default)]
pub(super) struct Lot {
    total: f64,
    kept: Option<usize>,
}

impl Lot {
    pub(super) fn offer(&mut self, i: usize, weight: f64, rng: &mut fastrand::Rng) {
        // A weight that is none (the pool promises positive ones) still leaves the backend a last resort.
        let weight = if weight.is_finite() && weight > 0.0 { weight } else { f64::MIN_POSITIVE };
        self.total += weight;
        if self.kept.is_none() || rng.f64() * self.total < weight {
            self.kept = Some(i);
        }
    }

    pub(super) const fn kept(&self) -> Option<usize> {
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fleet;
    use super::{Lot, better};

    fn wins_of_first(fleet: &Fleet) -> usize {
        let mut rng = fastrand::Rng::with_seed(1);
        (0..1000).filter(|_| better(fleet, 0, 1, &mut rng) == 0).count()
    }

    #[test]
    fn near_equal_loads_are_decided_by_the_first_token() {
        let mut fleet = Fleet::of(2);
        (fleet.0[0].load, fleet.0[1].load) = (10.5, 10.0);
        (fleet.0[0].first_token, fleet.0[1].first_token) = (Some(0.2), Some(0.4));
        assert_eq!(wins_of_first(&fleet), 1000);
        fleet.0[0].load = 12.0;
        assert_eq!(wins_of_first(&fleet), 0);
    }

    #[test]
    fn unknown_or_near_equal_first_tokens_leave_it_to_chance() {
        let mut fleet = Fleet::of(2);
        for (first, second) in
            [(None, Some(0.1)), (Some(9.0), None), (Some(0.40), Some(0.41)), (Some(0.002), Some(0.018))]
        {
            (fleet.0[0].first_token, fleet.0[1].first_token) = (first, second);
            assert!((400..600).contains(&wins_of_first(&fleet)), "{first:?} {second:?}");
        }
    }

    #[test]
    fn chance_goes_by_weight() {
        let fleet = Fleet::weighing(&[0.1, 0.9]);
        assert!((60..150).contains(&wins_of_first(&fleet)));
    }

    #[test]
    fn a_weight_that_is_none_leaves_a_last_resort() {
        let mut rng = fastrand::Rng::with_seed(6);
        let mut wins = |weights: [f64; 2]| {
            let first = (0..1000).filter(|_| {
                let mut lot = Lot::default();
                weights.iter().enumerate().for_each(|(i, &weight)| lot.offer(i, weight, &mut rng));
                lot.kept() == Some(0)
            });
            first.count()
        };
        for none in [f64::INFINITY, f64::NAN, -1.0, 0.0] {
            assert_eq!(wins([none, 1.0]), 0, "{none}");
            assert!((400..600).contains(&wins([none, none])), "{none}: among equals chance decides");
        }
        assert!((650..850).contains(&wins([3.0, 1.0])));
    }
}
