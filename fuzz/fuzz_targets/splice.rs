//! Whatever the legs of a stream say, the client gets one answer. The input is three parts, parted by the byte 0:
//! the events the client was given, and two legs after them.
#![no_main]

use std::ops::ControlFlow;

use evergate::policy::dialect::{Endpoint, Engine, EventReader};
use evergate::policy::resume::{Peers, ResumePolicy, Splice};
use evergate::sse::Decoder;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const BODY: &[u8] = br#"{"stream":true,"stop":["ab"],"messages":[{"role":"user","content":"x"}]}"#;

fn text(event: &Value) -> String {
    let delta = &event["choices"][0]["delta"];
    delta["content"].as_str().unwrap_or_default().to_owned()
}

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(3, |&byte| byte == 0);
    let policy = ResumePolicy { journal_bytes_max: 1 << 10, ..ResumePolicy::default() };
    let mut splice = Splice::arm(Endpoint::ChatCompletions, BODY, &policy).unwrap();
    let mut reader = EventReader::new(Endpoint::ChatCompletions);
    let _ = Decoder::new(1 << 20).feed(parts.next().unwrap_or_default(), |event| {
        splice.observe(event.data, &reader.read(&event).unwrap_or_default());
        ControlFlow::Continue(())
    });
    let (mut finishes, mut done) = (0, 0);
    for (leg, engine) in parts.zip([Some(Engine::Vllm), None]) {
        let peers = Peers { engine, text: engine.is_some(), ..Peers::default() };
        let Ok(plan) = splice.plan(peers, BODY) else { return };
        splice.begin_leg(&plan);
        let mut out = Vec::new();
        let halves = leg.split_at(leg.len() / 2);
        let _ = splice.feed(halves.0, &mut out).and_then(|_| splice.feed(halves.1, &mut out));
        let mut decoder = Decoder::new(usize::MAX);
        decoder
            .feed(&out, |event| {
                assert_eq!(done, 0);
                if event.data == b"[DONE]" {
                    done += 1;
                    return ControlFlow::Continue(());
                }
                let event: Value = match serde_json::from_slice(event.data) {
                    Ok(event) => event,
                    // Numbers beyond a float, which serde_json does not take.
                    Err(_) => return ControlFlow::Continue(()),
                };
                assert!(finishes == 0 || text(&event).is_empty());
                finishes += usize::from(event["choices"][0]["finish_reason"].is_string());
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(decoder.pending(), b"");
        assert!(finishes <= 1 && done <= finishes.max(1));
    }
});
