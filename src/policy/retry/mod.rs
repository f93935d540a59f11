//! What may be sent again, how often, and when it is enough.
//!
//! An attempt states facts (`classify::Facts`); `classify::verdict` says whose fault it was;
//! `decide` says what happens next. Nothing else in evergate decides on a retry. The bounds are the
//! attempts of one exchange, the pool's `Budget`, and the backends not yet tried; a failure
//! before anything was sent draws on none of them, but only on the time an exchange waits for a backend.
//!
//! Numbers: docs of `RetryPolicy`; rules: RFC 9110 §9.2.2 (idempotency), RFC 9113 §8.7 (refused
//! streams), GEP-3388 (budget).

mod backoff;
mod budget;
mod classify;

pub use backoff::backoff;
pub use budget::{Budget, Burst};
pub use classify::{Cause, Facts, Phase, Verdict, verdict};

use std::time::Duration;

/// Attempts that sent nothing, beyond one for each backend. Time bounds them (`wait_max`); this is for a
/// chance that makes every pause short.
const UNSENT_REPEATS_MAX: usize = 32;

/// Parameters of retrying.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Most attempts of one exchange that reached a backend, the first included. Default 3, 1..=10.
    /// Attempts of which nothing was sent are bounded by `wait_max` instead.
    pub attempts_max: u8,
    /// Share of requests that may be retries, over ten seconds. Default 0.2 (GEP-3388).
    pub budget_ratio: f64,
    /// Retries a second that are always allowed. Default 10 (GEP-3388).
    pub budget_floor: f64,
    /// First wait before the same backend is tried again; doubles, full jitter. Default 25 ms.
    pub backoff_min: Duration,
    /// Longest such wait. Default 1 s.
    pub backoff_max: Duration,
    /// Longest wait for a busy or absent backend before the answer is an error. Default 2 s.
    pub wait_max: Duration,
    /// Which requests may be sent again once a byte of them was sent.
    pub replay: Replay,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts_max: 3,
            budget_ratio: 0.2,
            budget_floor: 10.0,
            backoff_min: Duration::from_millis(25),
            backoff_max: Duration::from_secs(1),
            wait_max: Duration::from_secs(2),
            replay: Replay::Auto,
        }
    }
}

/// Which requests may be sent again once a byte of them was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replay {
    /// Inference endpoints that keep no state, idempotent methods, and requests with an `Idempotency-Key`. The default.
    #[default]
    Auto,
    /// Every request.
    Always,
    /// Idempotent methods only (RFC 9110 §9.2.2).
    Safe,
    /// None.
    Never,
}

impl Replay {
    /// Whether a request of this nature may be sent again.
    pub fn allows(self, nature: &Nature) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Safe => nature.idempotent,
            Self::Auto => nature.idempotent || nature.keyed || (nature.inference && !nature.stateful),
        }
    }
}

/// What a request is, as far as sending it twice is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nature {
    /// Its method is idempotent.
    pub idempotent: bool,
    /// It carries an `Idempotency-Key`.
    pub keyed: bool,
    /// Its endpoint computes an answer and keeps nothing.
    pub inference: bool,
    /// Its body asks the server to keep something (`store`, `previous_response_id`, a sequence, …).
    pub stateful: bool,
}

/// What happens after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The answer goes to the client.
    Relay,
    /// The answer goes to the client, and both its failures are the request's own: two backends said the same.
    RelayAsRequestFault,
    /// Another attempt, at a backend not tried yet.
    Failover,
    /// Another attempt, on a new connection, the same backend allowed: nothing was learned about it.
    Again,
    /// Enough: the last answer if there is one, else an error of our own.
    GiveUp(Reason),
}

/// Why it was enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// `attempts_max` reached.
    Attempts,
    /// The pool's retry budget is empty.
    Budget,
    /// The request may have been executed and must not be sent twice.
    NotReplayable,
    /// The client's upload ended early, or the client is gone.
    Client,
    /// The exchange's own time is over.
    Time,
}

impl Reason {
    /// The word for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attempts => "attempts_exhausted",
            Self::Budget => "retry_budget_empty",
            Self::NotReplayable => "not_replayable",
            Self::Client => "client",
            Self::Time => "total_timeout",
        }
    }
}

/// What an exchange has been through. Kept by the exchange, read here.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Attempts of which at least a byte was sent.
    pub sent: u8,
    /// Attempts of which nothing was sent.
    pub unsent: u8,
    /// A kept connection has already failed this exchange once.
    pub stale: bool,
    /// Backends in the pool: bounds the attempts that sent nothing.
    pub members: usize,
    /// How the last backend failed.
    last: Option<Cause>,
    /// And whether it served others meanwhile.
    last_serves_others: bool,
}

impl History {
    /// An exchange that may go to `members` backends.
    pub fn new(members: usize) -> Self {
        Self { members, ..Self::default() }
    }

    /// Adds an attempt that has ended.
    pub fn add(&mut self, facts: &Facts) {
        if facts.is_stale_connection() && !self.stale {
            // As free as a failed connect: nothing was learned, and the same backend is asked again.
        } else if facts.sent {
            self.sent += 1
        } else {
            self.unsent = self.unsent.saturating_add(1)
        }
        self.stale |= facts.is_stale_connection();
        self.last = Some(facts.cause);
        self.last_serves_others = facts.serves_others;
    }

    /// The last backend has served others since it failed this exchange.
    pub fn last_serves_others(&mut self) {
        self.last_serves_others = true;
    }

    /// Attempts so far.
    pub fn attempts(&self) -> u32 {
        u32::from(self.sent) + u32::from(self.unsent)
    }
}

/// What happens after an attempt with these facts and this verdict. `history` is what came before it;
/// `budget` is asked at most once, and only when a retry draws on it.
pub fn decide(
    policy: &RetryPolicy,
    history: &History,
    facts: &Facts,
    verdict: Verdict,
    replayable: bool,
    budget: impl FnOnce() -> bool,
) -> Next {
    match verdict {
        Verdict::Success => return Next::Relay,
        Verdict::Cancelled => return Next::GiveUp(Reason::Client),
        Verdict::Neutral if facts.cause.is_answer() => return Next::Relay,
        Verdict::Neutral if facts.cause == Cause::TotalTimeout => return Next::GiveUp(Reason::Time),
        Verdict::Neutral | Verdict::Fault | Verdict::Busy | Verdict::Misconfigured => {}
    }
    if !facts.sent {
        let bound = history.members.saturating_add(UNSENT_REPEATS_MAX);
        return if usize::from(history.unsent) + 1 < bound {
            Next::Failover
        } else {
            Next::GiveUp(Reason::Attempts)
        };
    }
    // Two backends that fail everybody alike are two broken backends, and a third may be sound.
    let witnessed = facts.serves_others && history.last_serves_others;
    if facts.cause.may_be_the_requests_own() && witnessed && history.last == Some(facts.cause) {
        return Next::RelayAsRequestFault;
    }
    let rejected = matches!(verdict, Verdict::Busy | Verdict::Misconfigured);
    if !replayable && !rejected {
        return Next::GiveUp(Reason::NotReplayable);
    }
    if facts.is_stale_connection() && !history.stale {
        // As free as a failed connect: the backend closed an idle connection while we wrote to it.
        return Next::Again;
    }
    if history.sent + 1 >= policy.attempts_max {
        return Next::GiveUp(Reason::Attempts);
    }
    if !budget() {
        return Next::GiveUp(Reason::Budget);
    }
    Next::Failover
}

/// Whether failures of one exchange, one for each backend it was sent to, are its own: every backend said the
/// same, and none the contrary. Otherwise one client that repeats one broken request would eject a fleet that
/// nobody else uses just then. Backends that fail all requests are found out by the next one that succeeds.
pub fn all_failed_alike(causes: impl IntoIterator<Item = Cause>) -> bool {
    let mut causes = causes.into_iter();
    let Some(first) = causes.next().filter(|cause| cause.may_be_the_requests_own()) else { return false };
    let mut others = 0;
    causes.all(|cause| {
        others += 1;
        cause == first
    }) && others > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(cause: Cause) -> Facts {
        Facts { sent: true, ..Facts::new(Phase::Head, cause) }
    }

    fn next(history: &History, facts: &Facts, replayable: bool, budget: bool) -> Next {
        decide(&RetryPolicy::default(), history, facts, verdict(facts), replayable, || budget)
    }

    #[test]
    fn a_refused_connection_moves_on_whatever_the_request_and_budget() {
        let unsent = Facts::new(Phase::Connect, Cause::Refused);
        assert_eq!(next(&History::new(3), &unsent, false, false), Next::Failover);
    }

    #[test]
    fn attempts_that_sent_nothing_are_bounded_by_the_pool() {
        let unsent = Facts::new(Phase::Connect, Cause::Refused);
        let mut history = History::new(2);
        let mut n = 0;
        while next(&history, &unsent, true, true) == Next::Failover {
            history.add(&unsent);
            n += 1;
            assert!(n < 100, "never ends");
        }
        assert_eq!(next(&history, &unsent, true, true), Next::GiveUp(Reason::Attempts));
    }

    #[test]
    fn a_request_that_must_not_run_twice_is_not_sent_twice() {
        assert_eq!(
            next(&History::new(3), &facts(Cause::Closed), false, true),
            Next::GiveUp(Reason::NotReplayable)
        );
    }

    #[test]
    fn a_busy_answer_was_not_executed_and_may_go_elsewhere() {
        assert_eq!(next(&History::new(3), &facts(Cause::Status(503)), false, true), Next::Failover);
    }

    #[test]
    fn a_client_fault_is_relayed_at_once() {
        for status in [400, 404, 409, 413, 422] {
            assert_eq!(next(&History::new(3), &facts(Cause::Status(status)), true, true), Next::Relay);
        }
    }

    #[test]
    fn an_empty_budget_makes_the_first_failure_the_answer() {
        assert_eq!(
            next(&History::new(3), &facts(Cause::Status(500)), true, false),
            Next::GiveUp(Reason::Budget)
        );
    }

    #[test]
    fn a_stale_connection_is_replayed_once_for_free_and_then_counts() {
        let stale = Facts { reused: true, ..facts(Cause::Closed) };
        let mut history = History::new(3);
        assert_eq!(next(&history, &stale, true, false), Next::Again);
        assert_eq!(verdict(&stale), Verdict::Neutral);
        history.add(&stale);
        assert_eq!(next(&history, &stale, true, false), Next::GiveUp(Reason::Budget));
    }

    #[test]
    fn the_same_500_from_two_backends_that_serve_others_is_the_requests_own() {
        let failed = Facts { serves_others: true, ..facts(Cause::Status(500)) };
        let mut history = History::new(3);
        assert_eq!(next(&history, &failed, true, true), Next::Failover);
        history.add(&failed);
        assert_eq!(next(&history, &failed, true, true), Next::RelayAsRequestFault);
        assert_eq!(
            next(&history, &Facts { cause: Cause::Status(502), ..failed }, true, true),
            Next::Failover
        );
        // A backend that fails everybody is no witness, neither as the first nor as the second.
        let broken = facts(Cause::Status(500));
        assert_eq!(next(&history, &broken, true, true), Next::Failover);
        let mut history = History::new(3);
        history.add(&broken);
        assert_eq!(next(&history, &failed, true, true), Next::Failover);
        // Unless it has shown meanwhile that it serves others.
        history.last_serves_others();
        assert_eq!(next(&history, &failed, true, true), Next::RelayAsRequestFault);
    }

    #[test]
    fn what_all_backends_fail_alike_says_nothing_about_them() {
        let (a, b) = (Cause::Status(500), Cause::Status(502));
        assert!(all_failed_alike([a, a]) && all_failed_alike([a, a, a]));
        assert!(!all_failed_alike([a]) && !all_failed_alike([a, b, a]) && !all_failed_alike([]));
        assert!(!all_failed_alike([Cause::Closed, Cause::Closed]), "a dead backend is dead for everybody");
    }

    #[test]
    fn three_attempts_are_enough() {
        let mut history = History::new(9);
        for status in [500, 502] {
            assert_eq!(next(&history, &facts(Cause::Status(status)), true, true), Next::Failover);
            history.add(&facts(Cause::Status(status)));
        }
        assert_eq!(next(&history, &facts(Cause::Closed), true, true), Next::GiveUp(Reason::Attempts));
    }

    #[test]
    fn what_may_be_sent_twice_is_decided_by_its_nature() {
        let (idempotent, keyed) =
            (Nature { idempotent: true, ..Nature::default() }, Nature { keyed: true, ..Nature::default() });
        let inference = Nature { inference: true, ..Nature::default() };
        let stateful = Nature { stateful: true, ..inference };
        let natures = [Nature::default(), idempotent, keyed, inference, stateful];
        let allows = |replay: Replay| natures.map(|nature| replay.allows(&nature));
        assert_eq!(allows(Replay::Auto), [false, true, true, true, false]);
        assert_eq!(allows(Replay::Safe), [false, true, false, false, false]);
        assert_eq!(allows(Replay::Always), [true; 5]);
        assert_eq!(allows(Replay::Never), [false; 5]);
        assert!(Replay::Auto.allows(&Nature { keyed: true, ..stateful }));
    }

    #[test]
    fn reasons_have_labels_of_their_own() {
        let reasons = [Reason::Attempts, Reason::Budget, Reason::NotReplayable, Reason::Client, Reason::Time];
        let mut names = reasons.map(Reason::name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        assert!(names.iter().all(|name| name.chars().all(|c| c == '_' || c.is_ascii_lowercase())));
        assert!(names.iter().all(|name| name.len() > 5));
    }

    #[test]
    fn the_clients_doing_and_the_end_of_its_time_end_it() {
        let gone = facts(Cause::ClientGone);
        assert_eq!(next(&History::new(3), &gone, true, true), Next::GiveUp(Reason::Client));
        let late = facts(Cause::TotalTimeout);
        assert_eq!(next(&History::new(3), &late, true, true), Next::GiveUp(Reason::Time));
        let answered = facts(Cause::Answered);
        assert_eq!(next(&History::new(3), &answered, false, false), Next::Relay);
        // Neutral, but no answer: moved away from a backend that was ejected.
        assert_eq!(next(&History::new(3), &facts(Cause::Rescued), true, true), Next::Failover);
    }

    #[test]
    fn attempts_are_counted_by_whether_anything_was_sent() {
        let mut history = History::new(3);
        history.add(&facts(Cause::Status(500)));
        assert_eq!((history.sent, history.unsent, history.stale, history.attempts()), (1, 0, false, 1));
        history.add(&Facts::new(Phase::Connect, Cause::Refused));
        assert_eq!((history.sent, history.unsent, history.attempts()), (1, 1, 2));
        history.add(&Facts { reused: true, ..facts(Cause::Closed) });
        history.add(&facts(Cause::Status(500)));
        assert_eq!(
            (history.sent, history.stale, history.attempts()),
            (2, true, 3),
            "once stale, stale for ever; the first time costs nothing"
        );
    }

    #[test]
    fn one_attempt_for_each_member_and_thirty_two_more_may_send_nothing() {
        let unsent = Facts::new(Phase::Connect, Cause::Refused);
        let mut history = History::new(2);
        let rounds = (0..100).take_while(|_| {
            let goes_on = next(&history, &unsent, true, false) == Next::Failover;
            history.add(&unsent);
            goes_on
        });
        assert_eq!(rounds.count(), 33, "and the thirty-fourth attempt was the last");
    }
}
