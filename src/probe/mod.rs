//! Active health checks: what each backend answers when nobody needs it, and the clock of the judges.
//!
//! One prober per backend for the whole process, whatever the number of workers, also for backends that
//! are disabled or draining, so that enabling one is informed. It asks (`ask`), reads a verdict off the
//! answer (`verdict`) and hands it to the pool; whether a verdict counts against succeeding traffic is
//! `policy::health`'s to say. While a backend answers, it is also asked which models it has (`models`), and if the
//! operator wants it, how busy it is (`load`).
//!
//! Runs on the control thread, never on a worker.

mod ask;
mod canary;
mod load;
mod models;
mod prober;
mod ticks;
mod verdict;

use std::sync::Arc;

use crate::drain::Draining;
use crate::pool::{Directory, for_each_backend};

pub use load::{LOAD_TASK, read_loads};
pub use ticks::{TICK, keep_time};

/// Label of the gauge `evergate_backend_tasks`.
pub const TASK: &str = "prober";

/// Probes every backend of the configuration in force, through reloads, until the drain is done: what
/// still streams while draining may yet need to move to a backend known to be well. Dropping the future
/// ends all probers.
pub async fn run(directory: Arc<Directory>, draining: Draining) {
    for_each_backend(directory, draining, TASK, prober::probe_for_good).await;
}
