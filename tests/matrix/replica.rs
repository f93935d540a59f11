//! A replica that can fall sick in every way of the catalogue, over HTTP/1.1 and over HTTP/2 alike.
//!
//! What it does is a list of `Act`s, the same for both protocols: those that are about an answer are
//! framed as the protocol has it, those that are about the connection (`Raw`, `Fin`, `Kill`, `Dribble`)
//! act on its socket, beneath HTTP. It remembers what it was asked. It judges nothing.

use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;

use crate::api::{self, Endpoint, MODEL, NUMBER, Pace};
use crate::support::ReservedPort;
use crate::support::either::Http;
use crate::support::tls::ServerTls;

/// What was written must be on the wire before the connection or the stream is broken behind it.
const FLUSH: Duration = Duration::from_millis(5);

/// Orders of one connection's answers to the connection that wait at most.
const ORDERS_MAX: usize = 16;

/// One thing a replica does in answer to a request.
#[derive(Clone, Debug)]
pub enum Act {
    /// The request's body is not read; only as the first act.
    Deaf,
    /// Head of the answer. Without a `content-length` HTTP/1.1 frames the body in chunks.
    Head {
        status: u16,
        headers: Vec<(&'static str, String)>,
    },
    /// Head of an answer that ends with it.
    HeadOnly {
        status: u16,
        headers: Vec<(&'static str, String)>,
    },
    Data(Bytes),
    Wait(Duration),
    /// The proper end of the answer.
    End,
    /// The proper end, with trailers. HTTP/2 only.
    Trailers(Vec<(&'static str, String)>),
    /// Nothing more, until the peer leaves.
    Stall,
    /// The answer breaks: FIN without an end in HTTP/1.1, RST_STREAM in HTTP/2.
    Cut,
    /// The connection is closed with FIN.
    Fin,
    /// The connection is reset.
    Kill,
    /// The process dies: listener and all connections; back after so long.
    Die(Duration),
    /// Bytes on the connection that are nobody's framing.
    Raw(Bytes),
    /// From here on the connection sends one byte at a time.
    Dribble(Duration),
    /// HTTP/2: GOAWAY, what runs may finish. HTTP/1.1 says it in its head (`connection: close`) instead.
    GoAway,
}

/// A request, when its head has come.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    /// Its number in the matrix; none for a probe.
    pub number: Option<usize>,
    /// Which request of its connection, from 0.
    pub index: usize,
    /// Nothing else was running on its connection.
    pub alone: bool,
    /// Which of the numbered requests since the conduct was set, from 0.
    pub nth: usize,
    /// The replica's own number.
    pub replica: usize,
}

/// Where a request came.
#[derive(Clone, Copy, Debug)]
struct Place {
    connection: usize,
    index: usize,
    alone: bool,
}

/// What a replica remembers of a request.
#[derive(Clone, Debug)]
pub struct Seen {
    pub number: Option<usize>,
    pub connection: usize,
    pub index: usize,
    pub at: Instant,
    /// When the first of the answer's body went out.
    pub said: Option<Instant>,
    pub end: Option<(End, Instant)>,
}

/// How a request ended for its replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Answered as a healthy replica would.
    Served,
    /// The replica did what its sickness is.
    Spoilt,
    /// The peer left it unfinished.
    Left,
}

impl Seen {
    pub fn ended(&self, end: End) -> Option<Instant> {
        self.end.filter(|(given, _)| *given == end).map(|(_, at)| at)
    }
}

/// What to do with a request; none: what a healthy replica does.
pub type Conduct = Arc<dyn Fn(&Asked) -> Option<Vec<Act>> + Send + Sync>;

/// A running replica. Ends when dropped.
pub struct Replica {
    port: ReservedPort,
    state: Arc<State>,
}

struct State {
    number: usize,
    http: Http,
    address: SocketAddr,
    tls: Mutex<Option<TlsAcceptor>>,
    conduct: Mutex<Conduct>,
    numbered: AtomicUsize,
    pace: Mutex<Pace>,
    /// What a connection does before anything else, and instead of it.
    greeting: Mutex<Option<Vec<Act>>>,
    seen: Mutex<Vec<Seen>>,
    opened: AtomicUsize,
    frozen: watch::Sender<bool>,
    held: watch::Sender<bool>,
    dying: AtomicBool,
    listener: Mutex<Option<JoinHandle<()>>>,
    connections: Mutex<JoinSet<()>>,
}

impl Replica {
    pub async fn start(number: usize, http: Http, tls: Option<&ServerTls>) -> Self {
        let port = ReservedPort::new();
        let state = Arc::new(State {
            number,
            http,
            address: port.addr(),
            tls: Mutex::new(tls.map(ServerTls::acceptor)),
            conduct: Mutex::new(healthy()),
            numbered: AtomicUsize::new(0),
            pace: Mutex::new(Pace::USUAL),
            greeting: Mutex::new(None),
            seen: Mutex::default(),
            opened: AtomicUsize::new(0),
            frozen: watch::Sender::new(false),
            held: watch::Sender::new(false),
            dying: AtomicBool::new(false),
            listener: Mutex::new(None),
            connections: Mutex::default(),
        });
        state.listen();
        Self { port, state }
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn url(&self) -> String {
        let scheme = if self.state.tls.lock().is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.addr())
    }

    /// From now on it answers so.
    pub fn conduct(&self, conduct: Conduct) {
        self.state.numbered.store(0, SeqCst);
        *self.state.conduct.lock() = conduct;
    }

    pub fn pace(&self, pace: Pace) {
        *self.state.pace.lock() = pace;
    }

    /// Every new connection does this and nothing else; no TLS handshake is made.
    pub fn greet(&self, acts: Option<Vec<Act>>) {
        *self.state.greeting.lock() = acts;
    }

    /// New connections are shown this certificate.
    pub fn show(&self, tls: &ServerTls) {
        *self.state.tls.lock() = Some(tls.acceptor());
    }

    /// Like SIGSTOP: the kernel accepts connections, nothing else happens.
    pub fn freeze(&self) {
        self.state.frozen.send_replace(true);
    }

    /// Like SIGCONT.
    pub fn thaw(&self) {
        self.state.frozen.send_replace(false);
    }

    /// Like a long prefill that stops all decoding: no answer goes on, probes are answered.
    pub fn hold(&self, held: bool) {
        self.state.held.send_replace(held);
    }

    /// Death of the process: connections are reset, further ones refused.
    pub async fn die(&self) {
        self.state.die().await;
    }

    /// All connections are reset, new ones are taken.
    pub async fn drop_connections(&self) {
        self.state.drop_connections().await;
    }

    /// Further connections are refused.
    pub async fn close_listener(&self) {
        self.state.close_listener().await;
    }

    pub fn listen(&self) {
        self.state.listen();
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().clone()
    }

    /// Whether it has answered a numbered request well since `since`.
    pub fn has_served_since(&self, since: Instant) -> bool {
        self.state
            .seen
            .lock()
            .iter()
            .any(|seen| seen.number.is_some() && seen.at > since && seen.ended(End::Served).is_some())
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.state.dying.store(true, SeqCst);
        if let Some(listener) = self.state.listener.lock().take() {
            listener.abort();
        }
        self.state.connections.lock().abort_all();
    }
}

/// The conduct of a healthy replica.
pub fn healthy() -> Conduct {
    Arc::new(|_| None)
}

/// What a healthy replica answers to a probe.
pub fn probed(path: &str) -> Vec<Act> {
    let json = || vec![("content-type", "application/json".to_owned())];
    match path {
        "/health" => api::sized(200, json(), r#"{"status":"ok"}"#),
        "/v1/models" => models(&[MODEL]),
        _ => api::sized(404, json(), r#"{"detail":"Not Found"}"#),
    }
}

/// The list of these models.
pub fn models(names: &[&str]) -> Vec<Act> {
    let data: Vec<String> =
        names.iter().map(|name| format!(r#"{{"id":"{name}","object":"model"}}"#)).collect();
    let list = format!(r#"{{"object":"list","data":[{}]}}"#, data.join(","));
    api::sized(200, vec![("content-type", "application/json".to_owned())], &list)
}

impl State {
    fn listen(self: &Arc<Self>) {
        let mut listener = self.listener.lock();
        if listener.is_some() {
            return;
        }
        // The port stays bound while nobody listens at it, so that it stays ours.
        let socket = ReservedPort::at(self.address).listen(1024);
        let socket = TcpListener::from_std(socket).unwrap();
        let state = Arc::clone(self);
        *listener = Some(tokio::spawn(async move {
            loop {
                state.thawed().await;
                let Ok((stream, _)) = socket.accept().await else { continue };
                let mut connections = state.connections.lock();
                while connections.try_join_next().is_some() {}
                connections.spawn(connection(Arc::clone(&state), stream));
            }
        }));
    }

    async fn close_listener(&self) {
        let listener = self.listener.lock().take();
        if let Some(listener) = listener {
            listener.abort();
            let _ = listener.await;
        }
    }

    async fn drop_connections(&self) {
        self.dying.store(true, SeqCst);
        let mut connections = std::mem::take(&mut *self.connections.lock());
        connections.shutdown().await;
        self.dying.store(false, SeqCst);
    }

    async fn die(&self) {
        self.close_listener().await;
        self.drop_connections().await;
    }

    async fn thawed(&self) {
        let _ = self.frozen.subscribe().wait_for(|frozen| !frozen).await;
    }

    /// Writes a request down and says what to do with it; none: be healthy.
    fn asked(&self, path: &str, number: Option<usize>, place: Place) -> (usize, Option<Vec<Act>>) {
        let Place { connection, index, alone } = place;
        let at = Instant::now();
        let nth = if number.is_some() { self.numbered.fetch_add(1, SeqCst) } else { 0 };
        let conduct = Arc::clone(&self.conduct.lock());
        let asked = Asked { path: path.to_owned(), number, index, alone, nth, replica: self.number };
        let mut seen = self.seen.lock();
        seen.push(Seen { number, connection, index, at, said: None, end: None });
        let entry = seen.len() - 1;
        drop(seen);
        (entry, conduct(&asked))
    }

    /// The acts of a healthy replica.
    fn healthy(&self, path: &str, body: &[u8]) -> Vec<Act> {
        match (Endpoint::of(path, body), api::number_in(body)) {
            (Some(endpoint), Some(number)) => endpoint.healthy(number, self.number, *self.pace.lock()),
            _ => probed(path),
        }
    }
}

/// Writes down what becomes of a request: without a word the peer left it.
struct Note {
    state: Arc<State>,
    entry: usize,
    /// Decoding may be held up (`Replica::hold`); probes are not decoded.
    decodes: bool,
    end: End,
}

impl Note {
    fn new(state: &Arc<State>, entry: usize, number: Option<usize>) -> Self {
        Self { state: Arc::clone(state), entry, decodes: number.is_some(), end: End::Left }
    }

    /// Before an act.
    async fn before(&self, act: &Act) {
        if self.decodes {
            let _ = self.state.held.subscribe().wait_for(|held| !held).await;
        }
        if matches!(act, Act::Data(_)) {
            self.state.seen.lock()[self.entry].said.get_or_insert_with(Instant::now);
        }
    }

    /// After the act that ended the connection or the stream.
    fn over(&mut self, ours: bool) {
        if ours {
            self.end = End::Spoilt;
        }
    }

    /// After the last act.
    fn done(&mut self, well: bool) {
        self.end = if well { End::Served } else { End::Spoilt };
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.state.seen.lock()[self.entry].end = Some((self.end, Instant::now()));
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Io for S {}

async fn connection(state: Arc<State>, stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let number = state.opened.fetch_add(1, SeqCst);
    let wire = Wire {
        tcp: Arc::new(stream),
        broken: Arc::default(),
        closing: Arc::default(),
        dribble: Arc::default(),
    };
    let line = Line { wire: wire.clone(), state: Arc::clone(&state), thaw: None, pause: None };
    let greeting = state.greeting.lock().clone();
    if let Some(acts) = greeting {
        let mut speaker =
            One { io: Box::new(line), wire, state, number, read: BytesMut::new(), chunked: false };
        for act in acts {
            if speaker.act(act).await == Flow::Over {
                return;
            }
        }
        return;
    }
    let acceptor = state.tls.lock().clone();
    let io: Box<dyn Io> = match acceptor {
        None => Box::new(line),
        Some(acceptor) => match acceptor.accept(line).await {
            Ok(stream) => Box::new(stream),
            Err(_) => return,
        },
    };
    match state.http {
        Http::One => One { io, wire, state, number, read: BytesMut::new(), chunked: false }.serve().await,
        Http::Two => two(io, wire, state, number).await,
    }
}

/// A connection's socket, to be reached past whatever speaks on it.
#[derive(Clone)]
struct Wire {
    tcp: Arc<TcpStream>,
    /// It is to be reset when it ends.
    broken: Arc<AtomicBool>,
    /// Its end is decided: no further stream begins on it.
    closing: Arc<AtomicBool>,
    dribble: Arc<Mutex<Option<Duration>>>,
}

impl Wire {
    async fn raw(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.tcp.writable().await.is_ok() {
            match self.tcp.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }

    fn fin(&self) {
        // Unread bytes would turn the FIN into an RST.
        let mut unread = [0; 4096];
        while self.tcp.try_read(&mut unread).is_ok_and(|read| read > 0) {}
        let _ = SockRef::from(&*self.tcp).shutdown(Shutdown::Write);
    }

    fn kill(&self) {
        self.broken.store(true, SeqCst);
    }

    /// Waits until the peer has closed or reset, without reading what it sent before.
    async fn closed_by_peer(&self) {
        while let Ok(ready) = self.tcp.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// A connection's bytes, as far as the replica is not frozen.
struct Line {
    wire: Wire,
    state: Arc<State>,
    thaw: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Line {
    fn poll_thawed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.thaw.is_none() && *self.state.frozen.borrow() {
            let state = Arc::clone(&self.state);
            self.thaw = Some(Box::pin(async move { state.thawed().await }));
        }
        if let Some(thaw) = &mut self.thaw {
            ready!(thaw.as_mut().poll(cx));
            self.thaw = None;
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let line = self.get_mut();
        ready!(line.poll_thawed(cx));
        loop {
            ready!(line.wire.tcp.poll_read_ready(cx))?;
            match line.wire.tcp.try_read(buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Line {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let line = self.get_mut();
        ready!(line.poll_thawed(cx));
        let dribble = *line.wire.dribble.lock();
        if let Some(pause) = &mut line.pause {
            ready!(pause.as_mut().poll(cx));
            line.pause = None;
        }
        let most = if dribble.is_some() { bytes.len().min(1) } else { bytes.len() };
        loop {
            ready!(line.wire.tcp.poll_write_ready(cx))?;
            match line.wire.tcp.try_write(&bytes[..most]) {
                Ok(written) => {
                    line.pause = dribble.map(|every| Box::pin(tokio::time::sleep(every)));
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = SockRef::from(&*self.wire.tcp).shutdown(Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.wire.broken.load(SeqCst) || self.state.dying.load(SeqCst) {
            let _ = SockRef::from(&*self.wire.tcp).set_linger(Some(Duration::ZERO));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Goes,
    Over,
}

/// A connection that speaks HTTP/1.1.
struct One {
    io: Box<dyn Io>,
    wire: Wire,
    state: Arc<State>,
    number: usize,
    read: BytesMut,
    /// The body of the answer under way is framed in chunks.
    chunked: bool,
}

impl One {
    async fn serve(mut self) {
        for index in 0.. {
            let Some(head) = self.read_head().await else { return };
            let mut lines = head.split("\r\n");
            let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
            let fields: Vec<(String, &str)> = lines
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
                .collect();
            let field = |name: &str| fields.iter().find(|(given, _)| given == name).map(|(_, value)| *value);
            let number = field(NUMBER).and_then(|number| number.parse().ok());
            let length = field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
            let (entry, acts) =
                self.state.asked(&path, number, Place { connection: self.number, index, alone: true });
            let mut note = Note::new(&self.state, entry, number);
            let mut body = Bytes::new();
            if !matches!(acts.as_deref(), Some([Act::Deaf, ..])) {
                let Some(read) = self.read_exactly(length).await else { return };
                body = read;
            }
            let well = acts.is_none();
            let acts = acts.unwrap_or_else(|| self.state.healthy(&path, &body));
            for act in acts {
                let ours = matches!(act, Act::Cut | Act::Fin | Act::Kill | Act::Die(_));
                note.before(&act).await;
                if self.act(act).await == Flow::Over {
                    note.over(ours);
                    return;
                }
            }
            note.done(well);
        }
    }

    async fn act(&mut self, act: Act) -> Flow {
        match act {
            Act::Deaf | Act::GoAway => Flow::Goes,
            Act::Head { status, headers } => {
                self.chunked = !headers.iter().any(|(name, _)| *name == "content-length");
                let framing: &[(&str, String)] =
                    if self.chunked { &[("transfer-encoding", "chunked".to_owned())] } else { &[] };
                self.write_head(status, headers.iter().chain(framing)).await
            }
            Act::HeadOnly { status, headers } => {
                self.chunked = false;
                self.write_head(status, headers.iter().chain(&[("content-length", "0".to_owned())])).await
            }
            Act::Data(bytes) if self.chunked => {
                let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
                chunk.extend_from_slice(&bytes);
                chunk.extend_from_slice(b"\r\n");
                self.write(&chunk).await
            }
            Act::Data(bytes) => self.write(&bytes).await,
            Act::Wait(time) => {
                let left = tokio::time::timeout(time, self.wire.closed_by_peer()).await;
                if left.is_ok() { Flow::Over } else { Flow::Goes }
            }
            Act::End if self.chunked => self.write(b"0\r\n\r\n").await,
            Act::End => Flow::Goes,
            Act::Trailers(_) => panic!("trailers are for HTTP/2"),
            Act::Stall => {
                self.wire.closed_by_peer().await;
                Flow::Over
            }
            Act::Cut | Act::Fin => {
                self.wire.fin();
                Flow::Over
            }
            Act::Kill => {
                self.wire.kill();
                Flow::Over
            }
            Act::Die(back_after) => {
                die(&self.state, back_after);
                Flow::Over
            }
            Act::Raw(bytes) => self.write(&bytes).await,
            Act::Dribble(every) => {
                *self.wire.dribble.lock() = Some(every);
                Flow::Goes
            }
        }
    }

    async fn write_head<'a>(
        &mut self,
        status: u16,
        headers: impl Iterator<Item = &'a (&'static str, String)>,
    ) -> Flow {
        let headers: Vec<(&str, &str)> = headers.map(|(name, value)| (*name, value.as_str())).collect();
        let head = crate::support::reply::head(status, &headers);
        self.write(&head).await
    }

    async fn write(&mut self, bytes: &[u8]) -> Flow {
        let written = async {
            self.io.write_all(bytes).await?;
            self.io.flush().await
        };
        if written.await.is_ok() { Flow::Goes } else { Flow::Over }
    }

    async fn read_head(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = self.read.split_to(end + 4);
                return Some(String::from_utf8_lossy(&head[..end]).into_owned());
            }
            self.fill().await?;
        }
    }

    async fn read_exactly(&mut self, length: usize) -> Option<Bytes> {
        while self.read.len() < length {
            self.fill().await?;
        }
        Some(self.read.split_to(length).freeze())
    }

    async fn fill(&mut self) -> Option<()> {
        self.io.read_buf(&mut self.read).await.ok().filter(|read| *read > 0).map(|_| ())
    }
}

/// Whoever dies must not wait for its own end.
fn die(state: &Arc<State>, back_after: Duration) {
    let state = Arc::clone(state);
    tokio::spawn(async move {
        state.die().await;
        tokio::time::sleep(back_after).await;
        state.listen();
    });
}

/// What an answer wants of its HTTP/2 connection.
#[derive(Clone, Copy, Debug)]
enum Order {
    GoAway,
    Close,
}

/// A connection that speaks HTTP/2 with prior knowledge.
async fn two(io: Box<dyn Io>, wire: Wire, state: Arc<State>, number: usize) {
    let (orders, mut ordered) = mpsc::channel(ORDERS_MAX);
    let builder = h2::server::Builder::new();
    let Ok(mut connection) = builder.handshake::<_, Bytes>(io).await else { return };
    let mut answers = JoinSet::new();
    let mut index = 0;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let stream = Two {
                        respond,
                        body: None,
                        wire: wire.clone(),
                        state: Arc::clone(&state),
                        orders: orders.clone(),
                    };
                    while answers.try_join_next().is_some() {}
                    let place = Place { connection: number, index, alone: answers.is_empty() };
                    answers.spawn(stream.answer(request, place));
                    index += 1;
                }
                _ => return,
            },
            Some(order) = ordered.recv() => match order {
                Order::GoAway => connection.graceful_shutdown(),
                Order::Close => return,
            },
            Some(_) = answers.join_next(), if !answers.is_empty() => {}
        }
    }
}

/// One stream of an HTTP/2 connection.
struct Two {
    respond: SendResponse<Bytes>,
    body: Option<SendStream<Bytes>>,
    wire: Wire,
    state: Arc<State>,
    orders: mpsc::Sender<Order>,
}

impl Two {
    async fn answer(mut self, request: http::Request<RecvStream>, place: Place) {
        let path = request.uri().path().to_owned();
        let number = request.headers().get(NUMBER).and_then(|number| number.to_str().ok()?.parse().ok());
        let (entry, mut acts) = self.state.asked(&path, number, place);
        if self.wire.closing.load(SeqCst) {
            acts = Some(vec![Act::Stall]);
        } else if acts.iter().flatten().any(|act| matches!(act, Act::Fin | Act::Kill)) {
            self.wire.closing.store(true, SeqCst);
        }
        let mut note = Note::new(&self.state, entry, number);
        let mut incoming = request.into_body();
        let mut body = BytesMut::new();
        if !matches!(acts.as_deref(), Some([Act::Deaf, ..])) {
            while let Some(data) = incoming.data().await {
                let Ok(data) = data else { return };
                body.extend_from_slice(&data);
                let _ = incoming.flow_control().release_capacity(data.len());
            }
        }
        let well = acts.is_none();
        for act in acts.unwrap_or_else(|| self.state.healthy(&path, &body)) {
            let ours = matches!(act, Act::Cut | Act::Fin | Act::Kill | Act::Die(_));
            note.before(&act).await;
            if self.act(act).await == Flow::Over {
                note.over(ours);
                return;
            }
        }
        note.done(well);
        // The stream's end is on its way when the peer has let go of it, or the connection ends.
        drop(incoming);
    }

    async fn act(&mut self, act: Act) -> Flow {
        match act {
            Act::Deaf => Flow::Goes,
            Act::Head { status, headers } => self.head(status, &headers, false),
            Act::HeadOnly { status, headers } => self.head(status, &headers, true),
            Act::Data(bytes) => self.send(|body| body.send_data(bytes, false)),
            Act::Wait(time) => {
                let left = tokio::time::timeout(time, self.reset_by_peer()).await;
                if left.is_ok() { Flow::Over } else { Flow::Goes }
            }
            Act::End => self.send(|body| body.send_data(Bytes::new(), true)),
            Act::Trailers(trailers) => self.send(|body| body.send_trailers(fields(&trailers))),
            Act::Stall => {
                self.reset_by_peer().await;
                Flow::Over
            }
            Act::Cut => {
                tokio::time::sleep(FLUSH).await;
                match &mut self.body {
                    Some(body) => body.send_reset(Reason::INTERNAL_ERROR),
                    None => self.respond.send_reset(Reason::INTERNAL_ERROR),
                }
                Flow::Over
            }
            Act::Fin => {
                tokio::time::sleep(FLUSH).await;
                self.wire.fin();
                self.order(Order::Close).await
            }
            Act::Kill => {
                tokio::time::sleep(FLUSH).await;
                self.wire.kill();
                self.order(Order::Close).await
            }
            Act::Die(back_after) => {
                die(&self.state, back_after);
                Flow::Over
            }
            Act::Raw(bytes) => {
                tokio::time::sleep(FLUSH).await;
                self.wire.raw(&bytes).await;
                Flow::Goes
            }
            Act::Dribble(every) => {
                *self.wire.dribble.lock() = Some(every);
                Flow::Goes
            }
            Act::GoAway => {
                let _ = self.order(Order::GoAway).await;
                Flow::Goes
            }
        }
    }

    fn head(&mut self, status: u16, headers: &[(&'static str, String)], ends: bool) -> Flow {
        let mut head = http::Response::new(());
        *head.status_mut() = http::StatusCode::from_u16(status).unwrap();
        *head.headers_mut() = fields(headers);
        head.headers_mut().remove("connection");
        match self.respond.send_response(head, ends) {
            Ok(body) => {
                self.body = Some(body);
                Flow::Goes
            }
            Err(_) => Flow::Over,
        }
    }

    fn send(&mut self, send: impl FnOnce(&mut SendStream<Bytes>) -> Result<(), h2::Error>) -> Flow {
        let body = self.body.as_mut().expect("a body comes behind its head");
        if send(body).is_ok() { Flow::Goes } else { Flow::Over }
    }

    async fn order(&self, order: Order) -> Flow {
        let _ = self.orders.send(order).await;
        Flow::Over
    }

    async fn reset_by_peer(&mut self) {
        let respond = &mut self.respond;
        match &mut self.body {
            Some(body) => drop(poll_fn(|cx| body.poll_reset(cx)).await),
            None => drop(pin!(poll_fn(|cx| respond.poll_reset(cx))).await),
        }
    }
}

fn fields(pairs: &[(&'static str, String)]) -> HeaderMap {
    let pair = |(name, value): &(&'static str, String)| {
        (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
    };
    pairs.iter().map(pair).collect()
}
