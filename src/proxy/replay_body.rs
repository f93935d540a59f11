//! The request's body: kept whole where it may have to be sent again, passed on as it comes where not.
//!
//! Inference bodies are kept up to `replay_body_max`, small announced ones of other requests too. Kept bodies
//! are shared bytes: sending them again copies nothing. What is longer streams to one backend behind the part
//! that was read, and so does what there is no memory for.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::clock::{self, Alarm, Alarms};
use crate::policy::Moment;
use crate::proxy::respond::Refusal;
use crate::proxy::worker::{Held, Memory};
use crate::upstream::{OutBody, UploadBroken};

/// Bodies of other requests are kept when their announced length is within this.
const SMALL_BODY_BYTES: u64 = 64 * 1024;

/// A request body, as far as it was read.
#[derive(Default)]
pub(super) enum ReplayBody {
    /// There is none.
    #[default]
    Empty,
    /// All of it, and its share of the memory bound.
    Whole {
        /// All of it, shared by all attempts.
        bytes: Bytes,
        _held: Held,
    },
    /// Still coming; gone once it was sent to somebody. What went wrong with it is told beside it.
    Streamed(Option<Upload>, Arc<OnceLock<Refusal>>),
}

/// The bounds of one upload.
pub(super) struct Bounds<'a> {
    /// Of the process.
    pub(super) memory: &'a Memory,
    /// As admitted.
    pub(super) limits: &'a crate::config::Limits,
    /// Longest silence.
    pub(super) idle: std::time::Duration,
    /// Whether the endpoint's bodies are kept.
    pub(super) keep: bool,
}

impl ReplayBody {
    /// Takes in `incoming` as far as it is to be kept. `alarms` serves the silence clock.
    ///
    /// # Errors
    /// The client's: too large, silent, or broken off.
    pub(super) async fn receive(
        incoming: Incoming,
        bounds: &Bounds<'_>,
        alarms: &Alarms,
    ) -> Result<Self, Refusal> {
        if incoming.is_end_stream() {
            return Ok(Self::Empty);
        }
        let announced = incoming.size_hint().exact();
        let small = announced.is_some_and(|length| length <= SMALL_BODY_BYTES);
        let mut upload = Upload::new(incoming, bounds, alarms);
        if !bounds.keep && !small {
            return Ok(Self::streamed(upload));
        }
        let max = bounds.limits.replay_body_max;
        if announced.is_some_and(|length| length > max as u64) {
            return Ok(Self::streamed(upload));
        }
        // What was announced takes no memory until it comes, or a few idle clients would take it all.
        let mut held = Held::default();
        let mut whole = Gathered::new(announced);
        while let Some(chunk) = std::future::poll_fn(|cx| upload.poll_chunk(cx)).await {
            let chunk = chunk?;
            let fits = held.grow(bounds.memory, chunk.len() as u64, bounds.limits.memory_max);
            whole.push(chunk);
            if whole.len() > max || !fits {
                upload.prefix = Some(whole.finish());
                upload.shed = !fits;
                return Ok(Self::streamed(upload));
            }
        }
        Ok(Self::Whole { bytes: whole.finish(), _held: held })
    }

    fn streamed(upload: Upload) -> Self {
        let fault = upload.fault.clone();
        Self::Streamed(Some(upload), fault)
    }

    /// What is sent to a backend: `instead` of a body that was kept, where there is another for its pool. A
    /// streamed body is given away.
    pub(super) fn out(&mut self, instead: Option<&Bytes>) -> OutBody {
        match self {
            Self::Empty => OutBody::Empty,
            Self::Whole { bytes, .. } => OutBody::Whole(Some(instead.unwrap_or(bytes).clone())),
            Self::Streamed(upload, _) => match upload.take() {
                Some(upload) => OutBody::Streamed(Box::pin(upload)),
                None => OutBody::Empty,
            },
        }
    }

    /// Whether it can be sent (again).
    pub(super) fn is_here(&self) -> bool {
        !matches!(self, Self::Streamed(None, _))
    }

    /// Whether it comes while it is sent.
    pub(super) fn is_streamed(&self) -> bool {
        matches!(self, Self::Streamed(..))
    }

    /// Whether it would have been kept, had there been memory for it.
    pub(super) fn was_shed(&self) -> bool {
        matches!(self, Self::Streamed(Some(Upload { shed: true, .. }), _))
    }

    /// Its bytes, where they are all here.
    pub(super) fn bytes(&self) -> Option<&Bytes> {
        match self {
            Self::Whole { bytes, .. } => Some(bytes),
            Self::Empty | Self::Streamed(..) => None,
        }
    }

    /// What went wrong while it was streamed.
    pub(super) fn fault(&self) -> Refusal {
        match self {
            Self::Streamed(_, fault) => fault.get().cloned().unwrap_or(Refusal::UploadBroken),
            Self::Empty | Self::Whole { .. } => Refusal::UploadBroken,
        }
    }

    /// Sends these bytes instead: a model was renamed.
    pub(super) fn replace(&mut self, bytes: Bytes) {
        if let Self::Whole { bytes: whole, .. } = self {
            *whole = bytes;
        }
    }
}

/// Chunks becoming one piece: the first is kept as it is, and most bodies are one.
struct Gathered {
    first: Option<Bytes>,
    rest: BytesMut,
    expected: usize,
}

impl Gathered {
    fn new(announced: Option<u64>) -> Self {
        let expected = announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        Self { first: None, rest: BytesMut::new(), expected }
    }

    fn push(&mut self, chunk: Bytes) {
        if self.rest.is_empty() && self.first.is_none() {
            self.first = Some(chunk);
            return;
        }
        if let Some(first) = self.first.take() {
            self.rest.reserve(self.expected.max(first.len() + chunk.len()));
            self.rest.extend_from_slice(&first);
        }
        self.rest.extend_from_slice(&chunk);
    }

    fn len(&self) -> usize {
        self.first.as_ref().map_or(self.rest.len(), Bytes::len)
    }

    fn finish(self) -> Bytes {
        self.first.unwrap_or_else(|| self.rest.freeze())
    }
}

/// A body that is still arriving from its client.
pub(super) struct Upload {
    /// Read already.
    prefix: Option<Bytes>,
    /// For want of memory it is not kept.
    shed: bool,
    incoming: Incoming,
    received: u64,
    bytes_max: u64,
    idle: std::time::Duration,
    alarms: Alarms,
    /// Made when the body makes us wait for the first time; most are here with their head.
    alarm: Option<Alarm>,
    since: Moment,
    waiting: bool,
    /// Why it did not go on.
    fault: Arc<OnceLock<Refusal>>,
}

impl Upload {
    fn new(incoming: Incoming, bounds: &Bounds<'_>, alarms: &Alarms) -> Self {
        Self {
            prefix: None,
            shed: false,
            incoming,
            received: 0,
            bytes_max: bounds.limits.body_bytes_max,
            idle: bounds.idle,
            alarms: alarms.clone(),
            alarm: None,
            since: clock::now(),
            waiting: false,
            fault: Arc::default(),
        }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Refusal>>> {
        loop {
            let frame = match self.poll_incoming(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(refusal))) => return Poll::Ready(Some(Err(refusal))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            };
            // Trailers of a request that is kept are dropped: no inference API has any.
            if let Ok(chunk) = frame.into_data() {
                return Poll::Ready(Some(Ok(chunk)));
            }
        }
    }

    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.waiting = false;
                self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if self.received > self.bytes_max {
                    return Poll::Ready(Some(Err(Refusal::TooLarge(self.bytes_max))));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_broken))) => Poll::Ready(Some(Err(Refusal::UploadBroken))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                if !self.waiting {
                    (self.waiting, self.since) = (true, clock::now());
                    self.alarm.get_or_insert_with(|| self.alarms.alarm()).set(self.since + self.idle);
                }
                let expired = self.alarm.as_ref().map_or(Poll::Pending, |alarm| alarm.poll_expired(cx));
                match expired {
                    Poll::Ready(()) => Poll::Ready(Some(Err(Refusal::UploadTimeout))),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = UploadBroken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadBroken>>> {
        let upload = self.get_mut();
        if let Some(prefix) = upload.prefix.take() {
            return Poll::Ready(Some(Ok(Frame::data(prefix))));
        }
        upload.poll_incoming(cx).map(|frame| {
            frame.map(|frame| {
                frame.map_err(|refusal| {
                    // The first word counts.
                    let _ = upload.fault.set(refusal);
                    UploadBroken
                })
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.prefix.is_none() && self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.incoming.size_hint();
        let ahead = self.prefix.as_ref().map_or(0, |prefix| prefix.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + ahead);
        }
        hint.set_lower(hint.lower() + ahead);
        hint
    }
}
