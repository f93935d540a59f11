//! The documents against the code: what a program or an operator may meet is written down, what is
//! written down exists, and no link is dead.
//!
//! Names are read from the source as text where it has no list of them: a table that is complete is worth
//! more than a parser that is. `tests/examples.rs` does the same for configuration keys.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use evergate::telemetry::metrics::{AttemptOutcome, End, Metrics, ProbeResult};

const ERRORS: &str = include_str!("../docs/errors.md");
const TELEMETRY: &str = include_str!("../docs/telemetry.md");

/// Words the glossary replaces, as far as they have no second meaning here.
const NOT_OUR_WORDS: &[&str] =
    &["circuit breaker", "half-open", "hot restart", "maintenance mode", "upstream group"];

/// Longest line of prose. Tables and code may be longer.
const LINE_CHARS_MAX: usize = 120;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A source file on one line, so that it does not matter where it was wrapped.
fn source(path: &str) -> String {
    let text = fs::read_to_string(root().join(path)).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The string literals that come right after `before`, white space aside.
fn literals_after(text: &str, before: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for rest in text.split(before).skip(1) {
        if let Some(literal) = rest.trim_start().strip_prefix('"') {
            found.insert(literal.split('"').next().unwrap().to_owned());
        }
    }
    found
}

/// The part of `text` from `from` to `to`.
fn between<'t>(text: &'t str, from: &str, to: &str) -> &'t str {
    let start = text.find(from).unwrap_or_else(|| panic!("no `{from}`"));
    let rest = &text[start + from.len()..];
    &rest[..rest.find(to).unwrap_or_else(|| panic!("no `{to}` after `{from}`"))]
}

/// Words in the first column of the tables, each in backticks.
fn first_columns(document: &str) -> BTreeSet<String> {
    let cells = document.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

#[track_caller]
fn assert_documented(names: &BTreeSet<String>, document: &str, at_least: usize) {
    assert!(names.len() >= at_least, "only {} names were found in the source: {names:?}", names.len());
    let missing: Vec<_> = names.iter().filter(|name| !document.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "not documented: {missing:?}");
}

fn names(names: impl IntoIterator<Item = &'static str>) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[test]
fn every_error_code_is_documented() {
    let respond = source("src/proxy/respond.rs");
    let of_proxy = literals_after(between(&respond, "fn code(&self)", "fn status(&self)"), "=>");
    assert_documented(&of_proxy, ERRORS, 12);
    let answer = source("src/server/answer.rs");
    assert_documented(&literals_after(&answer, "StatusCode::INTERNAL_SERVER_ERROR,"), ERRORS, 1);
    assert_documented(&literals_after(&answer, "StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,"), ERRORS, 1);
    let access = source("src/admin/access.rs");
    assert_documented(&literals_after(between(&access, "fn describe", "/// Decides"), "("), ERRORS, 4);
    let reasons = source("src/policy/retry/mod.rs");
    assert_documented(
        &literals_after(between(&reasons, "impl Reason", "/// What an exchange"), "=>"),
        ERRORS,
        5,
    );
    let exchange = source("src/proxy/exchange.rs") + &source("src/proxy/exchange/turn.rs");
    assert_documented(&literals_after(&exchange, "enough:"), ERRORS, 2);
    let api = source("src/admin/api.rs");
    let of_admin: BTreeSet<String> = api
        .split("StatusCode::")
        .skip(1)
        .filter_map(|rest| {
            let literal = rest.split_once(", ")?.1.strip_prefix('"')?;
            Some(literal.split('"').next()?.to_owned())
        })
        .collect();
    assert_documented(&of_admin, ERRORS, 5);
}

#[test]
fn every_documented_error_code_exists() {
    let files = [
        "src/proxy/respond.rs",
        "src/proxy/exchange.rs",
        "src/proxy/exchange/turn.rs",
        "src/server/answer.rs",
        "src/admin/api.rs",
        "src/admin/access.rs",
        "src/policy/retry/mod.rs",
    ];
    let code: String = files.into_iter().map(source).collect();
    for name in first_columns(ERRORS) {
        let is_code = name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        assert!(!is_code || code.contains(&format!("\"{name}\"")), "documented, but not in the code: {name}");
    }
}

/// Every family, by the source; those that have series before anything happened are a check of that.
fn families() -> BTreeSet<String> {
    let text = source("src/telemetry/metrics.rs");
    let ours = literals_after(&text, "(&r,").into_iter().chain(literals_after(&text, "( &r,"));
    let mut found: BTreeSet<String> = ours.map(|name| format!("evergate_{name}")).collect();
    found
        .extend(literals_after(&text, "Gauge::new(").into_iter().filter(|name| name.starts_with("process_")));
    let metrics = Metrics::new();
    let _backend = metrics.backend("pool", "backend");
    let _pool = metrics.pool("pool");
    for line in metrics.render().lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let name = family.split(' ').next().unwrap();
            assert!(found.contains(name), "{name} was not found in the source");
        }
    }
    found
}

#[test]
fn every_metric_is_documented() {
    assert_documented(&families(), TELEMETRY, 50);
    assert_documented(&names(ProbeResult::ALL.map(ProbeResult::name)), TELEMETRY, 4);
}

#[test]
fn every_documented_metric_exists() {
    let families = families();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
            let bare =
                ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            let known = families.contains(word) || families.contains(bare);
            assert!(
                !word.starts_with("evergate_") || word == "evergate_" || known,
                "{}: there is no {word}",
                document.display()
            );
        }
    }
}

#[test]
fn every_event_and_word_of_an_access_record_is_documented() {
    let events = source("src/telemetry/events.rs");
    let events = events.split("#[cfg(test)]").next().unwrap();
    let emitted: BTreeSet<String> = events
        .split("Notice::new(Severity::")
        .chain(events.split("Notice::new(severity"))
        .skip(1)
        .filter_map(|rest| rest.split_once(", \"").filter(|(before, _)| before.len() < 8))
        .map(|(_, rest)| rest.split('"').next().unwrap().to_owned())
        .collect();
    let notices = events.matches("Notice::new(").count();
    assert!(emitted.len() + 3 >= notices, "{notices} events are made, {} were found", emitted.len());
    assert_documented(&emitted, TELEMETRY, 18);
    let transitions = source("src/policy/health/transition.rs");
    let named = |from: &str, to: &str| literals_after(between(&transitions, from, to), "=>");
    assert_documented(&named("impl Transition", "impl fmt::Display for Transition"), TELEMETRY, 14);
    assert_documented(&named("impl EjectReason", "impl fmt::Display for EjectReason"), TELEMETRY, 4);
    let classify = source("src/policy/retry/classify.rs");
    let causes = literals_after(between(&classify, "impl Cause", "pub fn is_answer"), "=>");
    let answered = names(["answered"]); // is no failure, and never written
    assert_documented(&causes.difference(&answered).cloned().collect(), TELEMETRY, 30);
    assert_documented(&literals_after(between(&classify, "impl Phase", "enum Cause"), "=>"), TELEMETRY, 6);
    assert_documented(&names(AttemptOutcome::ALL.map(AttemptOutcome::name)), TELEMETRY, 8);
    assert_documented(&names(End::ALL.map(End::name)), TELEMETRY, 4);
    for limits in ["src/proxy", "src/server"] {
        for file in files(&root().join(limits), "rs") {
            let text = source(file.strip_prefix(root()).unwrap().to_str().unwrap());
            assert_documented(&literals_after(&text, "count_limit("), TELEMETRY, 0);
        }
    }
}

/// All documents of the repository.
fn documents() -> Vec<PathBuf> {
    let found = files(root(), "md");
    assert!(found.len() > 15, "{found:?}");
    found
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // What is built, fetched or hidden is not ours.
        if name.starts_with('.') || name == "target" || name == "node_modules" {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|end| end == extension) {
            found.push(path);
        }
    }
    found
}

/// Lines outside fenced blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(i, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        (!fenced && !fence).then_some((i + 1, line))
    })
}

#[test]
fn no_link_is_dead() {
    let mut dead = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with(['#', '<'])) {
            let file = link.split('#').next().unwrap();
            if !document.parent().unwrap().join(file).exists() {
                dead.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
}

#[test]
fn files_named_in_documents_exist() {
    let ours = ["src/", "tests/", "docs/", "config/", "deploy/", "benches/", ".ci/"];
    let mut gone = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        // The lab and the fuzz crate have a `src` of their own.
        let base = document.parent().unwrap();
        for (number, line) in prose(&text) {
            for named in line.split('`').skip(1).step_by(2).filter(|n| ours.iter().any(|o| n.starts_with(o)))
            {
                let path = named.split([' ', '<', '*', '{', '…', '#']).next().unwrap();
                // `config/file` is a module's name.
                if path.starts_with("config/") && !path.contains('.') {
                    continue;
                }
                if !root().join(path).exists() && !base.join(path).exists() {
                    gone.push(format!("{}:{number}: {named}", document.display()));
                }
            }
        }
    }
    assert!(gone.is_empty(), "{gone:#?}");
}

#[test]
fn prose_is_wrapped_and_in_our_words() {
    let mut wrong = Vec::new();
    for document in documents() {
        let relative = document.strip_prefix(root()).unwrap().to_owned();
        let text = fs::read_to_string(&document).unwrap();
        let is_ours = relative.components().count() == 1 || relative.starts_with("docs");
        for (number, line) in prose(&text) {
            let at = format!("{}:{number}", relative.display());
            if is_ours
                && !line.starts_with('|')
                && !line.starts_with("    ")
                && line.chars().count() > LINE_CHARS_MAX
            {
                wrong.push(format!("{at}: longer than {LINE_CHARS_MAX} characters"));
            }
            let lower = line.to_lowercase();
            wrong.extend(
                NOT_OUR_WORDS.iter().filter(|word| lower.contains(**word)).map(|w| format!("{at}: {w}")),
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_readme_has_the_command_that_ci_runs() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    assert!(readme.contains("<!-- ci:test -->\n```\ncargo test\n```\n"), "see .ci/run, step test");
    assert!(readme.contains("```\ncargo run --release -- demo\n```\n"));
}
