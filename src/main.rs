//! The `evergate` binary: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The one place where `app::run` and `demo::run` come in.
    evergate::cli::main_with(|_plan| ExitCode::FAILURE, |_demo| ExitCode::FAILURE)
}
