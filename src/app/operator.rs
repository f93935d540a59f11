//! The operator's listener through reloads and to the very end: while clients are drained, the operator watches.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::admin::{self, AdminState};
use crate::drain::{Drain, Phase};
use crate::telemetry::Telemetry;
use crate::telemetry::events::ListenerStarted;

/// For the answer that is under way on an address that was given up.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// Serves the admin address in force.
pub(super) struct Operator {
    telemetry: Arc<Telemetry>,
    /// Set before anything can move, taken at the end: what it shows is made of parts that know it.
    state: Mutex<Option<Arc<AdminState>>>,
    now: Mutex<Option<Open>>,
}

struct Open {
    address: SocketAddr,
    stop: Drain,
}

impl Operator {
    pub(super) fn new(telemetry: Arc<Telemetry>) -> Self {
        Self { telemetry, state: Mutex::default(), now: Mutex::default() }
    }

    /// A listening socket.
    pub(super) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
        let bound = TcpListener::bind(address).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        bound.map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))
    }

    /// What is shown and acted on.
    pub(super) fn shows(&self, state: AdminState) {
        *self.state.lock() = Some(Arc::new(state));
    }

    /// The end: answers no more, and lets go of everything.
    pub(super) fn close(&self) {
        self.state.lock().take();
        if let Some(last) = self.now.lock().as_ref() {
            while last.stop.trigger() != Phase::Done {}
        }
    }

    /// Where the operator connects.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.now.lock().as_ref().map(|open| open.address)
    }

    /// Answers on `socket` from now on, and no longer where it did. Within the control runtime.
    pub(super) fn serve(&self, socket: TcpListener) {
        let Some(state) = self.state.lock().clone() else { return };
        let opened = socket.local_addr().and_then(|a| Ok((a, tokio::net::TcpListener::from_std(socket)?)));
        let (address, listener) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                tracing::error!(%error, "the admin address cannot be served");
                return;
            }
        };
        let stop = Drain::new();
        tokio::spawn(admin::serve(listener, state, stop.watch()));
        ListenerStarted { address, tls: false, role: "admin" }.emit(&self.telemetry);
        if let Some(former) = self.now.lock().replace(Open { address, stop }) {
            tokio::spawn(async move {
                former.stop.trigger();
                tokio::time::sleep(LAST_ANSWER).await;
                former.stop.trigger();
            });
        }
    }
}
