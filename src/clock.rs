//! The only reading of time and entropy, and the coarse alarm clock of a worker.
//!
//! Everything that waits for a time in the data plane waits on an [`Alarm`]: a request costs no
//! timer of its own, because a tokio timer per request measured +5 % instructions. Setting and
//! clearing one is an atomic store; one task per worker looks over the set alarms at most once per
//! [`ALARM_TICK`], only when the earliest of them may be due, and parks while there is none. So
//! alarms ring up to a tick late, never early. They are not for waits that need to be exact: use
//! tokio's timers there.

use std::cell::Cell;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::policy::Moment;

/// Least time between two looks over the alarms, thus how late one may ring. Smaller finds an
/// ejection's rescue or an expired clock sooner and costs wake-ups: 25 ms is a fortieth of the
/// shortest clock evergate has.
pub const ALARM_TICK: Duration = Duration::from_millis(25);

/// Age of the process when it first asks for the time. A test's paused clock stands at the moment its
/// runtime was built, a little before the first asking; without a head start that would be before time began.
pub const HEAD_START: Duration = Duration::from_secs(1);

/// Environment variable with a number that makes [`rng`] repeat itself, for replays.
pub const SEED_VARIABLE: &str = "EVERGATE_SEED";

thread_local! {
    /// When the turn under way on this thread began.
    static TURN: Cell<Option<Moment>> = const { Cell::new(None) };
    /// Its number; the last one's between two turns.
    static TURNS: Cell<u64> = const { Cell::new(0) };
}

/// Microseconds since [`HEAD_START`] before the process first asked. Follows tokio's clock, which
/// tests may pause; works outside a runtime too. Never goes back. Within a [`Turn`] it stands still.
pub fn now() -> Moment {
    TURN.get().unwrap_or_else(read)
}

#[allow(clippy::disallowed_methods)]
fn read() -> Moment {
    let since_start = Instant::now().saturating_duration_since(start());
    Moment::ZERO + since_start
}

/// One poll of a connection: all that happens in it happens at one moment. A request asks for the time some twenty
/// times in three polls, and each reading of the clock costs it more than most of its decisions.
///
/// Ends when dropped. One inside another changes nothing.
#[derive(Debug)]
pub struct Turn {
    outermost: bool,
    /// It belongs to the thread it began on.
    _here: PhantomData<*const ()>,
}

impl Turn {
    /// Begins now, and must end before the poll does.
    #[must_use = "it ends at once"]
    pub fn begin() -> Self {
        let outermost = TURN.get().is_none();
        if outermost {
            TURN.set(Some(read()));
            TURNS.set(match TURNS.get() {
                0 => THREADS.fetch_add(TURNS_PER_THREAD, Ordering::Relaxed) | 1,
                turns => turns + 1,
            });
        }
        Self { outermost, _here: PhantomData }
    }

    /// A number that no other turn of the process has; none outside of turns. What could not go on in a turn cannot
    /// later in it: whatever would let it go on wakes its task, and so begins another.
    pub fn number() -> Option<NonZeroU64> {
        TURN.get().and(NonZeroU64::new(TURNS.get()))
    }
}

/// Turns are counted by each thread: more than a thread has in a lifetime.
const TURNS_PER_THREAD: u64 = 1 << 44;
static THREADS: AtomicU64 = AtomicU64::new(0);

impl Drop for Turn {
    fn drop(&mut self) {
        if self.outermost {
            TURN.set(None);
        }
    }
}

/// The calendar's time: for logs and certificates, never for measuring.
#[allow(clippy::disallowed_methods)]
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// A fresh generator. Seeded from the thread's own, or, with `EVERGATE_SEED` set, from that number
/// and how many generators were made before. Make one per worker and keep it.
pub fn rng() -> fastrand::Rng {
    #[cfg(test)]
    if let Some(rng) = world::rng() {
        return rng;
    }
    static SEED: OnceLock<Option<u64>> = OnceLock::new();
    static MADE: AtomicU64 = AtomicU64::new(0);
    let fixed =
        SEED.get_or_init(|| std::env::var(SEED_VARIABLE).ok().and_then(|text| text.trim().parse().ok()));
    match fixed {
        Some(seed) => seeded_rng(*seed, MADE.fetch_add(1, Ordering::Relaxed)),
        None => fastrand::Rng::new(),
    }
}

/// How long it is until `at`, a moment of the standard library's clock as some crates give it; zero once passed.
#[allow(clippy::disallowed_methods)]
pub fn until(at: std::time::Instant) -> Duration {
    Instant::from_std(at).saturating_duration_since(Instant::now())
}

/// Generator number `nth` of a seed: neighbours share nothing (the increment is splitmix64's).
fn seeded_rng(seed: u64, nth: u64) -> fastrand::Rng {
    fastrand::Rng::with_seed(seed.wrapping_add(nth.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// Where [`Moment::ZERO`] lies. Taken from the real clock even when a test paused tokio's: a start
/// in one test's made-up future would make time stand still in all others.
#[allow(clippy::disallowed_methods)]
fn start() -> Instant {
    #[cfg(test)]
    if let Some(begun) = world::start() {
        return begun;
    }
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(|| {
        let asked = std::time::Instant::now();
        // None only within a second of the machine's own start.
        Instant::from_std(asked.checked_sub(HEAD_START).unwrap_or(asked))
    })
}

/// `at` on tokio's clock; `None` when it is too far to have a name there, as [`Moment::NEVER`] is.
fn instant(at: Moment) -> Option<Instant> {
    start().checked_add(Duration::from_micros(at.as_micros()))
}

/// The alarm clock of one worker. Cloning gives the same clock.
///
/// Nothing rings unless [`Alarms::run`] is running on the worker's runtime.
#[derive(Clone, Debug, Default)]
pub struct Alarms(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Time of the last look: alarms compare themselves with it, so that polling one reads no clock.
    looked_at: AtomicU64,
    /// No alarm is set for earlier than this (it may be stale towards early).
    due: AtomicU64,
    /// Wakes the look-out when `due` became earlier or the first flag is watched.
    nudge: Notify,
    registry: Mutex<Registry>,
}

/// Who is registered. Locked to register, drop, watch and look; never while waking.
#[derive(Debug, Default)]
struct Registry {
    entries: Vec<Arc<Entry>>,
    /// Distinct epochs under watch: looking at these each tick instead of at every alarm keeps ten
    /// thousand open streams as cheap as ten.
    epochs: Vec<WatchedEpoch>,
    /// The look-out already comes back within a tick, so a new watcher need not nudge it.
    ticking: bool,
    /// Last time all entries were gone through.
    scanned_at: Moment,
}

#[derive(Debug)]
struct WatchedEpoch {
    epoch: Arc<AtomicU64>,
    /// Its value when last looked at.
    last: u64,
    watchers: usize,
}

/// What an alarm and the look-out share.
#[derive(Debug)]
struct Entry {
    /// Rings when the look-out's time is not before it; `u64::MAX` is never.
    at: AtomicU64,
    /// Its place in `Registry::entries`, written under the registry's lock.
    place: AtomicUsize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    waker: Option<Waker>,
    watch: Option<Watch>,
}

#[derive(Debug)]
struct Watch {
    epoch: Arc<AtomicU64>,
    seen: u64,
}

impl Watch {
    fn differs(&self) -> bool {
        self.epoch.load(Ordering::Acquire) != self.seen
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            looked_at: AtomicU64::new(0),
            due: AtomicU64::new(Moment::NEVER.as_micros()),
            nudge: Notify::new(),
            registry: Mutex::default(),
        }
    }
}

impl Alarms {
    /// A clock without alarms.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers an alarm, not set to any time. Reuse it: `set` is cheaper than a new one.
    pub fn alarm(&self) -> Alarm {
        let mut registry = self.0.registry.lock();
        let entry = Arc::new(Entry {
            at: AtomicU64::new(Moment::NEVER.as_micros()),
            place: AtomicUsize::new(registry.entries.len()),
            waiting: Mutex::default(),
        });
        registry.entries.push(Arc::clone(&entry));
        Alarm { clock: self.clone(), entry }
    }

    /// Registered alarms, set or not.
    pub fn len(&self) -> usize {
        self.0.registry.lock().entries.len()
    }

    /// Whether no alarm is registered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The look-out. Run one per clock, on the worker's own runtime; it never ends, and dropping it
    /// leaves alarms that do not ring. It makes no wake-ups while no alarm is set and none watched.
    pub async fn run(self) {
        loop {
            match self.look().and_then(instant) {
                None => self.0.nudge.notified().await,
                Some(next) => {
                    tokio::select! {
                        biased;
                        () = tokio::time::sleep_until(next) => {}
                        () = self.0.nudge.notified() => {}
                    }
                }
            }
        }
    }

    /// Wakes whoever is due and says when to look again; `None` is "when nudged".
    fn look(&self) -> Option<Moment> {
        let now = now();
        self.0.looked_at.store(now.as_micros(), Ordering::SeqCst);
        let mut rung = Vec::new();
        let next = {
            let mut registry = self.0.registry.lock();
            let mut an_epoch_moved = false;
            for watched in &mut registry.epochs {
                let current = watched.epoch.load(Ordering::Acquire);
                an_epoch_moved |= current != watched.last;
                watched.last = current;
            }
            let soonest = registry.scanned_at + ALARM_TICK;
            let due = Moment::from_micros(self.0.due.load(Ordering::SeqCst));
            if an_epoch_moved || (now >= due && now >= soonest) {
                self.scan(&mut registry, now, &mut rung);
            }
            registry.ticking = !registry.epochs.is_empty();
            let due = Moment::from_micros(self.0.due.load(Ordering::SeqCst));
            if registry.ticking {
                Some(now + ALARM_TICK)
            } else if due == Moment::NEVER {
                None
            } else {
                Some(due.max(registry.scanned_at + ALARM_TICK))
            }
        };
        // Outside the lock: a waker may drop its task, and with it an alarm.
        rung.into_iter().for_each(Waker::wake);
        next
    }

    /// Goes through all entries: collects the wakers of those that ring and finds the next to be due.
    fn scan(&self, registry: &mut Registry, now: Moment, rung: &mut Vec<Waker>) {
        // Before reading any entry: an alarm set from another thread meanwhile is either read below
        // or finds `due` at NEVER and lowers it.
        self.0.due.store(Moment::NEVER.as_micros(), Ordering::SeqCst);
        let mut earliest = Moment::NEVER.as_micros();
        for entry in &registry.entries {
            let at = entry.at.load(Ordering::SeqCst);
            let expired = at <= now.as_micros();
            if !expired {
                earliest = earliest.min(at);
            }
            let mut waiting = entry.waiting.lock();
            if expired || waiting.watch.as_ref().is_some_and(Watch::differs) {
                rung.extend(waiting.waker.take());
            }
        }
        self.0.due.fetch_min(earliest, Ordering::SeqCst);
        registry.scanned_at = now;
    }
}

/// One alarm: a time, an epoch to watch, and whoever waits for either. Unregisters on drop.
#[derive(Debug)]
pub struct Alarm {
    clock: Alarms,
    entry: Arc<Entry>,
}

impl Alarm {
    /// Rings at `at`, instead of any earlier setting. A moment already past rings within a tick.
    pub fn set(&self, at: Moment) {
        let at = at.as_micros();
        self.entry.at.store(at, Ordering::SeqCst);
        // Rare: `due` is the earliest of all alarms, and a newly set one is seldom that.
        if at < self.clock.0.due.load(Ordering::SeqCst) {
            self.clock.0.due.fetch_min(at, Ordering::SeqCst);
            self.clock.0.nudge.notify_one();
        }
    }

    /// Does not ring for time any more, nor if it was about to. A watched epoch stays watched.
    pub fn clear(&self) {
        self.entry.at.store(Moment::NEVER.as_micros(), Ordering::SeqCst);
    }

    /// Also rings as soon as `epoch` differs from `seen`: at once when polled, within a tick when
    /// waiting. This is how an ejection on another thread rescues the attempts waiting here.
    /// `None` watches nothing. Costs one uncontended lock.
    pub fn watch(&self, epoch: Option<Arc<AtomicU64>>, seen: u64) {
        let watch = epoch.map(|epoch| Watch { epoch, seen });
        let nudge = watch.as_ref().is_some_and(|watch| self.clock.start_watching(&watch.epoch));
        let (former, woken) = {
            let mut waiting = self.entry.waiting.lock();
            let former = std::mem::replace(&mut waiting.watch, watch);
            let late = waiting.watch.as_ref().is_some_and(Watch::differs);
            (former, if late { waiting.waker.take() } else { None })
        };
        if let Some(former) = former {
            self.clock.stop_watching(&former.epoch);
        }
        if nudge {
            self.clock.0.nudge.notify_one();
        }
        woken.into_iter().for_each(Waker::wake);
    }

    /// Ready while the set time is past or the watched epoch differs; stays so until `set`, `clear`
    /// or `watch` says otherwise. Remembers the latest waker only.
    pub fn poll_expired(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut waiting = self.entry.waiting.lock();
        match &mut waiting.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        // After leaving the waker: a look that missed it has already stored its time.
        let expired = self.entry.at.load(Ordering::SeqCst) <= self.clock.0.looked_at.load(Ordering::SeqCst);
        if expired || waiting.watch.as_ref().is_some_and(Watch::differs) {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Whether the watched epoch differs now: why it rang, where both were possible.
    pub fn rang_for_epoch(&self) -> bool {
        self.entry.waiting.lock().watch.as_ref().is_some_and(Watch::differs)
    }

    /// Waits until it rings. Dropping the future changes nothing.
    pub async fn expired(&self) {
        poll_fn(|cx| self.poll_expired(cx)).await;
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let watch = self.entry.waiting.lock().watch.take();
        if let Some(watch) = watch {
            self.clock.stop_watching(&watch.epoch);
        }
        let mut registry = self.clock.0.registry.lock();
        let place = self.entry.place.load(Ordering::Relaxed);
        debug_assert!(Arc::ptr_eq(&registry.entries[place], &self.entry));
        registry.entries.swap_remove(place);
        if let Some(moved) = registry.entries.get(place) {
            moved.place.store(place, Ordering::Relaxed);
        }
    }
}

impl Alarms {
    /// Counts a watcher of `epoch`; true when the look-out must be told.
    fn start_watching(&self, epoch: &Arc<AtomicU64>) -> bool {
        let mut registry = self.0.registry.lock();
        match registry.epochs.iter_mut().find(|watched| Arc::ptr_eq(&watched.epoch, epoch)) {
            Some(watched) => watched.watchers += 1,
            None => {
                let last = epoch.load(Ordering::Acquire);
                registry.epochs.push(WatchedEpoch { epoch: Arc::clone(epoch), last, watchers: 1 });
            }
        }
        !std::mem::replace(&mut registry.ticking, true)
    }

    fn stop_watching(&self, epoch: &Arc<AtomicU64>) {
        let mut registry = self.0.registry.lock();
        if let Some(place) = registry.epochs.iter().position(|watched| Arc::ptr_eq(&watched.epoch, epoch)) {
            registry.epochs[place].watchers -= 1;
            if registry.epochs[place].watchers == 0 {
                registry.epochs.swap_remove(place);
            }
        }
    }
}

/// A world of a test's own on its thread: time that begins with it, and chance from its seed, so that one seed is
/// one history.
#[cfg(test)]
pub(crate) mod world {
    use std::cell::Cell;

    use super::{HEAD_START, Instant, seeded_rng};

    thread_local! {
        static NOW: Cell<Option<World>> = const { Cell::new(None) };
    }

    #[derive(Clone, Copy)]
    struct World {
        start: Instant,
        seed: u64,
        generators: u64,
    }

    /// Ends the world when dropped.
    pub(crate) struct End;

    impl Drop for End {
        fn drop(&mut self) {
            NOW.set(None);
        }
    }

    /// Begins one, on the clock of the runtime this is called on, which should be paused.
    #[allow(clippy::disallowed_methods)]
    pub(crate) fn begin(seed: u64) -> End {
        NOW.set(Some(World { start: Instant::now() - HEAD_START, seed, generators: 0 }));
        End
    }

    pub(super) fn start() -> Option<Instant> {
        NOW.get().map(|world| world.start)
    }

    pub(super) fn rng() -> Option<fastrand::Rng> {
        let world = NOW.get()?;
        NOW.set(Some(World { generators: world.generators + 1, ..world }));
        Some(seeded_rng(world.seed, world.generators))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn started() -> Alarms {
        let alarms = Alarms::new();
        tokio::spawn(alarms.clone().run());
        alarms
    }

    #[tokio::test(start_paused = true)]
    async fn time_stands_still_within_a_turn_and_goes_on_behind_it() {
        let step = Duration::from_millis(1);
        let outer = Turn::begin();
        let begun = now();
        tokio::time::advance(step).await;
        let number = Turn::number();
        drop(Turn::begin());
        assert_eq!((now(), Turn::number()), (begun, number), "the end of an inner one ends nothing");
        drop(outer);
        assert_eq!(now(), begun + step);
        let panicked = std::panic::catch_unwind(|| {
            let _turn = Turn::begin();
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(panicked.is_err());
        tokio::time::advance(step).await;
        assert_eq!(now(), begun + step * 2, "a panic ends one, too");
    }

    #[test]
    fn every_turn_of_every_thread_has_a_number_of_its_own() {
        fn two() -> [Option<NonZeroU64>; 2] {
            [(); 2].map(|()| {
                let _turn = Turn::begin();
                Turn::number()
            })
        }
        assert_eq!(Turn::number(), None);
        let numbers = [two(), std::thread::spawn(two).join().unwrap()].concat();
        let different: std::collections::BTreeSet<_> = numbers.iter().copied().flatten().collect();
        assert_eq!((different.len(), Turn::number()), (4, None));
    }

    #[tokio::test(start_paused = true)]
    async fn alarm_rings_within_a_tick_after_its_time_and_not_before() {
        let alarms = started();
        for wait in [1, 26, 1000, 75_000] {
            let alarm = alarms.alarm();
            let at = now() + Duration::from_millis(wait);
            alarm.set(at);
            alarm.expired().await;
            let late = now().since(at);
            assert!(now() >= at, "rang early");
            assert!(late <= ALARM_TICK + Duration::from_millis(1), "rang {late:?} late after {wait} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_setting_replaces_a_later_one_and_the_reverse() {
        let alarms = started();
        let alarm = alarms.alarm();
        let begin = now();
        alarm.set(begin + Duration::from_secs(60));
        let ringing = async {
            alarm.expired().await;
            now().since(begin)
        };
        let resetting = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            alarm.set(begin + Duration::from_secs(1));
        };
        let (rang, ()) = tokio::join!(ringing, resetting);
        assert!(rang >= Duration::from_secs(1) && rang < Duration::from_millis(1030), "{rang:?}");

        let begin = now();
        alarm.set(begin + Duration::from_secs(1));
        alarm.set(begin + Duration::from_secs(5));
        alarm.expired().await;
        assert!(now().since(begin) >= Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cleared_alarm_stays_silent() {
        let alarms = started();
        let alarm = alarms.alarm();
        alarm.set(now() + Duration::from_secs(1));
        alarm.clear();
        let silent = tokio::time::timeout(Duration::from_secs(100), alarm.expired()).await;
        assert!(silent.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_moved_epoch_rings_for_those_who_watch_it_only() {
        let alarms = started();
        let (epoch, other) = (Arc::new(AtomicU64::new(7)), Arc::new(AtomicU64::new(7)));
        let (watching, aside) = (alarms.alarm(), alarms.alarm());
        watching.watch(Some(Arc::clone(&epoch)), 7);
        aside.watch(Some(Arc::clone(&other)), 7);
        let begin = now();
        // Tasks of their own: joined, the waiting would be polled again whenever the bump is.
        let ring = tokio::spawn(async move {
            watching.expired().await;
            (watching.rang_for_epoch(), now().since(begin))
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        epoch.fetch_add(1, Ordering::Release);
        let rung = tokio::time::timeout(Duration::from_secs(1), ring).await.expect("not rescued");
        let (for_epoch, rang) = rung.unwrap();
        assert!(rang >= Duration::from_millis(300) && rang <= Duration::from_millis(330), "{rang:?}");
        assert!(for_epoch);
        assert!(!aside.rang_for_epoch());
        assert!(tokio::time::timeout(Duration::from_secs(1), aside.expired()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_epoch_already_moved_rings_at_once() {
        let alarms = started();
        let alarm = alarms.alarm();
        alarm.watch(Some(Arc::new(AtomicU64::new(8))), 7);
        let begin = now();
        alarm.expired().await;
        assert_eq!(now(), begin);
        alarm.watch(None, 0);
        assert!(!alarm.rang_for_epoch());
    }

    #[tokio::test(start_paused = true)]
    async fn an_ejection_on_another_thread_rings_here() {
        let alarms = started();
        let epoch = Arc::new(AtomicU64::new(0));
        let waiting: Vec<_> = (0..100)
            .map(|_| {
                let alarm = alarms.alarm();
                alarm.watch(Some(Arc::clone(&epoch)), 0);
                tokio::spawn(async move { alarm.expired().await })
            })
            .collect();
        tokio::time::sleep(ALARM_TICK * 4).await;
        std::thread::spawn(move || epoch.store(1, Ordering::Release)).join().unwrap();
        for task in waiting {
            tokio::time::timeout(ALARM_TICK * 2, task).await.expect("not rescued").unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_clock_makes_no_wake_ups() {
        let alarms = Alarms::new();
        let kept = alarms.alarm();
        assert_eq!(alarms.look(), None, "an alarm that is not set needs no look");
        kept.set(now() + Duration::from_secs(75));
        let next = alarms.look().unwrap();
        assert!(next >= now() + Duration::from_secs(75), "an idle connection needs one look, at its end");
        kept.watch(Some(Arc::default()), 0);
        assert_eq!(alarms.look(), Some(now() + ALARM_TICK));
        drop(kept);
        tokio::time::advance(Duration::from_secs(80)).await;
        assert_eq!(alarms.look(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn dropping_alarms_in_any_order_unregisters_just_them() {
        let alarms = started();
        let mut kept: Vec<_> = (0..10_u64)
            .map(|nth| {
                let alarm = alarms.alarm();
                alarm.set(now() + Duration::from_secs(nth + 1));
                alarm
            })
            .collect();
        drop(kept.remove(0));
        drop(kept.pop());
        drop(kept.swap_remove(3));
        assert_eq!(alarms.len(), 7);
        for alarm in &kept {
            alarm.expired().await;
        }
        drop(kept);
        assert!(alarms.is_empty());
        assert!(alarms.0.registry.lock().epochs.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_waker_that_drops_its_task_may_drop_an_alarm() {
        /// Waking it drops the alarm it owns.
        struct Dropper(Mutex<Option<Arc<Alarm>>>, AtomicBool);
        impl std::task::Wake for Dropper {
            fn wake(self: Arc<Self>) {
                self.0.lock().take();
                self.1.store(true, Ordering::SeqCst);
            }
        }
        let alarms = started();
        let alarm = Arc::new(alarms.alarm());
        alarm.set(now() + Duration::from_millis(10));
        let dropper = Arc::new(Dropper(Mutex::new(Some(Arc::clone(&alarm))), AtomicBool::new(false)));
        let waker = Waker::from(Arc::clone(&dropper));
        assert!(alarm.poll_expired(&mut Context::from_waker(&waker)).is_pending());
        drop(alarm);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(dropper.1.load(Ordering::SeqCst));
        assert!(alarms.is_empty());
    }

    /// Real time and real threads: what the orderings of `set` against `look` are for.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn alarms_set_from_other_threads_are_not_missed() {
        let alarms = started();
        let tasks: Vec<_> = (0..100)
            .map(|seed| {
                let alarms = alarms.clone();
                tokio::spawn(async move {
                    let mut rng = seeded_rng(seed, 0);
                    let alarm = alarms.alarm();
                    for _ in 0..5 {
                        let at = now() + Duration::from_micros(rng.u64(0..40_000));
                        alarm.set(at);
                        alarm.expired().await;
                        assert!(now() >= at, "rang early");
                    }
                })
            })
            .collect();
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(30), task).await.expect("missed an alarm").unwrap();
        }
        assert!(alarms.is_empty());
    }

    #[test]
    fn time_works_outside_a_runtime_and_does_not_go_back() {
        let first = now();
        assert!(now() >= first);
        assert!(instant(Moment::NEVER).is_none_or(|at| at > start()));
    }

    #[test]
    fn a_seed_repeats_its_generators_and_tells_them_apart() {
        let draw = |seed, nth| seeded_rng(seed, nth).u64(..);
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
    }
}
