//! The architecture as a test: who may import whom, and what a layer must not contain.
//!
//! The tables below are the rules; the code behind them reads every file under `src/` as tokens, without
//! comments, literals and whatever only exists in tests, and reports all violations at once with file and
//! line. Tests may use more than their module, so they are exempt from everything but the header and `unsafe`.
//!
//! It is no compiler: a name that arrives through a macro of another crate is not seen, and rules
//! that need judgement ("faces keep no state per backend") are left to the reader of a change.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::Path;

// --- the rules

/// What stands directly in `src/`, and its layer. Imports point to the same or a lower layer, never up.
const LAYERS: &[(&str, u8)] = &[
    // 5, wiring: the parts are put together here and nowhere else.
    ("main", 5),
    ("lib", 5),
    ("cli", 5),
    ("app", 5),
    ("demo", 5),
    // 4, faces: what somebody outside talks to.
    ("server", 4),
    ("admin", 4),
    ("sim", 4),
    // 3, workers: what is done, per request or over and over.
    ("proxy", 3),
    ("probe", 3),
    ("reload", 3),
    ("discover", 3),
    ("upgrade", 3),
    // 2, state: what outlives a request.
    ("pool", 2),
    ("upstream", 2),
    // 1, vocabulary.
    ("config", 1),
    ("telemetry", 1),
    ("drain", 1),
    ("clock", 1),
    ("net", 1),
    // 0, decisions: values in, values out.
    ("policy", 0),
    ("sse", 0),
];

/// A module that only these may import.
const PRIVATE_TO: &[(&str, &[&str])] = &[("sim", &["sim", "demo"])];

/// Crates layer 0 may name. All others of Cargo.toml are forbidden there: a new one is judged when it comes.
const PURE_CRATES: &[&str] =
    &["bytes", "fastrand", "http", "itoa", "memchr", "serde_json", "smallvec", "ipnet"];

/// Paths layer 0 may not name, with what stands against them. A prefix forbids all that lies under it.
const IMPURE_PATHS: &[(&str, &str)] = &[
    ("std::io", "does I/O"),
    ("std::fs", "does I/O"),
    ("std::env", "reads its environment"),
    ("std::process", "does I/O"),
    ("std::os", "does I/O"),
    ("std::thread", "runs where it is called"),
    ("std::net::TcpStream", "does I/O"),
    ("std::net::TcpListener", "does I/O"),
    ("std::net::UdpSocket", "does I/O"),
    ("std::net::ToSocketAddrs", "does I/O"),
    ("std::time::Instant", "reads no clock; take a `Moment`"),
    ("std::time::SystemTime", "reads no clock"),
    ("std::time::UNIX_EPOCH", "reads no clock"),
    ("std::sync::Mutex", "holds no lock"),
    ("std::sync::RwLock", "holds no lock"),
    ("std::sync::Condvar", "holds no lock"),
    ("std::sync::mpsc", "holds no channel"),
    ("Instant::now", "reads no clock; `now` is an argument"),
    ("SystemTime::now", "reads no clock; `now` is an argument"),
    ("Rng::new", "draws no seed; `rng` is an argument"),
    ("fastrand::Rng::new", "draws no seed; `rng` is an argument"),
    ("std::hash::RandomState", "draws no seed"),
];

/// Words layer 0 may not contain, a macro with its `!`.
const IMPURE_WORDS: &[(&str, &str)] = &[
    ("async", "does not wait"),
    ("await", "does not wait"),
    ("println!", "does not print"),
    ("eprintln!", "does not print"),
    ("print!", "does not print"),
    ("eprint!", "does not print"),
    ("dbg!", "does not print"),
    ("thread_local!", "keeps no state of its own"),
];

/// Words a module may not contain, with what stands against them.
const WORDS: &[(&[&str], &[&str], &str)] = &[
    (
        &[
            "proxy",
            "probe",
            "reload",
            "discover",
            "pool",
            "upstream",
            "config",
            "telemetry",
            "drain",
            "clock",
        ],
        &["TcpListener", "UnixListener"],
        "listening sockets belong to layer 4 (and to `upgrade`, which passes them on)",
    ),
    (
        &["proxy", "probe", "pool", "upstream", "telemetry", "server"],
        &["retryable", "is_retryable", "Retryable"],
        "an outcome states facts; only `policy::retry` and `policy::resume` say what to do about them",
    ),
];

/// The showpiece: the function of this file that carries the mark in a comment fits on one screen.
const LOOP_FILE: &str = "src/proxy/exchange.rs";
const LOOP_MARK: &str = "the attempt loop";
const LOOP_LINES_MAX: usize = 60;
/// Words that have no place in it: header fiddling, metrics, prose for the log.
const LOOP_WORDS: &[&str] = &[
    "HeaderMap",
    "HeaderName",
    "HeaderValue",
    "headers_mut",
    "metrics",
    "tracing",
    "trace!",
    "debug!",
    "info!",
    "warn!",
    "error!",
    "format!",
];

// --- the test

#[test]
fn the_source_keeps_to_its_architecture() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    collect(root, Path::new("src"), &mut sources);
    assert!(sources.len() > 20, "only {} files found under src/", sources.len());
    if !sources.iter().any(|source| source.path == LOOP_FILE) {
        // Past the test harness, which would swallow it: a check that checks nothing must not look like one.
        let _ = writeln!(
            std::io::stderr(),
            "\n*** ARCHITECTURE: {LOOP_FILE} does not exist yet. NOT CHECKED: that {LOOP_MARK} fits on a screen. ***\n"
        );
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("the manifest can be read");
    let violations = check(&sources, &dependencies(&manifest));
    let report: Vec<String> = violations.iter().map(ToString::to_string).collect();
    assert!(report.is_empty(), "{} violations of the architecture:\n{}", report.len(), report.join("\n"));
}

/// A file of the tree: its path from the root, with `/`, and its text.
struct Source {
    path: String,
    text: String,
}

/// A rule that was broken, and where.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    path: String,
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.rule)
    }
}

fn collect(root: &Path, folder: &Path, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(root.join(folder)).expect("a folder of src can be listed") {
        let entry = entry.expect("an entry of src can be read");
        let path = folder.join(entry.file_name());
        if entry.file_type().expect("an entry of src has a type").is_dir() {
            collect(root, &path, sources);
        } else {
            // What is not text (an icon of the dashboard) is no Rust either; its place is still checked.
            let text = fs::read(root.join(&path)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            sources.push(Source {
                path: path
                    .components()
                    .map(|part| part.as_os_str().to_string_lossy())
                    .collect::<Vec<_>>()
                    .join("/"),
                text: text.expect("a file of src can be read"),
            });
        }
    }
}

/// Names of the crates of the product, as code spells them.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut names = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.starts_with("[dependencies]") || line.ends_with(".dependencies]");
        } else if inside && let Some((name, _)) = line.split_once(['=', '.']) {
            names.insert(name.trim().replace('-', "_"));
        }
    }
    names
}

// --- the checks

fn check(sources: &[Source], crates: &BTreeSet<String>) -> Vec<Violation> {
    let layers: BTreeMap<&str, u8> = LAYERS.iter().copied().collect();
    let mut found = Vec::new();
    let mut files = Vec::new();
    let mut test_modules = BTreeSet::new();
    for source in sources {
        let inner = source.path.strip_prefix("src/").unwrap_or(&source.path);
        let top = inner.split(['/', '.']).next().unwrap_or_default();
        let listed = layers.contains_key(top);
        if !listed {
            let rule = format!("`{top}` is not in the table of layers (tests/architecture.rs)");
            found.push(violation(source, 1, rule));
        }
        if !inner.ends_with(".rs") {
            continue;
        }
        if !source.text.starts_with("//!") {
            found.push(violation(
                source,
                1,
                "a file begins with a `//!` header that says what it is for".into(),
            ));
        }
        let (tokens, comments) = lex(&source.text);
        let opened = |brackets: &str| tokens.iter().filter(|token| brackets.contains(&*token.text)).count();
        if ["{}", "()", "[]"].iter().any(|pair| opened(&pair[..1]) != opened(&pair[1..])) {
            found.push(violation(
                source,
                1,
                "this test cannot read the file: its brackets do not match".into(),
            ));
        }
        for token in tokens.iter().filter(|token| token.is_word("unsafe")) {
            found.push(violation(source, token.line, "no `unsafe`".into()));
        }
        let module = module_of(inner);
        let (production, test_children) = without_tests(tokens);
        for name in test_children {
            test_modules.insert([&module[..], &[name]].concat());
        }
        if listed {
            files.push((source, module, production, comments));
        }
    }
    for (source, module, production, comments) in &files {
        if (1..=module.len()).any(|depth| test_modules.contains(&module[..depth])) {
            continue;
        }
        let inner = source.path.strip_prefix("src/").unwrap_or(&source.path);
        let top = inner.split(['/', '.']).next().unwrap_or_default();
        let layer = layers[top];
        check_imports(source, top, layer, module, production, &layers, &mut found);
        if layer == 0 {
            check_purity(source, production, crates, &mut found);
        }
        for &(modules, words, reason) in WORDS {
            if modules.contains(&top) {
                for token in production.iter().filter(|token| words.iter().any(|word| token.is_word(word))) {
                    found.push(violation(
                        source,
                        token.line,
                        format!("`{}` in `{top}`: {reason}", token.text),
                    ));
                }
            }
        }
        if source.path == LOOP_FILE {
            check_loop(source, production, comments, &mut found);
        }
    }
    found.sort();
    found.dedup();
    found
}

fn violation(source: &Source, line: usize, rule: String) -> Violation {
    Violation { path: source.path.clone(), line, rule }
}

fn check_imports(
    source: &Source,
    top: &str,
    layer: u8,
    module: &[String],
    tokens: &[Token],
    layers: &BTreeMap<&str, u8>,
    found: &mut Vec<Violation>,
) {
    for path in paths(tokens) {
        let Some(target) = resolve(&path, module) else { continue };
        let Some(name) = target.first().filter(|name| *name != "*" && *name != "self") else {
            let rule = "names the crate's root as a whole; name a module of the table of layers".into();
            found.push(violation(source, path.line, rule));
            continue;
        };
        match layers.get(name.as_str()) {
            None => {
                let rule = format!(
                    "`crate::{name}` is no module of the table of layers; name an item by its module"
                );
                found.push(violation(source, path.line, rule));
            }
            Some(target_layer) if *target_layer > layer => {
                let rule = format!("`{top}` (layer {layer}) may not import `{name}` (layer {target_layer})");
                found.push(violation(source, path.line, rule));
            }
            Some(_) => {}
        }
        for &(private, friends) in PRIVATE_TO {
            if name == private && !friends.contains(&top) {
                let rule = format!("`{top}` may not import `{private}`: production never rests on it");
                found.push(violation(source, path.line, rule));
            }
        }
    }
}

fn check_purity(source: &Source, tokens: &[Token], crates: &BTreeSet<String>, found: &mut Vec<Violation>) {
    let mut report = |line, what: &str, reason: &str| {
        found.push(violation(source, line, format!("`{what}` in layer 0, which {reason}")));
    };
    for path in paths(tokens) {
        let first = path.segments[0].as_str();
        let mut joined = path.segments.join("::");
        if let Some(rest) = joined.strip_prefix("core::").or_else(|| joined.strip_prefix("alloc::")) {
            joined = format!("std::{rest}");
        }
        if crates.contains(first) && !PURE_CRATES.contains(&first) {
            report(path.line, first, "uses only the crates that compute (PURE_CRATES)");
        }
        // The free functions of fastrand draw on a generator that nobody passed in.
        if first == "fastrand" && path.segments.get(1).is_none_or(|second| second != "Rng") {
            report(path.line, &joined, "draws no random numbers; `rng: &mut fastrand::Rng` is an argument");
        }
        for &(impure, reason) in IMPURE_PATHS {
            // `time::Instant` too, behind a `use std::time`; but a name alone, as `io`, may be anyone's.
            let tail = impure.strip_prefix("std::").filter(|tail| tail.contains("::"));
            if format!("{joined}::").starts_with(&format!("{impure}::"))
                || tail.is_some_and(|tail| format!("::{joined}::").contains(&format!("::{tail}::")))
            {
                report(path.line, &joined, reason);
            }
        }
        if ["std", "std::*", "std::net::*", "std::sync::*", "std::time::*"].contains(&&*joined) {
            report(path.line, &joined, "names what it uses, so that this test can see it");
        }
    }
    for (token, next) in tokens.iter().zip(tokens.iter().skip(1).map(Some).chain([None])) {
        for &(word, reason) in IMPURE_WORDS {
            if is_word_or_macro(token, next, word) {
                report(token.line, word, reason);
            }
        }
    }
}

fn check_loop(source: &Source, tokens: &[Token], comments: &[Comment], found: &mut Vec<Violation>) {
    let functions = functions(tokens);
    let mut marked = BTreeSet::new();
    for mark in comments.iter().filter(|comment| is_loop_mark(&comment.text)).map(|comment| comment.line) {
        // The innermost function around the mark; else the next one, which it stands above.
        let around =
            functions.iter().filter(|(begin, end)| lines(tokens, *begin, *end).contains(&mark)).max();
        let below = functions.iter().filter(|(begin, _)| tokens[*begin].line > mark).min();
        marked.extend(around.or(below));
    }
    if marked.len() != 1 {
        let rule = format!("one function carries the comment `// {LOOP_MARK}`; here {} do", marked.len());
        found.push(violation(source, 1, rule));
    }
    for (begin, end) in marked {
        let lines = lines(tokens, begin, end);
        let (first, count) = (*lines.start(), lines.count());
        if count > LOOP_LINES_MAX {
            let rule = format!("{LOOP_MARK} fits on one screen: {count} lines, {LOOP_LINES_MAX} are allowed");
            found.push(violation(source, first, rule));
        }
        for at in begin..end {
            for &word in LOOP_WORDS {
                if is_word_or_macro(&tokens[at], tokens.get(at + 1), word) {
                    let rule = format!(
                        "`{word}` in {LOOP_MARK}: no header fiddling, no metrics, no prose for the log"
                    );
                    found.push(violation(source, tokens[at].line, rule));
                }
            }
        }
    }
}

/// `// the attempt loop …` or `/// The attempt loop …`; a file header that speaks of it marks nothing.
fn is_loop_mark(comment: &str) -> bool {
    let said = comment.trim_start_matches('/').trim_start();
    !comment.starts_with("//!")
        && said.get(..LOOP_MARK.len()).is_some_and(|said| said.eq_ignore_ascii_case(LOOP_MARK))
}

fn is_word_or_macro(token: &Token, next: Option<&Token>, word: &str) -> bool {
    match word.strip_suffix('!') {
        Some(name) => token.is_word(name) && next.is_some_and(|next| next.text == "!"),
        None => token.is_word(word),
    }
}

/// Functions with a body, as the indices of `fn` and of the closing brace.
fn functions(tokens: &[Token]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for begin in (0..tokens.len()).filter(|at| tokens[*at].is_word("fn")) {
        if tokens.get(begin + 1).is_none_or(|name| name.kind != Kind::Word) {
            continue; // the type of a function pointer
        }
        let mut depth = 0_usize;
        for (at, token) in tokens.iter().enumerate().skip(begin) {
            match token.text.as_str() {
                "(" | "[" => depth += 1,
                ")" | "]" => depth = depth.saturating_sub(1),
                ";" if depth == 0 => break, // a declaration
                "{" if depth == 0 => {
                    found.push((begin, group_end(tokens, at)));
                    break;
                }
                _ => {}
            }
        }
    }
    found
}

fn lines(tokens: &[Token], begin: usize, end: usize) -> std::ops::RangeInclusive<usize> {
    tokens[begin].line..=tokens[end].line
}

// --- paths

/// A path as it is written, groups taken apart: `use a::{b, c::*}` is `a::b` and `a::c::*`.
#[derive(Debug)]
struct NamedPath {
    segments: Vec<String>,
    /// Modules opened inline around it.
    inline: Vec<String>,
    line: usize,
}

/// Every path with `::` in it, and every single name that is imported or renamed (`use tokio;`, `crate as x`).
fn paths(tokens: &[Token]) -> Vec<NamedPath> {
    let mut found = Vec::new();
    let mut inline: Vec<(String, usize)> = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        while inline.last().is_some_and(|(_, end)| *end < at) {
            inline.pop();
        }
        let text = |index: usize| tokens.get(index).map_or("", |token| token.text.as_str());
        if text(at) == "mod" && text(at + 2) == "{" {
            inline.push((text(at + 1).to_owned(), group_end(tokens, at + 2)));
        }
        let imported = text(at) == "use" && tokens[at].kind == Kind::Word && text(at + 1) != "<";
        let alone = ["crate", "super"].contains(&text(at)) && text(at + 1) == "as";
        if imported || alone || begins_path(tokens, at) {
            let modules: Vec<String> = inline.iter().map(|(name, _)| name.clone()).collect();
            let next = if imported { at + 1 } else { at };
            at = tree(tokens, next, &mut Vec::new(), &modules, &mut found).max(at + 1);
        } else {
            at += 1;
        }
    }
    found
}

/// Whether the word at `at` is the first of a path of several.
fn begins_path(tokens: &[Token], at: usize) -> bool {
    if tokens[at].kind != Kind::Word || tokens.get(at + 1).is_none_or(|next| next.text != "::") {
        return false;
    }
    match at.checked_sub(1).map(|before| tokens[before].text.as_str()) {
        Some(".") => false, // a method with a turbofish
        // `::tokio::spawn` begins a path, `Vec::<u8>::new` does not begin one at `new`.
        Some("::") => at.checked_sub(2).is_none_or(|before| {
            let before = &tokens[before];
            match before.kind {
                Kind::Word => KEYWORDS.contains(&before.text.as_str()),
                Kind::Literal => false,
                Kind::Punctuation => ![">", ")", "]"].contains(&before.text.as_str()),
            }
        }),
        _ => true,
    }
}

/// Words that may stand before a path with a leading `::`.
const KEYWORDS: &[&str] =
    &["use", "as", "in", "return", "impl", "dyn", "for", "mut", "where", "if", "match", "else", "break"];

/// Reads one tree of `use` (or one plain path) from `at` on; returns the index behind it.
fn tree(
    tokens: &[Token],
    mut at: usize,
    prefix: &mut Vec<String>,
    inline: &[String],
    found: &mut Vec<NamedPath>,
) -> usize {
    let depth = prefix.len();
    let mut line = tokens.get(at).map_or(0, |token| token.line);
    if tokens.get(at).is_some_and(|token| token.text == "::") {
        at += 1;
    }
    while let Some(token) = tokens.get(at) {
        if token.text == "{" {
            let end = group_end(tokens, at);
            at += 1;
            while at < end {
                at = tree(tokens, at, prefix, inline, found).max(at + 1);
                // Behind an element: `as name`, then a comma.
                while at < end && tokens[at].text != "," {
                    at += 1;
                }
                at += 1;
            }
            prefix.truncate(depth);
            return end + 1;
        }
        if token.kind != Kind::Word && token.text != "*" {
            break;
        }
        line = token.line;
        prefix.push(token.text.clone());
        at += 1;
        if tokens.get(at).is_none_or(|next| next.text != "::") {
            break;
        }
        at += 1;
    }
    if prefix.len() > depth {
        let mut segments = prefix.clone();
        if segments.len() > 1 && segments.last().is_some_and(|last| last == "self") {
            segments.pop();
        }
        found.push(NamedPath { segments, inline: inline.to_vec(), line });
    }
    prefix.truncate(depth);
    at
}

/// Where a path of this crate points, from the crate's root; `None` for every other path.
fn resolve(path: &NamedPath, module: &[String]) -> Option<Vec<String>> {
    let here = || [module, &path.inline].concat();
    match path.segments[0].as_str() {
        "crate" | "evergate" => Some(path.segments[1..].to_vec()),
        "self" => Some([here(), path.segments[1..].to_vec()].concat()),
        "super" => {
            let ups = path.segments.iter().take_while(|segment| *segment == "super").count();
            let mut base = here();
            base.truncate(base.len().saturating_sub(ups));
            Some([base, path.segments[ups..].to_vec()].concat())
        }
        _ => None,
    }
}

/// `policy/balance/p2c.rs` is `[policy, balance, p2c]`; `mod.rs` is its folder, `lib.rs` the root.
fn module_of(inner: &str) -> Vec<String> {
    let mut parts: Vec<String> = inner.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod") || parts == ["lib"] {
        parts.pop();
    }
    parts
}

// --- what only tests have

/// The tokens without items, variants, arms and fields under `#[cfg(test)]` or `#[test]`, and the names of modules that
/// stand in files of their own under it.
fn without_tests(tokens: Vec<Token>) -> (Vec<Token>, Vec<String>) {
    let mut kept = Vec::new();
    let mut children = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at].text != "#" {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let inner = tokens.get(at + 1).is_some_and(|next| next.text == "!");
        let open = at + 1 + usize::from(inner);
        if tokens.get(open).is_none_or(|next| next.text != "[") {
            kept.push(tokens[at].clone()); // `r#` never gets here; `#` in a macro does
            at += 1;
            continue;
        }
        let close = group_end(&tokens, open);
        if !is_test_attribute(&tokens[open + 1..close]) {
            kept.extend_from_slice(&tokens[at..=close.min(tokens.len() - 1)]);
            at = close + 1;
        } else if inner && !kept.iter().any(|token| token.is_word("mod")) {
            return (Vec::new(), children); // `#![cfg(test)]` at the top: the whole file
        } else {
            let end = item_end(&tokens, close + 1);
            let item = &tokens[close + 1..end];
            // `mod x;` is a file of its own, and `mod x { … }` may have some below it.
            if let Some(name) = item.iter().skip_while(|token| !token.is_word("mod")).nth(1) {
                children.push(name.text.clone());
            }
            at = end;
        }
    }
    (kept, children)
}

/// `test`, `x::test`, `cfg(test)`, `cfg(all(test, …))`; not `cfg(not(test))`, `cfg(any(test, …))`, `cfg_attr(test, …)`.
fn is_test_attribute(attribute: &[Token]) -> bool {
    let words: Vec<&str> = attribute.iter().map(|token| token.text.as_str()).collect();
    match words[..] {
        ["cfg", "(", "test", ")"] => true,
        ["cfg", "(", "all", "(", ref rest @ ..] => {
            let mut depth = 0_i32;
            rest.iter().any(|word| {
                depth += i32::from(*word == "(") - i32::from(*word == ")");
                depth == 0 && *word == "test"
            })
        }
        ["test", ..] | [_, "::", "test", ..] => true,
        _ => false,
    }
}

/// The index behind the item, variant, field, arm or statement that begins at `at`.
fn item_end(tokens: &[Token], mut at: usize) -> usize {
    while tokens.get(at).is_some_and(|token| token.text == "#") {
        at = group_end(tokens, at + 1) + 1;
    }
    let text = |at: usize| tokens.get(at).map_or("", |token: &Token| token.text.as_str());
    if text(at) == "pub" {
        at += 1;
        if text(at) == "(" {
            at = group_end(tokens, at) + 1;
        }
    }
    let mut constant = false;
    while ["const", "async", "extern", "unsafe", "\"\""].contains(&text(at)) {
        constant |= text(at) == "const";
        at += 1;
    }
    let to_body =
        ["fn", "mod", "impl", "trait", "struct", "enum", "union", "macro_rules"].contains(&text(at));
    let to_semicolon = !to_body && (constant || ["use", "static", "let", "type"].contains(&text(at)));
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "{" | "(" | "[" => {
                let brace = tokens[at].text == "{";
                at = group_end(tokens, at) + 1;
                if brace && to_body {
                    return at;
                }
                // An arm or a statement that is a block needs no comma behind it.
                let goes_on = [",", ";", ".", "?", "else"];
                if brace
                    && !to_semicolon
                    && tokens.get(at).is_none_or(|next| !goes_on.contains(&next.text.as_str()))
                {
                    return at;
                }
            }
            ";" => return at + 1,
            "," if !to_body && !to_semicolon => return at + 1,
            "}" => return at,
            _ => at += 1,
        }
    }
    at
}

/// The index of the bracket that closes the one at `open`; the last token where none does.
fn group_end(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    tokens.len().saturating_sub(1)
}

// --- tokens

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Word,
    /// A string, character, number or lifetime: its text is `""`.
    Literal,
    /// One character, or `::`, `->`, `=>`.
    Punctuation,
}

#[derive(Clone, Debug)]
struct Token {
    kind: Kind,
    text: String,
    line: usize,
}

impl Token {
    fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text == word
    }
}

/// The text of a comment, and the line it begins on.
struct Comment {
    text: String,
    line: usize,
}

/// Splits Rust into tokens and comments (the Rust Reference, "Lexical structure").
fn lex(text: &str) -> (Vec<Token>, Vec<Comment>) {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut comments = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let begin = at;
        let rest = &bytes[at..];
        let mut push = |kind, text: &str| tokens.push(Token { kind, text: text.to_owned(), line });
        if rest.starts_with(b"//") {
            at += rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
            comments.push(Comment { text: text[begin..at].to_owned(), line });
        } else if rest.starts_with(b"/*") {
            at += block_comment(rest);
            comments.push(Comment { text: text[begin..at].to_owned(), line });
        } else if let Some(length) = string(rest) {
            at += length;
            push(Kind::Literal, "\"\"");
        } else if rest[0] == b'\'' {
            at += character_or_lifetime(rest);
            push(Kind::Literal, "\"\"");
        } else if rest[0].is_ascii_digit() {
            at += rest.iter().position(|byte| !is_word_byte(*byte)).unwrap_or(rest.len());
            push(Kind::Literal, "\"\"");
        } else if is_word_byte(rest[0]) {
            let raw = if rest.starts_with(b"r#") { 2 } else { 0 };
            at += raw + rest[raw..].iter().position(|byte| !is_word_byte(*byte)).unwrap_or(rest.len() - raw);
            push(Kind::Word, &text[begin + raw..at]);
        } else if !rest[0].is_ascii_whitespace() {
            at += if [b"::", b"->", b"=>"].iter().any(|pair| rest.starts_with(*pair)) { 2 } else { 1 };
            push(Kind::Punctuation, &text[begin..at]);
        } else {
            at += 1;
        }
        line += bytes[begin..at].iter().filter(|byte| **byte == b'\n').count();
    }
    (tokens, comments)
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// Length of the block comment that `rest` begins with; they nest.
fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// Length of the string of any kind that `rest` begins with: `"…"`, `b"…"`, `c"…"`, `r"…"`, `br#"…"#`.
fn string(rest: &[u8]) -> Option<usize> {
    let prefix = rest.iter().take(2).take_while(|byte| b"bcr".contains(byte)).count();
    let raw = prefix > 0 && rest[prefix - 1] == b'r';
    let hashes = if raw { rest[prefix..].iter().take_while(|byte| **byte == b'#').count() } else { 0 };
    let open = prefix + hashes;
    if rest.get(open) != Some(&b'"') {
        return None;
    }
    let mut at = open + 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' if !raw => at += 2,
            b'"' if rest[at + 1..].iter().take(hashes).filter(|byte| **byte == b'#').count() == hashes => {
                return Some(at + 1 + hashes);
            }
            _ => at += 1,
        }
    }
    Some(rest.len())
}

/// Length of `'a'`, `'\n'`, `'\u{1f600}'`, or of the lifetime `'a`.
fn character_or_lifetime(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        let end = rest.iter().skip(3).position(|byte| *byte == b'\'');
        return end.map_or(rest.len(), |end| end + 4);
    }
    let width = match rest.get(1) {
        Some(first) if *first >= 0xf0 => 4,
        Some(first) if *first >= 0xe0 => 3,
        Some(first) if *first >= 0xc0 => 2,
        _ => 1,
    };
    if rest.get(1 + width) == Some(&b'\'') {
        return width + 2;
    }
    1 + rest[1..].iter().position(|byte| !is_word_byte(*byte)).unwrap_or(rest.len() - 1)
}

// --- the checker, checked

/// Lines and rules of the violations in one file, which begins with its header.
fn in_file(path: &str, body: &str) -> Vec<(usize, String)> {
    in_files(&[(path, body)]).into_iter().map(|found| (found.line, found.rule)).collect()
}

fn in_files(files: &[(&str, &str)]) -> Vec<Violation> {
    let crates = ["tokio", "hyper", "tracing", "http", "fastrand", "parking_lot", "toml"].map(str::to_owned);
    let sources: Vec<Source> = files
        .iter()
        .map(|(path, body)| Source { path: (*path).to_owned(), text: format!("//! Header.\n{body}") })
        .collect();
    check(&sources, &crates.into_iter().collect())
}

#[track_caller]
fn assert_found(path: &str, body: &str, line: usize, rule: &str) {
    let found = in_file(path, body);
    assert!(found.iter().any(|(at, text)| *at == line && text.contains(rule)), "{body}\n{found:?}");
}

#[track_caller]
fn assert_clean(path: &str, body: &str) {
    let found = in_file(path, body);
    assert!(found.is_empty(), "{body}\n{found:?}");
}

#[test]
fn an_import_upwards_is_found_however_it_is_written() {
    let up = "may not import `proxy` (layer 3)";
    for body in [
        "use crate::proxy::Client;",
        "use crate::{clock, proxy::Client};",
        "use crate::{\n    clock,\n    proxy as p,\n};",
        "pub(crate) use super::super::proxy::{self, Client};",
        "fn f() { crate::proxy::run() }",
        "fn f(x: impl Fn(&crate::proxy::Client)) {}",
        "type C = <crate::proxy::Client as Clone>::Out;",
        "fn f() { let x = Vec::<u8>::new(); let y: &dyn crate::proxy::X; }",
        "mod inner {\n    use super::super::super::proxy;\n}",
        "macro_rules! m { () => { $crate::proxy::run() }; }",
        "use crate::r#proxy;",
        "#[derive(crate::proxy::Derive)] struct S;",
        "#[cfg(not(test))]\nuse crate::proxy;",
        "#[cfg(any(test, unix))]\nuse crate::proxy;",
        "const A: char = '\"'; use crate::proxy; const B: char = '\"';",
        "fn f<'a>(x: &'a str) -> char { crate::proxy::g('\\'') }",
        "#[cfg(test)]\nuse crate::server;\nuse crate::proxy;",
    ] {
        let found = in_file("src/pool/a.rs", body);
        assert!(found.iter().any(|(_, rule)| rule.contains(up)), "{body}\n{found:?}");
    }
    assert_found("src/pool/a.rs", "\n\nuse crate::{\n    clock,\n    proxy,\n};", 6, up);
    assert_found(
        "src/policy/mod.rs",
        "use crate::config::Config;",
        2,
        "`policy` (layer 0) may not import `config` (layer 1)",
    );
    assert_found("src/policy/mod.rs", "use super::config;", 2, "`config`");
    assert_found("src/clock.rs", "use super::pool;", 2, "`pool`");
}

#[test]
fn what_is_no_import_upwards_is_left_alone() {
    for body in [
        "use crate::policy::Moment; use crate::upstream; use super::snapshot::Snapshot; use self::inner::X;",
        "// use crate::proxy;\n/* use crate::proxy; /* nested */ crate::proxy::x */",
        "/// See [`crate::proxy`].\nfn f() {}",
        "const A: &str = \"crate::proxy::run()\"; const B: &str = r#\"\"crate::proxy\"\"#; const C: &[u8] = b\"\\\"crate::proxy\";",
        "pub(crate) fn f() {} pub(in crate::pool) fn g() {} pub(super) fn h() {}",
        "fn f() { other::crate_::proxy(); a.proxy::<u8>(); }",
    ] {
        assert_clean("src/pool/a.rs", body);
    }
    assert_clean("src/app.rs", "use crate::{proxy, server}; use evergate::admin;");
}

#[test]
fn what_only_tests_have_may_use_more() {
    for body in [
        "#[cfg(test)]\nmod tests {\n    use crate::proxy;\n    use tokio::net::TcpListener;\n}",
        "#[cfg(all(test, unix))]\nuse crate::proxy;",
        "#[cfg(test)]\n#[allow(dead_code)]\npub(crate) async fn f() -> [u8; 2] { crate::proxy::g() }",
        "#[cfg(test)]\nconst X: crate::proxy::T = crate::proxy::T { a: 1 };",
        "enum E {\n    A,\n    #[cfg(test)]\n    B(crate::proxy::T),\n}",
        "fn f() { match x { #[cfg(test)] A => { crate::proxy::g() } B => {} } }",
        "fn f() { match x { #[cfg(test)] A(y) => y.at(crate::proxy::g), B => {} } }",
        "#[test]\nfn t() { crate::proxy::g(); }",
        "#[tokio::test(start_paused = true)]\nasync fn t() { crate::proxy::g(); }",
    ] {
        assert_clean("src/pool/a.rs", body);
    }
    // An attribute ends where its item ends.
    let body = "enum E {\n    #[cfg(test)]\n    B(u8),\n    C(crate::proxy::T),\n}";
    assert_found("src/pool/a.rs", body, 5, "`proxy`");
    let body = "#[cfg(test)]\nmod tests {\n}\nuse crate::proxy;";
    assert_found("src/pool/a.rs", body, 5, "`proxy`");

    let test_file = ("src/policy/health/tests.rs", "use crate::proxy;");
    assert!(in_files(&[("src/policy/health/mod.rs", "#[cfg(test)]\nmod tests;"), test_file]).is_empty());
    assert_eq!(in_files(&[("src/policy/health/mod.rs", "mod tests;"), test_file]).len(), 1);
}

#[test]
fn every_file_belongs_to_a_layer_and_has_a_header() {
    assert_found("src/utils/mod.rs", "", 1, "`utils` is not in the table");
    assert_found("src/helpers.rs", "", 1, "`helpers` is not in the table");
    assert_found("src/clock.rs", "use crate::Thing;", 2, "`crate::Thing` is no module");
    assert_found("src/clock.rs", "use super::*;", 2, "crate's root");
    assert_found("src/clock.rs", "use crate as root;", 2, "crate's root");
    assert_found("src/clock.rs", "fn f() { g(']')", 1, "brackets do not match");
    assert_clean(
        "src/clock.rs",
        "fn f() { g(']', b'{', \"(\", r#\"\"[\"#, '\\'', '\\u{7d}') } // }\n/* ( */",
    );
    let bare = Source { path: "src/clock.rs".into(), text: "// Not a header.\n".into() };
    let found = check(&[bare], &BTreeSet::new());
    assert!(found.len() == 1 && found[0].rule.contains("header"), "{found:?}");
}

#[test]
fn unsafe_is_found_in_tests_too_but_not_in_prose() {
    assert_found("src/app.rs", "\n#[cfg(test)]\nmod tests { fn f() { unsafe { g() } } }", 4, "no `unsafe`");
    assert_clean("src/app.rs", "// unsafe\nconst A: &str = \"unsafe\"; fn unsafe_looking() {}");
}

#[test]
fn layer_zero_is_pure() {
    for (body, what) in [
        ("use tokio::time::sleep;", "`tokio`"),
        ("use tokio;", "`tokio`"),
        ("fn f() { ::tokio::spawn(g()); }", "`tokio`"),
        ("use {http::Method, hyper::body};", "`hyper`"),
        ("fn f() { tracing::info!(\"x\"); }", "`tracing`"),
        ("use parking_lot::Mutex;", "`parking_lot`"),
        ("use std::{fmt, io::{self, Read}};", "`std::io"),
        ("use std::fs;", "`std::fs`"),
        ("use core::net::TcpStream;", "`std::net::TcpStream`"),
        ("use std::time::{Duration, Instant};", "`std::time::Instant`"),
        ("fn f(t: Instant) { Instant::now(); }", "`Instant::now`"),
        ("use std::sync::Mutex;", "`std::sync::Mutex`"),
        ("fn f() -> u32 { fastrand::u32(..) }", "`fastrand::u32`"),
        ("fn f() { fastrand::Rng::new(); }", "`fastrand::Rng::new`"),
        ("async fn f() {}", "`async`"),
        ("fn f() { println!(); }", "`println!`"),
        ("use std::time; fn f() { time::Instant::now(); }", "`time::Instant::now`"),
        ("use std as s;", "`std`"),
    ] {
        assert_found("src/policy/retry/mod.rs", body, 2, what);
        assert_found("src/sse/decode.rs", body, 2, what);
    }
    for body in [
        "use std::net::{IpAddr, SocketAddr}; use std::time::Duration; use std::fmt::Write as _; use http::Method;",
        "use std::sync::atomic::AtomicUsize; use std::sync::Arc; fn f(rng: &mut fastrand::Rng) { rng.f64(); }",
        "// tokio::spawn\nfn f(tokio: u8, io: u8, println: u8) {}",
        "#[cfg(test)]\nmod tests {\n    use std::time::Instant;\n    fn f() { println!(); }\n}",
    ] {
        assert_clean("src/policy/retry/mod.rs", body);
    }
    assert_clean("src/pool/mod.rs", "use tokio::sync::Mutex; async fn f() { tracing::info!(); }");
}

#[test]
fn only_the_demo_imports_the_simulation() {
    assert_found("src/cli.rs", "use crate::sim;", 2, "`cli` may not import `sim`");
    assert_found("src/main.rs", "fn main() { evergate::sim::run() }", 2, "`main` may not import `sim`");
    assert_clean("src/demo.rs", "use crate::sim;");
    assert_clean("src/sim/api.rs", "use super::model; use crate::sim::skin;");
}

#[test]
fn some_words_belong_elsewhere() {
    assert_found("src/proxy/mod.rs", "use tokio::net::TcpListener;", 2, "listening sockets");
    assert_found("src/upstream/mod.rs", "fn is_retryable() {}", 2, "states facts");
    assert_clean("src/server/mod.rs", "use tokio::net::TcpListener;");
}

#[test]
fn the_attempt_loop_fits_on_a_screen() {
    let lines = |count: usize| "    step();\n".repeat(count);
    let inside =
        |count| format!("fn f() {{\n    // {LOOP_MARK}\n{}}}\nfn g() {{\n{}}}", lines(count), lines(99));
    assert_clean(LOOP_FILE, &inside(57)); // and `fn`, the mark and `}` are 60
    assert_found(LOOP_FILE, &inside(58), 2, "61 lines");
    let above = |count| format!("// {LOOP_MARK}: why.\n#[inline]\nasync fn f() {{\n{}}}", lines(count));
    assert_clean(LOOP_FILE, &above(58));
    assert_found(LOOP_FILE, &above(59), 4, "61 lines");
    assert_found(LOOP_FILE, "//! The attempt loop.\nfn f() {}", 1, "here 0 do");
    assert_found(LOOP_FILE, &format!("fn f() {{ \"// {LOOP_MARK}\" }}"), 1, "here 0 do");
    assert_found(
        LOOP_FILE,
        &format!("// {LOOP_MARK}\nfn f() {{}}\n// {LOOP_MARK}\nfn g() {{}}"),
        1,
        "here 2 do",
    );
    assert_clean(LOOP_FILE, &format!("/// The attempt loop.\nfn f(g: fn(u8)) {{\n    // {LOOP_MARK}\n}}"));
    assert_found(
        LOOP_FILE,
        &format!("// {LOOP_MARK}\nfn f(&self) {{\n    self.metrics.add(1);\n}}"),
        4,
        "`metrics`",
    );
    assert_found(LOOP_FILE, &format!("// {LOOP_MARK}\nfn f() {{\n    info!(\"x\");\n}}"), 4, "`info!`");
    assert_clean("src/proxy/attempt.rs", &inside(200));
}

#[test]
fn crates_are_read_from_the_manifest() {
    let names = dependencies(
        "[package]\nname = \"x\"\n[dependencies]\nhyper-util = \"1\"\ntokio = { x = 1 }\n[dev-dependencies]\nrcgen = \"1\"",
    );
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["hyper_util", "tokio"]);
}
