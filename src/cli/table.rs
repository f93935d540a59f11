//! A status for people: one line on the process, what is wrong first, then a table per pool.

use std::fmt::Write as _;

use serde_json::Value;

use crate::admin::{BackendStatus, ModelStatus, PoolStatus, StandingStatus, Status};

/// Events shown below the tables.
const EVENTS_SHOWN: usize = 5;

const HEADINGS: [&str; 9] =
    ["BACKEND", "STATE", "ADMIN", "SHARE", "IN FLIGHT", "SUCCESS", "ATTEMPTS", "FAULTS", "LAST PROBE"];

/// Columns of numbers stand to the right.
const RIGHT: [bool; 9] = [false, false, false, true, true, true, true, true, false];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Colour {
    Plain,
    Good,
    Doubtful,
    Bad,
    Strong,
}

impl Colour {
    fn paint(self, text: &str, colours: bool) -> String {
        let code = match self {
            Self::Plain => return text.to_owned(),
            Self::Good => "32",
            Self::Doubtful => "33",
            Self::Bad => "1;31",
            Self::Strong => "1",
        };
        if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

struct Cell {
    text: String,
    colour: Colour,
}

impl Cell {
    fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), colour: Colour::Plain }
    }
}

/// The whole page.
pub(super) fn render(status: &Status, colours: bool) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{}", headline(status, colours));
    refusal(&mut out, status, colours);
    for pool in &status.pools {
        let _ = writeln!(out, "\n{}", pool_line(pool, colours));
        table(&mut out, pool, colours);
    }
    let latest = status.events.len().saturating_sub(EVENTS_SHOWN);
    for (i, event) in status.events[latest..].iter().enumerate() {
        let _ = writeln!(out, "{}{}", if i == 0 { "\n" } else { "" }, event_line(event, colours));
    }
    out
}

fn headline(status: &Status, colours: bool) -> String {
    let listeners: Vec<String> = status
        .listeners
        .iter()
        .map(|listener| format!("{}{}", listener.address, if listener.tls { " (TLS)" } else { "" }))
        .collect();
    let serving = match (status.draining, listeners.is_empty()) {
        (true, _) => Colour::Doubtful.paint("DRAINING", colours),
        (false, true) => Colour::Bad.paint("NOT LISTENING", colours),
        (false, false) => format!("on {}", listeners.join(", ")),
    };
    format!(
        "evergate {} {serving}, up {}, configuration {}{}",
        status.version,
        age(status.uptime_seconds),
        status.generation,
        status.config_file.as_ref().map(|file| format!(" ({file})")).unwrap_or_default()
    )
}

fn refusal(out: &mut String, status: &Status, colours: bool) {
    let Some(report) = &status.refused_reload else { return };
    let at = report["at"].as_str().unwrap_or_default();
    let head =
        format!("RELOAD REFUSED at {at}: the file is wrong, configuration {} stays", status.generation);
    let _ = writeln!(out, "\n{}", Colour::Bad.paint(&head, colours));
    for line in report["text"].as_str().unwrap_or_default().lines() {
        let _ = writeln!(out, "  {line}");
    }
}

fn pool_line(pool: &PoolStatus, colours: bool) -> String {
    let colour = match pool.eligible {
        0 => Colour::Bad,
        some if some < pool.members => Colour::Doubtful,
        _ => Colour::Good,
    };
    let mut line = format!(
        "{} {}, {}",
        Colour::Strong.paint(&format!("pool {}", pool.name), colours),
        pool.balance,
        colour.paint(&format!("{} of {} eligible", pool.eligible, pool.members), colours)
    );
    if pool.panic {
        let _ = write!(line, ", {}", Colour::Bad.paint("PANIC", colours));
    }
    if pool.waiting > 0 {
        let _ = write!(line, ", {}", Colour::Doubtful.paint(&format!("{} waiting", pool.waiting), colours));
    }
    line
}

fn table(out: &mut String, pool: &PoolStatus, colours: bool) {
    let mut rows = vec![HEADINGS.map(Cell::plain)];
    for backend in &pool.backends {
        rows.push(backend_row(backend));
        rows.extend(backend.models.iter().map(model_row));
    }
    let width = |column: usize| rows.iter().map(|row| row[column].text.chars().count()).max().unwrap_or(0);
    let widths: [usize; 9] = std::array::from_fn(width);
    for row in &rows {
        let mut line = String::from(" ");
        for (column, cell) in row.iter().enumerate() {
            let gap = " ".repeat(widths[column] - cell.text.chars().count());
            let text = cell.colour.paint(&cell.text, colours);
            let _ = match RIGHT[column] {
                true => write!(line, " {gap}{text} "),
                false => write!(line, " {text}{gap} "),
            };
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

fn backend_row(backend: &BackendStatus) -> [Cell; 9] {
    let attempts: u64 = backend.attempts.values().sum();
    let faults = backend.attempts.get("fault").copied().unwrap_or(0);
    let in_flight = match backend.in_flight_max {
        Some(max) => format!("{}/{max}", backend.in_flight),
        None => backend.in_flight.to_string(),
    };
    let admin = match backend.admin.as_str() {
        "enabled" => Cell::plain("enabled"),
        other => Cell { text: other.to_owned(), colour: Colour::Doubtful },
    };
    let probe = backend.last_probe.as_ref();
    let probe = probe.map(|probe| format!("{} {} ago", probe.saw, age(probe.ago_seconds)));
    let stale = if backend.addresses_stale { " (stale address)" } else { "" };
    [
        Cell::plain(format!("{}{stale}", backend.name)),
        state(&backend.health),
        admin,
        Cell::plain(share(&backend.health)),
        Cell::plain(in_flight),
        Cell::plain(success(&backend.health)),
        Cell::plain(attempts.to_string()),
        Cell { text: faults.to_string(), colour: if faults > 0 { Colour::Doubtful } else { Colour::Plain } },
        Cell::plain(probe.unwrap_or_else(|| "-".to_owned())),
    ]
}

/// A model below its backend, by its own judge.
fn model_row(model: &ModelStatus) -> [Cell; 9] {
    let mut row: [Cell; 9] = std::array::from_fn(|_| Cell::plain(""));
    row[0] = Cell::plain(format!("  {}", model.name));
    row[1] = state(&model.health);
    row[3] = Cell::plain(share(&model.health));
    row[5] = Cell::plain(success(&model.health));
    row
}

fn state(health: &StandingStatus) -> Cell {
    let name = if health.standing == "busy" { "busy" } else { health.state.as_str() };
    let text = match health.until_seconds {
        Some(seconds) => format!("{name} {}", age(seconds)),
        None => name.to_owned(),
    };
    let colour = match health.standing.as_str() {
        "eligible" if health.share >= 1.0 => Colour::Good,
        "eligible" | "busy" | "probation" => Colour::Doubtful,
        _ => Colour::Bad,
    };
    Cell { text, colour }
}

fn share(health: &StandingStatus) -> String {
    format!("{:.0}%", health.share * 100.0)
}

fn success(health: &StandingStatus) -> String {
    health.success_rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.1}%", rate * 100.0))
}

fn event_line(event: &Value, colours: bool) -> String {
    let text = |key: &str| event[key].as_str().unwrap_or_default();
    let colour = match text("severity") {
        "error" => Colour::Bad,
        "warn" => Colour::Doubtful,
        _ => Colour::Plain,
    };
    let place: Vec<&str> =
        ["pool", "backend"].into_iter().map(text).filter(|name| !name.is_empty()).collect();
    let place = if place.is_empty() { String::new() } else { format!("{}: ", place.join("/")) };
    let line = format!("{place}{}", text("text").lines().next().unwrap_or_default());
    format!("{}  {}", text("time"), colour.paint(&line, colours))
}

/// Two units at most: `4.2s`, `3m20s`, `2h13m`, `5d4h`.
fn age(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..10 => format!("{seconds:.1}s"),
        10..60 => format!("{whole}s"),
        60..3600 => format!("{}m{}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h{}m", whole / 3600, whole % 3600 / 60),
        86400.. => format!("{}d{}h", whole / 86400, whole % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> Status {
        serde_json::from_value(json!({
            "version": "0.1.0", "generation": 3, "uptime_seconds": 7990.0,
            "listeners": [{ "address": "127.0.0.1:8080", "tls": false }],
            "refused_reload": { "at": "2026-01-31T08:15:30.123Z", "text": "a.toml:1: x: is wrong\na.toml:2: y: too" },
            "pools": [{ "name": "llama", "balance": "p2c", "eligible": 1, "members": 2, "backends": [
                { "name": "gpu-1", "state": "healthy", "standing": "eligible", "share": 1.0, "admin": "enabled",
                  "in_flight": 3, "in_flight_max": 8, "success_rate": 0.998, "attempts": { "success": 120, "fault": 1 },
                  "models": [{ "name": "m", "state": "healthy", "standing": "eligible", "share": 1.0 }] },
                { "name": "gpu-with-a-long-name", "state": "ejected", "standing": "out", "until_seconds": 12.3,
                  "admin": "draining", "last_probe": { "saw": "503", "ago_seconds": 0.5 } },
            ]}],
            "events": [{ "time": "2026-01-31T08:15:31.000Z", "severity": "warn", "pool": "llama",
                         "backend": "gpu-1", "text": "ejected\nmore" }],
        }))
        .unwrap()
    }

    #[test]
    fn a_page_reads_so() {
        assert_eq!(
            render(&status(), false),
            "\
evergate 0.1.0 on 127.0.0.1:8080, up 2h13m, configuration 3

RELOAD REFUSED at 2026-01-31T08:15:30.123Z: the file is wrong, configuration 3 stays
  a.toml:1: x: is wrong
  a.toml:2: y: too

pool llama p2c, 1 of 2 eligible
  BACKEND               STATE        ADMIN     SHARE  IN FLIGHT  SUCCESS  ATTEMPTS  FAULTS  LAST PROBE
  gpu-1                 healthy      enabled    100%        3/8    99.8%       121       1  -
    m                   healthy                 100%                   -
  gpu-with-a-long-name  ejected 12s  draining     0%          0        -         0       0  503 0.5s ago

2026-01-31T08:15:31.000Z  llama/gpu-1: ejected
"
        );
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        let painted = render(&status(), true);
        let mut bare = String::new();
        let mut rest = painted.as_str();
        while let Some((before, after)) = rest.split_once('\x1b') {
            bare.push_str(before);
            rest = after.split_once('m').unwrap().1;
        }
        bare.push_str(rest);
        assert_ne!(painted, render(&status(), false));
        assert_eq!(bare, render(&status(), false));
    }

    #[test]
    fn an_empty_answer_is_shown_without_failing() {
        let page = render(&serde_json::from_str("{}").unwrap(), false);
        assert!(page.contains("NOT LISTENING"), "{page}");
    }
}
