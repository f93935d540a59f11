//! (being written) How a backend is judged.

/// Thresholds of judgement.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HealthPolicy {}
