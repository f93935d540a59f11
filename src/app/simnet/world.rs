//! One world lived through: evergate as `app` wires it, replicas and clients around it on a simulated network, on one
//! runtime whose clock jumps from event to event.
//!
//! What is left out of `app`: sockets, threads, files, the admin address, name look-ups. Everything that happens is
//! written to a trace, and the same seed makes the same trace.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};

use super::client::{self, Connection, Got, Verdict};
use super::plan::{Ask, BACKENDS, Kind, Plan, Trouble};
use crate::app::workers::{self, Handler, Parts};
use crate::clock::{self, world};
use crate::config::{self, Config};
use crate::drain::Drain;
use crate::net::TcpStream;
use crate::net::simulated::Network;
use crate::policy::Moment;
use crate::pool::Directory;
use crate::proxy::{Memory, Worker};
use crate::server::{self, Bounds, Clients, Context, Listening};
use crate::sim::{Fault, Portless, ReplicaConfig, Skin};
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::End;

/// Hosts that clients come from.
const CLIENT_HOSTS: usize = 4;
/// Between two looks at the pool.
const LOOK: Duration = Duration::from_millis(100);
/// So many looks are longer than a probe.
const LOOKS: u32 = 20;
/// For what ends to be ended: clients close, evergate drains.
const LAST: Duration = Duration::from_secs(5);

/// One exchange, as its client saw it.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) ask: Ask,
    /// Nobody was eligible when it came.
    pub(super) nobody: bool,
    /// None: its client left.
    pub(super) verdict: Option<Verdict>,
    pub(super) first: Option<Duration>,
    pub(super) gap: Duration,
    pub(super) took: Duration,
    /// How long the answer takes where nothing is wrong: from its first token to its last.
    pub(super) lasts: Duration,
    /// Requests that backends received for it.
    pub(super) received: u32,
}

/// What is left to be judged.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) exchanges: Vec<Exchange>,
    pub(super) trace: String,
    /// Rules broken on the way.
    pub(super) broken: Vec<String>,
}

/// What the parts of a world share.
#[derive(Default)]
struct Chronicle {
    trace: Mutex<Vec<String>>,
    broken: Mutex<Vec<String>>,
}

impl Chronicle {
    fn note(&self, what: impl std::fmt::Display) {
        let at = clock::now().since(Moment::ZERO + clock::HEAD_START);
        self.trace.lock().push(format!("{:>9.3} {what}", at.as_secs_f64()));
    }

    fn rule(&self, holds: bool, broken: impl FnOnce() -> String) {
        if !holds {
            let broken = broken();
            self.note(format_args!("BROKEN: {broken}"));
            self.broken.lock().push(broken);
        }
    }
}

/// Lives through `plan`.
pub(super) fn live(plan: &Plan) -> Told {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let _world = world::begin(plan.seed);
        let (network, _leave) = Network::of_this_thread(plan.seed);
        World::new(plan, network).live().await
    })
}

struct World<'a> {
    plan: &'a Plan,
    network: Network,
    chronicle: Arc<Chronicle>,
    engines: Vec<Engine>,
    evergate: Evergate,
    /// Connections to evergate that wait for their next request.
    kept: Arc<Mutex<Vec<http1::SendRequest<Full<Bytes>>>>>,
    clients: JoinSet<()>,
}

/// evergate, as far as a world needs it.
struct Evergate {
    directory: Arc<Directory>,
    worker: Arc<Worker>,
    context: Arc<Context<Handler>>,
    listening: Arc<Listening>,
    memory: Memory,
    drain: Drain,
    attendants: [JoinHandle<()>; 2],
}

/// A replica and its host.
struct Engine {
    host: SocketAddr,
    replica: Arc<Portless>,
    process: Option<JoinHandle<()>>,
}

pub(super) fn backend(i: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, i as u8 + 1), 8000).into()
}

fn client_host(i: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 1, 0, i as u8 + 1), 40_000).into()
}

fn configuration(plan: &Plan) -> Config {
    let urls: Vec<String> = (0..BACKENDS).map(|i| format!("\"http://{}\"", backend(i))).collect();
    let http = if plan.h2 { "2" } else { "1" };
    let mut text = format!("workers = 1\n[[pool]]\nbackends = [{}]\nhttp = \"{http}\"\n", urls.join(","));
    if plan.preset {
        let engine = match plan.skin {
            Skin::Vllm => "vllm",
            Skin::Sglang => "sglang",
            Skin::LlamaCpp | Skin::Generic => "llamacpp",
        };
        text += &format!("[pool.probe]\npreset = \"{engine}\"\n");
    }
    if plan.known {
        text += "[pool.progress]\nfirst_token_unknown = \"2s\"\ntoken_gap_unknown = \"1s\"\n";
    }
    config::parse(&text, "simnet", &|_| None).unwrap_or_else(|errors| panic!("{errors}"))
}

impl Evergate {
    fn start(config: Config) -> Self {
        let telemetry = Arc::new(Telemetry::silent());
        let clients = Clients::new(Bounds::from(&config));
        let listening = Listening::new(&config.listeners[0], &telemetry).expect("a listener without TLS");
        let directory = Arc::new(Directory::new(config, telemetry).expect("a pool without TLS"));
        let (drain, memory) = (Drain::new(), Memory::default());
        let parts =
            Parts { directory: directory.clone(), clients, memory: memory.clone(), draining: drain.watch() };
        let (worker, context) = workers::equip(0, &parts);
        let attendants = workers::attend(worker.clone(), &context);
        super::super::watch_backends(&directory, &drain.watch());
        Self { directory, worker, context, listening, memory, drain, attendants }
    }
}

impl Engine {
    fn new(i: usize, plan: &Plan) -> Self {
        let config = ReplicaConfig {
            name: format!("replica-{i}"),
            address: backend(i),
            skin: plan.skin,
            tokens_per_second: plan.tokens_per_second,
            first_token: plan.first_token,
            tokens: 40,
            ..ReplicaConfig::default()
        };
        Self { host: backend(i), replica: Arc::new(Portless::new(config)), process: None }
    }

    fn start(&mut self, network: &Network, loading: bool) {
        self.replica.set_fault(if loading { Fault::Loading } else { Fault::None });
        let listener = network.listen(self.host);
        let replica = self.replica.clone();
        self.process = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    biased;
                    Some(_) = connections.join_next() => {}
                    socket = listener.accept() => {
                        connections.spawn(replica.serve(TcpStream::Simulated(socket)));
                    }
                }
            }
        }));
    }

    fn kill(&mut self) {
        self.replica.dies();
        if let Some(process) = self.process.take() {
            process.abort();
        }
    }
}

impl<'a> World<'a> {
    fn new(plan: &'a Plan, network: Network) -> Self {
        for i in 0..BACKENDS {
            network.add(backend(i), plan.links[i]);
        }
        for i in 0..CLIENT_HOSTS {
            network.add(client_host(i), plan.clients);
        }
        let mut engines: Vec<Engine> = (0..BACKENDS).map(|i| Engine::new(i, plan)).collect();
        engines.iter_mut().for_each(|engine| engine.start(&network, false));
        let evergate = Evergate::start(configuration(plan));
        let kept = Arc::default();
        let chronicle = Arc::default();
        Self { plan, network, chronicle, engines, evergate, kept, clients: JoinSet::new() }
    }

    async fn live(mut self) -> Told {
        let chronicle = self.chronicle.clone();
        chronicle.note(format_args!(
            "seed {} {:?} {:?} h2 {} known {} first token {:?} {}/s",
            self.plan.seed,
            self.plan.scenario,
            self.plan.skin,
            self.plan.h2,
            self.plan.known,
            self.plan.first_token,
            self.plan.tokens_per_second
        ));
        let sick = self.plan.sick;
        let looking = tokio::spawn(look(self.evergate.directory.clone(), chronicle.clone(), sick));
        let told: Arc<Mutex<Vec<Exchange>>> = Arc::default();
        let (mut trouble, mut asks) =
            (self.plan.trouble.iter().peekable(), self.plan.asks.iter().enumerate().peekable());
        loop {
            let next = [trouble.peek().map(|(at, _)| *at), asks.peek().map(|(_, ask)| ask.at)];
            let Some(at) = next.into_iter().flatten().min() else { break };
            until(at).await;
            while let Some((_, what)) = trouble.next_if(|(due, _)| *due <= at) {
                self.strike(what);
            }
            while let Some((n, ask)) = asks.next_if(|(_, ask)| ask.at <= at) {
                self.ask(n, ask.clone(), told.clone());
            }
        }
        until(self.plan.ends).await;
        self.look_at_the_end().await;
        looking.abort();
        let asked = self.plan.asks.len();
        self.end().await;
        let exchanges = std::mem::take(&mut *told.lock());
        let missing = asked - exchanges.len();
        chronicle.rule(missing == 0, || format!("{missing} exchanges never ended"));
        let trace = chronicle.trace.lock().join("\n");
        let broken = std::mem::take(&mut *chronicle.broken.lock());
        Told { exchanges, trace, broken }
    }

    fn strike(&mut self, what: &Trouble) {
        self.chronicle.note(format_args!("-- {what:?}"));
        let network = &self.network;
        match what {
            Trouble::Conditions(i, conditions) => network.set_conditions(backend(*i), *conditions),
            Trouble::Open(i, open) => network.set_open(backend(*i), *open),
            Trouble::Door(i, door) => network.set_door(backend(*i), *door),
            Trouble::Forget(i) => network.forget(backend(*i)),
            Trouble::Reboot(i) => network.reboot(backend(*i)),
            Trouble::Breaks(i, breaks) => network.set_breaks(backend(*i), breaks.clone()),
            Trouble::Kill(i) => self.engines[*i].kill(),
            Trouble::Start(i, loading) => self.engines[*i].start(network, *loading),
            Trouble::Loaded(i) => self.engines[*i].replica.set_fault(Fault::None),
        }
    }

    fn ask(&mut self, n: usize, ask: Ask, told: Arc<Mutex<Vec<Exchange>>>) {
        let (path, body) = request(n, &ask, self.plan.skin);
        let replica = self.engines[0].replica.clone();
        let truth = replica.says(path, &body).expect("a request that a replica answers");
        let request = Request::post(format!("http://evergate{path}"))
            .header("host", "evergate")
            .header("content-type", "application/json")
            .header("x-request-id", format!("ask-{n}"))
            .body(Full::from(body.to_string()))
            .expect("a request");
        let client = Visitor {
            network: self.network.clone(),
            host: client_host(n % CLIENT_HOSTS),
            context: self.evergate.context.clone(),
            listening: self.evergate.listening.clone(),
            kept: self.kept.clone(),
        };
        let chronicle = self.chronicle.clone();
        let nobody = self.evergate.directory.look().pools.iter().all(|pool| pool.eligible() == 0);
        let replicas: Vec<_> = self.engines.iter().map(|engine| engine.replica.clone()).collect();
        let pace = Duration::from_secs_f64(1.0 / self.plan.tokens_per_second);
        self.clients.spawn(async move {
            chronicle.note(format_args!("   ask-{n} {:?}{}", ask.kind, if ask.h2 { " h2" } else { "" }));
            let asked = clock::now();
            let asking = client.ask(ask.h2, request);
            let got = match ask.leaves {
                Some(after) => tokio::time::timeout(after, asking).await.ok(),
                None => Some(asking.await),
            };
            let verdict = got.as_ref().map(|got| match got {
                Ok(got) => client::judge(ask.kind, &truth, got),
                Err(why) => Verdict::Wrong(why.clone()),
            });
            let came: Option<&Got> = got.as_ref().and_then(|got| got.as_ref().ok());
            let tokens = truth.split_inclusive(' ').count() as u32;
            let exchange = Exchange {
                nobody,
                verdict,
                first: came.and_then(|got| got.first),
                gap: came.map(|got| got.gap).unwrap_or_default(),
                took: clock::now().since(asked),
                lasts: if ask.kind == Kind::Embeddings { Duration::ZERO } else { pace * tokens },
                received: replicas.iter().map(|replica| replica.received(&format!("ask-{n}"))).sum(),
                ask,
            };
            chronicle.note(format_args!(
                "   ask-{n} {} first {:?} gap {:?} took {:?} received {}",
                match &exchange.verdict {
                    Some(verdict) => format!("{verdict:?}"),
                    None => "left".to_owned(),
                },
                exchange.first.unwrap_or_default(),
                exchange.gap,
                exchange.took,
                exchange.received
            ));
            told.lock().push(exchange);
        });
    }

    /// All is well for some time, and nobody asks: nothing may be left of what was.
    async fn look_at_the_end(&mut self) {
        let Evergate { directory, worker, context, memory, .. } = &self.evergate;
        let rule = |holds, broken: &str| self.chronicle.rule(holds, || format!("at the end {broken}"));
        let metrics = &directory.telemetry().metrics;
        let exchanges = &metrics.exchanges;
        let out: u64 = End::ALL.iter().map(|end| exchanges.finished(*end)).sum();
        rule(exchanges.in_flight() == 0 && exchanges.started() == out, "requests in are not responses out");
        rule(memory.held() == 0, &format!("{} bytes are held", memory.held()));
        let kept = self.kept.lock().len();
        rule(context.clients.open() <= kept, "a client's connection is open that nobody has");
        rule(
            worker.alarms.len() == context.clients.open(),
            &format!("{} alarms for {} connections", worker.alarms.len(), context.clients.open()),
        );
        let snapshot = directory.snapshot();
        for pool in &snapshot.pools {
            rule(pool.state.waiters() == 0, "somebody waits in a line");
            let due = (0..BACKENDS).filter(|i| self.plan.probes_fit(*i)).count();
            rule(pool.eligible() >= due, &format!("only {} backends are eligible", pool.eligible()));
        }
        for (i, (_, member)) in snapshot.members().enumerate() {
            let name = &member.params.name;
            rule(member.backend.in_flight() == 0, &format!("{name} has attempts in flight"));
            // An HTTP/2 connection is kept for as long as it answers. Probes have their own, one after the other.
            let mut connections = member.target.open.get();
            let most = i64::from(self.plan.h2);
            for _ in 0..LOOKS {
                tokio::time::sleep(LOOK).await;
                connections = connections.min(member.target.open.get());
            }
            rule(connections <= most, &format!("{connections} connections to {name} are open"));
            let stats = self.engines[i].replica.stats();
            let forgotten = self.plan.trouble.iter().any(|(_, what)| *what == Trouble::Forget(i));
            rule(
                forgotten || stats.in_flight == 0,
                &format!("{name} still works for {} requests", stats.in_flight),
            );
        }
    }

    /// Ends everything, and looks whether it did.
    async fn end(self) {
        let Self { evergate, mut clients, kept, mut engines, chronicle, .. } = self;
        kept.lock().clear();
        clients.abort_all();
        engines.iter_mut().for_each(Engine::kill);
        evergate.drain.trigger();
        evergate.drain.trigger();
        tokio::time::sleep(LAST).await;
        evergate.attendants.iter().for_each(JoinHandle::abort);
        drop((evergate, clients));
        tokio::time::sleep(LAST).await;
        let alive = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        chronicle.rule(alive == 0, || format!("{alive} tasks outlive everything"));
    }
}

/// Writes down what evergate tells, and looks that the last eligible backend is never ejected.
async fn look(directory: Arc<Directory>, chronicle: Arc<Chronicle>, sick: [bool; BACKENDS]) {
    let mut events = directory.telemetry().events.subscribe();
    let mut all_out = false;
    loop {
        tokio::time::sleep(LOOK).await;
        while let Ok(event) = events.try_recv() {
            let backend = event.backend.as_deref().unwrap_or_default();
            let name = event.name.unwrap_or_default();
            chronicle.note(format_args!("   {} {backend} {name}: {}", event.event, event.text));
            chronicle.rule(event.event != "panic_caught", || format!("a panic: {}", event.text));
            let well = (0..BACKENDS).any(|i| !sick[i] && backend == self::backend(i).to_string());
            chronicle.rule(!(well && name == "ejected"), || {
                format!("{backend} was well and was ejected: {}", event.text)
            });
        }
        let snapshot = directory.snapshot();
        let ejected =
            snapshot.members().filter(|(_, m)| m.backend.whole().read(|judge| judge.is_ejected())).count();
        let now_all_out = ejected == BACKENDS;
        chronicle.rule(!now_all_out || all_out, || "the last eligible backend was ejected".to_owned());
        all_out = now_all_out;
    }
}

/// Waits until `at`, counted from the beginning of the world.
async fn until(at: Duration) {
    let now = clock::now().since(Moment::ZERO + clock::HEAD_START);
    tokio::time::sleep(at.saturating_sub(now)).await;
}

fn request(n: usize, ask: &Ask, skin: Skin) -> (&'static str, Value) {
    let words = format!("Tell me about light number {n}.");
    let limit = ask.tokens_max;
    match ask.kind {
        Kind::ChatStream | Kind::Chat => (
            "/v1/chat/completions",
            json!({"model": "evergate-sim", "stream": ask.kind == Kind::ChatStream, "max_tokens": limit,
                   "temperature": 0, "messages": [{"role": "user", "content": words}]}),
        ),
        Kind::CompletionStream => (
            "/v1/completions",
            json!({"model": "evergate-sim", "stream": true, "max_tokens": limit, "temperature": 0,
                   "prompt": words, "ignore_eos": skin == Skin::Vllm}),
        ),
        Kind::Embeddings => ("/v1/embeddings", json!({"model": "evergate-sim", "input": words})),
    }
}

/// A client's means.
struct Visitor {
    network: Network,
    host: SocketAddr,
    context: Arc<Context<Handler>>,
    listening: Arc<Listening>,
    kept: Arc<Mutex<Vec<http1::SendRequest<Full<Bytes>>>>>,
}

impl Visitor {
    async fn ask(&self, h2: bool, request: Request<Full<Bytes>>) -> Result<Got, String> {
        let mut connection = self.connection(h2).await?;
        let got = client::ask(&mut connection, request).await;
        if let (Connection::H1(h1), Ok(_)) = (connection, &got)
            && h1.is_ready()
        {
            self.kept.lock().push(h1);
        }
        got
    }

    async fn connection(&self, h2: bool) -> Result<Connection, String> {
        if !h2 {
            while let Some(kept) = { self.kept.lock().pop() } {
                if kept.is_ready() {
                    return Ok(Connection::H1(kept));
                }
            }
        }
        let (theirs, ours) = self.network.come_in(self.host);
        server::welcome(TcpStream::Simulated(ours), self.host, &self.listening, &self.context).await;
        let io = TokioIo::new(theirs);
        if h2 {
            let (h2, driver) =
                http2::handshake(TokioExecutor::new(), io).await.map_err(|error| error.to_string())?;
            tokio::spawn(async move { drop(driver.await) });
            Ok(Connection::H2(h2))
        } else {
            let (h1, driver) = http1::handshake(io).await.map_err(|error| error.to_string())?;
            tokio::spawn(async move { drop(driver.await) });
            Ok(Connection::H1(h1))
        }
    }
}
