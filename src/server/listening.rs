//! One address clients connect to, as all workers see it: what a reload may change under open sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;
use rustls::ServerConfig;

use super::tls;
use crate::config::Listener;
use crate::drain::Drain;
use crate::telemetry::Telemetry;
use crate::telemetry::events::ListenerStarted;
use crate::telemetry::metrics::ListenerMetrics;

/// A listener's state, shared by the workers that accept for it.
#[derive(Debug)]
pub struct Listening {
    name: Arc<str>,
    trusted_proxies: ArcSwap<Vec<IpNet>>,
    tls: ArcSwapOption<ServerConfig>,
    retired: Drain,
    pub(super) metrics: ListenerMetrics,
}

impl Listening {
    /// Reads certificate and key where configured; errors name the file. Blocking.
    pub fn new(listener: &Listener, telemetry: &Telemetry) -> io::Result<Arc<Self>> {
        let tls = listener.tls.as_ref().map(tls::load).transpose()?;
        let name = listener.address.to_string();
        Ok(Arc::new(Self {
            metrics: telemetry.metrics.listener(&name),
            name: name.into(),
            trusted_proxies: ArcSwap::from_pointee(listener.trusted_proxies.clone()),
            tls: ArcSwapOption::new(tls),
            retired: Drain::new(),
        }))
    }

    /// Its configured address.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Whether connections begin with TLS.
    pub fn is_tls(&self) -> bool {
        self.tls.load().is_some()
    }

    /// Takes over what a reload changed, for connections accepted from now on, and reads certificate
    /// and key again. On an error, which names the file, everything stays as it was. The address
    /// cannot change: that is another listener. Blocking.
    pub fn apply(&self, listener: &Listener) -> io::Result<()> {
        let tls = listener.tls.as_ref().map(tls::load).transpose()?;
        self.tls.store(tls);
        self.trusted_proxies.store(Arc::new(listener.trusted_proxies.clone()));
        Ok(())
    }

    /// Stops this listener alone, as a reload does that no longer knows it: trigger it, and its workers
    /// accept what waits, close their sockets and drain its connections.
    pub fn retired(&self) -> &Drain {
        &self.retired
    }

    /// Tells that it accepts connections at `address`. Once, after all workers were given their sockets.
    pub fn announce(&self, address: SocketAddr, telemetry: &Telemetry) {
        ListenerStarted { address, tls: self.is_tls(), role: "clients" }.emit(telemetry);
    }

    /// Whether `peer`, in its canonical form, is one of the trusted proxies.
    pub(super) fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted_proxies.load().iter().any(|net| net.contains(&peer))
    }

    pub(super) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.load_full()
    }
}
