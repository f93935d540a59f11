//! From the facts of an attempt to whose fault it was (failures.md's catalogue, column "judged").
//!
//! Facts are stated by `proxy::attempt` and `proxy::relay`; nothing here knows a connection.

use std::time::Duration;

use crate::policy::dialect::ErrorClass;

/// A kept connection that closes within this time of the write was stale; later, the backend had the request.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// How far an attempt had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No connection yet.
    Connect,
    /// Request under way, no response head yet.
    Head,
    /// Head seen, nothing meaningful yet.
    Gate,
    /// Inside a body that is no token stream.
    Body,
    /// Inside a token stream.
    Stream,
    /// After the good finish of every choice.
    Tail,
}

impl Phase {
    /// The word for logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Head => "head",
            Self::Gate => "gate",
            Self::Body => "body",
            Self::Stream => "stream",
            Self::Tail => "tail",
        }
    }
}

/// What ended an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A complete answer, or for a stream its first token.
    Answered,
    /// An answer with this status (400 and above).
    Status(u16),
    /// 404, and a peer's list names the model asked for.
    ModelMissingHere,
    /// Connection refused.
    Refused,
    /// No connection within its clock.
    ConnectTimeout,
    /// No route, or another error of connecting.
    Unreachable,
    /// The name has no address.
    Dns,
    /// TLS handshake or HTTP/2 preface failed.
    Tls,
    /// evergate's own machine is out of descriptors or ports.
    LocalResources,
    /// FIN or RST where an answer was due.
    Closed,
    /// HTTP/2: refused before it was processed.
    StreamRefused,
    /// Not HTTP, or a broken chunk.
    Protocol,
    /// A response head beyond the limits.
    HeadTooLarge,
    /// The response head dribbled in for too long.
    HeadTimeout,
    /// The backend does not read the request.
    WriteTimeout,
    /// No first token, or no head of an answer, within the hard clock.
    FirstTokenTimeout,
    /// Silence inside a body or stream beyond the hard clock.
    Silence,
    /// 200 with an empty body where there must be one.
    EmptyBody,
    /// A content type that is no answer to the request.
    WrongContentType,
    /// The body ended before it was complete.
    Truncated,
    /// The body is whole but not valid JSON, or holds NaN.
    InvalidBody,
    /// An error inside a 200.
    ErrorInside(ErrorClass),
    /// A stream ended cleanly without a finish.
    EndedEarly,
    /// A finish reason that says aborted or error.
    AbortFinish,
    /// An event that is no valid event of the dialect.
    InvalidEvent,
    /// The backend was ejected while this attempt waited for it.
    Rescued,
    /// The backend is on its way out, and this attempt's time there is over.
    Drain,
    /// The client's upload broke off or idled out.
    Upload,
    /// The client went away.
    ClientGone,
    /// The exchange's total clock ran out.
    TotalTimeout,
}

impl Cause {
    /// Whether the connection was lost: whoever answers at that address next may be another process.
    pub fn lost_connection(self) -> bool {
        matches!(
            self,
            Self::Refused | Self::ConnectTimeout | Self::Unreachable | Self::Closed | Self::Truncated
        )
    }

    /// The word for logs and metric labels. Bounded: statuses are grouped by verdict elsewhere.
    pub fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Status(429) => "status_429",
            Self::Status(500) => "status_500",
            Self::Status(502) => "status_502",
            Self::Status(503) => "status_503",
            Self::Status(504) => "status_504",
            Self::Status(401 | 403) => "status_401_403",
            Self::Status(400..=499) => "status_4xx",
            Self::Status(_) => "status_5xx",
            Self::ModelMissingHere => "model_missing",
            Self::Refused => "connection_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Unreachable => "unreachable",
            Self::Dns => "dns_failure",
            Self::Tls => "tls_failure",
            Self::LocalResources => "local_resources",
            Self::Closed => "closed",
            Self::StreamRefused => "stream_refused",
            Self::Protocol => "protocol_error",
            Self::HeadTooLarge => "head_too_large",
            Self::HeadTimeout => "head_timeout",
            Self::WriteTimeout => "write_timeout",
            Self::FirstTokenTimeout => "first_token_timeout",
            Self::Silence => "silence",
            Self::EmptyBody => "empty_body",
            Self::WrongContentType => "wrong_content_type",
            Self::Truncated => "truncated",
            Self::InvalidBody => "invalid_body",
            Self::ErrorInside(ErrorClass::ServerFault) => "error_event",
            Self::ErrorInside(ErrorClass::Overloaded) => "overload_event",
            Self::ErrorInside(ErrorClass::ClientFault(_)) => "client_error_event",
            Self::EndedEarly => "ended_early",
            Self::AbortFinish => "abort_finish",
            Self::InvalidEvent => "invalid_event",
            Self::Rescued => "rescued",
            Self::Drain => "drain",
            Self::Upload => "upload_broken",
            Self::ClientGone => "client_gone",
            Self::TotalTimeout => "total_timeout",
        }
    }

    /// There is an answer of the backend's own that could be relayed.
    pub fn is_answer(self) -> bool {
        matches!(self, Self::Answered | Self::Status(_) | Self::ModelMissingHere | Self::ErrorInside(_))
    }

    /// A failure that the request itself may bring about on every backend.
    pub(super) fn may_be_the_requests_own(self) -> bool {
        matches!(self, Self::Status(500 | 502 | 504..=528 | 530..) | Self::ErrorInside(ErrorClass::ServerFault))
    }
}

/// What is known about an attempt that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// How far it had come.
    pub phase: Phase,
    /// What ended it.
    pub cause: Cause,
    /// A byte of the request may have reached the backend.
    pub sent: bool,
    /// A byte of an answer was read.
    pub answered: bool,
    /// The connection had served before.
    pub reused: bool,
    /// From the start of sending to the end.
    pub took: Duration,
    /// evergate added the backend's own credentials.
    pub own_credentials: bool,
    /// When the backend wants to be asked again.
    pub retry_after: Option<Duration>,
    /// The backend serves other requests: its failure may be this one's own.
    pub serves_others: bool,
}

impl Facts {
    /// Facts of an attempt that sent nothing yet.
    pub fn new(phase: Phase, cause: Cause) -> Self {
        Self {
            phase,
            cause,
            sent: false,
            answered: false,
            reused: false,
            took: Duration::ZERO,
            own_credentials: false,
            retry_after: None,
            serves_others: false,
        }
    }

    /// A kept connection that its peer had closed (or was closing) when it was used (F05).
    pub fn is_stale_connection(&self) -> bool {
        self.cause == Cause::Closed
            && self.phase == Phase::Head
            && self.reused
            && !self.answered
            && self.took <= STALE_WITHIN
    }
}

/// Whose fault an attempt's end was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The backend served.
    Success,
    /// The backend failed: counts towards its ejection.
    Fault,
    /// The backend is overloaded or loading: left alone for a while, never ejected for it.
    Busy,
    /// No lesson about the backend.
    Neutral,
    /// The backend is set up wrongly: out for long, and someone must look.
    Misconfigured,
    /// The client's doing.
    Cancelled,
}

impl Verdict {
    /// The word for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Fault => "fault",
            Self::Busy => "busy",
            Self::Neutral => "neutral",
            Self::Misconfigured => "misconfigured",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Whose fault it was. Exhaustive on purpose: a new cause must be judged here.
pub fn verdict(facts: &Facts) -> Verdict {
    match facts.cause {
        Cause::Answered => Verdict::Success,
        Cause::Status(status) => of_status(status, facts.own_credentials),
        Cause::ModelMissingHere => Verdict::Misconfigured,
        Cause::ErrorInside(ErrorClass::ServerFault) => Verdict::Fault,
        Cause::ErrorInside(ErrorClass::Overloaded) => Verdict::Busy,
        Cause::ErrorInside(ErrorClass::ClientFault(status)) => of_status(status, facts.own_credentials),
        Cause::Closed if facts.is_stale_connection() => Verdict::Neutral,
        Cause::LocalResources
        | Cause::StreamRefused
        | Cause::Rescued
        | Cause::Drain
        | Cause::TotalTimeout => Verdict::Neutral,
        Cause::Upload | Cause::ClientGone => Verdict::Cancelled,
        Cause::Refused
        | Cause::ConnectTimeout
        | Cause::Unreachable
        | Cause::Dns
        | Cause::Tls
        | Cause::Closed
        | Cause::Protocol
        | Cause::HeadTooLarge
        | Cause::HeadTimeout
        | Cause::WriteTimeout
        | Cause::FirstTokenTimeout
        | Cause::Silence
        | Cause::EmptyBody
        | Cause::WrongContentType
        | Cause::Truncated
        | Cause::InvalidBody
        | Cause::EndedEarly
        | Cause::AbortFinish
        | Cause::InvalidEvent => Verdict::Fault,
    }
}

fn of_status(status: u16, own_credentials: bool) -> Verdict {
    match status {
        429 | 503 | 529 => Verdict::Busy,
        401 | 403 if own_credentials => Verdict::Misconfigured,
        // Not implemented, HTTP version not supported: answers about the request.
        501 | 505 => Verdict::Neutral,
        500.. => Verdict::Fault,
        _ => Verdict::Neutral,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(cause: Cause) -> Verdict {
        verdict(&Facts { sent: true, ..Facts::new(Phase::Head, cause) })
    }

    #[test]
    fn a_connection_is_lost_where_no_process_said_anything_more() {
        for cause in
            [Cause::Refused, Cause::ConnectTimeout, Cause::Unreachable, Cause::Closed, Cause::Truncated]
        {
            assert!(cause.lost_connection(), "{cause:?}");
        }
        for cause in [Cause::Answered, Cause::Status(503), Cause::Rescued, Cause::Drain, Cause::ClientGone] {
            assert!(!cause.lost_connection(), "{cause:?}");
        }
    }

    #[test]
    fn statuses_are_judged_by_the_catalogue() {
        for status in [500, 502, 504, 520, 527] {
            assert_eq!(judged(Cause::Status(status)), Verdict::Fault, "{status}");
        }
        for status in [429, 503, 529] {
            assert_eq!(judged(Cause::Status(status)), Verdict::Busy, "{status}");
        }
        for status in [400, 401, 403, 404, 408, 409, 413, 422, 451, 501, 505] {
            assert_eq!(judged(Cause::Status(status)), Verdict::Neutral, "{status}");
        }
    }

    #[test]
    fn a_401_on_our_own_credentials_is_our_misconfiguration() {
        let facts = Facts { own_credentials: true, ..Facts::new(Phase::Head, Cause::Status(401)) };
        assert_eq!(verdict(&facts), Verdict::Misconfigured);
    }

    #[test]
    fn a_close_is_stale_only_on_a_kept_connection_soon_after_the_write() {
        let stale = Facts { sent: true, reused: true, ..Facts::new(Phase::Head, Cause::Closed) };
        assert!(stale.is_stale_connection());
        assert!(!Facts { reused: false, ..stale }.is_stale_connection());
        assert!(!Facts { answered: true, ..stale }.is_stale_connection());
        assert!(!Facts { took: Duration::from_secs(3), ..stale }.is_stale_connection());
        assert_eq!(verdict(&Facts { took: Duration::from_secs(3), ..stale }), Verdict::Fault);
    }

    const OTHERS: [Cause; 27] = [
        Cause::ModelMissingHere,
        Cause::Refused,
        Cause::ConnectTimeout,
        Cause::Unreachable,
        Cause::Dns,
        Cause::Tls,
        Cause::LocalResources,
        Cause::Closed,
        Cause::StreamRefused,
        Cause::Protocol,
        Cause::HeadTooLarge,
        Cause::HeadTimeout,
        Cause::WriteTimeout,
        Cause::FirstTokenTimeout,
        Cause::Silence,
        Cause::EmptyBody,
        Cause::WrongContentType,
        Cause::Truncated,
        Cause::InvalidBody,
        Cause::EndedEarly,
        Cause::AbortFinish,
        Cause::InvalidEvent,
        Cause::Rescued,
        Cause::Upload,
        Cause::ClientGone,
        Cause::TotalTimeout,
        Cause::ErrorInside(ErrorClass::ServerFault),
    ];

    /// A label of its own for each.
    fn labels<const N: usize>(names: [&'static str; N]) {
        let mut sorted = names;
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        let is_word = |c: char| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit();
        assert!(names.iter().all(|name| name.len() > 2 && name.chars().all(is_word)), "{names:?}");
    }

    #[test]
    fn labels_are_bounded_and_differ() {
        labels(OTHERS.map(Cause::name));
        labels([400, 401, 429, 500, 502, 503, 504, 520].map(|status| Cause::Status(status).name()));
        assert_eq!(Cause::Status(403).name(), Cause::Status(401).name());
        assert_eq!(Cause::Status(499).name(), Cause::Status(404).name());
        assert_eq!(Cause::Status(599).name(), Cause::Status(505).name());
        let inside = [ErrorClass::ServerFault, ErrorClass::Overloaded, ErrorClass::ClientFault(400)];
        labels(inside.map(|class| Cause::ErrorInside(class).name()));
        labels(
            [Phase::Connect, Phase::Head, Phase::Gate, Phase::Body, Phase::Stream, Phase::Tail]
                .map(Phase::name),
        );
        labels(
            [
                Verdict::Success,
                Verdict::Fault,
                Verdict::Busy,
                Verdict::Neutral,
                Verdict::Misconfigured,
                Verdict::Cancelled,
            ]
            .map(Verdict::name),
        );
    }

    #[test]
    fn what_is_no_answer_is_judged_by_whose_doing_it_is() {
        for cause in OTHERS {
            let expected = match cause {
                Cause::ModelMissingHere => Verdict::Misconfigured,
                Cause::LocalResources | Cause::StreamRefused | Cause::Rescued | Cause::TotalTimeout => {
                    Verdict::Neutral
                }
                Cause::Upload | Cause::ClientGone => Verdict::Cancelled,
                _ => Verdict::Fault,
            };
            assert_eq!(judged(cause), expected, "{cause:?}");
        }
        assert_eq!(judged(Cause::Answered), Verdict::Success);
        assert_eq!(judged(Cause::ErrorInside(ErrorClass::Overloaded)), Verdict::Busy);
        assert_eq!(judged(Cause::ErrorInside(ErrorClass::ClientFault(400))), Verdict::Neutral);
        let own = Facts { own_credentials: true, ..Facts::new(Phase::Head, Cause::Status(404)) };
        assert_eq!(verdict(&own), Verdict::Neutral, "a 404 has nothing to do with credentials");
    }

    #[test]
    fn an_answer_is_what_could_be_relayed() {
        for cause in OTHERS {
            let expected = matches!(cause, Cause::ModelMissingHere | Cause::ErrorInside(_));
            assert_eq!(cause.is_answer(), expected, "{cause:?}");
        }
        assert!(Cause::Answered.is_answer() && Cause::Status(400).is_answer());
    }

    #[test]
    fn only_a_failure_of_the_engine_may_be_the_requests_own() {
        for (status, may) in
            [(500, true), (502, true), (504, true), (520, true), (501, false), (503, false), (429, false)]
        {
            assert_eq!(Cause::Status(status).may_be_the_requests_own(), may, "{status}");
        }
        assert!(Cause::ErrorInside(ErrorClass::ServerFault).may_be_the_requests_own());
        assert!(!Cause::ErrorInside(ErrorClass::Overloaded).may_be_the_requests_own());
        assert!(!Cause::Closed.may_be_the_requests_own());
    }

    #[test]
    fn staleness_has_an_edge_of_one_second_and_a_phase() {
        let stale = Facts { sent: true, reused: true, ..Facts::new(Phase::Head, Cause::Closed) };
        assert!(Facts { took: Duration::from_secs(1), ..stale }.is_stale_connection());
        assert!(!Facts { took: Duration::from_micros(1_000_001), ..stale }.is_stale_connection());
        assert!(!Facts { phase: Phase::Gate, ..stale }.is_stale_connection());
        assert!(!Facts { cause: Cause::Protocol, ..stale }.is_stale_connection());
    }
}
