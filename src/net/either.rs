//! What a TCP stream is in unit tests: a real one, or one end of a simulated connection.
//!
//! It has those methods of tokio's stream that the data plane uses, and no others.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::simulated::Socket;

/// A connection.
#[derive(Debug)]
pub enum TcpStream {
    /// Of this machine.
    Real(tokio::net::TcpStream),
    /// Of the thread's network.
    Simulated(Socket),
}

impl TcpStream {
    /// Small writes leave at once; in a simulation they always do.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        match self {
            Self::Real(tcp) => tcp.set_nodelay(nodelay),
            Self::Simulated(_) => Ok(()),
        }
    }

    /// Dropping it resets the connection.
    pub fn set_zero_linger(&self) -> io::Result<()> {
        match self {
            Self::Real(tcp) => tcp.set_zero_linger(),
            Self::Simulated(socket) => {
                socket.reset_on_drop();
                Ok(())
            }
        }
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Simulated(socket) => Pin::new(socket).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Real(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Simulated(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Real(tcp) => Pin::new(tcp).poll_write_vectored(cx, slices),
            Self::Simulated(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Real(tcp) => tcp.is_write_vectored(),
            Self::Simulated(socket) => socket.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Simulated(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Simulated(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
