//! The token ids of one stream, and which of them the client holds the text of.
//!
//! Ids run ahead of texts: a token may be the beginning of a character, and an engine that looks for stop strings holds
//! text back. An answer can be continued from ids only at a *seam*: a place up to which every id's text was
//! delivered, and nothing else. Ids behind it that gave no text yet are dropped, for they will be drawn again; ids
//! whose text was delivered must never be.
//!
//! A seam is proved by a chunk of one token that has text: an engine gives text only for whole characters, so that
//! nothing before it is held back. What was delivered behind the last seam (chunks of several tokens may end within
//! a character) has to be said again and compared.

use super::chunk::Chunk;
use crate::policy::dialect::{Engine, read_ids};

/// Of one answer; more than the longest that engines are run with.
const GENERATED_MAX: usize = 64 << 10;
/// Of one prompt.
const PROMPT_MAX: usize = 256 << 10;

/// A place where the answer may be continued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SeamAt {
    /// So many generated ids.
    pub(super) ids: usize,
    /// So many bytes of the journal's text.
    pub(super) text: usize,
}

/// Why ids cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Trust {
    #[default]
    Whole,
    /// Some are missing, too many, or more than may be kept.
    Lost,
}

/// See the head of this file.
#[derive(Clone, Debug, Default)]
pub(super) struct Ids {
    prompt: Vec<u32>,
    generated: Vec<u32>,
    seam: SeamAt,
    trust: Trust,
    /// Whose rule of holding text back counts.
    engine: Option<Engine>,
}

impl Ids {
    /// For a stream of this engine.
    pub(super) fn of(engine: Engine) -> Self {
        Self { engine: Some(engine), ..Self::default() }
    }

    /// Takes note of a chunk that the client was given.
    ///
    /// `text` is what it said, in all `text_end` bytes of the journal with it; `counted` is how many tokens the engine
    /// says it has generated so far, in all legs.
    pub(super) fn add(&mut self, chunk: &Chunk<'_>, text: &[u8], text_end: usize, counted: Option<u64>) {
        if self.trust == Trust::Lost {
            return;
        }
        if let Some(list) = chunk.prompt_ids
            && self.prompt.is_empty()
        {
            let raw = list.raw();
            if read_ids(&raw[1..raw.len() - 1], &mut self.prompt).is_none() || self.prompt.len() > PROMPT_MAX
            {
                return self.lose();
            }
        }
        let inside = chunk.ids.map_or(&b""[..], |list| &list.raw()[1..list.raw().len() - 1]);
        self.add_list(inside, text, text_end);
        if counted.is_some_and(|count| count != self.generated.len() as u64) {
            self.lose();
        }
    }

    /// The same for a list between its brackets, where nothing else is of interest.
    pub(super) fn add_list(&mut self, inside: &[u8], text: &[u8], text_end: usize) {
        if self.trust == Trust::Lost {
            return;
        }
        let count = read_ids(inside, &mut self.generated);
        match count {
            Some(0) if !text.is_empty() => self.lose(),
            Some(count) if self.generated.len() <= GENERATED_MAX => {
                if count == 1 && self.is_whole(text) {
                    self.seam = SeamAt { ids: self.generated.len(), text: text_end };
                }
            }
            _ => self.lose(),
        }
    }

    /// Whether a token with this text leaves nothing of itself behind.
    fn is_whole(&self, text: &[u8]) -> bool {
        match self.engine {
            // Its detokenizer gives the part of an unfinished text that ends in white space or an ideograph.
            Some(Engine::Sglang) => text.last().is_some_and(|&last| last.is_ascii_graphic()),
            _ => !text.is_empty(),
        }
    }

    /// They are of no use any more.
    pub(super) fn lose(&mut self) {
        *self = Self { trust: Trust::Lost, engine: self.engine, ..Self::default() };
    }

    /// Where the answer may be continued; none without all ids.
    pub(super) fn seam(&self) -> Option<SeamAt> {
        (self.trust == Trust::Whole && !self.prompt.is_empty()).then_some(self.seam)
    }

    /// Whether no id is without delivered text.
    pub(super) fn all_told(&self) -> bool {
        self.seam.ids == self.generated.len()
    }

    /// Ids of the prompt, and of the answer up to the seam.
    pub(super) fn given(&self) -> (&[u32], &[u32]) {
        (&self.prompt, &self.generated[..self.seam.ids])
    }

    /// A leg begins that was given the ids up to the seam: those behind it are drawn again.
    pub(super) fn go_back(&mut self) {
        self.generated.truncate(self.seam.ids);
    }

    /// Bytes on the heap.
    pub(super) fn held(&self) -> usize {
        (self.prompt.capacity() + self.generated.capacity()) * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(ids: &mut Ids, end: &mut usize, text: &str, list: &str) {
        *end += text.len();
        ids.add_list(list.as_bytes(), text.as_bytes(), *end);
    }

    fn begun(engine: Engine) -> (Ids, usize) {
        let mut ids = Ids::of(engine);
        let chunk = Chunk::read(br#"{"prompt_token_ids":[7,8],"choices":[]}"#).unwrap();
        ids.add(&chunk, b"", 0, None);
        (ids, 0)
    }

    #[test]
    fn a_seam_is_behind_a_chunk_of_one_token_with_text() {
        let (mut ids, mut end) = begun(Engine::Vllm);
        for (text, list, at) in [
            ("a", "1", (1, 1)),
            // The beginning of a character.
            ("", "2", (1, 1)),
            ("é", "3", (3, 3)),
            // Its last token may have begun a character.
            ("bc", "4,5", (3, 3)),
            ("", "6", (3, 3)),
            ("d", "7", (7, 6)),
        ] {
            said(&mut ids, &mut end, text, list);
            assert_eq!(ids.seam(), Some(SeamAt { ids: at.0, text: at.1 }), "{text:?} {list}");
        }
        assert_eq!(ids.given(), (&[7, 8][..], &[1, 2, 3, 4, 5, 6, 7][..]));
        said(&mut ids, &mut end, "", "9");
        assert!(!ids.all_told());
        ids.go_back();
        assert!(ids.all_told());
    }

    #[test]
    fn sglang_gives_texts_of_unfinished_tokens_that_end_in_space_or_an_ideograph() {
        let (mut ids, mut end) = begun(Engine::Sglang);
        for (text, at) in [("a", 1), (" ", 1), ("\n", 1), ("漢", 1), ("b", 5)] {
            said(&mut ids, &mut end, text, "1");
            assert_eq!(ids.seam().unwrap().ids, at, "{text:?}");
        }
    }

    #[test]
    fn ids_that_are_missing_or_too_many_are_lost() {
        for (text, list) in [("a", ""), ("a", "x"), ("a", "1,,2")] {
            let (mut ids, mut end) = begun(Engine::Vllm);
            said(&mut ids, &mut end, text, list);
            assert_eq!(ids.seam(), None, "{list:?}");
            said(&mut ids, &mut end, "b", "1");
            assert_eq!(ids.seam(), None, "for good");
        }
        let mut odd_prompt = Ids::of(Engine::Vllm);
        odd_prompt.add(&Chunk::read(br#"{"prompt_token_ids":["x"],"choices":[]}"#).unwrap(), b"", 0, None);
        odd_prompt.add(&Chunk::read(br#"{"prompt_token_ids":[7],"choices":[]}"#).unwrap(), b"", 0, None);
        odd_prompt.add_list(b"1", b"a", 1);
        assert_eq!(odd_prompt.seam(), None);
        let mut without_prompt = Ids::of(Engine::Vllm);
        without_prompt.add_list(b"1", b"a", 1);
        assert_eq!(without_prompt.seam(), None);
        // The engine has counted another number.
        for (counted, kept) in [(1, true), (2, false), (0, false)] {
            let (mut ids, _) = begun(Engine::Vllm);
            let chunk = Chunk::read(br#"{"choices":[{"text":"a","token_ids":[1]}]}"#).unwrap();
            ids.add(&chunk, b"a", 1, Some(counted));
            assert_eq!(ids.seam().is_some(), kept, "{counted}");
        }
    }

    #[test]
    fn ids_are_counted_by_their_bytes() {
        let (mut ids, mut end) = begun(Engine::Vllm);
        for _ in 0..100 {
            said(&mut ids, &mut end, "a", "1");
        }
        assert!((102 * 4..4 * 102 * 4).contains(&ids.held()), "{}", ids.held());
    }

    #[test]
    fn ids_beyond_the_bound_are_given_up() {
        let (mut ids, _) = begun(Engine::Vllm);
        let many = vec!["1"; GENERATED_MAX + 1].join(",");
        ids.add_list(many.as_bytes(), b"a", 1);
        assert_eq!((ids.seam(), ids.held()), (None, 0));
        let prompt = |count: usize| {
            let mut ids = Ids::of(Engine::Vllm);
            let data = format!("{{\"prompt_token_ids\":[{}],\"choices\":[]}}", vec!["1"; count].join(","));
            ids.add(&Chunk::read(data.as_bytes()).unwrap(), b"", 0, None);
            ids
        };
        assert_eq!(prompt(PROMPT_MAX).given().0.len(), PROMPT_MAX);
        let ids = prompt(PROMPT_MAX + 1);
        assert_eq!((ids.seam(), ids.held()), (None, 0));
    }
}
