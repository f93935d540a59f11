//! How connections end: by clocks, by drains, by broken answers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::BodyExt;

use super::toy::{Peer, bounds, eventually, get, h2, h2_get, start};
use crate::config::ClientClocks;
use crate::drain::Drained;
use crate::server::Bounds;

const SHORT: Duration = Duration::from_millis(200);

fn clocked(change: impl FnOnce(&mut ClientClocks)) -> Bounds {
    let mut bounds = bounds();
    change(&mut bounds.clocks);
    bounds
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_waiting_one_is_not() {
    let server = start(clocked(|clocks| clocks.idle = SHORT));
    let mut fresh = server.connect().await;
    let mut used = server.connect().await;
    let mut waiting = server.connect().await;
    used.ask("/say", "hello").await;
    waiting.send(get("/gated")).await;
    waiting.until("begun \r\n").await;
    for idle in [&mut fresh, &mut used] {
        let (got, end) = idle.rest().await;
        assert!(got.is_empty() && end.is_ok(), "{got} {end:?}");
    }
    tokio::time::sleep(SHORT).await;
    server.toy.0.gate.notify_one();
    waiting.until("ended\r\n0\r\n\r\n").await;
    waiting.rest().await.1.unwrap();
    eventually("all are gone", || server.context.clients.open() == 0).await;
    assert_eq!(server.context.alarms.len(), 0);
}

#[tokio::test]
async fn an_idle_http2_connection_is_told_and_closed() {
    let server = start(clocked(|clocks| clocks.idle = SHORT));
    let (mut sender, connection) = h2(server.connect().await.0).await;
    assert_eq!(sender.send_request(h2_get("/say")).await.unwrap().status(), 200);
    tokio::time::timeout(super::toy::PATIENCE, connection).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_dribbled_head_is_ended_by_its_clock() {
    let server = start(clocked(|clocks| clocks.head = SHORT));
    let mut fresh = server.connect().await;
    fresh.send("GET /say HTTP/1.1\r\nHo").await;
    let mut used = server.connect().await;
    used.ask("/say", "hello").await;
    used.send("G").await;
    for slow in [&mut fresh, &mut used] {
        let (got, end) = slow.rest().await;
        assert!(got.starts_with("HTTP/1.1 408 ") && end.is_ok(), "{got} {end:?}");
    }
    let mut preface = server.connect().await;
    preface.send("PRI * HT").await;
    preface.rest().await.1.unwrap();
    assert!(server.metrics().contains("client_clocks.head\"} 3"), "{}", server.metrics());
}

#[tokio::test]
async fn a_head_that_waited_behind_an_answer_has_its_whole_clock() {
    let server = start(clocked(|clocks| clocks.head = SHORT));
    let mut peer = server.connect().await;
    peer.send(format!("{}GET /say HT", get("/gated"))).await;
    peer.until("begun \r\n").await;
    tokio::time::sleep(SHORT * 2).await;
    server.toy.0.gate.notify_one();
    peer.until("ended\r\n0\r\n\r\n").await;
    peer.send("TP/1.1\r\nHost: toy\r\n\r\n").await;
    peer.until("hello").await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_and_costs_little_memory() {
    let server = start(clocked(|clocks| clocks.slow_reader = SHORT));
    let mut peer = server.connect().await;
    peer.send(get("/endless")).await;
    peer.until("x").await;
    eventually("it is cut", || server.context.clients.open() == 0).await;
    assert!(server.metrics().contains("client_clocks.slow_reader\"} 1"), "{}", server.metrics());
    // The kernel's buffers on both sides, and hyper's.
    assert!(server.toy.0.frames.load(Ordering::SeqCst) < 1000);
    let (_, end) = peer.rest().await;
    end.unwrap_err();
}

#[tokio::test]
async fn an_http2_client_that_takes_nothing_is_cut() {
    let server = start(clocked(|clocks| clocks.slow_reader = SHORT));
    // Its windows stay as they are: nobody reads the body.
    let (mut sender, _connection) = h2(server.connect().await.0).await;
    let answer = sender.send_request(h2_get("/endless")).await.unwrap();
    let mut body = answer.into_body();
    eventually("the stream is cut", || !server.context.alarms.is_empty()).await;
    tokio::time::sleep(SHORT * 2).await;
    let mut taken = 0;
    let end = tokio::time::timeout(super::toy::PATIENCE, async {
        loop {
            match body.frame().await {
                Some(Ok(frame)) => taken += frame.into_data().map_or(0, |data| data.len()),
                end => break end,
            }
        }
    });
    assert!(end.await.unwrap().unwrap().is_err());
    assert!(taken > 0);
    // The others on the connection go on.
    assert_eq!(sender.send_request(h2_get("/say")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn frames_before_a_break_are_delivered_and_the_break_is_seen() {
    let server = start(bounds());
    for _ in 0..20 {
        let mut peer = server.connect().await;
        peer.send(get("/breaks")).await;
        let (got, _) = peer.rest().await;
        assert!(got.contains("one ") && got.contains("four "), "{got}");
        assert!(!got.contains("0\r\n\r\n"), "{got}");
    }
    let mut peer = server.connect().await;
    peer.send(get("/breaks-later")).await;
    peer.until("one \r\n").await;
    server.toy.0.gate.notify_one();
    let (got, _) = peer.rest().await;
    assert!(got.contains("two ") && !got.contains("0\r\n\r\n"), "{got}");

    // Where the end of the connection is the end of the body, a break must not look like one.
    let mut old = server.connect().await;
    old.send("GET /breaks HTTP/1.0\r\n\r\n").await;
    let (_, end) = old.rest().await;
    end.unwrap_err();

    let mut old = server.connect().await;
    old.send("GET /gated HTTP/1.0\r\n\r\n").await;
    old.until("begun ").await;

    let (mut sender, _connection) = h2(server.connect().await.0).await;
    for _ in 0..20 {
        let mut body = sender.send_request(h2_get("/breaks")).await.unwrap().into_body();
        let mut got = Vec::new();
        let end = loop {
            match body.frame().await {
                Some(Ok(frame)) => got.extend(frame.into_data().unwrap()),
                end => break end,
            }
        };
        assert_eq!(String::from_utf8_lossy(&got), "one two three four ");
        assert!(end.unwrap().is_err());
    }
    server.drain.trigger();
    server.drain.drained(Duration::ZERO).await;
    old.rest().await.1.unwrap_err();
}

#[tokio::test]
async fn a_tunnel_has_no_clocks_and_ends_with_the_drain() {
    let server = start(clocked(|clocks| (clocks.idle, clocks.head) = (SHORT, SHORT)));
    let mut peers = Vec::new();
    for _ in 0..2 {
        let mut peer = server.connect().await;
        let upgrade = "GET /upgrade HTTP/1.1\r\nHost: toy\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
        peer.send(upgrade).await;
        let answer = peer.until("\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        peer.send("GET half a head").await;
        peer.until("half a head").await;
        peers.push(peer);
    }
    tokio::time::sleep(SHORT * 2).await;
    for peer in &mut peers {
        peer.send("still there").await;
        peer.until("still there").await;
    }
    drop(peers.pop());
    eventually("its place is free", || server.context.clients.open() == 1).await;
    server.drain.trigger();
    peers[0].send("draining").await;
    peers[0].until("draining").await;
    assert!(matches!(server.drain.drained(SHORT).await, Drained::Deadline { left: 1 }));
    let (got, _) = peers[0].rest().await;
    assert!(got.is_empty(), "{got}");
    eventually("all are gone", || server.context.clients.open() == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_exchange_at_once() {
    let server = start(bounds());
    let seen = &server.toy.0;
    for path in ["/hang", "/endless"] {
        let mut peer = server.connect().await;
        peer.send(get(path)).await;
        eventually("it is asked", || server.context.clients.open() == 1).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(peer);
        eventually("it is gone", || server.context.clients.open() == 0).await;
    }
    assert_eq!(seen.requests.load(Ordering::SeqCst), 2);
}

async fn begun(server: &super::toy::Server) -> Peer {
    let mut peer = server.connect().await;
    peer.send(get("/gated")).await;
    peer.until("begun \r\n").await;
    peer
}

#[tokio::test]
async fn a_drain_closes_the_idle_and_lets_the_busy_finish() {
    let server = start(bounds());
    let mut fresh = server.connect().await;
    let mut idle = server.connect().await;
    idle.ask("/say", "hello").await;
    let mut busy = begun(&server).await;
    let mut asking = server.connect().await;
    asking.ask("/say", "hello").await;
    asking.send("GET /gated HTTP/1.1\r\nHo").await;
    let (mut sender, connection) = h2(server.connect().await.0).await;
    let mut streaming = sender.send_request(h2_get("/gated")).await.unwrap().into_body();
    assert_eq!(streaming.frame().await.unwrap().unwrap().into_data().unwrap(), "begun ");

    server.drain.trigger();
    for idle in [&mut fresh, &mut idle] {
        let (got, end) = idle.rest().await;
        assert!(got.is_empty() && end.is_ok(), "{got} {end:?}");
    }
    server.accepting.await.unwrap().unwrap();
    tokio::net::TcpStream::connect(server.address).await.unwrap_err();
    asking.send("st: toy\r\n\r\n").await;
    let answer = asking.until("begun \r\n").await;
    assert!(answer.contains("connection: close"), "{answer}");
    for _ in 0..3 {
        eventually("somebody waits", || true).await;
        server.toy.0.gate.notify_waiters();
        server.toy.0.gate.notify_one();
        tokio::task::yield_now().await;
    }
    for busy in [&mut busy, &mut asking] {
        let (got, end) = busy.rest().await;
        assert!(got.ends_with("ended\r\n0\r\n\r\n") && end.is_ok(), "{got} {end:?}");
    }
    assert_eq!(streaming.frame().await.unwrap().unwrap().into_data().unwrap(), "ended");
    drop((streaming, sender));
    connection.await.unwrap().unwrap();
    assert_eq!(server.drain.drained(Duration::from_secs(5)).await, Drained::Complete);
}

#[tokio::test]
async fn what_is_left_at_the_end_of_a_drain_is_cut_visibly() {
    let server = start(bounds());
    let mut busy = begun(&server).await;
    let (mut sender, _connection) = h2(server.connect().await.0).await;
    let mut streaming = sender.send_request(h2_get("/gated")).await.unwrap().into_body();
    streaming.frame().await.unwrap().unwrap();
    server.drain.trigger();
    let drained = server.drain.drained(SHORT).await;
    assert!(matches!(drained, Drained::Deadline { left } if left >= 2), "{drained:?}");
    let (got, _) = busy.rest().await;
    assert!(!got.contains("0\r\n\r\n"), "{got}");
    assert!(streaming.frame().await.unwrap().is_err());
    eventually("all are gone", || server.context.clients.open() == 0).await;
}

#[tokio::test]
async fn a_request_already_in_the_socket_is_answered_before_the_drain_closes_it() {
    let server = start(bounds());
    let mut peers = Vec::new();
    for _ in 0..50 {
        let mut peer = server.connect().await;
        peer.ask("/say", "hello").await;
        peers.push(peer);
    }
    // Sent without letting the server run in between.
    for peer in &peers {
        assert_eq!(peer.0.try_write(get("/say").as_bytes()).unwrap(), get("/say").len());
    }
    server.drain.trigger();
    for peer in &mut peers {
        let (got, end) = peer.rest().await;
        assert!(got.ends_with("hello") && end.is_ok(), "{got:?} {end:?}");
    }
}

#[tokio::test]
async fn a_retired_listener_ends_alone() {
    let server = start(bounds());
    let mut busy = begun(&server).await;
    server.listening.retired().trigger();
    server.accepting.await.unwrap().unwrap();
    server.toy.0.gate.notify_one();
    let (got, _) = busy.rest().await;
    assert!(got.ends_with("ended\r\n0\r\n\r\n"), "{got}");
    assert!(!server.context.draining.is_draining());
    assert_eq!(server.listening.retired().drained(Duration::from_secs(5)).await, Drained::Complete);
}
