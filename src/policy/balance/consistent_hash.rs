//! The same key to the same backend, unless that one is overloaded.
//!
//! Order of preference: highest random weight (Thaler & Ravishankar, "Using name-based mappings to increase
//! hit rates", 1998), with weights by the logarithm method (Schindelhauer & Schomaker, "Weighted
//! distributed hash tables", 2005): score = −w / ln u. Who leaves or joins moves only its own keys, there
//! is no ring to build, and reordering the pool moves nothing. Bounded loads (Mirrokni, Thorup &
//! Zadimoghaddam, "Consistent hashing with bounded loads", 2018): the first in that order whose load is at
//! most `bound` × mean, the new request counted in; one always is. So a popular prefix spills to the next
//! backend instead of pinning the pool on the first warm one.

use super::{Candidates, Front, least_load};

/// A load up to which a backend is never called overloaded: one ordinary request. The paper's capacity is
/// rounded up to a whole request for the same reason: on a nearly idle pool the mean is below one, and
/// every busy backend would be above it.
const LOAD_IGNORED: f64 = 1.0;

pub(super) fn pick(
    candidates: &impl Candidates,
    key: u64,
    bound: f64,
    rng: &mut fastrand::Rng,
) -> Option<usize> {
    let front = Front::of(candidates);
    let (mut total, mut count) = (0.0, 0u32);
    for i in front.iter() {
        total += candidates.load(i);
        count += 1;
    }
    if count == 0 {
        return None;
    }
    let capacity = (bound.max(1.0) * (total + 1.0) / f64::from(count)).max(LOAD_IGNORED);
    let mut best: Option<(f64, usize)> = None;
    for i in front.iter().filter(|&i| candidates.load(i) <= capacity) {
        let score = score(key, candidates.identity(i), candidates.weight(i));
        if best.is_none_or(|(than, _)| score.total_cmp(&than).is_gt()) {
            best = Some((score, i));
        }
    }
    // Nobody is within bounds only while the loads change under our eyes.
    best.map(|(_, i)| i).or_else(|| least_load::pick(candidates, rng))
}

/// −w / ln u with u uniform in (0, 1) by (key, identity).
fn score(key: u64, identity: u64, weight: f64) -> f64 {
    let bits = mix(key ^ mix(identity)) >> 11;
    let uniform = (bits as f64 + 0.5) / (1u64 << 53) as f64;
    -weight / uniform.ln()
}

/// Finaliser of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014).
const fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Hash for affinity keys and identities: the same on every machine, in every version and after every
/// restart, so that several gateways agree. Eight bytes a step (4 KiB in about a microsecond). Not for
/// hostile keys in hash tables.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let mut hash = mix(bytes.len() as u64);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        hash = fold(hash ^ u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    mix(fold(hash ^ u64::from_le_bytes(last)))
}

/// Both halves of a 128-bit product, one onto the other: mixes as well as several shifts, in one
/// multiplication.
const fn fold(x: u64) -> u64 {
    let product = (x ^ 0xA076_1D64_78BD_642F) as u128 * 0xE703_7ED1_A0B4_28DB;
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Backend, Fleet};
    use super::super::{AffinityKey, BalancePolicy};
    use super::{pick, stable_hash};
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use std::collections::HashSet;

    fn choose(fleet: &Fleet, key: u64) -> u64 {
        let i = pick(fleet, key, 1.25, &mut fastrand::Rng::with_seed(0)).expect("someone is admissible");
        fleet.0[i].identity
    }

    #[test]
    fn the_bound_is_a_share_of_the_mean_with_the_new_request_counted_in() {
        for key in 0..50 {
            let mut fleet = Fleet::of(3);
            let preferred = choose(&fleet, key);
            // A quarter above a mean of (30 + 1) / 3 is 12.917.
            for (load, stays) in [(10.0, true), (12.7, true), (12.91, true), (12.92, false), (20.0, false)] {
                for backend in &mut fleet.0 {
                    backend.load = if backend.identity == preferred { load } else { (30.0 - load) / 2.0 };
                }
                assert_eq!(choose(&fleet, key) == preferred, stays, "{load}");
            }
        }
    }

    #[test]
    fn no_key_is_alike_for_all_backends() {
        for key in [0, 1, 1 << 63, u64::MAX] {
            let fleet = Fleet::of(20);
            let mut reversed = fleet.clone();
            reversed.0.reverse();
            assert_eq!(choose(&fleet, key), choose(&reversed, key), "{key:x}: a tie");
        }
    }

    proptest! {
        #[test]
        fn a_departure_moves_only_its_own_keys(
            len in 2u64..20,
            gone in any::<u64>(),
            keys in prop::collection::vec(any::<u64>(), 50),
        ) {
            let before = Fleet::of(len);
            let mut after = before.clone();
            let gone = after.0.remove((gone % len) as usize).identity;
            for key in keys {
                let (was, is) = (choose(&before, key), choose(&after, key));
                prop_assert!(was == gone || was == is);
            }
        }

        #[test]
        fn an_arrival_takes_keys_only_for_itself(
            len in 1u64..20,
            keys in prop::collection::vec(any::<u64>(), 50),
        ) {
            let before = Fleet::of(len);
            let mut after = before.clone();
            after.0.push(Backend::named(len));
            let newcomer = after.0[len as usize].identity;
            for key in keys {
                let (was, is) = (choose(&before, key), choose(&after, key));
                prop_assert!(is == newcomer || was == is);
            }
        }

        #[test]
        fn order_of_the_pool_does_not_matter(len in 1u64..20, key in any::<u64>()) {
            let fleet = Fleet::of(len);
            let mut reversed = fleet.clone();
            reversed.0.reverse();
            prop_assert_eq!(choose(&fleet, key), choose(&reversed, key));
        }

        #[test]
        fn nobody_above_the_bound_is_given_more(
            loads in prop::collection::vec(0.0f64..30.0, 1..20),
            key in any::<u64>(),
            bound in 1.0f64..3.0,
        ) {
            let mut fleet = Fleet::of(loads.len() as u64);
            for (backend, &load) in fleet.0.iter_mut().zip(&loads) {
                backend.load = load;
            }
            let i = pick(&fleet, key, bound, &mut fastrand::Rng::with_seed(0)).expect("all are admissible");
            let mean = (loads.iter().sum::<f64>() + 1.0) / loads.len() as f64;
            prop_assert!(loads[i] <= (bound * mean).max(1.0));
        }

        #[test]
        fn one_popular_key_does_not_pin_the_pool(len in 2u64..20, key in any::<u64>()) {
            let mut fleet = Fleet::of(len);
            let mut rng = fastrand::Rng::with_seed(key);
            for _ in 0..len * 10 {
                let i = pick(&fleet, key, 1.25, &mut rng).expect("all are admissible");
                fleet.0[i].load += 1.0;
            }
            let highest = fleet.0.iter().map(|b| b.load).fold(0.0, f64::max);
            prop_assert!(highest <= 1.25 * (10.0 + 1.0 / len as f64) + 1.0, "{highest}");
        }
    }

    #[test]
    fn one_key_stays_at_one_backend_while_the_pool_is_calm() {
        let mut fleet = Fleet::of(10);
        let chosen: HashSet<u64> = (0..100).map(|_| choose(&fleet, 42)).collect();
        assert_eq!(chosen.len(), 1);
        let owner = fleet.0.iter().position(|b| chosen.contains(&b.identity)).expect("one of them");
        fleet.0[owner].load = 1.0;
        assert!(chosen.contains(&choose(&fleet, 42)), "one request in flight is no overload");
        fleet.0[owner].load = 2.0;
        assert!(!chosen.contains(&choose(&fleet, 42)), "two are, where nine others idle");
    }

    #[test]
    fn keys_spread_by_weight() {
        let policy =
            BalancePolicy::ConsistentHash { key: AffinityKey::default(), bound: BalancePolicy::BOUND };
        let shares = Fleet::weighing(&[1.0, 1.0, 2.0, 4.0]).shares(&policy, 40_000, 4);
        for (share, expected) in shares.iter().zip([0.125, 0.125, 0.25, 0.5]) {
            assert!((share - expected).abs() < 0.01, "{shares:?}");
        }
    }

    #[test]
    fn the_hash_is_fixed_for_ever_and_sees_every_byte() {
        let prompt = [b'x'; 100];
        let mut seen = HashSet::from([stable_hash(&prompt)]);
        for at in 0..prompt.len() {
            let mut other = prompt;
            other[at] ^= 1;
            assert!(seen.insert(stable_hash(&other)), "byte {at}");
            assert!(seen.insert(stable_hash(&prompt[..at])), "length {at}");
        }
        assert_eq!(stable_hash(b"evergate: ten backends"), 0x4AD8_B28C_BACD_7A2D);
    }
}
