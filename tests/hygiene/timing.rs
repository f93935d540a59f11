//! When bytes leave: each event as it comes, never gathered.
//!
//! A machine that does other things as well delays anything now and then; a proxy that gathers does so every
//! time. So each of these has a few tries.

use std::time::Duration;

use crate::support::backend::{Backend, Script};
use crate::support::client::{
    Answer, Client, H2Client, Request, assert_is_healthy_stream, chat_request, send,
};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Step};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};

const GAP: Duration = Duration::from_millis(40);
const TOLERANCE: Duration = Duration::from_millis(20);
const TRIES: usize = 6;

/// Panics with the latest complaint when every try had one.
async fn at_least_once(mut attempt: impl AsyncFnMut() -> Result<(), String>) {
    let mut complaint = String::new();
    for _ in 0..TRIES {
        match attempt().await {
            Ok(()) => return,
            Err(said) => complaint = said,
        }
    }
    panic!("{complaint}");
}

fn median_gap(answer: &Answer) -> Duration {
    let mut gaps: Vec<Duration> = answer.arrivals.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    gaps.sort_unstable();
    gaps[gaps.len() / 2]
}

fn keeps_its_pace(answer: &Answer, events: usize) -> Result<(), String> {
    let pieces = answer.arrivals.len();
    if pieces < events {
        return Err(format!("{events} events came in {pieces} pieces"));
    }
    let gap = median_gap(answer);
    let kept = gap > GAP - TOLERANCE && gap < GAP + TOLERANCE;
    if kept { Ok(()) } else { Err(format!("{gap:?} between two events")) }
}

#[tokio::test]
async fn tokens_keep_their_distance() {
    let talk = Talk::of(12).gap(GAP);
    let h1 = Backend::start(Script::new().talk(talk.clone())).await;
    let h2 = H2Backend::start(move |request| match request.path() {
        "/health" => H2Answer::new(200),
        _ => {
            let head = H2Answer::new(200).header("content-type", "text/event-stream");
            let events = talk.chat_events(true).into_iter();
            events.fold(head, |answer, event| answer.step(H2Step::Delay(GAP)).data(event))
        }
    })
    .await;
    let old = Proxy::start(&ProxyBuilder::new().backend(&h1.url()));
    let new = Proxy::start(&ProxyBuilder::new().backend(&h2.url()).set("pool.http", "2"));
    let (over_h1, over_h2) = (H2Client::connect(old.addr).await, H2Client::connect(new.addr).await);
    let request = chat_request(true);
    at_least_once(async || {
        let answers = tokio::join!(
            send(old.addr, &request),
            over_h1.send(&request),
            send(new.addr, &request),
            over_h2.send(&request),
        );
        for answer in [answers.0, answers.1, answers.2, answers.3] {
            assert_is_healthy_stream(&answer);
            // The role waits for the first token: it says nothing.
            keeps_its_pace(&answer, 14)?;
            if answer.first_byte > GAP * 2 + TOLERANCE * 2 {
                return Err(format!("the first token after {:?}", answer.first_byte));
            }
        }
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_stream_of_anything_else_is_not_gathered_either() {
    let head = [("content-type", "text/plain"), ("transfer-encoding", "chunked")];
    let mut steps = vec![Step::Send(reply::head(200, &head))];
    for nth in 0..10 {
        steps.extend([Step::Delay(GAP), reply::chunk(format!("{nth}"))]);
    }
    steps.push(reply::last_chunk());
    let backend = Backend::start(Script::new().answer(steps)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    at_least_once(async || {
        let answer = send(proxy.addr, &Request::get("/v1/files")).await;
        assert_eq!(answer.text(), "0123456789");
        keeps_its_pace(&answer, 10)
    })
    .await;
}

#[tokio::test]
async fn an_event_in_pieces_waits_for_its_last_piece_only() {
    let talk = Talk::of(4);
    let mut steps = vec![reply::sse_head()];
    for event in talk.chat_events(false) {
        let (begin, end) = event.split_at(event.len() / 2);
        steps.extend([reply::chunk(begin), Step::Delay(GAP), reply::chunk(end)]);
    }
    steps.push(reply::last_chunk());
    let backend = Backend::start(Script::new().answer(steps)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    at_least_once(async || {
        let answer = send(proxy.addr, &chat_request(true)).await;
        assert_is_healthy_stream(&answer);
        // Whole events, always: a replica that dies leaves nothing half-said.
        let text = answer.text();
        let pauses = answer.arrivals.windows(2).filter(|pair| pair[1].0 - pair[0].0 > GAP / 2);
        let before: Vec<&str> = pauses.map(|pair| &text[..pair[0].1]).collect();
        let whole = before.iter().all(|text| text.ends_with("\n\n")) && before.len() >= 5;
        if whole { Ok(()) } else { Err(format!("{:?}", answer.arrivals)) }
    })
    .await;
}

/// Small requests one after the other: each would take 40 ms longer with Nagle on either side.
#[tokio::test]
async fn small_exchanges_take_no_time() {
    let backend = Backend::healthy().await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    at_least_once(async || {
        let mut took = Vec::new();
        for _ in 0..30 {
            let answer = client.send(&chat_request(false)).await;
            assert_eq!(answer.status, 200);
            took.push(answer.elapsed);
        }
        took.sort_unstable();
        if took[15] < Duration::from_millis(25) { Ok(()) } else { Err(format!("{took:?}")) }
    })
    .await;
}
