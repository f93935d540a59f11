//! A second opinion on one token said over and over (F22): what is held back of a stream, and the peer that is asked.
//!
//! `policy::degenerate` says what a run is and when to ask; here events wait, and the peer is listened to. It goes on
//! from what the client has, in a splice of its own, so that the stream can go on either way: where the peer repeats
//! the run, what was held is relayed; where it says something else, the relay takes its leg over. Held events are not
//! noted as delivered. Whatever goes wrong with the peer, and when it takes too long, they are let go: a second
//! opinion never costs an answer. A peer that is late is still heard, but for the backend's record alone.
//!
//! Only the first leg of a stream is watched.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::clock::{self, ALARM_TICK, Alarm};
use crate::policy::Moment;
use crate::policy::degenerate::{
    self, HELD_EVENTS_MAX, HELD_MAX, HELD_WARY_MAX, LOOK_AHEAD_MAX, Opinion, RunWatch, Step, repeats_itself,
};
use crate::policy::dialect::{Endpoint, EventFacts, TextKind, read_event};
use crate::policy::health::Observation;
use crate::policy::json::Reader;
use crate::policy::resume::{Abandon, Plan, Splice};
use crate::policy::retry::{Cause, Phase};
use crate::pool::{About, Choice, Pool};
use crate::proxy::ledger::Entry;
use crate::proxy::resume::{Asking, Resumer};
use crate::proxy::sse_relay::NextLeg;
use crate::proxy::token_stream::{Fed, TokenStream};
use crate::proxy::worker::Worker;
use crate::sse::{Decoder, Event};
use crate::telemetry::metrics::AttemptOutcome;

/// Role of an attempt that is asked about another one's output.
pub(super) const ROLE: &str = "opinion";

/// A peer that is too late for the client is heard for so long.
const LATE_MAX: Duration = Duration::from_secs(5);

/// So much of another text, or its end, is needed to believe a peer while there is time: it may repeat itself too.
const PROOF_BYTES: usize = 16;

/// What waits of one stream, and who is asked about it.
#[derive(Default)]
pub(super) struct Opinions {
    run: RunWatch,
    /// Whole events, as they came.
    held: VecDeque<Bytes>,
    /// Data of those events, one behind the other, and where each ends.
    data: Vec<u8>,
    ends: Vec<usize>,
    /// Since when something waits, and since when it is a run.
    since: Moment,
    run_since: Option<Moment>,
    peer: Option<Box<Peer>>,
    /// How the stream ended while a peer was asked.
    over: Option<Over>,
    alarm: Option<Alarm>,
    set_for: Moment,
}

/// How a leg ended.
#[derive(Clone, Copy)]
pub(super) enum Over {
    /// With its body.
    Ended(Result<(), Cause>),
    /// Before.
    Broke(Cause),
}

/// How the relay goes on.
pub(super) enum Settled {
    /// With what was held; for this reason, where a peer was asked.
    Release(Option<&'static str>),
    /// With the peer.
    Replace(Box<Taken>),
    /// With what was held, or as before: a peer disagrees, and it is too late for the client.
    Disputed {
        /// Its name.
        peer: String,
        /// Whether that is proof against the backend.
        offence: bool,
    },
    /// As before; for this reason, where a peer was late.
    GoOn(Option<&'static str>),
}

/// The leg of a peer that is taken over.
pub(super) struct Taken {
    pub(super) splice: Splice,
    pub(super) plan: Plan,
    /// What it has said that the client is to get.
    pub(super) out: Vec<u8>,
    pub(super) leg: NextLeg,
    /// Whether it is proof against the backend.
    pub(super) offence: bool,
}

/// What one chunk means for the events that are held.
struct Parting {
    /// Bytes from here on are held.
    from: Option<usize>,
    /// What was held before goes.
    release: bool,
    /// Bytes of the first event that came in earlier chunks.
    carried: usize,
    /// There is memory left for what the client has.
    room: bool,
    ask: bool,
}

impl Opinions {
    /// For a stream of this pool that can be resumed; none where nobody could be asked, or events are told in another
    /// way than those of chats and completions.
    pub(super) fn of(pool: &Pool, endpoint: Endpoint) -> Option<Box<Self>> {
        let is_told_so = matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
        (is_told_so && pool.config.resume.second_opinion && pool.members.len() > 1).then(Box::default)
    }

    /// Reads a chunk of the first leg. What may go to the client is appended to `out` and noted; the rest waits. The
    /// second value is false once there is no memory for what the client has, the third true when a peer is to be
    /// asked.
    pub(super) fn feed(
        &mut self,
        stream: &mut TokenStream,
        chunk: Bytes,
        out: &mut VecDeque<Bytes>,
        resume: &mut Resumer,
        wary: bool,
    ) -> (Fed, bool, bool) {
        let (before, mut parting) = (out.len(), self.parting());
        let fed = stream.feed(chunk, out, |event, facts| self.take(event, facts, wary, resume, &mut parting));
        self.part(out, before, &parting);
        (fed, parting.room, parting.ask)
    }

    /// The same for the events that came before the gate: they are in `out` already.
    pub(super) fn feed_ahead(
        &mut self,
        endpoint: Endpoint,
        out: &mut VecDeque<Bytes>,
        resume: &mut Resumer,
        wary: bool,
    ) -> (bool, bool) {
        // An event may lie in two chunks. They are few and small.
        if out.len() > 1 {
            let whole: Vec<u8> = out.drain(..).flatten().collect();
            out.push_back(whole.into());
        }
        let mut parting = self.parting();
        let mut decoder = Decoder::new(usize::MAX);
        for chunk in out.iter() {
            // They were read before, and are valid.
            let _ = decoder.feed(chunk, |event| {
                let facts = read_event(endpoint, &event).unwrap_or_default();
                self.take(&event, &facts, wary, resume, &mut parting);
                ControlFlow::Continue(())
            });
        }
        self.part(out, 0, &parting);
        (parting.room, parting.ask)
    }

    /// A peer has spoken about the run: what was held goes to the client, up to where another one begins.
    pub(super) fn resume_watching(
        &mut self,
        endpoint: Endpoint,
        out: &mut VecDeque<Bytes>,
        resume: &mut Resumer,
        wary: bool,
    ) -> (bool, bool) {
        let mut held = std::mem::take(&mut self.held);
        (self.run_since, self.peer) = (None, None);
        self.data.clear();
        self.ends.clear();
        self.run.released();
        let fed = self.feed_ahead(endpoint, &mut held, resume, wary);
        out.append(&mut held);
        fed
    }

    fn parting(&self) -> Parting {
        let from = self.is_holding().then_some(0);
        Parting { from, release: false, carried: 0, room: true, ask: false }
    }

    fn take(
        &mut self,
        event: &Event<'_>,
        facts: &EventFacts,
        wary: bool,
        resume: &mut Resumer,
        parting: &mut Parting,
    ) {
        let mut at = parting.carried + event.start;
        if event.is_carried() {
            (at, parting.carried) = (0, event.raw.len() - (event.end - event.start));
        }
        // A comment tells the client nothing; it goes or waits with what stands around it.
        if !event.has_data {
            return;
        }
        let step = match () {
            () if parting.ask || self.is_asking() => Step::Hold,
            () if facts.meaningful || facts.finish.is_some() || facts.done => {
                let text = facts.text.filter(|text| text.kind != TextKind::Other);
                self.run.see(text.map(|text| &event.data[text.start..text.end]), wary)
            }
            () if self.is_holding() => Step::Hold,
            () => {
                parting.room &= resume.observe(event.data, facts);
                return;
            }
        };
        match step {
            Step::Pass => {
                parting.room &= self.note(resume) && resume.observe(event.data, facts);
                (parting.release, parting.from) = (true, None);
            }
            Step::Begin => {
                parting.room &= self.note(resume);
                (parting.release, parting.from) = (true, Some(at));
                self.keep(event.data);
                self.since = clock::now();
            }
            Step::Hold | Step::Ask => {
                self.keep(event.data);
                parting.ask |= step == Step::Ask;
                if self.run_since.is_none() && self.run.is_run() {
                    self.run_since = Some(clock::now());
                }
            }
        }
    }

    /// Chunks of `out` from `before` on are parted.
    fn part(&mut self, out: &mut VecDeque<Bytes>, before: usize, parting: &Parting) {
        let releases = parting.release && !self.held.is_empty();
        if !releases && parting.from.is_none() {
            return;
        }
        let fresh: SmallVec<[Bytes; 2]> = out.drain(before..).collect();
        if parting.release {
            out.extend(self.held.drain(..));
        }
        let mut left = parting.from.unwrap_or(usize::MAX);
        for mut bytes in fresh {
            let goes = bytes.split_to(left.min(bytes.len()));
            left -= goes.len();
            out.extend((!goes.is_empty()).then_some(goes));
            self.held.extend((!bytes.is_empty()).then_some(bytes));
        }
    }

    fn keep(&mut self, data: &[u8]) {
        self.data.extend_from_slice(data);
        self.ends.push(self.data.len());
    }

    /// The client gets what was held.
    fn note(&mut self, resume: &mut Resumer) -> bool {
        let (mut room, mut start) = (true, 0);
        for end in self.ends.drain(..) {
            room &= resume.observe(&self.data[start..end], &EventFacts::default());
            start = end;
        }
        self.data.clear();
        self.run_since = None;
        room
    }

    /// Whether events wait.
    pub(super) fn is_holding(&self) -> bool {
        !self.ends.is_empty()
    }

    fn is_asking(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| !peer.late)
    }

    /// Whether the backend had better not be read on.
    pub(super) fn is_full(&self) -> bool {
        self.is_asking() && self.ends.len() >= HELD_EVENTS_MAX as usize
    }

    /// Lets go what is held; false if there is no memory to note it.
    pub(super) fn release(&mut self, out: &mut VecDeque<Bytes>, resume: &mut Resumer) -> bool {
        out.extend(self.held.drain(..));
        self.run.released();
        self.note(resume)
    }

    /// The stream has ended so. True if that has to wait for the peer.
    pub(super) fn defers(&mut self, over: Over) -> bool {
        let waits = self.is_holding() && self.is_asking();
        if waits {
            self.over = Some(over);
        }
        waits
    }

    /// How it had ended.
    pub(super) fn take_over(&mut self) -> Option<Over> {
        self.over.take()
    }

    /// Asks a peer of the backend chosen; false if nobody can be.
    pub(super) fn ask(&mut self, resume: &mut Resumer, choice: &Choice, attempts: u8) -> bool {
        let (backend, mut splice) = (choice.backend().id, resume.splice.clone());
        let from = splice.text_from(0).len();
        let quoted = [b"\"", self.run.unit(), b"\""].concat();
        let unit = Reader::new(&quoted).value().ok();
        let Some(unit) = unit.and_then(|unit| unit.as_str().map(|text| text.into_owned())) else {
            return false;
        };
        let Some((plan, asking)) = resume.ask_peer(&mut splice, backend, choice.record.is_wary(), attempts)
        else {
            return false;
        };
        let told = self.run.told() as usize * unit.len();
        self.peer = Some(Box::new(Peer {
            splice,
            plan,
            from,
            own: from - told.min(from),
            units: self.run.untold(),
            unit,
            out: Vec::new(),
            differs: None,
            hearing: Hearing::Asking(asking),
            began: clock::now(),
            late: false,
        }));
        true
    }

    /// Whether there is nothing to poll.
    pub(super) fn is_idle(&self) -> bool {
        !self.is_holding() && self.peer.is_none()
    }

    /// Listens to the peer, and looks at the clock. Attempts in vain are given to `write`.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        worker: &Worker,
        wary: bool,
        mut write: impl FnMut(Entry),
    ) -> Poll<Settled> {
        if let Some(peer) = &mut self.peer
            && let Poll::Ready(view) = peer.poll(cx, worker, &mut write)
        {
            return Poll::Ready(self.heard(view, write));
        }
        let due = match (&self.peer, self.run_since) {
            (Some(peer), _) if peer.late => peer.began + LATE_MAX,
            (_, Some(since)) => since + if wary { HELD_WARY_MAX } else { HELD_MAX },
            (_, None) => self.since + LOOK_AHEAD_MAX,
        };
        let alarm = self.alarm.get_or_insert_with(|| worker.alarms.alarm());
        if self.set_for != due {
            // It may ring a tick late.
            alarm.set(due - ALARM_TICK);
            self.set_for = due;
        }
        ready!(alarm.poll_expired(cx));
        self.set_for = Moment::ZERO;
        Poll::Ready(match self.peer.take() {
            None => Settled::Release(None),
            Some(mut peer) if peer.late => {
                peer.write(AttemptOutcome::Cancelled, &mut write);
                Settled::GoOn(Some("none"))
            }
            Some(peer) if peer.may_be_believed() => {
                let agreed = peer.differs.unwrap_or(0);
                self.replace(peer, agreed)
            }
            Some(mut peer) => {
                peer.late = true;
                self.peer = Some(peer);
                Settled::Release(None)
            }
        })
    }

    fn heard(&mut self, view: View, mut write: impl FnMut(Entry)) -> Settled {
        let Some(mut peer) = self.peer.take() else { return Settled::GoOn(None) };
        let late = peer.late;
        if let View::Replace(agreed) = view
            && !late
        {
            return self.replace(peer, agreed);
        }
        let name = peer.name();
        peer.write(AttemptOutcome::Cancelled, &mut write);
        let settled = if late { Settled::GoOn } else { Settled::Release };
        match view {
            View::Replace(agreed) => {
                Settled::Disputed { peer: name, offence: degenerate::is_offence(agreed) }
            }
            View::Apart => Settled::Disputed { peer: name, offence: true },
            View::Repeats => settled(Some("repeated")),
            View::Nothing => settled(Some("none")),
        }
    }

    fn replace(&mut self, peer: Box<Peer>, agreed: u32) -> Settled {
        let Peer { splice, plan, out, hearing, .. } = *peer;
        let Hearing::Speaking(leg) = hearing else { return Settled::Release(Some("none")) };
        let offence = degenerate::is_offence(agreed);
        Settled::Replace(Box::new(Taken { splice, plan, out, leg: *leg, offence }))
    }
}

/// A peer that goes on from before the run.
struct Peer {
    /// What the client has, and what the peer says behind it.
    splice: Splice,
    plan: Plan,
    /// Bytes of text that the client has, and how many of them stand before the run.
    from: usize,
    own: usize,
    /// The run, as text, and how much of it is held.
    unit: String,
    units: u32,
    /// Events for the client, should it be believed.
    out: Vec<u8>,
    /// It says something else, after so many units.
    differs: Option<u32>,
    hearing: Hearing,
    began: Moment,
    /// What was held has been let go.
    late: bool,
}

enum Hearing {
    Asking(Asking),
    Speaking(Box<NextLeg>),
    /// It was written down; its name.
    Over(String),
}

/// What a peer makes of it.
#[derive(Clone, Copy)]
enum View {
    Repeats,
    /// It says something else behind what the client has, after so many units.
    Replace(u32),
    /// It does not say what the client has of the run.
    Apart,
    /// It has none.
    Nothing,
}

impl Peer {
    fn poll(&mut self, cx: &mut Context<'_>, worker: &Worker, write: &mut impl FnMut(Entry)) -> Poll<View> {
        loop {
            let raw = match &mut self.hearing {
                Hearing::Asking(asking) => {
                    let heard = ready!(asking.as_mut().poll(cx));
                    heard.failed.into_iter().for_each(&mut *write);
                    let Some((leg, ahead)) = heard.leg.and_then(|leg| NextLeg::of(*leg)) else {
                        return Poll::Ready(View::Nothing);
                    };
                    leg.choice.in_flight.streams();
                    self.hearing = Hearing::Speaking(Box::new(leg));
                    self.splice.begin_leg(&self.plan);
                    ahead
                }
                Hearing::Speaking(leg) => {
                    let Some(body) = &mut leg.body else { return Poll::Ready(self.ended()) };
                    let mut raw = VecDeque::new();
                    match ready!(body.poll_frame(cx)) {
                        Some(Ok(frame)) => {
                            let Ok(chunk) = frame.into_data() else { continue };
                            let fed = leg.stream.feed(chunk, &mut raw, |_, _| {});
                            leg.choice.in_flight.moved(clock::now());
                            if fed.broken.is_some() || fed.too_large {
                                return Poll::Ready(self.broke(worker, write));
                            }
                        }
                        Some(Err(_)) => return Poll::Ready(self.broke(worker, write)),
                        None => leg.body = None,
                    }
                    raw
                }
                Hearing::Over(_) => return Poll::Ready(View::Nothing),
            };
            if let Some(view) = self.listen(raw) {
                return Poll::Ready(view);
            }
        }
    }

    fn listen(&mut self, raw: VecDeque<Bytes>) -> Option<View> {
        for events in raw {
            let view = match self.splice.feed(&events, &mut self.out) {
                Ok(_) => None,
                // It has something else where the client has the beginning of the run.
                Err(Abandon::Diverged) if self.own < self.from && self.splice.repeated() >= self.own => {
                    Some(View::Apart)
                }
                Err(_) => Some(View::Nothing),
            };
            if view.is_some() {
                return view;
            }
        }
        let said = self.splice.text_from(self.from);
        let ended = self.splice.is_finished();
        match degenerate::compare(&self.unit, self.units, said, ended) {
            Opinion::Open => None,
            Opinion::Repeats => Some(View::Repeats),
            Opinion::Differs(agreed) => {
                self.differs = Some(agreed);
                let other = self.other(agreed);
                match ended || other.len() >= PROOF_BYTES {
                    // Both repeat themselves, and not alike: who is to be believed?
                    true if repeats_itself(other) => Some(View::Nothing),
                    true => Some(View::Replace(agreed)),
                    false => None,
                }
            }
        }
    }

    /// What it says behind as much as it `agreed` with.
    fn other(&self, agreed: u32) -> &[u8] {
        self.splice.text_from(self.from + agreed as usize * self.unit.len())
    }

    /// Its body has ended.
    fn ended(&self) -> View {
        match self.differs {
            Some(agreed) if self.splice.is_finished() => View::Replace(agreed),
            _ => View::Nothing,
        }
    }

    /// It has no more time to say more.
    fn may_be_believed(&self) -> bool {
        self.differs.is_some_and(|agreed| !repeats_itself(self.other(agreed)))
    }

    fn broke(&mut self, worker: &Worker, write: &mut impl FnMut(Entry)) -> View {
        if let Hearing::Speaking(leg) = &self.hearing {
            let choice = &leg.choice;
            worker.with_rng(|rng| choice.observe(About::Model, Observation::Fault, rng));
            choice.count_fault();
        }
        self.write(AttemptOutcome::Fault, write);
        View::Nothing
    }

    fn name(&self) -> String {
        match &self.hearing {
            Hearing::Asking(_) => String::new(),
            Hearing::Over(name) => name.clone(),
            Hearing::Speaking(leg) => leg.choice.backend().name.clone(),
        }
    }

    /// Writes the attempt down, which has ended.
    fn write(&mut self, outcome: AttemptOutcome, write: &mut impl FnMut(Entry)) {
        if let Hearing::Speaking(leg) = &self.hearing {
            leg.choice.in_flight.rests();
            let entry = entry(leg, outcome);
            self.hearing = Hearing::Over(entry.backend.name.clone());
            write(entry);
        }
    }
}

/// An attempt that was asked, and is over.
fn entry(leg: &NextLeg, outcome: AttemptOutcome) -> Entry {
    let cause = match outcome {
        AttemptOutcome::Fault => Cause::Truncated.name(),
        _ => "opinion_given",
    };
    Entry {
        backend: leg.choice.backend().clone(),
        role: ROLE,
        outcome,
        cause,
        phase: Phase::Stream.name(),
        reused: leg.reused,
        started: leg.started,
        first_byte: leg.first_byte,
        lasted: Some(clock::now().since(leg.started)),
    }
}
