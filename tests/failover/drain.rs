//! Engines and operators that end work politely (F30, F35).

use std::time::Duration;

use evergate::telemetry::metrics::AttemptOutcome;

use crate::support::backend::{Backend, Script};
use crate::support::client::{H2Client, chat_request, stream_seen};
use crate::support::either::{Http, assert_is_right, assert_is_the_stream, attempts, faults, in_order};
use crate::support::h2_backend::{H2Answer, H2Backend, H2Raw, RawFrame};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk, Then as _};
use crate::support::{PATIENCE, eventually};

#[tokio::test]
async fn f30_a_connection_that_is_closed_after_its_answer_is_not_used_again() {
    for http in Http::BOTH {
        let polite = Backend::start(Script::new().by_request(|request| {
            if request.is_probe() {
                return reply::healthy(request, &Talk::default());
            }
            let said = r#"{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}]}"#;
            let headers = [("content-type", "application/json"), ("connection", "close")];
            reply::with_headers(200, &headers, said).then(Step::Fin)
        }))
        .await;
        let proxy = Proxy::start(&in_order(&[&polite.url()]));
        let mut client = http.connect(proxy.addr).await;
        for _ in 0..5 {
            assert_eq!(client.send(&chat_request(false)).await.status, 200);
        }
        assert!(polite.requests().iter().all(|request| request.index == 0));
        assert_eq!(attempts(&proxy, polite.addr(), AttemptOutcome::Success), 5);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f30_a_stream_ended_by_abort_is_a_fault_and_said_so() {
    for http in Http::BOTH {
        let mut events = Talk::default().chat_events_begun(3);
        events.push(
            "data: {\"id\":\"chatcmpl-scripted\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"abort\"}]}\n\n"
                .to_owned(),
        );
        events.push("data: [DONE]\n\n".to_owned());
        let ending = Backend::start(Script::new().sse(&events)).await;
        let proxy = Proxy::start(&in_order(&[&ending.url()]));
        let answer = http.send(proxy.addr, &chat_request(true)).await;
        let seen = stream_seen(&answer);
        assert_eq!((seen.text.as_str(), seen.done, seen.errors.len()), ("t0 t1 t2", 0, 1));
        assert!(seen.finish.is_empty());
        proxy.is_quiet().await;
        assert_eq!(faults(&proxy, &ending), 1);
    }
}

#[tokio::test]
async fn f30_what_lies_beyond_a_goaway_moves_and_is_nobodys_fault() {
    for http in Http::BOTH {
        let leaving = H2Raw::start(|_, _| {
            vec![
                RawFrame::GoAway { last_stream: 0, code: 0 },
                RawFrame::Delay(Duration::from_millis(50)),
                RawFrame::Close,
            ]
        })
        .await;
        let alive = H2Backend::start(|_| H2Answer::chat(&Talk::default())).await;
        let proxy = Proxy::start(&in_order(&[&leaving.url(), &alive.url()]).set("pool.http", "2"));
        assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Fault), 0);
        assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Neutral), 1);
        assert_eq!(alive.requests().len(), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f30_a_refused_stream_moves_even_if_it_must_not_be_sent_twice() {
    for http in Http::BOTH {
        let refusing = H2Raw::start(|_, _| vec![RawFrame::Reset(7)]).await;
        let alive =
            H2Backend::start(|_| H2Answer::new(200).header("content-type", "text/plain").data("ok")).await;
        let proxy = Proxy::start(&in_order(&[&refusing.url(), &alive.url()]).set("pool.http", "2"));
        let upload = crate::support::client::Request::new("POST", "/v1/files").body("x");
        let answer = http.send(proxy.addr, &upload).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
        assert_eq!(attempts(&proxy, refusing.addr(), AttemptOutcome::Fault), 0);
        assert_eq!(alive.requests().len(), 1);
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f30_a_stream_finishes_behind_a_goaway_and_new_work_gets_a_new_connection() {
    for http in Http::BOTH {
        let events = Talk::default().chat_events(true).concat();
        let leaving = H2Raw::start(move |_, stream| {
            let (first, rest) = events.split_at(events.len() / 2);
            let data = |text: &str, end_stream| RawFrame::Data { bytes: text.to_owned().into(), end_stream };
            vec![
                // `:status: 200`, `content-type: text/event-stream`.
                head_of_a_stream(stream),
                data(first, false),
                RawFrame::GoAway { last_stream: stream, code: 0 },
                RawFrame::Delay(Duration::from_millis(50)),
                data(rest, true),
            ]
        })
        .await;
        let proxy = Proxy::start(&in_order(&[&leaving.url()]).set("pool.http", "2"));
        for _ in 0..3 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        let chats: Vec<usize> = leaving.streams().iter().map(|(connection, _)| *connection).collect();
        assert!(chats.len() >= 3, "{chats:?}");
        proxy.is_quiet().await;
        assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Fault), 0);
        assert_eq!(attempts(&proxy, leaving.addr(), AttemptOutcome::Success), 3);
    }
}

/// HEADERS of an answer that is an event stream, written by hand (RFC 7541 §6.2.2).
fn head_of_a_stream(stream: u32) -> RawFrame {
    let mut block = vec![0x88, 0x0f, 0x10];
    block.push(u8::try_from("text/event-stream".len()).unwrap());
    block.extend_from_slice(b"text/event-stream");
    RawFrame::Bytes(crate::support::h2_backend::frame(1, 4, stream, &block).into())
}

#[tokio::test]
async fn f35_a_stream_outlives_the_removal_of_its_backend() {
    for http in Http::BOTH {
        let leaving =
            Backend::start(Script::new().talk(Talk::default().gap(Duration::from_millis(60)))).await;
        let staying = Backend::healthy().await;
        let with = in_order(&[&leaving.url(), &staying.url()]);
        let proxy = Proxy::start(&with);
        let address = proxy.addr;
        let streaming = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        leaving.has_seen(1).await;
        let without = ProxyBuilder::new()
            .set("pool.probe.kind", "off")
            .backend_with(&staying.url(), &[("tier", 1.into())])
            .build_toml();
        let config = evergate::config::parse(&without, "test.toml", &|_| None).unwrap();
        proxy.running.directory().apply(config).unwrap();
        for stream in [true, false] {
            assert_is_right(&http.send(proxy.addr, &chat_request(stream)).await, stream);
        }
        assert_is_the_stream(&streaming.await.unwrap());
        assert_eq!((leaving.requests().len(), staying.requests().len()), (1, 2));
        // Nothing is kept open to what is gone.
        eventually(PATIENCE, || leaving.open_connections() == 0).await;
        proxy.is_quiet().await;
    }
}

#[tokio::test]
async fn f35_a_drained_backend_finishes_what_it_has_and_gets_nothing_new() {
    for http in Http::BOTH {
        let leaving =
            Backend::start(Script::new().talk(Talk::default().gap(Duration::from_millis(60)))).await;
        let staying = Backend::healthy().await;
        let proxy = Proxy::start(&in_order(&[&leaving.url(), &staying.url()]));
        let address = proxy.addr;
        let streaming = tokio::spawn(async move { http.send(address, &chat_request(true)).await });
        leaving.has_seen(1).await;
        let snapshot = proxy.running.directory().snapshot();
        snapshot.pools[0].set_admin(0, evergate::policy::health::Administrative::Draining);
        for _ in 0..3 {
            assert_is_the_stream(&http.send(proxy.addr, &chat_request(true)).await);
        }
        assert_is_the_stream(&streaming.await.unwrap());
        assert_eq!((leaving.requests().len(), staying.requests().len()), (1, 3));
        drop(H2Client::connect(proxy.addr).await);
        proxy.is_quiet().await;
    }
}
