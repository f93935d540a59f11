//! How a simulated replica answers one request: routing, pace, and the places where a fault strikes.
//!
//! An answer is one future that writes its events into a short channel; the body polls both in the
//! connection's own task. So a client that leaves drops the work with the body, and nothing of an
//! answer outlives its connection.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, SERVER};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::api::{self, Answer, Job, Refusal};
use super::faults::Fault;
use super::model::{self, Model};
use super::replica::{End, Fate, InFlight, Shared};
use super::skin::{Api, Finish, Framer, Skin, quoted};

const BODY_BYTES_MAX: usize = 64 << 20;
/// Events between the work and the connection.
const EVENTS_QUEUED_MAX: usize = 4;
/// `created` of the first request. Not a real time: a replica reads no clock.
const CREATED: u64 = 1_780_000_000;
/// Between the last event and the end of its connection: the connection flushes when its body has nothing
/// more for now, and drops what it holds when its body fails.
const FLUSH_PAUSE: Duration = Duration::from_millis(2);
const DIMENSIONS: usize = 64;
const DIMENSIONS_MAX: u64 = 4096;
/// What a degenerate model says (F22).
const REPEATED: &str = "!";
/// No event, no JSON, no UTF-8.
const GARBAGE: &[u8] = b"\x00\xff\xfe{]garbage\n\ndata: {\"id\":\"\xff\",\"choices\":[{]\n\n";
const JSON: &str = "application/json";

type Reply = Response<Generated>;

/// Answers one request. Never fails: what goes wrong goes wrong on the wire.
pub(super) async fn answer(
    shared: Arc<Shared>,
    fate: Arc<Fate>,
    request: Request<Incoming>,
) -> Result<Reply, Infallible> {
    let mut reply = route(&shared, &fate, request).await;
    let headers = reply.headers_mut();
    if let Some(server) = shared.config.skin.server() {
        headers.insert(SERVER, HeaderValue::from_static(server));
    }
    if let Ok(name) = HeaderValue::from_str(&shared.config.name) {
        headers.insert("x-sim-replica", name);
    }
    Ok(reply)
}

async fn route(shared: &Arc<Shared>, fate: &Arc<Fate>, request: Request<Incoming>) -> Reply {
    let skin = shared.config.skin;
    let path = request.uri().path().to_owned();
    let api = match path.as_str() {
        "/v1/chat/completions" | "/chat/completions" => Some(Api::Chat),
        "/v1/completions" | "/completions" => Some(Api::Completions),
        "/v1/messages" => Some(Api::Messages),
        "/v1/embeddings" | "/embeddings" | "/tokenize" | "/detokenize" => Some(Api::Other),
        _ => None,
    };
    if let Some(key) = shared.config.api_key.as_ref().filter(|_| path.starts_with("/v1")) {
        let given = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer "));
        let given = given.or(request.headers().get("x-api-key").and_then(|value| value.to_str().ok()));
        if given != Some(key) {
            return error(skin, api.unwrap_or(Api::Other), 401, "AuthenticationError", "invalid API key");
        }
    }
    match (api, request.method()) {
        (Some(api), &Method::POST) => inference(shared, fate, api, &path, request).await,
        (Some(api), _) => error(skin, api, 405, "MethodNotAllowed", "Method Not Allowed"),
        (None, _) => {
            shared.counters.other_requests.fetch_add(1, Relaxed);
            look(shared, request.method(), &path)
        }
    }
}

/// What costs no model time: health, model list, version, metrics.
fn look(shared: &Shared, method: &Method, path: &str) -> Reply {
    let config = &shared.config;
    let skin = config.skin;
    if method != Method::GET && method != Method::HEAD {
        return error(skin, Api::Other, 404, "NotFoundError", "Not Found");
    }
    let fault = *shared.fault.lock();
    let loading = fault == Fault::Loading || shared.loading.load(Relaxed);
    match (path, skin) {
        _ if loading => not_loaded(skin, Api::Other),
        ("/health" | "/ping" | "/health_generate", _) if fault == Fault::Unhealthy => {
            error(skin, Api::Other, 503, "ServiceUnavailableError", "unhealthy")
        }
        ("/health" | "/ping" | "/health_generate", Skin::Vllm | Skin::Sglang) => {
            whole(StatusCode::OK, "application/json", String::new())
        }
        ("/health" | "/ping", _) => json_reply(StatusCode::OK, r#"{"status":"ok"}"#.to_owned()),
        ("/v1/models" | "/models", _) => {
            let model = quoted(&config.model);
            json_reply(
                StatusCode::OK,
                format!(
                    r#"{{"object":"list","data":[{{"id":{model},"object":"model","created":{CREATED},"owned_by":"{}","root":{model},"parent":null,"max_model_len":{}}}]}}"#,
                    skin.owner(),
                    api::CONTEXT_TOKENS
                ),
            )
        }
        ("/version", Skin::Vllm) => json_reply(StatusCode::OK, r#"{"version":"0.11.2"}"#.to_owned()),
        ("/version", Skin::Generic) => json_reply(
            StatusCode::OK,
            concat!(r#"{"version":"evergate-sim "#, env!("CARGO_PKG_VERSION"), r#""}"#).to_owned(),
        ),
        ("/server_info" | "/get_server_info", Skin::Sglang) => {
            json_reply(StatusCode::OK, r#"{"version":"0.5.5"}"#.to_owned())
        }
        ("/props", Skin::LlamaCpp) => {
            json_reply(StatusCode::OK, r#"{"build_info":"b7000-sim","total_slots":4}"#.to_owned())
        }
        ("/metrics", _) => {
            let gauge = match skin {
                Skin::Vllm => "vllm:num_requests_running",
                Skin::Sglang => "sglang:num_running_reqs",
                Skin::LlamaCpp => "llamacpp:requests_processing",
                Skin::Generic => "sim_requests_running",
            };
            let running = shared.counters.in_flight.load(Relaxed);
            whole(
                StatusCode::OK,
                "text/plain; version=0.0.4",
                format!("# TYPE {gauge} gauge\n{gauge} {running}\n"),
            )
        }
        _ => error(skin, Api::Other, 404, "NotFoundError", "Not Found"),
    }
}

async fn inference(
    shared: &Arc<Shared>,
    fate: &Arc<Fate>,
    api: Api,
    path: &str,
    request: Request<Incoming>,
) -> Reply {
    let skin = shared.config.skin;
    let mut in_flight = InFlight::begin(shared);
    let given_id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    #[cfg(test)]
    shared.ids.lock().extend(given_id.clone());
    let body = match Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => {
            in_flight.end(End::Completed);
            return error(skin, api, 413, "BadRequestError", "the request body is broken or too large");
        }
    };
    let fault = *shared.fault.lock();
    if let Some(reply) = failed_at_once(shared, fate, api, fault, &mut in_flight).await {
        in_flight.end(End::Completed);
        return reply;
    }
    let asked = serde_json::from_slice::<Value>(&body)
        .map_err(|error| Refusal(400, "BadRequestError", format!("the body is not JSON: {error}")));
    let worked = match asked {
        Err(refusal) => Err(refusal),
        Ok(asked) if api == Api::Other => {
            let mut work = Work::begin(shared, fate, fault, in_flight);
            match small(shared, path, &asked) {
                Ok(json) => {
                    work.take_slot().await;
                    work.wait_for_first_token().await;
                    return work.unstreamed(api, json).await;
                }
                Err(refusal) => {
                    work.in_flight.end(End::Completed);
                    return refused(skin, api, &refusal);
                }
            }
        }
        Ok(asked) => api::job(api, skin, &shared.config.model, &asked),
    };
    match worked {
        Err(refusal) => {
            in_flight.end(End::Completed);
            refused(skin, api, &refusal)
        }
        Ok(job) => text(Work::begin(shared, fate, fault, in_flight), job, given_id).await,
    }
}

/// The faults that need not know what was asked.
async fn failed_at_once(
    shared: &Shared,
    fate: &Fate,
    api: Api,
    fault: Fault,
    in_flight: &mut InFlight,
) -> Option<Reply> {
    let skin = shared.config.skin;
    if shared.loading.load(Relaxed) {
        return Some(not_loaded(skin, api));
    }
    match fault {
        Fault::CloseBeforeHead => {
            in_flight.end(End::Cut);
            fate.end(false);
            std::future::pending().await
        }
        Fault::NoAnswer => std::future::pending().await,
        Fault::Status(status) => Some(error(skin, api, status, "InternalServerError", "simulated failure")),
        Fault::ErrorRate(_) if fault.fails_request(in_flight.nth) => {
            Some(error(skin, api, 500, "InternalServerError", "simulated failure"))
        }
        Fault::Busy { retry_after } => {
            let mut reply = error(skin, api, 503, "ServiceUnavailableError", "the queue is full");
            if let Some(after) = retry_after {
                let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
                reply.headers_mut().insert(RETRY_AFTER, seconds.into());
            }
            Some(reply)
        }
        Fault::Loading => Some(not_loaded(skin, api)),
        Fault::EmptyBody => Some(json_reply(StatusCode::OK, String::new())),
        Fault::WrongContentType => Some(whole(
            StatusCode::OK,
            "text/html; charset=utf-8",
            "<!doctype html><title>It works!</title>\n".to_owned(),
        )),
        Fault::None
        | Fault::ErrorRate(_)
        | Fault::Unhealthy
        | Fault::ErrorEventFirst
        | Fault::NoFirstToken
        | Fault::Slow(_)
        | Fault::CutAfterTokens(_)
        | Fault::ResetAfterTokens(_)
        | Fault::CleanEndWithoutFinish(_)
        | Fault::ErrorEventAfterTokens(_)
        | Fault::AbortFinishAfterTokens(_)
        | Fault::StallAfterTokens(_)
        | Fault::GarbageAfterTokens(_)
        | Fault::RepeatAfterTokens(_)
        | Fault::CutAfterFinish
        | Fault::TruncatedJson => None,
    }
}

/// Embeddings, tokenize and detokenize.
fn small(shared: &Shared, path: &str, asked: &Value) -> Result<String, Refusal> {
    let config = &shared.config;
    let model = api::model_asked(config.skin, &config.model, asked)?;
    match path {
        "/tokenize" => {
            let text = match (&asked["prompt"], &asked["content"]) {
                (Value::String(text), _) | (_, Value::String(text)) => text.clone(),
                _ => api::rendered_chat(Api::Chat, config.skin, asked)?,
            };
            let tokens = model::tokenize(&text);
            Ok(json!({"count": tokens.len(), "max_model_len": api::CONTEXT_TOKENS, "tokens": tokens})
                .to_string())
        }
        "/detokenize" => {
            let ids = asked["tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
            let text = model::detokenize(&api::token_ids(ids)?);
            Ok(json!({"prompt": text, "content": text}).to_string())
        }
        _ => {
            let inputs = api::inputs(asked)?;
            let dimensions =
                asked["dimensions"].as_u64().filter(|wanted| (1..=DIMENSIONS_MAX).contains(wanted));
            let dimensions = dimensions.and_then(|wanted| usize::try_from(wanted).ok()).unwrap_or(DIMENSIONS);
            let served = Model::new(&config.model, config.weights, None);
            let base64 = asked["encoding_format"] == "base64";
            let data: Vec<Value> = inputs
                .iter()
                .enumerate()
                .map(|(index, input)| {
                    let vector = served.embedding(input, dimensions);
                    let embedding = if base64 { base64_of(&vector).into() } else { json!(vector) };
                    json!({"object": "embedding", "index": index, "embedding": embedding})
                })
                .collect();
            let tokens: usize = inputs.iter().map(|input| model::tokenize(input).len()).sum();
            Ok(json!({
                "object": "list", "model": model, "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            })
            .to_string())
        }
    }
}

/// What is said, when well, to a request: the text of a chat or a completion, else the whole body.
#[cfg(test)]
pub(super) fn said(shared: &Shared, path: &str, asked: &Value) -> Option<String> {
    let config = &shared.config;
    let api = match path {
        "/v1/chat/completions" => Api::Chat,
        "/v1/completions" => Api::Completions,
        _ => return small(shared, path, asked).ok(),
    };
    let job = api::job(api, config.skin, &config.model, asked).ok()?;
    Some(job.answer(&config.model, config.weights, config.tokens).tokens.concat())
}

/// A generated text, streamed or not.
async fn text(mut work: Work, job: Job, given_id: Option<String>) -> Reply {
    let config = &work.shared.config;
    let skin = config.skin;
    let answer = job.answer(&config.model, config.weights, config.tokens);
    let prefix = match job.api {
        Api::Chat => "chatcmpl-",
        Api::Completions | Api::Other => "cmpl-",
        Api::Messages => "msg_",
    };
    let own_id = format!("{:04x}{:08x}", work.shared.port, work.in_flight.nth);
    let framer = Framer {
        skin,
        api: job.api,
        id: format!("{prefix}{}", given_id.filter(|_| skin == Skin::Vllm).unwrap_or(own_id)),
        created: CREATED + work.in_flight.nth * 60 + u64::from(work.shared.port % 60),
        model: job.model,
        prompt_tokens: job.prompt_ids.len(),
        prompt_ids: job.wants_ids.then_some(job.prompt_ids),
        usage: job.usage,
        usage_in_each: job.usage_in_each,
    };
    if !job.stream {
        return work.whole_text(&framer, answer).await;
    }
    if !skin.head_before_first_token() {
        work.take_slot().await;
        // A plain server sends the role at once, llama.cpp nothing before the first token.
        if skin == Skin::LlamaCpp && work.fault != Fault::NoFirstToken {
            work.wait_for_first_token().await;
        }
    }
    let content_type =
        if skin == Skin::Vllm { "text/event-stream; charset=utf-8" } else { "text/event-stream" };
    let body = Generated::by(|events| work.stream(framer, answer, events));
    reply(StatusCode::OK, content_type, body)
}

/// One answer in the making.
struct Work {
    shared: Arc<Shared>,
    fate: Arc<Fate>,
    fault: Fault,
    in_flight: InFlight,
    pace: Pace,
    slot: Option<OwnedSemaphorePermit>,
    first_token_waited: bool,
}

impl Work {
    fn begin(shared: &Arc<Shared>, fate: &Arc<Fate>, fault: Fault, in_flight: InFlight) -> Self {
        Self {
            shared: Arc::clone(shared),
            fate: Arc::clone(fate),
            fault,
            in_flight,
            pace: Pace::new(Arc::clone(shared), fault.slowness()),
            slot: None,
            first_token_waited: false,
        }
    }

    async fn take_slot(&mut self) {
        if let (None, Some(slots)) = (&self.slot, &self.shared.slots) {
            // Never closed; without a slot the work would go on all the same.
            self.slot = Arc::clone(slots).acquire_owned().await.ok();
        }
        self.pace.start();
    }

    async fn wait_for_first_token(&mut self) {
        if !std::mem::replace(&mut self.first_token_waited, true) {
            self.pace.wait(self.shared.config.first_token).await;
        }
    }

    /// Says the answer, event by event. The order is the engine's; the faults strike between tokens.
    async fn stream(mut self, framer: Framer, answer: Answer, events: mpsc::Sender<Bytes>) -> Ending {
        let role_at_once = framer.skin == Skin::Generic && self.fault != Fault::ErrorEventFirst;
        if role_at_once {
            say(&events, framer.opening(self.pace.elapsed())).await;
        }
        self.take_slot().await;
        if self.fault == Fault::NoFirstToken {
            return std::future::pending().await;
        }
        self.wait_for_first_token().await;
        if self.fault == Fault::ErrorEventFirst {
            return self.strike(&framer, 0, &events).await.unwrap_or(Ending::Clean);
        }
        if !role_at_once {
            say(&events, framer.opening(self.pace.elapsed())).await;
        }
        let Answer { tokens, finish } = answer;
        let gap = self.pace.token_gap;
        for (at, token) in tokens.iter().enumerate() {
            if self.fault.tokens() == Some(at)
                && let Some(ending) = self.strike(&framer, at, &events).await
            {
                return ending;
            }
            if at > 0 {
                self.pace.wait(gap).await;
            }
            let repeats = matches!(self.fault, Fault::RepeatAfterTokens(after) if at >= after);
            let token = if repeats { REPEATED } else { token };
            let finish = (at + 1 == tokens.len()).then_some(&finish);
            let id = model::tokenize(token).first().copied();
            say(&events, framer.token(self.pace.elapsed(), at + 1, token, id, finish)).await;
            self.shared.counters.tokens.fetch_add(1, Relaxed);
        }
        if !framer.finish_with_last_token() || tokens.is_empty() {
            if self.fault.tokens() == Some(tokens.len())
                && let Some(ending) = self.strike(&framer, tokens.len(), &events).await
            {
                return ending;
            }
            say(&events, framer.finish(self.pace.elapsed(), tokens.len(), &finish)).await;
        }
        if self.fault == Fault::CutAfterFinish {
            return self.cut().await;
        }
        say(&events, framer.tail(self.pace.elapsed(), tokens.len())).await;
        self.in_flight.end(End::Completed);
        Ending::Clean
    }

    /// What the fault does now that its count of tokens is reached; None where the answer goes on.
    async fn strike(
        &mut self,
        framer: &Framer,
        tokens: usize,
        events: &mpsc::Sender<Bytes>,
    ) -> Option<Ending> {
        match self.fault {
            Fault::CutAfterTokens(_) => Some(self.cut().await),
            Fault::ResetAfterTokens(_) => self.reset().await,
            Fault::StallAfterTokens(_) | Fault::NoFirstToken => std::future::pending().await,
            Fault::CleanEndWithoutFinish(_) => {
                self.in_flight.end(End::Cut);
                Some(Ending::Clean)
            }
            Fault::ErrorEventAfterTokens(_) | Fault::ErrorEventFirst => {
                self.in_flight.end(End::Cut);
                say(events, framer.error("simulated engine failure")).await;
                Some(Ending::Clean)
            }
            Fault::AbortFinishAfterTokens(_) => {
                self.in_flight.end(End::Cut);
                say(events, framer.finish(self.pace.elapsed(), tokens, &Finish::Abort)).await;
                say(events, framer.tail(self.pace.elapsed(), tokens)).await;
                Some(Ending::Clean)
            }
            Fault::GarbageAfterTokens(_) => {
                // An error means that the body is gone, and this future with it.
                let _ = events.send(Bytes::from_static(GARBAGE)).await;
                None
            }
            Fault::RepeatAfterTokens(_)
            | Fault::None
            | Fault::CloseBeforeHead
            | Fault::NoAnswer
            | Fault::Status(_)
            | Fault::ErrorRate(_)
            | Fault::Busy { .. }
            | Fault::Loading
            | Fault::Unhealthy
            | Fault::EmptyBody
            | Fault::WrongContentType
            | Fault::Slow(_)
            | Fault::CutAfterFinish
            | Fault::TruncatedJson => None,
        }
    }

    async fn whole_text(mut self, framer: &Framer, answer: Answer) -> Reply {
        let Answer { mut tokens, mut finish } = answer;
        let struck = self.fault.tokens().filter(|after| *after <= tokens.len());
        match (self.fault, struck) {
            (Fault::RepeatAfterTokens(_), Some(after)) => tokens[after..].fill(REPEATED.to_owned()),
            (Fault::AbortFinishAfterTokens(_), Some(after)) => {
                tokens.truncate(after);
                finish = Finish::Abort;
            }
            _ => {}
        }
        self.take_slot().await;
        self.wait_for_first_token().await;
        let said = struck.unwrap_or(tokens.len());
        let gaps = u32::try_from(said.saturating_sub(1)).unwrap_or(u32::MAX);
        self.pace.wait(self.pace.token_gap.saturating_mul(gaps)).await;
        self.shared.counters.tokens.fetch_add(said as u64, Relaxed);
        let text = tokens.concat();
        let json = framer.whole(&text, tokens.len(), &model::tokenize(&text), &finish);
        if struck.is_none() && self.fault.tokens().is_some() {
            self.fault = Fault::None;
        }
        self.unstreamed(framer.api, json).await
    }

    /// An answer of one piece, and what the faults of a stream mean for it.
    async fn unstreamed(mut self, api: Api, json: String) -> Reply {
        let (length, half) = (json.len(), json.len() / 2);
        let begun = match self.fault {
            Fault::ErrorEventFirst | Fault::ErrorEventAfterTokens(_) => {
                self.in_flight.end(End::Completed);
                let skin = self.shared.config.skin;
                return error(skin, api, 500, "InternalServerError", "simulated engine failure");
            }
            Fault::NoFirstToken => return std::future::pending().await,
            Fault::TruncatedJson => {
                self.in_flight.end(End::Cut);
                return json_reply(StatusCode::OK, json[..floor_char(&json, half)].to_owned());
            }
            Fault::GarbageAfterTokens(_) => {
                self.in_flight.end(End::Completed);
                let mut broken = json.into_bytes();
                broken.splice(half..half + GARBAGE.len().min(length - half), GARBAGE.iter().copied());
                return reply(StatusCode::OK, JSON, Generated::Whole(Some(broken.into())));
            }
            Fault::CutAfterFinish => Bytes::copy_from_slice(&json.as_bytes()[..length.saturating_sub(1)]),
            Fault::CutAfterTokens(_)
            | Fault::ResetAfterTokens(_)
            | Fault::StallAfterTokens(_)
            | Fault::CleanEndWithoutFinish(_) => Bytes::copy_from_slice(&json.as_bytes()[..half]),
            Fault::AbortFinishAfterTokens(_)
            | Fault::RepeatAfterTokens(_)
            | Fault::None
            | Fault::CloseBeforeHead
            | Fault::NoAnswer
            | Fault::Status(_)
            | Fault::ErrorRate(_)
            | Fault::Busy { .. }
            | Fault::Loading
            | Fault::Unhealthy
            | Fault::EmptyBody
            | Fault::WrongContentType
            | Fault::Slow(_) => {
                self.in_flight.end(End::Completed);
                return json_reply(StatusCode::OK, json);
            }
        };
        let fault = self.fault;
        let body = Generated::by(|events| async move {
            // An error means that the body is gone, and this future with it.
            let _ = events.send(begun).await;
            match fault {
                Fault::ResetAfterTokens(_) => self.reset().await,
                Fault::StallAfterTokens(_) => std::future::pending().await,
                Fault::CleanEndWithoutFinish(_) => {
                    self.in_flight.end(End::Cut);
                    Ending::Clean
                }
                _ => self.cut().await,
            }
        });
        let mut reply = reply(StatusCode::OK, JSON, body);
        // Without a length the clean end looks whole to HTTP; only the JSON tells.
        if !matches!(fault, Fault::CleanEndWithoutFinish(_)) {
            reply.headers_mut().insert(CONTENT_LENGTH, length.into());
        }
        reply
    }

    /// Breaks the body off, once what was said is on the wire.
    async fn cut(&mut self) -> Ending {
        self.in_flight.end(End::Cut);
        tokio::time::sleep(FLUSH_PAUSE).await;
        Ending::Broken
    }

    /// Resets the connection, which ends this future with it.
    async fn reset<T>(&mut self) -> T {
        self.in_flight.end(End::Cut);
        tokio::time::sleep(FLUSH_PAUSE).await;
        self.fate.end(true);
        std::future::pending().await
    }
}

async fn say(events: &mpsc::Sender<Bytes>, event: String) {
    if !event.is_empty() {
        // An error means that the body is gone, and this future with it.
        let _ = events.send(event.into()).await;
    }
}

/// When the next token is due: by schedule, so that coarse timers do not add up.
struct Pace {
    shared: Arc<Shared>,
    slowness: f64,
    token_gap: Duration,
    asked: Instant,
    due: Instant,
}

impl Pace {
    fn new(shared: Arc<Shared>, slowness: f64) -> Self {
        let rate = shared.config.tokens_per_second;
        let token_gap = if rate > 0.0 && rate.is_finite() {
            Duration::try_from_secs_f64(1.0 / rate).unwrap_or(Duration::MAX)
        } else {
            Duration::ZERO
        };
        let now = now();
        Self { shared, slowness, token_gap, asked: now, due: now }
    }

    /// Work begins now; before, it waited for a slot.
    fn start(&mut self) {
        self.due = now();
    }

    fn elapsed(&self) -> Duration {
        now() - self.asked
    }

    async fn wait(&mut self, work: Duration) {
        let seconds = work.as_secs_f64() * self.slowness;
        if seconds > 0.0 {
            let work = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            match self.due.checked_add(work) {
                Some(due) => self.due = due,
                None => return std::future::pending().await,
            }
            tokio::time::sleep_until(self.due).await;
        }
        // A frozen process does no work to catch up on.
        if self.shared.gate.open().await {
            self.due = now();
        }
    }
}

/// The runtime's time, through a timer: it stands still where a test pauses it.
fn now() -> Instant {
    tokio::time::sleep(Duration::ZERO).deadline()
}

/// How a generated body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Clean,
    Broken,
}

/// The body of a reply.
pub(super) enum Generated {
    Whole(Option<Bytes>),
    Made {
        work: Option<Pin<Box<dyn Future<Output = Ending> + Send>>>,
        ending: Ending,
        events: mpsc::Receiver<Bytes>,
    },
}

impl Generated {
    fn by<W>(work: impl FnOnce(mpsc::Sender<Bytes>) -> W) -> Self
    where
        W: Future<Output = Ending> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(EVENTS_QUEUED_MAX);
        Self::Made { work: Some(Box::pin(work(sender))), ending: Ending::Clean, events }
    }
}

impl Body for Generated {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let (work, ending, events) = match self.get_mut() {
            Self::Whole(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Made { work, ending, events } => (work, ending, events),
        };
        loop {
            if let Poll::Ready(event) = events.poll_recv(cx) {
                return Poll::Ready(match (event, *ending) {
                    (Some(event), _) => Some(Ok(Frame::data(event))),
                    (None, Ending::Clean) => None,
                    (None, Ending::Broken) => Some(Err(io::ErrorKind::BrokenPipe.into())),
                });
            }
            // The queue is empty and its sender lives, in the work.
            let Some(working) = work else { return Poll::Pending };
            match working.as_mut().poll(cx) {
                Poll::Ready(ended) => {
                    *ending = ended;
                    *work = None;
                }
                Poll::Pending if events.is_empty() => return Poll::Pending,
                Poll::Pending => {}
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Made { .. } => SizeHint::default(),
        }
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: Generated) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

fn whole(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    reply(status, content_type, Generated::Whole(Some(body.into()).filter(|body: &Bytes| !body.is_empty())))
}

fn json_reply(status: StatusCode, json: String) -> Reply {
    whole(status, JSON, json)
}

fn error(skin: Skin, api: Api, status: u16, kind: &str, message: &str) -> Reply {
    let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_reply(code, skin.error(api, code.as_u16(), kind, message))
}

fn refused(skin: Skin, api: Api, Refusal(status, kind, message): &Refusal) -> Reply {
    error(skin, api, *status, kind, message)
}

fn not_loaded(skin: Skin, api: Api) -> Reply {
    error(skin, api, 503, "unavailable_error", "Loading model")
}

fn floor_char(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Little-endian floats as the OpenAI clients ask for them.
fn base64_of(vector: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|part| part.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits =
            group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for at in 0..4 {
            let digit = (bits >> (18 - 6 * at)) & 63;
            text.push(if at <= group.len() { char::from(ALPHABET[digit as usize]) } else { '=' });
        }
    }
    text
}
