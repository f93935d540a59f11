//! A running evergate follows its file: listeners, certificates and backends come and go, and clients do not notice.

mod storm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use evergate::config::Source;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, Request, assert_is_healthy_stream, chat_request, send};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::Talk;
use crate::support::tls::{Authority, Certificate};
use crate::support::{PATIENCE, ReservedPort, eventually, within};

/// A configuration file that is replaced as a whole.
struct File {
    directory: TempDir,
}

impl File {
    fn new(text: &str) -> Self {
        let file = Self { directory: tempfile::tempdir().unwrap() };
        file.write(text);
        file
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("evergate.toml")
    }

    fn write(&self, text: &str) {
        replace(&self.path(), text);
    }

    /// evergate by what the file says now, following it.
    fn start(&self) -> Proxy {
        let text = std::fs::read_to_string(self.path()).unwrap();
        Proxy::start_toml(&text, Some(Source { path: self.path(), ..Source::default() }))
    }
}

fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(beside, path).unwrap();
}

fn generation(proxy: &Proxy) -> u64 {
    proxy.running.directory().look().generation
}

async fn reaches(proxy: &Proxy, generation_wanted: u64) {
    eventually(PATIENCE, || generation(proxy) >= generation_wanted).await;
}

/// A listener at `address` beside those of `builder`.
fn listening(builder: &ProxyBuilder, addresses: &[String]) -> String {
    let mut top: toml::Table = builder.build_toml().parse().unwrap();
    let listener =
        |address: &String| toml::Table::from_iter([("address".to_owned(), address.clone().into())]);
    let listeners = addresses.iter().map(|address| listener(address).into()).collect();
    top.insert("listener".to_owned(), toml::Value::Array(listeners));
    top.to_string()
}

#[tokio::test]
async fn a_listener_comes_and_goes_while_its_connections_run() {
    let backend = Backend::start(Script::new().talk(Talk::of(20).gap(Duration::from_millis(50)))).await;
    let builder = ProxyBuilder::new().backend(&backend.url());
    let (one, two) = (ReservedPort::new(), ReservedPort::new());
    let (first, second) = (one.addr().to_string(), two.addr().to_string());
    let file = File::new(&listening(&builder, std::slice::from_ref(&first)));
    let proxy = file.start();
    let mut idle = Client::connect(one.addr()).await;
    assert_eq!(idle.send(&Request::get("/v1/files")).await.status, 200);

    file.write(&listening(&builder, &[first, second.clone()]));
    eventually(PATIENCE, || proxy.running.addresses() == [one.addr(), two.addr()]).await;
    assert_eq!(send(two.addr(), &Request::get("/v1/files")).await.status, 200);
    let mut stream = Client::connect(one.addr()).await;
    stream.write(&chat_request(true).to_bytes()).await.unwrap();
    backend.has_seen(3).await;

    file.write(&listening(&builder, &[second]));
    eventually(PATIENCE, || proxy.running.addresses() == [two.addr()]).await;
    eventually(PATIENCE, || std::net::TcpStream::connect(one.addr()).is_err()).await;
    assert!(idle.is_closed_within(PATIENCE).await);
    let answer = within(PATIENCE, stream.try_read_answer("POST")).await.unwrap();
    assert_is_healthy_stream(&answer);
    assert!(stream.is_closed_within(PATIENCE).await);
    assert_eq!(send(two.addr(), &Request::get("/v1/files")).await.status, 200);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_listener_that_cannot_be_opened_changes_nothing() {
    let backend = Backend::healthy().await;
    let builder = ProxyBuilder::new().backend(&backend.url());
    let (one, taken) = (ReservedPort::new(), ReservedPort::new());
    let _occupied = taken.listen(1);
    let file = File::new(&listening(&builder, &[one.addr().to_string()]));
    let proxy = file.start();
    let both = [one.addr().to_string(), taken.addr().to_string()];
    file.write(&listening(&builder.set("limits.headers_max", 77), &both));
    let failures = &proxy.telemetry.metrics.config_reload_failures;
    eventually(PATIENCE, || failures.get() > 0).await;
    assert_eq!((generation(&proxy), proxy.running.addresses()), (1, vec![one.addr()]));
    assert_ne!(proxy.running.directory().look().config.limits.headers_max, 77);
    assert_eq!(send(one.addr(), &Request::get("/v1/files")).await.status, 200);
    assert!(TcpStream::connect(taken.addr()).await.is_ok(), "whoever had it still has it");
}

#[tokio::test]
async fn a_wrong_file_is_refused_and_a_right_one_applied_after_it() {
    let (a, b) = (Backend::healthy().await, Backend::healthy().await);
    let text = |backend: &Backend| ProxyBuilder::new().backend(&backend.url()).build_toml();
    let file = File::new(&text(&a));
    let proxy = file.start();
    file.write("[[pool]]\nbackends = [\"http://a:1\"]\nbackend = 7\n");
    let metrics = &proxy.telemetry.metrics;
    eventually(PATIENCE, || metrics.config_reload_failures.get() == 1).await;
    assert!(metrics.config_errors.get() > 0);
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
    file.write(&text(&b));
    reaches(&proxy, 2).await;
    eventually(PATIENCE, || metrics.config_errors.get() == 0).await;
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
    assert_eq!((a.requests().len(), b.requests().len()), (1, 1));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_stream_on_a_removed_backend_goes_on_to_its_end() {
    let leaving = Backend::start(Script::new().talk(Talk::of(20).gap(Duration::from_millis(60)))).await;
    let staying = Backend::healthy().await;
    let text = |backend: &Backend| ProxyBuilder::new().backend(&backend.url()).build_toml();
    let file = File::new(&text(&leaving));
    let proxy = file.start();
    let mut client = Client::connect(proxy.addr).await;
    client.write(&chat_request(true).to_bytes()).await.unwrap();
    leaving.has_seen(1).await;
    file.write(&text(&staying));
    reaches(&proxy, 2).await;
    assert_eq!(send(proxy.addr, &chat_request(false)).await.status, 200);
    let answer = within(PATIENCE, client.try_read_answer("POST")).await.unwrap();
    assert_eq!(assert_is_healthy_stream(&answer).text, Talk::of(20).text());
    assert_eq!((leaving.requests().len(), staying.requests().len()), (1, 1));
    eventually(PATIENCE, || leaving.open_connections() == 0).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_to_the_next_client() {
    let backend = Backend::healthy().await;
    let (before, after) = (Authority::new(), Authority::new());
    let (old, new) = (before.server(Certificate::Good, &[]), after.server(Certificate::Good, &[]));
    let file = File::new("");
    let path = |name: &str| file.directory.path().join(name);
    let install = |from: &crate::support::tls::ServerTls| {
        replace(&path("crt.pem"), &std::fs::read_to_string(from.certificate_path()).unwrap());
        replace(&path("key.pem"), &std::fs::read_to_string(from.key_path()).unwrap());
    };
    install(&old);
    let builder = ProxyBuilder::new()
        .backend(&backend.url())
        .set("listener.tls.certificate", path("crt.pem").to_str().unwrap())
        .set("listener.tls.key", path("key.pem").to_str().unwrap());
    file.write(&builder.build_toml());
    let proxy = file.start();
    let connect = async |authority: &Authority| Client::connect_tls(proxy.addr, authority.client(&[])).await;
    let mut early = connect(&before).await.unwrap();
    assert_eq!(early.send(&chat_request(false)).await.status, 200);
    assert!(connect(&after).await.is_err());

    // Half of a renewal is no certificate: it is told and changes nothing.
    replace(&path("key.pem"), "");
    file.write(&builder.build_toml());
    let metrics = &proxy.telemetry.metrics;
    eventually(PATIENCE, || metrics.config_reload_failures.get() > 0).await;
    assert!(connect(&before).await.is_ok());

    install(&new);
    file.write(&builder.build_toml());
    reaches(&proxy, 2).await;
    // In force is first what chooses backends, then what takes clients.
    let renewed = async {
        loop {
            match connect(&after).await {
                Ok(client) => return client,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let mut late = within(PATIENCE, renewed).await;
    assert_eq!(late.send(&chat_request(false)).await.status, 200);
    assert!(connect(&before).await.is_err());
    // A connection that stands is not disturbed.
    assert_eq!(early.send(&chat_request(true)).await.status, 200);
    proxy.is_quiet().await;
}
