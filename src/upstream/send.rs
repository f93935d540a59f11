//! One exchange on a leased connection, and what is known when it fails.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version, header, request, response};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;

use crate::upstream::{H1, H2Stream, Lane, Lease, Leased, OutBody, Target, Traffic};

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
    /// What the library said.
    pub source: hyper::Error,
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
/// resets the stream (HTTP/2). Boxed, so that what waits for it need not carry its state about.
pub type Sending = Pin<Box<dyn Future<Output = Result<Answer, SendError>> + Send>>;

impl Lease {
    /// Sends a request. `head.uri` is in origin form; `Host` or `:authority` is the target's.
    pub fn send(self, target: &Target, mut head: request::Parts, body: OutBody) -> Sending {
        let lane = self.lane;
        match self.connection {
            Leased::H1(h1) => {
                head.version = Version::HTTP_11;
                head.headers.insert(header::HOST, target.host.clone());
                // RFC 9110 §8.6: where a body is usual, its absence is said. hyper does not say it.
                let usual = matches!(head.method, Method::POST | Method::PUT | Method::PATCH);
                if usual && matches!(body, OutBody::Empty) {
                    head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
                }
                send_h1(lane, h1, Request::from_parts(head, body))
            }
            Leased::H2(stream) => {
                head.version = Version::HTTP_2;
                head.headers.remove(header::HOST);
                head.uri = absolute(&head.uri, target.authority.clone(), target.tls.is_some());
                Box::pin(send_h2(lane, stream, Request::from_parts(head, body)))
            }
        }
    }
}

fn send_h1(lane: Arc<Lane>, mut h1: H1, request: Request<OutBody>) -> Sending {
    h1.traffic.mark();
    h1.traffic.set_last(says_close(request.headers()));
    let before = (h1.traffic.written(), h1.traffic.read());
    // Handed over here, so that only what waits for the answer is boxed.
    let sent = h1.sender.try_send_request(request);
    Box::pin(h1_answer(lane, h1, before, sent))
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
            // Of this connection, not of the client's.
            if head.version < Version::HTTP_11 || says_close(&head.headers) {
                h1.traffic.set_last(true);
            }
            head.version = Version::HTTP_11;
            if head.headers.contains_key(header::TRANSFER_ENCODING) {
                // RFC 9112 §6.3: the encoding wins. hyper obeys, and leaves the length for others to believe.
                head.headers.remove(header::CONTENT_LENGTH);
            }
            Ok(Answer { head: Box::new(head), body: InBody::new(incoming, Leased::H1(h1), lane) })
        }
        Err(mut refused) => {
            let unsent = refused.take_message().is_some();
            let sent = !unsent && h1.traffic.written() > before.0;
            let answered = h1.traffic.read() > before.1;
            let source = refused.into_error();
            Err(SendError { failure: failure_of(&source), sent, answered, source })
        }
    }
}

/// Whether a head says that its connection ends with the message.
fn says_close(headers: &HeaderMap) -> bool {
    let says = |value: &HeaderValue| {
        value
            .to_str()
            .is_ok_and(|value| value.split(',').any(|word| word.trim().eq_ignore_ascii_case("close")))
    };
    // Nearly no head has the field, and looking for one is cheaper than looking for several.
    headers.contains_key(header::CONNECTION) && headers.get_all(header::CONNECTION).iter().any(says)
}

async fn send_h2(lane: Arc<Lane>, stream: H2Stream, request: Request<OutBody>) -> Result<Answer, SendError> {
    let mut sender = stream.0.sender.clone();
    match sender.try_send_request(request).await {
        Ok(response) => {
            let (head, incoming) = response.into_parts();
            Ok(Answer { head: Box::new(head), body: InBody::new(incoming, Leased::H2(stream), lane) })
        }
        Err(mut refused) => {
            let unsent = refused.take_message().is_some();
            let source = refused.into_error();
            let failure = failure_of(&source);
            // HTTP/2 multiplexes: bytes on the socket say nothing about this one stream.
            let sent = !unsent && failure != SendFailure::Refused;
            Err(SendError { failure, sent, answered: false, source })
        }
    }
}

/// The frames of an answer. The connection goes back to its lane after the last one.
pub struct InBody {
    incoming: Incoming,
    /// Gone once it went back.
    home: Option<(Leased, Arc<Lane>)>,
}

impl InBody {
    fn new(incoming: Incoming, connection: Leased, lane: Arc<Lane>) -> Self {
        let mut body = Self { incoming, home: Some((connection, lane)) };
        if body.incoming.is_end_stream() {
            body.release();
        }
        body
    }

    /// Nothing more will come.
    pub fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    /// The length the backend announced, if it did.
    pub fn announced(&self) -> Option<u64> {
        self.incoming.size_hint().exact()
    }

    /// Counts of the connection, while it is held.
    pub fn traffic(&self) -> Option<&Traffic> {
        self.home.as_ref().map(|(connection, _)| match connection {
            Leased::H1(h1) => &*h1.traffic,
            Leased::H2(stream) => &*stream.0.traffic,
        })
    }

    /// The next frame; `None` is the end the protocol vouches for, an error any other end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(frame))) => {
                if self.incoming.is_end_stream() {
                    self.release();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.release();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(source))) => {
                // The connection is of no more use; it closes here, not when the client lets go.
                self.home = None;
                let failure = failure_of(&source);
                Poll::Ready(Some(Err(SendError { failure, sent: true, answered: true, source })))
            }
        }
    }

    /// The next frame, awaited.
    pub async fn frame(&mut self) -> Option<Result<Frame<Bytes>, SendError>> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    fn release(&mut self) {
        if let Some((Leased::H1(h1), lane)) = self.home.take() {
            lane.keep(h1);
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
        if let Some(io) = cause.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::InvalidInput
        {
            // hyper reports a broken chunk size as invalid input.
            return SendFailure::Protocol;
        }
        source = cause.source();
    }
    SendFailure::Closed
}

fn absolute(uri: &Uri, authority: http::uri::Authority, secure: bool) -> Uri {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(if secure { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
    parts.authority = Some(authority);
    Uri::from_parts(parts).unwrap_or_else(|_| Uri::from_static("/"))
}
