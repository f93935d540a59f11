//! Where `policy::health::Quarantine` meets the backends: offences in, quarantine out, and canaries between.
//!
//! Choosing a backend pays nothing for it: who is quarantined is not plainly eligible, and is looked at anew. A
//! stream asks one flag whether its backend was overruled lately. The canary asks what the latest offence was
//! about: the same path, for the same model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock;
use crate::policy::Moment;
use crate::policy::health::{Confinement, Quarantine};
use crate::pool::backend::Record;
use crate::pool::pick::Choice;
use crate::pool::snapshot::Pool;
use crate::telemetry::events::BackendTransition;

/// Pause between two canaries while the first of a quarantine pass or fail.
const CANARY_PAUSE: Duration = Duration::from_secs(2);

/// What a canary asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    /// Path without the backend's prefix.
    pub path: String,
    /// The model, as the backends know it.
    pub model: Option<String>,
}

/// How far one (backend, model) is believed.
#[derive(Debug, Default)]
pub(super) struct Belief {
    quarantine: Mutex<Quarantine>,
    /// It is in quarantine, or was overruled lately: spare the lock.
    out: AtomicBool,
    wary: AtomicBool,
    canary: Mutex<Option<Arc<Canary>>>,
}

impl Belief {
    /// Whether it is in quarantine.
    pub(super) fn is_out(&self) -> bool {
        self.out.load(Ordering::Acquire)
    }

    fn change(&self, change: impl FnOnce(&mut Quarantine) -> Option<Confinement>) -> Option<Confinement> {
        let mut quarantine = self.quarantine.lock();
        let changed = change(&mut quarantine);
        self.out.store(quarantine.since().is_some(), Ordering::Release);
        self.wary.store(quarantine.is_wary(clock::now()), Ordering::Relaxed);
        changed
    }

    fn forget(&self, now: Moment) {
        if self.wary.load(Ordering::Relaxed) && !self.is_out() {
            self.change(|quarantine| {
                quarantine.forget(now);
                None
            });
        }
    }
}

impl Record {
    /// Since when it has been in quarantine.
    pub fn quarantined_since(&self) -> Option<Moment> {
        if self.belief.is_out() { self.belief.quarantine.lock().since() } else { None }
    }

    /// Whether a peer has overruled it lately.
    pub fn is_wary(&self) -> bool {
        self.belief.wary.load(Ordering::Relaxed)
    }

    pub(super) fn forget_offences(&self, now: Moment) {
        self.belief.forget(now);
    }
}

impl Choice {
    /// A peer said something else than what this backend repeated; `asked` is what it was asked for.
    pub fn offended(&self, asked: Canary) {
        let backend = self.backend();
        let model = self.model_of(&self.record);
        let now = clock::now();
        let others = self.pool.peers(self.index, model.as_deref(), now).others_eligible;
        backend.metrics.offences.inc();
        *self.record.belief.canary.lock() = Some(Arc::new(asked));
        let told = self.record.belief.change(|quarantine| quarantine.offend(now, others));
        if let Some(told) = told {
            self.pool.confined(self.index, &self.record, model.as_deref(), &told);
        }
    }
}

impl Pool {
    /// What the next canary of member `i` asks, of whose judge, and when it is due; none while none is.
    pub fn next_canary(&self, i: usize) -> Option<(Arc<Record>, Arc<Canary>, Moment)> {
        let due = |record: Arc<Record>| {
            if !record.belief.is_out() {
                return None;
            }
            let due = record.belief.quarantine.lock().canary_due(CANARY_PAUSE)?;
            let canary = record.belief.canary.lock().clone()?;
            Some((record, canary, due))
        };
        self.members[i].backend.records().filter_map(due).min_by_key(|(.., due)| *due)
    }

    /// A canary of member `i` showed whether the judge's model may be believed again.
    pub fn canary_told(&self, i: usize, record: &Arc<Record>, passed: bool) {
        let now = clock::now();
        let models = self.members[i].backend.models();
        let model = models.into_iter().find(|(_, own)| Arc::ptr_eq(own, record)).map(|(name, _)| name);
        if let Some(told) = record.belief.change(|quarantine| quarantine.canary(now, passed)) {
            self.confined(i, record, model.as_deref(), &told);
        }
    }

    /// Tells what happened, and does what follows from it.
    fn confined(&self, i: usize, record: &Arc<Record>, model: Option<&str>, told: &Confinement) {
        let backend = &self.members[i].backend;
        let worse = match told {
            Confinement::Quarantined | Confinement::Kept | Confinement::CanaryFailed => true,
            Confinement::CanaryPassed | Confinement::Released { .. } => false,
        };
        BackendTransition {
            at: &backend.metrics,
            model,
            name: told.name(),
            transition: told,
            ejected_for: None,
            worse,
        }
        .emit(&self.state.telemetry);
        let now = clock::now();
        // Whether it is plainly eligible has changed.
        record.judge(&self.config.health, now, |_health| None);
        match told {
            Confinement::Quarantined => {
                backend.want_canary();
                self.settle(now);
            }
            Confinement::Released { .. } => {
                self.settle(now);
                self.state.backend_returned();
            }
            Confinement::Kept | Confinement::CanaryFailed | Confinement::CanaryPassed => {}
        }
        self.publish_standing();
    }
}
