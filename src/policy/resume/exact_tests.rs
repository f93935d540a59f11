//! Streams cut anywhere and continued from token ids, against the same streams uncut.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::id_model::{Quirk, Server};
use super::tests::{View, cuts, events, open_cuts, tell, unread};
use super::{
    ASKED_EVENT_BYTES_MAX, Abandon, Peers, Plan, Refused, RequestIds, ResumeMode, ResumePolicy, Splice,
    Strategy, Unseen, ask_for_ids,
};
use crate::policy::dialect::{Endpoint, Engine, EventReader};
use crate::sse::Decoder;

/// The ways to be continued from ids: engine, endpoint, strategy.
const WAYS: [(Engine, Endpoint, Strategy); 3] = [
    (Engine::Vllm, Endpoint::Completions, Strategy::Exact),
    (Engine::Sglang, Endpoint::Completions, Strategy::Exact),
    (Engine::Vllm, Endpoint::ChatCompletions, Strategy::ExactTranslated),
];

fn path(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::ChatCompletions => "/v1/chat/completions",
        _ => "/v1/completions",
    }
}

fn body(endpoint: Endpoint, prompt: &str, more: Value) -> Vec<u8> {
    let mut body = match endpoint {
        Endpoint::ChatCompletions => json!({"messages": [{"role": "user", "content": prompt}]}),
        _ => json!({"prompt": prompt, "max_tokens": 60}),
    };
    let members = body.as_object_mut().unwrap();
    members.extend(json!({"model": "m", "stream": true}).as_object().unwrap().clone());
    members.extend(more.as_object().unwrap().clone());
    body.to_string().into_bytes()
}

fn peers(engine: Engine) -> Peers {
    Peers { engine: Some(engine), text: false, ids: true, context_max: Some(1000) }
}

/// What a client sees of the events of a first leg.
fn seen(engine: Engine, wire: &[u8]) -> Vec<u8> {
    let mut unseen = Unseen::of(engine);
    let mut out = Vec::new();
    Decoder::new(1 << 20)
        .feed(wire, |event| {
            if !unseen.hide(&event, &mut out) {
                out.extend_from_slice(event.raw);
            }
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    out
}

/// One client.
struct Stream {
    splice: Splice,
    got: Vec<u8>,
    body: Vec<u8>,
    endpoint: Endpoint,
    engine: Engine,
}

impl Stream {
    /// Asks, and gets the events of the answer up to the `cut`th.
    fn begun(server: Server, endpoint: Endpoint, body: &[u8], cut: usize) -> Self {
        let policy = ResumePolicy::default();
        let engine = server.engine;
        let mut splice = Splice::arm(endpoint, body, &policy).unwrap();
        let asking = ask_for_ids(endpoint, engine, body, &policy);
        splice.tells_ids(engine, asking.is_some());
        let wire = server.answer(path(endpoint), asking.as_deref().unwrap_or(body));
        let wire = &wire[..cuts(&wire)[cut]];
        tell(&mut splice, &mut EventReader::new(endpoint), wire);
        let got = if asking.is_some() { seen(engine, wire) } else { wire.to_vec() };
        Self { splice, got, body: body.to_vec(), endpoint, engine }
    }

    fn plan(&mut self) -> Result<Plan, Refused> {
        self.splice.withdraw(Strategy::Replay);
        self.splice.plan(peers(self.engine), &self.body)
    }

    /// Goes on there, up to the `cut`th event from the end.
    fn go_on(&mut self, plan: &Plan, server: Server, left_out: usize) -> Result<(), Abandon> {
        self.splice.begin_leg(plan);
        let path = plan.path.unwrap_or(path(self.endpoint));
        let wire = server.answer(path, plan.body.as_ref().unwrap());
        let cuts = cuts(&wire);
        let end = cuts[cuts.len().saturating_sub(1 + left_out)];
        let half = cuts[cuts.len() / 2].min(end);
        self.splice.feed(&wire[..half], &mut self.got)?;
        self.splice.feed(&wire[half..end], &mut self.got)?;
        Ok(())
    }

    #[track_caller]
    fn check(&self, uncut: &[u8], note: &str) {
        let (view, whole) = (View::of(&self.got), View::of(uncut));
        assert_eq!(view, whole, "{note}");
        assert_eq!((view.roles <= 1, view.finishes.len(), view.done), (true, 1, 1), "{note}");
        assert_eq!(lists(&self.got), lists(uncut), "{note}");
        assert_eq!(objects(&self.got), objects(uncut), "{note}");
    }
}

/// Ids that a client is told.
fn lists(wire: &[u8]) -> Vec<Value> {
    let mut all = Vec::new();
    for data in events(wire).into_iter().filter(|data| *data != b"[DONE]") {
        let event: Value = serde_json::from_slice(&data).unwrap();
        let choice = &event["choices"][0];
        all.extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
        for of_prompt in [&event["prompt_token_ids"], &choice["prompt_token_ids"]] {
            all.extend(of_prompt.as_array().map(|ids| json!(ids)));
        }
    }
    all
}

/// What its events are said to be: a chat's chunks stay a chat's, whichever way it goes on.
fn objects(wire: &[u8]) -> BTreeSet<String> {
    let told = events(wire).into_iter().filter(|data| *data != b"[DONE]");
    let read = |data: Vec<u8>| -> Value { serde_json::from_slice(&data).unwrap() };
    told.map(|data| read(data)["object"].to_string()).collect()
}

/// Cuts everywhere and goes on from ids; returns how often that was possible.
fn continue_everywhere(
    (engine, endpoint, strategy): (Engine, Endpoint, Strategy),
    body: &[u8],
    (tokens, again): (usize, usize),
) -> usize {
    let first = Server::new(engine, 1, tokens);
    let uncut = first.answer(path(endpoint), body);
    let mut continued = 0;
    let asked = ask_for_ids(endpoint, engine, body, &ResumePolicy::default());
    let wire = first.answer(path(endpoint), asked.as_deref().unwrap_or(body));
    for cut in 0..open_cuts(&wire).len() {
        let note =
            format!("{engine:?} {strategy:?} {tokens} {again} at {cut}: {}", String::from_utf8_lossy(body));
        let mut stream = Stream::begun(first, endpoint, body, cut);
        if stream.splice.end_at_limit(body, &mut stream.got) {
            stream.check(&uncut, &note);
            continued += 1;
            continue;
        }
        let plan = match stream.plan() {
            Ok(plan) => plan,
            Err(reason) => {
                assert!(
                    matches!(reason, Refused::NothingDelivered | Refused::Ids | Refused::Engine),
                    "{reason:?}"
                );
                continue;
            }
        };
        assert_eq!(plan.strategy, strategy);
        stream.go_on(&plan, Server::new(engine, 2, again), 0).unwrap_or_else(|why| panic!("{note}: {why:?}"));
        stream.check(&uncut, &note);
        continued += 1;
    }
    continued
}

/// Prompts whose answers are long enough to be worth cutting.
fn prompts(engine: Engine, endpoint: Endpoint) -> Vec<String> {
    let long = |prompt: &String| {
        let whole = Server::new(engine, 1, 1).answer(path(endpoint), &body(endpoint, prompt, json!({})));
        (40..90).contains(&cuts(&whole).len())
    };
    (0..500).map(|number| format!("Say 漢{number} HAVING")).filter(long).take(3).collect()
}

#[test]
fn a_stream_continued_from_ids_equals_the_uncut_one_wherever_it_was_cut() {
    for way in WAYS {
        let mut continued = 0;
        for prompt in prompts(way.0, way.1) {
            for more in [
                json!({}),
                json!({"stream_options": {"include_usage": true}}),
                json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}, "max_tokens": 33}),
                json!({"return_token_ids": true}),
            ] {
                let asked = more["return_token_ids"] == true;
                let body = body(way.1, &prompt, more);
                for sizes in [(1, 1), (1, 3), (2, 1), (3, 2), (0, 0)] {
                    // What is said again in other chunks cannot be parted from its ids.
                    if !asked || sizes == (1, 1) {
                        continued += continue_everywhere(way, &body, sizes);
                    }
                }
            }
        }
        assert!(continued > 300, "{way:?} {continued}");
    }
}

#[test]
fn one_token_at_a_time_nearly_every_cut_is_continued() {
    for way in WAYS {
        let body = body(way.1, &prompts(way.0, way.1)[0], json!({}));
        let wire = Server::new(way.0, 1, 1).answer(path(way.1), &body);
        let (cuts, continued) = (open_cuts(&wire).len(), continue_everywhere(way, &body, (1, 1)));
        assert!(continued + 10 > cuts, "{way:?}: {continued} of {cuts}");
    }
}

#[test]
fn two_cuts_and_three_legs_make_one_stream() {
    for (engine, endpoint, _) in WAYS {
        let body =
            body(endpoint, &prompts(engine, endpoint)[1], json!({"stream_options": {"include_usage": true}}));
        let server = |leg| Server::new(engine, leg, 1);
        let uncut = server(1).answer(path(endpoint), &body);
        let mut twice = 0;
        for first in (0..open_cuts(&uncut).len()).step_by(3) {
            for left_out in (3..50).step_by(4) {
                let mut stream = Stream::begun(server(1), endpoint, &body, first);
                let Ok(plan) = stream.plan() else { continue };
                stream.go_on(&plan, server(2), left_out).unwrap();
                if !View::of(&stream.got).finishes.is_empty() {
                    continue;
                }
                let Ok(plan) = stream.plan() else { continue };
                stream.go_on(&plan, server(3), 0).unwrap();
                stream.check(&uncut, &format!("{engine:?} {first} {left_out}"));
                twice += 1;
            }
        }
        assert!(twice > 20, "{engine:?} {endpoint:?} {twice}");
    }
}

#[test]
fn limits_count_the_tokens_that_were_delivered() {
    for way in WAYS {
        for limit in 1..25 {
            for name in ["max_tokens", "max_completion_tokens"] {
                if name == "max_completion_tokens" && way.1 == Endpoint::Completions {
                    continue;
                }
                let more = json!({name: limit, "stream_options": {"include_usage": true}});
                continue_everywhere(way, &body(way.1, &prompts(way.0, way.1)[2], more), (1, 1));
            }
        }
    }
    // Sixteen, where none is given.
    let mut bare: Value = serde_json::from_slice(&body(
        Endpoint::Completions,
        &prompts(Engine::Vllm, Endpoint::Completions)[0],
        json!({}),
    ))
    .unwrap();
    bare.as_object_mut().unwrap().remove("max_tokens");
    assert!(continue_everywhere(WAYS[0], bare.to_string().as_bytes(), (1, 1)) > 5);
}

#[test]
fn a_limit_that_is_reached_is_told_without_another_leg() {
    for (engine, endpoint, _) in WAYS {
        let mut told = 0;
        for limit in 1..30 {
            let body = body(
                endpoint,
                &prompts(engine, endpoint)[0],
                json!({"max_tokens": limit, "stream_options": {"include_usage": true}}),
            );
            let server = Server::new(engine, 1, 1);
            let uncut = server.answer(path(endpoint), &body);
            // The finish comes with the last text; an engine that died before it said so is made by leaving it out.
            let mut stream = Stream::begun(server, endpoint, &body, 0);
            let asking = ask_for_ids(endpoint, engine, &body, &ResumePolicy::default()).unwrap();
            let wire = String::from_utf8(server.answer(path(endpoint), &asking)).unwrap();
            let unfinished = wire.replace(r#""finish_reason":"length""#, r#""finish_reason":null"#);
            let upto = cuts(unfinished.as_bytes())[open_cuts(wire.as_bytes()).len()];
            let mut reader = EventReader::new(endpoint);
            tell(&mut stream.splice, &mut reader, &unfinished.as_bytes()[..upto]);
            stream.got = seen(engine, &unfinished.as_bytes()[..upto]);
            if stream.splice.end_at_limit(&body, &mut stream.got) {
                stream.check(&uncut, &format!("{engine:?} {limit}"));
                assert!(stream.splice.is_done());
                told += 1;
            }
        }
        assert!(told > 5, "{engine:?} {endpoint:?} {told}");
    }
}

#[test]
fn ids_that_were_asked_for_unseen_are_not_seen() {
    for (engine, endpoint, _) in WAYS {
        for tokens in [1, 2, 0] {
            let body = body(
                endpoint,
                &prompts(engine, endpoint)[1],
                json!({"stream_options": {"include_usage": true}}),
            );
            let asking = ask_for_ids(endpoint, engine, &body, &ResumePolicy::default()).unwrap();
            let server = Server::new(engine, 1, tokens);
            let (with, without) =
                (server.answer(path(endpoint), &asking), server.answer(path(endpoint), &body));
            assert_ne!(with, without);
            assert_eq!(String::from_utf8(seen(engine, &with)), String::from_utf8(without.clone()));
            // Other ends of lines, comments, and data in two lines.
            let odd = |wire: &[u8]| {
                let text = String::from_utf8(wire.to_vec()).unwrap();
                text.replace("\n\n", "\r\n\r\n")
                    .replace("data: {\"id\"", ": beat\r\nevent: x\r\ndata:{\"id\"")
                    .into_bytes()
            };
            assert_eq!(seen(engine, &odd(&with)), odd(&without));
            let two = |wire: &[u8]| {
                String::from_utf8(wire.to_vec()).unwrap().replace(",\"object\"", ",\ndata: \"object\"")
            };
            let view = |wire: &[u8]| events(wire);
            assert_eq!(view(&seen(engine, two(&with).as_bytes())), view(two(&without).as_bytes()));
        }
    }
}

#[test]
fn ids_that_do_not_match_the_text_are_not_continued() {
    for (engine, endpoint, _) in WAYS {
        let body = body(
            endpoint,
            &prompts(engine, endpoint)[0],
            json!({"stream_options": {"continuous_usage_stats": true}}),
        );
        for quirk in [Quirk::ShortIds, Quirk::ExtraId, Quirk::NoIds, Quirk::NoPromptIds] {
            for tokens in [1, 2] {
                let server = Server { quirk, ..Server::new(engine, 1, tokens) };
                let open = open_cuts(&server.answer(path(endpoint), &body)).len();
                for cut in 5..open {
                    let mut stream = Stream::begun(server, endpoint, &body, cut);
                    assert_eq!(stream.plan(), Err(Refused::Engine), "{engine:?} {quirk:?} at {cut}");
                    assert!(!stream.splice.end_at_limit(&body, &mut stream.got));
                }
            }
        }
    }
}

#[test]
fn a_leg_that_did_not_take_the_ids_is_abandoned_before_anything_is_written() {
    for (engine, endpoint, _) in WAYS {
        let body = body(endpoint, &prompts(engine, endpoint)[0], json!({}));
        for (quirk, reason) in [
            (Quirk::NoPromptIds, Abandon::IdsIgnored),
            (Quirk::OtherPrompt, Abandon::IdsIgnored),
            (Quirk::Leak, Abandon::Echo),
        ] {
            let server = Server::new(engine, 1, 1);
            for cut in 0..open_cuts(&server.answer(path(endpoint), &body)).len() {
                let mut stream = Stream::begun(server, endpoint, &body, cut);
                let Ok(plan) = stream.plan() else { continue };
                let before = stream.got.clone();
                if quirk == Quirk::Leak && View::of(&before).text().len() < 16 {
                    continue;
                }
                let result = stream.go_on(&plan, Server { quirk, ..Server::new(engine, 2, 1) }, 0);
                let note = format!("{engine:?} {endpoint:?} {quirk:?} at {cut}");
                if result.is_ok() && quirk == Quirk::Leak {
                    // Nothing but the finish was left.
                    assert_eq!(View::of(&stream.got).text(), View::of(&before).text(), "{note}");
                    continue;
                }
                // Where something is to be said again it is seen there first.
                let seen =
                    result == Err(reason) || (quirk == Quirk::Leak && result == Err(Abandon::Diverged));
                assert!(seen && stream.got == before, "{note}: {result:?}");
            }
        }
    }
}

#[test]
fn what_is_asked_of_the_second_engine() {
    let with_prompt =
        |endpoint, body: &str| body.replace("PROMPT", &prompts(Engine::Vllm, endpoint)[0]).into_bytes();
    let server = Server::new(Engine::Vllm, 1, 1);
    let chat = &with_prompt(
        Endpoint::ChatCompletions,
        r#"{"model":"m", "stream":true,"temperature":0.5,"seed":7,"messages":[{"role":"user","content":"PROMPT"}],"max_completion_tokens":50,"max_tokens":9,"min_tokens":20,"chat_template_kwargs":{"a":1},"stream_options":{"include_usage":true},"top_k":3,"user":null}"#,
    );
    let mut stream = Stream::begun(server, Endpoint::ChatCompletions, chat, 8);
    let plan = stream.plan().unwrap();
    assert_eq!((plan.strategy, plan.path), (Strategy::ExactTranslated, Some("/v1/completions")));
    let asked: Value = serde_json::from_slice(plan.body.as_ref().unwrap()).unwrap();
    let (prompt, generated) = stream.splice.journal.ids.given();
    assert_eq!(asked["prompt"], json!([prompt, generated].concat()));
    assert_eq!(asked["max_tokens"], 50 - generated.len());
    assert_eq!(asked["min_tokens"], 20 - generated.len());
    assert_ne!(asked["seed"], 7);
    for (name, value) in [
        ("temperature", json!(0.5)),
        ("top_k", json!(3)),
        ("stream", json!(true)),
        ("stream_options", json!({"include_usage": true})),
        ("return_token_ids", json!(true)),
        ("add_special_tokens", json!(false)),
        ("model", json!("m")),
    ] {
        assert_eq!(asked[name], value, "{name}");
    }
    let names: Vec<&String> = asked.as_object().unwrap().keys().collect();
    assert!(!names.iter().any(|name| name.starts_with("m") && name.contains("messages")), "{names:?}");
    assert!(asked.get("chat_template_kwargs").is_none() && asked.get("max_completion_tokens").is_none());
    // Without a limit of its own it may fill the context.
    let chat = &with_prompt(
        Endpoint::ChatCompletions,
        r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"PROMPT"}]}"#,
    );
    let mut stream = Stream::begun(server, Endpoint::ChatCompletions, chat, 8);
    let plan = stream.plan().unwrap();
    let asked: Value = serde_json::from_slice(plan.body.as_ref().unwrap()).unwrap();
    assert_eq!(asked["max_tokens"], 1000 - asked["prompt"].as_array().unwrap().len());
    let unknown = Peers { context_max: None, ..peers(Engine::Vllm) };
    assert_eq!(stream.splice.plan(unknown, chat), Err(Refused::Engine));
    // A completion is edited where it must be.
    let body = &with_prompt(
        Endpoint::Completions,
        r#"{"model":"m", "stream":true,"x":[1.50],"prompt":"PROMPT","max_tokens":50}"#,
    );
    let mut stream = Stream::begun(server, Endpoint::Completions, body, 8);
    let plan = stream.plan().unwrap();
    let (prompt, generated) = stream.splice.journal.ids.given();
    let list: Vec<String> = prompt.iter().chain(generated).map(u32::to_string).collect();
    let expected = format!(
        r#"{{"return_token_ids":true,"model":"m", "stream":true,"x":[1.50],"prompt":[{}],"max_tokens":{}}}"#,
        list.join(","),
        50 - generated.len()
    );
    assert_eq!(String::from_utf8(plan.body.unwrap()).unwrap(), expected);
}

/// Whether ids are asked for, and what a continuation would be refused for.
fn asks(endpoint: Endpoint, engine: Engine, body: &str) -> bool {
    ask_for_ids(endpoint, engine, body.as_bytes(), &ResumePolicy::default()).is_some()
}

#[test]
fn ids_are_asked_for_only_where_they_can_be_used() {
    let chat = |more: &str| {
        format!(r#"{{"model":"m","stream":true,"messages":[{{"role":"user","content":"a"}}]{more}}}"#)
    };
    for more in [
        "",
        r#","tools":[],"tool_choice":"none","response_format":{"type":"text"},"logprobs":false"#,
        r#","return_token_ids":false,"max_tokens":5,"unknown":null"#,
        r#","stop":[],"stop_token_ids":[1]"#,
    ] {
        assert!(asks(Endpoint::ChatCompletions, Engine::Vllm, &chat(more)), "{more}");
    }
    for more in [
        r#","tools":[{"type":"function"}]"#,
        r#","response_format":{"type":"json_object"}"#,
        r#","logprobs":true"#,
        r#","stop":"x""#,
        r#","n":2"#,
        r#","include_reasoning":false"#,
        r#","unknown":1"#,
        r#","return_token_ids":true"#,
        r#","continue_final_message":true"#,
        r#","thinking_token_budget":5"#,
        r#","model":"gpt-oss-20b""#,
    ] {
        assert!(!asks(Endpoint::ChatCompletions, Engine::Vllm, &chat(more)), "{more}");
    }
    let image = r#"{"stream":true,"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
    assert!(!asks(Endpoint::ChatCompletions, Engine::Vllm, image));
    assert!(!asks(
        Endpoint::ChatCompletions,
        Engine::Vllm,
        r#"{"stream":true,"model":"openai/gpt-oss-20b","messages":[]}"#
    ));
    assert!(!asks(Endpoint::ChatCompletions, Engine::Sglang, &chat("")), "its chats tell no ids");
    let completion = r#"{"stream":true,"prompt":"a"}"#;
    assert!(asks(Endpoint::Completions, Engine::Sglang, completion));
    assert!(!asks(Endpoint::Completions, Engine::LlamaCpp, completion));
    let with_stop = r#"{"stream":true,"prompt":"a","stop":"x"}"#;
    assert!([Engine::Vllm, Engine::Sglang].iter().all(|&engine| !asks(
        Endpoint::Completions,
        engine,
        with_stop
    )));
    assert!(!asks(Endpoint::Completions, Engine::Vllm, r#"{"prompt":"a"}"#));
    let of_bytes = |len: usize| {
        let empty = r#"{"stream":true,"prompt":""}"#;
        empty.replace(r#""""#, &format!("\"{}\"", "a".repeat(len - empty.len())))
    };
    assert!(asks(Endpoint::Completions, Engine::Vllm, &of_bytes(128 << 10)));
    assert!(!asks(Endpoint::Completions, Engine::Vllm, &of_bytes((128 << 10) + 1)));
    // A token may be one byte: the ids of such a prompt fit into the event that tells them.
    assert!(vec!["151643"; 128 << 10].join(",").len() < ASKED_EVENT_BYTES_MAX);
    for policy in [
        ResumePolicy { request_ids: RequestIds::Never, ..ResumePolicy::default() },
        ResumePolicy { mode: ResumeMode::Replay, ..ResumePolicy::default() },
    ] {
        assert_eq!(ask_for_ids(Endpoint::Completions, Engine::Vllm, completion.as_bytes(), &policy), None);
    }
    let body = br#"{ "stream":true,"prompt":"a","return_token_ids" : null}"#;
    let asking = ask_for_ids(Endpoint::Completions, Engine::Vllm, body, &ResumePolicy::default()).unwrap();
    assert_eq!(asking, br#"{ "stream":true,"prompt":"a","return_token_ids" : true}"#);
}

/// The first leg said this, with ids that match it.
fn after(deltas: &[(&str, &str)], more: &str) -> Result<Plan, Refused> {
    let body = format!(r#"{{"model":"m","stream":true,"messages":[{{"role":"user","content":"a"}}]{more}}}"#);
    let mut splice =
        Splice::arm(Endpoint::ChatCompletions, body.as_bytes(), &ResumePolicy::default()).unwrap();
    splice.tells_ids(Engine::Vllm, true);
    splice.observe(br#"{"model":"m","prompt_token_ids":[1,2],"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#, &unread());
    for (delta, ids) in deltas {
        let event = format!(r#"{{"model":"m","choices":[{{"index":0,"delta":{delta},"token_ids":{ids}}}]}}"#);
        splice.observe(event.as_bytes(), &unread());
    }
    splice.withdraw(Strategy::Replay);
    splice.plan(Peers { text: false, ..peers(Engine::Vllm) }, body.as_bytes())
}

#[test]
fn answers_that_ids_would_not_continue_truly_are_not() {
    let a = (r#"{"content":"a"}"#, "[5]");
    assert_eq!(after(&[a], "").map(|plan| plan.strategy), Ok(Strategy::ExactTranslated));
    // Thinking that has ended is in the ids.
    let thought = (r#"{"reasoning_content":"Hm"}"#, "[6]");
    assert!(after(&[thought, a], "").is_ok());
    let refused = Err(Refused::Engine);
    assert_eq!(after(&[], ""), refused);
    assert_eq!(after(&[thought], ""), refused, "it may think on");
    assert_eq!(after(&[thought, (r#"{"content":"ab"}"#, "[5,6]")], ""), refused, "who knows where it ended");
    assert_eq!(after(&[a, (r#"{"refusal":"b"}"#, "[6]")], ""), refused);
    let call = r#"{"tool_calls":[{"index":0,"id":"A","function":{"name":"f"}}]}"#;
    assert_eq!(after(&[a, (call, "[6]")], ""), refused);
    assert_eq!(after(&[a], r#","stop":"x""#), refused);
    // What is said again behind the seam is bounded.
    for (again, goes_on) in [(512, true), (513, false)] {
        let behind = format!(r#"{{"content":"{}"}}"#, "b".repeat(again));
        assert_eq!(after(&[a, (&behind, "[6,7]")], "").is_ok(), goes_on, "{again}");
    }
    assert_eq!(after(&[a], r#","max_tokens":1"#), refused);
    // A prompt of harmony.
    let mut splice = Splice::arm(
        Endpoint::ChatCompletions,
        &body(Endpoint::ChatCompletions, "a", json!({})),
        &ResumePolicy::default(),
    )
    .unwrap();
    splice.tells_ids(Engine::Vllm, true);
    splice.observe(
        br#"{"prompt_token_ids":[200006,2],"choices":[{"index":0,"delta":{"content":"a"},"token_ids":[5]}]}"#,
        &unread(),
    );
    splice.withdraw(Strategy::Replay);
    let asked = body(Endpoint::ChatCompletions, "a", json!({}));
    assert_eq!(splice.plan(peers(Engine::Vllm), &asked), refused);
}

#[test]
fn ids_go_first_then_text_then_a_replay() {
    let prompt = &prompts(Engine::Vllm, Endpoint::ChatCompletions)[0];
    let body = body(Endpoint::ChatCompletions, prompt, json!({}));
    let mut stream = Stream::begun(Server::new(Engine::Vllm, 1, 1), Endpoint::ChatCompletions, &body, 8);
    let all = Peers { text: true, ..peers(Engine::Vllm) };
    for strategy in [Strategy::ExactTranslated, Strategy::Text, Strategy::Replay] {
        let plan = stream.splice.plan(all, &body);
        // Text is refused behind white space.
        if plan.as_ref().is_ok_and(|plan| plan.strategy != strategy) {
            assert_eq!(strategy, Strategy::Text);
            continue;
        }
        assert_eq!(plan.map(|plan| plan.strategy), Ok(strategy));
        stream.splice.withdraw(strategy);
    }
    assert_eq!(stream.splice.plan(all, &body), Err(Refused::StrategiesExhausted));
    // A replay may say the same by other tokens.
    let mut stream = Stream::begun(Server::new(Engine::Vllm, 1, 1), Endpoint::ChatCompletions, &body, 8);
    let replay = Plan { strategy: Strategy::Replay, path: None, body: Some(body.clone()) };
    stream.go_on(&replay, Server::new(Engine::Vllm, 2, 1), 9).unwrap();
    assert_eq!(stream.plan(), Err(Refused::Engine));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn garbage_is_hidden_or_passed_and_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        way in 0usize..3,
        cut in any::<prop::sample::Index>(),
    ) {
        let (engine, endpoint, _) = WAYS[way];
        let body = body(endpoint, &prompts(engine, endpoint)[1], json!({"return_token_ids": true}));
        let mut wire = Server::new(engine, 1, 0).answer(path(endpoint), &body);
        for (place, byte) in damage {
            let place = place.index(wire.len());
            wire[place] = byte;
        }
        let mut unseen = Unseen::of(engine);
        let mut splice = Splice::arm(endpoint, &body, &ResumePolicy::default()).unwrap();
        splice.tells_ids(engine, true);
        let upto = cut.index(wire.len());
        let mut out = Vec::new();
        Decoder::new(1 << 20).feed(&wire[..upto], |event| {
            splice.observe(event.data, &unread());
            unseen.hide(&event, &mut out);
            std::ops::ControlFlow::Continue(())
        }).unwrap();
        if let Ok(plan) = splice.plan(peers(engine), &body) {
            splice.begin_leg(&plan);
            let _ = splice.feed(&wire[upto..], &mut out);
            let _ = splice.feed(&wire, &mut out);
        }
    }
}
