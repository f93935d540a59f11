//! Who answers at an address: doubted after every absence, believed by the list of models.
//!
//! Where a connection broke or none could be made, another process may answer next, with other weights. From then
//! on, while a peer can take the work, the backend gets none until its list was asked for again; and never for
//! longer than [`DOUBT_BARS`], for a list that cannot be had is no evidence. What lists say of each other is worked
//! out when one changes (`policy::identity`): while all are equal, choosing a backend looks at nothing here but a
//! counter.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock;
use crate::policy::Moment;
use crate::policy::balance::stable_hash;
use crate::policy::health::{Administrative, Observation, Standing};
use crate::policy::identity::{Roster, expected, lists_any};
use crate::pool::Listed;
use crate::pool::backend::{Backend, BackendId};
use crate::pool::pick::{Choice, Wanted};
use crate::pool::snapshot::Pool;

/// A doubt keeps work away for so long at most. By then three failed probes have, if the backend is really gone; if
/// it works and only its list cannot be had, nothing can be found out.
const DOUBT_BARS: Duration = Duration::from_secs(5);

/// What is held against the identity of one backend.
#[derive(Debug)]
pub(super) struct Trust {
    /// How often there was reason to doubt it, and how many of those its list has settled.
    doubts: AtomicU64,
    settled: AtomicU64,
    /// When the oldest doubt arose that stands and keeps work away, in microseconds of the clock; 0 for none.
    since: AtomicU64,
    /// It lists models, and none that this pool is configured to serve.
    wrong: AtomicBool,
}

impl Trust {
    pub(super) const fn new() -> Self {
        Self {
            doubts: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            since: AtomicU64::new(0),
            wrong: AtomicBool::new(false),
        }
    }

    fn doubted(&self) -> bool {
        self.doubts.load(Ordering::Relaxed) != self.settled.load(Ordering::Relaxed)
    }

    fn bars(&self, now: Moment) -> bool {
        let since = self.since.load(Ordering::Relaxed);
        since != 0 && self.doubted() && now.since(Moment::from_micros(since)) < DOUBT_BARS
    }
}

/// The doubts that stood when a list was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Doubts(u64);

/// A backend that serves none of the models it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongModels {
    /// What the pool is configured to serve.
    pub expected: Vec<String>,
    /// What the backend lists.
    pub listed: Vec<String>,
}

impl std::fmt::Display for WrongModels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN_MAX: usize = 8;
        let some = |names: &[String]| {
            let shown: Vec<&str> = names.iter().take(SHOWN_MAX).map(String::as_str).collect();
            let more = if names.len() > SHOWN_MAX { ", …" } else { "" };
            format!("{}{more}", shown.join(", "))
        };
        write!(f, "lists {}, expected {}", some(&self.listed), some(&self.expected))
    }
}

impl Backend {
    /// What answers at its address next may be another process: its list is asked for again, and while a peer can
    /// take the work it gets none until then.
    pub fn doubt(&self) {
        let now = clock::now().as_micros().max(1);
        // One that stands goes on; none is made longer by another.
        let _stands = self.trust.since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        self.distrust();
        self.nudge_prober();
    }

    /// It was out, or did not answer as it should: its list is asked for again before a pass of its probes is told.
    pub fn distrust(&self) {
        self.trust.doubts.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether its list has to be asked for before it is believed.
    pub fn is_doubted(&self) -> bool {
        self.trust.doubted()
    }

    /// Whether the doubt keeps work away: it is young, and there was a list to compare with.
    pub fn is_barred_by_doubt(&self, now: Moment) -> bool {
        self.trust.bars(now) && self.has_list()
    }

    /// Call it before the list is asked for, and [`Pool::settle_doubts`] with it when an answer came.
    pub fn doubts(&self) -> Doubts {
        Doubts(self.trust.doubts.load(Ordering::Relaxed))
    }

    /// Whether it serves none of the models its pool is configured for.
    pub fn is_wrong(&self) -> bool {
        self.trust.wrong.load(Ordering::Relaxed)
    }
}

impl Choice {
    /// The connection of this attempt broke, or none could be made.
    pub fn lost_connection(&self) {
        self.backend().doubt();
    }
}

impl Pool {
    /// Member `i` lists these models. Returns what is wrong with that, and takes the backend out if it is: for a long
    /// time, and in any case until it lists another.
    pub fn set_listed(&self, i: usize, listed: Listed, rng: &mut fastrand::Rng) -> Option<WrongModels> {
        let wrong = self.wrong_models(&listed.ids);
        if listed.ids.len() > 1 {
            self.state.several_models.store(true, Ordering::Relaxed);
        }
        let backend = &self.members[i].backend;
        backend.set_listed(listed);
        self.compare_lists();
        let was_wrong = backend.trust.wrong.swap(wrong.is_some(), Ordering::Relaxed);
        if wrong.is_some() && !was_wrong {
            self.judge_wrong(i, rng);
        }
        wrong
    }

    /// Member `i` was asked and lists nothing that is a list of models.
    pub fn forget_listed(&self, i: usize) {
        let backend = &self.members[i].backend;
        backend.forget_listed();
        backend.trust.wrong.store(false, Ordering::Relaxed);
        self.compare_lists();
    }

    /// Member `i` answered the question for its list: these doubts are settled.
    pub fn settle_doubts(&self, i: usize, doubts: Doubts) {
        let trust = &self.members[i].backend.trust;
        if trust.settled.swap(doubts.0, Ordering::Relaxed) != doubts.0 && !trust.doubted() {
            trust.since.store(0, Ordering::Relaxed);
            // Who found nobody may find it now.
            self.state.backend_returned();
        }
    }

    /// Works out anew who lacks what others list.
    pub(super) fn compare_lists(&self) {
        let lists: Vec<_> =
            self.members.iter().filter_map(|m| Some((&m.backend, m.backend.listed()?))).collect();
        let lists: Vec<(BackendId, bool, &[String])> = lists
            .iter()
            .map(|(backend, listed)| {
                (backend.id, backend.admin() == Administrative::Enabled, listed.ids.as_slice())
            })
            .collect();
        let roster = Roster::of(&lists);
        if roster.is_some() {
            self.state.several_models.store(true, Ordering::Relaxed);
        }
        self.state.roster.store(roster.map(std::sync::Arc::new));
    }

    /// Whether member `i` is known not to serve `model`, or anything this pool is for.
    pub(super) fn lacks(&self, i: usize, model: Option<&str>) -> bool {
        let backend = &self.members[i].backend;
        let lacks = |model: &str| {
            self.state.roster.load().as_ref().is_some_and(|roster| roster.lacks(model, backend.id))
        };
        backend.is_wrong() || model.is_some_and(lacks)
    }

    /// Whether a doubt keeps this work away from member `i`: not where no other could take it.
    pub(super) fn yields_to_doubt(&self, i: usize, wanted: &Wanted<'_>, now: Moment) -> bool {
        let sure = |j: usize| {
            let member = &self.members[j];
            j != i
                && member.backend.admin() == Administrative::Enabled
                && !wanted.has_tried(member)
                && !member.backend.is_barred_by_doubt(now)
                && !member.backend.signs.is_shunned()
                && matches!(self.standing(j, wanted.model, now), Standing::Eligible { .. })
        };
        self.members[i].backend.is_barred_by_doubt(now) && (0..self.members.len()).any(sure)
    }

    /// Nothing is wrong where no name is configured, and where no backend of the pool has ever listed one of those
    /// that are: then they are names of another kind.
    fn wrong_models(&self, listed: &[String]) -> Option<WrongModels> {
        let expected = expected(&self.config.models, &self.config.aliases);
        let first = expected.first()?;
        // Never 0, which stands for none.
        let names = expected.iter().fold(stable_hash(first.as_bytes()), |hash, name| {
            hash.rotate_left(1) ^ stable_hash(name.as_bytes())
        }) | 1;
        if lists_any(listed, &expected) {
            self.state.names_seen.store(names, Ordering::Relaxed);
            return None;
        }
        let real = self.state.names_seen.load(Ordering::Relaxed) == names;
        (real && !listed.is_empty()).then(|| WrongModels {
            expected: expected.iter().map(|&name| name.to_owned()).collect(),
            listed: listed.to_vec(),
        })
    }

    /// The judge hears of it where that changes something: without another one to take the work nobody is ejected.
    fn judge_wrong(&self, i: usize, rng: &mut fastrand::Rng) {
        let now = clock::now();
        let whole = self.members[i].backend.whole().clone();
        if self.peers(i, None, now).others_eligible > 0 {
            self.observe(i, &whole, None, Observation::Misconfigured, rng);
        }
        self.publish_standing();
    }
}
