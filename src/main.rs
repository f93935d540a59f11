//! The `evergate` binary: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The one place where `demo::run` comes in.
    evergate::cli::main_with(evergate::app::run, |_demo| ExitCode::FAILURE)
}
