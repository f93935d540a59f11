//! `evergate check`: is this file right, and what does it mean in full?

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args};

use super::run::check_files;
use super::{Refused, print};
use crate::config;

/// Validate a configuration and show all of it, defaults included.
///
/// Names every mistake at once, each with its line, its key and what would be right; also looks into the certificates
/// and keys the file names. What is printed is a complete configuration with secrets masked. Exit code: 0 right,
/// 1 wrong.
#[derive(Args)]
#[command(
    group = ArgGroup::new("which").required(true),
    after_help = "Examples:\n  evergate check evergate.toml\n  evergate check -q evergate.toml && systemctl reload evergate"
)]
pub(super) struct CheckArgs {
    /// Configuration file (TOML).
    #[arg(value_name = "FILE", group = "which")]
    file: Option<PathBuf>,
    /// The same, as `evergate run` has it.
    #[arg(short, long, value_name = "FILE", group = "which")]
    config: Option<PathBuf>,
    /// Print nothing when it is right.
    #[arg(short, long)]
    quiet: bool,
}

impl CheckArgs {
    pub(super) fn check(self) -> ExitCode {
        match self.read() {
            Ok(effective) => {
                print(&effective);
                ExitCode::SUCCESS
            }
            Err(refused) => refused.tell(),
        }
    }

    fn read(self) -> Result<String, Refused> {
        let Some(path) = self.file.or(self.config) else {
            return Err(Refused::usage("error: name the file to check"));
        };
        let config = config::load(&path).map_err(|errors| Refused::new(errors.to_string()))?;
        check_files(&config)?;
        Ok(if self.quiet { String::new() } else { config.effective_toml() })
    }
}
