//! What a client makes of a stream, and what no client may ever see.
//!
//! Rules that need no knowledge of the answer: whole events of valid JSON, one role, one finish, nothing said behind
//! it, one `[DONE]` and last, one identity, at most one error event and nothing behind it. Whether the text is the
//! right one is the caller's to compare.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::client::{Answer, End};

/// A stream as its client understood it.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub text: String,
    pub roles: usize,
    pub finishes: Vec<String>,
    pub usage: Option<Value>,
    pub done: usize,
    pub errors: Vec<Value>,
    /// First value of `id`, `model`, `created`, `system_fingerprint`.
    pub names: BTreeMap<&'static str, Value>,
    /// What must not be, in words.
    pub wrong: Vec<String>,
}

/// How strictly one voice is demanded: engines themselves differ in this.
#[derive(Clone, Copy, Debug, Default)]
pub struct Voice {
    /// `created` is the same in each event.
    pub created_is_constant: bool,
    /// Each event says the role.
    pub role_in_each: bool,
}

/// How a stream ended for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A finish and the terminator.
    Whole,
    /// An error event.
    Error,
}

impl View {
    pub fn of(answer: &Answer, voice: Voice) -> Self {
        let mut view = Self::default();
        if answer.end != End::Clean {
            view.wrong.push(format!("the body was cut: {:?}", answer.end));
        }
        if std::str::from_utf8(&answer.body).is_err() {
            view.wrong.push("half a character".to_owned());
        }
        let body = answer.text();
        // The last line of an event that was cut behind its CR is whole all the same.
        if !body.is_empty() && !["\n\n", "\r\n\r\n", "\r\n\r"].iter().any(|end| body.ends_with(end)) {
            view.wrong.push(format!("half an event at the end: {:?}", tail(&body)));
        }
        for event in answer.events() {
            view.hear(event.data.trim(), voice);
        }
        view
    }

    fn hear(&mut self, data: &str, voice: Voice) {
        if self.done > 0 || !self.errors.is_empty() {
            self.wrong.push(format!("behind the end: {data}"));
        }
        if data == "[DONE]" {
            self.done += 1;
            return;
        }
        let Ok(chunk) = serde_json::from_str::<Value>(data) else {
            return self.wrong.push(format!("no JSON: {data}"));
        };
        if !chunk["error"].is_null() || chunk["object"] == "error" {
            if chunk["error"]["message"].as_str().is_none_or(str::is_empty) {
                self.wrong.push(format!("an error without words: {data}"));
            }
            self.errors.push(chunk["error"].clone());
            return;
        }
        for name in ["id", "model", "created", "system_fingerprint"] {
            let value = &chunk[name];
            if value.is_null() {
                continue;
            }
            let first = self.names.entry(name).or_insert_with(|| value.clone());
            if first != value && (name != "created" || voice.created_is_constant) {
                self.wrong.push(format!("{name} was {first} and is {value}"));
            }
        }
        if chunk["usage"].is_object() {
            self.usage = Some(chunk["usage"].clone());
        }
        let choices = chunk["choices"].as_array().cloned().unwrap_or_default();
        if choices.len() > 1 {
            self.wrong.push(format!("more than one choice: {data}"));
        }
        for choice in choices {
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            if !text.is_empty() && !self.finishes.is_empty() {
                self.wrong.push(format!("text behind the finish: {data}"));
            }
            self.text += text;
            if choice["delta"]["role"].is_string() {
                self.roles += 1;
                if self.roles > 1 && !voice.role_in_each {
                    self.wrong.push(format!("the role again: {data}"));
                }
            }
            if let Some(finish) = choice["finish_reason"].as_str() {
                if !self.finishes.is_empty() || matches!(finish, "abort" | "error") {
                    self.wrong.push(format!("finish {finish} after {:?}", self.finishes));
                }
                self.finishes.push(finish.to_owned());
            }
        }
    }

    /// How it ended; none of the two is a violation, for it looks like an end and is none.
    pub fn fate(&mut self) -> Option<Fate> {
        match (self.finishes.len(), self.done, self.errors.len()) {
            (1, 1, 0) => Some(Fate::Whole),
            (0, 0, 1) => Some(Fate::Error),
            counts => {
                self.wrong.push(format!("(finishes, terminators, errors) are {counts:?}"));
                None
            }
        }
    }
}

fn tail(text: &str) -> String {
    let tail: Vec<char> = text.chars().rev().take(60).collect();
    tail.into_iter().rev().collect()
}

#[test]
fn what_must_not_be_is_seen() {
    let wrongs = |datas: &[&str]| {
        let voice = Voice { created_is_constant: true, role_in_each: false };
        let mut view = View::default();
        datas.iter().for_each(|data| view.hear(data, voice));
        view.fate();
        view.wrong.len()
    };
    let token =
        r#"{"id":"a","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":"x"}}]}"#;
    let more = r#"{"id":"a","created":1,"choices":[{"index":0,"delta":{"content":"y"}}]}"#;
    let finish = r#"{"id":"a","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    let abort = r#"{"id":"a","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"abort"}]}"#;
    let error = r#"{"error":{"message":"lost"}}"#;
    assert_eq!(wrongs(&[token, more, finish, "[DONE]"]), 0);
    assert_eq!(wrongs(&[token, more, error]), 0);
    for bad in [
        &[token, more] as &[&str],
        &[token, finish],
        &[token, more, "[DONE]"],
        &[token, error, "[DONE]"],
        &[token, finish, error],
        &[token, finish, finish, "[DONE]"],
        &[token, finish, more, "[DONE]"],
        &[token, token, finish, "[DONE]"],
        &[token, finish, "[DONE]", "[DONE]"],
        &[token, abort, "[DONE]"],
        &[token, "{", finish, "[DONE]"],
        &[token, r#"{"id":"b","created":1,"choices":[]}"#, finish, "[DONE]"],
        &[token, r#"{"id":"a","created":2,"choices":[]}"#, finish, "[DONE]"],
    ] {
        assert_ne!(wrongs(bad), 0, "{bad:?}");
    }
}
