//! What evergate runs by, validated: every value here has been checked and has its default.
//!
//! `file` reads TOML as typed places that know their line and key path, `validate` says what they
//! mean and collects every error, `effective` writes the result back with all its defaults, `diff`
//! compares two of them. A policy's parameters are the policy's own type, built here: config knows
//! policy, never the reverse.

mod defaults;
mod diff;
mod effective;
mod error;
mod file;
mod files;
mod keys;
mod load;
mod memory;
mod source;
#[cfg(test)]
mod tests;
mod units;
mod validate;

pub use diff::{Change, Effect, diff};
pub use error::{ConfigError, ConfigErrors};
pub use keys::known_keys;
pub use load::{from_flags, load, parse, telemetry_flags};
pub use source::{Overrides, Source};

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, HeaderValue};
use ipnet::IpNet;

use crate::policy::admission::QueuePolicy;
use crate::policy::balance::BalancePolicy;
use crate::policy::dialect::Engine;
use crate::policy::fallback::Fallback;
use crate::policy::health::HealthPolicy;
use crate::policy::moves::DrainClocks;
use crate::policy::outlier::OutlierPolicy;
use crate::policy::progress::ProgressPolicy;
use crate::policy::resume::ResumePolicy;
use crate::policy::retry::RetryPolicy;
use crate::policy::route::Route;

/// Reads a duration as the file writes it: `"30s"`, `"1m30s"`. For flags.
pub fn parse_duration(text: &str) -> Option<Duration> {
    units::duration(text)
}

/// Everything one running evergate needs to know. Swapped whole on reload.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Data-plane threads, each with its own runtime. Default: one per available core.
    /// Changing it needs a restart.
    pub workers: NonZeroUsize,
    /// Where clients connect. Default: one on 127.0.0.1:8080.
    pub listeners: Vec<Listener>,
    /// The operator's own address.
    pub admin: Admin,
    /// At least one; names are unique.
    pub pools: Vec<Pool>,
    /// Tried in order before model names decide.
    pub routes: Vec<Route>,
    /// Sizes and counts that bound what one client or one request may take.
    pub limits: Limits,
    /// Clocks of the client side.
    pub client_clocks: ClientClocks,
    /// Logs and access records.
    pub telemetry: Telemetry,
    /// How long running work may go on after SIGTERM. Default 30 s.
    pub drain_deadline: Duration,
}

/// One address clients connect to.
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// Default 127.0.0.1:8080.
    pub address: SocketAddr,
    /// Without it the listener speaks plain HTTP/1.1 and HTTP/2 by prior knowledge.
    pub tls: Option<ListenerTls>,
    /// Peers whose `Forwarded` and `X-Forwarded-*` are believed and extended; those of all others are replaced.
    pub trusted_proxies: Vec<IpNet>,
}

/// Certificate and key a listener shows; ALPN offers h2 and http/1.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTls {
    /// PEM, leaf first. Read again on reload.
    pub certificate: PathBuf,
    /// PEM, PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}

/// The operator's listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Default 127.0.0.1:9901.
    pub address: SocketAddr,
    /// Bearer token for calls that change state. Needed when the address is not loopback: without it they are refused there.
    pub token: Option<Secret>,
}

/// A named set of interchangeable backends.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Unique. Default `default` for the only pool.
    pub name: String,
    /// At least one; names are unique in the pool.
    pub backends: Vec<Backend>,
    /// Model names this pool serves, beyond those its backends list at `/v1/models`. Empty: whatever they list.
    pub models: Vec<String>,
    /// Client's model name → the name sent to the backends.
    pub aliases: Vec<(String, String)>,
    /// How a backend is chosen.
    pub balance: BalancePolicy,
    /// How a backend is judged.
    pub health: HealthPolicy,
    /// Active checks.
    pub probe: Probe,
    /// What backends say of their own load.
    pub load: Load,
    /// When silence is suspicious, and how much of it may be hedged.
    pub progress: ProgressPolicy,
    /// When a backend is slower than its peers.
    pub outlier: OutlierPolicy,
    /// Whether a broken stream goes on elsewhere, and how.
    pub resume: ResumePolicy,
    /// What may be sent again, how often.
    pub retry: RetryPolicy,
    /// How exchanges wait for a free slot.
    pub queue: QueuePolicy,
    /// Clocks of the backend side.
    pub clocks: BackendClocks,
    /// Private roots, client certificate, server name for `https` backends.
    pub tls: UpstreamTls,
    /// Which HTTP version the backends are spoken to in.
    pub http: UpstreamHttp,
    /// Other pools that may take its requests, in order. Default none.
    pub fallbacks: Vec<Fallback>,
}

/// One member of a pool: one address serving one replica.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// Unique in the pool. Default: its `host:port`.
    pub name: String,
    /// `https` scheme was given.
    pub secure: bool,
    /// Host and port; the port has its default by scheme.
    pub authority: Authority,
    /// Prefix put before every path, from the path of the URL; empty for none.
    pub path_prefix: String,
    /// Share of traffic relative to its peers. Default 1, 1..=1000.
    pub weight: NonZeroU32,
    /// A higher tier is used only when no lower one can serve. Default 0.
    pub tier: u8,
    /// Most unfinished attempts at a time. Default none.
    pub in_flight_max: Option<NonZeroU32>,
    /// Set on every request to this backend, replacing the client's: credentials, tenants. Values may be secret.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Whether `headers` carries credentials of the backend's own (`authorization`, `x-api-key`, `api-key`).
    pub own_credentials: bool,
    /// `disabled = true` keeps it listed but unused. Default enabled.
    pub disabled: bool,
}

/// Active checks of a pool's backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What is asked.
    pub kind: ProbeKind,
    /// The page that tells the health: what `Http` asks, and, under `Generate`, a probe on demand, which has no time
    /// for a token.
    pub page: HealthPage,
    /// Default 5 s, 30 s for `Generate`, ±20 % jitter.
    pub interval: Duration,
    /// While in transition, and for the first minute of being unhealthy. Default 1 s, 2 s for `Generate`.
    pub interval_unsteady: Duration,
    /// For one answer of the page. Default 1 s.
    pub timeout: Duration,
}

/// The kinds of probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeKind {
    /// The health page.
    Http,
    /// A token, or a text: asked as a client would.
    Generate(Generate),
    /// A connection stands.
    Tcp,
    /// No probes: traffic alone judges.
    Off,
}

/// Where a backend tells its health, and what passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthPage {
    /// The engine by whose documentation path and statuses were chosen. Default none: both are a guess, or written.
    pub preset: Option<Engine>,
    /// Default `/health`, or the engine's.
    pub path: PathAndQuery,
    /// Statuses that pass, without a preset; empty: any below 500, a 404 being a weak pass.
    pub statuses: Vec<u16>,
    /// Text the body must contain.
    pub body: Option<String>,
}

/// A probe that wants something generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generate {
    /// Path, and by it the dialect; `{model}` stands for the model. Default by preset, else `/v1/chat/completions`.
    pub endpoint: String,
    /// Default: the pool's first configured or listed.
    pub model: Option<String>,
    /// Default a word.
    pub prompt: String,
    /// The text a greedy answer must begin with; none: one token of any kind will do.
    pub expect: Option<String>,
    /// For the whole answer. Default 10 s.
    pub deadline: Duration,
}

/// What backends say of their own load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Where it is read. Default nowhere.
    pub scrape: Scrape,
    /// Between two readings. Default 1 s.
    pub interval: Duration,
}

/// Where a backend's load is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scrape {
    /// Nowhere. The default: requests of our own are counted here, exactly and at once; reading a page each second
    /// costs an engine more than it tells, unless others send it work too.
    #[default]
    Off,
    /// `/metrics`; seldom where that says nothing of an engine's.
    Auto,
    /// This page.
    Path(PathAndQuery),
}

/// Clocks of one attempt. See docs/configuration.md for what each expiry does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendClocks {
    /// TCP connection. Default 2 s.
    pub connect: Duration,
    /// TCP connection and TLS handshake. Default 3 s.
    pub connect_tls: Duration,
    /// A backend that does not read the request. Default 10 s.
    pub write_idle: Duration,
    /// The whole response head, from its first byte. Default 10 s.
    pub head: Duration,
    /// First token of a stream. Default 120 s.
    pub first_token: Duration,
    /// Response head of a request that does not stream. Default 600 s.
    pub answer: Duration,
    /// Silence between two events of a stream; then another backend is asked beside the silent one. Default 15 s.
    pub inter_token: Duration,
    /// Longest silence of a stream whose backend verifies alive. Default 300 s.
    pub silence_max: Duration,
    /// When streams leave a backend that is drained or removed. Default: moved after 30 s, ended after 10 min.
    pub drain: DrainClocks,
    /// Silence inside a body that is not a token stream. Default 15 s.
    pub body_idle: Duration,
    /// The whole exchange. Default none.
    pub total: Option<Duration>,
    /// An idle kept connection is closed after this. Default 4 s (uvicorn and llama.cpp close at 5 s).
    pub idle: Duration,
    /// Idle HTTP/2 connection: PING after. Default 5 s.
    pub h2_ping: Duration,
    /// Idle HTTP/2 connection: PING answered within. Default 2 s.
    pub h2_ping_timeout: Duration,
    /// Names are resolved again after their TTL, but not sooner than this. Default 5 s.
    pub dns_min: Duration,
}

/// TLS towards the backends of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamTls {
    /// PEM bundle of private authorities, used instead of the public ones.
    pub ca: Option<PathBuf>,
    /// PEM client certificate and key.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Name asked for and verified, instead of the URL's host.
    pub server_name: Option<String>,
}

/// HTTP version towards the backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UpstreamHttp {
    /// HTTP/1.1, or HTTP/2 when ALPN over TLS chooses it. The default.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only, by prior knowledge on plain connections. gRPC backends need it.
    Http2,
}

/// Bounds of sizes and counts. Every one has a metric when it bites.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Client connections, all listeners. Default 10,000.
    pub connections_max: usize,
    /// Request head. Default 64 KiB → 431.
    pub head_bytes_max: usize,
    /// Header fields of a request. Default 100 → 431.
    pub headers_max: usize,
    /// Request body. Default 256 MiB → 413.
    pub body_bytes_max: u64,
    /// Part of a request body kept for replay. Default 16 MiB.
    pub replay_body_max: usize,
    /// JSON answer of an inference endpoint held back until whole. Default 16 MiB.
    pub held_body_max: usize,
    /// One event of a token stream. Default 1 MiB.
    pub event_bytes_max: usize,
    /// Replay bodies and held bodies together. Default half the cgroup limit, else 1 GiB.
    pub memory_max: u64,
    /// Concurrent HTTP/2 streams of one client connection. Default 256.
    pub h2_streams_max: u32,
}

/// Clocks of the client side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientClocks {
    /// Between two requests. Default 75 s.
    pub idle: Duration,
    /// From the first byte of a head to its end, TLS handshake likewise. Default 10 s.
    pub head: Duration,
    /// Silence in an upload → 408. Default 30 s.
    pub upload_idle: Duration,
    /// A client that takes nothing of its answer. Default 60 s.
    pub slow_reader: Duration,
}

/// Logs and access records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// Default `info`; also `EVERGATE_LOG`.
    pub log_level: String,
    /// Default: pretty on a terminal, JSON elsewhere.
    pub log_format: LogFormat,
    /// Default stdout.
    pub access_log: AccessLogTarget,
}

/// Shape of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Pretty on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Where access records go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// Standard output.
    #[default]
    Stdout,
    /// Standard error.
    Stderr,
    /// Appended to a file.
    File(PathBuf),
    /// Nowhere.
    Off,
}

/// A value that is never shown: `Debug` and the effective configuration print `"***"`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret read from `${ENV}` or `file:`.
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The secret itself, for the one place that sends or compares it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("\"***\"")
    }
}
