//! Everything the demo says. Pure: values in, text out.
//!
//! Written for somebody who has read nothing else: who does what to whom, in the words evergate's own
//! logs and pages use, each explained where it first appears.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use crate::demo::clients::CLIENTS as CLIENT_COUNT;
use crate::demo::clocks::Shorter;
use crate::demo::screen::{Span, Tone};
use crate::demo::tally::{Condition, Tally, Verdict};
use crate::policy::Moment;
use crate::policy::health::{Operational, Standing};
use crate::telemetry::events::{EventRecord, Severity};

/// Who a line is about: what the demo does, what evergate notices, what clients see.
pub(super) const DEMO: &str = "demo";
pub(super) const EVERGATE: &str = "evergate";
pub(super) const CLIENTS: &str = "clients";

pub(super) const NEXT_CALM: &str = "a moment of calm";

/// How those lines are set apart.
pub(super) fn tone_of(who: &str) -> Tone {
    match who {
        DEMO => Tone::Doubt,
        CLIENTS => Tone::Good,
        _ => Tone::Strong,
    }
}

/// What listens where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) proxy: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) replicas: Vec<(String, SocketAddr)>,
}

/// The first lines: what runs, how to try it, what is not as usual, what will happen.
pub(super) fn opening(places: &Places, shorter: &[Shorter]) -> String {
    let replicas = match places.replicas.len() {
        3 => "three".to_owned(),
        n => n.to_string(),
    };
    let mut text = format!(
        "evergate demo: {replicas} simulated replicas, evergate in front, {CLIENT_COUNT} clients asking.\n\n"
    );
    let mut place = |name: &str, address: SocketAddr, what: &str| {
        let _infallible =
            writeln!(text, "{}", format!("  {name:<10} http://{address:<17} {what}").trim_end());
    };
    place(EVERGATE, places.proxy, "clients connect here (OpenAI-compatible)");
    place("admin", places.admin, "for operators: /status and /metrics");
    for (name, address) in &places.replicas {
        place(name, *address, "simulated: speaks like vLLM, needs no GPU");
    }
    let _infallible = write!(
        text,
        "\nAsk it yourself while it runs, from another terminal:\n\n  {}\n\n\
         evergate runs with its defaults, but for clocks that would keep you waiting:\n\n",
        curl(places.proxy)
    );
    for clock in shorter {
        let _infallible = writeln!(
            text,
            "  {:<23} {:>6}, not {:>4}: {}",
            clock.key,
            seconds(clock.here),
            seconds(clock.default),
            clock.what
        );
    }
    text += "\nNow replicas are killed, frozen and brought back. Every answer is compared\n\
             with what the model says, word for word.\n\n";
    text
}

/// The line that asks evergate by hand.
pub(super) fn curl(proxy: SocketAddr) -> String {
    format!(
        "curl -N http://{proxy}/v1/chat/completions -H 'content-type: application/json' \
         -d '{{\"model\":\"{}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Why two lights?\"}}]}}'",
        super::MODEL
    )
}

pub(super) fn killed(name: &str) -> String {
    format!("kills {name}: its connections are reset, its port is closed")
}

pub(super) fn started(name: &str) -> String {
    format!("starts {name} again")
}

pub(super) fn frozen(name: &str) -> String {
    format!("freezes {name}: its connections stay open, and nothing comes out of them")
}

pub(super) fn thawed(name: &str) -> String {
    format!("thaws {name}: it goes on where it stood")
}

pub(super) fn next_kill(name: &str) -> String {
    format!("{name} is killed")
}

pub(super) fn next_start(name: &str) -> String {
    format!("{name} is started again")
}

pub(super) fn next_thaw(name: &str) -> String {
    format!("{name} is thawed")
}

pub(super) fn next_back(name: &str) -> String {
    format!("evergate finds out that {name} is back")
}

/// Before the first trouble.
pub(super) fn calm(tally: &Tally) -> String {
    format!("all is well: {}", counts(tally))
}

/// What clients saw of one trouble, from its beginning until all was well again.
pub(super) fn seen(name: &str, was: &str, tally: &Tally, moved: u64) -> String {
    let moved = match moved {
        0 => "no request had to move to another replica".to_owned(),
        1 => "1 request moved to another replica, unseen".to_owned(),
        n => format!("{n} requests moved to another replica, unseen"),
    };
    format!("while {name} was {was}, and until all was well again: {}; {moved}", counts(tally))
}

fn counts(tally: &Tally) -> String {
    let Tally { asked, answered, cut, failed, wrong, slowest, told: _ } = tally;
    let mut text = format!("{} {failed} failed", answers(*asked, *answered));
    if *wrong > 0 {
        let _infallible = write!(text, ", {wrong} WRONG");
    }
    if *cut > 0 {
        let _infallible = write!(text, ", {cut} {} in the middle", streams_cut(*cut));
    }
    if !slowest.is_zero() {
        let _infallible = write!(text, "; the slowest answer took {}", tenths(*slowest));
    }
    text
}

fn answers(asked: u64, answered: u64) -> String {
    format!("{asked} asked, {answered} answered,")
}

fn streams_cut(n: u64) -> &'static str {
    if n == 1 { "stream cut" } else { "streams cut" }
}

/// What evergate noticed; none for what a spectator need not know.
pub(super) fn event(event: &EventRecord) -> Option<String> {
    let who = event.backend.as_deref().unwrap_or("the pool");
    let text = event.text.as_str();
    let said = match (event.event, event.name) {
        ("probe_changed", Some("fail")) => format!("a health probe fails: {}", probe_saw(text)),
        ("backend_transition", Some("probes_failed")) => {
            format!("{text}; it gets no requests, and those that wait there move on")
        }
        ("backend_transition", Some("ejected")) => {
            // Which ejection in a row it is matters from the second on.
            format!("{}; no requests go there", text.replace(" (time 1 in a row)", ""))
        }
        ("backend_transition", Some("trial_failed")) => format!("{text}; no requests go there"),
        ("stream_resumed", _) => text.to_owned(),
        ("backend_transition", Some("readmitted")) => format!("{text}: its share of the requests grows"),
        ("backend_transition", _) => text.to_owned(),
        _ if event.severity != Severity::Info => text.to_owned(),
        _ => return None,
    };
    Some(format!("{who}: {said}"))
}

/// What a failed probe saw, without what only a log needs:
/// `probe now fail: connection_refused: Connection refused (os error 111)` → `Connection refused`.
fn probe_saw(text: &str) -> &str {
    let saw = text.split_once(": ").map_or(text, |(_, saw)| saw);
    match saw.rsplit_once(" (os error") {
        Some((error, _)) => error.rsplit(": ").next().unwrap_or(error),
        None => saw,
    }
}

/// One replica in the view.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) condition: Condition,
    /// What evergate thinks of it.
    pub(super) judged: (Tone, String),
    pub(super) under_way: u32,
    pub(super) answers: u64,
}

/// The numbers kept in view.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub(super) rows: Vec<Row>,
    pub(super) tally: Tally,
    pub(super) moved: u64,
    /// What the demo does next, and when.
    pub(super) next: Option<(String, Moment)>,
    pub(super) now: Moment,
}

impl View {
    /// Its lines, unbroken.
    pub(super) fn lines(&self) -> Vec<Vec<Span>> {
        let plain = |text: String| Span(Tone::Plain, text);
        let mut lines = vec![
            vec![],
            vec![Span(
                Tone::Dim,
                format!(
                    "  {:<10} {:<8} {:<34} {:>9} {:>9}",
                    "replica", "is", "evergate says", "under way", "answers"
                ),
            )],
        ];
        for row in &self.rows {
            let (tone, is) = match row.condition {
                Condition::Runs => (Tone::Good, "running"),
                Condition::Dead => (Tone::Bad, "dead"),
                Condition::Frozen => (Tone::Bad, "frozen"),
            };
            let (judged_tone, judged) = &row.judged;
            lines.push(vec![
                plain(format!("  {:<10} ", row.name)),
                Span(tone, format!("{is:<8} ")),
                Span(*judged_tone, format!("{judged:<34} ")),
                plain(format!("{:>9} {:>9}", row.under_way, row.answers)),
            ]);
        }
        let Tally { asked, answered, cut, failed, wrong, slowest, told: _ } = &self.tally;
        let bad = failed + wrong;
        lines.push(vec![]);
        lines.push(vec![
            plain(format!("  {CLIENTS:<10} {} ", answers(*asked, *answered))),
            Span(if bad == 0 { Tone::Good } else { Tone::Bad }, format!("{bad} failed")),
            plain(match cut {
                0 => String::new(),
                n => format!(", {n} {}", streams_cut(*n)),
            }),
            plain(format!("; slowest {}", tenths(*slowest))),
        ]);
        lines.push(vec![plain(format!(
            "  {EVERGATE:<10} {} moved to another replica, unseen by the client",
            requests(self.moved)
        ))]);
        let next = match &self.next {
            Some((next, at)) if *at == Moment::NEVER => next.clone(),
            Some((next, at)) => format!("{next}: {} to go", tenths(at.since(self.now))),
            None => "the last answers are awaited".to_owned(),
        };
        lines.push(vec![
            plain(format!("  {:<10} {next:<44} ", "next")),
            Span(Tone::Dim, "Ctrl-C ends it".to_owned()),
        ]);
        lines
    }
}

/// What evergate thinks of a replica.
pub(super) fn judged(state: Operational, standing: Standing, now: Moment) -> (Tone, String) {
    match state {
        Operational::Healthy => (Tone::Good, "healthy".to_owned()),
        Operational::SlowStart => {
            let share = match standing {
                Standing::Eligible { share } => share,
                _ => 0.0,
            };
            (Tone::Good, format!("back: {:.0} % of its share", share * 100.0))
        }
        Operational::Unhealthy => (Tone::Bad, "unhealthy: its probes fail".to_owned()),
        Operational::Ejected { until } => {
            (Tone::Bad, format!("ejected: no requests for {}", tenths(until.since(now))))
        }
        Operational::AwaitsProbe => (Tone::Doubt, "out until a probe passes".to_owned()),
        Operational::Probation => (Tone::Doubt, "on probation: one request tries it".to_owned()),
        Operational::Refusing => (Tone::Doubt, "asks for no new work".to_owned()),
        Operational::Unknown => (Tone::Doubt, "not probed yet".to_owned()),
    }
}

/// The last lines.
pub(super) fn verdict(verdict: &Verdict) -> String {
    let Verdict { lasted, tally, moved, troubles, interrupted, .. } = verdict;
    let mut text = format!(
        "\nVerdict after {}, {} and {}{}: {}\n\n",
        tenths(*lasted),
        times(troubles.kills, "kill"),
        times(troubles.freezes, "freeze"),
        if *interrupted { " (interrupted)" } else { "" },
        match (verdict.holds(), tally.asked) {
            (true, 0) => "nothing was asked.",
            (true, _) => "no request failed.",
            (false, 0) => "NO ANSWER AT ALL.",
            (false, _) => "REQUESTS FAILED.",
        }
    );
    let mut row = |n: u64, what: &str| {
        let _infallible = writeln!(text, "  {n:>6}  {what}");
    };
    row(tally.asked, "questions asked");
    row(
        tally.answered,
        &format!("answered in full, word for word; the slowest took {}", tenths(tally.slowest)),
    );
    row(*moved, "moves to another replica, before the client had seen anything");
    row(tally.failed, "failed");
    if tally.wrong > 0 {
        row(tally.wrong, "answered with other words than the model's");
    }
    row(tally.cut, &format!("{} in the middle, with an error event that says so", streams_cut(tally.cut)));
    for told in &tally.told {
        let _infallible = writeln!(text, "          {told}");
    }
    if tally.cut > 0 {
        text += "\nThose streams had already said something when their replica died or froze, so\n\
                 could not be started again unseen, and no other replica went on with them in\n\
                 time. A client gets a clear error then, never a silent end.\n";
    }
    text
}

/// After the verdict, for somebody who stays.
pub(super) fn stays_up(places: &Places) -> String {
    format!(
        "\nevergate and its replicas stay up for you; Ctrl-C ends them. Ask something:\n\n  {}\n\n\
         `evergate demo --for 5m` goes on making trouble for five minutes.\n",
        curl(places.proxy)
    )
}

/// After the verdict, for somebody who goes.
pub(super) fn by_hand() -> String {
    let proxy = SocketAddr::from(([127, 0, 0, 1], 8080));
    format!(
        "\nTo try it by hand, leave it running:\n\n  evergate demo --listen {proxy} --for 10m\n\n\
         and ask from another terminal:\n\n  {}\n",
        curl(proxy)
    )
}

fn requests(n: u64) -> String {
    if n == 1 { "1 request".to_owned() } else { format!("{n} requests") }
}

fn times(n: u32, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

fn tenths(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Places { proxy: at(1), admin: at(2), replicas: vec![("replica-a".to_owned(), at(3))] }
    }

    fn record(event: &'static str, name: &'static str, text: &str) -> EventRecord {
        EventRecord {
            number: 1,
            time: std::time::UNIX_EPOCH,
            severity: Severity::Info,
            event,
            pool: Some("demo".to_owned()),
            backend: Some("replica-a".to_owned()),
            model: None,
            name: Some(name),
            text: text.to_owned(),
        }
    }

    fn tally(cut: u64, failed: u64) -> Tally {
        let slowest = Duration::from_millis(1_260);
        Tally { asked: 10 + cut + failed, answered: 10, cut, failed, slowest, ..Tally::default() }
    }

    fn verdict_of(tally: Tally) -> Verdict {
        Verdict {
            lasted: Duration::from_secs(18),
            tally,
            moved: 4,
            troubles: crate::demo::tally::Troubles { kills: 1, freezes: 2 },
            interrupted: false,
        }
    }

    #[test]
    fn the_opening_says_what_listens_where_how_to_ask_and_which_clocks_differ() {
        let clock = Shorter {
            key: "probe.interval".to_owned(),
            here: Duration::from_millis(250),
            default: Duration::from_secs(5),
            what: "a pause",
        };
        let text = opening(&places(), &[clock]);
        for part in [
            "  evergate   http://127.0.0.1:1 ",
            "  admin      http://127.0.0.1:2 ",
            "  replica-a  http://127.0.0.1:3 ",
            "curl -N http://127.0.0.1:1/v1/chat/completions",
            "probe.interval          0.25 s, not  5 s: a pause",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
    }

    #[test]
    fn the_curl_line_asks_for_a_model_that_is_served() {
        let line = curl(places().proxy);
        let body = line.split_once("-d '").unwrap().1.strip_suffix('\'').unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(crate::demo::replica("any").answer_to_chat(&body).is_some());
    }

    #[test]
    fn events_are_told_in_plain_words_or_not_at_all() {
        let said = |kind, name, text: &str| event(&record(kind, name, text));
        let refused = "probe now fail: connection_refused: Connection refused (os error 111)";
        assert_eq!(
            said("probe_changed", "fail", refused).unwrap(),
            "replica-a: a health probe fails: Connection refused"
        );
        let silent = "probe now fail: no answer within 500ms";
        assert_eq!(
            said("probe_changed", "fail", silent).unwrap(),
            "replica-a: a health probe fails: no answer within 500ms"
        );
        assert_eq!(
            said("backend_transition", "ejected", "ejected for 1.0s (time 1 in a row): 3 faults").unwrap(),
            "replica-a: ejected for 1.0s: 3 faults; no requests go there"
        );
        assert_eq!(said("probe_changed", "pass", "probe now pass: 200"), None);
        assert_eq!(said("models_changed", "", "lists demo"), None);
    }

    #[test]
    fn the_verdict_names_cut_streams_apart_from_failures() {
        let text = verdict(&verdict_of(tally(2, 0)));
        assert!(text.contains("after 18.0 s, 1 kill and 2 freezes: no request failed."), "{text}");
        assert!(text.contains("       2  streams cut in the middle"), "{text}");
        assert!(text.contains("a clear error"), "{text}");
        let text = verdict(&verdict_of(tally(0, 0)));
        assert!(!text.contains("a clear error"), "{text}");
        let text = verdict(&verdict_of(Tally { told: vec!["failed: status 502".to_owned()], ..tally(0, 1) }));
        assert!(text.contains("REQUESTS FAILED") && text.contains("failed: status 502"), "{text}");
    }

    #[test]
    fn what_is_told_at_length_fits_eighty_columns() {
        let clocks = crate::demo::clocks::tests::shorter_here();
        let texts = [opening(&places(), &clocks), verdict(&verdict_of(tally(1000, 10))), stays_up(&places())];
        for line in texts.iter().flat_map(|text| text.lines()).filter(|line| !line.contains("curl")) {
            assert!(line.chars().count() < 80, "{} columns: {line}", line.chars().count());
        }
    }

    #[test]
    fn a_view_fits_eighty_columns() {
        let now = Moment::ZERO + Duration::from_secs(60);
        let row = |state| Row {
            name: "replica-a".to_owned(),
            condition: Condition::Frozen,
            judged: judged(state, Standing::Eligible { share: 0.25 }, now),
            under_way: 1000,
            answers: 1_000_000,
        };
        let until = now + Duration::from_millis(600);
        let states = [
            Operational::Unknown,
            Operational::Healthy,
            Operational::SlowStart,
            Operational::Unhealthy,
            Operational::Refusing,
            Operational::Ejected { until },
            Operational::AwaitsProbe,
            Operational::Probation,
        ];
        let view = View {
            rows: states.map(row).into(),
            tally: tally(120, 3),
            moved: 12_345,
            next: Some((next_start("replica-a"), until)),
            now,
        };
        for line in view.lines() {
            let text: String = line.into_iter().map(|Span(_, text)| text).collect();
            assert!(text.chars().count() < 80, "{} columns: {text}", text.len());
        }
    }
}
