//! Degenerate output (F22): a replica whose weights, cache or kernels went bad says one token over and over, with
//! status 200. Most such runs are a broken replica; some are a ruler, a table or what was asked for. So a run proves
//! nothing: it is a reason to ask a peer.
//!
//! A *unit* is the shortest text of which a piece is made by repetition; white space is none. A *run* is one unit
//! told by two events or more, however many of it each of them has. One event alone is no run: `--------` is a
//! single token of many vocabularies.
//!
//! Invariant: an event that continues no run costs a comparison and no allocation. A piece that breaks a run lets
//! go of everything. Not here: whom to ask, clocks, and what becomes of the backend (`policy::health::Quarantine`).

use std::time::Duration;

use crate::policy::json::unescape;

/// From so many units on it is a run that is held back.
pub const HELD_AT: u32 = 4;

/// At so many a peer is asked. Eight: no token repeats so often in ordinary prose, and at 30 tokens a second they
/// take a quarter of a second.
pub const ASKED_AT: u32 = 8;

/// An established run is held back for so long at most.
pub const HELD_MAX: Duration = Duration::from_millis(250);

/// The same where the backend has been overruled lately: its run is more likely a fault than not.
pub const HELD_WARY_MAX: Duration = Duration::from_secs(2);

/// What may begin a run waits so long for the token behind it: four tokens a second are read as they come.
pub const LOOK_AHEAD_MAX: Duration = Duration::from_millis(250);

/// Events held back while a peer is asked; beyond them the backend is not read on.
pub const HELD_EVENTS_MAX: u32 = 32;

/// A unit longer than this is none. The longest tokens in use that are no white space have some 20 bytes.
const UNIT_BYTES_MAX: usize = 32;

/// A longer piece is taken for no run: an event of so many tokens is an answer, not a token.
const PIECE_BYTES_MAX: usize = 1024;

/// In an answer that is told in one piece a run must be this long, or stand at its end: rulers and tables do not.
const INSIDE_UNITS_MIN: usize = 32;

/// So far apart are the places where they are looked for: the shortest, of one byte, covers at one of them the nine
/// bytes that show it.
const STRIDE: usize = INSIDE_UNITS_MIN - 8;

/// Units that are looked for inside an answer.
const INSIDE_UNIT_BYTES_MAX: usize = 8;

/// What to do with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes to the client, after everything that is held.
    Pass,
    /// It is held back from here on; what was held before goes.
    Begin,
    /// It is held back with what is held.
    Hold,
    /// The same, and a peer is to be asked. Said once a run.
    Ask,
}

/// Watches the pieces of text of one stream.
#[derive(Clone, Debug, Default)]
pub struct RunWatch {
    unit: [u8; UNIT_BYTES_MAX],
    len: usize,
    /// Of the run so far, and how many of them the client has.
    units: u32,
    told: u32,
    events: u32,
    holding: bool,
    /// The run was asked about, or let go: nothing of it is held again.
    settled: bool,
}

impl RunWatch {
    /// Takes in the text of one event, as it stands between its quotes; `None` for an event that says something
    /// else. Events that say nothing (roles, usage, comments) are not told here.
    ///
    /// `wary`: the backend has been overruled lately; then every piece may begin a run. Otherwise a piece with a
    /// letter or a digit waits for its first repetition, so that prose is not held back a token at a time.
    pub fn see(&mut self, piece: Option<&[u8]>, wary: bool) -> Step {
        let Some(piece) = piece.filter(|piece| piece.len() <= PIECE_BYTES_MAX) else {
            self.forget();
            return Step::Pass;
        };
        if let Some(more) = self.continues(piece) {
            self.units = self.units.saturating_add(more);
            self.events = self.events.saturating_add(1);
            return self.step();
        }
        self.forget();
        if !self.meet(piece) {
            return Step::Pass;
        }
        if !wary && is_word(piece) {
            self.told = self.units;
            return Step::Pass;
        }
        self.holding = true;
        Step::Begin
    }

    fn step(&mut self) -> Step {
        if self.settled {
            self.told = self.units;
            return Step::Pass;
        }
        let first = !std::mem::replace(&mut self.holding, true);
        match () {
            () if self.units >= ASKED_AT => {
                self.settled = true;
                Step::Ask
            }
            () if first => Step::Begin,
            () => Step::Hold,
        }
    }

    /// Everything held was given to the client for want of time; what follows of the run is held anew.
    pub fn released(&mut self) {
        (self.told, self.holding) = (self.units, false);
    }

    /// Whether what is held is a run, and not only what may become one.
    pub fn is_run(&self) -> bool {
        self.events > 1 && self.units >= HELD_AT
    }

    /// The unit of the run, as it stands between quotes.
    pub fn unit(&self) -> &[u8] {
        &self.unit[..self.len]
    }

    /// Units of the run that the client was not given.
    pub fn untold(&self) -> u32 {
        self.units - self.told
    }

    /// Units of the run that the client has.
    pub fn told(&self) -> u32 {
        self.told
    }

    fn forget(&mut self) {
        (self.len, self.units, self.told, self.events) = (0, 0, 0, 0);
        (self.holding, self.settled) = (false, false);
    }

    /// How many more units of the run this is; none if it is something else.
    fn continues(&self, piece: &[u8]) -> Option<u32> {
        let unit = self.unit();
        // Most words begin with a space: their ends tell them apart.
        if unit.is_empty() || piece.len() < unit.len() || piece.last() != unit.last() {
            return None;
        }
        let mut units = piece.chunks_exact(unit.len());
        let all = units.all(|one| one == unit) && piece.len().is_multiple_of(unit.len());
        all.then(|| count(piece.len() / unit.len()))
    }

    /// Takes `piece` for the beginning of a run; false if it can be none.
    fn meet(&mut self, piece: &[u8]) -> bool {
        let unit = unit_of(piece);
        if unit.is_empty() || unit.len() > UNIT_BYTES_MAX || is_space(unit) {
            return false;
        }
        self.unit[..unit.len()].copy_from_slice(unit);
        let units = if unit.len() == piece.len() { 1 } else { count(piece.len() / unit.len()) };
        (self.len, self.units, self.events) = (unit.len(), units, 1);
        true
    }
}

fn count(units: usize) -> u32 {
    u32::try_from(units).unwrap_or(u32::MAX)
}

/// The shortest text of which `piece` is made by repetition. Escapes are not taken apart.
fn unit_of(piece: &[u8]) -> &[u8] {
    let Some((&first, rest)) = piece.split_first() else { return piece };
    let most = (piece.len() / 2).min(UNIT_BYTES_MAX);
    let repeats =
        |len: &usize| piece.len().is_multiple_of(*len) && piece[*len..] == piece[..piece.len() - len];
    // Few words have their first letter again in their first half.
    let unit = memchr::memchr_iter(first, &rest[..most]).map(|at| at + 1).find(repeats);
    unit.filter(|_| memchr::memchr(b'\\', piece).is_none()).map_or(piece, |len| &piece[..len])
}

/// Whether it has a letter or a digit; the last byte mostly is one.
fn is_word(piece: &[u8]) -> bool {
    piece.iter().rev().any(|byte| byte.is_ascii_alphanumeric() || !byte.is_ascii())
}

/// Whether a text, as it stands between quotes, is white space.
fn is_space(text: &[u8]) -> bool {
    if !text.last().is_none_or(|last| matches!(last, b' ' | b'\t' | b'\n' | b'\r' | b'n' | b't' | b'r')) {
        return false;
    }
    let mut rest = text;
    loop {
        rest = match rest {
            [] => return true,
            [b' ' | b'\t' | b'\n' | b'\r', rest @ ..] | [b'\\', b'n' | b't' | b'r', rest @ ..] => rest,
            _ => return false,
        }
    }
}

/// What a peer makes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opinion {
    /// It has not said enough.
    Open,
    /// It says the same: the run is legitimate.
    Repeats,
    /// It says something else, after so many units.
    Differs(u32),
}

/// Compares what a peer says in place of a run with the `unit` of that run (as text), of which `units` were held
/// back. `ended`: it will say no more.
pub fn compare(unit: &str, units: u32, peer: &[u8], ended: bool) -> Opinion {
    let same = peer.iter().zip(unit.bytes().cycle()).take_while(|(a, b)| **a == *b).count();
    let agreed = count(same / unit.len().max(1));
    if agreed >= units {
        Opinion::Repeats
    } else if same < peer.len() || ended {
        Opinion::Differs(agreed)
    } else {
        Opinion::Open
    }
}

/// Whether a peer that said something else after `agreed` units is proof against the backend. One that went along
/// for a while counts otherwise: sampled tables have other widths.
pub fn is_offence(agreed: u32) -> bool {
    agreed < HELD_AT
}

/// Whether a text ends in a run: who is asked about one had better say something else.
pub fn repeats_itself(text: &[u8]) -> bool {
    tail_run(text, HELD_AT).is_some()
}

/// The unit of a run in an answer told in one piece: at its end, or a very long one anywhere.
pub fn run_in(answer: &[u8]) -> Option<&[u8]> {
    let text = answer.trim_ascii_end();
    tail_run(text, ASKED_AT).or_else(|| inside_run(text))
}

/// The same for what stands between the quotes of a JSON string.
pub fn run_in_json(inside: &[u8]) -> Option<Vec<u8>> {
    run_in(&unescape(inside)?).map(<[u8]>::to_vec)
}

fn tail_run(text: &[u8], units: u32) -> Option<&[u8]> {
    let (&last, before) = text.split_last()?;
    let near = &before[before.len().saturating_sub(UNIT_BYTES_MAX)..];
    // A unit is as long as the way back to another of the last byte.
    memchr::memrchr_iter(last, near).find_map(|place| {
        let len = near.len() - place;
        let tail = &text[text.len().checked_sub(len * units as usize)?..];
        let unit = &tail[..len];
        (tail[len..] == tail[..tail.len() - len] && !is_space(unit)).then_some(unit)
    })
}

/// A run of `INSIDE_UNITS_MIN` bytes or more covers a whole stride and what is compared behind it, and is found
/// without looking at every byte.
fn inside_run(text: &[u8]) -> Option<&[u8]> {
    let mut at = INSIDE_UNIT_BYTES_MAX;
    while let Some(around) = text.get(at - INSIDE_UNIT_BYTES_MAX..).and_then(|near| near.first_chunk()) {
        if let Some(len) = period(around) {
            let same = |at: &usize| text[*at] == text[*at - len];
            let behind = (at..text.len()).take_while(same).count();
            let before = (len..at).rev().take_while(same).count();
            let unit = &text[at - len..at];
            if behind + before >= len * (INSIDE_UNITS_MIN - 1) && !is_space(unit) {
                return Some(unit);
            }
        }
        at += STRIDE;
    }
    None
}

/// How far before the last eight of these bytes the same eight stand; the least such distance, which is that of every
/// run that covers them.
fn period(around: &[u8; 2 * INSIDE_UNIT_BYTES_MAX]) -> Option<usize> {
    const EACH: u64 = u64::MAX / 255;
    let whole = u128::from_le_bytes(*around);
    let last = (whole >> 64) as u64;
    // Few places have both their first and their last byte among the eight before each: one of these is zero then.
    let stands_in = |eight: u64, byte: u64| {
        let differ = eight ^ (EACH * byte);
        differ.wrapping_sub(EACH) & !differ & (EACH << 7) != 0
    };
    if !(stands_in(whole as u64, last & 255) && stands_in((whole >> 56) as u64, last >> 56)) {
        return None;
    }
    let at = |back: usize| (whole >> (64 - 8 * back)) as u64 == last;
    // Written out, each is a shift by a constant and a comparison.
    let found = [at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)];
    found.iter().position(|&equal| equal).map(|place| place + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What reaches the client at once, what is held at the end, and behind which event a peer was asked.
    fn watch<'a>(pieces: &[&'a str], wary: bool) -> (String, String, Option<usize>) {
        let mut run = RunWatch::default();
        let (mut told, mut held, mut asked): (String, Vec<&'a str>, _) = (String::new(), Vec::new(), None);
        for (place, &piece) in pieces.iter().enumerate() {
            match run.see(Some(piece.as_bytes()), wary) {
                Step::Pass => {
                    told.extend(held.drain(..));
                    told.push_str(piece);
                }
                Step::Begin => {
                    told.extend(held.drain(..));
                    held.push(piece);
                }
                Step::Hold => held.push(piece),
                Step::Ask => {
                    held.push(piece);
                    asked = Some(place);
                    break;
                }
            }
        }
        (told, held.concat(), asked)
    }

    #[test]
    fn a_run_is_asked_about_at_its_eighth_token_and_nothing_of_it_was_told() {
        for before in [&[][..], &["One", " two", ","][..]] {
            let pieces = [before, &["!"; 12]].concat();
            let (told, held, asked) = watch(&pieces, false);
            assert_eq!((told, held), (before.concat(), "!".repeat(8)));
            assert_eq!(asked, Some(before.len() + 7));
        }
    }

    #[test]
    fn words_are_held_from_their_repetition_and_from_the_first_where_the_backend_is_suspect() {
        let pieces = [" the"; 9];
        assert_eq!(watch(&pieces, false), (" the".to_owned(), " the".repeat(7), Some(7)));
        assert_eq!(watch(&pieces, true), (String::new(), " the".repeat(8), Some(7)));
    }

    #[test]
    fn prose_tables_and_white_space_are_not_held() {
        for pieces in [
            &["Ha", " ha", " ha", "!", " Well", ",", " then"][..],
            &[
                "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|", "---", "|",
                "---", "|", "x",
            ],
            &["\\n", "\\n", "\\n", "\\n", "\\n", "\\n", "\\n", "\\n", "\\n", " ", " ", " ", "x"],
            &["a", "--------", "b", "----------------", "x"],
        ] {
            let (told, held, asked) = watch(pieces, false);
            assert_eq!((told, held.as_str(), asked), (pieces.concat(), "", None));
        }
    }

    #[test]
    fn a_run_that_was_let_go_is_not_held_or_asked_about_again() {
        let mut run = RunWatch::default();
        let steps: Vec<Step> = (0..8).map(|_| run.see(Some(b"-"), false)).collect();
        assert_eq!((steps[0], steps[3], steps[7]), (Step::Begin, Step::Hold, Step::Ask));
        run.released();
        assert!((0..100).all(|_| run.see(Some(b"-"), true) == Step::Pass));
        assert_eq!(run.see(Some(b"="), false), Step::Begin, "another run is another question");
    }

    #[test]
    fn one_released_for_want_of_time_is_held_anew_and_what_was_told_is_known() {
        let mut run = RunWatch::default();
        (0..5).for_each(|_| {
            run.see(Some(b"!"), false);
        });
        assert!(run.is_run());
        run.released();
        assert_eq!((run.told(), run.untold()), (5, 0));
        assert_eq!(run.see(Some(b"!"), false), Step::Begin);
        assert_eq!(run.see(Some(b"!"), false), Step::Hold);
        assert_eq!(run.see(Some(b"!"), false), Step::Ask);
        assert_eq!((run.told(), run.untold(), run.unit()), (5, 3, &b"!"[..]));
    }

    #[test]
    fn what_says_something_else_ends_a_run() {
        let mut run = RunWatch::default();
        (0..7).for_each(|_| {
            run.see(Some(b"!"), false);
        });
        assert_eq!(run.see(None, false), Step::Pass);
        assert_eq!(run.see(Some(b"!"), false), Step::Begin);
        assert!(!run.is_run());
        let long = "!".repeat(PIECE_BYTES_MAX + 1);
        assert_eq!(run.see(Some(long.as_bytes()), false), Step::Pass);
    }

    #[test]
    fn a_peer_repeats_a_run_or_says_something_else() {
        for (peer, ended, opinion) in [
            ("", false, Opinion::Open),
            ("", true, Opinion::Differs(0)),
            ("the the ", false, Opinion::Open),
            ("the the ", true, Opinion::Differs(2)),
            ("the then", false, Opinion::Differs(1)),
            ("the the the the", false, Opinion::Repeats),
            ("the the the ", false, Opinion::Repeats),
        ] {
            // Three held, and the unit is cut where its engine cuts it.
            assert_eq!(compare("the ", 3, peer.as_bytes(), ended), opinion, "{peer:?}");
        }
        assert!(is_offence(0) && is_offence(3) && !is_offence(4));
    }

    #[test]
    fn runs_in_whole_answers_stand_at_the_end_or_are_very_long() {
        let ruler = |n: usize| format!("Title\n{}\ntext", "-".repeat(n));
        for before in 0..40 {
            let answer = format!("{}{} behind it", " ".repeat(before), "!".repeat(32));
            assert_eq!(run_in(answer.as_bytes()), Some(&b"!"[..]), "{before}");
        }
        for (answer, unit) in [
            ("Hello!!!!!!!!".to_owned(), Some("!")),
            ("Hello!!!!!!!! \n".to_owned(), Some("!")),
            ("Hello!!!!!!!".to_owned(), None),
            (format!("so{}", " the".repeat(8)), Some(" the")),
            (ruler(31), None),
            (ruler(32), Some("-")),
            (format!("{}x", "ha".repeat(40)), Some("ha")),
            (format!("x{}y", " ".repeat(200)), None),
            (String::new(), None),
        ] {
            assert_eq!(run_in(answer.as_bytes()), unit.map(str::as_bytes), "{answer:?}");
        }
    }

    /// The run that `pieces` make, if it is one: its unit, and how many of it.
    fn run_of(pieces: &[&str]) -> Option<(String, u32)> {
        let mut run = RunWatch::default();
        for piece in pieces {
            run.see(Some(piece.as_bytes()), true);
        }
        let unit = String::from_utf8(run.unit().to_vec()).unwrap();
        run.is_run().then(|| (unit, run.told() + run.untold()))
    }

    #[test]
    fn a_run_is_one_unit_in_two_events_or_more() {
        let token = "abcdefghijklmnopqrstuvwxyz012345";
        assert_eq!(token.len(), UNIT_BYTES_MAX);
        for (pieces, unit, units) in [
            (&["!!", "!", "!!!"][..], "!", 6),
            (&["haha", "ha", "ha"], "ha", 4),
            (&[token; 4], token, 4),
            // Some of it again, and no more: each of these is a whole.
            (&["haho"; 4], "haho", 4),
            (&["abcab"; 4], "abcab", 4),
            // Half an escape is none.
            (&[r"\\\\"; 4], r"\\\\", 4),
        ] {
            assert_eq!(run_of(pieces), Some((unit.to_owned(), units)), "{pieces:?}");
        }
        for pieces in [
            // One event, and too few of two.
            &["--------"][..],
            &["!", "!!"],
            // As long as the unit and with its last letter, and with some of the unit behind it.
            &[" the", " the", " the", " one"],
            &["ha-a", "ha-a", "ha-a", "ha-aha"],
            // No token is as long.
            &["abcdefghijklmnopqrstuvwxyz0123456"; 4],
        ] {
            assert_eq!(run_of(pieces), None, "{pieces:?}");
        }
    }

    #[test]
    fn long_runs_inside_an_answer_are_found_wherever_they_stand() {
        for unit in ["!", "ha", "no ", " the", "a, b;", "row | ", "<table>", "abcdefgh"] {
            for before in 0..2 * STRIDE {
                let answer = |times: usize| {
                    format!(
                        "{}{}0123456789",
                        "0123456789".repeat(STRIDE).split_at(before).0,
                        unit.repeat(times)
                    )
                };
                let long = answer(INSIDE_UNITS_MIN);
                let found = run_in(long.as_bytes()).map(|found| String::from_utf8_lossy(found).into_owned());
                let found = found.unwrap_or_else(|| panic!("{unit:?} behind {before}"));
                // It may begin anywhere in the unit.
                assert!(found.len() == unit.len() && unit.repeat(2).contains(&found), "{unit:?}: {found:?}");
                assert_eq!(run_in(answer(INSIDE_UNITS_MIN - 1).as_bytes()), None, "{unit:?} behind {before}");
            }
        }
    }

    #[test]
    fn who_is_asked_about_a_run_had_better_not_be_in_one() {
        assert!(repeats_itself(b"so the the the the"));
        assert!(!repeats_itself(b"so the the the"));
        assert!(!repeats_itself(b""));
    }

    #[test]
    fn a_run_between_quotes_is_known_by_what_it_says() {
        assert_eq!(run_in_json(br#"so\"\"\"\"\"\"\"\""#), Some(b"\"".to_vec()));
        assert_eq!(
            run_in_json(br#"\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9"#),
            Some("\u{e9}".into())
        );
        assert_eq!(run_in_json(b"Hello!"), None);
        assert_eq!(run_in_json(br"broken \x!!!!!!!!"), None);
    }

    /// Cuts `text` into pieces of the lengths given, in turn, each at a boundary of characters.
    fn cut<'a>(text: &'a str, lens: &[usize]) -> Vec<&'a str> {
        let (mut pieces, mut rest, mut turn) = (Vec::new(), text, 0);
        while !rest.is_empty() {
            let mut len = lens[turn % lens.len()].min(rest.len());
            while !rest.is_char_boundary(len) {
                len += 1;
            }
            let (piece, more) = rest.split_at(len);
            pieces.push(piece);
            (rest, turn) = (more, turn + 1);
        }
        pieces
    }

    proptest! {
        #[test]
        fn a_run_is_found_however_it_is_cut_and_the_client_has_none_of_it(
            before in "([a-z]{1,5} ){0,6}",
            lens in prop::collection::vec(1usize..6, 1..8),
            wary in any::<bool>(),
        ) {
            let run = "!".repeat(40);
            let pieces = [cut(&before, &lens), cut(&run, &lens)].concat();
            let (told, held, asked) = watch(&pieces, wary);
            prop_assert!(asked.is_some());
            // Units of one event come together.
            prop_assert!((8..13).contains(&held.len()), "{held:?}");
            prop_assert_eq!(told, before);
        }

        #[test]
        fn nothing_is_lost_doubled_or_moved(
            pieces in prop::collection::vec("[!a ]{0,3}", 0..60),
            wary in any::<bool>(),
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (told, held, asked) = watch(&pieces, wary);
            let upto = asked.map_or(pieces.len(), |place| place + 1);
            prop_assert_eq!(told + &held, pieces[..upto].concat());
        }

        #[test]
        fn short_runs_are_never_asked_about(
            unit in "[!a-c|]{1,4}",
            times in 1usize..8,
            behind in "[x-z]{1,4}",
        ) {
            let whole = unit_of(unit.as_bytes()).len();
            prop_assume!(whole == unit.len());
            let pieces: Vec<&str> =
                std::iter::repeat_n(unit.as_str(), times).chain([behind.as_str()]).collect();
            let (told, held, asked) = watch(&pieces, false);
            prop_assert_eq!((told + &held, asked), (pieces.concat(), None));
        }

        #[test]
        fn an_answer_with_a_run_is_known_by_its_unit(before in "[a-z ]{0,40}", unit in "[!#a-z]{1,8}", times in 32usize..60) {
            let answer = format!("{before}{}", unit.repeat(times));
            let found = run_in(answer.as_bytes()).map(<[u8]>::len);
            prop_assert!(found.is_some_and(|len| len <= unit.len()));
        }
    }
}
