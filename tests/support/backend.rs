//! A scripted backend on raw sockets: it sends exactly the bytes a test wants, when it wants, and
//! remembers exactly what it saw.
//!
//! Scripts are by request (head and body are read and recorded, then the steps of the reply run) or
//! by connection (nothing is done but the steps). Probes do not use up a script by request: they are
//! answered well unless the script says otherwise.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use serde_json::Value;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::reply::{self, Step, Talk};
use super::tls::ServerTls;
use super::{PATIENCE, ReservedPort, eventually};

type Answer = Arc<dyn Fn(&RequestSeen) -> Vec<Step> + Send + Sync>;

/// What a backend does. The default is a healthy replica.
#[derive(Clone)]
pub struct Script {
    talk: Talk,
    answers: Vec<Vec<Step>>,
    then_healthy: bool,
    probes: Option<Vec<Step>>,
    by_request: Option<Answer>,
    by_connection: Vec<Vec<Step>>,
}

impl Script {
    pub fn new() -> Self {
        Self {
            talk: Talk::default(),
            answers: Vec::new(),
            then_healthy: false,
            probes: None,
            by_request: None,
            by_connection: Vec::new(),
        }
    }

    /// What the healthy replica says.
    pub fn talk(mut self, talk: Talk) -> Self {
        self.talk = talk;
        self
    }

    /// The next request (probes aside) is answered so; the last answer given here repeats.
    pub fn answer(mut self, steps: Vec<Step>) -> Self {
        self.answers.push(steps);
        self
    }

    pub fn answer_json(self, status: u16, body: &Value) -> Self {
        self.answer(reply::json(status, body))
    }

    pub fn sse<E: AsRef<[u8]>>(self, events: &[E]) -> Self {
        self.answer(reply::sse(events))
    }

    /// After the answers given, the backend is healthy instead of repeating the last one.
    pub fn then_healthy(mut self) -> Self {
        self.then_healthy = true;
        self
    }

    /// `GET /health` and `GET /v1/models` are answered so.
    pub fn probes(mut self, steps: Vec<Step>) -> Self {
        self.probes = Some(steps);
        self
    }

    /// It says nothing of its models. A connection it breaks then raises no doubt about who it is, which would send
    /// the requests after that to its peers for a moment.
    pub fn nameless(self) -> Self {
        self.probes(reply::error(404))
    }

    /// Every request, probes included, is answered by this.
    pub fn by_request(mut self, answer: impl Fn(&RequestSeen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        self.by_request = Some(Arc::new(answer));
        self
    }

    /// The next connection (whoever opens it) does these steps and nothing else, then closes with
    /// FIN; the last connection given here repeats. No TLS handshake is made, not even by a TLS backend.
    pub fn connection(mut self, steps: Vec<Step>) -> Self {
        self.by_connection.push(steps);
        self
    }

    fn steps_for(&self, request: &RequestSeen) -> Vec<Step> {
        if let Some(answer) = &self.by_request {
            return answer(request);
        }
        let Some(nth) = request.nth else {
            return self.probes.clone().unwrap_or_else(|| reply::healthy(request, &self.talk));
        };
        match (self.answers.get(nth), self.answers.last()) {
            (Some(steps), _) => steps.clone(),
            (None, Some(last)) if !self.then_healthy => last.clone(),
            _ => reply::healthy(request, &self.talk),
        }
    }
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct RequestSeen {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names as they were spelt, in their order.
    pub headers: Vec<(String, String)>,
    /// With chunking removed.
    pub body: Bytes,
    /// Whether all of the body came.
    pub complete: bool,
    /// Number of its connection on this backend, from 0.
    pub connection: usize,
    /// Its number on that connection, from 0.
    pub index: usize,
    /// Its number on this backend, probes aside, from 0. None for a probe.
    pub nth: Option<usize>,
    /// When its head was complete.
    pub at: Instant,
}

impl RequestSeen {
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(given, _)| given.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// The body as JSON; null when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    pub fn is_probe(&self) -> bool {
        self.nth.is_none()
    }
}

/// A connection as it was.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionSeen {
    pub opened: Instant,
    /// When the peer closed or reset it, if it did so first.
    pub closed_by_peer: Option<Instant>,
    /// When it was over for the backend.
    pub over: Option<Instant>,
}

/// A running scripted backend. Ends when dropped.
pub struct Backend {
    port: ReservedPort,
    state: Arc<State>,
    server: JoinHandle<()>,
}

struct State {
    script: Mutex<Script>,
    requests: Mutex<Vec<RequestSeen>>,
    connections: Mutex<Vec<ConnectionSeen>>,
    nth_request: AtomicUsize,
    paused: watch::Sender<bool>,
    dying: AtomicBool,
    orders: mpsc::Sender<(Order, oneshot::Sender<()>)>,
    tls: Option<TlsAcceptor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Listen,
    CloseListener,
    Die,
}

impl Backend {
    /// A healthy replica.
    pub async fn healthy() -> Self {
        Self::start(Script::new()).await
    }

    pub async fn start(script: Script) -> Self {
        Self::run(script, None, true)
    }

    /// Speaks TLS; what certificate it shows is the test's choice.
    pub async fn start_tls(script: Script, tls: &ServerTls) -> Self {
        Self::run(script, Some(tls.acceptor()), true)
    }

    /// Refuses every connection, until [`restart`](Self::restart)ed as a healthy replica.
    pub async fn refusing() -> Self {
        Self::run(Script::new(), None, false)
    }

    fn run(script: Script, tls: Option<TlsAcceptor>, listening: bool) -> Self {
        let port = ReservedPort::new();
        let (orders, orders_given) = mpsc::channel(16);
        let state = Arc::new(State {
            script: Mutex::new(script),
            requests: Mutex::default(),
            connections: Mutex::default(),
            nth_request: AtomicUsize::new(0),
            paused: watch::Sender::new(false),
            dying: AtomicBool::new(false),
            orders,
            tls,
        });
        let address = port.addr();
        let listener = listening.then(|| TcpListener::from_std(port.listen(1024)).unwrap());
        let server = tokio::spawn(serve(Arc::clone(&state), address, listener, orders_given));
        Self { port, state, server }
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn url(&self) -> String {
        let scheme = if self.state.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.addr())
    }

    /// Requests that come from now on are answered by this script, from its beginning.
    pub fn set_script(&self, script: Script) {
        self.state.nth_request.store(0, SeqCst);
        *self.state.script.lock() = script;
    }

    /// Every request seen, probes included, in the order their heads came.
    pub fn all_requests(&self) -> Vec<RequestSeen> {
        self.state.requests.lock().clone()
    }

    /// Every request seen that is no probe.
    pub fn requests(&self) -> Vec<RequestSeen> {
        self.state.requests.lock().iter().filter(|request| !request.is_probe()).cloned().collect()
    }

    /// Every connection seen, probes' included.
    pub fn connections(&self) -> Vec<ConnectionSeen> {
        self.state.connections.lock().clone()
    }

    /// Connections that are not over.
    pub fn open_connections(&self) -> usize {
        self.state.connections.lock().iter().filter(|connection| connection.over.is_none()).count()
    }

    /// Waits until `count` requests that are no probes were seen.
    #[track_caller]
    pub fn has_seen(&self, count: usize) -> impl Future<Output = ()> {
        eventually(PATIENCE, move || self.requests().len() >= count)
    }

    /// Waits until the peer has closed the connection of that number; answers when it did.
    pub async fn closed_by_peer(&self, connection: usize) -> Instant {
        let closed = || self.state.connections.lock().get(connection).and_then(|seen| seen.closed_by_peer);
        eventually(PATIENCE, || closed().is_some()).await;
        closed().unwrap()
    }

    /// Death of the process: every connection reset, further ones refused.
    pub async fn stop(&self) {
        self.state.order(Order::Die).await;
    }

    /// Further connections are refused, running ones live on.
    pub async fn close_listener(&self) {
        self.state.order(Order::CloseListener).await;
    }

    /// Listens again at the same port.
    pub async fn restart(&self) {
        self.state.order(Order::Listen).await;
    }

    /// Like SIGSTOP: connections are accepted by the kernel, nothing more is done.
    pub fn pause(&self) {
        self.state.paused.send_replace(true);
    }

    /// Like SIGCONT.
    pub fn resume(&self) {
        self.state.paused.send_replace(false);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.state.dying.store(true, SeqCst);
        self.server.abort();
    }
}

impl State {
    async fn order(&self, order: Order) {
        let (done, is_done) = oneshot::channel();
        if self.orders.send((order, done)).await.is_ok() {
            let _ = is_done.await;
        }
    }

    async fn unpaused(&self) {
        let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
    }
}

async fn serve(
    state: Arc<State>,
    address: SocketAddr,
    mut listener: Option<TcpListener>,
    mut orders: mpsc::Receiver<(Order, oneshot::Sender<()>)>,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            state.unpaused().await;
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = orders.recv() => {
                let Some((order, done)) = order else { return };
                match order {
                    Order::Listen if listener.is_some() => {}
                    Order::Listen => {
                        let socket = super::reusable(address);
                        socket.listen(1024).unwrap();
                        listener = Some(TcpListener::from_std(socket.into()).unwrap());
                    }
                    Order::CloseListener => listener = None,
                    Order::Die => {
                        listener = None;
                        state.dying.store(true, SeqCst);
                        connections.shutdown().await;
                        state.dying.store(false, SeqCst);
                    }
                }
                let _ = done.send(());
            }
            Some(_) = connections.join_next() => {}
            accepted = accepted => if let Ok((stream, _)) = accepted {
                connections.spawn(connection(Arc::clone(&state), stream));
            },
        }
    }
}

async fn connection(state: Arc<State>, stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let number = {
        let mut connections = state.connections.lock();
        connections.push(ConnectionSeen { opened: Instant::now(), closed_by_peer: None, over: None });
        connections.len() - 1
    };
    let stream = Socket { wire: Wire::Plain(stream), state: Arc::clone(&state), number, reset: false };
    let raw = {
        let script = state.script.lock();
        script.by_connection.get(number).or(script.by_connection.last()).cloned()
    };
    if raw.is_none()
        && let Some(acceptor) = &state.tls
    {
        // A failed handshake shows as a connection without a request.
        if let Ok(tls) = acceptor.accept(stream).await {
            let wire = Wire::Tls(Box::new(tls));
            Conversation::new(Socket { wire, state, number, reset: false }).by_request().await;
        }
        return;
    }
    let mut conversation = Conversation::new(stream);
    match raw {
        Some(steps) => conversation.by_connection(steps).await,
        None => conversation.by_request().await,
    }
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Goes,
    Over,
}

struct Conversation {
    socket: Socket,
    read: BytesMut,
    requests: usize,
    /// Index in `State::requests` of the head read last.
    current: Option<usize>,
}

impl Conversation {
    fn new(socket: Socket) -> Self {
        Self { socket, read: BytesMut::new(), requests: 0, current: None }
    }

    async fn by_request(&mut self) {
        loop {
            if self.read_head().await == Flow::Over || self.read_body().await == Flow::Over {
                return;
            }
            let Some(request) = self.current.map(|at| self.socket.state.requests.lock()[at].clone()) else {
                return;
            };
            let script = self.socket.state.script.lock().clone();
            for step in script.steps_for(&request) {
                if self.step(step).await == Flow::Over {
                    return;
                }
            }
        }
    }

    async fn by_connection(&mut self, steps: Vec<Step>) {
        for step in steps {
            if self.step(step).await == Flow::Over {
                return;
            }
        }
    }

    async fn step(&mut self, step: Step) -> Flow {
        self.socket.state.unpaused().await;
        match step {
            Step::ReadHead => self.read_head().await,
            Step::ReadBody => self.read_body().await,
            Step::Send(bytes) => self.send(&bytes).await,
            Step::SendSlow { bytes, piece, every } => {
                for piece in bytes.chunks(piece.max(1)) {
                    self.socket.state.unpaused().await;
                    if self.send(piece).await == Flow::Over {
                        return Flow::Over;
                    }
                    self.pause_watching(every).await;
                }
                Flow::Goes
            }
            Step::Delay(time) => {
                self.pause_watching(time).await;
                Flow::Goes
            }
            Step::Stall => {
                self.socket.closed_by_peer().await;
                Flow::Over
            }
            Step::Fin => {
                // Unread bytes would turn the FIN into an RST.
                self.socket.discard_unread().await;
                let _ = self.socket.shutdown().await;
                Flow::Over
            }
            Step::HalfClose => {
                let _ = self.socket.shutdown().await;
                let mut discarded = [0; 4096];
                while self.socket.read(&mut discarded).await.is_ok_and(|read| read > 0) {}
                self.socket.note_closed_by_peer();
                Flow::Over
            }
            Step::Rst => {
                self.socket.reset = true;
                Flow::Over
            }
            Step::Die => {
                let state = Arc::clone(&self.socket.state);
                state.order(Order::Die).await;
                Flow::Over
            }
            Step::CloseListener => {
                let state = Arc::clone(&self.socket.state);
                state.order(Order::CloseListener).await;
                Flow::Goes
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Flow {
        let sent = async {
            self.socket.write_all(bytes).await?;
            self.socket.flush().await
        };
        if sent.await.is_ok() {
            return Flow::Goes;
        }
        self.socket.note_closed_by_peer();
        Flow::Over
    }

    /// Waits; notes when the peer closes meanwhile.
    async fn pause_watching(&self, time: Duration) {
        let _ = tokio::time::timeout(time, async {
            self.socket.closed_by_peer().await;
            std::future::pending::<()>().await;
        })
        .await;
    }

    async fn more(&mut self) -> Flow {
        let read = self.socket.read_buf(&mut self.read).await;
        self.socket.state.unpaused().await;
        if read.is_ok_and(|read| read > 0) {
            return Flow::Goes;
        }
        self.socket.note_closed_by_peer();
        Flow::Over
    }

    async fn read_head(&mut self) -> Flow {
        let end = loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                break end;
            }
            if self.more().await == Flow::Over {
                return Flow::Over;
            }
        };
        let head = self.read.split_to(end + 4);
        let head = String::from_utf8_lossy(&head[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let method = first.next().unwrap_or_default().to_owned();
        let target = first.next().unwrap_or_default().to_owned();
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(':').unwrap_or((line, "")))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        let state = &self.socket.state;
        let path = target.split('?').next().unwrap_or_default();
        let is_probe = method == "GET" && matches!(path, "/health" | "/v1/models");
        let request = RequestSeen {
            method,
            headers,
            body: Bytes::new(),
            complete: false,
            connection: self.socket.number,
            index: self.requests,
            nth: (!is_probe).then(|| state.nth_request.fetch_add(1, SeqCst)),
            at: Instant::now(),
            target,
        };
        self.requests += 1;
        let expects_continue =
            request.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue"));
        {
            let mut requests = state.requests.lock();
            requests.push(request);
            self.current = Some(requests.len() - 1);
        }
        if expects_continue { self.send(b"HTTP/1.1 100 Continue\r\n\r\n").await } else { Flow::Goes }
    }

    async fn read_body(&mut self) -> Flow {
        let Some(current) = self.current else { return Flow::Goes };
        let (length, chunked) = {
            let requests = self.socket.state.requests.lock();
            let request = &requests[current];
            let chunked = request.header("transfer-encoding").is_some_and(|value| value.contains("chunked"));
            (request.header("content-length").and_then(|length| length.parse::<usize>().ok()), chunked)
        };
        let mut body = BytesMut::new();
        let flow = if chunked {
            self.read_chunks(&mut body).await
        } else {
            self.read_exactly(length.unwrap_or(0), &mut body).await
        };
        let mut requests = self.socket.state.requests.lock();
        requests[current].body = body.freeze();
        requests[current].complete = flow == Flow::Goes;
        flow
    }

    async fn read_exactly(&mut self, length: usize, into: &mut BytesMut) -> Flow {
        let wanted = into.len() + length;
        loop {
            let take = self.read.len().min(wanted - into.len());
            into.extend_from_slice(&self.read[..take]);
            self.read.advance(take);
            if into.len() == wanted {
                return Flow::Goes;
            }
            if self.more().await == Flow::Over {
                return Flow::Over;
            }
        }
    }

    async fn read_chunks(&mut self, into: &mut BytesMut) -> Flow {
        loop {
            let end = loop {
                if let Some(end) = find(&self.read, b"\r\n") {
                    break end;
                }
                if self.more().await == Flow::Over {
                    return Flow::Over;
                }
            };
            let line = self.read.split_to(end + 2);
            let line = String::from_utf8_lossy(&line[..end]).into_owned();
            let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16);
            let size = size.unwrap_or_else(|_| panic!("the peer sent a broken chunk size: {line:?}"));
            let mut line_end = BytesMut::new();
            if self.read_exactly(size, into).await == Flow::Over
                || self.read_exactly(2, &mut line_end).await == Flow::Over
            {
                return Flow::Over;
            }
            if size == 0 {
                return Flow::Goes;
            }
        }
    }
}

/// A connection that notes its fate in the backend's records.
struct Socket {
    wire: Wire,
    state: Arc<State>,
    number: usize,
    reset: bool,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<Socket>>),
}

impl Socket {
    fn tcp(&self) -> &TcpStream {
        match &self.wire {
            Wire::Plain(stream) => stream,
            Wire::Tls(tls) => tls.get_ref().0.tcp(),
        }
    }

    fn note_closed_by_peer(&self) {
        let seen = &mut self.state.connections.lock()[self.number];
        seen.closed_by_peer.get_or_insert_with(Instant::now);
    }

    /// Waits until the peer has closed or reset, without reading what it sent before.
    async fn closed_by_peer(&self) {
        loop {
            match self.tcp().ready(Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() => tokio::time::sleep(Duration::from_millis(2)).await,
                _ => return self.note_closed_by_peer(),
            }
        }
    }

    async fn discard_unread(&mut self) {
        let mut discarded = [0; 4096];
        while self.tcp().try_read(&mut discarded).is_ok_and(|read| read > 0) {}
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset || self.state.dying.load(SeqCst) {
            let _ = SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO));
        }
        self.state.connections.lock()[self.number].over.get_or_insert_with(Instant::now);
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Wire::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Wire::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// An address whose accept queue is full: a connection to it hangs in its handshake.
pub struct NeverAccepting {
    port: ReservedPort,
    _listener: std::net::TcpListener,
    _fillers: Vec<TcpStream>,
}

impl NeverAccepting {
    pub async fn start() -> Self {
        Self::fill(ReservedPort::new()).await
    }

    /// At an address of the test's choice.
    pub async fn at(address: SocketAddr) -> Self {
        Self::fill(ReservedPort::at(address)).await
    }

    async fn fill(port: ReservedPort) -> Self {
        let listener = port.listen(0);
        let mut fillers = Vec::new();
        // A backlog of n holds n + 1 connections; the kernel may round it up.
        while fillers.len() < 64 {
            let connect = TcpStream::connect(port.addr());
            match tokio::time::timeout(Duration::from_millis(200), connect).await {
                Ok(stream) => fillers.push(stream.unwrap()),
                Err(_) => break,
            }
        }
        Self { port, _listener: listener, _fillers: fillers }
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}
