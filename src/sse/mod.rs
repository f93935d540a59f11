//! Incremental framing of token streams: server-sent events and newline-delimited JSON.
//!
//! Bytes come in any split; whole events go out, with the exact bytes they were made of. Everything
//! the relay promises rests on that: it forwards *whole* events and forwards them *unchanged*, so a
//! replica that dies in the middle of one leaves nothing half-said at the client.
//!
//! Here is no notion of JSON, tokens or engines (see [`crate::policy::dialect`]), and no I/O.

mod decode;
mod encode;
mod lines;

pub use decode::{Decoder, Event, TooLarge};
pub use encode::{write_comment, write_event};
pub use lines::Lines;
