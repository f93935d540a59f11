//! A stream that breaks behind any byte of its wire is, for its client, the uncut stream.
//!
//! One request for each byte, for each engine's framing, for two ways of cutting the answer into events, in all
//! the ways a connection can end, through the real proxy. The engine that goes on cuts its events elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use toml::Value as Toml;

use crate::engine::{Break, Cut, Engine, Skin, Wire, Writes, question};
use crate::support::backend::Backend;
use crate::support::client::{Answer, Request};
use crate::support::either::{Either, Http};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::view::{Fate, View};

/// Clients at a time, and how many of them speak HTTP/2.
const CLIENTS: usize = 16;
const CLIENTS_H2: usize = 3;

/// So often nothing is cut, or the engine that breaks would be taken out at last.
const UNCUT_EVERY: usize = 100;

/// What is played: one framing, one chunking, one way of going on.
#[derive(Clone, Debug)]
struct Case {
    skin: Skin,
    /// Tokens in an event, of the engine that breaks and of the one that goes on.
    tokens: [usize; 2],
    mode: &'static str,
    body: Value,
}

impl Case {
    /// A chat that asks for usage; the engines that can are asked for it in each event.
    fn chat(skin: Skin, tokens: [usize; 2], mode: &'static str) -> Self {
        let question = question(9..12, &["漢", "\"", " "]);
        let body = json!({
            "model": "m", "stream": true, "messages": [{"role": "user", "content": question}],
            "stream_options": {"include_usage": true, "continuous_usage_stats": mode == "best"},
        });
        Self { skin, tokens, mode, body }
    }

    fn engine(&self, which: usize) -> Engine {
        let number = [7_000_000, 9_000_000][which];
        Engine { skin: self.skin, tokens: self.tokens[which], number, breaks: which == 0 }
    }

    fn wire(&self) -> Wire {
        self.engine(0).wire(&self.body, 0).unwrap()
    }

    fn request(&self, cut: Option<Cut>) -> Request {
        let path = if self.body["prompt"].is_string() { "/v1/completions" } else { "/v1/chat/completions" };
        let request = Request::post_json(path, &self.body);
        match cut {
            Some(cut) => request.header("x-cut", &cut.header()),
            None => request,
        }
    }

    fn proxy(&self, dying: &Backend, alive: &Backend) -> ProxyBuilder {
        let tier = |tier: i64| [("tier", Toml::from(tier))];
        let builder = ProxyBuilder::new()
            .backend_with(&dying.url(), &tier(0))
            .backend_with(&alive.url(), &tier(1))
            .set("pool.resume.mode", self.mode)
            // Here nearly every request is to meet the engine that breaks, and to be resumed.
            .set("pool.health.eject_consecutive", 1000)
            .set("pool.health.success_rate_min", 0.0)
            .set("pool.retry.budget_ratio", 1.0)
            .set("pool.retry.budget_floor", 10_000.0);
        match self.skin.preset() {
            Some(preset) => builder.set("pool.probe.preset", preset),
            None => builder,
        }
    }
}

/// Counts of resumed and refused streams, by evergate's own books.
pub fn resumes(proxy: &Proxy) -> (u64, u64) {
    let text = proxy.telemetry.metrics.render();
    let of = |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
    let lines = || text.lines().filter(|line| line.starts_with("evergate_resumes_total{"));
    let resumed = |line: &&str| line.contains("result=\"resumed\"");
    (lines().filter(resumed).map(of).sum(), lines().filter(|line| !resumed(line)).map(of).sum())
}

/// What evergate counted of them, for a test that failed.
pub fn told(proxy: &Proxy) -> String {
    let text = proxy.telemetry.metrics.render();
    let lines = text.lines().filter(|line| line.starts_with("evergate_resumes_total{"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Every `stride`th byte, each in one of the ways to end and to write.
fn cuts(wire: &Wire, stride: usize) -> Vec<Cut> {
    let way = |at: usize| Cut {
        at,
        end: Break::ALL[at % 4],
        // A byte a write costs the most, and differs from the others in nothing that the decoder's tests miss.
        writes: match at % 24 {
            0 => Writes::Byte,
            at if at % 3 == 0 => Writes::AtOnce,
            _ => Writes::Event,
        },
    };
    (0..wire.bytes().len()).step_by(stride).map(way).collect()
}

/// The uncut stream in what must be the same: text, finish, usage.
fn assert_is(case: &Case, wire: &Wire, cut: Cut, answer: &Answer, uncut: &View) {
    let place = || format!("{case:?} {cut:?}:\n{}", answer.text());
    assert_eq!(answer.status, 200, "{}", place());
    let mut view = View::of(answer, case.skin.voice());
    assert_eq!(view.fate(), Some(Fate::Whole), "{:?} {}", view.wrong, place());
    assert!(view.wrong.is_empty(), "{:?} {}", view.wrong, place());
    assert_eq!((&view.text, &view.finishes), (&uncut.text, &uncut.finishes), "{}", place());
    let whole = wire.whole(cut.at);
    // Behind the finish it is ended without another replica. A continued answer has a usage where both legs count.
    let unknown = whole > wire.finish || (case.mode == "best" && case.skin == Skin::LlamaCpp);
    let ambiguous = cut.end == Break::Clean && whole == wire.finish;
    if view.usage.is_some() || !(unknown || ambiguous) {
        assert_eq!(view.usage, uncut.usage, "{}", place());
    }
}

/// Plays a case at every `stride`th byte.
async fn play(case: Case, stride: usize) {
    let dying = Backend::start(case.engine(0).script()).await;
    let alive = Backend::start(case.engine(1).script()).await;
    let proxy = Proxy::start(&case.proxy(&dying, &alive));
    proxy.probed().await;
    let wire = case.wire();

    let uncut = Http::One.send(proxy.addr, &case.request(None)).await;
    let same = Engine { number: case.engine(0).number, ..case.engine(0) }.wire(&case.body, 0).unwrap();
    assert_eq!(uncut.text(), String::from_utf8(same.bytes()).unwrap(), "an unbroken stream is not touched");
    let mut whole = View::of(&uncut, case.skin.voice());
    assert_eq!((whole.fate(), whole.wrong.len()), (Some(Fate::Whole), 0), "{:?}", whole.wrong);

    let cuts = Arc::new(cuts(&wire, stride));
    let next = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (address, cuts, next) = (proxy.addr, Arc::clone(&cuts), Arc::clone(&next));
        let (case, wire, whole) = (case.clone(), wire.clone(), whole.clone());
        clients.spawn(async move {
            let http = if client < CLIENTS_H2 { Http::Two } else { Http::One };
            let mut kept: Option<Either> = None;
            loop {
                let place = next.fetch_add(1, Relaxed);
                let Some(cut) = cuts.get(place) else { break };
                let connection = match &mut kept {
                    Some(kept) => kept,
                    None => kept.insert(http.connect(address).await),
                };
                if place % UNCUT_EVERY == 0 {
                    let answer = connection.send(&case.request(None)).await;
                    let view = View::of(&answer, case.skin.voice());
                    assert_eq!((&view.text, &view.usage), (&whole.text, &whole.usage), "{}", answer.text());
                }
                let answer = connection.send(&case.request(Some(*cut))).await;
                assert_is(&case, &wire, *cut, &answer, &whole);
            }
        });
    }
    while let Some(played) = clients.join_next().await {
        let refused = resumes(&proxy).1;
        assert!(played.is_ok(), "{refused} streams were not resumed: {}", told(&proxy));
    }

    // The test is one only if those that could be resumed were. A reset may overtake what was sent before it, and a
    // body that ends well may end within the finish, which then counts.
    let place = |cut: &&Cut| wire.whole(cut.at);
    let is_open = |cut: &&Cut| match cut.end {
        Break::Reset => true,
        Break::Clean => place(cut) == wire.finish,
        Break::Fin | Break::HalfChunk => false,
    };
    let begun: Vec<&Cut> = cuts.iter().filter(|cut| place(cut) > wire.first).collect();
    let sure = begun.iter().copied().filter(|cut| place(cut) <= wire.finish && !is_open(cut)).count();
    let most = begun.iter().copied().filter(|cut| place(cut) <= wire.finish || is_open(cut)).count();
    let (resumed, refused) = resumes(&proxy);
    eprintln!("{:?} {}: {} cuts, {resumed} of {sure}..={most} resumed", case.skin, case.mode, cuts.len());
    assert_eq!(refused, 0, "{case:?}");
    assert!((sure as u64..=most as u64).contains(&resumed), "{resumed} of {sure} to {most}: {case:?}");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_stream_cut_behind_any_byte_is_the_uncut_one_for_its_client() {
    for skin in Skin::ALL {
        play(Case::chat(skin, [1, 0], "best"), 1).await;
        play(Case::chat(skin, [0, 3], "replay"), 1).await;
    }
}
