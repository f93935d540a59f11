//! When to come back: as long as those who wait will take at the rate at which answers were finished lately.
//!
//! A fixed number sends everybody back at once, and too early. Counts are kept for ten seconds in slots of
//! one. Invariants: at least a second, at most a minute, never earlier than the queue can be empty at that
//! rate. Not here: a backend's own `Retry-After`, which says more than any estimate.

use std::time::Duration;

use crate::policy::Moment;

/// Seconds looked back over.
const WINDOW_SECONDS: u64 = 10;
/// Longest that is said: what holds for longer than this nobody knows.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Answers finished lately.
#[derive(Clone, Debug)]
pub struct Completions {
    began: Moment,
    slots: [u64; WINDOW_SECONDS as usize],
    /// The second of the latest slot.
    second: u64,
}

impl Completions {
    /// None so far.
    pub fn new(now: Moment) -> Self {
        Self { began: now, slots: [0; WINDOW_SECONDS as usize], second: seconds(now) }
    }

    /// `more` were finished since the last call.
    pub fn add(&mut self, now: Moment, more: u64) {
        self.roll(now);
        self.slots[(self.second % WINDOW_SECONDS) as usize] += more;
    }

    /// When one may come back while `ahead` wait: whole seconds, 1 to 60.
    pub fn retry_after(&mut self, now: Moment, ahead: usize) -> Duration {
        self.roll(now);
        // Without a single one, it takes longer than the window to finish one.
        let finished = self.slots.iter().sum::<u64>().max(1);
        let over = now.since(self.began).as_secs_f64().clamp(1.0, WINDOW_SECONDS as f64);
        let seconds = ((ahead as f64 + 1.0) * over / finished as f64).ceil();
        Duration::from_secs_f64(seconds.clamp(1.0, RETRY_AFTER_MAX.as_secs_f64()))
    }

    /// Forgets the slots that have left the window.
    fn roll(&mut self, now: Moment) {
        let second = seconds(now);
        let steps = second.saturating_sub(self.second).min(WINDOW_SECONDS);
        for step in 1..=steps {
            self.slots[((self.second + step) % WINDOW_SECONDS) as usize] = 0;
        }
        self.second = self.second.max(second);
    }
}

fn seconds(now: Moment) -> u64 {
    now.as_micros() / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_micros((seconds * 1e6) as u64)
    }

    /// `rate` a second for ten seconds.
    fn after_ten_seconds(rate: u64) -> Completions {
        let mut completions = Completions::new(at(100.0));
        (0..10).for_each(|n| completions.add(at(100.0 + f64::from(n)), rate));
        completions
    }

    #[test]
    fn it_is_the_queue_over_the_rate_rounded_up() {
        let mut completions = after_ten_seconds(20);
        for (ahead, seconds) in [(0, 1), (19, 1), (20, 2), (99, 5), (109, 6), (100_000, 60)] {
            let after = completions.retry_after(at(109.9), ahead);
            assert_eq!(after, Duration::from_secs(seconds), "{ahead} ahead");
        }
    }

    #[test]
    fn without_a_completion_it_is_the_window_each() {
        let mut completions = Completions::new(at(0.0));
        assert_eq!(completions.retry_after(at(0.1), 0), Duration::from_secs(1));
        assert_eq!(completions.retry_after(at(30.0), 0), Duration::from_secs(10));
        assert_eq!(completions.retry_after(at(30.0), 3), Duration::from_secs(40));
    }

    #[test]
    fn what_is_ten_seconds_old_does_not_count() {
        let mut completions = after_ten_seconds(20);
        assert_eq!(completions.retry_after(at(130.0), 1), Duration::from_secs(20));
    }
}
