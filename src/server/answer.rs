//! Between hyper and the handler: what is wrong with a head is handed on, a panic stays in its exchange, and a
//! broken answer is seen to break only after everything before the break was sent.
//!
//! hyper throws away what it has buffered when a body fails: the tokens of the last frames would never reach the
//! client. So a failing body waits until the connection says that all written has left ([`Pulse::settled`]).

use std::any::Any;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::future::{Future, poll_fn};
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::Context;
use super::pulse::{Exchange, Pulse};
use super::streams::{self, Asked};
use crate::clock::Turn;
use crate::drain::Draining;
use crate::policy::dialect::{Endpoint, Rejection, error_body};
use crate::proxy::{Client, HeadDefect};
use crate::telemetry::Telemetry;
use crate::telemetry::events::PanicCaught;

/// Who answers requests. One per worker.
pub trait Answers: Send + Sync + 'static {
    /// Of the answers.
    type Body: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static;

    /// Answers one request. A `defect` is to be refused with 400, in whatever dialect; the connection
    /// is closed after that answer. The future is dropped when the client goes away or the connection is
    /// cut; so is the body, unfinished. A panic in either is caught and counted.
    fn answer(
        &self,
        client: &Arc<Client>,
        request: Request<Incoming>,
        defect: Option<HeadDefect>,
    ) -> impl Future<Output = Response<Self::Body>> + Send + use<Self>;
}

type BoxError = Box<dyn Error + Send + Sync>;

/// One client's requests on their way to the handler.
pub(super) struct Desk<H> {
    pub(super) context: Arc<Context<H>>,
    pub(super) client: Arc<Client>,
    pub(super) pulse: Arc<Pulse>,
    pub(super) retired: Draining,
    pub(super) headers_max: usize,
}

impl<H: Answers> Desk<H> {
    /// Answers one request, whatever happens to the handler.
    pub(super) fn answer(
        self: &Arc<Self>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<AnswerBody<H::Body>>, Infallible>> + Send + use<H> {
        let desk = Arc::clone(self);
        let (number, exchange) = self.pulse.call();
        async move {
            let h1 = request.version() < Version::HTTP_2;
            let defect = if h1 { desk.defect(number, &request) } else { None };
            let endpoint = Endpoint::of(request.method(), request.uri().path());
            let method = request.method().clone();
            if request.version() == Version::HTTP_10 {
                desk.pulse.ends_by_close();
            }
            if !h1 && request.headers().len() > desk.headers_max {
                desk.context.telemetry.metrics.count_limit("headers_max");
                return Ok(desk.refuse(endpoint, TOO_MANY_HEADERS, exchange));
            }
            if let Some(defect) = defect {
                desk.context.telemetry.metrics.count_smuggling(defect.name());
            }
            let answering = AssertUnwindSafe(|| desk.context.handler.answer(&desk.client, request, defect));
            let answer = match catch_unwind(answering) {
                Ok(answering) => {
                    let mut answering = pin!(answering);
                    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| answering.as_mut().poll(cx))) {
                        Ok(polled) => polled.map(Ok),
                        Err(panic) => Poll::Ready(Err(panic)),
                    })
                    .await
                }
                Err(panic) => Err(panic),
            };
            let mut answer = match answer {
                Ok(answer) => answer.map(|body| {
                    AnswerBody::new(Source::Handler(body), exchange, Arc::clone(&desk.context.telemetry))
                }),
                Err(panic) => {
                    told(&desk.context.telemetry, &"an exchange", panic.as_ref());
                    desk.refuse(endpoint, FAILED, exchange)
                }
            };
            if h1 && (defect.is_some() || desk.is_last(number)) {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            if h1 && leaves_http(&method, answer.status()) {
                desk.pulse.becomes_tunnel();
            }
            Ok(answer)
        }
    }

    /// Whether the connection ends with this answer, so that the client hears it in time.
    fn is_last(&self, number: u64) -> bool {
        self.context.draining.is_draining()
            || self.retired.is_draining()
            || self.pulse.defect_at(number + 1).is_some()
    }

    fn defect(&self, number: u64, request: &Request<Incoming>) -> Option<HeadDefect> {
        self.pulse.defect_at(number).or_else(|| {
            let hosts = request.headers().get_all(HOST).iter().take(2).count();
            let needed = usize::from(request.version() == Version::HTTP_11);
            (hosts < needed || hosts > 1).then_some(HeadDefect::Host)
        })
    }

    fn refuse(
        &self,
        endpoint: Endpoint,
        (status, code, message): (StatusCode, &'static str, &'static str),
        exchange: Exchange,
    ) -> Response<AnswerBody<H::Body>> {
        self.context.telemetry.metrics.count_rejection(code);
        let rejection = Rejection {
            status,
            code,
            message: message.into(),
            request_id: "",
            attempts: 0,
            param: None,
            retry_after: None,
        };
        let (content_type, body) = error_body(endpoint.dialect(), &rejection);
        let source = Source::Own(Some(body.into()));
        let telemetry = Arc::clone(&self.context.telemetry);
        let mut answer = Response::new(AnswerBody::new(source, exchange, telemetry));
        *answer.status_mut() = status;
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        answer
    }
}

const FAILED: (StatusCode, &str, &str) =
    (StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "evergate itself failed on this request");
const TOO_MANY_HEADERS: (StatusCode, &str, &str) =
    (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "too_many_headers", "more header fields than are accepted");

/// Whether the bytes behind this answer are no HTTP any more.
fn leaves_http(method: &Method, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || (*method == Method::CONNECT && status.is_success())
}

fn told(telemetry: &Telemetry, task: &dyn fmt::Display, panic: &(dyn Any + Send)) {
    let message = panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    PanicCaught { task, message: &message }.emit(telemetry);
}

/// The handler's body, or evergate's own. Dropping it ends the exchange.
pub(super) struct AnswerBody<B> {
    source: Source<B>,
    /// The latest turn in which the source had nothing. hyper asks again within it, once it has written.
    had_nothing: Option<NonZeroU64>,
    failed: Option<Failed>,
    exchange: Exchange,
    telemetry: Arc<Telemetry>,
}

enum Source<B> {
    Handler(B),
    Own(Option<Bytes>),
}

/// A failure not yet shown, and how often the connection had settled before it.
struct Failed {
    error: BoxError,
    settled: u64,
}

impl<B> AnswerBody<B> {
    fn new(source: Source<B>, exchange: Exchange, telemetry: Arc<Telemetry>) -> Self {
        Self { source, had_nothing: None, failed: None, exchange, telemetry }
    }

    fn poll_source(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>>
    where
        B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
    {
        if self.failed.is_some() {
            return self.poll_failed(cx);
        }
        let body = match &mut self.source {
            Source::Handler(body) => body,
            Source::Own(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
        };
        let turn = Turn::number();
        if turn.is_some() && turn == self.had_nothing {
            return Poll::Pending;
        }
        let error = match catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx))) {
            Ok(Poll::Ready(Some(Err(error)))) => error.into(),
            Ok(Poll::Ready(Some(Ok(frame)))) => return Poll::Ready(Some(Ok(frame))),
            Ok(Poll::Ready(None)) => return Poll::Ready(None),
            Ok(Poll::Pending) => {
                self.had_nothing = turn;
                return Poll::Pending;
            }
            Err(panic) => {
                told(&self.telemetry, &"the body of an answer", panic.as_ref());
                "the answer's source panicked".into()
            }
        };
        self.failed = Some(Failed { error, settled: self.exchange.pulse().settled() });
        self.poll_failed(cx)
    }

    /// Shows the failure once everything written before it has left.
    fn poll_failed(&mut self, cx: &TaskContext<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let pulse = self.exchange.pulse();
        match self.failed.take() {
            None => Poll::Ready(None),
            Some(failed) if failed.settled == pulse.settled() => {
                self.failed = Some(failed);
                pulse.hold(cx.waker());
                Poll::Pending
            }
            Some(failed) => {
                pulse.cut();
                self.source = Source::Own(None);
                Poll::Ready(Some(Err(failed.error)))
            }
        }
    }
}

impl<B> Body for AnswerBody<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = self.poll_source(cx);
        streams::asked(if polled.is_pending() { Asked::Waits } else { Asked::Gave });
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            _ if self.failed.is_some() => false,
            Source::Handler(body) => body.is_end_stream(),
            Source::Own(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Handler(body) => body.size_hint(),
            Source::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
        }
    }
}
