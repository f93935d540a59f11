//! Opening a connection: address, TCP, TLS, HTTP handshake, each failure named.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prometheus::IntGauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::config::{BackendClocks, UpstreamHttp};
use crate::net::{self, TcpStream};
use crate::upstream::dns::Addresses;
use crate::upstream::head::{ANSWER_HEAD_BYTES_MAX, ANSWER_HEADERS_MAX};
use crate::upstream::lean::{Lean, Stream};
use crate::upstream::tap::{Tap, Traffic};
use crate::upstream::tls::Tls;
use crate::upstream::{H1, H2, OpenCount, OutBody, Task, Want};

/// Head start of an address over the next one of the same name (RFC 8305 §5 recommends this much).
const ADDRESS_HEAD_START: Duration = Duration::from_millis(250);
/// Least time in which a machine must acknowledge something: five or six retransmissions. Never less than the write
/// clock, for whose end it is to judge one that lives and does not read.
const PATIENCE_MIN: Duration = Duration::from_secs(10);
/// How much of an HTTP/2 answer the backend may send ahead, per stream and per connection.
const H2_STREAM_WINDOW: u32 = 1 << 20;
const H2_CONNECTION_WINDOW: u32 = 4 << 20;

/// Everything needed to connect to one backend.
#[derive(Clone)]
pub struct Target {
    /// Where it is.
    pub addresses: Arc<Addresses>,
    /// `host:port` as written, for the `Host` field.
    pub authority: http::uri::Authority,
    /// The same as a field value.
    pub host: http::HeaderValue,
    /// Set for `https`.
    pub tls: Option<Tls>,
    /// HTTP version wanted.
    pub http: UpstreamHttp,
    /// TCP connection.
    pub connect: Duration,
    /// TCP connection and TLS handshake.
    pub connect_tls: Duration,
    /// A connection is given up when the other side's kernel has acknowledged nothing for so long.
    pub patience: Duration,
    /// A kept connection is closed after this.
    pub idle: Duration,
    /// HTTP/2 PING on idle connections.
    pub h2_ping: Duration,
    /// Its answer is due within this.
    pub h2_ping_timeout: Duration,
    /// Counts the connections that are open.
    pub open: IntGauge,
    /// Told when the peer closes an HTTP/1.1 connection that was to be kept.
    pub lost: Lost,
}

/// Who is told that a connection between two requests was closed from the other side, unannounced: its process may be
/// gone.
pub type Lost = Arc<dyn Fn() + Send + Sync>;

impl Target {
    /// A target by the clocks of its pool.
    pub fn new(
        addresses: Arc<Addresses>,
        authority: http::uri::Authority,
        tls: Option<Tls>,
        http: UpstreamHttp,
        clocks: &BackendClocks,
        open: IntGauge,
        lost: Lost,
    ) -> Self {
        Self {
            addresses,
            host: http::HeaderValue::from_str(authority.as_str())
                .unwrap_or(http::HeaderValue::from_static("localhost")),
            authority,
            tls,
            http,
            connect: clocks.connect,
            connect_tls: clocks.connect_tls,
            patience: clocks.write_idle.max(PATIENCE_MIN),
            idle: clocks.idle,
            h2_ping: clocks.h2_ping,
            h2_ping_timeout: clocks.h2_ping_timeout,
            open,
            lost,
        }
    }

    /// Whether a new connection will (or may well) speak HTTP/2, so that opening one serves many.
    pub(super) fn prefers_h2(&self) -> bool {
        match self.http {
            UpstreamHttp::Http1 => false,
            UpstreamHttp::Http2 => true,
            UpstreamHttp::Auto => false,
        }
    }
}

/// Why there is no connection. Nothing of a request was sent.
#[derive(Debug)]
pub struct ConnectError {
    /// The kind of failure.
    pub failure: ConnectFailure,
    /// What the system or library said.
    pub source: io::Error,
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.failure.name(), self.source)
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Kinds of connect failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectFailure {
    /// The name has no address and never had one.
    Dns,
    /// Refused, or reset while connecting.
    Refused,
    /// No answer within the connect clock.
    Timeout,
    /// No route and the like.
    Unreachable,
    /// TLS or the HTTP/2 preface failed.
    Tls,
    /// This machine has no descriptors, ports or memory left: not the backend's doing.
    Local,
}

impl ConnectFailure {
    /// The word for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns_failure",
            Self::Refused => "connection_refused",
            Self::Timeout => "connect_timeout",
            Self::Unreachable => "unreachable",
            Self::Tls => "tls_failure",
            Self::Local => "local_resources",
        }
    }

    fn of(error: &io::Error) -> Self {
        const EMFILE: i32 = 24;
        const ENFILE: i32 = 23;
        match (error.kind(), error.raw_os_error()) {
            (_, Some(EMFILE | ENFILE))
            | (io::ErrorKind::AddrNotAvailable | io::ErrorKind::OutOfMemory, _) => Self::Local,
            (io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset, _) => Self::Refused,
            (io::ErrorKind::TimedOut, _) => Self::Timeout,
            _ => Self::Unreachable,
        }
    }
}

/// A connection that has just been opened.
pub(super) enum Opened {
    Lean(Box<Lean>),
    H1(H1),
    H2(H2),
}

/// Opens a connection by all the means of `target`.
pub(super) async fn open(target: &Target, want: Want) -> Result<Opened, ConnectError> {
    let limit = if target.tls.is_some() { target.connect_tls } else { target.connect };
    match timeout(limit, open_unbounded(target, want)).await {
        Ok(opened) => opened,
        Err(_elapsed) => Err(fail(
            ConnectFailure::Timeout,
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no connection to {} within {limit:?}", target.authority),
            ),
        )),
    }
}

async fn open_unbounded(target: &Target, want: Want) -> Result<Opened, ConnectError> {
    let tcp = connect_any(target).await?;
    // Small writes leave at once: Nagle with delayed acknowledgement costs 40 ms a token.
    tcp.set_nodelay(true).map_err(|e| fail(ConnectFailure::of(&e), e))?;
    // What a tunnel carries may rest unread for as long as its ends like.
    net::give_up_after(&tcp, target.patience, want == Want::Upgradable)
        .map_err(|e| fail(ConnectFailure::of(&e), e))?;
    let Some(tls) = &target.tls else {
        return handshake(target, tcp, target.http == UpstreamHttp::Http2, want).await;
    };
    let (connector, name) = tls
        .for_host(target.authority.host(), want == Want::Upgradable)
        .map_err(|e| fail(ConnectFailure::Tls, e))?;
    let stream = connector.connect(name, tcp).await.map_err(|e| fail(ConnectFailure::Tls, e))?;
    let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    handshake(target, stream, h2, want).await
}

/// Tries the addresses in turn, the next one when the one before failed or has had its head start; the first
/// connection that stands wins, the last failure is the answer. One address that swallows packets must not
/// use up the connect clock of all others.
async fn connect_any(target: &Target) -> Result<TcpStream, ConnectError> {
    let (addresses, first) = target.addresses.resolved().await.map_err(|e| fail(ConnectFailure::Dns, e))?;
    if let [only] = addresses[..] {
        return net::connect(only).await.map_err(|e| fail(ConnectFailure::of(&e), e));
    }
    let mut waiting = (0..addresses.len()).map(|i| addresses[(first + i) % addresses.len()]);
    let mut tries = JoinSet::new();
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    loop {
        if let Some(address) = waiting.next() {
            tries.spawn(net::connect(address));
        }
        let head_start = if waiting.len() == 0 { Duration::MAX } else { ADDRESS_HEAD_START };
        match timeout(head_start, tries.join_next()).await {
            Ok(Some(Ok(Ok(stream)))) => return Ok(stream),
            Ok(Some(Ok(Err(e)))) => last = e,
            // Only a panic of the library: the other addresses may do.
            Ok(Some(Err(_panic))) => {}
            Ok(None) => return Err(fail(ConnectFailure::of(&last), last)),
            Err(_elapsed) => {}
        }
    }
}

async fn handshake<T>(target: &Target, io: T, h2: bool, want: Want) -> Result<Opened, ConnectError>
where
    T: Stream + 'static,
{
    let lost = target.lost.clone();
    if !h2 && !want.needs_hyper() {
        let io: Box<dyn Stream> = Box::new(io);
        let (io, traffic) = Tap::new(io, lost);
        return Ok(Opened::Lean(Box::new(Lean::new(io, traffic, OpenCount::new(&target.open)))));
    }
    let (io, traffic) = Tap::new(io, lost);
    let io = TokioIo::new(io);
    if h2 { handshake_h2(target, io, traffic).await } else { handshake_h1(target, io, traffic).await }
        .map_err(|e| fail(ConnectFailure::Tls, io::Error::other(e)))
}

async fn handshake_h1<T>(target: &Target, io: TokioIo<T>, traffic: Arc<Traffic>) -> hyper::Result<Opened>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_header_size(ANSWER_HEAD_BYTES_MAX)
        .max_headers(ANSWER_HEADERS_MAX)
        .handshake::<_, OutBody>(io)
        .await?;
    // Errors of the connection reach the exchange on it.
    let task = tokio::spawn(async move { drop(connection.with_upgrades().await) });
    Ok(Opened::H1(H1 { sender, traffic, _task: Task::new(task.abort_handle(), &target.open) }))
}

async fn handshake_h2<T>(target: &Target, io: TokioIo<T>, traffic: Arc<Traffic>) -> hyper::Result<Opened>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .keep_alive_interval(target.h2_ping)
        .keep_alive_timeout(target.h2_ping_timeout)
        .keep_alive_while_idle(true)
        .max_header_list_size(ANSWER_HEAD_BYTES_MAX as u32)
        .handshake::<_, OutBody>(io)
        .await?;
    let seen = traffic.clone();
    let task = tokio::spawn(async move {
        // One that we close ourselves ends with this task.
        drop(connection.await);
        seen.closed();
    });
    Ok(Opened::H2(H2 {
        sender,
        traffic,
        streams: AtomicUsize::new(0),
        _task: Task::new(task.abort_handle(), &target.open),
    }))
}

fn fail(failure: ConnectFailure, source: io::Error) -> ConnectError {
    ConnectError { failure, source }
}
