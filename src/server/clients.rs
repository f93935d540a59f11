//! How many client connections there may be, over all workers and listeners.
//!
//! A connection holds a [`Place`] until its socket is closed. Where all are taken, whoever accepted one more
//! connection waits with it in hand, and so stops accepting: the rest waits in the kernel's queue, not here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::config::{ClientClocks, Config, Limits};
use crate::drain;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::ListenerMetrics;

/// What holds for all clients, shared by all workers: bounds that a reload may change, and the
/// connections that count against them.
#[derive(Debug)]
pub struct Clients {
    bounds: ArcSwap<Bounds>,
    open: AtomicUsize,
    /// Wait for a place. Closing a connection wakes somebody only where there is somebody.
    waiting: AtomicUsize,
    freed: Notify,
    /// Since the limit bit, until a tenth of the places is free again.
    full: AtomicBool,
}

/// The part of the configuration connections run by. A connection keeps what held when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Sizes and counts.
    pub limits: Limits,
    /// Clocks of the client side.
    pub clocks: ClientClocks,
}

impl From<&Config> for Bounds {
    fn from(config: &Config) -> Self {
        Self { limits: config.limits.clone(), clocks: config.client_clocks.clone() }
    }
}

impl Clients {
    /// Without connections.
    pub fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            bounds: ArcSwap::from_pointee(bounds),
            open: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            full: AtomicBool::new(false),
        })
    }

    /// Other bounds, for connections accepted from now on.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.bounds.store(Arc::new(bounds));
        self.freed.notify_waiters();
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn bounds(&self) -> Arc<Bounds> {
        self.bounds.load_full()
    }

    /// Waits until there are fewer connections than allowed and takes one of their places. Dropping
    /// the future takes nothing.
    pub(super) async fn take(&self, telemetry: &Telemetry) {
        if self.try_take(telemetry) {
            return;
        }
        let _waiting = Waiting::new(&self.waiting);
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Listening before asking: a place freed in between is not missed.
            freed.as_mut().enable();
            if self.try_take(telemetry) {
                return;
            }
            freed.await;
        }
    }

    /// Takes a place even if there is none: for connections that would be lost otherwise.
    pub(super) fn take_over_limit(&self) {
        self.open.fetch_add(1, Ordering::SeqCst);
    }

    /// Gives back a place that no connection came to use.
    pub(super) fn leave_unused(&self) {
        self.leave();
    }

    fn try_take(&self, telemetry: &Telemetry) -> bool {
        let max = self.bounds.load().limits.connections_max;
        let taken = self
            .open
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |open| (open < max).then_some(open + 1));
        match taken {
            Ok(before) => {
                if before < max - max / 10 && self.full.load(Ordering::Relaxed) {
                    self.full.store(false, Ordering::Relaxed);
                }
                true
            }
            Err(open) => {
                if !self.full.swap(true, Ordering::Relaxed) {
                    telemetry.metrics.count_limit("connections_max");
                    tracing::warn!(open, "connections_max reached: further clients wait to be accepted");
                }
                false
            }
        }
    }

    fn leave(&self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_waiters();
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::SeqCst);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A connection's place among the others, and what waits for its end. Dropping it leaves.
#[derive(Debug)]
pub(super) struct Place {
    clients: Arc<Clients>,
    open: prometheus::IntGauge,
    _drains: [drain::Guard; 2],
}

impl Place {
    /// For a connection that has [taken](Clients::take) one.
    pub(super) fn new(clients: Arc<Clients>, metrics: &ListenerMetrics, drains: [drain::Guard; 2]) -> Self {
        metrics.connections.inc();
        metrics.connections_open.inc();
        Self { clients, open: metrics.connections_open.clone(), _drains: drains }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.dec();
        self.clients.leave();
    }
}
