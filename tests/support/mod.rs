//! Helpers of the integration tests: backends that say exactly which bytes, clients that see exactly
//! which bytes, and the proxy between them.
//!
//! Everything lives on 127.0.0.1 with ports from the kernel, ends when it is dropped, and waits by
//! asking (`eventually`), never by sleeping and hoping.

// A helper is written whole; which half of it this week's tests use is nobody's concern.
#![allow(dead_code, unreachable_pub)]

pub mod backend;
pub mod client;
pub mod either;
pub mod h2_backend;
pub mod proxy;
pub mod reply;
pub mod tls;

use std::net::SocketAddr;
use std::panic::Location;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

/// Long enough for anything that should happen at all, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `condition` holds; panics at the caller's line after `timeout`.
#[track_caller]
pub fn eventually(timeout: Duration, mut condition: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let asked_at = Location::caller();
    async move {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < timeout, "not within {timeout:?}: the condition at {asked_at}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Awaits `future`; panics at the caller's line after `timeout`. For what must not hang.
#[track_caller]
pub fn within<F: Future>(timeout: Duration, future: F) -> impl Future<Output = F::Output> {
    let asked_at = Location::caller();
    async move {
        match tokio::time::timeout(timeout, future).await {
            Ok(output) => output,
            Err(_) => panic!("not within {timeout:?}: the future at {asked_at}"),
        }
    }
}

/// FNV-1a, 64 bit, in hex: what `echo` answers for a body.
pub fn hash(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// A port of this test's own for as long as the value lives: bound, so that the kernel gives it to
/// nobody else, and not listening, so that connections to it are refused until somebody listens.
pub struct ReservedPort {
    _socket: Socket,
    address: SocketAddr,
}

impl ReservedPort {
    pub fn new() -> Self {
        Self::at(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn at(address: SocketAddr) -> Self {
        let socket = reusable(address);
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        Self { _socket: socket, address }
    }

    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// A listening socket at the port.
    pub fn listen(&self, backlog: i32) -> std::net::TcpListener {
        let socket = reusable(self.address);
        socket.listen(backlog).unwrap();
        socket.into()
    }
}

fn reusable(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket
}
