//! One question to one backend, on a connection of its own, within a time.
//!
//! A kept connection would prove only that an old one still stands; and the connections of the workers
//! are none of a prober's business. The whole answer is awaited: a head says nothing about the body an
//! engine may be too stuck to write. What an answer means is not said here.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::uri::{InvalidUri, PathAndQuery};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::time::timeout;

use crate::pool::Member;
use crate::upstream::{
    ConnectError, ConnectFailure, InBody, Lane, Lease, OutBody, OutHead, SendError, SendFailure, Want,
};

const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("evergate-probe/", env!("CARGO_PKG_VERSION")));

/// An answer.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) status: StatusCode,
    pub(super) body: Body,
}

/// What came behind the head.
#[derive(Debug)]
pub(super) enum Body {
    /// All of it.
    Whole(Bytes),
    /// The first of it; there is more than may be read.
    Beginning(Bytes),
    /// It broke off, or had not ended in time; for people.
    Broken(String),
}

/// Why there is no answer; for people.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// This machine could not ask: says nothing about the backend.
    Local(String),
    /// No connection could be made, or it broke: the process may be gone, and another come in its place.
    Lost(String),
    /// The backend is to blame for another reason, or the way to it.
    Theirs(String),
}

/// Whether a connection stands `within` the time: TCP, for `https` the handshake too.
pub(super) async fn connect(member: &Member, within: Duration) -> Result<(), NoAnswer> {
    let connected = timeout(within, lease(member)).await;
    connected.unwrap_or_else(|_elapsed| Err(too_late("connection", within))).map(drop)
}

/// `GET` of the backend's prefix and `path`; at most `body_max` bytes of the answer's body are read.
pub(super) async fn get(
    member: &Member,
    path: &str,
    body_max: usize,
    within: Duration,
) -> Result<Answered, NoAnswer> {
    ask(member, path, None, body_max, within).await
}

/// `POST` of a JSON text there; the rest as with [`get`].
pub(super) async fn post(
    member: &Member,
    path: &str,
    json: String,
    body_max: usize,
    within: Duration,
) -> Result<Answered, NoAnswer> {
    ask(member, path, Some(Bytes::from(json)), body_max, within).await
}

async fn ask(
    member: &Member,
    path: &str,
    json: Option<Bytes>,
    body_max: usize,
    within: Duration,
) -> Result<Answered, NoAnswer> {
    // Outlive the future that a timeout drops: how far it had come is what went wrong.
    let (mut connected, mut status) = (false, None);
    let asked = timeout(within, async {
        let lease = lease(member).await?;
        connected = true;
        let (method, path, headers) = head(member, path, json.as_ref(), lease.is_h2())?;
        let head = OutHead { method: &method, path, headers: &headers, own: &[], also: &[] };
        let body = json.map_or(OutBody::Empty, |json| OutBody::Whole(Some(json)));
        let answer = lease.send(&member.target, &head, body).await;
        let mut answer = answer.map_err(|e| NoAnswer::from(&e))?;
        status = Some(answer.head.status);
        Ok(read(&mut answer.body, body_max).await)
    })
    .await;
    match (asked, status) {
        (Ok(Ok(body)), Some(status)) => Ok(Answered { status, body }),
        (Err(_elapsed), Some(status)) => {
            Ok(Answered { status, body: Body::Broken(format!("no end of its answer within {within:?}")) })
        }
        (Ok(Err(none)), _) => Err(none),
        (Ok(Ok(_)) | Err(_), None) => Err(too_late(if connected { "answer" } else { "connection" }, within)),
    }
}

/// A new connection in a lane nobody else knows: it is closed with the lease.
async fn lease(member: &Member) -> Result<Lease, NoAnswer> {
    Arc::new(Lane::default()).lease(&member.target, Want::Fresh).await.map_err(NoAnswer::from)
}

fn head(
    member: &Member,
    path: &str,
    json: Option<&Bytes>,
    h2: bool,
) -> Result<(Method, PathAndQuery, HeaderMap), NoAnswer> {
    let params = &member.params;
    let path = format!("{}{path}", params.path_prefix);
    let target =
        path.parse().map_err(|e: InvalidUri| NoAnswer::Local(format!("{path} cannot be asked for: {e}")))?;
    let mut headers = HeaderMap::new();
    headers.insert(header::USER_AGENT, USER_AGENT);
    headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
    if json.is_some() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    if !h2 {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    for (name, value) in &params.headers {
        headers.insert(name, value.clone());
    }
    Ok((if json.is_some() { Method::POST } else { Method::GET }, target, headers))
}

async fn read(body: &mut InBody, body_max: usize) -> Body {
    let mut bytes = BytesMut::new();
    loop {
        match body.frame().await {
            None => return Body::Whole(bytes.freeze()),
            Some(Err(e)) => return Body::Broken(describe(&e)),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                let left = body_max - bytes.len();
                bytes.extend_from_slice(&data[..data.len().min(left)]);
                if data.len() > left {
                    return Body::Beginning(bytes.freeze());
                }
            }
        }
    }
}

fn too_late(what: &str, within: Duration) -> NoAnswer {
    NoAnswer::Theirs(format!("no {what} within {within:?}"))
}

impl From<ConnectError> for NoAnswer {
    fn from(error: ConnectError) -> Self {
        match error.failure {
            ConnectFailure::Local => Self::Local(error.to_string()),
            ConnectFailure::Refused | ConnectFailure::Timeout | ConnectFailure::Unreachable => {
                Self::Lost(error.to_string())
            }
            ConnectFailure::Dns | ConnectFailure::Tls => Self::Theirs(error.to_string()),
        }
    }
}

impl From<&SendError> for NoAnswer {
    fn from(error: &SendError) -> Self {
        match error.failure {
            SendFailure::Closed => Self::Lost(describe(error)),
            SendFailure::Protocol
            | SendFailure::HeadTooLarge
            | SendFailure::Refused
            | SendFailure::Upload => Self::Theirs(describe(error)),
        }
    }
}

fn describe(error: &SendError) -> String {
    let source = &error.source;
    match error.failure {
        SendFailure::Closed if error.answered => format!("broke off in the middle of its answer: {source}"),
        SendFailure::Closed => format!("closed without an answer: {source}"),
        SendFailure::Protocol => format!("what it sent is not HTTP: {source}"),
        SendFailure::HeadTooLarge => "the head of its answer is too large".to_owned(),
        SendFailure::Refused => format!("the request was refused: {source}"),
        SendFailure::Upload => format!("the request could not be sent: {source}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_this_machine_lacks_is_not_held_against_a_backend() {
        let error = |failure| ConnectError { failure, source: io::Error::from_raw_os_error(24) };
        assert!(matches!(NoAnswer::from(error(ConnectFailure::Local)), NoAnswer::Local(_)));
        assert!(matches!(NoAnswer::from(error(ConnectFailure::Refused)), NoAnswer::Lost(_)));
        assert!(matches!(NoAnswer::from(error(ConnectFailure::Dns)), NoAnswer::Theirs(_)));
    }
}
