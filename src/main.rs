//! The `evergate` binary: everything is in the library.

/// docs/performance.md has what it saves.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    evergate::cli::main()
}
