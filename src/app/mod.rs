//! The only composition root: builds the parts, starts them in order, and ends them in order.
//!
//! Threads: one per worker (clients and their exchanges), one for control (probes, names, reload, admin,
//! signals), one that writes the access log. Start: configuration → telemetry → directory → workers →
//! sockets → control. End: not ready → accepting stops → what runs finishes, or is cut visibly at the
//! deadline → control → access log.

mod listeners;
mod operator;
#[cfg(test)]
mod simnet;
mod workers;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::admin::AdminState;
use crate::app::listeners::{Following, Listeners};
use crate::app::operator::Operator;
use crate::app::workers::{Parts, Workers};

use crate::clock;
use crate::config::{Config, Source};
use crate::discover;
use crate::drain::{Drain, Drained, Draining, Phase};
use crate::pool::Directory;
use crate::probe;
use crate::proxy::Memory;
use crate::reload::{self, Reloader};
use crate::server::{Bounds, Clients};
use crate::telemetry::events::{DrainFinished, DrainStarted};
use crate::telemetry::{self, Telemetry};
use crate::upstream::Resolver;

/// What to run.
pub struct Plan {
    /// Validated.
    pub config: Config,
    /// The file it came from, to be followed; none when it came from flags or a test.
    pub source: Option<Source>,
}

/// A running evergate. Dropping it ends it at once; [`end`](Self::end) ends it gently.
pub struct Running {
    directory: Arc<Directory>,
    listeners: Arc<Listeners>,
    /// Until the control thread serves it.
    admin: SocketAddr,
    operator: Arc<Operator>,
    workers: Arc<Workers>,
    drain: Drain,
    control: Option<JoinHandle<()>>,
    log: Option<JoinHandle<()>>,
}

/// Starts everything; on return clients can connect. Blocks for a moment; needs no runtime.
///
/// # Errors
/// The operator's: an address that cannot be bound, a file that cannot be used. The machine's: no
/// threads or descriptors.
pub fn start(plan: Plan, telemetry: Arc<Telemetry>) -> io::Result<Running> {
    let Plan { config, source } = plan;
    let metrics = &telemetry.metrics;
    metrics.config_generation.set(1);
    metrics.memory_max_bytes.set(i64::try_from(config.limits.memory_max).unwrap_or(i64::MAX));
    let admin = Operator::bind(config.admin.address)?;
    let admin_address = admin.local_addr()?;

    let drain = Drain::new();
    let memory = Memory::default();
    let clients = Clients::new(Bounds::from(&config));
    let first_listeners = config.listeners.clone();
    let n = config.workers.get();
    let directory = Arc::new(Directory::new(config, telemetry.clone())?);
    let parts = Parts {
        directory: directory.clone(),
        clients: clients.clone(),
        memory: memory.clone(),
        draining: drain.watch(),
    };
    let workers = Arc::new(Workers::start(n, &parts)?);
    let listeners = Arc::new(Listeners::new(workers.clone(), clients, telemetry.clone()));
    let started = listeners.open(&first_listeners);
    let operator = Arc::new(Operator::new(telemetry.clone()));
    let follower = Following { listeners: listeners.clone(), operator: operator.clone() };
    let reloader = Arc::new(Reloader::new(source, directory.clone(), Box::new(follower)));
    let shown = listeners.clone();
    operator.shows(AdminState {
        directory: directory.clone(),
        reloader: reloader.clone(),
        draining: drain.watch(),
        listeners: Box::new(move || shown.status()),
        started: clock::now(),
    });
    let mut running = Running {
        directory: directory.clone(),
        listeners,
        admin: admin_address,
        operator: operator.clone(),
        workers,
        drain: drain.clone(),
        control: None,
        log: None,
    };
    // From here on dropping `running` ends what was started.
    started?;
    let log = telemetry.access_log.clone();
    running.log = Some(std::thread::Builder::new().name("access-log".to_owned()).spawn(move || log.run())?);
    let control = Control { directory, reloader, operator, admin, drain, memory };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    running.control = Some(
        std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || runtime.block_on(control.run()))?,
    );
    Ok(running)
}

/// What runs beside the data plane.
struct Control {
    directory: Arc<Directory>,
    reloader: Arc<Reloader>,
    operator: Arc<Operator>,
    admin: TcpListener,
    drain: Drain,
    memory: Memory,
}

impl Control {
    async fn run(self) {
        let draining = || self.drain.watch();
        watch_backends(&self.directory, &draining());
        let resolver = Arc::new(Resolver::system());
        tokio::spawn(discover::run(self.directory.clone(), resolver, draining()));
        let reloading = reload::watch(self.reloader.clone(), draining());
        tokio::spawn(async move {
            if let Err(error) = reloading.await {
                tracing::error!(%error, "the configuration file is not followed");
            }
        });
        tokio::spawn(gauge_memory(self.directory.clone(), self.memory.clone()));
        self.operator.serve(self.admin);
        draining().done().await;
        self.operator.close();
    }
}

/// Starts what probes and judges the backends, until the drain is done.
fn watch_backends(directory: &Arc<Directory>, draining: &Draining) {
    tokio::spawn(probe::run(directory.clone(), draining.clone()));
    tokio::spawn(probe::read_loads(directory.clone(), draining.clone()));
    tokio::spawn(probe::keep_time(directory.clone(), draining.clone()));
}

/// The gauge of the memory bound is read, not written, on the hot path.
async fn gauge_memory(directory: Arc<Directory>, memory: Memory) {
    let mut every = tokio::time::interval(probe::TICK);
    loop {
        every.tick().await;
        let held = i64::try_from(memory.held()).unwrap_or(i64::MAX);
        directory.telemetry().metrics.memory_held_bytes.set(held);
    }
}

impl Running {
    /// Where clients connect.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.addresses()
    }

    /// Where the operator connects.
    pub fn admin(&self) -> SocketAddr {
        self.operator.address().unwrap_or(self.admin)
    }

    /// The configuration in force and its backends.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Ends it: the first call asks what runs to finish, the second cuts it.
    pub fn end(&self, by: &'static str) {
        let telemetry = self.directory.telemetry();
        if self.drain.trigger() == Phase::Draining {
            telemetry.metrics.draining.set(1);
            let deadline = self.directory.look().config.drain_deadline;
            DrainStarted { by: &by, running: self.drain.guards(), deadline }.emit(telemetry);
        }
    }

    /// Waits, once its end was asked for, until what runs has finished or was cut at the deadline.
    pub async fn drained(&self) -> Drained {
        let deadline = self.directory.look().config.drain_deadline;
        let drained = self.drain.drained(deadline).await;
        let left = match drained {
            Drained::Complete => 0,
            Drained::Deadline { left } | Drained::AtOnce { left } => left,
        };
        DrainFinished { left }.emit(self.directory.telemetry());
        drained
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        while self.drain.trigger() != Phase::Done {}
        self.workers.join();
        if let Some(control) = self.control.take() {
            // A panic there was told of when it happened.
            let _ = control.join();
        }
        self.directory.telemetry().access_log.close();
        if let Some(log) = self.log.take() {
            let _ = log.join();
        }
    }
}

/// Runs until a signal ends it: the first lets work finish, a second cuts it.
pub fn run(plan: Plan) -> ExitCode {
    match run_until_signal(plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("evergate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_until_signal(plan: Plan) -> io::Result<()> {
    telemetry::init(&plan.config.telemetry).map_err(io::Error::other)?;
    let telemetry = Arc::new(Telemetry::new(&plan.config.telemetry)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Before anything listens: a signal from now on is a wish, not an accident.
        let mut signals = Signals::new()?;
        let running = start(plan, telemetry)?;
        running.end_by(&mut signals).await;
        Ok(())
    })
}

impl Running {
    async fn end_by(&self, signals: &mut Signals) {
        let by = self.wish(signals).await;
        self.end(by);
        tokio::select! {
            _ = self.drained() => {}
            again = async { self.end(self.wish(signals).await) } => again,
        }
    }

    /// Waits for a signal that ends, and does meanwhile what others ask for.
    async fn wish(&self, signals: &mut Signals) -> &'static str {
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => return "SIGTERM",
                _ = signals.interrupt.recv() => return "SIGINT",
                _ = signals.hangup.recv() => self.reopen_log(),
            }
        }
    }
}

impl Running {
    /// SIGHUP means a reload, which `reload` listens for by itself, and that the access log was moved away.
    fn reopen_log(&self) {
        if let Err(error) = self.directory.telemetry().access_log.reopen() {
            tracing::error!(%error, "the access log cannot be opened anew and goes on where it was");
        }
    }
}

/// The signals a process ends by or lives with.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let [terminate, interrupt, hangup] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Self { terminate: terminate?, interrupt: interrupt?, hangup: hangup? })
    }
}
