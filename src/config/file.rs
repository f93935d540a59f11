//! The TOML text as a tree of typed questions, before it means anything.
//!
//! [`Document`] holds the text and collects errors; [`Table`] and [`Item`] are places in it that
//! know their line and key path. Asking for the wrong type records an error and answers with
//! nothing, so that one reading finds every mistake. Invariants: a table knows every key it may
//! hold (`keys`) and refuses the rest; a value that may be secret is never copied into an error.
//! What the values mean together (unique names, known pools) is for `validate`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, ConfigErrors};
use super::keys::{self, Section};
use super::units;

/// Longer values are cut in messages.
const SHOWN_CHARS_MAX: usize = 60;
/// A secret is a line, not a file system.
const SECRET_FILE_BYTES_MAX: u64 = 64 << 10;
/// More syntax errors than this are the echo of one.
const SYNTAX_ERRORS_MAX: usize = 20;

/// One configuration text being read, and what was wrong with it so far.
pub(super) struct Document<'a> {
    origin: &'a str,
    text: &'a str,
    env: &'a dyn Fn(&str) -> Option<String>,
    errors: RefCell<Vec<ConfigError>>,
    /// Lines that are not TOML; other complaints about them would only repeat that.
    broken_lines: RefCell<BTreeSet<usize>>,
}

impl<'a> Document<'a> {
    pub(super) fn new(origin: &'a str, text: &'a str, env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { origin, text, env, errors: RefCell::default(), broken_lines: RefCell::default() }
    }

    /// The text as a tree. None when mistakes of syntax leave its structure in doubt.
    pub(super) fn parse(&self) -> Option<DeTable<'a>> {
        let (root, syntax) = DeTable::parse_recoverable(self.text);
        for error in syntax.iter().take(SYNTAX_ERRORS_MAX) {
            let offset = error.span().map_or(self.text.len(), |span| span.start);
            let line = self.line(offset);
            if !self.broken_lines.borrow_mut().insert(line) {
                continue;
            }
            let (problem, expected) =
                error.message().split_once(", expected ").unwrap_or((error.message(), ""));
            let right = if self.is_in_bare_value(offset) {
                "if it is text, write it in quotes".to_owned()
            } else if expected.is_empty() || expected == "nothing" {
                String::new()
            } else {
                format!("expected {expected}")
            };
            self.record(ConfigError {
                origin: self.origin.to_owned(),
                line: Some(line),
                key: String::new(),
                problem: format!("not valid TOML: {problem}"),
                value: None,
                right,
            });
        }
        self.structure_is_sound().then(|| root.into_inner())
    }

    /// A mistake inside one `key = value` line spoils that line alone: without it the rest is TOML.
    fn structure_is_sound(&self) -> bool {
        let broken = self.broken_lines.borrow();
        if broken.is_empty() {
            return true;
        }
        let mut rest = String::with_capacity(self.text.len());
        for (index, line) in self.text.split_inclusive('\n').enumerate() {
            if !broken.contains(&(index + 1)) {
                rest.push_str(line);
            } else if line.trim_start().starts_with('[') || !line.contains('=') {
                return false;
            }
        }
        DeTable::parse(&rest).is_ok()
    }

    fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().get(..offset).unwrap_or(self.text.as_bytes());
        memchr::memchr_iter(b'\n', before).count() + 1
    }

    /// Whether `offset` lies in the value of `key = value`, and that is neither quoted nor a list or table.
    fn is_in_bare_value(&self, offset: usize) -> bool {
        let before = self.text.get(..offset).unwrap_or_default();
        let line = before.rfind('\n').map_or(0, |newline| newline + 1);
        let Some(equals) = before.get(line..).and_then(|before| before.find('=')) else { return false };
        self.text
            .get(line + equals + 1..)
            .and_then(|value| value.trim_start_matches([' ', '\t']).chars().next())
            .is_some_and(|first| !matches!(first, '"' | '\'' | '[' | '{' | '=' | '\r' | '\n'))
    }

    fn record(&self, error: ConfigError) {
        self.errors.borrow_mut().push(error);
    }

    fn complain(&self, line: usize, key: &str, problem: String, value: Option<String>, right: String) {
        if self.broken_lines.borrow().contains(&line) {
            return;
        }
        self.record(ConfigError {
            origin: self.origin.to_owned(),
            line: Some(line),
            key: key.to_owned(),
            problem,
            value,
            right,
        });
    }

    /// Whether anything was wrong so far.
    pub(super) fn into_errors(self) -> Option<ConfigErrors> {
        ConfigErrors::new(self.errors.into_inner())
    }

    /// The whole file as a table.
    pub(super) fn root<'d>(&'d self, entries: &'d DeTable<'a>) -> Table<'d> {
        Table { document: self, entries: Some(entries), path: String::new(), line: 1, section: &keys::TOP }
    }
}

/// A place with named values; absent tables answer every question with nothing.
pub(super) struct Table<'d> {
    document: &'d Document<'d>,
    entries: Option<&'d DeTable<'d>>,
    path: String,
    line: usize,
    section: &'static Section,
}

impl<'d> Table<'d> {
    /// The value at `key`, which must be one of the section's.
    pub(super) fn item(&self, key: &'static str) -> Option<Item<'d>> {
        debug_assert!(self.section.keys.contains(&key), "{key} is not listed in [{}]", self.section.path);
        let value = self.entries?.get(key)?;
        Some(Item {
            document: self.document,
            value,
            path: self.path_of(key),
            line: self.document.line(value.span().start),
            secret: false,
        })
    }

    /// The table at `key`; an absent one when there is none.
    pub(super) fn table(&self, key: &'static str, section: &'static Section) -> Table<'d> {
        let item = self.item(key);
        match item.as_ref().map(|item| item.value.get_ref()) {
            None => {}
            Some(DeValue::Table(entries)) => {
                return Table {
                    document: self.document,
                    entries: Some(entries),
                    path: self.path_of(key),
                    line: item.map_or(self.line, |item| item.line),
                    section,
                };
            }
            Some(_) => {
                let right = format!("write a table, [{}]", section.path);
                if let Some(item) = item {
                    item.error("is not a table", right);
                }
            }
        }
        Table { document: self.document, entries: None, path: self.path_of(key), line: self.line, section }
    }

    /// The tables of `[[key]]`; none when the key is absent.
    pub(super) fn tables(&self, key: &'static str, section: &'static Section) -> Option<Vec<Table<'d>>> {
        let item = self.item(key)?;
        let DeValue::Array(items) = item.value.get_ref() else {
            item.error("is not a list of tables", format!("write [[{key}]]"));
            return Some(Vec::new());
        };
        let tables = items.iter().enumerate().filter_map(|(index, value)| {
            item.element(index, value).as_table(section, || format!("write [[{key}]]"))
        });
        Some(tables.collect())
    }

    /// Every entry of a table whose keys are free names, in the order of the file.
    pub(super) fn entries(&self, key: &'static str, secret: bool) -> Vec<(&'d str, Item<'d>)> {
        let Some(mut item) = self.item(key) else { return Vec::new() };
        item.secret = secret;
        let DeValue::Table(entries) = item.value.get_ref() else {
            item.error("is not a table", format!("write {key} = {{ \"name\" = \"value\" }}"));
            return Vec::new();
        };
        let mut entries: Vec<_> = entries.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        entries
            .into_iter()
            .map(|(name, value)| {
                let entry = Item {
                    document: self.document,
                    value,
                    path: format!("{}.{}", item.path, quoted_key(name.get_ref())),
                    line: self.document.line(value.span().start),
                    secret,
                };
                (name.get_ref().as_ref(), entry)
            })
            .collect()
    }

    /// Whether the text has this table at all.
    pub(super) fn is_present(&self) -> bool {
        self.entries.is_some()
    }

    /// Records an error about a key that is not there, unless a misspelling of it is.
    pub(super) fn missing(&self, key: &str, right: impl Into<String>) {
        let mut others = self.entries.into_iter().flat_map(|entries| entries.keys());
        if others.any(|other| keys::means(self.section, other.get_ref()) == Some(key)) {
            return;
        }
        self.error_at(key, "is missing", right);
    }

    /// Records an error about a key that may not even be written.
    pub(super) fn error_at(&self, key: &str, problem: impl Into<String>, right: impl Into<String>) {
        self.document.complain(self.line, &self.path_of(key), problem.into(), None, right.into());
    }

    /// Records an error about the table as a whole.
    pub(super) fn error(&self, problem: impl Into<String>, right: impl Into<String>) {
        self.document.complain(self.line, &self.path, problem.into(), None, right.into());
    }

    /// Refuses every key the section does not know, with the nearest it does.
    pub(super) fn refuse_unknown_keys(&self) {
        for (key, _) in self.entries.into_iter().flat_map(|entries| entries.iter()) {
            let name = key.get_ref().as_ref();
            if !self.section.keys.contains(&name) {
                self.document.complain(
                    self.document.line(key.span().start),
                    &self.path_of(&quoted_key(name)),
                    "unknown key".to_owned(),
                    None,
                    keys::advice(self.section, name),
                );
            }
        }
    }

    pub(super) fn duration(
        &self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        self.item(key).and_then(|item| item.duration(range)).unwrap_or(default)
    }

    pub(super) fn size(&self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        self.item(key).and_then(|item| item.size(range)).unwrap_or(default)
    }

    pub(super) fn integer<N>(&self, key: &'static str, default: N, range: RangeInclusive<u64>) -> N
    where
        N: TryFrom<u64>,
    {
        self.item(key).and_then(|item| item.integer(range)).unwrap_or(default)
    }

    pub(super) fn number(&self, key: &'static str, default: f64, range: RangeInclusive<f64>) -> f64 {
        self.item(key).and_then(|item| item.number(range)).unwrap_or(default)
    }

    pub(super) fn flag(&self, key: &'static str, default: bool) -> bool {
        self.item(key).and_then(|item| item.flag()).unwrap_or(default)
    }

    pub(super) fn choice<T: Copy>(&self, key: &'static str, default: T, choices: &[(&str, T)]) -> T {
        self.item(key).and_then(|item| item.choice(choices)).unwrap_or(default)
    }

    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// A string value after `${NAME}` was replaced.
pub(super) struct Text {
    pub(super) value: String,
    /// Some of it came from the environment or a file: not to be shown.
    pub(super) is_secret: bool,
}

/// One value in its place.
pub(super) struct Item<'d> {
    document: &'d Document<'d>,
    value: &'d Spanned<DeValue<'d>>,
    path: String,
    line: usize,
    secret: bool,
}

impl<'d> Item<'d> {
    /// Marks the value as one that may be a secret: errors will not show it.
    pub(super) fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Records an error about this value.
    pub(super) fn error(&self, problem: impl Into<String>, right: impl Into<String>) {
        let value = if self.secret { None } else { self.shown() };
        self.document.complain(self.line, &self.path, problem.into(), value, right.into());
    }

    /// As [`Self::error`], where the value would only be noise.
    pub(super) fn error_without_value(&self, problem: impl Into<String>, right: impl Into<String>) {
        self.document.complain(self.line, &self.path, problem.into(), None, right.into());
    }

    /// The value as written. URLs that may carry credentials are not shown.
    fn shown(&self) -> Option<String> {
        match self.value.get_ref() {
            DeValue::String(text) if text.contains("://") && text.contains(['@', '?']) => None,
            DeValue::String(text) => {
                let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
                if shown.len() < text.len() {
                    shown.push('…');
                }
                Some(format!("{shown:?}"))
            }
            DeValue::Integer(number) => Some(number.to_string()),
            DeValue::Float(number) => Some(number.to_string()),
            DeValue::Boolean(flag) => Some(flag.to_string()),
            DeValue::Datetime(_) => Some("a date".to_owned()),
            DeValue::Array(_) => Some("a list".to_owned()),
            DeValue::Table(_) => Some("a table".to_owned()),
        }
    }

    /// Whether the value is exactly this text.
    pub(super) fn is_text(&self, text: &str) -> bool {
        self.raw() == Some(text)
    }

    fn raw(&self) -> Option<&'d str> {
        match self.value.get_ref() {
            DeValue::String(text) => Some(text.as_ref()),
            _ => None,
        }
    }

    fn element(&self, index: usize, value: &'d Spanned<DeValue<'d>>) -> Item<'d> {
        Item {
            document: self.document,
            value,
            path: format!("{}[{index}]", self.path),
            line: self.document.line(value.span().start),
            secret: self.secret,
        }
    }

    /// The table this value is, if it is one.
    pub(super) fn to_table(&self, section: &'static Section) -> Option<Table<'d>> {
        let DeValue::Table(entries) = self.value.get_ref() else { return None };
        Some(Table {
            document: self.document,
            entries: Some(entries),
            path: self.path.clone(),
            line: self.line,
            section,
        })
    }

    fn as_table(&self, section: &'static Section, right: impl FnOnce() -> String) -> Option<Table<'d>> {
        let table = self.to_table(section);
        if table.is_none() {
            self.error("is not a table", right());
        }
        table
    }

    /// The elements of a list.
    pub(super) fn list(&self) -> Option<Vec<Item<'d>>> {
        match self.value.get_ref() {
            DeValue::Array(items) => {
                Some(items.iter().enumerate().map(|(index, value)| self.element(index, value)).collect())
            }
            DeValue::String(_) if !self.secret => {
                self.error("is not a list", self.shown().map_or(String::new(), |v| format!("write [{v}]")));
                None
            }
            _ => {
                self.error("is not a list", "write values in square brackets");
                None
            }
        }
    }

    /// The string with `${NAME}` replaced; never empty.
    pub(super) fn text(&self) -> Option<Text> {
        let Some(raw) = self.raw() else {
            let right = match self.value.get_ref() {
                DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) if !self.secret => {
                    self.shown().map_or(String::new(), |value| format!("write \"{value}\""))
                }
                _ => "write text in quotes".to_owned(),
            };
            self.error("is not text", right);
            return None;
        };
        let text = self.substitute(raw)?;
        if text.value.is_empty() {
            let right = if text.is_secret {
                "the environment variable is empty"
            } else {
                "leave the key out or fill it in"
            };
            self.error("is empty", right);
            return None;
        }
        Some(text)
    }

    pub(super) fn string(&self) -> Option<String> {
        self.text().map(|text| text.value)
    }

    /// A string that may also be `file:/path`, whose first line it then is.
    pub(super) fn secret_text(&self) -> Option<Text> {
        let Some(path) = self.raw().and_then(|raw| raw.strip_prefix("file:")) else {
            let text = self.text()?;
            if text.value == "***" {
                self.error("is a masked secret", "write the secret, ${NAME} or file:/path");
                return None;
            }
            return Some(text);
        };
        let path = self.substitute(path)?.value;
        if !path.starts_with('/') {
            self.error("names a secret file by a relative path", "write file: and an absolute path");
            return None;
        }
        match read_secret(&path) {
            Ok(value) => Some(Text { value, is_secret: true }),
            Err(problem) => {
                self.error(
                    format!("cannot read the secret file {path}: {problem}"),
                    "name a file that holds the secret alone",
                );
                None
            }
        }
    }

    /// Replaces `${NAME}`; `$${` stands for a literal `${`.
    fn substitute(&self, raw: &str) -> Option<Text> {
        let mut value = String::with_capacity(raw.len());
        let mut is_secret = false;
        let mut rest = raw;
        while let Some(at) = rest.find("${") {
            let (before, after) = rest.split_at(at);
            let after = &after[2..];
            if let Some(before) = before.strip_suffix('$') {
                value.push_str(before);
                value.push_str("${");
                rest = after;
                continue;
            }
            value.push_str(before);
            let Some((name, after)) = after.split_once('}').filter(|(name, _)| is_variable_name(name)) else {
                self.error("has no variable name in ${ }", "write ${NAME}, or $${ for a literal ${");
                return None;
            };
            let Some(variable) = (self.document.env)(name) else {
                self.error(
                    format!("environment variable {name} is not set"),
                    "set it where evergate is started",
                );
                return None;
            };
            value.push_str(&variable);
            is_secret = true;
            rest = after;
        }
        value.push_str(rest);
        Some(Text { value, is_secret })
    }

    pub(super) fn duration(&self, range: RangeInclusive<Duration>) -> Option<Duration> {
        if let DeValue::Integer(_) | DeValue::Float(_) = self.value.get_ref() {
            let number = self.shown().unwrap_or_default();
            self.error("a duration needs a unit", format!("write \"{number}s\", or with ms, m, h"));
            return None;
        }
        let text = self.string()?;
        let Some(value) = units::duration(&text) else {
            self.error("is not a duration", "write a number and a unit, such as \"250ms\", \"5s\" or \"2m\"");
            return None;
        };
        if value.is_zero() && !range.contains(&value) {
            self.error(
                "must be longer than zero",
                format!("write at least \"{}\"", units::format_duration(*range.start())),
            );
            return None;
        }
        self.in_range(value, range, units::format_duration)
    }

    pub(super) fn size(&self, range: RangeInclusive<u64>) -> Option<u64> {
        if let DeValue::Integer(_) | DeValue::Float(_) = self.value.get_ref() {
            let bytes = self.shown().and_then(|number| number.parse().ok());
            let example = bytes.map_or_else(|| "16MiB".to_owned(), units::format_size);
            self.error("a size needs a unit", format!("write \"{example}\""));
            return None;
        }
        let text = self.string()?;
        let Some(value) = units::size(&text) else {
            self.error(
                "is not a size",
                "write a number and a unit, such as \"512B\", \"64KiB\" or \"16MiB\"",
            );
            return None;
        };
        self.in_range(value, range, units::format_size)
    }

    pub(super) fn integer<N: TryFrom<u64>>(&self, range: RangeInclusive<u64>) -> Option<N> {
        let wanted = || format!("write a whole number from {} to {}", range.start(), range.end());
        let value = match self.value.get_ref() {
            DeValue::Integer(number) => {
                let value = i128::from_str_radix(number.as_str(), number.radix()).ok();
                value.map(|value| u64::try_from(value).ok())
            }
            DeValue::String(text) if text.contains("${") => Some(self.string()?.trim().parse().ok()),
            DeValue::String(text) if text.parse::<u64>().is_ok() => {
                self.error("is text, not a number", format!("write {text} without quotes"));
                return None;
            }
            _ => None,
        };
        match value {
            None => self.error("is not a whole number", wanted()),
            Some(Some(value)) if range.contains(&value) => {
                // Ranges are chosen to fit their type; one that does not is reported as out of range.
                if let Ok(value) = N::try_from(value) {
                    return Some(value);
                }
                self.error("is out of range", wanted());
            }
            Some(_) => self.error("is out of range", wanted()),
        }
        None
    }

    pub(super) fn number(&self, range: RangeInclusive<f64>) -> Option<f64> {
        let value: Option<f64> = match self.value.get_ref() {
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().parse().ok(),
            DeValue::Float(number) => number.as_str().parse().ok(),
            DeValue::String(text) if text.contains("${") => self.string()?.trim().parse().ok(),
            DeValue::String(text) if text.parse::<f64>().is_ok() => {
                self.error("is text, not a number", format!("write {text} without quotes"));
                return None;
            }
            _ => None,
        };
        let Some(value) = value.filter(|value| value.is_finite()) else {
            self.error(
                "is not a number",
                format!("write a number from {} to {}", range.start(), range.end()),
            );
            return None;
        };
        self.in_range(value, range, |value| value.to_string())
    }

    pub(super) fn flag(&self) -> Option<bool> {
        match self.value.get_ref() {
            DeValue::Boolean(flag) => return Some(*flag),
            DeValue::String(text) if text.contains("${") => {
                if let Ok(flag) = self.string()?.trim().parse() {
                    return Some(flag);
                }
            }
            _ => {}
        }
        self.error("is not true or false", "write true or false, without quotes");
        None
    }

    pub(super) fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.string()?;
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(*choice);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.error("is not one of the choices", keys::one_of(&text, &names));
        None
    }

    fn in_range<T: PartialOrd + Copy>(
        &self,
        value: T,
        range: RangeInclusive<T>,
        format: impl Fn(T) -> String,
    ) -> Option<T> {
        if range.contains(&value) {
            return Some(value);
        }
        self.error(
            "is out of range",
            format!("write a value from {} to {}", format(*range.start()), format(*range.end())),
        );
        None
    }
}

fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A key as it would be written in the file.
fn quoted_key(name: &str) -> String {
    let bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if bare {
        return name.to_owned();
    }
    let shown: String = name.chars().take(SHOWN_CHARS_MAX).collect();
    format!("{shown:?}")
}

/// The content of a regular file without its last newline. Devices and pipes are refused: they may never end.
fn read_secret(path: &str) -> Result<String, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    let mut value = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(SECRET_FILE_BYTES_MAX).read_to_string(&mut value))
        .map_err(|error| error.to_string())?;
    let value = value.trim_end_matches(['\r', '\n']);
    if value.is_empty() {
        return Err("it is empty".to_owned());
    }
    Ok(value.to_owned())
}
