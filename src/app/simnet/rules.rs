//! What every exchange was promised, as numbers of virtual time.
//!
//! As long as one backend can serve it, an exchange ends with its whole answer; where none can, with evergate's own
//! refusal or one error event. The clocks are those of failures.md with the default configuration, plus what the
//! links and the replica take where nothing is wrong.

use std::time::Duration;

use super::client::Verdict;
use super::plan::{BACKENDS, Plan, Scenario, Trouble};
use super::world::{Exchange, Told};
use crate::net::simulated::Door;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// `clocks.connect`.
const CONNECT: Duration = secs(2);
/// `retry.wait_max`.
const WAIT: Duration = secs(2);
/// A backend that is suspected is asked, and answers within this or not.
const VERIFY: Duration = secs(1);
/// A connection whose other side acknowledges nothing is given up (`upstream::connect`).
const PATIENCE: Duration = secs(10);
/// Alarms, ticks of the pool and rounded timers, over all steps of an exchange.
const TICKS: Duration = Duration::from_millis(400);
/// Requests that backends may receive for one exchange: three attempts, a hedge, and the legs of two resumes.
const RECEIVED_MAX: u32 = 6;

/// How long an exchange may take.
struct Bounds {
    first: Duration,
    gap: Duration,
}

/// What the links take of it where nothing is wrong: a connection from the client, one to the backend, and a round trip.
fn links(plan: &Plan) -> Duration {
    let far = plan.links.iter().map(|link| link.latency + link.jitter).max().unwrap_or_default();
    4 * far + 4 * (plan.clients.latency + plan.clients.jitter)
}

fn healthy(plan: &Plan, exchange: &Exchange) -> Duration {
    let whole = if exchange.ask.kind.streams() { Duration::ZERO } else { exchange.lasts };
    links(plan) + plan.first_token + whole
}

fn bounds(plan: &Plan, exchange: &Exchange) -> Bounds {
    // Suspicion, in a pool that knows its traffic and in one that does not.
    let usual = healthy(plan, exchange);
    let late = if plan.known { secs(2).max(4 * usual) } else { secs(10).max(4 * usual) };
    let silent = if plan.known { secs(1) } else { secs(5) };
    // To begin anew elsewhere, and to say again what the client has.
    let again = links(plan) + plan.first_token + exchange.lasts;
    let (first, gap) = match plan.scenario {
        // Probes that are too slow pass for failures until traffic proves them wrong.
        Scenario::Latency if !(0..BACKENDS).all(|i| plan.probes_fit(i)) => (WAIT, Duration::ZERO),
        Scenario::Calm | Scenario::Latency => (Duration::ZERO, Duration::ZERO),
        Scenario::SilentConnects => (CONNECT, Duration::ZERO),
        // Who is known to be out is left, also by what waits there.
        Scenario::Breaks | Scenario::Refusals => (again, again),
        Scenario::RestartStorm => (WAIT + again, WAIT + again),
        // Suspicion, proof, and anew elsewhere; what comes meanwhile may meet the connect clock instead.
        Scenario::Partition | Scenario::OneWay => {
            let silent = if plan.known { silent + VERIFY } else { PATIENCE };
            ((late + VERIFY).max(CONNECT) + again, silent + again)
        }
        Scenario::SlowLink => (late + VERIFY + CONNECT + again, silent + VERIFY + CONNECT + again),
        // What goes on elsewhere may meet a dead connection there, too.
        Scenario::HalfOpen if plan.sick == [true; BACKENDS] => {
            (2 * (late.max(PATIENCE) + again), 2 * (PATIENCE + again))
        }
        Scenario::HalfOpen => (late.max(PATIENCE) + again, PATIENCE + again),
        // Of a stream that nobody can go on with, the wait is as long as there is hope.
        Scenario::AllDown => (late + VERIFY + 3 * CONNECT + WAIT + again, PATIENCE + secs(15)),
    };
    let pace = Duration::from_secs_f64(2.0 / plan.tokens_per_second);
    Bounds { first: healthy(plan, exchange) + first + TICKS, gap: gap + links(plan) + pace + TICKS }
}

/// The rules that `told` breaks.
pub(super) fn broken(plan: &Plan, told: &Told) -> Vec<String> {
    let mut broken = told.broken.clone();
    for exchange in &told.exchanges {
        if let Err(why) = judge(plan, exchange) {
            broken.push(format!("{why}: {exchange:?}"));
        }
    }
    broken
}

fn judge(plan: &Plan, exchange: &Exchange) -> Result<(), String> {
    let bounds = bounds(plan, exchange);
    if exchange.received > RECEIVED_MAX {
        return Err(format!("backends received it {} times", exchange.received));
    }
    match &exchange.verdict {
        // Its client left, in the middle of something.
        None => Ok(()),
        Some(Verdict::Whole) => {
            let first = exchange.first.unwrap_or_default();
            if first > bounds.first {
                return Err(format!("its first byte came after {first:?}, not within {:?}", bounds.first));
            }
            if exchange.ask.kind.streams() && exchange.gap > bounds.gap {
                return Err(format!("it was silent for {:?}, not {:?} at most", exchange.gap, bounds.gap));
            }
            Ok(())
        }
        Some(Verdict::Refused(..) | Verdict::ErrorEvent(_)) if plan.scenario == Scenario::AllDown => {
            refused(plan, exchange)
        }
        // Whose connections all died at once looks like a pool that is down.
        Some(Verdict::Refused(..) | Verdict::ErrorEvent(_))
            if plan.scenario == Scenario::HalfOpen && plan.sick == [true; BACKENDS] =>
        {
            Ok(())
        }
        Some(Verdict::Refused(..) | Verdict::ErrorEvent(_)) => {
            Err("it failed, and a backend was well".to_owned())
        }
        Some(Verdict::Wrong(_)) => Err("it is wrong".to_owned()),
    }
}

/// With nobody there: how soon it is told, and how long after somebody is.
fn refused(plan: &Plan, exchange: &Exchange) -> Result<(), String> {
    let back = |(at, what): &(Duration, Trouble)| {
        let is_back = match what {
            Trouble::Start(..) => true,
            Trouble::Open(_, open) => *open == [true; 2],
            Trouble::Door(_, door) => *door == Door::Open,
            _ => false,
        };
        is_back.then_some(*at)
    };
    let first_back = plan.trouble.iter().filter_map(back).min().unwrap_or_default();
    if exchange.ask.at >= first_back + secs(2) {
        return Err("it failed, and a backend was back for two seconds".to_owned());
    }
    let at_most = match exchange.nobody {
        // Who is let try one that does not even refuse meets the connect clock, at each.
        true if plan.trouble.iter().any(|(_, what)| matches!(what, Trouble::Open(..))) => {
            WAIT + 3 * CONNECT + TICKS + links(plan)
        }
        true => WAIT + TICKS + links(plan),
        false => bounds(plan, exchange).first,
    };
    if matches!(exchange.verdict, Some(Verdict::Refused(..))) && exchange.took > at_most {
        return Err(format!("it was refused after {:?}, not within {at_most:?}", exchange.took));
    }
    Ok(())
}

/// How an exchange was late beyond a healthy one (first byte), silent, and how long it took to be refused.
pub(super) fn lateness(plan: &Plan, exchange: &Exchange) -> [(&'static str, Duration); 3] {
    let (mut first, mut gap, mut refused) = <(Duration, Duration, Duration)>::default();
    match &exchange.verdict {
        Some(Verdict::Whole) => {
            first = exchange.first.unwrap_or_default().saturating_sub(healthy(plan, exchange));
            gap = exchange.gap;
        }
        Some(Verdict::Refused(..)) => refused = exchange.took,
        Some(Verdict::ErrorEvent(_) | Verdict::Wrong(_)) | None => {}
    }
    [("first byte late by", first), ("silent for", gap), ("refused after", refused)]
}
