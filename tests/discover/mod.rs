//! Names of backends against a name server of the test's own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use evergate::discover;
use evergate::drain::Drain;
use evergate::pool::{Backend as Record, Directory};
use evergate::telemetry::Telemetry;
use evergate::upstream::{ConnectFailure, OutBody, OutHead, Resolver, Want};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method};
use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use crate::support::backend::{Backend, NeverAccepting};
use crate::support::proxy::ProxyBuilder;
use crate::support::{PATIENCE, eventually, within};

const A: u16 = 1;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

/// What the name server says of every name.
#[derive(Clone)]
enum Says {
    Addresses(Vec<Ipv4Addr>),
    Error(u8),
}

/// A name server on loopback: one question a datagram (RFC 1035 §4), every name alike, TTL zero.
struct NameServer {
    address: SocketAddr,
    says: Arc<Mutex<Says>>,
    asked: Arc<AtomicUsize>,
    server: JoinHandle<()>,
}

impl NameServer {
    async fn start(says: Says) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let says = Arc::new(Mutex::new(says));
        let asked = Arc::new(AtomicUsize::new(0));
        let (sayings, count) = (says.clone(), asked.clone());
        let server = tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                count.fetch_add(1, SeqCst);
                let answer = answer(&buffer[..length], &sayings.lock().clone());
                let _ = socket.send_to(&answer, peer).await;
            }
        });
        Self { address, says, asked, server }
    }

    fn say(&self, says: Says) {
        *self.says.lock() = says;
    }

    fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn answer(query: &[u8], says: &Says) -> Vec<u8> {
    let name_end = 12 + query[12..].iter().position(|&byte| byte == 0).unwrap() + 1;
    let question = &query[12..name_end + 4];
    let wanted = u16::from_be_bytes([query[name_end], query[name_end + 1]]);
    let (code, addresses) = match says {
        Says::Addresses(addresses) if wanted == A => (0, addresses.clone()),
        Says::Addresses(_) => (0, Vec::new()),
        Says::Error(code) => (*code, Vec::new()),
    };
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0]);
    answer.extend(question);
    for address in addresses {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        answer.extend(address.octets());
    }
    answer
}

struct Discovering {
    directory: Arc<Directory>,
    drain: Drain,
    task: JoinHandle<()>,
}

impl Discovering {
    fn start(builder: &ProxyBuilder, resolver: Resolver) -> Self {
        let telemetry = Arc::new(Telemetry::silent());
        let directory = Arc::new(Directory::new(builder.build_config(), telemetry).unwrap());
        let drain = Drain::new();
        let task = tokio::spawn(discover::run(directory.clone(), Arc::new(resolver), drain.watch()));
        Self { directory, drain, task }
    }

    fn backend(&self) -> Arc<Record> {
        self.directory.snapshot().pools[0].members[0].backend.clone()
    }

    fn tasks(&self) -> i64 {
        self.directory.telemetry().metrics.backend_tasks(discover::TASK).get()
    }

    async fn stands_for(&self, addresses: &[&str]) {
        let wanted: Vec<SocketAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let backend = self.backend();
        eventually(PATIENCE, || *backend.addresses.known() == wanted).await;
    }

    fn events(&self) -> Vec<(&'static str, String)> {
        let events = self.directory.telemetry().events.latest();
        events.iter().map(|event| (event.event, event.text.clone())).collect()
    }
}

impl Drop for Discovering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn quick() -> ProxyBuilder {
    ProxyBuilder::new().set("pool.clocks.dns_min", "20ms")
}

fn at(last: &[u8]) -> Says {
    Says::Addresses(last.iter().map(|&last| Ipv4Addr::new(127, 0, 0, last)).collect())
}

#[tokio::test]
async fn a_name_is_looked_up_again_and_its_change_told_once() {
    let names = NameServer::start(at(&[2, 1])).await;
    let resolver = Resolver::asking(names.address);
    let discovering = Discovering::start(&quick().backend("http://replica.test:9000"), resolver);
    discovering.stands_for(&["127.0.0.1:9000", "127.0.0.2:9000"]).await;
    let asked = names.asked();
    eventually(PATIENCE, || names.asked() > asked + 4).await;
    assert!(discovering.events().is_empty(), "the same answer is no change: {:?}", discovering.events());

    names.say(at(&[1, 3]));
    discovering.stands_for(&["127.0.0.1:9000", "127.0.0.3:9000"]).await;
    eventually(PATIENCE, || !discovering.events().is_empty()).await;
    let asked = names.asked();
    eventually(PATIENCE, || names.asked() > asked + 4).await;
    let text = "its name now stands for [127.0.0.1:9000, 127.0.0.3:9000]".to_owned();
    assert_eq!(discovering.events(), [("addresses_changed", text)]);
}

#[tokio::test]
async fn a_failing_name_service_takes_nothing_away() {
    let names = NameServer::start(at(&[1])).await;
    let resolver = Resolver::asking(names.address);
    let discovering = Discovering::start(&quick().backend("http://replica.test:9000"), resolver);
    discovering.stands_for(&["127.0.0.1:9000"]).await;
    let addresses = discovering.backend().addresses.clone();
    for says in [Says::Error(SERVFAIL), Says::Error(NXDOMAIN), at(&[])] {
        names.say(says);
        eventually(PATIENCE, || addresses.is_stale()).await;
        assert_eq!(addresses.known().len(), 1);
        names.say(at(&[1]));
        eventually(PATIENCE, || !addresses.is_stale()).await;
    }
    eventually(PATIENCE, || discovering.events().len() == 6).await;
    let events: Vec<_> = discovering.events().iter().map(|(event, _)| *event).collect();
    assert_eq!(events, ["lookup_failed", "lookup_recovered"].repeat(3));
    assert!(discovering.events()[0].1.contains("stay in use"), "{:?}", discovering.events());
}

#[tokio::test]
async fn a_name_that_never_was_is_found_when_it_appears() {
    let names = NameServer::start(Says::Error(NXDOMAIN)).await;
    let resolver = Resolver::asking(names.address);
    let discovering = Discovering::start(&quick().backend("http://replica.test:9000"), resolver);
    let addresses = discovering.backend().addresses.clone();
    let failure = within(PATIENCE, addresses.resolved()).await.unwrap_err();
    assert!(failure.to_string().contains("replica.test"), "{failure}");
    eventually(PATIENCE, || discovering.events().iter().any(|(_, text)| text.contains("it has no address")))
        .await;
    names.say(at(&[1]));
    discovering.stands_for(&["127.0.0.1:9000"]).await;
    assert!(addresses.resolved().await.is_ok());
}

#[tokio::test]
async fn connections_are_closed_when_their_address_is_gone_and_only_then() {
    let backend = Backend::healthy().await;
    let names = NameServer::start(at(&[1])).await;
    let url = format!("http://replica.test:{}", backend.addr().port());
    let discovering = Discovering::start(&quick().backend(&url), Resolver::asking(names.address));
    let snapshot = discovering.directory.snapshot();
    let member = &snapshot.pools[0].members[0];
    let lane = member.backend.lane(0);
    let headers = HeaderMap::new();
    let path = PathAndQuery::from_static("/health");
    let request = OutHead { method: &Method::GET, path, headers: &headers, own: &[], also: &[] };

    let kept = lane.lease(&member.target, Want::Any).await.unwrap();
    let busy = lane.lease(&member.target, Want::Fresh).await.unwrap();
    let mut answer = busy.send(&member.target, &request, OutBody::Empty).await.unwrap();
    kept.give_back();
    assert_eq!(lane.idle(), 1);

    let known = member.backend.addresses.clone();
    names.say(at(&[1, 2]));
    eventually(PATIENCE, || known.known().len() == 2).await;
    let asked = names.asked();
    eventually(PATIENCE, || names.asked() > asked + 2).await;
    assert_eq!(lane.idle(), 1, "an address that joined closes nothing");

    names.say(at(&[2]));
    eventually(PATIENCE, || lane.idle() == 0).await;
    // The one in use serves its exchange to the end and is not kept for another.
    while let Some(frame) = answer.body.frame().await {
        frame.unwrap();
    }
    assert_eq!(lane.idle(), 0);
}

#[tokio::test]
async fn one_dead_address_of_a_name_does_not_hold_up_the_others() {
    let backend = Backend::healthy().await;
    let port = backend.addr().port();
    let swallowing = NeverAccepting::at(SocketAddr::from(([127, 0, 0, 2], port))).await;
    // Nobody listens at the third: refused at once.
    let names = NameServer::start(at(&[1, 2, 3])).await;
    let pool = quick().backend(&format!("http://replica.test:{port}")).set("pool.clocks.connect", "3s");
    let discovering = Discovering::start(&pool, Resolver::asking(names.address));
    let snapshot = discovering.directory.snapshot();
    let member = &snapshot.pools[0].members[0];
    // Each is the first to be tried once.
    for _ in 0..3 {
        let begin = Instant::now();
        member.backend.lane(0).lease(&member.target, Want::Fresh).await.unwrap();
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    }
    drop(swallowing);
    backend.stop().await;
    let failure = member.backend.lane(0).lease(&member.target, Want::Fresh).await.err().unwrap();
    assert_eq!(failure.failure, ConnectFailure::Refused, "{failure}");
}

#[tokio::test]
async fn look_ups_follow_the_backends_and_leave_numbers_alone() {
    let names = NameServer::start(at(&[1])).await;
    let resolver = Resolver::asking(names.address);
    let pool = || quick().backend("http://127.0.0.1:9000");
    let discovering = Discovering::start(
        &pool().backend("http://replica.test:9000").backend("http://[::1]:9000"),
        resolver,
    );
    eventually(PATIENCE, || names.asked() > 0 && discovering.tasks() == 1).await;

    discovering.directory.apply(pool().build_config()).unwrap();
    eventually(PATIENCE, || discovering.tasks() == 0).await;
    let both = pool().backend("http://a.test:9000").backend("http://b.test:9000");
    discovering.directory.apply(both.build_config()).unwrap();
    eventually(PATIENCE, || discovering.tasks() == 2).await;
    discovering.drain.trigger();
    discovering.drain.drained(PATIENCE).await;
    eventually(PATIENCE, || discovering.tasks() == 0).await;
}

#[tokio::test]
async fn localhost_is_known_to_every_machine() {
    let discovering = Discovering::start(&quick().backend("http://localhost:9000"), Resolver::system());
    let addresses = discovering.backend().addresses.clone();
    let (known, _) = within(PATIENCE, addresses.resolved()).await.unwrap();
    assert!(known.iter().all(|address| address.ip().is_loopback()), "{known:?}");
    assert!(known.contains(&SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9000)), "{known:?}");
}
