//! The account of one exchange: counted in when its head was read, counted out and written to the access
//! log when this is dropped. It travels with the exchange and then with the body of its answer, so that
//! no way of ending can be forgotten.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::uri::PathAndQuery;
use http::{HeaderValue, Method, StatusCode};
use smallvec::SmallVec;

use crate::clock;
use crate::policy::Moment;
use crate::policy::dialect::Endpoint;
use crate::pool::{Backend, Pool};
use crate::proxy::worker::Worker;
use crate::telemetry::access_log::{AttemptRecord, Record};
use crate::telemetry::metrics::{AttemptOutcome, End, EndpointClass, ExchangeCount};

/// What is written about one exchange.
pub(super) struct Ledger {
    worker: Arc<Worker>,
    count: ExchangeCount,
    /// When its head was read.
    pub(super) started: Moment,
    time: SystemTime,
    /// As in `x-request-id`.
    pub(super) id: HeaderValue,
    client: IpAddr,
    method: Method,
    path: PathAndQuery,
    pool: Option<Arc<Pool>>,
    model: Option<Box<str>>,
    status: u16,
    /// Bytes of the request body.
    pub(super) bytes_in: u64,
    bytes_out: u64,
    attempts: SmallVec<[Entry; 2]>,
    first_token: Option<Duration>,
    resumed: u32,
}

/// What is written about one attempt.
pub(super) struct Entry {
    /// Where it went.
    pub backend: Arc<Backend>,
    /// `first`, `retry`, `failover`, `hedge`, `fallback`, `resume` or `opinion`.
    pub role: &'static str,
    /// What became of it.
    pub outcome: AttemptOutcome,
    /// Why it did not succeed; empty when it did.
    pub cause: &'static str,
    /// How far it came.
    pub phase: &'static str,
    /// Sent on a kept connection.
    pub reused: bool,
    /// When it began.
    pub started: Moment,
    /// From its start to its head.
    pub first_byte: Option<Duration>,
    /// From its start to its end; none while it is being relayed.
    pub lasted: Option<Duration>,
}

impl Ledger {
    /// Counts an exchange in.
    pub(super) fn open(
        worker: &Arc<Worker>,
        id: HeaderValue,
        client: IpAddr,
        method: Method,
        path: PathAndQuery,
        endpoint: Endpoint,
    ) -> Self {
        let mut count = worker.telemetry().metrics.exchanges.start();
        count.endpoint(class(endpoint));
        let time = if worker.access.is_on() { clock::wall() } else { UNIX_EPOCH };
        Self {
            worker: worker.clone(),
            count,
            started: clock::now(),
            time,
            id,
            client,
            method,
            path,
            pool: None,
            model: None,
            status: 0,
            bytes_in: 0,
            bytes_out: 0,
            attempts: SmallVec::new(),
            first_token: None,
            resumed: 0,
        }
    }

    /// The worker it runs on.
    pub(super) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// Where it was routed.
    pub(super) fn routed(&mut self, pool: &Arc<Pool>, model: Option<&str>) {
        self.pool = Some(pool.clone());
        self.model = model.map(Into::into);
    }

    /// An attempt that has ended, or whose answer is about to be relayed.
    pub(super) fn attempt(&mut self, entry: Entry) {
        if entry.lasted.is_some() {
            settle(&entry);
        }
        self.attempts.push(entry);
    }

    /// The attempt that is being relayed has ended so.
    pub(super) fn attempt_ended(
        &mut self,
        outcome: AttemptOutcome,
        cause: &'static str,
        phase: &'static str,
    ) {
        // One at a time is relayed; attempts begun beside it may have ended since.
        if let Some(entry) = self.attempts.iter_mut().rev().find(|entry| entry.lasted.is_none()) {
            (entry.outcome, entry.cause, entry.phase) = (outcome, cause, phase);
            entry.lasted = Some(clock::now().since(entry.started));
            settle(entry);
        }
    }

    /// The model that was asked for.
    pub(super) fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Whether an attempt went there before.
    pub(super) fn has_tried(&self, backend: &Arc<Backend>) -> bool {
        self.attempts.iter().any(|entry| Arc::ptr_eq(&entry.backend, backend))
    }

    /// Whether no attempt was made but beside one that is not written down yet.
    pub(super) fn has_only_hedges(&self) -> bool {
        self.attempts.iter().all(|entry| entry.role == "hedge")
    }

    /// Whether no backend was asked twice.
    pub(super) fn asked_each_once(&self) -> bool {
        let mut entries = self.attempts.iter().enumerate();
        entries.all(|(i, one)| self.attempts[..i].iter().all(|two| !Arc::ptr_eq(&one.backend, &two.backend)))
    }

    /// Attempts so far.
    pub(super) fn attempts(&self) -> u8 {
        u8::try_from(self.attempts.len()).unwrap_or(u8::MAX)
    }

    /// The head of the answer is about to be sent.
    pub(super) fn answered(&mut self, status: StatusCode) {
        self.status = status.as_u16();
        self.count.status(status);
    }

    /// The first token is about to be sent.
    pub(super) fn first_token(&mut self) {
        self.first_token.get_or_insert(clock::now().since(self.started));
    }

    /// The stream goes on at another backend.
    pub(super) fn resumed(&mut self) {
        self.resumed += 1;
    }

    /// Bytes of the answer were handed over.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.bytes_out += bytes as u64;
    }

    /// How it ended for the client; the first word counts. Without one the client has left.
    pub(super) fn ended(&mut self, end: End) {
        self.count.ended(end);
    }

    fn write(&self) {
        let attempts: SmallVec<[AttemptRecord<'_>; 2]> = self
            .attempts
            .iter()
            .map(|entry| AttemptRecord {
                pool: &entry.backend.pool,
                backend: &entry.backend.name,
                role: entry.role,
                outcome: entry.outcome,
                cause: entry.cause,
                phase: entry.phase,
                reused: entry.reused,
                lasted: entry.lasted.unwrap_or_default(),
                first_byte: entry.first_byte,
            })
            .collect();
        self.worker.access.record(&Record {
            time: self.time,
            request_id: self.id.to_str().unwrap_or_default(),
            client: Some(self.client),
            method: self.method.as_str(),
            path: self.path.path(),
            pool: self.pool.as_ref().map_or("", |pool| &pool.config.name),
            model: self.model.as_deref().unwrap_or_default(),
            status: self.status,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            attempts: &attempts,
            duration: clock::now().since(self.started),
            first_token: self.first_token,
            end: self.count.end(),
            resumed: self.resumed,
        });
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // An attempt still open here was given up because the client left.
        self.attempt_ended(AttemptOutcome::Cancelled, "client_gone", "");
        if self.worker.access.is_on() {
            self.write();
        }
    }
}

fn settle(entry: &Entry) {
    entry.backend.metrics.attempt_ended(entry.outcome, entry.lasted.unwrap_or_default());
    if !entry.cause.is_empty() {
        entry.backend.metrics.count_failure(entry.cause);
    }
}

fn class(endpoint: Endpoint) -> EndpointClass {
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::OllamaChat => EndpointClass::Chat,
        Endpoint::Completions => EndpointClass::Completions,
        Endpoint::Responses => EndpointClass::Responses,
        Endpoint::AnthropicMessages => EndpointClass::Messages,
        Endpoint::Embeddings | Endpoint::OllamaEmbed => EndpointClass::Embeddings,
        Endpoint::Rerank
        | Endpoint::Score
        | Endpoint::Classify
        | Endpoint::Moderations
        | Endpoint::Tokenize
        | Endpoint::Detokenize
        | Endpoint::CountTokens => EndpointClass::Scoring,
        Endpoint::OllamaGenerate
        | Endpoint::LlamaCompletion
        | Endpoint::Infill
        | Endpoint::Generate
        | Endpoint::GenerateStream
        | Endpoint::KserveInfer
        | Endpoint::KserveGenerate
        | Endpoint::KserveGenerateStream
        | Endpoint::GrpcInfer => EndpointClass::Native,
        Endpoint::Models => EndpointClass::Models,
        Endpoint::Other => EndpointClass::Other,
    }
}
