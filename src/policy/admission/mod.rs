//! Who waits for a backend, in which order, for how long, and how many may be sent to one at a time.
//!
//! `queue` is the waiting room of a pool: bounded, first come first served within a priority, fair between
//! priorities. `cap` learns how many requests a backend takes before it refuses. `pace` lets those who waited
//! in by and by, where all at once would throw a replica down again. `retry_after` says when to come back.
//! All plain values: the pool owns them, their locks and the waking. Not here: which backend (`balance`),
//! whether it may be used at all (`health`), and whether a request is sent again (`retry`).

mod cap;
mod pace;
mod queue;
mod retry_after;

pub use cap::Cap;
pub use pace::Pace;
pub use queue::{Full, Place, Queue};
pub use retry_after::Completions;

use std::num::NonZeroU32;
use std::time::Duration;

use http::HeaderName;

/// Places for each slot there is, in a queue whose length is `auto`: as many again as run may wait, twice.
/// Whoever came later would wait for more than two generations of requests.
const PLACES_A_SLOT: usize = 2;
/// Least length of such a queue: a small pool may get a handful of requests at once.
const LENGTH_MIN: usize = 16;
/// Its length while the number of slots is not known: then only those wait who wait for the pool to return.
const LENGTH_UNKNOWN: usize = 1024;

/// How exchanges of a pool wait for a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuePolicy {
    /// Longest wait for a free slot, while somebody is up and all are at their caps. Default 5 s: about an
    /// answer or two. For a pool that is down or asks for a pause it is `RetryPolicy::wait_max`.
    pub wait_max: Duration,
    /// Most exchanges that wait.
    pub length_max: LengthMax,
    /// Request header that names the priority. Default `x-priority`.
    pub priority_header: HeaderName,
}

impl Default for QueuePolicy {
    fn default() -> Self {
        Self {
            wait_max: Duration::from_secs(5),
            length_max: LengthMax::Auto,
            priority_header: HeaderName::from_static("x-priority"),
        }
    }
}

/// Most exchanges that wait in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LengthMax {
    /// Twice the slots of the eligible backends, at least 16; 1,024 while one of them has no known cap. The default.
    #[default]
    Auto,
    /// So many.
    Most(NonZeroU32),
}

impl LengthMax {
    /// The bound, for eligible backends with these caps; a backend without one is `None`.
    pub fn of(self, caps: impl IntoIterator<Item = Option<u32>>) -> usize {
        match self {
            Self::Most(most) => most.get() as usize,
            Self::Auto => {
                let slots: Option<Vec<u32>> = caps.into_iter().collect();
                match slots.filter(|slots| !slots.is_empty()) {
                    None => LENGTH_UNKNOWN,
                    Some(slots) => {
                        let slots = slots.iter().fold(0, |sum: usize, &cap| sum.saturating_add(cap as usize));
                        slots.saturating_mul(PLACES_A_SLOT).max(LENGTH_MIN)
                    }
                }
            }
        }
    }
}

/// Who goes first. Between priorities turns are shared 6 : 3 : 1, so that the lowest is slow, never starved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Priority {
    /// People who wait.
    High,
    /// The default.
    #[default]
    Normal,
    /// What can wait: batches.
    Low,
}

impl Priority {
    /// All, the first first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// As written in headers, files and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }

    /// What a client's header says; anything unknown is normal, since it is a wish and no part of the request.
    pub fn of_header(value: &[u8]) -> Self {
        let named = |priority: &Self| value.eq_ignore_ascii_case(priority.name().as_bytes());
        Self::ALL.into_iter().find(named).unwrap_or_default()
    }

    /// Share of the turns, of those whose priority waits at all.
    const fn weight(self) -> u64 {
        match self {
            Self::High => 6,
            Self::Normal => 3,
            Self::Low => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_automatic_length_follows_the_slots_and_has_a_floor() {
        assert_eq!(LengthMax::Auto.of([Some(64), Some(36)]), 200);
        assert_eq!(LengthMax::Auto.of([Some(1)]), LENGTH_MIN);
        assert_eq!(LengthMax::Auto.of([Some(64), None]), LENGTH_UNKNOWN);
        assert_eq!(LengthMax::Auto.of([]), LENGTH_UNKNOWN);
        let three = NonZeroU32::new(3).unwrap();
        assert_eq!(LengthMax::Most(three).of([Some(64), None]), 3);
    }

    #[test]
    fn an_unknown_word_is_normal() {
        assert_eq!(Priority::of_header(b"HIGH"), Priority::High);
        assert_eq!(Priority::of_header(b"low"), Priority::Low);
        for word in [&b"normal"[..], b"urgent", b"", b"\xff"] {
            assert_eq!(Priority::of_header(word), Priority::Normal);
        }
    }
}
