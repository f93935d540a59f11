//! The accept loop: one per worker and listener, for as long as the listener lives.
//!
//! It never ends by an error. At its end it first takes what already waits in its socket: closing a socket resets
//! the connections in its queue, whose clients have long been told that they are connected.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use super::clients::Place;
use super::{Answers, Context, Listening, connection};
use crate::clock;
use crate::net::{self, TcpStream};
use crate::policy::Moment;

/// After a failed accept that would fail again at once, such as without file descriptors.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);
/// Such failures are told this often at most: connections that end let others in, and then it fails again.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Accepts connections from `socket`, which must be nonblocking and listening, and serves each in a task of
/// its own until the process drains or the listener retires; then empties the socket's queue and closes it.
/// Run it on the worker's runtime. Fails only where the socket cannot be registered with it. Dropping the
/// future closes the socket at once; connections go on.
pub async fn accept<H: Answers>(
    socket: TcpListener,
    listening: Arc<Listening>,
    context: Arc<Context<H>>,
) -> io::Result<()> {
    let socket = tokio::net::TcpListener::from_std(socket)?;
    let retired = listening.retired().watch();
    let mut told: Option<Moment> = None;
    loop {
        let accepted = tokio::select! {
            biased;
            () = context.draining.started() => break,
            () = retired.started() => break,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                tokio::select! {
                    biased;
                    () = context.clients.take(&context.telemetry) => {}
                    () = context.draining.started() => context.clients.take_over_limit(),
                    () = retired.started() => context.clients.take_over_limit(),
                }
                serve(net::accepted(tcp), peer, &listening, &context);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                let now = clock::now();
                if told.is_none_or(|told| told + TOLD_EVERY <= now) {
                    told = Some(now);
                    tracing::warn!(%error, listener = %listening.name(), "cannot accept clients, trying on");
                }
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
    }
    // Asked of the system itself: readiness may not have been told yet of what waits.
    let socket = socket.into_std()?;
    loop {
        match socket.accept() {
            Ok((tcp, peer)) => {
                // The queue is bounded, and so is what this goes over the limit by.
                context.clients.take_over_limit();
                match tcp.set_nonblocking(true).and_then(|()| net::from_std(tcp)) {
                    Ok(tcp) => serve(tcp, peer, &listening, &context),
                    Err(_unusable) => context.clients.leave_unused(),
                }
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(_empty) => return Ok(()),
        }
    }
}

/// Serves a connection that came another way than by a socket, once there is a place for it.
#[cfg(test)]
pub(crate) async fn welcome<H: Answers>(
    tcp: TcpStream,
    peer: SocketAddr,
    listening: &Arc<Listening>,
    context: &Arc<Context<H>>,
) {
    context.clients.take(&context.telemetry).await;
    serve(tcp, peer, listening, context);
}

/// Starts a connection's task. A place has been taken for it.
fn serve<H: Answers>(
    tcp: TcpStream,
    peer: SocketAddr,
    listening: &Arc<Listening>,
    context: &Arc<Context<H>>,
) {
    let drains = [context.draining.guard(), listening.retired().watch().guard()];
    let place = Place::new(Arc::clone(&context.clients), &listening.metrics, drains);
    tokio::spawn(connection::serve(tcp, peer, Arc::clone(listening), Arc::clone(context), place));
}

/// Whether the error concerns the one connection that was to be accepted, and not the next.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}
