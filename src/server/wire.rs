//! The socket of a client as hyper sees it, plain or TLS, with the guard and the pulse on it.
//!
//! Bytes pass unchanged and uncopied. What is learned in passing: where heads begin and end, whether the peer
//! takes what is written, and whether bytes were left unread at the close. Dropping it closes the
//! connection and gives its place to the next.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

use super::clients::Place;
use super::guard::Framing;
use super::pulse::Pulse;
use crate::net::TcpStream;

/// Read and thrown away at most per poll of a lingering close.
const LINGER_READ_MAX: usize = 4096;

/// A client's socket.
#[derive(Debug)]
pub(super) enum Socket {
    /// As it is.
    Plain(TcpStream),
    /// Under TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

/// The socket of one connection, watched.
#[derive(Debug)]
pub(super) struct Wire {
    socket: Socket,
    /// Read while finding out the HTTP version, not yet given to hyper.
    early: Vec<u8>,
    /// How much of it was.
    early_given: usize,
    /// For HTTP/1 only: HTTP/2 has no framing to be unsure of.
    framing: Option<Framing>,
    pulse: Arc<Pulse>,
    end_seen: bool,
    shut: bool,
    _place: Place,
}

impl Socket {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }
}

impl Wire {
    /// A connection that has begun with the bytes `early`. `guarded` for HTTP/1.
    pub(super) fn new(
        socket: Socket,
        early: Vec<u8>,
        guarded: bool,
        pulse: Arc<Pulse>,
        place: Place,
    ) -> Self {
        let framing = guarded.then(Framing::default);
        Self { socket, early, early_given: 0, framing, pulse, end_seen: false, shut: false, _place: place }
    }

    fn follow(&mut self, read: &[u8]) {
        if read.is_empty() {
            self.end_seen = true;
            return;
        }
        let Some(framing) = &mut self.framing else { return };
        if self.pulse.is_tunnel() {
            self.framing = None;
            return;
        }
        let before = framing.heads();
        framing.read(read);
        if let Some(defect) = framing.defect() {
            self.pulse.set_defect(defect);
        }
        self.pulse.set_in_head(framing.in_head(), framing.heads() != before);
    }

    /// Whether the peer may have sent what nobody read.
    fn leaves_bytes(&self) -> bool {
        let Some(framing) = &self.framing else { return false };
        !self.end_seen && (!framing.between_messages() || framing.heads() != self.pulse.calls())
    }

    fn took<T>(&self, written: &Poll<io::Result<T>>) {
        match written {
            Poll::Pending => self.pulse.stalls(),
            Poll::Ready(_) => self.pulse.flows(),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.pulse.is_tunnel() && this.pulse.tunnel_ended(cx.waker(), true) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let from = buf.filled().len();
        if this.early.is_empty() {
            ready!(Pin::new(&mut this.socket).poll_read(cx, buf))?;
        } else {
            let early = &this.early[this.early_given..];
            let fits = early.len().min(buf.remaining());
            buf.put_slice(&early[..fits]);
            this.early_given += fits;
            if this.early_given == this.early.len() {
                this.early = Vec::new();
            }
        }
        this.follow(&buf.filled()[from..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.took(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, slices);
        self.took(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.socket).poll_flush(cx);
        self.took(&flushed);
        flushed
    }

    /// Closes our direction; where bytes may be left unread, also reads them away until the peer
    /// closes too or the linger clock ends it.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.shut {
            ready!(Pin::new(&mut this.socket).poll_shutdown(cx))?;
            this.shut = true;
        }
        while this.leaves_bytes() {
            this.pulse.lingers();
            let mut waste = [MaybeUninit::uninit(); LINGER_READ_MAX];
            let mut waste = ReadBuf::uninit(&mut waste);
            ready!(Pin::new(&mut this.socket).poll_read(cx, &mut waste))?;
            this.end_seen = waste.filled().is_empty();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.pulse.ends_by_reset() {
            // Fails only on a socket that is gone already.
            let _gone = self.socket.tcp().set_zero_linger();
        }
        self.pulse.end_tunnel();
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, slices),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
