//! The whole effective configuration as TOML, defaults included: what `evergate check` shows.
//!
//! Invariant: it parses again to an equal `Config`, unless it holds secrets, which are written as
//! `"***"` (and refused when read). Every struct is taken apart by name, so that a new field does
//! not compile until it is written here.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use super::units::{format_duration, format_size};
use super::validate::has_secret_name;
use super::{
    AccessLogTarget, Admin, Backend, BackendClocks, ClientClocks, Config, Generate, HealthPage, Limits,
    Listener, ListenerTls, Load, LogFormat, Pool, Probe, ProbeKind, Scrape, Telemetry, UpstreamHttp,
    UpstreamTls,
};
use crate::policy::admission::{LengthMax, QueuePolicy};
use crate::policy::balance::{AffinityKey, BalancePolicy};
use crate::policy::fallback::Fallback;
use crate::policy::health::HealthPolicy;
use crate::policy::moves::DrainClocks;
use crate::policy::outlier::OutlierPolicy;
use crate::policy::progress::ProgressPolicy;
use crate::policy::resume::ResumePolicy;
use crate::policy::retry::{Replay, RetryPolicy};
use crate::policy::route::Route;

/// What stands in place of a secret.
const MASK: &str = "\"***\"";

impl Config {
    /// The whole effective configuration as TOML. Secrets are written as `"***"`.
    pub fn effective_toml(&self) -> String {
        let Self {
            workers,
            listeners,
            admin,
            pools,
            routes,
            limits,
            client_clocks,
            telemetry,
            drain_deadline,
        } = self;
        let mut out = Writer::default();
        out.plain("workers", workers);
        out.duration("drain_deadline", *drain_deadline);
        listeners.iter().for_each(|each| listener(&mut out, each));
        admin_table(&mut out, admin);
        limits_table(&mut out, limits);
        client_table(&mut out, client_clocks);
        telemetry_table(&mut out, telemetry);
        pools.iter().for_each(|each| pool(&mut out, each));
        routes.iter().for_each(|each| route(&mut out, each));
        out.text
    }
}

/// A TOML string that reads as `text` and holds no reference to the environment.
pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.replace("${", "$${")).to_string()
}

#[derive(Default)]
struct Writer {
    text: String,
}

impl Writer {
    fn table(&mut self, header: &str) {
        self.line(format_args!("\n{header}"));
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }

    fn plain(&mut self, key: &str, value: impl Display) {
        self.line(format_args!("{key} = {value}"));
    }

    fn number(&mut self, key: &str, value: f64) {
        self.line(format_args!("{key} = {value:?}"));
    }

    fn string(&mut self, key: &str, value: impl AsRef<str>) {
        self.plain(key, quoted(value.as_ref()));
    }

    fn path(&mut self, key: &str, value: &std::path::Path) {
        self.string(key, value.to_string_lossy());
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        self.list(key, values.iter().map(|value| quoted(value)));
    }

    fn list(&mut self, key: &str, values: impl Iterator<Item = String>) {
        let values: Vec<String> = values.collect();
        self.plain(key, format_args!("[{}]", values.join(", ")));
    }

    fn inline(&mut self, key: &str, entries: impl Iterator<Item = (String, String)>) {
        let entries: Vec<String> =
            entries.map(|(name, value)| format!("{} = {value}", quoted_key(&name))).collect();
        if !entries.is_empty() {
            self.plain(key, format_args!("{{ {} }}", entries.join(", ")));
        }
    }

    fn duration(&mut self, key: &str, value: Duration) {
        self.string(key, format_duration(value));
    }

    fn size(&mut self, key: &str, value: usize) {
        self.size_u64(key, u64::try_from(value).unwrap_or(u64::MAX));
    }

    fn size_u64(&mut self, key: &str, value: u64) {
        self.string(key, format_size(value));
    }
}

/// Keys take no part in `${NAME}`.
fn quoted_key(name: &str) -> String {
    toml::Value::String(name.to_owned()).to_string()
}

fn listener(out: &mut Writer, listener: &Listener) {
    let Listener { address, tls, trusted_proxies } = listener;
    out.table("[[listener]]");
    out.string("address", address.to_string());
    out.list("trusted_proxies", trusted_proxies.iter().map(|network| quoted(&network.to_string())));
    if let Some(ListenerTls { certificate, key }) = tls {
        out.table("[listener.tls]");
        out.path("certificate", certificate);
        out.path("key", key);
    }
}

fn admin_table(out: &mut Writer, admin: &Admin) {
    let Admin { address, token } = admin;
    out.table("[admin]");
    out.string("address", address.to_string());
    if token.is_some() {
        out.plain("token", MASK);
    }
}

fn limits_table(out: &mut Writer, limits: &Limits) {
    let Limits {
        connections_max,
        head_bytes_max,
        headers_max,
        body_bytes_max,
        replay_body_max,
        held_body_max,
        event_bytes_max,
        memory_max,
        h2_streams_max,
    } = *limits;
    out.table("[limits]");
    out.plain("connections_max", connections_max);
    out.size("head_bytes_max", head_bytes_max);
    out.plain("headers_max", headers_max);
    out.size_u64("body_bytes_max", body_bytes_max);
    out.size("replay_body_max", replay_body_max);
    out.size("held_body_max", held_body_max);
    out.size("event_bytes_max", event_bytes_max);
    out.size_u64("memory_max", memory_max);
    out.plain("h2_streams_max", h2_streams_max);
}

fn client_table(out: &mut Writer, clocks: &ClientClocks) {
    let ClientClocks { idle, head, upload_idle, slow_reader } = *clocks;
    out.table("[client]");
    out.duration("idle", idle);
    out.duration("head", head);
    out.duration("upload_idle", upload_idle);
    out.duration("slow_reader", slow_reader);
}

fn telemetry_table(out: &mut Writer, telemetry: &Telemetry) {
    let Telemetry { log_level, log_format, access_log } = telemetry;
    out.table("[telemetry]");
    out.string("log_level", log_level);
    let format = match log_format {
        LogFormat::Auto => "auto",
        LogFormat::Pretty => "pretty",
        LogFormat::Json => "json",
    };
    out.string("log_format", format);
    match access_log {
        AccessLogTarget::Stdout => out.string("access_log", "stdout"),
        AccessLogTarget::Stderr => out.string("access_log", "stderr"),
        AccessLogTarget::Off => out.string("access_log", "off"),
        AccessLogTarget::File(path) => out.path("access_log", path),
    }
}

fn pool(out: &mut Writer, pool: &Pool) {
    let Pool {
        name,
        backends,
        models,
        aliases,
        balance,
        health,
        probe,
        load,
        resume,
        progress,
        outlier,
        retry,
        queue,
        clocks,
        tls,
        http,
        fallbacks,
    } = pool;
    out.table("[[pool]]");
    out.string("name", name);
    out.strings("models", models);
    let http = match http {
        UpstreamHttp::Auto => "auto",
        UpstreamHttp::Http1 => "1",
        UpstreamHttp::Http2 => "2",
    };
    out.string("http", http);
    out.inline("aliases", aliases.iter().map(|(alias, model)| (alias.clone(), quoted(model))));
    backends.iter().for_each(|each| backend(out, each));
    balance_table(out, balance);
    health_table(out, health);
    probe_table(out, probe);
    load_table(out, load);
    progress_table(out, progress);
    outlier_table(out, outlier);
    retry_table(out, retry);
    queue_table(out, queue);
    resume_table(out, resume);
    clocks_table(out, clocks);
    tls_table(out, tls);
    fallbacks.iter().for_each(|each| fallback(out, each));
}

fn backend(out: &mut Writer, backend: &Backend) {
    let Backend {
        name,
        secure,
        authority,
        path_prefix,
        weight,
        tier,
        in_flight_max,
        headers,
        own_credentials: _, // follows from `headers`
        disabled,
    } = backend;
    out.table("[[pool.backends]]");
    let scheme = if *secure { "https" } else { "http" };
    out.string("url", format!("{scheme}://{authority}{path_prefix}"));
    out.string("name", name);
    out.plain("weight", weight);
    out.plain("tier", tier);
    if let Some(most) = in_flight_max {
        out.plain("in_flight_max", most);
    }
    out.inline(
        "headers",
        headers.iter().map(|(name, value)| {
            let shown = value.to_str().ok().filter(|_| !value.is_sensitive());
            (name.as_str().to_owned(), shown.map_or_else(|| MASK.to_owned(), quoted))
        }),
    );
    out.plain("disabled", disabled);
}

fn balance_table(out: &mut Writer, balance: &BalancePolicy) {
    out.table("[pool.balance]");
    match balance {
        BalancePolicy::PowerOfTwo => out.string("strategy", "p2c"),
        BalancePolicy::RoundRobin => out.string("strategy", "round_robin"),
        BalancePolicy::LeastLoad => out.string("strategy", "least_load"),
        BalancePolicy::Weighted => out.string("strategy", "weighted"),
        BalancePolicy::ConsistentHash { key, bound } => {
            out.string("strategy", "consistent_hash");
            match key {
                AffinityKey::Header(name) => out.string("header", name.as_str()),
                AffinityKey::PromptPrefix { bytes } => out.size("prompt_bytes", *bytes),
            }
            out.number("bound", *bound);
        }
    }
}

fn health_table(out: &mut Writer, health: &HealthPolicy) {
    let HealthPolicy {
        probes: _, // follows from `[pool.probe]`
        fall,
        rise,
        eject_consecutive,
        success_rate_min,
        outcomes_min,
        peer_margin,
        window,
        ejection_min,
        ejection_max,
        ejection_decay,
        ejection_jitter,
        misconfigured_ejection,
        slow_start,
        slow_start_share_min,
        busy_min,
        busy_max,
        retry_after_max,
    } = *health;
    out.table("[pool.health]");
    out.plain("fall", fall);
    out.plain("rise", rise);
    out.plain("eject_consecutive", eject_consecutive);
    out.number("success_rate_min", success_rate_min);
    out.plain("outcomes_min", outcomes_min);
    out.number("peer_margin", peer_margin);
    out.duration("window", window);
    out.duration("ejection_min", ejection_min);
    out.duration("ejection_max", ejection_max);
    out.duration("ejection_decay", ejection_decay);
    out.number("ejection_jitter", ejection_jitter);
    out.duration("misconfigured_ejection", misconfigured_ejection);
    out.duration("slow_start", slow_start);
    out.number("slow_start_share_min", slow_start_share_min);
    out.duration("busy_min", busy_min);
    out.duration("busy_max", busy_max);
    out.duration("retry_after_max", retry_after_max);
}

fn probe_table(out: &mut Writer, probe: &Probe) {
    let Probe { kind, page, interval, interval_unsteady, timeout } = probe;
    out.table("[pool.probe]");
    let kind_name = match kind {
        ProbeKind::Http => "http",
        ProbeKind::Generate(Generate { expect: None, .. }) => "generate",
        ProbeKind::Generate(Generate { expect: Some(_), .. }) => "canary",
        ProbeKind::Tcp => "tcp",
        ProbeKind::Off => "off",
    };
    out.string("kind", kind_name);
    match kind {
        ProbeKind::Http => {
            let HealthPage { preset, path, statuses, body } = page;
            match preset {
                Some(engine) => out.string("preset", engine.name()),
                None => {
                    out.string("path", path.as_str());
                    out.list("statuses", statuses.iter().map(u16::to_string));
                }
            }
            if let Some(body) = body {
                out.string("body", body);
            }
        }
        ProbeKind::Generate(Generate { endpoint, model, prompt, expect, deadline }) => {
            if let Some(engine) = page.preset {
                out.string("preset", engine.name());
            }
            out.string("endpoint", endpoint);
            if let Some(model) = model {
                out.string("model", model);
            }
            out.string("prompt", prompt);
            if let Some(text) = expect {
                out.string("expect", text);
            }
            out.duration("deadline", *deadline);
        }
        ProbeKind::Tcp | ProbeKind::Off => {}
    }
    out.duration("interval", *interval);
    out.duration("interval_unsteady", *interval_unsteady);
    out.duration("timeout", *timeout);
}

fn load_table(out: &mut Writer, load: &Load) {
    let Load { scrape, interval } = load;
    out.table("[pool.load]");
    match scrape {
        Scrape::Off => out.string("scrape", "off"),
        Scrape::Auto => out.string("scrape", "auto"),
        Scrape::Path(path) => out.string("scrape", path.as_str()),
    }
    out.duration("interval", *interval);
}

fn progress_table(out: &mut Writer, progress: &ProgressPolicy) {
    let ProgressPolicy {
        first_token_min,
        first_token_unknown,
        token_gap_min,
        token_gap_unknown,
        factor,
        hedge_ratio,
    } = *progress;
    out.table("[pool.progress]");
    out.duration("first_token_min", first_token_min);
    out.duration("first_token_unknown", first_token_unknown);
    out.duration("token_gap_min", token_gap_min);
    out.duration("token_gap_unknown", token_gap_unknown);
    out.number("factor", factor);
    out.number("hedge_ratio", hedge_ratio);
}

fn outlier_table(out: &mut Writer, outlier: &OutlierPolicy) {
    let OutlierPolicy {
        ratio_min,
        eject_ratio_min,
        deviations_min,
        first_token_floor,
        token_gap_floor,
        samples_min,
        memory,
        factor_max,
        persistent,
    } = *outlier;
    out.table("[pool.outlier]");
    out.number("ratio_min", ratio_min);
    out.number("eject_ratio_min", eject_ratio_min);
    out.number("deviations_min", deviations_min);
    out.duration("first_token_floor", first_token_floor);
    out.duration("token_gap_floor", token_gap_floor);
    out.plain("samples_min", samples_min);
    out.duration("memory", memory);
    out.number("factor_max", factor_max);
    out.duration("persistent", persistent);
}

fn replay_name(replay: Replay) -> &'static str {
    match replay {
        Replay::Auto => "auto",
        Replay::Always => "always",
        Replay::Safe => "safe",
        Replay::Never => "never",
    }
}

fn retry_table(out: &mut Writer, retry: &RetryPolicy) {
    let RetryPolicy { attempts_max, budget_ratio, budget_floor, backoff_min, backoff_max, wait_max, replay } =
        *retry;
    out.table("[pool.retry]");
    out.plain("attempts_max", attempts_max);
    out.number("budget_ratio", budget_ratio);
    out.number("budget_floor", budget_floor);
    out.duration("backoff_min", backoff_min);
    out.duration("backoff_max", backoff_max);
    out.duration("wait_max", wait_max);
    out.string("replay", replay_name(replay));
}

fn resume_table(out: &mut Writer, resume: &ResumePolicy) {
    let ResumePolicy { mode, resumes_max, replay_tokens_max, journal_bytes_max, second_opinion } = *resume;
    out.table("[pool.resume]");
    out.string("mode", mode.name());
    out.plain("resumes_max", resumes_max);
    out.plain("replay_tokens_max", replay_tokens_max);
    out.size("journal_bytes_max", journal_bytes_max);
    out.plain("second_opinion", second_opinion);
}

fn queue_table(out: &mut Writer, queue: &QueuePolicy) {
    let QueuePolicy { wait_max, length_max, priority_header } = queue;
    out.table("[pool.queue]");
    out.duration("wait_max", *wait_max);
    match length_max {
        LengthMax::Auto => out.string("length_max", "auto"),
        LengthMax::Most(most) => out.plain("length_max", most),
    }
    out.string("priority_header", priority_header.as_str());
}

fn clocks_table(out: &mut Writer, clocks: &BackendClocks) {
    let BackendClocks {
        connect,
        connect_tls,
        write_idle,
        head,
        first_token,
        answer,
        inter_token,
        silence_max,
        drain: DrainClocks { move_after, end_after },
        body_idle,
        total,
        idle,
        h2_ping,
        h2_ping_timeout,
        dns_min,
    } = *clocks;
    out.table("[pool.clocks]");
    out.duration("connect", connect);
    out.duration("connect_tls", connect_tls);
    out.duration("write_idle", write_idle);
    out.duration("head", head);
    out.duration("first_token", first_token);
    out.duration("answer", answer);
    out.duration("inter_token", inter_token);
    out.duration("silence_max", silence_max);
    out.duration("drain_move", move_after);
    out.duration("drain_end", end_after);
    out.duration("body_idle", body_idle);
    if let Some(total) = total {
        out.duration("total", total);
    }
    out.duration("idle", idle);
    out.duration("h2_ping", h2_ping);
    out.duration("h2_ping_timeout", h2_ping_timeout);
    out.duration("dns_min", dns_min);
}

fn tls_table(out: &mut Writer, tls: &UpstreamTls) {
    let UpstreamTls { ca, client, server_name } = tls;
    if *tls == UpstreamTls::default() {
        return;
    }
    out.table("[pool.tls]");
    if let Some(ca) = ca {
        out.path("ca", ca);
    }
    if let Some((certificate, key)) = client {
        out.path("client_certificate", certificate);
        out.path("client_key", key);
    }
    if let Some(name) = server_name {
        out.string("server_name", name);
    }
}

fn fallback(out: &mut Writer, fallback: &Fallback) {
    let Fallback { pool, on, model } = fallback;
    out.table("[[pool.fallback]]");
    out.string("pool", pool);
    out.list("on", on.iter().map(|cause| quoted(cause.name())));
    if let Some(model) = model {
        out.string("model", model);
    }
}

fn route(out: &mut Writer, route: &Route) {
    let Route { pool, path_prefix, host, headers, models, replay, total, priority } = route;
    out.table("[[route]]");
    out.string("pool", pool);
    if let Some(prefix) = path_prefix {
        out.string("path_prefix", prefix);
    }
    if let Some(host) = host {
        out.string("host", host);
    }
    out.inline(
        "headers",
        headers.iter().map(|(name, value)| {
            let shown = if has_secret_name(name) { MASK.to_owned() } else { quoted(value) };
            (name.as_str().to_owned(), shown)
        }),
    );
    out.strings("models", models);
    if let Some(replay) = replay {
        out.string("replay", replay_name(*replay));
    }
    if let Some(total) = total {
        out.duration("total", *total);
    }
    if let Some(priority) = priority {
        out.string("priority", priority.name());
    }
}
