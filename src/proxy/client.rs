//! What the connection says about the one who asks.

use std::net::SocketAddr;
use std::sync::Arc;

/// A client connection, as far as its requests care. Made once per connection by `server`.
#[derive(Clone, Debug)]
pub struct Client {
    /// Where the connection comes from.
    pub peer: SocketAddr,
    /// Whether it speaks TLS to us.
    pub tls: bool,
    /// Whether its peer is a trusted proxy, whose `Forwarded` and `X-Forwarded-*` are believed.
    pub trusted: bool,
    /// Name of the listener it came in by: its configured address.
    pub listener: Arc<str>,
}

/// What was wrong with a head in a way the HTTP library hides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadDefect {
    /// Both `Content-Length` and `Transfer-Encoding` (RFC 9112 §6.1): refused, the connection closed.
    LengthAndEncoding,
}

impl HeadDefect {
    /// For metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LengthAndEncoding => "length_and_encoding",
        }
    }
}
