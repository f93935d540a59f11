//! The configuration of the demo: evergate's defaults, but for a few clocks that would bore a spectator.
//!
//! What is told about them is read from two validated configurations, the demo's and the default one,
//! so the telling cannot drift from what is in force.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{self, Config, ConfigErrors, Pool};
use crate::sim::Replica;

/// What errors name; there should be none.
const ORIGIN: &str = "the demo's configuration";

/// The keys that differ from their defaults: table, key, value here, and how a pool of them says it.
const SHORTER: &[Clock] = &[
    Clock {
        table: "pool.probe",
        key: "interval",
        here: "1s",
        of: |pool| pool.probe.interval,
        what: "between two probes of a replica",
    },
    Clock {
        table: "pool.probe",
        key: "interval_unsteady",
        here: "250ms",
        of: |pool| pool.probe.interval_unsteady,
        what: "the same, while it fails or returns",
    },
    Clock {
        table: "pool.probe",
        key: "timeout",
        here: "500ms",
        of: |pool| pool.probe.timeout,
        what: "then a probe has failed",
    },
    Clock {
        table: "pool.clocks",
        key: "inter_token",
        here: "1s",
        of: |pool| pool.clocks.inter_token,
        what: "silence that makes a stream suspect",
    },
    Clock {
        table: "pool.health",
        key: "slow_start",
        here: "3s",
        of: |pool| pool.health.slow_start,
        what: "growing share of one that returned",
    },
];

struct Clock {
    table: &'static str,
    key: &'static str,
    here: &'static str,
    of: fn(&Pool) -> Duration,
    what: &'static str,
}

/// A clock that differs from its default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shorter {
    /// As in a configuration file, from its pool on: `probe.interval`.
    pub(super) key: String,
    pub(super) here: Duration,
    pub(super) default: Duration,
    pub(super) what: &'static str,
}

/// The demo's configuration, in front of these replicas.
pub(super) fn config(listen: Option<SocketAddr>, replicas: &[Arc<Replica>]) -> Result<Config, ConfigErrors> {
    let backends: Vec<(&str, String)> =
        replicas.iter().map(|replica| (replica.config().name.as_str(), replica.url())).collect();
    config::parse(&text(listen, &backends, SHORTER), ORIGIN, &|_| None)
}

/// In what it differs from the defaults.
pub(super) fn shorter(config: &Config) -> Vec<Shorter> {
    let plain = config::from_flags(None, None, &["http://127.0.0.1:1".to_owned()], None).ok();
    let default = plain.as_ref().and_then(|plain| plain.pools.first());
    let (Some(here), Some(default)) = (config.pools.first(), default) else { return Vec::new() };
    SHORTER
        .iter()
        .map(|clock| Shorter {
            key: format!("{}.{}", clock.table.trim_start_matches("pool."), clock.key),
            here: (clock.of)(here),
            default: (clock.of)(default),
            what: clock.what,
        })
        .collect()
}

/// Addresses are the kernel's choice, so that the demo runs beside whatever runs already.
fn text(listen: Option<SocketAddr>, backends: &[(&str, String)], clocks: &[Clock]) -> String {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut text = format!(
        "workers = 2\ndrain_deadline = \"1s\"\n\n[[listener]]\naddress = \"{}\"\n\n[admin]\naddress = \"{any}\"\n\n\
         [telemetry]\nlog_level = \"off\"\naccess_log = \"off\"\n\n[[pool]]\nname = \"demo\"\nbackends = [\n",
        listen.unwrap_or(any)
    );
    for (name, url) in backends {
        let _infallible = writeln!(text, "  {{ name = \"{name}\", url = \"{url}\" }},");
    }
    text.push_str("]\n");
    let mut table = "";
    for clock in clocks {
        if clock.table != table {
            table = clock.table;
            let _infallible = writeln!(text, "\n[{table}]");
        }
        let _infallible = writeln!(text, "{} = \"{}\"", clock.key, clock.here);
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a demo says about its clocks.
    pub(in crate::demo) fn shorter_here() -> Vec<Shorter> {
        let backends = [("replica-a", "http://127.0.0.1:1".to_owned())];
        shorter(&config::parse(&text(None, &backends, SHORTER), ORIGIN, &|_| None).unwrap())
    }

    #[test]
    fn every_clock_said_to_be_shorter_is_shorter() {
        let shorter = shorter_here();
        assert_eq!(shorter.len(), SHORTER.len());
        for clock in &shorter {
            assert!(clock.here < clock.default, "{clock:?}");
        }
        assert_eq!(shorter[0].key, "probe.interval");
    }

    #[test]
    fn nothing_else_differs_from_the_defaults() {
        let backends = [("replica-a", "http://127.0.0.1:1".to_owned())];
        let mut here = config::parse(&text(None, &backends, &[]), ORIGIN, &|_| None).unwrap();
        let default = config::from_flags(None, None, &[backends[0].1.clone()], None).unwrap();
        (here.pools[0].name, here.pools[0].backends) =
            (default.pools[0].name.clone(), default.pools[0].backends.clone());
        assert_eq!(here.pools, default.pools);
        assert_eq!(here.limits, default.limits);
        assert_eq!(here.client_clocks, default.client_clocks);
    }
}
