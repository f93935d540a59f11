//! When a request that its pool cannot serve may go to another pool.
//!
//! Only by configuration and by cause, and after the pool's own options: its retries, its short wait. The
//! entries of a pool are used in their order, each at most once an exchange. Chains are not followed: the entries of a pool that serves as a
//! fallback mean nothing there. What is not done here: choosing the backend, and rewriting the request.

/// Most entries of one pool: more is a mistake, and a request that fails everywhere visits all of them.
pub const FALLBACKS_MAX: usize = 16;

/// Why a pool cannot serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallbackCause {
    /// Nobody is up, or the attempts failed.
    Unavailable,
    /// All that are up are busy or at their caps, after the short wait.
    Busy,
    /// No first token in the time in which others of its kind have one.
    Slow,
    /// The prompt is longer than the model's context.
    ContextLength,
}

impl FallbackCause {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Unavailable, Self::Busy, Self::Slow, Self::ContextLength];

    /// The word in files and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Busy => "busy",
            Self::Slow => "slow",
            Self::ContextLength => "context_length",
        }
    }
}

/// One entry of a pool: another pool that may take its requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// Name of the other pool; never the pool's own.
    pub pool: String,
    /// For these causes; at least one, none twice.
    pub on: Vec<FallbackCause>,
    /// The model's name there. Without one the other pool's alias for the client's name counts, else the
    /// name the request has been sent with so far.
    pub model: Option<String>,
}

/// The entries that an exchange has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used(u32);

impl Used {
    /// The first entry of `list` for `cause` that was not used yet.
    pub fn next(self, list: &[Fallback], cause: FallbackCause) -> Option<usize> {
        list.iter().take(FALLBACKS_MAX).enumerate().find_map(|(i, entry)| {
            let open = self.0 & (1 << i) == 0 && entry.on.contains(&cause);
            open.then_some(i)
        })
    }

    /// Entry `i` was used.
    pub fn add(&mut self, i: usize) {
        debug_assert!(i < FALLBACKS_MAX, "`next` gives no other");
        self.0 |= 1 << i;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FallbackCause::{Busy, ContextLength, Slow, Unavailable};

    fn entry(pool: &str, on: &[FallbackCause]) -> Fallback {
        Fallback { pool: pool.to_owned(), on: on.to_vec(), model: None }
    }

    #[test]
    fn entries_are_used_in_their_order_by_cause_and_once() {
        let list =
            [entry("big", &[ContextLength]), entry("spare", &[Unavailable, Busy]), entry("x", &[Busy])];
        let mut used = Used::default();
        assert_eq!(used.next(&list, Busy), Some(1));
        used.add(1);
        assert_eq!((used.next(&list, Busy), used.next(&list, Unavailable)), (Some(2), None));
        // An earlier entry may still serve another cause.
        assert_eq!(used.next(&list, ContextLength), Some(0));
        used.add(0);
        used.add(2);
        for cause in FallbackCause::ALL {
            assert_eq!(used.next(&list, cause), None);
        }
        assert_eq!(Used::default().next(&[], Slow), None);
    }

    #[test]
    fn causes_have_the_names_of_the_documentation() {
        let names = FallbackCause::ALL.map(FallbackCause::name);
        assert_eq!(names, ["unavailable", "busy", "slow", "context_length"]);
    }
}
