//! Connections to backends, behind one small interface: head out, body out, head in, frames in.
//!
//! A `Lane` belongs to one backend and one worker thread; it keeps idle HTTP/1.1 connections and open
//! HTTP/2 ones. `lease` gives a connection, `Lease::send` one exchange on it, `InBody` its frames; the
//! connection goes back by itself when the last frame was read, and is closed at once when any of
//! the three is dropped earlier: engines stop generating when their client leaves. Whole requests over
//! HTTP/1.1 are `lean`; hyper has HTTP/2, bodies that come while they are sent, and upgrades.
//! Nothing here judges: errors are facts (`SendError`, `ConnectError`).

mod body;
mod connect;
mod dns;
mod framing;
mod head;
mod keeper;
mod lean;
mod send;
mod tap;
#[cfg(test)]
mod tests;
mod tls;

pub use body::{OutBody, StreamedBody, UploadBroken};
pub use connect::{ConnectError, ConnectFailure, Lost, Target};
pub use dns::{Addresses, Resolver};
pub use send::{Answer, InBody, OutHead, SendError, SendFailure, Sending};
pub use tap::Traffic;
pub use tls::{Tls, read_certificates, read_key};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::Duration;

use http::{HeaderMap, header};
use hyper::client::conn::{http1, http2};
use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::task::AbortHandle;

use crate::clock;
use crate::policy::Moment;
use crate::upstream::connect::Opened;
use crate::upstream::keeper::Keeper;
use crate::upstream::lean::Lean;

/// Streams one HTTP/2 connection carries before another is opened beside it.
const H2_STREAMS_PER_CONNECTION: usize = 100;
/// Idle HTTP/1.1 connections kept per backend and worker.
const IDLE_MAX: usize = 1024;

/// The connections of one worker to one backend.
#[derive(Default)]
pub struct Lane {
    /// Latest last: the warmest is taken first, the coldest die of age.
    idle: Mutex<Vec<Idle>>,
    keeper: Keeper,
    h2: Mutex<Vec<Arc<H2>>>,
    /// Keeps a burst from opening one HTTP/2 connection per request.
    h2_opening: tokio::sync::Mutex<()>,
    /// Grows with each `close_kept`: what was begun before is not kept after.
    era: AtomicU64,
}

/// A kept HTTP/1.1 connection.
struct Idle {
    connection: Box<Lean>,
    since: Moment,
}

/// An HTTP/1.1 connection for one exchange that is hyper's; dropping it closes the socket.
struct H1 {
    sender: http1::SendRequest<OutBody>,
    traffic: Arc<Traffic>,
    _task: Task,
}

/// A shared HTTP/2 connection; closed when the last of its users lets go.
struct H2 {
    sender: http2::SendRequest<OutBody>,
    traffic: Arc<Traffic>,
    streams: AtomicUsize,
    _task: Task,
}

/// Counts a connection while it lives.
struct OpenCount(IntGauge);

impl OpenCount {
    fn new(open: &IntGauge) -> Self {
        open.inc();
        Self(open.clone())
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The task that drives a connection; it ends with its owner.
struct Task {
    driver: AbortHandle,
    _open: OpenCount,
}

impl Task {
    fn new(driver: AbortHandle, open: &IntGauge) -> Self {
        Self { driver, _open: OpenCount::new(open) }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A connection for one exchange.
pub struct Lease {
    connection: Leased,
    lane: Arc<Lane>,
    reused: bool,
}

enum Leased {
    Lean(Box<Lean>),
    H1(H1),
    H2(H2Stream),
}

/// One of the streams of a shared connection, counted while it lives.
struct H2Stream(Arc<H2>);

impl H2Stream {
    fn new(connection: Arc<H2>) -> Self {
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Self(connection)
    }
}

impl Drop for H2Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Which connection will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// A kept one if there is any.
    Any,
    /// A kept one whose peer says what it has processed when it goes away (HTTP/2), else a new one: the
    /// request may not be sent twice.
    Sure,
    /// A new one: a kept one has just failed the request.
    Fresh,
    /// The same, for a body that comes while it is sent.
    Streamed,
    /// A new HTTP/1.1 one that may be switched to another protocol.
    Upgradable,
}

impl Want {
    /// What the lean connection cannot do.
    fn needs_hyper(self) -> bool {
        matches!(self, Self::Streamed | Self::Upgradable)
    }
}

impl Lane {
    /// A connection to `target`.
    ///
    /// # Errors
    /// Facts of why none stands, see `ConnectFailure`.
    pub async fn lease(self: &Arc<Self>, target: &Target, want: Want) -> Result<Lease, ConnectError> {
        let kept = match want {
            Want::Any => self.kept(target.idle),
            Want::Sure | Want::Streamed => self.kept_h2().map(Leased::H2),
            Want::Fresh | Want::Upgradable => None,
        };
        if let Some(connection) = kept {
            return Ok(Lease { connection, lane: self.clone(), reused: true });
        }
        // Boxed: opening is rare and its state is kilobytes, which every exchange would carry about.
        let (connection, reused) = Box::pin(self.open_one(target, want)).await?;
        Ok(Lease { connection, lane: self.clone(), reused })
    }

    async fn open_one(self: &Arc<Self>, target: &Target, want: Want) -> Result<(Leased, bool), ConnectError> {
        if want != Want::Upgradable && target.prefers_h2() {
            return self.open_h2(target, want).await;
        }
        Ok((self.open(target, want).await?, false))
    }

    /// Closes every kept connection: the backend was ejected, or its process or address has changed. Those
    /// in use are closed when their exchange ends.
    pub fn close_kept(&self) {
        self.era.fetch_add(1, Ordering::AcqRel);
        self.idle.lock().clear();
        self.h2.lock().clear();
    }

    /// Closes connections that were idle for `idle_max` or longer. Called by the worker's tick.
    pub fn reap(&self, idle_max: Duration) {
        let now = clock::now();
        self.idle.lock().retain(|kept| now.since(kept.since) < idle_max);
        // Of the HTTP/2 ones that a burst left behind without a stream, one is enough.
        let mut spare = false;
        self.h2.lock().retain(|kept| {
            let idle = kept.streams.load(Ordering::Relaxed) == 0;
            !kept.sender.is_closed() && (!idle || !std::mem::replace(&mut spare, true))
        });
    }

    /// Idle connections kept now.
    pub fn idle(&self) -> usize {
        self.idle.lock().len()
    }

    fn kept(&self, idle_max: Duration) -> Option<Leased> {
        if let Some(lean) = self.kept_h1(idle_max) {
            return Some(Leased::Lean(lean));
        }
        self.kept_h2().map(Leased::H2)
    }

    fn kept_h1(&self, idle_max: Duration) -> Option<Box<Lean>> {
        loop {
            let mut idle = self.idle.lock();
            let mut kept = idle.pop()?;
            if clock::now().since(kept.since) >= idle_max {
                // Everything below is older still.
                idle.clear();
                return None;
            }
            drop(idle);
            if kept.connection.is_quiet(Waker::noop()) {
                return Some(kept.connection);
            }
            kept.connection.traffic.closed();
        }
    }

    /// Drops the kept connections that their peers have closed. Those that stand wake `waker` when they are.
    fn drop_closed(&self, waker: &Waker) {
        let closed: Vec<Idle> =
            self.idle.lock().extract_if(.., |kept| !kept.connection.is_quiet(waker)).collect();
        for kept in closed {
            kept.connection.traffic.closed();
        }
    }

    fn kept_h2(&self) -> Option<H2Stream> {
        let mut open = self.h2.lock();
        if open.is_empty() {
            return None;
        }
        open.retain(|kept| !kept.sender.is_closed());
        let free = open.iter().find(|kept| kept.streams.load(Ordering::Relaxed) < H2_STREAMS_PER_CONNECTION);
        // Counted under the lock: the next one to look sees it.
        free.cloned().map(H2Stream::new)
    }

    /// Opens one connection for all who are waiting for one.
    async fn open_h2(self: &Arc<Self>, target: &Target, want: Want) -> Result<(Leased, bool), ConnectError> {
        let _turn = self.h2_opening.lock().await;
        if want != Want::Fresh
            && let Some(h2) = self.kept_h2()
        {
            return Ok((Leased::H2(h2), true));
        }
        Ok((self.open(target, want).await?, false))
    }

    async fn open(&self, target: &Target, want: Want) -> Result<Leased, ConnectError> {
        let era = self.era.load(Ordering::Acquire);
        Ok(match connect::open(target, want).await? {
            Opened::Lean(mut lean) => {
                lean.era = era;
                Leased::Lean(lean)
            }
            Opened::H1(h1) => Leased::H1(h1),
            Opened::H2(h2) => {
                let h2 = Arc::new(h2);
                let mut open = self.h2.lock();
                // Shared at once. The lock orders this against `close_kept`.
                if era == self.era.load(Ordering::Acquire) {
                    open.push(h2.clone());
                }
                Leased::H2(H2Stream::new(h2))
            }
        })
    }

    /// Keeps a connection for the next request, if there can be one.
    fn keep(self: &Arc<Self>, mut connection: Box<Lean>) {
        if !connection.is_reusable() {
            return;
        }
        if !connection.is_quiet(&self.keeper.waker(self)) {
            connection.traffic.closed();
            return;
        }
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_MAX && connection.era == self.era.load(Ordering::Acquire) {
            idle.push(Idle { connection, since: clock::now() });
        }
    }
}

/// Whether a head says that its connection ends with the message.
fn says_close(headers: &HeaderMap) -> bool {
    // Nearly no head has the field, and looking for one is cheaper than looking for several.
    headers.contains_key(header::CONNECTION)
        && headers.get_all(header::CONNECTION).iter().any(|value| lists_close(value.as_bytes()))
}

/// The same of one value of `Connection`.
fn lists_close(value: &[u8]) -> bool {
    value.split(|&byte| byte == b',').any(|word| word.trim_ascii().eq_ignore_ascii_case(b"close"))
}

impl Lease {
    /// Whether the connection has served another exchange before: its peer may have closed it since.
    pub fn reused(&self) -> bool {
        self.reused
    }

    /// Whether HTTP/2 is spoken on it.
    pub fn is_h2(&self) -> bool {
        matches!(self.connection, Leased::H2(_))
    }

    /// Puts an unused connection back.
    pub fn give_back(self) {
        if let Leased::Lean(lean) = self.connection {
            self.lane.keep(lean);
        }
    }

    /// Counts of the connection, to be watched while an exchange is under way.
    pub fn traffic(&self) -> Arc<Traffic> {
        match &self.connection {
            Leased::Lean(lean) => lean.traffic.clone(),
            Leased::H1(h1) => h1.traffic.clone(),
            Leased::H2(stream) => stream.0.traffic.clone(),
        }
    }
}
