//! A leg begun beside one that still speaks, in any interleaving of the two, against the uncut stream.

use serde_json::json;

use super::super::model::{Answer, Skin, Voice, generate, wire};
use super::super::{Abandon, ResumePolicy, Strategy};
use super::{Stream, TEXT, View, answers, cuts, events, open_cuts, prompts, unread};
use crate::policy::dialect::Endpoint;

/// The blocks of a wire, whole.
fn blocks(wire: &[u8]) -> Vec<&[u8]> {
    let cuts = cuts(wire);
    cuts.windows(2).map(|pair| &wire[pair[0]..pair[1]]).collect()
}

impl Stream {
    fn old_leg(&mut self, block: &[u8]) {
        for data in events(block) {
            self.splice.observe(&data, &unread());
        }
        self.got.extend_from_slice(block);
    }
}

/// Begins `second` beside `first` behind `cut`, and lets one or the other go on as the dice say. Returns how much of
/// the first was told, and whether the second took over.
fn race(
    stream: &mut Stream,
    first: &[u8],
    second: &[u8],
    cut: usize,
    mut dice: fastrand::Rng,
) -> (usize, bool) {
    let plan = stream.splice.plan_beside(None, &stream.body).unwrap();
    assert!(!plan.needs_stillness());
    stream.splice.begin_beside(&plan);
    let (mut old, mut new) = (blocks(&first[cut..]).into_iter(), blocks(second).into_iter());
    let slower = dice.f64();
    loop {
        if dice.f64() < slower {
            let block = old.next().expect("it has a finish");
            stream.old_leg(block);
            if View::of(&stream.got).finishes.is_empty() {
                continue;
            }
            // All has been said: what the new leg still says is for nobody.
            if let Some(block) = new.next() {
                let mut out = Vec::new();
                assert_eq!(stream.splice.feed_beside(block, &mut out), Err(Abandon::Overtaken));
                assert_eq!(out, b"");
            }
            stream.splice.drop_beside();
            old.for_each(|block| stream.old_leg(block));
            return (stream.got.len(), false);
        }
        let had = stream.got.len();
        let block = new.next().expect("it speaks before it ends");
        stream.splice.feed_beside(block, &mut stream.got).unwrap();
        if stream.got.len() > had {
            stream.splice.prefer_beside();
            for block in new {
                stream.splice.feed(block, &mut stream.got).unwrap();
            }
            return (had, true);
        }
    }
}

#[test]
fn a_replay_beside_a_leg_that_speaks_makes_one_stream_whichever_is_faster() {
    let (mut taken, mut kept) = (0, 0);
    for (nth, answer) in answers().into_iter().enumerate() {
        for skin in Skin::ALL {
            for (tokens, again) in [(1, 1), (2, 3), (3, 0), (0, 1)] {
                let first = wire(&answer, Voice::new(skin, 1, tokens));
                let second = wire(&answer, Voice::new(skin, 2, again));
                let uncut = View::of(&first);
                for (place, cut) in open_cuts(&first).into_iter().enumerate().step_by(2) {
                    let note = format!("{nth} {skin:?} {tokens} {again} at {cut}");
                    let dice = fastrand::Rng::with_seed((nth * 1000 + place) as u64);
                    let mut stream = Stream::chat(&first[..cut]);
                    let (told, took_over) = race(&mut stream, &first, &second, cut, dice);
                    *(if took_over { &mut taken } else { &mut kept }) += 1;
                    let mut uncut = uncut.clone();
                    uncut.usage = stream.view().usage;
                    assert!(uncut.usage.is_some() == View::of(&first).usage.is_some(), "{note}");
                    stream.check(&uncut, &first[..told], &note);
                }
            }
        }
    }
    assert!(taken > 100 && kept > 100, "{taken} {kept}");
}

#[test]
fn a_leg_that_differs_from_what_was_said_meanwhile_writes_nothing() {
    let first = wire(&Answer::text(TEXT), Voice::new(Skin::Vllm, 1, 1));
    let half = cuts(&first)[10];
    for (at, letter) in TEXT.char_indices().filter(|(_, letter)| *letter != '#') {
        let mut other = TEXT.to_owned();
        other.replace_range(at..at + letter.len_utf8(), "#");
        let second = wire(&Answer::text(&other), Voice::new(Skin::Vllm, 2, 2));
        let mut stream = Stream::chat(&first[..half]);
        let plan = stream.splice.plan_beside(None, &stream.body).unwrap();
        stream.splice.begin_beside(&plan);
        // The old leg is always a token ahead, and ends first.
        let mut old = blocks(&first[half..]).into_iter();
        let mut diverged = false;
        for block in blocks(&second) {
            old.by_ref().take(3).for_each(|block| stream.old_leg(block));
            let mut out = Vec::new();
            match stream.splice.feed_beside(block, &mut out) {
                Ok(_) => {}
                Err(why) => {
                    diverged = why == Abandon::Diverged;
                    assert!(diverged || why == Abandon::Overtaken, "{why:?}");
                    break;
                }
            }
            assert_eq!(out, b"", "nothing of it is ahead");
        }
        old.for_each(|block| stream.old_leg(block));
        assert!(diverged || at * 2 > TEXT.len() / 2, "at {at}");
        assert_eq!(stream.view().text(), TEXT);
    }
}

#[test]
fn a_continuation_is_of_no_use_once_the_old_leg_has_gone_on() {
    let prompt = &prompts()[0];
    let body = json!({"stream": true, "messages": [{"role": "user", "content": prompt}]}).to_string();
    let body = body.as_bytes();
    let answer = generate(Skin::LlamaCpp, body).unwrap();
    let first = wire(&answer, Voice::new(Skin::LlamaCpp, 1, 1));
    let engine = Skin::LlamaCpp.engine();
    let mut continued = 0;
    for cut in open_cuts(&first) {
        for goes_on in [false, true] {
            let policy = ResumePolicy::default();
            let mut stream = Stream::begun(Endpoint::ChatCompletions, body, &policy, &first[..cut]);
            let plan = stream.splice.plan_beside(engine, body).unwrap();
            if plan.strategy != Strategy::Text {
                continue;
            }
            assert!(plan.needs_stillness());
            let rest = generate(Skin::LlamaCpp, plan.body.as_deref().unwrap()).unwrap();
            let second = wire(&rest, Voice::new(Skin::LlamaCpp, 2, 1));
            stream.splice.begin_beside(&plan);
            let mut old = blocks(&first[cut..]).into_iter();
            if goes_on {
                let before = stream.view().text();
                while stream.view().text() == before {
                    let Some(block) = old.next() else { break };
                    stream.old_leg(block);
                }
                let mut out = Vec::new();
                assert_eq!(stream.splice.feed_beside(&second, &mut out), Err(Abandon::Overtaken));
                assert_eq!(out, b"");
                old.for_each(|block| stream.old_leg(block));
            } else {
                stream.splice.feed_beside(&second, &mut stream.got).unwrap();
                stream.splice.prefer_beside();
            }
            let view = stream.view();
            assert_eq!((view.text(), view.done), (View::of(&first).text(), 1), "at {cut}");
            continued += 1;
        }
    }
    assert!(continued > 10, "{continued}");
}

#[test]
fn a_leg_beside_a_spliced_one_takes_over_like_beside_the_first() {
    let answer = Answer::text(TEXT);
    let legs = [1, 2, 3].map(|leg| wire(&answer, Voice::new(Skin::Vllm, leg, 1)));
    let uncut = View::of(&legs[0]);
    let all = cuts(&legs[0]);
    let (broke, moved) = (all[5], all[20]);
    for lead in 0..8 {
        let mut stream = Stream::chat(&legs[0][..broke]);
        stream.replay(&legs[1][..moved]).unwrap();
        let plan = stream.splice.plan_beside(None, &stream.body).unwrap();
        stream.splice.begin_beside(&plan);
        let mut old = blocks(&legs[1][moved..]).into_iter();
        old.by_ref().take(lead).for_each(|block| {
            stream.splice.feed(block, &mut stream.got).unwrap();
        });
        let mut new = blocks(&legs[2]).into_iter();
        loop {
            let had = stream.got.len();
            stream.splice.feed_beside(new.next().unwrap(), &mut stream.got).unwrap();
            if stream.got.len() > had {
                break;
            }
        }
        stream.splice.prefer_beside();
        new.for_each(|block| {
            stream.splice.feed(block, &mut stream.got).unwrap();
        });
        stream.check(&uncut, &legs[0][..broke], &format!("{lead} ahead"));
    }
}

#[test]
fn an_answer_that_outgrows_the_journal_cannot_be_compared() {
    let policy = ResumePolicy { journal_bytes_max: 1 << 10, ..ResumePolicy::default() };
    let first = wire(&Answer::text(&TEXT.repeat(40)), Voice::new(Skin::Vllm, 1, 1));
    let half = cuts(&first)[10];
    let mut stream = Stream::begun(Endpoint::ChatCompletions, super::BODY, &policy, &first[..half]);
    let plan = stream.splice.plan_beside(None, &stream.body).unwrap();
    stream.splice.begin_beside(&plan);
    for block in blocks(&first[half..]).into_iter().take(2000) {
        stream.old_leg(block);
    }
    let mut out = Vec::new();
    assert_eq!(stream.splice.feed_beside(&first, &mut out), Err(Abandon::Overtaken));
    assert_eq!(out, b"");
}
