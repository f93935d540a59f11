//! The numbers by which a backend is judged, each with its reason and the symptom that says change it.
//!
//! The defaults are meant for GPU replicas that finish 1 to 50 requests a minute, of 1 to 600 s each:
//! counts rather than percentages, and a memory longer than the requests.

use std::time::Duration;

/// How backends are judged. Built by the configuration, checked by [`validate`](Self::validate).
#[derive(Clone, Debug, PartialEq)]
pub struct HealthPolicy {
    /// Whether a prober runs. Default true. Without one nobody is ever unhealthy, refusing or waiting
    /// for a first pass, and an ejection leads to probation by time alone.
    pub probes: bool,
    /// Failed probes in a row that make a backend unhealthy. Default 3, at least 1: one lost packet is
    /// no verdict, and at 1 s a probe in transition three take 3 s. Raise it when `probes_failed`
    /// events come in pairs with `probes_passed` and no request failed between them.
    pub fall: u32,
    /// Passed probes in a row that make an unhealthy backend healthy again. Default 2, at least 1: a
    /// starting engine may answer once and die of its first load. Raise it when backends return and
    /// fail their trials.
    pub rise: u32,
    /// Faults in a row that eject. Default 3, at least 1: a sound backend with 2 % faults makes three
    /// in a row once in 125 000 requests, a dead one in three. Lower it when a dead backend costs too
    /// many failovers.
    pub eject_consecutive: u32,
    /// Success rate below which a backend is suspect. Default 0.8, 0..=1: one failure in five costs
    /// more retries than the budget gives back. 0 switches the rule off.
    pub success_rate_min: f64,
    /// Outcomes needed before a rate means anything. Default 5, 1..=64: a slow replica makes five in
    /// five minutes. Raise it when quiet pools eject for two unlucky requests.
    pub outcomes_min: u32,
    /// How far below the median of its peers a suspect must be. Default 0.15, 0..=1: when all fail
    /// alike the cause is not the backend (a bad client, a shared dependency), and ejecting would only
    /// move the failures.
    pub peer_margin: f64,
    /// How long an outcome is remembered. Default 10 min, more than zero: longer than the longest
    /// ordinary request, so that a replica which finishes one a minute still gathers enough. At high
    /// rates the last 64 outcomes count, so a long window does not slow the judge down.
    pub window: Duration,
    /// First ejection. Default 1 s, more than zero: an engine that lost one batch is back by then.
    /// Raise it when backends are ejected many times in one restart.
    pub ejection_min: Duration,
    /// Longest ejection; the doubling stops here. Default 60 s, at least `ejection_min`: a repaired
    /// backend should not idle longer than a minute. It is a true bound, jitter included.
    pub ejection_max: Duration,
    /// Health that takes one doubling back. Default 60 s, more than zero.
    pub ejection_decay: Duration,
    /// Share of an ejection that chance may take off. Default 0.2, 0..=1: backends ejected by one event
    /// must not return together. It only ever shortens, so that `ejection_max` stays a bound.
    pub ejection_jitter: f64,
    /// Ejection of a misconfigured backend (wrong credentials, wrong model). Default 60 s, more than
    /// zero; does not double: a person has to repair it, and one failed trial a minute is what it costs
    /// to notice that they did.
    pub misconfigured_ejection: Duration,
    /// Length of the ramp after readmission or joining. Default 10 s; zero switches it off. Raise it
    /// when the first tokens of a returned backend are slow for longer (large models with cold caches).
    pub slow_start: Duration,
    /// Share at the beginning of the ramp. Default 0.1, above 0 and up to 1: enough to warm up on.
    pub slow_start_share_min: f64,
    /// First pause of a backend that said it is busy without saying for how long. Default 250 ms, more
    /// than zero: about one short answer, after which a slot is free. Doubles to `busy_max`, halved by
    /// chance, ended by the next success.
    pub busy_min: Duration,
    /// Longest such pause. Default 4 s, at least `busy_min`.
    pub busy_max: Duration,
    /// Longest Retry-After that is believed. Default 10 min, at least `busy_max`: an absurd value must
    /// not take a backend out for a day. Raise it for remote providers whose quotas refill by the hour.
    pub retry_after_max: Duration,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        Self {
            probes: true,
            fall: 3,
            rise: 2,
            eject_consecutive: 3,
            success_rate_min: 0.8,
            outcomes_min: 5,
            peer_margin: 0.15,
            window: Duration::from_secs(600),
            ejection_min: Duration::from_secs(1),
            ejection_max: Duration::from_secs(60),
            ejection_decay: Duration::from_secs(60),
            ejection_jitter: 0.2,
            misconfigured_ejection: Duration::from_secs(60),
            slow_start: Duration::from_secs(10),
            slow_start_share_min: 0.1,
            busy_min: Duration::from_millis(250),
            busy_max: Duration::from_secs(4),
            retry_after_max: Duration::from_secs(600),
        }
    }
}

impl HealthPolicy {
    /// All that is wrong with these numbers at once, each line beginning with the field at fault.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        let mut require = |holds: bool, line: &str| {
            if !holds {
                wrong.push(line.to_owned());
            }
        };
        require(self.fall >= 1, "fall must be at least 1");
        require(self.rise >= 1, "rise must be at least 1");
        require(self.eject_consecutive >= 1, "eject_consecutive must be at least 1");
        require((0.0..=1.0).contains(&self.success_rate_min), "success_rate_min must be within 0..=1");
        require((1..=64).contains(&self.outcomes_min), "outcomes_min must be within 1..=64");
        require((0.0..=1.0).contains(&self.peer_margin), "peer_margin must be within 0..=1");
        require(!self.window.is_zero(), "window must be more than zero");
        require(!self.ejection_min.is_zero(), "ejection_min must be more than zero");
        require(self.ejection_max >= self.ejection_min, "ejection_max must not be below ejection_min");
        require(!self.ejection_decay.is_zero(), "ejection_decay must be more than zero");
        require((0.0..=1.0).contains(&self.ejection_jitter), "ejection_jitter must be within 0..=1");
        require(!self.misconfigured_ejection.is_zero(), "misconfigured_ejection must be more than zero");
        require(
            self.slow_start_share_min > 0.0 && self.slow_start_share_min <= 1.0,
            "slow_start_share_min must be above 0 and at most 1",
        );
        require(!self.busy_min.is_zero(), "busy_min must be more than zero");
        require(self.busy_max >= self.busy_min, "busy_max must not be below busy_min");
        require(self.retry_after_max >= self.busy_max, "retry_after_max must not be below busy_max");
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

#[cfg(test)]
mod tests {
    use super::HealthPolicy;
    use std::time::Duration;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(HealthPolicy::default().validate(), Ok(()));
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        let policy = HealthPolicy {
            fall: 0,
            success_rate_min: f64::NAN,
            ejection_max: Duration::from_millis(1),
            slow_start_share_min: 0.0,
            ..HealthPolicy::default()
        };
        let wrong = policy.validate().expect_err("four mistakes");
        assert_eq!(wrong.len(), 4, "{wrong:?}");
        assert!(wrong.iter().any(|line| line.starts_with("ejection_max ")));
    }
}
