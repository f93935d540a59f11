//! Streams that break, against the same streams uncut: every byte, every engine's framing, crowds, chaos.
//!
//! `cargo test --test streams` is quick. The long forms are `ignored` and run by `.ci/soak streams [N]`. What a
//! client may see is judged in one place, `view`, and the answers come from models whose text is a function of the
//! text before it: so a stream that was spliced rightly equals the uncut one, and one spliced wrongly does not.
//!
//! Not here: how a splice is decided (`src/policy/resume/tests.rs`), real engines (`tests/realworld`).

// A test that unwraps in vain has failed, which is what it is for.
#![allow(clippy::unwrap_used)]
// Tests measure real time; only the crate itself must go through its clock.
#![allow(clippy::disallowed_methods)]
#![allow(unreachable_pub)]

mod chaos;
mod crowd;
mod engine;
mod every_byte;
mod memory;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
mod view;
