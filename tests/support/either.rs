//! Scenarios that must look the same over HTTP/1.1 and HTTP/2, and the pools they are played in.

use std::net::SocketAddr;
use std::time::Duration;

use evergate::telemetry::metrics::AttemptOutcome;
use toml::Value;

use super::backend::Backend;
use super::client::{Answer, Client, H2Client, Request, assert_is_healthy_stream};
use super::proxy::{Proxy, ProxyBuilder};
use super::reply::Talk;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http {
    One,
    Two,
}

impl Http {
    pub const BOTH: [Self; 2] = [Self::One, Self::Two];

    /// One request on a connection of its own.
    pub async fn send(self, address: SocketAddr, request: &Request) -> Answer {
        // Shown when the test fails.
        eprintln!("{} {} over HTTP {self:?}", request.method, request.target);
        self.connect(address).await.send(request).await
    }

    pub async fn connect(self, address: SocketAddr) -> Either {
        match self {
            Self::One => Either::One(Client::connect(address).await),
            Self::Two => Either::Two(H2Client::connect(address).await),
        }
    }

    /// Sends a request in the background and leaves as soon as the task is aborted: the connection of
    /// HTTP/1.1 closes, the stream of HTTP/2 is reset.
    pub fn send_and_leave(self, address: SocketAddr, request: &Request) -> tokio::task::JoinHandle<()> {
        let request = request.clone();
        tokio::spawn(async move {
            let mut client = self.connect(address).await;
            client.send(&request).await;
        })
    }
}

/// A client of either kind.
pub enum Either {
    One(Client),
    Two(H2Client),
}

impl Either {
    pub async fn send(&mut self, request: &Request) -> Answer {
        match self {
            Self::One(client) => client.send(request).await,
            Self::Two(client) => client.send(request).await,
        }
    }
}

/// A pool without probes whose backends are asked strictly one after another: each is a tier of its own.
pub fn in_order(urls: &[&str]) -> ProxyBuilder {
    let builder = ProxyBuilder::new().set("pool.probe.kind", "off");
    urls.iter()
        .zip(0_i64..)
        .fold(builder, |builder, (url, tier)| builder.backend_with(url, &[("tier", Value::from(tier))]))
}

/// Panics unless the answer is, byte for byte, the stream every healthy scripted backend gives to
/// [`chat_request`](super::client::chat_request).
#[track_caller]
pub fn assert_is_the_stream(answer: &Answer) {
    assert_is_healthy_stream(answer);
    assert_eq!(answer.text(), Talk::default().chat_events(true).concat());
}

/// Panics unless the answer is the whole chat every healthy scripted backend gives.
#[track_caller]
pub fn assert_is_the_chat(answer: &Answer) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["choices"][0]["message"]["content"], Talk::default().text());
}

/// Panics unless it is the right one of the two above.
#[track_caller]
pub fn assert_is_right(answer: &Answer, stream: bool) {
    if stream { assert_is_the_stream(answer) } else { assert_is_the_chat(answer) }
}

/// How many attempts ended so there.
pub fn attempts(proxy: &Proxy, backend: SocketAddr, outcome: AttemptOutcome) -> u64 {
    proxy.backend(backend).metrics.attempts(outcome)
}

/// Faults counted there.
pub fn faults(proxy: &Proxy, backend: &Backend) -> u64 {
    attempts(proxy, backend.addr(), AttemptOutcome::Fault)
}

/// State of a backend, as its judge names it.
pub fn state(proxy: &Proxy, backend: SocketAddr) -> &'static str {
    proxy.backend(backend).whole().read(|health| health.operational().name())
}

/// A connection that was given up is closed within this, on a busy machine.
pub const AT_ONCE: Duration = Duration::from_millis(if cfg!(debug_assertions) { 500 } else { 100 });
