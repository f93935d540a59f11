//! What the gateway makes of silence: the rules of `src/pool/progress.rs`, `signs.rs` and `tempo.rs`, single-threaded,
//! around the real `progress` and `hedge`. Nothing here looks at what a replica really is: a probe on demand is asked
//! for, and its answer is told.

use evergate::policy::Moment;
use evergate::policy::hedge::Hedges;
use evergate::policy::progress::{
    Evidence, Kind, ProgressPolicy, Proof, SoftClocks, Speeds, Standstill, Verified, Work, standstill,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// After an ejection for what the peers did, others are not ejected on the same grounds for so long
/// (`src/pool/progress.rs`).
pub(crate) const AFTERMATH: Duration = Duration::from_secs(5);

/// What is known of the silence of one backend.
#[derive(Clone, Debug, Default)]
struct Signs {
    moved: Moment,
    /// The latest work of each kind whose first token came, and how long it took.
    served: Vec<(Kind, Moment, Duration)>,
    suspect: bool,
    /// New work would stand still, too.
    shun: bool,
    /// And others can take it.
    shunned: bool,
    verified: Option<Verified>,
    spared_until: Moment,
}

/// What is usual in the pool, and who stands still.
pub(crate) struct Silence {
    policy: ProgressPolicy,
    speeds: Speeds,
    clocks: Clocks,
    pub(crate) hedges: Hedges,
    signs: Vec<Signs>,
    stuck_at: Option<Moment>,
    /// Whether there are probes.
    can_ask: bool,
}

/// The soft clocks as of the latest look.
#[derive(Clone, Debug)]
pub(crate) struct Clocks {
    unknown: Duration,
    first_token: BTreeMap<usize, Duration>,
    token_gap: Duration,
}

impl SoftClocks for Clocks {
    fn first_token(&self, kind: Kind) -> Duration {
        self.first_token.get(&kind.index()).copied().unwrap_or(self.unknown)
    }

    fn token_gap(&self) -> Duration {
        self.token_gap
    }
}

/// A backend that stands still, and what follows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) backend: usize,
    pub(crate) standstill: Standstill,
    /// It is to be ejected; none: it is to be asked.
    pub(crate) proof: Option<Proof>,
}

impl Silence {
    pub(crate) fn new(policy: ProgressPolicy, members: usize, can_ask: bool) -> Self {
        let clocks = Clocks {
            unknown: policy.first_token_unknown,
            first_token: BTreeMap::new(),
            token_gap: policy.token_gap_unknown,
        };
        Self {
            policy,
            speeds: Speeds::default(),
            clocks,
            hedges: Hedges::default(),
            signs: vec![Signs::default(); members],
            stuck_at: None,
            can_ask,
        }
    }

    pub(crate) fn clocks(&self) -> &Clocks {
        &self.clocks
    }

    /// A sign of life.
    pub(crate) fn moved(&mut self, i: usize, now: Moment) {
        self.signs[i].moved = self.signs[i].moved.max(now);
    }

    pub(crate) fn moved_at(&self, i: usize) -> Moment {
        self.signs[i].moved
    }

    /// A first token came after `took`, to work that began then.
    pub(crate) fn served(&mut self, i: usize, kind: Kind, started: Moment, took: Duration) {
        self.speeds.first_token(started + took, kind, took);
        self.moved(i, started + took);
        let served = &mut self.signs[i].served;
        match served.iter_mut().find(|(of, ..)| *of == kind) {
            Some((_, at, _)) if *at >= started => {}
            Some(latest) => *latest = (kind, started, took),
            None => served.push((kind, started, took)),
        }
    }

    /// Work was cut off while it waited, for so long.
    pub(crate) fn cut_off(&mut self, i: usize, kind: Kind, waited: Duration, now: Moment) {
        if waited >= self.clocks.first_token(kind) && !self.signs[i].suspect {
            self.speeds.first_token(now, kind, waited);
        }
    }

    /// The longest gap of a stretch of a stream.
    pub(crate) fn token_gap(&mut self, longest: Duration, now: Moment) {
        self.speeds.token_gap(now, longest);
    }

    /// New work is to avoid it.
    pub(crate) fn is_shunned(&self, i: usize) -> bool {
        self.signs[i].shunned
    }

    /// A probe on demand has ended.
    pub(crate) fn verified(&mut self, i: usize, verified: Verified) {
        self.signs[i].verified = Some(verified);
    }

    /// Rescued work goes there.
    pub(crate) fn spare(&mut self, i: usize, kind: Kind, now: Moment) {
        let until = now + self.clocks.first_token(kind);
        self.signs[i].spared_until = self.signs[i].spared_until.max(until);
    }

    /// It was ejected because it was found stuck.
    pub(crate) fn ejected(&mut self, now: Moment) {
        self.stuck_at = Some(now);
    }

    /// Looks at the unfinished work of all; `usable`: who is eligible.
    pub(crate) fn look(&mut self, work: &[Vec<Work>], usable: &[bool], now: Moment) -> Vec<Found> {
        let (policy, clocks) = (&self.policy, &mut self.clocks);
        let gap = self.speeds.review(now, |kind, usual| {
            clocks.first_token.insert(kind.index(), policy.late_first_token(usual));
        });
        if let Some(usual) = gap {
            clocks.token_gap = policy.late_token(usual);
        }
        let mut found = Vec::new();
        for (i, unfinished) in work.iter().enumerate() {
            let peers = Peers { of: i, signs: &self.signs };
            let standstill = standstill(unfinished, self.signs[i].moved, &self.clocks, &peers, now);
            match standstill {
                Some(standstill) => found.push(self.suspect(i, standstill, now)),
                None => self.signs[i].suspect = false,
            }
        }
        let others = (0..work.len()).any(|i| usable[i] && !self.signs[i].suspect);
        for signs in &mut self.signs {
            signs.shunned = signs.suspect && signs.shun && others;
        }
        found
    }

    fn suspect(&mut self, backend: usize, standstill: Standstill, now: Moment) -> Found {
        let signs = &mut self.signs[backend];
        let verified = signs.verified.filter(|verified| verified.asked >= standstill.since);
        let here = !self.can_ask || verified.is_some_and(|verified| verified.answered);
        signs.suspect = true;
        signs.shun = !(standstill.late < 2 && here);
        let aftermath = self.stuck_at.is_some_and(|at| now.since(at) < AFTERMATH && standstill.since >= at)
            || signs.spared_until > now;
        let proof = standstill.proof(verified).filter(|proof| *proof != Proof::Outrun || !aftermath);
        Found { backend, standstill, proof }
    }
}

/// The others of a pool, as witnesses.
struct Peers<'a> {
    of: usize,
    signs: &'a [Signs],
}

impl Peers<'_> {
    fn others(&self) -> impl Iterator<Item = &Signs> {
        self.signs.iter().enumerate().filter(|(i, _)| *i != self.of).map(|(_, signs)| signs)
    }
}

impl Evidence for Peers<'_> {
    fn served_later(&self, kind: Kind, started: Moment) -> Option<Duration> {
        let served = self.others().flat_map(|signs| &signs.served);
        served.filter(|(of, at, _)| *of == kind && *at > started).map(|(.., took)| *took).min()
    }

    fn moved(&self) -> Option<Moment> {
        self.others().map(|signs| signs.moved).max()
    }
}
