//! What is usual in a pool, and the soft clocks made of it.
//!
//! Exact small windows, not averages: a replica makes few requests a minute, each of them long, and the mean of
//! three prefills says nothing about the longest. A value is forgotten after ten minutes. The clocks never tighten
//! themselves: work that was cut off while it waited enters with the time it had waited, as if it had ended then.

use std::time::Duration;

use super::Kind;
use crate::policy::Moment;

/// Values a window holds: the 95th percentile of 64 is the fourth largest, so three freaks do not move it.
const WINDOW: usize = 64;

/// Fewer values than this teach nothing.
const VALUES_MIN: usize = 5;

/// A value is forgotten after so long: by then the load is another one.
const AGE_MAX: Duration = Duration::from_secs(600);

/// What is usual is looked at anew after so long without a new value, lest old ones stand for ever.
const REVIEW: Duration = Duration::from_secs(60);

/// The quantile that counts as usual.
const USUAL: f64 = 0.95;

/// When work becomes suspicious, as of the latest look.
pub trait SoftClocks {
    /// Age at which work of this kind without a first token is late.
    fn first_token(&self, kind: Kind) -> Duration;
    /// Silence at which a stream that has begun is late.
    fn token_gap(&self) -> Duration;
}

/// What a pool has seen lately.
#[derive(Debug)]
pub struct Speeds {
    /// By kind; most kinds are never seen.
    first_token: Vec<Option<Box<Recent>>>,
    token_gap: Recent,
}

impl Default for Speeds {
    fn default() -> Self {
        Self { first_token: (0..Kind::COUNT).map(|_| None).collect(), token_gap: Recent::default() }
    }
}

impl Speeds {
    /// A first token (or a whole answer, where it comes in one piece) came after `took`; or work was cut off after
    /// so long without one, for no fault of its backend.
    pub fn first_token(&mut self, now: Moment, kind: Kind, took: Duration) {
        self.first_token[kind.index()].get_or_insert_default().add(now, took);
    }

    /// The longest gap between two tokens of a stretch of one stream.
    pub fn token_gap(&mut self, now: Moment, longest: Duration) {
        self.token_gap.add(now, longest);
    }

    /// What is usual now, where that may have changed: for first tokens through `first_token`; the longest gap of a
    /// stretch is returned if it may have. None is "too little was seen".
    pub fn review(
        &mut self,
        now: Moment,
        mut first_token: impl FnMut(Kind, Option<Duration>),
    ) -> Option<Option<Duration>> {
        for (i, recent) in self.first_token.iter_mut().enumerate() {
            if let Some(usual) = recent.as_mut().and_then(|recent| recent.review(now)) {
                first_token(Kind::from_index(i), usual);
            }
        }
        self.token_gap.review(now)
    }
}

/// The latest values, oldest overwritten first.
#[derive(Debug, Default)]
struct Recent {
    values: Vec<(Moment, Duration)>,
    /// Where the next one goes.
    next: usize,
    /// When the clock was last made of them, if nothing came since.
    reviewed: Option<Moment>,
}

impl Recent {
    fn add(&mut self, now: Moment, value: Duration) {
        if self.values.len() < WINDOW {
            self.values.push((now, value));
        } else {
            self.values[self.next] = (now, value);
        }
        self.next = (self.next + 1) % WINDOW;
        self.reviewed = None;
    }

    fn usual(&self, now: Moment) -> Option<Duration> {
        let fresh = self.values.iter().filter(|(at, _)| now.since(*at) < AGE_MAX);
        let mut values: Vec<Duration> = fresh.map(|(_, value)| *value).collect();
        if values.len() < VALUES_MIN {
            return None;
        }
        let nth = ((values.len() - 1) as f64 * USUAL).ceil() as usize;
        Some(*values.select_nth_unstable(nth).1)
    }

    /// What is usual, if that may have changed since the last review.
    fn review(&mut self, now: Moment) -> Option<Option<Duration>> {
        if self.reviewed.is_some_and(|at| now.since(at) < REVIEW) {
            return None;
        }
        self.reviewed = Some(now);
        Some(self.usual(now))
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

    /// What is usual: first tokens by kind, and the gap. Only what may have changed.
    type Usual = (Vec<(Kind, Option<Duration>)>, Option<Option<Duration>>);

    fn usual(speeds: &mut Speeds, now: Moment) -> Usual {
        let mut first = Vec::new();
        let gap = speeds.review(now, |kind, usual| first.push((kind, usual)));
        (first, gap)
    }

    #[test]
    fn nothing_is_learned_from_four_values() {
        let (mut speeds, kind) = (Speeds::default(), Kind::of(1, 0));
        for n in 0..4 {
            speeds.first_token(at(n), kind, MS(20));
        }
        assert_eq!(usual(&mut speeds, at(5)), (vec![(kind, None)], Some(None)));
        speeds.first_token(at(6), kind, MS(20));
        for n in 0..5 {
            speeds.token_gap(at(n), MS(30));
        }
        assert_eq!(usual(&mut speeds, at(7)), (vec![(kind, Some(MS(20)))], Some(Some(MS(30)))));
        // Nothing new: nothing to do.
        assert_eq!(usual(&mut speeds, at(8)), (vec![], None));
    }

    #[test]
    fn three_freaks_do_not_count() {
        let (mut speeds, kind) = (Speeds::default(), Kind::of(1, 0));
        for n in 0..100 {
            let freak = n % 25 == 0;
            speeds.first_token(at(n), kind, if freak { MS(60_000) } else { MS(4_000) });
        }
        assert_eq!(usual(&mut speeds, at(200)).0, vec![(kind, Some(MS(4_000)))]);
    }

    #[test]
    fn old_values_are_forgotten_even_when_none_comes() {
        let (mut speeds, kind) = (Speeds::default(), Kind::of(1, 0));
        for n in 0..9 {
            speeds.first_token(at(n), kind, MS(100));
            speeds.token_gap(at(n), MS(10_000));
        }
        assert_eq!(usual(&mut speeds, at(10)), (vec![(kind, Some(MS(100)))], Some(Some(MS(10_000)))));
        let later = at(10) + AGE_MAX;
        assert_eq!(usual(&mut speeds, later), (vec![(kind, None)], Some(None)));
    }

    proptest! {
        #[test]
        fn the_usual_is_a_value_that_few_exceed(values in prop::collection::vec(1u64..100_000, 5..200)) {
            let mut recent = Recent::default();
            for (n, value) in values.iter().enumerate() {
                recent.add(at(n as u64), MS(*value));
            }
            let kept = &values[values.len().saturating_sub(WINDOW)..];
            let usual = recent.usual(at(1_000)).unwrap();
            prop_assert!(kept.iter().any(|value| MS(*value) == usual));
            let beyond = kept.iter().filter(|value| MS(**value) > usual).count();
            prop_assert!(beyond * 20 <= kept.len(), "{beyond} of {}", kept.len());
        }
    }
}
