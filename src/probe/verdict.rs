//! What an answer to a probe means, as a plain function.
//!
//! A 503 is not a failure but a wish: the engine is loading or draining, and new work stays away while
//! another backend is there. A 404 on a path nobody configured proves only that something answers; where the engine
//! is named, its page is there or it is not that engine.

use http::StatusCode;

use crate::config::HealthPage;
use crate::policy::dialect::BadReply;
use crate::policy::health::ProbeVerdict;

/// Reads the status of a health page.
pub(super) fn of_status(status: StatusCode, page: &HealthPage) -> ProbeVerdict {
    let status = status.as_u16();
    if !page.statuses.is_empty() {
        return if page.statuses.contains(&status) { ProbeVerdict::Pass } else { ProbeVerdict::Fail };
    }
    match (status, page.preset) {
        // The engine is known, and its page says 200 when it is well.
        (200, Some(_)) => ProbeVerdict::Pass,
        (503, Some(_)) => ProbeVerdict::Refusing,
        (_, Some(_)) => ProbeVerdict::Fail,
        (status, None) => guess(status),
    }
}

/// Of a path that nobody vouches for.
fn guess(status: u16) -> ProbeVerdict {
    match status {
        503 => ProbeVerdict::Refusing,
        404 => ProbeVerdict::WeakPass,
        // A final answer is what was asked for.
        ..200 | 500.. => ProbeVerdict::Fail,
        200..500 => ProbeVerdict::Pass,
    }
}

/// What the answer to a question for a token shows.
pub(super) fn of_reply(reply: &Result<(), BadReply>) -> ProbeVerdict {
    match reply {
        Ok(()) => ProbeVerdict::Pass,
        Err(BadReply::Busy(_)) => ProbeVerdict::Refusing,
        Err(BadReply::Status(_) | BadReply::Answer(_) | BadReply::NoToken | BadReply::Differs(_)) => {
            ProbeVerdict::Fail
        }
    }
}

/// Whether `text` is in the body read.
pub(super) fn contains(body: &[u8], text: &str) -> bool {
    memchr::memmem::find(body, text.as_bytes()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::dialect::Engine;
    use ProbeVerdict::{Fail, Pass, Refusing, WeakPass};

    #[test]
    fn statuses_are_read_by_the_table() {
        let default: &[u16] = &[];
        for (status, statuses, verdict) in [
            (200, default, Pass),
            (204, default, Pass),
            (302, default, Pass),
            (401, default, Pass),
            (404, default, WeakPass),
            (429, default, Pass),
            (500, default, Fail),
            (501, default, Fail),
            (502, default, Fail),
            (503, default, Refusing),
            (504, default, Fail),
            (599, default, Fail),
            (999, default, Fail),
            (101, default, Fail),
            (200, &[200, 204], Pass),
            (204, &[200, 204], Pass),
            (404, &[200, 204], Fail),
            (404, &[404], Pass),
            (503, &[200], Fail),
            (503, &[503], Pass),
            (500, &[500], Pass),
        ] {
            let code = StatusCode::from_u16(status).unwrap();
            let page = HealthPage { statuses: statuses.to_vec(), ..HealthPage::default() };
            assert_eq!(of_status(code, &page), verdict, "{status} with {statuses:?}");
        }
    }

    #[test]
    fn a_known_engine_passes_by_200_alone_and_refuses_by_503() {
        for engine in Engine::ALL {
            let page = HealthPage { preset: Some(engine), ..HealthPage::default() };
            for (status, verdict) in
                [(200, Pass), (204, Fail), (400, Fail), (404, Fail), (500, Fail), (503, Refusing)]
            {
                let code = StatusCode::from_u16(status).unwrap();
                assert_eq!(of_status(code, &page), verdict, "{engine:?} {status}");
            }
        }
    }

    #[test]
    fn the_text_may_stand_anywhere() {
        assert!(contains(br#"{"status":"ok"}"#, "ok"));
        assert!(contains(b"anything", ""));
        assert!(!contains(b"o k", "ok"));
        assert!(!contains(b"", "ok"));
    }
}
