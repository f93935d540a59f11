//! What the backends of a pool run, and which of them can go on with a stream that began at another.
//!
//! A backend tells its engine and version beside its list of models; both are asked for again after every absence.
//! What is not known is not assumed: a stream then goes on by a replay. A build that refused to continue is not asked
//! to again until another process may answer there.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use crate::policy::dialect::Engine;
use crate::policy::health::Administrative;
use crate::policy::resume::{Build, Peers, Strategy};
use crate::pool::backend::{Backend, BackendId};
use crate::pool::snapshot::Pool;

/// Refusals remembered of one backend: a way for each of so many models.
const REFUSED_MAX: usize = 64;

/// What is known of one backend's build.
#[derive(Default)]
pub(super) struct Known {
    build: ArcSwapOption<Build>,
    refused: Mutex<Vec<(Strategy, Option<String>)>>,
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Known").field(&self.build.load()).finish()
    }
}

impl Backend {
    /// What it runs, where it told.
    pub fn build(&self) -> Option<Arc<Build>> {
        self.known.build.load_full()
    }

    /// It runs this: asked after an absence, so that what another process refused is forgotten.
    pub fn set_build(&self, build: Option<Build>) {
        self.known.build.store(build.map(Arc::new));
        self.known.refused.lock().clear();
    }

    /// It refused to go on with a stream of `model` this way.
    pub fn refused_to_continue(&self, strategy: Strategy, model: Option<&str>) {
        let mut refused = self.known.refused.lock();
        if refused.len() < REFUSED_MAX {
            refused.push((strategy, model.map(str::to_owned)));
        }
    }

    fn has_refused(&self, strategy: Strategy, model: Option<&str>) -> bool {
        self.known.refused.lock().iter().any(|(way, of)| *way == strategy && of.as_deref() == model)
    }
}

/// Where a stream began, as far as it matters to who may go on with it.
#[derive(Clone, Debug)]
pub struct Origin {
    engine: Option<Engine>,
    build: Option<Arc<Build>>,
    model: Option<String>,
    context: Context,
}

/// What a list says of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Context {
    /// There is no list.
    Unknown,
    /// It is not in the list.
    Absent,
    /// It is, and so many tokens fit, where that is told.
    Listed(Option<u64>),
}

impl Pool {
    /// The engine of member `i` if it gives ids to who asks, and takes them back.
    pub fn gives_ids(&self, i: usize) -> Option<Engine> {
        let build = self.members[i].backend.known.build.load();
        build.as_ref().filter(|build| build.continues_ids()).map(|build| build.engine)
    }

    /// Of a stream of `model` that begins at member `i`.
    pub fn origin(&self, i: usize, model: Option<&str>) -> Origin {
        Origin {
            engine: self.engine(i),
            build: self.members[i].backend.build(),
            model: model.map(str::to_owned),
            context: self.context(i, model),
        }
    }

    /// What can be asked of the others to go on with a stream; `tried` are out of the question.
    pub fn who_continues(&self, origin: &Origin, tried: &[BackendId]) -> Peers {
        let any = |strategy| {
            (0..self.members.len()).any(|i| {
                let backend = &self.members[i].backend;
                backend.admin() == Administrative::Enabled
                    && !tried.contains(&backend.id)
                    && self.may_continue(i, origin, strategy)
            })
        };
        Peers {
            engine: origin.engine,
            text: any(Strategy::Text),
            ids: any(Strategy::Exact) || any(Strategy::ExactTranslated),
            context_max: match origin.context {
                Context::Listed(most) => most,
                Context::Unknown | Context::Absent => None,
            },
        }
    }

    /// Whether member `i` may go on with a stream this way: another of the same engine, model and size of context, and
    /// for ids of the same tokenizer.
    pub fn may_continue(&self, i: usize, origin: &Origin, strategy: Strategy) -> bool {
        if strategy == Strategy::Replay {
            return true;
        }
        let backend = &self.members[i].backend;
        let context = self.context(i, origin.model.as_deref());
        if origin.engine.is_none()
            || self.engine(i) != origin.engine
            || backend.has_refused(strategy, origin.model.as_deref())
        {
            return false;
        }
        let build = backend.known.build.load();
        match strategy {
            Strategy::Replay => true,
            Strategy::Text => {
                let alike =
                    context == origin.context || [context, origin.context].contains(&Context::Unknown);
                // The operator's word stands for a version that is not told.
                let told = build.as_ref().filter(|build| build.version.is_some());
                alike && told.map_or(self.config.probe.page.preset.is_some(), |build| build.continues_text())
            }
            Strategy::Exact | Strategy::ExactTranslated => {
                let of = origin.build.as_ref();
                matches!(context, Context::Listed(_))
                    && context == origin.context
                    && build.as_ref().zip(of).is_some_and(|(build, of)| {
                        build.continues_ids() && of.continues_ids() && build.shares_ids_with(of)
                    })
            }
        }
    }

    /// As it tells, or as configured. None where the two differ.
    fn engine(&self, i: usize) -> Option<Engine> {
        let told = self.members[i].backend.known.build.load().as_ref().map(|build| build.engine);
        let configured = self.config.probe.page.preset;
        match (told, configured) {
            (Some(told), Some(configured)) if told != configured => None,
            _ => told.or(configured),
        }
    }

    fn context(&self, i: usize, model: Option<&str>) -> Context {
        let Some(listed) = self.members[i].backend.listed() else { return Context::Unknown };
        let place = match model {
            Some(model) => listed.ids.iter().position(|id| id == model),
            None => (listed.ids.len() == 1).then_some(0),
        };
        match place.and_then(|place| listed.entries.get(place)) {
            Some(entry) => Context::Listed(entry.get("max_model_len").and_then(serde_json::Value::as_u64)),
            None => Context::Absent,
        }
    }
}
