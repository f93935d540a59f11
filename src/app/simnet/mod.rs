//! The real proxy over a simulated network, on a clock that jumps: hundreds of worlds, each from a seed.
mod client;
mod plan;
mod rules;
mod world;

use plan::{Plan, Scenario};
use std::time::Duration;
use std::collections::BTreeMap;

#[test]
fn look() {
    let from: u64 = std::env::var("FROM").map_or(0, |s| s.parse().unwrap());
    let n: u64 = std::env::var("N").map_or(11, |s| s.parse().unwrap());
    let step: u64 = std::env::var("STEP").map_or(1, |s| s.parse().unwrap());
    let mut stats: BTreeMap<Scenario, [Vec<(Duration,u64,usize)>; 3]> = BTreeMap::new();
    for seed in (from..from + n*step).step_by(step as usize) {
        let plan = Plan::new(seed);
        let told = world::live(&plan);
        if std::env::var("TRACE").is_ok() { println!("{}", told.trace); }
        for b in rules::broken(&plan, &told) { println!("seed {seed} {:?} known {} broken {}", plan.scenario, plan.known, b); }
        let s = stats.entry(plan.scenario).or_default();
        for (i, e) in told.exchanges.iter().enumerate() {
            let l = rules::lateness(&plan, e);
            s[0].push((l.first, seed, i));
            s[1].push((l.gap, seed, i));
            s[2].push((l.refused, seed, i));
        }
    }
    for (sc, s) in &mut stats {
        println!("{sc:?}");
        for (name, v) in ["first late", "gap", "refused after"].iter().zip(s) {
            v.sort(); v.reverse();
            println!("   {name:>14} {:?}", v.iter().take(5).collect::<Vec<_>>());
        }
    }
}
