//! The operator's listener: status, metrics, draining backends, asking for a reload.
//!
//! On an address of its own and on the control runtime, so that a flood of clients neither reaches it nor
//! slows it down. `api` answers, `status` says what is shown, `access` says who may. HTTP/1.1 only, no
//! request body is ever read, and every resource a visitor can hold has a bound below.

mod access;
mod api;
mod status;
#[cfg(test)]
mod tests;

pub use status::{
    BackendStatus, ListenerStatus, ModelStatus, PoolStatus, ProbeStatus, SCHEMA, StandingStatus, Status,
};

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::drain::Draining;
use crate::policy::Moment;
use crate::pool::Directory;
use crate::reload::Reloader;

/// Connections at a time. A few scrapers, probes and people; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;

/// For a request head, and for the next request on a kept connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);

/// Bytes of a request head.
const HEAD_BYTES_MAX: usize = 32 * 1024;

/// A connection is ended after this, whoever holds it and however slowly it reads.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);

/// For the answer that is under way when a connection is ended.
const LAST_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the operator's listener shows and acts on. The token is not here: it is read from the
/// configuration in force at every request, so that a reload changes it.
pub struct AdminState {
    /// Pools, backends, the configuration in force.
    pub directory: Arc<Directory>,
    /// What `POST /reload` asks.
    pub reloader: Arc<Reloader>,
    /// The end of the process.
    pub draining: Draining,
    /// The clients' listeners as they are now; empty while none listens, which is not ready.
    pub listeners: Box<dyn Fn() -> Vec<ListenerStatus> + Send + Sync>,
    /// When the process began to serve.
    pub started: Moment,
}

/// Answers on `listener` until `stop` starts, then lets running answers end until `stop` is done. `stop` is a
/// drain of this listener's own, not the process's: while clients are drained, the operator wants to watch,
/// and a reload that moves the admin address is answered on the old one. Dropping the future cuts all.
pub async fn serve(listener: TcpListener, state: Arc<AdminState>, stop: Draining) {
    let loopback = listener.local_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback());
    let router = api::router(state, loopback);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            // Never closed, so this cannot fail.
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        tokio::select! {
            (slot, accepted) = accepted => match accepted {
                Ok((stream, peer)) => {
                    let (router, stop) = (router.clone(), stop.clone());
                    connections.spawn(async move {
                        let _slot = slot;
                        connection(stream, peer, router, stop).await;
                    });
                }
                Err(error) => {
                    tracing::warn!("admin: a connection could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
            () = stop.started() => break,
        }
    }
    drop(listener);
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        () = stop.done() => {}
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug)]
struct Peer(SocketAddr);

async fn connection(stream: TcpStream, peer: SocketAddr, router: Router, stop: Draining) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        answer(router.clone(), request.map(Body::new))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        // Errors are the visitor's: a reset, half a head. Nobody is there to be told.
        _ended = connection.as_mut() => return,
        () = stop.started() => {}
        () = tokio::time::sleep(CONNECTION_AGE_MAX) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ended = tokio::time::timeout(LAST_ANSWER_TIMEOUT, connection).await;
}

async fn answer(router: Router, request: Request<Body>) -> Result<Response, Infallible> {
    router.oneshot(request).await
}
