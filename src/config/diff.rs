//! What changes from one configuration to the next, as values: a reload applies and logs exactly these.
//!
//! Pure. Identity: a listener is its address, a pool its name, a backend its name and URL within
//! its pool; a backend whose URL changed is another backend, and its state must not be inherited.
//! Order is no change among backends and listeners; among routes and pools it decides, so it is one.
//! Every struct is taken apart by name: a new field does not compile until it is compared here.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::units::format_duration;
use super::{Admin, Backend, Config, Listener, Pool};

/// One difference. `Display` is one line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Number of data-plane threads.
    Workers {
        /// Before.
        from: NonZeroUsize,
        /// After.
        to: NonZeroUsize,
    },
    /// Deadline of draining.
    DrainDeadline {
        /// Before.
        from: Duration,
        /// After.
        to: Duration,
    },
    /// A new address for clients.
    ListenerAdded {
        /// Its identity.
        address: SocketAddr,
    },
    /// An address for clients is given up.
    ListenerRemoved {
        /// Its identity.
        address: SocketAddr,
    },
    /// Same address, other parameters.
    ListenerChanged {
        /// Its identity.
        address: SocketAddr,
        /// Keys that differ.
        keys: Vec<&'static str>,
    },
    /// The operator's address moved.
    AdminMoved {
        /// Before.
        from: SocketAddr,
        /// After.
        to: SocketAddr,
    },
    /// The operator's token is another one, new or gone.
    AdminTokenChanged,
    /// A pool that was not there, with all its backends.
    PoolAdded {
        /// Its name.
        pool: String,
        /// How many backends it has.
        backends: usize,
    },
    /// A pool and all its backends are gone.
    PoolRemoved {
        /// Its name.
        pool: String,
    },
    /// Parameters of a pool, its backends apart.
    PoolChanged {
        /// Its name.
        pool: String,
        /// Keys that differ.
        keys: Vec<&'static str>,
    },
    /// The order of the pools that stay. It decides between pools that serve the same model.
    PoolOrder,
    /// A new backend in a pool that stays.
    BackendAdded {
        /// Its pool.
        pool: String,
        /// Its name.
        backend: String,
    },
    /// A backend is gone from a pool that stays.
    BackendRemoved {
        /// Its pool.
        pool: String,
        /// Its name.
        backend: String,
    },
    /// Same backend, other parameters.
    BackendChanged {
        /// Its pool.
        pool: String,
        /// Its name.
        backend: String,
        /// Keys that differ.
        keys: Vec<&'static str>,
    },
    /// The list of routes.
    RoutesChanged {
        /// How many there were.
        from: usize,
        /// How many there are.
        to: usize,
    },
    /// Bounds of sizes and counts.
    LimitsChanged,
    /// Clocks of the client side.
    ClientClocksChanged,
    /// Logs or access records.
    TelemetryChanged,
    /// A file named by the configuration holds something else. Not found by [`diff`], which reads no files.
    FileContent {
        /// The key that names it, such as `listener[0].tls.certificate`.
        key: String,
        /// The file.
        path: PathBuf,
    },
}

/// What it takes for a change to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// The next snapshot.
    Live,
    /// A listening socket is opened, closed or configured anew.
    Rebind,
    /// A new process (`evergate` hands its sockets over).
    Restart,
}

impl Change {
    /// What it takes for this change to apply.
    pub fn effect(&self) -> Effect {
        match self {
            Self::Workers { .. } | Self::TelemetryChanged => Effect::Restart,
            Self::ListenerAdded { .. }
            | Self::ListenerRemoved { .. }
            | Self::ListenerChanged { .. }
            | Self::AdminMoved { .. } => Effect::Rebind,
            Self::DrainDeadline { .. }
            | Self::AdminTokenChanged
            | Self::PoolAdded { .. }
            | Self::PoolRemoved { .. }
            | Self::PoolChanged { .. }
            | Self::PoolOrder
            | Self::BackendAdded { .. }
            | Self::BackendRemoved { .. }
            | Self::BackendChanged { .. }
            | Self::RoutesChanged { .. }
            | Self::LimitsChanged
            | Self::ClientClocksChanged
            | Self::FileContent { .. } => Effect::Live,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workers { from, to } => write!(f, "workers {from} -> {to} (needs a restart)"),
            Self::DrainDeadline { from, to } => {
                write!(f, "drain_deadline {} -> {}", format_duration(*from), format_duration(*to))
            }
            Self::ListenerAdded { address } => write!(f, "listener {address} added"),
            Self::ListenerRemoved { address } => write!(f, "listener {address} removed"),
            Self::ListenerChanged { address, keys } => {
                write!(f, "listener {address} changed: {}", keys.join(", "))
            }
            Self::AdminMoved { from, to } => write!(f, "admin address {from} -> {to}"),
            Self::AdminTokenChanged => f.write_str("admin token changed"),
            Self::PoolAdded { pool, backends: 1 } => write!(f, "pool {pool} added with 1 backend"),
            Self::PoolAdded { pool, backends } => write!(f, "pool {pool} added with {backends} backends"),
            Self::PoolRemoved { pool } => write!(f, "pool {pool} removed"),
            Self::PoolChanged { pool, keys } => write!(f, "pool {pool} changed: {}", keys.join(", ")),
            Self::PoolOrder => f.write_str("order of pools changed"),
            Self::BackendAdded { pool, backend } => write!(f, "backend {pool}/{backend} added"),
            Self::BackendRemoved { pool, backend } => write!(f, "backend {pool}/{backend} removed"),
            Self::BackendChanged { pool, backend, keys } => {
                write!(f, "backend {pool}/{backend} changed: {}", keys.join(", "))
            }
            Self::RoutesChanged { from, to } => write!(f, "routes changed ({from} -> {to})"),
            Self::LimitsChanged => f.write_str("limits changed"),
            Self::ClientClocksChanged => f.write_str("client clocks changed"),
            Self::TelemetryChanged => f.write_str("telemetry changed (needs a restart)"),
            Self::FileContent { key, path } => write!(f, "new content of {key} ({})", path.display()),
        }
    }
}

/// Everything that differs, removals before additions within one list. Empty when nothing needs doing.
pub fn diff(old: &Config, new: &Config) -> Vec<Change> {
    let Config { workers, listeners, admin, pools, routes, limits, client_clocks, telemetry, drain_deadline } =
        new;
    let mut changes = Vec::new();
    if old.workers != *workers {
        changes.push(Change::Workers { from: old.workers, to: *workers });
    }
    if old.drain_deadline != *drain_deadline {
        changes.push(Change::DrainDeadline { from: old.drain_deadline, to: *drain_deadline });
    }
    listener_changes(&mut changes, &old.listeners, listeners);
    admin_changes(&mut changes, &old.admin, admin);
    pool_changes(&mut changes, &old.pools, pools);
    if old.routes != *routes {
        changes.push(Change::RoutesChanged { from: old.routes.len(), to: routes.len() });
    }
    if old.limits != *limits {
        changes.push(Change::LimitsChanged);
    }
    if old.client_clocks != *client_clocks {
        changes.push(Change::ClientClocksChanged);
    }
    if old.telemetry != *telemetry {
        changes.push(Change::TelemetryChanged);
    }
    changes
}

fn listener_changes(changes: &mut Vec<Change>, old: &[Listener], new: &[Listener]) {
    let lists = |list: &[Listener], address| list.iter().any(|listener| listener.address == address);
    for gone in old.iter().filter(|listener| !lists(new, listener.address)) {
        changes.push(Change::ListenerRemoved { address: gone.address });
    }
    for Listener { address, tls, trusted_proxies } in new {
        let Some(before) = old.iter().find(|listener| listener.address == *address) else {
            changes.push(Change::ListenerAdded { address: *address });
            continue;
        };
        let keys = named([
            ("tls", before.tls != *tls),
            ("trusted_proxies", before.trusted_proxies != *trusted_proxies),
        ]);
        if !keys.is_empty() {
            changes.push(Change::ListenerChanged { address: *address, keys });
        }
    }
}

fn admin_changes(changes: &mut Vec<Change>, old: &Admin, new: &Admin) {
    let Admin { address, token } = new;
    if old.address != *address {
        changes.push(Change::AdminMoved { from: old.address, to: *address });
    }
    if old.token != *token {
        changes.push(Change::AdminTokenChanged);
    }
}

fn pool_changes(changes: &mut Vec<Change>, old: &[Pool], new: &[Pool]) {
    let find = |list: &[Pool], name: &str| list.iter().position(|pool| pool.name == name);
    for gone in old.iter().filter(|pool| find(new, &pool.name).is_none()) {
        changes.push(Change::PoolRemoved { pool: gone.name.clone() });
    }
    let mut stayed = Vec::with_capacity(new.len());
    for pool in new {
        match find(old, &pool.name) {
            None => {
                changes.push(Change::PoolAdded { pool: pool.name.clone(), backends: pool.backends.len() });
            }
            Some(before) => {
                stayed.push(before);
                one_pool(changes, &old[before], pool);
            }
        }
    }
    if !stayed.is_sorted() {
        changes.push(Change::PoolOrder);
    }
}

fn one_pool(changes: &mut Vec<Change>, old: &Pool, new: &Pool) {
    let Pool {
        name,
        backends,
        models,
        aliases,
        balance,
        health,
        probe,
        load,
        resume,
        progress,
        outlier,
        retry,
        queue,
        clocks,
        tls,
        http,
        fallbacks,
    } = new;
    let keys = named([
        ("models", old.models != *models),
        ("aliases", old.aliases != *aliases),
        ("balance", old.balance != *balance),
        ("health", old.health != *health),
        ("probe", old.probe != *probe),
        ("load", old.load != *load),
        ("progress", old.progress != *progress),
        ("outlier", old.outlier != *outlier),
        ("resume", old.resume != *resume),
        ("retry", old.retry != *retry),
        ("queue", old.queue != *queue),
        ("clocks", old.clocks != *clocks),
        ("tls", old.tls != *tls),
        ("http", old.http != *http),
        ("fallback", old.fallbacks != *fallbacks),
    ]);
    if !keys.is_empty() {
        changes.push(Change::PoolChanged { pool: name.clone(), keys });
    }
    let find =
        |list: &'_ [Backend], wanted: &Backend| list.iter().position(|backend| same_backend(backend, wanted));
    for gone in old.backends.iter().filter(|backend| find(backends, backend).is_none()) {
        changes.push(Change::BackendRemoved { pool: name.clone(), backend: gone.name.clone() });
    }
    for backend in backends {
        let Some(before) = find(&old.backends, backend) else {
            changes.push(Change::BackendAdded { pool: name.clone(), backend: backend.name.clone() });
            continue;
        };
        let keys = backend_keys(&old.backends[before], backend);
        if !keys.is_empty() {
            changes.push(Change::BackendChanged { pool: name.clone(), backend: backend.name.clone(), keys });
        }
    }
}

/// Whether state learned about `a` holds for `b`.
fn same_backend(a: &Backend, b: &Backend) -> bool {
    a.name == b.name && a.secure == b.secure && a.authority == b.authority && a.path_prefix == b.path_prefix
}

fn backend_keys(old: &Backend, new: &Backend) -> Vec<&'static str> {
    let Backend {
        name: _,
        secure: _,
        authority: _,
        path_prefix: _, // identity, all four
        weight,
        tier,
        in_flight_max,
        headers,
        own_credentials: _, // follows from `headers`
        disabled,
    } = new;
    named([
        ("weight", old.weight != *weight),
        ("tier", old.tier != *tier),
        ("in_flight_max", old.in_flight_max != *in_flight_max),
        ("headers", old.headers != *headers),
        ("disabled", old.disabled != *disabled),
    ])
}

fn named<const N: usize>(keys: [(&'static str, bool); N]) -> Vec<&'static str> {
    keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    const BASE: &str = r#"
workers = 2
[[listener]]
address = "0.0.0.0:80"
[[listener]]
address = "0.0.0.0:81"
[[pool]]
name = "a"
backends = ["http://a:1", { url = "http://a:2", weight = 2, headers = { x-tenant = "t" } }, "http://a:3"]
[[pool]]
name = "b"
backends = ["http://b:1"]
[[route]]
pool = "b"
path_prefix = "/b"
"#;

    fn read(text: &str) -> Config {
        parse(text, "test", &|_| None).unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// The lines that replacing `from` by `to` in the base makes.
    fn changes(from: &str, to: &str) -> Vec<String> {
        assert!(BASE.contains(from), "{from}");
        diff(&read(BASE), &read(&BASE.replacen(from, to, 1))).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_same_configuration_has_no_changes() {
        assert_eq!(diff(&read(BASE), &read(BASE)), []);
    }

    #[test]
    fn order_of_backends_and_listeners_is_no_change() {
        let mut turned = read(BASE);
        turned.pools[0].backends.reverse();
        turned.listeners.reverse();
        assert_eq!(diff(&read(BASE), &turned), []);
    }

    #[test]
    fn order_of_pools_is_a_change() {
        let mut turned = read(BASE);
        turned.pools.reverse();
        assert_eq!(diff(&read(BASE), &turned), [Change::PoolOrder]);
    }

    #[test]
    fn each_change_is_one_line() {
        for (from, to, expected) in [
            ("workers = 2", "workers = 3", &["workers 2 -> 3 (needs a restart)"][..]),
            ("workers = 2", "workers = 2\ndrain_deadline = \"1m\"", &["drain_deadline 30s -> 1m"]),
            ("0.0.0.0:81", "0.0.0.0:82", &["listener 0.0.0.0:81 removed", "listener 0.0.0.0:82 added"]),
            (
                "0.0.0.0:81\"",
                "0.0.0.0:81\"\ntrusted_proxies = [\"10.0.0.1\"]",
                &["listener 0.0.0.0:81 changed: trusted_proxies"],
            ),
            (
                "[[route]]",
                "[admin]\naddress = \"127.0.0.1:9\"\ntoken = \"t\"\n[[route]]",
                &["admin address 127.0.0.1:9901 -> 127.0.0.1:9", "admin token changed"],
            ),
            ("\"http://a:3\"", "\"http://a:4\"", &["backend a/a:3 removed", "backend a/a:4 added"]),
            (
                "weight = 2, headers = { x-tenant = \"t\" }",
                "tier = 1",
                &["backend a/a:2 changed: weight, tier, headers"],
            ),
            (
                "name = \"b\"",
                "name = \"b\"\nhttp = \"1\"\nmodels = [\"m\"]",
                &["pool b changed: models, http"],
            ),
            (
                "[[route]]",
                "[[pool.fallback]]\npool = \"a\"\non = [\"busy\"]\n[[route]]",
                &["pool b changed: fallback"],
            ),
            ("path_prefix = \"/b\"", "path_prefix = \"/c\"", &["routes changed (1 -> 1)"]),
            (
                "[[route]]",
                "[limits]\nheaders_max = 9\n[client]\nhead = \"1s\"\n[telemetry]\nlog_level = \"warn\"\n[[route]]",
                &["limits changed", "client clocks changed", "telemetry changed (needs a restart)"],
            ),
            (
                "[[route]]",
                "[[pool]]\nname = \"c\"\nbackends = [\"http://c:1\"]\n[[route]]",
                &["pool c added with 1 backend"],
            ),
        ] {
            assert_eq!(changes(from, to), expected, "{from} -> {to}");
        }
    }

    #[test]
    fn a_backend_that_keeps_its_name_but_not_its_url_is_another_one() {
        let named = |url: &str| read(&format!("[[pool]]\nbackends = [{{ name = \"x\", url = \"{url}\" }}]"));
        let lines: Vec<String> =
            diff(&named("http://a:1"), &named("https://a:1")).iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["backend default/x removed", "backend default/x added"]);
    }

    #[test]
    fn only_workers_need_a_restart() {
        let changes =
            diff(&read(BASE), &read(&BASE.replace("workers = 2", "workers = 3").replace(":81", ":82")));
        let effects: Vec<Effect> = changes.iter().map(Change::effect).collect();
        assert_eq!(effects, [Effect::Restart, Effect::Rebind, Effect::Rebind]);
    }
}
