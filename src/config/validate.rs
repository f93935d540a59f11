//! From what was said to what it means: every key checked, every default filled in, every mistake found.
//!
//! One function a table, in the order of the file. A mistake records an error and carries on with
//! the default, so that one reading finds them all; the caller throws the result away when there
//! was any. Nothing here opens a socket or a certificate: see [`super::Config::check_files`].

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderName, HeaderValue, Uri};
use ipnet::IpNet;

use super::defaults;
use super::file::{Item, Table, Text};
use super::keys;
use super::{
    AccessLogTarget, Admin, Backend, BackendClocks, ClientClocks, Config, Generate, HealthPage, Limits,
    Listener, ListenerTls, Load, LogFormat, Pool, Probe, ProbeKind, Scrape, Secret, Telemetry, UpstreamHttp,
    UpstreamTls,
};
use crate::policy::admission::{LengthMax, Priority, QueuePolicy};
use crate::policy::balance::{AffinityKey, BalancePolicy};
use crate::policy::dialect::{Endpoint, Engine, Question};
use crate::policy::fallback::{FALLBACKS_MAX, Fallback, FallbackCause};
use crate::policy::health::HealthPolicy;
use crate::policy::moves::DrainClocks;
use crate::policy::outlier::OutlierPolicy;
use crate::policy::progress::ProgressPolicy;
use crate::policy::resume::{ResumeMode, ResumePolicy};
use crate::policy::retry::{Replay, RetryPolicy};
use crate::policy::route::Route;

/// No clock of a proxy is shorter than a scheduler's tick, and none outlives a month.
const DURATION_MIN: Duration = Duration::from_millis(1);
const DURATION_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// A clock that must run.
const RUNNING: std::ops::RangeInclusive<Duration> = DURATION_MIN..=DURATION_MAX;
/// A wait that may be left out by `"0s"`.
const MAY_BE_ZERO: std::ops::RangeInclusive<Duration> = Duration::ZERO..=DURATION_MAX;
/// Probes slower than this find nothing in time; faster ones are an attack.
const PROBE_INTERVAL: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(50)..=Duration::from_secs(3600);

/// Readings of a load slower than this would leave gaps, for an old one is not believed; faster ones cost the engine.
const LOAD_INTERVAL: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_millis(1500);
/// Longest text a canary is expected to say. It is asked for so many tokens, for none is shorter than a byte.
const EXPECT_BYTES_MAX: usize = 128;

/// More threads than any machine has cores is a typing mistake.
const WORKERS_MAX: u64 = 1024;
const WEIGHT_MAX: u64 = 1000;
/// More waiting requests than this are a memory bound, and that is `limits.memory_max`.
const QUEUE_LENGTH_MAX: u64 = 1_000_000;
/// Names become metric labels, log fields and parts of admin paths.
const NAME_CHARS_MAX: usize = 128;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// The name of a pool that is the only one and has none.
const ONLY_POOL: &str = "default";

/// Header fields that carry a backend's own credentials.
const CREDENTIALS: &[&str] = &["authorization", "x-api-key", "api-key"];
/// Parts of header names whose values are secrets even when written literally.
const SECRET_NAMES: &[&str] = &["auth", "cookie", "key", "password", "secret", "token"];
/// Header fields that belong to one connection or to the framing of a message (RFC 9110 §7.6.1), and `host`,
/// which follows from the URL.
const NOT_SETTABLE: &[&str] = &[
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

const REPLAY: &[(&str, Replay)] =
    &[("auto", Replay::Auto), ("always", Replay::Always), ("safe", Replay::Safe), ("never", Replay::Never)];

const PRIORITY: &[(&str, Priority)] =
    &[("high", Priority::High), ("normal", Priority::Normal), ("low", Priority::Low)];

/// The whole file. What it returns is only a configuration when `document` has no errors.
pub(super) fn config(root: &Table<'_>) -> Config {
    let workers = root.integer("workers", 0_usize, 0..=WORKERS_MAX);
    let listeners = listeners(root);
    let admin = admin(root, &listeners);
    let pools = pools(root, &listeners);
    let routes = routes(root, &pools);
    let config = Config {
        workers: NonZeroUsize::new(workers).unwrap_or_else(defaults::workers),
        listeners,
        admin,
        pools,
        routes,
        limits: limits(&root.table("limits", &keys::LIMITS)),
        client_clocks: client_clocks(&root.table("client", &keys::CLIENT)),
        telemetry: telemetry(&root.table("telemetry", &keys::TELEMETRY)),
        drain_deadline: root.duration("drain_deadline", defaults::DRAIN_DEADLINE, MAY_BE_ZERO),
    };
    root.refuse_unknown_keys();
    config
}

fn listeners(root: &Table<'_>) -> Vec<Listener> {
    let Some(tables) = root.tables("listener", &keys::LISTENER) else {
        return vec![Listener::default()];
    };
    let mut listeners: Vec<Listener> = Vec::with_capacity(tables.len());
    for table in &tables {
        let address = table.item("address");
        if address.is_none() {
            table.missing("address", "write address = \"0.0.0.0:8080\"");
        }
        let listener = Listener {
            address: address.as_ref().and_then(socket_address).unwrap_or(Listener::default().address),
            tls: listener_tls(&table.table("tls", &keys::LISTENER_TLS)),
            trusted_proxies: trusted_proxies(table),
        };
        if let Some(item) = address
            && let Some(first) = listeners.iter().position(|other| overlap(other.address, listener.address))
        {
            item.error(format!("is taken by listener[{first}]"), "write another port");
        }
        table.refuse_unknown_keys();
        listeners.push(listener);
    }
    listeners
}

/// Whether two listening sockets cannot both be bound.
pub(super) fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let same_family = a.is_ipv4() == b.is_ipv4();
    let same_ip = a.ip() == b.ip() || (same_family && (a.ip().is_unspecified() || b.ip().is_unspecified()));
    a.port() != 0 && a.port() == b.port() && same_ip
}

fn socket_address(item: &Item<'_>) -> Option<SocketAddr> {
    let text = item.string()?;
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let right = if let Some(port) = text.strip_prefix(':').and_then(|port| port.parse::<u16>().ok()) {
        format!("write \"0.0.0.0:{port}\" for every interface or \"127.0.0.1:{port}\" for this machine")
    } else if text.parse::<IpAddr>().is_ok() {
        "write the port as well, such as \"0.0.0.0:8080\"".to_owned()
    } else {
        "write an IP address and a port, such as \"0.0.0.0:8080\"".to_owned()
    };
    item.error("is not an address", right);
    None
}

fn listener_tls(table: &Table<'_>) -> Option<ListenerTls> {
    let (certificate, key) = both(table, "certificate", "key");
    if table.is_present() && certificate.is_none() && key.is_none() {
        table.missing("certificate", "write the path of a PEM file, leaf first");
        table.missing("key", "write the path of a PEM file");
    }
    table.refuse_unknown_keys();
    Some(ListenerTls { certificate: certificate?, key: key? })
}

/// Two paths of which neither makes sense without the other.
fn both(table: &Table<'_>, first: &'static str, second: &'static str) -> (Option<PathBuf>, Option<PathBuf>) {
    let (a, b) = (table.item(first), table.item(second));
    match (&a, &b) {
        (Some(_), None) => table.missing(second, format!("{first} needs it")),
        (None, Some(_)) => table.missing(first, format!("{second} needs it")),
        _ => {}
    }
    (a.and_then(|item| item.string()).map(PathBuf::from), b.and_then(|item| item.string()).map(PathBuf::from))
}

fn trusted_proxies(table: &Table<'_>) -> Vec<IpNet> {
    let Some(items) = table.item("trusted_proxies").and_then(|item| item.list()) else { return Vec::new() };
    let networks = items.iter().filter_map(|item| {
        let text = item.string()?;
        let network = text.parse().ok().or_else(|| text.parse().ok().map(|ip: IpAddr| IpNet::from(ip)));
        if network.is_none() {
            item.error("is not a network", "write an address or a network, such as \"10.0.0.0/8\"");
        }
        network
    });
    networks.collect()
}

fn admin(root: &Table<'_>, listeners: &[Listener]) -> Admin {
    let table = root.table("admin", &keys::ADMIN);
    let item = table.item("address");
    let address = item.as_ref().and_then(socket_address).unwrap_or(Admin::default().address);
    if let Some(taken) = listeners.iter().position(|listener| overlap(listener.address, address)) {
        match item {
            Some(item) => item.error(format!("is taken by listener[{taken}]"), "write another port"),
            None => table.error_at(
                "address",
                format!("its default {address} is taken by listener[{taken}]"),
                "write another port under [admin]",
            ),
        }
    }
    let token = table.item("token").map(Item::secret).and_then(|item| {
        let text = item.secret_text()?;
        if text.value.bytes().any(|byte| !byte.is_ascii_graphic()) {
            item.error("cannot be sent as a bearer token", "use visible ASCII characters without spaces");
        }
        Some(Secret::new(text.value))
    });
    table.refuse_unknown_keys();
    Admin { address, token }
}

fn pools(root: &Table<'_>, listeners: &[Listener]) -> Vec<Pool> {
    let Some(tables) = root.tables("pool", &keys::POOL) else {
        root.missing("pool", "write [[pool]] and backends = [\"http://10.0.0.1:8000\"]");
        return Vec::new();
    };
    let mut pools: Vec<Pool> = Vec::with_capacity(tables.len());
    for (index, table) in tables.iter().enumerate() {
        let item = table.item("name");
        if item.is_none() && tables.len() > 1 {
            table.missing("name", "with several pools each needs one");
        }
        let given = item.as_ref().and_then(name);
        if let (Some(item), Some(given)) = (&item, &given)
            && let Some(first) = pools.iter().position(|other| other.name == *given)
        {
            item.error(format!("is the name of pool[{first}] too"), "write another name");
        }
        // A stand-in keeps later complaints apart; it is never used, for an error was recorded.
        let stand_in = if tables.len() == 1 { ONLY_POOL.to_owned() } else { format!("pool[{index}]") };
        pools.push(pool(table, given.unwrap_or(stand_in), listeners));
        table.refuse_unknown_keys();
    }
    let names: Vec<String> = pools.iter().map(|pool| pool.name.clone()).collect();
    for (table, pool) in tables.iter().zip(&mut pools) {
        pool.fallbacks = fallbacks(table, &pool.name, &names);
    }
    pools
}

fn pool(table: &Table<'_>, name: String, listeners: &[Listener]) -> Pool {
    let probe = probe(&table.table("probe", &keys::PROBE));
    Pool {
        name,
        backends: backends(table, listeners),
        models: models(table.item("models"), false),
        aliases: aliases(table),
        balance: balance(&table.table("balance", &keys::BALANCE)),
        health: health(&table.table("health", &keys::HEALTH), probe.kind != ProbeKind::Off),
        probe,
        load: load(&table.table("load", &keys::LOAD)),
        progress: progress(&table.table("progress", &keys::PROGRESS)),
        outlier: outlier(&table.table("outlier", &keys::OUTLIER)),
        retry: retry(&table.table("retry", &keys::RETRY)),
        resume: resume(&table.table("resume", &keys::RESUME)),
        queue: queue(&table.table("queue", &keys::QUEUE)),
        clocks: backend_clocks(&table.table("clocks", &keys::CLOCKS)),
        tls: upstream_tls(&table.table("tls", &keys::UPSTREAM_TLS)),
        http: table.choice(
            "http",
            UpstreamHttp::default(),
            &[("auto", UpstreamHttp::Auto), ("1", UpstreamHttp::Http1), ("2", UpstreamHttp::Http2)],
        ),
        // They name pools that are read later.
        fallbacks: Vec::new(),
    }
}

/// Where else the requests of the pool `own` may go. `pools` are the names of all.
fn fallbacks(pool: &Table<'_>, own: &str, pools: &[String]) -> Vec<Fallback> {
    let Some(tables) = pool.tables("fallback", &keys::FALLBACK) else { return Vec::new() };
    let others: Vec<&str> = pools.iter().map(String::as_str).filter(|name| *name != own).collect();
    if tables.len() > FALLBACKS_MAX {
        pool.error_at("fallback", "has too many entries", format!("write at most {FALLBACKS_MAX}"));
    }
    let mut fallbacks: Vec<Fallback> = Vec::with_capacity(tables.len());
    for table in &tables {
        let item = table.item("pool");
        if item.is_none() {
            table.missing("pool", keys::one_of("", &others));
        }
        let name = item.as_ref().and_then(Item::string);
        match (&item, &name) {
            (Some(item), Some(name)) if name == own => {
                item.error("is the pool itself", "write another pool, or leave the entry out");
            }
            (Some(item), Some(name)) if !others.contains(&name.as_str()) => {
                item.error("no such pool", keys::one_of(name, &others));
            }
            _ => {}
        }
        let fallback = Fallback {
            pool: name.unwrap_or_default(),
            on: fallback_causes(table),
            model: table.item("model").and_then(|item| item.string()),
        };
        if let Some(first) =
            fallbacks.iter().position(|other| other.pool == fallback.pool && other.model == fallback.model)
        {
            table.error(format!("asks what fallback[{first}] asks"), "list each pool and model once");
        }
        table.refuse_unknown_keys();
        fallbacks.push(fallback);
    }
    fallbacks
}

fn fallback_causes(table: &Table<'_>) -> Vec<FallbackCause> {
    let choices = FallbackCause::ALL.map(|cause| (cause.name(), cause));
    let Some(item) = table.item("on") else {
        table.missing("on", "write on = [\"unavailable\", \"busy\"]");
        return Vec::new();
    };
    let Some(items) = item.list() else { return Vec::new() };
    if items.is_empty() {
        item.error_without_value("names no cause", "write on = [\"unavailable\", \"busy\"]");
    }
    let mut causes = Vec::with_capacity(items.len());
    for item in &items {
        let Some(cause) = item.choice(&choices) else { continue };
        if causes.contains(&cause) {
            item.error("is listed twice", "list each cause once");
        }
        causes.push(cause);
    }
    causes
}

fn name(item: &Item<'_>) -> Option<String> {
    let text = item.string()?;
    let fits = text.chars().count() <= NAME_CHARS_MAX;
    if fits && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-:[]".contains(c)) {
        return Some(text);
    }
    item.error("is not a name", format!("use up to {NAME_CHARS_MAX} of the characters a-z A-Z 0-9 . _ - :"));
    None
}

fn backends(pool: &Table<'_>, listeners: &[Listener]) -> Vec<Backend> {
    let Some(item) = pool.item("backends") else {
        pool.missing("backends", "write backends = [\"http://10.0.0.1:8000\"]");
        return Vec::new();
    };
    let Some(items) = item.list() else { return Vec::new() };
    if items.is_empty() {
        item.error_without_value("has no backend", "list at least one, such as \"http://10.0.0.1:8000\"");
    }
    let mut backends: Vec<Backend> = Vec::with_capacity(items.len());
    let mut names: HashMap<String, String> = HashMap::new();
    let mut addresses: HashMap<(bool, String, String), String> = HashMap::new();
    for item in &items {
        let Some(backend) = backend(item, listeners) else { continue };
        let address = (backend.secure, backend.authority.to_string(), backend.path_prefix.clone());
        if let Some(first) = addresses.get(&address) {
            item.error(
                format!("has the same URL as {first}"),
                "list each backend once; weight gives it more traffic",
            );
        } else if let Some(first) = names.get(&backend.name) {
            item.error_without_value(
                format!("has the name of {first}, {:?}", backend.name),
                "give it another name",
            );
        }
        addresses.entry(address).or_insert_with(|| item.path().to_owned());
        names.entry(backend.name.clone()).or_insert_with(|| item.path().to_owned());
        backends.push(backend);
    }
    backends
}

/// A URL, or a table that has one.
fn backend(item: &Item<'_>, listeners: &[Listener]) -> Option<Backend> {
    let Some(table) = item.to_table(&keys::BACKEND) else {
        let url = url(item, listeners)?;
        return Some(Backend {
            name: url.authority.to_string(),
            secure: url.secure,
            authority: url.authority,
            path_prefix: url.path_prefix,
            weight: NonZeroU32::MIN,
            tier: 0,
            in_flight_max: None,
            headers: Vec::new(),
            own_credentials: false,
            disabled: false,
        });
    };
    let weight: u32 = table.integer("weight", 1, 1..=WEIGHT_MAX);
    let tier = table.integer("tier", 0, 0..=u64::from(u8::MAX));
    let in_flight_max: u32 = table.integer("in_flight_max", 0, 1..=u64::from(u32::MAX));
    let headers = set_headers(&table);
    let disabled = table.flag("disabled", false);
    let name = table.item("name").and_then(|item| name(&item));
    table.refuse_unknown_keys();
    let Some(url_item) = table.item("url") else {
        table.missing("url", "write url = \"http://10.0.0.1:8000\"");
        return None;
    };
    let url = url(&url_item, listeners)?;
    Some(Backend {
        name: name.unwrap_or_else(|| url.authority.to_string()),
        secure: url.secure,
        authority: url.authority,
        path_prefix: url.path_prefix,
        weight: NonZeroU32::new(weight).unwrap_or(NonZeroU32::MIN),
        tier,
        in_flight_max: NonZeroU32::new(in_flight_max),
        own_credentials: headers.iter().any(|(name, _)| CREDENTIALS.contains(&name.as_str())),
        headers,
        disabled,
    })
}

/// Where a backend is.
struct BackendUrl {
    secure: bool,
    authority: Authority,
    path_prefix: String,
}

fn url(item: &Item<'_>, listeners: &[Listener]) -> Option<BackendUrl> {
    const EXAMPLE: &str = "write a URL such as \"http://10.0.0.1:8000\"";
    let text = item.string()?;
    let problem = |problem: &str, right: &str| {
        item.error(problem, right);
        None
    };
    if !text.contains("://") {
        return problem("has no scheme", EXAMPLE);
    }
    if text.contains(['?', '#']) {
        return problem(
            "has a query or a fragment",
            "end the URL after its path; credentials go into headers",
        );
    }
    let Ok(uri) = text.parse::<Uri>() else { return problem("is not a URL", EXAMPLE) };
    let secure = match uri.scheme() {
        Some(scheme) if *scheme == Scheme::HTTP => false,
        Some(scheme) if *scheme == Scheme::HTTPS => true,
        _ => return problem("has an unknown scheme", "write http:// or https://"),
    };
    let given = uri.authority()?;
    if given.as_str().contains('@') {
        return problem(
            "has credentials in its URL",
            "set them in headers, such as authorization = \"${BACKEND_AUTH}\"",
        );
    }
    let host = given.host().to_ascii_lowercase();
    let after_host = &given.as_str()[given.host().len()..];
    let port = match (after_host, given.port_u16()) {
        ("", _) => {
            if secure {
                443
            } else {
                80
            }
        }
        (_, Some(port)) if port > 0 => port,
        _ => return problem("has no valid port", "write a port from 1 to 65535"),
    };
    let Ok(authority) = format!("{host}:{port}").parse::<Authority>() else {
        return problem("is not a URL", EXAMPLE);
    };
    if host.is_empty() {
        return problem("has no host", EXAMPLE);
    }
    if let Some(own) = own_listener(&host, port, listeners) {
        return problem(&format!("is evergate's own listener[{own}]"), "write the address of a replica");
    }
    Some(BackendUrl { secure, authority, path_prefix: uri.path().trim_end_matches('/').to_owned() })
}

/// The listener that would answer its own request.
fn own_listener(host: &str, port: u16, listeners: &[Listener]) -> Option<usize> {
    let ip: IpAddr = match host {
        "localhost" => IpAddr::from([127, 0, 0, 1]),
        _ => host.trim_start_matches('[').trim_end_matches(']').parse().ok()?,
    };
    listeners.iter().position(|listener| {
        let own = listener.address;
        own.port() == port && (own.ip() == ip || (own.ip().is_unspecified() && ip.is_loopback()))
    })
}

fn set_headers(table: &Table<'_>) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, item) in table.entries("headers", true) {
        let text = item.secret_text();
        let Some(name) = header_name(name, &item) else { continue };
        if NOT_SETTABLE.contains(&name.as_str()) {
            item.error_without_value("cannot be set", "evergate sets this header itself");
            continue;
        }
        if headers.iter().any(|(other, _)| *other == name) {
            item.error_without_value("is set twice", "header names do not differ by case");
            continue;
        }
        let Some(Text { value, is_secret }) = text else { continue };
        let Ok(mut value) = HeaderValue::from_str(&value) else {
            item.error("is not a header value", "use one line of visible characters");
            continue;
        };
        value.set_sensitive(is_secret || has_secret_name(&name));
        headers.push((name, value));
    }
    headers
}

/// Whether the values of this header are secrets even when written literally.
pub(super) fn has_secret_name(name: &HeaderName) -> bool {
    SECRET_NAMES.iter().any(|part| name.as_str().contains(part))
}

fn header_name(name: &str, item: &Item<'_>) -> Option<HeaderName> {
    let parsed = HeaderName::from_bytes(name.as_bytes()).ok();
    if parsed.is_none() {
        item.error_without_value("is not a header name", "use letters, digits and -");
    }
    parsed
}

/// Model names; `patterns` may end in `*`.
fn models(item: Option<Item<'_>>, patterns: bool) -> Vec<String> {
    let Some(items) = item.and_then(|item| item.list()) else { return Vec::new() };
    let mut models: Vec<String> = Vec::with_capacity(items.len());
    for item in &items {
        let Some(model) = item.string() else { continue };
        let stars = model.matches('*').count();
        if stars > 0 && !(patterns && stars == 1 && model.ends_with('*')) {
            let right = if patterns {
                "* may stand at the end only"
            } else {
                "write the whole name; patterns are for [[route]]"
            };
            item.error("has * where it means nothing", right);
        } else if models.contains(&model) {
            item.error("is listed twice", "list each model once");
        }
        models.push(model);
    }
    models
}

/// Each alias is applied once, so its target must be a name backends know.
fn aliases(table: &Table<'_>) -> Vec<(String, String)> {
    let entries = table.entries("aliases", false);
    let aliases: Vec<(String, String)> = entries
        .iter()
        .filter_map(|(alias, item)| item.string().map(|target| ((*alias).to_owned(), target)))
        .collect();
    let target_of =
        |name: &str| aliases.iter().find(|(alias, _)| alias == name).map(|(_, target)| target.as_str());
    for (alias, item) in &entries {
        if alias.is_empty() {
            item.error_without_value("has no name", "write the client's model name before the =");
        }
        let Some(target) = target_of(alias) else { continue };
        if let Some(next) = target_of(target) {
            let steps = std::iter::successors(Some(target), |name| target_of(name)).take(aliases.len() + 1);
            if steps.into_iter().any(|name| name == *alias) {
                item.error("leads back to itself", "name the model as the backends know it");
            } else {
                item.error("names another alias", format!("aliases are applied once; write {next:?}"));
            }
        }
    }
    aliases
}

/// As written; what a strategy needs besides is in keys of its own.
#[derive(Clone, Copy, PartialEq)]
enum Strategy {
    PowerOfTwo,
    RoundRobin,
    LeastLoad,
    Weighted,
    ConsistentHash,
}

fn balance(table: &Table<'_>) -> BalancePolicy {
    const STRATEGIES: &[(&str, Strategy)] = &[
        ("p2c", Strategy::PowerOfTwo),
        ("round_robin", Strategy::RoundRobin),
        ("least_load", Strategy::LeastLoad),
        ("weighted", Strategy::Weighted),
        ("consistent_hash", Strategy::ConsistentHash),
    ];
    let strategy = table.choice("strategy", Strategy::PowerOfTwo, STRATEGIES);
    let (header, prompt) = (table.item("header"), table.item("prompt_bytes"));
    if strategy != Strategy::ConsistentHash {
        for item in [&header, &prompt, &table.item("bound")].into_iter().flatten() {
            item.error("is for strategy = \"consistent_hash\"", "leave it out or write that strategy");
        }
    }
    if let (Some(header), Some(_)) = (&header, &prompt) {
        header.error(
            "stands beside prompt_bytes",
            "write one of them: requests are alike by a header or by their prompt",
        );
    }
    let header = header.and_then(|item| item.string().and_then(|name| header_name(&name, &item)));
    let prompt_bytes = prompt.and_then(|item| item.size(1..=MIB));
    let bound = table.number("bound", BalancePolicy::BOUND, 1.0..=100.0);
    table.refuse_unknown_keys();
    match strategy {
        Strategy::PowerOfTwo => BalancePolicy::PowerOfTwo,
        Strategy::RoundRobin => BalancePolicy::RoundRobin,
        Strategy::LeastLoad => BalancePolicy::LeastLoad,
        Strategy::Weighted => BalancePolicy::Weighted,
        Strategy::ConsistentHash => {
            let key = header.map_or_else(
                || AffinityKey::PromptPrefix {
                    bytes: prompt_bytes
                        .and_then(|n| usize::try_from(n).ok())
                        .unwrap_or(AffinityKey::PROMPT_PREFIX_BYTES),
                },
                AffinityKey::Header,
            );
            BalancePolicy::ConsistentHash { key, bound }
        }
    }
}

/// Ranges are no wider than [`HealthPolicy::validate`] allows; whether there are probes follows from `[pool.probe]`.
fn health(table: &Table<'_>, probes: bool) -> HealthPolicy {
    let default = HealthPolicy::default();
    let running = |key, default| table.duration(key, default, RUNNING);
    let share = |key, default| table.number(key, default, 0.0..=1.0);
    let health = HealthPolicy {
        probes,
        fall: table.integer("fall", default.fall, 1..=100),
        rise: table.integer("rise", default.rise, 1..=100),
        eject_consecutive: table.integer("eject_consecutive", default.eject_consecutive, 1..=1000),
        success_rate_min: share("success_rate_min", default.success_rate_min),
        outcomes_min: table.integer("outcomes_min", default.outcomes_min, 1..=64),
        peer_margin: share("peer_margin", default.peer_margin),
        window: running("window", default.window),
        ejection_min: running("ejection_min", default.ejection_min),
        ejection_max: running("ejection_max", default.ejection_max),
        ejection_decay: running("ejection_decay", default.ejection_decay),
        ejection_jitter: share("ejection_jitter", default.ejection_jitter),
        misconfigured_ejection: running("misconfigured_ejection", default.misconfigured_ejection),
        slow_start: table.duration("slow_start", default.slow_start, MAY_BE_ZERO),
        slow_start_share_min: table.number("slow_start_share_min", default.slow_start_share_min, 0.001..=1.0),
        busy_min: running("busy_min", default.busy_min),
        busy_max: running("busy_max", default.busy_max),
        retry_after_max: running("retry_after_max", default.retry_after_max),
    };
    not_longer(table, "ejection_min", health.ejection_min, "ejection_max", health.ejection_max);
    not_longer(table, "busy_min", health.busy_min, "busy_max", health.busy_max);
    not_longer(table, "busy_max", health.busy_max, "retry_after_max", health.retry_after_max);
    table.refuse_unknown_keys();
    health
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Http,
    Generate,
    Canary,
    Tcp,
    Off,
}

fn probe(table: &Table<'_>) -> Probe {
    const KINDS: &[(&str, Kind)] = &[
        ("http", Kind::Http),
        ("generate", Kind::Generate),
        ("canary", Kind::Canary),
        ("tcp", Kind::Tcp),
        ("off", Kind::Off),
    ];
    let default = Probe::default();
    let kind = table.choice("kind", Kind::Http, KINDS);
    let generates = matches!(kind, Kind::Generate | Kind::Canary);
    let only_for = |keys: &[&'static str], is_for: bool, kinds: &str| {
        for item in keys.iter().filter_map(|key| table.item(key)).filter(|_| !is_for) {
            item.error(format!("is for kind = {kinds}"), format!("leave it out or write kind = {kinds}"));
        }
    };
    only_for(&["path", "statuses", "body"], kind == Kind::Http, "\"http\"");
    only_for(&["preset"], kind == Kind::Http || generates, "\"http\", \"generate\" or \"canary\"");
    only_for(&["endpoint", "model", "prompt", "deadline"], generates, "\"generate\" or \"canary\"");
    only_for(&["expect"], kind == Kind::Canary, "\"canary\"");
    let page = health_page(table);
    let (interval, interval_unsteady) = match generates {
        true => (defaults::GENERATE_INTERVAL, defaults::GENERATE_INTERVAL_UNSTEADY),
        false => (default.interval, default.interval_unsteady),
    };
    let probe = Probe {
        kind: match kind {
            Kind::Http => ProbeKind::Http,
            Kind::Generate | Kind::Canary => ProbeKind::Generate(generate(table, kind, page.preset)),
            Kind::Tcp => ProbeKind::Tcp,
            Kind::Off => ProbeKind::Off,
        },
        page,
        interval: table.duration("interval", interval, PROBE_INTERVAL),
        interval_unsteady: table.duration("interval_unsteady", interval_unsteady, PROBE_INTERVAL),
        timeout: table.duration("timeout", default.timeout, RUNNING),
    };
    not_longer(table, "interval_unsteady", probe.interval_unsteady, "interval", probe.interval);
    table.refuse_unknown_keys();
    probe
}

/// A preset chooses path and statuses; both at once could only contradict each other.
fn health_page(table: &Table<'_>) -> HealthPage {
    let engines: Vec<(&str, Engine)> = Engine::ALL.iter().map(|&engine| (engine.name(), engine)).collect();
    let preset = table.item("preset").and_then(|item| item.choice(&engines));
    let (path, statuses) = (table.item("path"), table.item("statuses"));
    if preset.is_some() {
        for item in [&path, &statuses].into_iter().flatten() {
            item.error("stands beside preset, which chooses it", "leave one of them out");
        }
    }
    let own = preset.map_or_else(HealthPage::default, |engine| HealthPage {
        preset,
        path: PathAndQuery::from_static(engine.health_path()),
        ..HealthPage::default()
    });
    HealthPage {
        path: path.and_then(|item| page_path(&item)).unwrap_or(own.path),
        statuses: statuses.map(|item| statuses_of(&item)).unwrap_or_default(),
        body: table.item("body").and_then(|item| item.string()),
        preset,
    }
}

fn generate(table: &Table<'_>, kind: Kind, preset: Option<Engine>) -> Generate {
    let default = Generate::default();
    let text = |key| table.item(key).and_then(|item| item.string().map(|text| (text, item)));
    let endpoint = text("endpoint").map(|(path, item)| {
        if !Question::can_ask(Endpoint::of(&http::Method::POST, &path)) {
            item.error(
                "is not a path where text is asked for",
                "write one such as \"/v1/completions\", \"/v2/models/{model}/generate\" or \"/api/generate\"",
            );
        }
        path
    });
    let expect = text("expect").map(|(expected, item)| {
        if expected.trim().is_empty() || expected.len() > EXPECT_BYTES_MAX {
            item.error("cannot be compared", format!("write 1 to {EXPECT_BYTES_MAX} bytes of text"));
        }
        expected
    });
    if kind == Kind::Canary && expect.is_none() {
        table.missing("expect", "write the text that the answer to prompt begins with");
    }
    if kind == Kind::Canary && table.item("prompt").is_none() {
        table.missing("prompt", "write a question with one sure answer");
    }
    Generate {
        endpoint: endpoint
            .or_else(|| preset.map(|engine| engine.generate_path().to_owned()))
            .unwrap_or(default.endpoint),
        model: text("model").map(|(model, _)| model),
        prompt: text("prompt").map_or(default.prompt, |(prompt, _)| prompt),
        expect,
        deadline: table.duration("deadline", default.deadline, RUNNING),
    }
}

fn load(table: &Table<'_>) -> Load {
    let default = Load::default();
    let scrape = table.item("scrape").and_then(|item| {
        if item.is_text("off") {
            return Some(Scrape::Off);
        }
        if item.is_text("auto") {
            return Some(Scrape::Auto);
        }
        let text = item.string()?;
        if !text.starts_with('/') {
            let advice = keys::one_of(&text, &["off", "auto"]);
            item.error("is not a page", format!("{advice}, or a path such as \"/metrics\""));
            return None;
        }
        page_path(&item).map(Scrape::Path)
    });
    let load = Load {
        scrape: scrape.unwrap_or(default.scrape),
        interval: table.duration("interval", default.interval, LOAD_INTERVAL),
    };
    table.refuse_unknown_keys();
    load
}

fn progress(table: &Table<'_>) -> ProgressPolicy {
    let default = ProgressPolicy::default();
    let running = |key, default| table.duration(key, default, RUNNING);
    let progress = ProgressPolicy {
        first_token_min: running("first_token_min", default.first_token_min),
        first_token_unknown: running("first_token_unknown", default.first_token_unknown),
        token_gap_min: running("token_gap_min", default.token_gap_min),
        token_gap_unknown: running("token_gap_unknown", default.token_gap_unknown),
        factor: table.number("factor", default.factor, 1.0..=1_000.0),
        hedge_ratio: table.number("hedge_ratio", default.hedge_ratio, 0.0..=1.0),
    };
    let pairs = [
        ("first_token_min", progress.first_token_min, "first_token_unknown", progress.first_token_unknown),
        ("token_gap_min", progress.token_gap_min, "token_gap_unknown", progress.token_gap_unknown),
    ];
    for (low, least, high, most) in pairs {
        not_longer(table, low, least, high, most);
    }
    table.refuse_unknown_keys();
    progress
}

fn outlier(table: &Table<'_>) -> OutlierPolicy {
    let default = OutlierPolicy::default();
    let outlier = OutlierPolicy {
        ratio_min: table.number("ratio_min", default.ratio_min, 1.001..=1_000.0),
        eject_ratio_min: table.number("eject_ratio_min", default.eject_ratio_min, 1.001..=1_000.0),
        deviations_min: table.number("deviations_min", default.deviations_min, 0.0..=1_000.0),
        first_token_floor: table.duration("first_token_floor", default.first_token_floor, MAY_BE_ZERO),
        token_gap_floor: table.duration("token_gap_floor", default.token_gap_floor, MAY_BE_ZERO),
        samples_min: table.integer("samples_min", default.samples_min, 1..=9),
        memory: table.duration("memory", default.memory, RUNNING),
        factor_max: table.number("factor_max", default.factor_max, 1.0..=1_000.0),
        persistent: table.duration("persistent", default.persistent, RUNNING),
    };
    if outlier.eject_ratio_min < outlier.ratio_min
        && let Some(item) = table.item("eject_ratio_min").or_else(|| table.item("ratio_min"))
    {
        let right = format!("keep ratio_min ({}) at or below eject_ratio_min", outlier.ratio_min);
        item.error("would eject a backend that is not slow yet", &right);
    }
    table.refuse_unknown_keys();
    outlier
}

fn page_path(item: &Item<'_>) -> Option<PathAndQuery> {
    let text = item.string()?;
    let path = text.parse().ok().filter(|_| text.starts_with('/') && !text.contains('#'));
    if path.is_none() {
        item.error("is not a path", "write a path such as \"/health\"");
    }
    path
}

fn statuses_of(item: &Item<'_>) -> Vec<u16> {
    let Some(items) = item.list() else { return Vec::new() };
    items.iter().filter_map(|item| item.integer(100..=599)).collect()
}

fn retry(table: &Table<'_>) -> RetryPolicy {
    let default = RetryPolicy::default();
    let retry = RetryPolicy {
        attempts_max: table.integer("attempts_max", default.attempts_max, 1..=10),
        budget_ratio: table.number("budget_ratio", default.budget_ratio, 0.0..=1.0),
        budget_floor: table.number("budget_floor", default.budget_floor, 0.0..=10_000.0),
        backoff_min: table.duration("backoff_min", default.backoff_min, RUNNING),
        backoff_max: table.duration("backoff_max", default.backoff_max, RUNNING),
        wait_max: table.duration("wait_max", default.wait_max, MAY_BE_ZERO),
        replay: table.choice("replay", default.replay, REPLAY),
    };
    not_longer(table, "backoff_min", retry.backoff_min, "backoff_max", retry.backoff_max);
    table.refuse_unknown_keys();
    retry
}

fn resume(table: &Table<'_>) -> ResumePolicy {
    let default = ResumePolicy::default();
    let resume = ResumePolicy {
        mode: table.choice("mode", default.mode, &ResumeMode::ALL.map(|mode| (mode.name(), mode))),
        resumes_max: table.integer("resumes_max", default.resumes_max, 1..=10),
        replay_tokens_max: table.integer("replay_tokens_max", default.replay_tokens_max, 0..=1_000_000),
        journal_bytes_max: table.size(
            "journal_bytes_max",
            default.journal_bytes_max as u64,
            1 << 10..=1 << 30,
        ) as usize,
        second_opinion: table.flag("second_opinion", default.second_opinion),
    };
    table.refuse_unknown_keys();
    resume
}

fn queue(table: &Table<'_>) -> QueuePolicy {
    let default = QueuePolicy::default();
    let length_max = match table.item("length_max") {
        Some(item) if !item.is_text("auto") => {
            item.integer(1..=QUEUE_LENGTH_MAX).and_then(NonZeroU32::new).map(LengthMax::Most)
        }
        _ => None,
    };
    let header = table.item("priority_header");
    let queue = QueuePolicy {
        wait_max: table.duration("wait_max", default.wait_max, MAY_BE_ZERO),
        length_max: length_max.unwrap_or(default.length_max),
        priority_header: header
            .and_then(|item| item.string().and_then(|name| header_name(&name, &item)))
            .unwrap_or(default.priority_header),
    };
    table.refuse_unknown_keys();
    queue
}

fn backend_clocks(table: &Table<'_>) -> BackendClocks {
    let default = BackendClocks::default();
    let clock = |key, default| table.duration(key, default, RUNNING);
    let clocks = BackendClocks {
        connect: clock("connect", default.connect),
        connect_tls: clock("connect_tls", default.connect_tls),
        write_idle: clock("write_idle", default.write_idle),
        head: clock("head", default.head),
        first_token: clock("first_token", default.first_token),
        answer: clock("answer", default.answer),
        inter_token: clock("inter_token", default.inter_token),
        silence_max: clock("silence_max", default.silence_max),
        drain: DrainClocks {
            move_after: table.duration("drain_move", default.drain.move_after, MAY_BE_ZERO),
            end_after: clock("drain_end", default.drain.end_after),
        },
        body_idle: clock("body_idle", default.body_idle),
        total: table.item("total").and_then(|item| item.duration(RUNNING)).or(default.total),
        idle: clock("idle", default.idle),
        h2_ping: clock("h2_ping", default.h2_ping),
        h2_ping_timeout: clock("h2_ping_timeout", default.h2_ping_timeout),
        dns_min: table.duration("dns_min", default.dns_min, MAY_BE_ZERO),
    };
    not_longer(table, "connect", clocks.connect, "connect_tls", clocks.connect_tls);
    not_longer(table, "inter_token", clocks.inter_token, "silence_max", clocks.silence_max);
    not_longer(table, "drain_move", clocks.drain.move_after, "drain_end", clocks.drain.end_after);
    table.refuse_unknown_keys();
    clocks
}

/// Two durations that make sense in one order only. The complaint stands at the one that was written.
fn not_longer(table: &Table<'_>, less: &'static str, short: Duration, more: &'static str, long: Duration) {
    if short <= long {
        return;
    }
    let limit = super::units::format_duration;
    if let Some(item) = table.item(less) {
        item.error(
            format!("is longer than {more}, \"{}\"", limit(long)),
            format!("lower it, or raise {more}"),
        );
    } else if let Some(item) = table.item(more) {
        item.error(
            format!("is shorter than {less}, \"{}\"", limit(short)),
            format!("raise it, or lower {less}"),
        );
    }
}

fn upstream_tls(table: &Table<'_>) -> UpstreamTls {
    let (certificate, key) = both(table, "client_certificate", "client_key");
    let server_name = table.item("server_name").and_then(|item| {
        let name = item.string()?;
        if rustls_pki_types::ServerName::try_from(name.as_str()).is_err() {
            item.error("is not a server name", "write a host name or an IP address, without a port");
        }
        Some(name)
    });
    let ca = table.item("ca").and_then(|item| item.string()).map(PathBuf::from);
    table.refuse_unknown_keys();
    UpstreamTls { ca, client: certificate.zip(key), server_name }
}

fn routes(root: &Table<'_>, pools: &[Pool]) -> Vec<Route> {
    let Some(tables) = root.tables("route", &keys::ROUTE) else { return Vec::new() };
    let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
    let mut routes: Vec<Route> = Vec::with_capacity(tables.len());
    for table in &tables {
        let route = route(table, &names);
        let earlier = routes.iter().position(|other| {
            has_no_condition(other)
                || (other.path_prefix == route.path_prefix
                    && other.host == route.host
                    && other.headers == route.headers
                    && other.models == route.models)
        });
        if let Some(earlier) = earlier {
            table.error(
                format!("is never reached: route[{earlier}] takes all it would"),
                "move it up, or narrow that one",
            );
        }
        routes.push(route);
        table.refuse_unknown_keys();
    }
    routes
}

fn has_no_condition(route: &Route) -> bool {
    route.path_prefix.is_none() && route.host.is_none() && route.headers.is_empty() && route.models.is_empty()
}

fn route(table: &Table<'_>, pools: &[&str]) -> Route {
    let pool = match table.item("pool") {
        Some(item) => item.string().inspect(|name| {
            if !pools.is_empty() && !pools.contains(&name.as_str()) {
                item.error("no such pool", keys::one_of(name, pools));
            }
        }),
        None => {
            if pools.len() > 1 {
                table.missing("pool", keys::one_of("", pools));
            }
            pools.first().map(|&only| only.to_owned())
        }
    };
    Route {
        pool: pool.unwrap_or_default(),
        path_prefix: table.item("path_prefix").and_then(|item| path_prefix(&item)),
        host: table.item("host").and_then(|item| host_pattern(&item)),
        headers: header_conditions(table),
        models: models(table.item("models"), true),
        replay: table.item("replay").and_then(|item| item.choice(REPLAY)),
        total: table.item("total").and_then(|item| item.duration(RUNNING)),
        priority: table.item("priority").and_then(|item| item.choice(PRIORITY)),
    }
}

fn path_prefix(item: &Item<'_>) -> Option<String> {
    let text = item.string()?;
    let is_path = text.starts_with('/')
        && !text.contains(['?', '#', '*'])
        && text.bytes().all(|b| b.is_ascii_graphic());
    if !is_path {
        item.error("is not the beginning of a path", "write one such as \"/v1/embeddings\"");
    }
    is_path.then_some(text)
}

/// `api.example.com` or `*.example.com`, in lower case.
fn host_pattern(item: &Item<'_>) -> Option<String> {
    let text = item.string()?.to_ascii_lowercase();
    let host = text.strip_prefix("*.").unwrap_or(&text);
    let is_ip = host.starts_with('[') && host.ends_with(']');
    let is_host = is_ip
        || (!host.is_empty()
            && !host.starts_with('.')
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')));
    if !is_host {
        item.error("is not a host", "write \"api.example.com\" or \"*.example.com\", without a port");
    }
    is_host.then_some(text)
}

fn header_conditions(table: &Table<'_>) -> Vec<(HeaderName, String)> {
    // A condition may be an API key that selects a tenant.
    let entries = table.entries("headers", true);
    let mut conditions: Vec<(HeaderName, String)> = Vec::with_capacity(entries.len());
    for (name, item) in entries {
        let value = item.secret_text();
        let Some(name) = header_name(name, &item) else { continue };
        if conditions.iter().any(|(other, _)| *other == name) {
            item.error_without_value("is asked for twice", "header names do not differ by case");
            continue;
        }
        let Some(Text { value, .. }) = value else { continue };
        conditions.push((name, value));
    }
    conditions
}

fn limits(table: &Table<'_>) -> Limits {
    let default = Limits::default();
    let bytes = |key, default: usize, range| {
        let default = u64::try_from(default).unwrap_or(u64::MAX);
        usize::try_from(table.size(key, default, range)).unwrap_or(usize::MAX)
    };
    let memory_max = match table.item("memory_max") {
        Some(item) if !item.is_text("auto") => item.size(MIB..=TIB).unwrap_or(default.memory_max),
        _ => default.memory_max,
    };
    let limits = Limits {
        connections_max: table.integer("connections_max", default.connections_max, 1..=10_000_000),
        head_bytes_max: bytes("head_bytes_max", default.head_bytes_max, 8 * KIB..=16 * MIB),
        headers_max: table.integer("headers_max", default.headers_max, 1..=10_000),
        body_bytes_max: table.size("body_bytes_max", default.body_bytes_max, 1..=TIB),
        replay_body_max: bytes("replay_body_max", default.replay_body_max, 0..=TIB),
        held_body_max: bytes("held_body_max", default.held_body_max, 0..=TIB),
        event_bytes_max: bytes("event_bytes_max", default.event_bytes_max, KIB..=1024 * MIB),
        memory_max,
        h2_streams_max: table.integer("h2_streams_max", default.h2_streams_max, 1..=65_535),
    };
    table.refuse_unknown_keys();
    limits
}

fn client_clocks(table: &Table<'_>) -> ClientClocks {
    let default = ClientClocks::default();
    let clock = |key, default| table.duration(key, default, RUNNING);
    let clocks = ClientClocks {
        idle: clock("idle", default.idle),
        head: clock("head", default.head),
        upload_idle: clock("upload_idle", default.upload_idle),
        slow_reader: clock("slow_reader", default.slow_reader),
    };
    table.refuse_unknown_keys();
    clocks
}

fn telemetry(table: &Table<'_>) -> Telemetry {
    let default = Telemetry::default();
    let telemetry = Telemetry {
        log_level: table.item("log_level").and_then(|item| log_level(&item)).unwrap_or(default.log_level),
        log_format: table.choice(
            "log_format",
            default.log_format,
            &[("auto", LogFormat::Auto), ("pretty", LogFormat::Pretty), ("json", LogFormat::Json)],
        ),
        access_log: table.item("access_log").and_then(|item| access_log(&item)).unwrap_or(default.access_log),
    };
    table.refuse_unknown_keys();
    telemetry
}

/// A level, or directives such as `info,evergate::proxy=debug`.
fn log_level(item: &Item<'_>) -> Option<String> {
    const LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];
    let text = item.string()?;
    let is_known = if text.contains(['=', ',']) {
        tracing_subscriber::EnvFilter::builder().parse(&text).is_ok()
    } else {
        LEVELS.contains(&text.as_str())
    };
    if !is_known {
        item.error("is not a log level", keys::one_of(&text, LEVELS));
    }
    is_known.then_some(text)
}

fn access_log(item: &Item<'_>) -> Option<AccessLogTarget> {
    let text = item.string()?;
    match text.as_str() {
        "stdout" => Some(AccessLogTarget::Stdout),
        "stderr" => Some(AccessLogTarget::Stderr),
        "off" => Some(AccessLogTarget::Off),
        path if path.contains('/') => Some(AccessLogTarget::File(PathBuf::from(path))),
        other => {
            let advice = keys::one_of(other, &["stdout", "stderr", "off"]);
            item.error("is not a place for records", format!("{advice}, or a path with a /"));
            None
        }
    }
}
