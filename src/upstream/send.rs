//! One exchange on a leased connection, and what is known when it fails.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version, header, request, response,
};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;

use crate::upstream::lean::{Lean, LeanSend};
use crate::upstream::{H1, H2Stream, Lane, Lease, Leased, OutBody, Target, Traffic, says_close};

/// The head of a request as an attempt knows it; `Host` or `:authority` is the target's, lengths are the body's.
pub struct OutHead<'a> {
    /// What is asked.
    pub method: &'a Method,
    /// In origin form.
    pub path: PathAndQuery,
    /// Fields, but for those that follow.
    pub headers: &'a HeaderMap,
    /// Fields that stand for all of the same name in `headers`.
    pub own: &'a [(HeaderName, HeaderValue)],
    /// Fields of this attempt alone: they stand for all of the same name in both.
    pub also: &'a [(HeaderName, HeaderValue)],
}

/// A response head, and its body still to come.
pub struct Answer {
    /// Status, fields, extensions. Boxed: it passes through many hands.
    pub head: Box<response::Parts>,
    /// Frames as they arrive.
    pub body: InBody,
}

/// Why no (further) response came. Facts only.
#[derive(Debug)]
pub struct SendError {
    /// What happened.
    pub failure: SendFailure,
    /// Whether a byte of the request may have reached the backend.
    pub sent: bool,
    /// Whether a byte of an answer was read.
    pub answered: bool,
    /// What the system or a library said.
    pub source: io::Error,
}

/// Kinds of failure after a connection stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendFailure {
    /// Closed or reset by the backend.
    Closed,
    /// What it sent is not HTTP.
    Protocol,
    /// Its response head exceeds the limits.
    HeadTooLarge,
    /// HTTP/2: the stream was refused or lies beyond a GOAWAY, so nothing of it was processed.
    Refused,
    /// The client's upload broke off.
    Upload,
}

/// The exchange under way: resolves to the response head. Dropping it closes the connection (HTTP/1.1) or
/// resets the stream (HTTP/2).
pub struct Sending(Way);

enum Way {
    Lean(LeanSend),
    /// Boxed, so that what waits for it need not carry its state about.
    Hyper(Pin<Box<dyn Future<Output = Result<Answer, SendError>> + Send>>),
}

impl Future for Sending {
    type Output = Result<Answer, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Way::Lean(sending) => Pin::new(sending).poll(cx),
            Way::Hyper(sending) => sending.as_mut().poll(cx),
        }
    }
}

impl Lease {
    /// Sends a request. A body that comes while it is sent needs a lease that was asked for by `Want::Streamed`
    /// or `Want::Upgradable`.
    pub fn send(self, target: &Target, head: &OutHead<'_>, body: OutBody) -> Sending {
        let lane = self.lane;
        Sending(match (self.connection, body) {
            (Leased::Lean(lean), OutBody::Empty) => {
                Way::Lean(LeanSend::new(lane, lean, target, head, Bytes::new()))
            }
            (Leased::Lean(lean), OutBody::Whole(body)) => {
                Way::Lean(LeanSend::new(lane, lean, target, head, body.unwrap_or_default()))
            }
            (Leased::Lean(_), OutBody::Streamed(_)) => {
                debug_assert!(false, "leased without a word of its body");
                let source = io::Error::other("a body that is not here");
                let failure = SendFailure::Upload;
                Way::Hyper(Box::pin(std::future::ready(Err(SendError {
                    failure,
                    sent: false,
                    answered: false,
                    source,
                }))))
            }
            (Leased::H1(h1), body) => {
                let mut parts = parts(head, Uri::from(head.path.clone()));
                parts.headers.insert(header::HOST, target.host.clone());
                // RFC 9110 §8.6: where a body is usual, its absence is said. hyper does not say it.
                let usual = matches!(parts.method, Method::POST | Method::PUT | Method::PATCH);
                if usual && matches!(body, OutBody::Empty) {
                    parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
                }
                send_h1(lane, h1, Request::from_parts(parts, body))
            }
            (Leased::H2(stream), body) => {
                let uri = absolute(&head.path, target.authority.clone(), target.tls.is_some());
                let mut parts = parts(head, uri);
                parts.version = Version::HTTP_2;
                parts.headers.remove(header::HOST);
                Way::Hyper(Box::pin(send_h2(lane, stream, Request::from_parts(parts, body))))
            }
        })
    }
}

/// The head as hyper wants it.
fn parts(head: &OutHead<'_>, uri: Uri) -> request::Parts {
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = head.method.clone();
    parts.uri = uri;
    parts.headers = head.headers.clone();
    // The body's own length is said.
    parts.headers.remove(header::CONTENT_LENGTH);
    for (name, value) in head.own.iter().chain(head.also) {
        parts.headers.insert(name.clone(), value.clone());
    }
    parts
}

fn send_h1(lane: Arc<Lane>, mut h1: H1, request: Request<OutBody>) -> Way {
    h1.traffic.mark();
    h1.traffic.set_last(says_close(request.headers()));
    let before = (h1.traffic.written(), h1.traffic.read());
    let sent = h1.sender.try_send_request(request);
    Way::Hyper(Box::pin(h1_answer(lane, h1, before, sent)))
}

async fn h1_answer(
    lane: Arc<Lane>,
    h1: H1,
    before: (u64, u64),
    sent: impl Future<Output = Result<Response<Incoming>, TrySendError<Request<OutBody>>>>,
) -> Result<Answer, SendError> {
    match sent.await {
        Ok(response) => {
            let (mut head, incoming) = response.into_parts();
            head.version = Version::HTTP_11;
            if head.headers.contains_key(header::TRANSFER_ENCODING) {
                // RFC 9112 §6.3: the encoding wins. hyper obeys, and leaves the length for others to believe.
                head.headers.remove(header::CONTENT_LENGTH);
            }
            Ok(Answer { head: Box::new(head), body: InBody::hyper(incoming, Leased::H1(h1), lane) })
        }
        Err(mut refused) => {
            let unsent = refused.take_message().is_some();
            let sent = !unsent && h1.traffic.written() > before.0;
            let answered = h1.traffic.read() > before.1;
            let error = refused.into_error();
            Err(SendError { failure: failure_of(&error), sent, answered, source: io::Error::other(error) })
        }
    }
}

async fn send_h2(lane: Arc<Lane>, stream: H2Stream, request: Request<OutBody>) -> Result<Answer, SendError> {
    let mut sender = stream.0.sender.clone();
    match sender.try_send_request(request).await {
        Ok(response) => {
            let (head, incoming) = response.into_parts();
            Ok(Answer { head: Box::new(head), body: InBody::hyper(incoming, Leased::H2(stream), lane) })
        }
        Err(mut refused) => {
            let unsent = refused.take_message().is_some();
            let error = refused.into_error();
            let failure = failure_of(&error);
            // HTTP/2 multiplexes: bytes on the socket say nothing about this one stream.
            let sent = !unsent && failure != SendFailure::Refused;
            Err(SendError { failure, sent, answered: false, source: io::Error::other(error) })
        }
    }
}

/// The frames of an answer. The connection goes back to its lane after the last one.
pub struct InBody(Source);

enum Source {
    /// Gone once it went back.
    Lean(Option<(Box<Lean>, Arc<Lane>)>),
    Hyper {
        incoming: Incoming,
        /// Gone once it ended.
        home: Option<(Leased, Arc<Lane>)>,
    },
}

impl InBody {
    pub(super) fn lean(connection: Box<Lean>, lane: Arc<Lane>) -> Self {
        let mut body = Self(Source::Lean(Some((connection, lane))));
        body.release_at_end();
        body
    }

    fn hyper(incoming: Incoming, connection: Leased, lane: Arc<Lane>) -> Self {
        let mut body = Self(Source::Hyper { incoming, home: Some((connection, lane)) });
        body.release_at_end();
        body
    }

    /// Nothing more will come.
    pub fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Lean(connection) => connection.as_ref().is_none_or(|(lean, _)| lean.is_ended()),
            Source::Hyper { incoming, .. } => incoming.is_end_stream(),
        }
    }

    /// The length the backend announced, if it did: what is still to come of it.
    pub fn announced(&self) -> Option<u64> {
        match &self.0 {
            Source::Lean(connection) => connection.as_ref().map_or(Some(0), |(lean, _)| lean.announced()),
            Source::Hyper { incoming, .. } => incoming.size_hint().exact(),
        }
    }

    /// Counts of the connection, while it is held.
    pub fn traffic(&self) -> Option<&Traffic> {
        match &self.0 {
            Source::Lean(connection) => connection.as_ref().map(|(lean, _)| &*lean.traffic),
            Source::Hyper { home, .. } => home.as_ref().map(|(connection, _)| match connection {
                Leased::Lean(lean) => &*lean.traffic,
                Leased::H1(h1) => &*h1.traffic,
                Leased::H2(stream) => &*stream.0.traffic,
            }),
        }
    }

    /// The next frame; `None` is the end the protocol vouches for, an error any other end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        let polled = match &mut self.0 {
            Source::Lean(None) => Poll::Ready(None),
            Source::Lean(Some((lean, _))) => lean.poll_frame(cx),
            Source::Hyper { incoming, .. } => Pin::new(incoming).poll_frame(cx).map_err(|error| SendError {
                failure: failure_of(&error),
                sent: true,
                answered: true,
                source: io::Error::other(error),
            }),
        };
        match &polled {
            Poll::Pending => {}
            // The connection is of no more use; it closes here, not when the client lets go.
            Poll::Ready(Some(Err(_))) => self.close(),
            Poll::Ready(Some(Ok(_)) | None) => self.release_at_end(),
        }
        polled
    }

    /// The next frame, awaited.
    pub async fn frame(&mut self) -> Option<Result<Frame<Bytes>, SendError>> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    fn close(&mut self) {
        match &mut self.0 {
            Source::Lean(connection) => *connection = None,
            Source::Hyper { home, .. } => *home = None,
        }
    }

    fn release_at_end(&mut self) {
        if !self.is_end_stream() {
            return;
        }
        match &mut self.0 {
            Source::Lean(connection) => {
                if let Some((lean, lane)) = connection.take() {
                    lane.keep(lean);
                }
            }
            Source::Hyper { home, .. } => *home = None,
        }
    }
}

fn failure_of(error: &hyper::Error) -> SendFailure {
    if error.is_parse_too_large() {
        return SendFailure::HeadTooLarge;
    }
    if error.is_parse() {
        return SendFailure::Protocol;
    }
    if error.is_user() {
        return SendFailure::Upload;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            let refused = h2.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR));
            // Reset by our side of the connection, which does so when the body it sends breaks off.
            let ours = h2.is_reset() && !h2.is_remote() && !h2.is_library();
            return match (refused, ours) {
                (true, _) => SendFailure::Refused,
                (_, true) => SendFailure::Upload,
                _ => SendFailure::Closed,
            };
        }
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::InvalidInput
        {
            // hyper reports a broken chunk size as invalid input.
            return SendFailure::Protocol;
        }
        source = cause.source();
    }
    SendFailure::Closed
}

fn absolute(path: &PathAndQuery, authority: Authority, secure: bool) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(path.clone());
    parts.scheme = Some(if secure { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
    parts.authority = Some(authority);
    Uri::from_parts(parts).unwrap_or_else(|_| Uri::from_static("/"))
}
