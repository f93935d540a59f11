//! What must hold of a pool under ordinary traffic: a replica that stops or dies is left at once, and one
//! that is only slow is left alone.
//!
//! Three replicas, defaults. Streams that had begun on the sick one when it fell sick are not judged: they
//! would have to be continued elsewhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate::telemetry::metrics::AttemptOutcome;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::api::{Endpoint, Pace};
use crate::cell::{ADDED_MAX, Came, Sent, send};
use crate::replica::{End, Replica};
use crate::support::either::{Http, state};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::{PATIENCE, eventually};

const REPLICAS: usize = 3;

/// A frozen replica is out within this.
const FOUND_WITHIN: Duration = Duration::from_secs(3);

/// A crash costs a client at most this.
const CRASH_COSTS: Duration = Duration::from_secs(1);

/// 20 tokens a second.
const ORDINARY: Pace = Pace { first: Duration::from_millis(50), gap: Duration::from_millis(50) };

struct Pool {
    replicas: Vec<Arc<Replica>>,
    proxy: Proxy,
}

impl Pool {
    async fn start(pace: Pace) -> Self {
        let mut replicas = Vec::new();
        let mut builder = ProxyBuilder::new();
        for number in 0..REPLICAS {
            let replica = Replica::start(number, Http::One, None).await;
            replica.pace(pace);
            builder = builder.backend(&replica.url());
            replicas.push(Arc::new(replica));
        }
        let proxy = Proxy::start(&builder);
        proxy.probed().await;
        Self { replicas, proxy }
    }

    /// Begins a request every 50 ms, `count` of them.
    fn traffic(&self, first: usize, count: usize, most: Duration) -> JoinSet<Vec<Sent>> {
        let address = self.proxy.addr;
        let mut traffic = JoinSet::new();
        traffic.spawn(async move {
            let mut asking = JoinSet::new();
            for number in first..first + count {
                asking.spawn(send(address, Endpoint::ChatStream, number, 0, most));
                sleep(Duration::from_millis(50)).await;
            }
            asking.join_all().await
        });
        traffic
    }

    /// The longest answer of a pool that is well.
    async fn warmed_up(&self) -> Duration {
        const WARM_UP: usize = 40;
        let sent = self.traffic(0, WARM_UP, PATIENCE).join_all().await.concat();
        sent.iter()
            .map(|sent| self.rightly(sent, PATIENCE).unwrap_or_else(|why| panic!("{why}")))
            .max()
            .unwrap()
    }

    /// How long a right answer took.
    fn rightly(&self, sent: &Sent, bound: Duration) -> Result<Duration, String> {
        let Came::Answer(answer) = &sent.came else {
            return Err(format!("request {}: {:?}\n{}", sent.number, sent.came, self.story(sent.number)));
        };
        let right = Endpoint::ChatStream.check(sent.number, REPLICAS, false, answer);
        match right {
            Ok(()) if answer.elapsed <= bound => Ok(answer.elapsed),
            Ok(()) => Err(format!(
                "{} took {:?} of {bound:?}\n{}",
                sent.number,
                answer.elapsed,
                self.story(sent.number)
            )),
            Err(why) => Err(format!("{}: {why}\n{}", sent.number, self.story(sent.number))),
        }
    }

    /// Which replica saw what of a request.
    fn story(&self, number: usize) -> String {
        let of = |(nth, replica): (usize, &Arc<Replica>)| {
            let seen =
                replica.seen().into_iter().filter(|seen| seen.number == Some(number)).collect::<Vec<_>>();
            format!("  replica {nth}, {}: {seen:?}\n", state(&self.proxy, replica.addr()))
        };
        self.replicas.iter().enumerate().map(of).collect()
    }

    /// The replica that was asked for request `number`.
    async fn that_saw(&self, number: usize) -> usize {
        let asked = || {
            let saw = |replica: &Arc<Replica>| replica.seen().iter().any(|seen| seen.number == Some(number));
            self.replicas.iter().position(saw)
        };
        eventually(PATIENCE, || asked().is_some()).await;
        asked().unwrap()
    }

    /// Requests of which `replica` had said something by then, and not all.
    fn begun_by(&self, replica: usize, at: Instant) -> Vec<usize> {
        let begun = self.replicas[replica].seen().into_iter().filter(|seen| {
            seen.said.is_some_and(|said| said <= at) && seen.end.is_none_or(|(_, ended)| ended > at)
        });
        begun.filter_map(|seen| seen.number).collect()
    }

    fn is_out(&self, replica: usize) -> bool {
        let name = state(&self.proxy, self.replicas[replica].addr());
        !matches!(name, "unknown" | "healthy" | "slow_start")
    }

    fn faults(&self) -> u64 {
        let of = |replica: &Arc<Replica>| {
            self.proxy.backend(replica.addr()).metrics.attempts(AttemptOutcome::Fault)
        };
        self.replicas.iter().map(of).sum()
    }

    /// Attempts that were begun and given up.
    fn left(&self) -> usize {
        let of = |replica: &Arc<Replica>| {
            replica
                .seen()
                .iter()
                .filter(|seen| seen.number.is_some() && seen.ended(End::Left).is_some())
                .count()
        };
        self.replicas.iter().map(of).sum()
    }

    /// Nobody is out now, and nobody's fault was counted.
    fn nobody_was_blamed(&self) {
        let events = self.proxy.telemetry.events.latest();
        let told: Vec<String> =
            events.iter().map(|event| format!("{}: {}", event.event, event.text)).collect();
        let blames = |text: &str| text.starts_with("ejected") || text.starts_with("unhealthy");
        let blamed = events.iter().any(|event| blames(&event.text));
        let out: Vec<usize> = (0..REPLICAS).filter(|replica| self.is_out(*replica)).collect();
        assert!(out.is_empty() && !blamed, "blamed, though only slow; out are {out:?}: {told:#?}");
        assert_eq!(self.faults(), 0, "slowness was counted as a fault: {told:#?}");
    }
}

#[tokio::test]
async fn a_frozen_replica_is_out_within_three_seconds_and_costs_no_answer_before_its_first_token() {
    let pool = Pool::start(ORDINARY).await;
    let bound = pool.warmed_up().await + ADDED_MAX;
    let mut traffic = pool.traffic(100, 100, bound + Duration::from_secs(1));
    sleep(Duration::from_millis(1200)).await;
    pool.replicas[0].freeze();
    let frozen = Instant::now();
    let begun = pool.begun_by(0, frozen);
    let found = tokio::time::timeout(PATIENCE, eventually(PATIENCE * 2, || pool.is_out(0))).await;
    let found = found.is_ok().then(|| frozen.elapsed());
    let sent = traffic.join_next().await.unwrap().unwrap();
    let judged: Vec<&Sent> = sent.iter().filter(|sent| !begun.contains(&sent.number)).collect();
    assert!(judged.len() > 80, "{} of {} had begun", begun.len(), sent.len());
    let wrong: Vec<String> = judged.iter().filter_map(|sent| pool.rightly(sent, bound).err()).collect();
    assert!(
        wrong.is_empty(),
        "found after {found:?}; {} of {} were not answered: {}",
        wrong.len(),
        judged.len(),
        wrong.join("")
    );
    assert!(found.is_some_and(|found| found <= FOUND_WITHIN), "found after {found:?}");
}

#[tokio::test]
async fn a_crash_costs_no_answer_before_its_first_token_and_at_most_a_second() {
    let pool = Pool::start(ORDINARY).await;
    let bound = pool.warmed_up().await + CRASH_COSTS;
    let mut traffic = pool.traffic(100, 60, bound + Duration::from_secs(1));
    sleep(Duration::from_millis(1200)).await;
    let begun = pool.begun_by(0, Instant::now());
    pool.replicas[0].die().await;
    let sent = traffic.join_next().await.unwrap().unwrap();
    let judged: Vec<&Sent> = sent.iter().filter(|sent| !begun.contains(&sent.number)).collect();
    assert!(judged.len() > 40, "{} of {} had begun", begun.len(), sent.len());
    let wrong: Vec<String> = judged.iter().filter_map(|sent| pool.rightly(sent, bound).err()).collect();
    assert!(wrong.is_empty(), "{} of {} were not answered: {}", wrong.len(), judged.len(), wrong.join(""));
}

/// `requests` to a pool that has learned nothing and is as slow as that.
async fn all_slow(endpoint: Endpoint, pace: Pace, requests: usize) {
    /// A request may be asked twice when it is slow: one of twenty, or one at a time.
    const ASKED_TWICE_MAX: usize = 2;
    let pool = Pool::start(pace).await;
    let address = pool.proxy.addr;
    let most = pace.first * 2 + PATIENCE;
    let asking: JoinSet<Sent> =
        (0..requests).map(|number| send(address, endpoint, number, 0, most)).collect();
    for sent in asking.join_all().await {
        let Came::Answer(answer) = &sent.came else {
            panic!("{:?}\n{}", sent.came, pool.story(sent.number));
        };
        if let Err(why) = endpoint.check(sent.number, REPLICAS, false, answer) {
            panic!("{}: {why}\n{}", sent.number, pool.story(sent.number));
        }
    }
    pool.nobody_was_blamed();
    assert!(pool.left() <= ASKED_TWICE_MAX, "{} of {requests} were given up half-way", pool.left());
}

#[tokio::test]
async fn four_seconds_to_the_first_token_everywhere_are_nobodys_fault() {
    all_slow(Endpoint::ChatStream, Pace { first: Duration::from_secs(4), gap: ORDINARY.gap }, 12).await;
}

#[tokio::test]
async fn answers_of_twelve_seconds_everywhere_are_nobodys_fault() {
    all_slow(Endpoint::Chat, Pace { first: Duration::from_secs(12), gap: Duration::ZERO }, 12).await;
}

#[tokio::test]
#[ignore = "over a minute: cargo test --test matrix -- --ignored whole"]
async fn whole_answers_of_a_minute_everywhere_are_nobodys_fault() {
    all_slow(Endpoint::Chat, Pace { first: Duration::from_secs(60), gap: Duration::ZERO }, 12).await;
}

#[tokio::test]
async fn a_long_prefill_that_stops_all_decoding_of_a_replica_is_nobodys_fault() {
    const PREFILL: Duration = Duration::from_secs(5);
    /// Number of the request with the long prompt.
    const LONG: usize = 999;
    let pool = Pool::start(ORDINARY).await;
    let bound = pool.warmed_up().await + PREFILL + PATIENCE;
    let mut traffic = pool.traffic(100, 40, bound);
    sleep(Duration::from_millis(1000)).await;
    let long = tokio::spawn(send(pool.proxy.addr, Endpoint::ChatStream, LONG, 300 << 10, bound));
    let replica = pool.that_saw(LONG).await;
    let begun = pool.begun_by(replica, Instant::now());
    pool.replicas[replica].hold(true);
    sleep(PREFILL).await;
    pool.replicas[replica].hold(false);
    pool.rightly(&long.await.unwrap(), bound).unwrap_or_else(|why| panic!("{why}"));
    for sent in traffic.join_next().await.unwrap().unwrap() {
        if let Err(why) = pool.rightly(&sent, bound) {
            panic!("{why}");
        }
    }
    assert!(!begun.is_empty(), "nothing was running when the prefill began");
    pool.nobody_was_blamed();
}
