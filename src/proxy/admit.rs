//! Reading a request's head: what is asked, in whose words, and whether it may be asked at all.

use std::borrow::Cow;
use std::fmt::Write;
use std::ops::Range;

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header, request};

use crate::config::Limits;
use crate::policy::Moment;
use crate::policy::admission::Priority;
use crate::policy::dialect::{Dialect, Endpoint};
use crate::policy::retry::{Nature, Replay};
use crate::pool::Class;
use crate::proxy::client::{Client, HeadDefect};
use crate::proxy::headers::{self, Own};
use crate::proxy::respond::Refusal;

/// What is usually set: three about the client, and the request id.
const OWN_FIELDS: usize = 4;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What an exchange asks for, fixed at its admission.
pub(super) struct Asked {
    /// The exchange's id.
    pub(super) id: HeaderValue,
    /// The API.
    pub(super) endpoint: Endpoint,
    /// Its words.
    pub(super) dialect: Dialect,
    pub(super) method: Method,
    /// The client's, as a backend is to see them.
    pub(super) headers: HeaderMap,
    /// evergate's own, but for what differs by backend and attempt.
    pub(super) own: Own,
    /// The protocol to switch to.
    pub(super) upgrade: Option<HeaderValue>,
    /// Where the model's name stands in the body as the routed pool is sent it.
    pub(super) model_span: Option<Range<usize>>,
    /// Whether tokens are to come one by one.
    pub(super) stream: bool,
    /// Choices that must finish.
    pub(super) choices: u32,
    /// As far as sending it twice is concerned.
    pub(super) nature: Nature,
    /// What its speed is compared with.
    pub(super) class: Class,
    /// Bytes of the body, where known.
    pub(super) prompt_bytes: u64,
    /// Its body is still coming while it is sent.
    pub(super) uploads: bool,
    /// Who goes first where requests wait, if the route says so instead of the client.
    pub(super) priority: Option<Priority>,
    /// End of the whole exchange.
    pub(super) total: Option<Moment>,
    /// What the route says about sending it twice.
    pub(super) replay: Option<Replay>,
    /// As they were at admission.
    pub(super) limits: Limits,
}

/// Whose words are spoken at `path`: also where the endpoint is not known.
pub(super) fn dialect_of(endpoint: Endpoint, path: &str, headers: &HeaderMap) -> Dialect {
    if endpoint != Endpoint::Other {
        return endpoint.dialect();
    }
    let grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if headers.get(header::CONTENT_TYPE).is_some_and(grpc) {
        return Dialect::Grpc;
    }
    match path {
        _ if path.starts_with("/v1/") => Dialect::OpenAi,
        _ if path.starts_with("/v2/") => Dialect::Kserve,
        _ if path.starts_with("/api/") => Dialect::Ollama,
        _ => Dialect::Plain,
    }
}

/// Whether the request may be asked at all.
///
/// # Errors
/// The client's.
pub(super) fn check(
    head: &request::Parts,
    defect: Option<HeadDefect>,
    limits: &Limits,
    announced: Option<u64>,
) -> Result<(), Refusal> {
    if let Some(defect) = defect {
        return Err(Refusal::Framing(defect));
    }
    if matches!(head.method, Method::CONNECT | Method::TRACE) {
        return Err(Refusal::Method);
    }
    check_host(head)?;
    if let Some(expect) = head.headers.get(header::EXPECT)
        && !expect.as_bytes().eq_ignore_ascii_case(b"100-continue")
    {
        return Err(Refusal::Expectation);
    }
    match announced {
        Some(length) if length > limits.body_bytes_max => Err(Refusal::TooLarge(limits.body_bytes_max)),
        _ => Ok(()),
    }
}

/// RFC 9112 §3.2: exactly one `Host` in HTTP/1.1.
fn check_host(head: &request::Parts) -> Result<(), Refusal> {
    let hosts = head.headers.get_all(header::HOST).iter().count();
    let fine = match head.version {
        Version::HTTP_09 | Version::HTTP_10 => hosts <= 1,
        Version::HTTP_11 => hosts == 1,
        _ => hosts <= 1 && (hosts == 1 || head.uri.authority().is_some()),
    };
    if fine { Ok(()) } else { Err(Refusal::Invalid("a request needs exactly one Host header field")) }
}

/// The fields a backend is to see: the client's, and beside them evergate's own. Lengths and `Host` are for whoever
/// sends them.
pub(super) fn outgoing_headers(
    head: &mut request::Parts,
    endpoint: Endpoint,
    client: &Client,
    id: &HeaderValue,
) -> (HeaderMap, Own) {
    let mut fields = std::mem::take(&mut head.headers);
    let mut own = Own::with_capacity(OWN_FIELDS);
    headers::strip_hop_by_hop(&mut fields);
    headers::forward(&mut fields, &mut own, &head.uri, client);
    if head.version == Version::HTTP_2 {
        headers::join_cookies(&mut fields);
    }
    own.push((headers::X_REQUEST_ID, id.clone()));
    // 100-continue was between the client and us.
    fields.remove(header::EXPECT);
    if endpoint.is_inference() {
        // A compressed stream can be neither watched nor resumed, and tokens do not compress.
        fields.remove(header::ACCEPT_ENCODING);
    }
    (fields, own)
}

/// What the head says about sending the request twice.
pub(super) fn nature(head: &request::Parts, endpoint: Endpoint) -> Nature {
    Nature {
        idempotent: head.method.is_idempotent(),
        keyed: head.headers.contains_key(&IDEMPOTENCY_KEY),
        inference: endpoint.is_inference() && head.method == Method::POST,
        stateful: false,
    }
}

/// Where the request goes, as sent: absolute form loses its authority.
pub(super) fn target(head: &request::Parts) -> PathAndQuery {
    head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"))
}

/// The model that the path names, as it is written there: of KServe, or an entry of the list.
pub(super) fn model_in_path(endpoint: Endpoint, path: &str) -> Option<&str> {
    match endpoint {
        Endpoint::Models => path.strip_prefix("/v1/models/"),
        _ => Endpoint::model_in_path(path),
    }
}

/// A part of a path without its percent-encoding; as it is where that is broken.
pub(super) fn decoded(part: &str) -> Cow<'_, str> {
    if !part.contains('%') {
        return part.into();
    }
    let mut pieces = part.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let hex = piece.get(..2).filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) else { return part.into() };
        bytes.push(byte);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).map_or(part.into(), Cow::Owned)
}

/// `target` with the backends' name of the model where the path has the client's (KServe).
pub(super) fn renamed_target(target: &PathAndQuery, model: &str, name: &str) -> Option<PathAndQuery> {
    let (before, after) = target.as_str().split_once(&format!("/models/{model}"))?;
    let mut renamed = format!("{before}/models/");
    for &byte in name.as_bytes() {
        match byte {
            b'-' | b'.' | b'_' | b'~' => renamed.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => renamed.push(char::from(byte)),
            // Writing to a string cannot fail.
            _ => drop(write!(renamed, "%{byte:02X}")),
        }
    }
    (renamed + after).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_renamed_where_its_path_names_it() {
        let renamed = |target: &'static str, model: &str, name: &str| {
            renamed_target(&PathAndQuery::from_static(target), model, name).map(|target| target.to_string())
        };
        let some = |target: &str| Some(target.to_owned());
        assert_eq!(renamed("/v2/models/a/infer?a=a", "a", "b"), some("/v2/models/b/infer?a=a"));
        assert_eq!(renamed("/v1/models/a:predict", "a", "org/b c"), some("/v1/models/org%2Fb%20c:predict"));
        assert_eq!(renamed("/v1/embeddings", "a", "b"), None);
    }

    #[test]
    fn a_name_in_a_path_may_be_encoded() {
        for (written, meant) in [
            ("a", "a"),
            ("org%2Fb%20c", "org/b c"),
            ("50%", "50%"),
            ("%zz", "%zz"),
            ("%+1", "%+1"),
            ("%ff", "%ff"),
        ] {
            assert_eq!(decoded(written), meant);
        }
    }
}
