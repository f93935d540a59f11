//! How fast a crowd is let in where nobody knows yet what the backend can take.
//!
//! A replica that has just returned, or that takes over the work of a dead one, gets a few requests at
//! first. Each first token it gives lets in two more, and time alone doubles the number four times a second:
//! slow first tokens (a long prefill) must not keep two hundred waiting. Invariant: 256 are in within
//! a second and a half, whatever the replica does. Not here: caps, which hold besides, and whose turn it is.

use std::time::Duration;

use crate::policy::Moment;

/// Let in at once. Eight prefills are a batch that any replica can take.
const START: u32 = 8;
/// Time in which the number doubles by itself.
const DOUBLING: Duration = Duration::from_millis(250);
/// After so long, 2,048 and more, a crowd is no longer one.
const LASTS: Duration = Duration::from_secs(2);

/// One crowd being let in.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    began: Moment,
    starts: u32,
    let_in: u32,
    proven: u32,
}

impl Pace {
    /// Begins now.
    pub fn new(now: Moment) -> Self {
        Self { began: now, starts: 1, let_in: 0, proven: 0 }
    }

    /// Another backend has returned: a few more at once.
    pub fn widen(&mut self) {
        self.starts = self.starts.saturating_add(1);
    }

    /// Whether one more may be let in.
    pub fn allows(&self, now: Moment) -> bool {
        let doublings = now.since(self.began).as_secs_f64() / DOUBLING.as_secs_f64();
        let by_time = f64::from(START) * f64::from(self.starts) * doublings.exp2();
        self.is_over(now) || f64::from(self.let_in) < by_time + 2.0 * f64::from(self.proven)
    }

    /// One more was let in.
    pub fn let_in(&mut self) {
        self.let_in = self.let_in.saturating_add(1);
    }

    /// One of those let in got its first token.
    pub fn proven(&mut self) {
        self.proven = self.proven.saturating_add(1);
    }

    /// Whether it need not be kept any longer.
    pub fn is_over(&self, now: Moment) -> bool {
        now.since(self.began) >= LASTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::from_micros(1_000_000 + ms * 1000)
    }

    fn let_in(pace: &mut Pace, now: Moment) -> u32 {
        let mut n = 0;
        while n < 10_000 && pace.allows(now) {
            pace.let_in();
            n += 1;
        }
        n
    }

    #[test]
    fn a_few_at_first_and_all_within_a_second_and_a_half() {
        let mut pace = Pace::new(at(0));
        assert_eq!(let_in(&mut pace, at(0)), START);
        assert_eq!(let_in(&mut pace, at(0)), 0);
        let by_then: u32 = (1..=5).map(|quarter| let_in(&mut pace, at(quarter * 250))).sum();
        assert_eq!(START + by_then, 256);
        assert_eq!(let_in(&mut pace, at(2000)), 10_000);
    }

    #[test]
    fn each_first_token_lets_in_two_more() {
        let mut pace = Pace::new(at(0));
        let mut waves = vec![let_in(&mut pace, at(0))];
        for _ in 0..4 {
            let running = waves[waves.len() - 1];
            (0..running).for_each(|_| pace.proven());
            waves.push(let_in(&mut pace, at(0)));
        }
        assert_eq!(waves, [8, 16, 32, 64, 128]);
    }

    #[test]
    fn another_backend_is_worth_another_few() {
        let mut pace = Pace::new(at(0));
        pace.widen();
        assert_eq!(let_in(&mut pace, at(0)), 2 * START);
    }
}
