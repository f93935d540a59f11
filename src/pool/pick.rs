//! Choosing a backend for the next attempt: `policy::balance` over what is known now.
//!
//! Order: a backend on trial if there is one, an eligible one not tried yet, in panic a suspect if the budget allows. Nobody is an
//! answer too, with the reason; whether one that was tried is asked again is the exchange's to say.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::clock;
use crate::policy::Moment;
use crate::policy::balance::{self, Candidates};
use crate::policy::dialect::Endpoint;
use crate::policy::health::{Administrative, Panic, Standing};
use crate::policy::progress::{CLASSES, Kind};
use crate::pool::backend::{Backend, BackendId, Record};
use crate::pool::in_flight::{InFlight, is_behind};
use crate::pool::line::Line;
use crate::pool::snapshot::{Member, Pool};
use crate::pool::state::PoolState;

/// Bytes of prompt that weigh as much as one more request.
const PROMPT_BYTES_PER_UNIT: u64 = 16 * 1024;
/// A prompt never weighs more than this many requests.
const PROMPT_UNITS_MAX: u64 = 64;
/// Units of one request, so that prompts can weigh fractions of it.
const UNITS: u64 = 16;

/// Work an attempt stands for: one request, and more for a long prompt.
pub(super) fn work_units(prompt_bytes: u64) -> u64 {
    UNITS + (prompt_bytes * UNITS / PROMPT_BYTES_PER_UNIT).min(PROMPT_UNITS_MAX * UNITS)
}

/// What speed is comparable: the endpoint, and whether it streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class(u8);

impl Class {
    /// How many there are.
    pub const COUNT: usize = CLASSES;

    /// The class of a request.
    pub fn of(endpoint: Endpoint, stream: bool) -> Self {
        Self(((endpoint as u8) * 2 + u8::from(stream)) % Self::COUNT as u8)
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }

    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u8).map(Self)
    }
}

/// What an attempt wants.
pub struct Wanted<'a> {
    /// Backends this exchange has tried.
    pub tried: &'a [BackendId],
    /// What speed to compare.
    pub class: Class,
    /// The model as the backends know it, where the pool serves several.
    pub model: Option<&'a str>,
    /// Hash of the affinity key.
    pub affinity: Option<u64>,
    /// Bytes of the request body.
    pub prompt_bytes: u64,
    /// The only backend that may take it, where it is kept apart from others.
    pub only: Option<BackendId>,
    /// Rather a backend that has shown life since: what failed once had better not meet a second that is sick.
    pub proven_since: Option<Moment>,
    /// Whether it may be lost: then it may be a backend's trial.
    pub replayable: bool,
    /// The retry budget has paid for this attempt already.
    pub paid: bool,
}

/// The backend of the next attempt, counted from now on.
pub struct Choice {
    /// Which one; its parameters are of this generation.
    pub pool: Arc<Pool>,
    /// Index in the pool.
    pub index: usize,
    /// The judge of the model asked for.
    pub record: Arc<Record>,
    /// Counts until dropped.
    pub in_flight: InFlight,
    /// Held while it is this backend's trial: its outcome decides on the backend's return.
    pub trial: Option<Trial>,
    /// Too few were eligible, and it was paid for from the budget.
    pub(super) suspect: bool,
    /// The line it was let in from, while that lets a crowd in: it hears of the first token.
    pub let_in: Option<Arc<Line>>,
}

/// The single trial of a backend in probation. Dropping it without an outcome lets another request try.
pub struct Trial {
    judge: Arc<Record>,
    state: Arc<PoolState>,
    began: Moment,
}

impl Drop for Trial {
    fn drop(&mut self) {
        // Harmless once an outcome was observed.
        self.judge.abandon_trial(self.began);
        self.state.open_trials();
    }
}

impl Choice {
    /// The member chosen.
    pub fn member(&self) -> &Member {
        &self.pool.members[self.index]
    }

    /// The backend chosen.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.member().backend
    }

    /// Whether an attempt that has waited elsewhere since `since` has little to hope for from it: it is out, on trial,
    /// or itself late with others' first tokens and has shown no life in that time.
    pub fn is_doubtful(&self, since: Moment) -> bool {
        self.suspect || self.trial.is_some() || is_behind(self.backend(), since, clock::now())
    }
}

/// Why nobody can take an attempt now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nobody {
    /// Somebody is up, and all who are have as many attempts as they take.
    Full,
    /// All that are up asked to be left alone.
    Busy {
        /// The earliest time one may be asked again.
        until: Moment,
    },
    /// None is up, and those that are out have all been asked lately.
    Down,
    /// All that are up were tried by this exchange.
    AllTried,
}

impl Pool {
    /// Chooses a backend and counts the attempt.
    ///
    /// # Errors
    /// Why nobody can take it.
    pub fn pick(self: &Arc<Self>, wanted: &Wanted<'_>, rng: &mut fastrand::Rng) -> Result<Choice, Nobody> {
        let now = clock::now();
        let again = wanted.proven_since.is_some();
        // Who failed once had better not meet a convalescent next.
        if !again && let Some(choice) = self.pick_trial(wanted, now) {
            return Ok(choice);
        }
        let mut pick = |proven_since| {
            let view = View { pool: self, wanted, proven_since, now };
            let request = balance::Request { affinity: wanted.affinity };
            balance::pick(&self.config.balance, &view, &request, &self.state.cursor, rng)
        };
        let chosen = pick(wanted.proven_since).or_else(|| if again { pick(None) } else { None });
        if let Some(i) = chosen {
            return Ok(self.choose(i, wanted, now));
        }
        let trial = if again { self.pick_trial(wanted, now) } else { None };
        trial.or_else(|| self.pick_suspect(wanted, now)).ok_or_else(|| self.nobody(wanted))
    }

    /// A backend whose ejection is over needs one real request to come back.
    fn pick_trial(self: &Arc<Self>, wanted: &Wanted<'_>, now: Moment) -> Option<Choice> {
        if !self.state.trials_open() {
            return None;
        }
        let mut any = false;
        for (i, member) in self.members.iter().enumerate() {
            let record = self.record(i, wanted.model);
            let waits = |record: &Record| record.standing(&self.config.health, now) == Standing::Probation;
            let (whole, model) = (member.backend.whole(), &record);
            if !waits(whole) && !waits(model) {
                continue;
            }
            any = true;
            let open = member.backend.admin() == Administrative::Enabled
                && !wanted.has_tried(member)
                && !self.lacks(i, wanted.model)
                && !self.yields_to_doubt(i, wanted, now);
            let judge = if waits(whole) { whole } else { model };
            let may_try = || wanted.replayable || judge.read(|health| health.takes_any_trial(now));
            if open && may_try() && judge.begin_trial(now) {
                let trial = Trial { judge: judge.clone(), state: self.state.clone(), began: now };
                return Some(Choice { trial: Some(trial), ..self.choose(i, wanted, now) });
            }
        }
        if !any {
            self.state.close_trials();
        }
        None
    }

    /// Too few are eligible: one that is out carries a single attempt (graded panic), if the budget allows it. A
    /// pool that is down would get each request that comes otherwise, the first attempt of all of them.
    fn pick_suspect(self: &Arc<Self>, wanted: &Wanted<'_>, now: Moment) -> Option<Choice> {
        let enabled = |m: &Member| m.backend.admin() == Administrative::Enabled;
        let members = self.members.iter().filter(|m| enabled(m)).count();
        let eligible = (0..self.members.len())
            .filter(|&i| enabled(&self.members[i]))
            .filter(|&i| matches!(self.standing(i, wanted.model, now), Standing::Eligible { .. }))
            .count();
        let panic = Panic::judge(members, eligible);
        let open: SmallVec<[usize; 8]> = (0..self.members.len())
            .filter(|&i| {
                let member = &self.members[i];
                let standing = self.standing(i, wanted.model, now);
                !matches!(standing, Standing::Eligible { .. } | Standing::Probation)
                    && !wanted.has_tried(member)
                    && !self.lacks(i, wanted.model)
                    && panic.admits(standing, member.backend.admin(), member.backend.in_flight() as usize)
            })
            .collect();
        // The least bad: the one that failed least lately.
        let factor = |i: usize| self.members[i].backend.whole().failure_factor(now);
        let best = open.into_iter().min_by(|&a, &b| factor(a).total_cmp(&factor(b)))?;
        let may = self.state.may_try_suspect(&self.config.retry, wanted.paid, now);
        may.then(|| Choice { suspect: !wanted.paid, ..self.choose(best, wanted, now) })
    }

    fn choose(self: &Arc<Self>, index: usize, wanted: &Wanted<'_>, now: Moment) -> Choice {
        let backend = &self.members[index].backend;
        Choice {
            pool: self.clone(),
            index,
            record: self.record(index, wanted.model),
            in_flight: InFlight::begin(
                backend,
                &self.state,
                work_units(wanted.prompt_bytes),
                Kind::of(wanted.class.index(), wanted.prompt_bytes),
                now,
            ),
            trial: None,
            suspect: false,
            let_in: None,
        }
    }

    /// Why nobody can take it now, where that is so.
    pub fn nobody(&self, wanted: &Wanted<'_>) -> Nobody {
        let now = clock::now();
        let mut until: Option<Moment> = None;
        let (mut tried, mut full) = (false, false);
        for (i, member) in self.members.iter().enumerate() {
            if member.backend.admin() != Administrative::Enabled {
                continue;
            }
            match self.standing(i, wanted.model, now) {
                _ if wanted.has_tried(member) => tried = true,
                Standing::Eligible { .. } => full = true,
                Standing::Busy { until: at } => until = Some(until.map_or(at, |u| u.min(at))),
                Standing::Probation | Standing::Refusing | Standing::Out { .. } => {}
            }
        }
        match (tried, full, until) {
            (true, ..) => Nobody::AllTried,
            (false, true, _) => Nobody::Full,
            (false, false, Some(until)) => Nobody::Busy { until },
            (false, false, None) => Nobody::Down,
        }
    }

    /// Most exchanges that may wait.
    pub fn queue_length_max(&self, model: Option<&str>) -> usize {
        let now = clock::now();
        let eligible = (0..self.members.len()).filter(|&i| {
            self.members[i].backend.admin() == Administrative::Enabled
                && matches!(self.standing(i, model, now), Standing::Eligible { .. })
        });
        self.config.queue.length_max.of(eligible.map(|i| self.members[i].cap()))
    }

    /// When the first of those that asked to be left alone may be asked again; none while another takes work.
    pub fn busy_until(&self, model: Option<&str>) -> Option<Moment> {
        let now = clock::now();
        let mut first: Option<Moment> = None;
        for (i, member) in self.members.iter().enumerate() {
            if member.backend.admin() != Administrative::Enabled {
                continue;
            }
            match self.standing(i, model, now) {
                Standing::Eligible { .. } | Standing::Probation => return None,
                Standing::Busy { until } => first = Some(first.map_or(until, |first| first.min(until))),
                Standing::Refusing | Standing::Out { .. } => {}
            }
        }
        first
    }

    /// What may be sent to member `i` for `model`: the stricter of its two judges, and nothing of what it is known
    /// not to serve.
    pub fn standing(&self, i: usize, model: Option<&str>, now: Moment) -> Standing {
        let backend = &self.members[i].backend;
        if self.lacks(i, model) {
            return Standing::Out { until: None };
        }
        let whole = backend.whole().standing(&self.config.health, now);
        if model.is_none() || !matches!(whole, Standing::Eligible { .. }) {
            return whole;
        }
        let own = self.record(i, model).standing(&self.config.health, now);
        match (whole, own) {
            (Standing::Eligible { share: a }, Standing::Eligible { share: b }) => {
                Standing::Eligible { share: a.min(b) }
            }
            (_, own) => own,
        }
    }

    pub(super) fn record(&self, i: usize, model: Option<&str>) -> Arc<Record> {
        self.members[i].backend.record(model, &self.config.health)
    }
}

impl Wanted<'_> {
    /// Whether it is out of the question: tried, or not the only one that may take it.
    pub(super) fn has_tried(&self, member: &Member) -> bool {
        let id = member.backend.id;
        self.only.is_some_and(|only| only != id) || self.tried.contains(&id)
    }
}

/// The pool as the balancer sees it.
struct View<'a> {
    pool: &'a Pool,
    wanted: &'a Wanted<'a>,
    /// Only who has shown life since.
    proven_since: Option<Moment>,
    now: Moment,
}

impl View<'_> {
    fn share(&self, i: usize) -> f64 {
        match self.pool.standing(i, self.wanted.model, self.now) {
            Standing::Eligible { share } => f64::from(share),
            _ => 1.0,
        }
    }
}

impl Candidates for View<'_> {
    fn len(&self) -> usize {
        self.pool.members.len()
    }

    fn tier(&self, i: usize) -> u8 {
        self.pool.members[i].params.tier
    }

    fn admissible(&self, i: usize) -> bool {
        let member = &self.pool.members[i];
        let backend = &member.backend;
        if self.proven_since.is_some_and(|since| backend.signs.moved_at() < since) {
            return false;
        }
        let shunned = backend.signs.is_shunned();
        if backend.admin() != Administrative::Enabled || shunned || self.wanted.has_tried(member) {
            return false;
        }
        let Standing::Eligible { share } = self.pool.standing(i, self.wanted.model, self.now) else {
            return false;
        };
        if backend.is_doubted() && self.pool.yields_to_doubt(i, self.wanted, self.now) {
            return false;
        }
        match member.cap() {
            None => true,
            Some(cap) => f64::from(backend.in_flight()) < (f64::from(cap) * f64::from(share)).max(1.0),
        }
    }

    fn load(&self, i: usize) -> f64 {
        let backend = &self.pool.members[i].backend;
        let work = backend.work.load(std::sync::atomic::Ordering::Relaxed);
        let others = u64::from(backend.foreign.requests(self.now)) * UNITS;
        let coming = UNITS;
        let penalty = backend.whole().failure_factor(self.now) * backend.signs.slow_factor();
        (work + others + coming) as f64 * penalty / (UNITS as f64 * self.weight(i))
    }

    fn weight(&self, i: usize) -> f64 {
        f64::from(self.pool.members[i].params.weight.get()) * self.share(i)
    }

    fn first_token(&self, i: usize) -> Option<f64> {
        let median = self.pool.state.median_first_token(self.wanted.class);
        self.pool.record(i, self.wanted.model).expected_first_token(self.wanted.class, self.now, median)
    }

    fn identity(&self, i: usize) -> u64 {
        self.pool.members[i].backend.identity
    }

    fn tiers_uniform(&self) -> bool {
        self.pool.tiers_uniform
    }
}
