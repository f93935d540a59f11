//! The prober of one backend: ask, tell, wait; one question at a time.
//!
//! Besides, whoever suspects the backend may want it asked at once (`Backend::want_verify`): a probe with a clock
//! of a second at most, one at a time, beside the ordinary ones and not instead of them.
//!
//! The wait is counted from the beginning of a probe, so that a slow answer does not make the next
//! question later, and is cut short when the state of the backend changes: an ejection that ends in a
//! second must not wait five for the probe that lets it return. Parameters are read anew at every turn.

use std::time::Duration;

use http::Method;

use crate::clock;
use crate::config::{Generate, HealthPage, Probe, ProbeKind};
use crate::policy::Moment;
use crate::policy::dialect::{Endpoint, Question, check_reply};
use crate::policy::health::{Arrival, ProbeVerdict};
use crate::policy::progress::Verified;
use crate::pool::{Backend, LastProbe, Member, Place, Pool};
use crate::probe::ask::{self, Answered, Body, NoAnswer};
use crate::probe::canary;
use crate::probe::models::{self, LIST_AGE_MAX, LIST_AGE_MAX_WITHOUT_PROBES, ListAge};
use crate::probe::verdict;
use crate::telemetry::Telemetry;
use crate::telemetry::events::{ProbeChanged, ProbeNotMade, WeakProbe};
use crate::telemetry::metrics::ProbeResult;

/// The first probes of all backends are spread over so much, lest they all shake hands in the same instant.
const FIRST_SPREAD: Duration = Duration::from_millis(50);
/// Chance shortens or lengthens each wait by up to this share, so that probers do not march in step.
const JITTER: f64 = 0.2;
/// Least time from the end of a probe to the next: a backend that hangs until the timeout gets a rest.
const REST: Duration = Duration::from_millis(50);
/// How much of a probe's answer is read. Health pages are short; metrics pages asked for by mistake are not.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// What stands for the model's name in the path of a question.
const MODEL_IN_PATH: &str = "{model}";

/// Clock of a probe on demand, unless that of ordinary ones is shorter: work that hangs waits for its word.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(1);
/// From the beginning of one probe on demand to the next.
const VERIFY_INTERVAL: Duration = Duration::from_secs(1);

/// What one probe showed.
struct Seen {
    verdict: ProbeVerdict,
    saw: String,
}

impl Seen {
    fn failed(saw: impl Into<String>) -> Self {
        Self { verdict: ProbeVerdict::Fail, saw: saw.into() }
    }
}

/// Probes the backend at `place` until it is removed.
pub(super) async fn probe_for_good(place: Place) {
    tokio::select! {
        biased;
        () = probe_in_turn(&place) => {}
        () = verify_on_demand(&place) => {}
        () = canary::sing_for_good(&place) => {}
    }
}

async fn probe_in_turn(place: &Place) {
    let mut rng = clock::rng();
    let mut models = ListAge::unknown();
    tokio::time::sleep(FIRST_SPREAD.mul_f64(rng.f64())).await;
    while let Some((pool, i)) = place.now() {
        let began = clock::now();
        match &pool.config.probe.kind {
            ProbeKind::Off => {
                models::ask_if_due(place, &mut models, LIST_AGE_MAX_WITHOUT_PROBES, &mut rng).await;
            }
            ProbeKind::Http | ProbeKind::Generate(_) | ProbeKind::Tcp => {
                probe_once(place, &pool, i, &mut models, &mut rng).await;
            }
        }
        let ended = clock::now();
        drop(pool);
        let stretch = stretch(&mut rng);
        // Each change of state asks anew how long the wait should be.
        while let Some(due) = due(place, began, ended, &models, stretch) {
            let now = clock::now();
            if now >= due {
                break;
            }
            let doubt_due = models.doubt_due(now, &place.backend);
            if doubt_due.is_some_and(|at| now >= at) {
                let lost = models::ask_if_due(place, &mut models, LIST_AGE_MAX, &mut rng).await;
                if let Some((pool, i)) = place.now()
                    && let Some(reason) = lost.filter(|_| pool.config.probe.kind != ProbeKind::Off)
                {
                    // What cannot be connected to would pass no probe.
                    tell(place, &pool, i, Seen::failed(reason), clock::now().since(now), &mut rng);
                }
                continue;
            }
            let wake = doubt_due.map_or(due, |at| at.min(due));
            tokio::select! {
                biased;
                () = tokio::time::sleep(wake.since(now)) => {}
                () = place.backend.nudged() => {}
            }
        }
    }
}

async fn verify_on_demand(place: &Place) {
    let mut rng = clock::rng();
    loop {
        place.backend.verify_wanted().await;
        let Some((pool, i)) = place.now() else { return };
        if !pool.can_verify(i) {
            continue;
        }
        let asked = clock::now();
        let probe = &pool.config.probe;
        let seen = ask_page(&pool.members[i], &probe.page, probe.timeout.min(VERIFY_TIMEOUT)).await;
        let ended = clock::now();
        drop(pool);
        if let Some(seen) = made(place, seen) {
            let answered = seen.verdict != ProbeVerdict::Fail;
            place.backend.set_last_verify(Verified { asked, ended, answered });
            let Some((pool, i)) = place.now() else { return };
            if proves(&pool, &place.backend, seen.verdict) {
                tell(place, &pool, i, seen, ended.since(asked), &mut rng);
            }
        }
        // What was wanted meanwhile is done then.
        tokio::time::sleep((asked + VERIFY_INTERVAL).since(clock::now())).await;
    }
}

/// Whether a probe on demand is one for the judge too. Its bad news is always; good news is not where a pass needs
/// more than a page, or where it is open who answered.
fn proves(pool: &Pool, backend: &Backend, verdict: ProbeVerdict) -> bool {
    match verdict {
        ProbeVerdict::Fail | ProbeVerdict::Refusing => true,
        ProbeVerdict::Pass | ProbeVerdict::WeakPass => {
            pool.config.probe.kind == ProbeKind::Http && !backend.is_doubted() && !backend.is_wrong()
        }
    }
}

/// One probe of member `i` and what follows from it.
async fn probe_once(place: &Place, pool: &Pool, i: usize, models: &mut ListAge, rng: &mut fastrand::Rng) {
    let began = clock::now();
    let asked = match &pool.config.probe.kind {
        ProbeKind::Off => return,
        ProbeKind::Tcp => ask::connect(&pool.members[i], pool.config.probe.timeout)
            .await
            .map(|()| Seen { verdict: ProbeVerdict::Pass, saw: "connected".to_owned() })
            .or_else(|none| not_answered(&place.backend, none)),
        ProbeKind::Http => {
            ask_page(&pool.members[i], &pool.config.probe.page, pool.config.probe.timeout).await
        }
        ProbeKind::Generate(_) if is_served(pool, i) => {
            models::ask_if_due(place, models, LIST_AGE_MAX, rng).await;
            return;
        }
        ProbeKind::Generate(generate) => {
            if model_for(pool, i, generate).is_none() {
                models::ask_if_due(place, models, LIST_AGE_MAX, rng).await;
            }
            ask_for_token(pool, i, generate).await
        }
    };
    let took = clock::now().since(began);
    let Some(mut seen) = made(place, asked) else { return };
    match seen.verdict {
        // Nobody has been kept from work so far; now the first to pass would keep the others from it.
        ProbeVerdict::Pass | ProbeVerdict::WeakPass if is_new_founder(&place.backend) => {
            if let Some((pool, i)) = place.now() {
                tell(place, &pool, i, seen, took, rng);
            }
            models::ask_if_due(place, models, LIST_AGE_MAX, rng).await;
            return;
        }
        ProbeVerdict::Pass | ProbeVerdict::WeakPass => {
            models::ask_if_due(place, models, LIST_AGE_MAX, rng).await;
        }
        // Requests succeed where probes do not: it is there to be asked who it is.
        ProbeVerdict::Fail if place.backend.whole().read(|health| health.outvotes_probes()) => {
            models::ask_if_due(place, models, LIST_AGE_MAX, rng).await;
        }
        ProbeVerdict::Fail | ProbeVerdict::Refusing => place.backend.distrust(),
    }
    if let Some(wrong) = models.wrong().filter(|_| place.backend.is_wrong()) {
        seen = Seen::failed(format!("{}, but {wrong}", seen.saw));
    }
    // A reload may have come meanwhile: the generation in force is told, and nobody if it has no such backend.
    if let Some((pool, i)) = place.now() {
        tell(place, &pool, i, seen, took, rng);
    }
}

/// Whether it came with its pool and was never probed before.
fn is_new_founder(backend: &Backend) -> bool {
    backend.arrival() == Arrival::Founder && backend.last_probe().is_none() && !backend.is_doubted()
}

/// Whether real requests prove more than a question could, at no cost.
fn is_served(pool: &Pool, i: usize) -> bool {
    let now = clock::now();
    let lately = |at: Moment| now.since(at) <= pool.config.probe.interval;
    let backend = &pool.members[i].backend;
    backend.whole().read(|health| health.steady(now) && health.served_at().is_some_and(lately))
}

/// The model to ask member `i` for: as configured, else the pool's first, else the first that is listed.
fn model_for(pool: &Pool, i: usize, generate: &Generate) -> Option<String> {
    let config = &pool.config;
    let configured = generate.model.as_ref().or_else(|| config.models.first()).map(|name| {
        let alias = config.aliases.iter().find(|(alias, _)| alias == name);
        alias.map_or(name, |(_, target)| target).clone()
    });
    let listed = |member: &Member| member.backend.listed()?.ids.first().cloned();
    configured.or_else(|| listed(&pool.members[i])).or_else(|| pool.members.iter().find_map(listed))
}

/// What was seen, if the question could be asked at all.
fn made(place: &Place, asked: Result<Seen, String>) -> Option<Seen> {
    let told =
        |reason: &String| ProbeNotMade { at: &place.backend.metrics, saw: reason }.emit(telemetry(place));
    asked.inspect_err(told).ok()
}

/// Hands a verdict to the judge, keeps it for status pages, and tells what is new.
fn tell(place: &Place, pool: &Pool, i: usize, seen: Seen, took: Duration, rng: &mut fastrand::Rng) {
    let backend = &place.backend;
    let Seen { verdict, saw } = seen;
    pool.probed(i, verdict, rng);
    let last = LastProbe { verdict, saw: saw.clone(), at: clock::now(), took };
    let before = backend.set_last_probe(last).map_or(ProbeVerdict::Pass, |last| last.verdict);
    if before != verdict {
        ProbeChanged { at: &backend.metrics, result: ProbeResult::from(verdict), saw: &saw }
            .emit(telemetry(place));
    }
    if verdict == ProbeVerdict::WeakPass {
        WeakProbe { at: &backend.metrics, saw: &saw }.emit(telemetry(place));
    }
}

/// Asks for the health page. The error is of this machine, not the backend's.
async fn ask_page(member: &Member, page: &HealthPage, within: Duration) -> Result<Seen, String> {
    match ask::get(member, page.path.as_str(), BODY_BYTES_MAX, within).await {
        Ok(answer) => Ok(read_page(answer, page)),
        Err(none) => not_answered(&member.backend, none),
    }
}

/// Asks for something to be generated.
async fn ask_for_token(pool: &Pool, i: usize, generate: &Generate) -> Result<Seen, String> {
    let member = &pool.members[i];
    let model = model_for(pool, i, generate);
    let path = generate.endpoint.replace(MODEL_IN_PATH, model.as_deref().unwrap_or_default());
    let question = Question {
        endpoint: Endpoint::of(&Method::POST, &path),
        model: model.as_deref(),
        prompt: &generate.prompt,
        // No token is shorter than a byte.
        tokens_max: generate.expect.as_ref().map_or(1, |text| u32::try_from(text.len()).unwrap_or(u32::MAX)),
    };
    match ask::post(member, &path, question.body(), BODY_BYTES_MAX, generate.deadline).await {
        Ok(answer) => Ok(read_reply(answer, question.endpoint, generate.expect.as_deref())),
        Err(none) => not_answered(&member.backend, none),
    }
}

/// What it shows that there is no answer.
fn not_answered(backend: &Backend, none: NoAnswer) -> Result<Seen, String> {
    match none {
        NoAnswer::Lost(reason) => {
            backend.doubt();
            Ok(Seen::failed(reason))
        }
        NoAnswer::Theirs(reason) => Ok(Seen::failed(reason)),
        NoAnswer::Local(reason) => Err(reason),
    }
}

/// What a health page shows. A status that passes does not pass alone: the body must be whole and hold the text.
fn read_page(answer: Answered, page: &HealthPage) -> Seen {
    let verdict = verdict::of_status(answer.status, page);
    let status = answer.status.as_u16();
    match verdict {
        ProbeVerdict::Fail | ProbeVerdict::Refusing => return Seen { verdict, saw: status.to_string() },
        ProbeVerdict::Pass | ProbeVerdict::WeakPass => {}
    }
    match (answer.body, &page.body) {
        (Body::Broken(reason), _) => Seen::failed(format!("{status}, {reason}")),
        (Body::Whole(body) | Body::Beginning(body), Some(text)) if !verdict::contains(&body, text) => {
            Seen::failed(format!("{status} without {text:?} in its body"))
        }
        (Body::Whole(_) | Body::Beginning(_), _) => Seen { verdict, saw: status.to_string() },
    }
}

/// What the answer to a question shows: only a whole one shows anything.
fn read_reply(answer: Answered, endpoint: Endpoint, expect: Option<&str>) -> Seen {
    let status = answer.status.as_u16();
    match answer.body {
        Body::Broken(reason) => Seen::failed(format!("{status}, {reason}")),
        Body::Beginning(_) => Seen::failed(format!("{status}, and no end of the answer to a short question")),
        Body::Whole(body) => {
            let reply = check_reply(endpoint, answer.status, &body, expect);
            let saw = match &reply {
                Ok(()) if expect.is_some() => format!("{status} and the text expected"),
                Ok(()) => format!("{status} and a token"),
                Err(bad) => bad.to_string(),
            };
            Seen { verdict: verdict::of_reply(&reply), saw }
        }
    }
}

/// When the next turn is due; none when the backend is gone.
fn due(place: &Place, began: Moment, ended: Moment, models: &ListAge, stretch: f64) -> Option<Moment> {
    let (pool, i) = place.now()?;
    let probe = &pool.config.probe;
    if probe.kind == ProbeKind::Off {
        return Some(models.due(&place.backend).max(ended + REST));
    }
    // While peers do its work for it, it is in transition.
    let steady = pool.is_steady(i) && !place.backend.is_barred_by_doubt(clock::now());
    Some(next(probe, steady, began, ended, stretch))
}

/// When a probe is due after one that lasted from `began` to `ended`.
fn next(probe: &Probe, steady: bool, began: Moment, ended: Moment, stretch: f64) -> Moment {
    let interval = if steady { probe.interval } else { probe.interval_unsteady };
    (began + interval.mul_f64(stretch)).max(ended + REST)
}

/// By what a wait is multiplied: even between 1 − [`JITTER`] and 1 + [`JITTER`].
fn stretch(rng: &mut fastrand::Rng) -> f64 {
    1.0 - JITTER + 2.0 * JITTER * rng.f64()
}

fn telemetry(place: &Place) -> &Telemetry {
    place.directory.telemetry()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::StatusCode;

    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn answer(status: u16, body: Body) -> Answered {
        Answered { status: StatusCode::from_u16(status).unwrap(), body }
    }

    #[test]
    fn waits_are_spread_by_a_fifth_and_no_more() {
        let mut rng = fastrand::Rng::with_seed(7);
        let probe = Probe::default();
        let began = Moment::ZERO + MS(10_000);
        let waits: Vec<_> = (0..10_000)
            .map(|_| next(&probe, true, began, began + MS(3), stretch(&mut rng)).since(began))
            .collect();
        let (least, most) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
        assert!(*least >= MS(4_000) && *least < MS(4_010), "{least:?}");
        assert!(*most <= MS(6_000) && *most > MS(5_990), "{most:?}");
        let mean = waits.iter().sum::<Duration>() / 10_000;
        assert!(mean > MS(4_950) && mean < MS(5_050), "{mean:?}");
    }

    #[test]
    fn an_unsteady_backend_is_asked_sooner_and_a_hanging_one_gets_a_rest() {
        let probe = Probe::default();
        let began = Moment::ZERO + MS(10_000);
        let after = |steady, lasted| next(&probe, steady, began, began + MS(lasted), 1.0).since(began);
        assert_eq!(after(true, 3), MS(5_000));
        assert_eq!(after(false, 3), MS(1_000));
        assert_eq!(after(false, 1_000), MS(1_000) + REST);
        assert_eq!(after(true, 7_000), MS(7_000) + REST);
    }

    #[test]
    fn a_status_passes_only_with_a_whole_body_that_holds_the_text() {
        use ProbeVerdict::{Fail, Pass, Refusing, WeakPass};
        let whole = || Body::Whole(Bytes::from_static(b"all is well"));
        let beginning = || Body::Beginning(Bytes::from_static(b"all is well and"));
        let broken = || Body::Broken("broke off".to_owned());
        for (status, body, text, verdict) in [
            (200, whole(), None, Pass),
            (200, whole(), Some("well"), Pass),
            (200, whole(), Some("ready"), Fail),
            (200, beginning(), None, Pass),
            (200, beginning(), Some("well"), Pass),
            (200, broken(), None, Fail),
            (404, whole(), None, WeakPass),
            (404, broken(), None, Fail),
            (404, whole(), Some("ready"), Fail),
            (503, broken(), None, Refusing),
            (503, whole(), Some("ready"), Refusing),
            (500, whole(), Some("well"), Fail),
        ] {
            let described = format!("{status} {body:?} {text:?}");
            let page = HealthPage { body: text.map(str::to_owned), ..HealthPage::default() };
            assert_eq!(read_page(answer(status, body), &page).verdict, verdict, "{described}");
        }
    }

    #[test]
    fn only_a_whole_answer_to_a_question_passes() {
        let chat = |text: &str| {
            let body = format!(
                r#"{{"choices":[{{"index":0,"message":{{"content":"{text}"}},"finish_reason":"length"}}]}}"#
            );
            Bytes::from(body)
        };
        let read = |status, body, expect| {
            let seen = read_reply(answer(status, body), Endpoint::ChatCompletions, expect);
            (seen.verdict, seen.saw)
        };
        let (pass, fail) = (ProbeVerdict::Pass, ProbeVerdict::Fail);
        for (status, body, expect, verdict, saw) in [
            (200, Body::Whole(chat("4")), None, pass, "200 and a token"),
            (200, Body::Whole(chat("42")), Some("42"), pass, "200 and the text expected"),
            (200, Body::Whole(chat("!!")), Some("42"), fail, "another answer than expected: \"!!\""),
            (
                200,
                Body::Beginning(chat("4")),
                None,
                fail,
                "200, and no end of the answer to a short question",
            ),
            (200, Body::Broken("cut".to_owned()), None, fail, "200, cut"),
            (500, Body::Whole(chat("4")), None, fail, "500"),
            (429, Body::Whole(chat("4")), None, ProbeVerdict::Refusing, "429"),
        ] {
            assert_eq!(read(status, body, expect), (verdict, saw.to_owned()));
        }
    }
}
