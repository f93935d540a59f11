//! The recent outcomes of one backend, exactly: the last 64, as far as they are young enough.
//!
//! Counts, not time buckets: a busy backend is judged by its last second, a quiet one by its last ten
//! minutes, and no bucket's edge changes a verdict. 64 is enough to tell 0.8 from 0.95 (three standard
//! errors), few enough to turn in a second at 100 requests/s, and half a kilobyte.

use crate::policy::Moment;
use std::time::Duration;

const OUTCOMES_MAX: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Window {
    /// A ring: moment in microseconds, shifted left by one, plus one for a success.
    outcomes: [u64; OUTCOMES_MAX],
    next: usize,
    len: usize,
}

impl Window {
    pub(super) const fn new() -> Self {
        Self { outcomes: [0; OUTCOMES_MAX], next: 0, len: 0 }
    }

    pub(super) fn record(&mut self, now: Moment, success: bool) {
        if let Some(slot) = self.outcomes.get_mut(self.next) {
            *slot = now.as_micros() << 1 | u64::from(success);
        }
        self.next = (self.next + 1) % OUTCOMES_MAX;
        self.len = (self.len + 1).min(OUTCOMES_MAX);
    }

    pub(super) const fn clear(&mut self) {
        self.len = 0;
    }

    /// Takes the latest failure out again: it was not this backend's.
    pub(super) fn forgive(&mut self) {
        let at = |back: usize| (self.next + OUTCOMES_MAX - back) % OUTCOMES_MAX;
        let Some(failed) = (1..=self.len).find(|&back| self.outcomes[at(back)] & 1 == 0) else { return };
        for back in (1..failed).rev() {
            let (older, newer) = (at(back + 1), at(back));
            self.outcomes[older] = self.outcomes[newer];
        }
        self.next = at(1);
        self.len -= 1;
    }

    /// Share of successes among the outcomes no older than `length`, if there are `least` of them.
    pub(super) fn rate(&self, now: Moment, length: Duration, least: u32) -> Option<f64> {
        let oldest = now - length;
        let (mut successes, mut count) = (0u32, 0u32);
        for back in 1..=self.len {
            let outcome = self.outcomes[(self.next + OUTCOMES_MAX - back) % OUTCOMES_MAX];
            if Moment::from_micros(outcome >> 1) < oldest {
                break;
            }
            count += 1;
            successes += u32::from(outcome & 1 == 1);
        }
        (count >= least.max(1)).then(|| f64::from(successes) / f64::from(count))
    }
}

#[cfg(test)]
mod tests {
    use super::{Moment, OUTCOMES_MAX, Window};
    use proptest::prelude::{any, prop, prop_assert_eq, proptest};
    use std::time::Duration;

    #[test]
    fn a_forgiven_failure_was_never_there() {
        let (mut window, mut without) = (Window::new(), Window::new());
        for (i, success) in [true, false, true, false, true, true].into_iter().enumerate() {
            window.record(Moment::from_micros(5000 + i as u64), success);
            if i != 3 {
                without.record(Moment::from_micros(5000 + i as u64), success);
            }
        }
        window.forgive();
        let rate = |w: &Window| w.rate(Moment::from_micros(5010), Duration::from_secs(1), 1);
        assert_eq!((window.len, rate(&window)), (without.len, rate(&without)));
        window.record(Moment::from_micros(5008), false);
        assert_eq!(rate(&window), Some(4.0 / 6.0));
    }

    proptest! {
        #[test]
        fn rate_is_that_of_the_last_outcomes_within_the_window(
            steps in prop::collection::vec((0u64..50, any::<bool>()), 0..200),
            length in 1u64..2000,
            least in 1u32..10,
        ) {
            let mut window = Window::new();
            let mut seen = Vec::new();
            let mut now = 5000;
            for (step, success) in steps {
                now += step;
                window.record(Moment::from_micros(now), success);
                seen.push((now, success));
            }
            let young: Vec<bool> = seen.iter().rev().take(OUTCOMES_MAX)
                .filter(|(at, _)| at + length >= now).map(|(_, success)| *success).collect();
            let expected = (young.len() >= least as usize)
                .then(|| young.iter().filter(|s| **s).count() as f64 / young.len() as f64);
            prop_assert_eq!(window.rate(Moment::from_micros(now), Duration::from_micros(length), least), expected);
        }
    }
}
