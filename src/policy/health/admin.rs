//! The two axes put together: what the operator wants and what the backend can do.
//!
//! ```text
//!              Eligible  Probation  Busy  Refusing       Out
//!   Enabled    yes       one trial  no    panic: one     panic: one
//!   Draining   no        no         no    no             no
//!   Disabled   no        no         no    no             no
//! ```
//!
//! Draining and disabled differ only in what becomes of running work, which the caller sees to. Panic is
//! graded: when too few are eligible, a suspect carries one attempt at a time. Not zero, for the judge may
//! be wrong and only traffic can tell; not all, for that is how an overload becomes an outage. Busy is no
//! suspicion but a request to wait, so panic does not break it.

use super::Standing;

/// What the operator wants of a backend; a separate axis from its health.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Administrative {
    /// In service.
    #[default]
    Enabled,
    /// No new work; what runs may finish.
    Draining,
    /// No work.
    Disabled,
}

impl Administrative {
    /// For status pages and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Draining => "draining",
            Self::Disabled => "disabled",
        }
    }
}

/// Whether a new attempt may go there in ordinary times. In probation the caller must also win
/// [`begin_trial`](super::Health::begin_trial).
pub const fn may_receive(standing: Standing, admin: Administrative) -> bool {
    match admin {
        Administrative::Enabled => match standing {
            Standing::Eligible { .. } | Standing::Probation => true,
            Standing::Busy { .. } | Standing::Refusing | Standing::Out { .. } => false,
        },
        Administrative::Draining | Administrative::Disabled => false,
    }
}

/// Whether the verdicts about a pool's backends are to be doubted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Panic {
    /// Enough are eligible: verdicts hold.
    #[default]
    No,
    /// Too few: suspects may carry one attempt each.
    Graded,
}

/// Panic when at most one in so many is eligible. Five: losing four fifths at once is more often a wrong
/// judge or a broken network on our side than that many deaths, and the survivors would carry five times
/// their share.
const ELIGIBLE_ONE_IN: usize = 5;

impl Panic {
    /// Judges a pool of `members` enabled backends of which `eligible` are eligible. A pool of up to
    /// four panics only when none is eligible: one healthy replica is enough to serve.
    pub const fn judge(members: usize, eligible: usize) -> Self {
        if members == 0 {
            return Self::No;
        }
        if eligible == 0
            || (members >= ELIGIBLE_ONE_IN && eligible.saturating_mul(ELIGIBLE_ONE_IN) <= members)
        {
            Self::Graded
        } else {
            Self::No
        }
    }

    /// Whether a backend with `in_flight` unfinished attempts may get one more. The caller offers
    /// suspects only after the eligible ones it has not tried, and asks
    /// [`begin_trial`](super::Health::begin_trial) in probation.
    pub const fn admits(self, standing: Standing, admin: Administrative, in_flight: usize) -> bool {
        if may_receive(standing, admin) {
            return true;
        }
        match (self, admin, standing) {
            (Self::Graded, Administrative::Enabled, Standing::Refusing | Standing::Out { .. }) => {
                in_flight == 0
            }
            (Self::Graded | Self::No, _, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Administrative, Panic, Standing, may_receive};
    use crate::policy::Moment;

    const STANDINGS: [Standing; 5] = [
        Standing::Eligible { share: 1.0 },
        Standing::Probation,
        Standing::Busy { until: Moment::NEVER },
        Standing::Refusing,
        Standing::Out { until: None },
    ];

    #[test]
    fn truth_table_of_both_axes_holds() {
        let receives = |admin| STANDINGS.map(|standing| may_receive(standing, admin));
        assert_eq!(receives(Administrative::Enabled), [true, true, false, false, false]);
        assert_eq!(receives(Administrative::Draining), [false; 5]);
        assert_eq!(receives(Administrative::Disabled), [false; 5]);
    }

    #[test]
    fn panic_gives_suspects_one_attempt_each_and_leaves_the_busy_alone() {
        let admits = |panic: Panic, admin, in_flight| STANDINGS.map(|s| panic.admits(s, admin, in_flight));
        assert_eq!(admits(Panic::No, Administrative::Enabled, 0), [true, true, false, false, false]);
        assert_eq!(admits(Panic::Graded, Administrative::Enabled, 0), [true, true, false, true, true]);
        assert_eq!(admits(Panic::Graded, Administrative::Enabled, 1), [true, true, false, false, false]);
        assert_eq!(admits(Panic::Graded, Administrative::Draining, 0), [false; 5]);
        assert_eq!(admits(Panic::Graded, Administrative::Disabled, 0), [false; 5]);
    }

    #[test]
    fn small_pools_panic_only_when_nobody_is_eligible() {
        for members in 1..5 {
            assert_eq!(Panic::judge(members, 0), Panic::Graded);
            assert_eq!(Panic::judge(members, 1), Panic::No);
        }
        assert_eq!(Panic::judge(0, 0), Panic::No);
        assert_eq!(Panic::judge(5, 1), Panic::Graded);
        assert_eq!(Panic::judge(5, 2), Panic::No);
        assert_eq!(Panic::judge(100, 20), Panic::Graded);
        assert_eq!(Panic::judge(100, 21), Panic::No);
    }
}
