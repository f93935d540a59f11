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
                biased;
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::config;
    use crate::drain::Drain;
    use crate::telemetry::Telemetry;

    fn directory() -> Arc<Directory> {
        let text = "[[pool]]\nbackends = [\"http://127.0.0.1:1\", \"http://127.0.0.1:2\"]";
        let config = config::parse(text, "test", &|_| None).unwrap_or_else(|errors| panic!("{errors}"));
        Arc::new(Directory::new(config, Arc::new(Telemetry::silent())).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_told_of_and_begun_again() {
        let directory = directory();
        let drain = Drain::new();
        let begun = Arc::new(AtomicUsize::new(0));
        let count = begun.clone();
        let crew =
            tokio::spawn(for_each_backend(directory.clone(), drain.watch(), "juggler", move |place| {
                let count = count.clone();
                async move {
                    if place.now().is_some_and(|(_, i)| i == 1) {
                        return;
                    }
                    let nth = count.fetch_add(1, Ordering::SeqCst);
                    assert!(nth > 1, "dropped a ball");
                    std::future::pending::<()>().await;
                }
            }));
        tokio::time::sleep(RESTART_PAUSE * 5).await;
        assert_eq!(begun.load(Ordering::SeqCst), 3, "twice it panicked, then it stayed");
        let events = directory.telemetry().events.latest();
        assert_eq!(events.len(), 2);
        let text = &events[0].text;
        assert!(
            text.contains("juggler") && text.contains("127.0.0.1:1") && text.contains("a ball"),
            "{text}"
        );
        let tasks = directory.telemetry().metrics.backend_tasks("juggler");
        assert_eq!(tasks.get(), 1, "who returned is not begun again");
        drain.trigger();
        drain.drained(RESTART_PAUSE).await;
        crew.await.unwrap();
        assert_eq!(tasks.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn dropping_the_future_ends_the_tasks() {
        let directory = directory();
        let drain = Drain::new();
        let crew = tokio::spawn(for_each_backend(directory.clone(), drain.watch(), "sitter", |_| {
            std::future::pending::<()>()
        }));
        tokio::time::sleep(RESTART_PAUSE).await;
        let tasks = directory.telemetry().metrics.backend_tasks("sitter");
        assert_eq!(tasks.get(), 2);
        crew.abort();
        tokio::time::sleep(RESTART_PAUSE).await;
        assert_eq!(tasks.get(), 0);
    }
}
