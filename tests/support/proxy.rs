//! evergate itself in a test: its configuration, built from the backends at hand, and the process.

use std::net::SocketAddr;
use std::sync::Arc;

use evergate::app::{self, Plan, Running};
use evergate::config::{self, AccessLogTarget, Config, Source};
use evergate::telemetry::Telemetry;
use evergate::telemetry::metrics::End;
use toml::{Table, Value};

/// Builds the TOML a test's evergate runs by. Ports are the kernel's choice.
///
/// ```ignore
/// let toml = ProxyBuilder::new().backend(&a.url()).backend(&b.url()).set("pool.clocks.connect", "200ms").build_toml();
/// ```
#[derive(Clone, Debug)]
pub struct ProxyBuilder {
    top: Table,
    pools: Vec<Table>,
}

impl ProxyBuilder {
    /// One listener and the admin address at port 0 of 127.0.0.1, one worker, and one pool without backends.
    pub fn new() -> Self {
        let address = || Value::from("127.0.0.1:0");
        let listener = Table::from_iter([("address".to_owned(), address())]);
        let admin = Table::from_iter([("address".to_owned(), address())]);
        let top = Table::from_iter([
            ("workers".to_owned(), Value::from(1)),
            ("listener".to_owned(), Value::Array(vec![listener.into()])),
            ("admin".to_owned(), admin.into()),
        ]);
        Self { top, pools: vec![Table::new()] }
    }

    /// Adds a backend to the pool begun last.
    pub fn backend(self, url: &str) -> Self {
        self.backend_with(url, &[])
    }

    /// Adds a backend with further keys, such as `("tier", 1.into())`.
    pub fn backend_with(mut self, url: &str, keys: &[(&str, Value)]) -> Self {
        let mut backend = Table::from_iter([("url".to_owned(), Value::from(url))]);
        backend.extend(keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let backends = self.pool().entry("backends").or_insert_with(|| Value::Array(Vec::new()));
        match backends {
            Value::Array(backends) => backends.push(backend.into()),
            other => panic!("pool.backends was set to {other}"),
        }
        self
    }

    /// Names the pool begun last if it is still empty, else begins another.
    pub fn named_pool(mut self, name: &str) -> Self {
        if !self.pool().is_empty() {
            self.pools.push(Table::new());
        }
        self.pool().insert("name".to_owned(), name.into());
        self
    }

    /// Names the pool begun last, whatever it holds.
    pub fn named_pool_kept(mut self, name: &str) -> Self {
        self.pool().insert("name".to_owned(), name.into());
        self
    }

    /// Sets a dotted key. `pool.…` is of the pool begun last, `listener.…` of the one listener.
    #[track_caller]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        let (table, key) = match key.split_once('.') {
            Some(("pool", key)) => (self.pool(), key),
            Some(("listener", key)) => match &mut self.top["listener"][0] {
                Value::Table(listener) => (listener, key),
                other => panic!("listener was set to {other}"),
            },
            _ => (&mut self.top, key),
        };
        let mut path: Vec<&str> = key.split('.').collect();
        let last = path.pop().unwrap_or_default();
        let table = path.into_iter().fold(table, |table, part| {
            match table.entry(part).or_insert_with(|| Table::new().into()) {
                Value::Table(table) => table,
                other => panic!("{part} in {key:?} was set to {other}"),
            }
        });
        table.insert(last.to_owned(), value.into());
        self
    }

    /// Adds a `[[route]]`.
    pub fn route(mut self, pool: &str, keys: &[(&str, Value)]) -> Self {
        let mut route = Table::from_iter([("pool".to_owned(), Value::from(pool))]);
        route.extend(keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        match self.top.entry("route").or_insert_with(|| Value::Array(Vec::new())) {
            Value::Array(routes) => routes.push(route.into()),
            other => panic!("route was set to {other}"),
        }
        self
    }

    pub fn build_toml(&self) -> String {
        let mut top = self.top.clone();
        top.insert("pool".to_owned(), Value::Array(self.pools.iter().cloned().map(Value::Table).collect()));
        toml::to_string(&top).unwrap()
    }

    /// The configuration as the binary would read it.
    #[track_caller]
    pub fn build_config(&self) -> Config {
        config::parse(&self.build_toml(), "test", &|_| None).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn pool(&mut self) -> &mut Table {
        self.pools.last_mut().expect("a builder has a pool from the start")
    }
}

/// evergate, running in this process, on threads of its own. Dropping it ends it at once.
pub struct Proxy {
    /// Where clients connect: the first listener.
    pub addr: SocketAddr,
    /// The operator's side.
    pub admin_addr: SocketAddr,
    /// What it counts and tells.
    pub telemetry: Arc<Telemetry>,
    /// The thing itself.
    pub running: Running,
}

impl Proxy {
    /// Starts one by the configuration built so far.
    #[track_caller]
    pub fn start(builder: &ProxyBuilder) -> Self {
        Self::start_toml(&builder.build_toml(), None)
    }

    /// Starts one by a text, and follows `source` where given.
    #[track_caller]
    pub fn start_toml(toml: &str, source: Option<Source>) -> Self {
        let config = match config::parse(toml, "test.toml", &|_| None) {
            Ok(config) => config,
            Err(errors) => panic!("{errors}\n{toml}"),
        };
        // Records are written only where a test reads them.
        let telemetry = Arc::new(match config.telemetry.access_log {
            AccessLogTarget::File(_) => Telemetry::new(&config.telemetry).unwrap(),
            _ => Telemetry::silent(),
        });
        let running = app::start(Plan { config, source }, telemetry.clone()).unwrap();
        Self { addr: running.addresses()[0], admin_addr: running.admin(), telemetry, running }
    }

    /// A member of the pool `default`, by its address.
    pub fn backend(&self, address: SocketAddr) -> Arc<evergate::pool::Backend> {
        let snapshot = self.running.directory().snapshot();
        let found = snapshot.members().find(|(_, m)| m.params.authority.as_str() == address.to_string());
        found.expect("a configured backend").1.backend.clone()
    }

    /// Waits until every backend has been probed for the first time, where probes run.
    pub async fn probed(&self) {
        super::eventually(super::PATIENCE, || {
            let snapshot = self.running.directory().snapshot();
            snapshot.members().all(|(_, m)| m.backend.whole().read(|h| h.operational().name() != "unknown"))
        })
        .await;
    }

    /// Requests in must be responses out; nothing is in flight.
    pub async fn is_quiet(&self) {
        let exchanges = &self.telemetry.metrics.exchanges;
        super::eventually(super::PATIENCE, || exchanges.in_flight() == 0).await;
        let out: u64 = End::ALL.iter().map(|end| exchanges.finished(*end)).sum();
        assert_eq!(exchanges.started(), out, "requests in are responses out");
        let snapshot = self.running.directory().snapshot();
        for (_, member) in snapshot.members() {
            assert_eq!(member.backend.in_flight(), 0, "{} has nothing in flight", member.params.name);
        }
    }
}
