//! The least loaded of all; ties as in `tie`.
//!
//! The comparison with a margin is not transitive, so it is made against the minimum, not pair by pair: first
//! the lowest load, then the lowest first-token time among those near it, then a lot among those near both.

use super::tie::{Lot, clearly_lower, clearly_sooner};
use super::{Candidates, Front};

pub(super) fn pick(candidates: &impl Candidates, rng: &mut fastrand::Rng) -> Option<usize> {
    let front = Front::of(candidates);
    let mut lowest: Option<(f64, usize)> = None;
    for i in front.iter() {
        let load = candidates.load(i);
        if lowest.is_none_or(|(than, _)| load.total_cmp(&than).is_lt()) {
            lowest = Some((load, i));
        }
    }
    let (lowest, fallback) = lowest?;
    let near = |i: &usize| !clearly_lower(lowest, candidates.load(*i));
    let soonest =
        front.iter().filter(near).filter_map(|i| candidates.first_token(i)).fold(f64::INFINITY, f64::min);
    let mut lot = Lot::default();
    for i in front.iter().filter(near) {
        if candidates.first_token(i).is_none_or(|first| !clearly_sooner(soonest, first)) {
            lot.offer(i, candidates.weight(i), rng);
        }
    }
    Some(lot.kept().unwrap_or(fallback))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fleet;
    use super::pick;
    use proptest::prelude::{any, prop, prop_assert, proptest};

    proptest! {
        #[test]
        fn nobody_clearly_less_loaded_is_passed_over(
            loads in prop::collection::vec(0.0f64..50.0, 1..20),
            seed in any::<u64>(),
        ) {
            let mut fleet = Fleet::of(loads.len() as u64);
            for (backend, &load) in fleet.0.iter_mut().zip(&loads) {
                backend.load = load;
            }
            let picked = pick(&fleet, &mut fastrand::Rng::with_seed(seed)).expect("all are admissible");
            let lowest = loads.iter().copied().fold(f64::INFINITY, f64::min);
            prop_assert!(loads[picked] * 0.9 <= lowest + 1e-9, "{} picked, {lowest} there", loads[picked]);
        }
    }

    #[test]
    fn the_fastest_of_equals_wins_and_the_unknown_get_their_chance() {
        let mut fleet = Fleet::of(3);
        fleet.0[0].first_token = Some(2.0);
        fleet.0[1].first_token = Some(0.5);
        let mut rng = fastrand::Rng::with_seed(9);
        let mut counts = [0; 3];
        for _ in 0..300 {
            counts[pick(&fleet, &mut rng).expect("all are admissible")] += 1;
        }
        assert_eq!(counts[0], 0);
        assert!(counts[1] > 100 && counts[2] > 100, "{counts:?}");
    }
}
