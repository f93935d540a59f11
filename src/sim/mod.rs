//! Simulated inference replicas: for the demo, for trials without a GPU, and for tests.
//!
//! Each is a real HTTP/1.1 and HTTP/2 server on a real port that speaks like vLLM, SGLang, llama.cpp
//! or a plain OpenAI-compatible server, answers deterministically, and can be made sick in every way
//! of the fault catalogue. No production module imports this one.
//!
//! `replica` is the life of one; `serve` answers a request; `api` understands it; `model` decides
//! what is said; `skin` how it is worded; `faults` what goes wrong.

mod api;
mod faults;
mod model;
mod replica;
mod serve;
mod skin;

pub use faults::Fault;
pub use model::{Continuation, Model, detokenize, tokenize};
#[cfg(test)]
pub(crate) use replica::Portless;
pub use replica::{Replica, ReplicaConfig, Stats};
pub use skin::Skin;
