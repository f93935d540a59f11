//! Everything that will happen in one world, from its scenario and its seed: links, trouble, requests.
//!
//! Four seconds to warm up, some seconds of trouble, then a time in which all is well. Half of the requests come
//! while there is trouble. At least one backend is well connected throughout, unless the scenario says otherwise.

use std::time::Duration;

use crate::net::simulated::{Conditions, Door, End};
use crate::sim::Skin;

/// Backends of a world.
pub(super) const BACKENDS: usize = 3;
/// Requests of a world while there is trouble, before and after; and those that come when all is well again.
const ASKS: usize = 20;
const LATE_ASKS: u64 = 6;
/// Until the first trouble: probes have passed, some answers were seen.
pub(super) const WARM: Duration = Duration::from_secs(5);
/// After the last trouble, until it has left no trace: the longest ejection that it earns, probes, a trial, and the
/// ramp behind it.
const RECOVERY: Duration = Duration::from_secs(30);
/// Then nobody asks, and the world is looked at: the longest answer, and idle connections closed.
const QUIET: Duration = Duration::from_secs(12);

/// What goes wrong in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scenario {
    /// Nothing: what the others are measured by.
    Calm,
    /// One backend cannot be reached and cannot be heard, then it can.
    Partition,
    /// One backend hears and is not heard, or the other way round.
    OneWay,
    /// Connections die and neither side is told; new ones can be made.
    HalfOpen,
    /// 1 to 300 ms to each backend, with as much jitter again.
    Latency,
    /// The link to one backend carries a few kilobytes a second, or is very far away.
    SlowLink,
    /// One backend's connections stand, and new ones are not answered.
    SilentConnects,
    /// One backend refuses new connections.
    Refusals,
    /// Connections to one or two backends break at any byte, by FIN or RST.
    Breaks,
    /// One after the other is killed and comes back.
    RestartStorm,
    /// All are unreachable, or refuse, and come back one by one.
    AllDown,
}

impl Scenario {
    pub(super) const ALL: [Self; 11] = [
        Self::Calm,
        Self::Partition,
        Self::OneWay,
        Self::HalfOpen,
        Self::Latency,
        Self::SlowLink,
        Self::SilentConnects,
        Self::Refusals,
        Self::Breaks,
        Self::RestartStorm,
        Self::AllDown,
    ];

    pub(super) fn of(seed: u64) -> Self {
        Self::ALL[(seed % Self::ALL.len() as u64) as usize]
    }
}

/// What happens to a host.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Trouble {
    Conditions(usize, Conditions),
    /// Towards it, and from it.
    Open(usize, [bool; 2]),
    Door(usize, Door),
    /// Its connections die in silence.
    Forget(usize),
    /// It loses its connections, and answers what still arrives by RST.
    Reboot(usize),
    Breaks(usize, Option<(std::ops::Range<u64>, End)>),
    Kill(usize),
    /// It listens again, and says that it loads, or no longer.
    Start(usize, bool),
    Loaded(usize),
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    ChatStream,
    CompletionStream,
    Chat,
    Embeddings,
}

impl Kind {
    pub(super) fn streams(self) -> bool {
        matches!(self, Self::ChatStream | Self::CompletionStream)
    }
}

/// A request.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) at: Duration,
    pub(super) kind: Kind,
    pub(super) h2: bool,
    /// Longest answer.
    pub(super) tokens_max: usize,
    /// Its client leaves so long after asking.
    pub(super) leaves: Option<Duration>,
}

/// One world.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) scenario: Scenario,
    pub(super) skin: Skin,
    /// The operator named the engine.
    pub(super) preset: bool,
    /// HTTP/2 to the backends.
    pub(super) h2: bool,
    /// Its soft clocks are as short as if it knew its traffic well. Else they are those of a pool that knows nothing.
    pub(super) known: bool,
    pub(super) first_token: Duration,
    pub(super) tokens_per_second: f64,
    pub(super) links: [Conditions; BACKENDS],
    pub(super) clients: Conditions,
    /// In the order of time.
    pub(super) trouble: Vec<(Duration, Trouble)>,
    /// Backends that are unwell at some time.
    pub(super) sick: [bool; BACKENDS],
    /// From the first trouble to the end of the last.
    pub(super) unwell: std::ops::Range<Duration>,
    /// In the order of time.
    pub(super) asks: Vec<Ask>,
    pub(super) ends: Duration,
}

const MS: fn(u64) -> Duration = Duration::from_millis;

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let scenario = Scenario::of(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x5EED_0FA1_14E7);
        let skin = [Skin::Vllm, Skin::Sglang, Skin::LlamaCpp, Skin::Generic][rng.usize(..4)];
        let lan = |rng: &mut fastrand::Rng| Conditions {
            latency: MS(rng.u64(0..=2)),
            jitter: MS(rng.u64(0..=2)),
            chopped: rng.u8(..8) == 0,
            ..Conditions::default()
        };
        let mut plan = Self {
            seed,
            scenario,
            skin,
            preset: skin != Skin::Generic && rng.bool(),
            h2: rng.u8(..4) == 0,
            known: rng.bool(),
            first_token: MS(rng.u64(20..=300)),
            tokens_per_second: [20.0, 30.0, 50.0][rng.usize(..3)],
            links: std::array::from_fn(|_| lan(&mut rng)),
            clients: Conditions {
                latency: MS(rng.u64(0..=30)),
                jitter: MS(rng.u64(0..=10)),
                ..lan(&mut rng)
            },
            trouble: Vec::new(),
            sick: [false; BACKENDS],
            unwell: WARM..WARM,
            asks: Vec::new(),
            ends: Duration::ZERO,
        };
        plan.make_trouble(&mut rng);
        plan.trouble.sort_by_key(|(at, _)| *at);
        plan.ask(&mut rng);
        plan.ends = plan.unwell.end + RECOVERY + QUIET;
        plan
    }

    /// Whether a probe of backend `i` has time for its two round trips.
    pub(super) fn probes_fit(&self, i: usize) -> bool {
        4 * (self.links[i].latency + self.links[i].jitter) < MS(950)
    }

    fn make_trouble(&mut self, rng: &mut fastrand::Rng) {
        let sick = rng.usize(..BACKENDS);
        let begins = WARM + MS(rng.u64(0..4_000));
        let heals = begins + MS(rng.u64(500..12_000));
        match self.scenario {
            Scenario::Calm => {}
            Scenario::Partition => {
                self.lasts(
                    sick,
                    begins,
                    heals,
                    Trouble::Open(sick, [false; 2]),
                    Trouble::Open(sick, [true; 2]),
                );
            }
            Scenario::OneWay => {
                let heard = rng.bool();
                self.lasts(
                    sick,
                    begins,
                    heals,
                    Trouble::Open(sick, [heard, !heard]),
                    Trouble::Open(sick, [true; 2]),
                );
            }
            Scenario::HalfOpen => {
                let all = rng.bool();
                for i in (0..BACKENDS).filter(|i| all || *i == sick) {
                    for _ in 0..rng.usize(1..=3) {
                        let at = begins + MS(rng.u64(0..10_000));
                        let what = if rng.u8(..3) == 0 { Trouble::Reboot(i) } else { Trouble::Forget(i) };
                        self.happens(i, at, what);
                    }
                }
            }
            Scenario::Latency => {
                for i in 0..BACKENDS {
                    self.links[i].latency = MS(rng.u64(1..=300));
                    self.links[i].jitter = self.links[i].latency.mul_f64(rng.f64());
                }
            }
            Scenario::SlowLink => {
                let slow = match rng.bool() {
                    true => Conditions { bytes_per_second: Some(rng.u32(1_000..20_000)), ..self.links[sick] },
                    false => {
                        Conditions { latency: MS(rng.u64(300..1_500)), jitter: MS(300), ..self.links[sick] }
                    }
                };
                let well = self.links[sick];
                self.lasts(
                    sick,
                    begins,
                    heals,
                    Trouble::Conditions(sick, slow),
                    Trouble::Conditions(sick, well),
                );
            }
            Scenario::SilentConnects | Scenario::Refusals => {
                let door = if self.scenario == Scenario::Refusals { Door::Shut } else { Door::Silent };
                self.lasts(sick, begins, heals, Trouble::Door(sick, door), Trouble::Door(sick, Door::Open));
            }
            Scenario::Breaks => {
                let second = (sick + 1) % BACKENDS;
                let both = rng.bool();
                for i in [Some(sick), both.then_some(second)].into_iter().flatten() {
                    let end = if rng.bool() { End::Closed } else { End::Reset };
                    let upto = [1, 20, 400, 8_000][rng.usize(..4)];
                    self.lasts(
                        i,
                        begins,
                        heals,
                        Trouble::Breaks(i, Some((0..upto, end))),
                        Trouble::Breaks(i, None),
                    );
                }
            }
            Scenario::RestartStorm => {
                let mut at = begins;
                for turn in 0..BACKENDS {
                    let i = (sick + turn) % BACKENDS;
                    let down = MS(rng.u64(200..2_500));
                    let loads = rng.bool().then(|| MS(rng.u64(200..2_000)));
                    self.happens(i, at, Trouble::Kill(i));
                    self.happens(i, at + down, Trouble::Start(i, loads.is_some()));
                    if let Some(loads) = loads {
                        self.happens(i, at + down + loads, Trouble::Loaded(i));
                    }
                    // The next one goes when this one is back and known to be.
                    at += down + loads.unwrap_or_default() + MS(rng.u64(3_000..4_000));
                }
            }
            Scenario::AllDown => {
                let how = rng.u8(..3);
                for i in 0..BACKENDS {
                    let at = begins + MS(rng.u64(0..300));
                    let back = heals + MS(rng.u64(0..3_000));
                    match how {
                        0 => self.lasts(i, at, back, Trouble::Kill(i), Trouble::Start(i, false)),
                        1 => {
                            self.lasts(i, at, back, Trouble::Open(i, [false; 2]), Trouble::Open(i, [true; 2]))
                        }
                        _ => self.lasts(
                            i,
                            at,
                            back,
                            Trouble::Door(i, Door::Shut),
                            Trouble::Door(i, Door::Open),
                        ),
                    }
                }
            }
        }
    }

    fn happens(&mut self, i: usize, at: Duration, what: Trouble) {
        if self.trouble.is_empty() {
            self.unwell = at..at;
        }
        self.unwell = self.unwell.start.min(at)..self.unwell.end.max(at);
        self.sick[i] = true;
        self.trouble.push((at, what));
    }

    fn lasts(&mut self, i: usize, from: Duration, to: Duration, worse: Trouble, better: Trouble) {
        self.happens(i, from, worse);
        self.happens(i, to, better);
    }

    fn ask(&mut self, rng: &mut fastrand::Rng) {
        let (begins, ends) = (self.unwell.start.saturating_sub(MS(1_500)), self.unwell.end + MS(1_000));
        let some = |rng: &mut fastrand::Rng, from: Duration, to: Duration| {
            MS(rng.u64(from.as_millis() as u64..to.as_millis() as u64))
        };
        for n in 0..ASKS {
            let from = if n % 4 == 0 { MS(1_000) } else { begins };
            let at = some(rng, from, ends);
            self.ask_at(at, rng);
        }
        for n in 0..LATE_ASKS {
            let at = ends + (RECOVERY - MS(3_000)).mul_f64(n as f64 / LATE_ASKS as f64);
            self.ask_at(at, rng);
        }
        self.asks.sort_by_key(|ask| ask.at);
    }

    fn ask_at(&mut self, at: Duration, rng: &mut fastrand::Rng) {
        let kind = match rng.u8(..10) {
            0..5 => Kind::ChatStream,
            5..7 => Kind::CompletionStream,
            7..9 => Kind::Chat,
            _ => Kind::Embeddings,
        };
        self.asks.push(Ask {
            at,
            kind,
            h2: rng.u8(..4) == 0,
            // Where soft clocks are short, what is usual must not take longer than what is suspicious.
            tokens_max: match (self.known, kind.streams()) {
                (true, false) => rng.usize(4..24),
                (true, true) => rng.usize(4..40),
                (false, _) => rng.usize(4..70),
            },
            leaves: (rng.u8(..12) == 0).then(|| MS(rng.u64(1..3_000))),
        });
    }
}
