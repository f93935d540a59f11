//! A leg that is begun while the one before it still speaks: a move, make before break.
//!
//! ```text
//! old leg ── commits ──────────────────────────▶ silent for good
//! new leg      plan_beside ─ begin_beside ─ feed_beside … says something new ─ prefer_beside ─▶ commits
//! ```
//!
//! A replay is compared with a journal that still grows: it has something new to say once it is ahead of the old
//! leg. A continuation begins at the text of its plan, so the journal must stand still until it speaks: the caller
//! keeps back what the old leg says meanwhile, and a leg that comes too late is abandoned here.
//!
//! Invariant: of the two, one adds to the journal at a time. What `feed_beside` writes is new at that moment, and
//! from then on the old leg must not be listened to.

use super::{Abandon, Fed, Leg, Plan, Refused, Splice, Strategy};
use crate::policy::dialect::Engine;

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct Beside {
    leg: Leg,
    /// Bytes of text that the client had when it was planned; only a continuation minds.
    continues: Option<usize>,
}

impl Beside {
    pub(super) fn held(&self) -> usize {
        self.leg.held()
    }
}

impl Plan {
    /// Whether the old leg must be kept from adding anything while this one is being begun.
    pub fn needs_stillness(&self) -> bool {
        self.strategy != Strategy::Replay
    }
}

impl Splice {
    /// As [`plan`](Self::plan), while the leg under way goes on.
    ///
    /// # Errors
    /// Why there is no way.
    pub fn plan_beside(&mut self, engine: Option<Engine>, body: &[u8]) -> Result<Plan, Refused> {
        self.beside = None;
        self.planned_at = self.journal.text().len();
        let leg = self.leg.take();
        let plan = self.plan(engine, body);
        self.leg = leg;
        plan
    }

    /// The second leg of this plan begins.
    pub fn begin_beside(&mut self, plan: &Plan) {
        let leg = self.leg.take();
        self.begin_leg(plan);
        let continues = plan.needs_stillness().then_some(self.planned_at);
        self.beside = std::mem::replace(&mut self.leg, leg).map(|leg| Beside { leg, continues });
    }

    /// As [`feed`](Self::feed), for the second leg. Once it has written anything the client is its own: see
    /// [`prefer_beside`](Self::prefer_beside). It does not count as a resume.
    ///
    /// # Errors
    /// Abandon it; if nothing was written, the old leg goes on.
    pub fn feed_beside(&mut self, raw: &[u8], out: &mut Vec<u8>) -> Result<Fed, Abandon> {
        let Some(Beside { leg, continues }) = self.beside.take() else { return Err(Abandon::NoLeg) };
        let moved_on = continues.is_some_and(|at| !leg.told.spoke && at != self.journal.text().len());
        // What the client holds can no longer be compared, or needs no second leg.
        let told = leg.told.spoke;
        let void = !told && (self.journal.overflow || self.journal.unreadable || self.journal.finished);
        if moved_on || void {
            return Err(Abandon::Overtaken);
        }
        let (old, resumes) = (self.leg.replace(leg), self.resumes);
        let fed = self.feed(raw, out);
        self.resumes = resumes;
        self.beside = std::mem::replace(&mut self.leg, old).map(|leg| Beside { leg, continues });
        fed
    }

    /// The second leg goes on alone.
    pub fn prefer_beside(&mut self) {
        self.leg = self.beside.take().map(|beside| beside.leg);
    }

    /// The second leg is given up, and the old one goes on.
    pub fn drop_beside(&mut self) {
        self.beside = None;
    }
}
