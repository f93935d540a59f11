//! When a stream leaves a backend that is on its way out: drained by the operator, or gone from the configuration.
//!
//! ```text
//! drained ── move_after ──▶ another leg is begun beside the old one ── end_after ──▶ the old leg is closed
//! ```
//!
//! Most answers end by themselves before the first deadline, and nothing is asked of anybody. Between the two the
//! stream moves, make before break: the old leg is given up only when the new one has something new to say. What
//! cannot be moved finishes where it is, up to the second deadline.
//!
//! Not here: how a stream is continued (`policy::resume`), and who drained what.

use std::time::Duration;

use super::moment::Moment;

/// Between two beginnings of a move that came to nothing: a peer may have come back.
pub const MOVE_AGAIN: Duration = Duration::from_secs(5);

/// Moves that one stream begins: it may meet a rolling restart of a few replicas, and must not wander for ever.
pub const MOVES_MAX: u8 = 4;

/// The deadlines of a stream at a backend that is being drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainClocks {
    /// Then it is moved.
    pub move_after: Duration,
    /// Then its old leg is closed, whatever became of the move.
    pub end_after: Duration,
}

/// What becomes of such a stream now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing; look again then.
    Stay(Moment),
    /// Begin to move it; look again then.
    Move(Moment),
    /// Its time is over.
    End,
}

impl DrainClocks {
    /// For a backend drained at `since`, and a stream that has begun so many moves.
    pub fn step(&self, since: Moment, begun: u8, now: Moment) -> Step {
        let end = since + self.end_after;
        if end <= now {
            return Step::End;
        }
        let due = since + self.move_after + MOVE_AGAIN * u32::from(begun);
        if begun >= MOVES_MAX {
            Step::Stay(end)
        } else if due <= now {
            Step::Move(end.min(now + MOVE_AGAIN))
        } else {
            Step::Stay(due.min(end))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCKS: DrainClocks =
        DrainClocks { move_after: Duration::from_secs(30), end_after: Duration::from_secs(300) };

    fn at(seconds: u64) -> Moment {
        Moment::from_micros(1_000_000_000 + seconds * 1_000_000)
    }

    #[test]
    fn a_stream_stays_then_moves_then_ends() {
        assert_eq!(CLOCKS.step(at(0), 0, at(0)), Step::Stay(at(30)));
        assert_eq!(CLOCKS.step(at(0), 0, at(29)), Step::Stay(at(30)));
        assert_eq!(CLOCKS.step(at(0), 0, at(30)), Step::Move(at(35)));
        assert_eq!(CLOCKS.step(at(0), 1, at(31)), Step::Stay(at(35)));
        assert_eq!(CLOCKS.step(at(0), 1, at(35)), Step::Move(at(40)));
        assert_eq!(CLOCKS.step(at(0), 0, at(299)), Step::Move(at(300)));
        assert_eq!(CLOCKS.step(at(0), 0, at(300)), Step::End);
    }

    #[test]
    fn a_stream_that_could_not_be_moved_is_left_alone_until_its_time_is_over() {
        assert_eq!(CLOCKS.step(at(0), MOVES_MAX, at(200)), Step::Stay(at(300)));
        assert_eq!(CLOCKS.step(at(0), MOVES_MAX, at(300)), Step::End);
    }

    #[test]
    fn with_equal_deadlines_nothing_moves_before_its_time_is_over() {
        let clocks = DrainClocks { move_after: Duration::from_secs(9), end_after: Duration::from_secs(9) };
        assert_eq!(clocks.step(at(0), 0, at(0)), Step::Stay(at(9)));
        assert_eq!(clocks.step(at(0), 0, at(9)), Step::End);
    }
}
