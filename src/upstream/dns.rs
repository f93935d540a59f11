//! Where a backend's name points: looked up by TTL, the last good answer kept for as long as it takes.
//!
//! A name service that is down or answers nothing never empties a backend (failures.md F03): the old
//! addresses stay, marked stale. Addresses written as numbers are never looked up.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{ResolverBuilder, TokioResolver};
use tokio::sync::Notify;

/// A TTL is never believed for longer than this: replicas move.
const TTL_MAX: Duration = Duration::from_secs(300);

/// The addresses of one backend.
pub struct Addresses {
    host: String,
    port: u16,
    known: ArcSwap<Vec<SocketAddr>>,
    stale: AtomicBool,
    turn: AtomicUsize,
    /// Rings when a look-up has ended, well or not.
    looked_up: Notify,
    failed: AtomicBool,
}

impl Addresses {
    /// Addresses of `host:port`; known at once when `host` is a number.
    pub fn new(host: &str, port: u16) -> Self {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let known = host.parse::<IpAddr>().map(|ip| vec![SocketAddr::new(ip, port)]).unwrap_or_default();
        Self {
            host,
            port,
            known: ArcSwap::from_pointee(known),
            stale: AtomicBool::new(false),
            turn: AtomicUsize::new(0),
            looked_up: Notify::new(),
            failed: AtomicBool::new(false),
        }
    }

    /// Whether the host is a number, so that nothing has to be looked up.
    pub fn is_literal(&self) -> bool {
        self.host.parse::<IpAddr>().is_ok()
    }

    /// The latest look-up failed and older addresses are in use.
    pub fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed)
    }

    /// The addresses to try, starting with the next in turn. Waits for the first look-up to end.
    ///
    /// # Errors
    /// When the name has never been resolved.
    pub async fn resolved(&self) -> io::Result<(Arc<Vec<SocketAddr>>, usize)> {
        loop {
            let ended = self.looked_up.notified();
            let known = self.known.load_full();
            if !known.is_empty() {
                let first = if known.len() == 1 { 0 } else { self.turn.fetch_add(1, Ordering::Relaxed) };
                let first = first % known.len();
                return Ok((known, first));
            }
            if self.failed.load(Ordering::Acquire) {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("{} has no address in the name service", self.host),
                ));
            }
            ended.await;
        }
    }

    /// What is known now, sorted; empty before the first good answer.
    pub fn known(&self) -> Arc<Vec<SocketAddr>> {
        self.known.load_full()
    }

    /// Looks the name up once. Returns for how long the answer holds.
    ///
    /// # Errors
    /// What the name service said; what was known before stays in use.
    pub async fn refresh(&self, resolver: &Resolver) -> io::Result<Duration> {
        let answer = resolver.lookup(&self.host).await.and_then(|(addresses, ttl)| {
            let mut sockets: Vec<_> =
                addresses.into_iter().map(|ip| SocketAddr::new(ip, self.port)).collect();
            sockets.sort_unstable();
            sockets.dedup();
            if sockets.is_empty() { Err(io::Error::other("an empty answer")) } else { Ok((sockets, ttl)) }
        });
        let holds = match answer {
            Ok((sockets, ttl)) => {
                if *self.known.load_full() != sockets {
                    self.known.store(Arc::new(sockets));
                }
                self.stale.store(false, Ordering::Relaxed);
                Ok(ttl.min(TTL_MAX))
            }
            Err(e) => {
                self.stale.store(true, Ordering::Relaxed);
                self.failed.store(true, Ordering::Release);
                Err(e)
            }
        };
        self.looked_up.notify_waiters();
        holds
    }
}

/// The name service of this machine.
pub struct Resolver {
    /// None where `resolv.conf` cannot be read. The C library's resolver is no substitute: a static
    /// binary must not call it.
    hickory: Option<TokioResolver>,
}

impl Resolver {
    /// A resolver by the machine's configuration (`resolv.conf` and the hosts file).
    pub fn system() -> Self {
        Self { hickory: TokioResolver::builder_tokio().and_then(build).ok() }
    }

    /// A resolver that asks one name server, and nobody else.
    pub fn asking(server: SocketAddr) -> Self {
        let mut config = NameServerConfig::udp(server.ip());
        config.connections.iter_mut().for_each(|connection| connection.port = server.port());
        let config = ResolverConfig::from_name_servers(vec![config]);
        Self {
            hickory: build(TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())).ok(),
        }
    }

    async fn lookup(&self, host: &str) -> io::Result<(Vec<IpAddr>, Duration)> {
        let failure = match &self.hickory {
            Some(hickory) => match hickory.lookup_ip(host).await {
                Ok(answer) => {
                    return Ok((answer.iter().collect(), crate::clock::until(answer.valid_until())));
                }
                Err(e) => io::Error::other(e),
            },
            None => io::Error::other("no name service: /etc/resolv.conf cannot be read"),
        };
        // RFC 6761 §6.3: this one name is known without asking anyone.
        if host.eq_ignore_ascii_case("localhost") {
            return Ok((vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()], TTL_MAX));
        }
        Err(failure)
    }
}

fn build(mut builder: ResolverBuilder<TokioRuntimeProvider>) -> Result<TokioResolver, NetError> {
    // A name that does not exist yet may the moment its replica has started: that answer is not kept. How often
    // it is asked for is the caller's to bound.
    builder.options_mut().negative_max_ttl = Some(Duration::ZERO);
    builder.build()
}
