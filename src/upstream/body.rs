//! The body of a request on its way to a backend.
//!
//! `Whole` is the ordinary case: shared bytes, sent again on every attempt without a copy. `Streamed`
//! is for uploads too large to keep, and for endpoints that are not inference.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// Why an upload could not go on. Never the backend's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadBroken;

impl std::fmt::Display for UploadBroken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the client's request body ended before it was complete")
    }
}

impl std::error::Error for UploadBroken {}

impl From<Infallible> for UploadBroken {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// A body that is not in memory as a whole.
pub type StreamedBody = Pin<Box<dyn Body<Data = Bytes, Error = UploadBroken> + Send>>;

/// What is sent to a backend as the body of a request.
pub enum OutBody {
    /// No body at all.
    Empty,
    /// All of it; taken by the first poll.
    Whole(Option<Bytes>),
    /// Pulled from the client while it is sent.
    Streamed(StreamedBody),
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = UploadBroken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadBroken>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Streamed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Self::Streamed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Streamed(body) => body.size_hint(),
        }
    }
}
