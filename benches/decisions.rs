//! What single decisions of the hot path cost, for `benches/instructions.py`, which counts their instructions.
//!
//!     decisions CASE TIMES
//!
//! does one case so many times and prints nothing. Twice with different TIMES under valgrind, and the difference
//! is exact. No clock is read: a number of nanoseconds would say more about the machine than about a change.

use std::hint::black_box;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use evergate::policy::balance::{BalancePolicy, Candidates, Request, pick};
use evergate::policy::dialect::{Endpoint, EventFacts, EventReader, check_answer, request_facts};
use evergate::policy::resume::{ResumePolicy, Splice};
use evergate::policy::retry::{Cause, Facts, Phase, verdict};
use evergate::policy::route::{Head, PoolModels, Route, Table};
use evergate::sse::Decoder;
use http::{HeaderMap, StatusCode};

const CHAT: Endpoint = Endpoint::ChatCompletions;
const EVENT: &str = "data: {\"id\":\"chatcmpl-7f3a\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"m\",\
    \"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
const ANSWER: &str = "{\"id\":\"chatcmpl-7f3a\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"m\",\"choices\":[{\"index\":0,\
    \"message\":{\"role\":\"assistant\",\"content\":\"An answer in one piece.\"},\"finish_reason\":\"stop\"}],\
    \"usage\":{\"prompt_tokens\":10,\"completion_tokens\":6,\"total_tokens\":16}}";
/// Events of one stream in the case `journal`.
const STREAM_EVENTS: usize = 500;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (case, times) = (arguments.next().unwrap_or_default(), arguments.next());
    // `cargo bench` and `cargo test` pass flags of their own and no number: there is nothing to do then.
    let Some(times) = times.and_then(|times| times.parse().ok()) else { return };
    match case.as_str() {
        "pick" => pick_one_of_twenty(times),
        "classify" => classify(times),
        "route" => route(times),
        "request" => repeat(times, || request_facts(CHAT, black_box(request().as_bytes())).is_ok()),
        "answer" => {
            repeat(times, || check_answer(CHAT, StatusCode::OK, black_box(ANSWER.as_bytes())).is_ok())
        }
        "decode" => decode(times),
        "journal" => journal(times),
        unknown => panic!("no case {unknown}"),
    }
}

/// `case` must hold: a bench of a failing path would measure something else.
fn repeat(times: usize, mut case: impl FnMut() -> bool) {
    for _ in 0..times {
        assert!(case());
    }
}

/// A prompt of 1 KiB; made once.
fn request() -> &'static str {
    static REQUEST: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    REQUEST.get_or_init(|| {
        let prompt = "Say something of some length. ".repeat(30);
        format!(
            "{{\"model\":\"m\",\"messages\":[{{\"role\":\"user\",\"content\":\"{prompt}\"}}],\"stream\":true,\"max_tokens\":64}}"
        )
    })
}

/// Twenty backends with some load each.
struct Fleet;

impl Candidates for Fleet {
    fn len(&self) -> usize {
        20
    }
    fn tier(&self, _i: usize) -> u8 {
        0
    }
    fn admissible(&self, i: usize) -> bool {
        i != 7
    }
    fn load(&self, i: usize) -> f64 {
        (i % 5) as f64
    }
    fn weight(&self, _i: usize) -> f64 {
        1.0
    }
    fn first_token(&self, i: usize) -> Option<f64> {
        Some(0.1 + i as f64 / 1000.0)
    }
    fn identity(&self, i: usize) -> u64 {
        i as u64
    }
}

fn pick_one_of_twenty(times: usize) {
    let (policy, cursor) = (BalancePolicy::PowerOfTwo, AtomicUsize::new(0));
    let mut rng = fastrand::Rng::with_seed(7);
    repeat(times, || pick(&policy, black_box(&Fleet), &Request::default(), &cursor, &mut rng).is_some());
}

fn classify(times: usize) {
    let facts = [Cause::Answered, Cause::Status(503), Cause::Closed, Cause::FirstTokenTimeout]
        .map(|cause| Facts { sent: true, took: Duration::from_millis(20), ..Facts::new(Phase::Head, cause) });
    repeat(times, || black_box(&facts).iter().any(|facts| verdict(facts).name() != ""));
}

fn route(times: usize) {
    let names = (0..100).map(|i| format!("model-{i}"));
    let pools: Vec<_> =
        names.map(|name| PoolModels { models: vec![name.clone()], name, aliases: Vec::new() }).collect();
    let rule = Route { path_prefix: Some("/v2".into()), pool: "model-1".into(), ..Route::default() };
    let table = Table::new(&[rule], &pools);
    let headers = HeaderMap::new();
    let head = Head { path: "/v1/chat/completions", host: Some("api.example"), headers: &headers };
    repeat(times, || table.route(black_box(&head), Some("model-77"), &|_, _| false).is_ok());
}

fn decode(times: usize) {
    let (mut decoder, mut reader) = (Decoder::new(1 << 20), EventReader::new(CHAT));
    repeat(times, || {
        let mut read = false;
        let fed = decoder.feed(black_box(EVENT.as_bytes()), |event| {
            read = reader.read(&event).is_ok();
            std::ops::ControlFlow::Continue(())
        });
        fed.is_ok() && read
    });
}

fn journal(times: usize) {
    let (mut facts, mut reader) = (EventFacts::default(), EventReader::new(CHAT));
    let read = Decoder::new(1 << 20).feed(EVENT.as_bytes(), |event| {
        facts = reader.read(&event).expect("it is valid");
        std::ops::ControlFlow::Continue(())
    });
    assert!(read.is_ok());
    let data = EVENT.trim_start_matches("data: ").trim_end().as_bytes();
    for _ in 0..times.div_ceil(STREAM_EVENTS) {
        let armed = Splice::arm(CHAT, request().as_bytes(), &ResumePolicy::default());
        let mut splice = armed.expect("a chat stream of one choice is armed");
        (0..STREAM_EVENTS).for_each(|_| splice.observe(black_box(data), &facts));
        assert!(splice.held() > STREAM_EVENTS);
    }
}
