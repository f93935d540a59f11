//! The data-plane threads: one runtime each, nothing shared on the hot path (docs/adr/0001).

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task;

use crate::clock::Alarms;
use crate::drain::Draining;
use crate::pool::Directory;
use crate::proxy::{AnswerBody, Client, HeadDefect, Memory, Worker};
use crate::server::{self, Answers, Clients, Context, Listening};

/// Listeners a worker may be told of before it has looked.
const COMMANDS_MAX: usize = 64;
/// Between two looks for kept connections that have grown too old.
const REAP_INTERVAL: Duration = Duration::from_secs(1);
/// For the connections that are cut at the end, to end in their own way. They need no more than a turn each.
const CUT_MAX: Duration = Duration::from_millis(500);
/// Between two looks whether they have.
const CUT_LOOK: Duration = Duration::from_millis(1);

/// The handler of one worker thread.
pub(super) struct Handler(Arc<Worker>);

impl Answers for Handler {
    type Body = AnswerBody;

    fn answer(
        &self,
        client: &Arc<Client>,
        request: Request<Incoming>,
        defect: Option<HeadDefect>,
    ) -> impl Future<Output = Response<AnswerBody>> + Send + use<> {
        // Boxed: hyper and what stands between move the future several times, and keep its room for as
        // long as the connection lives.
        Box::pin(self.0.clone().answer(client.clone(), request, defect))
    }
}

/// A listener's socket for one worker.
struct Listen {
    socket: TcpListener,
    listening: Arc<Listening>,
}

/// All of them.
pub(super) struct Workers {
    commands: Vec<mpsc::Sender<Listen>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What every worker is made with.
pub(super) struct Parts {
    pub(super) directory: Arc<Directory>,
    pub(super) clients: Arc<Clients>,
    pub(super) memory: Memory,
    pub(super) draining: Draining,
}

impl Workers {
    /// Starts `n` threads that end when the drain is done.
    pub(super) fn start(n: usize, parts: &Parts) -> io::Result<Self> {
        let mut commands = Vec::with_capacity(n);
        let mut threads = Vec::with_capacity(n);
        for index in 0..n {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (sender, receiver) = mpsc::channel(COMMANDS_MAX);
            let (worker, context) = equip(index, parts);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || runtime.block_on(work(worker, context, receiver)))?;
            commands.push(sender);
            threads.push(thread);
        }
        Ok(Self { commands, threads: Mutex::new(threads) })
    }

    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    /// Gives each worker its socket of a listener.
    pub(super) fn listen(&self, sockets: Vec<TcpListener>, listening: &Arc<Listening>) {
        debug_assert_eq!(sockets.len(), self.len());
        for (command, socket) in self.commands.iter().zip(sockets) {
            // A worker that has ended, or does not look, takes no more clients.
            if command.try_send(Listen { socket, listening: listening.clone() }).is_err() {
                tracing::error!(listener = %listening.name(), "a worker does not take its socket");
            }
        }
    }

    /// Waits until all have ended.
    pub(super) fn join(&self) {
        for thread in self.threads.lock().drain(..) {
            // A panic there was told of when it happened.
            let _ = thread.join();
        }
    }
}

/// What worker `index` answers with, and serves its connections with.
pub(super) fn equip(index: usize, parts: &Parts) -> (Arc<Worker>, Arc<Context<Handler>>) {
    let alarms = Alarms::new();
    let telemetry = parts.directory.telemetry().clone();
    let access = telemetry.access_log.worker();
    let (directory, memory) = (parts.directory.clone(), parts.memory.clone());
    let worker = Arc::new(Worker::new(index, directory, alarms.clone(), access, memory));
    let context = Arc::new(Context {
        handler: Handler(worker.clone()),
        clients: parts.clients.clone(),
        alarms,
        draining: parts.draining.clone(),
        telemetry,
    });
    (worker, context)
}

/// Starts what goes on beside the connections of a worker, on its runtime and for as long as that lives.
pub(super) fn attend(worker: Arc<Worker>, context: &Context<Handler>) -> [task::JoinHandle<()>; 2] {
    [tokio::spawn(context.alarms.clone().run()), tokio::spawn(reap(worker))]
}

/// One thread's life.
async fn work(worker: Arc<Worker>, context: Arc<Context<Handler>>, mut commands: mpsc::Receiver<Listen>) {
    attend(worker, &context);
    let draining = context.draining.clone();
    loop {
        tokio::select! {
            () = draining.done() => break,
            command = commands.recv() => match command {
                Some(Listen { socket, listening }) => {
                    tokio::spawn(accept(socket, listening, context.clone()));
                }
                // Nobody can bring another socket; what runs goes on until the drain is done.
                None => break draining.done().await,
            },
        }
    }
    // Where a mere close would pass for the end of an answer, its connection resets. One that does
    // not end is dropped with the runtime.
    let cut = async {
        while context.clients.open() > 0 {
            tokio::time::sleep(CUT_LOOK).await;
        }
    };
    let _ = tokio::time::timeout(CUT_MAX, cut).await;
}

async fn accept(socket: TcpListener, listening: Arc<Listening>, context: Arc<Context<Handler>>) {
    let name = listening.name().clone();
    if let Err(error) = server::accept(socket, listening, context).await {
        tracing::error!(%error, listener = %name, "a worker cannot accept clients");
    }
}

/// Kept connections are closed before their backends do it.
async fn reap(worker: Arc<Worker>) {
    let mut every = tokio::time::interval(REAP_INTERVAL);
    loop {
        every.tick().await;
        let snapshot = worker.directory.snapshot();
        for (pool, member) in snapshot.members() {
            member.backend.lane(worker.index).reap(pool.config.clocks.idle);
        }
    }
}
