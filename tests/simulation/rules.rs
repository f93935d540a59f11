//! What must hold, whatever happens. Each rule keeps books of its own and believes no policy: budgets are added up from
//! what was granted, trials counted from what was sent.

use crate::gateway::{Change, Choice, Gateway, Grant, Told};
use crate::plan::{Plan, Policies};
use crate::silence::AFTERMATH;
use evergate::policy::Moment;
use evergate::policy::admission::Priority;
use evergate::policy::health::{EjectReason, Observation, ProbeVerdict, Standing, Transition};
use evergate::policy::progress::{Proof, Work};
use std::collections::BTreeMap;
use std::time::Duration;

/// The budget's window, and the time in which a burst comes back (`policy::retry`).
const BUDGET_SECONDS: u64 = 10;
const BURST_REFILL: f64 = 30.0;
const BURST_MIN: u32 = 8;
/// How far back hedges are counted.
const HEDGE_WINDOW: Duration = Duration::from_secs(10);
/// How a crowd is let in (`policy::admission`).
const PACE_START: u32 = 8;
const PACE_DOUBLING: Duration = Duration::from_millis(250);
const PACE_LASTS: Duration = Duration::from_secs(2);
/// Attempts at suspects that may come at once.
const SUSPECTS_AT_ONCE: f64 = 2.0;
/// Attempts that sent nothing, beyond one for each backend.
const UNSENT_REPEATS_MAX: u32 = 32;

/// The first rule that was broken, and the books of all.
pub(crate) struct Rules {
    pub(crate) broken: Option<String>,
    /// What happened how often, over all kinds: a simulation that never meets a thing proves nothing about it.
    pub(crate) tally: BTreeMap<&'static str, u64>,
    requests: Vec<Moment>,
    retries: Vec<Moment>,
    bursts: Vec<Moment>,
    suspects: Vec<Moment>,
    /// Attempts under way that are their backend's trial.
    trials: Vec<u32>,
    /// No attempt before, by its own stated wish.
    leave_alone_until: Vec<Moment>,
    /// It never failed anybody, nor asked to be left alone.
    blameless: Vec<bool>,
    under_way: u32,
    /// Hedges that were begun, and how many have not ended.
    hedges: Vec<Moment>,
    hedges_under_way: u32,
    /// The latest token each backend really gave.
    tokens: Vec<Moment>,
    /// When the latest backend was ejected as stuck, and the first.
    stuck_at: Option<Moment>,
    pub(crate) first_stuck: Option<(usize, Moment)>,
    /// Most that waited in line at a time.
    pub(crate) longest_line: usize,
    /// When rescued work was last sent there.
    rescued_to: Vec<Option<Moment>>,
    /// Who waits in the line.
    waiting: BTreeMap<usize, Priority>,
    /// Turns given while all priorities waited, and those of them that the lowest got.
    turns: (u32, u32),
    /// A crowd that is being let in.
    crowd: Option<Crowd>,
}

/// A crowd that is being let in.
struct Crowd {
    began: Moment,
    returns: u32,
    let_in: u32,
    spoke: u32,
}

impl Rules {
    pub(crate) fn new(members: usize) -> Self {
        Self {
            broken: None,
            tally: BTreeMap::new(),
            requests: Vec::new(),
            retries: Vec::new(),
            bursts: Vec::new(),
            suspects: Vec::new(),
            trials: vec![0; members],
            leave_alone_until: vec![Moment::ZERO; members],
            blameless: vec![true; members],
            under_way: 0,
            hedges: Vec::new(),
            hedges_under_way: 0,
            tokens: vec![Moment::ZERO; members],
            stuck_at: None,
            first_stuck: None,
            longest_line: 0,
            rescued_to: vec![None; members],
            waiting: BTreeMap::new(),
            turns: (0, 0),
            crowd: None,
        }
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    /// `holds`, or the first breach is remembered.
    pub(crate) fn require(&mut self, holds: bool, rule: &str, what: impl FnOnce() -> String) {
        if !holds && self.broken.is_none() {
            self.broken = Some(format!("{rule}: {}", what()));
        }
    }

    pub(crate) fn arrived(&mut self, now: Moment) {
        self.requests.push(now);
    }

    /// A request that had been sent is sent again.
    pub(crate) fn retried(&mut self, policies: &Policies, grant: Option<Grant>, peak: u32, now: Moment) {
        let policy = &policies.retry;
        let second = (now.as_micros() / 1_000_000).saturating_sub(BUDGET_SECONDS - 1);
        let from = Moment::from_micros(second * 1_000_000);
        let since = |of: &[Moment]| of.iter().filter(|at| **at >= from).count() as f64;
        let (made, most) = match grant {
            Some(Grant::Budget) => {
                self.count("retry from the budget");
                self.retries.push(now);
                let earned = policy.budget_ratio * since(&self.requests);
                (since(&self.retries), earned + policy.budget_floor * BUDGET_SECONDS as f64)
            }
            Some(Grant::Burst) => {
                self.count("retry from the burst");
                self.bursts.push(now);
                let back = 1.0 + now.since(from).as_secs_f64() / BURST_REFILL;
                (since(&self.bursts), f64::from(peak.max(BURST_MIN)) * back)
            }
            None => (1.0, 0.0),
        };
        self.require(made <= most + 1e-6, "the budget is never exceeded in any window", || {
            format!("{grant:?}: {made} retries since {from:?}, {most} allowed")
        });
    }

    /// A suspect is asked; `owed`: the budget pays for it, because it was no retry that had been paid for.
    pub(crate) fn asked_suspect(&mut self, policies: &Policies, owed: bool, now: Moment) {
        if owed {
            self.retried(policies, Some(Grant::Budget), 0, now);
        }
        self.suspects.push(now);
        let policy = &policies.retry;
        for n in 0..self.suspects.len() {
            let (from, made) = (self.suspects[n], (self.suspects.len() - n) as f64);
            let requests = self.requests.iter().filter(|at| **at >= from).count() as f64;
            let flowed = policy.budget_ratio * requests + policy.budget_floor * now.since(from).as_secs_f64();
            self.require(made <= flowed + SUSPECTS_AT_ONCE + 1e-6, "attempts at suspects are spread", || {
                format!("{made} since {from:?}, {flowed} and {SUSPECTS_AT_ONCE} allowed")
            });
        }
    }

    /// A second attempt begins beside a late one.
    pub(crate) fn hedged(&mut self, policies: &Policies, replayable: bool, now: Moment) {
        self.count("hedge");
        self.require(replayable, "what must not run twice is not hedged", String::new);
        // Of the budget too; its peak is of no account there.
        self.retried(policies, Some(Grant::Budget), 0, now);
        self.hedges.push(now);
        self.hedges_under_way += 1;
        let second = (now.as_micros() / 1_000_000).saturating_sub(BUDGET_SECONDS - 1);
        let lately = Moment::from_micros(second * 1_000_000);
        let requests = self.requests.iter().filter(|at| **at >= lately).count() as f64;
        let made = self.hedges.iter().filter(|at| now.since(**at) < HEDGE_WINDOW).count() as f64;
        let most = policies.progress.hedge_ratio * requests;
        let alone = self.hedges_under_way == 1 && policies.progress.hedge_ratio > 0.0;
        self.require(alone || made <= most + 1e-6, "hedges are a small share of the requests", || {
            format!("{made} in ten seconds, {most} allowed")
        });
    }

    pub(crate) fn hedge_over(&mut self) {
        self.hedges_under_way -= 1;
    }

    /// A token came from there, in truth.
    pub(crate) fn gave_token(&mut self, i: usize, at: Moment) {
        self.tokens[i] = self.tokens[i].max(at);
    }

    /// Work that was thrown off another is sent there.
    pub(crate) fn rescued_to(&mut self, i: usize, now: Moment) {
        self.count("rescued work is spared");
        self.rescued_to[i] = Some(now);
    }

    /// A backend is about to be called stuck, with this `work` unfinished.
    pub(crate) fn stuck(
        &mut self,
        policies: &Policies,
        (i, proof): (usize, Proof),
        late: usize,
        work: &[Work],
        now: Moment,
    ) {
        let silent = now.since(self.tokens[i]);
        let shortest = work.iter().map(|work| now.since(work.heard)).max().unwrap_or_default();
        self.require(!work.is_empty() && !silent.is_zero(), "who moves is not stuck", || {
            format!("{i} gave a token {silent:?} ago, its work waits {shortest:?}")
        });
        if proof == Proof::Unanswered {
            return;
        }
        self.count("outrun");
        let rescued = self.rescued_to[i].filter(|at| now.since(*at) < policies.progress.first_token_min);
        self.require(rescued.is_none(), "rescued work may take its time", || format!("{i}: {rescued:?}"));
        self.require(late >= 2 && work.len() >= late, "one late attempt proves nothing", || {
            format!("{i}: {late} of {work:?}")
        });
        // The first that still waits: somebody else must have given a token since it came, or nobody moves.
        let since = work.iter().map(|work| work.heard).min().unwrap_or(now);
        let peers = (0..self.tokens.len()).filter(|peer| *peer != i);
        let moved = peers.map(|peer| self.tokens[peer]).max().unwrap_or_default();
        self.require(moved > since, "a standstill of everybody ejects nobody", || {
            format!("{i}, silent since {since:?}; the others since {moved:?}")
        });
    }

    /// It was.
    pub(crate) fn ejected_stuck(&mut self, i: usize, proof: Proof, eligible_before: usize, now: Moment) {
        self.count("ejected as stuck");
        let last = self.tokens[i];
        let after = self.stuck_at.filter(|at| now.since(*at) < AFTERMATH);
        let cascade = proof == Proof::Outrun && after.is_some_and(|at| last >= at);
        self.require(!cascade, "an ejection does not lead to the next", || {
            format!("{i} gave a token at {last:?}, after {after:?}; {eligible_before} were eligible")
        });
        self.stuck_at = Some(now);
        self.first_stuck.get_or_insert((i, now));
    }

    /// The attempt at the suspect that was asked last, or before, sent nothing.
    pub(crate) fn refunded(&mut self) {
        self.retries.pop();
    }

    /// One waits in line.
    pub(crate) fn joined(&mut self, x: usize, priority: Priority, length_max: usize) {
        self.count("queued");
        let before = self.waiting.insert(x, priority);
        self.require(before.is_none(), "nobody waits twice", || format!("x{x}"));
        let waiting = self.waiting.len();
        self.longest_line = self.longest_line.max(waiting);
        self.require(waiting <= length_max, "the queue is bounded", || {
            format!("{waiting} wait, {length_max} may")
        });
    }

    /// It waits no more.
    pub(crate) fn left(&mut self, x: usize) {
        let waited = self.waiting.remove(&x);
        self.require(waited.is_some(), "whoever waits leaves exactly once", || format!("x{x}"));
    }

    /// It had its turn, and found a backend.
    pub(crate) fn let_in(&mut self, x: usize, paced: bool, now: Moment) {
        let waits = |priority: &Priority| self.waiting.values().any(|other| other == priority);
        let all = Priority::ALL.iter().all(waits);
        let low = u32::from(self.waiting.get(&x) == Some(&Priority::Low));
        self.left(x);
        self.count("let in");
        self.turns = if all { (self.turns.0 + 1, self.turns.1 + low) } else { (0, 0) };
        let (turns, lowest) = self.turns;
        if all {
            self.count("turn while all priorities wait");
        }
        self.require(turns < 10 * (lowest + 2), "the lowest priority gets every tenth turn", || {
            format!("{lowest} of {turns}")
        });
        if !paced {
            return;
        }
        self.count("let in by the pace");
        let Some(crowd) = &mut self.crowd else { return };
        crowd.let_in += 1;
        let doublings = now.since(crowd.began).as_secs_f64() / PACE_DOUBLING.as_secs_f64();
        let most = f64::from(PACE_START * crowd.returns) * doublings.exp2() + 2.0 * f64::from(crowd.spoke);
        let made = crowd.let_in;
        self.require(f64::from(made) < most + 1.0, "a crowd is let in by and by", || {
            format!("{made} are in, {most} may")
        });
    }

    /// A backend returned while somebody waits.
    pub(crate) fn backend_returned(&mut self, now: Moment) {
        match &mut self.crowd {
            Some(crowd) if now.since(crowd.began) < PACE_LASTS => crowd.returns += 1,
            crowd => *crowd = Some(Crowd { began: now, returns: 1, let_in: 0, spoke: 0 }),
        }
    }

    /// Something else is the limit now.
    pub(crate) fn pace_over(&mut self) {
        self.crowd = None;
    }

    /// One of those let in got its first token.
    pub(crate) fn paced_one_spoke(&mut self) {
        if let Some(crowd) = &mut self.crowd {
            crowd.spoke += 1;
        }
    }

    /// A backend has refused one, and its cap was learned.
    pub(crate) fn refused(&mut self, gateway: &Gateway, i: usize) {
        let Some(cap) = gateway.crowd.learned(i) else { return };
        self.count("cap learned");
        let proven = gateway.crowd.proven(i);
        self.require(cap >= proven.max(1), "no cap is below what succeeded", || {
            format!("{i}: {cap}, {proven} were served")
        });
    }

    /// An attempt begins.
    pub(crate) fn begins(&mut self, gateway: &Gateway, choice: Choice, tried: &[usize], now: Moment) {
        let i = choice.backend();
        let standing = gateway.standing(i, now);
        let in_flight = gateway.backends[i].in_flight;
        self.under_way += 1;
        self.require(
            !tried.contains(&i),
            "a backend that was tried is not tried again while others exist",
            || format!("{choice:?} with {tried:?} tried"),
        );
        self.require(gateway.backends[i].present, "only members are chosen", || format!("{choice:?}"));
        let until = self.leave_alone_until[i];
        self.require(until <= now, "a stated Retry-After is a floor", || {
            format!("{choice:?} before {until:?}")
        });
        match choice {
            Choice::Ordinary(_) => {
                self.count("attempt");
                let fits = matches!(standing, Standing::Eligible { .. }) && gateway.has_room(i, now);
                self.require(fits, "ordinary attempts go to eligible backends with room", || {
                    format!("{i} is {standing:?} with {in_flight} in flight")
                });
            }
            Choice::Trial(_) => {
                self.count("attempt as a trial");
                self.trials[i] += 1;
                let under_way = self.trials[i];
                self.require(under_way == 1, "one trial at a time", || format!("{under_way} at {i}"));
            }
            Choice::Suspect(_) => {
                self.count("attempt in panic");
                self.require(in_flight == 0, "in panic a suspect carries one attempt", || {
                    format!("{i} has {in_flight} already")
                });
                let (members, eligible) = (gateway.members(), gateway.eligible(now));
                self.require(eligible * 5 <= members, "panic only when too few are eligible", || {
                    format!("{eligible} of {members} are")
                });
            }
        }
    }

    /// A trial has shown what it will, or is lost.
    pub(crate) fn trial_over(&mut self, i: usize) {
        self.trials[i] = self.trials[i].saturating_sub(1);
    }

    pub(crate) fn ends(&mut self) {
        self.under_way -= 1;
    }

    /// Attempts of one exchange.
    pub(crate) fn attempts(
        &mut self,
        policies: &Policies,
        members: usize,
        (sent, stale, unsent): (u32, u32, u32),
        hedged: bool,
    ) {
        // Beside the last one, when it is late, another may run.
        let most = u32::from(policies.retry.attempts_max) + u32::from(hedged);
        self.require(sent <= most + stale.min(1), "attempts of an exchange are bounded", || {
            format!("{sent} reached a backend ({stale} of them on stale connections), {most} allowed")
        });
        self.require(
            unsent <= members as u32 + UNSENT_REPEATS_MAX,
            "attempts that sent nothing are bounded",
            || format!("{unsent} of {members} backends"),
        );
    }

    /// What a judge was told.
    pub(crate) fn told(&mut self, gateway: &Gateway, i: usize, told: Told, now: Moment) {
        match told {
            Told::Observation(Observation::Busy { until }) => {
                self.blameless[i] = false;
                if let Some(until) = until {
                    let until = until.min(now + gateway.policies.health.retry_after_max);
                    self.leave_alone_until[i] = self.leave_alone_until[i].max(until);
                }
            }
            Told::Observation(Observation::Fault | Observation::Silent | Observation::Misconfigured) => {
                self.blameless[i] = false
            }
            Told::Observation(Observation::Success | Observation::FirstToken | Observation::Neutral)
            | Told::Tick
            | Told::Slow(_) => {}
            Told::Stuck(_) => self.blameless[i] = false,
            Told::Probe(verdict) => {
                self.blameless[i] &= matches!(verdict, ProbeVerdict::Pass | ProbeVerdict::WeakPass);
            }
        }
    }

    /// A judge has changed its mind.
    pub(crate) fn changed(&mut self, policies: &Policies, change: &Change, now: Moment) {
        self.count(change.transition.name());
        match change.transition {
            Transition::Ejected { until, lasts, reason, .. } => {
                self.count(reason.name());
                self.require(
                    change.eligible_before == 0 || change.eligible_after > 0,
                    "an observation never removes the last eligible backend",
                    || format!("{change:?}"),
                );
                let most = match reason {
                    EjectReason::Misconfigured => policies.health.misconfigured_ejection,
                    EjectReason::ConsecutiveFaults(_)
                    | EjectReason::SuccessRate { .. }
                    | EjectReason::Stuck(_)
                    | EjectReason::Slow { .. } => policies.health.ejection_max,
                };
                self.require(lasts <= most && until == now + lasts, "ejections are bounded", || {
                    format!("{change:?}")
                });
                let statistical =
                    matches!(reason, EjectReason::SuccessRate { .. } | EjectReason::Slow { .. });
                self.require(
                    !statistical || change.ejected_after <= (change.members / 2).max(1),
                    "statistics eject at most half of a pool",
                    || format!("{change:?}"),
                );
            }
            Transition::TrialFailed { lasts, .. } => {
                self.require(lasts <= policies.health.ejection_max, "ejections are bounded", || {
                    format!("{change:?}")
                });
            }
            Transition::Kept { because, .. } => self.count(because.name()),
            _ => {}
        }
    }

    /// An exchange found nobody to take it, and everybody in time was asked.
    pub(crate) fn nobody(&mut self, gateway: &Gateway, tried: &[usize], now: Moment) {
        for i in 0..gateway.backends.len() {
            let open = !gateway.silence.is_shunned(i) && gateway.has_room(i, now);
            let sound = self.blameless[i] && gateway.is_eligible(i, now) && open;
            self.require(!sound || tried.contains(&i), "who is sound and free is asked", || {
                format!("{i} was not, but {tried:?}")
            });
        }
    }

    /// All who have been tried are forgotten: a second round begins.
    pub(crate) fn another_round(&mut self, gateway: &Gateway, tried: &[usize], now: Moment) {
        self.nobody(gateway, tried, now);
        for i in (0..gateway.backends.len()).filter(|i| !tried.contains(i)) {
            let shunned = gateway.silence.is_shunned(i);
            let open = gateway.is_eligible(i, now) && gateway.has_room(i, now) && !shunned;
            self.require(!open, "a backend that was tried is not tried again while others exist", || {
                format!("{i} is there, {tried:?} were tried")
            });
        }
    }

    /// After every event; `looks`: while somebody looks at the clock.
    pub(crate) fn at_rest(&mut self, gateway: &Gateway, now: Moment, looks: bool) {
        let in_flight: u32 = gateway.backends.iter().map(|backend| backend.in_flight).sum();
        let under_way = self.under_way;
        self.require(in_flight == under_way, "in-flight counts what is under way", || {
            format!("{in_flight} counted, {under_way} under way")
        });
        for (i, backend) in gateway.backends.iter().enumerate() {
            let next = backend.health.next_change(&gateway.policies.health);
            // A look comes every second.
            let overdue = next.is_some_and(|next| next + Duration::from_secs(2) < now);
            self.require(!overdue || !backend.present || !looks, "time is noticed", || {
                format!("{i}: {next:?} at {now:?}")
            });
        }
    }

    /// Every backend should be back.
    pub(crate) fn recovered(&mut self, gateway: &Gateway, plan: &Plan, now: Moment) {
        for i in 0..gateway.backends.len() {
            let standing = gateway.standing(i, now);
            self.require(
                matches!(standing, Standing::Eligible { .. }),
                "a backend that had a bad minute is back within the bound",
                || format!("{i} is {standing:?} at {now:?}, well since {:?}", plan.well_from),
            );
        }
    }

    /// Nothing is left.
    pub(crate) fn over(&mut self, gateway: &Gateway, arrived: usize, ended: usize) {
        self.require(arrived == ended, "every exchange ends exactly once", || {
            format!("{ended} of {arrived} ended")
        });
        let waiting: Vec<usize> = self.waiting.keys().copied().collect();
        self.require(waiting.is_empty(), "whoever waits leaves exactly once", || format!("{waiting:?}"));
        let left: Vec<u32> = gateway.backends.iter().map(|backend| backend.in_flight).collect();
        self.require(left.iter().all(|n| *n == 0), "in-flight returns to zero", || format!("{left:?}"));
    }
}
