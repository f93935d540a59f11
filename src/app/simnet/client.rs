//! A client: one request over a simulated connection, what came of it and when, and whether it is right.
//!
//! It repairs nothing. An answer is the whole one, evergate's own well-formed refusal, a part that ends in one error
//! event, or wrong.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use serde_json::Value;

use super::plan::Kind;
use crate::clock;
use crate::policy::Moment;

/// A connection to evergate.
pub(super) enum Connection {
    H1(http1::SendRequest<Full<Bytes>>),
    H2(http2::SendRequest<Full<Bytes>>),
}

/// What came, and when, counted from the sending.
#[derive(Debug)]
pub(super) struct Got {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// The framing says that this is all of it.
    pub(super) whole: bool,
    /// When the first body bytes came.
    pub(super) first: Option<Duration>,
    /// Longest wait between two body frames.
    pub(super) gap: Duration,
}

/// What it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The answer, complete and correct.
    Whole,
    /// evergate's own, with this status and code.
    Refused(u16, String),
    /// A correct beginning, then one error event with this code.
    ErrorEvent(String),
    /// What nobody was promised.
    Wrong(String),
}

/// Sends a request and takes in all that comes. The error is an exchange that ended without a head.
pub(super) async fn ask(connection: &mut Connection, request: Request<Full<Bytes>>) -> Result<Got, String> {
    let asked = clock::now();
    let answer = match connection {
        Connection::H1(h1) => h1.send_request(request).await,
        Connection::H2(h2) => h2.send_request(request).await,
    };
    let answer = answer.map_err(|error| format!("no answer at all: {error}"))?;
    let (head, body) = answer.into_parts();
    Ok(take_in(asked, head.status, head.headers, body).await)
}

async fn take_in(asked: Moment, status: StatusCode, headers: HeaderMap, mut incoming: Incoming) -> Got {
    let (mut body, mut whole, mut first, mut gap) = (Vec::new(), true, None, Duration::ZERO);
    let mut latest = clock::now();
    while let Some(frame) = incoming.frame().await {
        let Ok(frame) = frame else {
            whole = false;
            break;
        };
        let now = clock::now();
        if let Ok(data) = frame.into_data() {
            body.extend_from_slice(&data);
            match first {
                None => first = Some(now.since(asked)),
                Some(_) => gap = gap.max(now.since(latest)),
            }
            latest = now;
        }
    }
    Got { status, headers, body, whole, first, gap }
}

/// Judges what came of a request whose answer is `truth`.
pub(super) fn judge(kind: Kind, truth: &str, got: &Got) -> Verdict {
    let wrong = |why: String| {
        Verdict::Wrong(format!("{why}; {} {:?}", got.status, String::from_utf8_lossy(&got.body)))
    };
    if !got.whole {
        return wrong("cut".to_owned());
    }
    if got.status != StatusCode::OK {
        return refusal(got).unwrap_or_else(|why| wrong(why.to_owned()));
    }
    let verdict = match kind {
        Kind::ChatStream | Kind::CompletionStream => stream(kind, truth, &got.body),
        Kind::Chat => chat(truth, &got.body),
        Kind::Embeddings if got.body == truth.as_bytes() => Ok(Verdict::Whole),
        Kind::Embeddings => Err("another body than the replica's".to_owned()),
    };
    verdict.unwrap_or_else(wrong)
}

fn refusal(got: &Got) -> Result<Verdict, &'static str> {
    if !matches!(got.status.as_u16(), 502..=504) {
        return Err("no status of evergate's own");
    }
    let json: Value = serde_json::from_slice(&got.body).map_err(|_| "a refusal that is no JSON")?;
    let error = &json["error"];
    let code = error["code"].as_str().ok_or("a refusal without a code")?;
    if error["message"].as_str().is_none() || error["type"].as_str().is_none() {
        return Err("a refusal without its words");
    }
    let id = got.headers.get("x-request-id").and_then(|id| id.to_str().ok());
    if id.is_none() || error["request_id"].as_str() != id {
        return Err("a refusal without its request's id");
    }
    let after = got.headers.get("retry-after").and_then(|after| after.to_str().ok()?.parse::<u64>().ok());
    if got.status == StatusCode::SERVICE_UNAVAILABLE && !after.is_some_and(|after| (1..=60).contains(&after))
    {
        return Err("a 503 without an honest Retry-After");
    }
    Ok(Verdict::Refused(got.status.as_u16(), code.to_owned()))
}

fn chat(truth: &str, body: &[u8]) -> Result<Verdict, String> {
    let json: Value = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let choice = &json["choices"][0];
    if choice["message"]["content"] != truth {
        return Err(format!("another text than {truth:?}"));
    }
    if choice["finish_reason"].is_null() { Err("no finish".to_owned()) } else { Ok(Verdict::Whole) }
}

/// A token stream: each event well-formed, one voice, every word once and in order, one end.
fn stream(kind: Kind, truth: &str, body: &[u8]) -> Result<Verdict, String> {
    let body = std::str::from_utf8(body).map_err(|error| error.to_string())?;
    let mut said = String::new();
    let (mut finished, mut done, mut failed) = (false, false, None);
    let mut voice: Option<(Value, Value)> = None;
    let events = body.strip_suffix("\n\n").ok_or("its last event is not whole")?;
    for event in events.split("\n\n") {
        if done || failed.is_some() {
            return Err("something follows its end".to_owned());
        }
        let data = event.strip_prefix("data: ").ok_or_else(|| format!("no event: {event:?}"))?;
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let json: Value = serde_json::from_str(data).map_err(|error| format!("{error} in {data:?}"))?;
        if let Some(code) = json["error"]["code"].as_str() {
            failed = Some(code.to_owned());
            continue;
        }
        let its = (json["id"].clone(), json["model"].clone());
        if voice.get_or_insert_with(|| its.clone()) != &its {
            return Err(format!("another voice: {its:?} after {voice:?}"));
        }
        let Some(choice) = json["choices"].get(0) else { continue };
        let text = if kind == Kind::ChatStream { &choice["delta"]["content"] } else { &choice["text"] };
        let text = text.as_str().unwrap_or_default();
        if finished && !text.is_empty() {
            return Err("it speaks after its finish".to_owned());
        }
        said += text;
        if !choice["finish_reason"].is_null() && std::mem::replace(&mut finished, true) {
            return Err("two finishes".to_owned());
        }
    }
    match (said == truth, finished, done, failed) {
        (true, true, true, None) => Ok(Verdict::Whole),
        (_, false, false, Some(code)) if truth.starts_with(&said) => Ok(Verdict::ErrorEvent(code)),
        (_, finished, done, failed) => {
            Err(format!("said {said:?} of {truth:?}, finished {finished}, [DONE] {done}, error {failed:?}"))
        }
    }
}
