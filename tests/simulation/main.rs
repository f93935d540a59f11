//! Thousands of histories of the pure policies, each from a seed: model backends that fall ill of what the fault
//! catalogue knows, a model of the attempt loop, a virtual clock, and the real `balance::pick`, `Health`, `decide`,
//! `Budget`, `Burst`, `backoff`, `outlier`, `progress`, `hedge` and
//! `admission`.
//!
//! `plan` makes everything that will happen from a seed; `replica` is a backend as it really is; `gateway` what is
//! known of it, with the rules of `src/pool`, `silence` what is made of its silence and
//! `crowd` of those who wait; `world` lets it happen, with the steps of `src/proxy/exchange.rs`; `rules`
//! are what must hold at every step and at the end. A new policy is asked in `gateway` or `world`, where `src/pool` or
//! `src/proxy` ask it, and its promise becomes a rule.
//!
//! Not here: sockets, connections, waking of tasks, the real clock (`tests/main.rs`).
//!
//! ```text
//! cargo test --test simulation                                            the usual number of seeds
//! EVERGATE_SEEDS=100000 cargo test --test simulation seeds                more
//! EVERGATE_SEED=17 cargo test --test simulation replay -- --nocapture     one, with every decision
//! ```

mod crowd;
mod gateway;
mod plan;
mod replica;
mod rules;
mod scenarios;
mod silence;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds of an ordinary run.
const SEEDS: u64 = 10_000;

/// What a run must have met for its silence to mean something.
const MUST_BE_MET: &[&str] = &[
    // What ails replicas, and what probes say.
    "blackhole",
    "breaks_streams",
    "busy",
    "busy_stated",
    "closes",
    "crashed",
    "drips",
    "fails",
    "fails_fast",
    "flaky",
    "garbage",
    "frozen",
    "hangs",
    "hollow",
    "overloaded",
    "refuses_streams",
    "slow",
    "slowed",
    "stale",
    "wrong_credentials",
    "wrong_model",
    "probe fails",
    "probe passes",
    "probe passes weakly",
    "probe refused",
    // What becomes of attempts.
    "attempt",
    "attempt as a trial",
    "attempt in panic",
    "success",
    "fault",
    "neutral",
    "misconfigured",
    "relay",
    "request fault",
    "failover",
    "again",
    "attempts_exhausted",
    "retry_budget_empty",
    "not_replayable",
    "retry from the budget",
    "retry from the burst",
    "waits",
    // What is made of silence.
    "late",
    "hedge",
    "hedge won",
    "hedge lost",
    "hedge refused",
    "suspected",
    "verify answered",
    "verify unanswered",
    "outrun",
    "ejected as stuck",
    "rescued work is spared",
    // What becomes of exchanges.
    "answered",
    "broken off",
    "client left",
    "gave up",
    "relayed as it is",
    "nobody: all tried",
    "nobody: busy",
    "nobody: down",
    "nobody: full",
    "nobody: queue full",
    // What becomes of those who wait.
    "queued",
    "let in",
    "let in by the pace",
    "turn while all priorities wait",
    "cap learned",
    // What becomes of backends.
    "ejected",
    "consecutive_faults",
    "success_rate",
    "kept",
    "last_eligible",
    "half_ejected",
    "awaits_probe",
    "probation",
    "trial_failed",
    "readmitted",
    "slow_start_over",
    "probes_passed",
    "probes_failed",
    "probes_outvoted",
    "proven_by_traffic",
    "refusing",
    "refusal_over",
    "enabled",
    "draining",
    "disabled",
];

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Lives through one seed; the breach, if there is one, and what was met.
fn breach(seed: u64) -> Result<BTreeMap<&'static str, u64>, String> {
    match catch_unwind(AssertUnwindSafe(|| world::live(seed, false))) {
        Ok(outcome) => outcome.rules.broken.map_or(Ok(outcome.rules.tally), Err),
        Err(_) => Err("a policy panicked (see above)".to_owned()),
    }
}

#[test]
fn seeds() {
    let seeds = from_env("EVERGATE_SEEDS").unwrap_or(SEEDS);
    let (next, tally, first) =
        (AtomicU64::new(0), Mutex::new(BTreeMap::new()), Mutex::new(None::<(u64, String)>));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while first.lock().expect("no panic").is_none() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    match breach(seed) {
                        Ok(met) => {
                            let mut tally = tally.lock().expect("no panic");
                            met.into_iter()
                                .for_each(|(what, times)| *tally.entry(what).or_insert(0) += times);
                        }
                        Err(broken) => drop(first.lock().expect("no panic").get_or_insert((seed, broken))),
                    }
                }
            });
        }
    });
    if let Some((seed, broken)) = first.into_inner().expect("no panic") {
        panic!(
            "seed {seed} breaks a rule\n  {broken}\nreplay it with\n  \
             EVERGATE_SEED={seed} cargo test --test simulation replay -- --nocapture"
        );
    }
    let tally = tally.into_inner().expect("no panic");
    for (what, times) in &tally {
        println!("{times:>10}  {what}");
    }
    let missed: Vec<&&str> = MUST_BE_MET.iter().filter(|what| !tally.contains_key(**what)).collect();
    assert!(missed.is_empty() || seeds < SEEDS, "never met: {missed:?}");
}

/// A seed is one history, always the same; with `EVERGATE_SEED` it is told.
#[test]
fn replay() {
    let seed = from_env("EVERGATE_SEED");
    let [first, second] = [0, 1].map(|_| world::live(seed.unwrap_or(1), true));
    if seed.is_some() {
        println!("{}", first.trace);
    }
    assert!(!first.trace.is_empty());
    assert_eq!(first.trace, second.trace, "the same seed, two histories");
    assert_eq!(first.rules.broken, None);
}
