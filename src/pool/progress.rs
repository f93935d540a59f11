//! Finds backends where nothing moves, or much slower than elsewhere: looks at their unfinished work and their
//! speeds at every tick, has the suspect asked, and ejects the proven. The rules are `policy::progress` and
//! `policy::outlier`; here is what they look at and what follows.
//!
//! A suspect gets no new work while another backend can take it. Ejections for what the peers did are spread:
//! the work of the first lands on the others, and slows them down. So one that began to stand still only
//! after such an ejection is left in peace for a while, and so is one that was just given rescued work.

use std::time::Duration;

use crate::clock;
use crate::policy::Moment;
use crate::policy::health::{Administrative, Health, Standing};
use crate::policy::outlier::{Reading, slowness};
use crate::policy::progress::{Evidence, Kind, Proof, SoftClocks, Standstill, Work, standstill};
use crate::pool::snapshot::{Member, Pool};
use crate::telemetry::events::BackendSuspected;

/// After an ejection for standing still, others are not ejected on the same grounds for so long: what they do now
/// may be its consequence.
const AFTERMATH: Duration = Duration::from_secs(5);

impl Pool {
    /// Looks for backends that stand still.
    pub(super) fn watch_progress(&self, now: Moment) {
        self.state.tempo.review(&self.config.progress, now);
        self.watch_speed(now);
        let mut proven = Vec::new();
        for (i, member) in self.members.iter().enumerate() {
            let found = self.standstill(i, now);
            if let Some(proof) = found.and_then(|found| self.suspect(i, &found, now)) {
                proven.push((i, proof));
            }
            if found.is_none() && member.backend.signs.is_suspect() {
                member.backend.signs.clear();
            }
        }
        self.shun_suspects(now);
        for (i, proof) in proven {
            self.eject_stuck(i, proof, now);
        }
    }

    /// Looks for backends that are slower than their peers: they lose share at once, and are ejected when it lasts.
    fn watch_speed(&self, now: Moment) {
        let policy = &self.config.outlier;
        let backends = || self.members.iter().map(|member| &member.backend);
        let readings: Vec<Reading> = backends().map(|b| b.signs.reading(policy, now)).collect();
        for (i, backend) in backends().enumerate() {
            let peers = readings.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, reading)| reading);
            let slowness = slowness(policy, &readings[i], peers);
            if let Some(ratio) = backend.signs.judge_speed(policy, now, slowness) {
                self.eject_slow(i, ratio, now);
            }
        }
    }

    fn eject_slow(&self, i: usize, ratio: f64, now: Moment) {
        let (record, policy) = (self.members[i].backend.whole().clone(), &self.config.health);
        let peers = self.peers(i, None, now);
        let mut rng = clock::rng();
        let eject = |health: &mut Health| health.eject_slow(policy, now, ratio, &peers, &mut rng);
        if let Some(transition) = record.judge(policy, now, eject) {
            self.publish(i, &record, None, &transition);
            self.settle(now);
        }
    }

    fn standstill(&self, i: usize, now: Moment) -> Option<Standstill> {
        let (backend, tempo) = (&self.members[i].backend, &self.state.tempo);
        let moved = backend.signs.moved_at();
        // The shortest of all clocks: whoever moves within it stands still by none.
        let shortest = self.config.progress.token_gap_min.min(self.config.progress.first_token_min);
        if backend.in_flight() == 0 || now.since(moved) < shortest {
            return None;
        }
        let work: Vec<Work> = backend.unfinished.lock().iter().filter_map(|one| one.work()).collect();
        standstill(&work, moved, tempo, &Peers { pool: self, of: i }, now)
    }

    /// What proves it, if it may be acted upon; else the backend is asked.
    fn suspect(&self, i: usize, found: &Standstill, now: Moment) -> Option<Proof> {
        let backend = &self.members[i].backend;
        if !backend.signs.is_suspect() {
            let silent = now.since(found.since);
            BackendSuspected { at: &backend.metrics, silent, late: found.late }.emit(&self.state.telemetry);
        }
        let verified = backend.last_verify().filter(|verified| verified.asked >= found.since);
        // One silent attempt at a backend that answers, or cannot be asked: its own accident, until new work stands
        // still too.
        let here = !self.can_verify(i) || verified.is_some_and(|verified| verified.answered);
        let alone = found.late < 2 && here;
        backend.signs.suspect(!alone);
        let proof = found.proof(verified);
        let aftermath = || {
            let ejected = self.state.tempo.stuck_at();
            (ejected > Moment::ZERO && now.since(ejected) < AFTERMATH && found.since >= ejected)
                || backend.signs.is_spared(now)
        };
        match proof {
            Some(Proof::Outrun) if aftermath() => None,
            Some(proof) => Some(proof),
            None => {
                backend.want_verify();
                None
            }
        }
    }

    /// Suspects get no new work while somebody else can take it.
    fn shun_suspects(&self, now: Moment) {
        let usable = |i: usize, member: &Member| {
            member.backend.admin() == Administrative::Enabled
                && !member.backend.signs.is_suspect()
                && matches!(self.standing(i, None, now), Standing::Eligible { .. })
        };
        let others = self.members.iter().enumerate().any(|(i, member)| usable(i, member));
        for member in &self.members {
            member.backend.signs.shun(others);
        }
    }

    fn eject_stuck(&self, i: usize, proof: Proof, now: Moment) {
        let record = self.members[i].backend.whole().clone();
        let peers = self.peers(i, None, now);
        let policy = &self.config.health;
        let mut rng = clock::rng();
        let transition =
            record.judge(policy, now, |health| health.eject_stuck(policy, now, proof, &peers, &mut rng));
        if let Some(transition) = transition {
            self.state.tempo.set_stuck_at(now);
            self.publish(i, &record, None, &transition);
            self.settle(now);
        }
    }
}

/// The other backends of a pool, as witnesses.
struct Peers<'a> {
    pool: &'a Pool,
    of: usize,
}

impl Peers<'_> {
    fn others(&self) -> impl Iterator<Item = &Member> {
        self.pool.members.iter().enumerate().filter(|(j, _)| *j != self.of).map(|(_, member)| member)
    }
}

impl Evidence for Peers<'_> {
    fn served_later(&self, kind: Kind, started: Moment) -> Option<Duration> {
        self.others().filter_map(|member| member.backend.signs.served_later(kind, started)).min()
    }

    fn moved(&self) -> Option<Moment> {
        self.others().map(|member| member.backend.signs.moved_at()).max()
    }
}

impl Pool {
    /// A first token (or a whole answer) of member `i` came after `took`, to work that began then.
    pub fn learn_first_token(&self, i: usize, kind: Kind, started: Moment, took: Duration) {
        let now = started + took;
        let tempo = &self.state.tempo;
        tempo.learn_first_token(now, kind, took);
        self.members[i].backend.signs.served(kind, started, took, tempo.usual_first_token(kind));
    }

    /// Age at which work of this kind without a first token is late.
    pub fn soft_first_token(&self, kind: Kind) -> Duration {
        self.state.tempo.first_token(kind)
    }

    /// Silence at which a stream is late.
    pub fn soft_token_gap(&self) -> Duration {
        self.state.tempo.token_gap()
    }

    /// Gaps of a stretch of a stream from member `i`, which began then and has just ended: the longest, and the mean.
    pub fn learn_token_gaps(&self, i: usize, began: Moment, longest: Duration, mean: Duration) {
        let (now, tempo) = (clock::now(), &self.state.tempo);
        tempo.learn_token_gap(now, longest);
        if let Some(usual) = tempo.usual_token_gap() {
            self.members[i].backend.signs.streamed(now, began, mean, usual);
        }
    }

    /// Rescued work goes to member `i`: it may be slow for as long as that takes to begin.
    pub fn spare(&self, i: usize, kind: Kind) {
        self.members[i].backend.signs.spare_until(clock::now() + self.state.tempo.first_token(kind));
    }
}
