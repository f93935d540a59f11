//! Where the configuration of a running process comes from: a file, and the flags that go over it.
//!
//! A reload reads the same file again and puts the same flags over it: what `--listen` said holds until the
//! process ends, whatever the file says later. The file must be right by itself.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::error::{ConfigError, ConfigErrors};
use super::load::COMMAND_LINE;
use super::validate::overlap;
use super::{AccessLogTarget, Config, Listener};

/// A file, and the flags of `evergate run` that go over it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The TOML file.
    pub path: PathBuf,
    /// What the command line said as well.
    pub flags: Overrides,
}

/// Flags that replace what the file says. `None` leaves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Address of the only listener; refused where the file has several.
    pub listen: Option<SocketAddr>,
    /// `admin.address`.
    pub admin: Option<SocketAddr>,
    /// `workers`.
    pub workers: Option<NonZeroUsize>,
    /// `telemetry.access_log`.
    pub access_log: Option<AccessLogTarget>,
    /// `telemetry.log_level`.
    pub log_level: Option<String>,
}

impl Source {
    /// Reads the file and puts the flags over it.
    ///
    /// # Errors
    /// The operator's: everything that is wrong, at once.
    pub fn load(&self) -> Result<Config, ConfigErrors> {
        self.flags.apply(super::load(&self.path)?)
    }

    /// As [`load`](Self::load), of a text that was read from the file already.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(&self, text: &str) -> Result<Config, ConfigErrors> {
        let origin = self.path.display().to_string();
        self.flags.apply(super::parse(text, &origin, &|name| std::env::var(name).ok())?)
    }
}

impl Overrides {
    /// Puts the flags over `config`.
    ///
    /// # Errors
    /// The operator's: a flag that does not fit the file.
    pub fn apply(&self, mut config: Config) -> Result<Config, ConfigErrors> {
        let Self { listen, admin, workers, access_log, log_level } = self;
        let mut errors = Vec::new();
        if let Some(listen) = *listen {
            match config.listeners.as_mut_slice() {
                [Listener { address, .. }] => *address = listen,
                several => errors.push(flag_error(
                    "--listen",
                    format!("can replace one listener only, and the file has {}", several.len()),
                    listen,
                    "write the address into the file",
                )),
            }
        }
        config.admin.address = admin.unwrap_or(config.admin.address);
        config.workers = workers.unwrap_or(config.workers);
        if let Some(target) = access_log {
            config.telemetry.access_log = target.clone();
        }
        if let Some(level) = log_level {
            config.telemetry.log_level.clone_from(level);
        }
        let admin_address = config.admin.address;
        let taken = config.listeners.iter().any(|listener| overlap(listener.address, admin_address));
        if taken && (listen.is_some() || admin.is_some()) {
            errors.push(flag_error(
                if admin.is_some() { "--admin" } else { "--listen" },
                "makes the listener and the admin address share a port".to_owned(),
                admin_address,
                "write another port",
            ));
        }
        ConfigErrors::new(errors).map_or(Ok(config), Err)
    }
}

fn flag_error(flag: &str, problem: String, value: SocketAddr, right: &str) -> ConfigError {
    ConfigError {
        origin: COMMAND_LINE.to_owned(),
        line: None,
        key: flag.to_owned(),
        problem,
        value: Some(format!("\"{value}\"")),
        right: right.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "[[listener]]\naddress = \"127.0.0.1:80\"\n[[pool]]\nbackends = [\"http://a:1\"]\n";

    fn read(text: &str) -> Config {
        crate::config::parse(text, "test", &|_| None).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn address(text: &str) -> Option<SocketAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn flags_go_over_the_file() {
        let flags = Overrides {
            listen: address("0.0.0.0:81"),
            admin: address("127.0.0.1:82"),
            workers: NonZeroUsize::new(3),
            access_log: Some(AccessLogTarget::Off),
            log_level: Some("warn".to_owned()),
        };
        let config = flags.apply(read(FILE)).unwrap();
        assert_eq!(Some(config.listeners[0].address), flags.listen);
        assert_eq!(Some(config.admin.address), flags.admin);
        assert_eq!(config.workers.get(), 3);
        assert_eq!(config.telemetry.access_log, AccessLogTarget::Off);
        assert_eq!(config.telemetry.log_level, "warn");
        assert_eq!(Overrides::default().apply(read(FILE)).unwrap(), read(FILE));
    }

    #[test]
    fn flags_that_do_not_fit_the_file_are_refused_by_name() {
        let two = format!("[[listener]]\naddress = \"127.0.0.1:79\"\n{FILE}");
        let listen = Overrides { listen: address("127.0.0.1:90"), ..Overrides::default() };
        let text = listen.apply(read(&two)).unwrap_err().to_string();
        assert!(
            text.contains("command line: --listen: can replace one listener only, and the file has 2"),
            "{text}"
        );
        let admin = Overrides { admin: address("127.0.0.1:80"), ..Overrides::default() };
        let text = admin.apply(read(FILE)).unwrap_err().to_string();
        assert!(text.contains("--admin: makes the listener and the admin address share a port"), "{text}");
    }
}
