//! The lean connection against a backend that says and reads exactly which bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use prometheus::IntGauge;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{Addresses, Answer, Lane, OutBody, OutHead, SendError, SendFailure, Target, Want};
use crate::config::{BackendClocks, UpstreamHttp};

/// How long anything here may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(10);
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";

struct Replica {
    listener: TcpListener,
    target: Target,
    open: IntGauge,
    lost: Arc<AtomicUsize>,
    lane: Arc<Lane>,
}

impl Replica {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (open, lost) = (IntGauge::new("open", "open").unwrap(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&lost);
        let target = Target::new(
            Arc::new(Addresses::new("127.0.0.1", port)),
            format!("127.0.0.1:{port}").parse().unwrap(),
            None,
            UpstreamHttp::Auto,
            &BackendClocks::default(),
            open.clone(),
            Arc::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        );
        Self { listener, target, open, lost, lane: Arc::default() }
    }

    async fn accept(&self) -> TcpStream {
        self.listener.accept().await.unwrap().0
    }

    async fn ask(&self, want: Want, body: &Bytes) -> Result<Answer, SendError> {
        let headers = HeaderMap::new();
        let path = PathAndQuery::from_static("/v1/completions");
        let head = OutHead { method: &Method::POST, path, headers: &headers, own: &[], also: &[] };
        let lease = self.lane.lease(&self.target, want).await.unwrap();
        lease.send(&self.target, &head, OutBody::Whole(Some(body.clone()))).await
    }

    /// Asks and reads the answer to its end, while `replica` plays its side of the first connection.
    async fn talk<T>(
        &self,
        body: &Bytes,
        replica: impl AsyncFnOnce(TcpStream) -> T,
    ) -> (Result<Vec<u8>, SendFailure>, T) {
        let client = async {
            let mut answer = self.ask(Want::Any, body).await.map_err(|e| e.failure)?;
            assert_eq!(answer.head.status, StatusCode::OK);
            let mut whole = Vec::new();
            while let Some(frame) = answer.body.frame().await {
                whole.extend(frame.map_err(|e| e.failure)?.into_data().unwrap());
            }
            Ok(whole)
        };
        let both = async { tokio::join!(client, async { replica(self.accept().await).await }) };
        timeout(PATIENCE, both).await.unwrap()
    }
}

/// Reads a request with a body of `length` bytes.
async fn read_request(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut read = Vec::new();
    loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n")
            && read.len() >= end + 4 + length
        {
            return read;
        }
        assert!(stream.read_buf(&mut read).await.unwrap() > 0);
    }
}

async fn until(what: impl Fn() -> bool) {
    timeout(PATIENCE, async {
        while !what() {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_kept_connection_that_its_peer_closes_is_dropped_and_told() {
    let replica = Replica::new().await;
    let (said, stream) = replica
        .talk(&Bytes::from_static(b"{}"), async |mut stream| {
            read_request(&mut stream, 2).await;
            stream.write_all(ANSWER).await.unwrap();
            stream
        })
        .await;
    assert_eq!(said.unwrap(), b"hi");
    assert_eq!((replica.lane.idle(), replica.open.get()), (1, 1));
    drop(stream);
    until(|| replica.lane.idle() == 0).await;
    assert_eq!((replica.open.get(), replica.lost.load(Ordering::Relaxed)), (0, 1));
}

#[tokio::test]
async fn of_many_that_are_closed_at_once_none_is_left() {
    let replica = Replica::new().await;
    let mut streams = Vec::new();
    let mut leases = Vec::new();
    // More than a task may look at in one turn.
    for _ in 0..300 {
        let (lease, stream) =
            tokio::join!(replica.lane.lease(&replica.target, Want::Fresh), replica.accept());
        leases.push(lease.unwrap());
        streams.push(stream);
    }
    leases.into_iter().for_each(super::Lease::give_back);
    assert_eq!(replica.lane.idle(), 300);
    drop(streams);
    until(|| replica.lane.idle() == 0).await;
    assert_eq!((replica.open.get(), replica.lost.load(Ordering::Relaxed)), (0, 300));
}

#[tokio::test]
async fn a_close_that_was_announced_is_no_loss() {
    let replica = Replica::new().await;
    for answer in [
        &b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"[..],
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\n\r\nhi",
    ] {
        let (said, ()) = replica
            .talk(&Bytes::from_static(b"{}"), async |mut stream| {
                read_request(&mut stream, 2).await;
                stream.write_all(answer).await.unwrap();
            })
            .await;
        assert_eq!(said.unwrap(), b"hi");
        assert_eq!((replica.lane.idle(), replica.open.get()), (0, 0));
    }
    assert_eq!(replica.lost.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn what_stands_behind_an_answer_costs_the_connection() {
    let replica = Replica::new().await;
    let (said, ()) = replica
        .talk(&Bytes::from_static(b"{}"), async |mut stream| {
            read_request(&mut stream, 2).await;
            stream.write_all(&[ANSWER, ANSWER].concat()).await.unwrap();
        })
        .await;
    assert_eq!(said.unwrap(), b"hi");
    assert_eq!((replica.lane.idle(), replica.open.get()), (0, 0));
}

#[tokio::test]
async fn a_large_request_goes_out_whole_at_the_pace_of_its_reader() {
    let replica = Replica::new().await;
    let body: Bytes = (0..8_u32 << 20).map(|i| (i % 251) as u8).collect::<Vec<_>>().into();
    let (said, (request, _stream)) = replica
        .talk(&body, async |mut stream| {
            let request = read_request(&mut stream, body.len()).await;
            stream.write_all(ANSWER).await.unwrap();
            (request, stream)
        })
        .await;
    assert_eq!(said.unwrap(), b"hi");
    assert!(request.ends_with(&body) && request.len() < body.len() + 200);
    assert_eq!(replica.lane.idle(), 1);
}

#[tokio::test]
async fn an_answer_may_come_before_the_request_was_taken() {
    let replica = Replica::new().await;
    let body = Bytes::from(vec![b' '; 16 << 20]);
    let (said, stream) = replica
        .talk(&body, async |mut stream| {
            stream.write_all(ANSWER).await.unwrap();
            stream
        })
        .await;
    assert_eq!(said.unwrap(), b"hi");
    // Half a request is on it.
    assert_eq!((replica.lane.idle(), replica.open.get()), (0, 0));
    drop(stream);
}

#[tokio::test]
async fn an_answer_that_breaks_off_says_how_far_it_came() {
    let replica = Replica::new().await;
    for (wire, failure, answered) in [
        (&b""[..], SendFailure::Closed, false),
        (b"HTTP/1.1 200", SendFailure::Closed, true),
        (b"SSH-2.0-OpenSSH\r\n", SendFailure::Protocol, true),
    ] {
        let body = Bytes::from_static(b"{}");
        let (asked, ()) = tokio::join!(replica.ask(Want::Any, &body), async {
            let mut stream = replica.accept().await;
            read_request(&mut stream, 2).await;
            stream.write_all(wire).await.unwrap();
        });
        let error = asked.err().unwrap();
        assert_eq!((error.failure, error.sent, error.answered), (failure, true, answered), "{wire:?}");
    }
    for (wire, failure) in [
        (&b"content-length: 3\r\n\r\nhi"[..], SendFailure::Closed),
        (b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", SendFailure::Closed),
        (b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\nx", SendFailure::Protocol),
    ] {
        let (said, ()) = replica
            .talk(&Bytes::from_static(b"{}"), async |mut stream| {
                read_request(&mut stream, 2).await;
                stream.write_all(&[b"HTTP/1.1 200 OK\r\n", wire].concat()).await.unwrap();
            })
            .await;
        assert_eq!(said, Err(failure));
    }
    assert_eq!((replica.lane.idle(), replica.open.get()), (0, 0));
}
