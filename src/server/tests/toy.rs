//! A server with a toy handler, and a client that reads what really comes.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::clock::Alarms;
use crate::config::{self, ClientClocks, Limits};
use crate::drain::Drain;
use crate::proxy::{Client, HeadDefect};
use crate::server::{Answers, Bounds, Claim, Clients, Context, Listening, accept, bind};
use crate::telemetry::Telemetry;

/// Longer than anything here takes, shorter than a person waits.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Answers by path:
/// `/echo` the body; `/say` "hello"; `/hang` never; `/breaks` four frames, then an error; `/one-frame-breaks`;
/// `/endless` frames without end; `/gated` "begun ", and "ended" once the gate opens; `/panics`; `/panics-later`.
#[derive(Clone, Default)]
pub(super) struct Toy(pub(super) Arc<Seen>);

/// What the toy saw.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) requests: AtomicUsize,
    /// Futures and bodies dropped before they were done.
    pub(super) dropped: AtomicUsize,
    pub(super) frames: AtomicUsize,
    pub(super) gate: Notify,
}

impl Answers for Toy {
    type Body = ToyBody;

    fn answer(
        &self,
        client: &Arc<Client>,
        request: Request<Incoming>,
        defect: Option<HeadDefect>,
    ) -> impl Future<Output = Response<ToyBody>> + Send + use<> {
        let (seen, client) = (Arc::clone(&self.0), Arc::clone(client));
        seen.requests.fetch_add(1, Ordering::SeqCst);
        if request.uri().path() == "/panics-at-once" {
            panic!("at once");
        }
        async move {
            if let Some(defect) = defect {
                let mut answer = Response::new(ToyBody::whole(defect.name()));
                *answer.status_mut() = StatusCode::BAD_REQUEST;
                return answer;
            }
            let unfinished = Unfinished(Arc::clone(&seen));
            let path = request.uri().path().to_owned();
            let body = match path.as_str() {
                "/say" => ToyBody::whole("hello"),
                "/client" => ToyBody::whole(&format!("{} {}", client.tls, client.listener)),
                "/echo" => match request.into_body().collect().await {
                    Ok(body) => ToyBody::whole(&String::from_utf8_lossy(&body.to_bytes())),
                    Err(_broken) => ToyBody::whole("broken request"),
                },
                "/upgrade" => {
                    let mut answer = Response::new(ToyBody::frames(&[]));
                    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                    answer.headers_mut().insert("upgrade", "echo".parse().unwrap());
                    answer.headers_mut().insert("connection", "upgrade".parse().unwrap());
                    tokio::spawn(async move {
                        let upgraded = hyper::upgrade::on(request).await.unwrap();
                        let (mut from, mut to) = tokio::io::split(hyper_util::rt::TokioIo::new(upgraded));
                        let _end = tokio::io::copy(&mut from, &mut to).await;
                    });
                    unfinished.done();
                    return answer;
                }
                "/hang" => std::future::pending().await,
                "/panics" => panic!("on purpose"),
                "/panics-later" => ToyBody::frames(&["one ", "PANIC"]),
                "/breaks" => ToyBody::frames(&["one ", "two ", "three ", "four ", "ERROR"]),
                "/breaks-later" => ToyBody::frames(&["one ", "GATE", "two ", "ERROR"]),
                "/gated" => ToyBody::frames(&["begun ", "GATE", "ended"]),
                "/endless" => ToyBody::frames(&["ENDLESS"]),
                other => ToyBody::whole(other),
            };
            unfinished.done();
            Response::new(body.seen_by(seen))
        }
    }
}

struct Unfinished(Arc<Seen>);

impl Unfinished {
    fn done(self) {
        self.0.dropped.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// A body by script.
pub(super) struct ToyBody {
    script: VecDeque<Bytes>,
    whole: bool,
    seen: Option<Arc<Seen>>,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl ToyBody {
    fn whole(text: &str) -> Self {
        Self { whole: true, ..Self::frames(&[text]) }
    }

    fn frames(script: &[&str]) -> Self {
        let script = script.iter().map(|step| Bytes::copy_from_slice(step.as_bytes())).collect();
        Self { script, whole: false, seen: None, waiting: None }
    }

    fn seen_by(self, seen: Arc<Seen>) -> Self {
        Self { seen: Some(seen), ..self }
    }
}

impl Body for ToyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(waiting) = &mut self.waiting {
            std::task::ready!(waiting.as_mut().poll(cx));
            self.waiting = None;
        }
        let Some(step) = self.script.pop_front() else { return Poll::Ready(None) };
        if let Some(seen) = &self.seen {
            seen.frames.fetch_add(1, Ordering::SeqCst);
        }
        match &step[..] {
            b"ERROR" => Poll::Ready(Some(Err(io::Error::other("broken on purpose")))),
            b"PANIC" => panic!("in a body, on purpose"),
            b"GATE" => {
                let seen = Arc::clone(self.seen.as_ref().expect("set by answer"));
                self.waiting = Some(Box::pin(async move { seen.gate.notified().await }));
                self.poll_frame(cx)
            }
            b"ENDLESS" => {
                self.script.push_back(step);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 16 * 1024])))))
            }
            _ => Poll::Ready(Some(Ok(Frame::data(step)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.whole && self.script.is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self.whole {
            true => http_body::SizeHint::with_exact(self.script.iter().map(|step| step.len() as u64).sum()),
            false => http_body::SizeHint::new(),
        }
    }
}

/// A running server.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) toy: Toy,
    pub(super) context: Arc<Context<Toy>>,
    pub(super) listening: Arc<Listening>,
    pub(super) drain: Drain,
    pub(super) accepting: JoinHandle<io::Result<()>>,
}

pub(super) fn bounds() -> Bounds {
    Bounds { limits: Limits::default(), clocks: ClientClocks::default() }
}

/// A server on a free port.
pub(super) fn start(bounds: Bounds) -> Server {
    start_with(bounds, None)
}

pub(super) fn start_with(bounds: Bounds, tls: Option<config::ListenerTls>) -> Server {
    let mut bound = bind((std::net::Ipv4Addr::LOCALHOST, 0).into(), NonZeroUsize::MIN, Claim::Fresh).unwrap();
    let telemetry = Arc::new(Telemetry::silent());
    let listener = config::Listener { address: bound.address, tls, trusted_proxies: Vec::new() };
    let listening = Listening::new(&listener, &telemetry).unwrap();
    let drain = Drain::new();
    let alarms = Alarms::new();
    tokio::spawn(alarms.clone().run());
    let toy = Toy::default();
    let context = Arc::new(Context {
        handler: toy.clone(),
        clients: Clients::new(bounds),
        alarms,
        draining: drain.watch(),
        telemetry,
    });
    let socket = bound.sockets.remove(0);
    let accepting = tokio::spawn(accept(socket, Arc::clone(&listening), Arc::clone(&context)));
    Server { address: bound.address, toy, context, listening, drain, accepting }
}

impl Server {
    pub(super) async fn connect(&self) -> Peer {
        Peer(TcpStream::connect(self.address).await.unwrap())
    }

    pub(super) fn metrics(&self) -> String {
        self.context.telemetry.metrics.render()
    }
}

/// A client's end of a connection.
pub(super) struct Peer(pub(super) TcpStream);

impl Peer {
    pub(super) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Reads until what came ends with `end`.
    pub(super) async fn until(&mut self, end: &str) -> String {
        let mut got = Vec::new();
        let reading = async {
            while !got.ends_with(end.as_bytes()) {
                match self.0.read_u8().await {
                    Ok(byte) => got.push(byte),
                    Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&got)),
                }
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, reading).await.is_ok();
        let got = String::from_utf8_lossy(&got).into_owned();
        assert!(in_time, "waited for {end:?} after {got:?}");
        got
    }

    /// Reads until the connection ends, and how it did.
    pub(super) async fn rest(&mut self) -> (String, io::Result<()>) {
        let mut got = Vec::new();
        let end = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut got)).await;
        let got = String::from_utf8_lossy(&got).into_owned();
        let end = end.unwrap_or_else(|_late| panic!("still open after {got:?}"));
        (got, end.map(drop))
    }

    /// Sends a `GET` and reads its answer of `body`.
    pub(super) async fn ask(&mut self, path: &str, body: &str) -> String {
        self.send(get(path)).await;
        self.until(body).await
    }
}

pub(super) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: toy\r\n\r\n")
}

/// Waits until `holds`.
pub(super) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "waited in vain until {what}");
}

/// An HTTP/2 client on a connection of its own.
pub(super) async fn h2(
    io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
) -> (hyper::client::conn::http2::SendRequest<String>, JoinHandle<hyper::Result<()>>) {
    let io = hyper_util::rt::TokioIo::new(io);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    (sender, tokio::spawn(connection))
}

pub(super) fn h2_get(path: &str) -> Request<String> {
    Request::get(format!("http://toy{path}")).body(String::new()).unwrap()
}
