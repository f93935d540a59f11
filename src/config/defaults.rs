//! The defaults, each a decision with its reason. `docs/configuration.md` says what to watch.
//!
//! A configuration that says nothing gets every protection; what is off by default is off because
//! no number could be right for everybody (a total clock, a cap on one backend).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::time::Duration;

use http::uri::PathAndQuery;

use super::memory::memory_default;
use super::{
    AccessLogTarget, Admin, BackendClocks, ClientClocks, Generate, HealthPage, Limits, Listener, Load,
    LogFormat, Probe, ProbeKind, Scrape, Telemetry,
};
use crate::policy::moves::DrainClocks;

/// Longer than most streams need to end, shorter than the 30 s + slack orchestrators wait before SIGKILL.
pub(super) const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
/// The level at which a line is worth an operator's eyes.
const LOG_LEVEL: &str = "info";

/// One runtime per core that the container may use.
pub(super) fn workers() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Loopback: an address for the world is the operator's decision.
impl Default for Listener {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            tls: None,
            trusted_proxies: Vec::new(),
        }
    }
}

/// Loopback and no token: who is on the machine may operate it.
impl Default for Admin {
    fn default() -> Self {
        Self { address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9901), token: None }
    }
}

/// Of kind `http`.
impl Default for Probe {
    fn default() -> Self {
        Self {
            kind: ProbeKind::Http,
            page: HealthPage::default(),
            interval: Duration::from_secs(5),
            interval_unsteady: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
        }
    }
}

/// Of kinds `generate` and `canary`: it costs a prefill and waits in the engine's queue.
pub(super) const GENERATE_INTERVAL: Duration = Duration::from_secs(30);
/// A backend on its way back is worth a token every other second.
pub(super) const GENERATE_INTERVAL_UNSTEADY: Duration = Duration::from_secs(2);

/// The page most engines have.
impl Default for HealthPage {
    fn default() -> Self {
        Self { preset: None, path: PathAndQuery::from_static("/health"), statuses: Vec::new(), body: None }
    }
}

impl Default for Generate {
    fn default() -> Self {
        Self {
            endpoint: "/v1/chat/completions".to_owned(),
            model: None,
            prompt: "Hi".to_owned(),
            expect: None,
            // A token behind a long prefill; one that takes longer is no use to a client either.
            deadline: Duration::from_secs(10),
        }
    }
}

impl Default for Load {
    fn default() -> Self {
        Self { scrape: Scrape::Off, interval: Duration::from_secs(1) }
    }
}

impl Default for BackendClocks {
    fn default() -> Self {
        Self {
            // One lost SYN is sent again after 1 s; two lost mean another backend is the better bet.
            connect: Duration::from_secs(2),
            connect_tls: Duration::from_secs(3),
            write_idle: Duration::from_secs(10),
            head: Duration::from_secs(10),
            // A long prompt on a busy replica; suspicion (hedge, verify) comes much earlier.
            first_token: Duration::from_secs(120),
            answer: Duration::from_secs(600),
            inter_token: Duration::from_secs(15),
            silence_max: Duration::from_secs(300),
            drain: DrainClocks {
                // Most answers end by themselves in that time, and moving costs a peer a prefill or the whole answer.
                move_after: Duration::from_secs(30),
                // Longer than nearly any answer takes; whoever waits for an idle replica waits no longer than this.
                end_after: Duration::from_secs(600),
            },
            body_idle: Duration::from_secs(15),
            total: None,
            // uvicorn and llama.cpp close at 5 s.
            idle: Duration::from_secs(4),
            h2_ping: Duration::from_secs(5),
            h2_ping_timeout: Duration::from_secs(2),
            dns_min: Duration::from_secs(5),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            head_bytes_max: 64 << 10,
            headers_max: 100,
            // Images and audio travel in base64 inside JSON.
            body_bytes_max: 256 << 20,
            replay_body_max: 16 << 20,
            held_body_max: 16 << 20,
            event_bytes_max: 1 << 20,
            memory_max: memory_default(),
            h2_streams_max: 256,
        }
    }
}

impl Default for ClientClocks {
    fn default() -> Self {
        Self {
            // Longer than the 60 s after which common load balancers reuse no more.
            idle: Duration::from_secs(75),
            head: Duration::from_secs(10),
            upload_idle: Duration::from_secs(30),
            slow_reader: Duration::from_secs(60),
        }
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            log_level: LOG_LEVEL.to_owned(),
            log_format: LogFormat::Auto,
            access_log: AccessLogTarget::Stdout,
        }
    }
}
