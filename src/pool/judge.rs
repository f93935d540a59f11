//! Observations in, transitions out: where `policy::health` meets the backends.
//!
//! Every transition passes through `publish` once: told, counted, and followed by what it means here
//! (waiting attempts rescued, kept connections closed, a trial opened, those who wait woken). Peers are
//! read before the lock of the one who is judged, so two judges never wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock;
use crate::policy::Moment;
use crate::policy::health::{
    Administrative, Observation, Operational, Panic, Peers, ProbeVerdict, Standing, Transition,
};
use crate::pool::backend::{Backend, Record};
use crate::pool::pick::{Choice, Class};
use crate::pool::snapshot::{Member, Pool};
use crate::telemetry::events::BackendTransition;
use crate::telemetry::metrics::ProbeResult;

/// Transitions one tick may take a record through; more would be a loop.
const TRANSITIONS_PER_TICK: usize = 4;

/// Which judge an observation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The address: no connection, no HTTP.
    Backend,
    /// The model asked for, where the pool serves several.
    Model,
}

impl Choice {
    /// Teaches the judge of this choice what an attempt showed.
    pub fn observe(&self, about: About, observation: Observation, rng: &mut fastrand::Rng) {
        let record = match about {
            About::Backend => self.backend().whole(),
            About::Model => &self.record,
        };
        let model = self.model_of(record);
        self.pool.observe(self.index, record, model.as_deref(), observation, rng);
    }

    /// Whether the backend serves others, so that a failure may be the request's own.
    pub fn serves(&self) -> bool {
        let now = clock::now();
        self.record.read(|health| health.serves(now))
    }

    /// What is needed to take a fault back later.
    pub fn receipt(&self) -> Receipt {
        Receipt { pool: self.pool.clone(), record: self.record.clone() }
    }

    /// The counter that grows when this choice's backend is ejected, and its value now.
    pub fn ejections(&self) -> (Arc<AtomicU64>, u64) {
        self.record.ejections()
    }

    fn model_of(&self, record: &Arc<Record>) -> Option<String> {
        let models =
            if Arc::ptr_eq(record, self.backend().whole()) { return None } else { self.backend().models() };
        models.into_iter().find(|(_, r)| Arc::ptr_eq(r, record)).map(|(name, _)| name)
    }
}

/// A fault that was observed, to be taken back if it turns out to be the request's own.
pub struct Receipt {
    pool: Arc<Pool>,
    record: Arc<Record>,
}

impl Receipt {
    /// The fault observed last was the request's own.
    pub fn forgive(self) {
        self.record.judge(&self.pool.config.health, clock::now(), |health| {
            health.forgive();
            None
        });
    }
}

impl Pool {
    /// Takes in the result of one probe of member `i`.
    pub fn probed(&self, i: usize, verdict: ProbeVerdict, rng: &mut fastrand::Rng) {
        let now = clock::now();
        let member = &self.members[i];
        member.backend.metrics.count_probe(ProbeResult::from(verdict));
        let record = member.backend.whole();
        let peers = self.peers(i, None, now);
        if let Some(transition) = record.probe(&self.config.health, now, verdict, &peers, rng) {
            self.publish(i, record, None, &transition);
            self.settle(now);
        }
    }

    /// Whether the prober of member `i` may use its long interval.
    pub fn is_steady(&self, i: usize) -> bool {
        self.members[i].backend.whole().read(|health| health.steady(clock::now()))
    }

    /// Lets time pass: ejections end, slow starts end, medians and gauges are brought up to date. Called a few
    /// times a second by one task.
    pub fn tick(&self) {
        let now = clock::now();
        self.settle(now);
        self.state.turn_peak(now);
        self.state.publish_budget(&self.config.retry, now);
        for class in Class::all() {
            let mut times: Vec<f64> = self
                .members
                .iter()
                .filter_map(|member| member.backend.whole().latest_first_token(class))
                .collect();
            self.state.set_median_first_token(class, median(&mut times));
        }
        self.publish_standing();
    }

    /// What the operator wants of member `i`; told by the caller.
    pub fn set_admin(&self, i: usize, state: Administrative) {
        self.members[i].backend.set_admin(state);
        self.settle(clock::now());
        self.publish_standing();
        self.state.wake_all();
    }

    fn observe(
        &self,
        i: usize,
        record: &Arc<Record>,
        model: Option<&str>,
        observation: Observation,
        rng: &mut fastrand::Rng,
    ) {
        let now = clock::now();
        let peers = || self.peers(i, model, now);
        if let Some(transition) = record.observe(&self.config.health, now, observation, peers, rng) {
            self.publish(i, record, model, &transition);
            self.settle(now);
        }
    }

    /// Lets every judge take notice of the time and of the others, until none has anything to say.
    fn settle(&self, now: Moment) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        for (i, member) in self.members.iter().enumerate() {
            self.settle_one(i, member.backend.whole(), None, now);
            for (model, record) in member.backend.models() {
                self.settle_one(i, &record, Some(&model), now);
            }
        }
    }

    fn settle_one(&self, i: usize, record: &Arc<Record>, model: Option<&str>, now: Moment) {
        for _ in 0..TRANSITIONS_PER_TICK {
            let peers = self.peers(i, model, now);
            let policy = &self.config.health;
            let Some(transition) = record.judge(policy, now, |health| health.tick(policy, now, &peers))
            else {
                return;
            };
            self.publish(i, record, model, &transition);
        }
    }

    fn peers(&self, i: usize, model: Option<&str>, now: Moment) -> Peers {
        let mut peers = Peers { everyone_refusing: true, ..Peers::default() };
        let mut rates = Vec::new();
        let mut refusing = false;
        for (j, member) in self.members.iter().enumerate() {
            if member.backend.admin() != Administrative::Enabled {
                continue;
            }
            peers.members += 1;
            let record = self.record(j, model);
            peers.anyone_ever_passed |= member.backend.whole().read(|health| health.ever_passed());
            match member.backend.whole().read(|health| health.operational()) {
                Operational::Refusing => refusing = true,
                Operational::Unhealthy | Operational::Ejected { .. } | Operational::AwaitsProbe => {}
                Operational::Unknown
                | Operational::Healthy
                | Operational::SlowStart
                | Operational::Probation => peers.everyone_refusing = false,
            }
            if j == i {
                continue;
            }
            if matches!(self.standing(j, model, now), Standing::Eligible { .. }) {
                peers.others_eligible += 1;
            }
            let ejected = |record: &Record| record.read(|health| health.is_ejected());
            if ejected(&record) || ejected(member.backend.whole()) {
                peers.others_ejected += 1;
            }
            rates.extend(record.read(|health| health.success_rate(now)));
        }
        peers.everyone_refusing &= refusing;
        peers.median_success = median(&mut rates);
        peers
    }

    /// Tells a transition, and does what follows from it.
    fn publish(&self, i: usize, record: &Arc<Record>, model: Option<&str>, transition: &Transition) {
        let member = &self.members[i];
        let backend = &member.backend;
        let (ejected_for, worse) = match transition {
            Transition::Ejected { reason, .. } => (Some(reason.name()), true),
            Transition::TrialFailed { .. } => (Some("trial_failed"), true),
            Transition::ProbesFailed { .. } | Transition::ProbesOutvoted { .. } | Transition::Kept { .. } => {
                (None, true)
            }
            Transition::ProbesPassed { weak, .. } => (None, *weak),
            Transition::ProvenByTraffic
            | Transition::Refusing
            | Transition::RefusalOver
            | Transition::Busy { .. }
            | Transition::AwaitsProbe
            | Transition::Probation
            | Transition::Readmitted { .. }
            | Transition::SlowStartOver => (None, false),
        };
        BackendTransition {
            at: &backend.metrics,
            model,
            name: transition.name(),
            transition,
            ejected_for,
            worse,
        }
        .emit(&self.state.telemetry);
        match transition {
            Transition::Ejected { .. } | Transition::TrialFailed { .. } | Transition::ProbesFailed { .. } => {
                self.rescue(backend, record, model);
            }
            Transition::Probation | Transition::ProbesPassed { probation: true, .. } => {
                self.state.open_trials();
                self.state.wake_all();
            }
            Transition::ProbesPassed { .. }
            | Transition::ProvenByTraffic
            | Transition::RefusalOver
            | Transition::Readmitted { .. } => self.state.wake_all(),
            Transition::ProbesOutvoted { .. }
            | Transition::Refusing
            | Transition::Busy { .. }
            | Transition::Kept { .. }
            | Transition::AwaitsProbe
            | Transition::SlowStartOver => {}
        }
        backend.nudge_prober();
        self.publish_standing();
    }

    /// Attempts that wait at a backend that was just taken out are moved; its kept connections are of no more use.
    fn rescue(&self, backend: &Backend, record: &Record, model: Option<&str>) {
        match model {
            Some(_) => record.ejected(),
            None => {
                backend.rescue_waiting();
                backend.close_kept();
            }
        }
    }

    /// Brings the gauges up to date.
    pub(super) fn publish_standing(&self) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        let now = clock::now();
        let (mut enabled, mut eligible) = (0, 0);
        for (i, member) in self.members.iter().enumerate() {
            let open = self.is_eligible(i, member, now);
            let up = member.backend.whole().read(|health| {
                matches!(
                    health.operational(),
                    Operational::Healthy | Operational::SlowStart | Operational::Unknown
                )
            });
            member.backend.metrics.healthy.set(i64::from(up));
            member.backend.metrics.eligible.set(i64::from(open));
            enabled += usize::from(member.backend.admin() == Administrative::Enabled);
            eligible += usize::from(open);
        }
        let panic = Panic::judge(enabled, eligible) == Panic::Graded;
        self.state.metrics.eligible.set(i64::try_from(eligible).unwrap_or(i64::MAX));
        self.state.metrics.panic_mode.set(i64::from(panic));
    }

    fn is_eligible(&self, i: usize, member: &Member, now: Moment) -> bool {
        member.backend.admin() == Administrative::Enabled
            && matches!(self.standing(i, None, now), Standing::Eligible { .. })
    }

    /// Members that may receive a new attempt now.
    pub fn eligible(&self) -> usize {
        let now = clock::now();
        self.members.iter().enumerate().filter(|(i, member)| self.is_eligible(*i, member, now)).count()
    }

    /// The name under which a request's model is judged: none where the pool serves but one.
    pub fn judged_model<'m>(&self, model: Option<&'m str>) -> Option<&'m str> {
        if self.config.models.len() < 2 && !self.state.several_models.load(Ordering::Relaxed) {
            return None;
        }
        // Only names somebody vouches for get a record: a client must not fill memory with inventions.
        model.filter(|name| self.config.models.iter().any(|known| known == name) || self.lists(name))
    }

    /// Member `i` lists these models.
    pub fn set_listed(&self, i: usize, listed: crate::pool::Listed) {
        if listed.ids.len() > 1 {
            self.state.several_models.store(true, Ordering::Relaxed);
        }
        self.members[i].backend.set_listed(listed);
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 })
}
