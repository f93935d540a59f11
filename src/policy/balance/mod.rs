//! (being written) Which backend of a pool gets the next attempt.

/// How a pool chooses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BalancePolicy {}
