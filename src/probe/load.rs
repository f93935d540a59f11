//! Asks engines how busy they are, where the operator wants it: others may send them work too.
//!
//! One reader per backend for the whole process, on connections of its own. What a page says is
//! `policy::load`'s to read; what becomes of it is the pool's: a correction to a count, forgotten after two seconds.
//! No answer, and no answer of any kind, counts against a backend here.

use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::config::Scrape;
use crate::drain::Draining;
use crate::policy::load;
use crate::pool::{Directory, Place, for_each_backend};
use crate::probe::ask::{self, Answered, Body};

/// Label of the gauge `evergate_backend_tasks`.
pub const LOAD_TASK: &str = "load";

/// Where engines have their metrics.
const METRICS_PATH: &str = "/metrics";
/// Longest page. vLLM's has a hundred KiB of histograms.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// For the whole page. An engine slower than this is told by its silence.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Until a backend without a page that says anything is asked again: it has to be restarted with another flag.
const ABSENT_PAUSE: Duration = Duration::from_secs(60);
/// Until a backend that gave no answer is asked again.
const FAILED_PAUSE: Duration = Duration::from_secs(5);

/// Reads the load of every backend of the configuration in force, through reloads, until the drain is done.
/// Dropping the future ends all readers.
pub async fn read_loads(directory: Arc<Directory>, draining: Draining) {
    for_each_backend(directory, draining, LOAD_TASK, read_for_good).await;
}

async fn read_for_good(place: Place) {
    let mut generations = place.directory.follow();
    loop {
        // Marked as seen before it is read: a swap in between rings again.
        generations.mark_unchanged();
        let Some((pool, _)) = place.now() else { return };
        let pause = match &pool.config.load.scrape {
            Scrape::Off => None,
            Scrape::Auto => Some(read_once(&place, METRICS_PATH).await),
            Scrape::Path(page) => Some(read_once(&place, page.as_str()).await),
        };
        drop(pool);
        let wait = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        if pause.is_none() {
            place.backend.forget_reported();
        }
        tokio::select! {
            biased;
            () = wait => {}
            changed = generations.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Asks once; returns how long to wait for the next time.
async fn read_once(place: &Place, page: &str) -> Duration {
    let Some((pool, i)) = place.now() else { return Duration::ZERO };
    let backend = &place.backend;
    let began = clock::now();
    let before = backend.in_flight();
    let answer = ask::get(&pool.members[i], page, PAGE_BYTES_MAX, TIMEOUT).await;
    let reported = match &answer {
        Ok(Answered { status, body: Body::Whole(page) }) if status.is_success() => load::parse(page),
        _ => None,
    };
    match (reported, answer) {
        (Some(reported), _) => {
            backend.set_reported(reported, before.max(backend.in_flight()));
            (began + pool.config.load.interval).since(clock::now())
        }
        (None, Ok(Answered { status, body: Body::Whole(_) | Body::Beginning(_) }))
            if !status.is_server_error() =>
        {
            backend.forget_reported();
            ABSENT_PAUSE
        }
        (None, _) => {
            backend.forget_reported();
            FAILED_PAUSE
        }
    }
}
