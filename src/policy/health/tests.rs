//! The judge on trial: single records by hand, then whole pools and random histories.

use super::{
    Arrival, EjectReason, Health, HealthPolicy, KeptBecause, Observation, Operational, Panic, Peers,
    ProbeVerdict, Standing, Transition,
};
use crate::policy::Moment;
use crate::policy::health::{Administrative, may_receive};
use crate::policy::progress::Proof;
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use std::time::Duration;

const ONE_OTHER: Peers = Peers {
    members: 2,
    others_eligible: 1,
    others_ejected: 0,
    median_success: None,
    anyone_ever_passed: true,
    everyone_refusing: false,
};
const ALONE: Peers = Peers { members: 1, others_eligible: 0, ..ONE_OTHER };

/// One record with its clock and its peers.
struct Bench {
    policy: HealthPolicy,
    now: Moment,
    peers: Peers,
    rng: fastrand::Rng,
    health: Health,
}

impl Bench {
    /// A record of a healthy backend in full service.
    fn healthy() -> Self {
        let mut bench = Self::arriving(Arrival::Founder);
        bench.probe(ProbeVerdict::Pass);
        bench
    }

    fn arriving(arrival: Arrival) -> Self {
        let now = Moment::from_micros(1_000_000);
        Self {
            policy: HealthPolicy::default(),
            now,
            peers: ONE_OTHER,
            rng: fastrand::Rng::with_seed(1),
            health: Health::new(arrival, now),
        }
    }

    fn ejected() -> Self {
        let mut bench = Self::healthy();
        let last = bench.observe_times(Observation::Fault, 3);
        assert!(matches!(last, Some(Transition::Ejected { .. })), "{last:?}");
        bench
    }

    fn on_probation() -> Self {
        let mut bench = Self::ejected();
        bench.probe(ProbeVerdict::Pass);
        bench.pass(1.0);
        assert_eq!(bench.standing(), Standing::Probation);
        bench
    }

    fn observe(&mut self, observation: Observation) -> Option<Transition> {
        self.health.observe(&self.policy, self.now, observation, &self.peers, &mut self.rng)
    }

    fn observe_times(&mut self, observation: Observation, times: usize) -> Option<Transition> {
        (0..times).fold(None, |_, _| self.observe(observation))
    }

    fn probe(&mut self, verdict: ProbeVerdict) -> Option<Transition> {
        self.health.probe(&self.policy, self.now, verdict, &self.peers, &mut self.rng)
    }

    fn probe_times(&mut self, verdict: ProbeVerdict, times: usize) -> Option<Transition> {
        (0..times).fold(None, |_, _| self.probe(verdict))
    }

    fn tick(&mut self) -> Option<Transition> {
        self.health.tick(&self.policy, self.now, &self.peers)
    }

    fn pass(&mut self, secs: f64) -> Option<Transition> {
        self.now = self.now + Duration::from_secs_f64(secs);
        self.tick()
    }

    fn standing(&self) -> Standing {
        self.health.standing(&self.policy, self.now)
    }

    fn eligible(&self) -> bool {
        matches!(self.standing(), Standing::Eligible { .. })
    }

    fn out(&self) -> bool {
        matches!(self.standing(), Standing::Out { .. })
    }
}

// Arrival

#[test]
fn founders_serve_before_any_probe_until_someone_passes() {
    let mut bench = Bench::arriving(Arrival::Founder);
    bench.peers.anyone_ever_passed = false;
    bench.tick();
    assert_eq!(bench.standing(), Standing::Eligible { share: 1.0 });
    bench.peers.anyone_ever_passed = true;
    bench.tick();
    assert_eq!(bench.standing(), Standing::Out { until: None });
    let passed = bench.probe(ProbeVerdict::Pass);
    assert_eq!(passed, Some(Transition::ProbesPassed { passes: 1, weak: false, probation: false }));
    assert_eq!(bench.standing(), Standing::Eligible { share: 1.0 });
}

#[test]
fn a_founder_that_served_needs_no_probe() {
    let mut bench = Bench::arriving(Arrival::Founder);
    bench.peers.anyone_ever_passed = false;
    assert_eq!(bench.observe(Observation::FirstToken), Some(Transition::ProvenByTraffic));
    assert!(bench.health.ever_passed());
    bench.peers.anyone_ever_passed = true;
    bench.tick();
    assert!(bench.eligible());
}

#[test]
fn a_newcomer_waits_for_its_first_pass_and_starts_slowly() {
    let mut bench = Bench::arriving(Arrival::Newcomer);
    bench.tick();
    assert_eq!(bench.standing(), Standing::Out { until: None });
    assert_eq!(
        bench.probe(ProbeVerdict::WeakPass),
        Some(Transition::ProbesPassed { passes: 1, weak: true, probation: false })
    );
    assert_eq!(bench.standing(), Standing::Eligible { share: 0.1 });
    assert_eq!(bench.health.operational(), Operational::SlowStart);
    bench.pass(5.0);
    assert_eq!(bench.standing(), Standing::Eligible { share: 0.5 });
    assert_eq!(bench.pass(5.0), Some(Transition::SlowStartOver));
    assert_eq!(bench.standing(), Standing::Eligible { share: 1.0 });
}

#[test]
fn without_probes_a_newcomer_starts_at_once_and_time_alone_leads_to_probation() {
    let mut bench = Bench::arriving(Arrival::Newcomer);
    bench.policy.probes = false;
    bench.peers.anyone_ever_passed = false;
    bench.tick();
    assert_eq!(bench.standing(), Standing::Eligible { share: 0.1 });
    bench.observe_times(Observation::Fault, 3);
    assert_eq!(bench.pass(1.0), Some(Transition::Probation));
    assert!(bench.health.begin_trial(bench.now));
    assert!(matches!(bench.observe(Observation::FirstToken), Some(Transition::Readmitted { .. })));
}

#[test]
fn a_model_is_judged_by_its_requests_alone() {
    let mut bench = Bench::arriving(Arrival::Model);
    bench.tick();
    bench.observe(Observation::Fault);
    assert!(bench.eligible(), "its backend has passed probes, and it never will");
    bench.observe_times(Observation::Fault, 2);
    assert!(bench.out());
    assert_eq!(bench.pass(1.0), Some(Transition::Probation));
    assert!(bench.health.begin_trial(bench.now));
    assert!(matches!(bench.observe(Observation::FirstToken), Some(Transition::Readmitted { .. })));
}

#[test]
fn after_a_minute_any_request_may_be_the_trial() {
    let mut bench = Bench::healthy();
    assert!(!bench.health.takes_any_trial(bench.now + Duration::from_secs(3_600)), "it serves");
    bench.observe_times(Observation::Fault, 3);
    assert!(bench.out());
    let ejected = bench.now;
    assert!(!bench.health.takes_any_trial(ejected + Duration::from_secs(59)));
    assert!(bench.health.takes_any_trial(ejected + Duration::from_secs(60)));
}

#[test]
fn a_backend_that_fails_others_too_is_no_witness_against_a_request() {
    let serves = |bench: &Bench| bench.health.serves(bench.now, Moment::ZERO);
    let mut bench = Bench::healthy();
    assert!(!serves(&bench), "it has shown nothing yet");
    bench.observe(Observation::FirstToken);
    assert!(serves(&bench));
    // A fault that is forgiven changes nothing, however often.
    for _ in 0..5 {
        bench.observe(Observation::Fault);
        assert!(serves(&bench), "the latest may yet be forgiven");
        bench.health.forgive();
    }
    bench.observe_times(Observation::Fault, 2);
    assert!(!serves(&bench), "one that stands");
    bench.observe_times(Observation::Success, 10);
    assert!(!serves(&bench), "two of twelve");
    bench.observe_times(Observation::Success, 10);
    assert!(serves(&bench));
    let later = bench.now + Duration::from_millis(1);
    assert!(!bench.health.serves(later, later), "what it did before is no evidence of what it does");
}

// Probes

#[test]
fn fall_failures_in_a_row_make_unhealthy_and_rise_passes_lead_to_a_trial() {
    let mut bench = Bench::healthy();
    bench.probe_times(ProbeVerdict::Fail, 2);
    bench.probe(ProbeVerdict::Pass);
    assert_eq!(bench.probe_times(ProbeVerdict::Fail, 2), None);
    assert!(bench.eligible());
    assert_eq!(bench.probe(ProbeVerdict::Fail), Some(Transition::ProbesFailed { fails: 3 }));
    assert!(bench.out());
    assert_eq!(bench.health.operational(), Operational::Unhealthy);
    assert_eq!(bench.probe(ProbeVerdict::Pass), None);
    let passed = bench.probe(ProbeVerdict::Pass);
    assert_eq!(passed, Some(Transition::ProbesPassed { passes: 2, weak: false, probation: true }));
    assert_eq!(bench.standing(), Standing::Probation);
}

#[test]
fn with_nobody_else_eligible_passing_probes_readmit_at_once() {
    let mut bench = Bench::healthy();
    bench.peers = ALONE;
    bench.probe_times(ProbeVerdict::Fail, 3);
    assert!(bench.out());
    bench.probe_times(ProbeVerdict::Pass, 2);
    assert!(bench.eligible());
}

#[test]
fn failing_probes_are_outvoted_by_succeeding_traffic() {
    let mut bench = Bench::healthy();
    bench.probe(ProbeVerdict::Fail);
    bench.pass(1.0);
    assert_eq!((bench.health.served_at(), bench.health.outvotes_probes()), (None, false));
    bench.observe(Observation::Success);
    bench.probe(ProbeVerdict::Fail);
    assert_eq!(bench.probe(ProbeVerdict::Fail), Some(Transition::ProbesOutvoted { fails: 3 }));
    assert_eq!((bench.health.served_at(), bench.health.outvotes_probes()), (Some(bench.now), true));
    for _ in 0..100 {
        bench.pass(5.0);
        assert_eq!(bench.probe(ProbeVerdict::Fail), None, "told once");
    }
    assert!(bench.eligible(), "even when idle");
}

#[test]
fn one_success_while_probes_fail_outvotes_all_of_them() {
    let mut bench = Bench::healthy();
    bench.probe(ProbeVerdict::Fail);
    bench.pass(1.0);
    bench.observe(Observation::Success);
    bench.pass(1.0);
    bench.probe(ProbeVerdict::Fail);
    bench.pass(1.0);
    assert_eq!(bench.probe(ProbeVerdict::Fail), Some(Transition::ProbesOutvoted { fails: 3 }));
}

#[test]
fn success_from_before_the_probes_failed_outvotes_nothing() {
    let mut bench = Bench::healthy();
    bench.observe(Observation::Success);
    bench.pass(1.0);
    assert_eq!(bench.probe_times(ProbeVerdict::Fail, 3), Some(Transition::ProbesFailed { fails: 3 }));
}

#[test]
fn a_fault_after_the_success_lets_failing_probes_speak() {
    let mut bench = Bench::healthy();
    bench.probe_times(ProbeVerdict::Fail, 2);
    bench.observe(Observation::Success);
    bench.observe(Observation::Fault);
    assert_eq!(bench.probe(ProbeVerdict::Fail), Some(Transition::ProbesFailed { fails: 3 }));
}

#[test]
fn traffic_brings_an_unhealthy_backend_back() {
    let mut bench = Bench::healthy();
    bench.probe_times(ProbeVerdict::Fail, 3);
    assert_eq!(bench.observe(Observation::Success), None, "a completion may be of work begun long ago");
    assert!(bench.out());
    assert_eq!(bench.observe(Observation::FirstToken), Some(Transition::ProbesOutvoted { fails: 3 }));
    assert!(bench.eligible());
    assert_eq!(bench.probe_times(ProbeVerdict::Fail, 10), None);
    assert!(bench.eligible());
}

#[test]
fn outvoted_probes_do_not_keep_an_ejected_backend_out() {
    let mut bench = Bench::healthy();
    bench.probe(ProbeVerdict::Fail);
    bench.observe(Observation::Success);
    bench.probe_times(ProbeVerdict::Fail, 2);
    bench.observe_times(Observation::Fault, 3);
    assert!(bench.out());
    bench.probe_times(ProbeVerdict::Fail, 5);
    assert_eq!(bench.pass(1.0), Some(Transition::Probation));
}

#[test]
fn failing_traffic_outvotes_passing_probes() {
    let mut bench = Bench::healthy();
    for n in 0..3 {
        bench.probe(ProbeVerdict::Pass);
        assert!(bench.eligible(), "after {n} faults");
        bench.observe(Observation::Fault);
    }
    assert!(bench.out());
    bench.probe_times(ProbeVerdict::Pass, 5);
    assert!(bench.out(), "passing probes do not end an ejection");
}

#[test]
fn a_probe_answered_503_stops_new_work_while_another_is_eligible() {
    let mut bench = Bench::healthy();
    assert_eq!(bench.probe(ProbeVerdict::Refusing), Some(Transition::Refusing));
    assert_eq!(bench.standing(), Standing::Refusing);
    bench.observe(Observation::Success);
    assert_eq!(bench.standing(), Standing::Refusing, "running work proves nothing about new work");
    bench.peers.others_eligible = 0;
    bench.tick();
    assert!(bench.eligible());
    bench.peers.others_eligible = 1;
    bench.tick();
    assert_eq!(bench.standing(), Standing::Refusing);
    assert_eq!(bench.probe(ProbeVerdict::Pass), Some(Transition::RefusalOver));
    assert_eq!(bench.standing(), Standing::Eligible { share: 0.1 });
}

#[test]
fn when_all_answer_503_traffic_decides() {
    let mut bench = Bench::healthy();
    bench.peers.everyone_refusing = true;
    bench.probe(ProbeVerdict::Refusing);
    assert!(bench.eligible());
    bench.observe_times(Observation::Fault, 3);
    assert!(bench.out());
    assert_eq!(bench.pass(1.0), Some(Transition::Probation), "refusing probes cannot keep it out either");
    assert_eq!(bench.standing(), Standing::Probation);
}

#[test]
fn the_prober_hurries_only_while_something_may_change() {
    let mut bench = Bench::arriving(Arrival::Founder);
    assert!(!bench.health.steady(bench.now));
    bench.probe(ProbeVerdict::Pass);
    assert!(bench.health.steady(bench.now));
    bench.probe(ProbeVerdict::Fail);
    assert!(!bench.health.steady(bench.now));
    bench.probe_times(ProbeVerdict::Fail, 2);
    assert!(!bench.health.steady(bench.now));
    bench.pass(60.0);
    assert!(bench.health.steady(bench.now), "unhealthy for a minute");
    bench.probe(ProbeVerdict::Pass);
    assert!(!bench.health.steady(bench.now), "and coming back");
    assert!(!Bench::ejected().health.steady(Bench::ejected().now));
}

// Ejection

#[test]
fn three_faults_in_a_row_eject_and_a_success_between_them_forgives() {
    let mut bench = Bench::healthy();
    bench.observe_times(Observation::Fault, 2);
    bench.observe(Observation::Success);
    assert_eq!(bench.observe_times(Observation::Fault, 2), None);
    let ejected = bench.observe(Observation::Fault);
    let Some(Transition::Ejected { until, lasts, times: 1, reason: EjectReason::ConsecutiveFaults(3) }) =
        ejected
    else {
        panic!("{ejected:?}");
    };
    assert!(lasts <= Duration::from_secs(1) && lasts >= Duration::from_millis(800), "{lasts:?}");
    assert_eq!(bench.standing(), Standing::Out { until: Some(until) });
}

#[test]
fn first_tokens_do_not_hide_deaths_in_mid_stream() {
    let mut bench = Bench::healthy();
    for _ in 0..3 {
        bench.observe(Observation::FirstToken);
        bench.observe(Observation::Fault);
    }
    assert!(bench.out());
}

#[test]
fn a_low_rate_ejects_only_who_does_worse_than_its_peers() {
    let history = |bench: &mut Bench| {
        for _ in 0..20 {
            bench.observe(Observation::Success);
            bench.observe(Observation::Fault);
            if bench.out() {
                return true;
            }
        }
        false
    };
    let with = |median_success| {
        let mut bench = Bench::healthy();
        bench.peers.median_success = median_success;
        history(&mut bench)
    };
    assert!(with(Some(1.0)), "one in two fails here, none there");
    assert!(!with(Some(0.55)), "all fail alike");
    assert!(!with(None), "nothing to compare with");
}

#[test]
fn a_rate_of_too_few_outcomes_ejects_nobody() {
    let mut bench = Bench::healthy();
    bench.peers.median_success = Some(1.0);
    for observation in [Observation::Fault, Observation::Success, Observation::Fault] {
        assert_eq!(bench.observe(observation), None);
    }
    assert_eq!(bench.health.success_rate(bench.now), None);
    bench.observe(Observation::Success);
    assert!(matches!(
        bench.observe(Observation::Fault),
        Some(Transition::Ejected { reason: EjectReason::SuccessRate { .. }, .. })
    ));
}

#[test]
fn a_rate_never_ejects_more_than_half_of_the_pool() {
    let mut bench = Bench::healthy();
    bench.peers =
        Peers { members: 4, others_eligible: 1, others_ejected: 2, median_success: Some(1.0), ..ONE_OTHER };
    let mut told = 0;
    for _ in 0..20 {
        bench.observe(Observation::Success);
        if let Some(transition) = bench.observe(Observation::Fault) {
            assert!(matches!(transition, Transition::Kept { because: KeptBecause::HalfEjected, .. }));
            told += 1;
        }
    }
    assert!(bench.eligible());
    assert_eq!(told, 1);
    bench.peers.others_ejected = 1;
    assert!(matches!(bench.observe(Observation::Fault), Some(Transition::Ejected { .. })));
}

#[test]
fn the_last_eligible_is_kept_and_goes_when_another_returns() {
    let mut bench = Bench::healthy();
    bench.peers = ALONE;
    let kept = bench.observe_times(Observation::Fault, 3);
    assert!(matches!(kept, Some(Transition::Kept { because: KeptBecause::LastEligible, .. })), "{kept:?}");
    assert_eq!(bench.observe_times(Observation::Fault, 50), None, "told once");
    assert_eq!(
        bench.health.eject_stuck(&bench.policy, bench.now, Proof::Outrun, &bench.peers, &mut bench.rng),
        None,
        "nor for being stuck"
    );
    bench.observe(Observation::Misconfigured);
    assert!(bench.eligible());
    bench.peers = ONE_OTHER;
    assert!(matches!(bench.observe(Observation::Fault), Some(Transition::Ejected { .. })));
}

#[test]
fn a_misconfigured_backend_is_out_for_long_and_each_failed_trial_repeats_it() {
    let mut bench = Bench::healthy();
    let lasts = |transition| match transition {
        Some(Transition::Ejected { lasts, reason: EjectReason::Misconfigured, .. }) => lasts.as_secs_f64(),
        other => panic!("{other:?}"),
    };
    assert!((48.0..=60.0).contains(&lasts(bench.observe(Observation::Misconfigured))));
    bench.probe(ProbeVerdict::Pass);
    bench.pass(60.0);
    assert!(bench.health.begin_trial(bench.now));
    assert!((48.0..=60.0).contains(&lasts(bench.observe(Observation::Misconfigured))));
}

#[test]
fn a_stuck_backend_is_ejected_without_a_fault() {
    let mut bench = Bench::healthy();
    let ejected =
        bench.health.eject_stuck(&bench.policy, bench.now, Proof::Outrun, &bench.peers, &mut bench.rng);
    assert!(matches!(ejected, Some(Transition::Ejected { reason: EjectReason::Stuck(Proof::Outrun), .. })));
    assert!(bench.out());
}

#[test]
fn a_slow_backend_is_ejected_under_the_rules_of_the_success_rate() {
    let slow = |bench: &mut Bench| {
        let Bench { policy, now, peers, rng, health } = bench;
        health.eject_slow(policy, *now, 7.0, peers, rng)
    };
    let mut bench = Bench::healthy();
    bench.peers = ALONE;
    assert!(matches!(slow(&mut bench), Some(Transition::Kept { because: KeptBecause::LastEligible, .. })));
    let mut bench = Bench::healthy();
    bench.peers = Peers { members: 4, others_eligible: 1, others_ejected: 2, ..ONE_OTHER };
    assert!(matches!(slow(&mut bench), Some(Transition::Kept { because: KeptBecause::HalfEjected, .. })));
    assert!(bench.eligible());
    bench.peers.others_ejected = 1;
    let ejected = slow(&mut bench);
    assert!(
        matches!(
            ejected,
            Some(Transition::Ejected { times: 1, reason: EjectReason::Slow { ratio: 7.0 }, .. })
        ),
        "{ejected:?}"
    );
    assert!(bench.out());
    assert_eq!(slow(&mut bench), None, "it is out already");
    let mut bench = Bench::on_probation();
    assert!(bench.health.begin_trial(bench.now));
    assert_eq!(slow(&mut bench), None, "of work begun before the ejection");
    assert!(bench.health.on_trial());
}

#[test]
fn stragglers_neither_lengthen_an_ejection_nor_end_it() {
    let mut bench = Bench::ejected();
    let before = bench.standing();
    for observation in
        [Observation::Fault, Observation::Success, Observation::FirstToken, Observation::Misconfigured]
    {
        assert_eq!(bench.observe_times(observation, 5), None);
    }
    assert_eq!(bench.standing(), before);
}

#[test]
fn with_nobody_eligible_a_served_request_ends_the_ejection() {
    let mut bench = Bench::ejected();
    bench.peers = Peers { members: 2, others_ejected: 1, ..ALONE };
    assert_eq!(Panic::judge(2, 0), Panic::Graded);
    assert!(Panic::Graded.admits(bench.standing(), Administrative::Enabled, 0));
    assert!(matches!(bench.observe(Observation::FirstToken), Some(Transition::Readmitted { .. })));
    assert!(bench.eligible());
}

// Return

#[test]
fn return_takes_time_then_a_probe_then_a_trial_then_a_ramp() {
    let mut bench = Bench::ejected();
    assert_eq!(bench.pass(1.0), Some(Transition::AwaitsProbe));
    assert_eq!(bench.standing(), Standing::Out { until: None });
    assert_eq!(bench.probe(ProbeVerdict::Fail), None);
    assert_eq!(bench.probe(ProbeVerdict::Pass), Some(Transition::Probation));
    assert!(may_receive(bench.standing(), Administrative::Enabled));
    assert!(bench.health.begin_trial(bench.now));
    assert_eq!(
        bench.observe(Observation::FirstToken),
        Some(Transition::Readmitted { after: Duration::from_secs(1) })
    );
    assert_eq!(bench.standing(), Standing::Eligible { share: 0.1 });
    assert_eq!(bench.pass(10.0), Some(Transition::SlowStartOver));
    assert_eq!(bench.health.operational(), Operational::Healthy);
}

#[test]
fn a_probe_that_passed_during_the_ejection_is_enough() {
    let mut bench = Bench::ejected();
    bench.probe(ProbeVerdict::Pass);
    assert_eq!(bench.pass(1.0), Some(Transition::Probation));
}

#[test]
fn readmission_empties_the_windows() {
    let mut bench = Bench::healthy();
    bench.peers.median_success = Some(1.0);
    for _ in 0..4 {
        bench.observe(Observation::Success);
        bench.observe(Observation::Fault);
    }
    assert!(bench.out() && bench.health.success_rate(bench.now).is_some());
    bench.probe(ProbeVerdict::Pass);
    bench.pass(1.0);
    assert!(bench.health.begin_trial(bench.now));
    bench.observe(Observation::Success);
    assert_eq!(bench.health.success_rate(bench.now), None);
    assert_eq!(bench.observe_times(Observation::Fault, 2), None, "two faults are two again");
}

#[test]
fn one_trial_at_a_time_and_another_after_it_was_abandoned() {
    let mut bench = Bench::on_probation();
    let won = |bench: &mut Bench| (0..10).filter(|_| bench.health.begin_trial(bench.now)).count();
    assert_eq!(won(&mut bench), 1);
    assert!(bench.health.on_trial());
    bench.health.abandon_trial(bench.now);
    assert_eq!(won(&mut bench), 1);
    // These may be about work that began before the ejection.
    bench.observe(Observation::Neutral);
    bench.observe(Observation::Busy { until: None });
    bench.pass(30.0);
    assert_eq!(won(&mut bench), 0);
    assert!(matches!(bench.observe(Observation::Fault), Some(Transition::TrialFailed { times: 2, .. })));
    assert_eq!(won(&mut bench), 0);
}

#[test]
fn the_end_of_an_old_trial_does_not_let_another_in_beside_the_new_one() {
    let mut bench = Bench::on_probation();
    assert!(bench.health.begin_trial(bench.now));
    let old = bench.now;
    bench.observe(Observation::FirstToken);
    bench.observe_times(Observation::Fault, 3);
    bench.probe(ProbeVerdict::Pass);
    bench.pass(60.0);
    assert!(bench.health.begin_trial(bench.now));
    bench.health.abandon_trial(old);
    assert!(!bench.health.begin_trial(bench.now), "the new one is under way");
    bench.health.abandon_trial(bench.now);
    assert!(bench.health.begin_trial(bench.now));
}

#[test]
fn a_lost_trial_is_forgotten_in_the_end() {
    let mut bench = Bench::on_probation();
    assert!(bench.health.begin_trial(bench.now));
    bench.pass(599.0);
    assert!(!bench.health.begin_trial(bench.now));
    bench.pass(1.0);
    assert!(bench.health.begin_trial(bench.now));
}

#[test]
fn nobody_begins_a_trial_outside_probation() {
    for mut bench in [Bench::healthy(), Bench::ejected(), Bench::arriving(Arrival::Newcomer)] {
        assert!(!bench.health.begin_trial(bench.now));
    }
    let mut bench = Bench::on_probation();
    bench.probe_times(ProbeVerdict::Fail, 3);
    assert!(!bench.health.begin_trial(bench.now), "unhealthy");
    let mut bench = Bench::on_probation();
    bench.observe(Observation::Busy { until: None });
    assert!(!bench.health.begin_trial(bench.now), "busy");
}

#[test]
fn failed_trials_double_up_to_a_minute() {
    let mut bench = Bench::ejected();
    bench.policy.ejection_jitter = 0.0;
    let mut lengths = Vec::new();
    for _ in 0..8 {
        bench.probe(ProbeVerdict::Pass);
        bench.pass(60.0);
        assert!(bench.health.begin_trial(bench.now));
        match bench.observe(Observation::Fault) {
            Some(Transition::TrialFailed { lasts, .. }) => lengths.push(lasts.as_secs()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(lengths, [2, 4, 8, 16, 32, 60, 60, 60]);
}

#[test]
fn one_silence_is_an_accident_unless_it_is_the_trial() {
    let mut bench = Bench::healthy();
    bench.policy.eject_consecutive = 1;
    assert_eq!(bench.observe(Observation::Silent), None);
    bench.observe(Observation::FirstToken);
    assert_eq!(bench.observe(Observation::Silent), None, "the first again");
    let second = bench.observe(Observation::Silent);
    assert!(matches!(second, Some(Transition::Ejected { .. })), "{second:?}");
    let mut bench = Bench::on_probation();
    assert!(bench.health.begin_trial(bench.now));
    let failed = bench.observe(Observation::Silent);
    assert!(matches!(failed, Some(Transition::TrialFailed { .. })), "{failed:?}");
}

// Busy

#[test]
fn retry_after_is_a_floor_whatever_else_happens() {
    let mut bench = Bench::healthy();
    let until = bench.now + Duration::from_secs(30);
    assert_eq!(
        bench.observe(Observation::Busy { until: Some(until) }),
        Some(Transition::Busy { until, stated: true })
    );
    bench.observe(Observation::Success);
    bench.probe(ProbeVerdict::Pass);
    bench.observe(Observation::Busy { until: Some(bench.now + Duration::from_secs(1)) });
    bench.observe(Observation::Busy { until: None });
    bench.pass(29.9);
    assert_eq!(bench.standing(), Standing::Busy { until });
    assert!(!Panic::Graded.admits(bench.standing(), Administrative::Enabled, 0));
    bench.pass(0.1);
    assert!(bench.eligible());
}

#[test]
fn who_asked_to_be_left_alone_is_not_asked_in_panic_either() {
    let until = |bench: &Bench| Some(bench.now + Duration::from_secs(30));
    let mut unhealthy = Bench::healthy();
    unhealthy.peers = ALONE;
    unhealthy.probe_times(ProbeVerdict::Fail, 3);
    let mut refusing = Bench::healthy();
    refusing.probe(ProbeVerdict::Refusing);
    for mut bench in [unhealthy, refusing, Bench::ejected()] {
        let admits = |bench: &Bench| Panic::Graded.admits(bench.standing(), Administrative::Enabled, 0);
        assert!(admits(&bench));
        bench.observe(Observation::Busy { until: until(&bench) });
        assert!(!admits(&bench), "{:?}", bench.standing());
        assert!(matches!(bench.standing(), Standing::Busy { .. }));
        bench.pass(30.0);
        assert!(bench.out() || bench.standing() == Standing::Refusing);
    }
}

#[test]
fn busy_without_a_time_pauses_briefly_longer_each_time_until_a_success() {
    let mut bench = Bench::healthy();
    let pause = |bench: &mut Bench| {
        bench.observe(Observation::Busy { until: None });
        bench.observe_times(Observation::Busy { until: None }, 20);
        let Standing::Busy { until } = bench.standing() else { panic!("not busy") };
        let pause = until.since(bench.now);
        bench.pass(pause.as_secs_f64() + 0.001);
        assert!(bench.eligible());
        pause
    };
    for most in [250, 500, 1000, 2000, 4000, 4000] {
        let pause = pause(&mut bench);
        assert!(
            pause <= Duration::from_millis(most) && pause >= Duration::from_millis(most / 2 - 1),
            "{pause:?}"
        );
    }
    bench.observe(Observation::Busy { until: None });
    bench.observe(Observation::Success);
    assert!(bench.eligible(), "a slot is free");
    assert!(pause(&mut bench) <= Duration::from_millis(250));
}

#[test]
fn an_absurd_retry_after_is_not_believed() {
    let mut bench = Bench::healthy();
    bench.observe(Observation::Busy { until: Some(Moment::NEVER) });
    bench.pass(600.0);
    assert!(bench.eligible());
}

// What callers read

#[test]
fn states_have_names_of_their_own() {
    let operational = [
        Operational::Unknown,
        Operational::Healthy,
        Operational::SlowStart,
        Operational::Unhealthy,
        Operational::Refusing,
        Operational::Ejected { until: Moment::ZERO },
        Operational::AwaitsProbe,
        Operational::Probation,
    ];
    let administrative = [Administrative::Enabled, Administrative::Draining, Administrative::Disabled];
    let mut names: Vec<&str> = operational.map(Operational::name).into_iter().collect();
    names.extend(administrative.map(Administrative::name));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 11, "{names:?}");
    assert!(
        names.iter().all(|name| name.chars().all(|c| c == '_' || c.is_ascii_lowercase()) && name.len() > 3)
    );
}

#[test]
fn unknown_is_what_no_probe_has_spoken_of() {
    let mut bench = Bench::arriving(Arrival::Founder);
    assert!(!bench.health.ever_passed());
    assert_eq!(bench.health.operational(), Operational::Unknown);
    bench.policy.probes = false;
    bench.tick();
    assert_eq!(bench.health.operational(), Operational::Healthy, "there are no probes to wait for");
}

#[test]
fn it_counts_as_ejected_until_it_serves_again() {
    assert!(!Bench::healthy().health.is_ejected());
    let mut bench = Bench::ejected();
    assert!(bench.health.is_ejected());
    bench.pass(1.0);
    assert_eq!(bench.health.operational(), Operational::AwaitsProbe);
    assert!(bench.health.is_ejected());
    bench.probe(ProbeVerdict::Pass);
    assert!(bench.health.is_ejected(), "on probation");
    assert!(bench.health.begin_trial(bench.now));
    bench.observe(Observation::FirstToken);
    assert!(!bench.health.is_ejected());
}

#[test]
fn the_next_change_is_when_time_alone_changes_something() {
    let next = |bench: &Bench| bench.health.next_change(&bench.policy);
    let mut bench = Bench::healthy();
    assert_eq!(next(&bench), None);
    let until = bench.now + Duration::from_secs(7);
    bench.observe(Observation::Busy { until: Some(until) });
    assert_eq!(next(&bench), Some(until));
    bench.observe_times(Observation::Fault, 3);
    let Operational::Ejected { until: ejected_until } = bench.health.operational() else {
        panic!("not ejected")
    };
    assert_eq!(next(&bench), Some(ejected_until), "which is before that");
    bench.pass(7.0);
    assert_eq!(next(&bench), None, "only a probe helps");
    bench.probe(ProbeVerdict::Pass);
    assert_eq!(next(&bench), None, "only a trial helps");
    assert!(bench.health.begin_trial(bench.now));
    assert_eq!(next(&bench), Some(bench.now + Duration::from_secs(600)), "then the trial is lost");
    bench.observe(Observation::FirstToken);
    assert_eq!(next(&bench), Some(bench.now + bench.policy.slow_start));
    bench.pass(10.0);
    assert_eq!(next(&bench), None);
    let mut newcomer = Bench::arriving(Arrival::Newcomer);
    newcomer.tick();
    assert_eq!(next(&newcomer), None, "its slow start begins with its first pass");
}

#[test]
fn time_that_is_not_up_ends_no_ejection() {
    let mut bench = Bench::ejected();
    bench.probe(ProbeVerdict::Pass);
    let Standing::Out { until: Some(until) } = bench.standing() else { panic!("not ejected") };
    assert!(until > bench.now && until <= bench.now + bench.policy.ejection_min);
    assert_eq!(bench.tick(), None);
    assert_eq!(bench.standing(), Standing::Out { until: Some(until) });
    bench.now = until;
    assert_eq!(bench.tick(), Some(Transition::Probation));
}

#[test]
fn a_refusal_that_ends_during_an_ejection_starts_no_ramp() {
    let mut bench = Bench::ejected();
    assert_eq!(bench.probe(ProbeVerdict::Refusing), Some(Transition::Refusing));
    assert_eq!(bench.probe(ProbeVerdict::Pass), None);
    assert!(bench.out());
}

#[test]
fn a_prober_settles_on_a_refusal_after_a_minute() {
    let mut bench = Bench::healthy();
    bench.probe(ProbeVerdict::Refusing);
    assert!(!bench.health.steady(bench.now));
    bench.pass(60.0);
    assert!(bench.health.steady(bench.now));
}

#[test]
fn without_a_slow_start_the_share_is_full_at_once() {
    let mut bench = Bench::on_probation();
    bench.policy.slow_start = Duration::ZERO;
    assert!(bench.health.begin_trial(bench.now));
    bench.observe(Observation::FirstToken);
    assert_eq!(bench.standing(), Standing::Eligible { share: 1.0 });
}

#[test]
fn only_a_newcomer_that_is_proven_by_traffic_starts_slowly() {
    for (arrival, share) in [(Arrival::Founder, 1.0), (Arrival::Newcomer, 0.1)] {
        let mut bench = Bench::arriving(arrival);
        assert_eq!(bench.observe(Observation::FirstToken), Some(Transition::ProvenByTraffic));
        assert_eq!(bench.standing(), Standing::Eligible { share });
    }
}

#[test]
fn where_nobody_probes_traffic_has_nothing_to_outvote() {
    let mut bench = Bench::arriving(Arrival::Founder);
    bench.policy.probes = false;
    assert_eq!(bench.observe(Observation::Success), None);
    let mut bench = Bench::healthy();
    bench.probe_times(ProbeVerdict::Fail, 3);
    bench.policy.probes = false;
    assert_eq!(bench.observe(Observation::FirstToken), None);
}

#[test]
fn one_fresh_success_or_two_of_any_kind_bring_an_unhealthy_backend_back() {
    let unhealthy = || {
        let mut bench = Bench::healthy();
        bench.probe_times(ProbeVerdict::Fail, 3);
        bench
    };
    assert_eq!(unhealthy().observe(Observation::FirstToken), Some(Transition::ProbesOutvoted { fails: 3 }));
    let mut bench = unhealthy();
    assert_eq!(bench.observe(Observation::Success), None);
    assert_eq!(bench.observe(Observation::Success), Some(Transition::ProbesOutvoted { fails: 3 }));
}

#[test]
fn faults_of_an_unhealthy_backend_eject_it_no_more() {
    let mut bench = Bench::healthy();
    bench.probe_times(ProbeVerdict::Fail, 3);
    assert_eq!(bench.observe_times(Observation::Fault, 5), None);
    assert_eq!(bench.standing(), Standing::Out { until: None });
}

#[test]
fn who_is_the_whole_margin_below_its_peers_is_ejected() {
    let mut bench = Bench::healthy();
    (bench.policy.peer_margin, bench.policy.outcomes_min) = (0.25, 4);
    bench.peers.median_success = Some(0.75);
    let history = [Observation::Success, Observation::Fault, Observation::Success];
    assert!(history.into_iter().all(|observation| bench.observe(observation).is_none()));
    let ejected = bench.observe(Observation::Fault);
    let reason = EjectReason::SuccessRate { rate: 0.5, peers: 0.75 };
    assert!(
        matches!(ejected, Some(Transition::Ejected { reason: found, .. }) if found == reason),
        "{ejected:?}"
    );
}

#[test]
fn a_kept_backend_is_told_of_again_after_a_minute() {
    let mut bench = Bench::healthy();
    bench.peers = ALONE;
    assert!(bench.observe_times(Observation::Fault, 3).is_some());
    bench.pass(59.9);
    assert_eq!(bench.observe(Observation::Fault), None);
    bench.pass(0.1);
    assert!(matches!(bench.observe(Observation::Fault), Some(Transition::Kept { .. })));
}

#[test]
fn a_pause_ends_at_its_moment_and_another_may_follow() {
    let mut bench = Bench::healthy();
    assert_eq!(bench.observe(Observation::Busy { until: Some(bench.now) }), None, "a pause of nothing");
    let first = bench.observe(Observation::Busy { until: None });
    let Some(Transition::Busy { until, stated: false }) = first else { panic!("{first:?}") };
    assert_eq!(bench.observe(Observation::Busy { until: None }), None, "told once");
    bench.now = until;
    assert!(bench.eligible());
    let second = bench.observe(Observation::Busy { until: None });
    assert!(matches!(second, Some(Transition::Busy { .. })), "{second:?}");
}

#[test]
fn a_minute_of_health_takes_a_doubling_back() {
    let again_after = |healthy: f64| {
        let mut bench = Bench::on_probation();
        bench.policy.ejection_jitter = 0.0;
        assert!(bench.health.begin_trial(bench.now));
        bench.observe(Observation::FirstToken);
        bench.pass(healthy);
        let ejected = bench.observe_times(Observation::Fault, 3);
        let Some(Transition::Ejected { until, lasts, times, .. }) = ejected else { panic!("{ejected:?}") };
        assert_eq!(until, bench.now + lasts);
        (lasts.as_secs(), times)
    };
    assert_eq!(again_after(59.0), (2, 2));
    assert_eq!(again_after(60.0), (1, 1));
}

#[test]
fn misconfiguration_neither_doubles_nor_forgets_how_often_it_was_out() {
    let times = |bench: &mut Bench| match bench.observe(Observation::Misconfigured) {
        Some(Transition::Ejected { times, reason: EjectReason::Misconfigured, .. }) => times,
        other => panic!("{other:?}"),
    };
    assert_eq!(times(&mut Bench::healthy()), 1);
    let mut bench = Bench::on_probation();
    assert!(bench.health.begin_trial(bench.now));
    bench.observe(Observation::Fault);
    bench.probe(ProbeVerdict::Pass);
    bench.pass(60.0);
    assert!(bench.health.begin_trial(bench.now));
    assert_eq!(times(&mut bench), 2);
}

// Whole pools and random histories

/// What may happen to a backend.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Observe(Observation),
    Probe(ProbeVerdict),
    BeginTrial,
    AbandonTrial,
    Stuck,
    Slow,
    Pass(u32),
}

fn happening() -> impl Strategy<Value = Happening> {
    let observation = prop_oneof![
        Just(Observation::Success),
        Just(Observation::FirstToken),
        Just(Observation::Neutral),
        Just(Observation::Misconfigured),
        Just(Observation::Busy { until: None }),
        (0u64..200_000_000).prop_map(|at| Observation::Busy { until: Some(Moment::from_micros(at)) }),
    ];
    let verdict = prop_oneof![
        Just(ProbeVerdict::Pass),
        Just(ProbeVerdict::WeakPass),
        Just(ProbeVerdict::Fail),
        Just(ProbeVerdict::Fail),
        Just(ProbeVerdict::Refusing),
    ];
    prop_oneof![
        3 => Just(Happening::Observe(Observation::Fault)),
        4 => observation.prop_map(Happening::Observe),
        4 => verdict.prop_map(Happening::Probe),
        1 => Just(Happening::BeginTrial),
        1 => Just(Happening::AbandonTrial),
        1 => Just(Happening::Stuck),
        1 => Just(Happening::Slow),
        4 => (0u32..20_000_000).prop_map(Happening::Pass),
    ]
}

/// A pool that computes each member's peers as a pool does.
struct Pool {
    policy: HealthPolicy,
    now: Moment,
    rng: fastrand::Rng,
    members: Vec<Health>,
}

impl Pool {
    fn of(members: usize, probes: bool, seed: u64) -> Self {
        Self {
            policy: HealthPolicy { probes, ..HealthPolicy::default() },
            now: Moment::ZERO,
            rng: fastrand::Rng::with_seed(seed),
            members: (0..members)
                .map(|n| {
                    Health::new(if n % 3 == 2 { Arrival::Newcomer } else { Arrival::Founder }, Moment::ZERO)
                })
                .collect(),
        }
    }

    fn standing(&self, i: usize) -> Standing {
        self.members[i].standing(&self.policy, self.now)
    }

    fn eligible(&self) -> usize {
        (0..self.members.len()).filter(|&i| matches!(self.standing(i), Standing::Eligible { .. })).count()
    }

    fn peers(&self, of: usize) -> Peers {
        let others = || (0..self.members.len()).filter(move |&i| i != of);
        let mut rates: Vec<f64> = others().filter_map(|i| self.members[i].success_rate(self.now)).collect();
        rates.sort_by(f64::total_cmp);
        Peers {
            members: self.members.len(),
            others_eligible: others()
                .filter(|&i| matches!(self.standing(i), Standing::Eligible { .. }))
                .count(),
            others_ejected: others().filter(|&i| self.members[i].is_ejected()).count(),
            median_success: rates.get(rates.len() / 2).copied(),
            anyone_ever_passed: self.members.iter().any(Health::ever_passed),
            everyone_refusing: self
                .members
                .iter()
                .all(|health| health.operational() == Operational::Refusing),
        }
    }

    fn settle(&mut self) {
        for i in 0..self.members.len() {
            let peers = self.peers(i);
            let mut ticks = 0;
            while self.members[i].tick(&self.policy, self.now, &peers).is_some() {
                ticks += 1;
                assert!(ticks < 4, "tick does not come to rest");
            }
            let next = self.members[i].next_change(&self.policy);
            assert!(
                next.is_none_or(|next| next > self.now),
                "a timer at {next:?} would spin at {:?}",
                self.now
            );
        }
    }

    fn happen(&mut self, i: usize, happening: Happening) -> Option<Transition> {
        let peers = self.peers(i);
        let (policy, now, rng) = (&self.policy, self.now, &mut self.rng);
        let health = &mut self.members[i];
        let transition = match happening {
            Happening::Observe(observation) => health.observe(policy, now, observation, &peers, rng),
            Happening::Probe(verdict) => health.probe(policy, now, verdict, &peers, rng),
            Happening::BeginTrial => {
                health.begin_trial(now);
                None
            }
            Happening::AbandonTrial => {
                health.free_trial();
                None
            }
            Happening::Stuck => health.eject_stuck(policy, now, Proof::Unanswered, &peers, rng),
            Happening::Slow => health.eject_slow(policy, now, 6.0, &peers, rng),
            Happening::Pass(micros) => {
                self.now = self.now + Duration::from_micros(u64::from(micros));
                None
            }
        };
        self.settle();
        transition
    }

    /// One second in which whatever is asked of any backend succeeds.
    fn good_second(&mut self) {
        self.now = self.now + Duration::from_secs(1);
        self.settle();
        for i in 0..self.members.len() {
            if self.policy.probes {
                self.happen(i, Happening::Probe(ProbeVerdict::Pass));
            }
            let standing = self.standing(i);
            let tried = self.members[i].begin_trial(self.now);
            if tried || matches!(standing, Standing::Eligible { .. }) {
                self.happen(i, Happening::Observe(Observation::FirstToken));
                self.happen(i, Happening::Observe(Observation::Success));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn observations_never_remove_the_last_eligible_backend(
        members in 1usize..5,
        probes in any::<bool>(),
        history in prop::collection::vec((0usize..5, happening()), 0..300),
        seed in any::<u64>(),
    ) {
        let mut pool = Pool::of(members, probes, seed);
        pool.settle();
        for (i, happening) in history {
            let before = pool.eligible();
            let transition = pool.happen(i % members, happening);
            let judged = matches!(transition, Some(Transition::Ejected { .. }));
            prop_assert!(!judged || before == 0 || pool.eligible() > 0, "{transition:?} left none of {before}");
            if let Some(Transition::Ejected { lasts, .. } | Transition::TrialFailed { lasts, .. }) = transition {
                prop_assert!(lasts <= pool.policy.ejection_max);
            }
            if let Some(transition) = transition {
                prop_assert!(!transition.to_string().is_empty() && !transition.name().is_empty());
            }
        }
    }

    #[test]
    fn whatever_happened_what_succeeds_from_now_on_is_soon_eligible(
        members in 1usize..5,
        probes in any::<bool>(),
        history in prop::collection::vec((0usize..5, happening()), 0..300),
        seed in any::<u64>(),
    ) {
        let mut pool = Pool::of(members, probes, seed);
        for (i, happening) in history {
            pool.happen(i % members, happening);
        }
        for health in &mut pool.members {
            health.free_trial();
        }
        // The longest ejection or Retry-After of the history, then a probe or two, then the ramp.
        for _ in 0..215 {
            pool.good_second();
        }
        for i in 0..members {
            prop_assert_eq!(pool.standing(i), Standing::Eligible { share: 1.0 }, "{:?}", pool.members[i]);
        }
    }

    #[test]
    fn busy_and_neutral_never_eject(
        lessons in prop::collection::vec(
            prop_oneof![
                Just(Observation::Busy { until: None }),
                Just(Observation::Busy { until: Some(Moment::from_micros(9_000_000)) }),
                Just(Observation::Neutral),
            ],
            0..200,
        ),
    ) {
        let mut bench = Bench::healthy();
        bench.peers.median_success = Some(1.0);
        for lesson in lessons {
            let transition = bench.observe(lesson);
            let harmless = matches!(transition, None | Some(Transition::Busy { .. }));
            prop_assert!(harmless);
            prop_assert!(!bench.out());
            bench.pass(0.1);
        }
        bench.pass(9.0);
        prop_assert!(bench.eligible());
    }

    #[test]
    fn a_trial_is_won_once_between_outcomes(
        history in prop::collection::vec(happening(), 0..300),
        seed in any::<u64>(),
    ) {
        let mut pool = Pool::of(2, true, seed);
        let mut under_way = false;
        for happening in history {
            if matches!(happening, Happening::BeginTrial) {
                let wins = (0..3).filter(|_| pool.members[0].begin_trial(pool.now)).count();
                prop_assert!(wins + usize::from(under_way) <= 1);
                under_way |= wins == 1;
            } else {
                pool.happen(0, happening);
                pool.happen(1, Happening::Probe(ProbeVerdict::Pass));
                under_way &= pool.members[0].on_trial();
            }
        }
    }

    #[test]
    fn a_bad_minute_is_over_within_the_longest_ejection(seed in any::<u64>(), bad_secs in 1u32..90) {
        let mut pool = Pool::of(2, true, seed);
        for _ in 0..5 {
            pool.good_second();
        }
        for _ in 0..bad_secs {
            pool.now = pool.now + Duration::from_secs(1);
            pool.settle();
            pool.happen(0, Happening::Probe(ProbeVerdict::Pass));
            pool.happen(1, Happening::Observe(Observation::Success));
            if matches!(pool.standing(0), Standing::Eligible { .. }) {
                for _ in 0..3 {
                    pool.happen(0, Happening::Observe(Observation::Fault));
                }
            } else if pool.members[0].begin_trial(pool.now) {
                pool.happen(0, Happening::Observe(Observation::Fault));
            }
        }
        let mut waited = 0;
        while !matches!(pool.standing(0), Standing::Eligible { .. }) {
            pool.good_second();
            waited += 1;
            prop_assert!(waited <= 61, "still {:?}", pool.standing(0));
        }
        // Each ejection is at most double the last, of which chance took a fifth off.
        prop_assert!(waited <= bad_secs * 5 / 4 + 4, "out for {waited} s after {bad_secs} bad ones");
    }
}
