//! Which engine a backend runs, and which version, by its own word: what follows from that is `policy::resume`'s.
//!
//! Its list of models names the engine (`owned_by`), a page of the engine its version, and its tokenizer the ids of a
//! text, by which two tokenizers are told apart. Asked once, and again when another process may answer. A backend that
//! names no engine known here is asked nothing.

use std::time::Duration;

use serde_json::{Value, json};

use crate::policy::balance::stable_hash;
use crate::policy::dialect::Engine;
use crate::policy::resume::{Build, TOKENIZED, Version};
use crate::pool::{Listed, Member};
use crate::probe::ask::{self, Answered, Body};

/// For each of the two answers.
const TIMEOUT: Duration = Duration::from_secs(1);
/// SGLang tells its version among all its arguments.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// What `member`, which lists these models, runs. `None`: it does not say, or not now.
pub(super) async fn ask(member: &Member, listed: &Listed) -> Option<Build> {
    let first = listed.entries.first()?;
    let engine = engine(first.get("owned_by")?.as_str()?)?;
    let page = read(ask::get(member, version_page(engine), PAGE_BYTES_MAX, TIMEOUT).await.ok()?);
    let version = page.as_ref().and_then(|page| version(engine, page));
    let mut build = Build { engine, version, ids_print: None };
    if build.continues_ids() {
        let question = json!({"model": listed.ids.first(), "prompt": TOKENIZED}).to_string();
        let answer = ask::post(member, "/tokenize", question, PAGE_BYTES_MAX, TIMEOUT).await;
        build.ids_print = answer.ok().and_then(read).as_ref().and_then(print_of);
    }
    Some(build)
}

/// By the word at `owned_by`.
fn engine(owner: &str) -> Option<Engine> {
    match owner {
        "vllm" => Some(Engine::Vllm),
        "sglang" => Some(Engine::Sglang),
        "llamacpp" => Some(Engine::LlamaCpp),
        _ => None,
    }
}

fn version_page(engine: Engine) -> &'static str {
    match engine {
        Engine::Sglang => "/get_server_info",
        Engine::LlamaCpp => "/props",
        Engine::Vllm | Engine::Tgi | Engine::Triton | Engine::Ollama => "/version",
    }
}

fn version(engine: Engine, page: &Value) -> Option<Version> {
    let member = if engine == Engine::LlamaCpp { "build_info" } else { "version" };
    Version::parse(page.get(member)?.as_str()?)
}

fn print_of(answer: &Value) -> Option<u64> {
    let tokens =
        answer.get("tokens").filter(|tokens| tokens.as_array().is_some_and(|list| !list.is_empty()))?;
    Some(stable_hash(tokens.to_string().as_bytes()))
}

fn read(answer: Answered) -> Option<Value> {
    match answer.body {
        Body::Whole(body) if answer.status.is_success() => serde_json::from_slice(&body).ok(),
        Body::Whole(_) | Body::Beginning(_) | Body::Broken(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_tell_their_versions_in_their_own_ways() {
        for (owner, page, told) in [
            ("vllm", json!({"version": "0.11.0"}), Some(Version(0, 11, 0))),
            ("sglang", json!({"version": "0.5.20", "model_path": "m"}), Some(Version(0, 5, 20))),
            ("llamacpp", json!({"build_info": "b6550-abc", "version": "9.9.9"}), Some(Version(0, 0, 6550))),
            ("llamacpp", json!({"build_info": "b0-unknown"}), None),
            ("vllm", json!({"version": 1}), None),
            ("vllm", json!([]), None),
        ] {
            assert_eq!(version(engine(owner).unwrap(), &page), told, "{owner} {page}");
        }
        assert_eq!(engine("test"), None);
    }

    #[test]
    fn a_print_is_that_of_the_tokens() {
        let print = |answer: Value| print_of(&answer);
        assert_eq!(print(json!({"tokens": [1, 2], "count": 2})), print(json!({"tokens": [1, 2]})));
        assert_ne!(print(json!({"tokens": [1, 2]})), print(json!({"tokens": [1, 3]})));
        assert_eq!(print(json!({"tokens": []})), None);
        assert_eq!(print(json!({"detail": "Not Found"})), None);
    }
}
