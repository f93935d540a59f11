//! Which backend of a pool gets the next attempt.
//!
//! One algorithm a file, each a pure function over [`Candidates`]; [`pick`] chooses among them. What they
//! share: only the lowest tier that has an admissible backend is used, and near-equal loads are a tie
//! (`tie`). An admissibility may change while a pick runs (in-flight counters are atomics), so no algorithm
//! relies on two passes seeing the same thing. Not here: who is admissible and how load is counted (the
//! pool), and what to do when nobody is (the caller).

mod consistent_hash;
mod ewma;
mod least_load;
mod p2c;
mod round_robin;
#[cfg(test)]
mod testing;
mod tie;
mod weighted;

pub use consistent_hash::stable_hash;
pub use ewma::{Ewma, RecentFailures};

use std::sync::atomic::AtomicUsize;

/// How a pool chooses.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum BalancePolicy {
    /// The less loaded of two at random. The default: as good as looking at all of them within a constant,
    /// at a cost that does not grow with the pool, and two gateways with one view do not pick the same victim.
    #[default]
    PowerOfTwo,
    /// In turn, by weight, whatever the load. For requests that all cost the same.
    RoundRobin,
    /// The least loaded of all. For small pools with one gateway.
    LeastLoad,
    /// At random by weight, whatever the load.
    Weighted,
    /// The same key to the same backend while that one is not overloaded. For engines with a prefix cache.
    ConsistentHash {
        /// What makes two requests alike.
        key: AffinityKey,
        /// How far above the mean load a backend may be and still get its keys: 1 or more. Default
        /// [`BOUND`](Self::BOUND). Lower it when one backend's queue grows while others idle, raise
        /// it when cache hits are rare.
        bound: f64,
    },
}

impl BalancePolicy {
    /// Default of `bound`: the most loaded backend is at most a quarter above the mean.
    pub const BOUND: f64 = 1.25;

    /// The key a request has to be hashed by, if this policy looks at one.
    pub const fn affinity_key(&self) -> Option<&AffinityKey> {
        match self {
            Self::ConsistentHash { key, .. } => Some(key),
            Self::PowerOfTwo | Self::RoundRobin | Self::LeastLoad | Self::Weighted => None,
        }
    }

    /// For status pages and metric labels.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PowerOfTwo => "p2c",
            Self::RoundRobin => "round_robin",
            Self::LeastLoad => "least_load",
            Self::Weighted => "weighted",
            Self::ConsistentHash { .. } => "consistent_hash",
        }
    }

    /// What is wrong with the parameters, each line beginning with the field at fault.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        if let Self::ConsistentHash { key, bound } = self {
            if !(bound.is_finite() && *bound >= 1.0) {
                wrong.push("bound must be 1 or more".to_owned());
            }
            if matches!(key, AffinityKey::PromptPrefix { bytes: 0 }) {
                wrong.push("bytes must be at least 1".to_owned());
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

/// What makes two requests alike, for [`BalancePolicy::ConsistentHash`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AffinityKey {
    /// The value of this header: a session or a user.
    Header(http::HeaderName),
    /// The beginning of the prompt: requests that share it share the engine's prefix cache.
    PromptPrefix {
        /// How much of it. Default [`PROMPT_PREFIX_BYTES`](AffinityKey::PROMPT_PREFIX_BYTES).
        bytes: usize,
    },
}

impl AffinityKey {
    /// Default of `bytes`: about a thousand tokens, which reaches past most shared system prompts, and
    /// hashing it costs about a microsecond. Lower it when users of one system prompt should share a
    /// backend, raise it when one backend gets nearly everything.
    pub const PROMPT_PREFIX_BYTES: usize = 4096;
}

impl Default for AffinityKey {
    fn default() -> Self {
        Self::PromptPrefix { bytes: Self::PROMPT_PREFIX_BYTES }
    }
}

/// What the balancer may look at. Indices are 0..`len`; every method must be cheap.
pub trait Candidates {
    /// How many.
    fn len(&self) -> usize;
    /// Lower tiers are used first.
    fn tier(&self, i: usize) -> u8;
    /// Eligible now, not tried yet, under its cap.
    fn admissible(&self, i: usize) -> bool;
    /// Unfinished work: in-flight weighted by prompt size (an ordinary request counts about 1), already
    /// penalised for recent failures and divided by weight × share. Lower is better. Finite, 0 or more.
    fn load(&self, i: usize) -> f64;
    /// Configured weight × slow-start share, above 0.
    fn weight(&self, i: usize) -> f64;
    /// Expected first-token time of the request's class in seconds, if known.
    fn first_token(&self, i: usize) -> Option<f64>;
    /// Stable hash of the backend's identity ([`stable_hash`]); survives reordering and restarts.
    fn identity(&self, i: usize) -> u64;
    /// True when the caller knows that all share one tier: spares looking for the lowest.
    fn tiers_uniform(&self) -> bool {
        false
    }
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the balancer may know of the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Hash of the affinity key, when the policy wants one and the request has it. Without it
    /// a consistent hash falls back to the power of two.
    pub affinity: Option<u64>,
}

/// The index to use; none when nobody is admissible. `cursor` is the pool's shared rotation counter, used by
/// round robin alone.
pub fn pick(
    policy: &BalancePolicy,
    candidates: &impl Candidates,
    request: &Request,
    cursor: &AtomicUsize,
    rng: &mut fastrand::Rng,
) -> Option<usize> {
    match policy {
        BalancePolicy::PowerOfTwo => p2c::pick(candidates, rng),
        BalancePolicy::RoundRobin => round_robin::pick(candidates, cursor),
        BalancePolicy::LeastLoad => least_load::pick(candidates, rng),
        BalancePolicy::Weighted => weighted::pick(candidates, rng),
        BalancePolicy::ConsistentHash { bound, .. } => match request.affinity {
            Some(key) => consistent_hash::pick(candidates, key, *bound, rng),
            None => p2c::pick(candidates, rng),
        },
    }
}

/// The admissible backends of the lowest tier that has one.
struct Front<'a, C> {
    candidates: &'a C,
    tier: Option<u8>,
}

impl<'a, C: Candidates> Front<'a, C> {
    fn of(candidates: &'a C) -> Self {
        let tier = if candidates.tiers_uniform() {
            None
        } else {
            (0..candidates.len()).filter(|&i| candidates.admissible(i)).map(|i| candidates.tier(i)).min()
        };
        Self { candidates, tier }
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        (0..self.candidates.len()).filter(|&i| {
            self.tier.is_none_or(|tier| self.candidates.tier(i) == tier) && self.candidates.admissible(i)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Backend, Fleet};
    use super::{AffinityKey, BalancePolicy, Candidates, Request, pick};
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use std::sync::atomic::AtomicUsize;

    const ODD: [f64; 6] = [f64::NAN, f64::INFINITY, -1.0, 0.0, 1.0, f64::MAX];

    fn policies() -> [BalancePolicy; 5] {
        [
            BalancePolicy::PowerOfTwo,
            BalancePolicy::RoundRobin,
            BalancePolicy::LeastLoad,
            BalancePolicy::Weighted,
            BalancePolicy::ConsistentHash { key: AffinityKey::default(), bound: BalancePolicy::BOUND },
        ]
    }

    #[test]
    fn policies_have_names_of_their_own_and_one_wants_a_key() {
        assert_eq!(
            policies().map(|policy| policy.name()),
            ["p2c", "round_robin", "least_load", "weighted", "consistent_hash"]
        );
        let keyed = policies().map(|policy| policy.affinity_key().is_some());
        assert_eq!(keyed, [false, false, false, false, true]);
    }

    #[test]
    fn only_tier_zero_is_seen_while_it_can_take_work_and_an_empty_pool_picks_nobody() {
        assert!(Fleet::of(0).is_empty() && !Fleet::of(1).is_empty());
        assert!(!Fleet::of(2).tiers_uniform());
        for policy in policies() {
            let picked = |fleet: &Fleet| {
                let mut rng = fastrand::Rng::with_seed(3);
                let request = Request { affinity: Some(5) };
                pick(&policy, fleet, &request, &AtomicUsize::new(0), &mut rng)
            };
            assert_eq!(picked(&Fleet::of(0)), None);
            let mut fleet = Fleet::of(5);
            (1..5).for_each(|i| fleet.0[i].tier = 1);
            fleet.0[0].load = 100.0;
            assert_eq!(picked(&fleet), Some(0), "{}: whatever its load", policy.name());
            fleet.0[0].admissible = false;
            assert!(picked(&fleet).is_some_and(|i| i > 0));
        }
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        assert_eq!(policies().map(|policy| policy.validate()), [const { Ok(()) }; 5]);
        let key = AffinityKey::PromptPrefix { bytes: 0 };
        for bound in [0.99, f64::NAN, f64::INFINITY] {
            let policy = BalancePolicy::ConsistentHash { key: key.clone(), bound };
            assert_eq!(policy.validate().map_err(|wrong| wrong.len()), Err(2));
        }
    }

    proptest! {
        #[test]
        fn only_admissible_backends_of_the_lowest_tier_are_picked(
            members in prop::collection::vec(
                (0u8..3, any::<bool>(), 0.0f64..20.0, 0.05f64..4.0, prop::option::of(0.01f64..9.0)),
                0..24,
            ),
            affinity in prop::option::of(any::<u64>()),
            start in any::<usize>(),
            seed in any::<u64>(),
        ) {
            let backends = members.iter().zip(0..).map(|(&(tier, admissible, load, weight, first_token), n)| {
                Backend { tier, admissible, load, weight, first_token, ..Backend::named(n) }
            });
            let fleet = Fleet(backends.collect());
            let lowest = fleet.0.iter().filter(|b| b.admissible).map(|b| b.tier).min();
            let cursor = AtomicUsize::new(start);
            let mut rng = fastrand::Rng::with_seed(seed);
            for policy in policies() {
                for _ in 0..8 {
                    let picked = pick(&policy, &fleet, &Request { affinity }, &cursor, &mut rng);
                    prop_assert_eq!(picked.is_some(), lowest.is_some(), "{} of {:?}", policy.name(), fleet);
                    if let Some(i) = picked {
                        prop_assert!(fleet.0[i].admissible, "{} picked {i} of {fleet:?}", policy.name());
                        prop_assert_eq!(Some(fleet.0[i].tier), lowest);
                    }
                }
            }
        }

        #[test]
        fn odd_numbers_from_the_pool_never_panic_nor_hide_a_backend(
            loads in prop::collection::vec(prop::sample::select(ODD.to_vec()), 1..6),
            weight in prop::sample::select(ODD.to_vec()),
            key in any::<u64>(),
        ) {
            let fleet = Fleet(loads.iter().enumerate().map(|(n, &load)| Backend {
                load, weight, first_token: Some(load), ..Backend::named(n as u64)
            }).collect());
            let mut rng = fastrand::Rng::with_seed(key);
            for policy in policies() {
                let request = Request { affinity: Some(key) };
                let picked = pick(&policy, &fleet, &request, &AtomicUsize::new(0), &mut rng);
                prop_assert!(picked.is_some(), "{}", policy.name());
            }
        }
    }

    #[test]
    fn weights_are_kept_on_an_idle_pool() {
        let fleet = Fleet(
            [1.0, 2.0, 5.0]
                .iter()
                .enumerate()
                .map(|(n, &weight)| Backend { weight, ..Backend::named(n as u64) })
                .collect(),
        );
        for policy in [BalancePolicy::RoundRobin, BalancePolicy::LeastLoad, BalancePolicy::Weighted] {
            let shares = fleet.shares(&policy, 40_000, 7);
            for (share, expected) in shares.iter().zip([0.125, 0.25, 0.625]) {
                assert!((share - expected).abs() < 0.01, "{}: {shares:?}", policy.name());
            }
        }
    }

    #[test]
    fn weights_are_kept_under_load_by_what_looks_at_load() {
        for policy in [BalancePolicy::PowerOfTwo, BalancePolicy::LeastLoad] {
            let shares = Fleet::weighing(&[1.0, 2.0, 5.0]).shares_under_load(&policy, 400, 60_000, 3);
            for (share, expected) in shares.iter().zip([0.125, 0.25, 0.625]) {
                assert!((share - expected).abs() < 0.03, "{}: {shares:?}", policy.name());
            }
        }
    }
}
