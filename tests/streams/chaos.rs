//! Three simulated replicas that fall sick all the time, clients that never rest, and a judge of every stream.
//!
//! Each second one more replica dies, freezes, cuts, resets, stalls, talks garbage, reports an error or aborts, and is
//! well again a moment later; one is always left in peace. Each answer is compared with the one the model gives. What
//! is wrong, doubled, cut without a word or hanging is a violation, and there may be none; a stream that ends with an
//! error event is allowed for one in a hundred, and is one that evergate has counted as such.
//!
//! `cargo test --test streams -- --ignored chaos --nocapture` plays `EVERGATE_STREAMS` (default 20,000) streams.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use evergate::sim::{Fault, Model, Replica, ReplicaConfig, Skin};
use evergate::telemetry::metrics::End;
use serde_json::json;
use tokio::task::JoinSet;

use crate::every_byte::{resumes, told};
use crate::support::client::{Client, H2Client, Request};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::within;
use crate::view::{Fate, View, Voice};

const MODEL: &str = "m";
/// Longer than any clock of the pools here: what takes longer hangs.
const HANGS: Duration = Duration::from_secs(40);
/// A sick replica is well again after 300 ms to 1.5 s.
const SICK: std::ops::Range<u64> = 300..1500;

/// How much of it.
#[derive(Clone, Copy, Debug)]
struct Scale {
    streams: usize,
    clients: usize,
    /// Tokens a second of one stream, and how many.
    pace: f64,
    tokens: usize,
    /// Between two troubles.
    every: Duration,
}

/// What came of all streams of one pool.
#[derive(Debug, Default)]
struct Tally {
    whole: usize,
    /// Ended by an error event.
    errors: BTreeMap<String, usize>,
    /// Answered by an error status.
    refused: BTreeMap<String, usize>,
    violations: Vec<String>,
    troubles: BTreeMap<&'static str, usize>,
}

/// One request and what is the right answer to it.
struct Question {
    request: Request,
    text: String,
    finish: &'static str,
}

impl Question {
    /// Questions of five kinds, no two of them the same.
    fn new(number: usize, config: &ReplicaConfig) -> Self {
        let mut body = json!({"model": MODEL, "stream": true, "stream_options": {"include_usage": true}});
        if number % 5 == 3 {
            let prompt = format!("Story number {number}: once upon a time");
            body["prompt"] = prompt.clone().into();
            body["max_tokens"] = 40.into();
            body["stream_options"]["continuous_usage_stats"] = true.into();
            let text = Model::new(MODEL, config.weights, None).continuation(&prompt).take(40).collect();
            return Self { request: Request::post_json("/v1/completions", &body), text, finish: "length" };
        }
        body["messages"] = json!([{"role": "user", "content": format!("Question number {number}?")}]);
        let mut finish = "stop";
        match number % 5 {
            1 => {
                body["max_tokens"] = 24.into();
                body["stream_options"]["continuous_usage_stats"] = true.into();
                finish = "length";
            }
            2 => body["stop"] = json!(["."]),
            _ => {}
        }
        let text = config.answer_to_chat(&body).unwrap();
        Self { request: Request::post_json("/v1/chat/completions", &body), text, finish }
    }
}

/// A connection that is kept as long as it lives.
enum Kept {
    None,
    One(Box<Client>),
    Two(H2Client),
}

impl Kept {
    async fn ask(&mut self, address: SocketAddr, h2: bool, request: &Request) -> Result<Answer, String> {
        if let Self::None = self {
            *self = match h2 {
                true => Self::Two(H2Client::connect(address).await),
                false => Self::One(Box::new(Client::connect(address).await)),
            };
        }
        match self {
            Self::None => unreachable!("just connected"),
            Self::Two(client) => client.try_send(request).await.map_err(|end| format!("{end:?}")),
            Self::One(client) => {
                client.write(&request.to_bytes()).await.map_err(|error| error.to_string())?;
                client.try_read_answer("POST").await.map_err(|error| error.to_string())
            }
        }
    }
}

type Answer = crate::support::client::Answer;

/// Asks one question after the other until all were asked.
async fn client(
    address: SocketAddr,
    h2: bool,
    next: Arc<AtomicUsize>,
    streams: std::ops::Range<usize>,
    config: ReplicaConfig,
) -> Tally {
    let voice =
        Voice { created_is_constant: matches!(config.skin, Skin::Vllm | Skin::Generic), role_in_each: false };
    let (mut tally, mut kept) = (Tally::default(), Kept::None);
    loop {
        let number = streams.start + next.fetch_add(1, Relaxed);
        if number >= streams.end {
            return tally;
        }
        let question = Question::new(number, &config);
        let asked = tokio::time::timeout(HANGS, kept.ask(address, h2, &question.request)).await;
        let answer = match asked {
            Ok(Ok(answer)) => answer,
            Ok(Err(why)) => {
                tally.violations.push(format!("{number}: the connection broke: {why}"));
                kept = Kept::None;
                continue;
            }
            Err(_elapsed) => {
                tally.violations.push(format!("{number}: it hangs"));
                kept = Kept::None;
                continue;
            }
        };
        if answer.status != 200 {
            let code = answer.json()["error"]["code"].to_string();
            *tally.refused.entry(format!("{} {code}", answer.status)).or_default() += 1;
            continue;
        }
        judge(&mut tally, number, &answer, voice, &question);
    }
}

fn judge(tally: &mut Tally, number: usize, answer: &Answer, voice: Voice, question: &Question) {
    let mut view = View::of(answer, voice);
    let fate = view.fate();
    let is_right = match fate {
        Some(Fate::Whole) => {
            let counted = view.usage.as_ref().is_none_or(|usage| {
                usage["prompt_tokens"]
                    .as_u64()
                    .zip(usage["completion_tokens"].as_u64())
                    .is_some_and(|(p, c)| usage["total_tokens"].as_u64() == Some(p + c) && c > 0 && c < 200)
            });
            if !counted {
                view.wrong.push(format!("usage {:?}", view.usage));
            }
            view.text == question.text && view.finishes == [question.finish]
        }
        _ => question.text.starts_with(&view.text),
    };
    if !is_right {
        view.wrong.push(format!("{:?} {:?} instead of {:?}", view.text, view.finishes, question.text));
    }
    if !view.wrong.is_empty() {
        return tally.violations.push(format!("{number}: {:?}", view.wrong));
    }
    match fate {
        Some(Fate::Whole) => tally.whole += 1,
        _ => *tally.errors.entry(view.errors[0]["message"].to_string()).or_default() += 1,
    }
}

/// Makes one replica after the other sick until told to stop; says how often in which way.
async fn trouble(
    replicas: Arc<Vec<Replica>>,
    every: Duration,
    seed: u64,
    over: Arc<AtomicBool>,
) -> BTreeMap<&'static str, usize> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut troubles = BTreeMap::new();
    let mut sick: Vec<(usize, Instant)> = Vec::new();
    let mut due = Instant::now();
    while !over.load(Relaxed) {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = Instant::now();
        for (which, _) in sick.extract_if(.., |(_, until)| *until <= now) {
            replicas[which].set_fault(Fault::None);
            replicas[which].thaw();
            replicas[which].revive().await.unwrap();
        }
        // The last one is left in peace.
        if now < due || sick.len() + 1 >= replicas.len() {
            continue;
        }
        due = now + every;
        let well: Vec<usize> =
            (0..replicas.len()).filter(|which| sick.iter().all(|(known, _)| known != which)).collect();
        let which = well[rng.usize(..well.len())];
        let replica = &replicas[which];
        let tokens = rng.usize(..20);
        let kind = match rng.u8(..9) {
            0 => {
                replica.kill().await;
                "kill"
            }
            1 => {
                replica.freeze();
                "freeze"
            }
            kind => {
                let (fault, name) = match kind {
                    2 => (Fault::CutAfterTokens(tokens), "cut"),
                    3 => (Fault::ResetAfterTokens(tokens), "reset"),
                    4 => (Fault::StallAfterTokens(tokens), "stall"),
                    5 => (Fault::GarbageAfterTokens(tokens), "garbage"),
                    6 => (Fault::ErrorEventAfterTokens(tokens), "error event"),
                    7 => (Fault::AbortFinishAfterTokens(tokens), "abort"),
                    _ => (Fault::CleanEndWithoutFinish(tokens), "clean end"),
                };
                replica.set_fault(fault);
                name
            }
        };
        *troubles.entry(kind).or_default() += 1;
        sick.push((which, now + Duration::from_millis(rng.u64(SICK))));
    }
    for replica in replicas.iter() {
        replica.set_fault(Fault::None);
        replica.thaw();
        replica.revive().await.unwrap();
    }
    troubles
}

fn pool(skin: Skin, replicas: &[Replica]) -> ProxyBuilder {
    let mut builder = ProxyBuilder::new();
    for replica in replicas {
        builder = builder.backend(&replica.url());
    }
    match skin {
        Skin::Vllm => builder.set("pool.probe.preset", "vllm"),
        Skin::Sglang => builder.set("pool.probe.preset", "sglang"),
        Skin::LlamaCpp => builder.set("pool.probe.preset", "llamacpp"),
        Skin::Generic => builder,
    }
    // A stream that stalls alone on a replica that is well otherwise is borne up to here.
    .set("pool.clocks.inter_token", "1s")
    .set("pool.clocks.silence_max", "3s")
    // Budgets are against storms, and this is one: at each moment a third of the pool is being lost.
    .set("pool.retry.budget_ratio", 1.0)
}

/// Plays one pool and compares what its clients saw with what evergate counted.
async fn play(skin: Skin, scale: Scale, seed: u64) -> Tally {
    let config = ReplicaConfig {
        model: MODEL.to_owned(),
        skin,
        tokens_per_second: scale.pace,
        first_token: Duration::from_millis(20),
        tokens: scale.tokens,
        ..ReplicaConfig::default()
    };
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(Replica::start(config.clone()).await.unwrap());
    }
    let proxy = Proxy::start(&pool(skin, &replicas));
    proxy.probed().await;
    let (replicas, over) = (Arc::new(replicas), Arc::new(AtomicBool::new(false)));
    let (began, next) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    let trouble = tokio::spawn(trouble(Arc::clone(&replicas), scale.every, seed, Arc::clone(&over)));
    let mut clients = JoinSet::new();
    for number in 0..scale.clients {
        let streams = 0..scale.streams;
        clients.spawn(client(proxy.addr, number % 4 == 3, Arc::clone(&next), streams, config.clone()));
    }
    let mut all = Tally::default();
    while let Some(tally) = clients.join_next().await {
        let tally = tally.unwrap();
        all.whole += tally.whole;
        all.violations.extend(tally.violations);
        tally.errors.into_iter().for_each(|(why, count)| *all.errors.entry(why).or_default() += count);
        tally.refused.into_iter().for_each(|(why, count)| *all.refused.entry(why).or_default() += count);
    }
    over.store(true, Relaxed);
    all.troubles = within(HANGS, trouble).await.unwrap();
    proxy.is_quiet().await;

    let exchanges = &proxy.telemetry.metrics.exchanges;
    let (resumed, refused) = resumes(&proxy);
    let (errors, seconds) = (all.errors.values().sum::<usize>(), began.elapsed().as_secs_f64());
    println!(
        "{skin:?}: {} streams in {seconds:.0} s, {} whole, {resumed} resumed, {} violations\n  troubles {:?}\n  \
         ended by an error event {:?}\n  refused {:?}\n  {}",
        scale.streams,
        all.whole,
        all.violations.len(),
        all.troubles,
        all.errors,
        all.refused,
        told(&proxy).replace('\n', "\n  "),
    );
    all.violations.iter().take(5).for_each(|violation| println!("  VIOLATION {violation}"));
    if all.violations.is_empty() {
        assert_eq!(all.whole as u64, exchanges.finished(End::Complete), "streams that were whole");
        let others: usize = all.refused.values().sum();
        assert_eq!((errors + others) as u64, exchanges.finished(End::Error), "those that were not");
        assert_eq!(errors as u64, refused, "each has its reason");
    }
    all
}

fn assert_is_well(tallies: &[Tally], streams: usize) {
    let violations: Vec<&String> = tallies.iter().flat_map(|tally| &tally.violations).collect();
    assert!(violations.is_empty(), "{} violations, the first: {:?}", violations.len(), violations[0]);
    let whole: usize = tallies.iter().map(|tally| tally.whole).sum();
    println!("{whole} of {streams} whole: {:.2} %", whole as f64 * 100.0 / streams as f64);
    assert!(whole * 100 >= streams * 99, "{whole} of {streams} streams were whole");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_little_chaos_is_not_noticed() {
    let every = Duration::from_secs(1);
    let scale = Scale { streams: 300, clients: 40, pace: 30.0, tokens: 30, every };
    let tally = play(Skin::Vllm, scale, 7).await;
    assert_is_well(&[tally], scale.streams);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: .ci/soak streams"]
async fn chaos() {
    let setting = std::env::var("EVERGATE_STREAMS").ok();
    let streams = setting.map_or(20_000, |count| count.parse::<usize>().unwrap());
    let every = Duration::from_secs(1);
    let scale = Scale { streams: streams / 4, clients: 160, pace: 60.0, tokens: 48, every };
    let mut tallies = Vec::new();
    for (skin, seed) in [Skin::Vllm, Skin::Sglang, Skin::LlamaCpp, Skin::Generic].into_iter().zip(1..) {
        tallies.push(play(skin, scale, seed).await);
    }
    assert_is_well(&tallies, scale.streams * 4);
}
