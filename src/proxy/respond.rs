//! The only place where a failure becomes a status and a body, in the words of the client's dialect.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};

use crate::policy::dialect::{
    Dialect, Endpoint, Rejection, error_body, error_event, grpc_message, grpc_status,
};
use crate::policy::retry::Cause;
use crate::proxy::client::HeadDefect;
use crate::proxy::headers::X_REQUEST_ID;
use crate::proxy::ledger::Ledger;
use crate::proxy::relay::AnswerBody;
use crate::telemetry::metrics::End;

/// Read by the client libraries of OpenAI and Anthropic before they send a failed request again.
const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// `Retry-After` when nothing better is known: a pool whose backends are down is probed every second.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why evergate answers by itself.
#[derive(Clone, Debug)]
pub(super) enum Refusal {
    /// The head's framing is ambiguous.
    Framing(HeadDefect),
    /// The request is malformed.
    Invalid(&'static str),
    /// CONNECT, TRACE.
    Method,
    /// `Expect` with anything but `100-continue`.
    Expectation,
    /// The body exceeds this many bytes.
    TooLarge(u64),
    /// The client's upload fell silent.
    UploadTimeout,
    /// The client's upload broke off.
    UploadBroken,
    /// Too many bytes are held already.
    Memory,
    /// No pool serves the model; these are known.
    UnknownModel {
        /// As asked for.
        model: String,
        /// As known.
        known: Vec<String>,
    },
    /// No pool takes the request.
    NoRoute,
    /// No backend is up.
    Down,
    /// All backends have asked for a pause, of which so much is left.
    Busy(Duration),
    /// All slots are taken, and all places of the queue; when to come back.
    QueueFull(Duration),
    /// It waited for a slot in vain; when to come back.
    QueueTimeout(Duration),
    /// The attempts failed; this is how the last one did.
    Failed {
        /// The last failure.
        cause: Cause,
        /// Why there was no further attempt.
        enough: &'static str,
    },
    /// It has killed the replicas that touched it, and is sent to no more of them.
    Kills,
    /// The backend's answer broke off after the client had seen part of it.
    Lost(Cause),
}

impl Refusal {
    /// Stable, for programs.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Framing(_) | Self::Invalid(_) | Self::UploadBroken => "invalid_request",
            Self::Method => "method_not_supported",
            Self::Expectation => "expectation_failed",
            Self::TooLarge(_) => "body_too_large",
            Self::UploadTimeout => "upload_timeout",
            Self::Memory => "memory_exhausted",
            Self::UnknownModel { .. } => "unknown_model",
            Self::NoRoute => "no_route",
            Self::Down => "no_backend_available",
            Self::Busy(_) => "backends_busy",
            Self::Kills => "request_kills_backends",
            Self::QueueFull(_) => "queue_full",
            Self::QueueTimeout(_) => "queue_timeout",
            Self::Failed { cause, .. } | Self::Lost(cause) if is_timeout(*cause) => "backend_timeout",
            Self::Failed { .. } => "backend_failed",
            Self::Lost(_) => "replica_lost",
        }
    }

    /// Status of the answer.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Framing(_) | Self::Invalid(_) | Self::UploadBroken => StatusCode::BAD_REQUEST,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Expectation => StatusCode::EXPECTATION_FAILED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UploadTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::UnknownModel { .. } | Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Memory | Self::Down | Self::Busy(_) | Self::QueueFull(_) | Self::QueueTimeout(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Failed { cause, .. } | Self::Lost(cause) if is_timeout(*cause) => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::Failed { .. } | Self::Lost(_) | Self::Kills => StatusCode::BAD_GATEWAY,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Memory | Self::Down => Some(RETRY_AFTER),
            Self::Busy(after) | Self::QueueFull(after) | Self::QueueTimeout(after) => Some(*after),
            _ => None,
        }
    }

    /// Why there was no backend for it, for metrics; none where that was not the reason.
    pub(super) fn queue_reason(&self) -> Option<&'static str> {
        match self {
            Self::Down => Some("down"),
            Self::Busy(_) => Some("busy"),
            Self::QueueFull(_) => Some("full"),
            Self::QueueTimeout(_) => Some("timeout"),
            _ => None,
        }
    }

    /// The connection cannot be used further: its framing is in doubt, or a body was left unread.
    fn closes(&self) -> bool {
        matches!(
            self,
            Self::Framing(_) | Self::Invalid(_) | Self::Expectation | Self::TooLarge(_) | Self::UploadTimeout
        )
    }

    fn message(&self, attempts: u8) -> Cow<'static, str> {
        match self {
            Self::Framing(defect) => framing_message(*defect).into(),
            Self::Invalid(what) => (*what).into(),
            Self::Method => "CONNECT and TRACE are not supported".into(),
            Self::Expectation => "only `Expect: 100-continue` is supported".into(),
            Self::TooLarge(max) => format!("the request body is larger than {max} bytes").into(),
            Self::UploadTimeout => "the request body stopped arriving".into(),
            Self::UploadBroken => "the request body ended before it was complete".into(),
            Self::Memory => "too many requests are being held in memory; try again shortly".into(),
            Self::UnknownModel { model, known } if known.is_empty() => {
                format!("the model `{model}` is not served here").into()
            }
            Self::UnknownModel { model, known } => {
                format!("the model `{model}` is not served here; known models: {}", known.join(", ")).into()
            }
            Self::NoRoute => "no pool takes this request".into(),
            Self::Down => "no backend is available; try again shortly".into(),
            Self::Busy(_) => "all backends are busy; try again shortly".into(),
            Self::QueueFull(_) => "too many requests are waiting for a backend; try again later".into(),
            Self::QueueTimeout(_) => "no backend had room for this request in time; try again later".into(),
            Self::Failed { cause, enough } => format!(
                "the backends failed this request ({attempts} attempts, last: {}; {enough})",
                cause.name()
            )
            .into(),
            Self::Kills => format!(
                "every backend that took this request died of it ({attempts} attempts); do not send it again"
            )
            .into(),
            Self::Lost(cause) => {
                format!("the backend was lost in the middle of its answer ({})", cause.name()).into()
            }
        }
    }

    fn rejection<'a>(&self, id: &'a HeaderValue, attempts: u8) -> Rejection<'a> {
        Rejection {
            status: self.status(),
            code: self.code(),
            message: self.message(attempts),
            request_id: id.to_str().unwrap_or_default(),
            attempts,
            param: matches!(self, Self::UnknownModel { .. }).then_some("model"),
            retry_after: self.retry_after(),
        }
    }
}

fn framing_message(defect: HeadDefect) -> &'static str {
    match defect {
        HeadDefect::LengthAndEncoding => {
            "the request has both Content-Length and Transfer-Encoding; send only one of them"
        }
        HeadDefect::TransferCoding => "the only Transfer-Encoding supported is `chunked`",
        HeadDefect::Host => "the Host header field is missing, repeated or malformed",
        HeadDefect::UnclearFraming => "it is not clear where the request ends",
    }
}

fn is_timeout(cause: Cause) -> bool {
    matches!(
        cause,
        Cause::ConnectTimeout
            | Cause::HeadTimeout
            | Cause::WriteTimeout
            | Cause::FirstTokenTimeout
            | Cause::Silence
            | Cause::TotalTimeout
    )
}

/// An answer of evergate's own.
pub(super) fn refuse(mut ledger: Ledger, dialect: Dialect, refusal: &Refusal) -> Response<AnswerBody> {
    ledger.worker().telemetry().metrics.count_rejection(refusal.code());
    let rejection = refusal.rejection(&ledger.id, ledger.attempts());
    let (content_type, body) = error_body(dialect, &rejection);
    let mut response = Response::new(());
    *response.status_mut() = refusal.status();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(X_REQUEST_ID, ledger.id.clone());
    if let Some(after) = rejection.retry_after {
        headers.insert(header::RETRY_AFTER, whole_seconds(after));
    }
    if matches!(refusal, Refusal::Kills) {
        headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    if refusal.closes() {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if dialect == Dialect::Grpc {
        grpc_trailers_only(headers, &rejection);
        *response.status_mut() = StatusCode::OK;
    }
    ledger.answered(response.status());
    ledger.ended(End::Error);
    response.map(|()| AnswerBody::whole(Bytes::from(body), None, ledger))
}

/// A `Retry-After`: never too early, never at once.
pub(super) fn whole_seconds(after: Duration) -> HeaderValue {
    let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
    seconds.max(1).into()
}

/// gRPC over HTTP/2, "Trailers-Only": the status travels in the one block of fields there is.
fn grpc_trailers_only(headers: &mut HeaderMap, rejection: &Rejection<'_>) {
    headers.insert("grpc-status", grpc_status(rejection.status).into());
    if let Ok(message) =
        HeaderValue::from_str(&grpc_message(&format!("{}: {}", rejection.code, rejection.message)))
    {
        headers.insert("grpc-message", message);
    }
}

/// The terminal error event of a stream that cannot go on.
pub(super) fn last_event(
    ledger: &Ledger,
    dialect: Dialect,
    endpoint: Endpoint,
    refusal: &Refusal,
    sequence: u64,
) -> Bytes {
    ledger.worker().telemetry().metrics.count_rejection(refusal.code());
    error_event(dialect, endpoint, &refusal.rejection(&ledger.id, ledger.attempts()), sequence)
}
