//! Counts what passes over a connection to a backend, below the HTTP library.
//!
//! The replay rules rest on facts the library does not tell: was a byte of the request written, was a
//! byte of the answer read, when did the first one come. They are read here, at the socket.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::clock;
use crate::policy::Moment;
use crate::upstream::connect::Lost;

/// What has passed over one connection so far.
pub struct Traffic {
    written: AtomicU64,
    read: AtomicU64,
    /// Moment of the first byte read since `mark`, 0 while there was none.
    first_read: AtomicU64,
    /// One of the two sides has said that it closes after this answer.
    last: AtomicBool,
    lost: Lost,
}

impl Traffic {
    /// Bytes written to the socket.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Bytes read from the socket.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// When the first byte since the last `mark` was read.
    pub fn first_read(&self) -> Option<Moment> {
        match self.first_read.load(Ordering::Relaxed) {
            0 => None,
            at => Some(Moment::from_micros(at)),
        }
    }

    /// A new request begins on the connection.
    pub fn mark(&self) {
        self.first_read.store(0, Ordering::Relaxed);
    }

    /// Whether one of the two sides has said that it closes after this answer.
    pub(super) fn is_last(&self) -> bool {
        self.last.load(Ordering::Relaxed)
    }

    pub(super) fn set_last(&self, last: bool) {
        self.last.store(last, Ordering::Relaxed);
    }

    /// The peer closed it between two requests. Whoever wants to know is told, unless that was to be expected.
    pub(super) fn closed(&self) {
        if !self.is_last() {
            (self.lost)();
        }
    }
}

/// The connection, counted.
pub(super) struct Tap<T> {
    inner: T,
    traffic: Arc<Traffic>,
}

impl<T> Tap<T> {
    /// Counts what passes over `inner`.
    pub(super) fn new(inner: T, lost: Lost) -> (Self, Arc<Traffic>) {
        let traffic = Arc::new(Traffic {
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            first_read: AtomicU64::new(0),
            last: AtomicBool::new(false),
            lost,
        });
        (Self { inner, traffic: traffic.clone() }, traffic)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Tap<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let n = buf.filled().len() - before;
        if n > 0 {
            add(&self.traffic.read, n);
            if self.traffic.first_read.load(Ordering::Relaxed) == 0 {
                self.traffic.first_read.store(clock::now().as_micros().max(1), Ordering::Relaxed);
            }
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Tap<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.traffic.wrote(&polled);
        unless_closed(polled, buf.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.traffic.wrote(&polled);
        unless_closed(polled, bufs.iter().map(|buf| buf.len()).sum())
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        unless_closed(Pin::new(&mut self.inner).poll_flush(cx), ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Traffic {
    fn wrote(&self, polled: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(n)) = polled {
            add(&self.written, *n);
        }
    }
}

/// A backend may answer and close before it has read the whole request. The write that fails then must not hide
/// the answer that waits to be read: what is written to a closed connection is thrown away, and the
/// reading side, which has its end behind whatever was said, tells of the close.
fn unless_closed<T>(polled: Poll<io::Result<T>>, thrown_away: T) -> Poll<io::Result<T>> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    match polled {
        Poll::Ready(Err(error)) if matches!(error.kind(), BrokenPipe | ConnectionReset) => {
            Poll::Ready(Ok(thrown_away))
        }
        other => other,
    }
}

/// One connection is driven by one task: a load and a store do, no locked addition is needed.
fn add(counter: &AtomicU64, n: usize) {
    counter.store(counter.load(Ordering::Relaxed) + n as u64, Ordering::Relaxed);
}
