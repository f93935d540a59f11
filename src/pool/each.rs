//! One task per backend of the configuration in force, whatever it does there.
//!
//! Probers and name look-ups live so: they begin with the generation that brings their backend, go on
//! through reloads that keep it, and end at once, in the middle of whatever they wait for, with the
//! one that takes it away. A task that panics is told of and begun again after a pause; one that
//! returns has nothing more to do for this backend. `evergate_backend_tasks` counts them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntGauge;
use tokio::task::{self, AbortHandle, JoinError, JoinSet};

use crate::drain::Draining;
use crate::pool::backend::{Backend, BackendId};
use crate::pool::snapshot::{Directory, Pool};
use crate::telemetry::events::{PanicCaught, panic_message};

/// Before a task that panicked is begun again: a defect met at every turn must not fill the log.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Where a task works: one backend, through all generations that have it.
#[derive(Clone)]
pub struct Place {
    /// Generations.
    pub directory: Arc<Directory>,
    /// The one backend.
    pub backend: Arc<Backend>,
}

impl Place {
    /// The pool and the index in it by which the generation in force has this backend; none once it is
    /// removed. Ask again at every turn and do not keep it: parameters change with the generation.
    pub fn now(&self) -> Option<(Arc<Pool>, usize)> {
        let snapshot = self.directory.look();
        snapshot.pools.iter().filter(|pool| pool.config.name == self.backend.pool).find_map(|pool| {
            let is_it = |member: &crate::pool::Member| Arc::ptr_eq(&member.backend, &self.backend);
            pool.members.iter().position(is_it).map(|i| (pool.clone(), i))
        })
    }
}

/// Runs `work` once for each backend of the generation in force, until the drain is done. `name` is the
/// label of the gauge and the word for a panic. Dropping the future ends all tasks.
pub async fn for_each_backend<F, W>(
    directory: Arc<Directory>,
    draining: Draining,
    name: &'static str,
    mut work: F,
) where
    F: FnMut(Place) -> W,
    W: Future<Output = ()> + Send + 'static,
{
    let mut generations = directory.follow();
    let mut crew = Crew {
        gauge: directory.telemetry().metrics.backend_tasks(name),
        tasks: JoinSet::new(),
        at: HashMap::new(),
    };
    loop {
        // Marked as seen before it is read: a swap in between rings again.
        generations.mark_unchanged();
        let snapshot = directory.snapshot();
        crew.dismiss(|id| !snapshot.members().any(|(_, member)| member.backend.id == id));
        for (_, member) in snapshot.members() {
            if !crew.at.contains_key(&member.backend.id) {
                let place = Place { directory: directory.clone(), backend: member.backend.clone() };
                crew.begin(place.clone(), work(place));
            }
        }
        drop(snapshot);
        loop {
            tokio::select! {
                () = draining.done() => return crew.tasks.shutdown().await,
                swapped = generations.changed() => match swapped {
                    Ok(()) => break,
                    // Impossible while this future holds the directory.
                    Err(_gone) => return crew.tasks.shutdown().await,
                },
                Some(ended) = crew.tasks.join_next_with_id() => {
                    let Err(error) = ended else { continue };
                    let Some(place) = crew.panicked(error, name) else { continue };
                    let work = work(place.clone());
                    crew.begin(place, async move {
                        tokio::time::sleep(RESTART_PAUSE).await;
                        work.await;
                    });
                }
            }
        }
    }
}

/// The tasks at work.
struct Crew {
    gauge: IntGauge,
    tasks: JoinSet<()>,
    /// Who is where, those who have nothing more to do included.
    at: HashMap<BackendId, (AbortHandle, Place)>,
}

impl Crew {
    fn begin(&mut self, place: Place, work: impl Future<Output = ()> + Send + 'static) {
        let counted = Counted::new(self.gauge.clone());
        let handle = self.tasks.spawn(async move {
            let _counted = counted;
            work.await;
        });
        self.at.insert(place.backend.id, (handle, place));
    }

    fn dismiss(&mut self, gone: impl Fn(BackendId) -> bool) {
        self.at.retain(|id, (handle, _)| {
            let gone = gone(*id);
            if gone {
                handle.abort();
            }
            !gone
        });
    }

    /// Tells of a panic, and where somebody is missing now.
    fn panicked(&self, error: JoinError, name: &str) -> Option<Place> {
        let id: task::Id = error.id();
        let panic = error.try_into_panic().ok()?;
        let (_, place) = self.at.values().find(|(handle, _)| handle.id() == id)?;
        let at = format!("the {name} of backend {} in pool {}", place.backend.name, place.backend.pool);
        PanicCaught { task: &at, message: &panic_message(&*panic) }.emit(place.directory.telemetry());
        Some(place.clone())
    }
}

/// One task, counted until it is gone, however it went.
struct Counted(IntGauge);

impl Counted {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
