//! How many requests a backend takes at a time, learned from its refusals.
//!
//! A backend that answers 429, 503 or 529 while it serves others has said where its limit is. Nothing else
//! teaches: a batching engine gets slower with every request by design, so latency is never a reason.
//! Invariants: never below 1, nor below the concurrency that last succeeded; without a refusal for a minute
//! the cap is forgotten. Not here: a configured cap, which bounds this one, and the pause that a refusal asks for.

use std::time::Duration;

use crate::policy::Moment;

/// Without a refusal for so long nothing is known any more: the engine may run with other limits by now.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Least time between a refusal, or a step up, and the next step up: one round of ordinary first tokens.
const STEP: Duration = Duration::from_secs(1);

/// What is known of one backend's limit. The default is nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cap(Option<Learned>);

#[derive(Clone, Copy, Debug)]
struct Learned {
    most: u32,
    refused: Moment,
    /// Last refusal or step up.
    stepped: Moment,
    /// Requests begun at the cap since then.
    served: u32,
}

impl Cap {
    /// It refused one of `in_flight` unfinished requests (the refused one included). `proven` is how many
    /// were unfinished when it last began to answer one; 0 when it never has.
    pub fn refused(&mut self, now: Moment, in_flight: u32, proven: u32) {
        let others = in_flight.saturating_sub(1);
        if others == 0 || proven == 0 {
            // Alone, or by a backend that has served nobody, it is not about concurrency: it loads, or a quota is used up.
            self.forget(now);
            return;
        }
        self.learn(now, others, proven);
    }

    /// It says itself that `queued` of its requests wait for the `running` ones.
    pub fn reported(&mut self, now: Moment, running: u32, queued: u32) {
        if queued > 0 {
            self.learn(now, running, 1);
        }
    }

    /// It began to answer one of `in_flight` unfinished requests.
    pub fn served(&mut self, now: Moment, in_flight: u32) {
        self.forget(now);
        let Some(learned) = &mut self.0 else { return };
        if in_flight < learned.most {
            return;
        }
        learned.most = in_flight;
        learned.served = learned.served.saturating_add(1);
        // A whole round of requests at the cap, and time enough for a refusal to come.
        if learned.served >= learned.most && now.since(learned.stepped) >= STEP {
            *learned = Learned { most: learned.most.saturating_add(1), stepped: now, served: 0, ..*learned };
        }
    }

    /// Lets time pass.
    pub fn forget(&mut self, now: Moment) {
        if self.0.is_some_and(|learned| now.since(learned.refused) >= FORGOTTEN) {
            self.0 = None;
        }
    }

    /// Most requests at a time, if known; at least 1.
    pub fn most(&self) -> Option<u32> {
        self.0.map(|learned| learned.most)
    }

    fn learn(&mut self, now: Moment, most: u32, proven: u32) {
        self.forget(now);
        let before = self.most().unwrap_or(u32::MAX);
        let most = before.min(most).max(proven).max(1);
        self.0 = Some(Learned { most, refused: now, stepped: now, served: 0 });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::from_micros(ms * 1000)
    }

    #[test]
    fn refusals_of_a_burst_find_the_limit() {
        // Ten come at once, four are taken; the six others are refused one by one.
        let mut cap = Cap::default();
        for in_flight in [10, 9, 8, 7, 6, 5] {
            cap.refused(at(0), in_flight, 4);
        }
        assert_eq!(cap.most(), Some(4));
    }

    #[test]
    fn a_refusal_of_a_lone_request_or_by_one_that_never_served_teaches_nothing() {
        let mut cap = Cap::default();
        cap.refused(at(0), 1, 1);
        cap.refused(at(0), 30, 0);
        assert_eq!(cap.most(), None);
    }

    #[test]
    fn it_is_never_below_what_last_succeeded() {
        let mut cap = Cap::default();
        cap.refused(at(0), 5, 9);
        assert_eq!(cap.most(), Some(9));
        cap.served(at(1), 12);
        assert_eq!(cap.most(), Some(12));
    }

    #[test]
    fn it_grows_by_one_for_a_round_at_the_cap_and_not_faster_than_a_second() {
        let mut cap = Cap::default();
        cap.refused(at(0), 5, 4);
        for _ in 0..50 {
            cap.served(at(500), 4);
        }
        assert_eq!(cap.most(), Some(4), "too soon");
        cap.served(at(1000), 4);
        assert_eq!(cap.most(), Some(5));
        for ms in 0..40 {
            cap.served(at(3000 + ms), 4);
        }
        assert_eq!(cap.most(), Some(5), "never at the cap");
        (0..4).for_each(|_| cap.served(at(4000), 5));
        assert_eq!(cap.most(), Some(5), "no whole round yet");
        cap.served(at(4000), 5);
        assert_eq!(cap.most(), Some(6));
        (0..12).for_each(|_| cap.served(at(4999), 6));
        assert_eq!(cap.most(), Some(6), "less than a second after the step");
        cap.served(at(5000), 6);
        assert_eq!(cap.most(), Some(7));
    }

    #[test]
    fn a_minute_without_refusals_and_it_is_forgotten() {
        let mut cap = Cap::default();
        cap.refused(at(0), 5, 4);
        cap.forget(at(59_999));
        assert_eq!(cap.most(), Some(4));
        cap.forget(at(60_000));
        assert_eq!(cap.most(), None);
    }

    #[test]
    fn a_queue_that_a_backend_reports_is_as_good_as_a_refusal() {
        let mut cap = Cap::default();
        cap.reported(at(0), 8, 0);
        assert_eq!(cap.most(), None);
        cap.reported(at(0), 8, 3);
        assert_eq!(cap.most(), Some(8));
    }

    proptest! {
        /// A replica with a fixed limit, refusing at once what is above it, any traffic: after any refusal the
        /// cap is at least what last succeeded, and it never locks the replica out.
        #[test]
        fn it_stays_within_reason(limit in 1u32..40, offered in prop::collection::vec((1u32..80, 1u64..2000), 1..200)) {
            let (mut cap, mut now, mut proven) = (Cap::default(), 0, 0);
            for (wanted, ms) in offered {
                now += ms;
                let sent = cap.most().map_or(wanted, |most| wanted.min(most));
                prop_assert!(sent >= 1);
                for refused in (limit..sent).rev() {
                    cap.refused(at(now), refused + 1, proven);
                    prop_assert!(cap.most().is_none_or(|most| most >= proven.max(1)));
                }
                if proven > 0 && sent > limit {
                    prop_assert_eq!(cap.most(), Some(limit.max(proven)));
                }
                proven = sent.min(limit);
                cap.served(at(now), proven);
            }
        }
    }
}
