//! `evergate run`: from flags and a file to a configuration that is right, before anything starts.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::{Refused, address};
use crate::app::Plan;
use crate::config::{self, Config, ConfigErrors, Overrides, Source};

const NOTHING_TO_DO: &str = "\
error: nothing to proxy to: name a configuration file or at least one backend

  evergate run -c evergate.toml
  evergate run --backend http://10.0.0.1:8000 --backend http://10.0.0.2:8000

Help: evergate run --help";

/// Start the proxy.
///
/// By a file (-c), which is followed while evergate runs: a change is applied at once, or refused whole and told. Or by
/// --backend alone, with every protection at its default.
///
/// --listen, --admin, --workers, --access-log and --log go over the file, and stay over it when the file changes.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    evergate run --backend http://10.0.0.1:8000 --backend http://10.0.0.2:8000\n  \
    evergate run -c evergate.toml\n  \
    evergate run -c evergate.toml --listen 0.0.0.0:8000 --log debug\n\n\
    SIGTERM and SIGINT end it once running answers are finished (a second one: at once). SIGHUP reads the file again.\n\
    EVERGATE_LOG, where set, wins over --log.")]
pub(super) struct RunArgs {
    /// Configuration file (TOML); docs/configuration.md has every key.
    #[arg(short, long, value_name = "FILE", conflicts_with = "backend")]
    config: Option<PathBuf>,
    /// A replica's URL; repeat it for each one. Instead of a file.
    #[arg(long, value_name = "URL")]
    backend: Vec<String>,
    /// Where clients connect [default: the file's, else 127.0.0.1:8080].
    #[arg(long, value_name = "ADDR", value_parser = address)]
    listen: Option<SocketAddr>,
    /// Where status, metrics and draining are [default: the file's, else 127.0.0.1:9901].
    #[arg(long, value_name = "ADDR", value_parser = address)]
    admin: Option<SocketAddr>,
    /// Data-plane threads [default: the file's, else one per core].
    #[arg(long, value_name = "N", value_parser = workers)]
    workers: Option<NonZeroUsize>,
    /// One record per request: stdout, stderr, off, or a path with a / [default: the file's, else stdout].
    #[arg(long, value_name = "WHERE")]
    access_log: Option<String>,
    /// off, error, warn, info, debug, trace, or directives such as info,evergate::proxy=debug [default: the file's,
    /// else info].
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

impl RunArgs {
    /// What to run: everything in it has been checked, the files it names included.
    pub(super) fn plan(self) -> Result<Plan, Refused> {
        let Self { config, backend, listen, admin, workers, access_log, log } = self;
        let (access_log, log_level) =
            config::telemetry_flags(access_log.as_deref(), log.as_deref()).map_err(wrong)?;
        let flags = Overrides { listen, admin, workers, access_log, log_level };
        let plan = match config {
            Some(path) => {
                let source = Source { path, flags };
                Plan { config: source.load().map_err(wrong)?, source: Some(source) }
            }
            None if backend.is_empty() => return Err(Refused::usage(NOTHING_TO_DO)),
            None => {
                let by_flags = config::from_flags(listen, admin, &backend, workers.map(NonZeroUsize::get));
                Plan { config: by_flags.and_then(|config| flags.apply(config)).map_err(wrong)?, source: None }
            }
        };
        check_files(&plan.config)?;
        Ok(plan)
    }
}

fn wrong(errors: ConfigErrors) -> Refused {
    Refused::new(errors.to_string())
}

/// Refuses a configuration whose certificates, keys or log directory are not what they should be.
pub(super) fn check_files(config: &Config) -> Result<(), Refused> {
    let errors = config.check_files();
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    match lines.len() {
        0 => Ok(()),
        1 => Err(Refused::new(format!("{}\n1 error in the files it names", lines[0]))),
        many => Err(Refused::new(format!("{}\n{many} errors in the files it names", lines.join("\n")))),
    }
}

fn workers(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .ok()
        .filter(|workers: &NonZeroUsize| workers.get() <= 1024)
        .ok_or_else(|| "write a number from 1 to 1024".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;
    use crate::config::AccessLogTarget;

    fn plan(arguments: &[&str]) -> Result<Plan, Refused> {
        let arguments = ["evergate", "run"].iter().chain(arguments);
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Run(run) => run.plan(),
            _ => panic!("run is run"),
        }
    }

    #[test]
    fn backends_alone_are_enough() {
        let plan = plan(&[
            "--backend",
            "http://a:1",
            "--backend",
            "http://b:2",
            "--listen",
            "127.0.0.1:81",
            "--workers",
            "3",
            "--access-log",
            "off",
            "--log",
            "warn",
        ])
        .unwrap();
        assert_eq!(plan.config.pools[0].backends.len(), 2);
        assert_eq!(plan.config.listeners[0].address.port(), 81);
        assert_eq!(plan.config.workers.get(), 3);
        assert_eq!(plan.config.telemetry.access_log, AccessLogTarget::Off);
        assert_eq!(plan.config.telemetry.log_level, "warn");
        assert_eq!(plan.source, None);
    }

    #[test]
    fn flags_go_over_the_file_and_stay_for_its_reloads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "workers = 2\n[[pool]]\nbackends = [\"http://a:1\"]\n").unwrap();
        let path = file.path().display().to_string();
        let plan = plan(&["-c", &path, "--workers", "5", "--admin", "127.0.0.1:7"]).unwrap();
        assert_eq!((plan.config.workers.get(), plan.config.admin.address.port()), (5, 7));
        assert_eq!(plan.source.unwrap().load().unwrap(), plan.config);
    }

    #[test]
    fn nothing_to_proxy_to_shows_both_ways() {
        let refused = plan(&["--listen", "127.0.0.1:81"]).err().unwrap();
        assert!(refused.text.contains("run -c") && refused.text.contains("--backend http://"));
        assert_eq!(refused.code, 2);
    }

    #[test]
    fn wrong_flags_are_named_as_flags() {
        for (arguments, expected) in [
            (&["--backend", "ftp://a"][..], "command line: --backend"),
            (&["--backend", "http://a:1", "--log", "loud"], "command line: --log: is not a log level"),
            (&["--backend", "http://a:1", "--access-log", "here"], "command line: --access-log: "),
            (
                &["--backend", "http://a:1", "--access-log", "/not/there/at/all"],
                "telemetry.access_log: its directory is not there",
            ),
        ] {
            let refused = plan(arguments).err().unwrap();
            assert!(refused.text.contains(expected), "{}", refused.text);
            assert_eq!(refused.code, 1);
        }
    }
}
