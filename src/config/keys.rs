//! Every key a configuration may hold, and what to say about one it may not.
//!
//! One list, four readers: `file` refuses what is not on it, and tests hold the reference file, the
//! documentation and the effective configuration against it.

/// A table of the file and the keys it may hold.
pub(super) struct Section {
    /// As in `[path]`; list indices left out.
    pub(super) path: &'static str,
    pub(super) keys: &'static [&'static str],
}

pub(super) const TOP: Section = Section {
    path: "",
    keys: &[
        "workers",
        "drain_deadline",
        "listener",
        "admin",
        "pool",
        "route",
        "limits",
        "client",
        "telemetry",
    ],
};
pub(super) const LISTENER: Section =
    Section { path: "listener", keys: &["address", "tls", "trusted_proxies"] };
pub(super) const LISTENER_TLS: Section = Section { path: "listener.tls", keys: &["certificate", "key"] };
pub(super) const ADMIN: Section = Section { path: "admin", keys: &["address", "token"] };
pub(super) const POOL: Section = Section {
    path: "pool",
    keys: &[
        "name", "backends", "models", "aliases", "http", "balance", "health", "probe", "progress", "outlier",
        "retry", "queue", "resume", "clocks", "load", "tls", "fallback",
    ],
};
pub(super) const BACKEND: Section = Section {
    path: "pool.backends",
    keys: &["url", "name", "weight", "tier", "in_flight_max", "headers", "disabled"],
};
pub(super) const BALANCE: Section =
    Section { path: "pool.balance", keys: &["strategy", "header", "prompt_bytes", "bound"] };
pub(super) const HEALTH: Section = Section {
    path: "pool.health",
    keys: &[
        "fall",
        "rise",
        "eject_consecutive",
        "success_rate_min",
        "outcomes_min",
        "peer_margin",
        "window",
        "ejection_min",
        "ejection_max",
        "ejection_decay",
        "ejection_jitter",
        "misconfigured_ejection",
        "slow_start",
        "slow_start_share_min",
        "busy_min",
        "busy_max",
        "retry_after_max",
    ],
};
pub(super) const PROBE: Section = Section {
    path: "pool.probe",
    keys: &[
        "kind",
        "preset",
        "path",
        "statuses",
        "body",
        "endpoint",
        "model",
        "prompt",
        "expect",
        "interval",
        "interval_unsteady",
        "timeout",
        "deadline",
    ],
};
pub(super) const LOAD: Section = Section { path: "pool.load", keys: &["scrape", "interval"] };
pub(super) const PROGRESS: Section = Section {
    path: "pool.progress",
    keys: &[
        "first_token_min",
        "first_token_unknown",
        "token_gap_min",
        "token_gap_unknown",
        "factor",
        "hedge_ratio",
    ],
};
pub(super) const OUTLIER: Section = Section {
    path: "pool.outlier",
    keys: &[
        "ratio_min",
        "eject_ratio_min",
        "deviations_min",
        "first_token_floor",
        "token_gap_floor",
        "samples_min",
        "memory",
        "factor_max",
        "persistent",
    ],
};
pub(super) const RESUME: Section = Section {
    path: "pool.resume",
    keys: &["mode", "resumes_max", "replay_tokens_max", "journal_bytes_max", "second_opinion"],
};
pub(super) const RETRY: Section = Section {
    path: "pool.retry",
    keys: &[
        "attempts_max",
        "budget_ratio",
        "budget_floor",
        "backoff_min",
        "backoff_max",
        "wait_max",
        "replay",
    ],
};
pub(super) const QUEUE: Section =
    Section { path: "pool.queue", keys: &["wait_max", "length_max", "priority_header"] };
pub(super) const CLOCKS: Section = Section {
    path: "pool.clocks",
    keys: &[
        "connect",
        "connect_tls",
        "write_idle",
        "head",
        "first_token",
        "answer",
        "inter_token",
        "silence_max",
        "drain_move",
        "drain_end",
        "body_idle",
        "total",
        "idle",
        "h2_ping",
        "h2_ping_timeout",
        "dns_min",
    ],
};
pub(super) const UPSTREAM_TLS: Section =
    Section { path: "pool.tls", keys: &["ca", "client_certificate", "client_key", "server_name"] };
pub(super) const FALLBACK: Section = Section { path: "pool.fallback", keys: &["pool", "on", "model"] };
pub(super) const ROUTE: Section = Section {
    path: "route",
    keys: &["pool", "path_prefix", "host", "headers", "models", "replay", "total", "priority"],
};
pub(super) const LIMITS: Section = Section {
    path: "limits",
    keys: &[
        "connections_max",
        "head_bytes_max",
        "headers_max",
        "body_bytes_max",
        "replay_body_max",
        "held_body_max",
        "event_bytes_max",
        "memory_max",
        "h2_streams_max",
    ],
};
pub(super) const CLIENT: Section =
    Section { path: "client", keys: &["idle", "head", "upload_idle", "slow_reader"] };
pub(super) const TELEMETRY: Section =
    Section { path: "telemetry", keys: &["log_level", "log_format", "access_log"] };

/// In the order of the documentation.
const SECTIONS: &[&Section] = &[
    &TOP,
    &LISTENER,
    &LISTENER_TLS,
    &ADMIN,
    &POOL,
    &BACKEND,
    &BALANCE,
    &HEALTH,
    &PROBE,
    &LOAD,
    &PROGRESS,
    &OUTLIER,
    &RETRY,
    &RESUME,
    &QUEUE,
    &CLOCKS,
    &UPSTREAM_TLS,
    &FALLBACK,
    &ROUTE,
    &LIMITS,
    &CLIENT,
    &TELEMETRY,
];

/// What other proxies call it → what it is called here.
const SYNONYMS: &[(&str, &str)] = &[
    ("bind", "address"),
    ("cert", "certificate"),
    ("clusters", "pool"),
    ("drain_timeout", "drain_deadline"),
    ("dialect", "preset"),
    ("endpoints", "backends"),
    ("engine", "preset"),
    ("hosts", "backends"),
    ("in_flight", "in_flight_max"),
    ("level", "log_level"),
    ("listen", "address"),
    ("max_attempts", "attempts_max"),
    ("max_body_size", "body_bytes_max"),
    ("max_connections", "connections_max"),
    ("max_in_flight", "in_flight_max"),
    ("max_retries", "attempts_max"),
    ("members", "backends"),
    ("model", "models"),
    ("max_queue", "length_max"),
    ("prefix", "path_prefix"),
    ("priority", "tier"),
    ("retries", "attempts_max"),
    ("servers", "backends"),
    ("threads", "workers"),
    ("upstream", "pool"),
    ("upstreams", "backends"),
    ("uri", "url"),
];

/// Every table and the keys it may hold, in the order of the documentation: `("pool.clocks", ["connect", …])`.
/// The path of the top level is empty.
pub fn known_keys() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    SECTIONS.iter().map(|section| (section.path, section.keys))
}

/// The key of the section that an unknown one most likely stands for.
pub(super) fn means(section: &Section, key: &str) -> Option<&'static str> {
    let unknown = !section.keys.contains(&key);
    let synonym = || {
        let known = SYNONYMS.iter().find(|(word, meant)| *word == key && section.keys.contains(meant));
        known.map(|&(_, meant)| meant)
    };
    nearest(key, section.keys).or_else(synonym).filter(|_| unknown)
}

/// What to write instead of an unknown key.
pub(super) fn advice(section: &Section, key: &str) -> String {
    if let Some(meant) = means(section, key) {
        return format!("did you mean {meant}");
    }
    let elsewhere: Vec<String> = SECTIONS
        .iter()
        .filter(|other| other.keys.contains(&key))
        .map(
            |other| {
                if other.path.is_empty() { "the top level".to_owned() } else { format!("[{}]", other.path) }
            },
        )
        .collect();
    if !elsewhere.is_empty() {
        return format!("it belongs to {}", elsewhere.join(" or "));
    }
    format!("known here: {}", section.keys.join(", "))
}

/// What to write instead of an unknown name: the nearest of `names`, else all of them.
pub(super) fn one_of(word: &str, names: &[&str]) -> String {
    match (nearest(word, names), names) {
        (Some(near), _) => format!("did you mean {near:?}"),
        (None, [only]) => format!("write {only:?}"),
        (None, _) => {
            let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
            format!("write one of {}", quoted.join(", "))
        }
    }
}

/// The candidate a typing mistake away from `word`, if there is one.
fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    // The distance is quadratic in the length; nobody mistypes this many letters.
    if word.len() > 64 {
        return None;
    }
    let word = word.to_ascii_lowercase().replace('-', "_");
    let mistakes_max = (word.chars().count() / 3).clamp(1, 3);
    candidates
        .iter()
        .map(|&candidate| (strsim::damerau_levenshtein(&word, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(mistakes, candidate)| {
            *mistakes <= mistakes_max || (word.len() >= 4 && candidate.starts_with(&word))
        })
        .min_by_key(|(mistakes, _)| *mistakes)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_key_is_answered_with_the_one_meant() {
        assert_eq!(advice(&POOL, "backend"), "did you mean backends");
        assert_eq!(advice(&POOL, "bakcends"), "did you mean backends");
        assert_eq!(advice(&BACKEND, "in-flight-max"), "did you mean in_flight_max");
        assert_eq!(advice(&POOL, "servers"), "did you mean backends");
        assert_eq!(advice(&POOL, "connect"), "it belongs to [pool.clocks]");
        assert_eq!(advice(&ADMIN, "zebra"), "known here: address, token");
    }

    #[test]
    fn sections_list_each_key_once() {
        for (path, keys) in known_keys() {
            for (index, key) in keys.iter().enumerate() {
                assert!(!keys[..index].contains(key), "{path}.{key} twice");
            }
        }
    }
}
