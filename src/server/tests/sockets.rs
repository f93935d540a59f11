//! Binding, accepting, and the limit of connections.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;

use super::toy::{bounds, eventually, get, start};
use crate::server::{Claim, bind};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

#[test]
fn workers_share_one_port_that_nobody_else_gets() {
    let workers = NonZeroUsize::new(3).unwrap();
    let bound = bind(ANY, workers, Claim::Fresh).unwrap();
    assert_eq!(bound.sockets.len(), 3);
    assert!(bound.sockets.iter().all(|socket| socket.local_addr().unwrap() == bound.address));
    let error = bind(bound.address, workers, Claim::Fresh).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&bound.address.to_string()), "{error}");
    let joined = bind(bound.address, workers, Claim::Join).unwrap();
    assert_eq!(joined.address, bound.address);
    drop((bound, joined));
}

#[tokio::test]
async fn clients_beyond_the_limit_wait_and_are_served_later() {
    let mut bounds = bounds();
    bounds.limits.connections_max = 2;
    let server = start(bounds.clone());
    let (mut one, mut two) = (server.connect().await, server.connect().await);
    one.ask("/say", "hello").await;
    two.ask("/say", "hello").await;
    // Connected by the kernel, not served.
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut peer = server.connect().await;
        peer.send(get("/say")).await;
        waiting.push(peer);
    }
    eventually("the limit bites", || server.metrics().contains("connections_max\"} 1")).await;
    two.ask("/say", "hello").await;
    assert_eq!(server.context.clients.open(), 2);
    drop((one, two));
    for mut peer in waiting {
        peer.until("hello").await;
    }
    // More room by a reload.
    let (mut three, mut four) = (server.connect().await, server.connect().await);
    three.ask("/say", "hello").await;
    four.ask("/say", "hello").await;
    let mut five = server.connect().await;
    five.send(get("/say")).await;
    bounds.limits.connections_max = 3;
    server.context.clients.set_bounds(bounds);
    five.until("hello").await;
}

#[tokio::test]
async fn who_waits_in_the_queue_when_the_drain_begins_is_answered() {
    let mut bounds = bounds();
    bounds.limits.connections_max = 1;
    let server = start(bounds);
    let mut one = server.connect().await;
    one.ask("/say", "hello").await;
    let mut queued = Vec::new();
    for _ in 0..20 {
        let mut peer = server.connect().await;
        peer.send(get("/say")).await;
        queued.push(peer);
    }
    server.drain.trigger();
    for mut peer in queued {
        let (got, end) = peer.rest().await;
        assert!(
            got.ends_with("hello") && got.contains("connection: close") && end.is_ok(),
            "{got:?} {end:?}"
        );
    }
    server.accepting.await.unwrap().unwrap();
}
