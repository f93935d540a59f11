//! HTTP/2 backends with prior knowledge: one that answers by closure, and one that sends frames by
//! hand for what a well-behaved server never does.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;

use super::ReservedPort;
use super::backend::RequestSeen;
use super::reply::Talk;
use super::tls::ServerTls;

/// One thing an HTTP/2 answer does after its head.
#[derive(Clone, Debug, PartialEq)]
pub enum H2Step {
    Data(Bytes),
    Delay(Duration),
    /// Silence until the peer gives up.
    Stall,
    /// RST_STREAM with INTERNAL_ERROR. For other codes see [`H2Raw`].
    Reset,
    /// Ends the stream with these trailers.
    Trailers(Vec<(String, String)>),
}

/// An HTTP/2 answer; it ends cleanly after its last step.
#[derive(Clone, Debug, PartialEq)]
pub struct H2Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub steps: Vec<H2Step>,
}

impl H2Answer {
    pub fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), steps: Vec::new() }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn step(mut self, step: H2Step) -> Self {
        self.steps.push(step);
        self
    }

    pub fn data(self, bytes: impl Into<Bytes>) -> Self {
        self.step(H2Step::Data(bytes.into()))
    }

    /// An event stream, one DATA frame an event.
    pub fn sse<E: AsRef<[u8]>>(events: &[E]) -> Self {
        let head = Self::new(200).header("content-type", "text/event-stream");
        events.iter().fold(head, |answer, event| answer.data(event.as_ref().to_vec()))
    }

    /// A healthy chat stream of `talk`.
    pub fn chat(talk: &Talk) -> Self {
        Self::sse(&talk.chat_events(true))
    }
}

type Answer = dyn Fn(&RequestSeen) -> H2Answer + Send + Sync;

/// An HTTP/2 backend that answers by closure. Ends when dropped, by resetting its connections.
pub struct H2Backend {
    port: ReservedPort,
    requests: Arc<Mutex<Vec<RequestSeen>>>,
    connections: Arc<AtomicUsize>,
    server: JoinHandle<()>,
    secure: bool,
}

impl H2Backend {
    pub async fn start(answer: impl Fn(&RequestSeen) -> H2Answer + Send + Sync + 'static) -> Self {
        Self::run(Arc::new(answer), None)
    }

    /// Over TLS; the certificate's ALPN should offer `h2`.
    pub async fn start_tls(
        answer: impl Fn(&RequestSeen) -> H2Answer + Send + Sync + 'static,
        tls: &ServerTls,
    ) -> Self {
        Self::run(Arc::new(answer), Some(tls.acceptor()))
    }

    fn run(answer: Arc<Answer>, tls: Option<TlsAcceptor>) -> Self {
        let port = ReservedPort::new();
        let listener = TcpListener::from_std(port.listen(1024)).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let secure = tls.is_some();
        let (seen, counted) = (Arc::clone(&requests), Arc::clone(&connections));
        let server = tokio::spawn(async move {
            let mut tasks = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = counted.fetch_add(1, SeqCst);
                tasks.spawn(connection(stream, number, tls.clone(), Arc::clone(&answer), Arc::clone(&seen)));
            }
        });
        Self { port, requests, connections, server, secure }
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn url(&self) -> String {
        format!("{}://{}", if self.secure { "https" } else { "http" }, self.addr())
    }

    /// Every request seen that is no probe.
    pub fn requests(&self) -> Vec<RequestSeen> {
        self.requests.lock().iter().filter(|request| !request.is_probe()).cloned().collect()
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    /// Closes the listener and resets every connection; the port refuses from then on.
    pub async fn stop(&mut self) {
        self.server.abort();
        let _ = (&mut self.server).await;
    }
}

impl Drop for H2Backend {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn connection(
    stream: TcpStream,
    number: usize,
    tls: Option<TlsAcceptor>,
    answer: Arc<Answer>,
    seen: Arc<Mutex<Vec<RequestSeen>>>,
) {
    stream.set_nodelay(true).unwrap();
    // The connection only ends early with the backend, and then like a process that died.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    let index = Arc::new(AtomicUsize::new(0));
    let service = service_fn(move |request| {
        let (answer, seen, index) = (Arc::clone(&answer), Arc::clone(&seen), index.fetch_add(1, SeqCst));
        async move {
            let request = read(request, number, index, &seen).await;
            Ok::<_, Infallible>(respond(answer(&request)))
        }
    });
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    match tls {
        None => drop(server.serve_connection(TokioIo::new(stream), service).await),
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                drop(server.serve_connection(TokioIo::new(stream), service).await);
            }
        }
    }
}

async fn read(
    request: http::Request<Incoming>,
    connection: usize,
    index: usize,
    seen: &Mutex<Vec<RequestSeen>>,
) -> RequestSeen {
    let (head, body) = request.into_parts();
    let at = Instant::now();
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let is_probe = head.method == "GET" && matches!(head.uri.path(), "/health" | "/v1/models");
    let body = body.collect().await;
    let mut seen = seen.lock();
    let nth = seen.iter().filter(|request| !request.is_probe()).count();
    let request = RequestSeen {
        method: head.method.to_string(),
        target,
        headers: head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
        complete: body.is_ok(),
        body: body.map(|body| body.to_bytes()).unwrap_or_default(),
        connection,
        index,
        nth: (!is_probe).then_some(nth),
        at,
    };
    seen.push(request.clone());
    request
}

fn respond(answer: H2Answer) -> http::Response<Steps> {
    let steps = Steps { left: answer.steps.into(), sleep: None, flushed: false };
    let mut response = http::Response::new(steps);
    *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap();
    *response.headers_mut() = headers(&answer.headers);
    response
}

fn headers(pairs: &[(String, String)]) -> HeaderMap {
    let pair = |(name, value): &(String, String)| {
        (HeaderName::try_from(name.as_str()).unwrap(), HeaderValue::from_str(value).unwrap())
    };
    pairs.iter().map(pair).collect()
}

struct Steps {
    left: VecDeque<H2Step>,
    sleep: Option<Pin<Box<Sleep>>>,
    flushed: bool,
}

impl Body for Steps {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        loop {
            if let Some(sleep) = &mut self.sleep {
                ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
            match self.left.front() {
                None => return Poll::Ready(None),
                Some(H2Step::Stall) => return Poll::Pending,
                Some(_) => {}
            }
            match self.left.pop_front() {
                Some(H2Step::Data(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Some(H2Step::Trailers(pairs)) => {
                    return Poll::Ready(Some(Ok(Frame::trailers(headers(&pairs)))));
                }
                Some(H2Step::Delay(time)) => self.sleep = Some(Box::pin(tokio::time::sleep(time))),
                // What was sent before would be dropped by the reset if it were still queued.
                Some(H2Step::Reset) if !self.flushed => {
                    self.flushed = true;
                    self.sleep = Some(Box::pin(tokio::time::sleep(Duration::from_millis(5))));
                    self.left.push_front(H2Step::Reset);
                }
                Some(H2Step::Reset) => return Poll::Ready(Some(Err(io::Error::other("reset by script")))),
                Some(H2Step::Stall) | None => {}
            }
        }
    }

    /// An answer without a step ends with its head.
    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }
}

/// A frame a test sends by hand (RFC 9113 §6).
#[derive(Clone, Debug, PartialEq)]
pub enum RawFrame {
    /// HEADERS with `:status: 200` and nothing else.
    Head {
        end_stream: bool,
    },
    Data {
        bytes: Bytes,
        end_stream: bool,
    },
    /// RST_STREAM, e.g. 7 for REFUSED_STREAM, 8 for CANCEL.
    Reset(u32),
    /// GOAWAY: streams above `last_stream` were not processed.
    GoAway {
        last_stream: u32,
        code: u32,
    },
    /// Any bytes.
    Bytes(Bytes),
    /// The connection ends (FIN).
    Close,
    Delay(Duration),
}

/// An HTTP/2 backend that answers each HEADERS frame with frames of the test's choice. It decodes no
/// headers and obeys no flow control. Ends when dropped.
pub struct H2Raw {
    port: ReservedPort,
    streams: Arc<Mutex<Vec<(usize, u32)>>>,
    server: JoinHandle<()>,
}

impl H2Raw {
    /// `answer` is given the number of the request on this backend (from 0) and its stream.
    pub async fn start(answer: impl Fn(usize, u32) -> Vec<RawFrame> + Send + Sync + 'static) -> Self {
        let port = ReservedPort::new();
        let listener = TcpListener::from_std(port.listen(1024)).unwrap();
        let streams = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&streams);
        let answer: Arc<dyn Fn(usize, u32) -> Vec<RawFrame> + Send + Sync> = Arc::new(answer);
        let server = tokio::spawn(async move {
            let mut tasks = JoinSet::new();
            let mut number = 0;
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                tasks.spawn(async move {
                    // An error is a peer that left.
                    let _ = raw_connection(stream, number, &*answer, &seen).await;
                });
                number += 1;
            }
        });
        Self { port, streams, server }
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// Connection and stream id of each request, in order.
    pub fn streams(&self) -> Vec<(usize, u32)> {
        self.streams.lock().clone()
    }
}

impl Drop for H2Raw {
    fn drop(&mut self) {
        self.server.abort();
    }
}

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;

async fn raw_connection(
    mut stream: TcpStream,
    number: usize,
    answer: &(dyn Fn(usize, u32) -> Vec<RawFrame> + Send + Sync),
    seen: &Mutex<Vec<(usize, u32)>>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    let mut read = BytesMut::new();
    loop {
        while read.len() < 9 || read.len() < 9 + payload_length(&read) {
            if stream.read_buf(&mut read).await? == 0 {
                return Ok(());
            }
        }
        let (length, kind, flags) = (payload_length(&read), read[3], read[4]);
        let id = u32::from_be_bytes([read[5], read[6], read[7], read[8]]) & 0x7fff_ffff;
        read.advance(9);
        let payload = read.split_to(length);
        match kind {
            SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?,
            PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, 0, &payload)).await?,
            HEADERS => {
                let nth = {
                    let mut seen = seen.lock();
                    seen.push((number, id));
                    seen.len() - 1
                };
                for raw in answer(nth, id) {
                    let bytes = match raw {
                        // 0x88 is `:status: 200` in the static table (RFC 7541 appendix A).
                        RawFrame::Head { end_stream } => {
                            frame(HEADERS, 4 | u8::from(end_stream), id, &[0x88])
                        }
                        RawFrame::Data { bytes, end_stream } => frame(0, u8::from(end_stream), id, &bytes),
                        RawFrame::Reset(code) => frame(3, 0, id, &code.to_be_bytes()),
                        RawFrame::GoAway { last_stream, code } => {
                            frame(7, 0, 0, &[last_stream.to_be_bytes(), code.to_be_bytes()].concat())
                        }
                        RawFrame::Bytes(bytes) => bytes.to_vec(),
                        RawFrame::Close => return Ok(()),
                        RawFrame::Delay(time) => {
                            tokio::time::sleep(time).await;
                            continue;
                        }
                    };
                    stream.write_all(&bytes).await?;
                }
            }
            _ => {}
        }
    }
}

fn payload_length(head: &[u8]) -> usize {
    u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize
}

/// A frame on the wire.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}
