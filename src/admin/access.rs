//! Who may do what at the operator's address.
//!
//! Looking is free for whoever can connect. Changing state needs the token where one is configured; where
//! none is, it needs a loopback address. A browser on the operator's machine is a third party with a foot
//! in the door, so a request some website made is refused (by `Sec-Fetch-Site` and `Origin`), and a
//! loopback address answers to numbers and `localhost` only: a name that was pointed at 127.0.0.1 (DNS
//! rebinding) gets nothing. Elsewhere any name may be the machine's own, and the token stands in the way.

use std::net::IpAddr;

use http::header::{AUTHORIZATION, HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, Method};

use crate::config::Secret;

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// `Host` is a name that cannot be this address's.
    ForeignHost,
    /// A website's script or form sent it.
    CrossSite,
    /// No token, or not the right one.
    WrongToken,
    /// Nobody may, from anywhere but this machine, before a token is configured.
    TokenNotConfigured,
}

impl Refusal {
    /// Name for machines, and what to do for people.
    pub(super) fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::ForeignHost => (
                "foreign_host",
                "this address is for this machine only: use it by number or as localhost, not by another name",
            ),
            Self::CrossSite => ("cross_site", "a website may not change anything here"),
            Self::WrongToken => {
                ("wrong_token", "send the configured admin.token: Authorization: Bearer <token>")
            }
            Self::TokenNotConfigured => (
                "token_not_configured",
                "this address is not loopback: set admin.token in the configuration, reload, and send it as \
                 Authorization: Bearer <token>",
            ),
        }
    }
}

/// Decides about one request. `loopback` is whether the listener's own address is.
pub(super) fn check(
    method: &Method,
    headers: &HeaderMap,
    loopback: bool,
    token: Option<&Secret>,
) -> Result<(), Refusal> {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    if loopback && headers.contains_key(HOST) && !host.is_some_and(is_own_name) {
        return Err(Refusal::ForeignHost);
    }
    if method == Method::GET || method == Method::HEAD {
        return Ok(());
    }
    if is_cross_site(headers, host) {
        return Err(Refusal::CrossSite);
    }
    match token {
        Some(token) if bears(headers, token) => Ok(()),
        Some(_) => Err(Refusal::WrongToken),
        None if loopback => Ok(()),
        None => Err(Refusal::TokenNotConfigured),
    }
}

/// A number, or localhost.
fn is_own_name(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// Tools send neither header. A browser sends one or both, and only our own pages are same-origin.
fn is_cross_site(headers: &HeaderMap, host: Option<&str>) -> bool {
    let site = headers.get("sec-fetch-site").map(http::HeaderValue::as_bytes);
    if site.is_some_and(|site| !matches!(site, b"same-origin" | b"none")) {
        return true;
    }
    headers.get(ORIGIN).is_some_and(|origin| {
        let own = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, name)| name);
        own.is_none() || own != host
    })
}

fn bears(headers: &HeaderMap, token: &Secret) -> bool {
    let given = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, given) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(given.trim())
    });
    given.is_some_and(|given| is_same(given.as_bytes(), token.expose().as_bytes()))
}

/// Takes as long for a wrong first byte as for a wrong last one. The length is no secret.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |differing, (a, b)| std::hint::black_box(differing | (a ^ b)));
    a.len() == b.len() && differing == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(
        method: Method,
        headers: &[(&'static str, &str)],
        loopback: bool,
        token: Option<&str>,
    ) -> Result<(), Refusal> {
        let map = headers
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect();
        check(&method, &map, loopback, token.map(|token| Secret::new(token.to_owned())).as_ref())
    }

    #[test]
    fn looking_is_free() {
        for loopback in [true, false] {
            assert_eq!(ask(Method::GET, &[], loopback, Some("t")), Ok(()));
        }
    }

    #[test]
    fn changing_needs_the_token_where_one_is_configured_even_on_loopback() {
        for loopback in [true, false] {
            let asked = |authorization: &str| {
                ask(Method::POST, &[("authorization", authorization)], loopback, Some("secret"))
            };
            assert_eq!(asked("Bearer secret"), Ok(()));
            assert_eq!(asked("bearer secret"), Ok(()));
            for wrong in ["Bearer secre", "Bearer secret2", "Bearer ", "Basic secret", "secret"] {
                assert_eq!(asked(wrong), Err(Refusal::WrongToken), "{wrong}");
            }
            assert_eq!(ask(Method::POST, &[], loopback, Some("secret")), Err(Refusal::WrongToken));
        }
    }

    #[test]
    fn without_a_token_only_loopback_may_change() {
        assert_eq!(ask(Method::POST, &[], true, None), Ok(()));
        assert_eq!(ask(Method::POST, &[], false, None), Err(Refusal::TokenNotConfigured));
    }

    #[test]
    fn websites_may_not_change_anything() {
        let host = ("host", "127.0.0.1:9901");
        let post = |header| ask(Method::POST, &[host, header], true, None);
        for foreign in [
            ("origin", "https://evil.example"),
            ("origin", "null"),
            ("origin", "http://127.0.0.1:8080"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert_eq!(post(foreign), Err(Refusal::CrossSite), "{foreign:?}");
        }
        for own in [
            ("origin", "http://127.0.0.1:9901"),
            ("sec-fetch-site", "same-origin"),
            ("sec-fetch-site", "none"),
        ] {
            assert_eq!(post(own), Ok(()), "{own:?}");
        }
    }

    #[test]
    fn a_loopback_address_answers_to_no_foreign_name() {
        for host in ["localhost:9901", "LOCALHOST", "127.0.0.1", "[::1]:9901", "10.0.0.1:80"] {
            assert_eq!(ask(Method::GET, &[("host", host)], true, None), Ok(()), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "evil.example:9901", "a b"] {
            assert_eq!(ask(Method::GET, &[("host", host)], true, None), Err(Refusal::ForeignHost), "{host}");
            assert_eq!(ask(Method::GET, &[("host", host)], false, None), Ok(()), "{host}");
        }
    }
}
