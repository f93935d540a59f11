//! Observations in, transitions out: where `policy::health` meets the backends.
//!
//! Every transition passes through `publish` once: told, counted, and followed by what it means here
//! (waiting attempts rescued, kept connections closed, a trial opened, those who wait called). Peers are
//! read before the lock of the one who is judged, so two judges never wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock;
use crate::config::ProbeKind;
use crate::policy::Moment;
use crate::policy::health::{
    Administrative, Observation, Operational, Panic, Peers, ProbeVerdict, Standing, Transition,
};
use crate::pool::backend::{Backend, Record};
use crate::pool::pick::{Choice, Class};
use crate::pool::snapshot::{Member, Pool};
use crate::telemetry::events::BackendTransition;
use crate::telemetry::metrics::{ModelMetrics, ProbeResult};

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
        if about == About::Backend && observation == Observation::Fault {
            self.lost_connection();
        }
        let model = self.model_of(record);
        self.note(about, observation);
        self.pool.observe(self.index, record, model.as_deref(), observation, rng);
        // Whatever model it serves, the address works; a failure is only the model's until the address fails.
        if model.is_some() && matches!(observation, Observation::Success | Observation::FirstToken) {
            self.pool.observe(self.index, self.backend().whole(), None, observation, rng);
        }
    }

    /// Counts an attempt that has come to its gate, for its model.
    pub fn count_attempt(&self) {
        self.model_metrics().iter().for_each(|metrics| metrics.attempts.inc());
    }

    /// Counts a fault, for its model.
    pub fn count_fault(&self) {
        self.model_metrics().iter().for_each(|metrics| metrics.faults.inc());
    }

    fn model_metrics(&self) -> Option<&Arc<ModelMetrics>> {
        let other = || self.pool.judges_models().then(|| self.backend().other_models());
        self.record.metrics.as_ref().or_else(other)
    }

    /// What the observation says of caps, of the pace and of the budget.
    fn note(&self, about: About, observation: Observation) {
        match observation {
            Observation::FirstToken => {
                self.backend().took_one();
                if let Some(line) = &self.let_in {
                    line.first_token(clock::now());
                }
            }
            Observation::Success => self.pool.state.finished(),
            Observation::Busy { .. } => self.backend().refused_one(clock::now()),
            Observation::Fault | Observation::Misconfigured | Observation::Silent | Observation::Neutral => {}
        }
        if about == About::Backend {
            // There was no connection.
            self.nothing_sent();
        }
    }

    /// Nothing was sent: an attempt at a suspect costs nothing then.
    pub fn nothing_sent(&self) {
        if self.suspect {
            self.pool.state.refund_suspect();
        }
    }

    /// Whether the backend has served others since this attempt began, so that a failure may be the request's own.
    pub fn serves(&self) -> bool {
        let (now, since) = (clock::now(), self.in_flight.started());
        self.record.read(|health| health.serves(now, since))
    }

    /// What is needed to take a fault back later.
    pub fn receipt(&self) -> Receipt {
        Receipt { pool: self.pool.clone(), record: self.record.clone(), since: self.in_flight.started() }
    }

    /// The counter that grows when this choice's backend is ejected, and its value now.
    pub fn ejections(&self) -> (Arc<AtomicU64>, u64) {
        self.record.ejections()
    }

    /// The counter that grows when streams here should look whether they can stay, and its value now.
    pub fn calls(&self) -> (Arc<AtomicU64>, u64) {
        self.record.calls()
    }

    pub(super) fn model_of(&self, record: &Arc<Record>) -> Option<String> {
        let models =
            if Arc::ptr_eq(record, self.backend().whole()) { return None } else { self.backend().models() };
        models.into_iter().find(|(_, r)| Arc::ptr_eq(r, record)).map(|(name, _)| name)
    }
}

/// A fault that was observed, to be taken back if it turns out to be the request's own.
pub struct Receipt {
    pool: Arc<Pool>,
    record: Arc<Record>,
    /// When the attempt began.
    since: Moment,
}

impl Receipt {
    /// Whether the backend has served others since: by now there may be more to say than when it failed.
    pub fn serves(&self) -> bool {
        let now = clock::now();
        self.record.read(|health| health.serves(now, self.since))
    }

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

    /// Whether [`Backend::want_verify`] brings a [`Verified`](crate::policy::progress::Verified): whether a probe asks the
    /// engine something. A connection proves nothing, for the kernel accepts it on behalf of a frozen process.
    pub fn can_verify(&self, i: usize) -> bool {
        debug_assert!(i < self.members.len());
        match self.config.probe.kind {
            ProbeKind::Http | ProbeKind::Generate(_) => true,
            ProbeKind::Tcp | ProbeKind::Off => false,
        }
    }

    /// Lets time pass: ejections end, slow starts end, medians and gauges are brought up to date. Called a few
    /// times a second by one task.
    pub fn tick(&self) {
        let now = clock::now();
        self.watch_progress(now);
        self.settle(now);
        self.members.iter().for_each(|member| {
            member.backend.forget_cap(now);
            member.backend.records().for_each(|record| record.forget_offences(now));
        });
        self.state.count_finished(now);
        self.state.tick_lines(now);
        self.state.turn_peak(now);
        self.state.publish_budget(&self.config.retry, now);
        for class in Class::all() {
            let mut times: Vec<f64> = self
                .members
                .iter()
                .filter_map(|member| member.backend.whole().latest_first_token(class))
                .collect();
            self.state.set_median_first_token(class, lower_median(&mut times));
        }
        self.publish_standing();
    }

    /// What the operator wants of member `i`; told by the caller.
    pub fn set_admin(&self, i: usize, state: Administrative) {
        self.members[i].backend.set_admin(state);
        self.compare_lists();
        self.settle(clock::now());
        self.publish_standing();
        self.state.backend_returned();
    }

    pub(super) fn observe(
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
    pub(super) fn settle(&self, now: Moment) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        self.settle_model(None, now);
        let mut models: Vec<String> = self.members.iter().flat_map(|m| m.backend.model_names()).collect();
        models.sort_unstable();
        models.dedup();
        for model in &models {
            self.settle_model(Some(model), now);
        }
    }

    fn settle_model(&self, model: Option<&str>, now: Moment) {
        let policy = &self.config.health;
        let mut census = self.census(model, now);
        for i in 0..self.members.len() {
            let record = self.record(i, model);
            for _ in 0..TRANSITIONS_PER_TICK {
                let peers = census.without(i);
                let transition = record.judge(policy, now, |health| health.tick(policy, now, &peers));
                let Some(transition) = transition else { break };
                self.publish(i, &record, model, &transition);
                // Rare; and those who come after must see it.
                census = self.census(model, now);
            }
        }
    }

    pub(super) fn peers(&self, i: usize, model: Option<&str>, now: Moment) -> Peers {
        self.census(model, now).without(i)
    }

    /// What the judges must know of each other, taken once for all of them.
    fn census(&self, model: Option<&str>, now: Moment) -> Census {
        let members = self.members.iter().enumerate();
        let entries: Vec<Entry> = members.map(|(j, member)| self.entry(j, member, model, now)).collect();
        let mut rates: Vec<f64> = entries.iter().filter_map(|entry| entry.rate).collect();
        rates.sort_unstable_by(f64::total_cmp);
        let count = |holds: fn(&Entry) -> bool| entries.iter().filter(|entry| holds(entry)).count();
        Census {
            enabled: count(|entry| entry.enabled),
            eligible: count(|entry| entry.eligible),
            ejected: count(|entry| entry.ejected),
            anyone_ever_passed: entries.iter().any(|entry| entry.ever_passed),
            everyone_refusing: count(|entry| entry.refuses) > 0 && count(|entry| entry.accepts) == 0,
            entries,
            rates,
        }
    }

    fn entry(&self, j: usize, member: &Member, model: Option<&str>, now: Moment) -> Entry {
        if member.backend.admin() != Administrative::Enabled {
            return Entry::default();
        }
        let (record, whole) = (self.record(j, model), member.backend.whole());
        let (operational, ever_passed) = whole.read(|health| (health.operational(), health.ever_passed()));
        let (refuses, accepts) = match operational {
            Operational::Refusing => (true, false),
            Operational::Unhealthy | Operational::Ejected { .. } | Operational::AwaitsProbe => (false, false),
            Operational::Unknown | Operational::Healthy | Operational::SlowStart | Operational::Probation => {
                (false, true)
            }
        };
        let (ejected, rate) = record.read(|health| (health.is_ejected(), health.success_rate(now)));
        Entry {
            enabled: true,
            eligible: matches!(self.standing(j, model, now), Standing::Eligible { .. }),
            ejected: ejected || whole.read(|health| health.is_ejected()),
            ever_passed,
            refuses,
            accepts,
            rate,
        }
    }

    /// Tells a transition, and does what follows from it.
    pub(super) fn publish(
        &self,
        i: usize,
        record: &Arc<Record>,
        model: Option<&str>,
        transition: &Transition,
    ) {
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
                backend.distrust();
                backend.signs.forget_speed(clock::now());
                self.rescue(backend, record, model);
            }
            Transition::Probation | Transition::ProbesPassed { probation: true, .. } => {
                self.state.open_trials();
                self.state.look();
            }
            Transition::Readmitted { .. } => {
                backend.signs.forget_speed(clock::now());
                record.forget_failures();
                backend.whole().forget_failures();
                self.state.backend_returned();
            }
            Transition::ProbesPassed { .. } | Transition::ProvenByTraffic | Transition::RefusalOver => {
                self.state.backend_returned();
            }
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
        self.state.backend_lost(backend.in_flight());
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
            let quarantined = member.backend.records().any(|record| record.quarantined_since().is_some());
            member.backend.metrics.quarantined.set(i64::from(quarantined));
            member.backend.publish_models(&self.config.health, now, open);
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
        if !self.judges_models() {
            return None;
        }
        // Only names somebody vouches for get a record: a client must not fill memory with inventions.
        model.filter(|name| {
            self.config.models.iter().any(|known| known == name)
                || self.lists(name)
                || self.state.has_served(name)
        })
    }

    /// Whether several models are served here, so that each is judged by itself.
    fn judges_models(&self) -> bool {
        self.config.models.len() > 1 || self.state.several_models.load(Ordering::Relaxed)
    }
}

/// What a judge must know of one backend. All false, and no rate, for one that is not enabled.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    enabled: bool,
    eligible: bool,
    ejected: bool,
    ever_passed: bool,
    refuses: bool,
    accepts: bool,
    rate: Option<f64>,
}

/// All entries, and their sums: `Peers` of one backend are the sums without its own.
struct Census {
    entries: Vec<Entry>,
    enabled: usize,
    eligible: usize,
    ejected: usize,
    anyone_ever_passed: bool,
    everyone_refusing: bool,
    /// In their order.
    rates: Vec<f64>,
}

impl Census {
    fn without(&self, i: usize) -> Peers {
        let own = &self.entries[i];
        Peers {
            members: self.enabled,
            others_eligible: self.eligible - usize::from(own.eligible),
            others_ejected: self.ejected - usize::from(own.ejected),
            median_success: self.median_without(own.rate),
            anyone_ever_passed: self.anyone_ever_passed,
            everyone_refusing: self.everyone_refusing,
        }
    }

    fn median_without(&self, own: Option<f64>) -> Option<f64> {
        let skipped = own.map_or(self.rates.len(), |own| self.rates.partition_point(|rate| *rate < own));
        let others = self.rates.len() - usize::from(own.is_some());
        let nth = |n: usize| self.rates.get(n + usize::from(n >= skipped)).copied();
        match others {
            0 => None,
            odd if odd % 2 == 1 => nth(odd / 2),
            even => Some((nth(even / 2 - 1)? + nth(even / 2)?) / 2.0),
        }
    }
}

/// The middle value, the lower of two. Of two backends that is the faster: drawn towards a mean that it is part of
/// itself, one that was slow once would look slow for ever, and on an idle pool never be asked again.
fn lower_median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::balance::Ewma;
    use proptest::prelude::*;
    use std::time::Duration;

    fn median(values: &mut [f64]) -> Option<f64> {
        if values.is_empty() {
            return None;
        }
        values.sort_unstable_by(f64::total_cmp);
        let middle = values.len() / 2;
        Some(if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 })
    }

    #[test]
    fn of_two_backends_the_one_that_was_slow_is_equal_again_within_a_minute() {
        let (mut slow, mut fast) = (Ewma::default(), Ewma::default());
        let then = Moment::from_micros(1_000_000);
        slow.observe(then, 1.0);
        let now = then + Duration::from_secs(60);
        fast.observe(now, 0.01);
        let median = lower_median(&mut [slow.value().unwrap(), fast.value().unwrap()]).unwrap();
        let apart = slow.value_towards(now, median) - fast.value_towards(now, median);
        assert!(apart < 0.02, "{apart} s apart after a minute");
    }

    proptest! {
        #[test]
        fn the_median_without_one_is_the_median_of_the_others(
            rates in prop::collection::vec(prop::option::of(0u8..5), 1..12),
            i in any::<prop::sample::Index>(),
        ) {
            let entries: Vec<Entry> = rates
                .iter()
                .map(|rate| Entry { rate: rate.map(f64::from), ..Entry::default() })
                .collect();
            let i = i.index(entries.len());
            let mut sorted: Vec<f64> = entries.iter().filter_map(|entry| entry.rate).collect();
            sorted.sort_unstable_by(f64::total_cmp);
            let others = entries.iter().enumerate().filter(|(j, _)| *j != i);
            let mut others: Vec<f64> = others.filter_map(|(_, entry)| entry.rate).collect();
            let census = Census {
                rates: sorted,
                enabled: 0,
                eligible: 0,
                ejected: 0,
                anyone_ever_passed: false,
                everyone_refusing: false,
                entries,
            };
            prop_assert_eq!(census.without(i).median_success, median(&mut others));
        }
    }
}
