//! Watches over the connections that a lane keeps: one that its peer closes is dropped at once, and told.
//!
//! A kept connection has no task of its own. When it is kept, its socket is given the waker of the lane's one
//! watching task; that looks over all of them when it is woken, which happens when one is closed and not
//! otherwise. Keeping and taking one costs a request no more than two looks at a socket's readiness.

use std::sync::{Arc, OnceLock, Weak};
use std::task::{Wake, Waker};

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::upstream::Lane;

/// Of one lane. Its task ends with it.
#[derive(Default)]
pub(super) struct Keeper {
    bell: Arc<Bell>,
    watcher: OnceLock<AbortHandle>,
}

/// Rung by a socket.
#[derive(Default)]
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.notify_one();
    }
}

impl Keeper {
    /// Woken when a kept connection has something to say.
    pub(super) fn waker(&self, lane: &Arc<Lane>) -> Waker {
        self.watcher.get_or_init(|| {
            let watching = watch(Arc::downgrade(lane), Arc::clone(&self.bell));
            // Each look is a handful of loads for each connection; a budget would leave some unseen.
            tokio::spawn(tokio::task::unconstrained(watching)).abort_handle()
        });
        Waker::from(Arc::clone(&self.bell))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.get() {
            watcher.abort();
        }
    }
}

async fn watch(lane: Weak<Lane>, bell: Arc<Bell>) {
    let waker = Waker::from(Arc::clone(&bell));
    loop {
        bell.0.notified().await;
        let Some(lane) = lane.upgrade() else { return };
        lane.drop_closed(&waker);
    }
}
