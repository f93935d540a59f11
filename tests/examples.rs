//! Every file in `config/` loads, and the reference, its documentation and the known keys agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use evergate::config::{self, Config};

const REFERENCE: &str = include_str!("../config/reference.toml");
const DOCUMENTATION: &str = include_str!("../docs/configuration.md");

fn env(name: &str) -> Option<String> {
    Some(format!("value-of-{name}"))
}

fn read(text: &str) -> Config {
    config::parse(text, "test", &env).unwrap_or_else(|errors| panic!("{errors}"))
}

/// `(table, key)` → value, for every `key = value` and every table header; `#key` counts, its value does not.
fn named(text: &str) -> BTreeMap<(String, String), Option<String>> {
    let mut table = String::new();
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let (example, line) = match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(' ') || rest.is_empty() => continue,
            Some(rest) => (true, rest),
            None => (false, line),
        };
        if line.starts_with('[') {
            table = line.trim_matches(['[', ']']).to_owned();
            let (parent, name) = table.rsplit_once('.').unwrap_or(("", &table));
            found.insert((parent.to_owned(), name.to_owned()), None);
        } else if let Some((key, value)) = line.split_once(" = ") {
            let place = (table.clone(), key.to_owned());
            found.entry(place).or_insert_with(|| (!example).then(|| value.to_owned()));
        }
    }
    found
}

fn known() -> BTreeSet<(String, String)> {
    config::known_keys()
        .flat_map(|(table, keys)| keys.iter().map(move |key| (table.to_owned(), (*key).to_owned())))
        .collect()
}

#[test]
fn every_example_loads() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let secrets = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secrets.path(), "secret").unwrap();
    let secret_file = format!("file:{}", secrets.path().display());
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replace("file:/run/secrets/evergate-admin", &secret_file);
        if let Err(errors) = config::parse(&text, &path.display().to_string(), &env) {
            panic!("{errors}");
        }
        count += 1;
    }
    assert!(count >= 4, "found {count}");
}

#[test]
fn reference_says_the_defaults() {
    let minimal = "[[pool]]\nbackends = [\"http://10.0.0.1:8000\", \"http://10.0.0.2:8000\"]\n";
    assert_eq!(read(REFERENCE), read(minimal));
    assert_eq!(config::diff(&read(REFERENCE), &read(minimal)), []);
}

#[test]
fn reference_names_every_key() {
    let named: BTreeSet<_> = named(REFERENCE).into_keys().collect();
    assert_eq!(named, known());
}

#[test]
fn examples_in_the_reference_are_right_too() {
    let mut by_choice = false; // these have examples that need another strategy, or kind, than the default
    let text: Vec<&str> = REFERENCE
        .lines()
        .map(|line| {
            let bare = line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' '));
            if line.starts_with('[') {
                by_choice = matches!(line, "[pool.balance]" | "[pool.probe]");
            }
            bare.filter(|bare| !by_choice && !bare.starts_with("token")).unwrap_or(line)
        })
        .collect();
    let config = read(&text.join("\n"));
    assert_eq!(config.routes.len(), 1);
    assert!(config.pools[0].tls.client.is_some());
}

#[test]
fn examples_of_probes_in_the_reference_are_right_for_their_kind() {
    let examples = |keys: &[&str]| {
        let table = REFERENCE.split("[pool.probe]").nth(1).unwrap().split("\n[").next().unwrap();
        let examples = table.lines().filter_map(|line| line.strip_prefix('#'));
        let chosen = examples.filter(|line| keys.iter().any(|key| line.starts_with(&format!("{key} = "))));
        let chosen: Vec<&str> = chosen.collect();
        assert_eq!(chosen.len(), keys.len(), "{chosen:?}");
        format!("[[pool]]\nbackends = [\"http://10.0.0.1:8000\"]\n[pool.probe]\n{}\n", chosen.join("\n"))
    };
    read(&examples(&["preset", "body"]));
    let asks = ["preset", "endpoint", "model", "prompt", "deadline"];
    read(&(examples(&asks) + "kind = \"generate\""));
    read(&(examples(&[&asks[..], &["expect"]].concat()) + "kind = \"canary\""));
}

#[test]
fn documentation_has_every_key_with_its_default() {
    let defaults = named(REFERENCE);
    let known = known();
    let mut table = None;
    let mut documented = BTreeSet::new();
    for line in DOCUMENTATION.lines() {
        if let Some(heading) = line.strip_prefix('#') {
            let heading = heading.trim_start_matches('#').trim();
            table = match heading.strip_prefix("`[") {
                Some(rest) => rest.split_once(']').map(|(name, _)| name.trim_start_matches('[').to_owned()),
                None => (heading == "Top level").then(String::new),
            };
        }
        let (Some(table), Some(row)) = (&table, line.strip_prefix("| `")) else { continue };
        let (key, row) = row.split_once('`').unwrap();
        let default = row.split('|').nth(1).unwrap().trim();
        let place = (table.clone(), key.to_owned());
        // A backend's name and URL differ from one to the next.
        let differs = place.0 == "pool.backends" && matches!(key, "url" | "name");
        if let Some(Some(value)) = defaults.get(&place)
            && !differs
        {
            assert_eq!(default, format!("`{value}`"), "[{table}] {key}");
        }
        documented.insert(place);
    }
    assert_eq!(documented, known);
}
