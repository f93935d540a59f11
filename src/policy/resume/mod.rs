//! Mid-stream resume: one client stream told by several replicas, each going on where the last one broke.
//!
//! ```text
//! request ─▶ Splice::arm          may this be resumed at all?
//! leg 1   ─▶ observe(event)…      what the client holds is noted
//! break   ─▶ plan(engine) ─▶ begin_leg ─▶ feed(event)…   the next leg; again at the next break
//! ```
//!
//! Two strategies. **Text** asks an engine that is known to do so to continue the answer, and pays one prefill.
//! **Replay** sends the original request again, compares all that the client holds with what the new leg says,
//! swallows it while it is equal and goes on at the first new character; any engine will do, and it is exact
//! by construction.
//!
//! Invariant: what the client gets is one answer. Text is only added; a leg that says something else than the
//! client was told is abandoned before any of it is written. One role, one finish, one `[DONE]`, one `id`,
//! `created`, `model`. No text follows a finish, and no event is written that its leg did not say whole.
//!
//! Not here: which backend, when to give up on a leg that says nothing, and the error event of a stream that
//! cannot go on. Events are bounded and judged by the caller's reader too; an engine's error abandons a leg.
//! docs/adr/0017-resume.md lists each guard with the test that fails without it.

mod anthropic;
mod beside;
mod chunk;
mod continuation;
mod edit;
mod engines;
mod exact;
#[cfg(test)]
mod exact_tests;
#[cfg(test)]
mod id_model;
mod ids;
mod journal;
#[cfg(test)]
mod model;
mod ollama;
#[cfg(test)]
mod tests;
mod unseen;
mod wire;

use std::borrow::Cow;
use std::fmt;
use std::ops::ControlFlow;

use smallvec::SmallVec;

pub use self::engines::{Build, TOKENIZED, Version};
pub use self::unseen::{ASKED_EVENT_BYTES_MAX, Unseen, ask_for_ids};

use self::beside::Beside;
use self::chunk::{Channel, Chunk};
use self::continuation::{Seam, Verdict, continuation, told_by_ids};
use self::edit::Edits;
use self::exact::{Exact, exact, is_spent, leaks, to_chat_chunk};
use self::ids::Ids;
use self::journal::{Cursor, Journal, completion_tokens};
use self::unseen::hide;
use self::wire::{Framing, Wire};
use super::dialect::{Endpoint, Engine, EventFacts, read_ids, request_facts};
use super::json::{Value, scan_top_level, write_string};
use crate::sse::{Event, write_event};

/// A leg's event larger than this is not waited for. The caller's own bound is lower, and configured; this
/// one only keeps a caller without one from growing without end.
const EVENT_BYTES_MAX: usize = 64 << 20;

/// How far to go to finish a broken stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumeMode {
    /// Continue where an engine can, replay elsewhere.
    Best,
    /// Replay only.
    Replay,
    /// Never.
    Off,
}

impl ResumeMode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Best, Self::Replay, Self::Off];

    /// Its name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Best => "best",
            Self::Replay => "replay",
            Self::Off => "off",
        }
    }
}

/// Whether an engine that gives token ids is asked for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestIds {
    /// Where they can be used.
    Auto,
    /// Only by a client.
    Never,
}

impl RequestIds {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Auto, Self::Never];

    /// Its name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Never => "never",
        }
    }
}

/// The bounds of resuming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResumePolicy {
    /// Default `best`.
    pub mode: ResumeMode,
    /// Default `auto`.
    pub request_ids: RequestIds,
    /// Resumes of one stream that gave the client something. Default 2: a request that broke three
    /// replicas is more likely the cause than the victim.
    pub resumes_max: u8,
    /// A longer answer, in events with text, is not generated again. Default 4096: about a minute of
    /// silence at 70 tokens a second.
    pub replay_tokens_max: u32,
    /// What is noted of one stream, in bytes; beyond it the stream goes on and cannot be resumed. Default
    /// 256 KiB, some 60,000 tokens.
    pub journal_bytes_max: usize,
    /// Whether a peer is asked when a replica says one token over and over. Default true.
    pub second_opinion: bool,
}

impl Default for ResumePolicy {
    fn default() -> Self {
        Self {
            mode: ResumeMode::Best,
            request_ids: RequestIds::Auto,
            resumes_max: 2,
            replay_tokens_max: 4096,
            journal_bytes_max: 256 << 10,
            second_opinion: true,
        }
    }
}

/// A [`ResumePolicy`] that cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadResumePolicy {
    /// `resumes_max` is 0: say `mode = "off"`.
    NoResumes,
    /// `journal_bytes_max` is below 1 KiB: no answer would fit.
    TinyJournal,
}

/// Less than a paragraph.
const JOURNAL_BYTES_MIN: usize = 1 << 10;

impl fmt::Display for BadResumePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoResumes => write!(f, "resumes_max must be at least 1; mode = \"off\" turns resuming off"),
            Self::TinyJournal => write!(f, "journal_bytes_max must be at least {JOURNAL_BYTES_MIN} bytes"),
        }
    }
}

impl std::error::Error for BadResumePolicy {}

impl ResumePolicy {
    /// Whether it can work.
    pub fn validate(&self) -> Result<(), BadResumePolicy> {
        if self.resumes_max == 0 {
            return Err(BadResumePolicy::NoResumes);
        }
        if self.journal_bytes_max < JOURNAL_BYTES_MIN {
            return Err(BadResumePolicy::TinyJournal);
        }
        Ok(())
    }
}

/// A way to go on with a broken stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The engine continues the token ids it is given.
    Exact,
    /// The same for a chat, by a completion whose chunks are translated back.
    ExactTranslated,
    /// The engine continues the text it is given.
    Text,
    /// The whole answer is generated again and compared.
    Replay,
}

impl Strategy {
    /// For a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::ExactTranslated => "exact_translated",
            Self::Text => "text",
            Self::Replay => "replay",
        }
    }
}

/// Why a request is not armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotArmed {
    /// `mode = "off"`.
    Off,
    /// Its streams cannot be spliced, or came framed in another way than the API's.
    Endpoint,
    /// No JSON object, as far as was looked.
    Body,
    /// An answer in one piece was asked for.
    NotAStream,
    /// More than one choice was.
    Choices,
    /// Sending it twice might be noticed.
    Stateful,
}

impl NotArmed {
    /// For a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Endpoint => "endpoint",
            Self::Body => "body",
            Self::NotAStream => "not_a_stream",
            Self::Choices => "choices",
            Self::Stateful => "stateful",
        }
    }
}

/// Why a break is not resumed. Those behind [`ReplayTooLong`](Self::ReplayTooLong) refuse continuation only, and
/// are told when replay is not to be had either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The answer has ended already: nothing is missing but its terminator.
    Complete,
    /// The answer outgrew the journal.
    Overflow,
    /// The client was told something that is not understood here.
    Unreadable,
    /// As many legs as are allowed have spoken.
    ResumesExhausted,
    /// Every strategy was tried, or does not apply.
    StrategiesExhausted,
    /// The answer is too long to be generated again.
    ReplayTooLong,
    /// No text yet.
    NothingDelivered,
    /// A tool call has begun.
    ToolsBegun,
    /// The model was thinking, or had been.
    Reasoning,
    /// It is refusing.
    Refusal,
    /// The engine's automaton would start again.
    Grammar,
    /// Log probabilities or token ids were asked for.
    Details,
    /// The client itself had the engine continue a message.
    Prefilled,
    /// The prompt is not one string, or must fit with something.
    Prompt,
    /// Stop strings are part of the output.
    Stop,
    /// The sampler remembers.
    Sampler,
    /// The text ends in white space, which the engine's template may drop.
    TrailingSpace,
    /// There is a limit, and the tokens spent are not known.
    TokensUnknown,
    /// The limit is reached, and only the finish is missing.
    LimitReached,
    /// The body cannot be edited.
    Body,
    /// Token ids are missing, or too far behind the text.
    Ids,
    /// A member of the request is not known to mean the same in a completion.
    Member,
    /// The engine does not continue.
    Engine,
}

impl Refused {
    /// For a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Overflow => "overflow",
            Self::Unreadable => "unreadable",
            Self::ResumesExhausted => "resumes_exhausted",
            Self::StrategiesExhausted => "strategies_exhausted",
            Self::ReplayTooLong => "replay_too_long",
            Self::NothingDelivered => "nothing_delivered",
            Self::ToolsBegun => "tools_begun",
            Self::Reasoning => "reasoning",
            Self::Refusal => "refusal",
            Self::Grammar => "grammar",
            Self::Details => "details",
            Self::Prefilled => "prefilled",
            Self::Prompt => "prompt",
            Self::Stop => "stop",
            Self::Sampler => "sampler",
            Self::TrailingSpace => "trailing_space",
            Self::TokensUnknown => "tokens_unknown",
            Self::LimitReached => "limit_reached",
            Self::Body => "body",
            Self::Ids => "ids",
            Self::Member => "member",
            Self::Engine => "engine",
        }
    }
}

/// Why a leg is given up. What it had written before stays, and belongs to the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abandon {
    /// It says something else than the client was told.
    Diverged,
    /// The seam lies inside tokens whose log probabilities or ids cannot be parted.
    Unsplittable,
    /// It repeats what it was given to continue.
    Echo,
    /// Another model answers.
    WrongModel,
    /// The continuation of an answer came as thinking.
    Misfiled,
    /// It speaks without having shown that it was given the ids to continue.
    IdsIgnored,
    /// It speaks of another choice.
    Choices,
    /// An event that is no JSON, is too large, or is not understood.
    Unreadable,
    /// An error, or a finish that says the engine gave up.
    Failed,
    /// `[DONE]` before a finish.
    EndedEarly,
    /// The client has meanwhile got from another leg what this one was to say.
    Overtaken,
    /// There is no leg: none was begun, or it was given up before.
    NoLeg,
}

impl Abandon {
    /// For a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Diverged => "diverged",
            Self::Unsplittable => "unsplittable",
            Self::Echo => "echo",
            Self::WrongModel => "wrong_model",
            Self::Misfiled => "misfiled",
            Self::IdsIgnored => "ids_ignored",
            Self::Choices => "choices",
            Self::Unreadable => "unreadable",
            Self::Failed => "failed",
            Self::EndedEarly => "ended_early",
            Self::Overtaken => "overtaken",
            Self::NoLeg => "no_leg",
        }
    }
}

/// What can be asked of the backends that might go on with a stream. All of one engine; from an engine alone: that
/// it continues texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// `None`: not known, so that only a replay is possible.
    pub engine: Option<Engine>,
    /// One continues texts.
    pub text: bool,
    /// One continues token ids.
    pub ids: bool,
    /// Tokens that fit into its context, prompt and answer.
    pub context_max: Option<u64>,
}

/// Peers of one engine that continue texts.
#[cfg(test)]
impl From<Option<Engine>> for Peers {
    fn from(engine: Option<Engine>) -> Self {
        Self { engine, text: engine.is_some(), ids: false, context_max: None }
    }
}

/// How to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Which way.
    pub strategy: Strategy,
    /// The path to ask, where it is another than the client's.
    pub path: Option<&'static str>,
    /// The body to send; `None`: the original.
    pub body: Option<Vec<u8>>,
}

/// What a call of [`Splice::feed`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fed {
    /// The leg has given the client something new, now or before: a character, or the finish.
    pub spoke: bool,
    /// The finish was written. Usage and `[DONE]` may follow; see [`Splice::complete`].
    pub finished: bool,
}

/// One client stream over all its legs.
#[derive(Clone, Debug)]
pub struct Splice {
    endpoint: Endpoint,
    wire: Wire,
    policy: ResumePolicy,
    journal: Journal,
    withdrawn: SmallVec<[Strategy; 4]>,
    /// The engine of the first leg, if it was asked for ids.
    tells_ids: Option<Engine>,
    /// Legs after the first that spoke.
    resumes: u8,
    /// For the leg that was planned last, if it continues.
    seam: Option<Seam>,
    leg: Option<Leg>,
    /// Bytes that the last replay had repeated when it differed.
    repeated: usize,
    /// A leg that is begun while `leg`, or the first, still speaks.
    beside: Option<Beside>,
    /// Bytes of text when that was planned.
    planned_at: usize,
}

/// A leg after the first.
#[derive(Clone, Debug)]
struct Leg {
    framing: Framing,
    told: Told,
}

impl Leg {
    fn held(&self) -> usize {
        self.framing.pending() + self.told.held()
    }
}

#[derive(Clone, Debug)]
struct Told {
    spoke: bool,
    way: Way,
}

#[derive(Clone, Debug)]
enum Way {
    Replay(Cursor),
    Continue {
        /// `None` once the seam was passed.
        seam: Option<Seam>,
        /// Data of the events that the seam holds back.
        waiting: Vec<Vec<u8>>,
        /// Tokens of the text that this leg did not generate.
        base: Option<u64>,
        /// Where it was given ids.
        by_ids: Option<ByIds>,
    },
}

/// A leg that continues ids.
#[derive(Clone, Debug)]
struct ByIds {
    /// Its chunks are those of a completion, and the client's those of a chat.
    translated: bool,
    /// It has shown that it was given the ids.
    proved: bool,
    /// How far it has said again what was delivered behind the seam; `None` once it has said all.
    again: Option<Cursor>,
}

impl Splice {
    /// From the request as the client sent it.
    pub fn arm(endpoint: Endpoint, body: &[u8], policy: &ResumePolicy) -> Result<Self, NotArmed> {
        if policy.mode == ResumeMode::Off {
            return Err(NotArmed::Off);
        }
        let Some(wire) = Wire::of(endpoint) else { return Err(NotArmed::Endpoint) };
        let facts = request_facts(endpoint, body).map_err(|_| NotArmed::Body)?;
        if !facts.stream {
            return Err(NotArmed::NotAStream);
        }
        if facts.choices != 1 {
            return Err(NotArmed::Choices);
        }
        if facts.stateful.is_some() {
            return Err(NotArmed::Stateful);
        }
        Ok(Self {
            endpoint,
            wire,
            policy: *policy,
            journal: Journal::default(),
            withdrawn: SmallVec::new(),
            tells_ids: None,
            resumes: 0,
            seam: None,
            leg: None,
            repeated: 0,
            beside: None,
            planned_at: 0,
        })
    }

    /// Leg 1 is of this engine, which tells token ids: because the client asked for them, or, `unseen`, because
    /// [`ask_for_ids`] did.
    pub fn tells_ids(&mut self, engine: Engine, unseen: bool) {
        self.journal.ids = Ids::of(engine);
        self.journal.ids_are_ours = unseen;
        self.tells_ids = Some(engine);
    }

    /// Whether its legs must tell their events by lines.
    pub fn is_lines(&self) -> bool {
        self.wire.is_lines()
    }

    /// Leg 1: the data of each event that was forwarded unchanged (`[DONE]` included). The event must be
    /// valid JSON, as the caller found it; `facts` are of the leg's one reader, or nothing is known of it.
    pub fn observe(&mut self, data: &[u8], facts: &EventFacts) {
        self.journal.observe(self.wire, data, facts, self.policy.journal_bytes_max);
    }

    /// Bytes it holds, for the process-wide memory bound.
    pub fn held(&self) -> usize {
        let legs = self.leg.as_ref().map_or(0, Leg::held) + self.beside.as_ref().map_or(0, Beside::held);
        size_of::<Self>() + self.journal.held() + self.seam.as_ref().map_or(0, Seam::held) + legs
    }

    /// After a break: how to go on at one of `peers`. Strategies that were withdrawn are skipped. The leg that broke
    /// is over.
    pub fn plan(&mut self, peers: impl Into<Peers>, body: &[u8]) -> Result<Plan, Refused> {
        let peers = peers.into();
        self.leg = None;
        self.seam = None;
        let journal = &self.journal;
        if journal.finished {
            return Err(Refused::Complete);
        }
        if journal.overflow {
            return Err(Refused::Overflow);
        }
        if journal.unreadable {
            return Err(Refused::Unreadable);
        }
        if self.resumes >= self.policy.resumes_max {
            return Err(Refused::ResumesExhausted);
        }
        let mut reason = Refused::StrategiesExhausted;
        let by_ids = match self.endpoint {
            Endpoint::ChatCompletions => Strategy::ExactTranslated,
            _ => Strategy::Exact,
        };
        if let Some(engine) = peers.engine.filter(|_| peers.ids && self.policy.mode == ResumeMode::Best)
            && self.may(by_ids)
        {
            match exact(self.endpoint, engine, body, journal, peers.context_max) {
                Ok(Exact { path, body }) => return Ok(Plan { strategy: by_ids, path, body: Some(body) }),
                Err(refused) => reason = refused,
            }
        }
        if self.policy.mode == ResumeMode::Best && self.may(Strategy::Text) {
            match peers
                .engine
                .filter(|_| peers.text)
                .ok_or(Refused::Engine)
                .and_then(|engine| continuation(self.endpoint, engine, body, journal))
            {
                Ok((body, seam)) => {
                    self.seam = Some(seam);
                    return Ok(Plan { strategy: Strategy::Text, path: None, body: Some(body) });
                }
                Err(refused) => reason = refused,
            }
        }
        if !self.may(Strategy::Replay) {
            return Err(reason);
        }
        if journal.text_events > self.policy.replay_tokens_max {
            return Err(Refused::ReplayTooLong);
        }
        Ok(Plan { strategy: Strategy::Replay, path: None, body: None })
    }

    /// The leg of this plan begins (its first byte is about to be fed).
    pub fn begin_leg(&mut self, plan: &Plan) {
        let way = match (plan.strategy, self.journal.ids.seam()) {
            (strategy @ (Strategy::Exact | Strategy::ExactTranslated), Some(seam)) => {
                self.journal.ids.go_back();
                Way::Continue {
                    seam: None,
                    waiting: Vec::new(),
                    base: Some(seam.ids as u64),
                    by_ids: Some(ByIds {
                        translated: strategy == Strategy::ExactTranslated,
                        proved: false,
                        again: Some(Cursor::behind(&self.journal, seam.text))
                            .filter(|again| !again.is_through(&self.journal)),
                    }),
                }
            }
            (Strategy::Text, _) => {
                let base = self.journal.text_tokens.or_else(|| told_by_ids(&self.journal));
                let (prompt, _) = self.journal.ids.given();
                let prompt = (!prompt.is_empty()).then_some(prompt.len() as u64);
                self.journal.prompt_tokens = self.journal.prompt_tokens.or(prompt);
                self.journal.ids.lose();
                Way::Continue { seam: self.seam.take(), waiting: Vec::new(), base, by_ids: None }
            }
            // A replay's ids may differ where its text does not.
            (Strategy::Replay | Strategy::Exact | Strategy::ExactTranslated, _) => {
                self.journal.ids.lose();
                Way::Replay(Cursor::default())
            }
        };
        self.leg =
            Some(Leg { framing: Framing::new(self.wire, EVENT_BYTES_MAX), told: Told { spoke: false, way } });
    }

    /// Leg ≥ 2: raw bytes of whole events of the new leg; what the client gets of them is appended to `out`.
    ///
    /// An error means: abandon this leg. What `out` got before it, in this call too, was verified, counts as
    /// delivered and must be forwarded; nothing else of the leg will be. Comments are dropped.
    pub fn feed(&mut self, raw: &[u8], out: &mut Vec<u8>) -> Result<Fed, Abandon> {
        let Some(Leg { mut framing, mut told }) = self.leg.take() else { return Err(Abandon::NoLeg) };
        let spoke_before = told.spoke;
        let mut result = Ok(());
        let read = framing.feed(raw, |event| {
            result = self.take(&mut told, &event, out);
            if result.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if told.spoke && !spoke_before {
            self.resumes = self.resumes.saturating_add(1);
        }
        result?;
        read.map_err(|_| Abandon::Unreadable)?;
        let fed = Fed { spoke: told.spoke, finished: self.journal.finished };
        self.leg = Some(Leg { framing, told });
        Ok(fed)
    }

    /// Writes the terminator, if the answer has ended and lacks it: for a leg that breaks behind its finish,
    /// or was cancelled there.
    pub fn complete(&mut self, out: &mut Vec<u8>) {
        if self.journal.finished && !self.journal.done {
            self.write_done(out);
        }
    }

    /// Text that the client holds or is about to get, from byte `from` on.
    pub fn text_from(&self, from: usize) -> &[u8] {
        self.journal.text().get(from..).unwrap_or_default()
    }

    /// How far into that text the leg that was abandoned last had repeated it.
    pub fn repeated(&self) -> usize {
        self.repeated
    }

    /// Whether the answer has ended well.
    pub fn is_finished(&self) -> bool {
        self.journal.finished
    }

    /// Whether the terminator was written.
    pub fn is_done(&self) -> bool {
        self.journal.done
    }

    /// The engine answered the plan with a 4xx, or the leg was abandoned: that strategy is withdrawn for this
    /// stream.
    pub fn withdraw(&mut self, strategy: Strategy) {
        if self.may(strategy) {
            self.withdrawn.push(strategy);
        }
    }

    fn may(&self, strategy: Strategy) -> bool {
        !self.withdrawn.contains(&strategy)
    }

    /// One event of a leg.
    fn take(&mut self, told: &mut Told, event: &Event<'_>, out: &mut Vec<u8>) -> Result<(), Abandon> {
        if self.journal.done {
            return Ok(());
        }
        if event.error_field.is_some() {
            return Err(Abandon::Failed);
        }
        if !event.has_data {
            return Ok(());
        }
        if event.data.trim_ascii() == b"[DONE]" {
            if !self.journal.finished {
                return Err(Abandon::EndedEarly);
            }
            self.write_done(out);
            return Ok(());
        }
        let chat;
        let data = match told.is_translated() {
            false => event.data,
            true => {
                chat = to_chat_chunk(event.data).map_err(|_| Abandon::Unreadable)?;
                &chat
            }
        };
        let chunk = self.wire.read(data).map_err(|_| Abandon::Unreadable)?;
        if chunk.error || event.name == Some(b"error") || chunk.finish.is_some_and(|finish| !finish.is_good())
        {
            return Err(Abandon::Failed);
        }
        if chunk.done && chunk.finish.is_none() {
            if !self.journal.finished {
                return Err(Abandon::EndedEarly);
            }
            self.write_done(out);
            return Ok(());
        }
        let Some(choices) = chunk.choices else { return Err(Abandon::Unreadable) };
        if choices > 1 || chunk.index != 0 {
            return Err(Abandon::Choices);
        }
        if self.journal.finished {
            let usage = chunk.usage.is_some() && chunk.said.is_empty() && chunk.finish.is_none();
            if usage {
                self.write(&told.way, data, &chunk, Edits::default(), out);
            }
            return Ok(());
        }
        match &told.way {
            Way::Replay(_) => self.take_again(told, data, &chunk, out),
            Way::Continue { .. } => self.take_more(told, data, &chunk, out),
        }
    }

    /// An event of a replay.
    fn take_again(
        &mut self,
        told: &mut Told,
        data: &[u8],
        chunk: &Chunk<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Abandon> {
        let Way::Replay(cursor) = &mut told.way else { return Err(Abandon::NoLeg) };
        let texts = texts(chunk)?;
        let mut edits = Edits::default();
        let mut news: SmallVec<[usize; 2]> = SmallVec::from_elem(0, texts.len());
        let mut had_mark = false;
        if told.spoke {
            self.journal.unreadable |= chunk.unknown;
        } else {
            if chunk.unknown {
                return Err(Abandon::Unreadable);
            }
            if let Some(mark) = &chunk.mark {
                let passed = cursor.pass(&self.journal, Channel::Mark, mark.as_bytes());
                had_mark = match passed.map_err(|_| Abandon::Diverged)? {
                    0 => false,
                    all if all == mark.len() => true,
                    _ => return Err(Abandon::Diverged),
                };
            }
            for ((said, text), from) in chunk.said.iter().zip(&texts).zip(&mut news) {
                let passed = cursor.pass(&self.journal, said.channel, text.as_bytes());
                self.repeated = cursor.passed();
                *from = passed.map_err(|_| Abandon::Diverged)?;
                if *from > 0 {
                    let rest = quoted(text.get(*from..).unwrap_or_default());
                    for value in [Some(said.value), said.mirror].into_iter().flatten() {
                        edits.replace(value.span(), rest.clone());
                    }
                }
            }
            let through = cursor.is_through(&self.journal);
            if chunk.finish.is_some() && !through {
                return Err(Abandon::Diverged);
            }
            let details = cursor.details;
            let in_chunk = self.journal.details_of(chunk);
            cursor.details += in_chunk;
            let swallowed = had_mark || news.iter().any(|&from| from > 0);
            let texts_said = texts.iter().zip(&news).all(|(text, &from)| from == text.len());
            let silent = texts_said && (had_mark || chunk.mark.is_none());
            if silent && chunk.finish.is_none() {
                let in_detail = in_chunk > 0 && details >= self.journal.details;
                let call =
                    chunk.calls.iter().any(|call| call.id.is_some() && !self.journal.knows(call.index));
                let role = chunk.role.is_some() && !self.journal.role;
                if swallowed || !through || !(in_detail || call || role) {
                    let ahead = cursor.details > self.journal.details;
                    return if ahead { Err(Abandon::Unsplittable) } else { Ok(()) };
                }
            }
            if in_chunk > 0 && (swallowed || details != self.journal.details) {
                return Err(Abandon::Unsplittable);
            }
            // What the client has begun cannot be begun again.
            if had_mark {
                return Err(Abandon::Unsplittable);
            }
        }
        if self.journal.repeats(chunk) {
            return Err(Abandon::Unsplittable);
        }
        self.say(told, data, chunk, &texts, &news, edits, out);
        Ok(())
    }

    /// An event of a continuation.
    fn take_more(
        &mut self,
        told: &mut Told,
        data: &[u8],
        chunk: &Chunk<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Abandon> {
        let Way::Continue { seam, waiting, by_ids, .. } = &mut told.way else { return Err(Abandon::NoLeg) };
        if let (Some(model), Some(known)) = (chunk.model, &self.journal.identity.model)
            && model.raw() != &**known
        {
            return Err(Abandon::WrongModel);
        }
        if chunk.said.iter().any(|said| matches!(said.channel, Channel::Reasoning(_))) {
            return Err(Abandon::Misfiled);
        }
        if chunk.unknown && !told.spoke {
            return Err(Abandon::Unreadable);
        }
        let new = texts(chunk)?;
        if let Some(by_ids) = by_ids {
            let (news, edits) = match by_ids.take(&mut self.journal, chunk, &new, told.spoke)? {
                Some(new) => new,
                None => return Ok(()),
            };
            self.journal.unreadable |= chunk.unknown;
            self.say(told, data, chunk, &new, &news, edits, out);
            return Ok(());
        }
        if let Some(guard) = seam {
            let of_content = chunk.said.iter().zip(&new).filter(|(said, _)| said.channel == Channel::Content);
            let content: String = of_content.map(|(_, text)| &**text).collect();
            let last =
                chunk.finish.is_some() || chunk.said.iter().any(|said| said.channel != Channel::Content);
            if content.is_empty() && !last {
                return Ok(());
            }
            match guard.judge(content.as_bytes(), last) {
                Verdict::Echo => return Err(Abandon::Echo),
                Verdict::Wait => {
                    waiting.push(data.to_vec());
                    return Ok(());
                }
                Verdict::Stopped => {
                    told.spoke = true;
                    self.write_end("stop", None, out);
                    return Ok(());
                }
                Verdict::Clear => {
                    *seam = None;
                    for data in std::mem::take(waiting) {
                        let chunk = Chunk::read(&data).map_err(|_| Abandon::Unreadable)?;
                        let texts = texts(&chunk)?;
                        let news = SmallVec::<[usize; 2]>::from_elem(0, texts.len());
                        self.say(told, &data, &chunk, &texts, &news, Edits::default(), out);
                    }
                }
            }
        }
        self.journal.unreadable |= chunk.unknown;
        let news = SmallVec::<[usize; 2]>::from_elem(0, new.len());
        self.say(told, data, chunk, &new, &news, Edits::default(), out);
        Ok(())
    }

    /// Writes an event of which each text is new from some byte on, and notes it.
    #[expect(
        clippy::too_many_arguments,
        reason = "one event in its parts, which are borrowed from each other"
    )]
    fn say(
        &mut self,
        told: &mut Told,
        data: &[u8],
        chunk: &Chunk<'_>,
        texts: &[Cow<'_, str>],
        news: &[usize],
        mut edits: Edits,
        out: &mut Vec<u8>,
    ) {
        let role = chunk.role.is_some() && !self.journal.role;
        let speaks = !chunk.said.is_empty()
            || chunk.finish.is_some()
            || self.journal.details_of(chunk) > 0
            || chunk.unknown
            || chunk.mark.is_some()
            || !chunk.calls.is_empty();
        if !speaks && !role && chunk.usage.is_none() {
            self.note_ids(told, chunk, texts);
            return;
        }
        for (place, call) in chunk.calls.iter().enumerate() {
            let Some(id) = call.id else { continue };
            let begun = chunk.said.iter().zip(news).any(|(said, &from)| {
                said.call == place && from == 0 && matches!(said.channel, Channel::ToolName(_))
            });
            match self.journal.id_again(call.index) {
                Some(again) if !begun => edits.replace(id.span(), again),
                _ => self.journal.meet_call(call.index, id.raw(), begun),
            }
        }
        if let Some(mark) = &chunk.mark {
            self.journal.append(Channel::Mark, mark.as_bytes(), self.policy.journal_bytes_max);
        }
        for ((said, text), &from) in chunk.said.iter().zip(texts).zip(news) {
            let new = text.as_bytes().get(from..).unwrap_or_default();
            self.journal.append(said.channel, new, self.policy.journal_bytes_max);
        }
        let base = match &told.way {
            Way::Replay(_) => Some(0),
            Way::Continue { base, .. } => *base,
        };
        self.note_ids(told, chunk, texts);
        self.write(&told.way, data, chunk, edits, out);
        self.journal.count(chunk, base);
        told.spoke |= speaks;
    }

    /// Notes the ids of an event of a leg that continues ids; its texts are in the journal.
    fn note_ids(&mut self, told: &Told, chunk: &Chunk<'_>, texts: &[Cow<'_, str>]) {
        if let Way::Continue { base: Some(base), by_ids: Some(_), .. } = &told.way {
            let counted = completion_tokens(chunk).map(|count| count.saturating_add(*base));
            let end = self.journal.text().len();
            let ids = &mut self.journal.ids;
            match texts {
                [text] => ids.add(chunk, text.as_bytes(), end, counted),
                _ => ids.add(chunk, texts.concat().as_bytes(), end, counted),
            }
        }
    }

    /// Writes an event under the name that the client knows.
    fn write(&mut self, way: &Way, data: &[u8], chunk: &Chunk<'_>, mut edits: Edits, out: &mut Vec<u8>) {
        let known = &self.journal.identity;
        for (value, known) in [
            (chunk.id, &known.id),
            (chunk.created, &known.created),
            (chunk.model, &known.model),
            (chunk.fingerprint, &known.fingerprint),
        ] {
            if let (Some(value), Some(known)) = (value, known)
                && value.raw() != &**known
            {
                edits.replace(value.span(), &**known);
            }
        }
        if let Some(role) = chunk.role.filter(|_| self.journal.role) {
            edits.remove(data, "role", role.span());
        }
        self.hide_ids(way, data, chunk, &mut edits);
        if let (Way::Continue { base, by_ids, .. }, Some(usage)) = (way, chunk.usage) {
            match self.whole_usage(usage, *base, by_ids.is_some()) {
                Some(whole) => edits.replace(usage.span(), whole),
                // Better none than a wrong one; the API allows for it.
                None if chunk.choices == Some(0) => return,
                None => edits.replace(usage.span(), *b"null"),
            }
        }
        self.journal.introduce(chunk);
        self.wire.write(out, chunk, &edits.apply(data));
    }

    /// The usage of the whole answer, where all of its counts are known.
    fn whole_usage(&self, usage: Value<'_>, base: Option<u64>, by_ids: bool) -> Option<String> {
        // What ids continue is counted as their prompt.
        let given = || usage.get("prompt_tokens")?.as_u64()?.checked_sub(base.filter(|_| by_ids)?);
        let prompt = self.journal.prompt_tokens.or_else(given)?;
        let completion = usage.get("completion_tokens")?.as_u64()?.checked_add(base?)?;
        usage_of(prompt, completion)
    }

    /// Takes ids out that the client did not ask for, or has.
    fn hide_ids(&self, way: &Way, data: &[u8], chunk: &Chunk<'_>, edits: &mut Edits) {
        let Way::Continue { by_ids: Some(by_ids), .. } = way else { return };
        let Some(engine) = self.tells_ids else { return };
        if let Some(list) = chunk.ids.filter(|_| self.journal.ids_are_ours) {
            hide(engine, data, "token_ids", list.span(), edits);
        }
        if let Some(list) = chunk.prompt_ids {
            match by_ids.translated {
                true => edits.remove(data, "prompt_token_ids", list.span()),
                false => hide(engine, data, "prompt_token_ids", list.span(), edits),
            }
        }
    }

    /// All tokens that the request allows were delivered, and only the end is missing: writes it to `out`. False where
    /// that is not so, or not known.
    pub fn end_at_limit(&mut self, body: &[u8], out: &mut Vec<u8>) -> bool {
        let Journal { finished, unreadable, overflow, .. } = self.journal;
        let Some(engine) = self.tells_ids.filter(|_| !finished && !unreadable && !overflow) else {
            return false;
        };
        if !is_spent(self.endpoint, engine, body, &self.journal) {
            return false;
        }
        let (prompt, generated) = self.journal.ids.given();
        let usage = usage_of(prompt.len() as u64, generated.len() as u64);
        let wanted = usage.filter(|_| wants_usage(body));
        self.leg = None;
        self.write_end("length", wanted.as_deref(), out);
        true
    }

    /// Ends the answer.
    fn write_end(&mut self, reason: &str, usage: Option<&str>, out: &mut Vec<u8>) {
        let (object, choice): (&[u8], &[u8]) = match self.endpoint {
            Endpoint::ChatCompletions => (b"chat.completion.chunk", br#""delta":{}"#),
            _ => (b"text_completion", br#""text":"""#),
        };
        let known = &self.journal.identity;
        let mut json = b"{\"object\":\"".to_vec();
        json.extend_from_slice(object);
        json.push(b'"');
        for (name, value) in [("id", &known.id), ("created", &known.created), ("model", &known.model)] {
            if let Some(value) = value {
                json.extend_from_slice(format!(",\"{name}\":").as_bytes());
                json.extend_from_slice(value);
            }
        }
        json.extend_from_slice(b",\"choices\":[");
        let head = json.len();
        json.extend_from_slice(b"{\"index\":0,");
        json.extend_from_slice(choice);
        json.extend_from_slice(format!(",\"finish_reason\":\"{reason}\"}}]}}").as_bytes());
        write_event(out, None, &json);
        if let Some(usage) = usage {
            json.truncate(head);
            json.extend_from_slice(format!("],\"usage\":{usage}}}").as_bytes());
            write_event(out, None, &json);
        }
        self.journal.finished = true;
        self.write_done(out);
    }

    fn write_done(&mut self, out: &mut Vec<u8>) {
        self.wire.write_end(out);
        self.journal.done = true;
    }
}

impl ByIds {
    /// Where each text of a chunk is new, and the edits that this takes; `None` where nothing is. The chunk is judged
    /// before: that its engine took the ids, and what it says again.
    #[expect(clippy::type_complexity, reason = "two lists of one chunk")]
    fn take(
        &mut self,
        journal: &mut Journal,
        chunk: &Chunk<'_>,
        texts: &[Cow<'_, str>],
        spoke: bool,
    ) -> Result<Option<(SmallVec<[usize; 2]>, Edits)>, Abandon> {
        if let Some(list) = chunk.prompt_ids.filter(|_| !self.proved) {
            let mut ids = Vec::new();
            let inside = &list.raw()[1..list.raw().len() - 1];
            let (prompt, generated) = journal.ids.given();
            if read_ids(inside, &mut ids).is_none() || !ids.iter().eq(prompt.iter().chain(generated)) {
                return Err(Abandon::IdsIgnored);
            }
            self.proved = true;
        }
        let says = !texts.is_empty() || chunk.finish.is_some();
        if says && !self.proved {
            return Err(Abandon::IdsIgnored);
        }
        let mut news: SmallVec<[usize; 2]> = SmallVec::from_elem(0, texts.len());
        let mut edits = Edits::default();
        if !spoke && texts.iter().any(|text| leaks(chunk, text, journal.text())) {
            return Err(Abandon::Echo);
        }
        let Some(again) = &mut self.again else { return Ok(Some((news, edits))) };
        let begins = again.passed();
        for ((said, text), from) in chunk.said.iter().zip(texts).zip(&mut news) {
            *from = again.pass(journal, said.channel, text.as_bytes()).map_err(|_| Abandon::Diverged)?;
            if *from > 0 {
                edits.replace(said.value.span(), quoted(text.get(*from..).unwrap_or_default()));
            }
        }
        let (at, through) = (again.passed(), again.is_through(journal));
        if through {
            self.again = None;
        }
        if chunk.finish.is_some() {
            return if through { Ok(Some((news, edits))) } else { Err(Abandon::Diverged) };
        }
        if news.iter().zip(texts).all(|(&from, text)| from == text.len()) {
            let again = journal.text()[begins..at].to_vec();
            journal.ids.add(chunk, &again, at, None);
            return Ok(None);
        }
        Ok(Some((news, edits)))
    }
}

impl Told {
    fn is_translated(&self) -> bool {
        matches!(&self.way, Way::Continue { by_ids: Some(by_ids), .. } if by_ids.translated)
    }

    fn held(&self) -> usize {
        match &self.way {
            Way::Replay(_) => 0,
            Way::Continue { seam, waiting, .. } => {
                seam.as_ref().map_or(0, Seam::held) + waiting.iter().map(Vec::len).sum::<usize>()
            }
        }
    }
}

/// As OpenAI and the engines write it.
fn usage_of(prompt: u64, completion: u64) -> Option<String> {
    let total = prompt.checked_add(completion)?;
    Some(format!(r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion}}}"#))
}

/// Whether the request asks for usage at its end.
fn wants_usage(body: &[u8]) -> bool {
    let mut wanted = false;
    let _ = scan_top_level(body, |name, value| {
        if name == b"stream_options" {
            wanted = value.get("include_usage").and_then(|wanted| wanted.as_bool()) == Some(true);
        }
        ControlFlow::Continue(())
    });
    wanted
}

/// The texts of a chunk, in the order of its `said`. A lone half of a surrogate pair is no text.
fn texts<'a>(chunk: &Chunk<'a>) -> Result<SmallVec<[Cow<'a, str>; 2]>, Abandon> {
    chunk.said.iter().map(|said| said.value.as_str().ok_or(Abandon::Unreadable)).collect()
}

/// `text` as a JSON string.
fn quoted(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 2);
    write_string(&mut out, text);
    out
}
