//! A replica with hundreds of open streams dies: they all go on at the one that is left, which bears it.

use std::time::Duration;

use evergate::sim::{Replica, ReplicaConfig, Skin};
use serde_json::json;
use tokio::task::JoinSet;

use crate::every_byte::{resumes, told};
use crate::support::client::{H2Client, Request};
use crate::support::either::state;
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::{PATIENCE, eventually};
use crate::view::{Fate, View, Voice};

/// Open streams of each of two replicas.
const EACH: usize = 256;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_replicas_with_256_streams_each_one_dies_and_the_other_finishes_them() {
    let config = ReplicaConfig {
        model: "m".to_owned(),
        skin: Skin::Vllm,
        tokens_per_second: 8.0,
        first_token: Duration::ZERO,
        tokens: 40,
        ..ReplicaConfig::default()
    };
    let dying = Replica::start(config.clone()).await.unwrap();
    let other = Replica::start(config.clone()).await.unwrap();
    let builder = ProxyBuilder::new()
        .backend(&dying.url())
        .backend(&other.url())
        .set("pool.probe.preset", "vllm")
        .set("pool.balance.strategy", "round_robin");
    let proxy = Proxy::start(&builder);
    proxy.probed().await;

    let clients = [H2Client::connect(proxy.addr).await, H2Client::connect(proxy.addr).await];
    let mut streams = JoinSet::new();
    for number in 0..2 * EACH {
        let (client, config) = (clients[number % 2].clone(), config.clone());
        streams.spawn(async move {
            let question = json!([{"role": "user", "content": format!("Question {number}?")}]);
            let body = json!({"model": "m", "stream": true, "messages": question});
            let answer = client.send(&Request::post_json("/v1/chat/completions", &body)).await;
            let mut view = View::of(&answer, Voice { created_is_constant: true, role_in_each: false });
            let fate = view.fate();
            let right = config.answer_to_chat(&body).unwrap();
            assert!(right.starts_with(&view.text) && view.wrong.is_empty(), "{:?}", view.wrong);
            fate == Some(Fate::Whole) && view.text == right
        });
    }
    let open = |replica: &Replica| replica.stats().in_flight as usize;
    eventually(PATIENCE, || open(&dying) == EACH && open(&other) == EACH).await;
    // All of them have begun.
    eventually(PATIENCE, || dying.stats().tokens.min(other.stats().tokens) >= 3 * EACH as u64).await;
    let begun = open(&dying);
    dying.kill().await;
    let mut whole = 0;
    while let Some(stream) = streams.join_next().await {
        whole += usize::from(stream.unwrap());
        assert_eq!(state(&proxy, other.addr()), "healthy", "who helps is not punished");
    }
    let (resumed, _) = resumes(&proxy);
    let lost = 2 * EACH - whole;
    assert!(lost * 100 <= begun, "{lost} of {begun} were lost: {}", told(&proxy));
    assert!(resumed as usize >= begun * 9 / 10, "{resumed} of {begun} were resumed: {}", told(&proxy));
    assert_ne!(state(&proxy, dying.addr()), "healthy");
    proxy.is_quiet().await;
}
