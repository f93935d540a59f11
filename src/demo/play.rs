//! The play: which replica gets into which trouble, when, and for how long.
//!
//! One trouble at a time, each given back before the next: kill a replica and start it again, freeze another
//! and thaw it. A trouble is over when evergate sends work to the replica again, not when the replica runs.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock;
use crate::demo::screen::Screen;
use crate::demo::tally::{self, Books, Condition, Tally, Troubles};
use crate::demo::{Length, words};
use crate::policy::Moment;
use crate::policy::health::Operational;
use crate::pool::Directory;
use crate::sim::Replica;
use crate::telemetry::metrics::Metrics;

/// Between two looks whether a replica is back.
const LOOK: Duration = Duration::from_millis(20);

/// How long things last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Before the first trouble: this is what all is well looks like.
    pub(super) warm_up: Duration,
    /// A killed replica stays dead.
    pub(super) dead: Duration,
    /// A frozen one stays frozen: long enough for probes to find out and streams to be given up.
    pub(super) frozen: Duration,
    /// Longest wait until evergate sends work again.
    pub(super) back_max: Duration,
    /// After each trouble.
    pub(super) calm: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self { warm_up: s(3), dead: s(4), frozen: s(5), back_max: s(5), calm: s(2) }
    }
}

/// Who and what a play works with.
pub(super) struct Cast<'a> {
    pub(super) replicas: &'a [Arc<Replica>],
    pub(super) directory: &'a Arc<Directory>,
    pub(super) books: &'a Mutex<Books>,
    pub(super) screen: &'a Mutex<Screen>,
    pub(super) metrics: &'a Metrics,
    pub(super) began: Moment,
}

/// One performance.
pub(super) struct Play<'a> {
    cast: Cast<'a>,
    pace: Pace,
    /// No pause goes beyond it.
    end: Moment,
    troubles: Troubles,
}

/// Whether evergate sends work to every replica.
pub(super) fn all_back(directory: &Directory) -> bool {
    let snapshot = directory.look();
    snapshot.members().all(|(_, member)| {
        let state = member.backend.whole().read(|health| health.operational());
        matches!(state, Operational::Healthy | Operational::SlowStart)
    })
}

impl<'a> Play<'a> {
    pub(super) fn new(cast: Cast<'a>, pace: Pace) -> Self {
        Self { cast, pace, end: Moment::NEVER, troubles: Troubles::default() }
    }

    /// What was done so far.
    pub(super) fn troubles(&self) -> Troubles {
        self.troubles
    }

    /// Plays a round, or rounds until the time is over. Dropping it leaves replicas as they are.
    pub(super) async fn run(&mut self, length: Length) {
        let rounds = match length {
            Length::Open | Length::Once => 1,
            Length::For(time) => {
                self.end = clock::now() + time;
                usize::MAX
            }
        };
        let n = self.cast.replicas.len();
        self.pause(self.pace.warm_up, &words::next_kill(&self.name(0))).await;
        let before = self.cast.books.lock().total.clone();
        self.tell(words::CLIENTS, &words::calm(&before));
        for round in 0..rounds {
            if self.is_over() {
                return;
            }
            self.kill((2 * round) % n).await;
            if self.is_over() {
                return;
            }
            self.freeze((2 * round + 1) % n).await;
        }
    }

    async fn kill(&mut self, i: usize) {
        let (replica, name) = (&self.cast.replicas[i], self.name(i));
        let moved = self.begin(i, Condition::Dead, &words::killed(&name));
        self.troubles.kills += 1;
        replica.kill().await;
        self.pause(self.pace.dead, &words::next_start(&name)).await;
        match replica.revive().await {
            Ok(()) => self.given_back(i, &words::started(&name)),
            // Somebody else took the port, which the replica holds reserved: told, and seen in the numbers.
            Err(error) => self.tell(words::DEMO, &format!("{name} cannot be started again: {error}")),
        }
        self.over(i, moved, "dead").await;
    }

    async fn freeze(&mut self, i: usize) {
        let (replica, name) = (&self.cast.replicas[i], self.name(i));
        let moved = self.begin(i, Condition::Frozen, &words::frozen(&name));
        self.troubles.freezes += 1;
        replica.freeze();
        self.pause(self.pace.frozen, &words::next_thaw(&name)).await;
        replica.thaw();
        self.given_back(i, &words::thawed(&name));
        self.over(i, moved, "frozen").await;
    }

    /// A trouble begins: it is announced first, so that what follows from it comes after it.
    fn begin(&self, i: usize, condition: Condition, text: &str) -> u64 {
        let mut books = self.cast.books.lock();
        books.trouble = Tally::default();
        books.conditions[i] = condition;
        drop(books);
        self.tell(words::DEMO, text);
        tally::moved(&self.cast.metrics.render())
    }

    fn given_back(&self, i: usize, text: &str) {
        self.cast.books.lock().conditions[i] = Condition::Runs;
        self.tell(words::DEMO, text);
    }

    /// Waits until the replica works again, and says what clients saw of it all.
    async fn over(&self, i: usize, moved_before: u64, was: &str) {
        self.cast.books.lock().next = Some((words::next_back(&self.name(i)), Moment::NEVER));
        let back = async {
            while !all_back(self.cast.directory) {
                tokio::time::sleep(LOOK).await;
            }
        };
        // Either way it goes on: a replica that does not come back is seen in the view.
        let _ = tokio::time::timeout(self.pace.back_max, back).await;
        self.pause(self.pace.calm, words::NEXT_CALM).await;
        let moved = tally::moved(&self.cast.metrics.render()).saturating_sub(moved_before);
        let seen = self.cast.books.lock().trouble.clone();
        self.tell(words::CLIENTS, &words::seen(&self.name(i), was, &seen, moved));
    }

    async fn pause(&self, time: Duration, next: &str) {
        let now = clock::now();
        let until = (now + time).min(self.end);
        self.cast.books.lock().next = Some((next.to_owned(), until));
        tokio::time::sleep(until.since(now)).await;
    }

    fn is_over(&self) -> bool {
        clock::now() >= self.end
    }

    fn name(&self, i: usize) -> String {
        self.cast.replicas[i].config().name.clone()
    }

    fn tell(&self, who: &str, text: &str) {
        self.cast.screen.lock().line(clock::now().since(self.cast.began), who, text);
    }
}
