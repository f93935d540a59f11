//! The three ways to a configuration: a file, a text, the command line.

use std::net::SocketAddr;
use std::path::Path;

use super::error::{ConfigError, ConfigErrors};
use super::file::Document;
use super::validate;
use super::{AccessLogTarget, Config};

/// What errors about flags say instead of a file.
pub(super) const COMMAND_LINE: &str = "command line";

/// Reads and validates the file at `path`, with the environment of this process.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    let origin = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| {
        whole_file(&origin, &format!("cannot be read: {error}"), "name a TOML file in UTF-8")
    })?;
    parse(&text, &origin, &|name| std::env::var(name).ok())
}

/// Validates `text`; errors name it `origin`. `${NAME}` is looked up in `env`, and `file:/path` is
/// read where a secret may stand.
pub fn parse(text: &str, origin: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigErrors> {
    let document = Document::new(origin, text, env);
    let Some(entries) = document.parse() else {
        return Err(document.into_errors().unwrap_or_else(|| whole_file(origin, "is not valid TOML", "")));
    };
    let config = validate::config(&document.root(&entries));
    match document.into_errors() {
        None => Ok(config),
        Some(errors) => Err(errors),
    }
}

/// The configuration of `evergate run --listen … --admin … --backend … --workers …`: everything else has its default.
pub fn from_flags(
    listen: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    backends: &[String],
    workers: Option<usize>,
) -> Result<Config, ConfigErrors> {
    let mut text = String::new();
    if let Some(workers) = workers {
        text.push_str(&format!("workers = {workers}\n"));
    }
    if let Some(address) = listen {
        text.push_str(&format!("[[listener]]\naddress = \"{address}\"\n"));
    }
    if let Some(address) = admin {
        text.push_str(&format!("[admin]\naddress = \"{address}\"\n"));
    }
    let urls: Vec<String> = backends.iter().map(|url| super::effective::quoted(url)).collect();
    text.push_str(&format!("[[pool]]\nbackends = [{}]\n", urls.join(", ")));
    // `quoted` keeps `${…}` literal: the shell has had its turn already.
    parse(&text, COMMAND_LINE, &|_| None).map_err(|errors| as_flags(&errors))
}

/// Reads `run --access-log … --log …` as the file's keys would be read.
pub fn telemetry_flags(
    access_log: Option<&str>,
    log: Option<&str>,
) -> Result<(Option<AccessLogTarget>, Option<String>), ConfigErrors> {
    let key = |key: &str, value: Option<&str>| {
        value.map(|value| format!("{key} = {}\n", super::effective::quoted(value))).unwrap_or_default()
    };
    // A pool, for there is no configuration without one.
    let text = format!(
        "[telemetry]\n{}{}[[pool]]\nbackends = [\"http://127.0.0.1:1\"]\n",
        key("access_log", access_log),
        key("log_level", log)
    );
    let telemetry = parse(&text, COMMAND_LINE, &|_| None).map_err(|errors| as_flags(&errors))?.telemetry;
    Ok((access_log.map(|_| telemetry.access_log), log.map(|_| telemetry.log_level)))
}

/// The same mistakes, said of flags instead of keys.
fn as_flags(errors: &ConfigErrors) -> ConfigErrors {
    let as_flags =
        errors.iter().map(|error| ConfigError { line: None, key: flag(&error.key), ..error.clone() });
    ConfigErrors::new(as_flags.collect()).unwrap_or_else(|| errors.clone())
}

/// The flag a key path stands for.
fn flag(key: &str) -> String {
    match key {
        "workers" => "--workers".to_owned(),
        "admin.address" => "--admin".to_owned(),
        "listener[0].address" => "--listen".to_owned(),
        "telemetry.access_log" => "--access-log".to_owned(),
        "telemetry.log_level" => "--log".to_owned(),
        _ => match key.strip_prefix("pool[0].backends") {
            Some(rest) => format!("--backend{rest}"),
            None => key.to_owned(),
        },
    }
}

fn whole_file(origin: &str, problem: &str, right: &str) -> ConfigErrors {
    ConfigErrors::one(ConfigError {
        origin: origin.to_owned(),
        line: None,
        key: String::new(),
        problem: problem.to_owned(),
        value: None,
        right: right.to_owned(),
    })
}
