//! (being written)
use super::super::Moment;

/// First-token seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ewma {}

impl Ewma {
    /// Learns one value.
    pub fn observe(&mut self, now: Moment, secs: f64) {
        let _ = (now, secs);
    }
    /// The value, decayed towards the median.
    pub fn value_towards(&self, now: Moment, median: f64) -> f64 {
        let _ = now;
        median
    }
    /// The last value, undecayed; none before the first observation.
    pub fn value(&self) -> Option<f64> {
        None
    }
}

/// Recent failures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RecentFailures {}

impl RecentFailures {
    /// One more.
    pub fn fail(&mut self, now: Moment) {
        let _ = now;
    }
    /// At least 1: multiply (in-flight + 1) by it.
    pub fn factor(&self, now: Moment) -> f64 {
        let _ = now;
        1.0
    }
}
