//! Hot reload: read → validate → diff → prepare → apply → commit, all or nothing.
//!
//! Whatever fails on the way changes nothing: the last good configuration stays in force, and the
//! failure is kept as a report until a good one is applied. One reload at a time; the next waits. A
//! reload that has begun to apply runs to its end even if whoever asked for it has gone. Files are read
//! and changes are applied off the control thread, so a hung mount delays nobody else.
//!
//! What triggers a reload is in `watch`; what besides the pools follows it is a [`Follower`] of `app`.

mod places;
mod reading;
mod report;
#[cfg(test)]
mod tests;
mod watch;

pub use report::{Outcome, Report, Trigger};
pub use watch::watch;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

use crate::clock;
use crate::config::{self, Change, Config, ConfigError, Effect, Source};
use crate::pool::Directory;
use crate::telemetry::events::{PanicCaught, ReloadApplied, ReloadRefused, ReloadUnchanged};
use reading::{FileHashes, Reading};

/// A file that is not there is looked for again so often: a rename leaves a gap.
const VANISH_RETRIES: usize = 5;

/// Between two looks for a file that is not there.
const VANISH_PAUSE: Duration = Duration::from_millis(100);

/// A file that came by itself and is wrong is read once more after this long: an editor that truncates
/// and writes shows half a file for a moment. Whoever *asks* for a reload is answered at once.
const SETTLE_PAUSE: Duration = Duration::from_millis(500);

/// What besides the pools follows a configuration: listening sockets, the admin address, logs.
pub trait Follower: Send + Sync {
    /// Makes ready what a change needs (binds sockets, reads certificates, opens the log file). Nothing is
    /// in force yet, and what is returned may be dropped instead of called. Called on a thread that may
    /// block, within the control runtime. Certificates of all listeners are to be read again: a renewed
    /// one comes as [`Change::FileContent`], without any other change.
    ///
    /// # Errors
    /// One line for the operator, naming the address or file at fault.
    fn prepare(&self, new: &Config, changes: &[Change]) -> Result<Box<dyn FnOnce() + Send>, String>;
}

/// Keeps the running configuration up with its file. Share it in an `Arc`.
pub struct Reloader {
    source: Option<Source>,
    directory: Arc<Directory>,
    follower: Box<dyn Follower>,
    /// Held by the reload that runs.
    known: Arc<tokio::sync::Mutex<Known>>,
    reports: Mutex<Reports>,
}

/// There is no file to read again: evergate was started by flags alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoFile;

/// What was read before.
#[derive(Debug, Default)]
struct Known {
    /// Of the content in force, once it has been read.
    in_force: Option<u64>,
    /// Of the content refused last.
    refused: Option<u64>,
    /// Of wrong content that came by itself and has had its second chance.
    suspect: Option<u64>,
    /// Content of the files that the configuration in force names.
    files: FileHashes,
}

#[derive(Default)]
struct Reports {
    latest: Option<Arc<Report>>,
    refusal: Option<Arc<Report>>,
}

impl Reloader {
    /// For the configuration `directory` has now. `source` is none when evergate was started by flags
    /// alone. Reads the files that configuration names (certificates), so that a change of them is seen.
    pub fn new(source: Option<Source>, directory: Arc<Directory>, follower: Box<dyn Follower>) -> Self {
        let files = reading::hash_files(&directory.look().config);
        let known = Known { files, ..Known::default() };
        Self {
            source,
            directory,
            follower,
            known: Arc::new(tokio::sync::Mutex::new(known)),
            reports: Mutex::default(),
        }
    }

    /// The file that is read again.
    pub fn path(&self) -> Option<&Path> {
        self.source.as_ref().map(|source| source.path.as_path())
    }

    /// How the last reload ended.
    pub fn latest(&self) -> Option<Arc<Report>> {
        self.reports.lock().latest.clone()
    }

    /// Why the file as it is now is not in force; none when it is.
    pub fn refusal(&self) -> Option<Arc<Report>> {
        self.reports.lock().refusal.clone()
    }

    /// Reads the file now and applies it, after any reload that runs. Reports whatever it finds.
    ///
    /// # Errors
    /// There is no file.
    pub async fn reload(self: &Arc<Self>, trigger: Trigger) -> Result<Arc<Report>, NoFile> {
        let source = self.source.as_ref().ok_or(NoFile)?;
        let known = Arc::clone(&self.known).lock_owned().await;
        let reading = self.read(source).await;
        Ok(self.install(known, reading, trigger).await)
    }

    /// Looks whether the file is another one than in force or refused, and only then reloads. Dropping the
    /// future leaves the file for the next look, or lets what has begun to apply run to its end.
    async fn check(self: &Arc<Self>, trigger: Trigger) -> Option<Arc<Report>> {
        let source = self.source.as_ref()?;
        let mut waited = false;
        loop {
            let mut known = Arc::clone(&self.known).lock_owned().await;
            let reading = Reading::of(source).await;
            let fingerprint = Some(reading.fingerprint);
            if known.refused == fingerprint {
                return None;
            }
            if reading.outcome.is_err() && !waited && known.suspect != fingerprint {
                known.suspect = fingerprint;
                waited = true;
                // Whoever asks meanwhile is not kept waiting.
                drop(known);
                tokio::time::sleep(SETTLE_PAUSE).await;
                continue;
            }
            if known.refused.is_none() && self.is_in_force(&known, &reading) {
                known.in_force = fingerprint;
                return None;
            }
            return Some(self.install(known, reading, trigger).await);
        }
    }

    /// A file that is not there is looked for again, for a moment.
    async fn read(&self, source: &Source) -> Reading {
        let mut reading = Reading::of(source).await;
        for _ in 0..VANISH_RETRIES {
            if !reading.is_missing() {
                break;
            }
            tokio::time::sleep(VANISH_PAUSE).await;
            reading = Reading::of(source).await;
        }
        reading
    }

    /// Whether the file says what is in force, comments and order aside.
    fn is_in_force(&self, known: &Known, reading: &Reading) -> bool {
        known.in_force == Some(reading.fingerprint)
            || reading.outcome.as_ref().is_ok_and(|config| {
                config::diff(&self.directory.look().config, config).is_empty()
                    && reading.changed_files(&known.files).is_empty()
            })
    }

    /// Applies what was read, on a thread that may block, to the end whatever becomes of this future.
    async fn install(
        self: &Arc<Self>,
        mut known: OwnedMutexGuard<Known>,
        reading: Reading,
        trigger: Trigger,
    ) -> Arc<Report> {
        let this = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let report = this.decide(&mut known, reading, trigger);
            this.keep(report)
        });
        match work.await {
            Ok(report) => report,
            // A panic of ours: contained, told, and for the operator a refusal.
            Err(panic) => {
                PanicCaught { task: &"reload", message: &panic }.emit(self.directory.telemetry());
                let error = self.error(format!("cannot be applied, by a defect of evergate: {panic}"));
                self.keep(self.refused(vec![error], trigger))
            }
        }
    }

    fn decide(&self, known: &mut Known, reading: Reading, trigger: Trigger) -> Report {
        match self.apply(known, &reading, trigger) {
            Ok(report) => {
                let in_force = Some(reading.fingerprint);
                *known = Known { in_force, files: reading.files, ..Known::default() };
                report
            }
            Err(errors) => {
                known.refused = Some(reading.fingerprint);
                self.refused(errors, trigger)
            }
        }
    }

    fn apply(&self, known: &Known, reading: &Reading, trigger: Trigger) -> Result<Report, Vec<ConfigError>> {
        let mut config = reading.outcome.clone()?;
        let old = self.directory.snapshot();
        let (waiting, mut changes): (Vec<Change>, Vec<Change>) = config::diff(&old.config, &config)
            .into_iter()
            .partition(|change| change.effect() == Effect::Restart);
        // The running values stay in the configuration in force: the difference goes on to be told until
        // the restart, and nothing is built for workers that do not run.
        config.workers = old.config.workers;
        config.telemetry = old.config.telemetry.clone();
        changes.extend(reading.changed_files(&known.files));
        let needs_restart: Vec<String> = waiting.iter().map(ToString::to_string).collect();
        let telemetry = self.directory.telemetry();
        let report = |generation, outcome| Report {
            generation,
            at: clock::wall(),
            trigger,
            outcome,
            needs_restart: needs_restart.clone(),
        };
        if changes.is_empty() {
            let waiting = needs_restart.iter().map(|line| format!("; {line}")).collect::<String>();
            ReloadUnchanged { generation: old.generation, waiting: &waiting }.emit(telemetry);
            return Ok(report(old.generation, Outcome::Unchanged));
        }
        let commit = self.follower.prepare(&config, &changes).map_err(|text| vec![self.error(text)])?;
        let applied = self
            .directory
            .apply(config)
            .map_err(|error| vec![self.error(format!("cannot be applied: {error}"))])?;
        commit();
        let lines: Vec<String> = changes.iter().map(ToString::to_string).collect();
        let told = [lines.as_slice(), &needs_restart].concat().join("; ");
        ReloadApplied { generation: applied.generation, changes: &told }.emit(telemetry);
        let (added, removed) = (applied.added, applied.removed);
        Ok(report(applied.generation, Outcome::Applied { changes: lines, added, removed }))
    }

    fn refused(&self, errors: Vec<ConfigError>, trigger: Trigger) -> Report {
        let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        ReloadRefused { errors: errors.len(), report: &text }.emit(self.directory.telemetry());
        Report {
            generation: self.directory.look().generation,
            at: clock::wall(),
            trigger,
            outcome: Outcome::Refused { errors, text },
            needs_restart: Vec::new(),
        }
    }

    fn keep(&self, report: Report) -> Arc<Report> {
        let report = Arc::new(report);
        let mut reports = self.reports.lock();
        reports.refusal = report.is_refused().then(|| Arc::clone(&report));
        reports.latest = Some(Arc::clone(&report));
        report
    }

    /// An error about the whole file.
    fn error(&self, problem: String) -> ConfigError {
        ConfigError {
            origin: self.path().map(|path| path.display().to_string()).unwrap_or_default(),
            line: None,
            key: String::new(),
            problem,
            value: None,
            right: String::new(),
        }
    }
}
