//! The `evergate` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    evergate::cli::main()
}
