//! A token stream on its way to the client: whole events, as they come, unchanged.
//!
//! The answer ends well only after a good finish of every choice. A leg that breaks before is followed by
//! another where `policy::resume` knows how; its events pass through the splice, which lets only new ones by. Where
//! that cannot be, the client is told in one error event of its dialect, then the body ends cleanly, and never
//! with `[DONE]`. What breaks behind the finish is completed here. Silence beyond the inter-token clock is borne
//! as long as the backend is not known to be gone, and `silence_max` at most; meanwhile another leg is begun
//! (`moves.rs`, as for streams at a backend that is on its way out).

mod moves;
mod second;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;

use crate::clock;
use crate::policy::Moment;
use crate::policy::dialect::{Dialect, Endpoint, EventFacts};
use crate::policy::health::Standing;
use crate::policy::resume::{Abandon, NotArmed};
use crate::policy::retry::{Cause, Facts, Phase};
use crate::pool::{Backend, Choice};
use crate::proxy::attempt::{Answer, Outcome, cut};
use crate::proxy::hedge::Tried;
use crate::proxy::ledger::Entry;
use crate::proxy::opinion::{Opinions, Over};
use crate::proxy::outlet::Outlet;
use crate::proxy::relay::Serving;
use crate::proxy::respond::{Refusal, last_event};
use crate::proxy::resume::{self, Next, Resumer};
use crate::proxy::sse_relay::moves::{Move, Stay};
use crate::proxy::token_stream::{Ending, Fault, TokenStream};
use crate::proxy::watch::{Stage, Watch};
use crate::sse::{Decoder, Event, Lines};
use crate::telemetry::events::StreamResumed;
use crate::telemetry::metrics::{AttemptOutcome, End};
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
    /// None where the stream cannot be resumed.
    resume: Option<Box<Resumer>>,
    /// Takes out what was asked for unseen, to the end of the stream.
    outlet: Option<Box<Outlet>>,
    /// Watches the first leg for one token said over and over; none where nobody could be asked about it.
    opinions: Option<Box<Opinions>>,
    /// What the splice has written of the leg under way; none for the first leg.
    spliced: Option<Spliced>,
    /// A leg has broken for this reason, and another is being looked for.
    broken: Option<Cause>,
    /// Another leg is being begun beside the one that speaks.
    moving: Option<Box<Move>>,
    stay: Stay,
    /// Since when, and why, the client has had nothing new.
    gap_since: Moment,
    gap_cause: Cause,
}

/// A leg that speaks, ready to be relayed.
pub(super) struct NextLeg {
    pub(super) choice: Choice,
    watch: Watch,
    pub(super) stream: Box<TokenStream>,
    pub(super) body: Option<InBody>,
    pub(super) reused: bool,
    pub(super) first_byte: Option<Duration>,
    pub(super) started: Moment,
}

impl NextLeg {
    /// And what it has said so far.
    pub(super) fn of(Tried { choice, outcome, watch }: Tried) -> Option<(Self, VecDeque<Bytes>)> {
        let Outcome { facts, answer, first_byte, started } = *outcome;
        let Some(Answer::Tokens { ahead, stream, body, .. }) = answer else { return None };
        Some((Self { choice, watch, stream, body, reused: facts.reused, first_byte, started }, ahead))
    }
}

/// What a leg behind the first has given the client.
#[derive(Default)]
struct Spliced {
    spoke: bool,
    finished: bool,
    /// Where the leg before it ran.
    from: Option<Arc<Backend>>,
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
        resume: Option<Box<Resumer>>,
    ) -> Self {
        let (gaps, spliced, broken, moving) = (Gaps::default(), None, None, None);
        // It reads OpenAI's events, and no others.
        let is_read = matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
        let opinions =
            resume.as_ref().filter(|_| is_read).and_then(|_| Opinions::of(&serving.choice.pool, endpoint));
        let outlet = stream.outlet();
        let mut relay = Self {
            ahead,
            body,
            stream,
            serving,
            endpoint,
            dialect,
            clocks,
            gaps,
            resume,
            outlet,
            opinions,
            spliced,
            broken,
            moving,
            stay: Stay::default(),
            gap_since: Moment::ZERO,
            gap_cause: Cause::Silence,
        };
        if let Some(resume) = &mut relay.resume {
            resume.begins_at(&relay.serving.choice, relay.stream.unseen());
        }
        relay.note_ahead();
        relay.begin_leg();
        if relay.body.is_none() && !relay.defers(Over::Ended(Ok(()))) {
            relay.serving.complete();
        }
        relay
    }

    /// The clocks of a leg that has just spoken.
    fn begin_leg(&mut self) {
        self.serving.choice.in_flight.streams();
        let since = self.clocks.since;
        self.serving.watch.enter(Stage::Body { idle: self.clocks.inter_token, since });
        self.look_whether_to_stay();
    }

    /// Events that came before the gate are the client's, too.
    fn note_ahead(&mut self) {
        let Some(resume) = &mut self.resume else { return };
        if resume.splice.is_lines() != self.stream.is_lines() {
            self.serving.choice.pool.state.metrics.count_not_armed(NotArmed::Endpoint.name());
            (self.resume, self.opinions) = (None, None);
            return;
        }
        if let Some(opinions) = &mut self.opinions {
            let wary = self.serving.choice.record.is_wary();
            let (room, ask) = opinions.feed_ahead(self.endpoint, &mut self.ahead, resume, wary);
            return self.keep_watching(room, ask);
        }
        let mut room = true;
        // The gate holds whole events, and no more of them than it may.
        let mut note = |event: Event<'_>| {
            room &= !event.has_data || resume.observe(event.data, &EventFacts::default());
            ControlFlow::Continue(())
        };
        let (mut decoder, mut lines) = (Decoder::new(usize::MAX), Lines::new(usize::MAX));
        for chunk in &self.ahead {
            let _ = match self.stream.is_lines() {
                true => lines.feed(chunk, &mut note),
                false => decoder.feed(chunk, &mut note),
            };
        }
        if !room {
            self.serving.ledger.worker().telemetry().metrics.count_limit("memory_max");
            self.resume = None;
        }
    }

    /// The next bytes; `None` is the end.
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(mut chunk) = self.ahead.pop_front() {
                if let Some(outlet) = &mut self.outlet {
                    chunk = outlet.pass(chunk);
                    if chunk.is_empty() {
                        continue;
                    }
                }
                self.serving.ledger.sent(chunk.len());
                return Poll::Ready(Some(chunk));
            }
            if self.poll_opinion(cx).is_ready() {
                continue;
            }
            if let Some(cause) = self.broken {
                match self.poll_next_leg(cx, cause) {
                    Poll::Ready(()) => continue,
                    Poll::Pending => return Poll::Pending,
                }
            }
            // What is held is enough to be asked about.
            let is_full = self.opinions.as_ref().is_some_and(|opinions| opinions.is_full());
            let is_still = is_full || self.is_still();
            let Some(body) = &mut self.body else {
                let held = self.opinions.as_ref().is_some_and(|opinions| opinions.is_holding());
                return if held { Poll::Pending } else { Poll::Ready(self.rest()) };
            };
            match if is_still { Poll::Pending } else { body.poll_frame(cx) } {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(chunk) = frame.into_data() {
                        self.feed(chunk);
                    }
                }
                Poll::Ready(Some(Err(error))) => self.end(Err(cut(&error))),
                Poll::Ready(None) => self.end(Ok(())),
                Poll::Pending if self.poll_move(cx).is_ready() => {}
                Poll::Pending => match self.serving.watch.poll_expired(cx) {
                    Poll::Ready(Cause::Silence) if self.may_go_on() => {}
                    Poll::Ready(Cause::Rescued) if self.may_stay() => {}
                    Poll::Ready(Cause::Drain) if self.has_time() => {}
                    Poll::Ready(cause) => self.broke(cause),
                    Poll::Pending => {
                        if !is_still {
                            self.begin_to_wait();
                        }
                        return Poll::Pending;
                    }
                },
            }
        }
    }

    /// What waits at the end for the rest of its event, of which none will come.
    fn rest(&mut self) -> Option<Bytes> {
        let rest = self.outlet.take()?.rest();
        self.serving.ledger.sent(rest.len());
        (!rest.is_empty()).then_some(rest)
    }

    fn feed(&mut self, chunk: Bytes) {
        let mut raw = VecDeque::new();
        let first = self.spliced.is_none();
        let out = if first { &mut self.ahead } else { &mut raw };
        let (mut resume, mut room, mut ask) = (self.resume.as_mut().filter(|_| first), true, false);
        let fed = if let (Some(resume), Some(opinions)) = (&mut resume, &mut self.opinions) {
            let wary = self.serving.choice.record.is_wary();
            let fed;
            (fed, room, ask) = opinions.feed(&mut self.stream, chunk, out, resume, wary);
            fed
        } else {
            self.stream.feed(chunk, out, |event, facts| {
                // A comment tells the client nothing.
                if let Some(resume) = resume.as_mut().filter(|_| event.has_data) {
                    room &= resume.observe(event.data, facts);
                }
            })
        };
        if fed.any {
            self.moved(clock::now());
        }
        if first {
            self.keep_watching(room && !fed.too_large, ask);
        }
        if fed.too_large || !room {
            let limit = if room { "event_bytes_max" } else { "memory_max" };
            self.serving.ledger.worker().telemetry().metrics.count_limit(limit);
            // It goes on as it is, and ends visibly if it breaks.
            self.resume = self.resume.take().filter(|_| !first);
        }
        if !first && !self.splice(raw) {
            return;
        }
        self.old_leg_spoke(fed.meaningful);
        self.fed(fed.broken);
    }

    /// What a chunk means beside its events.
    fn fed(&mut self, broken: Option<Fault>) {
        if self.resume.as_ref().is_some_and(|resume| self.spliced.is_some() && resume.splice.is_done()) {
            // The client has it all; what the leg may still say is for nobody.
            self.body = None;
            return self.serving.complete();
        }
        if let Some(fault) = broken {
            self.broke(fault.cause);
        }
    }

    /// Events of a leg behind the first: what is new in them goes to the client. False if the leg is of no use.
    fn splice(&mut self, raw: VecDeque<Bytes>) -> bool {
        let (Some(resume), Some(spliced)) = (&mut self.resume, &mut self.spliced) else { return true };
        let mut out = Vec::new();
        let mut abandoned = None;
        for piece in raw {
            match resume.splice.feed(&piece, &mut out) {
                Ok(fed) => (spliced.spoke, spliced.finished) = (spliced.spoke | fed.spoke, fed.finished),
                Err(why) => {
                    abandoned = Some(why);
                    break;
                }
            }
        }
        if !out.is_empty() {
            self.ahead.push_back(out.into());
        }
        if spliced.spoke {
            self.tell_resumed();
        }
        let Some(why) = abandoned else { return true };
        self.abandon_leg(why);
        false
    }

    /// The leg under way is of no use.
    fn abandon_leg(&mut self, why: Abandon) {
        self.body = None;
        self.serving.choice.in_flight.rests();
        self.serving.abandon(why.name());
        // Where another has been begun beside it, the latest plan is that one's.
        if let Some(resume) = self.resume.as_mut().filter(|_| self.moving.is_none()) {
            resume.abandon();
        }
        // What the client is told is what broke the leg before; a leg that spoke has broken by itself.
        if self.spliced.as_ref().is_some_and(|spliced| spliced.spoke) {
            (self.gap_since, self.gap_cause) = (self.clocks.since, Cause::InvalidEvent);
        }
        if self.moving.is_some() {
            return self.break_in_move(self.gap_cause, None);
        }
        self.go_on_or_end(self.gap_cause, None);
    }

    /// Said once a leg, when it has given the client something new.
    fn tell_resumed(&mut self) {
        let Some(from) = self.spliced.as_mut().and_then(|spliced| spliced.from.take()) else { return };
        let Some(resume) = &self.resume else { return };
        self.serving.choice.pool.state.metrics.count_resume("resumed");
        let strategy = resume.strategy();
        self.tell_goes_on(&from, strategy);
    }

    fn tell_goes_on(&mut self, from: &Backend, strategy: &'static str) {
        let ledger = &mut self.serving.ledger;
        ledger.resumed();
        let choice = &self.serving.choice;
        StreamResumed {
            at: &choice.backend().metrics,
            request_id: ledger.id.to_str().unwrap_or_default(),
            from: &from.name,
            cause: self.gap_cause.name(),
            strategy,
            gap: clock::now().since(self.gap_since),
        }
        .emit(ledger.worker().telemetry());
    }

    /// What the search for another leg came to.
    fn poll_next_leg(&mut self, cx: &mut Context<'_>, cause: Cause) -> Poll<()> {
        let Self { resume, serving, .. } = self;
        let Some(resume) = resume else {
            self.end_with_error(cause);
            return Poll::Ready(());
        };
        let Poll::Ready(next) = resume.poll_search(cx, |entry| serving.ledger.attempt(entry)) else {
            return Poll::Pending;
        };
        self.broken = None;
        match next {
            Next::Leg(tried) => self.take_leg(*tried, cause),
            Next::OtherWay => self.go_on_or_end(cause, None),
            Next::Kills => {
                self.serving.choice.pool.state.metrics.count_resume("request_kills_backends");
                self.end_with(&Refusal::Kills);
            }
            Next::End(why) => {
                self.serving.choice.pool.state.metrics.count_resume(why);
                self.end_with_error(cause);
            }
        }
        Poll::Ready(())
    }

    /// Another backend speaks.
    fn take_leg(&mut self, tried: Tried, cause: Cause) {
        let Some((leg, ahead)) = NextLeg::of(tried) else { return self.end_with_error(cause) };
        self.follow(leg);
        if self.splice(ahead) && self.body.is_none() {
            self.end(Ok(()));
        }
    }

    /// From now on it is this leg that is relayed.
    fn follow(&mut self, leg: NextLeg) {
        let NextLeg { choice, watch, stream, body, reused, first_byte, started } = leg;
        self.serving.ledger.attempt(Entry {
            backend: choice.backend().clone(),
            role: resume::ROLE,
            outcome: AttemptOutcome::Success,
            cause: "",
            phase: "",
            reused,
            started,
            first_byte,
            lasted: None,
        });
        // What a late peer says is about the leg before.
        self.opinions = None;
        let from = Some(self.serving.choice.backend().clone());
        self.serving.take_over(choice, watch, started);
        (self.stream, self.body) = (stream, body);
        (self.gaps, self.spliced) = (Gaps::default(), Some(Spliced { from, ..Spliced::default() }));
        self.clocks.since = clock::now();
        self.begin_leg();
    }

    /// A leg has broken for `cause`: another one, or the error.
    fn go_on_or_end(&mut self, cause: Cause, facts: Option<&Facts>) {
        let Some(resume) = &mut self.resume else { return self.end_with_error(cause) };
        if let Some(end) = resume.end_at_limit() {
            self.broken = None;
            self.serving.ledger.ended(End::Complete);
            return self.ahead.push_back(end);
        }
        let Serving { choice, ledger, .. } = &self.serving;
        match resume.search(cause, choice, facts, ledger.attempts()) {
            Ok(()) => self.broken = Some(cause),
            Err(refused) => {
                choice.pool.state.metrics.count_resume(refused);
                self.end_with_error(cause);
            }
        }
    }

    fn end_with_error(&mut self, cause: Cause) {
        self.end_with(&Refusal::Lost(cause));
    }

    fn end_with(&mut self, refusal: &Refusal) {
        self.broken = None;
        self.serving.ledger.ended(End::Error);
        let sequence = self.stream.next_sequence();
        let event = last_event(&self.serving.ledger, self.dialect, self.endpoint, refusal, sequence);
        self.ahead.push_back(event);
        self.ahead.retain(|chunk| !chunk.is_empty());
    }

    /// This leg has been silent for longer than is usual, and not because its client does not take what has come.
    fn is_silent(&self) -> bool {
        let usual = self.serving.choice.pool.soft_token_gap();
        self.gaps.waits_since.is_some_and(|since| clock::now().since(since) >= usual)
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
        if self.defers(Over::Ended(clean)) {
            self.body = None;
            return;
        }
        self.serving.choice.in_flight.rests();
        if self.gaps.events >= STRETCH_MIN {
            self.learn_gaps(clock::now());
        }
        match self.stream.end(clean) {
            Ending::Whole(rest) => {
                self.body = None;
                self.keep("kept");
                if self.spliced.is_none() {
                    self.ahead.extend((!rest.is_empty()).then_some(rest));
                } else if !self.splice(VecDeque::from([rest])) {
                    return;
                }
                if !self.complete_spliced() {
                    return self.broke(Cause::EndedEarly);
                }
                match clean {
                    Ok(()) => self.serving.complete(),
                    Err(cause) => self.serving.broke(Phase::Tail, cause, End::Complete),
                }
            }
            Ending::Broken(cause) => self.broke(cause),
        }
    }

    /// Whether the client has the whole answer; what a leg behind the first left out of its tail is written.
    fn complete_spliced(&mut self) -> bool {
        let (Some(resume), Some(spliced)) = (&mut self.resume, &self.spliced) else { return true };
        let mut out = Vec::new();
        resume.splice.complete(&mut out);
        self.ahead.extend((!out.is_empty()).then(|| Bytes::from(out)));
        spliced.finished
    }

    /// The connection is closed at once; the client gets what completes its answer, or another leg, or the error.
    fn broke(&mut self, cause: Cause) {
        self.body = None;
        if self.defers(Over::Broke(cause)) {
            return;
        }
        self.serving.choice.in_flight.rests();
        let whole = match &self.spliced {
            None => self.stream.is_complete(),
            Some(spliced) => spliced.finished,
        };
        if !whole {
            (self.gap_since, self.gap_cause) = (self.clocks.since, cause);
            let facts = self.serving.leave(Phase::Stream, cause);
            if self.moving.is_some() {
                return self.break_in_move(cause, Some(&facts));
            }
            return self.go_on_or_end(cause, Some(&facts));
        }
        self.keep("kept");
        match &self.spliced {
            None => self.ahead.push_back(self.stream.complete_locally()),
            Some(_) => {
                self.complete_spliced();
            }
        }
        self.serving.broke(Phase::Tail, cause, End::Complete);
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
        self.begin_move(Cause::Silence);
        true
    }
}
