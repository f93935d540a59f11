//! The streams of an HTTP/2 connection as tasks, each with a slow-reader clock of its own.
//!
//! A client may keep its connection flowing and take nothing of one answer, by never widening that stream's window:
//! the socket's clock does not see that. What shows it is that hyper, which asks a body for its next frame once the
//! former may be sent, does not ask. The alarm is made at the first such stall, so a stream that is read
//! costs none.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::rt::Executor;

use crate::clock::{self, Alarm, Alarms, Turn};
use crate::telemetry::Telemetry;

/// Runs the streams of one connection.
#[derive(Clone, Debug)]
pub(super) struct Streams(Arc<Terms>);

#[derive(Debug)]
struct Terms {
    alarms: Alarms,
    slow_reader: Duration,
    telemetry: Arc<Telemetry>,
}

/// What became of the body within one poll of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// It was not asked for a frame.
    No,
    /// It had none yet: the client waits for it.
    Waits,
    /// It gave one and was not asked again: it waits for the client.
    Gave,
}

thread_local! {
    /// Told by the body, read by its stream's task around the same poll.
    static ASKED: Cell<Asked> = const { Cell::new(Asked::No) };
}

/// Told by a body at each of its polls.
pub(super) fn asked(how: Asked) {
    ASKED.set(how);
}

impl Streams {
    pub(super) fn new(alarms: Alarms, slow_reader: Duration, telemetry: Arc<Telemetry>) -> Self {
        Self(Arc::new(Terms { alarms, slow_reader, telemetry }))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        tokio::spawn(run(stream, Arc::clone(&self.0)));
    }
}

/// Runs a stream to its end or, when the client has taken nothing for too long, drops it, which resets it.
async fn run(stream: impl Future<Output = ()>, terms: Arc<Terms>) {
    let mut stream = pin!(stream);
    let mut stalled: Option<Alarm> = None;
    poll_fn(|cx| {
        let _turn = Turn::begin();
        ASKED.set(Asked::No);
        if stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        match (ASKED.get(), &stalled) {
            (Asked::Gave, _) => {
                stalled.get_or_insert_with(|| terms.alarms.alarm()).set(clock::now() + terms.slow_reader)
            }
            (Asked::Waits, Some(alarm)) => alarm.clear(),
            (Asked::Waits, None) | (Asked::No, _) => {}
        }
        match &stalled {
            Some(alarm) if alarm.poll_expired(cx).is_ready() => {
                terms.telemetry.metrics.count_limit(super::connection::SLOW_READER_CLOCK);
                Poll::Ready(())
            }
            _ => Poll::Pending,
        }
    })
    .await;
}
