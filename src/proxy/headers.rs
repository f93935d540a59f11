//! Header fields on their way through: what belongs to one connection stays there, what a backend should
//! know about the client is added, everything else is passed on as it is.
//!
//! RFC 9110 §7.6.1 (Connection and what it nominates), RFC 7239 (Forwarded).

use std::fmt::Write;
use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Uri, Version, request};
use smallvec::SmallVec;

use crate::proxy::client::Client;

/// Longest request id that is taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The exchange's id, towards both sides.
pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Number of the attempt, so that retries stacked over layers can be seen.
pub(super) const X_EVERGATE_ATTEMPT: HeaderName = HeaderName::from_static("x-evergate-attempt");
/// The pool that served, towards the client, where that is not the one the request was routed to.
pub(super) const X_EVERGATE_POOL: HeaderName = HeaderName::from_static("x-evergate-pool");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Fields that evergate sets. They stand for all of the same name that the client sent, and are kept beside those:
/// putting them into the map would make it grow for each request.
pub(super) type Own = Vec<(HeaderName, HeaderValue)>;

/// Fields of one connection, whatever `Connection` says.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HTTP2_SETTINGS,
];

/// Removes what belongs to one connection only. `TE: trailers` survives, as gRPC needs it.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // One look over the names is cheaper than looking each of them up, and most messages have none.
    if headers.keys().any(|name| HOP_BY_HOP.contains(name) || *name == header::TE) {
        strip_found(headers);
    }
}

fn strip_found(headers: &mut HeaderMap) {
    let nominated: SmallVec<[HeaderName; 4]> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.split(','))
        .filter_map(|name| HeaderName::try_from(name.trim()).ok())
        .collect();
    let trailers = headers.get(header::TE).is_some_and(wants_trailers);
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    for name in nominated {
        // Nominating these would take away what the message means (a known attack on proxies).
        if !is_protected(&name) {
            headers.remove(name);
        }
    }
    headers.remove(header::TE);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

fn wants_trailers(te: &HeaderValue) -> bool {
    te.to_str().is_ok_and(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
}

fn is_protected(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONTENT_LENGTH | header::CONTENT_TYPE | header::HOST | header::AUTHORIZATION | header::COOKIE
    ) || *name == X_REQUEST_ID
        || *name == X_FORWARDED_FOR
        || *name == X_FORWARDED_PROTO
        || *name == X_FORWARDED_HOST
        || *name == header::FORWARDED
}

/// Whether the client asks to switch to another protocol on this connection (RFC 9110 §7.8).
pub(super) fn upgrade(head: &request::Parts) -> Option<HeaderValue> {
    if head.version != Version::HTTP_11 {
        return None;
    }
    let asks = head.headers.get_all(header::CONNECTION).iter().any(|value| {
        value.to_str().is_ok_and(|list| list.split(',').any(|o| o.trim().eq_ignore_ascii_case("upgrade")))
    });
    // An upgrade to HTTP/2 is of the connection, not of the exchange; it may be ignored, and is.
    head.headers
        .get(header::UPGRADE)
        .filter(|to| asks && !to.as_bytes().eq_ignore_ascii_case(b"h2c"))
        .cloned()
}

/// Whom the request is for, with its port: a host in the target wins over the field (RFC 9112 §3.2.2, RFC 9113 §8.3.1).
pub(super) fn host<'h>(headers: &'h HeaderMap, uri: &'h Uri) -> Option<&'h str> {
    let field = || headers.get(header::HOST)?.to_str().ok();
    match uri.authority() {
        Some(authority) => authority.as_str().rsplit('@').next(),
        None => field(),
    }
}

/// HTTP/2 may send a cookie in crumbs; whoever speaks HTTP/1.1 is to see one field (RFC 9113 §8.2.3).
pub(super) fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes);
    let (Some(first), Some(second)) = (crumbs.next(), crumbs.next()) else { return };
    let mut cookie = [first, second].join(&b"; "[..]);
    for crumb in crumbs {
        cookie.extend_from_slice(b"; ");
        cookie.extend_from_slice(crumb);
    }
    if let Ok(cookie) = HeaderValue::from_bytes(&cookie) {
        headers.insert(header::COOKIE, cookie);
    }
}

/// Tells the backend who asks. What an untrusted peer claims is replaced, what a trusted one says is extended.
pub(super) fn forward(headers: &mut HeaderMap, own: &mut Own, uri: &Uri, client: &Client) {
    let host = host(headers, uri).and_then(|host| HeaderValue::from_str(host).ok());
    let peer = client.peer.ip();
    let proto = if client.tls { "https" } else { "http" };
    let said = |name: &HeaderName| client.trusted && headers.contains_key(name);
    let addresses = match client.trusted {
        true => extended(headers, &X_FORWARDED_FOR, client.forwarded_for.as_bytes()),
        false => Some(client.forwarded_for.clone()),
    };
    own.extend(addresses.map(|addresses| (X_FORWARDED_FOR, addresses)));
    if !said(&X_FORWARDED_PROTO) {
        own.push((X_FORWARDED_PROTO, HeaderValue::from_static(proto)));
    }
    if !said(&X_FORWARDED_HOST) {
        match &host {
            Some(host) => own.push((X_FORWARDED_HOST, host.clone())),
            None => drop(headers.remove(X_FORWARDED_HOST)),
        }
    }
    // `Forwarded` is written only where it is already in use: the other three are what backends read.
    if headers.contains_key(header::FORWARDED) {
        let element = forwarded_element(peer, proto, host.as_ref());
        let elements = match client.trusted {
            true => extended(headers, &header::FORWARDED, element.as_bytes()),
            false => Some(ascii(&element)),
        };
        own.extend(elements.map(|elements| (header::FORWARDED, elements)));
    }
}

fn forwarded_element(peer: IpAddr, proto: &str, host: Option<&HeaderValue>) -> String {
    let mut element = match peer {
        IpAddr::V4(ip) => format!("for={ip};proto={proto}"),
        IpAddr::V6(ip) => format!("for=\"[{ip}]\";proto={proto}"),
    };
    if let Some(host) = host.and_then(|host| host.to_str().ok()).filter(|host| !host.contains(['"', '\\'])) {
        // Writing to a string cannot fail.
        let _ = write!(element, ";host=\"{host}\"");
    }
    element
}

/// The list `name` with one more element.
fn extended(headers: &HeaderMap, name: &HeaderName, element: &[u8]) -> Option<HeaderValue> {
    let mut list: Vec<u8> = Vec::new();
    for value in headers.get_all(name) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(element);
    HeaderValue::from_bytes(&list).ok()
}

fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("unknown"))
}

/// Who the client is, for the records: the peer, or whom a trusted proxy names first.
pub(super) fn client_ip(headers: &HeaderMap, client: &Client) -> IpAddr {
    let named = || {
        let first = headers.get(X_FORWARDED_FOR)?.to_str().ok()?.split(',').next()?.trim();
        first.parse().ok()
    };
    if client.trusted { named().unwrap_or(client.peer.ip()) } else { client.peer.ip() }
}

/// The client's request id if it is fit to be one, else a new one of 128 random bits.
pub(super) fn request_id(headers: &HeaderMap, rng: &mut fastrand::Rng) -> HeaderValue {
    let fit = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    match headers.get(X_REQUEST_ID).filter(fit) {
        Some(theirs) => theirs.clone(),
        None => hexadecimal(rng.u128(..)),
    }
}

/// 32 digits. By hand, because every request pays for it.
fn hexadecimal(number: u128) -> HeaderValue {
    let digit = |half: u8| b"0123456789abcdef"[usize::from(half)];
    let mut digits = [0; 32];
    for (pair, byte) in digits.chunks_exact_mut(2).zip(number.to_be_bytes()) {
        pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 0xf)]);
    }
    HeaderValue::from_bytes(&digits).unwrap_or(HeaderValue::from_static("unknown"))
}

/// The id of attempt `n`: the exchange's own for the first, so that engines which refuse an id twice take the others.
pub(super) fn attempt_id(id: &HeaderValue, n: u32) -> HeaderValue {
    if n == 1 {
        return id.clone();
    }
    let mut bytes = id.as_bytes().to_vec();
    bytes.extend_from_slice(format!("-{n}").as_bytes());
    HeaderValue::from_bytes(&bytes).unwrap_or_else(|_| id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn client(trusted: bool) -> Client {
        Client::new("192.0.2.7:4711".parse().unwrap(), true, trusted, Arc::from("l"))
    }

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let mut headers = map(&[
            ("connection", "keep-alive, X-Private"),
            ("connection", "close, authorization"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "close"),
            ("te", "trailers, deflate"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("x-private", "1"),
            ("authorization", "Bearer a"),
            ("x-public", "2"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("authorization", "Bearer a"), ("x-public", "2"), ("te", "trailers")]));
    }

    #[test]
    fn claims_of_strangers_are_replaced_and_those_of_trusted_proxies_extended() {
        let claims = [
            ("host", "api.example"),
            ("x-forwarded-for", "198.51.100.1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "outer.example"),
            ("forwarded", "for=198.51.100.1"),
        ];
        let uri = Uri::from_static("/v1/models");
        let forwarded = |trusted| {
            let (mut headers, mut own) = (map(&claims), Own::new());
            forward(&mut headers, &mut own, &uri, &client(trusted));
            own.into_iter().for_each(|(name, value)| drop(headers.insert(name, value)));
            headers
        };
        let headers = forwarded(false);
        assert_eq!(headers[X_FORWARDED_FOR], "192.0.2.7");
        assert_eq!(headers[X_FORWARDED_PROTO], "https");
        assert_eq!(headers[X_FORWARDED_HOST], "api.example");
        assert_eq!(headers[header::FORWARDED], "for=192.0.2.7;proto=https;host=\"api.example\"");
        assert_eq!(client_ip(&map(&claims), &client(true)), "198.51.100.1".parse::<IpAddr>().unwrap());
        let headers = forwarded(true);
        assert_eq!(headers[X_FORWARDED_FOR], "198.51.100.1, 192.0.2.7");
        assert_eq!(headers[X_FORWARDED_PROTO], "http");
        assert_eq!(headers[X_FORWARDED_HOST], "outer.example");
        assert_eq!(
            headers[header::FORWARDED],
            "for=198.51.100.1, for=192.0.2.7;proto=https;host=\"api.example\""
        );
    }

    #[test]
    fn a_request_id_is_taken_over_only_if_it_is_fit_to_be_one() {
        let mut rng = fastrand::Rng::with_seed(7);
        assert_eq!(request_id(&map(&[("x-request-id", "abc-1")]), &mut rng), "abc-1");
        for unfit in [String::new(), "a b".to_owned(), "x".repeat(129)] {
            let made = request_id(&map(&[("x-request-id", &unfit)]), &mut rng);
            assert_eq!(made.len(), 32, "{unfit:?}");
        }
        assert_eq!(hexadecimal(0x0123 << 112 | 0xcdef), format!("0123{}cdef", "0".repeat(24)));
        assert_eq!(attempt_id(&HeaderValue::from_static("abc"), 1), "abc");
        assert_eq!(attempt_id(&HeaderValue::from_static("abc"), 3), "abc-3");
    }
}
