//! From a seed to everything that will happen to a pool from outside: its parameters, who asks what and when, which
//! replica falls ill of what. Nothing here knows what the policies will make of it.
//!
//! A plan has two parts: a time of trouble, and after [`Plan::well_from`] a time in which everything is sound, long
//! enough that whatever was wrong must be forgotten at its end.

use crate::replica::{Ailment, Clocks, Request, Span};
use evergate::policy::Moment;
use evergate::policy::admission::{LengthMax, Priority, QueuePolicy};
use evergate::policy::balance::{AffinityKey, BalancePolicy};
use evergate::policy::health::{Administrative, HealthPolicy, ProbeVerdict};
use evergate::policy::outlier::OutlierPolicy;
use evergate::policy::progress::ProgressPolicy;
use evergate::policy::retry::{Replay, RetryPolicy};
use std::num::NonZeroU32;
use std::time::Duration;

/// Ordinary time between probes, and while something may change.
pub(crate) const PROBE_EVERY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));
/// Share by which chance stretches or shortens it.
pub(crate) const PROBE_JITTER: f64 = 0.2;
/// Between two arrivals after the trouble.
const CALM_GAP: Duration = Duration::from_millis(1500);

/// All parameters of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Policies {
    pub(crate) health: HealthPolicy,
    pub(crate) retry: RetryPolicy,
    pub(crate) balance: BalancePolicy,
    pub(crate) outlier: OutlierPolicy,
    pub(crate) progress: ProgressPolicy,
    pub(crate) queue: QueuePolicy,
    pub(crate) clocks: Clocks,
}

/// What is configured of one backend, and what will befall it.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) weight: f64,
    pub(crate) tier: u8,
    /// Most attempts at a time.
    pub(crate) in_flight_max: Option<u32>,
    /// It joins the pool at this moment; at zero it is a founder.
    pub(crate) joins: Moment,
    pub(crate) ailments: Vec<(Span, Ailment)>,
    pub(crate) lies: Vec<(Span, ProbeVerdict)>,
    pub(crate) operator: Vec<(Moment, Administrative)>,
}

/// Everything that will happen.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) policies: Policies,
    pub(crate) members: Vec<Member>,
    pub(crate) arrivals: Vec<(Moment, Request)>,
    /// From here on nobody ails, lies or is drained.
    pub(crate) well_from: Moment,
    /// By then every backend must be eligible again; none where the plan ends with the trouble.
    pub(crate) eligible_by: Option<Moment>,
    /// No arrival after this.
    pub(crate) end: Moment,
}

impl Plan {
    /// The plan of a seed.
    pub(crate) fn of(seed: u64) -> Self {
        let rng = &mut fastrand::Rng::with_seed(seed);
        let policies = policies(rng);
        let trouble = secs(3.0 + rng.f64() * 22.0);
        let well_from = Moment::ZERO + trouble;
        let count = *pick(rng, &[1, 2, 2, 2, 3, 3, 3, 4, 5, 6]);
        let members: Vec<Member> = (0..count).map(|i| member(i, count, trouble, rng)).collect();
        // What began in the trouble may fail for as long after it as its clocks last; then the longest removal, then
        // probes, then one arrival for each that waits for a trial.
        let health = &policies.health;
        let stragglers = policies.clocks.first_token + policies.clocks.stream;
        let removal = health.ejection_max.max(health.misconfigured_ejection).max(health.retry_after_max);
        let probes = PROBE_EVERY.0.mul_f64(1.0 + PROBE_JITTER) * (health.rise + 1);
        let trials = (CALM_GAP * 2 + Duration::from_secs(1)) * count as u32;
        let eligible_by = well_from + stragglers + removal + probes + trials;
        let end = eligible_by + health.slow_start + Duration::from_secs(2);
        let mut arrivals = arrivals(trouble, rng);
        let mut at = well_from;
        while at < end {
            arrivals.push((at, calm_request(rng)));
            at = at + CALM_GAP;
        }
        arrivals.sort_by_key(|(at, _)| *at);
        Self { policies, members, arrivals, well_from, eligible_by: Some(eligible_by), end }
    }
}

fn policies(rng: &mut fastrand::Rng) -> Policies {
    let mut health = HealthPolicy::default();
    if rng.u8(..4) > 0 {
        health.ejection_max = secs(f64::from(rng.u8(1..=12)));
        health.misconfigured_ejection = secs(f64::from(rng.u8(1..=10)));
        health.eject_consecutive = rng.u32(1..=4);
        health.outcomes_min = rng.u32(1..=8);
        (health.fall, health.rise) = (rng.u32(1..=3), rng.u32(1..=3));
        health.slow_start = secs(f64::from(rng.u8(..10)));
    }
    health.retry_after_max = secs(f64::from(rng.u8(4..=12)));
    health.probes = rng.u8(..8) > 0;
    let mut retry = RetryPolicy::default();
    if rng.bool() {
        retry.attempts_max = rng.u8(1..=4);
        retry.budget_ratio = rng.f64() * 0.5;
        retry.budget_floor = rng.f64() * 0.6;
        retry.wait_max = secs(rng.f64() * 3.0);
    }
    retry.replay = *pick(rng, &[Replay::Auto, Replay::Auto, Replay::Always]);
    let mut outlier = OutlierPolicy::default();
    if rng.bool() {
        outlier.persistent = secs(1.0 + rng.f64() * 5.0);
        outlier.eject_ratio_min = outlier.ratio_min + rng.f64();
    }
    let mut progress = ProgressPolicy::default();
    if rng.u8(..4) > 0 {
        progress.first_token_min = secs(0.3 + rng.f64() * 2.0);
        progress.first_token_unknown = progress.first_token_min + secs(rng.f64() * 3.0);
        progress.token_gap_min = secs(0.3 + rng.f64());
        progress.token_gap_unknown = progress.token_gap_min + secs(rng.f64() * 2.0);
        progress.hedge_ratio = *pick(rng, &[0.05, 0.05, 0.2, 1.0, 0.0]);
    }
    let mut queue = QueuePolicy::default();
    if rng.bool() {
        queue.wait_max = secs(rng.f64() * 5.0);
        queue.length_max = match rng.u8(..3) {
            0 => LengthMax::Most(NonZeroU32::MIN.saturating_add(rng.u32(..8))),
            _ => LengthMax::Auto,
        };
    }
    let balance = match rng.u8(..8) {
        0 => BalancePolicy::RoundRobin,
        1 | 2 => BalancePolicy::LeastLoad,
        3 => BalancePolicy::Weighted,
        4 => BalancePolicy::ConsistentHash { key: AffinityKey::default(), bound: BalancePolicy::BOUND },
        _ => BalancePolicy::PowerOfTwo,
    };
    let clocks = Clocks { connect: secs(2.0), first_token: secs(2.0 + rng.f64() * 6.0), stream: secs(12.0) };
    for (valid, of) in
        [(health.validate(), "health"), (balance.validate(), "balance"), (outlier.validate(), "outlier")]
    {
        assert_eq!(valid, Ok(()), "{of}");
    }
    assert_eq!(progress.validate(), Ok(()), "progress");
    Policies { health, retry, balance, outlier, progress, queue, clocks }
}

fn member(i: usize, count: usize, trouble: Duration, rng: &mut fastrand::Rng) -> Member {
    let mut member = Member {
        weight: *pick(rng, &[1.0, 1.0, 1.0, 2.0, 0.5]),
        tier: u8::from(count > 2 && rng.u8(..8) == 0),
        in_flight_max: (rng.u8(..5) == 0).then(|| rng.u32(1..=6)),
        joins: if i > 0 && rng.u8(..10) == 0 { within(trouble, rng) } else { Moment::ZERO },
        ailments: Vec::new(),
        lies: Vec::new(),
        operator: Vec::new(),
    };
    for _ in 0..*pick(rng, &[0, 0, 1, 1, 2, 3]) {
        let from = within(trouble, rng);
        let until = (from + secs(rng.f64() * 15.0)).min(Moment::ZERO + trouble);
        let span = Span { from, until };
        let ailment = ailment(rng);
        if ailment == Ailment::Crashed && rng.bool() {
            // A restart: refused, then loading, then cold.
            let third = until.since(from) / 3;
            let span = |n: u32| Span { from: from + third * n, until: from + third * (n + 1) };
            let loading = Ailment::Busy(rng.bool().then(|| secs(1.0)));
            member.ailments.extend([(span(0), ailment), (span(1), loading), (span(2), Ailment::Slow(6.0))]);
        } else {
            member.ailments.push((span, ailment));
        }
    }
    if rng.u8(..4) == 0 {
        let from = within(trouble, rng);
        let lie = [ProbeVerdict::Pass, ProbeVerdict::Fail, ProbeVerdict::Refusing, ProbeVerdict::WeakPass];
        let until = (from + secs(rng.f64() * 20.0)).min(Moment::ZERO + trouble);
        member.lies.push((Span { from, until }, *pick(rng, &lie)));
    }
    if rng.u8(..10) == 0 {
        let state = if rng.bool() { Administrative::Draining } else { Administrative::Disabled };
        member.operator.push((within(trouble, rng), state));
        member.operator.push((Moment::ZERO + trouble, Administrative::Enabled));
    }
    member
}

fn ailment(rng: &mut fastrand::Rng) -> Ailment {
    match rng.u8(..22) {
        0 | 1 => Ailment::Crashed,
        2 => Ailment::Blackhole,
        3 => Ailment::Hangs,
        4 => Ailment::FailsFast,
        5 => Ailment::Fails,
        6 => Ailment::Closes,
        7 => Ailment::Stale,
        8 => Ailment::RefusesStreams,
        9 => Ailment::Busy(None),
        10 => Ailment::Busy(Some(secs(*pick(rng, &[0.0, 0.5, 2.0, 8.0, 1e6])))),
        11 => Ailment::Overloaded(rng.u32(..4)),
        12 => Ailment::Slow(2.0 + rng.f64() * 20.0),
        13 => Ailment::Drips(2.0 + rng.f64() * 20.0),
        14 => Ailment::Flaky(0.1 + rng.f64() * 0.5),
        15 => Ailment::BreaksStreams,
        16 => Ailment::Garbage,
        17 => Ailment::WrongCredentials,
        18 => Ailment::WrongModel,
        19 => Ailment::Frozen,
        _ => Ailment::Hollow,
    }
}

/// In one of several patterns, all with a bound on how many there are.
fn arrivals(trouble: Duration, rng: &mut fastrand::Rng) -> Vec<(Moment, Request)> {
    let count = rng.usize(5..=70);
    let pattern = rng.u8(..4);
    let (burst, steps) = (rng.usize(2..20), rng.u32(1..6));
    (0..count)
        .map(|n| {
            let share = match pattern {
                // Evenly, at random, in bursts, or in steps that overlap the beginning of an ailment.
                0 => n as f64 / count as f64,
                1 => rng.f64(),
                2 => (n / burst * burst) as f64 / count as f64,
                _ => f64::from(rng.u32(..steps)) / f64::from(steps) + 0.05 * rng.f64(),
            };
            (Moment::ZERO + trouble.mul_f64(share.min(1.0)), request(rng))
        })
        .collect()
}

fn request(rng: &mut fastrand::Rng) -> Request {
    Request {
        replayable: rng.u8(..10) > 0,
        streams: rng.u8(..3) > 0,
        first_token: secs(*pick(rng, &[0.05, 0.1, 0.2, 0.5, 1.0])),
        tokens: *pick(rng, &[1, 5, 20, 50, 100]),
        priority: *pick(rng, &Priority::ALL),
        always: match rng.u8(..30) {
            0 => Some(500),
            1 => Some(400),
            _ => None,
        },
        patience: (rng.u8(..12) == 0).then(|| secs(rng.f64() * 3.0)),
    }
}

fn calm_request(rng: &mut fastrand::Rng) -> Request {
    Request {
        replayable: true,
        streams: rng.bool(),
        // So soon that chance alone makes nobody slow: all are below what anyone notices.
        first_token: secs(0.06),
        tokens: 5,
        priority: Priority::Normal,
        always: None,
        patience: None,
    }
}

fn within(length: Duration, rng: &mut fastrand::Rng) -> Moment {
    Moment::ZERO + length.mul_f64(rng.f64())
}

fn secs(secs: f64) -> Duration {
    Duration::from_secs_f64(secs)
}

fn pick<'a, T>(rng: &mut fastrand::Rng, of: &'a [T]) -> &'a T {
    &of[rng.usize(..of.len())]
}
