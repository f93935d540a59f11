//! (being written) From request head and model name to a pool.

/// One rule.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Route {}
