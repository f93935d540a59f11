//! The ways a simulated replica can be sick, one value each, in the order of the fault catalogue.
//!
//! A fault is set by the owner of the replica and holds for requests that arrive while it is set;
//! `/health` goes on passing unless the fault says otherwise, because that is how replicas die in
//! practice. Death and freeze of the whole process are not faults of an answer: see
//! [`Replica::kill`](super::Replica::kill) and [`Replica::freeze`](super::Replica::freeze).
//! Counts of tokens are those of one answer. An answer that is shorter than its fault's count ends well.

use std::time::Duration;

/// What is wrong with the answers of a replica. One at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Fault {
    /// Healthy. The default.
    #[default]
    None,
    /// The connection is closed instead of an answer (F06).
    CloseBeforeHead,
    /// The request is read and never answered (F08).
    NoAnswer,
    /// Every inference request gets this status and an error body (F09, F11, F12).
    Status(u16),
    /// This share of requests, 0.0 to 1.0, gets a 500, evenly spread and not by chance (F27).
    ErrorRate(f64),
    /// 503, with `Retry-After` when given: the queue is full (F10).
    Busy {
        /// Rounded up to whole seconds on the wire.
        retry_after: Option<Duration>,
    },
    /// 503 "Loading model", from the health path as well (F10, F29).
    Loading,
    /// Only the health path answers 503; requests are served (F26).
    Unhealthy,
    /// 200 and no body at all (F13).
    EmptyBody,
    /// 200 and an HTML page (F13).
    WrongContentType,
    /// An error event is the first event of a stream (F14). An answer that is not streamed is a 500.
    ErrorEventFirst,
    /// The head comes, the first token never (F15).
    NoFirstToken,
    /// Everything takes this many times as long, first token included (F20).
    Slow(f64),
    /// The connection ends (FIN) without the end of the body (F16).
    CutAfterTokens(usize),
    /// The connection is reset (RST) inside the body (F16). On HTTP/2 the whole connection.
    ResetAfterTokens(usize),
    /// The body ends well, but no finish reason and no `[DONE]` came (F17).
    CleanEndWithoutFinish(usize),
    /// An error event, then `[DONE]` where the engine does so (F18).
    ErrorEventAfterTokens(usize),
    /// Finish reason `abort`, usage and `[DONE]` as if all were well (F18).
    AbortFinishAfterTokens(usize),
    /// Silence with the connection alive (F19).
    StallAfterTokens(usize),
    /// Bytes that are no event, then the rest of the answer (F21).
    GarbageAfterTokens(usize),
    /// One token over and over, to the length of the answer (F22).
    RepeatAfterTokens(usize),
    /// The finish reason comes, then the connection ends before usage and `[DONE]` (F23).
    CutAfterFinish,
    /// The JSON of an answer that is not streamed breaks off; its length is right (F24).
    TruncatedJson,
}

impl Fault {
    /// After how many tokens the answer goes wrong, if it begins well.
    pub(super) fn tokens(self) -> Option<usize> {
        match self {
            Self::CutAfterTokens(tokens)
            | Self::ResetAfterTokens(tokens)
            | Self::CleanEndWithoutFinish(tokens)
            | Self::ErrorEventAfterTokens(tokens)
            | Self::AbortFinishAfterTokens(tokens)
            | Self::StallAfterTokens(tokens)
            | Self::GarbageAfterTokens(tokens)
            | Self::RepeatAfterTokens(tokens) => Some(tokens),
            Self::ErrorEventFirst | Self::NoFirstToken => Some(0),
            Self::None
            | Self::CloseBeforeHead
            | Self::NoAnswer
            | Self::Status(_)
            | Self::ErrorRate(_)
            | Self::Busy { .. }
            | Self::Loading
            | Self::Unhealthy
            | Self::EmptyBody
            | Self::WrongContentType
            | Self::Slow(_)
            | Self::CutAfterFinish
            | Self::TruncatedJson => None,
        }
    }

    /// How many times as long everything takes.
    pub(super) fn slowness(self) -> f64 {
        match self {
            Self::Slow(factor) if factor.is_finite() => factor.max(0.0),
            _ => 1.0,
        }
    }

    /// Whether the `nth` request (from 0) is one of the share that fails.
    pub(super) fn fails_request(self, nth: u64) -> bool {
        let Self::ErrorRate(rate) = self else { return false };
        let rate = rate.clamp(0.0, 1.0);
        ((nth + 1) as f64 * rate).floor() > (nth as f64 * rate).floor()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_rate_is_spread_evenly() {
        let failed = |rate, of| (0..of).filter(|nth| Fault::ErrorRate(rate).fails_request(*nth)).count();
        assert_eq!(failed(0.2, 100), 20);
        assert_eq!(failed(0.2, 5), 1);
        assert_eq!(failed(1.0, 7), 7);
        assert_eq!(failed(0.0, 7), 0);
    }
}
