//! The real proxy over a simulated network, on a clock that jumps: hundreds of worlds, each from a seed.
//!
//! A seed is a scenario (a partition, half-open connections, a restart storm …), links, replicas with an engine's
//! dialect, and requests; `plan` makes it all before anything happens. `world` runs it: evergate's own worker, probers
//! and judges as `app` wires them, the simulated replicas of `sim`, and clients (`client`) that check every byte.
//! `rules` are the promises, as numbers of virtual time. The network is `net::simulated`; why it is our own is said in
//! docs/adr/0018-simulated-network.md.
//!
//! Not here: sockets of the kernel, TLS, names, admin, reload, several workers (`tests/main.rs`).
//!
//! ```text
//! cargo test --lib simnet                                           the usual number of seeds
//! EVERGATE_SEEDS=5000 cargo test --lib simnet::seeds                more, and how late things were
//! EVERGATE_SEED=17 cargo test --lib simnet::replay -- --nocapture   one, with everything that happened
//! ```

mod client;
mod plan;
mod rules;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use plan::{Plan, Scenario};

/// Seeds of an ordinary run: thirty of each scenario.
const SEEDS: u64 = 330;

/// The latest of each scenario and measure, and its seed.
type Latest = BTreeMap<(Scenario, &'static str), (Duration, u64)>;

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Lives through one seed; the rules it breaks.
fn broken(seed: u64, latest: &Mutex<Latest>) -> Vec<String> {
    let plan = Plan::new(seed);
    let Ok(told) = catch_unwind(AssertUnwindSafe(|| world::live(&plan))) else {
        return vec!["a panic (see above)".to_owned()];
    };
    for exchange in &told.exchanges {
        for (what, late) in rules::lateness(&plan, exchange) {
            let mut latest = latest.lock();
            let entry = latest.entry((plan.scenario, what)).or_insert((late, seed));
            *entry = (*entry).max((late, seed));
        }
    }
    rules::broken(&plan, &told)
}

#[test]
fn seeds() {
    let seeds = from_env("EVERGATE_SEEDS").unwrap_or(SEEDS);
    let (next, latest, found) = (AtomicU64::new(0), Mutex::default(), Mutex::<Vec<_>>::default());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let broken = broken(seed, &latest);
                    if !broken.is_empty() {
                        found.lock().push((seed, broken));
                    }
                }
            });
        }
    });
    for ((scenario, what), (late, seed)) in latest.into_inner() {
        println!("{scenario:?}: {what} {late:?} at most (seed {seed})");
    }
    let found = found.into_inner();
    let told: Vec<_> = found
        .iter()
        .map(|(seed, broken)| format!("seed {seed} ({:?})\n  {}", Scenario::of(*seed), broken.join("\n  ")))
        .collect();
    assert!(
        found.is_empty(),
        "{} of {seeds} seeds break a rule\n{}\nreplay one with\n  \
         EVERGATE_SEED={} cargo test --lib simnet::replay -- --nocapture",
        found.len(),
        told.join("\n"),
        found[0].0
    );
}

/// A seed is one history, always the same; with `EVERGATE_SEED` it is told.
#[test]
fn replay() {
    let seed = from_env("EVERGATE_SEED");
    let plan = Plan::new(seed.unwrap_or(1));
    let [first, second] = [0, 1].map(|_| world::live(&plan));
    if seed.is_some() {
        println!("{}", first.trace);
    }
    assert!(first.trace.lines().count() > 2 * plan.asks.len());
    assert_eq!(first.trace, second.trace, "the same seed, two histories");
    assert_eq!(rules::broken(&plan, &first), Vec::<String>::new());
}
