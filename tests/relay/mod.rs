//! The answer on its way to the client: what breaks in it (F16 to F23), and clients that leave or dawdle (F34).

mod broken;
mod client;
