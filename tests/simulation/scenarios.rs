//! Rows of the fault catalogue whose promise is a number: a pool, one ailment, many seeds, and how much got through.

use crate::plan::{Member, Plan};
use crate::replica::{Ailment, Clocks, Request, Span};
use crate::world::live_plan;
use evergate::policy::Moment;
use evergate::policy::admission::{Priority, QueuePolicy};
use evergate::policy::balance::BalancePolicy;
use evergate::policy::health::HealthPolicy;
use evergate::policy::outlier::OutlierPolicy;
use evergate::policy::progress::ProgressPolicy;
use evergate::policy::retry::RetryPolicy;
use std::collections::BTreeMap;
use std::time::Duration;

/// Seeds of one scenario.
const SEEDS: u64 = 20;

const MINUTE: Duration = Duration::from_secs(60);

/// `per_second` requests a second for a minute, at defaults.
fn plan(ailments: &[Option<Ailment>], per_second: u32) -> Plan {
    let members = ailments.iter().map(|ailment| Member {
        weight: 1.0,
        tier: 0,
        in_flight_max: None,
        joins: Moment::ZERO,
        ailments: ailment
            .map(|ailment| (Span { from: Moment::ZERO, until: Moment::ZERO + MINUTE }, ailment))
            .into_iter()
            .collect(),
        lies: Vec::new(),
        operator: Vec::new(),
    });
    let request = Request {
        replayable: true,
        streams: true,
        first_token: Duration::from_millis(100),
        tokens: 50,
        priority: Priority::Normal,
        always: None,
        patience: None,
    };
    let arrivals =
        (0..60 * per_second).map(|n| (Moment::ZERO + Duration::from_secs(1) * n / per_second, request));
    let clocks =
        Clocks { connect: Duration::from_secs(2), first_token: Duration::from_secs(10), stream: MINUTE };
    Plan {
        policies: crate::plan::Policies {
            health: HealthPolicy::default(),
            retry: RetryPolicy::default(),
            balance: BalancePolicy::default(),
            outlier: OutlierPolicy::default(),
            progress: ProgressPolicy::default(),
            queue: QueuePolicy::default(),
            clocks,
        },
        members: members.collect(),
        arrivals: arrivals.collect(),
        well_from: Moment::ZERO + MINUTE,
        // Nobody has to be back: these are about the time before.
        eligible_by: None,
        end: Moment::ZERO + MINUTE,
    }
}

/// What all seeds of a plan came to.
fn sum(plan: &Plan) -> impl Fn(&str) -> f64 + use<> {
    let mut sum: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in 0..SEEDS {
        let rules = live_plan(plan.clone(), seed).rules;
        assert_eq!(rules.broken, None, "seed {seed}");
        rules.tally.into_iter().for_each(|(what, times)| *sum.entry(what).or_default() += times);
    }
    move |what| sum.get(what).copied().unwrap_or(0) as f64
}

#[test]
fn one_that_fails_at_once_is_no_black_hole() {
    let of = sum(&plan(&[Some(Ailment::FailsFast), None, None], 20));
    assert_eq!(of("answered"), of("exchange"), "each is answered by another");
    assert!(of("fault") < 0.02 * of("exchange"), "{} faults of {} exchanges", of("fault"), of("exchange"));
}

#[test]
fn who_fails_a_fifth_costs_attempts_and_no_answer() {
    // Streams that break after their first token are seen by the client; the other three ways are not.
    let of = sum(&plan(&[Some(Ailment::Flaky(0.2)), None, None], 20));
    assert_eq!(of("answered") + of("broken off"), of("exchange"));
    assert!(of("fault") < 0.03 * of("exchange"), "{} faults of {} exchanges", of("fault"), of("exchange"));
}

#[test]
fn a_slow_drip_loses_its_share_and_is_ejected() {
    let of = sum(&plan(&[Some(Ailment::Drips(10.0)), None, None], 5));
    assert_eq!(of("answered"), of("exchange"));
    assert!(of("slow") >= 0.5 * SEEDS as f64, "{} ejections in {SEEDS} minutes", of("slow"));
    let share = of("attempts at the first") / of("attempt");
    assert!(share < 0.1, "{share} of the attempts go to the slow one");
}

#[test]
fn when_all_are_slow_nobody_is_ejected() {
    let of = sum(&plan(&[Some(Ailment::Slow(10.0)); 3], 5));
    assert_eq!((of("ejected"), of("answered")), (0.0, of("exchange")));
}

#[test]
fn an_overload_makes_no_storm() {
    let of = sum(&plan(&[Some(Ailment::Overloaded(4)); 3], 40));
    let attempts = of("attempt") + of("attempt in panic") + of("attempt as a trial");
    assert_eq!(of("ejected"), 0.0, "busy is no fault");
    // A share of the requests, the floor, and what one burst holds.
    let most = 1.2 * of("exchange") + SEEDS as f64 * (10.0 * 70.0 + 40.0);
    assert!(attempts <= most, "{attempts} attempts for {} exchanges", of("exchange"));
    // Four at a time on each of three, each for 2.2 s.
    let capacity = SEEDS as f64 * 60.0 * 12.0 / 2.2;
    assert!(of("answered") > 0.9 * capacity, "{} of {capacity}", of("answered"));
}

#[test]
fn when_all_are_down_each_suspect_is_asked_now_and_then() {
    let of = sum(&plan(&[Some(Ailment::Crashed); 3], 5));
    // Only who waits when they return, which is two seconds' worth, and the one who comes then.
    let most = SEEDS as f64 * (2.0 * 5.0 + 1.0);
    assert!(of("answered") > 0.0 && of("answered") <= most, "{} answered", of("answered"));
    assert!(of("attempt in panic") > 0.0, "somebody looks whether one is back");
}

/// Three backends, of which those named fall silent so at twenty seconds.
fn silent_from_twenty(ailment: Ailment, which: &[usize], lasts: u64) -> Plan {
    let mut plan = plan(&[None; 3], 20);
    let from = Moment::ZERO + Duration::from_secs(20);
    for &i in which {
        plan.members[i].ailments = vec![(Span { from, until: from + Duration::from_secs(lasts) }, ailment)];
    }
    plan
}

#[test]
fn one_that_falls_silent_is_found_in_seconds_whether_its_probes_pass_or_not() {
    // Where a probe finds nobody that is proof; else two late attempts must come together, and hedges carry some away.
    for (ailment, most) in [(Ailment::Frozen, 3_000), (Ailment::Hollow, 4_500)] {
        let plan = silent_from_twenty(ailment, &[1], 20);
        for seed in 0..SEEDS {
            let (which, at) = live_plan(plan.clone(), seed).rules.first_stuck.expect("it is found");
            let took = at.since(Moment::ZERO + Duration::from_secs(20));
            assert_eq!(which, 1, "{ailment:?}, seed {seed}");
            assert!(took <= Duration::from_millis(most), "{ailment:?}, seed {seed}: {took:?}");
        }
        // What it held before its first token moves; only streams that had begun are seen to break.
        let of = sum(&plan);
        assert_eq!(of("answered") + of("broken off"), of("exchange"), "{ailment:?}");
    }
}

#[test]
fn a_standstill_of_everybody_ejects_nobody() {
    let plan = silent_from_twenty(Ailment::Hollow, &[0, 1, 2], 8);
    let over = Moment::ZERO + Duration::from_secs(28);
    for seed in 0..SEEDS {
        let rules = live_plan(plan.clone(), seed).rules;
        assert_eq!(rules.broken, None, "seed {seed}");
        assert!(rules.tally.contains_key("suspected"), "all are asked");
        // Afterwards whoever still keeps what it had waiting may be found by those who move again.
        assert!(rules.first_stuck.is_none_or(|(_, at)| at > over), "seed {seed}: {:?}", rules.first_stuck);
    }
}

#[test]
fn hedges_are_few_however_slow_one_or_all_are() {
    // One is so slow that it is late with all it gets, until it is found out; then all are at once.
    let slow = Some(Ailment::Slow(40.0));
    for (ailments, hedged) in [([slow, None, None], true), ([slow; 3], false)] {
        let of = sum(&plan(&ailments, 20));
        assert_eq!(of("hedge") > 0.0, hedged, "what is slow everywhere is usual");
        assert!(of("hedge") <= 0.05 * of("exchange") + SEEDS as f64, "{} hedges", of("hedge"));
        let answered = of("answered") / of("exchange");
        assert!(answered > 0.99, "{answered} are answered");
    }
}

#[test]
fn an_overload_with_caps_is_served_in_full_and_the_lowest_priority_keeps_a_tenth() {
    let mut plan = plan(&[None; 3], 60);
    for member in &mut plan.members {
        member.in_flight_max = Some(2);
    }
    for (n, (_, request)) in plan.arrivals.iter_mut().enumerate() {
        request.priority = Priority::ALL[n % 3];
    }
    let of = sum(&plan);
    // Two at a time on each of three, each for 100 ms and fifty gaps of 20 ms.
    let capacity = SEEDS as f64 * 60.0 * 6.0 / 1.1;
    assert!(of("answered") > 0.95 * capacity, "{} of {capacity}", of("answered"));
    assert!(of("answered, low") > 0.1 * 0.95 * of("answered"), "{} low", of("answered, low"));
    assert!(of("answered, high") > 1.5 * of("answered, normal"), "{} high", of("answered, high"));
    assert_eq!((of("fault"), of("ejected")), (0.0, 0.0));
    for seed in 0..SEEDS {
        // Twice the slots are less than the least length.
        assert_eq!(live_plan(plan.clone(), seed).rules.longest_line, 16, "seed {seed}");
    }
}
