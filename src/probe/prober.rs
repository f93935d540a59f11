//! The prober of one backend: ask, tell, wait; one question at a time.
//!
//! Besides, whoever suspects the backend may want it asked at once (`Backend::want_verify`): a probe with a clock
//! of a second at most, one at a time, beside the ordinary ones and not instead of them.
//!
//! The wait is counted from the beginning of a probe, so that a slow answer does not make the next
//! question later, and is cut short when the state of the backend changes: an ejection that ends in a
//! second must not wait five for the probe that lets it return. Parameters are read anew at every turn.

use std::time::Duration;

use crate::clock;
use crate::config::{Probe, ProbeKind};
use crate::policy::Moment;
use crate::policy::health::ProbeVerdict;
use crate::policy::progress::Verified;
use crate::pool::{LastProbe, Member, Place, Pool};
use crate::probe::ask::{self, Answered, Body, NoAnswer};
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
        () = probe_in_turn(&place) => {}
        () = verify_on_demand(&place) => {}
    }
}

async fn probe_in_turn(place: &Place) {
    let mut rng = clock::rng();
    let mut models = ListAge::unknown();
    tokio::time::sleep(FIRST_SPREAD.mul_f64(rng.f64())).await;
    while let Some((pool, i)) = place.now() {
        let began = clock::now();
        if pool.config.probe.kind == ProbeKind::Off {
            models::ask_if_due(&pool, i, &mut models, LIST_AGE_MAX_WITHOUT_PROBES, telemetry(place)).await;
        } else {
            probe_once(place, &pool, i, &mut models, &mut rng).await;
        }
        let ended = clock::now();
        drop(pool);
        let stretch = stretch(&mut rng);
        // Each change of state asks anew how long the wait should be.
        while let Some(due) = due(place, began, ended, &models, stretch) {
            tokio::select! {
                () = tokio::time::sleep(due.since(clock::now())) => break,
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
        let within = pool.config.probe.timeout.min(VERIFY_TIMEOUT);
        let seen = ask_health(&pool.members[i], &pool.config.probe, within).await;
        let ended = clock::now();
        drop(pool);
        if let Some(seen) = made(place, seen) {
            let answered = seen.verdict != ProbeVerdict::Fail;
            place.backend.set_last_verify(Verified { asked, ended, answered });
            let Some((pool, i)) = place.now() else { return };
            tell(place, &pool, i, seen, ended.since(asked), &mut rng);
        }
        // What was wanted meanwhile is done then.
        tokio::time::sleep((asked + VERIFY_INTERVAL).since(clock::now())).await;
    }
}

/// One probe and what follows from it.
async fn probe_once(place: &Place, pool: &Pool, i: usize, models: &mut ListAge, rng: &mut fastrand::Rng) {
    let began = clock::now();
    let probe = &pool.config.probe;
    let asked = ask_health(&pool.members[i], probe, probe.timeout).await;
    let took = clock::now().since(began);
    // A reload may have come meanwhile: the generation in force is told, and nobody if it has no such backend.
    let Some((pool, i)) = place.now() else { return };
    let Some(seen) = made(place, asked) else { return };
    match tell(place, &pool, i, seen, took, rng) {
        ProbeVerdict::Pass | ProbeVerdict::WeakPass => {}
        ProbeVerdict::Fail | ProbeVerdict::Refusing => return models.distrust(),
    }
    models::ask_if_due(&pool, i, models, LIST_AGE_MAX, telemetry(place)).await;
}

/// What was seen, if the question could be asked at all.
fn made(place: &Place, asked: Result<Seen, String>) -> Option<Seen> {
    let told =
        |reason: &String| ProbeNotMade { at: &place.backend.metrics, saw: reason }.emit(telemetry(place));
    asked.inspect_err(told).ok()
}

/// Hands a verdict to the judge, keeps it for status pages, and tells what is new.
fn tell(
    place: &Place,
    pool: &Pool,
    i: usize,
    seen: Seen,
    took: Duration,
    rng: &mut fastrand::Rng,
) -> ProbeVerdict {
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
    verdict
}

/// Asks as configured. The error is of this machine, not the backend's.
async fn ask_health(member: &Member, probe: &Probe, within: Duration) -> Result<Seen, String> {
    let (asked, statuses, text) = match &probe.kind {
        ProbeKind::Off => return Err("probes are off".to_owned()),
        ProbeKind::Tcp => {
            return match ask::connect(member, within).await {
                Ok(()) => Ok(Seen { verdict: ProbeVerdict::Pass, saw: "connected".to_owned() }),
                Err(NoAnswer::Theirs(reason)) => Ok(Seen::failed(reason)),
                Err(NoAnswer::Local(reason)) => Err(reason),
            };
        }
        ProbeKind::Http { path, statuses, body } => {
            (ask::get(member, path.as_str(), BODY_BYTES_MAX, within).await, statuses, body)
        }
    };
    match asked {
        Ok(answer) => Ok(read(answer, statuses, text.as_deref())),
        Err(NoAnswer::Theirs(reason)) => Ok(Seen::failed(reason)),
        Err(NoAnswer::Local(reason)) => Err(reason),
    }
}

/// What an answer shows. A status that passes does not pass alone: the body must be whole and hold the text.
fn read(answer: Answered, statuses: &[u16], text: Option<&str>) -> Seen {
    let verdict = verdict::of_status(answer.status, statuses);
    let status = answer.status.as_u16();
    match verdict {
        ProbeVerdict::Fail | ProbeVerdict::Refusing => return Seen { verdict, saw: status.to_string() },
        ProbeVerdict::Pass | ProbeVerdict::WeakPass => {}
    }
    match (answer.body, text) {
        (Body::Broken(reason), _) => Seen::failed(format!("{status}, {reason}")),
        (Body::Whole(body) | Body::Beginning(body), Some(text)) if !verdict::contains(&body, text) => {
            Seen::failed(format!("{status} without {text:?} in its body"))
        }
        (Body::Whole(_) | Body::Beginning(_), _) => Seen { verdict, saw: status.to_string() },
    }
}

/// When the next turn is due; none when the backend is gone.
fn due(place: &Place, began: Moment, ended: Moment, models: &ListAge, stretch: f64) -> Option<Moment> {
    let (pool, i) = place.now()?;
    let probe = &pool.config.probe;
    if probe.kind == ProbeKind::Off {
        return Some(models.due().max(ended + REST));
    }
    Some(next(probe, pool.is_steady(i), began, ended, stretch))
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
            assert_eq!(read(answer(status, body), &[], text).verdict, verdict, "{described}");
        }
    }
}
