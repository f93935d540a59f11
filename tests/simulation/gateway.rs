//! What the gateway knows of its pool, and how it chooses: the rules of `src/pool`, single-threaded and without I/O,
//! around the real policies. Nothing here looks at what a replica really is.

use crate::crowd::Crowd;
use crate::plan::{Member, Plan, Policies};
use crate::silence::Silence;
use evergate::policy::Moment;
use evergate::policy::balance::{self, Candidates, Ewma, RecentFailures, stable_hash};
use evergate::policy::health::{
    Administrative, Arrival, Health, Observation, Operational, Panic, Peers, ProbeVerdict, Standing,
    Transition,
};
use evergate::policy::outlier::{self, Measure, Reading, Sample, Speed};
use evergate::policy::progress::Proof;
use evergate::policy::retry::{Budget, Burst};
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

/// Transitions one look may take a record through.
const TRANSITIONS_MAX: usize = 4;

/// One backend, as the gateway sees it.
pub(crate) struct Backend {
    pub(crate) health: Health,
    pub(crate) admin: Administrative,
    pub(crate) present: bool,
    pub(crate) in_flight: u32,
    plain: bool,
    failures: RecentFailures,
    first_token: Ewma,
    gap: Ewma,
    speed: Speed,
    weight: f64,
    tier: u8,
    in_flight_max: Option<u32>,
    identity: u64,
}

/// The pool.
pub(crate) struct Gateway {
    pub(crate) policies: Policies,
    pub(crate) backends: Vec<Backend>,
    pub(crate) budget: Budget,
    pub(crate) burst: Burst,
    /// The highest in-flight count of one backend so far.
    pub(crate) peak: u32,
    pub(crate) silence: Silence,
    pub(crate) crowd: Crowd,
    pub(crate) rng: fastrand::Rng,
    cursor: AtomicUsize,
    median_first_token: Option<f64>,
    median_gap: Option<f64>,
}

/// What was done to a backend's judge.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Told {
    /// An attempt's lesson.
    Observation(Observation),
    /// A probe's result.
    Probe(ProbeVerdict),
    /// Lasting slowness.
    Slow(f64),
    /// A standstill, proven.
    Stuck(Proof),
    /// Time.
    Tick,
}

/// A transition, and the eligible backends around it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) backend: usize,
    pub(crate) told: Told,
    pub(crate) transition: Transition,
    pub(crate) eligible_before: usize,
    pub(crate) eligible_after: usize,
    /// Ejected or on the way back, this one included.
    pub(crate) ejected_after: usize,
    pub(crate) members: usize,
}

/// Who takes an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// An eligible backend.
    Ordinary(usize),
    /// The single trial of one in probation.
    Trial(usize),
    /// One that is out, in graded panic.
    Suspect(usize),
}

impl Choice {
    pub(crate) fn backend(self) -> usize {
        match self {
            Self::Ordinary(i) | Self::Trial(i) | Self::Suspect(i) => i,
        }
    }
}

/// What pays for a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grant {
    Budget,
    Burst,
}

/// Why nobody takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nobody {
    Full,
    Busy(Moment),
    Down,
    AllTried,
}

impl Gateway {
    pub(crate) fn new(plan: &Plan, seed: u64) -> Self {
        let backends = plan.members.iter().zip(0u64..).map(|(member, n)| Backend::new(member, n));
        Self {
            policies: plan.policies.clone(),
            backends: backends.collect(),
            budget: Budget::default(),
            burst: Burst::default(),
            peak: 0,
            silence: Silence::new(
                plan.policies.progress.clone(),
                plan.members.len(),
                plan.policies.health.probes,
            ),
            crowd: Crowd::new(plan.members.len()),
            rng: fastrand::Rng::with_seed(seed),
            cursor: AtomicUsize::new(0),
            median_first_token: None,
            median_gap: None,
        }
    }

    pub(crate) fn standing(&self, i: usize, now: Moment) -> Standing {
        self.backends[i].health.standing(&self.policies.health, now)
    }

    pub(crate) fn is_eligible(&self, i: usize, now: Moment) -> bool {
        self.enabled(i) && matches!(self.standing(i, now), Standing::Eligible { .. })
    }

    pub(crate) fn eligible(&self, now: Moment) -> usize {
        (0..self.backends.len()).filter(|&i| self.is_eligible(i, now)).count()
    }

    pub(crate) fn members(&self) -> usize {
        (0..self.backends.len()).filter(|&i| self.enabled(i)).count()
    }

    fn enabled(&self, i: usize) -> bool {
        self.backends[i].present && self.backends[i].admin == Administrative::Enabled
    }

    /// Most attempts at a time, configured or learned.
    pub(crate) fn cap(&self, i: usize) -> Option<u32> {
        self.crowd.cap(i, self.backends[i].in_flight_max)
    }

    /// Most exchanges that may wait.
    pub(crate) fn queue_length_max(&self, now: Moment) -> usize {
        let eligible = (0..self.backends.len()).filter(|&i| self.is_eligible(i, now));
        self.policies.queue.length_max.of(eligible.map(|i| self.cap(i)))
    }

    /// Whether an ordinary attempt fits there.
    pub(crate) fn has_room(&self, i: usize, now: Moment) -> bool {
        let Standing::Eligible { share } = self.standing(i, now) else { return false };
        self.cap(i).is_none_or(|max| {
            f64::from(self.backends[i].in_flight) < (f64::from(max) * f64::from(share)).max(1.0)
        })
    }

    pub(crate) fn pick(
        &mut self,
        tried: &[usize],
        replayable: bool,
        paid: bool,
        key: u64,
        proven_since: Option<Moment>,
        now: Moment,
    ) -> Result<Choice, Nobody> {
        let trial = |gateway: &mut Self| gateway.pick_trial(tried, replayable, now).map(Choice::Trial);
        // Who failed once had better not meet a convalescent next.
        if proven_since.is_none()
            && let Some(choice) = trial(self)
        {
            return Ok(choice);
        }
        let mut rng = self.rng.clone();
        let mut pick = |proven_since: Option<Moment>| {
            let request = balance::Request { affinity: Some(key) };
            let view = View { gateway: self, tried, proven_since, now };
            balance::pick(&self.policies.balance, &view, &request, &self.cursor, &mut rng)
        };
        let picked = pick(proven_since).or_else(|| proven_since.and_then(|_| pick(None)));
        self.rng = rng;
        if let Some(i) = picked {
            return Ok(Choice::Ordinary(i));
        }
        if proven_since.is_some()
            && let Some(choice) = trial(self)
        {
            return Ok(choice);
        }
        let suspect = self.pick_suspect(tried, now);
        let (budget, policy) = (&mut self.budget, &self.policies.retry);
        match suspect.filter(|_| budget.withdraw_for_suspect(now, policy, paid)) {
            Some(i) => Ok(Choice::Suspect(i)),
            None => Err(self.nobody(tried, now)),
        }
    }

    fn pick_trial(&mut self, tried: &[usize], replayable: bool, now: Moment) -> Option<usize> {
        if replayable {
            for i in 0..self.backends.len() {
                let open = self.enabled(i) && !tried.contains(&i);
                if open
                    && self.standing(i, now) == Standing::Probation
                    && self.backends[i].health.begin_trial(now)
                {
                    return Some(i);
                }
            }
        }
        None
    }

    fn pick_suspect(&self, tried: &[usize], now: Moment) -> Option<usize> {
        let panic = Panic::judge(self.members(), self.eligible(now));
        (0..self.backends.len())
            .filter(|&i| {
                let backend = &self.backends[i];
                let standing = self.standing(i, now);
                backend.present
                    && !matches!(standing, Standing::Eligible { .. } | Standing::Probation)
                    && !tried.contains(&i)
                    && panic.admits(standing, backend.admin, backend.in_flight as usize)
            })
            .min_by(|&a, &b| {
                let factor = |i: usize| self.backends[i].failures.factor(now);
                factor(a).total_cmp(&factor(b))
            })
    }

    pub(crate) fn nobody(&self, tried: &[usize], now: Moment) -> Nobody {
        let (mut until, mut was_tried, mut full) = (None, false, false);
        for i in (0..self.backends.len()).filter(|&i| self.enabled(i)) {
            match self.standing(i, now) {
                _ if tried.contains(&i) => was_tried = true,
                Standing::Eligible { .. } => full = true,
                Standing::Busy { until: at } => {
                    until = Some(until.map_or(at, |earlier: Moment| earlier.min(at)));
                }
                Standing::Probation | Standing::Refusing | Standing::Out { .. } => {}
            }
        }
        match (was_tried, until, full) {
            (true, ..) => Nobody::AllTried,
            (false, _, true) => Nobody::Full,
            (false, Some(until), false) => Nobody::Busy(until),
            (false, None, false) => Nobody::Down,
        }
    }

    /// A newcomer.
    pub(crate) fn join(&mut self, i: usize, now: Moment) {
        self.backends[i].present = true;
        self.backends[i].health = Health::new(Arrival::Newcomer, now);
    }

    pub(crate) fn begin(&mut self, i: usize) {
        self.backends[i].in_flight += 1;
        self.peak = self.peak.max(self.backends[i].in_flight);
    }

    pub(crate) fn release(&mut self, i: usize) {
        self.backends[i].in_flight -= 1;
    }

    /// Takes one retry, where `first` is the first of its exchange.
    pub(crate) fn may_retry(&mut self, first: bool, now: Moment) -> Option<Grant> {
        if self.budget.withdraw(now, &self.policies.retry) {
            return Some(Grant::Budget);
        }
        (first && self.burst.withdraw(now, self.peak)).then_some(Grant::Burst)
    }

    /// Tells a judge something, and all judges that time has passed; returns what changed, in order.
    pub(crate) fn tell(&mut self, i: usize, told: Told, now: Moment, changes: &mut Vec<Change>) {
        let eligible_before = self.eligible(now);
        let good = matches!(told, Told::Observation(Observation::Success | Observation::FirstToken));
        let peers = if good && self.backends[i].plain { Peers::default() } else { self.peers(i, now) };
        let (policy, rng) = (&self.policies.health, &mut self.rng);
        let backend = &mut self.backends[i];
        let transition = match told {
            Told::Observation(observation) => {
                if observation == Observation::Fault {
                    backend.failures.fail(now);
                }
                backend.health.observe(policy, now, observation, &peers, rng)
            }
            Told::Probe(verdict) => backend.health.probe(policy, now, verdict, &peers, rng),
            Told::Slow(ratio) => backend.health.eject_slow(policy, now, ratio, &peers, rng),
            Told::Stuck(proof) => backend.health.eject_stuck(policy, now, proof, &peers, rng),
            Told::Tick => backend.health.tick(policy, now, &peers),
        };
        self.publish(i, now);
        let Some(transition) = transition else { return };
        self.took(i, told, transition, eligible_before, now, changes);
        self.settle(now, changes);
    }

    pub(crate) fn forgive(&mut self, i: usize, now: Moment) {
        self.backends[i].health.forgive();
        self.publish(i, now);
    }

    /// Lets every judge take notice of the time and of the others.
    pub(crate) fn settle(&mut self, now: Moment, changes: &mut Vec<Change>) {
        for i in (0..self.backends.len()).filter(|&i| self.backends[i].present).collect::<Vec<_>>() {
            for _ in 0..TRANSITIONS_MAX {
                let eligible_before = self.eligible(now);
                let peers = self.peers(i, now);
                let Some(transition) = self.backends[i].health.tick(&self.policies.health, now, &peers)
                else {
                    break;
                };
                self.took(i, Told::Tick, transition, eligible_before, now, changes);
            }
            self.publish(i, now);
        }
    }

    fn took(
        &mut self,
        i: usize,
        told: Told,
        transition: Transition,
        eligible_before: usize,
        now: Moment,
        changes: &mut Vec<Change>,
    ) {
        if matches!(transition, Transition::Ejected { .. } | Transition::Readmitted { .. }) {
            self.backends[i].speed.forget(now);
        }
        self.publish(i, now);
        changes.push(Change {
            backend: i,
            told,
            transition,
            eligible_before,
            eligible_after: self.eligible(now),
            ejected_after: (0..self.backends.len())
                .filter(|&i| self.enabled(i) && self.backends[i].health.is_ejected())
                .count(),
            members: self.members(),
        });
    }

    fn publish(&mut self, i: usize, now: Moment) {
        self.backends[i].plain =
            matches!(self.standing(i, now), Standing::Eligible { share } if share >= 1.0);
    }

    fn peers(&self, of: usize, now: Moment) -> Peers {
        let others = || (0..self.backends.len()).filter(move |&i| i != of && self.enabled(i));
        let all = || (0..self.backends.len()).filter(|&i| self.enabled(i));
        let mut rates: Vec<f64> =
            others().filter_map(|i| self.backends[i].health.success_rate(now)).collect();
        let (mut refuse, mut accept) = (0, 0);
        for i in all() {
            match self.backends[i].health.operational() {
                Operational::Refusing => refuse += 1,
                Operational::Unhealthy | Operational::Ejected { .. } | Operational::AwaitsProbe => {}
                Operational::Unknown
                | Operational::Healthy
                | Operational::SlowStart
                | Operational::Probation => {
                    accept += 1;
                }
            }
        }
        Peers {
            members: all().count(),
            others_eligible: others().filter(|&i| self.is_eligible(i, now)).count(),
            others_ejected: others().filter(|&i| self.backends[i].health.is_ejected()).count(),
            median_success: median(&mut rates),
            anyone_ever_passed: all().any(|i| self.backends[i].health.ever_passed()),
            everyone_refusing: refuse > 0 && accept == 0,
        }
    }

    /// Learns how fast an attempt was.
    pub(crate) fn saw_speed(
        &mut self,
        i: usize,
        measure: Measure,
        began: Moment,
        measured: Duration,
        now: Moment,
    ) {
        let backend = &mut self.backends[i];
        let (ewma, usual) = match measure {
            Measure::FirstToken => (&mut backend.first_token, self.median_first_token),
            Measure::TokenGap => (&mut backend.gap, self.median_gap),
        };
        ewma.observe(now, measured.as_secs_f64());
        if let Some(usual) = usual {
            let usual = Duration::from_secs_f64(usual);
            backend.speed.record(now, &Sample { measure, began, measured, usual });
        }
    }

    /// The look of a few times a second: what is usual, and who is slow.
    pub(crate) fn look(&mut self, now: Moment, changes: &mut Vec<Change>) {
        let latest = |of: fn(&Backend) -> &Ewma| {
            lower_median(&mut self.backends.iter().filter_map(|b| of(b).value()).collect::<Vec<f64>>())
        };
        (self.median_first_token, self.median_gap) = (latest(|b| &b.first_token), latest(|b| &b.gap));
        let policy = &self.policies.outlier;
        let readings: Vec<Reading> =
            self.backends.iter().map(|backend| backend.speed.reading(policy, now)).collect();
        for (i, own) in readings.iter().enumerate() {
            let peers = readings.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, peer)| peer);
            let slowness = outlier::slowness(&self.policies.outlier, own, peers);
            if let Some(ratio) = self.backends[i].speed.judge(&self.policies.outlier, now, slowness) {
                self.tell(i, Told::Slow(ratio), now, changes);
            }
        }
        self.settle(now, changes);
    }
}

impl Backend {
    fn new(member: &Member, n: u64) -> Self {
        Self {
            health: Health::new(Arrival::Founder, Moment::ZERO),
            admin: Administrative::Enabled,
            present: member.joins == Moment::ZERO,
            in_flight: 0,
            plain: false,
            failures: RecentFailures::default(),
            first_token: Ewma::default(),
            gap: Ewma::default(),
            speed: Speed::default(),
            weight: member.weight,
            tier: member.tier,
            in_flight_max: member.in_flight_max,
            identity: stable_hash(&n.to_le_bytes()),
        }
    }
}

struct View<'a> {
    gateway: &'a Gateway,
    tried: &'a [usize],
    /// Only who has shown life since.
    proven_since: Option<Moment>,
    now: Moment,
}

impl Candidates for View<'_> {
    fn len(&self) -> usize {
        self.gateway.backends.len()
    }

    fn tier(&self, i: usize) -> u8 {
        self.gateway.backends[i].tier
    }

    fn admissible(&self, i: usize) -> bool {
        let silence = &self.gateway.silence;
        self.proven_since.is_none_or(|since| silence.moved_at(i) >= since)
            && !silence.is_shunned(i)
            && self.gateway.enabled(i)
            && !self.tried.contains(&i)
            && self.gateway.has_room(i, self.now)
    }

    fn load(&self, i: usize) -> f64 {
        let backend = &self.gateway.backends[i];
        let slow = backend.speed.load_factor(&self.gateway.policies.outlier, self.now);
        f64::from(backend.in_flight + 1) * backend.failures.factor(self.now) * slow / self.weight(i)
    }

    fn weight(&self, i: usize) -> f64 {
        let share = match self.gateway.standing(i, self.now) {
            Standing::Eligible { share } => f64::from(share),
            _ => 1.0,
        };
        self.gateway.backends[i].weight * share
    }

    fn first_token(&self, i: usize) -> Option<f64> {
        let ewma = &self.gateway.backends[i].first_token;
        self.gateway
            .median_first_token
            .map_or_else(|| ewma.value(), |median| Some(ewma.value_towards(self.now, median)))
    }

    fn identity(&self, i: usize) -> u64 {
        self.gateway.backends[i].identity
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        return values.get(middle).copied();
    }
    Some((values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0)
}

fn lower_median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}
