//! Which models a backend has, by its own word at `/v1/models`.
//!
//! Asked only of a backend that has just answered a probe, and again soon after it was away: what comes
//! back may be another process with other weights. Not to answer here is no fault. A backend that answers
//! something else is taken not to list models and is asked seldom; one that does not answer keeps the list
//! it had. The list of a backend that dies is kept too: who shows it asks whether the backend lives.

use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use crate::clock;
use crate::policy::Moment;
use crate::pool::{Listed, Member, Pool};
use crate::probe::ask::{self, Answered, Body};
use crate::telemetry::Telemetry;
use crate::telemetry::events::ModelsChanged;

/// Where OpenAI-compatible engines list their models.
const PATH: &str = "/v1/models";
/// Age at which a list is asked for again. Engines load and unload adapters while running.
pub(super) const LIST_AGE_MAX: Duration = Duration::from_secs(30);
/// The same where there are no probes to ride on.
pub(super) const LIST_AGE_MAX_WITHOUT_PROBES: Duration = Duration::from_secs(60);
/// Until a backend that lists nothing is asked again: an engine that gains the path has restarted, which the
/// probes notice.
const ABSENT_PAUSE: Duration = Duration::from_secs(120);
/// Until a backend that gave no answer is asked again.
const FAILED_PAUSE: Duration = Duration::from_secs(10);
/// For the whole answer. Longer than a probe's, for a list may be; short, for the next probe waits for it.
const LIST_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest list. A thousand entries of the wordiest engine are 600 KiB.
const LIST_BYTES_MAX: usize = 1 << 20;

/// When a backend is to be asked again.
#[derive(Debug)]
pub(super) struct ListAge {
    due: Moment,
    /// Its ejections so far, when it was asked last.
    ejections: u64,
}

impl ListAge {
    /// At once.
    pub(super) fn unknown() -> Self {
        Self { due: Moment::ZERO, ejections: 0 }
    }

    /// It was away: what returns may list something else.
    pub(super) fn distrust(&mut self) {
        self.due = Moment::ZERO;
    }

    pub(super) fn is_due(&self, now: Moment, ejections: u64) -> bool {
        now >= self.due || ejections != self.ejections
    }

    /// When it is due, as far as time alone says.
    pub(super) fn due(&self) -> Moment {
        self.due
    }

    fn asked(&mut self, now: Moment, ejections: u64, again_after: Duration) {
        *self = Self { due: now + again_after, ejections };
    }
}

/// What it said.
#[derive(Debug, PartialEq)]
enum Said {
    List(Listed),
    /// It answered, and that is no list.
    NoList,
    /// It did not answer, or not now.
    Nothing,
}

/// Asks member `i` if it is time to. Never counts against the backend.
pub(super) async fn ask_if_due(
    pool: &Pool,
    i: usize,
    age: &mut ListAge,
    age_max: Duration,
    telemetry: &Telemetry,
) {
    let member = &pool.members[i];
    let (_, ejections) = member.backend.whole().ejections();
    if !age.is_due(clock::now(), ejections) {
        return;
    }
    let again_after = match read(ask::get(member, PATH, LIST_BYTES_MAX, LIST_TIMEOUT).await) {
        Said::List(listed) => {
            tell_if_changed(member, &listed.ids, telemetry);
            pool.set_listed(i, listed);
            age_max
        }
        Said::NoList => {
            tell_if_changed(member, &[], telemetry);
            member.backend.forget_listed();
            ABSENT_PAUSE
        }
        Said::Nothing => FAILED_PAUSE,
    };
    age.asked(clock::now(), ejections, again_after);
}

fn tell_if_changed(member: &Member, ids: &[String], telemetry: &Telemetry) {
    let before = member.backend.listed();
    if before.as_ref().map_or(&[][..], |listed| &listed.ids) != ids {
        ModelsChanged { at: &member.backend.metrics, ids }.emit(telemetry);
    }
}

fn read(answer: Result<Answered, ask::NoAnswer>) -> Said {
    let Ok(Answered { status, body }) = answer else { return Said::Nothing };
    match (status, body) {
        (status, Body::Whole(body)) if status.is_success() => parse(&body).map_or(Said::NoList, Said::List),
        (_, Body::Broken(_)) => Said::Nothing,
        (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS, _) => Said::Nothing,
        (status, _) if status.is_server_error() => Said::Nothing,
        // Redirected, refused, unknown, or longer than any list.
        (_, Body::Whole(_) | Body::Beginning(_)) => Said::NoList,
    }
}

/// `{"data": [{"id": …}, …]}`; entries without an id are left out. Ollama says `null` for an empty list.
fn parse(body: &[u8]) -> Option<Listed> {
    let Value::Object(mut answer) = serde_json::from_slice(body).ok()? else { return None };
    let data = match answer.remove("data")? {
        Value::Array(data) => data,
        Value::Null => Vec::new(),
        _ => return None,
    };
    let mut listed = Listed::default();
    for entry in data {
        if let Some(id) = entry.get("id").and_then(Value::as_str) {
            listed.ids.push(id.to_owned());
            listed.entries.push(entry);
        }
    }
    Some(listed)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn said(status: u16, body: Body) -> Said {
        read(Ok(Answered { status: StatusCode::from_u16(status).unwrap(), body }))
    }

    fn whole(text: &'static str) -> Body {
        Body::Whole(Bytes::from_static(text.as_bytes()))
    }

    fn ids(said: Said) -> Vec<String> {
        match said {
            Said::List(listed) => listed.ids,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lists_of_engines_are_read() {
        let vllm =
            r#"{"object":"list","data":[{"id":"a","object":"model","max_model_len":9},{"id":"a-lora"}]}"#;
        assert_eq!(ids(said(200, whole(vllm))), ["a", "a-lora"]);
        let llama_cpp = r#"{"models":[{"name":"x"}],"object":"list","data":[{"id":"x","meta":{"n_ctx":1}}]}"#;
        assert_eq!(ids(said(200, whole(llama_cpp))), ["x"]);
        assert!(ids(said(200, whole(r#"{"object":"list","data":null}"#))).is_empty());
        let odd = r#"{"data":[{"id":"a"},{"name":"b"},"c",{"id":7}]}"#;
        assert_eq!(ids(said(200, whole(odd))), ["a"]);
    }

    #[test]
    fn an_answer_that_is_no_list_is_told_from_no_answer() {
        for text in ["", "ok", "[]", "{}", r#"{"data":{}}"#, "<html>"] {
            assert_eq!(said(200, whole(text)), Said::NoList, "{text}");
        }
        for status in [301, 400, 401, 404, 405] {
            assert_eq!(said(status, whole("{}")), Said::NoList, "{status}");
        }
        assert_eq!(said(200, Body::Beginning(Bytes::new())), Said::NoList);
        for status in [408, 429, 500, 502, 503] {
            assert_eq!(said(status, whole("{}")), Said::Nothing, "{status}");
        }
        assert_eq!(said(200, Body::Broken("cut".to_owned())), Said::Nothing);
        assert_eq!(read(Err(ask::NoAnswer::Theirs(String::new()))), Said::Nothing);
    }

    #[test]
    fn a_backend_that_was_away_is_asked_again_at_once() {
        let now = Moment::ZERO + Duration::from_secs(100);
        let mut age = ListAge::unknown();
        assert!(age.is_due(now, 0));
        age.asked(now, 0, LIST_AGE_MAX);
        assert!(!age.is_due(now + LIST_AGE_MAX - Duration::from_micros(1), 0));
        assert!(age.is_due(now + LIST_AGE_MAX, 0));
        assert!(age.is_due(now, 1), "it was ejected meanwhile");
        age.distrust();
        assert!(age.is_due(now, 0), "a probe failed meanwhile");
    }
}
