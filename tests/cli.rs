//! The binary as a person meets it: help, error texts, exit codes.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::process::{Command, Output};

fn evergate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_evergate"))
        .args(arguments)
        .env_remove("EVERGATE_ADMIN")
        .output()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn file(text: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("evergate.toml");
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    (directory, path)
}

const GOOD: &str = "[[pool]]\nbackends = [\"http://10.0.0.1:8000\"]\n";

#[test]
fn help_teaches_by_example() {
    let help = evergate(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for word in ["run", "check", "status", "demo", "evergate run --backend http://"] {
        assert!(out(&help).contains(word), "{word} in {}", out(&help));
    }
    for (command, words) in [
        ("run", &["--config <FILE>", "--listen <ADDR>", "--access-log <WHERE>", "SIGHUP", "Examples:"][..]),
        ("check", &["-q, --quiet", "[FILE]", "Exit code"]),
        ("status", &["--ready", "--watch", "EVERGATE_ADMIN", "NO_COLOR"]),
        ("demo", &["--for <TIME>", "--once", "--plain", "[default: a free port"]),
    ] {
        let help = evergate(&[command, "--help"]);
        for word in words {
            assert!(out(&help).contains(word), "{word} in {}", out(&help));
        }
    }
    let version = evergate(&["--version"]);
    assert_eq!(out(&version), format!("evergate {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_command_line_is_told_with_exit_code_2() {
    for (arguments, expected) in [
        (&["run"][..], "nothing to proxy to"),
        (&["run", "-c", "a.toml", "--backend", "http://a:1"], "cannot be used with"),
        (&["run", "--backend", "http://a:1", "--listen", "8080"], "write an IP address and a port"),
        (&["run", "--backend", "http://a:1", "--workers", "0"], "write a number from 1 to 1024"),
        (&["check"], "required"),
        (&["demo", "--for", "30"], "write a number with a unit"),
        (&["fly"], "unrecognized subcommand"),
        (&[], "Usage:"),
    ] {
        let output = evergate(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(err(&output).contains(expected), "{arguments:?}: {}", err(&output));
        assert_eq!(out(&output), "", "{arguments:?}");
    }
}

#[test]
fn check_prints_the_effective_configuration_and_it_checks_again() {
    let (_kept, path) = file(GOOD);
    for arguments in [&["check", &path][..], &["check", "-c", &path]] {
        let output = evergate(arguments);
        assert_eq!((output.status.code(), err(&output).as_str()), (Some(0), ""));
        assert!(out(&output).contains("url = \"http://10.0.0.1:8000\""), "{}", out(&output));
        let (_kept, again) = file(&out(&output));
        assert_eq!(out(&evergate(&["check", &again])), out(&output));
    }
    let quiet = evergate(&["check", "--quiet", &path]);
    assert_eq!((quiet.status.code(), out(&quiet).as_str()), (Some(0), ""));
}

#[test]
fn check_names_every_mistake_and_exits_1() {
    let (_kept, path) = file("wrokers = 1\n[[pool]]\nbackends = [\"ftp://a\"]\n");
    let output = evergate(&["check", &path]);
    assert_eq!((output.status.code(), out(&output).as_str()), (Some(1), ""));
    let text = err(&output);
    assert!(text.contains(":1: wrokers: ") && text.contains(":3: pool[0].backends[0]"), "{text}");
    assert!(text.contains(&format!("2 errors in {path}")), "{text}");
}

#[test]
fn check_looks_into_the_files_that_are_named() {
    let (kept, path) = file("");
    let pem = kept.path().join("cert.pem").display().to_string();
    let tls = format!(
        "[[listener]]\naddress = \"127.0.0.1:1\"\ntls = {{ certificate = \"{pem}\", key = \"{pem}\" }}\n"
    );
    std::fs::write(&path, format!("{tls}{GOOD}")).unwrap();
    let output = evergate(&["check", &path]);
    assert_eq!(output.status.code(), Some(1));
    let text = err(&output);
    assert!(text.contains("listener[0].tls.certificate: cannot be read"), "{text}");
    assert!(text.contains("2 errors in the files it names"), "{text}");
}

#[test]
fn a_file_that_is_not_there_is_one_clear_error() {
    for arguments in [&["check", "not-there.toml"][..], &["run", "-c", "not-there.toml"]] {
        let output = evergate(arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(err(&output).starts_with("not-there.toml: cannot be read: No such file"), "{}", err(&output));
    }
}

#[test]
fn nobody_at_the_admin_address_is_one_line() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    for arguments in [&["status", "--admin", &address][..], &["status", "--ready", "--admin", &address]] {
        let output = evergate(arguments);
        assert_eq!((output.status.code(), out(&output).as_str()), (Some(1), ""));
        let text = err(&output);
        assert!(text.starts_with(&format!("evergate does not answer at {address}: ")), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

/// Answers one connection with `status` and `body`; says what was asked.
fn answering(status: &'static str, body: &'static str) -> (String, std::thread::JoinHandle<String>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.extend(byte);
        }
        let length = body.len();
        write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
        String::from_utf8(head).unwrap().lines().next().unwrap().to_owned()
    });
    (address, asked)
}

#[test]
fn ready_is_silent_unless_failing() {
    let (address, asked) = answering("200 OK", r#"{"ready":true}"#);
    let output = evergate(&["status", "--ready", "--admin", &address]);
    assert_eq!((output.status.code(), out(&output), err(&output)), (Some(0), String::new(), String::new()));
    assert_eq!(asked.join().unwrap(), "GET /ready HTTP/1.1");
    let (address, asked) = answering("503 Service Unavailable", r#"{"ready":false,"reason":"draining"}"#);
    let output = evergate(&["status", "--ready", "--pools", "--admin", &address]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("is not ready (503 Service Unavailable): draining"), "{}", err(&output));
    assert_eq!(asked.join().unwrap(), "GET /ready?pools=1 HTTP/1.1");
}

#[test]
fn status_takes_the_admin_address_from_the_file_and_uses_no_colours_in_a_pipe() {
    let body = r#"{"version":"9.9.9","listeners":[],"pools":[{"name":"llama","members":1,"eligible":0}]}"#;
    let (address, asked) = answering("200 OK", body);
    let (_kept, path) = file(&format!("[admin]\naddress = \"{address}\"\n{GOOD}"));
    let output = evergate(&["status", "-c", &path]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains("evergate 9.9.9") && out(&output).contains("0 of 1 eligible"));
    assert!(!out(&output).contains('\x1b'));
    asked.join().unwrap();
    let (address, asked) = answering("200 OK", body);
    assert_eq!(out(&evergate(&["status", "--json", "--admin", &address])), format!("{body}\n"));
    asked.join().unwrap();
}
