//! The server over real loopback sockets, with a toy in the handler's place.

mod ends;
mod requests;
mod smuggling;
mod sockets;
mod toy;
