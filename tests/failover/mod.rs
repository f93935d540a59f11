//! A replica fails before anything was relayed: the client gets the answer of another one.

mod connect;
mod drain;
mod gate;
mod head;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, assert_is_healthy_stream, chat_request, send};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Talk};

#[tokio::test]
async fn a_healthy_pool_answers_streams_and_whole_answers() {
    let (a, b) = (Backend::healthy().await, Backend::healthy().await);
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&a.url()).backend(&b.url()));
    let mut client = Client::connect(proxy.addr).await;
    for _ in 0..3 {
        let answer = client.send(&chat_request(true)).await;
        assert_is_healthy_stream(&answer);
        let answer = client.send(&chat_request(false)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["choices"][0]["message"]["content"], Talk::default().text());
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn f01_a_refused_connection_costs_nothing_but_a_connect() {
    let (dead, alive) = (Backend::refusing().await, Backend::healthy().await);
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&dead.url()).backend(&alive.url()));
    for stream in [true, false, true, false] {
        let answer = send(proxy.addr, &chat_request(stream)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn f09_a_500_is_another_backends_chance() {
    let sick = Backend::start(Script::new().by_request(|_| reply::error(500))).await;
    let alive = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&sick.url()).backend(&alive.url()));
    for _ in 0..6 {
        let answer = send(proxy.addr, &chat_request(true)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert!(sick.requests().len() <= 3, "ejected after three faults");
    proxy.is_quiet().await;
}
