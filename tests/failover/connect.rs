//! No connection stands (F01 to F04): nothing was sent, so everything may be sent elsewhere.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;

use evergate::upstream::{Addresses, Resolver};

use crate::support::backend::{Backend, NeverAccepting, Script};
use crate::support::client::{Request, chat_request, send};
use crate::support::either::{Http, assert_is_right, attempts, faults, in_order};
use crate::support::proxy::Proxy;
use crate::support::tls::{Authority, Certificate};
use crate::support::{PATIENCE, eventually, hash};

use evergate::telemetry::metrics::AttemptOutcome;

#[tokio::test]
async fn f01_a_refused_connection_is_a_fault_at_once_and_costs_no_budget() {
    for http in Http::BOTH {
        let (dead, alive) = (Backend::refusing().await, Backend::healthy().await);
        let proxy = Proxy::start(
            &in_order(&[&dead.url(), &alive.url()])
                .set("pool.retry.budget_ratio", 0.0)
                .set("pool.retry.budget_floor", 0.0),
        );
        for stream in [true, false] {
            let answer = http.send(proxy.addr, &chat_request(stream)).await;
            assert_is_right(&answer, stream);
            assert!(answer.first_byte < Duration::from_secs(1), "{:?}", answer.first_byte);
        }
        assert_eq!(faults(&proxy, &dead), 2);
        let seen = alive.requests();
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[0].body, chat_request(true).body, "the body is the client's");
        assert_eq!(seen[0].header("x-evergate-attempt"), Some("2"));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f01_what_must_not_be_sent_twice_moves_on_when_nothing_was_sent() {
    for http in Http::BOTH {
        let (dead, alive) = (Backend::refusing().await, Backend::healthy().await);
        let proxy = Proxy::start(&in_order(&[&dead.url(), &alive.url()]));
        let body = vec![b'f'; 300_000];
        let upload = Request::new("POST", "/v1/files").body(body.clone());
        let answer = http.send(proxy.addr, &upload).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["body_hash"], hash(&body));
        assert_eq!(alive.requests().len(), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f02_a_full_accept_queue_costs_one_connect_clock() {
    for http in Http::BOTH {
        let (hung, alive) = (NeverAccepting::start().await, Backend::healthy().await);
        let proxy = Proxy::start(
            &in_order(&[&hung.url(), &alive.url()])
                .set("pool.clocks.connect", "150ms")
                .set("pool.health.ejection_min", "30s"),
        );
        for _ in 0..3 {
            let answer = http.send(proxy.addr, &chat_request(true)).await;
            assert_is_right(&answer, true);
            assert!(answer.first_byte >= Duration::from_millis(150), "{:?}", answer.first_byte);
            assert!(answer.first_byte < Duration::from_secs(2), "{:?}", answer.first_byte);
        }
        assert_eq!(attempts(&proxy, hung.addr(), AttemptOutcome::Fault), 3);
        // After three faults it is left alone.
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        assert_is_right(&answer, true);
        assert!(answer.first_byte < Duration::from_millis(150), "{:?}", answer.first_byte);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f03_a_name_without_an_address_is_a_fault_and_its_peer_answers() {
    for http in Http::BOTH {
        let alive = Backend::healthy().await;
        let nowhere = "http://replica-7.does-not-exist.invalid:8000";
        let proxy = Proxy::start(&in_order(&[nowhere, &alive.url()]));
        for stream in [true, false] {
            assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
        }
        assert_eq!(alive.requests().len(), 2);
        let snapshot = proxy.running.directory().snapshot();
        let (_, member) = snapshot.members().next().unwrap();
        assert_eq!(member.backend.metrics.attempts(AttemptOutcome::Fault), 2);
        proxy.is_quiet().await;
    }
}

/// A name server that knows one name until it is told to forget it.
async fn name_server(answers: tokio::sync::watch::Receiver<Option<Ipv4Addr>>) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            let question_end = 12 + query[12..length].iter().position(|byte| *byte == 0).unwrap() + 5;
            let is_a = query[question_end - 4..question_end - 2] == [0, 1];
            let known = *answers.borrow();
            let mut reply = query[..question_end].to_vec();
            // A response, recursion available; NXDOMAIN for an unknown name (RFC 1035 §4.1.1).
            reply[2] = 0x81;
            reply[3] = if known.is_some() { 0x80 } else { 0x83 };
            reply[4..12].copy_from_slice(&[0, 1, 0, u8::from(known.is_some() && is_a), 0, 0, 0, 0]);
            if let (Some(ip), true) = (known, is_a) {
                // The name by pointer, type A, class IN, TTL 0.
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
                reply.extend(ip.octets());
            }
            let _ = socket.send_to(&reply, from).await;
        }
    });
    address
}

#[tokio::test]
async fn f03_the_last_good_addresses_are_kept_and_marked_stale() {
    let (tell, told) = tokio::sync::watch::channel(Some(Ipv4Addr::LOCALHOST));
    let resolver = Resolver::asking(name_server(told).await);
    let addresses = Addresses::new("replica.test", 8000);
    addresses.refresh(&resolver).await.unwrap();
    let good = SocketAddr::from((Ipv4Addr::LOCALHOST, 8000));
    assert_eq!(*addresses.known(), [good]);
    tell.send(None).unwrap();
    assert!(addresses.refresh(&resolver).await.is_err());
    assert!(addresses.is_stale());
    assert_eq!(*addresses.resolved().await.unwrap().0, [good]);
    tell.send(Some(Ipv4Addr::new(127, 0, 0, 2))).unwrap();
    addresses.refresh(&resolver).await.unwrap();
    assert!(!addresses.is_stale());
    assert_eq!(*addresses.known(), [SocketAddr::from(([127, 0, 0, 2], 8000))]);
}

#[tokio::test]
async fn f04_a_certificate_that_must_not_be_believed_is_a_fault() {
    let authority = Authority::new();
    let ca = authority.ca_path().to_str().unwrap().to_owned();
    for http in Http::BOTH {
        for wrong in [
            Certificate::Expired,
            Certificate::NotYetValid,
            Certificate::WrongName,
            Certificate::UnknownIssuer,
        ] {
            let sick = Backend::start_tls(Script::new(), &authority.server(wrong, &["http/1.1"])).await;
            let good = authority.server(Certificate::Good, &["http/1.1"]);
            let alive = Backend::start_tls(Script::new(), &good).await;
            let proxy = Proxy::start(&in_order(&[&sick.url(), &alive.url()]).set("pool.tls.ca", ca.clone()));
            for stream in [true, false] {
                assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
            }
            assert_eq!(faults(&proxy, &sick), 2, "{wrong:?}");
            assert_eq!(sick.all_requests().len(), 0, "nothing was said to {wrong:?}");
            assert_eq!(alive.requests().len(), 2);
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn f04_a_port_that_does_not_speak_tls_is_a_fault() {
    let authority = Authority::new();
    let ca = authority.ca_path().to_str().unwrap().to_owned();
    let plain = Backend::healthy().await;
    let alive = Backend::start_tls(Script::new(), &authority.server(Certificate::Good, &[])).await;
    let url = format!("https://{}", plain.addr());
    let proxy = Proxy::start(
        &in_order(&[&url, &alive.url()])
            .set("pool.tls.ca", ca)
            .set("pool.clocks.connect", "300ms")
            .set("pool.clocks.connect_tls", "300ms"),
    );
    assert_is_right(&send(proxy.addr, &chat_request(true)).await, true);
    assert_eq!(faults(&proxy, &plain), 1);
    eventually(PATIENCE, || plain.open_connections() == 0).await;
    proxy.is_quiet().await;
}
