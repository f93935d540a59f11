//! `evergate status`: how a running evergate and its backends are; also a container's health check.

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use http::StatusCode;
use serde_json::Value;

use super::table::render;
use super::{Refused, address, ask, print};
use crate::config;

/// Where evergate's admin address is by default.
const ADMIN_DEFAULT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9901);

/// Between two looks of --watch.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Cursor home, screen cleared.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Show how a running evergate and its backends are.
///
/// Asks the admin address; no token is needed to look. Colours only on a terminal and without NO_COLOR. Exit code:
/// 0 answered (with --ready: ready), 1 not.
#[derive(Args)]
#[command(after_help = "Examples:\n  evergate status\n  evergate status --watch\n  \
    evergate status --json | jq '.pools[].backends[] | select(.eligible | not) | .name'\n  \
    evergate status --ready          a container's health check")]
pub(super) struct StatusArgs {
    /// The admin address [default: the file's with -c, else 127.0.0.1:9901].
    #[arg(long, value_name = "ADDR", env = "EVERGATE_ADMIN", value_parser = address)]
    admin: Option<SocketAddr>,
    /// Take the admin address from this configuration.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The whole status as JSON; docs/admin.md has its fields.
    #[arg(long, conflicts_with_all = ["ready", "watch"])]
    json: bool,
    /// Only whether it takes requests: silent and 0, or one line and 1.
    #[arg(long, conflicts_with = "watch")]
    ready: bool,
    /// With --ready: and every pool has a backend that may receive requests.
    #[arg(long, requires = "ready")]
    pools: bool,
    /// Again every second, until interrupted.
    #[arg(short, long)]
    watch: bool,
}

impl StatusArgs {
    pub(super) fn ask(self) -> ExitCode {
        let done = self.address().and_then(|address| {
            if self.ready {
                self.ready(address)
            } else if self.watch {
                watch(address)
            } else {
                show(address, self.json)
            }
        });
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(refused) => refused.tell(),
        }
    }

    fn address(&self) -> Result<SocketAddr, Refused> {
        match (self.admin, &self.config) {
            (Some(address), _) => Ok(address),
            (None, Some(path)) => match config::load(path) {
                Ok(config) => Ok(config.admin.address),
                Err(errors) => Err(Refused::new(errors.to_string())),
            },
            (None, None) => Ok(ADMIN_DEFAULT),
        }
    }

    fn ready(&self, address: SocketAddr) -> Result<(), Refused> {
        let path = if self.pools { "/ready?pools=1" } else { "/ready" };
        let (status, body) = ask::get(address, path).map_err(Refused::new)?;
        if status == StatusCode::OK {
            return Ok(());
        }
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        let reason = answer["reason"].as_str().unwrap_or("it does not say why");
        Err(Refused::new(format!("evergate at {address} is not ready ({status}): {reason}")))
    }
}

fn show(address: SocketAddr, json: bool) -> Result<(), Refused> {
    let body = fetch(address, "/status")?;
    if json {
        print(&format!("{}\n", String::from_utf8_lossy(&body)));
    } else {
        print(&text(address, &body)?);
    }
    Ok(())
}

/// Never returns well: it is interrupted. Nobody there is shown, not fatal: it may come.
fn watch(address: SocketAddr) -> Result<(), Refused> {
    let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
    loop {
        let shown = fetch(address, "/status").and_then(|body| text(address, &body));
        print(&match shown {
            Ok(text) => format!("{clear}{text}\n"),
            Err(refused) => format!("{clear}{}\n", refused.text),
        });
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn fetch(address: SocketAddr, path: &str) -> Result<bytes::Bytes, Refused> {
    match ask::get(address, path) {
        Ok((StatusCode::OK, body)) => Ok(body),
        Ok((status, _)) => {
            Err(Refused::new(format!("{address} answers {status}: is it evergate's admin address?")))
        }
        Err(line) => Err(Refused::new(line)),
    }
}

fn text(address: SocketAddr, body: &[u8]) -> Result<String, Refused> {
    let colours =
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    match serde_json::from_slice(body) {
        Ok(status) => Ok(render(&status, colours)),
        Err(error) => {
            Err(Refused::new(format!("{address} answers something else than evergate's status: {error}")))
        }
    }
}
