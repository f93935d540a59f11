//! The journey of one request: admit → route → exchange → attempt → relay.

mod client;

pub use client::{Client, HeadDefect};
