//! Whether a request kills the replicas that touch it (F33).
//!
//! An exchange that broke off at two backends looks, before it goes to a third, whether they are still
//! there: a connection that is refused is a death, one that stands is a broken connection like any other.
//! What follows from two deaths is `policy::poison`. Nothing here is reached by an exchange that works.

use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::policy::poison::{self, may_be_a_death};
use crate::policy::retry::Facts;
use crate::pool::{Choice, Member, Pool};
use crate::proxy::worker::Worker;
use crate::upstream::{ConnectFailure, Want};

/// So long the other exchanges of a dead replica have to notice, and its listener to close: a process that
/// dies closes one descriptor after another.
const SETTLING: Duration = Duration::from_millis(50);
/// Longest wait for a connection that says whether a replica is still there.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// Where one exchange broke off.
#[derive(Default)]
pub(super) struct Inquest {
    /// Given at the first break.
    number: Option<poison::Exchange>,
    /// Each backend once, in their order.
    places: Vec<Place>,
}

struct Place {
    pool: Arc<Pool>,
    index: usize,
}

impl Place {
    fn member(&self) -> &Member {
        &self.pool.members[self.index]
    }
}

impl Inquest {
    /// Takes in how an attempt ended. Whether the backends must be looked at before the next.
    pub(super) fn opens(&mut self, choice: &Choice, facts: &Facts) -> bool {
        if !may_be_a_death(facts) {
            return false;
        }
        let number = *self.number.get_or_insert_with(crate::pool::exchange_number);
        choice.backend().broke_off(number);
        let known = self.places.iter().any(|place| place.member().backend.id == choice.backend().id);
        if !known {
            self.places.push(Place { pool: choice.pool.clone(), index: choice.index });
        }
        !known && self.places.len() > 1
    }

    /// Looks at the backends. True when two of them are gone and this exchange is to blame.
    pub(super) async fn blames(&self, worker: &Worker) -> bool {
        tokio::time::sleep(SETTLING).await;
        let mut gone: Vec<&Place> = Vec::new();
        for place in &self.places {
            if is_gone(worker, place.member()).await {
                gone.push(place);
            }
        }
        let now = clock::now();
        let Some(number) = self.number else { return false };
        let pairs = gone.iter().enumerate().flat_map(|(i, one)| gone[..i].iter().map(move |two| (one, two)));
        pairs.into_iter().any(|(one, two)| {
            let (one, two) = (one.member().backend.breaks(), two.member().backend.breaks());
            poison::is_to_blame(number, &one, &two, now)
        })
    }

    /// The pools it broke off in.
    pub(super) fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.places.iter().map(|place| &place.pool)
    }

    /// Names of the backends, for people.
    pub(super) fn backends(&self) -> String {
        let names: Vec<&str> = self.places.iter().map(|place| place.member().params.name.as_str()).collect();
        names.join(", ")
    }
}

/// Whether nobody listens there any more. What cannot be found out in time is not gone.
async fn is_gone(worker: &Worker, member: &Member) -> bool {
    let lane = member.backend.lane(worker.index);
    let look = tokio::time::timeout(LOOK_MAX, lane.lease(&member.target, Want::Fresh)).await;
    matches!(look, Ok(Err(error)) if error.failure == ConnectFailure::Refused)
}
