//! Is what answers at an address what it should be? By the models it lists, against its configuration and its peers.
//!
//! An engine that was restarted with other weights answers as well as before, and some (llama.cpp) whatever model is
//! asked for. The list at `/v1/models` is the only word it gives of itself. A list that cannot be had is no evidence,
//! and neither is a name that nobody in the pool ever listed: then the names in use are not the engines' own (a route
//! in front, a path instead of a name), and nothing can be told from them.

use std::collections::BTreeMap;

use smallvec::SmallVec;

/// The names under which a backend may list what its pool is configured to serve: those of `models`, what aliases
/// make of them, and the targets of all aliases. Empty without `models`.
pub fn expected<'c>(models: &'c [String], aliases: &'c [(String, String)]) -> Vec<&'c str> {
    if models.is_empty() {
        return Vec::new();
    }
    let targets = aliases.iter().map(|(_, target)| target);
    models.iter().chain(targets).map(String::as_str).collect()
}

/// Whether a list has one of the names expected.
pub fn lists_any(listed: &[String], expected: &[&str]) -> bool {
    listed.iter().any(|id| expected.contains(&id.as_str()))
}

/// Which backends of a pool lack a model that another lists. Made when a list changes, so that choosing a backend
/// looks up one name, and nothing at all while all lists are equal.
#[derive(Debug)]
pub struct Roster<K> {
    lacking: BTreeMap<String, SmallVec<[K; 4]>>,
}

impl<K: Copy + Eq> Roster<K> {
    /// From the backends that list models: who, whether its list counts as a peer's (the operator has not taken it
    /// away), and the list. None when nobody lacks anything.
    pub fn of(lists: &[(K, bool, &[String])]) -> Option<Self> {
        let mut lacking: BTreeMap<String, SmallVec<[K; 4]>> = BTreeMap::new();
        for (_, _, listed) in lists.iter().filter(|(_, counts, _)| *counts) {
            for id in listed.iter() {
                if lacking.contains_key(id) {
                    continue;
                }
                let without: SmallVec<[K; 4]> =
                    lists.iter().filter(|(_, _, other)| !other.contains(id)).map(|(who, ..)| *who).collect();
                if !without.is_empty() {
                    lacking.insert(id.clone(), without);
                }
            }
        }
        (!lacking.is_empty()).then_some(Self { lacking })
    }

    /// Whether `who` lists models, and not this one, which a peer lists.
    pub fn lacks(&self, model: &str, who: K) -> bool {
        self.lacking.get(model).is_some_and(|lacking| lacking.contains(&who))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_configured_name_may_be_listed_under_what_its_alias_stands_for() {
        let (models, aliases) = (names(&["gpt"]), [("gpt".to_owned(), "llama".to_owned())]);
        let expected = expected(&models, &aliases);
        assert!(lists_any(&names(&["x", "llama"]), &expected));
        assert!(lists_any(&names(&["gpt"]), &expected));
        assert!(!lists_any(&names(&["qwen"]), &expected));
        assert!(!lists_any(&[], &expected));
        assert!(super::expected(&[], &aliases).is_empty(), "nothing is configured");
    }

    #[test]
    fn equal_lists_make_no_roster() {
        let (a, b) = (names(&["m", "n"]), names(&["n", "m"]));
        assert!(Roster::of(&[(1, true, &a), (2, true, &b)]).is_none());
        assert!(Roster::<u8>::of(&[]).is_none());
        assert!(Roster::of(&[(1, true, &a)]).is_none());
    }

    #[test]
    fn who_lists_models_but_not_this_one_lacks_it() {
        let (both, one, none) = (names(&["m", "n"]), names(&["m"]), names(&[]));
        let roster = Roster::of(&[(1, true, &both), (2, true, &one), (3, true, &none)]).unwrap();
        for (model, who, lacks) in [
            ("m", 1, false),
            ("m", 2, false),
            ("m", 3, true),
            ("n", 1, false),
            ("n", 2, true),
            // Nobody lists it; and who gave no list is not in the roster.
            ("other", 1, false),
            ("n", 4, false),
        ] {
            assert_eq!(roster.lacks(model, who), lacks, "{model} at {who}");
        }
    }

    #[test]
    fn the_list_of_a_backend_taken_away_by_hand_is_no_evidence_against_others() {
        let (m, x) = (names(&["m"]), names(&["x"]));
        let roster = Roster::of(&[(1, false, &m), (2, true, &x)]).unwrap();
        assert!(!roster.lacks("m", 2));
        assert!(roster.lacks("x", 1));
    }
}
