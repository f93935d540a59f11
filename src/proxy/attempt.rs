//! One try at one backend: connect, send, wait for something that is worth showing to the client.
//!
//! An attempt ends at the *gate*: the first token of a stream, the whole of an inference answer, the first
//! body byte of anything else. Until then the client has seen nothing and everything can be done again.
//! States facts (`retry::Facts`) and hands over what it holds; decides nothing. Dropping it closes the
//! connection, so that the engine stops working for nobody.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, StatusCode, header, response};
use hyper::upgrade::OnUpgrade;

use crate::clock;
use crate::policy::Moment;
use crate::policy::dialect::{
    BadAnswer, Engine, ErrorClass, check_answer, classify_error_answer, grpc_class, is_model_not_found,
};
use crate::policy::resume::{ASKED_EVENT_BYTES_MAX, ask_for_ids};
use crate::policy::retry::{Cause, Facts, Phase};
use crate::pool::Choice;
use crate::proxy::admit::Asked;
use crate::proxy::headers::{self, Own};
use crate::proxy::leg::Leg;
use crate::proxy::token_stream::{Ending, TokenStream};
use crate::proxy::watch::{HeadStage, Stage, Watch};
use crate::proxy::worker::{Held, Worker};
use crate::telemetry::events::CompressedAnswer;
use crate::upstream::{
    Answer as Arrived, ConnectFailure, InBody, Lease, OutBody, OutHead, SendError, SendFailure, Want,
};

/// How much of an error answer is read to find out whose fault it is.
const ERROR_BODY_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a stream held back for its first token; beyond them it is passed on.
const GATE_BYTES_MAX: usize = 1024 * 1024;
/// How long a plain answer's head waits for its first body byte: event sources may begin with silence.
const PLAIN_HEAD_HELD: Duration = Duration::from_secs(1);

const GRPC_STATUS: &str = "grpc-status";

/// What came of an attempt.
pub(super) struct Outcome {
    /// Facts for the judges.
    pub(super) facts: Facts,
    /// Something the client could be shown.
    pub(super) answer: Option<Answer>,
    /// From the start to the response head.
    pub(super) first_byte: Option<Duration>,
    /// When it began.
    pub(super) started: Moment,
}

/// An answer at its gate.
pub(super) enum Answer {
    /// Held until whole.
    Whole {
        /// Its head.
        head: Box<response::Parts>,
        /// Its body.
        body: Bytes,
        /// Where its text stands, if it is a generated one.
        text: Option<Range<usize>>,
        /// What came after it.
        trailers: Option<HeaderMap>,
        /// Its share of the memory bound.
        held: Held,
    },
    /// Passed on as it comes.
    Begun {
        /// Its head.
        head: Box<response::Parts>,
        /// Read already.
        ahead: VecDeque<Bytes>,
        /// Still to come.
        body: InBody,
    },
    /// A token stream whose first token is here.
    Tokens {
        /// Its head.
        head: Box<response::Parts>,
        /// Whole events, ready to go.
        ahead: VecDeque<Bytes>,
        /// Reader of the rest.
        stream: Box<TokenStream>,
        /// Still to come; none when it has ended.
        body: Option<InBody>,
    },
    /// The protocol is switched.
    Switched {
        /// Its head.
        head: Box<response::Parts>,
        /// The connection, once hyper lets go of it.
        upgraded: OnUpgrade,
        /// Keeps the connection until then.
        body: InBody,
    },
    /// The stream opened with an error that is the client's own: a real status after all.
    Refused {
        /// The status it should have had.
        status: StatusCode,
        /// The error, in the backend's words.
        body: Bytes,
    },
}

/// One try.
pub(super) struct Attempt<'a> {
    /// Where it runs.
    pub(super) worker: &'a Worker,
    /// What is asked.
    pub(super) asked: &'a Asked,
    /// By which pool.
    pub(super) leg: &'a Leg,
    /// Of whom.
    pub(super) choice: &'a Choice,
    /// 1 for the first.
    pub(super) number: u32,
    /// Which connection will do.
    pub(super) want: Want,
    /// It may be moved when its backend is ejected.
    pub(super) movable: bool,
    /// The engine may be asked for ids that the client did not ask for: it is not a leg that continues another.
    pub(super) may_ask: bool,
    /// The clocks.
    pub(super) watch: &'a mut Watch,
}

/// What has been seen so far; becomes `Facts`.
struct Seen {
    phase: Phase,
    sent: bool,
    answered: bool,
    reused: bool,
    retry_after: Option<Duration>,
    head_at: Option<Moment>,
    /// The engine that was asked for ids unseen.
    unseen: Option<Engine>,
}

/// The cause of the end, and what could be shown.
type End = (Cause, Option<Answer>);

impl Attempt<'_> {
    /// Runs it to its gate. `body` is asked for once a connection stands.
    pub(super) async fn run(mut self, body: impl FnOnce() -> OutBody) -> Box<Outcome> {
        let started = clock::now();
        let mut seen = Seen {
            phase: Phase::Connect,
            sent: false,
            answered: false,
            reused: false,
            retry_after: None,
            head_at: None,
            unseen: None,
        };
        let steps = self.steps(&mut seen, body, started).await;
        let now = clock::now();
        let (cause, answer) = match steps {
            Ok(end) => {
                self.choice.in_flight.moved(now);
                end
            }
            Err(cause) => {
                self.choice.in_flight.rests();
                (cause, None)
            }
        };
        let facts = Facts {
            phase: seen.phase,
            cause,
            sent: seen.sent,
            answered: seen.answered,
            reused: seen.reused,
            took: now.since(started),
            own_credentials: self.choice.member().params.own_credentials,
            retry_after: seen.retry_after,
            serves_others: cause != Cause::Answered && self.choice.serves(),
        };
        if cause.lost_connection() {
            self.choice.lost_connection();
        }
        let first_byte = seen.head_at.map(|at| at.since(started));
        // Boxed: it is handed on more often than it is made.
        Box::new(Outcome { facts, answer, first_byte, started })
    }

    async fn steps(
        &mut self,
        seen: &mut Seen,
        body: impl FnOnce() -> OutBody,
        started: Moment,
    ) -> Result<End, Cause> {
        if self.movable {
            self.watch.rescue_on(self.choice.ejections());
            self.watch.tell_late(self.choice.in_flight.clock());
        }
        let lease = self.connect(seen).await?;
        let body = self.ask_for_ids(seen, body());
        let arrived = self.send(seen, lease, body, started).await?;
        seen.head_at = Some(clock::now());
        self.gate(seen, arrived, started).await
    }

    /// The body that asks for ids too, where the backend gives them and they may be needed.
    fn ask_for_ids(&self, seen: &mut Seen, body: OutBody) -> OutBody {
        let engine = self.choice.pool.gives_ids(self.choice.index);
        let Some(engine) = engine.filter(|_| self.may_ask && self.movable && self.asked.stream) else {
            return body;
        };
        let OutBody::Whole(Some(bytes)) = &body else { return body };
        match ask_for_ids(self.asked.endpoint, engine, bytes, &self.leg.pool.config.resume) {
            Some(asking) => {
                seen.unseen = Some(engine);
                OutBody::Whole(Some(asking.into()))
            }
            None => body,
        }
    }

    async fn connect(&mut self, seen: &mut Seen) -> Result<Lease, Cause> {
        self.watch.enter(Stage::Open);
        let member = self.choice.member();
        let lane = member.backend.lane(self.worker.index).clone();
        let lease = self.watch.over(lane.lease(&member.target, self.want)).await?;
        let lease = lease.map_err(|error| match error.failure {
            ConnectFailure::Dns => Cause::Dns,
            ConnectFailure::Refused => Cause::Refused,
            ConnectFailure::Timeout => Cause::ConnectTimeout,
            ConnectFailure::Unreachable => Cause::Unreachable,
            ConnectFailure::Tls => Cause::Tls,
            ConnectFailure::Local => Cause::LocalResources,
        })?;
        seen.reused = lease.reused();
        let metrics = &member.backend.metrics;
        if seen.reused {
            metrics.connections_reused.inc()
        } else {
            metrics.connections_opened.inc()
        }
        Ok(lease)
    }

    /// Sends the request and waits for the head of the answer.
    async fn send(
        &mut self,
        seen: &mut Seen,
        lease: Lease,
        body: OutBody,
        started: Moment,
    ) -> Result<Arrived, Cause> {
        seen.phase = Phase::Head;
        let clocks = &self.choice.pool.config.clocks;
        let first = if self.asked.stream { clocks.first_token } else { clocks.answer };
        let traffic = lease.traffic();
        let (written, read) = (traffic.written(), traffic.read());
        let shared = lease.is_h2();
        let length = http_body::Body::size_hint(&body).lower();
        let head = OutHead {
            method: &self.asked.method,
            path: self.path(),
            headers: &self.asked.headers,
            own: &self.asked.own,
            also: &self.also(),
        };
        let sending = lease.send(&self.choice.member().target, &head, body);
        if !self.asked.uploads {
            self.choice.in_flight.waits(started);
        }
        self.watch.enter(Stage::Head(HeadStage {
            due: started + first,
            head: clocks.head,
            write_idle: clocks.write_idle,
            traffic: (!shared).then(|| traffic.clone()),
            request: (written, length),
            progress: (written, started),
        }));
        match self.watch.over(sending).await {
            Ok(Ok(arrived)) => {
                (seen.sent, seen.answered) = (true, true);
                Ok(arrived)
            }
            Ok(Err(error)) => {
                (seen.sent, seen.answered) = (error.sent, error.answered);
                Err(cause_of(&error))
            }
            Err(expired) => {
                (seen.sent, seen.answered) = (shared || traffic.written() > written, traffic.read() > read);
                Err(expired)
            }
        }
    }

    /// What this backend is to see, beside or instead of the fields that every one is sent.
    fn also(&self) -> Own {
        let mut also = Own::new();
        if self.number > 1 {
            also.push((headers::X_REQUEST_ID, headers::attempt_id(&self.asked.id, self.number)));
            also.push((headers::X_EVERGATE_ATTEMPT, self.number.into()));
        }
        also.extend(self.choice.member().params.headers.iter().cloned());
        if let Some(protocol) = &self.asked.upgrade {
            also.push((header::CONNECTION, HeaderValue::from_static("upgrade")));
            also.push((header::UPGRADE, protocol.clone()));
        }
        also
    }

    /// Where the request goes at this backend.
    fn path(&self) -> PathAndQuery {
        let prefix = &self.choice.member().params.path_prefix;
        if prefix.is_empty() {
            return self.leg.path.clone();
        }
        format!("{prefix}{}", self.leg.path).parse().unwrap_or_else(|_| self.leg.path.clone())
    }

    /// Reads on until there is something to show.
    async fn gate(&mut self, seen: &mut Seen, arrived: Arrived, started: Moment) -> Result<End, Cause> {
        let Arrived { mut head, body } = arrived;
        seen.phase = Phase::Gate;
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            let upgraded = head.extensions.remove::<OnUpgrade>();
            return match upgraded.filter(|_| self.asked.upgrade.is_some()) {
                Some(upgraded) => Ok((Cause::Answered, Some(Answer::Switched { head, upgraded, body }))),
                None => Err(Cause::Protocol),
            };
        }
        headers::strip_hop_by_hop(&mut head.headers);
        if head.status.as_u16() >= 400 {
            seen.retry_after = retry_after(&head.headers);
            return self.error_answer(seen, head, body).await;
        }
        if !self.asked.endpoint.is_inference() || !head.status.is_success() {
            return self.plain(seen, head, body, VecDeque::new()).await;
        }
        if let Some(encoding) = compressed(&head.headers) {
            let at = &self.choice.backend().metrics;
            CompressedAnswer { at, encoding: &encoding }.emit(self.worker.telemetry());
            return self.plain(seen, head, body, VecDeque::new()).await;
        }
        match Media::of(&head.headers) {
            Media::Events if self.asked.endpoint.generates() => {
                self.tokens(seen.unseen, head, body, started, false).await
            }
            Media::Lines if self.asked.endpoint.generates() => {
                self.tokens(None, head, body, started, true).await
            }
            Media::Other if self.asked.stream => Err(Cause::WrongContentType),
            _ if self.asked.endpoint.answers_json() => self.json(seen, head, body).await,
            _ => self.plain(seen, head, body, VecDeque::new()).await,
        }
    }

    /// A token stream: held until it says something.
    async fn tokens(
        &mut self,
        unseen: Option<Engine>,
        mut head: Box<response::Parts>,
        mut body: InBody,
        started: Moment,
        lines: bool,
    ) -> Result<End, Cause> {
        // evergate may complete it or end it with an error of its own.
        head.headers.remove(header::CONTENT_LENGTH);
        let limit = self.asked.limits.event_bytes_max;
        // The first event then has the ids of the prompt.
        let limit = if unseen.is_some() { limit.max(ASKED_EVENT_BYTES_MAX) } else { limit };
        let mut stream = Box::new(TokenStream::new(self.asked.endpoint, self.asked.choices, lines, limit));
        if let Some(engine) = unseen {
            stream.asked_unseen(engine);
        }
        let mut ahead = VecDeque::new();
        self.watch.enter(Stage::Gate { due: started + self.choice.pool.config.clocks.first_token });
        let mut any = false;
        loop {
            let frame = self.watch.over(body.frame()).await?;
            let clean = match frame {
                Some(Ok(frame)) => {
                    let Ok(chunk) = frame.into_data() else { continue };
                    any = true;
                    let fed = stream.feed(chunk, &mut ahead, |_, _| {});
                    if fed.too_large {
                        self.worker.telemetry().metrics.count_limit("event_bytes_max");
                    }
                    match fed.broken {
                        // What was said before the break may be whole by itself.
                        Some(_) if stream.is_complete() => {
                            ahead.push_back(stream.complete_locally());
                            return Ok((
                                Cause::Answered,
                                Some(Answer::Tokens { head, ahead, stream, body: None }),
                            ));
                        }
                        Some(fault) => return Ok(refused(fault.cause, fault.said)),
                        None if fed.meaningful || held(&ahead) > GATE_BYTES_MAX => {
                            let body = Some(body);
                            return Ok((Cause::Answered, Some(Answer::Tokens { head, ahead, stream, body })));
                        }
                        None => continue,
                    }
                }
                Some(Err(error)) => Err(cut(&error)),
                None if !any => return Err(Cause::EmptyBody),
                None => Ok(()),
            };
            return match stream.end(clean) {
                Ending::Whole(rest) => {
                    ahead.push_back(rest);
                    Ok((Cause::Answered, Some(Answer::Tokens { head, ahead, stream, body: None })))
                }
                Ending::Broken(cause) => Err(cause),
            };
        }
    }

    /// An answer in one piece: held until it is whole and makes sense.
    async fn json(
        &mut self,
        seen: &mut Seen,
        head: Box<response::Parts>,
        body: InBody,
    ) -> Result<End, Cause> {
        seen.phase = Phase::Body;
        let max = self.asked.limits.held_body_max;
        let (chunks, rest, trailers, held) = match self.collect(body, max).await? {
            Collected::Whole { chunks, trailers, held } => (chunks, None, trailers, held),
            Collected::Longer { ahead, body, limit } => {
                self.worker.telemetry().metrics.count_limit(limit);
                (ahead, Some(body), None, Held::default())
            }
        };
        if let Some(body) = rest {
            return Ok((Cause::Answered, Some(Answer::Begun { head, ahead: chunks, body })));
        }
        let body = joined(chunks);
        match check_answer(self.asked.endpoint, head.status, &body) {
            Ok(text) => Ok((Cause::Answered, Some(Answer::Whole { head, body, text, trailers, held }))),
            Err(BadAnswer::Empty) => Err(Cause::EmptyBody),
            Err(BadAnswer::Json(_) | BadAnswer::NotFinite | BadAnswer::Missing(_)) => Err(Cause::InvalidBody),
            Err(BadAnswer::Unfinished(_)) => Err(Cause::AbortFinish),
            Err(BadAnswer::Error(class)) => Ok(refused(Cause::ErrorInside(class), body)),
        }
    }

    /// An error status: its body tells whose fault it is.
    async fn error_answer(
        &mut self,
        seen: &mut Seen,
        head: Box<response::Parts>,
        body: InBody,
    ) -> Result<End, Cause> {
        let status = Cause::Status(head.status.as_u16());
        let (chunks, rest, trailers, held) = match self.collect(body, ERROR_BODY_BYTES_MAX).await {
            Ok(Collected::Whole { chunks, trailers, held }) => (chunks, None, trailers, held),
            Ok(Collected::Longer { ahead, body, .. }) => (ahead, Some(body), None, Held::default()),
            // The status was said; a body that breaks off takes nothing from it, but cannot be shown.
            Err(Cause::Truncated | Cause::Silence) => return Ok((status, None)),
            Err(other) => return Err(other),
        };
        seen.phase = Phase::Head;
        if let Some(body) = rest {
            return Ok((status, Some(Answer::Begun { head, ahead: chunks, body })));
        }
        let body = joined(chunks);
        let cause = self.error_cause(head.status, &head.headers, &body);
        Ok((cause, Some(Answer::Whole { head, body, text: None, trailers, held })))
    }

    fn error_cause(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Cause {
        let said = Cause::Status(status.as_u16());
        if !self.asked.endpoint.is_inference() || compressed(headers).is_some() {
            return said;
        }
        let peers = || {
            let lists = |model: &str| {
                let others = self.choice.pool.members.iter().enumerate();
                others.filter(|(i, _)| *i != self.choice.index).any(|(_, m)| m.backend.lists(model))
            };
            self.leg.model.as_deref().is_some_and(lists)
        };
        if is_model_not_found(status, body) && peers() {
            return Cause::ModelMissingHere;
        }
        let class = classify_error_answer(status, body);
        let agrees = match (status.as_u16(), class) {
            (429 | 503 | 529, ErrorClass::Overloaded) | (501 | 505, _) => true,
            (400..=499, ErrorClass::ClientFault(_)) => status != StatusCode::TOO_MANY_REQUESTS,
            (500.., ErrorClass::ServerFault) => true,
            _ => false,
        };
        if agrees { said } else { Cause::ErrorInside(class) }
    }

    /// Anything else: its head goes out with its first body byte, or soon.
    async fn plain(
        &mut self,
        seen: &mut Seen,
        head: Box<response::Parts>,
        mut body: InBody,
        mut ahead: VecDeque<Bytes>,
    ) -> Result<End, Cause> {
        seen.phase = Phase::Body;
        let empty = body.is_end_stream() && self.asked.method != http::Method::HEAD;
        if empty && head.headers.contains_key(GRPC_STATUS) {
            return Ok(grpc_status_alone(head, None));
        }
        if empty && self.asked.endpoint.must_have_body() && head.status == StatusCode::OK {
            return Err(Cause::EmptyBody);
        }
        if !body.is_end_stream() && !self.asked.uploads {
            let since = clock::now();
            self.watch.enter(Stage::Body { idle: PLAIN_HEAD_HELD, since });
            match self.watch.over(body.frame()).await {
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(chunk) => ahead.push_back(chunk),
                    // Trailers and nothing else: an answer without a body.
                    Err(frame) => return Ok(grpc_status_alone(head, frame.into_trailers().ok())),
                },
                Ok(Some(Err(error))) => return Err(cut(&error)),
                Ok(None) | Err(Cause::Silence) => {}
                Err(cause) => return Err(cause),
            }
        }
        Ok((Cause::Answered, Some(Answer::Begun { head, ahead, body })))
    }

    /// Reads a body until it is whole or longer than `max`.
    async fn collect(&mut self, mut body: InBody, max: usize) -> Result<Collected, Cause> {
        let idle = self.choice.pool.config.clocks.body_idle;
        self.watch.enter(Stage::Body { idle, since: clock::now() });
        let (mut chunks, mut length, mut trailers) = (VecDeque::new(), 0, None);
        let mut held = Held::default();
        loop {
            match self.watch.over(body.frame()).await? {
                None => return Ok(Collected::Whole { chunks, trailers, held }),
                Some(Err(error)) => return Err(cut(&error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Err(frame) => trailers = frame.into_trailers().ok(),
                    Ok(chunk) => {
                        let now = clock::now();
                        self.watch.moved(now);
                        // Its own life sign, not the engine's: a server may send half an answer and die.
                        self.choice.in_flight.waits(now);
                        length += chunk.len();
                        let kept = chunk.len() as u64;
                        chunks.push_back(chunk);
                        let limits = &self.asked.limits;
                        if length > max {
                            return Ok(Collected::Longer { ahead: chunks, body, limit: "held_body_max" });
                        }
                        if !held.grow(&self.worker.memory, kept, limits.memory_max) {
                            return Ok(Collected::Longer { ahead: chunks, body, limit: "memory_max" });
                        }
                    }
                },
            }
        }
    }
}

enum Collected {
    Whole {
        chunks: VecDeque<Bytes>,
        trailers: Option<HeaderMap>,
        held: Held,
    },
    /// By which limit it is not kept.
    Longer {
        ahead: VecDeque<Bytes>,
        body: InBody,
        limit: &'static str,
    },
}

/// An answer without a body, as gRPC says what went wrong: in its trailers, or in its head alone (F38).
fn grpc_status_alone(head: Box<response::Parts>, trailers: Option<HeaderMap>) -> End {
    let cause = grpc_cause(trailers.as_ref().unwrap_or(&head.headers)).unwrap_or(Cause::Answered);
    let (body, held) = (Bytes::new(), Held::default());
    (cause, Some(Answer::Whole { head, body, text: None, trailers, held }))
}

/// What a gRPC status says, where there is one and it is not OK.
pub(super) fn grpc_cause(fields: &HeaderMap) -> Option<Cause> {
    let status = fields.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()?;
    grpc_class(status).map(Cause::ErrorInside)
}

/// An error where an answer was due. The client's own becomes a real answer with its status.
fn refused(cause: Cause, said: Bytes) -> End {
    let answer = match cause {
        Cause::ErrorInside(ErrorClass::ClientFault(status)) => {
            StatusCode::from_u16(status).ok().map(|status| Answer::Refused { status, body: said })
        }
        _ => None,
    };
    (cause, answer)
}

fn held(ahead: &VecDeque<Bytes>) -> usize {
    ahead.iter().map(Bytes::len).sum()
}

/// One piece of memory; most answers come in one already.
fn joined(mut chunks: VecDeque<Bytes>) -> Bytes {
    if chunks.len() == 1 {
        return chunks.pop_front().unwrap_or_default();
    }
    let mut whole = BytesMut::with_capacity(held(&chunks));
    chunks.iter().for_each(|chunk| whole.extend_from_slice(chunk));
    whole.freeze()
}

/// Why no head came.
fn cause_of(error: &SendError) -> Cause {
    match error.failure {
        SendFailure::Closed => Cause::Closed,
        SendFailure::Protocol => Cause::Protocol,
        SendFailure::HeadTooLarge => Cause::HeadTooLarge,
        SendFailure::Refused => Cause::StreamRefused,
        SendFailure::Upload => Cause::Upload,
    }
}

/// Why a body broke off.
pub(super) fn cut(error: &SendError) -> Cause {
    match error.failure {
        SendFailure::Protocol | SendFailure::HeadTooLarge => Cause::Protocol,
        SendFailure::Upload => Cause::Upload,
        SendFailure::Closed | SendFailure::Refused => Cause::Truncated,
    }
}

fn compressed(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(header::CONTENT_ENCODING)?.to_str().unwrap_or("unknown");
    (!encoding.eq_ignore_ascii_case("identity")).then(|| encoding.to_owned())
}

/// What kind of body an answer announces.
enum Media {
    Events,
    Lines,
    Json,
    /// None was named.
    Unnamed,
    Other,
}

impl Media {
    fn of(headers: &HeaderMap) -> Self {
        let Some(value) = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes) else {
            return Self::Unnamed;
        };
        let end = value.iter().position(|&b| b == b';').unwrap_or(value.len());
        let essence = value[..end].trim_ascii();
        let is = |name: &[u8]| essence.eq_ignore_ascii_case(name);
        match () {
            () if is(b"application/json") => Self::Json,
            () if is(b"text/event-stream") => Self::Events,
            () if is(b"application/x-ndjson")
                || is(b"application/jsonl")
                || is(b"application/x-jsonlines") =>
            {
                Self::Lines
            }
            () => Self::Other,
        }
    }
}

/// `Retry-After` in seconds or as a date (RFC 9110 §10.2.3), or OpenAI's `retry-after-ms`.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    if let Some(ms) = number("retry-after-ms") {
        return Duration::try_from_secs_f64(ms / 1000.0).ok();
    }
    if let Some(seconds) = number("retry-after") {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let date = httpdate::parse_http_date(headers.get(header::RETRY_AFTER)?.to_str().ok()?).ok()?;
    Some(date.duration_since(clock::wall()).unwrap_or_default())
}
