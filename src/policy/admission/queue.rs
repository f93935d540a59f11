//! A bounded queue with priorities and deadlines: first come first served within a priority, stride
//! scheduling between them (C. Waldspurger, W. Weihl, "Stride Scheduling", 1995).
//!
//! Each priority has a pass, which grows by its stride with every turn; the smallest pass goes next. One
//! that has been idle starts at the pass of the turn given last, so that it saves nothing up and costs
//! nothing. Invariants: never more than the bound; nobody is lost or called twice; with all priorities
//! waiting the lowest gets every tenth turn. Not here: waking anybody, and what a turn is good for.

use std::collections::BTreeMap;

use super::Priority;
use crate::policy::Moment;

/// A pass grows by this over the weight. Divisible by every weight.
const STRIDE: u64 = 6;

/// Those who wait. `T` is how they are called.
#[derive(Debug)]
pub struct Queue<T> {
    classes: [Class<T>; Priority::ALL.len()],
    /// Pass of the turn given last.
    pass: u64,
    next_id: u64,
}

#[derive(Debug)]
struct Class<T> {
    waiting: BTreeMap<(Moment, u64), Waiter<T>>,
    pass: u64,
}

#[derive(Debug)]
struct Waiter<T> {
    deadline: Moment,
    item: T,
}

/// A place in a queue, held or left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    priority: Priority,
    order: Moment,
    id: u64,
}

impl Place {
    /// Its priority.
    pub fn priority(&self) -> Priority {
        self.priority
    }
}

/// The queue is as long as it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let class = || Class { waiting: BTreeMap::new(), pass: 0 };
        Self { classes: [class(), class(), class()], pass: 0, next_id: 0 }
    }
}

impl<T> Queue<T> {
    /// Takes a place behind all of the same priority whose `order` is not later: the time of arrival, or an
    /// earlier one for work that was admitted before and has to be done again.
    ///
    /// # Errors
    /// `length_max` wait already.
    pub fn join(
        &mut self,
        now: Moment,
        length_max: usize,
        (priority, order): (Priority, Moment),
        deadline: Moment,
        item: T,
    ) -> Result<Place, Full> {
        if self.len() >= length_max {
            self.forget_expired(now);
        }
        if self.len() >= length_max {
            return Err(Full);
        }
        let place = Place { priority, order, id: self.next_id };
        self.next_id += 1;
        let class = &mut self.classes[priority as usize];
        if class.waiting.is_empty() {
            class.pass = class.pass.max(self.pass);
        }
        class.waiting.insert((order, place.id), Waiter { deadline, item });
        Ok(place)
    }

    /// Whose turn it is. They leave the queue; those met on the way whose time is up leave it without a turn.
    pub fn next(&mut self, now: Moment) -> Option<(Place, T)> {
        self.next_behind(now, 0)
    }

    /// Whose turn it would be after `passed_over` others, who keep their places and have paid nothing.
    pub fn next_behind(&mut self, now: Moment, passed_over: usize) -> Option<(Place, T)> {
        let passed: Vec<_> = (0..passed_over).map_while(|_| self.take(now)).collect();
        let next = if passed.len() == passed_over { self.take(now) } else { None };
        for (place, waiter) in passed {
            self.put_back(place, waiter.deadline, waiter.item);
        }
        next.map(|(place, waiter)| (place, waiter.item))
    }

    fn take(&mut self, now: Moment) -> Option<(Place, Waiter<T>)> {
        loop {
            let waiting = Priority::ALL.into_iter().filter(|&p| !self.class(p).waiting.is_empty());
            // Of equal passes the first, which is the higher priority.
            let priority = waiting.min_by_key(|&p| self.class(p).pass)?;
            let class = &mut self.classes[priority as usize];
            let ((order, id), waiter) = class.waiting.pop_first()?;
            if waiter.deadline > now {
                self.pass = class.pass;
                class.pass += STRIDE / priority.weight();
                return Some((Place { priority, order, id }, waiter));
            }
        }
    }

    /// A turn was of no use: back to the same place, which is the front, and the turn is not counted.
    pub fn put_back(&mut self, place: Place, deadline: Moment, item: T) {
        let class = &mut self.classes[place.priority as usize];
        class.pass = class.pass.saturating_sub(STRIDE / place.priority.weight());
        self.stay(place, deadline, item);
    }

    /// Waits on at a place that was given, until another deadline. The bound held when it was given.
    pub fn stay(&mut self, place: Place, deadline: Moment, item: T) {
        self.classes[place.priority as usize]
            .waiting
            .insert((place.order, place.id), Waiter { deadline, item });
    }

    /// Gives a place up; none when it was left already, by a turn or by its deadline.
    pub fn cancel(&mut self, place: Place) -> Option<T> {
        let class = &mut self.classes[place.priority as usize];
        class.waiting.remove(&(place.order, place.id)).map(|waiter| waiter.item)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.classes.iter().map(|class| class.waiting.len()).sum()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.classes.iter().all(|class| class.waiting.is_empty())
    }

    fn class(&self, priority: Priority) -> &Class<T> {
        &self.classes[priority as usize]
    }

    fn forget_expired(&mut self, now: Moment) {
        for class in &mut self.classes {
            class.waiting.retain(|_, waiter| waiter.deadline > now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const LATE: Moment = Moment::NEVER;

    fn at(n: u64) -> Moment {
        Moment::from_micros(n)
    }

    /// Everybody joins by number, at that time.
    fn joined(each: &[(Priority, u64)]) -> Queue<u64> {
        let mut queue = Queue::default();
        for &(priority, n) in each {
            queue.join(at(n), usize::MAX, (priority, at(n)), LATE, n).unwrap();
        }
        queue
    }

    fn backlog(each: usize, priorities: &[Priority]) -> Queue<Priority> {
        let mut queue = Queue::default();
        for n in 0..each {
            for &priority in priorities {
                queue.join(at(n as u64), usize::MAX, (priority, at(n as u64)), LATE, priority).unwrap();
            }
        }
        queue
    }

    #[test]
    fn turns_are_shared_six_to_three_to_one() {
        let mut queue = backlog(1000, &Priority::ALL);
        let turns: Vec<Priority> =
            (0..1000).map(|_| queue.next(at(2000)).expect("somebody waits").1).collect();
        let of = |priority| turns.iter().filter(|&&p| p == priority).count();
        assert_eq!(Priority::ALL.map(of), [600, 300, 100]);
        for tenth in turns.chunks(10) {
            assert!(tenth.contains(&Priority::Low), "every tenth turn is the lowest's: {tenth:?}");
        }
    }

    #[test]
    fn an_idle_priority_costs_nothing_and_saves_nothing_up() {
        let mut queue = backlog(100, &[Priority::Normal]);
        for n in 0..50 {
            assert_eq!(queue.next(at(200)).map(|(_, p)| p), Some(Priority::Normal), "turn {n}");
        }
        for n in 0..50 {
            queue.join(at(300), 1000, (Priority::Low, at(300 + n)), LATE, Priority::Low).unwrap();
        }
        let low = (0..40).filter(|_| queue.next(at(400)).unwrap().1 == Priority::Low).count();
        assert_eq!(low, 10, "a quarter, against normal alone, and none of the past");
    }

    #[test]
    fn whoever_found_nobody_is_in_front_again_and_has_paid_nothing() {
        let mut queue = joined(&[(Priority::Normal, 1), (Priority::Normal, 2), (Priority::Low, 3)]);
        for _ in 0..5 {
            let (place, item) = queue.next(at(10)).unwrap();
            assert_eq!(item, 1);
            queue.put_back(place, LATE, item);
        }
        let rest: Vec<u64> = std::iter::from_fn(|| queue.next(at(10))).map(|(_, item)| item).collect();
        assert_eq!(rest, [1, 3, 2]);
    }

    #[test]
    fn whoever_is_passed_over_keeps_the_place_and_has_paid_nothing() {
        let mut queue = joined(&[(Priority::High, 1), (Priority::High, 2), (Priority::Normal, 3)]);
        assert_eq!(queue.next_behind(at(10), 3), None);
        assert_eq!(queue.next_behind(at(10), 2).map(|(_, item)| item), Some(2));
        let rest: Vec<u64> = std::iter::from_fn(|| queue.next(at(10))).map(|(_, item)| item).collect();
        // The high ones had a turn, the normal one did not.
        assert_eq!(rest, [3, 1]);
    }

    #[test]
    fn a_full_queue_takes_nobody_until_somebody_leaves_or_expires() {
        let mut queue = Queue::default();
        let first = queue.join(at(1), 2, (Priority::Low, at(1)), at(100), 'a').unwrap();
        queue.join(at(1), 2, (Priority::High, at(1)), at(50), 'b').unwrap();
        let high = (Priority::High, at(2));
        assert_eq!(queue.join(at(2), 2, high, LATE, 'c'), Err(Full));
        assert_eq!(queue.cancel(first), Some('a'));
        assert_eq!(queue.cancel(first), None);
        queue.join(at(3), 2, high, LATE, 'c').unwrap();
        assert_eq!(queue.join(at(49), 2, high, LATE, 'd'), Err(Full));
        queue.join(at(50), 2, high, LATE, 'd').unwrap();
        assert!(!queue.is_empty());
        assert_eq!((queue.next(at(60)).unwrap().1, queue.next(at(60)).unwrap().1), ('c', 'd'));
        assert!(queue.is_empty());
    }

    #[test]
    fn work_admitted_earlier_goes_before_later_arrivals() {
        let mut queue = joined(&[(Priority::Normal, 10), (Priority::Normal, 20)]);
        queue.join(at(30), 9, (Priority::Normal, at(5)), LATE, 5).unwrap();
        let order: Vec<u64> = std::iter::from_fn(|| queue.next(at(40))).map(|(_, item)| item).collect();
        assert_eq!(order, [5, 10, 20]);
    }

    #[test]
    fn whoever_waits_for_something_else_now_gets_another_deadline_at_the_same_place() {
        let mut queue = Queue::default();
        let first = queue.join(at(1), 9, (Priority::Normal, at(1)), at(10), 'a').unwrap();
        queue.join(at(2), 9, (Priority::Normal, at(2)), LATE, 'b').unwrap();
        queue.stay(first, at(20), 'a');
        assert_eq!((queue.len(), queue.next(at(15)).unwrap().1), (2, 'a'));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Join(usize, u64),
        Next,
        NextInVain,
        Cancel(prop::sample::Index),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            4 => (0usize..3, prop_oneof![1u64..50, Just(1_000_000)]).prop_map(|(p, lasts)| Op::Join(p, lasts)),
            2 => Just(Op::Next),
            1 => Just(Op::NextInVain),
            1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        ];
        prop::collection::vec(op, 1..400)
    }

    proptest! {
        /// No loss, no duplication, first come first served, and the bound, over any history.
        #[test]
        fn everybody_leaves_exactly_once_and_in_order(ops in ops(), bound in 1usize..40) {
            let mut queue: Queue<u64> = Queue::default();
            let mut now = 0u64;
            let mut deadlines = Vec::new();
            let mut held: Vec<(Place, u64)> = Vec::new();
            let mut gone = HashSet::new();
            for op in ops {
                now += 1;
                match op {
                    Op::Join(p, lasts) => {
                        let n = deadlines.len() as u64;
                        let class = (Priority::ALL[p], at(now));
                        if let Ok(place) = queue.join(at(now), bound, class, at(now + lasts), n) {
                            held.push((place, n));
                            deadlines.push(now + lasts);
                        } else {
                            let alive = held.iter().filter(|(_, n)| deadlines[*n as usize] > now).count();
                            prop_assert!(alive >= bound, "refused with {alive} of {bound} places taken");
                        }
                    }
                    Op::Next | Op::NextInVain => {
                        let alive = |n: &u64| deadlines[*n as usize] > now;
                        let Some((place, n)) = queue.next(at(now)) else {
                            prop_assert!(!held.iter().any(|(_, n)| alive(n)), "somebody was overlooked");
                            continue;
                        };
                        prop_assert!(alive(&n), "called after its deadline");
                        let mut same =
                            held.iter().filter(|(p, n)| p.priority() == place.priority() && alive(n));
                        prop_assert_eq!(same.next(), Some(&(place, n)), "the longest waiting of its priority");
                        if matches!(op, Op::NextInVain) {
                            queue.put_back(place, at(deadlines[n as usize]), n);
                        } else {
                            held.retain(|(_, other)| *other != n);
                            prop_assert!(gone.insert(n), "called twice");
                        }
                    }
                    Op::Cancel(which) if !held.is_empty() => {
                        let (place, n) = held.remove(which.index(held.len()));
                        let was_there = queue.cancel(place);
                        prop_assert!(was_there == Some(n) || deadlines[n as usize] <= now);
                        prop_assert!(gone.insert(n));
                    }
                    Op::Cancel(_) => {}
                }
                prop_assert!(queue.len() <= bound);
                prop_assert!(queue.len() <= held.len());
            }
        }

        /// Whoever else waits or comes and goes: while the lowest waits it gets every tenth turn.
        #[test]
        fn the_lowest_gets_a_tenth_of_any_row_of_turns(seed in any::<u64>(), vain in 0u8..30) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut queue: Queue<Priority> = backlog(400, &[Priority::Low]);
            let mut turns = Vec::new();
            for n in 0..400u64 {
                for priority in [Priority::High, Priority::Normal] {
                    if rng.bool() {
                        queue.join(at(n), usize::MAX, (priority, at(n)), LATE, priority).unwrap();
                    }
                }
                let Some((place, priority)) = queue.next(at(n)) else { break };
                if rng.u8(..100) < vain {
                    queue.put_back(place, LATE, priority);
                } else {
                    turns.push(priority);
                }
            }
            let low = turns.iter().filter(|&&p| p == Priority::Low).count();
            prop_assert!(low >= turns.len() / 10, "{low} of {}", turns.len());
        }
    }
}
