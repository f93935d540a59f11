//! (being written) What may be sent again, how often.

use std::time::Duration;

/// Parameters of retrying.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Most attempts of one exchange, the first included. Default 3, 1..=10.
    pub attempts_max: u8,
    /// Share of requests that may be retries, over ten seconds. Default 0.2 (GEP-3388).
    pub budget_ratio: f64,
    /// Retries a second that are always allowed. Default 10 (GEP-3388).
    pub budget_floor: f64,
    /// First wait before the same backend is tried again; doubles, full jitter. Default 25 ms.
    pub backoff_min: Duration,
    /// Longest such wait. Default 1 s.
    pub backoff_max: Duration,
    /// Longest wait for a busy or absent backend before the answer is an error. Default 2 s.
    pub wait_max: Duration,
    /// Which requests may be sent again once a byte of them was sent.
    pub replay: Replay,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts_max: 3,
            budget_ratio: 0.2,
            budget_floor: 10.0,
            backoff_min: Duration::from_millis(25),
            backoff_max: Duration::from_secs(1),
            wait_max: Duration::from_secs(2),
            replay: Replay::Auto,
        }
    }
}

/// Which requests may be sent again once a byte of them was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replay {
    /// Inference endpoints that keep no state, idempotent methods, and requests with an `Idempotency-Key`. The default.
    #[default]
    Auto,
    /// Every request.
    Always,
    /// Idempotent methods only (RFC 9110 §9.2.2).
    Safe,
    /// None.
    Never,
}
