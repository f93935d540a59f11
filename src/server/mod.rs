//! Accepting client connections: sockets, TLS, HTTP versions, and the clocks and limits of clients.
//!
//! The control thread binds a listener's sockets ([`bind`]), one per worker, and keeps its [`Listening`]; every
//! worker runs one [`accept`] per listener, with a [`Context`] of its own. A connection is served by one task on the
//! worker that accepted it (`connection`): the HTTP version is found, hyper speaks it over a watched socket (`wire`,
//! with the smuggling `guard` on it), and each request goes to the handler (`answer`). What the handler answers,
//! evergate's own errors included, is the handler's business; 400 and 431 for what is not HTTP at all are hyper's.

mod accept;
mod answer;
mod bind;
mod clients;
mod connection;
mod guard;
mod listening;
mod pulse;
mod streams;
#[cfg(test)]
mod tests;
mod tls;
mod wire;

pub use accept::accept;
#[cfg(test)]
pub(crate) use accept::welcome;
pub use answer::Answers;
pub use bind::{BACKLOG, Bound, Claim, bind};
pub use clients::{Bounds, Clients};
pub use listening::Listening;
pub use tls::check as check_tls;

use std::sync::Arc;

use crate::clock::Alarms;
use crate::drain::Draining;
use crate::telemetry::Telemetry;

/// What one worker serves its connections with.
#[derive(Debug)]
pub struct Context<H> {
    /// Answers the requests.
    pub handler: H,
    /// Bounds and places, shared by all workers.
    pub clients: Arc<Clients>,
    /// The worker's clock; it must be running.
    pub alarms: Alarms,
    /// The end of the whole process.
    pub draining: Draining,
    /// Where to count.
    pub telemetry: Arc<Telemetry>,
}
