//! Power of two choices: the better of two at random.
//!
//! Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (1996): the longest queue falls
//! from log n / log log n to log log n, for the price of two looks. The two are drawn with replacement
//! until they are admissible, distinct and of tier 0; when luck fails, one scan draws two of all that
//! qualify, uniformly.

use super::{Candidates, Front, tie};

/// Draws per choice before the scan. With half of the pool out, four draws find two in 7 of 8 cases.
const DRAWS: usize = 4;

pub(super) fn pick(candidates: &impl Candidates, rng: &mut fastrand::Rng) -> Option<usize> {
    let len = candidates.len();
    if len > 2 {
        let any_tier = candidates.tiers_uniform();
        // Tier 0 is the lowest there can be; whether another tier is the lowest takes the scan to know.
        let good = |i: usize| (any_tier || candidates.tier(i) == 0) && candidates.admissible(i);
        let first = (0..DRAWS).map(|_| rng.usize(..len)).find(|&i| good(i));
        if let Some(first) = first
            && let Some(second) = (0..DRAWS).map(|_| rng.usize(..len)).find(|&i| i != first && good(i))
        {
            return Some(tie::better(candidates, first, second, rng));
        }
    }
    scan(candidates, rng)
}

/// Two of all that qualify, each pair as likely (Vitter, "Random Sampling with a Reservoir", 1985,
/// algorithm R).
fn scan(candidates: &impl Candidates, rng: &mut fastrand::Rng) -> Option<usize> {
    let mut kept = [None, None];
    for (seen, i) in Front::of(candidates).iter().enumerate() {
        let place = if seen < kept.len() { seen } else { rng.usize(..=seen) };
        if let Some(slot) = kept.get_mut(place) {
            *slot = Some(i);
        }
    }
    match kept {
        [Some(a), Some(b)] => Some(tie::better(candidates, a, b, rng)),
        [first, _] => first,
    }
}

#[cfg(test)]
mod tests {
    use super::super::BalancePolicy;
    use super::super::testing::{Fleet, Watched};
    use super::pick;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use std::cell::Cell;

    #[test]
    fn a_large_sound_pool_is_not_scanned() {
        let watched = Watched { fleet: Fleet::of(200), looks: Cell::new(0) };
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..1000 {
            pick(&watched, &mut rng).expect("all are admissible");
        }
        assert!(watched.looks.get() < 3000, "{}", watched.looks.get());
    }

    #[test]
    fn equal_backends_get_equal_shares_whoever_is_out() {
        for out in 0..7 {
            let mut fleet = Fleet::of(8);
            for backend in &mut fleet.0[..out] {
                backend.admissible = false;
            }
            let expected = 1.0 / (8 - out) as f64;
            for share in &fleet.shares(&BalancePolicy::PowerOfTwo, 40_000, 11)[out..] {
                assert!((share - expected).abs() < 0.015, "{out} out: {share} instead of {expected}");
            }
        }
    }

    #[test]
    fn load_stays_close_to_even() {
        let mut fleet = Fleet::of(50);
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..5000 {
            let i = pick(&fleet, &mut rng).expect("all are admissible");
            fleet.0[i].load += 1.0;
        }
        let highest = fleet.0.iter().map(|b| b.load).fold(0.0, f64::max);
        assert!(highest < 100.0 * 1.25, "{highest}");
    }

    proptest! {
        #[test]
        fn the_clearly_most_loaded_of_a_sound_pool_is_never_picked(
            len in 2u64..20,
            worst in any::<u64>(),
            seed in any::<u64>(),
        ) {
            let mut fleet = Fleet::of(len);
            let worst = (worst % len) as usize;
            fleet.0[worst].load = 3.0;
            let mut rng = fastrand::Rng::with_seed(seed);
            for _ in 0..50 {
                let picked = pick(&fleet, &mut rng);
                prop_assert!(picked.is_some());
                prop_assert!(picked != Some(worst));
            }
        }

        #[test]
        fn the_only_admissible_one_is_found(
            len in 1u64..300,
            only in any::<u64>(),
            tier in any::<u8>(),
            seed in any::<u64>(),
        ) {
            let mut fleet = Fleet::of(len);
            let only = (only % len) as usize;
            for (i, backend) in fleet.0.iter_mut().enumerate() {
                backend.admissible = i == only;
                backend.tier = tier;
            }
            prop_assert_eq!(pick(&fleet, &mut fastrand::Rng::with_seed(seed)), Some(only));
        }
    }
}
