//! Which builds of which engines continue an answer, and what makes two of them the same.
//!
//! A list, and no guess: an engine that answers a text instead of continuing it, or reads ids differently than it wrote
//! them, makes a wrong answer that nobody notices. A probe may find out that a build cannot; it never adds one. Read on
//! the sources of the versions named; the newest of each was the newest there was in November 2026.

use std::fmt;

use crate::policy::dialect::Engine;

/// A version, as far as it orders builds. llama.cpp's builds are numbers: `0.0.build`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// From `0.10.2`, `v0.5.17.post1`, `0.11.0rc2.dev3+g1`, or llama.cpp's `b6550-abcdef`. `None`: none of these, or
    /// llama.cpp's `b0-unknown`, which is a build that was not made in its repository and cannot tell.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Some(build) = text.strip_prefix('b') {
            let digits = build.split('-').next().unwrap_or_default();
            return digits.parse().ok().filter(|&build| build > 0).map(|build| Self(0, 0, build));
        }
        let mut numbers = text.strip_prefix('v').unwrap_or(text).split('.').map(|part| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse::<u32>().ok()
        });
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A range of builds that do something.
struct Tested {
    engine: Engine,
    first: Version,
    last: Version,
}

/// `continue_final_message`: vLLM since 0.6.4 (chat_completion/protocol.py), SGLang since 0.4 (serving_chat.py);
/// llama.cpp's prefill since #13174.
const TEXT: [Tested; 3] = [
    Tested { engine: Engine::Vllm, first: Version(0, 6, 4), last: Version(0, 33, u32::MAX) },
    Tested { engine: Engine::Sglang, first: Version(0, 4, 0), last: Version(0, 5, 23) },
    Tested { engine: Engine::LlamaCpp, first: Version(0, 0, 5200), last: Version(0, 0, 11_549) },
];

/// `return_token_ids` in streams, and lists of ids as prompts: vLLM since 0.10.2 (#22587), SGLang's completions since
/// 0.5.17 (#30917; 0.5.16 has it not).
const IDS: [Tested; 2] = [
    Tested { engine: Engine::Vllm, first: Version(0, 10, 2), last: Version(0, 33, u32::MAX) },
    Tested { engine: Engine::Sglang, first: Version(0, 5, 17), last: Version(0, 5, 23) },
];

/// What a backend runs, by its own word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// Of what kind.
    pub engine: Engine,
    /// Where it tells.
    pub version: Option<Version>,
    /// Hash of the ids it makes of [`TOKENIZED`], where it tells.
    pub ids_print: Option<u64>,
}

/// A text that tokenizers cut differently: words, numbers, scripts, spaces, bytes.
pub const TOKENIZED: &str = "HAVING 12345 naïve 漢字🦀\n\t  <|x|> can't";

impl Build {
    /// Whether it continues texts.
    pub fn continues_text(&self) -> bool {
        self.is_in(&TEXT)
    }

    /// Whether it tells ids and continues them.
    pub fn continues_ids(&self) -> bool {
        self.is_in(&IDS)
    }

    /// Whether ids of the other mean the same here, as far as is known.
    pub fn shares_ids_with(&self, other: &Self) -> bool {
        let prints = self.ids_print.zip(other.ids_print);
        self.engine == other.engine && prints.is_none_or(|(own, its)| own == its)
    }

    fn is_in(&self, list: &[Tested]) -> bool {
        self.version.is_some_and(|version| {
            list.iter().any(|one| one.engine == self.engine && (one.first..=one.last).contains(&version))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_engines_write_them() {
        for (text, version) in [
            ("0.10.2", Some(Version(0, 10, 2))),
            ("v0.5.17.post1", Some(Version(0, 5, 17))),
            ("0.11.0rc2.dev3+g123", Some(Version(0, 11, 0))),
            ("0.33", Some(Version(0, 33, 0))),
            ("b6550-abcdef", Some(Version(0, 0, 6550))),
            ("b0-unknown", None),
            ("", None),
            ("dev", None),
            ("1", None),
            ("x.1.2", None),
        ] {
            assert_eq!(Version::parse(text), version, "{text:?}");
        }
    }

    #[test]
    fn only_builds_on_the_list_continue() {
        let build = |engine, version| Build { engine, version: Version::parse(version), ids_print: None };
        for (engine, version, text, ids) in [
            (Engine::Vllm, "0.10.2", true, true),
            (Engine::Vllm, "0.10.1.1", true, false),
            (Engine::Vllm, "0.33.4", true, true),
            (Engine::Vllm, "0.34.0", false, false),
            (Engine::Vllm, "0.6.3", false, false),
            (Engine::Vllm, "", false, false),
            (Engine::Sglang, "0.5.16", true, false),
            (Engine::Sglang, "0.5.17", true, true),
            (Engine::LlamaCpp, "b6000-1", true, false),
            (Engine::Tgi, "3.0.0", false, false),
        ] {
            let build = build(engine, version);
            assert_eq!((build.continues_text(), build.continues_ids()), (text, ids), "{engine:?} {version}");
        }
    }

    #[test]
    fn ids_of_another_tokenizer_are_not_shared() {
        let build = |engine, ids_print| Build { engine, version: None, ids_print };
        let own = build(Engine::Vllm, Some(1));
        assert!(own.shares_ids_with(&own) && own.shares_ids_with(&build(Engine::Vllm, None)));
        assert!(!own.shares_ids_with(&build(Engine::Vllm, Some(2))));
        assert!(!own.shares_ids_with(&build(Engine::Sglang, Some(1))));
    }
}
