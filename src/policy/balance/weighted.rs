//! At random in proportion to weight, whatever the load: one pass, see [`Lot`].

use super::tie::Lot;
use super::{Candidates, Front};

pub(super) fn pick(candidates: &impl Candidates, rng: &mut fastrand::Rng) -> Option<usize> {
    let mut lot = Lot::default();
    for i in Front::of(candidates).iter() {
        lot.offer(i, candidates.weight(i), rng);
    }
    lot.kept()
}

#[cfg(test)]
mod tests {
    use super::super::BalancePolicy;
    use super::super::testing::Fleet;
    use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn shares_follow_any_weights(
            weights in prop::collection::vec(0.1f64..10.0, 1..12),
            seed in any::<u64>(),
        ) {
            let total: f64 = weights.iter().sum();
            let shares = Fleet::weighing(&weights).shares(&BalancePolicy::Weighted, 10_000, seed);
            for (share, weight) in shares.iter().zip(&weights) {
                // Five standard deviations of 10 000 draws.
                prop_assert!((share - weight / total).abs() < 0.025, "{shares:?} for {weights:?}");
            }
        }
    }
}
