//! What the parts of one connection know about its progress, in one place: who waits for whom, since when.
//!
//! hyper holds the socket, the service and the answers' bodies; each of them is wrapped and leaves its facts
//! here, and the connection's own task derives from them which clock runs. All of it happens on one
//! worker, mostly in one task: plain atomic loads and stores, no lock and no allocation per request.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Waker;

use parking_lot::Mutex;

use super::guard::Defect;
use crate::clock;
use crate::config::ClientClocks;
use crate::policy::Moment;
use crate::proxy::HeadDefect;

/// How long a closed connection is still read, so that what is unread does not turn the close into a reset
/// that destroys the last answer on its way (RFC 9112 §9.6).
const LINGER: std::time::Duration = std::time::Duration::from_secs(1);

/// The clock that runs out next, and what its end means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// Nothing is asked for.
    Idle,
    /// A head has begun and does not end.
    Head,
    /// The client takes nothing.
    SlowReader,
    /// Closed, and read a little longer.
    Linger,
}

/// The facts of one connection.
#[derive(Debug)]
pub(super) struct Pulse {
    /// Requests handed to the handler.
    calls: AtomicU64,
    /// Of those, the ones not answered to the end.
    exchanges: AtomicUsize,
    /// When the last exchange ended, or the connection began.
    idle_since: AtomicU64,
    /// When the head now being read began; NEVER between heads.
    head_since: AtomicU64,
    /// Since when the socket takes nothing more; NEVER while it does.
    stalled_since: AtomicU64,
    /// Since when the closed connection is only emptied; NEVER before.
    lingers_since: AtomicU64,
    defect_head: AtomicU64,
    defect: AtomicU8,
    /// The connection is HTTP's no longer.
    tunnel: AtomicBool,
    /// The socket is closed, or to be treated so.
    gone: AtomicBool,
    /// Who waits for the tunnel's end: its reader, and the task that watches it.
    tunnel_wakers: Mutex<[Option<Waker>; 2]>,
    /// An answer's end is the connection's end (HTTP/1.0).
    ends_by_close: AtomicBool,
    /// The socket is to be closed by a reset.
    reset: AtomicBool,
    /// How often everything written had left for the socket.
    settled: AtomicU64,
    /// Broken bodies that wait for that.
    holders: Mutex<Vec<Waker>>,
    holding: AtomicBool,
    task: OnceLock<Waker>,
}

/// An exchange that is not answered to its end. Dropping it is its end, whatever the reason.
#[derive(Debug)]
pub(super) struct Exchange(Arc<Pulse>);

impl Pulse {
    pub(super) fn new() -> Arc<Self> {
        let never = || AtomicU64::new(Moment::NEVER.as_micros());
        Arc::new(Self {
            calls: AtomicU64::new(0),
            exchanges: AtomicUsize::new(0),
            idle_since: AtomicU64::new(clock::now().as_micros()),
            head_since: never(),
            stalled_since: never(),
            lingers_since: never(),
            defect_head: AtomicU64::new(u64::MAX),
            defect: AtomicU8::new(0),
            tunnel: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            tunnel_wakers: Mutex::default(),
            ends_by_close: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            settled: AtomicU64::new(0),
            holders: Mutex::new(Vec::new()),
            holding: AtomicBool::new(false),
            task: OnceLock::new(),
        })
    }

    /// The task that drives the connection, to be woken for broken bodies.
    pub(super) fn driven_by(&self, task: &Waker) {
        self.task.get_or_init(|| task.clone());
    }

    /// Counts a request: its number on the connection, from 1, and what ends with it.
    pub(super) fn call(self: &Arc<Self>) -> (u64, Exchange) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
        (self.calls.fetch_add(1, Ordering::Relaxed) + 1, Exchange(Arc::clone(self)))
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(super) fn busy(&self) -> bool {
        self.exchanges.load(Ordering::Relaxed) > 0
    }

    /// When the last exchange ended, or the connection began.
    pub(super) fn idle_since(&self) -> Moment {
        get(&self.idle_since)
    }

    pub(super) fn in_head(&self) -> bool {
        is_set(&self.head_since)
    }

    /// Says whether a head is being read; `fresh` when it is another one than before.
    pub(super) fn set_in_head(&self, in_head: bool, fresh: bool) {
        match (in_head, is_set(&self.head_since)) {
            (true, set) if fresh || !set => set_now(&self.head_since),
            (false, true) => clear(&self.head_since),
            _ => {}
        }
    }

    /// The socket takes nothing more.
    pub(super) fn stalls(&self) {
        if !is_set(&self.stalled_since) {
            set_now(&self.stalled_since);
        }
    }

    /// The socket took something.
    pub(super) fn flows(&self) {
        if is_set(&self.stalled_since) {
            clear(&self.stalled_since);
        }
    }

    pub(super) fn lingers(&self) {
        if !is_set(&self.lingers_since) {
            set_now(&self.lingers_since);
        }
    }

    pub(super) fn set_defect(&self, defect: Defect) {
        self.defect.store(number_of(defect.what), Ordering::Relaxed);
        self.defect_head.store(defect.head, Ordering::Relaxed);
    }

    /// What is wrong with head number `head`, or with one before it.
    pub(super) fn defect_at(&self, head: u64) -> Option<HeadDefect> {
        if head < self.defect_head.load(Ordering::Relaxed) {
            return None;
        }
        Some(match self.defect.load(Ordering::Relaxed) {
            1 => HeadDefect::LengthAndEncoding,
            2 => HeadDefect::TransferCoding,
            3 => HeadDefect::Host,
            _ => HeadDefect::UnclearFraming,
        })
    }

    pub(super) fn becomes_tunnel(&self) {
        self.tunnel.store(true, Ordering::Relaxed);
        clear(&self.head_since);
    }

    pub(super) fn is_tunnel(&self) -> bool {
        self.tunnel.load(Ordering::Relaxed)
    }

    /// Whether the tunnel has ended; wakes `reader` or the watching task when it does.
    pub(super) fn tunnel_ended(&self, waker: &Waker, reader: bool) -> bool {
        let mut wakers = self.tunnel_wakers.lock();
        match &mut wakers[usize::from(reader)] {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        self.gone.load(Ordering::Relaxed)
    }

    /// Ends a tunnel: its socket was closed, or is to be.
    pub(super) fn end_tunnel(&self) {
        if self.is_tunnel() {
            let wakers = {
                let mut wakers = self.tunnel_wakers.lock();
                self.gone.store(true, Ordering::Relaxed);
                std::mem::take(&mut *wakers)
            };
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
    }

    /// The client speaks HTTP/1.0.
    pub(super) fn ends_by_close(&self) {
        self.ends_by_close.store(true, Ordering::Relaxed);
    }

    /// What runs is cut: where a mere close would pass for the end of an answer, by a reset.
    pub(super) fn cut(&self) {
        if self.busy() && self.ends_by_close.load(Ordering::Relaxed) {
            self.end_by_reset();
        }
    }

    /// The socket is to be closed by a reset: for a cut that must not look like an end, and for a
    /// peer that takes nothing, for whom the kernel would otherwise keep what is unsent.
    pub(super) fn end_by_reset(&self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    pub(super) fn ends_by_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// Registers a broken body; it is woken after everything written before has left for the socket,
    /// which [`settled`](Self::settled) then tells by another number.
    pub(super) fn hold(&self, body: &Waker) {
        self.holders.lock().push(body.clone());
        self.holding.store(true, Ordering::Release);
        if let Some(task) = self.task.get() {
            task.wake_by_ref();
        }
    }

    pub(super) fn settled(&self) -> u64 {
        self.settled.load(Ordering::Acquire)
    }

    /// hyper has done all it could do for now. Called after each of its polls.
    pub(super) fn settles(&self) {
        if self.holding.load(Ordering::Acquire) && !is_set(&self.stalled_since) {
            self.holding.store(false, Ordering::Relaxed);
            self.settled.fetch_add(1, Ordering::Release);
            let holders = std::mem::take(&mut *self.holders.lock());
            holders.into_iter().for_each(Waker::wake);
        }
    }

    /// The next clock to run out, and when.
    pub(super) fn deadline(&self, clocks: &ClientClocks) -> (Moment, Clock) {
        let lingers = get(&self.lingers_since) + LINGER;
        let slow = get(&self.stalled_since) + clocks.slow_reader;
        let waiting = if self.busy() {
            (Moment::NEVER, Clock::Idle)
        } else {
            let idle_since = self.idle_since();
            // A head that came with the request before it waited for us, not we for it.
            match get(&self.head_since) {
                Moment::NEVER => (idle_since + clocks.idle, Clock::Idle),
                begun => (begun.max(idle_since) + clocks.head, Clock::Head),
            }
        };
        sooner(sooner(waiting, (slow, Clock::SlowReader)), (lingers, Clock::Linger))
    }
}

impl Exchange {
    pub(super) fn pulse(&self) -> &Arc<Pulse> {
        &self.0
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        set_now(&self.0.idle_since);
        self.0.exchanges.fetch_sub(1, Ordering::Relaxed);
    }
}

fn sooner(one: (Moment, Clock), other: (Moment, Clock)) -> (Moment, Clock) {
    if other.0 < one.0 { other } else { one }
}

fn get(moment: &AtomicU64) -> Moment {
    Moment::from_micros(moment.load(Ordering::Relaxed))
}

fn is_set(moment: &AtomicU64) -> bool {
    get(moment) != Moment::NEVER
}

fn set_now(moment: &AtomicU64) {
    moment.store(clock::now().as_micros(), Ordering::Relaxed);
}

fn clear(moment: &AtomicU64) {
    moment.store(Moment::NEVER.as_micros(), Ordering::Relaxed);
}

const fn number_of(defect: HeadDefect) -> u8 {
    match defect {
        HeadDefect::LengthAndEncoding => 1,
        HeadDefect::TransferCoding => 2,
        HeadDefect::Host => 3,
        HeadDefect::UnclearFraming => 4,
    }
}
