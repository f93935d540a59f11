//! What passes through unchanged, what is changed on purpose, and what never passes: HTTP as backends and
//! clients see it on both sides of evergate.

mod bodies;
mod connections;
mod grpc;
mod headers;
mod semantics;
mod smuggling;
mod timing;
mod tunnel;
