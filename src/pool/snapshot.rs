//! Generations of the configuration at run time, and the one atomic swap between them.
//!
//! A `Snapshot` is everything an attempt may see. Records of backends are kept over a reload by identity
//! (pool, name, scheme, address, prefix): health, load and connections go on; what is gone drains, what is
//! new starts as a newcomer. A snapshot is built whole before it is swapped in, or not at all.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::config::{self, Config};
use crate::policy::health::{Administrative, Arrival};
use crate::policy::route::{PoolModels, Table};
use crate::pool::backend::Backend;
use crate::pool::state::PoolState;
use crate::telemetry::Telemetry;
use crate::upstream::{Lost, Target, Tls};

/// The configuration in force and what is known about its backends.
pub struct Directory {
    current: ArcSwap<Snapshot>,
    /// Generation in force, for those who follow it.
    generation: watch::Sender<u64>,
    telemetry: Arc<Telemetry>,
    /// One change at a time.
    changing: Mutex<()>,
}

/// One generation, immutable.
pub struct Snapshot {
    /// Its number; 1 is the one evergate started with.
    pub generation: u64,
    /// What it was built from.
    pub config: Arc<Config>,
    /// In the order of the file.
    pub pools: Vec<Arc<Pool>>,
    /// From request to pool.
    pub routes: Table,
}

/// One generation's view of a pool.
pub struct Pool {
    /// Its parameters.
    pub config: config::Pool,
    /// Its backends, in the order of the file.
    pub members: Vec<Member>,
    /// What outlives this generation.
    pub state: Arc<PoolState>,
    /// Nobody stands behind anybody.
    pub(super) tiers_uniform: bool,
    /// A trial is looked for, a tick told, only in the generation in force.
    pub(super) retired: AtomicBool,
}

/// A backend as this generation configures it.
pub struct Member {
    /// What is known about it.
    pub backend: Arc<Backend>,
    /// Its parameters.
    pub params: config::Backend,
    /// How to connect to it.
    pub target: Target,
}

/// What a change of configuration did to the backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Generation now in force.
    pub generation: u64,
    /// Backends that are new.
    pub added: usize,
    /// Backends that are gone and drain.
    pub removed: usize,
}

impl Directory {
    /// The first generation.
    ///
    /// # Errors
    /// The operator's: a certificate or key that cannot be used.
    pub fn new(config: Config, telemetry: Arc<Telemetry>) -> io::Result<Self> {
        let snapshot = Snapshot::build(Arc::new(config), 1, None, &telemetry)?;
        let directory = Self {
            current: ArcSwap::from_pointee(snapshot),
            generation: watch::Sender::new(1),
            telemetry,
            changing: Mutex::new(()),
        };
        directory.publish_counts();
        Ok(directory)
    }

    /// The generation in force: cheap, for one look. Do not hold it over an await.
    pub fn look(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// The generation in force, to keep.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Follows the generations: `changed()` resolves after each swap.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Where what happens is told.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// Swaps in another configuration. Nothing changes when it fails.
    ///
    /// # Errors
    /// The operator's: a certificate or key that cannot be used.
    pub fn apply(&self, config: Config) -> io::Result<Applied> {
        let _one_at_a_time = self.changing.lock();
        let old = self.current.load_full();
        let generation = old.generation + 1;
        let new = Arc::new(Snapshot::build(Arc::new(config), generation, Some(&old), &self.telemetry)?);
        let applied = self.retire(&old, &new, generation);
        self.current.store(new);
        // Whoever waits may find a newcomer, now that it can be seen.
        self.look().pools.iter().for_each(|pool| {
            pool.compare_lists();
            pool.state.backend_returned();
        });
        // A prober may have nothing to do for an hour by its old parameters.
        self.look().members().for_each(|(_, member)| member.backend.nudge_prober());
        self.generation.send_replace(generation);
        self.publish_counts();
        Ok(applied)
    }

    /// Marks what the new generation no longer has.
    fn retire(&self, old: &Snapshot, new: &Snapshot, generation: u64) -> Applied {
        let has = |snapshot: &Snapshot, backend: &Arc<Backend>| {
            snapshot.members().any(|(_, member)| Arc::ptr_eq(&member.backend, backend))
        };
        let mut applied = Applied { generation, ..Applied::default() };
        for pool in &old.pools {
            pool.retired.store(true, std::sync::atomic::Ordering::Release);
            let goes_on = new.pools.iter().any(|p| Arc::ptr_eq(&p.state, &pool.state));
            if !goes_on {
                self.telemetry.metrics.retire_pool(&pool.config.name);
            }
        }
        for (_, member) in old.members().filter(|(_, member)| !has(new, &member.backend)) {
            // What runs there goes on for a while; its connections close as it ends.
            member.backend.close_kept();
            member.backend.set_leaving(true);
            applied.removed += 1;
            // One of the same name at another address goes on with the series.
            let goes_on = new.members().any(|(_, other)| {
                (&other.backend.pool, &other.backend.name) == (&member.backend.pool, &member.backend.name)
            });
            if !goes_on {
                self.telemetry.metrics.retire_backend(&member.backend.metrics);
            }
        }
        applied.added = new.members().filter(|(_, member)| !has(old, &member.backend)).count();
        for pool in &new.pools {
            let same_transport =
                |p: &&Arc<Pool>| p.config.tls == pool.config.tls && p.config.http == pool.config.http;
            let before = old.pools.iter().find(|p| Arc::ptr_eq(&p.state, &pool.state));
            if before.is_some_and(|p| !same_transport(&p)) {
                pool.members.iter().for_each(|member| member.backend.close_kept());
            }
        }
        applied
    }

    fn publish_counts(&self) {
        for pool in &self.look().pools {
            pool.state.metrics.backends.set(i64::try_from(pool.members.len()).unwrap_or(i64::MAX));
            pool.publish_standing();
        }
    }
}

impl Snapshot {
    fn build(
        config: Arc<Config>,
        generation: u64,
        old: Option<&Self>,
        telemetry: &Arc<Telemetry>,
    ) -> io::Result<Self> {
        // Files are read first: nothing below can fail.
        let tls: Vec<Option<Tls>> = config
            .pools
            .iter()
            .map(|pool| {
                let secure = pool.backends.iter().any(|backend| backend.secure);
                secure.then(|| Tls::new(&pool.tls, pool.http)).transpose()
            })
            .collect::<io::Result<_>>()?;
        let workers = config.workers.get();
        let pools = config
            .pools
            .iter()
            .zip(tls)
            .map(|(pool, tls)| {
                let before = old.and_then(|old| old.pools.iter().find(|p| p.config.name == pool.name));
                Arc::new(Pool::build(pool, tls, before.map(Arc::as_ref), workers, telemetry))
            })
            .collect();
        let names: Vec<_> = config
            .pools
            .iter()
            .map(|pool| PoolModels {
                name: pool.name.clone(),
                models: pool.models.clone(),
                aliases: pool.aliases.clone(),
            })
            .collect();
        let routes = Table::new(&config.routes, &names);
        Ok(Self { generation, config, pools, routes })
    }

    /// Every backend with its pool.
    pub fn members(&self) -> impl Iterator<Item = (&Arc<Pool>, &Member)> {
        self.pools.iter().flat_map(|pool| pool.members.iter().map(move |member| (pool, member)))
    }

    /// The pool of this name.
    pub fn pool(&self, name: &str) -> Option<&Arc<Pool>> {
        self.pools.iter().find(|pool| pool.config.name == name)
    }
}

impl Pool {
    fn build(
        config: &config::Pool,
        tls: Option<Tls>,
        before: Option<&Self>,
        workers: usize,
        telemetry: &Arc<Telemetry>,
    ) -> Self {
        let state = match before {
            Some(before) => before.state.clone(),
            None => Arc::new(PoolState::new(&config.name, &config.progress, telemetry.clone())),
        };
        let arrival = if before.is_some() { Arrival::Newcomer } else { Arrival::Founder };
        let members: Vec<Member> = config
            .backends
            .iter()
            .map(|params| {
                let kept = before.and_then(|pool| pool.members.iter().find(|old| old.is_same(params)));
                let backend = match kept {
                    Some(old) => old.backend.clone(),
                    None => {
                        let metrics = telemetry.metrics.backend(&config.name, &params.name);
                        Arc::new(Backend::new(
                            &config.name,
                            params,
                            arrival,
                            &config.health,
                            workers,
                            metrics,
                        ))
                    }
                };
                // The file speaks when it is new or has changed; between, the operator's word holds.
                if kept.is_none_or(|old| old.params.disabled != params.disabled) {
                    backend.set_admin(match params.disabled {
                        true => Administrative::Disabled,
                        false => Administrative::Enabled,
                    });
                }
                let tls = if params.secure { tls.clone() } else { None };
                let target = Target::new(
                    backend.addresses.clone(),
                    params.authority.clone(),
                    tls,
                    config.http,
                    &config.clocks,
                    backend.metrics.connections_open.clone(),
                    lost_at(&backend),
                );
                Member { backend, params: params.clone(), target }
            })
            .collect();
        let tiers_uniform = members.windows(2).all(|pair| pair[0].params.tier == pair[1].params.tier);
        Self { config: config.clone(), members, state, tiers_uniform, retired: AtomicBool::new(false) }
    }

    /// The backend of this name.
    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.params.name == name)
    }

    /// Whether a live backend of this pool lists `model`.
    pub fn lists(&self, model: &str) -> bool {
        self.members.iter().any(|member| member.backend.lists(model))
    }
}

/// A kept connection that its peer closes may be the last word of a process that is gone.
fn lost_at(backend: &Arc<Backend>) -> Lost {
    // Weak: connections tell of it, and belong to the backend.
    let backend = Arc::downgrade(backend);
    Arc::new(move || {
        if let Some(backend) = backend.upgrade() {
            backend.doubt();
        }
    })
}

impl Member {
    /// Most unfinished attempts at a time: what it was seen to take, within what is configured.
    pub fn cap(&self) -> Option<u32> {
        let configured = self.params.in_flight_max.map(std::num::NonZeroU32::get);
        match (configured, self.backend.learned_cap()) {
            (Some(configured), Some(learned)) => Some(configured.min(learned)),
            (configured, learned) => configured.or(learned),
        }
    }

    /// Whether `params` configures this same replica.
    fn is_same(&self, params: &config::Backend) -> bool {
        let mine = &self.params;
        (&mine.name, mine.secure, &mine.authority, &mine.path_prefix)
            == (&params.name, params.secure, &params.authority, &params.path_prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(backends: &str) -> Config {
        let text = format!("[[pool]]\nbackends = [{backends}]");
        config::parse(&text, "test", &|_| None).unwrap_or_else(|errors| panic!("{errors}"))
    }

    #[test]
    fn the_series_of_a_removed_backend_go_unless_another_has_its_name() {
        let named =
            |name: &str, port: u16| format!("{{ name = \"{name}\", url = \"http://127.0.0.1:{port}\" }}");
        let telemetry = Arc::new(Telemetry::silent());
        let first = config(&format!("{}, {}", named("a", 1), named("b", 2)));
        let directory = Directory::new(first, telemetry.clone()).unwrap();
        let gone = directory.snapshot();
        let has = |name: &str| telemetry.metrics.render().contains(&format!("backend=\"{name}\""));
        assert!(has("a") && has("b"));
        let applied = directory.apply(config(&named("a", 3))).unwrap();
        assert_eq!((applied.added, applied.removed), (1, 2));
        // A late word of an attempt that still runs there.
        gone.pools[0].members[1].backend.metrics.count_failure("closed");
        assert!(has("a") && !has("b"));
    }
}
