//! The operator's listener over real loopback connections.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::clock;
use crate::config::{Change, Config, Overrides, Source};
use crate::drain::Drain;
use crate::reload::Follower;
use crate::telemetry::Telemetry;

const TOML: &str = "[[pool]]\nname = \"llama\"\nbackends = [{ name = \"a\", url = \"http://127.0.0.1:1/v\" }, \
                    { name = \"b\", url = \"http://127.0.0.1:2\", weight = 3, tier = 1, in_flight_max = 8 }]\n\
                    [[pool]]\nname = \"qwen\"\nbackends = [\"http://127.0.0.1:3\"]\n";

struct Nothing;

impl Follower for Nothing {
    fn prepare(&self, _new: &Config, _changes: &[Change]) -> Result<Box<dyn FnOnce() + Send>, String> {
        Ok(Box::new(|| {}))
    }
}

struct Bench {
    _kept: tempfile::TempDir,
    file: PathBuf,
    directory: Arc<Directory>,
    /// Of the process.
    drain: Drain,
    /// Of the listener.
    stop: Drain,
    address: SocketAddr,
    served: tokio::task::JoinHandle<()>,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Bench {
    async fn new() -> Self {
        Self::with(TOML, "127.0.0.1:0", true).await
    }

    async fn with(toml: &str, listen: &str, from_file: bool) -> Self {
        let kept = tempfile::tempdir().unwrap();
        let file = kept.path().join("evergate.toml");
        fs::write(&file, toml).unwrap();
        let source = Source { path: file.clone(), flags: Overrides::default() };
        let directory =
            Arc::new(Directory::new(source.load().unwrap(), Arc::new(Telemetry::silent())).unwrap());
        let source = from_file.then_some(source);
        let reloader = Arc::new(Reloader::new(source, Arc::clone(&directory), Box::new(Nothing)));
        let (drain, stop) = (Drain::new(), Drain::new());
        let clients = ListenerStatus { address: SocketAddr::from(([127, 0, 0, 1], 8080)), tls: false };
        let state = Arc::new(AdminState {
            directory: Arc::clone(&directory),
            reloader,
            draining: drain.watch(),
            listeners: Box::new(move || vec![clients.clone()]),
            started: clock::now(),
        });
        let listener = TcpListener::bind(listen).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(serve(listener, state, stop.watch()));
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        Self { _kept: kept, file, directory, drain, stop, address, served }
    }

    async fn ask(&self, method: &str, path: &str, headers: &[&str]) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let host = self.address;
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[]).await
    }

    async fn post(&self, path: &str) -> Answer {
        self.ask("POST", path, &[]).await
    }
}

#[tokio::test]
async fn it_lives_while_draining_and_is_not_ready_then() {
    let bench = Bench::new().await;
    assert_eq!(bench.get("/live").await.status, 200);
    let ready = bench.get("/ready").await;
    assert_eq!((ready.status, &ready.json()["ready"]), (200, &Value::Bool(true)));
    assert_eq!(ready.json()["pools"][0]["members"], 2);
    bench.drain.trigger();
    assert_eq!(bench.get("/live").await.status, 200);
    let ready = bench.get("/ready").await;
    assert_eq!((ready.status, ready.json()["reason"].as_str()), (503, Some("draining")));
    assert_eq!(bench.post("/reload").await.status, 503);
}

#[tokio::test]
async fn a_pool_without_eligible_backends_is_not_ready_when_pools_are_asked_for() {
    let bench = Bench::new().await;
    assert_eq!(bench.get("/ready?pools=1").await.status, 200);
    bench.post("/backends/qwen/127.0.0.1:3/drain").await;
    assert_eq!(bench.get("/ready").await.status, 200);
    let ready = bench.get("/ready?pools=1").await;
    assert_eq!((ready.status, ready.json()["reason"].as_str()), (503, Some("no eligible backend in: qwen")));
}

#[tokio::test]
async fn metrics_are_prometheus_text() {
    let bench = Bench::new().await;
    let answer = bench.get("/metrics").await;
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    assert!(answer.body.contains("evergate_backend_eligible"), "{}", answer.body);
}

#[tokio::test]
async fn status_shows_every_backend() {
    let bench = Bench::new().await;
    let answer = bench.get("/status").await;
    assert!(answer.head.contains("cache-control: no-store"));
    let status: Status = serde_json::from_str(&answer.body).unwrap();
    assert_eq!((status.schema, status.generation, status.draining), (SCHEMA, 1, false));
    assert_eq!(status.config_file, Some(bench.file.display().to_string()));
    let llama = &status.pools[0];
    assert_eq!((llama.name.as_str(), llama.balance.as_str()), ("llama", "p2c"));
    assert_eq!((llama.eligible, llama.members, llama.panic), (2, 2, false));
    let (a, b) = (&llama.backends[0], &llama.backends[1]);
    assert_eq!((a.url.as_str(), a.admin.as_str(), a.eligible), ("http://127.0.0.1:1/v", "enabled", true));
    assert_eq!((a.health.state.as_str(), a.health.standing.as_str()), ("unknown", "eligible"));
    assert_eq!((b.weight, b.tier, b.in_flight_max), (3, 1, Some(8)));
    assert_eq!(a.attempts["success"], 0);
}

#[tokio::test]
async fn every_field_of_a_status_is_documented() {
    const DOCUMENTATION: &str = include_str!("../../docs/admin.md");
    fn undocumented(value: &Value, missing: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    if !DOCUMENTATION.contains(&format!("`{name}`")) {
                        missing.push(name.clone());
                    }
                    undocumented(value, missing);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| undocumented(value, missing)),
            _ => {}
        }
    }
    let bench = Bench::new().await;
    bench.post("/backends/llama/a/drain").await;
    fs::write(&bench.file, "wrokers = 1\n").unwrap();
    bench.post("/reload").await;
    let mut status: Status = serde_json::from_str(&bench.get("/status").await.body).unwrap();
    let backend = &mut status.pools[0].backends[0];
    backend.last_probe = Some(ProbeStatus::default());
    backend.models = vec![ModelStatus::default()];
    let mut missing = Vec::new();
    undocumented(&serde_json::to_value(&status).unwrap(), &mut missing);
    assert_eq!(missing, [] as [&str; 0]);
}

#[tokio::test]
async fn a_backend_is_drained_and_enabled_again_and_it_is_told_once() {
    let bench = Bench::new().await;
    let answer = bench.post("/backends/llama/a/drain").await;
    assert_eq!(answer.status, 200);
    assert_eq!((&answer.json()["admin"], &answer.json()["was"]), (&"draining".into(), &"enabled".into()));
    bench.post("/backends/llama/a/drain").await;
    let status: Status = serde_json::from_str(&bench.get("/status?events=1").await.body).unwrap();
    assert_eq!((status.pools[0].eligible, status.pools[0].backends[0].eligible), (1, false));
    assert_eq!(status.events.len(), 1);
    assert_eq!(
        (&status.events[0]["event"], &status.events[0]["backend"]),
        (&"admin_change".into(), &"a".into())
    );
    assert_eq!(bench.directory.telemetry().events.latest().len(), 1);
    assert_eq!(bench.post("/backends/llama/a/disable").await.json()["admin"], "disabled");
    assert_eq!(bench.post("/backends/llama/a/enable").await.json()["was"], "disabled");
    assert_eq!(bench.directory.look().pools[0].eligible(), 2);
}

#[tokio::test]
async fn what_does_not_exist_is_answered_by_what_does() {
    let bench = Bench::new().await;
    for (path, expected) in [
        ("/backends/lama/a/drain", "there is no pool \"lama\"; there is: llama, qwen"),
        ("/backends/llama/c/drain", "there is no backend \"c\"; there is: a, b"),
        ("/backends/llama/a/explode", "the actions are enable, drain, disable"),
    ] {
        let answer = bench.post(path).await;
        assert_eq!((answer.status, answer.json()["error"]["message"].as_str()), (404, Some(expected)));
    }
    let nowhere = bench.get("/nowhere").await;
    assert_eq!((nowhere.status, &nowhere.json()["error"]["paths"][3]), (404, &"GET /status".into()));
    let wrong = bench.post("/status").await;
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (405, &"method_not_allowed".into()));
    assert!(wrong.head.contains("allow: get,head"), "{}", wrong.head);
}

#[tokio::test]
async fn a_reload_is_answered_with_its_report_or_all_errors() {
    let bench = Bench::new().await;
    fs::write(&bench.file, TOML.replace("127.0.0.1:3", "127.0.0.1:4")).unwrap();
    let applied = bench.post("/reload").await;
    assert_eq!((applied.status, &applied.json()["outcome"]), (200, &"applied".into()));
    assert_eq!(applied.json()["generation"], 2);
    assert_eq!(applied.json()["changes"][1], "backend qwen/127.0.0.1:4 added");
    fs::write(&bench.file, "wrokers = 1\npol = 2\n").unwrap();
    let refused = bench.post("/reload").await;
    assert_eq!((refused.status, &refused.json()["outcome"]), (422, &"refused".into()));
    assert_eq!(refused.json()["errors"][0]["line"], 1);
    assert!(refused.json()["errors"].as_array().unwrap().len() >= 2, "{}", refused.body);
    let status: Status = serde_json::from_str(&bench.get("/status").await.body).unwrap();
    assert_eq!(status.refused_reload, Some(refused.json()));
    assert_eq!(status.last_reload, status.refused_reload);
}

#[tokio::test]
async fn without_a_file_a_reload_is_a_conflict() {
    let bench = Bench::with(TOML, "127.0.0.1:0", false).await;
    assert_eq!(bench.post("/reload").await.status, 409);
}

#[tokio::test]
async fn the_token_is_that_of_the_configuration_in_force() {
    let bench = Bench::new().await;
    let with_token = |token: &str| format!("[admin]\ntoken = \"{token}\"\n{TOML}");
    fs::write(&bench.file, with_token("one")).unwrap();
    assert_eq!(bench.post("/reload").await.status, 200);
    let refused = bench.post("/reload").await;
    assert_eq!(refused.status, 401);
    assert!(refused.head.contains("www-authenticate: bearer"), "{}", refused.head);
    fs::write(&bench.file, with_token("two")).unwrap();
    assert_eq!(bench.ask("POST", "/reload", &["authorization: Bearer one"]).await.status, 200);
    assert_eq!(bench.ask("POST", "/reload", &["authorization: Bearer one"]).await.status, 401);
    assert_eq!(bench.ask("POST", "/reload", &["authorization: Bearer two"]).await.status, 200);
    assert_eq!(bench.get("/status").await.status, 200);
}

#[tokio::test]
async fn from_elsewhere_nothing_is_changed_without_a_configured_token() {
    let bench = Bench::with(TOML, "0.0.0.0:0", true).await;
    let refused = bench.post("/backends/llama/a/drain").await;
    assert_eq!(refused.status, 403);
    assert!(refused.body.contains("set admin.token"), "{}", refused.body);
    assert_eq!(bench.directory.look().pools[0].eligible(), 2);
    assert_eq!(bench.get("/status").await.status, 200);
}

#[tokio::test]
async fn websites_and_foreign_names_are_refused() {
    let bench = Bench::new().await;
    let cross = bench.ask("POST", "/reload", &["origin: https://evil.example"]).await;
    assert_eq!((cross.status, &cross.json()["error"]["code"]), (403, &"cross_site".into()));
    let mut stream = TcpStream::connect(bench.address).await.unwrap();
    stream
        .write_all(b"GET /status HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("foreign_host"), "{answer}");
}

#[tokio::test]
async fn a_stopped_listener_ends_with_its_idle_connections() {
    let bench = Bench::new().await;
    let mut idle = TcpStream::connect(bench.address).await.unwrap();
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut some = [0; 16];
    idle.read_exact(&mut some).await.unwrap();
    bench.stop.trigger();
    tokio::time::timeout(Duration::from_secs(10), bench.served).await.unwrap().unwrap();
    assert!(TcpStream::connect(bench.address).await.is_err());
}

#[tokio::test]
async fn more_connections_than_allowed_wait_for_their_turn() {
    let bench = Bench::new().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        held.push(TcpStream::connect(bench.address).await.unwrap());
    }
    let asked = bench.get("/live");
    tokio::pin!(asked);
    let early = tokio::time::timeout(Duration::from_millis(100), asked.as_mut()).await;
    assert!(early.is_err(), "answered beyond the bound");
    held.pop();
    assert_eq!(asked.await.status, 200);
}
