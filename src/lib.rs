//! evergate: a load-balancing, failover reverse proxy for replicated AI inference servers.
//!
//! Modules stand in the order a reader should meet them: the journey of a request first
//! (`server` → `proxy` → `policy`), then what it rests on. `ARCHITECTURE.md` is the map, and
//! `tests/architecture.rs` keeps imports pointing downwards.

pub mod app;
pub mod cli;
pub mod demo;

pub mod admin;
pub mod server;
pub mod sim;

pub mod discover;
pub mod probe;
pub mod proxy;
pub mod reload;

pub mod pool;
pub mod upstream;

pub mod clock;
pub mod config;
pub mod drain;
pub mod net;
pub mod telemetry;

pub mod policy;
pub mod sse;
