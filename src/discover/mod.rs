//! Where backends are: names become addresses here, for as long as their backend is configured.
//!
//! So far by DNS (`dns`), a name being one backend whatever the number of its addresses. Runs on the
//! control thread; requests read what is known and wait only for the very first look-up.

mod dns;

use std::sync::Arc;

use crate::drain::Draining;
use crate::pool::{Directory, for_each_backend};
use crate::upstream::Resolver;

/// Label of the gauge `evergate_backend_tasks`.
pub const TASK: &str = "resolver";

/// Keeps the addresses of every backend that has a name up to date, through reloads, until the drain is
/// done. Dropping the future ends all look-ups.
pub async fn run(directory: Arc<Directory>, resolver: Arc<Resolver>, draining: Draining) {
    for_each_backend(directory, draining, TASK, |place| dns::keep_resolved(place, resolver.clone())).await;
}
