//! A model backend: what it does with a request and with a probe, by what ails it at the moment.
//!
//! The ailments are those of the fault catalogue, as far as policies can tell them apart. A replica has no idea of the
//! gateway: it states facts, and the policies judge them.

use evergate::policy::Moment;
use evergate::policy::admission::Priority;
use evergate::policy::dialect::ErrorClass;
use evergate::policy::health::ProbeVerdict;
use evergate::policy::retry::{Cause, Facts, Phase};
use std::time::Duration;

/// Work of a request, and how it is meant to go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// It may be sent again once a byte of it was sent.
    pub(crate) replayable: bool,
    /// Its answer is a token stream; else it is held until whole.
    pub(crate) streams: bool,
    /// From sending to the first token, on a sound replica.
    pub(crate) first_token: Duration,
    /// Tokens after the first.
    pub(crate) tokens: u32,
    /// Every replica answers it with this status: the client's fault, or a request that breaks engines.
    pub(crate) always: Option<u16>,
    /// Who goes first where there is a line.
    pub(crate) priority: Priority,
    /// The client leaves after so long.
    pub(crate) patience: Option<Duration>,
}

/// Between two tokens of a sound replica.
pub(crate) const GAP: Duration = Duration::from_millis(20);

/// What ails a replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Ailment {
    /// Nothing listens (F01). What runs dies when it begins.
    Crashed,
    /// Packets vanish (F02).
    Blackhole,
    /// Accepts and never answers (F08).
    Hangs,
    /// Stopped (F19): nothing moves any more, what runs included, and no probe is answered.
    Frozen,
    /// The engine is dead behind its server (F08, F19): the same, but probes pass.
    Hollow,
    /// 500 at once, which looks like being idle (F28).
    FailsFast,
    /// 502 after the usual time (F09).
    Fails,
    /// Closes fresh connections (F06).
    Closes,
    /// Closes kept connections under the request (F05).
    Stale,
    /// HTTP/2: refuses streams, nothing was processed.
    RefusesStreams,
    /// 503 with this Retry-After, to all (F10).
    Busy(Option<Duration>),
    /// 429 beyond so many at a time (F10, F32).
    Overloaded(u32),
    /// Everything takes so many times as long (F20, F29).
    Slow(f64),
    /// First tokens come in time, the others so many times as slowly (F20).
    Drips(f64),
    /// A share of requests fails in one way or another (F27).
    Flaky(f64),
    /// Dies after the first token (F16, F17).
    BreaksStreams,
    /// Answers that are not whole (F24).
    Garbage,
    /// Refuses evergate's credentials (F12).
    WrongCredentials,
    /// Does not know the model (F12).
    WrongModel,
}

impl Ailment {
    /// For the tally.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Crashed => "crashed",
            Self::Blackhole => "blackhole",
            Self::Hangs => "hangs",
            Self::Frozen => "frozen",
            Self::Hollow => "hollow",
            Self::FailsFast => "fails_fast",
            Self::Fails => "fails",
            Self::Closes => "closes",
            Self::Stale => "stale",
            Self::RefusesStreams => "refuses_streams",
            Self::Busy(Some(_)) => "busy_stated",
            Self::Busy(None) => "busy",
            Self::Overloaded(_) => "overloaded",
            Self::Slow(_) => "slowed",
            Self::Drips(_) => "drips",
            Self::Flaky(_) => "flaky",
            Self::BreaksStreams => "breaks_streams",
            Self::Garbage => "garbage",
            Self::WrongCredentials => "wrong_credentials",
            Self::WrongModel => "wrong_model",
        }
    }
}

/// What will become of one attempt, if nothing happens in between.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    /// It ends before anything of it can be shown.
    Ends {
        /// After so long.
        after: Duration,
        /// Like this.
        facts: Facts,
    },
    /// Its first token comes, and later its end.
    Answers {
        /// To the first token, or to the whole of an answer that is no stream.
        first: Duration,
        /// Mean time between tokens.
        gap: Duration,
        /// What ends the stream, when it does not end well, and after which share of it.
        breaks: Option<(Cause, f64)>,
    },
}

/// One backend as it really is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replica {
    /// What ails it.
    pub(crate) ailment: Option<Ailment>,
    /// What its probes say instead of the truth.
    pub(crate) lie: Option<ProbeVerdict>,
}

/// A connect, a refusal, an error made up without thinking.
const AT_ONCE: Duration = Duration::from_millis(1);

impl Replica {
    /// What becomes of an attempt that begins now, with `in_flight` others here. `clock` is the hard clock for a first
    /// token, `connect` that for a connection; `reused`: on a kept connection.
    pub(crate) fn serve(
        &self,
        request: &Request,
        in_flight: u32,
        clocks: &Clocks,
        reused: bool,
        rng: &mut fastrand::Rng,
    ) -> Fate {
        if let Some(status) = request.always
            && self.ailment.is_none()
        {
            return ends(AT_ONCE * 20, Phase::Head, Cause::Status(status), true, reused);
        }
        let sent = |after, cause| ends(after, Phase::Head, cause, true, reused);
        let spread = 0.5 + rng.f64();
        let usual = request.first_token.mul_f64(spread);
        match self.ailment {
            None => answers(usual, GAP, None, clocks, reused),
            Some(Ailment::Crashed) => ends(AT_ONCE, Phase::Connect, Cause::Refused, false, false),
            Some(Ailment::Blackhole) => {
                ends(clocks.connect, Phase::Connect, Cause::ConnectTimeout, false, false)
            }
            Some(Ailment::Hangs | Ailment::Frozen | Ailment::Hollow) => {
                sent(clocks.first_token, Cause::FirstTokenTimeout)
            }
            Some(Ailment::FailsFast) => sent(AT_ONCE, Cause::Status(500)),
            Some(Ailment::Fails) => sent(usual, Cause::Status(502)),
            Some(Ailment::Closes) if reused => answers(usual, GAP, None, clocks, reused),
            Some(Ailment::Closes) => sent(AT_ONCE, Cause::Closed),
            Some(Ailment::Stale) if reused => sent(AT_ONCE, Cause::Closed),
            Some(Ailment::Stale) => answers(usual, GAP, None, clocks, reused),
            Some(Ailment::RefusesStreams) => ends(AT_ONCE, Phase::Head, Cause::StreamRefused, false, reused),
            Some(Ailment::Busy(retry_after)) => match sent(AT_ONCE, Cause::Status(503)) {
                Fate::Ends { after, facts } => Fate::Ends { after, facts: Facts { retry_after, ..facts } },
                fate @ Fate::Answers { .. } => fate,
            },
            Some(Ailment::Overloaded(slots)) if in_flight >= slots => sent(AT_ONCE, Cause::Status(429)),
            Some(Ailment::Overloaded(_)) => answers(usual * 2, GAP * 2, None, clocks, reused),
            Some(Ailment::Slow(times)) => {
                answers(usual.mul_f64(times), GAP.mul_f64(times), None, clocks, reused)
            }
            Some(Ailment::Drips(times)) => answers(usual, GAP.mul_f64(times), None, clocks, reused),
            Some(Ailment::Flaky(share)) if rng.f64() < share => match rng.u8(..4) {
                0 => sent(usual, Cause::Status(500)),
                1 => ends(usual, Phase::Gate, Cause::ErrorInside(ErrorClass::ServerFault), true, reused),
                2 => sent(usual, Cause::Protocol),
                _ => answers(usual, GAP, Some((Cause::Truncated, rng.f64())), clocks, reused),
            },
            Some(Ailment::Flaky(_)) => answers(usual, GAP, None, clocks, reused),
            Some(Ailment::BreaksStreams) => {
                answers(usual, GAP, Some((Cause::EndedEarly, rng.f64())), clocks, reused)
            }
            Some(Ailment::Garbage) => ends(usual, Phase::Body, Cause::InvalidBody, true, reused),
            Some(Ailment::WrongCredentials) => match sent(AT_ONCE, Cause::Status(401)) {
                Fate::Ends { after, facts } => {
                    Fate::Ends { after, facts: Facts { own_credentials: true, ..facts } }
                }
                fate @ Fate::Answers { .. } => fate,
            },
            Some(Ailment::WrongModel) => sent(AT_ONCE, Cause::ModelMissingHere),
        }
    }

    /// Nothing of it is heard, not even by a probe.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self.ailment, Some(Ailment::Blackhole | Ailment::Hangs | Ailment::Frozen))
    }

    /// What a probe that ends now finds.
    pub(crate) fn probe(&self, rng: &mut fastrand::Rng) -> ProbeVerdict {
        if let Some(lie) = self.lie {
            return lie;
        }
        match self.ailment {
            Some(
                Ailment::Crashed | Ailment::Blackhole | Ailment::Hangs | Ailment::Frozen | Ailment::Closes,
            ) => ProbeVerdict::Fail,
            Some(Ailment::Busy(_)) => ProbeVerdict::Refusing,
            Some(Ailment::Overloaded(_)) if rng.bool() => ProbeVerdict::Fail,
            Some(Ailment::WrongModel) => ProbeVerdict::WeakPass,
            // The engine's web server answers whatever the engine does.
            Some(_) | None => ProbeVerdict::Pass,
        }
    }
}

/// The hard clocks of an attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clocks {
    /// For a connection.
    pub(crate) connect: Duration,
    /// For a first token.
    pub(crate) first_token: Duration,
    /// For a whole stream of a slow replica, or a slow answer would outlast the simulation.
    pub(crate) stream: Duration,
}

fn ends(after: Duration, phase: Phase, cause: Cause, sent: bool, reused: bool) -> Fate {
    let answered = matches!(cause, Cause::Status(_)) || !matches!(phase, Phase::Connect | Phase::Head);
    Fate::Ends { after, facts: Facts { sent, answered, reused, took: after, ..Facts::new(phase, cause) } }
}

fn answers(
    first: Duration,
    gap: Duration,
    breaks: Option<(Cause, f64)>,
    clocks: &Clocks,
    reused: bool,
) -> Fate {
    if first > clocks.first_token {
        return ends(clocks.first_token, Phase::Gate, Cause::FirstTokenTimeout, true, reused);
    }
    Fate::Answers { first, gap, breaks }
}

/// The moment something begins, and the one it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Included.
    pub(crate) from: Moment,
    /// Excluded.
    pub(crate) until: Moment,
}
