//! Requests that kill every replica that touches them (F33): who is to blame for a death, and what is
//! remembered of it.
//!
//! A death is a process that is gone: the next connection to it is refused. One reset is none; finding out
//! is the caller's. Blame needs the same exchange at two deaths and hardly anybody else at both: when a rack
//! loses power, everybody who was moved is at both, and nobody is to blame. Remembered requests are not
//! refused, they run one at a time (the caller's doing as well); one that is served is forgotten. The few
//! that shared both deaths with a killer cannot be told from it and are blamed too.

use std::collections::VecDeque;
use std::time::Duration;

use crate::policy::Moment;
use crate::policy::balance::stable_hash;
use crate::policy::retry::{Cause, Facts};

/// Most other exchanges at both deaths for one to be blamed.
const BYSTANDERS_MAX: usize = 3;
/// How long a request is remembered after the latest death it brought about.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// Most requests remembered; the oldest goes. Each has cost two replicas: a fleet has not so many.
const REMEMBERED_MAX: usize = 256;
/// How long it is known who was at a death: longer than two attempts of a slow request.
const BREAKS_KEPT_FOR: Duration = Duration::from_secs(600);
/// Connections of one death are seen to break within this, by the slowest worker.
const SAME_DEATH: Duration = Duration::from_secs(5);
/// Most exchanges kept of one backend. Beyond them nobody can be blamed: it is not known who else was there.
const BREAKS_MAX: usize = 1024;

/// An exchange that broke off somewhere; never used twice.
pub type Exchange = u64;

/// Exchanges whose attempts broke off at one backend lately.
#[derive(Clone, Debug, Default)]
pub struct Breaks {
    /// In the order of time.
    recent: VecDeque<(Exchange, Moment)>,
    /// When the latest one was dropped for lack of room.
    dropped: Option<Moment>,
}

impl Breaks {
    /// An attempt of `exchange` broke off here.
    pub fn note(&mut self, exchange: Exchange, now: Moment) {
        while self.recent.front().is_some_and(|(_, at)| *at + BREAKS_KEPT_FOR <= now) {
            self.recent.pop_front();
        }
        if self.recent.len() == BREAKS_MAX {
            self.dropped = Some(now);
            self.recent.pop_front();
        }
        self.recent.push_back((exchange, now));
    }

    /// When `exchange` broke off here, the latest time.
    fn when(&self, exchange: Exchange, now: Moment) -> Option<Moment> {
        let mut times = self.recent.iter().rev().filter(|(other, _)| *other == exchange);
        times.next().map(|(_, at)| *at).filter(|at| *at + BREAKS_KEPT_FOR > now)
    }

    /// Who broke off here at about that time.
    fn around(&self, death: Moment) -> impl Iterator<Item = Exchange> {
        let near = move |at: Moment| at.since(death).max(death.since(at)) <= SAME_DEATH;
        self.recent.iter().filter(move |(_, at)| near(*at)).map(|(exchange, _)| *exchange)
    }

    /// Whether everybody who broke off here lately is known.
    fn is_whole(&self, now: Moment) -> bool {
        self.dropped.is_none_or(|at| at + BREAKS_KEPT_FOR <= now)
    }
}

/// Whether an attempt that ended so may have died with its backend: it was sent, and then there was nobody.
pub fn may_be_a_death(facts: &Facts) -> bool {
    facts.sent && matches!(facts.cause, Cause::Closed | Cause::Truncated | Cause::EndedEarly)
}

/// Whether `exchange` is to blame for the deaths of two backends.
pub fn is_to_blame(exchange: Exchange, first: &Breaks, second: &Breaks, now: Moment) -> bool {
    if !first.is_whole(now) || !second.is_whole(now) {
        return false;
    }
    let (Some(one), Some(two)) = (first.when(exchange, now), second.when(exchange, now)) else {
        return false;
    };
    let mut others: Vec<Exchange> = second.around(two).collect();
    others.sort_unstable();
    let mut at_both: Vec<Exchange> =
        first.around(one).filter(|other| *other != exchange && others.binary_search(other).is_ok()).collect();
    at_both.sort_unstable();
    at_both.dedup();
    at_both.len() <= BYSTANDERS_MAX
}

/// What makes two requests the same.
pub fn fingerprint(path: &str, body: &[u8]) -> u64 {
    stable_hash(body) ^ stable_hash(path.as_bytes()).rotate_left(1)
}

/// The requests that were blamed lately.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// The oldest first.
    entries: VecDeque<(u64, Moment)>,
}

impl Memory {
    /// The request of this fingerprint was blamed, now or again.
    pub fn remember(&mut self, fingerprint: u64, now: Moment) {
        self.forget(fingerprint);
        if self.entries.len() == REMEMBERED_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back((fingerprint, now));
    }

    /// It was served.
    pub fn forget(&mut self, fingerprint: u64) {
        self.entries.retain(|(other, _)| *other != fingerprint);
    }

    /// Whether it is remembered; those whose time is over are forgotten on the way.
    pub fn holds(&mut self, fingerprint: u64, now: Moment) -> bool {
        while self.entries.front().is_some_and(|(_, at)| *at + REMEMBERED_FOR <= now) {
            self.entries.pop_front();
        }
        self.entries.iter().any(|(other, _)| *other == fingerprint)
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::policy::retry::Phase;

    fn at(seconds: u64) -> Moment {
        Moment::from_micros(seconds * 1_000_000)
    }

    fn breaks(exchanges: impl IntoIterator<Item = Exchange>, now: Moment) -> Breaks {
        let mut breaks = Breaks::default();
        exchanges.into_iter().for_each(|exchange| breaks.note(exchange, now));
        breaks
    }

    #[test]
    fn who_was_at_two_deaths_nearly_alone_is_to_blame() {
        let now = at(1000);
        let first = breaks([1, 2, 3, 4, 5, 9, 9], now);
        assert!(is_to_blame(9, &first, &breaks([9], now), now));
        assert!(is_to_blame(9, &first, &breaks([9, 1, 2, 3, 20, 21, 22, 23], now), now));
        assert!(!is_to_blame(9, &first, &breaks([9, 1, 2, 3, 4], now), now), "too many were moved");
        assert!(!is_to_blame(9, &first, &breaks([1, 2, 3], now), now), "was not there");
        assert!(!is_to_blame(7, &first, &breaks([7], now), now));
    }

    #[test]
    fn a_death_of_long_ago_and_a_crowd_too_large_to_know_blame_nobody() {
        let first = breaks([9], at(1000));
        let second = breaks([9], at(1500));
        assert!(is_to_blame(9, &first, &second, at(1500)));
        assert!(!is_to_blame(9, &first, &second, at(1600)), "forgotten");
        let crowd = breaks((100..2000).chain([9]), at(1500));
        assert_eq!(crowd.recent.len(), BREAKS_MAX);
        assert!(!is_to_blame(9, &crowd, &second, at(1501)));
    }

    #[test]
    fn only_what_was_sent_and_broke_off_may_be_a_death() {
        let facts = |cause| Facts { sent: true, ..Facts::new(Phase::Head, cause) };
        for cause in [Cause::Closed, Cause::Truncated, Cause::EndedEarly] {
            assert!(may_be_a_death(&facts(cause)), "{cause:?}");
            assert!(!may_be_a_death(&Facts { sent: false, ..facts(cause) }), "{cause:?}");
        }
        for cause in [Cause::Refused, Cause::Status(500), Cause::FirstTokenTimeout, Cause::ClientGone] {
            assert!(!may_be_a_death(&facts(cause)), "{cause:?}");
        }
    }

    #[test]
    fn memory_is_bounded_in_time_and_number_and_forgets_what_was_served() {
        let mut memory = Memory::default();
        memory.remember(1, at(0));
        memory.remember(2, at(30));
        assert!(memory.holds(1, at(59)) && !memory.holds(1, at(60)) && memory.holds(2, at(60)));
        memory.remember(2, at(80));
        assert!(memory.holds(2, at(139)), "each death counts anew");
        memory.forget(2);
        assert!(memory.is_empty());
        (0..10_000).for_each(|n| memory.remember(n, at(200)));
        assert_eq!(memory.entries.len(), REMEMBERED_MAX);
        assert!(memory.holds(9_999, at(200)) && !memory.holds(0, at(200)));
    }

    #[test]
    fn a_fingerprint_is_of_path_and_body() {
        let one = fingerprint("/v1/chat/completions", b"{}");
        assert_eq!(one, fingerprint("/v1/chat/completions", b"{}"));
        assert_ne!(one, fingerprint("/v1/completions", b"{}"));
        assert_ne!(one, fingerprint("/v1/chat/completions", b"{ }"));
    }

    /// Replicas with work, of which one exchange kills whatever it touches, or two die with their rack. What
    /// a dead replica ran moves on evenly, as a balancer would have it.
    struct Fleet {
        running: Vec<Vec<Exchange>>,
        breaks: Vec<Breaks>,
        /// Where a moved exchange broke off before.
        before: HashMap<Exchange, usize>,
        blamed: HashSet<Exchange>,
    }

    impl Fleet {
        /// `dead` dies; what it ran moves to `to`, in turn.
        fn die(&mut self, dead: usize, to: &[usize], now: Moment) {
            let running = std::mem::take(&mut self.running[dead]);
            running.iter().for_each(|&exchange| self.breaks[dead].note(exchange, now));
            for (nth, &exchange) in running.iter().enumerate() {
                let before = self.before.insert(exchange, dead).filter(|before| *before != dead);
                let second = &self.breaks[dead];
                if before.is_some_and(|b| is_to_blame(exchange, &self.breaks[b], second, now)) {
                    self.blamed.insert(exchange);
                } else {
                    self.running[to[nth % to.len()]].push(exchange);
                }
            }
        }
    }

    #[test]
    fn over_many_seeds_a_killer_costs_two_replicas_and_a_lost_rack_blames_nobody() {
        const REPLICAS: usize = 8;
        for seed in 0..100 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut fleet = Fleet {
                running: vec![Vec::new(); REPLICAS],
                breaks: vec![Breaks::default(); REPLICAS],
                before: HashMap::new(),
                blamed: HashSet::new(),
            };
            let (mut number, mut now) = (0, at(1000));
            for round in 0..100 {
                now = now + Duration::from_millis(rng.u64(7_000..30_000));
                for running in &mut fleet.running {
                    // Those who came through earlier deaths have finished by now.
                    running.clear();
                    running.extend((1..rng.u64(6..20)).map(|nth| number + nth));
                    number += 20;
                }
                let blamed = fleet.blamed.len();
                let dead = rng.usize(0..REPLICAS);
                let mut others: Vec<usize> = (0..REPLICAS).filter(|other| *other != dead).collect();
                rng.shuffle(&mut others);
                if rng.bool() {
                    number += 1;
                    let killer = number;
                    fleet.running[dead].push(killer);
                    fleet.die(dead, &others, now);
                    let next = others.iter().copied().find(|&other| fleet.running[other].contains(&killer));
                    let next = next.expect("it has moved");
                    let rest: Vec<usize> = others.iter().copied().filter(|other| *other != next).collect();
                    fleet.die(next, &rest, now + Duration::from_secs(1));
                    assert!(fleet.blamed.contains(&killer), "seed {seed} round {round}: a third would die");
                    // Who was at both deaths with it cannot be told from it.
                    assert!(fleet.blamed.len() - blamed <= 1 + BYSTANDERS_MAX, "seed {seed} round {round}");
                } else {
                    // The rack: all move to the one that dies next.
                    fleet.die(dead, &others[..1], now);
                    fleet.die(others[0], &others[1..], now);
                    assert_eq!(fleet.blamed.len(), blamed, "seed {seed} round {round}: innocent");
                }
            }
        }
    }
}
