//! One cell of the matrix: four replicas behind a real evergate, some of them falling sick, and clients
//! that keep coming.
//!
//! A cell says what came of every request and what it cost. The bound it judges by is its own: the p99 of
//! its own healthy requests on the same machine a moment before, and four seconds.

use std::fmt::{self, Write as _};
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate::telemetry::metrics::AttemptOutcome;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use toml::{Table, Value as Toml};

use crate::api::{Endpoint, MODEL, Pace, shortened};
use crate::replica::{Act, Conduct, End, Replica, healthy, models};
use crate::rows::{Case, FIRST, POISON, Promise, Row, Sickness};
use crate::support::PATIENCE;
use crate::support::backend::NeverAccepting;
use crate::support::client::{Answer, Client, H2Client};
use crate::support::either::{AT_ONCE, Http, state};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::tls::{Authority, Certificate};

pub const REPLICAS: usize = 4;

/// What a fault may add to the healthy p99, the connect clock aside.
pub const ADDED_MAX: Duration = Duration::from_secs(4);

/// Requests while somebody is sick, and how often one comes.
pub const REQUESTS: usize = 40;
const EVERY: Duration = Duration::from_millis(50);

/// Requests while all are well.
const WARM_UP: usize = 40;
const WARM_UP_EVERY: Duration = Duration::from_millis(25);

/// Requests in wait for a healed replica's return, and for how long.
const RETURN_EVERY: Duration = Duration::from_millis(100);
const RETURN_MAX: Duration = Duration::from_secs(30);

/// An answer is waited for so much longer than it may take, to say how late it was.
const GRACE: Duration = Duration::from_secs(2);

/// When a leaving client leaves (F34), and how slow replicas are then.
const LEAVES_AFTER: Duration = Duration::from_millis(100);
const LEFT_PACE: u32 = 8;

/// Attempts for each request an overloaded pool is asked: the retry budget's fifth, and its floor of ten a second,
/// for the two seconds of requests and two of waiting.
const STORM_MAX: f64 = 1.2 + 10.0 * 4.0 / REQUESTS as f64;

/// A place in the matrix.
#[derive(Clone)]
pub struct Cell {
    pub row: Arc<Row>,
    pub endpoint: Endpoint,
    pub http: Http,
    pub sick: usize,
    /// Whether to wait for the return of the healed.
    pub with_return: bool,
}

pub fn protocol(http: Http) -> &'static str {
    match http {
        Http::One => "h1",
        Http::Two => "h2",
    }
}

impl Cell {
    /// Which of its row it is.
    fn place(&self) -> String {
        format!("{} · {} · {} sick", self.endpoint.name(), protocol(self.http), self.sick)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} · {}", self.row.id, self.row.what, self.place())
    }
}

/// What came of a cell.
#[derive(Debug, Default)]
pub struct Played {
    /// What must not be, each with all that is known about it.
    pub wrong: Vec<String>,
    /// Requests that did not get what was promised.
    pub failed: usize,
    pub healthy_p99: Duration,
    /// The longest answer while somebody was sick.
    pub worst: Duration,
    /// Requests that sick replicas saw after the first of them was found out.
    pub after_ejection: usize,
    /// From falling sick to being found out, the last of them.
    pub found_out: Option<Duration>,
    /// Attempts that reached a replica for each request.
    pub amplification: f64,
    /// From being healed to serving again, the slowest; none: not asked, or not within its time.
    pub returned: Option<Duration>,
}

impl Played {
    /// How much the worst request took longer than a healthy one.
    pub fn added(&self) -> Duration {
        self.worst.saturating_sub(self.healthy_p99)
    }
}

/// Plays a cell from its beginning to its end.
pub async fn play(cell: &Cell) -> Played {
    let mut stage = Stage::set(cell).await;
    let mut played = Played::default();
    let warm = stage.ask(0, WARM_UP, WARM_UP_EVERY, PATIENCE).await;
    for asked in &warm {
        match &asked.came {
            Came::Answer(answer) => {
                played.healthy_p99 = played.healthy_p99.max(answer.elapsed);
                if let Err(why) = cell.endpoint.check(asked.number, REPLICAS, false, answer) {
                    played.wrong.push(format!("{cell}: before anybody was sick: {why}"));
                }
            }
            other => played.wrong.push(format!("{cell}: before anybody was sick: {other:?}")),
        }
    }
    let bound = played.healthy_p99 + ADDED_MAX + cell.row.extra;
    let sent_before = stage.attempts();
    let seen_before = stage.seen();
    let fell = Instant::now();
    stage.fall().await;
    let watch = stage.watch(fell);
    let asked = stage.ask(FIRST, REQUESTS, EVERY, bound + GRACE).await;
    let found = watch.found();
    played.found_out = found.iter().flatten().max().map(|at| *at - fell);
    let first_found = found.iter().flatten().min().copied();
    played.after_ejection = first_found.map_or(0, |at| stage.sick_seen_after(at));
    let reached = match cell.row.sickness {
        // What a frozen replica was sent it has not seen.
        Sickness::Freezes => stage.attempts() - sent_before,
        // An attempt that made no connection is none that anybody has to carry.
        _ => stage.seen() - seen_before,
    };
    played.amplification = reached as f64 / REQUESTS as f64;
    for asked in &asked {
        if let Came::Answer(answer) = &asked.came {
            played.worst = played.worst.max(answer.elapsed);
        } else if matches!(asked.came, Came::Late) {
            played.worst = played.worst.max(bound + GRACE);
        }
        if let Err(why) = stage.judge(asked, bound) {
            played.failed += 1;
            played.wrong.push(format!(
                "{cell}: request {} ({:?} after the fall): {why}{}",
                asked.number,
                asked.at - fell,
                stage.story(asked.number, fell)
            ));
        }
    }
    if let Err(why) = stage.judge_all(&played) {
        played.wrong.push(format!("{cell}: {why}"));
    }
    if cell.with_return && !cell.row.no_return {
        stage.heal().await;
        let (returned, wrong) = stage.returned().await;
        played.returned = returned;
        played.wrong.extend(wrong);
    }
    played
}

/// What came of one request.
#[derive(Clone, Debug)]
pub enum Came {
    Answer(Answer),
    /// The connection ended without a head.
    Nothing(String),
    /// Not within the time it was waited for.
    Late,
    /// The client left.
    Left(Instant),
}

#[derive(Clone, Debug)]
pub struct Sent {
    pub number: usize,
    pub at: Instant,
    pub came: Came,
}

/// Sends request `number` on a connection of its own, and waits for its answer at most so long.
pub async fn send(
    address: SocketAddr,
    endpoint: Endpoint,
    number: usize,
    padding: usize,
    most: Duration,
) -> Sent {
    let request = endpoint.request(number, padding);
    let at = Instant::now();
    let answering = async {
        if endpoint == Endpoint::Infer {
            let answer = H2Client::connect(address).await.try_send(&request).await;
            return answer.map_err(|end| format!("{end:?}"));
        }
        let mut client = Client::connect(address).await;
        // It may be answered before it was read.
        let _ = client.write(&request.to_bytes()).await;
        client.try_read_answer(&request.method).await.map_err(|error| error.to_string())
    };
    let came = match timeout(most, answering).await {
        Ok(Ok(answer)) => Came::Answer(answer),
        Ok(Err(why)) => Came::Nothing(why),
        Err(_) => Came::Late,
    };
    Sent { number, at, came }
}

struct Stage<'c> {
    cell: &'c Cell,
    replicas: Vec<Arc<Replica>>,
    proxy: Arc<Proxy>,
    authority: Option<Authority>,
    holes: Vec<NeverAccepting>,
    /// Sicknesses that take their course.
    courses: JoinSet<()>,
}

impl<'c> Stage<'c> {
    async fn set(cell: &'c Cell) -> Self {
        let authority = cell.row.tls.then(Authority::new);
        let alpn: &[&str] = if cell.http == Http::One { &["http/1.1"] } else { &["h2"] };
        let good = authority.as_ref().map(|authority| authority.server(Certificate::Good, alpn));
        let mut replicas = Vec::new();
        for number in 0..REPLICAS {
            replicas.push(Arc::new(Replica::start(number, cell.http, good.as_ref()).await));
        }
        let mut builder = pool(cell, authority.as_ref());
        for (number, replica) in replicas.iter().enumerate() {
            builder = with(builder, cell, number, replica);
        }
        let proxy = Arc::new(Proxy::start(&builder));
        if !matches!(cell.row.sickness, Sickness::Unresolvable) {
            proxy.probed().await;
        }
        let courses = JoinSet::new();
        Self { cell, replicas, proxy, authority, holes: Vec::new(), courses }
    }

    fn case(&self) -> Case {
        Case { endpoint: self.cell.endpoint, http: self.cell.http }
    }

    fn sick(&self) -> &[Arc<Replica>] {
        &self.replicas[..self.cell.sick]
    }

    /// Sends `count` requests, one `every` so often, and waits for all of them.
    async fn ask(&self, first: usize, count: usize, every: Duration, most: Duration) -> Vec<Sent> {
        let mut asking = JoinSet::new();
        let begin = tokio::time::Instant::now();
        for (nth, number) in (first..first + count).enumerate() {
            sleep_until(begin + every * u32::try_from(nth).unwrap()).await;
            if matches!(self.cell.row.sickness, Sickness::Removed) && number == FIRST + REQUESTS / 4 {
                self.remove();
            }
            let leaves =
                matches!(self.cell.row.sickness, Sickness::ClientsLeave) && number >= FIRST && nth % 4 == 3;
            let most = if leaves { LEAVES_AFTER } else { most };
            let (endpoint, padding, address) = (self.cell.endpoint, self.cell.row.padding, self.proxy.addr);
            asking.spawn(async move {
                let sent = send(address, endpoint, number, padding, most).await;
                match sent.came {
                    Came::Late if leaves => Sent { came: Came::Left(Instant::now()), ..sent },
                    _ => sent,
                }
            });
        }
        let mut sent = asking.join_all().await;
        sent.sort_by_key(|sent| sent.number);
        sent
    }

    /// Those who are to be sick fall sick.
    async fn fall(&mut self) {
        let case = self.case();
        let alpn: &[&str] = if self.cell.http == Http::One { &["http/1.1"] } else { &["h2"] };
        for replica in self.sick().to_vec() {
            match self.cell.row.sickness {
                Sickness::Requests(ill) => {
                    replica.conduct(Arc::new(move |asked| asked.number.and_then(|_| ill(asked, case))));
                }
                Sickness::RequestsAndProbes(ill) => replica.conduct(Arc::new(move |asked| ill(asked, case))),
                Sickness::Probes(ill) => {
                    replica.conduct(Arc::new(move |asked| asked.number.is_none().then(|| ill(asked))));
                }
                Sickness::Refuses => replica.die().await,
                Sickness::Blackhole => {
                    replica.die().await;
                    self.holes.push(NeverAccepting::at(replica.addr()).await);
                }
                Sickness::Shows(certificate) => {
                    let authority = self.authority.as_ref().expect("a row of TLS has an authority");
                    replica.show(&authority.server(certificate, alpn));
                    replica.drop_connections().await;
                }
                Sickness::Greets(acts) => {
                    replica.greet(Some(acts()));
                    replica.drop_connections().await;
                }
                Sickness::Freezes => replica.freeze(),
                Sickness::Slow(factor) => replica.pace(Pace::USUAL.times(factor)),
                Sickness::Restarts => {
                    replica.die().await;
                    self.courses.spawn(restarts(replica, case));
                }
                Sickness::Drains => {
                    self.courses.spawn(drains(replica, case));
                }
                Sickness::OtherModel => {
                    replica.die().await;
                    replica.conduct(other_model(case));
                    replica.listen();
                }
                Sickness::Unresolvable | Sickness::Removed | Sickness::ClientsLeave => {}
            }
        }
        if matches!(self.cell.row.sickness, Sickness::ClientsLeave) {
            self.replicas.iter().for_each(|replica| replica.pace(Pace::USUAL.times(LEFT_PACE)));
        }
    }

    /// And are well again.
    async fn heal(&mut self) {
        self.courses.shutdown().await;
        self.holes.clear();
        let alpn: &[&str] = if self.cell.http == Http::One { &["http/1.1"] } else { &["h2"] };
        for replica in &self.replicas {
            if let Some(authority) = &self.authority {
                replica.show(&authority.server(Certificate::Good, alpn));
            }
            replica.greet(None);
            replica.conduct(healthy());
            replica.pace(Pace::USUAL);
            replica.thaw();
            replica.listen();
        }
    }

    /// The configuration without those who are to go.
    fn remove(&self) {
        let mut builder = pool(self.cell, self.authority.as_ref());
        for (number, replica) in self.replicas.iter().enumerate().skip(self.cell.sick) {
            builder = with(builder, self.cell, number, replica);
        }
        self.proxy.running.directory().apply(builder.build_config()).unwrap();
    }

    /// How long the slowest of the healed takes to serve again, and what went wrong meanwhile.
    async fn returned(&self) -> (Option<Duration>, Vec<String>) {
        let healed = Instant::now();
        let mut wrong = Vec::new();
        let mut first = FIRST * 10;
        let all_serve = || self.sick().iter().all(|replica| replica.has_served_since(healed));
        while !all_serve() && healed.elapsed() < RETURN_MAX {
            const BATCH: usize = 4;
            for sent in self.ask(first, BATCH, RETURN_EVERY, PATIENCE).await {
                let Came::Answer(answer) = &sent.came else {
                    wrong.push(format!("{}: behind the healing: {:?}", self.cell, sent.came));
                    continue;
                };
                // What was said while it was busy may still hold.
                let is_honest =
                    matches!(self.cell.row.promise, Promise::AnswerOrOverload | Promise::Unavailable)
                        && is_overload(answer).is_ok();
                if let (false, Err(why)) =
                    (is_honest, self.cell.endpoint.check(sent.number, REPLICAS, false, answer))
                {
                    wrong.push(format!(
                        "{}: behind the healing: {why}{}",
                        self.cell,
                        self.story(sent.number, healed)
                    ));
                }
            }
            first += BATCH;
        }
        if !all_serve() {
            wrong.push(format!(
                "{}: a healed replica does not serve within {RETURN_MAX:?}: {}",
                self.cell,
                self.states()
            ));
        }
        (all_serve().then(|| healed.elapsed()), wrong)
    }

    /// Attempts that have ended, at all replicas, and those that have not.
    fn attempts(&self) -> u64 {
        let snapshot = self.proxy.running.directory().snapshot();
        let of = |backend: &evergate::pool::Backend| -> u64 {
            AttemptOutcome::ALL.iter().map(|outcome| backend.metrics.attempts(*outcome)).sum()
        };
        snapshot.members().map(|(_, member)| of(&member.backend)).sum()
    }

    /// Numbered requests seen by all replicas.
    fn seen(&self) -> u64 {
        let of = |replica: &Arc<Replica>| {
            replica.seen().iter().filter(|seen| seen.number.is_some()).count() as u64
        };
        self.replicas.iter().map(of).sum()
    }

    fn sick_seen_after(&self, at: Instant) -> usize {
        let of = |replica: &Arc<Replica>| {
            replica.seen().iter().filter(|seen| seen.number.is_some() && seen.at > at).count()
        };
        self.sick().iter().map(of).sum()
    }

    fn states(&self) -> String {
        let names: Vec<&str> = self
            .replicas
            .iter()
            .filter(|replica| self.is_listed(replica))
            .map(|replica| state(&self.proxy, replica.addr()))
            .collect();
        names.join(", ")
    }

    fn is_listed(&self, replica: &Replica) -> bool {
        let address = replica.addr().to_string();
        let snapshot = self.proxy.running.directory().snapshot();
        snapshot.members().any(|(_, member)| member.params.authority.as_str() == address)
    }

    /// Notes when each sick replica is found out.
    fn watch(&self, fell: Instant) -> Watch {
        let (proxy, replicas) = (Arc::clone(&self.proxy), self.sick().to_vec());
        let listed: Vec<_> = replicas.into_iter().filter(|replica| self.is_listed(replica)).collect();
        let found = Arc::new(parking_lot::Mutex::new(vec![None; listed.len()]));
        let noted = Arc::clone(&found);
        let backends: Vec<_> = listed.iter().map(|replica| proxy.backend(replica.addr())).collect();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                for (backend, found) in backends.iter().zip(noted.lock().iter_mut()) {
                    let name = backend.whole().read(|health| health.operational().name());
                    if found.is_none() && !matches!(name, "unknown" | "healthy" | "slow_start") {
                        *found = Some(Instant::now().max(fell));
                    }
                }
                sleep(Duration::from_millis(10)).await;
            }
        });
        Watch { found, _tasks: tasks }
    }

    fn judge(&self, sent: &Sent, bound: Duration) -> Result<(), String> {
        let case = self.case();
        let right =
            |but_usage: bool, answer: &Answer| case.endpoint.check(sent.number, REPLICAS, but_usage, answer);
        let answer = match &sent.came {
            Came::Answer(answer) => answer,
            Came::Left(left) => return self.judge_left(sent.number, *left),
            Came::Nothing(why) => return Err(format!("no answer at all: {why}")),
            Came::Late => {
                return Err(format!("no answer within {:?}, where {bound:?} is the bound", bound + GRACE));
            }
        };
        match self.cell.row.promise {
            Promise::Answer | Promise::AnswerToWhoStays => right(false, answer)?,
            Promise::AnswerButUsage => right(true, answer)?,
            Promise::Relayed(expected) => {
                let expected = expected(sent.number, case);
                if (answer.status, answer.text()) != expected {
                    return Err(format!(
                        "{} {:?} instead of {expected:?}",
                        answer.status,
                        shortened(&answer.text())
                    ));
                }
            }
            Promise::Unavailable => {
                let told = is_overload(answer)?;
                if answer.status != 503 {
                    return Err(format!("status {}: {told}", answer.status));
                }
            }
            Promise::AnswerOrOverload => {
                right(false, answer).or_else(|_| is_overload(answer).map(|_| ()))?;
            }
            Promise::PoisonFails if sent.number == POISON => {
                if answer.status < 500 {
                    return Err(format!("the killer got {} {:?}", answer.status, shortened(&answer.text())));
                }
            }
            Promise::PoisonFails => right(false, answer)?,
        }
        if answer.elapsed <= bound {
            return Ok(());
        }
        Err(format!("right, but after {:?}, where {bound:?} is the bound", answer.elapsed))
    }

    /// The work of a client who left at `left` must have been cancelled at once.
    fn judge_left(&self, number: usize, left: Instant) -> Result<(), String> {
        let seen: Vec<_> = self
            .replicas
            .iter()
            .flat_map(|replica| replica.seen())
            .filter(|seen| seen.number == Some(number))
            .collect();
        match seen.iter().find(|seen| seen.end.is_none_or(|(_, at)| at > left + AT_ONCE)) {
            None => Ok(()),
            Some(seen) => Err(format!("the client left and {AT_ONCE:?} later its work went on: {seen:?}")),
        }
    }

    fn judge_all(&self, played: &Played) -> Result<(), String> {
        match self.cell.row.promise {
            Promise::AnswerOrOverload if played.amplification > STORM_MAX => {
                Err(format!("{:.2} attempts for a request: a storm", played.amplification))
            }
            Promise::Relayed(_) if played.amplification > 1.0 => {
                Err(format!("{:.2} attempts for a request that nobody can answer", played.amplification))
            }
            Promise::PoisonFails => {
                let deaths: usize = self
                    .replicas
                    .iter()
                    .map(|replica| replica.seen().iter().filter(|seen| seen.number == Some(POISON)).count())
                    .sum();
                if deaths <= 2 { Ok(()) } else { Err(format!("{deaths} replicas killed by one request")) }
            }
            _ => Ok(()),
        }
    }

    /// Which replica saw what of a request.
    fn story(&self, number: usize, since: Instant) -> String {
        let mut story = format!("\n    replicas by now: {}", self.states());
        for (nth, replica) in self.replicas.iter().enumerate() {
            for seen in replica.seen().iter().filter(|seen| seen.number == Some(number)) {
                let after = |at: Instant| at.saturating_duration_since(since).as_millis();
                let end = match seen.end {
                    Some((End::Served, at)) => format!("served by {} ms", after(at)),
                    Some((End::Spoilt, at)) => format!("spoilt by {} ms", after(at)),
                    Some((End::Left, at)) => format!("left by its peer at {} ms", after(at)),
                    None => "still at it".to_owned(),
                };
                let _ = write!(
                    story,
                    "\n    replica {nth} saw it at {} ms, connection {}, request {} of it, {end}",
                    after(seen.at),
                    seen.connection,
                    seen.index
                );
            }
        }
        story
    }
}

struct Watch {
    found: Arc<parking_lot::Mutex<Vec<Option<Instant>>>>,
    _tasks: JoinSet<()>,
}

impl Watch {
    /// When each was found out, as far as it was.
    fn found(self) -> Vec<Option<Instant>> {
        self.found.lock().clone()
    }
}

/// The pool of a cell: defaults, but for what names its replicas' protocol.
fn pool(cell: &Cell, authority: Option<&Authority>) -> ProxyBuilder {
    let mut builder = ProxyBuilder::new();
    if cell.http == Http::Two {
        builder = builder.set("pool.http", "2");
    }
    if let Some(authority) = authority {
        builder = builder.set("pool.tls.ca", authority.ca_path().to_str().unwrap());
    }
    // Three attempts, the default, may all meet sick ones when three of four are: a fourth is allowed then.
    if cell.sick == 3 {
        builder = builder.set("pool.retry.attempts_max", 4);
    }
    builder
}

fn with(builder: ProxyBuilder, cell: &Cell, number: usize, replica: &Replica) -> ProxyBuilder {
    if matches!(cell.row.sickness, Sickness::Unresolvable) && number < cell.sick {
        return builder.backend(&format!("http://replica-{number}.does-not-exist.invalid:8000"));
    }
    if cell.row.credentials {
        let headers = Table::from_iter([("authorization".to_owned(), Toml::from("Bearer ours"))]);
        return builder.backend_with(&replica.url(), &[("headers", Toml::Table(headers))]);
    }
    builder.backend(&replica.url())
}

/// Refused, then loading, then slow with a cold cache.
async fn restarts(replica: Arc<Replica>, case: Case) {
    const PART: Duration = Duration::from_millis(600);
    sleep(PART).await;
    let loading: Conduct = Arc::new(move |_| {
        let said = r#"{"error":{"message":"Loading model","type":"unavailable_error","code":503}}"#;
        Some(case.endpoint.whole(503, said))
    });
    replica.conduct(loading);
    replica.listen();
    sleep(PART).await;
    replica.pace(Pace::USUAL.times(3));
    replica.conduct(healthy());
    pending().await
}

/// Answers the running requests and the next ones with a goodbye, then takes no connection any more.
async fn drains(replica: Arc<Replica>, case: Case) {
    let number = |asked: &crate::replica::Asked| asked.number.unwrap_or_default();
    replica.conduct(Arc::new(move |asked| {
        asked.number?;
        let mut acts = case.endpoint.healthy(number(asked), asked.replica, Pace::USUAL);
        for act in &mut acts {
            if let Act::Head { headers, .. } = act {
                headers.push(("connection", "close".to_owned()));
            }
        }
        acts.insert(0, Act::GoAway);
        if case.http == Http::One {
            acts.push(Act::Fin);
        }
        Some(acts)
    }));
    sleep(Duration::from_secs(1)).await;
    replica.close_listener().await;
    pending().await
}

/// As an engine does that does not look at the name of the model: it answers, and wrongly.
fn other_model(case: Case) -> Conduct {
    const OTHER: &str = "other-model";
    Arc::new(move |asked| {
        let Some(number) = asked.number else {
            return (asked.path == "/v1/models").then(|| models(&[OTHER]));
        };
        let mut acts = case.endpoint.healthy(number, asked.replica, Pace::USUAL);
        for act in &mut acts {
            match act {
                Act::Data(bytes) => {
                    let text = String::from_utf8_lossy(bytes).replace(MODEL, OTHER).replace(" w", " other");
                    *bytes = text.into();
                }
                Act::Head { headers, .. } => headers.retain(|(name, _)| *name != "content-length"),
                _ => {}
            }
        }
        Some(acts)
    })
}

/// A refusal that says when to come back, in the words of some API.
fn is_overload(answer: &Answer) -> Result<String, String> {
    let text = shortened(&answer.text());
    let told =
        format!("status {}, retry-after {:?}, body {text:?}", answer.status, answer.header("retry-after"));
    let seconds = answer.header("retry-after").and_then(|seconds| seconds.parse::<u32>().ok());
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let is_honest = matches!(answer.status, 429 | 503 | 529) && seconds.is_some_and(|seconds| seconds >= 1);
    if is_honest && body["error"]["message"].is_string() { Ok(told) } else { Err(told) }
}
