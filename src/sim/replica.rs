//! One simulated replica: a real HTTP server on a real port that can be killed, frozen and revived.
//!
//! The owner holds a [`Replica`]; everything else runs on the runtime it was started on and ends
//! when it is dropped or killed. The port stays reserved for its lifetime, so a killed replica
//! refuses connections and comes back at the same address, whoever else asks the kernel for ports.
//! What is answered, and how badly, is in `serve`.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::api;
use super::faults::Fault;
use super::serve;
use super::skin::{Api, Skin};
use crate::net::{self, TcpStream};

/// Accept queue of the listening socket; connections beyond it wait for the client's SYN to be sent again.
const BACKLOG: i32 = 1024;
/// After a failed accept (out of descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);
/// How HTTP/2 with prior knowledge begins (RFC 9113 §3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a simulated replica is.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaConfig {
    /// Sent as `x-sim-replica`, to tell replicas apart. Default `replica`.
    pub name: String,
    /// Where it listens. Default 127.0.0.1, port chosen by the kernel.
    pub address: SocketAddr,
    /// The one model it serves. Default `evergate-sim`.
    pub model: String,
    /// Replicas of equal model and weights give equal answers. Default 0.
    pub weights: u64,
    /// The engine it looks like. Default [`Skin::Generic`].
    pub skin: Skin,
    /// Pace of one answer, whatever else is running. Zero or infinite: as fast as it can. Default 50.
    pub tokens_per_second: f64,
    /// From the start of work to the first token. Default 100 ms.
    pub first_token: Duration,
    /// Answers end at the first end of a sentence at or after this many tokens. Default 64.
    pub tokens: usize,
    /// Requests worked on at a time, at least 1; the others wait, without bound. Default no limit.
    pub slots: Option<usize>,
    /// After each start it answers 503 "Loading model" for this long. Default zero.
    pub loading: Duration,
    /// When given, `/v1` wants it as a bearer token. Default none.
    pub api_key: Option<String>,
}

impl Default for ReplicaConfig {
    fn default() -> Self {
        Self {
            name: "replica".to_owned(),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            model: "evergate-sim".to_owned(),
            weights: 0,
            skin: Skin::default(),
            tokens_per_second: 50.0,
            first_token: Duration::from_millis(100),
            tokens: 64,
            slots: None,
            loading: Duration::ZERO,
            api_key: None,
        }
    }
}

impl ReplicaConfig {
    /// What a healthy replica so configured says to this chat request; `None` where it would refuse it.
    /// The answer is worked out here and now: what came over a network can be compared with it.
    pub fn answer_to_chat(&self, body: &serde_json::Value) -> Option<String> {
        let job = api::job(Api::Chat, self.skin, &self.model, body).ok()?;
        Some(job.answer(&self.model, self.weights, self.tokens).tokens.concat())
    }
}

/// What a replica saw since it was first started. Inference requests only, unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections accepted.
    pub connections: u64,
    /// Begun, those refused and failed included.
    pub requests: u64,
    /// Being answered now.
    pub in_flight: u64,
    /// Answered to the end, well or with an error status.
    pub completed: u64,
    /// Broken off by a fault or by the death of the replica.
    pub streams_cut: u64,
    /// Given up because the client went away.
    pub cancelled: u64,
    /// Tokens said.
    pub tokens: u64,
    /// Everything else: health, model list, metrics.
    pub other_requests: u64,
}

/// A running, frozen or dead simulated replica. Dropping it ends it like [`kill`](Self::kill), without waiting.
#[derive(Debug)]
pub struct Replica {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// Bound, never listening: keeps the port from being given to others while the replica is dead.
    reserved: Socket,
    life: tokio::sync::Mutex<Option<Life>>,
}

#[derive(Debug)]
struct Life {
    end: watch::Sender<bool>,
    server: JoinHandle<()>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Replica {
    /// Starts serving on the current tokio runtime. Fails when the address cannot be bound.
    pub async fn start(config: ReplicaConfig) -> io::Result<Self> {
        let reserved = bound(config.address)?;
        let address = reserved.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let shared = Shared::new(config, address.port());
        let replica = Self { shared, address, reserved, life: tokio::sync::Mutex::default() };
        replica.revive().await?;
        Ok(replica)
    }

    /// Address it serves at, dead or alive.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// `http://` and the address.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it was started with.
    pub fn config(&self) -> &ReplicaConfig {
        &self.shared.config
    }

    /// Death of the process: the listener is closed, every connection is reset. Returns when all of
    /// that has happened. Killing the dead does nothing.
    pub async fn kill(&self) {
        let mut life = self.life.lock().await;
        let Some(mut ending) = life.take() else { return };
        self.shared.deaths.fetch_add(1, Relaxed);
        ending.end.send_replace(true);
        // An error means the server task is gone already, which is what was asked for.
        let _ = (&mut ending.server).await;
    }

    /// Starts again at the same address after a kill, thawed. Reviving the living does nothing.
    pub async fn revive(&self) -> io::Result<()> {
        let mut life = self.life.lock().await;
        if life.as_ref().is_some_and(|life| !life.server.is_finished()) {
            return Ok(());
        }
        let socket = bound(self.reserved.local_addr()?.as_socket().unwrap_or(self.address))?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        self.shared.gate.thaw();
        let (end, ended) = watch::channel(false);
        let server = tokio::spawn(accept(Arc::clone(&self.shared), listener, ended));
        *life = Some(Life { end, server });
        Ok(())
    }

    /// Whether it is neither killed nor frozen.
    pub async fn is_alive(&self) -> bool {
        !self.shared.gate.frozen.load(Relaxed)
            && self.life.lock().await.as_ref().is_some_and(|life| !life.server.is_finished())
    }

    /// Like SIGSTOP: the kernel goes on accepting connections, and no byte moves.
    pub fn freeze(&self) {
        self.shared.gate.frozen.store(true, Relaxed);
    }

    /// Like SIGCONT: answers go on where they stood, at their pace.
    pub fn thaw(&self) {
        self.shared.gate.thaw();
    }

    /// Makes requests that arrive from now on go wrong in this way.
    pub fn set_fault(&self, fault: Fault) {
        *self.shared.fault.lock() = fault;
    }

    /// The fault set last.
    pub fn fault(&self) -> Fault {
        *self.shared.fault.lock()
    }

    /// What it saw.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // Read by connections as they are dropped with the aborted server task.
        self.shared.deaths.fetch_add(1, Relaxed);
    }
}

/// What the owner and all connections of a replica share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: ReplicaConfig,
    pub(super) port: u16,
    pub(super) fault: Mutex<Fault>,
    pub(super) gate: Gate,
    pub(super) loading: AtomicBool,
    pub(super) slots: Option<Arc<Semaphore>>,
    pub(super) counters: Counters,
    /// Kills so far: what began before one and ends after it was cut by it.
    deaths: AtomicU64,
    /// Ids of the requests for inference that came, as they were given.
    #[cfg(test)]
    pub(super) ids: Mutex<Vec<String>>,
}

impl Shared {
    fn new(config: ReplicaConfig, port: u16) -> Arc<Self> {
        Arc::new(Self {
            slots: config.slots.map(|slots| Arc::new(Semaphore::new(slots.clamp(1, Semaphore::MAX_PERMITS)))),
            config,
            port,
            fault: Mutex::default(),
            gate: Gate::default(),
            loading: AtomicBool::new(false),
            deaths: AtomicU64::new(0),
            counters: Counters::default(),
            #[cfg(test)]
            ids: Mutex::default(),
        })
    }

    fn stats(&self) -> Stats {
        let counters = &self.counters;
        Stats {
            connections: counters.connections.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            in_flight: counters.in_flight.load(Relaxed),
            completed: counters.completed.load(Relaxed),
            streams_cut: counters.streams_cut.load(Relaxed),
            cancelled: counters.cancelled.load(Relaxed),
            tokens: counters.tokens.load(Relaxed),
            other_requests: counters.other_requests.load(Relaxed),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    connections: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) in_flight: AtomicU64,
    completed: AtomicU64,
    streams_cut: AtomicU64,
    cancelled: AtomicU64,
    pub(super) tokens: AtomicU64,
    pub(super) other_requests: AtomicU64,
}

/// How an inference request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Completed,
    Cut,
}

/// Counts one inference request in flight; dropped without an end, the client or the replica left.
#[derive(Debug)]
pub(super) struct InFlight {
    shared: Arc<Shared>,
    end: Option<End>,
    deaths: u64,
    /// Number of the request on this replica, from 0.
    pub(super) nth: u64,
}

impl InFlight {
    pub(super) fn begin(shared: &Arc<Shared>) -> Self {
        shared.counters.in_flight.fetch_add(1, Relaxed);
        let nth = shared.counters.requests.fetch_add(1, Relaxed);
        Self { shared: Arc::clone(shared), end: None, deaths: shared.deaths.load(Relaxed), nth }
    }

    /// To be counted as ended this way once dropped.
    pub(super) fn end(&mut self, end: End) {
        self.end = Some(end);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let counters = &self.shared.counters;
        let counter = match self.end {
            Some(End::Completed) => &counters.completed,
            Some(End::Cut) => &counters.streams_cut,
            None if self.shared.deaths.load(Relaxed) != self.deaths => &counters.streams_cut,
            None => &counters.cancelled,
        };
        counter.fetch_add(1, Relaxed);
        counters.in_flight.fetch_sub(1, Relaxed);
    }
}

/// What an answer can do to its own connection.
#[derive(Debug, Default)]
pub(super) struct Fate {
    reset: AtomicBool,
    ended: Notify,
}

impl Fate {
    /// Ends the connection with FIN, or with RST.
    pub(super) fn end(&self, reset: bool) {
        self.reset.store(reset, Relaxed);
        self.ended.notify_one();
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, mut end: watch::Receiver<bool>) {
    shared.loading.store(!shared.config.loading.is_zero(), Relaxed);
    let loaded = tokio::time::sleep(shared.config.loading);
    tokio::pin!(loaded);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            _ = end.changed() => break,
            () = &mut loaded, if shared.loading.load(Relaxed) => shared.loading.store(false, Relaxed),
            Some(_) = connections.join_next() => {}
            accepted = async { shared.gate.open().await; listener.accept().await } => match accepted {
                Ok((stream, _)) => {
                    shared.counters.connections.fetch_add(1, Relaxed);
                    connections.spawn(connection(Arc::clone(&shared), net::accepted(stream)));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn connection(shared: Arc<Shared>, stream: TcpStream) {
    // Both fail only on a connection that is gone already.
    let _ = stream.set_nodelay(true);
    let fate = Arc::new(Fate::default());
    let deaths = shared.deaths.load(Relaxed);
    let mut io =
        Wire { stream, shared: Arc::clone(&shared), deaths, fate: Arc::clone(&fate), first: Bytes::new() };
    let serving = async {
        let Ok(is_h2) = io.begins_with_h2_preface().await else { return };
        let answering = Arc::clone(&fate);
        let service =
            service_fn(move |request| serve::answer(Arc::clone(&shared), Arc::clone(&answering), request));
        // An error is a client that left or a fault that was asked for: nothing to tell anyone.
        if is_h2 {
            let streams = Streams::default();
            let _ = hyper::server::conn::http2::Builder::new(streams.clone())
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(io), service)
                .await;
            streams.0.lock().abort_all();
        } else {
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(io), service)
                .await;
        }
    };
    tokio::select! {
        () = serving => {}
        () = fate.ended.notified() => {}
    }
}

/// Runs the HTTP/2 streams of one connection; they end with it.
#[derive(Clone, Default)]
struct Streams(Arc<Mutex<JoinSet<()>>>);

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let mut streams = self.0.lock();
        while streams.try_join_next().is_some() {}
        streams.spawn(async move {
            stream.await;
        });
    }
}

/// Stops and releases everything that asks it first.
#[derive(Debug, Default)]
pub(super) struct Gate {
    frozen: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

impl Gate {
    /// Waits while frozen; true when it had to.
    pub(super) async fn open(&self) -> bool {
        let mut waited = false;
        std::future::poll_fn(|cx| {
            let open = self.poll_open(cx);
            waited |= open.is_pending();
            open
        })
        .await;
        waited
    }

    fn poll_open(&self, cx: &Context<'_>) -> Poll<()> {
        if !self.frozen.load(Relaxed) {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.lock();
        // Asked again under the lock, or a thaw between the two would be missed.
        if !self.frozen.load(Relaxed) {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn thaw(&self) {
        let waiting = {
            let mut waiting = self.waiting.lock();
            self.frozen.store(false, Relaxed);
            std::mem::take(&mut *waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A replica without a port, for a simulated network: whoever has connections gives them to it.
#[cfg(test)]
pub(crate) struct Portless(Arc<Shared>);

#[cfg(test)]
impl Portless {
    /// One that is alive, and loads for as long as it is told to.
    pub(crate) fn new(config: ReplicaConfig) -> Self {
        let port = config.address.port();
        Self(Shared::new(config, port))
    }

    /// Serves a connection to its end. Dropped after a [`death`](Self::dies), it is reset.
    pub(crate) fn serve(&self, stream: TcpStream) -> impl Future<Output = ()> + Send + use<> {
        self.0.counters.connections.fetch_add(1, Relaxed);
        connection(Arc::clone(&self.0), stream)
    }

    /// Its process is gone. Its connections are the caller's to drop.
    pub(crate) fn dies(&self) {
        self.0.deaths.fetch_add(1, Relaxed);
    }

    /// As [`Replica::set_fault`].
    pub(crate) fn set_fault(&self, fault: Fault) {
        *self.0.fault.lock() = fault;
    }

    /// As [`Replica::stats`].
    pub(crate) fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// How often a request of this id came.
    pub(crate) fn received(&self, id: &str) -> u32 {
        self.0.ids.lock().iter().map(|given| u32::from(given == id)).sum()
    }

    /// What it says, when well, to a `POST` of this body: the text of a chat or a completion, else the whole body.
    pub(crate) fn says(&self, path: &str, body: &serde_json::Value) -> Option<String> {
        serve::said(&self.0, path, body)
    }
}

/// A client's connection as the replica sees it: frozen with it, reset when it dies.
struct Wire {
    stream: TcpStream,
    shared: Arc<Shared>,
    /// Kills before it was accepted.
    deaths: u64,
    fate: Arc<Fate>,
    /// Read while the protocol was being found out.
    first: Bytes,
}

impl Wire {
    /// Reads as much as tells HTTP/2 from HTTP/1.1; it is read again by the server.
    async fn begins_with_h2_preface(&mut self) -> io::Result<bool> {
        let mut first = Vec::with_capacity(H2_PREFACE.len());
        let mut buffer = [0; H2_PREFACE.len()];
        while first.len() < H2_PREFACE.len() && H2_PREFACE.starts_with(&first) {
            let room = H2_PREFACE.len() - first.len();
            match self.read(&mut buffer[..room]).await? {
                0 => break,
                read => first.extend_from_slice(&buffer[..read]),
            }
        }
        let is_h2 = first == H2_PREFACE;
        self.first = first.into();
        Ok(is_h2)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.shared.deaths.load(Relaxed) != self.deaths || self.fate.reset.load(Relaxed) {
            // Fails only on a connection that is gone already.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.shared.gate.poll_open(cx));
        if !self.first.is_empty() {
            let length = self.first.len().min(buf.remaining());
            buf.put_slice(&self.first[..length]);
            self.first.advance(length);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.shared.gate.poll_open(cx));
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.shared.gate.poll_open(cx));
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.shared.gate.poll_open(cx));
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.shared.gate.poll_open(cx));
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A socket bound with `SO_REUSEADDR`, so that the reserving and the listening one may share the port.
fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
