//! The `evergate` binary: everything is in the library.

fn main() {}
