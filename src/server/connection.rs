//! One client connection from its first byte to its close: TLS, HTTP version, clocks, drain.
//!
//! hyper moves the bytes; this task decides how long it may. After every poll it asks the connection's
//! [`Pulse`] which clock runs and sets the one alarm to it: no timer and no system call per request. When a
//! clock ends or the process drains, hyper is asked to finish; what must not wait is dropped.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use super::answer::Desk;
use super::clients::{Bounds, Place};
use super::pulse::{Clock, Pulse};
use super::streams::Streams;
use super::wire::{Socket, Wire};
use super::{Answers, Context, Listening, tls};
use crate::clock::{self, ALARM_TICK, Alarm, Turn};
use crate::config::{ClientClocks, Limits};
use crate::drain::{Draining, Phase};
use crate::net::TcpStream;
use crate::policy::Moment;
use crate::proxy::Client;
use crate::telemetry::Telemetry;

/// The first bytes of every HTTP/2 connection (RFC 9113 §3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Room for the bytes read to find out the version: a whole small request, so that the finding out costs no
/// read of its own.
const EARLY_BYTES: usize = 2048;

/// Least read buffer of an HTTP/1 connection, and bound of what waits to be written: an upload's
/// pieces get no larger than this either.
const H1_BUFFER_MIN: usize = 64 * 1024;

/// Received but unread per HTTP/2 stream. Prompts of this size arrive without a round trip; more memory a
/// stream cannot take.
const H2_STREAM_WINDOW: u32 = 256 * 1024;

/// The same for a whole connection: what one client may make us hold, however many streams it opens.
const H2_CONNECTION_WINDOW: u32 = 1024 * 1024;

/// Answer bytes that may wait in one HTTP/2 stream. hyper's 400 KiB times 256 streams would be 100 MiB a client.
const H2_SEND_BUFFER: usize = 64 * 1024;

/// Streams a client may open and reset before we looked at them; beyond it is CVE-2023-44487.
const H2_RESETS_PENDING_MAX: usize = 20;

/// Streams we reset for a client's errors before the connection goes too (CVE-2025-8671).
const H2_RESETS_CAUSED_MAX: usize = 256;

/// How long a client may take to answer a PING.
const H2_PONG: std::time::Duration = std::time::Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HttpVersion {
    One,
    Two,
}

/// How a connection ended.
enum Ended {
    /// By hyper: both sides done, or an error of the peer's.
    Closed(hyper::Result<()>),
    /// By us.
    Cut(Clock),
    /// By the end of the process or of the listener.
    Drained,
}

/// What may end a connection from outside.
struct Watch {
    alarm: Alarm,
    clocks: ClientClocks,
    process: Draining,
    listener: Draining,
}

impl Watch {
    fn phase(&self) -> Phase {
        self.process.phase().max(self.listener.phase())
    }

    /// Waits until what is left is to be cut. Woken at every step of a drain.
    async fn done(&self) {
        tokio::select! {
            () = self.process.done() => {}
            () = self.listener.done() => {}
        }
    }

    async fn draining(&self) {
        tokio::select! {
            () = self.process.started() => {}
            () = self.listener.started() => {}
        }
    }
}

/// Serves one accepted connection to its end.
pub(super) async fn serve<H: Answers>(
    tcp: TcpStream,
    peer: SocketAddr,
    listening: Arc<Listening>,
    context: Arc<Context<H>>,
    place: Place,
) {
    // Fails only on a socket that is gone already.
    let _gone = tcp.set_nodelay(true);
    let bounds = context.clients.bounds();
    let watch = Watch {
        alarm: context.alarms.alarm(),
        clocks: bounds.clocks.clone(),
        process: context.draining.clone(),
        listener: listening.retired().watch(),
    };
    let tls = listening.tls();
    // One spelling for IPv4, whatever the listener's socket made of it.
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let trusted = listening.trusts(peer.ip());
    let client = Arc::new(Client::new(peer, tls.is_some(), trusted, Arc::clone(listening.name())));
    let opened = match tls {
        None => sniff(tcp, &watch, &context.telemetry).await,
        Some(config) => match handshake(tcp, TlsAcceptor::from(config), &watch).await {
            Some(opened) => Some(opened),
            None => {
                listening.metrics.tls_failures.inc();
                None
            }
        },
    };
    let Some((socket, early, version)) = opened else { return };
    let pulse = Pulse::new();
    let desk = Arc::new(Desk {
        context: Arc::clone(&context),
        client,
        pulse: Arc::clone(&pulse),
        retired: watch.listener.clone(),
        headers_max: bounds.limits.headers_max,
    });
    let wire = Wire::new(socket, early, version == HttpVersion::One, Arc::clone(&pulse), place);
    let wire = TokioIo::new(wire);
    let service = service_fn(move |request| desk.answer(request));
    match version {
        HttpVersion::One => {
            let builder = http1_builder(&bounds.limits);
            let mut connection = builder.serve_connection(wire, service).with_upgrades();
            let ended = drive(Pin::new(&mut connection), &pulse, &watch).await;
            told(&ended, peer, &context.telemetry);
            if pulse.is_tunnel() {
                drop(connection);
                tunnel(&pulse, &watch).await;
            } else if let (Ended::Cut(Clock::Head), Some(parts)) = (&ended, connection.into_parts()) {
                too_late(parts.io.into_inner(), &watch).await;
            }
        }
        HttpVersion::Two => {
            let slow_reader = bounds.clocks.slow_reader;
            let streams = Streams::new(context.alarms.clone(), slow_reader, Arc::clone(&context.telemetry));
            let connection = http2_builder(&bounds, streams).serve_connection(wire, service);
            let ended = drive(pin!(connection), &pulse, &watch).await;
            told(&ended, peer, &context.telemetry);
        }
    }
}

/// The TLS handshake, under the head clock. `None` if it failed or came too late.
async fn handshake(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    watch: &Watch,
) -> Option<(Socket, Vec<u8>, HttpVersion)> {
    watch.alarm.set(clock::now() + watch.clocks.head);
    let accepted = tokio::select! {
        accepted = acceptor.accept(tcp) => accepted,
        () = watch.alarm.expired() => return None,
        () = watch.done() => return None,
    };
    watch.alarm.clear();
    match accepted {
        Ok(stream) => {
            let h2 = stream.get_ref().1.alpn_protocol() == Some(tls::H2);
            let version = if h2 { HttpVersion::Two } else { HttpVersion::One };
            Some((Socket::Tls(Box::new(stream)), Vec::new(), version))
        }
        Err(error) => {
            tracing::debug!(%error, "TLS handshake failed");
            None
        }
    }
}

/// Reads until the HTTP version is certain: no HTTP/1 request begins as HTTP/2 connections do. `None` if
/// the connection ended before.
async fn sniff(
    tcp: TcpStream,
    watch: &Watch,
    telemetry: &Telemetry,
) -> Option<(Socket, Vec<u8>, HttpVersion)> {
    let mut tcp = tcp;
    let mut early = Vec::with_capacity(EARLY_BYTES);
    watch.alarm.set(clock::now() + watch.clocks.idle);
    loop {
        let begun = !early.is_empty();
        let read = tokio::select! {
            biased;
            read = tcp.read_buf(&mut early) => read,
            () = watch.alarm.expired() => {
                if begun {
                    telemetry.metrics.count_limit(HEAD_CLOCK);
                }
                return None;
            }
            () = watch.draining(), if !begun => {
                // What is on its way may still come, as in `drive`.
                watch.alarm.set(clock::now() + ALARM_TICK);
                tokio::select! {
                    biased;
                    read = tcp.read_buf(&mut early) => read,
                    () = watch.alarm.expired() => return None,
                }
            }
            () = watch.done() => return None,
        };
        if !read.is_ok_and(|read| read > 0) {
            return None;
        }
        let known = early.len().min(H2_PREFACE.len());
        if early[..known] != H2_PREFACE[..known] {
            return Some((Socket::Plain(tcp), early, HttpVersion::One));
        }
        if known == H2_PREFACE.len() {
            return Some((Socket::Plain(tcp), early, HttpVersion::Two));
        }
        if !begun {
            watch.alarm.set(clock::now() + watch.clocks.head);
        }
    }
}

fn http1_builder(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(None)
        // One copy and one write for head and body, cheaper than two slices for answers of this size. Not
        // `pipeline_flush`, which flattens too: it lifts the bound of the write buffer, so that an answer
        // that is always ready never leaves hyper's loop and fills the memory, and it holds a stream
        // back for as long as another request waits behind it.
        .writev(false)
        .max_header_size(limits.head_bytes_max)
        .max_buf_size(limits.head_bytes_max.max(H1_BUFFER_MIN));
    // Saying hyper's default aloud costs an allocation per request.
    if limits.headers_max != HYPER_HEADERS_MAX {
        builder.max_headers(limits.headers_max);
    }
    builder
}

/// hyper's own default.
const HYPER_HEADERS_MAX: usize = 100;

fn http2_builder(bounds: &Bounds, streams: Streams) -> http2::Builder<Streams> {
    let mut builder = http2::Builder::new(streams);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(bounds.limits.h2_streams_max)
        .max_header_list_size(u32::try_from(bounds.limits.head_bytes_max).unwrap_or(u32::MAX))
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_pending_accept_reset_streams(H2_RESETS_PENDING_MAX)
        .max_local_error_reset_streams(H2_RESETS_CAUSED_MAX)
        .keep_alive_interval(bounds.clocks.idle)
        .keep_alive_timeout(H2_PONG);
    builder
}

/// A connection of either version, as its task sees it.
trait Http: Future<Output = hyper::Result<()>> {
    /// Whether it can tell the client beforehand, without an answer to say it in.
    const ANNOUNCES_END: bool;

    /// No further request; what runs may finish.
    fn finish(self: Pin<&mut Self>);
}

impl<I, S> Http for http1::UpgradeableConnection<I, S>
where
    Self: Future<Output = hyper::Result<()>>,
    I: Read + Write + Unpin,
    S: HttpService<Incoming, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    S::ResBody: hyper::body::Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>> + 'static,
{
    const ANNOUNCES_END: bool = false;

    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S, E> Http for http2::Connection<I, S, E>
where
    Self: Future<Output = hyper::Result<()>>,
    I: Read + Write + Unpin,
    S: HttpService<Incoming, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    S::ResBody: hyper::body::Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>> + 'static,
    E: hyper::rt::bounds::Http2ServerConnExec<S::Future, S::ResBody>,
{
    const ANNOUNCES_END: bool = true;

    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

/// Lets hyper serve the connection until it ends, a clock runs out or the drain is over.
async fn drive<C: Http>(mut connection: Pin<&mut C>, pulse: &Pulse, watch: &Watch) -> Ended {
    let mut done = pin!(watch.done());
    let mut watching = false;
    // When the connection was asked to finish.
    let mut finishing: Option<Moment> = None;
    // When an idle one is to be, after the drain has begun.
    let mut closing: Option<Moment> = None;
    poll_fn(|cx| {
        let _turn = Turn::begin();
        pulse.driven_by(cx.waker());
        // Polled once to leave the waker, which in a task of its own stays the same, and then only
        // while a drain moves.
        if !watching || watch.phase() != Phase::Accepting {
            watching = true;
            if done.as_mut().poll(cx).is_ready() {
                pulse.cut();
                return Poll::Ready(Ended::Drained);
            }
        }
        loop {
            if let Poll::Ready(closed) = connection.as_mut().poll(cx) {
                return Poll::Ready(Ended::Closed(closed));
            }
            pulse.settles();
            let is_past = |at: Moment| clock::now() >= at;
            let (mut at, clock) = match finishing {
                // Asked to go and idle still: the last thing waited for is the client's own close.
                Some(since) if !pulse.busy() => {
                    let (at, clock) = pulse.deadline(&watch.clocks);
                    (at.min(pulse.idle_since().max(since) + watch.clocks.head), clock)
                }
                _ => pulse.deadline(&watch.clocks),
            };
            if finishing.is_none() && watch.phase() != Phase::Accepting {
                if C::ANNOUNCES_END || pulse.busy() {
                    connection.as_mut().finish();
                    finishing = Some(clock::now());
                    continue;
                }
                // An idle HTTP/1 connection cannot be told. A request may be in the socket already, so it
                // gets one tick to show; a head that has begun gets its clock.
                if !pulse.in_head() {
                    let closing = *closing.get_or_insert_with(|| clock::now() + ALARM_TICK);
                    if is_past(closing) {
                        connection.as_mut().finish();
                        finishing = Some(clock::now());
                        continue;
                    }
                    at = at.min(closing);
                }
            }
            watch.alarm.set(at);
            if watch.alarm.poll_expired(cx).is_pending() {
                return Poll::Pending;
            }
            if !is_past(at) || Some(at) == closing {
                continue;
            }
            if clock == Clock::Idle && finishing.is_none() {
                connection.as_mut().finish();
                finishing = Some(clock::now());
                continue;
            }
            pulse.cut();
            if clock == Clock::SlowReader {
                // Or the kernel would keep what this client does not take.
                pulse.end_by_reset();
            }
            return Poll::Ready(Ended::Cut(clock));
        }
    })
    .await
}

/// Watches a connection that its exchange took over (RFC 9110 §7.8): no clock of HTTP's, but the drain's end.
async fn tunnel(pulse: &Pulse, watch: &Watch) {
    tokio::select! {
        () = poll_fn(|cx| if pulse.tunnel_ended(cx.waker(), false) { Poll::Ready(()) } else { Poll::Pending }) => {}
        () = watch.done() => pulse.end_tunnel(),
    }
}

/// Tells a client that its head took too long (RFC 9110 §15.5.9), as far as it listens.
async fn too_late(mut wire: Wire, watch: &Watch) {
    watch.alarm.set(clock::now() + FAREWELL);
    tokio::select! {
        _told = async {
            wire.write_all(REQUEST_TIMEOUT).await?;
            wire.shutdown().await
        } => {}
        () = watch.alarm.expired() => {}
    }
}

/// What hyper cannot say about half a head.
const REQUEST_TIMEOUT: &[u8] =
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// Time for saying it.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(1);

/// Keys of the clocks, as `count_limit` wants them.
const HEAD_CLOCK: &str = "client_clocks.head";
pub(super) const SLOW_READER_CLOCK: &str = "client_clocks.slow_reader";

/// Counts and logs what ended the connection, as far as it is worth it.
fn told(ended: &Ended, peer: SocketAddr, telemetry: &Telemetry) {
    match ended {
        Ended::Closed(Ok(())) | Ended::Cut(Clock::Idle | Clock::Linger) => {}
        Ended::Closed(Err(error)) => {
            if error.is_parse_too_large() {
                telemetry.metrics.count_limit("head_bytes_max");
            }
            tracing::debug!(%peer, %error, "client connection broke");
        }
        Ended::Cut(Clock::Head) => telemetry.metrics.count_limit(HEAD_CLOCK),
        Ended::Cut(Clock::SlowReader) => telemetry.metrics.count_limit(SLOW_READER_CLOCK),
        Ended::Drained => tracing::debug!(%peer, "client connection cut at the end of the drain"),
    }
}
