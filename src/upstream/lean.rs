//! An HTTP/1.1 connection to a backend that is driven by whoever uses it: no task, no channel, no buffer of its own.
//!
//! The request is in memory and goes out in one write; what is read passes through a buffer of the thread and is
//! kept only as large as it was, so that a stream between two tokens holds nothing. Serves whole
//! requests only: a body that comes while it is sent, and a switch to another protocol, are hyper's ([ADR
//! 22](../../docs/adr/0022-lean-http1.md)). Dropping it closes the socket.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use http::Method;
use http_body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::upstream::framing::{Framing, Step};
use crate::upstream::head::{self, AnswerHead, BadHead, Begun};
use crate::upstream::send::{SendError, SendFailure};
use crate::upstream::tap::Tap;
use crate::upstream::{Answer, InBody, Lane, OpenCount, OutHead, Target, Traffic, says_close};

/// Read at most at once. What comes is copied out, so it costs one buffer for each thread.
const READ_BYTES: usize = 64 * 1024;
/// A body up to this is copied behind its head: one piece is cheaper to write than two.
const JOINED_BODY_BYTES: usize = 4 * 1024;

thread_local! {
    /// What is read goes through here; between two polls it holds nothing.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// A socket, plain or TLS.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Stream for T {}

/// One connection.
pub(super) struct Lean {
    io: Tap<Box<dyn Stream>>,
    pub(super) traffic: Arc<Traffic>,
    /// The lane's, when it was begun.
    pub(super) era: u64,
    /// Still to be written: what is in memory, and whether it must be pushed on then.
    head: Bytes,
    body: Bytes,
    unflushed: bool,
    /// Read and not looked at yet.
    unread: Bytes,
    /// Of the answer's head.
    begun: Begun,
    /// Of the answer's body.
    framing: Framing,
    /// Of the request under way.
    method: Method,
    /// Bytes that had been written and read before it.
    before: (u64, u64),
    _open: OpenCount,
}

impl Lean {
    pub(super) fn new(io: Tap<Box<dyn Stream>>, traffic: Arc<Traffic>, open: OpenCount) -> Self {
        Self {
            io,
            traffic,
            era: 0,
            head: Bytes::new(),
            body: Bytes::new(),
            unflushed: false,
            unread: Bytes::new(),
            begun: Begun::default(),
            framing: Framing::Ended,
            method: Method::GET,
            before: (0, 0),
            _open: open,
        }
    }

    /// Whether the peer has neither closed nor said anything: between two requests it has nothing to say. `waker`
    /// is woken when that changes.
    pub(super) fn is_quiet(&mut self, waker: &Waker) -> bool {
        let mut byte = [0];
        let mut byte = ReadBuf::new(&mut byte);
        Pin::new(&mut self.io).poll_read(&mut Context::from_waker(waker), &mut byte).is_pending()
    }

    /// Whether another request may follow: the answer was read to its end and nothing behind it, the request
    /// was written to its end, and nobody said that this is the last.
    pub(super) fn is_reusable(&self) -> bool {
        self.framing.is_ended() && self.unread.is_empty() && !self.is_sending() && !self.traffic.is_last()
    }

    fn is_sending(&self) -> bool {
        !self.head.is_empty() || !self.body.is_empty() || self.unflushed
    }

    fn begin(&mut self, target: &Target, head: &OutHead<'_>, body: Bytes) {
        self.traffic.mark();
        self.traffic.set_last(says_close(head.headers));
        self.before = (self.traffic.written(), self.traffic.read());
        self.method = head.method.clone();
        // RFC 9110 §8.6: where a body is usual, its absence is said.
        let usual = matches!(*head.method, Method::POST | Method::PUT | Method::PATCH);
        let length = (usual || !body.is_empty()).then_some(body.len() as u64);
        let joined = if body.len() <= JOINED_BODY_BYTES { body.len() } else { 0 };
        let mut out = head::write(head, &target.host, length, joined);
        out.extend_from_slice(&body[..joined]);
        self.head = out.into();
        self.body = if joined == 0 { body } else { Bytes::new() };
        self.unflushed = true;
    }

    /// Goes on writing. Ready when all is written, or cannot be.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.head.is_empty() || !self.body.is_empty() {
            let io = Pin::new(&mut self.io);
            // One piece is sent at less cost to the kernel than a list of one.
            let written = ready!(match self.body.is_empty() {
                true => io.poll_write(cx, &self.head),
                false => io.poll_write_vectored(cx, &[IoSlice::new(&self.head), IoSlice::new(&self.body)]),
            })?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_head = written.min(self.head.len());
            self.head.advance(of_head);
            self.body.advance(written - of_head);
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            (self.head, self.body, self.unflushed) = (Bytes::new(), Bytes::new(), false);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads on, into `unread`. False at the end of the connection.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.is_sending() {
            // Whether it is done or has to wait: an answer may come before all of the request was taken.
            let _sent = self.poll_send(cx)?;
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut scratch = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut scratch))?;
            self.unread = Bytes::copy_from_slice(scratch.filled());
            Poll::Ready(Ok(!self.unread.is_empty()))
        })
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<AnswerHead, (SendFailure, io::Error)>> {
        loop {
            match ready!(self.poll_read(cx)) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(Err((SendFailure::Closed, ended()))),
                Err(error) => return Poll::Ready(Err((SendFailure::Closed, error))),
            }
            match self.begun.read(&mut self.unread, &self.method) {
                Ok(None) => {}
                Ok(Some(head)) => return Poll::Ready(Ok(head)),
                Err(BadHead::Protocol(what)) => {
                    return Poll::Ready(Err((SendFailure::Protocol, io::Error::other(what))));
                }
                Err(BadHead::TooLarge) => {
                    let error = io::Error::other("a head beyond the limits");
                    return Poll::Ready(Err((SendFailure::HeadTooLarge, error)));
                }
            }
        }
    }

    /// What the answer's body still announces.
    pub(super) fn announced(&self) -> Option<u64> {
        self.framing.announced()
    }

    /// The answer's body is here to its end.
    pub(super) fn is_ended(&self) -> bool {
        self.framing.is_ended()
    }

    /// The next piece of the answer's body; `None` is its end, by its length, its last chunk, or a close that
    /// nothing announced otherwise.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        let failed = |failure, source| SendError { failure, sent: true, answered: true, source };
        loop {
            match self.framing.next(&mut self.unread) {
                Step::Data(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Step::Trailers(trailers) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Step::End => return Poll::Ready(None),
                Step::Broken => {
                    let error = io::Error::other("a chunk is malformed");
                    return Poll::Ready(Some(Err(failed(SendFailure::Protocol, error))));
                }
                Step::Need => {}
            }
            match ready!(self.poll_read(cx)) {
                Ok(true) => {}
                Ok(false) if matches!(self.framing, Framing::ToClose) => self.framing = Framing::Ended,
                Ok(false) => return Poll::Ready(Some(Err(failed(SendFailure::Closed, ended())))),
                Err(error) => return Poll::Ready(Some(Err(failed(SendFailure::Closed, error)))),
            }
        }
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed")
}

/// A request under way: resolves to the head of its answer.
pub(super) struct LeanSend {
    /// Gone once it has resolved.
    connection: Option<Box<Lean>>,
    lane: Option<Arc<Lane>>,
}

impl LeanSend {
    pub(super) fn new(
        lane: Arc<Lane>,
        mut connection: Box<Lean>,
        target: &Target,
        head: &OutHead<'_>,
        body: Bytes,
    ) -> Self {
        connection.begin(target, head, body);
        Self { connection: Some(connection), lane: Some(lane) }
    }
}

impl Future for LeanSend {
    type Output = Result<Answer, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let lean = this.connection.as_mut().expect("it is not polled again after it has resolved");
        let read = ready!(lean.poll_head(cx));
        let (connection, lane) = this.connection.take().zip(this.lane.take()).expect("both go together");
        Poll::Ready(match read {
            Ok(head) => Ok(answer(connection, lane, head)),
            Err((failure, source)) => {
                let traffic = &connection.traffic;
                let sent = traffic.written() > connection.before.0;
                let answered = traffic.read() > connection.before.1;
                Err(SendError { failure, sent, answered, source })
            }
        })
    }
}

fn answer(mut connection: Box<Lean>, lane: Arc<Lane>, head: AnswerHead) -> Answer {
    let AnswerHead { parts, framing, last } = head;
    connection.framing = framing;
    if last {
        connection.traffic.set_last(true);
    }
    Answer { head: parts, body: InBody::lean(connection, lane) }
}
