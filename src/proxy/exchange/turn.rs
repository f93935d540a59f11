//! Waiting for a backend: who may choose at once, who joins the line, and when it is enough.
//!
//! Whoever arrives while others wait joins behind them; whoever finds nobody joins, too. There are two kinds
//! of wait, each with its own bound over the whole exchange: for a free slot (`queue.wait_max`), and for a pool
//! that is down or asks for a pause (`retry.wait_max`). Not here: who is called when (`pool::Line`), and what
//! is worth another attempt (`policy::retry`).

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::Exchange;
use crate::clock;
use crate::policy::Moment;
use crate::policy::admission::{Full, Priority};
use crate::policy::fallback::FallbackCause;
use crate::policy::health::Observation;
use crate::policy::retry::{Facts, backoff};
use crate::pool::{About, BackendId, Choice, Joining, Nobody, Pool, Turn, Waiting, Wanted};
use crate::proxy::respond::Refusal;
use crate::proxy::worker::Worker;
use crate::upstream::Want;

/// Between two looks for a backend that takes connections, before a body is asked for.
const STAND_BY_LOOK: Duration = Duration::from_millis(100);

/// Longest wait of what an ejection threw off: after it a crowd is no longer one (`Pace`).
const RESCUE_WAIT_MAX: Duration = Duration::from_secs(2);

/// How long an exchange waits, and what for.
#[derive(Default)]
pub(super) struct Waits {
    /// End of all waiting for a free slot.
    slot: Option<Moment>,
    /// End of all waiting for a backend that is down or asked for a pause.
    backend: Option<Moment>,
    /// Attempts there had been when it began to wait for a pause to end.
    pause_after: Option<u32>,
}

impl Exchange {
    /// The backend of the next attempt: one not tried yet, else one tried before, else whoever comes in time.
    pub(super) async fn choose(&mut self) -> Result<Choice, Refusal> {
        self.follow_reload();
        if let Some(choice) = self.elsewhere().await {
            return Ok(choice);
        }
        let nobody = match self.not_its_turn() {
            Some(nobody) => nobody,
            None => match self.pick() {
                Ok(choice) => return Ok(choice),
                Err(nobody) => nobody,
            },
        };
        let waited = self.wait(nobody).await;
        waited.inspect_err(|refusal| {
            if let Some(reason) = refusal.queue_reason() {
                self.leg.pool.state.metrics.count_queue_refusal(reason);
            }
        })
    }

    /// What an ejection threw off goes elsewhere in its turn, with the rest of a crowd that might do to the
    /// survivors what it did to the dead one. None where there is no crowd, or nobody else.
    async fn elsewhere(&mut self) -> Option<Choice> {
        if self.history.attempts() == 0 || !self.leg.pool.state.is_rescuing() {
            return None;
        }
        let most = clock::now() + RESCUE_WAIT_MAX;
        let end = self.leg.total.map_or(most, |total| total.min(most));
        let waiting = self.join(end, true).ok()?;
        // Its turn or its time: it was admitted long ago.
        waiting.turn(end).await;
        self.follow_reload();
        let mut choice = self.pick().ok()?;
        choice.let_in = waiting.let_in();
        Some(choice)
    }

    /// What one who arrives has to wait for, where others wait already.
    fn not_its_turn(&self) -> Option<Nobody> {
        let state = &self.leg.pool.state;
        let waits =
            state.waiters() > 0 && self.history.attempts() == 0 && state.someone_waits(self.judged_model());
        waits.then(|| self.leg.pool.nobody(&self.wanted()))
    }

    async fn wait(&mut self, mut nobody: Nobody) -> Result<Choice, Refusal> {
        let mut place: Option<Waiting> = None;
        loop {
            let Some(end) = self.may_wait(nobody) else { return Err(self.refusal(nobody)) };
            if nobody == Nobody::AllTried {
                place = None;
                self.back_off(end).await;
                self.tried.clear();
                self.follow_reload();
                let someone_waits = self.leg.pool.state.someone_waits(self.judged_model());
                match if someone_waits { Err(self.leg.pool.nobody(&self.wanted())) } else { self.pick() } {
                    Ok(choice) => return Ok(choice),
                    Err(none) => nobody = none,
                }
                continue;
            }
            let waiting = match place.take() {
                Some(mut waiting) => {
                    waiting.wait_on(end, nobody == Nobody::Full);
                    place.insert(waiting)
                }
                None => match self.join(end, false) {
                    Ok(waiting) => place.insert(waiting),
                    // It was admitted before: at worst it is one too many for a moment.
                    Err(Full) if self.history.attempts() > 0 => {
                        return self.pick().map_err(|nobody| self.refusal(nobody));
                    }
                    Err(Full) => {
                        let state = &self.leg.pool.state;
                        return Err(Refusal::QueueFull(state.retry_after(state.waiters())));
                    }
                },
            };
            let its_turn = waiting.turn(end).await;
            self.follow_reload();
            nobody = if its_turn {
                match self.pick() {
                    Ok(mut choice) => {
                        choice.let_in = place.take().and_then(Waiting::let_in);
                        return Ok(choice);
                    }
                    Err(nobody) => nobody,
                }
            } else {
                self.leg.pool.nobody(&self.wanted())
            };
        }
    }

    fn join(&self, deadline: Moment, rescued: bool) -> Result<Waiting, Full> {
        let model = self.judged_model();
        let again = self.history.attempts() > 0;
        let joining = Joining {
            priority: self.priority(),
            admitted: again.then_some(self.ledger.started),
            rescued,
            deadline,
            length_max: self.leg.pool.queue_length_max(model),
        };
        self.leg.pool.state.join(model, joining)
    }

    /// Read only here: most requests never wait.
    fn priority(&self) -> Priority {
        self.asked.priority.unwrap_or_else(|| {
            let given = self.asked.headers.get(&self.leg.pool.config.queue.priority_header);
            given.map_or(Priority::Normal, |value| Priority::of_header(value.as_bytes()))
        })
    }

    /// How long a backend may be waited for; `None` when it is enough or would be for nothing.
    fn may_wait(&mut self, nobody: Nobody) -> Option<Moment> {
        let now = clock::now();
        let (end, wait_max) = match nobody {
            Nobody::Full => (&mut self.waits.slot, self.leg.pool.config.queue.wait_max),
            Nobody::Busy { .. } | Nobody::Down | Nobody::AllTried => {
                (&mut self.waits.backend, self.leg.policy.wait_max)
            }
        };
        let most = now + wait_max;
        let end = *end.get_or_insert(self.leg.total.map_or(most, |total| total.min(most)));
        if end <= now {
            return None;
        }
        // Nobody will see the request here soon, and another pool may take it at once.
        let unseen = match nobody {
            Nobody::Down => true,
            Nobody::AllTried => self.failed.is_some_and(|failed| !failed.sent),
            Nobody::Full | Nobody::Busy { .. } => false,
        };
        if unseen && self.fallback_for(FallbackCause::Unavailable).is_some() {
            return None;
        }
        if let Nobody::Busy { until } = nobody {
            // One attempt after the pause; what is busy still then is so for longer.
            let attempts = self.history.attempts();
            let pauses_over = *self.waits.pause_after.get_or_insert(attempts) < attempts;
            if until > end || pauses_over {
                return None;
            }
        }
        Some(end)
    }

    /// Everybody was tried: a pause before the next round, within the time for waiting.
    async fn back_off(&mut self, until: Moment) {
        self.rounds += 1;
        let pause = self.worker.with_rng(|rng| backoff(&self.leg.policy, self.rounds, rng));
        tokio::time::sleep(pause.min(until.since(clock::now()))).await;
    }

    fn pick(&self) -> Result<Choice, Nobody> {
        self.worker.with_rng(|rng| self.leg.pool.pick(&self.wanted(), rng))
    }

    pub(in crate::proxy) fn wanted(&self) -> Wanted<'_> {
        Wanted {
            tried: &self.tried,
            class: self.asked.class,
            model: self.judged_model(),
            affinity: self.leg.affinity,
            only: self.turn.as_ref().and_then(Turn::place),
            prompt_bytes: self.asked.prompt_bytes,
            proven_since: self.failed.map(|_| self.ledger.started),
            replayable: self.is_replayable(),
            paid: self.failed.is_some_and(|facts| facts.sent && !facts.is_stale_connection()),
        }
    }

    fn judged_model(&self) -> Option<&str> {
        self.leg.pool.judged_model(self.leg.model.as_deref())
    }

    /// Streams last for minutes: each attempt sees the pool as it is then.
    fn follow_reload(&mut self) {
        let snapshot = self.worker.directory.look();
        if let Some(pool) = snapshot.pools.iter().find(|pool| Arc::ptr_eq(&pool.state, &self.leg.pool.state))
            && !Arc::ptr_eq(pool, &self.leg.pool)
        {
            self.leg.pool = pool.clone();
        }
    }

    fn refusal(&self, nobody: Nobody) -> Refusal {
        match nobody {
            Nobody::Full => {
                let state = &self.leg.pool.state;
                // Itself it waits no more.
                Refusal::QueueTimeout(state.retry_after(state.waiters().saturating_sub(1)))
            }
            Nobody::Busy { until } => Refusal::Busy(until.since(clock::now())),
            Nobody::Down => Refusal::Down,
            Nobody::AllTried => self.all_failed(),
        }
    }

    /// Everybody was tried and there is no time for another round.
    fn all_failed(&self) -> Refusal {
        match self.failed {
            Some(Facts { sent: true, cause, .. }) => Refusal::Failed { cause, enough: "all_tried" },
            // Nobody has even seen the request.
            Some(_) | None => Refusal::Down,
        }
    }
}

/// Makes sure that a connection to some backend of `pool` stands: `100 Continue` promises that the body
/// has somewhere to go. Waits `wait` for one. Where only slots are missing nothing is asked: the body waits its
/// turn here.
///
/// # Errors
/// When none can be made.
pub(in crate::proxy) async fn stand_by(
    worker: &Worker,
    pool: &Arc<Pool>,
    asked: &Wanted<'_>,
    wait: Duration,
) -> Result<(), Refusal> {
    let until = clock::now() + wait;
    let mut tried: SmallVec<[BackendId; 4]> = SmallVec::new();
    loop {
        let wanted = Wanted { tried: &tried, ..*asked };
        let nobody = match worker.with_rng(|rng| pool.pick(&wanted, rng)) {
            Ok(choice) if connects(worker, &choice).await => return Ok(()),
            Ok(choice) => {
                tried.push(choice.backend().id);
                continue;
            }
            Err(nobody) => nobody,
        };
        let left = until.since(clock::now());
        match nobody {
            Nobody::Full => return Ok(()),
            Nobody::Busy { until } if left.is_zero() => {
                return Err(Refusal::Busy(until.since(clock::now())));
            }
            Nobody::Down | Nobody::AllTried if left.is_zero() => return Err(Refusal::Down),
            Nobody::Busy { .. } | Nobody::Down | Nobody::AllTried => {
                tokio::time::sleep(left.min(STAND_BY_LOOK)).await;
                tried.clear();
            }
        }
    }
}

/// Whether a connection stands, or can be made.
async fn connects(worker: &Worker, choice: &Choice) -> bool {
    let member = choice.member();
    match member.backend.lane(worker.index).lease(&member.target, Want::Any).await {
        Ok(lease) => {
            lease.give_back();
            choice.nothing_sent();
            true
        }
        Err(_refused) => {
            worker.with_rng(|rng| choice.observe(About::Backend, Observation::Fault, rng));
            false
        }
    }
}
