//! Clients that see what really came: a raw HTTP/1.1 client and an HTTP/2 one, with one [`Answer`].
//!
//! The HTTP/1.1 client writes any bytes and keeps every byte it read. It tells a body that ended
//! from one that was cut; it repairs nothing.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;

use super::{PATIENCE, within};

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As HTTP says it should.
    Clean,
    /// The connection was closed or reset inside the answer, or the framing broke.
    Cut,
    /// HTTP/2: the stream was reset with this error code.
    Reset(u32),
}

/// A response with everything about how it came.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Statuses of the 1xx heads before it.
    pub informational: Vec<u16>,
    /// In their order; names as spelt (HTTP/1.1) or in lower case (HTTP/2).
    pub headers: Vec<(String, String)>,
    /// With chunking removed.
    pub body: Vec<u8>,
    /// All bytes of the answer as they came (HTTP/1.1 only).
    pub raw: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    pub end: End,
    /// From the sending of the request to the first byte of the final head.
    pub first_byte: Duration,
    /// From the sending of the request to the end.
    pub elapsed: Duration,
    /// When how much of the body had come, by each read that brought some.
    pub arrivals: Vec<(Duration, usize)>,
}

impl Answer {
    /// The first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(given, _)| given.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; panics when it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        match serde_json::from_slice(&self.body) {
            Ok(json) => json,
            Err(error) => panic!("{error} in an answer {}: {:?}", self.status, self.text()),
        }
    }

    /// The longest time between two arrivals of body bytes.
    pub fn longest_gap(&self) -> Duration {
        self.arrivals.windows(2).map(|pair| pair[1].0 - pair[0].0).max().unwrap_or_default()
    }

    pub fn events(&self) -> Vec<Event> {
        events(&self.body)
    }
}

/// A request to be sent by either client.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Request {
    pub fn new(method: &str, target: &str) -> Self {
        Self { method: method.to_owned(), target: target.to_owned(), headers: Vec::new(), body: Bytes::new() }
    }

    pub fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    pub fn post_json(target: &str, body: &Value) -> Self {
        Self::new("POST", target).header("content-type", "application/json").body(body.to_string())
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// On the wire: `Host` and `Content-Length` are added unless given.
    pub fn to_bytes(&self) -> Vec<u8> {
        let has = |name: &str| self.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        if !has("host") {
            head += "host: evergate.test\r\n";
        }
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let is_sized = has("content-length") || has("transfer-encoding");
        if !is_sized && (!self.body.is_empty() || self.method == "POST") {
            head += &format!("content-length: {}\r\n", self.body.len());
        }
        let mut bytes = (head + "\r\n").into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A chat with one question, for `test-model`.
pub fn chat_request(stream: bool) -> Request {
    chat_request_for("test-model", "What is a load balancer?", stream)
}

/// A chat with one question; streams ask for usage.
pub fn chat_request_for(model: &str, question: &str, stream: bool) -> Request {
    let mut body =
        json!({"model": model, "messages": [{"role": "user", "content": question}], "stream": stream});
    if stream {
        body["stream_options"] = json!({"include_usage": true});
    }
    Request::post_json("/v1/chat/completions", &body)
}

/// One request on a connection of its own. Panics when that fails before a head came.
pub async fn send(address: SocketAddr, request: &Request) -> Answer {
    let mut client = Client::connect(address).await;
    client.send(request).await
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A raw HTTP/1.1 connection.
pub struct Client {
    stream: Pin<Box<dyn Stream>>,
    read: BytesMut,
    sent: Instant,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }

    /// A TLS connection to `localhost` at `address`.
    pub async fn connect_tls(address: SocketAddr, config: Arc<rustls::ClientConfig>) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        let name = "localhost".try_into().map_err(io::Error::other)?;
        Ok(Self::over(TlsConnector::from(config).connect(name, stream).await?))
    }

    fn over(stream: impl Stream + 'static) -> Self {
        Self { stream: Box::pin(stream), read: BytesMut::new(), sent: Instant::now() }
    }

    /// Writes any bytes; times of the next answer count from here.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sent = Instant::now();
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Ends the sending side.
    pub async fn finish_sending(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    pub async fn send(&mut self, request: &Request) -> Answer {
        // A peer may answer and close before it has read everything.
        let _ = self.write(&request.to_bytes()).await;
        let answer = self.try_read_answer(&request.method);
        within(PATIENCE * 6, answer).await.unwrap_or_else(|error| panic!("no answer: {error}"))
    }

    /// The answer to a request of `method` that was written before. Fails when no head came.
    pub async fn try_read_answer(&mut self, method: &str) -> io::Result<Answer> {
        let mut raw = Vec::new();
        let mut informational = Vec::new();
        let (status, headers, first_byte) = loop {
            let (status, headers, first_byte) = self.read_head(&mut raw).await?;
            if status >= 200 || status == 101 {
                break (status, headers, first_byte);
            }
            informational.push(status);
        };
        let mut answer = Answer {
            status,
            informational,
            headers,
            body: Vec::new(),
            raw,
            trailers: Vec::new(),
            end: End::Clean,
            first_byte,
            elapsed: Duration::ZERO,
            arrivals: Vec::new(),
        };
        let whole = self.read_body(method, &mut answer).await;
        answer.end = if whole { End::Clean } else { End::Cut };
        answer.elapsed = self.sent.elapsed();
        Ok(answer)
    }

    /// Reads a head and then the body up to `bytes` of it, and leaves the rest unread.
    pub async fn read_some(&mut self, bytes: usize) -> Vec<u8> {
        let mut raw = Vec::new();
        self.read_head(&mut raw).await.unwrap();
        while self.read.len() < bytes && within(PATIENCE, self.fill()).await.unwrap() > 0 {}
        self.read.to_vec()
    }

    /// Reads what comes next, whatever it is, and forgets it; 0 is the end.
    pub async fn read_more(&mut self) -> io::Result<usize> {
        if self.read.is_empty() {
            self.fill().await?;
        }
        let read = self.read.len();
        self.read.clear();
        Ok(read)
    }

    /// The next `count` bytes, whatever they are: for a connection that was switched to another protocol.
    pub async fn read_bytes(&mut self, count: usize) -> Vec<u8> {
        while self.read.len() < count {
            let read = within(PATIENCE, self.fill()).await.unwrap();
            assert!(read > 0, "closed after {:?}", self.read);
        }
        self.read.split_to(count).to_vec()
    }

    /// As a socket's `read`: some bytes, the end, or the error.
    pub async fn read_raw(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.read.is_empty() {
            self.fill().await?;
        }
        let some = self.read.len().min(into.len());
        self.read.copy_to_slice(&mut into[..some]);
        Ok(some)
    }

    /// Whether the peer closes the connection within `timeout` without sending anything more.
    pub async fn is_closed_within(&mut self, timeout: Duration) -> bool {
        let read = tokio::time::timeout(timeout, self.fill()).await;
        read.is_ok_and(|read| matches!(read, Ok(0) | Err(_)))
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.stream.read_buf(&mut self.read).await
    }

    async fn read_head(&mut self, raw: &mut Vec<u8>) -> io::Result<(u16, Vec<(String, String)>, Duration)> {
        let mut first_byte = (!self.read.is_empty()).then(|| self.sent.elapsed());
        let end = loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                break end;
            }
            if self.fill().await? == 0 {
                return Err(io::Error::other(format!("closed inside the head: {:?}", self.read)));
            }
            first_byte.get_or_insert_with(|| self.sent.elapsed());
        };
        let head = self.read.split_to(end + 4);
        raw.extend_from_slice(&head);
        let head = String::from_utf8_lossy(&head[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let first = lines.next().unwrap_or_default();
        let status = first.strip_prefix("HTTP/1.1 ").or(first.strip_prefix("HTTP/1.0 "));
        let status = status.and_then(|rest| rest.get(..3)).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no status line: {first:?}")))?;
        Ok((status, header_lines(lines), first_byte.unwrap_or_default()))
    }

    /// Whether the body came whole.
    async fn read_body(&mut self, method: &str, answer: &mut Answer) -> bool {
        if method == "HEAD" || matches!(answer.status, 101 | 204 | 304) {
            return true;
        }
        if answer.header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
            return self.read_chunks(answer).await;
        }
        if let Some(length) = answer.header("content-length") {
            let length = length.parse().unwrap_or_else(|_| panic!("bad content-length {length:?}"));
            return self.take(length, answer).await;
        }
        loop {
            let some = self.read.len();
            self.take(some, answer).await;
            match self.fill().await {
                Ok(0) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// Moves `length` bytes of body into the answer.
    async fn take(&mut self, length: usize, answer: &mut Answer) -> bool {
        let mut left = length;
        loop {
            let take = self.read.len().min(left);
            if take > 0 {
                answer.body.extend_from_slice(&self.read[..take]);
                answer.raw.extend_from_slice(&self.read[..take]);
                answer.arrivals.push((self.sent.elapsed(), answer.body.len()));
                self.read.advance(take);
                left -= take;
            }
            if left == 0 {
                return true;
            }
            if !self.fill().await.is_ok_and(|read| read > 0) {
                return false;
            }
        }
    }

    async fn line(&mut self, answer: &mut Answer) -> Option<String> {
        loop {
            if let Some(end) = find(&self.read, b"\r\n") {
                let line = self.read.split_to(end + 2);
                answer.raw.extend_from_slice(&line);
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if !self.fill().await.is_ok_and(|read| read > 0) {
                answer.raw.extend_from_slice(&self.read);
                return None;
            }
        }
    }

    async fn read_chunks(&mut self, answer: &mut Answer) -> bool {
        loop {
            let Some(line) = self.line(answer).await else { return false };
            let size = line.split(';').next().unwrap_or_default().trim();
            let Ok(size) = usize::from_str_radix(size, 16) else { return false };
            if size == 0 {
                let mut trailers = Vec::new();
                loop {
                    match self.line(answer).await {
                        None => return false,
                        Some(line) if line.is_empty() => break,
                        Some(line) => trailers.push(line),
                    }
                }
                answer.trailers = header_lines(trailers.iter().map(String::as_str));
                return true;
            }
            if !self.take(size, answer).await || self.line(answer).await.is_none_or(|end| !end.is_empty()) {
                return false;
            }
        }
    }
}

/// An HTTP/2 connection with prior knowledge; several requests may run on it at once.
#[derive(Clone)]
pub struct H2Client {
    sender: SendRequest<BoxBody<Bytes, Infallible>>,
}

impl H2Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream).await
    }

    /// A TLS connection to `localhost` at `address`, whose ALPN must have chosen `h2`.
    pub async fn connect_tls(address: SocketAddr, config: Arc<rustls::ClientConfig>) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        let name = "localhost".try_into().map_err(io::Error::other)?;
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        Ok(Self::over(stream).await)
    }

    async fn over(stream: impl Stream + 'static) -> Self {
        let io = TokioIo::new(stream);
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        Self { sender }
    }

    /// Whether the connection has ended; a GOAWAY ends it after its last stream.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Begins a request whose body the test sends frame by frame; resolves with the head of the answer.
    pub fn open(
        &self,
        request: &Request,
    ) -> (mpsc::Sender<Frame<Bytes>>, impl Future<Output = hyper::Result<http::Response<Incoming>>> + use<>)
    {
        let (frames, body) = mpsc::channel(16);
        let outgoing = outgoing(request, Frames(body).boxed());
        let mut sender = self.sender.clone();
        (frames, async move {
            sender.ready().await?;
            sender.send_request(outgoing).await
        })
    }

    /// Panics when no head came: see [`try_send`](Self::try_send).
    pub async fn send(&self, request: &Request) -> Answer {
        let answer = within(PATIENCE * 6, self.try_send(request)).await;
        answer.unwrap_or_else(|end| panic!("no head came: {end:?}"))
    }

    /// Waits for the head and leaves the body alone.
    pub async fn begin(&self, request: &Request) -> Incoming {
        let mut sender = self.sender.clone();
        sender.ready().await.unwrap();
        let outgoing = outgoing(request, Full::new(request.body.clone()).boxed());
        sender.send_request(outgoing).await.unwrap().into_body()
    }

    /// The answer, or how the stream ended without a head.
    pub async fn try_send(&self, request: &Request) -> Result<Answer, End> {
        let mut sender = self.sender.clone();
        let outgoing = outgoing(request, Full::new(request.body.clone()).boxed());
        let sent = Instant::now();
        sender.ready().await.map_err(|error| end_of(&error))?;
        let response = sender.send_request(outgoing).await.map_err(|error| end_of(&error))?;
        let (head, mut incoming) = response.into_parts();
        let mut answer = Answer {
            status: head.status.as_u16(),
            informational: Vec::new(),
            headers: header_map(&head.headers),
            body: Vec::new(),
            raw: Vec::new(),
            trailers: Vec::new(),
            end: End::Clean,
            first_byte: sent.elapsed(),
            elapsed: Duration::ZERO,
            arrivals: Vec::new(),
        };
        while let Some(frame) = incoming.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => {
                    answer.body.extend_from_slice(&data);
                    answer.arrivals.push((sent.elapsed(), answer.body.len()));
                }
                Ok(Err(frame)) => {
                    answer.trailers = frame.trailers_ref().map(header_map).unwrap_or_default();
                }
                Err(error) => {
                    answer.end = end_of(&error);
                    break;
                }
            }
        }
        answer.elapsed = sent.elapsed();
        Ok(answer)
    }
}

fn outgoing<B>(request: &Request, body: B) -> http::Request<B> {
    let mut outgoing = http::Request::builder()
        .method(request.method.as_str())
        .uri(format!("http://evergate.test{}", request.target));
    for (name, value) in &request.headers {
        outgoing = outgoing.header(name, value);
    }
    outgoing.body(body).unwrap()
}

/// A body that ends when its sender is dropped.
struct Frames(mpsc::Receiver<Frame<Bytes>>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.get_mut().0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

/// The h2 crate's error is reached by its words only: it is no direct dependency.
fn end_of(error: &hyper::Error) -> End {
    const CODES: [&str; 14] = [
        "NO_ERROR",
        "PROTOCOL_ERROR",
        "INTERNAL_ERROR",
        "FLOW_CONTROL_ERROR",
        "SETTINGS_TIMEOUT",
        "STREAM_CLOSED",
        "FRAME_SIZE_ERROR",
        "REFUSED_STREAM",
        "CANCEL",
        "COMPRESSION_ERROR",
        "CONNECT_ERROR",
        "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY",
        "HTTP_1_1_REQUIRED",
    ];
    let words = format!("{error:?}");
    let code = (0..).zip(CODES).find(|(_, name)| words.contains(name)).map(|(code, _)| code);
    match code {
        Some(code) if words.contains("Reset(") => End::Reset(code),
        _ => End::Cut,
    }
}

fn header_map(headers: &http::HeaderMap) -> Vec<(String, String)> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

fn header_lines<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<(String, String)> {
    lines
        .map(|line| line.split_once(':').unwrap_or((line, "")))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}

/// A server-sent event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its `event:` field.
    pub name: Option<String>,
    /// Its `data:` lines.
    pub data: String,
}

impl Event {
    /// The data as JSON; panics when it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error} in event {:?}", self.data))
    }
}

/// Splits an event stream as a careful client would; an unfinished event at the end is left out.
pub fn events(body: &[u8]) -> Vec<Event> {
    let text = String::from_utf8_lossy(body).replace("\r\n", "\n").replace('\r', "\n");
    let mut blocks: Vec<&str> = text.split("\n\n").collect();
    blocks.pop();
    let field = |line: &str, name: &str| -> Option<String> {
        let value = line.strip_prefix(name)?.strip_prefix(':')?;
        Some(value.strip_prefix(' ').unwrap_or(value).to_owned())
    };
    blocks
        .into_iter()
        .filter_map(|block| {
            let data: Vec<String> = block.lines().filter_map(|line| field(line, "data")).collect();
            let name = block.lines().find_map(|line| field(line, "event"));
            (!data.is_empty()).then(|| Event { name, data: data.join("\n") })
        })
        .collect()
}

/// A chat or completion stream put together again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StreamSeen {
    pub id: String,
    pub model: String,
    pub text: String,
    pub role: Option<String>,
    pub finish: Vec<String>,
    pub usage: Option<Value>,
    pub errors: Vec<Value>,
    pub done: usize,
}

/// What an OpenAI client would make of the events, right or wrong.
#[track_caller]
pub fn stream_seen(answer: &Answer) -> StreamSeen {
    let mut seen = StreamSeen::default();
    for event in answer.events() {
        if event.data == "[DONE]" {
            seen.done += 1;
            continue;
        }
        let chunk = event.json();
        if !chunk["error"].is_null() {
            seen.errors.push(chunk["error"].clone());
            continue;
        }
        seen.id = chunk["id"].as_str().unwrap_or_default().to_owned();
        seen.model = chunk["model"].as_str().unwrap_or_default().to_owned();
        if !chunk["usage"].is_null() {
            seen.usage = Some(chunk["usage"].clone());
        }
        for choice in chunk["choices"].as_array().into_iter().flatten() {
            let role = choice["delta"]["role"].as_str();
            seen.role = role.map(str::to_owned).or(seen.role);
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
            seen.text += text.unwrap_or_default();
            seen.finish.extend(choice["finish_reason"].as_str().map(str::to_owned));
        }
    }
    seen
}

/// Panics unless the answer is one whole, well-formed chat stream: one identity, one role, one good
/// finish after all text, `[DONE]` once and last, no error. Answers what it said.
#[track_caller]
pub fn assert_is_healthy_stream(answer: &Answer) -> StreamSeen {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.end, End::Clean, "ended after {:?}", answer.text());
    let content_type = answer.header("content-type").unwrap_or_default();
    assert!(content_type.starts_with("text/event-stream"), "content type {content_type:?}");
    let events = answer.events();
    assert_eq!(events.last().map(|event| event.data.as_str()), Some("[DONE]"), "{}", answer.text());
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(Event::json).collect();
    let mut roles = 0;
    let mut finished = false;
    for chunk in &chunks {
        assert!(chunk["error"].is_null(), "error event {chunk}");
        for key in ["id", "model", "object"] {
            assert_eq!(chunk[key], chunks[0][key], "{key} changed inside the stream");
        }
        // SGLang and llama.cpp stamp each chunk anew.
        assert!(chunk["created"].as_u64() >= chunks[0]["created"].as_u64(), "created went back: {chunk}");
        for choice in chunk["choices"].as_array().into_iter().flatten() {
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            assert!(!finished || text.is_empty(), "text after the finish: {chunk}");
            roles += usize::from(choice["delta"]["role"].is_string());
            if let Some(finish) = choice["finish_reason"].as_str() {
                assert!(!finished, "a second finish: {chunk}");
                assert!(!matches!(finish, "abort" | "error"), "finish reason {finish}");
                finished = true;
            }
        }
    }
    assert!(finished, "no finish reason: {}", answer.text());
    if chunks[0]["object"] == "chat.completion.chunk" {
        assert_eq!(roles, 1, "the role must come once: {}", answer.text());
    }
    stream_seen(answer)
}
