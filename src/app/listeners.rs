//! The listening sockets through reloads: bound before a configuration is in force, retired after.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::admin::ListenerStatus;
use crate::app::operator::Operator;
use crate::app::workers::Workers;
use crate::config::{self, Change, Config};
use crate::reload::Follower;
use crate::server::{self, Bound, Bounds, Claim, Clients, Listening};
use crate::telemetry::Telemetry;

/// Every address clients may connect to.
pub(super) struct Listeners {
    open: Mutex<Vec<Open>>,
    workers: Arc<Workers>,
    clients: Arc<Clients>,
    telemetry: Arc<Telemetry>,
}

#[derive(Clone)]
struct Open {
    configured: SocketAddr,
    /// Port 0 has become a port.
    actual: SocketAddr,
    listening: Arc<Listening>,
}

/// A listener whose sockets are bound and whose certificate was read.
struct Ready {
    configured: SocketAddr,
    bound: Bound,
    listening: Arc<Listening>,
}

impl Listeners {
    pub(super) fn new(workers: Arc<Workers>, clients: Arc<Clients>, telemetry: Arc<Telemetry>) -> Self {
        Self { open: Mutex::default(), workers, clients, telemetry }
    }

    /// Opens all of a first configuration, or none.
    pub(super) fn open(&self, listeners: &[config::Listener]) -> io::Result<()> {
        let fresh = |listener| self.make_ready(listener, Claim::Fresh);
        let ready = listeners.iter().map(fresh).collect::<io::Result<Vec<_>>>()?;
        ready.into_iter().for_each(|ready| self.start(ready));
        Ok(())
    }

    /// Where clients connect, in the order of opening.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.open.lock().iter().map(|open| open.actual).collect()
    }

    /// The same, for the status page.
    pub(super) fn status(&self) -> Vec<ListenerStatus> {
        let open = self.open.lock();
        open.iter().map(|o| ListenerStatus { address: o.actual, tls: o.listening.is_tls() }).collect()
    }

    fn make_ready(&self, listener: &config::Listener, claim: Claim) -> io::Result<Ready> {
        let listening = Listening::new(listener, &self.telemetry)?;
        let workers = NonZeroUsize::new(self.workers.len()).unwrap_or(NonZeroUsize::MIN);
        let bound = server::bind(listener.address, workers, claim)?;
        Ok(Ready { configured: listener.address, bound, listening })
    }

    fn start(&self, ready: Ready) {
        let Ready { configured, bound, listening } = ready;
        self.workers.listen(bound.sockets, &listening);
        listening.announce(bound.address, &self.telemetry);
        self.open.lock().push(Open { configured, actual: bound.address, listening });
    }

    fn retire(&self, gone: &[SocketAddr]) {
        let mut open = self.open.lock();
        open.iter().filter(|open| gone.contains(&open.configured)).for_each(|open| {
            open.listening.retired().trigger();
            self.telemetry.metrics.retire_listener(open.listening.name());
        });
        open.retain(|open| !gone.contains(&open.configured));
    }
}

/// What of a running evergate follows a configuration, besides the pools.
pub(super) struct Following {
    pub(super) listeners: Arc<Listeners>,
    pub(super) operator: Arc<Operator>,
}

impl Follower for Following {
    fn prepare(&self, new: &Config, changes: &[Change]) -> Result<Box<dyn FnOnce() + Send>, String> {
        let listeners = self.listeners.clone();
        let operator = self.operator.clone();
        let added = |address: &SocketAddr| {
            changes
                .iter()
                .any(|change| matches!(change, Change::ListenerAdded { address: a } if a == address))
        };
        let gone: Vec<SocketAddr> = changes
            .iter()
            .filter_map(|change| match change {
                Change::ListenerRemoved { address } => Some(*address),
                _ => None,
            })
            .collect();
        // From `0.0.0.0` to one address, say: the port is still ours when the new socket is bound.
        let claim = |address: &SocketAddr| match gone.iter().any(|a| a.port() == address.port()) {
            true => Claim::Join,
            false => Claim::Fresh,
        };
        let ready = new
            .listeners
            .iter()
            .filter(|listener| added(&listener.address))
            .map(|listener| listeners.make_ready(listener, claim(&listener.address)))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|error| error.to_string())?;
        // Certificates of the others may have been renewed under the same name.
        let kept: Vec<config::Listener> =
            new.listeners.iter().filter(|listener| !added(&listener.address)).cloned().collect();
        for listener in &kept {
            if let Some(tls) = &listener.tls {
                server::check_tls(tls).map_err(|error| error.to_string())?;
            }
        }
        let moves = changes.iter().any(|change| matches!(change, Change::AdminMoved { .. }));
        let admin =
            moves.then(|| Operator::bind(new.admin.address)).transpose().map_err(|e| e.to_string())?;
        let bounds = Bounds::from(new);
        Ok(Box::new(move || {
            listeners.clients.set_bounds(bounds);
            ready.into_iter().for_each(|ready| listeners.start(ready));
            listeners.retire(&gone);
            if let Some(socket) = admin {
                operator.serve(socket);
            }
            let open = listeners.open.lock().clone();
            for listener in kept {
                let Some(open) = open.iter().find(|open| open.configured == listener.address) else {
                    continue;
                };
                if let Err(error) = open.listening.apply(&listener) {
                    // Read a moment ago; what it has stays.
                    tracing::error!(%error, listener = %open.configured, "the listener keeps its former certificate");
                }
            }
        }))
    }
}
