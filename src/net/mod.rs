//! The sockets of the data plane: TCP, and in unit tests also those of a simulated network.
//!
//! In what is shipped the stream is tokio's own under another name: nothing is wrapped, boxed or matched. Only where the
//! library is built for its unit tests is it an enum, and on a thread that has a network (`simulated`) connections are
//! made within that one. So `app::simnet` runs the real proxy over links that can be cut, without a socket
//! (docs/adr/0018-simulated-network.md).
//!
//! Not here: listening, TLS, names, and what is said on a connection.

#[cfg(test)]
mod either;
#[cfg(test)]
pub(crate) mod simulated;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream as Kernel;

#[cfg(test)]
pub use either::TcpStream;
#[cfg(not(test))]
pub use tokio::net::TcpStream;

/// A silent connection is asked after so long whether its other side still knows it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
/// And again, while there is no answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Opens a connection to `address`. It takes as long as the other side does: the clock is the caller's.
///
/// # Errors
/// Facts of the network: refused, unreachable, no descriptors.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    #[cfg(test)]
    if let Some(network) = simulated::Network::here() {
        return network.connect(address).await.map(TcpStream::Simulated);
    }
    Kernel::connect(address).await.map(accepted)
}

/// A connection that a listener accepted.
#[cfg(not(test))]
pub fn accepted(stream: Kernel) -> TcpStream {
    stream
}

/// A connection that a listener accepted.
#[cfg(test)]
pub fn accepted(stream: Kernel) -> TcpStream {
    TcpStream::Real(stream)
}

/// Has the kernel give the connection up, with an error to whoever reads it, once its other side has acknowledged
/// nothing for `patience`, which is at least `KEEPALIVE_IDLE` and a second: a machine that is gone or a firewall that
/// forgot says nothing, and TCP alone would wait for a quarter of an hour, or for ever where nothing is under way.
///
/// `stalls` says that the other side may well leave bytes unread for longer. Else Linux counts that, too.
///
/// # Errors
/// Facts of the system: the connection is gone already.
pub fn give_up_after(stream: &TcpStream, patience: Duration, stalls: bool) -> io::Result<()> {
    #[cfg(test)]
    let stream = match stream {
        TcpStream::Real(stream) => stream,
        TcpStream::Simulated(socket) => {
            socket.give_up_after(patience);
            return Ok(());
        }
    };
    let socket = SockRef::from(stream);
    let unanswered = patience.saturating_sub(KEEPALIVE_IDLE).as_secs().clamp(1, 100);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(u32::try_from(unanswered).unwrap_or(u32::MAX)),
    )?;
    #[cfg(target_os = "linux")]
    if !stalls {
        socket.set_tcp_user_timeout(Some(patience))?;
    }
    Ok(())
}

/// The same, as the standard library knows it; it must be nonblocking.
///
/// # Errors
/// The runtime's: the stream cannot be registered with it.
pub fn from_std(stream: std::net::TcpStream) -> io::Result<TcpStream> {
    Kernel::from_std(stream).map(accepted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_given_up_by_the_kernel() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = connect(listener.local_addr().unwrap()).await.unwrap();
        give_up_after(&stream, Duration::from_secs(10), false).unwrap();
        let TcpStream::Real(tcp) = &stream else { panic!("no network was made on this thread") };
        let socket = SockRef::from(tcp);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 5);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(10)));
        let tunnel = connect(listener.local_addr().unwrap()).await.unwrap();
        give_up_after(&tunnel, Duration::from_secs(60), true).unwrap();
        let TcpStream::Real(tcp) = &tunnel else { panic!("no network was made on this thread") };
        assert_eq!(SockRef::from(tcp).tcp_user_timeout().unwrap(), None);
        assert_eq!(SockRef::from(tcp).tcp_keepalive_retries().unwrap(), 55);
    }
}
