//! Who is slow: the first-token times and token gaps of a backend against those of its peers.
//!
//! A sample is what was measured over what is usual for its class in this pool, so that classes and prompt sizes mix.
//! Each backend keeps its last few exactly ([`Speed`]). Medians and MADs of their logarithms are compared
//! (Hampel, "The Influence Curve", 1974; Leys et al., "Detecting outliers", 2013): one long prompt moves neither, the
//! units cancel, and two replicas are enough. Slowness is first a factor on load, so that a slow drip loses share at
//! once, and after [`persistent`](OutlierPolicy::persistent) a reason to eject.
//!
//! Invariants: a verdict needs samples of the backend and of a peer; when all are slow alike nobody is slow; what was
//! measured before [`forget`](Speed::forget) is never heard of again.
//!
//! Not here: what is usual (the pool), who may be ejected (`policy::health`), silence (a backend that says nothing has
//! no speed).

use crate::policy::Moment;
use smallvec::SmallVec;
use std::time::Duration;

/// Samples kept of each measure. Nine: five new ones turn the median, so a backend that recovers is believed after
/// five requests, and the median of nine is within a fifth of that of many.
const SAMPLES_MAX: usize = 9;

/// The part of slowness that is believed halves for each so long without a sample: a backend avoided for its slowness
/// shows nothing new, and must be asked again now and then.
const BELIEF_HALF_LIFE: Duration = Duration::from_secs(30);

/// MAD times this is the standard deviation of normal values.
const MAD_TO_DEVIATION: f64 = 1.4826;

/// Standard error of a median over that of a mean, for normal values.
const MEDIAN_TO_MEAN_ERROR: f64 = 1.2533;

/// Shortest time that is told from none: the unit of [`Moment`].
const TIME_MIN: Duration = Duration::from_micros(1);

/// Peers whose readings are compared without an allocation.
const PEERS_INLINE: usize = 16;

/// When a backend is slow. Built by the configuration, checked by [`validate`](Self::validate).
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierPolicy {
    /// Times as slow as the median of its peers before a backend loses share. Default 3, more than 1: less is within
    /// what batching and prompt lengths do. Lower it when one replica lags and clients notice.
    pub ratio_min: f64,
    /// Times as slow before it is ejected for it. Default 5, at least `ratio_min`: replicas of two generations of
    /// hardware differ up to fourfold, and the slower ones are worth having. Raise it when such a replica is ejected.
    pub eject_ratio_min: f64,
    /// Standard errors, by the MAD of the peers, that a backend must lie beyond them. Default 3, 0 or more: of
    /// two equal backends whose times vary tenfold one loses share in a look of a hundred, and none is ejected. Raise
    /// it when `slow` ejections hit a sound pool.
    pub deviations_min: f64,
    /// First tokens this much later than its peers' are needed. Default 100 ms: less is not noticed by anyone,
    /// whatever the ratio.
    pub first_token_floor: Duration,
    /// Token gaps this much longer than its peers' are needed. Default 10 ms: less is faster than anyone reads, and 5 ms
    /// beside 1 ms is a scheduler's whim.
    pub token_gap_floor: Duration,
    /// Samples needed before a median means anything, of the backend and of each peer. Default 3, 1..=9: a replica that
    /// finishes one request a minute has them after three.
    pub samples_min: u32,
    /// How long a sample is remembered. Default 10 min, more than zero: longer than the longest ordinary request.
    pub memory: Duration,
    /// Most that slowness multiplies load by. Default 10, 1 or more: a tenth of the work is enough to see it recover.
    pub factor_max: f64,
    /// How long slowness must last, and go on for `samples_min` more samples, before the backend is ejected. Default 30 s,
    /// more than zero: longer than one long prefill, shorter than the health that takes an ejection's doubling back.
    /// Samples older than this do not count beside `samples_min` newer ones: what was true before the last few
    /// requests says little.
    pub persistent: Duration,
}

impl Default for OutlierPolicy {
    fn default() -> Self {
        Self {
            ratio_min: 3.0,
            eject_ratio_min: 5.0,
            deviations_min: 3.0,
            first_token_floor: Duration::from_millis(100),
            token_gap_floor: Duration::from_millis(10),
            samples_min: 3,
            memory: Duration::from_secs(600),
            factor_max: 10.0,
            persistent: Duration::from_secs(30),
        }
    }
}

impl OutlierPolicy {
    /// All that is wrong with these numbers at once, each line beginning with the field at fault.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        let mut require = |holds: bool, line: &str| {
            if !holds {
                wrong.push(line.to_owned());
            }
        };
        require(self.ratio_min.is_finite() && self.ratio_min > 1.0, "ratio_min must be more than 1");
        require(
            self.eject_ratio_min.is_finite() && self.eject_ratio_min >= self.ratio_min,
            "eject_ratio_min must not be below ratio_min",
        );
        require(
            self.deviations_min.is_finite() && self.deviations_min >= 0.0,
            "deviations_min must be 0 or more",
        );
        require((1..=SAMPLES_MAX).contains(&(self.samples_min as usize)), "samples_min must be within 1..=9");
        require(!self.memory.is_zero(), "memory must be more than zero");
        require(self.factor_max.is_finite() && self.factor_max >= 1.0, "factor_max must be 1 or more");
        require(!self.persistent.is_zero(), "persistent must be more than zero");
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// From sending the request to its first token, or to the first byte of another answer.
    FirstToken,
    /// Between two tokens of a stream, on average over a stretch of it.
    TokenGap,
}

/// One measurement. A finished attempt gives one of each measure; a long stream gives a gap for each stretch of some
/// seconds, because a drip that lasts ten minutes must not be news only at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Which.
    pub measure: Measure,
    /// When what was measured began.
    pub began: Moment,
    /// How long it took.
    pub measured: Duration,
    /// How long it usually takes for its class in this pool.
    pub usual: Duration,
}

/// The recent speed of one backend. A plain value of 300 bytes: the record of the backend owns it and its lock.
#[derive(Clone, Debug, Default)]
pub struct Speed {
    first_token: Window,
    token_gap: Window,
    /// What began before is not heard of.
    forgotten: Moment,
    /// The latest sample.
    latest: Moment,
}

impl Speed {
    /// Learns one sample.
    pub fn record(&mut self, now: Moment, sample: &Sample) {
        if sample.began < self.forgotten {
            return;
        }
        match sample.measure {
            Measure::FirstToken => self.first_token.record(now, sample),
            Measure::TokenGap => self.token_gap.record(now, sample),
        }
        self.latest = self.latest.max(now);
    }

    /// Forgets everything, and what began before `now` for ever. To be called when the backend is ejected and when it
    /// returns.
    pub fn forget(&mut self, now: Moment) {
        *self = Self { forgotten: now, ..Self::default() };
    }

    /// What its samples say, to be compared with those of its peers.
    pub fn reading(&self, policy: &OutlierPolicy, now: Moment) -> Reading {
        Reading {
            first_token: self.first_token.summary(policy, now),
            token_gap: self.token_gap.summary(policy, now),
        }
    }

    /// Takes in how slow it is at this moment, by [`slowness`]. Returns the ratio when it has been too slow for too long
    /// by one of the measures and is to be ejected; again each time it is called while that holds. Call it a few times a
    /// second.
    pub fn judge(&mut self, policy: &OutlierPolicy, now: Moment, slowness: Slowness) -> Option<f64> {
        let first_token = self.first_token.judge(policy, now, slowness.first_token);
        let token_gap = self.token_gap.judge(policy, now, slowness.token_gap);
        larger(first_token, token_gap)
    }

    /// What to multiply its load by: 1 for a backend that is not slow, `factor_max` at most. By what
    /// [`judge`](Self::judge) was told last; sinks towards 1 without new samples.
    pub fn load_factor(&self, policy: &OutlierPolicy, now: Moment) -> f64 {
        let ratio = |window: &Window| window.slow.map(|slow| slow.ratio);
        let Some(ratio) = larger(ratio(&self.first_token), ratio(&self.token_gap)) else { return 1.0 };
        let unheard = now.since(self.latest).as_secs_f64() / BELIEF_HALF_LIFE.as_secs_f64();
        1.0 + (ratio.min(policy.factor_max) - 1.0) * (-unheard).exp2()
    }
}

fn larger(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    [a, b].into_iter().flatten().max_by(f64::total_cmp)
}

/// The samples of one backend in short; of a measure without enough samples, nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    first_token: Option<Summary>,
    token_gap: Option<Summary>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Summary {
    /// Median of the logarithms of measured / usual.
    median: f64,
    /// Their median distance from it.
    mad: f64,
    /// Median of measured - usual. Seconds.
    excess: f64,
    /// The logarithm of the newest.
    newest: f64,
    samples: f64,
}

/// How much slower than its peers a backend is by each measure, where that is clear.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slowness {
    first_token: Option<Found>,
    token_gap: Option<Found>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Found {
    /// So many times the median of its peers.
    ratio: f64,
    /// The same for its newest sample alone, which may be anything.
    newest: f64,
}

impl Slowness {
    /// So many times slower, by the worse of both measures; at least [`ratio_min`](OutlierPolicy::ratio_min).
    pub fn ratio(&self) -> Option<f64> {
        let ratio = |found: Option<Found>| found.map(|found| found.ratio);
        larger(ratio(self.first_token), ratio(self.token_gap))
    }
}

/// Compares a backend with its peers. Nothing is found without samples of its own, or without a peer that has some.
pub fn slowness<'a>(
    policy: &OutlierPolicy,
    own: &Reading,
    peers: impl Iterator<Item = &'a Reading> + Clone,
) -> Slowness {
    let by = |of: fn(&Reading) -> Option<Summary>, floor| {
        compare(policy, floor, &of(own)?, peers.clone().filter_map(of))
    };
    Slowness {
        first_token: by(|reading| reading.first_token, policy.first_token_floor),
        token_gap: by(|reading| reading.token_gap, policy.token_gap_floor),
    }
}

fn compare(
    policy: &OutlierPolicy,
    floor: Duration,
    own: &Summary,
    peers: impl Iterator<Item = Summary>,
) -> Option<Found> {
    let peers: SmallVec<[Summary; PEERS_INLINE]> = peers.collect();
    let of = |value: fn(&Summary) -> f64| peers.iter().map(value).collect::<Values>();
    let usual = median(&mut of(|peer| peer.median))?;
    let ratio = (own.median - usual).exp();
    // Most go no further: each backend is compared with each.
    if ratio < policy.ratio_min {
        return None;
    }
    let excess = own.excess - median(&mut of(|peer| peer.excess))?;
    if excess < floor.as_secs_f64() {
        return None;
    }
    // Peers differ among each other, and a median of few samples is off by chance; the backend's own spread is no
    // excuse for it.
    let between =
        MAD_TO_DEVIATION * median(&mut of(|peer| peer.median).iter().map(|m| (m - usual).abs()).collect())?;
    let within = MAD_TO_DEVIATION * MEDIAN_TO_MEAN_ERROR * median(&mut of(|peer| peer.mad))?;
    let samples: f64 = peers.iter().map(|peer| peer.samples).sum();
    let error = within * (1.0 / own.samples + 1.0 / samples).sqrt();
    let newest = (own.newest - usual).exp();
    (own.median - usual >= policy.deviations_min * between.hypot(error)).then_some(Found { ratio, newest })
}

/// The last samples of one measure.
#[derive(Clone, Debug, Default)]
struct Window {
    ring: [Kept; SAMPLES_MAX],
    next: usize,
    len: usize,
    /// Ever; wraps.
    samples: u32,
    slow: Option<Slow>,
}

/// What a window was told of itself last.
#[derive(Clone, Copy, Debug)]
struct Slow {
    ratio: f64,
    /// Since when it has been slow enough to be ejected.
    enough_since: Option<Moment>,
    /// The samples there were when that had lasted long enough.
    lasting_from: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    at: Moment,
    /// Logarithm of measured / usual.
    score: f32,
    /// Measured - usual, in seconds.
    excess: f32,
}

impl Window {
    fn record(&mut self, now: Moment, sample: &Sample) {
        let measured = sample.measured.max(TIME_MIN).as_secs_f64();
        let usual = sample.usual.max(TIME_MIN).as_secs_f64();
        let score = (measured / usual).ln() as f32;
        self.ring[self.next] = Kept { at: now, score, excess: (measured - usual) as f32 };
        self.next = (self.next + 1) % SAMPLES_MAX;
        self.len = (self.len + 1).min(SAMPLES_MAX);
        self.samples = self.samples.wrapping_add(1);
    }

    fn judge(&mut self, policy: &OutlierPolicy, now: Moment, found: Option<Found>) -> Option<f64> {
        let before = self.slow.take();
        let Found { ratio, newest } = found?;
        let enough = ratio >= policy.eject_ratio_min;
        let enough_since = enough.then(|| before.and_then(|slow| slow.enough_since).unwrap_or(now));
        let lasts = enough_since.is_some_and(|since| now.since(since) >= policy.persistent);
        let lasting_from = lasts.then(|| before.and_then(|slow| slow.lasting_from).unwrap_or(self.samples));
        self.slow = Some(Slow { ratio, enough_since, lasting_from });
        // Slow to the very last: who gets little traffic may have recovered long ago, and this is the first to show it.
        let news = self.samples.wrapping_sub(lasting_from?) >= policy.samples_min;
        (news && newest >= policy.ratio_min).then_some(ratio)
    }

    fn summary(&self, policy: &OutlierPolicy, now: Moment) -> Option<Summary> {
        // Newest first.
        let kept = (1..=self.len).map(|back| &self.ring[(self.next + SAMPLES_MAX - back) % SAMPLES_MAX]);
        let least = policy.samples_min as usize;
        let kept: SmallVec<[&Kept; SAMPLES_MAX]> = kept
            .enumerate()
            .take_while(|(n, kept)| {
                now.since(kept.at)
                    <= if *n < least { policy.memory } else { policy.persistent.min(policy.memory) }
            })
            .map(|(_, kept)| kept)
            .collect();
        if kept.len() < least {
            return None;
        }
        let newest = f64::from(kept.first()?.score);
        let mut scores: Values = kept.iter().map(|kept| f64::from(kept.score)).collect();
        let middle = median(&mut scores)?;
        let mut distances: Values = scores.iter().map(|score| (score - middle).abs()).collect();
        Some(Summary {
            median: middle,
            mad: median(&mut distances)?,
            excess: median(&mut kept.iter().map(|kept| f64::from(kept.excess)).collect())?,
            newest,
            samples: kept.len() as f64,
        })
    }
}

type Values = SmallVec<[f64; PEERS_INLINE]>;

/// The middle value, or the mean of the two in the middle.
fn median(values: &mut Values) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    let (middle, even) = (values.len() / 2, values.len().is_multiple_of(2));
    let (below, &mut upper, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    let lower = below.iter().copied().filter(|_| even).max_by(f64::total_cmp).unwrap_or(upper);
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::{
        BELIEF_HALF_LIFE, Measure, OutlierPolicy, Reading, SAMPLES_MAX, Sample, Slowness, Speed, median,
        slowness,
    };
    use crate::policy::Moment;
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use std::time::Duration;

    proptest! {
        #[test]
        fn the_median_is_in_the_middle_of_what_is_sorted(values in prop::collection::vec(-1e6..1e6, 0..40)) {
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let expected = match sorted.len() {
                0 => None,
                len => Some((sorted[(len - 1) / 2] + sorted[len / 2]) / 2.0),
            };
            prop_assert_eq!(median(&mut values.into_iter().collect()), expected);
        }
    }

    /// A pool in which each backend's samples are given, in seconds where a second is usual.
    struct Fleet {
        policy: OutlierPolicy,
        now: Moment,
        speeds: Vec<Speed>,
    }

    impl Fleet {
        fn of(members: usize) -> Self {
            let now = Moment::from_micros(1_000_000_000);
            Self { policy: OutlierPolicy::default(), now, speeds: vec![Speed::default(); members] }
        }

        fn measuring(samples: &[&[f64]]) -> Self {
            let mut fleet = Self::of(samples.len());
            for (i, samples) in samples.iter().enumerate() {
                samples.iter().for_each(|&secs| fleet.record(i, secs));
            }
            fleet
        }

        fn record_as(&mut self, i: usize, measure: Measure, measured: f64, usual: f64) {
            let (measured, usual) = (Duration::from_secs_f64(measured), Duration::from_secs_f64(usual));
            self.speeds[i].record(self.now, &Sample { measure, began: self.now, measured, usual });
        }

        fn record(&mut self, i: usize, secs: f64) {
            self.record_as(i, Measure::FirstToken, secs, 1.0);
        }

        fn readings(&self) -> Vec<Reading> {
            self.speeds.iter().map(|speed| speed.reading(&self.policy, self.now)).collect()
        }

        fn found(&self, i: usize) -> Slowness {
            let readings = self.readings();
            let peers = readings.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, reading)| reading);
            slowness(&self.policy, &readings[i], peers)
        }

        fn slowness(&self, i: usize) -> Option<f64> {
            self.found(i).ratio()
        }

        fn judge(&mut self, i: usize) -> Option<f64> {
            let slowness = self.found(i);
            self.speeds[i].judge(&self.policy, self.now, slowness)
        }

        fn factor(&self, i: usize) -> f64 {
            self.speeds[i].load_factor(&self.policy, self.now)
        }

        fn pass(&mut self, secs: f64) {
            self.now = self.now + Duration::from_secs_f64(secs);
        }

        fn all(&self) -> Vec<Option<f64>> {
            (0..self.speeds.len()).map(|i| self.slowness(i)).collect()
        }
    }

    fn near(found: Option<f64>, expected: f64) -> bool {
        found.is_some_and(|found| (found / expected - 1.0).abs() < 1e-3)
    }

    #[test]
    fn of_two_replicas_the_slow_one_is_found_from_three_samples() {
        let mut fleet = Fleet::measuring(&[&[10.0, 10.0], &[1.0, 1.1, 0.9]]);
        assert_eq!(fleet.all(), [None, None], "two samples say nothing");
        fleet.record(0, 10.0);
        assert!(near(fleet.slowness(0), 10.0), "{:?}", fleet.all());
        assert_eq!(fleet.slowness(1), None);
    }

    #[test]
    fn a_peer_without_samples_is_no_measure() {
        assert_eq!(Fleet::measuring(&[&[10.0; 9]]).all(), [None]);
        assert_eq!(Fleet::measuring(&[&[10.0; 9], &[]]).all(), [None, None]);
        assert_eq!(Fleet::measuring(&[&[10.0; 9], &[1.0, 1.0]]).all(), [None, None]);
    }

    #[test]
    fn one_measure_is_not_compared_with_the_other() {
        let mut fleet = Fleet::of(2);
        for _ in 0..9 {
            fleet.record_as(0, Measure::FirstToken, 10.0, 1.0);
            fleet.record_as(1, Measure::TokenGap, 1.0, 1.0);
        }
        assert_eq!(fleet.all(), [None, None]);
        for _ in 0..9 {
            fleet.record_as(0, Measure::TokenGap, 20.0, 1.0);
            fleet.record_as(1, Measure::FirstToken, 1.0, 1.0);
        }
        assert!(near(fleet.slowness(0), 20.0), "the worse of both: {:?}", fleet.all());
    }

    #[test]
    fn the_ratio_is_to_the_median_of_the_peers_and_has_a_least() {
        let fleet = |own: f64| Fleet::measuring(&[&[own; 9], &[1.0; 9], &[2.0; 9], &[1.0; 9]]);
        assert_eq!(fleet(2.99).slowness(0), None);
        assert!(near(fleet(3.01).slowness(0), 3.01));
        let mut even = Fleet::measuring(&[&[8.0; 9], &[1.0; 9], &[1.21; 9]]);
        assert!(near(even.slowness(0), 8.0 / 1.1), "of two peers the mean of both: {:?}", even.all());
        even.policy.deviations_min = 20.0;
        assert_eq!(even.slowness(0), None, "peers a tenth apart, and twenty times that is asked for");
    }

    #[test]
    fn peers_that_are_off_what_is_usual_themselves_change_nothing() {
        let peer: [f64; 9] = [0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5];
        for pace in [0.125, 1.0, 8.0] {
            let all = |times: f64| [times * pace; 9];
            assert!(near(Fleet::measuring(&[&all(10.0), &all(1.0), &all(1.0)]).slowness(0), 10.0), "{pace}");
            assert_eq!(Fleet::measuring(&[&all(2.0), &all(1.0)]).slowness(0), None, "{pace}");
            let peer = peer.map(|secs| secs * pace);
            assert_eq!(Fleet::measuring(&[&all(6.0)[..3], &peer]).slowness(0), None, "{pace}");
            assert!(Fleet::measuring(&[&all(6.0), &peer]).slowness(0).is_some(), "{pace}");
        }
        let mut fleet = Fleet::measuring(&[&[40.0; 8], &[2.0; 9]]);
        for (secs, newest) in [(4.0, 2.0), (2.0, 1.0), (20.0, 10.0)] {
            fleet.record(0, secs);
            let found = fleet.found(0).first_token.expect("most are slow");
            assert!(near(Some(found.newest), newest), "{found:?}");
        }
    }

    #[test]
    fn the_floor_is_what_separates_it_from_its_peers() {
        let excess = |peer: f64, own: f64| {
            let mut fleet = Fleet::of(2);
            fleet.policy.first_token_floor = Duration::from_millis(125);
            for _ in 0..SAMPLES_MAX {
                fleet.record_as(0, Measure::FirstToken, own, 0.031_25);
                fleet.record_as(1, Measure::FirstToken, peer, 0.031_25);
            }
            fleet.slowness(0).is_some()
        };
        assert!(excess(0.031_25, 0.156_25), "just as much later as it takes");
        assert!(!excess(0.031_25, 0.156_24));
        assert!(!excess(0.046_875, 0.171_86), "its peers are later than usual too");
        assert!(excess(0.046_875, 0.171_875));
    }

    #[test]
    fn what_nobody_notices_is_no_slowness() {
        for (measure, usual, slow, slower) in
            [(Measure::TokenGap, 0.001, 0.005, 0.0112), (Measure::FirstToken, 0.02, 0.119, 0.121)]
        {
            let fleet = |slow: f64| {
                let mut fleet = Fleet::of(2);
                for _ in 0..SAMPLES_MAX {
                    fleet.record_as(0, measure, slow, usual);
                    fleet.record_as(1, measure, usual, usual);
                }
                fleet
            };
            assert_eq!(fleet(slow).slowness(0), None, "{measure:?}");
            assert!(fleet(slower).slowness(0).is_some(), "{measure:?}");
        }
    }

    #[test]
    fn classes_of_different_length_mix() {
        let mut fleet = Fleet::of(3);
        for n in 0..SAMPLES_MAX {
            let usual = if n % 2 == 0 { 0.2 } else { 30.0 };
            fleet.record_as(0, Measure::FirstToken, usual * 4.0, usual);
            fleet.record_as(1, Measure::FirstToken, 0.2, 0.2);
            fleet.record_as(2, Measure::FirstToken, 30.0, 30.0);
        }
        assert!(near(fleet.slowness(0), 4.0), "{:?}", fleet.all());
        assert_eq!(fleet.all()[1..], [None, None]);
    }

    #[test]
    fn peers_that_scatter_ask_for_more_and_peers_that_agree_for_less() {
        let calm: [f64; 9] = [0.9, 0.95, 1.0, 1.0, 1.0, 1.0, 1.05, 1.1, 1.1];
        let wild: [f64; 9] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];
        assert!(near(Fleet::measuring(&[&[5.0; 9], &calm]).slowness(0), 5.0));
        assert_eq!(Fleet::measuring(&[&[5.0; 9], &wild]).slowness(0), None);
        assert!(Fleet::measuring(&[&[500.0; 9], &wild]).slowness(0).is_some());
        let unequal = |own: f64| Fleet::measuring(&[&[own; 9], &[0.5; 9], &[1.0; 9], &[2.0; 9]]);
        assert_eq!(unequal(5.0).slowness(0), None, "peers differ fourfold between them");
        assert!(unequal(50.0).slowness(0).is_some());
    }

    #[test]
    fn few_samples_ask_for_more() {
        let peer: [f64; 9] = [0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5];
        assert_eq!(Fleet::measuring(&[&[6.0; 3], &peer]).slowness(0), None);
        assert!(Fleet::measuring(&[&[6.0; 9], &peer]).slowness(0).is_some());
        assert!(Fleet::measuring(&[&[6.0; 3], &peer, &peer, &peer]).slowness(0).is_some(), "more peers");
        assert_eq!(Fleet::measuring(&[&[5.0; 3], &peer, &peer, &peer]).slowness(0), None, "three are three");
    }

    #[test]
    fn recovery_is_believed_after_five_samples() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        for _ in 0..4 {
            fleet.record(0, 1.0);
            assert!(fleet.slowness(0).is_some());
        }
        fleet.record(0, 1.0);
        assert_eq!(fleet.slowness(0), None);
        assert_eq!(fleet.judge(0), None);
        assert!((fleet.factor(0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn samples_are_remembered_for_ten_minutes() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[]]);
        fleet.pass(600.0);
        (0..3).for_each(|_| fleet.record(1, 1.0));
        assert!(fleet.slowness(0).is_some());
        fleet.pass(0.000_001);
        assert_eq!(fleet.slowness(0), None);
    }

    #[test]
    fn what_began_before_the_return_is_not_heard_of() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        assert_eq!(fleet.judge(0), None);
        assert!(fleet.factor(0) > 9.9);
        let before = fleet.now;
        fleet.pass(1.0);
        let now = fleet.now;
        fleet.speeds[0].forget(now);
        assert_eq!(fleet.slowness(0), None);
        assert!((fleet.factor(0) - 1.0).abs() < 1e-9);
        let straggler = Sample {
            measure: Measure::FirstToken,
            began: before,
            measured: Duration::from_secs(10),
            usual: Duration::from_secs(1),
        };
        (0..9).for_each(|_| fleet.speeds[0].record(now, &straggler));
        assert_eq!(fleet.slowness(0), None);
        (0..3).for_each(|_| fleet.speeds[0].record(now, &Sample { began: now, ..straggler }));
        assert!(fleet.slowness(0).is_some());
    }

    #[test]
    fn slowness_costs_share_at_once_up_to_a_bound_and_less_when_nothing_is_heard() {
        let mut fleet = Fleet::measuring(&[&[4.0; 9], &[1.0; 9]]);
        fleet.judge(0);
        fleet.judge(1);
        assert!(near(Some(fleet.factor(0)), 4.0));
        assert!(near(Some(fleet.factor(1)), 1.0));
        fleet.pass(BELIEF_HALF_LIFE.as_secs_f64());
        assert!(near(Some(fleet.factor(0)), 2.5));
        fleet.pass(BELIEF_HALF_LIFE.as_secs_f64());
        assert!(near(Some(fleet.factor(0)), 1.75));
        (0..9).for_each(|_| fleet.record(0, 1000.0));
        fleet.judge(0);
        assert!(near(Some(fleet.factor(0)), 10.0));
    }

    /// Seconds until it is to be ejected, with one sample of each backend a `step`.
    fn ejected_after(ratio: f64, step: f64, secs: f64) -> Option<f64> {
        let mut fleet = Fleet::measuring(&[&[ratio; 9], &[1.0; 9]]);
        let mut waited = 0.0;
        loop {
            if fleet.judge(0).is_some() {
                return Some(waited);
            }
            if waited >= secs {
                return None;
            }
            fleet.pass(step);
            waited += step;
            fleet.record(0, ratio);
            fleet.record(1, 1.0);
        }
    }

    #[test]
    fn lasting_slowness_ejects_after_thirty_seconds_and_three_more_samples() {
        assert_eq!(ejected_after(10.0, 1.0, 100.0), Some(33.0));
        assert_eq!(ejected_after(10.0, 20.0, 200.0), Some(100.0));
        assert_eq!(ejected_after(10.0, 60.0, 300.0), Some(240.0));
        assert_eq!(ejected_after(4.9, 1.0, 300.0), None, "slow, but of use");
        assert_eq!(ejected_after(5.1, 1.0, 300.0), Some(33.0));
    }

    #[test]
    fn slowness_without_news_never_ejects() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        fleet.judge(0);
        (0..9).for_each(|_| fleet.record(0, 10.0));
        for _ in 0..60 {
            fleet.pass(9.0);
            assert_eq!(fleet.judge(0), None);
        }
        (0..2).for_each(|_| fleet.record(0, 10.0));
        assert_eq!(fleet.judge(0), None);
        fleet.record(0, 10.0);
        assert!(near(fleet.judge(0), 10.0), "still slow, nine minutes later");
        assert!(near(fleet.judge(0), 10.0), "and as long as it is not ejected");
    }

    #[test]
    fn who_was_slow_long_ago_and_is_fast_now_is_not_ejected() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        for _ in 0..3 {
            assert_eq!(fleet.judge(0), None);
            fleet.pass(60.0);
            fleet.record(0, 1.0);
            fleet.record(1, 1.0);
        }
        assert_eq!(fleet.judge(0), None);
        assert!((fleet.factor(0) - 1.0).abs() < 1e-9, "three new samples are worth more than six old ones");
    }

    #[test]
    fn the_first_fast_sample_after_a_slow_time_does_not_eject() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        fleet.judge(0);
        fleet.pass(30.0);
        fleet.judge(0);
        (0..2).for_each(|_| fleet.record(0, 10.0));
        fleet.pass(60.0);
        fleet.record(0, 1.0);
        assert!(fleet.slowness(0).is_some());
        assert_eq!(fleet.judge(0), None);
        fleet.record(0, 10.0);
        assert!(fleet.judge(0).is_some());
    }

    #[test]
    fn old_samples_count_while_there_are_too_few_new_ones() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        fleet.pass(29.0);
        (0..3).for_each(|_| fleet.record(0, 1.0));
        assert!(fleet.slowness(0).is_some(), "six of nine within half a minute");
        fleet.pass(1.1);
        assert_eq!(fleet.slowness(0), None, "only the new ones");
        fleet.pass(60.0);
        [10.0, 1.0, 1.0].into_iter().for_each(|secs| fleet.record(0, secs));
        assert_eq!(fleet.slowness(0), None, "and no more than is needed");
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        fleet.pass(31.0);
        [10.0, 1.0, 1.0].into_iter().for_each(|secs| fleet.record(0, secs));
        assert_eq!(fleet.slowness(0), None, "not one old one beside three new ones");
    }

    #[test]
    fn news_of_the_other_measure_do_not_eject() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        for _ in 0..100 {
            fleet.pass(1.0);
            fleet.record_as(0, Measure::TokenGap, 1.0, 1.0);
            fleet.record_as(1, Measure::TokenGap, 1.0, 1.0);
            assert_eq!(fleet.judge(0), None);
        }
        for n in 0..30 {
            fleet.pass(1.0);
            fleet.record_as(0, Measure::TokenGap, 20.0, 1.0);
            fleet.record_as(1, Measure::TokenGap, 1.0, 1.0);
            assert_eq!(fleet.judge(0), None, "{n} s slow by another measure");
        }
    }

    #[test]
    fn whichever_measure_is_worse_each_keeps_its_time() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        for second in 0.. {
            fleet.pass(1.0);
            fleet.record(0, if second % 2 == 0 { 8.0 } else { 12.0 });
            fleet.record(1, 1.0);
            fleet.record_as(0, Measure::TokenGap, 10.0, 1.0);
            fleet.record_as(1, Measure::TokenGap, 1.0, 1.0);
            if fleet.judge(0).is_some() {
                assert!((33..36).contains(&second), "{second}");
                break;
            }
            assert!(second < 36, "never");
        }
    }

    #[test]
    fn a_good_moment_starts_the_time_anew() {
        let mut fleet = Fleet::measuring(&[&[10.0; 9], &[1.0; 9]]);
        fleet.judge(0);
        fleet.pass(29.0);
        (0..5).for_each(|_| fleet.record(0, 1.0));
        assert_eq!(fleet.judge(0), None);
        (0..5).for_each(|_| fleet.record(0, 10.0));
        assert_eq!(fleet.judge(0), None);
        fleet.pass(29.9);
        (0..5).for_each(|_| fleet.record(0, 10.0));
        assert_eq!(fleet.judge(0), None);
        fleet.pass(0.1);
        assert_eq!(fleet.judge(0), None);
        (0..3).for_each(|_| fleet.record(0, 10.0));
        assert!(fleet.judge(0).is_some());
    }

    #[test]
    fn equal_backends_of_wildly_varying_speed_are_not_ejected() {
        // First tokens that vary tenfold either way (prompts, batches), in pools of two to five, for an hour each.
        let mut rng = fastrand::Rng::with_seed(20);
        for members in 2..=5 {
            let (mut fleet, mut alarms, mut looks) = (Fleet::of(members), 0, 0);
            for _ in 0..3600 {
                fleet.pass(1.0);
                for i in 0..members {
                    let normal: f64 = (0..12).map(|_| rng.f64()).sum::<f64>() - 6.0;
                    fleet.record(i, normal.exp());
                    assert_eq!(fleet.judge(i), None);
                    alarms += u32::from(fleet.factor(i) > 1.0);
                    looks += 1;
                }
            }
            assert!(
                alarms * 50 < looks,
                "{alarms} of {looks} looks at {members} equal backends found one slow"
            );
        }
    }

    #[test]
    fn defaults_are_valid_and_all_mistakes_are_named_at_once() {
        assert_eq!(OutlierPolicy::default().validate(), Ok(()));
        for (wrong, fields) in [
            (OutlierPolicy { ratio_min: 1.0, ..OutlierPolicy::default() }, "ratio_min"),
            (OutlierPolicy { ratio_min: f64::NAN, ..OutlierPolicy::default() }, "ratio_min eject_ratio_min"),
            (OutlierPolicy { eject_ratio_min: 2.9, ..OutlierPolicy::default() }, "eject_ratio_min"),
            (OutlierPolicy { eject_ratio_min: f64::INFINITY, ..OutlierPolicy::default() }, "eject_ratio_min"),
            (OutlierPolicy { deviations_min: -0.1, ..OutlierPolicy::default() }, "deviations_min"),
            (OutlierPolicy { samples_min: 0, ..OutlierPolicy::default() }, "samples_min"),
            (OutlierPolicy { samples_min: 10, ..OutlierPolicy::default() }, "samples_min"),
            (OutlierPolicy { memory: Duration::ZERO, ..OutlierPolicy::default() }, "memory"),
            (OutlierPolicy { factor_max: 0.9, ..OutlierPolicy::default() }, "factor_max"),
            (OutlierPolicy { persistent: Duration::ZERO, ..OutlierPolicy::default() }, "persistent"),
        ] {
            let lines = wrong.validate().expect_err("out of range");
            let named: Vec<&str> = lines.iter().filter_map(|line| line.split(' ').next()).collect();
            assert_eq!(named.join(" "), fields);
        }
        let lowest = OutlierPolicy {
            eject_ratio_min: 3.0,
            deviations_min: 0.0,
            factor_max: 1.0,
            samples_min: 9,
            ..OutlierPolicy::default()
        };
        assert_eq!(lowest.validate(), Ok(()));
    }

    proptest! {
        #[test]
        fn the_unit_of_time_does_not_matter(
            samples in prop::collection::vec(prop::collection::vec(1u32..1000, 0..12), 2..6),
            unit in 1u32..1000,
        ) {
            // Whole seconds, so that no rounding tells the units apart.
            let verdicts = |unit: u32| {
                let mut fleet = Fleet::of(samples.len());
                (fleet.policy.first_token_floor, fleet.policy.token_gap_floor) = (Duration::ZERO, Duration::ZERO);
                for (i, samples) in samples.iter().enumerate() {
                    for &secs in samples {
                        fleet.record_as(i, Measure::FirstToken, f64::from(secs * unit), f64::from(20 * unit));
                        fleet.record_as(i, Measure::TokenGap, f64::from((secs % 9 + 1) * unit), f64::from(2 * unit));
                    }
                }
                fleet.all()
            };
            prop_assert_eq!(verdicts(1), verdicts(unit));
        }

        #[test]
        fn the_order_of_samples_and_peers_does_not_matter(
            samples in prop::collection::vec(prop::collection::vec(0.001f64..100.0, 0..=SAMPLES_MAX), 2..6),
            seed in any::<u64>(),
        ) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut order: Vec<usize> = (0..samples.len()).collect();
            rng.shuffle(&mut order);
            let (mut fleet, mut shuffled) = (Fleet::of(samples.len()), Fleet::of(samples.len()));
            for (i, samples) in samples.iter().enumerate() {
                samples.iter().for_each(|&secs| fleet.record(i, secs));
            }
            for (place, &i) in order.iter().enumerate() {
                let mut samples = samples[i].clone();
                rng.shuffle(&mut samples);
                samples.iter().for_each(|&secs| shuffled.record(place, secs));
            }
            for (place, &i) in order.iter().enumerate() {
                prop_assert_eq!(shuffled.slowness(place).is_some(), fleet.slowness(i).is_some());
                if let (Some(one), Some(other)) = (shuffled.slowness(place), fleet.slowness(i)) {
                    prop_assert!((one / other - 1.0).abs() < 1e-9);
                }
            }
        }

        #[test]
        fn when_all_are_slow_alike_nobody_is(
            members in 2usize..8,
            slow in 1.0f64..1000.0,
            noise in prop::collection::vec(0.6f64..1.6, 72),
        ) {
            let mut fleet = Fleet::of(members);
            for (n, noise) in noise.iter().enumerate() {
                fleet.record(n % members, slow * noise);
            }
            prop_assert!(fleet.all().iter().all(Option::is_none), "{:?}", fleet.all());
        }

        #[test]
        fn the_slow_one_is_found_among_any_number_of_equals(
            members in 2usize..20,
            which in any::<prop::sample::Index>(),
            ratio in 8.0f64..100.0,
            noise in prop::collection::vec(0.8f64..1.25, 180),
        ) {
            let mut fleet = Fleet::of(members);
            let slow = which.index(members);
            for (n, noise) in noise.iter().enumerate() {
                let i = n % members;
                fleet.record(i, if i == slow { ratio * noise } else { *noise });
            }
            for i in 0..members {
                prop_assert_eq!(fleet.slowness(i).is_some(), i == slow);
                fleet.judge(i);
                prop_assert!((1.0..=10.0).contains(&fleet.factor(i)));
            }
        }

        #[test]
        fn at_most_half_of_a_pool_is_slow(
            samples in prop::collection::vec(prop::collection::vec(0.001f64..1000.0, 0..12), 1..12),
        ) {
            let mut fleet = Fleet::of(samples.len());
            for (i, samples) in samples.iter().enumerate() {
                samples.iter().for_each(|&secs| fleet.record(i, secs));
            }
            let slow = fleet.all().iter().flatten().count();
            prop_assert!(slow * 2 <= samples.len(), "{slow} of {samples:?}");
            prop_assert!(fleet.all().iter().flatten().all(|ratio| *ratio >= 3.0));
        }

        #[test]
        fn odd_times_do_no_harm(
            samples in prop::collection::vec((0usize..3, any::<bool>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..60),
        ) {
            let mut fleet = Fleet::of(3);
            for (i, gap, now, measured, usual) in samples {
                let measure = if gap { Measure::TokenGap } else { Measure::FirstToken };
                let (measured, usual) = (Duration::from_nanos(measured), Duration::from_micros(usual));
                let now = Moment::from_micros(now);
                fleet.speeds[i].record(now, &Sample { measure, began: now, measured, usual });
                fleet.now = now;
                fleet.judge(i);
                prop_assert!((1.0..=10.0).contains(&fleet.factor(i)), "{}", fleet.factor(i));
            }
        }
    }
}
