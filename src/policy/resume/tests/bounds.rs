//! What a splice says of itself: its labels, the bytes it holds, and what stands exactly at a bound.

use std::collections::BTreeSet;

use super::super::{Peers, RequestIds};
use super::*;

/// Labels of metrics and words of a configuration: each its own, in small letters.
fn check_names(names: &[&str]) {
    let own: BTreeSet<_> = names.iter().collect();
    assert_eq!(own.len(), names.len(), "{names:?}");
    let plain =
        |name: &&str| name.len() > 1 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    assert!(names.iter().all(plain), "{names:?}");
}

#[test]
fn everything_that_is_counted_has_a_name_of_its_own() {
    check_names(&ResumeMode::ALL.map(ResumeMode::name));
    check_names(&RequestIds::ALL.map(RequestIds::name));
    check_names(
        &[Strategy::Exact, Strategy::ExactTranslated, Strategy::Text, Strategy::Replay].map(Strategy::name),
    );
    check_names(
        &[
            NotArmed::Off,
            NotArmed::Endpoint,
            NotArmed::Body,
            NotArmed::NotAStream,
            NotArmed::Choices,
            NotArmed::Stateful,
        ]
        .map(NotArmed::name),
    );
    check_names(
        &[
            Refused::Complete,
            Refused::Overflow,
            Refused::Unreadable,
            Refused::ResumesExhausted,
            Refused::StrategiesExhausted,
            Refused::ReplayTooLong,
            Refused::NothingDelivered,
            Refused::ToolsBegun,
            Refused::Reasoning,
            Refused::Refusal,
            Refused::Grammar,
            Refused::Details,
            Refused::Prefilled,
            Refused::Prompt,
            Refused::Stop,
            Refused::Sampler,
            Refused::TrailingSpace,
            Refused::TokensUnknown,
            Refused::LimitReached,
            Refused::Body,
            Refused::Ids,
            Refused::Member,
            Refused::Engine,
        ]
        .map(Refused::name),
    );
    check_names(
        &[
            Abandon::Diverged,
            Abandon::Unsplittable,
            Abandon::Echo,
            Abandon::WrongModel,
            Abandon::Misfiled,
            Abandon::IdsIgnored,
            Abandon::Choices,
            Abandon::Unreadable,
            Abandon::Failed,
            Abandon::EndedEarly,
            Abandon::Overtaken,
            Abandon::NoLeg,
        ]
        .map(Abandon::name),
    );
}

#[test]
fn a_refused_policy_says_why_and_the_smallest_journal_is_none() {
    let at_least = ResumePolicy { journal_bytes_max: 1 << 10, ..ResumePolicy::default() };
    assert_eq!(at_least.validate(), Ok(()));
    assert_eq!(
        ResumePolicy { journal_bytes_max: (1 << 10) - 1, ..at_least }.validate(),
        Err(BadResumePolicy::TinyJournal)
    );
    assert!(BadResumePolicy::TinyJournal.to_string().contains("journal_bytes_max"));
    assert!(BadResumePolicy::NoResumes.to_string().contains("resumes_max"));
}

#[test]
fn only_ollama_tells_its_events_by_lines() {
    let is_lines = |endpoint, body: &str| {
        Splice::arm(endpoint, body.as_bytes(), &ResumePolicy::default()).unwrap().is_lines()
    };
    assert!(is_lines(Endpoint::OllamaChat, "{}"));
    assert!(!is_lines(Endpoint::ChatCompletions, r#"{"stream":true}"#));
    assert!(!is_lines(Endpoint::AnthropicMessages, r#"{"stream":true}"#));
}

const SAID: &str = "Once upon a time there was a replica";

#[test]
fn what_a_leg_holds_back_is_counted() {
    // A replay: the beginning of an event.
    let mut stream = Stream::chat(event(&format!(r#"{{"content":"{SAID}"}}"#)).as_bytes());
    let plan = stream.splice.plan(None, BODY).unwrap();
    stream.splice.begin_leg(&plan);
    let before = stream.splice.held();
    let half = format!("data: {{\"x\":\"{}", "y".repeat(700));
    stream.splice.feed(half.as_bytes(), &mut stream.got).unwrap();
    let held = stream.splice.held() - before;
    assert!((half.len()..2 * half.len()).contains(&held), "{held}");

    // A continuation: what it was given, events that may be an echo of it, and the beginning of another.
    let mut stream = Stream::chat(event(&format!(r#"{{"content":"{SAID}"}}"#)).as_bytes());
    let without = stream.splice.held();
    let plan = stream.splice.plan(Some(Engine::Vllm), BODY).unwrap();
    assert_eq!(plan.strategy, Strategy::Text);
    let planned = stream.splice.held();
    assert!(planned >= without + SAID.len(), "{without} {planned}");
    stream.splice.begin_leg(&plan);
    assert!(stream.splice.held() >= planned, "the seam is the leg's now");
    let echo = event(r#"{"content":"Once upon"}"#);
    stream.splice.feed(echo.as_bytes(), &mut stream.got).unwrap();
    let waiting = stream.splice.held();
    assert!(waiting >= planned + echo.len() - "data: \n\n".len(), "{planned} {waiting}");
    stream.splice.feed(half.as_bytes(), &mut stream.got).unwrap();
    assert!(stream.splice.held() >= waiting + half.len());
    assert_eq!(stream.got, event(&format!(r#"{{"content":"{SAID}"}}"#)).as_bytes());
}

#[test]
fn a_second_leg_is_counted_while_it_is_held() {
    let mut stream = Stream::chat(event(&format!(r#"{{"content":"{SAID}"}}"#)).as_bytes());
    let plan = stream.splice.plan_beside(None, BODY).unwrap();
    stream.splice.begin_beside(&plan);
    let before = stream.splice.held();
    let half = format!("data: {{\"x\":\"{}", "y".repeat(700));
    stream.splice.feed_beside(half.as_bytes(), &mut stream.got).unwrap();
    assert!(stream.splice.held() >= before + half.len());
    stream.splice.drop_beside();
    assert!(stream.splice.held() <= before);
}

#[test]
fn what_the_journal_keeps_is_counted() {
    let name = "n".repeat(300);
    let mut stream = Stream::chat(b"");
    let mut held = stream.splice.held();
    for (data, least) in [
        (format!(r#"{{"id":"{name}","choices":[]}}"#), 300),
        (format!(r#"{{"created":"{name}","choices":[]}}"#), 300),
        (format!(r#"{{"model":"{name}","choices":[]}}"#), 300),
        (format!(r#"{{"system_fingerprint":"{name}","choices":[]}}"#), 300),
        (format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{name}"}}}}]}}"#), 300),
        (
            format!(
                r#"{{"choices":[{{"index":0,"delta":{{"tool_calls":[{{"index":0,"id":"{name}"}}]}}}}]}}"#
            ),
            300,
        ),
    ] {
        stream.splice.observe(data.as_bytes(), &unread());
        let now = stream.splice.held();
        assert!(now >= held + least && now < held + 4 * least, "{held} {now}: {data}");
        held = now;
    }
}

#[test]
fn how_far_an_abandoned_replay_went_is_told_and_whether_the_answer_ended() {
    let mut stream = Stream::chat(event(r#"{"content":"abcdef"}"#).as_bytes());
    assert_eq!((stream.splice.text_from(4), stream.splice.text_from(9)), (&b"ef"[..], &b""[..]));
    let leg = event(r#"{"content":"abc"}"#) + &event(r#"{"content":"xyz"}"#);
    assert_eq!(stream.replay(leg.as_bytes()), Err(Abandon::Diverged));
    assert_eq!(stream.splice.repeated(), 3);
    assert!(!stream.splice.is_finished());
    let end = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    stream.splice.observe(end.as_bytes(), &unread());
    assert!(stream.splice.is_finished() && !stream.splice.is_done());
}

/// A completion of which so many chunks of one token were told, and behind them one of two tokens with `more`.
fn told_with_ids(engine: Engine, body: &str, tokens: usize, more: &str) -> Splice {
    let mut splice = Splice::arm(Endpoint::Completions, body.as_bytes(), &ResumePolicy::default()).unwrap();
    splice.tells_ids(engine, true);
    let block = |data: &str| format!("data: {data}\n\n");
    let mut wire = block(r#"{"choices":[{"index":0,"text":"","prompt_token_ids":[7,8]}]}"#);
    for id in 0..tokens {
        wire += &block(&format!(r#"{{"choices":[{{"index":0,"text":"a","token_ids":[{id}]}}]}}"#));
    }
    if !more.is_empty() {
        wire += &block(&format!(r#"{{"choices":[{{"index":0,"text":"{more}","token_ids":[1,2]}}]}}"#));
    }
    tell(&mut splice, &mut EventReader::new(Endpoint::Completions), wire.as_bytes());
    splice
}

#[test]
fn only_a_little_is_said_again_behind_a_seam() {
    let body = r#"{"model":"m","stream":true,"prompt":"p","max_tokens":50}"#;
    let peers = Peers { engine: Some(Engine::Vllm), text: false, ids: true, context_max: Some(1000) };
    for (again, expected) in [
        (0, Ok(Strategy::Exact)),
        (512, Ok(Strategy::Exact)),
        (513, Err(Refused::Ids)),
        (900, Err(Refused::Ids)),
    ] {
        let mut splice = told_with_ids(Engine::Vllm, body, 2, &"x".repeat(again));
        splice.withdraw(Strategy::Replay);
        splice.withdraw(Strategy::Text);
        let plan = splice.plan(peers, body.as_bytes());
        assert_eq!(plan.map(|plan| plan.strategy), expected, "{again}");
    }
}

#[test]
fn ids_tell_how_many_tokens_are_left_to_a_continued_text() {
    let body = r#"{"model":"m","stream":true,"prompt":"p","max_tokens":50}"#;
    let mut splice = told_with_ids(Engine::Vllm, body, 3, "");
    let plan = splice.plan(Some(Engine::Vllm), body.as_bytes()).unwrap();
    let asked: Value = serde_json::from_slice(&plan.body.unwrap()).unwrap();
    assert_eq!((plan.strategy, &asked["max_tokens"]), (Strategy::Text, &json!(47)));
    // Its last token may have begun a character: how many there are behind the text is not known.
    let mut splice = told_with_ids(Engine::Vllm, body, 3, "xy");
    splice.withdraw(Strategy::Replay);
    assert_eq!(splice.plan(Some(Engine::Vllm), body.as_bytes()), Err(Refused::TokensUnknown));
}

#[test]
fn a_completion_without_a_limit_ends_where_its_engine_ends_it() {
    let body = r#"{"model":"m","stream":true,"prompt":"p"}"#;
    for (engine, tokens, ends) in [
        (Engine::Vllm, 15, false),
        (Engine::Vllm, 16, true),
        (Engine::Vllm, 17, false),
        (Engine::LlamaCpp, 16, false),
    ] {
        let mut splice = told_with_ids(engine, body, tokens, "");
        let mut out = Vec::new();
        assert_eq!(splice.end_at_limit(body.as_bytes(), &mut out), ends, "{engine:?} {tokens}");
        assert_eq!(View::of(&out).finishes.first().map(String::as_str), ends.then_some("length"));
    }
    // What has ended, or is not understood, is left alone.
    for more in [
        r#"{"choices":[{"index":0,"text":"","finish_reason":"stop","token_ids":[]}]}"#,
        r#"{"choices":[{"index":1,"text":"x"}]}"#,
    ] {
        let mut splice = told_with_ids(Engine::Vllm, body, 16, "");
        splice.observe(more.as_bytes(), &unread());
        assert!(!splice.end_at_limit(body.as_bytes(), &mut Vec::new()), "{more}");
    }
}

#[test]
fn a_line_of_more_calls_than_were_told_is_not_taken_for_the_same() {
    let line = |calls: &str| {
        format!(
            r#"{{"model":"m","message":{{"role":"assistant","content":"","tool_calls":[{calls}]}},"done":false}}"#
        )
    };
    let (one, two) = (r#"{"function":{"name":"f"}}"#, r#"{"function":{"name":"g"}}"#);
    let mut splice = Splice::arm(Endpoint::OllamaChat, b"{}", &ResumePolicy::default()).unwrap();
    splice.observe(line(one).as_bytes(), &unread());
    let plan = splice.plan(None, b"{}").unwrap();
    splice.begin_leg(&plan);
    let (mut out, both) = (Vec::new(), line(&format!("{one},{two}")) + "\n");
    assert_eq!(splice.feed(both.as_bytes(), &mut out), Err(Abandon::Diverged));
    assert!(out.is_empty());
}

const UNKNOWN: &str = r#"{"audio":{"data":"x"}}"#;

#[test]
fn what_is_not_understood_of_a_later_leg_ends_resuming() {
    for (engine, said, strategy) in [
        (None, r#"{"content":"abc"}"#, Strategy::Replay),
        (Some(Engine::Vllm), r#"{"content":"c"}"#, Strategy::Text),
    ] {
        // Before it has spoken: it is given up.
        let mut stream = Stream::chat(event(r#"{"content":"ab"}"#).as_bytes());
        let plan = stream.splice.plan(engine, BODY).unwrap();
        assert_eq!(plan.strategy, strategy);
        assert_eq!(stream.leg(&plan, event(UNKNOWN).as_bytes()), Err(Abandon::Unreadable));
        // Behind that: the client gets it, and nothing can be compared any more.
        let mut stream = Stream::chat(event(r#"{"content":"ab"}"#).as_bytes());
        let plan = stream.splice.plan(engine, BODY).unwrap();
        stream.leg(&plan, (event(said) + &event(UNKNOWN) + &event(r#"{"content":"d"}"#)).as_bytes()).unwrap();
        assert_eq!(stream.view().text(), "abcd");
        assert!(stream.got.windows(5).any(|bytes| bytes == b"audio"));
        assert_eq!(stream.splice.plan(engine, BODY), Err(Refused::Unreadable), "{strategy:?}");
    }
}

#[test]
fn new_text_stays_as_its_engine_wrote_it() {
    let mut stream = Stream::chat(event(r#"{"content":"ab"}"#).as_bytes());
    let odd = event(r#"{"content":"\u0063\/"}"#);
    stream.replay((event(r#"{"content":"ab"}"#) + &odd).as_bytes()).unwrap();
    assert!(stream.got.ends_with(odd.as_bytes()), "{}", String::from_utf8_lossy(&stream.got));
}

#[test]
fn text_behind_a_finish_is_not_passed_on_with_its_usage() {
    let mut stream = Stream::chat(event(r#"{"content":"a"}"#).as_bytes());
    let leg = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}\n\n\
               data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b\"}}],\"usage\":{\"completion_tokens\":2}}\n\n";
    stream.replay(leg.as_bytes()).unwrap();
    assert_eq!((stream.view().text().as_str(), stream.view().usage), ("a", None));
}

#[test]
fn usage_that_is_not_known_is_not_told() {
    let end = |choices: &str| {
        format!(
            "data: {{\"choices\":[{choices}],\"usage\":{{\"prompt_tokens\":9,\"completion_tokens\":2}}}}\n\n"
        )
    };
    let finish = r#"{"index":0,"delta":{},"finish_reason":"stop"}"#;
    let mut stream = Stream::chat(event(r#"{"content":"a"}"#).as_bytes());
    let plan = stream.splice.plan(Some(Engine::Vllm), BODY).unwrap();
    stream.leg(&plan, (event(r#"{"content":"b"}"#) + &end(finish) + &end("")).as_bytes()).unwrap();
    // Beside a finish there is `null`, and an event of usage alone is left out.
    let events = events(&stream.got);
    let last: Value = serde_json::from_slice(events.last().unwrap()).unwrap();
    assert_eq!((events.len(), &last["usage"], last["choices"].is_array()), (3, &Value::Null, true));
    assert_eq!(stream.view().finishes, ["stop"]);
}

#[test]
fn an_end_that_is_written_here_is_in_the_words_of_its_api() {
    for (endpoint, object, choice) in [
        (Endpoint::ChatCompletions, "chat.completion.chunk", "delta"),
        (Endpoint::Completions, "text_completion", "text"),
    ] {
        for wanted in [false, true] {
            let body = format!(
                r#"{{"model":"m","stream":true,"prompt":"p","messages":[{{"role":"user","content":"p"}}],"max_tokens":2,"stream_options":{{"include_usage":{wanted}}}}}"#
            );
            let mut splice = Splice::arm(endpoint, body.as_bytes(), &ResumePolicy::default()).unwrap();
            splice.tells_ids(Engine::Vllm, true);
            for (text, ids) in [
                ("", r#""prompt_token_ids":[7,8,9]"#),
                ("a", r#""token_ids":[1]"#),
                ("b", r#""token_ids":[2]"#),
            ] {
                splice.observe(
                    format!(r#"{{"choices":[{{"index":0,"text":"{text}",{ids}}}]}}"#).as_bytes(),
                    &unread(),
                );
            }
            let mut out = Vec::new();
            assert!(splice.end_at_limit(body.as_bytes(), &mut out), "{endpoint:?}");
            let events = events(&out);
            let end: Value = serde_json::from_slice(&events[0]).unwrap();
            assert_eq!(end["object"], object);
            assert!(end["choices"][0].get(choice).is_some(), "{end}");
            let usage = json!({"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2});
            assert_eq!(View::of(&out).usage, wanted.then_some(usage));
        }
    }
}

#[test]
fn ids_that_the_client_has_seen_are_not_drawn_again() {
    let body = r#"{"model":"m","stream":true,"prompt":"p","max_tokens":50,"return_token_ids":true}"#;
    let peers = Peers { engine: Some(Engine::Vllm), text: false, ids: true, context_max: Some(1000) };
    for (more, expected) in [
        ("", Ok(Strategy::Exact)),
        (r#"{"choices":[{"index":0,"text":"xy","token_ids":[1,2]}]}"#, Err(Refused::Ids)),
        // A token without text.
        (r#"{"choices":[{"index":0,"text":"","token_ids":[1]}]}"#, Err(Refused::Ids)),
    ] {
        let mut splice = told_with_ids(Engine::Vllm, body, 2, "");
        splice.journal.ids_are_ours = false;
        splice.withdraw(Strategy::Replay);
        splice.withdraw(Strategy::Text);
        if !more.is_empty() {
            splice.observe(more.as_bytes(), &unread());
        }
        assert_eq!(splice.plan(peers, body.as_bytes()).map(|plan| plan.strategy), expected, "{more}");
    }
}

/// The first event of a leg that continues the ids of [`told_with_ids`], of which it was given two.
const TAKEN: &str = r#"{"choices":[{"index":0,"text":"b","prompt_token_ids":[7,8,0,1],"token_ids":[5]}]}"#;

fn by_ids() -> Peers {
    Peers { engine: Some(Engine::Vllm), text: false, ids: true, context_max: Some(1000) }
}

#[test]
fn what_is_not_understood_of_a_leg_that_continues_ids_ends_resuming() {
    let body = r#"{"model":"m","stream":true,"prompt":"p","max_tokens":50}"#;
    let mut splice = told_with_ids(Engine::Vllm, body, 2, "");
    let plan = splice.plan(by_ids(), body.as_bytes()).unwrap();
    assert_eq!(plan.strategy, Strategy::Exact);
    splice.begin_leg(&plan);
    let (unknown, more) = (r#"{"choices":[7]}"#, r#"{"choices":[{"index":0,"text":"c","token_ids":[6]}]}"#);
    let leg = format!("data: {TAKEN}\n\ndata: {unknown}\n\ndata: {more}\n\n");
    let mut out = Vec::new();
    splice.feed(leg.as_bytes(), &mut out).unwrap();
    assert_eq!((View::of(&out).text().as_str(), splice.text_from(0)), ("bc", &b"aabc"[..]));
    assert_eq!(splice.plan(by_ids(), body.as_bytes()), Err(Refused::Unreadable));
}

#[test]
fn a_third_leg_is_given_the_ids_of_the_second() {
    let body = r#"{"model":"m","stream":true,"prompt":"p","max_tokens":50}"#;
    let mut splice = told_with_ids(Engine::Vllm, body, 2, "");
    let plan = splice.plan(by_ids(), body.as_bytes()).unwrap();
    splice.begin_leg(&plan);
    splice.feed(format!("data: {TAKEN}\n\n").as_bytes(), &mut Vec::new()).unwrap();
    let plan = splice.plan(by_ids(), body.as_bytes()).unwrap();
    let asked: Value = serde_json::from_slice(&plan.body.unwrap()).unwrap();
    assert_eq!((&asked["prompt"], &asked["max_tokens"]), (&json!([7, 8, 0, 1, 5]), &json!(47)));
}

#[test]
fn the_ids_of_a_second_leg_are_counted() {
    let body = r#"{"model":"m","stream":true,"prompt":"p","max_tokens":9000}"#;
    let peers = Peers { context_max: Some(20_000), ..by_ids() };
    let mut splice = told_with_ids(Engine::Vllm, body, 1000, "");
    let without = splice.held();
    let plan = splice.plan_beside(peers, body.as_bytes()).unwrap();
    assert_eq!(plan.strategy, Strategy::Exact);
    splice.begin_beside(&plan);
    assert!(splice.held() >= without + 4 * 1000, "{without} {}", splice.held());
}

#[test]
fn the_usage_of_a_continued_text_counts_the_prompt_by_its_ids() {
    let body =
        r#"{"model":"m","stream":true,"prompt":"p","max_tokens":50,"stream_options":{"include_usage":true}}"#;
    let mut splice = told_with_ids(Engine::Vllm, body, 3, "");
    let plan = splice.plan(Some(Engine::Vllm), body.as_bytes()).unwrap();
    assert_eq!(plan.strategy, Strategy::Text);
    splice.begin_leg(&plan);
    let leg = "data: {\"choices\":[{\"index\":0,\"text\":\"bc\",\"finish_reason\":\"stop\"}]}\n\n\
               data: {\"choices\":[],\"usage\":{\"prompt_tokens\":90,\"completion_tokens\":4}}\n\n";
    let mut out = Vec::new();
    splice.feed(leg.as_bytes(), &mut out).unwrap();
    let whole = json!({"prompt_tokens": 2, "total_tokens": 9, "completion_tokens": 7});
    assert_eq!(View::of(&out).usage, Some(whole));
}

#[test]
fn an_event_that_says_nothing_new_is_not_told_again() {
    let said = event(r#"{"role":"assistant","content":"ab"}"#)
        + &event(r#"{"tool_calls":[{"index":0,"id":"A","function":{"name":"f"}}]}"#);
    let known = event(r#"{"tool_calls":[{"index":0,"id":"B"}]}"#);
    let usage = "data: {\"choices\":[{\"index\":0,\"delta\":{}}],\"usage\":{\"completion_tokens\":2}}\n\n";
    for silent in [&known[..], usage] {
        let mut stream = Stream::chat(said.as_bytes());
        stream.replay((said.clone() + silent).as_bytes()).unwrap();
        assert_eq!(stream.got, said.as_bytes(), "{silent}");
    }
    let without_role = event(r#"{"content":"ab"}"#);
    let mut stream = Stream::chat(without_role.as_bytes());
    stream.replay((without_role.clone() + usage).as_bytes()).unwrap();
    assert_eq!(stream.got, without_role.as_bytes());
    // A call that is announced by its id alone is new.
    let other = event(r#"{"tool_calls":[{"index":1,"id":"B"}]}"#);
    let mut stream = Stream::chat(said.as_bytes());
    stream.replay((said.clone() + &other).as_bytes()).unwrap();
    assert_eq!(stream.got, (said + &other).as_bytes());
}

#[test]
fn no_role_is_told_within_an_answer() {
    let said = event(r#"{"content":"ab"}"#);
    for first in [r#"{"role":"assistant","content":""}"#, r#"{"role":"assistant","content":"ab"}"#] {
        let mut stream = Stream::chat(said.as_bytes());
        let leg = event(first) + &event(r#"{"content":"ab"}"#);
        let leg = if first.contains("ab") { event(first) } else { leg };
        stream.replay(leg.as_bytes()).unwrap();
        assert_eq!(stream.got, said.as_bytes(), "{first}");
    }
}

#[test]
fn a_token_across_the_seam_is_not_told_with_its_log_probability() {
    let token = |text: &str| {
        format!(
            "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"logprobs\":{{\"content\":[{{}}]}}}}]}}\n\n"
        )
    };
    let mut stream = Stream::chat(token("ab").as_bytes());
    assert_eq!(stream.replay((token("a") + &token("bc")).as_bytes()), Err(Abandon::Unsplittable));
    assert_eq!(stream.got, token("ab").as_bytes());
}

#[test]
fn another_call_under_a_known_index_keeps_its_id() {
    let begin = |id: &str, name: &str| {
        event(&format!(r#"{{"tool_calls":[{{"index":0,"id":"{id}","function":{{"name":"{name}"}}}}]}}"#))
    };
    let mut stream = Stream::chat(begin("A", "f").as_bytes());
    stream.replay((begin("B", "f") + &begin("C", "g")).as_bytes()).unwrap();
    assert_eq!(stream.got, (begin("A", "f") + &begin("C", "g")).as_bytes());
}

#[test]
fn a_version_is_written_as_it_is_read() {
    let version = super::super::Version(0, 10, 2);
    assert_eq!(
        (version.to_string().as_str(), super::super::Version::parse("0.10.2")),
        ("0.10.2", Some(version))
    );
}
