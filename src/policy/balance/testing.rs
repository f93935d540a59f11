//! A made-up fleet for the tests of this module: a vector is a pool.

use super::{BalancePolicy, Candidates, Request, pick, stable_hash};
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;

#[derive(Clone, Debug)]
pub(super) struct Backend {
    pub(super) tier: u8,
    pub(super) admissible: bool,
    pub(super) load: f64,
    pub(super) weight: f64,
    pub(super) first_token: Option<f64>,
    pub(super) identity: u64,
}

impl Backend {
    pub(super) fn named(name: u64) -> Self {
        let identity = stable_hash(&name.to_le_bytes());
        Self { tier: 0, admissible: true, load: 0.0, weight: 1.0, first_token: None, identity }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Fleet(pub(super) Vec<Backend>);

impl Fleet {
    pub(super) fn of(members: u64) -> Self {
        Self((0..members).map(Backend::named).collect())
    }

    pub(super) fn weighing(weights: &[f64]) -> Self {
        Self(weights.iter().zip(0..).map(|(&weight, n)| Backend { weight, ..Backend::named(n) }).collect())
    }

    /// Shares of `picks` picks, none of which leaves a load behind.
    pub(super) fn shares(&self, policy: &BalancePolicy, picks: u32, seed: u64) -> Vec<f64> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let cursor = AtomicUsize::new(0);
        let mut counts = vec![0u32; self.0.len()];
        for _ in 0..picks {
            let request = Request { affinity: Some(rng.u64(..)) };
            counts[pick(policy, self, &request, &cursor, &mut rng).expect("someone is admissible")] += 1;
        }
        counts.iter().map(|&count| f64::from(count) / f64::from(picks)).collect()
    }

    /// Shares when `in_flight` requests are unfinished at any time and finish in the order of their start.
    pub(super) fn shares_under_load(
        mut self,
        policy: &BalancePolicy,
        in_flight: usize,
        picks: u32,
        seed: u64,
    ) -> Vec<f64> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let cursor = AtomicUsize::new(0);
        let mut counts = vec![0u32; self.0.len()];
        let mut running = VecDeque::new();
        for _ in 0..picks {
            let request = Request { affinity: Some(rng.u64(..)) };
            let i = pick(policy, &self, &request, &cursor, &mut rng).expect("someone is admissible");
            counts[i] += 1;
            self.0[i].load += 1.0 / self.0[i].weight;
            running.push_back(i);
            if running.len() > in_flight {
                let done = running.pop_front().expect("some run");
                self.0[done].load -= 1.0 / self.0[done].weight;
            }
        }
        counts.iter().map(|&count| f64::from(count) / f64::from(picks)).collect()
    }
}

impl Candidates for Fleet {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn tier(&self, i: usize) -> u8 {
        self.0[i].tier
    }
    fn admissible(&self, i: usize) -> bool {
        self.0[i].admissible
    }
    fn load(&self, i: usize) -> f64 {
        self.0[i].load
    }
    fn weight(&self, i: usize) -> f64 {
        self.0[i].weight
    }
    fn first_token(&self, i: usize) -> Option<f64> {
        self.0[i].first_token
    }
    fn identity(&self, i: usize) -> u64 {
        self.0[i].identity
    }
}

/// A fleet that counts how many members were looked at.
pub(super) struct Watched {
    pub(super) fleet: Fleet,
    pub(super) looks: Cell<usize>,
}

impl Candidates for Watched {
    fn len(&self) -> usize {
        self.fleet.len()
    }
    fn tier(&self, i: usize) -> u8 {
        self.fleet.tier(i)
    }
    fn admissible(&self, i: usize) -> bool {
        self.looks.set(self.looks.get() + 1);
        self.fleet.admissible(i)
    }
    fn load(&self, i: usize) -> f64 {
        self.fleet.load(i)
    }
    fn weight(&self, i: usize) -> f64 {
        self.fleet.weight(i)
    }
    fn first_token(&self, i: usize) -> Option<f64> {
        self.fleet.first_token(i)
    }
    fn identity(&self, i: usize) -> u64 {
        self.fleet.identity(i)
    }
}
