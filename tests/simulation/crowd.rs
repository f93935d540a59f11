//! Those who wait for a backend, and how many each takes: the rules of `src/pool/line.rs` and of the caps in
//! `src/pool/backend.rs`, single-threaded, around the real `admission`. A call is answered at once here, so nobody is
//! ever called and not yet heard of.

use evergate::policy::Moment;
use evergate::policy::admission::{Cap, Full, Pace, Place, Priority, Queue};
use std::collections::BTreeMap;

/// A look that finds nobody goes on to so many behind.
const LOOKS_BEHIND: usize = 4;

/// The line of a pool, and the caps of its backends.
pub(crate) struct Crowd {
    queue: Queue<usize>,
    places: BTreeMap<usize, Place>,
    pub(crate) pace: Option<Pace>,
    caps: Vec<Cap>,
    /// How many were unfinished when it last began to answer one.
    proven: Vec<u32>,
}

impl Crowd {
    pub(crate) fn new(members: usize) -> Self {
        Self {
            queue: Queue::default(),
            places: BTreeMap::new(),
            pace: None,
            caps: vec![Cap::default(); members],
            proven: vec![0; members],
        }
    }

    /// What a backend with this configured bound takes.
    pub(crate) fn cap(&self, i: usize, configured: Option<u32>) -> Option<u32> {
        configured.into_iter().chain(self.caps[i].most()).min()
    }

    pub(crate) fn proven(&self, i: usize) -> u32 {
        self.proven[i]
    }

    pub(crate) fn learned(&self, i: usize) -> Option<u32> {
        self.caps[i].most()
    }

    /// It began to answer one of `in_flight`.
    pub(crate) fn took_one(&mut self, i: usize, in_flight: u32, now: Moment) {
        self.proven[i] = in_flight;
        self.caps[i].served(now, in_flight);
    }

    /// It refused one of `in_flight`.
    pub(crate) fn refused_one(&mut self, i: usize, in_flight: u32, now: Moment) {
        self.caps[i].refused(now, in_flight, self.proven[i]);
    }

    pub(crate) fn forget_caps(&mut self, now: Moment) {
        self.caps.iter_mut().for_each(|cap| cap.forget(now));
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Takes a place until `deadline`; `admitted`: it arrived then, and was let in before.
    pub(crate) fn join(
        &mut self,
        x: usize,
        priority: Priority,
        admitted: Option<Moment>,
        (deadline, length_max): (Moment, usize),
        now: Moment,
    ) -> Result<(), Full> {
        // Those whose time is up and who have not left yet are counted, too.
        if self.places.len() >= length_max {
            return Err(Full);
        }
        let place = self.queue.join(now, length_max, (priority, admitted.unwrap_or(now)), deadline, x)?;
        self.places.insert(x, place);
        Ok(())
    }

    /// It leaves: its time is over, or its client has gone.
    pub(crate) fn leave(&mut self, x: usize) -> bool {
        self.places.remove(&x).is_some_and(|place| {
            self.queue.cancel(place);
            true
        })
    }

    /// A backend returned: whoever waits is let in by and by.
    pub(crate) fn backend_returned(&mut self, now: Moment) {
        if self.queue.is_empty() {
            return;
        }
        match &mut self.pace {
            Some(pace) if !pace.is_over(now) => pace.widen(),
            pace => *pace = Some(Pace::new(now)),
        }
    }

    /// Whose turn it is behind `passed_over` others, if the pace allows one.
    pub(crate) fn next(&mut self, passed_over: usize, now: Moment) -> Option<Called> {
        if passed_over > LOOKS_BEHIND || self.pace.is_some_and(|pace| !pace.allows(now)) {
            return None;
        }
        let (place, exchange) = self.queue.next_behind(now, passed_over)?;
        self.places.remove(&exchange);
        Some(Called { exchange, place })
    }

    /// The one that was called found a backend. Whether the pace is to hear of its first token.
    pub(crate) fn let_in(&mut self, now: Moment) -> bool {
        match &mut self.pace {
            Some(pace) if !pace.is_over(now) => {
                pace.let_in();
                true
            }
            _ => false,
        }
    }

    /// It found none: back to its place.
    pub(crate) fn in_vain(&mut self, called: Called, deadline: Moment, look: bool) {
        if look {
            // Slots, or the state of the backends, are the limit now.
            self.pace = None;
        }
        self.queue.put_back(called.place, deadline, called.exchange);
        self.places.insert(called.exchange, called.place);
    }

    /// It waits for something else by now: the same place until another time.
    pub(crate) fn stay(&mut self, x: usize, deadline: Moment) {
        if let Some(place) = self.places.get(&x) {
            self.queue.cancel(*place);
            self.queue.stay(*place, deadline, x);
        }
    }
}

/// One whose turn it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Called {
    pub(crate) exchange: usize,
    place: Place,
}
