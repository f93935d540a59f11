//! What `GET /status` shows: the schema, and how it is filled. `docs/admin.md` explains each field.
//!
//! Fields are added, never renamed or given another meaning, while [`SCHEMA`] stays the same. Every field has
//! a default when read, so `evergate status` understands an older or a newer evergate.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::AdminState;
use crate::clock;
use crate::config;
use crate::policy::Moment;
use crate::policy::balance::BalancePolicy;
use crate::policy::health::{Administrative, Health, Operational, Panic, ProbeVerdict, Standing};
use crate::pool::{LastProbe, Member, Pool, Record};
use crate::telemetry::events::rfc3339;
use crate::telemetry::metrics::{AttemptOutcome, ProbeResult};

/// Number of this schema.
pub const SCHEMA: u32 = 1;

/// State of a backend whose output its peers have overruled.
const QUARANTINED: &str = "quarantined";

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// [`SCHEMA`] of whoever wrote it.
    pub schema: u32,
    /// Of evergate.
    pub version: String,
    /// Of the configuration in force; 1 is the one evergate started with.
    pub generation: u64,
    /// When it began to serve, RFC 3339.
    pub started: String,
    /// For how long it has.
    pub uptime_seconds: f64,
    /// It takes no new connections and finishes what runs.
    pub draining: bool,
    /// Where clients connect.
    pub listeners: Vec<ListenerStatus>,
    /// The file that a reload reads; none when started by flags alone.
    pub config_file: Option<String>,
    /// How the last reload ended.
    pub last_reload: Option<Value>,
    /// Why the file as it is now is not in force.
    pub refused_reload: Option<Value>,
    /// In the order of the file.
    pub pools: Vec<PoolStatus>,
    /// The latest, oldest first.
    pub events: Vec<Value>,
}

/// One address for clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// As bound.
    pub address: SocketAddr,
    /// Whether it speaks TLS.
    pub tls: bool,
}

/// One pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// How a backend is chosen: `p2c`, `round_robin`, …
    pub balance: String,
    /// Members that may receive a new attempt now.
    pub eligible: usize,
    /// All of them.
    pub members: usize,
    /// So few are eligible that the others carry one attempt each.
    pub panic: bool,
    /// Retries the budget would grant now.
    pub budget_left: f64,
    /// Exchanges waiting for a backend.
    pub waiting: i64,
    /// In the order of the file.
    pub backends: Vec<BackendStatus>,
}

/// One backend of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// What the operator wants: `enabled`, `draining`, `disabled`.
    pub admin: String,
    /// Whether it may receive a new attempt now, both axes together.
    pub eligible: bool,
    /// What it can do.
    #[serde(flatten)]
    pub health: StandingStatus,
    /// Unfinished attempts.
    pub in_flight: u32,
    /// Most of them at a time.
    pub in_flight_max: Option<u32>,
    /// A higher tier helps out only.
    pub tier: u8,
    /// Share of traffic relative to its peers.
    pub weight: u32,
    /// The models it lists itself.
    pub models_listed: Vec<String>,
    /// Judged by model, where the pool serves several.
    pub models: Vec<ModelStatus>,
    /// The latest probe.
    pub last_probe: Option<ProbeStatus>,
    /// Attempts ended since the process started, by outcome.
    pub attempts: BTreeMap<String, u64>,
    /// Its name could not be resolved again: older addresses are in use.
    pub addresses_stale: bool,
}

/// One model at one backend.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelStatus {
    /// Its name.
    pub name: String,
    /// As judged by its own requests.
    #[serde(flatten)]
    pub health: StandingStatus,
}

/// What a judge says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StandingStatus {
    /// `unknown`, `healthy`, `slow_start`, `unhealthy`, `refusing`, `ejected`, `awaits_probe`, `probation`; whatever
    /// else it is, `quarantined`.
    pub state: String,
    /// What may be sent there: `eligible`, `probation`, `busy`, `refusing`, `out`.
    pub standing: String,
    /// Share of its weight while eligible: below 1 in slow start.
    pub share: f64,
    /// Until a known end of being busy or ejected.
    pub until_seconds: Option<f64>,
    /// Of its recent outcomes; none while there are too few.
    pub success_rate: Option<f64>,
    /// For how long it has been in quarantine.
    pub quarantined_seconds: Option<f64>,
}

/// One probe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbeStatus {
    /// `pass`, `weak_pass`, `fail`, `refusing`.
    pub result: String,
    /// What it saw.
    pub saw: String,
    /// How long ago it ended.
    pub ago_seconds: f64,
    /// How long it took.
    pub took_seconds: f64,
}

impl Status {
    /// As things are now, with at most `events_max` events.
    pub(super) fn of(state: &AdminState, events_max: usize) -> Self {
        let now = clock::now();
        let snapshot = state.directory.snapshot();
        let report = |report: Option<Arc<_>>| report.and_then(|report| serde_json::to_value(&*report).ok());
        let events = state.directory.telemetry().events.latest();
        let uptime = now.since(state.started);
        Self {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: snapshot.generation,
            started: rfc3339(clock::wall().checked_sub(uptime).unwrap_or(std::time::UNIX_EPOCH)),
            uptime_seconds: seconds(uptime),
            draining: state.draining.is_draining(),
            listeners: (state.listeners)(),
            config_file: state.reloader.path().map(|path| path.display().to_string()),
            last_reload: report(state.reloader.latest()),
            refused_reload: report(state.reloader.refusal()),
            pools: snapshot.pools.iter().map(|pool| pool_status(pool, now)).collect(),
            events: events
                .iter()
                .skip(events.len().saturating_sub(events_max))
                .filter_map(|event| serde_json::to_value(&**event).ok())
                .collect(),
        }
    }
}

fn pool_status(pool: &Pool, now: Moment) -> PoolStatus {
    let enabled = pool.members.iter().filter(|member| is_enabled(member)).count();
    let eligible = pool.eligible();
    let metrics = &pool.state.metrics;
    PoolStatus {
        name: pool.config.name.clone(),
        balance: balance_name(&pool.config.balance).to_owned(),
        eligible,
        members: pool.members.len(),
        panic: Panic::judge(enabled, eligible) == Panic::Graded,
        budget_left: rounded(metrics.budget_left.get()),
        waiting: metrics.waiting.get(),
        backends: (0..pool.members.len()).map(|i| backend_status(pool, i, now)).collect(),
    }
}

fn backend_status(pool: &Pool, i: usize, now: Moment) -> BackendStatus {
    let member = &pool.members[i];
    let (backend, params) = (&member.backend, &member.params);
    let standing = pool.standing(i, None, now);
    BackendStatus {
        name: params.name.clone(),
        url: url(params),
        admin: backend.admin().name().to_owned(),
        eligible: is_enabled(member) && matches!(standing, Standing::Eligible { .. }),
        health: judged(backend.whole(), standing, now),
        in_flight: backend.in_flight(),
        in_flight_max: params.in_flight_max.map(std::num::NonZeroU32::get),
        tier: params.tier,
        weight: params.weight.get(),
        models_listed: backend.listed().map(|listed| listed.ids.clone()).unwrap_or_default(),
        models: backend
            .models()
            .into_iter()
            .map(|(name, record)| {
                let standing = record.standing(&pool.config.health, now);
                ModelStatus { name, health: judged(&record, standing, now) }
            })
            .collect(),
        last_probe: backend.last_probe().map(|probe| probe_status(&probe, now)),
        attempts: AttemptOutcome::ALL
            .iter()
            .map(|outcome| (outcome.name().to_owned(), backend.metrics.attempts(*outcome)))
            .collect(),
        addresses_stale: backend.addresses.is_stale(),
    }
}

fn probe_status(probe: &LastProbe, now: Moment) -> ProbeStatus {
    let result = match probe.verdict {
        ProbeVerdict::Pass => ProbeResult::Pass,
        ProbeVerdict::WeakPass => ProbeResult::WeakPass,
        ProbeVerdict::Fail => ProbeResult::Fail,
        ProbeVerdict::Refusing => ProbeResult::Refusing,
    };
    ProbeStatus {
        result: result.name().to_owned(),
        saw: probe.saw.clone(),
        ago_seconds: seconds(now.since(probe.at)),
        took_seconds: seconds(probe.took),
    }
}

fn judged(record: &Record, standing: Standing, now: Moment) -> StandingStatus {
    let (operational, success_rate) =
        record.read(|health: &Health| (health.operational(), health.success_rate(now)));
    let (name, share, until) = match standing {
        Standing::Eligible { share } => ("eligible", f64::from(share), None),
        Standing::Probation => ("probation", 0.0, None),
        Standing::Busy { until } => ("busy", 0.0, Some(until)),
        Standing::Refusing => ("refusing", 0.0, None),
        Standing::Out { until } => ("out", 0.0, until),
    };
    let until = match operational {
        Operational::Ejected { until } => Some(until),
        Operational::Unknown
        | Operational::Healthy
        | Operational::SlowStart
        | Operational::Unhealthy
        | Operational::Refusing
        | Operational::AwaitsProbe
        | Operational::Probation => until,
    };
    let quarantined = record.quarantined_since();
    StandingStatus {
        state: if quarantined.is_some() { QUARANTINED } else { operational.name() }.to_owned(),
        standing: name.to_owned(),
        share: rounded(share),
        until_seconds: until.filter(|until| *until != Moment::NEVER).map(|until| seconds(until.since(now))),
        success_rate: success_rate.map(rounded),
        quarantined_seconds: quarantined.map(|since| seconds(now.since(since))),
    }
}

pub(super) fn is_enabled(member: &Member) -> bool {
    member.backend.admin() == Administrative::Enabled
}

fn url(params: &config::Backend) -> String {
    let scheme = if params.secure { "https" } else { "http" };
    format!("{scheme}://{}{}", params.authority, params.path_prefix)
}

fn balance_name(policy: &BalancePolicy) -> &'static str {
    match policy {
        BalancePolicy::PowerOfTwo => "p2c",
        BalancePolicy::RoundRobin => "round_robin",
        BalancePolicy::LeastLoad => "least_load",
        BalancePolicy::Weighted => "weighted",
        BalancePolicy::ConsistentHash { .. } => "consistent_hash",
    }
}

fn seconds(duration: std::time::Duration) -> f64 {
    rounded(duration.as_secs_f64())
}

/// Thousandths are enough for people and for dashboards.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
