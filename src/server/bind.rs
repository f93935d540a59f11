//! Listening sockets: one per worker on the same address, bound by the control thread.
//!
//! The kernel deals new connections out among sockets that share a port by `SO_REUSEPORT`. Every socket of the
//! set must be accepted from: what waits in one that nobody reads is lost, and a set that is to be
//! handed to a successor process is handed over whole.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait per socket for being accepted. The kernel cuts it to `net.core.somaxconn`.
pub const BACKLOG: i32 = 1024;

/// What binding may assume about the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nobody listens there, or it is an error: without asking, `SO_REUSEPORT` would let a second
    /// evergate of the same user take half of the first one's connections. Two that bind in the same
    /// instant may still both succeed.
    Fresh,
    /// This process already listens there, and the new sockets join.
    Join,
}

/// Sockets of one listener, nonblocking and listening.
#[derive(Debug)]
pub struct Bound {
    /// Where they really listen: port 0 has become a port.
    pub address: SocketAddr,
    /// One per worker.
    pub sockets: Vec<TcpListener>,
}

/// Binds one socket per worker to `address`, all or none. Port 0 takes a free one for all of them.
/// The error names the address.
pub fn bind(address: SocketAddr, workers: NonZeroUsize, claim: Claim) -> io::Result<Bound> {
    bind_all(address, workers, claim)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

fn bind_all(address: SocketAddr, workers: NonZeroUsize, claim: Claim) -> io::Result<Bound> {
    if claim == Claim::Fresh && address.port() != 0 {
        // Bound alone it fails while anybody listens; it is closed before the port is shared.
        socket(address)?.bind(&address.into())?;
    }
    let first = shared_socket(address)?;
    let address = first.local_addr()?;
    let others = (1..workers.get()).map(|_| shared_socket(address));
    let sockets = std::iter::once(Ok(first)).chain(others).collect::<io::Result<_>>()?;
    Ok(Bound { address, sockets })
}

fn shared_socket(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of a former process still closing must not keep the port.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
