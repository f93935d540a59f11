//! What silence means: this work is late, this backend stands still, or everybody is slow.
//!
//! `speeds` learns what is usual from the pool's own traffic and makes the soft clocks of it; `standstill`
//! looks at all unfinished work of one backend and says whether it is suspect, and what proves that it is
//! stuck. No number fits every model and machine: an answer a laptop thinks about for a minute is a hang on a
//! rack. So nothing here is a timeout; suspicion leads to a second opinion, and only proof to an ejection.
//!
//! Not here: what an ejection does (`policy::health`), whether a late attempt may be doubled (`policy::hedge`).

mod speeds;
mod standstill;

pub use speeds::{SoftClocks, Speeds};
pub use standstill::{Evidence, Proof, Standstill, Verified, Work, standstill};

use std::time::Duration;

/// Sizes of prompt that are told apart: a prefill takes as long as its prompt.
const BANDS: usize = 6;

/// Bytes of the smallest band; each further one is four times as large.
const BAND_BYTES: u64 = 2 * 1024;

/// Classes (endpoint, streaming or not) that are told apart.
pub const CLASSES: usize = 64;

/// Work that takes equally long, all else being equal: its class, and the band of its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind(u16);

impl Kind {
    /// How many there are.
    pub const COUNT: usize = CLASSES * BANDS;

    /// Work of class `class` (below [`CLASSES`]) whose request body has `prompt_bytes`.
    pub fn of(class: usize, prompt_bytes: u64) -> Self {
        let mut band = 0;
        let mut limit = BAND_BYTES;
        while band + 1 < BANDS && prompt_bytes >= limit {
            band += 1;
            limit *= 4;
        }
        let index = (class % CLASSES) * BANDS + band;
        Self(u16::try_from(index).expect("an index below COUNT fits"))
    }

    /// 0..[`COUNT`](Self::COUNT).
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    fn from_index(index: usize) -> Self {
        Self(u16::try_from(index).expect("an index below COUNT fits"))
    }
}

/// When silence becomes suspicious.
#[derive(Clone, Debug, PartialEq)]
pub struct ProgressPolicy {
    /// Earliest suspicion of work without a first token. Default 2 s, more than zero: a prefill that shares
    /// its engine with others varies by a second. Lower it for small models whose first tokens come at once.
    pub first_token_min: Duration,
    /// The same while nothing like it was seen lately. Default 10 s, at least `first_token_min`.
    pub first_token_unknown: Duration,
    /// Earliest suspicion of a stream that has begun. Default 1 s, more than zero: far beyond any gap
    /// between two tokens of a decoding engine.
    pub token_gap_min: Duration,
    /// The same while no stream was seen lately. Default 5 s, at least `token_gap_min`.
    pub token_gap_unknown: Duration,
    /// So many times what is usual (the 95th percentile) is suspicious. Default 4, at least 1. Raise it when
    /// hedges are seldom won.
    pub factor: f64,
    /// Share of requests that may be hedged, over ten seconds; one at a time always may. Default 0.05, 0 to 1;
    /// 0 switches hedging off.
    pub hedge_ratio: f64,
}

impl Default for ProgressPolicy {
    fn default() -> Self {
        Self {
            first_token_min: Duration::from_secs(2),
            first_token_unknown: Duration::from_secs(10),
            token_gap_min: Duration::from_secs(1),
            token_gap_unknown: Duration::from_secs(5),
            factor: 4.0,
            hedge_ratio: 0.05,
        }
    }
}

impl ProgressPolicy {
    /// When work without a first token is late, given what is usual for its kind.
    pub fn late_first_token(&self, usual: Option<Duration>) -> Duration {
        usual.map_or(self.first_token_unknown, |usual| usual.mul_f64(self.factor).max(self.first_token_min))
    }

    /// When the next token of a stream is late, given what is the usual longest gap.
    pub fn late_token(&self, usual: Option<Duration>) -> Duration {
        usual.map_or(self.token_gap_unknown, |usual| usual.mul_f64(self.factor).max(self.token_gap_min))
    }

    /// All that is wrong with these numbers at once, each line beginning with the field at fault.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        let mut require = |holds: bool, line: &str| {
            if !holds {
                wrong.push(line.to_owned());
            }
        };
        require(!self.first_token_min.is_zero(), "first_token_min must be more than zero");
        require(
            self.first_token_unknown >= self.first_token_min,
            "first_token_unknown must not be below first_token_min",
        );
        require(!self.token_gap_min.is_zero(), "token_gap_min must be more than zero");
        require(
            self.token_gap_unknown >= self.token_gap_min,
            "token_gap_unknown must not be below token_gap_min",
        );
        require(self.factor.is_finite() && self.factor >= 1.0, "factor must be 1 or more");
        require((0.0..=1.0).contains(&self.hedge_ratio), "hedge_ratio must be within 0..=1");
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_fall_into_bands_that_grow_fourfold() {
        let band = |bytes| Kind::of(3, bytes).index() - 3 * BANDS;
        assert_eq!(
            [0, 2047, 2048, 8191, 8192, 32_768, 131_072, 524_287, 524_288, u64::MAX].map(band),
            [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]
        );
        assert_eq!(Kind::of(CLASSES - 1, u64::MAX).index(), Kind::COUNT - 1);
        assert_ne!(Kind::of(1, 0), Kind::of(2, 0));
    }

    #[test]
    fn four_times_the_usual_is_late_but_never_less_than_the_floor() {
        let policy = ProgressPolicy::default();
        let (secs, ms) = (Duration::from_secs, Duration::from_millis);
        assert_eq!(policy.late_first_token(None), secs(10));
        assert_eq!(policy.late_first_token(Some(ms(20))), secs(2));
        assert_eq!(policy.late_first_token(Some(secs(4))), secs(16));
        assert_eq!(policy.late_token(None), secs(5));
        assert_eq!(policy.late_token(Some(ms(50))), secs(1));
        assert_eq!(policy.late_token(Some(secs(1))), secs(4));
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        assert_eq!(ProgressPolicy::default().validate(), Ok(()));
        let wrong = ProgressPolicy {
            first_token_min: Duration::ZERO,
            token_gap_min: Duration::from_secs(9),
            factor: 0.5,
            hedge_ratio: f64::NAN,
            ..ProgressPolicy::default()
        };
        let lines = wrong.validate().unwrap_err();
        let fields = ["first_token_min", "token_gap_unknown", "factor", "hedge_ratio"];
        assert_eq!(lines.len(), fields.len(), "{lines:?}");
        for (line, field) in lines.iter().zip(fields) {
            assert!(line.starts_with(field), "{line}");
        }
    }
}
