//! All integration tests in one binary: one link, one set of helpers (`support`), a module a subject.

// A test that unwraps in vain has failed, which is what it is for.
#![allow(clippy::unwrap_used)]
// Tests measure real time; only the crate itself must go through its clock.
#![allow(clippy::disallowed_methods)]

mod balance;
mod discover;
mod drain;
mod failover;
mod fallback;
mod health;
mod hygiene;
mod limits;
mod load;
mod opinion;
mod overload;
mod poison;
mod probe;
mod progress;
mod relay;
mod reload;
mod resume;
mod retry;
mod routing;
#[path = "support/selftest.rs"]
mod selftest;
mod sim;
mod support;
