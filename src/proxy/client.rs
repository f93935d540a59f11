//! What the connection says about the one who asks.

use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderValue;

/// A client connection, as far as its requests care. Made once per connection by `server`.
#[derive(Clone, Debug)]
pub struct Client {
    /// Where the connection comes from.
    pub peer: SocketAddr,
    /// Its address as a field value, written once for all its requests.
    pub forwarded_for: HeaderValue,
    /// Whether it speaks TLS to us.
    pub tls: bool,
    /// Whether its peer is a trusted proxy, whose `Forwarded` and `X-Forwarded-*` are believed.
    pub trusted: bool,
    /// Name of the listener it came in by: its configured address.
    pub listener: Arc<str>,
}

impl Client {
    /// A connection that was just accepted.
    pub fn new(peer: SocketAddr, tls: bool, trusted: bool, listener: Arc<str>) -> Self {
        let forwarded_for = HeaderValue::from_str(&peer.ip().to_string());
        let forwarded_for = forwarded_for.unwrap_or(HeaderValue::from_static("unknown"));
        Self { peer, forwarded_for, tls, trusted, listener }
    }
}

/// What was wrong with a head in a way the HTTP library hides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadDefect {
    /// Both `Content-Length` and `Transfer-Encoding` (RFC 9112 §6.1): refused, the connection closed.
    LengthAndEncoding,
    /// A `Transfer-Encoding` that is not one plain `chunked` (RFC 9112 §6.1): another reader of the
    /// same bytes may find another end of the body.
    TransferCoding,
    /// No `Host`, or several (RFC 9112 §3.2): another reader may route it elsewhere.
    Host,
    /// Where this head begins or its body ends cannot be told for sure.
    UnclearFraming,
}

impl HeadDefect {
    /// For metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LengthAndEncoding => "length_and_encoding",
            Self::TransferCoding => "transfer_coding",
            Self::Host => "host",
            Self::UnclearFraming => "unclear_framing",
        }
    }
}
