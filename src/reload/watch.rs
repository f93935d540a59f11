//! When to look at the file: on a file event, every few seconds, and on SIGHUP.
//!
//! Events make it quick, the regular look makes it certain: some mounts tell nothing, and an event may be
//! lost. Both only look; whether anything is different is decided by content. The watch follows the
//! file's symbolic links and is set anew when one of them is swapped.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use parking_lot::RwLock;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};

use super::places::Places;
use super::{NoFile, Reloader, Trigger};
use crate::drain::Draining;

/// Quiet for so long after an event, a file counts as written.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// A file that is written without a pause is read after so long all the same.
const DEBOUNCE_MAX: Duration = Duration::from_secs(2);

/// Between two regular looks at the file. A look is one small read; five seconds is soon enough where
/// events do not come.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Follows the file and SIGHUP until the process drains. Spawn it once, on the control runtime. Dropping it
/// ends the watching; SIGHUP stays without effect then, it does not kill.
///
/// # Errors
/// SIGHUP cannot be listened for.
pub async fn watch(reloader: Arc<Reloader>, draining: Draining) -> io::Result<()> {
    watch_by(reloader, draining, Means { events: true, check_interval: CHECK_INTERVAL, hangup: true }).await
}

/// By what means to look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means {
    /// Ask the file system for events.
    pub(super) events: bool,
    /// Between two regular looks.
    pub(super) check_interval: Duration,
    /// Listen for SIGHUP. One signal reaches every watch of a process, which tests would not like.
    pub(super) hangup: bool,
}

pub(super) async fn watch_by(reloader: Arc<Reloader>, draining: Draining, means: Means) -> io::Result<()> {
    let hangup = means.hangup.then(|| signal(SignalKind::hangup())).transpose()?;
    tokio::select! {
        () = follow(&reloader, hangup, means) => {}
        () = draining.started() => {}
    }
    Ok(())
}

async fn follow(reloader: &Arc<Reloader>, mut hangup: Option<Signal>, means: Means) {
    let mut ticks = interval(means.check_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watching = Watching::default();
    loop {
        if means.events
            && let Some(path) = reloader.path()
        {
            watching.arm(Places::of(path));
        }
        tokio::select! {
            () = next(&mut hangup) => {
                if reloader.reload(Trigger::Signal).await == Err(NoFile) {
                    tracing::warn!("SIGHUP: there is no configuration file to read again");
                }
                // The look it cut short.
                watching.ring();
            }
            () = look(reloader, &watching, &mut ticks) => {}
        }
    }
}

/// Waits for a reason to look at the file, and for the file to be written, and looks.
async fn look(reloader: &Arc<Reloader>, watching: &Watching, ticks: &mut Interval) {
    let trigger = tokio::select! {
        () = watching.event() => {
            let settled = async { while timeout(DEBOUNCE, watching.event()).await.is_ok() {} };
            // Either way it is time to look.
            let _still_written = timeout(DEBOUNCE_MAX, settled).await;
            Trigger::FileEvent
        }
        _ = ticks.tick() => Trigger::FileCheck,
    };
    reloader.check(trigger).await;
}

/// The next of these signals; never, when there are none to come.
async fn next(signal: &mut Option<Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

/// The file system's events about our entries.
#[derive(Default)]
struct Watching {
    rang: Arc<Notify>,
    /// Read by the watcher's own thread.
    places: Arc<RwLock<Places>>,
    watcher: Option<RecommendedWatcher>,
}

impl Watching {
    fn ring(&self) {
        self.rang.notify_one();
    }

    /// An event concerned us. Many in a row ring once.
    async fn event(&self) {
        self.rang.notified().await;
    }

    /// Watches these places, anew if they are others than before. Without a watcher the regular look serves.
    fn arm(&mut self, places: Places) {
        if *self.places.read() == places {
            return;
        }
        let first_time = self.places.read().directories.is_empty();
        *self.places.write() = places;
        // A new watcher, rather than old watches taken back one by one: swaps are rare, and this cannot
        // leave a watch behind.
        self.watcher = match self.watch_places() {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                if first_time {
                    tracing::warn!("no file events ({error}): the configuration is looked at now and then");
                }
                None
            }
        };
        if !first_time {
            // What happened between the two watchers rang neither.
            self.ring();
        }
    }

    fn watch_places(&self) -> notify::Result<RecommendedWatcher> {
        let (rang, places) = (Arc::clone(&self.rang), Arc::clone(&self.places));
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if concerns(&event, &places.read()) {
                rang.notify_one();
            }
        })?;
        for directory in self.places.read().directories.keys() {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    }
}

/// Reading is no change, and our own reading must not ring for ever. When events were lost, look.
fn concerns(event: &notify::Result<Event>, places: &Places) -> bool {
    let Ok(event) = event else { return true };
    let reading = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
        EventKind::Access(_) => true,
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => false,
    };
    event.need_rescan() || (!reading && event.paths.iter().any(|path| places.concern(path)))
}
