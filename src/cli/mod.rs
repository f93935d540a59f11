//! The command line: what was asked for, and the exit code it ends with.
//!
//! 0 is well, 1 is "no" (a wrong configuration, evergate not reachable or not ready), 2 is a command line
//! that makes no sense. `run` and `demo` end up elsewhere: here they only become a plan.

mod ask;
mod check;
mod run;
mod status;
mod table;

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::app;
use crate::config;
use crate::demo;

/// A wrong configuration; evergate not reachable, or not ready.
const NO: u8 = 1;
/// A command line that makes no sense.
const USAGE: u8 = 2;

/// One address in front of your inference replicas; what fails behind it is asked for elsewhere.
#[derive(Parser)]
#[command(
    name = "evergate",
    version,
    about,
    long_about = "One address in front of your inference replicas; what fails behind it is asked for elsewhere.\n\n\
        evergate balances requests over vLLM, SGLang, llama.cpp, Ollama, Triton and the like, judges every replica by \
        probes and by real traffic, and asks another one where one fails.",
    after_help = "Examples:\n  \
        evergate run --backend http://10.0.0.1:8000 --backend http://10.0.0.2:8000\n  \
        evergate run -c evergate.toml\n  \
        evergate check evergate.toml\n  \
        evergate status --watch",
    arg_required_else_help = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Check(check::CheckArgs),
    Status(status::StatusArgs),
    Demo(DemoArgs),
}

/// See it work: simulated replicas that fail, and evergate in front of them.
///
/// Needs no GPU and no configuration: replicas, clients and failures are all in this one process. Plays one round of
/// failures and ends with a count of what the clients saw; on a terminal evergate then stays up for you to try, until
/// Ctrl-C.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Examples:\n  evergate demo\n  evergate demo --once --plain\n  evergate demo --for 5m"
)]
struct DemoArgs {
    /// Go on for this long, round after round, and end.
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    length: Option<Duration>,
    /// Play one round and end, also on a terminal.
    #[arg(long, conflicts_with = "length")]
    once: bool,
    /// Lines of text instead of a live view; also what a pipe gets.
    #[arg(long)]
    plain: bool,
    /// Where the demo's evergate listens [default: a free port of 127.0.0.1].
    #[arg(long, value_name = "ADDR", value_parser = address)]
    listen: Option<SocketAddr>,
}

impl DemoArgs {
    fn options(self) -> demo::Options {
        let length = match self.length {
            Some(length) => demo::Length::For(length),
            None if self.once => demo::Length::Once,
            None => demo::Length::Open,
        };
        demo::Options { length, plain: self.plain, listen: self.listen }
    }
}

/// Does what the command line of this process asks for.
pub fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(shown) => {
            // Help and versions come this way too. A closed pipe is nobody's error.
            let _closed_pipe = shown.print();
            return ExitCode::from(if shown.use_stderr() { USAGE } else { 0 });
        }
    };
    match command {
        Command::Run(arguments) => match arguments.plan() {
            Ok(plan) => app::run(plan),
            Err(refused) => refused.tell(),
        },
        Command::Check(arguments) => arguments.check(),
        Command::Status(arguments) => arguments.ask(),
        Command::Demo(arguments) => demo::run(arguments.options()),
    }
}

/// Why a command came to nothing: for standard error, with the exit code.
#[derive(Debug)]
struct Refused {
    text: String,
    code: u8,
}

impl Refused {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: NO }
    }

    fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: USAGE }
    }

    fn tell(&self) -> ExitCode {
        let _nobody_reads = writeln!(std::io::stderr(), "{}", self.text);
        ExitCode::from(self.code)
    }
}

/// Writes to standard output; a reader that has gone is no error.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _nobody_reads = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// An address as people write it. Names but `localhost` are not looked up: a socket has a number.
fn address(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix("localhost:").and_then(|port| port.parse().ok()) {
        return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    }
    text.parse().map_err(|_| "write an IP address and a port, such as 127.0.0.1:8080 or [::]:8080".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    config::parse_duration(text).ok_or_else(|| "write a number with a unit, such as 30s or 1m30s".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_argument_says_what_it_is_for() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            assert!(command.get_after_help().is_some(), "{} has no examples", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn addresses_and_durations_are_read_as_people_write_them() {
        assert_eq!(address("localhost:99").unwrap().to_string(), "127.0.0.1:99");
        assert_eq!(address("[::]:80").unwrap().to_string(), "[::]:80");
        assert!(address("8080").unwrap_err().contains("127.0.0.1:8080"));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert!(duration("30").is_err());
    }
}
