//! A replica says one token over and over, with status 200, and its clients do not notice (F22).

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Answer, Request, chat_request};
use crate::support::either::{Http, in_order};
use crate::support::eventually;
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};

/// Two canaries, two seconds apart, and the pauses of those that fail.
const RETURN_PATIENCE: Duration = Duration::from_secs(30);

/// What every healthy replica says.
fn good() -> Vec<String> {
    Talk::of(30).tokens
}

/// The same up to its eighth token, and then one token over and over.
fn bad() -> Vec<String> {
    [good()[..8].to_vec(), vec!["!".to_owned(); 60]].concat()
}

fn said(tokens: &[&str]) -> Vec<String> {
    tokens.iter().map(|&token| token.to_owned()).collect()
}

/// A replica that says these tokens to everybody, in chat and in completions, and continues what it is given.
fn replica(tokens: Vec<String>, gap: Duration) -> Script {
    let talk = Talk { tokens, gap, ..Talk::default() };
    Script::new().by_request(move |request| match request.path() {
        "/v1/completions" => complete(request, &talk),
        "/v1/chat/completions" => {
            let asked = request.json();
            let given =
                asked["messages"].as_array().and_then(|list| list.last()).cloned().unwrap_or_default();
            let given = given["content"].as_str().filter(|_| given["role"] == "assistant").unwrap_or("");
            continued(&talk, given).chat(request)
        }
        _ => reply::healthy(request, &talk),
    })
}

/// What is left to say behind `given`.
fn continued(talk: &Talk, given: &str) -> Talk {
    let mut left = given.len();
    let tokens = talk.tokens.iter().skip_while(|token| {
        let skipped = left > 0;
        left = left.saturating_sub(token.len());
        skipped
    });
    Talk { tokens: tokens.cloned().collect(), ..talk.clone() }
}

fn complete(request: &RequestSeen, talk: &Talk) -> Vec<Step> {
    let body = |text: &str, finish: Value| {
        json!({"id": "cmpl-scripted", "object": "text_completion", "created": 1_780_000_000, "model": talk.model,
            "choices": [{"index": 0, "text": text, "finish_reason": finish}]})
    };
    if request.json()["stream"] != true {
        return reply::json(200, &body(&talk.text(), json!("stop")));
    }
    reply::sse(&complete_events(talk, &body))
}

fn complete_events(talk: &Talk, body: &dyn Fn(&str, Value) -> Value) -> Vec<String> {
    let mut events: Vec<String> =
        talk.tokens.iter().map(|token| format!("data: {}\n\n", body(token, Value::Null))).collect();
    events.push(format!("data: {}\n\n", body("", json!("stop"))));
    events.push("data: [DONE]\n\n".to_owned());
    events
}

async fn pool(replicas: &[(Vec<String>, Duration)]) -> Vec<Backend> {
    let mut backends = Vec::new();
    for (tokens, gap) in replicas {
        backends.push(Backend::start(replica(tokens.clone(), *gap)).await);
    }
    backends
}

/// Each of the backends gets its share, one after the other.
fn in_turn(backends: &[Backend]) -> ProxyBuilder {
    backends
        .iter()
        .fold(ProxyBuilder::new(), |builder, backend| builder.backend(&backend.url()))
        .set("pool.balance.strategy", "round_robin")
}

/// The backends, asked strictly in their order.
fn by_tier(backends: &[Backend]) -> Proxy {
    let urls: Vec<String> = backends.iter().map(Backend::url).collect();
    Proxy::start(&in_order(&urls.iter().map(String::as_str).collect::<Vec<_>>()))
}

fn opinions(proxy: &Proxy, result: &str) -> u64 {
    let text = proxy.telemetry.metrics.render();
    let line = format!("evergate_second_opinions_total{{pool=\"default\",result=\"{result}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.trim().parse().unwrap())
}

fn offences(proxy: &Proxy, backend: &Backend) -> u64 {
    proxy.backend(backend.addr()).metrics.offences.get()
}

fn is_quarantined(proxy: &Proxy, backend: &Backend) -> bool {
    proxy.backend(backend.addr()).metrics.quarantined.get() == 1
}

fn was_told(proxy: &Proxy, name: &str) -> bool {
    times_told(proxy, name) > 0
}

fn times_told(proxy: &Proxy, name: &str) -> usize {
    proxy.telemetry.events.latest().iter().filter(|event| event.name == Some(name)).count()
}

fn events_of(tokens: &[String]) -> String {
    Talk { tokens: tokens.to_vec(), ..Talk::default() }.chat_events(true).concat()
}

#[track_caller]
fn assert_says(answer: &Answer, tokens: &[String]) {
    assert_eq!(answer.status, 200);
    assert_eq!(spoken(&answer.text()), tokens.concat());
    assert!(answer.text() == events_of(tokens), "{}", answer.text());
}

/// The text of a stream.
fn spoken(events: &str) -> String {
    let events =
        events.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    events.map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_owned()).collect()
}

fn completion_request(stream: bool) -> Request {
    Request::post_json(
        "/v1/completions",
        &json!({"model": "test-model", "prompt": "Count.", "stream": stream,
        "max_tokens": 200, "temperature": 0}),
    )
}

#[tokio::test]
async fn a_replica_that_degenerates_is_overruled_quarantined_and_returns_by_its_canary() {
    let none = Duration::ZERO;
    let backends = pool(&[(good(), none), (bad(), none), (good(), none)]).await;
    let sick = &backends[1];
    let proxy = Proxy::start(&in_turn(&backends));
    proxy.probed().await;
    for _ in 0..30 {
        assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &good());
    }
    assert!((1..=5).contains(&offences(&proxy, sick)), "{} offences", offences(&proxy, sick));
    assert!(is_quarantined(&proxy, sick));
    assert_eq!(opinions(&proxy, "replaced"), offences(&proxy, sick));
    assert_eq!((offences(&proxy, &backends[0]), offences(&proxy, &backends[2])), (0, 0));
    eventually(RETURN_PATIENCE, || was_told(&proxy, "canary_failed")).await;
    assert!(is_quarantined(&proxy, sick));
    // It says something else than its peers, though not over and over.
    sick.set_script(replica(Talk::of(40).tokens.split_off(10), none));
    let failed = times_told(&proxy, "canary_failed");
    eventually(RETURN_PATIENCE, || times_told(&proxy, "canary_failed") > failed).await;
    assert!(is_quarantined(&proxy, sick));
    sick.set_script(replica(good(), none));
    eventually(RETURN_PATIENCE, || !is_quarantined(&proxy, sick)).await;
    let asked = sick.requests().len();
    for _ in 0..6 {
        assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &good());
    }
    assert!(sick.requests().len() > asked, "it is back in service");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn the_healthy_answer_comes_wherever_the_fault_begins_and_however_it_is_cut_into_events() {
    let pair = vec!["!!".to_owned(); 20];
    let mixed: Vec<String> = (0..20).map(|nth| "!".repeat(nth % 5 + 1)).collect();
    for gap in [Duration::ZERO, Duration::from_millis(5)] {
        for healthy_tokens in [0, 1, 12] {
            for junk in [vec!["!".to_owned(); 60], pair.clone(), mixed.clone()] {
                let sick = [good()[..healthy_tokens].to_vec(), junk].concat();
                let backends = pool(&[(sick, gap), (good(), gap)]).await;
                let proxy = by_tier(&backends);
                assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &good());
                assert_eq!((opinions(&proxy, "replaced"), offences(&proxy, &backends[0])), (1, 1));
                proxy.is_quiet().await;
            }
        }
    }
}

#[tokio::test]
async fn an_engine_that_continues_is_asked_to_continue_from_before_the_run() {
    let backends = pool(&[(bad(), Duration::ZERO), (good(), Duration::ZERO)]).await;
    let urls: Vec<String> = backends.iter().map(Backend::url).collect();
    let builder =
        in_order(&[&urls[0], &urls[1]]).set("pool.probe.kind", "http").set("pool.probe.preset", "vllm");
    let proxy = Proxy::start(&builder);
    proxy.probed().await;
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await.text();
    assert_eq!(spoken(&answer), good().concat());
    // The peer counts only what it said itself: better no usage than a wrong one.
    assert!(answer.ends_with("data: [DONE]\n\n") && !answer.contains("\"usage\""), "{answer}");
    let asked = backends[1].requests().iter().map(RequestSeen::json).find(|asked| asked["stream"] == true);
    let last = asked.unwrap()["messages"].as_array().unwrap().last().cloned().unwrap();
    assert_eq!(last, json!({"role": "assistant", "content": good()[..8].concat()}));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn legitimate_runs_pass_unchanged_and_nobody_is_scored() {
    let words = said(&["A", " title", "\n"]);
    let ruler = |token: &str, times| vec![token.to_owned(); times];
    let table = said(&[
        "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|",
    ]);
    // What is said, and whether a peer has to be asked about it.
    for (tokens, asked) in [
        ([words.clone(), table, said(&["\n", "end"])].concat(), 0),
        ([words.clone(), ruler("|---", 12), said(&["|", "\n", "end"])].concat(), 1),
        ([words.clone(), ruler("-", 40), said(&["\n", "end"])].concat(), 1),
        ([words.clone(), ruler("-", 7), said(&["\n", "end"])].concat(), 0),
        ([ruler("!", 10), words.clone()].concat(), 1),
        ([words.clone(), ruler("!", 10)].concat(), 1),
        (ruler("!", 10), 1),
        ([words.clone(), ruler(" ha", 12), words.clone(), ruler("----", 9)].concat(), 2),
        ([words.clone(), ruler("--------", 1), words.clone()].concat(), 0),
    ] {
        for gap in [Duration::ZERO, Duration::from_millis(4)] {
            let backends = pool(&[(tokens.clone(), gap), (tokens.clone(), gap), (tokens.clone(), gap)]).await;
            let proxy = Proxy::start(&in_turn(&backends));
            proxy.probed().await;
            for _ in 0..3 {
                let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
                assert_says(&answer, &tokens);
                // Its own gaps, the peer's share of the answer, and a busy machine.
                assert!(answer.longest_gap() < Duration::from_millis(400), "{:?}", answer.longest_gap());
            }
            assert!(backends.iter().all(|backend| offences(&proxy, backend) == 0), "{tokens:?}");
            assert_eq!(opinions(&proxy, "replaced") + opinions(&proxy, "disputed"), 0);
            let heard = opinions(&proxy, "repeated") + opinions(&proxy, "none");
            assert_eq!(heard, 3 * asked, "{tokens:?} with {gap:?} between them");
            proxy.is_quiet().await;
        }
    }
}

#[tokio::test]
async fn when_all_say_the_same_it_passes_and_nobody_is_quarantined() {
    let backends = pool(&[(bad(), Duration::ZERO), (bad(), Duration::ZERO), (bad(), Duration::ZERO)]).await;
    let proxy = Proxy::start(&in_turn(&backends));
    proxy.probed().await;
    for _ in 0..9 {
        assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &bad());
    }
    assert!(
        backends.iter().all(|backend| offences(&proxy, backend) == 0 && !is_quarantined(&proxy, backend))
    );
    assert_eq!(opinions(&proxy, "repeated"), 9);
}

#[tokio::test]
async fn who_cannot_be_asked_about_costs_nobody_an_answer() {
    let dead = Backend::refusing().await;
    let busy = Backend::start(Script::new().answer(reply::busy(1))).await;
    let silent = Backend::start(Script::new().answer(vec![Step::Stall])).await;
    let other = Talk { tokens: vec!["?".to_owned(); 40], ..Talk::default() };
    let degenerate_otherwise = Backend::start(Script::new().talk(other)).await;
    let later = [good()[..8].to_vec(), vec!["?".to_owned(); 60]].concat();
    let and_later = Backend::start(replica(later, Duration::from_millis(3))).await;
    let otherwise = [Some(&degenerate_otherwise), Some(&and_later)];
    for peer in [None, Some(&dead), Some(&busy), Some(&silent)].into_iter().chain(otherwise) {
        let sick = Backend::start(replica(bad(), Duration::ZERO)).await;
        let urls: Vec<String> = [&sick].into_iter().chain(peer).map(Backend::url).collect();
        let proxy = Proxy::start(&in_order(&urls.iter().map(String::as_str).collect::<Vec<_>>()));
        let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
        assert_says(&answer, &bad());
        assert!(answer.longest_gap() < Duration::from_millis(600), "{:?}", answer.longest_gap());
        assert_eq!((offences(&proxy, &sick), opinions(&proxy, "replaced")), (0, 0));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_peer_that_is_too_late_for_the_client_is_heard_for_the_record() {
    let gap = Duration::from_millis(10);
    let late = [
        vec![reply::sse_head(), Step::Delay(Duration::from_millis(400))],
        reply::sse(&Talk::of(30).chat_events(true))[1..].to_vec(),
    ]
    .concat();
    let sick = Backend::start(replica(bad(), gap)).await;
    let peer = Backend::start(Script::new().answer(late)).await;
    let proxy = Proxy::start(&in_order(&[&sick.url(), &peer.url()]));
    assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &bad());
    assert_eq!((opinions(&proxy, "disputed"), offences(&proxy, &sick)), (1, 1));
    // From now on it is waited for longer.
    assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &good());
    assert_eq!((opinions(&proxy, "replaced"), offences(&proxy, &sick)), (1, 2));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn what_may_begin_a_run_waits_for_a_quarter_of_a_second_only() {
    let gap = Duration::from_millis(1500);
    let tokens = said(&["Yes", "!", " Well"]);
    let backends = pool(&[(tokens.clone(), gap), (tokens.clone(), gap)]).await;
    let proxy = by_tier(&backends);
    let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
    assert_says(&answer, &tokens);
    // Held until the token behind it came, it would leave its client without a word for two gaps.
    assert!(answer.longest_gap() < gap * 3 / 2, "{:?}", answer.longest_gap());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn whole_answers_are_asked_again_before_they_are_shown() {
    let backends = pool(&[(bad(), Duration::ZERO), (good(), Duration::ZERO), (good(), Duration::ZERO)]).await;
    let proxy = Proxy::start(&in_turn(&backends));
    proxy.probed().await;
    for nth in 0..24 {
        let answer = match nth % 2 {
            0 => Http::One.send(proxy.addr, &chat_request(false)).await.json()["choices"][0]["message"]["content"].clone(),
            _ => Http::One.send(proxy.addr, &completion_request(false)).await.json()["choices"][0]["text"].clone(),
        };
        assert_eq!(answer, json!(good().concat()));
    }
    assert!((1..=5).contains(&offences(&proxy, &backends[0])));
    assert!(is_quarantined(&proxy, &backends[0]));
    proxy.is_quiet().await;
    // Asked for, or of all of them alike: it is shown as it came.
    let asked_for = said(&["Sure", ":", " ", "!!!!!!!!!!!!"]);
    let alike = pool(&[(asked_for.clone(), Duration::ZERO), (asked_for.clone(), Duration::ZERO)]).await;
    let proxy = Proxy::start(&in_turn(&alike));
    proxy.probed().await;
    let answer = Http::One.send(proxy.addr, &chat_request(false)).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], asked_for.concat());
    assert_eq!((opinions(&proxy, "repeated"), opinions(&proxy, "replaced")), (1, 0));
    assert!(alike.iter().all(|backend| offences(&proxy, backend) == 0));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn who_was_overruled_is_no_witness() {
    let otherwise_bad = [good()[..8].to_vec(), vec!["?".to_owned(); 60]].concat();
    let replicas = [bad(), otherwise_bad, good()];
    let backends = pool(&replicas.map(|tokens| (tokens, Duration::ZERO))).await;
    let proxy = by_tier(&backends);
    proxy.probed().await;
    // The second serves where the first fails, and is overruled by the third.
    backends[0].set_script(Script::new().by_request(|_| reply::json(500, &json!({}))));
    for (offences_of, asked) in [([0, 1, 0], [1, 1, 1]), ([1, 1, 0], [2, 1, 2])] {
        let answer = Http::One.send(proxy.addr, &chat_request(false)).await;
        assert_eq!(answer.json()["choices"][0]["message"]["content"], json!(good().concat()));
        assert_eq!([0, 1, 2].map(|nth| offences(&proxy, &backends[nth])), offences_of);
        assert_eq!([0, 1, 2].map(|nth: usize| backends[nth].requests().len()), asked);
        backends[0].set_script(replica(bad(), Duration::ZERO));
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn completions_are_watched_as_chats_are() {
    let backends = pool(&[(bad(), Duration::ZERO), (good(), Duration::ZERO)]).await;
    let proxy = by_tier(&backends);
    let sent = Http::One.send(backends[1].addr(), &completion_request(true)).await;
    for http in Http::BOTH {
        let answer = http.send(proxy.addr, &completion_request(true)).await;
        assert_eq!(answer.text(), sent.text());
    }
    assert_eq!(opinions(&proxy, "replaced"), 2);
    proxy.is_quiet().await;
}

#[tokio::test]
async fn switched_off_it_is_relayed_as_it_comes() {
    for (key, value) in
        [("pool.resume.second_opinion", Value::Bool(false)), ("pool.resume.mode", json!("off"))]
    {
        let backends = pool(&[(bad(), Duration::ZERO), (good(), Duration::ZERO)]).await;
        let urls: Vec<String> = backends.iter().map(Backend::url).collect();
        let value: toml::Value = toml::Value::try_from(value).unwrap();
        let proxy = Proxy::start(&in_order(&[&urls[0], &urls[1]]).set(key, value));
        assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &bad());
        let answer = Http::One.send(proxy.addr, &chat_request(false)).await;
        assert_eq!(answer.json()["choices"][0]["message"]["content"], bad().concat());
        assert_eq!((backends[1].requests().len(), offences(&proxy, &backends[0])), (0, 0));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_word_said_over_and_over_costs_only_the_first_client_its_answer() {
    let sick = [good()[..8].to_vec(), vec![" the".to_owned(); 60]].concat();
    let backends = pool(&[(sick.clone(), Duration::ZERO), (good(), Duration::ZERO)]).await;
    let proxy = by_tier(&backends);
    // Its first word was not held back, and cannot be taken back.
    assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &sick);
    assert_eq!((opinions(&proxy, "disputed"), offences(&proxy, &backends[0])), (1, 1));
    for _ in 0..3 {
        assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &good());
    }
    assert!(is_quarantined(&proxy, &backends[0]));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_peer_that_answers_otherwise_from_the_beginning_proves_nothing() {
    let words = [good()[..8].to_vec(), vec![" the".to_owned(); 60]].concat();
    let other = Talk::of(40).tokens.split_off(10);
    let backends = pool(&[(words.clone(), Duration::ZERO), (other, Duration::ZERO)]).await;
    let proxy = by_tier(&backends);
    assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &words);
    assert_eq!((opinions(&proxy, "none"), offences(&proxy, &backends[0])), (1, 0));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_peer_that_went_along_for_a_while_is_believed_and_proves_nothing() {
    let begun = said(&["A", " ruler", ":", " "]);
    let long = [begun.clone(), vec!["-".to_owned(); 40]].concat();
    let short =
        [begun, vec!["-".to_owned(); 6], said(&[" and", " then", " some", " more", " words"])].concat();
    let backends = pool(&[(long, Duration::ZERO), (short.clone(), Duration::ZERO)]).await;
    let proxy = by_tier(&backends);
    assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &short);
    assert_eq!((opinions(&proxy, "replaced"), offences(&proxy, &backends[0])), (1, 0));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn nobody_is_asked_without_a_budget() {
    let backends = pool(&[(bad(), Duration::ZERO), (good(), Duration::ZERO)]).await;
    let urls: Vec<String> = backends.iter().map(Backend::url).collect();
    let builder = in_order(&[&urls[0], &urls[1]])
        .set("pool.retry.budget_ratio", 0.0)
        .set("pool.retry.budget_floor", 0.0);
    let proxy = Proxy::start(&builder);
    assert_says(&Http::One.send(proxy.addr, &chat_request(true)).await, &bad());
    let answer = Http::One.send(proxy.addr, &chat_request(false)).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], bad().concat());
    assert_eq!((opinions(&proxy, "none"), backends[1].requests().len()), (2, 0));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn held_events_arrive_byte_for_byte_however_they_were_cut() {
    let tokens =
        [said(&["Look", ":", "."]), vec!["-".to_owned(); 12], said(&["|", " so", "!", "!"])].concat();
    let events = Talk { tokens, ..Talk::default() }.chat_events(true);
    let wire: String = events.iter().map(|event| format!(": beat\r\n\r\n{event}")).collect();
    for size in [1, 7, 61, 250, 1000, wire.len()] {
        let pieces: Vec<&[u8]> = wire.as_bytes().chunks(size).collect();
        let one = Backend::start(Script::new().sse(&pieces)).await;
        let two = Backend::start(Script::new().sse(&events)).await;
        let proxy = Proxy::start(&in_order(&[&one.url(), &two.url()]));
        let answer = Http::One.send(proxy.addr, &chat_request(true)).await;
        assert_eq!(answer.text(), wire, "in pieces of {size}");
        assert_eq!((opinions(&proxy, "repeated"), offences(&proxy, &one)), (1, 0));
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn a_crowd_at_a_degenerate_replica_is_answered_by_its_peers() {
    let backends = pool(&[(good(), Duration::ZERO), (bad(), Duration::ZERO), (good(), Duration::ZERO)]).await;
    let proxy = Proxy::start(&in_turn(&backends));
    proxy.probed().await;
    let clients: Vec<_> = (0..24)
        .map(|_| {
            let address = proxy.addr;
            tokio::spawn(async move { Http::One.send(address, &chat_request(true)).await })
        })
        .collect();
    for client in clients {
        assert_says(&client.await.unwrap(), &good());
    }
    assert!(is_quarantined(&proxy, &backends[1]));
    assert_eq!((offences(&proxy, &backends[0]), offences(&proxy, &backends[2])), (0, 0));
    proxy.is_quiet().await;
}
