//! What a configuration author meets: defaults, spellings, and every mistake with its line.

use std::time::Duration;

use proptest::prelude::*;

use super::{AccessLogTarget, Config, ProbeKind, from_flags, parse};
use crate::policy::balance::{AffinityKey, BalancePolicy};
use crate::policy::fallback::FallbackCause;
use crate::policy::retry::RetryPolicy;

const MINIMAL: &str = include_str!("../../config/minimal.toml");
const REFERENCE: &str = include_str!("../../config/reference.toml");
const ONE_BACKEND: &str = "[[pool]]\nbackends = [\"http://a:1\"]\n";

fn env(name: &str) -> Option<String> {
    match name {
        "TOKEN" => Some("hunter2".to_owned()),
        "WORKERS" => Some("3".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

fn read(text: &str) -> Config {
    parse(text, "test.toml", &env).unwrap_or_else(|errors| panic!("{errors}\n---\n{text}"))
}

/// The errors, one a line, without the file's name.
fn errors(text: &str) -> Vec<String> {
    let errors = parse(text, "test.toml", &env).expect_err("a mistake");
    errors.iter().map(|error| error.to_string().trim_start_matches("test.toml").to_owned()).collect()
}

fn only_error(text: &str) -> String {
    let errors = errors(text);
    assert_eq!(errors.len(), 1, "{errors:#?}\n---\n{text}");
    errors.into_iter().next().unwrap_or_default()
}

/// A pool with one backend, and these lines in front of it.
fn with_pool(lines: &str) -> String {
    format!("{lines}\n{ONE_BACKEND}")
}

#[test]
fn three_tables_are_a_whole_configuration() {
    let config = read(MINIMAL);
    assert_eq!(config.listeners[0].address.to_string(), "0.0.0.0:8080");
    assert_eq!(config.pools[0].name, "default");
    assert_eq!(config.pools[0].backends[1].name, "10.0.0.2:8000");
    assert_eq!(config.pools[0].balance, BalancePolicy::PowerOfTwo);
    assert_eq!(config.pools[0].retry, RetryPolicy::default());
    assert!(config.pools[0].health.probes);
    assert!(config.routes.is_empty());
}

#[test]
fn fallbacks_read_back_as_they_were_written() {
    let text = "[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]\n[[pool.fallback]]\npool = \"b\"\n\
        on = [\"context_length\", \"slow\"]\nmodel = \"large\"\n[[pool.fallback]]\npool = \"b\"\non = [\"busy\"]\n\
        [[pool]]\nname = \"b\"\nbackends = [\"http://b:1\"]";
    let config = read(text);
    let [first, second] = &config.pools[0].fallbacks[..] else { panic!("{:?}", config.pools[0].fallbacks) };
    assert_eq!(first.on, [FallbackCause::ContextLength, FallbackCause::Slow]);
    assert_eq!((first.model.as_deref(), second.model.as_deref()), (Some("large"), None));
    assert_eq!(read(&config.effective_toml()), config);
}

#[test]
fn listener_and_admin_may_be_left_out() {
    let config = read(ONE_BACKEND);
    assert_eq!(config.listeners[0].address.to_string(), "127.0.0.1:8080");
    assert_eq!(config.admin.address.to_string(), "127.0.0.1:9901");
}

#[test]
fn five_mistakes_are_told_at_once_with_line_key_value_and_remedy() {
    let text = r#"drain_deadline = 30
[[listener]]
address = ":8080"
[[pool]]
name = "chat"
backends = [
    "http://10.0.0.1:8000",
    { url = "http://10.0.0.2:8000", wieght = 2 },
    { url = "http://10.0.0.3:8000", weight = 5000 },
]
[[route]]
path_prefix = "/v1/chat"
pool = "chatt"
"#;
    let errors = parse(text, "evergate.toml", &env).expect_err("five mistakes");
    assert_eq!(
        errors.to_string(),
        r#"evergate.toml:1: drain_deadline: a duration needs a unit (30); write "30s", or with ms, m, h
evergate.toml:3: listener[0].address: is not an address (":8080"); write "0.0.0.0:8080" for every interface or "127.0.0.1:8080" for this machine
evergate.toml:8: pool[0].backends[1].wieght: unknown key; did you mean weight
evergate.toml:9: pool[0].backends[2].weight: is out of range (5000); write a whole number from 1 to 1000
evergate.toml:13: route[0].pool: no such pool ("chatt"); did you mean "chat"
5 errors in evergate.toml"#
    );
}

#[test]
fn each_mistake_has_its_own_words() {
    for (text, expected) in [
        ("", r#":1: pool: is missing; write [[pool]] and backends = ["http://10.0.0.1:8000"]"#),
        ("[[pool]]", r#":1: pool[0].backends: is missing; write backends = ["http://10.0.0.1:8000"]"#),
        (
            "[[pool]]\nbackends = []",
            r#":2: pool[0].backends: has no backend; list at least one, such as "http://10.0.0.1:8000""#,
        ),
        (
            "[pool]\nbackends = [\"http://a:1\"]",
            ":1: pool: is not a list of tables (a table); write [[pool]]",
        ),
        (
            "[[pool]]\nbackends = \"http://a:1\"",
            r#":2: pool[0].backends: is not a list ("http://a:1"); write ["http://a:1"]"#,
        ),
        (
            "[[pool]]\nbackends = [\"http://a:1\"]\n[[pool.fallback]]\npool = \"default\"\non = [\"busy\"]",
            r#":4: pool[0].fallback[0].pool: is the pool itself ("default"); write another pool, or leave the entry out"#,
        ),
        (
            "[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]\n[[pool.fallback]]\npool = \"bb\"\non = [\"busy\"]\n[[pool]]\nname = \"b\"\nbackends = [\"http://b:1\"]",
            r#":5: pool[0].fallback[0].pool: no such pool ("bb"); did you mean "b""#,
        ),
        (
            "[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]\nfallback = [{ pool = \"b\", on = [] }]\n[[pool]]\nname = \"b\"\nbackends = [\"http://b:1\"]",
            r#":4: pool[0].fallback[0].on: names no cause; write on = ["unavailable", "busy"]"#,
        ),
        (
            "[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]\nfallback = [{ pool = \"b\", on = [\"bussy\"] }]\n[[pool]]\nname = \"b\"\nbackends = [\"http://b:1\"]",
            r#":4: pool[0].fallback[0].on[0]: is not one of the choices ("bussy"); did you mean "busy""#,
        ),
        (
            "[[pool]]\nbackends = [\"a:1\"]",
            r#":2: pool[0].backends[0]: has no scheme ("a:1"); write a URL such as "http://10.0.0.1:8000""#,
        ),
        (
            "[[pool]]\nbackends = [\"ftp://a:1\"]",
            r#":2: pool[0].backends[0]: has an unknown scheme ("ftp://a:1"); write http:// or https://"#,
        ),
        (
            "[[pool]]\nbackends = [\"http://a:99999\"]",
            r#":2: pool[0].backends[0]: has no valid port ("http://a:99999"); write a port from 1 to 65535"#,
        ),
        (
            "[[pool]]\nbackends = [\"http://a:1\", \"http://A:1/\"]",
            r#":2: pool[0].backends[1]: has the same URL as pool[0].backends[0] ("http://A:1/"); list each backend once; weight gives it more traffic"#,
        ),
        (
            "[[pool]]\nbackends = [\"http://a:1\", \"http://a:1/x\"]",
            r#":2: pool[0].backends[1]: has the name of pool[0].backends[0], "a:1"; give it another name"#,
        ),
        (
            "[[pool]]\nbackends = [\"http://127.0.0.1:8080\"]",
            r#":2: pool[0].backends[0]: is evergate's own listener[0] ("http://127.0.0.1:8080"); write the address of a replica"#,
        ),
        (
            "[[pool]]\nbackends = [{ name = \"x\" }]",
            r#":2: pool[0].backends[0].url: is missing; write url = "http://10.0.0.1:8000""#,
        ),
        (
            "[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]\n[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]",
            r#":5: pool[1].name: is the name of pool[0] too ("a"); write another name"#,
        ),
        (
            "[[pool]]\nname = \"a\"\nbackends = [\"http://a:1\"]\n[[pool]]\nbackends = [\"http://a:1\"]",
            ":4: pool[1].name: is missing; with several pools each needs one",
        ),
        (
            "[[pool]]\nname = \"a b\"\nbackends = [\"http://a:1\"]",
            r#":2: pool[0].name: is not a name ("a b"); use up to 128 of the characters a-z A-Z 0-9 . _ - :"#,
        ),
    ] {
        assert_eq!(only_error(text), expected, "{text}");
    }
    for (lines, expected) in [
        ("workers = \"4\"", r#":1: workers: is text, not a number ("4"); write 4 without quotes"#),
        ("workers = -1", ":1: workers: is out of range (-1); write a whole number from 0 to 1024"),
        ("workers = 1.5", ":1: workers: is not a whole number (1.5); write a whole number from 0 to 1024"),
        (
            "drain_deadline = \"30 seconds\"",
            r#":1: drain_deadline: is not a duration ("30 seconds"); write a number and a unit, such as "250ms", "5s" or "2m""#,
        ),
        (
            "[limits]\nbody_bytes_max = 1048576",
            r#":2: limits.body_bytes_max: a size needs a unit (1048576); write "1MiB""#,
        ),
        (
            "[limits]\nhead_bytes_max = \"1B\"",
            r#":2: limits.head_bytes_max: is out of range ("1B"); write a value from 8KiB to 16MiB"#,
        ),
        (
            "[client]\nidle = \"0s\"",
            r#":2: client.idle: must be longer than zero ("0s"); write at least "1ms""#,
        ),
        (
            "[[listener]]\naddress = \"0.0.0.0:80\"\n[[listener]]\naddress = \"127.0.0.1:80\"",
            r#":4: listener[1].address: is taken by listener[0] ("127.0.0.1:80"); write another port"#,
        ),
        (
            "[[listener]]\naddress = \"0.0.0.0:9901\"",
            ":1: admin.address: its default 127.0.0.1:9901 is taken by listener[0]; write another port under [admin]",
        ),
        (
            "[[listener]]\naddress = \"0.0.0.0:80\"\ntrusted_proxies = [\"10.0.0.0/40\"]",
            r#":3: listener[0].trusted_proxies[0]: is not a network ("10.0.0.0/40"); write an address or a network, such as "10.0.0.0/8""#,
        ),
        (
            "[[listener]]\naddress = \"0.0.0.0:80\"\n[listener.tls]\nkey = \"/k\"",
            ":3: listener[0].tls.certificate: is missing; key needs it",
        ),
        (
            "[telemetry]\nlog_level = \"inof\"",
            r#":2: telemetry.log_level: is not a log level ("inof"); did you mean "info""#,
        ),
        (
            "[telemetry]\naccess_log = \"stdot\"",
            r#":2: telemetry.access_log: is not a place for records ("stdot"); did you mean "stdout", or a path with a /"#,
        ),
        ("[client]\nconnect = \"2s\"", ":2: client.connect: unknown key; it belongs to [pool.clocks]"),
        (
            "[admin]\ntoken = \"${NOPE}\"",
            ":2: admin.token: environment variable NOPE is not set; set it where evergate is started",
        ),
        ("[admin]\ntoken = \"${EMPTY}\"", ":2: admin.token: is empty; the environment variable is empty"),
        (
            "[admin]\ntoken = \"***\"",
            ":2: admin.token: is a masked secret; write the secret, ${NAME} or file:/path",
        ),
        (
            "[admin]\ntoken = \"file:secret\"",
            ":2: admin.token: names a secret file by a relative path; write file: and an absolute path",
        ),
        ("[admin]\ntoken = [\"hunter2\"]", ":2: admin.token: is not text; write text in quotes"),
        (
            "[telemetry]\nlog_level = \"${}\"",
            r#":2: telemetry.log_level: has no variable name in ${ } ("${}"); write ${NAME}, or $${ for a literal ${"#,
        ),
    ] {
        assert_eq!(only_error(&with_pool(lines)), expected, "{lines}");
    }
    for (lines, expected) in [
        ("http = 2", r#":3: pool[0].http: is not text (2); write "2""#),
        ("models = [\"a\", \"a\"]", r#":3: pool[0].models[1]: is listed twice ("a"); list each model once"#),
        (
            "aliases = { a = \"b\", b = \"c\" }",
            r#":3: pool[0].aliases.a: names another alias ("b"); aliases are applied once; write "c""#,
        ),
        (
            "aliases = { a = \"a\" }",
            r#":3: pool[0].aliases.a: leads back to itself ("a"); name the model as the backends know it"#,
        ),
        (
            "balance = { strategy = \"p2\" }",
            r#":3: pool[0].balance.strategy: is not one of the choices ("p2"); did you mean "p2c""#,
        ),
        (
            "balance = { bound = 1.5 }",
            r#":3: pool[0].balance.bound: is for strategy = "consistent_hash" (1.5); leave it out or write that strategy"#,
        ),
        (
            "balance = { strategy = \"consistent_hash\", bound = 0.5 }",
            ":3: pool[0].balance.bound: is out of range (0.5); write a value from 1 to 100",
        ),
        (
            "health = { success_rate_min = 80 }",
            ":3: pool[0].health.success_rate_min: is out of range (80); write a value from 0 to 1",
        ),
        (
            "health = { ejection_min = \"2m\" }",
            r#":3: pool[0].health.ejection_min: is longer than ejection_max, "1m" ("2m"); lower it, or raise ejection_max"#,
        ),
        (
            "health = { ejection_max = \"10ms\" }",
            r#":3: pool[0].health.ejection_max: is shorter than ejection_min, "1s" ("10ms"); raise it, or lower ejection_min"#,
        ),
        (
            "probe = { kind = \"tcp\", path = \"/x\" }",
            r#":3: pool[0].probe.path: is for kind = "http" ("/x"); leave it out or write kind = "http""#,
        ),
        (
            "probe = { preset = \"vllm\", path = \"/x\" }",
            r#":3: pool[0].probe.path: stands beside preset, which chooses it ("/x"); leave one of them out"#,
        ),
        ("probe = { engine = \"vllm\" }", ":3: pool[0].probe.engine: unknown key; did you mean preset"),
        (
            "probe = { preset = \"vlm\" }",
            r#":3: pool[0].probe.preset: is not one of the choices ("vlm"); did you mean "vllm""#,
        ),
        (
            "probe = { kind = \"tcp\", preset = \"vllm\" }",
            r#":3: pool[0].probe.preset: is for kind = "http", "generate" or "canary" ("vllm"); leave it out or write kind = "http", "generate" or "canary""#,
        ),
        (
            "probe = { expect = \"4\" }",
            r#":3: pool[0].probe.expect: is for kind = "canary" ("4"); leave it out or write kind = "canary""#,
        ),
        (
            "probe = { kind = \"canary\", prompt = \"2+2=\" }",
            ":3: pool[0].probe.expect: is missing; write the text that the answer to prompt begins with",
        ),
        (
            "probe = { kind = \"generate\", endpoint = \"/v1/embeddings\" }",
            r#":3: pool[0].probe.endpoint: is not a path where text is asked for ("/v1/embeddings"); write one such as "/v1/completions", "/v2/models/{model}/generate" or "/api/generate""#,
        ),
        (
            "load = { scrape = \"of\" }",
            r#":3: pool[0].load.scrape: is not a page ("of"); did you mean "off", or a path such as "/metrics""#,
        ),
        (
            "load = { interval = \"5s\" }",
            r#":3: pool[0].load.interval: is out of range ("5s"); write a value from 100ms to 1500ms"#,
        ),
        (
            "probe = { path = \"health\" }",
            r#":3: pool[0].probe.path: is not a path ("health"); write a path such as "/health""#,
        ),
        (
            "retry = { attempts_max = 0 }",
            ":3: pool[0].retry.attempts_max: is out of range (0); write a whole number from 1 to 10",
        ),
        (
            "retry = { budget_ratio = nan }",
            ":3: pool[0].retry.budget_ratio: is not a number (nan); write a number from 0 to 1",
        ),
        (
            "clocks = { connect = 2 }",
            r#":3: pool[0].clocks.connect: a duration needs a unit (2); write "2s", or with ms, m, h"#,
        ),
        (
            "tls = { client_key = \"/k\" }",
            ":3: pool[0].tls.client_certificate: is missing; client_key needs it",
        ),
        (
            "tls = { server_name = \"a:1\" }",
            r#":3: pool[0].tls.server_name: is not a server name ("a:1"); write a host name or an IP address, without a port"#,
        ),
        (
            "[[route]]\npath_prefix = \"v1\"",
            r#":4: route[0].path_prefix: is not the beginning of a path ("v1"); write one such as "/v1/embeddings""#,
        ),
        (
            "[[route]]\nhost = \"a.*.b\"",
            r#":4: route[0].host: is not a host ("a.*.b"); write "api.example.com" or "*.example.com", without a port"#,
        ),
        (
            "[[route]]\nmodels = [\"a*b\"]",
            r#":4: route[0].models[0]: has * where it means nothing ("a*b"); * may stand at the end only"#,
        ),
        (
            "[[route]]\n[[route]]\nhost = \"a\"",
            ":4: route[1]: is never reached: route[0] takes all it would; move it up, or narrow that one",
        ),
    ] {
        assert_eq!(only_error(&format!("{ONE_BACKEND}{lines}")), expected, "{lines}");
    }
}

#[test]
fn a_misspelt_key_is_not_told_as_missing_too() {
    assert_eq!(
        only_error("[[pool]]\nservers = [\"http://a:1\"]"),
        ":2: pool[0].servers: unknown key; did you mean backends"
    );
}

#[test]
fn hostile_shapes_are_refused_in_time() {
    for text in [
        "[".repeat(100_000),
        format!("a = {}", "[".repeat(100_000)),
        format!("a = {}", "{a=".repeat(50_000)),
        "a.".repeat(50_000),
    ] {
        assert!(parse(&text, "test.toml", &env).is_err());
    }
}

#[test]
fn windows_line_ends_and_a_byte_order_mark_change_nothing() {
    assert_eq!(read(&format!("\u{feff}{}", MINIMAL.replace('\n', "\r\n"))), read(MINIMAL));
}

#[test]
fn a_mistake_of_syntax_does_not_hide_the_others() {
    let text = "workers = two\n[admin]\naddress = 127.0.0.1:80\n[client]\nidel = \"1s\"\nhead = \"1s\"\nhead = \"2s\"\n\
                [[pool]]\nname = chat\nbackends = [\"http://a:1\"]\n[[route]]\npool = \"chat\"\n";
    assert_eq!(
        errors(text),
        [
            ":1: not valid TOML: invalid boolean; if it is text, write it in quotes",
            ":3: not valid TOML: invalid float; if it is text, write it in quotes",
            ":5: client.idel: unknown key; did you mean idle",
            ":7: not valid TOML: duplicate key",
            ":9: not valid TOML: string values must be quoted; if it is text, write it in quotes",
        ]
    );
}

#[test]
fn a_broken_structure_is_told_without_its_echoes() {
    let errors = errors("[[pool]\nbackends = [\"http://a:1\"]\n");
    assert_eq!(errors, [":1: not valid TOML: unclosed array table; expected `]`"]);
}

#[test]
fn secrets_are_neither_in_errors_nor_in_debug_nor_in_the_effective_text() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "hunter2\n").unwrap();
    let text = format!(
        "[admin]\ntoken = \"file:{}\"\n[[pool]]\nbackends = [{{ url = \"http://a:1\", headers = \
         {{ authorization = \"Bearer ${{TOKEN}}\", x-api-key = \"hunter2\", x-tenant = \"blue\" }} }}]\n",
        file.display()
    );
    let config = read(&text);
    let backend = &config.pools[0].backends[0];
    assert_eq!(config.admin.token.as_ref().unwrap().expose(), "hunter2");
    assert_eq!(backend.headers[0].1, "Bearer hunter2");
    assert!(backend.own_credentials);
    assert!(!format!("{config:?}").contains("hunter2"));
    let effective = config.effective_toml();
    assert!(!effective.contains("hunter2"));
    assert!(effective.contains("token = \"***\""));
    assert!(effective.contains("\"x-tenant\" = \"blue\""));
    let route = read(&format!("{ONE_BACKEND}[[route]]\nheaders = {{ authorization = \"Bearer hunter2\" }}"));
    assert_eq!(route.routes[0].headers[0].1, "Bearer hunter2");
    assert!(!route.effective_toml().contains("hunter2"));
    for text in [
        "[admin]\ntoken = \"hunter2 \\u0001\"",
        "[admin]\ntokens = \"hunter2\"",
        "[admin]\ntoken = hunter2",
        "[[pool]]\nbackends = [\"http://user:hunter2@a:1\"]",
        "[[pool]]\nbackends = [\"http://a:1/?key=hunter2\"]",
        "[[pool]]\nbackends = \"http://user:hunter2@a:1\"",
        "[[pool]]\nbackends = [{ url = \"http://a:1\", headers = \"hunter2\" }]",
        "[[pool]]\nbackends = [{ url = \"http://a:1\", headers = { x = [\"hunter2\"] } }]",
        "[[pool]]\nbackends = [{ url = \"http://a:1\", headers = { x = \"hunter2\\n\" } }]",
        "[[pool]]\nname = \"${TOKEN} \"\nbackends = [\"http://a:1\"]",
    ] {
        let errors = errors(text).join("\n");
        assert!(!errors.contains("hunter2"), "{errors}");
    }
}

#[test]
fn the_environment_fills_any_value() {
    let config = read(&with_pool("workers = \"${WORKERS}\"\n[telemetry]\naccess_log = \"/var/log/$${x}\""));
    assert_eq!(config.workers.get(), 3);
    assert_eq!(config.telemetry.access_log, AccessLogTarget::File("/var/log/${x}".into()));
}

#[test]
fn a_backend_url_is_taken_apart() {
    let config = read(
        "[[pool]]\nbackends = [\"https://Example.com/v2/\", \"http://[::1]:9000\", { url = \"http://c\", weight = 3, \
         tier = 1, in_flight_max = 8, name = \"c\", disabled = true }]",
    );
    let [a, b, c] = config.pools[0].backends.as_slice() else { panic!("three backends") };
    assert_eq!((a.secure, a.authority.as_str(), a.path_prefix.as_str()), (true, "example.com:443", "/v2"));
    assert_eq!((b.name.as_str(), b.path_prefix.as_str()), ("[::1]:9000", ""));
    assert_eq!((c.authority.as_str(), c.weight.get(), c.tier, c.disabled), ("c:80", 3, 1, true));
    assert_eq!(c.in_flight_max.unwrap().get(), 8);
}

#[test]
fn flags_make_the_same_configuration_as_the_file() {
    let urls = ["http://10.0.0.1:8000".to_owned(), "http://10.0.0.2:8000".to_owned()];
    let listen = "0.0.0.0:8080".parse().unwrap();
    assert_eq!(from_flags(Some(listen), None, &urls, None).unwrap(), read(MINIMAL));
    let errors = from_flags(None, None, &["a".to_owned(), "${X}://".to_owned()], Some(5000)).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "command line: --workers: is out of range (5000); write a whole number from 0 to 1024\n\
         command line: --backend[0]: has no scheme (\"a\"); write a URL such as \"http://10.0.0.1:8000\"\n\
         command line: --backend[1]: is not a URL (\"$${X}://\"); write a URL such as \"http://10.0.0.1:8000\"\n\
         3 errors in command line"
    );
}

#[test]
fn consistent_hash_takes_a_header_or_the_prompt() {
    let balance =
        |lines: &str| read(&format!("{ONE_BACKEND}[pool.balance]\n{lines}")).pools.remove(0).balance;
    assert_eq!(
        balance("strategy = \"consistent_hash\""),
        BalancePolicy::ConsistentHash { key: AffinityKey::PromptPrefix { bytes: 4096 }, bound: 1.25 }
    );
    assert_eq!(
        balance("strategy = \"consistent_hash\"\nheader = \"X-Session\"\nbound = 2"),
        BalancePolicy::ConsistentHash {
            key: AffinityKey::Header(http::HeaderName::from_static("x-session")),
            bound: 2.0
        }
    );
}

#[test]
fn no_probes_means_health_without_probes() {
    let config = read(&format!("{ONE_BACKEND}probe = {{ kind = \"off\" }}"));
    assert_eq!(config.pools[0].probe.kind, ProbeKind::Off);
    assert!(!config.pools[0].health.probes);
}

#[test]
fn every_pool_the_config_can_say_is_valid_for_its_policies() {
    let extremes = read(&format!(
        "{ONE_BACKEND}[pool.health]\nsuccess_rate_min = 0\nslow_start_share_min = 0.001\noutcomes_min = 64\nslow_start = \"0s\""
    ));
    assert_eq!(extremes.pools[0].health.validate(), Ok(()));
    assert_eq!(extremes.pools[0].health.slow_start, Duration::ZERO);
}

#[test]
fn files_are_checked_apart_from_validation() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(path("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(path("key.pem"), made.signing_key.serialize_pem()).unwrap();
    let text = |certificate: &str, key: &str| {
        with_pool(&format!(
            "[[listener]]\naddress = \"0.0.0.0:1\"\n[listener.tls]\ncertificate = \"{}\"\nkey = \"{}\"",
            path(certificate),
            path(key)
        ))
    };
    assert_eq!(read(&text("cert.pem", "key.pem")).check_files(), []);
    let errors = read(&text("key.pem", "none.pem")).check_files();
    let problems: Vec<_> = errors.iter().map(|error| (error.key.as_str(), error.problem.as_str())).collect();
    assert_eq!(
        problems,
        [
            ("listener[0].tls.certificate", "holds no certificate"),
            ("listener[0].tls.key", "cannot be read: No such file or directory (os error 2)"),
        ]
    );
}

/// Lines for every table with values of their own, drawn at random; many say nothing.
fn configurations() -> impl Strategy<Value = String> {
    let top = (0..9_u64, proptest::option::of(0..100_000_u64), proptest::option::of(1..100_u64));
    let pool = (
        0..5_usize,
        0..7_usize,
        proptest::option::of(1..1000_u32),
        proptest::option::of((0..=1000_u32).prop_map(|n| f64::from(n) / 1000.0)),
        proptest::option::of(1..5_000_000_u64),
        "[a-z$\\{\\}\"\\\\ ]{1,9}",
    );
    (top, proptest::collection::vec(pool, 1..4)).prop_map(|((workers, drain, idle), pools)| {
        use std::fmt::Write as _;
        let mut text = format!("workers = {workers}\n");
        if let Some(drain) = drain {
            let _ = writeln!(text, "drain_deadline = \"{drain}ms\"");
        }
        if let Some(idle) = idle {
            let _ = writeln!(text, "[client]\nidle = \"{idle}s\"");
        }
        for (index, (strategy, probe, weight, ratio, bytes, model)) in pools.into_iter().enumerate() {
            let strategy = ["p2c", "round_robin", "least_load", "weighted", "consistent_hash"][strategy];
            let model = super::effective::quoted(&model);
            let _ = writeln!(
                text,
                "[[pool]]\nname = \"p{index}\"\nmodels = [{model}]\naliases = {{ {model} = \"x*\" }}"
            );
            let _ = writeln!(
                text,
                "backends = [{{ url = \"http://h:{}\", weight = {} }}]",
                index + 1,
                weight.unwrap_or(1)
            );
            let _ = writeln!(text, "[pool.balance]\nstrategy = \"{strategy}\"");
            if let Some(bytes) = bytes.filter(|bytes| strategy == "consistent_hash" && *bytes <= 1 << 20) {
                let _ = writeln!(text, "prompt_bytes = \"{bytes}B\"");
            }
            let kind = ["http", "tcp", "off", "http", "generate", "canary", "http"][probe];
            let _ = writeln!(text, "[pool.probe]\nkind = \"{kind}\"");
            if probe == 3 {
                let _ = writeln!(text, "statuses = [200, 204]\nbody = {model}");
            }
            if probe >= 4 {
                let preset = ["vllm", "triton", "ollama"][probe - 4];
                let _ = writeln!(text, "preset = \"{preset}\"");
            }
            if probe == 5 {
                let _ = writeln!(text, "prompt = {model}\nexpect = {model}\ndeadline = \"5s\"");
            }
            let scrape = ["off", "auto", "/x?y"][probe % 3];
            let _ = writeln!(text, "[pool.load]\nscrape = \"{scrape}\"");
            if let Some(ratio) = ratio {
                let _ = writeln!(
                    text,
                    "[pool.retry]\nbudget_ratio = {ratio:?}\n[pool.health]\npeer_margin = {ratio:?}"
                );
            }
            if let Some(bytes) = bytes {
                let _ =
                    writeln!(text, "[pool.clocks]\ntotal = \"{bytes}ms\"\nidle = \"{bytes}us\"").map(|()| ());
            }
            let _ = writeln!(
                text,
                "[[route]]\npool = \"p{index}\"\npath_prefix = \"/{index}\"\nheaders = {{ a = {model} }}"
            );
        }
        text
    })
}

proptest! {
    #[test]
    fn the_effective_configuration_reads_back_as_itself(text in configurations()) {
        if let Ok(config) = parse(&text, "test.toml", &env) {
            for pool in &config.pools {
                prop_assert_eq!(pool.health.validate(), Ok(()));
                prop_assert_eq!(pool.balance.validate(), Ok(()));
            }
            let effective = config.effective_toml();
            let again = parse(&effective, "effective", &|_| None);
            prop_assert_eq!(again.map_err(|errors| format!("{errors}\n{effective}")), Ok(config));
        }
    }

    #[test]
    fn arbitrary_text_is_read_or_refused(text in "\\PC{0,200}|[\\[\\]\\{\\}=\"'\\.a-z0-9\\n# ,]{0,200}") {
        let _ = parse(&text, "test.toml", &env);
    }

    #[test]
    fn a_damaged_reference_is_read_or_refused(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), 0..3_u8, "[\\PC\\n]{1,6}"), 1..8)
    ) {
        let mut text: Vec<char> = REFERENCE.chars().collect();
        for (at, kind, with) in damage {
            let at = at.index(text.len());
            let end = (at + with.chars().count()).min(text.len());
            match kind {
                0 => drop(text.splice(at..at, with.chars())),
                1 => drop(text.splice(at..end, with.chars())),
                _ => drop(text.drain(at..end)),
            }
        }
        let text: String = text.into_iter().collect();
        if let Err(errors) = parse(&text, "test.toml", &env) {
            prop_assert!(errors.iter().count() > 0);
            for error in &errors {
                prop_assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
}
