//! In turn, by weight, with one shared counter and no other memory.
//!
//! Equal weights: the counter modulo the number of those that qualify, so that whoever is out leaves no
//! double share to its neighbour. Unequal weights (also a slow start): the counter's point in the
//! golden-ratio sequence, looked up in the cumulative weights. Of all such sequences it spreads most evenly
//! (Weyl 1916; Knuth, TAOCP vol. 3 §6.4): after n picks each share is off by O(log n / n), where chance
//! would be off by 1/√n.

use super::{Candidates, Front};
use std::sync::atomic::{AtomicUsize, Ordering};

/// 2⁶⁴ ÷ golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

pub(super) fn pick(candidates: &impl Candidates, cursor: &AtomicUsize) -> Option<usize> {
    let front = Front::of(candidates);
    let mut count = 0;
    let mut total = 0.0;
    let mut lightest = f64::INFINITY;
    let mut heaviest = 0.0f64;
    for i in front.iter() {
        let weight = candidates.weight(i);
        count += 1;
        total += weight;
        lightest = lightest.min(weight);
        heaviest = heaviest.max(weight);
    }
    if count == 0 {
        return None;
    }
    let turn = cursor.fetch_add(1, Ordering::Relaxed);
    // Not worth a wobble in the rotation.
    let even = heaviest - lightest < 0.001 * heaviest;
    let chosen = if even || !total.is_finite() {
        front.iter().nth(turn % count)
    } else {
        let point = (turn as u64).wrapping_mul(GOLDEN) as f64 / 2f64.powi(64);
        let mut left = point * total;
        front.iter().find(|&i| {
            left -= candidates.weight(i);
            left < 0.0
        })
    };
    // Fewer may qualify than were counted a moment ago.
    chosen.or_else(|| front.iter().next())
}

#[cfg(test)]
mod tests {
    use super::super::BalancePolicy;
    use super::super::testing::Fleet;
    use super::pick;
    use proptest::prelude::{ProptestConfig, any, prop, prop_assert, prop_assert_eq, proptest};
    use std::sync::atomic::AtomicUsize;

    proptest! {
        #[test]
        fn equal_backends_take_exact_turns(
            admissible in prop::collection::vec(any::<bool>(), 1..20),
            start in 0usize..1000,
        ) {
            let mut fleet = Fleet::of(admissible.len() as u64);
            for (backend, &admissible) in fleet.0.iter_mut().zip(&admissible) {
                backend.admissible = admissible;
            }
            let there = admissible.iter().filter(|&&a| a).count();
            let cursor = AtomicUsize::new(start);
            let mut counts = vec![0; admissible.len()];
            for _ in 0..there * 3 {
                counts[pick(&fleet, &cursor).expect("someone is admissible")] += 1;
            }
            for (count, admissible) in counts.into_iter().zip(admissible) {
                prop_assert_eq!(count, if admissible { 3 } else { 0 });
            }
        }
    }

    #[test]
    fn weights_that_hardly_differ_take_exact_turns() {
        for weights in [[0.01, 0.010_005], [100.0, 100.05]] {
            let (fleet, cursor) = (Fleet::weighing(&weights), AtomicUsize::new(0));
            let turns: Vec<_> = (0..8).map(|_| pick(&fleet, &cursor)).collect();
            assert_eq!(turns, [0, 1, 0, 1, 0, 1, 0, 1].map(Some));
        }
        let (fleet, cursor) = (Fleet::weighing(&[0.01, 0.0101]), AtomicUsize::new(0));
        let firsts = (0..10_000).filter(|_| pick(&fleet, &cursor) == Some(0)).count();
        assert!((4960..4990).contains(&firsts), "a hundredth is kept: {firsts}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn unequal_shares_are_closer_than_chance(weights in prop::collection::vec(0.1f64..10.0, 2..10)) {
            let total: f64 = weights.iter().sum();
            let shares = Fleet::weighing(&weights).shares(&BalancePolicy::RoundRobin, 2000, 0);
            for (share, weight) in shares.iter().zip(&weights) {
                prop_assert!((share - weight / total).abs() < 0.005, "{shares:?} for {weights:?}");
            }
        }
    }
}
