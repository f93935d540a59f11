//! What evergate tells about itself: log lines, metrics, events and access records.
//!
//! A notable occurrence is a type in [`events`]; emitting it logs once and counts once. The hot path
//! only adds to atomics whose handles were resolved when its backend, pool or listener was made
//! ([`metrics`]), and pushes one record per exchange into a worker's own buffer ([`access_log`]).
//! One [`Telemetry`] per process, or per test: nothing here is a global except the log subscriber.

pub mod access_log;
pub mod events;
pub mod metrics;

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config;
use crate::config::LogFormat;

use access_log::AccessLog;
use events::EventLog;
use metrics::Metrics;

/// Environment variable that overrides the configured log filter.
pub const LOG_VARIABLE: &str = "EVERGATE_LOG";

/// Log level used when the one asked for cannot be read.
const LOG_LEVEL_FALLBACK: &str = "info";

/// Everything one running evergate counts and records. Share it in an `Arc`.
#[derive(Debug)]
pub struct Telemetry {
    /// Counters, gauges and histograms.
    pub metrics: Metrics,
    /// The latest notable transitions.
    pub events: EventLog,
    /// One record per exchange.
    pub access_log: AccessLog,
}

impl Telemetry {
    /// Opens the access log as configured. Fails when its file cannot be opened.
    pub fn new(config: &config::Telemetry) -> std::io::Result<Self> {
        let metrics = Metrics::new();
        let access_log =
            AccessLog::open(&config.access_log, config.log_format, metrics.access_records_dropped.clone())?;
        Ok(Self { metrics, events: EventLog::new(), access_log })
    }

    /// Counts, keeps events, writes no access records: for tests and one-shot commands.
    pub fn silent() -> Self {
        let metrics = Metrics::new();
        let access_log = AccessLog::off(metrics.access_records_dropped.clone());
        Self { metrics, events: EventLog::new(), access_log }
    }
}

/// A log filter that cannot be read; `info` is used in its place.
#[derive(Debug)]
pub struct BadLogFilter {
    /// The text at fault.
    pub filter: String,
    reason: String,
}

impl std::fmt::Display for BadLogFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "log filter \"{}\" cannot be read: {}", self.filter, self.reason)
    }
}

impl std::error::Error for BadLogFilter {}

/// Starts logging to standard error: pretty on a terminal, else one JSON object a line. The filter
/// is `EVERGATE_LOG` where set, else the configured level. Only the first call in a process has an
/// effect. An unreadable filter is an error, and logging has then started with `info`.
pub fn init(config: &config::Telemetry) -> Result<(), BadLogFilter> {
    let asked = std::env::var(LOG_VARIABLE).ok().filter(|filter| !filter.trim().is_empty());
    let asked = asked.as_deref().unwrap_or(&config.log_level);
    let (filter, verdict) = match read_filter(asked) {
        Ok(filter) => (filter, Ok(())),
        Err(bad) => (EnvFilter::new(LOG_LEVEL_FALLBACK), Err(bad)),
    };
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An error means that another subscriber is installed already, which is what idempotent asks for.
    let _installed_before = if wants_pretty(config.log_format, std::io::stderr().is_terminal()) {
        let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        tracing::subscriber::set_global_default(subscriber.with_ansi(ansi).with_target(false).finish())
    } else {
        tracing::subscriber::set_global_default(subscriber.json().flatten_event(true).finish())
    };
    verdict
}

/// Whether `filter` can be read as a log filter: `info`, `debug`, `info,evergate=trace`.
/// For the validation of a configuration.
pub fn check_filter(filter: &str) -> Result<(), BadLogFilter> {
    read_filter(filter).map(drop)
}

fn read_filter(filter: &str) -> Result<EnvFilter, BadLogFilter> {
    EnvFilter::try_new(filter)
        .map_err(|error| BadLogFilter { filter: filter.to_owned(), reason: error.to_string() })
}

/// Pretty is for people: asked for, or unsaid in front of a terminal.
fn wants_pretty(format: LogFormat, terminal: bool) -> bool {
    match format {
        LogFormat::Auto => terminal,
        LogFormat::Pretty => true,
        LogFormat::Json => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(log_level: &str) -> config::Telemetry {
        config::Telemetry {
            log_level: log_level.to_owned(),
            log_format: LogFormat::Auto,
            access_log: config::AccessLogTarget::Off,
        }
    }

    #[test]
    fn logging_may_be_started_again_and_a_bad_filter_is_told() {
        assert!(init(&config("warn")).is_ok());
        assert!(init(&config("warn")).is_ok());
        assert!(check_filter("info,evergate=trace").is_ok());
        let bad = check_filter("evergate=loud=very").unwrap_err();
        assert!(bad.to_string().contains("evergate=loud=very"), "{bad}");
    }

    #[test]
    fn lines_are_pretty_where_people_read() {
        assert!(wants_pretty(LogFormat::Auto, true));
        assert!(!wants_pretty(LogFormat::Auto, false));
        assert!(wants_pretty(LogFormat::Pretty, false));
        assert!(!wants_pretty(LogFormat::Json, true));
    }
}
