//! The model a simulated replica serves: a pure function from all text so far to the text that follows.
//!
//! Invariant: `continuation(prompt + answer[..k])` is `answer[k..]` for every character boundary k.
//! So one request has one answer on every replica of equal model and weights, and every way to
//! continue a broken stream (replay, text prefill, token ids) meets the uncut text exactly, or the
//! proxy is wrong. Tokens are words with their leading space; ids stand for words of the bank,
//! bytes and chat markers, and can be turned back into text without any state.
//!
//! It is no language model: sentences come from a bank, chosen by a hash of what was said before.

use std::collections::HashMap;
use std::sync::LazyLock;

/// Opens a turn of the assistant in a rendered chat; its text follows.
pub(super) const ASSISTANT_TURN: &str = "<|assistant|>\n";
/// Closes a turn in a rendered chat.
pub(super) const TURN_END: &str = "<|end|>\n";

const MARKERS: [&str; 5] = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"];
const FIRST_MARKER_ID: u32 = 256;
const FIRST_WORD_ID: u32 = 300;

/// A half sentence of the prompt longer than this is not searched for the start of a generated one.
/// Must be more than twice the longest sentence, or a resumed answer could take another way.
const CLAUSE_SEARCH_BYTES: usize = 512;

const SUBJECTS: [&str; 16] = [
    "the harbour master",
    "a careful engineer",
    "the night watch",
    "an old lighthouse keeper",
    "the pilot boat",
    "a patient captain",
    "the signal tower",
    "a good dispatcher",
    "the second lamp",
    "a quiet crew",
    "the river gate",
    "an honest clerk",
    "the spare engine",
    "a steady hand",
    "the early ferry",
    "the town behind the dike",
];

const DEEDS: [&str; 20] = [
    "keeps a second light ready",
    "checks the ropes before the storm arrives",
    "counts every ship that comes home",
    "writes down what went wrong yesterday",
    "takes over without a word",
    "listens for the one bell that stays silent",
    "opens another channel when the first is blocked",
    "finishes what the other began",
    "never promises more than the tide allows",
    "sends the heavy barges to the wide lock",
    "tests the alarm on calm days",
    "remembers where each letter was left",
    "asks twice before closing the gate",
    "lets the newcomer start with small loads",
    "passes the rope from hand to hand",
    "waits a moment and then tries once more",
    "keeps an honest log",
    "tells apart the slow from the lost",
    "carries on from the very same word",
    "leaves a lamp burning for the late ones",
];

const REASONS: [&str; 20] = [
    "because two lights are better than one",
    "so that nobody waits in the dark",
    "and the harbour stays open all night",
    "while the others rest",
    "long before anyone has to ask",
    "even when the wind turns",
    "as the old rules advise",
    "since a single rope always breaks on a Sunday",
    "and no traveller notices the change",
    "until the first boat is repaired",
    "for the sea forgives haste but not neglect",
    "which is why the letters arrive in order",
    "and nothing is said twice",
    "with one eye on the clock",
    "however crowded the quay may be",
    "and then starts again in the morning",
    "because silence is not an answer",
    "although the fog hides half the fleet",
    "so the journey continues as if nothing had happened",
    "and the whole town sleeps well",
];

/// A served model: name, weights and seed decide every answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    base: u64,
}

impl Model {
    /// Models of equal `name`, `weights` and `seed` say the same; all others differ.
    pub fn new(name: &str, weights: u64, seed: Option<i64>) -> Self {
        let mut base = absorb(HASH_START, name.as_bytes());
        base = absorb(base, &weights.to_le_bytes());
        if let Some(seed) = seed {
            base = absorb(base, &seed.to_le_bytes());
        }
        Self { base }
    }

    /// The tokens that follow `text`, without end. Their concatenation is the continuation.
    pub fn continuation(self, text: &str) -> Continuation {
        let boundary = text.rfind(['.', '!', '?', '\n']).map_or(0, |at| at + 1);
        let mut said = absorb(self.base, &text.as_bytes()[..boundary]);
        let partial = &text[boundary..];
        let opens_line = boundary == 0 || text[..boundary].ends_with('\n');
        let from = partial.len().saturating_sub(CLAUSE_SEARCH_BYTES);
        let mut left = None;
        for (at, ch) in partial.char_indices().chain([(partial.len(), ' ')]) {
            if at == 0 || at >= from {
                let open = at == 0 && opens_line;
                let spaced = partial[..at].ends_with(char::is_whitespace);
                let sentence = sentence(said, at == 0, !open && !spaced);
                if let Some(rest) = sentence.strip_prefix(&partial[at..]) {
                    left = Some(rest.to_owned());
                    break;
                }
            }
            said = absorb(said, ch.encode_utf8(&mut [0; 4]).as_bytes());
        }
        let left = left.unwrap_or_default();
        Continuation { said: absorb(self.base, text.as_bytes()), sentence: left, at: 0 }
    }

    /// The whole answer of a chat whose rendered text is `text` (up to and with the opened assistant
    /// turn and what is already said in it): the sentences up to the first end at or after
    /// `tokens_min` tokens of the turn. Empty when the turn is already complete.
    pub fn answer(self, text: &str, tokens_min: usize) -> Vec<String> {
        let start = text.rfind(ASSISTANT_TURN).map_or(0, |at| at + ASSISTANT_TURN.len());
        let said = &text[start..];
        let mut spoken = pieces(said).count();
        if spoken >= tokens_min && said.ends_with('.') {
            return Vec::new();
        }
        // A continuation that starts inside a word finishes that word, which was counted; so was its space.
        let mut inside_word =
            said.ends_with(|last: char| last.is_alphanumeric() || last == '\'' || last == ' ');
        let mut answer = Vec::new();
        for token in self.continuation(text) {
            if !(inside_word && token.starts_with(char::is_alphanumeric)) {
                spoken += 1;
            }
            inside_word = false;
            let ends = token.ends_with('.');
            answer.push(token);
            if ends && spoken >= tokens_min {
                break;
            }
        }
        answer
    }

    /// A unit vector that depends on every byte of `text`.
    pub fn embedding(self, text: &str, dimensions: usize) -> Vec<f32> {
        let mut state = absorb(self.base, text.as_bytes());
        let mut vector: Vec<f32> = (0..dimensions)
            .map(|_| {
                state = absorb(state, b"d");
                // 24 bits fit an f32 exactly.
                (mix(state) >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
            })
            .collect();
        let norm = vector.iter().map(|part| part * part).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        vector.iter_mut().for_each(|part| *part /= norm);
        vector
    }
}

/// Tokens without end; see [`Model::continuation`].
#[derive(Clone, Debug)]
pub struct Continuation {
    /// Hash of all text up to the end of `sentence`'s start, then of each token given.
    said: u64,
    sentence: String,
    at: usize,
}

impl Iterator for Continuation {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        if self.at == self.sentence.len() {
            self.sentence = sentence(self.said, true, true);
            self.at = 0;
        }
        let token = pieces(&self.sentence[self.at..]).next()?.to_owned();
        self.at += token.len();
        self.said = absorb(self.said, token.as_bytes());
        Some(token)
    }
}

/// The sentence chosen by everything said before it. `full`: a whole sentence, else the end of somebody's half one.
fn sentence(said: u64, full: bool, spaced: bool) -> String {
    let choice = mix(said);
    let pick = |list: &[&'static str], shift: u32| list[(choice >> shift) as usize % list.len()];
    let subject = pick(&SUBJECTS, 3);
    let deed = pick(&DEEDS, 17);
    let reason = pick(&REASONS, 31);
    let mut sentence = String::with_capacity(128);
    if spaced {
        sentence.push(' ');
    }
    let at = sentence.len();
    sentence.push_str(subject);
    if full {
        sentence[at..=at].make_ascii_uppercase();
    }
    sentence.push(' ');
    sentence.push_str(deed);
    if !(choice >> 45).is_multiple_of(4) {
        sentence.push_str(if (choice >> 47).is_multiple_of(5) { ", " } else { " " });
        sentence.push_str(reason);
    }
    sentence.push('.');
    sentence
}

/// Splits text into tokens: a word with the one space before it, or any other single character.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let mut chars = rest.char_indices();
        let (_, first) = chars.next()?;
        let is_word = |ch: char| ch.is_alphanumeric() || ch == '\'';
        let second = chars.next();
        let end = match (first, second) {
            (' ', Some((_, next))) if is_word(next) => end_of_word(rest, 1),
            _ if is_word(first) => end_of_word(rest, 0),
            (_, Some((at, _))) => at,
            (_, None) => rest.len(),
        };
        let (piece, left) = rest.split_at(end);
        rest = left;
        Some(piece)
    })
}

fn end_of_word(text: &str, from: usize) -> usize {
    text[from..].find(|ch: char| !ch.is_alphanumeric() && ch != '\'').map_or(text.len(), |at| from + at)
}

static WORDS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let mut words: Vec<String> = vec![".".into(), ",".into(), "\n".into(), " ".into()];
    for phrase in SUBJECTS.iter().chain(&DEEDS).chain(&REASONS) {
        let spaced = format!(" {phrase}");
        let capital = phrase[..1].to_ascii_uppercase() + &phrase[1..];
        let spaced_capital = format!(" {capital}");
        for text in [*phrase, &spaced, &capital, &spaced_capital] {
            for piece in pieces(text) {
                if !words.iter().any(|word| word == piece) {
                    words.push(piece.to_owned());
                }
            }
        }
    }
    words
});

static WORD_IDS: LazyLock<HashMap<&'static str, u32>> =
    LazyLock::new(|| (FIRST_WORD_ID..).zip(WORDS.iter()).map(|(id, word)| (word.as_str(), id)).collect());

/// Token ids of a text. `detokenize(tokenize(t))` is `t`; a text the model said has one id a token.
pub fn tokenize(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some((id, marker)) =
            (FIRST_MARKER_ID..).zip(MARKERS).find(|(_, marker)| rest.starts_with(marker))
        {
            ids.push(id);
            rest = &rest[marker.len()..];
            continue;
        }
        let Some(piece) = pieces(rest).next() else { break };
        match WORD_IDS.get(piece) {
            Some(id) => ids.push(*id),
            None => ids.extend(piece.bytes().map(u32::from)),
        }
        rest = &rest[piece.len()..];
    }
    ids
}

/// The text of token ids; unknown ids are left out, broken UTF-8 is replaced.
pub fn detokenize(ids: &[u32]) -> String {
    let mut bytes = Vec::with_capacity(ids.len() * 6);
    for &id in ids {
        let marker = id.checked_sub(FIRST_MARKER_ID).and_then(|at| MARKERS.get(at as usize));
        let word = id.checked_sub(FIRST_WORD_ID).and_then(|at| WORDS.get(at as usize));
        match (u8::try_from(id), marker, word) {
            (Ok(byte), _, _) => bytes.push(byte),
            (_, Some(marker), _) => bytes.extend_from_slice(marker.as_bytes()),
            (_, _, Some(word)) => bytes.extend_from_slice(word.as_bytes()),
            _ => {}
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

// FNV-1a, 64 bit: incremental over any split of the text, which the invariant needs.
const HASH_START: u64 = 0xcbf2_9ce4_8422_2325;

fn absorb(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The finalizer of SplitMix64: FNV alone leaves the high bits of short texts too alike.
fn mix(hash: u64) -> u64 {
    let mut mixed = hash;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        Model::new("demo", 0, None)
    }

    fn chat(question: &str) -> String {
        format!("<|user|>\n{question}{TURN_END}{ASSISTANT_TURN}")
    }

    #[test]
    fn an_answer_continued_at_any_character_is_the_uncut_answer() {
        for question in ["Why do two lights matter?", "", "half a sentence", "Grüße, 世界"] {
            let prompt = chat(question);
            let whole = model().answer(&prompt, 40).concat();
            for (at, _) in whole.char_indices().chain([(whole.len(), ' ')]) {
                let rest = model().answer(&format!("{prompt}{}", &whole[..at]), 40).concat();
                assert_eq!(format!("{}{rest}", &whole[..at]), whole, "cut at {at}");
            }
        }
    }

    #[test]
    fn a_plain_prompt_continued_at_any_character_goes_the_same_way() {
        for prompt in ["", "Once upon a time", "The end. And then ", "\n\n", &"no stop ".repeat(200)] {
            let whole: String = model().continuation(prompt).take(60).collect();
            for (at, _) in whole.char_indices() {
                let rest: String =
                    model().continuation(&format!("{prompt}{}", &whole[..at])).take(60).collect();
                assert!(rest.starts_with(&whole[at..]), "cut at {at}: {rest:?} after {:?}", &whole[..at]);
            }
        }
    }

    #[test]
    fn token_ids_carry_any_text_there_and_back() {
        let prompt = chat("Grüße, 世界 <|tool|> \t don't");
        let answer = model().answer(&prompt, 40);
        assert_eq!(tokenize(&answer.concat()).len(), answer.len());
        let text = prompt + &answer.concat();
        assert_eq!(detokenize(&tokenize(&text)), text);
    }

    #[test]
    fn the_longest_sentence_is_less_than_half_of_the_clause_search() {
        let longest = |list: &[&str]| list.iter().map(|phrase| phrase.len()).max().unwrap_or(0);
        assert!(2 * (longest(&SUBJECTS) + longest(&DEEDS) + longest(&REASONS) + 5) < CLAUSE_SEARCH_BYTES);
    }

    #[test]
    fn model_weights_and_seed_each_change_the_answer() {
        let say = |model: Model| model.answer(&chat("hello"), 40).concat();
        let answers = [
            say(Model::new("a", 0, None)),
            say(Model::new("b", 0, None)),
            say(Model::new("a", 1, None)),
            say(Model::new("a", 0, Some(1))),
        ];
        for (at, answer) in answers.iter().enumerate() {
            assert!(!answers[..at].contains(answer));
            assert!(answer.ends_with('.'));
        }
        assert_eq!(answers[0], say(Model::new("a", 0, None)));
    }

    #[test]
    fn embeddings_are_unit_vectors_that_tell_texts_apart() {
        let vector = model().embedding("one", 8);
        assert!((vector.iter().map(|part| part * part).sum::<f32>() - 1.0).abs() < 1e-4);
        assert_ne!(vector, model().embedding("two", 8));
    }
}
