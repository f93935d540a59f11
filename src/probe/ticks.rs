//! The clock of the pools: ejections end, slow starts ramp, medians and gauges follow.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::drain::Draining;
use crate::pool::Directory;
use crate::telemetry::events::{PanicCaught, panic_message};

/// How often every pool takes notice of the time. An ejection ends so much late at worst; the shortest is a
/// second long.
pub const TICK: Duration = Duration::from_millis(100);

/// After a tick that panicked: a defect met at every tick must not fill the log.
const PANIC_PAUSE: Duration = Duration::from_secs(1);

/// Ticks every pool of the generation in force until the drain is done. A tick that panics is told of and
/// the next one comes all the same: without a clock no backend would ever return.
pub async fn keep_time(directory: Arc<Directory>, draining: Draining) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = draining.done() => return,
            _ = ticks.tick() => {}
        }
        let snapshot = directory.snapshot();
        for pool in &snapshot.pools {
            // Policies are plain values behind locks that do not poison: what a panic leaves is at worst stale.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| pool.tick())) {
                let task = format!("the clock of pool {}", pool.config.name);
                PanicCaught { task: &task, message: &panic_message(&*panic) }.emit(directory.telemetry());
                ticks.reset_after(PANIC_PAUSE);
            }
        }
    }
}
