//! Whether a backend stands still, and what proves that it is stuck.
//!
//! A backend stands still when work of its is late and it has shown no sign of life for as long. That makes it
//! suspect, no more: new work goes elsewhere while it can, and it is asked. It is *stuck* when it does not answer
//! (a freeze, a partition), or when two late attempts stand there while a peer has served work of the same kind
//! that came later, and took less than half the time (an engine that died behind its HTTP server). An answer to
//! a health probe proves nothing. When the peers are silent too, all are slow and nobody is stuck.
//!
//! Busy is not stuck: work that came before the silence and may take longer, such as a long prefill, excuses
//! what waits behind it for as long as its own clock runs.

use std::time::Duration;

use super::{Kind, SoftClocks};
use crate::policy::Moment;

/// Late attempts without excuse that prove a standstill, given moving peers: one may be an accident of its own.
const LATE_MIN: usize = 2;

/// So many times what a peer took for later work must have passed: when all slow down together, who is second
/// to answer must not be called stuck.
const SLOWER_THAN_PEERS: u32 = 2;

/// One unfinished attempt that waits for its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// What it is like.
    pub kind: Kind,
    /// When it began.
    pub started: Moment,
    /// Its latest sign of life; when it began, before the first.
    pub heard: Moment,
    /// Its first token has come.
    pub streaming: bool,
}

impl Work {
    fn clock(&self, clocks: &impl SoftClocks) -> Duration {
        if self.streaming { clocks.token_gap() } else { clocks.first_token(self.kind) }
    }

    fn is_late(&self, clocks: &impl SoftClocks, now: Moment) -> bool {
        now.since(self.heard) >= self.clock(clocks)
    }

    /// Whether `self`, which is late, may be waiting for `other`, whose first token is not due yet.
    fn waits_behind(&self, other: &Self, clocks: &impl SoftClocks) -> bool {
        let latest = if self.streaming { self.heard + clocks.token_gap() } else { self.started };
        !other.streaming && other.started < latest
    }
}

/// What the other backends of the pool have done.
pub trait Evidence {
    /// The shortest time in which a peer served work of `kind` that began after `started`.
    fn served_later(&self, kind: Kind, started: Moment) -> Option<Duration>;
    /// The latest sign of life of any peer.
    fn moved(&self) -> Option<Moment>;
}

/// A probe made on demand, because unfinished work there stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// When it began. One that began before a suspicion arose says nothing about it.
    pub asked: Moment,
    /// When it ended.
    pub ended: Moment,
    /// Whether an answer came in time that is no failure. A 503 is an answer: the engine loads or drains.
    pub answered: bool,
}

/// A backend that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standstill {
    /// Its latest sign of life; when its oldest unfinished work began, if that was later.
    pub since: Moment,
    /// Attempts that are late.
    pub late: usize,
    /// None of them proves anything: they may wait for work that is allowed to take long.
    pub excused: bool,
    /// What its peers do proves it stuck.
    pub outrun: bool,
}

/// Why a backend is certainly stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// It did not answer when asked.
    Unanswered,
    /// Its peers served what came later.
    Outrun,
}

/// Whether a backend with this unfinished `work`, last heard of at `moved`, stands still.
pub fn standstill(
    work: &[Work],
    moved: Moment,
    clocks: &impl SoftClocks,
    peers: &impl Evidence,
    now: Moment,
) -> Option<Standstill> {
    let idle_until = work.iter().map(|w| w.started).min()?;
    let since = work.iter().filter(|w| w.streaming).map(|w| w.heard).fold(moved.max(idle_until), Moment::max);
    let late = || work.iter().filter(|w| w.is_late(clocks, now));
    // One that is late while others move is an accident of its own.
    if !late().any(|w| now.since(since) >= w.clock(clocks)) {
        return None;
    }
    let young = || work.iter().filter(|w| !w.is_late(clocks, now));
    let unexcused = || late().filter(|w| !young().any(|other| w.waits_behind(other, clocks)));
    let outrun = |w: &Work| match w.streaming {
        // Not merely the last token before all fell silent.
        true => peers.moved().is_some_and(|at| {
            let gap = clocks.token_gap();
            at >= w.heard + gap && now.since(at) < gap
        }),
        false => peers
            .served_later(w.kind, w.started)
            .is_some_and(|took| now.since(w.started) >= took * SLOWER_THAN_PEERS),
    };
    Some(Standstill {
        since,
        late: late().count(),
        excused: unexcused().next().is_none(),
        outrun: unexcused().count() >= LATE_MIN && unexcused().any(outrun),
    })
}

impl Standstill {
    /// What proves it, if anything does.
    pub fn proof(&self, verified: Option<Verified>) -> Option<Proof> {
        if verified.is_some_and(|verified| verified.asked >= self.since && !verified.answered) {
            return Some(Proof::Unanswered);
        }
        self.outrun.then_some(Proof::Outrun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn at(ms: u64) -> Moment {
        Moment::ZERO + MS(ms)
    }

    struct Clocks;

    impl SoftClocks for Clocks {
        fn first_token(&self, kind: Kind) -> Duration {
            if kind == long() { MS(10_000) } else { MS(2_000) }
        }
        fn token_gap(&self) -> Duration {
            MS(1_000)
        }
    }

    #[derive(Default)]
    struct Peers {
        served: Vec<(Kind, Moment, Duration)>,
        moved: Option<Moment>,
    }

    impl Evidence for Peers {
        fn served_later(&self, kind: Kind, started: Moment) -> Option<Duration> {
            let later = self.served.iter().filter(|(k, at, _)| *k == kind && *at > started);
            later.map(|(_, _, took)| *took).min()
        }
        fn moved(&self) -> Option<Moment> {
            self.moved
        }
    }

    fn short() -> Kind {
        Kind::of(1, 0)
    }

    fn long() -> Kind {
        Kind::of(1, 1 << 20)
    }

    fn waiting(started: u64) -> Work {
        Work { kind: short(), started: at(started), heard: at(started), streaming: false }
    }

    fn stream(heard: u64) -> Work {
        Work { kind: short(), started: at(0), heard: at(heard), streaming: true }
    }

    fn prefill(started: u64) -> Work {
        Work { kind: long(), ..waiting(started) }
    }

    /// A peer that served later work in 50 ms and is moving.
    fn lively(now: u64) -> Peers {
        Peers { served: vec![(short(), at(now - 100), MS(50))], moved: Some(at(now - 50)) }
    }

    fn look(work: &[Work], moved: u64, peers: &Peers, now: u64) -> Option<Standstill> {
        standstill(work, at(moved), &Clocks, peers, at(now))
    }

    #[test]
    fn nothing_is_suspect_before_its_clock() {
        assert_eq!(look(&[], 0, &lively(9_000), 9_000), None);
        assert_eq!(look(&[waiting(0), waiting(10)], 0, &lively(1_999), 1_999), None);
        assert_eq!(look(&[stream(1_000)], 1_000, &lively(1_999), 1_999), None);
        assert!(look(&[waiting(0)], 0, &lively(2_000), 2_000).is_some());
        assert!(look(&[stream(1_000)], 1_000, &lively(2_000), 2_000).is_some());
    }

    #[test]
    fn one_late_attempt_among_moving_ones_is_no_standstill() {
        assert_eq!(look(&[waiting(0), stream(4_900)], 4_900, &lively(5_000), 5_000), None);
        // Others were served and have gone.
        assert_eq!(look(&[waiting(0), waiting(10)], 4_500, &lively(5_000), 5_000), None);
    }

    #[test]
    fn two_late_attempts_that_a_peer_overtook_prove_it() {
        let found = look(&[waiting(0), waiting(10)], 0, &lively(2_100), 2_100).unwrap();
        assert_eq!((found.late, found.excused, found.outrun), (2, false, true));
        assert_eq!(found.proof(None), Some(Proof::Outrun));
        let alone = look(&[waiting(0), waiting(500)], 0, &lively(2_100), 2_100).unwrap();
        assert_eq!((alone.late, alone.proof(None)), (1, None));
    }

    #[test]
    fn a_pool_that_is_silent_as_a_whole_is_slow() {
        let silent = Peers { moved: Some(at(100)), ..Peers::default() };
        let found = look(&[waiting(0), waiting(10), stream(100)], 100, &silent, 9_000).unwrap();
        assert_eq!((found.outrun, found.proof(None)), (false, None));
        // A peer whose own first tokens take four seconds proves nothing against one that takes five.
        let slow = Peers { served: vec![(short(), at(50), MS(4_000))], moved: Some(at(4_050)) };
        assert!(!look(&[waiting(0), waiting(10)], 0, &slow, 5_000).unwrap().outrun);
        assert!(look(&[waiting(0), waiting(10)], 0, &slow, 8_000).unwrap().outrun);
    }

    #[test]
    fn work_of_another_kind_is_no_witness() {
        let other = Peers { served: vec![(Kind::of(2, 0), at(4_900), MS(5))], moved: None };
        assert!(!look(&[waiting(0), waiting(10)], 0, &other, 5_000).unwrap().outrun);
    }

    #[test]
    fn a_long_prefill_excuses_what_stands_behind_it_while_its_own_clock_runs() {
        let streams = [stream(1_000), stream(1_010), prefill(990)];
        let found = look(&streams, 1_010, &lively(6_000), 6_000).unwrap();
        assert_eq!((found.late, found.excused, found.outrun), (2, true, false));
        let over = look(&streams, 1_010, &lively(11_000), 11_000).unwrap();
        assert!(over.outrun && !over.excused);
        // One that came long after the silence began did not cause it.
        let after = [stream(1_000), stream(1_010), prefill(4_000)];
        assert!(look(&after, 1_010, &lively(6_000), 6_000).unwrap().outrun);
        // Nor does young work excuse what came before it.
        assert!(look(&[waiting(0), waiting(10), waiting(2_000)], 0, &lively(2_100), 2_100).unwrap().outrun);
    }

    #[test]
    fn streams_are_outrun_by_peers_that_move_now_and_moved_long_after_they_fell_silent() {
        let silent = [stream(1_000), stream(1_010)];
        let outrun = |moved: u64, now: u64| {
            let peers = Peers { moved: Some(at(moved)), ..Peers::default() };
            look(&silent, 1_010, &peers, now).unwrap().outrun
        };
        assert!(outrun(2_900, 3_000));
        // The last token before all fell silent is none.
        assert!(!outrun(1_990, 2_500));
        assert!(outrun(2_000, 2_500), "a whole gap behind it");
        // Nor is a peer that has fallen silent since.
        assert!(outrun(2_500, 3_499));
        assert!(!outrun(2_500, 3_500));
    }

    #[test]
    fn who_does_not_answer_when_asked_is_stuck() {
        let found = look(&[stream(1_000)], 1_000, &Peers::default(), 2_500).unwrap();
        let asked = |asked, answered| {
            found.proof(Some(Verified { asked: at(asked), ended: at(asked + 1_000), answered }))
        };
        assert_eq!(asked(1_400, false), Some(Proof::Unanswered));
        assert_eq!(asked(1_400, true), None);
        // A probe from before the silence is no news.
        assert_eq!(asked(900, false), None);
        // Nor is one from before there was anything to be silent about.
        let found = look(&[waiting(5_000)], 1_000, &Peers::default(), 7_500).unwrap();
        let asked =
            |asked| found.proof(Some(Verified { asked: at(asked), ended: at(6_000), answered: false }));
        assert_eq!((found.since, asked(4_999), asked(5_000)), (at(5_000), None, Some(Proof::Unanswered)));
    }

    proptest! {
        #[test]
        fn nobody_is_outrun_by_silent_peers_or_alone(
            work in prop::collection::vec((0u64..9_000, 0u64..9_000, any::<bool>(), any::<bool>()), 0..8),
            now in 9_000u64..30_000,
        ) {
            let work: Vec<Work> = work
                .into_iter()
                .map(|(started, later, streaming, big)| Work {
                    kind: if big { long() } else { short() },
                    started: at(started),
                    heard: if streaming { at(started + later) } else { at(started) },
                    streaming,
                })
                .collect();
            let found = standstill(&work, at(0), &Clocks, &Peers::default(), at(now));
            prop_assert!(found.is_none_or(|found| !found.outrun));
            let alone = standstill(&work[..work.len().min(1)], at(0), &Clocks, &lively(now), at(now));
            prop_assert!(alone.is_none_or(|found| !found.outrun));
        }
    }
}
