//! gRPC as evergate sees it: HTTP/2 on both sides, a status in the trailers, messages in both directions at once.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

use crate::support::client::{Answer, End, H2Client, Request};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Step};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::{PATIENCE, within};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

fn call(path: &str, message: impl Into<Bytes>) -> Request {
    let head = Request::new("POST", path).header("content-type", "application/grpc").header("te", "trailers");
    head.body(message)
}

fn over(url: &str) -> ProxyBuilder {
    ProxyBuilder::new().backend(url).set("pool.http", "2").set("pool.probe.kind", "tcp")
}

fn status(answer: &Answer) -> Option<&str> {
    answer.trailers.iter().find(|(name, _)| name == "grpc-status").map(|(_, value)| value.as_str())
}

fn trailers(status: &str) -> H2Step {
    H2Step::Trailers(vec![
        ("grpc-status".to_owned(), status.to_owned()),
        ("grpc-message".to_owned(), "said%20so".to_owned()),
    ])
}

#[tokio::test]
async fn a_unary_call_keeps_its_messages_and_its_trailers() {
    let backend = H2Backend::start(|request| {
        let head = H2Answer::new(200).header("content-type", "application/grpc");
        head.data(request.body.clone()).step(trailers("0"))
    })
    .await;
    let proxy = Proxy::start(&over(&backend.url()));
    let client = H2Client::connect(proxy.addr).await;
    for (path, length) in
        [(INFER, 5), (INFER, 200_000), ("/custom.Service/Call", 5), ("/custom.Service/Call", 200_000)]
    {
        let message = vec![7_u8; length];
        let answer = client.send(&call(path, message.clone())).await;
        assert_eq!((answer.status, answer.end, status(&answer)), (200, End::Clean, Some("0")));
        assert!(answer.body == message);
        assert_eq!(answer.header("content-type"), Some("application/grpc"));
        assert!(answer.trailers.contains(&("grpc-message".to_owned(), "said%20so".to_owned())));
    }
    assert!(backend.requests().iter().all(|seen| seen.header("te") == Some("trailers")));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_status_without_a_message_is_relayed() {
    let backend = H2Backend::start(|request| {
        let head = H2Answer::new(200).header("content-type", "application/grpc");
        match request.header("x-kind") {
            Some("only-trailers") => head.step(trailers("3")),
            // Trailers-Only: one block of fields is all there is.
            _ => head.header("grpc-status", "3").header("grpc-message", "said%20so"),
        }
    })
    .await;
    let proxy = Proxy::start(&over(&backend.url()));
    let client = H2Client::connect(proxy.addr).await;
    for path in [INFER, "/custom.Service/Call"] {
        let answer = client.send(&call(path, "m").header("x-kind", "only-trailers")).await;
        assert_eq!((answer.status, status(&answer)), (200, Some("3")), "{path} {:?}", answer.headers);
        let answer = client.send(&call(path, "m")).await;
        assert_eq!(
            (answer.status, answer.header("grpc-status")),
            (200, Some("3")),
            "{path} {:?}",
            answer.headers
        );
        assert_eq!((answer.header("grpc-message"), answer.body.len()), (Some("said%20so"), 0));
    }
    assert_eq!(backend.requests().len(), 4, "the client's own fault is not tried again");
    proxy.is_quiet().await;
}

/// F38: what is not the client's fault is another backend's chance.
#[tokio::test]
async fn an_unavailable_backend_is_passed_over() {
    let sick = H2Backend::start(|request| {
        let head = H2Answer::new(200).header("content-type", "application/grpc");
        match request.header("x-kind") {
            Some("only-trailers") => head.step(trailers("14")),
            _ => head.header("grpc-status", "13"),
        }
    })
    .await;
    let well = H2Backend::start(|request| {
        let head = H2Answer::new(200).header("content-type", "application/grpc");
        head.data(request.body.clone()).step(trailers("0"))
    })
    .await;
    let proxy = Proxy::start(&over(&sick.url()).backend_with(&well.url(), &[("tier", 1.into())]));
    let client = H2Client::connect(proxy.addr).await;
    for kind in ["only-trailers", "head", "only-trailers", "head", "head", "only-trailers", "head", "head"] {
        // Short and of a known length, so that it can be sent twice.
        let answer =
            client.send(&call(INFER, "m").header("x-kind", kind).header("content-length", "1")).await;
        assert_eq!((status(&answer), answer.text().as_str()), (Some("0"), "m"), "{:?}", answer.headers);
    }
    let met = sick.requests().len();
    assert!((1..=3).contains(&met), "ejected after three faults, not {met}");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_error_of_our_own_is_trailers_only() {
    let backend = crate::support::backend::Backend::refusing().await;
    let proxy = Proxy::start(&over(&backend.url()).set("pool.retry.wait_max", "0s"));
    let client = H2Client::connect(proxy.addr).await;
    for path in [INFER, "/custom.Service/Call"] {
        let answer = client.send(&call(path, "m")).await;
        assert_eq!((answer.status, answer.header("grpc-status")), (200, Some("14")), "{:?}", answer.headers);
        assert_eq!(answer.header("content-type"), Some("application/grpc"));
        assert!(answer.header("grpc-message").is_some_and(|message| !message.is_empty()));
        assert_eq!((answer.body.len(), answer.trailers.len(), answer.end), (0, 0, End::Clean));
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn messages_pass_both_ways_while_the_call_is_open() {
    let backend = Mirror::start().await;
    let proxy = Proxy::start(&over(&backend.url()));
    let client = H2Client::connect(proxy.addr).await;
    let (messages, answer) = client.open(&call(STREAM, ""));
    // The head of the answer comes before the first message goes.
    let answer = within(PATIENCE, answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut answer = answer.into_body();
    for nth in 0..20 {
        let message = Bytes::from(format!("message {nth}"));
        messages.send(Frame::data(message.clone())).await.unwrap();
        let frame = within(PATIENCE, answer.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), message);
    }
    let mut up = HeaderMap::new();
    up.insert("x-up", "sum".parse().unwrap());
    messages.send(Frame::trailers(up)).await.unwrap();
    drop(messages);
    let trailers = within(PATIENCE, answer.frame()).await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(trailers["x-up"], "sum", "trailers pass upwards too");
    assert!(answer.frame().await.is_none());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_client_that_resets_its_call_ends_it_at_the_backend() {
    let backend = Mirror::start().await;
    let proxy = Proxy::start(&over(&backend.url()));
    let client = H2Client::connect(proxy.addr).await;
    let (messages, answer) = client.open(&call(STREAM, ""));
    let mut answer = within(PATIENCE, answer).await.unwrap().into_body();
    messages.send(Frame::data(Bytes::from_static(b"one"))).await.unwrap();
    within(PATIENCE, answer.frame()).await.unwrap().unwrap();
    drop((messages, answer));
    crate::support::eventually(PATIENCE, || backend.cut() == 1).await;
    proxy.is_quiet().await;
}

/// Sends every message back as it comes, then the request's trailers with a status.
struct Mirror {
    addr: SocketAddr,
    cut: Arc<AtomicUsize>,
    server: AbortHandle,
}

impl Mirror {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let cut = Arc::<AtomicUsize>::default();
        let counted = cut.clone();
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let cut = counted.clone();
                connections.spawn(async move {
                    let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
                        let mut answer =
                            http::Response::new(Reflected(Some(request.into_body()), cut.clone()));
                        let grpc = "application/grpc".parse().unwrap();
                        answer.headers_mut().insert("content-type", grpc);
                        async move { Ok::<_, Infallible>(answer) }
                    });
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    drop(server.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Self { addr, cut, server: server.abort_handle() }
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Calls that did not end well.
    fn cut(&self) -> usize {
        self.cut.load(SeqCst)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Reflected(Option<Incoming>, Arc<AtomicUsize>);

impl Body for Reflected {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.0 else { return Poll::Ready(None) };
        let mut trailers = match std::task::ready!(Pin::new(body).poll_frame(cx)) {
            Some(Ok(frame)) => match frame.into_trailers() {
                Ok(trailers) => trailers,
                Err(data) => return Poll::Ready(Some(Ok(data))),
            },
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => HeaderMap::new(),
        };
        self.0 = None;
        trailers.insert("grpc-status", "0".parse().unwrap());
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

impl Drop for Reflected {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.1.fetch_add(1, SeqCst);
        }
    }
}
