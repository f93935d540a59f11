//! Decisions, and nothing else: values in, values out.
//!
//! No module below this one reads a clock, does I/O, logs, counts or knows the configuration file.
//! `now` and `rng` are arguments, state machines return their transitions, and the caller publishes
//! them. That is what lets balancing, health and retry be tested by the thousand from a seed.

pub mod admission;
pub mod balance;
pub mod degenerate;
pub mod dialect;
pub mod fallback;
pub mod health;
pub mod hedge;
pub mod identity;
pub mod json;
pub mod load;
pub mod moves;
pub mod outlier;
pub mod poison;
pub mod progress;
pub mod resume;
pub mod retry;
pub mod route;

mod moment;

pub use moment::Moment;
