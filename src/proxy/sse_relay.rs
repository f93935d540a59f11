//! A token stream on its way to the client: whole events, as they come, unchanged.
//!
//! The answer ends well only after a good finish of every choice. Anything else the client is told in one
//! error event of its dialect, then the body ends cleanly, and never with `[DONE]`. What breaks behind the
//! finish is completed here. Silence beyond the inter-token clock is borne as long as the backend is not
//! known to be gone, and `silence_max` at most.

use std::collections::VecDeque;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;

use crate::clock;
use crate::policy::Moment;
use crate::policy::dialect::{Dialect, Endpoint};
use crate::policy::health::Standing;
use crate::policy::retry::{Cause, Phase};
use crate::proxy::attempt::cut;
use crate::proxy::relay::Serving;
use crate::proxy::respond::last_event;
use crate::proxy::token_stream::{Ending, TokenStream};
use crate::proxy::watch::Stage;
use crate::telemetry::metrics::End;
use crate::upstream::InBody;

/// The body of an answer that is a token stream.
pub(super) struct EventRelay {
    /// Ready to go.
    ahead: VecDeque<Bytes>,
    /// Gone when it has ended.
    body: Option<InBody>,
    stream: Box<TokenStream>,
    serving: Serving,
    endpoint: Endpoint,
    dialect: Dialect,
    clocks: Silence,
    gaps: Gaps,
}

/// How much silence is borne.
#[derive(Clone, Copy)]
pub(super) struct Silence {
    /// Then the backend is looked at.
    pub(super) inter_token: Duration,
    /// Then it is over.
    pub(super) max: Duration,
    /// The latest event.
    pub(super) since: Moment,
}

/// Gaps between events are told by the longest of so many: a lock an event would be too dear, and it is the longest
/// that the clock is about.
const STRETCH: u32 = 32;

/// The end of a stream is a stretch of its own if it had so many.
const STRETCH_MIN: u32 = 8;

/// The gaps of the current stretch.
#[derive(Default)]
struct Gaps {
    events: u32,
    longest: Duration,
    total: Duration,
    /// None while the client has something to read: time that it takes is not the backend's.
    waits_since: Option<Moment>,
}

impl Gaps {
    /// An event came. Returns how many of the stretch have.
    fn add(&mut self, now: Moment) -> u32 {
        let gap = self.waits_since.take().map_or(Duration::ZERO, |since| now.since(since));
        self.longest = self.longest.max(gap);
        self.total += gap;
        self.events += 1;
        self.events
    }
}

impl EventRelay {
    /// Relays from the gate on.
    pub(super) fn new(
        ahead: VecDeque<Bytes>,
        body: Option<InBody>,
        stream: Box<TokenStream>,
        serving: Serving,
        (endpoint, dialect): (Endpoint, Dialect),
        clocks: Silence,
    ) -> Self {
        serving.choice.in_flight.streams();
        let gaps = Gaps::default();
        let mut relay = Self { ahead, body, stream, serving, endpoint, dialect, clocks, gaps };
        let since = relay.clocks.since;
        relay.serving.watch.enter(Stage::Body { idle: relay.clocks.inter_token, since });
        if relay.body.is_none() {
            relay.serving.complete();
        }
        relay
    }

    /// The next bytes; `None` is the end.
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(chunk) = self.ahead.pop_front() {
                self.serving.ledger.sent(chunk.len());
                return Poll::Ready(Some(chunk));
            }
            let Some(body) = &mut self.body else { return Poll::Ready(None) };
            match body.poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(chunk) = frame.into_data() {
                        self.feed(chunk);
                    }
                }
                Poll::Ready(Some(Err(error))) => self.end(Err(cut(&error))),
                Poll::Ready(None) => self.end(Ok(())),
                Poll::Pending => match self.serving.watch.poll_expired(cx) {
                    Poll::Ready(Cause::Silence) if self.may_go_on() => {}
                    Poll::Ready(cause) => self.broke(cause),
                    Poll::Pending => {
                        self.begin_to_wait();
                        return Poll::Pending;
                    }
                },
            }
        }
    }

    fn feed(&mut self, chunk: Bytes) {
        let fed = self.stream.feed(chunk, &mut self.ahead);
        if fed.any {
            self.moved(clock::now());
        }
        if fed.too_large {
            self.serving.ledger.worker().telemetry().metrics.count_limit("event_bytes_max");
        }
        if let Some(fault) = fed.broken {
            self.broke(fault.cause);
        }
    }

    /// The backend owes an event from now on; until then the client had enough to read.
    fn begin_to_wait(&mut self) {
        if self.gaps.waits_since.is_none() {
            let now = clock::now();
            self.gaps.waits_since = Some(now);
            self.serving.choice.in_flight.waits(now);
        }
    }

    fn moved(&mut self, now: Moment) {
        self.clocks.since = now;
        self.serving.watch.moved(now);
        let choice = &self.serving.choice;
        choice.in_flight.moved(now);
        if self.gaps.add(now) == STRETCH {
            self.learn_gaps(now);
        }
    }

    fn learn_gaps(&mut self, now: Moment) {
        let Gaps { events, longest, total, .. } = std::mem::take(&mut self.gaps);
        let choice = &self.serving.choice;
        choice.pool.learn_token_gaps(choice.index, now - total, longest, total / events.max(1));
    }

    fn end(&mut self, clean: Result<(), Cause>) {
        self.serving.choice.in_flight.rests();
        if self.gaps.events >= STRETCH_MIN {
            self.learn_gaps(clock::now());
        }
        match self.stream.end(clean) {
            Ending::Whole(rest) => {
                self.body = None;
                if !rest.is_empty() {
                    self.ahead.push_back(rest);
                }
                match clean {
                    Ok(()) => self.serving.complete(),
                    Err(cause) => self.serving.broke(Phase::Tail, cause, End::Complete),
                }
            }
            Ending::Broken(cause) => self.broke(cause),
        }
    }

    /// The connection is closed at once; the client gets what completes its answer, or the error.
    fn broke(&mut self, cause: Cause) {
        self.body = None;
        self.serving.choice.in_flight.rests();
        if self.stream.is_complete() {
            self.ahead.push_back(self.stream.complete_locally());
            self.serving.broke(Phase::Tail, cause, End::Complete);
        } else {
            self.serving.broke(Phase::Stream, cause, End::Error);
            let sequence = self.stream.next_sequence();
            let event = last_event(&self.serving.ledger, self.dialect, self.endpoint, cause, sequence);
            self.ahead.push_back(event);
        }
        self.ahead.retain(|chunk| !chunk.is_empty());
    }

    /// Slow is not dead: silence is borne while the judge has nothing against the backend. Behind the finish
    /// nothing is slow any more: usage and terminator take no thought.
    fn may_go_on(&mut self) -> bool {
        if self.stream.is_complete() {
            return false;
        }
        let now = clock::now();
        let left = (self.clocks.since + self.clocks.max).since(now);
        let choice = &self.serving.choice;
        let standing = choice.backend().whole().standing(&choice.pool.config.health, now);
        if left.is_zero() || matches!(standing, Standing::Out { .. }) {
            return false;
        }
        let idle = self.clocks.inter_token.min(left);
        self.serving.watch.enter(Stage::Body { idle, since: now });
        true
    }
}
