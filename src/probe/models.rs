//! Which models a backend has, by its own word at `/v1/models`; and so, whether it is who it should be.
//!
//! Asked of a backend that has just answered a probe, before its pass is told: what comes back from an absence may be
//! another process with other weights, and gets nothing until it said who it is. In between the list is asked for
//! from time to time, and at once where a connection was lost. Not to answer here is no fault. A backend that answers
//! something else is taken not to list models and is asked seldom; one that does not answer keeps the list
//! it had. The list of a backend that dies is kept too: who shows it asks whether the backend lives.

use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use crate::clock;
use crate::policy::Moment;
use crate::pool::{Backend, Listed, Member, Place, WrongModels};
use crate::probe::ask::{self, Answered, Body, NoAnswer};
use crate::probe::build;
use crate::telemetry::Telemetry;
use crate::telemetry::events::{MisconfiguredBackend, ModelsChanged};

/// Where OpenAI-compatible engines list their models.
const PATH: &str = "/v1/models";
/// Age at which a list is asked for again. Engines load and unload adapters while running; and one that was restarted
/// so quickly that nobody noticed is found out by this alone.
pub(super) const LIST_AGE_MAX: Duration = Duration::from_secs(10);
/// The same where there are no probes to ride on.
pub(super) const LIST_AGE_MAX_WITHOUT_PROBES: Duration = Duration::from_secs(60);
/// Until a backend that lists nothing is asked again: an engine that gains the path has restarted, which the
/// probes notice.
const ABSENT_PAUSE: Duration = Duration::from_secs(120);
/// Age at which the list of a backend that serves the wrong models is asked for again: a person repairs it.
const WRONG_LIST_AGE_MAX: Duration = Duration::from_secs(5);
/// While a backend is doubted, from the end of one question to the next, for peers do its work meanwhile.
const DOUBTED_PAUSE: Duration = Duration::from_millis(100);
/// The same where nothing else asks, for there are no probes.
const AWAY_PAUSE: Duration = Duration::from_secs(1);
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
    /// When it was asked last.
    asked: Moment,
    /// What was wrong with its list.
    wrong: Option<WrongModels>,
}

impl ListAge {
    /// At once.
    pub(super) fn unknown() -> Self {
        Self { due: Moment::ZERO, asked: Moment::ZERO, wrong: None }
    }

    /// When it is due by itself: sooner where it was away.
    pub(super) fn due(&self, backend: &Backend) -> Moment {
        if backend.is_doubted() { self.due.min(self.asked + AWAY_PAUSE) } else { self.due }
    }

    /// When a backend whose doubt keeps work away is to be asked; none where none does.
    pub(super) fn doubt_due(&self, now: Moment, backend: &Backend) -> Option<Moment> {
        backend.is_barred_by_doubt(now).then(|| self.asked + DOUBTED_PAUSE)
    }

    /// What is wrong with its list.
    pub(super) fn wrong(&self) -> Option<&WrongModels> {
        self.wrong.as_ref()
    }

    fn was_asked(&mut self, now: Moment, again_after: Duration) {
        self.asked = now;
        self.due = now + again_after;
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

/// Asks the backend at `place` if it is time to. That it does not answer is nothing against it; why there was no
/// connection is returned, for that is something.
pub(super) async fn ask_if_due(
    place: &Place,
    age: &mut ListAge,
    age_max: Duration,
    rng: &mut fastrand::Rng,
) -> Option<String> {
    let (pool, i) = place.now()?;
    let backend = &place.backend;
    if clock::now() < age.due && !backend.is_doubted() {
        return None;
    }
    let doubts = backend.doubts();
    let answer = ask::get(&pool.members[i], PATH, LIST_BYTES_MAX, LIST_TIMEOUT).await;
    let lost = match &answer {
        Err(NoAnswer::Lost(reason)) => Some(reason.clone()),
        _ => None,
    };
    let said = read(answer);
    if let Said::List(listed) = &said
        && (backend.build().is_none() || backend.is_doubted())
    {
        backend.set_build(build::ask(&pool.members[i], listed).await);
    }
    // A reload may have come meanwhile: the generation in force is told.
    let (pool, i) = place.now()?;
    let telemetry = place.directory.telemetry();
    let again_after = match said {
        Said::List(listed) => {
            tell_if_changed(&pool.members[i], &listed.ids, telemetry);
            let wrong = pool.set_listed(i, listed, rng);
            if let Some(wrong) = wrong.as_ref().filter(|wrong| age.wrong.as_ref() != Some(*wrong)) {
                MisconfiguredBackend { at: &backend.metrics, model: None, saw: wrong }.emit(telemetry);
            }
            age.wrong = wrong;
            pool.settle_doubts(i, doubts);
            if age.wrong.is_some() { WRONG_LIST_AGE_MAX } else { age_max }
        }
        Said::NoList => {
            tell_if_changed(&pool.members[i], &[], telemetry);
            pool.forget_listed(i);
            age.wrong = None;
            pool.settle_doubts(i, doubts);
            ABSENT_PAUSE
        }
        Said::Nothing => FAILED_PAUSE,
    };
    age.was_asked(clock::now(), again_after);
    lost
}

fn tell_if_changed(member: &Member, ids: &[String], telemetry: &Telemetry) {
    let before = member.backend.listed();
    if before.as_ref().map_or(&[][..], |listed| &listed.ids) != ids {
        ModelsChanged { at: &member.backend.metrics, ids }.emit(telemetry);
    }
}

fn read(answer: Result<Answered, NoAnswer>) -> Said {
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
        assert_eq!(read(Err(NoAnswer::Theirs(String::new()))), Said::Nothing);
    }
}
