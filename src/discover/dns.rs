//! One backend's name, looked up again and again: after its TTL, not sooner than `clocks.dns_min`.
//!
//! A look-up that fails takes nothing away (failures.md F03): the last good addresses stay in use, marked
//! stale, and the next look-up comes after `dns_min`, then twice that, up to a bound. When an address is
//! gone from the answer, connections kept to the backend are closed: traffic would otherwise stay with a
//! replica that moved away for as long as it keeps them busy.

use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::pool::Place;
use crate::telemetry::events::{AddressesChanged, LookupFailed, LookupRecovered};
use crate::upstream::Resolver;

/// Longest wait after failed look-ups, unless `dns_min` is longer: a name service that returns is noticed
/// within this.
const FAILED_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Chance lengthens each wait by up to this share, so that a hundred backends are not looked up as one.
/// Never shorter: within the TTL the answer would be the same.
const JITTER: f64 = 0.1;

/// Keeps the addresses of the backend at `place` up to date until it is removed. Returns at once where the
/// address is written as a number.
pub(super) async fn keep_resolved(place: Place, resolver: Arc<Resolver>) {
    let addresses = place.backend.addresses.clone();
    if addresses.is_literal() {
        return;
    }
    let mut rng = clock::rng();
    let mut failures = 0_u32;
    loop {
        let holds = look_up(&place, &resolver, failures).await;
        failures = if holds.is_some() { 0 } else { failures.saturating_add(1) };
        let Some((pool, _)) = place.now() else { return };
        let pause = pause(pool.config.clocks.dns_min, holds, failures);
        drop(pool);
        tokio::time::sleep(pause.mul_f64(1.0 + JITTER * rng.f64())).await;
    }
}

/// One look-up, and for how long its answer holds. Tells what has changed.
async fn look_up(place: &Place, resolver: &Resolver, failures: u32) -> Option<Duration> {
    let backend = &place.backend;
    let (at, telemetry) = (&backend.metrics, place.directory.telemetry());
    let before = backend.addresses.known();
    let answer = backend.addresses.refresh(resolver).await;
    let holds = match answer {
        Ok(holds) => holds,
        Err(e) => {
            if failures == 0 {
                LookupFailed { at, saw: &e, kept: !before.is_empty() }.emit(telemetry);
            }
            return None;
        }
    };
    if failures > 0 {
        LookupRecovered { at }.emit(telemetry);
    }
    let now = backend.addresses.known();
    // The first answer is no change.
    if before != now && !before.is_empty() {
        AddressesChanged { at, addresses: &now }.emit(telemetry);
        if before.iter().any(|address| !now.contains(address)) {
            backend.close_kept();
        }
    }
    Some(holds)
}

/// How long to wait after a look-up whose answer `holds` for so long, or after this many failures in a row.
fn pause(dns_min: Duration, holds: Option<Duration>, failures: u32) -> Duration {
    match holds {
        Some(ttl) => ttl.max(dns_min),
        None => {
            let doubled =
                dns_min.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
            doubled.min(FAILED_PAUSE_MAX.max(dns_min))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn answers_hold_for_their_ttl_and_no_shorter_than_the_minimum() {
        assert_eq!(pause(S(5), Some(S(60)), 0), S(60));
        assert_eq!(pause(S(5), Some(S(1)), 0), S(5));
        assert_eq!(pause(S(5), Some(Duration::ZERO), 0), S(5));
    }

    #[test]
    fn failures_are_retried_after_the_minimum_and_then_more_gently() {
        let after = |failures| pause(S(5), None, failures);
        assert_eq!([1, 2, 3, 4, 40].map(after), [S(5), S(10), S(20), S(30), S(30)]);
        assert_eq!([1, 2, 3].map(|failures| pause(S(60), None, failures)), [S(60); 3]);
    }
}
